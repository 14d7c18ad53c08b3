"""Finding the application's objects by the name that the command line gives."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from querycache.errors import ConfigurationError

__all__ = ["load"]


def load(name: str | None) -> Any:
    """The object called ``MODULE:ATTRIBUTE``; modules of the current directory are found too.

    Raises:
        ConfigurationError: the name is missing or malformed, or leads to nothing.
    """
    module, _, attribute = (name or "").partition(":")
    if not module or not attribute:
        raise ConfigurationError(f"--app must be given as MODULE:ATTRIBUTE, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"--app {name}: {error}") from error
