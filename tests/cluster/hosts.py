"""Hosts on one machine, each with its own address, processes, home and sshd.

A room is a set of Linux namespaces with a bridge and a shared disk in it; a host is a further set
inside, on the bridge. Nothing is set up outside, so the kernel takes all of it down with the room's
first process; a guard kills that process and removes the files, even if Python was killed.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
TOOLS = ("unshare", "nsenter", "ip", "bridge", "sshd", "ssh", "ssh-keygen", "rsync")
SHARED_MEGABYTES = 200

ROOM = """
set -e
ip link add br0 type bridge
ip link set br0 up
mount -t tmpfs -o size={megabytes}m tmpfs {folder}/shared
touch {folder}/ready
exec sleep infinity
"""

# An own `pip` and `ray` for the environment that deploy/local.yaml looks for: hosts have no
# internet, so all packages but this one are those of the Python that runs this.
HOST = """
set -e
hostname {name}
mount --bind {folder}/ray /tmp/ray
mount -t overlay overlay -o lowerdir=$HOME,upperdir={folder}/home,workdir={folder}/work $HOME
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mkdir -p /run/sshd
# As distributions ship it for users, and not for root.
grep -qs .local/bin $HOME/.profile || echo 'PATH=$HOME/.local/bin:$PATH' >> $HOME/.profile
ip link set lo up
while ! ip link show eth0 > {folder}/wait 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {gateway}
venv=$HOME/scribbleseg/venv
if ! test -x $venv/bin/python; then
    {python} -m venv --without-pip $venv
    echo {site} > $venv/lib/python{version}/site-packages/others.pth
    printf '#!/bin/sh\\nexec %s/bin/python -m pip "$@"\\n' $venv > $venv/bin/pip
    printf '#!%s/bin/python\\n%s\\n' $venv 'from ray.scripts.scripts import main; main()' \\
        > $venv/bin/ray
    chmod +x $venv/bin/pip $venv/bin/ray
fi
touch {folder}/ready
exec {sshd} -D -e -f {room}/sshd_config
"""

SSHD = """
HostKey {room}/host_key
AuthorizedKeysFile {room}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 100
Subsystem sftp internal-sftp
"""

# Waits for the end of its input, which comes with the end of Python, however that ends. Then it
# kills the room's first process, the child of $1, and with it all others.
GUARD = """
cat > /dev/null
kill -9 $(cat /proc/$1/task/$1/children) || kill -9 $1
while kill -0 $1; do sleep 0.1; done
rm -rf "$2"
"""


def missing() -> str | None:
    """Return why hosts cannot be made on this machine, in one line; None: they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    lacking = [tool for tool in TOOLS if find(tool) is None]
    if lacking:
        return f"{', '.join(lacking)}: not installed (openssh-server, rsync, iproute2, util-linux)"
    trial = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "ip", "link", "add", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    if trial.returncode:
        return f"no right to make namespaces and bridges ({trial.stderr.strip()})"
    return None


