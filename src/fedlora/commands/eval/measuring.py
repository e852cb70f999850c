"""Holds what every measure of one `fedlora eval` shares: models by name, settings, what is said."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fedlora.commands.eval.models import Models
from fedlora.commands.eval.request import Options
from fedlora.commands.eval.results import Results
from fedlora.commands.eval.subject import Subject


@dataclass(frozen=True)
class Measuring:
    """What is measured in one call, how, and where it is told.

    Args:
        subject: the run, adapters or model that is evaluated.
        options: what is asked for.
        results: where scores are kept.
        console: where sentences and spinners go.
        batch_size: rows at once.
        models_on_rows: names of the models evaluated on the run's own rows, those of clients among
            them.
        models_elsewhere: names of the models measured on everything else. Clients' own models are
            among them only where they are named, or where the run keeps no other.
    """

    subject: Subject
    options: Options
    results: Results
    console: Console
    batch_size: int
    models_on_rows: Sequence[str]
    models_elsewhere: Sequence[str]

    def settings(self, models: Models, **others: Any) -> dict[str, Any]:
        """What a result is kept with: how the model was loaded, and the measure's own settings."""
        return {"dtype": models.dtype, "batch_size": self.batch_size, **others}

    @contextmanager
    def saying(self, sentence: str, bars: bool = False) -> Iterator[None]:
        """Show a sentence while something goes on.

        Args:
            sentence: what goes on.
            bars: it draws progress bars of its own. The sentence then stays on the screen, as it
                does where there is no terminal; otherwise it goes when the work is done.
        """
        if self.console.is_terminal and not self.console.is_dumb_terminal and not bars:
            with self.console.status(sentence):
                yield
        else:
            print(f"{sentence} ...", file=sys.stderr, flush=True)
            yield

    def say(self, text: str) -> None:
        """A sentence that stays, printed as it is."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def prepare(subject: Subject, options: Options, results: Results, console: Console) -> Measuring:
    """Settle what is measured on which models, before anything is loaded.

    Raises:
        InputError: a model is asked for that is not there.
    """
    of_subject = subject.config.per_device_eval_batch_size if subject.of_a_run else 8
    wanted, names = options.loading.models, subject.models
    shared = [name for name in names if name not in subject.clients]
    return Measuring(
        subject,
        options,
        results,
        console,
        batch_size=options.batch_size or of_subject,
        models_on_rows=subject.chosen(wanted, names),
        models_elsewhere=subject.chosen(wanted, shared if len(shared) > 1 else names),
    )
