"""The version of a tag: one integer, and the steps that may be taken from one version to the next.

A version is an integer below 2**63 of four fields. The fields are *decimal* digits, so that the same text
serves memcached's and Redis' own arithmetic, a Lua script (whose numbers are doubles, too short for 63 bits)
can read a field off the text, and so can an operator who looks at the server:

    ======== ======== =========== ==================================================================
    digits   example  field       meaning
    ======== ======== =========== ==================================================================
    18 - 11  48213377 incarnation drawn at random whenever the tag is created or given up for lost
    10 -  5  004182   generation  counts the writes since then
    4        0        quarantine  1: the tag was created when nobody could know whether an earlier one
                                  was lost together with the marks of writers that are still at work
                                  2: the marks on it were given up, though their writers may be at work
    3 -  0   0002     pending     how many writers have begun and not ended
    ======== ======== =========== ==================================================================

A version is **clean** when quarantine and pending are both zero. Only clean versions may be hit or filled
under, so a stored vector is valid exactly when each of its tags is present, clean and equal to the version
that was stored.

Every step forward moves to a version that the tag never had before: within an incarnation the generation only
grows, and a new incarnation starts at a random place among 4 * 10**13 (45 bits). A tag that is lost and
created again meets a version of its former life, in an entry that still exists, with a probability of about
(writes since) / 10**14. When the generation overflows, it carries into the incarnation, which is a version
never seen before like any other; a writer that had begun just before finds its incarnation gone and leaves a
mark behind, which heals like that of a crashed one.

The functions here are pure. Each is one atomic step of the protocol of :mod:`querycache.ledger`; the stores
carry it out under a lock, in a script on the server, or by compare-and-swap.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

__all__ = [
    "GENERATION",
    "GIVEN_UP",
    "INCARNATION",
    "MAX_PENDING",
    "QUARANTINE",
    "are_marked",
    "begun",
    "bumped",
    "cleared",
    "ended",
    "fresh",
    "healed",
    "incarnation_of",
    "is_clean",
    "is_provable",
    "parse",
    "pending_of",
    "planted",
]

QUARANTINE = 10**4
"""What a quarantine is worth."""
GIVEN_UP = 2 * QUARANTINE
"""What the quarantine is worth of a tag whose marks were given up."""
GENERATION = 10**5
"""What one generation is worth."""
INCARNATION = 10**11
"""What one incarnation is worth."""
MAX_PENDING = 9_000
"""Marks that a tag may carry. One more and it is given a new incarnation rather than let the digits
overflow."""

_FIRST_INCARNATION = 10**7
_LAST_INCARNATION = 92 * 10**6
_FIRST_GENERATIONS = 5 * 10**5
_LEAST = _FIRST_INCARNATION * INCARNATION
_BEYOND = (_LAST_INCARNATION + 1) * INCARNATION
_DIGITS = 19


def fresh() -> int:
    """A clean version of a new incarnation, from the operating system's random source (so also after a
    fork)."""
    incarnations = _LAST_INCARNATION - _FIRST_INCARNATION
    drawn = int.from_bytes(os.urandom(8), "big") % (incarnations * _FIRST_GENERATIONS)
    incarnation, generation = divmod(drawn, _FIRST_GENERATIONS)
    return (_FIRST_INCARNATION + incarnation) * INCARNATION + generation * GENERATION


@lru_cache(maxsize=4096)  # each lookup reads a dozen, nearly all of them as they were the last time
def parse(text: bytes) -> int | None:
    """The version that a server gave as decimal text, or None for anything that is not one.

    Garbage counts as missing: it is never hit under, and the next writer or reader replaces it.
    """
    text = text.rstrip()  # memcached pads a number that became shorter
    if len(text) != _DIGITS or not text.isdigit():
        return None
    version = int(text)
    return version if _FIRST_INCARNATION <= incarnation_of(version) <= _LAST_INCARNATION else None


def is_clean(version: int | None) -> bool:
    """Whether entries may be hit and filled under this version. A missing one (None) is never clean."""
    return version is not None and version % GENERATION == 0


def incarnation_of(version: int) -> int:
    return version // INCARNATION


def pending_of(version: int) -> int:
    """How many writers have begun and not ended, as far as this incarnation knows."""
    return version % QUARANTINE


def are_marked(numbers: Sequence[object]) -> bool:
    """Whether counters that were incremented, given what they hold since, each hold a version now, with no more marks than
    there is room for."""
    if {*map(type, numbers)} != {int}:
        return False
    found: Any = numbers
    pending = [*map(QUARANTINE.__rmod__, found)]
    return min(found) >= _LEAST and max(found) < _BEYOND and min(pending) > 0 and max(pending) <= MAX_PENDING


def is_provable(version: int) -> bool:
    """Whether the version is unclean only because an earlier one may have been lost.

    Whoever can prove that nothing was ever lost may clear it. Marks that were given up are no such loss.
    """
    return version % GENERATION == QUARANTINE


def begun(version: int | None, new: int) -> int:
    """Phase one of a write: one more mark. A missing tag begins quarantined, for marks may be lost with it.

    :param new: a :func:`fresh` version, taken where the tag needs a new incarnation.
    """
    if version is None:
        return new + QUARANTINE + 1
    if pending_of(version) >= MAX_PENDING:
        return new + GIVEN_UP + 1
    return version + 1


def ended(version: int, incarnation: int) -> int:
    """Phase two of a write: a new generation, and the mark taken off.

    :param incarnation: the one that was marked. Where the tag has another by now, the mark was lost with the
        former one, and what is pending are the marks of others, which must stay.
    """
    if incarnation_of(version) == incarnation and pending_of(version) > 0:
        return version + GENERATION - 1
    return version + GENERATION


def bumped(version: int) -> int:
    """Invalidation outside of any transaction: a new generation, marks and quarantine kept."""
    return version + GENERATION


def planted(new: int) -> int:
    """The version of a tag that a reader found missing."""
    return new + QUARANTINE


def cleared(version: int, new: int) -> int:
    """The clean version that follows an unclean one of which all marks, kept or lost, are known to be dead.

    With marks on it the tag gets a new incarnation, so that a writer given up for dead that ends after all
    does not take off the mark of a living one.
    """
    return new if pending_of(version) else version - version % GENERATION + GENERATION


def healed(version: int, new: int) -> int:
    """The version that follows one that was never seen clean for a whole lease.

    Quarantine alone is over by then. Marks are given up by way of a new quarantine, since they need not be as
    old as the lease.
    """
    return new + GIVEN_UP if pending_of(version) else cleared(version, new)
