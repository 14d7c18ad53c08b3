"""Another Python process that runs functions: what it finds in a cache came from outside.

    with Process() as other:
        other.call(function, argument)      # function must be importable by name

Its hash seed differs from that of this process, as it does between the processes of a server.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Process"]

T = TypeVar("T")

_ROOT = Path(__file__).parents[2]


class Process:
    """A Python process that waits for calls. As a context manager it ends with the block.

    :param seed: its PYTHONHASHSEED.
    """

    def __init__(self, seed: int = 4711) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns over there. An error there fails here, with the traceback of both."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((function, arguments), self._process.stdin)
        self._process.stdin.flush()
        failure, value = pickle.load(self._process.stdout)
        if failure:
            raise AssertionError(f"in the other process:\n{failure}")
        return value  # type: ignore[no-any-return]


def _serve() -> None:
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("", function(*arguments))
        except Exception:  # noqa: BLE001 - whatever it is, it is told to the caller
            answer = (traceback.format_exc(), None)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
