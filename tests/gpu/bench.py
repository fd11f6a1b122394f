"""Steps a second inside the build against Bridge called bare, and start-up.

    python -m tests.gpu.bench            prints a Markdown table

Bare is Megatron-Bridge's `pretrain` with the same settings and none of ours: no
callbacks, no saves but the last. Both run in turn, several times; a run's figure is the
median of the iteration times that Bridge itself logs, first ones left out, and the ratio
is the median of the pairs'. One run takes about a minute, and its line is printed at its
end; at toy size one run may differ from the next by a tenth. On two GPUs the runs of a
pair go side by side, and change GPUs from pair to pair. Start-up is
the time from a process' start to the end of its second step, on cold caches of kernels
and on warm ones.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tests.gpu.conftest import (
    PYTHON,
    RECIPE,
    ROOT,
    make_inputs,
    num_gpus,
    once,
    write,
)

BARE = "tests.gpu.programs.bare"
OURS = "scripts.nvidia.pretrain"
TIMES = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
READY = re.compile(r"step 2 done ([\d.]+) s after start")
IMPORTED = re.compile(r"imports done ([\d.]+) s after start")
LEFT_OUT = 5


def run(
    module: str, folder: Path, name: str, flags: list[str], gpu: int = 0
) -> tuple[str, float]:
    """One run's log, and its ms a step."""
    log, work = folder / f"{name}.log", folder / f"{name}.work"
    words = [PYTHON, "-m", module, "--out", str(folder / name), "--work", str(work)]
    with open(log, "wb") as output:
        subprocess.run(
            [*words, *flags],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": str(gpu),
                "PYTHONPATH": str(ROOT),
            },
        )
    text = log.read_text(errors="replace")
    times = [float(ms) for ms in TIMES.findall(text)][LEFT_OUT:]
    print(f"{name}: {median(times):.2f} ms a step", file=sys.stderr, flush=True)
    return text, median(times)


def main() -> int:
    """Run all, print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--pairs", type=int, default=4, help="of runs; default 4")
    flags.add_argument("--steps", type=int, default=300, help="of a run; default 300")
    flags.add_argument("--model", default="tiny", help="of config/models; default tiny")
    flags.add_argument(
        "--steps-only", action="store_true", help="leave start-up out; keep its kernels"
    )
    args = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    inputs = once(folder, "inputs", make_inputs)
    recipe = write(folder / "recipe.yaml", RECIPE | {"steps": args.steps})
    given = [
        "--recipe",
        str(recipe),
        "--model",
        str(ROOT / "config/models" / args.model),
    ]
    given += ["--tokenizer", str(inputs / "tokenizer"), "--data", str(inputs / "blend")]
    given += ["--micro-batch-size", "16", "--save-steps", "100000"]
    kernels = ROOT / "work/kernels"
    aside = once(folder, "aside", lambda _: None) / "kernels"
    if kernels.exists() and not args.steps_only:
        shutil.move(kernels, aside)
    start = []
    for name in () if args.steps_only else ("cold", "warm"):
        text, _ = run(OURS, folder, name, given)
        found = [float(p.search(text)[1]) for p in (IMPORTED, READY)]  # type: ignore[index]
        start.append((name, *found))
    at_once = num_gpus() > 1
    seconds: dict[str, list[float]] = {BARE: [], OURS: []}
    for pair in range(args.pairs):
        modules = (BARE, OURS) if pair % 2 else (OURS, BARE)

        def one(
            module: str, pair: int = pair, modules: tuple[str, str] = modules
        ) -> float:
            gpu = modules.index(module) if at_once else 0
            return run(module, folder, f"{module}-{pair}", given, gpu)[1]

        with ThreadPoolExecutor(2 if at_once else 1) as pool:
            for module, time in zip(modules, pool.map(one, modules), strict=True):
                seconds[module].append(time)
    bare, ours = median(seconds[BARE]), median(seconds[OURS])
    ratio = median(b / o for b, o in zip(seconds[BARE], seconds[OURS], strict=True))
    print("| what | bare Bridge | in the build | ratio |\n|---|---|---|---|")
    print(f"| ms a step, {args.steps} steps | {bare:.2f} | {ours:.2f} | {ratio:.3f} |")
    if start:
        print(
            "\n| kernels | imports | second step done | after the imports |\n|---|---|---|---|"
        )
    for name, imported, ready in start:
        print(
            f"| {name} | {imported:.1f} s | {ready:.1f} s | {ready - imported:.1f} s |"
        )
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
