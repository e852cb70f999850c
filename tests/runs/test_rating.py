"""Clients' own models, general text, and what a run says of itself in its first line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedlora
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import BASE_DIR, CONFIG
from fedlora.errors import InputError
from fedlora.lowrank import to_dense
from fedlora.runs.metrics_log import read_metrics

pytestmark = pytest.mark.usefixtures("kept_bases")


KEYS = {
    "num_rounds": 2,
    "max_steps": 2,
    "max_eval_samples": 20,
    "max_train_samples": 40,
    "per_device_train_batch_size": 4,
    "client_eval_fraction": 0.2,
    "num_clients": 4,
    "client_ranks": [8, 4, 2, 2],
    "num_threads": 1,
    "eval_exact_match": False,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": None,
}


def run(path: Path, **keys: Any) -> fedlora.Result:
    values = layered(read_yaml(CONFIG), KEYS, keys, {"output_dir": str(path)})
    return fedlora.run(fedlora.Config(**values))


def dense(path: Path) -> dict[str, Tensor]:
    return {name: to_dense(x).double() for name, x in load_adapter(path).deltas.items()}


@pytest.fixture(scope="module", params=["exact", "flora", "fedex", "ffa", "fedmomentum"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that evaluates and keeps the clients' own models."""
    path = tmp_path_factory.mktemp("rating") / "run"
    ranks = 4 if request.param == "ffa" else [8, 4, 2, 2]
    keys = {"method": request.param, "client_ranks": ranks}
    run(path, eval_personal=True, save_client_models=True, **keys)
    return path


def test_the_global_model_moves_by_what_the_clients_models_moved(made: Path) -> None:
    before, after = dense(made / "round-1"), dense(made / "round-2")
    line = next(x for x in read_metrics(made) if x["event"] == "round" and x["round"] == 2)
    moved = {name: torch.zeros_like(x) for name, x in after.items()}
    for client in line["clients"]:
        own = dense(made / "round-2" / f"client-{client['client']}")
        for name, x in own.items():
            moved[name] += client["weight"] * (x - before.get(name, torch.zeros_like(x)))
    for name, x in after.items():
        change = x - before.get(name, torch.zeros_like(x))
        assert torch.linalg.norm(change - moved[name]) <= 2e-5 * torch.linalg.norm(change)


def test_what_is_saved_is_what_was_evaluated(made: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedlora.client.evaluate import evaluate
    from fedlora.runs.session import assemble

    session = assemble(fedlora.Config(**read_yaml(made / "config.yaml")))
    line = next(x for x in read_metrics(made) if x["event"] == "round" and x["round"] == 2)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    for client, found in line["personal_evaluations"].items():
        base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, made / "final" / f"client-{client}")
        rows = session.data.clients[int(client)].eval
        oracle = evaluate(model.merge_and_unload(), tokenizer, rows, batch_size=4)
        assert math.isclose(oracle["loss"], found["loss"], rel_tol=1e-4)
    assert set(line["personal_evaluations"]) == {"0", "1", "2", "3"}


def test_a_client_fits_its_own_rows_better_than_the_base(made: Path) -> None:
    lines = read_metrics(made)
    start = next(x for x in lines if x["event"] == "start")
    last = next(x for x in lines if x["event"] == "round" and x["round"] == 2)
    for client, found in last["personal_evaluations"].items():
        assert found["loss"] < start["client_evaluations"][client]["loss"]


def test_asking_for_them_changes_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "asked", eval_personal=True, save_client_models=True)
    for name in ("adapter_model.safetensors",):
        plain = (tmp_path / "plain" / "final" / name).read_bytes()
        assert plain == (tmp_path / "asked" / "final" / name).read_bytes()
    keys = {"event", "round", "evaluation", "client_evaluations", "layers", "update_norm"}
    ours, theirs = (read_metrics(tmp_path / x) for x in ("plain", "asked"))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert {k: one.get(k) for k in keys} == {k: other.get(k) for k in keys}
    assert not list((tmp_path / "plain").rglob("client-*"))


