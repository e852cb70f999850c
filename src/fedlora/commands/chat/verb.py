"""Runs `fedlora chat`: a conversation with a run's model in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from fedlora.commands.eval.options import LOADING, MODEL_OR_RUN, Given
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.commands.chat.conversation import Conversation
    from fedlora.commands.eval.subject import Subject

HELP = """\
fedlora chat RUN_OR_ADAPTER [--round N] [--client K] [--key value ...] [--json]

A conversation with a run's global model, in the form it was trained on: the chat template, Alpaca's
prompt, or, for a run that learnt single prompts, each message by itself. RUN_OR_ADAPTER is what
fedlora generate takes: a run's directory (finished or not), its round-N/ or final/, any PEFT
directory, a model directory, a hub name, or embedded.

  --round N              a round of the run that is still there, instead of the final model
  --client K             the model of client K (save_client_models: true, or method fedsa)
  --system TEXT          what stands before the conversation
  --temperature T        draw words at this temperature; 0 (the default): the likeliest each time
  --seed N               of these draws (42)
  --max_new_tokens N     longest answer (256)
  --json                 an object for every answer: message, answer
  --base, --dtype, --use_cpu or --device cpu|cuda, --num_threads, --chat_template_path,
  --trust_remote_code    as with fedlora generate

  /reset    begin a new conversation
  /exit     end (Ctrl-D does too); Ctrl-C ends an answer

Where standard input is no terminal, every line of it is a message.

Examples:
  fedlora chat out
  fedlora chat out --round 2 --client 3 --temperature 0.7
  printf 'write backwards abc>\\n' | fedlora chat out
"""

SYNTAX = Syntax(
    {
        "client": Option("the model of this client"),
        "system": Option("what stands before the conversation"),
        "temperature": Option("of the draws; 0: the likeliest word each time"),
        "seed": Option("of the draws"),
        "max_new_tokens": Option("longest answer"),
        **LOADING,
    },
    MODEL_OR_RUN,
)

RESET, EXIT = "/reset", "/exit"


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora chat`."""
    given = Given("chat", arguments, SYNTAX.options)
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    import torch

    from fedlora.commands.chat.conversation import Conversation, style_of
    from fedlora.commands.eval.models import load_models, tokenizer_of
    from fedlora.commands.eval.subject import find_subject

    client, number = given.whole("client", 0), given.whole("max_new_tokens") or 256
    temperature, seed = _temperature(given.text("temperature")), given.whole("seed", 0)
    wanted = () if client is None else (f"client-{client}",)
    loading = given.loading(wanted)
    subject = find_subject(loading)
    if subject.classifies:
        raise InputError(
            f"{subject.name} is a classifier and writes no text; fedlora eval measures it"
        )
    name = _chosen(subject, wanted)
    tokenizer = tokenizer_of(subject)
    style = style_of(subject, tokenizer, loading.chat_template_path is not None)
    models = load_models(subject, [name], tokenizer)
    torch.manual_seed(42 if seed is None else seed)
    with models.using(name) as model:
        system = given.text("system") or ""
        talk = Conversation(model, tokenizer, style, models.context, number, system, temperature)
        if emit is None and sys.stdin.isatty():
            for note in subject.notes:
                print(f"note: {note}")
            print(f"{name} of {subject.name}; {style.name}")
            print(f"{RESET} begins anew, {EXIT} or Ctrl-D ends, Ctrl-C ends an answer")
            with _ended_by_signals():
                _talk_in_terminal(talk, name)
        else:
            _answer_lines(talk, emit)
    return 0


def _temperature(text: str | None) -> float:
    """The value of `--temperature`.

    Raises:
        InputError: it is no number of at least 0.
    """
    with suppress(ValueError):
        value = float(text or 0)
        if 0 <= value < float("inf"):
            return value
    raise InputError(f"--temperature: {text!r}: expected a number of at least 0")


def _chosen(subject: Subject, wanted: tuple[str, ...]) -> str:
    """The name of the model that is talked to.

    Raises:
        InputError: there is none of this name, or none for all clients.
    """
    shared = [name for name in subject.models if name not in subject.clients]
    if not wanted and subject.clients and len(shared) == 1:
        raise InputError(
            f"{subject.name}: every client has a model of its own and there is no global one; give "
            f"--client K, one of {', '.join(subject.clients)}"
        )
    return subject.chosen(wanted, shared[-1:])[0]


# --- talking ---


def _talk_in_terminal(talk: Conversation, name: str) -> None:
    """Ask for messages and answer them, until the person ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called back

    while True:
        try:
            message = input("you: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n({EXIT} or Ctrl-D ends)")
            continue
        if message == EXIT:
            return
        if message == RESET:
            talk.reset()
            print("(a new conversation)")
        elif message.startswith("/") and message[1:].isalpha():
            print(f"({message}: there are {RESET} and {EXIT})")
        elif message:
            _answer_in_terminal(talk, name, message)


def _answer_in_terminal(talk: Conversation, name: str, message: str) -> None:
    """Answer word by word; Ctrl-C ends the answer, a refusal is said and the talk goes on."""
    before = talk.forgotten
    print(f"{name}: ", end="", flush=True)
    try:
        talk.answer(message, lambda piece: print(piece, end="", flush=True))
        print()
    except KeyboardInterrupt:
        print(" (ended)")
    except InputError as error:
        print(f"({error})")
    if talk.forgotten > before:
        print("(the beginning of the conversation no longer fits, and is left out)")


def _answer_lines(talk: Conversation, emit: Emit | None) -> None:
    """Answer every line of standard input, as a program asks."""
    for line in sys.stdin:
        message = line.strip()
        if message == EXIT:
            return
        if message == RESET:
            talk.reset()
        elif message and emit:
            answer = talk.answer(message, lambda piece: None)
            emit({"event": "answer", "message": message, "answer": answer})
        elif message:
            talk.answer(message, lambda piece: print(piece, end="", flush=True))
            print(flush=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the program, where Ctrl-C ends an answer alone."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
