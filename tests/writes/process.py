"""A process that reads the library of :mod:`tests.writes.library` from elsewhere, through the same store.

``python -m tests.writes.process DATABASE STORE ARGUMENTS``: one JSON list of names of readers a line on standard input; one
JSON list a line on standard output, with the answers, and with the names of those that the cache has not answered alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from querycache import QueryCache
from tests.writes.library import READERS, configure_sqlite, read_and_tell

__all__ = ["OtherProcess"]


class OtherProcess:
    """A process that has lived for long, with the same database and the same store."""

    def __init__(self, database: str, store: str, **arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.writes.process", database, store, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, names: Iterable[str] = READERS) -> tuple[dict[str, object], list[str]]:
        """What :func:`read_and_tell` gives there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(list(names)) + "\n")
        self._process.stdin.flush()
        answers, others = json.loads(self._process.stdout.readline())
        return answers, others

    @classmethod
    @contextlib.contextmanager
    def running(cls, database: str, store: str, **arguments: object) -> Iterator[OtherProcess]:
        process = cls(database, store, **arguments)
        try:
            yield process
        finally:
            assert process._process.stdin is not None and process._process.stdout is not None
            process._process.stdin.close()
            process._process.wait(10)
            process._process.stdout.close()


def _serve(database: str, store: str, arguments: str) -> None:
    engine = configure_sqlite(create_engine(database))
    cache = QueryCache(store, **json.loads(arguments))
    factory = sessionmaker(engine)
    cache.attach(factory)
    for line in sys.stdin:
        with factory() as session:
            print(json.dumps(read_and_tell(session, cache, json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
