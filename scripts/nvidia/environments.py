"""The environments of a GRPO node as NeMo-RL's rollouts ask them (a Ray actor).

NeMo-RL gives the conversation and the number of its prompt; what rewards is
`scripts.environments`, as on the other engine. A reply is put into the conversation as
the model's own chat template writes a user's turn.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from transformers import AutoTokenizer

from scripts.environments import Messages, Row, Turn
from scripts.environments.mix import Mix
from scripts.lib.rendering import after_answer


@ray.remote
class Worker:
    """Judges a share of the conversations."""

    def __init__(self, settings: dict[str, Any], gpus: str) -> None:
        if gpus:  # Ray hides them from who asks for none; a reward model uses one
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        self.mix = Mix(settings)

    def steps(
        self, conversations: list[Messages], rows: list[Row]
    ) -> tuple[list[tuple[Turn, dict[str, float]]], dict[str, tuple[int, str]]]:
        """Turns and rewards by environment; and its faults so far."""
        found = self.mix.steps(conversations, rows)
        faults = {n: (f.count, f.first) for n, f in self.mix.faults.items() if f.count}
        return found, faults


@ray.remote(max_concurrency=64)
class Environments(EnvironmentInterface):  # type: ignore[misc]
    """Shares conversations out among workers; keeps what each environment gave."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.rows = {}
        for name in ("train", "validation"):
            path = Path(settings["prompts"]) / f"{name}.jsonl"
            if path.exists():
                with open(path, encoding="utf-8") as lines:  # as copy_rows counts them
                    for number, line in enumerate(lines, 1):
                        self.rows[f"{name} row {number}"] = json.loads(line)
        self.tokenizer = AutoTokenizer.from_pretrained(
            settings["tokenizer"], trust_remote_code=False
        )
        self.log = Path(settings["log"])
        given = settings["environments"], settings["gpus"]
        self.workers = [Worker.remote(*given) for _ in range(settings["workers"])]

    def step(
        self,
        message_log_batch: list[list[dict[str, Any]]],
        metadata: list[dict[str, Any]],
    ) -> EnvironmentReturn:
        """Rewards and replies: nemo_rl/environments/interfaces.py."""
        rows = [self.rows[meta["ground_truth"]] for meta in metadata]
        told = [meta.get("replies", []) for meta in metadata]
        conversations = [
            self.conversation(log, row, replies)
            for log, row, replies in zip(message_log_batch, rows, told, strict=True)
        ]
        turns = self.ask(conversations, rows)
        shown = [
            "" if turn.reply is None else self.rendered(turn.reply) for turn in turns
        ]
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": text} for text in shown],
            metadata=[
                {**meta, "replies": [*replies, turn.reply]}
                for meta, replies, turn in zip(metadata, told, turns, strict=True)
            ],
            next_stop_strings=[None] * len(rows),
            rewards=torch.tensor([turn.reward for turn in turns], dtype=torch.float32),
            terminateds=torch.tensor([turn.reply is None for turn in turns]),
            answers=[None] * len(rows),
        )

    def ask(self, conversations: list[Messages], rows: list[Row]) -> list[Turn]:
        """Each conversation's turn, by all workers; rewards are added to the log."""
        share = -(-len(rows) // len(self.workers))
        asked = [
            worker.steps.remote(conversations[at : at + share], rows[at : at + share])
            for worker, at in zip(
                self.workers, range(0, len(rows), share), strict=False
            )
        ]
        turns: list[Turn] = []
        sums: dict[str, float] = {}
        faults: dict[str, list[Any]] = {}
        for found, wrong in ray.get(asked):
            for turn, rewards in found:
                turns.append(Turn(*turn))
                for name, reward in rewards.items():
                    sums[name] = sums.get(name, 0.0) + reward
            for name, (count, first) in wrong.items():
                known = faults.setdefault(name, [0, first])
                known[0] += count
        line = {
            "count": len(turns),
            "rewards": {n: total / len(turns) for n, total in sums.items()},
            "faults": faults,
        }
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
        return turns

    def conversation(
        self, log: list[dict[str, Any]], row: Row, replies: list[str]
    ) -> Messages:
        """The turns as messages: the log has the prompt and the replies rendered."""
        messages: Messages = [{"role": "user", "content": str(row["input"])}]
        said = iter(replies)
        for message in log[1:]:
            if message["role"] == "assistant":
                turn = {"role": "assistant", "content": str(message["content"])}
            else:
                turn = {"role": "user", "content": next(said)}
            messages.append(turn)
        return messages

    def rendered(self, reply: str) -> str:
        """A reply as the chat template writes it, up to where the model answers."""
        after = after_answer(self.tokenizer, reply)
        return after.removeprefix(self.tokenizer.eos_token or "")  # the model wrote it

    def shutdown(self) -> None:
        """Let the workers go."""
        for worker in self.workers:
            ray.kill(worker)

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Nothing more: NeMo-RL 0.7.0 does not ask."""
        return batch, {}
