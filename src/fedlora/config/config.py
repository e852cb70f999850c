"""Declares every configuration key with its type, default and limits.

Names are those of transformers, PEFT and TRL where they have one. An aggregation rule's own options
(`start_fraction`, `max_rank` ...) are written as flat keys too; the rule defines them.

What else holds of a key (that it is a path, a client's own, settled by the run ...) stands at its
field as a `Mark`; what holds between keys is in `checks`.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedlora.config.as_meant import as_meant
from fedlora.config.checks import CHECKS
from fedlora.config.commented_yaml import commented_yaml
from fedlora.config.errors_in_words import readable
from fedlora.config.flower_partitioners import FLOWER_PARTITIONERS as PARTITIONERS
from fedlora.config.keys import (
    ADDRESSES,
    ALPHA,
    LIST_OF_RANKS,
    LIST_OF_SHARES,
    MEMORY_OR_MEMORIES,
    NUMBER_OF_STEPS,
    NUMBER_OR_SHARE,
    RANK_OR_RANKS,
    TRACKERS,
    TRAIN_FUNCTION,
    JsonSchema,
    Mark,
    Schedule,
    SizeOfMachine,
    Words,
    alpha_of,
    keys_marked,
    names_among,
)
from fedlora.config.overrides import with_overrides_of
from fedlora.config.rule_options import read_options, split_options, type_of
from fedlora.errors import InputError
from fedlora.methods import METHODS


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
    model_name_or_path: Annotated[
        str | None, Mark.DIRECTORY, Mark.ABSOLUTE, Words(("embedded",)), Mark.OF_SITES
    ] = Field(
        None, description="hub name or directory of the base model; 'embedded': the package's"
    )
    model_revision: Annotated[str | None, Mark.OF_SITES] = Field(
        None, description="branch, tag or commit on the hub"
    )
    tokenizer_name: Annotated[str | None, Mark.DIRECTORY, Mark.ABSOLUTE] = Field(
        None, description="another tokenizer than the model's own"
    )
    chat_template_path: Annotated[str | None, Mark.FILE, Mark.ABSOLUTE, Words(("vicuna",))] = Field(
        None, description="Jinja file or tokenizer with another chat template; vicuna: built in"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Mark.AUTOMATIC, Mark.OF_SITES
    ] = Field(
        "auto",
        description="of the frozen base; auto: bfloat16 where that is measured to be faster, else "
        "float32. Adapters are float32",
    )
    load_in_8bit: Annotated[bool, Mark.OF_CLIENT] = Field(
        False, description="hold the base's linear layers in int8 (needs fedlora[quantized])"
    )
    load_in_4bit: Annotated[bool, Mark.OF_CLIENT] = Field(
        False, description="hold the base's linear layers in NF4 (needs fedlora[quantized])"
    )
    # --- LoRA ---
    lora_task_type: Annotated[
        Literal["auto", "CAUSAL_LM", "SEQ_CLS"], Mark.AUTOMATIC, Mark.OF_SITES
    ] = Field(
        "auto", description="auto: SEQ_CLS (classifier) with label_column_name, or if the model is"
    )
    lora_r: Annotated[int, Mark.OF_CLIENT] = Field(
        16, ge=1, description="rank of every client without one of its own"
    )
    lora_alpha: Annotated[float | str, Mark.OF_CLIENT, JsonSchema(ALPHA)] = Field(
        "2r",
        union_mode="left_to_right",
        description="a number, or a multiple of each client's rank such as 2r",
    )
    use_rslora: Annotated[bool, Mark.OF_CLIENT] = Field(
        False, description="scale by alpha/sqrt(r) instead of alpha/r"
    )
    lora_dropout: Annotated[float, Mark.OF_CLIENT] = Field(
        0.0, ge=0, lt=1, description="dropout before A while training"
    )
    lora_target_modules: Annotated[
        list[str] | str | None, Mark.OF_CLIENT, Words(("all-linear",))
    ] = Field(
        "all-linear", description="module names, all-linear, or none: PEFT's for the architecture"
    )
    lora_modules_to_save: Annotated[list[str] | None, Mark.OF_SITES] = Field(
        None, description="modules trained whole and averaged; a classifier's head always is"
    )
    init_adapter: Annotated[str | None, Mark.DIRECTORY, Mark.ABSOLUTE] = Field(
        None, description="PEFT adapter directory to go on from"
    )
    # --- data ---
    dataset_name: Annotated[str | None, Mark.DIRECTORY, Mark.ABSOLUTE, Words(("embedded",))] = (
        Field(None, description="hub name or directory of a data set; 'embedded': the package's")
    )
    dataset_config: str | None = Field(None, description="its configuration")
    dataset_train_split: str = Field("train", description="its split to train on")
    dataset_test_split: str | None = Field(None, description="its split to evaluate on")
    train_file: Annotated[str | None, Mark.FILE, Mark.ABSOLUTE] = Field(
        None,
        description="JSON, JSONL, CSV or Parquet; a pattern (part_*.json) is one file per client",
    )
    eval_file: Annotated[str | None, Mark.FILE, Mark.ABSOLUTE] = Field(
        None, description="held-out rows of the global evaluation"
    )
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the data set held out for the global evaluation"
    )
    max_train_samples: Annotated[int | None, Mark.OF_CLIENT] = Field(
        None, ge=1, description="rows drawn of each client's"
    )
    max_eval_samples: Annotated[int | None, Mark.OF_SITES] = Field(
        None, ge=1, description="rows drawn of the evaluation's"
    )
    strict_clients: bool = Field(False, description="refuse clients without a usable row")
    template: Annotated[
        Literal[
            "auto",
            "alpaca",
            "preference",
            "chat",
            "prompt_completion",
            "text",
            "classification",
            "custom",
        ],
        Mark.AUTOMATIC,
    ] = Field("auto", description="how a row becomes text; auto: by its columns")
    prompt_template: str | None = Field(
        None, description="prompt of the template custom, with {column} in braces"
    )
    completion_template: str | None = Field(
        None, description="its completion, such as '{answer}'; a template custom needs it"
    )
    completion_only_loss: Annotated[bool, Mark.OF_SITES] = Field(
        True, description="loss on the completion (in a chat: all assistant turns) alone"
    )
    text_column_names: list[str] | None = Field(
        None, description="a classifier's text, one column or a pair; none: by their names"
    )
    label_column_name: str | None = Field(
        None, description="a classifier's labels, text or whole numbers"
    )
    label_names: Annotated[list[str] | None, Mark.AUTOMATIC, Mark.OF_SITES] = Field(
        None, description="a classifier's labels in order; none: the model's, or those in the data"
    )
    max_length: Annotated[int, Mark.OF_SITES] = Field(
        1024, ge=2, description="tokens a sample is cut to"
    )
    # --- federation ---
    method: Annotated[str, Mark.ALONE, JsonSchema({"enum": list(METHODS)})] = Field(
        "exact", description="aggregation rule: " + ", ".join(METHODS)
    )
    num_rounds: Annotated[int, Mark.OF_SITES] = Field(
        10, ge=1, description="rounds of the federation"
    )
    num_clients: Annotated[int | None, Mark.AUTOMATIC, Mark.ALONE] = Field(
        None, ge=1, description="clients; none: one per file, per client_ranks, or 10"
    )
    clients_per_round: Annotated[int | float | None, JsonSchema(NUMBER_OR_SHARE)] = Field(
        None, gt=0, description="a number, a share (0.3), or none: all"
    )
    min_clients_per_round: Annotated[int | None, Mark.ALONE] = Field(
        None,
        ge=1,
        description="fewer updates commit no round; none: with none the model stays as it is",
    )
    clients_needed_per_round: Annotated[int | None, Mark.ALONE] = Field(
        None,
        ge=1,
        description="updates after which a round closes (over-selection); none: all it asks for",
    )
    round_attempts: int = Field(
        3, ge=1, description="of a round below min_clients_per_round, before the run stops"
    )
    round_timeout: float | None = Field(
        None, gt=0, description="seconds after which nobody is waited for; not with engine: local"
    )
    client_ranks: Annotated[
        int | list[int] | Literal["auto"] | None,
        Mark.AUTOMATIC,
        Mark.ALONE,
        JsonSchema(RANK_OR_RANKS),
    ] = Field(
        None,
        description="a rank per client, or one for all; none: lora_r; auto: up to lora_r, with a "
        "micro-batch, as client_memory holds",
    )
    client_memory: Annotated[list[str] | str | None, Mark.ALONE, JsonSchema(MEMORY_OR_MEMORIES)] = (
        Field(
            None,
            description="memory of each client's machine or GPU, [6GB, 12GB], or one for all; "
            "client_ranks: auto fits it",
        )
    )
    rank_choices: Annotated[list[int] | None, Mark.REWRITTEN, JsonSchema(LIST_OF_RANKS)] = Field(
        None, description="draw each client's rank from these (instead of client_ranks)"
    )
    rank_shares: Annotated[list[float] | None, Mark.REWRITTEN, JsonSchema(LIST_OF_SHARES)] = Field(
        None, description="with which shares; none: equal shares"
    )
    client_weights: Literal["examples", "uniform"] = Field(
        "examples", description="weights by number of examples, or all alike"
    )
    client_overrides: Annotated[
        dict[int, dict[str, Any]] | str | None, Mark.FILE, Mark.REWRITTEN, Mark.ALONE
    ] = Field(
        None, description="settings of single clients, {0: {lora_r: 4}}; or a pattern of files"
    )
    partition: Annotated[
        Literal["iid", "dirichlet", "column", "labels", "quantity"],
        JsonSchema({"enum": ["iid", "dirichlet", "column", "labels", "quantity", *PARTITIONERS]}),
    ] = Field("iid", description="how one data set is divided among clients")
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
    compression: Annotated[Literal["none", "bf16", "int8"], Mark.OF_SITES, Mark.ALONE] = Field(
        "none", description="what adapters are rounded to on their way, up and down"
    )
    compression_feedback: Annotated[bool, Mark.OF_SITES] = Field(
        True, description="what rounding loses in one round is added to what is sent later"
    )
    # --- local training ---
    per_device_train_batch_size: Annotated[int, Mark.OF_CLIENT] = Field(
        8, ge=1, description="samples of a micro-batch"
    )
    gradient_accumulation_steps: Annotated[int, Mark.OF_CLIENT] = Field(
        1, ge=1, description="micro-batches of a step"
    )
    learning_rate: Annotated[float, Mark.OF_CLIENT] = Field(
        2e-4, gt=0, description="AdamW's peak learning rate"
    )
    lr_scheduler_type: Annotated[Schedule, Mark.OF_CLIENT] = Field(
        "linear", description="schedule of transformers"
    )
    lr_scheduler_scope: Annotated[Literal["round", "federation"], Mark.OF_SITES] = Field(
        "round", description="it restarts each round, or spans all rounds"
    )
    warmup_steps: Annotated[float, Mark.OF_CLIENT] = Field(
        0, ge=0, description="steps, or a share below 1, of warm-up"
    )
    weight_decay: Annotated[float, Mark.OF_CLIENT] = Field(
        0.0, ge=0, description="AdamW's decoupled weight decay"
    )
    adam_beta1: Annotated[float, Mark.OF_CLIENT] = Field(0.9, ge=0, lt=1, description="AdamW")
    adam_beta2: Annotated[float, Mark.OF_CLIENT] = Field(0.999, ge=0, lt=1, description="AdamW")
    adam_epsilon: Annotated[float, Mark.OF_CLIENT] = Field(1e-8, gt=0, description="AdamW")
    max_grad_norm: Annotated[float, Mark.OF_CLIENT] = Field(
        1.0, ge=0, description="gradient clipping; 0: none"
    )
    num_train_epochs: Annotated[float, Mark.OF_CLIENT] = Field(
        1.0, gt=0, description="passes over the data in each round"
    )
    max_steps: Annotated[int, Mark.OF_CLIENT, JsonSchema(NUMBER_OF_STEPS)] = Field(
        -1, ge=-1, description="steps in each round instead of epochs; -1: off"
    )
    proximal_mu: Annotated[float, Mark.OF_CLIENT] = Field(
        0.0, ge=0, description="FedProx: mu/2 ||w - w_start||^2 is added"
    )
    cohort_size: SizeOfMachine = Field(
        "auto", description="clients trained in one pass; auto: as many as pay and fit in memory"
    )
    cohort_memory: Annotated[float | None, Mark.MACHINE] = Field(
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
    train_function: Annotated[str | None, JsonSchema(TRAIN_FUNCTION)] = Field(
        None,
        description="local training of your own, module:function or FILE.py:function; none: "
        "fedlora's (sites name theirs in their own files)",
    )
    # --- evaluation ---
    eval_rounds: int = Field(1, ge=0, description="evaluate every so many rounds; 0: at the ends")
    server_evaluation: Annotated[bool, Mark.MACHINE, Mark.CARRIER] = Field(
        True,
        description="with sites: evaluate at the server too, where it has rows (eval_file); "
        "false: it needs no weights of the base",
    )
    per_device_eval_batch_size: Annotated[int, Mark.OF_SITES] = Field(
        8, ge=1, description="samples of an evaluation batch"
    )
    client_eval_fraction: Annotated[float, Mark.OF_SITES] = Field(
        0.0, ge=0, lt=1, description="share of each client's rows held out to evaluate on"
    )
    eval_exact_match: Annotated[Literal["auto"] | bool, Mark.AUTOMATIC, Mark.OF_SITES] = Field(
        "auto", description="greedy answers against every learnt turn; auto: if references fit"
    )
    generation_max_new_tokens: Annotated[int, Mark.OF_SITES] = Field(
        24, ge=1, description="longest generated answer"
    )
    eval_personal: bool = Field(
        False, description="also evaluate each client's own model as its round ends"
    )
    general_file: Annotated[str | None, Mark.FILE, Mark.ABSOLUTE] = Field(
        None, description="general text (.txt, or text in JSONL): its loss shows what is forgotten"
    )
    metric_for_best_model: str = Field("eval_loss", description="decides which round is best")
    greater_is_better: Annotated[bool | None, Mark.AUTOMATIC] = Field(
        None, description="none: false for losses"
    )
    load_best_model_at_end: bool = Field(False, description="final/ holds the best round")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one"
    )
    # --- run ---
    output_dir: Annotated[str, Mark.DIRECTORY, Mark.OUTPUT] = Field(
        "fedlora-output", description="where everything is written"
    )
    save_total_limit: Annotated[int | None, Mark.ALONE] = Field(
        3, ge=1, description="rounds kept on disk, never fewer than two; none: all"
    )
    save_adapter_rounds: int = Field(
        1, ge=1, description="round-N/ holds a PEFT adapter every so many rounds; its state in all"
    )
    save_client_models: bool = Field(
        False, description="final/client-K: the models the clients of the last round ended with"
    )
    report_to: Annotated[
        list[str] | str | None, Mark.OUTPUT, JsonSchema(names_among(*TRACKERS, "all"))
    ] = Field(None, description="tensorboard, wandb, trackio; all: those installed; or none")
    run_name: Annotated[str | None, Mark.OUTPUT] = Field(
        None, description="of the run in these; none: output_dir"
    )
    project: Annotated[str, Mark.OUTPUT] = Field(
        "fedlora", description="project of wandb and trackio"
    )
    logging_dir: Annotated[str | None, Mark.DIRECTORY, Mark.ABSOLUTE, Mark.OUTPUT] = Field(
        None, description="of tensorboard's files; none: runs/ in output_dir"
    )
    seed: Annotated[int, Mark.REPETITION, Mark.OF_SITES] = Field(
        42, ge=0, description="of every random draw"
    )
    engine: Annotated[
        Literal["local", "workers", "sites", "nvflare", "flower"],
        Mark.MACHINE,
        Mark.CARRIER,
        Mark.REWRITTEN,
    ] = Field(
        "local",
        description="local: clients train in this process; workers: in processes of this machine "
        "(where no engine is named, a long run takes them if they are measured to be no slower); "
        "sites: where their rows are, see sites; nvflare, flower: there too, over NVIDIA FLARE "
        "(see kit) or Flower",
    )
    sites: Annotated[dict[str, str] | None, Mark.MACHINE, Mark.CARRIER, JsonSchema(ADDRESSES)] = (
        Field(None, description="name: address of every site, the path of its worker's socket")
    )
    kit: Annotated[str | None, Mark.DIRECTORY, Mark.ABSOLUTE, Mark.MACHINE, Mark.CARRIER] = Field(
        None, description="engine: nvflare: directory of the kit of the admin who submits"
    )
    flower_superlink: Annotated[str | None, Mark.MACHINE, Mark.CARRIER] = Field(
        None, description="name of the connection in Flower's config.toml; none: Flower's default"
    )
    node_timeout: Annotated[float, Mark.MACHINE, Mark.CARRIER] = Field(
        600.0, gt=0, description="seconds in which the nodes have to connect (engine: flower)"
    )
    num_workers: Annotated[SizeOfMachine, Mark.CARRIER] = Field(
        "auto", description="worker processes; auto: one for each core of the CPU, or for each GPU"
    )
    num_threads: Annotated[int | None, Mark.AUTOMATIC, Mark.MACHINE] = Field(
        None, ge=1, description="of torch; none: as measured in a long run, or torch's own choice"
    )
    use_cpu: Annotated[bool | None, Mark.AUTOMATIC] = Field(
        None, description="stay on the CPU; none: a GPU if there is one"
    )
    method_options: Annotated[dict[str, Any], Mark.ALONE] = Field(
        default_factory=dict, description="the rule's own options; flat keys in a file"
    )

    def __init__(self, **values: Any) -> None:
        options = values.pop("method_options", None) or {}
        values, options = split_options(values, options, set(type(self).model_fields))
        try:
            super().__init__(**values, method_options=options)
        except ValidationError as error:
            raise InputError(
                readable(error, {**values, **options}, partial(type_of, type(self)))
            ) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        key = str(info.field_name)
        return as_meant(key, value, cls.model_fields[key].annotation)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for check in CHECKS:
            check(self)
        return self

    def rule_options(self) -> Any:
        """The rule's options as its own dataclass.

        Raises:
            ValueError: an unknown option (the message names the nearest) or an impossible value.
        """
        return read_options(self.method, self.method_options)

    def of_client(self, client: int) -> Config:
        """The configuration as this client trains by it: `client_overrides` over the others.

        Raises:
            InputError: a key that a client cannot have of its own, or an impossible value.
        """
        return with_overrides_of(self, client)

    def alpha(self, rank: int) -> float:
        """LoRA's alpha for a client of this rank."""
        return alpha_of(self.lora_alpha, rank)

    @property
    def trains_at_sites(self) -> bool:
        """Whether the rows of the clients lie elsewhere, at sites that train by themselves."""
        if self.engine == "flower":  # without rows of its own it is no simulation
            return not (self.train_file or self.dataset_name)
        return self.engine in ("sites", "nvflare")

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
        return commented_yaml(self) if comments else yaml.safe_dump(self.flat(), sort_keys=False)


CLIENT_KEYS = keys_marked(Config, Mark.OF_CLIENT)
"""What `client_overrides` may set for a client."""
