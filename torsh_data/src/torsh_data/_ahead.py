"""Threads that fetch blocks before they are needed."""

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

_THREADS = 8


class Ahead:
    """Fetches the blocks in `next` in their order; the threads end when there are none left."""

    def __init__(self, prepare: Callable[[int], None]) -> None:
        self.next: deque[int] = deque()
        self._prepare = prepare
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin, or go on."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while len(self._threads) < min(_THREADS, len(self.next)):
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()

    @property
    def is_busy(self) -> bool:
        """Whether there is anything left to fetch."""
        return bool(self.next) or any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            try:
                number = self.next.popleft()
            except IndexError:
                return
            try:
                self._prepare(number)
            except Exception:  # who reads the block meets the error, and raises it
                logger.debug("fetching block %d ahead failed", number, exc_info=True)
