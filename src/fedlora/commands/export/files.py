"""Fills an export's directory in each format, and reads it back before it counts as done."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.export.checkpoint import open_checkpoint, read_size
from fedlora.adapters.export.merged import (
    DTYPES,
    MergePlan,
    largest_difference,
    plan_merge,
    write_merged,
)
from fedlora.adapters.export.mlx import read_mlx, write_mlx
from fedlora.adapters.export.ranks import Spectrum, pad, relative_distance
from fedlora.adapters.export.readers import MLX, OLLAMA, modelfile, wants_one_rank
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.eval.models import Models
from fedlora.commands.export.origin import Origin
from fedlora.commands.export.readback import (
    LOGITS,
    ROUNDING,
    WEIGHTS,
    Check,
    load_export,
    logit_distance,
    logits_of,
    peft_distance,
    token_rows,
)
from fedlora.commands.export.request import Request
from fedlora.errors import CheckpointError
from fedlora.lowrank import LowRank, total_norm


@dataclass(frozen=True)
class Job:
    """An export on its way.

    Args:
        origin: what is exported.
        request: what is asked for.
        spectrum: of the update.
        cut: the most directions of a module that are kept.
        rank: that the files say; more than `cut` where the reader knows certain ranks alone.
        skeleton: the model without weights; None: the base is not here.
        tokenizer: of the model; None: the base is not here.
        models: the base with the origin's adapter on it; None: weights alone are compared.
        logits: of the model that is exported, on `token_rows`.
        parts: of GGUF files, which are written: `adapter`, `merged` or both.
    """

    origin: Origin
    request: Request
    spectrum: Spectrum
    cut: int
    rank: int
    skeleton: Any = None
    tokenizer: Any = None
    models: Models | None = None
    logits: Tensor | None = None
    parts: tuple[str, ...] = ()

    @property
    def kept(self) -> dict[str, LowRank]:
        """The update as it is exported, one rank in all modules where the reader wants that."""
        cut = self.spectrum.cut(self.cut)
        if not wants_one_rank(self.request.reader):
            return cut
        return {name: pad(x, self.rank) for name, x in cut.items()}

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.cut >= self.spectrum.rank


def fill_adapter(job: Job, directory: Path) -> list[Check]:
    """Write the adapter, PEFT's files or MLX's, and read it back.

    Returns:
        The comparisons with what it came from.
    """
    kept = job.kept
    if job.request.reader == MLX:
        return _fill_mlx(job, kept, directory)
    save_adapter(directory, replace(job.origin.adapter, deltas=kept, config=_config(job)))
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(directory)
    if job.request.reader == OLLAMA:
        (directory / "Modelfile").write_text(modelfile(merged=False))
    checks = checks_of_update(job, load_adapter(directory).deltas, kept)
    if job.models is not None and job.logits is not None:
        checks += _checks_by_peft(job, job.models, job.logits, kept, directory)
    return checks


def _config(job: Job) -> Mapping[str, Any]:
    """The adapter's configuration; a base that the user names is the one it is for."""
    config = dict(job.origin.adapter.config)
    if job.request.loading.base:
        config |= {"base_model_name_or_path": job.request.loading.base, "revision": None}
    return config


def checks_of_update(
    job: Job, found: Mapping[str, LowRank], kept: Mapping[str, LowRank]
) -> list[Check]:
    """Whether the update read back is what was meant, and as far from the origin as stated."""
    whole = job.origin.adapter.deltas
    if found.keys() != whole.keys():
        return [Check("modules that are missing in it", float("inf"), WEIGHTS)]
    distance, stated = relative_distance(found, whole), job.spectrum.error(job.cut)
    return [
        Check(
            "relative difference of the update read back from what was meant",
            relative_distance(found, kept),
            WEIGHTS,
        ),
        Check(
            f"its relative error against the global update {distance:.1e}, stated {stated:.1e}; "
            "they differ by",
            abs(distance - stated),
            WEIGHTS,
        ),
    ]


def _checks_by_peft(
    job: Job, models: Models, wanted: Tensor, kept: Mapping[str, LowRank], directory: Path
) -> list[Check]:
    """What PEFT makes of the files: its updates, and the logits beside the origin's."""
    load_export(models, directory)
    with models.using("export") as model:
        distance = peft_distance(model, kept, total_norm(kept))
        found = logits_of(model, token_rows(model))
    bound = LOGITS[torch.float32] if job.is_whole else None
    return [
        Check("largest relative difference of an update as PEFT reads it", distance, WEIGHTS),
        Check(
            "largest difference of logits"
            + ("" if job.is_whole else " from the uncut model, which is what the cut costs"),
            logit_distance(found, wanted),
            bound,
        ),
    ]


