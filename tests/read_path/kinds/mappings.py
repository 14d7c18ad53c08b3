"""What a class can be mapped to: inheritance, computed attributes, composites, dataclasses."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    or_,
    select,
)
from sqlalchemy.orm import (
    Session,
    defaultload,
    defer,
    joinedload,
    load_only,
    selectin_polymorphic,
    selectinload,
    undefer,
    undefer_group,
    with_expression,
    with_polymorphic,
)

from tests.read_path.kinds.registry import Options, kind, rows_of, scalars_of
from tests.read_path.models import (
    Address,
    Car,
    Circle,
    Comment,
    Company,
    Counter,
    Employee,
    Engineer,
    Manager,
    Point,
    Post,
    Shape,
    User,
    Vehicle,
)

# --- Inheritance ----------------------------------------------------------------------------------


@kind
def joined_inheritance(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Employee).order_by(Employee.id), options)


@kind
def joined_inheritance_subclass(db: Session, options: Options) -> Any:
    statement = select(Engineer).options(selectinload(Engineer.machines)).order_by(Engineer.id)
    return scalars_of(db, statement, options), scalars_of(db, select(Manager.budget, Manager.name), options)


@kind
def single_inheritance(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Vehicle).order_by(Vehicle.id), options), scalars_of(db, select(Car), options)


@kind
def concrete_inheritance(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Shape).order_by(Shape.id), options), scalars_of(db, select(Circle), options)


@kind
def with_polymorphic_entities(db: Session, options: Options) -> Any:
    everyone = with_polymorphic(Employee, [Engineer, Manager])
    statement = select(everyone).where(or_(everyone.Engineer.language == "C", everyone.Manager.budget > 1))
    loaded = statement.options(selectinload(everyone.Engineer.machines)).order_by(everyone.id)
    flat = with_polymorphic(Employee, "*", flat=True, aliased=True)
    return scalars_of(db, loaded, options), scalars_of(db, select(flat).order_by(flat.id), options)


@kind
def selectin_polymorphic_entities(db: Session, options: Options) -> Any:
    statement = select(Employee).options(
        selectin_polymorphic(Employee, [Engineer, Manager]),
        selectinload(Engineer.machines),
        joinedload(Employee.company),
    )
    return scalars_of(db, statement.order_by(Employee.id), options)


@kind
def selectin_polymorphic_below_selectin(db: Session, options: Options) -> Any:
    loader = selectinload(Company.employees).options(
        selectin_polymorphic(Employee, [Engineer, Manager]), selectinload(Engineer.machines)
    )
    return scalars_of(db, select(Company).options(loader).order_by(Company.id), options)


@kind
def eager_of_type(db: Session, options: Options) -> Any:
    everyone = with_polymorphic(Employee, [Engineer, Manager])
    loader = joinedload(Company.employees.of_type(everyone)).joinedload(everyone.Engineer.machines)
    single = selectinload(Company.employees.of_type(Engineer)).selectinload(Engineer.machines)
    companies = select(Company).order_by(Company.id)
    return scalars_of(db, companies.options(loader), options), scalars_of(
        db, companies.options(single), options
    )


# --- Deferred columns, computed columns, composites -----------------------------------------------


@kind
def deferred_columns(db: Session, options: Options) -> Any:
    return scalars_of(
        db, select(Post).options(defer(Post.title), undefer(Post.body)).order_by(Post.id), options
    )


@kind
def deferred_raising(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Post).options(defer(Post.title, raiseload=True)).order_by(Post.id), options)


@kind
def undeferred_group(db: Session, options: Options) -> Any:
    return scalars_of(db, select(User).options(undefer_group("about")).order_by(User.id), options)


@kind
def load_only_columns(db: Session, options: Options) -> Any:
    some = select(User).options(load_only(User.name, raiseload=True)).order_by(User.id)
    below = select(Post).options(
        joinedload(Post.author).load_only(User.age), defaultload(Post.comments).defer(Comment.text)
    )
    return scalars_of(db, some, options), scalars_of(db, below.order_by(Post.id), options)


@kind
def column_properties(db: Session, options: Options) -> Any:
    return rows_of(
        db, select(Post, Post.comment_count).where(Post.comment_count > 0).order_by(Post.id), options
    )


@kind
def expression_attribute(db: Session, options: Options) -> Any:
    statement = select(User).options(with_expression(User.rank, User.age * 2)).order_by(User.id)
    return scalars_of(db, statement, options)


@kind
def hybrids(db: Session, options: Options) -> Any:
    statement = select(User, User.label).where(User.label != "bob!", User.older_than(30)).order_by(User.id)
    return rows_of(db, statement, options)


@kind
def composites(db: Session, options: Options) -> Any:
    statement = select(User, User.address).where(User.address == Address("Elm 1", "Rom"))
    return rows_of(db, statement, options), rows_of(db, select(User.address).order_by(User.id), options)


@kind
def dataclass_entities(db: Session, options: Options) -> Any:
    statement = select(Point).options(joinedload(Point.next)).order_by(Point.id)
    return scalars_of(db, statement, options)


@kind
def versioned_entity(db: Session, options: Options) -> Any:
    return scalars_of(db, select(Counter), options)


@kind
def association_proxies(db: Session, options: Options) -> Any:
    statement = select(User).where(User.post_titles.contains("third")).options(selectinload(User.posts))
    return [list(user.post_titles) for user in scalars_of(db, statement, options)]
