"""A config of many nodes, and a project in which all of them are built.

    python -m tests.bench.big_config 200 > config/big.yaml

Branches grow from one base: SFT, GRPO and export each, an eval for every ten exports,
one report over all. What they publish is made up, a few bytes a node; dvc.lock has it
as DVC would have recorded it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.lib import graph
from scripts.lib.digest import Memory
from scripts.lib.graph import Graph, Node
from scripts.lib.store import LOCK, PARAMS, Store, dump_yaml
from tests.workflow.conftest import ROOT, copy_files

TRUNK = """\
generate:
  corpus: {kind: documents, count: 100}
  chat: {kind: chats, count: 100}
  sums: {kind: prompts, count: 100}
  heldout: {kind: heldout, count: 100}
tokenizer:
  tiny:
    data: corpus
    vocab_size: 300
    chat_template: config/models/tiny/chat_template.jinja
tokenize:
  corpus: {tokenizer: tiny, data: corpus}
pack:
  chat: {tokenizer: tiny, data: chat, sequence_length: 128}
prompts:
  sums: {tokenizer: tiny, data: sums, max_prompt_tokens: 64}
pretrain:
  base: {model: tiny, data: corpus, sequence_length: 64, steps: 4, batch_size: 8, lr: 3.0e-3}
"""
IN_TRUNK = 9
REPORTS = 1
EVALUATED = 10
"""Exports that one eval node scores."""

SETTINGS = {
    "sft": "data: chat, steps: 4, batch_size: 8, lr: 3.0e-3",
    "grpo": "data: sums, steps: 2, batch_size: 8, num_generations: 4, "
    "max_completion_tokens: 4, lr: 1.0e-5",
}


def big_config(count: int) -> str:
    """The text of a config of exactly `count` nodes, 24 or more."""
    left = count - IN_TRUNK - REPORTS
    group = 3 * EVALUATED + 1
    groups, rest = divmod(left, group)
    whole, single = divmod(max(0, rest - 1), 3)
    branches = groups * EVALUATED + whole
    assert branches > 0, "too few nodes for a branch"
    numbers = range(branches)
    sections: dict[str, list[str]] = {
        "sft": [
            f"s{i}: {{from: base, {SETTINGS['sft']}, seed: {i}}}"
            for i in range(branches + single)
        ],
        "grpo": [
            f"g{i}: {{from: s{i}, {SETTINGS['grpo']}, seed: {i}}}" for i in numbers
        ],
        "export": [f"x{i}: {{from: g{i}}}" for i in numbers],
        "eval": [],
    }
    for first in range(0, branches, EVALUATED):
        named = ", ".join(f"x{i}" for i in numbers[first : first + EVALUATED])
        task = "arithmetic: {file: config/tasks/arithmetic.yaml, data: heldout}"
        sections["eval"].append(
            f"e{first // EVALUATED}: {{from: [{named}], tasks: {{{task}}}}}"
        )
    made = IN_TRUNK + REPORTS + sum(map(len, sections.values()))
    sections["sft"] += [
        f"t{i}: {{from: base, {SETTINGS['sft']}, seed: {i}}}"
        for i in range(count - made)
    ]
    text = TRUNK
    for stage, nodes in sections.items():
        text += f"{stage}:\n" + "".join(f"  {node}\n" for node in nodes)
    return text + "report:\n  main: {}\nplacement:\n  default: {default: {cpus: 1}}\n"


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Have `folder` as the working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def publish(node: Node) -> dict[str, str]:
    """Write a node's artifact, of made-up content; {out: digest}."""
    files = [f"{node.content}/made.txt", *node.outs[1:]]
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps({"file": file}) + "\n")
    memory = Memory(Path("state", node.stage, f"{node.name}.files.json"))
    return {out: str(memory.recorded_as(Path(out))) for out in node.outs}


def lock_of(whole: Graph) -> dict[str, Any]:
    """What dvc.lock holds once all nodes are published."""
    store = Store(whole)
    outs: dict[str, str] = {}
    stages = {}
    for node in whole.nodes.values():
        published = publish(node)
        outs |= published
        read = {path: outs[path] for path in node.artifacts}
        read |= {path: store.digest(path) for path in node.files}
        key = f"{node.stage}.{node.name}"
        stages[node.dvc] = {
            "cmd": node.command,
            "deps": [{"path": p, "hash": "md5", "md5": read[p]} for p in sorted(read)],
            "params": {str(PARAMS): {key: node.params}},
            "outs": [
                {"path": p, "hash": "md5", "md5": published[p]}
                for p in sorted(published)
            ],
        }
    return {"schema": "2.0", "stages": stages}


def make_built(folder: Path, config: str) -> Graph:
    """The pipeline in a new folder, with every node of `config` as if it were built."""
    copy_files(ROOT, folder)
    with working_in(folder):
        Path("config/config.yaml").write_text(config)
        whole = graph.build(Path("config/config.yaml"))
        LOCK.write_text(dump_yaml(lock_of(whole)))
    for words in (
        ("init", "-q", "-b", "main"),
        ("add", "-A"),
        ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "made"),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return whole


def main() -> None:
    """Print a config."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("nodes", type=int)
    print(big_config(flags.parse_args().nodes), end="")


if __name__ == "__main__":
    main()
