"""Show what could be freed: what, how large, and who still needs the rest.

    python -m scripts.lib.clean
    python -m scripts.lib.clean --yes
    python -m scripts.lib.clean --kind cache --refs none --node grpo/reasoner

Only --yes frees it. By kind:

work       saves with optimizer state of nodes that are published, and whole folders of
           inputs that no node has now; logs of what is published stay. A stopped run
           that would be resumed stays, and so does what runs.
artifacts  artifacts of nodes that no config in config/ has any more.
cache      in DVC's cache, versions that nothing needs: not dvc.lock, no node that the
           plan would restore, no head of a branch (here or fetched) or tag, no node
           that says `keep: true`. Going back to a setting whose version was freed
           builds it again.
remote     the same in DVC's remote, where every commit counts, not only heads. What
           other people pushed and you have not fetched is not seen: `git fetch --all`
           first.

A remote that several projects share, and a cache outside this folder, hold others'
files too, which nothing here needs: they would be freed. So both are looked at only
where --kind names them.

`keep: true` of a node keeps all its versions, with those of its ancestors that they
were made from, and its work folders. What dvc.lock records of this config's nodes is
never freed, nor what the other configs in config/ name, or the one that was planned
last; a work folder that may be of such a one stays. Other work trees of this repository
count, other folders that use this cache do not.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from scripts.lib import cli, graph, plan
from scripts.lib.digest import on_all_cores
from scripts.lib.errors import UserError
from scripts.lib.graph import Node
from scripts.lib.lineage import owner
from scripts.lib.load import nearest, read_config
from scripts.lib.run import MADE_BY, git, links_to, read_plan_command
from scripts.lib.stages import STAGES
from scripts.lib.status import read_json
from scripts.lib.store import (
    HARMED,
    PARAMS,
    REMOTE,
    STATE,
    Record,
    Store,
    dump_yaml,
    dvc_errors,
    is_held,
    key_of,
    read_lock,
    try_lock,
)
from scripts.lib.sweep import as_mapping, expand

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

KINDS = ("work", "artifacts", "cache", "remote")
REFS = ("commits", "heads", "none")
WORK, ARTIFACTS = Path("work"), Path("artifacts")
KERNELS = WORK / "kernels"
KEYED = re.compile(r"(?P<name>[a-z][a-z0-9_]*)-(?P<key>[0-9a-f]{12})")
DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")
LOGS = ("log.txt", "logs", "tensorboard", "wandb", "mlflow_run.json")
"""What stays of the work folder of a node that is published: what it logged."""
TRASH = ".trash"

Id = str
Kind = Literal["work", "artifacts", "cache", "remote"]


@dataclass
class Item:
    """A row: something of a size, to be freed or, where `kept`, not, and why."""

    kind: Kind
    node: Id
    what: str
    why: str
    paths: tuple[Path, ...] = ()
    objects: frozenset[str] = frozenset()
    size: int = 0
    kept: bool = False


# ---- how large ------------------------------------------------------------------


def files_below(path: Path) -> Iterator[Path]:
    """A file, or all of a folder, links themselves and not what they lead to."""
    if path.is_dir() and not path.is_symlink():
        for root, folders, names in os.walk(path):
            below = [Path(root, name) for name in [*names, *folders]]
            yield from (one for one in below if one.is_symlink() or not one.is_dir())
    elif path.exists() or path.is_symlink():
        yield path


def measure(items: Iterable[Item]) -> None:
    """Fill in the bytes that come free: of a file, once all its names are removed."""
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], tuple[Item, int, int]] = {}
    for item in items:
        for file in (f for path in item.paths for f in files_below(path)):
            info = file.lstat()
            inode = info.st_dev, info.st_ino
            names[inode] += 1
            found.setdefault(inode, (item, info.st_blocks * 512, info.st_nlink))
    for inode, (item, size, links) in found.items():
        if item.kept or names[inode] == links:
            item.size += size


# ---- what is in work/ and artifacts/ ---------------------------------------------


class Cleaner:
    """What of a project could be freed, by its config and by what is recorded."""

    def __init__(self, store: Store, refs: str | None, planned: Path | None) -> None:
        """`planned` is the config that dvc.yaml was made from before this one."""
        self.store, self.refs = store, refs
        self.graph, self.cache = store.graph, store.cache
        nodes = self.graph.nodes
        self.pins = {node.id for node in nodes.values() if node.keep}
        self.of_others: dict[Id, list[Node | dict[str, Any]]] = {}
        """Nodes of other configs; of those that cannot be built, what they say of them."""
        self.on_gpus = any(node.engine == "nvidia" for node in nodes.values())
        for file in other_configs(store, planned):
            merged, lines, _ = read_config(file)
            expand(merged, lines)
            self.on_gpus |= "nvidia" in str(merged.get("engine"))
            for id, said in (built(file) or said_in(merged)).items():
                self.of_others.setdefault(id, []).append(said)
                stage, name = id.split("/")
                node = as_mapping(merged.get(stage)).get(name)
                if as_mapping(node).get("keep"):
                    self.pins.add(id)

    def work(self) -> Iterator[Item]:
        """Each folder in work/."""
        for folder in sorted(WORK.glob("*/*")):
            stage, keyed = folder.parent.name, KEYED.fullmatch(folder.name)
            if folder.parent == KERNELS:
                continue
            if left_over(folder):
                yield Item("work", "", str(folder), "left by a killed clean", (folder,))
            elif stage in STAGES and keyed and folder.is_dir():
                yield self.of_work(f"{stage}/{keyed['name']}", keyed["key"], folder)
        if KERNELS.is_dir():
            why = "a config has nodes of it" if self.on_gpus else "no config has it"
            what = f"{KERNELS}: compiled, of engine nvidia"
            yield Item("work", "", what, why, (KERNELS,), kept=self.on_gpus)

    def of_work(self, id: Id, key: str, folder: Path) -> Item:
        """What is to become of a node's work folder."""
        keep = partial(Item, "work", id, str(folder), paths=(folder,), kept=True)
        node = self.graph.nodes.get(id)
        if runs(id):
            return keep("runs now")
        if id in self.pins:
            return keep("keep: true")
        if node is None and id in self.of_others:
            return keep("another config has the node")
        if node is None:
            return Item("work", id, str(folder), "no such node now", (folder,))
        why = self.store.why[id]
        if self.may_be_of_another(id, key, folder):
            return keep("another config has a node like this")
        if not why:
            record = self.store.records[id]
            if key != key_of(record.params, record.deps):
                what = "of other inputs than now"
                return Item("work", id, str(folder), what, (folder,))
            if not self.is_here(node):
                return keep(f"published, but not here: dvc pull {node.dvc}")
            rest = [path for path in sorted(folder.iterdir()) if path.name not in LOGS]
            if not rest:
                return keep("the log of what is published")
            what = f"{folder} but the log"
            return Item(
                "work", id, what, "published: nothing goes on from it", tuple(rest)
            )
        if STAGES[node.stage].by_file:
            return keep("the node may take over its tokens")
        if self.is_wanted(node, key, folder):
            return keep("not published: a run goes on from it")
        return Item("work", id, str(folder), "of other inputs than now", (folder,))

    def may_be_of_another(self, id: Id, key: str, folder: Path) -> bool:
        """Whether a node of this name in another config may go on in this folder."""
        record = self.store.records.get(id)
        if record and key == key_of(record.params, record.deps):
            return False  # it is of what is published
        return any(
            made_of(node, folder) if isinstance(node, Node) else said_of(node, folder)
            for node in self.of_others.get(id, ())
        )

    def is_here(self, node: Node) -> bool:
        """Whether a current node's artifact is in the project or in DVC's cache."""
        outs = self.store.records[node.id].outs
        return all(Path(o).exists() or self.cache.holds(m) for o, m in outs.items())

    def is_wanted(self, node: Node, key: str, folder: Path) -> bool:
        """Whether a node that is not current would work in this folder.

        Before its parents are built that depends on them, and only what else it is
        made of is compared.
        """
        inputs: dict[str, str] = {}
        for artifact in node.artifacts:
            parent = str(self.graph.owner(artifact))
            if all(r.endswith(HARMED) for r in self.store.why[parent]):
                inputs[artifact] = self.store.records[parent].outs[artifact]
        if len(inputs) == len(node.artifacts):
            inputs |= {file: self.store.digest(file) for file in node.files}
            return key == key_of(node.params, inputs)
        return made_of(node, folder)

    def artifacts(self) -> Iterator[Item]:
        """Artifacts of nodes that are no more."""
        for folder in sorted(ARTIFACTS.glob("*/*")):
            name = folder.name.removeprefix(".").removesuffix(TRASH)
            id = f"{folder.parent.name}/{name.removesuffix('.old')}"
            if left_over(folder):
                why = "left by a killed clean"
                yield Item("artifacts", "", str(folder), why, (folder,))
            elif id not in self.graph.nodes and id.split("/")[0] in STAGES:
                item = Item("artifacts", id, str(folder), "no such node now", (folder,))
                if runs(id) or id in self.of_others:
                    item.why = "runs now" if runs(id) else "another config has the node"
                    item.kept = True
                yield item

    # ---- what is in DVC's cache and remote ---------------------------------------

    def stored(self, repo: Repo, kind: Kind, odb: HashFileDB) -> Iterator[Item]:
        """What lies in DVC's cache or its remote, by who needs it."""
        remote = odb if kind == "remote" else None
        left = {one for one in odb.all() if DIGEST.fullmatch(one)}
        for why, md5s in self.needed(repo, kind):
            objects = left & self.objects(md5s, remote)
            if objects:
                left -= objects
                yield self.item(kind, "", counted(objects), why, objects, odb)
        by_node: dict[Id, set[str]] = {}
        for entry in self.versions:
            for path, md5 in entry.outs.items():
                by_node.setdefault(id_of(path), set()).update(
                    left & self.objects({md5}, remote)
                )
        for id, objects in sorted(by_node.items()):
            if objects := objects & left:
                left -= objects
                what = f"{counted(objects)} of {id or 'the plan'}"
                yield self.item(kind, id, what, "", objects, odb)
        if left:
            yield self.item(kind, "", counted(left), "", left, odb)

    def item(
        self,
        kind: Kind,
        node: Id,
        what: str,
        why: str,
        objects: Iterable[str],
        odb: HashFileDB,
    ) -> Item:
        """A row of objects; those without a reason to stay are to be freed."""
        made = Item(
            kind, node, what, why or "nothing needs them", objects=frozenset(objects)
        )
        made.kept = bool(why)
        places = [odb.oid_to_path(one) for one in sorted(objects)]
        if kind == "cache":
            made.paths = tuple(map(Path, places))
        else:
            made.size = sum(on_all_cores([partial(odb.fs.size, p) for p in places]))
        return made

    def needed(self, repo: Repo, kind: Kind) -> Iterator[tuple[str, set[str]]]:
        """Recorded digests that are needed, with who needs them."""
        refs = self.refs or ("commits" if kind == "remote" else "heads")
        entries = [*map(Record.of, read_lock().values())]
        seen = [self.store.memory(node).known for node in self.graph.nodes.values()]
        here = {md5 for known in seen for _, md5 in known.values()}
        yield "dvc.lock has them", recorded(repo, []) | here
        yield "dvc.lock has them, of another config", outs_of(entries, self.of_others)
        yield "another work tree's dvc.lock has them", outs_of(in_work_trees())
        self.versions = [*built_before(repo), *entries]
        nodes = self.graph.nodes.values()
        again = {node.id: node.params for node in nodes if self.store.why[node.id]}
        yield (
            "the plan would restore them",
            {
                md5
                for entry in self.versions
                for path, md5 in entry.outs.items()
                if entry.params == again.get(id_of(path))
            },
        )
        if self.pins:
            for rev in commits("commits"):
                self.versions += at_commit(rev)
            pins = ", ".join(sorted(self.pins))
            yield f"keep: true of {pins}", self.pinned()
        if refs != "none":
            said = "a commit" if refs == "commits" else "the head of a branch or tag"
            revisions = commits(refs)
            yield f"{said} has them", recorded(repo, revisions)
            locked = (entry for rev in revisions for entry in at_commit(rev))
            yield f"{said} has them in dvc.lock", outs_of(locked)

    def pinned(self) -> set[str]:
        """All versions of what says `keep: true`, and all that they were made from."""
        made: dict[tuple[str, str], Record] = {}
        for entry in self.versions:
            made |= dict.fromkeys(entry.outs.items(), entry)
        todo = [e for e in self.versions if {*map(id_of, e.outs)} & self.pins]
        found: set[str] = set()
        seen: set[int] = set()
        while todo:
            entry = todo.pop()
            if id(entry) in seen:
                continue
            seen.add(id(entry))
            found |= {*entry.outs.values(), *entry.deps.values()}
            todo += [made[dep] for dep in entry.deps.items() if dep in made]
        return found

    def objects(self, md5s: Iterable[str], remote: HashFileDB | None) -> set[str]:
        """These digests, and of folders those of the files in them."""
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree

        found = set(md5s)
        for md5 in [one for one in found if one.endswith(".dir")]:
            listed = self.cache.listing(md5)
            if listed is None and remote is not None and remote.exists(md5):
                tree = Tree.load(remote, HashInfo("md5", md5))
                listed = {"/".join(k): str(one.value) for k, _, one in tree}
            found |= set((listed or {}).values())
        return found


