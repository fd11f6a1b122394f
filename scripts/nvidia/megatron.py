"""A model in Megatron, empty and in bfloat16, split as this process group is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.nvidia import settings


def build(definition: Path, sizes: Mapping[str, Any]) -> list[Any]:
    """The model that a Hugging Face folder defines: this process' chunks of it.

    `sizes` are the parallel sizes, by the names of the placement.
    """
    import torch

    provider = settings.model_of(definition)
    settings.place(provider, sizes)
    provider.bf16, provider.params_dtype = True, torch.bfloat16
    provider.pipeline_dtype = torch.bfloat16
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return list(provider.provide_distributed_model(wrap_with_ddp=False))
