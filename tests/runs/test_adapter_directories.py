"""What lies in PEFT directories beside plain factors: carried as PEFT loads it, or refused with the
reason and what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fedlora import InputError, aggregate, load_adapter, save_adapter
from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME
from support.adapter_contents import saved
from support.merging import (
    change_config,
    cli,
    logits,
    older_format,
    refused,
)
from support.models import LLAMA

__all__ = ["cli"]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def base(path: Path, tied: bool = False, size: int = 100) -> Any:
    """A Llama on disk, with its vocabulary resized after loading where asked to."""
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    if size != 100:
        torch.manual_seed(5)
        model.resize_token_embeddings(size)
    return model.eval()


def merged(path: Path, model: Any) -> dict[str, Tensor]:
    """All weights of a model with an adapter merged in, in float64, by PEFT."""
    loaded = PeftModel.from_pretrained(model.double(), path)
    return {n: p.detach().clone() for n, p in loaded.merge_and_unload().state_dict().items()}


def check_carried(paths: list[Path], model: Any, tmp_path: Path, weights: list[float]) -> Any:
    """What PEFT merges of the result is the weighted mean of what it merges of each."""
    out = aggregate([load_adapter(p) for p in paths], weights)
    save_adapter(tmp_path / "out", out)
    parts = [merged(p, model()) for p in paths]
    found, plain = merged(tmp_path / "out", model()), model().double().state_dict()
    moved = 0.0
    for name, x in found.items():
        wanted = sum(w * part[name] for w, part in zip(weights, parts, strict=True)) / sum(weights)
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5, msg=name)
        moved = max(moved, float((x - plain[name]).abs().max()))
    assert moved > 0.05
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "base_weights"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, ["lm_head.weight"]),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ["model.embed_tokens.weight"]),
        (
            {"target_modules": ["lm_head", "embed_tokens"], "rank_pattern": {"embed_tokens": 5}},
            ["lm_head.weight", "model.embed_tokens.weight"],
        ),
    ],
)
def test_adapters_of_embeddings_and_of_the_output_layer(
    options: dict[str, Any], base_weights: list[str], tied: bool, tmp_path: Path
) -> None:
    def model() -> Any:
        return base(tmp_path / "base", tied)

    paths = [
        saved(tmp_path / "0", model(), 0, **options),
        saved(tmp_path / "1", model(), 1, **{**options, "r": 3, "lora_alpha": 5}),
        saved(tmp_path / "2", model(), 2),
    ]
    if tied:  # PEFT merges into one weight what is two adapters: compare what is untied
        paths = paths[:1]
        save_adapter(tmp_path / "out", aggregate([load_adapter(paths[0])] * 2))
        ours = PeftModel.from_pretrained(model(), tmp_path / "out")
        theirs = PeftModel.from_pretrained(model(), paths[0])
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
        return
    older_format(paths[1])
    out = check_carried(paths, model, tmp_path, [1, 2, 3])
    assert sorted(out.base) == base_weights
    assert any("a weight of the base, is that of" in note for note in out.notes)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_that_are_equal_are_carried(
    tied: bool, tmp_path: Path, cli: Any
) -> None:
    def model() -> Any:
        return base(tmp_path / "base", tied, 104)

    paths = [saved(tmp_path / f"{i}", model(), i) for i in range(2)]
    assert sorted(load_adapter(paths[0]).base) == ["lm_head.weight", "model.embed_tokens.weight"]
    in_bfloat = load_file(paths[1] / WEIGHTS_NAME)
    in_bfloat = {k: v if "lora" in k else v.bfloat16() for k, v in in_bfloat.items()}
    save_file(in_bfloat, paths[1] / WEIGHTS_NAME)
    done = cli(*paths, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "weights of the base carried along" in " ".join(done.out.split())
    # Loaded on a base that was resized with other random rows.
    other = base(tmp_path / "base", tied)
    other.resize_token_embeddings(104)
    with torch.no_grad():
        other.get_input_embeddings().weight[100:] = 7.0
    loaded = PeftModel.from_pretrained(other, tmp_path / "out")
    wanted = PeftModel.from_pretrained(model(), paths[0])
    found = loaded.get_base_model().get_input_embeddings().weight
    torch.testing.assert_close(found, wanted.get_base_model().get_input_embeddings().weight)


def test_resized_embeddings_that_differ_are_refused(tmp_path: Path, cli: Any) -> None:
    one, two = base(tmp_path / "base", size=104), base(tmp_path / "base", size=104)
    with torch.no_grad():
        two.get_input_embeddings().weight[101] += 1
    paths = [saved(tmp_path / "0", one, 0), saved(tmp_path / "1", two, 1)]
    done = cli(*paths, "--output", tmp_path / "out")
    refused(
        done, r"embed_tokens\.weight: .* 1 of its 104 rows differ.*resize it once", tmp_path / "out"
    )
    wide = saved(tmp_path / "2", base(tmp_path / "base", size=110), 2)
    done = cli(paths[0], wide, "--output", tmp_path / "out")
    refused(done, r"\(104, 32\) and \(110, 32\).*resized to different sizes", tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_tied_weights_that_stay_tied(options: dict[str, Any], tmp_path: Path) -> None:
    """`ensure_weight_tying`: PEFT trains embeddings and output layer as one and saves both."""

    def model() -> Any:
        return base(tmp_path / "base", tied=True)

    options = {"ensure_weight_tying": True, **options}
    paths = [saved(tmp_path / f"{i}", model(), i, **options) for i in range(2)]
    parts = [load_adapter(p) for p in paths]
    save_adapter(tmp_path / "out", aggregate(parts, [1, 3]))
    loaded = PeftModel.from_pretrained(model(), tmp_path / "out")
    state = dict(loaded.named_parameters(remove_duplicate=False))
    if "modules_to_save" in options:
        for name in ("model.embed_tokens", "lm_head"):
            key = f"base_model.model.{name}.modules_to_save.default.weight"
            wanted = (
                0.25 * parts[0].dense[f"{name}.weight"] + 0.75 * parts[1].dense[f"{name}.weight"]
            )
            torch.testing.assert_close(state[key], wanted)
    else:
        out = load_adapter(tmp_path / "out").deltas
        wanted = sum(
            w * p.deltas["lm_head"].B.double() @ p.deltas["lm_head"].A.double()
            for w, p in zip((0.25, 0.75), parts, strict=True)
        )
        found = out["lm_head"].B.double() @ out["lm_head"].A.double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert "base_model.model.lm_head.lora_A.default.weight" in state


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_bias": True}, "lora_bias is True; only plain LoRA .* merge_and_unload"),
        (
            {"trainable_token_indices": [1, 2]},
            r"trainable_token_indices is \[1, 2\].*\(modules_to_save\), or resize",
        ),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices is"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA .* DoRA's magnitudes"),
    ],
)
def test_why_it_cannot_be_combined_and_what_to_do(
    options: dict[str, Any], says: str, tmp_path: Path, cli: Any
) -> None:
    path = saved(tmp_path / "a", base(tmp_path / "base"), 1, **options)
    refused(cli(path, "--output", tmp_path / "out"), says, tmp_path / "out")
    # The weights say it too, whatever the configuration says.
    change_config(path, **dict.fromkeys(options, None))
    refused(cli(path, "--output", tmp_path / "out"), "cannot use the tensor .*: ", tmp_path / "out")


@pytest.mark.parametrize("names", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_adapters_of_experts_are_explained(names: list[str], tmp_path: Path, cli: Any) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )
    path = saved(
        tmp_path / "a",
        model,
        1,
        target_parameters=[f"mlp.experts.{name}" for name in names],
    )
    done = cli(path, "--output", tmp_path / "out")
    refused(done, "target_parameters.*no linear layer; merge it into its base", tmp_path / "out")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A directory that is in order, for a test to spoil."""
    return saved(tmp_path / "a", base(tmp_path / "base"), 1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"enable_lora": [True, False, True]}, "enable_lora is .*parts of a fused layer"),
        ({"r": "8"}, "r is '8'; expected a number"),
        ({"r": True}, "r is True; expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; expected a number"),
        ({"lora_alpha": 1e18}, None),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; expected names and numbers"),
        ({"alpha_pattern": {"q": "1"}}, "alpha_pattern is .*; expected names and numbers"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: no regular expression"),
        ({"task_type": "TALK"}, "task_type is 'TALK'; expected null or one of CAUSAL_LM"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type is"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is .*; expected a text"),
        ({"revision": 3}, "revision is 3; expected a text or null"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save is .*; expected a list of names"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; expected a list of names"),
        ({"enable_lora": [False, False]}, None),
        ({"bias": None}, "bias is None; only plain LoRA"),
        ({"merge_weights": False}, None),
    ],
)
def test_values_of_the_configuration(
    values: dict[str, Any], says: str | None, plain: Path, tmp_path: Path, cli: Any
) -> None:
    change_config(plain, **values)
    done = cli(plain, "--output", tmp_path / "out")
    if says is None:
        assert done.code == 0, done.err
    else:
        refused(done, says, tmp_path / "out")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin", CONFIG_NAME])
