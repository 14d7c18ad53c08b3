"""The concurrency proof in short; `make denormalize-concurrency` is the long one."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from tests.denormalize import models
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
    engine: Engine = request.getfixturevalue(f"{database}_engine")
    url = engine.url.render_as_string(hide_password=False)
    met = run(url, made_by=made_by, isolation=isolation, operations=240, processes=4)
    assert (met["operations"], met["deadlocks"]) == (240, 0)
    assert met["children left"] > 0


@pytest.mark.server("mariadb")
def test_a_recount_sees_what_was_committed_after_the_snapshot(mariadb_engine: Engine) -> None:
    m = models.forum("sql")
    m.Base.registry.configure()
    m.Base.metadata.create_all(mariadb_engine)
    with Session(mariadb_engine) as session:
        comments = [m.Comment(id=n, score=n, message=f"number {n}") for n in (1, 2)]
        session.add(m.Thread(id=1, forum=m.Forum(id=1), comments=comments))
        session.commit()
    with Session(mariadb_engine) as session:
        first = session.scalars(select(m.Comment).order_by(m.Comment.id)).first()
        assert first is not None
        with Session(mariadb_engine) as other:
            other.add(m.Comment(id=3, score=3, thread_id=1, message="number 3"))
            other.commit()
        session.delete(session.get_one(m.Comment, 2))
        session.commit()
        m.check(session)


@pytest.mark.server("postgresql")
def test_triggers_at_repeatable_read(postgresql_engine: Engine) -> None:
    url = postgresql_engine.url.render_as_string(hide_password=False)
    failures = 0
    for _ in range(10):  # two at once are met by chance
        met = run(url, strategy="trigger", isolation="REPEATABLE READ", operations=160, processes=4)
        assert met["operations"] == 160
        failures += met["serialization failures"]
        if failures:
            break
    assert failures > 0
