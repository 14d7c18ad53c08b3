"""The ledger: what lookups, writers, losses and the passing of time do to tags.

That no interleaving of these gives a stale hit is the matter of `test_ledger_model.py` and
`test_ledger_schedules.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from querycache import ledger as ledger_module
from querycache import versions
from querycache.backends.memcached import MemcachedBackend
from querycache.backends.memory import MemoryBackend
from querycache.backends.redis import RedisBackend
from querycache.backends.resp import batch
from querycache.errors import CacheUnavailable
from querycache.ledger import Ledger, Marks, Reading
from querycache.store import StoreBackend
from tests.servers import Server

LEASE = 30.0
WITNESS = "witness"


class Clock:
    """Monotonic seconds of one process."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        return self.now


class Spy:
    """Passes everything on to a store, and remembers what was called."""

    def __init__(self, store: StoreBackend) -> None:
        self._store = store
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments))
            return method(*arguments, **options)

        return call

    def names(self) -> list[str]:
        called = [name for name, _ in self.calls]
        self.calls.clear()
        return called


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis", "memcached"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StoreBackend:
    """An empty store that has lost nothing."""
    made: StoreBackend
    if request.param == "memory":
        made = MemoryBackend({})
    elif request.param == "redis":
        made = RedisBackend({"url": request.getfixturevalue("redis_store_url")})
    else:
        made = MemcachedBackend({"url": request.getfixturevalue("memcached_store_url")})
    # The shared servers are flushed before each test, which is what the proof is there to notice.
    monkeypatch.setattr(made, "lost_nothing_for", lambda seconds: True)
    request.addfinalizer(made.close)
    return made


@pytest.fixture
def ledger(store: StoreBackend, clock: Clock) -> Ledger:
    return Ledger(store, WITNESS, lease=LEASE, clock=clock)


@pytest.fixture
def other(store: StoreBackend) -> Ledger:
    """The ledger of another process, whose clock is anywhere."""
    clock = Clock()
    clock.now = -1e9
    return Ledger(store, WITNESS, lease=LEASE, clock=clock)


def lose(store: StoreBackend, counter: str) -> None:
    """What eviction does."""
    if isinstance(store, MemoryBackend):
        del store._counters[counter]
    elif isinstance(store, MemcachedBackend):
        store.remove([counter])
    else:
        assert isinstance(store, RedisBackend)
        store._exchange(lambda run: batch(("DEL", f"{counter}@{run}")))


def filled(ledger: Ledger, payload: bytes = b"payload", tags: list[str] | None = None) -> None:
    tags = ["a", "b"] if tags is None else tags
    assert ledger.fill("entry", ledger.lookup("entry", tags), payload)
    assert ledger.lookup("entry", tags).payload == payload


# --- Lookups and fills --------------------------------------------------------------------------------


def test_a_first_miss_on_cold_tags_can_fill_at_once(ledger: Ledger, other: Ledger) -> None:
    reading = ledger.lookup("entry", ["a", "b"])
    assert reading.payload is None and not reading.stale and reading.fillable
    assert ledger.fill("entry", reading, b"payload")
    for each in (ledger, other):
        found = each.lookup("entry", ["a", "b"])
        assert found.payload == b"payload" and not found.stale
        assert found.versions == reading.versions


def test_an_entry_without_tags_is_valid(ledger: Ledger) -> None:
    filled(ledger, tags=[])


def test_versions_alone_can_be_read(ledger: Ledger) -> None:
    filled(ledger)
    reading = ledger.lookup(None, ["a", "b"])
    assert reading.payload is None and not reading.stale and reading.fillable
    assert reading.versions == ledger.lookup("entry", ["a", "b"]).versions


def test_an_entry_expires(store: StoreBackend) -> None:
    clock = Clock()
    ledger = Ledger(MemoryBackend({}, clock=clock), WITNESS)
    ledger.fill("entry", ledger.lookup("entry", ["a"]), b"payload", 10)
    assert ledger.lookup("entry", ["a"]).payload == b"payload"
    clock.now += 10
    found = ledger.lookup("entry", ["a"])
    assert found.payload is None and not found.stale


