"""Names of tags: what an answer can depend on.

A tag is a short text. Its kind stands before the colon, so that a name given by a user never meets the
name of a table.
"""

from __future__ import annotations

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


def key_tag(key: str) -> str:
    """The tag of the answers that were stored under a ``cache_key``."""
    return f"key:{key}"


def region_tag(region: str) -> str:
    """The tag of all answers in a region."""
    return f"region:{region}"


def statement_tag(structure: bytes) -> str:
    """The tag of the answers to one statement, whatever its parameters; named by the digest of its structure."""
    return f"statement:{structure.hex()}"


def user_tag(name: str) -> str:
    """The tag for a name given in ``cache_tags``."""
    return f"tag:{name}"


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
