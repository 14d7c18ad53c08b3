"""The command line: `querycache --app MODULE:ATTRIBUTE COMMAND …`, or `python -m querycache.admin`.

Each command is a module of this package with a function `add(commands)`, which adds its parser and sets `run`: a
function of the parsed arguments that returns the exit status. 0: all is well; 1: something is, or was, not; 2: it could
not be found out, since the command line is wrong or the database fails, said on stderr; 130: interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from querycache.admin import denorm
from querycache.errors import QueryCacheError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the command's name; those of the process if None.

    Returns:
        the exit status.

    Raises:
        SystemExit: with status 2, if the command line is wrong or the database fails.
    """
    parser = argparse.ArgumentParser(prog="querycache", description="Look after what querycache keeps.")
    parser.add_argument(
        "--app", metavar="MODULE:ATTRIBUTE", help="the object of the application that the command works on"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    denorm.add(commands)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
    except QueryCacheError as error:
        parser.error(str(error))
    return status
