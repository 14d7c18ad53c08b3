"""What reviewers have found about sums and their decimal places."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, Numeric, case, func
from sqlalchemy.orm import Session, configure_mappers, mapped_column

from querycache.denormalize import DenormalizeError, expression, max_of, python, sum_of
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, right


def priced(
    name: str, measure: Any, scale: int = 2, strategy: str = "sql", kind: Any = sum_of
) -> SimpleNamespace:
    return family(
        name,
        lambda: {"total": kind("children", measure, strategy=strategy, type_=Numeric(12, scale))},
        lambda: {"price": mapped_column(Numeric(8, 2)), "rate": mapped_column(Numeric(8, 2))},
    )


TOO_FINE: dict[str, Any] = {
    "product": lambda c: c.price * c.rate,
    "product_of_three": lambda c: c.price * c.size * c.rate,
    "part_of_a_sum": lambda c: c.size + c.price * c.rate,
    "with_a_constant": lambda c: c.price * Decimal("0.05"),
    "with_a_float": lambda c: c.price * 0.5,
    "quotient": lambda c: c.price / c.rate,
    "quotient_of_integers": lambda c: c.size / 2,
    "coalesced": lambda c: func.coalesce(c.price * c.rate, 0),
    "by_cases": lambda c: case((c.size > 1, -(c.price * c.rate)), else_=c.price),
}


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
@pytest.mark.parametrize("measure", TOO_FINE)
def test_more_decimal_places_than_the_column_are_refused(measure: str, strategy: str) -> None:
    m = priced(f"ks_{measure}_{strategy}", TOO_FINE[measure], strategy=strategy)
    with pytest.raises(ConfigurationError, match=r"has fewer decimal places than the measure's .*func.round"):
        configure_mappers()
    m.Base.registry.dispose()


FITTING: dict[str, tuple[Any, int]] = {
    "product": (lambda c: c.price * c.rate, 4),
    "with_an_integer": (lambda c: c.price * c.size * 3, 2),
    "with_a_whole_constant": (lambda c: c.price * Decimal("2.00"), 2),
    "rounded": (lambda c: func.round(c.price * c.rate, 2, type_=Numeric(12, 2)), 2),
    "rounded_without_a_type": (lambda c: func.round(c.price * c.rate, 2), 2),
    "added": (lambda c: c.price + c.rate - 1, 2),
    "by_cases": (lambda c: case((c.size > 1, c.price), else_=c.size), 2),
}


@pytest.mark.parametrize("measure", FITTING)
def test_places_that_the_column_has(opened: Open, measure: str) -> None:
    given, scale = FITTING[measure]
    m = priced(f"ks_fit_{measure}", given, scale)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Parent(id=2)])
    s.commit()
    for number in range(1, 6):
        s.add(m.Child(id=number, parent_id=1, price=Decimal("0.10"), rate=Decimal("0.05"), size=number))
        s.commit()
        right(s, m)
    s.get_one(m.Child, 1).price = Decimal("7.77")
    s.get_one(m.Child, 2).parent_id = 2
    s.commit()
    right(s, m)
    s.execute(sa.delete(m.Child).where(m.Child.id > 3))
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory"])
def test_amounts_that_do_not_fit_are_refused(opened: Open, strategy: str) -> None:
    m = priced(
        f"ks_python_{strategy}",
        python(lambda c: c.price * c.rate, columns=("price", "rate")),
        strategy=strategy,
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.commit()
    parent = s.get_one(m.Parent, 1)
    s.add(m.Child(id=1, parent_id=1, price=Decimal("0.10"), rate=Decimal("2.00")))
    s.commit()
    assert parent.total == Decimal("0.20")
    with pytest.raises(DenormalizeError, match=r"Parent\.total: .* more decimal places"):
        s.add(m.Child(id=2, parent=parent, price=Decimal("0.10"), rate=Decimal("0.05")))
        s.flush()
    s.rollback()
    right(s, m)


def test_an_extreme_may_be_rounded(opened: Open) -> None:
    """What is stored is the extreme itself, rounded once."""
    m = priced("ks_max", lambda c: c.price * c.rate, kind=max_of)
    s = opened(m)
    s.add(m.Parent(id=1))
    s.commit()
    for number in range(1, 4):
        s.add(m.Child(id=number, parent_id=1, price=Decimal(number) / 10, rate=Decimal("0.57")))
        s.commit()
    right(s, m)


def test_both_languages(opened: Open) -> None:
    m = priced(
        "ks_both",
        expression(
            sql=lambda c: c.price * c.rate, python=lambda c: c.price * c.rate, columns=("price", "rate")
        ),
        4,
        "flush",
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.commit()
    for number in range(1, 4):
        s.add(m.Child(id=number, parent_id=1, price=Decimal("0.10"), rate=Decimal("0.05")))
        s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory"])
@pytest.mark.server("postgresql")
def test_what_the_database_rounds_when_it_is_stored(kept_postgresql: Engine, strategy: str) -> None:
    m = priced(f"ks_stored_{strategy}", python(lambda c: c.price, columns=("price",)), strategy=strategy)
    m.Base.metadata.create_all(kept_postgresql)
    with Session(kept_postgresql) as s:
        s.add(m.Parent(id=1))
        s.commit()
        parent = s.get_one(m.Parent, 1)
        for number in (1, 2):
            s.add(m.Child(id=number, parent_id=1, price=Decimal(number) / 3))
            s.commit()
        parent.children[0].price = Decimal("0.125")
        s.add(m.Child(id=3, parent_id=1, price=Decimal("0.125")))
        s.commit()
        assert parent.total == Decimal("0.93")
        right(s, m)
