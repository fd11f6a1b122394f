"""What a plan will take, by the times that earlier runs recorded; and what it may take.

A node's provenance.json has the time and the GPU-hours of its run. Its next run is
taken to start as fast, then to cost as much for each token or byte, and to be faster by
as much as it has more GPUs, or cores where it trains or shares its files among jobs. A
run that was stopped goes on as it went. Where no run of the node is recorded, that of
another node of its stage, engine and model counts. Where none is, nothing is said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from scripts.lib import plan
from scripts.lib.digest import files_in
from scripts.lib.errors import UserError
from scripts.lib.graph import MODEL_FOLDERS, Node
from scripts.lib.lineage import GPU, NOTE, Shelf, duration, owner, recorded
from scripts.lib.plan import RUNS, Outlook
from scripts.lib.schema import Budget
from scripts.lib.stages import DATA, STAGES
from scripts.lib.store import Record, Store, key_of, load_yaml

CPU, SETUP = "cpu_hours", "setup_seconds"
UNITS = {GPU: "GPU-hours", CPU: "core-hours"}
FACTORS = ("steps", "batch_size", "sequence_length")
"""Settings of a node that trains by whose product its work grows."""


@dataclass
class Run:
    """What one earlier run of a stage did, and what it took."""

    node: str
    model: str
    work: float | None
    """Tokens, or bytes read: what its time is proportional to."""
    seconds: float
    setup: float
    """Of these, those until its first step."""
    hours: dict[str, float]


@dataclass
class Estimate:
    """What a node's run will take; `seconds` is None where `note` says why."""

    seconds: float | None = None
    hours: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Estimator:
    """The earlier runs that a store's dvc.lock records, and what follows from them."""

    def __init__(self, store: Store, found: dict[str, Outlook]) -> None:
        self.store, self.found = store, found
        self.shelf = Shelf(store.cache)
        self.known: dict[str, Run | None] = {}
        self.away: set[str] = set()
        self.made: dict[str, Estimate] = {}
        self.by_stage: dict[str, list[str]] = {}
        for name in store.entries:
            stage, _, node = name.partition("-")
            if stage in STAGES:
                self.by_stage.setdefault(stage, []).append(f"{stage}/{node}")

    def all(self) -> dict[str, Estimate]:
        """The estimate of each node that runs, or may run."""
        nodes = self.store.graph.nodes
        if not self.made:
            runs = [id for id, one in self.found.items() if one.verb in RUNS]
            self.made = {id: self.of(nodes[id]) for id in runs}
        return self.made

    def of(self, node: Node) -> Estimate:
        """What a run of this node will take, as far as it is not done."""
        part, used = self.begun(node) or (0.0, 0.0)
        notes = [f"{100 * part:.0f}% is done"] * (part > 0)
        runs, work = self.like(node), self.work_now(node)
        usable = [r for r in runs if r.node == node.id or (r.work and work)]
        if part:
            seconds = used / part * (1 - part)
        elif usable:
            near = [abs(math.log((work or 1) / (r.work or 1))) for r in usable]
            run = usable[near.index(min(near))]
            scale = work / run.work if work and run.work else 1.0
            rest = (run.seconds - run.setup) * scale * faster(run, node)
            seconds = run.setup + rest
            notes = [f"as {run.node}"] * (run.node != node.id)
        else:
            return Estimate(note=self.unknown(node, runs))
        return Estimate(seconds, hours(node, seconds), ", ".join(notes))

    def like(self, node: Node) -> list[Run]:
        """Its own earlier run if that tells of this one, else those of other nodes."""
        model = self.model(node.id, made=False)
        ids = [node.id, *self.by_stage.get(node.stage, ())]
        runs = [run for id in ids if (run := self.run(id, node))]
        on_gpus = node.placement["gpus"] > 0
        runs = [r for r in runs if r.model == model and (r.hours[GPU] > 0) == on_gpus]
        return [r for r in runs if r.node == node.id][:1] or runs

    def unknown(self, node: Node, runs: list[Run]) -> str:
        """Why no time can be told."""
        if runs:
            return "the size of its input is not known yet"
        if self.away & {node.id, *self.by_stage.get(node.stage, ())}:
            return "times of earlier runs are not here: dvc pull"
        if self.by_stage.get(node.stage) and node.stage not in DATA:
            return f"no earlier {node.stage} of this engine and model"
        return f"no earlier {node.stage}"

    # ---- earlier runs ----------------------------------------------------------

    def run(self, id: str, like: Node) -> Run | None:
        """What is recorded of a node's run, if it was by the same script."""
        if id not in self.known:
            self.known[id] = self.read(id)
        record = self.record(id)
        script = STAGES[like.stage].file_of(like.engine)
        return self.known[id] if script in record.params.get("code", {}) else None

    def record(self, id: str) -> Record:
        return recorded(self.store.entries, id)

    def read(self, id: str) -> Run | None:
        record = self.record(id)
        made = self.shelf.data(record.outs, f"artifacts/{id}/{NOTE}")
        if made is None:
            self.away |= {id} if record.outs else set()
            return None
        told = {key: made.get(key) for key in ("seconds", SETUP, GPU, CPU)}
        known = {key: float(n) for key, n in told.items() if is_number(n)}
        seconds, setup = known.pop("seconds", None), known.pop(SETUP, 0.0)
        if seconds is None:
            return None
        setup = min(setup, seconds)
        stage = id.partition("/")[0]
        recipe = record.params.get("recipe", {})
        entry = self.store.entries[id.replace("/", "-", 1)]
        sizes = [dep.get("size") for dep in entry.get("deps", [])]
        work = work_of(stage, recipe, sizes)
        return Run(
            id, self.model(id, made=True), work, seconds, setup, {GPU: 0.0, **known}
        )

    def model(self, id: str, made: bool) -> str:
        """The definition or folder of the model that a node descends from, if one.

        As it is in the config, or of what was `made`, as it was.
        """
        seen: set[str] = set()
        while id.partition("/")[0] not in DATA and id not in seen:
            seen.add(id)
            if made:
                record = self.record(id)
                paths, recipe = list(record.deps), record.params.get("recipe", {})
            else:
                node = self.store.graph.nodes[id]
                paths, recipe = [*node.artifacts, *node.files], node.recipe
            for path in paths:
                if path.startswith(f"{MODEL_FOLDERS}/") and path.endswith(".json"):
                    return path
            above = [one for one in map(owner, paths) if one]
            above = [o for o in above if o.split("/")[0] not in (*DATA, "rm")]
            if not above:
                return str(recipe.get("parent", paths))
            id = above[0]
        return ""

    # ---- this run --------------------------------------------------------------

    def work_now(self, node: Node) -> float | None:
        """What there is to do for a node now; None where its input is not there yet."""
        sizes: list[int | None] = [size_of(Path(file)) for file in node.files]
        for artifact in node.artifacts:
            parent = str(self.store.graph.owner(artifact))
            sizes.append(self.size_published(parent, artifact))
        return work_of(node.stage, node.recipe, sizes)

    def size_published(self, parent: str, artifact: str) -> int | None:
        """Bytes of what a parent published, if that is what will be read."""
        outs = self.found[parent].outs
        entry = self.store.entries.get(parent.replace("/", "-", 1), {})
        for out in entry.get("outs", []):
            if out["path"] == artifact and outs and outs.get(artifact) == out["md5"]:
                size = out.get("size")
                return size if isinstance(size, int) else None
        return None

    def begun(self, node: Node) -> tuple[float, float] | None:
        """Of a run that was stopped and will go on: which part is saved, its seconds."""
        deps = self.found[node.id].deps
        if deps is None:
            return None
        work = Path("work", node.stage, f"{node.name}-{key_of(node.params, deps)}")
        try:
            seconds = float(json.loads((work / "seconds.json").read_text()))
            if (work / "finished").exists():
                return 1.0, seconds
            state = json.loads((work / "progress.json").read_text())
            step, steps = int(state["step"]), int(state["steps"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if STAGES[node.stage].goes_on:
            saved = step
        elif STAGES[node.stage].trains:
            saved = step - step % node.placement["save_steps"]
        else:
            return None
        return (saved / steps, seconds) if 0 < saved <= steps else None

    # ---- the budget ------------------------------------------------------------

    def spent(self, unit: str) -> tuple[float, list[str]]:
        """Hours that current nodes took, and unfinished ones that will go on.

        Also the nodes of which that is not known.
        """
        total, unknown = 0.0, []
        for node in self.store.graph.nodes.values():
            if self.found[node.id].verb not in RUNS:
                cost = self.cost(node.id, unit)
                total += cost or 0.0
                unknown += [node.id] * (cost is None)
            elif begun := self.begun(node):
                total += hours(node, begun[1])[unit]
        return total, unknown

    def cost(self, id: str, unit: str) -> float | None:
        """Hours recorded of what a node has, or will have restored."""
        outs = self.found[id].outs or self.record(id).outs
        made = self.shelf.data(outs, f"artifacts/{id}/{NOTE}")
        hours = None if made is None else made.get(unit, 0.0 if unit == GPU else None)
        return float(hours) if is_number(hours) else None

    def over(self, wanted: Collection[str]) -> UserError | None:
        """The error of a build of these nodes, if it would exceed the budget."""
        budget, nodes = self.store.graph.budget, self.store.graph.nodes
        for unit, limit in limits(budget):
            needs = {
                id: one.hours.get(unit)
                for id, one in self.all().items()
                if id in wanted and hours(nodes[id], 1.0)[unit]
            }
            spent, _ = self.spent(unit)
            needed = sum(filter(None, needs.values()))
            if not needs or (spent + needed <= limit and spent < limit):
                continue
            largest = sorted(needs, key=lambda one: needs[one] or 0.0, reverse=True)
            named = plan.listed([f"{id} {figure(needs[id])}" for id in largest])
            named += "; ? counts as 0" if None in needs.values() else ""
            lines = self.store.graph.lines
            least = figure(spent + needed, up=True)
            return UserError(
                lines.where("budget", unit) if lines else f"budget.{unit}",
                f"{limit:g} {UNITS[unit]}, of which {figure(spent)} are spent by what "
                f"is built; what is to run needs {figure(needed)}: {named}",
                f"raise it above {least}; or fewer steps; or name fewer nodes to build",
            )
        return None


def limits(budget: Budget | None) -> Iterator[tuple[str, float]]:
    """What a budget limits, and to how much."""
    for unit in UNITS:
        limit = getattr(budget, unit, None)
        if limit is not None:
            yield unit, limit


def check_budget(store: Store, wanted: Collection[str]) -> None:
    """Raise where a build of these nodes would exceed the config's budget."""
    if any(limits(store.graph.budget)):
        error = Estimator(store, plan.outlook(store)).over(wanted)
        if error:
            raise error


def hours(node: Node, seconds: float) -> dict[str, float]:
    """What a run of that time costs on the node's placement."""
    gpus, cpus = units(node)
    return {GPU: seconds * gpus / 3600, CPU: seconds * cpus / 3600}


def faster(run: Run, node: Node) -> float:
    """The GPUs or cores of an earlier run to those of the node, where they count."""
    gpus, cpus = units(node)
    if not run.seconds:
        return 1.0
    if gpus:
        return 3600 * run.hours[GPU] / run.seconds / gpus
    if shares_cores(node) and run.hours.get(CPU):
        return 3600 * run.hours[CPU] / run.seconds / cpus
    return 1.0


def units(node: Node) -> tuple[int, int]:
    """GPUs and cores that a node's jobs have together."""
    placed = node.placement
    jobs = max(1, len(node.shards()))
    return placed["nodes"] * placed["gpus"], placed["nodes"] * placed["cpus"] * jobs


def shares_cores(node: Node) -> bool:
    """Whether more cores make it faster."""
    return STAGES[node.stage].trains or STAGES[node.stage].by_file


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a time or a cost is one: the file may come from anywhere."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def work_of(stage: str, recipe: dict[str, Any], sizes: list[Any]) -> float | None:
    """Tokens of a training, rows of a generator, else bytes read; None if unknown.

    Of rollouts the tokens of a prompt's answers: how many prompts is taken as before.
    """
    if STAGES[stage].trains:
        factors = [recipe[key] for key in FACTORS if key in recipe]
        return float(math.prod(factors)) if all(map(is_number, factors)) else None
    if stage == "rollouts":
        factors = [recipe.get("samples", 4), recipe.get("max_completion_tokens")]
        return float(math.prod(factors)) if all(map(is_number, factors)) else None
    if stage == "generate":
        return float(recipe["count"]) if is_number(recipe.get("count")) else None
    return float(sum(sizes)) if sizes and all(map(is_number, sizes)) else None


def size_of(path: Path) -> int | None:
    """Bytes of a file or folder, also of one that DVC tracks and has not pulled."""
    if path.is_dir():
        return sum((path / name).stat().st_size for name in files_in(path))
    if path.is_file():
        return path.stat().st_size
    outs = load_yaml(Path(f"{path}.dvc")).get("outs", [{}])
    size = outs[0].get("size")
    return size if isinstance(size, int) else None


# ---- how it is shown -----------------------------------------------------------


def figure(value: float | None, up: bool = False) -> str:
    """Hours to two decimals; as a limit that holds them, rounded up."""
    if value is None:
        return "?"
    if up:
        value = math.ceil(100 * value) / 100
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}".removesuffix(".00")


def span(least: float, most: float, shown: Callable[[float], str]) -> str:
    """`3 to 5`, or one of them where both are shown alike."""
    low, high = shown(least), shown(most)
    return low if low == high else f"{low} to {high}"


class Table:
    """The plan of a store with its times and costs."""

    def __init__(self, store: Store) -> None:
        self.store, self.found = store, plan.outlook(store)
        self.estimator = Estimator(store, self.found)
        self.times = self.estimator.all()
        nodes = self.store.graph.nodes
        on_gpus = any(nodes[id].placement["gpus"] for id in self.times)
        self.unit = GPU if on_gpus else CPU

    def lines(self) -> list[str]:
        """One line a node, then the totals."""
        if not self.found:
            return self.totals()
        cells = [self.cells(id) for id in self.found]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        verb, id, time, cost, _ = widths
        rows = [
            f"{c[0]:{verb}}  {c[1]:{id}}  {c[2]:>{time}}  {c[3]:>{cost}}  {c[4]}".rstrip()
            for c in cells
        ]
        return [*rows, *([""] if self.times else []), *self.totals()]

    def cells(self, id: str) -> list[str]:
        """What will happen, to which node, its time, its cost, why."""
        why, time, cost = plan.note(self.store, self.found, id), "", ""
        if one := self.times.get(id):
            time = duration(one.seconds)
            short = UNITS[self.unit].replace("hours", "h")
            known = one.seconds is not None
            cost = f"{figure(one.hours[self.unit])} {short}" if known else f"? {short}"
            label = "" if known else "time: "
            why += f"  ({label}{one.note})" if one.note else ""
        return [self.found[id].verb, id, time, cost, why]

    def totals(self) -> list[str]:
        """How many run, for how long, at what cost, by which knowledge."""
        restored = sum(one.verb == "restore" for one in self.found.values())
        also = f", {restored} to restore" * bool(restored)
        if not self.times:
            nothing = f"total: {len(self.found)} nodes{also}, nothing to run"
            return [*self.budget(), nothing]
        sure = [id for id in self.times if self.found[id].verb == "run"]
        unsure = len(self.times) - len(sure)
        early = f", {unsure} may stop early" if unsure else ""
        said = [f"{len(sure)} run{early}{also}"]
        time = span(self.longest(sure), self.longest(self.times), duration)
        if any(one.seconds is not None for one in self.times.values()):
            said.append(f"{time} along the longest path")
        for unit, name in UNITS.items():
            least, most = self.sum(unit, sure), self.sum(unit, self.times)
            if most:
                said.append(f"{span(least, most, figure)} {name}")
        return [*self.basis(), *self.budget(), f"total: {'; '.join(said)}"]

    def basis(self) -> list[str]:
        """What the estimates rest on, and which are lacking."""
        unknown = [id for id, one in self.times.items() if one.seconds is None]
        known = len(self.times) - len(unknown)
        said = []
        if known:
            said.append(
                f"estimated from earlier runs for {known} of {len(self.times)} nodes, "
                "taken as linear in steps, batch, bytes, GPUs, cores"
            )
        if unknown:
            said.append(f"not known, counted as 0: {plan.listed(unknown)}")
        return said

    def budget(self) -> list[str]:
        """The budget's line, and whether a build of all would be refused."""
        said = []
        for unit, limit in limits(self.store.graph.budget):
            spent, unknown = self.estimator.spent(unit)
            most = self.sum(unit, self.times)
            of = f" (of {len(unknown)} nodes not recorded here)" if unknown else ""
            said.append(
                f"budget: {limit:g} {UNITS[unit]}; {figure(spent)} spent{of}, "
                f"{figure(most)} to run at most"
            )
        if error := self.estimator.over(self.times):
            said.append(f"too much: a build of all is refused: {error.what}")
        return said

    def sum(self, unit: str, ids: Collection[str]) -> float:
        return sum(self.times[id].hours.get(unit, 0.0) for id in ids)

    def longest(self, ids: Collection[str]) -> float:
        """Seconds of the path through these nodes that takes longest."""
        ends: dict[str, float] = {}
        for node in self.store.graph.nodes.values():
            begins = max((ends[parent] for parent in node.parents), default=0.0)
            seconds = self.times[node.id].seconds if node.id in ids else None
            ends[node.id] = begins + (seconds or 0.0)
        return max(ends.values(), default=0.0)
