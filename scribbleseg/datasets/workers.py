"""The processes that load samples: what they are forked from, and how they begin and end."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from threading import Thread
from typing import Any

import cv2


def prepare_workers(module: str) -> None:
    """Start the process that loader workers are forked from, unless it is there.

    It imports `module` first, which takes seconds: once, and not in each worker. Workers forked
    from this process could deadlock, where OpenMP or Ray have threads.
    """
    multiprocessing.set_forkserver_preload([module])
    # Ctrl-C is for the process that trains, which ends the others. Where the tracker is started on
    # the way, it takes the mask away.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def worker_init(worker: int) -> None:
    """Prepare a loader worker: one thread for OpenCV, and an end with the process it loads for.

    OpenCV's own threads would fight the loader's. PyTorch's workers watch their parent, but that is
    the process they were forked from, and it stays as long as they do: where training was killed,
    both lived on.
    """
    cv2.setNumThreads(0)
    training = multiprocessing.parent_process()
    assert training is not None, "a loader worker is another process's"
    Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)
