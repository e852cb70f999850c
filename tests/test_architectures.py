"""Every kind of model: trained, saved, and loaded again by PEFT with the same logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils import constants
from torch import Tensor

import fedlora
from conftest import load_base, rows, save_tokenizer, write_jsonl
from fedlora.client.evaluate import evaluate
from fedlora.client.trainer import train
from fedlora.client.worker import Worker
from fedlora.config.sources import read_yaml
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import client_start, global_delta
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.server import Server
from fedlora.lowrank import LowRank, add_all, prefix, to_dense
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.model.base import BaseModel
from fedlora.runs.session import Session, assemble, starting_state

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DISTILBERT = {
    "vocab_size": 100,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**WIDE_HEADS),
    "gemma": lambda: hf.GemmaConfig(**WIDE_HEADS),
    "gemma2": lambda: hf.Gemma2Config(**WIDE_HEADS, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**WIDE_HEADS, sliding_window=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, **EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **WIDE_HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=16
    ),
}
MIXTURES = ("mixtral", "qwen3_moe")
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**COMMON),
    "roberta": lambda: hf.RobertaConfig(**COMMON),
    "distilbert": lambda: hf.DistilBertConfig(**DISTILBERT),
    "deberta": lambda: hf.DebertaV2Config(**COMMON),
    "modernbert": lambda: hf.ModernBertConfig(**COMMON, cls_token_id=1, sep_token_id=2),
}
CLASSIFIERS = (*ENCODERS, "llama", "gpt2", "gemma")
"""The encoders' checkpoints are masked language models: no pooler, no head."""
LABELS = ("fig", "ox 9", "ox 10")


def save_model(path: Path, config: Any, kind: Any = None) -> Path:
    """A random model with the character tokenizer."""
    if kind is None:
        decoder = config.model_type in {make().model_type for make in DECODERS.values()}
        kind = hf.AutoModelForCausalLM if decoder else hf.AutoModelForMaskedLM
    torch.manual_seed(0)
    make = kind.from_config if hasattr(kind, "from_config") else kind
    make(config).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a directory with a tiny random model of that architecture, made on first use."""
    where = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (where / name).is_dir():
            save_model(where / name, (DECODERS | ENCODERS)[name]())
        return where / name

    return get


def labelled_rows(
    number: int, offset: int = 0, labels: Sequence[Any] = LABELS
) -> list[dict[str, Any]]:
    """Texts of different lengths; the label can be read off the text's beginning."""
    out: list[dict[str, Any]] = []
    for i, row in enumerate(rows(number, offset)):
        kind = i % len(labels)
        out.append({"text": f"{'abcdef'[kind]} {row['prompt']}{'x' * (i % 5)}"})
        out[-1]["label"] = labels[kind]
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients' rows and held-out ones, to complete (`text_*`) and to classify (`label_*`)."""
    path = tmp_path_factory.mktemp("data")
    for site, number in enumerate((9, 6)):
        write_jsonl(path / f"text_{site}.jsonl", rows(number, 10 * site))
        write_jsonl(path / f"label_{site}.jsonl", labelled_rows(number, 10 * site))
    write_jsonl(path / "eval_text.jsonl", rows(5, 1000))
    write_jsonl(path / "eval_label.jsonl", labelled_rows(7, 1000))
    return path


def keys_of(model: Path, data: Path, out: Path, classify: bool, **more: Any) -> dict[str, Any]:
    """A run of a tenth of a second: two clients of ranks 3 and 2."""
    kind = "label" if classify else "text"
    return {
        "model_name_or_path": str(model),
        "train_file": str(data / f"{kind}_*.jsonl"),
        "eval_file": str(data / f"eval_{kind}.jsonl"),
        "label_column_name": "label" if classify else None,
        "client_ranks": [3, 2],
        "num_rounds": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "use_cpu": True,
        "num_threads": 1,
        "output_dir": str(out),
        **more,
    }


@dataclass(frozen=True)
class Trained:
    """A finished run, and its last state."""

    model: Path
    config: fedlora.Config
    result: fedlora.Result
    state: ServerState
    warnings: tuple[str, ...]

    def ours(self) -> BaseModel:
        """The global model, put together once more by the package itself."""
        base = assemble(self.config).base
        base.load([self.state.base_delta, self.state.adapter], full_params=self.state.dense)
        return base


