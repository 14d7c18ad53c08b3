"""The documentation, the example and the benchmark do what they say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import session_index as benchmark
from examples import session_index as example

ROOT = Path(__file__).parents[2]


def test_the_documentation_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "session-index.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    module = ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where declarative classes look for names
    for block in blocks:
        exec(compile(block, "docs/session-index.md", "exec", dont_inherit=True), vars(module))
    vars(module)["engine"].dispose()
    assert capsys.readouterr().out == "ed may have 2 open tickets\n"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert capsys.readouterr().out.splitlines() == [
        "the recipe's demonstration, with expunge and close: every assertion holds",
        "mutation, rollback and expiry, which the recipe gets wrong: every assertion holds",
        "before_flush: User('ed') may have 2 open tickets",
    ]


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = benchmark.measure(sizes=(8, 80), rows=50, rounds=1)
    assert all(line.ratio > 0 for line in lines)
    assert sum(bool(line.reach) for line in lines) == 4
    monkeypatch.setattr(benchmark, "measure", lambda: lines)
    benchmark.main([])
    assert "lookup among 80 / among 8" in capsys.readouterr().out
    benchmark.main(["--json"])
    assert [entry["what"] for entry in json.loads(capsys.readouterr().out)] == [line.what for line in lines]


@pytest.mark.parametrize(
    ("ratio", "reach", "reached"), [(2, ">= 1", True), (2, "<= 1", False), (2, "", True)]
)
def test_whether_a_number_is_reached(ratio: float, reach: str, reached: bool) -> None:
    assert benchmark.Line("x", ratio, reach, 1, 1).reached is reached
