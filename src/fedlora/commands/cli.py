"""Reads the command `fedlora` and calls the functions that a Python user calls too."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from types import FrameType

from fedlora import __version__
from fedlora.commands import VERBS
from fedlora.commands.json_lines import Emit, only_json
from fedlora.config.arguments import take_flag
from fedlora.errors import FedloraError, InputError

HELP = f"""\
fedlora {__version__}: federated fine-tuning of language models with LoRA adapters of different rank

  fedlora demo                      ten clients of ranks 64 to 4, two methods, one table (minutes)
  fedlora run [CONFIG.yaml] [--key value ...]
                                    run a federation; without CONFIG.yaml, the embedded default
  fedlora run --resume DIR          go on with a run that was interrupted
  fedlora run CONFIG.yaml --dry_run check a configuration: model, data, ranks; read no weights
  fedlora plan [CONFIG.yaml]        memory, bytes, disk and time of a run, before it is begun
  fedlora partition [CONFIG.yaml]   who holds what: a table and bars, a picture with --output
  fedlora data [CONFIG.yaml]        samples token by token, and which of them are learnt
  fedlora aggregate A/ B/ --output C/
                                    adapters of any ranks become one, or their overlap
  fedlora export RUN_OR_ADAPTER     take the model away: an adapter of one rank, merged, GGUF
  fedlora config [CONFIG.yaml] [--key value ...]
                                    every key, its value and one line on what it does
  fedlora watch DIR                 look at a run that goes on elsewhere
  fedlora status DIR                where a run stands, and every client's part in it
  fedlora report DIR [DIR ...]      runs become one page: report.html
  fedlora eval MODEL_OR_RUN         lm-evaluation-harness, MMLU, MT-bench, forgetting
  fedlora generate MODEL_OR_RUN     answers of the global model, a client's and the base's
  fedlora chat RUN_OR_ADAPTER       a conversation with it in the terminal
  fedlora study STUDY               a grid of runs, one table with intervals
  fedlora worker --site SITE.yaml   one site of a federation, whose rows stay where they are
  fedlora deploy ENGINE FEDERATION.yaml
                                    a folder for every participant, with keys and settings
  fedlora doctor                    is this machine ready: libraries, device, memory, disk
  fedlora completion SHELL          completion for bash, zsh and fish
  fedlora VERB --help               more on a verb; --json: any verb's output for programs
  fedlora --version

Try:
  fedlora run --num_rounds 3 --method flora --output_dir out
  fedlora config > my.yaml          # edit it, then: fedlora run my.yaml
"""


WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of torch that wait for another one sleep. By default they keep their cores busy, and so
that other one from its core: beside one busy program a run would take many times as long."""


def let_waiting_threads_sleep() -> None:
    """Set `WAITING` unless the user has said how threads wait; torch reads it when it is loaded."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ.update(WAITING)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _dispatch(arguments: list[str], emit: Emit | None) -> int:
    """Do what the arguments ask for: help, the version, or a verb; gives the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        if emit:
            emit({"fedlora": __version__})
        else:
            print(f"fedlora {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise InputError(
            f"{verb}: no such verb; "
            + (f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}")
        )
    module = import_module(VERBS[verb])
    if {"-h", "--help"} & set(rest):
        print(module.HELP, end="")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal ends a run as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # but for nohup
            signal.signal(number, _interrupt)
    code: int = module.verb(rest, emit)
    return code


def _told(arguments: list[str], emit: Emit | None) -> int:
    """The exit code; an error is said to the person, and to the program if one looks on."""
    try:
        return _dispatch(arguments, emit)
    except FedloraError as error:
        if emit:
            emit({"event": "error", "message": str(error)})
        print(f"fedlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:  # a mistake of ours; its traceback follows
        if emit:
            emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 a mistake in the input, 130 interrupted.

    1 is for what the verb itself reports: failed runs of a study, a problem that `doctor` found.
    """
    let_waiting_threads_sleep()
    arguments = list(sys.argv[1:] if argv is None else argv)
    asks_for_help = arguments[:1] in ([], ["help"]) or {"-h", "--help"} & set(arguments)
    as_json = take_flag(arguments, "--json") and not asks_for_help
    try:
        with only_json() if as_json else nullcontext() as emit:
            code = _told(arguments, emit)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
