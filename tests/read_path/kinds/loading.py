"""How related objects can be loaded."""

from __future__ import annotations

import itertools
from typing import Any

from sqlalchemy import (
    select,
)
from sqlalchemy.orm import (
    Session,
    aliased,
    contains_eager,
    immediateload,
    joinedload,
    lazyload,
    raiseload,
    selectinload,
    subqueryload,
    with_loader_criteria,
    with_parent,
)

from tests.read_path.kinds.registry import KINDS, Kind, Options, kind, scalars_of
from tests.read_path.models import (
    Comment,
    Node,
    Post,
    Tag,
    Team,
    User,
)

_LOADERS = {
    "joined": joinedload,
    "selectin": selectinload,
    "subquery": subqueryload,
    "immediate": immediateload,
}


def _nested(names: tuple[str, ...]) -> Kind:
    def run(db: Session, options: Options) -> Any:
        option = _LOADERS[names[0]](Team.users)
        for name, attribute in zip(names[1:], (User.posts, Post.comments), strict=True):
            option = getattr(option, _LOADERS[name].__name__)(attribute)
        return scalars_of(db, select(Team).options(option).order_by(Team.id), options)

    return run


NESTED = {"eager_" + "_".join(names): _nested(names) for names in itertools.product(_LOADERS, repeat=3)}
"""Every eager loader below every other, three deep."""

# A Latin square of them: each above and below each other, in a quarter of the time.
for _numbers in itertools.product(range(4), repeat=2):
    _names = [list(_LOADERS)[number] for number in (*_numbers, -sum(_numbers) % 4)]
    KINDS["eager_" + "_".join(_names)] = NESTED["eager_" + "_".join(_names)]


@kind
def eager_siblings(db: Session, options: Options) -> Any:
    statement = select(Post).options(
        joinedload(Post.author).selectinload(User.team),
        selectinload(Post.comments).joinedload(Comment.author, innerjoin=False),
        subqueryload(Post.tags),
    )
    return scalars_of(db, statement.order_by(Post.id), options)


@kind
def eager_many_to_many(db: Session, options: Options) -> Any:
    posts = select(Post).order_by(Post.id)
    return [
        scalars_of(db, posts.options(load(Post.tags)), options)
        for load in (joinedload, selectinload, subqueryload)
    ]


@kind
def eager_joined_below_a_limit(db: Session, options: Options) -> Any:
    return scalars_of(db, select(User).options(joinedload(User.posts)).order_by(User.id).limit(2), options)


@kind
def eager_with_criteria(db: Session, options: Options) -> Any:
    few = select(User).options(selectinload(User.posts.and_(Post.score > 3))).order_by(User.id)
    none = select(User).options(joinedload(User.posts.and_(Post.score > 99))).order_by(User.id)
    return scalars_of(db, few, options), scalars_of(db, none, options)


@kind
def loader_criteria(db: Session, options: Options) -> Any:
    statement = select(User).options(
        selectinload(User.posts), with_loader_criteria(Post, lambda cls: cls.score > 3, include_aliases=True)
    )
    return scalars_of(db, statement.order_by(User.id), options)


@kind
def lazy_and_no_loading(db: Session, options: Options) -> Any:
    statement = select(Tag).options(lazyload(Tag.posts)).order_by(Tag.id)
    return scalars_of(db, statement, options), scalars_of(db, select(User).options(lazyload("*")), options)


@kind
def contains_eagerrows_of(db: Session, options: Options) -> Any:
    statement = select(User).join(User.posts).where(Post.score > 3).order_by(User.id, Post.id)
    return scalars_of(db, statement.options(contains_eager(User.posts)), options)


@kind
def contains_eager_alias(db: Session, options: Options) -> Any:
    post, comment = aliased(Post), aliased(Comment)
    statement = select(User).outerjoin(User.posts.of_type(post)).outerjoin(post.comments.of_type(comment))
    loader = contains_eager(User.posts.of_type(post)).contains_eager(post.comments.of_type(comment))
    return scalars_of(db, statement.options(loader).order_by(User.id, post.id, comment.id), options)


@kind
def raising_loads(db: Session, options: Options) -> Any:
    every = select(User).options(joinedload(User.team), raiseload("*")).order_by(User.id)
    some = (
        select(Post)
        .options(raiseload(Post.comments), raiseload(Post.author, sql_only=True))
        .order_by(Post.id)
    )
    return scalars_of(db, every, options), scalars_of(db, some, options)


@kind
def self_referential(db: Session, options: Options) -> Any:
    joined = select(Node).options(joinedload(Node.children).joinedload(Node.children))
    deep = select(Node).options(selectinload(Node.children, recursion_depth=-1))
    roots = [each.where(Node.parent_id.is_(None)).order_by(Node.id) for each in (joined, deep)]
    upwards = select(Node).options(joinedload(Node.parent), selectinload(Node.children)).order_by(Node.id)
    return [scalars_of(db, statement, options) for statement in (*roots, upwards)]


@kind
def relationship_criteria(db: Session, options: Options) -> Any:
    users = scalars_of(db, select(User).where(User.id < 3).order_by(User.id), options)
    (post,) = scalars_of(db, select(Post).where(Post.id == 3), options)
    return [
        [
            scalars_of(db, select(Post).where(Post.author == user).order_by(Post.id), options)
            for user in users
        ],
        [
            scalars_of(db, select(Post).where(with_parent(user, User.posts)).order_by(Post.id), options)
            for user in users
        ],
        scalars_of(db, select(User).where(User.posts.contains(post)), options),
        scalars_of(db, select(User).where(User.posts.any(Post.score > 3)).order_by(User.id), options),
        scalars_of(db, select(Post).where(Post.author.has(User.name == "bob")), options),
    ]


@kind
def write_only_collection(db: Session, options: Options) -> Any:
    (user,) = scalars_of(db, select(User).where(User.id == 1), options)
    return scalars_of(db, user.post_stream.select().where(Post.score > 3), options)
