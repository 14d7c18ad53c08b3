"""A small forum, and one table for every other thing that can be mapped: what the read path is tried on.

The same on every database, except for `POSTGRESQL_ONLY`.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Enum,
    Float,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    PickleType,
    String,
    Table,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    func,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    WriteOnlyMapped,
    column_property,
    composite,
    deferred,
    mapped_column,
    query_expression,
    relationship,
)

__all__ = [
    "POSTGRESQL_ONLY",
    "Address",
    "Base",
    "Car",
    "Circle",
    "Comment",
    "Company",
    "Counter",
    "Employee",
    "Engineer",
    "Machine",
    "Manager",
    "Money",
    "Node",
    "PgSample",
    "Point",
    "Post",
    "Role",
    "Sample",
    "Shape",
    "Square",
    "Tag",
    "Team",
    "Truck",
    "User",
    "Vehicle",
]


class Base(DeclarativeBase):
    pass


# --- The forum -------------------------------------------------------------------------------------


class Role(enum.Enum):
    READER = "r"
    AUTHOR = "a"
    EDITOR = "é"


@dataclass
class Address:
    street: str | None
    city: str | None


class Team(Base):
    __tablename__ = "team"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    users: Mapped[list[User]] = relationship(back_populates="team", order_by="User.id")


class User(Base):
    __tablename__ = "user_account"
    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[int | None] = mapped_column(ForeignKey("team.id"))
    name: Mapped[str] = mapped_column(String(40))
    age: Mapped[int | None]
    role: Mapped[Role] = mapped_column(Enum(Role, native_enum=False, length=10))
    email: Mapped[str | None] = mapped_column(String(60), deferred=True)
    bio: Mapped[str | None] = mapped_column(Text, deferred=True, deferred_group="about")
    motto: Mapped[str | None] = mapped_column(String(60), deferred=True, deferred_group="about")
    settings: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON()))
    address: Mapped[Address] = composite(
        mapped_column("street", String(40), nullable=True), mapped_column("city", String(40), nullable=True)
    )
    team: Mapped[Team | None] = relationship(back_populates="users")
    posts: Mapped[list[Post]] = relationship(back_populates="author", order_by="Post.id")
    post_stream: WriteOnlyMapped[Post] = relationship(viewonly=True, order_by="Post.id")
    comments: Mapped[list[Comment]] = relationship(back_populates="author", order_by="Comment.id")
    rank: Mapped[int | None] = query_expression()
    post_titles: AssociationProxy[list[str]] = association_proxy("posts", "title")

    @hybrid_property
    def label(self) -> str:
        return self.name + "!"

    @hybrid_method
    def older_than(self, age: int) -> bool:
        return self.age > age  # type: ignore[operator]


post_tag = Table(
    "post_tag",
    Base.metadata,
    Column("post_id", ForeignKey("post.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Post(Base):
    __tablename__ = "post"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("user_account.id"))
    title: Mapped[str] = mapped_column(String(60))
    score: Mapped[int]
    body: Mapped[str | None] = deferred(mapped_column(Text))
    author: Mapped[User] = relationship(back_populates="posts")
    comments: Mapped[list[Comment]] = relationship(back_populates="post", order_by="Comment.id")
    tags: Mapped[list[Tag]] = relationship(secondary=post_tag, back_populates="posts", order_by="Tag.id")


class Comment(Base):
    __tablename__ = "comment"
    id: Mapped[int] = mapped_column(primary_key=True)
    post_id: Mapped[int] = mapped_column(ForeignKey("post.id"))
    author_id: Mapped[int | None] = mapped_column(ForeignKey("user_account.id"))
    text: Mapped[str] = mapped_column(String(80))
    post: Mapped[Post] = relationship(back_populates="comments")
    author: Mapped[User | None] = relationship(back_populates="comments")


class Tag(Base):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    posts: Mapped[list[Post]] = relationship(
        secondary=post_tag, back_populates="tags", order_by="Post.id", lazy="selectin"
    )


Post.comment_count = column_property(  # type: ignore[attr-defined]
    select(func.count(Comment.id))
    .where(Comment.post_id == Post.id)
    .correlate_except(Comment)
    .scalar_subquery()
)


# --- Inheritance, self-reference, dataclasses ------------------------------------------------------


class Company(Base):
    __tablename__ = "company"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    employees: Mapped[list[Employee]] = relationship(back_populates="company", order_by="Employee.id")


class Employee(Base):
    __tablename__ = "employee"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(40))
    company_id: Mapped[int] = mapped_column(ForeignKey("company.id"))
    company: Mapped[Company] = relationship(back_populates="employees")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


class Engineer(Employee):
    __tablename__ = "engineer"
    id: Mapped[int] = mapped_column(ForeignKey("employee.id"), primary_key=True)
    language: Mapped[str] = mapped_column(String(20))
    machines: Mapped[list[Machine]] = relationship(order_by="Machine.id")
    __mapper_args__ = {"polymorphic_identity": "engineer"}


class Manager(Employee):
    __tablename__ = "manager"
    id: Mapped[int] = mapped_column(ForeignKey("employee.id"), primary_key=True)
    budget: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Machine(Base):
    __tablename__ = "machine"
    id: Mapped[int] = mapped_column(primary_key=True)
    engineer_id: Mapped[int] = mapped_column(ForeignKey("engineer.id"))
    model: Mapped[str] = mapped_column(String(20))


class Vehicle(Base):
    __tablename__ = "vehicle"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}


class Car(Vehicle):
    seats: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "car"}


class Truck(Vehicle):
    load: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "truck"}


class Shape(ConcreteBase, Base):
    __tablename__ = "shape"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_identity": "shape", "concrete": True}


class Circle(Shape):
    __tablename__ = "circle"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    radius: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "circle", "concrete": True}


class Square(Shape):
    __tablename__ = "square"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    side: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "square", "concrete": True}


class Node(Base):
    __tablename__ = "node"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id"))
    name: Mapped[str] = mapped_column(String(20))
    parent: Mapped[Node | None] = relationship(remote_side=[id], back_populates="children")
    children: Mapped[list[Node]] = relationship(back_populates="parent", order_by="Node.id")


class Point(MappedAsDataclass, Base):
    """A dataclass with eq: its instances are not hashable."""

    __tablename__ = "point"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[float] = mapped_column(default=0.0)
    y: Mapped[float] = mapped_column(default=0.0)
    next_id: Mapped[int | None] = mapped_column(ForeignKey("point.id"), default=None, repr=False)
    next: Mapped[Point | None] = relationship(remote_side=[id], default=None, repr=False)


class Counter(Base):
    """A row that counts its versions."""

    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]
    version: Mapped[int] = mapped_column(nullable=False)
    __mapper_args__ = {"version_id_col": version}


# --- Types -----------------------------------------------------------------------------------------


class Money(TypeDecorator[Decimal]):
    """Cents in the database, a decimal in Python."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


