"""What differs between the four kinds of server the tests run against.

A `Kind` is a plain description: where its programs are, how an empty data directory is made, the command
that serves it in the foreground, its URL, and a question that only a server which is ready answers. How such
a command is started, killed, paused or replaced by a container is the business of `tests.servers`.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KINDS", "Kind", "Programs"]

Programs = Mapping[str, str]
"""Name of a program → its absolute path."""

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Kind:
    """One kind of server.

    `prepare(programs, directory)` gives the commands that fill an empty `directory`; `command(programs,
    directory, port, durable)` gives the one that serves it; `ready(port)` asks the server whether it is. A
    server that is not `durable` may lose commits when the machine stops (not when the server is killed), and
    is faster for it. `stop_signal` ends it in order, `close_signal` at once, when its data is of no more use.
    """

    name: str
    programs: tuple[str, ...]
    folders: tuple[str, ...]
    packages: tuple[str, ...]
    url: str
    prepare: Callable[[Programs, Path], Sequence[Sequence[str]]]
    command: Callable[[Programs, Path, int, bool], Sequence[str]]
    ready: Callable[[int], bool]
    stop_signal: signal.Signals = signal.SIGTERM
    close_signal: signal.Signals = signal.SIGKILL

    @property
    def variable(self) -> str:
        """The environment variable that holds the URL of a running server of this kind."""
        return f"QUERYCACHE_TEST_{self.name.upper()}"

    def find_programs(self) -> Programs | None:
        """The programs of one installation (the newest), or None where one of them is missing."""
        folders = [
            str(folder)
            for pattern in self.folders
            for folder in sorted(Path("/").glob(pattern.lstrip("/")), key=_version, reverse=True)
        ]
        # PATH first; helpers of a program that is only in such a folder may still live on PATH.
        for folder in [None, *folders]:
            found = {name: shutil.which(name, path=folder) or shutil.which(name) for name in self.programs}
            paths = {name: path for name, path in found.items() if path is not None}
            if len(paths) == len(self.programs):
                return paths
        return None


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder))]


def _nothing(programs: Programs, directory: Path) -> Sequence[Sequence[str]]:
    return []


def _answers(port: int, question: bytes, answer: bytes) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(question)
            return connection.recv(64).startswith(answer)
    except OSError:
        return False


def _redis_command(programs: Programs, directory: Path, port: int, durable: bool) -> Sequence[str]:
    return [
        programs["redis-server"],
        *("--bind", HOST, "--port", str(port), "--dir", str(directory)),
        # A database number for every worker of the test run.
        *("--databases", "64", "--save", "", "--appendonly", "no", "--daemonize", "no"),
    ]


def _redis_ready(port: int) -> bool:
    return _answers(port, b"PING\r\n", b"+PONG")


def _memcached_command(programs: Programs, directory: Path, port: int, durable: bool) -> Sequence[str]:
    return [programs["memcached"], "-l", HOST, "-p", str(port), "-U", "0", "-m", "64"]


def _memcached_ready(port: int) -> bool:
    return _answers(port, b"version\r\n", b"VERSION")


def _postgresql_prepare(programs: Programs, directory: Path) -> Sequence[Sequence[str]]:
    return [
        [
            programs["initdb"],
            *("-D", str(directory / "data"), "-U", "querycache", "-A", "trust"),
            *("--encoding=UTF8", "--no-locale", "--no-sync"),
        ]
    ]


def _postgresql_command(programs: Programs, directory: Path, port: int, durable: bool) -> Sequence[str]:
    settings = {
        "listen_addresses": HOST,
        "unix_socket_directories": str(directory),
        "max_connections": "200",
        # Two-phase transactions, which are off by default.
        "max_prepared_transactions": "20",
        "timezone": "UTC",
        # Files in the data directory instead of /dev/shm: nothing stays behind when the server is killed.
        "dynamic_shared_memory_type": "mmap",
    }
    if not durable:
        settings.update(fsync="off", full_page_writes="off")
    arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [programs["postgres"], "-D", str(directory / "data"), "-p", str(port), *arguments]


def _postgresql_ready(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(
            f"host={HOST} port={port} user=querycache password=querycache dbname=postgres connect_timeout=2"
        ).close()
    except psycopg.OperationalError:
        return False
    return True


_MARIADB_REDO_LOG = "--innodb-log-file-size=16M"
_MARIADB_FIRST_STATEMENTS = """\
CREATE DATABASE IF NOT EXISTS querycache CHARACTER SET utf8mb4;
CREATE OR REPLACE USER root@'127.0.0.1' IDENTIFIED BY 'querycache';
GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;
"""


def _mariadb_prepare(programs: Programs, directory: Path) -> Sequence[Sequence[str]]:
    (directory / "init.sql").write_text(_MARIADB_FIRST_STATEMENTS)
    return [
        [
            programs["mariadb-install-db"],
            *("--no-defaults", f"--datadir={directory / 'data'}", "--skip-test-db", "--skip-name-resolve"),
            *("--auth-root-authentication-method=normal", _MARIADB_REDO_LOG),
        ]
    ]


def _mariadb_command(programs: Programs, directory: Path, port: int, durable: bool) -> Sequence[str]:
    return [
        programs["mariadbd"],
        *("--no-defaults", f"--datadir={directory / 'data'}", f"--tmpdir={directory}"),
        *(f"--bind-address={HOST}", f"--port={port}", f"--socket={directory / 'mariadb.sock'}"),
        *(f"--init-file={directory / 'init.sql'}", "--skip-name-resolve", "--character-set-server=utf8mb4"),
        *("--innodb-buffer-pool-size=64M", _MARIADB_REDO_LOG, "--default-time-zone=+00:00"),
        *([] if durable else ["--innodb-flush-log-at-trx-commit=2", "--skip-innodb-doublewrite"]),
    ]


def _mariadb_ready(port: int) -> bool:
    import pymysql

    try:
        pymysql.connect(host=HOST, port=port, user="root", password="querycache", connect_timeout=2).close()
    except pymysql.err.OperationalError:
        return False
    return True


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="redis",
            programs=("redis-server",),
            folders=(),
            packages=("redis-server",),
            url="redis://127.0.0.1:{port}/0",
            prepare=_nothing,
            command=_redis_command,
            ready=_redis_ready,
        ),
        Kind(
            name="memcached",
            programs=("memcached",),
            folders=(),
            packages=("memcached",),
            url="memcached://127.0.0.1:{port}",
            prepare=_nothing,
            command=_memcached_command,
            ready=_memcached_ready,
        ),
        Kind(
            name="postgresql",
            programs=("initdb", "postgres"),
            folders=("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"),
            packages=("postgresql",),
            url="postgresql+psycopg://querycache:querycache@127.0.0.1:{port}/postgres",
            prepare=_postgresql_prepare,
            command=_postgresql_command,
            ready=_postgresql_ready,
            # SIGTERM would wait for the clients to leave; SIGKILL leaves a shared memory segment behind.
            stop_signal=signal.SIGINT,
            close_signal=signal.SIGQUIT,
        ),
        Kind(
            name="mariadb",
            programs=("mariadbd", "mariadb-install-db"),
            folders=("/usr/sbin", "/usr/libexec"),
            # The core packages bring the programs without a service that would start.
            packages=("mariadb-server-core", "mariadb-client-core"),
            url="mysql+pymysql://root:querycache@127.0.0.1:{port}/querycache",
            prepare=_mariadb_prepare,
            command=_mariadb_command,
            ready=_mariadb_ready,
        ),
    )
}
