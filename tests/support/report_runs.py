"""Runs' directories written by hand, with everything a report can show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from fedlora.adapters.saved_adapter import write_adapter
from fedlora.lowrank import LowRank
from fedlora.model.targets import Targets

SKILLS = ("reverse", "repeat", "rotate", "sort", "upper", "vowels")


KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def quality(at: float, draw: random.Random) -> dict[str, Any]:
    """An evaluation after a share `at` of the training."""
    loss = 7.5 * (1 - at) ** 1.5 + 0.7 + 0.1 * draw.random()
    return {
        "loss": loss,
        "perplexity": 2.718281828**loss,
        "token_accuracy": 0.25 + 0.6 * at + 0.02 * draw.random(),
        "exact_match": 0.66 * at**1.5 * (0.9 + 0.2 * draw.random()),
    }


def lines_of(
    clients: int = 6,
    rounds: int = 4,
    layers: int = 4,
    method: str = "exact",
    seed: int = 0,
    **begin_keys: Any,
) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a whole run."""
    draw = random.Random(f"{method} {seed}")
    ranks = [[32, 16, 8, 4][i * 4 // clients] for i in range(clients)]
    modules = {f"model.layers.{i}.{kind}": [64, 48] for i in range(layers) for kind in KINDS}
    shares = [[draw.gammavariate(0.3, 1) for _ in SKILLS] for _ in range(clients)]
    counts = [
        {skill: int(200 * x / sum(own)) for skill, x in zip(SKILLS, own, strict=True)}
        for own in shares
    ]
    width = sum(m + n for m, n in modules.values())
    out: list[dict[str, Any]] = [
        {
            "event": "begin",
            "round": 0,
            "started": "2026-01-02T03:04:05+00:00",
            "fedlora": "0.1.0",
            "model": "a/model",
            "architecture": "LlamaForCausalLM",
            "parameters": 812345,
            "method": method,
            "task": "CAUSAL_LM",
            "num_rounds": rounds,
            "modules": modules,
            "dense_parameters": 0,
            "clients": [
                {
                    "client": i,
                    "name": f"site {i}",
                    "rank": ranks[i],
                    "rows": sum(counts[i].values()),
                    "eval_rows": 12,
                    "tokens": 40 * sum(counts[i].values()),
                    "counts": counts[i],
                }
                for i in range(clients)
            ],
            "column": "skill",
            "eval_rows": 480,
            "environment": {"python": "3.11", "torch": "2.9", "device": "cpu", "threads": 2},
            **begin_keys,
        },
        {
            "event": "start",
            "round": 0,
            "evaluation": quality(0.0, draw),
            "client_evaluations": {str(i): quality(0.0, draw) for i in range(clients)},
            "general_evaluation": {"loss": 3.0, "perplexity": 20.1, "token_accuracy": 0.41},
        },
    ]
    better = {"exact": 1.0, "flora": 0.93}.get(method, 0.6)
    for number in range(1, rounds + 1):
        at = better * number / rounds
        own = [
            {
                "client": i,
                "rank": ranks[i],
                "num_examples": sum(counts[i].values()),
                "weight": 1 / clients,
                "bytes_down": 0 if number == 1 else 4 * width * sum(ranks),
                "bytes_up": 4 * width * ranks[i],
                "metrics": {"loss": 2.0, "steps": 3, "tokens": 900, "seconds": 0.4},
                "rejected": "",
            }
            for i in range(clients)
            if clients < 20 or draw.random() < 0.9
        ]
        loss = 3.0 + 0.05 * at
        out.append(
            {
                "event": "round",
                "round": number,
                "clients": own,
                "aggregation_error": draw.random() * (1e-7 if better > 0.9 else 0.3),
                "truncation_error": 0.0,
                "update_norm": 1.2 / number,
                "global_rank": 160,
                "layers": {
                    name: {
                        "error": draw.random() * 10 ** draw.uniform(-8, -6),
                        "norm": draw.random(),
                    }
                    for name in modules
                },
                "bytes_up": sum(x["bytes_up"] for x in own),
                "bytes_down": sum(x["bytes_down"] for x in own),
                "evaluation": quality(at, draw),
                "client_evaluations": {str(i): quality(at, draw) for i in range(clients)},
                "personal_evaluations": {str(i): quality(0.9 * at, draw) for i in range(clients)},
                "general_evaluation": {"loss": loss, "perplexity": 20.1 + number},
                "privacy": {"epsilon": 0.8 * number**0.5, "delta": 1e-5},
                "seconds": {"train": 3.2 + draw.random(), "aggregate": 0.2, "evaluate": 1.1},
            }
        )
    scores = {"acc": 0.31, "by": {"history": 0.25}}
    out.append({"event": "eval", "round": rounds, "name": "mmlu", "model": "global"})
    out[-1]["scores"] = scores
    out.append({"event": "end", "round": rounds, "final": rounds, "best": rounds})
    return out


def classifying(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a classifier's run, one update of which was not used."""
    label = {"precision": 0.5, "recall": 0.25, "f1": 0.3333333333, "support": 8}
    for line in lines:
        if "evaluation" in line:
            done = line["round"] / 10
            line["evaluation"] = {"loss": 2.0 - done, "accuracy": done, "macro_f1": done / 2}
            line["evaluation"]["per_class"] = {"<who>": label, "where": label}
        for key in ("client_evaluations", "personal_evaluations", "general_evaluation"):
            line.pop(key, None)
    lines[0]["task"] = "SEQ_CLS"
    lines[2]["clients"][0]["rejected"] = "its values are not finite"
    return lines


def write_run(path: Path, lines: list[dict[str, Any]], final: bool = True, **keys: Any) -> Path:
    """A run's directory of these lines."""
    path.mkdir(parents=True)
    begin = lines[0] if lines else {}
    config = {
        "model_name_or_path": begin.get("model", "a/model"),
        "method": begin.get("method", "exact"),
        "num_rounds": begin.get("num_rounds", 4),
        "seed": 0,
        "output_dir": str(path),
        **keys,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shapes = {k: tuple(v) for k, v in begin.get("modules", {}).items()}
    if final and shapes:
        write_adapter(path / "final", update(shapes), targets_of(shapes))
    return path


def update(shapes: dict[str, tuple[int, int]], rank: int = 12) -> dict[str, LowRank]:
    """Updates whose singular values fall off, each layer's a little faster."""
    torch.manual_seed(0)
    out = {}
    for i, (name, (m, n)) in enumerate(shapes.items()):
        left = torch.linalg.qr(torch.randn(m, rank))[0]
        right = torch.linalg.qr(torch.randn(n, rank))[0]
        values = torch.tensor([2.0 * (0.9 - 0.02 * i) ** j for j in range(rank)])
        out[name] = LowRank(right.T.contiguous(), (left * values).contiguous())
    return out


def targets_of(shapes: dict[str, tuple[int, int]]) -> Targets:
    """Target modules of these shapes."""
    names = sorted({name.rpartition(".")[2] for name in shapes})
    return Targets(
        shapes=shapes,
        names=names,
        fan_in_fan_out=False,
        model_name="a/model",
        revision=None,
        task_type="CAUSAL_LM",
        modules_to_save=(),
    )
