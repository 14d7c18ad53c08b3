"""Loading the keys that are not known, for ``unknown="load"``: the one place here that emits SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import ColumnProperty, Mapper, QueryableAttribute, Session, undefer
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import ObjectDeletedError

from querycache.session_index.dependencies import Dependencies, owner_of
from querycache.session_index.keys import KeySpec

__all__ = ["load_keys"]

#: Objects in one SELECT: well within the number of parameters that any database allows.
BATCH: Final = 500


def load_keys(
    session: Session,
    mapper: Mapper[Any],
    spec: KeySpec,
    dependencies: Dependencies,
    objects: Sequence[object],
) -> list[object]:
    """Load what the keys of some objects are read from, without flushing.

    Columns come with one SELECT for many objects; what that does not bring (relationships, columns of
    subclasses) is loaded object by object.

    :returns: the objects whose row is gone.
    """
    with session.no_autoflush:
        _refresh(session, mapper, (*spec.attributes, *dependencies.declared), objects)
        return [obj for obj in objects if not _load(obj, spec, dependencies)]


def _load(obj: object, spec: KeySpec, dependencies: Dependencies) -> bool:
    try:
        for part in spec.all_parts:
            part.load(obj)
        dependencies.load(obj)
    except ObjectDeletedError:
        return False
    return True


def _refresh(
    session: Session,
    mapper: Mapper[Any],
    attributes: Sequence[QueryableAttribute[Any]],
    objects: Sequence[object],
) -> None:
    columns = [a for a in attributes if isinstance(a.prop, ColumnProperty) and mapper.isa(owner_of(a))]
    primary = [mapper.get_property_by_column(column).class_attribute for column in mapper.primary_key]
    identities = [identity for obj in objects if (identity := instance_state(obj).identity) is not None]
    for start in range(0, len(identities), BATCH):
        batch = identities[start : start + BATCH]
        if len(primary) == 1:
            condition = primary[0].in_([identity[0] for identity in batch])
        else:
            condition = or_(
                *(
                    and_(*(attribute == value for attribute, value in zip(primary, identity, strict=True)))
                    for identity in batch
                )
            )
        statement = select(mapper).where(condition).options(*(undefer(attribute) for attribute in columns))
        session.scalars(statement).unique().all()
