"""Parents and children whose keys have types that convert."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ForeignKeyConstraint, Integer, Numeric, String, Uuid
from sqlalchemy.orm import declarative_base, mapped_column, relationship

from querycache.denormalize import count_of

__all__ = ["KEYS", "keyed"]


class Language(enum.Enum):
    """Declared in another order than that of the names."""

    FR = "fr"
    EN = "en"
    DE = "de"
    ES = "es"


class Letter(str, enum.Enum):
    Z = "a"
    Y = "b"
    X = "c"
    W = "d"


class Code(sa.TypeDecorator[int]):
    """A number, held as text."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"k-{value:05}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else int(value[2:])


KEYS: dict[str, tuple[Any, list[Any]]] = {
    "uuid": (Uuid(), [uuid.UUID(int=i) for i in (7, 3, 5, 9)]),
    "text_uuid": (Uuid(as_uuid=False), [str(uuid.UUID(int=i)) for i in (7, 3, 5, 9)]),
    "other_uuid": (Uuid(native_uuid=False), [uuid.UUID(int=i) for i in (7, 3, 5, 9)]),
    "decorator": (Code(), [7, 3, 5, 9]),
    "numeric": (Numeric(10, 2), [Decimal("0.1"), Decimal("7.33"), Decimal(5), Decimal("10.01")]),
    "enum": (sa.Enum(Language, name="k_language"), list(Language)),
    "text_enum": (sa.Enum(Letter, name="k_letter"), list(Letter)),
    "text": (String(9), ["b", "a", "d", "c"]),
}


def keyed(name: str, kind: str, strategy: str, composite: bool) -> SimpleNamespace:
    """Parents and children whose keys have a type that converts."""
    Base: Any = declarative_base()
    type_, made = KEYS[kind]
    if isinstance(type_, sa.Enum):
        type_ = sa.Enum(type_.enum_class, name=f"{type_.name}_{name}", metadata=Base.metadata)

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        if composite:
            number = mapped_column(Integer, primary_key=True, autoincrement=False)
        key = mapped_column(type_, primary_key=True, autoincrement=False)
        children = relationship("Child")
        n = count_of("children", strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = f"{name}_child"
        key = mapped_column(type_, primary_key=True, autoincrement=False)
        parent_number = mapped_column(Integer, primary_key=True, autoincrement=False)
        parent_key = mapped_column(type_)
        if composite:
            __table_args__ = (
                ForeignKeyConstraint(["parent_number", "parent_key"], [Parent.number, Parent.key]),
            )
        else:
            __table_args__ = (ForeignKeyConstraint(["parent_key"], [Parent.key]),)

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child, made=made)
