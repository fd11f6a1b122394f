"""Start a stage's script where its placement says.

The runner asks `command` for a command line: the script as it is, or under torchrun,
or beside Ray; on this machine or, by srun, on each of a Slurm job's; in a container or
not. What has to be done on each machine itself is this module's own command line:

    python -m scripts.lib.launch torchrun --hosts n1,n2 --port 12000 --processes 8 \\
        -- -P -m scripts.transformers.sft ...
    python -m scripts.lib.launch ray --hosts n1,n2 --port 12000 --cpus 16 --gpus 8 \\
        --memory-gb 64 --logs work/grpo/x/ray -- -P -m scripts.nemo_rl.grpo ...

What follows `--` is what Python is called with. In a container that Python is the
image's, so this module imports the standard library alone.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib.util
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.lib.errors import UserError

LIBC = ctypes.CDLL(None)
ENTRY = ["-P", "-m", "scripts.lib.launch"]
TORCHRUN = ["-P", "-m", "torch.distributed.run"]

PASSED = (
    *("PYTHON", "OMP_", "GOMP_", "HF_", "TOKENIZERS_PARALLELISM"),
    *("NCCL_", "NVTE_", "TORCHINDUCTOR_", "TRITON_"),
)
"""Variables set in containers too where an image sets them otherwise: how they begin."""
NOT_PASSED = {"PYTHONHOME", "PYTHONEXECUTABLE", "HF_TOKEN"}
"""Of those: the host's Python, and what must not be read from a process list."""
OF_PYXIS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Pyxis sets these in PyTorch's images, for tasks that are ranks; ours are not."""

FIRST_PORT, PORTS, BLOCKS = 10000, 1000, 22
"""Ports of jobs, in blocks below 32768, where the kernel takes ports of its own."""
OFFSETS = {
    "node-manager-port": 1,
    "object-manager-port": 2,
    "runtime-env-agent-port": 3,
    "dashboard-agent-listen-port": 4,
    "dashboard-agent-grpc-port": 5,
    "metrics-export-port": 6,
}
"""Ray's ports in a block; the head's own is its first, or torchrun's."""
DASHBOARD_PORT, CLIENT_PORT, WORKER_PORTS = 7, 8, 20

OBJECTS = 0.3
"""Share of the memory for Ray's objects, as Ray itself would take of a whole machine."""

OPEN_FILES = 65536
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LOOK_SECONDS = 0.3
READY_SECONDS = 600
"""For all machines' Ray to be there; their containers have started by then."""
STOP_SECONDS = 10
"""For a script to end when Slurm ends the job; then there must be time to clean up."""
KILL_SECONDS = 10

