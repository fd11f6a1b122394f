"""A tiny chain's inputs, and stages as processes of their own that can be killed."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.data import generate, pack, preferences, prompts, tokenize, tokenizer

ROOT = Path(__file__).parents[2]
HEAVY = [
    "datasets",
    "lm_eval.models.huggingface",
    "transformers.models.nemotron_h.modeling_nemotron_h",
    "transformers.trainer",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.sft_trainer",
]
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mamba_head_dim": 16,
    "mamba_num_heads": 2,
}
TRANSFORMER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_hidden_layers": 2,
}


def run_stage(module: str, argv: list[str], log: Path) -> None:
    """In the child: the stage's main, its output in a log, its code as exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from scripts.lib import cli

    sys.argv = [module, *argv]
    cli.run(importlib.import_module(module).main)


@dataclass
class Stage:
    """One run of a stage as a process forked from one that has the imports done."""

    process: multiprocessing.process.BaseProcess
    log: Path

    def code(self) -> int | None:
        self.process.join(120)
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal_when(self, path: Path, number: signal.Signals) -> int | None:
        """Send a signal as soon as a file is there; the exit code."""
        deadline = time.monotonic() + 120
        while not path.exists():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)
        assert self.process.pid
        os.kill(self.process.pid, number)
        return self.code()


@pytest.fixture(scope="session")
def start() -> Callable[[str, list[str], Path], Stage]:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)

    def start(module: str, argv: list[str], log: Path) -> Stage:
        process = context.Process(target=run_stage, args=(module, argv, log))
        process.start()
        return Stage(process, log)

    return start


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, blend, packed chats, prompts, pairs, held-out rows, models' configs."""
    root = tmp_path_factory.mktemp("inputs")

    def stage(main: Callable[..., int], name: str, recipe: object, *flags: str) -> None:
        file = write(root / f"{name}.yaml", recipe)
        argv = ["--recipe", str(file), "--out", str(root / name), *flags]
        assert main(argv) == 0

    def rows(name: str) -> str:
        return f"{name}={root / name / 'rows.jsonl'}"

    for name, kind, count in (
        ("corpus", "documents", 200),
        ("chat", "chats", 200),
        ("sums", "prompts", 60),
        ("heldout", "heldout", 12),
    ):
        recipe = {"kind": kind, "count": count, "max_operand": 29}
        stage(generate.main, name, recipe)
    small = {"kind": "preferences", "count": 1000, "max_operand": 9}
    stage(generate.main, "opinions", small)
    template = str(ROOT / "config" / "models" / "tiny" / "chat_template.jinja")
    tiny = ["--tokenizer", str(root / "tokenizer")]
    sources = {"corpus": {}, "chat": {}}
    stage(
        tokenizer.main,
        "tokenizer",
        {"vocab_size": 320, "sources": sources},
        *("--data", rows("corpus"), "--data", rows("chat")),
        *("--chat-template", template),
    )
    corpus = {"sources": {"corpus": {}}}
    stage(tokenize.main, "blend", corpus, *tiny, "--data", rows("corpus"))
    chat = {"sequence_length": 128, "sources": {"chat": {}}}
    stage(pack.main, "packed", chat, *tiny, "--data", rows("chat"))
    sums = {"max_prompt_tokens": 64, "sources": {"sums": {}}}
    stage(prompts.main, "prompts", sums, *tiny, "--data", rows("sums"))
    opinions = {"max_tokens": 64, "sources": {"opinions": {}}}
    opinions |= {"validation_fraction": 0.3}
    stage(preferences.main, "pairs", opinions, *tiny, "--data", rows("opinions"))
    for name, model, changes in (
        ("model", "tiny", MODEL),
        ("transformer", "qwen3_small", TRANSFORMER),
    ):
        config = json.loads((ROOT / f"config/models/{model}/config.json").read_text())
        (root / name).mkdir()
        write(root / name / "config.json", config | changes)
    return root
