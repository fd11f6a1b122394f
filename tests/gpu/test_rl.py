"""NeMo-RL trains on rewards and on pairs, through faults, on one GPU and on two."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from scripts.data import generate, prompts
from scripts.lib import serving
from tests.gpu.conftest import GRPO, PAIRS, PYTHON, Run, Stages, write

HELD_OUT = ("arithmetic=config/tasks/arithmetic.yaml", "--data")


def rewards(run: Run) -> list[float]:
    return [round(line["reward"], 3) for line in run.metrics]


def score(stages: Stages, **models: Path) -> dict[str, dict[str, object]]:
    """Scores of models on the held-out sums, by the engine's Transformers."""
    named = []
    for name, folder in models.items():
        model = stages.folder / name
        shutil.copytree(folder, model)
        config = serving.read(model / "config.json")
        serving.write(model / "config.json", serving.as_released(config))
        named += ["--model", f"{name}={model}"]
    asked = f"arithmetic={stages.inputs / 'heldout'}"
    run = stages.start(
        "scripts.eval", {"max_new_tokens": 8}, *(*named, "--task", *HELD_OUT, asked)
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
        first.kill()
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


OWN = "tests.gpu.programs.environments"


def test_several_environments_share_the_reward(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    """One asks again, so that conversations have two turns of the model."""
    recipe = GRPO | {
        "steps": 8,
        "max_turns": 2,
        "max_conversation_tokens": 96,
        "environment": {
            "math": {},
            "tool_use": {},
            "brief": {"weight": 0.5, "import": f"{OWN}:Brief"},
            "again": {"weight": 0.25, "import": f"{OWN}:Again"},
        },
    }
    run = stages.rl("grpo", recipe, chatty).done()
    first, last = run.metrics[0], run.metrics[-1]
    figure(first=first, last=last)
    whole = (
        line["reward_math"]
        + line["reward_tool_use"]
        + 0.5 * line["reward_brief"]
        + 0.25 * line["reward_again"]
        for line in (first, last)
    )
    for line, parts in zip((first, last), whole, strict=True):
        assert line["reward"] == pytest.approx(2 * parts, rel=0.02)  # of two turns
    assert last["reward"] > first["reward"]


def test_a_game_is_played_over_several_turns(
    chatty: Path, stages: Stages, tmp_path: Path, figure: Callable[..., None]
):
    asked = puzzles(stages.inputs, tmp_path)
    recipe = GRPO | {
        "steps": 3,
        "batch_size": 64,
        "max_completion_tokens": 16,
        "max_turns": 2,
        "max_conversation_tokens": 480,
        "environment": "sliding_puzzle",
    }
    run = stages.rl("grpo", recipe, chatty, asked=asked).done()
    figure(metrics=run.metrics)
    assert all(0 <= line["reward"] <= 1 for line in run.metrics)
    assert run.metrics[0]["completion_tokens"] > 16  # of more than one turn


def test_programs_run_in_the_sandbox(
    chatty: Path, stages: Stages, tmp_path: Path, figure: Callable[..., None]
):
    """What the model says is a program where it is a number alone."""
    rows = tmp_path / "rows.jsonl"
    asked = (stages.inputs / "arithmetic/rows.jsonl").read_text().splitlines()
    lines = [json.loads(line) | {"output": "assert __doc__ is None"} for line in asked]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = make_prompts(stages.inputs, rows, tmp_path)
    recipe = GRPO | {"steps": 3, "environment": "code"}
    run = stages.rl("grpo", recipe, chatty, asked=made).done()
    figure(metrics=run.metrics)
    assert 0 < run.metrics[0]["reward"] <= 1


def puzzles(inputs: Path, folder: Path) -> Path:
    """Prompts that are boards."""
    recipe = write(folder / "puzzles.yaml", {"kind": "puzzles", "count": 500})
    rows = folder / "puzzles"
    assert generate.main(["--recipe", str(recipe), "--out", str(rows)]) == 0
    return make_prompts(inputs, rows / "rows.jsonl", folder)


def make_prompts(inputs: Path, rows: Path, folder: Path) -> Path:
    """Rows as a build's prompts."""
    recipe = {"max_prompt_tokens": 400, "sources": {"rows": {}}}
    words = ["--tokenizer", str(inputs / "tokenizer"), "--data", f"rows={rows}"]
    words += ["--recipe", str(write(folder / "asked.yaml", recipe))]
    assert prompts.main([*words, "--out", str(folder / "asked")]) == 0
    return folder / "asked"


def test_dapo_draws_until_answers_differ(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    recipe = GRPO | {"algorithm": "dapo", "steps": 10, "max_completion_tokens": 6}
    run = stages.rl("grpo", recipe, chatty).done()
    figure(metrics=run.metrics)
    assert fmean(rewards(run)[-3:]) > fmean(rewards(run)[:3])
    assert "filtered_reward" in run.metrics[0]


def test_automodel_trains_as_dtensor_does(
    chatty: Path, stages: Stages, figure: Callable[..., None]
):
    line = [PYTHON, "-c", "import nemo_automodel"]
    if subprocess.run(line, check=False, capture_output=True).returncode:
        pytest.skip(f"NOT TESTED: no nemo-automodel in {PYTHON}")
    run = stages.rl("grpo", GRPO, chatty, backend="automodel").done()
    figure(rewards=rewards(run), parity=run.parity)
    assert fmean(rewards(run)[-5:]) > fmean(rewards(run)[:3]) + 0.05
    assert max(line["gen_kl_error"] for line in run.metrics) < 0.01


def test_a_model_of_mamba_and_attention_learns(
    chatty_hybrid: Path, stages: Stages, figure: Callable[..., None]
):
    recipe = GRPO | {"steps": 12}
    run = stages.rl("grpo", recipe, chatty_hybrid, backend="megatron").done()
    found = score(stages, before=chatty_hybrid, after=run.out)
    figure(rewards=rewards(run), parity=run.parity, scores=found)
    assert max(line["gen_kl_error"] for line in run.metrics) < 0.01
    assert fmean(rewards(run)[-3:]) > fmean(rewards(run)[:3])


def test_a_reward_that_is_always_the_same_is_said(chatty: Path, stages: Stages):
    recipe = {"steps": 3, "environment": {"same": {"import": f"{OWN}:Same"}}}
    run = stages.rl("grpo", GRPO | recipe, chatty).done()
    assert "for every completion of 3 steps" in (run.work / "warning.txt").read_text()


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_pairs_teach_a_preference(
    chatty: Path, stages: Stages, backend: str, figure: Callable[..., None]
):
    run = stages.rl("dpo", PAIRS | {"beta": 0.1}, chatty, backend=backend).done()
    last = run.metrics[-1]
    figure(backend=backend, last=last, parity=run.parity)
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
