"""The wire to memcached: its meta protocol, pipelined, over a bounded pool of connections to each server.

pymemcache has no meta commands, and its ``raw_command`` is no way to them: it searches the reply for a token
that a value may contain, and loses what came before the last chunk. Here a reply is read by the length that
it states, and a pipeline ends when each of its commands has been answered.
"""

from __future__ import annotations

import io
import re
import selectors
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from querycache.backends.breaker import CircuitBreaker
from querycache.backends.patience import Patience
from querycache.backends.pool import Pool
from querycache.errors import CacheUnavailable, ConfigurationError, shown

__all__ = ["Pipeline", "Reply", "Server", "UnsuitableServer", "converse"]

_PORT = 11211
_IN_FLIGHT = 32 * 2**10  # bytes that are sent without reading replies; less than any socket buffer holds
_MOST_BYTES = 2**30
_MOST_STATISTICS = 10_000  # lines; memcached 1.6 sends about a hundred
_NUMBER = re.compile(rb"[0-9]{1,20}")  # of 64 bits


class UnsuitableServer(Exception):
    """The server answers, but is not one that this store can work with."""


class Reply(NamedTuple):
    """The answer to one meta command."""

    code: bytes
    """``HD``, ``VA``, ``EN``, ``NF``, ``NS``, ``EX``, ``MN``, or the whole line of an error."""

    flags: tuple[bytes, ...] = ()
    value: bytes | None = None

    @property
    def cas(self) -> int:
        """The CAS value, where the command asked for it with the flag ``c``."""
        for flag in self.flags:
            if flag.startswith(b"c") and _NUMBER.fullmatch(flag, 1):
                return int(flag[1:])
        raise CacheUnavailable(f"memcached gave no CAS value: {self!r}")


class Pipeline:
    """Commands for one server, each of which will be answered by one reply."""

    def __init__(self) -> None:
        self._commands: list[bytes] = []

    def add(self, command: bytes, data: bytes | None = None) -> None:
        """Add a command without its line end, and its data block."""
        self._commands.append(command if data is None else b"%b\r\n%b" % (command, data))

    def __len__(self) -> int:
        return len(self._commands)

    def __bytes__(self) -> bytes:
        return b"\r\n".join((*self._commands, b""))


class _Pieces(io.RawIOBase):
    """What is read from a socket, as long as patience lasts."""

    def __init__(self, source: socket.socket, patience: Patience) -> None:
        self._source = source
        self._patience = patience
        self._latest = 0

    def start(self) -> None:
        """From now on replies are waited for."""
        self._patience.start()
        self._latest = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Of the piece before, and not of this one: what is here is taken, however late this thread comes for it.
        if self._latest:
            self._patience.received(self._latest)
        self._latest = self._source.recv_into(buffer)
        return self._latest

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


