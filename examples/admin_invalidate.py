"""An admin script: makes answers of a running application invalid, from another process.

Both only need the same store and the same namespace. Here the store is a file, which needs no server;
QUERYCACHE_URL=redis://localhost:6379/0 takes Redis. Run without arguments, the script starts an application of
its own to have something to invalidate.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Product(Base):
    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def make_cache(store: str) -> QueryCache:
    """The same in the application and in the script."""
    # A file promises less than a server about commits of other processes, and the cache says so. Nobody commits here.
    warnings.filterwarnings("ignore", message=".*cannot count atomically", category=RuntimeWarning)
    return QueryCache({"default": store, "reports": {"url": store, "ttl": 3600}}, namespace="shop", lease=1.0)


STATEMENTS: dict[str, Any] = {
    "all users": select(User).execution_options(cache_key="all-users"),
    "first user": select(User).where(User.id == 1).execution_options(cache_key=True),
    "all products": select(Product).execution_options(cache_key=True),
    "report": select(Product.name).execution_options(cache_key=True, cache_region="reports"),
}


def application(database: str, store: str) -> None:
    """Answers all statements for each line of input, and says how."""
    engine = create_engine(database)
    cache = make_cache(store)
    session_factory = sessionmaker(engine)
    cache.attach(session_factory)
    for _ in sys.stdin:
        said = {}
        for name, statement in STATEMENTS.items():
            with session_factory() as session, cache.recording() as events:
                session.execute(statement).all()
            said[name] = events[0].outcome
        print(json.dumps(said), flush=True)


def administer(directory: str) -> None:
    database = f"sqlite:///{directory}/shop.db"
    store = os.environ.get("QUERYCACHE_URL") or f"dogpile+dogpile.cache.dbm://?filename={directory}/cache.dbm"
    engine = create_engine(database)
    Base.metadata.create_all(engine)
    with sessionmaker(engine).begin() as session:
        session.add_all([User(id=1, name="Ann"), Product(id=1, name="pen")])

    command = [sys.executable, __file__, "application", database, store]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None

        def ask() -> dict[str, str]:
            assert running.stdin is not None and running.stdout is not None
            print("ask", file=running.stdin, flush=True)
            outcomes: dict[str, str] = json.loads(running.stdout.readline())
            return outcomes

        while set(ask().values()) != {"hit"}:
            pass  # a store that has just lost everything is used again after the lease

        cache = make_cache(store)
        orders: list[tuple[dict[str, Any], set[str]]] = [
            ({"region": "reports"}, {"report"}),
            ({"tables": ["users"]}, {"all users", "first user"}),
            ({"entities": [Product]}, {"all products", "report"}),
            ({"key": "all-users"}, {"all users"}),
        ]
        for what, invalid in orders:
            cache.invalidate(**what)
            outcomes = ask()
            print(what, *(f"{name}: {said}" for name, said in outcomes.items()), sep="; ")
            assert {name for name, said in outcomes.items() if said != "hit"} == invalid
            assert set(ask().values()) == {"hit"}
        running.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["application"]:
        application(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as directory:
            administer(directory)
