"""The mapped classes of these tests: every kind of attribute that a key can be read from."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import JSON, Column, ForeignKey, Integer, String, Table
from sqlalchemy.ext.mutable import MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    composite,
    mapped_column,
    relationship,
    synonym,
)


class Base(DeclarativeBase):
    pass


@dataclasses.dataclass
class Point:
    x: int | None
    y: int | None


item_label = Table(
    "item_label",
    Base.metadata,
    Column("item_id", ForeignKey("item.id", ondelete="CASCADE"), primary_key=True),
    Column("label_id", ForeignKey("label.id", ondelete="CASCADE"), primary_key=True),
)


class Country(Base):
    """A natural primary key, which can change."""

    __tablename__ = "country"
    code: Mapped[str] = mapped_column(String(10), primary_key=True)
    title: Mapped[str | None]
    people: Mapped[list[Person]] = relationship(back_populates="country", passive_updates=False)


class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(default="person")
    name: Mapped[str | None]
    age: Mapped[int | None]
    bio: Mapped[str | None] = mapped_column(deferred=True)
    score: Mapped[int | None] = mapped_column(server_default="7")
    rank: Mapped[int | None] = mapped_column(default=3, onupdate=4)
    country_code: Mapped[str | None] = mapped_column(ForeignKey("country.code", onupdate="CASCADE"))
    country: Mapped[Country | None] = relationship(back_populates="people")
    items: Mapped[list[Item]] = relationship(back_populates="owner")
    nick = synonym("name")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

    @property
    def initial(self) -> str | None:
        return self.name[:1] if self.name else None


class Manager(Person):
    """Joined inheritance."""

    __tablename__ = "manager"
    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    grade: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Clerk(Person):
    """Single-table inheritance."""

    desk: Mapped[int | None] = mapped_column(nullable=True)
    __mapper_args__ = {"polymorphic_identity": "clerk"}


class Label(Base):
    __tablename__ = "label"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str | None]


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    tags: Mapped[Any] = mapped_column(MutableList.as_mutable(JSON), nullable=True)
    raw: Mapped[Any] = mapped_column(JSON, nullable=True)
    x: Mapped[int | None]
    y: Mapped[int | None]
    position: Mapped[Point] = composite(Point, "x", "y")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("person.id"))
    owner: Mapped[Person | None] = relationship(back_populates="items")
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("item.id"))
    parent: Mapped[Item | None] = relationship(remote_side=[id], back_populates="children")
    children: Mapped[list[Item]] = relationship(back_populates="parent")
    labels: Mapped[list[Label]] = relationship(secondary=item_label)


class Note(MappedAsDataclass, Base):
    """A dataclass: instances are unhashable, and equal if their values are."""

    __tablename__ = "note"
    id: Mapped[int | None] = mapped_column(Integer, primary_key=True, default=None)
    text: Mapped[str | None] = mapped_column(default=None)
    topic_id: Mapped[int | None] = mapped_column(ForeignKey("topic.id"), default=None)
    topic: Mapped[Topic | None] = relationship(default=None)


class Topic(MappedAsDataclass, Base):
    """Another one, so that unhashable objects are keys as well."""

    __tablename__ = "topic"
    id: Mapped[int | None] = mapped_column(Integer, primary_key=True, default=None)
    title: Mapped[str | None] = mapped_column(default=None)
