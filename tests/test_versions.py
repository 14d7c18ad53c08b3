"""Versions: each step leads to a number that was never there before, and that every server can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from querycache import versions

HIGHEST_FRESH = 91_999_999 * versions.INCARNATION + 499_999 * versions.GENERATION

INCARNATIONS = st.integers(10_000_000, 92_000_000)
IDENTITIES = st.builds(
    lambda incarnation, generation: incarnation * versions.INCARNATION + generation * versions.GENERATION,
    INCARNATIONS,
    st.one_of(st.integers(0, 999_999), st.sampled_from([999_998, 999_999])),
)
QUARANTINES = st.sampled_from([0, versions.QUARANTINE, versions.GIVEN_UP])
PENDING = st.integers(0, versions.MAX_PENDING)
VERSIONS = st.builds(lambda *fields: sum(fields), IDENTITIES, QUARANTINES, PENDING)
FRESH = st.builds(
    lambda incarnation, generation: incarnation * versions.INCARNATION + generation * versions.GENERATION,
    st.integers(10_000_000, 91_999_999),
    st.integers(0, 499_999),
)

STEPS: list[Callable[[int, int], int]] = [
    versions.begun,
    lambda version, new: versions.ended(version, versions.incarnation_of(version)),
    lambda version, new: versions.ended(version, versions.incarnation_of(new)),
    lambda version, new: versions.bumped(version),
    versions.cleared,
    versions.healed,
]


def test_a_fresh_version_is_clean_and_its_own() -> None:
    drawn = [versions.fresh() for _ in range(2_000)]
    assert len(set(drawn)) == len(drawn)
    assert all(versions.is_clean(version) and version <= HIGHEST_FRESH for version in drawn)
    # All over the range, incarnation and generation alike.
    assert max(drawn) - min(drawn) > 0.95 * (HIGHEST_FRESH - 10**18)
    assert len({version % versions.INCARNATION for version in drawn}) > 1_900


@pytest.mark.parametrize("step", STEPS)
@given(version=VERSIONS, new=FRESH)
def test_a_step_gives_a_greater_number_or_a_new_incarnation(
    step: Callable[[int, int], int], version: int, new: int
) -> None:
    after = step(version, new)
    assert after > version or versions.incarnation_of(after) == versions.incarnation_of(new)
    assert after != version
    assert 10**18 <= after < 2**63
    assert after % versions.GENERATION < versions.GIVEN_UP + versions.QUARANTINE


@given(version=VERSIONS, new=FRESH)
def test_marks_are_counted(version: int, new: int) -> None:
    if versions.pending_of(version) >= versions.MAX_PENDING - 1:
        return
    twice = versions.begun(versions.begun(version, new), new)
    assert versions.pending_of(twice) == versions.pending_of(version) + 2
    once = versions.ended(twice, versions.incarnation_of(version))
    if versions.incarnation_of(once) == versions.incarnation_of(version):  # or the generation overflowed
        ended = versions.ended(once, versions.incarnation_of(version))
        assert versions.pending_of(ended) == versions.pending_of(version)


@given(identity=IDENTITIES, quarantine=QUARANTINES)
def test_a_mark_that_is_not_there_is_not_taken_off(identity: int, quarantine: int) -> None:
    ended = versions.ended(identity + quarantine, versions.incarnation_of(identity))
    assert ended == identity + quarantine + versions.GENERATION


@given(new=FRESH)
def test_what_is_created_is_quarantined(new: int) -> None:
    for created in (versions.begun(None, new), versions.planted(new)):
        assert not versions.is_clean(created)
        assert versions.incarnation_of(created) == versions.incarnation_of(new)
    assert versions.is_provable(versions.planted(new))
    assert versions.pending_of(versions.begun(None, new)) == 1
    assert versions.cleared(versions.planted(new), new) == new + versions.GENERATION


@given(version=VERSIONS, new=FRESH)
def test_clearing_and_healing(version: int, new: int) -> None:
    cleared = versions.cleared(version, new)
    assert versions.is_clean(cleared)
    healed = versions.healed(version, new)
    if versions.pending_of(version):
        assert cleared == new
        assert not versions.is_clean(healed) and not versions.is_provable(healed)
        assert versions.is_clean(versions.healed(healed, new))
    else:
        assert healed == cleared > version


@given(version=VERSIONS)
def test_too_many_marks_are_given_up(version: int) -> None:
    full = version - versions.pending_of(version) + versions.MAX_PENDING
    after = versions.begun(full, versions.fresh())
    assert after % versions.GENERATION == versions.GIVEN_UP + 1


def test_a_missing_version_is_not_clean() -> None:
    assert not versions.is_clean(None)


@given(version=VERSIONS)
def test_a_version_is_read_from_its_digits(version: int) -> None:
    assert versions.parse(b"%d" % version) == version
    assert versions.parse(b"%d  " % version) == version


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"0",
        b"-1",
        b"1" * 18,
        b"1" * 20,
        b"x" * 19,
        b" " + b"1" * 18,
        b"+" + b"1" * 18,
        b"\xb2" * 19,
        b"1_1" * 6,
    ],
)
def test_anything_else_is_none(text: bytes) -> None:
    assert versions.parse(text) is None
