"""`fedlora doctor`: what it says of machines that are well, and of those that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedlora.commands.cli import main
from fedlora.commands.doctor import checks as doctor
from fedlora.commands.doctor import probe as probing
from fedlora.commands.doctor import verb as doctor_verb
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check, Machine, examine

WELL: dict[str, dict[str, Any]] = {
    "torch": {"threads": 1, "cuda_build": None, "hip_build": None},
    "cuda": {"there": False},
    "mps": {"there": False},
    "hub": {"cache": "/tmp", "home": "/tmp", "offline": False},
    "transformers": {},
    "peft": {},
    "datasets": {"cache": "/tmp"},
}


Examined = Callable[..., dict[str, Check]]


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examined:
    """All checks by name, of a machine that is well but for what is given."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def looked(output_dir: Path = tmp_path, **probed: Any) -> dict[str, Check]:
        found = {**WELL, **probed}
        return {check.name: check for check in examine(Machine(output_dir, found))}

    return looked


def typed(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlora", "doctor", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_on_this_machine() -> None:
    done = typed("--json", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    for name in ("torch", "transformers", "peft", "datasets"):
        assert checks[name] == {
            "name": name,
            "state": OK,
            "found": metadata.version(name),
            "remedy": "",
        }
    assert checks["hub"]["state"] == WARNING
    assert "HF_HUB_OFFLINE=1" in checks["hub"]["found"]
    for name in ("Python", "device", "cores", "memory", "output", "cache of models"):
        assert name in checks


def fake(path: Path, text: str) -> Path:
    """A broken torch that is found before the real one."""
    (path / "torch").mkdir(parents=True)
    (path / "torch" / "__init__.py").write_text(text)
    return path


BROKEN = {
    "raise OSError('libcudart.so.12: cannot open shared object file')": "libcudart.so.12",
    "import nothing_of_the_kind": "No module named 'nothing_of_the_kind'",
    "import os; os.abort()": "the process crashed (signal 6)",
    "import os; os._exit(3)": "the process ended with code 3",
    "raise SystemExit('no licence')": "no licence",
    "x = 1": "No module named 'torch.nn'",
    "print('hello'); raise ValueError": "ValueError",
}


@pytest.mark.parametrize("text", ["import os; os.abort()", "raise OSError('libcudart.so.12')"])
def test_a_broken_torch_is_a_line_and_no_traceback(text: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(fake(tmp_path, text)), os.environ.get("PYTHONPATH", "")])
    done = typed(PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "Traceback" not in done.stdout
    line = next(x for x in done.stdout.splitlines() if x.split()[:2] == ["problem", "torch"])
    assert "does not work" in line
    after = done.stdout.splitlines()
    assert "-> pip install --force-reinstall 'torch" in after[after.index(line) + 1]
    assert " problem" in after[-1]
    assert any(x.split()[:1] == ["ok"] for x in after)


@pytest.mark.parametrize("text", BROKEN)
def test_what_broken_libraries_say(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each probe is a process, so that the next one is tried whatever became of the last."""
    monkeypatch.setenv("PYTHONPATH", str(fake(tmp_path, text)))
    monkeypatch.setattr(probing, "_PROBED", ("torch", "hub"))
    head, _, loop = probing._PROBE.rpartition("for work in")
    monkeypatch.setattr(
        probing, "_PROBE", f"{head}for work in (torch, hub):{loop.partition(':')[2]}"
    )
    found = probing.probe()
    assert BROKEN[text] in found["torch"]["error"]
    assert "cache" in found["hub"]


def test_a_library_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_PROBED", ("torch",))
    monkeypatch.setattr(
        probing,
        "_PROBE",
        'import time\nprint(\'{"trying": "torch"}\', flush=True); time.sleep(60)',
    )
    assert probing.probe(seconds=2) == {"torch": {"error": "took over 2 s"}}


def test_a_machine_that_is_well(examined: Examined) -> None:
    found = examined()
    assert {c.name for c in found.values() if c.state == PROBLEM} == set()
    assert found["device"] == Check("device", OK, "CPU")
    assert found["hub"].found == "online"


GIB = 2**30


@pytest.mark.parametrize(
    ("cuda", "torch", "state", "words"),
    [
        (
            {"there": True, "device": "H100", "free": 70 * GIB, "total": 80 * GIB, "devices": 2},
            {},
            OK,
            "H100, the first of 2, 70.0 GiB of 80.0 GiB free",
        ),
        (
            {"there": True, "device": "H100", "free": 2 * GIB, "total": 80 * GIB, "devices": 1},
            {},
            WARNING,
            "2.0 GiB of 80.0 GiB free",
        ),
        ({"there": False}, {"cuda_build": "12.8"}, WARNING, "built for a GPU, and finds none"),
        ({"error": "RuntimeError: no kernel image"}, {}, PROBLEM, "no kernel image"),
    ],
)
def test_devices(
    cuda: dict[str, Any], torch: dict[str, Any], state: str, words: str, examined: Examined
) -> None:
    found = examined(cuda=cuda, torch={**WELL["torch"], **torch})["device"]
    assert found.state == state
    assert words in found.found
    assert bool(found.remedy) is (state != OK)


def test_a_gpu_beside_a_torch_that_cannot_use_it(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: some'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = examined()["device"]
    assert found.state == WARNING
    assert "built without CUDA" in found.found
    assert "pytorch.org" in found.remedy


def test_a_place_that_cannot_be_written(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    found = examined(tmp_path / "a_file" / "out")["output"]
    assert found.state == PROBLEM
    assert "Not a directory" in found.found
    assert found.remedy == "give another --output_dir"
    hub = {**WELL["hub"], "cache": str(tmp_path / "a_file")}
    found = examined(hub=hub)["cache of models"]
    assert found.state == PROBLEM
    assert "HF_HUB_CACHE" in found.remedy
    assert list(tmp_path.iterdir()) == [tmp_path / "a_file"]


def test_a_place_that_is_still_to_be_made(examined: Examined, tmp_path: Path) -> None:
    found = examined(tmp_path / "runs" / "first")["output"]
    assert found.state in (OK, WARNING)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("free", "state"), [(100 * GIB, OK), (2 * GIB, WARNING), (GIB // 8, PROBLEM)]
)
def test_room_on_the_disk(
    free: int, state: str, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import _ntuple_diskusage

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: _ntuple_diskusage(200, 100, free))
    assert examined()["output"].state == state


@pytest.mark.parametrize(("free", "state"), [(20 * GIB, OK), (GIB // 2, WARNING)])
def test_memory(free: int, state: str, examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (free, 32 * GIB))
    assert examined()["memory"].state == state


def test_memory_of_this_machine() -> None:
    found = doctor.memory()
    assert found is not None
    free, total = found
    assert 0 < free <= total


def test_load_and_threads(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 4.0)
    assert examined()["load"].state == OK
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    busy = examined()["load"]
    assert (busy.state, "--num_threads 1" in busy.remedy) == (WARNING, True)
    threads = examined(torch={**WELL["torch"], "threads": 16})["cores"]
    assert (threads.state, threads.remedy[:15]) == (WARNING, "--num_threads 4")


def test_versions_are_held_against_what_is_declared(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = [
        "torch>=99",
        "peft>=0.1",
        "numpy",
        "no-such-library>=1",
        "lm_eval>=999; extra == 'eval'",
        "rich; extra == 'trackers'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: declared)
    found = examined()
    assert found["torch"].state == PROBLEM
    assert found["torch"].found == f"{metadata.version('torch')}, not >=99"
    assert found["torch"].remedy == "pip install 'torch>=99'"
    assert found["peft"].state == OK
    assert found["no-such-library"] == Check(
        "no-such-library", PROBLEM, "not installed", "pip install 'no-such-library>=1'"
    )
    assert found["extra eval"].state == WARNING
    assert found["extra eval"].remedy.startswith("pip install 'fedlora[eval]'")
    assert found["extra trackers"] == Check("extra trackers", OK, "rich")


def test_what_is_declared_is_what_pyproject_says() -> None:
    import tomllib

    from support.paths import REPOSITORY

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    installed = {canonicalize_name(r.name) for r in doctor.requirements()}
    assert {"torch", "peft"} <= installed <= declared
    of_eval = {canonicalize_name(r.name) for r in doctor.requirements("eval")}
    assert of_eval == {"lm-eval", "openai"}
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_a_check_that_fails_itself_is_a_line(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(machine: Machine) -> Any:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(doctor, "CHECKS", (odd, *doctor.CHECKS))
    found = examined()
    assert found["odd"].state == WARNING
    assert "of the test" in found["odd"].found
    assert found["Python"].state == OK


def test_exit_codes_and_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_verb, "probe", lambda: WELL)
    checks = [Check("a", OK, "fine"), Check("long name", WARNING, "slow", "do this")]
    monkeypatch.setattr(doctor_verb, "examine", lambda machine: checks)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      a          fine",
        "warning long name  slow",
        "                   -> do this",
        "",
        "1 warning",
    ]
    checks.append(Check("b", PROBLEM, "gone", "fetch it"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem, 1 warning"
    assert main(["doctor", "--output_dir"]) == 2
