r"""Compare an environment with the lock, or write the lock of one.

    python -m scripts.nvidia.versions envs/nvidia.lock            what differs
    python -m scripts.nvidia.versions envs/nvidia.lock --write    pin what is here
    python -m scripts.nvidia.versions envs/nvidia.lock --table    as Markdown

The versions of RESULT decide what training gives, so they are part of a node's
identity as envs/nvidia.lock pins them. A container has versions of its own: `--write`,
run inside of it, pins those, and a node that ran elsewhere reruns.

Only the standard library is imported here: this runs before anything slow does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path

RESULT = (
    "causal-conv1d",
    "mamba-ssm",
    "megatron-bridge",
    "megatron-core",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "transformer-engine",
    "transformers",
)
"""Packages whose version can change a result."""

SHOWN = {
    "megatron-core": "Megatron-Core",
    "megatron-bridge": "Megatron-Bridge",
    "transformer-engine": "Transformer Engine",
    "torch": "PyTorch",
    "transformers": "Transformers",
    "mamba-ssm": "mamba-ssm",
    "nemo-rl": "NeMo-RL",
    "vllm": "vLLM",
    "ray": "Ray",
    "lm-eval": "lm-evaluation-harness",
}
"""Packages of the table, and how their makers write them."""

OTHER = re.compile(r"(?m)^# (Python|CUDA|Container|NeMo-RL's|Tried on): (.+)$")
"""What a lock says of these in its comments, for the table."""


def pins(lock: Path) -> dict[str, str]:
    """{package: version} of a lock file."""
    text = lock.read_text(encoding="utf-8")
    found = re.findall(r"(?m)^([\w.-]+)\s*==\s*([^\s;#\\]+)", text)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def installed(names: Iterable[str] = RESULT) -> dict[str, str | None]:
    """{package: version} of these here; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def installed_problems(lock: Path) -> list[str]:
    """What differs from the lock among the packages that decide results.

    A build's mark, as in 2.11.0+cu130, counts only where the lock has one.
    """
    pinned = pins(lock)
    problems = []
    for name, found in installed().items():
        wanted = pinned.get(name)
        if wanted is None:
            problems.append(f"{name}: not pinned in {lock}")
        elif found is None:
            problems.append(f"{name}: not installed; {lock} pins {wanted}")
        elif wanted not in (found, found.partition("+")[0]):
            problems.append(f"{name}: {found}; {lock} pins {wanted}")
    return problems


def write(lock: Path) -> None:
    """Pin what is installed here in place of what the lock pins, line by line."""
    text = lock.read_text(encoding="utf-8")
    for name, found in installed().items():
        if found is not None:
            spelled = name.replace("-", "[-_.]")
            line = re.compile(rf"(?mi)^({spelled})\s*==\s*[^\s;#\\]+")
            text = line.sub(rf"\g<1>=={found}", text)
    lock.write_text(text, encoding="utf-8")


def table(*locks: Path) -> str:
    """The versions of locks as a Markdown table."""
    pinned: dict[str, str] = {}
    for lock in locks:
        pinned |= pins(lock)
    rows = [(shown, pinned[name]) for name, shown in SHOWN.items() if name in pinned]
    for lock in locks:
        rows += OTHER.findall(lock.read_text(encoding="utf-8"))
    lines = ["| what | version |", "|---|---|"]
    return "\n".join(lines + [f"| {shown} | {version} |" for shown, version in rows])


def main(argv: list[str] | None = None) -> int:
    """Print what differs, and return 1 if anything does; or write, or print."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("lock", type=Path)
    flags.add_argument("--write", action="store_true", help="pin what is here")
    flags.add_argument("--table", action="store_true", help="show it as Markdown")
    args = flags.parse_args(argv)
    if args.write:
        write(args.lock)
    elif args.table:
        print(table(args.lock))
    elif problems := installed_problems(args.lock):
        print("\n".join(problems), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
