"""What happened: records that each thread appends to a file of its own, so that they outlive a killed process.

What must not be lost (that a commit is about to be called) is written before it happens; reads are written in
batches, and the last batch of a killed process is not judged.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.torture.schema import ROWS, State

__all__ = ["Crash", "History", "Intent", "Outcome", "Part", "Read", "Record", "Stats", "load", "now"]

now = time.monotonic_ns
"""Nanoseconds of a clock that all processes of the machine share."""


class Part(msgspec.Struct, array_like=True, frozen=True):
    """What a statement told of some rows.

    Attributes:
        scope: which rows these are: see `tests.torture.shapes`.
        argument: the value that the statement was given.
        rows: the rows that it returned, with their states.
        count: the number that it returned instead; -1 where it returned rows.
        most: how many of the rows it would count; 1 where all that was asked is whether there are any.
    """

    scope: str
    argument: int
    rows: dict[int, State]
    count: int = -1
    most: int = ROWS


class Read(msgspec.Struct, array_like=True, frozen=True, tag=0):
    """One read. Times in nanoseconds.

    Attributes:
        shape: its name.
        begin: when it began; where a transaction sees one snapshot throughout, when that transaction began.
        statements: for each statement that it consists of the parts of its answer, which are of one moment.
        own: what the transaction had written before, by row.
    """

    shape: str
    begin: int
    end: int
    statements: list[list[Part]]
    own: dict[int, State | None]


class Intent(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """A commit is about to be called.

    Attributes:
        txn: the row in the log table that is committed with it.
        time: when.
        writes: the rows that it changes, with their states after it.
        steps: by which ways, for reports.
    """

    txn: str
    time: int
    writes: dict[int, State | None]
    steps: list[str] = []


class Outcome(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """A call of commit is over: it returned, or it raised."""

    txn: str
    time: int
    raised: str


class Stats(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """What the cache of a process has counted so far, and the microseconds of processor time that it has used."""

    counts: dict[str, int]


class Crash(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """A worker met an exception that nobody expected."""

    trace: str


Record = Read | Intent | Outcome | Stats | Crash

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Record)
_LENGTH = struct.Struct(">I")
_BATCH = 100


class History:
    """The file of one thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._batch: list[bytes] = []

    def add(self, record: Record) -> None:
        data = _ENCODER.encode(record)
        self._batch.append(_LENGTH.pack(len(data)) + data)
        if len(self._batch) >= _BATCH or not isinstance(record, Read):
            self.flush()

    def flush(self) -> None:
        os.write(self._file, b"".join(self._batch))
        self._batch.clear()

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def load(path: Path) -> Iterator[Any]:
    """The records of a file; a last one that was cut off is left out."""
    data = path.read_bytes()
    position = 0
    while position + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            return
        yield _DECODER.decode(data[position : position + length])
        position += length
