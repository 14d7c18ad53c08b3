"""The store on memcached: the common contracts, and what is memcached's own: limits, several servers,
pipelines."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from dogpile.cache.region import CacheRegion
from pymemcache.client.base import Client

from querycache import versions
from querycache.backends import breaker, meta
from querycache.backends.memcached import MemcachedBackend
from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.store import Mark, StoreBackend
from tests.servers import Server
from tests.stores.contract import (
    Connect,
    FakeServer,
    ServerContract,
    StoreContract,
    fresh_names,
    is_new,
    put,
    read,
    region_of,
    version_of,
)


@pytest.fixture
def private_memcached(private_server: Callable[[str], Server]) -> Server:
    return private_server("memcached")


def client_of(url: str) -> contextlib.closing[Client]:
    parts = urlsplit(url)
    return contextlib.closing(Client((parts.hostname, parts.port), timeout=10, default_noreply=False))


@pytest.fixture
def client(memcached_store_url: str) -> Iterator[Client]:
    with client_of(memcached_store_url) as client:
        yield client


class CountingSocket(socket.socket):
    """Counts round trips: how often something is sent after something was received."""

    trips = 0
    _sent_last = False

    def _send(self) -> None:
        if not self._sent_last:
            CountingSocket.trips += 1
        self._sent_last = True

    def sendall(self, *arguments: Any) -> None:
        self._send()
        super().sendall(*arguments)

    def send(self, *arguments: Any) -> int:
        self._send()
        return super().send(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self._sent_last = False
        return super().recv_into(*arguments)


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Counts the round trips of a step."""

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        made = CountingSocket(socket.AF_INET)
        made.settimeout(timeout)
        made.connect(address)
        return made

    def count(step: Callable[[], object]) -> int:
        before = CountingSocket.trips
        step()
        return CountingSocket.trips - before

    monkeypatch.setattr(socket, "create_connection", connect)
    return count


