"""Names of tags: what an answer can depend on.

A tag is a short text. Its kind stands before the colon, so that a name given by a user never meets the
name of a table.
"""

from __future__ import annotations

__all__ = ["EVERYTHING", "key_tag", "region_tag", "table_tag", "user_tag"]

EVERYTHING = "*"
"""The tag on which every answer depends."""


def key_tag(key: str) -> str:
    """The tag of the answers that were stored under a ``cache_key``."""
    return f"key:{key}"


def region_tag(region: str) -> str:
    """The tag of all answers in a region."""
    return f"region:{region}"


def user_tag(name: str) -> str:
    """The tag for a name given in ``cache_tags``."""
    return f"tag:{name}"


def table_tag(table: str) -> str:
    """The tag of a whole table, named as ``schema.table`` or ``table``."""
    return f"table:{table}"
