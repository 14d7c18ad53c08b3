"""The plan of a MetaData: its aggregates, and what a change of any mapped object means for them.

Built once all mappers are configured and kept in `MetaData.info`, so it lives as long as the tables do. A flush asks
it one question per class, `watch(mapper)`: at which levels of which chains do its rows stand, which attributes
matter there, and which of its relationships move rows of others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, ColumnElement, ForeignKeyConstraint, MetaData, Table, TableClause
from sqlalchemy.orm import Mapper, RelationshipDirection, RelationshipProperty
from sqlalchemy.sql import visitors

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import changed_by_update, key_in, mapped_attributes
from querycache.denormalize.chain import Chain
from querycache.denormalize.declare import INFO_KEY
from querycache.denormalize.errors import UncoveredChange
from querycache.errors import ConfigurationError

__all__ = ["Edge", "Place", "Plan", "Watch", "foreign_keys", "plan_of", "planned_table", "relevant"]

_by_name: weakref.WeakValueDictionary[str, Table] = weakref.WeakValueDictionary()
"""The tables of plans by their full names."""


@dataclass(frozen=True)
class Place:
    """A level of a chain."""

    chain: Chain
    level: int


@dataclass
class Watch:
    """What the instances of one mapper mean to the plan.

    Attributes:
        places: where its rows stand, each with the attributes whose change matters there.
        collections: its relationships whose history names rows of other places.
        orphans: its relationships with delete-orphan: what leaves them may be deleted in the flush.
        owners: the relationships with delete-orphan that its instances may leave, by class and name.
        guards_deletes: whether a database or ORM cascade from its tables can reach rows of a place.
        roots: aggregates held in its rows.
        copied: its key attributes, if it has several tables: the UPDATE of one sets those of the next to what they are.
        unseen: tables whose rows stand in places as objects of a class that this one has nothing to do with, each with the
            attributes whose change matters there.
    """

    places: list[tuple[Place, frozenset[str]]] = field(default_factory=list)
    collections: list[tuple[str, Place]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    owners: list[tuple[type[Any], str]] = field(default_factory=list)
    guards_deletes: bool = False
    roots: list[Aggregate] = field(default_factory=list)
    copied: frozenset[str] = frozenset()
    unseen: dict[Table, frozenset[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(
            self.places
            or self.collections
            or self.orphans
            or self.owners
            or self.guards_deletes
            or self.unseen
        )


@dataclass(frozen=True)
class Edge:
    """A foreign key by which the deletion of a row changes rows of `table`: the places that see it, the columns that hold
    the keys of their rows, and whether the rows of the table go away too, so that the deletion spreads."""

    table: Table
    joins: tuple[tuple[ColumnElement[Any], ColumnElement[Any]], ...]
    places: tuple[Place, ...]
    spreads: bool
    keys: tuple[ColumnElement[Any], ...]


class Plan:
    """All aggregates of one MetaData."""

    def __init__(
        self, metadata: MetaData, aggregates: list[Aggregate], mappers: Iterable[Mapper[Any]]
    ) -> None:
        self.metadata = metadata
        self.aggregates = aggregates
        self.by_chain: dict[Chain, list[Aggregate]] = {}
        for aggregate in aggregates:
            self.by_chain.setdefault(aggregate.chain, []).append(aggregate)
        self._mappers = list(mappers)
        self.relevant: dict[Place, frozenset[str]] = {
            Place(chain, level): frozenset(relevant(chain, level, held))
            for chain, held in self.by_chain.items()
            for level in range(1, chain.depth + 1)
        }
        self.places: dict[Chain, tuple[Place, ...]] = {
            chain: tuple(Place(chain, level) for level in range(1, chain.depth + 1))
            for chain in self.by_chain
        }
        """The places of each chain below its parent, from the top."""
        self._statements: dict[tuple[Any, ...], Any] = {}
        self.edges = self._edges()
        self._rank = self._ranks()
        self._watches: dict[Mapper[Any], Watch] = {}
        self.tables: frozenset[Table] = frozenset(
            table
            for place in self.relevant
            for table in self.tables_of(place)
            if any(held.strategy != "trigger" for held in self.by_chain[place.chain])
        )
        """Tables whose rows, if changed unseen, make an aggregate wrong."""
        self.columns: dict[Table, dict[str, Aggregate]] = {}
        for aggregate in aggregates:
            self.columns.setdefault(aggregate.table, {})[aggregate.column.key] = aggregate
        self.discriminators: dict[Table, dict[Column[Any], list[Aggregate]]] = {}
        """The columns by which rows become those of a class that has aggregates, which then are as they were inserted."""
        for aggregate in aggregates:
            root = aggregate.chain.root
            if root.single and isinstance(root.polymorphic_on, Column):
                told_by = self.discriminators.setdefault(root.polymorphic_on.table, {})
                told_by.setdefault(root.polymorphic_on, []).append(aggregate)
        _by_name.update({table.fullname: table for table in (*self.tables, *self.edges, *self.columns)})

    def depending_on(self, table: Table) -> set[Aggregate]:
        """The aggregates that rows of `table` contribute to, by themselves or by what their deletion takes along."""
        found = {
            held
            for place in self.relevant
            if table in self.tables_of(place)
            for held in self.by_chain[place.chain]
        }
        pending, seen = [table], {table}
        while pending:
            for edge in self.edges.get(pending.pop(), ()):
                found.update(held for place in edge.places for held in self.by_chain[place.chain])
                if edge.spreads and edge.table not in seen:
                    seen.add(edge.table)
                    pending.append(edge.table)
        return found

    def column_keys(self, table: Table) -> frozenset[str]:
        """The keys of the columns of `table` whose change matters to an aggregate that no trigger keeps."""
        found: set[str] = set()
        for place, names in self.relevant.items():
            if all(held.strategy == "trigger" for held in self.by_chain[place.chain]):
                continue
            mapper, secondary = place.chain.mappers[place.level], place.chain.links[place.level - 1].secondary
            if table is secondary:
                found.update(str(column.key) for column in table.columns)
            for heir in mapper.self_and_descendants:
                for name in names:
                    for column in heir.column_attrs[name].columns if name in heir.column_attrs else ():
                        if column.table is table:
                            found.add(str(column.key))
        return frozenset(found)

    @staticmethod
    def tables_of(place: Place) -> Iterable[Table]:
        mapper = place.chain.mappers[place.level]
        yield from (table for table in mapper.tables if isinstance(table, Table))
        secondary = place.chain.links[place.level - 1].secondary
        if secondary is not None:
            yield secondary

    def memo(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The statement remembered under `key`, made when first asked for: building one costs more than running it."""
        found = self._statements.get(key)
        if found is None:
            found = self._statements[key] = make()
        return found

    def mapper_of(self, table: Table) -> Mapper[Any] | None:
        """A mapper whose own table this is."""
        return next((mapper for mapper in self._mappers if mapper.local_table is table), None)

    def key_of(self, table: Table) -> tuple[Column[Any], ...]:
        """The columns of `table` that hold the keys of its rows, as objects have them; empty if it does not hold them."""

        def key() -> tuple[Column[Any], ...]:
            mapper = self.mapper_of(table)
            return tuple(table.primary_key.columns) if mapper is None else key_in(table, mapper) or ()

        found: tuple[Column[Any], ...] = self.memo(("key", table), key)
        return found

    def mapped_to(self, table: Table) -> Iterable[Mapper[Any]]:
        """The mappers that have `table` among theirs."""
        return (mapper for mapper in self._mappers if table in mapper.tables)

    def rank(self, mapper: Mapper[Any]) -> int:
        """The place of the mapper's table in the order of locking: children before their parents."""
        return self._rank.get(mapper.base_mapper, 0)

    def watch(self, mapper: Mapper[Any]) -> Watch:
        """What instances of `mapper` mean; the empty Watch is false."""
        found = self._watches.get(mapper)
        if found is None:
            found = self._watches[mapper] = self._watch(mapper)
        return found

    def _watch(self, mapper: Mapper[Any]) -> Watch:
        watch = Watch()
        for place, relevant in self.relevant.items():
            watched = place.chain.mappers[place.level]
            if mapper.isa(watched):
                watch.places.append((place, relevant))
            for step in mapper.relationships:
                if not step.viewonly and self._moves(step, place):
                    watch.collections.append((step.key, place))
        watch.orphans = [
            step.key
            for step in mapper.relationships
            if step.cascade.delete_orphan and not step.viewonly and self._matters(step.mapper)
        ]
        watch.owners = [
            (step.parent.class_, step.key)
            for step in self.relationships()
            if step.cascade.delete_orphan and mapper.isa(step.mapper) and self._matters(mapper)
        ]
        watch.guards_deletes = any(table in self.edges for table in mapper.tables)
        watch.roots = [held for held in self.aggregates if mapper.isa(held.chain.root)]
        if len(mapper.tables) > 1:
            keys = [
                (t.fullname, c.name) for t in mapper.tables if isinstance(t, Table) for c in t.primary_key
            ]
            watch.copied = frozenset(mapped_attributes(mapper, keys))
        for table in mapper.tables:
            if isinstance(table, Table) and self._others_on(mapper, table):
                keys = [(table.fullname, column.name) for column in table.columns]
                if mapped_attributes(mapper, keys):  # a class that is mapped to a subquery writes nothing
                    matters = self.column_keys(table)
                    watch.unseen[table] = frozenset(
                        mapped_attributes(
                            mapper, [(table.fullname, c.name) for c in table.columns if c.key in matters]
                        )
                    )
        return watch

    def _others_on(self, mapper: Mapper[Any], table: Table) -> dict[Place, Mapper[Any]]:
        """The places, but those that only triggers serve, where rows of `table` stand as objects of a class that has no
        ancestor in common with `mapper`; with that class."""
        found: dict[Place, Mapper[Any]] = {}
        for place in self.relevant:
            watched = place.chain.mappers[place.level]
            shares = table in watched.tables and watched.base_mapper is not mapper.base_mapper
            if shares and any(held.strategy != "trigger" for held in self.by_chain[place.chain]):
                found[place] = watched
        return found

    def unseen_change(self, mapper: Mapper[Any], table: Table) -> UncoveredChange:
        """What to raise where `mapper` changes rows of a table in `Watch.unseen`."""
        others = self._others_on(mapper, table)
        classes = sorted({watched.class_.__name__ for watched in others.values()})
        names = sorted(
            held.name for place in others for held in self.by_chain[place.chain] if held.strategy != "trigger"
        )
        name = mapper.class_.__name__
        return UncoveredChange(
            f"{name} is mapped to {table.fullname} beside {', '.join(classes)}, by whose objects {', '.join(names)}"
            f" {'is' if len(names) == 1 else 'are'} kept, and changes of {name} would be missed: make them through"
            f" {' or '.join(classes)}, have {name} inherit from it, or take strategy 'trigger'"
        )

    def _matters(self, mapper: Mapper[Any]) -> bool:
        """Whether the deletion of an instance can change rows of a place: its own, those below it, or those of what the ORM
        deletes with it."""
        pending, seen = [mapper], set()
        while pending:
            for each in pending.pop().self_and_descendants:
                if each in seen:
                    continue
                seen.add(each)
                if any(table in self.edges for table in each.tables) or any(
                    each.isa(held) for chain in self.by_chain for held in chain.mappers
                ):
                    return True
                pending.extend(step.mapper for step in each.relationships if step.cascade.delete)
        return False

    def relationships(self) -> Iterable[RelationshipProperty[Any]]:
        for mapper in self._mappers:
            for step in mapper.relationships:
                if step.parent is mapper:  # not inherited
                    yield step

    def writes_link(self, step: RelationshipProperty[Any], place: Place) -> bool:
        """Whether `step` writes a foreign key by which rows of `place` point to the level above, other than from their own
        side by the same columns."""
        watched, link = place.chain.mappers[place.level], place.chain.links[place.level - 1]
        if step.direction is RelationshipDirection.ONETOMANY:
            related = step.mapper.isa(watched) or watched.isa(step.mapper)
        elif step.direction is RelationshipDirection.MANYTOONE:
            related = step.parent.isa(watched) or watched.isa(step.parent)
            related = related and step.key not in place.chain.reverses[place.level - 1]
        else:
            return False
        # The pairs end in the columns that hold the foreign key.
        written = _attributes(watched, [held for _, held in step.synchronize_pairs])
        return related and not written.isdisjoint(link.attributes)

    def _moves(self, step: RelationshipProperty[Any], place: Place) -> bool:
        """Whether changes of `step`, seen from its parent, change rows of `place`: they hold its foreign key, or it
        is the other side of the secondary table."""
        watched = place.chain.mappers[place.level]
        if not (step.mapper.isa(watched) or watched.isa(step.mapper)):
            return False
        if step.secondary is not None:
            return step.secondary is place.chain.links[place.level - 1].secondary
        if step.direction is not RelationshipDirection.ONETOMANY:
            return False
        written = _attributes(watched, [remote for _, remote in step.synchronize_pairs])
        return bool(written & self.relevant[place])

    def _edges(self) -> dict[Table, list[Edge]]:
        found: dict[Table, list[Edge]] = {}
        for table in self.metadata.tables.values():
            for constraint in table.foreign_key_constraints:
                found.setdefault(constraint.referred_table, []).extend(self._by_constraint(table, constraint))
        for mapper in self._mappers:
            for step in mapper.relationships:
                edge = self._orm_edge(step)
                if edge is not None:
                    found.setdefault(_only_table(step.parent), []).append(edge)
        useful = {table for table, edges in found.items() if any(edge.places for edge in edges)}
        while True:
            grown = {
                table
                for table, edges in found.items()
                if any(edge.places or (edge.spreads and edge.table in useful) for edge in edges)
            }
            if grown == useful:
                break
            useful = grown
        edges = {
            table: [edge for edge in edges if edge.places or (edge.spreads and edge.table in useful)]
            for table, edges in found.items()
            if table in useful
        }
        for table in {*edges, *(edge.table for held in edges.values() for edge in held if not edge.keys)}:
            owner = self.mapper_of(table)
            if owner is not None and not self.key_of(table):
                raise ConfigurationError(
                    f"a deletion of rows of {table.fullname} changes aggregates, and which rows cannot be told: it does not"
                    f" hold the primary key by which {owner.class_.__name__} is mapped"
                    f" ({', '.join(map(str, owner.primary_key))})"
                )
        return edges

    def _by_constraint(self, table: Table, constraint: ForeignKeyConstraint) -> Iterable[Edge]:
        rule = (constraint.ondelete or "").upper()
        spreads = rule == "CASCADE"
        joins = tuple((element.parent, element.column) for element in constraint.elements)
        columns = [held for held, _ in joins]
        places = tuple(self._hit(table, columns, spreads, stays=rule == "SET DEFAULT"))
        if places or spreads:
            yield Edge(table, joins, places, spreads, self.key_of(table))
        for place in self.relevant if spreads else ():
            # Through the keys of either side it comes from a row that is touched or gone itself.
            link = place.chain.links[place.level - 1]
            own = [{column.key for column in side} for side in (link.lower, link.upper)]
            if table is link.secondary and {column.key for column in columns} not in own:
                yield Edge(table, joins, (place,), False, link.lower)

    def _orm_edge(self, step: RelationshipProperty[Any]) -> Edge | None:
        """ORM cascades count too: an orphan is deleted inside the flush, and its own children with it."""
        if step.viewonly or step.direction is not RelationshipDirection.ONETOMANY or not step.cascade.delete:
            return None
        joins = tuple((remote, local) for local, remote in step.synchronize_pairs)
        table = joins[0][0].table
        if not isinstance(table, Table):
            return None
        places = tuple(self._hit(table, [held for held, _ in joins], True))
        return Edge(table, joins, places, True, self.key_of(table))

    def _hit(
        self, table: Table, columns: list[Any], spreads: bool, *, stays: bool = False
    ) -> Iterable[Place]:
        """The places that see the deletion; `stays` if the rows go to another parent by it."""
        for place, relevant in self.relevant.items():
            mapper = place.chain.mappers[place.level]
            if table not in mapper.tables:
                continue
            held = _attributes(mapper, columns)
            # Through the link itself the deletion comes from the level above, which is either touched or, as the
            # parent that holds the aggregate, gone.
            if held and held == set(place.chain.links[place.level - 1].attributes) and not stays:
                continue
            if spreads or held & relevant:
                yield place

    def _ranks(self) -> dict[Mapper[Any], int]:
        above: dict[Mapper[Any], set[Mapper[Any]]] = {}
        for chain in self.by_chain:
            for upper, lower in zip(chain.mappers, chain.mappers[1:], strict=False):
                if upper.base_mapper is not lower.base_mapper:
                    above.setdefault(lower.base_mapper, set()).add(upper.base_mapper)
        ranks: dict[Mapper[Any], int] = {}

        def visit(mapper: Mapper[Any], path: frozenset[Mapper[Any]]) -> int:
            if mapper not in ranks:
                uppers = [
                    visit(upper, path | {mapper}) for upper in above.get(mapper, ()) if upper not in path
                ]
                ranks[mapper] = max(uppers, default=-1) + 1
            return ranks[mapper]

        for chain in self.by_chain:
            for mapper in chain.mappers:
                visit(mapper.base_mapper, frozenset())
        return {mapper: -rank for mapper, rank in ranks.items()}