def made_of(node: Node, folder: Path) -> bool:
    """Whether a work folder is of the node's settings and code, whatever its inputs."""
    recipe = folder / "recipe.yaml"
    made_by = {"code": node.code, "packages": node.packages}
    return (
        recipe.exists()
        and recipe.read_text() == dump_yaml(node.recipe)
        and read_json(folder / MADE_BY) == made_by
    )


def said_of(node: dict[str, Any], folder: Path) -> bool:
    """Whether a work folder may be of a node of which a config says this much."""
    recipe = folder / "recipe.yaml"
    made = parsed(recipe.read_text()) if recipe.exists() else {}
    code = (read_json(folder / MADE_BY) or {}).get("code", {})
    says = node["recipe"]
    return node["script"] in code and says.items() <= made.items()


def left_over(path: Path) -> bool:
    """Whether it was to be removed when this was killed."""
    return path.name.startswith(".") and path.name.endswith(TRASH)


def id_of(path: str) -> Id:
    """The node that publishes, or published, this path; empty where none does."""
    return owner(path) or ""


def other_configs(store: Store, planned: Path | None) -> list[Path]:
    """The configs in config/ but the graph's own, and the one that was planned last."""
    files = {*Path("config").rglob("*.yaml"), *Path("config").rglob("*.yml")}
    found = {file for file in files if file.parts[1] not in ("models", "tasks")}
    if planned and planned.exists():
        found.add(planned)
    return sorted(found - {PARAMS, Path(store.graph.config)})


