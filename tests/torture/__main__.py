"""The history checker by hand: `python -m tests.torture`, or `make torture`.

Rounds of about half a minute each, in turn on the pairs of a database and a cache server, and in each pair in turn with
`on_outage="available"` and `"refuse"`, at READ COMMITTED and at REPEATABLE READ. The servers are its own, since it
kills them. Ends with 1 if a read was illegal, or, with `--mutant`, if none was found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.servers import Server, obtain
from tests.torture.mutants import MUTANTS
from tests.torture.round import Report, run_round
from tests.torture.worker import SNAPSHOT_LEVEL

PAIRS = ("postgresql+redis", "postgresql+memcached", "mariadb+redis")
MINUTES, READS = 10.0, 2_000_000
ROUND_SECONDS = 33.4
"""In ten minutes every pair meets every isolation level with both answers to an outage, once."""
MUTANT_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of work (default: {MINUTES:g}, and on until there are {READS:,} reads)",
    )
    parser.add_argument("--reads", type=int, help="stop after so many reads, if that is sooner")
    parser.add_argument("--pair", choices=PAIRS, action="append", help="only this one; may be repeated")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=4, help="of each process (default 4)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between faults (default 10)")
    parser.add_argument("--seed", default="", help="for the random choices of the workers and of the faults")
    parser.add_argument(
        "--mutant", choices=[*MUTANTS, "all"], help="switch a protection off, and find that it is"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    with _servers(options.pair or PAIRS) as servers:
        if options.mutant:
            return _find_mutants(options, servers)
        report = _torture(options, servers)
    print(json.dumps(_as_json(report)) if options.json else _as_text(report))
    return 1 if report.illegal else 0


@contextlib.contextmanager
def _servers(pairs: Sequence[str]) -> Iterator[Mapping[str, Server]]:
    with contextlib.ExitStack() as stack:
        names = sorted({name for pair in pairs for name in pair.split("+")})
        yield {name: stack.enter_context(obtain(name, durable=False)) for name in names}


def _torture(options: argparse.Namespace, servers: Mapping[str, Server]) -> Report:
    total = Report()
    pairs = options.pair or PAIRS
    # One after the other of every list at once, so that a few rounds meet much.
    levels = ("READ COMMITTED", "READ COMMITTED", SNAPSHOT_LEVEL)
    outages = ("available", "refuse")
    budget = (options.minutes or MINUTES) * 60
    at_least = 0 if options.minutes else READS
    number = 0
    report = Report()
    while not (options.reads and total.reads >= options.reads):
        left = budget - total.seconds
        if left < 1:
            if total.reads >= at_least or not report.reads:
                break
            left = ROUND_SECONDS
        turn = number // len(pairs)
        database, store = pairs[number % len(pairs)].split("+")
        on_outage: Any = outages[turn % 2]
        isolation = levels[turn % 3]
        report = run_round(
            servers[database].url,
            servers[store],
            seconds=min(ROUND_SECONDS, left),
            processes=options.processes,
            threads=options.threads,
            on_outage=on_outage,
            isolation=isolation,
            every=options.every,
            seed=f"{options.seed}-{number}" if options.seed else "",
        )
        total.add(report)
        number += 1
        _say(
            f"{total.seconds:5.0f} s  {database} + {store}, {on_outage}, {isolation.lower()}: {report.reads} reads, "
            f"{report.commits} commits, {report.faults.total()} faults, hit ratio {report.hit_ratio:.2f}, "
            f"illegal {len(report.illegal)}; so far {total.reads} reads"
        )
        for illegal in report.illegal[:5]:
            _say(f"    {illegal}")
        for when in report.times:
            _say(f"    {when}")
    return total


def _find_mutants(options: argparse.Namespace, servers: Mapping[str, Server]) -> int:
    names = list(MUTANTS) if options.mutant == "all" else [options.mutant]
    missed = 0
    for name in names:
        begin = time.monotonic()
        total = Report()
        while not total.illegal and total.seconds < (options.minutes or MINUTES) * 60:
            total.add(find(name, servers["postgresql"].url, servers["redis"], options.seed))
        missed += not total.illegal
        _say(
            f"{name}: {MUTANTS[name].what}: {len(total.illegal)} illegal reads of {total.reads}, "
            f"after {time.monotonic() - begin:.0f} s"
        )
        for illegal in total.illegal[:1]:
            _say(f"    {illegal}")
    return 1 if missed else 0


def find(name: str, database_url: str, store: Server, seed: str = "") -> Report:
    """A round in which a mutant should be found: as many writes, and faults as close together, as show it best."""
    return run_round(
        database_url,
        store,
        seconds=MUTANT_SECONDS,
        writes=MUTANTS[name].writes,
        every=MUTANTS[name].every,
        mutant=name,
        seed=seed,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _as_json(report: Report) -> Mapping[str, object]:
    return {
        "reads": report.reads,
        "rows": report.rows,
        "commits": report.commits,
        "commits that raised": report.refused,
        "faults": dict(report.faults),
        "hit ratio": round(report.hit_ratio, 3),
        "completed with rows of other answers": report.cache["completed"],
        "illegal reads": len(report.illegal),
        "seconds": round(report.seconds, 1),
        "processor seconds of the workers": round(report.cache["processor"] / 1e6, 1),
        "slowest commit, seconds": round(report.slowest, 3),
        "reads by shape": dict(report.shapes),
        "illegal": [str(illegal) for illegal in report.illegal[:100]],
        "processors": os.cpu_count(),
    }


def _as_text(report: Report) -> str:
    faults = ", ".join(f"{kind} {number}" for kind, number in sorted(report.faults.items()))
    return "\n".join(
        (
            f"reads checked    {report.reads:,} ({report.rows:,} rows) in {report.seconds:.0f} s",
            f"commits          {report.commits:,}, and {report.refused:,} that raised",
            f"faults injected  {report.faults.total()}: {faults}",
            f"hit ratio        {report.hit_ratio:.3f}",
            f"completed        {report.cache['completed']:,} answers with rows that others had",
            f"workers          {report.cache['processor'] / 1e6:.0f} s of processor time",
            f"slowest commit   {report.slowest:.2f} s",
            f"illegal reads: {len(report.illegal)}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
