"""cluster.yaml is valid by the installed Ray's own schema and keeps our promises."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[1] / "cluster.yaml"


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(yaml.safe_load(CLUSTER.read_text())))


def test_the_head_trains_nothing_and_workers_have_gpus():
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(kind["resources"]["GPU"] >= 1 and kind["min_workers"] == 0 for kind in workers)


def test_the_image_has_the_ray_that_is_installed():
    import ray

    assert ray.__version__ in yaml.safe_load(CLUSTER.read_text())["docker"]["image"]


def test_nothing_of_ray_listens_beyond_loopback():
    text = CLUSTER.read_text()
    assert "--dashboard-host=127.0.0.1" in text and "0.0.0.0" not in text
