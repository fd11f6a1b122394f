"""Conversations of several turns, as TRL's GRPOTrainer asks for them: a rollout_func.

What the environment says is in the completion, masked: no loss is on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scripts.environments import Messages, Row
from scripts.environments.mix import Mix
from scripts.lib.rendering import after_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOTrainer


@dataclass
class Conversation:
    """One conversation as messages, and as tokens after its prompt."""

    row: Row
    messages: Messages
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    reward: float = 0.0
    each: dict[str, float] = field(default_factory=dict)
    turns: int = 0

    def add(self, ids: list[int], own: bool) -> None:
        """Append tokens, the model's own or the environment's."""
        self.ids += ids
        self.mask += [int(own)] * len(ids)


@dataclass(frozen=True)
class Rollouts:
    """Lets the model and the environments talk, up to so many turns and tokens."""

    environments: Mix
    rows: list[Row]
    tokenizer: PreTrainedTokenizerBase
    max_turns: int
    max_tokens: int
    max_new_tokens: int

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """A conversation for each prompt, which has the number of its row."""
        talks = [self.begun(prompt) for prompt in prompts]
        open_ = talks
        for turn in range(self.max_turns):
            if not open_:
                break
            asked = [talk.prompt + talk.ids for talk in open_]
            answers, _ = trainer._generate_single_turn(asked, None, {}, 1)
            for talk, ids in zip(open_, answers, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                talk.messages.append({"role": "assistant", "content": text})
                talk.add(ids, own=True)
            open_ = self.replied(open_, last=turn + 1 == self.max_turns)
        return {
            "prompt_ids": [talk.prompt for talk in talks],
            "completion_ids": [talk.ids for talk in talks],
            "logprobs": None,
            "env_mask": [talk.mask for talk in talks],
            "talk": talks,
        }

    def begun(self, prompt: list[dict[str, Any]]) -> Conversation:
        """A conversation before the model's first turn."""
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return Conversation(self.rows[prompt[-1]["row"]], messages, list(ids))

    def replied(self, talks: list[Conversation], last: bool) -> list[Conversation]:
        """Reward each model's turn and reply to it; the conversations that go on."""
        going = []
        found = self.environments.steps(
            [talk.messages for talk in talks], [talk.row for talk in talks]
        )
        for talk, (turn, rewards) in zip(talks, found, strict=True):
            talk.turns += 1
            talk.reward += turn.reward
            for name, reward in rewards.items():
                talk.each[name] = talk.each.get(name, 0.0) + reward
            if turn.reply is None or last:
                continue
            ids = self.rendered(turn.reply, talk.ids[-1])
            length = len(talk.prompt) + len(talk.ids) + len(ids)
            if length + self.max_new_tokens > self.max_tokens:
                continue
            talk.messages.append({"role": "user", "content": turn.reply})
            talk.add(ids, own=False)
            going.append(talk)
        return going

    def rendered(self, reply: str, before: int) -> list[int]:
        """A reply's tokens, up to where the model answers.

        `before` is the model's last token: where it was cut, the answer is ended for it.
        """
        after = after_answer(self.tokenizer, reply)
        if before == self.tokenizer.eos_token_id:
            after = after.removeprefix(str(self.tokenizer.eos_token))
        ids: list[int] = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return ids
