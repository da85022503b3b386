"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "shared" / "data" / "scribble-voc"


@pytest.fixture(scope="session")
def benchmark() -> Path:
    """Folder of the real benchmark; tests that need it skip where it is absent."""
    if not BENCHMARK.is_dir():
        pytest.skip("the benchmark (../shared/data/scribble-voc) is not on this machine")
    return BENCHMARK