def built(config: Path) -> dict[Id, Node | dict[str, Any]] | None:
    """The nodes of a config; None where it cannot be built, as without its data."""
    try:
        return {**graph.build(config).nodes}
    except UserError:
        return None


def said_in(merged: dict[str, Any]) -> dict[Id, Node | dict[str, Any]]:
    """What a config that cannot be built says of its nodes: numbers, and the script."""
    engines = merged.get("engine")
    found: dict[Id, Node | dict[str, Any]] = {}
    for stage, spec in STAGES.items():
        wanted = (
            engines.get(stage, engines.get("default"))
            if isinstance(engines, dict)
            else engines
        )
        engine = spec.engine_of("nvidia" if wanted == "nvidia" else "transformers")
        code = spec.file_of(engine)
        for name, node in as_mapping(merged.get(stage)).items():
            numbers = {
                key: value
                for key, value in as_mapping(node).items()
                if key in spec.recipe.model_fields and isinstance(value, int | float)
            }
            found[f"{stage}/{name}"] = {"recipe": numbers, "script": code}
    return found


def outs_of(entries: Iterable[Record], ids: Collection[Id] | None = None) -> set[str]:
    """The digests of what is recorded, all or of these nodes."""
    return {
        md5
        for entry in entries
        for path, md5 in entry.outs.items()
        if ids is None or id_of(path) in ids
    }


