"""Fills the pages of the documentation that come from the code; mkdocs calls this file as a hook.

A page under `docs/` holds a line `<!-- generated: NAME -->`, and what the function of that name
returns is put in its place while the site is built. So nothing generated is committed, and nothing
can go stale. Links to files of the repository are turned into links to their pages in the site.

    .venv/bin/python scripts/docs_pages.py configuration    # prints what a page is filled with
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import html
import importlib
import inspect
import io
import posixpath
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fedlora"
RESULTS = "benchmarks/results"
_MARK = re.compile(r"^<!-- generated: ([a-z_]+) -->$", re.MULTILINE)
_LINK = re.compile(r"(\]\(\s*)([^)\s#]+)(#[^)\s]*)?(\s*\))")
_FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2`*$", re.MULTILINE | re.DOTALL)


# --- the configuration ---


def groups() -> dict[str, list[str]]:
    """Keys by the headings (`# --- data ---`) they stand under in the source of `Config`."""
    from fedlora import Config

    out: dict[str, list[str]] = {}
    here = ""
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r" +# --- (.+) ---", line):
            here = heading[1]
        elif (key := re.match(r"    (\w+): ", line)) and key[1] in Config.model_fields:
            out.setdefault(here, []).append(key[1])
    return out


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def type_in_words(annotation: Any) -> str:
    """A type as a reader of the configuration says it: `int | None` is *whole number or none*."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        parts = [type_in_words(part) for part in arguments if part is not NoneType]
        return " or ".join([*parts, *(["none"] if NoneType in arguments else [])])
    if origin is list:
        return f"list of {type_in_words(arguments[0])}" if arguments else "list"
    if origin is dict:
        return "mapping"
    return _WORDS.get(annotation, "value")


def _limits(metadata: list[Any]) -> str:
    """The bounds of a field: *at least 1*."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{text} {getattr(bound, name):g}"
        for bound in metadata
        for name, text in words.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join(found)


def _cell(text: str) -> str:
    """Text that may stand in a cell of a table, `{` and `|` as they are."""
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    text = text.replace("\n...", "").strip()
    return "none" if value is None else f"`{_cell(text)}`"


def _described(**given: Any) -> dict[str, str]:
    """Key -> its one line, as `fedlora config` prints it."""
    from fedlora import Config

    lines = Config(**given).to_yaml(comments=True).splitlines()
    return {line.partition(":")[0]: line.partition(" # ")[2] for line in lines}


def configuration() -> str:
    """Tables of every configuration key, grouped, then the options of the rules."""
    from fedlora import METHODS, Config
    from fedlora.config.config import CLIENT_KEYS

    head = "| key | type | default | what it is |\n|---|---|---|---|\n"
    described = _described()
    out = []
    for group, keys in groups().items():
        out.append(f"\n## {group[:1].upper()}{group[1:]}\n\n{head}")
        for key in keys:
            if key == "method_options":
                continue  # its keys are written flat, and stand below
            field = Config.model_fields[key]
            kind = type_in_words(field.annotation)
            if limits := _limits(field.metadata):
                kind = f"{kind}; {limits}"
            own = " *(can be a client's own)*" if key in CLIENT_KEYS else ""
            name = f'<span id="{key}"></span>`{key}`'
            default = _shown(field.get_default(call_default_factory=True))
            line = _cell(html.escape(described[key], quote=False)) + own
            out.append(f"| {name} | {kind} | {default} | {line} |\n")
    out.append(
        "\n## Options of the rules\n\nThey are keys like all others, and belong to one `method`. "
        "A method without a line here has no options.\n\n"
        "| `method` | key | type | default | what it is |\n|---|---|---|---|---|\n"
    )
    for method, rule in METHODS.items():
        options = dataclasses.fields(rule.options)
        lines = _described(method=method) if options else {}
        hints = get_type_hints(rule.options)
        for f in options:
            kind = type_in_words(hints[f.name])
            line = _cell(html.escape(lines[f.name], quote=False))
            out.append(f"| `{method}` | `{f.name}` | {kind} | {_shown(f.default)} | {line} |\n")
    return "".join(out)


# --- the command line ---


def _said(*arguments: str) -> str:
    """What `fedlora ARGUMENTS` prints."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["fedlora"].partition(":")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        getattr(importlib.import_module(module), name)(list(arguments))
    return said.getvalue()


