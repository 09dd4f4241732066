"""Whether an H.264 packet that its container marks as a keyframe is one from which decoding gives exact frames.

Encoders with rolling intra refresh mark frames as such that are only the beginning of a recovery: what is decoded
from there is a little wrong for some frames, and no one says so. Exact are an IDR picture, and a picture with a
recovery point after which no frame need be waited for (the I picture of an open GOP). Source: ITU-T H.264, 7.3.1,
7.3.2.3 and D.1.8.
"""

from collections.abc import Iterator

IDR, SEI = 5, 6
RECOVERY_POINT = 6


def decodes_from(packet: bytes, extradata: bytes | None) -> bool:
    """True for an IDR picture, or one with a recovery point at once. `extradata` tells how units are set apart."""
    for unit in _units(packet, extradata or b""):
        kind = unit[0] & 31 if unit else 0
        if kind == IDR or (kind == SEI and _recovers_at_once(unit[1:])):
            return True
    return False


def _units(packet: bytes, extradata: bytes) -> Iterator[bytes]:
    """The NAL units: each behind its length where `extradata` is an avcC record, else behind start codes."""
    if extradata[:1] != b"\x01":
        yield from (unit.rstrip(b"\x00") for unit in packet.split(b"\x00\x00\x01")[1:])
        return
    width = (extradata[4] & 3) + 1 if len(extradata) > 4 else 4
    place = 0
    while place + width < len(packet):
        size = int.from_bytes(packet[place : place + width], "big")
        yield packet[place + width : place + width + size]
        place += width + size


def _recovers_at_once(messages: bytes) -> bool:
    """Whether a recovery point with a count of 0 frames is among these SEI messages: its first bit is 1."""
    data = messages.replace(b"\x00\x00\x03", b"\x00\x00")
    place = 0
    while place < len(data):
        kind, place = _coded(data, place)
        size, place = _coded(data, place)
        if kind == RECOVERY_POINT and place < len(data):
            return bool(data[place] & 0x80)
        place += size
    return False


def _coded(data: bytes, place: int) -> tuple[int, int]:
    """A number that begins at `place`, in bytes of which all but the last are 255; and the place behind it."""
    value = 0
    while data[place : place + 1] == b"\xff":
        value, place = value + 255, place + 1
    return value + int.from_bytes(data[place : place + 1], "big"), place + 1
