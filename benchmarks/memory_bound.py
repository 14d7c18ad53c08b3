"""Whether a region in memory keeps within its bound: a million answers filled into one that has room for some.

Two numbers are compared with ``max_bytes``: what the store accounts for, and what the process really takes. The
second is the growth of the resident set since the store was made, so answers are sized like real ones (from one
short row to a hundred rows), statements are as many as in a large application, and rows differ.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from querycache.backends.memory import MemoryBackend
from querycache.ledger import Ledger

__all__ = ["main"]

TOLERANCE = 0.05
_TAGS = 20_000


@dataclass
class Moment:
    """What there was after so many fills; bytes."""

    fills: int
    accounted: int
    resident: int


def resident() -> int:
    """The resident set of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this benchmark needs Linux")


def give_back() -> None:
    """Let the allocator return what is free, so that the resident set is what is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def fill(ledger: Ledger, fills: int, chance: random.Random) -> Iterator[int]:
    """Fill as the read path does: look the entry and its tags up, store it under them."""
    sizes = [int(200 * 1.6 ** chance.uniform(0, 8)) for _ in range(1000)]
    noise = chance.randbytes(2 * max(sizes))
    for number in range(1, fills + 1):
        tags = ["qc:t:*", "qc:t:region:default", f"qc:t:slot:articles.id:{chance.randrange(_TAGS)}"]
        key = f"qc:e:{chance.getrandbits(160):040x}"
        reading = ledger.lookup(key, tags)
        size = sizes[number % len(sizes)]
        start = chance.randrange(len(noise) - size)
        if not ledger.fill(key, reading, noise[start : start + size], 3600.0):
            raise RuntimeError(f"fill {number} was refused: {reading}")
        yield number


def measure(max_bytes: int, fills: int) -> list[Moment]:
    """Fill, and look every tenth of the way."""
    chance = random.Random(1)
    give_back()
    before = resident()
    store = MemoryBackend({"max_bytes": max_bytes})
    ledger = Ledger(store, "qc:writers")
    moments = []
    for number in fill(ledger, fills, chance):
        if number % (fills // 10) == 0:
            give_back()
            moments.append(Moment(number, store.used_bytes, resident() - before))
    return moments


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_bound", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--max-mb", type=int, default=256, help="max_bytes in MiB (default 256)")
    parser.add_argument("--fills", type=int, default=1_000_000, help="number of fills (default a million)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    options = parser.parse_args(arguments)
    bound = options.max_mb * 2**20
    start = time.perf_counter()
    moments = measure(bound, options.fills)
    taken = time.perf_counter() - start
    full = [each for each in moments if each.accounted > bound / 2]
    accounted = max(each.accounted for each in moments) / bound
    grown = max(each.resident for each in moments) / bound
    met = bool(full) and accounted <= 1 and grown <= 1 + TOLERANCE
    if options.json:
        document = {"max_bytes": bound, "moments": [asdict(each) for each in moments], "met": met}
        print(json.dumps(document, indent=2))
        return 0
    print(f"a region with max_bytes = {options.max_mb} MiB, {options.fills} fills in {taken:.0f} s; MiB\n")
    print(f"  {'fills':>10}{'accounted':>12}{'process grew by':>18}")
    for each in moments:
        print(f"  {each.fills:>10}{each.accounted / 2**20:>12.1f}{each.resident / 2**20:>18.1f}")
    print(f"\n  accounted for, at most      {accounted:7.1%} of max_bytes")
    print(f"  growth of the process       {grown:7.1%} of max_bytes, at most {1 + TOLERANCE:.0%}")
    print(f"  {'ok' if met else 'MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
