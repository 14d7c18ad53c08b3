"""A pinned column and values of which the database, or a type of the application, makes others; PITFALLS E13."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import BigInteger, Engine, Integer, String, bindparam, func, literal, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.writes.test_pitfalls_e import Library

NUMBER = 12345678
SHAPED = "12345678-0000-0000-0000-000000000005"  # as a UUID; MariaDB makes NUMBER of it


class Base(DeclarativeBase):
    pass


class Positive(Integer):
    def bind_processor(self, dialect: Any) -> Any:
        return lambda value: None if value is None else abs(value)


class PositiveInSQL(Integer):
    def bind_expression(self, bindvalue: Any) -> Any:
        return func.abs(bindvalue)


class Renamed(Integer):
    """Of this one the values are what they are."""


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(10))


class Processed(Base):
    __tablename__ = "processed"
    id: Mapped[int] = mapped_column(Positive, primary_key=True)
    name: Mapped[str] = mapped_column(String(10))


class Expressed(Base):
    __tablename__ = "expressed"
    id: Mapped[int] = mapped_column(PositiveInSQL, primary_key=True)
    name: Mapped[str] = mapped_column(String(10))


class Varying(Base):
    __tablename__ = "varying"
    id: Mapped[int] = mapped_column(Integer().with_variant(Positive(), "sqlite"), primary_key=True)
    name: Mapped[str] = mapped_column(String(10))


class Exact(Base):
    __tablename__ = "exact"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Renamed(), "sqlite"), primary_key=True)
    name: Mapped[str] = mapped_column(String(10))


def _library(engine: Engine) -> Library:
    library = Library(engine)
    Base.metadata.create_all(engine)
    with library.sessions.begin() as session:
        session.add_all([Plain(id=5, name="a"), Plain(id=NUMBER, name="a")])
        session.add_all(each(id=5, name="a") for each in (Processed, Expressed, Varying, Exact))
    return library


def _is_right_after_renaming(library: Library, entity: Any, number: int, statement: Any) -> bool:
    library.fill(statement)
    with library.sessions.begin() as session:
        session.get_one(entity, number).name = "b"
    return library.is_right(statement)


@pytest.mark.server("mariadb")
@pytest.mark.parametrize(
    "condition",
    [
        Plain.id == literal(SHAPED, Integer),
        Plain.id == bindparam("x", SHAPED, Integer),
        Plain.id.in_([SHAPED]),
    ],
    ids=["literal", "parameter", "list"],
)
def test_text_that_is_compared_with_a_number(mariadb_engine: Engine, condition: Any) -> None:
    library = _library(mariadb_engine)
    assert _is_right_after_renaming(library, Plain, NUMBER, select(Plain.name).where(condition))


@pytest.mark.server("mariadb")
def test_text_that_is_written_as_a_number(mariadb_engine: Engine) -> None:
    library = _library(mariadb_engine)
    statement = select(Plain.name).where(Plain.id == NUMBER - 1)
    library.fill(statement)
    with library.sessions.begin() as session:
        session.execute(text("SET sql_mode = ''"))
        session.add(Plain(id=SHAPED.replace("678-", "677-"), name="b"))
    assert library.is_right(statement)


@pytest.mark.parametrize("entity", [Processed, Expressed, Varying])
def test_a_type_that_makes_another_value_of_one(sqlite_engine: Engine, entity: Any) -> None:
    statement = select(entity.name).where(entity.id == -5)
    assert _is_right_after_renaming(_library(sqlite_engine), entity, 5, statement)


@pytest.mark.parametrize("kind", [Positive(), PositiveInSQL()])
def test_a_parameter_of_such_a_type(sqlite_engine: Engine, kind: Any) -> None:
    statement = select(Plain.name).where(Plain.id == literal(-5, kind))
    assert _is_right_after_renaming(_library(sqlite_engine), Plain, 5, statement)


def test_a_type_that_changes_nothing_pins(sqlite_engine: Engine) -> None:
    library = _library(sqlite_engine)
    statement = select(Exact.name).where(Exact.id == 6)
    library.fill(statement)
    with library.sessions.begin() as session:
        session.get_one(Exact, 5).name = "b"
    assert library.outcome(statement) == "hit"