def find(tool: str) -> str | None:
    """Return the path of a tool; those of the administrator are often on no PATH."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def wait_until(
    condition: Callable[[], object], what: str, *, seconds: float = 120.0, every: float = 0.1
) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(every)


def first_process(unshare: subprocess.Popen[bytes]) -> int:
    """Return the first process of the namespaces that an `unshare` has made: its last descendant.

    `nsenter`, which may stand before it, and `unshare` both have one child.
    """
    pid, found = unshare.pid, unshare.pid
    # What the first process itself has started may be gone again at any moment.
    with contextlib.suppress(FileNotFoundError):
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])
            if os.readlink(f"/proc/{pid}/ns/pid") != os.readlink(f"/proc/{found}/ns/pid"):
                found = pid
    return found


def enter(pid: int, *namespaces: str) -> list[str]:
    """Return the beginning of a command that runs in the namespaces of a process."""
    return ["nsenter", f"--target={pid}", *(f"--{name}" for name in namespaces)]


@dataclass(kw_only=True)
class Host:
    """A machine of the room."""

    name: str
    address: str
    folder: Path
    pid: int = 0
    """Its first process; 0: it is off."""
    environment: dict[str, str] = field(default_factory=dict)
    """What its commands see besides PATH and HOME."""
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """What was started here: the host itself, and commands."""

    def command(self, *words: str | Path, cwd: Path = ROOT) -> list[str]:
        """Return the command that runs `words` on this host."""
        environment = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            "LANG": "C.UTF-8",
            **self.environment,
        }
        return [
            *enter(self.pid, "mount", "uts", "ipc", "net", "pid"),
            *("env", "-i", *(f"{key}={value}" for key, value in environment.items())),
            *("sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *map(str, words)),
        ]

    def run(self, *words: str | Path, check: bool = True, timeout: float = 300) -> str:
        """Run a command to its end; return what it printed.

        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            shown = shlex.join(map(str, words))
            raise RuntimeError(
                f"{self.name}: {shown} ended with {done.returncode}\n{done.stdout[-4000:]}"
            )
        return done.stdout

    def start(self, *words: str | Path, log: Path, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        """Start a command that runs beside; what it prints goes to a file."""
        with log.open("ab") as stream:
            process = subprocess.Popen(
                self.command(*words, cwd=cwd),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.children.append(process)
        return process


@dataclass(kw_only=True)
class Room:
    """A network with a shared disk, and the hosts on it."""

    folder: Path
    """Its files; hosts see them under the same path."""
    pid: int
    """Its first process."""
    hosts: dict[str, Host]

    @property
    def shared(self) -> Path:
        """A small disk that all hosts mount, as they see it."""
        return self.folder / "shared"

    @property
    def key(self) -> Path:
        """The SSH key that opens every host."""
        return self.folder / "key"

    def outside(self, path: Path) -> Path:
        """Return where a path of the hosts' shared disk is found from outside the room."""
        return Path(f"/proc/{self.pid}/root{path}")

    def ip(self, *words: str, tool: str = "ip", check: bool = True) -> None:
        """Run `ip`, or `bridge`, on the room's network."""
        subprocess.run(
            [*enter(self.pid, "net"), str(find(tool)), *words],
            check=check,
            stderr=None if check else subprocess.DEVNULL,
        )

    def boot(self, name: str) -> Host:
        """Turn a host on; what its disk held before is still there, but for /tmp/ray."""
        host = self.hosts[name]
        for part in ("home", "work"):
            (host.folder / part).mkdir(parents=True, exist_ok=True)
        # As Debian has it: a host's own name leads to its loopback, and to nobody else.
        (host.folder / "hosts").write_text(
            f"127.0.0.1 localhost\n127.0.1.1 {name}\n"
            + "".join(f"{o.address} {o.name}\n" for o in self.hosts.values() if o is not host)
        )
        shutil.rmtree(host.folder / "ray", ignore_errors=True)
        (host.folder / "ray").mkdir()
        for mark in ("wait", "ready"):
            (host.folder / mark).unlink(missing_ok=True)
        script = HOST.format(
            name=name,
            folder=host.folder,
            room=self.folder,
            address=host.address,
            gateway=f"{NETWORK}.1",
            python=sys.executable,
            site=sysconfig.get_path("purelib"),
            version=sysconfig.get_python_version(),
            sshd=find("sshd"),
        )
        separate = ("--mount", "--net", "--pid", "--uts", "--ipc", "--mount-proc")
        with (host.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *enter(self.pid, "mount", "pid"),
                    *("unshare", "--fork", "--kill-child", *separate, "sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        host.children.append(process)
        wait_until(lambda: (host.folder / "wait").exists(), f"{name}'s first process", seconds=30)
        host.pid = first_process(process)
        port = port_of(host)
        # Always the same hardware address, which the other hosts may remember.
        mac = "02:" + ":".join(f"{int(part):02x}" for part in ("0", *host.address.split(".")))
        self.ip(
            *("link", "add", port, "type", "veth"),
            *("peer", "name", "eth0", "address", mac, "netns", str(host.pid)),
        )
        self.ip("link", "set", port, "master", "br0", "up")
        wait_until(lambda: (host.folder / "ready").exists(), f"{name} to be up", seconds=60)
        return host

    def kill(self, host: Host) -> None:
        """Turn a host off, as a power cut would: all its processes end at once."""
        os.kill(host.pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{host.pid}").exists(), f"the end of {host.name}")
        host.pid = 0
        # The kernel takes it away too, but when it likes.
        self.ip("link", "delete", port_of(host), check=False)

    def cut(self, *hosts: Host) -> None:
        """Drop all packets between these hosts; others still reach them."""
        for host in hosts:
            self.ip("link", "set", "dev", port_of(host), "isolated", "on", tool="bridge")

    def mend(self, *hosts: Host) -> None:
        """Undo `cut`."""
        for host in hosts:
            self.ip("link", "set", "dev", port_of(host), "isolated", "off", tool="bridge")

    def unplug(self, host: Host) -> None:
        """Drop all packets from and to a host."""
        self.ip("link", "set", port_of(host), "down")

    def plug(self, host: Host) -> None:
        """Undo `unplug`."""
        self.ip("link", "set", port_of(host), "up")


def port_of(host: Host) -> str:
    """Return the name of the host's port on the bridge."""
    return f"to-{host.name}"


@contextmanager
def open_room(names: Sequence[str]) -> Generator[Room]:
    """Make a room with hosts of these names, all turned off; it is gone after the block."""
    # Not below /tmp: /tmp/ray is each host's own.
    folder = Path(tempfile.mkdtemp(prefix="room-", dir="/var/tmp"))
    (folder / "shared").mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)
    hosts = {
        name: Host(name=name, address=f"{NETWORK}.{number}", folder=folder / name)
        for number, name in enumerate(names, start=1)
    }
    (folder / "sshd_config").write_text(SSHD.format(room=folder))
    for key in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / key],
            check=True,
        )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--fork", "--kill-child", "--mount", "--net", "--pid", "--mount-proc"]
            + ["sh", "-c", ROOM.format(folder=folder, megabytes=SHARED_MEGABYTES)],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "guard", str(process.pid), str(folder)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A Ctrl-C is Python's to act on; the guard sees the end of its input.
        start_new_session=True,
    )
    try:
        wait_until(lambda: (folder / "ready").exists(), "the room", seconds=30)
        yield Room(folder=folder, pid=first_process(process), hosts=hosts)
    finally:
        if guard.stdin is not None:
            guard.stdin.close()
        for child in (
            process,
            guard,
            *(child for host in hosts.values() for child in host.children),
        ):
            child.wait()
