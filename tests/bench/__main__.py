"""All benchmarks of this folder, as the page docs/performance.md has them.

    python -m tests.bench                                the table, without anchors
    python -m tests.bench --megatron FOLDER --bridge FOLDER --anchor-python PYTHON
    python -m tests.bench growth --gb 1 2 4 8            more text, ever more

FOLDER is a checkout; PYTHON is an interpreter with what they import (PyTorch,
Transformers, triton, gigatoken and awkward; a script that sets up one will do). Without
checkouts, tokenize and pack are compared with Hugging Face's libraries alone. The page
keeps what it has of parts that were not run. With both checkouts,
tokenize and pack are about eight minutes of computing, more where cores are shared.
Growth needs 1.7 times its largest size on the disk.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.lib.errors import UserError
from tests.bench.data import Anchors, Bench, growth, packing, tokenizing
from tests.bench.measure import ROOT, Row

PARTS = ("tokenize", "pack", "publish", "plan")
PACKAGES = ("tokenizers", "fastokens", "transformers", "datasets", "pyarrow")
TOOLS = ("snakemake", "dvc")


def machine(anchors: Anchors) -> str:
    """What the figures below it were taken on."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in TOOLS]
    for name, folder in (
        ("Megatron-LM", anchors.megatron),
        ("Megatron-Bridge", anchors.bridge),
    ):
        versions.append(f"{name} {commit(folder) if folder else 'not given'}")
    load = os.getloadavg()[0]
    return (
        f"{datetime.date.today()}, commit {commit(ROOT)}; "
        f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GB of memory, Linux {platform.release()}, load {load:.1f} at the "
        f"start; Python {platform.python_version()}, {', '.join(versions)}."
    )


def commit(folder: Path) -> str:
    """The commit a folder is at, if it is a checkout."""
    words = ("git", "-C", str(folder), "rev-parse", "HEAD")
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    return asked.stdout.strip()[:12] or "of no known commit"


def printed(module: str, *flags: str) -> str:
    """What another benchmark of this folder prints."""
    words = [sys.executable, "-m", f"tests.bench.{module}", *flags]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"tests.bench.{module}", "failed")
    return done.stdout.strip()


def put(page: Path, name: str, text: str) -> None:
    """Replace a part of the page, or add it at its end."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text() if page.exists() else "# Performance\n"
    before, found, rest = old.partition(start)
    _, _, after = rest.partition(end)
    if not found:
        before, after = f"{old.rstrip()}\n\n## {name.capitalize()}\n\n", "\n"
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for, and write the page part by part."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    flags.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    flags.add_argument("--bridge", type=Path, help="checkout of Megatron-Bridge")
    flags.add_argument("--anchor-python", default=sys.executable)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--mb", type=float, default=26, help="of documents")
    flags.add_argument(
        "--large-mb",
        type=float,
        nargs="+",
        default=[200, 4000],
        help="on two cores; the goal is for the last",
    )
    flags.add_argument("--chats", type=int, default=5000)
    flags.add_argument("--gb", type=float, nargs="+", default=[1, 2, 4, 8])
    flags.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    flags.add_argument(
        "--folder", type=Path, help="for inputs and outputs; default: a temporary one"
    )
    flags.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    args = flags.parse_args(argv)
    parts = args.parts or PARTS
    for part in parts:
        if part not in (*PARTS, "growth"):
            flags.error(f"no part {part}: {', '.join(PARTS)}, growth")
    # so that a killed benchmark leaves neither a process nor a folder behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    anchors = Anchors(args.anchor_python, args.megatron, args.bridge)
    described = machine(anchors)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as folder:
        bench = Bench(Path(folder), anchors)
        work = {
            "tokenize": lambda: tokenizing(bench, args.mb, args.large_mb, args.rounds),
            # Bridge takes two minutes a round
            "pack": lambda: packing(bench, args.chats, max(1, args.rounds - 1)),
        }
        for part in [part for part in work if part in parts]:
            table = "\n".join([Row.HEAD, *map(str, work[part]())])
            inputs = f"Inputs: {'; '.join(bench.inputs)}."
            put(args.page, part, f"{described} {inputs}\n\n{table}")
        if "growth" in parts:
            grown = growth(bench, args.gb, args.cores)
            put(args.page, "growth", f"{described} {args.cores} cores.\n\n{grown}")
    if "publish" in parts and (ROOT / "tests/bench/publish.py").exists():
        put(args.page, "publish", f"{described}\n\n{printed('publish')}")
    if "plan" in parts:
        put(args.page, "plan", f"{described}\n\n{printed('plan', '--nodes', '200')}")
    print(args.page.read_text())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
