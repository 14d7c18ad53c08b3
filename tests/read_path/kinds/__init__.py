"""Every kind of statement that the cache answers, each a function of a session and execution options.

Given no options it asks the database, given `{"cache_key": True}` the cache. They are found by name, so that
a fresh process can be told which to run.
"""

from tests.read_path.kinds import loading, mappings, selects, types
from tests.read_path.kinds.registry import KINDS, Kind, Options, kinds_for

__all__ = ["KINDS", "Kind", "Options", "kinds_for", "loading", "mappings", "selects", "types"]
