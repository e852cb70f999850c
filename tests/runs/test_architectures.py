"""Every kind of model: trained, saved, and loaded again by PEFT with the same logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM
from torch import Tensor

import fedlora
from fedlora.client.evaluate import evaluate
from fedlora.client.trainer import train
from fedlora.config.yaml_file import read_yaml
from fedlora.federation.exchange import global_delta
from fedlora.lowrank import LowRank, add_all, prefix, to_dense
from fedlora.methods import METHODS
from fedlora.runs.session import assemble
from support.architectures import (
    CASES,
    COMMON,
    ENCODERS,
    MIXTURES,
    Rounds,
    adapted_by_peft,
    assert_same_logits,
    by_peft,
    data,  # noqa: F401
    keys_of,
    logits,
    models,  # noqa: F401
    save_model,
    train_federation,
)
from support.models import load_base
from support.products import in_turn
from support.rows import write_jsonl

pytestmark = pytest.mark.usefixtures("kept_bases")


@pytest.mark.parametrize(
    ("name", "classify"), CASES, ids=[n + ("-classifier" if c else "") for n, c in CASES]
)
def test_peft_loads_the_trained_model_with_our_logits(
    name: str, classify: bool, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    trained = train_federation(keys_of(models(name), data, tmp_path / "out", classify))
    ours, theirs = trained.ours(), by_peft(trained)
    assert_same_logits(ours.model, theirs)
    # The comparison would see a missing adapter, and one missing in a single module.
    assert (logits(theirs) - logits(by_peft(trained, adapter=False))).abs().max() > 1e-2
    assert trained.result.adapter.keys() == ours.targets.shapes.keys()
    assert all(to_dense(x).any() for x in trained.result.adapter.values())
    # What was logged is this model's.
    session = assemble(trained.config)
    measured = evaluate(
        theirs,
        ours.tokenizer,
        session.data.eval,
        batch_size=3,
        label_names=session.data.label_names,
    )
    logged = trained.result.evaluations[2]
    assert measured["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert logged["loss"] != pytest.approx(trained.result.evaluations[0]["loss"], rel=1e-3)
    assert [c["rank"] for c in trained.result.metrics[-2]["clients"]] == [3, 2]
    assert trained.result.metrics[-2]["aggregation_error"] < 1e-5


def test_causal_adapters_load_by_their_directory_alone(
    models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    trained = train_federation(keys_of(models("llama"), data, tmp_path / "out", False))
    final, ours = trained.result.final_dir, trained.ours().model
    assert_same_logits(ours, AutoPeftModelForCausalLM.from_pretrained(final))
    assert_same_logits(ours, hf.AutoModelForCausalLM.from_pretrained(final))
    assert_same_logits(ours, hf.pipeline("text-generation", model=str(final)).model)
    assert_same_logits(ours, by_peft(trained).merge_and_unload())


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_get_no_adapter_and_the_user_is_told(
    name: str, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    keys = keys_of(models(name), data, tmp_path / "out", False, num_rounds=1)
    trained = train_federation(keys)
    changed = {n.rpartition(".")[2] for n, x in trained.result.adapter.items() if to_dense(x).any()}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = hf.AutoModelForCausalLM.from_pretrained(models(name))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    share = sum(size for n, size in sizes.items() if ".experts." in n) / sum(sizes.values())
    told = [w for w in trained.warnings if "expert" in w]
    assert len(told) == 1
    assert f"{share:.0%} of the parameters" in told[0]
    assert "no adapter" in told[0]
    dense = assemble(fedlora.Config(**keys_of(models("llama"), data, tmp_path / "dense", False)))
    assert not [w for w in dense.warnings if "expert" in w]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_no_causal_model(
    name: str, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    keys = keys_of(models(name), data, tmp_path / "out", False)
    with pytest.raises(fedlora.InputError, match="model_name_or_path: ") as found:
        fedlora.run(fedlora.Config(**keys))
    assert "reads text in both directions" in str(found.value)
    assert "label_column_name" in str(found.value)
    assert not (tmp_path / "out").exists()


def save_roberta(path: Path, positions: int) -> Path:
    """A RoBERTa whose padding token has the id 1, as published ones have."""
    from transformers import PreTrainedTokenizerFast

    config = hf.RobertaConfig(
        **{**COMMON, "max_position_embeddings": positions, "pad_token_id": 1, "bos_token_id": 0}
    )
    save_model(path, config)
    core = PreTrainedTokenizerFast.from_pretrained(path).backend_tokenizer
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as kinds

    vocabulary = {**core.get_vocab(), "<s>": 0, "<pad>": 1}
    core = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


def test_the_context_of_roberta_begins_behind_its_padding_token(data: Path, tmp_path: Path) -> None:
    """Positions count from `pad_token_id + 1` on: of 26, 24 are left (of 514, 512)."""
    path = save_roberta(tmp_path / "roberta", positions=26)
    long = [{"text": "a" * 24, "label": "x"}, {"text": "b" * 24, "label": "y"}]
    files = tmp_path / "files"
    files.mkdir()
    for site in (0, 1):
        write_jsonl(files / f"label_{site}.jsonl", long)
    write_jsonl(files / "eval_label.jsonl", long)
    trained = train_federation(keys_of(path, files, tmp_path / "out", True, num_rounds=1))
    assert trained.result.evaluations[1]["loss"] > 0
    longer = [{"text": "a" * 25, "label": "x"}, {"text": "b" * 24, "label": "y"}]
    write_jsonl(files / "label_1.jsonl", longer)
    keys = keys_of(path, files, tmp_path / "longer", True)
    with pytest.raises(fedlora.InputError, match=r"25 tokens, the model's context 24; .* 24 or"):
        fedlora.run(fedlora.Config(**keys))
    plain = hf.AutoModelForSequenceClassification.from_pretrained(path)
    plain(input_ids=torch.full((1, 24), 50))
    with pytest.raises((IndexError, RuntimeError), match="index"):  # the model's own bound
        plain(input_ids=torch.full((1, 25), 50))
    keys = keys_of(path, files, tmp_path / "cut", True, max_length=24, num_rounds=1)
    assert train_federation(keys).result.evaluations[1]["loss"] > 0


def test_positions_without_an_end_are_no_context(data: Path, tmp_path: Path) -> None:
    """XLNet says -1, its positions are relative."""
    config = hf.XLNetConfig(
        vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0
    )
    path = save_model(tmp_path / "xlnet", config, hf.XLNetLMHeadModel)
    trained = train_federation(keys_of(path, data, tmp_path / "out", True, num_rounds=1))
    assert_same_logits(trained.ours().model, by_peft(trained))


def save_mamba(path: Path) -> Path:
    config = hf.MambaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0
    )
    return save_model(path, config, hf.MambaForCausalLM)


def test_a_state_space_model_is_trained_where_peft_allows_it(data: Path, tmp_path: Path) -> None:
    path, named = save_mamba(tmp_path / "mamba"), ["in_proj", "x_proj"]
    keys = keys_of(path, data, tmp_path / "out", False, lora_target_modules=named)
    trained = train_federation(keys)
    assert_same_logits(trained.ours().model, by_peft(trained))
    assert all(to_dense(x).any() for x in trained.result.adapter.values())


@pytest.mark.parametrize("wanted", ["all-linear", ["in_proj", "out_proj"]], ids=str)
def test_targets_that_peft_refuses_are_refused_before_training(
    wanted: Any, data: Path, tmp_path: Path
) -> None:
    """Mamba reads the weight of `out_proj` past its layer; no adapter there could be loaded."""
    path = save_mamba(tmp_path / "mamba")
    plain = hf.AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        adapted_by_peft(plain, wanted, "CAUSAL_LM", [])
    keys = keys_of(path, data, tmp_path / "out", False, lora_target_modules=wanted)
    with pytest.raises(fedlora.InputError, match=r"lora_target_modules: .*out_proj"):
        fedlora.run(fedlora.Config(**keys))


def test_layers_that_peft_passes_by_are_left_out(data: Path, tmp_path: Path) -> None:
    """PEFT takes the `gate_proj` of DeepSeek's dense layers for one of its fused experts."""
    config = hf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    path = save_model(tmp_path / "deepseek", config, hf.AutoModelForCausalLM)
    trained = train_federation(keys_of(path, data, tmp_path / "out", False))
    theirs = by_peft(trained)
    assert_same_logits(trained.ours().model, theirs)
    assert (logits(theirs) - logits(by_peft(trained, adapter=False))).abs().max() > 1e-2
    assert not [name for name in trained.result.adapter if name.endswith("gate_proj")]
    assert any("leaves out" in w and "gate_proj" in w for w in trained.warnings)
    keys = keys_of(path, data, tmp_path / "named", False, lora_target_modules=["gate_proj"])
    with pytest.raises(fedlora.InputError, match=r"gate_proj .*fused expert weights"):
        fedlora.run(fedlora.Config(**keys))


