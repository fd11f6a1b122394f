"""What the rules ask for: nodes, their inputs and manifests, their placement."""

from __future__ import annotations

import difflib
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.lib import estimate, graph, plan, tracking
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph
from scripts.lib.progress import say
from scripts.lib.stages import STAGES
from scripts.lib.store import GRAPH, IN_RUN, Store, dvc_errors

COLLECT_SELDOM = (100_000, 50, 50)
COLLECT_OFTEN = gc.get_threshold()


class Workflow:
    """The graph and its store, as the Snakefile sees them."""

    def __init__(self, store: Store, cluster: Path | None = None) -> None:
        self.store, self.cluster = store, cluster
        self.snakemake: Any = None

    @classmethod
    def at_start(cls, workflow: Any) -> Workflow:
        """Read the config, decide what is current, and say so; leave on a mistake.

        `workflow` is Snakemake's. In a job of a run that is under way, everything
        was decided by that run.
        """
        collect_seldom()
        given = [Path(p).absolute() for p in workflow.configfiles]
        os.chdir(workflow.basedir)
        ours = str(Path(sys.executable).parent)  # also where it is not activated
        os.environ["PATH"] = f"{ours}{os.pathsep}{os.environ.get('PATH', '')}"
        try:
            with dvc_errors():
                made = cls.decide(workflow, [Path(os.path.relpath(p)) for p in given])
                made.snakemake = workflow
                return made
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    @classmethod
    def decide(cls, workflow: Any, given: list[Path]) -> Workflow:
        """The graph of the run this belongs to, or of the config as it is now."""
        if os.environ.get(IN_RUN) and GRAPH.exists():
            return cls(Store(Graph.from_json(GRAPH.read_text())))
        if len(given) > 1 or workflow.config_settings.config:
            raise UserError(
                "--config, --configfile",
                "one file says it all, and DVC reads it too",
                "write a config that starts with `extends: config.yaml`",
            )
        there = cluster_file(workflow)
        store = Store(graph.build(given[0] if given else plan.chosen_config(), there))
        check_targets(store.graph)
        store.sync()
        plan.announce(store)
        if there:
            from scripts.lib.executor import register

            register(store)
        return cls(store, there)

    def nodes(self, stage: str) -> list[str]:
        """The names of a stage's nodes."""
        return [n.name for n in self.store.graph.nodes.values() if n.stage == stage]

    def every(self, *stages: str) -> list[str]:
        """The manifests of all nodes, or of these stages' nodes."""
        found = self.store.graph.nodes.values()
        return [n.manifest for n in found if not stages or n.stage in stages]

    def sweeps(self) -> list[str]:
        """The sweeps, each a target: `grpo/reasoner`."""
        return [*self.store.graph.sweeps]

    def of_sweep(self, sweep: str) -> list[str]:
        """The manifests of a sweep's nodes."""
        whole = self.store.graph
        return [whole.nodes[id].manifest for id in whole.sweeps[sweep]]

    def shards(self, stage: str) -> list[str]:
        """The names of the jobs that share the files of a stage's nodes."""
        shared = self.store.graph.shards.values()
        ids = [one.id for shards in shared for one in shards if one.stage == stage]
        return [id.partition("/")[2] for id in ids]

    def manifest(self, stage: str, name: str) -> str:
        """The file that exists exactly when the node is current."""
        return self.store.graph.jobs[f"{stage}/{name}"].manifest

    def before(self, stage: str, name: str) -> Callable[[Any], list[Any]]:
        """An input function: the manifests of what must be ready first.

        Every ancestor is listed, since Snakemake looks at a job again when any
        checkpoint among its inputs has finished. Of a current node they are current
        too, so its parents are enough. All are `ancient`, since whether a node is
        current is decided by content, never by time. A node that several jobs make
        comes after those, unless there is nothing to make.
        """
        from snakemake.io import ancient

        id = f"{stage}/{name}"

        def inputs(wildcards: Any) -> list[Any]:
            self.store.refresh()
            graph = self.store.graph
            whole = graph.jobs[id].whole
            why = self.store.why.get(whole, [])
            above = graph.before(whole) if why else [*graph.nodes[whole].parents]
            if id == whole and plan.verb(why) in plan.RUNS:
                above += [shard.id for shard in graph.shards.get(id, ())]
            return [ancient(graph.jobs[one].manifest) for one in above]

        return inputs

    def place(self, stage: str, name: str, key: str) -> Any:
        """One setting of a node's placement."""
        return self.store.graph.jobs[f"{stage}/{name}"].placement[key]

    def resources(self, stage: str, name: str) -> dict[str, int | str]:
        """A node's placement as Snakemake's resources; on a cluster, as Slurm's.

        Several machines are asked for with one task each, which the stage's launcher
        starts. `gres` rather than `gpu`, which may be split over machines:
        https://snakemake.github.io/snakemake-plugin-catalog/plugins/executor/slurm.html
        """
        placed = self.store.graph.jobs[f"{stage}/{name}"].placement
        found: dict[str, int | str] = {
            "mem_mb": int(1000 * placed["memory_gb"]),
            "runtime": placed["minutes"],
        }
        if not self.cluster:
            return found | {"gpu": placed["gpus"]}
        before = min(placed["stop_seconds"], 30 * placed["minutes"])
        extra = ["--ntasks-per-node=1", "--open-mode=append"]
        if STAGES[stage].trains:
            extra.append(f"--signal=B:USR1@{before}")
        found |= {"nodes": placed["nodes"], "slurm_extra": " ".join(extra)}
        if placed["gpus"]:
            found["gres"] = f"{placed['gres']}:{placed['gpus']}"
        if "gpu" not in str(found.get("gres")):  # else the plugin would ask for one
            found["tasks"] = placed["nodes"]
        for key in ("account", "partition"):
            found |= {f"slurm_{key}": placed[key]} if placed[key] else {}
        for key in ("qos", "constraint"):
            found |= {key: placed[key]} if placed[key] else {}
        return found

    def start(self) -> None:
        """Take this folder for the run that starts."""
        gc.set_threshold(*COLLECT_OFTEN)
        try:
            here = self.snakemake.executor_plugin.common_settings.local_exec
            if not here and not self.cluster:
                raise UserError(
                    "--executor",
                    "a cluster, but no file describes it",
                    "use --profile slurm, which names slurm/cluster.yaml",
                )
            if self.cluster and Path(self.snakemake.workdir_init) != Path.cwd():
                raise UserError(
                    self.snakemake.workdir_init,
                    "jobs start where Snakemake does",
                    f"run this in the project's folder: cd {Path.cwd()}",
                )
            self.store.hold()
            self.check_engines()
            estimate.check_budget(self.store, self.to_run())
            if self.cluster:
                from scripts.lib import doctor

                doctor.preflight(self.store, self.cluster)
        except Exception as error:  # Snakemake would say nothing of it
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def to_run(self) -> set[str]:
        """The nodes that Snakemake will run, or may."""
        jobs = [job.rule.name for job in self.snakemake.dag.needrun_jobs()]
        known = self.store.graph.jobs
        return {known[name].whole for name in jobs if name in known}

    def check_engines(self) -> None:
        """Raise where a node that will run has no Python, or nothing to start from."""
        from scripts.lib.run import interpreter, parent_of

        for node in map(self.store.graph.nodes.__getitem__, plan.stale(self.store)):
            interpreter(node)
            container = node.placement.get("container", {}).get("runtime", "none")
            if node.engine == "transformers" and container == "none":
                self.check_logging(node.logging)
            if node.recipe.get("parent"):  # a job may have no network
                say(node.id, f"starts from {node.recipe['parent']['hf']}, of the hub")
                parent_of(node)

    def check_logging(self, logging: dict[str, Any]) -> None:
        """Raise where trainers that this Python runs could not log."""
        if lacks := tracking.lacking(logging):
            lines = self.store.graph.lines
            at = f"logging.{lacks[0]}"
            where = lines.where("logging", lacks[0]) if lines else at
            raise UserError(where, *lacks[1:])

    def fail(self) -> None:
        """Say what is not built, and how to go on."""
        self.store.settle(keep=True)
        left = plan.folded(self.store.graph, plan.stale(self.store))
        if self.cluster:
            from scripts.lib.executor import Executor

            for what in Executor.failures:
                print(f"[failed] {what}", file=sys.stderr)
        print(f"[failed] not built: {left}", file=sys.stderr)
        print("[failed] the same command again continues from there", file=sys.stderr)

    def finish(self) -> None:
        """Say where the results are."""
        self.store.settle(keep=True)
        plan.results(self.store)


