"""The read path: decide, look up, replay or freeze.

One handler of ``do_orm_execute`` answers every select for which somebody asked the cache:

1. **Decide** what is asked (:mod:`querycache.requests`). Some statements are never answered from the cache: they are
   *bypassed*, with a reason.
2. **Let the others speak.** Handlers registered later may still change the statement (tenant filters!), or
   run it several times (shards). They are run first, and the cache answers each statement that comes out; where
   none does, the answer is a handler's own, and none of the cache's business.
3. **Look up**, in one round trip: the entry, and the versions of the tags on which it depends.
4. **Replay** the entry if its versions still stand; otherwise ask the database, and **freeze** what it
   returns under the versions that were read *before* it was asked.

SQLAlchemy completes objects by further statements (``selectinload`` …). They reach this handler while the
first one is being loaded (:mod:`querycache.load`), and are replayed from, or frozen into, its entry. Where a
write has reached only them, the first one is replayed, and the database is asked from the first that was written on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import msgspec
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import ORMExecuteState, Session

from querycache import sa_internals
from querycache.codec import Corrupt, Unstorable
from querycache.declarations import Declarations
from querycache.errors import CacheMiss
from querycache.events import Explanation, Outcome, Telemetry
from querycache.flight import Flights
from querycache.frozen import Entry, FrozenStatement, fits, freeze, layout, merge_frozen_result
from querycache.ledger import Reading, changes_here
from querycache.load import Load, around_in
from querycache.options import CacheOptions, Policy
from querycache.regions import Region
from querycache.requests import ByKey, Completion, Refresh, Refused, Request, Requests
from querycache.sa_internals import Prepared
from querycache.shared_rows import Vectors
from querycache.transactions import Transaction
from querycache.writes import Writes

__all__ = ["Interceptor"]

# What a handler makes itself cannot be looked up before that handler has run: it may as well have changed the statement,
# or read what no tag of the statement covers. Once it has run, there is nothing left to save.
_BY_A_HANDLER = "answered by a handler"


_NONE: frozenset[str] = frozenset()


class _Torn(BaseException):
    """What was replayed, or was about to be, is not what the database shows to this transaction; says why.

    It passes through listeners of the application, which are not to take it for an error of theirs.

    Attributes:
        load: what was replayed in vain; None where that had not begun.
    """

    def __init__(self, reason: str, load: Load | None = None) -> None:
        super().__init__(reason)
        self.load = load


class _Explained(Exception):
    """Carries an explanation out of Session.execute."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_MOST_LOADS = 64
"""Where an entry grows by what handlers add to further statements alone, it starts anew at so many of them."""


_QUESTION = "_querycache_question"
"""An execution option: the statement is not to be answered, but explained."""


