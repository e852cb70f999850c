"""Runs `fedlora run`: a federation from beginning to end, and `--dry_run`, which only checks it."""

from __future__ import annotations

import shlex
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.sources import settings
from fedlora.config.train_function import load_train_function
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.runs.file_names import CONFIG

if TYPE_CHECKING:
    from fedlora.runs.results import Result
    from fedlora.runs.session import Session


def _methods() -> str:
    """The rules, a line each."""
    lines = []
    for name, rule in METHODS.items():
        ranks = "mixed ranks" if rule.mixed_ranks else "one rank"
        about = textwrap.wrap(f"{ranks}; exact when: {rule.exact_when}", 86)
        lines.append(f"\n{'':12}".join([f"  {name:<9} {rule.title}", *about]))
    return "Methods (--method):\n" + "\n".join(lines) + "\n"


HELP = f"""\
fedlora run [CONFIG.yaml] [--key value ...] [--json] [--dry_run]
fedlora run --resume DIR [--json]

Runs a federation: in every round the server sends the global model to the clients, each trains a
LoRA adapter of its own rank on its own rows, and the server combines them. Keys are those of
transformers, PEFT and TRL where they have one; `fedlora config` lists all. Lists are separated by
spaces. The command line goes over the file. Without a file the embedded default runs: a tiny Llama
and ten clients that come with the package. With data of your own and no file, every key that is
not given has the value that `fedlora config` shows.

  --resume DIR    go on with the run in DIR after its last whole round
  --json          one JSON object per event on standard output: warning, begin, start (the base),
                  round, end, the last three as in metrics.jsonl; error with its message if it
                  fails. With --dry_run one object, plan
  --dry_run       check everything and show what would be done; read no weights, write nothing

Examples:
  fedlora run --client_ranks 32 16 8 --num_clients 3 --output_dir out
  fedlora run --model_name_or_path path/or/hub-name --train_file 'site_*.jsonl' \\
      --eval_file held_out.jsonl --lora_target_modules q_proj v_proj --learning_rate 3e-4
  fedlora run --model_name_or_path an/encoder --train_file all.csv --label_column_name label \\
      --partition dirichlet --partition_alpha 0.5 --num_clients 10    # a classifier
  fedlora run server.yaml --engine nvflare --kit ADMIN_KIT   # rows at sites, over NVIDIA FLARE

In DIR: config.yaml, metrics.jsonl, round-N/ and final/, which PeftModel.from_pretrained loads.

{_methods()}"""
SYNTAX = Syntax(
    {
        "resume": Option("the output directory of the run to go on with", path="directory"),
        "dry_run": Option("check everything, write nothing", flag=True),
    },
    CONFIGURATION,
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora run`."""
    own = take(arguments, SYNTAX)
    resume = own["resume"]
    if own["dry_run"]:
        if resume is not None:
            raise InputError("--dry_run checks a run that has not begun; leave --resume out")
        return _dry_run(arguments, emit)
    quiet_libraries()
    from fedlora.commands.console import reporter
    from fedlora.engines.local import run

    config = _configuration(arguments, resume)
    try:
        with reporter(emit) as report:
            result = run(config, resume=resume, report=report)
    except KeyboardInterrupt:
        _say_stopped(resume or (config.output_dir if config else ""))
        return 130
    if emit is None:
        _say_ended(result)
    return 0


def _configuration(arguments: list[str], resume: str | None) -> Config | None:
    """What the command line asks for; None: a run goes on, and nothing more is said of it."""
    if resume is None:
        return Config(**settings(arguments, EMBEDDED))
    if not arguments:
        return None
    # Keys alone are held against the run's own configuration, a file against all of it.
    kept = Path(resume) / CONFIG
    if not kept.is_file():
        raise InputError(f"--resume {resume}: nothing to resume; there is no config.yaml")
    return Config(**settings(arguments, str(kept)))


def _say_stopped(where: str) -> None:
    """What an interrupted run leaves, and how it goes on."""
    if not (Path(where) / CONFIG).is_file():
        print("\nstopped before anything was written", file=sys.stderr)
    else:
        print(
            "\nstopped; finished rounds are saved. Go on with: fedlora run --resume "
            + shlex.quote(where),
            file=sys.stderr,
        )


def _say_ended(result: Result) -> None:
    """How a run ended: a classifier's scores by label, the best round, and where its model lies."""
    from fedlora.commands.console import per_class

    last = next(x for x in reversed(result.metrics) if x["event"] in ("round", "start"))
    for line in per_class(last.get("evaluation") or {}, str(result.output_dir)):
        print(line)
    end = result.metrics[-1]
    best = "" if end["best"] is None else f"; best: round {end['best']}"
    print(f"ended after round {end['round']}{best}; final/ holds round {end['final']}")
    each = "" if (result.final_dir / "adapter_config.json").exists() else "/client-*"
    print(f"final adapter: {result.final_dir}{each}  (PeftModel.from_pretrained loads it)")


def _dry_run(arguments: list[str], emit: Emit | None) -> int:
    """Check a run and show what it would do, without weights and without writing."""
    from rich.console import Console

    from fedlora.commands.views.plan import show_plan
    from fedlora.model.quantised_linear import require_bitsandbytes
    from fedlora.runs.directory import check_free
    from fedlora.runs.precisions import bits_held
    from fedlora.runs.session import assemble

    quiet_libraries()
    config = Config(**settings(arguments, EMBEDDED))
    if config.trains_at_sites:
        check = "fedlora worker --site SITE.yaml --check"
        if config.engine == "nvflare":
            check = "fedlora doctor --site SITE.yaml"
        raise InputError(
            f"--dry_run looks at rows, which lie at the sites; check each of them there: {check}"
        )
    check_free(config.output_dir)
    if config.train_function is not None:
        load_train_function(config.train_function)
    session = assemble(config, weights=False)
    for bits in bits_held(session.config):
        require_bitsandbytes(bits)
    if emit:
        emit(_plan(session))
    else:
        show_plan(session, Console())
    return 0


def _plan(session: Session) -> dict[str, Any]:
    """What a run would do, as a program reads it."""
    from fedlora.commands.views.plan import client_plans

    base, data, spec = session.base, session.data, session.federation
    clients = []
    for plan in client_plans(session):
        own = (session.config.client_overrides or {}).get(plan.client)  # type: ignore[union-attr]
        clients.append({**asdict(plan), "settings": own or {}})
    return {
        "event": "plan",
        "config": session.config.flat(),
        "architecture": type(base.model).__name__,
        "parameters": base.num_parameters,
        "modules": {name: list(shape) for name, shape in spec.shapes.items()},
        "dense_parameters": sum(p.numel() for p in base.full_params.values()),
        "clients_per_round": len(spec.sample(1)),
        "clients": clients,
        "eval_rows": len(data.eval),
        "warnings": list(session.warnings),
    }
