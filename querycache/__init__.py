"""A second-level query cache for SQLAlchemy on dogpile.cache."""

from querycache.cache import QueryCache
from querycache.errors import CacheMiss, CacheUnavailable, ConfigurationError, QueryCacheError, UnknownRegion
from querycache.events import CacheEvent, CacheStats, Explanation
from querycache.options import FromCache, Policy, RelationshipCache

__all__ = [
    "CacheEvent",
    "CacheMiss",
    "CacheStats",
    "CacheUnavailable",
    "ConfigurationError",
    "Explanation",
    "FromCache",
    "Policy",
    "QueryCache",
    "QueryCacheError",
    "RelationshipCache",
    "UnknownRegion",
]
