"""Train a reward model on pairs of answers (Bradley-Terry, by TRL's RewardTrainer; CPU
or one GPU).

Reads   --parent       Hugging Face folder with a chat template
        --preferences  folder with train.jsonl, validation.jsonl: messages, chosen,
                       rejected
        --recipe       YAML of one `rm:` node
Writes  --out          Hugging Face folder of a sequence classifier with one output;
                       metrics.jsonl: step, loss (nats), accuracy: share of pairs whose
                       chosen answer scores higher, reward_chosen, reward_rejected, lr,
                       grad_norm, at the last step validation_accuracy
Raises  RecipeError, DataError before training; LossNotFinite with its step
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.

    python -m scripts.transformers.rm --parent P --preferences D --recipe R.yaml \\
        --out work/try
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import RecipeError
from scripts.lib.schema import RmRecipe
from scripts.transformers import common, pairs


def classifier(parent: Path) -> tuple[Any, Any]:
    """A parent's model with one output in place of its words, and its tokenizer."""
    import torch
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    if not (parent / "config.json").is_file():
        raise RecipeError(str(parent), "holds no config.json", "give a model folder")
    config = AutoConfig.from_pretrained(parent, trust_remote_code=False)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RecipeError(
            str(parent),
            f"Transformers has no classifier of {config.model_type} models",
            "start from a transformer: Llama, Qwen",
        )
    tokenizer = AutoTokenizer.from_pretrained(parent, trust_remote_code=False)
    common.check_template(tokenizer, parent)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.num_labels, config.use_cache = 1, False
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    model = AutoModelForSequenceClassification.from_pretrained(
        parent, config=config, dtype=torch.float32, trust_remote_code=False
    )
    return model, tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    args = cli.parse(pairs.parser(__doc__), argv)
    recipe = cli.load_recipe(args.recipe, RmRecipe)
    train, held = pairs.data(args)
    common.prepare(recipe)
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = classifier(args.parent)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**pairs.settings(recipe, args, len(held))),
        train_dataset=pairs.rows(train),
        eval_dataset=pairs.rows(held),
        processing_class=tokenizer,
    )
    if not pairs.train(trainer, recipe, args, model):
        return common.NOT_DONE
    for entry in trainer.state.log_history:
        if "margin" in entry:
            entry["chosen"] = entry["mean_reward"] + entry["margin"] / 2
            entry["rejected"] = entry["mean_reward"] - entry["margin"] / 2
    names = {
        "accuracy": "accuracy",
        "chosen": "reward_chosen",
        "rejected": "reward_rejected",
    }
    pairs.write_metrics(trainer, recipe, args, names, "eval_accuracy")
    return 0


if __name__ == "__main__":
    cli.run(main)
