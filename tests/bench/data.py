"""Tokenize and pack as whole commands, against others' that write the same.

    python -m tests.bench tokenize pack --megatron FOLDER --bridge FOLDER

The others are Megatron-LM's two preprocessing tools and Megatron-Bridge's offline
packing, where their checkouts are given, and programs on Hugging Face's libraries
(tests.bench.plain). Outputs are compared: shards byte by byte, packed chats by their
ids and masks.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from scripts.lib.errors import UserError
from scripts.lib.indexed import IndexedReader
from tests.bench.corpus import BOS, EOS
from tests.bench.measure import (
    ROOT,
    Command,
    Row,
    Run,
    compared,
    cpu,
    interleaved,
    peak,
    run,
    wall,
)

SEQUENCE_LENGTH = 4096
OURS, PLAIN = "ours", "Hugging Face's libraries"
TOOL, FAST = "Megatron-LM `preprocess_data.py`", "Megatron-LM `preprocess_data_fast.py`"
PACKING = "Megatron-Bridge's offline packing"
EDGES = ["", "a", "word", f"in {EOS} the middle", f"{BOS}twice", "\0\x1f ", "é漢🙂 ﬁ"]


@dataclass(frozen=True)
class Anchors:
    """Checkouts to compare with, and the interpreter that runs them."""

    python: str = sys.executable
    megatron: Path | None = None
    bridge: Path | None = None


class Bench:
    """Inputs in a folder, and commands on them; `inputs` says how large each is."""

    def __init__(self, folder: Path, anchors: Anchors) -> None:
        self.folder, self.anchors = folder, anchors
        self.inputs: list[str] = []

    def make(self, name: str, *words: object) -> Path:
        """An input by tests.bench.corpus, in a process of its own."""
        path = self.folder / name
        command = [sys.executable, "-m", "tests.bench.corpus", *map(str, words)]
        command.insert(4, str(path))
        made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        if said := made.stdout.decode().strip():
            self.inputs.append(said)
        return path

    def ours(
        self, stage: str, name: str, tokenizer: Path, data: Path, cores: int = 1
    ) -> Command:
        """A stage's script alone, into a new folder."""
        out = self.folder / name
        recipe = out.with_suffix(".yaml")
        recipe.write_text(
            f"{{sequence_length: {SEQUENCE_LENGTH}, too_long: drop}}"
            if stage == "pack"
            else "{}"
        )
        flags = ("--tokenizer", tokenizer, "--data", f"data={data}")
        flags = (*flags, "--recipe", recipe, "--out", out)
        words = [sys.executable, "-m", f"scripts.data.{stage}", *map(str, flags)]
        return self.command(name, words, cores, str(ROOT))

    def plain(self, stage: str, name: str, *words: object) -> Command:
        """The same by Hugging Face's libraries."""
        command = [sys.executable, "-m", "tests.bench.plain", stage, *map(str, words)]
        return self.command(name, command, path=str(ROOT))

    def tool(self, fast: bool, name: str, tokenizer: Path, data: Path) -> Command:
        """One of Megatron-LM's tools."""
        tools = Path(str(self.anchors.megatron), "tools")
        program = tools / f"preprocess_data{'_fast' if fast else ''}.py"
        flags = ("--input", data, "--output-prefix", self.folder / name / "data")
        flags = (*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod")
        flags = (*flags, "--tokenizer-model", tokenizer)
        flags = (*flags, *(("--use-gigatoken",) if fast else ("--workers", 1)))
        words = [self.anchors.python, str(program), *map(str, flags)]
        return self.command(name, words, path=str(self.anchors.megatron))

    def bridge(self, name: str, tokenizer: Path, data: Path) -> Command:
        """Bridge's packing; it writes an index beside the chats, so they get a link."""
        linked = self.folder / name / "chats.jsonl"
        program = Path(__file__).with_name("bridge_pack.py")
        out = linked.with_name("packed.parquet")
        words = [self.anchors.python, program, self.anchors.bridge, tokenizer]
        words += [linked, out, SEQUENCE_LENGTH]
        path = str(self.anchors.megatron or "")
        command = self.command(name, list(map(str, words)), path=path)

        def prepare() -> None:
            command.prepare()
            linked.hardlink_to(data)

        return Command(command.words, command.log, prepare, path=path)

    def command(
        self, name: str, words: list[str], cores: int = 1, path: str = ""
    ) -> Command:
        """A command that finds its folder new and empty."""
        log = self.folder / f"{name}.log"
        return Command(words, log, partial(renew, self.folder / name), cores, path)


def renew(folder: Path) -> None:
    """An empty folder, and no work of an earlier run."""
    for path in (folder, folder.with_name(f"{folder.name}.work")):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()


def same_shard(ours: Path, theirs: Path) -> bool:
    """Whether two shards are the same bytes."""
    pairs = [(Path(f"{ours}{end}"), Path(f"{theirs}{end}")) for end in (".bin", ".idx")]
    return all(filecmp.cmp(one, other, shallow=False) for one, other in pairs)


def told(ours: Path, theirs: Path) -> str:
    """How two shards compare, in words."""
    if same_shard(ours, theirs):
        return "identical .bin and .idx"
    counts = [len(IndexedReader(prefix).tokens) for prefix in (ours, theirs)]
    return f"**not alike**: {counts[0]:,} and {counts[1]:,} tokens"


def tokenizing(
    bench: Bench, mb: float, large_mb: list[float], rounds: int
) -> list[Row]:
    """Rows on tokenize."""
    documents = bench.make("documents.jsonl", "documents", "--mb", mb)
    tokenizer = bench.make("tokenizer", "tokenizer", "--documents", documents)
    anchors = bench.anchors
    commands = {
        OURS: bench.ours("tokenize", "ours", tokenizer, documents),
        PLAIN: bench.plain(
            "tokenize", "plain", tokenizer, documents, bench.folder / "plain/data"
        ),
    }
    shards = {PLAIN: bench.folder / "plain/data"}
    goals: dict[str, float | None] = {TOOL: 25, FAST: 10, PLAIN: None}
    rows = [edges(bench, documents)]
    if anchors.megatron:
        for fast, name in ((False, TOOL), (True, FAST)):
            folder = "fast" if fast else "tool"
            commands[name] = bench.tool(fast, folder, tokenizer, documents)
            shards[name] = bench.folder / folder / "data_text_document"
    found = interleaved(commands, rounds)
    for name in [name for name in goals if name in found]:
        row = compared(
            "tokenize, whole command, one core",
            name,
            found[OURS],
            found[name],
            goals[name],
        )
        row.output = told(bench.folder / "ours/data", shards[name])
        rows.insert(-1, row)
    return [*rows, *scaling(bench, tokenizer, found[OURS], mb, large_mb, rounds)]


def edges(bench: Bench, documents: Path) -> Row:
    """A tokenizer that adds BOS, on few documents and on strange ones."""
    tokenizer = bench.make(
        "tokenizer-bos", "tokenizer", "--documents", documents, "--bos"
    )
    few = bench.folder / "few.jsonl"
    with documents.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(200))]  # noqa: B905
    few.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (*EDGES, *texts))
    )
    others = {
        PLAIN: (
            bench.plain(
                "tokenize", "few-plain", tokenizer, few, bench.folder / "few-plain/data"
            ),
            "few-plain/data",
        )
    }
    if bench.anchors.megatron:
        for fast, name in ((False, TOOL), (True, FAST)):
            folder = "few-fast" if fast else "few-tool"
            command = bench.tool(fast, folder, tokenizer, few)
            others[name] = (command, f"{folder}/data_text_document")
    run(bench.ours("tokenize", "few-ours", tokenizer, few))
    ours = bench.folder / "few-ours/data"
    said = []
    right = None
    for name, (command, shard) in others.items():
        run(command)
        said.append(f"{name}: {told(ours, bench.folder / shard)}")
        if name == (TOOL if bench.anchors.megatron else PLAIN):
            right = same_shard(ours, bench.folder / shard)
    return Row(
        f"tokenize where the tokenizer adds BOS, {len(EDGES) + len(texts)} documents, "
        "an empty one and special tokens' names among them",
        goal="as `preprocess_data.py`" if bench.anchors.megatron else "",
        met=right,
        output="; ".join(said),
    )


