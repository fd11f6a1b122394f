"""What `algorithm: dapo` means: one list for who trains and for who reports."""

from __future__ import annotations

from typing import Any

MULTIPLIER = 3
"""Batches of prompts drawn a step: those whose answers are all worth the same go."""


def settings(max_completion_tokens: int) -> dict[str, Any]:
    """NeMo-RL's settings that make DAPO of GRPO, `section.key: value`.

    Dynamic sampling, asymmetric clipping, overlong shaping and token-level loss:
    NeMo-RL's docs/guides/dapo.md, arXiv 2503.14476. The last fifth of a completion's
    tokens is the soft penalty's, as in the paper.
    """
    return {
        "grpo.use_dynamic_sampling": True,
        "grpo.batch_multiplier": MULTIPLIER,
        "grpo.use_leave_one_out_baseline": False,
        "grpo.adv_estimator.use_leave_one_out_baseline": False,
        "grpo.reward_scaling.enabled": True,
        "grpo.reward_scaling.target_min": -1.0,
        "grpo.reward_shaping.enabled": True,
        "grpo.reward_shaping.overlong_buffer_length": max(
            1, max_completion_tokens // 5
        ),
        "grpo.reward_shaping.overlong_buffer_penalty": 1.0,
        "grpo.reward_shaping.max_response_length": max_completion_tokens,
        "loss_fn.ratio_clip_min": 0.2,
        "loss_fn.ratio_clip_max": 0.28,
        "loss_fn.ratio_clip_c": 10,
        "loss_fn.token_level_loss": True,
    }
