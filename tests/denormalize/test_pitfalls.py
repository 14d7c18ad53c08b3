"""A test for every line of section F of the pitfalls: the ways in which columns kept by hand go wrong."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import (
    Connection,
    Engine,
    ForeignKey,
    Numeric,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from querycache.denormalize import (
    ReadOnlyAggregate,
    UncoveredChange,
    avg_of,
    min_of,
    python,
    repair,
    sum_of,
    verify,
)
from querycache.errors import ConfigurationError
from tests.denormalize import models

Open = Callable[..., Session]
SERVERS = [
    pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
    pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
]


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """The SQL that the engine runs meanwhile, one entry for each set of parameters."""
    seen: list[str] = []

    def record(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        seen.extend([statement] * (len(parameters) if many else 1))

    event.listen(engine, "before_cursor_execute", record)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", record)


def at_once(*parts: Callable[[threading.Barrier], None]) -> None:
    """Run the parts in threads that can wait for one another; raise what one raises."""
    barrier = threading.Barrier(len(parts), timeout=30)
    failures: list[BaseException] = []

    def run(part: Callable[[threading.Barrier], None]) -> None:
        try:
            part(barrier)
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def shop(request: pytest.FixtureRequest, opened: Open, engine: Engine) -> SimpleNamespace:
    """Two threads with children, committed, over strategy "sql" unless the test says another."""
    m = models.counters(getattr(request, "param", "sql"))
    session = opened(m)
    session.add_all([m.Forum(id=1), m.Forum(id=2), m.Thread(id=1, forum_id=1), m.Thread(id=2, forum_id=2)])
    session.flush()
    session.add_all([m.Comment(id=n, thread_id=1, score=n) for n in range(1, 6)])
    session.commit()
    return SimpleNamespace(m=m, session=session, engine=engine)


def checked(shop: SimpleNamespace) -> None:
    with Session(shop.engine) as session:
        shop.m.check(session)


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
class TestTwoTransactions:
    def test_F1_concurrent_inserts_add_up(self, shop: SimpleNamespace) -> None:
        def insert_one(barrier: threading.Barrier) -> None:
            with Session(shop.engine) as session:
                session.add(shop.m.Comment(thread_id=1, score=1))
                barrier.wait()
                session.commit()

        at_once(*[insert_one] * 4)
        checked(shop)

    def test_F1_counting_and_writing_in_one_statement_is_what_loses_updates(
        self, shop: SimpleNamespace
    ) -> None:
        """The naive way, in SQL: it must fail here, or the test above proves nothing."""
        if shop.engine.dialect.name != "postgresql":
            return  # MariaDB's locking reads save the naive way from this interleaving
        comment, thread = shop.m.Comment.__table__, shop.m.Thread.__table__
        counted = select(func.count()).where(comment.c.thread_id == thread.c.id).scalar_subquery()
        naive = update(thread).where(thread.c.id == 1).values(comment_count=counted)
        unchecked = {"denormalize": "own"}
        with shop.engine.connect() as one, shop.engine.connect() as two:
            row = {"thread_id": 1, "deleted": False}
            one.execute(insert(comment), row, execution_options=unchecked)
            one.execute(naive, execution_options=unchecked)
            two.execute(insert(comment), row, execution_options=unchecked)
            waiting = threading.Thread(target=lambda: two.execute(naive, execution_options=unchecked))
            waiting.start()
            _wait_for_lock(shop.engine)
            one.commit()
            waiting.join()
            two.commit()
        with pytest.raises(AssertionError):
            checked(shop)

    @pytest.mark.parametrize("shop", ["recount"], indirect=True)
    def test_F1_recount_locks_the_parent_before_it_counts(self, shop: SimpleNamespace) -> None:
        self.test_F1_concurrent_inserts_add_up(shop)

    @pytest.mark.parametrize("strategy", ["sql", "recount"])
    def test_F1_the_second_writer_adds_to_what_the_first_has_left(self, opened: Open, strategy: str) -> None:
        """One step below the parent, where no other lock has held the second one up before its UPDATE."""
        m = models.orphans(strategy)
        session = opened(m)
        session.add(m.Parent(id=1, children=[m.Child()]))
        session.commit()
        session.add(m.Child(parent_id=1))
        session.flush()
        commit_while_it_waits(session, lambda other: other.add(m.Child(parent_id=1)))
        assert session.get_one(m.Parent, 1).n == 3

    def test_F2_two_sessions_delete_one_row(self, shop: SimpleNamespace) -> None:
        def delete_one(barrier: threading.Barrier) -> None:
            with Session(shop.engine) as session:
                session.delete(session.get_one(shop.m.Comment, 3))
                barrier.wait()
                session.commit()

        with pytest.warns(match="expected to delete 1 row"):
            at_once(delete_one, delete_one)
        checked(shop)

    def test_F2_two_sessions_change_one_value(self, shop: SimpleNamespace) -> None:
        def change_to(score: int) -> Callable[[threading.Barrier], None]:
            def change(barrier: threading.Barrier) -> None:
                with Session(shop.engine) as session:
                    session.get_one(shop.m.Comment, 5).score = score
                    barrier.wait()
                    session.commit()

            return change

        at_once(change_to(7), change_to(8))
        checked(shop)

    def test_F3_children_of_one_parent_and_parents_in_any_order(self, shop: SimpleNamespace) -> None:
        def both(first: int, second: int) -> Callable[[threading.Barrier], None]:
            def work(barrier: threading.Barrier) -> None:
                for _ in range(10):
                    with Session(shop.engine) as session:
                        session.add(shop.m.Comment(thread_id=first, score=1))
                        session.add(shop.m.Comment(thread_id=second, score=1))
                        barrier.wait()
                        session.commit()

            return work

        at_once(both(1, 2), both(2, 1))
        checked(shop)

    def test_F3_the_lock_is_the_one_that_foreign_key_checks_pass(self, shop: SimpleNamespace) -> None:
        with statements(shop.engine) as seen:
            shop.session.get_one(shop.m.Comment, 1).thread_id = 2
            shop.session.commit()
        locks = [statement for statement in seen if "FOR " in statement and "UPDATE" in statement]
        wanted = "FOR NO KEY UPDATE" if shop.engine.dialect.name == "postgresql" else "FOR UPDATE"
        assert locks and all(wanted in statement for statement in locks if statement.startswith("SELECT"))
        first_write = next(i for i, statement in enumerate(seen) if statement.startswith("UPDATE"))
        assert all(seen.index(statement) < first_write for statement in locks)

    @pytest.mark.parametrize("strategy", ["sql", "recount"])
    def test_F3_parents_are_written_in_the_order_of_their_keys(self, opened: Open, strategy: str) -> None:
        m = models.orphans(strategy)
        session = opened(m)
        session.add_all([m.Parent(id=n) for n in range(1, 13)])
        session.commit()
        written: list[int] = []
        locked: list[int] = []

        def record(
            connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
        ) -> None:
            if statement.startswith(f"UPDATE {m.Parent.__tablename__}"):
                written.extend(each["denormalize_key_0"] for each in context.compiled_parameters)
            elif "FOR " in statement:
                assert "ORDER BY" in statement
                given = context.compiled_parameters[0]
                locked.extend(value for name, value in given.items() if name.startswith("keys_"))

        session.add_all([m.Child(parent_id=n) for n in (7, 3, 12, 1, 9, 2, 11, 5, 10, 4, 8, 6)])
        event.listen(session.connection(), "before_cursor_execute", record)
        session.flush()
        assert written == list(range(1, 13))
        assert locked in ([], written)

    def test_F6_the_middle_does_not_move_while_a_child_changes(self, shop: SimpleNamespace) -> None:
        m = shop.m
        shop.session.get_one(m.Comment, 5).score = 100
        shop.session.flush()

        def move(other: Session) -> None:
            other.get_one(m.Thread, 1).forum_id = 2

        commit_while_it_waits(shop.session, move)
        checked(shop)

    def test_F6_moves_of_the_middle_while_children_come_in(self, shop: SimpleNamespace) -> None:
        def move(barrier: threading.Barrier) -> None:
            for turn in range(10):
                with Session(shop.engine) as session:
                    session.get_one(shop.m.Thread, 1).forum_id = 1 + (turn + 1) % 2
                    barrier.wait()
                    session.commit()

        def add(barrier: threading.Barrier) -> None:
            for _ in range(10):
                with Session(shop.engine) as session:
                    session.add(shop.m.Comment(thread_id=1, score=3))
                    barrier.wait()
                    session.commit()

        at_once(move, add)
        checked(shop)

    def test_F11_repair_beside_writers(self, shop: SimpleNamespace) -> None:
        break_columns(shop)
        stop = threading.Event()

        def write(barrier: threading.Barrier) -> None:
            barrier.wait()
            while not stop.is_set():
                with Session(shop.engine) as session:
                    session.add(shop.m.Comment(thread_id=1, score=2))
                    session.commit()

        def mend(barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                for _ in range(5):
                    repair(shop.engine, shop.m.Base, batch=1)
            finally:
                stop.set()

        at_once(write, write, mend)
        checked(shop)


def _wait_for_lock(engine: Engine, meanwhile: threading.Thread | None = None) -> None:
    """Until somebody waits for a lock, or the thread that might has ended."""
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    pause = 0.002
    if engine.dialect.name != "postgresql":
        waiting = text("SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
        pause = 0.15  # what is asked again within 0.1 s is answered as before
    for _ in range(int(20 / pause)):
        with engine.connect() as connection:
            if connection.scalar(waiting) or (meanwhile is not None and not meanwhile.is_alive()):
                return
        time.sleep(pause)
    raise AssertionError("nobody waits for a lock")


def commit_while_it_waits(session: Session, other: Callable[[Session], None]) -> None:
    """`session` has flushed; `other` works in another one meanwhile, and may come through only after this one's commit."""
    engine = session.connection().engine
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Session(engine) as beside:
                other(beside)
                beside.commit()
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    _wait_for_lock(engine, thread)
    session.commit()
    thread.join()
    if failures:
        raise failures[0]


