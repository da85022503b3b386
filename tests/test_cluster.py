"""cluster.yaml is valid by the installed Ray's own schema, keeps our promises, and Ray launches it.

The launch is Ray's own code against moto, which plays EC2, IAM and S3 in this process: no call
leaves the machine. moto is told to be as strict as EC2 with instance types, images and key pairs
(it always is with instance profiles), so a wrong one is refused here as it would be there. What
moto can not know is what AWS has in stock, and that the machine image's name is still published:
that one name is stated below.
"""

import copy
import itertools
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto.settings
import pytest
import ray
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core.authorization import enable_iam_authentication
from moto.ec2.models.instances import InstanceBackend
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.aws import config as ray_aws
from ray.autoscaler._private.aws import utils as ray_aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_USER_NODE_TYPE,
)

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"
REGION = "us-west-2"
ACCOUNTS = itertools.count(111_111_111_111)
# As AWS documents it for the Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04).
PUBLISHED_IMAGE = (
    "resolve:ssm:/aws/service/deeplearning/ami/x86_64/"
    "base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
)


def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(cluster()))


def test_ray_refuses_a_key_it_does_not_know():
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(cluster() | {"idle_timeout": 10}))


def test_the_head_trains_nothing_and_workers_have_gpus():
    types = cluster()["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(kind["resources"]["GPU"] >= 1 and kind["min_workers"] == 0 for kind in workers)


def test_the_image_has_the_ray_that_is_installed_and_a_python_that_we_allow():
    image = cluster()["docker"]["image"]
    version, python = re.fullmatch(r"rayproject/ray:(.+)-py(\d+)-gpu", image).groups()
    assert version == ray.__version__
    assert python in ("311", "312")


def test_loaders_have_shared_memory_beside_the_object_store():
    (shm,) = re.findall(r"--shm-size=(\d+)gb", " ".join(cluster()["docker"]["run_options"]))
    (objects,) = re.findall(
        r"--object-store-memory=(\d+)", " ".join(cluster()["worker_start_ray_commands"])
    )
    assert int(shm) * 2**30 >= int(objects) + 8 * 2**30


def test_nothing_of_ray_listens_beyond_loopback():
    text = CLUSTER.read_text()
    assert "--dashboard-host=127.0.0.1" in text and "0.0.0.0" not in text


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_nodes_ask_for_the_token_and_start_with_all_their_threads(commands: str):
    (start,) = [command for command in cluster()[commands] if "ray start" in command]
    assert "RAY_AUTH_MODE=token" in start and "unset OMP_NUM_THREADS" in start
    assert any(path.endswith("/.ray/auth_token") for path in cluster()["file_mounts"])


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Play a new AWS account, set up by deploy/aws.yaml; its bucket."""
    # Other tests keep a store of moto's in this process: it must not be emptied.
    account = f"{next(ACCOUNTS):012d}"
    bucket = f"photographs-{account}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "MOTO_ACCOUNT_ID": account,
        "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
        # Ray writes the key pair's private half here.
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for switch in (
        "EC2_ENABLE_INSTANCE_TYPE_VALIDATION",
        "ENABLE_AMI_VALIDATION",
        "ENABLE_KEYPAIR_VALIDATION",
    ):
        monkeypatch.setattr(moto.settings, switch, True)
    forget_clients()
    mock = mock_aws()
    mock.start(reset=False)
    try:
        publish_image(monkeypatch)
        create_bucket(bucket)
        boto3.client("cloudformation").create_stack(
            StackName="scribbleseg",
            TemplateBody=(ROOT / "deploy" / "aws.yaml").read_text(),
            Parameters=[{"ParameterKey": "Bucket", "ParameterValue": bucket}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        yield bucket
    finally:
        mock.stop(remove_data=False)
        forget_clients()


def publish_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine image known, under its published name too: EC2 looks such names up."""
    image = boto3.client("ec2").register_image(
        Name="Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04)",
        RootDeviceName="/dev/sda1",
    )["ImageId"]
    run_instances = InstanceBackend.run_instances

    def resolving(self: InstanceBackend, image_id: str, *args: Any, **kwargs: Any) -> Any:
        known = {PUBLISHED_IMAGE: image}
        return run_instances(self, known.get(image_id, image_id), *args, **kwargs)

    monkeypatch.setattr(InstanceBackend, "run_instances", resolving)


def create_bucket(name: str) -> None:
    boto3.client("s3").create_bucket(
        Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION}
    )


