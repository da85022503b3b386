"""A Ray cluster on the hosts of a room, by the commands of docs/cluster.md, from a desk of its own.

The settings are those of deploy/local.yaml with the room's addresses. `ray` and `scribbleseg` run
on the desk, which is on the same network as the cluster and belongs to it no more than your own
machine does.
"""

import json
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import BIN, ROOT, Host, Room, open_room, wait_until

DASHBOARD = "http://127.0.0.1:8265"
SECONDS_TO_START = 400.0
# What a person would do again, too: the head answers a while before its agent, and the tunnel.
NOT_YET = ("No available agent", "Failed to connect to Ray", "Connection", "Internal Server Error")

ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]})
print(urllib.request.urlopen(request, timeout=10).read().decode())
"""


@dataclass(kw_only=True)
class Cluster:
    """The desk, the head and the workers."""

    room: Room
    desk: Host
    head: Host
    workers: list[Host]
    """Those that the settings name, one CPU each."""
    head_cpus: int
    """CPUs of the head that jobs may use."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What Ray's processes, and so jobs, see besides their usual."""
    tunnel: subprocess.Popen[bytes] | None = None

    @property
    def project(self) -> Path:
        """A copy of this project, so that all that runs here is of one state of it."""
        return self.room.folder / "project"

    @property
    def settings(self) -> Path:
        """The cluster's YAML file."""
        return self.room.folder / "local.yaml"

    def log(self, name: str) -> Path:
        """Return the file that takes what a command of that name prints."""
        return self.room.folder / "logs" / f"{name}.log"

    def up(self, *options: str) -> None:
        """Bring the cluster up, or change it; returns once all its nodes have joined."""
        self.settings.write_text(yaml.safe_dump(self._adapted(), sort_keys=False))
        command = [BIN / "ray", "up", "--yes", *options, self.settings]
        said = self.desk.run(*command, check=False, timeout=SECONDS_TO_START)
        self.log("ray-up").write_text(said)
        if "Traceback" in said or "Failed" in said:
            raise RuntimeError(f"ray up failed\n{said[-4000:]}")
        self.open_tunnel()
        self.wait_for_nodes(*(host for host in self.workers if host.pid))

    def restore(self, *, afresh: bool = False) -> None:
        """Turn on again what is off; Ray's autoscaler brings the nodes back.

        Args:
            afresh: Begin with a new Ray, whatever the present one still does.
        """
        if afresh:
            for host in (self.head, *self.workers):
                if host.pid:
                    self.room.kill(host)
            self.room.boot(self.head.name)
        for host in self.workers:
            if not host.pid:
                self.room.boot(host.name)
        if afresh:
            self.up()
        self.wait_for_nodes(*self.workers)

    def down(self) -> None:
        """Take the cluster down."""
        self.log("ray-down").write_text(self.desk.run(BIN / "ray", "down", "--yes", self.settings))

    def open_tunnel(self) -> None:
        """Hold a tunnel to the dashboard open, until the desk is turned off."""
        if self.tunnel is None or self.tunnel.poll() is not None:
            command = [BIN / "ray", "dashboard", self.settings]
            self.tunnel = self.desk.start(*command, log=self.log("tunnel"))

    def ask(self, path: str) -> str:
        """Return what the dashboard says to those who have the token; an error where it is mute."""
        token = self.desk.run("cat", Path.home() / ".ray" / "auth_token").strip()
        return self.python("-c", ASK, DASHBOARD + path, token, check=False)

    def python(self, *words: str, check: bool = True) -> str:
        """Run Python on the desk; return what it printed."""
        return self.desk.run(sys.executable, *words, check=check)

    def nodes(self) -> dict[str, str]:
        """Return the address and identifier of each living node; none: no answer."""
        self.open_tunnel()
        said = self.ask("/api/v0/nodes")
        if not said.startswith("{"):
            return {}
        rows = json.loads(said)["data"]["result"]["result"]
        return {row["node_ip"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def wait_for_nodes(self, *workers: Host) -> None:
        """Wait until these workers and the head, and no others, live."""
        wanted = {host.address for host in (self.head, *workers)}
        wait_until(
            lambda: set(self.nodes()) == wanted,
            f"the nodes {', '.join(sorted(wanted))}",
            seconds=SECONDS_TO_START,
            every=2.0,
        )

    def submit(self, log: str, *command: str, variables: Mapping[str, str] | None = None) -> "Job":
        """Submit a job; what it prints is appended to the log of that name."""
        runtime = json.dumps({"env_vars": dict(variables or {})})
        words = [
            *(BIN / "ray", "job", "submit", "--address", DASHBOARD, "--working-dir", "."),
            *("--runtime-env-json", runtime, "--", *command),
        ]
        return Job(cluster=self, words=list(map(str, words)), log=self.log(log))

    def _adapted(self) -> dict[str, Any]:
        """Return the settings of deploy/local.yaml for this room."""
        settings = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
        settings["provider"] |= {
            "head_ip": self.head.address,
            "worker_ips": [host.address for host in self.workers],
        }
        settings["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.room.key)}
        settings |= {"min_workers": len(self.workers), "max_workers": len(self.workers)}
        settings["file_mounts"]["~/scribbleseg/wheels"] = str(self.room.folder / "dist")
        variables = "".join(f" {key}={value}" for key, value in self.environment.items())
        for kind, cpus in (("head", self.head_cpus), ("worker", 1)):
            settings[f"{kind}_start_ray_commands"] = [
                command.replace("RAY_AUTH_MODE=token", f"RAY_AUTH_MODE=token{variables}").replace(
                    "ray start", f"ray start --num-cpus={cpus}"
                )
                for command in settings[f"{kind}_start_ray_commands"]
            ]
        return settings


@dataclass(kw_only=True)
class Job:
    """A submitted job, followed to its end; submitted again while the cluster cannot take it."""

    cluster: Cluster
    words: list[str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    began: int = field(init=False)

    def __post_init__(self) -> None:
        """Submit it."""
        self._submit()

    def _submit(self) -> None:
        self.cluster.open_tunnel()
        self.began = self.log.stat().st_size if self.log.exists() else 0
        self.process = self.cluster.desk.start(*self.words, log=self.log, cwd=self.cluster.project)

    def said(self) -> str:
        """Return what it has printed since it was submitted."""
        with self.log.open("rb") as stream:
            stream.seek(self.began)
            return stream.read().decode(errors="replace")

    def is_running(self) -> bool:
        """Say whether it has not ended yet."""
        if self.process.poll() is None:
            return True
        said = self.said()
        if "submitted successfully" in said or not any(reason in said for reason in NOT_YET):
            return False
        self._submit()
        return True

    def wait(self, seconds: float = 600) -> bool:
        """Wait for its end; return whether it succeeded."""
        wait_until(
            lambda: not self.is_running(), f"the end of {self.log.stem}", seconds=seconds, every=1
        )
        return self.process.returncode == 0 and "succeeded" in self.said()

    def expect(self, seconds: float = 600) -> None:
        """Wait for its success.

        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        if not self.wait(seconds):
            raise RuntimeError(f"{self.log.stem} failed\n{self.said()[-4000:]}")


@contextmanager
def open_cluster(
    workers: Sequence[str],
    *,
    head_cpus: int,
    off: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Generator[Cluster]:
    """Make the hosts of a cluster, and a wheel for them; nothing of Ray runs yet.

    Args:
        workers: Names of the cluster's hosts besides the head.
        head_cpus: CPUs of the head that jobs may use (0 or more).
        off: Those of the workers that stay turned off at first.
        environment: What Ray's processes see besides their usual.
    """
    with open_room(["desk", "head", *workers]) as room:
        (room.folder / "logs").mkdir()
        project = room.folder / "project"
        subprocess.run(
            ["rsync", "--archive", "--exclude=.git", "--filter=:- .gitignore"]
            + [f"{ROOT}/", f"{project}/"],
            check=True,
        )
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(project)]
            + ["--no-build-isolation", "--wheel-dir", str(room.folder / "dist")],
            check=True,
        )
        for name in (name for name in room.hosts if name not in off):
            room.boot(name)
        desk = room.hosts["desk"]
        desk.environment = {
            "PYTHONPATH": str(project),
            "RAY_AUTH_MODE": "token",
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
        }
        desk.run(BIN / "ray", "get-auth-token", "--generate")
        yield Cluster(
            room=room,
            desk=desk,
            head=room.hosts["head"],
            workers=[room.hosts[name] for name in workers],
            head_cpus=head_cpus,
            environment=environment or {},
        )
