"""Publish a checkpoint as a Hugging Face folder, checked by Megatron (GPUs).

The parent's folder is loaded into Megatron, in bfloat16, and converted back: it must come
out as the same bits, and both must answer fixed prompts alike.

Reads   --parent  Hugging Face folder of a trainer
        --recipe  YAML of one `export:` node
Writes  --out     Hugging Face folder with generation settings for chat; parity.json:
                  what was compared, the differences, the tolerance
Raises  RecipeError where Megatron does not read all of the parent, and for settings of
        generation that Transformers refuses; AttestError where the folder, read back, is
        or answers other than its source
Resumes never: it takes minutes. The same parent gives the same bytes.

    python -m scripts.nvidia.export --parent P --recipe R.yaml --out work/try
"""

from __future__ import annotations

from pathlib import Path

from scripts.lib import cli, serving
from scripts.lib.schema import ExportRecipe
from scripts.nvidia import common, megatron, settings


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__, trains=False)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, ExportRecipe)
    common.prepare(args.work)
    parent = common.readable(args.parent, args.work)
    common.check_tokens(parent, parent)
    from scripts.nvidia import convert

    sizes = common.placement(args) | {"sequence_parallel": None}
    model = megatron.build(parent, sizes)
    settings.bridge_of(parent).load_hf_weights(model, str(parent))
    convert.check_start(model, parent)
    convert.publish(
        model, args.out, definition=parent, tokenizer=parent, generation=True
    )
    common.from_first(lambda: serving.complete(args.out, recipe.generation))
    return common.finish(0)


if __name__ == "__main__":
    cli.run(main)
