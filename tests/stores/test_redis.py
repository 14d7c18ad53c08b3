"""The store on Redis: the common contracts, and what is Redis' own: restarts, expiry, proofs, refusals."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import pytest
import redis
from dogpile.cache.region import CacheRegion

from querycache import versions
from querycache.backends import breaker, resp
from querycache.backends.redis import RedisBackend
from querycache.backends.resp import batch
from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.ledger import Ledger
from querycache.store import StoreBackend
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

MONTH = 30 * 24 * 3600


def version_in(store: RedisBackend, counter: str) -> int:
    _, [version] = store.fetch(None, [counter])
    assert version is not None
    return version


@pytest.fixture
def private_redis(private_server: Callable[[str], Server]) -> Server:
    return private_server("redis")


@pytest.fixture
def client(redis_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_store_url) as client:
        yield client


def _die(*arguments: object) -> None:
    raise InterruptedError


def _forward(listener: socket.socket, place: list[SplitResult]) -> None:
    """Let a Unix socket lead to a server on TCP, the one that stands there when it is connected to."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        target.close()

    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((place[0].hostname, place[0].port))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


class TestRedis(StoreContract, ServerContract):
    waits = True

    @pytest.fixture
    def store(self, redis_store_url: str) -> Iterator[RedisBackend]:
        store = RedisBackend({"url": redis_store_url, "timeout": 5})
        yield store
        store.close()

    @pytest.fixture
    def region(self, redis_store_url: str) -> CacheRegion:
        return region_of("querycache.redis", url=redis_store_url)

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda host, port: RedisBackend({"url": f"redis://{host}:{port}", "timeout": 0.1})

    # --- Expiry -----------------------------------------------------------------------------------

    def test_D3_entries_expire_in_the_server(self, store: StoreBackend, client: redis.Redis) -> None:
        store.store("entry", b"payload", 2.5)
        assert 2_000 < client.pttl("entry") <= 2_500
        store.store("entry", b"payload", 0.000_1)
        store.store("kept", b"payload")
        assert client.ttl("kept") == -1

    def test_D10_months_are_no_dates(self, store: StoreBackend, client: redis.Redis) -> None:
        store.store("entry", b"payload", 90 * 24 * 3600)
        assert client.ttl("entry") > 89 * 24 * 3600

    def test_D13_counters_expire_a_month_after_the_last_write(
        self, store: StoreBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("querycache.backends.names._NAMES_FOR", 0.0)  # an hour otherwise
        store.begin(["written"])
        store.settle(["planted"], "witness")
        store.swap([("swapped", None, versions.fresh())])
        keys = client.keys("*@*")
        assert len(keys) == 3
        assert all(MONTH - 60 < client.ttl(key) <= MONTH for key in keys)
        counters = ["written", "planted", "swapped"]
        for step in (lambda: store.end(store.begin(counters)), lambda: store.bump(counters)):
            for key in keys:
                client.expire(key, 100)
            step()
            store.ping()  # on the same connection: the step has been taken
            assert all(MONTH - 60 < client.ttl(key) <= MONTH for key in keys)

    # --- Round trips ------------------------------------------------------------------------------

    def test_every_step_is_one_request(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        tags = [f"tag {number}" for number in range(200)]
        store.ping()  # connects
        with redis.Redis.from_url(private_redis.url) as client, client.monitor() as monitor:
            client.echo("the beginning")
            while "beginning" not in monitor.next_command()["command"]:
                pass

            def commands(step: Callable[[], Any]) -> list[str]:
                step()
                client.echo("the end")
                seen: list[str] = []
                for command in iter(monitor.next_command, None):
                    name = command["command"].partition(" ")[0]
                    if name == "ECHO":
                        return seen
                    if command["client_type"] != "lua":
                        seen.append(name)
                return seen

            assert commands(lambda: store.fetch("entry", tags)) == ["MGET", "PEXPIRE"]
            assert commands(lambda: store.store("entry", b"payload", 60)) == ["SET"]
            # of those that are new to this process it makes sure that they are there
            assert commands(lambda: store.begin(tags)) == ["SET", "EXPIRE"] * 200 + ["INCR"] * 200
            assert commands(lambda: store.end(store.begin(tags))) == ["INCR"] * 200 + ["EVALSHA"]
            assert commands(lambda: store.bump(tags)) == ["EVALSHA"]
            assert commands(lambda: store.settle(tags, "witness")) == ["EVALSHA"]
            assert commands(lambda: store.swap([(tag, None, 1) for tag in tags])) == ["EVALSHA"]
            assert commands(lambda: store.get_serialized_multi(["a", "b"])) == ["MGET"]
        store.close()

    def test_scripts_that_were_flushed_are_sent_again(self, store: StoreBackend, client: redis.Redis) -> None:
        store.ping()
        for step in (
            lambda name: store.end(store.begin([name])),
            lambda name: store.bump([name]),
            lambda name: store.settle([name], "witness"),
            lambda name: store.swap([(name, None, versions.fresh())]),
        ):
            client.script_flush()
            step(*fresh_names(1))

    def test_who_gets_no_connection_does_not_blame_the_server(self, redis_store_url: str) -> None:
        store = RedisBackend({"url": redis_store_url, "timeout": 0.05, "max_connections": 1})
        held = store._pool.take()
        with pytest.raises(CacheUnavailable, match="none of 1 connections became free"):
            store.ping()
        store._pool.give_back(held)
        store.ping()
        store.close()

    # --- Counters that were there a moment ago ----------------------------------------------------

    def test_E6_a_counter_that_was_lost_since_it_was_marked_begins_anew(
        self, store: StoreBackend, client: redis.Redis
    ) -> None:
        names = fresh_names(2)
        before = store.begin(names)
        for name in names:
            client.delete(*client.keys(f"{name}@*"))
        after = store.begin(names)
        for name, mark in zip(names, read(store, names), strict=True):
            assert mark is not None
            assert (
                versions.incarnation_of(mark)
                == versions.incarnation_of(after[name])
                != versions.incarnation_of(before[name])
            )
            assert mark % versions.GENERATION == versions.GIVEN_UP + 1
            [key] = client.keys(f"{name}@*")
            assert client.ttl(key) > MONTH - 60

    def test_a_counter_that_was_met_in_one_database_is_new_in_another(self, private_redis: Server) -> None:
        names = fresh_names(2)
        for database in (0, 1):
            store = RedisBackend({"url": f"{private_redis.url.rpartition('/')[0]}/{database}"})
            store.begin(names)
            for version in read(store, names):
                assert is_new(version, versions.QUARANTINE + 1)
            store.close()

    def test_E6_the_first_mark_does_not_expire_before_it_is_taken_off(
        self, store: StoreBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once it is gone, others that have gone with it are taken for clean."""
        names = fresh_names(2)
        monkeypatch.setattr("querycache.backends.names._NAMES_FOR", 0.0)  # an hour otherwise
        store.end(store.begin(names))
        keys = [key for name in names for key in client.keys(f"{name}@*")]
        for key in keys:
            client.expire(key, 5)
        store.begin(names)
        assert client.ttl(keys[0]) > MONTH - 60

    def test_E6_where_the_witness_was_lost_no_reader_gives_it_a_version_meanwhile(
        self, store: StoreBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It could prove that nothing was lost, and take off the marks of this writer on all others."""
        names = fresh_names(2)
        store.end(store.begin(names))
        key = client.keys(f"{names[0]}@*")[0]
        begin_anew = RedisBackend._begin_anew
        monkeypatch.setattr(RedisBackend, "lost_nothing_for", lambda self, seconds: True)

        def reader_first(*arguments: Any) -> Any:
            ledger = Ledger(store, names[0])
            for _ in range(2):
                assert not ledger.lookup(None, names[1:]).fillable
            assert read(store, names)[0] is None
            return begin_anew(*arguments)

        for garbage in (None, b"1", b"", b"garbage", b"9210000000000000000"):
            client.delete(key) if garbage is None else client.set(key, garbage)
            with monkeypatch.context() as patched:
                patched.setattr(RedisBackend, "_begin_anew", reader_first)
                marks = store.begin(names)
            for version in read(store, names):
                assert version is not None
                assert versions.pending_of(version) == 1
            assert not versions.is_provable(cast("int", read(store, names)[0]) - 1)
            store.end(marks)
            client.set(key, versions.fresh())

    def test_E6_a_writer_that_dies_at_a_lost_counter_leaves_nothing_usable(
        self, store: StoreBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has incremented what was not there, and did not come to make a version of it."""
        names = fresh_names(2)
        store.begin(names)
        [key] = client.keys(f"{names[1]}@*")
        client.delete(key)
        with monkeypatch.context() as patched:
            patched.setattr(RedisBackend, "_begin_anew", _die)
            with pytest.raises(InterruptedError):
                store.begin(names)
        assert client.get(key) == b"1"
        assert read(store, names)[1] is None
        assert store.swap([(names[1], None, versions.fresh())]) == [False]
        store.bump(names)
        assert read(store, names)[1] is None
        witness = names[0]  # marked
        assert not versions.is_clean(store.settle([names[1]], witness)[0])
        assert versions.pending_of(cast("int", read(store, names)[1])) == 0
        store.begin(names)
        assert versions.pending_of(cast("int", read(store, names)[1])) == 1

    # --- What a restart brings back ---------------------------------------------------------------

    def test_E5_no_version_survives_a_restart(
        self, private_redis: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Redis loads its snapshot, and a write since would be unseen."""
        monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
        store = RedisBackend({"url": private_redis.url})
        other = RedisBackend({"url": private_redis.url})
        store.store("entry", b"payload")
        [name] = put(store, [version_of(10_000_000, 0, 0, 0)])
        with redis.Redis.from_url(private_redis.url) as client:
            client.save()
        marks = store.begin([name])
        private_redis.kill()
        with pytest.raises(CacheUnavailable):
            store.fetch("entry", [name])
        private_redis.start()
        for each in (store, other):
            assert each.fetch("entry", [name]) == (b"payload", [None])
        store.end(marks)
        assert store.fetch("entry", [name]) == (b"payload", [None])
        store.close()
        other.close()

    def test_a_connection_that_the_server_closed_is_replaced_unseen(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        store.store("entry", b"payload")
        with redis.Redis.from_url(private_redis.url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert store.fetch("entry")[0] == b"payload"
        store.close()

    def test_a_paused_server_costs_a_timeout_and_heals(
        self, private_redis: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = RedisBackend({"url": private_redis.url, "timeout": 0.1})
        store.store("entry", b"payload")
        private_redis.pause()
        with pytest.raises(CacheUnavailable, match="does not answer"):
            store.fetch("entry")
        with pytest.raises(CacheUnavailable, match="left alone"):
            store.fetch("entry")
        private_redis.resume()
        monkeypatch.setattr(store._breaker, "_next_try", 0.0)
        # The late answer to the first question must not be taken for the answer to the second.
        assert store.fetch("other")[0] is None
        assert store.fetch("entry")[0] == b"payload"
        store.close()

    @pytest.mark.parametrize("beginning", [b"$200000\r\n", b"*1\r\n$200000\r\n", b":1\r\n*1\r\n$200000\r\n"])
    def test_a_long_value_without_a_line_end_is_no_answer_without_end(
        self, redis_store_url: str, beginning: bytes
    ) -> None:
        """However it comes in pieces."""
        answer = beginning + bytes(200_000) + b"\r\n"
        replies = 1 + beginning.count(b":")
        for cut in range(1, len(beginning) + 2):
            wire = RedisBackend({"url": redis_store_url})._pool.take()
            wire.open()
            ours, theirs = socket.socketpair()
            with ours, theirs:
                wire._socket = ours
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
                theirs.sendall(answer[:cut])
                sender = threading.Timer(0.01, theirs.sendall, (answer[cut:],))
                sender.start()
                value = wire.converse(batch(*[("GET", "x")] * replies))[-1]
                assert (value[0] if type(value) is list else value) == bytes(200_000)
                sender.join()
                wire.close()

    def test_a_list_longer_than_memory_is_a_fault_of_the_server(self) -> None:
        with FakeServer(b"*4294967295\r\n") as server:
            store = RedisBackend({"url": f"redis://127.0.0.1:{server.port}"})
            with pytest.raises(CacheUnavailable, match="cannot be read"):
                store.fetch("entry", ["tag"])

    # --- A server that answers something else ------------------------------------------------------

    @pytest.mark.parametrize("garbage", [1, b"OK", None, [], [b"1"], [1, 1, 1], [b"x", [], {}]], ids=repr)
    def test_what_nobody_has_asked_for_is_a_fault_of_the_server(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch, garbage: object
    ) -> None:
        store.ping()
        steps: tuple[Callable[[], object], ...] = (
            lambda: store.fetch("entry", ["a", "b"]),
            lambda: store.fetch(None, ["a", "b", "c"]),
            lambda: store.get_serialized_multi(["a", "b", "c", "d"]),
            lambda: store.begin(["a", "b", "c"]),
            lambda: store.settle(["a", "b", "c"], "witness"),
            lambda: store.swap([("a", None, 1), ("b", None, 1)]),
            lambda: store.lost_nothing_for(1),
        )
        for step in steps:
            monkeypatch.setattr(breaker, "COOL_DOWN", 0.0)
            monkeypatch.setattr(store._breaker, "_next_try", 0.0)
            with monkeypatch.context() as patch:
                patch.setattr(resp.Wire, "_read", lambda self: garbage)
                with pytest.raises(CacheUnavailable):
                    step()

    def test_an_uptime_that_is_no_number_is_a_fault_of_the_server(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "querycache.backends.redis._parse_info", lambda reply: {"uptime_in_seconds": "abc", "run_id": "1"}
        )
        with pytest.raises(CacheUnavailable):
            store.lost_nothing_for(1)

    # --- The end of a writer is not waited for ----------------------------------------------------

    def test_the_end_does_not_wait_for_a_server_that_is_slow(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url, "timeout": 10})
        marks = store.begin(["tag"])
        private_redis.pause()
        store.end(marks)  # would take ten seconds, and raise
        private_redis.resume()
        assert versions.pending_of(version_in(store, "tag")) == 0
        store.close()

    def test_the_end_is_repeated_where_the_scripts_were_flushed(
        self, redis_store_url: str, client: redis.Redis
    ) -> None:
        store = RedisBackend({"url": redis_store_url})
        marks = store.begin(["tag"])
        marked = version_in(store, "tag")
        client.script_flush()
        store.end(marks)
        store.ping()  # its reply is read with the next one
        assert version_in(store, "tag") == marked + versions.GENERATION - 1
        store.close()

    def test_a_server_that_knows_no_script_at_all_is_not_told_for_ever(
        self, redis_store_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = RedisBackend({"url": redis_store_url})
        first, second = store.begin(["one"]), store.begin(["two"])
        refused = redis.exceptions.NoScriptError("NOSCRIPT No matching script.")
        with monkeypatch.context() as patch:
            read = resp.Wire._read
            patch.setattr(resp.Wire, "_read", lambda self: (read(self), refused)[1])
            store.end(first)
            store.end(second)
        store.ping()
        store.close()

    def test_an_end_that_is_refused_leaves_the_marks_and_disturbs_nobody(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        marks = store.begin(["tag"])
        with redis.Redis.from_url(private_redis.url) as client:
            client.config_set("maxmemory", 1)
            store.end(marks)
            assert versions.pending_of(version_in(store, "tag")) == 1
        store.close()

    # --- The proof that nothing was lost ----------------------------------------------------------

    def test_a_server_of_ones_own_has_lost_nothing(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        store.store("entry", b"payload")
        store.remove(["entry"])
        store.end(store.begin(["tag"]))
        store.bump(["tag"])
        store.settle(["tag", "other"], "witness")
        assert store.lost_nothing_for(-5)
        assert not store.lost_nothing_for(3_600)
        store.close()

    @pytest.mark.parametrize(
        "command",
        [
            "FLUSHALL",
            "FLUSHDB ASYNC",
            "DEL x",
            "UNLINK x",
            "GETDEL x",
            "RENAME a b",
            "MOVE a 3",
            "SWAPDB 0 1",
            "COPY a b",
            "REPLICAOF NO ONE",
            "CONFIG RESETSTAT",
        ],
    )
    def test_a_server_on_which_somebody_removed_something_may_have_lost_counters(
        self, private_redis: Server, command: str
    ) -> None:
        store = RedisBackend({"url": private_redis.url})
        assert store.lost_nothing_for(-5)
        with redis.Redis.from_url(private_redis.url) as client:
            client.mset({"a": 1, "x": 1})
            client.execute_command(*command.split())
        assert not store.lost_nothing_for(-5)
        store.close()

    def test_a_server_that_evicts_has_lost_counters(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        with redis.Redis.from_url(private_redis.url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 200_000)
        for number in range(100):
            store.store(f"entry {number}", bytes(10_000))
        assert not store.lost_nothing_for(-5)
        store.close()

    def test_a_promoted_replica_has_not_seen_all_marks(
        self, private_server: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        master, replica = private_server("redis"), private_server("redis")
        with redis.Redis.from_url(master.url) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis.from_url(replica.url) as client:
            address = redis.Redis.from_url(master.url).connection_pool.connection_kwargs
            client.execute_command("REPLICAOF", address["host"], address["port"])
            while client.info("replication")["master_link_status"] != "up":
                time.sleep(0.01)
            store = RedisBackend({"url": replica.url})
            assert not store.lost_nothing_for(-5)
            with pytest.raises(CacheUnavailable, match="replica"):
                store.begin(["tag"])
            client.execute_command("REPLICAOF", "NO", "ONE")
            client.config_resetstat()
            monkeypatch.setattr(store._breaker, "_next_try", 0.0)
            assert not store.lost_nothing_for(-5)
        store.close()

    @pytest.mark.parametrize("step", ["begin", "end", "fetch", "settle"])
    def test_connections_to_a_master_that_was_demoted_are_made_anew(
        self, private_server: Callable[[str], Server], tmp_path: Path, step: str
    ) -> None:
        """The address leads to another server now, but what was connected stays connected to this one."""
        old, new = private_server("redis"), private_server("redis")
        target = urlsplit(new.url)
        path = str(tmp_path / "socket")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(path)
            listener.listen()
            place = [urlsplit(old.url)]
            threading.Thread(target=_forward, args=(listener, place), daemon=True).start()
            store = RedisBackend({"url": f"unix://{path}"})
            wires = [store._pool.take() for _ in range(2)]
            for wire in wires:
                wire.open()
                store._pool.give_back(wire)
            marks = store.begin(["tag"])
            store.settle(["settled"], "witness")
            place[0] = target
            with redis.Redis.from_url(old.url) as client:
                client.execute_command("REPLICAOF", target.hostname, target.port)
            with pytest.raises(CacheUnavailable, match="replica"):
                if step == "begin":
                    store.begin(["tag"])
                elif step == "end":
                    store.end(marks)
                    store.ping()
                elif step == "fetch":
                    store.fetch("entry", ["tag"])
                else:
                    store.settle(["settled"], "witness")
            assert all(wire._socket is None for wire in wires)
            store.end(store.begin(["tag"]))
            store.close()

    # --- Refusals and garbage ---------------------------------------------------------------------

    def test_a_full_server_refuses_entries_and_says_so(self, private_redis: Server) -> None:
        store = RedisBackend({"url": private_redis.url})
        with redis.Redis.from_url(private_redis.url) as client:
            client.config_set("maxmemory", 1)
        assert not store.store("entry", b"payload")
        with pytest.raises(CacheUnavailable, match="maxmemory"):
            store.begin(["tag"])
        assert store.fetch("entry", ["tag"]) == (None, [None])
        store.close()

    def test_a_counter_that_is_none_counts_as_missing_and_is_replaced(
        self, store: StoreBackend, client: redis.Redis
    ) -> None:
        for garbage in (
            b"",
            b"0",
            b"-1",
            b"x" * 19,
            b"1" * 18,
            b"1" * 20,
            b"1" * 18 + b".",
            b" " + b"1" * 18,
            b"0" * 19,
            b"9" * 19,
            b"9223372036854775807",
        ):
            [name] = put(store, [versions.fresh()])
            [key] = client.keys(f"{name}@*")
            client.set(key, garbage)
            assert read(store, [name]) == [None]
            store.bump([name])
            store.end({name: store.begin(["any"])["any"]})
            assert client.get(key) == garbage
            client.set(key, garbage)
            assert not versions.is_clean(store.settle([name], "witness")[0])
            client.set(key, garbage)
            assert store.swap([(name, None, versions.fresh())]) == [False]
            store.begin([name])
            assert is_new(read(store, [name])[0], versions.GIVEN_UP + 1)

    def test_a_key_of_another_type_is_replaced_by_the_next_writer(
        self, store: StoreBackend, client: redis.Redis
    ) -> None:
        [name] = put(store, [versions.fresh()])
        [key] = client.keys(f"{name}@*")
        client.delete(key)
        client.lpush(key, "x")
        assert store.fetch("entry", [name]) == (None, [None])
        store.bump([name])
        store.begin([name, "another"])
        assert is_new(read(store, [name])[0], versions.GIVEN_UP + 1)
        client.delete(key)
        client.lpush(key, "x")
        assert store.settle([name], "witness") == read(store, [name]) != [None]

    @pytest.mark.parametrize("without_poll", [False, True])
    def test_a_socket_is_looked_at_without_waiting(
        self, monkeypatch: pytest.MonkeyPatch, without_poll: bool
    ) -> None:
        if without_poll:  # as on Windows
            monkeypatch.delattr(select, "poll")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            has_data = resp._watch(ours)
            assert not has_data()
            theirs.close()
            assert has_data()

    # --- Processes --------------------------------------------------------------------------------

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

    # --- Users, passwords and databases -----------------------------------------------------------

    @pytest.mark.parametrize(
        ("credentials", "database", "message"),
        [
            (":secret", 3, None),
            ("default:secret", 0, None),
            ("me:s%40%2F%20cret", 3, None),
            ("", 0, "Authentication required"),
            ("", 3, "Authentication required"),
            (":wrong", 0, "password: WRONGPASS"),
            ("me:wrong", 3, "password: WRONGPASS"),
            ("nobody@", 0, "password: WRONGPASS"),
            (":secret", 99, "database 99: ERR DB index is out of range"),
            ("no_select:1", 0, None),
            ("no_select:1", 3, "database 3: NOPERM"),
            ("no_info:1", 0, "run id, which this user needs to see: NOPERM"),
        ],
    )
    def test_who_is_let_in_and_to_which_database(
        self, private_redis: Server, credentials: str, database: int, message: str | None
    ) -> None:
        netloc = urlsplit(private_redis.url).netloc
        with redis.Redis.from_url(private_redis.url) as client:
            for rules in (
                ("me", ">s@/ cret"),
                ("no_select", ">1", "-select"),
                ("no_info", ">1", "-info"),
            ):
                name, password, *limits = rules
                client.execute_command("ACL", "SETUSER", name, "on", password, "~*", "&*", "+@all", *limits)
            client.config_set("requirepass", "secret")
            at = "" if not credentials else f"{credentials.removesuffix('@')}@"
            store = RedisBackend({"url": f"redis://{at}{netloc}/{database}"})
            if message is None:
                store.store("entry", b"payload")
                assert store.fetch("entry")[0] == b"payload"
                assert client.execute_command("INFO", "keyspace").keys() == {f"db{database}"}
            else:
                with pytest.raises(CacheUnavailable, match=message):
                    store.ping()
            store.close()
            client.config_set("requirepass", "")

    def test_a_server_without_users_is_told_the_password_alone(self) -> None:
        """As Redis 5 is."""
        told = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in (b"-ERR wrong number of arguments for 'auth' command\r\n", b"+OK\r\n"):
                    told.append(connection.recv(65_536))
                    connection.sendall(answer)
                connection.recv(65_536)
                connection.sendall(b"$8\r\nrun_id:1\r\n" + b"+OK\r\n" * 5)
                connection.recv(65_536)
                connection.sendall(b"+PONG\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, daemon=True).start()
            store = RedisBackend({"url": f"redis://me:secret@127.0.0.1:{listener.getsockname()[1]}"})
            store.ping()
            store.close()
        assert told == [
            b"*3\r\n$4\r\nAUTH\r\n$2\r\nme\r\n$6\r\nsecret\r\n",
            b"*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n",
        ]

    def test_a_password_that_the_server_repeats_shows_in_no_error(self) -> None:
        """Of a command that it does not know Redis repeats the arguments."""
        answer = b"-ERR unknown command 'AUTH', with args beginning with: 'me' 'secret' \r\n"
        with FakeServer(answer) as server:
            store = RedisBackend({"url": f"redis://me:secret@127.0.0.1:{server.port}"})
            with pytest.raises(CacheUnavailable, match="unknown command 'AUTH'") as raised:
                store.ping()
            assert "secret" not in str(raised.value)
            assert "secret" not in str(raised.value.__cause__)

    # --- Configuration ----------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("url", "path"), [("redis://", 0), ("redis:///3", 3), ("rediss://", 0), ("valkey:///", 0)]
    )
    def test_without_a_host_it_is_this_one(self, url: str, path: int) -> None:
        connection = RedisBackend({"url": url})._pool.take()._connection
        assert (connection.host, connection.db) == ("localhost", path)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "cannot use the address None; write redis://host:6379/0"),
            ({"url": "http://host"}, "cannot use the address 'http://host'"),
            ({"url": "redis://host?timeot=1"}, "no option 'timeot'; it takes"),
            ({"url": "redis://host?timeout=0"}, "'0' for option 'timeout'"),
            ({"url": "redis://host?timeout=nan"}, "'nan' for option 'timeout'"),
            ({"url": "redis://host?timeout=1e10"}, "'1e10' for option 'timeout': give a time above zero"),
            ({"url": "redis://host", "timeout": None}, "None for option 'timeout'"),
            ({"url": "redis://host?max_connections=-1"}, "'-1' for option 'max_connections'"),
            ({"url": "redis://host?ssl_cert_reqs=none"}, "needs TLS: write rediss://"),
            ({"url": "redis://host?db=1"}, "redis://host:6379/0"),
            ({"url": "redis://host:port"}, "the port is no number"),
            ({"url": "redis://user:secret@[x"}, "is no URL"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_says_what_would(
        self, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigurationError) as raised:
            RedisBackend(arguments)
        assert message in str(raised.value)
        assert "secret" not in str(raised.value)

    @pytest.mark.parametrize("scheme", ["redis", "valkey"])
    def test_schemes(self, redis_store_url: str, scheme: str) -> None:
        store = RedisBackend({"url": redis_store_url.replace("redis", scheme, 1)})
        store.ping()
        store.close()

    def test_a_unix_socket(self, redis_url: str, tmp_path: Path) -> None:
        parts = urlsplit(redis_url)
        path = str(tmp_path / "socket")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(path)
            listener.listen()
            threading.Thread(target=_forward, args=(listener, [parts]), daemon=True).start()
            for url in (f"unix://{path}", f"unix://{path}?db=0&timeout=2"):
                store = RedisBackend({"url": url})
                store.store("of a socket", b"payload")
                assert store.fetch("of a socket")[0] == b"payload"
                store.close()

    def test_tls_is_spoken_where_asked_for(self) -> None:
        store = RedisBackend({"url": "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=no"})
        assert isinstance(store._pool.take()._connection, redis.SSLConnection)

    def test_a_password_shows_in_no_error(self, redis_store_url: str) -> None:
        store = RedisBackend({"url": redis_store_url.replace("//", "//me:secret@")})
        with pytest.raises(CacheUnavailable) as raised:
            store.ping()
        assert "secret" not in str(raised.value)

    def test_without_the_client_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "redis", None)
        monkeypatch.delitem(sys.modules, "querycache.backends.redis")
        with pytest.raises(ConfigurationError, match=r"pip install querycache\[redis\]"):
            importlib.import_module("querycache.backends.redis")
