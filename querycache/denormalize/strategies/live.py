"""Children as the session holds them: the parent that an object will have, and its row as it will be written.

What "flush" and "memory" share. Both look at objects before the database has seen them, so both must say what an
attribute will be that nobody has set yet, and refuse where only the database knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import ClauseElement, select
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, RelationshipDirection, Session, object_session
from sqlalchemy.orm.attributes import get_history, has_parent, set_committed_value
from sqlalchemy.orm.base import NO_VALUE, PassiveFlag

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns, in_order, primary_keys
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.images import ChildRow
from querycache.denormalize.kinds import Parts, is_finite
from querycache.denormalize.locks import Locks, chunks, parameters
from querycache.denormalize.places import rounded
from querycache.denormalize.queries import Queried, image_query
from querycache.denormalize.touched import Touched

__all__ = [
    "LiveRow",
    "NotYet",
    "Placed",
    "Taken",
    "find_parent",
    "folded",
    "going",
    "is_root",
    "known_parent",
    "link_of",
    "load_parents",
    "loaded",
    "marked",
    "old_rows",
    "refuse_late",
    "refuse_late_deletions",
    "staying",
]


_AS_FLUSHED: Final = PassiveFlag.PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS
"""How the unit of work asks what has changed in a collection: as far as that is known without loading it."""


class NotYet(Exception):
    """The object is being made, and what an expression reads is still to be set."""


class NotGenerated(UncoveredChange, AttributeError):
    """A key that the database is still to generate."""


class Taken(NamedTuple):
    """What a child was taken to be before a flush.

    Attributes:
        link: its foreign key then.
        parent: the object below which it will be, or None.
        value: what it counts for there.
    """

    link: Key | None
    parent: Any
    value: Any


class LiveRow:
    """An object as a row, for expressions in Python.

    `overlay` are values that are about to be assigned. Attributes that were never set have their column's
    default, or None.

    Raises:
        UncoveredChange: on reading an attribute whose value the database will compute.
        NotYet: if `partial`, on reading an attribute that nobody has set yet and that has no default.
    """

    __slots__ = ("_chain", "_instance", "_overlay", "_partial")

    def __init__(
        self, instance: Any, chain: Chain, overlay: dict[str, Any] | None = None, *, partial: bool = False
    ) -> None:
        self._partial = partial
        self._instance = instance
        self._chain = chain
        self._overlay = overlay or {}

    def __getattr__(self, name: str) -> Any:
        chain: Chain = self._chain
        if name not in chain.leaf_columns:
            raise AttributeError(
                f"a Python expression over {chain.leaf.class_.__name__} reads {name!r}; it is given the row's column"
                f" attributes, {', '.join(chain.leaf_columns)}"
            )
        if name in self._overlay:
            value = self._overlay[name]
        elif name in chain.leaf_changed_by_update and self._is_updated(name):
            raise UncoveredChange(
                f"{chain.leaf.class_.__name__}.{name} is changed by the UPDATE itself, too late for a strategy that computes"
                " in Python; take strategy 'sql'"
            )
        elif name in self._instance.__dict__ or sqlalchemy_inspect(self._instance).has_identity:
            value = loaded(self._instance, name)
        else:
            value = self._default(name)
        if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
            raise UncoveredChange(
                f"{chain.leaf.class_.__name__}.{name} was given as a SQL expression, whose value a strategy that computes in"
                " Python cannot know; assign a value, or take strategy 'sql'"
            )
        if isinstance(value, Decimal):
            return rounded(value, chain.leaf.column_attrs[name].columns[0].type)
        return value

    def _is_updated(self, name: str) -> bool:
        """Whether the row is there, and the application has not said what the attribute is to be."""
        state = sqlalchemy_inspect(self._instance)
        return state.has_identity and name not in state.committed_state

    def _default(self, name: str) -> Any:
        column: Any = self._chain.leaf.column_attrs[name].columns[0]
        if column.default is not None and column.default.is_scalar:
            return column.default.arg
        if self._partial:
            raise NotYet(name)
        if column.default is not None or column.server_default is not None:
            raise UncoveredChange(
                f"{self._chain.leaf.class_.__name__}.{name} gets its default when it is inserted, too late for a strategy"
                " that computes in Python; set it, or take strategy 'sql'"
            )
        if column.primary_key and column is column.table.autoincrement_column:
            raise NotGenerated(
                f"{self._chain.leaf.class_.__name__}.{name} is generated when the row is inserted, too late for a strategy"
                " that computes in Python; set it, or take strategy 'sql'"
            )
        return None


def loaded(instance: Any, name: str) -> Any:
    """A column attribute; read from the row where the mapping or a query has forbidden that an access loads it."""
    try:
        return getattr(instance, name)
    except InvalidRequestError:
        state, session = sqlalchemy_inspect(instance), object_session(instance)
        if session is None or not state.has_identity:
            raise
        entity = state.mapper.class_
        keys = attribute_columns(entity, primary_keys(state.mapper))
        same = [column == part for column, part in zip(keys, state.identity, strict=True)]
        connection = session.connection(bind_arguments={"mapper": state.mapper})
        row = connection.execute(select(getattr(entity, name)).where(*same)).first()
        if row is None:
            raise
        set_committed_value(instance, name, row[0])
        return row[0]


def going(session: Session, chain: Chain, touched: Touched) -> dict[int, Any]:
    """The children that the flush will delete, by their identity in memory: marked as deleted, or orphans.

    An object marked as deleted stays if it is added to the collection of a parent that is flushed too: there the unit of
    work takes the deletion back.

    Raises:
        UncoveredChange: for an orphan that is added there, of which the unit of work decides by chance.
    """
    found = {
        id(child): child
        for child in (*session.deleted, *touched.orphans.values())
        if sqlalchemy_inspect(child).mapper.isa(chain.leaf)
    }
    if not found:
        return found
    for parent in (*session.new, *session.dirty):
        above = sqlalchemy_inspect(parent)
        for step in above.mapper.relationships:
            if step.direction is not RelationshipDirection.ONETOMANY or step.viewonly:
                continue
            if step.key in above.dict and step.key not in above.committed_state and above.has_identity:
                continue
            for child in get_history(parent, step.key, _AS_FLUSHED).added:
                if found.pop(id(child), None) is None:
                    continue
                state = sqlalchemy_inspect(child)
                if state in touched.orphans:
                    raise UncoveredChange(
                        f"{state.mapper.class_.__name__} {state.identity!r} has left a parent whose orphans are deleted,"
                        f" and been put into {step} in one flush, which may delete it or not; flush() between the two, or"
                        " take strategy 'sql'"
                    )
    return found


def marked(session: Session, chain: Chain) -> set[Any]:
    """The states of the children that are marked as deleted."""
    return {state for child in session.deleted if (state := sqlalchemy_inspect(child)).mapper.isa(chain.leaf)}


def refuse_late_deletions(session: Session, aggregate: Aggregate, were: set[Any]) -> None:
    """Refuse a flush in which children have been marked as deleted, or not any more, since the aggregate was brought forward.

    Raises:
        UncoveredChange: naming such a child.
    """
    for state in marked(session, aggregate.chain) ^ were:
        raise _late(state, aggregate, "deleted, or kept from being deleted,")


class Placed(NamedTuple):
    """A child that will be there after a flush, its foreign key now, and its parent: the object, or its key where the child
    says no more; both None if it has none."""

    child: Any
    link: Key
    parent: Any
    key: Key | None


def staying(session: Session, chain: Chain, touched: Touched, persistent: Iterable[Any]) -> list[Placed]:
    """Where the children will be that the flush does not delete: those that have rows, and the new ones."""
    gone = going(session, chain, touched)
    adopted, released = _collections(session, chain)
    fresh = [child for child in session.new if sqlalchemy_inspect(child).mapper.isa(chain.leaf)]
    found: list[Placed] = []
    for child in (*persistent, *fresh):
        if id(child) in gone:
            continue
        says, parent, key = known_parent(child, chain)
        if id(child) in adopted and (parent is None or parent is adopted[id(child)]):
            parent, key = adopted[id(child)], None
        elif id(child) in released and not (says and parent is not None):
            parent, key = None, None
        if parent is not None and parent not in session:
            # The unit of work leaves the key alone that refers to an object which it does not know.
            _, parent, key = _by_key(child, chain.links[0].attributes, {})
        found.append(Placed(child, link_of(child, chain), parent, key))
    return found


def _collections(session: Session, chain: Chain) -> tuple[dict[int, Any], set[int]]:
    """Children put into, and taken out of, their parents' collections; those of parents that go lose their key.

    Raises:
        UncoveredChange: for a child that is put into those of two parents.
    """
    step = chain.relationships[0]
    name = step.key
    adopted: dict[int, Any] = {}
    released: set[int] = set()
    for parent in (*session.new, *session.dirty):
        state = sqlalchemy_inspect(parent)
        if name not in state.mapper.relationships or not _is_of_path(state.mapper, chain):
            continue
        if name in state.committed_state or not state.has_identity:
            history = state.attrs[name].history
            for child in history.added:
                if adopted.setdefault(id(child), parent) is not parent:
                    raise UncoveredChange(
                        f"{type(child).__name__} {sqlalchemy_inspect(child).identity or ''} was put into {step} of two"
                        " parents in one flush, and which of them it gets is a matter of chance; remove it from the one, or"
                        " flush() between the two"
                    )
            # One that another parent has taken since keeps its key, as far as the unit of work knows of its parents.
            released.update(
                id(child)
                for child in history.deleted
                if child is not None and not has_parent(type(parent), child, name)
            )
    for parent in session.deleted:
        state = sqlalchemy_inspect(parent)
        if name not in state.mapper.relationships or not _is_of_path(state.mapper, chain):
            continue
        if step.passive_deletes != "all":
            # The unit of work loads what it needs for that, too.
            history = state.attrs[name].history if step.passive_deletes else state.attrs[name].load_history()
            released.update(id(child) for child in history.unchanged)
    return adopted, released


def _is_of_path(mapper: Mapper[Any], chain: Chain) -> bool:
    """Whether its collection, if it has one, is that of the path: a base class may have it, too, or not."""
    return mapper.isa(chain.root) or chain.root.isa(mapper)


def old_rows(locks: Locks, chain: Chain, keys: set[Key]) -> dict[Key, list[ChildRow]]:
    """The rows of the children of those keys, by the key of their parent."""
    queried: Queried = locks.plan.memo(
        ("rows", chain, 1, ()), lambda: image_query(chain, (), 1, (), rows=True)
    )
    statement = locks.read(queried.statement)
    found: dict[Key, list[ChildRow]] = {}
    for chunk in chunks(keys):
        for row in locks.connection.execute(statement, parameters(chunk)):
            values = ChildRow(chain.leaf.class_.__name__, chain.leaf_columns, row[queried.values])
            found.setdefault(tuple(row[queried.parent]), []).append(values)
    return found


def known_parent(
    instance: Any, chain: Chain, overlay: dict[str, Any] | None = None
) -> tuple[bool, Any, Key | None]:
    """The parent that `instance` says it has: (whether it says, the object or None, its key or None).

    A relationship that was set wins over the foreign key, as it will in the flush.
    """
    overlay = overlay or {}
    state = sqlalchemy_inspect(instance)
    for reverse in chain.reverses[0]:
        if reverse in overlay and not (state.has_identity and overlay[reverse] is _committed(state, reverse)):
            return True, overlay[reverse], None
    for reverse in chain.reverses[0]:
        if reverse in overlay:  # which is as it was, so that the unit of work leaves the foreign key alone
            continue
        held = state.dict.get(reverse)
        set_anew = reverse in state.committed_state and held is not _committed(state, reverse)
        if set_anew or (not state.has_identity and held is not None):
            return True, held, None
    names = chain.links[0].attributes
    if any(name in overlay for name in names):
        return _by_key(instance, names, overlay)
    if state.has_identity or any(name in state.dict for name in names):
        return _by_key(instance, names, overlay)
    return False, None, None


def _committed(state: Any, name: str) -> Any:
    """What an attribute refers to in the database, as far as the object knows."""
    return state.committed_state.get(name, state.dict.get(name, NO_VALUE))


def _by_key(instance: Any, names: tuple[str, ...], overlay: dict[str, Any]) -> tuple[bool, Any, Key | None]:
    key = tuple(overlay[name] if name in overlay else loaded(instance, name) for name in names)
    if any(isinstance(part, ClauseElement) for part in key):
        raise UncoveredChange(
            f"{type(instance).__name__}.{', '.join(names)} was given as a SQL expression; a strategy that computes in"
            " Python cannot know the parent. Assign a value, or take strategy 'sql'"
        )
    return True, None, None if None in key else key


def link_of(child: Any, chain: Chain) -> Key:
    """The foreign key of an object as it is in memory."""
    return tuple(child.__dict__.get(name) for name in chain.links[0].attributes)


def refuse_late(
    session: Session, child: Any, aggregate: Aggregate, was: Taken | None, now: Callable[[], Any]
) -> None:
    """Refuse what a flush has made of a child, if it is not what it was taken to be when the aggregate was brought forward.

    Args:
        was: what it was taken to be; None for an object that was not there.
        now: what it counts for.

    Raises:
        UncoveredChange: naming the child.
    """
    chain = aggregate.chain
    link = link_of(child, chain)
    if was is None:
        same = None in link
    elif was.parent is None:
        same = None in link or link == was.link
    else:
        same = now() == was.value and (link == was.link or _leads_to(session, link, was.parent))
    if not same:
        raise _late(sqlalchemy_inspect(child), aggregate, "added or changed")


def _late(state: Any, aggregate: Aggregate, what: str) -> UncoveredChange:
    key = tuple(state.mapper.primary_key_from_instance(state.object))
    return UncoveredChange(
        f"{state.mapper.class_.__name__} {key!r} was {what} after {aggregate.name} had been looked at: by a before_flush"
        " listener registered later than this package's, by a mapper event such as before_insert, or by a relationship, a"
        " default or the database, which give what the aggregate reads. Register that listener on the Session class before"
        " the mappers configure, or take strategy 'sql'"
    )


def _leads_to(session: Session, link: Key, parent: Any) -> bool:
    state = sqlalchemy_inspect(parent)
    if None in link:
        return parent in session.deleted
    return link in (state.identity, tuple(state.mapper.primary_key_from_instance(parent)))


def folded(aggregate: Aggregate, values: Iterable[Any]) -> Parts:
    """The parts of values that objects hold, who may hold what the column would convert, or the database refuse.

    Raises:
        UncoveredChange: if they cannot be added up, or compared.
    """
    try:
        parts = aggregate.kind.fold(values)
    except TypeError as error:
        raise UncoveredChange(
            f"{aggregate.name}: strategy {aggregate.strategy!r} cannot add up or compare its values in Python ({error});"
            " give the attributes values of their columns' types, or take strategy 'sql'"
        ) from error
    for value in parts if aggregate.kind.additive else ():
        if not is_finite(value):
            raise UncoveredChange(
                f"{aggregate.name}: strategy {aggregate.strategy!r} cannot take {value} away again; keep it out of what is"
                " added up, or take strategy 'sql'"
            )
    return parts


def find_parent(session: Session | None, chain: Chain, key: Key) -> Any:
    """The parent of that key if the session holds it."""
    if session is None:
        return None
    found = session.identity_map.get(chain.root.identity_key_from_primary_key(key))
    return found if is_root(found, chain) else None


def is_root(parent: Any, chain: Chain) -> bool:
    """Whether it has the aggregates of a chain; those of a subclass the objects of its base class have not."""
    return parent is not None and sqlalchemy_inspect(parent).mapper.isa(chain.root)


def load_parents(session: Session, chain: Chain, keys: set[Key]) -> dict[Key, Any]:
    """The parents of those keys, new ones and those that are about to get them too, loaded where the session does not hold
    them; without those that do not exist."""
    found: dict[Key, Any] = {}
    pending: dict[Key, Any] | None = None
    names = chain.keys[0]
    for key in in_order(keys):
        parent = find_parent(session, chain, key)
        if parent is None:
            if pending is None:
                pending = {
                    tuple([each.__dict__.get(name) for name in names]): each
                    for each in (*session.dirty, *session.new)
                    if is_root(each, chain)
                }
            parent = pending.get(key)
        if parent is None:
            parent = session.get(chain.root.class_, key if len(key) > 1 else key[0])
        if parent is not None:
            found[key] = parent
    return found
