"""Publish a checkpoint as a Hugging Face folder, checked against its source (CPU).

Reads   --parent  Hugging Face folder of a trainer
        --recipe  YAML of one `export:` node
Writes  --out     Hugging Face folder with generation settings for chat; parity.json:
                  prompts, tokens, largest logit difference, tolerance, parameters
Raises  RecipeError for settings of generation that Transformers refuses; AttestError
        where the folder, read back, answers other than its source
Resumes never: it takes seconds. The same parent gives the same bytes.

    python -m scripts.transformers.export --parent P --recipe R.yaml --out work/try
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.lib import cli, outputs, serving
from scripts.lib.errors import AttestError
from scripts.lib.schema import ExportRecipe
from scripts.transformers import common

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOLERANCE = 0.0


def logits_of(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The model's logits on each prompt, alone in its batch."""
    import torch

    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = cli.parser(__doc__)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, ExportRecipe)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GenerationConfig

    source, tokenizer = common.load_parent(args.parent)
    prompts = outputs.fixed_prompts(tokenizer)
    before = logits_of(source, prompts)
    common.align(source, tokenizer)
    source.generation_config = GenerationConfig(
        **outputs.generation_settings(tokenizer, source.config.max_position_embeddings)
    )
    common.save_model(source, args.parent, args.out)
    serving.complete(args.out, recipe.generation)
    copy, _ = common.load_parent(args.out)
    difference = outputs.largest_difference(before, logits_of(copy, prompts))
    parity = {
        "prompts": len(prompts),
        "tokens": sum(len(prompt) for prompt in prompts),
        "largest_logit_difference": difference,
        "tolerance": TOLERANCE,
        "parameters": copy.num_parameters(),
    }
    if difference > TOLERANCE:
        raise AttestError(
            str(args.out), f"its logits differ from the source's by {difference}"
        )
    (args.out / "parity.json").write_text(json.dumps(parity, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
