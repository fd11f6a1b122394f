"""Each fault of a cluster, on a real one: said clearly, nothing lost, nothing twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.builds import Site, forget, wrapper


def test_a_cancelled_job_fails_clearly_and_a_rerun_resumes(site: Site):
    site.train()
    site.project.edit("config/config.yaml", "weight_decay: 0.1", "weight_decay: 0.2")
    site.change(  # a branch that the cancelled job does not touch
        "config/config.yaml",
        pack={"other": {"tokenizer": "tiny", "data": "chat", "sequence_length": 64}},
    )
    build = site.build("all")
    job = build.at_step("pretrain/base", 60)
    site.cluster.run("scancel", job)
    assert build.end() == 1
    assert f"Slurm job {job} on n1 was cancelled" in build.said
    assert f"logs/slurm/rule_pretrain/base/{job}.log" in build.said
    assert "pack/other  done" in build.said, "the rest goes on"
    saved = max(site.saves("pretrain/base"))
    assert saved >= 50
    again = site.build("pretrain")
    again.done()
    assert "pretrain/base  resumes" in again.said
    log = (site.project.path / "logs/pretrain/base.log").read_text()
    assert f"resuming from checkpoint-{saved}" in log


def test_a_stage_longer_than_its_time_limit_ends_with_the_same_bytes(site: Site):
    site.train(steps=300)
    site.build("pretrain").done()
    whole = site.weights("pretrain/base")
    forget(site, "pretrain/base")
    site.place("pretrain", minutes=5, stop_seconds=30)
    build = site.build("pretrain")
    for step in (60, 150):
        job = build.at_step("pretrain/base", step)
        (where,) = (j["node"] for j in site.cluster.jobs() if j["id"] == job)
        os.kill(trainer := rank(site, where), signal.SIGSTOP)  # nor be done too soon
        site.cluster.expire(job, 60)  # Slurm signals 30 to 60 s before the limit
        site.cluster.wait(lambda: [*site.project.path.glob("work/pretrain/*/stop")], 90)
        os.kill(trainer, signal.SIGCONT)
        build.until(rf"(?s)^(.*for its time limit; goes on){{{1 + (step > 60)}}}", 90)
    assert build.done() == {"pretrain/base"}
    assert build.said.count("pretrain/base  resumes") == 2, "three slices"
    assert site.weights("pretrain/base") == whole
    assert build.said.count("is Slurm job") == 1, "requeued, under one id"


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Keep a process stopped, also after Slurm wakes it: it could save in time."""
    over = threading.Event()

    def freeze() -> None:
        with suppress(ProcessLookupError):
            while not over.wait(0.02):
                os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_job_killed_at_its_time_limit_goes_on_from_the_last_save(site: Site):
    site.train(minutes=5, stop_seconds=1)
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    (where,) = (j["node"] for j in site.cluster.jobs() if j["id"] == job)
    with frozen(rank(site, where)):
        site.cluster.expire(job)
        site.cluster.wait_state(job, "TIMEOUT", seconds=90)
    assert build.done() == {"pretrain/base"}
    assert build.job("pretrain/base") != job
    assert "pretrain/base  resumes" in build.said


def test_a_job_that_may_not_be_requeued_is_submitted_again(site: Site):
    site.train(steps=200)
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    site.cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert build.done() == {"pretrain/base"}
    assert "cannot be requeued" in build.said
    assert build.job("pretrain/base") != job
    assert "pretrain/base  resumes" in build.said


def test_the_budget_of_slices_is_kept(site: Site):
    site.train(minutes=1, slices=1)
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    build.kill(signal.SIGINT)
    build.end()
    site.cluster.wait_state(job, "CANCELLED")
    (work,) = site.project.path.glob("work/pretrain/base-*/stop")
    work.with_name("seconds.json").write_text("61.0")
    again = site.build("pretrain")
    assert again.end() == 1
    assert "which is its 1 slices of 1 minutes" in again.said
    assert "raise placement.pretrain.base.slices" in again.said


def test_a_node_that_dies_has_its_job_go_on_elsewhere(site: Site):
    site.train()
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    (where,) = (j["node"] for j in site.cluster.jobs() if j["id"] == job)
    site.cluster.kill_node(where)
    build.done()
    assert f"pretrain/base  resumes on n{3 - int(where[1:])}" in build.said
    assert build.job("pretrain/base") == job, "requeued by Slurm"


def test_a_preempted_job_is_requeued_and_goes_on(site: Site):
    preempt(site, "gpu")


def test_a_job_that_preemption_cancels_is_submitted_again(site: Site):
    build, job = preempt(site, "cancel")
    assert build.job("pretrain/base") != job


def preempt(site: Site, partition: str):
    site.train(partition=partition)
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    high = site.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 600"
    )
    site.cluster.wait_state(high, "RUNNING")
    site.cluster.run("scancel", high)
    assert build.done() == {"pretrain/base"}
    assert "pretrain/base  resumes" in build.said
    return build, job


