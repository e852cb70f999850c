"""The documentation: pages from the code are complete, examples run as written, nothing is loaded.

What the pages say of keys, verbs and files is held to the code; the tutorial is run from its first
command to its last; the built site loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import fedlora
from fedlora import METHODS, Config
from fedlora.commands import VERBS
from fedlora.commands.cli import main
from fedlora.config.sources import parse_overrides
from fedlora.errors import InputError
from fedlora.methods import rule_keys
from support.methods_doc import from_file
from support.paths import REPOSITORY
from support.rows import write_jsonl

DOCS = REPOSITORY / "docs"


PAGES = from_file("docs_pages", REPOSITORY / "scripts" / "docs_pages.py")


WRITTEN = [*sorted(DOCS.rglob("*.md")), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]


VERB_ONLY = {"--help", "--version"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its title and its text."""

    language: str
    title: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.finditer(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", page.read_text(), re.M | re.S)
    out = []
    for block in found:
        title = re.search(r'title="([^"]*)"', block[3])
        lines = [line.removeprefix(block[1]) for line in block[4].splitlines()]
        out.append(Block(block[2], title[1] if title else "", "\n".join(lines) + "\n"))
    return [block for block in out if not languages or block.language in languages]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `fedlora ...` in the shell blocks of a page."""
    out = []
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "fedlora":
                end = next((i for i, word in enumerate(words) if word in (">", "|")), len(words))
                out.append(words[1:end])
    return out


@pytest.mark.parametrize("module", [path.as_posix() for path in PAGES.modules()])
def test_a_module_begins_with_one_sentence_that_says_what_it_does(module: str) -> None:
    """The module is the subject and the first word the verb: *Divides one data set among ...*"""
    line = PAGES.first_line(Path(module))
    assert re.match(r"[A-Z][a-z-]+s,? ", line), f"{module}: begin with what it does: {line!r}"
    assert line.endswith("."), f"{module}: the first line is no whole sentence: {line!r}"
    assert len(line.split()) >= 4


def test_the_page_of_files_has_every_file() -> None:
    page = PAGES.files()
    found = {path for path in PAGES.PACKAGE.rglob("*") if path.is_file()}
    found = {path for path in found if "__pycache__" not in path.parts}
    assert len(found) > 100
    sections = {
        part.partition("{")[0].strip(" /"): part for part in page.split("\n## ") if "{" in part
    }
    for path in found:
        where = path.parent.relative_to(PAGES.PACKAGE.parent).as_posix()
        if path.name == "__init__.py":
            assert PAGES.first_line(path.relative_to(PAGES.PACKAGE)) in sections[where]
        elif path.suffix == ".py":
            assert f"| `{path.name}` | " in sections[where]
        else:
            folder = path.parent.relative_to(PAGES.PACKAGE).as_posix()
            row = next(line for line in page.splitlines() if line.startswith(f"| `{folder}/` |"))
            assert f"`{path.name}`" in row


def test_every_key_has_its_row() -> None:
    page = PAGES.configuration()
    for key, field in Config.model_fields.items():
        if key == "method_options":
            continue
        (row,) = re.findall(rf'^\| <span id="{key}"></span>`{key}` \| .*$', page, re.M)
        assert str(field.description).split("|")[0].split("<")[0].split("'")[0] in row
        assert row.count(" | ") == 3, row
    for name, rule in METHODS.items():
        for option in rule.options.__dataclass_fields__:
            (row,) = re.findall(rf"^\| `{name}` \| `{option}` \| .*$", page, re.M)
            assert not row.endswith("|  |"), f"{option} is not described"


def test_every_key_stands_in_one_group() -> None:
    groups = PAGES.groups()
    listed = [key for keys in groups.values() for key in keys]
    assert listed == list(Config.model_fields)
    assert {"model", "LoRA", "data", "federation"} <= set(groups)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("num_rounds", "whole number"),
        ("dtype", "`auto`, `float32`, `bfloat16`, `float16`"),
        ("client_ranks", "whole number or list of whole number or `auto` or none"),
        ("use_rslora", "true or false"),
        ("client_overrides", "mapping or text or none"),
    ],
)
def test_a_type_is_said_in_words(key: str, words: str) -> None:
    assert PAGES.type_in_words(Config.model_fields[key].annotation) == words


def test_the_command_line_has_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(PAGES.verbs()) == set(VERBS)
    page = PAGES.commands()
    for verb in PAGES.verbs():
        main([verb, "--help"])
        assert f"## fedlora {verb}\n\n```text\n{capsys.readouterr().out}```\n" in page


def test_the_python_page_has_every_public_name() -> None:
    named = re.findall(r"^::: fedlora\.(\w+)$", PAGES.python(), re.M)
    assert sorted(named) == sorted(fedlora.__all__)


def test_the_examples_page_has_every_example() -> None:
    page = PAGES.examples()
    for path in (REPOSITORY / "examples").rglob("*.yaml"):
        assert path.read_text() in page


def test_the_figure_has_every_layer_in_order() -> None:
    figure = PAGES.house()
    drawn = re.findall(r"<b>([^<]+)</b> <span>(.*?)</span>", figure)
    assert [name for name, _ in drawn][:3] == ["__main__.py", "commands/", "engines/"]
    assert all(line for _, line in drawn)


def test_one_contract_of_many_rooms_is_drawn_too() -> None:
    """As import-linter writes an exhaustive contract: relative names, siblings, optional layers."""
    contract = {
        "name": "the house",
        "type": "layers",
        "containers": ["fedlora"],
        "exhaustive": True,
        "layers": ["__main__", "engines", "(federation) | methods : data", "lowrank"],
    }
    rows = re.findall(r"<li>(.*)</li>", PAGES.drawn(contract))
    rooms = [re.findall(r"<b>([^<]+)</b>", row) for row in rows]
    assert rooms == [
        ["__main__.py"],
        ["engines/"],
        ["federation/", "methods/", "data/"],
        ["lowrank/"],
    ]


@pytest.mark.parametrize(
    ("text", "page", "wanted"),
    [
        ("[a](../benchmarks/results/round.md)", "performance.md", "[a](results/round.md)"),
        ("[a](\n../benchmarks/results/x.md)", "studies.md", "[a](\nresults/x.md)"),
        ("![a](../../docs/report.png)", "guides/report.md", "![a](../report.png)"),
        ("[a](../log.md#threads)", "guides/data.md", "[a](../log.md#threads)"),
        ("[a](https://x.org/a.md)", "log.md", "[a](https://x.org/a.md)"),
        ("[a](#here)", "log.md", "[a](#here)"),
        ("```python\nx[0](../README.md)\n```\n", "log.md", "```python\nx[0](../README.md)\n```\n"),
        (
            "[a](../../examples/paper/dolly.yaml)",
            "guides/data.md",
            "[a](../reference/examples.md#examples-paper-dolly-yaml)",
        ),
        ("[a](../src/fedlora/errors.py)", "design.md", "[a](reference/files.md)"),
    ],
)
def test_links_of_the_repository_lead_into_the_site(text: str, page: str, wanted: str) -> None:
    folder = os.path.dirname(f"docs/{page}")
    assert PAGES.relinked(text, folder, page) == wanted


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    """Who reads the pages where they lie, not in the site, follows the same links."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(\s*([^)\s#]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_guides_show_every_verb() -> None:
    assert sum(len(commands(page)) for page in WRITTEN) > 30
    text = " ".join(page.read_text() for page in WRITTEN if page.parent.name != "reference")
    assert {verb for verb in VERBS if f"fedlora {verb}" not in text} == set()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_commands_name_what_there_is(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb and every option is known, every value of a key is possible."""
    keys = set(Config.model_fields) | rule_keys()
    for verb, *rest in commands(page):
        assert main([verb, "--help"]) == 0
        own = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
        flags = {word for word in rest if word.startswith("--")}
        assert {flag for flag in flags if flag not in own and flag[2:] not in keys} == set(), rest
        if verb in ("run", "data", "config"):
            tail = rest if not rest or rest[0].startswith("--") else rest[1:]
            given = parse_overrides(tail)
            Config(**{key: value for key, value in given.items() if key in keys})


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_settings_on_the_pages_are_possible(page: Path, tmp_path: Path) -> None:
    from fedlora.commands.study.load import load_study

    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block.text)
        if "parts" in values:
            path = tmp_path / "study.yaml"
            path.write_text(block.text)
            assert load_study(str(path))
        else:
            Config(**values)
    if page.parent.name == "guides" and page.name != "studies.md":
        for inline in re.findall(r"`([a-z_]+: [^`]+)`", page.read_text()):
            Config(**yaml.safe_load(inline))


def run_python(code: str, names: dict[str, Any], **words: Path) -> None:
    """A block of Python as it stands, with paths in the place of what a reader has to fill in."""
    for word, path in words.items():
        code = code.replace(f'"{word.replace("__", "/").replace("_", "-")}"', f'"{path}"')
    exec(compile(code, "a page", "exec"), names)


@pytest.fixture
def three_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the guides speak of."""
    for site in "abc":
        rows = [{"prompt": f"{site}{i}>", "completion": str(i)} for i in range(12)]
        write_jsonl(tmp_path / f"site_{site}.jsonl", rows)
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "a1>", "completion": "1"}] * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_to_python_runs_as_written(
    three_sites: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "a page"}
    for block in blocks(DOCS / "guides" / "python.md", "python"):
        run_python(block.text, names, path__or__hub_name=tiny_llama)
    assert list(names["result"].evaluations) == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert re.search(r"^3 \d+$", out, re.M)
    assert "q_proj" in out
    log = (three_sites / "own-training" / "metrics.jsonl").read_text().splitlines()
    clients = next(x for x in map(json.loads, log) if x["event"] == "round")["clients"]
    assert [client["rank"] for client in clients] == [16, 8, 4]

    merging = blocks(DOCS / "guides" / "merge.md", "python")
    for name in ("hospital-a", "hospital-b"):
        shutil.copytree(three_sites / "out" / "final", three_sites / name)
    run_python(merging[0].text, names)
    assert fedlora.load_adapter("both").deltas.keys() == names["result"].adapter.keys()

    loading = blocks(DOCS / "guides" / "simulate.md", "python")[1:]  # behind Flower Datasets
    run_python(loading[0].text, names, path__or__hub_name=tiny_llama)
    assert names["model"].peft_config["default"].base_model_name_or_path == str(tiny_llama)


