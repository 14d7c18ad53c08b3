"""The words with which a statement asks for the cache.

Execution options (``.execution_options(cache_key="front-page", cache_ttl=60)``) are the short way. The
statement options :class:`FromCache` and :class:`RelationshipCache` say the same through
``.options(…)``; the second speaks of lazy loads that will come later. :class:`Policy` speaks of every
select of an entity, in the table given to ``QueryCache(policies=…)``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from sqlalchemy.orm import InstrumentedAttribute, QueryableAttribute, RelationshipProperty, class_mapper

from querycache.errors import ConfigurationError
from querycache.sa_internals import StatementOption

__all__ = ["EXECUTION_OPTIONS", "CacheOptions", "FromCache", "Mode", "Policy", "RelationshipCache"]

Mode = Literal["use", "refresh", "bypass", "only"]
_MODES = get_args(Mode)

EXECUTION_OPTIONS = frozenset(
    {"cache_exact", "cache_key", "cache_mode", "cache_region", "cache_tables", "cache_tags", "cache_ttl"}
)
"""The execution options that querycache reads."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What one statement asks of the cache, checked.

    Attributes:
        key: True to derive the key from the statement; a string becomes part of the key and names the tag by
            which ``invalidate(key=…)`` finds every answer stored under it.
        region: name of the region, None for the default one.
        ttl: seconds after which the answer expires; None for the region's own.
        tags: names for ``invalidate(tags=…)``.
        tables: tables the statement reads, for text in which they cannot be seen.
        mode: "use" the cache; "refresh": ask the database and store the answer; "bypass": leave the cache
            out of it; "only": raise CacheMiss rather than ask the database.
        exact: look up by the string in ``key`` alone, whatever the statement; within one database.
    """

    key: str | Literal[True] = True
    region: str | None = None
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    mode: Mode = "use"
    exact: bool = False
    # asked for at each lookup; strings have other hashes in other processes, so it is not pickled
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.key is not True and not (isinstance(self.key, str) and self.key):
            raise ConfigurationError(
                f"cache_key={self.key!r}: give a non-empty string, or True to derive the key from the statement"
            )
        check_region("cache_region", self.region)
        check_ttl("cache_ttl", self.ttl)
        if self.mode not in _MODES:
            raise ConfigurationError(f"cache_mode={self.mode!r}: give one of {', '.join(map(repr, _MODES))}")
        if not isinstance(self.exact, bool):
            raise ConfigurationError(f"cache_exact={self.exact!r}: give True or False")
        if self.exact and self.key is True:
            raise ConfigurationError(
                "cache_exact=True needs a string as cache_key: there is nothing else to go by"
            )
        object.__setattr__(self, "_hash", hash(self._values()))

    def _values(self) -> tuple[object, ...]:
        return self.key, self.region, self.ttl, self.tags, self.tables, self.mode, self.exact

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return CacheOptions, self._values()

    @property
    def name(self) -> str:
        """The key that the user gave; empty where it is derived."""
        return self.key if isinstance(self.key, str) else ""

    @classmethod
    def from_execution_options(
        cls, options: Mapping[str, Any], refined: CacheOptions | None = None
    ) -> CacheOptions | None:
        """Read the execution options of a statement.

        ``cache_key=None`` and ``cache_key=False`` mean that the statement is not to be cached, also under a
        policy; they give options with the mode "bypass".

        Args:
            options: all execution options of the statement, of which those that begin with ``cache_`` count.
            refined: what a statement option or a policy asks for that statement already. Where ``cache_key`` is not
                among the options, the others change that.
        Returns:
            None where there is nothing to change, and no more is asked than to leave the cache out of it.
        Raises:
            ConfigurationError: an option has a name that is not known, or a value that it cannot have, or there is
                no ``cache_key`` and nothing to change.
        """
        values: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(name, str) and name.startswith("cache_"):  # subqueryload has tuples as names
                if name not in EXECUTION_OPTIONS:
                    raise ConfigurationError(
                        f"unknown execution option {name!r}: querycache knows {', '.join(sorted(EXECUTION_OPTIONS))}"
                    )
                if name in ("cache_tags", "cache_tables"):
                    value = (names if name == "cache_tags" else table_names)(name, value)
                values[name.removeprefix("cache_")] = value
        if "key" in values:
            if values["key"] is None or values["key"] is False:
                return cls(mode="bypass")
            return cls(**values)
        if refined is not None:
            return replace(refined, **values)
        if values.get("mode") == "bypass":
            return None
        name, value = next(iter(values.items()))
        raise ConfigurationError(
            f"cache_{name}={value!r} without a cache_key: add cache_key=True, or a string, to have the statement cached"
        )


def names(argument: str, value: object) -> tuple[str, ...]:
    """A tuple of non-empty strings from what a caller gave; a single string is an error, not its letters."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{argument}={value!r}: give a list of strings, such as [{value!r}]")
    result = tuple(value)
    for each in result:
        if not isinstance(each, str) or not each:
            raise ConfigurationError(f"{argument} has {each!r} in it: only non-empty strings can stand there")
    return result


