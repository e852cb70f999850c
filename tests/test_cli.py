"""The command line as a user types it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedlora
from fedlora.commands.cli import VERBS, main
from fedlora.config.config import Config
from fedlora.config.sources import read_yaml
from fedlora.embedded import CONFIG
from fedlora.runs.metrics_log import read_metrics

FEDLORA = str(Path(sys.executable).parent / "fedlora")


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def site(here: Path, small_run: dict[str, Any]) -> Path:
    """A working directory with `my.yaml`, a run of two short rounds into `out`."""
    keys = {**small_run, "output_dir": "out", "max_steps": 1, "eval_exact_match": False}
    (here / "my.yaml").write_text(yaml.safe_dump(keys))
    return here


def environment() -> dict[str, str]:
    changing = ("FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONUNBUFFERED")
    usual = {k: v for k, v in os.environ.items() if k not in changing}
    return {**usual, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- help, version, configuration ---


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


# --- a run ---


def run_script(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FEDLORA, *argv], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def test_config_to_a_file_to_a_run(
    here: Path, small_run: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """`fedlora config > my.yaml`, then `fedlora run my.yaml`, through the installed script."""
    keys = ["--model_name_or_path", small_run["model_name_or_path"]]
    keys += ["--train_file", small_run["train_file"], "--eval_file", small_run["eval_file"]]
    keys += ["--client_ranks", "4", "4", "2", "2", "--lora_target_modules", "q_proj", "v_proj"]
    printed = run_script("config", *keys, cwd=here)
    assert (printed.returncode, printed.stderr) == (0, "")
    (here / "my.yaml").write_text(printed.stdout)
    more = ["--num_rounds", "2", "--max_steps=1", "--num_threads", "1", "--output_dir", "out"]
    done = run_script("run", "my.yaml", *more, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert "4 target modules" in lines[0]
    assert "4 clients, ranks 4 4 2 2, rows 24 16 12 8; 10 rows to evaluate on" in lines[1]
    assert lines[2].startswith("base in float32: layers 32 wide")
    assert lines[2].endswith("; clients in one pass: 4")
    assert [line.split()[0] for line in lines[3:7]] == ["round", "0", "1", "2"]
    assert lines[7].startswith("ended after round 2; best: round ")
    assert lines[8] == "final adapter: out/final  (PeftModel.from_pretrained loads it)"
    assert len(lines) == 9
    config = read_yaml(here / "out" / "config.yaml")
    assert config["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (config["num_rounds"], config["max_steps"]) == (2, 1)


def test_json(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "my.yaml", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [e["event"] for e in events] == ["begin", "start", "round", "round", "end"]
    assert events[1:] == read_metrics(site / "out")[1:]


def test_data_of_ones_own_without_a_file(
    here: Path, tiny_llama: Path, site_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second example of `fedlora run --help`: no clients or columns of the embedded data."""
    monkeypatch.chdir(site_files)
    out = here / "out"
    argv = f"""run --model_name_or_path {tiny_llama} --train_file 'site_*.jsonl'
        --eval_file eval.jsonl --lora_target_modules q_proj v_proj --learning_rate 3e-4
        --num_rounds 1 --max_steps 1 --num_threads 1 --output_dir {out}"""
    assert main(shlex.split(argv)) == 0
    config = read_yaml(out / "config.yaml")
    assert config["client_ranks"] == [16] * 4
    assert config["partition"] == "iid"
    assert config["dataset_name"] is None


def test_the_embedded_defaults_stay_without_data_of_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = list[Config]()

    class SeenError(fedlora.FedloraError):
        pass

    def run(config: Config, **_: Any) -> None:
        seen.append(config)
        raise SeenError

    monkeypatch.setattr("fedlora.engines.local.run", run)
    assert main(["run", "--num_rounds", "3", "--method", "flora"]) == 2
    assert main(["run", "--dataset_name", "embedded", "--num_rounds", "3"]) == 2
    assert main(["run", "embedded", "--num_rounds", "3"]) == 2
    embedded = read_yaml(CONFIG)
    for config in seen:
        assert config.dataset_name == "embedded"
        assert config.client_ranks == embedded["client_ranks"]
        assert config.num_rounds == 3
    assert [config.method for config in seen] == ["flora", "exact", "exact"]


def test_best_round_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Losses fall, so that the base is "best" where greater is better.
    keys = ["--greater_is_better", "true", "--load_best_model_at_end", "true", "--max_steps", "5"]
    assert main(["run", "my.yaml", *keys]) == 0
    assert "ended after round 2; best: round 0; final/ holds round 0\n" in capsys.readouterr().out


def test_no_evaluation(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "my.yaml", "--eval_file", "none"]) == 0
    out = capsys.readouterr().out
    assert "0 rows to evaluate on" in out
    assert "ended after round 2; final/ holds round 2\n" in out