class Interceptor:
    """The ``do_orm_execute`` handler of one QueryCache.

    Args:
        region_for: gives the region of a name, the default one for None.
        writes: knows what the transactions of a session have written.
        declared: what the application has said about views, triggers and functions.
        telemetry: is told each decision.
        scope: gives, for a session, a value that keeps answers apart (tenant, locale, role).
        policies: what is cached without a word in the statement, by mapped class.
    """

    def __init__(
        self,
        region_for: Callable[[str | None], Region],
        writes: Writes,
        declared: Declarations,
        telemetry: Telemetry,
        scope: Callable[[Session], object] | None,
        policies: Mapping[type, Policy],
    ) -> None:
        self._region_for = region_for
        self._requests = Requests(writes, declared, scope, policies)
        self._writes = writes
        self._declared = declared
        self._telemetry = telemetry
        self._flights = Flights()

    def __call__(self, state: ORMExecuteState) -> Result[Any] | None:
        """Answer the statement, or return None to leave it to SQLAlchemy."""
        around = around_in(state.session)
        if around is not None:
            if later := sa_internals.later_handlers(state):
                return None if self in later else sa_internals.run_later_handlers(state, self._last)
            return self._within(around, state)
        options = self._requests.wanted(state)
        if options is None and _QUESTION not in state.local_execution_options:
            return None
        if later := sa_internals.later_handlers(state):
            # where the cache is attached to a Session and to its class, the last call is the one that counts
            return None if self in later else self._after_others(state, options)
        return self._answer(state, options)

    def _within(self, load: Load, state: ORMExecuteState) -> Result[Any] | None:
        """Answer a statement that runs while something is loaded: for it, or of an application's listener."""
        if sa_internals.completes(state) and not sa_internals.completes_other(
            state, load.request.invocation.load
        ):
            return self._complete(load, state)
        result = self._answer(state, self._requests.wanted(state))
        if sa_internals.may_be_completed(state.statement):
            # It may be newer, and lazy loads of its objects cannot be told from those of these.
            load.doubtful = True
        return result

    def _after_others(self, state: ORMExecuteState, options: CacheOptions | None) -> Result[Any]:
        """Answer each statement that comes out of the handlers registered later: one, or several, or none."""
        came_out: list[ORMExecuteState] = []

        def last(state: ORMExecuteState) -> Result[Any]:
            came_out.append(state)
            return self._last(state)

        result = sa_internals.run_later_handlers(state, last)
        if options is not None and not came_out:
            self._leave(self._region_for(options.region), options, _BY_A_HANDLER)
        return result

    def _last(self, state: ORMExecuteState) -> Result[Any]:
        """Answer the statement after all other handlers have had their say."""
        around = around_in(state.session)
        if around is not None:
            result = self._within(around, state)
        else:
            result = self._answer(state, self._requests.wanted(state))
        return sa_internals.run_statement(state) if result is None else result

    def _answer(self, state: ORMExecuteState, options: CacheOptions | None) -> Result[Any] | None:
        if _QUESTION in state.local_execution_options:
            raise _Explained(self._explanation(state, options))
        if options is None:
            return None
        region = self._region_for(options.region)
        try:
            request = self._requests.request(state, region, options)
        except Refused as refusal:
            self._leave(region, options, str(refusal))
            return self._hand_back(state) if refusal.flushed else None
        before = sa_internals.loads_so_far()
        try:
            result = self._look_up(request)
        except _Torn as torn:
            if torn.load is not None:
                sa_internals.forget_loaded_since(request.session, before, torn.load.loaded)
            self._leave(region, options, str(torn))
            result = None
        return self._hand_back(state) if result is None else result

    @staticmethod
    def _hand_back(state: ORMExecuteState) -> Result[Any] | None:
        """Leave to SQLAlchemy a statement that the session was flushed for, which is to be done once."""
        if sa_internals.is_clean(state.session):
            return None
        with state.session.no_autoflush:  # a listener has added something in the flush
            return sa_internals.run_statement(state)

    def _leave(self, region: Region, options: CacheOptions, reason: str) -> None:
        """Leave a statement to the database, where that may be asked."""
        self._telemetry.emit("bypass", region.name, options.name, reason)
        _check_allowed(region, options, options.name, reason)

    def explain(self, session: Session, statement: Any) -> Explanation:
        """What would be done with a statement, found by doing it up to the point where it would be answered."""
        try:
            with session.no_autoflush:
                session.execute(statement, execution_options={_QUESTION: True})
        except _Explained as explained:
            return explained.explanation
        return Explanation(False, _BY_A_HANDLER)

    def _explanation(self, state: ORMExecuteState, options: CacheOptions | None) -> Explanation:
        if options is None:
            return Explanation(False, "no cache_key, no policy")
        region = self._region_for(options.region)
        try:
            request = self._requests.request(state, region, options)
        except Refused as refusal:
            return Explanation(False, str(refusal), region.name)
        lookup = region.lookup(request.key, request.tag_keys, request.options.exact)
        distrust = "" if lookup.reading is None else _distrust(request, request.transactions, lookup.reading)
        entry = lookup.entry if lookup.outcome == "hit" else None
        obstacle = "" if entry is not None or lookup.reading is None else lookup.reading.obstacle
        return Explanation(
            cacheable=not distrust,
            reason=distrust or lookup.reason or obstacle or lookup.outcome,
            region=region.name,
            key=request.key,
            tags=tuple(request.tags),
            stored=entry is not None,
            age=None if entry is None else max(0.0, time.time() - entry.created),
            promise=region.promise(self._writes.phases.marks(region.ledger)),
        )

    # --- look up -----------------------------------------------------------------------------------

    def _look_up(self, request: Request, may_wait: bool = True) -> Result[Any] | None:
        region, options = request.region, request.options
        changes = changes_here()
        lookup = region.lookup(request.key, request.tag_keys, options.exact, request.prepared.begin_replay)
        outcome, reason, entry, reading = lookup.outcome, lookup.reason, lookup.entry, lookup.reading
        if request.transactions and reading is not None:
            distrust = _distrust(request, request.transactions, reading)
            if distrust:
                self._leave(region, options, distrust)
                return None
        if options.mode == "refresh":
            outcome, reason, entry = "miss", "refresh", None
        elif entry is not None and options.exact and not fits(entry, request.prepared):
            warnings.warn(
                f"cache_exact: what is stored under {request.name!r} does not have the columns of the "
                "statement that asks for it, so the database was asked. Give each kind of row its own cache_key",
                RuntimeWarning,
                stacklevel=2,
            )
            outcome, reason, entry = "miss", "layout", None
            # valid by its own tags; those of this statement may never have been looked up
            reading = region.observe(request.tag_keys)
        if entry is not None and reading is not None and not reading.fallen:
            try:
                result = self._replay(request, entry, reading, changes)
            except Corrupt as fault:
                outcome, reason, entry = "miss", fault.reason, None
            else:
                self._telemetry.emit("hit", region.name, request.name)
                return result
        if options.mode == "only":
            self._telemetry.emit(outcome, region.name, request.name, reason)
            _check_allowed(region, options, request.name, reason or outcome)
        if reading is None:
            self._telemetry.emit(outcome, region.name, request.name, reason)
            return self._ask_database(request, reading)
        flight = (region.name, request.key, reading.versions)
        # not for what cannot be stored, nor where it is to be asked in any case
        may_wait = may_wait and reading.fillable and options.mode != "refresh"
        if may_wait and sa_internals.may_block() and self._flights.wait(flight):
            return self._look_up(request, may_wait=False)
        self._telemetry.emit(outcome, region.name, request.name, reason)
        with self._flights.flying(flight):
            if entry is not None:
                with suppress(Corrupt):
                    return self._replay(request, entry, reading, changes)
            return self._ask_database(request, reading)

    # --- replay, or ask the database and freeze ------------------------------------------------------

    def _replay(self, request: Request, entry: Entry, reading: Reading, changes: int) -> Result[Any]:
        # which triggers there are may not have been known to the process that has stored it
        checks = bool(reading.fallen or self._declared.of_triggers)
        if sa_internals.autobegin(request.session, request.bind):  # then listeners may have written
            request.transactions = self._writes.transactions(request.session, request.bind)
            if reason := _distrust(request, request.transactions, reading):
                raise _Torn(reason)
            if changes != changes_here():  # and committed, by another Session
                raise _Torn("written meanwhile")
        load = Load(request, reading, set(request.tag_keys), changes, entry, checks)
        if reading.fallen:  # then the database is asked, which may show that this cannot stand
            load.loaded = sa_internals.loaded_objects(request.session)
        result = load.surround(lambda: merge_frozen_result(request.prepared, entry.main))
        if load.grown:
            if not reading.fallen:
                load.needed.update(reading.tags)
                if len(entry.loads) <= _MOST_LOADS:
                    load.loads = {**entry.loads, **load.loads}
            self._fill(load, entry.main, entry.created)
        return result

    def _ask_database(self, request: Request, reading: Reading | None) -> Result[Any]:
        load = Load(request, reading, set(request.tag_keys), changes_here())
        created = time.time()
        main, result = load.surround(lambda: self._run(load, request.prepared))
        self._fill(load, main, created)
        return result

    def _run(self, load: Load, prepared: Prepared) -> tuple[FrozenStatement | None, Result[Any]]:
        """Ask the database, freeze what it returns, and load that."""
        description, rows, rowcount = prepared.execute()
        frozen = None
        if prepared.rewritten:
            load.spoiled = "rewritten"
        # now, for a listener may end the transaction before all is loaded
        asked = None if load.reading is None else msgspec.structs.replace(load.reading, payload=None)
        load.spoiled = load.spoiled or self._unfit_transaction(load.request, prepared.invocation.bind, asked)
        if not load.unfit:
            try:
                frozen = freeze(description, rows, rowcount)
                description = frozen.description  # as it is for a hit, for which a replay may have begun
            except Unstorable as refusal:
                load.spoiled = refusal.reason
        return frozen, prepared.replay(description, rows, rowcount)

    def _complete(self, load: Load, state: ORMExecuteState) -> Result[Any] | None:
        """Answer a statement that SQLAlchemy runs to complete the objects of the surrounding load."""
        try:
            asked = self._requests.completion(state, load.request)
        except Refresh:
            # Not part of the answer, but of what a listener does with it. Of what completes the object then, nobody can tell.
            load.doubtful = True
            return None
        except Refused as refusal:
            load.spoiled, load.grown, load.doubtful = str(refusal), True, True
            _check_allowed(load.request.region, load.request.options, load.request.name, load.spoiled)
            if not load.replays:
                return None
            result = sa_internals.run_statement(state)
            if self._is_torn(load):
                raise _Torn("snapshot", load) from None
            return result
        bind = asked.prepared.invocation.bind
        begun = sa_internals.autobegin(load.request.session, bind)
        changes = changes_here()
        # where a listener has ended the transaction, has committed elsewhere, or said what it has written
        if begun or changes != load.changes:
            load.changes, load.doubtful = changes, True
            load.shown.clear()
        stored = load.find(asked)
        if stored is not None and not self._has_own_view(load, asked):
            return merge_frozen_result(asked.prepared, stored)
        _check_allowed(load.request.region, load.request.options, load.request.name, "incomplete")
        load.observe(asked.tags())
        load.grown = True
        by_key = self._requests.by_key(load.request, asked)
        frozen = None if by_key is None else self._known_rows(load, asked, by_key)
        if by_key is not None and frozen is not None:
            load.loads[asked.mark] = frozen
            load.borrowed.update(by_key.common, *by_key.own.values())
            return merge_frozen_result(asked.prepared, frozen)
        load.later = True
        frozen, result = self._run(load, asked.prepared)
        if load.replays and bind not in load.shown:
            if self._is_torn(load):
                raise _Torn("snapshot", load)
            if frozen is not None and frozen.rowcount > 0:
                load.shown.add(bind)
        if frozen is not None:
            load.loads[asked.mark] = frozen
            if by_key is not None:
                load.learned.append((by_key, frozen))
        return result

    def _known_rows(self, load: Load, asked: Completion, by_key: ByKey) -> FrozenStatement | None:
        """The rows that a further statement asks for, from this and other answers, where all of them still stand."""
        request, reading = load.request, load.reading
        known = request.region.shared_rows
        if request.options.mode == "refresh" or self._has_own_view(load, asked):
            return None
        entry = None if load.later else load.entry
        if entry is None and not (
            known.has(by_key.family, by_key.own) and self._writes.phases.marks(request.region.ledger)
        ):
            return None
        for transaction in self._writes.transactions(request.session, request.bind, before_lookup=True):
            if transaction.snapshot is not None:
                return None
        if entry is None:
            # The database was asked after the versions were read, and what completes its answer is to be no older.
            reading = request.region.observe((*by_key.common, *chain.from_iterable(by_key.own.values())))
            if load.entry is not None and _wrote_between(load.reading, reading):
                return None  # the database tells whether a snapshot of it must not show that
        elif reading is not None:
            stored = entry.loads.get(asked.mark)
            if stored is not None and reading.fallen.isdisjoint(by_key.common):
                standing = _vectors(by_key, reading, reading.fallen)
                known.learn(by_key.family, by_key.own, standing, stored, by_key.place)
        return None if reading is None else known.find(by_key.family, _vectors(by_key, reading))

    def _has_own_view(self, load: Load, asked: Completion) -> bool:
        """True if the Session may see something else than the cache: what a listener has written meanwhile, what a connection
        shows that was given to the Session for a further statement alone, or what the cache server was not told of yet."""
        request, bind = load.request, asked.prepared.invocation.bind
        if self._writes.phases.owes(request.region.ledger):
            return True
        if bind is request.bind:
            transactions = self._writes.noted(request.session, bind)
        else:
            transactions = self._writes.transactions(request.session, bind)
            new = [each for each in transactions if not any(each is known for known in request.transactions)]
            if any(each.snapshot is not None for each in new):
                return True
        return any(each.wrote and each.hides(asked.tags()) for each in transactions)

    def _is_torn(self, load: Load) -> bool:
        """True if what was replayed may not be what a snapshot of the database shows, which may have begun only now: not each
        statement of its transaction did begin it."""
        request, reading = load.request, load.reading
        request.transactions = self._writes.transactions(request.session, request.bind, before_lookup=True)
        if all(transaction.snapshot is None for transaction in request.transactions):
            return False
        now = None if reading is None else request.region.observe(reading.tags)
        if reading is None or now is None:
            return True
        return not now.confirms(reading, load.not_replayed(reading))

    def _fill(self, load: Load, main: FrozenStatement | None, created: float) -> None:
        request = load.request
        outcome: Outcome = "bypass"
        reason = load.unfit or self._unfit_transaction(request, request.bind, load.reading)
        seconds = request.region.seconds_left(request.options.ttl, created)
        if seconds == 0 and not reason:
            reason = "expired"
        if main is not None and load.reading is not None and not reason:
            shape = layout(request.prepared.invocation.statement) if request.options.exact else ""
            entry = Entry(created, main, load.loads, shape)
            reading = load.reading.of(load.needed)
            reason = request.region.fill(request.key, entry, reading, seconds, request.tag_keys)
            outcome = "error" if reason else "fill"
            for by_key, frozen in load.learned if not reason else ():
                vectors = _vectors(by_key, load.reading)
                request.region.shared_rows.learn(by_key.family, by_key.own, vectors, frozen, by_key.place)
        self._telemetry.emit(outcome, request.region.name, request.name, reason)

    def _unfit_transaction(self, request: Request, bind: Engine | Connection, reading: Reading | None) -> str:
        """Why what this session's transaction has just read must not be shared; empty where it may."""
        transactions = self._writes.transactions(request.session, bind)
        if any(transaction.wrote for transaction in transactions):
            return "after write"
        if sa_internals.reads_uncommitted(request.session):
            return "uncommitted"
        return _distrust(request, transactions, reading) if reading is not None else ""


