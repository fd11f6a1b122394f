"""Sample a model's answers, keep what environments reward (CPU or one GPU).

Reads   --parent   Hugging Face folder with a chat template
        --reward-model  folder of a reward model, where that is an environment
        --prompts  folder with train.jsonl: input, output
        --recipe   YAML of one `rollouts:` node
Writes  --out      rows.jsonl: {"messages"}, or {"prompt", "chosen", "rejected"};
                   rollouts.json: prompts, prompts_kept, samples, kept, and the samples
                   left out: failed (an environment did), cut (at
                   max_completion_tokens), empty, duplicates, below (too low a reward),
                   near (preferences: too little between best and worst), surplus;
                   distinct answers; means: reward, reward_<environment>,
                   completion_tokens; reward_least, reward_most; faults of environments
Raises  RecipeError, DataError before sampling; UserError for an environment that never
        gives a reward or replies; DataError where nothing is kept
Resumes with the prompts that --work has no answers of. An answer follows from the seed,
its prompt and its number: what else is in its batch, or was done before a kill, has no
say but in the last bits of the model's numbers.

    python -m scripts.transformers.rollouts --parent P --prompts D --recipe R.yaml \\
        --out work/try
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scripts.data import curation
from scripts.data.curation import Answer
from scripts.environments import Environment, Messages, Row, Turn
from scripts.environments.mix import Mix, check_rows
from scripts.lib import cli, serving
from scripts.lib.errors import DataError, RecipeError, UserError
from scripts.lib.progress import Progress
from scripts.lib.schema import RolloutsRecipe
from scripts.transformers import common

if TYPE_CHECKING:
    import torch

Parts = list[list[Answer]]
"""Answers of some prompts, a list for each."""


class Judges(Mix):
    """Environments whose failures are no numbers: as 0 they might be learned from."""

    def turns(
        self,
        name: str,
        environment: Environment,
        conversations: list[Messages],
        rows: list[Row],
    ) -> list[Turn]:
        """One environment's turns; those that judge all at once may fail together."""
        at_once = name not in self.own and hasattr(environment, "steps")
        size = len(rows) if at_once else 1
        found: list[Turn] = []
        for at in range(0, len(rows), size):
            faults = self.faults[name].count
            some = slice(at, at + size)
            turns = super().turns(name, environment, conversations[some], rows[some])
            failed = self.faults[name].count > faults
            found += [Turn(math.nan)] * len(turns) if failed else turns
        if any(turn.reply is not None for turn in found):
            raise UserError(
                f"environment {name}",
                "replies to an answer, and rollouts are of one turn",
                "take one that only rewards; grpo has max_turns",
            )
        return found


