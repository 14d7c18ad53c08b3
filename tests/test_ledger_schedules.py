"""The ledger's own code under random schedules: real `Ledger`, real backend, and anything in between two
commands.

The model in `test_ledger_model.py` is exhaustive, but it is a model. Here the code itself runs: each process
is a greenlet with a ledger of its own, which yields before every single command that reaches the server, so
that all others may come between, keys may be lost, time may pass, and it may be killed. The memcached backend
runs over a server of sixty lines in this file, the Redis backend on a real server with its scripts, which are lost at
times as well: what it sends at once goes there command by command. What is checked is the same: a lookup that begins
after a COMMIT has taken effect is not answered with data from before it; and one of a transaction that has a snapshot
of the database is answered with what that shows, neither older nor newer.
"""

from __future__ import annotations

import random
import select
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha1
from typing import Any

import hiredis
import pytest
import redis
from greenlet import GreenletExit, getcurrent, greenlet

from querycache import ledger, versions
from querycache.backends import memcached
from querycache.backends import redis as redis_backend
from querycache.backends.memcached import MemcachedBackend
from querycache.backends.memory import MemoryBackend
from querycache.backends.meta import Pipeline, Reply
from querycache.backends.redis import RedisBackend
from querycache.backends.resp import Batch, Wire, pack
from querycache.ledger import Ledger
from querycache.store import StoreBackend

TAGS = ("a", "b")
LEASE = 10.0
STEPS = 1_000


class Stale(Exception):
    """A hit with data from before a COMMIT."""


class FakeMemcached:
    """What memcached does for the meta commands that the backend uses."""

    def __init__(self) -> None:
        self.items: dict[bytes, tuple[bytes, int]] = {}
        self.lost = False
        self._cas = 0

    def execute(self, command: bytes) -> Reply:
        line, _, data = command.partition(b"\r\n")
        verb, key, *rest = line.split(b" ")
        present = self.items.get(key)
        if verb == b"mg":
            return Reply(b"EN") if present is None else self._value(present, rest)
        flags = {flag[:1]: flag[1:] for flag in rest}
        if b"C" in flags:
            if present is None:
                return Reply(b"NF")
            if int(flags[b"C"]) != present[1]:
                return Reply(b"EX")
        if verb == b"ms":
            if flags.get(b"M") == b"E" and present is not None:
                return Reply(b"NS")
            return self._put(key, data, rest, b"HD")
        assert verb == b"ma"
        if present is None:
            return self._put(key, flags[b"J"], rest, b"VA") if b"N" in flags else Reply(b"NF")
        return self._put(key, b"%d" % (int(present[0]) + int(flags[b"D"])), rest, b"VA")

    def _put(self, key: bytes, value: bytes, flags: Sequence[bytes], code: bytes) -> Reply:
        self._cas += 1
        self.items[key] = (value, self._cas)
        reply = self._value(self.items[key], flags)
        return reply if b"v" in flags else Reply(b"HD", reply.flags)

    def _value(self, item: tuple[bytes, int], flags: Sequence[bytes]) -> Reply:
        return Reply(b"VA", (b"c%d" % item[1],) if b"c" in flags else (), item[0])


class Pausing:
    """A store that lets others come before each of its steps."""

    def __init__(self, store: StoreBackend, run: Run) -> None:
        self._store = store
        self._run = run

    def __getattr__(self, name: str) -> Any:
        step = getattr(self._store, name)
        if not callable(step):
            return step

        def paused(*arguments: Any) -> Any:
            self._run.pause()
            found = step(*arguments)
            self._run.live_or_die()
            return found

        return paused


