"""`fedlora completion`: bash completes what the verbs take; the scripts parse where a shell is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedlora.commands import VERBS
from fedlora.commands.cli import main
from fedlora.commands.completion import EVERY_VERB, SHELLS, bash, fish, known_verbs, zsh
from fedlora.config.config import Config
from fedlora.methods import METHODS, rule_keys

KNOWN = known_verbs()
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


# --- what there is to complete ---


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_the_help_is_known_and_the_other_way_round(verb: str) -> None:
    module = import_module(VERBS[verb])
    taken = {*module.SYNTAX.options, *EVERY_VERB}
    keys = {*Config.model_fields, *rule_keys()}
    usage = module.HELP.partition("\n\n")[0]
    listed = re.findall(r"^  --.*|^ +or --.*", module.HELP, re.M)
    option = r"--([a-z][a-z_]+)"
    named = set(re.findall(option, "\n".join([usage, *listed])))
    others = {"help", "key", "option"}
    if verb == "aggregate":
        assert {*rule_keys()} & taken
        taken -= rule_keys()
    assert named - others <= taken | (keys if module.SYNTAX.keys else set())
    assert taken - {"help"} <= set(re.findall(option, module.HELP))
    assert "[--json]" in usage


def test_every_key_is_an_option_of_verbs_that_take_keys() -> None:
    keys = {*Config.model_fields, *rule_keys()} - {"method_options"}
    for verb in ("run", "partition", "data", "config", "demo", "study"):
        assert keys <= set(KNOWN[verb].options)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_described(verb: str) -> None:
    assert KNOWN[verb].about
    for option in KNOWN[verb].options.values():
        assert option.what


# --- bash ---


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
        (["report", "runs", "my"], {"my data"}),
        (["aggregate", "runs", "my"], {"my data"}),
        (["aggregate", "runs", "--output", "r"], {"runs"}),
    ],
)
def test_paths(words: list[str], found: set[str], script: Path, here: Path) -> None:
    assert set(completed(script, here, "fedlora", *words)) == found


@needs_bash
def test_every_word_offered_for_a_key_is_accepted_by_it(script: Path, here: Path) -> None:
    beside = {"partition": {"partition_column": "x"}, "template": {"completion_template": "{a}"}}
    checked = 0
    for key, option in KNOWN["run"].options.items():
        if key in ("resume", "dry_run", *EVERY_VERB) or not option.values:
            continue
        offered = completed(script, here, "fedlora", "run", f"--{key}", "")
        for word in option.values:
            assert word in offered
            if (key, word) != ("template", "custom") and key == "template":
                continue
            Config(**{**beside.get(key, {}), key: word})
            checked += 1
    assert checked > 50


# --- the verb, and other shells ---


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


@pytest.mark.parametrize("argv", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *argv]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err


def test_fish_has_every_option_of_every_verb() -> None:
    lines = fish(KNOWN).splitlines()
    for name, one in KNOWN.items():
        for key, option in one.options.items():
            own = [
                line
                for line in lines
                if f" -l {key} " in f"{line} "
                and re.search(rf"__fish_seen_subcommand_from [^']*\b{name}\b", line)
            ]
            assert len(own) == 1, (name, key)
            assert (" -r" in own[0].partition(f" -l {key}")[2]) is not option.flag
            for value in option.values:
                assert value in own[0]


def test_light_verbs_import_no_torch() -> None:
    """Help, version, doctor's own process: quick, whatever a broken library does."""
    program = """
import sys
from fedlora.commands.cli import main
main(["--help"]); main(["--version"]); main(["doctor", "--help"]); main(["report", "--help"])
heavy = {"torch", "transformers", "peft", "datasets", "pydantic", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