class Sample(Base):
    """A column of each type that every database has."""

    __tablename__ = "sample"
    id: Mapped[int] = mapped_column(primary_key=True)
    big: Mapped[int | None] = mapped_column(BigInteger)
    exact: Mapped[Decimal | None] = mapped_column(Numeric(20, 6))
    inexact: Mapped[float | None] = mapped_column(Numeric(20, 6, asdecimal=False))
    single: Mapped[float | None] = mapped_column(Float)
    double: Mapped[float | None] = mapped_column(Double)
    flag: Mapped[bool | None] = mapped_column(Boolean)
    word: Mapped[str | None] = mapped_column(String(60))
    day: Mapped[dt.date | None] = mapped_column(Date)
    clock: Mapped[dt.time | None] = mapped_column(Time)
    moment: Mapped[dt.datetime | None] = mapped_column(DateTime)
    zoned: Mapped[dt.datetime | None] = mapped_column(DateTime(timezone=True))
    span: Mapped[dt.timedelta | None] = mapped_column(Interval)
    role: Mapped[Role | None] = mapped_column(Enum(Role, name="role"))
    plain_enum: Mapped[str | None] = mapped_column(Enum("one", "two", name="plain_enum"))
    document: Mapped[Any] = mapped_column(JSON, nullable=True)
    key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    key_text: Mapped[str | None] = mapped_column(Uuid(as_uuid=False))
    blob: Mapped[bytes | None] = mapped_column(LargeBinary)
    pickled: Mapped[Any] = mapped_column(PickleType, nullable=True)
    price: Mapped[Decimal | None] = mapped_column(Money)


class PgBase(DeclarativeBase):
    metadata = MetaData()


class PgSample(PgBase):
    """A column of each type that only PostgreSQL has."""

    __tablename__ = "pg_sample"
    id: Mapped[int] = mapped_column(primary_key=True)
    numbers: Mapped[list[int] | None] = mapped_column(postgresql.ARRAY(Integer))
    grid: Mapped[list[list[Decimal]] | None] = mapped_column(postgresql.ARRAY(Numeric(8, 2), dimensions=2))
    words: Mapped[tuple[str, ...] | None] = mapped_column(postgresql.ARRAY(String(20), as_tuple=True))
    roles: Mapped[list[Role] | None] = mapped_column(postgresql.ARRAY(Enum(Role, name="pg_role")))
    document: Mapped[Any] = mapped_column(postgresql.JSONB, nullable=True)
    address: Mapped[Any] = mapped_column(postgresql.INET, nullable=True)
    network: Mapped[Any] = mapped_column(postgresql.CIDR, nullable=True)
    span: Mapped[dt.timedelta | None] = mapped_column(postgresql.INTERVAL)
    numbers_range: Mapped[Any] = mapped_column(postgresql.INT4RANGE, nullable=True)
    days: Mapped[Any] = mapped_column(postgresql.DATERANGE, nullable=True)
    moments: Mapped[Any] = mapped_column(postgresql.TSTZMULTIRANGE, nullable=True)
    ident: Mapped[uuid.UUID | None] = mapped_column(postgresql.UUID)
    bits: Mapped[Any] = mapped_column(postgresql.BIT(4), nullable=True)
    unbounded: Mapped[Decimal | None] = mapped_column(Numeric)


POSTGRESQL_ONLY = PgBase.metadata
