"""Selects of entities and columns, from whatever can stand in FROM."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    String,
    bindparam,
    case,
    cast,
    column,
    exists,
    func,
    intersect,
    lambda_stmt,
    lateral,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    union,
    union_all,
    values,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import (
    Bundle,
    Session,
    aliased,
    joinedload,
    selectinload,
)

from tests.read_path.kinds.registry import Options, kind, only, rows_of, scalars_of
from tests.read_path.models import (
    Employee,
    Node,
    Post,
    Sample,
    Tag,
    Team,
    User,
    post_tag,
)

# --- Entities, columns, mixtures ------------------------------------------------------------------


@kind
def entities(db: Session, options: Options) -> Any:
    return scalars_of(db, select(User).order_by(User.id), options)


@kind
def filtered_ordered_and_limited(db: Session, options: Options) -> Any:
    mine = select(Post).where(Post.score > 0, or_(Post.title.like("%r%"), Post.score.in_([5, 6])))
    return scalars_of(db, mine.order_by(Post.score.desc(), Post.id).limit(2).offset(1), options)


@kind
def nothing_found(db: Session, options: Options) -> Any:
    return scalars_of(db, select(User).where(User.id < 0), options)


@kind
def in_nothing(db: Session, options: Options) -> Any:
    return scalars_of(db, select(User).where(User.id.in_([])), options)


@kind
def columns(db: Session, options: Options) -> Any:
    return rows_of(db, select(User.id, User.name, User.role, User.settings).order_by(User.id), options)


@kind
def mixedrows_of(db: Session, options: Options) -> Any:
    statement = select(User, Post.title, Post).join(User.posts).order_by(Post.id)
    return rows_of(db, statement, options)


@kind
def outer_joined_entities(db: Session, options: Options) -> Any:
    statement = select(Team, User).outerjoin(Team.users).order_by(Team.id, User.id)
    return rows_of(db, statement, options)


@kind
def labels_and_duplicates(db: Session, options: Options) -> Any:
    twice = select(User.id, Post.id, User.name.label("who"), User.name, Post.author_id).join(User.posts)
    return rows_of(db, twice.order_by(Post.id), options)


@kind
def column_addressedrows_of(db: Session, options: Options) -> Any:
    rows = db.execute(
        select(User, Post.id, User.id).join(User.posts).order_by(Post.id), execution_options=options
    )
    return [(row._mapping[User], row._mapping[Post.id], row._mapping[User.id], row[0]) for row in rows]


@kind
def bundles(db: Session, options: Options) -> Any:
    inner = Bundle("inner", User.id, User.role)
    single = Bundle("single", Post.id, Post.title, single_entity=True)
    statement = select(Bundle("outer", User.name, inner), Post.score).join(User.posts).order_by(Post.id)
    return rows_of(db, statement, options), scalars_of(db, select(single).order_by(Post.id), options)


@kind
def expressions(db: Session, options: Options) -> Any:
    statement = select(
        literal(1),
        literal("ü"),
        literal(Decimal("1.50")),
        literal_column("2"),
        null(),
        case((User.age > 30, "old"), else_="young").label("group"),
        cast(User.age, String(10)),
        type_coerce(User.age, BigInteger).label("same_age"),
        func.coalesce(User.age, 0) + 1,
        exists().where(Post.author_id == User.id),
        select(func.count(Post.id)).where(Post.author_id == User.id).scalar_subquery().label("posts"),
    )
    return rows_of(db, statement.order_by(User.id), options)


@kind
def aggregates(db: Session, options: Options) -> Any:
    grouped = (
        select(Post.author_id, func.count(), func.sum(Post.score), func.avg(Post.score), func.max(Post.title))
        .group_by(Post.author_id)
        .having(func.count() > 0)
        .order_by(Post.author_id)
    )
    total = db.scalar(select(func.count()).select_from(User), execution_options=options)
    return rows_of(db, grouped, options), total


@kind
def window_functions(db: Session, options: Options) -> Any:
    number = func.row_number().over(partition_by=Post.author_id, order_by=Post.id.desc())
    return rows_of(db, select(Post.id, number).order_by(Post.id), options)


@kind
def distinctrows_of(db: Session, options: Options) -> Any:
    return rows_of(db, select(User.age).distinct().order_by(User.age), options)


# --- Aliases, CTEs, unions, subqueries ------------------------------------------------------------


@kind
def aliases(db: Session, options: Options) -> Any:
    older, younger = aliased(User), aliased(User, name="younger")
    statement = select(older, younger).join(younger, older.age > younger.age).order_by(older.id, younger.id)
    return rows_of(db, statement, options)


@kind
def alias_of_a_subquery(db: Session, options: Options) -> Any:
    best = aliased(Post, select(Post).where(Post.score > 0).order_by(Post.id).limit(3).subquery())
    return scalars_of(db, select(best).options(selectinload(best.comments)).order_by(best.id), options)


@kind
def cte(db: Session, options: Options) -> Any:
    busy = select(Post.author_id, func.count().label("n")).group_by(Post.author_id).cte("busy")
    return rows_of(
        db, select(User, busy.c.n).join(busy, busy.c.author_id == User.id).order_by(User.id), options
    )


@kind
def recursive_cte(db: Session, options: Options) -> Any:
    tree = (
        select(Node.id, literal(0).label("depth")).where(Node.parent_id.is_(None)).cte("tree", recursive=True)
    )
    tree = tree.union_all(select(Node.id, tree.c.depth + 1).join(tree, Node.parent_id == tree.c.id))
    return rows_of(db, select(Node, tree.c.depth).join(tree, tree.c.id == Node.id).order_by(Node.id), options)


@kind
def unions_of_columns(db: Session, options: Options) -> Any:
    both = union(select(User.name), select(Team.name)).order_by("name")
    every = union_all(select(User.id, User.name), select(Tag.id, Tag.name)).order_by("name", "id")
    common = intersect(select(User.id), select(Post.author_id)).order_by("id")
    return rows_of(db, both, options), rows_of(db, every, options), rows_of(db, common, options)


@kind
def union_from_statement(db: Session, options: Options) -> Any:
    parts = union(select(Tag).where(Tag.id > 1), select(Tag).where(Tag.name == "sql")).order_by("id")
    return scalars_of(db, select(Tag).from_statement(parts), options)


@kind
def union_aliased(db: Session, options: Options) -> Any:
    parts = union_all(select(User.id, User.name), select(User.id, User.name).where(User.id == 1)).subquery()
    either = aliased(User, parts)
    return rows_of(db, select(either.id, either.name).order_by(either.id), options)


@kind
def from_text(db: Session, options: Options) -> Any:
    statement = text("SELECT * FROM user_account WHERE id >= :least ORDER BY id").bindparams(least=2)
    return scalars_of(db, select(User).from_statement(statement).options(selectinload(User.posts)), options)


@kind
def from_text_with_columns(db: Session, options: Options) -> Any:
    statement = text("SELECT id, name FROM user_account ORDER BY id").columns(User.id, User.name)
    return scalars_of(db, select(User).from_statement(statement), options)


@kind
def from_core_statement(db: Session, options: Options) -> Any:
    table = Post.__table__
    statement = select(table).where(table.c.score > 1).order_by(table.c.id)
    return scalars_of(db, select(Post).from_statement(statement), options)


@kind
def text_with_columns(db: Session, options: Options) -> Any:
    statement = text("SELECT role, id, street FROM user_account WHERE id < :most ORDER BY id")
    typed = statement.columns(User.role, User.id, column("street", String()))
    return rows_of(db, typed, options, {"most": 4})


@kind
def text_with_columns_as_subquery(db: Session, options: Options) -> Any:
    found = text("SELECT id, score FROM post").columns(Post.id, Post.score).subquery("found")
    return rows_of(
        db, select(Post, found.c.score).join(found, found.c.id == Post.id).order_by(Post.id), options
    )


@kind
def lambda_statement(db: Session, options: Options) -> Any:
    least = 2
    statement = lambda_stmt(lambda: select(User).where(User.id >= least))
    statement += lambda each: each.order_by(User.id)
    return scalars_of(db, statement, options)


@kind
def parameters_given_apart(db: Session, options: Options) -> Any:
    statement = select(User.name).where(
        User.id.in_(bindparam("ids", expanding=True)), User.age > bindparam("age")
    )
    first = rows_of(db, statement, options, {"ids": [1, 2], "age": 0})
    return first, rows_of(db, statement, options, {"ids": [4], "age": 24})


@kind
def parameters_of_the_statement(db: Session, options: Options) -> Any:
    statement = select(User.name).where(User.id == bindparam("id"))
    return [rows_of(db, statement.params(id=number), options) for number in (1, 2)]


@kind
def core_select(db: Session, options: Options) -> Any:
    table = User.__table__
    statement = select(table).where(tuple_(table.c.id, table.c.name) != tuple_(2, "bob")).order_by(table.c.id)
    return rows_of(db, statement, options)


@kind
def core_join(db: Session, options: Options) -> Any:
    post, tag = Post.__table__, Tag.__table__
    joined = post.join(post_tag, post_tag.c.post_id == post.c.id).join(tag, tag.c.id == post_tag.c.tag_id)
    return rows_of(
        db, select(post.c.title, tag.c.name).select_from(joined).order_by(post.c.id, tag.c.id), options
    )


@kind
def core_types(db: Session, options: Options) -> Any:
    return rows_of(db, select(Sample.__table__).order_by(Sample.__table__.c.id), options)


@only("postgresql")
@kind
def values_list(db: Session, options: Options) -> Any:
    given = values(column("id", Integer), column("weight", Integer), name="given").data([(1, 10), (2, 20)])
    return rows_of(
        db, select(User.name, given.c.weight).join(given, given.c.id == User.id).order_by("name"), options
    )


@only("postgresql")
@kind
def distinct_on(db: Session, options: Options) -> Any:
    first = select(Post).order_by(Post.author_id, Post.id.desc())
    # 2.0 knows the one way only, 2.1 deprecates it
    if hasattr(postgresql, "distinct_on"):
        first = first.ext(postgresql.distinct_on(Post.author_id))
    else:
        first = first.distinct(Post.author_id)
    return scalars_of(db, first, options)


@only("postgresql")
@kind
def lateral_join(db: Session, options: Options) -> Any:
    latest = lateral(select(Post).where(Post.author_id == User.id).order_by(Post.id.desc()).limit(1))
    return rows_of(db, select(User, aliased(Post, latest)).join(latest, true()).order_by(User.id), options)


# --- Session.get, Session.query -------------------------------------------------------------------


@kind
def session_get(db: Session, options: Options) -> Any:
    return [
        db.get(User, number, execution_options=options, options=[selectinload(User.posts)])
        for number in (1, 2, 2, 99)
    ]


@kind
def session_get_subclass(db: Session, options: Options) -> Any:
    return [db.get(Employee, number, execution_options=options) for number in (1, 2, 3)]


@kind
def query_entities(db: Session, options: Options) -> Any:
    query = db.query(User).execution_options(**options)
    return query.filter_by(age=25).order_by(User.id).all(), query.filter(User.id == 1).one()


@kind
def query_columns(db: Session, options: Options) -> Any:
    query = db.query(User.id, User.name).execution_options(**options).order_by(User.id)
    return query.all(), query.first(), query[1:3], query.with_entities(User.name).all()


@kind
def queryscalars_of(db: Session, options: Options) -> Any:
    query = db.query(User).execution_options(**options)
    return query.count(), query.with_entities(func.max(User.age)).scalar(), query.filter(User.id > 9).first()


@kind
def query_eager(db: Session, options: Options) -> Any:
    query = (
        db.query(User)
        .execution_options(**options)
        .options(joinedload(User.posts), selectinload(User.comments))
    )
    return query.order_by(User.id).all(), query.order_by(User.id.desc()).limit(2).all()


@kind
def query_of_two_entities(db: Session, options: Options) -> Any:
    query = (
        db.query(Team, Post)
        .execution_options(**options)
        .join(User, User.team_id == Team.id)
        .join(Post)
        .order_by(Post.id)
    )
    return query.all(), query.distinct().all()


@kind
def query_from_statement(db: Session, options: Options) -> Any:
    statement = text("SELECT * FROM post ORDER BY id")
    return db.query(Post).execution_options(**options).from_statement(statement).all()