def test_what_an_answer_costs(clock: Clock) -> None:
    spy: Any = Spy(MemoryBackend({}))
    ledger = Ledger(spy, WITNESS, clock=clock)
    cold = ledger.lookup("entry", ["a", "b"])
    assert spy.names()[0] == "fetch"
    ledger.fill("entry", cold, b"payload")
    assert spy.names() == ["store"]
    ledger.lookup("entry", ["a", "b"])
    assert spy.names() == ["fetch"]  # a hit
    ledger.fill("another", ledger.lookup("another", ["a", "b"]), b"payload")
    assert spy.names() == ["fetch", "store"]  # a miss
    ledger.fill("third", ledger.lookup("third", ["a", "c"]), b"payload")
    assert spy.names() == ["fetch", "settle", "store"]  # a miss with a tag that is new
    marks = ledger.begin(["a"])
    ledger.lookup("entry", ["a", "b"])
    ledger.lookup("entry", ["a", "b"])
    ledger.end(marks)
    assert spy.names() == ["begin", "fetch", "fetch", "end"]  # a writer, and lookups meanwhile
    ledger.bump(["a", "b"])
    assert spy.names() == ["bump"]
    assert ledger.begin([]) == {}
    ledger.end({})
    ledger.bump([])
    assert spy.names() == []


@pytest.mark.parametrize("backend", ["redis", "memcached"])
def test_a_new_server_serves_at_once(backend: str, private_server: Callable[[str], Server]) -> None:
    """Nobody stubs the proof here; a server a few seconds old has seen the end of every writer of half a
    second."""
    url = private_server(backend).url
    store: StoreBackend = RedisBackend({"url": url}) if backend == "redis" else MemcachedBackend({"url": url})
    while not store.lost_nothing_for(0.5):
        time.sleep(0.05)
    ledger = Ledger(store, WITNESS, lease=0.5)
    assert ledger.lookup("entry", ["a", "b"]).fillable
    store.close()


# --- Writers ------------------------------------------------------------------------------------------


def test_a_marked_tag_neither_hits_nor_fills_and_is_new_afterwards(ledger: Ledger, other: Ledger) -> None:
    filled(ledger, b"old")
    before = ledger.lookup("entry", ["a", "b"])
    marks = other.begin(["a"])
    during = ledger.lookup("entry", ["a", "b"])
    assert during.payload is None and during.stale and not during.fillable
    assert not ledger.fill("entry", during, b"old")
    other.end(marks)
    after = ledger.lookup("entry", ["a", "b"])
    assert after.payload is None and after.stale and after.fillable
    ledger.fill("entry", before, b"old")
    assert ledger.lookup("entry", ["a", "b"]).payload is None
    filled(ledger, b"new")


def test_E8_a_commit_that_failed_invalidates_all_the_same(ledger: Ledger, other: Ledger) -> None:
    filled(ledger)
    other.end(other.begin(["b"]))
    assert ledger.lookup("entry", ["a", "b"]).stale


def test_E9_overlapping_writers_do_not_wipe_each_others_marks(ledger: Ledger, other: Ledger) -> None:
    filled(ledger)
    first, second = ledger.begin(["a"]), other.begin(["a"])
    ledger.end(first)
    assert not ledger.lookup("entry", ["a", "b"]).fillable
    other.end(second)
    assert ledger.lookup("entry", ["a", "b"]).fillable


def test_other_tags_go_on_hitting(ledger: Ledger, other: Ledger) -> None:
    filled(ledger)
    marks = other.begin(["c"])
    assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"
    other.end(marks)
    assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"


def test_D1_a_bump_while_an_answer_is_made_is_not_lost(ledger: Ledger, other: Ledger) -> None:
    reading = ledger.lookup("entry", ["a", "b"])
    other.bump(["b"])
    ledger.fill("entry", reading, b"from before the bump")
    found = ledger.lookup("entry", ["a", "b"])
    assert found.payload is None and found.stale


def test_D2_invalidation_is_seen_by_every_process(ledger: Ledger, other: Ledger, store: StoreBackend) -> None:
    filled(ledger)
    other.bump(["a"])
    for each in (ledger, other, Ledger(store, WITNESS)):
        assert each.lookup("entry", ["a", "b"]).stale


