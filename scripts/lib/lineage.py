"""Where a node comes from: every ancestor, its digests, versions, commit and cost.

    python -m scripts.lib.lineage show export/nano --svg lineage.svg
    python -m scripts.lib.lineage verify export/nano
    python -m scripts.lib.lineage diff main:grpo/a grpo/b

What it says comes from dvc.lock and from each artifact's provenance.json, taken from
DVC's cache where the artifact is not here. The provenance.json of an export carries
the lineage itself: `show` and `verify` work on such a folder copied anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import signal
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from scripts.lib import cli, plan
from scripts.lib.digest import Cache, tree_digest
from scripts.lib.errors import UserError
from scripts.lib.load import nearest
from scripts.lib.settings import flat, shown
from scripts.lib.stages import STAGES
from scripts.lib.store import LOCK, Record, read_lock

Entries = dict[str, dict[str, Any]]
"""What dvc.lock holds, by DVC's name of the stage."""
Row = dict[str, Any]
"""A node's record, as JSON holds it."""

NOTE = "provenance.json"
METRICS = "metrics.jsonl"
COUNTS = {
    "tokenize": "blend.json",
    "pack": "packing.json",
    "prompts": "prompts.json",
    "preferences": "preferences.json",
    "rollouts": "rollouts.json",
}
"""Where a stage that prepares data counts its rows, in its content."""
NAMED = ("node", "recipe", "inputs", "code", "packages")
"""What a provenance.json tells that dvc.lock tells too."""
CARRIED = ("lineage", "md5sums", "sha256")
"""What that of an export tells of its ancestors, its files and itself."""
GPU = "gpu_hours"
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
WIDTH = 100


# ---- what is recorded ----------------------------------------------------------


def inside(path: str) -> str:
    """`path`, which must not lead out of the folder it is relative to."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\0" in path:
        raise UserError(repr(path), "leads out of its folder: not followed")
    return path


def recorded(entries: Entries, id: str) -> Record:
    """What dvc.lock has of a node; paths and digests are of their form."""
    stage, _, name = id.partition("/")
    record = Record.of(entries.get(f"{stage}-{name}", {}), f"{stage}.{name}")
    for path, md5 in (record.outs | record.deps).items():
        inside(str(path))
        if not MD5.fullmatch(str(md5)):
            raise UserError(f"{LOCK} {path}", f"{md5!r} is no digest of DVC's")
    for key in ("recipe", "code", "packages"):
        if not isinstance(record.params.get(key, {}), dict):
            raise UserError(f"{LOCK} {id}", f"{key} is no mapping")
    for file in record.params.get("code", {}):
        inside(str(file))
    return record


def owner(path: str) -> str | None:
    """The node whose artifact `path` is part of, by the path alone."""
    parts = path.split("/")
    return "/".join(parts[1:3]) if parts[0] == "artifacts" and len(parts) > 2 else None


def parents(inputs: Collection[str]) -> list[str]:
    """The nodes that these inputs are artifacts of."""
    return list(dict.fromkeys(id for id in map(owner, inputs) if id))


def ancestors(entries: Entries, inputs: Collection[str]) -> list[str]:
    """Every node above something made of `inputs`, parents before children."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    todo = [(id, False) for id in reversed(parents(inputs))]
    while todo:
        id, is_done = todo.pop()
        if is_done:
            found[id] = None
        elif id not in seen:
            seen.add(id)
            todo.append((id, True))
            above = parents(recorded(entries, id).deps)
            todo += [(parent, False) for parent in reversed(above)]
    return list(found)


def chain(entries: Entries, id: str, where: str = str(LOCK)) -> list[str]:
    """A node below all its ancestors. Raises UserError where it is not recorded."""
    stage, _, name = id.partition("/")
    if not name or f"{stage}-{name}" not in entries:
        known = [key.replace("-", "/", 1) for key in entries if "-" in key]
        raise UserError(f"{where} {id}", "no such node", nearest(id, known))
    return [*ancestors(entries, recorded(entries, id).deps), id]


