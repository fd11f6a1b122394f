"""The graph of nodes that a config describes, checked across stages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from scripts.environments.mix import BUILT_IN, own_file
from scripts.lib import hub, identity, parallel
from scripts.lib.errors import UserError
from scripts.lib.load import (
    ConfigError,
    Key,
    Lines,
    load_cluster,
    load_config,
    nearest,
)
from scripts.lib.rows import can_be_cut
from scripts.lib.schema import (
    HUB_NAME,
    PARALLEL,
    RL_PLACEMENT,
    TOLD,
    Budget,
    Cluster,
    ClusterPlacement,
    Config,
    Engine,
    MegatronRecipe,
    Placement,
    Released,
)
from scripts.lib.stages import CANDIDATES, DATA, MODELS, PARENTS, STAGES, STARTED

Refusal = Callable[[str, str, str], ConfigError]
"""An error at a placement key: the key, what is wrong, what to do."""

MODEL_FOLDERS = Path("config/models")
RESERVED = {".dvc", ".git", ".snakemake", "artifacts", "logs", "state", "work"}
"""Folders of the build itself: nothing there is an input."""

DATA_OF = {
    "sft": "pack",
    "dpo": "preferences",
    "rm": "preferences",
    "grpo": "prompts",
    "rollouts": "prompts",
}
"""Which stage makes the data of one that starts from a model."""

OF_TURNS = ("tool_use", "sliding_puzzle")
"""Environments that reply: conversations of several turns."""

HUB = "hf:"
"""Before the name and the revision of a parent that is on the hub, for --parent."""

OF_NVIDIA = {*MegatronRecipe.__annotations__}
"""Settings that only that engine knows."""

OF_GENERATION = RL_PLACEMENT[:4]
"""Placement that only NeMo-RL, and vLLM, know."""

HUB_LICENSE = re.compile(r"^[a-z0-9][a-z0-9.+-]*$")
"""How the hub names licences."""

CONFIG_PATH = re.compile(r"[\w./-]+")
"""Config paths stand in dvc.yaml's commands."""


@dataclass(frozen=True)
class Node:
    """A named stage instance: what it is made from, how, by whom, and where it runs.

    `flags` are its script's inputs as (flag, value) pairs; `artifacts` the folders
    or files of other nodes it reads, `files` those of the project's own.

    Where several jobs make it, each of `shards` is one that makes a share of its files.
    Such a one is like the node, but for its `share` and what carries its `id`.
    """

    stage: str
    name: str
    recipe: dict[str, Any]
    parents: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()
    artifacts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    code: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    placement: dict[str, Any] = field(default_factory=dict)
    engine: Engine = "transformers"
    sweep: str = ""
    """The name in the config of the sweep that it is of."""
    varied: dict[str, Any] = field(default_factory=dict)
    """Its values of what that varies."""
    keep: bool = False
    logging: dict[str, Any] = field(default_factory=dict)
    share: str = ""
    """Of a job that makes a part of the node, which: `2of8`."""

    @property
    def script(self) -> str:
        """The module that makes it."""
        return STAGES[self.stage].script_of(self.engine)

    @property
    def whole(self) -> str:
        """The node's id, also of a share of it."""
        return f"{self.stage}/{self.name}"

    @property
    def id(self) -> str:
        return f"{self.whole}-{self.share}" if self.share else self.whole

    def shards(self) -> list[Node]:
        """The jobs that share its files, before its own: none where one job does it.

        A plain file of lines, or of parquet, is cut between them, as large as it may be
        by then.
        """
        if not STAGES[self.stage].by_file:
            return []
        named = [v.partition("=") for flag, v in self.flags if flag == "--data"]
        on_hub = set(self.recipe.get("sources", ())) - {name for name, _, _ in named}
        num = self.placement.get("jobs", 1)
        if not any(can_be_cut(Path(path)) for _, _, path in named):
            num = min(num, len(named) + len(on_hub))
        several = range(1, num + 1) if num > 1 else ()
        return [replace(self, share=f"{i}of{num}") for i in several]

    @property
    def dvc(self) -> str:
        """The node's name as a DVC stage."""
        return f"{self.stage}-{self.name}"

    @property
    def folder(self) -> str:
        return f"artifacts/{self.whole}"

    @property
    def content(self) -> str:
        return f"{self.folder}/{STAGES[self.stage].content}"

    @property
    def outs(self) -> list[str]:
        """What is published and recorded, the content first."""
        stage = STAGES[self.stage]
        beside = ("metrics.jsonl",) if stage.trains else stage.beside
        files = [f"{self.folder}/{name}" for name in (*beside, "provenance.json")]
        return [self.content, *files]

    @property
    def manifest(self) -> str:
        return f"state/{self.id}.json"

    @property
    def job(self) -> Path:
        """Word of the node's Slurm job for whoever comes later."""
        return Path(f"state/{self.id}.job.json")

    @property
    def command(self) -> str:
        return f"python -m scripts.lib.run {self.stage} {self.name}"

    @property
    def params(self) -> dict[str, Any]:
        """Identity apart from inputs: what dvc.lock records of the node itself."""
        return {
            "recipe": self.recipe,
            "code": self.code,
            **({"packages": self.packages} if self.packages else {}),
        }


