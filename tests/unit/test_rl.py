"""What the NeMo-RL stages do around NeMo-RL: settings, saves, what is logged, data."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scripts.data import tokenizer
from scripts.lib import cli, outputs, rl_options, tracking
from scripts.lib.errors import DataError, RecipeError, UserError
from scripts.lib.schema import DpoRecipe, GrpoRecipe, RmRecipe
from scripts.nvidia import dpo, grpo, rl, rm

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "config/models/tiny/chat_template.jinja"
DENSE = {"model_type": "qwen3", "hidden_act": "silu", "max_position_embeddings": 512}
HYBRID = {"model_type": "nemotron_h", "mlp_hidden_act": "relu2"}
TRAINED = {"steps": 6, "batch_size": 16, "lr": 1.0}
GRPO = TRAINED | {"num_generations": 4, "max_completion_tokens": 20}
BACKENDS = ("megatron", "dtensor", "automodel")


@pytest.fixture(autouse=True)
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings on every machine."""
    monkeypatch.setattr(rl, "has_flash", lambda: False)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """Parsed flags of a stage, and the folders that they name."""

    def make(backend: str = "dtensor", flags: str = "") -> argparse.Namespace:
        words = ["--recipe", "R", "--out", str(tmp_path / "out"), "--backend", backend]
        words += ["--parent", str(tmp_path / "parent"), "--gpus", "1", "--cpus", "8"]
        args = cli.parse(rl.parser(""), [*words, *flags.split()])
        args.prompts = tmp_path / "prompts"
        args.preferences, args.reward_model = tmp_path / "preferences", None
        return args

    return make


