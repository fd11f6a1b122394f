"""vLLM gives a model the scores that Transformers does, on one GPU or two.

Needs vLLM and lm-evaluation-harness in the engine's Python, as envs/nemo-rl.lock pins.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.data import generate
from tests.gpu.conftest import PYTHON, ROOT, Run, Stages, num_gpus, write

ITEMS = 200
RECIPE = {"max_new_tokens": 64, "num_samples": ITEMS}
HAS = (
    "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
)
VLLM = "scripts.nvidia.eval"
SMALL = ("--generation-memory", "0.1")  # other tests use the GPU at the same time


@pytest.fixture(autouse=True)
def with_vllm() -> None:
    line = [PYTHON, "-c", HAS, "vllm", "lm_eval"]
    if subprocess.run(line, check=False).returncode:
        pytest.skip(f"NOT TESTED: no vLLM, or no lm-eval, in {PYTHON}")


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The flags of a task and its held-out items."""
    recipe = {"kind": "heldout", "count": ITEMS, "max_operand": 49}
    file, out = write(tmp_path / "heldout.yaml", recipe), tmp_path / "heldout"
    assert generate.main(["--recipe", str(file), "--out", str(out)]) == 0
    task = ROOT / "config/tasks/arithmetic.yaml"
    return ["--task", f"sums={task}", "--data", f"sums={out / 'rows.jsonl'}"]


def scores(out: Path) -> dict[str, Any]:
    """{model: score}."""
    found = json.loads((out / "scores.json").read_text())["scores"]
    return {score["model"]: score for score in found}


def answers(out: Path, model: str) -> list[str]:
    lines = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    found = [line["answer"] for line in lines if line["model"] == model]
    assert len(found) == ITEMS
    return found


def alike(one: list[str], other: list[str]) -> float:
    """The share of items with the same answer."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / ITEMS


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Each score is within the other's interval."""
    pairs = ((one, other), (other, one))
    return all(a["interval"][0] <= b["score"] <= a["interval"][1] for a, b in pairs)


def test_vllm_gives_the_scores_that_transformers_does(
    base: Run,
    stages: Stages,
    asked: list[str],
    figure: Callable[..., None],
):
    folder = stages.sft(base.out).done().out
    both = ["--model", f"a={folder}", "--model", f"b={folder}"]
    theirs = stages.start("scripts.eval", RECIPE, *both[:2], *asked).done().out
    run = stages.start(VLLM, RECIPE, *both, *asked, *SMALL, alone=True).done()
    slow, fast = scores(theirs)["a"], scores(run.out)
    share = alike(answers(theirs, "a"), answers(run.out, "a"))
    found = [slow["score"], fast["a"]["score"], fast["b"]["score"]]
    figure(scores=found, identical_answers=share)
    assert {s["items_digest"] for s in (slow, *fast.values())} == {slow["items_digest"]}
    assert slow["num_items"] == ITEMS
    assert agree(slow, fast["a"])
    assert answers(run.out, "a") == answers(run.out, "b")
    seen = json.loads((run.work / "environment.json").read_text())
    assert seen["gpu"] and seen["seen"]["vllm"]


@pytest.mark.gpus(2)
def test_two_gpus_give_the_scores_of_one(
    hybrid: Run,
    stages: Stages,
    asked: list[str],
    figure: Callable[..., None],
):
    if num_gpus() < 2:
        pytest.skip("NOT TESTED: vLLM puts no two of its processes on one GPU")
    words = ["--model", f"a={hybrid.out}", *asked, *SMALL]
    one = stages.start(VLLM, RECIPE, *words, alone=True).done().out
    words += ["--tensor-parallel", "2"]
    two = stages.start(VLLM, RECIPE, *words, gpus=2, alone=True).done().out
    share = alike(answers(one, "a"), answers(two, "a"))
    figure(
        identical_answers=share, scores=[scores(x)["a"]["score"] for x in (one, two)]
    )
    assert agree(scores(one)["a"], scores(two)["a"])
