"""Sequence classifiers: new heads, labels, training as transformers does it, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score

import fedlora
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.client.evaluate import evaluate
from fedlora.federation.exchange import global_delta
from fedlora.lowrank import to_dense
from fedlora.methods import METHODS
from fedlora.runs.session import assemble
from support.architectures import (
    COMMON,
    DISTILBERT,
    GPT2,
    GROUPED,
    LABELS,
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
from support.classifier import (
    WEIGHTS,
    bert,  # noqa: F401
    classifier_of,
    data,  # noqa: F401
    llama,  # noqa: F401
    session_of,
    sites,
)
from support.products import in_turn


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


@pytest.mark.parametrize(
    "method", in_turn(sorted(set(METHODS) - {"fedsa"}), 1)
)  # which has no global model
def test_an_output_head_is_trained_under_every_rule(
    method: str, llama: Path, data: Path, tmp_path: Path
) -> None:
    more = {"lora_modules_to_save": ["lm_head"], "method": method, "client_ranks": [3, 3]}
    trained = train_federation(keys_of(llama, data, tmp_path / "out", False, **more))
    start = load_file(llama / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(trained.state.dense["lm_head.weight"], start)
    assert_same_logits(trained.ours().model, by_peft(trained))


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


@pytest.mark.parametrize("method", in_turn(sorted(METHODS), 2))
def test_a_run_goes_on_from_one_of_its_own(
    method: str, trained: Trained, bert: Path, data: Path, tmp_path: Path
) -> None:
    more = {"init_adapter": str(trained.result.final_dir), "method": method, "client_ranks": [3, 3]}
    more |= {"num_rounds": 1, "max_steps": 1}
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
        bert, files, tmp_path / "out", True, max_steps=8, num_rounds=8, learning_rate=1e-2
    )
    run = train_federation({**keys, "metric_for_best_model": "eval_macro_f1"})
    session = assemble(run.config)
    assert session.data.label_names == ("cat", "dog", "yak")
    assert [{row["label"] for row in part.train} for part in session.data.clients] == [{0, 1}, {2}]
    best = run.result.evaluations[run.result.best_round]
    assert best["accuracy"] > max(0.6, run.result.evaluations[0]["accuracy"])
    assert best["per_class"]["yak"]["recall"] >= 0.5
    assert run.warnings == ()


def test_integer_labels(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(12, 0, [10, 2, 0])
    files = sites(tmp_path / "files", part, part[:6], held_out=part[:5])
    run = train_federation(keys_of(bert, files, tmp_path / "out", True))
    config = hf.AutoConfig.from_pretrained(run.result.final_dir)
    assert config.id2label == {0: "0", 1: "2", 2: "10"}
    assert run.result.evaluations[2]["per_class"]["10"]["support"] == 2
    rows_of = assemble(run.config).data.clients[0].train
    assert [row["label"] for row in rows_of[:3]] == [2, 1, 0]


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


def test_a_classifier_is_trained_without_naming_a_label_column(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """The checkpoint says what it is, the columns are called text and label."""
    path = classifier_of(bert, tmp_path / "classifier", LABELS)
    keys = keys_of(path, data, tmp_path / "out", True)
    del keys["label_column_name"]
    run = fedlora.run(fedlora.Config(**keys))
    assert run.evaluations[2].keys() == {"loss", "accuracy", "macro_f1", "per_class"}


def test_the_global_difference_of_a_classifier_is_what_is_saved(trained: Trained) -> None:
    saved = load_adapter(trained.result.final_dir)
    whole = global_delta(trained.state)
    assert saved.deltas.keys() == whole.keys()
    for name, x in whole.items():
        torch.testing.assert_close(to_dense(saved.deltas[name]), to_dense(x))
    assert saved.dense.keys() == trained.state.dense.keys()
    assert all(torch.equal(saved.dense[name], x) for name, x in trained.state.dense.items())