def _fill_mlx(job: Job, kept: Mapping[str, LowRank], directory: Path) -> list[Check]:
    """MLX's own files, read back as MLX would read them."""
    layers = _num_layers(job)
    write_mlx(directory, kept, layers, job.origin.base_name)
    return checks_of_update(job, read_mlx(directory, layers), kept)


def _num_layers(job: Job) -> int:
    """Layers of the whole model; without the base, as many as the adapter knows of."""
    if job.skeleton is not None:
        own = getattr(job.skeleton.config.get_text_config(), "num_hidden_layers", None)
        if own:
            return int(own)
    parts = (name.split(".") for name in job.origin.adapter.deltas)
    numbers = [int(part) for name in parts for part in name if part.isdecimal()]
    return max(numbers, default=0) + 1


# --- merged ---


def fill_merged(job: Job, directory: Path) -> list[Check]:
    """Write the base with the update merged and all that belongs to a model, and read it back.

    The update is added as it is stored; nothing is cut.
    """
    subject = job.origin.needed()
    dtype = DTYPES[job.request.dtype] if job.request.dtype else None
    plan = plan_merge(
        job.skeleton,
        open_checkpoint(subject.source),
        job.origin.adapter,
        job.origin.adapter.deltas,
        dtype,
    )
    files = write_merged(directory, plan, read_size(job.request.max_shard_size))
    _write_configuration(job, plan, directory)
    if job.request.reader == OLLAMA:
        (directory / "Modelfile").write_text(modelfile(merged=True))
    checks = [
        Check(
            "largest difference of a weight from W + dW, as a multiple of rounding",
            largest_difference(files, plan),
            ROUNDING,
        )
    ]
    if job.logits is not None:
        found = _merged_logits(job, directory)
        bound = max(LOGITS[x] for x in _float_dtypes(plan))
        checks.append(
            Check("largest difference of logits", logit_distance(found, job.logits), bound)
        )
    return checks


def _float_dtypes(plan: MergePlan) -> set[torch.dtype]:
    """The floating dtypes of the written tensors, float64 counted as float32."""
    kinds = {part.info.dtype for part in plan.parts.values() if part.info.dtype.is_floating_point}
    return {dtype if dtype in LOGITS else torch.float32 for dtype in kinds} or {torch.float32}


def _write_configuration(job: Job, plan: MergePlan, directory: Path) -> None:
    """Write config.json, generation_config.json, the tokenizer, and the model's own code."""
    from transformers import GenerationConfig

    subject, skeleton = job.origin.needed(), job.skeleton
    config = copy.deepcopy(skeleton.config)
    config.architectures = [type(skeleton).__name__]
    if plan.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if job.request.dtype:
        config.dtype = config.get_text_config().dtype = DTYPES[job.request.dtype]
    if job.origin.classifies and config.get_text_config().pad_token_id is None:
        config.pad_token_id = config.get_text_config().pad_token_id = job.tokenizer.pad_token_id
    config.save_pretrained(directory)
    if not job.origin.classifies:
        try:
            own = GenerationConfig.from_pretrained(
                subject.source.name, revision=subject.source.revision
            )
        except OSError:  # the base has none
            own = skeleton.generation_config
        if own is not None:
            own.save_pretrained(directory)
    job.tokenizer.save_pretrained(directory)
    if subject.source.trust_remote_code and Path(subject.source.name).is_dir():
        for file in Path(subject.source.name).glob("*.py"):
            shutil.copy(file, directory / file.name)


def _merged_logits(job: Job, directory: Path) -> Tensor:
    """The logits of the merged model as transformers loads it, computed in float32.

    Raises:
        CheckpointError: transformers cannot load it, or lacks weights in it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if job.origin.classifies else AutoModelForCausalLM
    subject = job.origin.needed()
    try:
        model, info = kind.from_pretrained(
            directory,
            dtype=torch.float32,
            trust_remote_code=subject.source.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot load the merged model: {text}") from None
    if absent := sorted(info["missing_keys"]):
        raise CheckpointError(f"the merged model lacks {', '.join(absent[:3])}; nothing was kept")
    ids = token_rows(model)
    return logits_of(model.to(_device(job)), ids)


def _device(job: Job) -> torch.device:
    use_cpu = job.request.loading.use_cpu
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
