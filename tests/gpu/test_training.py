"""Megatron-Bridge trains what the recipe says, through faults and parallel sizes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from tests.gpu.conftest import Run, Stages

ALIKE = 0.02
"""Relative difference of mean losses that bfloat16 and another order of sums may make."""


def apart(one: Run, other: Run, last: int = 5) -> float:
    """The relative difference of the means of the last losses."""
    a, b = fmean(one.losses[-last:]), fmean(other.losses[-last:])
    return abs(a - b) / b


def curve(run: Run) -> list[float]:
    return [round(loss, 4) for loss in run.losses]


def test_pretraining_learns(base: Run, figure: Callable[..., None]):
    assert [line["step"] for line in base.metrics][-1] == 300
    assert base.losses[0] > 4 and base.losses[-1] < 1.3
    assert base.metrics[-1]["tokens"] == 300 * 16 * 128
    figure(losses=curve(base), parity=base.parity)


def test_a_run_that_was_stopped_goes_on_with_the_same_curve(
    base: Run, stages: Stages, tmp_path: Path, figure: Callable[..., None]
):
    work = tmp_path / "work"
    first = stages.pretrain("--save-steps", "1000", work=work)
    first.when(lambda: len(steps(work)) > 60)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text()[-3000:]
    stopped = int((work / "stopped").read_text())
    assert 60 < stopped < 300 and not (first.out / "metrics.jsonl").exists()

    second = stages.pretrain("--save-steps", "1000", work=work).done()
    assert f"resuming from step {stopped}" in second.text()
    assert [line["step"] for line in second.metrics] == [
        line["step"] for line in base.metrics
    ]
    worst = max(abs(a - b) / b for a, b in zip(second.losses, base.losses, strict=True))
    assert worst < ALIKE
    figure(stopped=stopped, worst=worst, losses=curve(second))
    assert not (Path.cwd() / "nemo_experiments").exists()


def steps(work: Path) -> list[str]:
    path = work / "steps.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_after_a_kill_the_newest_whole_save_counts(
    base: Run, stages: Stages, tmp_path: Path, figure: Callable[..., None]
):
    work = tmp_path / "work"
    first = stages.pretrain("--save-steps", "50", work=work)
    first.when(lambda: (work / "saves/iter_0000150/whole.json").exists())
    first.kill()
    saves = work / "saves"
    newest = max(saves.glob("iter_*"))
    (newest / "whole.json").unlink(missing_ok=True)  # its trackers name it already

    second = stages.pretrain("--save-steps", "50", work=work).done()
    assert f"skipping {newest.name}: not a whole save" in second.text()
    step = int(newest.name.rpartition("_")[2]) - 50
    assert f"resuming from step {step}" in second.text()
    assert apart(second, base) < ALIKE
    figure(resumed=step, apart=apart(second, base))


def test_a_run_killed_before_it_was_published_is_published(
    stages: Stages, tmp_path: Path
):
    work = tmp_path / "work"
    first = stages.pretrain("--save-steps", "30", work=work, steps=60)
    first.when(lambda: (work / "saves/iter_0000060/whole.json").exists())
    first.kill()
    before = (work / "saves/iter_0000060/whole.json").stat().st_mtime_ns
    second = stages.pretrain("--save-steps", "30", work=work, steps=60).done()
    assert "resuming from step 60" in second.text()
    assert (work / "saves/iter_0000060/whole.json").stat().st_mtime_ns == before
    assert [line["step"] for line in second.metrics] == [10, 20, 30, 40, 50, 60]
    assert second.parity["differs_on_disk"] == []


def test_a_loss_that_is_no_number_is_named(stages: Stages):
    run = stages.pretrain(lr=1e12, max_grad_norm=1e12, warmup_steps=0, steps=50)
    assert run.wait() == 1
    assert "the loss is nan" in run.error, run.text()[-3000:]


def test_a_split_is_held_back_for_validation(
    stages: Stages, figure: Callable[..., None]
):
    overrides = {
        "dataset.split": "90,10,0",
        "validation.eval_iters": 2,
        "validation.eval_interval": 50,
    }
    run = stages.pretrain(steps=100, overrides=overrides).done()
    found = {
        line["step"]: line["validation_loss"]
        for line in run.metrics
        if "validation_loss" in line
    }
    figure(validation=found)
    assert 50 in found and abs(found[50] - run.losses[4]) < 0.5


def test_a_save_of_another_model_is_refused(stages: Stages, tmp_path: Path):
    work = tmp_path / "work"
    stages.pretrain(work=work, steps=30).done()
    other = stages.pretrain(model="qwen3_small", work=work, steps=30)
    assert other.wait() == 1
    assert "was trained from another model" in other.error, other.text()[-3000:]


def test_arithmetic_that_the_gpu_lacks_is_refused_by_name(stages: Stages):
    run = stages.pretrain(precision="nvfp4")
    assert run.wait() == 1
    assert "precision nvfp4" in run.error and "10.0" in run.error, run.text()[-3000:]


def test_settings_that_megatron_refuses_are_said_in_one_line(stages: Stages):
    run = stages.pretrain("--tensor-parallel", "3", gpus=1)
    assert run.wait() == 1
    assert run.error.startswith("error: "), run.text()[-3000:]


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_delayed"])
def test_eight_bits_learn_as_sixteen_do(
    hybrid: Run, stages: Stages, precision: str, figure: Callable[..., None]
):
    run = stages.pretrain(model="hybrid4b_small", precision=precision).done()
    figure(losses=curve(run), bf16=curve(hybrid), apart=apart(run, hybrid))
    assert apart(run, hybrid) < 0.05


@pytest.mark.parametrize("model", ["hybrid", "experts"])
def test_models_of_other_shapes_learn(
    request: pytest.FixtureRequest, model: str, figure: Callable[..., None]
):
    run: Run = request.getfixturevalue(model)
    assert run.losses[-1] < 1.5 < 4 < run.losses[0]
    figure(losses=curve(run), parity=run.parity)


def test_a_qwen_shaped_model_learns_by_a_recipe_of_bridge(
    stages: Stages, figure: Callable[..., None]
):
    recipe = "qwen3_600m_pretrain_config"
    run = stages.pretrain(model="qwen3_small", recipe=recipe).done()
    assert run.losses[-1] < 1.5
    figure(recipe=recipe, losses=curve(run), parity=run.parity)


# ---- parallel sizes ------------------------------------------------------------


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (["--tensor-parallel", "2"], "hybrid4b_small"),
        (["--tensor-parallel", "2", "--sequence-parallel", "false"], "hybrid4b_small"),
        (["--pipeline-parallel", "2"], "hybrid4b_small"),
        (["--context-parallel", "2"], "hybrid4b_small"),
        ([], "hybrid4b_small"),
        (["--distributed-optimizer", "false"], "hybrid4b_small"),
        (["--expert-parallel", "2"], "nano3_small"),
        (["--tensor-parallel", "2", "--expert-tensor-parallel", "2"], "nano3_small"),
    ],
    ids=["tp", "tp-without-sp", "pp", "cp", "dp", "dp-plain", "ep", "etp"],
)
def test_two_gpus_learn_as_one_does(
    request: pytest.FixtureRequest,
    stages: Stages,
    flags: list[str],
    model: str,
    figure: Callable[..., None],
):
    one = request.getfixturevalue({"hybrid4b_small": "hybrid"}.get(model, "experts"))
    two = stages.pretrain(*flags, model=model, gpus=2).done()
    figure(flags=flags, losses=curve(two), apart=apart(two, one), parity=two.parity)
    assert apart(two, one) < 0.05  # their first weights differ


@pytest.mark.gpus(2)
def test_virtual_stages_learn_as_one_gpu_does(
    stages: Stages, figure: Callable[..., None]
):
    flags = ["--pipeline-parallel", "2", "--virtual-pipeline", "2"]
    one = stages.pretrain(model="qwen3_small", steps=150)
    two = stages.pretrain(*flags, model="qwen3_small", gpus=2, steps=150).done()
    one.done()
    figure(losses=curve(two), one=curve(one), parity=two.parity)
    assert apart(two, one) < 0.05


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("flag", "model", "alone"),
    [
        ("--tensor-parallel", "hybrid4b_small", "hybrid"),
        ("--pipeline-parallel", "hybrid4b_small", "hybrid"),
        ("--expert-parallel", "nano3_small", "experts"),
    ],
)
def test_a_run_goes_on_under_other_parallel_sizes(
    request: pytest.FixtureRequest,
    stages: Stages,
    tmp_path: Path,
    figure: Callable[..., None],
    flag: str,
    model: str,
    alone: str,
):
    """Begun on two GPUs, gone on with on one, ended on two."""
    work, one = tmp_path / "work", request.getfixturevalue(alone)
    two = {"gpus": 2, "model": model, "work": work}
    flags = [flag, "2", "--save-steps", "1000"]

    def stopped(run: Run, after: int) -> str:
        run.when(lambda: len(steps(work)) > after)
        (work / "stop").touch()
        run.wait()
        (work / "stop").unlink()
        return f"resuming from step {(work / 'stopped').read_text()}\n"

    begun = stopped(stages.pretrain(*flags, **two), 60)
    second = stages.pretrain("--save-steps", "1000", model=model, work=work)
    gone_on = stopped(second, 130)
    last = stages.pretrain(*flags, **two).done()
    assert begun in second.text() and gone_on in last.text()
    figure(stopped=[begun, gone_on], losses=curve(last), apart=apart(last, one))
    assert apart(last, one) < 0.05


# ---- fine-tuning ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_fine_tuning_learns(
    hybrid: Run, stages: Stages, method: str, figure: Callable[..., None]
):
    peft = {"method": method, "rank": 16, "alpha": 32}
    recipe = {} if method == "full" else {"peft": peft, "lr": 5e-3}
    run = stages.sft(hybrid.out, **recipe).done()
    figure(losses=curve(run), parity=run.parity)
    assert run.losses[-1] < 0.5 * run.losses[0]
    files = {path.name for path in (run.out / "adapter").glob("*")}
    expected = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == (set() if method == "full" else expected)


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    "flags",
    [["--tensor-parallel", "2"], ["--pipeline-parallel", "2"], []],
    ids=["tp", "pp", "dp"],
)
def test_fine_tuning_from_the_same_weights_is_the_same_on_two_gpus(
    hybrid: Run, stages: Stages, flags: list[str], figure: Callable[..., None]
):
    one = stages.sft(hybrid.out, steps=40)
    two = stages.sft(hybrid.out, *flags, gpus=2, steps=40).done()
    one.done()
    worst = max(abs(a - b) / b for a, b in zip(two.losses, one.losses, strict=True))
    figure(flags=flags, worst=worst, losses=curve(two), one=curve(one))
    assert worst < ALIKE


@pytest.mark.gpus(2)
def test_pretrained_on_two_fine_tuned_on_one(
    stages: Stages, figure: Callable[..., None]
):
    two = stages.pretrain(
        *("--tensor-parallel", "2"), model="hybrid4b_small", gpus=2, steps=150
    ).done()
    one = stages.sft(two.out, steps=60).done()
    figure(pretrain=curve(two), sft=curve(one))
    assert one.losses[-1] < 0.6 * one.losses[0]
