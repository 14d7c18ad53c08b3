"""The concurrency proof in short; `make denormalize-concurrency` is the long one."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.denormalize.concurrency import ISOLATIONS, run


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    "database",
    [
        pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
        pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
    ],
)
def test_processes_at_once(request: pytest.FixtureRequest, database: str, isolation: str) -> None:
    engine: Engine = request.getfixturevalue(f"kept_{database}")
    url = engine.url.render_as_string(hide_password=False)
    met = run(url, isolation=isolation, operations=240, processes=4)
    assert (met["operations"], met["deadlocks"]) == (240, 0)
    assert met["children left"] > 0


@pytest.mark.server("postgresql")
def test_triggers_at_repeatable_read(kept_postgresql: Engine) -> None:
    url = kept_postgresql.url.render_as_string(hide_password=False)
    met = run(url, strategy="trigger", isolation="REPEATABLE READ", operations=160, processes=4)
    assert met["operations"] == 160
    assert met["serialization failures"] > 0
