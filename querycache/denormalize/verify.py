"""Check and repair: compare what parents store with what their children say, and put it right.

Both walk over the parents by key, a batch at a time. `verify` reads only: stored value and recount of a parent come from
one statement, so writers at work cause no false alarm. `repair` locks the parents of a batch before it counts them and
commits after each batch, so no writer waits long, none is overwritten, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Enum,
    String,
    TypeDecorator,
    bindparam,
    cast,
    event,
    func,
    literal,
    select,
    tuple_,
)
from sqlalchemy.orm import Mapper, Session

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns, primary_keys
from querycache.denormalize.chain import Chain
from querycache.denormalize.configure import aggregates_of
from querycache.denormalize.errors import AggregateMismatch, DenormalizeError
from querycache.denormalize.images import recount, same
from querycache.denormalize.kinds import MAX, MIN, Merge
from querycache.denormalize.locks import Locks, keys_of
from querycache.denormalize.plan import Place, Plan, plan_of
from querycache.denormalize.work import connection_written
from querycache.denormalize.writing import Changes, is_parent, key_parameter, write
from querycache.errors import ConfigurationError

__all__ = ["Difference", "Report", "repair", "verify", "verify_at_commit"]

Chains = dict[Chain, list[Aggregate]]

Progress = Callable[[str, int, int, "Report"], None]
"""Called after each batch with (parent entity, parents done, parents in all, the report so far)."""


@dataclass(frozen=True)
class Difference:
    """One column of one parent that is, or was, wrong."""

    aggregate: str
    key: Key
    stored: Any
    counted: Any

    def __str__(self) -> str:
        shown = self.key[0] if len(self.key) == 1 else self.key
        return f"{self.aggregate} of {shown!r}: stored {self.stored!r}, should be {self.counted!r}"


@dataclass
class Report:
    """What `verify` or `repair` found.

    Attributes:
        checked: parents looked at, by name of their entity.
        differences: the columns that were wrong, at most `kept` of them; `wrong` counts all.
        repaired: columns written.
        last: the key of the last parent done, by entity; where `repair(after=…)` can go on.
    """

    checked: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    wrong: int = 0
    repaired: int = 0
    last: dict[str, Key] = field(default_factory=dict)
    kept: int = 1000

    @property
    def right(self) -> bool:
        return self.wrong == 0

    def add(self, difference: Difference) -> None:
        self.wrong += 1
        if len(self.differences) < self.kept:
            self.differences.append(difference)


def verify(
    bind: Session | Engine | Connection,
    target: Any,
    *,
    sample: int | None = None,
    batch: int = 500,
    progress: Progress | None = None,
) -> Report:
    """Compare stored and recounted values. Read only; safe beside writers, and without locks.

    Except on MariaDB and MySQL, for a parent that a Session's or Connection's transaction sees as wrong: what others have
    committed since it began shows in locking reads alone.

    Args:
        bind: what to read with. A Session is flushed first, and its transaction is the one that is checked.
        target: the aggregates: a MetaData, a declarative base, an entity, an attribute, or several of these.
        sample: parents of each entity to look at, chosen at random; None for all.
        batch: parents in one statement.
        progress: called after each batch.

    Returns:
        what was found; `report.right` if nothing is wrong.

    Raises:
        ConfigurationError: if `target` has no aggregates, or a number is not positive.
    """
    _positive("sample", sample)
    _positive("batch", batch)
    report = Report()
    if isinstance(bind, Session):
        bind.flush()
    for root, chains in _by_root(target).items():
        with _connection(bind, root) as connection:
            name = root.class_.__name__
            total, done = _total(connection, root), 0
            chosen = None
            if sample is not None and sample < total:
                chosen = set(random.Random().sample(range(total), sample))
                total = sample
            locks = Locks(connection, _plan(root), reads_only=True)
            current = Locks(connection, _plan(root))
            position = 0
            for keys in _batches(connection, root, batch):
                wanted = [
                    key for number, key in enumerate(keys, position) if chosen is None or number in chosen
                ]
                position += len(keys)
                if not wanted:
                    continue
                found = [difference for difference, _ in _differences(locks, chains, wanted)]
                if found and current.snapshot and not isinstance(bind, Engine):
                    # A transaction that has written sees its own rows as they are, and those of others as they were.
                    suspects = [key for key in wanted if any(one.key == key for one in found)]
                    found = [difference for difference, _ in _differences(current, chains, suspects)]
                for difference in found:
                    report.add(difference)
                done += len(wanted)
                report.last[name] = wanted[-1]
                report.checked[name] = done
                if progress is not None:
                    progress(name, done, total, report)
            report.checked[name] = done
    return report


def repair(
    bind: Engine,
    target: Any,
    *,
    batch: int = 200,
    after: dict[str, Key] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Put right what is wrong, a batch of parents in a transaction. Safe beside writers.

    Args:
        bind: the engine to work with.
        target: the aggregates, as for `verify`.
        batch: parents locked at a time.
        after: by entity name, the key to go on after; `Report.last` of a run that was interrupted.
        progress: called after each batch, when it is committed.

    Returns:
        what was wrong and has been written.

    Raises:
        ConfigurationError: if `target` has no aggregates, or a number is not positive.
    """
    _positive("batch", batch)
    report = Report(last=dict(after or {}))
    for root, chains in _by_root(target).items():
        name = root.class_.__name__
        with bind.connect() as connection:
            total = _total(connection, root)
        last, done = (after or {}).get(name), 0
        while True:
            with bind.begin() as connection:
                keys = _next(connection, root, last, batch)
            if not keys:
                break
            # The keys were read in another transaction: this one must not have a snapshot before it has the locks.
            with bind.begin() as connection:
                _repair(Locks(connection, _plan(root)), chains, keys, report)
            last = report.last[name] = keys[-1]
            done += len(keys)
            report.checked[name] = done
            if progress is not None:
                progress(name, done, total, report)
        report.checked[name] = done
    return report