def check_targets(whole: Graph) -> None:
    """Raise for a target that is no stage, node or sweep, before anything is decided.

    Snakemake knows its targets only after the Snakefile, so its own parser is asked;
    what it would say of such a one names no other.
    """
    from snakemake.cli import get_argument_parser

    if Path(sys.argv[0]).stem not in ("snakemake", "__main__"):
        return
    asked, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    named = {*asked.targets, *asked.forcerun, *asked.until, *asked.omit_from}
    known = {"all", *STAGES, *whole.jobs, *whole.sweeps}
    for name in sorted(named - known - {job.manifest for job in whole.jobs.values()}):
        part = name.removeprefix("artifacts/").strip("/")
        close = difflib.get_close_matches(part, sorted(known), 3, 0.6)
        guess = f"did you mean {', '.join(f'`{one}`' for one in close)}? " * bool(close)
        hint = "a target is a stage, a node or a sweep; `make plan` lists the nodes"
        raise UserError(name, "no such target", guess + hint)


def collect_seldom() -> None:
    """Until a run starts, look for garbage seldom: rules and jobs are there to stay.

    With thousands of them, looking took a third of a plan's time.
    """
    gc.freeze()
    gc.set_threshold(*COLLECT_SELDOM)


def cluster_file(workflow: Any) -> Path | None:
    """The cluster's file, which the Slurm profile names as a default resource.

    Snakemake reads the Snakefile before it tells which executor there will be.
    """
    given = workflow.resource_settings.default_resources
    if not given or "cluster_file" not in given:
        return None
    return Path(str(given["cluster_file"].raw))
