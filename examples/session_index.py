"""Finding objects that are already in a Session, without SQL.

    python examples/session_index.py

First the demonstration of the "SessionIndexing" recipe in SQLAlchemy's wiki, on this library with the
recipe's interface; then what the recipe was for: a ``before_flush`` handler that looks at a subset of what
the Session holds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from querycache.session_index import SessionIndex


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    limit: Mapped[int] = mapped_column(default=2)
    tickets: Mapped[list[Ticket]] = relationship(back_populates="user")

    def __repr__(self) -> str:
        return f"User({self.__dict__.get('name')!r})"


class Ticket(Base):
    __tablename__ = "ticket"
    id: Mapped[int] = mapped_column(primary_key=True)
    is_open: Mapped[bool]
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id"))
    user: Mapped[User] = relationship(back_populates="tickets")


def the_recipe() -> None:
    """The wiki's demonstration."""
    indexes = SessionIndex()

    @indexes.indexed(User, "user_byname")
    def user_byname(obj: Any) -> Any:
        return obj.name

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    session = Session(engine, expire_on_commit=False)

    u1, u2, u3, u4 = User(name="a"), User(name="b"), User(name="b"), User(name="c")
    session.add_all([u1, u2, u3, u4])
    assert indexes.user_byname(session, "a") == {u1}
    assert indexes.user_byname(session, "b") == {u2, u3}  # pending
    session.commit()
    assert indexes.user_byname(session, "b") == {u2, u3}  # persistent

    session.expunge(u2)
    assert indexes.user_byname(session, "b") == {u3}

    session.close()
    assert indexes.user_byname(session, "b") == set()

    loaded = session.query(User).filter_by(name="b").all()
    assert indexes.user_byname(session, "b") == set(loaded)
    assert len(loaded) == 2

    # and what the recipe cannot do
    loaded[0].name = "z"
    assert indexes.user_byname(session, "b") == {loaded[1]}
    assert indexes.user_byname(session, "z") == {loaded[0]}
    session.rollback()
    assert indexes.user_byname.lookup(session, "b").unknown == set(loaded)
    assert indexes.user_byname(session, "b", unknown="load") == set(loaded)
    session.close()
    indexes.detach()
    engine.dispose()
    print("the recipe's demonstration, with expunge and close: every assertion holds")
    print("mutation, rollback and expiry, which the recipe gets wrong: every assertion holds")


def before_flush() -> None:
    """Refuse a flush after which a user would have more open tickets than they may."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    maker = sessionmaker(engine)
    indexes = SessionIndex(maker)
    open_tickets = indexes.index(
        Ticket.user, where=lambda ticket: ticket.is_open, depends_on=[Ticket.is_open]
    )

    @event.listens_for(maker, "before_flush")
    def check_limits(session: Session, flush_context: Any, instances: Any) -> None:
        changed = {ticket.user for ticket in (*session.new, *session.dirty) if isinstance(ticket, Ticket)}
        for user in changed:
            if len(open_tickets(session, user)) > user.limit:
                raise ValueError(f"{user} may have {user.limit} open tickets")

    with maker() as session:
        user = User(name="ed", limit=2)
        session.add_all([user, *(Ticket(user=user, is_open=is_open) for is_open in (True, True, False))])
        session.commit()
        assert {ticket.is_open for ticket in user.tickets} == {True, False}
        for ticket in user.tickets:
            ticket.is_open = True
        try:
            session.commit()
        except ValueError as error:
            print("before_flush:", error)
        else:
            raise AssertionError("three open tickets were accepted")
        session.rollback()
    indexes.detach()
    engine.dispose()


def main() -> None:
    """Run both."""
    the_recipe()
    before_flush()


if __name__ == "__main__":
    main()
