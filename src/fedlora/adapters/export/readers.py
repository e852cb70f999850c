"""Knows what each program that reads LoRA adapters accepts, and refuses what it would misread.

- vLLM scales once by `lora_alpha / r`, compares `r` with `--max-lora-rank` (one of nine values),
  refuses `modules_to_save` and reads no patterns: one rank of the nine, `r = lora_alpha`.
- llama.cpp's converter keeps one alpha, which the loader divides by each tensor's own rank; it
  stops at a tensor that is no factor, and transposes the factors of GPT-2's Conv1D layers as if
  they were weights. Ollama takes what it makes: one rank, factors alone, no Conv1D.
- MLX has one rank and one scale for all layers, and passes silently over names it does not know:
  one rank, and only names that MLX's models have.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.adapters.saved_adapter import SavedAdapter

PEFT, VLLM, LLAMA_CPP, OLLAMA, MLX = "peft", "vllm", "llama.cpp", "ollama", "mlx"
READERS = (PEFT, VLLM, LLAMA_CPP, OLLAMA, MLX)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` can be."""
MERGE = "--format merged gives a whole model, which it reads"
"""The way round what a reader of adapters refuses."""
_MLX_NAMES = ("model.layers.", "model.embed_tokens", "lm_head")
"""How the modules of MLX's models begin where they are named as in transformers."""


def rank_for(reader: str, rank: int) -> int:
    """The rank to write: for vLLM the next one it can be started with, else the same.

    Raises:
        InputError: it is more than vLLM serves.
    """
    if reader != VLLM:
        return rank
    legal = next((r for r in VLLM_RANKS if r >= rank), None)
    if legal is None:
        raise InputError(
            f"--for vllm: the update has rank {rank}, and vLLM serves {VLLM_RANKS[-1]} at most: "
            f"give --rank {VLLM_RANKS[-1]} (the table without --format says what it loses); or "
            f"{MERGE}"
        )
    return legal


@dataclass(frozen=True)
class Base:
    """What readers need to know of the base.

    Args:
        name: as `from_pretrained` takes it.
        tied: its output layer is its embedding.
        conv1d: its layers hold transposed weights (GPT-2's Conv1D).
    """

    name: str
    tied: bool = False
    conv1d: bool = False


def check_reader(reader: str, adapter: SavedAdapter, base: Base) -> list[str]:
    """Refuse an adapter that the reader would refuse or misread.

    Returns:
        What the user should know.

    Raises:
        InputError: why, and the way round it.
    """
    if reader == PEFT:
        return []
    if why := why_no_adapter(reader, adapter, base):
        raise InputError(f"--for {reader}: {why}. {MERGE}")
    if reader == MLX:
        _check_mlx_names(adapter)
    if reader == VLLM and (adapter.embeddings or _has_output_layer(adapter)):
        return [
            "the adapter changes embeddings or the output layer, which only some of vLLM's models "
            "and versions apply; see that its log names no ignored module"
        ]
    return []


def why_no_adapter(reader: str, adapter: SavedAdapter, base: Base) -> str:
    """Why a reader other than PEFT would refuse or misread the adapter; empty: it would not."""
    if adapter.dense:
        some = ", ".join(sorted({name.rpartition(".")[0] for name in adapter.dense})[:3])
        why = {
            VLLM: "vLLM loads no adapter with modules trained whole (modules_to_save)",
            MLX: "an MLX adapter holds factors alone",
        }.get(reader, "llama.cpp's converter stops at a tensor that is no factor")
        return f"{some}: trained whole; {why}"
    if adapter.base:
        return (
            f"the adapter carries weights of its base ({', '.join(adapter.base)}), which would be "
            "ignored"
        )
    if base.conv1d:
        why = {
            VLLM: "vLLM applies no adapters to such models",
            MLX: "MLX names such models' modules differently, and would pass the adapter over",
        }.get(reader, "llama.cpp's converter transposes their factors as if they were weights")
        return f"the base has Conv1D layers (GPT-2): {why}"
    if reader not in (LLAMA_CPP, OLLAMA) or not base.tied:
        return ""
    if _has_output_layer(adapter):
        return (
            "the adapter changes lm_head, which is the embedding too in this base (tied weights), "
            "so llama.cpp has no such tensor"
        )
    if adapter.embeddings:
        return (
            "the adapter changes the embedding, which is the output layer too in this base (tied "
            "weights), and llama.cpp would change both"
        )
    return ""


def _has_output_layer(adapter: SavedAdapter) -> bool:
    return any(name.rpartition(".")[2] == "lm_head" for name in adapter.deltas)


