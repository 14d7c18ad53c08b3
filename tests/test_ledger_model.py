"""The protocol of the ledger, explored exhaustively: no interleaving gives a stale hit.

Two writers, two readers, two tags and the witness; an entry that depends on both tags; a database with an
atomic COMMIT. Everything that can happen next is tried from every state that can be reached, breadth first,
so that a violation is found with a shortest history that leads to it:

- a writer may die between any two of its steps, and what it had sent may or may not arrive, its COMMIT
  included;
- a writer may be told that marking failed although it is done, and commit all the same (`on_outage="available"`); then
  it gives all that it was to mark a new generation, once or again and again, and takes no mark off (where only a part is
  done, nothing is promised until then; who is told that its end failed does nothing more, as one that died);
- any counter may be lost at any time (as often as the world allows), and the entry as often as it likes;
- a counter heals by lease as soon as the lease assumption allows: the writers that were at work when its
  incarnation began are dead or done with their COMMIT. Marks are given up at any time at all;
- the witness is proven clean while nothing has been lost.

The steps on versions are those of `querycache.versions`, which the stores carry out. Counters are read and
written one by one, in the order that the contract of a store says, with everything else in between. A store
that does more at once can only do less.

The claim that is checked: a lookup that begins after a COMMIT has taken effect is never answered with data
from before it, whether or not the writer lived to hear of it.

Then the protections are taken away one by one, and each time the search must find a stale hit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from querycache import versions
from querycache.versions import GENERATION, INCARNATION

A, B, WITNESS = COUNTERS = range(3)
TAGS = (A, B)


@dataclass(frozen=True)
class World:
    """What there is, and how much may go wrong."""

    writers: tuple[tuple[int, ...], ...]
    """The tags that each writer writes."""
    readers: int
    losses: int
    """How many times a counter may be lost."""
    heals: int
    """How many times marks may be given up."""
    lost_acknowledgements: bool = False
    """Whether a writer may be told that marking failed although it is done."""
    keeps_marks: bool = False
    """Whether only clean counters can be lost, as in the memory store."""


@dataclass(frozen=True)
class Protocol:
    """How the steps are done. The default is what the library does; a mutant replaces something."""

    begun: Callable[[int | None, int], int] = versions.begun
    ended: Callable[[int, int], int] = versions.ended
    bumped: Callable[[int], int] = versions.bumped
    planted: Callable[[int], int] = versions.planted
    cleared: Callable[[int, int], int] = versions.cleared
    healed: Callable[[int, int], int] = versions.healed
    is_provable: Callable[[int], bool] = versions.is_provable
    marks: bool = True
    marks_witness_first: bool = True
    unmarks_witness_last: bool = True
    reads_witness_last: bool = True
    plants_clean_at_once: bool = False
    plants_clean_later: bool = False
    reads_versions_before_query: bool = True
    waits_for_lease: bool = True
    missing_is_valid: bool = False
    missing_witness_is_clean: bool = False
    deletes_entries: bool = False


MEMORY = Protocol(
    begun=lambda version, new: versions.begun(new if version is None else version, new),
    plants_clean_at_once=True,
    missing_witness_is_clean=True,
)
"""The memory store, which never loses a mark."""


class Stale(Exception):
    """A hit with data from before a COMMIT."""


# What a writer does next: mark counter number n of its order (n = 0, 1 …); or a word; or ("end", n), or ("bump", n) where
# it does not know of its marks.
READY, UNSURE, DECIDED, OVER = "ready", "unsure", "decided", "over"
IDLE = ("idle",)

# What a process remembers of a tag: that it had the version which is the present one, or a former one that
# another process remembers, too (1, 2 …), or that it was missing. It never remembers other than clean
# versions.
PRESENT, MISSING = 0, -1
Memory = tuple[int | None, ...]
NO_MEMORY: Memory = (None, None)


class State(NamedTuple):
    counters: tuple[int | None, ...]
    """Quarantine and marks of each counter; None if it is missing. All that is ever asked of incarnation and
    generation is whether they are those that somebody remembers."""
    born: tuple[int, ...]
    """The writers (as bits) that were at work when the incarnation of each counter began, and still are."""
    quiet_since: tuple[bool, ...]
    """Whether the witness has been clean at a moment since each tag got its present version."""
    quiet_when_missing: tuple[bool, ...]
    """Whether each tag was once seen missing, and the witness clean after that."""
    entry: tuple[int, Memory] | None
    """Data (the writers whose COMMIT it has seen, as bits), and vector."""
    database: int
    """The writers whose COMMIT has taken effect (bits)."""
    writers: tuple[tuple[Any, tuple[bool, ...]], ...]
    """What each does next, and whether its marks are on the present incarnation of each counter."""
    readers: tuple[tuple[Any, ...], ...]
    losses: int
    heals: int
    proven: bool
    """Whether nothing had been lost at a moment since the witness got its present version."""


def replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def at_work(state: State) -> int:
    """The writers that have begun to mark and whose COMMIT may still take effect (bits)."""
    found = 0
    for index, (step, _) in enumerate(state.writers):
        if step in (READY, UNSURE) or (type(step) is int and step > 0):
            found |= 1 << index
    return found


class Model:
    """What can happen next in a state."""

    def __init__(self, world: World, protocol: Protocol) -> None:
        self.world = world
        self.protocol = protocol
        self.everything = 2 ** len(world.writers) - 1

    def initial(self) -> State:
        return State(
            counters=(None, None, None),
            born=(0, 0, 0),
            quiet_since=(False, False),
            quiet_when_missing=(False, False),
            entry=None,
            database=0,
            writers=((0, (False, False, False)),) * len(self.world.writers),
            readers=(IDLE,) * self.world.readers,
            losses=self.world.losses,
            heals=self.world.heals,
            proven=False,
        )

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        for index in range(len(state.writers)):
            yield from self.writer(state, index)
        for index in range(len(state.readers)):
            if index == 0 or state.readers[index] != state.readers[index - 1]:
                yield from self.reader(state, index)
        if state.entry is not None:
            yield "the entry is lost", state._replace(entry=None)
        if not self.protocol.deletes_entries:
            yield from self.losses(state)
            yield from self.healing(state)

    # --- Counters ---------------------------------------------------------------------------------

    def put(
        self, state: State, counter: int, change: Callable[[int | None, int], int | None], by: int = 0
    ) -> State:
        """Take a step on a counter.

        :param change: gives the new version for the present one and a version of a fresh incarnation.
        :param by: the writer that does it (as a bit); its own mark is not lost if it creates the counter.
        """
        old = state.counters[counter]
        before = None if old is None else INCARNATION + old
        after = change(before, 2 * INCARNATION)
        if after == before:
            return state
        if after is not None and (before is None or after >= 2 * INCARNATION):
            state = state._replace(
                born=replaced(state.born, counter, at_work(state) & ~by),
                writers=tuple((step, replaced(marks, counter, False)) for step, marks in state.writers),
            )
        state = state._replace(
            counters=replaced(state.counters, counter, None if after is None else after % GENERATION)
        )
        if counter == WITNESS:
            return state._replace(proven=False)

        def past(memory: Any) -> Any:
            return replaced(memory, counter, 9) if memory[counter] == PRESENT else memory

        if self.protocol.reads_witness_last:
            state = state._replace(quiet_since=replaced(state.quiet_since, counter, False))
        return state._replace(
            entry=None if state.entry is None else (state.entry[0], past(state.entry[1])),
            readers=tuple(
                tuple([past(part) if type(part) is tuple else part for part in reader])
                for reader in state.readers
            ),
        )

    def is_quiet(self, state: State) -> bool:
        witness = state.counters[WITNESS]
        return self.protocol.missing_witness_is_clean if witness is None else witness == 0

    def canonical(self, state: State) -> State:
        """The state without what can make no difference any more, and with names that do not tell its
        history.

        A version that a tag has had never comes again. So it matters only while a lookup that is under way
        has read it, and may find an entry that was stored under it.
        """
        working = at_work(state)
        read = [reader[4] for reader in state.readers if reader[0] == "fetch"]
        names = [
            {
                past: number
                for number, past in enumerate(sorted({r[tag] for r in read if (r[tag] or 0) > 0}), 1)
            }
            for tag in TAGS
        ]

        def alive(memory: Memory) -> bool:
            return self.protocol.missing_is_valid or all(
                part is None or part <= 0 or part in names[tag] for tag, part in enumerate(memory)
            )

        def named(part: Any) -> Any:
            if type(part) is not tuple or self.protocol.missing_is_valid:
                return part
            return tuple(names[tag].get(past, past) for tag, past in enumerate(part))

        entry = state.entry
        if entry is not None and (entry[0] == self.everything or not alive(entry[1])):
            entry = None
        readers = [
            tuple([named(part) for part in reader])
            if reader[:2] != ("fill", self.everything)
            and all(alive(part) for part in reader if type(part) is tuple)
            else IDLE
            for reader in state.readers
        ]
        readers.sort(key=repr)
        quiet = self.is_quiet(state)
        return state._replace(
            born=tuple([born & working for born in state.born]),
            quiet_since=tuple(
                [(quiet or since) and state.counters[tag] != 0 for tag, since in enumerate(state.quiet_since)]
            )
            if self.protocol.reads_witness_last
            else tuple([quiet or since for since in state.quiet_since]),
            quiet_when_missing=tuple(
                [
                    (quiet and state.counters[tag] is None) or once
                    for tag, once in enumerate(state.quiet_when_missing)
                ]
            )
            if self.protocol.plants_clean_later
            else state.quiet_when_missing,
            entry=None if entry is None else (entry[0], named(entry[1])),
            readers=tuple(readers),
        )

    # --- Writers ----------------------------------------------------------------------------------

    def writer(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        step, marks = state.writers[index]
        tags = self.world.writers[index]
        bit = 1 << index

        def then(step: Any, state: State = state) -> State:
            marks = (False, False, False) if step == OVER else state.writers[index][1]
            return state._replace(writers=replaced(state.writers, index, (step, marks)))

        if step == OVER:
            return
        if step != 0:
            yield f"writer {index} dies", then(OVER)
        if type(step) is int:
            if not self.protocol.marks:
                yield f"writer {index} is ready", then(READY)
                return
            order = (WITNESS, *tags) if self.protocol.marks_witness_first else (*tags, WITNESS)
            counter = order[step]
            after = self.put(state, counter, self.protocol.begun, bit)
            marks = replaced(after.writers[index][1], counter, True)
            after = after._replace(writers=replaced(after.writers, index, (step, marks)))
            yield f"writer {index} marks {counter}", then(step + 1 if step + 1 < len(order) else READY, after)
        elif step == READY:
            # One that dies while its COMMIT is under way is no different from one that dies right after, or
            # right before. One whose COMMIT fails does what others do, and nothing has to be seen of it.
            yield f"writer {index} commits", then(DECIDED, state._replace(database=state.database | bit))
            if self.world.lost_acknowledgements:
                yield f"writer {index} is told that marking failed", then(UNSURE)
        elif step == UNSURE:
            # Where the COMMIT is refused then, it is no different from one that dies.
            committed = state._replace(database=state.database | bit)
            yield f"writer {index} commits", then(("bump", 0), committed)
        elif step[0] == "bump":
            order = (WITNESS, *tags)
            counter = order[step[1]]
            after = self.put(
                state,
                counter,
                lambda version, new: None if version is None else self.protocol.bumped(version),
            )
            yield (
                f"writer {index} gives {counter} a new generation",
                then(("bump", step[1] + 1) if step[1] + 1 < len(order) else OVER, after),
            )
            yield f"writer {index} is told that this failed", then(("bump", 0), after)
        elif self.protocol.deletes_entries:
            yield f"writer {index} deletes", then(OVER, state._replace(entry=None))
        else:
            number = 0 if step == DECIDED else step[1]
            order = (*tags, WITNESS) if self.protocol.unmarks_witness_last else (WITNESS, *tags)
            counter = order[number]
            incarnation = 1 if marks[counter] else 0

            def end(version: int | None, new: int) -> int | None:
                return None if version is None else self.protocol.ended(version, incarnation)

            after = self.put(state, counter, end)
            yield (
                f"writer {index} ends {counter}",
                then(("end", number + 1) if number + 1 < len(order) else OVER, after),
            )

    # --- Readers ----------------------------------------------------------------------------------

    def reader(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        reader = state.readers[index]

        def then(reader: tuple[Any, ...], state: State = state) -> State:
            return state._replace(readers=replaced(state.readers, index, reader))

        match reader:
            case ("idle",):
                # Data that will be read from the database later will be new enough for a lookup that begins
                # now.
                known = [part[1] for part in state.readers if part[0] == "fill"]
                if any(
                    state.database & ~data for data in [*known, *([state.entry[0]] if state.entry else [])]
                ):
                    yield (
                        f"reader {index} looks up",
                        then(("fetch", state.database, None, NO_MEMORY, NO_MEMORY)),
                    )
                # That the lookup misses, and how tags are cleared, needs no states of its own: what counts is
                # that a reader has seen both tags clean in their present versions.
                if state.database == self.everything:
                    return  # what it would fill could never be stale
                if self.protocol.deletes_entries or not self.protocol.reads_versions_before_query:
                    yield f"reader {index} misses", then(("query", NO_MEMORY))
                elif all(state.counters[tag] == 0 for tag in TAGS):
                    yield f"reader {index} misses", then(("query", (PRESENT, PRESENT)))
            case ("fetch", required, None, _, read) if state.entry is not None:
                data, vector = state.entry
                yield (
                    f"reader {index} reads the entry",
                    self.judged(then, ("fetch", required, data, vector, read)),
                )
                yield from self.reads_tag(state, index, then)
            case ("fetch", _, _, _, _):
                yield from self.reads_tag(state, index, then)
            case ("query", memory):
                yield f"reader {index} asks the database", then(("fill", state.database, memory))
            case ("fill", data, memory):
                if not self.protocol.reads_versions_before_query:
                    if any(state.counters[tag] != 0 for tag in TAGS):
                        yield f"reader {index} does not fill", then(IDLE)
                        return
                    memory = (PRESENT, PRESENT)
                yield f"reader {index} fills", then(IDLE, state._replace(entry=(data, memory)))

    def reads_tag(self, state: State, index: int, then: Callable[..., State]) -> Iterator[tuple[str, State]]:
        _, required, data, vector, read = state.readers[index]
        for tag in TAGS:
            if read[tag] is None and not self.protocol.deletes_entries:
                present = state.counters[tag]
                name = f"reader {index} reads {tag}"
                if present is None and self.protocol.missing_is_valid:
                    yield (
                        name,
                        self.judged(then, ("fetch", required, data, vector, replaced(read, tag, MISSING))),
                    )
                elif present == 0:
                    yield (
                        name,
                        self.judged(then, ("fetch", required, data, vector, replaced(read, tag, PRESENT))),
                    )
                else:
                    yield name, then(IDLE)

    def judged(self, then: Callable[..., State], reader: tuple[Any, ...]) -> State:
        """What becomes of a lookup: a hit, a miss, or neither yet."""
        _, required, data, vector, read = reader
        if data is None:
            return then(reader)
        if not required & ~data:
            return then(IDLE)  # whether it hits or misses is no matter any more
        if not self.protocol.deletes_entries:
            for tag in TAGS:
                if read[tag] not in (None, MISSING, vector[tag]):
                    return then(IDLE)
                if read[tag] is None and vector[tag] != PRESENT and not self.protocol.missing_is_valid:
                    return then(IDLE)
            if None in read:
                return then(reader)
        raise Stale

    # --- The rest of the world --------------------------------------------------------------------

    def losses(self, state: State) -> Iterator[tuple[str, State]]:
        for counter in COUNTERS:
            present = state.counters[counter]
            if present is not None and state.losses and (present == 0 or not self.world.keeps_marks):
                lost = self.put(state, counter, lambda version, new: None)
                yield f"counter {counter} is lost", lost._replace(losses=state.losses - 1)

    def healing(self, state: State) -> Iterator[tuple[str, State]]:
        """What readers do to counters that are missing or unclean."""
        protocol = self.protocol
        working = at_work(state)
        for counter in COUNTERS:
            present = state.counters[counter]
            if present is None:
                yield (
                    f"counter {counter} is planted",
                    self.put(state, counter, lambda _, new: protocol.planted(new)),
                )
                if counter != WITNESS and (
                    (protocol.plants_clean_at_once and self.is_quiet(state))
                    or (protocol.plants_clean_later and state.quiet_when_missing[counter])
                ):
                    yield f"counter {counter} is planted clean", self.put(state, counter, lambda _, new: new)
                continue
            if present == 0:
                continue
            if counter != WITNESS and state.quiet_since[counter]:
                yield f"counter {counter} is cleared", self.put(state, counter, protocol.cleared)  # type: ignore[arg-type]
            if versions.pending_of(present):
                if state.heals:
                    healed = self.put(state, counter, protocol.healed)  # type: ignore[arg-type]
                    yield f"marks on {counter} are given up", healed._replace(heals=state.heals - 1)
            elif not state.born[counter] & working or not protocol.waits_for_lease:
                yield f"counter {counter} heals by lease", self.put(state, counter, protocol.healed)  # type: ignore[arg-type]
        witness = state.counters[WITNESS]
        if witness is not None and protocol.is_provable(witness):
            if state.losses == self.world.losses and not state.proven:
                yield "nothing was lost", state._replace(proven=True)
            if state.proven:
                yield "the witness is cleared", self.put(state, WITNESS, protocol.cleared)  # type: ignore[arg-type]


def explore(world: World, protocol: Protocol) -> tuple[int, list[str] | None]:
    """Try everything. Gives the number of states, and a shortest history to a stale hit if there is one."""
    model = Model(world, protocol)
    start = model.initial()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    known = {start}  # also as they were before they were made canonical, which saves making them so
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        try:
            for name, after in model.steps(state):
                if after in known:
                    continue
                known.add(after)
                after = model.canonical(after)
                if after not in came_from:
                    known.add(after)
                    came_from[after] = (state, name)
                    waiting.append(after)
        except Stale:
            history = ["a stale hit"]
            while (before := came_from[state]) is not None:
                state, name = before
                history.append(name)
            return len(came_from), history[::-1]
    return len(came_from), None


# --- The protocol as it is ----------------------------------------------------------------------------


WORLDS = {
    "two writers": (World(((A, B), (B,)), readers=2, losses=1, heals=1), Protocol(), 50_000),
    "both on both tags": (World(((A, B), (A, B)), readers=2, losses=1, heals=0), Protocol(), 20_000),
    "in opposite order": (World(((A, B), (B, A)), readers=2, losses=1, heals=0), Protocol(), 20_000),
    "both on both tags, many losses": (
        World(((A, B), (A, B)), readers=1, losses=2, heals=1),
        Protocol(),
        200_000,
    ),
    "on different tags": (World(((A,), (B,)), readers=2, losses=1, heals=1), Protocol(), 40_000),
    "many losses": (World(((A, B),), readers=2, losses=3, heals=2), Protocol(), 10_000),
    "lost acknowledgements": (
        World(((A, B), (B,)), readers=1, losses=1, heals=1, lost_acknowledgements=True),
        Protocol(),
        100_000,
    ),
    "lost acknowledgements on one tag": (
        World(((A,), (A,)), readers=2, losses=1, heals=1, lost_acknowledgements=True),
        Protocol(),
        90_000,
    ),
    "memory": (World(((A, B), (B,)), readers=2, losses=1, heals=0, keeps_marks=True), MEMORY, 9_000),
}


@pytest.mark.parametrize("world", WORLDS)
def test_no_interleaving_gives_a_stale_hit(world: str) -> None:
    there, protocol, at_least = WORLDS[world]
    states, history = explore(there, protocol)
    assert history is None, "\n".join(history or ())
    assert states >= at_least  # the search has really been everywhere


# --- Without one of its protections -------------------------------------------------------------------


def flag_begun(version: int | None, new: int) -> int:
    return versions.begun(version, new) if version is None or not versions.pending_of(version) else version


def always_unmarked(version: int, incarnation: int) -> int:
    return versions.ended(version, versions.incarnation_of(version))


def cleared_in_place(version: int, new: int) -> int:
    return version - version % GENERATION + GENERATION


def created_without_quarantine(version: int | None, new: int) -> int:
    return new + 1 if version is None else version + 1


def bumped_clean(version: int) -> int:
    return version - version % GENERATION + GENERATION


def healed_for_another_loss(version: int, new: int) -> int:
    return versions.planted(new) if versions.pending_of(version) else versions.cleared(version, new)


SMALL = World(((A,),), readers=1, losses=1, heals=1)
"""The smallest world that shows most faults."""
PAIR = World(((A,), (A,)), readers=1, losses=1, heals=0)

MUTANTS = {
    "entries are deleted on write instead of versioned": (SMALL, Protocol(deletes_entries=True)),
    "bumped only after COMMIT": (SMALL, Protocol(marks=False)),
    "the mark is a flag and not a count": (PAIR, Protocol(begun=flag_begun)),
    "no quarantine for what was lost": (
        SMALL,
        Protocol(begun=created_without_quarantine, planted=lambda new: new),
    ),
    "no quarantine for what a reader planted": (SMALL, Protocol(planted=lambda new: new)),
    "no quarantine for what a writer created": (PAIR, Protocol(begun=created_without_quarantine)),
    "a mark is taken off whatever incarnation is found": (PAIR, Protocol(ended=always_unmarked)),
    "versions are read after the query": (SMALL, Protocol(reads_versions_before_query=False)),
    "a missing tag is taken for fresh": (SMALL, Protocol(missing_is_valid=True)),
    "a missing witness is taken for clean": (SMALL, Protocol(missing_witness_is_clean=True)),
    "the witness is read before the tag that it clears": (SMALL, Protocol(reads_witness_last=False)),
    "the witness is marked after the tags": (SMALL, Protocol(marks_witness_first=False)),
    "a missing tag is planted clean on an earlier look": (SMALL, Protocol(plants_clean_later=True)),
    "marks are cleared without a new incarnation": (
        PAIR,
        Protocol(cleared=cleared_in_place, unmarks_witness_last=False),
    ),
    "marks given up are no quarantine": (SMALL, Protocol(healed=versions.cleared)),
    "marks given up are taken for something that was lost": (SMALL, Protocol(healed=healed_for_another_loss)),
    "a new generation takes the marks of others off": (
        World(((A,), (A,)), readers=1, losses=0, heals=0, lost_acknowledgements=True),
        Protocol(bumped=bumped_clean),
    ),
    "quarantine does not last a lease": (SMALL, Protocol(waits_for_lease=False)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_a_protection_a_stale_hit_is_found(mutant: str) -> None:
    world, protocol = MUTANTS[mutant]
    _, history = explore(world, protocol)
    assert history is not None
    assert history[-1] == "a stale hit"


def test_a_history_is_the_shortest_that_leads_to_it() -> None:
    world, protocol = MUTANTS["bumped only after COMMIT"]
    _, history = explore(world, protocol)
    assert history is not None
    assert "writer 0 commits" in history
    assert not any("dies" in step or "lost" in step or "given up" in step for step in history)