class Run:
    """One schedule: who goes next, what is lost, how much time passes, and who dies, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.respects_lease = True
        self.ends_first = False
        self.loss_rate = 0.005
        self.committed = dict.fromkeys(TAGS, 0)
        self.at_work: dict[greenlet, float] = {}
        self.doomed: set[greenlet] = set()
        self.hits = self.parts = self.fills = self.shown = 0
        self.main = getcurrent()
        self.processes: list[greenlet] = []
        self.store: Any = None
        self.lose: Callable[[], None] = lambda: None

    def start(self, role: Callable[[Ledger], None], ledger: Ledger | None = None) -> greenlet:
        return greenlet(lambda: role(ledger or self.ledger()))

    def ledger(self) -> Ledger:
        return Ledger(self.store, "witness", lease=LEASE, clock=lambda: self.now)

    def go(self, steps: int) -> Run:
        threads = self.ledger()
        self.processes = [
            *(self.start(role) for role in (self.write, self.write, self.read, self.read)),
            *(self.start(role, threads) for role in (self.read, self.read_snapshot, self.read_snapshot)),
        ]
        try:
            for _ in range(steps):
                event = self.random.random()
                if event < self.loss_rate:
                    self.lose()
                elif event < 0.04:
                    self.pass_time()
                elif event < 0.05:
                    self.kill(self.random.randrange(2))
                else:
                    process = self.random.choice(self.processes)
                    process.switch()
                    while self.random.random() < 0.8:
                        process.switch()
        finally:
            for process in [*self.processes, *self.doomed]:
                process.throw(GreenletExit)
        return self

    def pause(self) -> None:
        """Let others go first."""
        self.main.switch()

    def live_or_die(self) -> None:
        if getcurrent() in self.doomed:
            raise GreenletExit

    def pass_time(self) -> None:
        """As much as the lease allows: no writer is longer than that between its mark and its COMMIT."""
        most = 3 * LEASE
        if self.respects_lease:
            most = min([most, *(began + LEASE - self.now for began in self.at_work.values())])
        self.now += self.random.choice((0.3, 0.999)) * most

    def kill(self, index: int) -> None:
        """A writer is gone, and its transaction with it. What it had sent may still arrive. Another takes its
        place."""
        process = self.processes[index]
        self.at_work.pop(process, None)
        if self.random.random() < 0.5:
            process.throw(GreenletExit)
        else:
            self.doomed.add(process)
            while process and self.random.random() < 0.8:
                process.switch()
        self.processes[index] = self.start(self.write)

    def write(self, ledger: Ledger) -> None:
        while True:
            while self.random.random() < 0.9:
                self.pause()
            tags = self.random.sample(TAGS, self.random.randint(1, len(TAGS)))
            self.at_work[getcurrent()] = self.now
            marks = ledger.begin(tags)
            if self.ends_first:
                ledger.end(marks)
            self.pause()
            self.live_or_die()
            if self.random.random() < 0.9:  # or the COMMIT fails
                for tag in tags:
                    self.committed[tag] += 1
            del self.at_work[getcurrent()]
            self.pause()
            self.live_or_die()
            if not self.ends_first and self.random.random() < 0.95:  # or what was sent never arrives
                ledger.end(marks)

    def read(self, ledger: Ledger) -> None:
        while True:
            self.pause()
            tags = list(TAGS) if self.random.random() < 0.5 else ["a"]
            entry = "entry-" + "-".join(tags)
            required = [self.committed[tag] for tag in tags]
            # of some tags the reader knows by itself, of the others from an entry or not at all
            known = tags[: self.random.randint(1, len(tags))]
            reading = ledger.lookup(entry, known, tags[len(known) :] if self.random.random() < 0.5 else ())
            found: list[int] = []
            if reading.payload is not None:
                found = [int(number) for number in reading.payload.split(b",")]
                self.hits += not reading.fallen
                self.parts += bool(reading.fallen)
                for tag, have, must in zip(tags, found, required, strict=True):
                    if tag not in reading.fallen and have < must:
                        raise Stale(f"{entry}: {tag} is {have}, committed were {required}")
                if not reading.fallen:
                    continue
            others = [tag for tag in tags if tag not in reading.tags]
            if others:
                reading = reading.union(ledger.lookup(None, others))
            if reading.fillable:
                self.pause()
                # what stands is kept, the rest is asked of the database
                kept = {
                    tag: have for tag, have in zip(tags, found, strict=False) if tag not in reading.fallen
                }
                payload = b",".join(b"%d" % kept.get(tag, self.committed[tag]) for tag in tags)
                self.pause()
                self.fills += ledger.fill(entry, reading, payload)

    def read_snapshot(self, ledger: Ledger) -> None:
        while True:
            self.pause()
            snapshot = ledger.snapshot()
            self.pause()
            view = dict(self.committed)
            for _ in range(self.random.randint(1, 6)):
                self.pause()
                tags = list(TAGS) if self.random.random() < 0.5 else ["a"]
                entry = "entry-" + "-".join(tags)
                reading = ledger.lookup(entry, tags)
                if not ledger.shows(snapshot, reading):
                    continue
                if reading.payload is not None:
                    found = [int(number) for number in reading.payload.split(b",")]
                    for tag, have in zip(tags, found, strict=True):
                        if tag not in reading.fallen and have != view[tag]:
                            raise Stale(f"{entry}: {tag} is {have}, the snapshot shows {view}")
                    self.shown += reading.witness != snapshot.witness
                elif reading.fillable:
                    self.fills += ledger.fill(entry, reading, b",".join(b"%d" % view[tag] for tag in tags))


class RunOnRedis(Run):
    """Each process has connections of its own to a real server."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, url: str) -> None:
        super().__init__(seed)
        self.client = client
        self.url = url
        self.lost = False
        self.without_script = 0
        self.stores: list[RedisBackend] = []
        self.lose = self._lose
        client.flushdb()
        monkeypatch.setattr(Wire, "converse", lambda *arguments: self.converse(*arguments))
        monkeypatch.setattr(Wire, "post", lambda *arguments: self.post(*arguments))
        monkeypatch.setattr(
            RedisBackend,
            "lost_nothing_for",
            lambda store, seconds: self.now > seconds and not self.lost,
        )

    def ledger(self) -> Ledger:
        # a connection is not waited for while others come before, whatever the machine does meanwhile
        self.stores.append(RedisBackend({"url": self.url, "timeout": 30}))
        return Ledger(self.stores[-1], "witness", lease=LEASE, clock=lambda: self.now)

    def go(self, steps: int) -> Run:
        try:
            return super().go(steps)
        finally:
            for store in self.stores:
                store.close()

    def converse(self, wire: Wire, commands: Batch, meanwhile: object = None) -> list[Any]:
        """One command after the other: the server need not do them without others in between."""
        if not wire.run:  # a new connection
            return CONVERSE(wire, commands)
        replies, refusals = [], []
        for command in _split(commands):
            try:
                self.pause()
            except BaseException:
                wire.close()
                raise
            replies += CONVERSE(wire, Batch(command, 1))
            refusals += wire.refusals
        wire.refusals[:] = refusals
        self.without_script += sum(isinstance(each, redis.exceptions.NoScriptError) for each in refusals)
        self.live_or_die()
        return replies

    def post(self, wire: Wire, command: bytes, again: Callable[[], bytes]) -> None:
        """What nobody waits for is done when this is over, or the same seed would not give the same schedule."""
        self.pause()
        POST(wire, command, again)
        select.select([wire._socket], [], [], 30)
        self.live_or_die()

    def _lose(self) -> None:
        if self.random.random() < 0.4:
            self.client.script_flush()
        elif keys := sorted(self.client.keys()):
            key = self.random.choice(keys)
            if self.random.random() < 0.5:
                self.client.delete(key)
            else:
                self.client.pexpire(key, 0)
            self.lost = True


