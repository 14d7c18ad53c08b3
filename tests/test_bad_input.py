"""Bad input: each has an error of its own, that names what was given and what would do, at the earliest moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dogpile.cache import make_region
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    sessionmaker,
    subqueryload,
)
from sqlalchemy.schema import ForeignKey

from querycache import (
    CacheUnavailable,
    ConfigurationError,
    FromCache,
    Policy,
    QueryCache,
    QueryCacheError,
    RelationshipCache,
    UnknownRegion,
)

MEMORY = "memory://"


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    parts: Mapped[list[Part]] = relationship()


class Part(Base):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    thing_id: Mapped[int] = mapped_column(ForeignKey("thing.id"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


Bad = tuple[Callable[[], object], list[str]]


def check(bad: Callable[[], object], words: list[str], kind: type[Exception] = ConfigurationError) -> None:
    with pytest.raises(kind) as error:
        bad()
    assert isinstance(error.value, QueryCacheError)
    for word in words:
        assert word in str(error.value)


# --- Making a cache --------------------------------------------------------------------------------


def at_once(**arguments: Any) -> Callable[[], object]:
    return lambda: QueryCache(**arguments)


def region(**settings: Any) -> Callable[[], object]:
    return lambda: QueryCache({"pages": settings})


MAKING: dict[str, Bad] = {
    "a number for regions": (at_once(regions=42), ["regions=42", "memory://"]),
    "nothing for regions": (at_once(regions=None), ["regions=None", "memory://"]),
    "no regions": (at_once(regions={}), ["regions={}", "mapping"]),
    "a list of regions": (at_once(regions=[MEMORY]), ["memory://", "mapping"]),
    "an empty URL": (at_once(regions=""), ["''", "redis://localhost:6379/0"]),
    "no URL": (at_once(regions="localhost:6379"), ["'localhost:6379'", "redis://localhost:6379/0"]),
    "an unknown scheme": (at_once(regions="ftp://here"), ["'ftp'", "ftp://here", "redis://", "memcached://"]),
    "an unknown scheme with a password": (at_once(regions="ftp://me:secret@here"), ["'ftp'", "//***@here"]),
    "an unknown dogpile backend": (at_once(regions="dogpile+nope://"), ["'nope'", "installed"]),
    "an unknown backend": (region(backend="nope"), ["'pages'", "'nope'", "installed"]),
    "a region that is no URL": (at_once(regions={"pages": 5}), ["'pages'", "5", "URL"]),
    "a URL that is no text": (region(url=5), ["'pages'", "5", "redis://"]),
    "a region without a name": (at_once(regions={"": MEMORY}), ["''", "non-empty"]),
    "a region whose name is no text": (at_once(regions={1: MEMORY}), ["1", "string"]),
    "a region of nothing": (region(), ["'pages'", "'url'", "'backend'"]),
    "an unknown setting": (region(url=MEMORY, colour="red"), ["'pages'", "'colour'", "ttl"]),
    "an unknown argument of a URL": (at_once(regions="memory://?colour=red"), ["'colour'", "max_bytes"]),
    "a bad argument of a URL": (at_once(regions="memory://?max_bytes=lots"), ["max_bytes", "'lots'"]),
    "a bad port": (at_once(regions="redis://localhost:many/0"), ["many"]),
    "a bad Redis database": (at_once(regions="redis://localhost/first"), ["first"]),
    "an unknown argument of Redis": (at_once(regions="redis://localhost?colour=red"), ["'colour'"]),
    "memcached without a server": (at_once(regions="memcached://"), ["memcached://"]),
    "an unknown argument of a backend": (
        region(backend="querycache.memory", arguments={"colour": "red"}), ["'colour'", "max_bytes"]
    ),
    "arguments that are none": (region(backend="querycache.memory", arguments=5), ["'pages'", "arguments", "5"]),
    "a dogpile region that is not configured": (at_once(regions=make_region()), ["configure()"]),
    "a dogpile region of a mapping": (at_once(regions={"pages": make_region()}), ["'pages'", "configure()"]),
    "a negative time to live": (at_once(ttl=-1), ["ttl=-1", "positive", "None"]),
    "no time to live at all": (at_once(ttl=0), ["ttl=0", "positive"]),
    "a time to live as text": (at_once(ttl="60"), ["ttl='60'", "seconds"]),
    "a time to live that is true": (at_once(ttl=True), ["ttl=True", "seconds"]),
    "a time to live that is no number": (at_once(ttl=float("nan")), ["ttl=nan", "seconds"]),
    "a time to live without end": (at_once(ttl=float("inf")), ["ttl=inf", "None"]),
    "a negative time to live of a region": (region(url=MEMORY, ttl=-5), ["'pages'", "-5", "positive"]),
    "a time to live in a URL": (at_once(regions="memory://?ttl=60"), ["'ttl'"]),
    "a negative lease": (at_once(lease=-1), ["lease=-1", "positive"]),
    "no lease": (at_once(lease=None), ["lease=None", "seconds"]),
    "a lease of no time": (at_once(lease=0), ["lease=0: give a positive number of seconds"]),
    "no namespace": (at_once(namespace=""), ["namespace=''", "text"]),
    "a namespace with spaces": (at_once(namespace="my app"), ["'my app'", "spaces"]),
    "a namespace that is no text": (at_once(namespace=5), ["namespace=5", "text"]),
    "a scope that is no function": (at_once(scope="tenant"), ["scope='tenant'", "function"]),
    "a policy of no class": (at_once(policies={"Thing": Policy()}), ["'Thing'", "class"]),
    "a policy that is none": (at_once(policies={Thing: 60}), ["Thing", "60", "Policy"]),
    "policies that are no mapping": (at_once(policies=[Thing]), ["policies", "Thing", "mapping"]),
    "a policy of an unknown region": (at_once(policies={Thing: Policy(region="pages")}), ["'pages'", "'default'"]),
    "a policy with a bad time to live": (lambda: Policy(ttl=-1), ["Policy", "-1", "positive"]),
    "a policy whose tags are text": (lambda: Policy(tags="news"), ["Policy", "'news'", "list"]),  # type: ignore[arg-type]
    "a policy whose region is no text": (lambda: Policy(region=5), ["region", "5", "string"]),  # type: ignore[arg-type]
    "an unknown consistency": (at_once(consistency="eventual"), ["'eventual'", "'strict'"]),
    "an unknown way in an outage": (at_once(on_outage="panic"), ["'panic'", "'available'"]),
    "refusing what is told after COMMIT only": (
        at_once(on_outage="refuse", consistency="commit"),
        ["'refuse'", "'commit'", "leave one out"],
    ),
    "refusing for a backend that is told after COMMIT only": (
        at_once(on_outage="refuse", regions={"pages": "dogpile+dogpile.cache.memory://"}),
        ["'refuse'", "'pages'", "Redis or memcached"],
    ),
    "no slots": (at_once(slots=0), ["slots=0", "positive"]),
    "a short signing key": (at_once(signing_key=b"short"), ["signing_key", "16"]),
    "a signing key as text": (at_once(signing_key="sixteen letters!"), ["signing_key", "bytes"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:region .* cannot count")
@pytest.mark.parametrize(("bad", "words"), MAKING.values(), ids=MAKING)
def test_making_a_cache(bad: Callable[[], object], words: list[str]) -> None:
    check(bad, words)


def test_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="colour"):
        QueryCache(colour="red")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("url", "extra"), [("redis://localhost", "redis"), ("memcached://localhost", "memcached")]
)
def test_a_missing_extra(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = {"redis": "redis", "memcached": "pymemcache"}[extra]
    for name in list(sys.modules):
        if name.split(".")[0] == client or name.startswith(f"querycache.backends.{extra}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, client, None)
    check(lambda: QueryCache(url), [f"querycache[{extra}]", "pip install"])


# --- From a file -----------------------------------------------------------------------------------

FILES: dict[str, tuple[str, list[str]]] = {
    "no TOML": ("[querycache]\nttl = = 5", ["config.toml", "line 2"]),
    "no table": ("[cache]\nttl = 5", ["config.toml", "[querycache]"]),
    "an unknown key": ("[querycache]\ncolour = 'red'", ["config.toml", "'colour'", "namespace"]),
    "an unknown key of a region": (
        "[querycache.regions.pages]\nurl = 'memory://'\ncolour = 'red'", ["'pages'", "'colour'", "ttl"]
    ),
    "an unknown scheme": ("[querycache.regions.pages]\nurl = 'ftp://here'", ["'pages'", "'ftp'", "redis://"]),
    "a negative time to live": ("[querycache.regions.pages]\nurl = 'memory://'\nttl = -5", ["'pages'", "-5"]),
    "a bad time to live": ("[querycache]\nttl = 'soon'", ["ttl='soon'", "seconds"]),
    "regions that are none": ("[querycache]\nregions = 5", ["regions=5"]),
    "an unknown word of dogpile": ("[querycache]\n'cache.pages.colour' = 'red'", ["'cache.pages.colour'", "backend"]),
    "half a word of dogpile": ("[querycache]\n'cache.pages' = 'red'", ["'cache.pages'", "cache.REGION.backend"]),
    "a table that is none": ("querycache = 5", ["config.toml", "[querycache]"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_file(content: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(content, "utf-8")
    check(lambda: QueryCache.from_config(path), words)
    check(lambda: QueryCache.from_config(str(path)), words)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    check(lambda: QueryCache.from_config(tmp_path / "nowhere.toml"), ["nowhere.toml", "No such file"])
    (tmp_path / "latin.toml").write_bytes(b"[querycache]\nnamespace = '\xe9'")
    check(lambda: QueryCache.from_config(tmp_path / "latin.toml"), ["latin.toml"])


def test_a_mapping() -> None:
    check(lambda: QueryCache.from_config({"colour": "red"}), ["'colour'", "namespace"])
    check(lambda: QueryCache.from_config({7: "red"}), ["7", "namespace"])  # type: ignore[dict-item]
    check(lambda: QueryCache.from_config(None), ["None", "TOML", "mapping"])  # type: ignore[arg-type]
    check(lambda: QueryCache.from_config({"cache.pages.colour": 1}), ["'cache.pages.colour'"])
    check(lambda: QueryCache.from_config({"cache.pages.backend.name": 1}), ["'cache.pages.backend.name'"])
    one_by_one = {
        "cache.a.arguments": 5,
        "cache.a.arguments.max_bytes": 5,
        "cache.a.backend": "querycache.memory",
    }
    check(lambda: QueryCache.from_config(one_by_one), ["cache.a.arguments=5", "mapping"])
    check(lambda: QueryCache.from_config({"regions": MEMORY, "cache.a.backend": "null"}), [MEMORY, "mapping"])
    made = make_region().configure("querycache.memory")
    both = {"regions": {"a": made}, "cache.a.backend": "querycache.memory"}
    check(lambda: QueryCache.from_config(both), ["'cache.a.backend'", "leave out one"])
    check(lambda: QueryCache(ttl=10**400), ["ttl", "seconds"])
    check(lambda: QueryCache.from_config({"ttl": 5}, ttl=6), ["ttl", "twice"])


def test_a_mapping_is_left_as_it_is() -> None:
    given: dict[str, Any] = {"regions": {"a": MEMORY, "b": {"url": MEMORY}}, "cache.a.expiration_time": 60}
    given |= {"cache.b.expiration_time": 30, "cache.c.backend": "querycache.memory"}
    QueryCache.from_config(given)
    assert given["regions"] == {"a": MEMORY, "b": {"url": MEMORY}}


# --- Where it works --------------------------------------------------------------------------------

TARGETS: list[Any] = [None, 5, "Session", Thing, Thing(), object, sessionmaker]


def test_attach_what_is_for_asyncio() -> None:
    engine = create_async_engine("postgresql+psycopg://localhost/nowhere")
    for target in (engine, async_sessionmaker(engine), AsyncSession(engine)):
        check(lambda target=target: QueryCache().attach(target), ["attach", "asyncio", "sync_engine"])  # type: ignore[misc]


@pytest.mark.parametrize("target", TARGETS, ids=map(repr, range(len(TARGETS))))
def test_attach(target: Any) -> None:
    check(lambda: QueryCache().attach(target), [f"attach({target!r})", "sessionmaker", "Engine"])
    check(lambda: QueryCache().detach(target), ["sessionmaker"])


def test_detach_what_is_not_attached(engine: Engine) -> None:
    with Session(engine) as db:
        check(lambda: QueryCache().detach(db), ["detach", "not attached"])
        check(lambda: QueryCache().explain(db, select(Thing)), ["explain", "not attached"])
    check(lambda: QueryCache().explain("a session", select(Thing)), ["explain", "a session"])  # type: ignore[arg-type]


# --- Options of a statement ------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a key that is a number": ({"cache_key": 5}, ["cache_key=5", "string", "True"]),
    "a key of bytes": ({"cache_key": b"a"}, ["cache_key=b'a'", "string"]),
    "an empty key": ({"cache_key": ""}, ["cache_key=''", "non-empty"]),
    "a key that is a list": ({"cache_key": ["a"]}, ["cache_key=['a']", "string"]),
    "an unknown region": ({"cache_key": True, "cache_region": "pages"}, ["'pages'", "'default'"]),
    "a region that is no text": ({"cache_key": True, "cache_region": 5}, ["cache_region=5", "string"]),
    "an unknown option": ({"cache_key": True, "cache_tll": 5}, ["'cache_tll'", "cache_ttl"]),
    "a negative time to live": ({"cache_key": True, "cache_ttl": -1}, ["cache_ttl=-1", "positive", "None"]),
    "no time to live at all": ({"cache_key": True, "cache_ttl": 0}, ["cache_ttl=0", "positive"]),
    "a time to live as text": ({"cache_key": True, "cache_ttl": "60"}, ["cache_ttl='60'", "seconds"]),
    "a time to live that is true": ({"cache_key": True, "cache_ttl": True}, ["cache_ttl=True", "seconds"]),
    "a time to live without end": ({"cache_key": True, "cache_ttl": float("inf")}, ["cache_ttl=inf", "None"]),
    "tags as text": ({"cache_key": True, "cache_tags": "news"}, ["cache_tags='news'", "['news']"]),
    "a tag that is a number": ({"cache_key": True, "cache_tags": [1]}, ["cache_tags", "1", "strings"]),
    "an empty tag": ({"cache_key": True, "cache_tags": [""]}, ["cache_tags", "''", "non-empty"]),
    "tags that are none": ({"cache_key": True, "cache_tags": 5}, ["cache_tags=5", "list"]),
    "tables as text": ({"cache_key": True, "cache_tables": "thing"}, ["cache_tables='thing'", "['thing']"]),
    "a quoted table": (
        {"cache_key": True, "cache_tables": ['"thing"']},
        ["cache_tables", "'shop.orders'", "quotes"],
    ),
    "an unknown mode": ({"cache_key": True, "cache_mode": "never"}, ["cache_mode='never'", "'bypass'"]),
    "exact as text": ({"cache_key": "a", "cache_exact": "yes"}, ["cache_exact='yes'", "True or False"]),
    "exact without a key": ({"cache_key": True, "cache_exact": True}, ["cache_exact", "string", "cache_key"]),
    "an unknown option alone": ({"cache_kye": "a"}, ["'cache_kye'", "cache_key"]),
    "a time to live without a key": ({"cache_ttl": 60}, ["cache_ttl", "cache_key=True"]),
    "tags without a key": ({"cache_tags": ["news"]}, ["cache_tags", "cache_key=True"]),
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", ["of the statement", "of the execution", "of a get", "of a query"])
def test_options(options: dict[str, Any], words: list[str], way: str, engine: Engine) -> None:
    kind = UnknownRegion if "pages" in options.values() else ConfigurationError
    with Session(engine) as db:
        QueryCache().attach(db)
        ways: dict[str, Callable[[], object]] = {
            "of the statement": lambda: db.execute(select(Thing).execution_options(**options)),
            "of the execution": lambda: db.execute(select(Thing), execution_options=options),
            "of a get": lambda: db.get(Thing, 1, execution_options=options),
            "of a query": lambda: db.query(Thing).execution_options(**options).all(),
        }
        # twice: an option that is wrong once is wrong for ever
        for _ in range(2):
            check(ways[way], words, kind)
        assert db.scalars(select(Thing), execution_options={"cache_key": True}).all() == []


def test_options_of_others_are_left_alone(engine: Engine) -> None:
    """Names that do not begin like ours, and those of SQLAlchemy, which need not even be text."""
    statement = select(Thing).options(subqueryload(Thing.parts))
    with Session(engine) as db:
        QueryCache().attach(db)
        db.add(Thing(id=1, parts=[Part(id=1)]))
        db.flush()
        for options in (
            {"cachet": 1, "my_cache_key": 2},
            {"cache_key": True, "my_cache": 1},
            {"cache_key": True, "cache_tags": ["news"], "populate_existing": True},
        ):
            assert [len(thing.parts) for thing in db.scalars(statement, execution_options=options)] == [1]
        db.rollback()


def test_a_word_alone_refines_a_policy(engine: Engine) -> None:
    """Under a policy no statement needs a key, so the other words mean something without it."""
    cache = QueryCache(
        {"default": MEMORY, "pages": "memory://?max_bytes=1mb"}, policies={Thing: Policy(ttl=60)}
    )
    with Session(engine) as db, cache.recording() as events:
        cache.attach(db)
        refinements: list[dict[str, Any]] = [
            {},
            {},
            {"cache_mode": "bypass"},
            {"cache_mode": "refresh"},
            {"cache_region": "pages"},
            {"cache_key": False},
        ]
        for options in refinements:
            db.scalars(select(Thing), execution_options=options).all()
    found = [(event.outcome, event.reason, event.region) for event in events if event.outcome != "fill"]
    assert found == [
        ("miss", "", "default"),
        ("hit", "", "default"),
        ("bypass", "mode", "default"),
        ("miss", "refresh", "default"),
        ("miss", "", "pages"),
        ("bypass", "mode", "default"),
    ]


def test_to_keep_out_can_be_said_without_a_key(engine: Engine) -> None:
    with Session(engine) as db:
        cache = QueryCache().attach(db)
        db.scalars(select(Thing), execution_options={"cache_mode": "bypass"}).all()
        assert not cache.stats().fills


STATEMENT_OPTIONS: dict[str, Bad] = {
    "FromCache region": (lambda: FromCache(region=5), ["region", "5", "string"]),  # type: ignore[arg-type]
    "FromCache key": (lambda: FromCache(key=""), ["key=''", "non-empty"]),
    "FromCache ttl": (lambda: FromCache(ttl=-1), ["ttl=-1", "positive"]),
    "FromCache tags": (lambda: FromCache(tags="news"), ["tags='news'", "['news']"]),
    "RelationshipCache of text": (lambda: RelationshipCache("parts"), ["'parts'", "Comment.author"]),  # type: ignore[arg-type]
    "RelationshipCache of a class": (lambda: RelationshipCache(Thing), ["Thing", "Comment.author"]),  # type: ignore[arg-type]
    "RelationshipCache of a column": (lambda: RelationshipCache(Thing.id), ["Thing.id", "relationship"]),
    "RelationshipCache ttl": (lambda: RelationshipCache(Thing.parts, ttl=0), ["ttl=0", "positive"]),
}


@pytest.mark.parametrize(("bad", "words"), STATEMENT_OPTIONS.values(), ids=STATEMENT_OPTIONS)
def test_statement_options(bad: Callable[[], object], words: list[str]) -> None:
    check(bad, words)


def test_a_statement_option_of_an_unknown_region(engine: Engine) -> None:
    with Session(engine) as db:
        QueryCache().attach(db)
        statement = select(Thing).options(FromCache("pages"))
        check(lambda: db.execute(statement), ["'pages'", "'default'"], UnknownRegion)


def test_a_scope_without_a_form(engine: Engine) -> None:
    """What cannot keep answers apart must not be passed over."""
    cache = QueryCache(scope=lambda session: object())
    with Session(engine) as db, cache.recording() as events:
        cache.attach(db)
        db.execute(select(Thing), execution_options={"cache_key": True}).all()
    assert [(event.outcome, event.reason) for event in events] == [("bypass", "parameter type object")]


# --- Calls -----------------------------------------------------------------------------------------


def invalidation(**arguments: Any) -> Callable[[], object]:
    return lambda: QueryCache().invalidate(**arguments)


CALLS: dict[str, Bad] = {
    "nothing named": (invalidation(), ["key", "tags", "region", "everything=True"]),
    "no keys": (invalidation(keys=[], tags=()), ["everything=True"]),
    "a key that is a number": (invalidation(key=5), ["key=5", "string"]),
    "an empty key": (invalidation(key=""), ["''", "non-empty"]),
    "keys as text": (invalidation(keys="news"), ["keys='news'", "['news']"]),
    "tags as text": (invalidation(tags="news"), ["tags='news'", "['news']"]),
    "a tag that is none": (invalidation(tags=[None]), ["tags", "None", "strings"]),
    "tables as text": (invalidation(tables="thing"), ["tables='thing'", "['thing']"]),
    "a quoted table": (
        invalidation(tables=['"public"."thing"']),
        ["tables", '"thing"', "'shop.orders'", "quotes"],
    ),
    "a quoted table in a schema": (invalidation(tables=["public.`thing`"]), ["tables", "`thing`", "quotes"]),
    "a table with a space after it": (invalidation(tables=["thing "]), ["tables", "'thing '", "spaces"]),
    "a table that is no name": (
        invalidation(tables=[Thing.__table__]),
        ["tables", "'thing'", "names", "'orders'"],
    ),
    "an entity that is none": (invalidation(entities=[int]), ["int", "mapped class"]),
    "one entity alone": (invalidation(entities=Thing), ["entities", "Thing", "list"]),
    "a statement as text": (invalidation(statement="SELECT 1"), ["SELECT 1", "select()"]),
    "not everything": (invalidation(everything=False), ["everything=False", "True"]),
    "everything as text": (invalidation(everything="yes"), ["everything='yes'", "True"]),
    "an unknown region": (invalidation(region="pages"), ["'pages'", "'default'"]),
    "a declaration of nothing": (lambda: QueryCache().depends("", on=["thing"]), ["''", "non-empty"]),
    "a declaration on a quoted table": (
        lambda: QueryCache().depends("v", on=['"thing"']),
        ["on", "thing", "quotes"],
    ),
    "a declaration on text": (lambda: QueryCache().depends("view", on="thing"), ["on='thing'", "['thing']"]),
}


@pytest.mark.parametrize(("bad", "words"), CALLS.values(), ids=CALLS)
def test_calls(bad: Callable[[], object], words: list[str]) -> None:
    check(bad, words)


@pytest.mark.parametrize(
    "url", ["redis://me:secret@127.0.0.1:1?timeout=0.2", "memcached://127.0.0.1:1?timeout=0.2"]
)
def test_a_server_that_does_not_answer(url: str, engine: Engine) -> None:
    """An application starts and works without it; who must know is told: the caller of invalidate, and the counts."""
    cache = QueryCache(url)
    with pytest.raises(CacheUnavailable, match=r"127\.0\.0\.1:1") as error:
        cache.invalidate(everything=True)
    assert "secret" not in str(error.value)
    with Session(engine) as db:
        cache.attach(db)
        assert db.scalars(select(Thing), execution_options={"cache_key": True}).all() == []
    assert ("error", "unavailable") in cache.stats().reasons


@pytest.mark.parametrize(
    "regions",
    [
        "redis//:s3cret@h/0",
        "redis:///:s3cret@h",
        "redis://u:s3cr@et@h/x",
        "redis://u:s3cret@[::1/0",
        "foo://u:s3cret@h",
        "memory://u:s3cret@h",
        "memcached://u:s3cret@h:11211",
        "memory://u:s3cret,x@h",
        "foo://u:s3cret'x@h",
        "memcached://u:s3cret x@h/y",
        "redis://u:s3cret,x@[::1/0",
        "redis://:s3cret#x@h/0",
        ["redis://:s3cret@h"],
        {"a": {"backend": "querycache.redis", "arguments": [("password", "s3cret")]}},
        {"a": {"backend": "querycache.redis", "arguments": ("password", "s3cret")}},
        {"a": ["redis://:s3cret@h"]},
        {"a": {"url": ["redis://:s3cret@h"]}},
        {"a": {"backend": "querycache.redis", "arguments": "redis://:s3cret@h"}},
    ],
    ids=str,
)
def test_no_password_shows(regions: Any) -> None:
    with pytest.raises(ConfigurationError) as refused:
        QueryCache(regions)
    assert "s3cr" not in str(refused.value)
    assert "et@" not in str(refused.value)
