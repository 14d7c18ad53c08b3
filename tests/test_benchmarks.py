"""The benchmarks run, compare the answers, and say what is required. How fast it is, is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: str, **servers: str) -> Any:
    """A benchmark with these servers alone, as JSON."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("QUERYCACHE_TEST_")}
    environment |= {f"QUERYCACHE_TEST_{name}": url for name, url in servers.items()}
    done = subprocess.run(
        [sys.executable, "-m", module, "--json", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_read_path(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    answer = run("benchmarks", "--seconds", "0.01", "--rows", "1,10", "--plot", str(picture))
    assert answer["missing"] == ["postgresql", "redis", "memcached"]
    cells = {(cell["case"], cell["rows"]): cell["medians"] for cell in answer["microseconds"]}
    cases = ("plain entity", "joined author", "selectin comments", "columns", "aggregate")
    assert set(cells) == {(case, rows) for case in cases for rows in (1, 10)}
    for medians in cells.values():
        assert set(medians) == {"SQLite", "recipe memory", "memory", "limit"}
    required = [each["what"] for each in answer["required"]]
    assert "plain entity, 10 rows: memory hit against recipe memory" in required
    assert any("empty listener" in what for what in required)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_memory_bound() -> None:
    answer = run("benchmarks.memory_bound", "--max-mb", "8", "--fills", "20000")
    assert [moment["fills"] for moment in answer["moments"]] == list(range(2000, 20001, 2000))
    accounted = [moment["accounted"] for moment in answer["moments"]]
    assert max(accounted) <= answer["max_bytes"] and min(accounted[1:]) > 0.9 * answer["max_bytes"]


def test_denormalize() -> None:
    lines = run("benchmarks.denormalize", "--children", "200", "--flushes", "3", "--rounds", "1")
    works = [line["work"] for line in lines]
    assert len(dict.fromkeys(works)) == 4
    ways = {line["way"] for line in lines if line["work"] == works[0]}
    assert {"without", "sql", "recount", "flush", "memory", "trigger", "sqlalchemy-utils"} < ways
    updates = {line["way"]: line["updates"] for line in lines if line["work"] == works[0]}
    assert (updates["without"], updates["trigger"], updates["sql"]) == (0, 0, 100)
    assert [line["way"] for line in lines if line["reach"]] == ["sql", "sqlalchemy-utils", "sqlalchemy-utils"]


def test_workload(postgresql_url: str, redis_store_url: str) -> None:
    small = ("--posts", "2000", "--processes", "2", "--warm-up", "0.2", "--seconds", "0.3")
    answer = run(
        "benchmarks.workload",
        *small,
        *("--rounds", "1", "--commits", "3", "--reads", "95"),
        POSTGRESQL=postgresql_url,
        REDIS=redis_store_url,
    )
    [workload] = answer["workloads"]
    modes = workload["modes"]
    assert set(modes) == {"row slots", "table tags", "TTL only", "limit", "nothing cached", "no cache"}
    assert all(mode["operations"] > 0 for mode in modes.values())
    assert {mode for mode in modes if not modes[mode]["hits"]} == {"nothing cached", "no cache"}
    # in so short a time a mode may write nothing
    writing = [mode for mode in modes.values() if mode["transaction"]]
    assert writing and all(mode["transaction"] > mode["commit()"] > 0 for mode in writing)
    assert len(answer["commits"]) == 2
    assert all(len(times) == 12 and min(times.values()) > 0 for times in answer["commits"].values())
    assert all(required.keys() >= {"required", "measured"} for required in answer["required"].values())