def break_columns(shop: SimpleNamespace) -> None:
    with shop.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {shop.m.Thread.__tablename__} SET comment_count = 77")


@pytest.fixture
def memory() -> Iterator[SimpleNamespace]:
    m = models.forum("memory")
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield SimpleNamespace(m=m, session=session, engine=engine)


class TestAttributeEvents:
    def test_F4_transient_parents_and_keyword_arguments_in_either_order(
        self, memory: SimpleNamespace
    ) -> None:
        m = memory.m
        thread = m.Thread()
        m.Comment(thread=thread, message="one two", score=3)
        m.Comment(score=4, message="three", thread=thread)
        thread.comments.append(m.Comment(message="four five"))
        assert (thread.comment_count, thread.word_count, thread.score_sum) == (3, 5, 7)

    def test_F5_one_change_is_counted_once_from_either_side(self, memory: SimpleNamespace) -> None:
        m, session = memory.m, memory.session
        one, two = m.Thread(), m.Thread()
        comment = m.Comment(message="a b")
        one.comments.append(comment)
        comment.thread = one
        assert (one.comment_count, two.comment_count) == (
            1,
            None,
        )  # defaults come with the flush, as everywhere
        two.comments.append(comment)
        assert (one.comment_count, two.comment_count) == (0, 1)
        session.add_all([one, two])
        session.flush()
        assert (one.comment_count, two.comment_count) == (0, 1)
        m.check(session)
        session.commit()
        m.check(session)

    def test_F5_without_sql(self, memory: SimpleNamespace) -> None:
        m, session = memory.m, memory.session
        thread = m.Thread(comments=[m.Comment(message="a")])
        session.add(thread)
        session.flush()
        with statements(memory.engine) as seen:
            thread.comments[0].message = "a b c"
            thread.comments.append(m.Comment(message="d"))
            assert thread.word_count == 4
        assert seen == []


