"""What every store must do: `StoreContract`, and for those behind a network `ServerContract`.

The steps on counters are compared with the pure functions of `querycache.versions`, from any version to the
next, so that a script on a server or a chain of compare-and-swap cannot mean something else than they do.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from dogpile.cache import make_region
from dogpile.cache.api import NO_VALUE
from dogpile.cache.region import CacheRegion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from querycache import versions
from querycache.backends import breaker
from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.store import Mark, StoreBackend

INCARNATIONS = st.integers(10_000_000, 91_999_999)
GENERATIONS = st.one_of(st.integers(0, 999_999), st.sampled_from([0, 999_998, 999_999]))
PENDING = st.one_of(
    st.integers(0, versions.MAX_PENDING + 5), st.sampled_from([0, 0, 1, 2, versions.MAX_PENDING])
)


def version_of(incarnation: int, generation: int, quarantine: int, pending: int) -> int:
    return incarnation * versions.INCARNATION + generation * versions.GENERATION + quarantine + pending


QUARANTINES = st.sampled_from([0, versions.QUARANTINE, versions.GIVEN_UP])
VERSIONS = st.builds(version_of, INCARNATIONS, GENERATIONS, QUARANTINES, PENDING)
SOME = st.lists(st.one_of(st.none(), VERSIONS), min_size=1, max_size=4)
# Each store is empty for the whole of a test, and examples use names of their own; and that the examples are
# run by the classes of several stores is what inheriting a suite means.
EXAMPLES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    max_examples=60,
)

_numbers = count()


def fresh_names(number: int) -> list[str]:
    """Names of counters that nobody has used yet."""
    return [f"counter-{next(_numbers)}" for _ in range(number)]


def put(store: StoreBackend, present: Sequence[int | None]) -> list[str]:
    """Make counters of these versions (None: a name only) and give their names."""
    names = fresh_names(len(present))
    changes = [
        (name, None, version) for name, version in zip(names, present, strict=True) if version is not None
    ]
    assert store.swap(changes) == [True] * len(changes)
    return names


def read(store: StoreBackend, names: Sequence[str]) -> list[int | None]:
    return store.fetch(None, names)[1]


def is_new(version: int | None, state: int) -> bool:
    """Whether this is a version of some new incarnation, with this quarantine and these marks."""
    return version is not None and version % versions.GENERATION == state


class StoreContract:
    """Inherited by the test class of each store.

    A subclass gives the fixture `store`, an empty store, and says how its region is configured in dogpile.
    """

    created = versions.QUARANTINE + 1
    """The state of a counter that the first writer created: quarantined, and marked."""

    waits = False
    """Whether there is a server to wait for."""

    @pytest.fixture
    def store(self) -> Iterator[StoreBackend]:
        raise NotImplementedError("each store's class gives its own")

    @pytest.fixture
    def region(self) -> CacheRegion:
        raise NotImplementedError("each store's class gives its own")

    def incarnation_of(self, mark: Mark) -> int:
        """That on which the store has made this mark."""
        return versions.incarnation_of(mark)

    def mark_on(self, incarnation: int) -> Mark:
        """What the store knows of a mark that it has made on this one."""
        return version_of(incarnation, 0, 0, 1)

    # --- Entries ----------------------------------------------------------------------------------

    def test_an_entry_is_found_as_it_was_stored_until_it_is_removed(self, store: StoreBackend) -> None:
        assert store.fetch("entry") == (None, [])
        assert store.store("entry", b"one")
        assert store.fetch("entry") == (b"one", [])
        assert store.store("entry", b"two")
        assert store.fetch("entry") == (b"two", [])
        store.remove(["entry", "missing"])
        assert store.fetch("entry") == (None, [])
        store.remove(["entry"])

    @EXAMPLES
    @given(
        payload=st.one_of(st.binary(), st.sampled_from([b"", b"\r\n", b"EN\r\n", b"END\r\nMN\r\n", b"VA 3 "]))
    )
    def test_any_bytes_are_a_payload(self, store: StoreBackend, payload: bytes) -> None:
        assert store.store("entry", payload)
        assert store.fetch("entry", ["none"]) == (payload, [None])

    def test_D12_an_empty_payload_is_an_answer(self, store: StoreBackend) -> None:
        assert store.store("entry", b"")
        assert store.fetch("entry")[0] == b""

    def test_D10_any_text_is_a_key_and_no_two_are_the_same(self, store: StoreBackend) -> None:
        keys = [
            *(
                "a",
                "A",
                "a b",
                "a  b",
                "a\r\nb",
                "a\nb",
                "a\tb",
                "a\0b",
                "\x7f",
                "",
                " ",
                "~",
                "~a",
                "a~",
                "{a}b",
            ),
            *("é", "e\u0301", "日本語", "\U0001f600", "\udc80", "x" * 249, "x" * 250, "x" * 251, "x" * 5_000),
            *("x" * 250 + "y", "mg a v\r\n", "a@b", "*", "%s%d"),
        ]
        for number, key in enumerate(keys):
            assert store.store(key, b"%d" % number)
        assert [store.fetch(key)[0] for key in keys] == [b"%d" % number for number in range(len(keys))]
        marks = {key: store.begin([key])[key] for key in keys}
        assert len(set(marks.values())) == len(keys) or not store.atomic
        store.end(marks)
        assert all(version is not None for version in read(store, keys))
        store.remove(keys)
        assert [store.fetch(key)[0] for key in keys] == [None] * len(keys)

    def test_entries_and_counters_of_one_name_do_not_meet(self, store: StoreBackend) -> None:
        # The ledger gives them different names; a store may rely on that, but must not fail.
        assert store.store("entry", b"payload")
        store.settle(["counter"], "witness")
        assert store.fetch("entry", ["counter"])[0] == b"payload"

    def test_half_a_megabyte_is_stored(self, store: StoreBackend) -> None:
        payload = bytes(range(256)) * 2_000
        assert store.store("entry", payload)
        assert store.fetch("entry", ["a", "b"]) == (payload, [None, None])

    def test_what_can_be_done_meanwhile_is_done_once_where_a_server_is_waited_for(
        self, store: StoreBackend
    ) -> None:
        store.store("entry", b"payload")
        done: list[int] = []
        assert store.fetch("entry", ["none"], lambda: done.append(1)) == (b"payload", [None])
        assert len(done) == self.waits

    def test_a_fault_meanwhile_is_the_callers_and_harms_nobody(self, store: StoreBackend) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        store.store("entry", b"payload")
        for _ in range(3):
            with contextlib.suppress(ZeroDivisionError):
                store.fetch("entry", ["none"], fail)
            assert store.fetch("other", ["none"]) == (None, [None])  # not the answer to what was asked before
        assert store.fetch("entry") == (b"payload", [])

    def test_D11_no_keys_at_all_are_no_error(self, store: StoreBackend) -> None:
        store.remove([])
        assert store.fetch(None, []) == (None, [])
        assert store.begin([]) == {}
        store.end({})
        store.bump([])
        assert store.swap([]) == []
        assert store.settle([], "witness") == []
        assert store.get_serialized_multi([]) == []

    def test_the_server_answers(self, store: StoreBackend) -> None:
        store.ping()

    # --- Counters ---------------------------------------------------------------------------------

    @EXAMPLES
    @given(present=SOME)
    def test_fetch_gives_versions_in_the_order_asked(
        self, store: StoreBackend, present: list[int | None]
    ) -> None:
        assert read(store, put(store, present)) == present

    @EXAMPLES
    @given(present=SOME)
    def test_begin_marks(self, store: StoreBackend, present: list[int | None]) -> None:
        names = put(store, present)
        marks = store.begin(names)
        for name, before, after in zip(names, present, read(store, names), strict=True):
            if before is None:
                assert is_new(after, self.created)
            elif versions.pending_of(before) >= versions.MAX_PENDING:
                assert is_new(after, versions.GIVEN_UP + 1)
                assert after is not None
                assert versions.incarnation_of(after) != versions.incarnation_of(before)
            else:
                assert after == versions.begun(before, versions.fresh())
            assert after is not None
            assert self.incarnation_of(marks[name]) == versions.incarnation_of(after)

    @EXAMPLES
    @given(present=SOME, mine=st.booleans(), other=INCARNATIONS)
    def test_end_unmarks_its_own_incarnation_only(
        self, store: StoreBackend, present: list[int | None], mine: bool, other: int
    ) -> None:
        names = put(store, present)
        marked = [
            versions.incarnation_of(before) if before is not None and mine else other for before in present
        ]
        store.end(dict(zip(names, map(self.mark_on, marked), strict=True)))
        for before, after, incarnation in zip(present, read(store, names), marked, strict=True):
            assert after == (None if before is None else versions.ended(before, incarnation))

    @EXAMPLES
    @given(present=SOME)
    def test_bump_gives_a_new_generation(self, store: StoreBackend, present: list[int | None]) -> None:
        names = put(store, present)
        store.bump(names)
        assert read(store, names) == [
            None if before is None else versions.bumped(before) for before in present
        ]

    @EXAMPLES
    @given(present=SOME, expected=VERSIONS, versions_after=st.lists(VERSIONS, min_size=4, max_size=4))
    def test_swap_compares(
        self, store: StoreBackend, present: list[int | None], expected: int, versions_after: list[int]
    ) -> None:
        names = put(store, present)
        wrong = [(name, expected, new) for name, new in zip(names, versions_after, strict=False)]
        assert store.swap(wrong) == [before == expected for before in present]
        found = read(store, names)
        right = list(zip(names, found, versions_after, strict=False))
        assert store.swap(right) == [True] * len(names)
        assert read(store, names) == versions_after[: len(names)]

    @EXAMPLES
    @given(present=SOME, witness=VERSIONS)
    def test_settle_creates_and_clears_where_no_writer_is_at_work(
        self, store: StoreBackend, present: list[int | None], witness: int
    ) -> None:
        quiet = versions.is_clean(witness)
        [witness_name] = put(store, [witness])
        names = put(store, present)
        settled = store.settle(names, witness_name)
        assert read(store, names) == settled
        assert read(store, [witness_name]) == [witness]
        for before, after in zip(present, settled, strict=True):
            if before is None:
                assert is_new(after, 0 if quiet else versions.QUARANTINE)
            elif versions.is_clean(before) or not quiet:
                assert after == before
            elif versions.pending_of(before):
                assert is_new(after, 0)
                assert after is not None
                assert versions.incarnation_of(after) != versions.incarnation_of(before)
            else:
                assert after == versions.cleared(before, versions.fresh())

    def test_settle_with_a_witness_that_is_missing_leaves_counters_unclean(self, store: StoreBackend) -> None:
        [counter] = put(store, [version_of(10_000_000, 0, 0, 1)])
        settled = store.settle([counter, *(new := fresh_names(1))], fresh_names(1)[0])
        assert not any(map(versions.is_clean, settled))
        assert read(store, [counter, *new]) == settled

    def test_two_incarnations_of_a_counter_have_nothing_in_common(self, store: StoreBackend) -> None:
        names = fresh_names(40)
        store.begin(names[:20])
        store.settle(names[20:], fresh_names(1)[0])
        with_marks, planted = read(store, names[:20]), read(store, names[20:])
        assert len({*with_marks, *planted}) == 2  # one random draw a call
        store.begin(more := fresh_names(20))
        assert set(read(store, more)).isdisjoint(with_marks)

    def test_E9_a_writer_takes_off_its_own_mark_only(self, store: StoreBackend) -> None:
        [name] = put(store, [version_of(10_000_000, 0, 0, 0)])
        first, second = store.begin([name]), store.begin([name])
        assert read(store, [name]) == [version_of(10_000_000, 0, 0, 2)]
        store.end(first)
        assert read(store, [name]) == [version_of(10_000_000, 1, 0, 1)]
        store.end(second)
        assert read(store, [name]) == [version_of(10_000_000, 2, 0, 0)]

    def test_many_writers_at_once_leave_neither_mark_nor_gap(self, store: StoreBackend) -> None:
        names = put(store, [version_of(10_000_000, 0, 0, 0)] * 3)
        failures: list[BaseException] = []

        def write() -> None:
            try:
                for _ in range(25):
                    store.end(store.begin(names))
            except BaseException as failure:  # noqa: BLE001 - a thread must hand it over to be seen
                failures.append(failure)

        threads = [threading.Thread(target=write) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert read(store, names) == [version_of(10_000_000, 150, 0, 0)] * 3

    def test_thousands_of_counters_go_in_one_step(self, store: StoreBackend) -> None:
        names = [f"{name}-{'x' * 100}" for name in fresh_names(4_000)]
        marks = store.begin(names)
        assert list(marks) == names
        assert all(is_new(version, self.created) for version in read(store, names))
        store.end(marks)
        assert all(is_new(version, self.created - 1) for version in read(store, names))
        store.bump(names)
        settled = store.settle(names, "no witness")
        assert settled == read(store, names)

    # --- As a dogpile backend ---------------------------------------------------------------------

    def test_dogpile_finds_it_by_name(self, region: Any) -> None:
        value = {"id": 1, "names": ["a", "é"], "none": None}
        assert region.get("key") is NO_VALUE
        region.set("key", value)
        assert region.get("key") == value
        region.set_multi({"one": 1, "two": None})
        assert region.get_multi(["two", "missing", "one"]) == [None, NO_VALUE, 1]
        assert region.get_or_create("made", lambda: [1, 2]) == [1, 2]
        assert region.get_or_create("made", lambda: [3]) == [1, 2]
        region.delete("key")
        region.delete_multi(["one", "missing"])
        assert region.get_multi(["key", "one", "two"]) == [NO_VALUE, NO_VALUE, None]

    def test_C6_what_is_kept_is_a_copy(self, region: Any) -> None:
        value = {"names": ["a"]}
        region.set("key", value)
        value["names"].append("b")
        found = region.get("key")
        assert found == {"names": ["a"]}
        found["names"].append("c")
        assert region.get("key") == {"names": ["a"]}

    def test_D8_bytes_that_cannot_be_decoded_are_made_again(self, region: Any) -> None:
        region.set("key", [1])
        stored = region.actual_backend.get_serialized("key")
        assert isinstance(stored, bytes)
        metadata = stored.partition(b"|")[0] + b"|"
        for damaged in (stored[:-1], metadata, metadata + b"\xc1", metadata + pickle.dumps([1])):
            region.actual_backend.set_serialized("key", damaged)
            assert region.get_or_create("key", lambda: [2]) == [2]

    def test_what_is_stored_is_data_and_never_code(self, region: Any) -> None:
        with pytest.raises(TypeError):
            region.set("key", object())


Connect = Callable[[str, int], StoreBackend]


class ServerContract:
    """What every store behind a network does when the network or the server fails. `connect` makes one."""

    @pytest.fixture
    def connect(self) -> Connect:
        raise NotImplementedError("each store's class gives its own")

    @staticmethod
    def every_call(store: StoreBackend) -> list[Callable[[], object]]:
        return [
            lambda: store.fetch("entry", ["tag"]),
            lambda: store.store("entry", b"payload"),
            lambda: store.remove(["entry"]),
            lambda: store.begin(["tag"]),
            lambda: store.end({"tag": (10_000_000, 1)}),
            lambda: store.bump(["tag"]),
            lambda: store.swap([("tag", None, versions.fresh())]),
            lambda: store.settle(["tag"], "witness"),
            lambda: store.lost_nothing_for(1),
            lambda: store.get_serialized_multi(["entry"]),
            store.ping,
        ]

    def test_nobody_listens(self, connect: Connect) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        store = connect("127.0.0.1", port)
        for call in self.every_call(store):
            with pytest.raises(CacheUnavailable, match=str(port)):
                call()

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"\r\n" * 9,
            b"\0" * 70_000,
            b"$-9\r\n",
            b"VA -1 x\r\n",
            b"VA\r\n",
            b"VA " + b"9" * 5_000 + b"\r\n",
            b"VA 1 c" + b"9" * 5_000 + b"\r\n1\r\n",
            b"%1\r\n*1\r\n+a\r\n+b\r\n",
            b"STAT item_size_max 1m\r\nEND\r\nMN\r\n",
        ],
        ids=[
            "hangs up",
            "http",
            "empty lines",
            "zeros",
            "negative",
            "negative value",
            "no size",
            "long size",
            "long cas",
            "map",
            "item size",
        ],
    )
    def test_garbage(self, connect: Connect, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
        with FakeServer(answer) as server:
            store = connect("127.0.0.1", server.port)
            for call in self.every_call(store)[:-1]:
                with pytest.raises(CacheUnavailable):
                    call()
            with pytest.raises((CacheUnavailable, ConfigurationError)):
                store.ping()

    def test_a_server_that_hangs_costs_one_timeout(self, connect: Connect) -> None:
        with FakeServer(None) as server:
            store = connect("127.0.0.1", server.port)
            with pytest.raises(CacheUnavailable):
                store.fetch("entry", ["tag"])
            asked = server.connections
            assert asked == 1
            for _ in range(100):
                with pytest.raises(CacheUnavailable, match="left alone"):
                    store.fetch("entry", ["tag"])
            assert server.connections == asked

    def test_an_answer_that_comes_a_byte_at_a_time(self, connect: Connect) -> None:
        with DrippingServer() as server:
            store = connect("127.0.0.1", server.port)
            with pytest.raises(CacheUnavailable, match="takes too long"):
                store.fetch("entry", ["tag"])

    @pytest.mark.parametrize(
        "answer", [b"+" + b"x" * 2**17, b"STAT " + b"x" * 2**17, b"STAT x y\r\n" * 2**14]
    )
    def test_an_answer_without_end(self, connect: Connect, answer: bytes) -> None:
        with FloodingServer(answer) as server:
            store = connect("127.0.0.1", server.port)
            with pytest.raises(CacheUnavailable, match=r"without end|no line ends|reply type"):
                store.fetch("entry", ["tag"])
        assert server.sent < 16 * 2**20

    def test_writers_try_all_the_same(self, connect: Connect) -> None:
        with FakeServer(b"") as server:
            store = connect("127.0.0.1", server.port)
            with pytest.raises(CacheUnavailable):
                store.fetch("entry", ["tag"])
            calls: list[Callable[[], object]] = [
                lambda: store.begin(["tag"]),
                lambda: store.end({"tag": (10_000_000, 1)}),
                lambda: store.bump(["tag"]),
            ]
            for number, call in enumerate(calls, start=server.connections):
                with pytest.raises(CacheUnavailable, match="does not answer"):
                    call()
                assert server.connections == number + 1


class FakeServer:
    """Listens, and answers whatever it is sent with the same bytes; hangs up after b"", and hangs on None."""

    def __init__(self, answer: bytes | None) -> None:
        self.connections = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A thread that waits in accept() is not woken by close() alone.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            connection.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            if self._answer is not None:
                with contextlib.suppress(OSError):
                    connection.recv(65_536)
                    connection.sendall(self._answer)
                    connection.shutdown(socket.SHUT_RDWR)


class DrippingServer(FakeServer):
    """Begins an answer, and hangs up long before it ends."""

    def __init__(self) -> None:
        super().__init__(b"+")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            self._open.append(connection)
            connection.recv(65_536)
            for _ in range(300):
                connection.sendall(self._answer or b"")
                time.sleep(0.01)
            connection.shutdown(socket.SHUT_RDWR)


class FloodingServer(FakeServer):
    """Sends the same over and over, as long as it is listened to."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(answer)
        self.sent = 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            self._open.append(connection)
            connection.recv(65_536)
            while self.sent < 64 * 2**20:
                self.sent += connection.send(self._answer or b"")
            connection.shutdown(socket.SHUT_RDWR)


def region_of(backend: str, **arguments: object) -> CacheRegion:
    """A dogpile region on a backend of this library, found by its registered name."""
    region: CacheRegion = new_region().configure(backend, arguments=arguments)
    return region


def new_region(**arguments: object) -> Any:
    """`make_region`, which has no types."""
    return make_region(**arguments)
