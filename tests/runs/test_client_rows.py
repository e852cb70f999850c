"""Rows of several clients in a pass: a module that runs twice, and rows that surprise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import fedlora
from fedlora.model.acceleration import accelerate
from fedlora.model.base import attach
from fedlora.model.client_rows import ClientRows
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.client_rows import GROUPED, Ends, assert_alike, rows_of, trained


def test_a_module_that_runs_twice_draws_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in two places of the model, also when it is computed again for its gradient."""
    masks = dict[Any, list[torch.Tensor]]()
    keep = ClientRows.keep

    def keeping(self: ClientRows, client: int, site: int, *given: Any) -> torch.Tensor:
        drawn = keep(self, client, site, *given)
        masks.setdefault((client, site, (self._seeds or [0])[client]), []).append(drawn)
        return drawn

    monkeypatch.setattr(ClientRows, "keep", keeping)
    found = dict[bool, Ends]()
    for again in (False, True):
        torch.manual_seed(0)
        config = hf.LlamaConfig(**GROUPED, attention_dropout=0.2)
        model = hf.AutoModelForCausalLM.from_config(config)
        model.config.use_cache = False
        model.model.layers[1] = model.model.layers[0]
        base = attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))
        if again:
            accelerate(base.model, gradient_checkpointing=True)
        assert runner_of(base.model).joint
        data = [rows_of(x, k) for k, x in enumerate([[5, 7], [9, 4], [3]])]
        masks.clear()
        found[again] = trained(base, data, [[0], [1], [2]], dropout=0.2)
        assert {len(x) for x in masks.values()} == {4 if again else 2}
        for drawn in masks.values():
            if drawn[0].numel() > 60:
                assert not torch.equal(drawn[0], drawn[1])
            if again:  # backwards: the second place first
                assert torch.equal(drawn[1], drawn[2])
                assert torch.equal(drawn[0], drawn[3])
        together = trained(base, data, [[0, 1, 2]], dropout=0.2)
        assert_alike(together, found[again], base.read_full_params())
    for (x, _), (y, _) in zip(found[False], found[True], strict=True):
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-5, atol=1e-6)


def test_rows_that_surprise_train_alone(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no probe has shown stops no run."""

    def nothing(model: Any, full: Any, others: Any, run: Any) -> Any:
        return True, {module: {} for module in others}

    monkeypatch.setattr("fedlora.model.joint_passes.find_rows", nothing)
    ends = []
    for size in (1, 4):
        out = str(tmp_path / f"{size}")
        fedlora.run(fedlora.Config(**{**small_run, "cohort_size": size, "output_dir": out}))
        ends.append((tmp_path / f"{size}" / "final" / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1]