def test_F6_an_expired_child_moves_under_asyncio(tmp_path: Any) -> None:
    asyncio.run(_an_expired_child_moves(tmp_path))


async def _an_expired_child_moves(tmp_path: Any) -> None:
    m = models.forum("sql")
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'async.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(m.Base.metadata.create_all)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        one, two = m.Thread(id=1), m.Thread(id=2)
        comment = m.Comment(id=1, thread=one, score=3)
        session.add_all([one, two, comment])
        await session.commit()
        # Attributes are there without another await, which expire_on_commit=False promises.
        assert (one.comment_count, two.comment_count) == (1, 0)
        session.expire(comment)
        comment.thread_id = 2
        await session.commit()
        assert (one.comment_count, two.comment_count) == (0, 1)
        await session.execute(update(m.Comment).values(score=8))
        assert (one.score_sum, two.score_sum) == (0, 8)
        await session.delete(comment)
        await session.commit()
        await session.run_sync(m.check)
        assert two.comment_count == 0
    await engine.dispose()


@pytest.mark.parametrize("strategy", models.STRATEGIES)
def test_values_that_a_savepoint_takes_back_need_no_read_under_asyncio(strategy: str, tmp_path: Any) -> None:
    asyncio.run(_a_savepoint_is_rolled_back(strategy, tmp_path))


