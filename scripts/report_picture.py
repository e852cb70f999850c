"""The README's picture of a report, docs/report.png: its top, in headless Chromium.

    .venv/bin/python scripts/report_picture.py [RUN ...] [--output docs/report.png]

Without runs it makes some: three methods with two seeds of the embedded default (minutes). Chromium
and its driver come from the system's packages chromium and chromium-driver, selenium with the extra
`dev`.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedlora.config.arguments import take_value
from fedlora.errors import FedloraError, InputError

SIZE = (1240, 860)
METHODS = ("exact", "flora", "zero_pad")
SEEDS = (42, 43)


def make_runs(root: Path) -> list[str]:
    """Runs of the embedded default below `root`."""
    import fedlora
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG

    out = []
    for method in METHODS:
        for seed in SEEDS:
            where = str(root / f"{method}-{seed}")
            own = {
                "method": method,
                "seed": seed,
                "client_eval_fraction": 0.15,
                "output_dir": where,
            }
            print(f"{method}, seed {seed}", flush=True)
            fedlora.run(fedlora.Config(**layered(read_yaml(CONFIG), own)))
            out.append(where)
    return out


def chromium(profile: str) -> Any:
    """Headless Chromium.

    Raises:
        InputError: it, its driver or selenium is not installed.
    """
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        raise InputError("install the system's packages chromium and chromium-driver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        raise InputError("selenium is not installed: pip install selenium") from None
    options = Options()
    options.binary_location = binary
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(driver))


def picture(page: Path, output: Path) -> None:
    """The top of a page as a PNG file."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as profile:
        browser = chromium(profile)
        try:
            size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1.25, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.resolve().as_uri())
            end = browser.execute_script(
                "return document.getElementById('quality-0').getBoundingClientRect().bottom"
            )
            clip = {"x": 0, "y": 0, "width": SIZE[0], "height": end + 16, "scale": 1}
            wanted = {"format": "png", "captureBeyondViewport": True, "clip": clip}
            taken = browser.execute_cdp_cmd("Page.captureScreenshot", wanted)
        finally:
            browser.quit()
    output.write_bytes(base64.b64decode(taken["data"]))
    # A page has few colours: a palette makes the file a third as large, and no eye sees it.
    with Image.open(output) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


def main(arguments: list[str]) -> int:
    """Write the picture; exit code 2 for what a user can mend."""
    from fedlora.commands.report.verb import verb

    try:
        output = Path(take_value(arguments, "--output", "the picture to write") or _default())
        with tempfile.TemporaryDirectory() as place:
            page = Path(place) / "report.html"
            verb([*(arguments or make_runs(Path(place))), "--output", str(page)])
            picture(page, output)
    except FedloraError as error:
        print(f"report_picture: {error}", file=sys.stderr)
        return 2
    print(f"written: {output}")
    return 0


def _default() -> str:
    return str(Path(__file__).resolve().parent.parent / "docs" / "report.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
