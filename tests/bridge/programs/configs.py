"""Translate nodes into Megatron-Bridge's settings, and say what the settings are.

    python -m tests.bridge.programs.configs ASKED.json FOUND.json

ASKED    {name: {"stage", "recipe", "flags", "model", "inputs", "work", "fields"}}
FOUND    {name: {field: value}}, after Bridge has validated them; or {"error": [...]}

Some of Bridge's checks ask which GPU there is: they are told of an H100.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.training.config import runtime_config_update

from scripts.lib.errors import UserError
from scripts.lib.schema import PretrainRecipe, SftRecipe
from scripts.nvidia import common, pretrain, settings, sft

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)


def configured(case: dict[str, Any]) -> Any:
    """A node's settings, made as its script makes them."""
    model, inputs, work = (Path(case[key]) for key in ("model", "inputs", "work"))
    flags = ["--recipe", "none", "--out", "none", *case["flags"]]
    args = common.parser("").parse_args(flags)
    trains = case["stage"] == "pretrain"
    kind = PretrainRecipe if trains else SftRecipe
    recipe = kind.model_validate(case["recipe"])
    config = settings.configure(
        recipe,
        definition=model,
        tokenizer=inputs / "tokenizer",
        work=work,
        placement=common.placement(args),
        save_steps=args.save_steps,
        parent=None if trains else model,
    )
    if trains:
        blend = pretrain.read_blend(inputs / "blend")
        length = recipe.sequence_length
        settings.use_blend(config, blend, inputs / "blend", length, work)
    else:
        packed = inputs / "packed/packed.parquet"
        length = sft.rounded(sft.check_rows(packed, model, recipe.batch_size), args)
        settings.use_packed(config, packed, length)
    settings.override(config, recipe)
    # a process for each GPU of the smallest machine that has these sizes
    sizes = [args.tensor_parallel, args.pipeline_parallel, args.context_parallel]
    os.environ["WORLD_SIZE"] = str(sizes[0] * sizes[1] * sizes[2])
    runtime_config_update(config)
    return config


def value(config: Any, key: str) -> Any:
    """A setting by its dotted name, as JSON can hold it."""
    for name in key.split("."):
        config = getattr(config, name)
    return plain(config)


def plain(value: Any) -> Any:
    """A setting's value as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def default_folders(config: Any) -> list[str]:
    """Settings that name the folder that Bridge writes to where it is told none."""
    found = []
    for section in dataclasses.fields(config):
        there = getattr(config, section.name)
        if dataclasses.is_dataclass(there):
            for field in dataclasses.fields(there):
                if "nemo_experiments" in str(getattr(there, field.name, "")):
                    found.append(f"{section.name}.{field.name}")
    return found


def main() -> None:
    """Answer what is asked."""
    question, answer = map(Path, sys.argv[1:])
    torch.cuda.get_device_properties = lambda device=0: H100
    found: dict[str, Any] = {}
    for name, case in json.loads(question.read_text()).items():
        try:
            config = configured(case)
        except UserError as error:
            told = [type(error).__name__, error.where, error.what, error.hint]
            found[name] = {"error": told}
            continue
        found[name] = {key: value(config, key) for key in case["fields"]}
        found[name]["default_folders"] = default_folders(config)
    answer.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