CONVERSE, POST = Wire.converse, Wire.post


def _split(commands: Batch) -> list[bytes]:
    """The commands of a batch, each as it is sent."""
    reader = hiredis.Reader()
    reader.feed(commands.data)
    return [pack(tuple(reader.gets())) for _ in range(commands.size)]


OnRedis = Callable[[int, pytest.MonkeyPatch], RunOnRedis]


@pytest.fixture
def on_redis(redis_store_url: str) -> Iterator[OnRedis]:
    with redis.Redis.from_url(redis_store_url) as client:
        yield partial(RunOnRedis, client=client, url=redis_store_url)


def on_memcached(seed: int, monkeypatch: pytest.MonkeyPatch, servers: Sequence[str] = ("nowhere",)) -> Run:
    run = Run(seed)
    server = FakeMemcached()

    def converse(
        batches: Sequence[tuple[Any, Pipeline]], essential: bool = False, meanwhile: object = None
    ) -> list[list[Reply]]:
        answers: list[list[Reply]] = [[] for _ in batches]
        # servers work side by side
        for (_, pipeline), replies in run.random.sample(
            list(zip(batches, answers, strict=True)), len(batches)
        ):
            for command in pipeline._commands:
                run.pause()
                replies.append(server.execute(command))
        run.live_or_die()
        return answers

    def lose() -> None:
        if server.items:
            del server.items[run.random.choice(list(server.items))]
            server.lost = True

    monkeypatch.setattr(memcached, "converse", converse)
    run.lose = lose
    run.store = MemcachedBackend({"servers": list(servers)})
    monkeypatch.setattr(run.store, "lost_nothing_for", lambda seconds: run.now > seconds and not server.lost)
    return run


def on_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(seed)
    store = MemoryBackend({})

    def lose() -> None:
        name, version = run.random.choice([*store._counters.items(), ("none", 1)])
        if versions.is_clean(version):
            del store._counters[name]

    run.lose = lose
    run.store = Pausing(store, run)
    return run


STORES = {
    "memcached": on_memcached,
    "several memcached": partial(on_memcached, servers=["nowhere", "elsewhere", "anywhere"]),
    "memory": on_memory,
}


