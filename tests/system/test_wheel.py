"""The built wheel is complete, and works where nothing of the checkout is in reach."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


PACKAGE = ROOT / "src" / "fedlora"


BASE = PACKAGE / "embedded" / "base"


COMMANDS = PACKAGE / "commands"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the caller's Python settings; return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out]
    run(*build, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The paths of a new environment that holds the wheel and sees the dependencies."""
    env_dir = tmp_path_factory.mktemp("env")
    venv.EnvBuilder(with_pip=True).create(env_dir)
    prefix = {"base": str(env_dir), "platbase": str(env_dir)}
    paths = {
        name: Path(sysconfig.get_path(name, scheme="venv", vars=prefix))
        for name in ("scripts", "purelib")
    }
    python = paths["scripts"] / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*install, wheel, cwd=env_dir)

    # A .pth file appends the directories it names, but the .pth files inside those are not
    # read, so an editable install of fedlora that lies in them does not come along.
    dependencies = [
        entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))
    ]
    (paths["purelib"] / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return paths


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())

    assert "fedlora/py.typed" in shipped
    assert "fedlora/embedded/config.yaml" in shipped
    assert "fedlora/embedded/base/config.json" in shipped
    assert any(Path(name).match("fedlora/embedded/base/*.safetensors") for name in shipped)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in shipped)
    data = [BASE, COMMANDS / "report" / "page", COMMANDS / "report" / "vendor"]
    data.append(COMMANDS / "study" / "studies")
    assert all(folder.is_dir() for folder in data)
    files = [path for folder in data for path in folder.rglob("*") if path.is_file()]
    expected = [*PACKAGE.rglob("*.py"), *files]
    missing = {path.relative_to(PACKAGE.parent).as_posix() for path in expected} - shipped
    assert not missing


@pytest.mark.slow
def test_installed_wheel_runs_in_an_empty_directory(
    installed: dict[str, Path], tmp_path: Path
) -> None:
    where = run(
        installed["scripts"] / "python",
        "-c",
        "import fedlora; print(fedlora.__file__)",
        cwd=tmp_path,
    )
    assert Path(where.strip()).resolve().is_relative_to(installed["purelib"].resolve())

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run(installed["scripts"] / "fedlora", "--version", cwd=tmp_path)
    assert run(installed["scripts"] / "fedlora", "config", cwd=tmp_path).strip()
    short = [
        "--num_rounds",
        "1",
        "--max_steps",
        "1",
        "--max_eval_samples",
        "4",
        "--num_threads",
        "1",
    ]
    run(installed["scripts"] / "fedlora", "run", *short, "--output_dir", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()
    module = run(installed["scripts"] / "python", "-m", "fedlora", "--version", cwd=tmp_path)
    assert version in module


def test_what_the_package_imports_is_declared() -> None:
    """The test above sees the developer's packages; this finds a dependency nobody declared."""
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "fedlora"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + [
        line
        for extra in ("eval", "nvflare", "flower", "gguf", "quantized")
        for line in extras[extra]
    ]
    names = {re.split(r"[<>=]", line)[0].lower() for line in declared}
    assert {{"yaml": "pyyaml"}.get(name, name) for name in imported} == names
