"""Nothing is published that is not whole, finite, trained and at its step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.lib.attest import attest
from scripts.lib.errors import AttestError

RECIPE = {"steps": 3}


def model(path: Path, value: float = 1.0, step: int = 3) -> Path:
    path = path / "model"
    path.mkdir(parents=True)
    save_file({"w": np.full(64, value, np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path.parent / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
    return path


def test_a_whole_model_passes(tmp_path: Path):
    attest("sft", RECIPE, model(tmp_path / "m"), model(tmp_path / "p", 2.0))


def test_nothing_written_is_refused(tmp_path: Path):
    with pytest.raises(AttestError, match="wrote nothing"):
        attest("eval", {}, tmp_path, None)


def test_a_model_that_did_not_reach_its_step_is_refused(tmp_path: Path):
    with pytest.raises(AttestError, match="ends at step 2, the recipe says 3"):
        attest("pretrain", RECIPE, model(tmp_path / "m", step=2), None)


def test_a_model_like_its_parent_is_refused(tmp_path: Path):
    with pytest.raises(AttestError, match="left the weights"):
        attest("sft", RECIPE, model(tmp_path / "m"), model(tmp_path / "p"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float):
    with pytest.raises(AttestError, match="not finite"):
        attest("sft", RECIPE, model(tmp_path / "m", value), None)


@pytest.mark.parametrize("size", [4, 60, 300])
def test_truncated_weights_are_refused(tmp_path: Path, size: int):
    folder = model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(AttestError, match="truncated"):
        attest("sft", RECIPE, folder, None)


def test_json_that_is_not_json_is_refused(tmp_path: Path):
    (tmp_path / "scores.json").write_text('{"a": ')
    with pytest.raises(AttestError, match="not JSON"):
        attest("eval", {}, tmp_path, None)
