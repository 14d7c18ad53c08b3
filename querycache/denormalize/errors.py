"""What goes wrong with denormalized columns, each kind under its own name."""

from __future__ import annotations

from querycache.errors import QueryCacheError

__all__ = [
    "AggregateMismatch",
    "DenormalizeError",
    "DenormalizeWarning",
    "ReadOnlyAggregate",
    "UncoveredChange",
]


class DenormalizeError(QueryCacheError):
    """Base class of the errors of `querycache.denormalize`."""


class ReadOnlyAggregate(DenormalizeError, AttributeError):
    """The application wrote to a column that the library computes."""


class UncoveredChange(DenormalizeError):
    """A write that would leave an aggregate wrong, stopped before it does."""


class AggregateMismatch(DenormalizeError):
    """Verification at commit found an aggregate that does not equal its recount."""


class DenormalizeWarning(UserWarning):
    """A declaration that works, but at a cost that its author should know."""
