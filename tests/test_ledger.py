"""The ledger over the memory store: what one process sees of the protocol. See also
``test_ledger_model.py``."""

from __future__ import annotations

from querycache.backends.memory import MemoryBackend
from querycache.ledger import Ledger


def make_ledger() -> Ledger:
    return Ledger(MemoryBackend({}), "witness")


def test_a_first_miss_on_a_cold_tag_can_fill_at_once() -> None:
    ledger = make_ledger()
    reading = ledger.lookup("entry", ["a", "b"])
    assert reading.payload is None and not reading.stale and reading.fillable
    assert ledger.fill("entry", reading, b"answer")
    assert ledger.lookup("entry", ["a", "b"]).payload == b"answer"


def test_a_marked_tag_neither_hits_nor_fills_and_is_new_afterwards() -> None:
    ledger = make_ledger()
    before = ledger.lookup("entry", ["a"])
    ledger.fill("entry", before, b"old")
    marks = ledger.begin(["a"])
    during = ledger.lookup("entry", ["a"])
    assert during.payload is None and during.stale and not during.fillable
    assert not ledger.fill("entry", during, b"old")
    ledger.end(marks)
    after = ledger.lookup("entry", ["a"])
    assert after.payload is None and after.stale and after.fillable
    ledger.fill("entry", before, b"old")
    assert ledger.lookup("entry", ["a"]).payload is None
    ledger.fill("entry", after, b"new")
    assert ledger.lookup("entry", ["a"]).payload == b"new"
