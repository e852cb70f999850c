"""`fedlora report`'s page in headless Chromium, opened from the disk."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import classifying, lines_of, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


DRIVER = shutil.which("chromedriver")


missing = [
    name
    for name, found in (
        ("selenium (pip install selenium)", importlib.util.find_spec("selenium")),
        ("chromium (the system's package)", CHROMIUM),
        ("chromedriver (the system's package chromium-driver)", DRIVER),
    )
    if not found
]


pytestmark = pytest.mark.skipif(bool(missing), reason=f"there is no {', no '.join(missing)}")


ONE_RUN = (
    "data", "change", "error-total", "error-layers", "norm-layers", "spectrum-lines",
    "spectrum-rank", "bytes-rounds", "bytes-clients", "bytes-up", "bytes-down", "seconds",
    "privacy-plot",
)  # fmt: skip
"""Figures beside those of quality, which are numbered."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.html, many.html, big.html, old.html, empty.html, labels.html."""
    from fedlora.commands.report.verb import verb

    root = tmp_path_factory.mktemp("pages")
    write_run(root / "one", lines_of())
    for method in ("exact", "flora", "zero_pad"):
        for seed in (1, 2):
            lines = lines_of(method=method, seed=seed)
            write_run(root / "many" / f"{method}-{seed}", lines, seed=seed)
    write_run(root / "big", lines_of(clients=100, rounds=100, layers=32), final=False)
    write_run(root / "old", lines_of()[1:4], final=False)
    write_run(root / "empty", [], final=False)
    write_run(root / "labels", classifying(lines_of()))
    for name in ("one", "many", "big", "old", "empty", "labels"):
        verb([str(root / name), "--output", str(root / f"{name}.html")])
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield found
    found.quit()


@pytest.fixture
def show(browser: Any, pages: Path) -> Any:
    """Open a page at a size and in a mode, and hold it to having no complaint."""

    def open_page(name: str, width: int = 1280, **features: str) -> Any:
        size = {"width": width, "height": 860, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        emulated = [{"name": k.replace("_", "-"), "value": x} for k, x in features.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": emulated})
        browser.get((pages / f"{name}.html").as_uri())
        assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
        return browser

    yield open_page
    assert [entry["message"] for entry in browser.get_log("browser")] == []


MARKS = """
  // Shapes with colour inside the plot, and what they look like.
  const host = document.querySelector('#' + arguments[0] + ' .chart');
  const canvas = host.querySelector('canvas');
  if (canvas) {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add((data[i] << 16) + (data[i + 1] << 8) + data[i + 2]);
    return [...seen].map(String);
  }
  return [...host.querySelectorAll('svg path, svg rect')].map((x) => x.outerHTML);
"""  # noqa: E501


def marks(page: Any, figure: str) -> list[str]:
    """What is drawn in a figure."""
    found: list[str] = page.execute_script(MARKS, figure)
    return found


def figures(page: Any) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll('figure')].map((x) => x.id)"
    )
    return found


def test_one_run_draws_every_plot(show: Any) -> None:
    page = show("one")
    found = figures(page)
    assert set(ONE_RUN) <= set(found)
    assert sum(name.startswith("quality-") for name in found) == 7
    for name in found:
        assert len(marks(page, name)) > 5, name
    assert not page.find_elements("id", "missing")
    # Every cell of the heat maps, every point of a line.
    assert len(marks(page, "error-layers")) > 4 * 12
    assert len(marks(page, "data")) > 6 * 6


def test_first_screen_says_what_was_run(show: Any) -> None:
    page = show("one")
    facts = page.find_element("css selector", ".facts").text
    for text in ("LlamaForCausalLM", "812 K parameters", "exact", "2 × 32", "Exact match"):
        assert text in facts
    bottom = page.execute_script(
        "return document.querySelector('#data .chart').getBoundingClientRect().bottom"
    )
    assert bottom <= 860


def test_toggle_of_a_method_changes_every_plot_of_quality(show: Any) -> None:
    page = show("many")
    labels = page.find_elements("css selector", "#toggles label")
    assert [label.text for label in labels] == ["exact", "flora", "zero_pad"]
    names = [name for name in figures(page) if name.startswith("quality-")]
    before = {name: marks(page, name) for name in names}
    bands = page.execute_script(
        "return document.querySelectorAll('#quality-0 svg [fill-opacity], "
        "#quality-0 svg [opacity]').length"
    )
    assert bands >= 3
    labels[1].find_element("css selector", "input").click()
    for name in names:
        assert len(marks(page, name)) < len(before[name]), name
    labels[1].find_element("css selector", "input").click()
    assert {name: len(marks(page, name)) for name in names} == {
        name: len(before[name]) for name in names
    }


