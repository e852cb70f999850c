"""Writes the model card: TRL's fields, and what the federation was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from fedlora import __version__
from fedlora.commands.eval.subject import notes_on_bits
from fedlora.commands.export.origin import Origin
from fedlora.commands.run_files import bytes_of
from fedlora.config.config import Config
from fedlora.embedded import EMBEDDED
from fedlora.runs.file_names import METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.text import human_bytes

MOST_ROUNDS = 12
"""Rounds that the table of evaluations shows; of more, some at even distances, and the last."""
_MEASURES = {
    "loss": ".4f",
    "perplexity": ".5g",
    "token_accuracy": ".1%",
    "exact_match": ".1%",
    "accuracy": ".1%",
    "macro_f1": ".1%",
}


@dataclass(frozen=True)
class Written:
    """What is said of the files themselves.

    Args:
        format: peft, mlx, merged or gguf.
        name: of the model: its repository, or its directory.
        facts: sentences on ranks, error, dtype and how it was compared.
    """

    format: str
    name: str
    facts: Sequence[str]


def model_card(origin: Origin, written: Written) -> str:
    """The text of `README.md`.

    Paths of this machine stay out of it: a base or data set that is a directory goes by its last
    name, without a link.
    """
    subject = origin.subject
    config = subject.config if subject is not None and subject.of_a_run else None
    base = origin.base_name
    on_hub = bool(base) and not Path(base).exists()
    dataset = _dataset(config)
    head = _front_matter(origin, written, base if on_hub else None, dataset)
    base_link = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`"
    on_data = (
        f" on the [{dataset}](https://huggingface.co/datasets/{dataset}) dataset" if dataset else ""
    )
    trained = notes_on_bits(config) if config is not None else []
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# Model Card for {written.name.rpartition('/')[2]}\n",
        f"This model is a fine-tuned version of {base_link}{on_data}.\n"
        + (
            f"It has been trained by federated learning, using fedlora {__version__}.\n"
            if config is not None
            else f"It was written by fedlora {__version__}.\n"
        ),
        "## Quick start\n",
        _quick_start(origin, written, base if on_hub else Path(base).name),
        "## What is in it\n",
        "".join(f"- {fact}\n" for fact in (*written.facts, *trained)),
    ]
    if config is not None and subject is not None and subject.run is not None:
        parts += _procedure(config, subject.run, subject.round)
    parts += ["### Framework versions\n", _versions()]
    return "\n".join(parts)


def _front_matter(
    origin: Origin, written: Written, base: str | None, dataset: str | None
) -> dict[str, Any]:
    """The fields that the hub reads, in the order of TRL's cards."""
    adapter = written.format != "merged"
    library = {"peft": "peft", "mlx": "mlx", "gguf": "gguf"}.get(written.format, "transformers")
    tags = ["generated_from_trainer", "fedlora", "federated-learning", "lora"]
    if adapter and base:
        tags.insert(0, f"base_model:adapter:{base}")
    head: dict[str, Any] = {
        "base_model": base,
        "datasets": dataset,
        "library_name": library,
        "licence": "license",
        "model_name": written.name.rpartition("/")[2],
        "pipeline_tag": "text-classification" if origin.classifies else "text-generation",
        "tags": tags,
    }
    return {key: value for key, value in head.items() if value is not None}


def _dataset(config: Config | None) -> str | None:
    """The hub's name of the data; files of this machine have none."""
    name = config.dataset_name if config is not None and not config.train_file else None
    return None if name in (None, EMBEDDED) or Path(str(name)).exists() else name


def _quick_start(origin: Origin, written: Written, base: str) -> str:
    """How the files are loaded."""
    kind = "SequenceClassification" if origin.classifies else "CausalLM"
    if written.format == "mlx":
        call = f"mlx_lm.generate --model {base} --adapter-path {written.name} --prompt 'Hello'"
        return f"```sh\n{call}\n```\n"
    if written.format == "gguf":
        return (
            "`model.gguf` is a whole model, `adapter.gguf` an adapter for the base in GGUF:\n\n"
            "```sh\nllama-cli -m model.gguf\n"
            "llama-cli -m base.gguf --lora adapter.gguf\n```\n"
        )
    if written.format == "merged":
        task = "text-classification" if origin.classifies else "text-generation"
        return (
            "```python\nfrom transformers import pipeline\n\n"
            f'model = pipeline("{task}", model="{written.name}")\nprint(model("Hello"))\n```\n'
        )
    labels = f", num_labels={len(origin.labels)}" if origin.classifies else ""
    return (
        "```python\nfrom peft import PeftModel\n"
        f"from transformers import AutoModelFor{kind}\n\n"
        f'base = AutoModelFor{kind}.from_pretrained("{base}"{labels})\n'
        f'model = PeftModel.from_pretrained(base, "{written.name}")\n```\n'
    )


def _procedure(config: Config, run: Path, last: int) -> list[str]:
    """Clients, ranks, rounds, method, bytes, and the evaluations, from the run's own log."""
    lines = read_metrics(run) if (run / METRICS).is_file() else []
    lines = [line for line in lines if line["round"] <= last]
    header = next((line for line in lines if line["event"] == "begin"), {})
    clients = header.get("clients") or []
    ranks = [client["rank"] for client in clients]
    sizes = [bytes_of(line) for line in lines if line["event"] in ("start", "round")]
    facts = [
        ("method", f"{config.method} (`fedlora`'s name of the aggregation rule)"),
        ("clients", str(len(clients)) if clients else "unknown"),
        ("ranks of the clients", _ranks(ranks)),
        (
            "rows of all clients",
            f"{sum(client['rows'] for client in clients):,}" if clients else "-",
        ),
        ("rounds", str(last)),
        ("bytes up, all rounds", human_bytes(sum(up for up, _ in sizes))),
        ("bytes down, all rounds", human_bytes(sum(down for _, down in sizes))),
        ("learning rate", f"{config.learning_rate:g}"),
        ("seed", str(config.seed)),
    ]
    table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in facts)
    parts = ["## Training procedure\n", table]
    if scores := _evaluations(lines):
        parts += ["### Evaluation\n", scores]
    return parts


def _ranks(ranks: Sequence[int]) -> str:
    """`16 x 2, 8 x 3`: each rank once, with how many clients have it."""
    counts = {rank: ranks.count(rank) for rank in sorted(set(ranks), reverse=True)}
    return ", ".join(f"{rank} x {count}" for rank, count in counts.items()) or "unknown"


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the run's evaluations on its held-out rows; empty where it has none."""
    scored = [
        (line["round"], line["evaluation"])
        for line in lines
        if line["event"] in ("start", "round") and line.get("evaluation")
    ]
    if not scored:
        return ""
    step = -(-len(scored) // MOST_ROUNDS)
    shown = scored[::step] + ([scored[-1]] if (len(scored) - 1) % step else [])
    names = [name for name in _MEASURES if isinstance(shown[-1][1].get(name), int | float)]
    rows = [["round", *(name.replace("_", " ") for name in names)], ["---:"] * (1 + len(names))]
    for number, scores in shown:
        cells = [
            format(x, _MEASURES[n]) if (x := scores.get(n)) is not None else "-" for n in names
        ]
        rows.append([str(number), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _versions() -> str:
    libraries = {"PEFT": "peft", "Transformers": "transformers", "Pytorch": "torch"}
    libraries |= {"Datasets": "datasets", "Tokenizers": "tokenizers"}
    own = [f"- fedlora: {__version__}\n"]
    return "".join([*own, *(f"- {name}: {version(x)}\n" for name, x in libraries.items())])