def one_client_differs(
    model: Path, site_files: Path, out: Path, method: str, ranks: Sequence[int]
) -> dict[str, Any]:
    """Four clients, of which client 1 trains q_proj alone."""
    return {
        "model_name_or_path": str(model),
        "train_file": str(site_files / "site_*.jsonl"),
        "eval_file": str(site_files / "eval.jsonl"),
        "method": method,
        "client_ranks": list(ranks),
        "client_overrides": {1: {"lora_target_modules": ["q_proj"]}},
        "num_rounds": 3,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "use_cpu": True,
        "num_threads": 1,
        "output_dir": str(out),
    }


def wide(x: Any, shape: tuple[int, int]) -> Tensor:
    """An update as a matrix in float64; nothing is zeros."""
    if x is None:
        return torch.zeros(shape, dtype=torch.float64)
    return x.B.double() @ x.A.double() if isinstance(x, LowRank) else x.W.double()


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_a_client_trains_its_own_modules_and_the_sum_is_exact(
    method: str, tiny_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", method, (8, 4, 2, 2))
    rounds = Rounds(assemble(fedlora.Config(**keys)))
    shapes = rounds.session.federation.shapes
    own = {name for name in shapes if name.endswith("q_proj")}
    weights = [w / 60 for w in (24, 16, 12, 8)]
    for number in (1, 2, 3):
        before, starts, updates = rounds.next()
        assert updates[1].adapter.keys() == own
        assert all(updates[k].adapter.keys() == shapes.keys() for k in (0, 2, 3))
        moved = [
            name
            for name, x in updates[1].adapter.items()
            if not torch.equal(x.B, starts[1].adapter[name].B)
        ]
        assert set(moved) == own
        # What client 1 does not train is the global model, as it was sent.
        was, now = global_delta(before), global_delta(rounds.server.state)
        sent = add_all([before.base_delta, starts[1].frozen])
        for name in shapes.keys() - own:
            torch.testing.assert_close(
                wide(sent.get(name), shapes[name]),
                wide(was.get(name), shapes[name]),
                rtol=1e-4,
                atol=1e-7,
            )
        for name, shape in shapes.items():
            expected = wide(was.get(name), shape)
            for client, weight in enumerate(weights):
                if name in updates[client].adapter:
                    trained = wide(updates[client].adapter[name], shape)
                    expected += weight * (trained - wide(starts[client].adapter[name], shape))
            found = wide(now.get(name), shape)
            assert float((found - expected).norm() / expected.norm()) < 1e-6, (number, name)
        assert rounds.record.aggregation_error is not None
        assert rounds.record.aggregation_error < 1e-5
        assert [c.weight for c in rounds.record.clients] == pytest.approx(weights)


@pytest.fixture(scope="module")
def shapes(tiny_llama: Path) -> Mapping[str, tuple[int, int]]:
    """Of every layer that can carry an adapter."""
    found: Mapping[str, tuple[int, int]]
    found = load_base(str(tiny_llama), target_modules="all-linear", weights=False).targets.shapes
    return found


@pytest.mark.parametrize("method", in_turn(sorted(METHODS), 1))
def test_the_model_that_client_trains_has_adapters_in_its_own_modules_alone(
    method: str,
    shapes: Mapping[str, tuple[int, int]],
    tiny_llama: Path,
    site_files: Path,
    tmp_path: Path,
) -> None:
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", method, (4, 4, 4, 4))
    keys["num_rounds"] = 2
    seen: list[set[str]] = []

    def looking(model: Any, dataset: Any, training: Any) -> dict[str, Any]:
        if training.client == 1:
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            seen.append({n.partition(".clients.")[0].rpartition(".")[2] for n in trained})
        return train(model, dataset, training)

    result = fedlora.run(fedlora.Config(**keys), train_function=looking)
    assert seen == [{"q_proj"}] * 2
    rule = METHODS[method]
    for line in result.metrics:
        if line["event"] == "round":
            sent = rule.training(rule.options()).sent(line["round"])
            sizes = {  # rank 4, four bytes a value
                n: 4 * 4 * (m * ("B" in sent) + k * ("A" in sent)) for n, (m, k) in shapes.items()
            }
            up = [client["bytes_up"] for client in line["clients"]]
            assert up[1] == sum(size for n, size in sizes.items() if n.endswith("q_proj"))
            assert up[0] == up[2] == up[3] == sum(sizes.values())


def test_resolved_settings_keep_the_modules_of_a_client(
    tiny_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", "exact", (2, 2, 2, 2))
    run = fedlora.run(fedlora.Config(**{**keys, "num_rounds": 1}))
    written = read_yaml(run.output_dir / "config.yaml")
    again = fedlora.Config(**{**written, "output_dir": str(tmp_path / "again")})
    assert again.of_client(1).lora_target_modules == ["q_proj"]
    second = fedlora.run(again)
    name = "adapter_model.safetensors"
    assert (run.final_dir / name).read_bytes() == (second.final_dir / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "ranks"),
    [("fedit", (4, 4, 4, 4)), ("zero_pad", (4, 4, 4, 4)), ("zero_pad", (8, 4, 2, 2))],
    ids=["fedit", "zero_pad", "zero_pad-mixed"],
)
def test_averaged_factors_count_the_start_of_one_who_did_not_train_them(
    method: str, ranks: tuple[int, ...], tiny_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    """Its weight counts in full, and what it holds instead is the global factor."""
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", method, ranks)
    rounds = Rounds(assemble(fedlora.Config(**keys)))
    shapes, top = rounds.session.federation.shapes, max(ranks)
    weights = [w / 60 for w in (24, 16, 12, 8)]
    for _ in (1, 2):
        before, starts, updates = rounds.next()
        for name in shapes:
            current = before.adapter[name]
            assert isinstance(current, LowRank)
            a, b = torch.zeros_like(current.A).double(), torch.zeros_like(current.B).double()
            for client, weight in enumerate(weights):
                x = updates[client].adapter.get(name, current)
                assert x is not current or client == 1
                a[: x.rank] += weight * x.A.double()
                b[:, : x.rank] += weight * x.B.double()
            found = rounds.server.state.adapter[name]
            assert isinstance(found, LowRank)
            assert found.rank == top
            torch.testing.assert_close(found.A.double(), a, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found.B.double(), b, rtol=1e-5, atol=1e-7)
            if name not in updates[1].adapter:  # beside its adapter lies what it was sent
                held = starts[1].frozen[name]
                torch.testing.assert_close(to_dense(held), to_dense(prefix(current, ranks[1])))


def test_modules_of_a_client_are_among_those_of_the_run(
    tiny_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", "exact", (2, 2, 2, 2))
    keys["lora_target_modules"] = ["k_proj", "v_proj"]
    with pytest.raises(fedlora.InputError, match=r"client 1: .*'q_proj'.*k_proj, v_proj"):
        fedlora.run(fedlora.Config(**keys))