def in_work_trees() -> Iterator[Record]:
    """What dvc.lock records in the repository's other work trees."""
    prefix = git("rev-parse", "--show-prefix") or ""
    for line in (git("worktree", "list", "--porcelain") or "").splitlines():
        if line.startswith("worktree "):
            file = Path(line.removeprefix("worktree "), prefix, "dvc.lock")
            if file.is_file() and file.resolve() != Path("dvc.lock").resolve():
                text = file.read_text(encoding="utf-8")
                yield from records(parsed(text).get("stages", {}))


def locks_of(id: Id) -> list[Path]:
    """The locks that a node's job holds, and those that share its files."""
    stage, name = id.split("/")
    shared = (STATE / stage).glob(f"{name}-*of*.lock")
    return [STATE / f"{id}.lock", *shared]


def runs(id: Id) -> bool:
    """Whether some process builds the node, or a share of it, now."""
    return any(map(is_held, locks_of(id)))


def commits(refs: str) -> list[str]:
    """The commits at which something may be needed: all, or those of branches and tags."""
    if refs == "commits":
        if git("rev-parse", "--is-shallow-repository") == "true":
            what = "a shallow clone, which does not know every commit"
            raise UserError(".git", what, "git fetch --unshallow")
        paths = ("dvc.lock", "dvc.yaml", "*.dvc")
        found = git("rev-list", "--all", "--full-history", "--", *paths)
    else:
        found = git("rev-list", "--all", "--no-walk")
    if found is None:
        raise UserError("git", "does not say which commits there are", "git status")
    return found.split()


