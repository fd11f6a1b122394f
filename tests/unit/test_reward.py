"""What counts as a right answer in the `math` environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.environments.math import is_right
from scripts.environments.mix import Mix
from scripts.lib.errors import RecipeError
from scripts.lib.schema import GrpoRecipe
from scripts.transformers.common import environments_of
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


def test_a_reward_is_the_weighted_sum_and_each_ones_mean_is_logged() -> None:
    completions = [
        [{"role": "assistant", "content": content}] for content in ("42", "41", "")
    ]
    logged: dict[str, float] = {}
    prompts = [[{"role": "user", "content": "12 + 30"}]] * 3
    reward = rewards_of(Mix({"math": {"weight": 0.5}}))
    found = reward(
        prompts=prompts,
        completions=completions,
        output=["42"] * 3,
        log_metric=logged.__setitem__,
    )
    assert found == [0.5, 0.0, 0.0]
    assert logged == {"reward_math": pytest.approx(1 / 3)}


OWN = """
class Short:
    def step(self, messages, row):
        return 1 / (len(messages[-1]["content"]) - 2)
"""


def test_a_fault_is_told_once_and_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    reward = rewards_of(Mix({"short": {"import": "own:Short"}, "math": {}}))
    prompts = [[{"role": "user", "content": "?"}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in ("42", "123")]
    logged: dict[str, float] = {}
    for _ in range(2):
        found = reward(prompts, answers, ["42"] * 2, log_metric=logged.__setitem__)
    assert found == [1.0, 1.0]
    assert logged == {"reward_short": 0.5, "reward_math": 0.5}
    assert capsys.readouterr().out.count("environment short: ZeroDivisionError") == 1


def test_a_reward_model_needs_its_folder() -> None:
    recipe = {"steps": 1, "batch_size": 2, "lr": 1.0, "max_completion_tokens": 1}
    node = GrpoRecipe.model_validate(recipe | {"environment": "reward_model"})
    with pytest.raises(RecipeError, match="--reward-model"):
        environments_of(node, None)
