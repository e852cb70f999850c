"""Does what `fedlora export` is asked for: the table, the files, the comparison, the upload."""

from __future__ import annotations

import gc
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedlora.adapters.export.merged import refuse_quantised
from fedlora.adapters.export.ranks import RankCost, ranks_to_show, spectrum
from fedlora.adapters.export.readers import (
    MLX,
    Base,
    base_facts,
    check_reader,
    gguf_commands,
    next_commands,
    rank_for,
    wants_one_rank,
)
from fedlora.client.memory import memory_available
from fedlora.commands.eval.models import Models, load_models, tokenizer_of
from fedlora.commands.export.card import Written, model_card
from fedlora.commands.export.files import Job, fill_adapter, fill_merged
from fedlora.commands.export.gguf_files import fill_gguf, gguf_parts
from fedlora.commands.export.hub import check_repo, files_to_push, push
from fedlora.commands.export.origin import HeldOut, Origin, find_origin, held_out, with_adapters
from fedlora.commands.export.output import check_output, write_whole
from fedlora.commands.export.readback import Check, enforce, logits_of, token_rows
from fedlora.commands.export.request import Request
from fedlora.commands.export.table import as_json, losses, show_table
from fedlora.commands.json_lines import Emit
from fedlora.commands.views.sentences import say
from fedlora.errors import InputError
from fedlora.model.loading import load_pretrained
from fedlora.text import human_bytes

SPARE = 1.3
"""Memory that loading a model takes, as a multiple of its weights."""


@dataclass(frozen=True)
class Teller:
    """Where what is done is told: sentences and tables for people, or JSON for programs."""

    console: Console
    emit: Emit | None

    def say(self, text: str) -> None:
        """A sentence, for people alone."""
        if self.emit is None:
            say(self.console, text)

    def note(self, text: str) -> None:
        """What the user should know, for people and programs."""
        self.say(f"note: {text}")
        self.event("note", message=text)

    def begin(self, what: str) -> None:
        """What takes a while and begins now, for people who wait."""
        if self.emit is None:
            print(f"{what} ...", file=sys.stderr, flush=True)

    def event(self, kind: str, **values: Any) -> None:
        """An object, for programs alone."""
        if self.emit is not None:
            self.emit({"event": kind, **values})


def export(request: Request, console: Console, emit: Emit | None = None) -> None:
    """Show the table of ranks; write, compare and upload what is asked for.

    Raises:
        InputError: what is asked for cannot be done, and what to do.
        CheckpointError: what was written is not what it came from; nothing of it is left.
    """
    teller = Teller(console, emit)
    if request.repo is not None:
        check_repo(request.repo)
    origin = find_origin(request.loading)
    skeleton = _skeleton(origin)
    base = base_facts(origin.base_name, skeleton, bool(origin.adapter.config.get("fan_in_fan_out")))
    notes = [*(origin.subject.notes if origin.subject else ()), *_check(request, origin, base)]
    job = _job(request, origin, skeleton)
    if request.format == "gguf":
        parts, more = gguf_parts(job, base)
        job, notes = replace(job, parts=parts), [*notes, *more]
    job, more = _measured(job, teller)
    notes += more
    for note in notes:
        teller.note(note)
    if request.output is None:
        teller.say(_what_next(job))
        return
    teller.begin("merging" if request.format == "merged" else "writing and reading back")
    checks = _write(job, request.output)
    _tell_written(job, request.output, checks, _commands(job, request.output, base), teller)
    if request.repo is not None:
        _upload(request, request.output, request.repo, base, teller)


def _skeleton(origin: Origin) -> Any:
    """The model without weights; None where the base is not here."""
    if origin.subject is None:
        return None
    return load_pretrained(origin.subject.source, "float32", 0, origin.labels, weights=False)[0]


def _check(request: Request, origin: Origin, base: Base) -> list[str]:
    """Refuse what cannot be done before anything is computed; gives what the user should know."""
    if request.output is not None:
        here = [path for name in (origin.name, base.name) if (path := Path(name)).is_dir()]
        check_output(request.output, request.overwrite, [origin.path, *here])
    if request.format == "merged":
        subject = origin.needed()
        refuse_quantised(subject.source.config, subject.source.name)
        return []
    if request.format == "gguf":  # gguf_parts knows what else cannot be done
        origin.needed()
        return []
    if request.check == "logits" or request.eval_file is not None:
        origin.needed()
    return check_reader(request.reader, origin.adapter, base)


def _job(request: Request, origin: Origin, skeleton: Any) -> Job:
    """The update by its directions, and the ranks that follow from what is asked for."""
    found = spectrum(origin.adapter.deltas)
    cut = found.rank
    if request.rank is not None:
        cut = min(request.rank, cut)
    elif request.energy is not None:
        cut = found.rank_for(request.energy)
    rank = rank_for(request.reader, cut) if request.format == "peft" else cut
    tokenizer = None if origin.subject is None else tokenizer_of(origin.subject)
    return Job(origin, request, found, cut, rank, skeleton, tokenizer)


