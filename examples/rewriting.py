"""Handlers that rewrite statements, or want them fresh from the database.

What a handler makes of a statement is what is looked up and stored. A handler that sets ``populate_existing``
wants objects overwritten with what the database has now, so such a statement passes by the cache, with that as
the reason.
"""

from typing import Any

from sqlalchemy import create_engine, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, ORMExecuteState, mapped_column, sessionmaker

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int]


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache = QueryCache("memory://")
cache.attach(Session)


@event.listens_for(Session, "do_orm_execute")
def at_most(state: ORMExecuteState) -> None:
    """Nobody gets more rows than the session allows."""
    if state.is_select and "at_most" in state.session.info:
        statement: Any = state.statement
        state.statement = statement.limit(state.session.info["at_most"])


@event.listens_for(Session, "do_orm_execute")
def fresh_where_it_matters(state: ORMExecuteState) -> None:
    if state.session.info.get("checkout"):
        state.update_execution_options(populate_existing=True)


with Session.begin() as session:
    session.add_all([Stock(count=number) for number in range(5)])

statement = select(Stock).order_by(Stock.id).execution_options(cache_key="stock")
for expected in ("miss", "hit"):
    for limit in (2, 3):
        with cache.recording() as events, Session(info={"at_most": limit}) as session:
            found = session.scalars(statement).all()
        print(f"at most {limit}   {events[0].outcome:6} {len(found)} rows")
        assert events[0].outcome == expected and len(found) == limit

with Session() as session:
    cup = session.scalars(statement.limit(1)).one()
    with engine.begin() as connection:
        connection.execute(update(Stock).where(Stock.id == cup.id).values(count=99))
    session.info["checkout"] = True
    with cache.recording() as events:
        session.scalars(statement.limit(1)).one()
    print(f"checkout    {events[0].outcome:6} ({events[0].reason}): count is {cup.count}")
    assert (events[0].outcome, events[0].reason, cup.count) == ("bypass", "populate_existing", 99)
