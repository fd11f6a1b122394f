"""Fine-tune a causal LM on packed chats: all of it, LoRA or DoRA (TRL's SFTTrainer and
PEFT; CPU or GPUs).

The packed rows are split back into chats, so none ever sees another, and padded in
batches; the loss is on each token whose predecessor's mask is 1, as pack writes it.

Reads   --parent  Hugging Face folder
        --packed  folder with packed.parquet: input_ids, loss_mask, seq_start_id
        --recipe  YAML of one `sft:` node
Writes  --out     Hugging Face folder, and with `peft` the adapter in adapter/ and
                  parity.json; metrics.jsonl: step, loss (nats/token), lr, grad_norm,
                  token_accuracy
Raises  RecipeError, DataError before training; LossNotFinite with its step; AttestError
        where the adapter does not answer as the merged model does
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.
Under torchrun each process takes its part of every batch, and rank 0 writes.

    python -m scripts.transformers.sft --parent P --packed D --recipe R.yaml \\
        --out work/try
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.lib import cli, outputs
from scripts.lib.errors import DataError
from scripts.lib.schema import SftRecipe
from scripts.transformers import adapter, common
from scripts.transformers.scoring import score_counted_tokens

NOT_COUNTED = -100


def unpack(path: Path) -> list[dict[str, list[int]]]:
    """The chats of a packed file: input_ids, and labels where they count."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["input_ids", "loss_mask", "seq_start_id"])
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"not a packed file: {error}") from error
    chats = []
    for row in table.to_pylist():
        ids, mask, starts = row["input_ids"], row["loss_mask"], row["seq_start_id"]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            labels = [NOT_COUNTED] + [
                ids[i + 1] if mask[i] else NOT_COUNTED for i in range(start, end - 1)
            ]
            if any(mask[start : end - 1]):
                chats.append({"input_ids": ids[start:end], "labels": labels})
    if not chats:
        raise DataError(str(path), "no chat has a token that counts")
    return chats


def check_fits(chats: list[dict[str, list[int]]], config: Any, path: Path) -> None:
    """Raise where a chat holds a token or a position the model has not."""
    largest = max(max(chat["input_ids"]) for chat in chats)
    longest = max(len(chat["input_ids"]) for chat in chats)
    if largest >= config.vocab_size:
        raise DataError(
            str(path),
            f"token {largest}, but the model's vocab_size is {config.vocab_size}",
            "pack with the tokenizer the parent was trained with",
        )
    if longest > config.max_position_embeddings:
        raise DataError(
            str(path),
            f"a chat of {longest} tokens, but the model's max_position_embeddings is "
            f"{config.max_position_embeddings}",
        )


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    flags.add_argument("--packed", type=Path, required=True, help="packed chats")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, SftRecipe)
    common.prepare(recipe)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = common.load_parent(args.parent)
    chats = unpack(args.packed / "packed.parquet")
    check_fits(chats, model.config, args.packed / "packed.parquet")
    order = common.repeated(len(chats), recipe.steps * recipe.batch_size, recipe.seed)
    common.align(model, tokenizer)
    score_counted_tokens()
    model.config.use_cache = False
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common.settings(recipe, args),
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        train_dataset=Dataset.from_list([chats[i] for i in order]),
        processing_class=tokenizer,
        peft_config=adapter.config(model, recipe.peft) if recipe.peft else None,
    )
    if not common.train(trainer, recipe, args, "loss"):
        return common.NOT_DONE
    if recipe.peft:
        adapter.publish(trainer.model, args.parent, args.out)
    else:
        common.save_model(model, args.parent, args.out)
    if common.is_writer():
        outputs.write_metrics(
            args.out / "metrics.jsonl",
            trainer.state.log_history,
            recipe.log_steps,
            {
                "loss": "loss",
                "learning_rate": "lr",
                "grad_norm": "grad_norm",
                "mean_token_accuracy": "token_accuracy",
            },
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
