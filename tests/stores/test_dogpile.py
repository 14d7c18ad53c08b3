"""Any other dogpile backend as a store: the common contract, as far as a backend that cannot count can keep
it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dogpile.cache.api import CacheBackend
from dogpile.cache.region import CacheRegion
from dogpile.cache.util import sha1_mangle_key
from hypothesis import given

from querycache import versions
from querycache.backends import breaker
from querycache.backends.dogpile import DogpileBackend
from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.ledger import Ledger
from querycache.store import StoreBackend
from tests.stores.contract import EXAMPLES, SOME, StoreContract, fresh_names, new_region, put, read, region_of


class TokenContract(StoreContract):
    """The contract with tokens in place of counters: what changes a tag gives it a new, clean version."""

    @EXAMPLES
    @given(present=SOME)
    def test_begin_marks(self, store: StoreBackend, present: list[int | None]) -> None:
        """Not here: phase one does nothing."""
        names = put(store, present)
        assert list(store.begin(names)) == names
        assert read(store, names) == present

    @EXAMPLES
    @given(present=SOME)
    def test_end_gives_new_tokens(self, store: StoreBackend, present: list[int | None]) -> None:
        names = put(store, present)
        store.end(store.begin(names))
        after = read(store, names)
        assert all(map(versions.is_clean, after))
        assert set(after).isdisjoint(present)

    def test_end_unmarks_its_own_incarnation_only(self) -> None:
        """Not here: there are no marks."""

    @EXAMPLES
    @given(present=SOME)
    def test_bump_gives_a_new_generation(self, store: StoreBackend, present: list[int | None]) -> None:
        names = put(store, present)
        store.bump(names)
        after = read(store, names)
        assert all(map(versions.is_clean, after))
        assert set(after).isdisjoint(present)

    @EXAMPLES
    @given(present=SOME)
    def test_settle_creates_and_clears_where_no_writer_is_at_work(
        self, store: StoreBackend, present: list[int | None]
    ) -> None:
        names = put(store, present)
        settled = store.settle(names, fresh_names(1)[0])
        assert read(store, names) == settled
        assert all(map(versions.is_clean, settled))
        for before, after in zip(present, settled, strict=True):
            assert not versions.is_clean(before) or after == before

    def test_settle_with_a_witness_that_is_missing_leaves_counters_unclean(self, store: StoreBackend) -> None:
        """Not here: no witness is needed where there are no marks."""
        assert all(map(versions.is_clean, store.settle(fresh_names(2), fresh_names(1)[0])))

    def test_two_incarnations_of_a_counter_have_nothing_in_common(self, store: StoreBackend) -> None:
        names = fresh_names(20)
        first = store.settle(names, "witness")
        store.remove(names)
        assert set(store.settle(names, "witness")).isdisjoint(first)

    def test_E9_a_writer_takes_off_its_own_mark_only(self, store: StoreBackend) -> None:
        """Not here: there are no marks. Each writer invalidates, whatever the order."""
        [name] = fresh_names(1)
        first, second = store.begin([name]), store.begin([name])
        store.end(first)
        [after_first] = read(store, [name])
        store.end(second)
        assert read(store, [name]) != [after_first]

    def test_many_writers_at_once_leave_neither_mark_nor_gap(self) -> None:  # type: ignore[override]
        """Not here: there is nothing that is counted."""

    def test_thousands_of_counters_go_in_one_step(self, store: StoreBackend) -> None:
        names = fresh_names(1_000)
        store.end(store.begin(names))
        assert store.settle(names, "witness") == read(store, names)

    def test_the_weaker_promise_shows(self, store: StoreBackend) -> None:
        assert not store.atomic
        assert store.lost_nothing_for(1e9)

    def test_the_ledger_works_on_it(self, store: StoreBackend) -> None:
        ledger = Ledger(store, "witness")
        reading = ledger.lookup("entry", ["a", "b"])
        assert reading.fillable
        assert ledger.fill("entry", reading, b"payload")
        assert ledger.lookup("entry", ["a", "b"]).payload == b"payload"
        invalidations: list[Callable[[], None]] = [
            lambda: ledger.end(ledger.begin(["b"])),
            lambda: ledger.bump(["a"]),
        ]
        for invalidate in invalidations:
            before = ledger.lookup("entry", ["a", "b"])
            assert before.payload is not None
            invalidate()
            ledger.fill("entry", before, b"late")
            after = ledger.lookup("entry", ["a", "b"])
            assert after.payload is None and after.stale and after.fillable
            ledger.fill("entry", after, b"new")


class TestDogpileMemory(TokenContract):
    @pytest.fixture
    def store(self) -> DogpileBackend:
        return DogpileBackend({"region": region_of("dogpile.cache.memory")})

    @pytest.fixture
    def region(self) -> CacheRegion:
        return region_of("dogpile.cache.memory_pickle")

    def test_what_is_stored_is_data_and_never_code(self) -> None:  # type: ignore[override]
        """Not here: a region that was made elsewhere serializes as it was made. Entries do not pass through
        it."""

    def test_C6_what_is_kept_is_a_copy(self) -> None:  # type: ignore[override]
        """Not here: see above. Entries are bytes."""

    def test_D8_bytes_that_cannot_be_decoded_are_made_again(self) -> None:  # type: ignore[override]
        """Not here: see above."""


class TestDogpilePickle(TestDogpileMemory):
    @pytest.fixture
    def store(self) -> DogpileBackend:
        return DogpileBackend({"region": region_of("dogpile.cache.memory_pickle")})


def test_the_ledger_works_on_a_file(tmp_path: Path) -> None:
    """What needs no thousand writes to a disk."""
    store = DogpileBackend({"region": region_of("dogpile.cache.dbm", filename=str(tmp_path / "cache.dbm"))})
    contract = TokenContract()
    contract.test_an_entry_is_found_as_it_was_stored_until_it_is_removed(store)
    contract.test_D12_an_empty_payload_is_an_answer(store)
    contract.test_half_a_megabyte_is_stored(store)
    contract.test_D11_no_keys_at_all_are_no_error(store)
    contract.test_the_ledger_works_on_it(store)


class Broken(CacheBackend):
    """A dogpile backend whose client raises."""

    def __init__(self) -> None:
        self.calls = 0

    def get_multi(self, keys: Any) -> Any:
        self.calls += 1
        raise LookupError("no such host")

    def set_multi(self, mapping: Any) -> None:
        self.get_multi(mapping)

    def delete_multi(self, keys: Any) -> None:
        self.get_multi(keys)


class TestDogpile:
    def test_what_a_client_raises_is_an_outage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        region = region_of("dogpile.cache.memory")
        region.backend = broken = Broken()
        store = DogpileBackend({"region": region})
        with pytest.raises(CacheUnavailable, match="Broken failed: LookupError"):
            store.fetch("entry", ["tag"])
        with pytest.raises(CacheUnavailable, match="left alone"):
            store.store("entry", b"payload")
        assert broken.calls == 1
        with pytest.raises(CacheUnavailable, match="Broken failed"):
            store.bump(["tag"])
        monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
        calls: list[Callable[[], None]] = [lambda: store.remove(["entry"]), store.ping]
        for call in calls:
            store._breaker.failed(LookupError())
            with pytest.raises(CacheUnavailable, match="Broken failed"):
                call()

    def test_D3_entries_expire(self) -> None:
        now = 1_000.0
        store = DogpileBackend({"region": region_of("dogpile.cache.memory")}, clock=lambda: now)
        store.store("entry", b"payload", 10)
        store.store("kept", b"payload")
        assert store.fetch("entry")[0] == b"payload"
        now = 1_010.0
        assert store.fetch("entry")[0] is None
        assert store.fetch("kept")[0] == b"payload"

    @pytest.mark.parametrize("value", [b"", b"short", "text", 5, None])
    def test_what_others_stored_under_a_key_is_a_miss(self, value: object) -> None:
        region = region_of("dogpile.cache.memory")
        store = DogpileBackend({"region": region})
        region.backend.set("entry", value)
        region.backend.set("tag", value)
        assert store.fetch("entry", ["tag"]) == (None, [None])

    def test_keys_go_through_the_mangler_of_the_region(self) -> None:
        region = new_region(key_mangler=lambda key: sha1_mangle_key(key.encode())).configure(
            "dogpile.cache.memory"
        )
        store = DogpileBackend({"region": region})
        store.store("entry", b"payload")
        store.bump(["tag"])
        assert all(len(key) == 40 for key in region.actual_backend._cache)
        assert store.fetch("entry", ["tag"])[0] == b"payload"
        store.remove(["entry"])
        assert len(region.actual_backend._cache) == 1

    @pytest.mark.parametrize("arguments", [{}, {"region": "default"}, {"url": "memory://"}])
    def test_what_cannot_work_is_an_error(self, arguments: dict[str, object]) -> None:
        with pytest.raises(ConfigurationError, match="a configured dogpile region"):
            DogpileBackend(arguments)

    def test_a_region_must_be_configured(self) -> None:
        with pytest.raises(ConfigurationError, match="a configured dogpile region"):
            DogpileBackend({"region": new_region()})
