"""Train a causal LM from its definition on a blend of tokens (Megatron-Bridge; GPUs).

Reads   --model      folder with config.json
        --tokenizer  tokenizer folder
        --data       folder with blend.json and its Megatron bin/idx shards
        --recipe     YAML of one `pretrain:` node
Writes  --out        Hugging Face folder in bfloat16, with parity.json; metrics.jsonl:
                     step, loss (nats/token), lr, grad_norm, tokens seen
Raises  RecipeError, DataError before training; LossNotFinite with its step; AttestError
        where the folder does not answer as Megatron does
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.
Under torchrun the processes share the model as the parallel flags say.

    torchrun --nproc-per-node 2 -m scripts.nvidia.pretrain --model M --tokenizer T \\
        --data D --recipe R.yaml --out work/try --tensor-parallel 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError
from scripts.lib.schema import PretrainRecipe
from scripts.nvidia import common, settings


def read_blend(data: Path) -> dict[str, Any]:
    """The blend in a folder. Raises DataError where it has no shard: no mock data."""
    try:
        blend = json.loads((data / "blend.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(data), f"holds no readable blend.json: {error}") from error
    if not blend.get("sources"):
        raise DataError(
            str(data / "blend.json"), "lists no shard", "tokenize some data"
        )
    for source in blend["sources"]:
        for ending in (".bin", ".idx"):
            path = data / f"{source['prefix']}{ending}"
            if not path.is_file():
                raise DataError(str(path), "missing, but blend.json lists it")
    return dict(blend)


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__)
    flags.add_argument("--model", type=Path, required=True, help="model definition")
    flags.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    flags.add_argument("--data", type=Path, required=True, help="tokenized blend")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, PretrainRecipe)
    blend = read_blend(args.data)
    common.prepare(args.work, recipe.precision)
    common.check_tokens(args.tokenizer, args.model)
    definition = common.readable(args.model, args.work)
    config = settings.configure(
        recipe,
        definition=definition,
        tokenizer=args.tokenizer,
        work=args.work,
        placement=common.placement(args),
        save_steps=args.save_steps,
    )
    settings.use_blend(config, blend, args.data, recipe.sequence_length, args.work)
    settings.override(config, recipe)

    def publish(model: list[Any]) -> None:
        from scripts.nvidia import convert

        convert.publish(
            model, args.out, definition=definition, tokenizer=args.tokenizer
        )

    base = common.base_of(definition, None, None)
    if not common.train(config, recipe, args, base, publish):
        return common.finish(cli.NOT_DONE)
    common.write_metrics(args, recipe, recipe.batch_size * recipe.sequence_length)
    return common.finish(0)


if __name__ == "__main__":
    cli.run(main)