def test_a_controller_of_slurm_away_for_a_minute_changes_nothing(site: Site):
    """Also where a job ends meanwhile and the next is to be submitted."""
    site.train(steps=200)
    site.change("config/config.yaml", sft={"instruct": {"steps": 5}})
    build = site.build("sft")
    build.at_step("pretrain/base", 60)
    site.cluster.stop_controller()
    back = time.monotonic() + 60
    try:
        build.until(r"^pretrain/base  done in")
        build.until(r"^\[slurm\] .*; waiting")
        site.cluster.wait(lambda: time.monotonic() > back, 90)
    finally:
        site.cluster.start_controller()
    assert build.done() == {"pretrain/base", "sft/instruct"}
    assert build.said.count("is Slurm job") == 2


def test_a_squeue_that_fails_is_waited_for_and_then_given_up(
    site: Site, tmp_path: Path
):
    """The job goes on, and the next run finds it."""
    real = shutil.which("squeue")
    broken = tmp_path / "broken"
    path = wrapper(
        tmp_path / "bin",
        "squeue",
        f'[ -e {broken} ] && {{ echo "slurm_load_jobs error" >&2; exit 1; }}\n'
        f'sleep 1; exec {real} "$@"',
    )
    site.train()
    build = site.build("pretrain", "--slurm-status-attempts", "3", PATH=path)
    job = build.at_step("pretrain/base", 20)
    broken.touch()
    assert build.end() == 1
    assert "Slurm: it has not answered for" in build.said
    broken.unlink()
    again = site.build("pretrain")
    again.done()
    assert "is Slurm job" not in again.said, f"submitted {job} again"
    assert site.submitted() == ["pretrain/base"]


def test_a_killed_controllers_jobs_are_taken_over(site: Site):
    site.train()
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 20)
    build.kill()
    again = site.build("pretrain")
    again.until(rf"^pretrain/base  waits for its Slurm job {job}, running already")
    third = site.build("pretrain")
    assert third.end() == 1 and "another build is running in this folder" in third.said
    again.done()
    assert site.submitted() == ["pretrain/base"]


def test_a_job_that_is_wanted_no_more_is_replaced(site: Site):
    site.train()
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 20)
    build.kill()
    site.train(steps=40)
    again = site.build("pretrain")
    again.done()
    assert f"cancels Slurm job {job}: it builds what is wanted no more" in again.said
    assert site.submitted() == ["pretrain/base", "pretrain/base"]


def test_an_interrupted_controller_cancels_its_jobs_which_save(site: Site):
    site.train()
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 60)
    build.kill(signal.SIGINT)
    assert build.end() != 0
    site.cluster.wait_state(job, "CANCELLED")
    log = (site.project.path / "logs/pretrain/base.log").read_text()
    assert re.search(r"stopped at step \d+ of 400, saved", log)
    again = site.build("pretrain")
    again.done()
    assert "pretrain/base  resumes" in again.said


def test_a_terminated_controller_lets_its_jobs_end_and_submits_no_more(site: Site):
    site.train(steps=200)
    site.change("config/config.yaml", sft={"instruct": {"steps": 5}})
    build = site.build("sft")
    build.at_step("pretrain/base", 20)
    os.kill(build.process.pid, signal.SIGTERM)
    build.end()
    assert "pretrain/base  done in" in build.said
    assert site.submitted() == ["pretrain/base"]
    again = site.build("sft")
    assert again.done() == {"sft/instruct"}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_short_of_memory_is_told_so(site: Site, nodes: int):
    if not site.cluster.kernel_memory:
        pytest.skip("NOT TESTED: no memory cgroups of version 1 here")
    site.train(memory_gb=0.15, nodes=nodes)
    build = site.build("pretrain")
    assert build.end() == 1
    assert "0.15 GB" in build.said and "memory" in build.said
    assert "raise placement.pretrain.base.memory_gb" in build.said


def test_a_dead_rank_ends_the_job_at_once(site: Site):
    site.train(nodes=2)
    build = site.build("pretrain")
    job = build.at_step("pretrain/base", 20)
    victim = rank(site, "n2")
    os.kill(victim, signal.SIGKILL)
    site.cluster.wait_state(job, "FAILED", seconds=60)
    assert build.end() == 1
    assert "pretrain/base" in build.said.split("[failed]")[1]


def rank(site: Site, node: str) -> int:
    """The process of a node that trains."""
    for pid in site.cluster.processes(node):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        starters = {b"torch.distributed.run", b"scripts.lib.launch", b"srun"}
        if b"--recipe" in words and not starters & set(words):
            return pid
    raise AssertionError(f"no rank on {node}")


def test_a_job_that_ends_well_short_of_its_step_publishes_nothing(site: Site):
    before = site.weights("pretrain/base")
    site.train()
    script = site.project.path / "scripts/transformers/pretrain.py"
    text = script.read_text()
    script.write_text(
        text.replace(
            "    if not common.train(",
            "    recipe = recipe.model_copy(update={'steps': 5})\n    if not common.train(",
        )
    )
    assert script.read_text() != text
    build = site.build("pretrain")
    assert build.end() == 1
    assert site.weights("pretrain/base") == before
    assert "400" in build.said.split("error: ")[1], "names the step it should reach"
