"""Prefer chosen answers to rejected ones (DPO by TRL's DPOTrainer; CPU or one GPU).

Reads   --parent       Hugging Face folder with a chat template
        --preferences  folder with train.jsonl, validation.jsonl: messages, chosen,
                       rejected
        --recipe       YAML of one `dpo:` node
Writes  --out          Hugging Face folder; metrics.jsonl: step, loss (nats), accuracy:
                       share of pairs whose chosen answer gains more on the parent than
                       the rejected one, reward_chosen and reward_rejected (nats), lr,
                       grad_norm, at the last step validation_accuracy
Raises  RecipeError, DataError before training; LossNotFinite with its step
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.

    python -m scripts.transformers.dpo --parent P --preferences D --recipe R.yaml \\
        --out work/try
"""

from __future__ import annotations

from scripts.lib import cli
from scripts.lib.schema import DpoRecipe
from scripts.transformers import common, pairs
from scripts.transformers.scoring import score_counted_tokens


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    args = cli.parse(pairs.parser(__doc__), argv)
    recipe = cli.load_recipe(args.recipe, DpoRecipe)
    train, held = pairs.data(args)
    common.prepare(recipe)
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = common.load_parent(args.parent)
    common.check_template(tokenizer, args.parent)
    common.align(model, tokenizer)
    score_counted_tokens()
    model.config.use_cache = False
    losses = {"sigmoid": 1.0}
    if recipe.sft_weight:
        losses["sft"] = recipe.sft_weight
    trainer = DPOTrainer(
        model=model,
        ref_model=common.load_parent(args.parent)[0],
        args=DPOConfig(
            **pairs.settings(recipe, args, len(held)),
            beta=recipe.beta,
            loss_type=list(losses),
            loss_weights=list(losses.values()),
        ),
        train_dataset=pairs.rows(train),
        eval_dataset=pairs.rows(held),
        processing_class=tokenizer,
    )
    if not pairs.train(trainer, recipe, args, model):
        return common.NOT_DONE
    names = {
        "rewards/accuracies": "accuracy",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
    }
    pairs.write_metrics(trainer, recipe, args, names, "eval_rewards/accuracies")
    return 0


if __name__ == "__main__":
    cli.run(main)
