"""How fast a hit is: against the databases, against the documented recipe, and against the limit.

Prints medians and their ratios, taken in one run and in turns (:mod:`benchmarks.timing`), then what is required of
them. The servers are those of ``python -m tests.servers``; what there is no server for is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import sqlalchemy
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.arms import Servers, arms
from benchmarks.forum import CASES, Case, fill, plain
from benchmarks.timing import medians
from querycache import QueryCache

__all__ = ["main"]

ROWS = (1, 10, 100, 1000)
ENGINES = 4
"""Of each kind, to measure what the library costs a statement that does not ask for it."""
Cells = Mapping[tuple[str, int], Mapping[str, float]]
"""Medians in microseconds, by case and number of rows, then by arm."""


# --- Measuring ------------------------------------------------------------------------------------


def measure(servers: Servers, sizes: Sequence[int], seconds: float, say: Callable[[str], None]) -> Cells:
    cells: dict[tuple[str, int], Mapping[str, float]] = {}
    contestants = arms(servers)
    for case in CASES:
        for rows in sizes:
            runs = {arm.name: arm.run(case, rows) for arm in contestants}
            compare(case, runs)
            cells[case.name, rows] = medians(runs, seconds=seconds)
            say(f"measured {case.name}, {rows} rows")
    return cells


def compare(case: Case, runs: Mapping[str, Callable[[], Sequence[Any]]]) -> None:
    """Raise if two arms do not give the same answer."""
    answers = {name: plain(run()) for name, run in runs.items()}
    expected = answers["SQLite"]
    for name, answer in answers.items():
        if answer != expected:
            raise AssertionError(f"{case.name}: {name} and SQLite do not give the same answer")


def overhead(urls: Mapping[str, str], seconds: float) -> dict[str, dict[str, float]]:
    """For each database, by name, what :func:`overhead_on` measures."""
    return {name: overhead_on(url, seconds) for name, url in urls.items()}


def overhead_on(url: str, seconds: float) -> dict[str, float]:
    """A statement that does not ask for the cache, beside a handler that does nothing.

    There are several engines of each kind, since where the objects of one lie in memory makes a difference of a percent.
    It is the processor time of this process, in which all of the difference lies: how long a server takes to wake up
    varies by more, and would only make the ratio smaller.
    """
    (case,) = (each for each in CASES if each.name == "plain entity")
    statement = case.statement(1)

    def handled() -> sessionmaker[Session]:
        factory = sessionmaker(create_engine(url))
        event.listen(factory, "do_orm_execute", lambda state: None)
        return factory

    def attached() -> sessionmaker[Session]:
        factory = sessionmaker(create_engine(url))
        QueryCache("memory://").attach(factory)
        return factory

    def run(factory: Any) -> Callable[[], object]:
        def ask() -> object:
            with factory() as session:
                return case.fetch(session, statement)

        return ask

    kinds = {"empty listener": handled, "cache attached": attached}
    runs = {f"{kind} {number}": run(make()) for number in range(ENGINES) for kind, make in kinds.items()}
    taken = medians(runs, seconds=seconds, least=200, clock=time.process_time_ns)
    return {kind: mean(taken[f"{kind} {number}"] for number in range(ENGINES)) for kind in kinds}


# --- What is required -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """A ratio that must hold. ``bound`` is its least value, or where ``at_most`` its greatest."""

    what: str
    bound: float
    measured: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


_FASTER = {
    ("PostgreSQL", "memory"): (4.5, 4.0, 2.0, 1.3),
    ("PostgreSQL", "Redis"): (2.2, 2.0, 1.5, 1.12),
    ("recipe memory", "memory"): (1.3, 1.8, 2.8, 3.3),
    ("recipe Redis", "Redis"): (1.3, 1.8, 2.8, 3.3),
}
"""How many times as fast as the first the second must be, for a plain entity, by number of rows as in ROWS."""


def requirements(cells: Cells, spent: Mapping[str, Mapping[str, float]]) -> Iterator[Requirement]:
    """Everything that is required of what was measured."""
    for (slower, faster), bounds in _FASTER.items():
        for rows, bound in zip(ROWS, bounds, strict=True):
            cell = cells.get(("plain entity", rows), {})
            if slower in cell and faster in cell:
                what = f"plain entity, {rows} rows: {faster} hit against {slower}"
                yield Requirement(what, bound, cell[slower] / cell[faster])
    for rows in ROWS:
        cell = cells.get(("plain entity", rows), {})
        if rows >= 100 and cell:
            what = f"plain entity, {rows} rows: memory hit against the limit"
            yield Requirement(what, 1.4, cell["memory"] / cell["limit"], at_most=True)
    for rows in ROWS:
        cell = cells.get(("aggregate", rows), {})
        if "PostgreSQL" in cell:
            what = f"aggregate, {rows} rows: memory hit against PostgreSQL"
            yield Requirement(what, 10, cell["PostgreSQL"] / cell["memory"])
    for name, measured in spent.items():
        what = f"no cache option, {name}, 1 row: against an empty listener"
        yield Requirement(what, 1.05, measured["cache attached"] / measured["empty listener"], at_most=True)


# --- Saying it ------------------------------------------------------------------------------------


def print_table(cells: Cells, title: str, number: Callable[[Mapping[str, float], str], str]) -> None:
    names = list(next(iter(cells.values())))
    print(f"\n{title}\n")
    print(f"  {'':18}{'rows':>5}" + "".join(f"{name:>15}" for name in names))
    last = ""
    for (case, rows), cell in cells.items():
        shown = case if case != last else ""
        print(f"  {shown:18}{rows:>5}" + "".join(f"{number(cell, name):>15}" for name in names))
        last = case


def plot(cells: Cells, path: Path) -> None:
    """A panel per case: how many times as fast as the database each arm is, by number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    base = baseline(cells)
    styles = {
        "recipe memory": ("tab:red", "--"),
        "recipe Redis": ("tab:orange", "--"),
        "memory": ("tab:blue", "-"),
        "Redis": ("tab:green", "-"),
        "memcached": ("tab:olive", "-"),
        "limit": ("0.5", ":"),
        "SQLite": ("0.7", "-."),
    }
    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    *panels, legend = grid.flat
    for panel, case in zip(panels, CASES, strict=True):
        sizes = [rows for name, rows in cells if name == case.name]
        for arm, (color, line) in styles.items():
            measured = [cells[case.name, rows] for rows in sizes]
            if arm in measured[0] and arm != base:
                ratios = [cell[base] / cell[arm] for cell in measured]
                panel.plot(sizes, ratios, line, color=color, marker="o", markersize=4, label=arm)
        panel.axhline(1, color="black", linewidth=1, label=base)
        panel.set(title=case.name, xlabel="rows", xscale="log", yscale="log")
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.set_ylabel(f"times as fast as {base}")
    legend.axis("off")
    legend.legend(*panels[0].get_legend_handles_labels(), loc="center left", fontsize=11)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def baseline(cells: Cells) -> str:
    """What everything is compared with."""
    return "PostgreSQL" if "PostgreSQL" in next(iter(cells.values())) else "SQLite"


