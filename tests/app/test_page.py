"""The page in a real browser, without a window: Debian's chromium, driven by Playwright."""

import base64
import contextlib
import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright
from skimage import data

from scribbleseg import load
from scribbleseg.app.folder import Folder
from scribbleseg.app.models import Model, load_model
from scribbleseg.app.serve import listen
from scribbleseg.app.server import create_app
from scribbleseg.app.studio import Studio
from scribbleseg.datasets.scenes import list_scenes, read_mask, read_scribbles
from tests.app.conftest import stub

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing but the page is asked for.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The processor may be busy with other tests.
PATIENCE = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)"),
]


@contextlib.contextmanager
def serving(root: Path, main: Model, other: Model | None = None):
    """The app at work, in a thread; yields its address."""
    folder = Folder(root=root, split="train")
    folder.make()
    studio = Studio(folder, {"main": main} | ({"other": other} if other else {}))
    listener = listen("127.0.0.1", 0)
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(studio, hosts=[host]), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://{host}/"
    finally:
        server.should_exit = True
        thread.join()
        studio.close()
        listener.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new page; whatever its scripts fail at fails the test."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    context.close()
    assert failures == []


def drop(page: Page, name: str, content: bytes) -> None:
    """Drop a file on the page."""
    page.evaluate(
        """([name, text]) => {
            const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], name));
            document.body.dispatchEvent(
                new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
        }""",
        [name, base64.b64encode(content).decode()],
    )


def stroke(page: Page, *points: tuple[float, float], button: str = "left") -> None:
    """Draw a line through points given as shares of the canvas, and move off the canvas.

    Waits for the picture: with none on it, dragging only moves the canvas about.
    """
    expect(page.locator("#name")).not_to_be_empty()
    box = page.locator("#view").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down(button=button)
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up(button=button)
    page.mouse.move(box["x"] - 30, box["y"] + 200)


def picture(canvas: Locator) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))


