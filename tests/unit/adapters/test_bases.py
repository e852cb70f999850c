"""One base under several names: what is certain is silent, what is not is a warning, and what is
known to be another base is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedlora import InputError, aggregate, load_adapter
from fedlora.adapters.bases import base_name, common_base, same_name
from support.merging import (
    change_config,
    cli,
    made,
    pair,
    peft_effect,
    refused,
    same_effect,
    weighted,
)
from support.models import LLAMA

__all__ = ["cli", "pair"]


SNAPSHOT = "/home/a/.cache/huggingface/hub/models--google--gemma-3-4b-it/snapshots/0123abc"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["org/base", "org/base/"], "org/base"),
        (["/data/base/", "/data/base"], "/data/base"),
        (["openai-community/gpt2", "gpt2"], "openai-community/gpt2"),
        ([SNAPSHOT, "google/gemma-3-4b-it"], "google/gemma-3-4b-it"),
        ([SNAPSHOT, SNAPSHOT.replace("/home/a", "/root") + "/"], "google/gemma-3-4b-it"),
        ([None, "org/base", ""], "org/base"),
        ([None, None], None),
    ],
)
def test_spellings_that_are_certain(names: list[str | None], kept: str | None) -> None:
    parts = [made({"a": ((5, 4), 2)}, i, base_model_name_or_path=n) for i, n in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = aggregate(parts)
    assert out.notes == ()
    assert out.config["base_model_name_or_path"] == kept


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["/data/gemma-3-4b-it", "google/gemma-3-4b-it"], "google/gemma-3-4b-it"),
        (["Google/Gemma-3-4B-it", "google/gemma-3-4b-it"], "Google/Gemma-3-4B-it"),
        (
            ["unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "google/gemma-3-4b-it"],
            "google/gemma-3-4b-it",
        ),
        (["/site/a/base", "../base", "C:\\models\\base"], "/site/a/base"),
        (["org/one", "org/two"], "org/one"),
        (["gpt2", "openai-community/gpt2", "somebody/gpt2"], "openai-community/gpt2"),
    ],
)
def test_other_names_are_a_warning(
    names: list[str],
    kept: str,
    pair: list[Path],
    tmp_path: Path,
    cli: Any,
) -> None:
    parts = [made({"a": ((5, 4), 2)}, i, base_model_name_or_path=n) for i, n in enumerate(names)]
    with pytest.warns(UserWarning, match="the adapters name their base differently") as told:
        out = aggregate(parts)
    assert len(told) == len(out.notes) == 1
    assert all(name in out.notes[0] for name in names[:2])
    assert out.config["base_model_name_or_path"] == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aggregate(parts, same_base=True).notes == ()

    for path, name in zip(pair, names, strict=False):
        change_config(path, base_model_name_or_path=name)
    done = cli(*pair, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    certain = same_name(base_name({"base_model_name_or_path": names[0]}), names[1])
    assert said.count("name their base differently") == (0 if certain else 1)
    for given in (["--same_base"], ["--same_base", "true"]):
        done = cli(*pair, "--output", tmp_path / f"out{len(given)}", *given)
        assert done.code == 0, done.err
        assert "differently" not in done.out + done.err
    refused(
        cli(*pair, "--output", tmp_path / "o", "--same_base", "7"), "--same_base: is given alone"
    )


def test_other_revisions_are_a_warning() -> None:
    parts = [
        made({"a": ((5, 4), 2)}, i, base_model_name_or_path="org/base", revision=r)
        for i, r in enumerate((None, "v1", "v2"))
    ]
    with pytest.warns(UserWarning, match="revision: v1, v2"):
        out = aggregate(parts)
    assert out.config["revision"] == "v1"
    assert aggregate(parts, same_base=True).notes == ()


def test_a_revision_belongs_to_the_name_that_is_written() -> None:
    parts = [
        made({"a": ((5, 4), 2)}, 0, base_model_name_or_path="/data/base", revision="mine"),
        made({"a": ((5, 4), 2)}, 1, base_model_name_or_path="org/base"),
    ]
    out = aggregate(parts, same_base=True)
    assert (out.config["base_model_name_or_path"], out.config["revision"]) == ("org/base", None)


def test_other_shapes_are_refused_whatever_is_said(tmp_path: Path) -> None:
    parts = [made({"a": ((5, 4 + i), 2)}, i) for i in range(2)]
    with pytest.raises(InputError, match="different base models"):
        aggregate(parts, same_base=True)


def llama(path: Path, seed: int = 0, shards: bool = False, dtype: Any = torch.float32) -> str:
    """A random base on this machine."""
    torch.manual_seed(seed)
    config = LlamaConfig(**LLAMA)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(path, max_shard_size="20KB" if shards else "1GB")
    return str(path)


def test_bases_that_are_here_are_compared(
    pair: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
    cli: Any,
) -> None:
    one = llama(tmp_path / "one")
    again = llama(tmp_path / "again", shards=True)
    other = llama(tmp_path / "other", seed=1)
    short = llama(tmp_path / "short", dtype=torch.bfloat16)
    assert len(list(Path(again).glob("*.safetensors"))) > 1
    wanted = weighted([peft_effect(tiny_llama, p) for p in pair])
    change_config(pair[0], base_model_name_or_path=one)

    def with_base(name: str, *more: str) -> Any:
        change_config(pair[1], base_model_name_or_path=name)
        return cli(*pair, "--output", tmp_path / f"out-{Path(name).name}{len(more)}", *more)

    done = with_base(again)
    assert (done.code, "differently" in done.out) == (0, False)
    same_effect(peft_effect(tiny_llama, tmp_path / "out-again0"), wanted)
    assert "differently" in with_base(short).out  # another dtype says nothing
    refused(
        with_base(other), "both are here, and they are different models", tmp_path / "out-other0"
    )
    assert with_base(other, "--same_base").code == 0
    link = tmp_path / "link"
    link.symlink_to(one)
    done = with_base(str(link))
    assert (done.code, "differently" in done.out) == (0, False)
    kept = load_adapter(tmp_path / "out-link0").config["base_model_name_or_path"]
    AutoModelForCausalLM.from_pretrained(kept)


def test_names() -> None:
    assert base_name({"base_model_name_or_path": SNAPSHOT}) == "google/gemma-3-4b-it"
    assert base_name({}) == base_name({"base_model_name_or_path": None}) == ""
    assert base_name({"base_model_name_or_path": "/"}) == "/"
    assert same_name("gpt2", "openai-community/gpt2")
    assert not same_name("a/gpt2", "b/gpt2")
    assert common_base(["", "/x/y", "unsloth/m-bnb-4bit", "org/m"]) == "org/m"
    assert common_base(["", ""]) is None