def check_fetched() -> None:
    """Raise UserError where git's own remotes have heads or tags that are not here."""
    for name in (git("remote") or "").split():
        listed = git("ls-remote", "--heads", "--tags", name)
        if listed is None:
            what = "does not say which branches it has: their versions may be in use"
            raise UserError(f"git remote {name}", what, f"git ls-remote {name}")
        for line in listed.splitlines():
            commit, _, ref = line.partition("\t")
            if git("cat-file", "-e", commit) is None:
                what = f"has {ref}, which is not here: its versions would be freed"
                raise UserError(
                    f"git remote {name}", what, f"git fetch {name} {ref}:{ref}"
                )


def recorded(repo: Repo, revisions: list[str]) -> set[str]:
    """What DVC has recorded in the working folder and at these commits."""
    found: set[str] = set()
    for _ in repo.brancher(revs=revisions):
        outs = [out for out in repo.index.outs if out.use_cache and out.hash_info]
        found |= {str(out.hash_info.value) for out in outs}
    return found


def built_before(repo: Repo) -> Iterator[Record]:
    """What DVC's run cache remembers: which inputs gave which outputs."""
    for path in sorted(Path(repo.stage_cache.cache_dir).glob("*/*/*")):
        yield from records({"": parsed(path.read_text())})


@cache
def at_commit(revision: str) -> list[Record]:
    """What dvc.lock recorded at a commit."""
    text = git("show", f"{revision}:./dvc.lock")
    return [*records(parsed(text or "").get("stages", {}))]


def parsed(text: str) -> dict[str, Any]:
    """A mapping in YAML; nothing where it is none: DVC could not read it either."""
    try:
        found = YAML(typ="safe").load(text)
    except YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def records(entries: dict[str, dict[str, Any]]) -> Iterator[Record]:
    """Recorded entries, each with its parameters whatever their name."""
    for entry in entries.values():
        named = entry.get("params", {}).get(str(PARAMS), {})
        yield Record.of(entry, next(iter(named), ""))


# ---- freeing --------------------------------------------------------------------


def remove(item: Item) -> bool:
    """Remove paths of the project; False where its node has begun meanwhile.

    By rename first: a folder that is named as before is whole, whenever this is killed.
    """
    with ExitStack() as stack:
        for lock in locks_of(item.node) if item.node else ():
            lock.parent.mkdir(parents=True, exist_ok=True)
            if not try_lock(stack.enter_context(open(lock, "a"))):
                return False
        for path in item.paths:
            away = path if left_over(path) else path.with_name(f".{path.name}{TRASH}")
            if away != path:
                discard(away)
                path.rename(away)
            discard(away)
        if item.kind == "artifacts" and item.node:
            Path(STATE, f"{item.node}.files.json").unlink(missing_ok=True)
    return True


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def collect_garbage(odb: HashFileDB, objects: set[str]) -> None:
    """Have DVC remove these from its cache or a remote, folders' lists first.

    Not by its gc, which removes all but what is named: what others push meanwhile, too.
    """
    from dvc_data.hashfile.db import get_index

    lists = {one for one in objects if one.endswith(".dir")}
    for some in (lists, objects - lists):
        if some:
            odb.fs.remove([odb.oid_to_path(one) for one in sorted(some)])
    get_index(odb).clear()


def table(items: list[Item]) -> list[str]:
    """Rows of what there is: kind, size, what, why; the largest first of a kind."""
    items = sorted(items, key=lambda i: (KINDS.index(i.kind), -i.size))
    kind, what = max(len(i.kind) for i in items), max(len(i.what) for i in items)
    return [
        f"{i.kind:{kind}}  {megabytes(i.size):>9}  {i.what:{what}}  {i.why}"
        for i in items
    ]


