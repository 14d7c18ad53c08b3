"""Comparing what an index holds with a full scan of the session."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from sqlalchemy.orm.attributes import instance_state

from querycache.session_index.contents import Contents, Keys, Record
from querycache.session_index.parts import canonical
from querycache.session_index.reading import UNKNOWN
from querycache.session_index.results import Difference

__all__ = ["compare"]


def compare(
    name: str,
    record: Record,
    contents: Contents,
    persisted: bool,
    objects: Iterable[Any],
    read: Callable[[Any], Keys],
) -> list[Difference]:
    """The objects that do not lie in an index where they should.

    :param objects: all objects of the class in the session.
    :param read: the keys that an object has.
    """
    found: dict[int, tuple[Any, Keys]] = {}
    with record:
        places: list[tuple[Any, Keys]] = [(entry, UNKNOWN) for entry in contents.unknown.values()]
        for key, bucket in contents.buckets.items():
            places.extend((entry, (key,)) for entry in bucket.values())
    for entry, keys in places:
        obj = entry()
        if obj is not None:
            _, before = found.get(entry.ident, (obj, ()))
            found[entry.ident] = (obj, _together(before, keys))
    differences = []
    for obj in objects:
        expected = read(obj)
        _, keys = found.pop(id(instance_state(obj)), (obj, ()))
        if _comparable(expected) != _comparable(keys):
            differences.append(_difference(name, obj, expected, keys, persisted))
    differences.extend(_difference(name, obj, (), keys, persisted) for obj, keys in found.values())
    return differences


def _together(one: Keys, other: Keys) -> Keys:
    return UNKNOWN if one is UNKNOWN or other is UNKNOWN else (*one, *other)


def _comparable(keys: Keys) -> frozenset[Hashable] | None:
    return None if keys is UNKNOWN else frozenset(canonical(key) for key in keys)


def _difference(name: str, obj: Any, expected: Keys, found: Keys, persisted: bool) -> Difference:
    return Difference(
        name,
        obj,
        None if expected is UNKNOWN else expected,
        None if found is UNKNOWN else found,
        persisted,
    )
