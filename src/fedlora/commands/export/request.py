"""Reads the command line of `fedlora export`, and refuses what does not go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.adapters.export.readers import LLAMA_CPP, MLX, OLLAMA, PEFT, READERS
from fedlora.commands.eval.options import LOADING, Given, Loading
from fedlora.config.arguments import TRUTH, Option, Syntax
from fedlora.errors import InputError
from fedlora.text import nearest

FORMATS = ("peft", "merged", "gguf")
PARTS = ("both", "adapter", "merged")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHECKS = ("auto", "logits", "weights")
LIMIT = 256
"""Held-out rows that losses are measured on, unless the user says otherwise."""

SYNTAX = Syntax(
    {
        "round": Option("a round of the run"),
        "model": Option("client-K, of a run that keeps clients' models"),
        "format": Option("what to write", values=FORMATS),
        "output": Option("a new directory", path="directory"),
        "rank": Option("singular directions of each module, at most"),
        "energy": Option("share of the squared singular values to keep"),
        "for": Option("which program reads it", values=READERS),
        "parts": Option("of GGUF files, which to write", values=PARTS),
        "dtype": Option("of merged weights", values=DTYPES),
        "max_shard_size": Option("of a file of merged weights, as 5GB"),
        "eval_file": Option("rows to measure the loss on", path="file"),
        "held_out": Option("measure the loss on the run's own rows", values=TRUTH),
        "limit": Option("rows to measure on"),
        "batch_size": Option("rows at once"),
        "check": Option("how the export is compared", values=CHECKS),
        "push_to_hub": Option("OWNER/NAME on the hub"),
        "private": Option("of a repository that is made", values=TRUTH),
        "dry_run": Option("list what would be uploaded", flag=True),
        "overwrite": Option("replace an earlier export", flag=True),
        **{key: option for key, option in LOADING.items() if key not in ("round", "dtype")},
    },
    Option("a run, its round-N or final, or a PEFT directory", path="directory"),
)


@dataclass(frozen=True)
class Request:
    """What `fedlora export` is asked for.

    Args:
        loading: the run or adapter and how to load it; its dtype is float32, in which exports are
            compared.
        format: peft, merged, gguf, or None: the table alone.
        output: the directory to be; None with no format.
        rank, energy: what the update is cut to; both None: it is not.
        reader: the program that is to read it.
        parts: of GGUF files, which are written: adapter, merged or both.
        dtype: of merged weights; None: as in the base's checkpoint.
        max_shard_size: of merged weights, as text.
        eval_file: rows to measure losses on.
        held_out: measure losses where there are rows.
        limit: how many rows at most, or a share.
        batch_size: rows at once; None: the run's own number, or 8.
        check: auto, logits or weights.
        repo: on the hub; None: nothing is uploaded.
        private: of a repository that is made.
        dry_run: list what would be uploaded.
        overwrite: an earlier export may be replaced.
    """

    loading: Loading
    format: str | None = None
    output: Path | None = None
    rank: int | None = None
    energy: float | None = None
    reader: str = PEFT
    parts: str = "both"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    eval_file: Path | None = None
    held_out: bool = True
    limit: int | float = LIMIT
    batch_size: int | None = None
    check: str = "auto"
    repo: str | None = None
    private: bool = True
    dry_run: bool = False
    overwrite: bool = False


def read_request(arguments: list[str]) -> Request:
    """The command line as a request.

    Raises:
        InputError: something is unknown, impossible, or does not go with something else.
    """
    if not arguments or arguments[0].startswith("--"):
        raise InputError(
            "export: name a run, its round-N or final, or a PEFT directory; see fedlora export "
            "--help"
        )
    given = Given("export", arguments, SYNTAX.options)
    kind, dtype = given.text("format"), _one_of(given, "dtype", DTYPES)
    output, held_out, private = (
        given.text("output"),
        given.truth("held_out"),
        given.truth("private"),
    )
    request = Request(
        loading=replace(given.loading(given.listed("model")), dtype="float32"),
        format=_one_of(given, "format", FORMATS),
        output=None if output is None else Path(output),
        rank=given.whole("rank"),
        energy=_share(given),
        reader=_one_of(given, "for", READERS) or (LLAMA_CPP if kind == "gguf" else PEFT),
        parts=_one_of(given, "parts", PARTS) or "both",
        dtype=None if dtype == "auto" else dtype,
        max_shard_size=given.text("max_shard_size") or "5GB",
        eval_file=given.file("eval_file"),
        held_out=held_out is not False,
        limit=given.limit() or LIMIT,
        batch_size=given.whole("batch_size"),
        check=_one_of(given, "check", CHECKS) or "auto",
        repo=given.text("push_to_hub"),
        private=private is not False,
        dry_run=given.flag("dry_run"),
        overwrite=given.flag("overwrite"),
    )
    _check(request, list(given.values))
    return request


def _one_of(given: Given, key: str, among: tuple[str, ...]) -> str | None:
    value = given.text(key)
    if value is not None and value not in among:
        raise InputError(
            f"--{key}: {value!r}: expected {', '.join(among)}" + nearest(value, among, "")
        )
    return value


def _share(given: Given) -> float | None:
    text = given.text("energy")
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise InputError(f"--energy: {text}: expected a share above 0 and at most 1")
    return value


def _check(request: Request, keys: list[str]) -> None:
    """Refuse options that do not go together."""
    if (request.format is None) != (request.output is None):
        missing = "--format peft, merged or gguf" if request.format is None else "--output DIR"
        raise InputError(f"export: give {missing} too; without both, the table of ranks is shown")
    if request.rank is not None and request.energy is not None:
        raise InputError("--rank and --energy exclude each other; give one of them")
    _check_merged(request, keys)
    _check_gguf(request, keys)
    if request.format == "merged" and (request.rank or request.energy):
        raise InputError(
            "--rank and --energy belong to --format peft; a merged model takes the whole update, "
            "and is no larger for it"
        )
    if request.check == "logits" and request.reader == MLX and request.format == "peft":
        raise InputError(
            "--check logits: MLX runs on Apple's machines alone; its files are compared by weights"
        )
    if request.repo is None:
        for key in ("dry_run", "private"):
            if key in keys:
                raise InputError(f"--{key} belongs to --push_to_hub OWNER/NAME")
    elif request.format is None:
        raise InputError("--push_to_hub: say what to upload: --format and --output DIR")


def _check_merged(request: Request, keys: list[str]) -> None:
    """Refuse options of merged weights where there are none."""
    if "max_shard_size" in keys and request.format != "merged":
        raise InputError("--max_shard_size belongs to --format merged; there is one file else")
    merges = request.format == "merged" or (request.format == "gguf" and request.parts != "adapter")
    if "dtype" in keys and not merges:
        raise InputError(
            "--dtype belongs to merged weights (--format merged or gguf); adapters are float32"
        )


def _check_gguf(request: Request, keys: list[str]) -> None:
    """Refuse what does not go with GGUF files, or only with them."""
    if request.format != "gguf":
        if "parts" in keys:
            raise InputError("--parts belongs to --format gguf")
        return
    if request.reader not in (LLAMA_CPP, OLLAMA):
        raise InputError(
            f"--for {request.reader}: does not read GGUF files; {LLAMA_CPP} and {OLLAMA} do"
        )
    if request.check == "logits":
        raise InputError(
            "--check logits: transformers does not compute with GGUF files; they are compared by "
            "weights"
        )
    if request.parts == "merged" and (request.rank or request.energy):
        raise InputError("--rank and --energy belong to the adapter; see --parts")
