"""Runs on a base in 8 or 4 bits: as exact as on a full one, and the base is never written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedlora
from fedlora import Config
from fedlora.engines.local import run_session
from fedlora.errors import InputError
from fedlora.model.quantised_linear import QuantisedLinear
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.session import assemble
from support.conformance import lines_of, three_clients
from support.courses import tensor_files
from support.extras import needs_bitsandbytes
from support.quantised import digest_of, layers_of
from support.runs import evaluation_rows, run
from support.sites import InMemoryTransport, SiteInMemory, federate, sites_of

Keys = Mapping[str, Any]

pytestmark = [needs_bitsandbytes, pytest.mark.usefixtures("kept_bases")]

EXACT = {"method": "exact", "num_rounds": 2, "dtype": "float32", "use_cpu": True}


def update_of(path: Path) -> dict[str, Tensor]:
    """Module -> `B A`, `(m, n)`, of an adapter on disk, in float64."""
    values = load_file(path / "adapter_model.safetensors")
    out = {}
    for key, a in values.items():
        if key.endswith(".lora_A.weight"):
            b = values[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            out[name] = b.double() @ a.double()
    return out


def in_bits(bits: int | None) -> dict[str, bool]:
    return {f"load_in_{bits}bit": True} if bits else {}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_global_update_is_the_exact_mean(small_run: Keys, tmp_path: Path, bits: int) -> None:
    """As exact as on a full base, against the clients' updates in dense float64."""
    keys = {**small_run, **EXACT, "num_rounds": 1, "save_client_models": True}
    result = run(keys, **in_bits(bits))
    final = Path(result.output_dir) / "final"
    number = [24, 16, 12, 8]
    parts = [update_of(final / f"client-{k}") for k in range(len(number))]
    for name, own in update_of(final).items():
        wanted = sum(n / sum(number) * part[name] for n, part in zip(number, parts, strict=True))
        assert isinstance(wanted, Tensor)
        assert float((own - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_model_is_the_dense_one_in_float64(small_run: Keys, bits: int) -> None:
    """The loss of the global model is that of the dequantised weights plus the update, dense."""
    from transformers import AutoModelForCausalLM

    result = run({**small_run, **EXACT}, **in_bits(bits))
    base = assemble(Config(**{**small_run, **EXACT, **in_bits(bits)})).base
    dense = AutoModelForCausalLM.from_pretrained(small_run["model_name_or_path"], dtype="float64")
    update = update_of(Path(result.output_dir) / "final")
    with torch.no_grad():
        for name, layer in layers_of(base.model).items():
            dense.get_submodule(name).weight.copy_(layer.weight.double() + update[name])
        total, count = 0.0, 0
        for row in evaluation_rows(small_run):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            number = int((labels[:, 1:] != -100).sum())
            total += float(dense(input_ids=ids, labels=labels).loss) * number
            count += number
    assert result.metrics[-2]["evaluation"]["loss"] == pytest.approx(total / count, rel=1e-5)


class _StopsError(Exception):
    pass


@pytest.mark.parametrize("bits", [8, 4])
def test_the_base_is_never_written_to(small_run: Keys, tmp_path: Path, bits: int) -> None:
    """Several rounds, broken off half way and resumed, end in the same bytes on the same base."""
    keys = {**small_run, **EXACT, **in_bits(bits), "num_rounds": 4}
    whole = run(keys, "whole")

    def stops(line: Mapping[str, Any]) -> None:
        if line["event"] == "round" and line["round"] == 2:
            raise _StopsError

    session = assemble(Config(**{**keys, "output_dir": str(tmp_path / "broken")}))
    before = digest_of(session.base.model)
    with pytest.raises(_StopsError):
        run_session(session, report=stops)
    assert digest_of(session.base.model) == before
    resumed = fedlora.run(resume=tmp_path / "broken")
    assert digest_of(assemble(Config(**keys)).base.model) == before
    one, other = (tensor_files(x.output_dir) for x in (whole, resumed))
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []
    read = read_metrics(tmp_path / "broken")
    assert [x["round"] for x in read if x["event"] == "round"] == [1, 2, 3, 4]


def test_clients_hold_the_base_in_different_precisions(small_run: Keys) -> None:
    """Each trains as it would among clients that all hold it so; one global model comes of it."""
    keys = {**small_run, **EXACT, "num_rounds": 1, "save_client_models": True, "cohort_size": 1}
    own = {1: {"load_in_4bit": True}, 3: {"load_in_8bit": True}}
    finals = {
        name: Path(run(keys, name, **more).output_dir) / "final"
        for name, more in {
            "mixed": {"client_overrides": own},
            "full": {},
            "four": {"load_in_4bit": True},
            "eight": {"load_in_8bit": True},
        }.items()
    }
    for client, like in enumerate(("full", "four", "full", "eight")):
        mixed = update_of(finals["mixed"] / f"client-{client}")
        for name, wanted in update_of(finals[like] / f"client-{client}").items():
            assert torch.equal(mixed[name], wanted)
    assert not torch.equal(
        update_of(finals["four"] / "client-1")["model.layers.0.self_attn.q_proj"],
        update_of(finals["full"] / "client-1")["model.layers.0.self_attn.q_proj"],
    )


def test_clients_of_one_pass_hold_it_in_different_precisions(small_run: Keys) -> None:
    own = {1: {"load_in_4bit": True}, 3: {"load_in_4bit": True}}
    keys = {**small_run, **EXACT, "client_overrides": own}
    one, together = run(keys, "one", cohort_size=1), run(keys, "together", cohort_size=4)
    for name, wanted in update_of(Path(one.output_dir) / "final").items():
        got = update_of(Path(together.output_dir) / "final")[name]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_sites_hold_the_base_in_different_precisions(small_run: Keys, tmp_path: Path) -> None:
    """In their own files; the fingerprint of the original weights lets them into one run."""
    keys = three_clients(small_run)
    sites = sites_of(keys, tmp_path / "sites")
    for name, precision in zip(
        sites, ({"load_in_4bit": True}, {"load_in_8bit": True}), strict=False
    ):
        site = sites[name].site
        settings = {**site.settings, **precision}
        sites[name] = SiteInMemory(site.model_copy(update={"settings": settings}))
    result = federate(keys, tmp_path / "out", InMemoryTransport(sites))
    assert len(lines_of(result)) == keys["num_rounds"]
    held = [site.service._loaded for site in sites.values()]
    bits = [
        {x.bits for x in loaded.session.base.model.modules() if isinstance(x, QuantisedLinear)}
        for loaded in held
        if loaded is not None
    ]
    assert bits == [{4}, {8}, set()]


def test_a_module_that_is_trained_whole_is_saved(small_run: Keys) -> None:
    keys = {**small_run, **EXACT, "lora_modules_to_save": ["norm"], "num_rounds": 1}
    result = run(keys, load_in_4bit=True)
    values = load_file(Path(result.output_dir) / "final" / "adapter_model.safetensors")
    assert [key for key in values if key.endswith("model.norm.weight")]


def test_a_base_that_was_saved_quantised_is_not_quantised_again(
    small_run: Keys, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    path.mkdir()
    for file in Path(small_run["model_name_or_path"]).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"was saved quantised already \(bitsandbytes\)"):
        run(small_run, model_name_or_path=str(path), load_in_4bit=True)
