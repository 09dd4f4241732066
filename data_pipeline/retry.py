"""Transient faults are tried again after growing pauses, then end the run in one sentence."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_PAUSE = 30.0  # seconds
TRANSIENT_DISK = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO})
DISK_ATTEMPTS, DISK_PAUSE = 4, 0.2

_jitter = random.SystemRandom()  # ranks that failed together come back apart; no draw of the run is touched


def patiently(
    what: str, call: Callable[[], T], is_transient: Callable[[Exception], bool], attempts: int, pause: float
) -> T:
    """The result of `call`, tried `attempts` times where `is_transient`, `pause` seconds after the first and doubling.

    Raises UserError (exit code 1) with the last fault, which names `what`; other errors pass at once.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            said = str(error) or type(error).__name__
            if attempt == attempts:
                raise UserError(
                    f"{what} could not be read in {attempts} attempts (the last: {said}).",
                    "The run can go on from its last checkpoint once the disk or the network works again.",
                    exit_code=1,
                ) from error
            rest = min(LONGEST_PAUSE, pause * 2 ** (attempt - 1)) * (0.5 + _jitter.random())
            log.info("%s: %s; attempt %d of %d in %.1f s", what, said, attempt + 1, attempts, rest)
            time.sleep(rest)
    raise ValueError(f"{attempts} attempts")


def is_transient_disk(error: Exception) -> bool:
    """Whether a read from a disk may work a moment later (an unplugged network disk, a stale handle)."""
    return isinstance(error, OSError) and error.errno in TRANSIENT_DISK
