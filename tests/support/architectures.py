"""Makes a tiny model of every architecture, trains it, and loads what was saved by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import fedlora
from fedlora.client.worker import Worker
from fedlora.engines.local import run_session
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import client_start
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.server import Server
from fedlora.methods.values import ServerState
from fedlora.model.base import BaseModel
from fedlora.runs.session import Session, assemble, starting_state
from support.models import SMALL, TOKENS, save_tokenizer
from support.rows import rows, write_jsonl

COMMON: dict[str, Any] = {**SMALL, **TOKENS}


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
    base: BaseModel
    state: ServerState
    warnings: tuple[str, ...]

    def ours(self) -> BaseModel:
        """The run's base, and the global model loaded into it."""
        layers = [self.state.base_delta, self.state.adapter]
        self.base.load(layers, full_params=self.state.dense)
        return self.base


def train_federation(keys: dict[str, Any]) -> Trained:
    """A whole run, as `fedlora.run` makes it; its base is kept."""
    config, states, warnings = fedlora.Config(**keys), list[ServerState](), list[str]()

    def report(event: Any) -> None:
        if event["event"] == "warning":
            warnings.append(event["message"])

    session = assemble(config)
    result = run_session(session, callbacks=[lambda r: states.append(r.state)], report=report)
    model = Path(keys["model_name_or_path"])
    return Trained(model, config, result, session.base, states[-1], tuple(warnings))


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


CASES = [(name, False) for name in DECODERS] + [(name, True) for name in CLASSIFIERS]


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