async def _a_savepoint_is_rolled_back(strategy: str, tmp_path: Any) -> None:
    m = models.counters(strategy)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'savepoint.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(m.Base.metadata.create_all)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        thread = m.Thread(id=1, forum=m.Forum(id=1))
        session.add_all([thread, m.Comment(id=1, thread=thread, score=3)])
        await session.commit()
        await session.refresh(thread)
        for how in ("objects", "bulk statement"):
            savepoint = await session.begin_nested()
            if how == "objects":
                session.add(m.Comment(thread_id=1, score=4))
                await session.flush()
                assert (thread.comment_count, thread.score_sum) == (2, 7)
            else:
                await session.execute(update(m.Comment).values(score=9))
                assert (thread.comment_count, thread.score_sum) == (1, 9)
            await savepoint.rollback()
            if strategy == "memory" or strategy == "flush":
                await session.refresh(thread)  # a changed object like any other: SQLAlchemy expires it whole
            assert (thread.comment_count, thread.score_sum) == (1, 3), how
        await session.rollback()
    await engine.dispose()


@pytest.mark.parametrize("shop", models.STRATEGIES, indirect=True)
class TestMoves:
    def test_F6_the_old_parent_is_corrected(self, shop: SimpleNamespace) -> None:
        comment = shop.session.get_one(shop.m.Comment, 1)
        shop.session.get_one(shop.m.Thread, 1), shop.session.get_one(shop.m.Thread, 2)
        shop.session.expire(comment)
        comment.thread_id = 2
        shop.session.commit()
        checked(shop)

    def test_F8_a_child_may_name_a_new_parent_by_its_key(self, shop: SimpleNamespace) -> None:
        m = shop.m
        shop.session.add(m.Thread(id=7, forum=shop.session.get_one(m.Forum, 1)))
        shop.session.add(m.Comment(thread_id=7, score=3))
        shop.session.commit()
        checked(shop)

    def test_F7_move_and_delete_in_one_flush(self, shop: SimpleNamespace) -> None:
        comment = shop.session.get_one(shop.m.Comment, 1)
        comment.thread_id = 2
        shop.session.delete(comment)
        shop.session.commit()
        checked(shop)

    def test_F7_there_and_back_changes_nothing(self, shop: SimpleNamespace) -> None:
        one, two = shop.session.get_one(shop.m.Thread, 1), shop.session.get_one(shop.m.Thread, 2)
        comment = shop.session.get_one(shop.m.Comment, 1)
        comment.thread = two
        comment.thread = one
        with statements(shop.engine) as seen:
            shop.session.commit()
        written = any("UPDATE" in x and "SET comment_count" in x and "WHERE 0" not in x for x in seen)
        # "recount" writes what it has counted, also where that is what was there.
        assert written is (shop.m.Thread.__tablename__ == "n_recount_thread")
        checked(shop)


