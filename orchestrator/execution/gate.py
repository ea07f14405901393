"""Where standby workers wait, without asking again and again, until they are given something to train: an actor."""

from __future__ import annotations

import asyncio

from trainers.contract.channel import Start


class Gate:
    """Lets the workers of one standby group through, all of them or none; called through Ray.

    Args:
        num_workers: How many there are.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._waiting = self._here = 0
        self._all_wait, self._called, self._all_here, self._given = (asyncio.Event() for _ in range(4))
        self._start: Start | None = None

    async def called(self) -> None:
        """Answers a worker when it is called."""
        self._waiting += 1
        if self._waiting == self._num_workers:
            self._all_wait.set()
        await self._called.wait()

    async def take(self) -> Start | None:
        """Shows that a worker that was called lives; answers it with what it is to train."""
        self._here += 1
        if self._here == self._num_workers:
            self._all_here.set()
        await self._given.wait()
        return self._start

    async def ready(self) -> None:
        """Answers the driver when all workers wait."""
        await self._all_wait.wait()

    async def call(self) -> None:
        """Calls the workers; answers the driver when all of them are here."""
        self._called.set()
        await self._all_here.wait()

    async def give(self, start: Start) -> None:
        """Tells the workers what to train."""
        self._start = start
        self._given.set()
