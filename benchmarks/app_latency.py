"""How long after a stroke the new mask is on the screen: `scribbleseg app` in headless Chromium.

Photographs that scikit-image ships, at 500x375, one stroke a second, as a hand draws them. The page
says itself how long it took: from the end of the stroke until the mask is painted.

    python -m benchmarks.app_latency --strokes 40
"""

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from skimage import data

from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments, require
from scribbleseg.device import num_cores

# See tests/app/test_page.py.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn, and what sees it."""

    checkpoint: str = "released:best"
    """Checkpoint, run or released:NAME."""
    strokes: int = 40
    """Strokes that are drawn and timed (1 or more)."""
    seconds: float = 1.0
    """From one stroke to the next (0 or more)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.strokes >= 1, "strokes", self.strokes, "1 or more")
        require(self.seconds >= 0, "seconds", self.seconds, "0 or more")


def main() -> None:
    """Print a table."""
    given: Drawing = parse_arguments(Drawing, sys.argv[1:], prog="python -m benchmarks.app_latency")
    with tempfile.TemporaryDirectory() as scratch:
        write_photographs(Path(scratch) / "train" / "images")
        code = "from scribbleseg.cli import main; main()"
        line = [sys.executable, "-c", code, "app", "--checkpoint", given.checkpoint]
        server = subprocess.Popen(
            [*line, "--data", scratch, "--no-browse"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = next((said.strip() for said in server.stdout if said.startswith("http")), "")
            if not address:
                # The page has said why.
                sys.exit(server.wait())
            before = os.getloadavg()[0]
            found = measure(address, given.strokes, given.seconds)
            tell(found, before)
        finally:
            server.terminate()
            server.wait()


def write_photographs(folder: Path) -> None:
    """Write two photographs of 500x375."""
    folder.mkdir(parents=True)
    for name in ("astronaut", "coffee"):
        photograph = Image.fromarray(getattr(data, name)())
        photograph.resize((500, 375)).save(folder / f"{name}.png")


def measure(address: str, strokes: int, seconds: float) -> list[tuple[float, float]]:
    """Return, for each stroke, the whole time and the network's, in milliseconds."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        networks: list[float] = []
        page.on(
            "response",
            lambda answer: (
                networks.append(1000 * float(answer.headers["x-seconds"]))
                if "/mask?" in answer.url and answer.ok
                else None
            ),
        )
        page.goto(address)
        expect(page.locator("#badge")).to_have_text("untouched", timeout=60_000)
        generator = np.random.default_rng(0)
        found: list[tuple[float, float]] = []
        for number in range(strokes):
            if number == strokes // 2:
                page.keyboard.press("n")
                expect(page.locator("#badge")).to_have_text("untouched", timeout=60_000)
            began = time.monotonic()
            networks.clear()
            draw(page, generator, "left" if number % 2 == 0 else "right")
            shown = page.locator("#took:has-text('mask in')")
            shown.wait_for(timeout=60_000)
            whole = re.search(r"mask in (\d+) ms", shown.inner_text())
            assert whole is not None
            found.append((float(whole[1]), networks[0]))
            time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        browser.close()
    return found


def draw(page: Page, generator: np.random.Generator, button: str) -> None:
    """Draw a stroke of ten points: the object's in the middle, the background's along the side."""
    box = page.locator("#view").bounding_box()
    assert box is not None
    left = 0.45 if button == "left" else 0.25
    x = box["x"] + box["width"] * (left + generator.uniform(0, 0.05))
    y = box["y"] + box["height"] * generator.uniform(0.35, 0.6)
    page.mouse.move(x, y)
    page.mouse.down(button="left" if button == "left" else "right")
    page.mouse.move(x + 60, y + 40, steps=10)
    page.mouse.up(button="left" if button == "left" else "right")


def tell(found: list[tuple[float, float]], load: float) -> None:
    """Print the table."""
    sys.stdout.write(
        f"{len(found)} strokes at 500x375, {num_cores()} cores, load average {load:.1f} before "
        f"and {os.getloadavg()[0]:.1f} after\n\n"
        "| ms | median | p95 | least |\n| --- | --- | --- | --- |\n"
    )
    for name, column in (("stroke end to new mask", 0), ("of it the network", 1)):
        times = sorted(row[column] for row in found)
        late = times[math.ceil(0.95 * len(times)) - 1]
        middle = statistics.median(times)
        sys.stdout.write(f"| {name} | {middle:.0f} | {late:.0f} | {times[0]:.0f} |\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
