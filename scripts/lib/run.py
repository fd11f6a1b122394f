"""Build one node: fetch what it reads, run its script, publish, record.

    python -m scripts.lib.run STAGE NODE

Works in work/<stage>/<node>-<key>/, keyed by the inputs, so that a rerun with the
same inputs resumes there and any other starts anew. Publishes artifacts/<stage>/<node>/
by rename when the script has finished and its files were checked; what was there
before stays until then. Records the node in dvc.lock (under `dvc repro`, DVC does).
Inputs that were built before are restored from DVC's cache instead.

NODE-2of8 is one of the jobs that share the node's files: it leaves the tokens of its
part in a folder within the node's, publishes and records nothing. The node's own job
takes them over, and does itself what none of them did.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from scripts.lib import cli, graph, hub, identity, launch, lineage, outputs, slurm
from scripts.lib.attest import attest
from scripts.lib.digest import (
    Memory,
    md5_file,
    on_all_cores,
    tree_digest,
    write_atomic,
)
from scripts.lib.errors import AttestError, UserError
from scripts.lib.graph import Graph, Node
from scripts.lib.progress import say
from scripts.lib.stages import STAGES
from scripts.lib.store import (
    GRAPH,
    IN_RUN,
    REMOTE,
    STATE,
    Record,
    Store,
    apart_from_builds,
    dump_yaml,
    dvc_errors,
    key_of,
    load_yaml,
    read_lock,
    try_lock,
    write_lock,
)

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

TAIL_LINES = 20
SHOW_SECONDS = 4.0
REQUEUE_SECONDS = 60.0
LAUNCHER_SAYS = re.compile(r"[EIW]\d{4} |Traceback |srun: |slurmstepd: |\[rank\d")
"""Lines of torchrun and Slurm."""
OUT_OF_MEMORY = re.compile(r"Out Of Memory|oom[-_ ]kill", re.IGNORECASE)
"""How Slurm says so where a step of several machines ran out of memory."""
MADE_BY = "made_by.json"
SETUP = "setup_seconds.json"
"""Seconds until its first step."""
SHARES = "[0-9]*of[0-9]*"
"""Folders in a node's work folder, of jobs that share its files."""
PYTHON_OF_NVIDIA = Path(".venv-nvidia/bin/python")


