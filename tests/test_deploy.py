"""The files of deploy/ fit the programs that read them.

aws.yaml is launched from in test_cluster.py. local.yaml goes through Ray's schema here, and the
road's test brings it up on real hosts. kuberay.yaml meets three readers: the pod templates and the
service account are held, strictly, against Kubernetes' own schema; KubeRay's two kinds against the
fields and rules of its API (ray.io/v1, KubeRay 1.5), written down below because no package carries
its schema; and the cluster is read by Ray's own autoscaler for KubeRay. No operator has seen it.
"""

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
# The fields of KubeRay's API, and those that must be there.
FIELDS = {
    "RayCluster": (
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions "
        "headGroupSpec headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs",
        "headGroupSpec",
    ),
    "headGroupSpec": (
        "enableIngress headService labels rayStartParams resources serviceType template",
        "template",
    ),
    "workerGroupSpecs": (
        "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
        "replicas resources scaleStrategy suspend template",
        "groupName maxReplicas minReplicas template",
    ),
    "autoscalerOptions": (
        "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
        "upscalingMode version volumeMounts",
        "",
    ),
    "RayJob": (
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
        "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
        "rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig "
        "submitterPodTemplate suspend ttlSecondsAfterFinished",
        "entrypoint",
    ),
}


def local() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "local.yaml").read_text())


def documents() -> dict[str, dict[str, Any]]:
    """Return kuberay.yaml's documents by their kind."""
    found = list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))
    return {document["kind"]: document for document in found}


def pod_templates() -> list[dict[str, Any]]:
    spec = documents()["RayCluster"]["spec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def check_fields(kind: str, spec: dict[str, Any]) -> None:
    known, needed = (set(names.split()) for names in FIELDS[kind])
    assert set(spec) <= known, kind
    assert set(spec) >= needed, kind


def test_ray_accepts_the_local_file():
    config = prepare_config(local())
    validate_config(config)
    (group,) = config["available_node_types"].values()
    assert group["max_workers"] == len(local()["provider"]["worker_ips"])


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/local.yaml"])
def test_every_command_is_whole_shell(file: str):
    config = yaml.safe_load((ROOT / file).read_text())
    lists = [config[key] for key in config if key.endswith("_commands")]
    assert len(lists) >= 3
    for command in itertools.chain(*lists):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_local_template_names_no_real_machine():
    provider = local()["provider"]
    for address in (provider["head_ip"], *provider["worker_ips"]):
        # RFC 5737's addresses for documentation: they lead nowhere.
        assert address.startswith("192.0.2.")


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_local_nodes_ask_for_the_token_and_start_with_all_their_threads(commands: str):
    (start,) = [command for command in local()[commands] if "ray start" in command]
    assert "RAY_AUTH_MODE=token" in start and "unset OMP_NUM_THREADS SSH_CLIENT" in start
    assert ("--dashboard-host=127.0.0.1" in start) == ("--head" in start)
    assert "0.0.0.0" not in start


def test_ray_down_finds_the_ray_that_was_started():
    assert any("~/.local/bin/ray" in command for command in local()["setup_commands"])


def test_the_template_for_aws_uses_no_yaml_that_cloudformation_refuses():
    # Anchors are fine for Python's reader, and CloudFormation knows none.
    tokens = yaml.scan((DEPLOY / "aws.yaml").read_text())
    assert not any(isinstance(token, yaml.AnchorToken | yaml.AliasToken) for token in tokens)


def test_the_image_builds_on_the_ray_that_is_installed_and_copies_what_is_there():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM rayproject/ray:(.+)-py31[12]-gpu$", dockerfile, re.M) == [
        ray.__version__
    ]
    for sources in re.findall(r"^COPY --chown=\S+ (.+) \S+$", dockerfile, re.M):
        assert all((ROOT / source).exists() for source in sources.split())


def test_pods_and_service_account_fit_kubernetes():
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(documents()["ServiceAccount"], version, strict=True)
    for template in pod_templates():
        holder = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
        kubernetes_validate.validate(holder | {"template": template}, version, strict=True)
        account = template["spec"]["serviceAccountName"]
        assert account == documents()["ServiceAccount"]["metadata"]["name"]


def test_kuberay_knows_every_field():
    found = documents()
    cluster, job = found["RayCluster"]["spec"], found["RayJob"]["spec"]
    assert {found[kind]["apiVersion"] for kind in ("RayCluster", "RayJob")} == {"ray.io/v1"}
    check_fields("RayCluster", cluster)
    check_fields("headGroupSpec", cluster["headGroupSpec"])
    check_fields("autoscalerOptions", cluster["autoscalerOptions"])
    check_fields("RayJob", job)
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # `ray start` gets them as text; a bare number is refused.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        check_fields("workerGroupSpecs", group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_on_the_cluster_beside_it():
    job = documents()["RayJob"]["spec"]
    assert job["clusterSelector"] == {
        "ray.io/cluster": documents()["RayCluster"]["metadata"]["name"]
    }
    # KubeRay refuses these for a job on a cluster that is not its own.
    assert not {"suspend", "backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"} & set(job)


def test_rays_autoscaler_reads_the_cluster():
    cluster = documents()["RayCluster"]
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    assert config["idle_timeout_minutes"] == 10
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    gpu = types["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    # The job below it asks for workers of exactly this size.
    entrypoint = documents()["RayJob"]["spec"]["entrypoint"]
    assert f"--launch.cpus-per-worker {gpu['resources']['CPU']} " in entrypoint
    assert f"--launch.gpus-per-worker {gpu['resources']['GPU']} " in entrypoint


def test_pods_share_memory_and_have_one_image_of_this_version():
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert project is not None
    assert documents()["RayCluster"]["spec"]["rayVersion"] == ray.__version__
    for template in pod_templates():
        (container,) = template["spec"]["containers"]
        assert container["image"] == f"REGISTRY/scribbleseg:{project.group(1)}"
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
