"""The fixtures of the test suite: servers, clean stores and clean databases, one of each for every worker.

A test asks for what it uses, and gets it empty:

- `engine`: an SQLAlchemy engine, once for each of SQLite, PostgreSQL and MariaDB; `sqlite_engine`,
  `postgresql_engine` and `mariadb_engine` are these alone;
- `redis_store_url`, `memcached_store_url`: URLs of stores without entries;
- `redis_url`, `memcached_url`, `postgresql_url`, `mariadb_url`: the same servers, with whatever is in them;
- `private_server`: starts a server of the test's own, to be killed, paused and restarted.

Workers do not meet: each has its own databases, its own Redis database number and its own memcached. A test
that uses what has no such borders (FLUSHALL, CONFIG SET, CLIENT KILL …) takes a private server. The servers
are those that `python -m tests.servers` (`make test`) put into the environment, or are started here when
first asked for.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import settings
from pymemcache.client.base import Client as MemcachedClient
from redis import Redis
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.servers import Server, ServerMissing, given_url, obtain, servers_required

# Where CI says that it is CI, the same examples each time; elsewhere others.
settings.register_profile(
    "ci", deadline=None, max_examples=60, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("long", deadline=None, max_examples=2_000, print_blob=True)
# The command line's --hypothesis-profile comes after this and wins.
settings.load_profile("ci")

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
WORKER_NUMBER = int(WORKER.removeprefix("gw"))
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid():x}")[:8]
DATABASE = f"querycache_{RUN}_{WORKER}"
SKIPPED_FOR = "no server, so not tested: "

_SERVER_OF_FIXTURE = {
    "redis_url": "redis",
    "memcached_url": "memcached",
    "postgresql_url": "postgresql",
    "mariadb_url": "mariadb",
}


# --- Servers --------------------------------------------------------------------------------------


def _obtain(name: str) -> Server:
    try:
        return obtain(name, durable=False)
    except ServerMissing as missing:
        if servers_required():
            pytest.fail(f"QUERYCACHE_REQUIRE_SERVERS is set, but there is {missing}", pytrace=False)
        pytest.skip(f"{SKIPPED_FOR}{name}")


@contextlib.contextmanager
def _server_url(name: str, *, shared: bool = True) -> Iterator[str]:
    if shared and (url := given_url(name)) is not None:
        yield url
        return
    with _obtain(name) as server:
        yield server.url


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """For tests that collect garbage again and again: what others have left in the process is not looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of this worker's Redis database."""
    with _server_url("redis") as url:
        parts = urlsplit(url)
        number = int(parts.path.strip("/") or 0) + WORKER_NUMBER
        yield parts._replace(path=f"/{number}").geturl()


@pytest.fixture
def redis_store_url(redis_url: str) -> str:
    """URL of this worker's Redis database, which is empty."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
    return redis_url


@pytest.fixture(scope="session")
def memcached_url() -> Iterator[str]:
    """URL of this worker's memcached. It knows no databases, so only one worker can have the shared one."""
    with _server_url("memcached", shared=WORKER_NUMBER == 0) as url:
        yield url


@pytest.fixture
def memcached_store_url(memcached_url: str) -> str:
    """URL of this worker's memcached, which is empty."""
    parts = urlsplit(memcached_url)
    with contextlib.closing(MemcachedClient((parts.hostname, parts.port), timeout=10)) as client:
        client.flush_all(noreply=False)
    return memcached_url


@pytest.fixture
def private_server() -> Iterator[Callable[[str], Server]]:
    """Starts servers of the test's own: `private_server("redis")` → a running `tests.servers.Server`."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(_obtain(name))


# --- Databases ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _administration(url: URL | str) -> Iterator[Connection]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


def _hang_up_others(connection: Connection) -> None:
    """End connections that a test forgot: their locks would block what follows."""
    if connection.dialect.name == "postgresql":
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(text(f"{others} AND pid <> pg_backend_pid()"), {"name": DATABASE})
    else:
        others = "SELECT id FROM information_schema.processlist WHERE db = :name AND id <> connection_id()"
        for number in connection.scalars(text(others), {"name": DATABASE}).all():
            # It may have ended by itself meanwhile.
            with contextlib.suppress(DBAPIError):
                connection.exec_driver_sql(f"KILL {number}")


@contextlib.contextmanager
def _worker_database(server_url: str) -> Iterator[str]:
    with _administration(server_url) as connection:
        connection.execute(text(f"CREATE DATABASE {DATABASE}"))
    try:
        yield make_url(server_url).set(database=DATABASE).render_as_string(hide_password=False)
    finally:
        with _administration(server_url) as connection:
            _hang_up_others(connection)
            connection.execute(text(f"DROP DATABASE {DATABASE}"))


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """SQLAlchemy URL (psycopg) of this worker's PostgreSQL database."""
    with _server_url("postgresql") as server_url, _worker_database(server_url) as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """SQLAlchemy URL (PyMySQL) of this worker's MariaDB database."""
    with _server_url("mariadb") as server_url, _worker_database(server_url) as url:
        yield url


@contextlib.contextmanager
def _disposed(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine on an empty SQLite file that enforces foreign keys, as the other databases do."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = OFF")

    with _disposed(engine):
        yield engine


@pytest.fixture
def postgresql_engine(postgresql_url: str) -> Iterator[Engine]:
    """An engine on this worker's PostgreSQL database, which has nothing but an empty `public` schema."""
    with _administration(postgresql_url) as connection:
        _hang_up_others(connection)
        names = "SELECT nspname FROM pg_namespace WHERE nspname <> 'information_schema'"
        schemas = connection.scalars(text(f"{names} AND nspname NOT LIKE 'pg\\_%'")).all()
        for schema in schemas:
            connection.exec_driver_sql(f'DROP SCHEMA "{schema}" CASCADE')
        connection.execute(text("CREATE SCHEMA public"))
    with _disposed(create_engine(postgresql_url)) as engine:
        yield engine


@pytest.fixture
def mariadb_engine(mariadb_url: str) -> Iterator[Engine]:
    """An engine on this worker's MariaDB database, which is empty."""
    with _administration(mariadb_url) as connection:
        _hang_up_others(connection)
        connection.exec_driver_sql(f"DROP DATABASE {DATABASE}")
        connection.exec_driver_sql(f"CREATE DATABASE {DATABASE}")
    with _disposed(create_engine(mariadb_url)) as engine:
        yield engine


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
        pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
    ]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine on an empty database: SQLite, PostgreSQL and MariaDB in turn."""
    found = request.getfixturevalue(f"{request.param}_engine")
    assert isinstance(found, Engine)
    return found


# --- The run --------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server, so that `-m "not server"` leaves it out."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _SERVER_OF_FIXTURE:
                item.add_marker(pytest.mark.server(_SERVER_OF_FIXTURE[fixture]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly which servers were missing: a skip must not look like a pass."""
    missing: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple) and SKIPPED_FOR in report.longrepr[2]:
            missing[report.longrepr[2].rpartition(SKIPPED_FOR)[2]] += 1
    if missing:
        terminalreporter.section("MISSING SERVERS", sep="!", red=True, bold=True)
        for name, count in sorted(missing.items()):
            terminalreporter.line(f"{name}: {count} tests were SKIPPED without it", red=True, bold=True)
        terminalreporter.line("Run `make test`, or set QUERYCACHE_REQUIRE_SERVERS=1 to make this an error.")
