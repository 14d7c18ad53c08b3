"""What an answer depends on: from a statement to tags.

The tables of a statement are those that its SQL names, subqueries, CTEs, eager joins and the joins of
inheritance included. They are collected while the statement is compiled once more by the dialect's own
compiler, so what is collected is what is rendered, whatever constructs the ORM went through to get there.
That is done once for a statement's structure and remembered on the compiled object, which lives in
SQLAlchemy's bounded cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sqlalchemy.sql.compiler import SQLCompiler

from querycache.keys import structure_digest
from querycache.sa_internals import Prepared
from querycache.tags import table_tag

__all__ = ["Analysis", "analyse"]


@dataclass(slots=True)
class Analysis:
    """What is known of a statement's structure.

    Attributes:
        structure: digest of the structure, loader options included, 16 bytes.
        tables: names of the tables that its SQL names, as (schema or None, name).
        functions: lower-case names of the functions it calls.
        locks: True for ``FOR UPDATE`` and its like.
        load_tags: tags of the further statements that completed its objects. They are only learned when those run;
            looked up together with the entry from then on, they save a round trip.
    """

    structure: bytes
    tables: set[tuple[str | None, str]] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    locks: bool = False
    load_tags: tuple[str, ...] = ()

    def learn(self, tags: Iterable[str]) -> None:
        """Remember the tags of a further statement."""
        self.load_tags = tuple(sorted({*self.load_tags, *tags}))

    def tags(self, prepared: Prepared) -> list[str]:
        """Tags of the tables, with the schemas that the statement is run with."""
        translate: Mapping[str | None, str | None] = prepared.schema_translate_map
        result = []
        for schema, name in self.tables:
            actual = translate.get(schema, schema)
            result.append(table_tag(f"{actual}.{name}" if actual else name))
        return sorted(result)


_MEMO = "_querycache_analysis"


def analyse(prepared: Prepared) -> Analysis:
    """The analysis of a statement, made once for its structure."""
    compiled = prepared.compiled
    memo: Analysis | None = compiled.__dict__.get(_MEMO)
    if memo is None:
        cache_key = compiled.cache_key
        memo = Analysis(structure_digest(cache_key.key if cache_key is not None else None))
        collector = _collector(type(compiled))
        collector(compiled.dialect, compiled.statement, analysis=memo, column_keys=compiled.column_keys)
        compiled.__dict__[_MEMO] = memo
    return memo


@lru_cache(maxsize=64)
def _collector(compiler: type[SQLCompiler]) -> type[Any]:
    class Collector(compiler):  # type: ignore[valid-type, misc]
        """Notes what the dialect's own compiler renders."""

        def __init__(self, *args: Any, analysis: Analysis, **kwargs: Any) -> None:
            self.analysis = analysis
            super().__init__(*args, **kwargs)

        def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> Any:
            self.analysis.tables.add((getattr(table, "schema", None), table.name))
            return super().visit_table(table, *args, **kwargs)

        def visit_function(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            self.analysis.functions.add(func.name.lower())
            return super().visit_function(func, *args, **kwargs)

        def for_update_clause(self, select: Any, **kwargs: Any) -> Any:
            self.analysis.locks = True
            return super().for_update_clause(select, **kwargs)

    return Collector
