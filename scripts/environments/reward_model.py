"""The environment `reward_model`: a trained model says what an answer is worth.

The conversation is rendered with the reward model's own chat template, as its pairs
were, and one number comes out. It runs beside the trainer, on the GPU where there is
one.
"""

from __future__ import annotations

from typing import Any

from scripts.environments import Messages, Row


class RewardModel:
    """A Hugging Face sequence classifier with one output, read once."""

    def __init__(self, folder: str, batch_size: int = 64) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.torch, self.batch_size = torch, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer.padding_side = "right"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.bfloat16, trust_remote_code=False
        )
        self.model.eval().to(self.device)

    def step(self, messages: Messages, row: Row) -> float:
        """What the model scores a conversation."""
        return self.steps([messages], [row])[0]

    def steps(self, conversations: list[Messages], rows: list[Row]) -> list[float]:
        """What the model scores each conversation."""
        texts = self.tokenizer.apply_chat_template(conversations, tokenize=False)
        found: list[float] = []
        for at in range(0, len(texts), self.batch_size):
            batch: Any = self.tokenizer(
                texts[at : at + self.batch_size],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            with self.torch.no_grad():
                found += self.model(**batch).logits.float().flatten().tolist()
        return found
