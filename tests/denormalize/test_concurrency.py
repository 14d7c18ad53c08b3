"""The concurrency proof in short; `make denormalize-concurrency` is the long one."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.denormalize.concurrency import ISOLATIONS, run


@pytest.mark.parametrize("made_by", ["forum", "counters"])
@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    "database",
    [
        pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
        pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
    ],
)
def test_processes_at_once(
    request: pytest.FixtureRequest, database: str, isolation: str, made_by: str
) -> None:
    engine: Engine = request.getfixturevalue(f"kept_{database}")
    url = engine.url.render_as_string(hide_password=False)
    met = run(url, made_by=made_by, isolation=isolation, operations=240, processes=4)
    assert met["operations"] == 240
    assert met["children left"] > 0
    # The documentation says of longer paths on MariaDB that at REPEATABLE READ a transaction may have to be repeated.
    if (database, isolation, made_by) != ("mariadb", "REPEATABLE READ", "forum"):
        assert met["deadlocks"] == 0


@pytest.mark.server("postgresql")
def test_triggers_at_repeatable_read(kept_postgresql: Engine) -> None:
    url = kept_postgresql.url.render_as_string(hide_password=False)
    met = run(url, strategy="trigger", isolation="REPEATABLE READ", operations=160, processes=4)
    assert met["operations"] == 160
    assert met["serialization failures"] > 0
