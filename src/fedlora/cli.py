"""Reads the command `fedlora` and calls the functions that a Python user calls too."""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from fedlora import __version__
from fedlora.config import Config
from fedlora.console import quiet_libraries
from fedlora.demo import EMBEDDED
from fedlora.errors import FedloraError, InputError
from fedlora.methods import METHODS
from fedlora.sources import parse_overrides, settings, take_flag, take_value

HELP = f"""\
fedlora {__version__}: federated fine-tuning of language models with LoRA adapters of different rank

  fedlora demo                      ten clients of ranks 64 to 4, three methods, one table (minutes)
  fedlora run [CONFIG.yaml] [--key value ...]
                                    run a federation; without CONFIG.yaml, the embedded default
  fedlora run --resume DIR          go on with a run that was interrupted
  fedlora run CONFIG.yaml --dry_run check a configuration: model, data, ranks; read no weights
  fedlora partition [CONFIG.yaml]   who holds what: a table and bars, a picture with --output
  fedlora data [CONFIG.yaml]        samples token by token, and which of them are learnt
  fedlora aggregate A/ B/ --output C/
                                    PEFT adapters of any ranks become one
  fedlora config [CONFIG.yaml] [--key value ...]
                                    every key, its value and one line on what it does
  fedlora watch DIR                 look at a run that goes on elsewhere
  fedlora report DIR [DIR ...]      runs become one page: report.html
  fedlora eval MODEL_OR_RUN         lm-evaluation-harness, MMLU, MT-bench, forgetting
  fedlora generate MODEL_OR_RUN     answers of the global model, a client's and the base's
  fedlora study STUDY               a grid of runs, one table with intervals
  fedlora VERB --help               more on a verb
  fedlora --version

Try:
  fedlora run --num_rounds 3 --method flora --output_dir out
  fedlora config > my.yaml          # edit it, then: fedlora run my.yaml
"""

HELP_RUN = """\
fedlora run [CONFIG.yaml] [--key value ...] [--json] [--dry_run]
fedlora run --resume DIR [--json]

Runs a federation: in every round the server sends the global model to the clients, each trains a
LoRA adapter of its own rank on its own rows, and the server combines them. Keys are those of
transformers, PEFT and TRL where they have one; `fedlora config` lists all. Lists are separated by
spaces. The command line goes over the file. Without a file the embedded default runs: a tiny Llama
and ten clients that come with the package. With data of your own and no file, every key that is
not given has the value that `fedlora config` shows.

  --resume DIR    go on with the run in DIR after its last whole round
  --json          one JSON object per event on standard output
  --dry_run       check everything and show what would be done; read no weights, write nothing

Examples:
  fedlora run --client_ranks 32 16 8 --num_clients 3 --output_dir out
  fedlora run --model_name_or_path path/or/hub-name --train_file 'site_*.jsonl' \\
      --eval_file held_out.jsonl --lora_target_modules q_proj v_proj --learning_rate 3e-4
  fedlora run --model_name_or_path an/encoder --train_file all.csv --label_column_name label \
      --partition dirichlet --partition_alpha 0.5 --num_clients 10    # a classifier

In DIR: config.yaml, metrics.jsonl, round-N/ and final/, which PeftModel.from_pretrained loads.
"""

HELP_CONFIG = """\
fedlora config [CONFIG.yaml | embedded] [--key value ...]

Prints every configuration key with its value (its default where none is given) and one line on
what it does. The output is a configuration file. `fedlora config embedded` prints the one that
`fedlora run` uses when it is given none.
"""

HELP_PARTITION = """\
fedlora partition [CONFIG.yaml] [--key value ...] [--by COLUMN] [--output FILE]

Shows who holds what: rows and ranks of every client, and how many rows of each value of a column
(the one divided by or a classifier's label, another with --by). FILE is a picture (.png .svg .pdf).

  --partition iid        equal parts at random (Flower: IidPartitioner)
  --partition dirichlet  each value of --partition_column in shares of Dirichlet(--partition_alpha)
                         (DirichletPartitioner)
  --partition column     a client for each value of --partition_column (NaturalIdPartitioner)
  --partition labels     --partition_labels_per_client values each (PathologicalPartitioner)
  --partition quantity   random rows, sizes from Dirichlet(--partition_alpha) or --partition_shares
  --train_file 'site_*'  one file per client, no partition

Examples:
  fedlora partition --train_file all.csv --partition dirichlet --partition_column topic \\
      --partition_alpha 0.1 --num_clients 8 --output who.png
"""

