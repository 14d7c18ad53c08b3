"""Everything that querycache takes from SQLAlchemy without a public name for it, in one place.

Each function states what it stands on; the versions read are 2.0.40 to 2.0.57 and 2.1.0 to 2.1.9, and
``tests/test_sa_internals.py`` fails when one of the names moves. No other room of querycache touches a
private name of SQLAlchemy.

==================  ============================================================================================
``handlers``        what a ``do_orm_execute`` handler is given, and the options of the statement in it
``planning``        what a statement is compiled to, and what that comes to with values for its parameters
``replay``          results over rows that were stored earlier
``executing``       a statement that is run against the database, or replayed
``transactions``    sessions, their connections, and what transactions of these see
``mapping``         what is mapped and declared
``dialect``         what a dialect does: it executes each statement, and ends each transaction
``writing``         what statements write, and what a flush has written
==================  ============================================================================================
"""

from querycache.sa_internals.dialect import (
    ask_for,
    driver_settings,
    has_listeners,
    heed_others,
    json_serializer,
    note_reading,
    tap,
    tell_of_reading,
    untap,
)
from querycache.sa_internals.executing import Invocation, Prepared, prepare
from querycache.sa_internals.handlers import (
    StatementOption,
    completes,
    effective_options,
    expire_loaded_since,
    given_options,
    is_textual,
    later_handlers,
    load_options,
    loads_so_far,
    run_later_handlers,
    run_statement,
)
from querycache.sa_internals.mapping import (
    known_metadata,
    known_tables,
    load_in_order,
    mappers_of,
    remembered,
    tables_of,
)
from querycache.sa_internals.planning import Plan, Unpreparable, key_place
from querycache.sa_internals.transactions import (
    autobegin,
    begins_transaction,
    checked_out,
    connections,
    default_isolation_level,
    driver_isolation_level,
    has_open_statement,
    in_transaction,
    is_autocommit,
    is_initializing,
    is_told,
    isolation_level,
    may_block,
    reads_uncommitted,
    root_engine,
    was_given,
)
from querycache.sa_internals.writing import (
    UNKNOWN,
    Written,
    cache_key_of,
    columns_set,
    columns_upserted,
    custom_constructs,
    flush_of,
    flushed,
    holds_text,
    inserts_one,
    is_flushing,
    is_of_flush,
    is_of_relationship,
    is_unit_of_work,
    just_flushed,
    made_by_flush,
    names_entity,
    old_and_new,
    prefixes,
    replaces,
    savepoint_word,
    unflushed,
    written,
)

__all__ = [
    "UNKNOWN",
    "Invocation",
    "Plan",
    "Prepared",
    "StatementOption",
    "Unpreparable",
    "Written",
    "ask_for",
    "autobegin",
    "begins_transaction",
    "cache_key_of",
    "checked_out",
    "columns_set",
    "columns_upserted",
    "completes",
    "connections",
    "custom_constructs",
    "default_isolation_level",
    "driver_isolation_level",
    "driver_settings",
    "effective_options",
    "expire_loaded_since",
    "flush_of",
    "flushed",
    "given_options",
    "has_listeners",
    "has_open_statement",
    "heed_others",
    "holds_text",
    "in_transaction",
    "inserts_one",
    "is_autocommit",
    "is_flushing",
    "is_initializing",
    "is_of_flush",
    "is_of_relationship",
    "is_textual",
    "is_told",
    "is_unit_of_work",
    "isolation_level",
    "json_serializer",
    "just_flushed",
    "key_place",
    "known_metadata",
    "known_tables",
    "later_handlers",
    "load_in_order",
    "load_options",
    "loads_so_far",
    "made_by_flush",
    "mappers_of",
    "may_block",
    "names_entity",
    "note_reading",
    "old_and_new",
    "prefixes",
    "prepare",
    "reads_uncommitted",
    "remembered",
    "replaces",
    "root_engine",
    "run_later_handlers",
    "run_statement",
    "savepoint_word",
    "tables_of",
    "tap",
    "tell_of_reading",
    "unflushed",
    "untap",
    "was_given",
    "written",
]
