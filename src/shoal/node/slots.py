"""Ranges of host ids: a number a sandbox, the smallest that is free.

Small numbers come back soon, so that the ids in use stay dense and a leak shows as a growing number.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator

from shoal.errors import InternalError

FIRST_ID = 2_147_483_648
"""First host id of slot 0; below it are the host's own users."""
IDS_PER_SLOT = 65_537
"""The image's 0 to 65535, and one more for the guest agent."""


def first_host_id(slot: int) -> int:
    """The host id that is uid 0 in the sandbox which holds the slot."""
    return FIRST_ID + slot * IDS_PER_SLOT


class Slots:
    """Who holds which range. `take` and `give_back` are plain calls, so no two takers can meet.

    It begins with none: the keeper hands them out in blocks that no other node on this machine has.
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self._taken: set[int] = set()

    @property
    def taken(self) -> int:
        """How many are taken."""
        return len(self._taken)

    def add(self, first: int, count: int) -> None:
        """Put a block of slots at the takers' disposal."""
        for slot in range(first, first + count):
            heapq.heappush(self._free, slot)

    def take(self) -> int | None:
        """The smallest free slot, now taken; None when a block must be added first."""
        while self._free:
            slot = heapq.heappop(self._free)
            if slot not in self._taken:  # see `held`
                self._taken.add(slot)
                return slot
        return None

    @contextlib.contextmanager
    def held(self, slot: int) -> Iterator[None]:
        """Hold a slot that was taken in another server's life.

        Raises:
            InternalError: Somebody has it already.
        """
        if slot in self._taken:
            raise InternalError(f"slot {slot} is taken twice")
        # It may be among the free ones too; `take` passes over it.
        self._taken.add(slot)
        try:
            yield
        finally:
            self.give_back(slot)

    def give_back(self, slot: int) -> None:
        """Free a slot. Call it when nothing of its holder is left: the next one gets the same host ids."""
        if slot not in self._taken:
            raise InternalError(f"slot {slot} is not taken")
        self._taken.remove(slot)
        heapq.heappush(self._free, slot)