def train_federation(keys: dict[str, Any]) -> Trained:
    """A whole run through the public entry."""
    config, states, warnings = fedlora.Config(**keys), list[ServerState](), list[str]()

    def report(event: Any) -> None:
        if event["event"] == "warning":
            warnings.append(event["message"])

    result = fedlora.run(config, callbacks=[lambda r: states.append(r.state)], report=report)
    return Trained(Path(keys["model_name_or_path"]), config, result, states[-1], tuple(warnings))


def by_peft(trained: Trained, adapter: bool = True, **options: Any) -> Any:
    """The saved adapter on a base that PEFT's users load themselves."""
    final = trained.result.final_dir
    if trained.config.label_column_name:
        made = hf.AutoModelForSequenceClassification.from_pretrained(
            trained.model, config=hf.AutoConfig.from_pretrained(final), **options
        )
    else:
        made = hf.AutoModelForCausalLM.from_pretrained(trained.model, **options)
    return (PeftModel.from_pretrained(made, final) if adapter else made).eval()


def padded() -> dict[str, Tensor]:
    """Three sequences of 12, 12 and 7 tokens."""
    ids = torch.randint(4, 99, (3, 12), generator=torch.Generator().manual_seed(5))
    ids[2, 7:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model: Any, batch: dict[str, Tensor] | None = None) -> Tensor:
    """At the tokens that are no padding, or of the rows; dropout off."""
    batch = padded() if batch is None else batch
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found


def assert_same_logits(ours: Any, theirs: Any, batch: dict[str, Tensor] | None = None) -> None:
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), rtol=1e-5, atol=3e-6)


# --- trained, saved, loaded ---

CASES = [(name, False) for name in DECODERS] + [(name, True) for name in CLASSIFIERS]


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


# --- target modules ---


def adapted_by_peft(model: Any, wanted: Any, task: str, whole: Sequence[str]) -> set[str]:
    """The modules PEFT puts an adapter on."""
    theirs = get_peft_model(
        model,
        LoraConfig(task_type=task, target_modules=wanted, modules_to_save=list(whole) or None),
    )
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).removesuffix(".lora_A")
        for name, _ in theirs.named_modules()
        if name.endswith(".lora_A")
    }


def names_of(name: str) -> list[str]:
    """Two names of linear layers; "dense" is also an end of names in heads and poolers."""
    found = {
        "gpt2": ["c_attn", "c_proj"],
        "gpt_neox": ["query_key_value", "dense"],
        "phi3": ["qkv_proj", "down_proj"],
        "bert": ["query", "dense"],
        "roberta": ["query", "dense"],
        "deberta": ["query_proj", "dense"],
        "distilbert": ["q_lin", "lin1"],
        "modernbert": ["Wqkv", "Wo"],
    }
    return found.get(name, ["q_proj", "o_proj"])


