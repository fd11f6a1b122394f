"""Snakemake's Slurm executor plugin, with what a build of days needs beside it.

A subclass, put in the plugin's place when the Snakefile is read. Submitting is the
plugin's own; these are different, and why:

- A job is the stage's runner itself, not Snakemake twice around it: it sees Slurm's
  environment, can start steps on several machines, and starts seconds sooner.
- A node whose job still runs, after the controller was killed, is not submitted
  again: that job is waited for.
- A node, or a share of its files, is done when its manifest is there. Slurm is asked
  about the others, and where it does not answer, jobs stay as they are. (The plugin
  drops all jobs from its list when squeue fails, and waits forever for a job that was
  preempted and cancelled.)
- What time limits, preemption and dead machines ended is submitted again.
- Jobs' lines, states and failures are shown as they come.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import snakemake_executor_plugin_slurm as plugin
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from scripts.lib import slurm
from scripts.lib.cli import NOT_DONE
from scripts.lib.errors import UserError
from scripts.lib.graph import Node
from scripts.lib.progress import say
from scripts.lib.slurm import SlurmError, SlurmJob
from scripts.lib.stages import STAGES
from scripts.lib.store import Store

LOOK_SECONDS = 1.0
LAST_WORDS_SECONDS = 5.0
AWAY = re.compile(r"Unable to contact slurm controller|Socket timed out")
"""What sbatch says where slurmctld does not answer."""
TAIL_LINES = 10
CUT_SHORT = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""States of jobs that ended through no fault of theirs."""


def register(store: Store) -> None:
    """Have `executor: slurm` use ours, for the graph of this store."""
    Executor.store = store
    ExecutorPluginRegistry().get_plugin("slurm").executor = Executor


