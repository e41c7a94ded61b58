"""Draws docs/report-*.webp from the report of a run: `python -m docs.make_screenshots runs/demo`.

Needs playwright and Chromium.
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
DESKTOP = {"viewport": {"width": 1280, "height": 1000}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PICTURES = {  # name: (window, selector of what is at its top)
    "desktop": (DESKTOP | {"color_scheme": "light"}, "html"),
    "phone": (PHONE | {"color_scheme": "light"}, "html"),
    "dark": (DESKTOP | {"color_scheme": "dark"}, "#map-0"),
}


def main() -> None:
    report = Path(sys.argv[1]).resolve() / "report.html"
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (window, top) in PICTURES.items():
            page = browser.new_page(**window)
            page.goto(report.as_uri())
            page.wait_for_selector("html[data-ready=yes]", state="attached")
            page.locator(top).first.evaluate("(element) => element.scrollIntoView()")
            page.wait_for_timeout(500)  # figures are drawn when they become visible
            picture = Image.open(BytesIO(page.screenshot()))
            picture.save(DOCS / f"report-{name}.webp", quality=80, method=6)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
