"""The sources can be read by every Python that the package claims, and import nothing it lacks."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src" / "fedlora").rglob("*.py"))

_GONE_IN_3_12 = "asynchat asyncore distutils imp smtpd"
_GONE_IN_3_13 = (
    "aifc audioop cgi cgitb chunk crypt imghdr lib2to3 mailcap msilib nis nntplib ossaudiodev "
    "pipes sndhdr spwd sunau telnetlib uu xdrlib"
)
GONE = {*_GONE_IN_3_12.split(), *_GONE_IN_3_13.split()}
"""Modules of the standard library of 3.11 that later versions have not."""

GONE_NAMES = {
    ("ast", name) for name in ("Num", "Str", "Bytes", "NameConstant", "Ellipsis")
} | {  # 3.14
    ("pkgutil", "find_loader"),
    ("pkgutil", "get_loader"),
    ("asyncio", "get_child_watcher"),
    ("importlib", "find_loader"),
    ("locale", "resetlocale"),
    ("unittest", "makeSuite"),
}
"""Functions of it that later versions have not."""


def test_the_lowest_version_is_the_first_that_is_claimed() -> None:
    claimed = [
        line.rpartition(" ")[2]
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert claimed == sorted(claimed, key=lambda version: int(version.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={claimed[0]}"


def test_sources_are_read_by_the_lowest_version_and_import_nothing_that_went() -> None:
    oldest = (3, int(PROJECT["requires-python"].rpartition(".")[2]))
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(), feature_version=oldest)):
            if isinstance(node, ast.Import):
                assert not GONE & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                module = (node.module or "").partition(".")[0]
                assert module not in GONE, path
                assert not GONE_NAMES & {(module, alias.name) for alias in node.names}, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in GONE_NAMES, path
