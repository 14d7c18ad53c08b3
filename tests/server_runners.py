"""How a server of the tests runs: as a process of this machine, or in a container.

Either way it listens on a free loopback port, can be killed, paused and restarted on the same port, and ends
with the process that started it, however that one ends: the kernel kills the processes, and what needs a
command (removing directories and containers) is left to a small shell that waits for the end of its standard
input.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from tests.server_kinds import HOST, Kind, Programs

__all__ = ["ComposeServer", "ProcessServer", "Server", "ServerFailed", "die_with_parent"]

COMPOSE_FILE = Path(__file__).resolve().parent.parent / "docker-compose.yml"
START_SECONDS = 60.0
STOP_SECONDS = 20.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServerFailed(Exception):
    """A server was found but does not start or answer; carries the end of its log."""


class Server(ABC):
    """One server of our own. As a context manager: started inside, gone with its data afterwards."""

    def __init__(self, kind: Kind, *, durable: bool = True) -> None:
        self.kind = kind
        self.durable = durable
        self.port = _free_port()

    @property
    def name(self) -> str:
        """The kind: redis, memcached, postgresql or mariadb."""
        return self.kind.name

    @property
    def url(self) -> str:
        """What clients connect to; an SQLAlchemy URL for the databases."""
        return self.kind.url.format(port=self.port)

    @abstractmethod
    def prepare(self) -> None:
        """Make what a first start needs; may be slow, and may run in a thread."""

    @abstractmethod
    def start(self) -> None:
        """Start, and return once the server answers. Raises ServerFailed with its log."""

    @abstractmethod
    def stop(self) -> None:
        """Shut down in order. The databases keep their data for the next start."""

    @abstractmethod
    def kill(self) -> None:
        """Kill at once, as a crash would."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze: connections stay open, nothing is answered until `resume`."""

    @abstractmethod
    def resume(self) -> None:
        """Go on after `pause`."""

    @abstractmethod
    def close(self) -> None:
        """Stop without ceremony and forget the data."""

    def restart(self) -> None:
        """Stop (or pick up after `kill`) and start again on the same port.

        Redis and memcached come back empty, the databases with what was committed.
        """
        self.stop()
        self.start()

    def __enter__(self) -> Server:
        self.prepare()
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ProcessServer(Server):
    """A server run from programs on this machine, under an unprivileged user where we are root."""

    def __init__(self, kind: Kind, programs: Programs, *, durable: bool = True) -> None:
        super().__init__(kind, durable=durable)
        self._programs = programs
        self._directory = Path(tempfile.mkdtemp(prefix=f"{kind.name}-", dir=_temporary_root()))
        self._log = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        commands = self.kind.prepare(self._programs, self._directory)
        if (user := _unprivileged_user()) is not None:
            for path in [self._directory, *self._directory.iterdir()]:
                os.chown(path, user.pw_uid, user.pw_gid)
        for command in commands:
            with self._log.open("ab") as log:
                code = subprocess.call(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                    **_as_user(),
                )
            if code:
                raise ServerFailed(self._report(f"{command[0]} ended with exit code {code}"))

    def start(self) -> None:
        for _ in range(2):
            if self._try_to_start() is None:
                return
            # After a kill the port, or memory the dead processes shared, can be busy for a moment more.
            time.sleep(0.5)
        if (code := self._try_to_start()) is not None:
            raise ServerFailed(self._report(f"it ended with exit code {code}"))

    def _try_to_start(self) -> int | None:
        """None once the server answers, or the exit code of one that ended instead."""
        command = self.kind.command(self._programs, self._directory, self.port, self.durable)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                # Out of reach of Ctrl-C, which is for the test run: that stops the servers in order.
                start_new_session=True,
                preexec_fn=die_with_parent,
                **_as_user(),
            )
        _OPEN.add(self)
        deadline = time.monotonic() + START_SECONDS
        while True:
            # In this order: what answers on the port may be another process.
            ready = self.kind.ready(self.port)
            if (code := self._process.poll()) is not None:
                self._process = None
                return code
            if ready:
                return None
            if time.monotonic() > deadline:
                raise ServerFailed(self._report(f"it does not answer after {START_SECONDS:g} seconds"))
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is None:
            return
        self.resume()
        self._end(self.kind.stop_signal)

    def kill(self) -> None:
        if self._process is None:
            return
        children = self._signal_family(signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + STOP_SECONDS
        while _alive_among(children) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._process = None

    def pause(self) -> None:
        self._signal_family(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_family(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self.resume()
            self._end(self.kind.close_signal)
        _OPEN.discard(self)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def _signal_family(self, number: signal.Signals) -> Sequence[int]:
        """Signal the server and its children (PostgreSQL's leave its process group); returns those."""
        if self._process is None:
            raise RuntimeError(f"the {self.name} server is not running: call start() first")
        self._process.send_signal(number)
        children = [pid for pid, parent in _parents().items() if parent == self._process.pid]
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return children

    def _report(self, what: str) -> str:
        log = self._log.read_text(errors="replace")[-4000:] if self._log.exists() else "(no log)"
        return f"the {self.name} server on port {self.port} failed: {what}. Its log:\n{log}"


class ComposeServer(Server):
    """A server in a container, from the repository's docker-compose.yml."""

    def __init__(self, kind: Kind, *, durable: bool = True) -> None:
        super().__init__(kind, durable=durable)
        self._project = f"querycache-test-{os.getpid()}-{self.port}"
        self._environment = {**os.environ, f"QUERYCACHE_{kind.name.upper()}_PORT": str(self.port)}
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def _compose(self) -> list[str]:
        return ["docker", "compose", "-p", self._project, "-f", str(COMPOSE_FILE), "--profile", "test"]

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self._compose, *arguments, self.name],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            log = subprocess.run([*self._compose, "logs", "--tail", "50"], capture_output=True, text=True)
            raise ServerFailed(
                f"docker compose {' '.join(arguments)} {self.name} failed: {done.stderr[-2000:]}\n"
                f"Its log:\n{log.stdout[-4000:]}"
            )

    def prepare(self) -> None:
        self._run("pull", "--quiet")

    def start(self) -> None:
        if self._watchdog is None:
            # Its standard input ends when this process does, however it ends.
            self._watchdog = _at_our_end([*self._compose, "down", "--volumes", "--timeout", "0"])
            _OPEN.add(self)
        self._run("up", "--detach", "--wait")
        if not self.kind.ready(self.port):
            raise ServerFailed(f"the {self.name} container is up but does not answer on {HOST}:{self.port}")

    def stop(self) -> None:
        self._run("stop")

    def kill(self) -> None:
        self._run("kill")

    def pause(self) -> None:
        self._run("pause")

    def resume(self) -> None:
        self._run("unpause")

    def close(self) -> None:
        if self._watchdog is not None and self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
            self._watchdog.wait()
            self._watchdog = None
        _OPEN.discard(self)


_OPEN: set[Server] = set()
_OWNER = os.getpid()


@atexit.register
def _close_all() -> None:
    # A forked child inherits this registration, but not the servers.
    if os.getpid() == _OWNER:
        for server in list(_OPEN):
            server.close()


@functools.cache
def _temporary_root() -> Path:
    """A directory for everything of this process, removed when the process ends, however it ends."""
    root = Path(tempfile.mkdtemp(prefix="querycache-servers-"))
    root.chmod(0o755)
    # The pause lets servers that die with us finish first; otherwise they write into what is being removed.
    _at_our_end(["sh", "-c", 'sleep 1; rm -rf -- "$0"', str(root)])
    return root


def _at_our_end(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", 'cat; exec "$@"', "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def die_with_parent() -> None:
    """For a child process, before it starts its program: be killed when the parent ends."""
    # Runs in the child, after the change of user, which would reset it. On Linux only; else atexit must do.
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _unprivileged_user() -> pwd.struct_passwd | None:
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


class _User(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _as_user() -> _User:
    user = _unprivileged_user()
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _parents() -> dict[int, int]:
    """Process → its parent, of all processes that have not ended."""
    if Path("/proc/self/stat").exists():
        rows = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # pid (name, which may contain anything) state parent …
                text = stat.read_text(errors="replace")
                rows.append([stat.parent.name, *text.rpartition(")")[2].split()[:2]])
    else:
        command = ["ps", "-A", "-o", "pid=,state=,ppid="]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listing.splitlines()]
    return {int(pid): int(parent) for pid, state, parent in rows if not state.startswith("Z")}


def _alive_among(pids: Iterable[int]) -> bool:
    return not _parents().keys().isdisjoint(pids)


def _free_port() -> int:
    """A loopback port that is free, below the range from which outgoing connections take theirs.

    So a server that was killed finds its port again, even while clients are trying to reconnect.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port
