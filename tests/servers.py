"""Private, throw-away servers for the tests: Redis, memcached, PostgreSQL and MariaDB.

    python -m tests.servers -- python -m pytest         # all four, for as long as the command runs

    with obtain("redis") as server:                     # one, for a test that kills or pauses it
        client = redis.Redis.from_url(server.url)
        server.kill()

A server listens on a free loopback port, keeps its data in a temporary directory and dies with the process
that started it, also when that process is killed. Where it comes from, in this order: the URL of a running
server in an environment variable (`QUERYCACHE_TEST_REDIS`, `…_MEMCACHED`, `…_POSTGRESQL`, `…_MARIADB`),
programs on this machine, containers where a docker engine runs, and, for the command as root on Debian,
packages installed on the spot.

What cannot be had is left out, loudly; with `QUERYCACHE_REQUIRE_SERVERS=1` that is an error. Commits reach
the disk as they do in production, since benchmarks compare them; tests say `--no-fsync` and are faster.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from tests.server_kinds import KINDS, Kind
from tests.server_runners import ComposeServer, ProcessServer, Server, ServerFailed, die_with_parent

__all__ = ["Server", "ServerFailed", "ServerMissing", "given_url", "main", "obtain", "servers_required"]


class ServerMissing(Exception):
    """A kind of server cannot be had here; says what was tried and what would help."""

    def __init__(self, kind: Kind, tried: Iterable[str]) -> None:
        self.kind = kind
        self.tried = list(tried)
        super().__init__(
            f"no {kind.name} server for the tests. Tried: {'; '.join(self.tried)}. "
            f"Remedy: install the package{'s' if len(kind.packages) > 1 else ''} {' '.join(kind.packages)}, "
            f"or start a docker engine, or set {kind.variable} to the URL of a server that tests may empty"
        )


def servers_required() -> bool:
    """Whether a missing server is an error (`QUERYCACHE_REQUIRE_SERVERS=1`) instead of a skip."""
    return os.environ.get("QUERYCACHE_REQUIRE_SERVERS", "0") not in ("", "0")


def given_url(name: str) -> str | None:
    """The URL that the environment gives for this kind of server, if it does."""
    return os.environ.get(KINDS[name].variable) or None


def obtain(name: str, *, durable: bool = True) -> Server:
    """A server of our own that is not started yet, from programs on this machine or from a container.

    Use it as a context manager, or call `prepare`, `start` and, at the end, `close`.

    Raises:
        ServerMissing: there is neither a program nor a docker engine.
    """
    found = _find(name, durable=durable)
    if isinstance(found, ServerMissing):
        raise found
    return found


def _find(name: str, *, durable: bool) -> Server | ServerMissing:
    kind = KINDS[name]
    if (programs := kind.find_programs()) is not None:
        return ProcessServer(kind, programs, durable=durable)
    if (trouble := _docker_trouble()) is None:
        return ComposeServer(kind, durable=durable)
    places = ", ".join(["PATH", *kind.folders])
    return ServerMissing(
        kind, [f"{kind.variable} (not set)", f"programs {', '.join(kind.programs)} in {places}", trouble]
    )


@functools.cache
def _docker_trouble() -> str | None:
    """Why containers cannot be used, or None where they can."""
    for command in (["docker", "compose", "version"], ["docker", "info"]):
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "docker compose (no docker command that answers)"
        if done.returncode:
            return f"docker compose (`{' '.join(command)}` fails)"
    return None


def _install(kinds: Sequence[Kind]) -> str | None:
    """Install Debian's packages of these kinds. Returns why not, or None when that worked."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists() or shutil.which("apt-get") is None:
        return "apt-get (only as root on Debian)"
    packages = [package for kind in kinds for package in kind.packages]
    _say(f"installing Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # The packages bring programs; their own services and PostgreSQL's own cluster are not wanted.
    no_services = _file_for_now("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
    no_cluster = _file_for_now(
        "/etc/postgresql-common/createcluster.d/querycache.conf", "create_main_cluster = false\n"
    )
    with no_services, no_cluster:
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
        ):
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if done.returncode:
                return f"`{' '.join(command)}` (exit code {done.returncode}: {done.stderr.strip()[-600:]})"
    return None


@contextlib.contextmanager
def _file_for_now(name: str, content: str) -> Iterator[None]:
    path = Path(name)
    if path.exists():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    try:
        yield
    finally:
        path.unlink()


def _say(text: str) -> None:
    print(f"[servers] {text}", file=sys.stderr, flush=True)


def _start_all(*, durable: bool) -> tuple[Mapping[str, str], list[ServerMissing]]:
    """Start what is not given by the environment. Returns variable → URL, and what is missing."""
    urls = {kind.variable: url for kind in KINDS.values() if (url := given_url(kind.name))}
    servers: list[Server] = []
    missing: list[ServerMissing] = []

    def look(names: Iterable[str]) -> None:
        for found in map(functools.partial(_find, durable=durable), names):
            if isinstance(found, ServerMissing):
                missing.append(found)
            else:
                servers.append(found)

    look(kind.name for kind in KINDS.values() if kind.variable not in urls)
    if missing:
        kinds = [error.kind for error in missing]
        trouble = _install(kinds)
        if trouble is None:
            missing.clear()
            look(kind.name for kind in kinds)
        else:
            missing = [ServerMissing(error.kind, [*error.tried, trouble]) for error in missing]
    if missing and servers_required():
        return urls, missing
    if servers:
        _say(f"preparing {', '.join(server.name for server in servers)}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: server.prepare(), servers))
    # Not in the threads: a server dies with the thread that started it.
    for server in servers:
        server.start()
        urls[server.kind.variable] = server.url
    for variable, url in urls.items():
        _say(f"{variable}={url}")
    return urls, missing


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # Ctrl-C reaches the command by itself, and its answer to that is waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    code = process.wait()
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with the servers' URLs in its environment. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__.split("\n")[0])
    parser.add_argument("--no-fsync", action="store_true", help="databases that may lose commits, for tests")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args(arguments)
    try:
        urls, missing = _start_all(durable=not options.no_fsync)
    except ServerFailed as error:
        _say(str(error))
        return 1
    for absent in missing:
        _say(f"{'ERROR' if servers_required() else 'MISSING, ITS TESTS WILL BE SKIPPED'}: {absent}")
    if missing and servers_required():
        return 1
    return _run(options.command, {**os.environ, **urls})


if __name__ == "__main__":
    sys.exit(main())