class TestNeverSilent:
    @pytest.mark.parametrize(
        "how", ["bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings", "core", "entity"]
    )
    def test_F8_what_passes_the_session_by_is_refused(self, shop: SimpleNamespace, how: str) -> None:
        m, session = shop.m, shop.session
        calls: dict[str, Callable[[], Any]] = {
            "bulk_save_objects": lambda: session.bulk_save_objects([m.Comment(thread_id=1, deleted=False)]),
            "bulk_insert_mappings": lambda: session.bulk_insert_mappings(m.Comment, [{"thread_id": 1}]),
            "bulk_update_mappings": lambda: session.bulk_update_mappings(m.Comment, [{"id": 1, "score": 9}]),
            "core": lambda: session.connection().execute(delete(m.Comment.__table__)),
            "entity": lambda: session.connection().execute(update(m.Comment).values(score=9)),
        }
        with pytest.raises(UncoveredChange, match=r"Thread\.comment_count"):
            calls[how]()
        session.rollback()
        checked(shop)

    @pytest.mark.parametrize("engine", SERVERS[:1], indirect=True)  # the only one that has them
    @pytest.mark.parametrize("through", ["session", "connection", "covered statement"])
    @pytest.mark.parametrize("kind", ["insert", "update", "delete"])
    def test_F8_dml_inside_a_cte_is_refused(self, shop: SimpleNamespace, kind: str, through: str) -> None:
        m, session = shop.m, shop.session
        dml: Any = {
            "insert": insert(m.Comment).values(thread_id=1, deleted=False),
            "update": update(m.Comment).values(thread_id=2),
            "delete": delete(m.Comment),
        }[kind]
        changed = dml.returning(m.Comment.id).cte("changed")
        statement: Any = select(changed.c.id)
        if through == "covered statement":
            statement = update(m.Comment).where(m.Comment.id == 4).values(score=4).add_cte(changed)

        def execute(**options: Any) -> None:
            by = session.connection() if through == "connection" else session
            by.execute(statement, execution_options=options)

        said = rf"{kind.upper()} on \S*comment inside a CTE .*Thread\.comment_count.*repair"
        with pytest.raises(UncoveredChange, match=said):
            execute()
        session.rollback()
        checked(shop)
        execute(denormalize="unchecked")
        session.commit()
        assert not verify(shop.engine, m.Base).right

    @pytest.mark.parametrize("engine", SERVERS[:1], indirect=True)
    def test_F8_dml_inside_a_cte_cannot_set_an_aggregate(self, shop: SimpleNamespace) -> None:
        m = shop.m
        changed = update(m.Thread).values(comment_count=7).returning(m.Thread.id).cte("changed")
        with pytest.raises(ReadOnlyAggregate, match=r"Thread\.comment_count"):
            shop.session.execute(select(changed.c.id))

    @pytest.mark.parametrize("engine", SERVERS[:1], indirect=True)
    def test_F8_a_cte_that_concerns_no_aggregate_passes(self, shop: SimpleNamespace) -> None:
        m = shop.m
        made = insert(m.Forum).values(id=9).returning(m.Forum.id).cte("made")
        assert shop.session.scalars(select(made.c.id)).all() == [9]
        shop.session.commit()
        checked(shop)

    def test_F8_dml_whose_rows_are_loaded_as_objects_is_refused(self, shop: SimpleNamespace) -> None:
        if not shop.engine.dialect.insert_returning:
            return
        m = shop.m
        made = insert(m.Comment).values(thread_id=1, deleted=False).returning(m.Comment)
        with pytest.raises(UncoveredChange, match=r"inside from_statement\(\).*Thread\.comment_count"):
            shop.session.scalars(select(m.Comment).from_statement(made)).all()
        shop.session.rollback()
        checked(shop)

    def test_F8_new_parents_by_core_and_by_bulk_statements_pass(self, shop: SimpleNamespace) -> None:
        m = shop.m
        with shop.engine.begin() as connection:
            connection.execute(insert(m.Forum.__table__), {"id": 10})
            connection.execute(insert(m.Forum.__table__).values(id=11))
        shop.session.execute(insert(m.Forum), [{"id": 12}])
        shop.session.execute(insert(m.Forum).values(id=13))
        shop.session.commit()
        checked(shop)

    @pytest.mark.parametrize("engine", SERVERS[1:], indirect=True)
    @pytest.mark.parametrize("shop", ["trigger"], indirect=True)
    @pytest.mark.parametrize("how", ["join", "subquery", "insert from select"])
    def test_F8_mariadb_refuses_statements_that_read_the_table_its_trigger_writes(
        self, shop: SimpleNamespace, how: str
    ) -> None:
        m, session = shop.m, shop.session
        some = select(m.Thread.id).where(m.Thread.forum_id == 1)
        change = update(m.Comment).values(score=50).execution_options(synchronize_session=False)
        statement: Any = {
            "join": change.where(m.Comment.thread_id == m.Thread.id, m.Thread.forum_id == 1),
            "subquery": change.where(m.Comment.thread_id.in_(some)),
            "insert from select": insert(m.Comment).from_select(
                ["thread_id", "deleted"], select(m.Thread.id, literal(False))
            ),
        }[how]
        with pytest.raises(OperationalError, match="1442"):
            session.execute(statement)
        session.rollback()
        checked(shop)
        session.execute(change.where(m.Comment.thread_id.in_(session.scalars(some).all())))
        session.commit()
        checked(shop)

    def test_F8_an_alias_does_not_hide_the_table(self, shop: SimpleNamespace) -> None:
        if shop.engine.dialect.name == "mysql":
            return  # it has no such DELETE
        aliased = shop.m.Comment.__table__.alias("c")
        with shop.engine.connect() as connection, pytest.raises(UncoveredChange, match=r"on n_sql_comment"):
            connection.execute(delete(aliased))

    def test_F8_a_flush_without_work_covers_nothing_that_follows(self, shop: SimpleNamespace) -> None:
        """An orphan that was never saved is thrown out by the flush, which then ends without an event."""
        m = models.orphans()
        m.Base.metadata.create_all(shop.engine)
        with Session(shop.engine) as session:
            parent, child = m.Parent(), m.Child()
            session.add(child)
            parent.children.append(child)
            parent.children.remove(child)
            session.flush()
            assert child not in session
            with pytest.raises(UncoveredChange):
                session.bulk_insert_mappings(m.Child, [{"parent_id": 1}])
            with shop.engine.connect() as connection, pytest.raises(UncoveredChange):
                connection.execute(insert(m.Child.__table__), {"parent_id": 1})

    def test_F8_the_flush_of_another_session_inside_one_leaves_it_covered(
        self, shop: SimpleNamespace
    ) -> None:
        m = shop.m
        beside = create_engine("sqlite://")
        m.Base.metadata.create_all(beside)

        def log(mapper: Any, connection: Any, target: Any) -> None:
            with Session(beside) as other:
                other.add(m.Forum())
                other.flush()

        event.listen(m.Thread, "before_update", log)
        try:
            shop.session.get_one(m.Thread, 1).forum_id = 2
            shop.session.add(m.Comment(thread_id=2, score=3))
            shop.session.commit()
        finally:
            event.remove(m.Thread, "before_update", log)
        checked(shop)

    def test_F8_the_way_around_is_asked_for_by_name(self, shop: SimpleNamespace) -> None:
        m = shop.m
        with shop.engine.begin() as connection:
            connection.execute(delete(m.Comment.__table__), execution_options={"denormalize": "unchecked"})
        assert not verify(shop.engine, m.Base).right
        repair(shop.engine, m.Base)
        checked(shop)

    def test_F8_upserts_are_refused(self, shop: SimpleNamespace) -> None:
        from sqlalchemy.dialects import mysql, postgresql, sqlite

        m = shop.m
        name = shop.engine.dialect.name
        values = {"id": 1, "thread_id": 2, "deleted": False}
        if name == "mysql":
            statement: Any = mysql.insert(m.Comment).values(values).on_duplicate_key_update(thread_id=2)
        else:
            dialect: Any = postgresql if name == "postgresql" else sqlite
            statement = dialect.insert(m.Comment).values(values)
            statement = statement.on_conflict_do_update(index_elements=["id"], set_={"thread_id": 2})
        with pytest.raises(UncoveredChange, match="upsert"):
            shop.session.execute(statement)

    def test_F8_insert_that_leaves_conflicts_alone_is_covered(self, shop: SimpleNamespace) -> None:
        from sqlalchemy.dialects import postgresql, sqlite

        name = shop.engine.dialect.name
        if name == "mysql":
            return  # it has no such statement
        dialect: Any = postgresql if name == "postgresql" else sqlite
        rows = [{"id": 1, "thread_id": 2, "deleted": False}, {"id": 50, "thread_id": 2, "deleted": False}]
        shop.session.execute(dialect.insert(shop.m.Comment).values(rows).on_conflict_do_nothing())
        shop.session.commit()
        checked(shop)

    @pytest.mark.parametrize("strategy", ["sql", "recount"])
    def test_F8_rows_that_the_database_deletes_are_counted(
        self, opened: Open, strategy: str, engine: Engine
    ) -> None:
        m = models.cascades(strategy)
        session = opened(m)
        session.add_all([m.User(id=1), m.Forum(id=1), m.Thread(id=1, forum_id=1)])
        session.flush()
        session.add_all([m.Comment(id=n, thread_id=1, author_id=1) for n in (1, 2)])
        session.commit()
        session.expunge_all()
        session.delete(session.get_one(m.Thread, 1))  # passive_deletes: no comment is loaded
        session.commit()
        m.check(session)
        assert session.get_one(m.User, 1).comment_count == 0

    def test_F8_sql_expressions_as_values(self, shop: SimpleNamespace) -> None:
        comment = shop.session.get_one(shop.m.Comment, 1)
        comment.score = shop.m.Comment.score + 10
        comment.thread_id = select(func.max(shop.m.Thread.id)).scalar_subquery()
        shop.session.commit()
        checked(shop)

    @pytest.mark.parametrize("shop", ["flush"], indirect=True)
    def test_F8_sql_expressions_are_refused_where_python_computes(self, shop: SimpleNamespace) -> None:
        shop.session.get_one(shop.m.Comment, 1).score = shop.m.Comment.score + 10
        with pytest.raises(UncoveredChange, match="SQL expression"):
            shop.session.flush()

    def test_F8_changes_by_later_listeners_are_refused(self, shop: SimpleNamespace) -> None:
        comment = shop.session.get_one(shop.m.Comment, 1)
        other = shop.session.get_one(shop.m.Comment, 2)

        @event.listens_for(shop.session, "before_flush")
        def later(session: Session, context: Any, instances: Any) -> None:
            other.thread_id = 2

        comment.score = 50
        with pytest.raises(UncoveredChange, match="registered later"):
            shop.session.flush()