@pytest.mark.parametrize("which", ["all-linear", "default", "names"])
@pytest.mark.parametrize(
    ("name", "classify"), CASES, ids=[n + ("-classifier" if c else "") for n, c in CASES]
)
def test_targets_are_those_peft_chooses(
    name: str, classify: bool, which: str, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    wanted: Any = {"all-linear": "all-linear", "default": None, "names": names_of(name)}[which]
    keys = keys_of(models(name), data, tmp_path, classify, lora_target_modules=wanted)
    kind = hf.AutoModelForSequenceClassification if classify else hf.AutoModelForCausalLM
    plain = kind.from_pretrained(models(name))
    task = "SEQ_CLS" if classify else "CAUSAL_LM"
    whole: tuple[str, ...] = ()
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if which == "default" and plain.config.model_type not in known:
        with pytest.raises(fedlora.InputError, match="lora_target_modules: PEFT has no default"):
            assemble(fedlora.Config(**keys))
        with pytest.raises(ValueError, match="target_modules"):
            adapted_by_peft(plain, wanted, task, whole)
        return
    targets = assemble(fedlora.Config(**keys)).base.targets
    if which == "default" and name in MIXTURES:  # of which PEFT 0.21 loses its own default
        wanted = list(known[name])
    whole = targets.modules_to_save
    theirs = adapted_by_peft(plain, wanted, task, whole)
    if name in MIXTURES:  # PEFT reaches routers and fused experts too, as parameters of modules
        theirs = {n for n in theirs if ".mlp." not in n}
    assert set(targets.shapes) == theirs
    heads = ("score", "classifier", "pre_classifier", "lm_head", "embed_out", "head")
    assert not [n for n in targets.shapes if n.split(".")[0] in heads]


def test_a_trained_pooler_gets_an_adapter_and_a_new_one_is_trained_whole(
    models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Published BERTs have a pooler; PEFT adapts it, as any linear layer."""
    path = save_model(tmp_path / "bert", ENCODERS["bert"](), hf.BertModel)
    targets = assemble(fedlora.Config(**keys_of(path, data, tmp_path, True))).base.targets
    assert "bert.pooler.dense" in targets.shapes
    assert targets.modules_to_save == ("classifier",)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(path)
    assert set(targets.shapes) == adapted_by_peft(plain, "all-linear", "SEQ_CLS", [])
    bare = assemble(fedlora.Config(**keys_of(models("bert"), data, tmp_path, True))).base.targets
    assert "bert.pooler.dense" not in bare.shapes
    assert set(bare.modules_to_save) == {"bert.pooler.dense", "classifier"}


# --- mixtures of experts ---


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
    dense = train_federation(keys_of(models("llama"), data, tmp_path / "dense", False))
    assert not [w for w in dense.warnings if "expert" in w]


@pytest.mark.parametrize("wanted", ["gate_up_proj", "down_proj", "experts.gate_up_proj"])
@pytest.mark.parametrize("name", MIXTURES)
def test_expert_weights_are_refused_as_targets(
    name: str, wanted: str, models: Callable[[str], Path]
) -> None:
    for asked in ([wanted], ["q_proj", wanted], wanted):
        with pytest.raises(
            fedlora.InputError, match=rf"lora_target_modules: .*'{wanted}'.*experts"
        ) as found:
            load_base(str(models(name)), target_modules=asked)
        assert "fused into one tensor" in str(found.value)
        assert "q_proj" in str(found.value)


def test_the_name_of_an_expert_weight_may_be_a_linear_layer_elsewhere(
    models: Callable[[str], Path],
) -> None:
    targets = load_base(str(models("phi3")), target_modules=["gate_up_proj"]).targets
    assert list(targets.shapes) == [f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1)]


# --- models that cannot do what is asked ---


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


# --- target modules of single clients ---


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


class Rounds:
    """A federation driven round by round, of which everything sent is kept."""

    def __init__(self, session: Session) -> None:
        self.session, self.agreement = session, session.federation.agreement
        self.server = Server(session.federation, starting_state(session), Mean())
        clients = dict(enumerate(session.data.clients))
        self.worker = Worker(session.base, clients, session.config, self.agreement)

    def next(self) -> tuple[ServerState, dict[int, Any], dict[int, ClientUpdate]]:
        """One round: the state before it, the clients' starts, their updates."""
        before, starts, updates = self.server.state, {}, {}
        for client, sent in self.server.plan().items():
            starts[client] = client_start(sent, self.agreement)
            updates[client] = self.worker.handle(sent)
            assert self.server.accept(updates[client]) == ""
        self.record = self.server.commit()
        return before, starts, updates


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_model_that_client_trains_has_adapters_in_its_own_modules_alone(
    method: str, tiny_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    keys = one_client_differs(tiny_llama, site_files, tmp_path / "out", method, (4, 4, 4, 4))
    seen: list[set[str]] = []

    def looking(model: Any, dataset: Any, budget: Any) -> dict[str, Any]:
        if budget.client == 1:
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            seen.append({n.partition(".clients.")[0].rpartition(".")[2] for n in trained})
        return train(model, dataset, budget)

    result = fedlora.run(fedlora.Config(**keys), train_function=looking)
    assert seen == [{"q_proj"}] * 3
    shapes = load_base(str(tiny_llama), target_modules="all-linear").targets.shapes
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
