"""Pitfalls D, dogpile.cache and the stores, as an application meets them.

D1 and D2, invalidation, are in `test_invalidation.py`; here stands what dogpile.cache itself does. What concerns
one store alone (D3, D10, D11) is also in `tests/stores`. No region takes a lock to read: D5 to D7 are about those.
"""

from __future__ import annotations

import pickle
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dogpile.cache import make_region
from dogpile.cache.api import NO_VALUE
from dogpile.cache.exception import DogpileCacheException
from redis import Redis
from sqlalchemy import Engine, LargeBinary, String, create_engine, event, func, literal, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from querycache import CacheUnavailable, QueryCache
from tests.read_path.models import Post, Tag, User
from tests.read_path.observe import Observer, traffic

Sessions = Callable[[Engine], sessionmaker[Session]]
CACHED = {"cache_key": True}


@pytest.fixture
def forum_on_store(own_forum: Engine, store_url: str) -> tuple[sessionmaker[Session], QueryCache]:
    maker = sessionmaker(own_forum)
    return maker, QueryCache(store_url).attach(maker)


# --- D1, D2: the naive ways ------------------------------------------------------------------------


def memory_region(**arguments: Any) -> Any:
    return make_region().configure("dogpile.cache.memory", **arguments)


def test_D1_the_naive_way_stores_what_was_invalidated_in_the_making() -> None:
    region = memory_region(expiration_time=60)

    def create() -> str:
        region.invalidate()
        return "old"

    assert region.get_or_create("key", create) == "old"
    assert region.get("key") == "old", "the stamp is younger than the invalidation"


def test_D2_the_naive_way_invalidates_in_one_process() -> None:
    backing: dict[str, Any] = {}
    here, there = (memory_region(expiration_time=60, arguments={"cache_dict": backing}) for _ in range(2))
    here.set("key", "old")
    here.invalidate()
    assert here.get("key") is NO_VALUE
    assert there.get("key") == "old"


# --- D3 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region_ttl", "own_ttl", "least", "most"),
    [
        (None, 100, 89_000, 100_000),
        (100, None, 89_000, 100_000),
        (100, 7, 6_000, 7_000),
        (7, 100, 89_000, 100_000),
    ],
)
def test_D3_the_time_to_live_is_stored_with_the_entry(
    region_ttl: float | None,
    own_ttl: float | None,
    least: int,
    most: int,
    sqlite_forum: Engine,
    redis_cache_url: str,
) -> None:
    maker = sessionmaker(sqlite_forum)
    cache = QueryCache(redis_cache_url, ttl=region_ttl).attach(maker)
    with Redis.from_url(redis_cache_url.partition("?")[0]) as client:
        before = set(client.keys("qc:e:*"))  # type: ignore[arg-type]
        with maker() as db:
            db.scalar(
                select(Tag.name), execution_options={**CACHED, "cache_ttl": own_ttl} if own_ttl else CACHED
            )
        (entry,) = set(client.keys("qc:e:*")) - before  # type: ignore[arg-type]
        assert least <= client.pttl(entry) <= most  # type: ignore[operator]
    assert cache.stats().fills == 1


def test_D3_what_is_over_is_gone(forum_on_store: tuple[sessionmaker[Session], QueryCache]) -> None:
    maker, cache = forum_on_store
    statement = select(Tag.name).order_by(Tag.id)
    with maker() as db:
        db.scalars(statement, execution_options={**CACHED, "cache_ttl": 1}).all()
        while cache.stats().misses < 2:
            time.sleep(0.05)
            db.scalars(statement, execution_options={**CACHED, "cache_ttl": 1}).all()
    assert cache.stats().fills == 2
    assert not cache.stats().stale


def test_D3_without_a_time_to_live_invalidation_works_too(
    forum_on_store: tuple[sessionmaker[Session], QueryCache],
) -> None:
    maker, cache = forum_on_store
    with maker() as db:
        for _ in range(2):
            db.scalar(select(func.count(Tag.id)), execution_options=CACHED)
        cache.invalidate(everything=True)
        db.scalar(select(func.count(Tag.id)), execution_options=CACHED)
    assert (cache.stats().hits, cache.stats().stale) == (1, 1)