def test_a_pointer_of_git_lfs(name: str, plain: Path, tmp_path: Path, cli: Any) -> None:
    if name.endswith(".bin"):
        older_format(plain)
    (plain / name).write_bytes(POINTER)
    refused(
        cli(plain, "--output", tmp_path / "out"), "Git-LFS pointer.*git lfs pull", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("encoding", "says"),
    [("utf-8-sig", None), ("utf-16", "written in UTF-16; save it again in UTF-8")],
)
@pytest.mark.parametrize("name", [CONFIG_NAME, "config.json"])
def test_a_byte_order_mark(
    name: str, encoding: str, says: str | None, plain: Path, tmp_path: Path, cli: Any
) -> None:
    text = (plain / CONFIG_NAME).read_text() if name == CONFIG_NAME else '{"model_type": "llama"}'
    (plain / name).write_text(text, encoding=encoding)
    done = cli(plain, "--output", tmp_path / "out")
    if says:
        return refused(done, says, tmp_path / "out")
    assert done.code == 0, done.err
    return None


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"epoch": 3, "version": "1.0", "nothing": None}, None),
        ({"optimizer": {"state": {}}}, "'optimizer' is a dict and no tensor"),
        ({"x": [torch.zeros(2)]}, "'x' is a list and no tensor.*save the adapter's tensors alone"),
        ({"config": SimpleNamespace(r=2)}, "Python objects that are no tensors"),
    ],
)
def test_a_file_that_holds_more_than_tensors(
    extra: dict[str, Any], says: str | None, plain: Path, tmp_path: Path, cli: Any
) -> None:
    torch.save({**load_file(plain / WEIGHTS_NAME), **extra}, plain / "adapter_model.bin")
    wanted = load_adapter(plain)
    (plain / WEIGHTS_NAME).unlink()
    done = cli(plain, "--output", tmp_path / "out")
    if says:
        refused(done, says, tmp_path / "out")
    else:
        assert load_adapter(plain).deltas.keys() == wanted.deltas.keys()
    torch.save(
        list(load_file(tmp_path / "out" / WEIGHTS_NAME)) if not says else [1],
        plain / "adapter_model.bin",
    )
    with pytest.raises(InputError, match="holds a list instead of tensors by name"):
        load_adapter(plain)


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float8_e4m3fn, None),
        (torch.float8_e5m2, None),
        (torch.float16, None),
        (torch.float64, None),
        (torch.int8, "of int8; expected weights of float32.* without quantising"),
        (torch.bool, "of bool; expected weights"),
        (torch.complex64, "of complex64; expected weights"),
        (torch.qint8, "of qint8; expected weights"),
    ],
)
def test_dtypes(
    dtype: torch.dtype, says: str | None, plain: Path, tmp_path: Path, cli: Any
) -> None:
    """In `.bin`, which holds all of them."""

    def cast(t: Tensor) -> Tensor:
        if dtype == torch.qint8:
            return torch.quantize_per_tensor(t, 0.1, 0, dtype)
        return t.to(dtype)

    tensors = load_file(plain / WEIGHTS_NAME)
    (plain / WEIGHTS_NAME).unlink()
    torch.save({k: cast(v) for k, v in tensors.items()}, plain / "adapter_model.bin")
    done = cli(plain, "--output", tmp_path / "out")
    if says:
        return refused(done, says, tmp_path / "out")
    found = load_adapter(tmp_path / "out").deltas["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = (tensors[key.format(x)].to(dtype).double() for x in "AB")
    torch.testing.assert_close(
        found.B.double() @ found.A.double(), 4.0 * b @ a, rtol=1e-5, atol=1e-6
    )
    return None


def test_values_that_are_not_finite_after_the_scale(plain: Path, tmp_path: Path, cli: Any) -> None:
    tensors = {k: v * 1e30 for k, v in load_file(plain / WEIGHTS_NAME).items()}
    save_file(tensors, plain / WEIGHTS_NAME)
    change_config(plain, lora_alpha=1e15)
    refused(cli(plain, "--output", tmp_path / "out"), "too large for float32", tmp_path / "out")


def test_shards_that_were_not_gathered(plain: Path, tmp_path: Path, cli: Any) -> None:
    tensors = load_file(plain / WEIGHTS_NAME)
    save_file({k: v.new_zeros(0) for k, v in tensors.items()}, plain / WEIGHTS_NAME)
    refused(cli(plain, "--output", tmp_path / "out"), "DeepSpeed ZeRO-3 and FSDP", tmp_path / "out")


def test_the_real_adapters_load_or_say_why(material: Path, tmp_path: Path) -> None:
    told = {}
    for path in sorted((material / "adapters").iterdir()):
        try:
            save_adapter(tmp_path / path.name, load_adapter(path))
        except InputError as error:
            told[path.name] = str(error)
    assert sorted(told) == ["gpt2-untrained-r16-missing-head", "roberta-mnli-r8-not-peft"]
