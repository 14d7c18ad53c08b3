"""Run SQLAlchemy's own ORM tests on replayed rows: ``python -m tests.sqlalchemy_suite``.

Exit status 0 if at least 99.5 % of what passes without the plugin passes with it, and ``known.toml`` lists
exactly the rest; 1 otherwise. With ``--core`` its tests of Core and of dialects, with every engine watched for writes and
nothing answered: 0 if all that passes without the library passes with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from pathlib import Path

import sqlalchemy

from tests.sqlalchemy_suite.run import NOTICED, Case, run
from tests.sqlalchemy_suite.source import CACHE, package_folder, source_folder
from tests.sqlalchemy_suite.verdict import REQUIRED, Verdict, judge, read_known

_WHOLE = ("test/orm", "test/ext")
_CORE = ("test/sql", "test/engine", "test/base", "test/dialect")
# where most statements are answered in the least time
_QUICK = (
    "test/orm/inheritance/test_polymorphic_rel.py",
    "test/orm/test_deferred.py",
    "test/orm/test_events.py",
    "test/orm/test_relationship_criteria.py",
    "test/ext/test_horizontal_shard.py",
)
_KNOWN = Path(__file__).with_name("known.toml")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sqlalchemy_suite", description=__doc__)
    parser.add_argument(
        "--version", default=sqlalchemy.__version__, help="of SQLAlchemy; the installed one unless given"
    )
    parser.add_argument(
        "--select", default="", metavar="EXPR", help="only the tests that match, as pytest -k"
    )
    parser.add_argument("--quick", action="store_true", help="a part that takes about half a minute")
    parser.add_argument("--core", action="store_true", help="those of Core, where all engines are watched")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()

    source, package = source_folder(arguments.version), package_folder(arguments.version)
    paths = _CORE if arguments.core else _QUICK if arguments.quick else _WHOLE
    plugin = "watching" if arguments.core else "plugin"
    results = CACHE / f"results-{arguments.version}"
    results.mkdir(exist_ok=True)

    def tests(name: str, plugin: str = "") -> dict[str, Case]:
        return run(source, package, results / name, paths, title=name, select=arguments.select, plugin=plugin)

    with_plugin = tests("with", f"tests.sqlalchemy_suite.{plugin}")
    failed = any(test.outcome == "failed" for test in with_plugin.values())
    # of Core, it is only asked what fails without the library where something does
    without = tests("without") if failed or not arguments.core else with_plugin
    verdict = judge(
        without,
        with_plugin,
        [] if arguments.core else read_known(_KNOWN, arguments.version),
        whole=not arguments.quick and not arguments.select,
    )
    good = verdict.unchanged if arguments.core else verdict.good
    if arguments.json:
        fields = dataclasses.asdict(verdict) | {"ratio": verdict.ratio, "good": good}
        print(json.dumps({"version": arguments.version, **fields}, indent=2))
    else:
        what = "Core and of dialects" if arguments.core else "the ORM and of extensions"
        print(f"\nSQLAlchemy {arguments.version}, its tests of {what}, on SQLite in memory\n")
        _print(verdict, results, core=arguments.core)
        print("\nGood." if good else "\nNot good.")
    return 0 if good else 1


def _print(verdict: Verdict, results: Path, *, core: bool) -> None:
    lines: list[tuple[str, str]] = [
        ("tests that pass without the plugin", f"{verdict.baseline:,}"),
        ("of these pass with it", f"{verdict.kept:,}"),
    ]
    if core:
        lines.append(("statements noticed", f"{verdict.left.get(NOTICED, 0):,}"))
    else:
        lines += [
            (f"ratio, at least {REQUIRED:.1%}", f"{verdict.ratio:.2%}"),
            ("tests with a statement answered from bytes", f"{verdict.touched:,}"),
            ("of these pass with the plugin", f"{verdict.touched_kept:,}"),
            ("statements answered from bytes", f"{verdict.answered:,}"),
            ("and the post-loads of these", f"{verdict.completed:,}"),
            *((f"left to the database: {reason}", f"{count:,}") for reason, count in verdict.left.items()),
        ]
    for label, value in lines:
        print(f"  {label:48}{value:>10}")
    if verdict.explained:
        print("\nPass no more, as listed:")
    for reason, tests in verdict.explained.items():
        print(textwrap.fill(reason, 100, initial_indent="\n  ", subsequent_indent="  "))
        for test in tests:
            print(f"    {test}")
    if verdict.unexplained:
        print(
            f"\nPass no more, and are not in {_KNOWN.name}; how they failed is in {results / 'with.log'}:\n"
        )
        for test in verdict.unexplained:
            print(f"    {test}")
    if verdict.outdated:
        print(f"\nIn {_KNOWN.name}, but pass, or are no tests:\n")
        for test in verdict.outdated:
            print(f"    {test}")


if __name__ == "__main__":
    sys.exit(main())
