"""Train a causal LM on rewards (NeMo-RL on Ray, vLLM for the completions; GPUs).

Reads   --parent   Hugging Face folder with a chat template
        --reward-model  folder of a reward model, where that is an environment
        --prompts  folder with train.jsonl, validation.jsonl: input, output
        --recipe   YAML of one `grpo:` node
Writes  --out      Hugging Face folder in bfloat16, with parity.json; metrics.jsonl:
                   step, reward, loss, lr, grad_norm, reward_<environment>, completion_tokens,
                   entropy and kl (nats/token), gen_kl_error: how far vLLM's probabilities are from the
                   trainer's (nats/token), seconds a step
Raises  RecipeError, DataError before training; LossNotFinite with its step; AttestError
        where the folder does not answer as the trained weights do
Resumes from the newest whole save in --work. Done at step == recipe.steps.
Stops after a save, with exit code 75, on SIGTERM or a file `stop` in --work.
Runs beside the Ray that $RAY_ADDRESS names, or starts one.

    python -m scripts.nvidia.grpo --parent P --prompts D --recipe R.yaml --out work/try \\
        --gpus 1 --backend megatron
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from scripts.environments.mix import check_rows
from scripts.lib import cli, dapo
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.schema import GrpoRecipe
from scripts.nvidia import rl

ENVIRONMENT = "build"
METRICS = {
    "reward": "reward",
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "mean_gen_tokens_per_sample": "completion_tokens",
    "approx_entropy": "entropy",
    "kl_penalty": "kl",
    "gen_kl_error": "gen_kl_error",
    "truncation_rate": "truncated",
    "filtered_reward": "filtered_reward",
    "seconds/total_step_time": "seconds",
    "validation/accuracy": "validation_reward",
}
VALIDATION_ROWS = 256
MOST_WORKERS = 16


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = rl.parser(__doc__)
    flags.add_argument("--prompts", type=Path, required=True, help="prompts folder")
    flags.add_argument("--reward-model", type=Path, help="of the environment so named")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, GrpoRecipe)
    rl.prepare(args)
    config = rl.open_parent(args)
    longest = check_template(args.parent, args.prompts)
    judges = recipe.environments()
    rows = {name: copy_rows(args, name, judges) for name in ("train", "validation")}
    settings = configure(recipe, args, config, longest, rows)
    watch, done = rl.run(
        "grpo", args, settings, recipe.steps, "reward", register_environment
    )
    if not done:
        return cli.NOT_DONE
    rl.publish(args, recipe.steps)
    each = {f"reward/{name}": f"reward_{name}" for name in recipe.environment}
    rl.write_metrics(args, watch, recipe, METRICS | each)
    return 0


def configure(
    recipe: GrpoRecipe,
    args: Any,
    config: dict[str, Any],
    longest: int,
    rows: dict[str, int],
) -> dict[str, Any]:
    """NeMo-RL's settings for a recipe; `longest` prompt in tokens, rows by file."""
    turns = recipe.max_turns or 1
    length = longest + recipe.max_completion_tokens + rl.MARGIN
    length = max(length, recipe.max_conversation_tokens or 0)
    several = 2 * args.tensor_parallel * args.context_parallel
    length += -length % several
    if limit := config.get("max_position_embeddings"):  # vLLM takes nothing longer
        length = min(length, limit - limit % several)
    num_prompts = recipe.batch_size // recipe.num_generations
    drawn = num_prompts * (dapo.MULTIPLIER if recipe.draws_anew else 1)
    if rows["train"] < drawn:  # NeMo-RL would end at once, as if all were well
        raise DataError(
            str(args.prompts / "train.jsonl"),
            f"{rows['train']} prompts, but a step draws {drawn}",
            "lower batch_size, raise num_generations, or give more prompts",
        )
    checked = min(rows["validation"], VALIDATION_ROWS)
    settings = rl.around(args) | {
        "grpo": {
            "num_prompts_per_step": num_prompts,
            "num_generations_per_prompt": recipe.num_generations,
            "max_rollout_turns": turns,
            "max_num_epochs": rl.NO_LIMIT,
            "max_num_steps": recipe.steps,
            "val_period": 0,
            "val_at_start": False,
            "val_at_end": False,
            "max_val_samples": checked,
            "val_batch_size": checked,
            "seed": recipe.seed,
        },
        "loss_fn": {"reference_policy_kl_penalty": recipe.beta},
        "policy": rl.policy(recipe, args, config, length)
        | {"generation": generation(recipe, args, length)},
        "data": data(args, longest, rows),
        "env": {ENVIRONMENT: environment(recipe, args)},
    }
    if recipe.algorithm == "dapo":
        meant = dapo.settings(recipe.max_completion_tokens, recipe.draws_anew)
        rl.merge(settings, rl.nested(meant))
    return rl.merge(settings, rl.nested(recipe.overrides))