def recipe(**settings: Any) -> GrpoRecipe:
    return GrpoRecipe.model_validate(GRPO | settings)


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as the data stages write them: one a line, not escaped."""
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the command line ------------------------------------------------------------


def test_a_backend_is_named_by_who_starts_a_script(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        rl.parser("").parse_args(["--recipe", "R", "--out", "O", "--parent", "P"])
    assert "--backend" in capsys.readouterr().err


def test_flags_of_generation_are_numbers_of_their_kinds(make: Any):
    args = make(flags="--generation-memory 0.3 --generation-gpus 2 --nodes 3")
    assert (args.generation_memory, args.generation_gpus, args.nodes) == (0.3, 2, 3)


# ---- settings --------------------------------------------------------------------


def test_overrides_lie_over_settings_section_by_section():
    settings = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": {"g": 1}}
    found = rl.merge(
        settings, rl.nested({"a.c.d": 3, "a.c.x": None, "e": [9], "h.i": {"j": 1}})
    )
    assert found is settings
    assert found == {
        "a": {"b": 1, "c": {"d": 3, "x": None}},
        "e": [9],
        "f": {"g": 1},
        "h": {"i": {"j": 1}},
    }
    assert rl.merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert rl.nested(None) == {} == rl.nested({})


@pytest.mark.parametrize(
    ("seen", "counted"),
    [("", False), ("0, 1", False), ("1", True), ("1,0", True), ("3, 2", True)],
)
def test_megatron_counts_gpus_as_pytorch_does_where_ray_counts_otherwise(
    make: Any, monkeypatch: pytest.MonkeyPatch, seen: str, counted: bool
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    found = rl.policy(recipe(), make("megatron"), DENSE, 64)["megatron_cfg"]
    hook = {rl.SETUP_HOOK: "scripts.nvidia.gpus.as_pytorch_counts"}
    assert found["env_vars"] == (hook if counted else {})


def test_gpus_without_numbers_are_refused_for_megatron(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a8fd957")
    with pytest.raises(UserError, match="by their numbers"):
        rl.policy(recipe(), make("megatron"), DENSE, 64)
    assert rl.policy(recipe(), make("dtensor"), DENSE, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_is_the_recipes_whatever_trains_it(make: Any, backend: str):
    args = make(backend, "--micro-batch-size 4")
    found = rl.policy(recipe(max_grad_norm=0.7), args, DENSE, 64)
    assert found["model_name"] == str(args.parent.absolute())
    assert found["tokenizer"] == {"name": found["model_name"]}
    assert found["train_global_batch_size"] == 16
    assert found["train_micro_batch_size"] == found["logprob_batch_size"] == 4
    assert found["max_total_sequence_length"] == 64
    assert found["max_grad_norm"] == 0.7 and found["precision"] == "bfloat16"
    megatron = backend == "megatron"
    assert found["megatron_cfg"]["enabled"] is megatron
    assert found["dtensor_cfg"]["enabled"] is not megatron
    assert (found["optimizer"] is None) is megatron
    assert found["dtensor_cfg"].get("_v2", False) is (backend == "automodel")


@pytest.mark.parametrize(
    ("flags", "multiple"),
    [
        ("", 1),
        ("--tensor-parallel 2", 2),
        ("--context-parallel 2", 4),
        ("--tensor-parallel 2 --context-parallel 2", 8),
    ],
)
def test_sequences_are_padded_so_that_gpus_can_share_them(
    make: Any, flags: str, multiple: int
):
    args = make("megatron", flags)
    found = rl.policy(recipe(), args, DENSE, 64)
    assert found["make_sequence_length_divisible_by"] == multiple
    split = rl.policy(recipe(), make("dtensor", flags), DENSE, 64)["dtensor_cfg"]
    assert split["tensor_parallel_size"] == args.tensor_parallel
    assert split["context_parallel_size"] == args.context_parallel


def test_sequences_are_packed_where_their_attention_is_kept_apart(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    def packed(backend: str) -> object:
        found = rl.policy(recipe(), make(backend), DENSE, 64)
        return found["sequence_packing"]["enabled"]

    assert not packed("megatron")
    monkeypatch.setattr(rl, "has_flash", lambda: True)
    assert packed("megatron") and not packed("dtensor")


def test_megatron_is_told_how_to_split(make: Any):
    flags = "--tensor-parallel 2 --pipeline-parallel 3 --context-parallel 4"
    flags += " --expert-parallel 5 --expert-tensor-parallel 6"
    found = rl.megatron(recipe(), make("megatron", flags), DENSE)
    assert found["tensor_model_parallel_size"] == 2
    assert found["pipeline_model_parallel_size"] == 3
    assert found["context_parallel_size"] == 4
    assert found["expert_model_parallel_size"] == 5
    assert found["expert_tensor_parallel_size"] == 6
    assert found["sequence_parallel"] is True, "by default, where matrices are shared"
    off = make("megatron", flags + " --sequence-parallel false")
    assert rl.megatron(recipe(), off, DENSE)["sequence_parallel"] is False
    assert rl.megatron(recipe(), make("megatron"), DENSE)["sequence_parallel"] is False


@pytest.mark.parametrize("shared", ["true", "false"])
def test_megatrons_optimizer_is_the_recipes(make: Any, shared: str):
    settled = recipe(lr=0.25, weight_decay=0.5, max_grad_norm=0.7)
    args = make("megatron", f"--distributed-optimizer {shared}")
    found = rl.megatron(settled, args, DENSE)
    optimizer = found["optimizer"]
    assert optimizer["lr"] == 0.25 and optimizer["min_lr"] == 0.0
    assert optimizer["weight_decay"] == 0.5 and optimizer["clip_grad"] == 0.7
    is_shared = shared == "true"
    assert optimizer["use_distributed_optimizer"] is is_shared
    assert optimizer["use_precision_aware_optimizer"] is is_shared
    overlap = found["distributed_data_parallel_config"]["overlap_param_gather"]
    assert overlap is False, "vLLM would get weights of the step before"


@pytest.mark.parametrize(
    ("config", "fused"),
    [(DENSE, True), (HYBRID, False), ({"mlp_hidden_act": "relu2"}, False), ({}, True)],
)
def test_a_kernel_that_a_model_lacks_is_not_asked_for(
    make: Any, config: dict[str, Any], fused: bool
):
    found = rl.megatron(recipe(), make("megatron"), config)
    assert found["bias_activation_fusion"] is fused


def test_without_flash_attention_the_kernel_takes_any_length(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    found = rl.megatron(recipe(), make("megatron"), DENSE)
    assert found["attention_backend"] == "unfused" and not found["apply_rope_fusion"]
    monkeypatch.setattr(rl, "has_flash", lambda: True)
    found = rl.megatron(recipe(), make("megatron"), DENSE)
    assert "attention_backend" not in found and found["apply_rope_fusion"]


# ---- schedules -------------------------------------------------------------------

STYLES = {
    "linear": ("linear", 2),
    "cosine": ("cosine", 2),
    "constant": ("constant", 0),
    "constant_with_warmup": ("constant", 2),
}
AFTER = {
    "linear": [1.0, 0.75, 0.5, 0.25],
    "cosine": [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)],
    "constant_with_warmup": [1.0] * 4,
}
"""Shares of the learning rate from the end of a warmup of two steps, of six."""


@pytest.mark.parametrize("scheduler", STYLES)
def test_megatron_is_told_the_schedule(make: Any, scheduler: str):
    settled = recipe(lr_scheduler=scheduler, warmup_steps=2)
    found = rl.megatron(settled, make("megatron"), DENSE)["scheduler"]
    style, warmup = STYLES[scheduler]
    assert found == {
        "lr_decay_style": style,
        "lr_decay_iters": 6,
        "lr_warmup_iters": warmup,
        "lr_warmup_init": 0.0,
    }


def rates(settled: GrpoRecipe) -> list[float]:
    """The learning rate of each step, as NeMo-RL makes PyTorch's schedule of a list.

    It takes `milestones` from the list, whatever its length, and has no default.
    """
    found = rl.torch_optimizer(settled)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], **found["optimizer"]["kwargs"])
    schedulers = []
    for entry in found["scheduler"]:
        if "name" in entry:
            module, _, name = entry["name"].rpartition(".")
            assert module == "torch.optim.lr_scheduler"
            kind = getattr(torch.optim.lr_scheduler, name)
            schedulers.append(kind(optimizer, **entry["kwargs"]))
        else:
            milestones = entry["milestones"]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones)
    taken = []
    for _ in range(settled.steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return taken


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("scheduler", AFTER)
def test_pytorchs_schedule_warms_up_and_goes_down(scheduler: str):
    found = rates(recipe(lr_scheduler=scheduler, warmup_steps=2))
    assert found == pytest.approx([1 / 3, 2 / 3, *AFTER[scheduler]], abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "first", "last"),
    [
        ("linear", 1.0, 1 / 6),
        ("cosine", 1.0, (1 + math.cos(math.pi * 5 / 6)) / 2),
        ("constant", 1.0, 1.0),
        ("constant_with_warmup", 1.0, 1.0),
    ],
)
def test_pytorchs_schedule_needs_no_warmup(scheduler: str, first: float, last: float):
    found = rates(recipe(lr_scheduler=scheduler))
    assert found[0] == pytest.approx(first) and found[-1] == pytest.approx(last)


def test_a_constant_schedule_ignores_a_warmup():
    assert rates(recipe(lr_scheduler="constant", warmup_steps=2)) == [1.0] * 6


def test_pytorchs_optimizer_is_the_recipes():
    found = rl.torch_optimizer(recipe(lr=0.25, weight_decay=0.5))["optimizer"]
    assert found["name"] == "torch.optim.AdamW"
    assert found["kwargs"]["lr"] == 0.25 and found["kwargs"]["weight_decay"] == 0.5


# ---- where a run is --------------------------------------------------------------


def test_nemo_rl_logs_where_the_config_says(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking.os, "environ", {**os.environ})
    monkeypatch.setattr(tracking, "has", lambda package: True)
    args = make()
    args.logging = {
        "tensorboard": True,
        "wandb": {"project": "nano", "entity": "lab", "mode": "offline"},
        "mlflow": {"tracking_uri": "https://host", "experiment": "nano"},
        **{"run": "grpo/reasoner", "id": "grpo-reasoner-0123456789ab"},
    }
    logger = rl.around(args)["logger"]
    options = json.loads(rl_options.OPTIONS.read_text())["algorithms"]["grpo"]
    for key, value in logger.items():
        for inner in value if isinstance(value, dict) else ("",):
            assert f"logger.{key}.{inner}".rstrip(".") in options or key == "log_dir"
    assert all(logger[f"{name}_enabled"] is True for name in tracking.NAMES)
    assert logger["wandb"]["name"] == logger["mlflow"]["run_name"] == "grpo/reasoner"
    assert os.environ["WANDB_RUN_ID"] == "grpo-reasoner-0123456789ab"
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_DIR"] == str(args.work.absolute())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_saves_and_logs_in_its_work_folder_alone(make: Any, backend: str):
    args = make(backend, "--save-steps 7 --nodes 2")
    found = rl.around(args)
    saving = found["checkpointing"]
    assert saving["enabled"] and saving["save_optimizer"]
    assert saving["checkpoint_dir"] == str((args.work / "saves").absolute())
    assert saving["save_period"] == 7
    assert saving["metric_name"] is None, "the newest are kept, not the best"
    assert found["logger"]["log_dir"] == str((args.work / "logs").absolute())
    assert not any(found["logger"][key] for key in found["logger"] if key != "log_dir")
    assert found["cluster"] == {"gpus_per_node": 1, "num_nodes": 2}
    automodel = backend == "automodel"
    assert saving["model_save_format"] == ("torch_save" if automodel else None)
    assert ("is_async" in saving) is automodel


def test_each_backend_has_settings_of_nemo_rl_to_start_from():
    for backend in BACKENDS:
        assert ("grpo", rl.family(backend)) in rl.SHIPPED
        assert ("dpo", rl.family(backend)) in rl.SHIPPED
    assert rl.family("automodel") == "dtensor"
    assert ("rm", "megatron") not in rl.SHIPPED


# ---- saves -----------------------------------------------------------------------


def save(work: Path, name: str, whole: bool = True) -> Path:
    folder = work / "saves" / name
    (folder / "policy/weights").mkdir(parents=True)
    if whole:
        (folder / "training_info.json").write_text("{}")
    return folder


def left(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "saves").glob("*"))


def test_the_newest_save_is_taken_by_number(tmp_path: Path):
    for step in (9, 100, 20):
        save(tmp_path, f"step_{step}")
    assert rl.newest(tmp_path) == tmp_path / "saves/step_100"
    assert left(tmp_path) == ["step_100", "step_20", "step_9"]
    assert rl.newest(tmp_path / "none") is None


def test_what_a_kill_left_of_a_save_is_removed(tmp_path: Path):
    save(tmp_path, "step_10")
    save(tmp_path, "tmp_step_20")
    assert rl.newest(tmp_path) == tmp_path / "saves/step_10"
    assert left(tmp_path) == ["step_10"], "NeMo-RL would write among its files"


def test_a_save_that_was_to_be_replaced_is_put_back(tmp_path: Path):
    save(tmp_path, "old_step_10")
    save(tmp_path, "tmp_step_10")
    assert rl.newest(tmp_path) == tmp_path / "saves/step_10"
    assert left(tmp_path) == ["step_10"]


def test_a_save_that_was_replaced_gives_way(tmp_path: Path):
    save(tmp_path, "old_step_10")
    (save(tmp_path, "step_10") / "new").touch()
    assert (rl.newest(tmp_path) / "new").exists()  # type: ignore[operator]
    assert left(tmp_path) == ["step_10"]


def test_a_folder_without_its_information_is_no_save(tmp_path: Path):
    save(tmp_path, "step_10")
    save(tmp_path, "step_20", whole=False)
    assert rl.newest(tmp_path) == tmp_path / "saves/step_10"


def test_a_run_without_a_whole_save_starts_anew(make: Any):
    args = make("dtensor")
    save(args.work, "step_20", whole=False)
    (args.work / outputs.STOPPED).write_text("20")
    assert rl.prepare_resume(args, 50) == 0
    assert left(args.work) == []
    assert (args.work / "backend").read_text() == "dtensor"
    assert not (args.work / outputs.STOPPED).exists(), "it has not stopped this time"


def test_a_run_goes_on_from_its_step(make: Any, capsys: pytest.CaptureFixture[str]):
    args = make("dtensor")
    rl.prepare_resume(args, 50)
    save(args.work, "step_20")
    assert rl.prepare_resume(args, 50) == 20
    assert "resuming from step 20" in capsys.readouterr().out
    assert not (args.work / "saves/step_20/policy/optimizer").exists()
    assert rl.prepare_resume(args, 20) == 20, "done"


def test_a_save_of_another_backend_is_refused_and_kept(make: Any):
    rl.prepare_resume(make("megatron"), 50)
    args = make("dtensor")
    save(args.work, "step_20")
    with pytest.raises(UserError, match="dtensor, but the save") as refused:
        rl.prepare_resume(args, 50)
    assert refused.value.where == "placement.backend"
    assert "set backend: megatron, or remove" in refused.value.hint
    assert left(args.work) == ["step_20"]


def test_megatrons_optimizer_is_loaded_with_its_weights(make: Any):
    args = make("megatron")
    rl.prepare_resume(args, 50)
    place = save(args.work, "step_20") / "policy/optimizer"
    for _ in range(2):
        rl.prepare_resume(args, 50)
        assert place.is_dir(), "NeMo-RL asks whether it is there, and no more"


@pytest.mark.parametrize("saved", [True, False])
def test_half_a_conversion_to_megatron_is_made_again(make: Any, saved: bool):
    args = make("megatron")
    rl.prepare_resume(args, 50)
    if saved:
        save(args.work, "step_20")
    half, whole = (
        args.work / rl.MEGATRON_CACHE / name / "iter_0000000" for name in ("a", "b")
    )
    half.mkdir(parents=True)
    whole.mkdir(parents=True)
    (half / "metadata.json").touch()
    (whole / "run_config.yaml").touch()
    rl.prepare_resume(args, 50)
    assert not half.exists() and whole.exists()


def test_the_trained_weights_are_those_of_the_last_step(tmp_path: Path):
    found = rl.weights_of(save(tmp_path, "step_50").parents[1], 50)
    assert found.is_dir()


# ---- what is logged --------------------------------------------------------------


@pytest.fixture
def watch(make: Any) -> rl.Watch:
    return rl.Watch(make(), 10, "reward")


def one_step(watch: rl.Watch, step: int, **metrics: Any) -> None:
    """Log a step as NeMo-RL's loops do."""
    watch.see({"loss": 0.5, "reward": 0.25, **metrics}, step, "train")
    watch.see({"total_step_time": 2.0}, step, "timing/train")


