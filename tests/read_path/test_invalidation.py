"""Invalidation by hand: by key, tag, region and everything, in every process, also of answers in the making."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.orm import Session, selectinload, sessionmaker

from querycache import QueryCache
from tests.read_path.models import Post, Tag, User
from tests.read_path.process import Process

Invalidate = Callable[[QueryCache], None]


@dataclass
class Forum:
    """A forum whose rows change without a word to the cache, so that only `invalidate` can make answers new."""

    engine: Engine
    behind: Engine
    store_url: str
    cache: QueryCache
    maker: sessionmaker[Session]

    def rename(self, name: str) -> None:
        with self.behind.begin() as connection:
            connection.execute(update(Tag).where(Tag.id == 1).values(name=name))
            connection.execute(update(Post).where(Post.id == 1).values(title=name))

    def name(self, **options: Any) -> str | None:
        with self.maker() as db:
            return db.scalar(select(Tag.name).where(Tag.id == 1), execution_options=options)

    def outcome(self, **options: Any) -> str:
        """What the cache says of the statement of `name`: hit, miss or stale."""
        with self.cache.recording() as events:
            self.name(**options)
        return events[0].outcome


def regions(store_url: str) -> dict[str, str]:
    """Two regions on one store, and one on a store of its own."""
    return {"default": store_url, "beside": store_url, "other": "memory://?max_bytes=1mb"}


@pytest.fixture
def forum(own_forum: Engine, store_url: str) -> Iterator[Forum]:
    with own_forum.begin() as connection:
        # readers do not block writers
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    behind = create_engine(own_forum.url)
    maker = sessionmaker(own_forum)
    cache = QueryCache(regions(store_url)).attach(maker)
    yield Forum(own_forum, behind, store_url, cache, maker)
    behind.dispose()


ANSWERS: dict[str, dict[str, Any]] = {
    "plain": {"cache_key": True},
    "key a": {"cache_key": "a"},
    "key b": {"cache_key": "b"},
    "tag x": {"cache_key": True, "cache_tags": ["x"]},
    "tags x, y": {"cache_key": True, "cache_tags": ["x", "y"]},
    "key a, tag y": {"cache_key": "a", "cache_tags": ["y"]},
    "elsewhere": {"cache_key": True, "cache_region": "other"},
    "elsewhere, key a, tag x": {"cache_key": "a", "cache_region": "other", "cache_tags": ["x"]},
}

CALLS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a key": ({"key": "a"}, {"key a", "key a, tag y", "elsewhere, key a, tag x"}),
    "keys": ({"keys": ["a", "b"]}, {"key a", "key b", "key a, tag y", "elsewhere, key a, tag x"}),
    "a key of nobody": ({"key": "x"}, set()),
    "a tag": ({"tags": ["x"]}, {"tag x", "tags x, y", "elsewhere, key a, tag x"}),
    "tags": ({"tags": ("x", "y")}, {"tag x", "tags x, y", "key a, tag y", "elsewhere, key a, tag x"}),
    "a key and a tag": ({"key": "b", "tags": ["y"]}, {"key b", "tags x, y", "key a, tag y"}),
    "a region": ({"region": "other"}, {"elsewhere", "elsewhere, key a, tag x"}),
    "a key in a region": ({"region": "other", "key": "a"}, {"elsewhere, key a, tag x"}),
    "a tag in a region": ({"region": "default", "tags": ["x"]}, {"tag x", "tags x, y"}),
    "everything": ({"everything": True}, set(ANSWERS)),
    "everything in a region": (
        {"everything": True, "region": "default"},
        set(ANSWERS) - {"elsewhere", "elsewhere, key a, tag x"},
    ),
}


@pytest.mark.parametrize(("call", "invalid"), CALLS.values(), ids=CALLS)
def test_what_is_named_is_invalid_and_nothing_else(
    call: dict[str, Any], invalid: set[str], forum: Forum
) -> None:
    for name, options in ANSWERS.items():
        # a statement of its own for each, so that answers of one key are still two entries
        statement = select(Tag.name.label(name)).where(Tag.id == 1)
        with forum.maker() as db:
            assert db.scalar(statement, execution_options=options) == "sql"
    forum.rename("new")
    forum.cache.invalidate(**call)
    found = {}
    for name, options in ANSWERS.items():
        statement = select(Tag.name.label(name)).where(Tag.id == 1)
        with forum.maker() as db:
            found[name] = db.scalar(statement, execution_options=options)
    assert {name for name, value in found.items() if value == "new"} == invalid
    assert {name for name, value in found.items() if value == "sql"} == set(ANSWERS) - invalid


def test_a_key_reaches_every_statement_and_parameter(forum: Forum) -> None:
    statements = [
        *(select(Tag.name).where(Tag.id == number) for number in (1, 2, 3)),
        select(User).options(selectinload(User.posts)),
        select(Post.title),
    ]

    def outcomes() -> list[str]:
        with forum.maker() as db, forum.cache.recording() as events:
            for statement in statements:
                db.execute(statement, execution_options={"cache_key": "front page"}).all()
            return [event.outcome for event in events if event.outcome != "fill"]

    assert outcomes() == ["miss"] * 5
    assert outcomes() == ["hit"] * 5
    forum.cache.invalidate(key="front page")
    assert outcomes() == ["stale"] * 5
    assert outcomes() == ["hit"] * 5


@pytest.mark.parametrize(
    "name", ["with spaces", "ключ ☃", "a:b", "*", "x" * 300, "default", "table:tag", "\x00"]
)
def test_any_text_is_a_key_and_a_tag(name: str, forum: Forum) -> None:
    by_key: dict[str, Any] = {"cache_key": name}
    by_tag: dict[str, Any] = {"cache_key": True, "cache_tags": [name]}
    for options, call in ((by_key, {"key": name}), (by_tag, {"tags": [name]})):
        assert forum.outcome(**options) == "miss"
        assert forum.outcome(**options) == "hit"
        forum.cache.invalidate(**({"tags": [name]} if call == {"key": name} else {"key": name}))  # type: ignore[arg-type]
        assert forum.outcome(**options) == "hit"
        forum.cache.invalidate(**call)  # type: ignore[arg-type]
        assert forum.outcome(**options) == "stale"


def test_regions_on_one_store_keep_their_answers_apart(forum: Forum) -> None:
    here, beside = {"cache_key": "a"}, {"cache_key": "a", "cache_region": "beside"}
    assert [forum.outcome(**options) for options in (here, beside, here, beside)] == [
        "miss",
        "miss",
        "hit",
        "hit",
    ]
    forum.cache.invalidate(region="beside")
    assert [forum.outcome(**options) for options in (here, beside)] == ["hit", "stale"]


@pytest.mark.parametrize(
    ("more", "call"),
    [({"cache_tags": ["x"]}, {"tags": ["x"]}), ({"cache_tables": ["v"]}, {"tables": ["v"]})],
)
def test_an_answer_stored_without_a_name_is_none_for_who_gives_it(
    more: dict[str, Any], call: dict[str, Any], forum: Forum
) -> None:
    """Otherwise the invalidation of the name would not reach it."""
    forum.name(cache_key=True)
    forum.name(cache_key=True, **more)
    forum.rename("new")
    forum.cache.invalidate(**call)
    assert forum.name(cache_key=True, **more) == "new"


def test_the_order_of_tags_is_no_matter(forum: Forum) -> None:
    assert forum.outcome(cache_key=True, cache_tags=["x", "y"]) == "miss"
    assert forum.outcome(cache_key=True, cache_tags=("y", "x", "y")) == "hit"
    assert forum.outcome(cache_key=True, cache_tags={"x", "y"}) == "hit"


def test_other_namespaces_are_left_alone(forum: Forum) -> None:
    forum.name(cache_key="a")
    QueryCache(forum.store_url, namespace="other").invalidate(everything=True)
    assert forum.outcome(cache_key="a") == "hit"


# --- Other processes -------------------------------------------------------------------------------


def invalidate_elsewhere(store_url: str, call: dict[str, Any]) -> None:
    """A script that invalidates, and knows neither database nor statements."""
    QueryCache(regions(store_url)).invalidate(**call)


def name_elsewhere(url: str, store_url: str) -> tuple[str | None, list[str]]:
    engine = create_engine(url)
    maker = sessionmaker(engine)
    cache = QueryCache(regions(store_url)).attach(maker)
    with cache.recording() as events, maker() as db:
        found = db.scalar(select(Tag.name).where(Tag.id == 1), execution_options={"cache_key": "a"})
    engine.dispose()
    return found, [event.outcome for event in events]


SHARED = [
    pytest.param("redis", marks=pytest.mark.server("redis")),
    pytest.param("memcached", marks=pytest.mark.server("memcached")),
]


@pytest.mark.parametrize("store_url", SHARED, indirect=True)
@pytest.mark.parametrize("call", [{"key": "a"}, {"tags": ["x"]}, {"region": "default"}, {"everything": True}])
def test_D2_another_process_invalidates(call: dict[str, Any], forum: Forum, process: Process) -> None:
    options = {"cache_key": "a", "cache_tags": ["x"]}
    forum.name(**options)
    forum.rename("new")
    assert forum.name(**options) == "sql"
    process.call(invalidate_elsewhere, forum.store_url, call)
    assert forum.name(**options) == "new"


@pytest.mark.parametrize("store_url", SHARED, indirect=True)
def test_D2_another_process_and_one_that_starts_later_see_it(forum: Forum, process: Process) -> None:
    url = forum.engine.url.render_as_string()
    forum.name(cache_key="a")
    assert process.call(name_elsewhere, url, forum.store_url) == ("sql", ["hit"])
    forum.rename("new")
    forum.cache.invalidate(key="a")
    assert process.call(name_elsewhere, url, forum.store_url) == ("new", ["stale", "fill"])
    assert name_elsewhere(url, forum.store_url) == ("new", ["hit"])


# --- Answers in the making -------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{"key": "a"}, {"tags": ["x"]}, {"region": "default"}, {"everything": True}])
@pytest.mark.parametrize(
    "moment", ["before_cursor_execute", "after_cursor_execute", "before the second", "after the second"]
)
@pytest.mark.parametrize("outcome", ["miss", "stale", "refresh"])
def test_D1_an_answer_in_the_making_is_not_served_later(
    call: dict[str, Any], moment: str, outcome: str, forum: Forum
) -> None:
    """The database is asked, then changed, then the change is made known, then the old answer is stored."""
    statement = select(User).options(selectinload(User.posts)).order_by(User.id)
    options: dict[str, Any] = {"cache_key": "a", "cache_tags": ["x"]}
    number = 2 if "second" in moment else 1
    identifier = "before_cursor_execute" if "before" in moment else "after_cursor_execute"
    seen = []

    def interfere(*event: Any) -> None:
        seen.append(event[2])
        if len(seen) == number:
            forum.rename("new")
            forum.cache.invalidate(**call)

    def title(**more: Any) -> str:
        with forum.maker() as db:
            return db.scalars(statement, execution_options={**options, **more}).all()[0].posts[0].title

    if outcome != "miss":
        title()
    if outcome == "stale":
        forum.cache.invalidate(key="a")
    event.listen(forum.engine, identifier, interfere)
    title(cache_mode="refresh" if outcome == "refresh" else "use")
    event.remove(forum.engine, identifier, interfere)
    assert len(seen) == 2
    assert title() == "new"
    assert title() == "new"
    assert forum.cache.stats().hits == 1


@pytest.mark.parametrize("store_url", SHARED, indirect=True)
def test_D1_an_answer_in_the_making_that_another_process_makes_invalid(
    forum: Forum, process: Process
) -> None:
    def interfere(*event: Any) -> None:
        forum.rename("new")
        process.call(invalidate_elsewhere, forum.store_url, {"key": "a"})

    event.listen(forum.engine, "after_cursor_execute", interfere, once=True)
    forum.name(cache_key="a")
    assert forum.name(cache_key="a") == "new"
    assert name_elsewhere(forum.engine.url.render_as_string(), forum.store_url) == ("new", ["hit"])


def test_D1_the_answer_that_was_asked_for_later_is_kept(forum: Forum) -> None:
    """Of two that are made at a time, the one that began after the invalidation wins, in whatever order."""

    def interfere(*arguments: Any) -> None:
        forum.rename("new")
        forum.cache.invalidate(key="a")
        assert forum.name(cache_key="a") == "new"
        assert forum.name(cache_key="a") == "new"

    event.listen(forum.engine, "after_cursor_execute", interfere, once=True)
    forum.name(cache_key="a")
    assert forum.name(cache_key="a") == "new"


def test_what_is_promised_of_a_store_that_no_other_process_sees(own_forum: Engine, store_url: str) -> None:
    cache = QueryCache({"default": store_url, "own": "memory://"})
    with Session(own_forum) as db:
        cache.attach(db)
        promised = [
            cache.explain(db, select(Tag).execution_options(cache_key=True, cache_region=region)).promise
            for region in ("default", "own")
        ]
    own = "strict, for what this process writes"
    assert promised == [own if store_url.startswith("memory") else "strict", own]


def test_a_new_namespace_where_somebody_has_deleted_keys(own_forum: Engine, redis_store_url: str) -> None:
    """Nobody can tell that they were of another program. Events and explain tell why nothing is stored."""
    client = redis.Redis.from_url(redis_store_url)
    statement = select(Tag).execution_options(cache_key=True)

    def ask(namespace: str) -> list[str]:
        cache = QueryCache(redis_store_url, namespace=namespace, lease=60.0)
        with Session(own_forum) as db:
            cache.attach(db)
            with cache.recording() as events:
                db.scalars(statement).all()
            return [events[-1].reason, cache.explain(db, statement).reason]

    client.set("of somebody else", 1)
    client.delete("of somebody else")
    assert ask(f"new-{uuid.uuid4()}") == ["quarantine", "quarantine"]


def test_a_store_that_keeps_nothing_says_so(own_forum: Engine) -> None:
    cache = QueryCache("null://")
    statement = select(Tag).execution_options(cache_key=True)
    with Session(own_forum) as db:
        cache.attach(db)
        with cache.recording() as events:
            db.scalars(statement).all()
        assert cache.explain(db, statement).reason == events[-1].reason == "not kept"


def test_what_is_promised_where_tags_are_marked_after_commit(own_forum: Engine, store_url: str) -> None:
    cache = QueryCache(store_url, consistency="commit")
    with Session(own_forum) as db:
        cache.attach(db)
        promised = cache.explain(db, select(Tag).execution_options(cache_key=True)).promise
    assert promised.startswith("after commit") and "stale answers are possible" in promised