@pytest.mark.usefixtures("three_sites")
def test_the_python_of_the_readme_runs_as_written(tiny_llama: Path) -> None:
    """What it shows of loading and merging is what the guides show, which is run above."""
    guides = [
        block for name in ("simulate", "merge") for block in blocks(DOCS / f"guides/{name}.md")
    ]
    loading, merging, running = blocks(REPOSITORY / "README.md", "python")
    assert loading in guides
    assert merging in guides
    names: dict[str, Any] = {}
    run_python(running.text, names, path__or__hub_name=tiny_llama)
    assert [line["round"] for line in names["result"].metrics if line["event"] == "round"] == [
        1,
        2,
        3,
    ]


def test_a_classifier_is_loaded_as_written(three_sites: Path, tiny_llama: Path) -> None:
    rows = [{"text": f"word {i}", "label": ["no", "yes"][i % 2]} for i in range(24)]
    write_jsonl(three_sites / "all.jsonl", rows)
    keys = {
        "model_name_or_path": str(tiny_llama),
        "train_file": "all.jsonl",
        "label_column_name": "label",
        "num_clients": 2,
        "num_rounds": 1,
        "max_steps": 1,
        "output_dir": "out",
    }
    fedlora.run(Config(**keys))
    names: dict[str, Any] = {}
    block = blocks(DOCS / "guides" / "simulate.md", "python")[2]
    run_python(block.text, names, path__or__hub_name=tiny_llama)
    assert names["model"].config.id2label == {0: "no", 1: "yes"}


