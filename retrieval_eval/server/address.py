"""Where a server listens and who may ask it, settled before anything is loaded."""

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

TOKEN_VARIABLE = "VIDEOMAMBA_TOKEN"
LEAST_TOKEN = 16


@dataclass(frozen=True)
class Address:
    """A bound socket that does not listen yet, and the token that it is guarded by."""

    listening: socket.socket
    token: str | None
    loopback: bool

    @property
    def url(self) -> str:
        """What to type into a browser."""
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def open_address(host: str, port: int, token_file: Path | None) -> Address:
    """Bind; port 0 takes a free one. UserError where it is taken, or open to other machines without a token."""
    loopback, token = is_loopback(host), read_token(token_file)
    if not loopback and token is None:
        raise UserError(
            f"{host} is open to other machines, and there is no token.",
            f"Give --token-file a file with one, or set {TOKEN_VARIABLE}; or leave --host out.",
        )
    return Address(bind(host, port), token, loopback)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; UserError where it is unreadable or too short to keep anyone out."""
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The token file {file} cannot be read ({error}).", "Give a text file with one.") from error
    elif TOKEN_VARIABLE in os.environ:
        token = os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"The token has {len(token)} characters; it takes at least {LEAST_TOKEN} that can be printed in ASCII.",
            "Make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return token


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, not listening yet; port 0 takes a free one. UserError where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"There is no address {host} ({error}).", "Give --host an address of this machine.") from error
    listening = socket.socket(family, kind, proto)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            cause = f"Port {port} of {host} is taken by another program."
            raise UserError(cause, "Give --port another one, or 0 for any that is free.") from error
        cause = f"{host}:{port} cannot be opened ({error.strerror})."
        raise UserError(cause, "Give --host an address of this machine, and --port one you may use.") from error
    return listening
