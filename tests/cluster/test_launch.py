"""Processes and Ray over two machines: started, ended together, nothing left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kit import Cluster

ROOT = Path(__file__).parents[2]
PROGRAMS = "tests.cluster.programs"


class Job:
    """A batch job that starts a program as the runner starts a script."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        launcher: str,
        words: list[str],
        **place: Any,
    ) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        placement = {"memory_gb": 2.0, "processes": 1} | place
        asked = {"launcher": launcher, "placement": placement, "work": str(folder)}
        asked |= {"words": ["-P", "-m", f"{PROGRAMS}.{words[0]}", *words[1:]]}
        env = {"PYTHONPATH": ROOT, "PYTHONUNBUFFERED": 1, "OMP_NUM_THREADS": 1}
        line = ["env", *(f"{name}={value}" for name, value in env.items())]
        line += [sys.executable, "-P", "-m", f"{PROGRAMS}.batch", json.dumps(asked)]
        self.id = cluster.submit(
            f"--nodes={place['nodes']}", "--ntasks-per-node=1", "--time=30",
            f"--cpus-per-task={place['cpus']}", "--mem=2000",
            *([f"--gres=gpu:{place['gpus']}"] if place["gpus"] else []),
            *([f"--nodelist={place['on']}"] if "on" in place else []),
            f"--output={folder}/log.txt", f"--chdir={ROOT}", "--no-requeue",
            "--wrap", f"exec {shlex.join(line)}",
        )  # fmt: skip

    def ends(self, state: str) -> dict[str, str]:
        """Wait until it has ended so; what Slurm says of it."""
        try:
            self.cluster.wait_state(self.id, state, seconds=60)
        except Exception:
            print((self.folder / "log.txt").read_text())
            raise
        return self.cluster.job(self.id)

    def wrote(self, name: str) -> Any:
        """Wait for one of its files."""
        path = self.folder / name
        self.cluster.wait(lambda: path.exists() or self.has_ended(), 90)
        assert path.exists(), (self.folder / "log.txt").read_text()
        return json.loads(path.read_text())

    def has_ended(self) -> bool:
        states = [job["state"] for job in self.cluster.jobs() if job["id"] == self.id]
        return not {*states} & {"PENDING", "RUNNING"}

    def processes(self, node: str, name: str = "") -> list[int]:
        found = []
        for pid in self.cluster.processes(node):
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            ours = f"SLURM_JOB_ID={self.id}".encode() in environ
            if ours and name in ("", comm):
                found.append(pid)
        return found

    def left_nothing(self) -> bool:
        """Neither processes nor folders, on any machine, a moment after its end."""
        self.cluster.wait(
            lambda: not any(map(self.processes, self.cluster.nodes)), seconds=10
        )
        return not [*Path("/tmp").glob(f"ray-{self.id}-*")]


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Callable[..., Job]:
    def start(name: str, launcher: str, *words: str, **place: Any) -> Job:
        folder = tmp_path / name
        program, *flags = words
        return Job(cluster, folder, launcher, [program, str(folder), *flags], **place)

    return start


def test_torchrun_over_two_machines_and_one_dead_process_ends_all(run):
    both = {"nodes": 2, "cpus": 1, "gpus": 2}
    sums = run("sums", "torchrun", "ranks", **both, processes=2)
    dies = run("dies", "torchrun", "ranks", "1", **both)
    sums.ends("COMPLETED")
    ranks = [sums.wrote(f"{rank}.json") for rank in range(4)]
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {rank["total"] for rank in ranks} == {1 + 2 + 3 + 4}
    assert all(len(rank["gpus"].split(",")) == 2 for rank in ranks)
    ended = dies.ends("FAILED")  # its walltime is 30 minutes
    assert ended["ExitCode"] != "0:0"
    assert dies.wrote("1.json") == {**dies.wrote("0.json"), "host": "n2"}
    assert sums.left_nothing() and dies.left_nothing()


def test_ray_over_two_machines_outlives_anothers_end(run):
    large = run("large", "ray", "with_ray", "0", nodes=2, cpus=2, gpus=4)
    seen = large.wrote("ray.json")
    assert seen["hosts"] == ["n1", "n2"]
    assert (seen["resources"]["CPU"], seen["resources"]["GPU"]) == (4, 8)
    small = run("small", "ray", "with_ray", "7", nodes=1, cpus=1, gpus=2, on="n1")
    seen = small.wrote("ray.json")
    assert seen["hosts"] == ["n1"]
    assert (seen["resources"]["CPU"], seen["resources"]["GPU"]) == (1, 2)
    (small.folder / "go").touch()
    assert small.ends("FAILED")["ExitCode"] == "7:0", "the script's own"
    assert small.left_nothing()
    (large.folder / "go").touch()
    assert large.wrote("again.json") == ["n1", "n2"]
    large.ends("COMPLETED")
    assert large.left_nothing()
    logs = large.folder / "ray"
    assert (logs / "n1/gcs_server.out").exists() and (logs / "n2/raylet.out").exists()


def test_a_cancelled_ray_leaves_nothing_and_a_dead_machine_ends_all(run):
    both = {"nodes": 2, "cpus": 1, "gpus": 1}
    cancelled = run("cancelled", "ray", "with_ray", "0", **both)
    broken = run("broken", "ray", "with_ray", "0", **both)
    cancelled.wrote("ray.json"), broken.wrote("ray.json")
    cancelled.cluster.run("scancel", cancelled.id)
    (raylet,) = broken.processes("n2", "raylet")
    os.kill(raylet, signal.SIGKILL)
    cancelled.ends("CANCELLED")
    assert cancelled.left_nothing()
    assert broken.ends("FAILED")["ExitCode"] == "1:0"  # its walltime is 30 minutes
    assert broken.left_nothing()
    log = (broken.folder / "log.txt").read_text()
    assert "error: Ray on n2: ended before the script" in log[-500:]
    for job in (cancelled, broken):
        assert (job.folder / "ray/n1/raylet.out").exists()
        assert (job.folder / "ray/n2/raylet.out").exists()