def megabytes(size: int) -> str:
    """A size as it is shown."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def counted(objects: Collection[str]) -> str:
    """How many files these are."""
    return f"{len(objects)} file" + "s" * (len(objects) != 1)


@contextmanager
def opened() -> Iterator[Repo]:
    """DVC's view of the project, which nobody else changes meanwhile."""
    from dvc.repo import Repo, lock_repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
        yield repo


def main(argv: list[str] | None = None) -> int:
    """Show, or free and show."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", type=Path, default=plan.chosen_config())
    flags.add_argument("--yes", action="store_true", help="free it")
    flags.add_argument("--kind", choices=KINDS, action="append", help="only this")
    flags.add_argument("--node", help="only of this node: STAGE/NODE")
    flags.add_argument(
        "--refs",
        choices=REFS,
        help="where versions are still needed: every commit, heads of branches and "
        "tags, or the working folder alone; default: heads; of the remote: commits",
    )
    args = flags.parse_args(argv)
    store = Store(graph.build(args.config))
    planned = planned_config()
    if args.yes and "remote" in (args.kind or ()):
        check_fetched()
    with dvc_errors():
        store.sync()
        if args.yes:
            store.hold()
        with opened() as repo:
            return clean(Cleaner(store, args.refs, planned), repo, args)


def planned_config() -> Path | None:
    """The config that dvc.yaml was made from, if it says so."""
    try:
        return Path(read_plan_command())
    except (OSError, UserError):
        return None


def clean(cleaner: Cleaner, repo: Repo, args: argparse.Namespace) -> int:
    """Show what could be freed, or free it."""
    cache = repo.cache.local
    folder = Path(cache.path).resolve()
    shared = not folder.is_relative_to(Path.cwd().resolve())
    kinds = args.kind or ["work", "artifacts", *([] if shared else ["cache"])]
    odbs: dict[Kind, HashFileDB] = {"cache": cache} if "cache" in kinds else {}
    if "remote" in kinds:
        odbs["remote"] = repo.cloud.get_remote_odb(command="clean")
    items = found(cleaner, repo, kinds, odbs)
    if args.node:
        known = {id: [id] for id in cleaner.graph.nodes} | cleaner.graph.sweeps
        wanted = {args.node, *known.get(args.node, ())}
        items = [item for item in items if item.node in wanted]
        if not items and args.node not in known:
            hint = nearest(args.node, [*known])
            raise UserError(args.node, "no such node, and nothing of it here", hint)
    free = [item for item in items if not item.kept]
    kept = [item for item in items if item.kept]
    measure(free)
    measure(kept)
    about = "about " if free and links_to(folder)[:1] == ["reflink"] else ""
    if args.yes:
        free = freed(free, odbs)
    elif kept:
        print("needed:", *table(kept), "", sep="\n")
    if free:
        print("freed:" if args.yes else "not needed:", *table(free), "", sep="\n")
    if not args.kind and repo.config["core"].get("remote"):
        print("the remote is not looked at: make clean KIND=remote")
    if not args.kind and shared:
        print(f"the cache is elsewhere, {folder}, not looked at: make clean KIND=cache")
    total = about + megabytes(sum(item.size for item in free))
    again = ": the same with YES=1" if free else ""
    print(f"freed {total}" if args.yes else f"{total} to free{again}")
    return 0


def found(
    cleaner: Cleaner, repo: Repo, kinds: list[str], odbs: dict[Kind, HashFileDB]
) -> list[Item]:
    """All that there is of these kinds."""
    items: list[Item] = []
    if "work" in kinds:
        items += cleaner.work()
    if "artifacts" in kinds:
        items += cleaner.artifacts()
    for kind, odb in odbs.items():
        items += cleaner.stored(repo, kind, odb)
    return items


def freed(items: list[Item], odbs: dict[Kind, HashFileDB]) -> list[Item]:
    """Free them; returns those that are."""
    done = [item for item in items if item.objects or remove(item)]
    for kind, odb in odbs.items():
        if objects := [item.objects for item in done if item.kind == kind]:
            collect_garbage(odb, set().union(*objects))
    REMOTE.unlink(missing_ok=True)  # what was seen to be in the remote
    return done


if __name__ == "__main__":
    cli.run(main)