def _repair(locks: Locks, chains: Chains, keys: Sequence[Key], report: Report) -> None:
    locks.lock({Place(next(iter(chains)), 0): keys}, roots=True)
    changes: Changes = {}
    for difference, aggregate in _differences(locks, chains, keys):
        changes.setdefault(difference.key, {})[aggregate] = Merge("set", difference.counted)
        report.add(difference)
        report.repaired += 1
    write(locks, changes)


def _differences(locks: Locks, chains: Chains, keys: Sequence[Key]) -> Iterator[tuple[Difference, Aggregate]]:
    found = {chain: recount(locks, chain, held, keys) for chain, held in chains.items()}
    for key in keys:
        for chain in chains:
            for aggregate, (stored, counted) in found[chain].get(key, {}).items():
                if not same(aggregate, stored, counted) and not _equal(
                    locks, aggregate, key, stored, counted
                ):
                    yield Difference(aggregate.name, key, stored, counted), aggregate


def _equal(locks: Locks, aggregate: Aggregate, key: Key, stored: Any, counted: Any) -> bool:
    """Whether two texts are equal by the collation of the column: which of these is the extreme is then for no one to say."""
    if aggregate.kind not in (MIN, MAX) or not (isinstance(stored, str) and isinstance(counted, str)):
        return False
    given = bindparam("denormalize_counted", type_=aggregate.column.type)
    statement = locks.plan.memo(
        ("equal", aggregate),
        lambda: select(func.count()).where(is_parent(aggregate), aggregate.column == given),
    )
    values = {key_parameter(number): part for number, part in enumerate(key)}
    return bool(locks.connection.scalar(locks.read(statement), {**values, "denormalize_counted": counted}))


def verify_at_commit(session_factory: Any, target: Any) -> Callable[[], None]:
    """For tests: verify all aggregates of `target` before every commit, and refuse the commit if one is wrong.

    Args:
        session_factory: a Session class, sessionmaker or Session.
        target: the aggregates, as for `verify`.

    Returns:
        a function that ends it.

    Raises:
        AggregateMismatch: out of `commit()`, naming what is wrong.
    """

    def check(session: Session) -> None:
        session.flush()  # the event comes before the last flush
        report = verify(session, target)
        if not report.right:
            shown = "; ".join(str(difference) for difference in report.differences[:10])
            raise AggregateMismatch(f"{report.wrong} wrong: {shown}")

    event.listen(session_factory, "before_commit", check)
    return lambda: event.remove(session_factory, "before_commit", check)


@contextmanager
def _connection(bind: Session | Engine | Connection, root: Mapper[Any]) -> Iterator[Connection]:
    if isinstance(bind, Engine):
        with bind.connect() as connection:
            yield connection
    elif isinstance(bind, Connection):
        yield bind
    else:
        yield connection_written(bind, root)


def _by_root(target: Any) -> dict[Mapper[Any], Chains]:
    """The parents are walked over once, for all the paths that begin at them."""
    found: dict[Mapper[Any], Chains] = {}
    for aggregate in aggregates_of(target):
        found.setdefault(aggregate.chain.root, {}).setdefault(aggregate.chain, []).append(aggregate)
    return found


def _plan(root: Mapper[Any]) -> Plan:
    plan = plan_of(root)
    assert plan is not None
    return plan


def _total(connection: Connection, root: Mapper[Any]) -> int:
    return connection.scalar(select(func.count()).select_from(root.class_)) or 0


def _batches(connection: Connection, root: Mapper[Any], size: int) -> Iterator[list[Key]]:
    last: Key | None = None
    while keys := _next(connection, root, last, size):
        yield keys
        last = keys[-1]


def _next(connection: Connection, root: Mapper[Any], last: Key | None, size: int) -> list[Key]:
    """The keys of the parents after `last`, in the database's own order.

    Raises:
        DenormalizeError: if `last` comes once more, since the database compares it otherwise than it gave it.
    """
    columns = attribute_columns(root.class_, primary_keys(root))
    compared = [_compared(column, connection.dialect.name) for column in columns]
    statement = select(*columns).order_by(*compared).limit(size)
    if last is not None:
        # A value by itself would be bound as its class is, and not as the column's type has it.
        given = [literal(part, column.type) for part, column in zip(last, columns, strict=True)]
        statement = statement.where(
            compared[0] > given[0] if len(columns) == 1 else tuple_(*compared) > tuple_(*given)
        )
    keys = keys_of(connection.execute(statement), len(columns))
    if last in keys:
        raise DenormalizeError(
            f"{root.class_.__name__} {last!r}: the database holds another key than it gives, as SQLite does for a Numeric"
            " with more decimal places than its type; the parents cannot be walked over by such keys"
        )
    return keys


def _compared(column: Any, dialect: str) -> Any:
    """A key column in one order, whether it is sorted by or compared: MariaDB and MySQL sort an ENUM by the order of its
    declaration and compare it as text."""
    type_ = column.type.impl if isinstance(column.type, TypeDecorator) else column.type
    return cast(column, String) if isinstance(type_, Enum) and dialect in ("mariadb", "mysql") else column


def _positive(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ConfigurationError(f"{name} must be at least 1, got {number}")
