"""A real Slurm cluster of several nodes on one machine: started, broken, stopped.

A node is an idle process that leads a network, PID, mount and host name namespace of
its own; all that runs on the node dies with it. So does the controller's machine.
Nodes share the machine's files and user, and end with the process that made them.
Needs root, slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CONTROLLER = "ctl"
SETTINGS = {
    "SlurmUser": "root",
    "StateSaveLocation": "{root}/spool/ctl",
    "SlurmctldPidFile": "{root}/run/slurmctld.pid",
    "SlurmctldLogFile": "{root}/log/slurmctld.log",
    "SlurmdSpoolDir": "{root}/spool/%n",
    "SlurmdPidFile": "{root}/run/slurmd.%n.pid",
    "SlurmdLogFile": "{root}/log/slurmd.%n.log",
    # a machine of 2 cores and no GPU passes for nodes of many
    "SlurmdParameters": "config_overrides",
    "GresTypes": "gpu",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/linux",
    "JobAcctGatherFrequency": "1",
    "JobAcctGatherParams": "OverMemoryKill",
    "MailProg": "/bin/true",
    # soon, where the defaults suit large clusters
    "SchedulerParameters": "sched_interval=1,bf_interval=1",
    "KillWait": "5",
    "SlurmdTimeout": "10",
    "MessageTimeout": "5",
    "MinJobAge": "300",
    # a node that comes back is used again; a job whose node died is queued again
    "ReturnToService": "2",
    "JobRequeue": "1",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
}
PARTITIONS = [
    "gpu Default=YES PriorityTier=1 PreemptMode=REQUEUE",
    "cancel PriorityTier=1 PreemptMode=CANCEL",
    "high PriorityTier=10 PreemptMode=OFF",
    "short PriorityTier=1 MaxTime=5",
]
MEMORY = Path("/sys/fs/cgroup/memory")
KERNEL_SETTINGS = {
    "TaskPlugin": "task/cgroup",
    "JobAcctGatherParams": "NoOverMemoryKill",
}
"""Where the kernel has this controller (cgroups v1), it watches over jobs' memory."""

CREDENTIAL_SECONDS = 5
"""A requeued job waits until its old credential cannot be used; Slurm's default: 120."""


class ClusterError(Exception):
    """The cluster, or a job on it, did not do what was waited for."""


class IndexTaken(ClusterError):
    """A cluster of this index runs, of another process."""


def missing() -> str:
    """Why this machine cannot have a cluster; empty if it can."""
    if os.geteuid() != 0:
        return "Slurm's nodes need root"
    tools = ["slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter"]
    if lacking := [tool for tool in tools if not shutil.which(tool)]:
        return f"not installed: {', '.join(lacking)}"
    with tempfile.TemporaryDirectory() as folder:
        alone = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork"]
        tries = [
            [*alone, "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", folder],
            [*alone, "ip", "link", "add", "probe", "type", "bridge"],
            [*alone, "ip", "link", "add", "probe", "type", "veth"],
            ["mknod", f"{folder}/gpu", "c", "1", "3"],
            # reading tells a file system that refuses devices
            ["head", "-c", "1", f"{folder}/gpu"],
            ["ip", "netns", "add", f"sl-{os.getpid()}"],
            ["ip", "netns", "delete", f"sl-{os.getpid()}"],
        ]
        for words in tries:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(words)}: {done.stderr.strip()}"
    return ""


def take(index: int) -> socket.socket:
    """Hold an index; the kernel frees it when this process ends."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0slurm-test-cluster-{index}")
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise IndexTaken(f"another process has a cluster of index {index}") from None
    return lock


def sweep(index: int) -> None:
    """Remove what a cluster of this index left: processes, namespaces, links."""
    prefix = f"sl{index}-"
    for path in Path("/run/netns").glob(f"{prefix}*"):
        remove(path.name)
    call("ip", "link", "delete", f"brsl{index}", check=False)
    for top in MEMORY.glob(f"{prefix}*"):
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)


def remove(space: str) -> None:
    poll(lambda: not kill_inside(space), 30)
    call("ip", "link", "delete", space, check=False)
    call("ip", "netns", "delete", space)


def inside(space: str) -> list[int]:
    """The processes in a network namespace."""
    wanted = os.stat(f"/run/netns/{space}")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(folder / "ns/net"), wanted):
                    found.append(int(folder.name))
    return found


def kill_inside(space: str) -> list[int]:
    found = inside(space)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def poll(what: Callable[[], T], seconds: float) -> T:
    """Call until the answer is true, and give it back. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {seconds:g} s; last: {answer!r}")
        time.sleep(0.1)
    return answer


