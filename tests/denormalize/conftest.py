"""What the tests of denormalized columns share: databases whose tables stay from test to test, emptied for each.

There are many scenarios, and making tables takes longer than running one. So this suite has a database of its own
beside the worker's, and makes the tables of each set of models once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, create_engine, event, make_url
from sqlalchemy.orm import Mapper, Session, registry
from sqlalchemy.pool import NullPool

from tests.denormalize import models

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
    pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
]


@pytest.fixture(scope="package", autouse=True)
def _mappings_are_taken_down() -> Iterator[None]:
    """What these tests map is taken down after them, so that the Sessions of other tests have no listeners."""
    mapped: weakref.WeakSet[registry] = weakref.WeakSet()

    def note(mapper: Mapper[Any], cls: type[Any]) -> None:
        if cls.__module__.startswith("tests.denormalize."):
            mapped.add(mapper.registry)

    event.listen(Mapper, "mapper_configured", note)
    yield
    event.remove(Mapper, "mapper_configured", note)
    for each in list(mapped):
        each.dispose(cascade=True)
    models.forget()
    assert not list(Session().dispatch.before_flush)


@contextmanager
def _database_beside(url: str) -> Iterator[str]:
    name = f"{make_url(url).database}_denorm"
    administration = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administration.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name}")
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with administration.connect() as connection:
            forcibly = " WITH (FORCE)" if connection.dialect.name == "postgresql" else ""
            connection.exec_driver_sql(f"DROP DATABASE {name}{forcibly}")


@pytest.fixture(scope="session")
def kept_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('denormalize') / 'test.db'}")
    event.listen(engine, "connect", _configure_sqlite)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def kept_postgresql(postgresql_url: str) -> Iterator[Engine]:
    with _database_beside(postgresql_url) as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture(scope="session")
def kept_mariadb(mariadb_url: str) -> Iterator[Engine]:
    with _database_beside(mariadb_url) as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine on this suite's database: SQLite, PostgreSQL and MariaDB in turn."""
    found = request.getfixturevalue(f"kept_{request.param}")
    assert isinstance(found, Engine)
    return found


def _configure_sqlite(connection: Any, record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = OFF")


def empty(engine: Engine, metadata: MetaData) -> None:
    """Empty tables, past triggers where the database has a way; generated keys begin at 1000."""
    tables = [table.fullname for table in metadata.tables.values()]
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"TRUNCATE {', '.join(tables)} CASCADE")
            for table in metadata.tables.values():
                key = list(table.primary_key.columns)
                if table.autoincrement_column is not None and not key[0].foreign_keys:
                    connection.exec_driver_sql(
                        f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key[0].name}'), 1000)"
                    )
        else:
            switch = (
                "PRAGMA foreign_keys = {}"
                if engine.dialect.name == "sqlite"
                else "SET FOREIGN_KEY_CHECKS = {}"
            )
            connection.exec_driver_sql(switch.format("OFF"))
            for name in tables:
                connection.exec_driver_sql(f"DELETE FROM {name}")
            connection.commit()
            connection.exec_driver_sql(switch.format("ON"))
        connection.commit()


@pytest.fixture
def opened(engine: Engine) -> Iterator[Callable[..., Session]]:
    """`opened(models)`: a Session over the models' tables, empty, on the current engine."""
    with ExitStack() as stack:

        def open_session(models: SimpleNamespace, **options: Any) -> Session:
            made = models.Base.metadata.info.setdefault("made on", set())
            if engine.url not in made:
                models.Base.metadata.create_all(engine)
                made.add(engine.url)
            empty(engine, models.Base.metadata)
            return stack.enter_context(Session(engine, **options))

        yield open_session
