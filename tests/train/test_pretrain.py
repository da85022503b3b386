"""From unlabelled images to a fine-tuned network, by the commands a user types."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from scribbleseg.runs import RunFolder
from tests.train.test_finetune import run, run_here
from train.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
TINY_VIEWS = [
    "--crops.global-size=64", "--crops.local-size=32", "--crops.num-local=2",
    "--model.width=8", "--model.depth=3", "--model.norm=group", "--dino.out-dim=32",
    "--train.batch-size=4", "--train.precision=fp32",
]  # fmt: skip


def test_images_are_learned_from_and_the_encoder_is_fine_tuned(tiny_data, tmp_path, capsys):
    images = tmp_path / "images" / "nested"
    images.mkdir(parents=True)
    for path in (tiny_data / "train" / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"not an image")
    Image.new("CMYK", (40, 40)).save(images / "print.jpg")
    order = ["demo", *TINY_VIEWS, "--data.roots", str(images.parent), f"--probe.root={tiny_data}",
             "--train.epochs=2", f"--storage={tmp_path}", "--name=dino"]  # fmt: skip
    command = [sys.executable, "-m", "train.pretrain", *order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "on 14 images, 2 skipped" in done.stderr
    assert "broken.png" in done.stderr and "print.jpg" in done.stderr
    assert "probe mIoU" in done.stderr and "Traceback" not in done.stderr
    folder = RunFolder.at(str(tmp_path), "dino")
    assert folder.finished() and folder.last(hashed=True) == 2 and folder.best()["epoch"] == 2
    assert folder.list_files("pictures") == ["features_0001.jpg", "features_0002.jpg"]
    assert (tmp_path / "dino" / "report.html").stat().st_size > 10_000
    record = folder.read_json("run.json")
    assert record["kind"] == "dino" and record["resolved"]["dino"]["ema_momentum"] == 0.99
    main(order)
    assert "is finished" in capsys.readouterr().out

    tuned = run(tiny_data, tmp_path, "tuned", "--train.epochs=1", f"--init-from={tmp_path}/dino")
    assert tuned.returncode == 0, tuned.stderr
    status = run_here(tiny_data, tmp_path, "refused", "--model.architecture=resunet",
                      f"--init-from={tmp_path}/dino")  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert "pretrained as encoder unet" in error
