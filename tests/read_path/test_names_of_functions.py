"""Functions by name: one that the database does not know itself may read whatever it likes.

The applications here have functions of names that some other database has.
"""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, column, func, literal_column, select, text
from sqlalchemy.sql.elements import quoted_name

from querycache import textual
from querycache.fragments import calls
from querycache.functions import is_stable
from querycache.textual import read_text
from tests.writes.library import Book
from tests.writes.test_pitfalls_e import RAISE_PRICE, Library

WAYS = {
    "an expression": select(Book.id, func.total(Book.id)),
    "a piece of text": select(Book.id, literal_column("total(id)")),
    "whole text": text("SELECT id, total(id) AS a FROM book").columns(column("id"), column("a")),
}
POSTGRESQL = "CREATE FUNCTION {} (i int) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT sum(price) FROM book WHERE id > i'"
MARIADB = "CREATE FUNCTION {} (i int) RETURNS bigint READS SQL DATA RETURN (SELECT sum(price) FROM book WHERE id > i)"


def _declare(library: Library, name: str) -> None:
    sql = POSTGRESQL if library.engine.dialect.name == "postgresql" else MARIADB
    with library.engine.begin() as connection:
        connection.exec_driver_sql(sql.format(name))


def _is_right_after_a_write(library: Library, statement: Any) -> bool:
    for _ in range(3):
        library.ask(statement)
    library.write(RAISE_PRICE)
    return sorted(library.ask(statement)) == sorted(library.database(statement))


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Library:
    return Library(request.getfixturevalue(f"{request.param}_engine"))


@pytest.mark.server("postgresql")
@pytest.mark.server("mariadb")
@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_another_database_has(server: Library, way: str) -> None:
    """total() is SQLite's; here it is the application's, and reads all other books."""
    _declare(server, "total")
    assert _is_right_after_a_write(server, WAYS[way])


@pytest.mark.server("postgresql")
@pytest.mark.parametrize(
    "call",
    [
        func.ifnull(Book.id),
        func.nvl(Book.id),
        getattr(func, quoted_name("Abs", True))(Book.id),
        literal_column('"Abs"(id)'),
    ],
    ids=str,
)
def test_a_function_by_another_name_of_a_known_one(postgresql_engine: Engine, call: Any) -> None:
    """A parser may know NVL as COALESCE, and quotes make another name of "Abs"."""
    library = Library(postgresql_engine)
    for name in ("ifnull", "nvl", '"Abs"'):
        _declare(library, name)
    assert _is_right_after_a_write(library, select(Book.id, call))
    written = str(call.compile(postgresql_engine)).replace("book.", "")
    whole = text(f"SELECT id, {written} AS a FROM book").columns(column("id"), column("a"))
    assert _is_right_after_a_write(library, whole)


