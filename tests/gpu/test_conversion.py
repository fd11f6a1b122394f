"""Both ways between Megatron and Hugging Face, and a gate that closes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import PYTHON, ROOT, Run, Stages, write


def differing(one: Path, other: Path) -> dict[str, str]:
    """What of two models' weights is not the same: dtype, shape or bits, by name."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    found = {name: "is in one of them" for name in set(a) ^ set(b)}
    for name in set(a) & set(b):
        kinds = {f"{x.dtype} {list(x.shape)}" for x in (a[name], b[name])}
        if len(kinds) > 1:
            found[name] = " and ".join(sorted(kinds))
        elif not torch.equal(a[name], b[name]):
            found[name] = f"{(a[name] != b[name]).sum()} of {a[name].numel()} differ"
    return found


def export(stages: Stages, parent: Path, *flags: str, gpus: int = 1) -> Run:
    return stages.start(
        "scripts.nvidia.export", {}, "--parent", parent, *flags, gpus=gpus
    )


def test_an_export_is_its_parent_bit_for_bit(
    hybrid: Run, stages: Stages, figure: Callable[..., None]
):
    run = export(stages, hybrid.out).done()
    ours = run.out / "model.safetensors"
    assert ours.read_bytes() == (hybrid.out / "model.safetensors").read_bytes()
    assert run.parity["differs_after_round_trip"] == []
    settings = json.loads((run.out / "generation_config.json").read_text())
    assert settings["do_sample"] is False and settings["max_new_tokens"] == 64
    figure(parity=run.parity)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("flag", ["--tensor-parallel", "--pipeline-parallel"])
def test_an_export_is_the_same_from_two_gpus(hybrid: Run, stages: Stages, flag: str):
    run = export(stages, hybrid.out, flag, "2", gpus=2).done()
    assert differing(run.out, hybrid.out) == {}
    ours = run.out / "model.safetensors"
    assert ours.read_bytes() == (hybrid.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("disk", "is not what Megatron's tensors convert to"),
        ("logits", "Transformers' logits differ from Megatron's"),
    ],
)
def test_one_spoilt_weight_closes_the_gate(
    hybrid: Run, stages: Stages, kind: str, said: str, figure: Callable[..., None]
):
    run = stages.start(
        "tests.gpu.programs.closes",
        {},
        f"{kind}:scripts.nvidia.export",
        "--parent",
        hybrid.out,
    )
    assert run.wait() == 1, run.text()[-3000:]
    assert said in run.error, run.text()[-3000:]
    figure(kind=kind, error=run.error.strip()[:300])


def test_a_model_of_the_cpu_engine_goes_on_here(
    stages: Stages, inputs: Path, tmp_path: Path, figure: Callable[..., None]
):
    """Its config.json names NemotronH's layers as newer Transformers do."""
    from scripts.transformers import pretrain

    recipe = {"steps": 5, "batch_size": 2, "lr": 1e-3, "sequence_length": 64}
    out = tmp_path / "cpu"
    argv = ["--model", str(ROOT / "config/models/tiny")]
    argv += ["--tokenizer", str(inputs / "tokenizer"), "--data", str(inputs / "blend")]
    argv += ["--recipe", str(write(tmp_path / "cpu.yaml", recipe)), "--out", str(out)]
    assert pretrain.main(argv) == 0
    run = stages.sft(out, steps=40).done()
    figure(losses=run.losses)
    assert run.losses[-1] < run.losses[0]


ADAPTED = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, tuned = sys.argv[1:]
words = torch.arange(3, 43)[None]
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
with torch.no_grad():
    merged = load(tuned)(words).logits
    adapted = PeftModel.from_pretrained(load(base), tuned + "/adapter")(words).logits
    plain = load(base)(words).logits
print(float((merged - adapted).abs().max()), float((merged - plain).abs().max()))
"""


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_on_its_base_is_the_merged_model(
    base: Run, stages: Stages, method: str, figure: Callable[..., None]
):
    peft = {"method": method, "rank": 8, "alpha": 16}
    run = stages.sft(base.out, peft=peft, lr=5e-3, steps=40).done()
    said = subprocess.run(
        [PYTHON, "-c", ADAPTED, str(base.out), str(run.out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    difference, change = map(float, said.stdout.split()[-2:])
    figure(method=method, difference=difference, change=change)
    assert change > 1.0, "training moved it"
    assert difference < 0.05 * change
