"""`fedlora export` from end to end: runs, rounds, classifiers, merged models, a real tiny one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import fedlora
from fedlora import Config
from fedlora.adapters.any_format import load_adapter as load_any
from fedlora.adapters.export.mlx import read_mlx
from fedlora.adapters.export.ranks import relative_distance
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.cli import main
from support.merging import peft_saves, token_ids
from support.rows import write_jsonl
from support.runs import evaluation_rows, loss_of, run

Call = Any


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Call:
    """`fedlora export ... --json` in this process: its lines, or what it says of a mistake."""

    def call(*words: object, code: int = 0) -> Any:
        capsys.readouterr()
        found = main(["export", *map(str, words), "--use_cpu", "true", "--json"])
        out = capsys.readouterr()
        lines = [json.loads(line) for line in out.out.splitlines()]
        assert found == code, out.err
        if code:
            assert out.err.startswith("fedlora: ")
            return lines[-1]["message"]
        return {line["event"]: line for line in lines}

    return call


@pytest.fixture(scope="module")
def done(tiny_llama: Path, site_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two rounds, and its keys; its global update has more directions than any client."""
    values = {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "eval_file": str(site_files / "eval.jsonl"),
        "client_ranks": [8, 4, 2, 2],
        "num_rounds": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "num_threads": 1,
        "use_cpu": True,
        "output_dir": str(tmp_path_factory.mktemp("export") / "out"),
    }
    run(values)
    return values


def logits(model: Any, number: int = 100) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids(number)).logits
    return out


def test_gguf_files_of_a_run(done: dict[str, Any], export: Call, tmp_path: Path) -> None:
    """The adapter alone: the tiny base has a tokenizer that llama.cpp does not know."""
    words = ["--format", "gguf", "--held_out", "false", "--output"]
    out = tmp_path / "g"
    said = export(done["output_dir"], *words, out, "--parts", "merged", code=2)
    assert "known here is BPE" in said
    assert "--parts adapter" in said
    assert not list(tmp_path.iterdir())
    lines = export(done["output_dir"], *words, out, "--rank", 4)
    assert lines["note"]["message"].startswith("no model.gguf: its tokenizer")
    written = lines["export"]
    assert (written["format"], written["reader"], written["rank"]) == ("gguf", "llama.cpp", 4)
    assert written["commands"][-1].endswith(f"--lora {out}/adapter.gguf")
    assert [file["path"] for file in written["files"]] == ["README.md", "adapter.gguf"]
    assert all(check["reached"] <= check["tolerance"] for check in written["checks"])
    whole = load_adapter(Path(done["output_dir"]) / "final").deltas
    found = load_any(out)
    assert {x.rank for x in found.deltas.values()} == {4}
    assert relative_distance(found.deltas, whole) == pytest.approx(written["error"], abs=1e-5)
    assert "library_name: gguf" in (out / "README.md").read_text()
    export(done["output_dir"], *words, out, "--parts", "adapter", "--overwrite")


