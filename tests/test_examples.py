"""Every example runs, and what it asserts holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALLER = {"quickstart.py": ["--comments", "500", "--runs", "3"]}
"""Arguments for examples that would otherwise take long."""


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """An example as a new user starts it, with warnings as errors."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("QUERYCACHE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str) -> None:
    done = run(name, *SMALLER.get(name, []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 3


def test_quickstart_for_programs() -> None:
    done = run("quickstart.py", "--json", *SMALLER["quickstart.py"])
    answer = json.loads(done.stdout)
    for query in answer["queries"]:
        assert (query["first"], query["again"], query["again_statements"]) == ("miss", "hit", 0)
        assert query["first_statements"] >= 1
    after = {line["query"]: line["next"]["outcome"] for line in answer["after_a_write"]}
    # slots keep answers that do not concern the row that was written
    kept = {"a member, by primary key", "another thread with its comments"}
    assert {query for query, outcome in after.items() if outcome == "hit"} == kept
    assert all(line["again"]["outcome"] == "hit" for line in answer["after_a_write"])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"QUERYCACHE_URL": "redys://localhost"}, "unknown scheme 'redys'"),
        ({"QUERYCACHE_URL": "redis://127.0.0.1:1/0"}, "does not answer"),
        ({"QUERYCACHE_DATABASE": "sqlite:////nowhere/at/all.db"}, "unable to open database file"),
    ],
)
def test_quickstart_says_what_is_wrong(environment: dict[str, str], said: str) -> None:
    done = run("quickstart.py", *SMALLER["quickstart.py"], **environment)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.server("redis")
@pytest.mark.server("postgresql")
def test_quickstart_elsewhere(redis_store_url: str, postgresql_url: str) -> None:
    done = run(
        "quickstart.py",
        "--json",
        *SMALLER["quickstart.py"],
        QUERYCACHE_URL=redis_store_url,
        QUERYCACHE_DATABASE=postgresql_url,
    )
    assert done.returncode == 0, done.stderr
    assert [query["again"] for query in json.loads(done.stdout)["queries"]] == ["hit"] * 5
