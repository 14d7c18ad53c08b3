"""The history checker in the normal suite: a little torture on each pair, and proof that it would find a fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from querycache.phases import OnOutage
from tests.servers import Server
from tests.torture.__main__ import find
from tests.torture.mutants import MUTANTS
from tests.torture.round import Report, run_round
from tests.torture.worker import SNAPSHOT_LEVEL

ENOUGH = 17_000
"""Reads of each pair: more than 50 000 in all."""

ROUND_SECONDS = 12.0
"""One or two rounds do, but a machine that is busy with something else needs more for as many reads."""

LEVELS: tuple[tuple[OnOutage, str], ...] = (
    ("available", "READ COMMITTED"),
    ("refuse", SNAPSHOT_LEVEL),
    ("refuse", "READ COMMITTED"),
)


@pytest.mark.parametrize(
    ("database", "store"),
    [
        pytest.param("postgresql", "redis", marks=pytest.mark.server("postgresql")),
        pytest.param("postgresql", "memcached", marks=pytest.mark.server("postgresql")),
        pytest.param("mariadb", "redis", marks=pytest.mark.server("mariadb")),
    ],
)
def test_every_read_is_explained_by_the_writes(
    database: str, store: str, request: pytest.FixtureRequest, private_server: Callable[[str], Server]
) -> None:
    url = request.getfixturevalue(f"{database}_url")
    server = private_server(store)
    total = Report()
    for on_outage, isolation in itertools.cycle(LEVELS):
        report = run_round(
            url, server, seconds=ROUND_SECONDS, on_outage=on_outage, isolation=isolation, every=3.5
        )
        assert report.reads > 0
        total.add(report)
        if total.reads >= ENOUGH:
            break
    assert not total.illegal, "\n".join(map(str, total.illegal[:10]))
    assert total.cache["hit"] > 0
    assert total.cache["completed"] > 0  # with rows that other answers had
    assert total.commits > 0
    assert total.faults.total() > 0


@pytest.mark.server("postgresql")
@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_a_protection_that_is_switched_off_is_found(
    mutant: str, postgresql_url: str, private_server: Callable[[str], Server]
) -> None:
    server = private_server("redis")
    # a round of ten seconds finds the most hidden of them four times in five
    assert any(find(mutant, postgresql_url, server).illegal for _ in range(10))
