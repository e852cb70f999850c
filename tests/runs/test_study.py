"""`fedlora study` in this process: mistakes are told, shipped studies laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.cli import main
from fedlora.commands.study.load import load_study
from fedlora.commands.study.plan import shipped
from support.study import study

pytestmark = pytest.mark.usefixtures("kept_bases")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parts": {}}, "parts: expected names"),
        ({"partz": {}}, "partz: unknown key; did you mean parts?"),
        ({"parts": {"t": {"grid": {"m": {}}}}}, "m has no values"),
        (
            {"parts": {"t": {"grid": {"m": {"a": {"methud": "x"}}}}}},
            "t, m a: methud: unknown configuration key; did you mean method?",
        ),
        ({"parts": {"t": {"grid": {"m": {"a": {"seed": 3}}}}}}, "seed: give seeds"),
        ({"parts": {"t": {"compare": "q", "grid": {"m": {"a": {}}}}}}, "'q' is no axis"),
        ({"parts": {"t": {"grid": {"m": {"a": {"trainer": "x"}}}}}}, "none of adalora"),
        ({"parts": {"t": {"grid": {"m": {"a": {"alone": "x"}}}}}}, "expected a client's number"),
        ({"parts": {"t": {"grid": {"method": {"exact": "exact"}}}}}, "method: exact: expected"),
        ({"parts": {"t": {"grid": {}}}}, "grid: has no axes"),
        ({"parts": {"t": {"keys": ["a"], "grid": {"m": {"a": {}}}}}}, "keys: expected names"),
        ({"parts": {"t": {"reference": "b", "grid": {"m": {"a": {}}}}}}, "'b' is no value of m"),
        ({"metric": "accuracyy"}, "metric: 'accuracyy' is not measured; there are loss"),
        ({"seeds": 3}, "seeds: 3: expected a list"),
        ({"seeds": ["a"]}, "expected a list of whole numbers"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, **changes)
    assert main(["study", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a file or one of"),
        (["ruls"], "did you mean rules?"),
        (["rules", "--size", "huge"], "has embedded, gpu"),
        (["rules", "--part", "x"], "--part x"),
        (["rules", "--where", "method"], "expected AXIS=VALUE"),
        (["rules", "--where", "method=nope"], "there are exact"),
        (["rules", "--where", "colour=red"], "no such axis"),
        (["rules", "--seeds", "one"], "expected a whole number"),
        (["rules", "--processes", "0"], "expected a whole number from 1"),
        (["rules", "--method_x", "1"], "unknown configuration key"),
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("size", ["embedded", "gpu"])
@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_study_lays_out_at_both_sizes(
    name: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", name, "--size", size, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"{name} ({size})" in shown
    assert len(load_study(name, size=size).runs) > 10


def test_adalora_counts_tokens_and_weighs_losses_as_our_own_training_does(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of 4 to 13 letters: a step's loss is a mean over tokens, however it is accumulated."""
    import fedlora
    from fedlora.client.trainer import train
    from fedlora.commands.study.adalora import train_adalora

    tokens, first = {}, {}
    keys = {**small_run, "method": "flora", "num_rounds": 1, "max_steps": 7}
    for name, function, batch, accumulate in (
        ("ours", train, 6, 1),
        ("whole", train_adalora, 6, 1),
        ("parts", train_adalora, 2, 3),
    ):
        own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        steps: list[Any] = []
        config = fedlora.Config(**{**keys, **own, "output_dir": str(tmp_path / name)})
        result = fedlora.run(config, train_function=function, report=steps.append)
        line = next(x for x in result.metrics if x["event"] == "round")
        tokens[name] = [x["metrics"]["tokens"] for x in line["clients"]]
        first[name] = [x["loss"] for x in steps if x["event"] == "step" and x["step"] == 1]
        told = [0] * 4
        for x in steps:
            if x["event"] == "step":
                told[x["client"]] += x["tokens"]
        assert told == tokens[name]
    assert tokens["whole"] == tokens["parts"] == tokens["ours"]
    penalties = [a - b for a, b in zip(first["whole"], first["ours"], strict=True)]
    assert min(penalties) > 0  # PEFT's, of random factors
    assert first["parts"] == pytest.approx(first["whole"], rel=1e-5)