def test_D3_the_naive_way_raises_without_a_time_to_live() -> None:
    region = memory_region()
    region.set("key", "old")
    region.invalidate(hard=False)
    with pytest.raises(DogpileCacheException, match="expiration time"):
        region.get_or_create("key", str)


# --- D4 --------------------------------------------------------------------------------------------


def test_D4_what_is_invalid_is_not_served_while_it_is_made_anew(
    own_forum: Engine, forum_on_store: tuple[sessionmaker[Session], QueryCache]
) -> None:
    maker, cache = forum_on_store
    with own_forum.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    statement = select(Tag.name).where(Tag.id == 1)
    with maker() as db:
        assert db.scalar(statement, execution_options=CACHED) == "sql"
    behind = create_engine(own_forum.url)
    with behind.begin() as connection:
        connection.execute(update(Tag).where(Tag.id == 1).values(name="new"))
    behind.dispose()
    cache.invalidate(everything=True)

    asked, go_on = threading.Event(), threading.Event()
    answers = []

    def regenerate() -> None:
        with maker() as db:
            answers.append(db.scalar(statement, execution_options=CACHED))

    def wait_there(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            assert go_on.wait(60)

    event.listen(own_forum, "before_cursor_execute", wait_there)
    thread = threading.Thread(target=regenerate)
    thread.start()
    assert asked.wait(60)
    threading.Timer(0.2, go_on.set).start()
    with maker() as db:
        assert db.scalar(statement, execution_options=CACHED) == "new"
    thread.join(60)
    event.remove(own_forum, "before_cursor_execute", wait_there)
    assert answers == ["new"]


# --- D8 --------------------------------------------------------------------------------------------


class Planted:
    """What a pickle would run."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Planted, "ran", True)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda entry: b"",
    "a byte": lambda entry: b"\x00",
    "truncated": lambda entry: entry[:-1],
    "half": lambda entry: entry[: len(entry) // 2],
    "longer": lambda entry: entry + b"\x00",
    "a bit in the middle": lambda entry: flipped(entry, len(entry) // 2),
    "a bit at the end": lambda entry: flipped(entry, len(entry) - 1),
    "a bit in the header": lambda entry: flipped(entry, entry.index(b"\xc1qc") + 4),
    "an older format": lambda entry: entry.replace(b"\xc1qc\x01", b"\xc1qc\x00"),
    "a newer format": lambda entry: entry.replace(b"\xc1qc\x01", b"\xc1qc\x02"),
    "another's bytes": lambda entry: b'{"name": "sql"}',
    "a pickle": lambda entry: pickle.dumps(Planted()),
    "a pickle as payload": lambda entry: entry[: entry.index(b"\xc1qc")] + pickle.dumps(Planted()),
    "the payload of another entry": lambda entry: entry.replace(b"sql", b"SQL"),
}


def flipped(entry: bytes, at: int) -> bytes:
    return entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("signing_key", [None, b"sixteen bytes ok"], ids=["plain", "signed"])
def test_D8_what_cannot_be_read_is_a_miss_and_counted(
    damage: Callable[[bytes], bytes], signing_key: bytes | None, sqlite_forum: Engine, redis_cache_url: str
) -> None:
    maker = sessionmaker(sqlite_forum)
    cache = QueryCache(redis_cache_url, signing_key=signing_key).attach(maker)
    statement = select(Tag.name).order_by(Tag.id)

    def outcome() -> Any:
        with cache.recording() as events, maker() as db:
            assert db.scalars(statement, execution_options=CACHED).all() == ["sql", "orm", "unused"]
        return events[0]

    assert outcome().outcome == "miss"
    with Redis.from_url(redis_cache_url.partition("?")[0]) as client:
        for name in client.keys("qc:e:*"):  # type: ignore[union-attr]
            entry = client.get(name)
            if b"sql" in entry:  # type: ignore[operator]
                client.set(name, damage(entry))  # type: ignore[arg-type]
    damaged = outcome()
    assert damaged.outcome in ("miss", "stale")
    assert damaged.outcome == "stale" or damaged.reason
    assert outcome().outcome == "hit", "it was made anew"
    assert not Planted.ran


def test_D8_an_entry_signed_by_another_is_a_miss(sqlite_forum: Engine, redis_cache_url: str) -> None:
    reasons = []
    for signing_key in (None, b"the first key ....", b"the second key ...", None):
        maker = sessionmaker(sqlite_forum)
        cache = QueryCache(redis_cache_url, signing_key=signing_key).attach(maker)
        with cache.recording() as events, maker() as db:
            db.scalars(select(Tag.name), execution_options=CACHED).all()
        reasons.append([(each.outcome, each.reason) for each in events])
    filled = ("fill", "")
    assert reasons == [[("miss", ""), filled], *([("miss", "signature"), filled] for _ in range(3))]


# --- D9 --------------------------------------------------------------------------------------------

NOBODY = {"redis": "redis://127.0.0.1:1?timeout=0.2", "memcached": "memcached://127.0.0.1:1?timeout=0.2"}


@pytest.mark.parametrize("url", NOBODY.values(), ids=NOBODY)
def test_D9_without_a_server_the_database_answers(url: str, own_forum: Engine) -> None:
    maker = sessionmaker(own_forum)
    cache = QueryCache(url).attach(maker)
    with maker() as db:
        for _ in range(3):
            assert db.scalars(select(Tag.name).order_by(Tag.id), execution_options=CACHED).first() == "sql"
        db.get_one(Tag, 1).name = "new"
        db.commit()
    with maker() as db:
        assert db.scalars(select(Tag.name).order_by(Tag.id), execution_options=CACHED).first() == "new"
    stats = cache.stats()
    assert stats.errors or stats.bypasses
    assert not stats.hits + stats.fills
    assert {reason for _, reason in stats.reasons} <= {"unavailable", "unavailable at commit"}


@pytest.mark.parametrize("url", NOBODY.values(), ids=NOBODY)
def test_D9_an_invalidation_that_nobody_hears_is_an_error(url: str) -> None:
    with pytest.raises(CacheUnavailable, match=r"127\.0\.0\.1:1"):
        QueryCache(url).invalidate(everything=True)


class Coordinates:
    """What a driver may give for a type of its own; nobody else knows it."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Coordinates({self.text!r})"


def test_D9_a_value_that_cannot_be_stored_is_an_answer_all_the_same(
    tmp_path: Path, cache: QueryCache
) -> None:
    sqlite3.register_converter("COORDINATES", Coordinates)
    engine = create_engine(
        f"sqlite:///{tmp_path / 'map.db'}", connect_args={"detect_types": sqlite3.PARSE_DECLTYPES}
    )
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE map (at COORDINATES)"))
        connection.execute(text("INSERT INTO map VALUES ('1;2')"))
    statement = text("SELECT at FROM map").columns(at=String())
    with Session(engine) as db, cache.recording() as events:
        cache.attach(db)
        for _ in range(2):
            found = db.execute(statement, execution_options=CACHED).scalars().all()
            assert [type(each) for each in found] == [Coordinates]
    reason = f"type {__name__}.Coordinates"
    assert [(each.outcome, each.reason) for each in events] == [("miss", ""), ("bypass", reason)] * 2
    engine.dispose()


# --- D10 -------------------------------------------------------------------------------------------


def test_D10_what_is_too_large_for_memcached_is_not_stored_and_counted(
    own_forum: Engine, memcached_cache_url: str
) -> None:
    maker = sessionmaker(own_forum)
    cache = QueryCache(memcached_cache_url).attach(maker)
    # nothing that can be compressed
    noise = func.randomblob(3 * 2**20, type_=LargeBinary)
    options = {**CACHED, "cache_ttl": 40 * 86_400}
    with maker() as db, cache.recording() as events:
        for _ in range(2):
            assert len(db.scalars(select(noise), execution_options=options).one()) == 3 * 2**20
        small = select(func.randomblob(2**18, type_=LargeBinary))
        assert db.scalar(small, execution_options=options) == db.scalar(small, execution_options=options)
    refused = [("miss", ""), ("error", "refused")]
    found = [(each.outcome, each.reason) for each in events]
    assert found == [*refused, *refused, ("miss", ""), ("fill", ""), ("hit", "")]


def test_D10_any_key_and_any_time_to_live(forum_on_store: tuple[sessionmaker[Session], QueryCache]) -> None:
    maker, cache = forum_on_store
    for number, key in enumerate(["with spaces", "ключ ☃\n", "x" * 1000, "\ud800", "~"], 1):
        for ttl in (1.9, 60, 31 * 86_400, 10 * 365 * 86_400):
            for _ in range(2):
                with maker() as db:
                    options = {"cache_key": key, "cache_ttl": ttl, "cache_tags": [f"{key} {ttl}"]}
                    assert db.scalar(select(Tag.id).where(Tag.id == 1), execution_options=options) == 1
        assert cache.stats().hits == 4 * number


# --- D11 -------------------------------------------------------------------------------------------


def test_D11_no_tags_and_no_keys_are_no_error(
    forum_on_store: tuple[sessionmaker[Session], QueryCache],
) -> None:
    maker, cache = forum_on_store
    with maker() as db:
        for _ in range(2):
            # neither tables nor names: nothing but the tags that every answer has
            assert db.scalar(select(literal(1)), execution_options={**CACHED, "cache_tags": []}) == 1
        db.execute(text("SELECT 1"))
        db.commit()
    assert cache.stats().hits == 1


# --- D12 -------------------------------------------------------------------------------------------

EMPTY = {
    "no rows": select(User).where(User.id < 0),
    "null": select(User.age).where(User.id == 3),
    "null of an aggregate": select(func.max(User.age)).where(User.id < 0),
    "zero": select(func.count(User.id)).where(User.id < 0),
    "false": select(literal(False)),
    "an empty text": select(literal("")),
    "no rows of text": text("SELECT id FROM tag WHERE 1 = 0").columns(Tag.id),
}


@pytest.mark.parametrize("statement", EMPTY.values(), ids=EMPTY)
def test_D12_nothing_is_an_answer(
    statement: Any, forum_on_store: tuple[sessionmaker[Session], QueryCache], own_forum: Engine
) -> None:
    maker, cache = forum_on_store
    answers = []
    for _ in range(2):
        with maker() as db:
            answers.append(Observer().describe(db.execute(statement, execution_options=CACHED).all()))
    assert answers[0] == answers[1]
    assert cache.stats().hits == 1
    with maker() as db, traffic(own_forum) as seen:
        assert [db.get(Post, 99, execution_options=CACHED) for _ in range(2)] == [None, None]
    assert len(seen.statements) == 1


# --- D13 -------------------------------------------------------------------------------------------


def test_D13_a_store_in_memory_keeps_its_bound(sqlite_forum: Engine) -> None:
    """The oldest answers make room: what is asked again and again is found, and what is not is not."""
    maker = sessionmaker(sqlite_forum)
    cache = QueryCache("memory://?max_bytes=200kb").attach(maker)
    body = literal("x" * 4000).label("body")
    with maker() as db:
        for number in range(200):
            for wanted in (0, number):
                db.execute(
                    select(Post.id, body).where(Post.id > wanted - 200), execution_options=CACHED
                ).all()
        assert cache.stats().hits >= 199
        with cache.recording() as events:
            db.execute(select(Post.id, body).where(Post.id > 1 - 200), execution_options=CACHED).all()
        assert events[0].outcome == "miss"
