"""Train a causal LM from its definition on a blend of tokens (Transformers; CPU or
GPUs).

Reads   --model      folder with config.json
        --tokenizer  tokenizer folder
        --data       folder with blend.json and its Megatron bin/idx shards
        --recipe     YAML of one `pretrain:` node
Writes  --out        Hugging Face folder; metrics.jsonl: step, loss (nats/token), lr,
                     grad_norm, tokens seen
Raises  RecipeError, DataError before training; LossNotFinite with its step
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.
Under torchrun each process takes its part of every batch, and rank 0 writes.

    python -m scripts.transformers.pretrain --model M --tokenizer T --data D \\
        --recipe R.yaml --out work/try
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import cli, outputs
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.schema import PretrainRecipe
from scripts.transformers import common

if TYPE_CHECKING:
    import numpy as np

    from scripts.lib.indexed import IndexedReader


def blend_order(weights: list[float], count: int) -> list[int]:
    """Which source each of `count` sequences comes from.

    Each time the source furthest below its share, so that every beginning of the
    list is as near the weights as whole sequences allow.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    taken = [0] * len(weights)
    order = []
    for i in range(1, count + 1):
        source = max(range(len(shares)), key=lambda s: (shares[s] * i - taken[s], -s))
        taken[source] += 1
        order.append(source)
    return order


@dataclass
class Stream:
    """A source's documents end to end, shuffled anew each epoch, as long as needed."""

    documents: IndexedReader
    seed: tuple[int, int]
    order: np.ndarray = field(init=False)
    ends: np.ndarray = field(init=False)

    def reserve(self, num_tokens: int) -> None:
        """Fix the order of enough epochs to hold `num_tokens`."""
        import numpy as np

        lengths = np.asarray(self.documents.sizes, dtype=np.int64)
        epochs = -(-num_tokens // int(lengths.sum()))
        self.order = np.concatenate(
            [
                np.random.default_rng([*self.seed, epoch]).permutation(len(lengths))
                for epoch in range(max(epochs, 1))
            ]
        )
        self.ends = np.cumsum(lengths[self.order])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the stream."""
        import numpy as np

        at = int(np.searchsorted(self.ends, start, side="right"))
        parts, missing = [], count
        while missing:
            document = self.documents[int(self.order[at])]
            skip = len(document) - (int(self.ends[at]) - start)
            part = document[skip : skip + missing]
            parts.append(part)
            start += len(part)
            missing -= len(part)
            at += 1
        return np.concatenate(parts)


class Sequences:
    """The run's training sequences in order, cut from the blend's streams."""

    def __init__(self, streams: list[Stream], order: list[int], length: int) -> None:
        self.streams, self.order, self.length = streams, order, length
        taken = [0] * len(streams)
        self.index: list[int] = []
        for source in order:
            self.index.append(taken[source])
            taken[source] += 1
        for stream, count in zip(streams, taken, strict=True):
            stream.reserve(count * length)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        import torch

        stream = self.streams[self.order[i]]
        tokens = stream.read(self.index[i] * self.length, self.length)
        ids = torch.from_numpy(tokens.astype("int64"))
        return {"input_ids": ids, "labels": ids}


def load_sequences(data: Path, recipe: PretrainRecipe) -> Sequences:
    """The sequences of a run on the blend in a folder."""
    from scripts.lib.indexed import IndexedReader

    blend = json.loads((data / "blend.json").read_text(encoding="utf-8"))
    streams = []
    for i, source in enumerate(blend["sources"]):
        reader = IndexedReader(data / source["prefix"])
        num_tokens = int(reader.sizes.sum(dtype="int64"))
        if num_tokens < recipe.sequence_length:
            raise DataError(
                str(data / source["prefix"]),
                f"{num_tokens} tokens, fewer than one sequence",
                f"give it more documents, or a sequence_length below {num_tokens}",
            )
        streams.append(Stream(reader, (recipe.seed, i)))
    weights = [float(source["weight"]) for source in blend["sources"]]
    order = blend_order(weights, recipe.steps * recipe.batch_size)
    return Sequences(streams, order, recipe.sequence_length)


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__)
    flags.add_argument("--model", type=Path, required=True, help="model definition")
    flags.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    flags.add_argument("--data", type=Path, required=True, help="tokenized blend")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, PretrainRecipe)
    common.prepare(recipe)
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            str(args.model / "config.json"),
            f"vocab_size {config.vocab_size}, but the tokenizer has {len(tokenizer)}",
            "raise vocab_size in config.json, or train a smaller tokenizer",
        )
    if recipe.sequence_length > config.max_position_embeddings:
        raise RecipeError(
            f"{args.recipe} sequence_length",
            f"{recipe.sequence_length} is above the model's "
            f"max_position_embeddings, {config.max_position_embeddings}",
        )
    sequences = load_sequences(args.data, recipe)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    common.align(model, tokenizer)
    model.config.use_cache = False
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **common.settings(recipe, args), train_sampling_strategy="sequential"
        ),
        train_dataset=sequences,
    )
    if not common.train(trainer, recipe, args, "loss"):
        return common.NOT_DONE
    common.save_model(model, args.tokenizer, args.out)
    if common.is_writer():
        outputs.write_metrics(
            args.out / "metrics.jsonl",
            trainer.state.log_history,
            recipe.log_steps,
            {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"},
            tokens_a_step=recipe.batch_size * recipe.sequence_length,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
