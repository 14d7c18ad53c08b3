"""What an answer depends on, as tags.

An answer depends on the tables that its statement reads (:mod:`querycache.analysis`). Where the WHERE clause pins a
tracked column of a table to values, it depends on their slots instead of the whole table (:mod:`querycache.tables`).
What depends on more than the tables can tell is told by a name: a function, or a table of the database itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from querycache.analysis import Analysis, is_text_type
from querycache.declarations import Declarations, spellings
from querycache.fragments import MOMENT
from querycache.functions import is_stable, is_system_table
from querycache.pins import Pin
from querycache.sa_internals import Plan, known_tables
from querycache.tables import declared_tags, label_of, reader_labels, row_labels, slot_of, translated
from querycache.tags import bulk_tag, change_tag, slot_tag, table_tag
from querycache.temporary import is_temporary_schema

__all__ = [
    "MAX_PINNED_VALUES",
    "in_temporary_schema",
    "system_table",
    "tags",
    "tags_by_key",
    "unstable_function",
]

MAX_PINNED_VALUES = 64
"""A list of more values than this makes the answer depend on the whole table."""


def tags(analysis: Analysis, plan: Plan, declared: Declarations) -> list[str]:
    """The tags of the tables, for one execution with its parameters and schemas."""
    translate = plan.schema_translate_map
    found: list[str] = []
    pinned = set()
    for pin in analysis.pins:
        values = _pinned_values(pin, plan)
        slots = {_slot(pin, value, declared.slots) for value in values} if values is not None else {None}
        if None in slots or pin.table in pinned:
            continue
        pinned.add(pin.table)
        schema, name = translated(pin.table, translate)
        found.extend(map(bulk_tag, reader_labels(schema, name)))
        for label in row_labels(schema, name):
            if not pin.key:
                found.append(change_tag(label))
            found.extend(slot_tag(label, pin.column, slot) for slot in slots)  # type: ignore[arg-type]
    whole = {translated(table, translate) for table in analysis.tables if table not in pinned}
    for schema, name in whole | analysis.text_tables:
        found.extend(map(table_tag, reader_labels(schema, name)))
    if declared.sources or declared.of_triggers:
        given = {label_of(*translated(table, translate)) for table in analysis.tables}
        named = [table[1] for table in (*analysis.tables, *analysis.text_tables)]
        # A source may be a table of the statement, and pinned there: what is made from it is made from all of it.
        called = [spelling for name in analysis.functions for spelling in spellings(name)]
        found.extend(declared_tags(declared.made_from([*given, *named, *called])))
    return sorted(set(found))


def tags_by_key(analysis: Analysis, plan: Plan, declared: Declarations) -> dict[object, list[str]] | None:
    """For each key that is asked for, the tags on which its row depends besides those on which all rows do.

    None where a row may depend on more than its key.
    """
    if analysis.key_place is None or len(analysis.pins) != 1:
        return None
    [pin] = analysis.pins
    values = _pinned_values(pin, plan)
    if values is None:
        return None
    labels = row_labels(*translated(pin.table, plan.schema_translate_map))
    own: dict[object, list[str]] = {}
    for value in values:
        slot = _slot(pin, value, declared.slots)
        if slot is None:
            return None
        own[value] = [slot_tag(label, pin.column, slot) for label in labels]
    return own or None


def _slot(pin: Pin, value: object, slots: int) -> int | None:
    # what number a database makes of text, only it knows
    return None if pin.number and not isinstance(value, int) else slot_of(value, slots)


def _pinned_values(pin: Pin, plan: Plan) -> Sequence[object] | None:
    values: list[object] = []
    for name in pin.parameters:
        value = plan.values.get(name)
        if isinstance(value, (list, tuple, set, frozenset)):
            values.extend(value)
        else:
            values.append(value)
    return values if len(values) <= MAX_PINNED_VALUES else None


# --- what no tag can tell ------------------------------------------------------------------------------


def unstable_function(analysis: Analysis, plan: Plan, declared: Declarations) -> str:
    """Name of a function whose answer may change without a write; empty where there is none."""
    dialect = plan.engine.dialect.name
    for name in sorted(analysis.functions):
        if not is_stable(name, dialect) and declared.sources.keys().isdisjoint(spellings(name.lower())):
            return name
    # of MySQL and MariaDB none is a moment
    for name, value in plan.values.items() if dialect not in ("mysql", "mariadb") else ():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            moment = MOMENT.search(each) if type(each) is str else None
            if moment is not None and not _stays_text(name, analysis, plan):
                return repr(moment.group(1).lower())
    return ""


def _stays_text(name: str, analysis: Analysis, plan: Plan) -> bool:
    """True if the database does not take a parameter for anything but text."""
    bind = plan.compiled.binds.get(name)
    if bind is None or name in analysis.casts or analysis.texts:
        return False
    # A parameter of a function, or beside a column of another type, may be taken for one of its type.
    return name in analysis.compared_as_text and is_text_type(bind.type)


def system_table(analysis: Analysis, plan: Plan, declared: Declarations) -> str:
    """Name of a table that the database itself writes; empty where there is none."""
    dialect = plan.engine.dialect.name
    named = {*analysis.tables, *analysis.text_tables}
    for schema, name in sorted(named, key=lambda table: (table[0] or "", table[1])):
        label = label_of(schema, name)
        mapped = bool(known_tables(name))
        system = is_system_table(schema, name, dialect, mapped)
        # as PostgreSQL calls them, and others often
        sequence = dialect != "sqlite" and name.lower().endswith("_seq") and not mapped
        if (system or sequence) and declared.sources.keys().isdisjoint(spellings(label)):
            return label
    return ""


def in_temporary_schema(analysis: Analysis, plan: Plan) -> bool:
    """True if one of the tables is said to be the connection's own."""
    named = {translated(table, plan.schema_translate_map) for table in analysis.tables}
    dialect = plan.engine.dialect.name
    return any(is_temporary_schema(schema, dialect) for schema, _ in named | analysis.text_tables)
