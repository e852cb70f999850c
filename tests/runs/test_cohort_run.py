"""Runs in which several clients share a pass: the results are those of training them in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import fedlora
from fedlora import Config
from fedlora.adapters.saved_adapter import WEIGHTS_NAME
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.commands.cli import main
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.model.base import BaseModel
from fedlora.model.client_rows import ClientRows
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.passes import PackedRunner
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.session import assemble
from support.architectures import (
    COMMON,
    DISTILBERT,
    GPT2,
    GROUPED,
    keys_of,
    save_model,
)
from support.classifier import (
    STILL,
    data,  # noqa: F401
)
from support.models import save_tokenizer
from support.resume import (
    StoppedError,
    stop_after,
)
from support.runs import (
    run,
    timeless,
)

pytestmark = pytest.mark.usefixtures("kept_bases")


RULES = ("exact", "flora", "zero_pad", "ffa", "rolora", "fedsa", "hetlora")


OWN: dict[int, dict[str, Any]] = {
    1: {"learning_rate": 3e-3, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
    2: {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    3: {"max_steps": 7, "lr_scheduler_type": "cosine", "proximal_mu": 0.1},
}


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """Four clients of 6, 4, 2 and 7 steps, of which three are asked in a round."""
    return {
        **small_run,
        "seed": 11,  # asks clients 0 2 3, then 1 2 3
        "max_steps": -1,
        "lora_dropout": 0.1,
        "clients_per_round": 3,
        "client_overrides": OWN,
    }


@pytest.fixture
def plain(small_run: dict[str, Any]) -> dict[str, Any]:
    """Four clients with three steps each in each of two rounds."""
    return {**small_run, "lora_dropout": 0.1}


@pytest.fixture
def cohorts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """The round and the clients of every pass that is begun."""
    found: list[tuple[int, list[int]]] = []
    original = fedlora.client.worker.train_cohort

    def noting(
        base: BaseModel, rows: Any, trainings: Sequence[LocalTraining]
    ) -> list[dict[str, Any]]:
        found.append((trainings[0].round, [training.client for training in trainings]))
        return original(base, rows, trainings)

    monkeypatch.setattr("fedlora.client.worker.train_cohort", noting)
    return found


def finals(path: Path) -> dict[str, bytes]:
    """The files of the final adapters' weights: one, or one for every client."""
    found = sorted((path / "final").rglob(WEIGHTS_NAME))
    assert found
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def course(path: Path) -> list[Any]:
    """What `metrics.jsonl` tells of a run, without what depends on the clock or is rounding."""
    return [timeless(line, "error") for line in read_metrics(path) if line["event"] != "resume"]


def same_bits(one: Path, other: Path) -> None:
    """Final adapters, saved states and the whole course."""
    assert finals(one) == finals(other)
    assert course(one) == course(other)


