"""A store on memcached, version 1.6 or later, on one server or several.

Everything is done with meta commands, pipelined: a lookup is one round trip, to two servers at once where the
entry is on another than the ledger. The counters are 64-bit numbers, changed by the server's own arithmetic,
guarded by CAS where the change depends on what is there.

**Several servers** share the entries, by rendezvous hashing. The ledger is on the first server that is named,
whole: its counters must be read and written in order, and a lookup would otherwise have to ask every server.
So all processes must name the same server first. The others may be changed at any time, since an entry is
checked against the ledger wherever it is found. A server that fails is not replaced by another: its entries
are misses until it is back, and without the first server there is no caching.

**Memory.** memcached drops what was not used for longest, counters too, which the ledger is made for. So
counters have no expiry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote

from dogpile.cache.api import NO_VALUE, SerializedReturnType

from querycache import versions
from querycache.backends.meta import Pipeline, Reply, Server, UnsuitableServer, converse
from querycache.backends.url import (
    parse_options,
    positive_integer,
    seconds,
    split_arguments,
)
from querycache.errors import CacheUnavailable, ConfigurationError, shown
from querycache.store import Mark, Meanwhile, StoreBackend

try:
    from pymemcache.client.rendezvous import RendezvousHash
except ImportError as error:
    raise ConfigurationError(
        "the memcached store needs pymemcache: pip install querycache[memcached]"
    ) from error

__all__ = ["MemcachedBackend"]

_LONGEST_TTL = 30 * 24 * 3600
"""Seconds. memcached takes a greater number for a date, long past."""

_ITEM_OVERHEAD = 512
"""Bytes of an item that are not the value: header, key and CAS value, amply."""

_ROUNDS = 100
"""Times that a contended counter is tried. In each round one of the writers gets through."""

_NO_CAS = 2**64 - 1
"""A CAS value that no item has. (With 0, memcached does not compare.)"""

_PLAIN_KEY = re.compile(r"[!-}]{1,250}")


def _servers(value: object) -> list[str]:
    """Addresses, as a list or as text with commas between them."""
    addresses = value.split(",") if isinstance(value, str) else value
    if not isinstance(addresses, list | tuple) or not addresses or len(set(addresses)) != len(addresses):
        raise ValueError
    if not all(isinstance(address, str) and address for address in addresses):
        raise ValueError
    return list(addresses)


_OPTIONS: dict[str, Callable[[object], Any]] = {
    "servers": _servers,
    "timeout": seconds,
    "max_connections": positive_integer,
}


class MemcachedBackend(StoreBackend):
    """A store on memcached.

    :param arguments: ``url``: ``memcached://h1:11211,h2:11211`` or ``memcached:///path/to.sock``, with the
        options below in its query or beside it; or ``servers``: the addresses (``host``, ``host:port``,
        ``[v6]:port``, path of a Unix socket), as a list or with commas between. The first holds the ledger.

        ``timeout``: seconds for connecting (without the time it takes to resolve a name; to each address that the name
        has), for each answer (and as many again for each megabyte of it), and for a free connection (default 0.5).

        ``max_connections``: to each server; more threads than that wait for a free one (default 50).

    :raises ConfigurationError: an argument is unknown, missing or cannot work.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        address, given = split_arguments(arguments)
        if address is not None:
            if bool(address.netloc) == bool(address.path.strip("/")):
                raise ConfigurationError(
                    f"the memcached store cannot use {shown(address.geturl())}; write memcached://host:11211"
                )
            given["servers"] = address.netloc or unquote(address.path)
        options = parse_options("the memcached store", _OPTIONS, given)
        if "servers" not in options:
            raise ConfigurationError("the memcached store needs an address: write memcached://host:11211")
        timeout = options.get("timeout", 0.5)
        most = options.get("max_connections", 50)
        self._servers = {address: Server(address, timeout, most) for address in options["servers"]}
        self._ledger = next(iter(self._servers.values()))
        self.ordered = len(self._servers) == 1
        self._hash = RendezvousHash(list(self._servers), hash_function=_score)

    # -- entries --------------------------------------------------------------------------------------------

    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        reads = Pipeline()
        batches = [(self._ledger, reads)] if counters else []
        if key is not None:
            server = self._server_of(key)
            if not (batches and server is self._ledger):
                batches.insert(0, (server, Pipeline()))
            batches[0][1].add(b"mg %b v" % _encode(key))
        for counter in counters:
            reads.add(b"mg %b v" % _encode(counter))
        replies = [reply for batch in converse(batches, meanwhile=meanwhile) for reply in batch]
        payload = replies.pop(0).value if key is not None else None
        return payload, [_version(reply) for reply in replies]

    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        server = self._server_of(key)
        if len(payload) + _ITEM_OVERHEAD > server.item_size_max:
            return False
        lifetime = 0 if ttl is None else max(1, min(math.ceil(ttl), _LONGEST_TTL))
        write = Pipeline()
        write.add(b"ms %b %d T%d" % (_encode(key), len(payload), lifetime), payload)
        [[reply]] = converse([(server, write)])
        return reply.code == b"HD"

    def remove(self, keys: Iterable[str]) -> None:
        # Not "md": where the server has seen no delete, it is known that no counter was deleted.
        batches: dict[Server, Pipeline] = {}
        for key in keys:
            batches.setdefault(self._server_of(key), Pipeline()).add(b"ms %b 0 T-1" % _encode(key), b"")
        for server, replies in zip(batches, converse(list(batches.items())), strict=True):
            _must_be_done(server, replies)

    def get_serialized_multi(self, keys: Iterable[str]) -> list[SerializedReturnType]:
        names = list(keys)
        batches: dict[Server, Pipeline] = {}
        for key in names:
            batches.setdefault(self._server_of(key), Pipeline()).add(b"mg %b v" % _encode(key))
        replies = dict(zip(batches, map(iter, converse(list(batches.items()))), strict=True))
        values = [next(replies[self._server_of(key)]).value for key in names]
        return [NO_VALUE if value is None else value for value in values]

    # -- counters -------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        new = versions.fresh()
        steps = Pipeline()
        for counter in counters:
            steps.add(b"ma %b N0 J%d D1 v c" % (_encode(counter), versions.begun(None, new)))
        marks = {}
        for counter, reply in zip(counters, self._step(steps, essential=True), strict=True):
            version = _version(reply)
            if version is None or versions.pending_of(version) > versions.MAX_PENDING:
                marks[counter] = self._begin_anew(counter, reply, new + versions.GIVEN_UP + 1)
            else:
                marks[counter] = versions.incarnation_of(version), reply.cas
        return marks

    def _begin_anew(self, counter: str, reply: Reply, created: int) -> Mark:
        """Mark a counter that holds no version, or that has no room for more marks.

        Marks that others made on it meanwhile may be lost with that, as by eviction: it is quarantined.
        """
        present = _version(reply)
        guard = b"" if present is None else b" C%d" % reply.cas
        step = Pipeline()
        step.add(b"ms %b %d c%b" % (_encode(counter), len(str(created)), guard), b"%d" % created)
        [stored] = self._step(step, essential=True)
        if stored.code == b"HD":
            return versions.incarnation_of(created), stored.cas
        if present is not None:  # somebody else changed it, and the mark is on it all the same
            return versions.incarnation_of(present), reply.cas
        raise CacheUnavailable(f"{self._ledger.name} cannot mark {counter!r}: {stored.code!r}")

    def end(self, marks: Mapping[str, Mark]) -> None:
        # The CAS value of the mark says whether anybody was here since; what is there is asked for in the
        # same round trip, for the case that somebody was.
        tries = {counter: (cas or _NO_CAS, versions.GENERATION - 1) for counter, (_, cas) in marks.items()}
        witness = next(iter(tries), "")
        tries |= {witness: tries.pop(witness)} if tries else {}  # last
        for _ in range(_ROUNDS):
            if not tries:
                return
            steps = Pipeline()
            for counter, (cas, delta) in tries.items():
                steps.add(b"ma %b C%d D%d" % (_encode(counter), cas, delta))
                steps.add(b"mg %b v c" % _encode(counter))
            replies = self._step(steps, essential=True)
            again = {}
            for counter, changed, found in zip(tries, replies[::2], replies[1::2], strict=True):
                version = _version(found)
                if changed.code == b"EX" and version is not None:
                    after = versions.ended(version, marks[counter][0])
                    again[counter] = (found.cas, after - version)
            tries = again
        raise CacheUnavailable(f"{self._ledger.name}: {', '.join(tries)} changed {_ROUNDS} times meanwhile")

    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        steps = Pipeline()
        for counter in counters:
            steps.add(b"ma %b D%d" % (_encode(counter), versions.GENERATION))
        _must_be_done(self._ledger, self._step(steps, essential=essential))

    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        found = self._read_for_change([counter for counter, _, _ in changes])
        steps = Pipeline()
        swappable = [
            # What is there but is no version is neither missing nor what was expected.
            reply.code == b"EN" if expected is None else _version(reply) == expected
            for (_, expected, _), reply in zip(changes, found, strict=True)
        ]
        for (counter, _, version), reply, wanted in zip(changes, found, swappable, strict=True):
            if wanted:
                _add_change(steps, counter, reply, version)
        replies = iter(self._step(steps))
        return [wanted and next(replies).code == b"HD" for wanted in swappable]

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        planted = versions.planted(versions.fresh())
        steps = Pipeline()
        for counter in counters:
            steps.add(b"ms %b %d ME" % (_encode(counter), len(str(planted))), b"%d" % planted)
        # Created before the witness is read, and quarantined: had a missing counter been created clean after
        # that, a writer that came in between and whose mark was lost again would go unseen.
        for counter in (*counters, witness):
            steps.add(b"mg %b v c" % _encode(counter))
        *found, witnessed = self._step(steps)[len(counters) :]
        settled = [_version(reply) for reply in found]
        new = versions.fresh()
        changes = {}
        for index, version in enumerate(settled):
            if version is None:  # not a number, or lost again just now
                changes[index] = versions.planted(new)
            elif versions.is_clean(_version(witnessed)) and not versions.is_clean(version):
                changes[index] = versions.cleared(version, new)
        steps = Pipeline()
        for index, version in changes.items():
            _add_change(steps, counters[index], found[index], version)
        for (index, version), reply in zip(changes.items(), self._step(steps), strict=True):
            if reply.code == b"HD":
                settled[index] = version
        return settled

    def _read_for_change(self, counters: Sequence[str]) -> list[Reply]:
        reads = Pipeline()
        for counter in counters:
            reads.add(b"mg %b v c" % _encode(counter))
        return self._step(reads)

    def _step(self, steps: Pipeline, *, essential: bool = False) -> list[Reply]:
        if not len(steps):
            return []
        [replies] = converse([(self._ledger, steps)], essential=essential)
        return replies

    # -- the servers ----------------------------------------------------------------------------------------

    def lost_nothing_for(self, seconds: float) -> bool:
        found = self._ledger.statistics()
        losses = (
            "evictions",
            "cmd_flush",
            "delete_hits",
            "slab_reassign_evictions_nomem",
            "slab_reassign_busy_deletes",
        )
        # A server says 2 s as soon as it has started, and counts the ticks of a clock: up to 3 s too many.
        try:
            uptime = int(found.get("uptime", 0)) - 3
        except ValueError as error:
            raise CacheUnavailable(f"{self._ledger.name} does not tell its uptime as a number") from error
        return uptime >= seconds and all(found.get(name) == "0" for name in losses)

    def ping(self) -> None:
        for server in self._servers.values():
            probe = Pipeline()
            probe.add(b"mn")
            try:
                converse([(server, probe)])
            except CacheUnavailable as error:
                if isinstance(error.__cause__, UnsuitableServer):
                    raise ConfigurationError(str(error)) from error
                raise

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _server_of(self, key: str) -> Server:
        return self._ledger if len(self._servers) == 1 else self._servers[self._hash.get_node(key)]


def _score(text: str, seed: int) -> int:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") ^ seed


def _encode(key: str) -> bytes:
    """A key as memcached takes it: what is too long, or not printable ASCII without spaces, becomes its
    digest."""
    if _PLAIN_KEY.fullmatch(key):
        return key.encode()
    return b"~" + blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest().encode()


def _version(reply: Reply) -> int | None:
    return None if reply.value is None else versions.parse(reply.value)


def _must_be_done(server: Server, replies: Iterable[Reply]) -> None:
    for reply in replies:
        # What is missing, or no number, is no counter: there was nothing to do.
        if reply.code not in (b"HD", b"NF") and not reply.code.endswith(b" non-numeric value"):
            raise CacheUnavailable(f"{server.name} refused: {reply.code!r}")


def _add_change(steps: Pipeline, counter: str, found: Reply, version: int) -> None:
    """Add the command that writes a version if the counter is still as it was found."""
    guard = b"C%d" % found.cas if found.code == b"VA" else b"ME"
    steps.add(b"ms %b %d %b" % (_encode(counter), len(str(version)), guard), b"%d" % version)
