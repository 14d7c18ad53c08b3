"""What the tests of denormalized columns share: a session over the models of one strategy, on an empty database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

Opened = tuple[SimpleNamespace, Session]


@pytest.fixture
def opened(engine: Engine) -> Iterator[Callable[[SimpleNamespace], Session]]:
    """`opened(models)`: a Session over the models' tables, created on the current engine."""
    with ExitStack() as stack:

        def open_session(models: SimpleNamespace, **options: Any) -> Session:
            models.Base.registry.configure()
            models.Base.metadata.create_all(engine)
            return stack.enter_context(Session(engine, **options))

        yield open_session