def cached(command: Command, data: Path) -> Command:
    """The same, where the disk has no part: it is idle, and `data` is in memory."""

    def prepare() -> None:
        command.prepare()
        os.sync()
        with data.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    return replace(command, prepare=prepare)


TWO_CORES = 1.8
"""Times as fast as one core, where the start-up is a small part."""


def scaling(
    bench: Bench,
    tokenizer: Path,
    small: list[Run],
    small_mb: float,
    large_mb: list[float],
    rounds: int,
) -> list[Row]:
    """Two cores against one, and memory from one size to the next."""
    rows = []
    for size in large_mb:
        last = size == large_mb[-1]
        large = bench.make("large.jsonl", "documents", "--mb", size, "--seed", 1)
        one = cached(bench.ours("tokenize", "one", tokenizer, large), large)
        two = cached(bench.ours("tokenize", "two", tokenizer, large, cores=2), large)
        found = interleaved({"one core": one, "two cores": two}, rounds)
        row = compared(
            f"tokenize {size:g} MB on 2 cores",
            "ours on one",
            found["two cores"],
            found["one core"],
            TWO_CORES if last else None,
            wall,
        )
        least = [min(map(cpu, found[name])) for name in ("one core", "two cores")]
        row.output = told(bench.folder / "two/data", bench.folder / "one/data")
        row.output += f"; CPU seconds {least[0]:.2f} on one, {least[1]:.2f} on two"
        large.unlink()
        before, after = (max(map(peak, runs)) for runs in (small, found["one core"]))
        flat = Row(
            f"memory at {size:g} MB of text, one core",
            f"ours at {small_mb:g} MB",
            f"{after / before:.2f}",
            "flat: at most 1.25" if last else "",
            after <= 1.25 * before if last else None,
            memory=f"{after:.0f} / {before:.0f}",
        )
        rows += [row, flat]
        small, small_mb = found["one core"], size
    return rows


