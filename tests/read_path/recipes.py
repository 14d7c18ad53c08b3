"""Statements, rows and the life of a session, drawn by hypothesis as plain data that another process can cook.

A `Scenario` says what a session does before the statement (other statements, changes, expirations), which
statement it runs and how it consumes the result. `perform` does it, against the database or the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import Engine, func, inspect, select, union_all
from sqlalchemy.orm import (
    Mapper,
    Session,
    aliased,
    contains_eager,
    defer,
    immediateload,
    joinedload,
    lazyload,
    load_only,
    raiseload,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    undefer,
    with_loader_criteria,
    with_polymorphic,
)

from tests.read_path.models import (
    Base,
    Comment,
    Company,
    Employee,
    Engineer,
    Machine,
    Manager,
    Node,
    Post,
    Tag,
    Team,
    User,
)
from tests.read_path.observe import Observer, Traffic, outcome_of, traffic

__all__ = ["Recipe", "Rows", "Scenario", "perform", "put_rows", "recipes", "relatives", "rows", "scenarios"]

ENTITIES: dict[str, type[Base]] = {
    each.__name__: each
    for each in (Team, User, Post, Comment, Tag, Company, Employee, Engineer, Machine, Manager, Node)
}
LOADERS = {
    "joined": joinedload,
    "selectin": selectinload,
    "subquery": subqueryload,
    "immediate": immediateload,
    "lazy": lazyload,
    "raise": raiseload,
}
# Most of them bring further statements along: those are what an entry must hold.
OFTEN = ["selectin", "immediate", "subquery", "joined", "selectin", "immediate", "subquery", "lazy", "raise"]


def _mapper(name: str) -> Mapper[Any]:
    return inspect(ENTITIES[name])


def _relationships(name: str) -> dict[str, str]:
    """Names of the relationships of an entity, with the entity at their other end."""
    return {
        each.key: each.mapper.class_.__name__
        for each in _mapper(name).relationships
        if each.key != "post_stream"
    }


def _columns(name: str, kind: type | None = None) -> list[str]:
    """Names of the column attributes of an entity, of one Python type where it is given."""
    found = []
    for attribute in _mapper(name).column_attrs:
        column = attribute.columns[0]
        if column.table is None or (kind is not None and column.type.python_type is not kind):
            continue
        found.append(attribute.key)
    return sorted(found)


# --- Recipes of statements -------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """How a relationship is loaded, and those below it."""

    attribute: str
    loader: str
    below: tuple[Load, ...] = ()
    at_least: int | None = None
    columns: tuple[str, str] | None = None


@dataclass(frozen=True)
class Recipe:
    """A select. `path` leads from the entity over relationships to others, which are joined."""

    entity: str
    path: tuple[str, ...] = ()
    outer: bool = False
    alias: bool = False
    shape: str = "entity"
    where: tuple[tuple[int, str, str, Any], ...] = ()
    order: tuple[tuple[int, str, bool], ...] = ()
    limit: int | None = None
    offset: int | None = None
    distinct: bool = False
    loads: tuple[Load, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    criteria: tuple[str, int] | None = None
    contains: bool = False
    polymorphic: str | None = None
    wrap: str | None = None


def _entities_of(recipe: Recipe) -> list[str]:
    names = [recipe.entity]
    for step in recipe.path:
        names.append(_relationships(names[-1])[step])
    return names


def build(recipe: Recipe) -> Any:
    """The statement of a recipe."""
    names = _entities_of(recipe)
    entities: list[Any] = [ENTITIES[name] for name in names]
    if recipe.polymorphic == "with":
        entities[0] = with_polymorphic(Employee, [Engineer, Manager], flat=True, aliased=recipe.alias)
    elif recipe.alias:
        entities = [aliased(entity) for entity in entities]
    where = [_condition(entities[index], *rest) for index, *rest in recipe.where]
    order = [
        getattr(entities[index], key).desc() if falling else getattr(entities[index], key)
        for index, key, falling in recipe.order
    ]
    first, last = entities[0], entities[-1]
    if recipe.shape == "aggregate":
        key = getattr(first, "id")  # noqa: B009 - every entity has one
        statement = select(key, func.count(last.id), func.max(last.id)).group_by(key)
        order = [key]
    elif recipe.shape == "columns":
        statement = select(
            first.id, *(getattr(first, name) for name in _columns(names[0])[:3]), last.id.label("x")
        )
    elif recipe.shape == "mixed":
        statement = select(first.id, last, first)
    else:
        statement = select(first)
    for entity, other, step in zip(entities, entities[1:], recipe.path, strict=False):
        statement = statement.join(getattr(entity, step).of_type(other), isouter=recipe.outer)
    statement = statement.where(*where).order_by(*order)
    if recipe.distinct:
        statement = statement.distinct()
    statement = statement.limit(recipe.limit).offset(recipe.offset)
    if recipe.wrap is not None:
        statement, first = _wrapped(recipe, statement, first)
    if recipe.shape in ("entity", "mixed"):
        statement = statement.options(*_options(recipe, first, entities))
    return statement


def _condition(entity: Any, key: str, operator: str, value: Any) -> Any:
    attribute = getattr(entity, key)
    match operator:
        case "in":
            return attribute.in_(value)
        case "null":
            return attribute.is_(None)
        case ">":
            return attribute > value
        case _:
            return attribute == value


def _wrapped(recipe: Recipe, statement: Any, first: Any) -> tuple[Any, Any]:
    entity = ENTITIES[recipe.entity]
    match recipe.wrap:
        case "subquery":
            entity = aliased(entity, statement.subquery())
            return select(entity), entity
        case "cte":
            entity = aliased(entity, statement.cte("picked"))
            return select(entity), entity
        case "from_statement":
            return select(entity).from_statement(statement), entity
        case _:
            return select(entity).from_statement(union_all(statement.order_by(None), select(first))), entity


def _options(recipe: Recipe, first: Any, entities: Sequence[Any]) -> list[Any]:
    options = [_load(first, recipe.entity, load) for load in recipe.loads]
    options += [_column_option(first, key, how) for key, how in recipe.columns]
    if recipe.criteria is not None:
        name, least = recipe.criteria
        options.append(with_loader_criteria(ENTITIES[name], ENTITIES[name].id > least, include_aliases=True))  # type: ignore[attr-defined]
    if recipe.polymorphic == "selectin":
        options.append(selectin_polymorphic(Employee, [Engineer, Manager]))
    if recipe.contains:
        option = None
        for entity, other, step in zip(entities, entities[1:], recipe.path, strict=False):
            attribute = getattr(entity, step).of_type(other)
            option = contains_eager(attribute) if option is None else option.contains_eager(attribute)
        options.append(option)
    return options


def _load(entity: Any, name: str, load: Load) -> Any:
    attribute = getattr(entity, load.attribute)
    other = _relationships(name)[load.attribute]
    if load.at_least is not None:
        attribute = attribute.and_(ENTITIES[other].id > load.at_least)  # type: ignore[attr-defined]
    below = [_load(ENTITIES[other], other, each) for each in load.below]
    if load.columns is not None:
        below.append(_column_option(ENTITIES[other], *load.columns))
    return LOADERS[load.loader](attribute).options(*below)


def _column_option(entity: Any, key: str, how: str) -> Any:
    attribute = getattr(entity, key)
    match how:
        case "defer":
            return defer(attribute)
        case "raise":
            return defer(attribute, raiseload=True)
        case "only":
            return load_only(attribute)
        case _:
            return undefer(attribute)


@st.composite
def _loads(draw: st.DrawFn, name: str, depth: int = 3) -> tuple[Load, ...]:
    relationships = _relationships(name)
    if not depth or not relationships:
        return ()
    found = []
    least = 1 if depth == 3 and draw(st.integers(0, 3)) else 0
    chosen = st.lists(st.sampled_from(sorted(relationships)), unique=True, min_size=least, max_size=2)
    for attribute in draw(chosen):
        other = relationships[attribute]
        found.append(
            Load(
                attribute,
                draw(st.sampled_from(OFTEN)),
                draw(_loads(other, depth - 1)),
                None if draw(st.integers(0, 3)) else draw(st.integers(0, 3)),
                draw(st.none() | _column_options(other)),
            )
        )
    return tuple(found)


def _column_options(name: str) -> st.SearchStrategy[tuple[str, str]]:
    keys = [key for key in _columns(name) if key not in ("id", "kind")]
    return st.tuples(st.sampled_from(keys), st.sampled_from(["defer", "raise", "only", "undefer"]))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Selects that make sense, and a few that SQLAlchemy refuses."""
    entity = draw(st.sampled_from(["User", "Post", "Node", "Team", "Company", *sorted(ENTITIES)]))
    names, path = [entity], []
    while len(path) < 2 and _relationships(names[-1]) and draw(st.integers(0, 2)) == 0:
        path.append(draw(st.sampled_from(sorted(_relationships(names[-1])))))
        names.append(_relationships(names[-1])[path[-1]])
    shape = draw(st.sampled_from(["entity", "entity", "entity", "mixed", "columns", "aggregate"]))
    # a table may appear but once without an alias
    alias = draw(st.booleans()) or len({_mapper(name).base_mapper for name in names}) < len(names)
    polymorphic = draw(st.sampled_from([None, "with", "selectin"])) if entity == "Employee" else None
    if polymorphic == "with" and path:
        polymorphic = None
    wraps = ["subquery", "cte", "from_statement", "union"]
    plain = shape == "entity" and not path and polymorphic is None
    wrap = draw(st.none() | st.sampled_from(wraps)) if plain else None
    contains = bool(path) and shape == "entity" and draw(st.booleans())
    index = st.integers(0, len(names) - 1)
    limited = draw(st.integers(0, 3)) == 0
    return Recipe(
        entity,
        tuple(path),
        draw(st.booleans()),
        alias,
        shape,
        tuple(draw(_conditions(names, draw(index))) for _ in range(0 if draw(st.integers(0, 2)) else 1)),
        tuple(
            (at, draw(st.sampled_from(_columns(names[at], int))), draw(st.booleans()))
            for at in draw(st.lists(index, max_size=2))
        ),
        draw(st.sampled_from([2, 1, 3, 0])) if limited else None,
        draw(st.integers(0, 1)) if limited else None,
        # a column of documents cannot be compared, nor can one be ordered by that is not selected
        draw(st.booleans()) and shape == "columns",
        draw(_loads(entity)) if wrap != "union" else (),
        tuple(draw(st.lists(_column_options(entity), max_size=2, unique_by=lambda each: each[0]))),
        draw(st.tuples(st.sampled_from(sorted(ENTITIES)), st.integers(0, 2)))
        if not draw(st.integers(0, 4))
        else None,
        contains,
        polymorphic,
        wrap,
    )


