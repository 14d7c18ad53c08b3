"""`querycache denorm`: check and repair for people, for programs, and after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Date, Engine, ForeignKeyConstraint, Integer, Uuid, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.admin import main
from querycache.denormalize import count_of, verify
from tests.denormalize import models
from tests.denormalize.keyed import keyed

Open = Callable[..., Session]


@pytest.fixture
def app(opened: Open, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ten threads, of which seven have a wrong count, in a module that --app can name."""
    m = models.counters("sql")
    with opened(m) as session:
        session.add(m.Forum(id=1))
        session.add_all([m.Thread(id=n, forum_id=1, comments=[m.Comment(score=n)]) for n in range(1, 11)])
        session.commit()
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {m.Thread.__tablename__} SET comment_count = 5 WHERE id > 3")
    monkeypatch.setitem(sys.modules, "an_app", SimpleNamespace(Base=m.Base, number=7))  # type: ignore[arg-type]
    url = engine.url.render_as_string(hide_password=False)
    return SimpleNamespace(m=m, engine=engine, url=url)


def test_check_and_repair(app: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["--app", "an_app:Base", "denorm", "check", "--url", app.url]
    assert main(check) == 1
    out = capsys.readouterr().out
    assert "Thread.comment_count of 4: stored 5, should be 1" in out
    assert "7 wrong, 0 repaired" in out
    assert main(["--app", "an_app:Base", "denorm", "repair", "--url", app.url, "--batch", "4"]) == 1
    assert "7 wrong, 7 repaired" in capsys.readouterr().out
    assert main([*check, "--sample", "2"]) == main(check) == 0
    assert verify(app.engine, app.m.Base).right


def test_for_programs(app: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--app", "an_app:Base", "--json", "denorm"]
    assert main([*common, "check", "--url", app.url]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["checked"] == {"Forum": 1, "Thread": 10}
    assert (answer["wrong"], answer["repaired"]) == (7, 0)
    first = {"aggregate": "Thread.comment_count", "key": [4], "stored": 5, "counted": 1}
    assert answer["differences"][0] == first
    assert main([*common, "repair", "--url", app.url]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["wrong"], answer["repaired"], answer["last"]["Thread"]) == (7, 7, [10])
    assert main([*common, "check", "--url", app.url]) == 0


def test_an_interrupted_repair_goes_on(
    app: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from querycache.admin import denorm

    def interrupt(entity: str, done: int, total: int, report: Any) -> None:
        if (entity, done) == ("Thread", 6):
            raise KeyboardInterrupt

    repair = ["--app", "an_app:Base", "denorm", "repair", "--url", app.url, "--batch", "3"]
    with monkeypatch.context() as patched:
        patched.setattr(denorm, "_bar", interrupt)
        assert main(repair) == 130
    said = capsys.readouterr()
    assert "3 wrong, 3 repaired" in said.out
    after = said.err.split("--after '")[1].split("'")[0]
    assert json.loads(after) == {"Forum": [1], "Thread": [6]}
    assert main([*repair, "--after", after]) == 1
    assert "4 Thread checked: 4 wrong, 4 repaired" in capsys.readouterr().out
    assert verify(app.engine, app.m.Base).right


def test_keys_that_json_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    Base: Any = declarative_base()

    class Day(Base):
        __tablename__ = "day"
        at = mapped_column(Date, primary_key=True)
        owner = mapped_column(Uuid, primary_key=True)
        visits = relationship("Visit")
        n = count_of("visits", type_=Integer)

    class Visit(Base):
        __tablename__ = "visit"
        __table_args__ = (ForeignKeyConstraint(["at", "owner"], ["day.at", "day.owner"]),)
        id = mapped_column(Integer, primary_key=True)
        at = mapped_column(Date)
        owner = mapped_column(Uuid)

    url = f"sqlite:///{tmp_path / 'days.db'}"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    owner = uuid.UUID(int=5)
    with Session(engine) as session:
        session.add_all([Day(at=date(2020, 1, n), owner=owner, visits=[Visit()]) for n in (1, 2, 3)])
        session.commit()
        session.connection().exec_driver_sql("UPDATE day SET n = 7")
        session.commit()
    monkeypatch.setitem(sys.modules, "days", SimpleNamespace(Base=Base))  # type: ignore[arg-type]
    after = json.dumps({"Day": ["2020-01-01", str(owner)]})
    common = ["--app", "days:Base", "--json", "denorm"]
    assert main([*common, "repair", "--url", url, "--after", after]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["repaired"], answer["last"]) == (2, {"Day": ["2020-01-03", str(owner)]})
    assert main([*common, "check", "--url", url]) == 1
    assert json.loads(capsys.readouterr().out)["differences"][0]["key"] == ["2020-01-01", str(owner)]
    engine.dispose()


WRONG = {
    "no app": (
        ["denorm", "check", "--url", "sqlite://"],
        "--app must be given as MODULE:ATTRIBUTE, got None",
    ),
    "no attribute": (["--app", "an_app", "denorm", "sql", "--dialect", "sqlite"], "MODULE:ATTRIBUTE"),
    "no module": (["--app", "nowhere.at:all", "denorm", "sql", "--dialect", "sqlite"], "No module named"),
    "nothing there": (["--app", "an_app:Nothing", "denorm", "sql", "--dialect", "sqlite"], "Nothing"),
    "not a base": (["--app", "an_app:number", "denorm", "sql", "--dialect", "sqlite"], "is 7; it must be a"),
    "no database": (["--app", "an_app:Base", "denorm", "check"], "required: --url"),
    "unknown database": (["--app", "an_app:Base", "denorm", "check", "--url", "dbase://"], "--url dbase://"),
    "no dialect": (["--app", "an_app:Base", "denorm", "sql"], "--url --dialect is required"),
    "unknown dialect": (["--app", "an_app:Base", "denorm", "sql", "--dialect", "dbase"], "--dialect dbase"),
    "no step": (["denorm"], "required: STEP"),
    "after what": (
        ["--app", "an_app:Base", "denorm", "repair", "--url", "sqlite://", "--after", "7"],
        'must be like {"Thread": [17]}, got 7',
    ),
    "after a key alone": (
        ["--app", "an_app:Base", "denorm", "repair", "--url", "sqlite://", "--after", "2,x"],
        'must be like {"Thread": [17]}, got 2,x',
    ),
    "after whom": (
        ["--app", "an_app:Base", "denorm", "repair", "--url", "sqlite://", "--after", '{"User": [1]}'],
        "User: [1] is no key of Forum, Thread",
    ),
    "no such database": (
        ["--app", "an_app:Base", "denorm", "check", "--url", "sqlite:////nowhere/x.db"],
        "--url sqlite:////nowhere/x.db: the database says: unable to open database file",
    ),
    "no such database to repair": (
        ["--app", "an_app:Base", "denorm", "repair", "--url", "sqlite:////nowhere/x.db"],
        "the database says: unable to open database file",
    ),
    "no such table": (
        ["--app", "an_app:Base", "denorm", "check", "--url", "sqlite://"],
        "the database says: no such table",
    ),
    "no batch": (
        ["--app", "an_app:Base", "denorm", "check", "--url", "sqlite://", "--batch", "0"],
        "batch must be at least 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_says_what_is_wrong(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = SimpleNamespace(Base=models.counters("sql").Base, number=7)
    monkeypatch.setitem(sys.modules, "an_app", module)
    arguments, said = WRONG[case]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_a_repair_that_the_database_stops_goes_on(
    app: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from querycache.admin import denorm

    def fail(entity: str, done: int, total: int, report: Any) -> None:
        if (entity, done) == ("Thread", 6):
            raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))

    monkeypatch.setattr(denorm, "_bar", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["--app", "an_app:Base", "denorm", "repair", "--url", app.url, "--batch", "3"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert """go on with --after '{"Forum": [1], "Thread": [6]}'""" in said
    assert "the database says: server closed the connection" in said


def test_keys_of_types_that_convert_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    m = keyed("after", "enum", "sql", composite=True)
    url = f"sqlite:///{tmp_path / 'keyed.db'}"
    engine = create_engine(url)
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([m.Parent(number=1, key=key) for key in m.made])
        session.commit()
    engine.dispose()
    monkeypatch.setitem(sys.modules, "keyed", m)  # type: ignore[arg-type]
    common = ["--app", "keyed:Base", "--json", "denorm", "repair", "--url", url]
    assert main([*common, "--after", '{"Parent": [1, "EN"]}']) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["checked"], answer["last"]) == ({"Parent": 2}, {"Parent": [1, "FR"]})


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb", "sqlite"])
def test_triggers_are_printed(dialect: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module: Any = SimpleNamespace(Base=models.counters("trigger").Base)
    monkeypatch.setitem(sys.modules, "an_app", module)
    assert main(["--app", "an_app:Base", "denorm", "sql", "--dialect", dialect]) == 0
    events = 4 if dialect == "postgresql" else 3  # with TRUNCATE
    assert capsys.readouterr().out.count("CREATE TRIGGER") == events * 4
    assert main(["--app", "an_app:Base", "--json", "denorm", "sql", "--dialect", dialect]) == 0
    statements = json.loads(capsys.readouterr().out)["statements"]
    assert sum(statement.startswith("CREATE TRIGGER") for statement in statements) == events * 4


def test_the_module_runs_and_finds_modules_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from tests.denormalize.models import counters\nBase = counters('trigger').Base\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "querycache.admin",
            "--app",
            "shop:Base",
            "denorm",
            "sql",
            "--dialect",
            "sqlite",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "CREATE TRIGGER" in done.stdout
