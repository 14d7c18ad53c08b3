"""The store in memory: the common contract, its bound, and expiry."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from dogpile.cache.region import CacheRegion

from querycache import versions
from querycache.backends.memory import MemoryBackend
from querycache.errors import ConfigurationError
from querycache.store import StoreBackend
from tests.stores.contract import StoreContract, fresh_names, put, read, region_of, version_of


class TestMemory(StoreContract):
    created = 1  # no mark is ever lost, so a new tag needs no quarantine

    @pytest.fixture
    def store(self) -> MemoryBackend:
        return MemoryBackend({})

    @pytest.fixture
    def region(self) -> CacheRegion:
        return region_of("querycache.memory", max_bytes="1mb")

    def test_settle_with_a_witness_that_is_missing_leaves_counters_unclean(self, store: StoreBackend) -> None:
        """Not here: a witness that is missing was never marked."""
        [counter] = put(store, [version_of(10_000_000, 0, versions.QUARANTINE, 0)])
        assert all(map(versions.is_clean, store.settle([counter, *fresh_names(1)], fresh_names(1)[0])))

    def test_nothing_is_ever_lost(self, store: MemoryBackend) -> None:
        assert store.lost_nothing_for(1e9)

    def test_an_entry_is_not_found_once_its_time_is_over(self) -> None:
        now = 100.0
        store = MemoryBackend({}, clock=lambda: now)
        store.store("entry", b"payload", 2.5)
        store.store("kept", b"payload")
        now = 102.4
        assert store.fetch("entry")[0] == b"payload"
        used = store.used_bytes
        now = 102.5
        assert store.fetch("entry")[0] is None
        assert store.used_bytes < used
        now = 1e12
        assert store.fetch("kept")[0] == b"payload"

    def test_the_least_recently_used_goes_first(self) -> None:
        store = MemoryBackend({"max_bytes": 40_000})
        for name in "abc":
            store.store(name, bytes(10_000))
        store.fetch("a")
        store.store("d", bytes(10_000))
        assert [store.fetch(name)[0] is not None for name in "abcd"] == [True, False, True, True]

    def test_an_entry_larger_than_the_store_is_refused_and_nothing_is_kept_of_it(self) -> None:
        store = MemoryBackend({"max_bytes": 10_000})
        assert store.store("entry", b"small")
        assert store.store("other", b"small")
        assert not store.store("entry", bytes(10_000))
        assert store.fetch("entry")[0] is None
        assert store.fetch("other")[0] == b"small"

    def test_D13_tags_without_end_do_not_grow_without_bound(self) -> None:
        store = MemoryBackend({"max_bytes": 400_000})
        [marked] = put(store, [version_of(10_000_000, 0, 0, 1)])
        [quarantined] = put(store, [version_of(10_000_000, 0, versions.QUARANTINE, 0)])
        store.settle(["often used"], "witness")
        [often_used] = read(store, ["often used"])
        for number in range(5_000):
            store.settle([f"tag {number}"], "witness")
            assert read(store, ["often used"]) == [often_used]
        assert store.used_bytes <= 100_000 + 1_000
        assert read(store, ["tag 0", "tag 4999"])[0] is None
        assert read(store, ["tag 4999"])[0] is not None
        assert read(store, [marked, quarantined]) == [
            version_of(10_000_000, 0, 0, 1),
            version_of(10_000_000, 0, versions.QUARANTINE, 0),
        ]

    @pytest.mark.parametrize("size", [16, 200, 3_000, 100_000])
    def test_D13_the_bound_holds_and_is_what_python_really_takes(self, size: int) -> None:
        bound = 8_000_000
        fills = 20_000 if size < 100_000 else 1_000
        store = MemoryBackend({"max_bytes": bound})
        store.settle(["tag"], "witness")
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        try:
            for number in range(fills):
                store.store(f"namespace:entry:{number:064x}", bytes(size), 60.0)
                assert store.used_bytes <= bound
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        # Full, whatever the size, and by no more than the dictionaries vary.
        assert store.used_bytes > 0.95 * bound
        assert taken <= 1.01 * bound
        assert taken >= (0.95 if size >= 3_000 else 0.7) * bound

    def test_closing_gives_the_memory_back(self, store: MemoryBackend) -> None:
        store.store("entry", bytes(1_000))
        store.begin(["tag"])
        store.close()
        assert store.used_bytes == 0

    @pytest.mark.parametrize(
        ("arguments", "bound"),
        [
            ({}, 256 * 2**20),
            ({"max_bytes": 1_000_000}, 1_000_000),
            ({"url": "memory://"}, 256 * 2**20),
            ({"url": "memory://?max_bytes=64mb"}, 64 * 2**20),
            ({"url": "memory://?max_bytes=1_000KiB"}, 1_024_000),
            ({"url": "memory://", "max_bytes": "1gb"}, 2**30),
        ],
    )
    def test_configuration(self, arguments: dict[str, object], bound: int) -> None:
        assert MemoryBackend(arguments).max_bytes == bound

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"url": "memory://?max_byte=1"}, "no option 'max_byte'; it takes max_bytes"),
            ({"max_bytes": "lots"}, "'lots' for option 'max_bytes': give bytes: an integer"),
            ({"max_bytes": 0}, "0 for option"),
            ({"max_bytes": True}, "True for option"),
            ({"max_bytes": 1.5}, "1.5 for option"),
            ({"max_bytes": "-5mb"}, "'-5mb' for option"),
            ({"max_bytes": "5xb"}, "'5xb' for option"),
            ({"url": "memory://?max_bytes=1mb", "max_bytes": 1}, "'max_bytes' is given twice"),
            ({"url": "memory://host"}, "has no address"),
            ({"url": "memory://[x"}, "is no URL"),
            ({"url": 1}, "1 is no URL"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_says_what_would(
        self, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigurationError) as raised:
            MemoryBackend(arguments)
        assert message in str(raised.value)
