"""How a run is asked to stop: signals, collected so that the loop leaves at a step's edge."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO = 2.0  # seconds


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the loop stops at a step's edge; a second one stops at once.

    One Ctrl-C may come twice, from the terminal to its whole process group and from the launcher, which passes it on:
    what comes within ECHO seconds of the first is the first.
    """
    received: list[int] = []
    first = 0.0

    def take(number: int, _: Any) -> None:
        nonlocal first
        if received and time.monotonic() - first > ECHO:
            raise KeyboardInterrupt
        first = first if received else time.monotonic()
        received.append(number)

    previous = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
