"""NeMo-RL trains on rewards and on pairs, through faults, on one GPU and on two."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from tests.gpu.conftest import GRPO, PAIRS, Run, Stages

HELD_OUT = ("arithmetic=config/tasks/arithmetic.yaml", "--data")


def rewards(run: Run) -> list[float]:
    return [round(line["reward"], 3) for line in run.metrics]


def score(stages: Stages, **models: Path) -> dict[str, dict[str, object]]:
    """Scores of models on the held-out sums, by vLLM."""
    named = [w for n, folder in models.items() for w in ("--model", f"{n}={folder}")]
    asked = f"arithmetic={stages.inputs / 'heldout'}"
    run = stages.start(
        "scripts.nvidia.eval",
        {"max_new_tokens": 8},
        *(*named, "--task", *HELD_OUT, asked, "--generation-memory", "0.2"),
    ).done()
    found = json.loads((run.out / "scores.json").read_text())["scores"]
    return {line["model"]: line for line in found}


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_rewards_rise_and_so_does_the_held_out_score(
    chatty: Path, stages: Stages, backend: str, figure: Callable[..., None]
):
    run = stages.rl("grpo", GRPO, chatty, backend=backend).done()
    found = score(stages, before=chatty, after=run.out)
    figure(backend=backend, rewards=rewards(run), parity=run.parity, scores=found)
    assert fmean(rewards(run)[-5:]) > fmean(rewards(run)[:3]) + 0.05
    assert found["after"]["interval"][0] > found["before"]["interval"][1]  # type: ignore[index]
    assert max(line["gen_kl_error"] for line in run.metrics) < 0.01


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_run_goes_on_from_its_last_whole_save(
    chatty: Path,
    stages: Stages,
    tmp_path: Path,
    backend: str,
    how: str,
    figure: Callable[..., None],
):
    work = tmp_path / "work"
    recipe = GRPO | {"steps": 10}
    flags = ["--save-steps", "3"]
    first = stages.rl("grpo", recipe, chatty, *flags, backend=backend, work=work)
    first.when(lambda: steps(work) >= 4, 500)
    if how == "stop":
        (work / "stop").touch()
        assert first.wait() == 75, first.text()[-3000:]
        (work / "stop").unlink()
        saved = int((work / "stopped").read_text())
        assert saved in (4, 5, 6)
    else:
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
        (work / "saves/tmp_step_4").mkdir(parents=True)  # as a kill may leave it
        saved = 3
    second = stages.rl("grpo", recipe, chatty, *flags, backend=backend, work=work)
    second.done()
    assert f"resuming from step {saved}" in second.text()
    assert "Optimizer will be freshly initialized" not in second.text()
    assert [line["step"] for line in second.metrics] == list(range(1, 11))
    figure(backend=backend, how=how, saved=saved, rewards=rewards(second))


def steps(work: Path) -> int:
    path = work / "steps.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_several_environments_share_the_reward(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    recipe = GRPO | {
        "steps": 3,
        "environment": {"math": {}, "code": {"weight": 0.0}, "brief": OWN},
    }
    own = Path("environments_of_tests.py")
    own.write_text(BRIEF)
    try:
        run = stages.rl("grpo", recipe, chatty).done()
    finally:
        own.unlink()
    line = json.loads((run.work / "steps.jsonl").read_text().splitlines()[0])
    assert line["reward/brief"] == 1.0
    assert line["reward"] == pytest.approx(line["reward/math"] + 0.5, abs=1e-3)
    figure(line={k: v for k, v in line.items() if k.startswith("reward")})


OWN = {"weight": 0.5, "import": "environments_of_tests:Brief"}
BRIEF = """
class Brief:
    def step(self, messages, row):
        return float(len(messages[-1]["content"]) < 9)
"""


def test_a_reward_that_is_always_the_same_is_said(chatty: Path, stages: Stages):
    own = {"same": {"import": "environments_of_tests:Same"}}
    path = Path("environments_of_tests.py")
    path.write_text(
        "class Same:\n    def step(self, messages, row):\n        return 1.0\n"
    )
    try:
        run = stages.rl("grpo", GRPO | {"steps": 3, "environment": own}, chatty).done()
    finally:
        path.unlink()
    assert "for every completion of 3 steps" in (run.work / "warning.txt").read_text()


def test_pairs_teach_a_preference(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    run = stages.rl("dpo", PAIRS | {"beta": 0.1}, chatty).done()
    last = run.metrics[-1]
    figure(last=last, parity=run.parity)
    assert run.metrics[0]["loss"] == pytest.approx(0.693, abs=0.01)
    assert last["loss"] < 0.6 and last["validation_accuracy"] > 0.7


def test_a_reward_model_tells_answers_apart_and_rewards(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    run = stages.rl("rm", PAIRS, chatty).done()
    last = run.metrics[-1]
    assert last["validation_accuracy"] > 0.6
    named = {"reward_model": {}, "math": {"weight": 0.5}}
    recipe = GRPO | {"steps": 3, "environment": named}
    rewarded = stages.rl("grpo", recipe, chatty, "--reward-model", run.out).done()
    line = json.loads((rewarded.work / "steps.jsonl").read_text().splitlines()[0])
    figure(last=last, line={k: v for k, v in line.items() if k.startswith("reward")})
    assert {"reward/reward_model", "reward/math"} <= set(line)


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    "flags",
    [
        ["--generation-gpus", "1"],
        ["--generation-tensor-parallel", "2"],
        ["--tensor-parallel", "2", "--generation-tensor-parallel", "2"],
    ],
    ids=["apart", "tp-generation", "tp"],
)
def test_two_gpus_learn_too(
    chatty: Path, stages: Stages, flags: list[str], figure: Callable[..., None]
):
    recipe = GRPO | {"steps": 10}
    run = stages.rl("grpo", recipe, chatty, *flags, backend="megatron", gpus=2).done()
    figure(flags=flags, rewards=rewards(run), parity=run.parity)
    assert max(line["gen_kl_error"] for line in run.metrics) < 0.01
    assert fmean(rewards(run)[-3:]) > rewards(run)[0] - 0.1
