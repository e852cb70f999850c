"""Makes models whose attention is far from uniform, and runs rows through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from fedlora.data.tokenize import Tokens
from fedlora.model.passes import runner_of
from fedlora.model.plans import plan_passes
from support.models import LLAMA, TOKENS

SIZES: dict[str, Any] = {**LLAMA, **TOKENS, "max_position_embeddings": 256}


EXPERTS = {**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 30,
    "factor": 8.0,
}


WINDOWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "ModernBERT": ("modernbert", {**SIZES, "local_attention": 32, "num_hidden_layers": 4}, True),
    "PhiMoE, in the mask alone": ("phimoe", {**EXPERTS, "sliding_window": 40}, False),
    "Mistral": ("mistral", {**SIZES, "sliding_window": 40}, False),
    "Qwen 2, in some layers": (
        "qwen2",
        {**SIZES, "sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1},
        False,
    ),
    "Gemma 3": ("gemma3_text", {**SIZES, "sliding_window": 40, "head_dim": 16}, False),
}


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope, Phi-3": ("phi3", {**SIZES, "rope_parameters": LONGROPE}),
    "longrope, Llama": ("llama", {**SIZES, "rope_parameters": LONGROPE}),
    "longrope, PhiMoE": (
        "phimoe",
        {**EXPERTS, "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "dynamic": (
        "llama",
        {
            **SIZES,
            "max_position_embeddings": 30,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


def built(
    name: str, config: dict[str, Any], classify: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    kind = hf.AutoModelForSequenceClassification if classify else hf.AutoModelForCausalLM
    more = {"num_labels": 3} if classify else {}
    model = kind.from_config(hf.CONFIG_MAPPING[name](**config, **more))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1 and "embed" not in key:
                value.mul_(5)
    return model.to(dtype).eval()


def rows_of(lengths: Sequence[int], classify: bool = False, seed: int = 0) -> list[Tokens]:
    source = torch.Generator().manual_seed(seed)
    out: list[Tokens] = []
    for length in lengths:
        ids = torch.randint(3, 100, (length,), generator=source).tolist()
        out.append(
            {"input_ids": ids, "label": seed % 3} if classify else {"input_ids": ids, "labels": ids}
        )
    return out


def found(model: Any, rows: Sequence[Tokens]) -> list[Tensor]:
    """What a pass gives for each row: packed where the model is."""
    passes = runner_of(model)
    counts = [1 if "label" in row else len(row["input_ids"]) - 1 for row in rows]
    with torch.no_grad():
        if passes.packed_forward.classifier and passes.packed:
            return list(passes.packed_forward.logits(model, rows).split(counts))
        got = torch.cat([logits for logits, _ in passes.logits_and_labels(model, rows)])
    return list(got.split(counts))


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": (
        "qwen3_moe",
        {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "olmoe": ("olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", EXPERTS),
    "granitemoe": ("granitemoe", EXPERTS),
    "jetmoe": ("jetmoe", {**EXPERTS, "kv_channels": 8, "num_key_value_heads": 4}),
}


def routed(name: str) -> Any:
    kind, config = MIXTURES[name]
    share = {"aux_loss_coef": 0.05} if name == "jetmoe" else {"router_aux_loss_coef": 0.05}
    return built(kind, {**config, **share, "output_router_logits": True})


def steps_of(model: Any, parts: Sequence[Sequence[Tokens]]) -> int:
    """In how many passes these rows are run."""
    passes = runner_of(model)
    return len(plan_passes(parts, lambda n: passes._pass_kind(model, n), passes.longest))


PACKED: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{name: (name, SIZES, False) for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")},
    "gemma": ("gemma", {**SIZES, "head_dim": 16}, False),
    "mixtral": ("mixtral", EXPERTS, False),
    "gpt2": ("gpt2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}, False),
    "gpt_neox": ("gpt_neox", SIZES, False),
    "bert": ("bert", SIZES, True),
    "roberta": ("roberta", {**SIZES, "pad_token_id": 1}, True),
}
