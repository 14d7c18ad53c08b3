"""The first connection of an engine, before which its dialect does not know what to compile for."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import util
from sqlalchemy.engine import Engine

__all__ = ["compiled_cache_of"]


def compiled_cache_of(engine: Engine, options: Mapping[str, Any]) -> Any:
    """Where a compiled statement is looked for. The engine connects before, if it never did.

    Until then its dialect does not know its server, and compiles, and remembers of its types, what this may not know. That
    serves where the database cannot be reached, and is forgotten as soon as it can.
    """
    dialect = engine.dialect
    known = dialect.__dict__
    if _EARLY in known or not (_TOLD_BY_SERVER in known or _CONNECTED in known):
        if not (_TOLD_BY_SERVER in known or _CONNECTED in known or _connect(engine)):
            return known.setdefault(_EARLY, util.LRUCache(500))
        if known.pop(_EARLY, None) is not None:
            dialect._type_memos.clear()
            engine.clear_compiled_cache()
    return options.get("compiled_cache", engine._compiled_cache)


def _connect(engine: Engine) -> bool:
    """Have an engine connect. Returns False if it cannot, or could not a moment ago."""
    known = engine.dialect.__dict__
    begun = time.monotonic()
    next_try: float | None = known.get(_NEXT_TRY)
    if next_try is not None:
        if begun < next_try:
            return False
        known[_NEXT_TRY] = math.inf  # for the other threads, meanwhile
    try:
        engine.connect().close()
    except Exception:  # noqa: BLE001 - whoever needs the database will raise it
        return False
    else:
        known[_CONNECTED] = True
        return True
    finally:
        now = time.monotonic()
        known[_NEXT_TRY] = now + max(_TRY_EVERY, 20 * (now - begun))


_TRY_EVERY = 5.0
"""Seconds, at least; and so much more that waiting takes a small part of the time."""
_TOLD_BY_SERVER = "default_schema_name"
"""What a dialect finds out when it first connects. Not so where another engine has made the connections of its pool."""
_CONNECTED = "_querycache_connected"
_EARLY = "_querycache_early"
_NEXT_TRY = "_querycache_next_try"
