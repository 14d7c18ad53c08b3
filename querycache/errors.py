"""The exceptions of the public interface.

Everything that this library raises by itself is a :class:`QueryCacheError`. A fault of a cache server never
shows as an exception of the server's client: it is a :class:`CacheUnavailable`, and the read path answers it
by asking the database.
"""

from __future__ import annotations

import re

__all__ = [
    "CacheMiss",
    "CacheUnavailable",
    "ConfigurationError",
    "QueryCacheError",
    "UnknownRegion",
    "shown",
    "without_password",
]


def without_password(text: str) -> str:
    """A text for an error message or a log, without what may be user and password in an address in it."""
    return re.sub(r"[^\s'\",/]*@", "***@", text)


def shown(value: object) -> str:
    """A value that was given, for an error message: with quotes, and without passwords."""
    return without_password(repr(value))


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
