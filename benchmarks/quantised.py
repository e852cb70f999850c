"""Measures what a base in 8 or 4 bits costs and saves, and what merging into it would lose.

    python benchmarks/quantised.py layer     one layer: CPU time of a step, memory of its weight
    python benchmarks/quantised.py drift     a run of the embedded model on a base in 4 bits

`drift` takes the global update of every round of a run, and does with it what a federation would
that merges: compute the base back, add the round's step to it, and quantise the sum again.

    W_t = Q(W_{t-1} + D_t - D_{t-1})         D_t the global update after round t, D_0 = 0
    drift_t = ||W_t - (W_0 + D_t)||_F / ||D_t||_F

over all target modules. Beside the quantised base, unmerged, the drift is 0 by construction.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fedlora
from fedlora import Config
from fedlora.model.quantised_linear import Bits, QuantisedLinear
from fedlora.runs.session import assemble

ROUNDS = 10


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["layer", "drift"])
    what = parser.parse_args().what
    torch.set_num_threads(1)
    measure_layer() if what == "layer" else measure_drift()


# --- one layer ---


def measure_layer(m: int = 2048, n: int = 768, rows: int = 512, repeats: int = 7) -> None:
    """Print CPU milliseconds of a forward and backward pass, and bytes a weight."""
    torch.manual_seed(0)
    weight, x = torch.randn(m, n) / n**0.5, torch.randn(rows, n)
    full = nn.Linear(n, m, bias=False).requires_grad_(False)
    full.weight.data.copy_(weight)
    layers: dict[str, nn.Module] = {"float32": full}
    for bits in (8, 4):
        layers[f"{bits} bits"] = QuantisedLinear(weight, None, bits, torch.float32)
    layers |= _of_bitsandbytes(weight)
    wanted = full(x)
    print(f"{'base':28} {'ms a step':>9} {'bytes a weight':>14} {'error of y':>10}")
    for name, layer in layers.items():
        y, error = _step(layer, x), 0.0
        error = float((y - wanted).norm() / wanted.norm())
        times = []
        for _ in range(repeats):
            began = time.process_time()
            _step(layer, x)
            times.append(time.process_time() - began)
        held = sum(v.untyped_storage().nbytes() for v in layer.state_dict().values())
        print(f"{name:28} {1e3 * min(times):9.1f} {held / weight.numel():14.3f} {error:10.4f}")


def _of_bitsandbytes(weight: Tensor) -> Mapping[str, nn.Module]:
    """Its own layers, as transformers puts them into a model."""
    import bitsandbytes as bnb

    m, n = weight.shape
    eight = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    four = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return {"Linear8bitLt": eight.to("cpu"), "Linear4bit": four.to("cpu")}


def _step(layer: nn.Module, x: Tensor) -> Tensor:
    """A forward and a backward pass down to the input."""
    x = x.clone().requires_grad_()
    y: Tensor = layer(x)
    y.sum().backward()
    return y.detach()


# --- merging every round ---


def measure_drift() -> None:
    """Print how far a base would drift that takes in the global update of every round."""
    with tempfile.TemporaryDirectory() as directory:
        updates, weights = _rounds(Path(directory))
    print(f"{'round':>5} {'||D_t||':>9} {'drift, 8 bits':>14} {'drift, 4 bits':>14}")
    eight, four = (_drift(weights, updates, bits) for bits in (8, 4))
    for i, update in enumerate(updates):
        print(f"{i + 1:5} {_norm(update):9.4f} {eight[i]:14.3f} {four[i]:14.3f}")


def _rounds(directory: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The global update after each round of a run, and the original weights of its modules."""
    keys = {
        "model_name_or_path": "embedded",
        "dataset_name": "embedded",
        "num_clients": 4,
        "client_ranks": [16, 8, 4, 4],
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "num_rounds": ROUNDS,
        "learning_rate": 1e-3,
        "eval_rounds": 0,
        "eval_exact_match": False,
        "save_total_limit": None,
        "use_cpu": True,
        "dtype": "float32",
        "num_threads": 1,
        "output_dir": str(directory / "out"),
    }
    fedlora.run(Config(**keys, load_in_4bit=True))
    full = assemble(Config(**keys)).base
    weights = {name: layer.weight.detach() for name, layer in full.layers.items()}
    rounds = (directory / "out" / f"round-{t}" for t in range(1, ROUNDS + 1))
    return [_update(path) for path in rounds], weights


def _update(path: Path) -> dict[str, Tensor]:
    """Module -> `B A` of an adapter on disk."""
    values = load_file(path / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            values[key.replace("lora_A", "lora_B")] @ a
        )
        for key, a in values.items()
        if key.endswith(".lora_A.weight")
    }


def _drift(
    weights: Mapping[str, Tensor], updates: list[dict[str, Tensor]], bits: Bits
) -> list[float]:
    """`drift_t` of every round."""
    first = {name: _quantised(weights[name], bits) for name in updates[0]}
    merged, before = dict(first), {name: torch.zeros_like(w) for name, w in first.items()}
    out = []
    for update in updates:
        merged = {
            name: _quantised(merged[name] + x - before[name], bits) for name, x in update.items()
        }
        off = {name: merged[name] - first[name] - x for name, x in update.items()}
        out.append(_norm(off) / _norm(update))
        before = update
    return out


def _quantised(weight: Tensor, bits: Bits) -> Tensor:
    """A weight as it comes back from this many bits."""
    return QuantisedLinear(weight, None, bits, torch.float32).weight


def _norm(values: Mapping[str, Tensor]) -> float:
    """Of all modules together."""
    return sum(float(x.norm()) ** 2 for x in values.values()) ** 0.5


if __name__ == "__main__":
    main()