def packing(bench: Bench, number: int, rounds: int) -> list[Row]:
    """Rows on pack."""
    documents, tokenizer = bench.folder / "documents.jsonl", bench.folder / "tokenizer"
    if not documents.exists():
        bench.make(documents.name, "documents")
    if not tokenizer.exists():
        bench.make("tokenizer", "tokenizer", "--documents", documents)
    chats = bench.make(
        "chats.jsonl", "chats", "--documents", documents, "--count", number
    )
    out = bench.folder / "plain-packed/packed.parquet"
    commands = {
        OURS: bench.ours("pack", "packed", tokenizer, chats),
        PLAIN: bench.plain(
            "pack", "plain-packed", tokenizer, chats, out, SEQUENCE_LENGTH
        ),
    }
    if bench.anchors.bridge:
        few = bench.make(
            "few-chats.jsonl", "chats", "--documents", documents, "--count", 20
        )
        bench.inputs.pop()
        run(bench.bridge("bridge-packed", tokenizer, few))  # compiles its modules
        commands[PACKING] = bench.bridge("bridge-packed", tokenizer, chats)
    found = interleaved(commands, rounds)
    ours = packed_chats(bench.folder / "packed")
    rows = []
    for name, folder in ((PACKING, "bridge-packed"), (PLAIN, "plain-packed")):
        if name not in found:
            continue
        row = compared(
            f"pack {number:,} chats, whole command, one core",
            name,
            found[OURS],
            found[name],
            50 if name == PACKING else None,
        )
        alike = (ours & packed_chats(bench.folder / folder)).total()
        row.output = f"ids and mask alike for {alike:,} of {ours.total():,} chats"
        rows.append(row)
    told = json.loads((bench.folder / "packed/packing.json").read_text())
    fill = Row("fill of the rows", ratio=f"{told['fill']:.2%}", goal="99.9%")
    fill.met, rows = told["fill"] >= 0.999, [*rows, fill]
    if bench.anchors.bridge:
        theirs = bench.folder / "bridge-packed/packed.json"
        fill.against = PACKING
        percent = json.loads(theirs.read_text())[0]["packing_efficiency"]
        fill.output = f"theirs: {percent:.2f}%"
        most, least = (max(map(peak, found[name])) for name in (PACKING, OURS))
        rows.append(
            Row(
                "memory of packing",
                PACKING,
                f"{least / most:.2f}",
                "half",
                least <= most / 2,
                memory=f"{least:.0f} / {most:.0f}",
            )
        )
    return rows


