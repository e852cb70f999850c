"""Whose rows are whose in modules that do not get `(1, tokens, width)`: together as alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf

from fedlora.adapters import find_targets
from fedlora.cohort import train_cohort
from fedlora.lowrank import LowRank
from fedlora.model import BaseModel, Seat, attach
from fedlora.passes import passes_of
from fedlora.seeds import Purpose, fresh_factors
from fedlora.tokens import IGNORE, Tokens
from fedlora.train import Budget

COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
EVEN = {**COMMON, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "hunyuan": (
        lambda: hf.HunYuanDenseV1Config(**GROUPED, head_dim=8),
        ("query_layernorm", "key_layernorm"),
    ),
    "hunyuan_moe": (
        lambda: hf.HunYuanMoEV1Config(**GROUPED, head_dim=8, num_experts=4, moe_topk=2),
        ("query_layernorm", "key_layernorm"),
    ),
    "gemma3": (
        lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
        ("q_norm", "k_norm", "input_layernorm"),
    ),
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED, head_dim=16), ("q_norm", "k_norm")),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=16, num_experts=4),
        ("q_norm", "k_norm", "gate"),
    ),
    "exaone4": (lambda: hf.Exaone4Config(**GROUPED, sliding_window=8), ("q_norm", "k_norm")),
    "apertus": (lambda: hf.ApertusConfig(**GROUPED), ("q_norm", "k_norm")),
    "phi": (
        lambda: hf.PhiConfig(
            **EVEN, qk_layernorm=True, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0
        ),
        ("q_layernorm", "k_layernorm"),
    ),
    "stablelm": (
        lambda: hf.StableLmConfig(**GROUPED, qk_layernorm=True),
        ("q_layernorm", "k_layernorm"),
    ),
    "persimmon": (lambda: hf.PersimmonConfig(**COMMON), ("q_layernorm", "k_layernorm")),
    "olmo2": (lambda: hf.Olmo2Config(**GROUPED), ("q_norm", "k_norm")),
    "olmoe": (
        lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
        ("q_norm", "k_norm"),
    ),
    "cohere": (lambda: hf.CohereConfig(**GROUPED, use_qk_norm=True), ("q_norm", "k_norm")),
    "glm4_moe": (
        lambda: hf.Glm4MoeConfig(
            **GROUPED, **EXPERTS, head_dim=8, use_qk_norm=True, n_routed_experts=4, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        ),
        ("q_norm", "k_norm"),
    ),
    "dots1": (
        lambda: hf.Dots1Config(
            **GROUPED, **EXPERTS, head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, n_shared_experts=1
        ),
        ("q_norm", "k_norm"),
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3Config(
            **EVEN, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
            n_shared_experts=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        ),
        ("q_a_layernorm", "kv_a_layernorm"),
    ),
    "llama": (lambda: hf.LlamaConfig(**GROUPED), ("embed_tokens", "norm", "mlp")),
    "gpt2": (
        lambda: hf.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        ),
        ("wpe", "ln_1", "wte"),
    ),
}  # fmt: skip


def base_of(
    name: str, whole: Sequence[str] | None = None, targets: Any = "all-linear"
) -> BaseModel:
    """A random model; its modules of these names are trained whole."""
    make, own = MODELS[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(make())
    for parameter in model.parameters():  # norms that all hold ones would hide a mistake
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.config.use_cache = False
    wanted = own if whole is None else tuple(whole)
    names = [n for n, m in model.named_modules() if n.rpartition(".")[2] in wanted]
    assert names
    found = find_targets(model, targets, name, None, names, "CAUSAL_LM")
    return attach(model, None, found)


def rows_of(lengths: Sequence[int], seed: int) -> list[Tokens]:
    """Random rows of these lengths, their second half learnt."""
    source = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        ids = torch.randint(3, 60, (length,), generator=source).tolist()
        out.append({"input_ids": ids, "labels": [IGNORE] * (length // 2) + ids[length // 2 :]})
    return out


def adapter_of(base: BaseModel, rank: int, client: int) -> dict[str, LowRank]:
    fresh = fresh_factors(7, 0, client, Purpose.CLIENT_INIT, base.targets.shapes)
    source = torch.Generator().manual_seed(client)
    return {
        name: LowRank(fresh(name, rank), 0.05 * torch.randn(m, rank, generator=source))
        for name, (m, _) in base.targets.shapes.items()
    }


Ends = list[tuple[dict[str, torch.Tensor], dict[str, Any]]]


def trained(
    base: BaseModel,
    data: Sequence[Sequence[Tokens]],
    groups: Sequence[Sequence[int]],
    dropout: float = 0.0,
    size: int = 8,
) -> Ends:
    """A few steps of these clients in these groups: what each trained, and its metrics."""
    start, found = base.read_dense(), dict[int, Any]()
    for group in groups:
        seats = [
            Seat(adapter_of(base, 2 + k, k), scale=2.0, dropout=dropout, dense=start) for k in group
        ]
        budgets = [
            Budget(
                client=k,
                max_steps=3,
                learning_rate=2e-2,
                adam_epsilon=1e-2,  # a gradient that is but rounding moves nothing
                seed=3,
                per_device_train_batch_size=size,
            )
            for k in group
        ]
        base.seat([], seats)
        metrics = train_cohort(base, [data[k] for k in group], budgets)
        for place, k in enumerate(group):
            values = base.read_dense(place)
            for n, x in base.read_adapter(place).items():
                values |= {f"{n}.A": x.A, f"{n}.B": x.B}
            found[k] = values, metrics[place]
    base.seat([], [])
    with torch.no_grad():
        for n, value in start.items():
            base.dense[n].copy_(value)
    return [found[k] for k in range(len(data))]


def assert_alike(one: Ends, other: Ends, began: dict[str, torch.Tensor]) -> None:
    """Every parameter moved, and both moved alike to a thousandth of how far."""
    for (x, m), (y, n) in zip(one, other, strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            if name in began:
                moved = float((y[name] - began[name]).norm())
                assert moved > 5e-6, name
                assert float((value - y[name]).norm()) <= 1e-6 + 2e-3 * moved, name
            else:
                torch.testing.assert_close(value, y[name], rtol=2e-3, atol=2e-5, msg=name)
        assert m["loss"] == pytest.approx(n["loss"], rel=1e-5)


LENGTHS: dict[str, list[list[int]]] = {
    "two clients, two samples": [[5, 7], [9, 4]],
    "as many samples as heads": [[5, 7], [9], [4]],
    "as many samples as tokens of a client": [[4, 6, 3], [5, 5], [8]],
    "tokens equal heads, and their width": [[4], [4]],
    "one row each": [[11], [6], [13]],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_together_is_alone(name: str, lengths: list[list[int]]) -> None:
    base = base_of(name)
    assert passes_of(base.model).joint
    data = [rows_of(part, k) for k, part in enumerate(lengths)]
    everybody = list(range(len(data)))
    alone = trained(base, data, [[k] for k in everybody])
    assert_alike(trained(base, data, [everybody]), alone, base.read_dense())
