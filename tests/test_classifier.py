"""Sequence classifiers: new heads, labels, training as transformers does it, scores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor

import fedlora
from conftest import rows, save_tokenizer, write_jsonl
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.client.evaluate import evaluate, scores
from fedlora.client.trainer import Budget
from fedlora.federation.exchange import global_delta
from fedlora.lowrank import to_dense, unfold
from fedlora.methods import METHODS
from fedlora.model.base import BaseModel
from fedlora.runs.session import Session, assemble
from test_architectures import (
    COMMON,
    DISTILBERT,
    GPT2,
    GROUPED,
    LABELS,
    Rounds,
    Trained,
    assert_same_logits,
    by_peft,
    keys_of,
    labelled_rows,
    logits,
    padded,
    save_model,
    train_federation,
)
from test_train import RANK, SCALE, adapter_of, by_trainer, losses_of, same, start_of

WEIGHTS = "adapter_model.safetensors"
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as published ones are: with a pooler, without a classifier; no dropout."""
    path = tmp_path_factory.mktemp("models") / "bert"
    return save_model(path, hf.BertConfig(**COMMON, **STILL), hf.BertModel)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, its output head apart from the embeddings."""
    path = tmp_path_factory.mktemp("models") / "llama"
    return save_model(path, hf.LlamaConfig(**GROUPED))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients' rows of three labels, and held-out ones."""
    path = tmp_path_factory.mktemp("data")
    for site, number in enumerate((11, 7)):
        write_jsonl(path / f"label_{site}.jsonl", labelled_rows(number, 11 * site))
        write_jsonl(path / f"text_{site}.jsonl", rows(number, 11 * site))
    write_jsonl(path / "eval_label.jsonl", labelled_rows(8, 1000))
    write_jsonl(path / "eval_text.jsonl", rows(5, 1000))
    return path


