"""The model's one thread: work is taken in order from a queue that has an end, off the event loop.

Several requests may wait; one computes at a time, because the towers already use every core that torch was given.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from retrieval_eval.server.refusals import busy

P = ParamSpec("P")
T = TypeVar("T")
_Job = tuple["Future[Any]", Callable[[], Any]]


class Worker:
    """A thread with room for `room` waiting jobs, each given up after `seconds`. Closed, it ends with its last job."""

    def __init__(self, room: int, seconds: float) -> None:
        self.seconds = seconds
        self._jobs: queue.Queue[_Job | None] = queue.Queue(room)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self._jobs.qsize()

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call(*args)` in the thread. Raises Refused (503) where no place is free, or its turn does not come."""
        future: Future[T] = Future()
        try:
            self._jobs.put_nowait((future, lambda: call(*args, **kwargs)))
        except queue.Full:
            raise busy(f"{self._jobs.maxsize} requests are waiting for the model already.") from None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.seconds)
        except TimeoutError:
            future.cancel()  # a job that has not begun is passed over
            raise busy(f"The model did not come to this within {self.seconds:g} s.", 5) from None

    def close(self) -> None:
        """Pass over what waits, and wait a little for the job that runs."""
        self._closed.set()
        with suppress(queue.Full):  # then a job is there to wake the thread
            self._jobs.put_nowait(None)
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed.is_set():
            future, call = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whoever asked is told, and the thread goes on
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, call