# --- the table ---


def _measured(job: Job, teller: Teller) -> tuple[Job, list[str]]:
    """Load the models that are needed, measure every rank, and show the table.

    Returns:
        The job with what it is compared with, and what the user should know. The models themselves
        are in it only where an adapter is written: a merged model needs their memory.
    """
    origin, request = job.origin, job.request
    ranks = ranks_to_show(job.spectrum.rank, [job.cut])
    rows, notes = _rows(job)
    by_logits = request.format is not None and _compares_logits(job)
    models, loss, logits = None, None, None
    if rows or by_logits:
        teller.begin("loading the base")
        try:
            models = _load(job)
        except InputError as error:
            if request.eval_file or request.check == "logits":
                raise
            notes.append(f"{error}; so losses and logits are left out")
    if models is not None and rows:
        teller.begin(f"measuring the loss at {len(ranks)} ranks on {len(rows.rows)} rows")
        loss = losses(models, origin, job.spectrum, ranks, rows)
    if models is not None and by_logits:
        with models.using(origin.model) as model:
            logits = logits_of(model, token_rows(model))
    _tell_table(job, ranks, loss, rows, teller)
    kept = models if request.format == "peft" else None
    return replace(job, models=kept, logits=logits), notes


def _load(job: Job) -> Models:
    """The base with the adapter that is exported on it."""
    origin = job.origin
    subject = with_adapters(origin.needed(), {origin.model: origin.path})
    return load_models(subject, [origin.model], job.tokenizer, origin.labels)


def _rows(job: Job) -> tuple[HeldOut | None, list[str]]:
    """The rows to measure losses on, and why there are none."""
    request, origin = job.request, job.origin
    if not request.held_out and request.eval_file is None:
        return None, []
    if origin.subject is None:
        return None, [f"no losses and no logits, for the base is not here: {origin.why_no_base}"]
    if not _fits(job) and request.eval_file is None:
        return None, ["no losses: the model in float32 does not fit into the free memory"]
    try:
        found = held_out(origin, request.eval_file, request.limit, job.tokenizer)
    except InputError as error:
        if request.eval_file is not None:
            raise
        return None, [f"no losses: {error}"]
    if found is not None and request.batch_size:
        found = replace(found, batch_size=request.batch_size)
    return found, []


def _fits(job: Job) -> bool:
    """Whether the base fits into the free memory in float32."""
    numbers = sum(p.numel() for p in job.skeleton.parameters())
    use_cpu = job.request.loading.use_cpu
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    return bool(SPARE * 4 * numbers < memory_available(device))


def _compares_logits(job: Job) -> bool:
    """Whether the export is compared by logits, and not by its weights alone."""
    if _files(job.request) in ("mlx", "gguf"):  # other programs than transformers compute with them
        return False
    if job.request.check != "auto":
        return job.request.check == "logits"
    return job.origin.subject is not None and _fits(job)


def _tell_table(
    job: Job, ranks: list[int], loss: list[float] | None, rows: HeldOut | None, teller: Teller
) -> None:
    request, origin, found = job.request, job.origin, job.spectrum
    padded = wants_one_rank(request.reader)
    beside = sum(value.nbytes for value in origin.adapter.dense.values())
    costs: list[RankCost] = [found.cost(rank, beside, padded) for rank in ranks]
    measured = rows if loss is not None else None
    teller.event(
        "ranks",
        source=origin.name,
        model=origin.model,
        modules=len(found.directions),
        rank=found.rank,
        saved_whole=sorted(origin.adapter.dense),
        measured_on=measured.as_json if measured else None,
        ranks=as_json(costs, loss),
    )
    if teller.emit is not None:
        return
    teller.say(
        f"{origin.path}: {len(found.directions)} modules, "
        f"{'rank' if len(ranks) == 1 else 'ranks up to'} {found.rank}"
        + (f", {len(origin.adapter.dense)} tensors trained whole" if origin.adapter.dense else "")
    )
    if measured:
        teller.say(f"loss on {len(measured.rows)} of {measured.total} rows: {measured.where}")
    chosen = job.cut if request.format == "peft" or "adapter" in job.parts else None
    show_table(costs, loss, chosen, teller.console)