WAIT = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.2)
"""


def command(
    words: list[str],
    *,
    launcher: str,
    placement: Mapping[str, Any],
    work: Path,
    environ: Mapping[str, str],
    python: str = sys.executable,
) -> list[str]:
    """The command line that runs `python *words` as the placement says.

    `environ` is what it will be run with; of it, what containers would change is
    repeated in the command line, and their Python is the image's. Raises UserError for what cannot
    be run here.
    """
    nodes, processes = placement["nodes"], placement["processes"]
    container = placement.get("container") or {}
    runtime = container.get("runtime", "none")
    by_srun = nodes > 1 or runtime == "pyxis"
    if nodes > 1 and not launcher:
        raise UserError(
            f"placement.nodes {nodes}", "this stage runs on one machine", "set nodes: 1"
        )
    if by_srun and "SLURM_JOB_ID" not in environ:
        what = f"placement.nodes {nodes}" if nodes > 1 else "container.runtime pyxis"
        raise UserError(
            what, "this is no Slurm job", "use --profile slurm, or one machine"
        )
    hosts = hosts_of_job(nodes, environ) if nodes > 1 else []
    if runtime != "none":
        python = "python"
    several = ["--hosts", ",".join(hosts)] if hosts else []
    if launcher == "ray":
        flags = [*several, "--port", str(free_ports(first_block(environ)))]
        for name in ("cpus", "gpus", "memory_gb"):
            flags += [f"--{name.replace('_', '-')}", str(placement[name])]
        line = [python, *ENTRY, "ray", *flags, "--logs", str(work / "ray"), "--"]
    elif launcher == "torchrun" and nodes > 1:
        flags = [*several, "--port", str(free_ports(first_block(environ)))]
        flags += ["--processes", str(processes)]
        line = [python, *ENTRY, "torchrun", *flags, "--"]
    elif launcher == "torchrun" and processes > 1:
        # without an address it would look its own name up, which may lead elsewhere
        flags = ["--standalone", "--local-addr=127.0.0.1"]
        flags += [f"--nproc-per-node={processes}"]
        line = [python, *TORCHRUN, *flags, "--no-python", python]
    else:
        line = [python]
    if runtime != "none":
        line = [*variables(container, environ), *line]
    if runtime == "apptainer":
        line = [*apptainer(container, placement["gpus"], environ), *line]
    if by_srun:
        srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}"]
        srun += ["--ntasks-per-node=1", f"--cpus-per-task={placement['cpus']}"]
        srun += ["--kill-on-bad-exit=1"]  # the others would wait for a dead one
        srun += ["--export=ALL"]  # also where sbatch was told not to
        line = [*srun, *(pyxis(container) if runtime == "pyxis" else []), *line]
    return [*line, *words]


def hosts_of_job(nodes: int, environ: Mapping[str, str]) -> list[str]:
    """Names of a Slurm job's machines; the batch script runs on the first.

    In a container there is no scontrol to ask.
    """
    from scripts.lib import slurm

    named = slurm.ask("scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"])
    hosts = named.split()
    if len(hosts) < nodes:
        raise UserError(
            f"placement.nodes {nodes}",
            f"job {environ['SLURM_JOB_ID']} has {len(hosts)}: {', '.join(hosts)}",
            "submit it anew: what a job was given stays",
        )
    return hosts[:nodes]


# ---- containers ----------------------------------------------------------------


def image(container: Mapping[str, Any]) -> str:
    """The image; a file by its whole path.

    Apptainer knows other places by their scheme, Pyxis files by their first character.
    """
    runtime, name = container["runtime"], container.get("image")
    if not name:
        raise UserError(
            "container.image", f"not set, with container.runtime {runtime}", "name one"
        )
    if runtime == "apptainer":
        is_file = not re.match(r"[a-z-]+:", name)
    else:
        is_file = name.startswith(("/", ".")) or name.endswith(".sqsh")
    if not is_file:
        return str(name)
    if not Path(name).exists():
        raise UserError(
            f"container.image {name}",
            "no such file",
            "name one that all machines see, or a registry's docker://name:tag",
        )
    return str(Path(name).absolute())


def mounts(container: Mapping[str, Any]) -> list[str]:
    """What is mounted: the project at its own place, and what was asked for."""
    return [f"{Path.cwd()}:{Path.cwd()}", *container.get("mounts", [])]


def variables(container: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """`env` with what the script needs set: images' own values would win.

    Neither `apptainer --env`, which splits at commas, nor `--container-env` of Pyxis,
    which takes names only, can say all of it.
    """
    values = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(PASSED) and name not in NOT_PASSED
    }
    values["PYTHONNOUSERSITE"] = "1"  # ~/.local is another Python's
    code = environ.get("PYTHONPATH")
    values |= container.get("environment", {})
    if code and values["PYTHONPATH"] != code:
        values["PYTHONPATH"] = os.pathsep.join([code, values["PYTHONPATH"]])
    unset = OF_PYXIS if container["runtime"] == "pyxis" else ()
    return [
        "env",
        *(word for name in unset for word in ("-u", name)),
        *(f"{name}={value}" for name, value in values.items()),
    ]


def apptainer(
    container: Mapping[str, Any], gpus: int, environ: Mapping[str, str]
) -> list[str]:
    """`apptainer exec`, or its elder `singularity exec`, up to the image."""
    found = [
        name
        for name in ("apptainer", "singularity")
        if shutil.which(name, path=environ.get("PATH"))
    ]
    if not found:
        raise UserError(
            "container.runtime apptainer",
            "neither apptainer nor singularity is on PATH",
            "load its module, or set another runtime in slurm/cluster.yaml",
        )
    line = [found[0], "exec", *(["--nv"] if gpus else [])]
    line += [word for mount in mounts(container) for word in ("--bind", mount)]
    return [*line, "--pwd", str(Path.cwd()), image(container)]


def pyxis(container: Mapping[str, Any]) -> list[str]:
    """What Pyxis adds to srun."""
    return [
        f"--container-image={image(container)}",
        f"--container-mounts={','.join(mounts(container))}",
        f"--container-workdir={Path.cwd()}",
        "--no-container-mount-home",
    ]


# ---- ports and addresses -------------------------------------------------------


def first_block(environ: Mapping[str, str]) -> int:
    """Where to look for ports first: jobs beside each other start apart."""
    number = int(environ.get("SLURM_JOB_ID") or os.getpid())
    return (number + int(environ.get("SLURM_RESTART_COUNT") or 0)) % BLOCKS


def free_ports(block: int) -> int:
    """The first port of a block that nobody uses here, from the given one on."""
    for step in range(BLOCKS):
        port = FIRST_PORT + (block + step) % BLOCKS * PORTS
        if all(map(is_free, range(port, port + WORKER_PORTS))):
            return port
    raise UserError(
        socket.gethostname(),
        f"no free ports from {FIRST_PORT} to {FIRST_PORT + BLOCKS * PORTS - 1}",
    )


def is_free(port: int) -> bool:
    """Whether a port can be listened on here."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def address_of(host: str) -> str:
    """A machine's address, the older kind where it has both."""
    return str(min(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM))[4][0])


