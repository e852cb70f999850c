"""A plan (`run --dry_run`) reads no weights, and says what the run then does."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from fedlora.commands.cli import main
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.text import human_bytes
from support.views import (
    Say,
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    here,  # noqa: F401
    say,  # noqa: F401
)


def test_a_plan_reads_no_weights(say: Say, here: Path) -> None:
    model = here / "model"
    shutil.copytree(read_yaml(here / "my.yaml")["model_name_or_path"], model)
    whole = say("run my.yaml --dry_run --model_name_or_path model")
    (model / "model.safetensors").unlink()
    assert say("run my.yaml --dry_run --model_name_or_path model") == whole
    assert say("run my.yaml --dry-run --model_name_or_path=model") == whole
    assert "no weights were read and nothing was written" in " ".join(whole.split())
    assert main(["run", "my.yaml", "--model_name_or_path", "model"]) == 2


PLANS = [
    "",
    "--client_ranks none --rank_choices 2 4 8 --max_steps -1 --num_train_epochs 1.5",
    "--lora_target_modules q_proj --use_rslora --lora_alpha 7 --clients_per_round 2",
    "--client_overrides 'own/*.yaml' --client_ranks 5 --max_train_samples 6",
    "--lora_modules_to_save lm_head --method flora",
    "--client_eval_fraction 0.25 --gradient_accumulation_steps 2 --max_steps -1",
]


@pytest.mark.parametrize("line", PLANS, ids=[line or "plain" for line in PLANS])
def test_the_plan_is_what_the_run_does(line: str, say: Say, here: Path) -> None:
    (here / "own").mkdir()
    for client, own in enumerate(
        ["lora_r: 3\nmax_steps: 1", "lora_target_modules: [v_proj]", "use_rslora: true", "{}"]
    ):
        (here / "own" / f"{client}.yaml").write_text(own)
    text = say(f"run my.yaml {line} --num_rounds 1 --dry_run")
    assert not (here / "out").exists()
    plan = text.splitlines()
    ruler = next(i for i, x in enumerate(plan) if set(x.strip()) == {"─"})
    body = [x.split() for x in plan[ruler + 1 : ruler + 5]]
    assert [cells[0] for cells in body] == ["0", "1", "2", "3"]
    assert main(shlex.split(f"run my.yaml {line} --num_rounds 1")) == 0
    metrics = [json.loads(x) for x in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    [done] = [x for x in metrics if x["event"] == "round"]
    assert f"{len(done['clients'])} of 4 clients in each" in " ".join(text.split())
    for client in done["clients"]:
        cells = body[client["client"]]
        assert cells[1] == str(client["rank"])
        assert cells[3] == str(client["num_examples"])
        assert cells[5] == str(client["metrics"]["steps"])
        assert " ".join(cells[-2:]) == human_bytes(client["bytes_up"])
    saved = Config(**read_yaml(here / "out" / "config.yaml"))
    for client, cells in enumerate(body):
        own, rank = saved.of_client(client), int(cells[1])
        scale = own.alpha(rank) / (rank**0.5 if own.use_rslora else rank)
        assert cells[2] == f"{scale:g}"
