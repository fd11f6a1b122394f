"""What a plan says of times, costs and causes, and when a budget refuses it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import estimate, graph, plan
from scripts.lib.errors import UserError
from scripts.lib.estimate import Estimate, Table
from scripts.lib.store import Store
from tests.bench.big_config import TRUNK, make_built, working_in

CONFIG = Path("config/config.yaml")
SFT = "{from: base, data: chat, steps: 4, batch_size: 8, lr: 3.0e-3}"
CHAIN = f"""\
{TRUNK}\
sft:
  chatty: {SFT}
export:
  nano: {{from: chatty}}
placement:
  pretrain: {{default: {{gpus: 1}}}}
  sft: {{default: {{gpus: 2}}}}
"""
HOUR = {"seconds": 3610.0, "setup_seconds": 10.0, "gpu_hours": 2 * 3610 / 3600}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nodes as if built: fine-tuning by two GPUs for an hour, after ten seconds."""
    folder = tmp_path_factory.mktemp("chain") / "project"
    make_built(folder, CHAIN)
    with working_in(folder):
        took("sft/chatty", **HOUR)
        took("export/nano", seconds=30.0, gpu_hours=0.0, cpu_hours=0.01)
        took("pretrain/base", seconds=7200.0, gpu_hours=2.0)
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Iterator[Path]:
    for name in ("scripts", "envs"):
        (tmp_path / name).symlink_to(built / name)
    for name in ("config", "artifacts"):
        shutil.copytree(built / name, tmp_path / name)
    shutil.copy(built / "dvc.lock", tmp_path)
    with working_in(tmp_path):
        yield tmp_path


def took(id: str, **made: float) -> None:
    """Have a node's provenance say what its run took."""
    path = Path("artifacts", id, "provenance.json")
    old = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_text(json.dumps(made))
    new = hashlib.md5(path.read_bytes()).hexdigest()
    lock = Path("dvc.lock")
    lock.write_text(lock.read_text().replace(old, new))


def edit(old: str, new: str) -> None:
    text = CONFIG.read_text()
    assert old in text
    CONFIG.write_text(text.replace(old, new))


def planned() -> Store:
    store = Store(graph.build(CONFIG))
    store.read()
    store.settle(keep=False, write=False)
    return store


def estimates() -> dict[str, Estimate]:
    return Table(planned()).times


def line(id: str) -> str:
    (found,) = [one for one in Table(planned()).lines() if f" {id} " in one[:25]]
    return found


def refused(wanted: Any = None) -> str:
    """What the build of these nodes, or of all, is refused with."""
    store = planned()
    try:
        estimate.check_budget(store, wanted or store.graph.nodes)
    except UserError as error:
        return str(error)
    return ""


def test_a_rerun_takes_as_long_for_each_step_and_starts_as_fast(project: Path):
    edit("data: chat, steps: 4", "data: chat, steps: 8")
    found = estimates()
    assert found["sft/chatty"].seconds == pytest.approx(10 + 2 * 3600)
    assert found["sft/chatty"].hours["gpu_hours"] == pytest.approx(2 * 7210 / 3600)
    assert found["export/nano"].seconds == 30 and set(found) == {
        "sft/chatty",
        "export/nano",
    }


def test_twice_the_gpus_take_half_the_time(project: Path):
    edit("lr: 3.0e-3}\nexport", "lr: 2.0e-3}\nexport")
    edit("sft: {default: {gpus: 2}}", "sft: {default: {gpus: 4}}")
    (found, *_) = estimates().values()
    assert found.seconds == pytest.approx(10 + 3600 / 2)
    assert found.hours["gpu_hours"] == pytest.approx(4 * 1810 / 3600)


