"""The errors that querycache raises."""

from __future__ import annotations

__all__ = ["CacheMiss", "CacheUnavailable", "ConfigurationError", "QueryCacheError", "UnknownRegion"]


class QueryCacheError(Exception):
    """Base of all errors of this library."""


class ConfigurationError(QueryCacheError, ValueError):
    """An argument, option, URL or configuration file is not usable; the message names it and the remedy."""


class UnknownRegion(ConfigurationError):
    """A statement or call names a region that was not configured."""


class CacheMiss(QueryCacheError):
    """A statement with ``cache_mode="only"`` has no answer in the cache."""


class CacheUnavailable(QueryCacheError):
    """The cache server did not answer in time, or answered with a fault."""