class OwnDraws:
    """A logits processor: each sequence draws its tokens by numbers of its own.

    All but the drawn token are ruled out, which is then the likeliest. With
    Transformers' own sampling, an answer would depend on the others of its batch.
    """

    def __init__(self, draws: torch.Tensor, recipe: RolloutsRecipe) -> None:
        self.draws, self.recipe, self.step = draws, recipe, 0

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits with one token left in each row."""
        shares = (logits.double() / self.recipe.temperature).softmax(-1)
        shares, tokens = shares.sort(-1, descending=True)
        sums = shares.cumsum(-1)
        last = (sums - shares < self.recipe.top_p).sum(-1, keepdim=True) - 1
        drawn = self.draws[:, self.step, None] * sums.gather(-1, last)
        place = (sums <= drawn).sum(-1, keepdim=True).minimum(last)
        self.step += 1
        ruled_out = logits.new_full(logits.shape, -math.inf)
        return ruled_out.scatter(-1, tokens.gather(-1, place), 0.0)


class Sampler:
    """A model that answers prompts."""

    def __init__(self, folder: Path, recipe: RolloutsRecipe) -> None:
        import torch

        model, tokenizer = common.load_parent(folder)
        common.check_template(tokenizer, folder)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.ends = serving.end_tokens(tokenizer)
        common.align(model, tokenizer)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = model.eval().to(self.device)
        self.tokenizer: Any = tokenizer
        self.recipe = recipe

    def draws(self, prompts: list[str]) -> torch.Tensor:
        """A number from 0 to 1 for each token of each answer."""
        import numpy as np
        import torch

        rows = []
        for prompt in prompts:
            digest = hashlib.sha256(prompt.encode()).digest()[:8]
            key = [self.recipe.seed % 2**64, int.from_bytes(digest)]
            shape = self.recipe.samples, self.recipe.max_completion_tokens
            rows.append(np.random.default_rng(key).random(shape))
        return torch.from_numpy(np.concatenate(rows)).to(self.device)

    def answers(self, prompts: list[str]) -> list[list[tuple[str, int, bool]]]:
        """For each prompt its answers: text, tokens, and whether the model ended it."""
        import torch

        num = self.recipe.samples
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        given = self.tokenizer.apply_chat_template(
            [chat for chat in asked for _ in range(num)],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.device)
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=self.recipe.max_completion_tokens,
                eos_token_id=self.ends,
                do_sample=False,
                logits_processor=[OwnDraws(self.draws(prompts), self.recipe)],
            )
        found = []
        for row in ids[:, given["input_ids"].shape[1] :].tolist():
            at = next((at for at, one in enumerate(row) if one in self.ends), None)
            ended, own = at is not None, row[:at]
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            found.append((text, len(own) + ended, ended))
        return [found[at : at + num] for at in range(0, len(found), num)]


# --- sampling ------------------------------------------------------------------


def sampled(
    rows: list[Row],
    judges: Judges,
    recipe: RolloutsRecipe,
    args: argparse.Namespace,
    progress: Progress,
) -> Iterator[list[Answer]]:
    """The answers to each row, from --work where they are there."""
    folder = args.work / "parts"
    folder.mkdir(exist_ok=True)
    size = max(1, recipe.batch_size // recipe.samples)
    sampler = None
    for at in range(0, len(rows), size):
        file, some = folder / f"{at}.json", rows[at : at + size]
        part = read_part(file, judges)
        if part is None:
            if sampler is None:
                sampler = Sampler(args.parent, recipe)
                progress.began = None  # what an earlier run did took no time
            part = answered(some, sampler, judges)
            write_part(file, part, judges)
        yield from part


def answered(rows: list[Row], sampler: Sampler, judges: Judges) -> Parts:
    """Answers of a model, as environments judge them."""
    given = sampler.answers([row["input"] for row in rows])
    asked = [
        (row, text) for row, texts in zip(rows, given, strict=True) for text in texts
    ]
    steps = judges.steps(
        [
            [
                {"role": "user", "content": row["input"]},
                {"role": "assistant", "content": text},
            ]
            for row, (text, _, _) in asked
        ],
        [row for row, _ in asked],
    )
    judged = iter(steps)
    part = []
    for texts in given:
        answers = []
        for text, num_tokens, ended in texts:
            turn, each = next(judged)
            answers.append(Answer(text, num_tokens, ended, turn.reward, each))
        part.append(answers)
    return part


def write_part(file: Path, part: Parts, judges: Judges) -> None:
    """Leave answers for a later run, and what environments did wrong so far."""
    faults = {name: (f.count, f.good, f.first) for name, f in judges.faults.items()}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"answers": part, "faults": faults}), "utf-8")
    temporary.replace(file)


def read_part(file: Path, judges: Judges) -> Parts | None:
    """The answers that an earlier run left, if it did."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    for name, (count, good, first) in found["faults"].items():
        faults = judges.faults[name]
        faults.count, faults.good, faults.first = count, good, first
    return [[Answer(*one) for one in answers] for answers in found["answers"]]


# --- what is kept ----------------------------------------------------------------


