"""The text of triggers: statements and names as one database writes them.

It is made for people and migrations to read, and is sent without parameters: values are in the text, percent signs are
single, and schemas are those that a connection's `schema_translate_map` puts in place of the tables' own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Table
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression

from querycache.denormalize.aggregate import Aggregate

__all__ = ["Ddl", "trigger_name"]

_ODD = re.compile(r"[^a-z0-9_]+")


class Ddl:
    """Writes for one database.

    Args:
        schemas: as `schema_translate_map` has them.
    """

    def __init__(
        self, dialect: Dialect, schemas: Mapping[str | None, str | None] = MappingProxyType({})
    ) -> None:
        self.dialect = dialect
        self.schemas = schemas

    def text(self, element: Any) -> str:
        schemas = {"schema_translate_map": self.schemas, "render_schema_translate": True}
        compiled = _with_values(element, self.dialect).compile(
            dialect=self.dialect,
            compile_kwargs={"literal_binds": True},
            **(schemas if self.schemas else {}),
        )
        return self._single(str(compiled))

    def name(self, name: str) -> str:
        return self._single(self.dialect.identifier_preparer.quote(name))

    def table(self, table: Table) -> str:
        return self.beside(table, self.name(table.name))

    def beside(self, table: Table, name: str) -> str:
        """`name` in the schema of `table`."""
        schema = self.schema(table)
        if schema is None:
            return name
        return f"{self._single(self.dialect.identifier_preparer.quote_schema(schema))}.{name}"

    def schema(self, table: Table) -> str | None:
        return self.schemas.get(table.schema, table.schema)

    def _single(self, text: str) -> str:
        # These double the percent signs, for a DBAPI that looks for parameters.
        return text.replace("%%", "%") if self.dialect.paramstyle in ("format", "pyformat") else text


def _with_values(element: Any, dialect: Dialect) -> Any:
    """`element` with IS DISTINCT FROM in the database's own words: for SQLite, MariaDB and MySQL SQLAlchemy writes it with
    parameters even where values are to be in the text."""
    if dialect.name == "postgresql" or not any(map(_distinguishes, visitors.iterate(element))):
        return element

    def own(element: Any, **_: Any) -> Any:
        if not _distinguishes(element):
            return None
        left, right = (_with_values(side, dialect) for side in (element.left, element.right))
        same = left.bool_op("IS" if dialect.name == "sqlite" else "<=>")(right)
        return ~same if element.operator is operators.is_distinct_from else same

    return visitors.replacement_traverse(element, {}, own)


def _distinguishes(element: Any) -> bool:
    return isinstance(element, BinaryExpression) and element.operator in (
        operators.is_distinct_from,
        operators.is_not_distinct_from,
    )


def trigger_name(aggregate: Aggregate, place: int, table: Table, event: str) -> str:
    """The name of a trigger, the same whatever other aggregates there are, so that it replaces itself.

    PostgreSQL cuts names at 63 characters; what tells them apart comes last.
    """
    held = "\0".join((aggregate.table.fullname, aggregate.column.name, table.fullname))
    shown = f"qc_{aggregate.table.name}_{aggregate.column.name}_{table.name}".lower()
    mark = hashlib.sha256(held.encode()).hexdigest()[:8]
    return f"{_ODD.sub('_', shown)[:45]}_{mark}_{place}{event[:1].lower()}"
