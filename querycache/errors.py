"""The exceptions of the public interface.

Everything that this library raises by itself is a :class:`QueryCacheError`. A fault of a cache server never
shows as an exception of the server's client: it is a :class:`CacheUnavailable`, and the read path answers it
by asking the database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "CacheMiss",
    "CacheUnavailable",
    "ConfigurationError",
    "QueryCacheError",
    "UnknownRegion",
    "shown",
    "without_password",
]


def without_password(address: str) -> str:
    """A URL or an address for an error message or a log: without user and password, whatever characters are in these."""
    return re.sub(r"^(.*?//)?.*@", r"\1***@", address, flags=re.DOTALL)


def shown(value: object) -> str:
    """A value that was given, for an error message: with quotes, and without passwords."""
    if isinstance(value, Mapping):
        pairs = (f"{each!r}: {'***' if each == 'password' else shown(of)}" for each, of in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and value[0] == "password":
            return "('password', ***)"
        return f"[{', '.join(map(shown, value))}]"
    return repr(without_password(value) if isinstance(value, str) else value)


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