def report(cells: Cells, spent: Mapping[str, Mapping[str, float]]) -> None:
    base = baseline(cells)
    print_table(cells, "microseconds, medians", lambda cell, name: f"{cell[name]:,.0f}".replace(",", " "))
    print_table(cells, f"times as fast as {base}", lambda cell, name: f"{cell[base] / cell[name]:.2f}")
    print("\nwithout a cache option (plain entity, 1 row; microseconds)\n")
    for database, measured in spent.items():
        for name, median in measured.items():
            print(f"  {database:12}{name:16}{median:>10.1f}")
    print(f"\n{'required':64}{'':>10}{'measured':>10}")
    missed = 0
    for each in requirements(cells, spent):
        missed += not each.met
        bound = f"{'at most' if each.at_most else 'at least'} {each.bound:g}"
        print(f"  {each.what:58}{bound:>14}{each.measured:>10.2f}  {'ok' if each.met else 'MISSED'}")
    print(f"\n{missed or 'none'} missed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="sampling time of each cell (default 4)")
    parser.add_argument(
        "--rows", type=lambda text: [int(each) for each in text.split(",")], default=ROWS, metavar="1,10,…"
    )
    parser.add_argument("--plot", type=Path, default=Path("build/read_path.png"), help="where the plot goes")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        servers = Servers.from_environment(f"sqlite:///{directory}/forum.db")
        for url in {servers.sqlite, servers.database}:
            engine = create_engine(url)
            fill(engine)
            engine.dispose()
        for name in servers.missing():
            print(f"MISSING, LEFT OUT: {name}", file=sys.stderr)
        if os.getloadavg()[0] > 1:
            print(
                f"THE MACHINE IS BUSY (load {os.getloadavg()[0]:.1f}): what asks a server waits for a processor",
                file=sys.stderr,
            )
        cells = measure(
            servers, options.rows, options.seconds, lambda text: print(text, file=sys.stderr, flush=True)
        )
        databases = {"SQLite": servers.sqlite, baseline(cells): servers.database}
        spent = overhead(databases, 2 * options.seconds)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(cells, options.plot)
    if options.json:
        document = {
            "python": platform.python_version(),
            "sqlalchemy": sqlalchemy.__version__,
            "missing": servers.missing(),
            "microseconds": [
                {"case": case, "rows": rows, "medians": dict(cell)} for (case, rows), cell in cells.items()
            ],
            "without_cache_option": spent,
            "required": [{**asdict(each), "met": each.met} for each in requirements(cells, spent)],
        }
        print(json.dumps(document, indent=2))
        return 0
    print(f"Python {platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}; plot in {options.plot}")
    report(cells, spent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