def generation(recipe: GrpoRecipe, args: Any, length: int) -> dict[str, Any]:
    """The `policy.generation` section: vLLM, beside the trainer or on GPUs apart."""
    apart = args.generation_gpus
    return {
        "backend": "vllm",
        "max_new_tokens": recipe.max_completion_tokens,
        "temperature": recipe.temperature,
        "top_p": 1.0,
        "top_k": None,
        "vllm_cfg": {
            "tensor_parallel_size": args.generation_tensor_parallel,
            "gpu_memory_utilization": args.generation_memory,
            "max_model_len": length,
            "use_tqdm": False,
            "enable_vllm_metrics_logger": False,
        },
        "colocated": {
            "enabled": not apart,
            "resources": {"gpus_per_node": apart or None, "num_nodes": None},
        },
    }


def data(args: Any, longest: int, rows: dict[str, int]) -> dict[str, Any]:
    """The `data` section. A prompt as long as the limit would be cut to four tokens."""

    def file(name: str) -> dict[str, Any]:
        return {
            "dataset_name": "ResponseDataset",
            "data_path": str((args.work / "rows" / f"{name}.jsonl").absolute()),
            "input_key": "input",
            "output_key": "output",
            "prompt_file": None,
            "system_prompt_file": None,
            "processor": "math_hf_data_processor",
            "env_name": ENVIRONMENT,
        }

    return {
        "_override_": True,
        "max_input_seq_length": longest + 1,
        "shuffle": True,
        "num_workers": 1,
        "use_multiple_dataloader": False,
        "train": file("train"),
        "validation": file("validation") if rows["validation"] else None,
        "default": {"env_name": ENVIRONMENT},
    }


def environment(recipe: GrpoRecipe, args: Any) -> dict[str, Any]:
    """What the environments' actor is told."""
    environments = recipe.environments()
    if args.reward_model is not None:
        environments["reward_model"]["folder"] = str(args.reward_model.absolute())
    workers = max(1, min(args.cpus, MOST_WORKERS))
    every = ",".join(map(str, range(args.gpus)))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or every
    return {
        "environments": environments,
        "gpus": gpus if args.reward_model else "",
        "prompts": str(args.prompts.absolute()),
        "tokenizer": str(args.parent.absolute()),
        "workers": 1 if args.reward_model else workers,  # each would load it
        "log": str((args.work / rl.REWARDS).absolute()),
    }


def copy_rows(args: Any, name: str, environments: dict[str, dict[str, Any]]) -> int:
    """Give NeMo-RL a file's prompts, each with its own number for an answer.

    Its reader keeps nothing else of a row; the environment looks the row up. Raises
    DataError for a row that is no prompt, or that no environment can judge.
    """
    source, target = (
        args.prompts / f"{name}.jsonl",
        args.work / "rows" / f"{name}.jsonl",
    )
    target.parent.mkdir(exist_ok=True)
    rows = []
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append({"input": row["input"], "output": row["output"]})
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{source}:{number}", f"no prompt: {error!r}"
                ) from error
    check_rows(environments, rows)
    with open(target, "w") as file:
        for number, row in enumerate(rows, 1):
            row = {"input": row["input"], "output": f"{name} row {number}"}
            file.write(json.dumps(row) + "\n")
    return len(rows)


def check_template(parent: Path, prompts: Path) -> int:
    """The longest prompt in tokens, as chats rendered with the parent's template.

    Raises RecipeError for a template that has none, or does not ask for an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parent, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise RecipeError(str(parent), "its tokenizer has no chat template")
    chat = [{"role": "user", "content": "1 + 1"}]
    asked, plain = (
        tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt
        )
        for prompt in (True, False)
    )
    if asked == plain:
        raise RecipeError(
            str(parent),
            "its chat template has no generation prompt: the model is not told to answer",
            "add `{% if add_generation_prompt %}` with the assistant's opening to it",
        )
    counts = json.loads((prompts / "prompts.json").read_text())
    return int(counts["longest_prompt_tokens"])


def register_environment() -> None:
    """Tell NeMo-RL of our environments' actor, which no key of its YAML can name."""
    from nemo_rl.distributed import ray_actor_environment_registry as registry
    from nemo_rl.environments.utils import register_env

    from scripts.nvidia import environments

    actor = f"{environments.__name__}.Environments"
    register_env(ENVIRONMENT, actor)
    registry.ACTOR_ENVIRONMENT_REGISTRY[actor] = sys.executable


if __name__ == "__main__":
    rl.leave(main)