def test_all_methods_off_is_no_error(show: Any) -> None:
    page = show("many")
    for box in page.find_elements("css selector", "#toggles input"):
        box.click()
    assert marks(page, "quality-0") is not None


def test_log_scale_changes_the_axis(show: Any) -> None:
    page = show("many")
    loss = next(
        x for x in page.find_elements("css selector", "#quality figure")
        if x.find_element("css selector", "h3").text == "Loss"
    )  # fmt: skip
    before = loss.find_element("css selector", "svg").get_attribute("innerHTML")
    labels = page.find_elements("css selector", "#quality .controls label")
    next(x for x in labels if x.text == "log scale").find_element("css selector", "input").click()
    after = loss.find_element("css selector", "svg").get_attribute("innerHTML")
    assert before != after


def test_perplexity_starts_on_a_log_scale_until_another_is_chosen(show: Any) -> None:
    page = show("many")

    def ticks(title: str) -> list[str]:
        found: list[str] = page.execute_script(
            "const f = [...document.querySelectorAll('#quality figure')]"
            ".find((x) => x.querySelector('h3').textContent === arguments[0]);"
            "return [...f.querySelectorAll('svg text')].map((x) => x.textContent)",
            title,
        )
        return found

    box = page.execute_script(
        "return [...document.querySelectorAll('#quality > .controls label')]"
        ".find((x) => x.textContent === 'log scale').querySelector('input')"
    )
    assert {"1", "10", "100", "1000", "10000"} <= set(ticks("Perplexity"))
    assert "10" not in ticks("Perplexity on general text")
    assert box.get_property("indeterminate")
    box.click()  # all of them
    assert {"10", "100"} <= set(ticks("Perplexity on general text"))
    box.click()  # none
    assert "2000" in ticks("Perplexity")
    assert not box.get_property("indeterminate")


def test_choice_of_a_run_moves_every_part(show: Any) -> None:
    page = show("many")
    before = {name: marks(page, name) for name in ("data", "error-layers", "seconds", "change")}
    page.execute_script(
        "const s = document.querySelector('#error select'); s.value = '5';"
        "s.dispatchEvent(new Event('change'))"
    )
    chosen = page.execute_script(
        "return [...document.querySelectorAll('select.run-select')].map((x) => x.value)"
    )
    assert set(chosen) == {"5"}
    for name, drawn in before.items():
        assert marks(page, name) != drawn, name


