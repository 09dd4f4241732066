"""How much of everything one server allows, in one value; nothing in it grows with time or with the requests."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. Times in seconds, sizes in bytes."""

    query_characters: int = 1000
    per_page: int = 12
    most_per_page: int = 48
    deepest: int = 960  # hits that can be paged to
    address_bytes: int = 8 * 1024  # of a request's path and query
    head_bytes: int = 16 * 1024  # of its headers

    upload_bytes: int = 64 * MIB
    upload_seconds: float = 60.0
    uploads: int = 4  # received or decoded at once
    decode_seconds: float = 20.0
    decode_bytes: int = 2048 * MIB  # memory of the process that decodes, beside what it starts with

    queued: int = 64  # requests that wait for the model
    together: int = 16  # sentences in one pass of the text tower
    model_seconds: float = 30.0  # that one of them waits
    remembered: int = 512  # vectors of the last queries

    connections: int = 256
    head_seconds: float = 15.0  # until a request's head has come
    send_seconds: float = 30.0  # until a client takes the next part of a medium
    wrong_tokens: int = 10  # a minute
