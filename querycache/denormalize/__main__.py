"""Check, repair and print triggers from the command line.

    python -m querycache.denormalize --app shop.models:Base --url postgresql+psycopg://… check
    python -m querycache.denormalize --app shop.models:Base --url postgresql+psycopg://… repair
    python -m querycache.denormalize --app shop.models:Base --dialect postgresql sql

`--app` names a declarative base, a mapped class or a MetaData. Exit status 0: all is right; 1: something is, or was,
wrong; 2: the command line itself is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, make_url
from sqlalchemy.exc import NoSuchModuleError

from querycache.denormalize.configure import aggregates_of
from querycache.denormalize.plan import Plan, plan_of
from querycache.denormalize.triggers import trigger_statements
from querycache.denormalize.verify import Report, repair, verify
from querycache.errors import ConfigurationError, QueryCacheError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m querycache.denormalize", description="Check and repair denormalized columns."
    )
    parser.add_argument(
        "--app", required=True, metavar="MODULE:ATTRIBUTE", help="declarative base or MetaData"
    )
    parser.add_argument("--url", help="SQLAlchemy URL of the database, for check and repair")
    parser.add_argument("--dialect", help="for sql without --url: postgresql, mariadb, mysql or sqlite")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare stored and recounted values; read only")
    check.add_argument("--sample", type=int, help="look at this many parents of each class, chosen at random")
    check.add_argument("--batch", type=int, default=500)
    mend = commands.add_parser("repair", help="put right what is wrong, a batch of parents at a time")
    mend.add_argument("--batch", type=int, default=200)
    mend.add_argument(
        "--after", help="JSON printed by a run that was interrupted: where to go on", type=json.loads
    )
    commands.add_parser("sql", help="print the triggers of strategy 'trigger'")
    given = parser.parse_args(arguments)
    try:
        base, engine = _load(given.app, given.url)
        if given.command == "sql":
            return _sql(base, engine, given.dialect)
        if engine is None:
            parser.error(f"{given.command} needs a database: give --url")
        if given.command == "check":
            report = verify(engine, base, sample=given.sample, batch=given.batch, progress=_bar)
        else:
            after = {name: tuple(key) for name, key in given.after.items()} if given.after else None
            report = repair(engine, base, batch=given.batch, after=after, progress=_bar)
    except QueryCacheError as error:
        parser.error(str(error))
    return _print(report)


def _load(app: str, url: str | None) -> tuple[Any, Engine | None]:
    """The MetaData (or base) and the engine that the command line names."""
    name, _, attribute = app.partition(":")
    if not attribute:
        raise ConfigurationError(f"--app must be MODULE:ATTRIBUTE, got {app!r}")
    sys.path.insert(0, "")
    try:
        found: Any = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"--app {app}: {error}") from error
    engine = create_engine(url) if url else None
    if not isinstance(found, MetaData) and not isinstance(getattr(found, "metadata", None), MetaData):
        raise ConfigurationError(
            f"--app {app} is {found!r}; it must be a declarative base, a mapped class or a MetaData"
        )
    return found, engine


def _sql(base: Any, engine: Engine | None, dialect: str | None) -> int:
    if engine is None and dialect is None:
        raise ConfigurationError("sql needs a dialect: give --dialect or --url")
    plans: list[Plan] = []
    for aggregate in aggregates_of(base):
        plan = plan_of(aggregate.chain.root)
        if plan is not None and plan not in plans:
            plans.append(plan)
    try:
        made = engine.dialect if engine is not None else make_url(f"{dialect}://").get_dialect()()
    except NoSuchModuleError as error:
        raise ConfigurationError(f"--dialect {dialect}: {error}") from error
    for plan in plans:
        for statement in trigger_statements(plan, made):
            print(f"{statement};\n")
    return 0


def _bar(entity: str, done: int, total: int, wrong: int) -> None:
    if not sys.stderr.isatty():
        return
    share = done / total if total else 1.0
    filled = "#" * int(30 * share)
    end = "\n" if done >= total else ""
    sys.stderr.write(f"\r{entity:20} [{filled:30}] {done}/{total}, {wrong} wrong{end}")
    sys.stderr.flush()


def _print(report: Report) -> int:
    for difference in report.differences:
        print(difference)
    if report.wrong > len(report.differences):
        print(f"… and {report.wrong - len(report.differences)} more")
    looked = ", ".join(f"{count} {name}" for name, count in report.checked.items())
    print(f"{looked}: {report.wrong} wrong, {report.repaired} repaired")
    if report.repaired:
        print("last:", json.dumps({name: list(key) for name, key in report.last.items()}, default=str))
    return 0 if report.right else 1


if __name__ == "__main__":
    sys.exit(main())