class Shelf:
    """Recorded files by their digest, from the project's folder or DVC's cache."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache or Cache()

    def listing(self, md5: str) -> dict[str, str] | None:
        """{relative path: md5} of a recorded folder; None where that is not cached."""
        text = self._whole(self.cache.object(md5), md5.removesuffix(".dir"))
        if text is None:
            return None
        try:
            found = {str(e["relpath"]): str(e["md5"]) for e in json.loads(text)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(str(self.cache.object(md5)), "not DVC's") from error
        for name, one in found.items():
            inside(name)
            if not MD5.fullmatch(one):
                raise UserError(f"{self.cache.object(md5)} {name}", "not DVC's")
        return found

    def read(self, outs: dict[str, str], path: str) -> bytes | None:
        """The bytes recorded under `path`, an out or in one; None if not at hand."""
        for out, md5 in outs.items():
            if path != out and not path.startswith(f"{out}/"):
                continue
            if path != out:
                md5 = (self.listing(md5) or {}).get(path[len(out) + 1 :], "")
            if not md5:
                return None
            for place in (Path(path), self.cache.object(md5)):
                if (found := self._whole(place, md5)) is not None:
                    return found
        return None

    def data(self, outs: dict[str, str], path: str) -> dict[str, Any] | None:
        """The JSON object recorded under `path`."""
        text = self.read(outs, path)
        return None if text is None else parsed(text, path)

    def last(self, outs: dict[str, str], path: str) -> dict[str, Any]:
        """The last line of recorded JSON lines; nothing where it is not at hand."""
        lines = (self.read(outs, path) or b"").splitlines()
        return parsed(lines[-1], path) if lines else {}

    @staticmethod
    def _whole(path: Path, md5: str) -> bytes | None:
        try:
            found = path.read_bytes()
        except OSError:
            return None
        return found if hashlib.md5(found).hexdigest() == md5 else None


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises UserError where the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(where, "not a JSON object")
    return found


def row(entries: Entries, id: str, shelf: Shelf) -> Row:
    """All that is known of one node."""
    record, folder = recorded(entries, id), f"artifacts/{id}"
    made = shelf.data(record.outs, f"{folder}/{NOTE}")
    metrics = shelf.last(record.outs, f"{folder}/{METRICS}")
    recipe = record.params.get("recipe", {})
    found = {
        "node": id,
        "outs": record.outs,
        "inputs": record.deps,
        "recipe": recipe,
        "code": record.params.get("code", {}),
        "packages": record.params.get("packages", {}),
        "seed": recipe.get("seed"),
        "tokens": metrics.get("tokens"),
        "counts": counts(id, record.outs, shelf),
        "made": made and beyond(made),
    }
    try:
        check_form(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/{NOTE}", f"not of its form: {error}") from error
    return found


def beyond(made: dict[str, Any]) -> dict[str, Any]:
    """What a provenance.json tells that dvc.lock does not."""
    return {k: v for k, v in made.items() if k not in (*NAMED, *CARRIED)}


def counts(id: str, outs: dict[str, str], shelf: Shelf) -> dict[str, int]:
    """Rows, documents and tokens that a stage counted in its data."""
    name = COUNTS.get(id.split("/")[0])
    found = shelf.data(outs, f"artifacts/{id}/data/{name}") if name else None
    listed = (found or {}).get("sources", [found or {}])
    sums: dict[str, int] = {}
    for one in listed if isinstance(listed, list) else []:
        for key, value in one.items() if isinstance(one, dict) else ():
            if type(value) is int:
                sums[key] = sums.get(key, 0) + value
    return sums


def out_of_reach(entries: Entries, ids: list[str], shelf: Shelf) -> list[str]:
    """Of these nodes, the small files that a lineage is made of and that lack here."""
    wanted = []
    for id in ids:
        outs = recorded(entries, id).outs
        paths = [f"artifacts/{id}/{name}" for name in (NOTE, METRICS)]
        paths = [path for path in paths if path in outs]
        if name := COUNTS.get(id.split("/")[0]):
            paths.append(f"artifacts/{id}/data/{name}")
        wanted += [path for path in paths if shelf.read(outs, path) is None]
    return wanted


# ---- what an export carries ------------------------------------------------------


def carried(
    made: dict[str, Any], content: dict[str, str], above: list[Row]
) -> dict[str, Any]:
    """A provenance with its ancestors' records, its files' md5 and its own digest.

    Not in the model's folder: there, a commit or a time would make other bytes of the
    same inputs, and all that reads the model would run again.
    """
    sums = [f"{content[name]}  {name}" for name in sorted(content)]
    return sealed({**made, "lineage": above, "md5sums": sums})


def sealed(made: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of its own text, so that a change of any byte of it shows."""
    text = json.dumps(made, indent=1)
    return {**made, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def find_folder(given: str) -> Path | None:
    """The artifact's folder that `given` is, or is the model of; None for a node."""
    path = Path(given)
    for folder in (path / "model", path, path.absolute().parent):
        if path.is_dir() and (folder / NOTE).is_file():
            return folder
    if path.is_dir():
        what = f"has no {NOTE}, beside it neither: what it was is recorded there"
        raise UserError(given, what, "copy artifacts/export/<node> with all in it")
    return None


def read_folder(folder: Path) -> dict[str, Any]:
    """An export's provenance. Raises UserError where it carries no lineage."""
    path = folder / NOTE
    if path.is_symlink():
        raise UserError(str(path), "is a link: not followed")
    made = parsed(path.read_bytes(), str(path))
    lacking = [key for key in CARRIED if key not in made]
    rows = made.get("lineage")
    if lacking or not isinstance(rows, list):
        raise UserError(
            str(path),
            "carries no lineage: no export's, or one published before they did",
            "in its project: make verify NODE=<stage>/<node>",
        )
    return made


def rows_of(made: dict[str, Any], where: str) -> list[Row]:
    """The records that an export carries, its own last."""
    try:
        sums = {n: md5 for n, md5 in map(line_of, made["md5sums"])}
        model = {n.removeprefix("model/"): s for n, s in sums.items()}
        own = {key: made[key] for key in NAMED} | {
            "outs": {f"artifacts/{made['node']}/model": tree_digest(model)},
            "seed": made["recipe"].get("seed"),
            "tokens": None,
            "counts": {},
            "made": beyond(made),
        }
        found = [*made["lineage"], own]
        for one in found:
            check_form(one)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(where, f"not a lineage: {error!r}") from error
    return found


def line_of(line: str) -> tuple[str, str]:
    """The name and the digest in a line of md5sum's."""
    md5, _, name = line.partition("  ")
    if not MD5.fullmatch(md5):
        raise ValueError(f"{line!r} is no line of md5sum")
    return inside(name), md5


def check_form(one: Row) -> None:
    """Raise where a record could not be shown: it may come from anywhere."""
    made = one["made"] or {}
    for found in (one["outs"], one["inputs"], made.get("environment") or {}):
        if not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise TypeError("a digest is no text")
    for key in ("recipe", "code", "packages", "counts"):
        if not isinstance(one[key], dict):
            raise TypeError(f"{key} is no mapping")
    if not isinstance(one["node"], str):
        raise TypeError("a node's name is no text")
    for value in (one["seed"], one["tokens"], made.get("seconds"), made.get(GPU)):
        if not isinstance(value, int | float | None):
            raise TypeError(f"{value!r} is no number")


# ---- how it is shown ---------------------------------------------------------------


def short(md5: str) -> str:
    """As much of a digest as tells it apart."""
    return md5[:8]


def duration(seconds: float | None) -> str:
    """A time as one would say it."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def commit(made: dict[str, Any]) -> str:
    """A commit, with + where files had changes beside it."""
    return str(made.get("git_commit") or "none")[:8] + "+" * bool(made.get("git_dirty"))


def main_out(one: Row) -> str:
    """The digest of a node's content, which its descendants read."""
    return content_of(one["node"], one["outs"])


def content_of(id: str, outs: dict[str, str]) -> str:
    """Of a node's outs, the digest of what its descendants read."""
    stage = STAGES.get(id.split("/")[0])
    return outs.get(f"artifacts/{id}/{stage.content}", "") if stage else ""


def columns(lines: list[list[str]]) -> list[str]:
    """Cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def text_of(rows: list[Row]) -> str:
    """The lineage as text: a table, then what each node was made of."""
    table = [["node", "content", "commit", "time", "GPU-hours", "tokens", "seed", ""]]
    for one in rows:
        made = one["made"] or {}
        table.append(
            [
                one["node"],
                short(main_out(one)),
                commit(made) if made else "?",
                duration(made.get("seconds")),
                f"{made.get(GPU) or 0:g}" if made else "?",
                number(one["tokens"]),
                "" if one["seed"] is None else str(one["seed"]),
                f"on {made.get('host')}" if made else f"{NOTE} is not here",
            ]
        )
    told = [one["made"] or {} for one in rows]
    table.append(
        [
            f"{len(rows)} nodes",
            "",
            "",
            duration(sum(made.get("seconds") or 0 for made in told)),
            f"{sum(made.get(GPU) or 0 for made in told):g}",
            number(sum(one["tokens"] or 0 for one in rows)),
            "",
            "",
        ]
    )
    parts = columns(table)
    for one in rows:
        parts += ["", one["node"], *details(one)]
    return "\n".join(line for part in parts for line in fit(printable(part)))


def details(one: Row) -> Iterator[str]:
    """What a node was made of, what it wrote, with which settings and versions."""
    made = one["made"] or {}
    yield from (f"  reads     {short(md5)}  {p}" for p, md5 in one["inputs"].items())
    yield from (f"  writes    {short(md5)}  {p}" for p, md5 in one["outs"].items())
    code = hashlib.sha256(json.dumps(one["code"], sort_keys=True).encode())
    files = f"{len(one['code'])} files"
    same = [path for path, md5 in one["inputs"].items() if md5 == main_out(one)]
    listed = {
        "same as": ", ".join(same),
        "counts": ", ".join(f"{v:,} {k}" for k, v in one["counts"].items()),
        "settings": ", ".join(
            key if value == {} else f"{key} {shown(value)}"
            for key, value in flat(one["recipe"])
        ),
        "code": f"{code.hexdigest()[:8]}  {files}" if one["code"] else "",
        "packages": ", ".join(f"{k} {v}" for k, v in one["packages"].items()),
        "with": ", ".join(environment(made)),
    }
    yield from (f"  {key:8}  {value}" for key, value in listed.items() if value)


def environment(made: dict[str, Any]) -> Iterator[str]:
    """Python, machine, container, and the locks' digests."""
    if made.get("python"):
        yield f"Python {made['python']}"
    for key in ("machine", "container"):
        if made.get(key):
            yield str(made[key])
    for lock, digest in (made.get("environment") or {}).items():
        yield f"{lock} {short(digest)}"


def number(value: float | None) -> str:
    """A count with its thousands apart."""
    return "" if not value else f"{value:,}"


def printable(text: str) -> str:
    """Text that cannot move the cursor of a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def fit(line: str, indent: int = 12) -> list[str]:
    """A line as lines that fit; what goes on is indented."""
    wrapped = textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False
    )
    return wrapped if len(line) > WIDTH else [line]


def draw_rows(rows: list[Row], target: Path) -> None:
    """Draw the lineage: digests, and what is not what its child was made from."""
    from scripts.lib.draw import draw

    by_id = {one["node"]: one for one in rows}
    nodes, edges = [], []
    stale = {one["node"] for one in rows if list(breaks(one, by_id))}
    for one in rows:
        state = "stale" if one["node"] in stale else "current"
        made = one["made"]
        note = (
            f"{short(main_out(one))}  {duration(made.get('seconds')) if made else ''}"
        )
        shown_as = state if made else "missing"
        nodes.append({"id": one["node"], "state": shown_as, "note": note.strip()})
        edges += [(p, one["node"]) for p in parents(one["inputs"]) if p in by_id]
    try:
        draw(nodes, edges, target)
    except ValueError as error:
        raise UserError(str(target), str(error)) from error


def breaks(one: Row, by_id: dict[str, Row]) -> Iterator[str]:
    """The inputs of a node that are not what its parents' records say."""
    for path, md5 in one["inputs"].items():
        parent = owner(path)
        if parent and by_id.get(parent, {}).get("outs", {}).get(path) != md5:
            yield path


# ---- the commands ------------------------------------------------------------------


def rows_at(given: str) -> list[Row]:
    """The records of a node of this project, or of a folder that carries its own."""
    folder = find_folder(given)
    if folder is not None:
        return rows_of(read_folder(folder), str(folder / NOTE))
    entries, shelf = read_lock(), Shelf()
    return [row(entries, id, shelf) for id in chain(entries, given)]


def show(args: argparse.Namespace) -> int:
    """Print, write or draw a lineage."""
    rows = rows_at(args.node)
    data = json.dumps({"node": rows[-1]["node"], "nodes": rows}, indent=1)
    if args.svg:
        draw_rows(rows, args.svg)
    if args.json and args.json != "-":
        Path(args.json).write_text(f"{data}\n")
    print(data if args.json == "-" else text_of(rows))
    by_id = {one["node"]: one for one in rows}
    if args.json != "-":
        for one in rows:
            for path in breaks(one, by_id):
                print(f"\nnote: {one['node']} was made from an earlier {path}")
        written = [str(path) for path in (args.svg, args.json) if path]
        print("\n" + "  ".join(written) if written else "", end="\n" * bool(written))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare what is recorded with the bytes that are here."""
    from scripts.lib import verify

    folder = find_folder(args.node)
    try:
        if folder is not None:
            found = verify.folder(folder)
        else:
            found = verify.node(args.node, args.config)
    except OSError as error:
        raise UserError(str(error.filename), str(error.strerror)) from error
    print("\n".join(map(printable, found.lines())))
    return 1 if found.changed or (args.strict and found.unchecked) else 0


def diff(args: argparse.Namespace) -> int:
    """Say how two nodes differ."""
    from scripts.lib import compare

    found = compare.differences_of(args.a, args.b)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(map(printable, compare.lines(found))))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands."""
    form = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = flags.add_subparsers(required=True, metavar="show|verify|diff")
    one = commands.add_parser("show", help="all ancestors, as text, JSON or SVG")
    one.add_argument("node", help="stage/node, or an export's folder")
    one.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="printed where no FILE"
    )
    one.add_argument("--svg", type=Path, metavar="FILE.svg|FILE.png")
    one.set_defaults(run=show)
    two = commands.add_parser("verify", help="recompute every digest; 1 if one differs")
    two.add_argument("node", help="stage/node, or an export's folder")
    two.add_argument("--config", type=Path, default=plan.chosen_config())
    two.add_argument(
        "--strict", action="store_true", help="fail too where a part is not here"
    )
    two.set_defaults(run=verify)
    three = commands.add_parser("diff", help="settings, data, code, versions, scores")
    three.add_argument("a", help="stage/node, or REVISION:stage/node")
    three.add_argument("b")
    three.add_argument("--json", action="store_true")
    three.set_defaults(run=diff)
    args = flags.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may have seen enough
    cli.run(main)
