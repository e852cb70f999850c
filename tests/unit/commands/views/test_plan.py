"""What a run would do, client by client."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from fedlora.commands.views.plan import client_plans, show_plan
from fedlora.config.config import Config
from fedlora.runs.session import assemble


def test_steps_scale_and_bytes_of_every_client(small_run: dict[str, Any]) -> None:
    keys = {
        **small_run,
        "max_steps": -1,
        "num_train_epochs": 2,
        "lora_alpha": "2r",
        "lora_target_modules": ["q_proj"],
        "client_overrides": {3: {"lora_alpha": 8.0, "use_rslora": True}},
    }
    session = assemble(Config(**keys), weights=False)
    plans = client_plans(session)
    assert [plan.rank for plan in plans] == [8, 4, 2, 2]
    assert [plan.rows for plan in plans] == [24, 16, 12, 8]
    assert [plan.steps for plan in plans] == [12, 8, 6, 4]  # two epochs in batches of four
    assert [plan.scale for plan in plans[:3]] == [2.0] * 3
    assert plans[3].scale == 8 / 2**0.5
    assert [plan.parameters for plan in plans] == [2 * r * (32 + 32) for r in (8, 4, 2, 2)]
    assert plans[0].bytes_up == 4 * plans[0].parameters
    console = Console(file=io.StringIO(), width=100)
    show_plan(session, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "method exact, 2 rounds, 4 of 4 clients in each" in text
    assert "client 3 by itself: lora_alpha 8.0, use_rslora True" in text
    assert "no weights were read and nothing was written" in text
    assert "parameters (float32)" in text
    quantised = session.config.model_copy(update={"load_in_4bit": True})
    show_plan(replace(session, config=quantised), console)
    assert "parameters (4 bits)" in console.file.getvalue()