def forget_clients() -> None:
    """Make Ray open new connections: it keeps them, and subnets, for the life of the process."""
    ray_aws_utils.resource_cache.cache_clear()
    ray_aws_utils.client_cache.cache_clear()
    ray_aws._get_subnets_or_die.cache_clear()


def bootstrap(config: dict[str, Any]) -> dict[str, Any]:
    """Do what `ray up` does before it launches anything."""
    prepared = prepare_config(config)
    validate_config(prepared)
    return ray_aws.bootstrap_aws(prepared)


def launch(config: dict[str, Any], kind: str) -> Any:
    """Launch one node as Ray's launcher and autoscaler do; the EC2 instance."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    is_head = kind == config["head_node_type"]
    tags = {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD if is_head else NODE_KIND_WORKER,
        TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-{'head' if is_head else 'worker'}",
        TAG_RAY_USER_NODE_TYPE: kind,
    }
    node_config = copy.deepcopy(config["available_node_types"][kind]["node_config"])
    if is_head:
        node_config |= config["head_node"]
    (instance,) = provider.create_node(node_config, tags, 1).values()
    assert provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: kind}) == [instance.id]
    return instance


def role_credentials(role: str) -> dict[str, str]:
    """Return the keys that a node with this role gets, under Ray's and boto3's names."""
    given = boto3.client("sts").assume_role(
        RoleArn=boto3.resource("iam").Role(role).arn, RoleSessionName="node"
    )["Credentials"]
    return {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }


def test_ray_launches_the_head_and_a_worker_of_each_group(aws: str, tmp_path: Path):
    config = bootstrap(cluster())
    nodes = {kind: launch(config, kind) for kind in config["available_node_types"]}
    client = boto3.client("ec2")

    assert {kind: node.instance_type for kind, node in nodes.items()} == {
        "head": "m6i.xlarge",
        "gpu_spot": "g5.2xlarge",
        "gpu_on_demand": "g5.2xlarge",
    }
    assert [kind for kind, node in nodes.items() if node.instance_lifecycle == "spot"] == [
        "gpu_spot"
    ]
    assert {
        kind: node.iam_instance_profile["Arn"].split("/")[-1] for kind, node in nodes.items()
    } == {
        "head": "scribbleseg-head",
        "gpu_spot": "scribbleseg-worker",
        "gpu_on_demand": "scribbleseg-worker",
    }
    key = tmp_path / ".ssh" / f"{nodes['head'].key_name}.pem"
    assert config["auth"]["ssh_private_key"] == str(key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for kind, node in nodes.items():
        node.load()
        image = client.describe_images(ImageIds=[node.image_id])["Images"][0]
        assert image["Name"].startswith("Deep Learning Base OSS Nvidia Driver GPU AMI")
        assert node.key_name == nodes["head"].key_name
        tags = {tag["Key"]: tag["Value"] for tag in node.tags}
        assert tags["project"] == tags["ray-cluster-name"] == "scribbleseg"
        assert tags["ray-user-node-type"] == kind
        assert node.metadata_options["HttpTokens"] == "required"
        (volume,) = node.volumes.all()
        assert (volume.size, volume.volume_type, volume.encrypted) == (200, "gp3", True)
        assert {"Key": "project", "Value": "scribbleseg"} in volume.tags


def test_only_ssh_is_open_to_the_world_and_nodes_reach_each_other(aws: str):
    config = bootstrap(cluster())
    nodes = [launch(config, kind) for kind in config["available_node_types"]]
    (group_id,) = {group["GroupId"] for node in nodes for group in node.security_groups}
    group = boto3.resource("ec2").SecurityGroup(group_id)
    assert group.group_name == cluster()["provider"]["security_group"]["GroupName"]

    world = [rule for rule in group.ip_permissions if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in world] == [
        ("tcp", 22, 22)
    ]
    inside = [rule for rule in group.ip_permissions if rule["UserIdGroupPairs"]]
    assert [rule["IpProtocol"] for rule in inside] == ["-1"]
    assert {pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]} == {group_id}


def test_a_stricter_group_of_the_name_is_left_as_it_is(aws: str):
    vpc = next(iter(boto3.resource("ec2").vpcs.all()))
    group = vpc.create_security_group(GroupName="scribbleseg", Description="mine")
    office = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp"}
    group.authorize_ingress(IpPermissions=[office | {"IpRanges": [{"CidrIp": "192.0.2.0/24"}]}])
    config = bootstrap(cluster())
    assert config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"] == [group.id]
    group.reload()
    assert [rule["IpRanges"] for rule in group.ip_permissions] == [[{"CidrIp": "192.0.2.0/24"}]]


def test_groups_offer_what_their_machines_have(aws: str):
    for kind in cluster()["available_node_types"].values():
        (machine,) = boto3.client("ec2").describe_instance_types(
            InstanceTypes=[kind["node_config"]["InstanceType"]]
        )["InstanceTypes"]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"].get("GPU", 0) == gpus
        assert kind["resources"]["CPU"] in (0, machine["VCpuInfo"]["DefaultVCpus"])


@pytest.mark.parametrize(
    ("key", "value", "refusal"),
    [
        ("InstanceType", "g5.2xlrage", "InvalidInstanceType"),
        ("ImageId", PUBLISHED_IMAGE.replace("22.04", "22-04"), "InvalidAMIID"),
        ("ImageId", "ami-0123456789abcdef0", "InvalidAMIID"),
        ("IamInstanceProfile", {"Name": "scribbleseg"}, "NoSuchEntity"),
        ("KeyName", "no-such-key", "InvalidKeyPair"),
    ],
)
def test_what_does_not_exist_is_refused(aws: str, key: str, value: Any, refusal: str):
    config = bootstrap(cluster())
    for kind, group in config["available_node_types"].items():
        group["node_config"][key] = value
        with pytest.raises(Exception) as error:
            launch(config, kind)
        assert refusal in f"{error.value!r} {error.value.__cause__!r}"


def test_a_region_without_a_subnet_is_refused(aws: str):
    for subnet in boto3.resource("ec2").subnets.all():
        subnet.delete()
    with pytest.raises(Exception, match="No usable subnets"):
        bootstrap(cluster())


def test_the_head_may_launch_workers_and_workers_may_not(aws: str):
    config = bootstrap(cluster())
    head, worker = role_credentials("scribbleseg-head"), role_credentials("scribbleseg-worker")
    with enable_iam_authentication():
        config["provider"]["aws_credentials"] = head
        assert launch(config, "gpu_spot").instance_lifecycle == "spot"
        config["provider"]["aws_credentials"] = worker
        with pytest.raises(Exception, match=r"[Uu]nauthorized|not authorized"):
            launch(config, "gpu_on_demand")


@pytest.mark.parametrize("role", ["scribbleseg-head", "scribbleseg-worker"])
def test_nodes_may_use_their_bucket_and_no_other(aws: str, role: str):
    create_bucket(f"not-{aws}")
    s3 = boto3.client("s3", **role_credentials(role))
    with enable_iam_authentication():
        s3.put_object(Bucket=aws, Key="runs/first/run.json", Body=b"{}")
        assert s3.get_object(Bucket=aws, Key="runs/first/run.json")["Body"].read() == b"{}"
        assert s3.list_objects_v2(Bucket=aws)["KeyCount"] == 1
        s3.delete_object(Bucket=aws, Key="runs/first/run.json")
        for forbidden in (
            lambda: s3.put_object(Bucket=f"not-{aws}", Key="x", Body=b""),
            lambda: s3.list_objects_v2(Bucket=f"not-{aws}"),
            lambda: s3.delete_bucket(Bucket=aws),
        ):
            with pytest.raises(ClientError, match="AccessDenied"):
                forbidden()


def test_a_job_takes_along_the_code_and_nothing_that_git_ignores(tmp_path: Path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "train", checkout / "train")
    shutil.copy(ROOT / ".gitignore", checkout)
    for junk in (".git", ".venv", "runs/first", "demo/data", "dist", "train/__pycache__"):
        (checkout / junk).mkdir(parents=True, exist_ok=True)
        (checkout / junk / "junk").write_bytes(b"x")
    package = tmp_path / "package.zip"
    create_package(
        str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    names = zipfile.ZipFile(package).namelist()
    assert "train/finetune.py" in names
    assert not [name for name in names if "junk" in name]