def wait_for_picture(canvas: Locator, holds: Callable[[np.ndarray], object]) -> np.ndarray:
    """Wait until the picture is as expected; return it."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not holds(seen := picture(canvas)):
        assert time.monotonic() < deadline, "the picture is not as expected"
    return seen


def stored(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_from_a_dropped_photograph_to_an_accepted_mask(page, tmp_path):
    took, badge, view = page.locator("#took"), page.locator("#badge"), page.locator("#view")
    with serving(tmp_path / "drawn", load_model("released:best")) as address:
        page.goto(address)
        expect(page.locator("#empty")).to_be_visible()
        drop(page, "cat.png", stored(data.chelsea()))
        expect(badge).to_have_text("untouched")
        page.keyboard.press("s")
        bare = picture(view)

        stroke(page, (0.45, 0.4), (0.5, 0.5), (0.55, 0.6))
        expect(took).to_contain_text("refined")
        expect(badge).to_have_text("strokes saved")
        first = picture(view)
        assert (first != bare).any()

        stroke(page, (0.1, 0.2), (0.15, 0.6), button="right")
        expect(took).not_to_contain_text("refined")
        expect(took).to_contain_text("refined")
        both = picture(view)
        assert (both != first).any()

        page.keyboard.press("z")
        expect(took).not_to_contain_text("refined")
        expect(took).to_contain_text("refined")
        assert np.array_equal(picture(view), first)
        page.keyboard.press("y")
        expect(took).not_to_contain_text("refined")
        expect(took).to_contain_text("refined")
        assert np.array_equal(picture(view), both)

        page.keyboard.press("Enter")
        expect(badge).to_have_text("mask accepted")

    (scene,) = list_scenes(tmp_path / "drawn", "train", need_masks=True)
    strokes = read_scribbles(scene.scribbles)
    assert {0, 1, 255} == set(np.unique(strokes))
    mask = load("released:best").predict(data.chelsea(), strokes)
    assert np.array_equal(read_mask(scene.ground_truth), mask)

    # The server was killed; another one, and a reloaded page, find all of it.
    with serving(tmp_path / "drawn", stub("near")) as address:
        page.goto(address)
        expect(badge).to_have_text("mask accepted")
        expect(page.locator("#done")).to_have_text("1")
        page.keyboard.press("s")
        stroke(page, (0.3, 0.3), (0.35, 0.35))
        expect(badge).to_have_text("strokes changed since accepted")
        page.keyboard.press("z")
        expect(badge).to_have_text("mask accepted")
        expect(took).to_be_empty()
        page.reload()
        expect(badge).to_have_text("mask accepted")
        expect(page.locator("#redo")).to_be_enabled()
    assert np.array_equal(read_scribbles(scene.scribbles), strokes)


def test_a_second_tab_is_told_and_overwrites_nothing(page, root):
    with serving(root, stub("near")) as address:
        other = page.context.new_page()
        for tab in (page, other):
            tab.goto(f"{address}#photo_0")
            expect(tab.locator("#name")).to_contain_text("photo_0")
        stroke(page, (0.4, 0.4), (0.6, 0.4))
        expect(page.locator("#badge")).to_have_text("strokes saved")
        path = root / "train" / "scribbles" / "photo_0.png"
        before = path.read_bytes()
        other.bring_to_front()
        stroke(other, (0.4, 0.7), (0.6, 0.7))
        expect(other.locator("#message")).to_contain_text("another tab")
        assert path.read_bytes() == before
        other.keyboard.press("r")
        expect(other.locator("#badge")).to_have_text("strokes saved")
        stroke(other, (0.4, 0.7), (0.6, 0.7))
        expect(other.locator("#took")).to_contain_text("mask in")
        assert path.read_bytes() != before


def test_bad_files_are_told_in_the_page(page, tmp_path):
    with serving(tmp_path, stub("near")) as address:
        page.goto(address)
        drop(page, "notes.txt", b"no picture at all")
        expect(page.locator("#message")).to_contain_text("notes.txt: not such a picture")
        page.keyboard.press("Escape")
        expect(page.locator("#message")).to_be_hidden()


def test_two_checkpoints_side_by_side(page, root):
    with serving(root, stub("near", 10), stub("far", 40)) as address:
        page.goto(address)
        expect(page.locator("#badge")).to_have_text("untouched")
        expect(page.locator("#otherCaption")).to_have_text("far")
        page.keyboard.press("s")
        stroke(page, (0.4, 0.5), (0.6, 0.5))
        expect(page.locator("#took")).to_contain_text("refined")
        near, far = picture(page.locator("#view")), picture(page.locator("#otherView"))
        assert far.mean() > near.mean() + 1, "the larger mask leaves more of the picture bright"


def test_every_control_has_a_label_and_a_key(page, root):
    with serving(root, stub("near")) as address:
        page.goto(address)
        expect(page.locator("#name")).to_contain_text("photo")
        for control in page.locator("[data-command]:visible").all():
            keys = (control.get_attribute("data-keys") or "").split()
            assert keys, control.get_attribute("data-command")
            assert control.inner_text().strip()
        modes = {"x": "cutout", "p": "probabilities", "m": "mask", "o": "object", "e": "eraser"}
        for key, name in (modes | {"b": "background"}).items():
            page.keyboard.press(key)
            control = page.locator(f"[data-command={name}]")
            expect(control).to_have_attribute("aria-checked", "true")
        page.keyboard.press("]")
        expect(page.locator("#brushSize")).to_have_text("10")
        page.keyboard.press(",")
        expect(page.locator("#opacityValue")).to_have_text("60 %")
        fitted = picture(page.locator("#view"))
        page.keyboard.press("+")
        page.keyboard.press("ArrowLeft")
        wait_for_picture(page.locator("#view"), lambda seen: (seen != fitted).any())
        page.keyboard.press("0")
        wait_for_picture(page.locator("#view"), lambda seen: np.array_equal(seen, fitted))
        hint = page.locator("#hint")
        expect(hint).to_contain_text("Draw one stroke on the object")


def test_one_finger_draws_and_two_zoom(browser, root):
    context = browser.new_context(viewport={"width": 800, "height": 900}, has_touch=True)
    page = context.new_page()
    with serving(root, stub("near")) as address:
        page.goto(address)
        expect(page.locator("#badge")).to_have_text("untouched", timeout=PATIENCE)
        box = page.locator("#view").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = picture(page.locator("#view"))
        fingers = page.context.new_cdp_session(page)

        def touch(kind: str, *places: tuple[float, float]) -> None:
            points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", (x - 20, y))
        touch("touchStart", (x - 20, y), (x + 20, y))
        for apart in (40, 60, 80):
            touch("touchMove", (x - apart, y), (x + apart, y))
        touch("touchEnd")
        wait_for_picture(page.locator("#view"), lambda seen: (seen != before).any())
        # A stroke would be on its way.
        page.wait_for_timeout(300)
        assert not (root / "train" / "scribbles").exists()

        page.touchscreen.tap(x, y)
        expect(page.locator("#took")).to_contain_text("mask in", timeout=PATIENCE)
    context.close()
    assert len(list((root / "train" / "scribbles").iterdir())) == 1


def test_wheel_and_space_zoom_and_pan_without_drawing(page, root):
    with serving(root, stub("near")) as address:
        page.goto(address)
        expect(page.locator("#badge")).to_have_text("untouched")
        view = page.locator("#view")
        box = view.bounding_box()
        bare = picture(view)
        page.mouse.move(box["x"] + 300, box["y"] + 300)
        still = wait_for_picture(view, lambda seen: (seen != bare).any())
        page.mouse.wheel(0, -400)
        zoomed = wait_for_picture(view, lambda seen: (seen != still).any())
        page.keyboard.down(" ")
        page.mouse.down()
        page.mouse.move(box["x"] + 380, box["y"] + 350, steps=4)
        page.mouse.up()
        page.keyboard.up(" ")
        # The cursor alone must not make the difference.
        page.mouse.move(box["x"] + 300, box["y"] + 300)
        wait_for_picture(view, lambda seen: (seen != zoomed).any())
        # A stroke would be on its way.
        page.wait_for_timeout(200)
        assert not (root / "train" / "scribbles").exists()


def test_next_and_the_list_go_from_picture_to_picture(page, root):
    with serving(root, stub("near")) as address:
        page.goto(f"{address}#photo_1")
        name = page.locator("#name")
        expect(name).to_contain_text("photo_1")
        page.keyboard.press("k")
        expect(name).to_contain_text("photo_0")
        page.locator("#pictures button", has_text="photo_2").click()
        expect(name).to_contain_text("photo_2")
        stroke(page, (0.4, 0.4), (0.6, 0.4))
        expect(page.locator("#badge")).to_have_text("strokes saved")
        page.keyboard.press("Enter")
        expect(page.locator("#badge")).to_have_text("mask accepted")
        expect(page.locator("#done")).to_have_text("1")
        page.keyboard.press("n")
        expect(name).not_to_contain_text("photo_2")
        expect(page.locator("#badge")).to_have_text("untouched")


def test_keys_that_are_held_do_no_more_than_there_is(page, root):
    with serving(root, stub("near")) as address:
        page.goto(address)
        badge, took = page.locator("#badge"), page.locator("#took")
        for y in (0.3, 0.6):
            stroke(page, (0.4, y), (0.6, y))
            expect(took).to_contain_text("mask in")
        requests = []
        page.on("request", lambda asked: requests.append(f"{asked.method} {asked.url}"))
        for key, times in (("z", 5), ("y", 5), ("Enter", 5)):
            page.evaluate(
                """([key, times]) => {
                    for (let time = 0; time < times; time++)
                        document.body.dispatchEvent(
                            new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
                }""",
                [key, times],
            )
            expect(page.locator("#redo" if key == "z" else "#undo")).to_be_enabled()
            expect(page.locator("#undo" if key == "z" else "#redo")).to_be_disabled()
        expect(badge).to_have_text("mask accepted")
        expect(page.locator("#message")).to_be_hidden()
        posts = [each for each in requests if each.startswith("POST")]
        assert sum(each.endswith("/strokes") for each in posts) == 4
        assert sum(each.endswith("/mask") for each in posts) == 1


def test_strokes_that_cannot_be_saved_are_taken_off_the_picture(page, root, monkeypatch):
    with serving(root, stub("near")) as address:
        page.goto(address)
        expect(page.locator("#badge")).to_have_text("untouched")
        bare = picture(page.locator("#view"))

        def full(*given):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            stroke(page, (0.4, 0.4), (0.6, 0.4))
            expect(page.locator("#message")).to_contain_text("free some space")
        page.keyboard.press("Escape")
        wait_for_picture(page.locator("#view"), lambda seen: np.array_equal(seen, bare))
        stroke(page, (0.4, 0.4), (0.6, 0.4))
        expect(page.locator("#badge")).to_have_text("strokes saved")
