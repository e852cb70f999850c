"""Fills an export's directory with GGUF files, and reads them back before they count as done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedlora.adapters.export.checkpoint import open_checkpoint
from fedlora.adapters.export.gguf_adapter import ADAPTER, read_gguf_adapter, write_gguf_adapter
from fedlora.adapters.export.gguf_layout import Layout, layout_of
from fedlora.adapters.export.gguf_model import (
    MODEL,
    largest_gguf_difference,
    rope_factors,
    write_gguf_model,
)
from fedlora.adapters.export.gguf_vocabulary import vocabulary_of
from fedlora.adapters.export.merged import DTYPES, plan_merge, refuse_quantised, usual_dtype
from fedlora.adapters.export.readers import OLLAMA, Base, gguf_modelfile, why_no_adapter
from fedlora.commands.export.files import Job, checks_of_update
from fedlora.commands.export.readback import ROUNDING, Check
from fedlora.errors import InputError

ADAPTER_PART, MODEL_PART = "adapter", "merged"


def gguf_parts(job: Job, base: Base) -> tuple[tuple[str, ...], list[str]]:
    """Which files are written, and what the user should know.

    Where both are asked for, one that cannot be written is left out with the reason.

    Args:
        job: what is exported; the base is here.
        base: what readers need to know of it.

    Raises:
        InputError: nothing of what is asked for can be written.
    """
    layout_of(job.origin.needed().source.config)
    parts = job.request.parts
    wanted = (ADAPTER_PART, MODEL_PART) if parts == "both" else (parts,)
    reasons = {
        ADAPTER_PART: why_no_adapter(job.request.reader, job.origin.adapter, base),
        MODEL_PART: _why_no_model(job),
    }
    possible = tuple(part for part in wanted if not reasons[part])
    if not possible:
        raise InputError("--format gguf: " + "; ".join(reasons[part] for part in wanted))
    files = {ADAPTER_PART: ADAPTER, MODEL_PART: MODEL}
    return possible, [f"no {files[x]}: {reasons[x]}" for x in wanted if reasons[x]]


def _why_no_model(job: Job) -> str:
    """Why the merged model cannot be a GGUF file; empty: it can."""
    config, source = job.skeleton.config.get_text_config(), job.origin.needed().source
    try:
        refuse_quantised(source.config, source.name)
        rope_factors(config)
        vocabulary_of(job.tokenizer, int(config.vocab_size))
    except InputError as error:
        return str(error).removeprefix("--format gguf: ")
    return ""


def fill_gguf(job: Job, directory: Path) -> list[Check]:
    """Write the adapter, the merged model or both as GGUF files, and read them back.

    Returns:
        The comparisons with what they came from.
    """
    layout = layout_of(job.skeleton.config.get_text_config())
    checks = list[Check]()
    if ADAPTER_PART in job.parts:
        checks += _fill_adapter(job, layout, directory / ADAPTER)
    if MODEL_PART in job.parts:
        checks += _fill_model(job, layout, directory / MODEL)
    if job.request.reader == OLLAMA:
        (directory / "Modelfile").write_text(gguf_modelfile(MODEL_PART in job.parts))
    return checks


def _fill_adapter(job: Job, layout: Layout, file: Path) -> list[Check]:
    """The adapter, of one rank, and whether it is the update that was meant."""
    kept = job.kept
    write_gguf_adapter(file, kept, job.origin.adapter.embeddings, layout, job.origin.path.name)
    found = read_gguf_adapter(file).deltas
    return [replace(x, what=f"{file.name}: {x.what}") for x in checks_of_update(job, found, kept)]


def _fill_model(job: Job, layout: Layout, file: Path) -> list[Check]:
    """The merged model, and whether every weight is `W + dW`; nothing is cut."""
    subject, config = job.origin.needed(), job.skeleton.config.get_text_config()
    checkpoint = open_checkpoint(subject.source)
    adapter = job.origin.adapter
    plan = plan_merge(job.skeleton, checkpoint, adapter, adapter.deltas, torch.float32)
    dtype = DTYPES[job.request.dtype] if job.request.dtype else usual_dtype(checkpoint)
    vocabulary = vocabulary_of(job.tokenizer, int(config.vocab_size))
    write_gguf_model(file, plan, layout, config, vocabulary, dtype, subject.source.name)
    return [
        Check(
            f"{file.name}: largest difference of a weight from W + dW, as a multiple of rounding",
            largest_gguf_difference(file, plan, layout),
            ROUNDING,
        )
    ]
