"""`docker-compose.yml` starts what the README promises, reachable from this machine only."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.server_kinds import KINDS

FILE = Path(__file__).parent.parent / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]


def test_plain_up_starts_redis_memcached_and_postgresql() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {
        "redis",
        "memcached",
        "postgresql",
    }


def test_every_kind_of_test_server_is_a_service() -> None:
    assert SERVICES.keys() == KINDS.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_service(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z]+:\d+(\.\d+)*(-alpine)?", service["image"]), "the major version is pinned"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries"} < service["healthcheck"].keys()
    # The tests choose the port through this variable.
    (port,) = service["ports"]
    assert re.fullmatch(rf"127\.0\.0\.1:\$\{{QUERYCACHE_{name.upper()}_PORT:-\d+\}}:\d+", port)


def test_docker_compose_accepts_the_file() -> None:
    command = ["docker", "compose"]
    if (
        shutil.which("docker") is None
        or subprocess.run([*command, "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    done = subprocess.run([*command, "-f", str(FILE), "config", "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