class LooksTwice(MemoryBackend):
    """May read an entry after its versions, and does not answer when it is asked for these again."""

    ordered = False
    answers = True

    def fetch(self, key: str | None, *arguments: Any) -> tuple[bytes | None, list[int | None]]:
        if key is None and not self.answers:
            raise CacheUnavailable("gone")
        return super().fetch(key, *arguments)


def test_what_cannot_be_confirmed_is_not_what_a_snapshot_shows() -> None:
    store = LooksTwice({})
    ledger = Ledger(store, WITNESS)
    filled(ledger)
    snapshot = ledger.snapshot()
    reading = ledger.lookup("entry", ["a", "b"])
    assert ledger.shows(snapshot, reading)
    store.answers = False
    assert not ledger.shows(snapshot, reading)


def test_the_witness_is_marked_first() -> None:
    spy: Any = Spy(MemoryBackend({}))
    ledger = Ledger(spy, WITNESS)
    ledger.end(ledger.begin(["a", "b", "a"]))
    (_, (begun,)), (_, (ended,)) = spy.calls
    assert list(begun) == [WITNESS, "a", "b"]
    assert list(ended) == list(begun)  # so the store knows which of them it is


# --- Losses -------------------------------------------------------------------------------------------


def test_E5_a_lost_tag_makes_its_entries_invalid_for_ever(ledger: Ledger, store: StoreBackend) -> None:
    filled(ledger)
    lose(store, "a")
    found = ledger.lookup("entry", ["a", "b"])
    assert found.payload is None and found.stale and found.fillable
    assert ledger.lookup("entry", ["a", "b"]).payload is None
    filled(ledger, b"new")


def test_E5_a_tag_that_is_lost_with_a_mark_waits_for_the_writer(
    ledger: Ledger, other: Ledger, store: StoreBackend
) -> None:
    filled(ledger)
    if isinstance(store, MemoryBackend):
        return  # it never loses a mark
    marks = other.begin(["a"])
    lose(store, "a")
    for _ in range(3):
        assert not ledger.lookup("entry", ["a", "b"]).fillable
    another = ledger.begin(["a"])
    other.end(marks)
    assert not ledger.lookup("entry", ["a", "b"]).fillable
    ledger.end(another)
    assert ledger.lookup("entry", ["a", "b"]).fillable


