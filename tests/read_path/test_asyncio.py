"""Sessions under asyncio: the cache leaves what they ask to the database, and notices what they write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache

CACHED = {"cache_key": True, "cache_tables": ["pamphlet"]}


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "pamphlet"

    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]


async def by_core(session: AsyncSession) -> Any:
    return (await session.execute(select(Book.price), execution_options=CACHED)).scalars().all()


async def by_text(session: AsyncSession) -> Any:
    return (
        (await session.execute(text("SELECT price FROM pamphlet"), execution_options=CACHED)).scalars().all()
    )


async def by_entity(session: AsyncSession) -> Any:
    return [book.price for book in await session.scalars(select(Book), execution_options=CACHED)]


async def by_get(session: AsyncSession) -> Any:
    return [(await session.get_one(Book, 1, execution_options=CACHED)).price]


async def by_stream(session: AsyncSession) -> Any:
    return [
        price async for price in await session.stream_scalars(select(Book.price), execution_options=CACHED)
    ]


async def in_sync_code(session: AsyncSession) -> Any:
    return await session.run_sync(
        lambda sync: sync.scalars(select(Book.price), execution_options=CACHED).all()
    )


@pytest.mark.parametrize("read", [by_core, by_text, by_entity, by_get, by_stream, in_sync_code])
def test_a_statement_under_asyncio_is_left_to_the_database(
    tmp_path: Path, read: Callable[[AsyncSession], Awaitable[Any]]
) -> None:
    class TaskSession(Session):
        pass

    engine = create_engine(f"sqlite:///{tmp_path}/x.db")
    Base.metadata.create_all(engine)
    cache = QueryCache("memory://", lease=0.01).attach(TaskSession)
    factory = sessionmaker(engine)
    cache.attach(factory)

    def ask() -> Any:
        with factory() as session:
            return session.scalars(select(Book.price), execution_options=CACHED).all()

    async def work() -> None:
        asynchronous = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/x.db")
        for price in range(3):
            async with AsyncSession(asynchronous, sync_session_class=TaskSession) as session:
                write = update(Book).values(price=price) if price else insert(Book).values(id=1, price=0)
                await session.execute(write)
                await session.commit()
            assert ask() == ask() == [price]  # in a Session that is answered from the cache
            for _ in range(2):
                async with AsyncSession(asynchronous, sync_session_class=TaskSession) as session:
                    with cache.recording() as events:
                        assert await read(session) == [price]
                assert {(event.outcome, event.reason) for event in events} <= {
                    ("bypass", "asyncio"),
                    ("bypass", "stream_results"),
                }
                assert events
        await asynchronous.dispose()

    asyncio.run(work())
    assert cache.stats().hits
    engine.dispose()