@st.composite
def _conditions(draw: st.DrawFn, names: Sequence[str], index: int) -> tuple[int, str, str, Any]:
    key = draw(st.sampled_from(_columns(names[index], int)))
    operator = draw(st.sampled_from([">", "=", "in", "null"]))
    value = draw(st.lists(st.integers(0, 5), max_size=3) if operator == "in" else st.integers(0, 5))
    return index, key, operator, value


# --- Rows ------------------------------------------------------------------------------------------

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Rows of all tables, by table: few of each, with every foreign key in place."""
    number, word = st.integers(0, 3), st.text("ab ü'", max_size=3)

    def sizes(most: int) -> st.SearchStrategy[int]:
        # seldom empty: most joins would find nothing
        return st.sampled_from([*range(most, 0, -1)] * 3 + [0])

    def some(table: str, most: int, **columns: st.SearchStrategy[Any]) -> list[dict[str, Any]]:
        return [
            {"id": each, **{key: draw(strategy) for key, strategy in columns.items()}}
            for each in range(1, 1 + draw(sizes(most)))
        ]

    def one_of(found: Sequence[Mapping[str, Any]]) -> st.SearchStrategy[Any]:
        return st.sampled_from([each["id"] for each in found])

    def one_or_none(found: Sequence[Mapping[str, Any]]) -> st.SearchStrategy[Any]:
        return st.none() | one_of(found) if found else st.none()

    teams = some("team", 2, name=word)
    users = some(
        "user_account",
        4,
        team_id=one_or_none(teams),
        name=word,
        age=st.none() | number,
        role=st.sampled_from(["READER", "AUTHOR"]),
        email=word,
        settings=st.none() | st.dictionaries(word, number | word, max_size=1),
        street=st.none() | word,
        city=st.none() | word,
    )
    posts = some("post", 4, author_id=one_of(users), title=word, score=number, body=word) if users else []
    comments = (
        some("comment", 5, post_id=one_of(posts), author_id=one_or_none(users), text=word) if posts else []
    )
    tags = some("tag", 2, name=word)
    pairs = draw(st.lists(st.tuples(one_of(posts), one_of(tags)), unique=True)) if posts and tags else []
    companies = some("company", 2, name=word)
    kinds = st.sampled_from(["employee", "engineer", "manager"])
    employees = some("employee", 4, kind=kinds, name=word, company_id=one_of(companies)) if companies else []
    engineers = [
        {"id": each["id"], "language": draw(word)} for each in employees if each["kind"] == "engineer"
    ]
    managers = [{"id": each["id"], "budget": draw(number)} for each in employees if each["kind"] == "manager"]
    machines = some("machine", 3, engineer_id=one_of(engineers), model=word) if engineers else []
    nodes: list[dict[str, Any]] = []
    for each in range(1, 1 + draw(sizes(5))):
        nodes.append({"id": each, "parent_id": draw(one_or_none(nodes)), "name": draw(word)})
    return {
        "team": teams,
        "user_account": users,
        "post": posts,
        "comment": comments,
        "tag": tags,
        "post_tag": [{"post_id": post, "tag_id": tag} for post, tag in pairs],
        "company": companies,
        "employee": employees,
        "engineer": engineers,
        "manager": managers,
        "machine": machines,
        "node": nodes,
    }


def put_rows(engine: Engine, rows: Rows) -> None:
    """Make these the rows of the database."""
    with engine.begin() as connection:
        for name in rows:
            table = Base.metadata.tables[name]
            connection.execute(table.delete())
            if rows[name]:
                connection.execute(table.insert(), list(rows[name]))


# --- Scenarios -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What a session does: statements before, changes to what they gave, and the statement in question.

    `changes` are pairs of a number, which picks an object loaded before, and what to do with it: "expire",
    "change", "delete" or "expunge".
    """

    recipe: Recipe
    before: tuple[Recipe, ...] = ()
    changes: tuple[tuple[int, str], ...] = ()
    autoflush: bool = True
    unique: bool = True
    scalars: bool = False
    query: bool = False


