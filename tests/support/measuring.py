"""Makes ready to measure a model as `fedlora eval` does, and reads what was said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.commands.eval.measuring import Measuring, prepare
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.request import Options
from fedlora.commands.eval.results import open_results
from fedlora.commands.eval.subject import find_subject


def measuring_of(
    model: str | Path, output_dir: Path, models: tuple[str, ...] = (), **asked: Any
) -> Measuring:
    """What measures share on a model, an adapter or a run; results go to the directory."""
    options = Options(Loading(str(model), models=models, use_cpu=True, num_threads=1), **asked)
    subject = find_subject(options.loading)
    results = open_results(subject, str(output_dir))
    return prepare(subject, options, results, Console(file=io.StringIO(), width=200))


def said(measuring: Measuring) -> str:
    """All that was printed to the console."""
    assert isinstance(measuring.console.file, io.StringIO)
    return measuring.console.file.getvalue()
