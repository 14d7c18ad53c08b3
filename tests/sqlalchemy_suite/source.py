"""SQLAlchemy's source distribution, with the tests in it, from the package index."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import sqlalchemy

__all__ = ["CACHE", "package_folder", "source_folder"]

CACHE = Path(__file__).parents[2] / "var" / "sqlalchemy-suite"
"""Where downloads and results are kept; not in version control."""


def source_folder(version: str) -> Path:
    """The unpacked source distribution, downloaded when first asked for.

    Raises:
        CalledProcessError: pip could not get it; it has said why.
    """
    folder = CACHE / f"sqlalchemy-{version}"
    if not folder.is_dir():
        _pip("download", "--no-binary", "sqlalchemy", "--dest", str(CACHE), f"sqlalchemy=={version}")
        unpacked = CACHE / "unpacked"
        shutil.unpack_archive(CACHE / f"sqlalchemy-{version}.tar.gz", unpacked, filter="data")
        # last, so that a folder of that name is always whole
        (unpacked / folder.name).rename(folder)
    return folder


def package_folder(version: str) -> Path | None:
    """Where to import this version of SQLAlchemy from; None where it is the installed one.

    Raises:
        CalledProcessError: pip could not install it; it has said why.
    """
    if version == sqlalchemy.__version__:
        return None
    folder = CACHE / f"package-{version}"
    if not folder.is_dir():
        partial = CACHE / f"partial-{version}"
        _pip("install", "--target", str(partial), f"sqlalchemy=={version}")
        partial.rename(folder)
    return folder


def _pip(command: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--no-deps", *arguments],
        check=True,
        stdout=sys.stderr,
    )
