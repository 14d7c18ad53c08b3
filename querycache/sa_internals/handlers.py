"""What a ``do_orm_execute`` handler is given, and the options of the statement in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import util
from sqlalchemy.engine import Result
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.orm.interfaces import UserDefinedOption

__all__ = [
    "StatementOption",
    "completes",
    "completes_other",
    "effective_options",
    "given_options",
    "is_textual",
    "later_handlers",
    "load_options",
    "marked",
    "may_be_completed",
    "run_later_handlers",
    "run_statement",
    "uninterpreted_options",
    "untouched",
]


class StatementOption(UserDefinedOption):
    """An option that tells statements apart when they are compiled.

    SQLAlchemy takes no notice of user-defined options there. It then loads with the compiled statement's, of which it
    pairs each with the executed statement's in the same place: one is lost, or takes another's place.
    """

    _is_has_cache_key = True

    def _gen_cache_key(self, anon_map: Any, bindparams: Any) -> tuple[type, type]:
        return StatementOption, type(self)


def untouched(state: ORMExecuteState) -> bool:
    """True where no handler has replaced the statement or added options, so that what SQLAlchemy derived holds."""
    return (
        not getattr(state, "_update_execution_options", True)
        and state.bind_arguments.get("clause") is state.statement
        and "sa_top_level_orm_context" not in state.local_execution_options
    )


def effective_options(state: ORMExecuteState) -> Mapping[str, Any]:
    """Execution options as they stand now, with what handlers before this one have added.

    ``ORMExecuteState.execution_options`` is computed once and does not see what handlers change.
    """
    if untouched(state):
        return state.execution_options
    return state.statement._execution_options.union(state.local_execution_options)  # type: ignore[no-any-return]


given_options: Callable[[Any], tuple[Mapping[str, Any], tuple[Any, ...]]] = cast(
    "Any", attrgetter("_execution_options", "_with_options")
)
"""The execution options of a statement, and those given to ``statement.options(…)``, in order."""


def load_options(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Options of the ORM's loading that are not the default: refresh_state, populate_existing, yield_per.

    They are given by the legacy Query, made from execution options, or set where an object is refreshed, which no
    flag of the event tells of for every kind of statement.
    """
    given = options.get("_sa_orm_load_options")
    if given is None:
        return None
    return {
        "refresh_state": given._refresh_state,
        "populate_existing": given._populate_existing,
        "yield_per": given._yield_per,
    }


def later_handlers(state: ORMExecuteState) -> Sequence[Callable[[ORMExecuteState], Any]]:
    """The ``do_orm_execute`` handlers that SQLAlchemy would call after the current one."""
    return state._remaining_events()


def run_later_handlers(state: ORMExecuteState, tail: Callable[[ORMExecuteState], Result[Any]]) -> Result[Any]:
    """Run the handlers registered later than the current one, and then ``tail`` as the last of them.

    Handlers that rewrite the statement have done so when ``tail`` is called. Handlers that answer by
    ``invoke_statement()``, once or once per shard, reach ``tail`` through each of these invocations. The
    caller must return the result, so that SQLAlchemy does not run the later handlers a second time.
    """
    events: list[Any] = [*state._remaining_events(), tail]
    state._events_todo = events
    for index, handler in enumerate(events):
        state._starting_event_idx = index
        result = handler(state)
        if result:
            return cast("Result[Any]", result)
    raise AssertionError("the tail handler always returns a result")


def run_statement(state: ORMExecuteState) -> Result[Any]:
    """Run the statement as SQLAlchemy does after the last handler, for one that must return a result."""
    state.local_execution_options = cast("Any", uninterpreted_options(state))
    return state.invoke_statement()


def uninterpreted_options(state: ORMExecuteState) -> Mapping[str, Any]:
    """The options given to one execution, to be interpreted anew after handlers have added theirs.

    SQLAlchemy has interpreted them once, for handlers to see, and that has given a post-load all options of
    the surrounding statement. Those that say how to load must not be taken for the post-load's own now.
    """
    options = state.local_execution_options
    # missing in versions that interpret the mixed options themselves
    added: Mapping[str, Any] | None = getattr(state, "_update_execution_options", None)
    if added is None or "sa_top_level_orm_context" not in options:
        return options
    return util.immutabledict(
        {name: value for name, value in options.items() if name not in _INTERPRETED_OPTIONS or name in added}
    )


# the execution options that QueryContext.default_load_options is made from
_INTERPRETED_OPTIONS = frozenset({"autoflush", "identity_token", "populate_existing", "yield_per"})


def completes(state: ORMExecuteState) -> bool:
    """True for a statement by which SQLAlchemy completes objects that it loads, as their loaders ask for.

    Those for subclasses (``selectin_polymorphic``) are told by their parameter, and by options that neither a
    select() nor a Query has.
    """
    if state.is_relationship_load or state.is_column_load:
        return True
    options = getattr(state.statement, "_compile_options", None)
    given = isinstance(state.parameters, Mapping) and "primary_keys" in state.parameters
    return given and not getattr(options, "_use_legacy_query_style", True)


_LOAD = "_querycache_load"
# what statements of subqueryload have among their options, in 2.1 and in 2.0
_OF_SUBQUERY_LOADS = frozenset({("subquery_rewritten_path", None), ("subquery_paths", None)})


def marked(options: Mapping[str, Any], load: object) -> Mapping[str, Any]:
    """Options with a mark, which those of the statements have that complete the objects."""
    if options.get(_LOAD) is load:
        return options  # handed on by SQLAlchemy
    both: Mapping[str, Any] = util.immutabledict(options).union({_LOAD: load})
    return both


def completes_other(state: ORMExecuteState, load: object) -> bool:
    """True for a statement that completes objects which are loaded without this mark, of a statement that a listener sent.

    Lazy loads do not tell, nor do the statements for subclasses.
    """
    context: Any = state.local_execution_options.get("sa_top_level_orm_context")
    options = state.statement.get_execution_options() if context is None else context.execution_options
    tells = context is not None or not _OF_SUBQUERY_LOADS.isdisjoint(options)
    return tells and options.get(_LOAD) is not load


def may_be_completed(statement: Any) -> bool:
    """False for a statement that gives no objects, as far as it tells."""
    if is_textual(statement):
        return False
    columns = getattr(statement, "column_descriptions", None)
    return columns is None or any(isinstance(column["type"], type) for column in columns)


def is_textual(statement: Any) -> bool:
    """True for ``text("…")`` or ``tstring(…)`` as a whole statement, of which the event does not tell whether it selects."""
    return statement.__visit_name__ in ("textclause", "tstring")
