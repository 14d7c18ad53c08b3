"""Values of every type, as columns, parameters and aggregates."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    and_,
    any_,
    extract,
    func,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import (
    Session,
)

from tests.read_path.kinds.registry import Options, kind, only, rows_of, scalars_of
from tests.read_path.models import (
    PgSample,
    Post,
    Role,
    Sample,
    User,
)


@kind
def values_of_every_type(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Sample).order_by(Sample.id), options)


@kind
def columns_of_every_type(db: Session, options: Options) -> Any:
    return rows_of(db, select(*Sample.__table__.c).order_by(Sample.id), options)


@kind
def parameters_of_every_type(db: Session, options: Options) -> Any:
    wanted = [
        Sample.big == 2**62 + 1,
        Sample.exact == Decimal("12345678901234.567891"),
        Sample.inexact == 1.25,
        Sample.double >= 0.1,
        Sample.flag == True,  # noqa: E712
        Sample.word == "naïve ☃ 'quoted' \\ %s",
        Sample.day == dt.date(2024, 2, 29),
        Sample.clock == dt.time(23, 59, 58),
        Sample.moment == dt.datetime(2024, 2, 29, 12, 30, 15),
        Sample.zoned == dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=dt.timezone.utc),
        Sample.span == dt.timedelta(days=3, seconds=7),
        Sample.role == Role.EDITOR,
        Sample.plain_enum == "two",
        Sample.key == uuid.UUID(int=12345678901234567890),
        Sample.key_text == str(uuid.UUID(int=2**100)),
        Sample.blob == bytes(range(256)),
        Sample.price == Decimal("19.99"),
        Sample.price.in_([Decimal("19.99"), Decimal("1.00")]),
        and_(
            Sample.role.in_([Role.EDITOR, Role.AUTHOR]),
            Sample.day.between(dt.date(2000, 1, 1), dt.date(2030, 1, 1)),
        ),
    ]
    return [rows_of(db, select(Sample.id).where(each).order_by(Sample.id), options) for each in wanted]


@kind
def aggregates_of_types(db: Session, options: Options) -> Any:
    statement = select(
        func.sum(Sample.exact),
        func.avg(Sample.exact),
        func.max(Sample.moment),
        func.min(Sample.day),
        func.sum(Sample.price),
        extract("year", func.max(Sample.day)),
        func.max(Sample.double),
        func.count(Sample.key),
    )
    return rows_of(db, statement, options)


@kind
def json_paths(db: Session, options: Options) -> Any:
    theme = User.settings["theme"].as_string()
    return rows_of(db, select(User.id, theme, User.settings["sizes"]).where(theme == "dark"), options)


@only("postgresql")
@kind
def postgresql_types(db: Session, options: Options) -> Any:
    entities = scalars_of(db, select(PgSample).order_by(PgSample.id), options)
    return entities, rows_of(db, select(*PgSample.__table__.c).order_by(PgSample.id), options)


@only("postgresql")
@kind
def postgresql_parameters(db: Session, options: Options) -> Any:
    wanted = [
        PgSample.numbers == [1, 2, 3],
        PgSample.numbers.contains([2]),
        literal(3) == any_(PgSample.numbers),
        PgSample.document.contains({"k": [1]}),
        PgSample.document["k"][0].as_integer() == 1,
        PgSample.address == "10.0.0.1",
        PgSample.span > dt.timedelta(days=39),
        PgSample.numbers_range.contains(3),
        PgSample.numbers_range == postgresql.Range(1, 5),
        PgSample.roles.contains([Role.AUTHOR]),
        PgSample.ident == uuid.UUID(int=7),
        PgSample.unbounded.in_([Decimal("1.1"), Decimal("2")]),
    ]
    return [rows_of(db, select(PgSample.id).where(each).order_by(PgSample.id), options) for each in wanted]


@only("postgresql")
@kind
def postgresql_aggregates(db: Session, options: Options) -> Any:
    statement = select(
        func.array_agg(postgresql.aggregate_order_by(Post.title, Post.id)),
        func.json_agg(postgresql.aggregate_order_by(Post.score, Post.id)),
        func.max(PgSample.span),
        func.sum(PgSample.unbounded).filter(PgSample.id == 1),
    ).join(PgSample, PgSample.id == Post.id)
    return rows_of(db, statement, options)