def test_a_run_that_goes_on_counts_only_what_is_left(project: Path):
    edit("data: chat, steps: 4", "data: chat, steps: 400")
    store = planned()
    node = store.graph.nodes["sft/chatty"]
    deps = plan.outlook(store)[node.id].deps
    text = json.dumps([node.params, deps], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    work = Path("work/sft", f"chatty-{key}")
    work.mkdir(parents=True)
    (work / "seconds.json").write_text("6000")
    (work / "progress.json").write_text('{"step": 350, "steps": 400}')
    found = estimates()[node.id]
    assert found.seconds == pytest.approx(2000)  # the last save is at step 300
    assert "75% is done" in found.note
    edit("placement:", "budget: {gpu_hours: 6}\nplacement:")
    assert "5.33 are spent" in refused()  # 2 by the base, 3.33 by what goes on


def test_a_new_node_is_estimated_by_another_of_its_stage_and_model(project: Path):
    other = f"  other: {SFT.replace('steps: 4', 'steps: 12')}\n"
    edit("export:\n", f"{other}export:\n")
    found = estimates()["sft/other"]
    assert found.seconds == pytest.approx(10 + 3 * 3600)
    assert "as sft/chatty" in line("sft/other")


def test_what_nothing_is_known_of_is_said_and_not_invented(project: Path):
    grpo = "data: sums, steps: 2, batch_size: 8, max_completion_tokens: 4, lr: 1.0e-5"
    edit("export:\n", f"grpo:\n  r: {{from: chatty, {grpo}}}\nexport:\n")
    assert estimates()["grpo/r"].seconds is None
    assert "?" in line("grpo/r") and "no earlier grpo" in line("grpo/r")
    assert "not known, counted as 0: grpo/r" in Table(planned()).lines()
    shutil.copytree("config/models/tiny", "config/models/other")
    edit("model: tiny", "model: other")
    edit("placement:", "budget: {gpu_hours: 0}\nplacement:")
    assert "sft/chatty ?" in refused() and "? counts as 0" in refused()
    assert "no earlier sft of this engine and model" in line("sft/chatty")


def test_a_provenance_that_is_not_here_is_named(project: Path):
    shutil.rmtree("artifacts/sft")
    edit("data: chat, steps: 4", "data: chat, steps: 8")
    assert "not here: dvc pull" in line("sft/chatty")


def test_a_budget_refuses_what_exceeds_it_and_counts_what_is_to_run(project: Path):
    edit("lr: 3.0e-3}\nexport", "lr: 2.0e-3}\nexport")
    edit("placement:", "budget: {gpu_hours: 4}\nplacement:")
    message = refused()
    assert "config/config.yaml:" in message and "budget.gpu_hours: 4" in message
    assert "2 are spent" in message and "needs 2.01: sft/chatty 2.01" in message
    assert "above 4.01" in message
    assert not refused({"export/nano"})
    edit("gpu_hours: 4}", "gpu_hours: 4.1}")
    assert not refused()
    assert "budget: 4.1 GPU-hours; 2 spent" in "\n".join(Table(planned()).lines())


def test_a_spent_budget_refuses_gpus_and_with_nothing_to_run_nothing(project: Path):
    edit("placement:", "budget: {gpu_hours: 2}\nplacement:")
    assert not any(planned().why.values())  # a budget is no setting of a node
    assert not refused()
    edit("  nano: {from: chatty}", "  nano: {from: chatty}\n  tiny: {from: base}")
    assert not refused()  # an export needs none
    edit("data: chat, steps: 4", "data: chat, steps: 8")
    assert "sft/chatty" in refused()


@pytest.mark.parametrize("budget", ["{gpu_hours: -1}", "{gpus: 5}", "{gpu_hours: x}"])
def test_a_budget_that_is_none_is_refused(project: Path, budget: str):
    edit("placement:", f"budget: {budget}\nplacement:")
    with pytest.raises(UserError, match=r"config\.yaml:\d+ budget\.gpu"):
        planned()


def test_a_cause_is_named_down_to_the_files_line(project: Path):
    edit("vocab_size: 300", "vocab_size: 299")
    assert "vocab_size 300 -> 299 (config/config.yaml:9)" in line("tokenizer/tiny")
    assert (
        "if sft/chatty changes <- tokenizer/tiny <- vocab_size 300 -> 299"
        in line("export/nano").replace("pack/chat <- ", "").replace("pretrain/base <- ", "")
    )  # fmt: skip
    assert "1 run, 6 may stop early" in Table(planned()).lines()[-1]


def test_another_engine_is_one_reason_and_not_its_files(project: Path):
    edit("generate:\n", "engine: {sft: nvidia}\ngenerate:\n")
    assert "engine transformers -> nvidia (config/config.yaml:1)" in line("sft/chatty")
    assert ".py" not in line("sft/chatty")
