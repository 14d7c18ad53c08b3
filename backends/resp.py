"""The wire to Redis: its protocol, over connections that redis-py opens.

redis-py knows how to connect: addresses, sockets, TLS. What follows for each lookup is a few lines, which hiredis does the
work of: that is half the time of redis-py's own pool and reply handling, and most of what a lookup costs beside the round
trip itself. User, password and database are told here as well: redis-py would wait for each byte of the answers anew.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import hiredis
import redis

from querycache.backends.patience import Patience

__all__ = [
    "CONNECTIONS",
    "Batch",
    "Command",
    "Wire",
    "batch",
    "evaluate",
    "increments",
    "pack",
    "plantings",
    "word",
]

Command = tuple[Any, ...]
"""The words of a command, texts and bytes."""

_CHUNK = 2**16
_LONGEST_LINE = 2**16  # that tells a number, a length or an error
_MOST_BYTES = 2**30  # of an answer; a value has 2**29 at most
_INCOMPLETE = object()


class Batch(NamedTuple):
    """Some commands.

    Attributes:
        data: as they are sent.
        size: how many they are.
    """

    data: bytes
    size: int


def pack(command: Command) -> bytes:
    """A whole command as it is sent."""
    packed: bytes = hiredis.pack_command(command)
    return packed


def batch(*commands: Command) -> Batch:
    """Some commands, packed."""
    return Batch(b"".join(map(pack, commands)), len(commands))


# A commit sends two dozen words that are mostly known, and the client's packer takes three times as long for them.


def word(text: bytes) -> bytes:
    """A word of a command as it is sent."""
    return b"$%d\r\n%b\r\n" % (len(text), text)


_INCREMENT = b"*2\r\n" + word(b"INCR")


def increments(keys: Iterable[bytes]) -> bytes:
    """INCR of each key as it is sent.

    :param keys: at least one, as words.
    """
    return _INCREMENT + _INCREMENT.join(keys)


def plantings(keys: Iterable[bytes], value: int, lifetime: int) -> bytes:
    """SET of each key to a value, unless it has one, and EXPIRE, as they are sent.

    :param keys: as words.
    :param lifetime: seconds.
    """
    given, ttl = word(b"%d" % value), word(b"%d" % lifetime)
    command = b"*6\r\n$3\r\nSET\r\n%b" + given + b"$2\r\nNX\r\n$2\r\nEX\r\n" + ttl
    command += b"*3\r\n$6\r\nEXPIRE\r\n%b" + ttl
    return b"".join([command % (key, key) for key in keys])


def evaluate(verb: str, script: str, size: int, keys: bytes, argument: bytes) -> bytes:
    """EVALSHA or EVAL as it is sent.

    :param size: how many keys these are.
    :param keys: as words, one after the other.
    """
    return _beginning(verb, script, size) + keys + word(argument)


@lru_cache(maxsize=256)
def _beginning(verb: str, script: str, size: int) -> bytes:
    words = verb.encode(), script.encode(), b"%d" % size
    return b"*%d\r\n%b" % (size + 4, b"".join(map(word, words)))


def _refuse(refusals: list[redis.ResponseError], message: str) -> redis.ResponseError:
    """What the server answered to a command that it did not carry out; the first word says why. It is noted, too, so that
    nobody need look for it among the replies."""
    refusal = redis.ResponseError
    if message.startswith("NOSCRIPT"):
        refusal = redis.exceptions.NoScriptError
    elif "READONLY " in message:  # older servers put it in the middle of what they say of a script
        refusal = redis.exceptions.ReadOnlyError
    refusals.append(refusal(message))
    return refusals[-1]


def _watch(socket: Any) -> Callable[[], list[Any]]:
    """What tells, without waiting, whether anything can be read from a socket."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(socket, select.POLLIN | _CLOSED)
        return partial(poll.poll, 0)
    return lambda: select.select([socket], [], [], 0)[0]  # on Windows


_CLOSED: int = getattr(select, "POLLRDHUP", 0)
"""Tells that the other side has closed, also where there is something to read; 0 where nothing does (on Linux it does)."""


class _WithSocket:
    """A connection of redis-py whose socket may be used. (Read in redis-py 5.3 to 8.1.)"""

    _sock: Any

    @property
    def socket(self) -> Any:
        return self._sock


class _TcpConnection(_WithSocket, redis.Connection):
    pass


class _TlsConnection(_WithSocket, redis.SSLConnection):
    pass


class _UnixConnection(_WithSocket, redis.UnixDomainSocketConnection):
    pass


CONNECTIONS = {"redis": _TcpConnection, "rediss": _TlsConnection, "unix": _UnixConnection}
"""By scheme of an address, what a :class:`Wire` is made of."""


def _say_nothing(connection: object) -> None:
    pass


