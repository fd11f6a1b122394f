"""Compare slurm/cluster.yaml and every placement with the cluster.

    python -m scripts.lib.doctor

What no machine has is refused before a run submits anything. Here all nodes are looked
at, and what else a run needs: the folder, Python and locks on a machine of each
partition, DVC's cache, disk, containers, Slurm's own settings.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.lib import cli, graph, plan, slurm
from scripts.lib.digest import Cache, write_atomic
from scripts.lib.errors import UserError
from scripts.lib.graph import Node
from scripts.lib.load import load_cluster, load_config, nearest
from scripts.lib.run import links_to
from scripts.lib.slurm import Association, Machines, SlurmError
from scripts.lib.stages import STAGES
from scripts.lib.store import STATE, Store

CLUSTER = Path("slurm/cluster.yaml")
REMEMBERED = STATE / "doctor.json"
"""Which partitions' machines were looked at, and under which cluster file."""

FREE_SECONDS = 10
LOOK_SECONDS = 60
LITTLE_GB, TOO_LITTLE_GB = 10, 1
REMEMBERED_SECONDS = 60
KILL_SECONDS = 30

BUSY = re.compile(r"are busy|immediate|timed out|temporarily", re.IGNORECASE)
"""What srun says where no machine is free now."""

REFUSED = re.compile(r"invalid (account|qos|partition)|not permitted", re.IGNORECASE)
"""What srun says where this user's jobs get no machine at all."""

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Found:
    """What one check found, and what would be right."""

    level: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f"\n     hint: {self.hint}" if self.hint else ""
        return f"{self.level:4} {self.what}{hint}"


Refuse = Callable[[str, str, str], None]
"""Takes note of a placement key, what is wrong with it, and what would be right."""


class Places:
    """Where the keys of placement stand, by the order in which graph.py merges them."""

    def __init__(self, config: Path, cluster: Path) -> None:
        described, self.lines = load_cluster(cluster)
        read, lines, _ = load_config(config)
        self.file, self.machine = cluster, described.machine
        self.image = described.container.image
        self.sources = [(read.placement, lines), (described.placement, self.lines)]

    def where(self, node: Node, key: str) -> str:
        """`file:line key` of the setting that counts for a node."""
        lines, at = self.lines, ("default", "default")
        its = ("default", node.sweep or "default", node.name)
        for stage, name in (at, *((node.stage, one) for one in its)):
            for placement, its_lines in self.sources:
                if key in placement.get(stage, {}).get(name, {}):
                    lines, at = its_lines, (stage, name)
        return lines.where("placement", *at, key)


@dataclass(frozen=True)
class Slurm:
    """What Slurm says of itself; `accounts` is None where it does not check them."""

    machines: list[Machines]
    settings: dict[str, str]
    accounts: list[Association] | None

    @classmethod
    def asked(cls) -> Slurm:
        """Raises SlurmError where it does not answer, UserError where there is none."""
        machines, settings = slurm.machines(), slurm.settings()
        enforced = settings.get("AccountingStorageEnforce", "none").split(",")
        if "none" in settings.get("AccountingStorageType", "none").split("/")[-1]:
            return cls(machines, settings, None)
        if "associations" not in enforced:
            return cls(machines, settings, None)
        try:
            accounts = slurm.associations(user(), settings["ClusterName"])
        except UserError:  # no sacctmgr here, or its database does not answer
            return cls(machines, settings, None)
        if "qos" not in enforced:
            accounts = [
                Association(a.account, a.partition, frozenset()) for a in accounts
            ]
        return cls(machines, settings, accounts)

    def partition_of(self, node: Node) -> str:
        """Where a node's jobs go; "" if nobody says."""
        defaults = [m.partition for m in self.machines if m.default]
        return node.placement["partition"] or "".join(defaults[:1])

    def of(self, partition: str) -> list[Machines]:
        return [m for m in self.machines if m.partition == partition]

    def preempts(self) -> bool:
        return self.settings.get("PreemptType", "preempt/none") != "preempt/none"


def user() -> str:
    """Who this process is, as Slurm sees it."""
    return pwd.getpwuid(os.getuid()).pw_name


