"""`querycache denorm`: check and repair denormalized columns, and print the triggers that keep them.

    querycache --app shop.models:Base denorm check --url postgresql+psycopg://…
    querycache --app shop.models:Base denorm repair --url postgresql+psycopg://…
    querycache --app shop.models:Base denorm sql --dialect postgresql

`--app` names a declarative base, a mapped class or a MetaData.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, MetaData, TypeDecorator, create_engine, make_url
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.types import TypeEngine

from querycache.admin.application import load
from querycache.denormalize import Report, aggregates_of, repair, trigger_sql, verify
from querycache.errors import ConfigurationError, QueryCacheError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parsers of the command line."""
    parser = commands.add_parser("denorm", help="denormalized columns: check, repair, sql")
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    url: dict[str, Any] = {"metavar": "URL", "help": "SQLAlchemy URL of the database"}
    check = steps.add_parser("check", help="compare stored and recounted values; read only")
    check.add_argument("--url", required=True, **url)
    check.add_argument("--sample", type=int, help="look at this many parents of each class, chosen at random")
    check.add_argument("--batch", type=int, default=500, help="parents in one statement (default: 500)")
    check.set_defaults(run=_check)
    mend = steps.add_parser("repair", help="put right what is wrong, a batch of parents at a time")
    mend.add_argument("--url", required=True, **url)
    mend.add_argument("--batch", type=int, default=200, help="parents locked at a time (default: 200)")
    mend.add_argument(
        "--after",
        metavar="JSON",
        type=_after,
        default={},
        help="where to go on: what a run that was interrupted has printed",
    )
    mend.set_defaults(run=_repair)
    sql = steps.add_parser("sql", help="print the triggers of strategy 'trigger'")
    which = sql.add_mutually_exclusive_group(required=True)
    which.add_argument("--url", **url)
    which.add_argument("--dialect", help="postgresql, mariadb, mysql or sqlite")
    sql.set_defaults(run=_sql)


def _after(text: str) -> dict[str, list[Any]]:
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(key, list) for key in given.values()):
        raise argparse.ArgumentTypeError(f'must be like {{"Thread": [17]}}, got {text}')
    return given


def _check(given: argparse.Namespace) -> int:
    base = _base(given.app)
    with _asked(given.url) as engine:
        report = verify(engine, base, sample=given.sample, batch=given.batch, progress=_bar)
    return _tell(report, given.json)


def _repair(given: argparse.Namespace) -> int:
    base = _base(given.app)
    after = _typed(base, given.after)
    so_far = Report(last=dict(after))

    def progress(entity: str, done: int, total: int, report: Report) -> None:
        nonlocal so_far
        so_far = report
        _bar(entity, done, total, report)

    try:
        with _asked(given.url) as engine:
            report = repair(engine, base, batch=given.batch, after=after, progress=progress)
    except KeyboardInterrupt:
        _tell(so_far, given.json)
        print(f"interrupted; go on with --after '{_last(so_far)}'", file=sys.stderr)
        return 130
    except QueryCacheError:
        if so_far.checked:
            print(f"stopped; go on with --after '{_last(so_far)}'", file=sys.stderr)
        raise
    return _tell(report, given.json)


def _sql(given: argparse.Namespace) -> int:
    base = _base(given.app)
    if given.url is not None:
        dialect: Dialect = _engine(given.url).dialect
    else:
        try:
            dialect = make_url(f"{given.dialect}://").get_dialect()()
        except (NoSuchModuleError, ArgumentError) as error:
            raise ConfigurationError(f"--dialect {given.dialect}: {error}") from error
    statements = trigger_sql(base, dialect)
    if given.json:
        print(json.dumps({"statements": statements}, indent=2))
    else:
        print("".join(f"{statement};\n\n" for statement in statements), end="")
    return 0


def _base(app: str | None) -> Any:
    found = load(app)
    if not isinstance(found, MetaData) and not isinstance(getattr(found, "metadata", None), MetaData):
        raise ConfigurationError(
            f"--app {app} is {found!r}; it must be a declarative base, a mapped class or a MetaData"
        )
    return found


def _engine(url: str) -> Engine:
    try:
        return create_engine(url)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigurationError(f"--url {url}: {error}") from error


@contextmanager
def _asked(url: str) -> Iterator[Engine]:
    """An engine to ask.

    Raises:
        QueryCacheError: if the database does not answer, or not the question: then nothing is known to be right or wrong.
    """
    engine = _engine(url)
    try:
        yield engine
    except DBAPIError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise QueryCacheError(f"--url {shown}: the database says: {error.orig}") from error
    finally:
        engine.dispose()


def _typed(base: Any, after: dict[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    """Keys as the database knows them: JSON has no dates, numbers with digits or UUIDs."""
    roots = {held.chain.root.class_.__name__: held.chain.root for held in aggregates_of(base)}
    found: dict[str, tuple[Any, ...]] = {}
    for name, key in after.items():
        if name not in roots or len(key) != len(roots[name].primary_key):
            raise ConfigurationError(f"--after: {name}: {key} is no key of {', '.join(sorted(roots))}")
        found[name] = tuple(
            _value(part, column.type) for part, column in zip(key, roots[name].primary_key, strict=True)
        )
    return found


def _value(part: Any, type_: TypeEngine[Any]) -> Any:
    if isinstance(type_, TypeDecorator):  # which tells no class of its values
        return part
    python = type_.python_type
    if isinstance(part, python):
        return part
    if issubclass(python, enum.Enum):
        return next((each for each in python if part in (each.name, each.value)), part)
    return python.fromisoformat(part) if hasattr(python, "fromisoformat") else python(part)


def _bar(entity: str, done: int, total: int, report: Report) -> None:
    if not sys.stderr.isatty():
        return
    share = done / total if total else 1.0
    filled = "#" * int(30 * share)
    end = "\n" if done >= total else ""
    sys.stderr.write(f"\r{entity:20} [{filled:30}] {done}/{total}, {report.wrong} wrong{end}")
    sys.stderr.flush()


def _last(report: Report) -> str:
    return json.dumps({name: list(key) for name, key in report.last.items()}, default=_shown)


def _shown(part: Any) -> str:
    return part.name if isinstance(part, enum.Enum) else str(part)


def _tell(report: Report, for_programs: bool) -> int:
    if for_programs:
        answer = {
            "checked": report.checked,
            "wrong": report.wrong,
            "repaired": report.repaired,
            "differences": [
                {
                    "aggregate": each.aggregate,
                    "key": list(each.key),
                    "stored": each.stored,
                    "counted": each.counted,
                }
                for each in report.differences
            ],
            "last": {name: list(key) for name, key in report.last.items()},
        }
        print(json.dumps(answer, indent=2, default=_shown))
    else:
        for difference in report.differences:
            print(difference)
        if report.wrong > len(report.differences):
            print(f"… and {report.wrong - len(report.differences)} more")
        looked = ", ".join(f"{count} {name}" for name, count in report.checked.items())
        print(f"{looked or 'nothing'} checked: {report.wrong} wrong, {report.repaired} repaired")
    return 0 if report.right else 1