def test_a_resumed_run_keeps_the_clients_models_of_its_last_round(tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(result: fedlora.RoundResult) -> None:
        if result.record.round == 2:
            raise Stop

    path = tmp_path / "run"
    values = layered(read_yaml(CONFIG), KEYS, {"save_client_models": True})
    config = fedlora.Config(**{**values, "output_dir": str(path)})
    with pytest.raises(Stop):
        fedlora.run(config, callbacks=[stop])
    fedlora.run(resume=path)
    saved = sorted(p.name for p in (path / "final").glob("client-*"))
    assert saved == ["client-0", "client-1", "client-2", "client-3"]


def test_personal_rules_are_as_they_were(tmp_path: Path) -> None:
    result = run(tmp_path / "run", method="fedsa", client_ranks=4, eval_personal=True)
    assert (tmp_path / "run" / "final" / "client-3").is_dir()
    assert "personal_evaluations" not in result.metrics[-2]


def test_general_text_is_evaluated_in_every_round(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    story = "once upon a time there was a small house by the sea. " * 30
    (tmp_path / "general.txt").write_text(story)
    text = str(tmp_path / "general.txt")
    result = run(tmp_path / "run", general_file=text, eval_exact_match=True)
    assert "exact_match" in result.evaluations[2]
    lines = [x for x in read_metrics(tmp_path / "run") if x["event"] in ("start", "round")]
    losses = [x["general_evaluation"]["loss"] for x in lines]
    assert len(losses) == 3
    assert all("exact_match" not in x["general_evaluation"] for x in lines)
    # The base's, by transformers' own loss over the same windows.
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    from fedlora.data.general_text import windows

    total, count = 0.0, 0
    for row in windows(tokenizer, tmp_path / "general.txt", 64, 20):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert math.isclose(losses[0], total / count, rel_tol=1e-4)
    assert len(set(losses)) == 3


def test_where_clients_have_models_of_their_own_these_are_what_forgets(tmp_path: Path) -> None:
    """Under fedsa the shared adapter, without the clients' B, is the base itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedlora.data.general_text import windows

    (tmp_path / "general.txt").write_text("once upon a time there was a house by the sea. " * 30)
    text = str(tmp_path / "general.txt")
    run(tmp_path / "run", general_file=text, method="fedsa", client_ranks=4)
    lines = [x for x in read_metrics(tmp_path / "run") if x["event"] in ("start", "round")]
    losses = [x["general_evaluation"]["loss"] for x in lines]
    rows = windows(AutoTokenizer.from_pretrained(BASE_DIR), text, 64, 20)

    def loss_of(adapter: Path | None) -> float:
        """By transformers' own loss over the same windows."""
        model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        return total / count

    assert math.isclose(losses[0], loss_of(None), rel_tol=1e-4)
    own = [loss_of(tmp_path / "run" / "final" / f"client-{k}") for k in range(4)]
    assert math.isclose(losses[2], sum(own) / 4, rel_tol=1e-4)
    assert all(abs(loss - losses[0]) > 1e-4 for loss in losses[1:])

    # fedlora eval measures them too, and refuses what is no model of anybody.
    from fedlora.commands.eval.assessment import Options, assess
    from fedlora.commands.eval.options import Loading

    def forgotten(what: Path, **keys: Any) -> Any:
        return assess(Options(Loading(str(what), **keys), general_file=Path(text), held_out=False))

    results = forgotten(tmp_path / "run").of("general")
    assert results.keys() == {"base", *(f"client-{k}" for k in range(4))}
    for k in range(4):
        found = results[f"client-{k}"]["forgetting"]
        assert found == pytest.approx(
            results[f"client-{k}"]["loss"] - results["base"]["loss"], abs=1e-6
        )
        assert abs(found) > 1e-4
    with pytest.raises(InputError, match="makes a model for every client"):
        forgotten(tmp_path / "run" / "round-1")


def test_general_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.txt"):
        run(tmp_path / "run", general_file=str(tmp_path / "nothing.txt"))
    assert not (tmp_path / "run").exists()


def test_the_first_line_says_what_is_run(made: Path) -> None:
    from safetensors.torch import load_file

    first = json.loads((made / "metrics.jsonl").read_text().splitlines()[0])
    assert first["event"] == "begin"
    weights = load_file(BASE_DIR / "model.safetensors")
    assert first["parameters"] == sum(x.numel() for x in weights.values())
    for name, shape in first["modules"].items():
        assert tuple(shape) == tuple(weights[f"{name}.weight"].shape)
    assert [x["rank"] for x in first["clients"]] in ([8, 4, 2, 2], [4, 4, 4, 4])
    rounds = next(x for x in read_metrics(made) if x["event"] == "round")
    assert [x["rows"] for x in first["clients"]] == [x["num_examples"] for x in rounds["clients"]]
    assert first["column"] == "skill"
    assert [sum(x["counts"].values()) for x in first["clients"]] == [40] * 4
    assert first["environment"]["torch"] == torch.__version__


def test_every_layer_has_its_share_of_the_error(made: Path) -> None:
    line = next(x for x in read_metrics(made) if x["event"] == "round" and x["round"] == 2)
    before, after = dense(made / "round-1"), dense(made / "round-2")
    assert set(line["layers"]) == set(after)
    for name, x in line["layers"].items():
        change = after[name] - before.get(name, torch.zeros_like(after[name]))
        assert math.isclose(x["norm"], float(torch.linalg.norm(change)), rel_tol=1e-3)
        assert x["error"] < 1e-3
    whole = math.sqrt(sum(x["norm"] ** 2 for x in line["layers"].values()))
    assert math.isclose(whole, line["update_norm"], rel_tol=1e-6)


def test_a_rule_that_is_not_exact_shows_where(tmp_path: Path) -> None:
    result = run(tmp_path / "run", method="zero_pad")
    layers = result.metrics[-2]["layers"]
    errors = [x["error"] for x in layers.values()]
    assert min(errors) > 0.01
    assert min(errors) <= result.metrics[-2]["aggregation_error"] <= max(errors)


def test_clients_models_without_rows_to_measure_them_on_are_refused(tmp_path: Path) -> None:
    keys = {"train_file": str(tmp_path / "rows.jsonl"), "client_eval_fraction": 0.0}
    keys |= {"partition": "iid", "dataset_name": None}
    row = {"prompt": "write backwards abc>", "completion": "cba"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    with pytest.raises(InputError, match="eval_personal needs something to evaluate on"):
        run(tmp_path / "run", eval_personal=True, metric_for_best_model="loss", **keys)
    assert not (tmp_path / "run").exists()