class TestMemcached(StoreContract, ServerContract):
    waits = True

    def incarnation_of(self, mark: Mark) -> int:
        return int(mark[0])

    def mark_on(self, incarnation: int) -> Mark:
        return incarnation, 0  # no CAS value

    @pytest.fixture
    def store(self, memcached_store_url: str) -> Iterator[MemcachedBackend]:
        store = MemcachedBackend({"url": memcached_store_url, "timeout": 5})
        yield store
        store.close()

    @pytest.fixture
    def region(self, memcached_store_url: str) -> CacheRegion:
        return region_of("querycache.memcached", url=memcached_store_url)

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda host, port: MemcachedBackend({"url": f"memcached://{host}:{port}", "timeout": 0.1})

    # --- Limits -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("ttl", [0.001, 1, 60, 30 * 24 * 3600, 31 * 24 * 3600, 365 * 24 * 3600])
    def test_D10_no_time_to_live_is_a_date(self, store: MemcachedBackend, ttl: float) -> None:
        assert store.store("entry", b"payload", ttl)
        pipeline = meta.Pipeline()
        pipeline.add(b"mg entry t")
        [[reply]] = meta.converse([(store._ledger, pipeline)])
        [left] = reply.flags
        assert max(1, min(ttl, 30 * 24 * 3600)) - 2 <= int(left[1:]) <= max(1, min(ttl, 30 * 24 * 3600))

    def test_without_a_time_to_live_entries_and_counters_stay(self, store: MemcachedBackend) -> None:
        store.store("entry", b"payload")
        store.begin(["tag"])
        store.settle(["planted"], "witness")
        store.swap([("swapped", None, versions.fresh())])
        pipeline = meta.Pipeline()
        for key in (b"entry", b"tag", b"planted", b"swapped"):
            pipeline.add(b"mg %b t" % key)
        [replies] = meta.converse([(store._ledger, pipeline)])
        assert [reply.flags for reply in replies] == [(b"t-1",)] * 4

    @pytest.mark.parametrize("size", [2**20 - 1_000, 2**20 - 512, 2**20 - 100, 2**20, 3 * 2**20])
    def test_D10_an_entry_over_the_item_size_is_refused_whole(
        self, store: MemcachedBackend, size: int
    ) -> None:
        store.ping()
        stored = store.store("entry", b"x" * size)
        assert stored == (size + 512 <= 2**20)
        assert store.fetch("entry")[0] == (b"x" * size if stored else None)

    def test_D10_what_the_server_itself_refuses_is_refused(
        self, store: MemcachedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.ping()
        monkeypatch.setattr(store._ledger, "item_size_max", 2**30)
        assert not store.store("entry", bytes(5 * 2**20))
        assert store.fetch("entry")[0] is None
        assert store.store("entry", b"payload")  # and the connection is in step

    def test_a_server_that_takes_a_large_entry_slowly(self) -> None:
        """Each piece is taken in time, and all of it takes ten seconds."""
        settings = b"STAT item_size_max 134217728\r\nEND\r\n"

        def serve() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                for answer in (settings, b"MN\r\n"):
                    connection.recv(4096)
                    connection.sendall(answer)
                while piece := connection.recv(4096):
                    time.sleep(len(piece) / 400_000)

        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            threading.Thread(target=serve, daemon=True).start()
            store = MemcachedBackend(
                {"url": f"memcached://127.0.0.1:{listener.getsockname()[1]}", "timeout": 0.1}
            )
            store._ledger.item_size_max = 2**30  # as it will be told
            begun = time.monotonic()
            with pytest.raises(CacheUnavailable, match="takes too long"):
                store.store("entry", bytes(8 * 2**20))
            assert time.monotonic() - begun < 3

    def test_an_uptime_that_is_no_number_is_a_fault_of_the_server(
        self, store: MemcachedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(meta.Server, "statistics", lambda self: {"uptime": "abc"})
        with pytest.raises(CacheUnavailable):
            store.lost_nothing_for(1)

    # --- Round trips ------------------------------------------------------------------------------

    def test_every_step_is_one_round_trip(
        self, memcached_store_url: str, trips: Callable[[Callable[[], object]], int]
    ) -> None:
        store = MemcachedBackend({"url": memcached_store_url})
        tags = [f"tag {number}" for number in range(200)]
        store.ping()  # connects
        assert trips(lambda: store.fetch("entry", tags)) == 1
        assert trips(lambda: store.store("entry", b"payload", 60)) == 1
        marks: dict[str, Mark] = {}
        assert trips(lambda: marks.update(store.begin(tags))) == 1
        assert trips(lambda: store.end(marks)) == 1
        assert trips(lambda: store.bump(tags)) == 1
        assert trips(lambda: store.remove(tags)) == 1
        assert trips(lambda: store.get_serialized_multi(tags)) == 1
        assert trips(lambda: store.settle(fresh_names(3), "no witness")) == 1
        [witness] = put(store, [version_of(10_000_000, 0, 0, 0)])
        assert trips(lambda: store.settle(fresh_names(3), witness)) == 2
        marks |= store.begin(tags)
        store.begin(tags[:1])
        assert trips(lambda: store.end(marks)) == 2  # contended
        store.close()

    def test_the_witness_is_marked_first_and_unmarked_last(
        self, memcached_store_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = MemcachedBackend({"url": memcached_store_url})
        sent: list[bytes] = []
        step = MemcachedBackend._step

        def watched(self: Any, steps: meta.Pipeline, **arguments: Any) -> Any:
            sent.extend(command.split()[1] for command in steps._commands if command.startswith(b"ma "))
            return step(self, steps, **arguments)

        monkeypatch.setattr(MemcachedBackend, "_step", watched)
        witness, one, two = names = fresh_names(3)
        store.end(store.begin(names))
        assert sent == [name.encode() for name in (witness, one, two, one, two, witness)]
        store.close()

    # --- Several servers --------------------------------------------------------------------------

    @pytest.fixture
    def pair(self, private_server: Callable[[str], Server]) -> tuple[Server, Server]:
        return private_server("memcached"), private_server("memcached")

    @staticmethod
    def on_both(*servers: Server, **arguments: object) -> MemcachedBackend:
        addresses = ",".join(urlsplit(server.url).netloc for server in servers)
        return MemcachedBackend({"url": f"memcached://{addresses}", **arguments})

    def test_the_ledger_is_on_the_first_server_and_entries_on_all(self, pair: tuple[Server, Server]) -> None:
        store = self.on_both(*pair)
        keys = [f"entry {number}" for number in range(100)]
        tags = [f"tag {number}" for number in range(20)]
        for key in keys:
            assert store.store(key, key.encode())
        store.begin(tags)
        assert [store.fetch(key, tags)[0] for key in keys] == [key.encode() for key in keys]
        assert None not in store.fetch(keys[0], tags)[1]
        assert store.get_serialized_multi(keys) == [key.encode() for key in keys]
        held = []
        for server in pair:
            with client_of(server.url) as client:
                held.append(client.stats()[b"curr_items"])
        assert sum(held) == 120
        assert 20 + 25 < held[0] < 20 + 75
        store.remove(keys)
        assert [store.fetch(key)[0] for key in keys] == [None] * 100
        assert None not in read(store, tags)
        store.close()

    def test_an_entry_elsewhere_is_fetched_in_the_same_round_trip(
        self, pair: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.on_both(*pair)
        calls = []
        converse = meta.converse

        def counted(batches: Any, **options: Any) -> Any:
            calls.append(len(batches))
            return converse(batches, **options)

        monkeypatch.setattr("querycache.backends.memcached.converse", counted)
        for number in range(20):
            store.fetch(f"entry {number}", ["a", "b"])
        assert len(calls) == 20 and set(calls) == {1, 2}
        store.close()

    def test_a_server_added_or_gone_is_no_danger_to_the_ledger(self, pair: tuple[Server, Server]) -> None:
        one, two = self.on_both(pair[0]), self.on_both(*pair)
        [name] = put(one, [version_of(10_000_000, 5, 0, 0)])
        two.bump([name])
        assert read(one, [name]) == [version_of(10_000_000, 6, 0, 0)]
        one.close()
        two.close()

    def test_a_server_that_is_gone_is_an_outage_for_its_entries_only(
        self, pair: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
        store = self.on_both(*pair, timeout=0.2)
        keys = [f"entry {number}" for number in range(40)]
        for key in keys:
            store.store(key, b"payload")
        pair[1].kill()

        def fetched(key: str) -> bytes | None:
            with contextlib.suppress(CacheUnavailable):
                return store.fetch(key, ["tag"])[0]
            return None

        found = [fetched(key) for key in keys]
        assert 5 < found.count(b"payload") < 35
        store.end(store.begin(["tag"]))
        with pytest.raises(CacheUnavailable):
            store.ping()
        pair[1].start()
        store.ping()
        assert [store.fetch(key, ["tag"])[0] for key in keys] == found
        store.close()

    # --- Restarts, and the proof that nothing was lost --------------------------------------------

    def test_E5_no_version_survives_a_restart(
        self, private_memcached: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
        store = MemcachedBackend({"url": private_memcached.url})
        [name] = put(store, [version_of(10_000_000, 0, 0, 0)])
        marks = store.begin([name])
        private_memcached.restart()
        store.end(marks)
        assert read(store, [name]) == [None]
        store.close()

    def test_a_paused_server_costs_a_timeout_and_heals(
        self, private_memcached: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = MemcachedBackend({"url": private_memcached.url, "timeout": 0.1})
        store.store("entry", b"payload")
        private_memcached.pause()
        with pytest.raises(CacheUnavailable, match="does not answer"):
            store.fetch("entry")
        with pytest.raises(CacheUnavailable, match="left alone"):
            store.fetch("entry")
        private_memcached.resume()
        monkeypatch.setattr(store._ledger.breaker, "_next_try", 0.0)
        # The late answer to the first question must not be taken for the answer to the second.
        assert store.fetch("other")[0] is None
        assert store.fetch("entry")[0] == b"payload"
        store.close()

    def test_a_server_of_ones_own_has_lost_nothing(self, private_memcached: Server) -> None:
        store = MemcachedBackend({"url": private_memcached.url})
        store.store("entry", b"payload")
        store.remove(["entry"])
        assert store.fetch("entry")[0] is None
        store.end(store.begin(["tag"]))
        store.settle(["tag", "other"], "witness")
        assert store.lost_nothing_for(-5)
        assert not store.lost_nothing_for(3_600)
        store.close()

    @pytest.mark.parametrize("removal", [Client.flush_all, lambda client: client.delete("x")])
    def test_a_server_on_which_somebody_removed_something_may_have_lost_counters(
        self, private_memcached: Server, removal: Callable[[Client], object]
    ) -> None:
        store = MemcachedBackend({"url": private_memcached.url})
        assert store.lost_nothing_for(-5)
        with client_of(private_memcached.url) as client:
            client.set("x", b"1")
            removal(client)
        assert not store.lost_nothing_for(-5)
        store.close()

    def test_a_new_server_is_not_taken_for_older_than_it_is(self, private_memcached: Server) -> None:
        store = MemcachedBackend({"url": private_memcached.url})
        born = time.monotonic()
        while not store.lost_nothing_for(0.5):
            time.sleep(0.02)
        assert time.monotonic() - born > 0.4  # the server is a little older than `born`
        store.close()

    def test_a_server_that_evicts_has_lost_counters(self, private_memcached: Server) -> None:
        store = MemcachedBackend({"url": private_memcached.url})
        for number in range(200):
            assert store.store(f"entry {number}", bytes(500_000))
        assert store.fetch("entry 0")[0] is None
        assert not store.lost_nothing_for(-5)
        store.close()

    # --- Garbage, and servers that cannot do it ---------------------------------------------------

    @pytest.mark.parametrize("garbage", [b"", b"5", b"x", b"x" * 19, b"1" * 18, b"1" * 20, b"-" + b"1" * 18])
    def test_a_counter_that_is_none_counts_as_missing_and_is_replaced(
        self, store: MemcachedBackend, client: Client, garbage: bytes
    ) -> None:
        [name, other] = put(store, [versions.fresh(), None])
        client.set(name, garbage)
        assert read(store, [name]) == [None]
        store.end({name: (10_000_000, 0)})
        client.set(name, garbage)
        store.bump([name])
        client.set(name, garbage)
        assert is_new(store.settle([name, other], "witness")[0], versions.QUARANTINE)
        assert is_new(read(store, [name])[0], versions.QUARANTINE)
        client.set(name, garbage)
        assert store.swap([(name, None, version_of(10_000_000, 0, 0, 0))]) == [False]
        client.set(name, garbage)
        marks = store.begin([other, name])
        assert is_new(read(store, [name])[0], versions.GIVEN_UP + 1)
        store.end(marks)
        assert is_new(read(store, [name])[0], versions.GIVEN_UP)

    @pytest.mark.parametrize(
        "answer", [b"SERVER_ERROR out of memory", b"CLIENT_ERROR bad command", b"ERROR", b"VA"]
    )
    def test_what_the_server_did_not_do_is_not_taken_for_done(
        self, store: MemcachedBackend, monkeypatch: pytest.MonkeyPatch, answer: bytes
    ) -> None:
        names = put(store, [versions.fresh(), versions.fresh()])
        read_reply = meta._Connection.read_reply
        answers = iter([False, True] * 2)

        def refused(connection: meta._Connection) -> meta.Reply:
            reply = read_reply(connection)
            return meta.Reply(answer) if next(answers) else reply

        monkeypatch.setattr(meta._Connection, "read_reply", refused)
        for step in (store.bump, store.remove):
            with pytest.raises(CacheUnavailable, match=answer.decode()):
                step(names)

    @pytest.mark.parametrize(
        ("settings", "noop", "message"),
        [
            (b"STAT item_size_max 1048576\r\nEND\r\n", b"ERROR\r\n", "memcached 1.6 or later is needed"),
            (b"STAT cas_enabled no\r\nEND\r\n", b"MN\r\n", "disable-cas"),
            (b"STAT memory_file /tmp/items\r\nEND\r\n", b"MN\r\n", "memory-file"),
            (b"ERROR\r\n", b"MN\r\n", "answers b'ERROR' to 'stats settings'"),
        ],
        ids=["old", "no CAS", "restartable", "other"],
    )
    def test_an_unsuitable_server_is_a_clear_error(self, settings: bytes, noop: bytes, message: str) -> None:
        with FakeServer(settings + noop) as server:
            store = MemcachedBackend({"servers": [f"127.0.0.1:{server.port}"]})
            with pytest.raises(CacheUnavailable, match=message):
                store.fetch("entry")
        with FakeServer(settings + noop) as server:
            store = MemcachedBackend({"servers": [f"127.0.0.1:{server.port}"]})
            with pytest.raises(ConfigurationError, match=message):
                store.ping()

    @pytest.mark.parametrize(
        "answer",
        [
            b"ERROR Too many open connections\r\n",
            b"SERVER_ERROR out of memory\r\n",
            b"STAT item_size_max 1048576\r\nEND\r\nERROR Too many open connections\r\n",
            b"STAT item_size_max 1048576\r\nEND\r\nSERVER_ERROR backend timeout\r\n",
        ],
    )
    def test_a_server_that_has_no_room_now_is_not_unsuitable(self, answer: bytes) -> None:
        for call in (MemcachedBackend.ping, lambda store: store.fetch("entry")):
            with FakeServer(answer) as server:
                store = MemcachedBackend({"servers": [f"127.0.0.1:{server.port}"]})
                with pytest.raises(
                    CacheUnavailable, match=r"does not answer: .*(open connections|out of|timeout)"
                ):
                    call(store)

    # --- Pools and processes ----------------------------------------------------------------------

    def test_more_threads_than_connections_wait_no_longer_than_the_timeout(
        self, memcached_store_url: str
    ) -> None:
        store = MemcachedBackend({"url": memcached_store_url, "max_connections": 1, "timeout": 0.1})
        slot = store._ledger.pool.take()
        with pytest.raises(CacheUnavailable, match="none of 1 connections became free"):
            store.begin(["tag"])
        store._ledger.pool.give_back(slot)
        assert store.begin(["tag"])
        store.close()

    def test_D9_after_a_fault_every_connection_is_given_back(self) -> None:
        with FakeServer(b"") as server:
            store = MemcachedBackend({"servers": [f"127.0.0.1:{server.port}"], "max_connections": 2})
            for _ in range(5):
                with pytest.raises(CacheUnavailable, match="closed the connection"):
                    store.begin(["tag"])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
    def test_a_forked_process_has_connections_of_its_own(self, store: StoreBackend) -> None:
        store.store("entry", b"parent")
        child = os.fork()
        if child == 0:
            try:
                ok = all(store.fetch("entry")[0] == b"parent" for _ in range(200))
            finally:
                os._exit(0 if ok else 1)
        assert all(store.fetch("missing")[0] is None for _ in range(200))
        assert os.waitpid(child, 0)[1] == 0

    # --- Configuration ----------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs an address: write memcached://host:11211"),
            ({"url": "memcached://"}, "write memcached://host:11211"),
            ({"url": "memcached://h1/path"}, "write memcached://host:11211"),
            ({"url": "memcached://h1,h1"}, "'h1,h1' for option 'servers'"),
            ({"url": "memcached://h1,,h2"}, "'h1,,h2' for option 'servers'"),
            ({"url": "memcached://h1:port"}, "'h1:port' is no address"),
            ({"url": "memcached://h1:99999999"}, "'h1:99999999' is no address"),
            ({"url": "memcached://me:secret@h1"}, "is no address"),
            (
                {"url": "memcached://h1?timout=1"},
                "no option 'timout'; it takes max_connections, servers, timeout",
            ),
            ({"url": "memcached://h1?timeout=-1"}, "'-1' for option 'timeout'"),
            ({"servers": 5}, "5 for option 'servers'"),
            ({"servers": []}, "[] for option 'servers'"),
            ({"url": "memcached://h1", "max_connections": 0}, "0 for option 'max_connections'"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_says_what_would(
        self, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigurationError) as raised:
            MemcachedBackend(arguments)
        assert message in str(raised.value)
        assert "secret" not in str(raised.value)

    @pytest.mark.parametrize(
        ("arguments", "addresses"),
        [
            ({"url": "memcached://h1"}, [("h1", 11211)]),
            ({"url": "memcached://h1:1,h2"}, [("h1", 1), ("h2", 11211)]),
            ({"url": "memcached://[::1]:5"}, [("::1", 5)]),
            ({"url": "memcached:///run/memcached.sock"}, ["/run/memcached.sock"]),
            ({"servers": ["h1:5", "/run/memcached.sock"]}, [("h1", 5), "/run/memcached.sock"]),
        ],
    )
    def test_addresses(self, arguments: dict[str, object], addresses: list[object]) -> None:
        assert [server._address for server in MemcachedBackend(arguments)._servers.values()] == addresses

    def test_a_unix_socket(self, tmp_path: Any) -> None:
        path = str(tmp_path / "socket")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(path)
            listener.listen()
            store = MemcachedBackend({"url": f"memcached://{path}", "timeout": 0.1})
            with pytest.raises(CacheUnavailable, match="timed out"):
                store.ping()

    def test_without_the_client_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pymemcache.client.rendezvous", None)
        monkeypatch.delitem(sys.modules, "querycache.backends.memcached")
        with pytest.raises(ConfigurationError, match=r"pip install querycache\[memcached\]"):
            importlib.import_module("querycache.backends.memcached")
