"""Which tokens TRL's trainers score."""

from __future__ import annotations


def score_counted_tokens() -> None:
    """Have TRL compute logits for the tokens that count alone, on a CPU too.

    Where it has no Triton it also computes those of prompts and padding, for the sake
    of accelerators that compile by shape: a quarter of a small model's step on a CPU.
    """
    from trl.trainer import utils

    if not hasattr(utils, "_use_triton"):
        raise RuntimeError("this TRL chooses the tokens it scores in another way")
    utils._use_triton = lambda device: True