def beside(base: Path | str, adapter: Path) -> torch.Tensor:
    """Logits of PEFT's adapter on the untouched base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def test_the_table_measures_every_rank_as_it_would_be_served(
    done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    table = export(done["output_dir"])["ranks"]
    assert table["measured_on"] == {"where": "the run's held-out rows", "rows": 10, "of": 10}
    rows = table["ranks"]
    assert [row["rank"] for row in rows][:2] == [8, 16]
    assert rows[-1]["error"] == 0.0
    assert [row["error"] for row in rows] == sorted((row["error"] for row in rows), reverse=True)
    data = evaluation_rows(done)
    final = Path(done["output_dir"]) / "final"
    base = done["model_name_or_path"]
    assert rows[-1]["loss"] == pytest.approx(loss_of(base, final, data), rel=1e-5)
    export(done["output_dir"], "--format", "peft", "--rank", 8, "--output", tmp_path / "r8")
    assert rows[0]["loss"] == pytest.approx(loss_of(base, tmp_path / "r8", data), rel=1e-5)


def test_an_adapter_of_one_rank_is_the_global_model(
    done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    out, final = tmp_path / "a", Path(done["output_dir"]) / "final"
    words = ["--format", "peft", "--for", "vllm", "--held_out", "false", "--output", out]
    written = export(done["output_dir"], *words)["export"]
    assert written["compared_by"] == "logits"
    assert written["rank"] in (8, 16, 32)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written["rank"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    base = done["model_name_or_path"]
    torch.testing.assert_close(beside(base, out), beside(base, final), rtol=0, atol=1e-4)
    assert (out / "README.md").read_text().startswith("---\n")
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


def test_a_round_and_the_share_of_energy(
    done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    source = Path(done["output_dir"]) / "round-1"
    words = ["--format", "peft", "--energy", "0.9", "--held_out", "false"]
    by_round = export(done["output_dir"], "--round", 1, *words, "--output", tmp_path / "a")
    by_path = export(source, *words, "--output", tmp_path / "b")
    one, other = load_adapter(tmp_path / "a").deltas, load_adapter(tmp_path / "b").deltas
    assert relative_distance(one, other) < 1e-7
    assert by_round["export"]["error"] == by_path["export"]["error"] <= 0.1**0.5
    distance = relative_distance(one, load_adapter(source).deltas)
    assert distance == pytest.approx(by_path["export"]["error"], abs=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_merged_model_is_the_global_model(
    dtype: str, bound: float, done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    words = ["--format", "merged", "--dtype", dtype, "--max_shard_size", "20KB", "--output", out]
    words += ["--chat_template_path", "vicuna", "--held_out", "false"]
    written = export(done["output_dir"], *words)["export"]
    assert [check["tolerance"] for check in written["checks"]] == [1.5, bound]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == f"torch.{dtype}"
    assert (out / "model.safetensors.index.json").exists()
    wanted = beside(done["model_name_or_path"], Path(done["output_dir"]) / "final")
    assert float((logits(model) - wanted).abs().max()) <= bound * float(wanted.abs().max())
    base = GenerationConfig.from_pretrained(done["model_name_or_path"])
    assert GenerationConfig.from_pretrained(out).eos_token_id == base.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 100
    assert "USER" in tokenizer.chat_template


def test_mistakes_and_what_is_there_already(
    done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    words = ["--format", "peft", "--held_out", "false", "--output"]
    export(done["output_dir"], *words, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    assert "--overwrite to replace it" in export(done["output_dir"], *words, out, code=2)
    export(done["output_dir"], *words, out, "--rank", 2, "--overwrite")
    assert (out / "adapter_model.safetensors").read_bytes() != before
    run_itself = done["output_dir"]
    assert "holds what is exported" in export(run_itself, *words, run_itself, code=2)
    assert "holds no round-9" in export(run_itself, "--round", 9, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_client_of_a_method_without_a_global_model(
    done: dict[str, Any], export: Call, tmp_path: Path
) -> None:
    out = Path(run(done, "fedsa", method="fedsa", client_ranks=4, num_rounds=1).output_dir)
    message = export(out, code=2)
    assert "choose one by --model: client-0, client-1, client-2, client-3" in message
    words = ["--model", "client-1", "--format", "peft", "--output", tmp_path / "a"]
    assert export(out, *words)["export"]["error"] == 0.0
    found, own = (load_adapter(x).deltas for x in (tmp_path / "a", out / "final" / "client-1"))
    assert relative_distance(found, own) < 1e-6


def test_a_quantised_base_is_refused_and_the_original_is_not(
    done: dict[str, Any], tiny_llama: Path, export: Call, tmp_path: Path
) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_llama, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    words = [done["output_dir"], "--format", "merged", "--output", tmp_path / "m"]
    message = export(*words, "--base", quantised, code=2)
    assert "its weights are quantised (gptq)" in message
    assert "Give the unquantised model with --base" in message
    assert not (tmp_path / "m").exists()
    export(*words, "--base", tiny_llama, "--held_out", "false", "--check", "weights")


def test_a_classifier_with_its_head(tiny_llama: Path, export: Call, tmp_path: Path) -> None:
    labels = ("ham", "spam", "else")
    texts = [{"text": "abc "[: 1 + i % 4] * 3, "label": labels[i % 3]} for i in range(36)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    write_jsonl(tmp_path / "eval.jsonl", texts[:9])
    config = Config(
        model_name_or_path=str(tiny_llama),
        train_file=str(tmp_path / "train.jsonl"),
        eval_file=str(tmp_path / "eval.jsonl"),
        label_column_name="label",
        client_ranks=[4, 2],
        num_rounds=1,
        max_steps=2,
        learning_rate=1e-2,
        num_threads=1,
        use_cpu=True,
        output_dir=str(tmp_path / "run"),
    )
    result = fedlora.run(config)
    table = export(tmp_path / "run")["ranks"]
    assert table["saved_whole"] == ["score.weight"]
    assert table["ranks"][-1]["loss"] == pytest.approx(result.evaluations[1]["loss"], rel=1e-5)
    message = export(tmp_path / "run", "--format", "peft", "--for", "vllm", "--output", "x", code=2)
    assert "score: trained whole; vLLM loads no adapter" in message
    for kind, dtype in (("peft", []), ("merged", ["--dtype", "float32"])):
        out = tmp_path / kind
        words = ["--format", kind, *dtype, "--output", out, "--held_out", "false"]
        assert export(tmp_path / "run", *words)["export"]["compared_by"] == "logits"
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == dict(enumerate(sorted(labels)))
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=3, dtype=torch.float32, pad_token_id=0
    )
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "peft"))
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)


@pytest.fixture
def stories(material: Path) -> Path:
    """A real model of 260,000 parameters whose output layer is its embedding."""
    path = material / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("the real material has no stories260K on this machine")
    return path


def _stories_adapter(stories: Path, path: Path, targets: Sequence[str]) -> Path:
    """Ranks that differ by module."""
    return peft_saves(
        path, stories, r=6, lora_alpha=3, target_modules=list(targets), rank_pattern={"v_proj": 3}
    )


def test_stories_in_every_format(stories: Path, export: Call, tmp_path: Path) -> None:
    adapter = _stories_adapter(stories, tmp_path / "in", ["q_proj", "v_proj", "down_proj"])
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"text": "Once upon a time there was a cat."}, {"text": "The end."}])
    table = export(adapter, "--eval_file", rows)["ranks"]
    assert table["measured_on"]["where"] == "rows.jsonl"
    assert all(row["loss"] > 0 for row in table["ranks"])
    wanted = beside(stories, adapter)
    size = float(wanted.abs().max())
    for reader in ("peft", "llama.cpp", "ollama"):
        out = tmp_path / reader
        done = export(adapter, "--format", "peft", "--for", reader, "--output", out)
        assert done["export"]["rank"] == 6
        assert float((beside(stories, out) - wanted).abs().max()) < 1e-4 * size
    out = tmp_path / "mlx"
    export(adapter, "--format", "peft", "--for", "mlx", "--output", out)
    assert relative_distance(read_mlx(out, 5), load_adapter(adapter).deltas) < 1e-6
    out = tmp_path / "merged"
    export(adapter, "--format", "merged", "--output", out, "--for", "ollama")
    assert (out / "Modelfile").read_text().splitlines()[-1] == "FROM ./model.gguf"
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert merged.config.tie_word_embeddings
    assert float((logits(merged) - wanted).abs().max()) < 1e-4 * size
    assert "huggingface.co" not in (out / "README.md").read_text()


def test_stories_whose_output_layer_is_no_longer_its_embedding(
    stories: Path, export: Call, tmp_path: Path
) -> None:
    adapter = _stories_adapter(stories, tmp_path / "in", ["v_proj", "lm_head"])
    words = ["--format", "merged", "--output", tmp_path / "merged"]
    export(adapter, *words)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    wanted = beside(stories, adapter)
    assert float((logits(merged) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    message = export(
        adapter, "--format", "peft", "--for", "llama.cpp", "--output", tmp_path / "x", code=2
    )
    assert "tied weights" in message
