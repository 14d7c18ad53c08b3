"""One run of SQLAlchemy's tests: what became of each, and what the plugin has counted in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

__all__ = ["ANSWERED", "COMPLETED", "NOTICED", "PROPERTY", "Case", "Outcome", "read", "run"]

Outcome = Literal["passed", "failed", "skipped"]

PROPERTY = "querycache"
"""The property of a test's report in which the plugin leaves its counts, as JSON."""
ANSWERED = "answered"
"""What the plugin counts as this: statements whose answer was a hit."""
COMPLETED = "completed"
"""And as this: post-loads whose answer came from bytes. Other counts are of reasons why one did not."""
NOTICED = "noticed"
"""What the plugin of ``--core`` counts: statements that it was told of."""

_REPOSITORY = Path(__file__).parents[2]
_PERCENT = re.compile(r"\[ *(\d+)%\]$")
# part of the names of test classes that are made once for each database
_DATABASE = re.compile(r"_sqlite\+pysqlite_[\d_]+$")


@dataclass(frozen=True, slots=True)
class Case:
    """What became of one test.

    Attributes:
        outcome: "failed" also where setting it up or tearing it down failed.
        counts: how many of its statements were answered, and for what reasons others were not.
    """

    outcome: Outcome
    counts: Mapping[str, int]


def run(
    source: Path,
    package: Path | None,
    results: Path,
    paths: Sequence[str],
    *,
    title: str,
    select: str = "",
    plugin: str = "",
) -> dict[str, Case]:
    """Run tests on SQLite in memory, and show progress on stderr.

    Args:
        source: SQLAlchemy's source distribution.
        package: where to import SQLAlchemy from; None for the installed one.
        results: what pytest prints, and its report, are left there: this name with ``.log`` and ``.xml``.
        paths: files and folders below ``source``.
        title: what the progress is called.
        select: a pytest expression (``-k``) for the tests to run; empty for all.
        plugin: module of a pytest plugin to load; empty for none.
    Returns:
        The tests by id.
    Raises:
        RuntimeError: pytest did not come to its end.
    """
    log, report = results.with_suffix(".log"), results.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-n", "auto", "--nomemory", "--notimingintensive", "--nomypy"]
    command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
    if plugin:
        command += ["-p", plugin]
    if select:
        command += ["-k", select]
    folders = [str(_REPOSITORY), *([str(package)] if package else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        # tells SQLAlchemy's conftest.py to test the installed package
        "PYTHONNOUSERSITE": "1",
        "PYTEST_ADDOPTS": "",
    }
    with (
        log.open("w", encoding="utf-8") as transcript,
        subprocess.Popen(
            [*command, *paths],
            cwd=source,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        _show(title, 0)
        for line in process.stdout:
            transcript.write(line)
            if found := _PERCENT.search(line):
                _show(title, int(found[1]))
    print(file=sys.stderr)
    if process.returncode not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ended with status {process.returncode}; what it printed is in {log}")
    return read(report)


def _show(title: str, percent: int) -> None:
    bar = "#" * (percent * 40 // 100)
    # a terminal is written over; a file gets one line for each tenth
    if sys.stderr.isatty():
        print(f"\r{title:24} [{bar:40}] {percent:3} %", end="", file=sys.stderr, flush=True)
    elif percent % 10 == 0:
        print(f"{title:24} {percent:3} %", file=sys.stderr, flush=True)


def read(report: Path) -> dict[str, Case]:
    """The tests of a JUnit report by id, without what names the database."""
    tests: dict[str, Case] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, name = case.get("classname", "").rpartition(".")
        test_id = f"{module.replace('.', '/')}.py::{_DATABASE.sub('', name)}::{case.get('name')}"
        found = {child.tag for child in case}
        outcome: Outcome = "passed"
        if found & {"failure", "error"}:
            outcome = "failed"
        elif "skipped" in found:
            outcome = "skipped"
        counts = case.find(f"properties/property[@name='{PROPERTY}']")
        tests[test_id] = Case(outcome, {} if counts is None else json.loads(counts.get("value", "{}")))
    return tests