def main(argv: list[str] | None = None) -> int:
    """Build the node that `argv` names."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("stage", choices=[*STAGES])
    flags.add_argument("node")
    flags.add_argument(
        "--job", action="store_true", help="as the Slurm job that a build submitted"
    )
    args = flags.parse_args(argv)
    whole = current_graph()
    id = f"{args.stage}/{args.node}"
    if id not in whole.jobs:
        raise UserError(id, "no such node", f"there are: {', '.join(whole.nodes)}")
    with dvc_errors():
        return Job(Store(whole), whole.jobs[id], args.job).run()


def current_graph() -> Graph:
    """The graph of the run this job belongs to, or of the config as it is now."""
    if os.environ.get(IN_RUN) and GRAPH.exists():
        return Graph.from_json(GRAPH.read_text())
    declared = read_plan_command()
    return graph.build(Path(declared))


def read_plan_command() -> str:
    """The config that dvc.yaml was made from."""
    try:
        words = load_yaml(Path("dvc.yaml"))["stages"]["plan"]["cmd"].split()
        return str(words[words.index("--config") + 1])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError("dvc.yaml", "names no config", "run `make plan`") from error


class Job:
    """The building of one node."""

    def __init__(self, store: Store, node: Node, submitted: bool) -> None:
        self.store, self.node = store, node
        self.by_dvc = "DVC_STAGE" in os.environ
        self.slurm = os.environ["SLURM_JOB_ID"] if submitted else ""
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped_by = 0
        self.recording = False
        self.old = Path(node.folder).with_name(f".{node.name}.old")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self.stop(number))

    def run(self) -> int:
        """Build or restore it; the exit code is NOT_DONE where it is to go on."""
        with self.alone(), apart_from_builds() if self.by_dvc else nullcontext():
            if self.slurm:
                self.take_job()
            from dvc.repo import Repo

            logging.getLogger("dvc").setLevel(logging.WARNING)
            with Repo(_wait_for_lock=True) as repo:
                link_only(repo)
                for file in self.node.files:
                    if not Path(file).exists() and Path(f"{file}.dvc").exists():
                        say(self.node.id, f"pulls {file}")
                        repo.pull(targets=[f"{file}.dvc"])
                for parent in self.node.parents:
                    self.fetch(repo, parent)
                self.collect(repo)
                if self.node.share:
                    return self.make_share(repo)
                if not self.by_dvc and self.restore(repo):
                    return 0
                return self.build(repo)

    def alone(self) -> IO[str]:
        """Hold the job's lock, which ends with this process and its script's."""
        path = STATE / f"{self.node.id}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
        if not try_lock(lock):
            say(self.node.id, "waits for the process that builds it already")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        self.lock = lock
        return lock

    # ---- as a Slurm job --------------------------------------------------------

    def take_job(self) -> None:
        """Run where this job was submitted to; leave word of what it builds from."""
        placement = json.loads(self.node.job.read_text())["placement"]
        self.node = dataclasses.replace(self.node, placement=placement)
        self.store.write_job(self.node)

    def stop(self, number: int) -> None:
        """Ask the script to save and stop: by a file, and directly where it is ours.

        A launcher that is sent a signal would end its processes at once.
        """
        self.stopped_by = number
        if self.process is None:
            if number == signal.SIGTERM and not self.recording:
                raise UserError(self.node.id, "stopped before it began", "run again")
            return
        (self.work / "stop").touch()
        if self.direct:
            self.process.terminate()

    def go_on_later(self) -> int:
        """Have Slurm start this job again after its time limit, in the same folder.

        Where it will not, the controller submits another.
        """
        step = progress_line(self.work / "progress.json", True).split("  ")[0]
        reached = f"at {step}" if step else "before its first step"
        say(
            self.node.id, f"stopped {reached} for its time limit; goes on in a next job"
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            slurm.ask("scontrol", "requeue", self.slurm)
            time.sleep(REQUEUE_SECONDS)  # it ends this process
        except UserError as error:
            say(self.node.id, f"cannot be requeued: {error}")
        return cli.NOT_DONE

    def check_budget(self) -> None:
        """Raise where all slices of its time are used."""
        placed = self.node.placement
        clock = self.work / "seconds.json"
        used = json.loads(clock.read_text()) / 60 if clock.exists() else 0.0
        minutes = placed["minutes"]
        early = placed["stop_seconds"] / 60 + 1  # Slurm may signal a minute sooner
        if used >= placed["slices"] * max(minutes - early, minutes / 2):
            raise UserError(
                self.node.id,
                f"has run {used:.0f} minutes, which is its {placed['slices']} slices of "
                f"{placed['minutes']} minutes, and reached "
                f"{progress_line(self.work / 'progress.json', True) or 'no step'}",
                f"raise placement.{self.node.stage}.{self.node.name}.slices; it goes on "
                f"from its last save",
            )

    # ---- what it reads ---------------------------------------------------------

    def fetch(self, repo: Repo, id: str) -> None:
        """See that a parent's artifact is here with the content that is recorded."""
        from dvc.repo import lock_repo

        parent = self.store.graph.nodes[id]
        wanted = [p for p in self.node.artifacts if self.store.graph.owner(p) == id]
        with lock_repo(repo):  # DVC writes the file in place
            recorded = Record.of(read_lock().get(parent.dvc, {})).outs
        memory = self.store.memory(parent)
        missing = [
            p for p in wanted if memory.recorded_as(Path(p)) != recorded.get(p, "none")
        ]
        if missing:
            say(self.node.id, f"fetches {', '.join(missing)} from DVC")
            with lock_repo(repo):
                (stage,) = repo.stage.collect(parent.dvc)
                bring(repo, stage, Record(recorded), self.store)
            memory = self.store.memory(parent)
            missing = [
                p for p in missing if memory.recorded_as(Path(p)) != recorded.get(p)
            ]
            if missing:
                REMOTE.unlink(missing_ok=True)  # it remembered wrongly
                raise UserError(
                    ", ".join(missing),
                    "recorded in dvc.lock, but in no cache and no remote",
                    "run the same command again: it will be rebuilt",
                )
        memory.save()
        tell_dvc(repo, memory, [parent.folder])

    def collect(self, repo: Repo) -> None:
        """Take the inputs as they are now, and the key that follows from them."""
        from dvc.dependency.param import ParamsDependency
        from dvc.repo import lock_repo
        from dvc_data.hashfile.hash_info import HashInfo

        with lock_repo(repo):
            (stage,) = repo.stage.collect(self.node.dvc)
            tell_dvc(repo, self.store.raw, self.node.files)
            stage.save_deps()
            self.deps = {}
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):
                    key = f"{self.node.stage}.{self.node.name}"
                    dep.hash_info = HashInfo("params", {key: self.node.params})  # type: ignore[arg-type]
                else:
                    self.deps[dep.def_path] = str(dep.hash_info.value)
        self.inputs = {d.def_path: (d.hash_info, d.meta) for d in stage.deps}
        self.key = key_of(self.node.params, self.deps)

    def copy_code(self) -> Path:
        """The code that was planned, in a folder that edits do not reach."""
        copy = self.work / "code"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree("scripts", copy / "scripts", ignore=ignored)
        identity.forget()
        own = identity.code_of(self.node.script)
        if own | identity.as_now(self.node.code) != self.node.code:
            raise UserError(
                self.node.id, "its code changed since it was planned", "run again"
            )
        return copy

    def check_planned(self, repo: Repo) -> None:
        """Raise where what the node is made from is no longer what was planned.

        An orphan of a killed run may end after another was planned, and data may be
        written to while it is read: neither may be recorded as what it is not.
        """
        from dvc.repo import lock_repo

        node = self.node
        store = Store(self.store.graph)
        changed = [f for f in node.files if store.digest(f) != self.deps[f]]
        if changed and not STAGES[node.stage].trains:  # those read all as they start
            shutil.rmtree(self.work)
            raise UserError(changed[0], f"changed while {node.id} read it", "run again")
        changed = []
        if not self.by_dvc:
            with lock_repo(repo):
                entries = read_lock()
            for path in node.artifacts:
                owner = self.store.graph.owner(path)
                entry = entries.get(self.store.graph.nodes[str(owner)].dvc, {})
                if Record.of(entry).outs.get(path) != self.deps[path]:
                    changed.append(path)
        if not self.is_planned():
            changed.append("the plan")
        if changed:
            raise UserError(
                node.id,
                f"{', '.join(changed)} changed since it was planned",
                "run again",
            )

    def is_planned(self) -> bool:
        """Whether the run of the moment, if any, wants the node as it is built here."""
        if not os.environ.get(IN_RUN):
            return True
        planned = Graph.from_json(GRAPH.read_text()).jobs.get(self.node.id)
        ours = self.node.params, self.node.flags
        return planned is not None and (planned.params, planned.flags) == ours

    # ---- built before ----------------------------------------------------------

    def restore(self, repo: Repo) -> bool:
        """Take the artifact from DVC's cache or remote if these inputs ran before."""
        from dvc.repo import lock_repo

        node = self.node
        with lock_repo(repo):
            (stage,) = repo.stage.collect(node.dvc)
            record, recorded = self.made_before(repo, stage)
            if record is None:
                return False
            damage = self.store.damage(node, record.outs)
            bring(repo, stage, record, self.store)
            left = self.store.damage(node, record.outs)
            left += [
                f"{out} is missing" for out in record.outs if not Path(out).exists()
            ]
            if left:
                say(node.id, f"in no cache and no remote, so it is rebuilt: {left[0]}")
                return False
            self.recording = True
            write_lock(repo, stage)
        self.drop_old()
        self.finish(repo, record.outs)
        harm = f"{damage[0]}; " if damage and recorded else ""
        say(node.id, f"restored from DVC: {harm}{node.folder}")
        return True

    def made_before(
        self, repo: Repo, stage: PipelineStage
    ) -> tuple[Record | None, bool]:
        """What these inputs gave before, filled into a DVC stage that was read now.

        Also whether that is what dvc.lock records.
        """
        from dvc.stage.loader import StageLoader

        node = self.node
        record = Record.of(read_lock().get(node.dvc, {}), f"{node.stage}.{node.name}")
        if record == Record(record.outs, self.deps, node.params, node.command):
            return record, True
        self.set_inputs(stage)
        entry = repo.stage_cache._load(stage)
        if entry is None:
            return None, False
        StageLoader.fill_from_lock(stage, entry)
        return Record.of(entry), False

    def set_inputs(self, stage: PipelineStage) -> None:
        """Give a freshly read DVC stage the inputs that this job started with."""
        if {d.def_path for d in stage.deps} != set(self.inputs):
            raise UserError("dvc.yaml", "was rewritten meanwhile", "run again")
        for dep in stage.deps:
            dep.hash_info, dep.meta = self.inputs[dep.def_path]

    # ---- building --------------------------------------------------------------

    def make_share(self, repo: Repo) -> int:
        """Make a share of the node's files, unless the node will be restored."""
        from dvc.repo import lock_repo

        node, began = self.node, time.monotonic()
        with lock_repo(repo):
            (stage,) = repo.stage.collect(node.dvc)
            record, _ = self.made_before(repo, stage)
        self.work_in(self.keyed / node.share)
        if record is None or not all(map(self.store.cache.holds, record.outs.values())):
            self.script(self.out / STAGES[node.stage].content)
            self.check_planned(repo)
        self.store.write_shard(node, self.out)
        say(node.id, f"done in {time.monotonic() - began:.0f} s")
        return 0

    @property
    def keyed(self) -> Path:
        """The node's work folder with these inputs."""
        return Path("work", self.node.stage, f"{self.node.name}-{self.key}")

    def work_in(self, folder: Path) -> None:
        self.work, self.out = folder, folder / "out"

    def drop_shares(self) -> None:
        """Remove what other jobs made of the node's files, which is published now."""
        for share in self.keyed.glob(SHARES):
            shutil.rmtree(share / "out", ignore_errors=True)

    def build(self, repo: Repo) -> int:
        node = self.node
        self.work_in(self.keyed)
        content = self.out / STAGES[node.stage].content
        began = datetime.now(UTC)
        if not self.script(content):
            return self.go_on_later()
        finished, seen = self.work / "finished", Memory(self.work / "digests.json")
        finished.touch()
        try:
            attest(node.stage, node.recipe, content, parent_of(node), seen)
        except AttestError:
            finished.unlink()
            raise
        seen.save()
        self.check_planned(repo)
        provenance = self.provenance(began)
        if node.stage == "export":
            provenance = self.with_lineage(repo, provenance, seen, self.out)
        if node.stage == "release":  # its folder is all that is uploaded
            whole = self.with_lineage(repo, provenance, seen, content)
            write_atomic(content / lineage.NOTE, json.dumps(whole, indent=1))
        write_atomic(self.out / "provenance.json", json.dumps(provenance, indent=1))
        self.publish(repo)
        self.drop_shares()
        say(node.id, f"done in {provenance['seconds']:.0f} s: {node.folder}")
        return 0

    def script(self, content: Path) -> bool:
        """Run the stage's script, showing how far it is.

        False where it saved at its time limit, and is to go on in another job.
        """
        node = self.node
        trains = STAGES[node.stage].trains
        if (self.work / "finished").exists():  # killed after the script's end
            self.take_back()
            if content.exists():
                return True
        python = interpreter(node)
        for left in ("finished", "stop", "stopped"):
            (self.work / left).unlink(missing_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        if self.slurm and trains:
            self.check_budget()
        code = self.copy_code()
        (self.work / "recipe.yaml").write_text(dump_yaml(node.recipe))
        self.resumed = (self.work / "progress.json").exists()
        by_file = STAGES[node.stage].by_file
        if not by_file:
            shutil.rmtree(self.out, ignore_errors=True)
        write_atomic(self.work / MADE_BY, json.dumps(self.made_by()))
        words = ["-P", "-m", node.script]
        words += ["--recipe", str(self.work / "recipe.yaml")]
        words += ["--out", str(content), "--work", str(self.work)]
        words += [word for flag in with_parent(node) for word in flag]
        words += placement_flags(node)
        if trains:
            logging = self.work / "logging.json"
            told = {**node.logging, "run": node.id, "id": f"{node.dvc}-{self.key}"}
            logging.write_text(json.dumps(told))
            words += ["--logging", str(logging)]
        if by_file:
            words += self.earlier_flags()
        if node.share:
            words += ["--share", node.share.replace("of", "/")]
        if node.stage == "report":
            words += self.report_flags()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(code.absolute()), os.environ.get("PYTHONPATH")])
            ),
            "OMP_NUM_THREADS": str(
                max(1, node.placement["cpus"] // node.placement["processes"])
            ),
            "GOMP_SPINCOUNT": "1000",  # threads that spin starve what runs beside them
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",
        }
        command = launch.command(
            words,
            launcher=STAGES[node.stage].launcher_of(node.engine),
            placement=node.placement,
            work=self.work,
            environ=environment,
            python=python,
        )
        self.direct = command == [python, *words]
        on = f" on {os.environ['SLURM_JOB_NODELIST']}" if self.slurm else ""
        say(node.id, ("resumes" if self.resumed else "starts") + on)
        log = self.work / "log.txt"
        with open(log, "ab") as output:
            self.log_from = output.tell()
            self.show_log(log)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self.lock.fileno()],
            )
            if self.stopped_by:
                self.stop(self.stopped_by)
            status = self.watch(self.process)
        saved = status == cli.NOT_DONE or (self.work / "stopped").exists()
        ended_by_us = saved or status == -signal.SIGTERM
        if self.stopped_by == signal.SIGUSR1 and status and ended_by_us:
            return False
        if status and (ended_by_us or self.stopped_by == signal.SIGTERM):
            how = " after saving" if saved else " before it saved" if trains else ""
            raise UserError(
                node.id,
                f"stopped by a signal{how}",
                "" if self.slurm else "run again",  # else the controller says more
            )
        if status:
            self.explain(status, log)
        for out in node.outs[1:-1]:  # these do not count as content
            (content / Path(out).name).replace(self.out / Path(out).name)
        return True

    def take_back(self) -> None:
        """Have an artifact that was moved into place and not recorded here again."""
        folder, name = Path(self.node.folder), "provenance.json"
        known = Memory(self.work / "digests.json").known.get(str(self.out / name))
        if not known or self.out.exists() or not (folder / name).exists():
            return
        if known[0] == Memory.signature(folder / name):
            folder.rename(self.out)

    def show_log(self, log: Path) -> None:
        """Have logs/<stage>/<node>.log, or of a share <node>-2of8.log, be the log in the work folder.

        A log of its own would be deleted by Snakemake at each start.
        """
        shown = Path("logs", f"{self.node.id}.log")
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.unlink(missing_ok=True)
        shown.symlink_to(os.path.relpath(log, shown.parent))

    def made_by(self) -> dict[str, Any]:
        return {"code": self.node.code, "packages": self.node.packages}

    def earlier_flags(self) -> list[str]:
        """Where its code, as it is now, made something of other inputs.

        That may be what is published, what a stopped run left, or what other jobs made
        of the node's files. Its script takes over what would be the same. Jobs that run
        beside each other see the same, for they share the rest.
        """
        content = STAGES[self.node.stage].content
        places = [(Path(self.node.folder), "provenance.json", content)]
        works = f"{self.node.name}-*"
        beside = {self.keyed}
        if self.node.share:
            beside |= {*self.keyed.glob("*of" + self.node.share.partition("of")[2])}
        root = self.keyed.parent
        for work in sorted([*root.glob(works), *root.glob(f"{works}/{SHARES}")]):
            if work not in beside:
                places.append((work, MADE_BY, f"out/{content}"))
        flags = []
        for folder, record, inside in places:
            try:
                known = json.loads((folder / record).read_text())
            except (OSError, ValueError):
                continue
            ours = self.made_by()
            same = {key: known.get(key) for key in ours} == ours
            if same and (folder / inside).is_dir():
                flags += ["--earlier", str(folder / inside)]
        return flags

    def report_flags(self) -> list[str]:
        """What only the report wants: the graph, and every ancestor's folder."""
        whole = self.store.graph
        ids = [*whole.ancestors(self.node.id)]
        nodes = [
            {
                "id": n.id,
                "stage": n.stage,
                "name": n.name,
                "parents": list(n.parents),
                "recipe": n.recipe,
                "sweep": n.sweep,
                "varied": n.varied,
            }
            for n in map(whole.nodes.__getitem__, ids)
        ]
        write_atomic(self.work / "graph.json", json.dumps({"nodes": nodes}))
        flags = ["--graph", str(self.work / "graph.json")]
        for id in ids:
            flags += ["--node", f"{id}={whole.nodes[id].folder}"]
        return flags

    def watch(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the script; show its progress every few seconds, count its time."""
        shown, last = "", 0.0
        trains = STAGES[self.node.stage].trains
        clock = self.work / "seconds.json"
        before = json.loads(clock.read_text()) if clock.exists() else 0.0
        began = time.monotonic()
        begins = not self.resumed
        while True:
            try:
                code = process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                code = None
            now = time.monotonic()
            if begins and (self.work / "progress.json").exists():
                write_atomic(self.work / SETUP, json.dumps(now - began))
                begins = False
            if code is not None or now - last >= SHOW_SECONDS:
                text = progress_line(self.work / "progress.json", trains)
                if text and text != shown:
                    say(self.node.id, text)
                shown, last = text, now
                self.pass_on_warning()
                self.seconds = before + now - began
                write_atomic(clock, json.dumps(self.seconds))
            if code is not None:
                return code

    def pass_on_warning(self) -> None:
        """Say what the script has to say while it runs, once."""
        warning = self.work / outputs.WARNING
        if warning.exists():
            say(self.node.id, f"warning: {warning.read_text()}")
            warning.unlink()

    def explain(self, code: int, log: Path) -> None:
        """Raise what the script's last lines say; a launcher's own come after them."""
        lines = log.read_bytes()[self.log_from :].decode(errors="replace").splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if errors and (not self.direct or (code == 1 and errors[-1] >= len(lines) - 8)):
            said = lines[errors[-1] :]
            end = next((i for i, x in enumerate(said) if LAUNCHER_SAYS.match(x)), None)
            raise UserError(self.node.id, "\n".join(said[:end]).removeprefix("error: "))
        if any("CUDA out of memory" in line for line in lines):
            key = f"{self.node.stage}.{self.node.name}"
            raise UserError(
                self.node.id,
                "the GPU's memory is full",
                f"placement.{key}: a smaller micro_batch_size, a larger tensor_parallel "
                f"or pipeline_parallel; or recompute activations; the log is {log}",
            )
        if code == -signal.SIGKILL or any(map(OUT_OF_MEMORY.search, lines)):
            placed, key = self.node.placement, f"{self.node.stage}.{self.node.name}"
            raise UserError(
                self.node.id,
                "killed, as happens where memory is short: it may use "
                f"{placed['memory_gb']:g} GB",
                f"raise placement.{key}.memory_gb; the whole log is {log}",
            )
        tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = f"the whole log is {log}; a rerun resumes in {self.work}"
        raise UserError(
            self.node.id,
            f"{self.node.script} ended with {how}:\n{tail}",
            hint,
        )

    def provenance(self, began: datetime) -> dict[str, Any]:
        node = self.node
        seconds = json.loads((self.work / "seconds.json").read_text())
        setup = self.work / SETUP
        began_in = json.loads(setup.read_text()) if setup.exists() else None
        seen = self.work / "environment.json"  # by a script with a Python of its own
        its = json.loads(seen.read_text()) if seen.exists() else {}
        gpus = node.placement["gpus"] * node.placement["nodes"]
        cpus = node.placement["cpus"] * node.placement["nodes"]
        of_shares = [
            json.loads(clock.read_text())
            for clock in self.keyed.glob(f"{SHARES}/seconds.json")
        ]
        locks = [identity.LOCKS["transformers"], *identity.locks_of(node.engine)]
        return {
            "node": node.id,
            "recipe": node.recipe,
            "inputs": self.deps,
            "code": node.code,
            "packages": node.packages,
            "environment": {
                str(lock): hashlib.sha256(lock.read_bytes()).hexdigest()
                for lock in locks
            },
            "container": node.placement.get("container", {}).get("image"),
            "slurm_job": self.slurm or None,
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "host": socket.gethostname(),
            "machine": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            **its,
            "started": began.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            # of its own alone: where shares did the work, none of it is known
            "setup_seconds": None
            if of_shares or began_in is None
            else round(began_in, 1),
            "gpu_hours": round(gpus * seconds / 3600, 4),
            "cpu_hours": round(cpus * (seconds + sum(of_shares)) / 3600, 4),
            "resumed": getattr(self, "resumed", True),
        }

    def with_lineage(
        self, repo: Repo, provenance: dict[str, Any], seen: Memory, folder: Path
    ) -> dict[str, Any]:
        """What `folder` needs beside its files to be checked far from this project."""
        from dvc.exceptions import DvcException
        from dvc.repo import lock_repo

        with lock_repo(repo):
            entries = read_lock()
        shelf = lineage.Shelf(self.store.cache)
        above = lineage.ancestors(entries, self.deps)
        if lacking := lineage.out_of_reach(entries, above, shelf):
            with suppress(DvcException):
                repo.fetch(targets=lacking)
        if lacking := lineage.out_of_reach(entries, above, shelf):
            say(
                self.node.id, f"{lacking[0]} is nowhere: its lineage lacks what it told"
            )
        sums = seen.files(folder)
        sums.pop(lineage.NOTE, None)  # of a run that was killed here
        rows = [lineage.row(entries, id, shelf) for id in above]
        return lineage.carried(provenance, sums, rows)

    # ---- publishing ------------------------------------------------------------

    def publish(self, repo: Repo) -> None:
        """Hash, rename into place, record: at no time is an artifact half there.

        A job that is killed meanwhile goes on here.
        """
        folder = Path(self.node.folder)
        for path in self.out.rglob("*"):
            if path.is_dir() or path.stat().st_nlink == 1:  # else DVC's too
                path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make 0600
        hashed = Memory(self.work / "digests.json")
        sums = hashed.files(self.out)
        hashed.save()
        self.check_space(repo, sum(os.path.getsize(self.out / n) for n in sums))
        self.drop_old()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(self.old)
        self.out.rename(folder)
        if repo.cache.local.cache_types == ["reflink"]:
            self.clone_cached(repo, sums)
        outs = {}
        for out in self.node.outs:
            name = str(Path(out).relative_to(folder))
            below = {
                n.removeprefix(f"{name}/"): md5
                for n, md5 in sums.items()
                if n.startswith(f"{name}/")
            }
            outs[out] = tree_digest(below) if below else sums[name]
        seen = self.store.memory(self.node)
        seen.known = {}
        for name, md5 in sums.items():
            seen.remember(folder / name, md5)
        seen.save()
        tell_dvc(repo, seen, [self.node.folder])
        if not self.by_dvc:
            self.record(repo)
        self.drop_old()
        if not self.by_dvc:
            self.finish(repo, outs)
        (self.work / "finished").unlink()

    def drop_old(self) -> None:
        """Remove what was published before, which is in DVC's cache."""
        shutil.rmtree(self.old, ignore_errors=True)

    def clone_cached(self, repo: Repo, sums: dict[str, str]) -> None:
        """Have what DVC's cache held before be clones of it, for DVC keeps a copy."""

        def clone(name: str) -> None:
            cached, new = self.store.cache.object(sums[name]), self.work / "new" / name
            if cached.is_file() and md5_file(cached) == sums[name]:
                new.parent.mkdir(parents=True, exist_ok=True)
                repo.cache.local.fs.reflink(str(cached), str(new))
                new.chmod(0o644)
                new.replace(Path(self.node.folder, name))

        on_all_cores([partial(clone, name) for name in sums])

    def check_space(self, repo: Repo, size: int) -> None:
        """Raise before anything is moved if DVC's cache has no room for a copy."""
        cache = Path(repo.cache.local.path)
        linked = repo.cache.local.cache_types in (["reflink"], ["hardlink"])
        free = shutil.disk_usage(cache).free
        need = (1 << 20) if linked else size + (1 << 20)
        if free < need:
            raise UserError(
                str(cache),
                f"{free / 1e6:.0f} MB free, publishing needs {need / 1e6:.0f} MB",
                f"free some space and run again: the result waits in {self.out}",
            )

    def record(self, repo: Repo) -> None:
        """Write the node to dvc.lock with the inputs it had when it started."""
        from dvc.repo import lock_repo

        with lock_repo(repo):
            (stage,) = repo.stage.collect(self.node.dvc)
            self.set_inputs(stage)
            stage.save_outs()
            stage.commit()
            repo.stage_cache.save(stage)
            write_lock(repo, stage)

    def finish(self, repo: Repo, outs: dict[str, str]) -> None:
        """Remember the published files as they are now, and write the manifest.

        Not for a plan that is no more: its record stays, the node is built again.
        """
        seen = self.store.memory(self.node)
        if damage := [o for o, md5 in outs.items() if seen.recorded_as(Path(o)) != md5]:
            raise UserError(damage[0], "changed while it was published", "run again")
        seen.save()
        deps = {path: self.deps[path] for path in self.node.artifacts}
        if not self.is_planned():
            raise UserError(self.node.id, "the plan changed meanwhile", "run again")
        self.store.write_manifest(self.node, outs, deps)


def placement_flags(node: Node) -> list[str]:
    """What its script is told of where it runs."""
    flags: list[str] = []
    if node.engine == "nvidia":
        for key in STAGES[node.stage].nvidia_flags:
            value = node.placement.get(key)
            if value is not None:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                flags += [f"--{key.replace('_', '-')}", text]
    if STAGES[node.stage].trains:
        flags += ["--save-steps", str(node.placement["save_steps"])]
    return flags


def interpreter(node: Node) -> str:
    """The Python of its script, not resolved: that of an environment is a link.

    Raises UserError where the one that the placement names cannot be run.
    """
    if node.engine != "nvidia":
        return sys.executable
    runtime = node.placement.get("container", {}).get("runtime", "none")
    named = node.placement.get("python")
    if named and runtime == "none":
        path = Path(os.path.abspath(named))
        if not path.is_file() or not os.access(path, os.X_OK):
            is_there = path.exists()
            raise UserError(
                f"placement.{node.stage}.{node.name}.python {named}",
                "cannot be run" if is_there else "no such file",
                "name a Python that has the packages of "
                f"{identity.LOCKS[node.engine]}, or leave it out",
            )
        return str(path)
    if PYTHON_OF_NVIDIA.exists():
        return os.path.abspath(PYTHON_OF_NVIDIA)
    if runtime == "none" and not has_bridge():
        raise UserError(
            node.id,
            "no Python with Megatron-Bridge: no container, no placement.python, no "
            f"{PYTHON_OF_NVIDIA}, and this one has none",
            "make env-nvidia; or build envs/nvidia.def and set container.runtime",
        )
    return sys.executable


def has_bridge() -> bool:
    """Whether this Python has Megatron-Bridge; asked without importing it."""
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


def parent_of(node: Node) -> Path | None:
    """The folder of the model it starts from, fetched where that is on the hub.

    None where there is none, and where the script fetches it.
    """
    parent = dict(node.flags).get("--parent")
    if parent is None or not parent.startswith(graph.HUB):
        return None if parent is None else Path(parent)
    return None if node.engine == "nvidia" else hub.fetch(parent)


def with_parent(node: Node) -> list[tuple[str, str]]:
    """Its script's inputs, a parent on the hub as the folder that it was fetched to."""
    parent = parent_of(node)
    return [
        (f, str(parent) if f == "--parent" and parent else v) for f, v in node.flags
    ]


def progress_line(path: Path, trains: bool) -> str:
    """`step 120 of 200  loss 0.431  12 s left`, or nothing before the first step.

    Stages that do not train show a share of their input.
    """
    try:
        state = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return ""
    step, steps = state.pop("step"), state.pop("steps")
    parts = [f"step {step} of {steps}" if trains else f"{100 * step / steps:.0f}%"]
    left = state.pop("seconds_left", None)
    parts += [f"{name} {number(value)}" for name, value in state.items()]
    if left:
        parts.append(
            f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
        )
    return "  ".join(parts)


def number(value: float) -> str:
    """Counts whole, measures to four digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def link_only(repo: Repo) -> None:
    """Have DVC link published files to its cache where one file system holds both.

    Offered `copy` too, it leaves a copy where the cache had the file already.
    """
    cache = repo.cache.local
    if "hardlink" in cache.cache_types:
        cache.cache_types = links_to(Path(cache.path))[:1] or cache.cache_types


def links_to(cache: Path) -> list[str]:
    """How a file of the cache can be in the project too without a copy, best first.

    An edit of a clone does not reach the cache. DVC's own config does not name it: by
    itself DVC would copy where the file system makes none.
    """
    from dvc_objects.fs.generic import test_links
    from dvc_objects.fs.local import localfs

    here = str((STATE / "link").absolute())
    return test_links(["reflink", "hardlink"], localfs, str(cache), localfs, here)


def bring(repo: Repo, stage: PipelineStage, record: Record, store: Store) -> None:
    """Put a recorded artifact in place from DVC's cache, else from its remote.

    Cached files that are not what their name says are dropped first, so that they
    are fetched again: a file edited through its link changes the cache too.
    What cannot be had stays missing.
    """
    from dvc.config import NoRemoteError
    from dvc.exceptions import CollectCacheError

    def drop_damaged(md5: str) -> None:
        cached = store.cache.object(md5)
        if cached.is_file() and md5_file(cached) != md5:
            cached.unlink()

    for md5 in record.outs.values():
        listed = store.cache.listing(md5) if md5.endswith(".dir") else {"": md5}
        digests = set((listed or {}).values())
        on_all_cores([partial(drop_damaged, one) for one in digests])
    try:
        if not all(map(store.cache.holds, record.outs.values())):
            for objects in stage.get_used_objs().values():
                repo.cloud.pull(objects)
    except (NoRemoteError, CollectCacheError):
        pass
    # without all of it, a checkout would empty what is here
    if all(map(store.cache.holds, record.outs.values())):
        stage.checkout(force=True)


def tell_dvc(repo: Repo, memory: Memory, paths: Collection[str]) -> None:
    """Give DVC the digests we have of these, so that it need not read them again.

    What it remembers itself, another machine does not know.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    files, inside = set(paths), tuple(f"{path}/" for path in paths)
    known = [
        (os.path.abspath(name), HashInfo("md5", md5), None)
        for name, (signature, md5) in memory.known.items()
        if name in files or name.startswith(inside)
        if Path(name).exists() and memory.signature(Path(name)) == signature
    ]
    if known:
        repo.state.save_many(known, repo.fs)


def git(*words: str) -> str | None:
    """What git answers, stripped; None where it refuses or is not here."""
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    cli.run(main)