HELP_DATA = """\
fedlora data [CONFIG.yaml] [--key value ...] [--show N]

Shows the tokenised data: lengths, the share of tokens a loss is taken on, rows that are dropped and
why, and N samples (3 unless given) token by token, with those that are learnt in [brackets].

Templates (--template; auto takes the first whose columns are there):
  alpaca             instruction, input or context, output or response (Alpaca, Dolly, WizardLM)
  chat               messages, or ShareGPT's conversations, by the tokenizer's chat template
                     (--chat_template_path for another one; vicuna is built in)
  prompt_completion  prompt, completion
  text               text
  custom             --prompt_template 'Q: {question} A: ' --completion_template '{answer}'
  classification     --text_column_names, --label_column_name
"""

HELP_AGGREGATE = """\
fedlora aggregate DIR [DIR ...] --output DIR [--weights W ...] [--method METHOD]
                  [--rank R | --energy E] [--option value ...]

Combines PEFT LoRA directories of one base model, of whatever ranks, alphas and target modules, into
one: by default exactly their weighted sum. No base model is loaded. Ends with a table: the rank of
every layer in each adapter and in the result, and the relative error against the weighted sum.

  --weights 0.5 0.3 0.2   one for each adapter, normalised; without it all alike
  --method METHOD         METHODS_HERE
  --rank R                keep at most R singular directions of each layer
  --energy 0.99           keep the fewest that hold this share of the squared singular values

Example:
  fedlora aggregate hospital-a/ hospital-b/ --weights 3 1 --energy 0.99 --output both/

In Python:
  from fedlora import aggregate, load_adapter, save_adapter
  save_adapter("both", aggregate([load_adapter("hospital-a"), load_adapter("hospital-b")], [3, 1]))
"""

HELP_DEMO = """\
fedlora demo [--output_dir DIR] [--key value ...]

Runs exact, flora and zero_pad on ten clients of ranks 64 32 16 16 8 8 4 4 4 4, and every client
alone; ends with a table and a picture of exact match by round. Keys go to every run.
"""


def _methods() -> str:
    """The rules, a line each."""
    lines = []
    for name, rule in METHODS.items():
        ranks = "mixed ranks" if rule.mixed_ranks else "one rank"
        lines.append(f"  {name:<9} {rule.title}\n{'':12}{ranks}; exact when: {rule.exact_when}")
    return "Methods (--method):\n" + "\n".join(lines) + "\n"


def _one_shot() -> str:
    """The rules that need no shared start, wrapped for the help."""
    names = ", ".join(name for name, rule in METHODS.items() if rule.one_shot)
    return f"\n{' ' * 26}".join(textwrap.wrap(names, 70))


def run_verb(arguments: list[str]) -> int:
    """`fedlora run`."""
    as_json = take_flag(arguments, "--json")
    resume = take_value(arguments, "--resume", "the output directory of the run to go on with")
    if take_flag(arguments, "--dry_run") or take_flag(arguments, "--dry-run"):
        if resume is not None:
            raise InputError("--dry_run checks a run that has not begun; leave --resume out")
        return _dry_run(arguments)
    quiet_libraries()
    from fedlora.console import per_class, reporter
    from fedlora.engines.local import run

    config: Config | None = None
    if resume is None:
        config = Config(**settings(arguments, EMBEDDED))
    elif arguments:
        # Keys alone are held against the run's own configuration, a file against all of it.
        own = str(Path(resume) / "config.yaml")
        if not Path(own).is_file():
            raise InputError(f"--resume {resume}: nothing to resume; there is no config.yaml")
        config = Config(**settings(arguments, own))
    where = resume or (config.output_dir if config else "")
    try:
        with reporter(as_json) as report:
            result = run(config, resume=resume, report=report)
    except KeyboardInterrupt:
        if not (Path(where) / "config.yaml").is_file():
            print("\nstopped before anything was written", file=sys.stderr)
        else:
            print(
                "\nstopped; finished rounds are saved. Go on with: fedlora run --resume "
                + shlex.quote(where),
                file=sys.stderr,
            )
        return 130
    if not as_json:
        last = next(x for x in reversed(result.metrics) if x["event"] in ("round", "start"))
        shown = per_class(last.get("evaluation") or {})
        print("\n".join(shown), end="\n" if shown else "")
        end = result.metrics[-1]
        best = "" if end["best"] is None else f"; best: round {end['best']}"
        print(f"ended after round {end['round']}{best}; final/ holds round {end['final']}")
        own = "" if (result.final_dir / "adapter_config.json").exists() else "/client-*"
        print(f"final adapter: {result.final_dir}{own}  (PeftModel.from_pretrained loads it)")
    return 0


def _dry_run(arguments: list[str]) -> int:
    from rich.console import Console

    from fedlora.checkpoint import check_free
    from fedlora.setup import assemble
    from fedlora.views import show_plan

    quiet_libraries()
    config = Config(**settings(arguments, EMBEDDED))
    check_free(config.output_dir)
    show_plan(assemble(config, weights=False), Console())
    return 0


