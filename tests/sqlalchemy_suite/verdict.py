"""The comparison of two runs, and whether it is good enough."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.sqlalchemy_suite.run import ANSWERED, COMPLETED, NOTICED, Case

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["REQUIRED", "Known", "Verdict", "judge", "read_known"]

REQUIRED = 0.995
"""The part of what passes without the plugin that has to pass with it."""


@dataclass(frozen=True, slots=True)
class Known:
    """Tests that cannot pass on replayed rows.

    Attributes:
        reason: why, for people.
        tests: their ids, in which ``*`` stands for anything.
        line: the line of SQLAlchemy that has them, such as "2.1"; empty for every one.
    """

    reason: str
    tests: tuple[str, ...]
    line: str = ""


def read_known(path: Path, version: str) -> list[Known]:
    """The list of a file, as far as it speaks of a version of SQLAlchemy."""
    entries = tomllib.loads(path.read_text("utf-8"))["known"]
    known = [Known(each["reason"], tuple(each["tests"]), each.get("line", "")) for each in entries]
    return [each for each in known if not each.line or version.startswith(f"{each.line}.")]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out.

    Attributes:
        baseline: number of tests that pass without the plugin.
        kept: how many of them pass with it.
        touched, touched_kept: the same for those in which at least one statement was answered from bytes.
        answered: number of statements whose answer came from the cache.
        completed: number of post-loads whose answer came from bytes.
        left: number of statements left to the database, by reason.
        explained: the tests that pass no more, by the reason in the list.
        unexplained: those that are not in the list.
        outdated: tests in the list that pass, and patterns in it that match no test.
    """

    baseline: int
    kept: int
    touched: int
    touched_kept: int
    answered: int
    completed: int
    left: Mapping[str, int]
    explained: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unexplained: Sequence[str] = ()
    outdated: Sequence[str] = ()

    @property
    def ratio(self) -> float:
        """0.0 to 1.0; 0.0 where nothing was run."""
        return self.kept / self.baseline if self.baseline else 0.0

    @property
    def good(self) -> bool:
        from_bytes = self.answered > 0 and self.completed > 0
        return self.ratio >= REQUIRED and from_bytes and not self.unexplained and not self.outdated

    @property
    def unchanged(self) -> bool:
        """Whether all that passes without passes with it, where nothing is answered and statements are only noticed."""
        return self.baseline > 0 and not self.unexplained and self.left.get(NOTICED, 0) > 0


def judge(
    without: Mapping[str, Case], with_plugin: Mapping[str, Case], known: Iterable[Known], *, whole: bool
) -> Verdict:
    """Compare two runs of the same tests.

    Args:
        without: the tests by id, as they are.
        with_plugin: with the plugin.
        known: tests that are known not to pass.
        whole: False where only a part of the tests was run, so that a pattern need not match any.
    """
    baseline = {name for name, test in without.items() if test.outcome == "passed"}
    kept = {name for name in baseline if name in with_plugin and with_plugin[name].outcome == "passed"}
    touched = {name for name in baseline if name in with_plugin and with_plugin[name].counts.get(ANSWERED)}
    explained: dict[str, list[str]] = {}
    outdated: list[str] = []
    unexplained = baseline - kept
    for each in known:
        for pattern in each.tests:
            regex = re.compile(".*".join(map(re.escape, pattern.split("*"))))
            matching = {name for name in without if regex.fullmatch(name)}
            if whole and not matching:
                outdated.append(pattern)
            outdated.extend(sorted(matching & kept))
            explained.setdefault(each.reason, []).extend(sorted(matching & unexplained))
            unexplained -= matching
    left = Counter[str]()
    for test in with_plugin.values():
        left.update(test.counts)
    return Verdict(
        baseline=len(baseline),
        kept=len(kept),
        touched=len(touched),
        touched_kept=len(touched & kept),
        answered=left.pop(ANSWERED, 0),
        completed=left.pop(COMPLETED, 0),
        left=dict(left.most_common()),
        explained={reason: tests for reason, tests in explained.items() if tests},
        unexplained=sorted(unexplained),
        outdated=outdated,
    )
