"""What a plan costs when everything is current, against an empty Snakefile's.

    python -m tests.bench.plan
    python -m tests.bench.plan --nodes 200 --rounds 5

User CPU seconds of `snakemake -n`, the least of several interleaved rounds, as a table
in Markdown. The first are the default config's; the others are tests.bench.big_config's.
All are marked as built, with artifacts of a few bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.big_config import big_config, make_built
from tests.workflow.conftest import ROOT

EMPTY = "empty Snakefile"
MADE = "make export"
DRY = ("snakemake", "-n")


def user_seconds(words: tuple[str, ...], folder: Path) -> float:
    """The user CPU seconds of a command and what it starts, which must succeed."""
    before = os.times().children_user
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} in {folder}:\n{done.stdout}{done.stderr}")
    if words != DRY and "Nothing to be done" not in done.stdout + done.stderr:
        assert words[0] == "make", done.stdout
    return os.times().children_user - before


def cases(folder: Path, sizes: list[int]) -> dict[str, tuple[tuple[str, ...], Path]]:
    """The projects to plan, each built and planned once: {name: (command, folder)}."""
    empty = folder / "empty"
    empty.mkdir()
    (empty / "Snakefile").touch()
    found: dict[str, tuple[tuple[str, ...], Path]] = {EMPTY: (DRY, empty)}
    default = (ROOT / "config/config.yaml").read_text()
    for size in [0, *sizes]:
        path = folder / str(size)
        whole = make_built(path, big_config(size) if size else default)
        (path / ".venv").symlink_to(Path(sys.prefix))
        nodes = f"{len(whole.nodes):,} nodes"
        found[nodes] = (*DRY, "export"), path
        if not size:
            ready = ("-o", ".venv/.ready")  # the environment is this one's
            found[f"{MADE}, {nodes}"] = ("make", *ready, "export"), path
    for name, (words, path) in found.items():
        print(f"[bench] first {name}", file=sys.stderr)
        user_seconds(words, path)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--nodes", type=int, nargs="*", default=[200, 2000])
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        named = cases(Path(folder), args.nodes)
        seconds: dict[str, list[float]] = {name: [] for name in named}
        for _ in range(args.rounds):
            for name, (words, path) in named.items():
                seconds[name].append(user_seconds(words, path))
    least = {name: min(found) for name, found in seconds.items()}
    anchor = least[EMPTY]
    print("| everything current | user s | over the empty one, s | ratio |")
    print("|---|---|---|---|")
    for name, found in least.items():
        print(
            f"| {name} | {found:.2f} | {found - anchor:+.2f} | {found / anchor:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
