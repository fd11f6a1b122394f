"""Seconds a step inside the build against the engine called bare, and start-up.

    python -m tests.gpu.bench                   pretrain, against Megatron-Bridge
    python -m tests.gpu.bench --stage grpo      GRPO, against NeMo-RL

Bare is the engine's own entry point with the same settings and none of ours: no
callbacks, no saves but the last. Both run in turn, several times, or on two GPUs side by
side, changing GPUs from pair to pair. A run's figure is the mean time between the lines
that the engine itself logs a step, first ones left out; the ratio is that of the pairs'
geometric means. Start-up is the time from the process' start to the end of
its first steps: in the first pair nothing that the engine compiles is there yet, in the
last it is. A run's line is printed at its end, the table last, in Markdown.

Pretraining is of Qwen 3's shape, 0.6 B, at 16,384 tokens a step: a step takes the GPU
about a fifth of a second, so that what is measured is not the noise of a toy.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from tests.gpu.conftest import (
    GRPO,
    RECIPE,
    ROOT,
    Run,
    Stages,
    make_chatty,
    make_inputs,
    num_gpus,
    once,
)

LEFT_OUT = 3
KERNELS = ROOT / "work/kernels"


class Bench(NamedTuple):
    """A stage that is measured: ours, bare, and the line that the engine logs a step."""

    ours: str
    bare: str
    line: str
    steps: int


BENCHES = {
    "pretrain": Bench(
        "scripts.nvidia.pretrain",
        "tests.gpu.programs.bare",
        "elapsed time per iteration (ms):",
        200,
    ),
    "grpo": Bench(
        "scripts.nvidia.grpo",
        "tests.gpu.programs.bare_grpo",
        "Total step time:",
        20,
    ),
}


class Times(NamedTuple):
    """Of a run, in seconds: a step, imports and the first step from its start."""

    step: float
    imports: float
    first: float


def start(stages: Stages, stage: str, module: str, args: Any) -> Run:
    """Start one run of a stage's module."""
    if stage == "grpo":
        recipe = GRPO | {"steps": args.steps + 1, "overrides": {}}
        chatty = stages.inputs.parent / "chatty/out"
        flags = ("--backend", args.backend, "--save-steps", "100000")
        return stages.rl(module, recipe, chatty, *flags)
    settings = {"sequence_length": 1024, "log_steps": 1, "steps": args.steps + 1}
    return stages.start(
        module,
        RECIPE | settings,
        *("--model", ROOT / "config/models/qwen3"),
        *(
            "--tokenizer",
            stages.inputs / "tokenizer",
            "--data",
            stages.inputs / "blend",
        ),
        *("--micro-batch-size", "8", "--save-steps", "100000"),
    )


def measure(stages: Stages, stage: str, module: str, args: Any) -> Times:
    """Run until all steps were logged, and no longer."""
    began = time.monotonic()
    run = start(stages, stage, module, args)
    seen: list[float] = []
    imports = 0.0
    while len(seen) < args.steps:
        time.sleep(0.02)
        text = run.text()
        count = text.count(BENCHES[stage].line)
        now = time.monotonic()
        seen += [now] * (count - len(seen))
        if not imports and (found := re.search(r"imports done ([\d.]+) s", text)):
            imports = float(found[1])
        if run.process.poll() is not None:
            sys.exit(f"{module} ended too soon:\n{text[-6000:]}")
    run.kill()
    shutil.rmtree(run.work, ignore_errors=True)
    counted = seen[LEFT_OUT:]
    step = (counted[-1] - counted[0]) / (len(counted) - 1)
    found_times = Times(step, imports, seen[0] - began)
    print(f"{module}: {found_times}", file=sys.stderr, flush=True)
    return found_times


def main() -> int:
    """Run all, print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--stage", choices=BENCHES, default="pretrain")
    flags.add_argument("--pairs", type=int, default=2, help="of runs; default 2")
    flags.add_argument("--steps", type=int, help="of a run; default 200, GRPO 20")
    flags.add_argument("--backend", default="dtensor", help="of GRPO; default dtensor")
    flags.add_argument(
        "--inputs", type=Path, help="folder to keep what runs start from"
    )
    args = flags.parse_args()
    bench = BENCHES[args.stage]
    args.steps = args.steps or bench.steps
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    kept = args.inputs or folder
    inputs = once(kept, "inputs", make_inputs)
    if args.stage == "grpo":
        once(kept, "chatty", lambda made: make_chatty(made, inputs))
    if KERNELS.exists():
        shutil.move(KERNELS, folder / "kernels")
    at_once = num_gpus() > 1
    times: dict[str, list[Times]] = {bench.bare: [], bench.ours: []}
    for pair in range(args.pairs):
        modules = (bench.bare, bench.ours) if pair % 2 else (bench.ours, bench.bare)

        def one(module: str, pair: int = pair, modules: Any = modules) -> Times:
            gpu = modules.index(module) if at_once else 0
            at = folder / f"{pair}-{gpu}-{module.rpartition('.')[2]}"
            at.mkdir()
            return measure(Stages(at, inputs, gpu), args.stage, module, args)

        with ThreadPoolExecutor(2 if at_once else 1) as pool:
            for module, found in zip(modules, pool.map(one, modules), strict=True):
                times[module].append(found)
    bare, ours = (
        geometric_mean(t.step for t in times[m]) for m in (bench.bare, bench.ours)
    )
    pairs = zip(times[bench.bare], times[bench.ours], strict=True)
    each = ", ".join(f"{b.step / o.step:.3f}" for b, o in pairs)
    print("| what | bare | in the build | steps a second, ratio | of each pair |")
    print("|---|---|---|---|---|")
    print(
        f"| {args.stage}, ms a step, {args.steps} steps | {1000 * bare:.1f} | "
        f"{1000 * ours:.1f} | {bare / ours:.3f} | {each} |"
    )
    print(
        "\n| kernels | imports done | first step done, ours | bare |\n|---|---|---|---|"
    )
    for name, at in (("none", 0), ("kept", -1)):
        mine, theirs = times[bench.ours][at], times[bench.bare][at]
        print(
            f"| {name} | {mine.imports:.0f} s | {mine.first:.0f} s | {theirs.first:.0f} s |"
        )
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
