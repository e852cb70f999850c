"""Runs `fedlora report`: runs become one page, or pictures for a paper."""

from __future__ import annotations

import os
from pathlib import Path

from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, take
from fedlora.errors import InputError

FORMATS = ("html", "png", "pdf")

HELP = """\
fedlora report RUN [RUN ...] [--output report.html] [--format html,png,pdf] [--json]

Makes one page of runs: what was run, who held what, quality by round, every client before and
after, aggregation error by layer, singular values of the global update, bytes against their bounds,
time, privacy, the configuration and how to repeat it. The page is one file: it needs no network and
no server, reads in the dark, on a phone, in print and without colour, and has the numbers in a
table behind every plot. Open it with a browser.

RUN is the --output_dir of a run, or a directory that holds several. Runs that differ by their seed
alone become one line with a band (mean and standard deviation); others are named after what differs
between them. A run that is damaged, unfinished or empty is shown as far as it goes; the page says
what is missing. Numbers are those of metrics.jsonl to six significant digits.

  --output FILE       what to write: .html, .png or .pdf (report.html unless given); a file of that
                      name is replaced
  --format LIST       one or more of html, png, pdf, separated by commas; without it, the ending of
                      --output. All are named after --output: report.html, report.pdf with a page
                      per figure, and a PNG per figure, such as report-quality.png
  --json              one JSON object: the files written, and each run with what is wrong with it

Figures: data, quality, clients, error, spectrum, bytes, seconds, privacy; those of which the runs
have numbers.

Examples:
  fedlora report out                                     # report.html
  fedlora report runs/exact-1 runs/exact-2 runs/flora-1 runs/flora-2 --output both.html
  fedlora report fedlora-demo --output demo.html --format html,pdf
"""


SYNTAX = Syntax(
    {
        "output": Option("the file to write, such as report.html", path="file"),
        "format": Option(f"one or more of {','.join(FORMATS)}", values=FORMATS),
    },
    Option("output directories of runs", many=True, path="directory"),
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora report`.

    Raises:
        InputError: no run, an unknown option, or a file that cannot be written.
    """
    own = take(arguments, SYNTAX)
    output, named = own["output"], own["format"]
    for argument in arguments:
        if argument.startswith("-"):
            raise InputError(f"{argument}: report has no such option; see fedlora report --help")
    if not arguments:
        raise InputError("report: give the output directory of a run, or of several")
    file = check_output(output or "report.html")
    formats = check_formats(named, file)
    # Everything below loads torch; a mistyped option should not wait for it.
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from fedlora.commands.report.collect import collect
    from fedlora.commands.report.reading import find_runs, names_of, what_lacks
    from fedlora.commands.report.spectrum import read_spectrum
    from fedlora.commands.run_files import read_run

    paths = find_runs(arguments)
    runs = [read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    collected = collect(runs, [read_spectrum(path) for path in paths])
    written: list[Path] = []
    if "html" in formats:
        from fedlora.commands.report.page import render

        written.append(write(file.with_suffix(".html"), render(collected).encode()))
    if "png" in formats or "pdf" in formats:
        from fedlora.commands.report.figures import draw

        written += draw(collected, file, formats)
    if emit:
        described = [{"name": x.name, "path": str(x.path), "problems": what_lacks(x)} for x in runs]
        emit({"event": "report", "written": [str(path) for path in written], "runs": described})
        return 0
    for run in runs:
        for problem in what_lacks(run):
            print(f"{run.name}: {problem}")
    for path in written:
        print(f"written: {path}")
    return 0


def check_output(text: str) -> Path:
    """A file that can be written.

    Raises:
        InputError: another ending, a directory, or no directory to write it to.
    """
    file = Path(text)
    if file.suffix.lower().removeprefix(".") not in FORMATS:
        endings = ", ".join(f".{x}" for x in FORMATS)
        raise InputError(f"--output {text}: the name of a report ends in one of {endings}")
    if file.is_dir():
        raise InputError(f"--output {text}: is a directory; give a file in it")
    if not file.parent.is_dir():
        raise InputError(f"--output {text}: there is no directory {file.parent}; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"--output {text}: cannot be written; choose another place")
    return file


def check_formats(named: str | None, file: Path) -> list[str]:
    """What to write, in the order of `FORMATS`.

    Raises:
        InputError: something else than a format.
    """
    if named is None:
        return [file.suffix.lower().removeprefix(".")]
    wanted = [x.strip().lower() for x in named.split(",") if x.strip()]
    for one in wanted:
        if one not in FORMATS:
            raise InputError(f"--format {one}: expected one or more of {','.join(FORMATS)}")
    if not wanted:
        raise InputError(f"--format: give one or more of {','.join(FORMATS)}")
    return [x for x in FORMATS if x in wanted]


def write(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"--output {path}: cannot be written: {error.strerror}") from None
    return path