def preflight(store: Store, cluster: Path = CLUSTER) -> None:
    """Raise UserError for what Slurm could not run of what is not current.

    A Slurm that does not answer now is no mistake of the user's: the run waits for it.
    """
    jobs = jobs_of(store.graph.nodes[id] for id in plan.stale(store))
    if not jobs:
        return
    places = Places(Path(store.graph.config), cluster)
    found = [f for f in check_disk() if f.level == FAIL]
    try:
        there = Slurm.asked()
        found += check_requests(jobs, places, there)
        found += check_container(jobs, places)
        found += check_machines(sound(jobs, places, there), places, there, again=False)
    except SlurmError as error:
        found.append(
            Found(
                WARN, f"Slurm: {error.what}; what the nodes ask of it was not checked"
            )
        )
    for one in found:
        if one.level == WARN:
            print(f"[doctor] {one.what}", file=sys.stderr)
    wrong = [
        one.what + (f"\n\nhint: {one.hint}" if one.hint else "")
        for one in found
        if one.level == FAIL
    ]
    if wrong:
        where, _, rest = "\n\n".join(wrong).partition(": ")
        raise UserError(where, rest)


def jobs_of(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that are built by jobs."""
    return [node for node in nodes if not node.placement["controller"]]


# ---- what the nodes ask for --------------------------------------------------------


def check_requests(nodes: Iterable[Node], places: Places, there: Slurm) -> list[Found]:
    """What of the placement no partition, machine or account of the cluster has."""
    found: dict[Found, None] = {}
    for node in nodes:

        def refuse(key: str, what: str, hint: str = "", node: Node = node) -> None:
            found[Found(FAIL, f"{places.where(node, key)}: {what}", hint)] = None

        partition, placed = there.partition_of(node), node.placement
        machines = there.of(partition)
        if not check_partition(partition, there, refuse):
            continue
        fit = check_shape(placed, partition, there, refuse)
        if placed["minutes"] > machines[0].minutes:
            most = int(machines[0].minutes)
            goes_on = "; training goes on in further jobs: see slices"
            refuse(
                "minutes",
                f"{placed['minutes']}, but partition {partition} ends jobs after {most}",
                f"minutes: {most}{goes_on * STAGES[node.stage].trains}",
            )
        if there.accounts is not None:
            check_account(placed, partition, there.accounts, refuse)
        up = sum(m.count for m in fit if m.usable)
        if fit and up < placed["nodes"]:
            what = (
                f"{up} machines of partition {partition} that fit are up now, a job "
                f"of {placed['nodes']} will wait"
            )
            found[Found(WARN, f"{places.where(node, 'partition')}: {what}")] = None
    return [*found]


def sound(nodes: list[Node], places: Places, there: Slurm) -> list[Node]:
    """Those that ask for what there is."""
    return [
        node
        for node in nodes
        if not any(f.level == FAIL for f in check_requests([node], places, there))
    ]


def check_partition(partition: str, there: Slurm, refuse: Refuse) -> bool:
    """Whether jobs can be submitted to it."""
    names = list(dict.fromkeys(m.partition for m in there.machines))
    up = list(dict.fromkeys(m.partition for m in there.machines if m.state == "up"))
    if not partition:
        what = "none given, and this cluster has no default partition"
        refuse("partition", what, f"there are: {', '.join(up) or 'none'}")
    elif partition not in names:
        refuse(
            "partition", f"no such partition: {partition}", nearest(partition, names)
        )
    elif partition not in up:
        state = there.of(partition)[0].state
        refuse(
            "partition",
            f"partition {partition} is {state}",
            f"wait until it is up, or take another: {', '.join(up) or 'none is up'}",
        )
    else:
        return True
    return False


def check_shape(
    placed: dict[str, Any], partition: str, there: Slurm, refuse: Refuse
) -> list[Machines]:
    """The partition's machines that have all that a node asks for."""
    machines = there.of(partition)
    if not any(m.count for m in machines):
        refuse("partition", f"partition {partition} has no machines", "")
        return []
    fit = [m for m in machines if has_features(m.features, placed["constraint"])]
    anywhere = frozenset[str]().union(*(m.features for m in there.machines))
    named = FEATURE.findall(placed["constraint"] or "")
    unknown = [name for name in named if name not in anywhere]
    if unknown or not fit:
        here = sorted(frozenset[str]().union(*(m.features for m in machines)))
        what = f"no machine of partition {partition} has {placed['constraint']}"
        if unknown:
            what = f"no machine has {unknown[0]}"
        refuse("constraint", what, nearest([*unknown, *named][0], here))
        return []
    kind = placed["gres"] if placed["gpus"] else ""
    having = [m for m in fit if kind in m.gres or not kind]
    if not having:
        known = sorted(frozenset().union(*(m.gres for m in fit)))
        if known:
            what = f"no machine of partition {partition} has {kind}"
            refuse("gres", what, nearest(kind, known))
        else:
            what = f"{placed['gpus']}, but partition {partition} has no GPUs"
            refuse("gpus", what, "gpus: 0, or a partition that has them")
        return []
    fit, typed = having, f" with {kind}" if ":" in kind else ""
    has: dict[str, Callable[[Machines], float]] = {
        "cpus": lambda m: m.cpus,
        "memory_gb": lambda m: m.memory_mb // 100 / 10,
        "gpus": lambda m: m.gres.get(kind, 0),
    }
    for key, amount in has.items():
        if placed[key] > (most := max(map(amount, fit))):
            machine = f"a machine of partition {partition}{typed}"
            what = f"{placed[key]:g}, but {machine} has {most:g}"
            refuse(key, what, f"{key}: {most:g}")
            return []
    whole = [m for m in fit if all(placed[key] <= has[key](m) for key in has)]
    shape = ", ".join(f"{key} {placed[key]:g}" for key in has)
    if not whole:
        what = f"no one machine of partition {partition} has all of {shape}"
        refuse("cpus", what, "lower one of them")
        return []
    count = sum(m.count for m in whole)
    most = min(count, machines[0].at_once)
    if placed["nodes"] > most:
        limit = f"has {count} machines with {shape}"
        if most < count:
            limit = f"gives a job at most {most:g}"
        what = f"{placed['nodes']}, but partition {partition} {limit}"
        refuse("nodes", what, f"nodes: {most:g}")
        return []
    return whole


FEATURE = re.compile(r"(?<!\*)\b[\w.-]+")


def has_features(features: frozenset[str], constraint: str | None) -> bool:
    """Whether a machine may be among those that a constraint asks for.

    In doubt it may: Slurm has the last word on parentheses and counts.
    """
    if not constraint:
        return True
    if re.search(r"[*[]", constraint):  # of several machines together
        return any(name in features for name in FEATURE.findall(constraint))
    choices = re.sub(r"[()]", "", constraint).split("|")
    return any(all(f in features for f in one.split("&")) for one in choices)


def check_account(
    placed: dict[str, Any],
    partition: str,
    accounts: list[Association],
    refuse: Refuse,
) -> None:
    """Whether this user may charge the account, with that quality of service."""
    here = [a for a in accounts if a.partition in ("", partition)]
    names = sorted({a.account for a in here})
    account = (placed["account"] or "").lower()  # as Slurm keeps them
    if account not in ["", *names] or not names:
        what = f"{user()} has no account {account} for partition {partition}"
        refuse("account", " ".join(what.split()), nearest(account, names))
        return
    allowed = frozenset[str]().union(
        *(a.qos for a in here if account in ("", a.account))
    )
    if placed["qos"] and allowed and placed["qos"] not in allowed:
        what = f"no such qos for {account or user()}: {placed['qos']}"
        refuse("qos", what, nearest(placed["qos"], sorted(allowed)))


# ---- a machine of each partition ---------------------------------------------------

ON_MACHINE = """\
folder=$1 token=$2 text=$3 python=$4 runtime=$5; shift 5
say() { echo "doctor: $*"; }
say on "${SLURMD_NODENAME:-$(hostname)}"
if ! cd "$folder" 2>/dev/null || [ "$(cat "$token" 2>/dev/null)" != "$text" ]; then
    say lacks folder; say end; exit
fi
[ -x "$python" ] || say lacks python
if ! (: > "$token.there") 2>/dev/null; then
    say lacks write
elif rm -f "$token.there"; [ -x "$python" ]; then
    "$python" -I -S -c "$LOCK" "$token" || say lacks locks
fi
if [ "$runtime" = apptainer ]; then
    command -v apptainer >/dev/null || command -v singularity >/dev/null ||
        say lacks runtime
fi
for path in "$@"; do [ -e "$path" ] || say lacks path "$path"; done
say end
"""

LOCK = """\
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except (BlockingIOError, PermissionError):
    sys.exit(0)
except OSError:
    pass
sys.exit(1)
"""
"""Succeeds where a lock that is held on another machine cannot be taken."""


def check_machines(
    nodes: list[Node], places: Places, there: Slurm, again: bool
) -> list[Found]:
    """Look at a machine of each partition used, by a job of a second.

    Unless `again`, not where that went well before under the same cluster file.
    """
    STATE.mkdir(exist_ok=True)
    try:
        known = json.loads(REMEMBERED.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    now = [places.file.read_text(), str(Path.cwd()), sys.executable]
    mark = hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]
    found: list[Found] = []
    for partition in dict.fromkeys(map(there.partition_of, nodes)):
        ours = [n for n in nodes if there.partition_of(n) == partition]
        if known.get(partition) == mark and not again:
            continue
        seen = look(partition, ours, places, there)
        found += seen
        if all(one.level == OK for one in seen):
            known[partition] = mark
            write_atomic(REMEMBERED, json.dumps(known))
    return found


def look(
    partition: str, nodes: list[Node], places: Places, there: Slurm
) -> list[Found]:
    """What a machine of a partition lacks; a warning where none could be looked at."""
    where = places.where(nodes[0], "partition")

    def unseen(why: str) -> list[Found]:
        what = f"{where}: no machine of partition {partition} was looked at: {why}"
        return [Found(WARN, what)]

    words = options(partition, nodes[0].placement)
    constraint = nodes[0].placement["constraint"]
    fit = [m for m in there.of(partition) if has_features(m.features, constraint)]
    if there.preempts():  # of jobs on busy machines, which a look is not worth
        idle = [m for m in fit if m.doing == "idle"]
        if not idle:
            return unseen("none is idle")
        words.append(f"--nodelist={slurm.first_name(idle[0].names)}")
    runtimes = {n.placement["container"]["runtime"] for n in nodes}
    with tempfile.NamedTemporaryFile("w", dir=STATE, prefix="doctor-") as token:
        text = secrets.token_hex(8)
        token.write(text)
        token.flush()
        os.fsync(token.fileno())
        fcntl.flock(token, fcntl.LOCK_EX)
        script = [
            "/bin/sh", "-c", f"LOCK='{LOCK}'\n{ON_MACHINE}", "doctor",
            str(Path.cwd()), os.path.relpath(token.name), text, sys.executable,
            "apptainer" if "apptainer" in runtimes else "none",
            *paths_inside(nodes),
        ]  # fmt: skip
        done = srun(*words, *script)
    if done is None:
        return unseen(f"its job did not end in {LOOK_SECONDS} s")
    heard = re.findall(r"(?m)^doctor: (\w+) ?(.*)$", done.stdout)
    if ("end", "") in heard:
        return explain(heard, partition, nodes, places)
    errors = re.findall(r"(?m)error: (.*)", done.stderr)
    said = errors[0] if errors else f"exit code {done.returncode}"
    if BUSY.search(done.stderr):
        return unseen(f"none was free within {FREE_SECONDS} s")
    if REFUSED.search(done.stderr):
        return [Found(FAIL, f"{where}: Slurm refuses a job in {partition}: {said}")]
    return unseen(said)


def options(partition: str, placed: dict[str, Any]) -> list[str]:
    """Of a job that takes next to nothing and does not wait for long."""
    words = [
        f"--partition={partition}", "--nodes=1", "--ntasks=1", "--cpus-per-task=1",
        "--mem=100", "--time=1", f"--immediate={FREE_SECONDS}", "--mpi=none",
        "--chdir=/", "--input=none", "--quiet",
    ]  # fmt: skip
    given = [(key, placed[key]) for key in ("account", "qos", "constraint")]
    return words + [
        f"--{key}={value}"
        for key, value in given
        if value and not re.search(r"[*[]", value)
    ]


def srun(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run a step as a job of its own, and leave none in the queue; None if too slow."""
    name = f"{slurm.job_name()}-doctor-{os.getpid()}"
    # inside of a job, srun would take that job's machines
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    done = None
    try:
        done = subprocess.run(
            ["srun", f"--job-name={name}", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FREE_SECONDS + LOOK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pass
    finally:
        if done is None or done.returncode:
            subprocess.run(["scancel", f"--name={name}"], check=False)
    return done


def paths_inside(nodes: list[Node]) -> list[str]:
    """Files and folders of the containers that a machine must have."""
    found: dict[str, None] = {}
    for container in (n.placement["container"] for n in nodes):
        image = container["image"]
        if container["runtime"] == "none":
            continue
        if image and (container["runtime"] == "apptainer" or image[0] in "./"):
            found |= {image: None} if "://" not in image else {}
        found |= {mount.split(":")[0]: None for mount in container["mounts"]}
    return [*found]


LACKS = {
    "folder": (
        "does not have this folder, {folder}",
        "keep the project where all machines see it, under one path",
    ),
    "write": ("cannot write to {folder}/state", "is it mounted read-only there?"),
    "python": (
        "does not have {python}",
        "keep the environment where all machines see it: make env VENV=FOLDER",
    ),
    "locks": (
        "does not see the file locks held here: two jobs could write dvc.lock at once",
        "mount Lustre with `flock`, not `localflock`; NFS without `nolock`, `local_lock`",
    ),
    "runtime": (
        "has neither apptainer nor singularity on its PATH",
        "load its module before the run, or name another container.runtime",
    ),
    "path": ("does not have {path}", "containers need it there"),
}
"""What a machine may lack: what it says of itself, and what would be right."""


def explain(
    heard: list[tuple[str, str]], partition: str, nodes: list[Node], places: Places
) -> list[Found]:
    """What a machine said, as what is wrong and what would be right."""
    machine = f"{dict(heard)['on']} of partition {partition}"
    found = []
    for words in [text for verb, text in heard if verb == "lacks"]:
        kind, _, path = words.partition(" ")
        what, hint = LACKS[kind]
        what = what.format(folder=Path.cwd(), python=sys.executable, path=path)
        where = places.where(nodes[0], "partition")
        if kind == "runtime":
            where = places.lines.where("container", "runtime")
        elif kind == "path":
            where = where_is(path, nodes, places)
        found.append(Found(FAIL, f"{where}: {machine} {what}", hint))
    if not found:
        found.append(Found(OK, f"{machine} has this folder, its Python and its locks"))
    return found


def where_is(path: str, nodes: list[Node], places: Places) -> str:
    """Where a container's image or mount is named."""
    for node in nodes:
        if node.placement["container"]["image"] == path:
            if path == places.image:
                return places.lines.where("container", "image")
            return places.where(node, "image")
    return places.lines.where("container", "mounts")


# ---- what else a run needs ---------------------------------------------------------


def check_container(nodes: list[Node], places: Places) -> list[Found]:
    """Whether there is an image where there is a runtime, and pyxis where it is used."""
    runtimes = {n.placement["container"]["runtime"] for n in nodes} - {"none"}
    found: dict[Found, None] = {}
    for container in (n.placement["container"] for n in nodes):
        if container["runtime"] != "none" and not container["image"]:
            what = f"none, but container.runtime is {container['runtime']}"
            found[
                Found(FAIL, f"{places.lines.where('container', 'image')}: {what}")
            ] = None
    if "pyxis" in runtimes and "--container-image" not in slurm.ask("srun", "--help"):
        where = places.lines.where("container", "runtime")
        what = f"{where}: pyxis, but srun has no --container-image here"
        found[Found(FAIL, what, "have pyxis installed, or take apptainer")] = None
    return [*found]


def check_disk() -> list[Found]:
    """Whether results find room, in the project and in DVC's cache."""
    found, seen = [], set()
    cache = Cache().folder
    for folder in (Path.cwd(), cache.absolute()):
        while not folder.exists():
            folder = folder.parent
        if (device := folder.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(folder).free / 1e9
        level = FAIL if free < TOO_LITTLE_GB else WARN if free < LITTLE_GB else OK
        hint = "" if level == OK else "each save of a model takes its size there"
        found.append(Found(level, f"{folder}: {free:.1f} GB free", hint))
    return found


def check_cache() -> list[Found]:
    """Whether publishing can link files to DVC's cache."""
    cache = Cache().folder
    STATE.mkdir(exist_ok=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        linked = links_to(cache)
    except OSError as error:
        return [Found(FAIL, f"{cache}: cannot be written to: {error.strerror}")]
    if linked:
        return [Found(OK, f"{cache}: DVC's cache is on the project's file system")]
    what = f"{cache}: DVC's cache is on another file system: publishing copies"
    return [Found(WARN, what, "dvc cache dir FOLDER --local, beside the project")]


def check_settings(settings: dict[str, str]) -> list[Found]:
    """Whether Slurm's own settings suit jobs that go on after their time limit."""
    found = []
    if settings.get("JobRequeue", "1") != "1":
        what = (
            "Slurm has JobRequeue=0: what its limits end, the controller submits again"
        )
        found.append(Found(WARN, what, "keep snakemake running until all is built"))
    kept = seconds_of(settings, "MinJobAge")
    if kept < REMEMBERED_SECONDS:
        what = f"Slurm forgets jobs {kept} s after their end: MinJobAge"
        hint = f"why one failed may not be seen; {REMEMBERED_SECONDS} s or more is safe"
        found.append(Found(WARN, what, hint))
    kill = seconds_of(settings, "KillWait")
    hint = ""
    if kill < KILL_SECONDS:
        hint = (
            f"at a limit it kills after {kill} s (KillWait); stop_seconds is before it"
        )
    if not found:
        found.append(Found(OK, "Slurm requeues jobs, and remembers ended ones", hint))
    return found


def seconds_of(settings: dict[str, str], key: str) -> int:
    """A setting such as `300 sec`; a minute where it is not told."""
    number = re.match(r"\d+", settings.get(key, ""))
    return int(number.group()) if number else REMEMBERED_SECONDS


def check_described(nodes: list[Node], places: Places, there: Slurm) -> list[Found]:
    """Whether some machine is as the cluster's file describes them."""
    shape = places.machine
    if shape is None:
        return []
    used = {there.partition_of(n) for n in nodes}
    machines = [m for m in there.machines if m.partition in used]
    for m in machines:
        gpus = max(m.gres.get(n.placement["gres"], 0) for n in nodes)
        if (
            shape.cpus <= m.cpus
            and 1000 * shape.memory_gb <= m.memory_mb
            and shape.gpus <= gpus
        ):
            return [Found(OK, f"{places.file} machine: there are such")]
    text = f"{shape.cpus} CPUs, {shape.memory_gb:g} GB and {shape.gpus} GPUs"
    what = f"{places.lines.where('machine')}: no machine used has {text}"
    return [Found(WARN, what, "sinfo -o '%P %c %m %G' lists them, memory in MB")]


# ---- all of it ---------------------------------------------------------------------


def examine(nodes: list[Node], places: Places) -> Iterator[Found]:
    """Every check, as its answer comes."""
    yield from check_cache()
    yield from check_disk()
    try:
        there = Slurm.asked()
        names = dict.fromkeys(m.partition for m in there.machines)
        default = {m.partition for m in there.machines if m.default}
        shown = ", ".join(n + " (default)" * (n in default) for n in names)
        version = there.settings.get("SLURM_VERSION", "")
        yield Found(OK, f"Slurm {version} answers; partitions: {shown or 'none'}")
        yield from check_settings(there.settings)
        yield from check_described(nodes, places, there)
        asked = check_requests(nodes, places, there)
        yield from asked
        if not asked:
            yield Found(
                OK, f"placement: the cluster has what {len(nodes)} nodes ask for"
            )
        if there.accounts is None and any(n.placement["account"] for n in nodes):
            yield Found(
                WARN, "accounts and qos are not checked by this Slurm, nor here"
            )
        yield from check_container(nodes, places)
        fine = sound(nodes, places, there)
        yield from check_machines(fine, places, there, again=True)
    except SlurmError as error:
        yield Found(FAIL, f"Slurm: {error.what}", "the rest was not checked: try again")
    except UserError as error:
        yield Found(FAIL, f"{error.where}: {error.what}", error.hint)


def main(argv: list[str] | None = None) -> int:
    """Print a line a check; 1 where something would fail."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", type=Path, default=plan.chosen_config())
    flags.add_argument("--cluster", type=Path, default=CLUSTER)
    args = flags.parse_args(argv)
    whole = graph.build(args.config, args.cluster)
    places = Places(args.config, args.cluster)
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    for found in examine(jobs_of(whole.nodes.values()), places):
        print(found, flush=True)
        counts[found.level] += 1
    told = f"{counts[OK]} ok, {counts[WARN]} to note, {counts[FAIL]} wrong"
    print(f"\n{told}" + (": a run would fail" if counts[FAIL] else ": a run can start"))
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    cli.run(main)
