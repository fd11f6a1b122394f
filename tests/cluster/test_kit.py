"""The test cluster does what the tests of faults need of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.kit import Cluster, IndexTaken, inside

LONG = "sleep 600"


@pytest.fixture
def sbatch(cluster: Cluster, tmp_path: Path):
    """Submit a line of shell; its output goes to tmp_path/<id>.log."""

    def submit(line: str, *words: str) -> str:
        log = tmp_path / "%j.log"
        small = ["--mem=100", f"--output={log}", "--open-mode=append"]
        return cluster.submit(*small, *words, "--wrap", line)

    return submit


def test_nodes_have_names_gpus_and_processes_of_their_own(cluster, sbatch, tmp_path):
    job = sbatch(
        "srun sh -c 'echo $(hostname) $(getent hosts n2) $CUDA_VISIBLE_DEVICES $(ls -d /proc/[0-9]* | wc -l)'",
        "--nodes=2", "--gpus-per-node=4",
    )  # fmt: skip
    cluster.wait_state(job, "COMPLETED")
    rows = [row.split() for row in (tmp_path / f"{job}.log").read_text().splitlines()]
    assert {row[0] for row in rows} == {"n1", "n2"}
    assert {tuple(row[1:4]) for row in rows} == {
        (f"{cluster.network}.12", "n2", "0,1,2,3")
    }
    assert all(int(row[4]) < 20 for row in rows)


def test_job_of_a_node_without_power_runs_on_another(cluster, sbatch):
    job = sbatch(LONG)
    node = cluster.wait_state(job, "RUNNING")["node"]
    cluster.wait(lambda: len(cluster.processes(node)) > 2)
    cluster.kill_node(node)
    assert not inside(cluster.nodes[node].space)
    cluster.wait(lambda: cluster.state(node).startswith("down"), seconds=120)
    again = cluster.wait_state(job, "RUNNING", seconds=120)
    assert again["node"] not in ("", node)
    cluster.start_node(node)
    cluster.run("srun", "--nodes=1", f"--nodelist={node}", "--mem=100", "true")


def test_jobs_outlive_the_controller(cluster, sbatch, tmp_path):
    job = sbatch(f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo done")
    cluster.wait_state(job, "RUNNING")
    cluster.stop_controller()
    assert "is DOWN" in cluster.run("scontrol", "ping", check=False)
    cluster.start_controller()
    assert cluster.job(job)["JobState"] == "RUNNING"
    (tmp_path / "go").touch()
    cluster.wait_state(job, "COMPLETED")
    assert (tmp_path / f"{job}.log").read_text() == "done\n"


def test_hidden_folder_is_empty_on_one_node_only(cluster, tmp_path):
    (tmp_path / "file").touch()
    cluster.hide("n1", tmp_path)
    assert not cluster.on("n1", "ls", str(tmp_path))
    assert cluster.on("n2", "ls", str(tmp_path)) == "file\n"
    words = ["srun", "--nodelist=n1", "--mem=100", "--chdir=/", "ls", str(tmp_path)]
    assert not cluster.run(*words)
    cluster.unhide("n1", tmp_path)
    assert cluster.run(*words) == "file\n"


@pytest.mark.parametrize(
    ("partition", "state"), [("gpu", "PENDING"), ("cancel", "PREEMPTED")]
)
def test_high_partition_takes_the_nodes(cluster, sbatch, partition, state):
    whole = ["--nodes=2", "--exclusive"]
    low = sbatch(LONG, *whole, f"--partition={partition}")
    cluster.wait_state(low, "RUNNING")
    high = sbatch(LONG, *whole, "--partition=high")
    cluster.wait_state(high, "RUNNING")
    cluster.wait_state(low, state)
    cluster.run("scancel", high)
    if state == "PENDING":
        cluster.wait_state(low, "RUNNING")
        assert cluster.job(low)["Restarts"] == "1"


def test_requeued_job_starts_within_30_seconds(cluster, sbatch, tmp_path):
    job = sbatch(
        f'[ "$SLURM_RESTART_COUNT" ] || {{ scontrol requeue $SLURM_JOB_ID; {LONG}; }}'
    )
    cluster.wait_state(job, "COMPLETED", seconds=30)


def test_job_over_its_memory_is_killed(cluster, sbatch):
    job = sbatch(
        f"{sys.executable} -c 'x = b\"x\" * (300 << 20); import time; time.sleep(600)'"
    )
    state = "OUT_OF_MEMORY" if cluster.kernel_memory else "FAILED"
    cluster.wait_state(job, state)


def test_job_over_its_time_is_killed(cluster, sbatch):
    job = sbatch(LONG, "--partition=short")
    cluster.wait_state(job, "RUNNING")
    cluster.expire(job)
    cluster.wait_state(job, "TIMEOUT", seconds=90)


def test_running_index_is_refused_and_stop_leaves_nothing(cluster, tmp_path_factory):
    with pytest.raises(IndexTaken):
        Cluster(tmp_path_factory.mktemp("same"), index=cluster.index).start()
    other = Cluster(
        tmp_path_factory.mktemp("other"), nodes=1, index=cluster.index + 100
    )
    with other:
        other.submit("--output=/dev/null", "--wrap", LONG)
        other.wait(lambda: len(other.processes("n1")) > 2)
        pids = other.processes("n1") + inside(other.controller.space)
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    left = [*Path("/run/netns").glob(f"sl{other.index}-*")]
    left += Path("/sys/class/net").glob(f"*sl{other.index}*")
    assert not left
