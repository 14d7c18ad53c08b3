"""The recipe that SQLAlchemy's documentation gives for dogpile.cache, written again from its idea.

Results are frozen as ORM objects, pickled into a region under a key made of the statement, and merged into
the Session on a hit. (The documented example returns what ``merge_frozen_result`` gives without calling it;
here it is called.) It is what people use today, so it is what this library is measured against.
"""

from __future__ import annotations

from typing import Any

from dogpile.cache import CacheRegion
from dogpile.cache.util import sha1_mangle_key
from sqlalchemy.orm import ORMExecuteState, loading
from sqlalchemy.orm.interfaces import UserDefinedOption

__all__ = ["FromRegion", "Recipe"]


class FromRegion(UserDefinedOption):
    """Marks the statements that the recipe caches.

    Args:
        name: goes into the key. The recipe tells statements apart by their SQL, which does not show a ``selectinload``;
            without a name, such a statement would be answered with objects that lack what it loads.
    """

    propagate_to_loaders = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Recipe:
    """The handler of ``do_orm_execute``."""

    def __init__(self, region: CacheRegion) -> None:
        self._region = region
        self._statements: dict[Any, Any] = {}

    def __call__(self, state: ORMExecuteState) -> Any:
        for option in state.user_defined_options:
            if isinstance(option, FromRegion):
                return self._answer(state, option.name)
        return None

    def _answer(self, state: ORMExecuteState, name: str) -> Any:
        statement: Any = state.statement
        key = statement._generate_cache_key().to_offline_string(
            self._statements, statement, state.parameters or {}
        )
        frozen = self._region.get_or_create(
            sha1_mangle_key(f"{key} {name}".encode()), lambda: state.invoke_statement().freeze()
        )
        merge: Any = loading.merge_frozen_result
        return merge(state.session, statement, frozen, load=False)()
