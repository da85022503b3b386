"""The user's road of docs/cluster.md as one command, on hosts and an object store on this machine.

    python -m tests.cluster.road --out DIR

Cluster up, data into a bucket, pretraining over two nodes, a sweep that starts from it, watching,
pulling, evaluating, cluster down: the same commands, with settings that take seconds.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from scribbleseg.manifest import verify
from tests.cluster.cluster import Cluster, open_cluster
from tests.cluster.hosts import BIN, NETWORK, missing, wait_until

BUCKET = "s3://bucket"
STORE = {
    "AWS_ENDPOINT_URL": f"http://{NETWORK}.1:5000",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SMALL_MODEL = ("--model.width", "8", "--model.depth", "3")
EACH = ("--launch.cpus-per-worker", "1", "--launch.gpus-per-worker", "0")
WORKERS = ("--launch.num-workers", "2", *EACH)
PRETRAIN = (
    *("python", "-m", "train.pretrain", "demo", "--data.roots", f"{BUCKET}/data/train/images"),
    *("--name", "eyes", "--storage", f"{BUCKET}/runs", *SMALL_MODEL, *WORKERS),
    *("--data.num-workers", "0", "--crops.global-size", "64", "--crops.local-size", "32"),
    *("--crops.num-local", "2", "--train.epochs", "2", "--train.batch-size", "16"),
)
SWEEP = (
    *("python", "-m", "tune.sweep", "smoke", "--recipe", "demo", "--data.root", f"{BUCKET}/data"),
    *("--name", "first-sweep", "--storage", f"{BUCKET}/sweeps", *SMALL_MODEL),
    *("--pretrained", f"{BUCKET}/runs/eyes", "--num-trials", "2", "--train.epochs", "2"),
    *("--train.validate-every", "1", "--train.batch-size", "8", "--data.num-workers", "0"),
    *("--data.share", "0.5", "--data.long-side", "64", "--data.crop-size", "64"),
    *EACH,
)


class Clock:
    """Says what is being done, and keeps how long each part took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Time a part of the road."""
        began = time.monotonic()
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
        yield
        self.seconds[name] = time.monotonic() - began

    def table(self) -> str:
        """Return the times as a Markdown table."""
        rows = "".join(f"| {name} | {seconds:.0f} |\n" for name, seconds in self.seconds.items())
        return "| part of the road | s |\n| --- | --- |\n" + rows


def start_store(cluster: Cluster) -> None:
    """Start an S3 server, which is on the desk, and make the bucket."""
    address, port = f"{NETWORK}.1", "5000"
    cluster.desk.start(BIN / "moto_server", "-H", address, "-p", port, log=cluster.log("store"))
    make = "import pyarrow.fs as f; s, p = f.FileSystem.from_uri('{}'); s.create_dir(p)"
    uri = f"{BUCKET}?allow_bucket_creation=true"
    wait_until(
        lambda: (
            cluster.python("-c", f"{make.format(uri)}; print('made')", check=False).strip()
            == "made"
        ),
        "the object store",
        seconds=120,
        every=1,
    )


def upload(cluster: Cluster, source: Path, target: str) -> None:
    """Copy a folder into the bucket, as `aws s3 sync` would."""
    cluster.python(
        "-c",
        "import sys, pyarrow.fs as f; s, p = f.FileSystem.from_uri(sys.argv[2]);"
        "f.copy_files(sys.argv[1], p, destination_filesystem=s)",
        str(source),
        target,
    )


def travel(cluster: Cluster, clock: Clock) -> str:
    """Take the road from nothing to masks and back to nothing; return what the evaluation said."""
    desk = cluster.desk
    scribbleseg = BIN / "scribbleseg"
    data, best = cluster.room.folder / "data", cluster.room.folder / "best"
    with clock.part("ray up"):
        cluster.up()
    with clock.part("data into the bucket"):
        start_store(cluster)
        desk.run(scribbleseg, "data", "demo", "--out", data)
        desk.run(scribbleseg, "data", "check", data)
        upload(cluster, data, f"{BUCKET}/data")
    with clock.part("pretraining on 2 nodes"):
        cluster.submit("pretrain", *PRETRAIN).expect()
    with clock.part("sweep"):
        cluster.submit("sweep", *SWEEP).expect()
    with clock.part("watch"):
        shown = desk.run(scribbleseg, "status", f"{BUCKET}/sweeps/first-sweep")
        require("finished, 2 trials" in shown, "status", shown)
        require("Ray Dashboard" in cluster.ask("/"), "dashboard", "no page")
        nodes = desk.run(
            *(BIN / "ray", "exec", cluster.settings, "RAY_AUTH_MODE=token ray status"), timeout=120
        )
        require(bool(re.search(r"0\.0/2\.0 CPU", nodes)), "ray status", nodes)
        page = cluster.room.folder / "sweep.html"
        desk.run(scribbleseg, "report", f"{BUCKET}/sweeps/first-sweep", "--out", page)
        require("<svg" in page.read_text(), "report", "no curves")
        files = cluster.python("-c", LIST, f"{BUCKET}/runs/eyes/tensorboard").split()
        require(any("tfevents" in name for name in files), "TensorBoard", str(files))
    with clock.part("pull"):
        desk.run(scribbleseg, "pull", f"{BUCKET}/sweeps/first-sweep", "--out", best)
        require(verify(best) == [], "pull", str(verify(best)))
    with clock.part("evaluate"):
        out = cluster.room.folder / "evaluation"
        shown = desk.run(
            *(scribbleseg, "evaluate", "--checkpoint", best, "--data", data, "--split", "test"),
            *("--out", out),
        )
        require("mIoU" in shown, "evaluate", shown)
    with clock.part("ray down"):
        cluster.down()
    return shown


LIST = """
import sys, pyarrow.fs as f
s, p = f.FileSystem.from_uri(sys.argv[1])
print(*(info.base_name for info in s.get_file_info(f.FileSelector(p))))
"""


def require(kept: bool, what: str, said: str) -> None:
    """Raise where a promise of the road is not kept."""
    if not kept:
        raise RuntimeError(f"{what}: not as expected\n{said[-4000:]}")


def main() -> int:
    """Take the road."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.road")
    parser.add_argument("--out", type=Path, required=True, help="folder for times and logs")
    asked = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"hosts cannot be made here: {reason}\n")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with open_cluster(["one"], head_cpus=1, environment=STORE) as cluster:
        try:
            said = travel(cluster, clock)
        finally:
            shutil.copytree(cluster.room.folder / "logs", asked.out / "logs", dirs_exist_ok=True)
    (asked.out / "road.md").write_text(clock.table())
    sys.stdout.write(clock.table() + "\n" + said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