def address_towards(host: str) -> str:
    """The address by which that machine sees this one.

    Its own name may lead a machine to its loopback address.
    """
    found = min(socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM))
    with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
        probe.connect(found[4])  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has an address: `man 7 netdevice`, SIOCGIFADDR."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # without an address
                answer = fcntl.ioctl(probe, 0x8915, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def refuses(host: str, port: int) -> bool:
    """Whether nothing listens there; a slow or unreachable machine has not said so."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


class Place:
    """Where this process is: on one of a Slurm job's machines, or alone."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self.rank = int(os.environ["SLURM_NODEID"]) if hosts else 0
        self.name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.address = "127.0.0.1"
        if hosts:
            self.address = address_towards(hosts[1 if self.rank == 0 else 0])
            if interface := interface_of(self.address):
                # else Gloo takes the one of its own name's address
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


# ---- torchrun ------------------------------------------------------------------


def torchrun(args: argparse.Namespace) -> int:
    """Become torchrun of this machine. A dead process is not started again."""
    place = Place(args.hosts)
    flags = [f"--nnodes={len(place.hosts)}", f"--node-rank={place.rank}"]
    flags += [f"--nproc-per-node={args.processes}", "--max-restarts=0"]
    flags += [f"--master-addr={place.hosts[0]}", f"--master-port={args.port}"]
    line = [sys.executable, *TORCHRUN, *flags, "--no-python", sys.executable]
    os.execv(sys.executable, [*line, *args.words])  # noqa: S606


# ---- Ray -----------------------------------------------------------------------
# `ray symmetric-run` is near to this, but it ends with `ray stop`, which ends the Ray of
# all jobs on the machine; it starts none where another's runs; it does not clean up
# when signalled, does not see that another machine's Ray has died, and exits 0 where
# Ray did not start (2.60: ray/scripts/symmetric_run.py).


def ray(args: argparse.Namespace) -> int:
    """Run the script beside a Ray of all the job's machines; its exit code.

    The first machine leads and runs the script; the others end when its Ray is gone.
    """
    place = Place(args.hosts)
    machine, fault = RayMachine(args, place), args.logs / "fault"
    try:
        code = machine.lead() if place.rank == 0 else machine.follow()
    except RayEnded:
        code = 128 + signal.SIGTERM
        if not machine.stopping:
            error = UserError(f"Ray on {place.name}", machine.why(), f"see {args.logs}")
            fault.write_text("\n".join([error.where, error.what, error.hint]))
            raise error from None
    finally:
        machine.end()
    if place.rank == 0 and machine.stopping and fault.exists():
        raise UserError(*fault.read_text().split("\n"))  # why Slurm ended this machine
    return code


class RayEnded(Exception):
    """Ray is gone from here, or is to go."""


class RayMachine:
    """One machine's part of a Ray cluster: its processes, and their folder.

    The folder is below /tmp: sockets need short paths and a local file system.
    """

    def __init__(self, args: argparse.Namespace, place: Place) -> None:
        self.args, self.place = args, place
        self.logs = args.logs / place.name
        self.process: subprocess.Popen[bytes] | None = None
        self.daemons: dict[str, int] = {}
        self.stop_at = math.inf
        for number in STOP_SIGNALS:
            signal.signal(number, self.ask_to_stop)
        adopt_orphans()
        allow_files()
        args.logs.mkdir(parents=True, exist_ok=True)
        of = f"ray-{os.environ.get('SLURM_JOB_ID', os.getpid())}-"
        self.folder = Path(tempfile.mkdtemp(prefix=of, dir="/tmp"))

    def ask_to_stop(self, *_: object) -> None:
        self.stop_at = min(self.stop_at, time.monotonic())

    @property
    def stopping(self) -> bool:
        return self.stop_at < math.inf

    @property
    def stop_is_due(self) -> bool:
        return time.monotonic() > self.stop_at + STOP_SECONDS

    def lead(self) -> int:
        """Start the head, wait until all machines have joined, run the script."""
        (self.args.logs / "fault").unlink(missing_ok=True)
        count, port = max(1, len(self.place.hosts)), self.args.port
        address = f"{self.place.address}:{port}"
        flags = ["--head", f"--port={port}", "--include-dashboard=false"]
        flags += [f"--dashboard-port={port + DASHBOARD_PORT}"]
        if importlib.util.find_spec("grpc"):  # refused without; with, 10001 is taken
            flags += [f"--ray-client-server-port={port + CLIENT_PORT}"]
        self.start(*flags)
        self.wait_for_head(self.place.address)
        os.environ["RAY_ADDRESS"] = address
        wait = [sys.executable, "-P", "-c", WAIT, address, str(count)]
        if self.watch(wait, READY_SECONDS):
            if self.stopping:
                raise RayEnded
            raise UserError(
                f"Ray on {self.place.name}",
                f"not all of its {count} machines joined",
                f"see {self.args.logs}",
            )
        return self.watch([sys.executable, *self.args.words])

    def follow(self) -> int:
        """Join the head when it is there, end when it is gone."""
        head, port = address_of(self.place.hosts[0]), self.args.port
        self.wait_for_head(head)
        self.start(f"--address={head}:{port}")
        while not refuses(head, port) and not self.stop_is_due:
            try:
                self.look()
            except RayEnded:
                time.sleep(1)  # the head's may be ending too
                if not refuses(head, port):
                    raise
        return 0

    def wait_for_head(self, address: str) -> None:
        while refuses(address, self.args.port):
            self.look()
            if self.stopping:
                raise RayEnded

    def start(self, *flags: str) -> None:
        """Start this machine's Ray, with as much of it as the placement has."""
        first = self.args.port
        if self.place.rank:
            first = free_ports((first - FIRST_PORT) // PORTS)
        memory = int(self.args.memory_gb * 1e9)
        objects = max(int(memory * OBJECTS), 100_000_000)  # Ray wants 75 MB at least
        line = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"]
        line += [*flags, f"--temp-dir={self.folder}"]
        if self.place.hosts:
            line += [f"--node-ip-address={self.place.address}"]
        line += [f"--{name}={first + step}" for name, step in OFFSETS.items()]
        line += [f"--min-worker-port={first + WORKER_PORTS}"]
        line += [f"--max-worker-port={first + PORTS - 1}"]
        line += [f"--num-cpus={self.args.cpus}", f"--num-gpus={self.args.gpus}"]
        line += [f"--memory={memory - objects}", f"--object-store-memory={objects}"]
        with open(self.folder / "start.log", "wb") as output:
            self.process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
                start_new_session=True,  # not for a terminal's signals
                preexec_fn=die_with_parent,  # and its daemons with it
            )

    def watch(self, line: list[str], seconds: float = math.inf) -> int:
        """Run a process to its end, or until this job or Ray ends; its exit code."""
        process = subprocess.Popen(line, preexec_fn=die_with_parent)
        deadline = time.monotonic() + seconds
        asked = False
        while process.poll() is None:
            self.look()
            if self.stopping and not asked:
                process.terminate()
                asked = True
            if self.stop_is_due or time.monotonic() > deadline:
                process.kill()
        code = process.returncode
        return code if code >= 0 else 128 - code

    def look(self) -> None:
        """Raise RayEnded, a moment later, where this machine's Ray has ended.

        `ray start --block` stays when a daemon ends with exit code 0.
        """
        time.sleep(LOOK_SECONDS)
        if self.process is None:
            return
        names = {"raylet"} if self.place.rank else {"raylet", "gcs_server"}
        if self.daemons.keys() != names:
            below = descendants()
            self.daemons |= {n: pid for pid, n in below.items() if n in names}
        ended = self.process.poll() is not None
        if ended or not all(map(is_alive, self.daemons.values())):
            raise RayEnded

    def why(self) -> str:
        """What a user is told of its end."""
        if self.daemons:
            return "ended before the script"
        lines = (self.folder / "start.log").read_text(errors="replace").splitlines()
        return f"did not start: {lines[-1] if lines else 'it says nothing'}"

    def end(self) -> None:
        """Leave nothing but the logs."""
        for number in STOP_SIGNALS:  # till the very end: it would undo the exit code
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        for left in (*self.folder.glob("session_2*/logs/*"), self.folder / "start.log"):
            if left.exists():
                shutil.move(left, self.logs / left.name)
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- processes: `man 5 proc`, stat ---------------------------------------------


def adopt_orphans() -> None:
    """Be the parent of whatever is left by processes below: `man 2 prctl`."""
    set_child_subreaper = 36
    LIBC.prctl(set_child_subreaper, 1, 0, 0, 0)


def allow_files() -> None:
    """Let this process have many files open: Ray does, and Slurm hands on few."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def die_with_parent() -> None:
    """Be killed when the parent is: not all clusters find orphans."""
    set_parent_death_signal = 1
    LIBC.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def stat(pid: int) -> tuple[str, str, int]:
    """A process's name, state and parent. Raises OSError where there is none."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    state, parent = text[text.rindex(")") + 2 :].split()[:2]
    return text[text.index("(") + 1 : text.rindex(")")], state, int(parent)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    with suppress(OSError):
        return stat(pid)[1] not in "ZX"
    return False


def descendants() -> dict[int, str]:
    """Names of all processes below this one, the dead among them too."""
    known = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                known[int(name)] = stat(int(name))
    below: dict[int, str] = {}
    parents = {os.getpid()}
    while parents:
        children = {pid for pid, (_, _, parent) in known.items() if parent in parents}
        below |= {pid: known[pid][0] for pid in children}
        parents = children
    return below


def kill_descendants() -> None:
    """Kill all processes below this one, and wait until they are gone."""
    deadline = time.monotonic() + KILL_SECONDS
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


# ---- command line --------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Do one machine's part."""
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    flags = argparse.ArgumentParser(
        prog="python -m scripts.lib.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = flags.add_subparsers(dest="command", required=True, metavar="COMMAND")
    under = commands.add_parser("torchrun", help="the script under torchrun")
    beside = commands.add_parser("ray", help="the script beside Ray")
    for each in (under, beside):
        each.add_argument(
            "--hosts",
            type=lambda text: text.split(","),
            default=[],
            help="the job's machines, the first leads; default: this one alone",
        )
        each.add_argument("--port", type=int, required=True, help="first of its ports")
    under.add_argument("--processes", type=int, required=True, help="on each machine")
    beside.add_argument("--cpus", type=int, required=True, help="of each machine")
    beside.add_argument("--gpus", type=int, required=True, help="of each machine")
    beside.add_argument(
        "--memory-gb", type=float, required=True, help="of each machine"
    )
    beside.add_argument("--logs", type=Path, required=True, help="a folder for each")
    args = flags.parse_args(given[:at])
    args.words = given[at + 1 :]
    if not args.words:
        flags.error("what is Python to be called with? write it after --")
    return torchrun(args) if args.command == "torchrun" else ray(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