def foreign_keys(mapper: Mapper[Any]) -> Iterable[ForeignKeyConstraint]:
    """The foreign keys of all tables of a mapper."""
    for table in mapper.tables:
        if isinstance(table, Table):
            yield from table.foreign_key_constraints


def plan_of(mapper_or_table: Any) -> Plan | None:
    """The plan that a mapper's, or table's, MetaData has, if it has one."""
    table = mapper_or_table.local_table if isinstance(mapper_or_table, Mapper) else mapper_or_table
    metadata = getattr(table, "metadata", None)
    found = None if metadata is None else metadata.info.get(INFO_KEY)
    return found if isinstance(found, Plan) else None


def planned_table(selectable: Any) -> Table | None:
    """The table of a plan that a statement names: by itself, under an alias, or as a table of the same name that was
    reflected or written down once more, as in a migration."""
    while not isinstance(selectable, TableClause):  # an alias
        selectable = getattr(selectable, "element", None)
        if selectable is None:
            return None
    if isinstance(selectable, Table):
        # an entity's is a copy with annotations
        table = selectable.metadata.tables.get(selectable.key, selectable)
        if plan_of(table) is not None:
            return table
    known = _by_name.get(selectable.fullname)
    return known if known is not None and plan_of(known) is not None else None


def relevant(chain: Chain, level: int, aggregates: list[Aggregate], *, rows: bool = False) -> Iterable[str]:
    """The attributes whose change matters to the aggregates, at one level of their chain.

    `rows` asks on behalf of one who compares whole rows before and after; else, for one who sees only what the application
    sets, every attribute matters where the UPDATE itself changes one that does.
    """
    mapper = chain.mappers[level]
    names = set(chain.keys[level])
    joined: list[Any] = []
    for step in chain.relationships[level - 1 : level + 1]:
        joined.extend(visitors.iterate(step.primaryjoin))
        if step.secondaryjoin is not None:
            joined.extend(visitors.iterate(step.secondaryjoin))
    names |= _attributes(mapper, joined)
    if mapper.polymorphic_on is not None:
        names |= _attributes(mapper, [mapper.polymorphic_on])
    for aggregate in aggregates:
        names |= aggregate.reads()[level]
    if not rows and changed_by_update(mapper, names):
        names |= {
            attribute.key
            for heir in mapper.self_and_descendants
            for attribute in heir.column_attrs
            if isinstance(getattr(attribute.columns[0], "table", None), Table)
        }
    yield from names
    secondary = chain.links[level - 1].secondary
    # The plain columns change only inside the flush when the application sets a relationship instead. All of the
    # subclasses' relationships are looked at, since the row of a subclass is a row of this level.
    for heir in mapper.self_and_descendants:
        for step in heir.relationships:
            if step.viewonly:
                continue
            if step.secondary is not None:
                if step.secondary is secondary:
                    yield step.key
            elif step.direction is RelationshipDirection.MANYTOONE and (
                _attributes(heir, [local for _, local in step.synchronize_pairs]) & names
            ):
                yield step.key


def _attributes(mapper: Mapper[Any], elements: Iterable[Any]) -> set[str]:
    """The attributes of `mapper` that are one of the columns among `elements`, whatever annotations those carry."""
    return mapped_attributes(
        mapper,
        [
            (held.table.fullname, held.name)
            for held in elements
            if isinstance(getattr(held, "table", None), Table)
        ],
    )


def _only_table(mapper: Mapper[Any]) -> Table:
    table = mapper.local_table
    assert isinstance(table, Table)
    return table
