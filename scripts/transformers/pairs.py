"""Pairs of answers as TRL's trainers take them, and what these log of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import outputs
from scripts.lib.errors import DataError
from scripts.lib.schema import PairsRecipe
from scripts.transformers import common

if TYPE_CHECKING:
    from transformers import Trainer

Pair = dict[str, list[dict[str, str]]]
"""Messages by `prompt`, `chosen` and `rejected`; TRL renders them with the template."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of a stage that learns from pairs."""
    flags = common.parser(doc)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    flags.add_argument("--preferences", type=Path, required=True, help="their folder")
    return flags


def read(path: Path) -> list[Pair]:
    """The pairs of a file that the stage `preferences` wrote."""

    def pair(row: Any) -> Pair:
        sides = {
            side: [{"role": "assistant", "content": str(row[side])}]
            for side in ("chosen", "rejected")
        }
        return {"prompt": row["messages"], **sides}

    return common.read_rows(path, "pair", pair)


def data(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and those held back. Raises DataError for none."""
    found = read(args.preferences / "train.jsonl")
    if not found:
        raise DataError(str(args.preferences / "train.jsonl"), "holds no pairs")
    return found, read(args.preferences / "validation.jsonl")


def rows(pairs: list[Pair]) -> Any:
    """Pairs as TRL takes them; None where there are none."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(pairs) if pairs else None


def settings(
    recipe: PairsRecipe, args: argparse.Namespace, num_held: int
) -> dict[str, Any]:
    """Arguments of both trainers. Nothing is cut: `preferences` has the lengths."""
    # TRL reports the mean of its batches, which is that of the pairs where all
    # batches have as many.
    sizes = range(1, recipe.batch_size + 1)
    equal = max((size for size in sizes if num_held % size == 0), default=1)
    return common.settings(recipe, args) | {
        "per_device_eval_batch_size": equal,
        "train_sampling_strategy": "sequential",
        "max_length": None,
    }


def train(
    trainer: Trainer, recipe: PairsRecipe, args: argparse.Namespace, model: Any
) -> bool:
    """Train on the pairs in the order of the whole run, and save the model.

    Returns False where it was stopped sooner.
    """
    once = trainer.train_dataset  # each is read once
    wanted = recipe.steps * recipe.batch_size
    order = common.repeated(len(once), wanted, recipe.seed)
    trainer.train_dataset = once.select(order)
    if not common.train(trainer, recipe, args, "loss"):
        return False
    common.save_model(model, args.parent, args.out)
    return True


def write_metrics(
    trainer: Trainer,
    recipe: PairsRecipe,
    args: argparse.Namespace,
    names: dict[str, str],
    accuracy: str,
) -> None:
    """Write metrics.jsonl, with the share of held-back pairs told apart at its end."""
    history = trainer.state.log_history
    if trainer.eval_dataset is not None:
        last = [entry for entry in history if "loss" in entry][-1]
        last["validation_accuracy"] = trainer.evaluate()[accuracy]
    names = {
        "loss": "loss",
        **names,
        "learning_rate": "lr",
        "grad_norm": "grad_norm",
        "validation_accuracy": "validation_accuracy",
    }
    outputs.write_metrics(args.out / "metrics.jsonl", history, recipe.log_steps, names)
