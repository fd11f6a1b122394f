"""What rollouts promise: an answer depends on seed and prompt, and no fault is kept."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.lib.errors import UserError
from scripts.lib.outputs import copy_tokenizer
from scripts.lib.schema import RolloutsRecipe
from scripts.transformers import rollouts
from tests.engine.conftest import Stage, write

DIGITS = {"digits": {"import": "tests.engine.digits:Digits"}}
RECIPE = {"samples": 3, "max_completion_tokens": 16, "environment": DIGITS}
RECIPE |= {"filter": {"min_reward": 0.0, "at_most": 2}, "batch_size": 96}
FAULTY = """
class Faulty:
    def step(self, messages, row):
        answer = messages[-1]["content"]
        if len(answer) % 3 == 0:
            raise ValueError("a multiple of 3")
        return float("nan") if len(answer) % 3 == 1 else 1.0
"""


@pytest.fixture(scope="session")
def model(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that has learned nothing: it says anything, and often ends."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    config = AutoConfig.from_pretrained(inputs / "model")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 0.05
        model.get_output_embeddings().weight[config.eos_token_id, 0] += 2.0
    model.save_pretrained(folder)
    copy_tokenizer(inputs / "tokenizer", folder)
    return folder


@pytest.fixture
def words(inputs: Path, model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a run in a folder of its own."""

    def words(name: str, **changes: Any) -> list[str]:
        recipe = write(tmp_path / f"{name}.yaml", RECIPE | changes)
        flags = {"--parent": model, "--prompts": inputs / "prompts", "--recipe": recipe}
        flags |= {"--out": tmp_path / name, "--work": tmp_path / f"{name}.work"}
        return [str(word) for flag in flags.items() for word in flag]

    return words


def test_killed_or_not_and_in_batches_of_any_size_the_answers_are_the_same(
    start: Callable[..., Stage], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert rollouts.main(words("whole")) == 0
    script, log = "scripts.transformers.rollouts", tmp_path / "log"
    few = words("few", batch_size=24)
    killed = start(script, few, log)
    killed.signal_when(tmp_path / "few.work" / "parts" / "8.json", signal.SIGKILL)
    kept = (tmp_path / "few.work" / "parts" / "0.json").stat().st_mtime_ns
    assert not (tmp_path / "few" / "rollouts.json").exists()
    again = start(script, few, log)
    assert again.code() == 0, again.text()
    assert (tmp_path / "few.work" / "parts" / "0.json").stat().st_mtime_ns == kept
    rows = (tmp_path / "whole" / "rows.jsonl").read_text()
    assert rows == (tmp_path / "few" / "rows.jsonl").read_text() != ""
    counts = json.loads((tmp_path / "whole" / "rollouts.json").read_text())
    assert counts["kept"] == len(rows.splitlines())
    assert counts["samples"] == 3 * counts["prompts"] >= counts["distinct"] > 1
    left = ("kept", "cut", "empty", "duplicates", "below", "surplus")
    assert sum(counts.get(name, 0) for name in left) == counts["samples"]
    assert counts["reward"] == counts["reward_digits"] > 0
    assert rollouts.main(words("other", seed=18)) == 0
    assert (tmp_path / "other" / "rows.jsonl").read_text() != rows


def test_what_an_environment_failed_at_is_counted_and_never_kept(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    own = {"faulty": {"import": "faulty:Faulty", "weight": -1.0}}
    keep = {"min_reward": -9.0}
    assert rollouts.main(words("out", environment=own, filter=keep)) == 0
    counts = json.loads((tmp_path / "out" / "rollouts.json").read_text())
    faults = counts["faults"]["faulty"]
    assert faults["count"] == counts["failed"] > 0
    assert "a multiple of 3" in faults["first"] or "nan" in faults["first"]
    assert counts["reward"] == -1.0, "no failure is a reward of 0"
    rows = map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert {len(row["messages"][1]["content"]) % 3 for row in rows} == {2}


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"max_completion_tokens": 1}, "cut at max_completion_tokens", "raise max_comp"),
        ({"filter": {"min_reward": 2.0}, "max_completion_tokens": 60}, "rewards from 0 to", "lower filter.min_reward"),
        ({"environment": {"twice": {"import": "tests.engine.digits:Twice"}}}, "environment twice: replies to an answer", "only rewards"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_kept_it_says_why_and_what_to_change(
    words: Callable[..., list[str]], changes: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(UserError) as error:
        rollouts.main(words("out", samples=1, **changes))
    assert said in str(error.value) and hint in str(error.value)


def test_an_environment_that_judges_all_at_once_does_so_here() -> None:
    judges = rollouts.Judges({"code": {}, "math": {"weight": 0.5}})
    row = {"input": "Write f.", "output": "assert f(1) == 2"}
    programs = ["def f(n): return n + 1", "def f(n): return n"]
    chats = [[{"role": "assistant", "content": program}] for program in programs]
    found = judges.steps(chats, [row, row])
    assert [turn.reward for turn, _ in found] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_p": 0.7}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 0.01}, [0, 0, 0, 1]),
    ],
)
def test_tokens_are_drawn_by_their_shares(
    settings: dict[str, float], shares: list[float]
) -> None:
    count = 3000
    recipe = RolloutsRecipe.model_validate({"max_completion_tokens": 1} | settings)
    draws = (torch.arange(count, dtype=torch.float64) / count)[:, None]
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(count, -1)
    left = rollouts.OwnDraws(draws, recipe)(torch.zeros(0), logits)
    assert (left.isfinite().sum(-1) == 1).all()
    found = Counter(left.argmax(-1).tolist())
    for token, share in enumerate(shares):
        assert found[token] / count == pytest.approx(share, abs=2 / count)
