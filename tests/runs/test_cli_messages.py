"""What the command line says without running anything: help, configurations, mistakes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

import fedlora
from fedlora.commands.cli import VERBS, main
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG
from support.script import (
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    files,
    here,  # noqa: F401
    site,  # noqa: F401
)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for verb in VERBS:
        assert f"fedlora {verb}" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_verb(
    verb: str, flag: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--seed", "1", flag]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"fedlora {verb}")
    assert max(map(len, captured.out.splitlines())) <= 100
    assert captured.err == ""
    assert list(here.iterdir()) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedlora {fedlora.__version__}\n"


def test_config_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    captured = capsys.readouterr()
    assert Config(**yaml.safe_load(captured.out)) == Config(**Config().flat())
    assert captured.err == ""


def test_config_prints_the_embedded_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "embedded"]) == 0
    printed = Config(**yaml.safe_load(capsys.readouterr().out))
    assert printed.flat() == Config(**read_yaml(CONFIG)).flat()
    assert len(printed.client_ranks) == 10  # type: ignore[arg-type]


def test_config_of_a_file_with_keys_over_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my.yaml").write_text("lora_r: 4\nseed: 7\nlearning_rate: 1e-3\n")
    keys = "--lora_r=8 --client_ranks 4 4 2 2 --train_file none --use_rslora --output_dir 'a: #b'"
    assert main(["config", "my.yaml", *shlex.split(keys)]) == 0
    given = {"client_ranks": [4, 4, 2, 2], "use_rslora": True, "output_dir": "a: #b"}
    wanted = Config(**{"lora_r": 8, "seed": 7, "learning_rate": 1e-3, **given})
    assert Config(**yaml.safe_load(capsys.readouterr().out)).flat() == wanted.flat()


def without_a_tokenizer(model: Path, here: Path) -> None:
    (here / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "bare" / name).write_bytes((model / name).read_bytes())


def prepare(here: Path, model: Path) -> None:
    """What the table below refers to."""
    without_a_tokenizer(model, here)
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("years of work")
    (here / "a_file").write_text("x")
    (here / "broken.yaml").write_text("seed: 1\nlora_r: [4\nnum_rounds: 2\n")
    (here / "twice.yaml").write_text("seed: 1\nlora_r: 4\nseed: 2\n")
    (here / "list.yaml").write_text("- a\n")
    (here / "no_rows.jsonl").write_text("")
    (here / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')


RUN = "run my.yaml "


BAD: list[tuple[str, list[str]]] = [
    # verbs and keys
    ("rn", ["rn: no such verb; did you mean run?"]),
    ("zzz", ["zzz: no such verb; there are run, partition, data, aggregate, export, config"]),
    (RUN + "--lora_rnk 4", ["lora_rnk: unknown configuration key; did you mean lora_r?"]),
    (RUN + "--seed 1 --seed 2", ["--seed is given twice"]),
    ("run 8 --seed 1", ["8: no such configuration file"]),
    (RUN + "8", ["'8': expected --key value"]),
    (RUN + "--num_rounds", ["num_rounds: True: expected a whole number (a key without a value"]),
    (RUN + "--resume", ["--resume: give the output directory"]),
    # the file
    ("run missing.yaml", ["missing.yaml: no such configuration file"]),
    ("run empty", ["empty: cannot be read as a configuration: Is a directory"]),
    ("run broken.yaml", ["broken.yaml, line 3: broken YAML"]),
    ("run twice.yaml", ["twice.yaml, line 3: seed is given twice"]),
    ("run list.yaml", ["list.yaml: expected 'key: value' lines, found a list"]),
    # values
    (RUN + "--client_ranks many", ["client_ranks: 'many': expected a whole number, a list of"]),
    (RUN + "--lora_r 0", ["lora_r: '0' must be at least 1"]),
    (RUN + "--learning_rate nan", ["learning_rate: 'nan' must be a finite number"]),
    (RUN + "--num_rounds 0", ["num_rounds: '0' must be at least 1"]),
    (RUN + "--method flor", ["method: 'flor'", "did you mean flora?"]),
    (RUN + "--method flora --start_fraction 1", ["start_fraction: method flora has no such opt"]),
    (RUN + "--method fedit", ["method: fedit needs one rank for all clients", "8 4 2 2"]),
    # data
    ("run", ["{base}"]),
    (RUN + "--train_file none", ["no data: give train_file or dataset_name"]),
    (RUN + "--train_file nope.jsonl", ["nope.jsonl: no such file"]),
    (RUN + "--train_file 'nope_*.jsonl'", ["train_file: ", "nope_*.jsonl: the pattern matches no"]),
    (RUN + "--eval_file nope.jsonl", ["nope.jsonl: no such file"]),
    (RUN + "--eval_file no_rows.jsonl", ["no_rows.jsonl: holds no rows"]),
    (RUN + "--eval_file bad.jsonl", ["bad.jsonl, line 2: malformed JSON"]),
    (RUN + "--train_file x --dataset_name y", ["train_file and dataset_name exclude each other"]),
    (RUN + "--dataset_name nobody/data", ["dataset_name: nobody/data: split 'train' cannot be"]),
    (RUN + "--client_ranks 4 4", ["client_ranks: 2", "matches 4 files"]),
    (RUN + "--num_clients 3", ["num_clients: 3", "matches 4 files"]),
    (
        RUN + "--train_file {sites}/site_3.jsonl --client_ranks none --num_clients 9",
        ["num_clients: 9 clients for 8 rows"],
    ),
    (
        RUN + "--train_file {sites}/site_0.jsonl --num_clients 3",
        ["num_clients: 3, client_ranks: 4: these do not name the same"],
    ),
    (RUN + "--clients_per_round 9", ["clients_per_round: 9, but there are 4 clients"]),
    (RUN + "--metric_for_best_model eval_bleu", ["metric_for_best_model: 'eval_bleu' is not me"]),
    (
        RUN + "--eval_file none --load_best_model_at_end",
        ["load_best_model_at_end needs something to evaluate on"],
    ),
    # model
    (
        RUN + "--lora_target_modules query",
        ["lora_target_modules: 'query' matches no linear layer", "q_proj, k_proj, v_proj, o_proj"],
    ),
    (
        RUN + "--lora_target_modules q_proj query",
        ["lora_target_modules: 'query' matches no linear layer", "q_proj, k_proj, v_proj, o_proj"],
    ),
    (
        RUN + "--model_name_or_path empty",
        ["model_name_or_path: ", "/empty: the model cannot be loaded"],
    ),
    (
        RUN + "--model_name_or_path nobody/nothing",
        ["model_name_or_path: nobody/nothing: the model cannot be loaded"],
    ),
    (RUN + "--model_name_or_path bare", ["model_name_or_path: ", "/bare: the tokenizer cannot be"]),
    (
        RUN + "--tokenizer_name empty",
        ["tokenizer_name: ", "/empty: the tokenizer cannot be loaded"],
    ),
    (RUN + "--init_adapter empty", ["init_adapter: ", "empty: holds no adapter_config.json"]),
    (RUN + "--init_adapter nowhere", ["init_adapter: ", "nowhere: holds no adapter_config.json"]),
    # where to write
    (RUN + "--output_dir full", ["output_dir: full is not empty"]),
    (RUN + "--output_dir a_file", ["output_dir: a_file is a file"]),
    (RUN + "--output_dir a_file/out", ["output_dir: a_file/out: cannot be made"]),
    (RUN + "--output_dir .", ["output_dir: . is not empty"]),
    ("run --resume nowhere", ["--resume nowhere: nothing to resume; there is no config.yaml"]),
    ("run --resume full --seed 1", ["--resume full: nothing to resume; there is no config.yaml"]),
    ("config --lora_r 0", ["lora_r: '0' must be at least 1"]),
    ("config missing.yaml", ["missing.yaml: no such configuration file"]),
    ("demo --method flora", ["method: the demo compares exact and flora"]),
]


@pytest.mark.parametrize(("line", "parts"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(
    line: str,
    parts: list[str],
    site: Path,
    tiny_llama: Path,
    site_files: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2, one clear line on standard error, nothing written."""
    prepare(site, tiny_llama)
    # Whether or not the package's own base is there: a base that is not.
    monkeypatch.setattr("fedlora.runs.session.BASE_DIR", site / "empty")
    before = files(site), sorted(site.rglob("*"))
    assert main(shlex.split(line.format(sites=site_files, base=""))) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedlora: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part.format(base="empty: the model cannot be loaded") in captured.err
    assert (files(site), sorted(site.rglob("*"))) == before


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "argv"),
    [
        ("fedlora.commands.run.quiet_libraries", ["run", "my.yaml"]),
        ("fedlora.engines.local.assemble", ["run", "my.yaml"]),
        ("fedlora.config.sources.read_yaml", ["config", "my.yaml"]),
        ("fedlora.commands.demo.showcase.demo", ["demo"]),
    ],
)
def test_interrupted_before_anything_is_written(
    where: str,
    argv: list[str],
    site: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, interrupt)
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() in ("stopped", "stopped before anything was written")
    assert not (site / "out").exists()
