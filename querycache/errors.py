"""The errors that querycache raises."""

from __future__ import annotations

__all__ = ["ConfigurationError", "QueryCacheError"]


class QueryCacheError(Exception):
    """Base of all errors of this library."""


class ConfigurationError(QueryCacheError, ValueError):
    """An argument, option, URL or configuration file is not usable; the message names it and the remedy."""