def _distrust(request: Request, transactions: Sequence[Transaction], reading: Reading) -> str:
    """Why these transactions of the session must not be answered from the cache; empty where they may."""
    ledger = request.region.ledger
    for transaction in transactions:
        if transaction.snapshot is not None:
            snapshot = transaction.snapshot.get(ledger)
            if snapshot is None or not ledger.shows(snapshot, reading):
                return "snapshot"
        if transaction.tags and not set(request.region.tag_keys(transaction.tags)).isdisjoint(reading.tags):
            return "own write"
    return ""


def _vectors(by_key: ByKey, reading: Reading, without: frozenset[str] = _NONE) -> Vectors:
    """The versions of what the rows of a further statement depend on, but for rows that depend on certain tags."""
    found = dict(zip(reading.tags, reading.versions, strict=True))
    return Vectors(
        tuple((tag, found.get(tag)) for tag in by_key.common),
        {key: tuple(map(found.get, tags)) for key, tags in by_key.own.items() if without.isdisjoint(tags)},
    )


def _wrote_between(earlier: Reading | None, later: Reading | None) -> bool:
    """True unless nobody has written between two readings."""
    witness = None if earlier is None else earlier.witness
    return witness is None or later is None or later.witness != witness


def _check_allowed(region: Region, options: CacheOptions, name: str, reason: str) -> None:
    """Raise CacheMiss where the database may not be asked."""
    if options.mode == "only":
        raise CacheMiss(
            f"region {region.name!r} has no answer for {name or 'a statement'!r} ({reason}), and cache_mode='only' forbids "
            "to ask the database"
        )
