"""Heads of classifiers whose labels are others or stand in another order, on PEFT's own models.

PEFT's own logits, by the name of the label, say what is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedlora import InputError, aggregate, load_adapter, save_adapter
from support.merging import (
    cli,  # noqa: F401
    refused,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": (SMALL, ["query", "value"]),
    "roberta": (SMALL, ["query", "value"]),
    "electra": ({**SMALL, "embedding_size": 32}, ["query"]),
    "distilbert": (
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        ["q_lin"],
    ),
    "gpt2": ({"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn"]),
    "llama": ({**SMALL, "num_key_value_heads": 2}, ["q_proj"]),
}


def classifier(kind: str, labels: Sequence[str]) -> Any:
    """A random base of an architecture with these labels; its body is the same for any."""
    return copy.deepcopy(_classifier(kind, tuple(labels)))


@cache
def _classifier(kind: str, labels: tuple[str, ...]) -> Any:
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    config = AutoConfig.for_model(kind, **KINDS[kind][0], **names)
    config.pad_token_id = 0
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.base_model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return model


def saved(path: Path, kind: str, labels: Sequence[str], seed: int, beside: bool = True) -> Path:
    """A trained classifier: the same LoRA and inner layers in all, a last layer of its own."""
    path.mkdir(parents=True)
    for name, content in _files(kind, tuple(labels), seed).items():
        if beside or name != "config.json":
            (path / name).write_bytes(content)
    return path


@cache
def _files(kind: str, labels: tuple[str, ...], seed: int) -> dict[str, bytes]:
    """What PEFT writes of a classifier, and the model's configuration beside it."""
    model = get_peft_model(
        classifier(kind, labels),
        LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=KINDS[kind][1]),
    )
    body, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                last = "lora_" not in name and not any(x in name for x in ("dense", "pre_class"))
                p.copy_(0.3 * torch.randn(p.shape, generator=own if last else body))
    with TemporaryDirectory() as path:
        model.save_pretrained(path)
        model.config.save_pretrained(path)
        return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def logits(path: Path, kind: str, labels: Sequence[str]) -> dict[str, Tensor]:
    """Of every label, by its name, as PEFT computes them, in float64."""
    model = PeftModel.from_pretrained(classifier(kind, labels), path).double().eval()
    ids = torch.randint(4, 99, (6, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return {name: out[:, i] for i, name in enumerate(labels)}


def labels_of(path: Path) -> list[str]:
    """As transformers reads them."""
    found = AutoConfig.from_pretrained(path)
    assert found.num_labels == len(found.id2label)
    assert found.label2id == {name: i for i, name in found.id2label.items()}
    return [found.id2label[i] for i in range(found.num_labels)]


ORDERS = {
    "another order": (["no", "maybe", "yes"], ["yes", "no", "maybe"]),
    "some in common": (["no", "yes"], ["maybe", "yes"]),
    "nothing in common": (["no", "yes"], ["red", "green", "blue"]),
    "a part": (["a", "b", "c", "d"], ["d", "b"]),
    "the same": (["no", "yes"], ["no", "yes"]),
    "as many as the model is wide": (
        [f"l{i}" for i in range(32)],
        [f"l{31 - i}" for i in range(32)],
    ),
    "numbers in another order": (["0", "1", "2"], ["2", "0", "1"]),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_rows_are_averaged_by_the_name_of_their_label(kind: str, case: str, tmp_path: Path) -> None:
    check_by_name(kind, ORDERS[case], tmp_path)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"roberta", "gpt2"}))
def test_heads_of_other_architectures(kind: str, tmp_path: Path) -> None:
    check_by_name(kind, ORDERS["some in common"], tmp_path)


