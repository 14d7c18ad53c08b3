"""Names of tags: what an answer can depend on.

A tag is a short text. Its kind stands before the colon, so that a name given by a user never meets the
name of a table. Names that an application gives (it may make one for each of its users) and statements (it may write
values into their text) share a fixed number of tags, so that the ledger does not grow with what is cached: two that
share one are made invalid together.
"""

from __future__ import annotations

from hashlib import blake2b

__all__ = [
    "EVERYTHING",
    "bulk_tag",
    "change_tag",
    "key_tag",
    "region_tag",
    "slot_tag",
    "statement_tag",
    "table_tag",
    "user_tag",
]

EVERYTHING = "*"
"""The tag on which every answer depends."""

NAMES = 65_536
"""Tags of each kind that names and statements share."""


def key_tag(key: str) -> str:
    """The tag of the answers that were stored under a ``cache_key``."""
    return f"key:{_shared(key.encode('utf-8', 'surrogatepass'))}"


def region_tag(region: str) -> str:
    """The tag of all answers in a region."""
    return f"region:{region}"


def statement_tag(structure: bytes) -> str:
    """The tag of the answers to one statement, whatever its parameters, found by the digest of its structure."""
    return f"statement:{_shared(structure)}"


def user_tag(name: str) -> str:
    """The tag for a name given in ``cache_tags``."""
    return f"tag:{_shared(name.encode('utf-8', 'surrogatepass'))}"


def table_tag(table: str) -> str:
    """The tag of a whole table, named as ``schema.table`` or ``table``."""
    return f"table:{table}"


def bulk_tag(table: str) -> str:
    """The tag of writes to a table of which the rows are not known."""
    return f"bulk:{table}"


def change_tag(table: str) -> str:
    """The tag of changes to rows of a table of which it is not known what they held before."""
    return f"change:{table}"


def slot_tag(table: str, column: str, slot: int) -> str:
    """The tag of the rows whose value in a tracked column falls into a slot."""
    return f"slot:{table}.{column}:{slot}"


def _shared(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") % NAMES
