"""Megatron-Bridge's pretrain with the build's settings, and nothing of the build."""

from __future__ import annotations

from pathlib import Path

from scripts.lib import cli
from scripts.lib.schema import PretrainRecipe
from scripts.nvidia import common, pretrain, settings


def main() -> int:
    """Run it."""
    flags = common.parser(__doc__)
    for name in ("--model", "--tokenizer", "--data"):
        flags.add_argument(name, type=Path, required=True)
    args = cli.parse(flags, None)
    recipe = cli.load_recipe(args.recipe, PretrainRecipe)
    common.prepare(args.work)
    config = settings.configure(
        recipe,
        definition=args.model,
        tokenizer=args.tokenizer,
        work=args.work,
        placement=common.placement(args),
        save_steps=args.save_steps,
    )
    blend = pretrain.read_blend(args.data)
    settings.use_blend(config, blend, args.data, recipe.sequence_length, args.work)
    config.checkpoint.load = None
    config.train.exit_signal_handler = False
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain as bridge

    bridge(config, forward_step)
    return common.finish(0)


if __name__ == "__main__":
    cli.run(main)