def sites(path: Path, *parts: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    """A directory of data as `keys_of` reads it."""
    path.mkdir()
    for site, part in enumerate(parts):
        write_jsonl(path / f"label_{site}.jsonl", part)
    write_jsonl(path / "eval_label.jsonl", held_out)
    return path


def classifier_of(bert: Path, path: Path, labels: Sequence[str]) -> Path:
    """A checkpoint that has a head for these labels already."""
    config = hf.AutoConfig.from_pretrained(bert)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    torch.manual_seed(3)
    model = hf.AutoModelForSequenceClassification.from_pretrained(bert, config=config)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.bias.normal_()
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def session_of(model: Path, data: Path, out: Path, **more: Any) -> Session:
    return assemble(fedlora.Config(**keys_of(model, data, out, True, **more)))


# --- what users load ---


@pytest.fixture(scope="module")
def trained(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A classifier trained for two rounds."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return train_federation(keys_of(bert, data, out, True))


def test_the_saved_directory_holds_the_label_names(trained: Trained, bert: Path) -> None:
    config = hf.AutoConfig.from_pretrained(trained.result.final_dir)
    assert config.id2label == dict(enumerate(LABELS))
    assert config.label2id == {name: i for i, name in enumerate(LABELS)}
    assert config.num_labels == 3
    assert config.problem_type == "single_label_classification"
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(bert, config=config)
    loaded = PeftModel.from_pretrained(theirs, trained.result.final_dir)
    assert_same_logits(trained.ours().model, loaded)
    assert_same_logits(trained.ours().model, loaded.merge_and_unload())
    for number in (1, 2):
        there = trained.result.output_dir / f"round-{number}"
        assert hf.AutoConfig.from_pretrained(there).id2label == config.id2label


def test_the_saved_configuration_names_the_classifier(trained: Trained) -> None:
    """Not the architecture of the checkpoint that training began with."""
    config = hf.AutoConfig.from_pretrained(trained.result.final_dir)
    assert config.architectures == ["BertForSequenceClassification"]


def test_ways_to_load_a_classifier(trained: Trained) -> None:
    final, ours = trained.result.final_dir, trained.ours().model
    config = hf.AutoConfig.from_pretrained(final)
    named = AutoPeftModelForSequenceClassification.from_pretrained(
        final, id2label=config.id2label, label2id=config.label2id
    )
    assert_same_logits(ours, named)
    assert named.config.id2label == dict(enumerate(LABELS))
    pipe = hf.pipeline(
        "text-classification",
        model=by_peft(trained),
        tokenizer=hf.AutoTokenizer.from_pretrained(final),
        top_k=None,
    )
    text = "a stone>x"
    found = {entry["label"]: entry["score"] for entry in pipe([text])[0]}
    ids = {"input_ids": torch.tensor([pipe.tokenizer(text)["input_ids"]])}
    ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    wanted = logits(ours, ids).softmax(-1)[0].tolist()
    assert found == pytest.approx(dict(zip(LABELS, wanted, strict=True)), rel=1e-4)


WAYS: dict[str, Any] = {
    "AutoModel": lambda path: hf.AutoModelForSequenceClassification.from_pretrained(path),
    "AutoModel, with its configuration": lambda path: (
        hf.AutoModelForSequenceClassification.from_pretrained(
            path, config=hf.AutoConfig.from_pretrained(path)
        )
    ),
    "AutoPeftModel": lambda path: AutoPeftModelForSequenceClassification.from_pretrained(path),
    "pipeline": lambda path: hf.pipeline("text-classification", model=str(path)).model,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_no_way_to_load_gives_another_model_silently(trained: Trained, way: Any) -> None:
    """Either an error, or the classifier that was trained."""
    try:
        loaded = way(trained.result.final_dir)
    except (OSError, RuntimeError, ValueError):
        return
    assert_same_logits(trained.ours().model, loaded)


def test_a_base_without_padding_token_is_loaded_with_the_one_used(
    data: Path, tmp_path: Path
) -> None:
    """GPT-2 has none; batches of texts of different lengths need one."""
    path = save_model(tmp_path / "gpt2", hf.GPT2Config(**{**GPT2, "pad_token_id": None}))
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(path)
    trained = train_federation(keys_of(path, data, tmp_path / "out", True))
    batch = padded()
    batch["input_ids"][batch["attention_mask"] == 0] = 2
    theirs = by_peft(trained)
    assert theirs.config.pad_token_id == 2
    assert_same_logits(trained.ours().model, theirs, batch)
    short = {name: x[2:, :7] for name, x in batch.items()}
    torch.testing.assert_close(logits(theirs, short), logits(theirs, batch)[2:])


# --- new heads ---

SHAPES: dict[str, Any] = {
    "bert": lambda: (hf.BertConfig(**COMMON), hf.BertForMaskedLM),
    "roberta": lambda: (hf.RobertaConfig(**COMMON), hf.RobertaForMaskedLM),
    "distilbert": lambda: (hf.DistilBertConfig(**DISTILBERT), hf.DistilBertForMaskedLM),
    "llama": lambda: (hf.LlamaConfig(**GROUPED), hf.LlamaForCausalLM),
    "gpt2": lambda: (hf.GPT2Config(**GPT2), hf.GPT2LMHeadModel),
}
HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "llama": {"score"},
    "gpt2": {"score"},
}


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that lacks everything of a classifier's head."""
    config, kind = SHAPES[request.param]()
    return save_model(tmp_path_factory.mktemp("models") / request.param, config, kind)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_everything_new_is_trained_whole(shape: Path, data: Path, tmp_path: Path) -> None:
    session = session_of(shape, data, tmp_path)
    owners = {name.rpartition(".")[0] for name in session.base.full_params}
    assert owners == HEADS[shape.name]
    start = session.base.read_full_params()
    after = train_federation(keys_of(shape, data, tmp_path / "out", True)).state.dense
    assert after.keys() == start.keys()
    assert all(not torch.equal(after[name], start[name]) for name in start)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_heads_are_averaged_by_every_rule(
    method: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    ranks = [3, 2] if METHODS[method].mixed_ranks else [3, 3]
    rounds = Rounds(session_of(bert, data, tmp_path, method=method, client_ranks=ranks))
    for _ in (1, 2):
        before, _, updates = rounds.next()
        for name, value in rounds.server.state.dense.items():
            assert all(not torch.equal(u.dense[name], before.dense[name]) for u in updates.values())
            assert not torch.equal(updates[0].dense[name], updates[1].dense[name])
            mean = (11 * updates[0].dense[name].double() + 7 * updates[1].dense[name].double()) / 18
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
            assert value.dtype == torch.float32
        head = sum(t.nbytes for t in before.dense.values())
        for client, sent in updates.items():
            factors = sum(
                x.A.nbytes * ("A" in sent.sends) + x.B.nbytes * ("B" in sent.sends)
                for x in sent.adapter.values()
            )
            assert rounds.record.clients[client].bytes_up == factors + head
            assert rounds.record.clients[client].bytes_down >= head


def test_a_new_head_is_drawn_from_the_seed_alone(bert: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = session_of(bert, data, tmp_path).base.read_full_params()
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    again = session_of(bert, data, tmp_path, method="flora", lora_r=5).base.read_full_params()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(again[name], x) for name, x in first.items())
    assert first["classifier.weight"].abs().min() > 0
    other = session_of(bert, data, tmp_path, seed=43).base.read_full_params()
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_a_head_is_float32_on_a_bfloat16_base(shape: Path, data: Path, tmp_path: Path) -> None:
    keys = keys_of(shape, data, tmp_path / "out", True, dtype="bfloat16", max_steps=6)
    base = assemble(fedlora.Config(**keys)).base
    assert {x.dtype for x in base.full_params.values()} == {torch.float32}
    frozen = {p.dtype for n, p in base.model.named_parameters() if n not in base.full_params}
    assert frozen == {torch.bfloat16}
    found = logits(base.model)
    assert found.dtype == torch.float32
    wide = assemble(fedlora.Config(**{**keys, "dtype": "float32"})).base
    torch.testing.assert_close(found, logits(wide.model), rtol=0.05, atol=0.02)
    trained = train_federation(keys)
    start = base.read_full_params()
    for name, value in trained.state.dense.items():
        moved = value - start[name]
        assert moved.any()
        # Steps that bfloat16 would have rounded away are there.
        assert not torch.equal(value, value.bfloat16().float())
    losses = [trained.result.evaluations[number]["loss"] for number in (0, 2)]
    assert losses[1] < losses[0]
    saved = load_file(trained.result.final_dir / WEIGHTS)
    assert {x.dtype for x in saved.values()} == {torch.float32}
    theirs = by_peft(trained, dtype=torch.bfloat16)
    ours = logits(trained.ours().model)
    torch.testing.assert_close(logits(theirs).float(), ours, rtol=0.05, atol=0.03)


# --- modules trained whole in a causal model ---


WHOLE = {
    "lm_head": ["lm_head"],
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "input_layernorm": [f"model.layers.{i}.input_layernorm" for i in (0, 1)],
    "mlp": [f"model.layers.{i}.mlp" for i in (0, 1)],
    "layers.1": ["model.layers.1"],
}
"""What is asked for -> the modules that are trained whole."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "whole", [["lm_head"], ["embed_tokens"], ["mlp"], ["layers.1"], ["norm", "input_layernorm"]]
)
def test_modules_of_a_causal_model_are_trained_whole(
    whole: list[str], dtype: str, llama: Path, data: Path, tmp_path: Path
) -> None:
    keys = keys_of(
        llama, data, tmp_path / "out", False, lora_modules_to_save=whole, dtype=dtype, max_steps=4
    )
    trained = train_federation(keys)
    base = assemble(trained.config).base
    start, modules = base.read_full_params(), [module for name in whole for module in WHOLE[name]]
    assert set(base.targets.modules_to_save) == set(modules)
    plain = hf.AutoModelForCausalLM.from_pretrained(llama)
    inside = {
        f"{module}.{end}": value
        for module in modules
        for end, value in plain.get_submodule(module).named_parameters()
    }
    assert start.keys() == inside.keys()
    kind = getattr(torch, dtype)
    assert all(torch.equal(x, inside[name].to(kind).float()) for name, x in start.items())
    for name, value in trained.state.dense.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, start[name])
        assert dtype == "float32" or not torch.equal(value, value.bfloat16().float())
    saved = load_adapter(trained.result.final_dir)
    assert all(torch.equal(saved.dense[n], x) for n, x in trained.state.dense.items())
    theirs = by_peft(trained, dtype=kind)
    if dtype == "float32":
        assert_same_logits(trained.ours().model, theirs)
    else:
        ours = logits(trained.ours().model).float()
        torch.testing.assert_close(logits(theirs).float(), ours, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fedsa"}))  # which has no global model
def test_an_output_head_is_trained_under_every_rule(
    method: str, llama: Path, data: Path, tmp_path: Path
) -> None:
    more = {"lora_modules_to_save": ["lm_head"], "method": method, "client_ranks": [3, 3]}
    keys = keys_of(llama, data, tmp_path / "out", False, **more)
    trained = train_federation(keys)
    start = assemble(trained.config).base.read_full_params()
    assert not torch.equal(trained.state.dense["lm_head.weight"], start["lm_head.weight"])
    assert_same_logits(trained.ours().model, by_peft(trained))
    without = {**keys, "lora_modules_to_save": None, "output_dir": str(tmp_path / "without")}
    assert train_federation(without).state.dense == {}


def test_tied_weights_are_trained_whole_on_both_their_ends(data: Path, tmp_path: Path) -> None:
    path = save_model(tmp_path / "tied", hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    both = {"lora_modules_to_save": ["lm_head", "embed_tokens"]}
    trained = train_federation(keys_of(path, data, tmp_path / "out", False, **both))
    one, other = trained.state.dense.values()
    assert torch.equal(one, other)
    assert not torch.equal(one, assemble(trained.config).base.read_full_params()["lm_head.weight"])
    assert_same_logits(trained.ours().model, by_peft(trained))


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_tied_weights_are_not_trained_whole(whole: str, data: Path, tmp_path: Path) -> None:
    path = save_model(tmp_path / "tied", hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    keys = keys_of(path, data, tmp_path / "out", False, lora_modules_to_save=[whole])
    with pytest.raises(fedlora.InputError, match=r"lora_modules_to_save: .*tied weights") as found:
        fedlora.run(fedlora.Config(**keys))
    assert "lm_head.weight" in str(found.value)
    assert "model.embed_tokens.weight" in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [["lm_head", "nothing"], ["act_fn"], ["score"], ["head"]])
def test_unknown_modules_are_not_trained_whole(
    whole: list[str], llama: Path, data: Path, tmp_path: Path
) -> None:
    keys = keys_of(llama, data, tmp_path / "out", False, lora_modules_to_save=whole)
    with pytest.raises(fedlora.InputError, match=f"lora_modules_to_save: '{whole[-1]}'") as found:
        fedlora.run(fedlora.Config(**keys))
    assert "model, lm_head" in str(found.value)


def test_what_is_trained_whole_gets_no_adapter(llama: Path, data: Path, tmp_path: Path) -> None:
    keys = keys_of(llama, data, tmp_path, False, lora_modules_to_save=["layers.1.mlp.up_proj"])
    targets = assemble(fedlora.Config(**keys)).base.targets
    assert "model.layers.0.mlp.up_proj" in targets.shapes
    assert "model.layers.1.mlp.up_proj" not in targets.shapes
    trained = train_federation({**keys, "output_dir": str(tmp_path / "out")})
    assert_same_logits(trained.ours().model, by_peft(trained))
    keys["lora_target_modules"] = ["layers.1.mlp.up_proj"]
    with pytest.raises(fedlora.InputError, match="is trained whole"):
        assemble(fedlora.Config(**keys))


# --- going on from an adapter with a head ---


@pytest.mark.parametrize("shape", ["distilbert", "roberta", "llama"], indirect=True)
def test_a_run_goes_on_from_a_classifier_that_peft_saved(
    shape: Path, data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    model = hf.AutoModelForSequenceClassification.from_pretrained(shape, num_labels=3)
    targets = {"distilbert": ["q_lin"], "roberta": ["query"], "llama": ["q_proj"]}[shape.name]
    more = ["pre_classifier"] if shape.name == "distilbert" else []
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=6,
        target_modules=targets,
        modules_to_save=more or None,
        init_lora_weights=False,
    )
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    keys = keys_of(shape, data, tmp_path / "out", True, init_adapter=str(tmp_path / "peft"))
    trained = train_federation(keys)
    session = assemble(trained.config)
    theirs.config.pad_token_id = 0
    wanted = evaluate(
        theirs, None, session.data.eval, batch_size=4, label_names=session.data.label_names
    )
    assert trained.result.evaluations[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert trained.result.evaluations[0]["per_class"] == wanted["per_class"]
    fresh = train_federation({**keys, "init_adapter": None, "output_dir": str(tmp_path / "fresh")})
    assert fresh.result.evaluations[0]["loss"] != pytest.approx(wanted["loss"], rel=1e-3)
    given = load_adapter(tmp_path / "peft").dense
    assert given.keys() == trained.state.dense.keys()
    assert all(not torch.equal(trained.state.dense[n], x) for n, x in given.items())
    assert_same_logits(trained.ours().model, by_peft(trained))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_goes_on_from_one_of_its_own(
    method: str, trained: Trained, bert: Path, data: Path, tmp_path: Path
) -> None:
    more = {"init_adapter": str(trained.result.final_dir), "method": method, "client_ranks": [3, 3]}
    next_one = train_federation(keys_of(bert, data, tmp_path / "out", True, **more))
    ended, begun = trained.result.evaluations[2], next_one.result.evaluations[0]
    assert begun["loss"] == pytest.approx(ended["loss"], rel=1e-5)
    if method != "fedsa":  # whose evaluation is a mean over models
        assert begun["per_class"] == ended["per_class"]


def test_a_head_of_other_labels_is_not_gone_on_from(
    trained: Trained, bert: Path, data: Path, tmp_path: Path
) -> None:
    more = {"init_adapter": str(trained.result.final_dir)}
    four = [*LABELS, "yak"]
    keys = keys_of(bert, data, tmp_path / "out", True, **more, label_names=four)
    with pytest.raises(fedlora.InputError, match=r"init_adapter: "):
        fedlora.run(fedlora.Config(**keys))
    # As many labels in another order would silently mean something else.
    keys = keys_of(bert, data, tmp_path / "out", True, **more, label_names=list(LABELS[::-1]))
    with pytest.raises(fedlora.InputError, match=r"init_adapter: .*label"):
        fedlora.run(fedlora.Config(**keys))


# --- the best round, and killed runs ---


@pytest.mark.parametrize("best", ["the start", "a round"])
def test_the_best_round_brings_its_head(best: str, bert: Path, data: Path, tmp_path: Path) -> None:
    keys = keys_of(
        bert,
        data,
        tmp_path / "out",
        True,
        num_rounds=4,
        learning_rate=1e-2 if best == "the start" else 0.06,
        greater_is_better=best == "the start",
        load_best_model_at_end=True,
        save_total_limit=None,
    )
    run = train_federation(keys)
    chosen = run.result.best_round
    losses = {number: found["loss"] for number, found in run.result.evaluations.items()}
    pick = max if best == "the start" else min
    assert chosen == pick(losses, key=losses.__getitem__)
    assert chosen == 0 if best == "the start" else chosen in (1, 2, 3)
    final = load_adapter(run.result.final_dir)
    last = load_adapter(run.result.output_dir / "round-4")
    assert not torch.equal(final.dense["classifier.weight"], last.dense["classifier.weight"])
    if best == "the start":
        start = assemble(run.config).base.read_full_params()
        assert all(torch.equal(final.dense[name], x) for name, x in start.items())
        assert not any(to_dense(x).any() for x in final.deltas.values())
    else:
        saved = run.result.output_dir / f"round-{chosen}" / WEIGHTS
        assert (run.result.final_dir / WEIGHTS).read_bytes() == saved.read_bytes()
    session = assemble(run.config)
    found = evaluate(
        by_peft(run), None, session.data.eval, batch_size=3, label_names=session.data.label_names
    )
    assert found["loss"] == pytest.approx(losses[chosen], rel=1e-5)


KILLED = """
import os, signal, sys
import fedlora
from fedlora.engines import local
from fedlora.config.sources import read_yaml

def report(event):
    if event["event"] == "round":
        report.round = event["round"]
    if event["event"] == "step" and report.round == 1 and event["client"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)

report.round = 0
fedlora.run(fedlora.Config(**read_yaml(sys.argv[1])), report=report)
"""


def test_a_killed_classifier_run_ends_with_the_same_bytes(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    keys = keys_of(
        bert, data, tmp_path / "killed", True, num_rounds=3, server_momentum=0.5, lora_dropout=0.1
    )
    config = fedlora.Config(**keys)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "killed.py").write_text(KILLED)
    code = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    assert code.returncode == -signal.SIGKILL, code.stderr.decode()
    killed = tmp_path / "killed"
    assert (killed / "round-1").is_dir()
    assert not (killed / "round-2").exists()
    resumed = fedlora.run(resume=killed)
    whole = fedlora.run(fedlora.Config(**{**keys, "output_dir": str(tmp_path / "whole")}))
    assert [line["round"] for line in resumed.metrics] == [0, 0, 1, 2, 3, 3]
    for part in ("round-2", "round-3", "final"):
        for name in (WEIGHTS, "config.json", "adapter_config.json"):
            ours = (killed / part / name).read_bytes()
            assert ours == (whole.output_dir / part / name).read_bytes()
    assert resumed.evaluations == whole.evaluations


# --- training is that of transformers ---


def peft_classifier(path: Path, session: Session) -> Any:
    """The untouched base with PEFT's layers, beginning at `start_of` and our head."""
    base = session.base
    torch.manual_seed(0)
    model = get_peft_model(
        hf.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=3, dtype=torch.float32, pad_token_id=0
        ),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            target_modules=list(base.targets.shapes),
            modules_to_save=list(base.targets.modules_to_save),
            task_type="SEQ_CLS",
        ),
    )
    for name, x in start_of(base).items():
        a, b = unfold(x, SCALE)
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    for name, parameter in heads_of(model).items():
        parameter.data = base.read_full_params()[name]
    return model


def heads_of(model: Any) -> dict[str, Tensor]:
    """The parameters PEFT trains whole, by their names in the plain model."""
    mark = ".modules_to_save.default"
    return {
        name.replace(mark, "").removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if mark in name
    }


CLIPPED = Budget(
    client=2,
    round=3,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=2,
    weight_decay=0.1,
    adam_epsilon=1e-2,  # of the size of gradients, or Adam would undo the clipping
    max_grad_norm=0.3,
    num_train_epochs=3,
)
BUDGETS = {
    "clipping, warm-up, decay, a partial batch": CLIPPED,
    "no clipping, other moments": Budget(
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        adam_beta1=0.8,
        adam_beta2=0.95,
        max_grad_norm=0.0,
        num_train_epochs=2.5,
    ),
}


def compare(path: Path, session: Session, budget: Budget, where: Path) -> list[float]:
    """Train both ways; losses, adapters and heads are the same."""
    base, data = session.base, session.data.clients[0].train
    assert len({len(row["input_ids"]) for row in data}) > 2  # there is padding
    model, start = peft_classifier(path, session), base.read_full_params()
    assert heads_of(model).keys() == start.keys()
    losses, _ = by_trainer(model, data, budget, where)
    ours = losses_of(base, data, budget)
    assert len(ours) == len(losses) == budget.steps(len(data)) > 3
    assert max(losses) - min(losses) > 0.05
    assert ours == pytest.approx(losses, rel=3e-5)
    same(base.read_adapter(), adapter_of(model, base), 5e-3)
    trained = base.read_full_params()
    for name, theirs in heads_of(model).items():
        limit = 5e-3 * float(theirs.abs().max())
        torch.testing.assert_close(trained[name], theirs.detach(), rtol=0, atol=limit)
        assert float((trained[name] - start[name]).abs().max()) > 10 * limit
    return ours


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_training_a_classifier_is_that_of_transformers(
    bert: Path, data: Path, budget: Budget, tmp_path: Path
) -> None:
    compare(bert, session_of(bert, data, tmp_path), budget, tmp_path)


def test_training_a_causal_classifier_is_that_of_transformers(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    """It reads the last token that is no padding."""
    compare(llama, session_of(llama, data, tmp_path), CLIPPED, tmp_path)


def test_an_accumulated_step_is_that_of_the_whole_batch(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Where Trainer, whose classifiers are not told the rows of a step, adds means of batches."""
    session = session_of(bert, data, tmp_path)
    rows_of = session.data.clients[0].train[:8]
    at_once = replace(CLIPPED, per_device_train_batch_size=8, num_train_epochs=4)
    start = session.base.read_full_params()
    whole = losses_of(session.base, rows_of, at_once)
    session.base.load([], None, full_params=start)
    parts = replace(at_once, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert losses_of(session.base, rows_of, parts) == pytest.approx(whole, rel=1e-5)


def gradients(base: BaseModel, data: Any) -> tuple[float, float]:
    """The norms of the adapter's and of the head's gradient in the first step of `CLIPPED`."""
    from fedlora.client.trainer import batches
    from fedlora.model.batches import collate
    from fedlora.model.loss import summed_loss

    base.load([], start_of(base), SCALE)
    micro = next(iter(batches(data, CLIPPED, 1)))
    base.model.train()
    (summed_loss(base.model, collate(micro[0]))[0] / len(micro[0])).backward()
    heads = {id(p) for p in base.full_params.values()}
    trained = [p for p in base.model.parameters() if p.requires_grad]
    sums = [0.0, 0.0]
    for p in trained:
        sums[id(p) in heads] += float(p.grad.square().sum())
        p.grad = None
    return sums[0] ** 0.5, sums[1] ** 0.5


def test_gradients_are_clipped_over_adapter_and_head_together(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """One plain step with the limit between the parts and the whole: only the sum exceeds it."""
    session = session_of(bert, data, tmp_path)
    base, part = session.base, session.data.clients[0].train
    adapter, head = gradients(base, part)
    together = (adapter**2 + head**2) ** 0.5
    limit = (max(adapter, head) + together) / 2
    assert max(adapter, head) < limit < 0.999 * together
    # With a huge epsilon and no moments AdamW's step is `-lr / eps * gradient`.
    eps = 1e4
    budget = replace(
        CLIPPED,
        adam_beta1=0.0,
        adam_beta2=0.0,
        adam_epsilon=eps,
        learning_rate=eps,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_steps=1,
    )
    start = base.read_full_params()

    def moved(max_grad_norm: float) -> dict[str, Tensor]:
        base.load([], None, full_params=start)
        losses_of(base, part, replace(budget, max_grad_norm=max_grad_norm))
        return {name: x - start[name] for name, x in base.read_full_params().items()}

    free, clipped = moved(0.0), moved(limit)
    for name, x in free.items():
        torch.testing.assert_close(clipped[name], x * (limit / together), rtol=1e-3, atol=1e-6)
    size = sum(float(x.square().sum()) for x in free.values()) ** 0.5
    assert size == pytest.approx(head, rel=1e-2)


def test_clipping_is_active_in_the_comparison(bert: Path, data: Path, tmp_path: Path) -> None:
    session = session_of(bert, data, tmp_path)
    part, start = session.data.clients[0].train, session.base.read_full_params()
    clipped = losses_of(session.base, part, CLIPPED)
    session.base.load([], None, full_params=start)
    free = losses_of(session.base, part, replace(CLIPPED, max_grad_norm=0.0))
    assert free != pytest.approx(clipped, rel=1e-3)


# --- scores ---


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=40
        ).map(lambda pairs: (n, pairs))
    )
)
@settings(deadline=None, max_examples=60)
def test_scores_are_those_of_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    number, pairs = case
    truth, guess = [t for t, _ in pairs], [g for _, g in pairs]
    names = [f"label {i}" for i in range(number)]
    found = scores(torch.tensor(truth), torch.tensor(guess), names)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(
        f1_score(truth, guess, average="macro", zero_division=0)
    )
    table = precision_recall_fscore_support(
        truth, guess, labels=list(range(number)), zero_division=0
    )
    assert list(found["per_class"]) == names
    for i, name in enumerate(names):
        assert [found["per_class"][name][key] for key in ("precision", "recall", "f1")] == (
            pytest.approx([column[i] for column in table[:3]])
        )
        assert found["per_class"][name]["support"] == table[3][i]


def test_labels_absent_in_truth_or_guesses() -> None:
    """Of five labels one is never guessed, one never true, one neither."""
    truth, guess = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 3, 0, 0, 1]
    found = scores(torch.tensor(truth), torch.tensor(guess), list("abcde"))
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 3}
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["per_class"]["e"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    expected = f1_score(truth, guess, average="macro", zero_division=0)  # over a, b, c, d
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["macro_f1"] != pytest.approx(
        f1_score(truth, guess, average="macro", labels=range(5), zero_division=0)
    )


def test_what_a_run_logs_are_the_scores_of_its_model(trained: Trained, data: Path) -> None:
    """Row by row, unpadded, through PEFT and scikit-learn."""
    model, session = by_peft(trained), assemble(trained.config)
    guess, truth, loss = [], [], 0.0
    for row in session.data.eval:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=ids, labels=torch.tensor([row["label"]]))
        guess.append(LABELS[int(out.logits.argmax())])
        truth.append(LABELS[row["label"]])
        loss += float(out.loss)
    said = [row["label"] for row in labelled_rows(8, 1000)]
    assert truth == said
    logged = trained.result.evaluations[2]
    assert logged["loss"] == pytest.approx(loss / 8, rel=1e-4)
    assert logged["accuracy"] == accuracy_score(truth, guess)
    assert logged["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert {n: c["support"] for n, c in logged["per_class"].items()} == {
        name: said.count(name) for name in LABELS
    }


def test_a_classifier_learns_labels_that_only_some_clients_have(bert: Path, tmp_path: Path) -> None:
    one = labelled_rows(12, 0, ["cat", "dog"])
    other = [{"text": row["text"].replace("a ", "z "), "label": "yak"} for row in one]
    files = sites(tmp_path / "files", one, other, held_out=[*one[:4], *other[:4]])
    keys = keys_of(
        bert, files, tmp_path / "out", True, max_steps=8, num_rounds=6, learning_rate=2e-2
    )
    run = train_federation({**keys, "metric_for_best_model": "eval_macro_f1"})
    session = assemble(run.config)
    assert session.data.label_names == ("cat", "dog", "yak")
    assert [{row["label"] for row in part.train} for part in session.data.clients] == [{0, 1}, {2}]
    assert run.result.evaluations[6]["accuracy"] > 0.6
    assert run.result.evaluations[6]["per_class"]["yak"]["recall"] > 0.5
    assert run.warnings == ()


# --- labels ---


def test_labels_are_sorted_naturally(bert: Path, tmp_path: Path) -> None:
    labels = ["item 10", "item 9", "b", "10", "9", "item 1"]
    part = labelled_rows(12, 0, labels)
    files = sites(tmp_path / "files", part, part, held_out=part[:3])
    session = session_of(bert, files, tmp_path)
    assert session.data.label_names == ("9", "10", "b", "item 1", "item 9", "item 10")
    ids = [session.data.label_names.index(row["label"]) for row in part]
    assert [row["label"] for row in session.data.clients[0].train] == ids


def test_integer_labels(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(12, 0, [10, 2, 0])
    files = sites(tmp_path / "files", part, part[:6], held_out=part[:5])
    run = train_federation(keys_of(bert, files, tmp_path / "out", True))
    config = hf.AutoConfig.from_pretrained(run.result.final_dir)
    assert config.id2label == {0: "0", 1: "2", 2: "10"}
    assert run.result.evaluations[2]["per_class"]["10"]["support"] == 2
    rows_of = assemble(run.config).data.clients[0].train
    assert [row["label"] for row in rows_of[:3]] == [2, 1, 0]


def test_fractions_are_no_labels(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(12, 0, [0.5, 1.0])
    files = sites(tmp_path / "files", part, part, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_column_name: .*0\.5.*whole numbers"):
        session_of(bert, files, tmp_path)


def test_label_names_in_another_order(bert: Path, data: Path, tmp_path: Path) -> None:
    wanted = ["ox 9", "fig", "ox 10"]
    run = train_federation(keys_of(bert, data, tmp_path / "out", True, label_names=wanted))
    config = hf.AutoConfig.from_pretrained(run.result.final_dir)
    assert config.id2label == dict(enumerate(wanted))
    session = assemble(run.config)
    assert session.data.label_names == tuple(wanted)
    given = [row["label"] for row in labelled_rows(11)]
    assert [wanted[row["label"]] for row in session.data.clients[0].train] == given
    assert list(run.result.evaluations[2]["per_class"]) == wanted


def test_a_label_that_is_not_among_the_names_is_refused(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    keys = keys_of(bert, data, tmp_path / "out", True, label_names=["fig", "ox 9"])
    with pytest.raises(fedlora.InputError, match=r"label_names: .*not among them: ox 10"):
        fedlora.run(fedlora.Config(**keys))
    part = labelled_rows(6, 0, ["fig", "ox 9"])
    files = sites(tmp_path / "files", part, part, held_out=labelled_rows(3))
    with pytest.raises(fedlora.InputError, match=r"label_names: .*not among them: ox 10"):
        session_of(bert, files, tmp_path, label_names=["fig", "ox 9"])


def test_a_name_without_rows_gets_its_place_and_a_warning(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    names = ["fig", "ox 9", "ox 10", "yak"]
    run = train_federation(keys_of(bert, data, tmp_path / "out", True, label_names=names))
    assert run.warnings == ("no client has a row of the label yak",)
    assert run.state.dense["classifier.weight"].shape == (4, 32)
    assert run.result.evaluations[2]["per_class"]["yak"]["support"] == 0


def test_one_label_is_no_classification(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6, 0, ["fig"])
    files = sites(tmp_path / "files", part, part, held_out=labelled_rows(3))
    with pytest.raises(fedlora.InputError, match=r"label has one value \(fig\) in all 12"):
        session_of(bert, files, tmp_path)


def test_a_row_without_a_label_is_named(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6)
    hole = [*part[:2], {"text": "a", "label": None}]
    files = sites(tmp_path / "files", part, hole, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_1\.jsonl, row 3 has no label"):
        session_of(bert, files, tmp_path)


# --- checkpoints that are classifiers already ---


def test_the_same_labels_keep_the_order_and_the_head(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    order = ["ox 10", "fig", "ox 9"]
    path = classifier_of(bert, tmp_path / "classifier", order)
    session = session_of(path, data, tmp_path)
    assert session.data.label_names == tuple(order)
    saved = load_file(path / "model.safetensors")
    for name, value in session.base.read_full_params().items():
        assert torch.equal(value, saved[name])
    plain = hf.AutoModelForSequenceClassification.from_pretrained(path)
    assert_same_logits(plain, session.base.model)
    run = train_federation(keys_of(path, data, tmp_path / "out", True))
    assert hf.AutoConfig.from_pretrained(run.result.final_dir).id2label == dict(enumerate(order))
    assert_same_logits(run.ours().model, by_peft(run))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(run.result.final_dir)
    assert_same_logits(run.ours().model, loaded)  # the base knows the labels


@pytest.mark.parametrize(
    "labels", [["fig", "ox 9"], ["ant", "bee", "cat"], ["fig", "ox 9", "yak"]], ids=" ".join
)
def test_other_labels_get_a_new_head(
    labels: list[str], bert: Path, data: Path, tmp_path: Path
) -> None:
    """As many labels or fewer: what the old head learnt belongs to others."""
    path = classifier_of(bert, tmp_path / "classifier", labels)
    session = session_of(path, data, tmp_path)
    assert session.data.label_names == LABELS
    assert session.base.model.config.id2label == dict(enumerate(LABELS))
    old = load_file(path / "model.safetensors")
    new = session.base.read_full_params()
    assert new["classifier.weight"].shape == (3, 32)
    assert not torch.equal(new["classifier.weight"], old["classifier.weight"])
    assert not torch.equal(new["classifier.bias"], old["classifier.bias"])
    assert new["classifier.weight"].abs().max() < 0.2  # of the size of new weights, 0.02
    again = session_of(path, data, tmp_path).base.read_full_params()
    assert all(torch.equal(again[name], x) for name, x in new.items())
    other = session_of(path, data, tmp_path, seed=43).base.read_full_params()
    assert not torch.equal(other["classifier.weight"], new["classifier.weight"])
    assert set(session.base.targets.modules_to_save) == {"classifier"}


def test_names_given_in_another_order_do_not_exchange_the_meaning_of_a_head(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Its rows follow their labels, or it is drawn anew; it is never read in a wrong order."""
    path = classifier_of(bert, tmp_path / "classifier", LABELS)
    kept = session_of(path, data, tmp_path).base.read_full_params()["classifier.weight"]
    turned = session_of(path, data, tmp_path, label_names=list(LABELS[::-1]))
    assert turned.data.label_names == LABELS[::-1]
    found = turned.base.read_full_params()["classifier.weight"]
    fresh = session_of(bert, data, tmp_path, label_names=list(LABELS[::-1])).base.read_full_params()
    assert torch.equal(found, kept.flip(0)) or torch.equal(found, fresh["classifier.weight"])


def test_a_classifier_is_trained_without_naming_a_label_column(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """The checkpoint says what it is, the columns are called text and label."""
    path = classifier_of(bert, tmp_path / "classifier", LABELS)
    keys = keys_of(path, data, tmp_path / "out", True)
    del keys["label_column_name"]
    run = fedlora.run(fedlora.Config(**keys))
    assert run.evaluations[2].keys() == {"loss", "accuracy", "macro_f1", "per_class"}


def test_the_base_of_a_classifier_is_recognised_without_its_new_head(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Another head is another start, not another base; other weights are."""
    first = session_of(bert, data, tmp_path)
    assert first.base.fingerprint == session_of(bert, data, tmp_path, seed=7).base.fingerprint
    path = save_model(tmp_path / "copy", hf.AutoConfig.from_pretrained(bert), hf.BertModel)
    tensors = load_file(path / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert session_of(path, data, tmp_path).base.fingerprint != first.base.fingerprint


def test_the_global_difference_of_a_classifier_is_what_is_saved(trained: Trained) -> None:
    saved = load_adapter(trained.result.final_dir)
    whole = global_delta(trained.state)
    assert saved.deltas.keys() == whole.keys()
    for name, x in whole.items():
        torch.testing.assert_close(to_dense(saved.deltas[name]), to_dense(x))
    assert saved.dense.keys() == trained.state.dense.keys()
    assert all(torch.equal(saved.dense[name], x) for name, x in trained.state.dense.items())
