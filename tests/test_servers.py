"""The harness itself: servers that are private, that die and come back, and fixtures that are clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pymemcache.client.base import Client as MemcachedClient
from pymemcache.exceptions import MemcacheUnexpectedCloseError
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from tests.server_kinds import KINDS
from tests.servers import Server

ROOT = Path(__file__).parent.parent

PrivateServer = Callable[[str], Server]


def test_redis_killed_paused_and_restarted(private_server: PrivateServer) -> None:
    server = private_server("redis")
    client = Redis.from_url(server.url, socket_timeout=0.2, retry=None)
    client.set("a", 1)

    server.pause()
    with pytest.raises(RedisTimeoutError):
        client.get("a")
    server.resume()
    assert client.get("a") == b"1"

    server.kill()
    with pytest.raises(RedisConnectionError):
        client.get("a")
    server.restart()
    assert client.get("a") is None, "same port, nothing in it"
    client.close()


def test_memcached_killed_paused_and_restarted(private_server: PrivateServer) -> None:
    server = private_server("memcached")
    parts = urlsplit(server.url)
    client = MemcachedClient((parts.hostname, parts.port), timeout=0.2)
    client.set("a", b"1", noreply=False)

    server.pause()
    with pytest.raises(TimeoutError):
        client.get("a")
    server.resume()
    assert client.get("a") == b"1"

    server.kill()
    with pytest.raises((OSError, MemcacheUnexpectedCloseError)):
        client.get("a")
    server.restart()
    assert client.get("a") is None, "same port, nothing in it"
    client.close()


@pytest.mark.parametrize("name", ["postgresql", "mariadb"])
def test_database_killed_paused_and_restarted(name: str, private_server: PrivateServer) -> None:
    server = private_server(name)
    engine = create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        connection.execute(text("INSERT INTO t VALUES (1)"))

    with engine.connect() as connection, ThreadPoolExecutor(1) as thread:
        # The process that serves this connection is frozen too, not only the one that accepts new ones.
        server.pause()
        answer = thread.submit(connection.scalar, text("SELECT id FROM t"))
        assert wait([answer], timeout=0.3).not_done
        server.resume()
        assert answer.result() == 1
        server.kill()
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT id FROM t"))

    server.restart()
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT id FROM t")).all() == [1], "what was committed is still there"
    engine.dispose()


def _environment(**changes: str) -> dict[str, str]:
    """The environment without servers, required or given."""
    names = {kind.variable for kind in KINDS.values()} | {"QUERYCACHE_REQUIRE_SERVERS"}
    names |= {name for name in os.environ if name.startswith("PYTEST_")}
    return {name: value for name, value in os.environ.items() if name not in names} | changes


def _given(*names: str) -> dict[str, str]:
    return {KINDS[name].variable: "somewhere" for name in names}


def _runner(*command: str) -> list[str]:
    return [sys.executable, "-m", "tests.servers", "--no-fsync", "--", *command]


def test_the_command_gets_the_urls_and_gives_its_exit_code() -> None:
    code = "import os, sys; print(os.environ['QUERYCACHE_TEST_REDIS']); sys.exit(7)"
    done = subprocess.run(
        _runner(sys.executable, "-c", code),
        env=_environment(**_given("memcached", "postgresql", "mariadb")),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("redis://127.0.0.1:"), done.stderr
    assert done.returncode == 7


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = "import os, time; print(os.environ['QUERYCACHE_TEST_REDIS'], flush=True); time.sleep(600)"
    process = subprocess.Popen(
        _runner(sys.executable, "-c", code),
        env=_environment(TMPDIR=_open_to_others(tmp_path), **_given("memcached", "postgresql", "mariadb")),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def _open_to_others(path: Path) -> str:
    # A server that runs as another user must get through the directories above its own.
    for folder in [path, *path.parents]:
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o111)
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_the_run(
    number: signal.Signals, runner: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert runner.stdout is not None
    client = Redis.from_url(runner.stdout.readline().strip(), retry=None)
    assert client.ping()
    assert list(tmp_path.glob("querycache-servers-*"))
    runner.send_signal(number)
    runner.wait()
    with pytest.raises(RedisConnectionError):
        while client.ping():
            time.sleep(0.05)
    while list(tmp_path.glob("querycache-servers-*")):
        time.sleep(0.05)
    client.close()


def test_a_missing_server_is_named_with_the_remedy() -> None:
    command = _runner(sys.executable, "-c", "print('ran')")
    environment = _environment(PATH="/nowhere", **_given("memcached", "postgresql", "mariadb"))

    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "MISSING, ITS TESTS WILL BE SKIPPED: no redis server" in done.stderr

    environment["QUERYCACHE_REQUIRE_SERVERS"] = "1"
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    for words in (
        "redis",
        "programs redis-server",
        "docker compose",
        "apt-get",
        "Remedy: install the package",
    ):
        assert words in done.stderr


@pytest.mark.parametrize(("required", "outcome"), [("0", "2 skipped"), ("1", "2 errors")])
def test_skips_for_want_of_a_server_are_said_loudly(required: str, outcome: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", __file__, "-k", "clean_redis"],
        env=_environment(PATH="/nowhere", QUERYCACHE_REQUIRE_SERVERS=required),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout, done.stdout
    if required == "0":
        assert "MISSING SERVERS" in done.stdout
        assert "redis: 2 tests were SKIPPED without it" in done.stdout
    else:
        assert "no redis server for the tests" in done.stdout


# Each of these runs twice: what the first leaves behind, the second must not see.


@pytest.mark.parametrize("turn", [1, 2])
def test_clean_redis(turn: int, redis_store_url: str) -> None:
    with Redis.from_url(redis_store_url) as client:
        assert client.dbsize() == 0
        client.set("left", turn)


@pytest.mark.parametrize("turn", [1, 2])
def test_clean_memcached(turn: int, memcached_store_url: str) -> None:
    parts = urlsplit(memcached_store_url)
    client = MemcachedClient((parts.hostname, parts.port))
    assert client.get("left") is None
    client.set("left", str(turn), noreply=False)
    client.close()


@pytest.mark.parametrize("turn", [1, 2])
def test_clean_database(turn: int, engine: Engine) -> None:
    assert inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
    # Forgotten, with a lock on the table.
    connection = engine.connect()
    connection.execute(text("INSERT INTO t VALUES (1)"))
    connection.detach()
    _FORGOTTEN.append(connection)


_FORGOTTEN: list[Connection] = []
