"""One switch, and the same graph is built with Megatron-Bridge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import PYTHON, ROOT

CONFIG = """
extends: nvidia.yaml
pretrain: {base: {steps: 400}}
sft: {instruct: {steps: 200}}
grpo: {reasoner: {steps: 20}}
placement: {pretrain: {default: {save_steps: 100}}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with the engine's Python where a build looks for it."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".venv-nvidia/bin").mkdir(parents=True)
    (tmp_path / ".venv-nvidia/bin/python").symlink_to(PYTHON)
    (ROOT / "work/kernels").mkdir(parents=True, exist_ok=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/kernels").symlink_to(ROOT / "work/kernels")
    (tmp_path / "config/chain.yaml").write_text(CONFIG)
    return tmp_path


def snakemake(project: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "local", *words],
        cwd=project,
        env={**os.environ, "PIPELINE_CONFIG": "config/chain.yaml"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def test_the_whole_chain(project: Path, figure: Callable[..., None]):
    said = snakemake(project, "export", "report")
    assert "[done] model: artifacts/export/nano/model" in said
    for node in ("pretrain/base", "sft/instruct", "export/nano"):
        folder = project / "artifacts" / node
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["packages"]["megatron-bridge"]
        assert provenance["python"].startswith("3.12") and provenance["gpu"]
        parity = json.loads((folder / "model/parity.json").read_text())
        assert parity["differs_after_round_trip"] == []
    scores = project / "artifacts/eval/arithmetic/scores/scores.json"
    figure(scores=json.loads(scores.read_text()))
    assert (project / "artifacts/report/main/page/report.html").stat().st_size > 10_000
    assert not (project / "nemo_experiments").exists()

    text = CONFIG.replace("save_steps: 100", "save_steps: 50, micro_batch_size: 8")
    (project / "config/chain.yaml").write_text(text)
    assert "starts" not in snakemake(project, "export", "report")