def _check_mlx_names(adapter: SavedAdapter) -> None:
    unknown = [name for name in adapter.deltas if not name.startswith(_MLX_NAMES)]
    if unknown:
        raise InputError(
            f"--for mlx: {unknown[0]}: MLX's models begin their modules' names with "
            f"{', '.join(_MLX_NAMES)}; another name would be passed over without a word. {MERGE}"
        )


def modelfile(merged: bool) -> str:
    """Ollama's Modelfile, with paths beside it; what to type first stands in its comments."""
    if merged:
        return (
            "# llama.cpp's convert_hf_to_gguf.py makes model.gguf of this directory.\n"
            "FROM ./model.gguf\n"
        )
    return (
        "# llama.cpp's convert_hf_to_gguf.py makes base.gguf of the base model, and\n"
        "# convert_lora_to_gguf.py makes adapter.gguf of this directory. Ollama's own copy of the\n"
        "# same base, as `FROM llama3.2`, can stand in the place of base.gguf.\n"
        "FROM ./base.gguf\n"
        "ADAPTER ./adapter.gguf\n"
    )


def gguf_modelfile(merged: bool) -> str:
    """Ollama's Modelfile of a GGUF export, with paths beside it."""
    if merged:
        return "FROM ./model.gguf\n"
    return (
        "# base.gguf is the base model; Ollama's own copy of it, as `FROM llama3.2`, can stand in\n"
        "# its place.\n"
        "FROM ./base.gguf\n"
        "ADAPTER ./adapter.gguf\n"
    )


def gguf_commands(reader: str, where: Path, base: Base, files: Collection[str]) -> list[str]:
    """What to type to use a GGUF export.

    Args:
        reader: llama.cpp or ollama.
        where: the directory written.
        base: the base model.
        files: names of the files written.
    """
    place, model, name = (shlex.quote(str(x)) for x in (where, base.name, where.name))
    if reader == OLLAMA:
        return [f"ollama create {name} -f {place}/Modelfile"]
    commands = []
    if "model.gguf" in files:
        commands.append(f"llama-cli -m {place}/model.gguf")
    if "adapter.gguf" in files:
        commands += [
            f"python convert_hf_to_gguf.py {model} --outfile base.gguf",
            f"llama-cli -m base.gguf --lora {place}/adapter.gguf",
        ]
    return commands


def next_commands(
    reader: str, where: Path, base: Base, rank: int | None, classifies: bool = False
) -> list[str]:
    """What to type to use the export.

    Args:
        reader: which program.
        where: the directory written.
        base: the base model.
        rank: of the adapter; None: a merged model.
        classifies: it guesses labels.
    """
    place, model, name = (shlex.quote(str(x)) for x in (where, base.name, where.name))
    if rank is None:
        return _merged_commands(reader, place, name, classifies)
    if reader == VLLM:
        return [
            f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"
        ]
    if reader == MLX:
        return [f"mlx_lm.generate --model {model} --adapter-path {place} --prompt 'Hello'"]
    to_gguf = [
        f"python convert_hf_to_gguf.py {model} --outfile {place}/base.gguf",
        f"python convert_lora_to_gguf.py {place} --base {model} --outfile {place}/adapter.gguf",
    ]
    if reader == LLAMA_CPP:
        return [*to_gguf, f"llama-cli -m {place}/base.gguf --lora {place}/adapter.gguf"]
    if reader == OLLAMA:
        return [*to_gguf, f"ollama create {name} -f {place}/Modelfile"]
    return []


def _merged_commands(reader: str, place: str, name: str, classifies: bool) -> list[str]:
    """What to type to use a merged model."""
    if reader == VLLM:
        return [f"vllm serve {place}" + (" --runner pooling" if classifies else "")]
    if reader == MLX:
        return [f"mlx_lm.generate --model {place} --prompt 'Hello'"]
    to_gguf = f"python convert_hf_to_gguf.py {place} --outfile {place}/model.gguf"
    if reader == LLAMA_CPP:
        return [to_gguf, f"llama-cli -m {place}/model.gguf"]
    if reader == OLLAMA:
        return [to_gguf, f"ollama create {name} -f {place}/Modelfile"]
    return []


def wants_one_rank(reader: str) -> bool:
    """Whether every module has to have the same rank: PEFT alone reads patterns of ranks."""
    return reader != PEFT


def base_facts(name: str, skeleton: Any, fan_in_fan_out: bool) -> Base:
    """What readers need to know of a base.

    Args:
        name: as `from_pretrained` takes it.
        skeleton: the model of transformers, with or without weights; None: it is not here.
        fan_in_fan_out: the adapter's configuration says that layers are Conv1D.
    """
    own = getattr(skeleton, "config", None)
    text = own.get_text_config() if own is not None else None
    return Base(name, bool(getattr(text, "tie_word_embeddings", False)), fan_in_fan_out)