class TestNulls:
    def test_F9_null_counters_begin_at_nothing(self, shop: SimpleNamespace) -> None:
        table = shop.m.Thread.__tablename__
        with shop.engine.begin() as connection:
            if shop.engine.dialect.name == "sqlite":
                return  # its NOT NULL cannot be lifted from a table that exists
            lift = "ALTER COLUMN comment_count DROP NOT NULL"
            if shop.engine.dialect.name == "mysql":
                lift = "MODIFY comment_count INTEGER NULL"
            connection.exec_driver_sql(f"ALTER TABLE {table} {lift}")
            connection.exec_driver_sql(f"UPDATE {table} SET comment_count = NULL WHERE id = 2")
        shop.session.add(shop.m.Comment(thread_id=2))
        shop.session.commit()
        checked(shop)

    def test_F9_float_sums_are_refused(self) -> None:
        class Base(DeclarativeBase):
            pass

        class Parent(Base):
            __tablename__ = "parent"
            id: Mapped[int] = mapped_column(primary_key=True)
            children: Mapped[list["Child"]] = relationship("Child")
            total: Mapped[float] = sum_of("children", "weight")

        class Child(Base):
            __tablename__ = "child"
            id: Mapped[int] = mapped_column(primary_key=True)
            parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))
            weight: Mapped[float]

        with pytest.raises(ConfigurationError, match=r"Parent.total: sums of floats drift"):
            Base.registry.configure()

    def test_F9_a_lost_extreme_is_looked_for(self, opened: Open) -> None:
        m = models.forum("sql")
        session = opened(m)
        session.add(m.Thread(id=1, comments=[m.Comment(score=n) for n in (3, 9, 9, None)]))
        session.commit()
        thread = session.get_one(m.Thread, 1)
        for expected in (9, 3, None):
            session.delete(next(c for c in thread.comments if c.score is not None and c.score == thread.best))
            session.flush()
            session.expire(thread)
            assert thread.best == expected
            m.check(session)


