"""Train a causal LM on checked answers (TRL's GRPOTrainer; CPU or one GPU).

Reads   --parent   Hugging Face folder with a chat template
        --reward-model  folder of a reward model, where that is an environment
        --prompts  folder with train.jsonl: input, output
        --recipe   YAML of one `grpo:` node
Writes  --out      Hugging Face folder; metrics.jsonl: step, reward, reward_std, loss, lr,
                   grad_norm, reward_<environment>, turns (where there are several),
                   overlong_penalty (of dapo, before its weight), completion_tokens,
                   entropy (nats/token), kl (nats/token, where beta > 0)
Raises  RecipeError, DataError before training; LossNotFinite with its step
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.

    python -m scripts.transformers.grpo --parent P --prompts D --recipe R.yaml \\
        --out work/try
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.environments.mix import Mix, check_rows
from scripts.lib import cli, dapo, outputs
from scripts.lib.errors import RecipeError
from scripts.lib.schema import GrpoRecipe
from scripts.transformers import common
from scripts.transformers.scoring import score_counted_tokens
from scripts.transformers.turns import Conversation, Rollouts

PENALTY = "soft_overlong_punishment_reward"
"""DAPO's penalty as TRL calls it."""


def rewards_of(environments: Mix) -> Callable[..., list[float]]:
    """The environments' rewards as TRL asks for them; each one's mean is logged.

    Those of several turns have come in already, as the conversations were held.
    """
    told: set[str] = set()

    def reward(
        prompts: list[Any],
        completions: list[Any],
        output: list[str],
        log_metric: Callable[[str, float], None],
        talk: list[Conversation] | None = None,
        **_: Any,
    ) -> list[float]:
        if talk is None:
            rows = [
                {"input": prompt[-1]["content"], "output": answer}
                for prompt, answer in zip(prompts, output, strict=True)
            ]
            conversations = [p + c for p, c in zip(prompts, completions, strict=True)]
            steps = environments.steps(conversations, rows)
            found = [(turn.reward, rewards) for turn, rewards in steps]
        else:
            found = [(one.reward, one.each) for one in talk]
            log_metric("turns", fmean(one.turns for one in talk))
        for name, faults in environments.faults.items():
            log_metric(f"reward_{name}", fmean(rewards[name] for _, rewards in found))
            if faults.count and name not in told:
                told.add(name)
                print(f"environment {name}: {faults.first}; such a reward is 0")
        return [sum_ for sum_, _ in found]

    return reward


def rollouts_of(
    prompts: list[dict[str, Any]],
    environments: Mix,
    recipe: GrpoRecipe,
    tokenizer: Any,
) -> Rollouts:
    """How conversations of several turns are held; each prompt gets its row's number.

    TRL tells a rollout of its prompt's messages alone.
    """
    if recipe.max_conversation_tokens is None:
        raise RecipeError("max_conversation_tokens", "missing, with several turns")
    rows = []
    for number, prompt in enumerate(prompts):
        asked = prompt["prompt"][-1]
        rows.append({"input": asked["content"], "output": prompt["output"]})
        asked["row"] = number
    return Rollouts(
        environments,
        rows,
        tokenizer,
        recipe.max_turns or 1,
        recipe.max_conversation_tokens,
        recipe.max_completion_tokens,
    )


def for_trl(row: Mapping[str, str]) -> dict[str, Any]:
    """A prompt and its answer as TRL takes them."""
    prompt = [{"role": "user", "content": row["input"]}]
    return {"prompt": prompt, "output": row["output"]}


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = common.parser(__doc__)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    flags.add_argument("--prompts", type=Path, required=True, help="prompts folder")
    flags.add_argument("--reward-model", type=Path, help="of the environment so named")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, GrpoRecipe)
    if recipe.batch_size % recipe.num_generations:
        raise RecipeError(
            f"{args.recipe} batch_size",
            f"{recipe.batch_size} is no multiple of num_generations, "
            f"{recipe.num_generations}",
        )
    if recipe.draws_anew:
        raise RecipeError(
            f"{args.recipe} dynamic_sampling",
            "TRL has no dynamic sampling, which is a part of dapo",
            "dynamic_sampling: false trains by the rest of it",
        )
    rows = common.read_prompts(args.prompts / "train.jsonl")
    check_rows(recipe.environments(), rows)
    prompts = [*map(for_trl, rows)]
    common.prepare(recipe)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.rewards import get_soft_overlong_punishment

    model, tokenizer = common.load_parent(args.parent)
    common.check_template(tokenizer, args.parent)
    tokenizer.padding_side = "left"
    common.align(model, tokenizer)
    score_counted_tokens()
    num_prompts = recipe.steps * recipe.batch_size // recipe.num_generations
    order = common.repeated(len(prompts), num_prompts, recipe.seed)
    environments = Mix(common.environments_of(recipe, args.reward_model))
    rewards = [rewards_of(environments)]
    if recipe.algorithm == "dapo":
        longest = recipe.max_completion_tokens
        penalty = get_soft_overlong_punishment(longest, dapo.soft_tokens(longest))
        rewards.append(penalty)
    rollouts = None
    if (recipe.max_turns or 1) > 1:
        rollouts = rollouts_of(prompts, environments, recipe, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(
            **common.settings(recipe, args),
            num_generations=recipe.num_generations,
            max_completion_length=recipe.max_completion_tokens,
            temperature=recipe.temperature,
            top_k=0,
            top_p=1.0,
            beta=recipe.beta,
            num_iterations=1,
            steps_per_generation=1,
            shuffle_dataset=False,
            **(dapo.trl() if recipe.algorithm == "dapo" else {}),
        ),
        train_dataset=Dataset.from_list([prompts[i] for i in order]),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )
    if not common.train(trainer, recipe, args, "reward"):
        return common.NOT_DONE
    common.align(model, tokenizer)
    common.save_model(model, args.parent, args.out)
    if common.is_writer():
        each = [f"reward_{name}" for name in recipe.environment]
        outputs.write_metrics(
            args.out / "metrics.jsonl",
            trainer.state.log_history,
            recipe.log_steps,
            {
                "reward": "reward",
                "reward_std": "reward_std",
                "loss": "loss",
                "learning_rate": "lr",
                "grad_norm": "grad_norm",
                **{name: name for name in each},
                f"rewards/{PENALTY}/mean": "overlong_penalty",
                "turns": "turns",
                "completions/mean_length": "completion_tokens",
                "entropy": "entropy",
                "kl": "kl",
            },
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