def test_a_step_is_written_once_with_all_that_was_logged_of_it(watch: rl.Watch):
    watch.see({"mean_gen_tokens_per_sample": 3}, 1, "train")  # while it generates
    watch.see({"accuracy": 0.75}, 1, "validation")
    watch.see({"mfu": 9.0}, 1, "performance")
    watch.see({"total_step_time": 9.0}, 1, "timing/setup")
    assert watch.history.read() == []
    one_step(watch, 1, lr=np.float32(0.5), grad_norm=np.array([2.0]), text="x", on=True)
    watch.see({"total_step_time": 9.0}, 1, "timing/train")
    assert watch.history.read() == [
        {
            "step": 1,
            "mean_gen_tokens_per_sample": 3.0,
            "validation/accuracy": 0.75,
            "loss": 0.5,
            "reward": 0.25,
            "lr": 0.5,
            "grad_norm": 2.0,
            "seconds/total_step_time": 2.0,
        }
    ]


def test_nothing_of_a_step_is_left_for_the_next(watch: rl.Watch):
    one_step(watch, 1, entropy=1.0)
    one_step(watch, 2)
    assert "entropy" not in watch.history.read()[1]


def test_values_of_many_numbers_are_left_out(watch: rl.Watch):
    one_step(watch, 1, histogram=np.ones(3), nested={"a": 1}, none=None)
    assert set(watch.history.read()[0]) == {
        "step",
        "loss",
        "reward",
        "seconds/total_step_time",
    }