class Wire:
    """One connection, open or not. For one thread at a time.

    A method that raises RedisError or OSError has closed it, and the next :meth:`open` makes it anew. ReadOnlyError is raised
    where the server is not the master any more.

    :param connection: one of :data:`CONNECTIONS`, not connected yet.
    :param introduce: is called with the wire whenever it has been opened.
    """

    run = ""
    """Which run of the server it leads to."""
    refusals: list[redis.ResponseError]
    """Those among the replies that were read last."""

    def __init__(self, connection: Any, introduce: Callable[[Wire], None]) -> None:
        self._connection = connection
        connection.redis_connect_func = _say_nothing  # in place of what redis-py says when it has connected
        self._introduce = introduce
        self._socket: Any = None
        self._reader: Any = None
        self._has_data: Callable[[], list[Any]] = list
        self._again: Callable[[], bytes] | None = None
        self.refusals = []
        self._patience = Patience(connection.socket_timeout)

    def open(self) -> None:
        """Make sure that the server is there and nothing is left to read, as far as shows without asking it."""
        if self._socket is not None:
            try:
                if not _CLOSED:
                    self._settle()
                found = self._has_data()
                # What has come is the reply to what was posted, or else the server has closed it.
                if not found or (self._again is not None and found[0][1] == select.POLLIN):
                    return
            except redis.exceptions.ReadOnlyError:
                raise
            except (redis.RedisError, OSError):
                pass
            self.close()
        try:
            self._connection.connect()
            self._socket = self._connection.socket
            self._reader = hiredis.Reader(
                protocolError=redis.InvalidResponse,
                replyError=partial(_refuse, self.refusals),  # refers to nothing that refers to the reader
                notEnoughData=_INCOMPLETE,
            )
            self._has_data = _watch(self._socket)
            self._sign_in(self._connection.username, self._connection.password or "")
            self._select(self._connection.db)
            self._introduce(self)
        except BaseException:
            self.close()
            raise

    def converse(self, commands: Batch, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Send commands and read a reply for each; a refusal is among the replies, as the exception that it is.

        :param meanwhile: is called between the two.
        """
        try:
            self._socket.sendall(commands.data)
            if meanwhile is not None:
                meanwhile()
            return self._receive(commands.size)
        except BaseException:
            self.close()
            raise

    def post(self, command: bytes, again: Callable[[], bytes]) -> None:
        """Send a command, and leave its reply to be read when the wire is used next.

        :param again: gives what to send then, where the server did not have the script.
        """
        while self._again is not None:
            self._settle()
        try:
            self._again = again  # before it is sent: a signal may come between
            self._socket.sendall(command)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, if it is open."""
        self._socket = self._reader = self._again = None
        self._has_data = list  # lets go of the socket
        self._connection.disconnect()

    def _sign_in(self, user: str | None, password: str) -> None:
        if not user and not password:
            return
        [reply] = self.converse(batch(("AUTH", user, password) if user else ("AUTH", password)))
        if user and "wrong number of arguments" in str(reply):  # Redis 5 has no users
            [reply] = self.converse(batch(("AUTH", password)))
        if reply != b"OK":
            # A server without AUTH repeats what it was told.
            told = str(reply).replace(password, "***") if password else reply
            raise redis.AuthenticationError(f"it does not take this user and password: {told}")

    def _select(self, database: int) -> None:
        if not database:  # as it is; a proxy need not know the command
            return
        [reply] = self.converse(batch(("SELECT", str(database))))
        if reply != b"OK":
            raise redis.ConnectionError(f"it gives no access to database {database}: {reply}")

    def _settle(self) -> None:
        """Read the reply to what was posted, if anything was."""
        if self._again is None:
            return
        try:
            self._receive(0)
        except BaseException:  # a signal, for example: the reply is still to come
            self.close()
            raise

    def _receive(self, size: int) -> list[Any]:
        """The next replies, as many as these, after that to what was posted; with the refusals among them noted."""
        again, self._again = self._again, None
        expected = size if again is None else size + 1
        refusals, gets = self.refusals, self._reader.gets
        refusals.clear()
        self._patience.start()
        try:
            replies = list(islice(iter(gets, _INCOMPLETE), expected))
            while len(replies) < expected:
                replies.append(self._read())
                replies += islice(iter(gets, _INCOMPLETE), expected - len(replies))
        except (TypeError, MemoryError) as error:  # a map of RESP 3 whose keys are arrays; a list of billions
            raise redis.InvalidResponse("a reply that cannot be read") from error
        for refusal in refusals:
            if isinstance(refusal, redis.exceptions.ReadOnlyError):
                raise refusal
        if again is not None:
            posted = replies.pop(0)
            if refusals and refusals[0] is posted:
                del refusals[0]
                # Where the server refused it otherwise, the marks of the writer stay, and heal as those of one that died.
                if again is not bytes and isinstance(posted, redis.exceptions.NoScriptError):
                    self.post(again(), bytes)  # which is not refused for that
        return replies

    def _read(self) -> Any:
        """The next reply, which has not come yet or not all of it."""
        in_line = not self._reader.has_data()  # what comes next begins with a line
        received = 0
        while True:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise redis.ConnectionError("the server closed the connection")
            self._reader.feed(data)
            reply = self._reader.gets()
            if reply is not _INCOMPLETE:
                return reply
            self._patience.received(len(data))
            received += len(data)
            in_line = in_line and b"\n" not in data
            if received > (_LONGEST_LINE if in_line else _MOST_BYTES):
                raise redis.InvalidResponse("an answer without end")
