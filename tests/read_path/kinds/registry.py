"""A kind of statement: a function of a session and execution options, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.orm import Session

__all__ = ["KINDS", "Kind", "Options", "kind", "kinds_for", "only", "rows_of", "scalars_of"]

Options = Mapping[str, Any]
Kind = Callable[[Session, Options], Any]

KINDS: dict[str, Kind] = {}
_ONLY: dict[str, str] = {}


def kind(function: Kind) -> Kind:
    """Register a kind under the name of its function."""
    KINDS[function.__name__] = function
    return function


def only(dialect: str) -> Callable[[Kind], Kind]:
    """Leave a kind out on other databases."""

    def mark(function: Kind) -> Kind:
        _ONLY[function.__name__] = dialect
        return function

    return mark


def kinds_for(dialect: str) -> list[str]:
    """Names of the kinds that a database knows."""
    return [name for name in KINDS if _ONLY.get(name, dialect) == dialect]


def scalars_of(db: Session, statement: Any, options: Options) -> Any:
    return db.scalars(statement, execution_options=options).unique().all()


def rows_of(
    db: Session, statement: Any, options: Options, parameters: Mapping[str, Any] | None = None
) -> Any:
    result = db.execute(statement, parameters, execution_options=options)
    return list(result.keys()), result.all()
