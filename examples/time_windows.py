"""Time windows: a handler restricts every select to the window that the session is about.

The limits of the window are parameters, so each window has an answer of its own. Round them (to the day, here):
a window that ends *now* is another one every time, and never hits.
"""

from datetime import date, timedelta

from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    mapped_column,
    sessionmaker,
    with_loader_criteria,
)

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Dated:
    day: Mapped[date] = mapped_column()


class Sale(Dated, Base):
    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache = QueryCache("memory://")
cache.attach(Session)


@event.listens_for(Session, "do_orm_execute")
def only_the_window(state: ORMExecuteState) -> None:
    if state.is_select and "window" in state.session.info:
        first, last = state.session.info["window"]
        state.statement = state.statement.options(
            with_loader_criteria(Dated, lambda cls: cls.day.between(first, last), include_aliases=True)
        )


monday = date(2025, 3, 3)
with Session.begin() as session:
    session.add_all([Sale(day=monday + timedelta(days=number), amount=10 * number) for number in range(14)])

amounts = select(Sale.amount).order_by(Sale.day).execution_options(cache_key="amounts")
for expected in ("miss", "hit"):
    for week in (0, 1):
        window = monday + timedelta(weeks=week), monday + timedelta(weeks=week, days=6)
        with cache.recording() as events, Session(info={"window": window}) as session:
            answer = session.scalars(amounts).all()
        print(f"week {week + 1}  {events[0].outcome:5} {answer}")
        assert events[0].outcome == expected
        assert answer == [10 * (7 * week + number) for number in range(7)]
