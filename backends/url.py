"""Options of a store: from the query of its URL, or by name; typed and checked in one place.

A backend declares which options it takes and how each is read. Whatever else is given is an error that names
it, because a misspelt option would otherwise be a default that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from querycache.errors import ConfigurationError, shown

__all__ = [
    "flag",
    "one_of",
    "parse_options",
    "positive_integer",
    "seconds",
    "size",
    "split_arguments",
    "text",
    "whole_number",
]

_WORDS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size(value: object) -> int:
    """Bytes: an integer, or text such as ``"256mb"`` (powers of 1 024)."""
    if isinstance(value, str):
        text = value.strip().lower().replace("_", "")
        digits = text.rstrip("bgikm")
        value = int(digits) * _UNITS[text[len(digits) :]]
    return positive_integer(value)


def whole_number(value: object) -> int:
    """A whole number from zero up, as a number or as text."""
    number = int(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError
    return number


def positive_integer(value: object) -> int:
    """A whole number above zero, as a number or as text."""
    number = whole_number(value)
    if number == 0:
        raise ValueError
    return number


def seconds(value: object) -> float:
    """A time above zero in seconds, a day at most, as a number or as text."""
    number = float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
    if not isinstance(number, float) or not 0 < number <= 86_400:
        raise ValueError
    return number


def text(value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def flag(value: object) -> bool:
    """Yes or no: a bool, or one of the words true, false, yes, no, on, off, 1, 0."""
    if isinstance(value, bool):
        return value
    return _WORDS[str(value).lower()]


def one_of(*choices: str) -> Callable[[object], str]:
    """What reads one of a few words."""

    def read(value: object) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    read.__doc__ = f"One of {', '.join(map(repr, choices))}."
    return read


def parse_options(
    store: str, known: Mapping[str, Callable[[object], Any]], given: Mapping[str, object]
) -> dict[str, Any]:
    """Read the options that were given to a store.

    :param store: what the store is called in error messages.
    :param known: the reader of each option; it raises ValueError or KeyError for a value that cannot work.
    :raises ConfigurationError: an option is unknown, or its value cannot work.
    """
    options = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(
                f"{store} has no option {name!r}; it takes {', '.join(sorted(known)) or 'none'}"
            )
        try:
            options[name] = known[name](value)
        except (ValueError, KeyError) as error:
            expected = (known[name].__doc__ or "").partition("\n")[0].rstrip(".").replace("``", "")
            raise ConfigurationError(
                f"{store} cannot use {value!r} for option {name!r}: give {expected[:1].lower()}{expected[1:]}"
            ) from error
    return options


def split_arguments(arguments: Mapping[str, object]) -> tuple[SplitResult | None, dict[str, object]]:
    """Take the arguments of a store apart that may have a URL among them.

    :returns: the address, which is the URL without its query (None if there is no URL), and the options:
        those in the query together with those that were given by name.
    :raises ConfigurationError: it is no URL, or an option is given twice.
    """
    if "url" not in arguments:
        return None, dict(arguments)
    url = arguments["url"]
    try:
        parts = urlsplit(text(url))
    except ValueError as error:
        raise ConfigurationError(f"{shown(url)} is no URL of a store") from error
    options: dict[str, object] = {}
    by_name = [(name, value) for name, value in arguments.items() if name != "url"]
    for name, value in [*parse_qsl(parts.query, keep_blank_values=True), *by_name]:
        if name in options:
            raise ConfigurationError(f"option {name!r} is given twice: {options[name]!r} and {value!r}")
        options[name] = value
    return parts._replace(query=""), options
