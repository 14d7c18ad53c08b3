"""The strategies, one file each; `STRATEGIES` finds one by its name."""

from __future__ import annotations

from typing import Final

from querycache.denormalize.strategies.base import Strategy
from querycache.denormalize.strategies.flush import Flush
from querycache.denormalize.strategies.memory import Memory
from querycache.denormalize.strategies.recount import Recount
from querycache.denormalize.strategies.sql import Sql
from querycache.denormalize.strategies.trigger import Trigger

__all__ = ["STRATEGIES", "Strategy"]

STRATEGIES: Final[dict[str, Strategy]] = {
    strategy.name: strategy for strategy in (Sql(), Recount(), Flush(), Memory(), Trigger())
}
