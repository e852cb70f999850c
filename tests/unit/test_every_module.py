"""Every module has its unit file: `tests/unit/<package>/test_<module>.py`, which imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from fedlora.methods import METHODS
from support.paths import REPOSITORY

SOURCE, UNIT = REPOSITORY / "src" / "fedlora", REPOSITORY / "tests" / "unit"
RULES = {f"methods/{name}.py" for name in METHODS}
"""`methods/<rule>.py` are tested over all rules at once: the law of their sums by test_encode_law,
the formulas of their papers by tests/runs/test_rule_formulas.py."""


def modules() -> list[Path]:
    """Modules that need a unit file, as paths below `src/fedlora`."""
    paths = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    left_out = ("__init__.py", "__main__.py")
    return [p for p in paths if p.name not in left_out and p.as_posix() not in RULES]


def unit_file(module: Path) -> Path:
    """Where a module's tests stand."""
    return UNIT / module.parent / f"test_{module.name}"


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Full names of all that these statements import, modules and what is taken of them."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def has_tests_of(file: Path, module: str) -> bool:
    """Whether a file imports the module, at its top or within a test, and holds a test."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = module in imported(tree.body) or module in imported(ast.walk(tree))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return imports and any(function.name.startswith("test_") for function in functions)


def test_every_module_has_its_unit_file() -> None:
    missing = [m.as_posix() for m in modules() if not unit_file(m).is_file()]
    assert not missing, f"write tests/unit/<package>/test_<module>.py of: {', '.join(missing)}"


def test_every_unit_file_imports_its_module_and_tests_something() -> None:
    wrong = [
        f"{unit_file(module).relative_to(REPOSITORY)} of {name}"
        for module in modules()
        if unit_file(module).is_file()
        and not has_tests_of(
            unit_file(module), name := ".".join(("fedlora", *module.with_suffix("").parts))
        )
    ]
    assert not wrong, f"no test of their module in: {', '.join(wrong)}"


def test_the_rules_that_need_no_file_of_their_own_exist() -> None:
    assert all((SOURCE / name).is_file() for name in RULES)
