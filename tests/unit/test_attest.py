"""Nothing is published that is not whole, finite, trained and at its step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from scripts.lib.attest import attest
from scripts.lib.digest import Memory
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


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_last_number_of_a_large_tensor_is_looked_at(tmp_path: Path, kind: type):
    folder = model(tmp_path / "m")
    values = np.ones(3_000_001, kind)
    save_file({"a": values, "b": values}, folder / "model.safetensors")
    attest("sft", RECIPE, folder, None)
    values[-1] = np.nan
    save_file({"a": np.ones(5, kind), "b": values}, folder / "model.safetensors")
    with pytest.raises(AttestError, match=r"model\.safetensors b: not finite"):
        attest("sft", RECIPE, folder, None)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_infinite_bfloat16_is_refused(tmp_path: Path, bits: int):
    folder = model(tmp_path / "m")
    path = folder / "model.safetensors"
    values = torch.ones(2_000_000, dtype=torch.bfloat16)
    save_torch({"w": values}, path)
    attest("sft", RECIPE, folder, None)
    values.view(torch.uint16)[-1] = bits
    save_torch({"w": values}, path)
    with pytest.raises(AttestError, match="not finite"):
        attest("sft", RECIPE, folder, None)


def test_what_is_attested_is_hashed_too(tmp_path: Path):
    folder, seen = model(tmp_path / "m"), Memory(tmp_path / "seen")
    attest("sft", RECIPE, folder, None, seen)
    assert {name: md5 for name, (_, md5) in seen.known.items()} == {
        str(p): hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()
    }


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
