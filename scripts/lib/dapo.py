"""What `algorithm: dapo` means: one list for who trains and for who reports."""

from __future__ import annotations

from typing import Any

MULTIPLIER = 3
"""Batches of prompts drawn a step: those whose answers are all worth the same go."""
CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.28, 10
PENALTY = 0.5
"""Of a completion at its longest, where a right answer is worth 1 and a wrong one 0: the
paper's is 1 between 1 and -1."""


def soft_tokens(max_completion_tokens: int) -> int:
    """The soft penalty's tokens, the last fifth of a completion's, as in the paper."""
    return max(1, max_completion_tokens // 5)


def trl() -> dict[str, Any]:
    """TRL's settings that make DAPO of GRPO, all but dynamic sampling, which it lacks.

    Asymmetric clipping, overlong shaping (the weights are the environments' and the
    penalty's) and token-level loss.
    """
    return {
        "loss_type": "dapo",
        "epsilon": CLIP_LOW,
        "epsilon_high": CLIP_HIGH,
        "delta": float(CLIP_DUAL),
        "reward_weights": [1.0, PENALTY],
    }


def settings(
    max_completion_tokens: int, dynamic_sampling: bool = True
) -> dict[str, Any]:
    """NeMo-RL's settings that make DAPO of GRPO, `section.key: value`.

    Dynamic sampling, asymmetric clipping, overlong shaping and token-level loss:
    NeMo-RL's docs/guides/dapo.md, arXiv 2503.14476.
    """
    return {
        "grpo.use_dynamic_sampling": dynamic_sampling,
        "grpo.batch_multiplier": MULTIPLIER if dynamic_sampling else 1,
        "grpo.use_leave_one_out_baseline": False,
        "grpo.adv_estimator.use_leave_one_out_baseline": False,
        "grpo.reward_scaling.enabled": True,
        "grpo.reward_scaling.target_min": -1.0,
        "grpo.reward_shaping.enabled": True,
        "grpo.reward_shaping.overlong_buffer_length": soft_tokens(
            max_completion_tokens
        ),
        "grpo.reward_shaping.overlong_buffer_penalty": 1.0,
        "grpo.reward_shaping.max_response_length": max_completion_tokens,
        "loss_fn.ratio_clip_min": CLIP_LOW,
        "loss_fn.ratio_clip_max": CLIP_HIGH,
        "loss_fn.ratio_clip_c": CLIP_DUAL,
        "loss_fn.token_level_loss": True,
    }