def table_names(argument: str, value: object) -> tuple[str, ...]:
    """The same for names of tables and what stands for them, as ``table`` or ``schema.table``."""
    if not isinstance(value, str) and isinstance(value, Iterable):
        value = tuple(value)
        for each in value:
            parts = each.split(".") if isinstance(each, str) else [" "]
            if any(part != part.strip() or part.startswith(_QUOTES) for part in parts):
                raise ConfigurationError(
                    f"{argument} has {each!r} in it: give names such as 'orders' or 'shop.orders', without quotes and spaces "
                    "around them"
                )
    return names(argument, value)


_QUOTES = ('"', "`", "[")


def check_ttl(argument: str, value: object) -> None:
    """Refuse what is not a positive number of seconds or None."""
    if value is None:
        return
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigurationError(
            f"{argument}={value!r}: give a positive number of seconds, or None for no expiry"
        )


def check_region(argument: str, value: object) -> None:
    """Refuse what is neither the name of a region nor None."""
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{argument}={value!r}: give the name of a region as a string, or None")


def _named(attribute: object) -> str:
    return str(attribute) if isinstance(attribute, QueryableAttribute) else repr(attribute)


class FromCache(StatementOption):
    """Statement option: answer this statement from the cache.

    ``select(User).options(FromCache(ttl=60))`` is the same as
    ``select(User).execution_options(cache_key=True, cache_ttl=60)``.

    Args:
        region: name of the region; the default region when left out.
        key: as ``cache_key``: a string, or True to derive it.
        ttl: seconds until the answer expires.
        tags: names for ``invalidate(tags=…)``.
    Raises:
        ConfigurationError: a value that cannot be used.
    """

    propagate_to_loaders = False

    def __init__(
        self,
        region: str | None = None,
        key: str | Literal[True] = True,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.cache_options = CacheOptions(key=key, region=region, ttl=ttl, tags=names("tags", tags))


class RelationshipCache(StatementOption):
    """Statement option: answer later lazy loads of a relationship from the cache.

    ``select(Comment).options(RelationshipCache(Comment.author))`` leaves the select itself alone; when
    ``comment.author`` of an object that it loaded is touched, the load goes through the cache.

    Args:
        attribute: the relationship, such as ``Comment.author``.
        region, key, ttl, tags: as for :class:`FromCache`.
    Raises:
        ConfigurationError: the attribute is not a mapped attribute, or a value that cannot be used.
    """

    propagate_to_loaders = True

    def __init__(
        self,
        attribute: InstrumentedAttribute[Any],
        region: str | None = None,
        key: str | Literal[True] = True,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        super().__init__()
        comparator = (
            getattr(attribute, "comparator", None) if isinstance(attribute, QueryableAttribute) else None
        )
        if not isinstance(getattr(comparator, "prop", None), RelationshipProperty):
            raise ConfigurationError(
                f"RelationshipCache({_named(attribute)}): give a relationship attribute, such as Comment.author"
            )
        # not the attribute, for objects are pickled with the options under which they were loaded
        self.owner: type = attribute.parent.class_
        self.key = attribute.key
        self.cache_options = CacheOptions(key=key, region=region, ttl=ttl, tags=names("tags", tags))

    def applies_to(self, entity: Any, key: str) -> bool:
        """True for the lazy load of this relationship by an object of this entity."""
        return key == self.key and bool(entity.mapper.isa(class_mapper(self.owner)))


@dataclass(frozen=True, slots=True)
class Policy:
    """How selects of an entity are cached that say nothing themselves.

    Args:
        ttl: seconds until an answer expires; None for the region's own.
        region: name of the region; None for the default one.
        tags: names for ``invalidate(tags=…)``.
    Raises:
        ConfigurationError: a value that cannot be used.
    """

    ttl: float | None = None
    region: str | None = None
    tags: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        check_ttl("Policy(ttl)", self.ttl)
        check_region("Policy(region)", self.region)
        object.__setattr__(self, "tags", names("Policy(tags)", self.tags))

    def cache_options(self) -> CacheOptions:
        return replace(CacheOptions(), ttl=self.ttl, region=self.region, tags=self.tags)