def _what_next(job: Job) -> str:
    """What to type to have files, where the table alone was asked for."""
    found, name = job.spectrum, shlex.quote(job.origin.name)
    lines = ["next, for example:"]
    rank = found.rank_for(0.99)
    lines.append(
        f"  fedlora export {name} --format peft --rank {rank} --output DIR"
        f"    # {1.0 - found.error(rank) ** 2:.1%} of the energy"
    )
    lines.append(f"  fedlora export {name} --format peft --for vllm --output DIR")
    lines.append(f"  fedlora export {name} --format merged --dtype bfloat16 --output DIR")
    lines.append(f"  fedlora export {name} --format gguf --output DIR")
    return "\n".join(lines)


# --- the files ---


def _write(job: Job, output: Path) -> list[Check]:
    """Write, read back and compare; the directory has its name only when all is well."""
    request, checks = job.request, list[Check]()
    gc.collect()  # models that were measured hold themselves in circles
    fill = {"merged": fill_merged, "gguf": fill_gguf}.get(str(request.format), fill_adapter)

    def write(partial: Path) -> None:
        checks.extend(fill(job, partial))
        enforce(checks, output)
        name = request.repo or output.name
        card = Written(_files(request), name, [*_facts(job), *(check.in_words for check in checks)])
        (partial / "README.md").write_text(model_card(job.origin, card), encoding="utf-8")

    write_whole(output, write)
    return checks


def _files(request: Request) -> str:
    """Whose files are written: peft, mlx, merged or gguf."""
    return MLX if request.reader == MLX and request.format == "peft" else str(request.format)


def _facts(job: Job) -> list[str]:
    """What is said of the files: rank and error, or dtype."""
    merged = _fact_on_merged(job)
    if merged and "adapter" not in job.parts:
        return merged
    error = job.spectrum.error(job.cut)
    ranks = (
        f"rank {job.rank} in every module"
        if wants_one_rank(job.request.reader)
        else f"ranks up to {job.rank}, by module, which PEFT alone reads (others: --for)"
    )
    padded = f" ({job.rank - job.cut} of them zeros)" if job.rank > job.cut else ""
    return [
        f"{ranks}{padded}, lora_alpha = r, so scale 1",
        f"relative error against the global update (Frobenius norm): {error:.1e}, "
        f"{1.0 - error**2:.4%} of its energy",
        *merged,
    ]


def _fact_on_merged(job: Job) -> list[str]:
    """What is said of merged weights; nothing where there are none."""
    if job.request.format != "merged" and "merged" not in job.parts:
        return []
    dtype = job.request.dtype or "the base's own dtype"
    file = "model.gguf: " if job.request.format == "gguf" else ""
    return [f"{file}the base with the update merged in float32, saved in {dtype}"]


def _commands(job: Job, output: Path, base: Base) -> list[str]:
    """What to type to use what was written."""
    reader = job.request.reader
    if job.request.format == "gguf":
        return gguf_commands(reader, output, base, [path.name for path in output.iterdir()])
    rank = job.rank if job.request.format == "peft" else None
    return next_commands(reader, output, base, rank, job.origin.classifies)


def _tell_written(
    job: Job, output: Path, checks: list[Check], commands: list[str], teller: Teller
) -> None:
    files = files_to_push(output)
    has_adapter = job.request.format == "peft" or "adapter" in job.parts
    teller.event(
        "export",
        format=job.request.format,
        reader=job.request.reader,
        output=str(output),
        rank=job.rank if has_adapter else None,
        error=job.spectrum.error(job.cut) if has_adapter else 0.0,
        checks=[{"what": x.what, "reached": x.reached, "tolerance": x.tolerance} for x in checks],
        compared_by="logits" if job.logits is not None else "weights",
        files=[{"path": path, "bytes": size} for path, size in files],
        commands=commands,
    )
    for line in (*_facts(job), *(check.in_words for check in checks)):
        teller.say(line)
    if job.logits is None:
        teller.say("compared by its weights, not by logits")
    total = human_bytes(sum(size for _, size in files))
    teller.say(f"written and read back: {output} ({len(files)} files, {total})")
    for command in commands:
        teller.say(f"  {command}")


def _upload(request: Request, output: Path, repo: str, base: Base, teller: Teller) -> None:
    """Put the export on the hub, or say what would be put there."""
    files = files_to_push(output)
    if request.format == "peft" and Path(base.name).is_dir():
        teller.note(
            "the adapter names its base by a path of this machine; --base OWNER/NAME gives it the "
            "name by which others find it"
        )
    kind = "private" if request.private else "public"
    if request.dry_run:
        teller.event(
            "push",
            repo=repo,
            private=request.private,
            dry_run=True,
            files=[{"path": path, "bytes": size} for path, size in files],
        )
        teller.say(f"would upload to {repo} ({kind} if it is made by this):")
        for path, size in files:
            teller.say(f"  {human_bytes(size):>9}  {path}")
        return
    url = push(output, repo, request.private)
    teller.event("push", repo=repo, private=request.private, dry_run=False, url=url)
    teller.say(f"uploaded: {url}")
