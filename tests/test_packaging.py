"""What a user installs is what the repository holds."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def test_wheel_and_sdist_hold_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "importable" not in done.stdout + done.stderr, "setuptools takes a directory of data for a package"
    (wheel_path,) = tmp_path.glob("*.whl")
    (sdist_path,) = tmp_path.glob("*.tar.gz")

    sources = {
        str(installed / path.relative_to(folder))
        for folder, installed in (
            (ROOT / "querycache", Path("querycache")),
            (ROOT / "backends", Path("querycache/backends")),
        )
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel_path) as wheel:
        names = set(wheel.namelist())
        (entry_points_name,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        entry_points = configparser.ConfigParser(delimiters="=")
        entry_points.optionxform = str  # type: ignore[assignment, method-assign]
        entry_points.read_string(wheel.read(entry_points_name).decode())
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert {"querycache/py.typed", "querycache/backends/__init__.py"} <= sources
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    assert dict(entry_points["dogpile.cache"]) == _declared_backends()
    assert dict(entry_points["console_scripts"]) == {"querycache": "querycache.admin:main"}

    with tarfile.open(sdist_path) as sdist:
        top_level = {Path(*Path(name).parts[1:]) for name in sdist.getnames()}
    assert {Path("LICENSE"), Path("README.md"), Path("pyproject.toml")} <= top_level
    assert {Path("querycache/py.typed"), Path("backends/__init__.py")} <= top_level


def _declared_backends() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    backends: dict[str, str] = project["entry-points"]["dogpile.cache"]
    return backends


def test_every_entry_point_leads_to_a_module() -> None:
    backends = _declared_backends()
    assert {"querycache.memory", "querycache.redis", "querycache.memcached"} <= backends.keys()
    modules = {target.partition(":")[0].rpartition(".")[2] for target in backends.values()}
    assert modules <= {path.stem for path in (ROOT / "backends").glob("*.py")}
