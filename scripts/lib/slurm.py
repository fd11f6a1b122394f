"""What Slurm says of this project's jobs, by its own commands.

A job is found by its name, which stands for the project's folder, and by its comment,
in which the executor plugin writes `rule_<stage>/<node>`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.errors import UserError

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""States a job does not leave by itself: `man squeue`, JOB STATE CODES."""

ENDING = "COMPLETING"
USABLE = ("alloc", "comp", "idle", "mixed", "planned", "power", "resv", "reserved")
"""How the states of machines begin that run jobs, or soon will: `man sinfo`."""

ANSWER_SECONDS = 60
COMMENT = "rule_"


class SlurmError(UserError):
    """A Slurm command failed, or did not answer."""


@dataclass(frozen=True)
class SlurmJob:
    """A job of this project: of which node, its state, machines, and why it waits."""

    id: str
    node: str
    state: str
    machines: str
    reason: str
    elapsed: str
    limit: str

    @property
    def alive(self) -> bool:
        return self.state not in ENDED and self.state != ENDING


def ask(*words: str, seconds: float = ANSWER_SECONDS) -> str:
    """What a Slurm command prints.

    Raises UserError where there is no Slurm, SlurmError where it fails or is silent.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError as error:
        raise UserError(
            words[0],
            "not found: no Slurm on this machine",
            "run this on a login node, or build here: snakemake --profile local",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(words[0], f"no answer in {seconds:g} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise SlurmError(words[0], said[-1] if said else "failed")
    return done.stdout


def job_name(folder: Path | None = None) -> str:
    """The Slurm name of all jobs of the project in a folder: by default, this one."""
    folder = folder or Path.cwd()
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]", "_", f"{folder.name}-{digest}")


def jobs() -> list[SlurmJob]:
    """The project's jobs, those that ended a few minutes ago too, newest last."""
    fields = "%i|%T|%k|%N|%r|%M|%l"
    text = ask(
        "squeue", "--noheader", "--states=all", f"--user={os.getuid()}",
        f"--name={job_name()}",
        f"--format={fields}",
    )  # fmt: skip
    found = []
    for line in text.splitlines():
        words = line.split("|")
        if len(words) != len(fields.split("|")) or not words[0].isdigit():
            continue  # no job of a build
        id, state, comment, machines, reason, elapsed, limit = words
        node = comment.removeprefix(COMMENT)
        found.append(SlurmJob(id, node, state, machines, reason, elapsed, limit))
    return sorted(found, key=lambda job: int(job.id))


def exit_code(id: str) -> int:
    """The exit code of an ended job that Slurm still remembers."""
    for word in ask("scontrol", "show", "job", "--oneliner", id).split():
        if word.startswith("ExitCode="):
            return int(word.removeprefix("ExitCode=").split(":")[0])
    return 0


# ---- what the cluster is like ------------------------------------------------------


@dataclass(frozen=True)
class Machines:
    """Machines of one partition that are alike, and the limits of that partition.

    `gres` counts by name and by name:type; `names` is as Slurm writes it: n[1-2].
    """

    partition: str
    default: bool
    state: str
    minutes: float
    at_once: float
    cpus: int
    memory_mb: int
    gres: dict[str, int]
    features: frozenset[str]
    count: int
    doing: str
    names: str

    @property
    def usable(self) -> bool:
        """Whether they run jobs, or soon will."""
        return self.doing.startswith(USABLE) and "*" not in self.doing


@dataclass(frozen=True)
class Association:
    """An account that a user may charge, in one partition or in all."""

    account: str
    partition: str
    qos: frozenset[str]


def machines() -> list[Machines]:
    """What the partitions consist of, hidden ones too; one entry an alike group."""
    fields = "%R|%P|%a|%l|%s|%c|%m|%G|%f|%D|%T|%N"
    text = ask("sinfo", "--noheader", "--all", "--exact", f"--format={fields}")
    return [_machines(line) for line in text.splitlines() if line.strip()]


def _machines(line: str) -> Machines:
    values = [value.strip() for value in line.split("|")]
    name, starred, state, minutes, sizes = values[:5]
    cpus, memory, gres, features, count, doing, names = values[5:]
    return Machines(
        partition=name,
        default=starred == f"{name}*",
        state=state,
        minutes=minutes_of(minutes),
        at_once=float(sizes.split("-")[-1].replace("infinite", "inf")),
        cpus=int(cpus),
        memory_mb=int(memory),
        gres=gres_of(gres),
        features=frozenset(features.replace("(null)", "").split(",")) - {""},
        count=int(count),
        doing=doing,
        names=names,
    )


def minutes_of(text: str) -> float:
    """A limit of Slurm's, days-hours:minutes:seconds, in minutes."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
    except ValueError:  # infinite, UNLIMITED, n/a
        return float("inf")
    if dash:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # minutes, minutes:seconds, hours:minutes:seconds
        hours, minutes, seconds = ([0, *parts, 0] if len(parts) < 3 else parts)[:3]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def gres_of(text: str) -> dict[str, int]:
    """`gpu:h200:8(S:0-1),nic:2` as counts: gpu 8, gpu:h200 8, nic 2."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        words = [word for word in item.split(":") if word != "no_consume"]
        counted = words[-1].isdigit()
        count = int(words[-1]) if counted else 1
        names = words[:-1] if counted else words
        for name in {names[0], ":".join(names)} - {""}:
            found[name] = found.get(name, 0) + count
    return found


def first_name(names: str) -> str:
    """The first machine of a list such as n[1-2],m3."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", names).split(",")[0]


def settings() -> dict[str, str]:
    """Slurm's own configuration."""
    lines = ask("scontrol", "show", "config").splitlines()
    pairs = [line.partition("=") for line in lines]
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def associations(user: str, cluster: str) -> list[Association]:
    """The accounts of a user; UserError where accounting cannot be asked."""
    text = ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "associations",
        f"user={user}", f"cluster={cluster}", "format=account,partition,qos",
    )  # fmt: skip
    found = []
    for line in text.splitlines():
        account, partition, qos = line.split("|")
        found.append(Association(account, partition, frozenset(qos.split(",")) - {""}))
    return found