class TestReadOnly:
    @pytest.mark.parametrize("shop", models.STRATEGIES, indirect=True)
    def test_F10_assignments_raise(self, shop: SimpleNamespace) -> None:
        m = shop.m
        with pytest.raises(ReadOnlyAggregate, match=r"Thread.comment_count is kept by count_of"):
            shop.session.get_one(m.Thread, 1).comment_count = 5
        with pytest.raises(ReadOnlyAggregate):
            m.Thread(comment_count=5)
        for statement in (
            update(m.Thread).values(comment_count=5),
            insert(m.Thread).values(id=9, forum_id=1, comment_count=5),
            m.Thread.__table__.update().values(comment_count=m.Thread.__table__.c.comment_count + 1),
        ):
            with pytest.raises(ReadOnlyAggregate):
                shop.session.execute(statement)
        with pytest.raises(ReadOnlyAggregate):
            shop.session.execute(update(m.Thread), [{"id": 1, "comment_count": 5}])
        with shop.engine.connect() as connection, pytest.raises(ReadOnlyAggregate):
            connection.execute(update(m.Thread.__table__).values(comment_count=5))

    @pytest.mark.parametrize("shop", models.STRATEGIES, indirect=True)
    def test_F10_the_object_shows_the_new_value_after_the_flush(self, shop: SimpleNamespace) -> None:
        thread = shop.session.get_one(shop.m.Thread, 1)
        assert thread.comment_count == 5
        shop.session.add(shop.m.Comment(thread_id=1, score=1))
        shop.session.flush()
        assert thread.comment_count == 6
        assert thread not in shop.session.dirty
        shop.session.execute(delete(shop.m.Comment).where(shop.m.Comment.id <= 2))
        assert thread.comment_count == 4

    def test_F10_a_later_save_of_the_parent_does_not_write_the_stale_value(
        self, shop: SimpleNamespace
    ) -> None:
        thread = shop.session.get_one(shop.m.Thread, 1)
        assert thread.comment_count == 5
        with Session(shop.engine) as other:
            if shop.engine.dialect.name == "sqlite":
                shop.session.commit()
            other.add(shop.m.Comment(thread_id=1, score=1))
            other.commit()
        thread.forum_id = 2
        shop.session.commit()
        checked(shop)


