"""The bridge between dvc.lock, the only record of what is built, and Snakemake.

A node's manifest, state/<stage>/<node>.json, exists if and only if dvc.lock records
the node with the settings, code, files and parents' content it has today, and its
artifact, where it is here at all, is what was recorded. So "output missing" is the
only trigger Snakemake needs:

sync()     when the Snakefile is read: dvc.lock and the files decide which exist
hold()     when a run starts: until it ends nobody else decides
refresh()  after each node: what came out the same stops there
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ruamel import yaml as ruamel

from scripts.lib import identity
from scripts.lib.digest import Cache, Kept, Memory, same_file, write_atomic
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph, Node
from scripts.lib.identity import LOCKS, locks_of
from scripts.lib.load import Key
from scripts.lib.settings import shown
from scripts.lib.stages import STAGES

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

STATE = Path("state")
RUN_LOCK = STATE / "run.lock"
PLAN_LOCK = STATE / "plan.lock"
REMOTE = STATE / "remote.json"
GRAPH = STATE / "graph.json"
PARAMS = Path("config/params.yaml")
LOCK = Path("dvc.lock")
IN_RUN = "PIPELINE_RUN"
"""Environment variable that tells a job that the graph and manifests are decided."""

PARSED = Kept(STATE / "lock.json", Path(__file__), ruamel.__version__)
"""dvc.lock as it was read last."""

MAY = "if "
NEVER = "never built"
HARMED = ": restore it"
CHANGED = "changed"


def load_yaml(path: Path) -> Any:
    """A YAML file by the loader DVC uses; empty where there is none."""
    return (ruamel.YAML(typ="safe").load(path) or {}) if path.exists() else {}


def dump_yaml(data: Any) -> str:
    """YAML 1.2, as DVC reads it, without anchors."""
    yaml = ruamel.YAML()
    yaml.default_flow_style = False
    yaml.width = 88
    yaml.representer.ignore_aliases = lambda *_: True
    text = StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def differences(old: Any, new: Any) -> list[str]:
    """`key old -> new` for each setting that differs."""
    return [text for _, text in changed_keys(old, new)]


def changed_keys(old: Any, new: Any, at: Key = ()) -> list[tuple[Key, str]]:
    """Each setting that differs: its key, and `key old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*new, *old])
        return [
            found
            for k in keys
            for found in changed_keys(old.get(k), new.get(k), (*at, str(k)))
        ]
    name = ".".join(at)
    if isinstance(old, list) and isinstance(new, list) and old != new:
        changes = [f"without {shown(one)}" for one in old if one not in new]
        changes += [f"with {shown(one)}" for one in new if one not in old]
        return [(at, f"{name} {', '.join(changes) or 'in another order'}")]
    return [] if old == new else [(at, f"{name} {shown(old)} -> {shown(new)}")]


@dataclass
class Record:
    """What dvc.lock says of one node: digests by path."""

    outs: dict[str, str] = field(default_factory=dict)
    deps: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @classmethod
    def of(cls, entry: dict[str, Any], params_key: str = "") -> Record:
        try:
            params = entry.get("params", {}).get(str(PARAMS), {}).get(params_key, {})
            return cls(
                {o["path"]: o["md5"] for o in entry.get("outs", [])},
                {d["path"]: d["md5"] for d in entry.get("deps", [])},
                params,
                entry.get("cmd", ""),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                str(LOCK), f"not as DVC writes it: {error!r}", "git checkout dvc.lock"
            ) from error


def key_of(params: dict[str, Any], deps: dict[str, str]) -> str:
    """The name of a node's inputs, as its work folder has it."""
    text = json.dumps([params, deps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_lock() -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock by DVC stage.

    Raises UserError where it is not YAML, such as after a git merge.
    """
    try:
        source = LOCK.read_bytes() if LOCK.exists() else b""
        stages = PARSED.get(str(LOCK), source)
        if stages is None:
            stages = load_yaml(LOCK).get("stages") or {}
            PARSED.put(str(LOCK), source, stages)
        return {name: dict(entry) for name, entry in stages.items()}
    except Exception as error:
        raise UserError(
            str(LOCK),
            f"cannot be read: {str(error).splitlines()[0]}",
            "resolve its merge, or take one side: git checkout --theirs dvc.lock",
        ) from error


class Store:
    """A graph beside what is recorded and what is on disk."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.cache = Cache()
        self.raw = Memory(STATE / "files.json")
        self.written = Kept(STATE / "declared.json", Path(__file__), ruamel.__version__)
        self.held: IO[str] | None = None
        self.blocked = ""
        self.own: dict[str, list[str]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.records: dict[str, Record] = {}
        self.why: dict[str, list[str]] = {}

    # ---- what DVC reads: dvc.yaml and the parameters ------------------------------

    def declarations(self) -> dict[Path, str]:
        """The text of dvc.yaml and of the parameters, as the graph has them."""
        note = (
            f"# Generated from {self.graph.config} by `make plan`: edit that file "
            "instead.\n"
        )
        return {p: note + dump_yaml(data) for p, data in self.declared().items()}

    def declared(self) -> dict[Path, dict[str, Any]]:
        """What dvc.yaml and the parameters hold, as the graph has it."""
        graph = self.graph
        inputs = [*graph.config_files, "scripts", str(LOCKS["transformers"])]
        if any(node.engine == "nvidia" for node in graph.nodes.values()):
            inputs += [*map(str, locks_of("nvidia")), "envs/nvidia-options.json"]
            inputs.append("envs/nemo-rl-options.json")
        stages: dict[str, Any] = {
            "plan": {
                "cmd": f"python -m scripts.lib.plan --config {graph.config} --write",
                "deps": sorted(inputs),
                "outs": [{str(PARAMS): {"cache": False}}],
            }
        }
        params: dict[str, dict[str, Any]] = {}
        for node in graph.nodes.values():
            params.setdefault(node.stage, {})[node.name] = node.params
            stages[node.dvc] = {
                "cmd": node.command,
                "deps": [*node.artifacts, *node.files],
                "params": [{str(PARAMS): [f"{node.stage}.{node.name}"]}],
                "outs": node.outs,
            }
            if not stages[node.dvc]["deps"]:
                del stages[node.dvc]["deps"]
        return {Path("dvc.yaml"): {"stages": stages}, PARAMS: params}

    def declare(self) -> bool:
        """Write dvc.yaml and the parameters where they differ.

        True where dvc.yaml itself changed.
        """
        data = self.declared()
        of = json.dumps([self.graph.config, *data.values()]).encode()
        sums = {str(p): hashlib.sha256(_content(p)).hexdigest() for p in data}
        if self.written.get("dvc.yaml", of) == sums:
            return False
        rewritten = False
        for path, text in self.declarations().items():
            if not path.exists() or path.read_text() != text:
                write_atomic(path, text)
                rewritten |= path.name == "dvc.yaml"
        sums = {str(p): hashlib.sha256(_content(p)).hexdigest() for p in data}
        self.written.put("dvc.yaml", of, sums)
        self.written.save()
        return rewritten

    def plan_recorded(self) -> bool:
        """Whether dvc.lock has the plan stage as the files are now."""
        declared = self.declared()[Path("dvc.yaml")]["stages"]["plan"]
        record = Record.of(read_lock().get("plan", {}))
        now = {path: self.raw.recorded_as(Path(path)) for path in declared["deps"]}
        return (
            record.command == declared["cmd"]
            and record.deps == now
            and record.outs == {str(PARAMS): self.raw.recorded_as(PARAMS)}
        )

    # ---- what is recorded, what is here -------------------------------------------

    def digest(self, path: str) -> str:
        """What DVC would record for a file or folder of the project's own."""
        found = self.raw.recorded_as(Path(path))
        if found is None:  # tracked by DVC and not pulled
            outs = load_yaml(Path(f"{path}.dvc")).get("outs", [{}])
            found = outs[0].get("md5", "missing")
        return found

    def memory(self, node: Node) -> Memory:
        """The digests of a node's published files, as last seen in this folder."""
        return Memory(STATE / node.stage / f"{node.name}.files.json")

    def damage(self, node: Node, outs: dict[str, str]) -> list[str]:
        """How the artifact here is not what was recorded; nothing if it never was here.

        Files linked to DVC's cache and not seen before are taken as recorded:
        DVC verified them when it made the link.
        """
        memory = self.memory(node)
        found = []
        for out, recorded in outs.items():
            path = Path(out)
            if not path.exists():
                if any(k == out or k.startswith(f"{out}/") for k in memory.known):
                    found.append(f"{out} was deleted")
                continue
            listed = self.cache.listing(recorded) if path.is_dir() else {"": recorded}
            for name, md5 in (listed or {}).items():
                one = path / name if name else path
                if str(one) not in memory.known and same_file(
                    one, self.cache.object(md5)
                ):
                    memory.remember(one, md5)
            if memory.recorded_as(path) != recorded:
                found += self._edits(path, listed, memory) or [f"{out} was changed"]
        if not found:
            memory.save()
        if found == [f"{out} was deleted" for out in outs]:
            return [f"{node.folder} was deleted"]
        return found

    def _edits(
        self, path: Path, listed: dict[str, str] | None, memory: Memory
    ) -> list[str]:
        if not path.is_dir():
            return [f"{path} was changed"]
        if listed is None:
            return []
        now = memory.files(path)
        names = sorted(set(now) | set(listed))
        verb = {(False, True): "deleted", (True, False): "added"}
        return [
            f"{path / n} was {verb.get((n in now, n in listed), 'changed')}"
            for n in names
            if now.get(n) != listed.get(n)
        ]

    def read(self) -> None:
        """Compare dvc.lock and the files with the graph, each node by itself."""
        self.entries = read_lock()
        self.records, self.own = {}, {}
        for node in self.graph.nodes.values():
            entry = self.entries.get(node.dvc)
            if entry is None:
                self.own[node.id] = [NEVER]
                continue
            record = Record.of(entry, f"{node.stage}.{node.name}")
            self.records[node.id] = record
            self.own[node.id] = self.changes(node, record)
            if not self.own[node.id]:
                self.own[node.id] = [
                    problem + HARMED for problem in self.damage(node, record.outs)
                ]
        self._find_lost()
        self.raw.save()

    def changes(self, node: Node, record: Record) -> list[str]:
        """How a node, apart from its parents, is not what is recorded."""
        was, now = record.params, node.params
        changes = [
            text + self._at(node, key)
            for key, text in changed_keys(was.get("recipe", {}), now["recipe"])
        ]
        changes += self._code_changes(node, was.get("code", {}), was.get("packages"))
        if record.command != node.command:
            changes.append("its command changed")
        if set(record.outs) != set(node.outs):
            changes.append("what it publishes changed")
        for file in node.files:
            if file not in record.deps:
                changes.append(f"{file} is new to it")
            elif record.deps[file] != self.digest(file):
                changes.append(f"{file} changed")
        for path in sorted(set(record.deps) - set(node.files) - set(node.artifacts)):
            parts = path.split("/")
            name = "/".join(parts[1:3]) if parts[0] == "artifacts" else path
            gone = name == path and not Path(path).exists()
            changes.append(f"{name} {'was removed' if gone else 'is no longer read'}")
        return changes

    def _code_changes(
        self, node: Node, code: dict[str, str], packages: dict[str, str] | None
    ) -> list[str]:
        """How its code and packages differ; where the engine does, all of them do."""
        for engine in LOCKS:
            script = STAGES[node.stage].file_of(engine)
            if engine != node.engine and script in code:
                if script == STAGES[node.stage].file_of(node.engine):
                    continue
                where = self._at_key("engine", node.stage)
                return [f"engine {engine} -> {node.engine}{where}"]
        changes = []
        for file in sorted({*code, *node.code}):
            if file not in code:
                changes.append(f"{file} is new to its code")
            elif file not in node.code:
                changes.append(f"{file} is no longer in its code")
            elif code[file] != node.code[file]:
                changes.append(f"{file} changed")
        for (package,), text in changed_keys(packages or {}, node.packages):
            changes.append(text + self._pinned_at(node, package))
        return changes

    def _at(self, node: Node, key: Key) -> str:
        """Where in the config a setting of a node's recipe stands."""
        if key[0] == "sources" and key[2:] in ((), ("weight",)):
            return self._at_key(node.stage, node.name, "data", *key[1:2])
        if key[0] == "sources":
            return self._at_key("data", *key[1:])
        renamed = "from" if key[0] == "parent" else key[0]
        return self._at_key(node.stage, node.name, renamed, *key[1:])

    def _at_key(self, *key: str) -> str:
        lines = self.graph.lines
        return f" ({lines.where(*key).split(' ')[0]})" if lines else ""

    @staticmethod
    def _pinned_at(node: Node, package: str) -> str:
        """Where a package's version stands."""
        pin = re.compile(rf"{re.escape(package)}(\[.*\])?\s*==", re.IGNORECASE)
        for lock in locks_of(node.engine):
            for number, line in enumerate(lock.read_text().splitlines(), 1):
                if pin.match(line.replace("_", "-")):
                    return f" ({lock}:{number})"
        return ""

    def _find_lost(self) -> None:
        """Mark what is needed, recorded, and in no cache and no remote."""
        nodes = self.graph.nodes
        absent = [
            id
            for id, record in self.records.items()
            if not self.own[id] or all(r.endswith(HARMED) for r in self.own[id])
            if not all(
                (Path(out).exists() and not self.own[id]) or self.cache.holds(md5)
                for out, md5 in record.outs.items()
            )
        ]
        if not absent:
            return
        lost = set(self._not_in_remote([nodes[id] for id in absent]))
        for id in reversed(nodes):
            below = self.graph.children(id)
            if id in lost and (
                self.own[id] or not below or any(map(self._runs, below))
            ):
                self.own[id] = ["recorded, but in no cache and no remote: rebuild it"]

    def _runs(self, id: str) -> bool:
        return bool(self.own[id])

    def _not_in_remote(self, absent: list[Node]) -> list[str]:
        """Of recorded nodes that are not in the cache, those no remote holds either."""
        try:
            known = json.loads(REMOTE.read_text())
        except (FileNotFoundError, ValueError):
            known = []
        ask = [
            n for n in absent if not set(self.records[n.id].outs.values()) <= set(known)
        ]
        if not ask:
            return []
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "dvc",
                "status",
                "--cloud",
                "--json",
                *(n.dvc for n in ask),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            if "no remote" in done.stderr.lower():
                return [n.id for n in ask]
            names = ", ".join(n.id for n in ask)
            raise UserError(
                "dvc status --cloud",
                f"{done.stderr.strip()}\n{names}: not here, and the remote does not say "
                "whether it has them",
                "mend the remote, or remove it: then they are built again",
            )
        found = json.loads(done.stdout or "{}")
        gone = {path for path, state in found.items() if state == "missing"}
        lost = [n.id for n in ask if any(_within(p, n.outs) for p in gone)]
        there = [n for n in ask if n.id not in lost]
        known += [d for n in there for d in self.records[n.id].outs.values()]
        write_atomic(REMOTE, json.dumps(known))
        return lost

    def made_before(self, node: Node, deps: dict[str, str]) -> Record | None:
        """What DVC's cache has of a node that was made of these inputs before.

        Its run cache names an entry by the digest of what the stage was made of; the
        form is that of `dvc.stage.cache`. None where a part of the result is not here.
        """
        params_key = f"{node.stage}.{node.name}"
        made_of: dict[str, Any] = {
            "cmd": node.command,
            "params": {str(PARAMS): {params_key: node.params}},
            "outs": sorted(node.outs),
        }
        if deps:
            listed = [{"path": p, "hash": "md5", "md5": deps[p]} for p in sorted(deps)]
            made_of["deps"] = listed
        text = json.dumps(made_of, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        folder = self.runs / key[:2] / key
        entries = sorted(folder.glob("*"), key=os.path.getmtime, reverse=True)
        for entry in entries[:1]:  # as DVC does
            try:
                record = Record.of(load_yaml(entry), params_key)
            except ruamel.error.YAMLError:  # DVC drops it then
                return None
            if all(map(self.cache.holds, record.outs.values())):
                return record
        return None

    def made_as(self, node: Node, path: str, md5: str) -> Record | None:
        """What DVC's run cache has of the node with this content at `path`."""
        head = f"cmd: {node.command}\n"
        for entry in self.runs.glob("*/*/*"):
            text = entry.read_text(errors="replace")
            if text.startswith(head) and md5 in text:
                record = Record.of(load_yaml(entry), f"{node.stage}.{node.name}")
                if record.outs.get(path) == md5:
                    return record
        return None

    @property
    def runs(self) -> Path:
        """DVC's run cache."""
        return self.cache.folder.parents[1] / "runs"

    # ---- which manifests exist ----------------------------------------------------

    def settle(self, keep: bool, write: bool = True) -> dict[str, list[str]]:
        """Make each manifest exist if and only if its node is current.

        With `keep`, a manifest that is there was made in this run and stays while
        its parents are what it was made from. Returns {node: why it is not current}.
        """
        outs: dict[str, dict[str, str]] = {}
        why: dict[str, list[str]] = {}
        for node in self.graph.nodes.values():
            path = Path(node.manifest)
            built = json.loads(path.read_text()) if keep and path.exists() else None
            if built:
                entry = Record(built["outs"], built["deps"])
            else:
                entry = self.records.get(node.id, Record())
            reasons = [] if built else list(self.own[node.id])
            for artifact in node.artifacts:
                parent = self.graph.owner(artifact)
                assert parent is not None
                if parent not in outs:
                    reasons.append(f"{MAY}{parent} changes")
                elif artifact not in entry.deps:
                    reasons += [f"{parent} is new to it"] * bool(entry.outs)
                elif entry.deps[artifact] != outs[parent][artifact]:
                    reasons.append(f"{parent} {CHANGED}")
            why[node.id] = list(dict.fromkeys(reasons))
            if not reasons:
                outs[node.id] = entry.outs
                if write and not built:
                    self.write_manifest(node, entry.outs, entry.deps)
            elif write and (built or not keep):  # else a job may be writing it
                path.unlink(missing_ok=True)
            for shard in self.graph.shards.get(node.id, ()) if write else ():
                self._settle_shard(shard, bool(reasons), keep)
        self.why = why
        return why

    def _settle_shard(self, shard: Node, stale: bool, keep: bool) -> None:
        """Make a shard's manifest exist if its node is current, or its share is made.

        So that none runs for a node that need not, and those of a killed run that were
        done do not run again.
        """
        path = Path(shard.manifest)
        if not stale:
            if not path.exists():
                write_atomic(path, "{}")
        elif not keep and path.exists():
            made = json.loads(path.read_text())
            here = Path(made.get("folder", "nowhere")).is_dir()
            if not here or made["made_from"] != self.made_from(shard):
                path.unlink()

    def write_shard(self, shard: Node, folder: Path) -> None:
        """Record that a share of a node's files is made, and where."""
        made = {"made_from": self.made_from(shard), "folder": str(folder)}
        write_atomic(Path(shard.manifest), json.dumps(made))

    def write_manifest(
        self, node: Node, outs: dict[str, str], deps: dict[str, str]
    ) -> None:
        read = {path: deps[path] for path in node.artifacts}
        text = json.dumps({"node": node.id, "outs": outs, "deps": read}, indent=1)
        path = Path(node.manifest)
        if _content(path) != text.encode():
            write_atomic(path, text)

    # ---- jobs of a cluster, which outlive the run that submitted them --------------

    def made_from(self, node: Node) -> str:
        """A digest of what a job of this node would build from, as things are now."""
        inputs = {}
        for artifact in node.artifacts:
            manifest = Path(self.graph.nodes[str(self.graph.owner(artifact))].manifest)
            built = json.loads(manifest.read_text()) if manifest.exists() else {}
            inputs[artifact] = built.get("outs", {}).get(artifact)
        inputs |= {file: self.digest(file) for file in node.files}
        text = json.dumps([node.params, node.flags, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write_job(self, node: Node) -> None:
        """Leave word of what a job builds from, and of where it runs."""
        job = {"made_from": self.made_from(node), "placement": node.placement}
        write_atomic(node.job, json.dumps(job))

    def job_is_wanted(self, node: Node, waits: bool) -> bool:
        """Whether a job submitted before builds what is wanted now.

        One that `waits` still, must also have been submitted with today's placement.
        """
        try:
            job = json.loads(node.job.read_text())
        except (FileNotFoundError, ValueError):
            return False
        if waits and job["placement"] != node.placement:
            return False
        return bool(job["made_from"] == self.made_from(node))

    def sync(self) -> dict[str, list[str]]:
        """Decide which manifests exist, from dvc.lock and the files alone.

        Returns {node: why it is not current}. While another run is active nothing
        is written, and the answer is what that run has left to do.
        """
        with locked(PLAN_LOCK), open(RUN_LOCK, "a+") as run:
            if not try_lock(run):
                self.blocked = _holder(run)
                print(
                    f"[plan] {self.blocked}; this is what it has left", file=sys.stderr
                )
                self.read()
                return self.settle(keep=True, write=False)
            self.declare()
            write_atomic(GRAPH, self.graph.to_json())
            if not self.plan_recorded():
                _commit_plan()
            self.read()
            for kept in (PARSED, identity.READ):
                kept.save()
            return self.settle(keep=False)

    def hold(self) -> None:
        """Until this process ends, be the only run in this folder.

        Raises UserError where another run is active, or has decided something else
        since this one was planned.
        """
        if self.held:
            return
        with locked(PLAN_LOCK):
            run = open(RUN_LOCK, "a+")
            if self.blocked or not try_lock(run):
                raise UserError(
                    str(RUN_LOCK),
                    self.blocked or _holder(run),
                    "wait until it has finished; `make plan` shows what it has left",
                )
            if GRAPH.read_text() != self.graph.to_json():
                raise UserError(
                    str(GRAPH), "another config was planned meanwhile", "run again"
                )
            run.truncate(0)
            started = time.strftime("%F %T")
            run.write(f"pid {os.getpid()} on {socket.gethostname()} since {started}")
            run.flush()
        self.held = run
        os.environ[IN_RUN] = "1"

    def refresh(self) -> None:
        """After a node: what became current need not run, what no longer is must."""
        if self.held:
            self.settle(keep=True)


@contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file, waiting for it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def try_lock(lock: IO[str]) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(*paths: Path) -> bool:
    """Whether some process holds one of these lock files at this moment.

    Those named first stay held here while the others are looked at.
    """
    try:
        with ExitStack() as stack:
            for path in paths:
                lock = stack.enter_context(open(path))
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def apart_from_builds() -> Iterator[None]:
    """For what `dvc repro` runs: keep Snakemake's builds in this folder out meanwhile.

    Raises UserError where one is active, unless this is part of it.
    """
    STATE.mkdir(exist_ok=True)
    with open(RUN_LOCK, "a+") as run:
        if not os.environ.get(IN_RUN) and not try_lock(run):
            raise UserError("dvc repro", "a build is running here", "wait for it")
        yield


@contextmanager
def dvc_errors() -> Iterator[None]:
    """Show what DVC refuses, and that a disk is full, without a traceback."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = str(error.filename or "a disk")
            hint = "free some space and run again: it goes on from there"
            raise UserError(where, str(error.strerror), hint) from error
        if type(error).__module__.partition(".")[0] not in ("dvc", "scmrepo"):
            raise
        hint = (
            ""
            if Path(".dvc").is_dir() and Path(".git").exists()
            else ("this folder is no git and DVC repository: git init && dvc init -f")
        )
        raise UserError("dvc", str(error), hint) from error


def _content(path: Path) -> bytes:
    """A file's bytes; none where it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _within(path: str, outs: list[str]) -> bool:
    return any(path == out or path.startswith(f"{out}/") for out in outs)


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return f"another build is running in this folder: {lock.read() or 'just started'}"


def _commit_plan() -> None:
    """Have DVC record the plan stage, whose output was just written."""
    from dvc.repo import Repo, lock_repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
        (stage,) = repo.stage.collect("plan")
        stage.save()
        stage.commit()
        write_lock(repo, stage)


EMPTY = "schema: '2.0'\nstages:\n"
WHOLE = re.compile(EMPTY + r"(?:  .*\n)*")
"""A dvc.lock that holds nothing but stages."""


def write_lock(repo: Repo, stage: PipelineStage) -> None:
    """Record a stage in dvc.lock, by rename: DVC itself would write it in place.

    DVC would also read and write all of the file, seconds where there are many stages;
    here the stage's own lines are replaced. A file of another form is left to DVC.
    """
    from dvc.dvcfile import Lockfile
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml

    text = LOCK.read_text() if LOCK.exists() else EMPTY
    lines = dumps_yaml({"stages": to_lockfile(stage)}).splitlines(keepends=True)[1:]
    new = replaced(text, lines)
    whole = Path(repo.tmp_dir, LOCK.name)
    whole.write_text(new or text)
    if not new:
        Lockfile(repo, str(whole)).dump(stage)
    whole.replace(LOCK)


def replaced(text: str, entry: list[str]) -> str:
    """dvc.lock with one stage's lines, those it had replaced; nothing if it cannot be."""
    if not (WHOLE.fullmatch(text) and WHOLE.fullmatch(EMPTY + "".join(entry))):
        return ""
    start = text.find("\n" + entry[0])
    if start < 0:
        return text + "".join(entry)
    after = re.compile(r"^  \S", re.MULTILINE).search(text, start + 1 + len(entry[0]))
    end = after.start() if after else len(text)
    return text[: start + 1] + "".join(entry) + text[end:]