# --- bad input ---


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
    ("zzz", ["zzz: no such verb; there are run, partition, data, aggregate, config, demo"]),
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


def test_an_output_directory_that_cannot_be_written(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (site / "closed").mkdir(mode=0o555)
    assert main(["run", "my.yaml", "--output_dir", "closed/out"]) == 2
    assert "output_dir: closed/out: cannot be made: Permission denied" in capsys.readouterr().err


def test_an_output_directory_that_nobody_can_make(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, where nobody can make a directory")
    assert main(["run", "my.yaml", "--output_dir", "/proc/fedlora/out"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fedlora: output_dir: /proc/fedlora/out: cannot be made: ")


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(
    site: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--model_name_or_path", str(tiny_gpt2), "--output_dir", "other", "--num_rounds", "1"]
    assert main(["run", "my.yaml", *keys]) == 0
    capsys.readouterr()
    assert main(["run", "my.yaml", "--init_adapter", "other/final"]) == 2
    message = capsys.readouterr().err
    assert "init_adapter: other/final changes transformer.h.0" in message.replace(f"{site}/", "")
    assert not (site / "out").exists()


# --- interrupted ---


LONG = 10  # rounds


def long_run(site: Path, out: str) -> list[str]:
    """Ten rounds of half a second or more, to be interrupted in one of the first."""
    keys = [
        "--num_rounds",
        str(LONG),
        "--max_steps",
        "20",
        "--eval_file",
        "none",
        "--lora_target_modules",
        "q_proj",
    ]
    return [FEDLORA, "run", "my.yaml", *keys, "--output_dir", out]


def assert_resumable(message: str, out: str, site: Path) -> None:
    """The message names a command that ends the run."""
    said = message.strip().splitlines()[-1]
    head, _, command = said.partition("Go on with: ")
    assert head == "stopped; finished rounds are saved. "
    argv = shlex.split(command)
    assert argv == ["fedlora", "run", "--resume", out]
    begun = [line["round"] for line in read_metrics(site / out) if line["event"] == "round"]
    assert begun
    assert begun[-1] < LONG
    assert main(argv[1:]) == 0
    rounds = [line["round"] for line in read_metrics(site / out) if line["event"] == "round"]
    assert rounds == list(range(1, LONG + 1))
    assert (site / out / "final" / "adapter_model.safetensors").is_file()


def test_terminated(site: Path) -> None:
    out = "my $out"  # the command must survive a shell
    argv = [*long_run(site, out), "--json"]
    with subprocess.Popen(
        argv, cwd=site, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            if json.loads(line)["event"] == "round":
                process.send_signal(signal.SIGTERM)
                break
        rest, message = process.communicate()
    assert process.returncode == 130, message
    assert {json.loads(line)["event"] for line in rest.splitlines()} <= {"round"}
    assert "Traceback" not in message
    assert_resumable(message, out, site)


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


@pytest.mark.parametrize("argv", [["--version"], ["config"]])
def test_a_reader_that_goes_away_is_no_traceback(argv: list[str], here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [FEDLORA, *argv],
        cwd=here,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


# --- in a terminal ---


def in_a_terminal(argv: list[str], cwd: Path, when: Callable[[str], bool]) -> tuple[int, str]:
    """Run in a pseudo-terminal of 80 columns; press Ctrl-C when the output so far says so."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def as_in_a_shell() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, where the tests run in background

    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment(),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=as_in_a_shell,
    )
    os.close(follower)
    text, pressed = "", False
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data.decode(errors="replace")
        if not pressed and when(text):
            os.write(leader, b"\x03")
            pressed = True
    os.close(leader)
    return process.wait(), text


def test_a_terminal_shows_bars_and_ctrl_c_gives_the_cursor_back(site: Path) -> None:
    def second_round(text: str) -> bool:
        return any(line.startswith(" " * 4 + "2 ") for line in screen(text))

    code, text = in_a_terminal(long_run(site, "out"), site, second_round)
    assert code == 130
    for part in ("rounds ", "clients ", "steps ", "━", f"/{LONG}"):
        assert part in text
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in text
    assert show in text.rpartition(hide)[2]
    lines = [line for line in screen(text) if line.strip()]
    assert max(map(len, lines)) <= 80
    head = next(n for n, line in enumerate(lines) if line.startswith("round "))
    introduction = " ".join(" ".join(lines[:head]).split())
    assert "2 target modules, method exact, 10 rounds -> out 4 clients, ranks 8 4" in introduction
    rows = [line.split()[0] for line in lines[head + 1 :] if re.match(r" +\d", line)]
    assert rows[:3] == ["0", "1", "2"]
    assert "Traceback" not in text
    assert_resumable(lines[-1], "out", site)


def screen(text: str) -> list[str]:
    """The lines that stay, without colours and what was erased."""
    lines = [line.rpartition("\x1b[2K")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\^C", "", line) for line in lines]