@pytest.mark.parametrize(
    ("name", "databases"),
    [
        ("count", {"sqlite", "postgresql", "mariadb", "mysql", "oracle"}),
        ("pg_catalog.count", {"sqlite", "postgresql", "mariadb", "mysql", "oracle"}),
        ("total", {"sqlite"}),
        ("find_in_set", {"mariadb", "mysql"}),
        ("string_agg", {"postgresql"}),
        ("date", {"postgresql", "mariadb", "mysql"}),
        ("Count", set()),
        ("app.count", set()),
    ],
)
def test_the_databases_that_know_a_function(name: str, databases: set[str]) -> None:
    asked = ("sqlite", "postgresql", "mariadb", "mysql", "oracle")
    assert {each for each in asked if is_stable(name, each)} == databases


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql", "mariadb"])
@pytest.mark.parametrize(
    ("sql", "functions"),
    [
        ("SELECT CASE WHEN a = 1 AND b = 2 OR c THEN 1 END FROM t WHERE EXISTS (SELECT 1 FROM u)", set()),
        ("SELECT CAST(a AS integer), COUNT(DISTINCT b), Sum(c) FROM t", {"cast", "count", "sum"}),
        ("SELECT nvl(a, b), stats.count(a) FROM t", {"nvl", "stats.count"}),
    ],
)
def test_functions_have_the_names_that_text_gives_them(sql: str, functions: set[str], dialect: str) -> None:
    assert read_text(sql, dialect).functions == functions


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        (
            "postgresql",
            "SELECT string_agg(a, ',' ORDER BY b), array_agg(a ORDER BY b), date_trunc('day', c) FROM t",
        ),
        (
            "postgresql",
            "SELECT position('a' IN b), substring(a FROM 1 FOR 2), trim(BOTH 'x' FROM a), extract(year FROM c) FROM t",
        ),
        (
            "postgresql",
            "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY a), max(a) FILTER (WHERE b) FROM t",
        ),
        (
            "postgresql",
            "SELECT a::int, b->>'c', row_number() OVER (PARTITION BY a ORDER BY b) FROM t WHERE a ~ 'x'",
        ),
        (
            "mariadb",
            "SELECT group_concat(a ORDER BY b SEPARATOR ','), if(a, b, c), left(a, 1), year(d) FROM t",
        ),
        (
            "mariadb",
            "SELECT date_add(a, INTERVAL 1 DAY), char(65), convert(a, char), substring(a FROM 2) FROM t",
        ),
        ("sqlite", "SELECT group_concat(a, ','), ifnull(a, b), total(c), json_extract(d, '$.x') FROM t"),
    ],
)
def test_what_a_database_knows_is_stable_in_text_too(dialect: str, sql: str) -> None:
    found = read_text(sql, dialect)
    assert found.understood
    assert {each for each in found.functions if not is_stable(each, dialect)} == set()


def test_a_parser_that_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its classes none can be made."""

    def refuse(*arguments: object) -> None:
        raise TypeError("interpreted classes cannot inherit from compiled")

    read_text.cache_clear()
    monkeypatch.setattr(textual, "_parsers", {})
    monkeypatch.setattr(textual, "type", refuse, raising=False)
    try:
        found = read_text("SELECT nvl(a, b), count(c) FROM t WHERE d IN (1) AND e = ANY(f)", "postgresql")
        assert found.understood
        assert found.reads == {(None, "t")}
        assert [each for each in sorted(found.functions) if not is_stable(each, "postgresql")] == ["nvl"]
        assert read_text("INSERT INTO t (a) VALUES (1)", "sqlite").writes == {(None, "t")}
    finally:
        read_text.cache_clear()


@pytest.mark.parametrize(
    ("piece", "called"),
    [
        ("ARRAY[f()]", {"f"}),
        ("tags[ f() ]", {"f"}),
        ("tags[1][f(2)]", {"f"}),
        ("(x).f(1)", {"f"}),
        ("f /* of these */ ()", {"f"}),
        ("F -- of these;\n (1)", {"f"}),
        ('"F"(1)', {"F"}),
        ('"Price (EUR)" > 3', set()),
        ("[F](1)", {"F"}),
        ("own . f (g(1))", {"own.f", "g"}),
        ('"own".f(1)', {"own.f"}),
        ("my$lower(1)", {"my$lower"}),
        ("[my f](1)", {"my f"}),
        ("""'"' || f() || '"'""", {"f"}),
        ("concat('`', f(), '`')", {"concat", "f"}),
        ("""json('{"a": "', f(), '"}')""", {"json", "f"}),
        ("a = ANY(:x) AND b IN (1) AND (c) OR ROW(1) = (d)", set()),
    ],
)
def test_what_a_piece_calls(piece: str, called: set[str]) -> None:
    assert calls(piece) == called


def test_long_words_take_no_time() -> None:
    for word in ("f" * 20_000, "a." * 10_000, "a . " * 6_000, "[" * 20_000, "x'" + "0f" * 10_000 + "'"):
        assert calls(f"{word}, lower(a)") >= {"lower"}