class Executor(plugin.Executor):
    """The plugin's executor; one for each run."""

    store: ClassVar[Store]
    failures: ClassVar[list[str]] = []

    def __init__(self, workflow: Any, logger: Any) -> None:
        self.read: dict[str, int] = {}
        self.seen: dict[str, str] = {}
        self.unseen: dict[str, int] = {}
        self.ended: dict[str, float] = {}
        self.published: dict[str, float] = {}
        self.closed: set[str] = set()
        self.live: dict[str, Any] = {}
        self.refused: dict[str, float] = {}
        self.stopping = False
        self.digesting = Lock()  # the threads that submit share what they read
        self.again: dict[str, int] = {}
        self.asked = self.answered = time.monotonic()
        super().__init__(workflow, logger)  # starts the thread that watches

    def __post_init__(self, test_mode: bool = False) -> None:
        super().__post_init__(test_mode)
        self.run_uuid = slurm.job_name()

    def node(self, job: Any) -> Node:
        return self.store.graph.jobs[job.rule.name]

    # ---- submitting --------------------------------------------------------------

    def format_job_exec(self, job: Any) -> str:
        """What a job runs: the runner, as the process that Slurm signals."""
        node = self.node(job)
        words = [sys.executable, "-m", "scripts.lib.run", "--job"]
        words += node.id.split("/")
        return f"trap '' USR1; exec {shlex.join(words)}"  # until it can take it

    def get_account_arg(self, job: Any) -> Any:
        """The account that the cluster's file names; the plugin would guess one."""
        account = job.resources.get("slurm_account")
        yield f" -A {shlex.quote(account)}" if account else ""

    def get_partition_arg(self, job: Any) -> str:
        """The partition that the cluster's file names, else the cluster's default."""
        partition = job.resources.get("slurm_partition")
        return f" -p {shlex.quote(partition)}" if partition else ""

    def run_job(self, job: Any) -> None:
        """Submit a node's job, or wait for the one that is there."""
        node = self.node(job)
        if self.stopping:
            return
        try:
            there = self.adopt(node)
            if there is None:
                with self.digesting:
                    self.store.write_job(node)
                    self.store.raw.save()  # then the job need not read its files too
        except Exception as error:  # nobody waits for what this thread returns
            what = str(error) if isinstance(error, UserError) else repr(error)
            self._report_job_error_threadsafe(SubmittedJobInfo(job), what)
            return
        if there is None:
            super().run_job(job)
            return
        log = self.slurm_logdir / f"rule_{node.id}" / f"{there.id}.log"
        if log.exists():
            self.read[there.id] = log.stat().st_size
        say(
            node.id,
            f"waits for its Slurm job {there.id}, {there.state.lower()} already",
        )
        self._report_job_submission_threadsafe(
            SubmittedJobInfo(
                job, external_jobid=there.id, aux={"slurm_logfile": log, "known": True}
            )
        )

    def adopt(self, node: Node) -> SlurmJob | None:
        """The job that builds this node as it is wanted now; others are cancelled."""
        began = time.monotonic()
        while True:
            try:
                alive = [j for j in slurm.jobs() if j.node == node.id and j.alive]
                break
            except SlurmError as error:
                if self.stopping:
                    raise
                self.be_patient(began, error)
                time.sleep(LOOK_SECONDS)
        with self.digesting:
            waits = bool(alive) and alive[-1].state == "PENDING"
            if alive and self.store.job_is_wanted(node, waits):
                return alive[-1]
        for job in alive:
            say(
                node.id, f"cancels Slurm job {job.id}: it builds what is wanted no more"
            )
            slurm.ask("scancel", job.id)
        return None

    def be_patient(self, since: float, error: SlurmError) -> None:
        """Raise if Slurm has not answered for longer than the profile allows."""
        settings = self.workflow.executor_settings
        patience = settings.status_attempts * settings.init_seconds_before_status_checks
        silent = time.monotonic() - since
        if silent > patience:
            raise UserError(
                "Slurm",
                f"it has not answered for {silent:.0f} s: {error}",
                "its jobs go on; run the same command again when it answers",
            )

    def _report_job_submission_threadsafe(self, job_info: Any) -> None:
        if not job_info.aux.get("known"):
            node = self.node(job_info.job)
            where = job_info.job.resources.get("slurm_partition")
            on = f" in {where}" if where else ""
            say(node.id, f"is Slurm job {job_info.external_jobid}{on}")
        self.live[job_info.external_jobid] = job_info
        super()._report_job_submission_threadsafe(job_info)

    def _report_job_error_threadsafe(self, job_info: Any, msg: str) -> None:
        node = self.node(job_info.job)
        if AWAY.search(msg) and not self.stopping:
            try:
                since = self.refused.setdefault(node.id, time.monotonic())
                self.be_patient(since, SlurmError("sbatch", msg.splitlines()[0]))
            except UserError as error:
                msg = str(error)
            else:  # it may have taken the job all the same: then that one is found
                time.sleep(LOOK_SECONDS)
                self._job_submission_executor.submit(self.run_job, job_info.job)
                return
        self.note_failure(node, msg)
        super()._report_job_error_threadsafe(job_info, msg)

    def note_failure(self, node: Node, what: str) -> None:
        say(node.id, f"failed: {what}")
        self.failures.append(f"{node.id}: {what}")

    # ---- watching ----------------------------------------------------------------

    async def check_active_jobs(
        self, active_jobs: list[Any]
    ) -> AsyncGenerator[Any, None]:
        """Report what has finished; yield what goes on."""
        self.next_seconds_between_status_checks = LOOK_SECONDS
        states, problem = self.states()
        for info in active_jobs:
            node = self.node(info.job)
            self.relay(info)
            if present(Path(node.manifest)):
                if self.has_said_so(info):
                    self.live.pop(info.external_jobid, None)
                    self.report_job_success(info)
                else:
                    yield info
            elif problem:
                self.live.pop(info.external_jobid, None)
                self.note_failure(node, problem)
                self.report_job_error(info, msg=problem)
            elif states is None:
                yield info
            elif what := self.judge(info, states):
                self.live.pop(info.external_jobid, None)
                self.note_failure(node, what)
                self.report_job_error(info, msg=what)
            elif info.external_jobid not in self.ended:
                yield info
            elif self.ended[info.external_jobid] < 0:
                self.ended.pop(info.external_jobid)
                self.live.pop(info.external_jobid, None)
                self._job_submission_executor.submit(self.run_job, info.job)
            else:
                yield info

    def has_said_so(self, info: Any) -> bool:
        """Whether a job that has published was heard to say so, or some seconds ago."""
        id = info.external_jobid
        since = self.published.setdefault(id, time.monotonic())
        return id in self.closed or time.monotonic() - since > LAST_WORDS_SECONDS

    def states(self) -> tuple[dict[str, SlurmJob] | None, str]:
        """All jobs by id, where it is time to ask; what to say where Slurm is gone."""
        now = time.monotonic()
        every = self.workflow.executor_settings.init_seconds_before_status_checks
        if now - self.asked < every:
            return None, ""
        try:
            found = {job.id: job for job in slurm.jobs()}
        except (UserError, OSError) as problem:
            error = (
                problem
                if isinstance(problem, SlurmError)
                else (SlurmError("squeue", str(problem)))
            )
            if self.answered >= self.asked:
                print(f"[slurm] {error}; waiting", file=sys.stderr, flush=True)
            self.asked = time.monotonic()
            try:
                self.be_patient(self.answered, error)
            except UserError as gone:
                return None, str(gone)
            return None, ""
        if self.answered < self.asked:
            print("[slurm] answers again", file=sys.stderr, flush=True)
        self.asked = self.answered = time.monotonic()
        return found, ""

    def judge(self, info: Any, states: dict[str, SlurmJob]) -> str:
        """What is wrong with a job that has not published; marks what is to go on."""
        node, id = self.node(info.job), info.external_jobid
        found = states.get(id)
        if found is None:
            self.unseen[id] = self.unseen.get(id, 0) + 1
            if self.unseen[id] < 3:
                return ""
            return f"Slurm knows nothing of job {id} any more; {self.log_of(info)}"
        self.unseen.pop(id, None)
        self.show_state(node, found)
        if found.state not in slurm.ENDED:
            self.ended.pop(id, None)
            return ""
        # a shared file system may show the manifest some seconds later
        latency = self.workflow.execution_settings.latency_wait
        since = self.ended.setdefault(id, time.monotonic())
        if found.state == "COMPLETED" and time.monotonic() - since < latency:
            return ""
        try:
            goes_on = self.goes_on(node, found)
        except SlurmError:
            return ""  # asked again the next time
        if goes_on:
            self.again[node.id] = self.again.get(node.id, 0) + 1
            self.ended[id] = -1.0
            return ""
        return self.failure(info, found)

    def goes_on(self, node: Node, job: SlurmJob) -> bool:
        """Whether a job that ended is to be submitted again."""
        if self.again.get(node.id, 0) >= node.placement["slices"]:
            return False
        if job.state in CUT_SHORT:
            return True
        if not STAGES[node.stage].trains:
            return STAGES[node.stage].goes_on and job.state == "TIMEOUT"
        if job.state == "FAILED":
            return slurm.exit_code(job.id) == NOT_DONE
        return job.state == "TIMEOUT"

    def failure(self, info: Any, job: SlurmJob) -> str:
        """Why a job failed, what to do, and where its log is."""
        node = self.node(info.job)
        placed = node.placement
        key = f"placement.{node.stage}.{node.name}"
        why = (
            {
                "CANCELLED": "was cancelled; the same command again resumes it",
                "TIMEOUT": f"took more than its {placed['minutes']} minutes: raise "
                f"{key}.minutes",
                "OUT_OF_MEMORY": f"needed more than its {placed['memory_gb']:g} GB of "
                f"memory: raise {key}.memory_gb",
                "COMPLETED": "ended without publishing anything",
            }.get(job.state)
            or self.said(info)
            or f"ended {job.state}"
        )
        if self.again.get(node.id, 0) >= placed["slices"]:
            why += f", as {placed['slices']} jobs before it: raise {key}.slices"
        on = f" on {job.machines}" if job.machines else ""
        log = self.log_of(info) if job.machines else "it had not begun"
        return f"Slurm job {job.id}{on} {why}; {log}"

    def said(self, info: Any) -> str:
        """The last error in a job's log, which says most."""
        lines = read_lines(Path(info.aux["slurm_logfile"]))
        errors = [line for line in lines if line.startswith("error: ")]
        start = f"error: {self.node(info.job).id}: "
        return f"failed: {errors[-1].removeprefix(start)}" if errors else ""

    def log_of(self, info: Any) -> str:
        """Where a job's log is, and its last lines where none were shown."""
        log = Path(info.aux["slurm_logfile"])
        if not log.exists():
            return (
                f"it wrote no {os.path.relpath(log)}: is this folder there on its "
                "machine? `make doctor` looks"
            )
        text = f"its log is {os.path.relpath(log)}"
        if info.aux.get("known"):
            text += "".join(f"\n  {line}" for line in read_lines(log)[-TAIL_LINES:])
        return text

    def show_state(self, node: Node, job: SlurmJob) -> None:
        """One line where a job begins to wait, or waits for another reason.

        That it runs, it says itself; how it ended is said where that counts.
        """
        text = f"{job.state.lower()}: {job.reason}"
        quiet = {"RUNNING", "CONFIGURING", slurm.ENDING, *slurm.ENDED}
        if job.state not in quiet and self.seen.get(job.id) != text:
            held = "hold" in job.state.lower() or "held" in job.reason.lower()
            way = f"; scontrol release {job.id}, or scancel {job.id}" if held else ""
            say(node.id, f"Slurm job {job.id} is {text}{way}")
        self.seen[job.id] = text

    def relay(self, info: Any) -> None:
        """Show the whole lines that a job's log has more than before."""
        log = Path(info.aux["slurm_logfile"])
        try:
            with open(log, "rb") as file:
                file.seek(self.read.get(info.external_jobid, 0))
                new, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or a shared file system's passing trouble
            return
        self.read[info.external_jobid] = (
            self.read.get(info.external_jobid, 0) + len(new) + len(newline)
        )
        node = self.node(info.job)
        for line in new.decode(errors="replace").splitlines():
            if line.startswith((f"{node.id}  done in", f"{node.id}  restored")):
                self.closed.add(info.external_jobid)
            if line.startswith((node.id, "  ", "error: ", "hint: ")) or not line:
                print(line, file=sys.stderr, flush=True)
            else:
                say(node.id, line)

    def cancel(self) -> None:
        """Cancel at Ctrl-C, after the threads that submit and watch have ended."""
        self.stopping = True
        self.shutdown()
        self.cancel_jobs([*self.live.values()])

    def cancel_jobs(self, active_jobs: list[Any]) -> None:
        """Cancel these; training saves first."""
        for info in active_jobs:
            say(self.node(info.job).id, f"cancels Slurm job {info.external_jobid}")
        super().cancel_jobs(active_jobs)


def read_lines(path: Path) -> list[str]:
    """A log's lines; none where it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def present(path: Path) -> bool:
    """Whether a file is there, by reading its folder: NFS remembers what was not."""
    try:
        return path.name in os.listdir(path.parent)
    except OSError:
        return False
