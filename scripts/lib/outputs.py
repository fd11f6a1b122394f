"""What the trainers of both engines write, and how they say where they stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scripts.lib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOP = "stop"
"""A file of this name in --work asks to save and stop; whoever asks removes it."""
STOPPED = "stopped"
"""Holds the step a run stopped at after a save: torchrun hides exit codes."""
WARNING = "warning.txt"
"""Holds what a script has to say while it runs; the runner shows it once."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
QUESTIONS = ("Hello!", "What is 12 + 30?", "Who are you?", "7 + 8 = ?", "")
MAX_NEW_TOKENS = 64


class LossNotFinite(UserError):
    """The loss is no longer a number."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"step {step}", f"the loss is {loss}", "try a lower lr")


class NotDone(RuntimeError):
    """Training came back before its last step."""


def write_metrics(
    path: Path,
    history: list[dict[str, float]],
    log_steps: int,
    names: dict[str, str],
    tokens_a_step: int = 0,
) -> None:
    """Write metrics.jsonl: means over each `log_steps` steps, lr as of the last.

    `names` maps the trainer's names to ours, in the order of the columns; with
    `tokens_a_step`, the tokens seen so far are added.
    """
    steps = [entry for entry in history if "loss" in entry]
    last = int(steps[-1]["step"])
    with open(path, "w", encoding="utf-8") as file:
        window: list[dict[str, float]] = []
        for entry in steps:
            window.append(entry)
            step = int(entry["step"])
            if step % log_steps and step != last:
                continue
            line: dict[str, float] = {"step": step}
            for theirs, ours in names.items():
                values = [e[theirs] for e in window if e.get(theirs) is not None]
                if values:
                    line[ours] = values[-1] if ours == "lr" else fmean(values)
            if tokens_a_step:
                line["tokens"] = step * tokens_a_step
            file.write(json.dumps(line) + "\n")
            window = []


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy a tokenizer's files unchanged."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


# --- what an export is checked with ------------------------------------------


def fixed_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The questions as chats, or as plain text where there is no template."""
    prompts = []
    for question in QUESTIONS:
        text: Any = question or "1 + 1"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
            )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two lists of logits; infinite where one is no number."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max()))
    return worst


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int
) -> dict[str, Any]:
    """An export's generation_config.json: greedy, to the end of the answer."""
    return {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "max_new_tokens": min(MAX_NEW_TOKENS, max_position_embeddings // 2),
        "do_sample": False,
    }