def test_progress_is_shown_and_old_completions_are_removed(
    watch: rl.Watch, capsys: pytest.CaptureFixture[str]
):
    work = watch.args.work
    for step in (1, 2):
        path = work / f"logs/exp_001/train_data_step{step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        one_step(watch, step, gen_kl_error=0.001, lr=0.1)
    assert "step 2 of 10 reward 0.2500 gen_kl_error 0.0010" in capsys.readouterr().out
    state = json.loads((work / "progress.json").read_text())
    assert (state["steps"], state["reward"], state["lr"]) == (10, 0.25, 0.1)
    kept = [p.name for p in work.glob("logs/*/*")]
    assert kept == ["train_data_step2.jsonl"]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stops_the_run_at_its_step(
    watch: rl.Watch, name: str, value: float
):
    one_step(watch, 1)
    with pytest.raises(outputs.LossNotFinite, match="step 2") as stopped:
        one_step(watch, 2, **{name: np.float64(value)})
    assert stopped.value.hint == "try a lower lr"
    again = rl.Watch(watch.args, 10, "reward")
    again.history.cut(1)
    assert [entry["step"] for entry in again.history.read()] == [1]


def test_a_resumed_run_forgets_what_came_after_its_save(watch: rl.Watch):
    for step in range(1, 7):
        one_step(watch, step)
    watch.history.path.write_text(
        watch.history.path.read_text()[:-9]
    )  # killed while it wrote
    assert [entry["step"] for entry in watch.history.read()] == [1, 2, 3, 4, 5]
    again = rl.Watch(watch.args, 10, "reward")
    again.history.cut(4)
    one_step(again, 5)
    assert [entry["step"] for entry in again.history.read()] == [1, 2, 3, 4, 5]
    again.history.cut(0)
    assert again.history.read() == [] and again.history.path.read_text() == ""


def test_a_run_asked_to_stop_remembers_it(watch: rl.Watch):
    assert not watch.asked
    watch.ask(15, None)
    assert watch.asked and not watch.stopped


# ---- rewards ---------------------------------------------------------------------

MIXED = "baseline_reward/pct_mixed"


