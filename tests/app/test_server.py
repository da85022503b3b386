"""The server's routes: what is saved, and what becomes of bad input."""

import io
import os
import threading
import zlib
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient

from scribbleseg.app import folder as folders
from scribbleseg.app import proposals, serve, server
from scribbleseg.app.hosts import host_headers, read_token
from scribbleseg.app.models import Model
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.server import create_app
from scribbleseg.datasets.scenes import (
    encode_png,
    is_predicted,
    list_scenes,
    read_image,
    read_mask,
    read_scribbles,
)
from scribbleseg.errors import InputError
from tests.app.conftest import HOST, Growing, draw, photograph, stub


def png(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(array).save(stored, kind, **options)
    return stored.getvalue()


def grey(answer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def refused(answer, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]
    assert "\n" not in message and all(word in message for word in words), message


def test_strokes_are_saved_at_once_and_masks_once_accepted(client, root):
    first = draw(client, "photo_0", "blank")
    assert first.status_code == 200 and first.json()["progress"] == "drawn"
    second = draw(client, "photo_0", first.json()["revision"], label=0, y=10.0)
    strokes = read_scribbles(root / "train" / "scribbles" / "photo_0.png")
    assert strokes[40, 40] == 1 and strokes[10, 40] == 0 and strokes[70, 40] == 255
    assert not (root / "train" / "ground_truth").exists()

    revision = second.json()["revision"]
    seen = client.get(f"/api/pictures/photo_0/mask?revision={revision}")
    assert grey(seen)[45, 40] > 127 and grey(seen)[10, 40] == 0
    assert float(seen.headers["x-seconds"]) >= 0
    saved = client.post("/api/pictures/photo_0/mask", json={"revision": revision})
    mask = read_mask(root / "train" / "ground_truth" / "photo_0.png")
    assert np.array_equal(grey(saved) > 127, mask == 1) and mask[40, 40] == 1

    again = client.get("/api/pictures/photo_0/mask?place=saved")
    assert np.array_equal(grey(again) > 127, mask == 1)
    pictures = client.get("/api/state").json()["pictures"]
    assert [picture["progress"] for picture in pictures] == ["accepted", "untouched", "untouched"]
    changed = draw(client, "photo_0", revision, y=60.0)
    assert changed.json()["progress"] == "changed"


def test_a_mask_of_a_hand_is_kept_when_another_is_accepted(client, root):
    masks = root / "train" / "ground_truth"
    masks.mkdir()
    Image.fromarray(np.ones((90, 120), np.uint8)).save(masks / "photo_0.png")
    by_hand = (masks / "photo_0.png").read_bytes()
    told, revision = [], "blank"
    for y in (40.0, 60.0):
        revision = draw(client, "photo_0", revision, y=y).json()["revision"]
        saved = client.post("/api/pictures/photo_0/mask", json={"revision": revision})
        told.append(saved.headers["x-kept"])
    assert told == ["1", "0"]
    assert [path.read_bytes() for path in (masks / "replaced").iterdir()] == [by_hand]
    # What was accepted here, too, once it was corrected in an editor that hands on the notes.
    accepted = Image.open(masks / "photo_0.png")
    notes = PngInfo()
    for keyword, text in accepted.info.items():
        notes.add_text(keyword, text)
    Image.fromarray(1 - np.array(accepted)).save(masks / "photo_0.png", pnginfo=notes)
    saved = client.post("/api/pictures/photo_0/mask", json={"revision": revision})
    assert saved.headers["x-kept"] == "1" and len(list((masks / "replaced").iterdir())) == 2
    # What a network made can be made again.
    mask = encode_png(np.ones((90, 120), np.uint8), predicted=True)
    (masks / "photo_0.png").write_bytes(mask)
    saved = client.post("/api/pictures/photo_0/mask", json={"revision": revision})
    assert saved.headers["x-kept"] == "0"
    draw(client, "photo_1", "blank")
    draw(client, "photo_2", "blank")
    (scene, *_) = list_scenes(root, "train", need_masks=False)
    assert scene.ground_truth == masks / "photo_0.png" and not is_predicted(scene.ground_truth)


def test_undo_and_redo_restore_files_to_the_last_bit(client, root):
    path = root / "train" / "scribbles" / "photo_0.png"
    first = draw(client, "photo_0", "blank").json()["revision"]
    content = path.read_bytes()
    second = draw(client, "photo_0", first, label=0, y=10.0).json()["revision"]

    def go(revision, earlier):
        wanted = {"revision": revision, "restore": earlier}
        return client.post("/api/pictures/photo_0/strokes", json=wanted)

    assert go(second, first).json()["revision"] == first and path.read_bytes() == content
    assert go(first, "blank").json()["revision"] == "blank" and not path.exists()
    assert go("blank", second).json()["revision"] == second
    refused(go(second, "0123456789abcdef"), 410, "anew")


def test_an_eraser_takes_strokes_away(client, root):
    first = draw(client, "photo_0", "blank").json()["revision"]
    second = draw(client, "photo_0", first, label=255, width=30).json()
    assert second["revision"] == "blank" and second["progress"] == "untouched"


def test_a_second_tab_does_not_overwrite(client, root):
    first = draw(client, "photo_0", "blank").json()["revision"]
    before = (root / "train" / "scribbles" / "photo_0.png").read_bytes()
    refused(draw(client, "photo_0", "blank", y=70.0), 409, "another tab", "reload")
    refused(client.post("/api/pictures/photo_0/mask", json={"revision": "blank"}), 409, "reload")
    assert (root / "train" / "scribbles" / "photo_0.png").read_bytes() == before
    assert draw(client, "photo_0", first, y=70.0).status_code == 200


def test_another_program_is_not_overwritten(client, root):
    first = draw(client, "photo_0", "blank").json()["revision"]
    other = np.full((90, 120), 255, np.uint8)
    other[3] = 0
    Image.fromarray(other).save(root / "train" / "scribbles" / "photo_0.png")
    refused(draw(client, "photo_0", first), 409, "another program")
    now = client.get("/api/pictures/photo_0").json()["revision"]
    assert now != first and draw(client, "photo_0", now).status_code == 200
    assert (read_scribbles(root / "train" / "scribbles" / "photo_0.png")[3] == 0).all()


def test_a_photograph_that_was_replaced_is_read_anew(client, root):
    drawn = draw(client, "photo_0", "blank").json()
    look = "/api/pictures/photo_0/photo"
    before, path = grey(client.get(look)), root / "train" / "images" / "photo_0.png"
    assert path.is_file()
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    assert not np.array_equal(grey(client.get(look)), before)
    Image.fromarray(photograph(40, 50)).save(path)
    mask = client.get(f"/api/pictures/photo_0/mask?revision={drawn['revision']}")
    refused(mask, 422, "expected 50x40")


def test_large_photographs_are_drawn_small_and_masked_at_their_own_size(client, root):
    large = photograph(1500, 3000)
    Image.fromarray(large).save(root / "train" / "images" / "large.jpg")
    told = client.get("/api/pictures/large").json()
    assert told["shown"] == {"width": 1600, "height": 800} and told["width"] == 3000
    assert grey(client.get("/api/pictures/large/photo")).shape == (800, 1600, 3)
    drawn = draw(client, "large", "blank", width=1, points=[[300, 700], [2900, 700]]).json()
    shown = grey(client.get("/api/pictures/large/strokes"))
    assert (shown[373, 200:1500, 3] == 255).all()
    assert grey(client.get(f"/api/pictures/large/mask?revision={drawn['revision']}")).shape == (
        (800, 1600)
    )
    client.post("/api/pictures/large/mask", json={"revision": drawn["revision"]})
    assert read_mask(root / "train" / "ground_truth" / "large.png").shape == (1500, 3000)


def test_masks_of_strokes_that_are_no_longer_the_newest_are_not_computed(client):
    first = draw(client, "photo_0", "blank").json()["revision"]
    draw(client, "photo_0", first, y=60.0)
    refused(client.get(f"/api/pictures/photo_0/mask?revision={first}"), 410, "newer")


def test_a_stroke_that_comes_in_during_the_careful_look_keeps_the_older_mask_out(
    client, studio, root
):
    first = draw(client, "photo_0", "blank").json()["revision"]

    class Slow:
        def probabilities(self, image, strokes):
            draw(client, "photo_0", first, y=60.0)
            return np.zeros(strokes.shape, np.float32)

    model = Model(name="slow", quick=Growing(20), careful=Slow(), config=None)
    studio.models["main"] = model
    refused(client.post("/api/pictures/photo_0/mask", json={"revision": first}), 410, "newer")
    assert not (root / "train" / "ground_truth").exists()
    assert client.get("/api/pictures/photo_0").json()["progress"] == "drawn"


def test_dropped_photographs_are_kept_and_never_replaced(client, root):
    images = root / "train" / "images"
    content = png(photograph(seed=9), "JPEG", quality=90)

    def add(name, content):
        answer = client.post("/api/pictures", params={"name": name}, content=content)
        assert answer.status_code == 201, answer.text
        return answer.json()["stem"]

    assert add("cat.jpg", content) == "cat" and (images / "cat.jpg").read_bytes() == content
    assert add("cat.jpg", content) == "cat"
    assert add("cat.png", png(photograph(seed=8))) == "cat-2"
    assert (images / "cat.jpg").read_bytes() == content
    assert add("CAT.jpg", content) == "cat"
    assert add("Cat.png", png(photograph(seed=7))) == "Cat-3"

    exif = Image.Exif()
    exif[0x0112] = 6
    add("turned.jpg", png(photograph(), "JPEG", exif=exif))
    assert read_image(images / "turned.png").shape == (120, 90, 3)
    add("clear.webp", png(np.zeros((20, 30, 4), np.uint8), "WEBP"))
    assert (read_image(images / "clear.png") == 255).all()
    assert not list(images.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content", "status", "word"),
    [
        ("a.png", b"not a picture", 422, "not such a picture"),
        ("a.png", b"", 422, "not such a picture"),
        ("a.jpg", png(photograph(), "JPEG")[:900], 422, "truncated"),
        ("a.png", png(np.zeros((4, 4), np.uint16)), 422, "8-bit"),
        ("../a.png", png(photograph()), 400, "plain file name"),
        ("/etc/a.png", png(photograph()), 400, "plain file name"),
        ("a\0.png", png(photograph()), 400, "plain file name"),
        (".png", png(photograph()), 400, "plain file name"),
        ("", png(photograph()), 400, "plain file name"),
    ],
)
def test_files_that_cannot_be_used_are_refused(client, root, name, content, status, word):
    before = sorted(root.parent.rglob("*"))
    refused(client.post("/api/pictures", params={"name": name}, content=content), status, word)
    assert sorted(root.parent.rglob("*")) == before


def bomb(width: int, height: int) -> bytes:
    """A small PNG of many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + crc.to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    pixels = zlib.compress(bytes(1_000_000))
    chunks = [(b"IHDR", size + bytes([8, 2, 0, 0, 0])), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_pictures_of_too_many_pixels_are_refused_by_their_header(client, root, size):
    content = bomb(*size)
    refused(client.post("/api/pictures?name=a.png", content=content), 413, "megapixels")
    (root / "train" / "images" / "bomb.png").write_bytes(content)
    refused(client.get("/api/pictures/bomb"), 413, "megapixels")
    assert client.get("/api/pictures/photo_0").status_code == 200


def test_requests_that_are_too_large_are_refused(client, monkeypatch):
    monkeypatch.setattr(server, "MAX_BYTES", 1000)
    refused(client.post("/api/pictures?name=a.png", content=b"x" * 1001), 413, "a.png", "larger")
    parts = iter([b"x" * 600, b"x" * 600])
    refused(client.post("/api/pictures?name=a.png", content=parts), 413, "larger")
    refused(client.post("/api/models", content=b" " * 1_000_001), 413, "larger")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[" * 100_000, b'{"revision": 3}', b'{"revision": "blank"}', b"\xff\xfe"],
)
def test_malformed_requests_are_refused(client, content):
    refused(client.post("/api/pictures/photo_0/strokes", content=content), 400)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": 2},
        {"label": "object"},
        {"width": 0},
        {"width": 1e9},
        {"points": []},
        {"points": [[1]]},
        {"points": [[1, 2, 3]]},
        {"points": [[1e300, 2]]},
        {"points": "here"},
        {"points": [[0, 0]] * 20_001},
    ],
    ids=str,
)
def test_strokes_that_are_none_are_refused(client, root, wrong):
    refused(draw(client, "photo_0", "blank", **wrong), 400, "stroke")
    not_finite = b'{"revision": "blank", "stroke": {"label": 1, "width": NaN, "points": [[1, 1]]}}'
    refused(client.post("/api/pictures/photo_0/strokes", content=not_finite), 400)
    assert not (root / "train" / "scribbles").exists()


@pytest.mark.parametrize(
    "stem", ["%2e%2e", "..%2F..%2Fsecret", "%2Fetc%2Fpasswd", "a%00b", ".hidden", "x" * 400]
)
def test_names_that_lead_elsewhere_are_refused(client, root, stem):
    (root.parent / "secret.png").write_bytes(png(photograph()))
    for path in (f"/api/pictures/{stem}", f"/api/pictures/{stem}/photo", f"/page/{stem}"):
        assert client.get(path).status_code in (400, 404)


def test_links_out_of_the_folder_are_neither_read_nor_written(client, root):
    outside = root.parent / "secret.png"
    outside.write_bytes(png(photograph()))
    (root / "train" / "images" / "link.png").symlink_to(outside)
    refused(client.get("/api/pictures/link"), 403, "leads out of")
    assert client.get("/api/pictures/link/photo").status_code == 403
    assert client.get("/api/pictures/link/thumbnail").status_code == 403
    refused(draw(client, "link", "blank"), 403, "leads out of")

    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / "train" / "scribbles").symlink_to(elsewhere)
    refused(draw(client, "photo_0", "blank"), 403, "leads out of")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(30, 403, "writable"), (13, 403, "writable"), (28, 507, "free some space")],
)
def test_a_folder_that_cannot_be_written_is_told(client, root, monkeypatch, number, status, word):
    first = draw(client, "photo_0", "blank").json()["revision"]
    before = (root / "train" / "scribbles" / "photo_0.png").read_bytes()

    def fail(*given):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        refused(draw(client, "photo_0", first, y=60.0), status, "not saved", word)
        refused(client.post("/api/pictures/photo_0/mask", json={"revision": first}), status, word)
        added = client.post("/api/pictures?name=a.png", content=png(photograph()))
        refused(added, status, "not saved", word)
    assert (root / "train" / "scribbles" / "photo_0.png").read_bytes() == before
    assert not list(root.rglob(".*"))
    assert draw(client, "photo_0", first, y=60.0).status_code == 200


def test_files_that_break_the_contract_are_told(client, root):
    (root / "train" / "scribbles").mkdir()
    Image.fromarray(np.full((90, 120), 7, np.uint8)).save(
        root / "train" / "scribbles" / "photo_0.png"
    )
    refused(client.get("/api/pictures/photo_0"), 422, "values 7", "data convert")
    (root / "train" / "images" / "bad.jpg").write_bytes(b"no picture")
    refused(client.get("/api/pictures/bad"), 422, "bad.jpg")
    refused(client.get("/api/pictures/none"), 404, "no such photograph")
    assert client.get("/api/pictures/photo_1").status_code == 200


def test_a_checkpoint_that_fails_to_load_leaves_the_one_before(client, root):
    broken = root / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "best.json").write_text("{")
    name = str(broken)
    assert name in client.get("/api/state").json()["checkpoints"]
    wanted = {"place": "main", "checkpoint": name}
    refused(client.post("/api/models", json=wanted), 422, "best.json")
    refused(client.post("/api/models", json={"place": "main", "checkpoint": "/etc"}), 404)
    refused(client.post("/api/models", json={"place": "third", "checkpoint": name}), 400)
    assert client.get("/api/state").json()["models"]["main"] == "near"
    assert draw(client, "photo_0", "blank").status_code == 200


def test_two_checkpoints_on_the_same_strokes(client):
    revision = draw(client, "photo_0", "blank").json()["revision"]
    ask = f"/api/pictures/photo_0/mask?revision={revision}"
    near, far = grey(client.get(ask)), grey(client.get(f"{ask}&place=other"))
    assert (near > 127).sum() < (far > 127).sum()
    told = client.post("/api/models", json={"place": "other", "checkpoint": None}).json()
    assert "other" not in told["models"]
    refused(client.get(f"{ask}&place=other"), 404)


def test_next_is_the_untouched_picture_with_the_highest_entropy(client, studio):
    for stem, score in (("photo_0", 0.1), ("photo_1", 0.9), ("photo_2", 0.5)):
        studio.proposals.scores[stem] = score
    assert client.get("/api/next").json()["stem"] == "photo_1"
    draw(client, "photo_1", "blank")
    assert client.get("/api/next?after=photo_1").json()["stem"] == "photo_2"
    assert client.get("/api/next?after=photo_2").json()["stem"] == "photo_0"
    for stem in ("photo_0", "photo_2"):
        draw(client, stem, "blank")
    assert client.get("/api/next?after=photo_1").json()["stem"] == "photo_2"


def test_pictures_are_looked_at_while_nobody_waits(client, studio, root):
    (root / "train" / "images" / "bad.png").write_bytes(b"no picture")
    assert client.get("/api/state").json()["unscored"] == 4
    thread = threading.Thread(target=studio.score_when_idle)
    thread.start()
    for _ in range(100):
        if client.get("/api/state").json()["unscored"] == 0:
            break
        threading.Event().wait(0.1)
    studio.close()
    thread.join()
    assert client.get("/api/state").json()["unscored"] == 0
    assert studio.proposals.scores["bad"] == -1 < studio.proposals.scores["photo_0"]


def test_next_passes_over_what_cannot_be_read_and_networks_that_fail_are_asked_again_later(
    client, studio, root, monkeypatch
):
    images = root / "train" / "images"
    (images / "bad.png").write_bytes(b"no picture")

    class Away:
        def probabilities(self, image, strokes):
            raise Refusal(HTTPStatus.BAD_GATEWAY, "cannot be reached")

    away = Model(name="away", quick=Away(), careful=Away(), config=None)
    studio.proposals.score(away, "photo_0")
    studio.proposals.score(studio.models["main"], "bad")
    pictures = studio.folder.pictures()
    assert studio.proposals.scores == {"bad": -1.0}
    assert studio.proposals.unscored(pictures) == ["photo_1", "photo_2"]
    monkeypatch.setattr(proposals, "_REST_SECONDS", -1.0)
    assert studio.proposals.unscored(pictures) == ["photo_0", "photo_1", "photo_2"]
    for number in range(3):
        draw(client, f"photo_{number}", "blank")
    assert client.get("/api/next?after=photo_0").json()["stem"] == "photo_1"
    for number in range(3):
        (images / f"photo_{number}.png").unlink()
    assert client.get("/api/next").json()["stem"] is None


def test_networks_on_other_machines_are_not_trained_here(client):
    refused(client.post("/api/finetune", json={}), 409, "another machine", "--checkpoint")


def test_other_web_pages_are_refused(studio):
    with TestClient(create_app(studio, hosts=[HOST]), base_url=f"http://{HOST}") as client:
        foreign = ("http://evil.example", "null", "http://[", f"http://{HOST}.evil.example", HOST)
        for headers in (*({"origin": each} for each in foreign), {"sec-fetch-site": "cross-site"}):
            refused(client.post("/api/finetune", json={}, headers=headers), 403, "other web pages")
            assert client.get("/api/state", headers=headers).status_code == 403
        for host in ("evil.example", "evil.example:7000", "127.0.0.1", ""):
            assert client.get("/api/state", headers={"host": host}).status_code == 421
        own = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
        assert client.get("/api/state", headers=own).status_code == 200
        page = client.get("/", headers={"sec-fetch-site": "cross-site"})
        assert (
            page.status_code == 200
            and "script-src 'self'" in page.headers["content-security-policy"]
        )


def test_beyond_loopback_a_token_is_asked_for(studio):
    with TestClient(create_app(studio, token="secret"), base_url="http://lab:80") as client:
        refused(client.get("/api/state"), 401, "token")
        refused(client.get("/?token=wrong"), 401, "token")
        bearer = {"authorization": "Bearer secret"}
        assert client.get("/api/state", headers=bearer).status_code == 200
        assert client.get("/", params={"token": "secret"}).status_code == 200
        assert client.get("/api/state").status_code == 200


def test_the_address_that_is_printed_is_served(studio, root, monkeypatch):
    assert "127.0.0.2:7000" in host_headers("127.0.0.2", 7000)
    assert {"localhost", "127.0.0.1:80"} <= set(host_headers("127.0.0.1", 80))
    assert "localhost" not in host_headers("127.0.0.1", 7000)
    monkeypatch.setattr(serve, "_load", lambda *given: stub("near"))
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: sockets[0].close())
    monkeypatch.setenv("SCRIBBLESEG_TOKEN", "a+b/c=")
    said = []
    serve.serve(
        "c", root, server=None, compare=None, split="train", host="0.0.0.0", port=0, browse=False,
        say=said.append,
    )  # fmt: skip
    path = "/" + said[-1].rpartition("/")[2]
    with TestClient(create_app(studio, token="a+b/c="), base_url="http://lab") as client:
        assert client.get(path).status_code == 200


def test_one_goes_back_to_what_the_command_line_named(client, studio):
    given = studio.models["main"]
    studio.models["main"] = stub("another")
    told = client.post("/api/models", json={"place": "main", "checkpoint": "near"}).json()
    assert told["models"]["main"] == "near" and studio.models["main"] is given


def test_loose_photographs_are_told_where_to_go(tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="move them there"):
        folders.Folder(root=tmp_path, split="train").make()
    with pytest.raises(InputError, match="--split"):
        folders.Folder(root=tmp_path / "new", split="../up").make()


def test_a_link_out_of_the_folder_is_one_line_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drawn" / "train").mkdir(parents=True)
    (tmp_path / "drawn" / "train" / "images").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(serve, "_load", lambda *given: stub("near"))
    with pytest.raises(InputError, match="--data: .*leads out of"):
        serve.serve(
            "c", tmp_path / "drawn", server=None, compare=None, split="train", host="127.0.0.1",
            port=0, browse=False, say=str,
        )  # fmt: skip


def test_strokes_with_a_suffix_in_capitals_are_opened_and_go_on_in_their_file(client, root):
    strokes = np.full((90, 120), 255, np.uint8)
    strokes[3] = 0
    (root / "train" / "scribbles").mkdir()
    Image.fromarray(strokes).save(root / "train" / "scribbles" / "photo_0.PNG")
    now = client.get("/api/pictures/photo_0").json()
    assert now["revision"] != "blank" and now["progress"] == "drawn"
    draw(client, "photo_0", now["revision"])
    (path,) = (root / "train" / "scribbles").iterdir()
    assert (read_scribbles(path)[3] == 0).all() and read_scribbles(path)[40, 40] == 1


def test_the_page_is_served_whole(client):
    page = client.get("/").text
    names = [path.name for path in Path(server.__file__).with_name("page").iterdir()]
    for name in names:
        assert client.get(f"/page/{name}").status_code == 200, name
    assert 'src="/page/main.js"' in page


def test_an_empty_host_is_not_every_address():
    with pytest.raises(InputError, match="--host is empty"):
        serve.listen("", 0)


def test_a_token_is_what_a_header_can_carry(monkeypatch):
    for given, wanted in (("secret\n", "secret"), (" secret", "secret"), ("", None)):
        monkeypatch.setenv("SCRIBBLESEG_TOKEN", given)
        assert read_token() == wanted
    for given in ("пароль", "two words", "a\nb"):
        monkeypatch.setenv("SCRIBBLESEG_TOKEN", given)
        with pytest.raises(InputError, match="SCRIBBLESEG_TOKEN") as caught:
            read_token()
        assert given not in str(caught.value)


def test_a_suffix_may_be_written_in_any_case(client, root):
    images = root / "train" / "images"
    (images / "photo_0.png").rename(images / "photo_0.PnG")
    assert client.get("/api/pictures/photo_0").status_code == 200
