"""Loader workers, and the process that they come from, end where training does."""

import signal
import subprocess
import sys

KILLED = """
import os, signal
from torch.utils.data import DataLoader
from scribbleseg.datasets.workers import prepare_workers, worker_init

prepare_workers("scribbleseg.datasets.transforms")
how = {"multiprocessing_context": "forkserver", "worker_init_fn": worker_init}
loading = iter(DataLoader(range(99), num_workers=1, **how))
assert next(loading) == 0
os.kill(os.getpid(), signal.SIGKILL)
"""

INTERRUPTED = """
import os, signal, time
from scribbleseg.datasets.workers import prepare_workers

prepare_workers("scribbleseg.datasets.transforms")
time.sleep(1)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(0, signal.SIGINT)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run a process until nobody is left who could write to its output."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


def test_they_end_where_training_is_killed() -> None:
    done = run(KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_an_interrupted_import_is_silent() -> None:
    done = run(INTERRUPTED)
    assert (done.returncode, done.stderr) == (0, "")
