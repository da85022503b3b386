"""Which device computes, with how many threads, and in which precision."""

import ctypes
import math
import os
from pathlib import Path

import cv2
import torch

from scribbleseg.config import Precision
from scribbleseg.errors import InputError


def pick_device(*, gpus: bool = True) -> torch.device:
    """Return the best device of this machine: CUDA (with `gpus`), then MPS, then CPU."""
    if gpus and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def find_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: This machine cannot hold a tensor there.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device is {name!r}: {reason}; expected 'cuda', 'mps' or 'cpu', or leave it out"
        ) from None


CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Return how many CPU cores this process may keep busy, at least 1.

    Fewer than the machine has where it is held to some of them (taskset, Slurm), or where its
    container has a quota (`docker run --cpus`, a limit of Kubernetes): of more threads than that,
    the kernel stops all in turn, and they wait for one another.
    """
    held = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if held else os.cpu_count() or 1
    return max(1, int(min(cores, _quota())))


def _quota() -> float:
    """Return how many cores' time this container may use, by cgroup v2 or v1; inf: as many as are.

    Both have numbers of microseconds, of time and of the period in which it may be used; in place
    of the first, v2 has "max" and v1 -1 where there is no quota.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            time, period = " ".join((CGROUP / name).read_text() for name in names).split()
            if int(time) > 0:
                return int(time) / int(period)
        except (OSError, ValueError):
            continue
    return math.inf


def num_threads() -> int:
    """Return with how many threads a command computes: torch's own number, within `num_cores`.

    Torch's is OMP_NUM_THREADS, or that of the cores whose arithmetic is not shared.
    """
    return min(torch.get_num_threads(), num_cores())


# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def prepare_cpu(threads: int) -> None:
    """Let this process compute with that many threads; call it where a program begins to.

    A step or a prediction on the CPU frees and allocates the same tensors again and again. glibc
    returns each of them to the kernel, which then clears tens of thousands of pages per step; told
    to keep what was freed, it is spared that. Other allocators are left alone.

    OpenCV has threads of its own, as many as the machine has cores, whatever this process may use
    of it; after each piece of work they spin for a while, in the way of whoever computes next.
    """
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the type that matrix products are computed in; None means float32 throughout.

    Raises:
        InputError: fp16 off CUDA, where gradients would underflow or the kernels do not exist.
    """
    match precision:
        case "fp32":
            return None
        case "bf16":
            return torch.bfloat16
        case "fp16":
            if device.type != "cuda":
                raise InputError(
                    f"train.precision is 'fp16'; expected 'auto', 'bf16' or 'fp32' on {device.type}"
                )
            return torch.float16
        case "auto":
            return torch.bfloat16 if _computes_bf16(device) else None


def _computes_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 itself; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
