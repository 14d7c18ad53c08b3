"""Soft delete: rows marked as deleted are left out by a handler, unless a statement asks for them."""

from datetime import datetime

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


class SoftDeleted:
    deleted_at: Mapped[datetime | None] = mapped_column()


class Page(SoftDeleted, Base):
    __tablename__ = "pages"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache = QueryCache("memory://")
cache.attach(Session)


# Registered after the cache, as often happens when the cache comes first in a module that others import.
@event.listens_for(Session, "do_orm_execute")
def leave_out_the_deleted(state: ORMExecuteState) -> None:
    if (
        state.is_select
        and not state.is_column_load
        and not state.is_relationship_load
        and not state.execution_options.get("include_deleted", False)
    ):
        state.statement = state.statement.options(
            with_loader_criteria(SoftDeleted, lambda cls: cls.deleted_at.is_(None), include_aliases=True)
        )


with Session.begin() as session:
    session.add_all([Page(title="here"), Page(title="gone", deleted_at=datetime(2025, 1, 1))])

# One statement, one key; with and without the deleted rows it is not the same SQL, so not the same answer.
pages = select(Page.title).order_by(Page.id).execution_options(cache_key="pages")
for expected in ("miss", "hit"):
    for include_deleted in (False, True):
        with cache.recording() as events, Session() as session:
            titles = session.scalars(pages, execution_options={"include_deleted": include_deleted}).all()
        print(f"include_deleted={include_deleted!s:5}  {events[0].outcome:5} {titles}")
        assert events[0].outcome == expected
        assert titles == (["here", "gone"] if include_deleted else ["here"])
