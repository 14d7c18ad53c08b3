"""The judgement over the runs of SQLAlchemy's tests: it must be able to say no."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sqlalchemy_suite import run, verdict
from tests.sqlalchemy_suite.run import ANSWERED, COMPLETED, NOTICED, Case
from tests.sqlalchemy_suite.verdict import Known, judge, read_known

PASSED = Case("passed", {ANSWERED: 2, COMPLETED: 1, "for update": 1})
FAILED = Case("failed", {ANSWERED: 1})
MANY = {f"test_{number}": PASSED for number in range(1000)}


def test_all_that_passes_is_good_and_everything_is_counted() -> None:
    result = judge(MANY, MANY, [], whole=True)

    assert result.good
    assert result.ratio == 1.0
    assert (result.baseline, result.kept, result.touched) == (1000, 1000, 1000)
    assert (result.answered, result.completed, result.left) == (2000, 1000, {"for update": 1000})


def test_a_failure_that_is_not_listed_is_not_good() -> None:
    result = judge(MANY, MANY | {"test_7": FAILED}, [], whole=True)

    assert not result.good
    assert result.unexplained == ["test_7"]


def test_a_failure_that_is_listed_is_good_and_keeps_its_reason() -> None:
    result = judge(MANY, MANY | {"test_7": FAILED}, [Known("a mock", ("test_7",))], whole=True)

    assert result.good
    assert result.explained == {"a mock": ["test_7"]}


def test_of_core_nothing_may_change_and_statements_are_noticed() -> None:
    noticed = {name: Case("passed", {NOTICED: 3}) for name in MANY}

    assert judge(MANY, noticed, [], whole=True).unchanged
    assert not judge(MANY, noticed | {"test_7": FAILED}, [], whole=True).unchanged
    assert not judge(MANY, dict.fromkeys(MANY, Case("passed", {})), [], whole=True).unchanged
    assert not judge({}, {}, [], whole=True).unchanged


@pytest.mark.parametrize("lost", [Case("skipped", {}), None])
def test_a_test_that_is_skipped_or_gone_with_the_plugin_has_not_passed(lost: Case | None) -> None:
    with_plugin = {name: test for name, test in MANY.items() if name != "test_7"}
    if lost is not None:
        with_plugin["test_7"] = lost

    assert judge(MANY, with_plugin, [], whole=True).unexplained == ["test_7"]


def test_below_the_limit_a_list_of_reasons_does_not_help() -> None:
    failing = {f"test_{number}": FAILED for number in range(6)}
    result = judge(MANY, MANY | failing, [Known("reasons", tuple(failing))], whole=True)

    assert not result.unexplained
    assert result.ratio == 0.994
    assert not result.good


def test_a_listed_test_that_passes_is_not_good() -> None:
    known = [Known("a mock", ("test_7*",))]
    result = judge(MANY, MANY | {"test_7": FAILED, "test_70": FAILED}, known, whole=True)

    assert "test_71" in result.outdated
    assert not result.good


def test_a_pattern_that_matches_nothing_is_not_good_where_everything_was_run() -> None:
    known = [Known("a mock", ("test_that_was_renamed",))]

    assert not judge(MANY, MANY, known, whole=True).good
    assert judge(MANY, MANY, known, whole=False).good


def test_brackets_in_patterns_mean_themselves() -> None:
    tests = {"test_x[a-1]": PASSED, "test_x[b-1]": PASSED}
    known = [Known("a mock", ("test_x[a-*]",))]

    assert judge(tests, tests | {"test_x[a-1]": FAILED}, known, whole=True).outdated == []


def test_failures_without_the_plugin_are_not_held_against_it() -> None:
    broken = {"test_7": FAILED}

    assert judge(MANY | broken, MANY | broken, [], whole=True).good


def test_a_run_in_which_nothing_was_answered_proves_nothing() -> None:
    untouched = dict.fromkeys(MANY, Case("passed", {"not a select": 1}))

    assert not judge(MANY, untouched, [], whole=True).good
    assert not judge({}, {}, [], whole=False).good


def test_a_run_in_which_no_post_load_was_answered_proves_too_little() -> None:
    alone = dict.fromkeys(MANY, Case("passed", {ANSWERED: 2}))

    assert not judge(MANY, alone, [], whole=True).good


def test_the_list_speaks_of_the_line_that_is_tested(tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    file.write_text(
        '[[known]]\nreason = "every"\ntests = ["a"]\n[[known]]\nreason = "new"\ntests = ["b"]\nline = "2.1"\n'
    )

    assert [each.reason for each in read_known(file, "2.1.9")] == ["every", "new"]
    assert [each.reason for each in read_known(file, "2.0.57")] == ["every"]


@pytest.mark.parametrize("version", ["2.0.57", "2.1.9"])
def test_every_entry_of_the_list_names_tests_and_gives_a_reason(version: str) -> None:
    for entry in read_known(Path(verdict.__file__).with_name("known.toml"), version):
        assert entry.tests
        assert len(entry.reason.split()) > 10


def test_a_report_is_read_with_outcomes_ids_and_counts(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="test.orm.test_query.GetTest_sqlite+pysqlite_3_40_1" name="test_get[x]">
          <properties><property name="querycache" value='{"answered": 3}'/></properties></testcase>
        <testcase classname="test.orm.test_query.GetTest" name="test_error"><error/></testcase>
        <testcase classname="test.orm.test_query.GetTest" name="test_fail"><failure/></testcase>
        <testcase classname="test.orm.test_query.GetTest" name="test_skip"><skipped/></testcase>
        </testsuite></testsuites>"""
    )

    assert run.read(report) == {
        "test/orm/test_query.py::GetTest::test_get[x]": Case("passed", {"answered": 3}),
        "test/orm/test_query.py::GetTest::test_error": Case("failed", {}),
        "test/orm/test_query.py::GetTest::test_fail": Case("failed", {}),
        "test/orm/test_query.py::GetTest::test_skip": Case("skipped", {}),
    }
