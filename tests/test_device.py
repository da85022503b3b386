"""How many threads a process computes with."""

import os

import cv2
import pytest
import torch

from scribbleseg import device
from scribbleseg.device import num_cores, num_threads, prepare_cpu


@pytest.mark.parametrize(
    ("held_to", "files", "expected"),
    [
        (8, {}, 8),
        (2, {}, 2),
        (8, {"cpu.max": "max 100000"}, 8),
        (8, {"cpu.max": "400000 100000"}, 4),
        (2, {"cpu.max": "400000 100000"}, 2),
        (8, {"cpu.max": "250000 100000"}, 2),
        (8, {"cpu.max": "50000 100000"}, 1),
        (8, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (8, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (8, {"cpu/cpu.cfs_quota_us": "300000"}, 8),
        (8, {"cpu.max": ""}, 8),
    ],
)
def test_cores_that_a_process_is_kept_from_are_not_counted(
    monkeypatch, tmp_path, held_to, files, expected
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(held_to)), raising=False)
    assert num_cores() == expected
    # OMP_NUM_THREADS, where it asks for fewer still, has its way.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert num_threads() == min(expected, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_opencv_has_no_threads_beyond_those_of_the_process(threads):
    cv2.setNumThreads(3)
    prepare_cpu(threads)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (threads, threads)
