"""What all tests with Megatron-Bridge share; without it they are skipped.

They need no GPU: $NVIDIA_PYTHON names an interpreter that has the engine's packages,
else it is .venv-nvidia/bin/python. Its start takes most of the time, so one process
does what many tests look at.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scripts.data import generate, pack, tokenize, tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
PYTHON = os.environ.get("NVIDIA_PYTHON") or str(ROOT / ".venv-nvidia/bin/python")
FIND = "from importlib.metadata import version; print(version('megatron-bridge'))"


@cache
def missing() -> str:
    """Why nothing here can run, or nothing."""
    if not Path(PYTHON).exists():
        return f"no {PYTHON}"
    asked = subprocess.run(
        [PYTHON, "-c", FIND], capture_output=True, text=True, check=False
    )
    return "" if asked.returncode == 0 else f"{PYTHON} has none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(FOLDER)]
    ours = [item for item in ours if item.path.name != "test_nemo_rl.py"]  # its own
    reason = missing() if ours else ""
    for item in ours:
        if reason:
            why = f"NOT TESTED: no interpreter with Megatron-Bridge: {reason}"
            item.add_marker(pytest.mark.skip(reason=why))


def run(
    module: str, *flags: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of the project with Bridge's interpreter, elsewhere, and offline."""
    return subprocess.run(
        [PYTHON, "-m", module, *map(str, flags)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def answer(program: str, asked: object, folder: Path) -> dict[str, Any]:
    """What a program of this folder writes on what it is asked."""
    question, found = folder / "asked.json", folder / "found.json"
    question.write_text(json.dumps(asked))
    ran = run(f"tests.bridge.programs.{program}", question, found, cwd=folder)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return dict(json.loads(found.read_text()))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer, blend and packed chats, as a build makes them."""
    root = tmp_path_factory.mktemp("inputs")

    def stage(main: Any, name: str, recipe: object, *flags: object) -> None:
        file = root / f"{name}.yaml"
        file.write_text(json.dumps(recipe))
        argv = ["--recipe", file, "--out", root / name, *flags]
        assert main([str(word) for word in argv]) == 0

    for name, kind in (("corpus", "documents"), ("chat", "chats")):
        stage(generate.main, name, {"kind": kind, "count": 300, "max_operand": 49})
    corpus, chat = (f"{n}={root / n / 'rows.jsonl'}" for n in ("corpus", "chat"))
    template = ROOT / "config/models/tiny/chat_template.jinja"
    words = {"vocab_size": 512, "sources": {"corpus": {}}}
    flags = ("--data", corpus, "--chat-template", template)
    stage(tokenizer.main, "tokenizer", words, *flags)
    ready = ("--tokenizer", root / "tokenizer", "--data")
    stage(tokenize.main, "blend", {"sources": {"corpus": {}}}, *ready, corpus)
    packed = {"sequence_length": 256, "sources": {"chat": {}}}
    stage(pack.main, "packed", packed, *ready, chat)
    return root
