"""What counts as a right answer in the `math` environment."""

from __future__ import annotations

import pytest

from scripts.environments.math import is_right
from scripts.environments.mix import Mix
from scripts.transformers.grpo import rewards_of


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        (" 42\n", "42"),
        ("42.0", "42"),
        ("It is \\boxed{42}", "42"),
        ("\\boxed{41} no, \\boxed{42}", "42"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("Paris", "Paris"),
    ],
)
def test_right_answers_count(completion: str, answer: str) -> None:
    assert is_right(completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "42"),
        ("43", "42"),
        ("4 2", "42"),
        ("142", "42"),
        ("42 42", "42"),
        ("12 + 30", "42"),
        ("12 + 30 = 42", "42"),
        ("\\boxed{12+30}", "42"),
        ("\\boxed{42} no, \\boxed{41}", "42"),
        ("nan", "42"),
        ("\\boxed{0.4}", "\\frac{1}{2}"),
    ],
)
def test_wrong_answers_and_repeated_sums_do_not(completion: str, answer: str) -> None:
    assert not is_right(completion, answer)


def test_reward_is_one_or_nothing_a_completion() -> None:
    completions = [
        [{"role": "assistant", "content": content}] for content in ("42", "41", "")
    ]
    reward = rewards_of(Mix({"math": {}}))
    prompts = [[{"role": "user", "content": "12 + 30"}]] * 3
    found = reward(prompts=prompts, completions=completions, output=["42"] * 3)
    assert found == [1.0, 0.0, 0.0]