def test_a_lost_witness_is_waited_for_unless_nothing_can_have_been_lost(
    ledger: Ledger, store: StoreBackend, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(ledger)
    if isinstance(store, MemoryBackend):
        return  # it never loses a mark
    monkeypatch.setattr(store, "lost_nothing_for", lambda seconds: False)
    lose(store, WITNESS)
    assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"  # hits need no witness
    assert not ledger.lookup("another", ["a", "new"]).fillable
    clock.now += LEASE - 1
    assert not ledger.lookup("another", ["a", "new"]).fillable
    clock.now += 1
    assert ledger.lookup("another", ["a", "new"]).fillable


def test_the_proof_is_asked_for_the_time_of_a_lease_and_once_a_second(
    ledger: Ledger, store: StoreBackend, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def lost_nothing_for(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) == 3

    monkeypatch.setattr(store, "lost_nothing_for", lost_nothing_for)
    store.begin([WITNESS, "a"])
    lose(store, WITNESS)
    for _ in range(10):
        assert not ledger.lookup("entry", ["a"]).fillable
    assert asked == [LEASE]
    clock.now += 1
    assert not ledger.lookup("entry", ["a"]).fillable
    clock.now += 1
    assert ledger.lookup("entry", ["a"]).fillable
    assert asked == [LEASE] * 3


# --- Leases -------------------------------------------------------------------------------------------


def test_marks_of_a_dead_writer_heal_after_two_leases(ledger: Ledger, other: Ledger, clock: Clock) -> None:
    filled(ledger)
    other.begin(["a"])  # and is never heard of again
    seen: list[Reading] = []
    for _ in range(2):
        assert not ledger.lookup("entry", ["a", "b"]).fillable
        clock.now += LEASE - 1
        assert not ledger.lookup("entry", ["a", "b"]).fillable
        clock.now += 1
        seen.append(ledger.lookup("entry", ["a", "b"]))
    assert [reading.fillable for reading in seen] == [False, True]
    assert ledger.lookup("entry", ["a", "b"]).payload is None
    filled(ledger, b"new")


def test_marks_given_up_are_no_loss_that_can_be_proven_away(
    ledger: Ledger, other: Ledger, store: StoreBackend, clock: Clock
) -> None:
    """The store has lost nothing, and says so, but the marks given up may be those of writers at work."""
    filled(ledger)
    other.begin(["a"])
    ledger.lookup("entry", ["a", "b"])
    clock.now += LEASE
    ledger.lookup("entry", ["a", "b"])
    for _ in range(5):
        clock.now += 1.5
        assert not ledger.lookup("entry", ["a", "b"]).fillable
    [witness] = store.fetch(None, [WITNESS])[1]
    assert witness is not None and witness % versions.GENERATION == versions.GIVEN_UP


def test_a_dead_writer_blocks_its_own_tags_only(ledger: Ledger, other: Ledger) -> None:
    filled(ledger)
    other.begin(["c"])
    assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"
    assert ledger.lookup("another", ["a", "b"]).fillable


def test_a_counter_seen_clean_in_between_begins_a_new_lease(
    ledger: Ledger, other: Ledger, clock: Clock
) -> None:
    filled(ledger)
    marks = other.begin(["a"])
    assert not ledger.lookup("entry", ["a", "b"]).fillable
    clock.now += LEASE - 1
    other.end(marks)
    assert ledger.lookup("entry", ["a", "b"]).fillable
    other.begin(["a"])
    before = ledger.lookup("entry", ["a", "b"])
    clock.now += LEASE - 1
    assert ledger.lookup("entry", ["a", "b"]).versions == before.versions


def test_a_late_writer_does_no_harm(ledger: Ledger, other: Ledger, clock: Clock) -> None:
    """It had been given up, and its tag marked by another meanwhile."""
    filled(ledger)
    late = other.begin(["a"])
    for _ in range(3):
        ledger.lookup("entry", ["a", "b"])
        clock.now += LEASE
    assert ledger.lookup("entry", ["a", "b"]).fillable
    marks = ledger.begin(["a"])
    filled_before_end = ledger.lookup("entry", ["a", "b"])
    other.end(late)
    found = ledger.lookup("entry", ["a", "b"])
    assert not found.fillable and found.versions != filled_before_end.versions
    ledger.end(marks)
    assert ledger.lookup("entry", ["a", "b"]).fillable


def test_E7_no_clock_of_another_process_matters(ledger: Ledger, other: Ledger, clock: Clock) -> None:
    filled(ledger)
    other.begin(["a"])
    ledger.lookup("entry", ["a", "b"])
    clock.now += LEASE
    # The other one sees the tag for the first time, and has to wait a lease of its own.
    before = other.lookup("entry", ["a", "b"])
    assert not before.fillable
    assert other.lookup("entry", ["a", "b"]).versions == before.versions


def test_what_is_watched_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_WATCHED", 50)
    ledger = Ledger(MemoryBackend({}), WITNESS, lease=LEASE, clock=clock)
    ledger.begin([f"tag {number}" for number in range(200)])
    for number in range(200):
        ledger.lookup("entry", [f"tag {number}"])
    assert len(ledger._unclean) == 50
    clock.now += 3 * LEASE
    for number in range(60, 200):
        ledger.lookup("entry", [f"tag {number}"])
    assert len(ledger._unclean) <= 50
    clock.now += 3 * LEASE
    ledger.lookup("entry", ["tag 150"])
    clock.now += LEASE
    assert ledger.lookup("entry", ["tag 150"]).fillable


# --- What an entry says -------------------------------------------------------------------------------


def test_an_entry_names_further_tags_that_it_depends_on(ledger: Ledger, other: Ledger) -> None:
    both = ledger.lookup(None, ["a"]).union(ledger.lookup(None, ["b", "a"]))
    assert both.tags == ("a", "b")
    assert ledger.fill("entry", both, b"payload")
    assert ledger.lookup("entry", ["a"]).payload == b"payload"
    other.bump(["b"])
    found = ledger.lookup("entry", ["a"])
    assert found.payload == b"payload" and not found.stale and found.fallen == {"b"}
    found = ledger.lookup("entry", ["a"], exact=True)
    assert found.payload is None and found.stale and not found.fallen
    found = ledger.lookup("entry", ["a", "b"])
    assert found.payload is None and found.stale and not found.fallen
    other.bump(["a"])
    found = ledger.lookup("entry", ["a"])
    assert found.payload is None and found.stale and not found.fallen
    assert found.tags == ("a",) and found.fillable


def test_an_entry_must_name_all_tags_that_are_asked_for(ledger: Ledger) -> None:
    """Who stored it may have known of fewer."""
    assert ledger.fill("entry", ledger.lookup(None, ["a", "b"]), b"payload")
    assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"
    found = ledger.lookup("entry", ["a", "b", "c"])
    assert found.payload is None and found.stale
    assert ledger.lookup("entry", ["a", "c"], exact=True).payload == b"payload"


def test_further_tags_that_an_entry_does_not_name_are_left_out(ledger: Ledger) -> None:
    assert ledger.fill("entry", ledger.lookup(None, ["a", "b"]), b"payload")
    assert ledger.lookup("entry", ["a"], ["c", "d"]).tags == ("a", "b")


@given(blob=st.one_of(st.binary(), st.binary(min_size=6).map(lambda rest: b"\0\2\0\0\0\2" + rest)))
def test_bytes_that_are_no_entry_are_a_stale_miss(blob: bytes) -> None:
    store = MemoryBackend({})
    ledger = Ledger(store, WITNESS)
    store.store("entry", blob)
    found = ledger.lookup("entry", ["a", "b"])
    assert found.payload is None and found.stale and found.fillable


def test_an_entry_cut_short_is_never_taken_for_another() -> None:
    store = MemoryBackend({})
    ledger = Ledger(store, WITNESS)
    filled(ledger, b"")
    blob, _ = store.fetch("entry")
    assert blob is not None
    for length in range(len(blob)):
        store.store("entry", blob[:length])
        assert ledger.lookup("entry", ["a", "b"]).payload is None
    store.store("entry", blob)
    assert ledger.lookup("entry", ["a", "b"]).payload == b""


def test_names_of_tags_may_be_any_text(ledger: Ledger) -> None:
    filled(ledger, tags=["é", "", "\udc80", "a b", "x" * 300])


def test_what_was_found_is_not_kept_in_part_beside_versions_that_were_made_later() -> None:
    """Somebody may have written between the two."""
    store = MemoryBackend({})
    ledger = Ledger(store, WITNESS)
    ledger.fill("entry", ledger.lookup("entry", ["main", "completion"]), b"payload")
    assert ledger.lookup("entry", ["main"], ["completion"]).payload == b"payload"
    ledger.bump(["completion"])
    in_part = ledger.lookup("entry", ["main"], ["completion"])
    assert in_part.payload == b"payload" and in_part.fallen == {"completion"}
    del store._counters["completion"]
    lost = ledger.lookup("entry", ["main"], ["completion"])
    assert lost.payload is None and lost.stale and not lost.fallen and lost.fillable


# --- Refusals and outages -----------------------------------------------------------------------------


def test_an_entry_that_the_store_refuses_is_not_filled() -> None:
    ledger = Ledger(MemoryBackend({"max_bytes": 10_000}), WITNESS)
    assert not ledger.fill("entry", ledger.lookup("entry", ["a"]), bytes(20_000))


@pytest.mark.parametrize("fails", ["fetch", "settle", "swap", "begin", "end", "bump", "store"])
def test_an_outage_is_one_kind_of_error_and_heals(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryBackend({})
    ledger = Ledger(store, WITNESS)

    def everything() -> None:
        reading = ledger.lookup("entry", ["a"])
        assert ledger.fill("entry", reading, b"payload")
        marks: Marks = ledger.begin(["a"])
        ledger.end(marks)
        ledger.bump(["a"])

    def fail(*arguments: object, **options: object) -> Any:
        raise CacheUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, fails, fail)
        with pytest.raises(CacheUnavailable):
            everything()
    if fails != "end":  # otherwise a mark has been left, and heals by lease
        everything()
