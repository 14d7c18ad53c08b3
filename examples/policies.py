"""Policies: every select of an entity is cached, without a word in the statements.

For an application that is there already, and for entities that are read everywhere: countries, settings,
permissions. A statement can still say otherwise.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from querycache import Policy, QueryCache


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "countries"

    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class Visit(Base):
    __tablename__ = "visits"

    id: Mapped[int] = mapped_column(primary_key=True)
    country: Mapped[str]


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache = QueryCache("memory://", policies={Country: Policy(ttl=3600, tags=("countries",))})
cache.attach(Session)
with Session.begin() as session:
    session.add_all([Country(code="no", name="Norway"), Country(code="pe", name="Peru"), Visit(country="pe")])


def ask(what: str, use: Callable[[Any], object], *expected: str) -> None:
    """Do something in a new Session, and say what the cache did."""
    with cache.recording() as events, Session() as session:
        use(session)
    outcomes = [f"{each.outcome} {each.reason}".strip() for each in events]
    print(f"{what:32} {', '.join(outcomes) or 'none of the business of the cache'}")
    assert outcomes == list(expected)


countries = select(Country).order_by(Country.name)
ask("all countries", lambda session: session.scalars(countries).all(), "miss", "fill")
ask("all countries again", lambda session: session.scalars(countries).all(), "hit")
ask("one, by primary key", lambda session: session.get(Country, "no"), "miss", "fill")
ask("the same again", lambda session: session.get(Country, "no"), "hit")
ask("visits have no policy", lambda session: session.scalars(select(Visit)).all())
unwanted = countries.execution_options(cache_key=None)
ask("cache_key=None: not this one", lambda session: session.scalars(unwanted).all(), "bypass mode")
short = countries.execution_options(cache_ttl=1)
ask("an option refines the policy", lambda session: session.scalars(short).all(), "miss", "fill")
cache.invalidate(tags=["countries"])
ask("after invalidate(tags=...)", lambda session: session.scalars(countries).all(), "stale", "fill")
