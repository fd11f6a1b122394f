"""What several processes promise: one process's losses, one save, one end for all."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.errors import RecipeError
from scripts.lib.schema import SftRecipe
from scripts.transformers import common
from tests.engine.conftest import ROOT, Stage
from tests.engine.test_trainers import RECIPES, Trainer, contents

# Float32 sums in another order; measured over 40 steps: 2e-7 in the loss, 2e-6 in the
# norm of the gradient.
CLOSE = 1e-5
STEPS = 24
CURVE = {"steps": STEPS, "log_steps": 1, "lr": 3.0e-3}
Whole = Callable[[str, int], dict[str, bytes]]


@dataclass
class Group:
    """Two processes of a stage under torchrun, which is `process`."""

    process: subprocess.Popen[bytes]
    log: Path

    def code(self) -> int:
        return self.process.wait(120)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if f"RANK={rank}".encode() in environ(child):
                return os.kill(int(child), number)
        raise AssertionError(f"no process of rank {rank} among {children}")


def environ(pid: str) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def torchrun(module: str, argv: list[str], log: Path) -> Group:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", module, *argv]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Group(process, log)


@dataclass
class Runs:
    """Trainers in one folder, as one process and as two."""

    one: Trainer
    two: Trainer


@pytest.fixture(scope="module")
def parent(
    start: Callable[..., Stage], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    trainer = Trainer(start, inputs, folder, folder)
    trainer.finished("pretrain", "parent")
    return trainer.out("parent")


@pytest.fixture
def runs(
    start: Callable[..., Stage], inputs: Path, parent: Path, tmp_path: Path
) -> Runs:
    return Runs(
        Trainer(start, inputs, tmp_path, parent),
        Trainer(torchrun, inputs, tmp_path, parent),
    )


@pytest.fixture(scope="module")
def whole(
    start: Callable[..., Stage],
    inputs: Path,
    parent: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    """What a run that nothing interrupts writes, by stage and number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    known: dict[str, dict[str, bytes]] = {}

    def whole(stage: str, num_processes: int) -> dict[str, bytes]:
        name = f"{stage}-{num_processes}"
        if name not in known:
            launch: Any = {1: start, 2: torchrun}[num_processes]
            trainer = Trainer(launch, inputs, folder, parent)
            known[name] = trainer.finished(stage, name, **CURVE)
        return known[name]

    return whole


def curve(files: dict[str, bytes]) -> list[dict[str, float]]:
    return [json.loads(line) for line in files["metrics.jsonl"].splitlines()]


def assert_close(got: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    for one, other in zip(curve(got), curve(wanted), strict=True):
        assert one == pytest.approx(other, rel=CLOSE)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_two_processes_give_the_loss_curve_of_one(stage: str, whole: Whole) -> None:
    one, two = whole(stage, 1), whole(stage, 2)
    assert set(two) == set(one)
    assert [line["step"] for line in curve(two)] == list(range(1, STEPS + 1))
    assert_close(two, one)


def test_sft_gives_the_two_processes_different_numbers_of_tokens(inputs: Path) -> None:
    from scripts.transformers.sft import unpack

    chats = unpack(inputs / "packed" / "packed.parquet")
    size = RECIPES["sft"]["batch_size"]
    order = common.repeated(len(chats), STEPS * size, RECIPES["sft"]["seed"])
    counted = [sum(label != -100 for label in chats[i]["labels"]) for i in order]
    parts = [sum(counted[i : i + size // 2]) for i in range(0, len(order), size // 2)]
    differ = [a != b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    assert sum(differ) > STEPS / 2


def test_a_stop_file_ends_all_after_a_save_and_a_rerun_gives_the_same_bytes(
    runs: Runs, whole: Whole
) -> None:
    work = runs.two.work("run")
    work.mkdir(parents=True)
    (work / "stop").touch()
    stopped = runs.two("sft", "run", **CURVE)
    assert stopped.code() == 1  # torchrun's own
    assert stopped.text().count("exitcode  : 75") == 2
    assert stopped.text().count("stopped at step 1 of") == 1
    assert (work / "stopped").read_text() == "1"
    assert (work / "stop").exists()
    assert not list(runs.two.out("run").iterdir())
    marker = json.loads(runs.two.marker("run", 1).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(marker)
    (work / "stop").unlink()
    assert runs.two.finished("sft", "run", **CURVE) == whole("sft", 2)
    assert not (work / "stopped").exists()


def test_sigterm_to_one_process_stops_both_and_one_alone_resumes(
    runs: Runs, whole: Whole
) -> None:
    group = runs.two("sft", "run", **CURVE)
    group.wait_for(runs.two.marker("run", 3))
    group.signal_rank(1, signal.SIGTERM)
    assert group.code() == 1
    assert group.text().count("exitcode  : 75") == 2
    step = int((runs.two.work("run") / "stopped").read_text())
    assert common.is_whole(runs.two.work("run") / f"checkpoint-{step}")
    resumed = runs.one("sft", "run", **CURVE)
    assert resumed.code() == 0, resumed.text()
    assert f"resuming from checkpoint-{step}" in resumed.text()
    assert not (runs.one.work("run") / "stopped").exists()
    assert_close(contents(runs.one.out("run")), whole("sft", 1))


def test_two_processes_resume_the_save_of_one_past_a_broken_one(
    runs: Runs, whole: Whole
) -> None:
    work = runs.one.work("run")
    work.mkdir(parents=True)
    (work / "stop").touch()
    assert runs.one("pretrain", "run", **CURVE).code() == 75
    (work / "stop").unlink()
    (work / "checkpoint-99").mkdir()
    (work / "checkpoint-99" / "model.safetensors").write_bytes(b"half")
    resumed = runs.two("pretrain", "run", **CURVE)
    assert resumed.code() == 0, resumed.text()
    for line in ("skipping checkpoint-99", "resuming from checkpoint-1", "step 24 "):
        assert resumed.text().count(line) == 1
    assert not (work / "checkpoint-99").exists()
    assert_close(contents(runs.two.out("run")), whole("pretrain", 1))


def test_a_dead_process_ends_all_with_an_error(runs: Runs) -> None:
    group = runs.two("sft", "run", **CURVE)
    group.wait_for(runs.two.marker("run", 3))
    group.signal_rank(1, signal.SIGKILL)
    assert group.code() == 1
    assert "exitcode  : -9" in group.text()
    assert not (runs.two.work("run") / "stopped").exists()
    assert not list(runs.two.out("run").iterdir())


def test_a_batch_that_the_processes_cannot_share_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    recipe: Any = SftRecipe.model_validate(RECIPES["sft"])
    flags = argparse.Namespace(recipe="R", work=Path("work"), save_steps=1)
    with pytest.raises(RecipeError, match="8 is no multiple of the 3 processes"):
        common.settings(recipe, flags)
