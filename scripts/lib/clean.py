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
never freed, nor what the other configs in config/ name.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from scripts.lib import cli, graph, plan
from scripts.lib.digest import on_all_cores
from scripts.lib.errors import UserError
from scripts.lib.graph import Node
from scripts.lib.load import nearest, read_config
from scripts.lib.run import MADE_BY, git, links_to
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
from scripts.lib.sweep import expand

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

KINDS = ("work", "artifacts", "cache", "remote")
REFS = ("commits", "heads", "none")
WORK, ARTIFACTS = Path("work"), Path("artifacts")
KERNELS = WORK / "kernels"
KEYED = re.compile(r"(?P<name>[a-z][a-z0-9_]*)-(?P<key>[0-9a-f]{12})")
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

    def __init__(self, store: Store, refs: str | None) -> None:
        self.store, self.refs = store, refs
        self.graph, self.cache = store.graph, store.cache
        nodes = self.graph.nodes
        self.pins = {node.id for node in nodes.values() if node.keep}
        self.of_others: set[Id] = set()
        self.on_gpus = any(node.engine == "nvidia" for node in nodes.values())
        for sections in other_configs(store):
            self.on_gpus |= "nvidia" in str(sections.get("engine"))
            for stage in STAGES:
                named = sections.get(stage)
                for name, node in (named if isinstance(named, dict) else {}).items():
                    if (id := f"{stage}/{name}") not in nodes:
                        self.of_others.add(id)
                        if isinstance(node, dict) and node.get("keep"):
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
        recipe = folder / "recipe.yaml"
        made_by = {"code": node.code, "packages": node.packages}
        return (
            recipe.exists()
            and recipe.read_text() == dump_yaml(node.recipe)
            and read_json(folder / MADE_BY) == made_by
        )

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
        left = set(odb.all())
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
        others = {
            md5
            for entry in entries
            for path, md5 in entry.outs.items()
            if id_of(path) in self.of_others
        }
        yield "dvc.lock has them, of another config", others
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
            yield f"{said} has them", recorded(repo, commits(refs))

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


def left_over(path: Path) -> bool:
    """Whether it was to be removed when this was killed."""
    return path.name.startswith(".") and path.name.endswith(TRASH)


def id_of(path: str) -> Id:
    """The node that publishes, or published, this path; empty where none does."""
    parts = path.split("/")
    return "/".join(parts[1:3]) if parts[0] == str(ARTIFACTS) else ""


def other_configs(store: Store) -> Iterator[dict[str, Any]]:
    """The configs in config/ that the graph was not made from, not checked.

    Raises ConfigError where one cannot be read: its nodes would not be known.
    """
    own = {PARAMS, *map(Path, store.graph.config_files)}
    for file in sorted({*Path("config").rglob("*.yaml")} - own):
        if file.parts[1] not in ("models", "tasks"):
            merged, lines, _ = read_config(file)
            expand(merged, lines)
            yield merged


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
            raise UserError(".git", what, "git fetch --unshallow, or choose --refs")
        paths = ("dvc.lock", "dvc.yaml", "*.dvc")
        found = git("rev-list", "--all", "--full-history", "--", *paths)
    else:
        found = git("rev-list", "--all", "--no-walk")
    if found is None:
        raise UserError("git", "does not say which commits there are", "git status")
    return found.split()


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


def at_commit(revision: str) -> Iterator[Record]:
    """What dvc.lock recorded at a commit."""
    text = git("show", f"{revision}:./dvc.lock")
    yield from records(parsed(text or "").get("stages", {}))


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
    """Have DVC remove these, and nothing else, from its cache or a remote."""
    from dvc_data.hashfile.db import get_index
    from dvc_data.hashfile.gc import gc
    from dvc_data.hashfile.hash_info import HashInfo

    gc(odb, [HashInfo("md5", one) for one in set(odb.all()) - objects])
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
    with dvc_errors():
        store.sync()
        if args.yes:
            store.hold()
        with opened() as repo:
            return clean(Cleaner(store, args.refs), repo, args)


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
        items = [item for item in items if item.node == args.node]
        if not items and args.node not in cleaner.graph.nodes:
            hint = nearest(args.node, [*cleaner.graph.nodes])
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
