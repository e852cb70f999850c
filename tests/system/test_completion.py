"""`fedlora completion`: bash completes what the verbs take; the scripts parse where a shell is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.commands import VERBS
from fedlora.commands.cli import main
from fedlora.commands.completion import EVERY_VERB, SHELLS, bash, fish, zsh
from fedlora.config.config import Config
from fedlora.methods import METHODS
from support.completion import KNOWN
from support.paths import REPOSITORY

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "fedlora.bash"
    path.write_text(bash(KNOWN))
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with things to complete, some of names that need quotes."""
    path = tmp_path / "here"
    for name in ("runs", "my data"):
        (path / name).mkdir(parents=True)
    for name in ("my.yaml", "rows.jsonl", "runs/a.yaml"):
        (path / name).write_text("")
    return path


def completed(script: Path, here: Path, *words: str) -> list[str]:
    """What bash offers at the end of these words, in an environment without any program."""
    line = " ".join(shlex.quote(word) for word in words)
    driven = f"""
        enable -n test; PATH=/nowhere
        source {shlex.quote(str(script))}
        COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _fedlora fedlora "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        [str(shutil.which("bash")), "--norc", "-c", driven],
        cwd=here,
        capture_output=True,
        text=True,
        env={"HOME": str(here)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in done.stdout.split("\n") if line]


@needs_bash
def test_verbs(script: Path, here: Path) -> None:
    assert completed(script, here, "fedlora", "") == [*VERBS, "--help", "--version"]
    assert completed(script, here, "fedlora", "re") == ["report"]


@needs_bash
def test_flags_and_keys(script: Path, here: Path) -> None:
    assert completed(script, here, "fedlora", "run", "--lora_r") == ["--lora_r"]
    found = completed(script, here, "fedlora", "run", "--re")
    assert found == ["--resume", "--report_to"]
    assert completed(script, here, "fedlora", "report", "--") == [
        "--output",
        "--format",
        "--json",
        "--help",
    ]
    assert completed(script, here, "fedlora", "run", "my.yaml", "")[:2] == ["--resume", "--dry_run"]


@needs_bash
@pytest.mark.parametrize(
    "used", [["--method", "exact"], ["--method=exact"], ["--method", "=", "e"]]
)
def test_what_is_given_already_is_not_offered(script: Path, here: Path, used: list[str]) -> None:
    found = completed(script, here, "fedlora", "run", *used, "--me")
    assert found == ["--metric_for_best_model"]


@needs_bash
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["run", "--method", "flo"], ["flora", "florist"]),
        (["run", "--method", "=", "flo"], ["flora", "florist"]),  # how bash divides --method=flo
        (["run", "--method", "="], list(METHODS)),
        (["run", "--method=flo"], ["--method=flora", "--method=florist"]),
        (["run", "--use_rslora", ""], ["true", "false"]),
        (["run", "--use-rslora", ""], ["true", "false"]),
        (["run", "--eval_exact_match", ""], ["auto", "true", "false"]),
        (["run", "--dtype", "b"], ["bfloat16"]),
        (["run", "--report_to", "wandb", "t"], ["tensorboard", "trackio"]),
        (["run", "--seed", ""], []),
        (["eval", "out", "--device", ""], ["cpu", "cuda"]),
        (["eval", "out", "--models", "base", "g"], ["global"]),
        (["aggregate", "a", "b", "--method", "ffa"], []),  # it needs a shared start
        (["report", "out", "--format", "p"], ["png", "pdf"]),
        (["study", "many"], ["many-short-rounds"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nonsense", ""], []),
    ],
)
def test_values(words: list[str], found: list[str], script: Path, here: Path) -> None:
    assert completed(script, here, "fedlora", *words) == found


@needs_bash
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["run", "--train_file", ""], {"my data", "runs", "my.yaml", "rows.jsonl"}),
        (["run", "--train_file", "my"], {"my data", "my.yaml"}),
        (["run", "--output_dir", ""], {"my data", "runs"}),
        (["run", "--model_name_or_path", ""], {"embedded", "my data", "runs"}),
        (["run", "runs/"], {"runs/a.yaml"}),
        (["run", "m"], {"my data", "my.yaml"}),
        (["config", "e"], {"embedded"}),
        (["watch", ""], {"my data", "runs"}),
        (["status", ""], {"my data", "runs"}),
        (["report", "runs", "my"], {"my data"}),
        (["aggregate", "runs", "my"], {"my data"}),
        (["aggregate", "runs", "--output", "r"], {"runs"}),
    ],
)
def test_paths(words: list[str], found: set[str], script: Path, here: Path) -> None:
    assert set(completed(script, here, "fedlora", *words)) == found


@needs_bash
def test_every_word_offered_for_a_key_is_accepted_by_it(script: Path, here: Path) -> None:
    beside = {
        "partition": {"partition_column": "x"},
        "template": {"completion_template": "{a}"},
        "client_ranks": {"client_memory": "6GB"},
    }
    checked = 0
    for key, option in KNOWN["run"].options.items():
        if key in ("resume", "dry_run", *EVERY_VERB) or not option.values:
            continue
        offered = completed(script, here, "fedlora", "run", f"--{key}", "")
        for word in option.values:
            assert word in offered
            if (key, word) != ("template", "custom") and key == "template":
                continue
            with_it = {"sites": {"sites": {"a": "a.sock"}}, "nvflare": {"kit": "kit"}}
            Config(**{**beside.get(key, {}), **with_it.get(word, {}), key: word})
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out == {"bash": bash, "zsh": zsh, "fish": fish}[shell](KNOWN)
    for verb in VERBS:
        assert verb in out
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not here to check the syntax")
    done = subprocess.run([program, "-n"], input=out, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_looking_at_a_run_imports_no_torch() -> None:
    program = f"""
import sys
from fedlora.commands.cli import main
assert main(["status", {str(REPOSITORY / "tests" / "data" / "run")!r}]) == 0
assert main(["watch", {str(REPOSITORY / "tests" / "data" / "run")!r}, "--once"]) == 0
heavy = {{"torch", "transformers", "peft", "datasets", "pydantic", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_light_verbs_import_no_torch() -> None:
    """Help, version, doctor's own process: quick, whatever a broken library does."""
    program = """
import sys
from fedlora.commands.cli import main
main(["--help"]); main(["--version"]); main(["doctor", "--help"]); main(["report", "--help"])
main(["worker", "--help"]); main(["worker", "--example"])
heavy = {"torch", "transformers", "peft", "datasets", "pydantic", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
