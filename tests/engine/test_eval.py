"""What eval and export promise: the same items for all, plain data, same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.eval import interval, load_task
from scripts.lib.errors import RecipeError
from tests.engine.conftest import ROOT, Stage, write
from tests.engine.test_trainers import base, contents

__all__ = ["base"]
TASK = ROOT / "config" / "tasks" / "arithmetic.yaml"


@pytest.fixture(scope="session")
def exported(
    start: Callable[..., Stage], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("export")
    recipe = write(folder / "recipe.yaml", {})
    for name in ("a", "b"):
        argv = ["--parent", str(base), "--recipe", str(recipe)]
        argv += ["--out", str(folder / name)]
        run = start("scripts.transformers.export", argv, folder / f"{name}.log")
        assert run.code() == 0, run.text()
    assert contents(folder / "a") == contents(folder / "b")
    return folder / "a"


def test_an_export_has_its_parents_logits_and_says_so(exported: Path) -> None:
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["largest_logit_difference"] == 0.0
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    assert generation["max_new_tokens"] > 0


def test_all_models_answer_the_same_items_to_the_same_bytes(
    start: Callable[..., Stage],
    inputs: Path,
    base: Path,
    exported: Path,
    tmp_path: Path,
) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"num_samples": 2, "max_new_tokens": 4})
    for name in ("a", "b"):
        argv = ["--recipe", str(recipe), "--out", str(tmp_path / name)]
        argv += ["--model", f"base={base}", "--model", f"nano={exported}"]
        argv += ["--task", f"sums={TASK}", "--data", f"sums={inputs / 'heldout'}"]
        run = start("scripts.eval", argv, tmp_path / f"{name}.log")
        assert run.code() == 0, run.text()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    found = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]
    assert [score["model"] for score in found] == ["base", "nano"]
    assert len({score["items_digest"] for score in found}) == 1
    for score in found:
        assert score["num_items"] == 12
        assert score["interval"][0] <= score["score"] <= score["interval"][1]
    samples = (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4
    items = (inputs / "heldout" / "rows.jsonl").read_text().splitlines()
    first, asked = json.loads(samples[0]), json.loads(items[0])
    assert (first["input"], first["expected"]) == (asked["input"], asked["output"])


def test_the_interval_is_wilsons() -> None:
    low, high = interval(50, 100, 0.95)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)


@pytest.mark.parametrize(
    "change",
    [
        "process_docs: !function utils.process",
        "doc_to_text: !!python/object/apply:os.system ['true']",
        "custom_dataset: utils.data",
        "unsafe_code: true",
        "include: other.yaml",
        "dataset_path: org/name",
        "dataset_kwargs: {trust_remote_code: true}",
        "metric_list: [{metric: exact_match, hf_evaluate: true}]",
        "metric_list: [{metric: org/metric}]",
        "filter_list: [{name: a, filter: [{function: custom, filter_fn: f}]}]",
        "generation_kwargs: {do_sample: true}",
    ],
)
def test_a_task_that_runs_code_or_fetches_is_refused(
    change: str, tmp_path: Path
) -> None:
    key = change.partition(":")[0]
    lines = [
        block
        for block in TASK.read_text().replace("\n  ", "\0  ").splitlines()
        if not block.startswith(key)
    ]
    task = tmp_path / "task.yaml"
    task.write_text("\n".join([*lines, change]).replace("\0", "\n") + "\n")
    with pytest.raises(RecipeError):
        load_task(task)


def test_the_shipped_task_is_accepted() -> None:
    assert load_task(TASK)["output_type"] == "generate_until"