def packed_chats(folder: Path) -> Counter[tuple[bytes, bytes]]:
    """The chats of packed rows: ids and mask of each, and how often it is there."""
    import numpy as np
    from pyarrow import parquet

    found: Counter[tuple[bytes, bytes]] = Counter()
    rows = parquet.ParquetFile(folder / "packed.parquet")
    for batch in rows.iter_batches(256):
        for i in range(batch.num_rows):
            ids, mask, starts = (
                batch[name][i].values.to_numpy()
                for name in ("input_ids", "loss_mask", "seq_start_id")
            )
            ids, mask = ids.astype(np.int32), mask.astype(bool)
            for start, end in pairwise([*starts.tolist(), len(ids)]):
                found[ids[start:end].tobytes(), mask[start:end].tobytes()] += 1
    return found


def growth(bench: Bench, gigabytes: list[float], cores: int) -> str:
    """Tokenize ever more text on some cores: seconds and memory, as a table."""
    documents = bench.make("documents.jsonl", "documents", "--mb", 26)
    tokenizer = bench.make("tokenizer", "tokenizer", "--documents", documents)
    lines = [
        "| GB of text | documents | tokens | s | MB/s | of the first process, CPU s "
        "| peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    rate = limit = 0.0
    for size in gigabytes:
        needed = size * 1e9 * 1.7
        if shutil.disk_usage(bench.folder).free < needed:
            raise UserError(str(bench.folder), f"less than {needed / 1e9:.0f} GB free")
        large = bench.make("large.jsonl", "documents", "--mb", size * 1000)
        ours = bench.ours("tokenize", "grown", tokenizer, large, cores)
        done = run(cached(ours, large))
        blend = json.loads((bench.folder / "grown/blend.json").read_text())
        (source,) = blend["sources"]
        lines.append(
            f"| {size:g} | {source['documents']:,} | {source['tokens']:,} | "
            f"{done.wall_s:.1f} | {1000 * size / done.wall_s:.0f} | {done.first_s:.1f} "
            f"| {done.peak_mb:.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        rate = 1000 * size / done.cpu_s
        limit = 1000 * size / done.first_s
        large.unlink()
        shutil.rmtree(bench.folder / "grown")
    return "\n".join([*lines, "", estimate(rate, limit)])


TERABYTES, NODES = 10, 50


def estimate(rate: float, limit: float) -> str:
    """What a large corpus takes, from MB a CPU second, and MB the first process can."""
    share = TERABYTES * 1e6 / NODES
    hours = share / limit / 3600
    return (
        f"A core tokenizes {rate:.0f} MB a second. The first process, which starts the "
        f"others and puts what they made in order, takes a second of its own for "
        f"{limit:.0f} MB: that is the most a node can do, with {limit / rate:.0f} cores. "
        f"{TERABYTES} TB on {NODES} nodes, a `tokenize` node and {share / 1e6:g} TB each, "
        f"then take {hours * 60:.0f} minutes with as many cores, and "
        f"{share / rate / 3600:.1f} hours with one."
    )