def close(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same course up to rounding, and final adapters near to each other."""

    def compare(x: Any, y: Any, where: str) -> None:
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                # What is small beside other numbers is their rounding error.
                if key not in ("aggregation_error", "truncation_error", "token_accuracy"):
                    compare(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, (a, b) in enumerate(zip(x, y, strict=True)):
                compare(a, b, f"{where}[{i}]")
        elif isinstance(x, float):
            assert x == pytest.approx(y, rel=tolerance), where
        else:
            assert x == y, where

    compare(course(one), course(other), "")
    assert finals(one).keys() == finals(other).keys()
    for name in finals(one):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        a, b = (torch.cat([x[k].flatten() for k in sorted(x)]) for x in (ours, theirs))
        assert float((a - b).norm()) <= tolerance * float(b.norm()), name


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text())
    return found


@pytest.mark.parametrize("method", RULES)
def test_the_size_of_cohorts_changes_no_result(
    keys: dict[str, Any], method: str, cohorts: list[tuple[int, list[int]]]
) -> None:
    """Clients of several steps, rates, modules and micro-batches, some of them absent."""
    ranks = keys["client_ranks"] if METHODS[method].mixed_ranks else 4
    values = {**keys, "method": method, "client_ranks": ranks}
    if method == "hetlora":
        pruning = {"rank_penalty": 5.0, "rank_decay": 0.5, "num_rounds": 3, "seed": 42}
        values |= {**pruning, "client_overrides": {3: OWN[3]}}
    paths, sizes = {}, {}
    for size in (1, 2, 4, "auto"):
        cohorts.clear()
        paths[size] = run(values, f"size-{size}", cohort_size=size).output_dir
        sizes[size] = [len(clients) for number, clients in cohorts if number == 1]
        assert config_of(paths[size])["cohort_size"] == (3 if size == "auto" else size)
    assert sizes == {1: [1, 1, 1], 2: [2, 1], 4: [3], "auto": [3]}
    close(paths[2], paths[1])
    close(paths[4], paths[1])
    same_bits(paths["auto"], paths[4])
    rounds = [line for line in course(paths[1]) if line["event"] == "round"]
    asked = [[c["client"] for c in line["clients"]] for line in rounds]
    assert len({tuple(part) for part in asked}) > 1
    assert len({c["metrics"]["steps"] for line in rounds for c in line["clients"]}) > 2
    assert all(c["metrics"]["padding"] == 0.0 for line in rounds for c in line["clients"])
    if method == "hetlora":
        first = dict(enumerate(keys["client_ranks"]))
        assert any(c["rank"] < first[c["client"]] for line in rounds for c in line["clients"])
    if method == "fedsa":
        assert len(finals(paths[1])) == 4
        assert len(set(finals(paths[1]).values())) == 4


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_the_same_cohorts_give_the_same_bits(plain: dict[str, Any], method: str) -> None:
    values = {**plain, "method": method, "client_ranks": 4, "cohort_size": 3}
    first = run(values, "first").output_dir
    torch.manual_seed(99)  # what others draw does not matter
    torch.rand(17)
    same_bits(run(values, "again").output_dir, first)
    assert finals(run(values, "other", seed=43).output_dir) != finals(first)


def test_the_size_is_decided_once(
    keys: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cohorts: list[tuple[int, list[int]]],
) -> None:
    """It is written down, and a resumed run goes on with it, whatever would be found by then."""
    monkeypatch.setattr("fedlora.runs.automatic.automatic_size", lambda *_: 2)
    whole = run(keys, "whole").output_dir
    assert config_of(whole)["cohort_size"] == 2
    assert config_of(whole)["cohort_memory"] is None
    assert [len(clients) for _, clients in cohorts] == [2, 1] * 2
    with pytest.raises(StoppedError):
        run(keys, callbacks=[stop_after(1)])
    out = Path(keys["output_dir"])
    cohorts.clear()
    monkeypatch.setattr("fedlora.runs.automatic.automatic_size", lambda *_: 3)
    fedlora.run(Config(**keys), resume=out)
    assert [len(clients) for _, clients in cohorts] == [2, 1]
    assert config_of(out) == {**config_of(whole), "output_dir": str(out)}
    same_bits(out, whole)


def test_another_size_is_refused_on_resume(
    plain: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoppedError):
        run(plain, cohort_size=2, callbacks=[stop_after(1)])
    out = plain["output_dir"]
    assert main(["run", "--resume", out, "--cohort_size", "3"]) == 2
    assert "cohort_size: 2 when it began, 3 now" in capsys.readouterr().err
    assert main(["run", "--resume", out, "--cohort_size", "2"]) == 0


@pytest.mark.parametrize(("gibibytes", "size"), [(1e-6, 1), (8.0, 4), (None, 4)])
def test_the_size_follows_the_memory_it_may_take(
    plain: dict[str, Any], gibibytes: float | None, size: int
) -> None:
    assert assemble(Config(**{**plain, "cohort_memory": gibibytes})).config.cohort_size == size


@pytest.mark.usefixtures("fresh_bases")
def test_what_is_measured_leaves_no_trace(plain: dict[str, Any]) -> None:
    automatic, given = (assemble(Config(**{**plain, "cohort_size": x})).base for x in ("auto", 4))
    for base in (automatic, given):
        assert all(not len(layer.clients) for layer in base.layers.values())
    for (n, x), (m, y) in zip(
        automatic.model.named_parameters(), given.model.named_parameters(), strict=True
    ):
        assert n == m
        assert torch.equal(x, y)
        assert x.grad is y.grad is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cohort_size": 0}, "cohort_size: 0 must be at least 1"),
        ({"cohort_size": -3}, "cohort_size: -3 must be at least 1"),
        ({"cohort_size": "many"}, "cohort_size: 'many': expected a whole number or auto"),
        ({"cohort_size": 2.5}, "cohort_size: 2.5: expected a whole number or auto"),
        ({"cohort_size": None}, "cohort_size: None: expected a whole number or auto"),
        (
            {"cohort_size": True},
            "cohort_size: True: expected a whole number or auto (a key without a value is true)",
        ),
        ({"cohort_memory": 0}, "cohort_memory: 0 must be greater than 0"),
        ({"cohort_memory": "all"}, "cohort_memory: 'all': expected a number or none"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        Config(**keys)
    assert str(raised.value) == message


def test_a_size_is_no_clients_own(plain: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="client 1: cohort_size is not a client's own to set"):
        run(plain, client_overrides={1: {"cohort_size": 2}})
    assert not Path(plain["output_dir"]).exists()


ERRORS = {
    "GPU": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B."),
    "Python": MemoryError(),
}


Limit = Callable[..., list[list[int]]]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Makes passes of more than so many clients fail; gives all that are tried from then on."""
    original = fedlora.client.worker.train_cohort

    def limit(number: int, error: Exception, midway: bool = False) -> list[list[int]]:
        tried: list[list[int]] = []

        def failing(
            base: BaseModel, rows: Any, trainings: Sequence[LocalTraining]
        ) -> list[dict[str, Any]]:
            tried.append([training.client for training in trainings])
            if len(trainings) <= number:
                return original(base, rows, trainings)
            if midway:  # the last step is done, and the model is as it is then
                original(base, rows, trainings)
            raise error

        monkeypatch.setattr("fedlora.client.worker.train_cohort", failing)
        return tried

    return limit


def warned(events: Sequence[Mapping[str, Any]]) -> list[str]:
    return [e["message"] for e in events if e["event"] == "warning"]


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("kind", ERRORS)
def test_where_memory_runs_out_half_as_many_go_on(
    plain: dict[str, Any], limited: Limit, kind: str, midway: bool
) -> None:
    """Nothing is lost or done twice: the bits are those of smaller cohorts from the beginning."""
    whole = run(plain, "whole", cohort_size=2).output_dir
    tried = limited(3, ERRORS[kind], midway)
    events: list[Mapping[str, Any]] = []
    result = run(plain, report=events.append, cohort_size=4)
    assert warned(events) == ["memory ran out with 4 clients in one pass; going on with 2"]
    assert tried == [[0, 1, 2, 3], [0, 1], [2, 3], [0, 1], [2, 3]]
    same_bits(result.output_dir, whole)
    ends = [e["client"] for e in events if e["event"] == "client_end"]
    assert ends == [0, 1, 2, 3] * 2
    assert config_of(result.output_dir)["cohort_size"] == 4


@pytest.mark.parametrize("method", ["fedsa", "hetlora"])
def test_what_a_client_keeps_is_kept_once(
    plain: dict[str, Any], limited: Limit, method: str
) -> None:
    values = {**plain, "method": method, "client_ranks": 4}
    if method == "hetlora":
        values |= {"rank_penalty": 3.0, "rank_decay": 0.5, "learning_rate": 3e-2}
    whole = run(values, "whole", cohort_size=2).output_dir
    limited(2, ERRORS["GPU"], midway=True)
    same_bits(run(values, cohort_size=4).output_dir, whole)


def test_memory_may_run_out_more_than_once(plain: dict[str, Any], limited: Limit) -> None:
    whole = run(plain, "whole", cohort_size=1).output_dir
    tried = limited(1, ERRORS["CPU"])
    events: list[Mapping[str, Any]] = []
    result = run(plain, report=events.append, cohort_size=4)
    # What has failed once is not tried again.
    assert warned(events) == [
        "memory ran out with 4 clients in one pass; going on with 2",
        "memory ran out with 2 clients in one pass; going on with 1",
    ]
    assert tried == [[0, 1, 2, 3], [0, 1], *([k] for _ in (1, 2) for k in range(4))]
    same_bits(result.output_dir, whole)


def test_a_size_that_was_halved_never_grows(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was the first clients that were large."""
    original, tried = fedlora.client.worker.train_cohort, list[list[int]]()

    def failing(
        base: BaseModel, rows: Any, trainings: Sequence[LocalTraining]
    ) -> list[dict[str, Any]]:
        clients = [training.client for training in trainings]
        tried.append(clients)
        if len(clients) > (1 if min(clients) < 4 else 2):
            raise ERRORS["GPU"]
        return original(base, rows, trainings)

    monkeypatch.setattr("fedlora.client.worker.train_cohort", failing)
    files = str(Path(plain["train_file"]).parent)
    values = {
        **plain,
        "train_file": f"{files}/eval.jsonl",
        "num_clients": 8,
        "client_ranks": 2,
        "cohort_size": 8,
        "num_rounds": 1,
    }
    events: list[Mapping[str, Any]] = []
    run(values, report=events.append)
    sizes = [len(clients) for clients in tried]
    assert sizes == [8, 4, 2, *[1] * 8]
    assert len(warned(events)) == 3


def test_a_halved_size_outlives_the_process(
    plain: dict[str, Any],
    limited: Limit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(plain, "whole", cohort_size=2).output_dir
    out = Path(plain["output_dir"])
    limited(2, ERRORS["GPU"])
    with pytest.raises(StoppedError):
        run(plain, cohort_size=4, callbacks=[stop_after(1)])
    assert config_of(out)["cohort_size"] == 4
    saved = json.loads((out / "round-1" / "state" / "state.json").read_text())
    assert saved["extra"]["cohort_size"] == 2
    monkeypatch.undo()
    tried = limited(99, ERRORS["GPU"])
    events: list[Mapping[str, Any]] = []
    fedlora.run(resume=out, report=events.append)
    assert tried == [[0, 1], [2, 3]]
    assert warned(events) == []
    same_bits(out, whole)


@pytest.mark.parametrize("size", [1, 4])
def test_one_client_that_does_not_fit_ends_the_run(
    plain: dict[str, Any], limited: Limit, size: int
) -> None:
    """What was saved stays, and with more memory the run goes on."""
    whole = run(plain, "whole", cohort_size=1).output_dir
    tried = limited(0, ERRORS["GPU"])
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        run(plain, cohort_size=size)
    assert [len(clients) for clients in tried] == ([1] if size == 1 else [4, 2, 1])
    limited(1, ERRORS["GPU"])
    out = Path(plain["output_dir"])
    assert list(out.glob("round-*")) == []
    fedlora.run(resume=out)
    same_bits(out, whole)


def test_other_errors_are_no_lack_of_memory(plain: dict[str, Any], limited: Limit) -> None:
    tried = limited(2, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    events: list[Mapping[str, Any]] = []
    with pytest.raises(RuntimeError, match="must match the size"):
        run(plain, cohort_size=4, report=events.append)
    assert tried == [[0, 1, 2, 3]]
    assert warned(events) == []


def test_an_own_training_sees_one_client_at_a_time(
    plain: dict[str, Any], cohorts: list[tuple[int, list[int]]]
) -> None:
    seen: list[tuple[int, int]] = []

    def own(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        assert {len(layer.clients) for layer in layers} == {1}
        ranks = {len(layer.A) for layer in layers if layer.A is not None}
        assert ranks == {plain["client_ranks"][training.client]}
        seen.append((training.round, training.client))
        return train(model, dataset, training)

    events: list[Mapping[str, Any]] = []
    paths = {}
    for size in (1, 4, "auto"):
        seen.clear()
        events.clear()
        result = run(
            plain, f"own-{size}", cohort_size=size, train_function=own, report=events.append
        )
        assert seen == [(number, client) for number in (1, 2) for client in range(4)]
        steps = [e["client"] for e in events if e["event"] == "step"]
        assert steps == [k for _ in (1, 2) for k in range(4) for _ in range(3)]
        assert [e["client"] for e in events if e["event"] == "client_end"] == [0, 1, 2, 3] * 2
        paths[size] = result.output_dir
    assert cohorts == []
    same_bits(paths[4], paths[1])
    same_bits(paths["auto"], paths[1])
    close(run(plain, "ours", cohort_size=4).output_dir, paths[1])


def test_an_own_training_that_runs_out_of_memory_ends_the_run(plain: dict[str, Any]) -> None:
    """There is no pass to make smaller, and nobody is trained a second time."""
    seen: list[int] = []
    events: list[Mapping[str, Any]] = []

    def own(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        seen.append(training.client)
        if training.client == 1:
            raise ERRORS["GPU"]
        return train(model, dataset, training)

    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(plain, cohort_size=4, train_function=own, report=events.append)
    assert seen == [0, 1]
    assert warned(events) == []
    begun = [(e["event"], e["client"]) for e in events if e["event"].startswith("client_")]
    assert begun == [("client_begin", 0), ("client_end", 0), ("client_begin", 1)]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT, which counts positions by its attention mask and cannot do without one."""
    path = tmp_path_factory.mktemp("models") / "opt"
    keys = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
    torch.manual_seed(0)
    config = hf.OPTConfig(**keys, ffn_dim=48, word_embed_proj_dim=32)
    hf.OPTForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def test_an_architecture_that_mixes_rows_trains_one_client_at_a_time(
    plain: dict[str, Any], opt: Path, cohorts: list[tuple[int, list[int]]]
) -> None:
    values = {**plain, "model_name_or_path": str(opt), "max_steps": 2}
    paths = {}
    for size in ("auto", 1, 4):
        cohorts.clear()
        paths[size] = run(values, f"size-{size}", cohort_size=size).output_dir
        assert cohorts == [(number, [client]) for number in (1, 2) for client in range(4)]
    assert [config_of(paths[size])["cohort_size"] for size in ("auto", 1, 4)] == [1, 1, 4]
    same_bits(paths["auto"], paths[1])
    same_bits(paths[4], paths[1])
    rounds = [line for line in course(paths[1]) if line["event"] == "round"]
    assert all(c["metrics"]["padding"] > 0 for line in rounds for c in line["clients"])
    assert rounds[-1]["evaluation"]["loss"] < course(paths[1])[1]["evaluation"]["loss"]


@pytest.fixture(scope="module")
def four(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of four clients: those of two, each in halves."""
    path = tmp_path_factory.mktemp("four")
    for kind in ("label", "text"):
        for site in (0, 1):
            lines = (data / f"{kind}_{site}.jsonl").read_text().splitlines(keepends=True)
            half = len(lines) // 2
            (path / f"{kind}_{2 * site}.jsonl").write_text("".join(lines[:half]))
            (path / f"{kind}_{2 * site + 1}.jsonl").write_text("".join(lines[half:]))
        name = f"eval_{kind}.jsonl"
        (path / name).write_text((data / name).read_text())
    return path


def heads_of(path: Path) -> dict[str, torch.Tensor]:
    """The parameters of the final adapter that are trained whole."""
    saved = load_file(path / "final" / WEIGHTS_NAME)
    return {name: x for name, x in saved.items() if "lora_" not in name}


ROBERTA = {**COMMON, **STILL, "pad_token_id": 1, "bos_token_id": 0}


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: (hf.BertConfig(**COMMON, **STILL), hf.BertModel),
    "dropping bert": lambda: (hf.BertConfig(**COMMON), hf.BertModel),
    "roberta": lambda: (hf.RobertaConfig(**ROBERTA), hf.RobertaModel),
    "llama": lambda: (hf.LlamaConfig(**GROUPED), None),
    "distilbert": lambda: (hf.DistilBertConfig(**DISTILBERT), None),
    "modernbert": lambda: (hf.ModernBertConfig(**COMMON, cls_token_id=1, sep_token_id=2), None),
    "deberta": lambda: (hf.DebertaV2Config(**COMMON), None),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_train_together(name: str, four: Path, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", *CLASSIFIERS[name]())
    keys = keys_of(path, four, tmp_path / "out", True, client_ranks=[3, 2, 1, 4], lora_dropout=0.1)
    paths = {size: run(keys, f"size-{size}", cohort_size=size).output_dir for size in (1, 4)}
    close(paths[4], paths[1])
    heads, others = heads_of(paths[4]), heads_of(paths[1])
    assert heads
    for key, x in heads.items():
        torch.testing.assert_close(x, others[key], rtol=1e-4, atol=1e-6)


DROPPING: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, attention_dropout=0.1),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "bert": lambda: hf.BertConfig(**COMMON),
    "distilbert": lambda: hf.DistilBertConfig(**DISTILBERT),
}


@pytest.mark.parametrize("name", DROPPING)
def test_no_two_places_drop_the_same_entries(
    name: str, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pass each client draws once for every layer, attention and adapter among them."""
    drawn: list[list[tuple[int, int]]] = [[]]  # first what is drawn to try the architecture
    backward, keep = PackedRunner.backward, ClientRows.keep

    def a_pass(self: PackedRunner, *given: Any) -> Any:
        drawn.append([])
        return backward(self, *given)

    def drawing(self: ClientRows, client: int, site: int, *given: Any) -> Any:
        drawn[-1].append((client, site))
        return keep(self, client, site, *given)

    monkeypatch.setattr(PackedRunner, "backward", a_pass)
    monkeypatch.setattr(ClientRows, "keep", drawing)
    path = save_model(tmp_path / "model", DROPPING[name]())
    classify = "bert" in name
    keys = keys_of(path, four, tmp_path / "out", classify, num_rounds=1, lora_dropout=0.1)
    run(keys, client_ranks=2, cohort_size=4)
    assert len(drawn) == 3
    for places in drawn[1:]:
        assert {client for client, _ in places} == {0, 1, 2, 3}
        assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    "whole",
    [["lm_head"], ["embed_tokens"], ["mlp"], ["self_attn"], ["layers.1"], ["norm"], ["down_proj"]],
    ids=str,
)
def test_modules_beside_adapters_train_together(
    whole: list[str], four: Path, tmp_path: Path
) -> None:
    path = save_model(tmp_path / "model", hf.LlamaConfig(**GROUPED))
    more: dict[str, Any] = {"lora_modules_to_save": whole, "client_ranks": [3, 2, 1, 4]}
    if whole == ["down_proj"]:
        more["lora_target_modules"] = ["q_proj", "v_proj"]
    keys = keys_of(path, four, tmp_path / "out", False, **more, lora_dropout=0.1)
    start = assemble(Config(**keys)).base.read_full_params()
    paths = {size: run(keys, f"size-{size}", cohort_size=size).output_dir for size in (1, 4)}
    close(paths[4], paths[1])
    ends = fedlora.load_adapter(paths[4] / "final").dense
    assert ends.keys() == start.keys()
    assert all(not torch.equal(x, start[name]) for name, x in ends.items())


def test_what_is_tied_trains_one_client_at_a_time(
    four: Path, tmp_path: Path, cohorts: list[tuple[int, list[int]]]
) -> None:
    """There is but one of it, so that clients cannot each have their own in a pass."""
    path = save_model(tmp_path / "model", hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    both = {"lora_modules_to_save": ["lm_head", "embed_tokens"], "client_ranks": [3, 2, 1, 4]}
    keys = keys_of(path, four, tmp_path / "out", False, **both)
    paths = {}
    for size in (1, 4, "auto"):
        cohorts.clear()
        paths[size] = run(keys, f"size-{size}", cohort_size=size).output_dir
        assert [len(clients) for _, clients in cohorts] == [1] * 8
    assert config_of(paths["auto"])["cohort_size"] == 1
    same_bits(paths[4], paths[1])
    same_bits(paths["auto"], paths[1])
