"""The rows of the forum and of the other tables: the same in every run."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any

from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from tests.read_path.models import (
    POSTGRESQL_ONLY,
    Address,
    Base,
    Car,
    Circle,
    Comment,
    Company,
    Counter,
    Employee,
    Engineer,
    Machine,
    Manager,
    Node,
    PgSample,
    Point,
    Post,
    Role,
    Sample,
    Shape,
    Square,
    Tag,
    Team,
    Truck,
    User,
    Vehicle,
)

__all__ = ["create_and_fill"]


def create_and_fill(engine: Engine) -> None:
    """Create every table that the database can have, and put rows in."""
    Base.metadata.create_all(engine)
    if engine.dialect.name == "postgresql":
        POSTGRESQL_ONLY.create_all(engine)
    with Session(engine) as db, db.begin():
        for row in _rows():
            db.add(row)
            # parents before children, in the order given
            db.flush()
        if engine.dialect.name == "postgresql":
            db.add_all(_postgresql_rows())


def _rows() -> list[Any]:
    utc = dt.timezone.utc
    rows: list[Any] = [Team(id=number, name=name) for number, name in enumerate(["red", "blüe", "empty"], 1)]
    users = [
        (1, "ann", 31, Role.AUTHOR, {"theme": "dark", "sizes": [1, 2.5, None]}, Address("Elm 1", "Rom")),
        (1, "bob", 25, Role.READER, None, Address(None, None)),
        (2, "çem", None, Role.EDITOR, {}, Address("Øst 2", None)),
        (None, "dan", 25, Role.READER, {"nested": {"a": [True, "x"]}}, Address("Elm 4", "Rom")),
    ]
    for number, (team, name, age, role, settings, address) in enumerate(users, 1):
        rows.append(
            User(
                id=number,
                team_id=team,
                name=name,
                age=age,
                role=role,
                settings=settings,
                address=address,
                email=f"{name}@example.org",
                bio=f"I am {name}",
                motto=None if number == 2 else "more",
            )
        )
    tags = [Tag(id=number, name=name) for number, name in enumerate(["sql", "orm", "unused"], 1)]
    rows += tags
    for number, (author, title, score, tag_numbers) in enumerate(
        [
            (1, "first", 5, [1, 2]),
            (1, "second", 3, []),
            (2, "third", 5, [1]),
            (3, "fourth", 0, [2]),
            (3, "naïve", -2, []),
        ],
        1,
    ):
        rows.append(
            Post(
                id=number,
                author_id=author,
                title=title,
                score=score,
                body=f"body of {title}",
                tags=[tags[each - 1] for each in tag_numbers],
            )
        )
    rows += [
        Comment(id=number, post_id=post, author_id=author, text=f"comment {number}")
        for number, (post, author) in enumerate([(1, 2), (1, 3), (1, 1), (2, 1), (3, None), (4, 2)], 1)
    ]
    rows += [Company(id=1, name="one"), Company(id=2, name="two")]
    rows += [
        Employee(id=1, name="eve", company_id=1),
        Engineer(id=2, name="fay", company_id=1, language="C"),
        Manager(id=3, name="gus", company_id=1, budget=Decimal("10.50")),
        Engineer(id=4, name="hal", company_id=2, language="Ada"),
        Machine(id=1, engineer_id=2, model="m1"),
        Machine(id=2, engineer_id=2, model="m2"),
        Machine(id=3, engineer_id=4, model="m3"),
        Vehicle(id=1, name="cart"),
        Car(id=2, name="mini", seats=4),
        Truck(id=3, name="big", load=9),
        Shape(id=1, name="blob"),
        Circle(id=2, name="disc", radius=3),
        Square(id=3, name="tile", side=2),
        Counter(id=1, value=10),
    ]
    rows += [
        Node(id=number, parent_id=parent, name=f"n{number}")
        for number, parent in [(1, None), (2, 1), (3, 1), (4, 2), (5, 4), (6, None)]
    ]
    rows += [Point(id=1, x=1.5, y=-2.0), Point(id=2, next_id=1), Point(id=3, x=0.1, next_id=2)]
    rows += [
        Sample(
            id=1,
            big=2**62 + 1,
            exact=Decimal("12345678901234.567891"),
            inexact=1.25,
            single=0.5,
            double=0.1,
            flag=True,
            word="naïve ☃ 'quoted' \\ %s",
            day=dt.date(2024, 2, 29),
            clock=dt.time(23, 59, 58),
            moment=dt.datetime(2024, 2, 29, 12, 30, 15),
            zoned=dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=utc),
            span=dt.timedelta(days=3, seconds=7),
            role=Role.EDITOR,
            plain_enum="two",
            document={"a": [1, 2.0, "ü", None, True], "b": {"c": {}}},
            key=uuid.UUID(int=12345678901234567890),
            key_text=str(uuid.UUID(int=2**100)),
            blob=bytes(range(256)),
            pickled={("a", 1): {1, 2}, "d": dt.date(2020, 1, 1)},
            price=Decimal("19.99"),
        ),
        Sample(id=2, document=None, pickled=None),
        Sample(
            id=3,
            big=-1,
            exact=Decimal("0.000000"),
            inexact=0.0,
            single=-0.0,
            double=1e300,
            flag=False,
            word="",
            day=dt.date(1970, 1, 1),
            clock=dt.time(0, 0),
            moment=dt.datetime(1970, 1, 1),
            zoned=dt.datetime(1999, 12, 31, 23, 0, tzinfo=utc),
            span=dt.timedelta(0),
            role=Role.READER,
            plain_enum="one",
            document=[],
            key=uuid.UUID(int=0),
            key_text=str(uuid.UUID(int=0)),
            blob=b"",
            pickled=[],
            price=Decimal("0.00"),
        ),
    ]
    return rows


def _postgresql_rows() -> list[Any]:
    utc = dt.timezone.utc
    start, end = dt.datetime(2024, 1, 1, tzinfo=utc), dt.datetime(2024, 1, 2, tzinfo=utc)
    return [
        PgSample(
            id=1,
            numbers=[1, 2, 3],
            grid=[[Decimal("1.50"), Decimal("2.00")], [Decimal("3.25"), Decimal("0.00")]],
            words=("a", "ü", 'q"'),
            roles=[Role.AUTHOR, Role.EDITOR],
            document={"k": [1, {"n": None}], "ü": 1.5},
            address=IPv4Address("10.0.0.1"),
            network="10.0.0.0/8",
            span=dt.timedelta(days=40, microseconds=5),
            numbers_range=Range(1, 5),
            days=Range(dt.date(2024, 1, 1), None),
            moments=[Range(start, end)],
            ident=uuid.UUID(int=7),
            bits="1010",
            unbounded=Decimal("1.10"),
        ),
        PgSample(
            id=2, document=None, numbers=[], grid=[], words=(), roles=[], numbers_range=Range(empty=True)
        ),
        PgSample(id=3, document="text", unbounded=Decimal("NaN"), numbers_range=Range(None, None)),
    ]