def test_partitions_of_flower_datasets_are_taken_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package stands for itself by its names alone: it wants older libraries than these."""
    from datasets import Dataset

    class FederatedDataset:
        def __init__(self, dataset: str, partitioners: dict[str, Any]) -> None:
            self.partitioners = partitioners

        def load_partition(self, partition_id: int, split: str | None = None) -> Dataset:
            return Dataset.from_dict({"text": [f"word {partition_id}"] * 2, "label": [0, 1]})

    package, partitioner = ModuleType("flwr_datasets"), ModuleType("flwr_datasets.partitioner")
    package.FederatedDataset = FederatedDataset  # type: ignore[attr-defined]
    partitioner.ShardPartitioner = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_datasets", package)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", partitioner)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run_python(blocks(DOCS / "guides" / "simulate.md", "python")[0].text, names)
    assert names["config"].train_file == "parts/client-*.parquet"
    assert len(list(Path("parts").iterdir())) == 10


@pytest.mark.slow
def test_the_tutorial_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file, every command and every line of Python of the tutorial, in its order."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "getting-started.md"
    said: dict[str, str] = {}
    last = ""
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
            if block.title.endswith(".py"):
                run_python(block.text, {"__name__": "__main__"})
        elif block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line)
                if words[0] == "fedlora":
                    capsys.readouterr()
                    assert main(words[1:]) == 0, line
                    last = words[1] + (" --dry_run" if "--dry_run" in words else "")
                    said[last] = capsys.readouterr().out
        elif block.language == "python":
            capsys.readouterr()
            run_python(block.text, {})
            assert capsys.readouterr().out == "greet eve>hello eve\n"
        elif last == "data":
            assert said["data"].split() == block.text.split()
        elif last == "run":
            assert said["run"].splitlines()[:2] == block.text.splitlines()[:2]
            tables = [text.splitlines() for text in (said["run"], block.text)]
            rounds = [[x.split() for x in t if re.match(r" +\d ", x)] for t in tables]
            here, there = ([row[0] for row in table] for table in rounds)
            assert here == there == ["0", "1", "2", "3"]
            assert float(rounds[0][3][1]) < 0.2 * float(rounds[0][0][1])  # the loss
            assert float(rounds[0][3][5]) < 1e-5  # the aggregation error
        elif last == "generate":
            answers = [line.split() for line in said["generate"].splitlines()]
            for line in block.text.splitlines():
                assert line.split() in answers
            assert ["global", "hello", "eve"] in answers
    assert list(said) == ["data", "run --dry_run", "run", "generate", "report"]
    assert Path("greet.html").is_file()


class Loaded(HTMLParser):
    """Gathers what a page loads by itself, as against what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.classes.update(given.get("class", "").split())
        follows = tag == "a" or (
            tag == "link" and given.get("rel") in ("canonical", "next", "prev")
        )
        for name in ("src", "href", "srcset", "data", "poster"):
            if name in given and not follows:
                self.addresses.append(given[name])
        self.addresses += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: any warning is an error."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(REPOSITORY / "src")
    done = subprocess.run(build, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.addresses
        away = [x for x in loaded.addresses if re.match(r"([a-z]+:)?//", x)]
        assert not away, (page, away)
        assert "mermaid" not in loaded.classes  # the theme would load it from a CDN
    for sheet in site.rglob("*.css"):
        away = re.findall(
            r"(?:@import\s*|url\(\s*)['\"]?((?:https?:)?//[^)'\"]+)", sheet.read_text()
        )
        assert not away, (sheet, away)


@pytest.mark.slow
def test_nothing_is_left_to_be_filled_in(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "<!-- generated:" not in page.read_text(), page
    text = (site / "reference" / "configuration.html").read_text()
    assert all(f'id="{key}"' in text for key in Config.model_fields if key != "method_options")
    assert "ValueError" in (site / "reference" / "algebra.html").read_text()
    assert 'class="house"' in (site / "design.html").read_text()


@pytest.mark.slow
def test_the_site_reads_and_searches_from_the_disk(site: Path, tmp_path: Path) -> None:
    """In a real browser: nothing is asked of a network, no page is wider than a phone."""
    picture = from_file("report_picture", REPOSITORY / "scripts" / "report_picture.py")
    try:
        browser = picture.chromium(str(tmp_path / "profile"))
    except InputError as error:
        pytest.skip(str(error))
    asked = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    try:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for page in site.rglob("*.html"):
            browser.get(page.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
            assert {address.partition(":")[0] for address in browser.execute_script(asked)} <= {
                "file",
                "data",
            }
        browser.get((site / "guides" / "data.html").as_uri())
        browser.execute_script("document.querySelector('#__search').click()")
        box = browser.find_element("css selector", ".md-search__input")
        browser.execute_script("arguments[0].focus()", box)
        box.send_keys("proximal_mu")
        for _ in range(300):
            found = browser.find_elements("css selector", ".md-search-result__link")
            if found:
                break
            time.sleep(0.1)
        links = [link.get_attribute("href") for link in found]
        assert any("reference/configuration.html" in str(link) for link in links), links
    finally:
        browser.quit()