class Graph:
    """All nodes by id, parents before children.

    `shards` has those of each node that several jobs make, `jobs` all by their ids;
    `sweeps` the ids of each sweep's nodes. `lines` and `budget` are known where it was
    built from a config just now.
    """

    lines: Lines | None = None
    budget: Budget | None = None

    def __init__(self, nodes: list[Node], config: str, files: list[str]) -> None:
        self.config, self.config_files = config, files
        self.nodes: dict[str, Node] = {}
        pending = {node.id: node for node in nodes}
        while pending:
            ready = [
                n for n in pending.values() if not any(p in pending for p in n.parents)
            ]
            assert ready, "cycles are refused when the graph is built"
            for node in ready:
                self.nodes[node.id] = pending.pop(node.id)
        shared = {id: node.shards() for id, node in self.nodes.items()}
        self.shards = {id: found for id, found in shared.items() if found}
        several = [one for found in self.shards.values() for one in found]
        self.jobs = self.nodes | {one.id: one for one in several}
        self.sweeps: dict[str, list[str]] = {}
        for node in self.nodes.values():
            if node.sweep:
                self.sweeps.setdefault(f"{node.stage}/{node.sweep}", []).append(node.id)
        self.data: dict[str, frozenset[str]] = {}
        self.place = {id: place for place, id in enumerate(self.nodes)}
        self.below: dict[str, list[str]] = {id: [] for id in self.nodes}
        for node in self.nodes.values():
            for parent in dict.fromkeys(node.parents):
                self.below[parent].append(node.id)

    def children(self, id: str) -> list[str]:
        return self.below[id]

    def ancestors(self, id: str) -> list[str]:
        """Every node above, parents before children."""
        return self._in_order(self._above(id))

    def descendants(self, id: str) -> list[str]:
        found: set[str] = set()
        todo = [*self.below[id]]
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo += self.below[one]
        return self._in_order(found)

    def _in_order(self, ids: Collection[str]) -> list[str]:
        return sorted(ids, key=self.place.__getitem__)

    def before(self, id: str) -> list[str]:
        """What must be ready first: the ancestors, and all data of the descendants.

        So bad data stops a build before a GPU is used, not after.
        """
        wanted = set(self._above(id))
        if STAGES[self.nodes[id].stage].trains:
            below = {id, *self.descendants(id)}
            wanted = wanted.union(*(self._data_above(node) for node in below))
        return self._in_order(wanted)

    def _data_above(self, id: str) -> frozenset[str]:
        """The data above a node that no model has made."""
        if id not in self.data:
            data = [n for n in self._above(id) if self._is_data({n} | self._above(n))]
            self.data[id] = frozenset(data)
        return self.data[id]

    def _is_data(self, ids: Collection[str]) -> bool:
        return all(id.split("/")[0] in DATA for id in ids)

    def _above(self, id: str) -> frozenset[str]:
        if not hasattr(self, "_memo"):
            self._memo: dict[str, frozenset[str]] = {}
            for node in self.nodes.values():
                above = [self._memo[p] | {p} for p in node.parents]
                self._memo[node.id] = frozenset().union(*above)
        return self._memo[id]

    def owner(self, path: str) -> str | None:
        """The id of the node that publishes `path`, if one does."""
        parts = path.split("/")
        id = "/".join(parts[1:3])
        return id if parts[0] == "artifacts" and id in self.nodes else None

    def to_json(self) -> str:
        return json.dumps(
            {
                "config": self.config,
                "files": self.config_files,
                "nodes": [vars(node) for node in self.nodes.values()],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """A graph as `to_json` wrote it."""
        stored = json.loads(text)
        nodes = []
        for entry in stored["nodes"]:
            for key in ("parents", "artifacts", "files"):
                entry[key] = tuple(entry[key])
            entry["flags"] = tuple((flag, value) for flag, value in entry["flags"])
            nodes.append(Node(**entry))
        return cls(nodes, stored["config"], stored["files"])


def build(path: Path, cluster: Path | None = None) -> Graph:
    """The graph of the config at `path`, placed on the cluster that a file describes.

    Raises ConfigError for anything that could not be built or would train badly,
    UserError where the environment is not the one its lock pins.
    """
    if not CONFIG_PATH.fullmatch(str(path)):
        raise ConfigError(
            repr(str(path)),
            "cannot name a config",
            "letters, digits, `.`, `_`, `-`, `/`",
        )
    config, lines, files = load_config(path)
    there = load_cluster(cluster) if cluster else None
    return _Builder(config, lines, there).graph(path, files)


def path_to(start: str, above: dict[str, list[str]]) -> str:
    """A way from a node back to itself, as text; nothing where there is none."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for next_ in above.get(way[-1], []):
            if next_ == start:
                return " <- ".join([*way, start])
            if next_ not in seen:
                seen.add(next_)
                ways.append([*way, next_])
    return ""


def made_from(stage: str, node: Any) -> list[str]:
    """The data and the tokenizer that a node names, as ids: they may lead in a circle.

    Of what a data stage names, only rollouts are made by a model.
    """
    made_by = (DATA_OF | {"pretrain": "tokenize"}).get(stage, "rollouts")
    names = getattr(node, "data", None) or []
    found = [(made_by, n) for n in ([names] if isinstance(names, str) else names)]
    if tokenizer := getattr(node, "tokenizer", None):
        found.append(("tokenizer", tokenizer))
    return [f"{of}/{name.split('/')[-1]}" for of, name in found]


class _Builder:
    """Turns the sections of a config into nodes, checking what they refer to."""

    def __init__(
        self, config: Config, lines: Lines, cluster: tuple[Cluster, Lines] | None
    ) -> None:
        self.config, self.lines = config, lines
        self.cluster = cluster[0] if cluster else None
        self.places = [(config.placement, lines)]
        if cluster:
            self.places.append((cluster[0].placement, cluster[1]))
        self.definitions: dict[str, dict[str, Any]] = {}
        self.made: dict[str, Node] = {}
        self.sections: dict[str, dict[str, Any]] = {
            stage: getattr(config, stage) for stage in STAGES
        }

    def error(self, key: tuple[str, ...], what: str, hint: str = "") -> ConfigError:
        return ConfigError(self.lines.where(*key), what, hint)

    # ---- references ------------------------------------------------------------

    def ref(self, key: tuple[str, ...], name: str, stages: tuple[str, ...]) -> str:
        """The id of the node that `name` means: `node`, or `stage/node`."""
        for stage in reversed(stages):
            if name in self.sections[stage]:
                return f"{stage}/{name}"
        its, _, alone = name.partition("/")
        if its in stages and alone in self.sections[its]:
            return name
        of = [
            n for s in stages for n in self.sections[s] if name == self.sweep_of(s, n)
        ]
        if of:
            what = f"{name} is a sweep of {len(of)} nodes, and one is wanted"
            raise self.error(key, what, f"name one: {', '.join(of[:8])}")
        wanted = stages[0] if len(stages) == 1 else "one of " + ", ".join(stages)
        raise self.error(
            key,
            f"no such node: {name} (of {wanted})",
            nearest(name, [n for s in stages for n in self.names(s)]),
        )

    def names(self, stage: str) -> list[str]:
        """The names in the config of a stage's nodes: of a sweep, its own."""
        named = (self.sweep_of(stage, n) or n for n in self.sections.get(stage, {}))
        return list(dict.fromkeys(named))

    def content(self, id: str) -> str:
        stage, name = id.split("/")
        return Node(stage, name, {}).content

    def inside(self, key: tuple[str, ...], path: str) -> Path:
        """`path` as one inside the project."""
        parts = Path(path).parts
        if Path(path).is_absolute() or ".." in parts or not path:
            raise self.error(
                key,
                f"{path!r} leads out of the project",
                "give a path inside it; a link there may point to large data",
            )
        if not parts or parts[0] in RESERVED or "${" in path:
            raise self.error(key, f"{path!r} cannot be an input", "put it in a folder")
        return Path(path)

    def existing(self, key: tuple[str, ...], path: str) -> str:
        """`path`, which must be there and not be empty, or be tracked by DVC."""
        found = self.inside(key, path)
        if found.is_file() and found.stat().st_size == 0:
            raise self.error(key, f"{path} is empty")
        if not found.exists() and not Path(f"{path}.dvc").exists():
            near = [str(p) for p in sorted(found.parent.glob("*"))[:50]]
            raise self.error(
                key, f"{path}: no such file or folder", nearest(path, near)
            )
        return path

    def folder_files(self, key: tuple[str, ...], folder: str, needs: str) -> list[str]:
        """The files of a small folder of definitions; `needs` must be among them."""
        self.existing(key, f"{folder}/{needs}")
        return sorted(str(p) for p in Path(folder).iterdir() if p.is_file())

    def data(
        self,
        key: tuple[str, ...],
        names: list[str] | dict[str, float],
        kinds: tuple[str, ...],
    ) -> dict[str, Any]:
        """Parents, files, flags and recipe entries of the datasets named."""
        parents, files, flags = [], [], []
        sources: dict[str, Any] = {}
        weights = names if isinstance(names, dict) else {}
        for name in names:
            entry: dict[str, Any] = {"weight": weights[name]} if weights else {}
            sampled = self.config.rollouts.get(name)
            if made := sampled or self.config.generate.get(name):
                if made.kind not in kinds:
                    raise self.error(
                        key, f"{name} holds {made.kind}, not {' or '.join(kinds)}"
                    )
                id = f"rollouts/{name}" if sampled else f"generate/{name}"
                parents.append(id)
                flags.append(("--data", f"{name}={self.content(id)}"))
            elif own := self.config.data.get(name):
                for setting in ("column", "max_bad_rows"):
                    if setting in own.model_fields_set:
                        entry[setting] = getattr(own, setting)
                at = ("data", name)
                if (own.files is None) == (own.hf is None):
                    raise self.error(at, "needs either `files` or `hf`")
                for path in self.files_of(at, own.files or []):
                    files.append(path)
                    flags.append(("--data", f"{name}={path}"))
                if own.hf is not None:
                    entry |= {"hf": own.hf, "split": own.split}
                    here = Path(own.hf).exists() or Path(f"{own.hf}.dvc").exists()
                    if HUB_NAME.match(own.hf) and not here:
                        if own.revision is None:
                            raise self.error(
                                (*at, "revision"),
                                "missing: a hub dataset can change under its name",
                                "pin the commit, 40 hex digits",
                            )
                        entry["revision"] = own.revision
                    else:
                        folder = self.existing((*at, "hf"), own.hf)
                        files.append(folder)
                        flags.append(("--data", f"{name}={folder}"))
            else:
                ours = (*self.config.generate, *self.config.rollouts)
                known = [*self.config.data, *ours]
                raise self.error(key, f"no such dataset: {name}", nearest(name, known))
            sources[name] = entry
        return {"parents": parents, "files": files, "flags": flags, "sources": sources}

    def files_of(self, key: tuple[str, ...], patterns: list[str]) -> list[str]:
        """The files that paths and globs name, sorted; none missing, none empty."""
        found: list[str] = []
        for pattern in patterns:
            self.inside((*key, "files"), pattern)
            if any(c in pattern for c in "*?["):
                try:
                    names = [str(p) for p in Path().glob(pattern) if p.is_file()]
                    names += [str(p) for p in Path().glob(f"{pattern}.dvc")]
                except ValueError as error:
                    raise self.error((*key, "files"), f"{pattern}: {error}") from error
                # what DVC tracks counts, pulled or not
                matches = sorted({n.removesuffix(".dvc") for n in names})
                if not matches:
                    raise self.error(
                        (*key, "files"),
                        f"{pattern}: no file matches",
                        "put files there, or name yours",
                    )
            else:
                matches = [pattern]
            found += [self.existing((*key, "files"), m) for m in matches]
        for path in found:
            if Path(path).is_dir():
                raise self.error(
                    (*key, "files"), f"{path} is a folder", f"name its files: {path}/*"
                )
        return list(dict.fromkeys(found))

    # ---- the nodes -------------------------------------------------------------

    def graph(self, path: Path, files: list[Path]) -> Graph:
        self.check_names()
        self.check_engines()
        self.check_cycles()
        self.logging = self.config.logging.model_dump(exclude_none=True)
        for stage, section in self.sections.items():
            for name in section:
                self.made[f"{stage}/{name}"] = self.node(stage, name)
        for placement, lines in self.places:
            for stage, placed in placement.items():
                at = lines.where("placement", stage)
                if stage != "default" and stage not in STAGES:
                    raise ConfigError(at, "no such stage", nearest(stage, [*STAGES]))
                known = {"default", *self.sections.get(stage, {}), *self.names(stage)}
                for name in placed:
                    if name not in known:
                        raise ConfigError(
                            lines.where("placement", stage, name),
                            "no such node",
                            nearest(name, self.names(stage)),
                        )
        made = Graph([*self.made.values()], str(path), [str(f) for f in files])
        made.lines, made.budget = self.lines, self.config.budget
        return made

    def check_names(self) -> None:
        for group in (MODELS, ("generate", "data", "rollouts")):
            seen: dict[str, str] = {}
            for stage in group:
                names = [*getattr(self.config, stage), *self.names(stage)]
                for name in dict.fromkeys(names):
                    if name in seen:
                        raise self.error(
                            (stage, name),
                            f"two nodes with one name: {seen[name]}/{name} "
                            f"and {stage}/{name}",
                            "rename one of them",
                        )
                    seen[name] = stage

    def check_cycles(self) -> None:
        self.released: dict[str, Released] = {}
        self.rewards: dict[str, list[str]] = {}
        parent: dict[str, str] = {}
        above: dict[str, list[str]] = {}
        for stage in STARTED:
            for name, node in self.sections[stage].items():
                id = f"{stage}/{name}"
                if isinstance(node.from_, Released):
                    self.released[id] = node.from_
                else:
                    parents = MODELS if stage == "rollouts" else PARENTS
                    parent[id] = self.ref((stage, name, "from"), node.from_, parents)
                self.rewards[id] = self.rewarded_by(stage, name, node)
                above[id] = [*self.rewards[id], *filter(None, [parent.get(id)])]
        for name, node in self.sections["eval"].items():
            key = ("eval", name, "from")
            above[f"eval/{name}"] = [self.ref(key, n, MODELS) for n in node.from_]
        self.parent = parent
        self.scored: dict[str, dict[str, tuple[str, str]]] = {}
        for name, node in self.sections["best"].items():
            id = f"best/{name}"
            self.scored[id] = self.scores_of(name, node, above)
            parent[id] = next(iter(self.scored[id]))  # all are of one model
            evals = [e for e, _ in self.scored[id].values() if e]
            above[id] = [*self.scored[id], *evals]
        starts = [*above]
        for stage, section in self.sections.items():
            for name, node in section.items():
                above.setdefault(f"{stage}/{name}", []).extend(made_from(stage, node))
        for start in starts:
            if circle := path_to(start, above):
                stage, name = start.split("/")
                raise self.error((stage, name, "from"), f"a cycle: {circle}")

    def measure(self, name: str, node: Any) -> tuple[str, list[str]]:
        """What a best node goes by, as its recipe says it, and the evals that score it.

        `eval.node.task`, or `metrics.key`, for which no eval is needed.
        """
        key = ("best", name, "by")
        kind, _, rest = node.by.replace("/", ".").partition(".")
        if kind == "metrics" and rest:
            return f"{kind}.{rest}", []
        wanted, _, task = (rest if kind == "eval" and rest else node.by).partition(".")
        evals = [n for n in self.config.eval if wanted in (n, self.sweep_of("eval", n))]
        if not evals:
            hint = nearest(wanted, self.names("eval"))
            raise self.error(key, f"no such eval node: {wanted}", hint)
        tasks = [*self.config.eval[evals[0]].tasks]
        if not task and len(tasks) > 1:
            hint = f"name one: {wanted}.{tasks[0]}; there are: {', '.join(tasks)}"
            raise self.error(key, f"{wanted} has several tasks", hint)
        if task and task not in tasks:
            hint = nearest(task, tasks)
            raise self.error(key, f"no such task of {wanted}: {task}", hint)
        return f"eval.{wanted}.{task or tasks[0]}", [f"eval/{n}" for n in evals]

    def scores_of(
        self, name: str, node: Any, above: dict[str, list[str]]
    ) -> dict[str, tuple[str, str]]:
        """Of each candidate of a best node the eval that scores it, and as which node.

        That is the candidate, or an export of it; both empty where metrics count.
        """
        key = ("best", name)
        ids = [self.ref((*key, "from"), n, CANDIDATES) for n in node.from_]
        by, evals = self.measure(name, node)
        found: dict[str, tuple[str, str]] = {}
        for id in ids:
            exports = [e for e, p in self.parent.items() if p == id and "export/" in e]
            ways = [(e, n) for n in (id, *exports) for e in evals if n in above[e]]
            if evals and not ways:
                raise self.error(
                    (*key, "by"),
                    f"{by} has no score of {id}, nor of an export of it",
                    f"name it, or its sweep, in eval.{by.split('.')[1]}.from",
                )
            found[id] = ways[0] if evals else ("", "")
        return found

    def rewarded_by(self, stage: str, name: str, node: Any) -> list[str]:
        """The reward models among a node's environments."""
        found = []
        for kind, settings in getattr(node, "environment", {}).items():
            if settings.from_ is not None:
                key = (stage, name, "environment", kind, "from")
                found.append(self.ref(key, settings.from_, ("rm",)))
        return found

    def engine_of(self, stage: str) -> Engine:
        """Who runs a stage: what the config says of it, where there is such a script."""
        given = self.config.engine
        wanted = given.get(stage, given.get("default", "transformers"))
        return STAGES[stage].engine_of(wanted)

    def check_engines(self) -> None:
        for stage, wanted in self.config.engine.items():
            if stage == "default":
                continue
            if stage not in STAGES:
                raise self.error(
                    ("engine", stage), "no such stage", nearest(stage, [*STAGES])
                )
            if STAGES[stage].engine_of(wanted) != wanted:
                raise self.error(
                    ("engine", stage), f"{wanted} has no {stage}", "transformers"
                )

    def node(self, stage: str, name: str) -> Node:
        settings = self.sections[stage][name]
        parts: dict[str, Any] = getattr(self, f"of_{stage}", lambda name, settings: {})(
            name, settings
        )
        engine = self.engine_of(stage)
        self.check_engine(stage, name, engine, settings)
        recipe = self.recipe(stage, settings) | parts.get("recipe", {})
        if "sources" in parts:
            recipe["sources"] = parts["sources"]
        parents = list(dict.fromkeys(parts.get("parents", [])))
        artifacts = parts.get("artifacts", [self.content(p) for p in parents])
        spec = STAGES[stage]
        return Node(
            stage,
            name,
            recipe,
            tuple(parents),
            tuple(parts.get("flags", [])),
            tuple(artifacts),
            tuple(dict.fromkeys(parts.get("files", []))),
            self.code(spec.script_of(engine), parts.get("modules", [])),
            identity.versions(spec.packages_of(engine), engine),
            self.placement(stage, name, engine),
            engine,
            self.sweep_of(stage, name),
            self.lines.varied.get((stage, name), {}),
            settings.keep,
            self.logging if spec.trains else {},
        )

    def sweep_of(self, stage: str, name: str) -> str:
        """The name in the config of the sweep that a node is of, if it is."""
        is_of_sweep = (stage, name) in self.lines.varied
        return self.lines.made[stage, name][1] if is_of_sweep else ""

    def code(self, script: str, modules: list[str]) -> dict[str, str]:
        """A script's code, and that of modules which it finds by name."""
        found = dict(identity.code_of(script))
        for module in modules:
            found |= identity.code_of(module)
        return dict(sorted(found.items()))

    def recipe(self, stage: str, settings: Any) -> dict[str, Any]:
        """The node's settings without what it refers to; unset ones left out."""
        of_recipe = set(STAGES[stage].recipe.model_fields) - {"sources", "keep"}
        dumped: dict[str, Any] = settings.model_dump(
            by_alias=True, include=of_recipe, exclude_none=True
        )
        return dumped

    def check_engine(
        self, stage: str, name: str, engine: Engine, settings: Any
    ) -> None:
        """What only one engine can be told, and what that one would not know."""
        key = (stage, name)
        given = [k for k in sorted(OF_NVIDIA) if getattr(settings, k, None) is not None]
        if engine != "nvidia":
            for setting in given:
                raise self.error((*key, setting), *self.belongs(stage))
            self.check_transformers(stage, name, settings)
            return
        from scripts.lib import bridge_options, rl_options

        if getattr(settings, "seed", 1) < 1:
            raise self.error(
                (*key, "seed"), f"{settings.seed}, but Megatron takes 1 and above"
            )
        if "recipe" in given and (
            found := bridge_options.check_recipe(settings.recipe)
        ):
            raise self.error((*key, "recipe"), *found)
        overrides = getattr(settings, "overrides", None) or {}
        by_nemo_rl = STAGES[stage].nvidia_launcher == "ray"
        for setting, what, hint in (
            rl_options.check_overrides(stage, overrides)
            if by_nemo_rl
            else bridge_options.check_overrides(overrides)
        ):
            raise self.error((*key, "overrides", setting), what, hint)
        id = f"{stage}/{name}"
        starts = stage == "pretrain" or id in self.released
        known = self.model_config(id) if starts else None
        if known and (found := bridge_options.check_architecture(known[1])):
            at = "model" if stage == "pretrain" else "from"
            raise self.error((*key, at), *found)

    def check_transformers(self, stage: str, name: str, settings: Any) -> None:
        """What TRL, PEFT and Transformers lack."""
        key = (stage, name)
        dapo = getattr(settings, "algorithm", "grpo") == "dapo"
        if dapo and settings.draws_anew:
            raise self.error(
                (*key, "dynamic_sampling"),
                "TRL has no dynamic sampling, which is a part of dapo",
                "dynamic_sampling: false trains by the rest of it; or engine: nvidia",
            )
        if dapo and (settings.max_turns or 1) > 1:
            raise self.error(
                (*key, "max_turns"),
                "TRL's overlong penalty takes a conversation for one completion",
                "algorithm: grpo; or engine: nvidia",
            )
        known = self.model_config(f"{stage}/{name}") if stage in DATA_OF else None
        model = known[1] if known else {}
        if stage == "rm":
            for setting, what, hint in parallel.of_rm(model):
                raise self.error((*key, setting), what, hint)
        if peft := getattr(settings, "peft", None):
            for what, hint in parallel.of_peft(peft.target_modules or [], model):
                raise self.error((*key, "peft", "target_modules"), what, hint)

    def belongs(self, stage: str) -> tuple[str, str]:
        """What is said of a key that the engine of a stage does not know."""
        hint = f"remove it; {stage} runs on engine transformers here"
        return "belongs to engine: nvidia", hint

    def placement(self, stage: str, name: str, engine: Engine) -> dict[str, Any]:
        """Where a node runs: the more specific level counts, then the cluster's."""
        model = ClusterPlacement if self.cluster else Placement
        merged: dict[str, Any] = {}
        at: dict[str, tuple[Lines, Key]] = {}
        sweep = self.sweep_of(stage, name) or "default"
        of_stage = [(stage, n) for n in dict.fromkeys(("default", sweep, name))]
        for s, n in (("default", "default"), *of_stage):
            for source, lines in self.places:
                for key, value in source.get(s, {}).get(n, {}).items():
                    here: Key = ("placement", s, n, key)
                    if key not in model.model_fields:
                        raise ConfigError(
                            lines.where(*here), "unknown key", self.placement_hint(key)
                        )
                    merged[key] = value
                    at[key] = lines, here
        try:
            placed = model.model_validate(merged)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            lines, here = at[str(first["loc"][0])]
            what = f"{first['msg'].lower()}; found {first['input']!r}"
            raise ConfigError(lines.where(*here), what) from error
        result = placed.model_dump()
        result["processes"] = placed.processes or max(1, placed.gpus)

        def refuse(key: str, what: str, hint: str) -> ConfigError:
            lines, found = at.get(key, (self.lines, ("placement", stage, name)))
            return ConfigError(lines.where(*found), what, hint)

        if engine == "nvidia":
            placed = self.with_backend(stage, name, placed)
            result["backend"] = placed.backend
            self.check_parallel(stage, name, placed, refuse)
        else:
            for_it = {key for key, (_, here) in at.items() if here[1] != "default"}
            self.check_of_nvidia(stage, placed, for_it, refuse)
            self.check_processes(stage, name, placed, refuse)
        jobs_of_stage = "jobs" in at and at["jobs"][1][1] != "default"
        if jobs_of_stage and placed.jobs > 1 and not STAGES[stage].by_file:
            several = ", ".join(one.name for one in STAGES.values() if one.by_file)
            raise refuse(
                "jobs", f"{stage} is one job", f"jobs: 1; {several} can be more"
            )
        if self.cluster:
            self.check_machine(self.cluster, placed, refuse)
            container = self.cluster.container.model_dump()
            for key in ("image", "runtime"):
                container[key] = result.pop(key) or container[key]
            result["container"] = container
        return result

    def with_backend(self, stage: str, name: str, placed: Any) -> Any:
        """The placement with what NeMo-RL trains with, chosen where it is not set."""
        if STAGES[stage].nvidia_launcher != "ray" or placed.backend is not None:
            return placed
        known = self.model_config(f"{stage}/{name}")
        chosen = parallel.backend_of(stage, placed, known[1] if known else None)
        return placed.model_copy(update={"backend": chosen})

    def placement_hint(self, key: str) -> str:
        if key in ClusterPlacement.model_fields:
            return "it belongs in the cluster's file: slurm/cluster.yaml"
        return nearest(key, [*Placement.model_fields])

    def check_parallel(
        self, stage: str, name: str, placed: Placement, refuse: Refusal
    ) -> None:
        """Sizes that Megatron can split this model and its batch by."""
        settings = self.sections[stage][name]
        if stage == "eval":
            for key, what, hint in parallel.of_eval(placed, self.evaluated(name)):
                raise refuse(key, what, hint)
            return
        known = self.model_config(f"{stage}/{name}")
        model = known[1] if known else None
        length = getattr(settings, "sequence_length", None)
        if stage == "sft":
            packed = self.ref((stage, name, "data"), settings.data, ("pack",))
            length = self.sections["pack"][packed.split("/")[1]].sequence_length
        found = []
        if STAGES[stage].nvidia_launcher == "ray":
            found = list(parallel.of_rl(stage, placed, model))
            if stage == "grpo":
                training = max(0, placed.gpus - placed.generation_gpus)
                placed = placed.model_copy(update={"gpus": training})
        found += parallel.problems(
            stage,
            placed,
            model,
            getattr(settings, "batch_size", None),
            length,
            getattr(settings, "precision", None),
            settings.peft.method if getattr(settings, "peft", None) else None,
        )
        for key, what, hint in found:
            if key in Placement.model_fields:
                raise refuse(key, what, hint)
            raise self.error((stage, name, key), what, hint)

    def evaluated(self, name: str) -> list[dict[str, Any]]:
        """The definitions of the models that an eval node scores, where they are here."""
        named = [
            self.model_config(self.ref(("eval", name, "from"), n, MODELS))
            for n in self.sections["eval"][name].from_
        ]
        return [known[1] for known in named if known]

    def check_of_nvidia(
        self, stage: str, placed: Placement, given: set[str], refuse: Refusal
    ) -> None:
        """Nothing is `given` for this stage that only the other engine knows.

        What is given for all stages is for those that know it.
        """
        for key in (*PARALLEL, *OF_GENERATION, "python"):
            default = Placement.model_fields[key].default
            if key in given and getattr(placed, key) != default:
                raise refuse(key, *self.belongs(stage))

    def check_processes(
        self, stage: str, name: str, placed: Placement, refuse: Refusal
    ) -> None:
        """Several processes only where the trainer shares its batch among them."""
        launched = STAGES[stage].launcher
        if placed.nodes > 1 and not launched:
            way = "; `jobs` share its files" if STAGES[stage].by_file else ""
            raise refuse("nodes", f"{stage} runs on one machine", f"nodes: 1{way}")
        if (placed.processes or 1) > 1 and not launched:
            raise refuse("processes", f"{stage} is one process", "processes: 1")
        world = placed.nodes * (placed.processes or max(1, placed.gpus))
        batch = getattr(self.sections[stage][name], "batch_size", world)
        if launched and batch % world:
            raise refuse(
                "processes" if placed.processes else "nodes",
                f"{stage}.{name}.batch_size {batch} does not divide among "
                f"{world} processes ({placed.nodes} machines x {world // placed.nodes})",
                "give a number of processes that divides it",
            )
        if placed.processes and placed.cpus < placed.processes:
            raise refuse(
                "processes",
                f"{placed.processes} processes, but {placed.cpus} CPU cores a machine",
                "raise cpus",
            )

    def check_machine(
        self, cluster: Cluster, placed: Placement, refuse: Refusal
    ) -> None:
        """What is asked for must be in a machine of the cluster's file."""
        if cluster.machine is None:
            return
        for key in ("cpus", "memory_gb", "gpus"):
            asked, there = getattr(placed, key), getattr(cluster.machine, key)
            if asked > there:
                raise refuse(
                    key, f"{asked:g}, but a machine has {there:g}", f"{key}: {there:g}"
                )

    # ---- what each stage reads; what would train badly is refused -----------------

    def of_tokenizer(self, name: str, node: Any) -> dict[str, Any]:
        key = ("tokenizer", name)
        given = [k for k in ("data", "path", "hf") if getattr(node, k) is not None]
        if len(given) != 1:
            raise self.error(
                key, f"needs one of data, path, hf; found {given or 'none'}"
            )
        parts: dict[str, Any] = {"files": [], "flags": []}
        if node.data is not None:
            for needed in ("vocab_size", "chat_template"):
                if getattr(node, needed) is None:
                    raise self.error((*key, needed), "missing: a tokenizer is trained")
            parts = self.data((*key, "data"), node.data, ("documents", "chats"))
        if node.hf is not None and node.revision is None:
            raise self.error(
                (*key, "revision"), "missing: pin the commit, 40 hex digits"
            )
        if node.path is not None:
            folder = str(self.inside((*key, "path"), node.path))
            parts["files"] += self.folder_files(
                (*key, "path"), folder, "tokenizer.json"
            )
            parts["flags"].append(("--tokenizer", folder))
        if node.chat_template is not None:
            file = self.existing((*key, "chat_template"), node.chat_template)
            if not Path(file).is_file():
                raise self.error((*key, "chat_template"), f"{file} is not a file")
            parts["files"].append(file)
            parts["flags"].append(("--chat-template", file))
        return parts

    def with_tokenizer(
        self, stage: str, name: str, node: Any, kinds: tuple[str, ...]
    ) -> dict[str, Any]:
        parts = self.data((stage, name, "data"), node.data, kinds)
        id = self.ref((stage, name, "tokenizer"), node.tokenizer, ("tokenizer",))
        parts["parents"].insert(0, id)
        parts["flags"].insert(0, ("--tokenizer", self.content(id)))
        return parts

    def of_tokenize(self, name: str, node: Any) -> dict[str, Any]:
        return self.with_tokenizer("tokenize", name, node, ("documents",))

    def of_pack(self, name: str, node: Any) -> dict[str, Any]:
        return self.with_tokenizer("pack", name, node, ("chats",))

    def of_preferences(self, name: str, node: Any) -> dict[str, Any]:
        return self.with_tokenizer("preferences", name, node, ("preferences",))

    def of_prompts(self, name: str, node: Any) -> dict[str, Any]:
        return self.with_tokenizer("prompts", name, node, ("prompts", "puzzles"))

    def tokenizer_of(self, id: str) -> str:
        """The id of the tokenizer that a node's tokens are made with."""
        stage, name = id.split("/")
        if stage in ("tokenize", *DATA_OF.values()):
            return f"tokenizer/{self.sections[stage][name].tokenizer.split('/')[-1]}"
        if stage == "pretrain":
            data = self.sections[stage][name].data.split("/")[-1]
            return self.tokenizer_of(f"tokenize/{data}")
        if id in self.released:  # its data's, which is compared with the model's own
            data = self.sections[stage][name].data
            made_by = DATA_OF[stage]
            return self.tokenizer_of(self.ref((stage, name, "data"), data, (made_by,)))
        return self.tokenizer_of(self.parent[id])

    def model_config(self, id: str) -> tuple[str, dict[str, Any]] | None:
        """The file and content of the model definition that a node descends from.

        None where they are not here: on the hub, or tracked by DVC and not pulled.
        """
        while id in self.parent:
            id = self.parent[id]
        name = id.split("/")[1]
        if id in self.released:
            file = str(Path(self.released[id].hf, "config.json"))
            return (file, self.json_of(file)) if Path(file).exists() else None
        key = ("pretrain", name, "model")
        model = self.sections["pretrain"][name].model
        file = str(MODEL_FOLDERS / model / "config.json")
        if "/" in model or not Path(file).exists():
            known = sorted(p.parent.name for p in MODEL_FOLDERS.glob("*/config.json"))
            raise self.error(
                key, f"no such model: {model} (of config/models)", nearest(model, known)
            )
        return file, self.json_of(file)

    def definition_of(self, id: str) -> str:
        """The file of that, or where it is."""
        known = self.model_config(id)
        return known[0] if known else "none here"

    def json_of(self, file: str) -> dict[str, Any]:
        if file not in self.definitions:
            self.definitions[file] = self.read_json(file)
        return self.definitions[file]

    def read_json(self, file: str) -> dict[str, Any]:
        try:
            loaded = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(file, f"not JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(file, "not a mapping")
        return loaded

    def fits(self, key: tuple[str, ...], length: int, what: str, id: str) -> None:
        known = self.model_config(id)
        if known is None:
            return
        file, model = known
        longest = model.get("max_position_embeddings")
        if isinstance(longest, int) and length > longest:
            raise self.error(
                key,
                f"{what} of {length} tokens, but the model's longest is {longest}",
                f"at most {longest}, or raise max_position_embeddings in {file}",
            )

    def of_pretrain(self, name: str, node: Any) -> dict[str, Any]:
        key, id = ("pretrain", name), f"pretrain/{name}"
        data = self.ref((*key, "data"), node.data, ("tokenize",))
        tokenizer = self.tokenizer_of(data)
        known = self.model_config(id)
        assert known is not None, "its definition is in config/models"
        file, model = known
        entries = self.sections["tokenizer"][tokenizer.split("/")[1]].vocab_size
        if entries and entries > model.get("vocab_size", entries):
            raise self.error(
                (*key, "model"),
                f"{tokenizer} has {entries} entries, the model only "
                f"{model['vocab_size']}",
                f"lower vocab_size, or raise it in {file}",
            )
        self.fits((*key, "sequence_length"), node.sequence_length, "sequences", id)
        self.check_warmup(key, node)
        return {
            "parents": [tokenizer, data],
            "files": [file],
            "flags": [
                ("--model", str(Path(file).parent)),
                ("--tokenizer", self.content(tokenizer)),
                ("--data", self.content(data)),
            ],
        }

    def check_warmup(self, key: tuple[str, ...], node: Any) -> None:
        if node.warmup_steps >= node.steps:
            raise self.error(
                (*key, "warmup_steps"),
                f"{node.warmup_steps} of {node.steps} steps leaves none to train",
            )

    def started(self, stage: str, name: str, node: Any) -> dict[str, Any]:
        """Where a node starts and its data node, made with one tokenizer.

        As parts of a node: parents, files, flags, and what its recipe has of them.
        """
        key = (stage, name)
        if node.parent is not None:
            raise self.error((*key, "parent"), "unknown key", "did you mean `from`?")
        id = self.ref((*key, "data"), node.data, (DATA_OF[stage],))
        if isinstance(node.from_, Released):
            parts = self.from_released(key, node.from_, self.tokenizer_of(id))
            return parts | {"parents": [id]}
        parent = self.parent[f"{stage}/{name}"]
        ours, theirs = self.tokenizer_of(id), self.tokenizer_of(parent)
        if ours != theirs:
            raise self.error(
                (*key, "data"),
                f"{id} is made with {ours}, {parent} with {theirs}",
                "use one tokenizer along a chain",
            )
        return {"parents": [parent, id], "flags": [("--parent", self.content(parent))]}

    def post_training(self, stage: str, name: str, node: Any) -> dict[str, Any]:
        """The same of a node that trains."""
        parts = self.started(stage, name, node)
        self.check_warmup((stage, name), node)
        return parts

    def from_released(
        self, key: tuple[str, ...], model: Released, tokenizer: str
    ) -> dict[str, Any]:
        """Parts of a node that starts from a model that was not trained here."""
        at = (*key, "from", "hf")
        here = Path(model.hf).exists() or Path(f"{model.hf}.dvc").exists()
        parts: dict[str, Any]
        if HUB_NAME.match(model.hf) and not here:
            parts = self.from_hub(key, model)
            wanted = f"{{hf: {model.hf}, revision: {model.revision}}}"
        else:
            folder = Path(self.existing(at, model.hf))
            if model.revision is not None:
                raise self.error(
                    (*key, "from", "revision"),
                    f"{model.hf} is a folder here: its files count",
                    "remove it",
                )
            if (folder / hub.ADAPTER).exists():
                raise self.error(at, f"{folder} is an adapter", hub.ADVICE)
            for needs in ("config.json", "*.safetensors") if folder.exists() else ():
                if not any(folder.glob(needs)):
                    raise self.error(at, f"{folder} holds no {needs}")
            parts = {"files": [str(folder)], "flags": [("--parent", str(folder))]}
            wanted = f"{{path: {folder}}}"
        ready = self.sections["tokenizer"][tokenizer.split("/")[1]]
        same_folder = ready.path and Path(ready.path) == Path(model.hf)
        of_hub = (model.hf, model.revision)
        if not same_folder and (ready.hf, ready.revision) != of_hub:
            raise self.error(
                (*key, "data"),
                f"made with {tokenizer}, which is not the one of {model.hf}",
                f"make it with a tokenizer node {wanted}",
            )
        return parts

    def from_hub(self, key: tuple[str, ...], model: Released) -> dict[str, Any]:
        """Parts of a node that starts from a model on the hub."""
        if self.engine_of(key[0]) == "nvidia" and key[0] != "sft":
            raise self.error(
                (*key, "from", "hf"),
                f"{key[0]} takes no model from the hub on engine nvidia, and there is no "
                "such folder here",
                "give a local folder",
            )
        if model.revision is None:
            raise self.error(
                (*key, "from", "revision"),
                "missing: a model on the hub can change under its name",
                "pin the commit, 40 hex digits; or give a folder that is here",
            )
        return {
            "flags": [("--parent", f"{HUB}{model.hf}@{model.revision}")],
            "recipe": {"parent": {"hf": model.hf, "revision": model.revision}},
        }

    def of_sft(self, name: str, node: Any) -> dict[str, Any]:
        key = ("sft", name)
        parts = self.post_training("sft", name, node)
        packed = parts["parents"][-1]
        length = self.sections["pack"][packed.split("/")[1]].sequence_length
        self.fits((*key, "data"), length, f"{packed} has rows", f"sft/{name}")
        parts["flags"].append(("--packed", self.content(packed)))
        return parts

    def of_grpo(self, name: str, node: Any) -> dict[str, Any]:
        key = ("grpo", name)
        parts = self.post_training("grpo", name, node)
        prompts = parts["parents"][-1]
        if node.dynamic_sampling is not None and node.algorithm != "dapo":
            what = f"belongs to algorithm: dapo, and this is {node.algorithm}"
            raise self.error((*key, "dynamic_sampling"), what, "remove it")
        if node.batch_size % node.num_generations:
            raise self.error(
                (*key, "batch_size"),
                f"{node.batch_size} completions a step do not divide into groups of "
                f"num_generations = {node.num_generations}",
                f"try {node.batch_size // node.num_generations * node.num_generations}"
                f" or {-(-node.batch_size // node.num_generations) * node.num_generations}",
            )
        self.fits_after(("grpo", name), prompts, node)
        parts["flags"].append(("--prompts", self.content(prompts)))
        turns = node.max_turns or 1
        if turns > 1 and node.max_conversation_tokens is None:
            raise self.error(
                ("grpo", name, "max_conversation_tokens"),
                f"missing, with max_turns {turns}",
                "the longest conversation, in tokens",
            )
        if longest := node.max_conversation_tokens:
            limited = ("grpo", name, "max_conversation_tokens")
            self.fits(limited, longest, "conversations", f"grpo/{name}")
        return self.with_environments("grpo", name, node, parts)

    def of_rollouts(self, name: str, node: Any) -> dict[str, Any]:
        key = ("rollouts", name)
        if found := node.mistake():
            at, what, hint = found
            raise self.error((*key, *at.split(".")), what, hint)
        parts = self.started("rollouts", name, node)
        prompts = parts["parents"][-1]
        self.fits_after(("rollouts", name), prompts, node)
        for kind, settings in node.environment.items():
            if kind in OF_TURNS and settings.import_ is None:
                raise self.error(
                    (*key, "environment", kind),
                    "replies to the model, and rollouts are of one turn",
                    "train on it by grpo, with max_turns",
                )
        parts["flags"].append(("--prompts", self.content(prompts)))
        return self.with_environments("rollouts", name, node, parts)

    def fits_after(self, key: tuple[str, str], prompts: str, node: Any) -> None:
        """The longest prompt with the longest completion is within the model's reach."""
        longest = self.sections["prompts"][prompts.split("/")[1]].max_prompt_tokens
        total = longest + node.max_completion_tokens
        at = (*key, "max_completion_tokens")
        self.fits(at, total, "prompt and completion", "/".join(key))

    def with_environments(
        self, stage: str, name: str, node: Any, parts: dict[str, Any]
    ) -> dict[str, Any]:
        """A node's parts with what its environments are made of."""
        recipe = {}
        for kind, settings in node.environment.items():
            key = (stage, name, "environment", kind)
            own = settings.import_
            if own is None and kind not in BUILT_IN:
                hint = nearest(kind, [*BUILT_IN])
                if kind == "nemo_gym":
                    hint = "NeMo-RL 0.7.0 runs it by another entry point, with servers"
                raise self.error(key, "no such environment", hint)
            if (settings.from_ is None) == (kind == "reward_model" and not own):
                what = "missing" if settings.from_ is None else "unknown key"
                hint = "name an rm node: `reward_model: {from: helpful}`"
                raise self.error((*key, "from"), what, hint)
            files = parts.setdefault("files", [])
            if own is None:
                module = BUILT_IN[kind].partition(":")[0]
                parts.setdefault("modules", []).append(module)
            else:
                files.append(self.existing((*key, "import"), str(own_file(own)[0])))
            tools = (settings.settings or {}).get("tools")
            for tool in tools.values() if isinstance(tools, dict) else ():
                path = tool.get("import") if isinstance(tool, dict) else None
                if isinstance(path, str) and ":" in path:
                    at = (*key, "settings", "tools")
                    files.append(self.existing(at, str(own_file(path)[0])))
            recipe[kind] = settings.model_dump(
                by_alias=True, exclude_none=True, exclude={"from_"}
            )
        for rm in self.rewards[f"{stage}/{name}"]:
            parts["parents"].append(rm)
            parts["flags"].append(("--reward-model", self.content(rm)))
        parts["recipe"] = parts.get("recipe", {}) | {"environment": recipe}
        return parts

    def of_dpo(self, name: str, node: Any) -> dict[str, Any]:
        return self.of_pairs("dpo", name, node)

    def of_rm(self, name: str, node: Any) -> dict[str, Any]:
        return self.of_pairs("rm", name, node)

    def of_pairs(self, stage: str, name: str, node: Any) -> dict[str, Any]:
        """A node that learns from pairs of answers."""
        parts = self.post_training(stage, name, node)
        pairs = parts["parents"][-1]
        longest = self.sections["preferences"][pairs.split("/")[1]].max_tokens
        self.fits(
            (stage, name, "data"), longest, f"{pairs} has pairs", f"{stage}/{name}"
        )
        parts["flags"].append(("--preferences", self.content(pairs)))
        return parts

    def of_best(self, name: str, node: Any) -> dict[str, Any]:
        key = ("best", name)
        scored = self.scored[f"best/{name}"]
        for what, of in (
            ("tokenizer", self.tokenizer_of),
            ("model definition", self.definition_of),
        ):
            found = {of(one): one for one in scored}
            if len(found) > 1:
                said = ", ".join(f"{value} of {id}" for value, id in found.items())
                raise self.error((*key, "from"), f"more than one {what}: {said}")
        flags, artifacts, parents = [], [], []
        for id, (by, _) in scored.items():
            metrics = f"artifacts/{id}/metrics.jsonl"
            score = self.content(by) if by else metrics
            flags += [("--candidate", f"{id}={self.content(id)}")]
            flags += [("--score", f"{id}={score}")]
            artifacts += [self.content(id), score]
            parents += [id, by] if by else [id]
        exports = {id: n for id, (_, n) in scored.items() if n not in ("", id)}
        return {
            "parents": parents,
            "flags": flags,
            "artifacts": list(dict.fromkeys(artifacts)),
            "recipe": {"by": self.measure(name, node)[0], "candidates": [*scored]}
            | ({"scored": exports} if exports else {}),
        }

    def of_export(self, name: str, node: Any) -> dict[str, Any]:
        parent = self.parent[f"export/{name}"]
        return {"parents": [parent], "flags": [("--parent", self.content(parent))]}

    def of_eval(self, name: str, node: Any) -> dict[str, Any]:
        key = ("eval", name)
        parents = [self.ref((*key, "from"), n, MODELS) for n in node.from_]
        flags = [("--model", f"{id}={self.content(id)}") for id in parents]
        files = []
        for task, settings in node.tasks.items():
            at = (*key, "tasks", task)
            file = self.existing((*at, "file"), settings.file)
            files.append(file)
            flags.append(("--task", f"{task}={file}"))
            found = self.data((*at, "data"), [settings.data], ("heldout", "prompts"))
            parents += found["parents"]
            files += found["files"]
            own = self.config.data.get(settings.data)
            if own and not (
                len(found["files"]) == 1
                and found["files"][0].endswith(".jsonl")
                and not own.model_fields_set - {"files", *TOLD}
            ):
                raise self.error(
                    (*at, "data"), f"{settings.data} is not one plain .jsonl file"
                )
            flags += [
                ("--data", f"{task}={value.partition('=')[2]}")
                for _, value in found["flags"]
            ]
        return {"parents": parents, "files": files, "flags": flags}

    def of_report(self, name: str, node: Any) -> dict[str, Any]:
        key = ("report", name)
        if node.from_ is None:
            evals = [f"eval/{n}" for n in self.sections["eval"]]
        else:
            evals = [self.ref((*key, "from"), n, ("eval",)) for n in node.from_]
        shown: dict[str, None] = {}
        for id in evals:
            stage, eval_name = id.split("/")
            for model in self.sections[stage][eval_name].from_:
                todo = [self.ref(key, model, MODELS)]
                while todo:
                    above = todo.pop()
                    if above in shown:
                        continue
                    shown |= dict.fromkeys([above, *self.rewards.get(above, [])])
                    starts = [self.parent[above]] if above in self.parent else []
                    todo += reversed([*self.scored.get(above, starts)])
        trained = [i for i in shown if STAGES[i.split("/")[0]].trains]
        return {
            "parents": [*trained, *evals],
            "artifacts": [
                *(f"artifacts/{id}/metrics.jsonl" for id in trained),
                *(self.content(id) for id in evals),
            ],
        }

    def of_release(self, name: str, node: Any) -> dict[str, Any]:
        key = ("release", name)
        for own in ("sources", "base"):
            if own in node.model_fields_set:
                raise self.error((*key, own), "unknown key")
        if node.license_link and not node.license:
            raise self.error((*key, "license"), "missing, with license_link")
        if node.license and not (node.license_link or HUB_LICENSE.match(node.license)):
            raise self.error(
                (*key, "license"),
                f"{node.license!r} is no name of the hub's, such as apache-2.0",
                "license_link says where another one is",
            )
        export = self.ref((*key, "from"), node.from_, ("export",))
        evals = [
            made.id
            for made in self.made.values()
            if made.stage == "eval" and export in made.parents
        ]
        note = f"{self.made[export].folder}/provenance.json"
        return {
            "parents": [export, *evals],
            "artifacts": [self.content(export), note, *map(self.content, evals)],
            "flags": [
                ("--model", self.content(export)),
                ("--provenance", note),
                *(("--scores", f"{id}={self.content(id)}") for id in evals),
            ],
            "recipe": self.told_of(export),
        }

    def told_of(self, id: str) -> dict[str, Any]:
        """What the config tells of the data and the base that a model was made of."""
        above, todo = {id}, [id]
        while todo:
            new = set(self.made[todo.pop()].parents) - above
            above |= new
            todo += new
        named = {n for one in above for n in self.made[one].recipe.get("sources", ())}
        told: dict[str, Any] = {}
        sources = {
            name: own.model_dump(include={*TOLD}, exclude_none=True)
            for name, own in self.config.data.items()
            if name in named
        }
        if sources := {name: found for name, found in sources.items() if found}:
            told["sources"] = sources
        while id in self.parent:
            id = self.parent[id]
        if id in self.released:
            told["base"] = self.released[id].model_dump(exclude_none=True)
        return told