class _Connection:
    """A socket, and what was read from it beyond the current reply."""

    def __init__(self, address: tuple[str, int] | str, timeout: float) -> None:
        if isinstance(address, tuple):
            self._socket = socket.create_connection(address, timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout)
            self._socket.connect(address)
        self._timeout = timeout
        self._pieces = _Pieces(self._socket, Patience(timeout))
        self._input = io.BufferedReader(self._pieces, 2**16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def close(self) -> None:
        self._selector.close()
        self._input.close()  # and with it the socket

    def is_idle(self) -> bool:
        """Whether nothing can be read: neither the end of a connection that the server closed, nor data."""
        return not self._selector.select(0)

    def start(self) -> None:
        """From now on replies are waited for."""
        self._pieces.start()

    def send(self, data: bytes) -> list[Reply]:
        """Send, and take the replies that come meanwhile, lest both sides wait for the other to read."""
        replies: list[Reply] = []
        if len(data) <= _IN_FLIGHT:
            self._socket.sendall(data)
            return replies
        self.start()
        rest = memoryview(data)
        patience = Patience(self._timeout)
        patience.start()
        self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while rest:
            ready = self._selector.select(self._timeout)
            if not ready:
                raise TimeoutError("timed out")
            if ready[0][1] & selectors.EVENT_READ:
                replies.append(self.read_reply())
            else:
                sent = self._socket.send(rest[:_IN_FLIGHT])
                patience.received(sent)
                rest = rest[sent:]
        self._selector.modify(self._socket, selectors.EVENT_READ)
        return replies

    def read_reply(self) -> Reply:
        line = self._read_line()
        code, *flags = line.split(b" ")
        if code == b"VA":
            if not flags or not _NUMBER.fullmatch(flags[0]) or int(flags[0]) > _MOST_BYTES:
                raise ConnectionError(f"this is not memcached: {line[:80]!r}")
            size = int(flags.pop(0))
            value = self._input.read(size + 2)
            if len(value) != size + 2:
                raise ConnectionError("the server closed the connection")
            return Reply(code, tuple(flags), value[:-2])
        return Reply(code, tuple(flags)) if len(code) == 2 else Reply(line)

    def read_statistics(self, command: bytes) -> dict[str, str]:
        self._socket.sendall(command + b"\r\n")
        self.start()
        found: dict[str, str] = {}
        lines = 0
        while (line := self._read_line()) != b"END":
            kind, _, rest = line.decode("utf-8", "replace").partition(" ")
            if kind != "STAT":
                _must_be_no_outage(line)
                raise UnsuitableServer(f"answers {line[:80]!r} to {command.decode()!r}")
            name, _, found[name] = rest.partition(" ")
            lines += 1
            if lines > _MOST_STATISTICS:
                raise ConnectionError("statistics without end")
        return found

    def _read_line(self) -> bytes:
        line = self._input.readline(2**16)
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection" if len(line) < 2**16 else "no line ends")
        return line[:-2]


def _must_be_no_outage(answer: bytes) -> None:
    """A server that has no room for one more connection, for example, is none that cannot do what it is asked."""
    if answer.startswith((b"ERROR ", b"SERVER_ERROR ")):
        raise ConnectionError(answer[:80].decode("utf-8", "replace"))


class _Slot:
    """A place in the pool, with a connection or without."""

    connection: _Connection | None = None

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Server:
    """One memcached server: its address, its connections, and whether it is taken to be alive.

    :param address: ``host``, ``host:port``, ``[v6]:port``, or the path of a Unix socket.
    :param timeout: seconds for connecting, for each answer, and for a free connection.
    :raises ConfigurationError: the address cannot be read.
    """

    item_size_max = 2**20
    """Bytes that an item may have, as far as is known; the server says it when it is connected to."""

    def __init__(self, address: str, timeout: float, max_connections: int) -> None:
        self.name = f"memcached at {address}"
        self.breaker = CircuitBreaker(self.name)
        self._address = _parse_address(address)
        self._timeout = timeout
        self.pool: Pool[_Slot] = Pool(_Slot, _Slot.close, max_connections, timeout)

    def connect(self, slot: _Slot) -> _Connection:
        """The connection of a slot, made anew if there is none or the server has closed it."""
        if slot.connection is not None and not slot.connection.is_idle():
            slot.close()
        if slot.connection is None:
            slot.connection = _Connection(self._address, self._timeout)
            self._check(slot.connection)
        return slot.connection

    def _check(self, connection: _Connection) -> None:
        settings = connection.read_statistics(b"stats settings")
        connection.send(b"mn\r\n")
        connection.start()
        answer = connection.read_reply().code
        if answer != b"MN":
            _must_be_no_outage(answer)
            raise UnsuitableServer("is too old: memcached 1.6 or later is needed, for its meta commands")
        if settings.get("cas_enabled", "yes") != "yes":
            raise UnsuitableServer("runs with --disable-cas; tag versions need the CAS values")
        if settings.get("memory_file", "(null)") != "(null)":
            raise UnsuitableServer("runs with --memory-file; a restart would bring back old tag versions")
        try:
            self.item_size_max = int(settings.get("item_size_max", self.item_size_max))
        except ValueError as error:
            raise UnsuitableServer("does not tell item_size_max as a number") from error

    def statistics(self) -> dict[str, str]:
        """What ``stats`` says.

        :raises CacheUnavailable: the server does not answer.
        """
        self.breaker.admit()
        with _faults(self):
            slot = self.pool.take()
            try:
                found = self.connect(slot).read_statistics(b"stats")
            except BaseException:
                slot.close()
                raise
            finally:
                self.pool.give_back(slot)
        self.breaker.succeeded()
        return found

    def close(self) -> None:
        """Close the connections."""
        self.pool.clear()


def converse(
    batches: Sequence[tuple[Server, Pipeline]],
    *,
    essential: bool = False,
    meanwhile: Callable[[], object] | None = None,
) -> list[list[Reply]]:
    """Send a pipeline to each of several servers, then read the replies of each: one round trip in all.

    :param meanwhile: is called between the two.
    :param essential: try it although a server failed a moment ago.
    :returns: for each pipeline the replies to its commands.
    :raises CacheUnavailable: one of the servers does not answer. The others may have carried out their part.
    """
    taken: list[_Slot] = []
    answers: list[list[Reply]] = []
    complete = 0
    try:
        for server, pipeline in batches:
            server.breaker.admit(essential=essential)
            with _faults(server):
                taken.append(server.pool.take())
                answers.append(server.connect(taken[-1]).send(bytes(pipeline)))
        if meanwhile is not None:
            meanwhile()
        for (server, pipeline), slot, replies in zip(batches, taken, answers, strict=True):
            with _faults(server):
                assert slot.connection is not None
                slot.connection.start()
                replies.extend(slot.connection.read_reply() for _ in range(len(pipeline) - len(replies)))
            server.breaker.succeeded()
            complete += 1
    finally:
        for index, slot in enumerate(taken):
            if index >= complete:
                slot.close()
            batches[index][0].pool.give_back(slot)
    return answers


@contextmanager
def _faults(server: Server) -> Iterator[None]:
    try:
        yield
    except (OSError, UnsuitableServer) as error:
        server.breaker.failed(error)
        problem = str(error) if isinstance(error, UnsuitableServer) else f"does not answer: {error}"
        raise CacheUnavailable(f"{server.name} {problem}") from error


def _parse_address(address: str) -> tuple[str, int] | str:
    if address.startswith("/"):
        return address
    try:
        parts = urlsplit(f"//{address}")
        if parts.hostname and not (parts.username or parts.path or parts.query):
            return parts.hostname, parts.port or _PORT
    except ValueError:
        pass
    raise ConfigurationError(
        f"{shown(address)} is no address of a memcached server; write host, host:port or [v6]:port"
    )
