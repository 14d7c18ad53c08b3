"""Check and repair, as functions; test_command_line.py has the command."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.orm import Session, sessionmaker

from querycache.denormalize import AggregateMismatch, Report, repair, verify, verify_at_commit
from querycache.errors import ConfigurationError
from tests.denormalize import models

Open = Callable[..., Session]
UNCHECKED = {"denormalize": "unchecked"}


@pytest.fixture(params=["forum", "composite", "tree", "groups"])
def wrong(request: pytest.FixtureRequest, opened: Open, engine: Engine) -> SimpleNamespace:
    """Rows written past the library, so that nearly every column is wrong."""
    m = getattr(models, request.param)("sql")
    opened(m).close()
    with Session(engine) as session:
        connection = session.connection(execution_options=UNCHECKED)
        if request.param == "forum":
            connection.execute(insert(m.Forum.__table__), [{"id": n} for n in (1, 2)])
            connection.execute(insert(m.User.__table__), [{"id": 1}])
            connection.execute(
                insert(m.Thread.__table__),
                [{"id": n, "forum_id": 1 + n % 2, "open": True} for n in range(1, 30)],
            )
            connection.execute(
                insert(m.Comment.__table__),
                [
                    {
                        "thread_id": 1 + n % 25,
                        "author_id": 1,
                        "score": n % 7,
                        "message": "a b",
                        "deleted": n % 3 == 0,
                    }
                    for n in range(80)
                ],
            )
        elif request.param == "composite":
            connection.execute(
                insert(m.Order.__table__), [{"shop": "ab"[n % 2], "number": n // 2} for n in range(20)]
            )
            connection.execute(
                insert(m.Line.__table__),
                [{"id": n, "part": 1, "shop": "ab"[n % 2], "number": n % 9, "amount": n} for n in range(30)],
            )
        elif request.param == "tree":
            connection.execute(
                insert(m.Node.__table__),
                [{"id": n, "weight": n, "parent_id": n // 3 or None} for n in range(1, 40)],
            )
        else:
            connection.execute(insert(m.Group.__table__), [{"id": n} for n in range(1, 5)])
            connection.execute(
                insert(m.Member.__table__), [{"id": n, "age": n, "active": n % 2 == 0} for n in range(1, 9)]
            )
            connection.execute(
                insert(m.membership), [{"group_id": 1 + n % 3, "member_id": n} for n in range(1, 9)]
            )
        session.commit()
    return SimpleNamespace(m=m, engine=engine)


def test_verify_finds_and_repair_mends(wrong: SimpleNamespace) -> None:
    engine, base = wrong.engine, wrong.m.Base
    before = verify(engine, base, batch=7)
    assert before.wrong == len(before.differences) > 5
    assert before.repaired == 0
    assert verify(engine, base).wrong == before.wrong, "verify() only reads"
    mended = repair(engine, base, batch=7)
    assert mended.wrong == mended.repaired == before.wrong
    assert verify(engine, base).right
    with Session(engine) as session:
        wrong.m.check(session)
    assert repair(engine, base).repaired == 0


@pytest.fixture
def shop(opened: Open, engine: Engine) -> SimpleNamespace:
    m = models.counters("sql")
    session = opened(m)
    session.add(m.Forum(id=1))
    session.add_all([m.Thread(id=n, forum_id=1, comments=[m.Comment(score=n)]) for n in range(1, 11)])
    session.commit()
    session.close()
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {m.Thread.__tablename__} SET comment_count = 5 WHERE id > 3")
    return SimpleNamespace(m=m, engine=engine)


def test_differences_say_what_is_wrong(shop: SimpleNamespace) -> None:
    report = verify(shop.engine, shop.m.Thread.comment_count)
    assert report.wrong == 7
    assert str(report.differences[0]) == "Thread.comment_count of 4: stored 5, should be 1"
    assert report.checked == {"Thread": 10}


def test_sample(shop: SimpleNamespace) -> None:
    report = verify(shop.engine, shop.m.Thread, sample=4, batch=3)
    assert report.checked == {"Thread": 4}
    assert verify(shop.engine, shop.m.Thread, sample=400).checked == {"Thread": 10}


def test_progress_and_resuming(shop: SimpleNamespace) -> None:
    class Interrupted(Exception):
        pass

    seen: list[tuple[str, int, int, int]] = []

    def progress(entity: str, done: int, total: int, report: Report) -> None:
        assert report.last == {entity: (done,)}
        seen.append((entity, done, total, report.wrong))
        if len(seen) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        repair(shop.engine, shop.m.Thread, batch=3, progress=progress)
    assert seen == [("Thread", 3, 10, 0), ("Thread", 6, 10, 3)]
    rest = repair(shop.engine, shop.m.Thread, batch=3, after={"Thread": (6,)})
    assert (rest.repaired, rest.checked, rest.last) == (4, {"Thread": 4}, {"Thread": (10,)})
    assert verify(shop.engine, shop.m.Base).right


def test_a_session_checks_its_own_transaction(shop: SimpleNamespace) -> None:
    repair(shop.engine, shop.m.Base)
    with Session(shop.engine) as session:
        session.add(shop.m.Comment(thread_id=1))
        assert verify(session, shop.m.Base).right
        session.rollback()


def test_test_mode_refuses_the_commit(shop: SimpleNamespace) -> None:
    repair(shop.engine, shop.m.Base)
    factory = sessionmaker(shop.engine)
    stop = verify_at_commit(factory, shop.m.Base)
    with factory() as session:
        session.add(shop.m.Comment(thread_id=1, score=1))
        session.commit()
        session.connection().exec_driver_sql(
            f"UPDATE {shop.m.Thread.__tablename__} SET comment_count = 9 WHERE id = 1"
        )
        with pytest.raises(AggregateMismatch, match=r"Thread\.comment_count of 1: stored 9, should be 2"):
            session.commit()
    stop()
    with factory() as session:
        session.connection().exec_driver_sql(
            f"UPDATE {shop.m.Thread.__tablename__} SET comment_count = 9 WHERE id = 1"
        )
        session.commit()


@pytest.mark.parametrize("argument", ["batch", "sample"])
def test_numbers_must_be_positive(shop: SimpleNamespace, argument: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument} must be at least 1, got 0"):
        verify(shop.engine, shop.m.Base, **{argument: 0})