scenarios = st.builds(
    Scenario,
    recipes(),
    st.lists(recipes(), max_size=1).map(tuple),
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["expire", "change", "delete", "expunge"])), max_size=2
    ).map(tuple),
    st.booleans(),
    st.integers(0, 3).map(bool),
    st.booleans(),
    st.integers(0, 3).map(lambda number: not number),
)


def relatives(recipe: Recipe) -> list[Recipe]:
    """Statements that are nearly the same: with other loaders, and with other values."""
    found = []
    if recipe.shape in ("entity", "mixed") and (recipe.loads or recipe.criteria):
        found.append(replace(recipe, loads=(), criteria=None))
    where = tuple(
        (index, key, how, [each + 1 for each in value] if isinstance(value, list) else value + 1)
        for index, key, how, value in recipe.where
    )
    if any(how != "null" and value for _, _, how, value in where):
        found.append(replace(recipe, where=where))
    return found


@dataclass
class Performance:
    """What came of a scenario, as plain data: answers, what lazy access gave, and traffic of the statement."""

    answers: list[Any]
    afterwards: list[Any]
    traffic: Traffic


def perform(
    engine: Engine,
    session_class: type[Session],
    scenario: Scenario,
    options: Mapping[str, Any],
    times: int = 1,
) -> Performance:
    """Live through a scenario in a new session; ask the statement in question so many times."""
    observer = Observer()
    with session_class(engine, autoflush=scenario.autoflush) as db:
        answers = []
        for recipe in scenario.before:
            answer = outcome_of(lambda: db.execute(build(recipe)).unique().all())  # noqa: B023
            answers.append(observer.describe(answer))
            if isinstance(answer, Exception):
                # What it had loaded stays in the session as long as the frames of its traceback.
                del answer
                gc.collect()
        _change(db, scenario)
        with traffic(engine) as seen:
            answers += [
                observer.describe(outcome_of(lambda: _ask(db, scenario, options))) for _ in range(times)
            ]
        if any(what == "delete" for _, what in scenario.changes):
            # The unit of work goes through the objects that it deletes in the order of a set.
            seen.statements.sort()
        return Performance(answers, observer.touch(engine), seen)


def _change(db: Session, scenario: Scenario) -> None:
    objects = sorted(db, key=lambda each: (type(each).__name__, inspect(each).identity))
    for number, what in scenario.changes:
        if not objects:
            return
        value = objects.pop(number % len(objects))
        if what == "expire":
            db.expire(value)
        elif what == "delete":
            db.delete(value)
        elif what == "expunge":
            db.expunge(value)
        else:
            key = next(key for key in _columns(type(value).__name__, str) if key != "kind")
            setattr(value, key, "changed")


def _ask(db: Session, scenario: Scenario, options: Mapping[str, Any]) -> Any:
    statement = build(scenario.recipe)
    if scenario.query and scenario.recipe.wrap != "union":
        query = db.query(ENTITIES[scenario.recipe.entity]).execution_options(**options)
        return query.from_statement(statement).all()
    result = db.execute(statement, execution_options=options)
    if scenario.scalars:
        result = result.scalars()  # type: ignore[assignment]
    return (result.unique() if scenario.unique else result).all()