def verbs() -> list[str]:
    """The verbs that `fedlora --help` names, in its order."""
    found = re.findall(r"^  fedlora ([a-z]+)\b", _said("--help"), re.MULTILINE)
    return list(dict.fromkeys(found))


def commands() -> str:
    """`--help` of the program and of every verb."""
    out = [f"\n## fedlora\n\n```text\n{_said('--help')}```\n"]
    for verb in verbs():
        out.append(f"\n## fedlora {verb}\n\n```text\n{_said(verb, '--help')}```\n")
    return "".join(out)


# --- every file ---


def modules() -> Iterator[Path]:
    """The package's modules, below `src/fedlora`, each package's `__init__.py` first."""
    found = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return iter(sorted(found, key=lambda p: (p.parent.parts, p.name != "__init__.py", p.name)))


def first_line(module: Path) -> str:
    """The first line of a module's docstring, empty where there is none."""
    doc = ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
    return doc.splitlines()[0] if doc else ""


def files() -> str:
    """Every module with the first line of its docstring, by package; then what is no module."""
    out = []
    package: Path | None = None
    for module in modules():
        if module.parent != package:
            package = module.parent
            name = "fedlora" if package == Path() else f"fedlora/{package.as_posix()}"
            out.append(f'\n## {name}/ {{ id="{_anchor(package)}" }}\n\n')
            if module.name == "__init__.py":
                out.append(f"{first_line(module)}\n\n")
            out.append("| file | what it does |\n|---|---|\n")
        if module.name != "__init__.py":  # its line stands above the table
            out.append(
                f"| `{module.name}` | {_cell(html.escape(first_line(module), quote=False))} |\n"
            )
    out.append("\n## Files that are no modules\n\n| folder | files |\n|---|---|\n")
    for folder in sorted({path.parent for path in _assets()}):
        names = ", ".join(f"`{path.name}`" for path in _assets() if path.parent == folder)
        out.append(f"| `{folder.as_posix()}/` | {names} |\n")
    return "".join(out)


def _assets() -> list[Path]:
    found = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py")
    return sorted(p.relative_to(PACKAGE) for p in found if "__pycache__" not in p.parts)


def _anchor(package: Path) -> str:
    return "-".join(("fedlora", *package.parts))


# --- the figure of the layers ---