@pytest.mark.parametrize("store", STORES)
def test_no_schedule_gives_a_stale_hit(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [STORES[store](seed, monkeypatch).go(STEPS) for seed in range(60)]
    # And not for want of answers.
    assert sum(run.fills for run in runs) > 1_000
    assert sum(run.hits for run in runs) > 2_000
    assert sum(run.parts for run in runs) > 100
    assert sum(run.shown for run in runs) > 100


def test_no_schedule_gives_a_stale_hit_on_redis(on_redis: OnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for seed in range(40):
        runs.append(on_redis(seed, monkeypatch))
        runs[-1].go(STEPS)
    assert sum(run.fills for run in runs) > 700
    assert sum(run.hits for run in runs) > 1_400
    assert sum(run.parts for run in runs) > 70
    assert sum(run.shown for run in runs) > 70
    assert sum(run.without_script for run in runs) > 20


def end_unmarks_whatever_it_finds(version: int, incarnation: int) -> int:
    return version + versions.GENERATION - 1


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("begun", lambda version, new: new),
        ("planted", lambda new: new),
        ("ended", end_unmarks_whatever_it_finds),
        ("cleared", lambda version, new: version - version % versions.GENERATION),
        ("healed", lambda version, new: new),
        ("is_clean", lambda version: version is not None),
    ],
)
def test_a_broken_step_gives_a_stale_hit(
    step: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, step, broken)
    with pytest.raises(Stale):
        for seed in range(400):
            run = on_memcached(seed, monkeypatch)
            run.loss_rate = 0.01
            run.go(STEPS)


def redis_script(name: str, step: str, broken: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Has a step of a script replaced."""

    def replace(monkeypatch: pytest.MonkeyPatch) -> None:
        scripts = {each: redis_backend._Script(each) for each in ("begin", "end", "bump", "settle", "swap")}
        script = scripts[name]
        assert script.source.count(step) == 1
        script.source = script.source.replace(step, broken)
        script.sha = sha1(script.source.encode(), usedforsecurity=False).hexdigest()
        monkeypatch.setattr(redis_backend, "_script", scripts.__getitem__)

    return replace


BROKEN_WITH_LOSSES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no quarantine for what is planted": lambda monkeypatch: monkeypatch.setattr(
        versions, "planted", lambda new: new
    ),
    "no mark on what a writer finds lost": redis_script(
        "begin",
        "recreated, most, ttl = ARGV[1],",
        "recreated, most, ttl = string.sub(ARGV[1], 1, 14) .. '00000',",
    ),
    "what is missing is always planted clean": redis_script(
        "settle", "quiet and clean or quarantined", "clean"
    ),
    "marks are cleared whatever the witness": redis_script(
        "settle", "local quiet = is_clean(read(KEYS[#KEYS]))", "local quiet = true"
    ),
}
ENDS_FIRST = "marks are taken off before COMMIT"
BROKEN_ON_REDIS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **BROKEN_WITH_LOSSES,
    ENDS_FIRST: lambda monkeypatch: None,
    "the marks of others are taken off, too": redis_script(
        "end", "mine and '99999' or '100000'", "tostring(100000 - pending(version))"
    ),
    "a mark is taken off without a new generation": redis_script(
        "end",
        "redis.call('INCRBY', KEYS[i], '99999')\n    elseif",
        "redis.call('DECR', KEYS[i])\n    elseif",
    ),
    "marks are no hindrance": lambda monkeypatch: monkeypatch.setattr(
        versions, "is_clean", lambda version: version is not None
    ),
}


@pytest.mark.parametrize("broken", BROKEN_ON_REDIS)
def test_a_broken_step_gives_a_stale_hit_on_redis(
    broken: str, on_redis: OnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    BROKEN_ON_REDIS[broken](monkeypatch)
    with pytest.raises(Stale):
        for seed in range(200):
            run = on_redis(seed, monkeypatch)
            run.ends_first = broken == ENDS_FIRST
            if broken in BROKEN_WITH_LOSSES:
                run.loss_rate = 0.05
            run.go(STEPS)


def test_keeping_what_has_fallen_gives_a_stale_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_fallen", lambda *arguments: frozenset())
    with pytest.raises(Stale):
        for seed in range(400):
            on_memcached(seed, monkeypatch).go(STEPS)


def remember_all_as_long_known(self: Ledger, seen: Any, tags: Any, found: Any) -> None:
    seen.update((tag, (version, 0)) for tag, version in zip(tags, found, strict=True))


@pytest.mark.parametrize(
    ("step", "broken"),
    [("shows", lambda *arguments: True), ("_remember", remember_all_as_long_known)],
)
def test_trusting_what_came_after_a_snapshot_gives_a_wrong_hit(
    step: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, step, broken)
    with pytest.raises(Stale):
        for seed in range(400):
            on_memcached(seed, monkeypatch).go(STEPS)


def test_an_entry_that_is_read_after_its_versions_gives_a_wrong_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stale):
        for seed in range(400):
            run = STORES["several memcached"](seed, monkeypatch)
            run.store.ordered = True
            run.go(STEPS)


def test_a_lease_shorter_than_a_commit_gives_a_stale_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stale):
        for seed in range(400):
            run = on_memcached(seed, monkeypatch)
            run.respects_lease = False
            run.go(STEPS)
