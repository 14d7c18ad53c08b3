"""SQLAlchemy's private names live in `querycache/sa_internals` alone, and the rooms below know no ORM.

Read from the source text. A private name that this package does not define itself belongs to somebody else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("querycache", "backends")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent.name != "sa_internals"
)
# Documented interface in spite of the underscore: those of named tuples and of SQLAlchemy's Row.
PUBLIC = {"_asdict", "_fields", "_make", "_mapping", "_replace", "_t", "_tuple"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in PUBLIC


def _defined(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, and attributes assigned on `self`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=ast.Tuple(elts=slots)):
                names.update(str(slot.value) for slot in slots if isinstance(slot, ast.Constant))
    return names


def private_uses(source: str) -> Iterator[str]:
    """Each use of a private name from elsewhere, as "line: what"."""
    tree = ast.parse(source)
    defined = _defined(tree)
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases):
                # `from . import _x` and `from querycache._x import y` are this package's own.
                if node.level or module.split(".")[0] in ("querycache", "__future__"):
                    continue
                for alias in aliases:
                    if any(map(_is_private, [*module.split("."), alias.name])):
                        yield f"{node.lineno}: from {module} import {alias.name}"
            case ast.Import(names=aliases):
                for alias in aliases:
                    if any(map(_is_private, alias.name.split("."))):
                        yield f"{node.lineno}: import {alias.name}"
            case ast.Attribute(attr=name) if _is_private(name) and name not in defined:
                yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if _is_private(name) and name not in defined:
                yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_others(path: Path) -> None:
    assert list(private_uses(path.read_text())) == [], (
        "a private name of SQLAlchemy goes into querycache/sa_internals, with the versions it was read in"
    )


@pytest.mark.parametrize(
    "source",
    [
        "from sqlalchemy.orm import _x",
        "from sqlalchemy.sql._typing import Y",
        "import sqlalchemy.sql._typing",
        "statement._generate_cache_key()",
        "loading._instances = None",
        "getattr(statement, '_with_options', ())",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len(list(private_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from querycache._x import y",
        "from . import _x",
        "class A:\n  def f(self, other):\n    self._x = other._x",
        "row._mapping['a']",
        "object.__new__(A)",
    ],
)
def test_the_search_lets_pass(source: str) -> None:
    assert list(private_uses(source)) == []


STORE_ROOMS = [
    path
    for path in FILES
    if path.parent.name == "backends" or path.stem in ("regions", "ledger", "flight", "codec")
]


@pytest.mark.parametrize("path", STORE_ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_stores_deal_in_bytes_and_keys(path: Path) -> None:
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert not [name for name in imported if name.startswith("sqlalchemy.orm")]
