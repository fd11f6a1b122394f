"""What publishing a checkpoint costs, against the md5 of its bytes on all cores.

    python -m tests.bench.publish
    python -m tests.bench.publish --shapes 4x8 1x32 --rounds 1
    python -m tests.bench.publish --folder /mnt/xfs

Shapes are files x megabytes. A trained node with finite random weights waits to be
published, as after a kill at that moment; in each round the anchor hashes the files in
this program's threads, and the node's job goes on. Two ratios to the anchor of the same
round: of publishing, which is to check, hash, move and record, and of the whole job,
which also opens DVC and looks at its inputs. The table is Markdown; memory is this
program's, with its libraries; disk is what the file system has less afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import struct
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.lib.run import Job, current_graph
from scripts.lib.store import LOCK, Store, dump_yaml, load_yaml
from tests.bench.big_config import big_config, make_built, working_in

MB = 1_000_000
NODE = "pretrain/base"
PROC = Path("/proc/self")


@dataclass
class Found:
    """What the rounds of a shape came to."""

    anchor: list[float] = field(default_factory=list)
    publish: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: int = 0
    disk: list[int] = field(default_factory=list)


class TimedJob(Job):
    """A job that notes how long it takes from the script's end on."""

    def build(self, repo) -> int:
        before = time.perf_counter()
        code = super().build(repo)
        self.took = time.perf_counter() - before
        return code


def write_weights(path: Path, size: int, block: bytes) -> None:
    """A safetensors file of one finite BF16 tensor, of its own name, and this size."""
    tensor = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    for _ in range(2):  # the header's own length counts
        header = json.dumps({path.stem: tensor}).encode()
        left = (size - 8 - len(header) - 16) // 2 * 2
        tensor |= {"shape": [left // 2], "data_offsets": [0, left]}
    header = json.dumps({path.stem: tensor}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        while left:
            left -= file.write(block[:left])


def finite_block(size: int) -> bytes:
    """Random bytes, no BF16 number of which is infinite."""
    numbers = np.frombuffer(os.urandom(size), "<u2")
    return (numbers & 0xBFFF).astype("<u2").tobytes()


def prepare(job: Job, files: int, megabytes: int) -> list[Path]:
    """Leave a checkpoint where a killed job would have left it."""
    from dvc.repo import Repo

    with Repo() as repo:
        job.collect(repo)
    work = Path("work", job.node.stage, f"{job.node.name}-{job.key}")
    shutil.rmtree(work, ignore_errors=True)
    model = work / "out/model"
    model.mkdir(parents=True)
    block = finite_block(16 * MB)
    for i in range(files):
        write_weights(model / f"model-{i:05}.safetensors", megabytes * MB, block)
    step = {"step": job.node.recipe["steps"]}
    (work / "out/metrics.jsonl").write_text(json.dumps(step) + "\n")
    (work / "seconds.json").write_text("1.0")
    (work / "finished").touch()
    os.sync()
    return sorted(model.iterdir())


def forget(job: Job) -> None:
    """Remove what was published and recorded of the node."""
    for path in (Path(job.node.folder), Path(".dvc/cache"), Path(job.node.manifest)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    lock = load_yaml(LOCK)
    lock["stages"].pop(job.node.dvc, None)
    LOCK.write_text(dump_yaml(lock))


def md5_seconds(files: list[Path]) -> float:
    """The anchor: nothing but the hash, on all cores."""

    def md5(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()

    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(md5, files))
    return time.perf_counter() - start


def peak_memory(reset: bool = False) -> int:
    """The most memory this program had since the last reset; 0 where it is not told."""
    if not (PROC / "clear_refs").exists():
        return 0
    if reset:
        (PROC / "clear_refs").write_text("5")
    status = (PROC / "status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def measure(project: Path, files: int, megabytes: int, rounds: int) -> Found:
    """Publish one shape several times."""
    found = Found()
    with working_in(project):
        for i in range(rounds):
            whole = current_graph()
            job = TimedJob(Store(whole), whole.nodes[NODE], submitted=False)
            forget(job)
            paths = prepare(job, files, megabytes)
            before = shutil.disk_usage(project).used
            if i % 2:
                found.anchor.append(md5_seconds(paths))
            peak_memory(reset=True)
            start = time.perf_counter()
            job.run()
            found.whole.append(time.perf_counter() - start)
            found.memory = max(found.memory, peak_memory())
            os.sync()
            found.disk.append(shutil.disk_usage(project).used - before)
            published = sorted(Path(job.node.content).iterdir())
            if not i % 2:
                found.anchor.append(md5_seconds(published))
            found.publish.append(job.took)
        forget(job)
    return found


def both(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f}"


def row(name: str, found: Found) -> str:
    def ratio(times: list[float]) -> str:
        return both([a / b for a, b in zip(times, found.anchor, strict=True)])

    cells = [
        name,
        ratio(found.publish),
        ratio(found.whole),
        both(found.anchor),
        both(found.publish),
        both(found.whole),
        f"{found.memory / MB:.0f}",
        f"{min(found.disk) / MB:+.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--shapes", nargs="+", default=["64x64", "1x4096"])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--folder", type=Path, help="where to work, on another disk")
    args = flags.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        project = Path(folder) / "project"
        make_built(project, big_config(24))
        measure(project, 1, 1, 1)  # what is imported once is not the checkpoint's
        for shape in args.shapes:
            files, megabytes = map(int, shape.split("x"))
            print(f"[bench] {shape}", file=sys.stderr)
            found = measure(project, files, megabytes, args.rounds)
            rows.append(row(f"{files} x {megabytes} MB", found))
    print(
        "| least / median | publish / md5 | job / md5 | md5, s | publish, s | job, s "
        "| peak MB | disk, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
