"""The README's first command, as it is: it learns, and a second call does nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import ROOT, Project, copy_files

NODES = 15
PEAK_GB = 4


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The repository, with the default config built by `make export`."""
    project = Project(tmp_path_factory.mktemp("default"))
    copy_files(ROOT, project.path)
    project.sh("git", "init", "-q")
    make_export(project)
    project.transcript = project.output
    return project


def make_export(project: Project) -> str:
    venv = Path(sys.prefix)
    return project.sh(
        "make",
        "-o",
        f"{venv}/.ready",
        f"VENV={venv}",
        "export",
        MAKEFLAGS="",
        MAKELEVEL="",
    )


def test_every_stage_is_built_with_its_progress_shown(default: Project):
    done = re.findall(r"(?m)^(\S+/\S+)  done in", default.transcript)
    assert len(done) == NODES
    for node, metric in (("pretrain/base", "loss"), ("grpo/reasoner", "reward")):
        assert re.search(
            rf"{node}  step \d+ of \d+  {metric} .*left", default.transcript
        )
    last = default.transcript.splitlines()[-3:]
    assert last == [
        "[done] model: artifacts/export/nano/model",
        "[done] report: artifacts/report/main/page/report.html",
        "[done] to upload: artifacts/release/nano/model",
    ]


def test_base_sft_and_grpo_are_three_separate_steps_upward(default: Project):
    path = default.path / "artifacts/eval/arithmetic/scores/scores.json"
    scores = json.loads(path.read_text())["scores"]
    by_model = {s["model"]: s for s in scores}
    base, sft, grpo = (
        by_model[m] for m in ("pretrain/base", "sft/instruct", "export/nano")
    )
    assert base["interval"][1] < sft["interval"][0], "SFT is not beyond the base"
    assert sft["interval"][1] < grpo["interval"][0], "GRPO is not beyond SFT"
    assert len({s["items_digest"] for s in scores}) == 1, "not the same items"


SUM = re.compile(
    r"(\d+) ?(?:\+|plus) ?(\d+)|add (\d+) (?:and|to) (\d+)|sum of (\d+) and (\d+)",
    re.IGNORECASE,
)


def sums_in(project: Project, name: str) -> set[tuple[int, ...]]:
    """The sums that a generated dataset states or asks, smaller operand first."""
    path = project.path / f"artifacts/generate/{name}/data/rows.jsonl"
    return {
        tuple(sorted(int(n) for n in found if n))
        for found in SUM.findall(path.read_text())
    }


def test_what_is_uploaded_answers_with_a_sum_and_stops(default: Project):
    from transformers import pipeline

    path = default.path / "artifacts/release/nano/model"
    chat = pipeline("text-generation", model=str(path))
    asked = [[{"role": "user", "content": f"What is {a} + 7?"}] for a in (12, 25, 31)]
    said = [found[0]["generated_text"][-1]["content"] for found in chat(asked)]
    assert all(answer.strip().isdigit() for answer in said), said


def test_no_held_out_item_is_in_any_training_input(default: Project):
    held = sums_in(default, "heldout")
    assert len(held) > 100
    for name in ("corpus", "chat", "arithmetic"):
        given = sums_in(default, name)
        assert len(given) > 500, name
        assert not held & given, name


def test_a_second_export_does_nothing_in_a_few_seconds(default: Project):
    before = default.lock()
    began = time.monotonic()
    text = make_export(default)
    assert "starts" not in text and "[done] model" in text
    assert default.lock() == before
    assert (
        time.monotonic() - began < 60
    )  # seconds on any machine; a build takes minutes


def test_the_chain_needs_little_memory(default: Project):
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    assert peak < PEAK_GB, f"{peak:.1f} GB"


def test_the_repository_ships_no_record_of_a_build():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "dvc.lock" not in tracked
    assert {"dvc.yaml", "config/params.yaml", "Snakefile"} <= set(tracked)