def warned(watch: rl.Watch, *shares: float) -> str:
    """What a run is told whose groups had rewards that differ, by step."""
    for step, share in enumerate(shares, 1):
        one_step(watch, step, **{MIXED: share, "reward": 0.0})
    path = watch.args.work / outputs.WARNING
    return path.read_text() if path.exists() else ""


def test_a_reward_that_never_differs_is_told_with_its_likely_causes(
    watch: rl.Watch, capsys: pytest.CaptureFixture[str]
):
    assert warned(watch, 0.0, 0.0) == ""
    text = warned(watch, 0.0)
    assert text.startswith("the reward was 0 for every completion of 3 steps")
    for cause in ("form", "chat template", "max_completion_tokens", "too hard"):
        assert cause in text
    assert f"warning: {text}" in capsys.readouterr().out


@pytest.mark.parametrize("shares", [(0.0, 0.1, 0.0), (0.5,) * 3, (0.1, *[0.0] * 9)])
def test_a_reward_that_differed_once_is_not_told(watch: rl.Watch, shares: Any):
    assert warned(watch, *shares) == ""


def test_it_is_told_once(watch: rl.Watch):
    assert warned(watch, 0.0, 0.0, 0.0)
    (watch.args.work / outputs.WARNING).unlink()
    assert warned(watch, 0.0, 0.0, 0.0) == ""


def test_what_has_no_groups_is_not_told(make: Any):
    watch = rl.Watch(make(), 10, "loss")
    for step in range(1, 6):
        one_step(watch, step)
    assert not (watch.args.work / outputs.WARNING).exists()


def give(path: Path, count: int, faults: Any = None, **rewards: float) -> None:
    line = {"count": count, "rewards": rewards, "faults": faults or {}}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def test_each_environments_reward_is_a_mean_over_what_was_asked(make: Any):
    args = make()
    path = args.work / rl.REWARDS
    give(path, 9, math=1.0)  # of a run before
    watch = rl.Watch(args, 10, "reward")
    assert watch.each_reward() == {}
    give(path, 1, math=1.0, length=0.5)
    give(path, 3, math=0.0, length=0.5)
    one_step(watch, 1)
    one_step(watch, 2)
    first, second = watch.history.read()
    assert (first["reward/math"], first["reward/length"]) == (0.25, 0.5)
    assert "reward/math" not in second


def test_without_a_log_of_rewards_there_are_none(watch: rl.Watch):
    assert watch.each_reward() == {}


def test_a_line_that_is_being_written_is_read_when_it_is_whole(watch: rl.Watch):
    give(watch.rewards, 1, math=1.0)
    whole = watch.rewards.read_bytes()
    for cut in (5, len(whole) - 1):
        watch.rewards.write_bytes(whole[:cut])
        assert watch.each_reward() == {}
    watch.rewards.write_bytes(whole + whole[:7])
    assert watch.each_reward() == {"reward/math": 1.0}
    watch.rewards.write_bytes(whole + whole)
    assert watch.each_reward() == {"reward/math": 1.0}


def test_faults_of_an_environment_are_told(
    watch: rl.Watch, capsys: pytest.CaptureFixture[str]
):
    give(watch.rewards, 1, {"mine": [4, "ValueError: Ü\u2028"]}, mine=0.0)
    assert watch.each_reward() == {"reward/mine": 0.0}
    assert "environment mine: 4 faults: ValueError: Ü" in capsys.readouterr().out


def test_metrics_have_names_of_ours(watch: rl.Watch):
    theirs = {name: 1.0 for name in grpo.METRICS if "/" not in name}
    watch.see({"accuracy": 0.5}, 1, "validation")
    one_step(watch, 1, **theirs)
    one_step(watch, 2, **theirs | {"loss": 2.0, "lr": 0.1})
    rl.write_metrics(watch.args, watch, recipe(log_steps=2), grpo.METRICS)
    (line,) = read_rows(watch.args.out / "metrics.jsonl")
    assert list(line) == ["step", *grpo.METRICS.values()]
    assert (line["loss"], line["lr"], line["step"]) == (1.5, 0.1, 2)
    assert (line["validation_reward"], line["seconds"]) == (0.5, 2.0)


# ---- grpo ------------------------------------------------------------------------

ROWS = {"train": 40, "validation": 3}


