"""What the trainers promise: same bytes, killed or not, and never a silent failure."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.eval import interval
from scripts.lib import tracking
from tests.engine.conftest import Stage, write

STEPS, SAVE_STEPS = 12, 3
TRAINING = {"steps": STEPS, "log_steps": 5, "seed": 3, "warmup_steps": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": TRAINING | {"batch_size": 4, "lr": 1.0e-2, "sequence_length": 32},
    "sft": TRAINING | {"batch_size": 8, "lr": 1.0e-2},
    "grpo": TRAINING
    | {
        "batch_size": 8,
        "num_generations": 4,
        "max_completion_tokens": 4,
        "lr": 1.0e-2,
        "beta": 0.01,
    },
    "dpo": TRAINING | {"batch_size": 8, "lr": 1.0e-3, "sft_weight": 0.1},
    "rm": TRAINING | {"batch_size": 8, "lr": 1.0e-3},
}
STAGES = list(RECIPES)


@dataclass
class Trainer:
    """Starts a trainer on the tiny inputs, each run in a folder of its own."""

    start: Callable[[str, list[str], Path], Stage]
    inputs: Path
    folder: Path
    base: Path
    definition: str = "model"

    def __call__(self, stage: str, name: str, **changes: Any) -> Stage:
        flags = {
            "pretrain": {
                "--model": self.inputs / self.definition,
                "--tokenizer": self.inputs / "tokenizer",
                "--data": self.inputs / "blend",
            },
            "sft": {"--parent": self.base, "--packed": self.inputs / "packed"},
            "grpo": {"--parent": self.base, "--prompts": self.inputs / "prompts"},
            "dpo": {"--parent": self.base, "--preferences": self.inputs / "pairs"},
            "rm": {
                "--parent": self.base.with_name("transformer"),
                "--preferences": self.inputs / "pairs",
            },
        }[stage]
        flags |= {key: changes.pop(key) for key in [*changes] if key.startswith("--")}
        recipe = write(self.folder / f"{name}.yaml", RECIPES[stage] | changes)
        argv = ["--recipe", str(recipe), "--out", str(self.out(name))]
        argv += ["--work", str(self.work(name)), "--save-steps", str(SAVE_STEPS)]
        for flag, path in flags.items():
            argv += [flag, str(path)]
        log = self.folder / f"{name}.log"
        return self.start(f"scripts.transformers.{stage}", argv, log)

    def out(self, name: str) -> Path:
        return self.folder / "out" / name

    def work(self, name: str) -> Path:
        return self.folder / "work" / name

    def marker(self, name: str, step: int) -> Path:
        return self.work(name) / f"checkpoint-{step}" / "whole.json"

    def finished(self, stage: str, name: str, **changes: Any) -> dict[str, bytes]:
        run = self(stage, name, **changes)
        assert run.code() == 0, run.text()
        return contents(self.out(name))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def base(
    start: Callable[..., Stage], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A hybrid that has begun to learn; beside it a transformer."""
    folder = tmp_path_factory.mktemp("base")
    trainer = Trainer(start, inputs, folder, folder)
    trainer.finished("pretrain", "base")
    trainer.definition = "transformer"
    trainer.finished("pretrain", "transformer", steps=40)
    return trainer.out("base")


@pytest.fixture
def trainer(
    start: Callable[..., Stage], inputs: Path, base: Path, tmp_path: Path
) -> Trainer:
    return Trainer(start, inputs, tmp_path, base)


@pytest.fixture(scope="session")
def whole(
    start: Callable[..., Stage],
    inputs: Path,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, bytes]]:
    """What a run that nothing interrupts writes, by stage."""
    folder = tmp_path_factory.mktemp("whole")
    known: dict[str, dict[str, bytes]] = {}

    def whole(stage: str) -> dict[str, bytes]:
        if stage not in known:
            trainer = Trainer(start, inputs, folder, base)
            known[stage] = trainer.finished(stage, stage)
        return known[stage]

    return whole


