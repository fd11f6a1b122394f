"""An environment's reply as the model's own chat template writes it."""

from __future__ import annotations

from typing import Any

ANSWER = "<<an answer>>"
"""Where a model's turn is, in a chat that is rendered."""


def after_answer(tokenizer: Any, reply: str) -> str:
    """What a template writes after an answer that is replied to, to the next answer.

    What follows an answer does not depend on it, but a template may write an answer
    otherwise once a turn follows: Qwen3's leaves its thoughts out. The answer's end is
    a part of it, which the model may have written itself.
    """
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": reply},
    ]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    return str(text).partition(ANSWER)[2]