def check_by_name(kind: str, orders: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """The mean logit of each label over those that have it."""
    weights = [3.0, 1.0]
    paths = [saved(tmp_path / f"{i}", kind, o, i) for i, o in enumerate(orders)]
    save_adapter(tmp_path / "out", aggregate([load_adapter(p) for p in paths], weights))
    union = labels_of(tmp_path / "out")
    assert union == list(dict.fromkeys([*orders[0], *orders[1]]))
    theirs = [logits(p, kind, o) for p, o in zip(paths, orders, strict=True)]
    ours = logits(tmp_path / "out", kind, union)
    for name in union:
        having = [(x[name], w) for x, w in zip(theirs, weights, strict=True) if name in x]
        mean = sum(x * w for x, w in having) / sum(w for _, w in having)
        torch.testing.assert_close(ours[name], mean, rtol=1e-4, atol=1e-5, msg=name)


def test_two_perfect_classifiers_stay_perfect(tmp_path: Path, cli: Any) -> None:
    """Trained for real, on the same task with their labels in another order."""
    kind, names = "gpt2", ["low", "middle", "high"]
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (48,), generator=rng)
    ids = 4 + 30 * truth[:, None] + torch.randint(30, (48, 8), generator=rng)
    paths, orders = [], [names, ["high", "low", "middle"]]
    for order in orders:
        torch.manual_seed(7)
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"])
        model = get_peft_model(classifier(kind, order), config)
        target = torch.tensor([order.index(names[int(t)]) for t in truth])
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
        for _ in range(40):
            optimizer.zero_grad()
            model(input_ids=ids, labels=target).loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path / order[0])
        model.config.save_pretrained(tmp_path / order[0])
        paths.append(tmp_path / order[0])

    def accuracy(path: Path, order: Sequence[str]) -> float:
        model = PeftModel.from_pretrained(classifier(kind, order), path).eval()
        with torch.no_grad():
            guess = model(input_ids=ids).logits.argmax(-1)
        return sum(order[int(g)] == names[int(t)] for g, t in zip(guess, truth, strict=True)) / 48

    assert [accuracy(p, o) for p, o in zip(paths, orders, strict=True)] == [1.0, 1.0]
    done = cli(*paths, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "matched by the labels low, middle, high" in " ".join(done.out.split())
    assert accuracy(tmp_path / "out", labels_of(tmp_path / "out")) == 1.0


def test_the_readmes_recipe_works_on_the_result(tmp_path: Path) -> None:
    kind = "bert"
    orders = (["no", "yes"], ["yes", "maybe"])
    paths = [saved(tmp_path / f"{i}", kind, o, i) for i, o in enumerate(orders)]
    classifier(kind, ["x", "y"]).save_pretrained(tmp_path / "base")
    whole = json.loads((tmp_path / "base" / "config.json").read_text())
    own = json.loads((paths[0] / "config.json").read_text())
    (paths[0] / "config.json").write_text(json.dumps(whole | own | {"num_labels": 2}))
    save_adapter(tmp_path / "out", aggregate([load_adapter(p) for p in paths]))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", config=config, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 3)
    assert config.num_labels == 3
    assert config.architectures == ["BertForSequenceClassification"]
    # What was loaded keeps its labels when it is saved.
    save_adapter(tmp_path / "again", load_adapter(tmp_path / "out"))
    assert labels_of(tmp_path / "again") == ["no", "yes", "maybe"]


def test_layers_before_the_head_that_peft_trains_too_are_averaged(tmp_path: Path) -> None:
    """PEFT takes `classifier` for the end of names: DistilBERT's `pre_classifier` is trained."""
    names = ["no", "yes"]
    paths = [saved(tmp_path / str(seed), "distilbert", names, seed) for seed in (1, 2)]
    tensors = [load_file(path / "adapter_model.safetensors") for path in paths]
    key = "base_model.model.pre_classifier.weight"
    tensors[1][key] = tensors[1][key] + 0.5
    save_file(tensors[1], paths[1] / "adapter_model.safetensors")
    save_adapter(tmp_path / "out", aggregate([load_adapter(path) for path in paths], [3, 1]))
    model = PeftModel.from_pretrained(classifier("distilbert", names), tmp_path / "out")
    found = dict(model.named_parameters())
    for layer in ("pre_classifier", "classifier"):
        for end in ("weight", "bias"):
            one, other = (t[f"base_model.model.{layer}.{end}"].double() for t in tensors)
            own = found[f"base_model.model.{layer}.modules_to_save.default.{end}"]
            torch.testing.assert_close(own.double(), 0.75 * one + 0.25 * other, rtol=0, atol=1e-6)


def test_names_may_come_from_the_base(tmp_path: Path) -> None:
    """Of a base on this machine, where it has as many labels as the head has rows."""
    kind, names = "bert", ["no", "yes", "maybe"]
    classifier(kind, names).save_pretrained(tmp_path / "base")
    one = saved(tmp_path / "one", kind, ["maybe", "no", "yes"], 0)
    two = saved(tmp_path / "two", kind, names, 1, beside=False)
    config = json.loads((two / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (two / "adapter_config.json").write_text(json.dumps(config))
    out = aggregate([load_adapter(one), load_adapter(two)])
    assert out.labels == ("maybe", "no", "yes")
    mean = load_adapter(one).dense["classifier.weight"]
    mean = (mean + load_adapter(two).dense["classifier.weight"][[2, 0, 1]]) / 2
    torch.testing.assert_close(out.dense["classifier.weight"], mean)


def test_an_adapter_of_weight_zero_brings_no_labels(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{i}", "bert", o, i)
        for i, o in enumerate((["x", "y"], ["no", "yes"], ["yes", "no"]))
    ]
    out = aggregate([load_adapter(p) for p in paths], [0, 1, 1])
    assert out.labels == ("no", "yes")
    assert out.dense["classifier.weight"].shape == (2, 32)


NUMBERED = [{}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {"id2label": {"0": 0, "1": 1}}]


@pytest.mark.parametrize("first", NUMBERED)
@pytest.mark.parametrize("second", NUMBERED)
def test_numbers_are_no_names(
    first: dict[str, Any],
    second: dict[str, Any],
    tmp_path: Path,
    cli: Any,
) -> None:
    """Rows are averaged by their numbers, and it is said that nothing says more."""
    paths = []
    for i, values in enumerate((first, second)):
        path = saved(tmp_path / f"{i}", "bert", ["x", "y"], i, beside=False)
        if values:
            (path / "config.json").write_text(json.dumps({"model_type": "bert", **values}))
        paths.append(path)
    done = cli(*paths, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "is not written in an adapter" in " ".join(done.out.split())
    heads = [load_adapter(p).dense["classifier.weight"] for p in paths]
    found = load_adapter(tmp_path / "out").dense["classifier.weight"]
    torch.testing.assert_close(found, (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "does not say what labels .* another adapter has no, yes.*config.json"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "does not say what labels"),
        ({"id2label": {"0": 0, "1": 1}}, "does not say what labels"),
        ({"id2label": {"0": "no", "2": "yes"}}, r"numbers its 2 labels \[0, 2\]; expected 0 to 1"),
        ({"id2label": {"0": "no", "1": "no"}}, "names a label twice"),
        ({"id2label": ["no", "yes"]}, "id2label is no object of numbers and names"),
        ({"id2label": {"zero": "no"}}, "id2label is no object of numbers and names"),
        ({"label2id": ["no", "yes"]}, "label2id is no object"),
        ({"id2label": {"0": "No", "1": "yes"}}, "'no' and 'No' differ in case or white space"),
        ({"id2label": {"0": "no ", "1": "yes"}}, "differ in case or white space"),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            r"classifier.*does not fit the labels that its config.json names",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(
    values: dict[str, Any] | None,
    says: str,
    tmp_path: Path,
    cli: Any,
) -> None:
    one = saved(tmp_path / "one", "bert", ["no", "yes"], 0)
    two = saved(tmp_path / "two", "bert", ["no", "yes"], 1, beside=False)
    if values is not None:
        (two / "config.json").write_text(json.dumps({"model_type": "bert", **values}))
    refused(cli(one, two, "--output", tmp_path / "out"), says, tmp_path / "out")


def test_without_names_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{i}", "bert", [f"LABEL_{k}" for k in range(n)], i)
        for i, n in enumerate((2, 3))
    ]
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\).*name their labels in a config.json"):
        aggregate([load_adapter(p) for p in paths])
