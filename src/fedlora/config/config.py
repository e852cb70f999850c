"""Declares every configuration key with its type, default and limits.

Names are those of transformers, PEFT and TRL where they have one. An aggregation rule's own options
(`start_fraction`, `max_rank` ...) are written as flat keys too; the rule defines them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedlora.config.errors_in_words import members, readable, refuse_truth
from fedlora.errors import InputError
from fedlora.methods import METHODS, rule_keys
from fedlora.text import nearest

CLIENT_KEYS = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "lora_target_modules",
    "max_train_samples",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "proximal_mu",
)
"""What `client_overrides` may set for a client."""

EVALUATED = {
    "CAUSAL_LM": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "SEQ_CLS": ("loss", "accuracy", "macro_f1"),
}
"""What is measured, by task."""


class Config(BaseModel):
    """All that decides a run: flat keys, a rule's options among them.

    `Config(method="exact", start_fraction=0.5, num_rounds=3)`; `fedlora config` lists every key.

    Raises:
        InputError: one line per unknown key or impossible value, with what is expected.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    # --- model ---
    model_name_or_path: str | None = Field(
        None, description="hub name or directory of the base model; 'embedded': the package's"
    )
    model_revision: str | None = Field(None, description="branch, tag or commit on the hub")
    tokenizer_name: str | None = Field(None, description="another tokenizer than the model's own")
    chat_template_path: str | None = Field(
        None, description="Jinja file or tokenizer with another chat template; vicuna: built in"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the frozen base; auto: bfloat16 where that is measured to be faster, else "
        "float32. Adapters are float32",
    )
    # --- LoRA ---
    lora_task_type: Literal["auto", "CAUSAL_LM", "SEQ_CLS"] = Field(
        "auto", description="auto: SEQ_CLS (classifier) with label_column_name, or if the model is"
    )
    lora_r: int = Field(16, ge=1, description="rank of every client without one of its own")
    lora_alpha: float | str = Field(
        "2r",
        union_mode="left_to_right",
        description="a number, or a multiple of each client's rank such as 2r",
    )
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r) instead of alpha/r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A while training")
    lora_target_modules: list[str] | str | None = Field(
        "all-linear", description="module names, all-linear, or none: PEFT's for the architecture"
    )
    lora_modules_to_save: list[str] | None = Field(
        None, description="modules trained whole and averaged; a classifier's head always is"
    )
    init_adapter: str | None = Field(None, description="PEFT adapter directory to go on from")
    # --- data ---
    dataset_name: str | None = Field(
        None, description="hub name or directory of a data set; 'embedded': the package's"
    )
    dataset_config: str | None = Field(None, description="its configuration")
    dataset_train_split: str = Field("train", description="its split to train on")
    dataset_test_split: str | None = Field(None, description="its split to evaluate on")
    train_file: str | None = Field(
        None,
        description="JSON, JSONL, CSV or Parquet; a pattern (part_*.json) is one file per client",
    )
    eval_file: str | None = Field(None, description="held-out rows of the global evaluation")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the data set held out for the global evaluation"
    )
    max_train_samples: int | None = Field(None, ge=1, description="rows drawn of each client's")
    max_eval_samples: int | None = Field(None, ge=1, description="rows drawn of the evaluation's")
    strict_clients: bool = Field(False, description="refuse clients without a usable row")
    template: Literal[
        "auto", "alpaca", "chat", "prompt_completion", "text", "classification", "custom"
    ] = Field("auto", description="how a row becomes text; auto: by its columns")
    prompt_template: str | None = Field(
        None, description="prompt of the template custom, with {column} in braces"
    )
    completion_template: str | None = Field(
        None, description="its completion, such as '{answer}'; a template custom needs it"
    )
    completion_only_loss: bool = Field(
        True, description="loss on the completion (in a chat: all assistant turns) alone"
    )
    text_column_names: list[str] | None = Field(
        None, description="a classifier's text, one column or a pair; none: by their names"
    )
    label_column_name: str | None = Field(
        None, description="a classifier's labels, text or whole numbers"
    )
    label_names: list[str] | None = Field(
        None, description="a classifier's labels in order; none: the model's, or those in the data"
    )
    max_length: int = Field(1024, ge=2, description="tokens a sample is cut to")
    # --- federation ---
    method: str = Field("exact", description="aggregation rule: " + ", ".join(METHODS))
    num_rounds: int = Field(10, ge=1, description="rounds of the federation")
    num_clients: int | None = Field(
        None, ge=1, description="clients; none: one per file, per client_ranks, or 10"
    )
    clients_per_round: int | float | None = Field(
        None, gt=0, description="a number, a share (0.3), or none: all"
    )
    client_ranks: int | list[int] | None = Field(
        None, description="a rank per client, or one for all; none: lora_r"
    )
    rank_choices: list[int] | None = Field(
        None, description="draw each client's rank from these (instead of client_ranks)"
    )
    rank_shares: list[float] | None = Field(
        None, description="with which shares; none: equal shares"
    )
    client_weights: Literal["examples", "uniform"] = Field(
        "examples", description="weights by number of examples, or all alike"
    )
    client_overrides: dict[int, dict[str, Any]] | str | None = Field(
        None, description="settings of single clients, {0: {lora_r: 4}}; or a pattern of files"
    )
    partition: Literal["iid", "dirichlet", "column", "labels", "quantity"] = Field(
        "iid", description="how one data set is divided among clients"
    )
    partition_column: str | None = Field(
        None, description="what dirichlet, column and labels divide by; none: the label"
    )
    partition_alpha: float = Field(
        0.5, gt=0, description="concentration of dirichlet and quantity; near 0: uneven"
    )
    partition_labels_per_client: int = Field(
        2, ge=1, description="different values each client holds with labels"
    )
    partition_shares: list[float] | None = Field(
        None, description="the clients' shares with quantity; none: drawn from Dirichlet"
    )
    partition_min_size: int = Field(
        1, ge=1, description="fewest rows of a client; draws are repeated until all have them"
    )
    server_learning_rate: float = Field(1.0, gt=0, description="step on the global update")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the global update")
    # --- local training ---
    per_device_train_batch_size: int = Field(8, ge=1, description="samples of a micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of a step")
    learning_rate: float = Field(2e-4, gt=0, description="AdamW's peak learning rate")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = Field("linear", description="schedule of transformers")
    lr_scheduler_scope: Literal["round", "federation"] = Field(
        "round", description="it restarts each round, or spans all rounds"
    )
    warmup_steps: float = Field(0, ge=0, description="steps, or a share below 1, of warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data in each round")
    max_steps: int = Field(-1, ge=-1, description="steps in each round instead of epochs; -1: off")
    proximal_mu: float = Field(0.0, ge=0, description="FedProx: mu/2 ||w - w_start||^2 is added")
    cohort_size: int | Literal["auto"] = Field(
        "auto", description="clients trained in one pass; auto: as many as pay and fit in memory"
    )
    cohort_memory: float | None = Field(
        None, gt=0, description="GiB that one pass may take; none: half of what is free"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third slower"
    )
    torch_compile: bool = Field(
        False, description="compile the layers; worth it for long runs on a GPU (docs/performance)"
    )
    use_liger_kernel: bool = Field(
        False, description="fused kernels on CUDA, from the package liger-kernel"
    )
    # --- evaluation ---
    eval_rounds: int = Field(1, ge=0, description="evaluate every so many rounds; 0: at the ends")
    per_device_eval_batch_size: int = Field(8, ge=1, description="samples of an evaluation batch")
    client_eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of each client's rows held out to evaluate on"
    )
    eval_exact_match: Literal["auto"] | bool = Field(
        "auto", description="greedy answers against every learnt turn; auto: if references fit"
    )
    generation_max_new_tokens: int = Field(24, ge=1, description="longest generated answer")
    eval_personal: bool = Field(
        False, description="also evaluate each client's own model as its round ends"
    )
    general_file: str | None = Field(
        None, description="general text (.txt, or text in JSONL): its loss shows what is forgotten"
    )
    metric_for_best_model: str = Field("eval_loss", description="decides which round is best")
    greater_is_better: bool | None = Field(None, description="none: false for losses")
    load_best_model_at_end: bool = Field(False, description="final/ holds the best round")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one"
    )
    # --- run ---
    output_dir: str = Field("fedlora-output", description="where everything is written")
    save_total_limit: int | None = Field(
        3, ge=1, description="rounds kept on disk, never fewer than two; none: all"
    )
    save_client_models: bool = Field(
        False, description="final/client-K: the models the clients of the last round ended with"
    )
    report_to: list[str] | str | None = Field(
        None, description="tensorboard, wandb, trackio; all: those installed; or none"
    )
    run_name: str | None = Field(None, description="of the run in these; none: output_dir")
    project: str = Field("fedlora", description="project of wandb and trackio")
    logging_dir: str | None = Field(
        None, description="of tensorboard's files; none: runs/ in output_dir"
    )
    seed: int = Field(42, ge=0, description="of every random draw")
    num_threads: int | None = Field(None, ge=1, description="of torch; none: torch's own choice")
    use_cpu: bool | None = Field(None, description="stay on the CPU; none: a GPU if there is one")
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="the rule's own options; flat keys in a file"
    )

    def __init__(self, **values: Any) -> None:
        options = values.pop("method_options", None) or {}
        if not isinstance(options, Mapping):
            raise InputError(
                f"method_options: {options!r}: expected the rule's keys and values; they can be "
                "written as keys of their own"
            )
        options = dict(options)
        ours, theirs = set(type(self).model_fields), rule_keys()
        for key in [k for k in values if k not in ours]:
            if key not in theirs:
                raise InputError(
                    f"{key}: unknown configuration key" + nearest(key, sorted(ours | theirs))
                )
            options[key] = values.pop(key)
        try:
            super().__init__(**values, method_options=options)
        except ValidationError as error:
            raise InputError(readable(error, {**values, **options}, _annotation)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """The text none is none, one value where a list is wanted a list of one."""
        key = str(info.field_name)
        annotation = cls.model_fields[key].annotation
        refuse_truth(key, value, annotation)
        union = members(annotation)
        if type(None) in union and isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        lists = [member for member in union if get_origin(member) is list]
        if lists and value is not None and not isinstance(value, list) and len(union) == 2:
            return [value]
        if key == "client_overrides" and isinstance(value, Mapping):
            for client, own in value.items():
                if not re.fullmatch(r"\d+", str(client)):
                    raise ValueError(f"{key}: {client!r} is no client: expected a number from 0")
                if not isinstance(own, Mapping):
                    raise ValueError(
                        f"{key}: client {client}: {own!r}: expected its keys and values"
                    )
        if not lists and isinstance(value, list) and str in union:
            raise ValueError(
                f"{key}: {value!r}: expected one value; a file pattern has to be quoted"
            )
        return value

    @field_validator("clients_per_round", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> Any:
        """The text 1.0 is a share and 1 a number, as they are in YAML."""
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
            try:
                return float(value)
            except ValueError:
                return value
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.method not in METHODS:
            raise ValueError(
                f"method: {self.method!r} is none of {', '.join(METHODS)}"
                + nearest(self.method, METHODS, "")
            )
        if self.alpha(1) <= 0:
            raise ValueError(f"lora_alpha: {self.lora_alpha} must be greater than 0")
        if self.train_file and self.dataset_name:
            raise ValueError("train_file and dataset_name exclude each other; give one of them")
        for key in ("client_ranks", "rank_choices"):
            value = getattr(self, key)
            for rank in value if isinstance(value, list) else [value]:
                if rank is not None and rank < 1:
                    raise ValueError(f"{key}: {rank} must be at least 1")
            if value == []:
                raise ValueError(f"{key}: the list is empty")
        if self.rank_choices and self.client_ranks:
            raise ValueError("client_ranks and rank_choices exclude each other; give one of them")
        if self.rank_shares is not None:
            choices = self.rank_choices or []
            if not choices or len(self.rank_shares) != len(choices):
                raise ValueError(
                    f"rank_shares: {len(self.rank_shares)} shares for {len(choices)} rank_choices; "
                    "give one for each"
                )
            if min(self.rank_shares) < 0 or sum(self.rank_shares) <= 0:
                raise ValueError(f"rank_shares: {self.rank_shares} must be positive")
        if isinstance(self.clients_per_round, float) and self.clients_per_round > 1:
            raise ValueError(
                f"clients_per_round: {self.clients_per_round} is no share; give a whole number of "
                "clients, or a share of at most 1.0"
            )
        if self.cohort_size != "auto" and self.cohort_size < 1:
            raise ValueError(f"cohort_size: {self.cohort_size} must be at least 1")
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 trains nothing; give a number, or -1 to count epochs")
        by_value = ("dirichlet", "column", "labels")
        if self.partition in by_value and not (self.partition_column or self.label_column_name):
            raise ValueError(
                f"partition: {self.partition} needs partition_column, the column to divide by"
            )
        if self.partition_shares is not None:
            if self.partition != "quantity":
                raise ValueError("partition_shares belongs to partition: quantity")
            if not self.partition_shares or min(self.partition_shares) <= 0:
                raise ValueError(f"partition_shares: {self.partition_shares} must be positive")
        self._consistent_template()
        self.rule_options()
        return self

    def _consistent_template(self) -> None:
        if self.template == "custom" and not self.completion_template:
            raise ValueError("template: custom needs completion_template, such as '{answer}'")
        given = self.prompt_template or self.completion_template
        if given and self.template not in ("auto", "custom"):
            raise ValueError(
                "prompt_template and completion_template belong to template: custom, not "
                + self.template
            )
        if self.prompt_template and not self.completion_template:
            raise ValueError("prompt_template needs completion_template beside it")
        classifies = self.label_column_name is not None or self.template == "classification"
        if classifies and self.lora_task_type == "CAUSAL_LM":
            raise ValueError(
                "lora_task_type: CAUSAL_LM learns no labels; leave label_column_name and template: "
                "classification out, or use SEQ_CLS"
            )
        if self.lora_task_type == "SEQ_CLS" and self.template not in ("auto", "classification"):
            raise ValueError(f"template: {self.template} is no text to classify (SEQ_CLS)")
        if self.text_column_names is not None and len(self.text_column_names) not in (1, 2):
            raise ValueError("text_column_names: give one column, or two for pairs")
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise ValueError("label_names: a name is given twice")

    def rule_options(self) -> Any:
        """The rule's options as its own dataclass.

        Raises:
            ValueError: an unknown option (the message names the nearest) or an impossible value.
        """
        rule = METHODS[self.method]
        fields = {f.name: f for f in dataclasses.fields(rule.options)}
        for key in self.method_options:
            if key not in fields:
                raise ValueError(
                    f"{key}: method {self.method} has no such option; it has "
                    + (", ".join(fields) or "none")
                )
            refuse_truth(key, self.method_options[key], get_type_hints(rule.options)[key])
        return TypeAdapter(rule.options).validate_python(dict(self.method_options))

    def of_client(self, client: int) -> Config:
        """The configuration as this client trains by it: `client_overrides` over the others.

        Raises:
            InputError: a key that a client cannot have of its own, or an impossible value.
        """
        overrides = self.client_overrides
        assert not isinstance(overrides, str), (
            "a pattern of files is read by fedlora.config.clients"
        )
        own = (overrides or {}).get(client)
        if not own:
            return self
        for key in own:
            if key not in CLIENT_KEYS:
                raise InputError(
                    f"client_overrides: client {client}: {key} is not a client's own to set"
                    + nearest(key, CLIENT_KEYS, f"; it may set {', '.join(CLIENT_KEYS)}")
                )
        values = {**self.model_dump(), "client_overrides": None, **own}
        try:
            return type(self)(**values)
        except InputError as error:
            raise InputError(f"client_overrides: client {client}: {error}") from None

    def alpha(self, rank: int) -> float:
        """LoRA's alpha for a client of this rank."""
        if isinstance(self.lora_alpha, float):
            return self.lora_alpha
        found = re.fullmatch(r"(\d*\.?\d+)?\s*\*?\s*r", self.lora_alpha)
        if not found:
            raise ValueError(
                f"lora_alpha: {self.lora_alpha!r} is neither a number nor a multiple of r (as 2r)"
            )
        return float(found.group(1) or 1) * rank

    @property
    def metric_is_better_when_greater(self) -> bool:
        """`greater_is_better`, or what the metric's name says."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not re.search(r"loss|perplexity", self.metric_for_best_model)

    def flat(self) -> dict[str, Any]:
        """Every key and value, the rule's options among them with their defaults filled in."""
        out = self.model_dump()
        del out["method_options"]
        return {**out, **dataclasses.asdict(self.rule_options())}

    def to_yaml(self, comments: bool = False) -> str:
        """The configuration as YAML; with comments, one line on every key."""
        if not comments:
            return yaml.safe_dump(self.flat(), sort_keys=False)
        lines = []
        for key, field in type(self).model_fields.items():
            if key == "method_options":
                continue
            value = _scalar(getattr(self, key))
            lines.append(f"{key + ': ' + value:<46} # {field.description}")
        rule = METHODS[self.method]
        for f in dataclasses.fields(rule.options):
            value = _scalar(getattr(self.rule_options(), f.name))
            lines.append(f"{f.name + ': ' + value:<46} # {option_line(rule.options, f.name)}")
        return "\n".join(lines) + "\n"


def option_line(options: type[Any], key: str) -> str:
    """The description of an option, from the `Args:` of its dataclass's docstring."""
    found = re.search(rf"^\s*{key}: (.+?)(?=^\s*\w+: |\Z)", options.__doc__ or "", re.S | re.M)
    return " ".join(found.group(1).split()) if found else ""


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()


def _annotation(key: str) -> Any:
    if key in Config.model_fields:
        return Config.model_fields[key].annotation
    hints = (get_type_hints(rule.options) for rule in METHODS.values())
    return next(found[key] for found in hints if key in found)


TRACKERS = ("tensorboard", "wandb", "trackio")
