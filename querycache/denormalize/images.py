"""Images: what the touched rows contribute to each parent at one moment, and the recount of whole parents.

The touched rows are looked at before the change and after it, in the database, so that everything which the
database does to values is seen as it is: defaults, triggers, rounding, cascades, SQL expressions. Rows that
did not change cancel, so touching too many rows costs time but never exactness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.chain import Chain
from querycache.denormalize.kinds import Parts
from querycache.denormalize.locks import Locks, chunks, parameters
from querycache.denormalize.plan import Plan
from querycache.denormalize.queries import Queried, image_query, recount_query

__all__ = ["ChildRow", "Image", "Recounted", "image", "recount", "same"]

Image = dict[Key, dict[Aggregate, Parts]]
"""Parent key to the parts of the touched rows below it."""

Recounted = dict[Key, dict[Aggregate, tuple[Any, Any]]]
"""Parent key to (stored value, recounted value)."""


class ChildRow:
    """One row of the child, as expressions in Python see it: its column attributes and nothing else."""

    __slots__ = ("_entity", "_values")

    def __init__(self, entity: str, names: Sequence[str], values: Iterable[Any]) -> None:
        self._entity = entity
        self._values = dict(zip(names, values, strict=False))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(
                f"a Python expression over {self._entity} reads {name!r}; it is given the row's column attributes,"
                f" {', '.join(self._values)}"
            ) from None


def image(
    locks: Locks, chain: Chain, aggregates: Sequence[Aggregate], touched: Mapping[int, set[Key]]
) -> Image:
    """The parts of all joined rows of `chain` that contain a touched row.

    Args:
        locks: of the connection to read on.
        chain: the join.
        aggregates: those whose parts are wanted; without any, only the parents are found.
        touched: keys of touched rows by level (1 … depth).
    """
    in_sql = [held for held in aggregates if not held.in_python]
    in_python = [held for held in aggregates if held.in_python]
    found: Image = {}
    levels = [level for level in sorted(touched) if touched[level]]
    for position, level in enumerate(levels):
        above = tuple(levels[:position])
        if in_sql or not in_python:
            _grouped(locks, chain, in_sql, touched, level, above, found)
        if in_python:
            _by_row(locks, chain, in_python, touched, level, above, found)
    return found


def _grouped(
    locks: Locks,
    chain: Chain,
    aggregates: Sequence[Aggregate],
    touched: Mapping[int, set[Key]],
    level: int,
    above: tuple[int, ...],
    found: Image,
) -> None:
    queried: Queried = locks.plan.memo(
        ("image", chain, level, above, *aggregates),
        lambda: image_query(chain, aggregates, level, above, rows=False),
    )
    statement = locks.read(queried.statement)
    for chunk in chunks(touched[level]):
        for row in locks.connection.execute(statement, parameters(chunk)):
            # A joined row that holds touched rows on two levels is found on both; the upper one counts it.
            if any(tuple(row[place]) in touched[i] for i, place in zip(above, queried.levels, strict=True)):
                continue
            held = found.setdefault(tuple(row[queried.parent]), {})
            start = queried.values.start
            for aggregate in aggregates:
                width = len(aggregate.kind.zero)
                parts = tuple(row[start : start + width])
                start += width
                known = held.get(aggregate)
                held[aggregate] = parts if known is None else aggregate.kind.combine(known, parts)


def _by_row(
    locks: Locks,
    chain: Chain,
    aggregates: Sequence[Aggregate],
    touched: Mapping[int, set[Key]],
    level: int,
    above: tuple[int, ...],
    found: Image,
) -> None:
    queried: Queried = locks.plan.memo(
        ("rows", chain, level, above, *aggregates),
        lambda: image_query(chain, aggregates, level, above, rows=True),
    )
    statement = locks.read(queried.statement)
    values: dict[Key, dict[Aggregate, list[Any]]] = {}
    for chunk in chunks(touched[level]):
        for row in locks.connection.execute(statement, parameters(chunk)):
            if any(tuple(row[place]) in touched[i] for i, place in zip(above, queried.levels, strict=True)):
                continue
            held = values.setdefault(tuple(row[queried.parent]), {held: [] for held in aggregates})
            _add(chain, row[queried.values], held)
    for parent, per_aggregate in values.items():
        parts = found.setdefault(parent, {})
        for aggregate, gathered in per_aggregate.items():
            folded = aggregate.kind.fold(gathered)
            known = parts.get(aggregate)
            parts[aggregate] = folded if known is None else aggregate.kind.combine(known, folded)


def _add(chain: Chain, values: Sequence[Any], held: dict[Aggregate, list[Any]]) -> None:
    """Evaluate one row for each aggregate; `values` are the child's columns and then the aggregates' extra ones."""
    width = len(chain.leaf_columns)
    child = ChildRow(chain.leaf.class_.__name__, chain.leaf_columns, values[:width])
    start = width
    for aggregate, gathered in held.items():
        extra = values[start : start + aggregate.extra_width]
        start += aggregate.extra_width
        if aggregate.counts(child, extra):
            gathered.append(aggregate.value_of(child, extra))


def recount(locks: Locks, chain: Chain, aggregates: Sequence[Aggregate], keys: Iterable[Key]) -> Recounted:
    """What the given parents store, and what they should: each from one statement, so from one moment.

    Parents that do not exist are left out. The caller holds the parents' locks where the answer is to be written.
    """
    found: Recounted = {}
    for rows in (False, True):
        chosen = [held for held in aggregates if held.in_python is rows]
        if chosen:
            _recount(locks, chain, chosen, keys, rows, found)
    return found


def _recount(
    locks: Locks,
    chain: Chain,
    aggregates: Sequence[Aggregate],
    keys: Iterable[Key],
    rows: bool,
    found: Recounted,
) -> None:
    plan: Plan = locks.plan
    queried: Queried = plan.memo(
        ("recount", chain, rows, locks.snapshot, *aggregates),
        lambda: recount_query(chain, aggregates, rows=rows, locking=locks.snapshot),
    )
    statement = locks.read(queried.statement)
    (stored_at,) = queried.levels
    child_key = [chain.leaf_columns.index(name) for name in chain.keys[-1]]
    for chunk in chunks(keys):
        stored: dict[Key, Sequence[Any]] = {}
        parts: dict[Key, list[Parts]] = {}
        values: dict[Key, dict[Aggregate, list[Any]]] = {}
        for row in locks.connection.execute(statement, parameters(chunk)):
            parent = tuple(row[queried.parent])
            stored[parent] = row[stored_at]
            if rows:
                held = values.setdefault(parent, {held: [] for held in aggregates})
                if row[queried.values][child_key[0]] is not None:
                    _add(chain, row[queried.values], held)
            else:
                start, cut = queried.values.start, []
                for aggregate in aggregates:
                    width = len(aggregate.kind.zero)
                    cut.append(tuple(row[start : start + width]))
                    start += width
                parts[parent] = cut
        for parent, per_aggregate in values.items():
            parts[parent] = [aggregate.kind.fold(gathered) for aggregate, gathered in per_aggregate.items()]
        for parent, held_parts in parts.items():
            into = found.setdefault(parent, {})
            for aggregate, was, now in zip(aggregates, stored[parent], held_parts, strict=True):
                into[aggregate] = (was, aggregate.finish(now))


def same(aggregate: Aggregate, stored: Any, counted: Any) -> bool:
    """Whether a stored value is the recounted one, as exactly as the column's type can tell."""
    if stored != stored:  # NaN
        return bool(counted != counted)
    if isinstance(counted, float) and isinstance(stored, (int, float)):
        # FLOAT columns of some databases hold 24 bits.
        return abs(stored - counted) <= 1e-6 * max(1.0, abs(counted))
    return bool(stored == counted and (stored is None) == (counted is None))
