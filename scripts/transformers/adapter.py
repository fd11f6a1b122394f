"""Low-rank adapters by PEFT: what they adapt, and how they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import outputs
from scripts.lib.errors import AttestError, RecipeError
from scripts.lib.schema import Peft
from scripts.transformers import common

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTED |= {"in_proj"}
"""Layers of attention and MLP, and Mamba's first; its last is fused into a kernel."""

TOLERANCE = 1.0e-4
"""Of the largest logit: a merge rounds once more."""


def config(model: PreTrainedModel, peft: Peft) -> LoraConfig:
    """LoRA or DoRA as PEFT knows it. Raises RecipeError for layers not in the model."""
    from peft import LoraConfig
    from torch import nn

    layers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    wanted = set(peft.target_modules or layers & ADAPTED)
    if not wanted or (unknown := wanted - layers):
        what = f"no layer {min(unknown)}" if wanted else "no layer known to adapt"
        raise RecipeError(
            "peft.target_modules", what, f"name some of {', '.join(sorted(layers))}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.rank,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        use_dora=peft.method == "dora",
        target_modules=wanted,
    )


def publish(model: PeftModel, parent: Path, out: Path) -> None:
    """Write the merged model, the adapter in adapter/, and parity.json.

    Only the writer writes. Raises AttestError where the parent with the adapter answers
    other than the merged model.
    """
    if not common.is_writer():
        return
    folder = out / "adapter"
    model.peft_config["default"].base_model_name_or_path = ""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["target_modules"].sort()  # PEFT has a set of them, in any order
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    common.save_model(model.merge_and_unload(), parent, out)
    parity = compare(parent, out)
    (out / "parity.json").write_text(json.dumps(parity, indent=1) + "\n")


def compare(parent: Path, out: Path) -> dict[str, Any]:
    """How the parent with the adapter and the merged model answer, both read back."""
    import torch
    from peft import PeftModel

    base, tokenizer = common.load_parent(parent)
    prompts = outputs.fixed_prompts(tokenizer)

    def answers(model: Any) -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad():
            return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]

    merged = answers(common.load_parent(out)[0])
    adapted = answers(PeftModel.from_pretrained(base, str(out / "adapter")))
    difference = outputs.largest_difference(adapted, merged)
    tolerance = TOLERANCE * max(float(row.abs().max()) for row in merged)
    if difference > tolerance:
        raise AttestError(
            str(out / "adapter"),
            f"on its parent, its logits differ from the merged model's by {difference}",
        )
    return {
        "prompts": len(prompts),
        "tokens": sum(len(prompt) for prompt in prompts),
        "largest_logit_difference": difference,
        "tolerance": tolerance,
    }