def house() -> str:
    """The order of imports as boxes, drawn from the contracts that `make lint` checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    return "".join(drawn(contract) for contract in contracts if contract["type"] == "layers")


def drawn(contract: dict[str, Any]) -> str:
    """One contract of layers: a row for each layer, the upper ones import the lower ones."""
    out = [f'\n<figure class="house">\n<figcaption>{html.escape(contract["name"])}</figcaption>\n']
    out.append("<ol>\n")
    inside = "".join(f"{name}." for name in contract.get("containers", [])[:1])
    for layer in contract["layers"]:
        rooms = [inside + room.strip(" ()") for room in re.split(r"[|:]", layer)]
        out.append(f"<li>{''.join(_room(room) for room in rooms)}</li>\n")
    return "".join(out) + "</ol>\n</figure>\n"


def _room(name: str) -> str:
    """A module or package of a layer with the first line of its docstring."""
    where = Path(*name.removeprefix("fedlora.").split("."))
    package = (PACKAGE / where).is_dir()
    module = where / "__init__.py" if package else where.with_suffix(".py")
    line = first_line(module) if (PACKAGE / module).is_file() else ""
    shown = f"{where.as_posix()}/" if package else module.as_posix()
    said = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(line, quote=False))
    return f"<div><b>{shown}</b> <span>{said}</span></div>"


# --- Python ---


def python() -> str:
    """A directive of mkdocstrings for everything in `fedlora.__all__`."""
    import fedlora

    names = sorted(fedlora.__all__, key=lambda name: (not name[0].islower(), name.lower()))
    # The keys of a configuration have a page of their own.
    no_members = "    options:\n      members: [alpha, of_client, flat, to_yaml]\n"
    return "".join(
        f"\n::: fedlora.{name}\n{no_members if name == 'Config' else ''}" for name in names
    )


# --- files of the repository that are pages of the site ---


def examples() -> str:
    """Every example configuration as it stands."""
    out = []
    for path in sorted((ROOT / "examples").rglob("*.yaml"), key=lambda p: (len(p.parts), p)):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        out.append(f'\n## {name} {{ id="{_slug(name)}" }}\n\n```yaml\n{text}```\n')
    return "".join(out)


def results() -> str:
    """A list of all tables that scripts under `benchmarks/` wrote."""
    out = []
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        out.append(f"- [{title}](../results/{path.name}) (`{path.name}`)\n")
    return "\n" + "".join(out)


def changelog() -> str:
    """CHANGELOG.md."""
    return _whole("CHANGELOG.md")


def contributing() -> str:
    """CONTRIBUTING.md."""
    return _whole("CONTRIBUTING.md")


def _whole(name: str) -> str:
    """A file of the repository's root without its title, which the page has."""
    return (ROOT / name).read_text(encoding="utf-8").partition("\n")[2]


def _slug(path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-")


GENERATED: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        configuration, commands, files, house, python, examples, results, changelog, contributing
    )
}  # fmt: skip
_AT_THE_ROOT = {"changelog", "contributing"}
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def in_site(path: str) -> str | None:
    """The page of the site for a file of the repository, None where the site has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{RESULTS}/"):
        return path.removeprefix("benchmarks/")
    if path == "examples" or path.startswith("examples/"):
        anchor = f"#{_slug(path)}" if path.endswith(".yaml") else ""
        return "reference/examples.md" + anchor
    if path.startswith("src/fedlora"):
        return "reference/files.md"
    return _PAGES.get(path)


def relinked(text: str, folder: str, page: str) -> str:
    """Text whose links to files of the repository lead to pages of the site.

    Args:
        text: Markdown; what stands in fenced code is left alone.
        folder: the folder of the repository that its links count from.
        page: the page it becomes a part of.
    """

    def link(found: re.Match[str]) -> str:
        before, target, anchor, after = found[1], found[2], found[3] or "", found[4]
        if re.match(r"[a-z]+:", target):
            return found[0]
        there = in_site(posixpath.normpath(posixpath.join(folder, target)))
        if there is None:
            return found[0]
        return before + posixpath.relpath(there, posixpath.dirname(page) or ".") + anchor + after

    out, end = [], 0
    for code in _FENCED.finditer(text):
        out += [_LINK.sub(link, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(out) + _LINK.sub(link, text[end:])


# --- called by mkdocs ---


def on_files(files: Any, *, config: Any) -> Any:
    """Adds what benchmarks measured to the pages."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / RESULTS).iterdir()):
        name = f"results/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Fills the marks of a page and leads its links to pages of the site."""
    name = page.file.src_uri
    folder = posixpath.dirname(f"docs/{name}")
    if name.startswith("results/"):
        folder = RESULTS

    def fill(found: re.Match[str]) -> str:
        text = GENERATED[found[1]]()
        return relinked(text, "" if found[1] in _AT_THE_ROOT else folder, name)

    return _MARK.sub(fill, relinked(markdown, folder, name))


def main(arguments: list[str]) -> int:
    """Print what a page is filled with."""
    if len(arguments) != 1 or arguments[0] not in GENERATED:
        print(f"docs_pages: name one of {', '.join(GENERATED)}", file=sys.stderr)
        return 2
    print(GENERATED[arguments[0]](), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
