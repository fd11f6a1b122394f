"""Prefer chosen answers to rejected ones (DPO by NeMo-RL on Ray; GPUs).

Reads   --parent       Hugging Face folder with a chat template
        --preferences  folder with train.jsonl, validation.jsonl: messages, chosen,
                       rejected
        --recipe       YAML of one `dpo:` node
Writes  --out          Hugging Face folder in bfloat16, with parity.json; metrics.jsonl:
                       step, loss (nats), accuracy: share of pairs whose chosen answer
                       gains more on the parent than the rejected one, reward_chosen and
                       reward_rejected (nats), lr, grad_norm, at the last step
                       validation_accuracy, seconds a step
Raises  RecipeError, DataError before training; LossNotFinite with its step; AttestError
        where the folder does not answer as the trained weights do
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.

    python -m scripts.nvidia.dpo --parent P --preferences D --recipe R.yaml \\
        --out work/try --gpus 1 --backend dtensor
"""

from __future__ import annotations

from pathlib import Path

from scripts.lib import cli
from scripts.lib.schema import DpoRecipe
from scripts.nvidia import rl


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = rl.parser(__doc__)
    flags.add_argument("--preferences", type=Path, required=True, help="their folder")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, DpoRecipe)
    own = {
        "dpo": {
            "reference_policy_kl_penalty": recipe.beta,
            "sft_loss_weight": recipe.sft_weight,
        }
    }
    return rl.train_on_pairs("dpo", args, recipe, own, "causal")


if __name__ == "__main__":
    rl.leave(main)
