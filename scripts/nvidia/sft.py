"""Fine-tune a causal LM on packed chats: all of it, LoRA or DoRA (Megatron-Bridge; GPUs).

Each chat of a packed row sees itself alone; the loss is on each token whose
predecessor's mask is 1, as pack writes it. A step is `batch_size` packed rows.

Reads   --parent  Hugging Face folder
        --packed  folder with packed.parquet: input_ids, loss_mask, seq_start_id
        --recipe  YAML of one `sft:` node
Writes  --out     Hugging Face folder in bfloat16, with parity.json, and with `peft` the
                  adapter in adapter/; metrics.jsonl: step, loss (nats/token), lr,
                  grad_norm
Raises  RecipeError, DataError before training; LossNotFinite with its step; AttestError
        where the folder does not answer as Megatron does
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.
Under torchrun the processes share the model as the parallel flags say.

    torchrun --nproc-per-node 2 -m scripts.nvidia.sft --parent P --packed D \\
        --recipe R.yaml --out work/try --tensor-parallel 2
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.schema import SftRecipe
from scripts.nvidia import common, settings


def check_rows(packed: Path, model: Path, batch_size: int) -> int:
    """The length of the longest packed row.

    Raises DataError for rows that the model cannot take, or fewer than a step's.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(packed)
        longest = largest = 0
        rows = file.metadata.num_rows
        for batch in file.iter_batches(columns=["input_ids"], batch_size=4096):
            ids = batch.column("input_ids")
            longest = max(longest, pc.max(pc.list_value_length(ids)).as_py() or 0)
            largest = max(largest, pc.max(pc.list_flatten(ids)).as_py() or 0)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(str(packed), f"not a packed file: {error}") from error
    if not longest:
        raise DataError(str(packed), "holds no row", "pack some chats")
    if rows < batch_size:
        raise DataError(
            str(packed),
            f"{rows} rows, fewer than the {batch_size} of a step",
            "lower batch_size, or pack more chats",
        )
    config = common.read_config(model)
    entries = config.get("vocab_size", largest + 1)
    positions = config.get("max_position_embeddings", longest)
    if largest >= entries:
        raise DataError(
            str(packed),
            f"token {largest}, but the model's vocab_size is {entries}",
            "pack with the tokenizer the parent was trained with",
        )
    if longest > positions:
        raise DataError(
            str(packed),
            f"rows of {longest} tokens, but the model's longest sequence is {positions}",
            "pack with a smaller sequence_length",
        )
    return longest


def parent_folder(parent: str) -> Path:
    """A parent's folder; `hf:org/name@revision` is fetched from the hub.

    Raises RecipeError where there is none, or the hub has not given it.
    """
    if not parent.startswith("hf:"):
        return Path(parent)
    name, _, revision = parent.removeprefix("hf:").partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[
                    "*.json",
                    "*.safetensors",
                    "*.jinja",
                    "*.model",
                    "*.txt",
                ],
                local_files_only=os.environ.get("HF_HUB_OFFLINE") == "1",
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            parent,
            f"the hub did not give it: {error}",
            "check name, revision and HF_TOKEN, or name a local folder",
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__)
    flags.add_argument("--parent", required=True, help="model folder")
    flags.add_argument("--packed", type=Path, required=True, help="packed chats")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, SftRecipe)
    source = parent_folder(args.parent)
    packed = args.packed / "packed.parquet"
    length = check_rows(packed, source, recipe.batch_size)
    common.prepare(args.work, recipe.precision)
    parent = common.readable(source, args.work)
    common.check_tokens(parent, parent)
    config = settings.configure(
        recipe,
        definition=parent,
        tokenizer=parent,
        work=args.work,
        placement=common.placement(args),
        save_steps=args.save_steps,
        parent=parent,
    )
    settings.use_packed(config, packed, rounded(length, args))
    settings.override(config, recipe)

    def publish(model: list[Any]) -> None:
        from scripts.nvidia import convert

        convert.publish(
            model,
            args.out,
            definition=parent,
            tokenizer=parent,
            peft=config.peft,
        )

    def check(model: list[Any]) -> None:
        from scripts.nvidia import convert

        convert.check_start(model, parent)

    base = common.base_of(parent, parent, recipe.peft)
    if not common.train(config, recipe, args, base, publish, check):
        return common.finish(cli.NOT_DONE)
    common.write_metrics(args, recipe, 0)
    return common.finish(0)


def rounded(length: int, args: Any) -> int:
    """The rows' common length: a multiple of what sequence parallelism divides by."""
    several = max(16, args.tensor_parallel)
    return -(-length // several) * several


if __name__ == "__main__":
    cli.run(main)