@pytest.mark.parametrize("stage", STAGES)
def test_same_inputs_give_same_bytes_in_any_folder(
    stage: str, trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    again = trainer.finished(stage, "again")
    assert again == whole(stage)
    assert {"config.json", "model.safetensors", "metrics.jsonl"} <= set(again)
    assert {"tokenizer.json", "chat_template.jinja"} <= set(again)
    assert not [name for name in again if name.endswith(".bin")]
    for name, content in again.items():
        assert str(trainer.folder.parent).encode() not in content, name
    lines = [json.loads(line) for line in again["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all("reward" in line or "loss" in line for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_bytes(
    stage: str, trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    killed = trainer(stage, "run")
    code = killed.signal_when(trainer.marker("run", 6), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not list(trainer.out("run").iterdir())
    resumed = trainer(stage, "run")
    assert resumed.code() == 0, resumed.text()
    assert "resuming from checkpoint-" in resumed.text()
    assert contents(trainer.out("run")) == whole(stage)
    assert len(list(trainer.work("run").glob("checkpoint-*"))) <= 2


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_the_step_and_exits_75(
    stage: str, trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    stopped = trainer(stage, "run")
    code = stopped.signal_when(trainer.marker("run", 3), signal.SIGTERM)
    assert code == 75, stopped.text()
    assert not list(trainer.out("run").iterdir())
    assert trainer.finished(stage, "run") == whole(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_file_saves_the_step_and_exits_75(
    stage: str, trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    work = trainer.work("run")
    work.mkdir(parents=True)
    (work / "stop").touch()
    stopped = trainer(stage, "run")
    assert stopped.code() == 75, stopped.text()
    assert (work / "stop").exists()
    assert (work / "stopped").read_text() == "1"
    assert trainer.marker("run", 1).exists()
    assert not list(trainer.out("run").iterdir())
    (work / "stop").unlink()
    assert trainer.finished(stage, "run") == whole(stage)
    assert not (work / "stopped").exists()


def test_a_run_that_goes_on_goes_on_in_its_logs_which_change_no_byte(
    trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    """At TensorBoard, Weights & Biases and MLflow, those of them that are installed."""
    store = f"file:{trainer.folder / 'mlflow'}"
    given: dict[str, Any] = {
        "tensorboard": True,
        "wandb": {"project": "tiny", "mode": "offline"},
        "mlflow": {"tracking_uri": store, "experiment": "tiny"},
    }
    given = {name: value for name, value in given.items() if tracking.has(name)}
    if not given:
        pytest.skip("none is installed")
    told = given | {"run": "sft/run", "id": "sft-run-0123456789ab"}
    logging = write(trainer.folder / "logging.json", told)
    work = trainer.work("run")
    work.mkdir(parents=True)
    (work / "stop").touch()
    stopped = trainer("sft", "run", **{"--logging": logging})
    assert stopped.code() == 75, stopped.text()
    (work / "stop").unlink()
    again = trainer.finished("sft", "run", **{"--logging": logging})
    assert again == whole("sft")

    if "tensorboard" in given:
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        events = EventAccumulator(str(work / "tensorboard")).Reload()
        steps = [event.step for event in events.Scalars("train/loss")]
        assert steps == [*range(1, STEPS + 1)]
    if "wandb" in given:
        assert len([*work.glob(f"wandb/offline-run-*/run-{told['id']}.wandb")]) == 2
    if "mlflow" in given:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(store)
        experiment = client.get_experiment_by_name("tiny").experiment_id
        (run,) = client.search_runs([experiment])
        history = client.get_metric_history(run.info.run_id, "loss")
        assert run.info.run_name == "sft/run" and run.info.status == "FINISHED"
        assert [one.step for one in history] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_what_learns_from_pairs_tells_apart_answers_it_has_not_seen(
    stage: str, trainer: Trainer, inputs: Path
) -> None:
    learning = {"steps": 240, "batch_size": 48, "lr": 3.0e-3, "log_steps": 60}
    if stage == "dpo":
        learning |= {"steps": 120, "beta": 0.1, "sft_weight": 0.0}
    lines = trainer.finished(stage, "run", **learning)["metrics.jsonl"].splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["loss"] < first["loss"]
    assert last["reward_chosen"] > last["reward_rejected"]
    held = (inputs / "pairs" / "validation.jsonl").read_text().splitlines()
    right = last["validation_accuracy"] * len(held)
    assert right == pytest.approx(round(right), abs=1e-3), "a share of the pairs"
    low, high = interval(round(right), len(held), 0.95)
    print(f"{stage}: {right:.0f} of {len(held)} pairs, {low:.3f} to {high:.3f}")
    assert low > 0.55


def test_dpo_renders_pairs_as_sft_does(trainer: Trainer, inputs: Path) -> None:
    """At the first step the policy is its parent, which gives the loss by hand."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from scripts.transformers.common import repeated
    from scripts.transformers.pairs import read

    pairs = read(inputs / "pairs" / "train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(trainer.base)
    model = AutoModelForCausalLM.from_pretrained(trainer.base)
    total, count = 0.0, 0
    for i in repeated(len(pairs), 4, RECIPES["dpo"]["seed"]):
        asked, answer = pairs[i]["prompt"][0], pairs[i]["chosen"][0]
        before = f"<|user|>{asked['content']}<|assistant|>"
        text = f"{before}{answer['content']}{tokenizer.eos_token}"
        ids, start = tokenizer(text)["input_ids"], len(tokenizer(before)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[start:]), reduction="sum"
        ).item()
        count += len(ids) - start
    changes = {"steps": 1, "batch_size": 4, "warmup_steps": 0, "sft_weight": 1.0}
    loss = json.loads(trainer.finished("dpo", "run", **changes)["metrics.jsonl"])
    assert loss["loss"] == pytest.approx(math.log(2) + total / count, rel=1e-4)


def test_a_reward_model_is_read_as_it_was_trained(
    trainer: Trainer, inputs: Path
) -> None:
    from scripts.environments.reward_model import RewardModel
    from scripts.transformers.pairs import read

    learning = {"steps": 40, "batch_size": 48, "lr": 3.0e-3}
    metrics = trainer.finished("rm", "run", **learning)["metrics.jsonl"]
    told = json.loads(metrics.splitlines()[-1])["validation_accuracy"]
    held = read(inputs / "pairs" / "validation.jsonl")
    judge = RewardModel(str(trainer.out("run")))
    chosen, rejected = (
        judge.steps([p["prompt"] + p[side] for p in held], [{}] * len(held))
        for side in ("chosen", "rejected")
    )
    better = [a > b for a, b in zip(chosen, rejected, strict=True)]
    # in bfloat16, where near ones may be equal
    assert sum(better) / len(held) == pytest.approx(told, abs=0.03)


def test_a_reward_model_and_others_reward_at_once(trainer: Trainer) -> None:
    trainer.finished("rm", "judge", steps=10, batch_size=16)
    environment = {"reward_model": {"weight": 0.5}, "math": {"weight": 2.0}}
    metrics = trainer.finished(
        "grpo",
        "run",
        environment=environment,
        **{"--reward-model": trainer.out("judge")},
    )["metrics.jsonl"]
    for line in map(json.loads, metrics.splitlines()):
        parts = 0.5 * line["reward_reward_model"] + 2.0 * line["reward_math"]
        assert line["reward"] == pytest.approx(parts, rel=1e-4)
        assert line["reward_reward_model"] != 0.0


def answers(model: Path, heldout: Path) -> list[str]:
    """A model's greedy answers to questions that no training showed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    lines = heldout.read_text().splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["input"]}] for line in lines]
    batch = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    found = AutoModelForCausalLM.from_pretrained(model).generate(
        **batch, max_new_tokens=5, do_sample=False
    )
    given = found[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(given, skip_special_tokens=True))


def test_dapo_earns_more_on_questions_it_has_not_seen(
    trainer: Trainer, inputs: Path, learned: Path
) -> None:
    trainer.base = learned
    recipe = {
        "algorithm": "dapo",
        "dynamic_sampling": False,
        "environment": {"digits": {"import": "tests.engine.digits:Digits"}},
        "steps": 30,
        "batch_size": 32,
        "num_generations": 8,
        "max_completion_tokens": 6,
        "beta": 0.0,
    }
    lines = trainer.finished("grpo", "run", **recipe)["metrics.jsonl"].splitlines()
    first, *_, last = map(json.loads, lines)
    for line in (first, last):
        parts = line["reward_digits"] + 0.5 * line["overlong_penalty"]
        assert line["reward"] == pytest.approx(parts, rel=1e-4)
        assert -1.0 <= line["overlong_penalty"] <= 0.0
    assert last["reward"] > first["reward"] + 0.2
    shares = []
    for model in (learned, trainer.out("run")):
        found = answers(model, inputs / "heldout" / "rows.jsonl")
        right = sum(map(str.isdecimal, found))
        shares.append(interval(right, len(found), 0.95))
        low, high = shares[-1]
        print(f"digits alone: {right} of {len(found)}, {low:.2f} to {high:.2f}")
    assert shares[1][0] > shares[0][1]


def test_several_turns_are_learned_from_the_last_ones_reward(
    trainer: Trainer, learned: Path
) -> None:
    trainer.base = learned
    recipe = {
        "environment": {"twice": {"import": "tests.engine.digits:Twice"}},
        "max_turns": 3,
        "max_conversation_tokens": 64,
        "steps": 30,
        "batch_size": 32,
        "num_generations": 8,
        "max_completion_tokens": 5,
    }
    killed = trainer("grpo", "run", **recipe)
    killed.signal_when(trainer.marker("run", 9), signal.SIGKILL)
    lines = trainer.finished("grpo", "run", **recipe)["metrics.jsonl"].splitlines()
    first, *_, last = map(json.loads, lines)
    assert first["turns"] == last["turns"] == 2
    assert last["reward"] == last["reward_twice"] > first["reward"] + 0.2
    print(f"reward {first['reward']:.2f} to {last['reward']:.2f}")
    assert contents(trainer.out("run")) == trainer.finished("grpo", "whole", **recipe)


def test_a_reply_is_written_by_the_template_and_masked(inputs: Path) -> None:
    from transformers import AutoTokenizer

    from scripts.environments.mix import Mix
    from scripts.transformers.turns import Rollouts

    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    eos = tokenizer.eos_token_id

    class Said:
        """Stands for the model."""

        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def _generate_single_turn(self, asked: list[list[int]], *_: Any) -> Any:
            self.asked += asked
            return [tokenizer("7")["input_ids"] + [eos] for _ in asked], None

    def held(max_turns: int, max_tokens: int) -> tuple[Any, Said]:
        mix = Mix({"twice": {"import": "tests.engine.digits:Twice", "weight": 2.0}})
        rows = [{"input": "1 + 1", "output": "2"}, {"input": "3 + 3", "output": "6"}]
        talk = Rollouts(mix, rows, tokenizer, max_turns, max_tokens, 5)
        prompt = [{"role": "user", "content": "3 + 3", "row": 1}]
        said = Said()
        return talk([prompt], said), said

    found, said = held(3, 64)
    assert tokenizer.decode(said.asked[0]) == "<|user|>3 + 3<|assistant|>"
    end = tokenizer.eos_token
    whole = f"<|user|>3 + 3<|assistant|>7{end}<|user|>Not 6?<|assistant|>"
    assert tokenizer.decode(said.asked[1]) == whole
    assert said.asked[1] == tokenizer(whole)["input_ids"], "as one text"
    ids, mask = found["completion_ids"][0], found["env_mask"][0]
    own = tokenizer.decode([id for id, one in zip(ids, mask, strict=True) if one])
    assert own == f"7{end}7{end}"
    (talk,) = found["talk"]
    assert (talk.turns, talk.reward, talk.each) == (2, 2.0, {"twice": 1.0})
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert len(held(1, 64)[1].asked) == 1
    assert len(held(3, 20)[1].asked) == 1, "no room for another answer"


CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}'
PUZZLE = "1 2 3\n4 5 6\n_ 7 8"
SOLVED = "1 2 3\n4 5 6\n7 8 _"


@pytest.mark.parametrize(
    ("environment", "row", "says", "hears"),
    [
        ("tool_use", ("6 * 7", "42"), [CALL + "</tool_call>", "42"], "42"),
        (
            "sliding_puzzle",
            (PUZZLE, SOLVED),
            ["<action>left</action>", "<action>left</action>"],
            "1 2 3\n4 5 6\n7 _ 8",
        ),
    ],
)
def test_tools_and_games_take_turns(
    environment: str, row: tuple[str, str], says: list[str], hears: str, inputs: Path
) -> None:
    from transformers import AutoTokenizer

    from scripts.environments.mix import Mix
    from scripts.transformers.turns import Rollouts

    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    answers = iter(says)

    class Said:
        """Stands for the model."""

        def _generate_single_turn(self, asked: list[list[int]], *_: Any) -> Any:
            return [tokenizer(next(answers) + tokenizer.eos_token)["input_ids"]], None

    rows = [{"input": row[0], "output": row[1]}]
    talk = Rollouts(Mix({environment: {}}), rows, tokenizer, 4, 2000, 200)
    (held,) = talk([[{"role": "user", "content": row[0], "row": 0}]], Said())["talk"]
    assert (held.turns, held.reward) == (2, 1.0)
    assert hears in held.messages[2]["content"]


def test_dapo_without_its_name_for_what_trl_lacks_is_an_error(
    trainer: Trainer,
) -> None:
    run = trainer("grpo", "run", algorithm="dapo")
    assert run.code() == 1
    assert "TRL has no dynamic sampling" in run.text()


def test_a_half_written_newest_save_is_skipped(
    trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    killed = trainer("sft", "run")
    killed.signal_when(trainer.marker("run", 9), signal.SIGKILL)
    newest = sorted(trainer.work("run").glob("checkpoint-*/whole.json"))[-1].parent
    for save in trainer.work("run").glob("checkpoint-*"):
        if save.name != "checkpoint-6":
            weights = save / "model.safetensors"
            if weights.exists():
                os.truncate(weights, weights.stat().st_size // 2)
    resumed = trainer("sft", "run")
    assert resumed.code() == 0, resumed.text()
    assert f"skipping {newest.name}" in resumed.text()
    assert "resuming from checkpoint-6" in resumed.text()
    assert contents(trainer.out("run")) == whole("sft")


def test_a_finished_run_that_never_published_publishes_the_same(
    trainer: Trainer, whole: Callable[[str], dict[str, bytes]]
) -> None:
    assert trainer.finished("sft", "run") == whole("sft")
    for path in trainer.out("run").iterdir():
        path.unlink()
    again = trainer("sft", "run")
    assert again.code() == 0, again.text()
    assert f"resuming from checkpoint-{STEPS}" in again.text()
    assert contents(trainer.out("run")) == whole("sft")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_loss_that_is_no_number_raises_with_its_step(
    stage: str, trainer: Trainer
) -> None:
    run = trainer(stage, "run", lr=1.0e30, warmup_steps=0)
    assert run.code() == 1
    assert re.search(r"error: step \d+: the loss is (nan|inf)", run.text())
    assert not list(trainer.out("run").iterdir())


def test_sft_counts_exactly_the_tokens_the_mask_names_each_chat_alone(
    trainer: Trainer, inputs: Path, base: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.transformers.common import repeated
    from scripts.transformers.sft import unpack

    chats = unpack(inputs / "packed" / "packed.parquet")
    size = RECIPES["sft"]["batch_size"]
    model = AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for i in repeated(len(chats), size, RECIPES["sft"]["seed"]):
        ids, labels = chats[i]["input_ids"], torch.tensor(chats[i]["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels != -100).sum())
        assert 0 < (labels != -100).sum() < len(ids) - 2
    metrics = trainer.finished("sft", "run", steps=1)["metrics.jsonl"]
    assert json.loads(metrics)["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.fixture(scope="session")
def learned(
    start: Callable[..., Stage], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A hybrid that has learned enough for its layers to be worth adapting."""
    folder = tmp_path_factory.mktemp("learned")
    trainer = Trainer(start, inputs, folder, folder)
    more = {"steps": 60, "batch_size": 16, "sequence_length": 64, "lr": 5.0e-3}
    trainer.finished("pretrain", "learned", **more)
    return trainer.out("learned")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_learns_and_answers_as_the_merged_model(
    method: str, trainer: Trainer, learned: Path
) -> None:
    from safetensors import safe_open

    from scripts.transformers.adapter import compare

    peft = {"method": method, "rank": 8, "dropout": 0.1}
    changes = {"peft": peft, "steps": 48, "log_steps": 12, "lr": 5.0e-3}
    trainer.base = learned
    killed = trainer("sft", "run", **changes)
    killed.signal_when(trainer.marker("run", 9), signal.SIGKILL)
    found = trainer.finished("sft", "run", **changes)
    first, *_, last = map(json.loads, found["metrics.jsonl"].splitlines())
    print(f"{method}: loss {first['loss']:.2f} to {last['loss']:.2f}")
    assert last["loss"] < first["loss"] - 0.3
    assert found == trainer.finished("sft", "at once", **changes), "killed or not"
    parity = compare(learned, trainer.out("run"))
    assert parity["largest_logit_difference"] <= parity["tolerance"] < 0.01
    assert parity == json.loads(found["parity.json"])
    config = json.loads(found["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "" and config["r"] == 8
    file = trainer.out("run") / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "numpy") as tensors:
        names = set(tensors.keys())
    assert any("in_proj.lora_A" in name for name in names)
    magnitudes = [name for name in names if "magnitude" in name]
    assert bool(magnitudes) == (method == "dora")
    assert not any("out_proj" in name for name in names)


def test_a_model_with_a_merged_adapter_is_trained_on(trainer: Trainer) -> None:
    trainer.finished("sft", "adapted", peft={"method": "lora", "rank": 4})
    trainer.base = trainer.out("adapted")
    assert trainer.finished("sft", "run", steps=3)


def test_an_adapter_of_no_layer_is_an_error(trainer: Trainer) -> None:
    peft = {"method": "lora", "target_modules": ["q_prod"]}
    run = trainer("sft", "run", peft=peft)
    assert run.code() == 1
    assert "peft.target_modules: no layer q_prod" in run.text()
    assert "q_proj" in run.text()


def test_a_tokenizer_larger_than_the_model_is_an_error(
    trainer: Trainer, inputs: Path, tmp_path: Path
) -> None:
    config = json.loads((inputs / "model" / "config.json").read_text())
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "config.json", config | {"vocab_size": 300})
    for name in ("tokenizer", "blend"):
        (tmp_path / name).symlink_to(inputs / name)
    trainer.inputs = tmp_path
    run = trainer("pretrain", "run")
    assert run.code() == 1
    assert "vocab_size 300, but the tokenizer has" in run.text()


def test_a_sequence_longer_than_the_model_is_an_error(trainer: Trainer) -> None:
    run = trainer("pretrain", "run", sequence_length=1024)
    assert run.code() == 1
    assert "max_position_embeddings" in run.text()


def test_only_tokens_that_count_are_scored_on_a_cpu(monkeypatch: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer import utils

    from scripts.transformers.scoring import score_counted_tokens

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained("config/models/tiny")
    )
    utils.add_fused_lm_head(model)
    ids = torch.arange(40).view(2, 20)
    labels = ids.masked_fill(ids % 20 < 17, -100)
    scored, score = [], utils._ChunkedLogProbFunction.apply

    def watched(hidden: torch.Tensor, *rest: Any) -> Any:
        scored.append(len(hidden))
        return score(hidden, *rest)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", watched)
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # put back after
    losses = []
    for prepare in (lambda: None, score_counted_tokens):
        prepare()
        losses.append(model(input_ids=ids, labels=labels, fused_lm_head=True).loss)
    assert scored == [38, 6]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
