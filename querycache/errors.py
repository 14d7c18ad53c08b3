"""The exceptions of the public interface.

Everything that this library raises by itself is a :class:`QueryCacheError`. A fault of a cache server never
shows as an exception of the server's client: it is a :class:`CacheUnavailable`, and the read path answers it
by asking the database.
"""

from __future__ import annotations

__all__ = ["CacheMiss", "CacheUnavailable", "ConfigurationError", "QueryCacheError", "UnknownRegion"]


class QueryCacheError(Exception):
    """The base of every error that querycache raises by itself."""


class ConfigurationError(QueryCacheError, ValueError):
    """A setting that cannot work. The message names the setting, the value that was given and what would
    do."""


class UnknownRegion(ConfigurationError):
    """A region was named that this cache does not have."""


class CacheMiss(QueryCacheError):
    """A statement that was to be answered from the cache only (``cache_mode="only"``) was not in it."""


class CacheUnavailable(QueryCacheError):
    """The cache server did not answer in time, broke the connection, or refused the command."""