def write(
    rows: list[Row],
    answers: Iterator[list[Answer]],
    judges: Judges,
    recipe: RolloutsRecipe,
    out: Path,
    progress: Progress,
) -> None:
    """Write what is kept, and the counts. Raises DataError where that is nothing."""
    keep = curation.chats if recipe.kind == "chats" else curation.pairs
    left: Counter[str] = Counter()
    seen: list[Answer] = []
    kept = prompts_kept = distinct = 0
    total = 0.0
    with open(out / "rows.jsonl", "w", encoding="utf-8") as file:
        for done, (row, given) in enumerate(zip(rows, answers, strict=True), 1):
            found = keep(row["input"], given, recipe, left)
            for one in found:
                file.write(json.dumps(one) + "\n")
            kept += len(found)
            prompts_kept += bool(found)
            distinct += len({answer.text for answer in given})
            seen += given
            total += sum(answer.reward for answer in given if answer.is_rewarded)
            progress.report(done, len(rows), kept=kept, reward=total / len(seen))
    rewarded = [answer for answer in seen if answer.is_rewarded]
    rewards = [answer.reward for answer in rewarded]
    faults = {
        name: {"count": each.count, "first": each.first}
        for name, each in judges.faults.items()
        if each.count
    }
    for name, fault in faults.items():
        print(f"environment {name} failed {fault['count']} times: {fault['first']}")
    if not kept:
        raise nothing_kept(recipe, rewards, left, faults)
    counts: dict[str, Any] = {
        "prompts": len(rows),
        "prompts_kept": prompts_kept,
        "samples": len(seen),
        "kept": kept,
        **{name: left[name] for name in curation.LEFT_OUT if left[name]},
        "distinct": distinct,
        "reward": fmean(rewards),
        "reward_least": min(rewards),
        "reward_most": max(rewards),
    }
    for name in recipe.environment:
        counts[f"reward_{name}"] = fmean(answer.each[name] for answer in rewarded)
    counts["completion_tokens"] = fmean(answer.num_tokens for answer in seen)
    if faults:
        counts["faults"] = faults
    (out / "rollouts.json").write_text(json.dumps(counts, indent=2) + "\n")
    what = "pairs" if recipe.kind == "preferences" else "chats"
    print(f"{kept} {what} of {prompts_kept} of {len(rows)} prompts")


def nothing_kept(
    recipe: RolloutsRecipe,
    rewards: list[float],
    left: Counter[str],
    faults: dict[str, dict[str, Any]],
) -> DataError:
    """What was seen instead, and what to change."""
    reasons = [name for name, count in left.most_common() if count]
    told = [f"{left[name]} {curation.LEFT_OUT[name]}" for name in reasons]
    what = f"nothing is kept: of {left.total()} answers {', '.join(told)}"
    if rewards:
        what += (
            f"; rewards from {min(rewards):g} to {max(rewards):g}, "
            f"{fmean(rewards):.4g} on average"
        )
    what += "".join(f"; environment {n}: {f['first']}" for n, f in faults.items())
    ways = {
        "failed": "mend the environment",
        "cut": f"raise max_completion_tokens, {recipe.max_completion_tokens} now",
        "below": f"lower filter.min_reward, {recipe.filter.min_reward} now",
        "near": "lower filter.margin, or raise temperature",
    }
    hints = [ways[name] for name in reasons if name in ways]
    return DataError("filter", what, "; ".join([*hints, "or take more samples"]))


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = cli.parser(__doc__)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    flags.add_argument("--prompts", type=Path, required=True, help="prompts folder")
    flags.add_argument("--reward-model", type=Path, help="of the environment so named")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, RolloutsRecipe)
    if found := recipe.mistake():
        key, what, hint = found
        raise RecipeError(f"{args.recipe} {key}", what, hint)
    rows = common.read_prompts(args.prompts / "train.jsonl")
    check_rows(recipe.environments(), rows)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    judges = Judges(common.environments_of(recipe, args.reward_model))
    progress = Progress(args.work)
    answers = sampled(rows, judges, recipe, args, progress)
    write(rows, answers, judges, recipe, args.out, progress)
    return 0


if __name__ == "__main__":
    cli.run(main)
