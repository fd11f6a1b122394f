"""Run commands on chosen cores, interleaved, and tell seconds and peak memory.

A command's CPU seconds are those of its processes, user and system: on a core of its
own they are its time, and other work on the machine changes them little. Its peak is
the most that its processes held at once, shared pages counted once, as seen twenty
times a second, and of a long run down to twenty times in all, so that looking takes a
two-hundredth of a core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread

from scripts.lib.errors import UserError

ROOT = Path(__file__).parents[2]
EVERY_SECONDS, SHARE, TIMES = 0.05, 0.005, 20
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """One run of a command; `first_s` is the CPU time of its first process alone."""

    wall_s: float
    cpu_s: float
    first_s: float
    peak_mb: float


@dataclass(frozen=True)
class Command:
    """What to run, on how many cores; `prepare` is called before, and not measured."""

    words: list[str]
    log: Path
    prepare: Callable[[], object] = lambda: None
    cores: int = 1
    path: str = ""
    """PYTHONPATH, in front of the one that is set."""


class Watch(Thread):
    """Looks at a process and its descendants until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.done = pid, Event()
        self.peak_kb = self.first_s = 0.0
        self.start()

    def run(self) -> None:
        start, pause = time.monotonic(), EVERY_SECONDS
        while not self.done.wait(pause):
            before = time.thread_time()
            with suppress(OSError, ValueError):  # one of them has just ended
                self.look()
            wanted = (time.thread_time() - before) / SHARE
            longest = (time.monotonic() - start) / TIMES
            pause = max(EVERY_SECONDS, min(wanted, longest))

    def look(self) -> None:
        family = [self.pid]
        for pid in family:
            for task in Path(f"/proc/{pid}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        self.first_s = (int(times[11]) + int(times[12])) / TICKS
        if len(family) == 1:
            kb = kb_of(f"/proc/{self.pid}/status", "VmHWM:")
        else:
            kb = sum(kb_of(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in family)
        self.peak_kb = max(self.peak_kb, kb)


def kb_of(path: str, name: str) -> int:
    """A line's number in one of the kernel's files on a process."""
    lines = Path(path).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))


def run(command: Command) -> Run:
    """One run. Raises UserError where the command fails."""
    command.prepare()
    environment = {k: v for k, v in os.environ.items() if k not in UNFAIR}
    before = environment.get("PYTHONPATH")
    paths = [path for path in (command.path, before) if path]
    mine = os.sched_getaffinity(0)
    with command.log.open("wb") as log:
        # a child starts on its parent thread's cores
        os.sched_setaffinity(0, sorted(mine)[-command.cores :])
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                command.words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)},
            )
        finally:
            os.sched_setaffinity(0, mine)
        watch = Watch(process.pid)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.done.set()
        watch.join()
    if process.returncode:
        end = command.log.read_text(errors="replace")[-2000:]
        raise UserError(" ".join(command.words), f"failed:\n{end}")
    cpu = used.ru_utime + used.ru_stime
    return Run(wall, cpu, watch.first_s, watch.peak_kb * 1024 / 1e6)


UNFAIR = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "OMP_NUM_THREADS")
"""Without these every command's modules are compiled once, before it is measured."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}


def interleaved(commands: Mapping[str, Command], rounds: int) -> dict[str, list[Run]]:
    """Each command's runs, one after another in every round."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            found[name].append(run(command))
            last = found[name][-1]
            print(
                f"[bench] round {number + 1} of {rounds}: {name}: "
                f"{last.wall_s:.2f} s, CPU {last.cpu_s:.2f} s, {last.peak_mb:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    return found


def ratios(
    theirs: list[Run], ours: list[Run], of: Callable[[Run], float]
) -> tuple[float, float]:
    """How many times faster ours is: the least of the pairs, and their median."""
    pairs = [of(t) / of(o) for t, o in zip(theirs, ours, strict=True)]
    return min(pairs), median(pairs)


def cpu(of: Run) -> float:
    """A run's CPU seconds."""
    return of.cpu_s


def wall(of: Run) -> float:
    """A run's seconds from start to end."""
    return of.wall_s


def peak(of: Run) -> float:
    """A run's peak memory, MB."""
    return of.peak_mb


@dataclass
class Row:
    """A line of the table."""

    what: str
    against: str = ""
    ratio: str = ""
    goal: str = ""
    met: bool | None = None
    seconds: str = ""
    memory: str = ""
    output: str = ""

    HEAD = (
        "| what | ratio, least / median of pairs | goal | met | against | "
        "s, ours / theirs | peak MB | output |\n|---|---|---|---|---|---|---|---|"
    )

    def __str__(self) -> str:
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        cells = (self.what, self.ratio, self.goal, met, self.against, self.seconds)
        return f"| {' | '.join((*cells, self.memory, self.output))} |"


def compared(
    what: str,
    against: str,
    ours: list[Run],
    theirs: list[Run],
    goal: float | None = None,
    of: Callable[[Run], float] = cpu,
) -> Row:
    """A row of two commands' runs."""
    least, middle = ratios(theirs, ours, of)
    return Row(
        what,
        against,
        f"{least:.1f} / {middle:.1f}",
        f"{goal:g}x" if goal else "",
        middle >= goal if goal else None,
        f"{min(map(of, ours)):.2f} / {min(map(of, theirs)):.2f}",
        f"{max(map(peak, ours)):.0f} / {max(map(peak, theirs)):.0f}",
    )
