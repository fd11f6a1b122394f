"""Publish models from Megatron without a GPU, and say what the checks saw.

    python -m tests.bridge.programs.conversions ASKED.json FOUND.json

ASKED    `tokenizer`; `published`: {name: {"parent": folder, "method": "full", "lora" or
         "dora"}}; `refused`: {"good": folder, "spoilt": {name: folder}}
FOUND    what each check said, by name; NAME/out is the folder that was published

Megatron's models are real, of one process and on the CPU; their kernels are not there,
so nobody computes logits. What asks CUDA at construction is told of the CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformer_engine.pytorch.module.base  # noqa: F401 - before torch pretends
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import temporary_distributed_context
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from transformers import AutoConfig

from scripts.lib.errors import UserError
from scripts.lib.schema import Peft
from scripts.nvidia import common, convert, parity, settings

ALIKE = {"relative_logit_difference": 0.0, "mean_kl": 0.0}


def without_gpu() -> None:
    """Have what wants a GPU run on the CPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.empty_cache = lambda: None
    torch.cuda.Stream = lambda: None
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    parity.logits = lambda model, prompts: []
    parity.theirs_of = lambda folder, prompts: []
    parity.agreement = lambda ours, theirs: ALIKE


def made(definition: Path) -> list[Any]:
    """A model as Megatron has it, its weights at random."""
    provider = settings.model_of(definition)
    settings.use_kernels(provider)
    provider.bf16, provider.params_dtype = True, torch.bfloat16
    provider.use_cpu_initialization = True
    if getattr(provider, "moe_permute_fusion", False):
        provider.moe_permute_fusion = False  # it makes a tensor on the GPU
    provider.finalize()
    model = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, mixed_precision_wrapper=None
    )
    return [chunk.to(torch.bfloat16) for chunk in model]


def load(model: list[Any], folder: Path) -> Any:
    """Load a folder; its bridge."""
    bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder))
    bridge.load_hf_weights(model, str(folder))
    return bridge


def moved(model: list[Any], peft: Any) -> list[Any]:
    """The model with an adapter that does something."""
    torch.manual_seed(0)
    model = peft(model, training=True)
    for chunk in model:
        for name, weight in chunk.named_parameters():
            if "adapter" in name and "linear_out" in name:
                weight.data.normal_(0, 0.05)
            if "weight_magnitude" in name:
                weight.data.mul_(1.1)
    return model


def said(check: Any) -> str:
    """What a check complains of, or nothing."""
    try:
        check()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read(model: list[Any], folder: Path) -> None:
    """Load a folder, and see that it was read."""
    load(model, folder)
    convert.check_start(model, folder)


def publish(asked: dict[str, Any], tokenizer: Path, work: Path) -> dict[str, Any]:
    """Load a parent, adapt it, publish it."""
    parent = common.readable(Path(asked["parent"]), work)
    model = made(parent)
    load(model, parent)
    peft = None
    if asked["method"] != "full":
        wished = Peft(method=asked["method"], rank=4, alpha=8)
        peft = settings.adapter(wished)
        model = moved(model, peft)
    found: dict[str, Any] = {"start": said(lambda: convert.check_start(model, parent))}
    out = work / "out"
    out.mkdir()
    found["publish"] = said(
        lambda: convert.publish(
            model, out, definition=parent, tokenizer=tokenizer, peft=peft
        )
    )
    found["read"] = str(parent)
    return found


def refusals(asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """What the checks say of folders that lack something, and of one changed bit."""
    good = common.readable(Path(asked["good"]), work)
    found = {}
    for name, folder in asked["spoilt"].items():
        model = made(good)
        found[name] = said(partial(read, model, Path(folder)))
    bridge = load(model, good)
    found["same"] = parity.compare(convert.tensors(bridge, model, False), good)
    weight = next(model[0].parameters())
    weight.data.view(torch.int16).view(-1)[0] ^= 1
    found["bit"] = parity.compare(convert.tensors(bridge, model, False), good)
    return found


def main() -> None:
    """Answer what is asked."""
    question, answer = map(Path, sys.argv[1:])
    asked = json.loads(question.read_text())
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    without_gpu()
    found: dict[str, Any] = {}
    with temporary_distributed_context(backend="gloo"):
        for name, case in asked["published"].items():
            work = question.parent / name
            work.mkdir()
            found[name] = publish(case, Path(asked["tokenizer"]), work)
        work = question.parent / "refusals"
        work.mkdir()
        found["refusals"] = refusals(asked["refused"], work)
    answer.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
