"""Find repeated texts among millions by their digests, and make ids unique."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
_EMPTY_DIGEST = hashlib.blake2b(digest_size=DIGEST_BYTES)


def digest_texts(texts: Sequence[str]) -> bytes:
    """Return the digests of texts, concatenated."""
    digests = []
    for text in texts:
        # A copy takes half the time of a new object.
        digest = _EMPTY_DIGEST.copy()
        digest.update(text.encode())
        digests.append(digest.digest())
    return b"".join(digests)


def find_repeats(digests: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ordinals of repeated digests, ascending, and of the first occurrence of each.

    The digests of A B A A give 2 3 and 0 0.
    """
    halves = _halves(digests)
    ascending_halves = np.sort(halves[:, 0])
    # Most inputs have no repeats: this test takes a tenth of the time of the rest.
    if not np.equal(ascending_halves[1:], ascending_halves[:-1]).any():
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    # The sort is stable, so that equal digests are neighbours in ascending order. Different ones
    # with equal halves (1 in 10**19 pairs) could at worst separate two equal ones and hide a
    # repeat; different texts are never reported as repeats.
    by_digest = np.argsort(halves[:, 0], kind="stable")
    is_new = np.zeros(by_digest.size, dtype=bool)
    is_new[:1] = True
    for half in halves.T:
        in_order = half[by_digest]
        is_new[1:] |= in_order[1:] != in_order[:-1]
    starts = np.flatnonzero(is_new)
    places = np.flatnonzero(~is_new)
    repeats = by_digest[places]
    firsts = by_digest[starts[np.searchsorted(starts, places) - 1]]
    ascending = np.argsort(repeats)
    return repeats[ascending], firsts[ascending]


class UniqueIds:
    """Numbers repeated ids: `x`, `x` and `x` become `x`, `x_2` and `x_3`.

    If the input itself has the new id, the next number is taken: `x`, `x` and `x_2` become `x`,
    `x_3` and `x_2`. So ids that occur once, and the first occurrence of others, stay, and no two
    ids are equal afterwards.

    Memory: 8 bytes per id, and 24 per renamed one.
    """

    def __init__(self, digests: bytes | bytearray) -> None:
        """Take the digests of all ids of the input, in its order."""
        self._repeats, firsts = find_repeats(digests)
        # Repeats of the same id are a group, with a number for the next one.
        _, self._group = np.unique(firsts, return_inverse=True)
        self._next_number = np.full(self._group.max(initial=-1) + 1, 2, dtype=np.int64)
        # Half a digest is enough to avoid an id: a collision only skips a number.
        self._taken = (
            np.sort(_halves(digests)[:, 0]) if self._repeats.size else np.empty(0, dtype=np.uint64)
        )
        self._num_seen = 0
        self._num_renamed = 0

    def rename(self, ids: list[str]) -> tuple[list[str], int]:
        """Return the next ids of the input, made unique, and how many of them were renamed."""
        start, self._num_seen = self._num_seen, self._num_seen + len(ids)
        first = self._num_renamed
        self._num_renamed = int(np.searchsorted(self._repeats, self._num_seen))
        if self._num_renamed == first:
            return ids, 0
        renamed = list(ids)
        for repeat in range(first, self._num_renamed):
            record = int(self._repeats[repeat]) - start
            group = int(self._group[repeat])
            is_free = False
            while not is_free:
                renamed[record] = f"{ids[record]}_{self._next_number[group]}"
                self._next_number[group] += 1
                half = _halves(digest_texts([renamed[record]]))[0, 0]
                place = np.searchsorted(self._taken, half)
                is_free = place == self._taken.size or self._taken[place] != half
        return renamed, self._num_renamed - first


def _halves(digests: bytes | bytearray) -> NDArray[np.uint64]:
    """Return both halves of each digest, (N, 2)."""
    halves: NDArray[np.uint64] = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    return halves
