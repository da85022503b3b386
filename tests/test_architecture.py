"""The house's import rules: who may see whom, and that the library has never heard of Ray."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import scribbleseg

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(scribbleseg.__path__, prefix="scribbleseg.")
)
# A module sees only rooms that stand before its own.
FLOORS = [
    ["errors", "progress"],
    ["config"],
    ["device", "distributed", "manifest", "schedules"],
    ["scribbles", "losses", "models", "metrics", "edges"],
    ["checkpoint"],
    ["runs"],
    ["sweeps"],
    ["datasets"],
    ["predict"],
    ["evaluate", "export", "probe"],
    ["loops"],
    ["report"],
    ["app"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_no_module_of_the_library_imports_ray():
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "bad = [m for m in ('ray', 'train', 'tune', 'deploy', 'optuna') if m in sys.modules]\n"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["scribbleseg.cli", "scribbleseg.runs", "scribbleseg.sweeps"])
def test_what_reads_storage_does_without_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "scribbleseg").rglob("*.py")), ids=str)
def test_a_room_sees_only_rooms_before_it(path):
    parts = path.relative_to(ROOT / "scribbleseg").with_suffix("").parts
    if parts == ("__init__",):
        return
    room = parts[0]
    seen = {
        name.split(".")[1] for name in imported(path) if name.startswith("scribbleseg.")
    } & FLOOR.keys()
    too_high = {other for other in seen if FLOOR[other] > FLOOR[room]}
    beside = {other for other in seen if other != room and FLOOR[other] == FLOOR[room]}
    assert not too_high, f"{path.name} sees {too_high}"
    assert not beside, f"{path.name} sees {beside}, which stands beside it"


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=str)
def test_train_never_imports_tune_or_deploy(path):
    above = ("tune", "optuna", "deploy")
    assert not {name for name in imported(path) if name.split(".")[0] in above}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_printed_or_seeded_on_import(name):
    tree = ast.parse(Path(pkgutil.resolve_name(name).__file__).read_text())
    calls = {
        ast.unparse(node.value.func)
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    }
    assert calls == set()
