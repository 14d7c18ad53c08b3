"""The pytest plugin of ``--core``: every engine that SQLAlchemy's tests make is watched for writes.

Nothing is answered from a cache. What their statements do, whatever they are, must be what it is without the library.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.engine.url import URL
from sqlalchemy.pool import Pool

from querycache import QueryCache
from querycache.writes import Writes
from tests.sqlalchemy_suite.run import NOTICED, PROPERTY

_counts: Counter[str] = Counter()
_cache = QueryCache("memory://")
_executing = Writes.executing


def _counted(self: Writes, sql: str, context: Any) -> bool:
    _counts[NOTICED] += 1
    return _executing(self, sql, context)


_make = Engine.__init__


def _init(
    self: Engine,
    pool: Pool,
    dialect: Dialect,
    url: URL,
    logging_name: str | None = None,
    echo: Any = None,
    query_cache_size: int = 500,
    execution_options: Any = None,
    hide_parameters: bool = False,
) -> None:
    # create_engine() looks at the names of these
    _make(self, pool, dialect, url, logging_name, echo, query_cache_size, execution_options, hide_parameters)
    if isinstance(getattr(dialect, "driver", None), str):  # or else it stands in for one
        _cache.attach(self)


def pytest_configure() -> None:
    Engine.__init__ = _init  # type: ignore[method-assign]
    Writes.executing = _counted  # type: ignore[method-assign]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _counts.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.user_properties.append((PROPERTY, json.dumps(_counts)))