def call(
    *words: str,
    env: dict[str, str] | None = None,
    check: bool = True,
    seconds: float = 120,
) -> str:
    """Run a command; what it prints. Raises ClusterError where it fails."""
    done = subprocess.run(
        words,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if check and done.returncode:
        raise ClusterError(f"{' '.join(words)}: exit {done.returncode}: {done.stdout}")
    return done.stdout


class Machine:
    """One machine of a cluster: its namespaces, and a link to the cluster's bridge."""

    def __init__(self, name: str, space: str, address: str, root: Path) -> None:
        self.name, self.space, self.address, self.root = name, space, address, root
        self.power: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def wire(self, bridge: str) -> None:
        call("ip", "netns", "add", self.space)
        call(
            "ip", "link", "add", self.space, "type", "veth",
            "peer", "name", "eth0", "netns", self.space,
        )  # fmt: skip
        call("ip", "link", "set", self.space, "master", bridge)
        for words in ("addr add {}/24 dev eth0", "link set eth0 up", "link set lo up"):
            call("ip", "-n", self.space, *words.format(self.address).split())

    def boot(self) -> None:
        """Start the leader. It ends with its standard input, so with this process."""
        call("ip", "link", "set", self.space, "up")
        log = self.root / f"log/{self.name}.log"
        enter = ["nsenter", f"--net=/run/netns/{self.space}"]
        split = ["unshare", "--uts", "--mount", "--propagation", "slave"]
        split += ["--pid", "--fork", "--mount-proc"]
        # it takes in orphans: those of a parent that ignores CHLD leave no zombies
        leader = ["env", "--ignore-signal=CHLD", "cat"]
        with log.open("ab") as output:
            self.power = subprocess.Popen(
                [*enter, *split, *leader],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        children = Path(f"/proc/{self.power.pid}/task/{self.power.pid}/children")
        self.leader = int(poll(children.read_text, 10).split()[0])
        # `cat` is there when its namespaces are
        comm = Path(f"/proc/{self.leader}/comm")
        poll(lambda: comm.read_text() == "cat\n", 10)
        self.call("hostname", self.name)
        self.call("mount", "--bind", str(self.root / "etc/hosts"), "/etc/hosts")
        if Path("/etc/slurm").is_dir():  # where Slurm looks without SLURM_CONF
            self.call("mount", "--bind", str(self.root / "etc"), "/etc/slurm")

    def cut(self) -> None:
        """Power off: no packet leaves, and every process is killed."""
        if self.power is None:
            return
        call("ip", "link", "set", self.space, "down", check=False)
        if self.power.stdin:
            self.power.stdin.close()
        if self.leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)
        # done when the kernel has reaped all processes of the PID namespace
        self.power.wait(30)
        self.power, self.leader = None, 0

    def call(self, *words: str, env: dict[str, str] | None = None) -> str:
        """Run a command on this machine."""
        if self.power is None:
            raise ClusterError(f"{self.name} is down")
        enter = ["nsenter", f"--target={self.leader}", "--all", "--wd=/"]
        return call(*enter, *words, env=env)


class Cluster:
    """Slurm with nodes n1, n2, ...; `index` tells clusters of one machine apart."""

    def __init__(
        self,
        root: Path,
        nodes: int = 2,
        gpus: int = 8,
        cpus: int = 8,
        memory_mb: int = 8000,
        settings: dict[str, str] | None = None,
        partitions: list[str] | None = None,
        index: int = 1,
    ) -> None:
        if not 1 <= index <= 150:
            raise ValueError(f"index {index} is not in 1..150")
        if len(str(root)) > 60:
            raise ValueError(f"{root} is too long: Slurm's sockets are below it")
        self.root, self.index = root, index
        self.gpus, self.cpus, self.memory_mb = gpus, cpus, memory_mb
        self.kernel_memory = os.access(MEMORY / "memory.limit_in_bytes", os.W_OK)
        kernel = KERNEL_SETTINGS if self.kernel_memory else {}
        self.settings = SETTINGS | kernel | (settings or {})
        self.partitions = PARTITIONS if partitions is None else partitions
        self.env = {"SLURM_CONF": str(root / "etc/slurm.conf")}
        self.bridge = f"brsl{index}"
        self.network = f"10.{77 + index}.0"
        self.controller = self.machine(CONTROLLER, 2)
        names = [f"n{number}" for number in range(1, nodes + 1)]
        self.nodes = {
            name: self.machine(name, 10 + number)
            for number, name in enumerate(names, start=1)
        }
        self.lock: socket.socket | None = None

    def machine(self, name: str, number: int) -> Machine:
        space = f"sl{self.index}-{name}"
        return Machine(name, space, f"{self.network}.{number}", self.root)

    # ---- the whole ---------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until all nodes are idle.

        Raises IndexTaken where another process has a cluster of this index.
        """
        self.lock = take(self.index)
        try:
            sweep(self.index)
            self.write_files()
            call("ip", "link", "add", self.bridge, "type", "bridge")
            call("ip", "addr", "add", f"{self.network}.1/24", "dev", self.bridge)
            call("ip", "link", "set", self.bridge, "up")
            for machine in [self.controller, *self.nodes.values()]:
                machine.wire(self.bridge)
            self.controller.boot()
            self.call(
                self.controller, "munged", "--force",
                f"--socket={self.root}/run/munge.socket",
                f"--key-file={self.root}/munge/key",
                f"--seed-file={self.root}/munge/seed",
                f"--pid-file={self.root}/run/munged.pid",
                f"--log-file={self.root}/log/munged.log",
            )  # fmt: skip
            self.start_controller()
            for name in self.nodes:
                self.boot_node(name)
            self.wait(lambda: all(map(self.is_up, self.nodes)))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything, jobs too; the files below the root stay."""
        for machine in [*self.nodes.values(), self.controller]:
            machine.cut()
        if self.lock:
            sweep(self.index)
            self.lock.close()
            self.lock = None

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def write_files(self) -> None:
        for folder in ("etc", "run", "log", "spool/ctl", "dev", "munge"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        key = self.root / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        key.parent.chmod(0o700)
        for number in range(self.gpus):
            device = self.root / f"dev/nvidia{number}"
            if not device.exists():
                call("mknod", str(device), "c", "1", "3")
        (self.root / "etc/hosts").write_text(
            f"127.0.0.1 localhost\n{self.network}.1 {socket.gethostname()}\n"
            + "".join(
                f"{machine.address} {machine.name}\n"
                for machine in [self.controller, *self.nodes.values()]
            )
        )
        gpus = f"gpu:h200:{self.gpus}" if self.gpus else ""
        settings = {
            "ClusterName": f"test{self.index}",
            "SlurmctldHost": f"{CONTROLLER}({self.controller.address})",
            "AuthInfo": f"socket={self.root}/run/munge.socket"
            f",cred_expire={CREDENTIAL_SECONDS}",
            "DefMemPerCPU": str(self.memory_mb // self.cpus),
        } | self.settings
        lines = [
            f"{key}={value}".replace("{root}", str(self.root))
            for key, value in settings.items()
        ]
        lines += [
            f"NodeName={node.name} NodeAddr={node.address} CPUs={self.cpus} "
            f"Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 "
            f"RealMemory={self.memory_mb} Gres={gpus}"
            for node in self.nodes.values()
        ]
        lines += ["PartitionName=DEFAULT Nodes=ALL MaxTime=1-0 State=UP"]
        lines += [f"PartitionName={line}" for line in self.partitions]
        (self.root / "etc/slurm.conf").write_text("\n".join(lines) + "\n")
        (self.root / "etc/cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n"
        )
        devices = f"{self.root}/dev/nvidia[0-{self.gpus - 1}]"
        (self.root / "etc/gres.conf").write_text(
            f"AutoDetect=off\nName=gpu Type=h200 File={devices}\n" if self.gpus else ""
        )

    # ---- Slurm's commands --------------------------------------------------------

    def run(self, *words: str, check: bool = True, seconds: float = 120) -> str:
        """Run a command as a user of the cluster, outside the nodes; what it prints."""
        env = {**os.environ, **self.env}
        return call(*words, env=env, check=check, seconds=seconds)

    def call(self, machine: Machine, *words: str) -> str:
        return machine.call(*words, env={"PATH": os.environ["PATH"], **self.env})

    def on(self, node: str, *words: str) -> str:
        """Run a command on a node, in its namespaces."""
        return self.call(self.nodes[node], *words)

    def submit(self, *words: str) -> str:
        """`sbatch` with these words; the job's id."""
        return self.run("sbatch", "--parsable", *words).strip().split(";")[0]

    def jobs(self) -> list[dict[str, str]]:
        """All jobs Slurm remembers: id, name, state, node, comment."""
        keys = {"id": "%i", "name": "%j", "state": "%T", "node": "%N", "comment": "%k"}
        form = "\t".join(keys.values())
        text = self.run("squeue", "--states=all", "--noheader", f"--format={form}")
        text = text.replace("(null)", "")
        rows = [line.split("\t") for line in text.splitlines()]
        return [dict(zip(keys, row, strict=True)) for row in rows]

    def job(self, id: str) -> dict[str, str]:
        """All that `scontrol show job` says of one job."""
        text = self.run("scontrol", "show", "job", "--oneliner", id)
        return dict(word.partition("=")[::2] for word in text.split())

    def state(self, node: str) -> str:
        """A node's state as sinfo says it: idle, mixed, allocated, down*, ..."""
        words = ["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T"]
        return self.run(*words, check=False).partition("\n")[0].strip()

    def is_up(self, node: str) -> bool:
        """Whether Slurm uses a node; other states are down*, unknown, drained, ..."""
        # an idle node may stay `mixed` in sinfo after the controller was away
        return self.state(node) in ("idle", "mixed", "allocated", "completing")

    def wait(self, what: Callable[[], T], seconds: float = 60) -> T:
        """Call until the answer is true, and give it back."""
        try:
            return poll(what, seconds)
        except TimeoutError as error:
            raise ClusterError(f"{error}\n{self.report()}") from None

    def wait_state(
        self, job_id: str, *states: str, seconds: float = 60
    ) -> dict[str, str]:
        """Wait until a job is in one of the states; the job."""

        def look() -> dict[str, str]:
            found = [job for job in self.jobs() if job["id"] == job_id]
            return found[0] if found and found[0]["state"] in states else {}

        return self.wait(look, seconds)

    def report(self) -> str:
        """What to look at when something did not happen."""
        log = self.root / "log/slurmctld.log"
        tail = (
            log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
        )
        queue = self.run("squeue", "--states=all", check=False)
        nodes = self.run("sinfo", "--Node", "--long", check=False)
        return "\n".join([queue, nodes, *tail])

    # ---- faults ------------------------------------------------------------------

    def kill_node(self, node: str) -> None:
        """Cut a node's power: all its processes die at once, without a packet."""
        self.nodes[node].cut()

    def start_node(self, node: str) -> None:
        """Boot a node that was killed, and wait until Slurm uses it."""
        self.boot_node(node)
        self.wait(lambda: self.is_up(node))

    def boot_node(self, node: str) -> None:
        self.nodes[node].boot()
        if self.kernel_memory:
            own = MEMORY / self.nodes[node].space
            own.mkdir(exist_ok=True)
            self.on(node, "mount", "--bind", str(own), str(MEMORY))
        # -b: Slurm shall know that what ran before is gone
        self.on(node, "slurmd", "-b", "-N", node)

    def stop_controller(self) -> None:
        """End slurmctld; it saves its state first."""
        pid = (self.root / "run/slurmctld.pid").read_text().strip()
        self.call(self.controller, "kill", pid)
        follow = ["tail", "--follow", "--sleep-interval=0.1", f"--pid={pid}"]
        self.call(self.controller, *follow, "/dev/null")

    def start_controller(self) -> None:
        """Start slurmctld from the saved state, and wait until it answers."""
        self.call(self.controller, "slurmctld")
        self.wait(lambda: "is UP" in self.run("scontrol", "ping", check=False))

    def hide(self, node: str, path: Path) -> None:
        """Cover a path with an empty folder on one node, until unhide or a boot."""
        if self.root.is_relative_to(path):
            raise ValueError(f"{path} holds the cluster's own files")
        self.on(node, "mount", "-t", "tmpfs", "hidden", str(path))

    def unhide(self, node: str, path: Path) -> None:
        self.on(node, "umount", "--lazy", str(path))

    def expire(self, job_id: str, seconds: int = 3) -> None:
        """Let a running job reach its time limit so soon.

        Slurm looks every 30 s: it is killed 0 to 30 s after its limit, and `--signal`
        comes up to 30 s early. What is already over when it hears of it, it refuses.
        """
        self.run(
            "scontrol", "update", f"JobId={job_id}", f"EndTime=now+{max(3, seconds)}"
        )

    def repair(self) -> None:
        """Undo the faults, and cancel all jobs."""
        if "is UP" not in self.run("scontrol", "ping", check=False):
            self.start_controller()
        for name, node in self.nodes.items():
            if node.power is None:
                self.start_node(name)
            # newest first: a path may have been hidden twice
            for mount in reversed(self.on(name, "cat", "/proc/mounts").splitlines()):
                if mount.startswith("hidden "):
                    self.unhide(name, Path(mount.split()[1]))
        self.run("scancel", "--user=root", check=False)
        self.wait(lambda: not self.run("squeue", "--noheader").strip())
        self.wait(lambda: all(map(self.is_up, self.nodes)))

    def processes(self, node: str) -> list[int]:
        """A node's processes, by their ids on this machine; not the idle one."""
        machine = self.nodes[node]
        return [pid for pid in inside(machine.space) if pid != machine.leader]