def test_hover_shows_values(show: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = show("many")
    chart = page.find_element("css selector", "#quality-0 .chart")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(page).move_to_element(chart).perform()
    assert "round" in chart.text
    assert "exact" in chart.text
    assert "±" in chart.text


def test_tables_are_reached_by_keyboard_and_hold_the_numbers(show: Any, pages: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = show("one")
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element.get_attribute("class") == "skip"
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        figure = page.execute_script("return document.activeElement.closest('figure')?.id")
        if figure == "quality-0":
            break
    assert page.switch_to.active_element.tag_name == "summary"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    page.execute_async_script("setTimeout(arguments[0], 200)")
    rows = page.execute_script(
        "return [...document.querySelectorAll('#quality-0 tbody tr')]"
        ".map((x) => [...x.children].map((y) => y.textContent))"
    )
    lines = [json.loads(x) for x in (pages / "one" / "metrics.jsonl").read_text().splitlines()]
    written = [x["evaluation"]["exact_match"] for x in lines if "evaluation" in x]
    assert [row[0] for row in rows] == [str(i) for i in range(5)]
    assert [float(row[1]) for row in rows] == pytest.approx(written, rel=5.1e-6)
    caption = page.find_element("css selector", "#quality-0 caption").text
    assert "exact_match" in caption
    assert page.find_elements("css selector", "#quality-0 th[scope=row]")
    assert page.find_elements("css selector", "#quality-0 th[scope=col]")


def test_every_table_opens_and_every_drawing_has_a_name(show: Any) -> None:
    page = show("one")
    page.execute_script("document.querySelectorAll('details').forEach((x) => { x.open = true })")
    page.execute_async_script("setTimeout(arguments[0], 200)")
    found = page.execute_script(
        "return [...document.querySelectorAll('details.numbers')].map((x) => "
        "[x.querySelectorAll('tbody tr').length, x.querySelector('caption')?.textContent])"
    )
    assert len(found) > 15
    assert all(rows and caption for rows, caption in found)
    names = page.execute_script(
        "return [...document.querySelectorAll('.chart')].map((x) => "
        "[x.getAttribute('role'), x.getAttribute('aria-label')])"
    )
    assert all(role == "img" and name for role, name in names)
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map((x) => Number(x.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def luminance(colour: str) -> float:
    red, green, blue = (int(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_dark(show: Any) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = show("one", prefers_color_scheme=scheme)
        style = "return getComputedStyle(document.body)"
        colours[scheme] = (
            luminance(page.execute_script(f"{style}.backgroundColor")),
            luminance(page.execute_script(f"{style}.color")),
            "".join(marks(page, "quality-0")),
        )
    assert colours["light"][0] > 200 > 60 > colours["light"][1]
    assert colours["dark"][0] < 60 < 200 < colours["dark"][1]
    assert colours["light"][2] != colours["dark"][2]


def test_dark_comes_while_the_page_is_open(show: Any) -> None:
    page = show("one", prefers_color_scheme="light")
    before = marks(page, "quality-0")
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme})
    page.execute_async_script("setTimeout(arguments[0], 200)")
    assert marks(page, "quality-0") != before


@pytest.mark.parametrize("name", ["one", "many", "big", "old", "empty"])
def test_phone_is_not_scrolled_sideways(show: Any, name: str) -> None:
    page = show(name, width=375)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 375
    wide = page.execute_script(
        "return [...document.querySelectorAll('.chart svg, .chart canvas, h1, p, dd, select')]"
        ".filter((x) => x.getBoundingClientRect().right > 376).length"
    )
    assert wide == 0


def test_print_is_light_and_fits(show: Any, browser: Any) -> None:
    page = show("one", prefers_color_scheme="dark")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    widths = page.execute_script(
        "return [...document.querySelectorAll('.chart svg')]"
        ".map((x) => x.getBoundingClientRect().width)"
    )
    assert max(widths) <= 680
    assert luminance(page.execute_script("return getComputedStyle(document.body).color")) < 60
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    made = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(made["data"])
    assert 3 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20


def test_nothing_is_fetched(show: Any) -> None:
    page = show("one")
    page.get_log("performance")
    page.refresh()
    asked = [json.loads(x["message"])["message"] for x in page.get_log("performance")]
    urls = {
        x["params"]["request"]["url"].partition(":")[0]
        for x in asked
        if x["method"] == "Network.requestWillBeSent"
    }
    assert urls <= {"file", "data"}


def test_hundred_by_hundred(show: Any) -> None:
    page = show("big")
    for name in figures(page):
        assert len(marks(page, name)) > 5, name
    assert page.execute_script("return document.querySelectorAll('canvas').length") >= 3


def test_classifier_has_its_labels_and_what_was_rejected(show: Any) -> None:
    page = show("labels")
    said = page.find_element("id", "quality").text
    assert "Accuracy" in said
    assert "Macro F1" in said
    assert "<who> 0.5 0.25 0.333333 8" in said
    attendance = page.find_element("id", "attendance").text
    assert "its values are not finite" in attendance
    assert "client rank counted failed\n" in attendance  # and nothing else has happened
    assert "Not measured" in page.find_element("id", "clients").text


def test_old_unfinished_run_says_what_is_missing_and_shows_the_rest(show: Any) -> None:
    page = show("old")
    said = page.find_element("id", "missing").text
    assert "an older version" in said
    assert "not finished: 2 of 4 rounds" in said
    for name in ("data", "quality-0", "bytes-rounds", "seconds"):
        assert len(marks(page, name)) > 5, name
    assert "Bounds are not known" in page.find_element("id", "bytes").text


def test_empty_run_says_what_is_missing(show: Any) -> None:
    page = show("empty")
    assert "metrics.jsonl is empty" in page.find_element("id", "missing").text
    assert figures(page) == []
    assert "num_rounds" in page.find_element("id", "config").text