def partition_verb(arguments: list[str]) -> int:
    """`fedlora partition`."""
    by = take_value(arguments, "--by", "the column to count")
    output = take_value(arguments, "--output", "the picture to write")
    quiet_libraries()
    from rich.console import Console

    from fedlora.clients import check_overrides, client_ranks
    from fedlora.data import load_rows
    from fedlora.setup import resolve_paths
    from fedlora.views import check_picture, divide, draw_partition, show_partition

    picture = check_picture(output) if output else None
    config = resolve_paths(Config(**settings(arguments, EMBEDDED)))
    raw = load_rows(config)
    check_overrides(config, len(raw.clients))
    division = divide(config, raw, client_ranks(config, len(raw.clients)), by)
    show_partition(division, Console())
    if picture:
        draw_partition(division, picture)
        print(f"picture: {picture}")
    return 0


def data_verb(arguments: list[str]) -> int:
    """`fedlora data`."""
    show = take_value(arguments, "--show", "the number of samples to show") or "3"
    if not show.isdecimal():
        raise InputError(f"--show {show}: expected a number of samples")
    quiet_libraries()
    from rich.console import Console

    from fedlora.setup import resolve_paths, tokenized
    from fedlora.views import show_samples

    config = resolve_paths(Config(**settings(arguments, EMBEDDED)))
    _, tokenizer, data = tokenized(config)
    show_samples(data, tokenizer, config, int(show), Console())
    return 0


def aggregate_verb(arguments: list[str]) -> int:
    """`fedlora aggregate`."""
    first = next((i for i, x in enumerate(arguments) if x.startswith("--")), len(arguments))
    paths, given = arguments[:first], parse_overrides(arguments[first:])
    output = given.pop("output", None)
    if not paths or not isinstance(output, str):
        raise InputError("aggregate: give PEFT directories and --output DIR, a new directory")
    quiet_libraries()
    from rich.console import Console

    from fedlora.adapters import load_adapter
    from fedlora.merging import aggregate, check_options, check_output, save_adapter
    from fedlora.views import show_layers

    check_output(output)
    weights = given.pop("weights", None)
    if weights is True:
        raise InputError("--weights: give one for each adapter")
    weights = weights if isinstance(weights, list) or weights is None else [weights]
    method = given.pop("method", "exact")
    keys: dict[str, Any] = {"method": method if isinstance(method, str) else "(none given)"}
    check_options(keys["method"], [key for key in given if key not in ("rank", "energy")])
    for key, value in given.items():
        if value is True:
            raise InputError(f"--{key}: give a number")
        keys[key] = None if value is None else number(key, value)
    whole = keys.get("rank")
    if whole is not None and not float(whole).is_integer():
        raise InputError(f"rank: {whole} is no whole number")
    keys["rank"] = None if whole is None else int(whole)
    merged = aggregate(
        [load_adapter(path) for path in paths],
        None if weights is None else [number("weights", w) for w in weights],
        **keys,
    )
    save_adapter(output, merged)
    show_layers(merged, paths, Console())
    print(f"written and read back: {output}")
    return 0


def number(key: str, text: Any) -> float:
    """A number from the command line.

    Raises:
        InputError: it is none.
    """
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"{key}: {text!r} is no number") from None


def config_verb(arguments: list[str]) -> int:
    """`fedlora config`."""
    print(Config(**settings(arguments, None)).to_yaml(comments=True), end="")
    return 0


def demo_verb(arguments: list[str]) -> int:
    """`fedlora demo`."""
    quiet_libraries()
    from fedlora.showcase import demo

    demo(parse_overrides(arguments))
    return 0


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (run_verb, f"{HELP_RUN}\n{_methods()}"),
    "partition": (partition_verb, HELP_PARTITION),
    "data": (data_verb, HELP_DATA),
    "aggregate": (aggregate_verb, HELP_AGGREGATE.replace("METHODS_HERE", _one_shot())),
    "config": (config_verb, HELP_CONFIG),
    "demo": (demo_verb, HELP_DEMO),
}
ELSEWHERE = {
    "eval": "fedlora.assess.eval_verb",
    "generate": "fedlora.assess.generate_verb",
    "study": "fedlora.study.verb",
    "report": "fedlora.report.verb",
    "watch": "fedlora.watch",
}
"""Verbs with a module of their own, which has `HELP` and `verb(arguments) -> exit code`."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"fedlora {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    known = [*VERBS, *ELSEWHERE]
    if verb not in known:
        close = difflib.get_close_matches(verb, known, n=1)
        raise InputError(
            f"{verb}: no such verb; "
            + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")
        )
    function: Callable[[list[str]], int]
    if verb in ELSEWHERE:
        module = import_module(ELSEWHERE[verb])
        function, help_text = module.verb, module.HELP
    else:
        function, help_text = VERBS[verb]
    if {"-h", "--help"} & set(rest):
        print(help_text, end="")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal ends a run as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # but for nohup
            signal.signal(number, _interrupt)
    return function(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 a mistake in the input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
