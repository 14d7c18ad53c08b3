"""A store on a Redis server (or Valkey, or another that speaks its protocol and runs its scripts).

A lookup is one MGET (and a command that a replica refuses), phase one of a write plain increments, every other step of the
ledger one script: one round trip each, whatever the number of keys.

**What a restart must not bring back.** Redis reloads a snapshot or a log from its disk, and a replica that is
promoted has what reached it. Versions of tags from there are older than what was committed, and entries would
be valid again that are not. So counters are kept under names that carry the run id of the server, which is
new for every process of a server: after a restart or a failover every tag is missing, which is safe, and is
created anew. Each connection asks for the run id when it is made, so that no command can reach another server
under a former name.

**Expiry.** Counters live for thirty days after the last write of their tag, or after they were created (or an hour less:
a process sees to it once an hour). An expired counter is a lost one: its entries are asked for once more. So tags that
nobody uses, and counters of former runs, go by themselves, whatever number of names the application makes up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlunsplit

from dogpile.cache.api import NO_VALUE, SerializedReturnType

from querycache import versions
from querycache.backends.breaker import CircuitBreaker
from querycache.backends.pool import Pool
from querycache.backends.url import (
    flag,
    one_of,
    parse_options,
    positive_integer,
    seconds,
    split_arguments,
    text,
    whole_number,
)
from querycache.errors import CacheUnavailable, ConfigurationError, shown
from querycache.store import Mark, Meanwhile, StoreBackend

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from querycache.backends.names import COUNTER_TTL, Names, encode
    from querycache.backends.resp import CONNECTIONS, Batch, Command, Wire, batch, evaluate, pack
except ImportError as error:
    raise ConfigurationError(
        "the Redis store needs the clients redis and hiredis: pip install querycache[redis]"
    ) from error

__all__ = ["RedisBackend"]

T = TypeVar("T")

_REMOVING = {
    "del",
    "unlink",
    "getdel",
    "move",
    "rename",
    "renamenx",
    "copy",
    "restore",
    "restore-asking",
    "migrate",
    "flushall",
    "flushdb",
    "swapdb",
    "debug",
    "replicaof",
    "slaveof",
    "failover",
    "config",
    "config|resetstat",
}
"""Commands by which counters can vanish or be replaced, or the server's statistics about that be wiped. This
store itself uses none of them."""

_OPTIONS: dict[str, Callable[[object], Any]] = {
    "timeout": seconds,
    "db": whole_number,
    "max_connections": positive_integer,
    "ssl_ca_certs": text,
    "ssl_certfile": text,
    "ssl_keyfile": text,
    "ssl_cert_reqs": one_of("none", "optional", "required"),
    "ssl_check_hostname": flag,
}

_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}


class _Script:
    def __init__(self, name: str) -> None:
        directory = files(__package__) / "lua"
        self.source = "\n".join((directory / part).read_text() for part in ("prelude.lua", f"{name}.lua"))
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


@cache
def _script(name: str) -> _Script:
    return _Script(name)


class RedisBackend(StoreBackend):
    """A store on one Redis server.

    :param arguments: ``url``: ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` for TLS,
        ``unix:///path?db=0``, or ``valkey://`` and ``valkeys://``, with these options in its query or beside
        it:

        ``timeout``: seconds for connecting (without the time it takes to resolve a name; to each address that the name
        has), for each answer (and as many again for each megabyte of it), and for a free connection (default 0.5).

        ``max_connections``: of this process; more threads than that wait for a free one (default 50).

        ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_cert_reqs``, ``ssl_check_hostname``: as
        redis-py takes them, with TLS only.

    :raises ConfigurationError: an argument is unknown, missing or cannot work.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        address, given = split_arguments(arguments)
        options = parse_options("the Redis store", _OPTIONS, given)
        if address is None or address.scheme not in _SCHEMES:
            raise ConfigurationError(
                f"the Redis store cannot use the address {shown(arguments.get('url'))}; write redis://host:6379/0"
            )
        scheme = _SCHEMES[address.scheme]
        if scheme != "unix" and not address.netloc:
            address = address._replace(netloc="localhost")
        place = address.path if scheme == "unix" else address.netloc.rpartition("@")[2] + address.path
        self._name = f"Redis at {place}"
        database = address.path.strip("/")
        if scheme != "unix" and database and not database.isdecimal():
            # the client would take the first database without a word
            raise ConfigurationError(
                f"the Redis store cannot use {shown(database)} as the number of a database; write redis://host:6379/0"
            )
        tls = [name for name in options if name.startswith("ssl_")]
        if tls and scheme != "rediss":
            raise ConfigurationError(f"option {tls[0]!r} needs TLS: write rediss:// instead of {scheme}://")
        if "db" in options and scheme != "unix":
            raise ConfigurationError("option 'db' is for Unix sockets; write redis://host:6379/0")
        timeout = options.pop("timeout", 0.5)
        self._breaker = CircuitBreaker(self._name)
        self._known_names = Names("")
        most = options.pop("max_connections", 50)
        try:
            # urlunsplit() leaves the two slashes out where no host stands behind them
            beyond_host = urlunsplit(address._replace(scheme="", netloc=""))
            # redis-py's own pool is only asked what it makes of the address
            told = redis.ConnectionPool.from_url(
                f"{scheme}://{address.netloc}{beyond_host}",
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                **({} if scheme == "unix" else {"socket_keepalive": True}),
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                **options,
            )
        except ValueError as error:
            raise ConfigurationError(
                f"the Redis store cannot use the address {shown(arguments.get('url'))}: the port is no number up to 65535; "
                "write / ? # @ in a password as %2F %3F %23 %40"
            ) from error

        def wire() -> Wire:
            return Wire(CONNECTIONS[scheme](**told.connection_kwargs), _introduce)

        self._pool: Pool[Wire] = Pool(wire, Wire.close, most, timeout)

    # -- entries --------------------------------------------------------------------------------------------

    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        entry = [] if key is None else [encode(key)]
        if not entry and not counters:
            return None, []
        only_a_master = _only_a_master(counters[-1] if counters else "")

        def reading(run: str) -> Batch:
            return Batch(pack(("MGET", *entry, *self._names(run).of(counters))) + only_a_master, 2)

        values, _ = self._exchange(reading, meanwhile=meanwhile, length=len(entry) + len(counters))
        payload = values.pop(0) if entry else None
        if payload is not None and type(payload) is not bytes:
            raise self._unreadable()
        return payload, self._parse(values)

    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        expiry: Command = () if ttl is None else ("PX", str(max(1, round(ttl * 1000))))
        [reply] = self._exchange(lambda run: batch(("SET", encode(key), payload, *expiry)), refusable=True)
        return not isinstance(reply, redis.ResponseError)

    def remove(self, keys: Iterable[str]) -> None:
        # Not DEL or UNLINK: where the server has seen none of those, it is known that no counter was removed.
        commands: list[Command] = [("PEXPIRE", encode(key), "0") for key in keys]
        if commands:
            self._exchange(lambda run: batch(*commands))

    def get_serialized_multi(self, keys: Iterable[str]) -> list[SerializedReturnType]:
        names = [encode(key) for key in keys]
        [values] = self._exchange(lambda run: batch(("MGET", *names)), length=len(names)) if names else [[]]
        return [NO_VALUE if value is None else value for value in values]

    # -- counters -------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        # The writer waits for this, and plain increments take the server half the time of a script.
        if not counters:
            return {}

        def mark(wire: Wire) -> tuple[list[Any], list[redis.ResponseError]]:
            names = self._names(wire.run)
            commands, new = names.marking(counters)
            found = wire.converse(commands)[-len(counters) :]
            if new and not wire.refusals:
                names.meet(new)
            return found, wire.refusals[:1]

        found, refusals = self._speak(mark, essential=True)
        self._heed(refusals, refusable=True)
        if not versions.are_marked(found):
            # Where the witness was lost nobody plants it meanwhile, for there is something now, and the other marks stay.
            lost = [place for place, number in enumerate(found) if not versions.are_marked([number])]
            anew = self._begin_anew([counters[place] for place in lost])
            for place, version in zip(lost, anew, strict=True):
                found[place] = version
        return dict(zip(counters, found, strict=True))

    def _begin_anew(self, counters: Sequence[str]) -> list[int]:
        """Mark counters that were lost since they were met, hold something else, or have no room for more marks."""
        arguments = versions.fresh() + versions.GIVEN_UP + 1, versions.MAX_PENDING, COUNTER_TTL
        reply = self._run("begin", counters, *arguments, essential=True, length=len(counters))
        try:
            return [int(text) for text in reply]
        except (TypeError, ValueError) as error:
            raise self._unreadable() from error

    def end(self, marks: Mapping[str, Mark]) -> None:
        # Not waited for: until the server has done it the marks keep everybody out, and whoever has committed
        # need not stand by.
        if not marks:
            return
        marked = "".join(map(str, marks.values())).encode()

        def post(wire: Wire) -> None:
            keys, script = b"".join(self._names(wire.run).words(marks)), _script("end")
            call = evaluate("EVALSHA", script.sha, len(marks), keys, marked)
            wire.post(call, lambda: evaluate("EVAL", script.source, len(marks), keys, marked))

        self._speak(post, essential=True)

    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        self._run("bump", counters, COUNTER_TTL, essential=essential)

    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        if not changes:
            return []
        pairs = [
            value
            for _, expected, version in changes
            for value in ("" if expected is None else expected, version)
        ]
        counters = [counter for counter, _, _ in changes]
        reply = self._run("swap", counters, COUNTER_TTL, *pairs, length=len(counters))
        return [done == 1 for done in reply]

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        new = versions.fresh()
        created = versions.planted(new)
        keys = [*counters, witness]
        reply = self._run("settle", keys, new, created, COUNTER_TTL, length=len(counters))
        return self._parse(reply)

    # -- the server -----------------------------------------------------------------------------------------

    def lost_nothing_for(self, seconds: float) -> bool:
        sections = ("server", "stats", "replication", "commandstats")
        replies = self._exchange(lambda run: batch(*(("INFO", section) for section in sections)))
        info: dict[str, str] = {}
        for reply in replies:
            if type(reply) is not bytes:
                raise self._unreadable()
            info |= _parse_info(reply)
        try:
            uptime = int(info.get("uptime_in_seconds", 0))
        except ValueError as error:
            raise self._unreadable() from error
        commands = {name.removeprefix("cmdstat_") for name in info if name.startswith("cmdstat_")}
        return (
            # The uptime is in whole seconds. Former runs are covered by it: their writers are done.
            uptime > seconds + 1
            and info.get("evicted_keys") == "0"
            # A replica that was promoted has not seen the marks made at the former master.
            and info.get("role") == "master"
            and not info.get("master_replid2", "?").strip("0")
            and bool(commands)
            and commands.isdisjoint(_REMOVING)
        )

    def ping(self) -> None:
        self._exchange(lambda run: batch(("PING",)))

    def close(self) -> None:
        self._pool.clear()

    # -- the wire ----------------------------------------------------------------------------------------

    def _names(self, run: str) -> Names:
        known = self._known_names
        if known.run != run or time.monotonic() > known.until:
            known = self._known_names = Names(run)
        return known

    def _run(
        self,
        name: str,
        counters: Sequence[str],
        *arguments: object,
        essential: bool = False,
        length: int | None = None,
    ) -> list[Any]:
        """Run a script; its keys are the counters.

        :param length: of the list that it gives; None where it gives none.
        """
        if not counters:
            return []

        def call(run: str) -> tuple[Any, ...]:
            return _call(_script(name), self._names(run).of(counters), arguments)

        [reply] = self._exchange(lambda run: batch(call(run)), essential, refusable=True, length=length)
        if isinstance(reply, redis.exceptions.NoScriptError):  # somebody flushed the scripts
            [reply] = self._exchange(lambda run: batch(_in_full(call(run), name)), essential, length=length)
        elif isinstance(reply, redis.ResponseError):
            raise CacheUnavailable(f"{self._name} refused {name!r}: {reply}") from reply
        return reply  # type: ignore[no-any-return]

    def _parse(self, texts: Sequence[bytes | None]) -> list[int | None]:
        try:
            return [None if text is None else versions.parse(text) for text in texts]
        except (AttributeError, TypeError) as error:
            raise self._unreadable() from error

    def _unreadable(self) -> CacheUnavailable:
        return CacheUnavailable(f"{self._name} answers what nobody has asked for")

    def _exchange(
        self,
        build: Callable[[str], Batch],
        essential: bool = False,
        refusable: bool = False,
        meanwhile: Meanwhile | None = None,
        length: int | None = None,
    ) -> list[Any]:
        """Send commands and read one reply for each.

        :param build: gives the commands, from the run id of the server that they will go to.
        :param essential: try it although the server failed a moment ago.
        :param refusable: give the server's refusals among the replies rather than raise.
        :param meanwhile: is called before the replies are read.
        :param length: of the list that the first reply is to be.
        """

        def say(wire: Wire) -> tuple[list[Any], list[redis.ResponseError]]:
            replies = wire.converse(build(wire.run), meanwhile)
            if length is not None:
                reply = replies[0]
                is_list = type(reply) is list and len(reply) == length
                if not is_list and not isinstance(reply, redis.ResponseError):
                    wire.close()  # whose answer was that?
                    raise redis.InvalidResponse("another reply than to what was asked")
            return replies, wire.refusals[:1]

        replies, refusals = self._speak(say, essential)
        self._heed(refusals, refusable)
        return replies

    def _heed(self, refusals: Sequence[redis.ResponseError], refusable: bool) -> None:
        """The server has answered, and refused something or not."""
        if not refusals or (refusable and isinstance(refusals[0], redis.exceptions.NoScriptError)):
            self._breaker.succeeded()  # and where it does not have the script, it is told the whole of it then
            return
        self._breaker.refused(refusals[0])
        if not refusable:
            raise CacheUnavailable(f"{self._name} refused: {refusals[0]}") from refusals[0]

    def _speak(self, say: Callable[[Wire], T], essential: bool) -> T:
        """Have an open wire for a moment: the one place that touches the network."""
        self._breaker.admit(essential=essential)
        try:
            wire = self._pool.take()
            try:
                wire.open()
                return say(wire)
            finally:
                self._pool.give_back(wire)
        except (redis.RedisError, OSError) as error:
            if isinstance(error, redis.exceptions.ReadOnlyError):
                self._pool.clear()  # the master is another now, and behind the same address, maybe
            self._breaker.failed(error)
            raise CacheUnavailable(f"{self._name} does not answer: {error}") from error


def _introduce(wire: Wire) -> None:
    """What is said first on a new connection: which run of the server is this, and the scripts."""
    names = ("begin", "end", "bump", "settle", "swap")
    info, *_ = wire.converse(
        batch(("INFO", "server"), *(("SCRIPT", "LOAD", _script(name).source) for name in names))
    )
    if not isinstance(info, bytes):
        raise redis.ConnectionError(f"it does not tell its run id, which this user needs to see: {info}")
    run = _parse_info(info).get("run_id", "")
    if not run:
        raise redis.ConnectionError("it does not tell its run id (INFO server)")
    wire.run = run[:12]


def _call(script: _Script, names: Sequence[bytes], arguments: Sequence[object]) -> tuple[Any, ...]:
    # No numbers: the client's packer of those does not bear a signal (hiredis 3.5.0).
    return ("EVALSHA", script.sha, str(len(names)), *names, *map(str, arguments))


def _in_full(call: tuple[Any, ...], name: str) -> Command:
    """The same call for a server that does not have the script."""
    return ("EVAL", _script(name).source, *call[2:])


@lru_cache(maxsize=64)
def _only_a_master(counter: str) -> bytes:
    """A command that does nothing, and that a replica refuses.

    A master that was demoted goes on to answer reads on the connections that it has, from before what is written elsewhere
    now.
    """
    return pack(("PEXPIRE", encode(f"{counter}@"), "0"))  # there is no such key


def _parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