def configured(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    return grpo.configure(recipe(**settings), args, DENSE, 30, ROWS)


def test_a_batch_is_prompts_times_generations(make: Any):
    found = configured(make(), beta=0.1, temperature=0.5, seed=3)
    assert found["grpo"]["num_prompts_per_step"] == 4
    assert found["grpo"]["num_generations_per_prompt"] == 4
    assert found["grpo"]["max_num_steps"] == 6 and found["grpo"]["seed"] == 3
    assert found["grpo"]["max_rollout_turns"] == 1
    assert found["grpo"]["val_period"] == 0
    assert found["loss_fn"] == {"reference_policy_kl_penalty": 0.1}
    generation = found["policy"]["generation"]
    assert generation["temperature"] == 0.5 and generation["max_new_tokens"] == 20
    assert (generation["top_p"], generation["top_k"]) == (1.0, None)
    assert "use_dynamic_sampling" not in found["grpo"]


def test_a_sequence_holds_the_longest_prompt_and_completion(make: Any):
    found = configured(make())["policy"]
    length = found["max_total_sequence_length"]
    assert length == 30 + 20 + rl.MARGIN
    assert found["generation"]["vllm_cfg"]["max_model_len"] == length
    split = make("megatron", "--tensor-parallel 2 --context-parallel 4")
    length = configured(split)["policy"]["max_total_sequence_length"]
    assert length >= 58 and length % 16 == 0


def test_a_sequence_is_no_longer_than_the_model(make: Any):
    def length(limit: int) -> int:
        config = DENSE | {"max_position_embeddings": limit}
        found = grpo.configure(recipe(), make(), config, 30, ROWS)
        return int(found["policy"]["max_total_sequence_length"])

    assert [length(n) for n in (50, 51, 56, 58, 512)] == [50, 50, 56, 58, 58]


def test_several_turns_share_a_conversations_length(make: Any):
    found = configured(make(), max_turns=3, max_conversation_tokens=201)
    assert found["grpo"]["max_rollout_turns"] == 3
    assert found["policy"]["max_total_sequence_length"] == 202
    generation = found["policy"]["generation"]
    assert generation["max_new_tokens"] == 20, "of each turn"
    short = configured(make(), max_turns=3, max_conversation_tokens=9)
    assert short["policy"]["max_total_sequence_length"] == 58


def test_dapo_differs_from_grpo_as_its_paper_says(make: Any):
    plain, found = configured(make()), configured(make(), algorithm="dapo")
    assert found["loss_fn"] == {
        "reference_policy_kl_penalty": 0.0,
        "ratio_clip_min": 0.2,
        "ratio_clip_max": 0.28,
        "ratio_clip_c": 10,
        "token_level_loss": True,
    }
    own = found["grpo"]
    assert own["use_dynamic_sampling"]
    assert own["reward_shaping"]["max_response_length"] == 20
    assert own["reward_shaping"]["overlong_buffer_length"] == 4
    assert own.items() >= plain["grpo"].items()
    assert found["policy"] == plain["policy"]
    still = configured(make(), algorithm="dapo", dynamic_sampling=False)["grpo"]
    assert not still["use_dynamic_sampling"] and still["batch_multiplier"] == 1
    shortest = configured(make(), algorithm="dapo", max_completion_tokens=2)
    assert shortest["grpo"]["reward_shaping"]["overlong_buffer_length"] == 1


def test_overrides_come_last(make: Any):
    given = {
        "loss_fn.ratio_clip_max": 0.3,
        "policy.generation.vllm_cfg.enforce_eager": True,
    }
    found = configured(make(), algorithm="dapo", overrides=given)
    assert found["loss_fn"]["ratio_clip_max"] == 0.3
    assert found["loss_fn"]["ratio_clip_min"] == 0.2
    cfg = found["policy"]["generation"]["vllm_cfg"]
    assert cfg["enforce_eager"] and cfg["tensor_parallel_size"] == 1


def test_gpus_generate_and_train_in_turn_or_apart(make: Any):
    turns = configured(make())["policy"]["generation"]["colocated"]
    assert turns["enabled"] and turns["resources"]["gpus_per_node"] is None
    flags = "--gpus 4 --generation-gpus 3 --generation-tensor-parallel 3"
    found = configured(make(flags=flags + " --generation-memory 0.4"))
    generation = found["policy"]["generation"]
    assert generation["colocated"] == {
        "enabled": False,
        "resources": {"gpus_per_node": 3, "num_nodes": None},
    }
    assert generation["vllm_cfg"]["tensor_parallel_size"] == 3
    assert generation["vllm_cfg"]["gpu_memory_utilization"] == 0.4
    assert found["cluster"]["gpus_per_node"] == 4


def test_the_actor_is_told_its_environments(make: Any):
    args = make()
    environments = {"math": {"weight": 0.5}, "mine": {"import": "a.b:C"}}
    told = configured(args, environment=environments)["env"][grpo.ENVIRONMENT]
    assert told["environments"] == {
        "math": {"weight": 0.5},
        "mine": {"weight": 1.0, "import": "a.b:C"},
    }
    assert told["prompts"] == str(args.prompts.absolute())
    assert told["tokenizer"] == str(args.parent.absolute())
    assert told["log"] == str((args.work / rl.REWARDS).absolute())
    assert told["workers"] == 8
    many = configured(make(flags="--cpus 64"))["env"][grpo.ENVIRONMENT]
    assert many["workers"] == grpo.MOST_WORKERS


def test_a_reward_model_is_told_where_it_is(make: Any, tmp_path: Path):
    args = make()
    args.reward_model = tmp_path / "rm"
    told = configured(args, environment={"reward_model": {"weight": 2.0}})
    found = told["env"][grpo.ENVIRONMENT]
    given = {"weight": 2.0, "folder": str(tmp_path / "rm")}
    assert found["environments"]["reward_model"] == given
    assert found["workers"] == 1, "each would load it"


@pytest.mark.parametrize(("seen", "told"), [("3,5", "3,5"), ("", "0,1"), (None, "0,1")])
def test_a_reward_model_has_a_gpu_which_ray_would_hide(
    make: Any, seen: str | None, told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    args = make(flags="--gpus 2")
    assert grpo.environment(recipe(), args)["gpus"] == ""
    args.reward_model = args.parent
    rewarded = recipe(environment="reward_model")
    assert grpo.environment(rewarded, args)["gpus"] == told


@pytest.mark.parametrize(
    ("algorithm", "prompts", "drawn"),
    [("grpo", 0, 4), ("grpo", 3, 4), ("dapo", 11, 12)],
)
def test_fewer_prompts_than_a_step_draws_are_refused(
    make: Any, algorithm: str, prompts: int, drawn: int
):
    def made(number: int) -> Any:
        rows = {"train": number, "validation": 0}
        return grpo.configure(recipe(algorithm=algorithm), make(), DENSE, 30, rows)

    said = rf"train\.jsonl: {prompts} prompts, but a step draws {drawn}"
    with pytest.raises(DataError, match=said) as refused:
        made(prompts)
    assert "lower batch_size" in refused.value.hint
    assert made(drawn)


def test_no_prompt_is_cut(make: Any):
    found = configured(make())["data"]
    assert found["max_input_seq_length"] == 31
    assert found["train"]["data_path"].endswith("rows/train.jsonl")
    assert found["validation"]["data_path"].endswith("rows/validation.jsonl")
    none = grpo.configure(recipe(), make(), DENSE, 30, ROWS | {"validation": 0})
    assert none["data"]["validation"] is None
    assert none["grpo"]["max_val_samples"] == 0


# ---- prompts and templates -------------------------------------------------------


def test_a_row_is_known_by_its_number_where_its_text_holds_odd_line_ends(make: Any):
    args = make()
    asked = ["1 + 1", "one\u2028two\x85three\r\nfour", "Ünïcode", ""]
    rows = [{"input": text, "output": "2", "id": 7} for text in asked]
    write_rows(args.prompts / "train.jsonl", rows)
    assert grpo.copy_rows(args, "train", {"math": {}}) == 4
    assert read_rows(args.work / "rows/train.jsonl") == [
        {"input": text, "output": f"train row {number}"}
        for number, text in enumerate(asked, 1)
    ]


@pytest.mark.parametrize("line", ["{", '{"output": "2"}', "[1]", "7"])
def test_a_row_without_a_prompt_is_named(make: Any, line: str):
    args = make()
    path = write_rows(args.prompts / "train.jsonl", [{"input": "1", "output": "1"}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: no prompt: "):
        grpo.copy_rows(args, "train", {})


def test_a_row_that_the_environment_cannot_judge_is_named_before_training(make: Any):
    args = make()
    write_rows(args.prompts / "train.jsonl", [{"input": "Add.", "output": "no tests"}])
    with pytest.raises(DataError, match=r"row 'Add\.': `output` cannot be judged"):
        grpo.copy_rows(args, "train", {"code": {}})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = write_rows(folder / "corpus.jsonl", [{"text": "one two three"}] * 9)
    (folder / "recipe.yaml").write_text("vocab_size: 270")
    flags = ["--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "made")]
    flags += [f"--data=corpus={rows}", f"--chat-template={TEMPLATE}"]
    assert tokenizer.main(flags) == 0
    return folder / "made"


@pytest.fixture
def parent(words: Path, make: Any) -> Path:
    """A parent's folder, and prompts beside it."""
    args = make()
    shutil.copytree(words, args.parent)
    args.prompts.mkdir()
    counts = {"longest_prompt_tokens": 17}
    (args.prompts / "prompts.json").write_text(json.dumps(counts))
    return Path(args.parent)


def template(parent: Path, text: str | None) -> None:
    """Give a tokenizer another template, or none."""
    path = parent / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    (parent / "chat_template.jinja").unlink(missing_ok=True)
    if text is not None:
        (parent / "chat_template.jinja").write_text(text)


def test_the_longest_prompt_is_what_the_prompts_stage_measured(parent: Path):
    assert grpo.check_template(parent, parent.parent / "prompts") == 17


def test_a_tokenizer_without_a_template_is_refused(parent: Path):
    template(parent, None)
    with pytest.raises(RecipeError, match="its tokenizer has no chat template"):
        grpo.check_template(parent, parent.parent / "prompts")


def test_a_template_that_does_not_ask_for_an_answer_is_refused(parent: Path):
    template(
        parent, "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    )
    with pytest.raises(RecipeError, match="has no generation prompt") as refused:
        grpo.check_template(parent, parent.parent / "prompts")
    assert "add_generation_prompt" in refused.value.hint


# ---- pairs -----------------------------------------------------------------------

PAIR = {
    "messages": [{"role": "user", "content": "1 + 1"}],
    "chosen": "2",
    "rejected": "3",
    "id": 7,
}


def prefer(args: argparse.Namespace, train: int, validation: int = 1) -> None:
    """A preferences folder of so many pairs."""
    write_rows(args.preferences / "train.jsonl", [PAIR] * train)
    write_rows(args.preferences / "validation.jsonl", [PAIR] * validation)
    found = {"longest_tokens": 21}
    (args.preferences / "preferences.json").write_text(json.dumps(found))


def test_pairs_are_told_under_nemo_rls_names(make: Any):
    args = make()
    prefer(args, 4)
    found = rl.pairs(args, 4)
    assert found["max_input_seq_length"] == 21 + rl.MARGIN
    told = found["train"]
    (row, *more) = read_rows(Path(told["data_path"]))
    keys = {key: told[f"{key}_key"] for key in ("prompt", "chosen", "rejected")}
    assert set(row) == set(keys.values()) and len(more) == 3
    assert row[keys["prompt"]] == PAIR["messages"]
    assert (row[keys["chosen"]], row[keys["rejected"]]) == ("2", "3")
    assert found["validation"]["data_path"].endswith("validation.jsonl")


def test_fewer_pairs_than_a_batch_are_refused(make: Any):
    args = make()
    prefer(args, 3)
    with pytest.raises(DataError, match="3 pairs, fewer than batch_size 4") as refused:
        rl.pairs(args, 4)
    assert "train.jsonl" in refused.value.where
    assert refused.value.hint == "lower batch_size, or give more pairs"


def test_without_pairs_held_back_nothing_is_validated(make: Any):
    args = make()
    prefer(args, 4, validation=0)
    assert rl.pairs(args, 4)["validation"] is None


Ran = tuple[str, dict[str, Any], int, str]


@pytest.fixture
def run_pairs(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a stage on pairs asks `rl.run` for."""
    asked: list[Ran] = []

    def run(
        algorithm: str, args: Any, settings: Any, steps: int, shown: str, before: Any
    ) -> Any:
        asked.append((algorithm, settings, steps, shown))
        return None, False

    monkeypatch.setattr(rl, "prepare", lambda args: None)
    monkeypatch.setattr(rl, "open_parent", lambda args: DENSE)
    monkeypatch.setattr(rl, "run", run)

    def start(stage: Any, settings: dict[str, Any], flags: str = "") -> Ran:
        prefer(make(), 20)
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        words = ["--recipe", str(tmp_path / "recipe.yaml")]
        words += ["--out", str(tmp_path / "out"), "--parent", str(tmp_path)]
        words += ["--preferences", str(tmp_path / "preferences"), *flags.split()]
        assert stage.main(words) == cli.NOT_DONE, "it stopped before its last step"
        return asked[-1]

    return start


def test_dpo_compares_with_its_parent(run_pairs: Any):
    recipe = TRAINED | {"beta": 0.2, "sft_weight": 0.5, "seed": 3}
    algorithm, found, steps, shown = run_pairs(
        dpo, recipe, "--backend megatron --gpus 4 --micro-batch-size 2"
    )
    assert (algorithm, steps, shown) == ("dpo", 6, "loss")
    own = found["dpo"]
    assert own["reference_policy_kl_penalty"] == 0.2
    assert own["sft_loss_weight"] == 0.5
    assert own["max_num_steps"] == 6 and own["seed"] == 3
    assert own["val_at_end"] and not own["val_at_start"] and own["val_period"] == 0
    assert own["val_global_batch_size"] == 2 * 4
    assert found["policy"]["megatron_cfg"]["enabled"]
    assert found["policy"]["max_total_sequence_length"] == 30
    assert found["policy"]["sequence_packing"] == {"enabled": False}


def test_a_reward_model_has_its_parents_template(run_pairs: Any):
    recipe = TRAINED | {"overrides": {"policy.precision": "float32"}}
    algorithm, found, _, _ = run_pairs(rm, recipe, "--backend dtensor --gpus 1")
    assert algorithm == "rm"
    policy = found["policy"]
    assert policy["reward_model_cfg"]["enabled"]
    assert policy["reward_model_cfg"]["reward_model_type"] == "bradley_terry"
    assert policy["tokenizer"]["chat_template"] == "default"
    assert policy["tokenizer"]["name"] == policy["model_name"]
    assert policy["precision"] == "float32", "overrides come last"


def test_recipes_of_pairs_have_their_defaults():
    assert DpoRecipe.model_validate(TRAINED).lr_scheduler == "cosine"
    assert RmRecipe.model_validate(TRAINED).lr_scheduler == "cosine"
    assert recipe().lr_scheduler == "constant"


# ---- publishing ------------------------------------------------------------------


def published(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, code: int = 0
) -> list[str]:
    """The command that converts a run's last save."""
    lines: list[list[str]] = []

    def run(line: list[str], check: bool) -> Any:
        lines.append(line)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    rl.publish(args, 6, "reward" if args.backend == "dtensor" else "causal")
    return lines[0]


def test_pytorchs_saves_are_converted_by_one_process(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    args = make("dtensor")
    line = published(args, monkeypatch)
    own = line.index("scripts.nvidia.publish") + 1
    assert line[0] == sys.executable and line[own - 2] == "-m"
    given = dict(zip(line[own::2], line[own + 1 :: 2], strict=True))
    assert given == {
        "--kind": "reward",
        "--parent": str(args.parent),
        "--out": str(args.out),
        "--weights": str(args.work / "saves/step_6/policy/weights"),
        "--work": str(args.work),
        "--backend": "dtensor",
    }


@pytest.mark.parametrize(
    ("flags", "processes", "sizes"),
    [
        ("--gpus 8 --tensor-parallel 2 --pipeline-parallel 2", 4, "2 2 1"),
        ("--gpus 8 --tensor-parallel 2 --expert-parallel 4", 4, "2 1 4"),
        ("--gpus 1 --nodes 4 --tensor-parallel 4", 1, "1 1 1"),
    ],
)
def test_megatrons_saves_are_converted_by_the_gpus_that_shared_the_model(
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    processes: int,
    sizes: str,
):
    line = published(make("megatron", flags), monkeypatch)
    assert f"--nproc-per-node={processes}" in line
    names = ("--tensor-parallel", "--pipeline-parallel", "--expert-parallel")
    assert " ".join(line[line.index(name) + 1] for name in names) == sizes


def test_a_refused_conversion_ends_the_stage_with_its_code(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SystemExit) as ended:
        published(make("megatron"), monkeypatch, code=1)
    assert ended.value.code == 1


# ---- names of NeMo-RL ------------------------------------------------------------


def leaves(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def unknown(algorithm: str, settings: dict[str, Any]) -> set[str]:
    """Settings that NeMo-RL would swallow: it takes any key, and heeds those it has."""
    known = rl_options.options()["algorithms"][algorithm]
    open_ = ("policy.optimizer.kwargs.", f"env.{grpo.ENVIRONMENT}.")
    return {
        key
        for key in leaves(settings)
        if key not in known and not key.startswith(open_) and key != "data._override_"
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_nemo_rl_knows_each_setting(make: Any, backend: str, algorithm: str):
    assert unknown("grpo", configured(make(backend), algorithm=algorithm)) == set()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", [dpo, rm])
def test_nemo_rl_knows_each_setting_of_pairs(run_pairs: Any, stage: Any, backend: str):
    algorithm, found, _, _ = run_pairs(stage, TRAINED, f"--backend {backend} --gpus 1")
    assert unknown(algorithm, found) == set()
