"""A hash table from 16-byte keys to integers that answers many keys at once."""

import numpy as np

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: mixes keys that are no hashes


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of two arrays ``(n, 2)`` are equal; ``all(1)`` takes five times as long."""
    return (a[:, 0] == b[:, 0]) & (a[:, 1] == b[:, 1])


class KeyTable:
    """Maps keys ``(n, 2)`` uint64 to values int64 ``(n,)`` of zero or more.

    Open addressing with linear probing; each round of probing is one numpy pass over the keys that
    are still without an answer. At most half of the slots are used, so few rounds are long.

    Example:
        >>> import numpy as np
        >>> table = KeyTable()
        >>> table.assign(np.array([[1, 2], [3, 4], [1, 2]], np.uint64), np.array([7, 8, 9]))
        >>> table.find(np.array([[3, 4], [1, 2], [2, 1]], np.uint64)).tolist()
        [8, 9, -1]
    """

    def __init__(self) -> None:
        self._slots = np.full(1024, -1, np.int32)  # number of an entry, or -1
        self._keys = np.empty((512, 2), np.uint64)
        self._values = np.empty(512, np.int64)
        self._count = 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the value of each key, -1 for those without."""
        entries = self._entries(keys)
        values = np.full(len(keys), -1, np.int64)
        known = entries >= 0
        values[known] = self._values[entries[known]]
        return values

    def assign(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Set the values of keys; of a key that is there twice the last one counts.

        A value of -1 forgets a key.
        """
        entries = self._entries(keys)
        known = entries >= 0
        self._values[entries[known]] = values[known]  # of repeated indices numpy keeps the last
        keys, values = keys[~known], values[~known]
        if self._count + len(keys) > len(self._keys):
            self._grow(len(keys))
        ids = np.arange(self._count, self._count + len(keys))
        self._keys[ids] = keys
        self._values[ids] = values
        self._count += len(keys)
        self._insert(ids)

    def forget(self, low: int, high: int) -> None:
        """Forget all keys with values from ``low`` up to but without ``high``."""
        values = self._values[: self._count]
        values[(values >= low) & (values < high)] = -1

    def _first_slots(self, keys: np.ndarray) -> np.ndarray:
        mixed = (keys[:, 0] ^ keys[:, 1]) * _SPREAD
        return (mixed >> np.uint64(64 - (len(self._slots) - 1).bit_length())).astype(np.int64)

    def _entries(self, keys: np.ndarray) -> np.ndarray:
        found = np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        slots = self._first_slots(keys)
        while len(left):
            entries = self._slots[slots]
            used = entries >= 0
            left, slots, entries = left[used], slots[used], entries[used]
            same = _equal(self._keys[entries], keys[left])
            found[left[same]] = entries[same]
            left, slots = left[~same], (slots[~same] + 1) & (len(self._slots) - 1)
        return found

    def _insert(self, ids: np.ndarray) -> None:
        """Give each new entry a slot; of equal keys, which walk together, the last gets it."""
        slots = self._first_slots(self._keys[ids])
        while len(ids):
            free = self._slots[slots] < 0
            self._slots[slots[free]] = ids[free]
            holders = self._slots[slots]
            lost = holders != ids
            ids, slots, holders = ids[lost], slots[lost], holders[lost]
            other = ~_equal(self._keys[holders], self._keys[ids])
            ids, slots = ids[other], (slots[other] + 1) & (len(self._slots) - 1)

    def _grow(self, extra: int) -> None:
        """Make room for ``extra`` more entries, leaving forgotten ones behind."""
        # a key that was there twice has entries without a slot: slots say which ones count
        entries = np.sort(self._slots[self._slots >= 0]).astype(np.int64)
        entries = entries[self._values[entries] >= 0]
        keys, values = self._keys[entries], self._values[entries]
        size = 1 << max(10, (4 * (len(entries) + extra) - 1).bit_length())
        self._slots = np.full(size, -1, np.int32)
        self._keys = np.empty((size // 2, 2), np.uint64)
        self._values = np.empty(size // 2, np.int64)
        self._count = len(entries)
        self._keys[: self._count] = keys
        self._values[: self._count] = values
        self._insert(np.arange(self._count))
