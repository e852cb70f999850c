"""Trains several clients of small models, each alone and all in one pass, and compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.lowrank import Deltas, Dense, LowRank, to_dense
from fedlora.model.base import BaseModel, attach
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.targets import find_targets
from support.architectures import COMMON, GPT2, GROUPED
from support.client_rows import adapter_of

RANKS = (6, 3, 1, 4)


def llama(dropout: float = 0.0) -> Any:
    """Grouped-query attention; its attention's dropout if asked."""
    return LlamaForCausalLM(LlamaConfig(**GROUPED, attention_dropout=dropout))


def gpt2(dropout: float = 0.0) -> Any:
    """Conv1D layers, learnt positions, biases; dropout in embeddings, attention and residuals."""
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**GPT2, **drops))


def _dropping(dropout: float) -> dict[str, float]:
    """An encoder's dropout, in its layers and its attention."""
    return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def bert(dropout: float = 0.0) -> Any:
    """A classifier with a pooler and a head."""
    return BertForSequenceClassification(BertConfig(**COMMON, **_dropping(dropout), num_labels=3))


def roberta(dropout: float = 0.0) -> Any:
    """A head of several layers, and positions counted from the padding's id on."""
    return RobertaForSequenceClassification(
        RobertaConfig(**{**COMMON, "pad_token_id": 1}, **_dropping(dropout), num_labels=3)
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "roberta": roberta}


def base_of(
    name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> BaseModel:
    """A model with layers in place; a classifier's head and pooler are trained whole."""
    torch.manual_seed(seed)
    model = MODELS[name](dropout).to(dtype)
    model.config.use_cache = False
    classifies = name in ("bert", "roberta")
    whole = [n for n in ("classifier", "bert.pooler") if classifies and _has(model, n)]
    kind = "SEQ_CLS" if classifies else "CAUSAL_LM"
    targets = find_targets(model, "all-linear", name, None, whole, kind)
    return attach(model, None, targets)


def _has(model: Any, name: str) -> bool:
    return any(n == name for n, _ in model.named_modules())


def rows_of(name: str, number: int, seed: int) -> list[Tokens]:
    """Random rows of 3 to 24 tokens; half of a text is learnt."""
    source = torch.Generator().manual_seed(seed)
    out = []
    for i in range(number):
        length = int(torch.randint(3, 25, (1,), generator=source))
        ids = torch.randint(2, 100, (length,), generator=source).tolist()
        if name in ("bert", "roberta"):
            out.append({"input_ids": ids, "label": (i + seed) % 3})
        else:
            half = length // 2
            out.append({"input_ids": ids, "labels": [IGNORE] * half + ids[half:]})
    return out


def client_adapters_of(base: BaseModel, **keys: Any) -> list[ClientAdapter]:
    """One client adapter for each of `RANKS`; heads start alike."""
    dense = base.read_full_params()
    return [
        ClientAdapter(adapter_of(base, rank, k), scale=2.0, full_params=dense, **keys)
        for k, rank in enumerate(RANKS)
    ]


def trainings_of(**keys: Any) -> list[LocalTraining]:
    """Different micro-batches, numbers of steps and schedules."""
    common = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "seed": 3, "round": 2, **keys}
    sizes, steps = (4, 3, 5, 2), (6, 9, 4, 9)
    return [
        LocalTraining(
            client=k, per_device_train_batch_size=sizes[k], **{"max_steps": steps[k], **common}
        )
        for k in range(len(RANKS))
    ]


Ends = list[tuple[dict[str, LowRank], dict[str, Tensor], dict[str, Any]]]


def trained(
    base: BaseModel,
    client_adapters: Sequence[ClientAdapter],
    data: Sequence[Sequence[Tokens]],
    trainings: Sequence[LocalTraining],
    groups: Sequence[Sequence[int]],
    frozen: Sequence[Deltas] = (),
) -> Ends:
    """Train these clients in these groups; adapter, head and metrics of each at its end."""
    found: dict[int, Any] = {}
    for group in groups:
        base.load_clients(frozen, [client_adapters[k] for k in group])
        metrics = train_cohort(base, [data[k] for k in group], [trainings[k] for k in group])
        for slot, k in enumerate(group):
            found[k] = base.read_adapter(slot), base.read_full_params(slot), metrics[slot]
    return [found[k] for k in range(len(client_adapters))]


def close(one: Ends, other: Ends, tolerance: float) -> None:
    """A client's A, its B and its head, each relative to its norm; losses alike."""
    for (x, heads, m), (y, other_heads, n) in zip(one, other, strict=True):
        assert x.keys() == y.keys()
        for factor in "AB":
            ours = torch.cat([getattr(x[n], factor).flatten() for n in x])
            theirs = torch.cat([getattr(y[n], factor).flatten() for n in x])
            assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm()), factor
        for name, value in other_heads.items():
            assert float((heads[name] - value).norm()) <= tolerance * float(value.norm()), name
        for key in ("loss", "loss_first", "loss_last"):
            assert m[key] == pytest.approx(n[key], rel=tolerance)
        assert (m["steps"], m["tokens"]) == (n["steps"], n["tokens"])


ALONE = [[k] for k in range(len(RANKS))]


TOGETHER = [list(range(len(RANKS)))]


def whole_update(base: BaseModel, rank: int, dense: bool) -> dict[str, Any]:
    found = adapter_of(base, rank, 99)
    return {n: Dense(to_dense(x)) if dense else x for n, x in found.items()}
