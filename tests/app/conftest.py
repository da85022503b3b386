"""A folder to draw into, a network that needs no weights, and a client of the server."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from scribbleseg.app.folder import Folder
from scribbleseg.app.models import Model
from scribbleseg.app.server import create_app
from scribbleseg.app.studio import Studio
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, dilate

HOST = "127.0.0.1:7000"


class Growing:
    """Calls object what lies near an object stroke, and nowhere near a background one."""

    def __init__(self, radius: int):
        self.radius = radius

    def probabilities(self, image, strokes):
        """Return 0.9 near object strokes, 0.1 near background, 0.3 elsewhere."""
        near = dilate(strokes, self.radius)
        return np.where(near == OBJECT, 0.9, np.where(near == BACKGROUND, 0.1, 0.3)).astype("f4")


def stub(name: str, radius: int = 20) -> Model:
    return Model(name=name, quick=Growing(radius), careful=Growing(radius), config=None)


def photograph(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with three photographs."""
    images = tmp_path / "data" / "train" / "images"
    images.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(photograph(seed=number)).save(images / f"photo_{number}.png")
    return tmp_path / "data"


@pytest.fixture
def studio(root: Path):
    folder = Folder(root=root, split="train")
    folder.make()
    opened = Studio(folder, {"main": stub("near"), "other": stub("far", 40)})
    yield opened
    opened.close()


@pytest.fixture
def client(studio: Studio):
    with TestClient(create_app(studio, hosts=[HOST]), base_url=f"http://{HOST}") as talking:
        yield talking


def draw(client: TestClient, stem: str, revision: str, label: int = 1, y: float = 40.0, **more):
    stroke = {"label": label, "width": 5, "points": [[20.0, y], [60.0, y]], **more}
    return client.post(
        f"/api/pictures/{stem}/strokes", json={"revision": revision, "stroke": stroke}
    )
