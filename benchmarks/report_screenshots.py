"""Pictures of a report page in headless Chromium: light, dark, phone, print.

    python benchmarks/report_screenshots.py RUN/report.html --output docs/images
    python benchmarks/report_screenshots.py RUN/report.html --only light dark-samples

Needs Debian's chromium and chromium-driver, and selenium.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
KINDS = ("light", "light-samples", "dark", "dark-samples", "phone", "phone-samples", "print")


@contextmanager
def browser(width: int, height: int, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A fresh Chromium with its own profile."""
    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = "/usr/bin/chromium"
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640},
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="report")
    parser.add_argument("--only", nargs="+", help="some of: " + ", ".join(KINDS), choices=KINDS, default=KINDS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    url = args.page.resolve().as_uri()
    for kind, width, height, dark in (
        ("light", 1280, 1000, False),
        ("dark", 1280, 1000, True),
        ("phone", 390, 1200, False),
    ):
        wanted = [name for name in args.only if name.startswith(kind) or (name, kind) == ("print", "light")]
        if not wanted:
            continue
        with browser(width, height, dark=dark) as driver:
            driver.get(url)
            if kind in wanted:
                driver.save_screenshot(str(args.output / f"{args.name}-{kind}.png"))
            samples = driver.execute_script("return !document.getElementById('samples').hidden")
            if samples and f"{kind}-samples" in wanted:
                driver.execute_script("document.getElementById('samples').scrollIntoView({behavior: 'instant'})")
                driver.save_screenshot(str(args.output / f"{args.name}-{kind}-samples.png"))
            if "print" in wanted:
                pdf = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
                (args.output / f"{args.name}-print.pdf").write_bytes(base64.b64decode(pdf["data"]))
    for path in sorted(args.output.glob(f"{args.name}-*")):
        print(path)


if __name__ == "__main__":
    main()