class TestCost:
    def test_F12_one_update_for_each_parent_and_flush(self, shop: SimpleNamespace) -> None:
        shop.session.add_all([shop.m.Comment(thread_id=1 + n % 2, score=n) for n in range(500)])
        with statements(shop.engine) as seen:
            shop.session.flush()
        updates = [statement for statement in seen if statement.startswith("UPDATE")]
        assert sum("thread SET" in statement for statement in updates) == 2
        assert sum("forum SET" in statement for statement in updates) == 2
        shop.session.commit()
        checked(shop)

    def test_F12_loaded_children_cost_nothing(self, shop: SimpleNamespace) -> None:
        children = shop.session.scalars(select(shop.m.Comment)).all()
        shop.session.expire_all()
        shop.session.add(shop.m.Comment(thread_id=1, score=1))
        with statements(shop.engine) as seen:
            shop.session.flush()
        assert len(children) == 5
        # Locks (where there are row locks), INSERT, two images, two UPDATEs: nothing for each loaded child.
        assert len(seen) <= 9

    def test_no_aggregate_no_statement(self, shop: SimpleNamespace) -> None:
        shop.session.add(shop.m.Forum(id=9))
        with statements(shop.engine) as seen:
            shop.session.flush()
        assert len(seen) == 1


@pytest.mark.parametrize("engine", SERVERS, indirect=True)  # SQLite stores the digits as they are
def test_rounding_by_the_database_is_what_counts(engine: Engine, opened: Open) -> None:
    """The measure counts as the database stores it, not as the object was given it."""
    m = models.forum("sql")
    session = opened(m)
    session.add(
        m.Thread(id=1, comments=[m.Comment(price=Decimal("1.005")), m.Comment(price=Decimal("2.004"))])
    )
    session.commit()
    m.check(session)


def test_python_measure_with_sql_condition(engine: Engine, opened: Open) -> None:
    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "mixed_parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children: Mapped[list["Child"]] = relationship("Child")
        odd: Mapped[int] = sum_of("children", python(lambda c: c.n % 2), where=lambda c: c.n > 2)
        least: Mapped[int | None] = min_of(
            "children", lambda c: c.n * 2, where=python(lambda c: c.n % 2 == 0)
        )
        mean: Mapped[Decimal | None] = avg_of("children", python(lambda c: c.n), type_=Numeric(10, 2))

    class Child(Base):
        __tablename__ = "mixed_child"
        id: Mapped[int] = mapped_column(primary_key=True)
        n: Mapped[int]
        parent_id: Mapped[int] = mapped_column(ForeignKey("mixed_parent.id"))

    session = opened(SimpleNamespace(Base=Base))
    parent = Parent(id=1, children=[Child(id=n, n=n) for n in range(1, 8)])
    session.add(parent)
    session.commit()
    assert (parent.odd, parent.least, parent.mean) == (3, 4, Decimal(4))
    session.delete(session.get_one(Child, 2))
    session.get_one(Child, 7).n = 8
    session.commit()
    assert (parent.odd, parent.least, parent.mean) == (2, 8, Decimal("4.5"))
    session.execute(update(Child).where(Child.id == 4).values(n=10))
    session.commit()
    assert (parent.least, verify(session, Base).right) == (12, True)
    session.close()
    Base.metadata.drop_all(engine)


def test_connection_level_statement_on_an_unrelated_table_passes(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Alone(Base):
        __tablename__ = "alone"
        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        assert isinstance(connection, Connection)
        connection.execute(insert(Alone.__table__), [{"id": 1}])
    Base.metadata.drop_all(engine)
