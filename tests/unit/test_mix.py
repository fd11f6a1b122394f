"""Several environments at once: the weighted sum counts, and no fault ends a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.environments import Messages, mix
from scripts.environments.mix import MOST_FAULTS, Mix, check_rows
from scripts.environments.sliding_puzzle import board_row, boards
from scripts.lib.errors import DataError, UserError
from tests.unit.test_sliding_puzzle import solution

SUM = {"input": "What is 6 * 7?", "output": "42"}
CALL = (
    '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
)
SHORT = """
class Short:
    def __init__(self, most=3):
        self.most = most

    def step(self, messages, row):
        return float(len(messages[-1]["content"].split()) <= self.most)
"""


def asked(answer: str) -> Messages:
    return [
        {"role": "user", "content": SUM["input"]},
        {"role": "assistant", "content": answer},
    ]


def mixed(environments: Mix, *answers: str) -> list[Any]:
    return environments.steps([asked(a) for a in answers], [SUM] * len(answers))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes an environment of one's own; gives its settings."""
    (tmp_path / "environments").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(body: str, kind: str = "Own", **settings: Any) -> dict[str, Any]:
        if not body.startswith("\n"):
            lines = body.replace("\n", "\n        ")
            body = (
                f"class {kind}:\n    def step(self, messages, row):\n        {lines}\n"
            )
        (tmp_path / "environments" / "mine.py").write_text(body)
        return {"import": f"environments.mine:{kind}", **settings}

    return write


def test_rewards_are_the_weighted_sum_and_each_is_told(own: Any) -> None:
    settings = {
        "math": {"weight": 2.0},
        "short": own(SHORT, "Short", weight=-0.5, settings={"most": 1}),
    }
    found = mixed(Mix(settings), "42", "It is \\boxed{42}", "41")
    assert [turn.reward for turn, _ in found] == [1.5, 2.0, -0.5]
    assert [each for _, each in found] == [
        {"math": 1.0, "short": 1.0},
        {"math": 1.0, "short": 0.0},
        {"math": 0.0, "short": 1.0},
    ]
    assert all(turn.reply is None for turn, _ in found)


def test_an_environment_of_ones_own_comes_from_a_file_of_the_project(own: Any) -> None:
    environments = Mix({"short": own(SHORT, "Short")})
    assert [t.reward for t, _ in mixed(environments, "a b c", "a b c d")] == [1.0, 0.0]


def test_the_first_environment_that_replies_is_heard(own: Any) -> None:
    says = "from scripts.environments import Turn\nreturn Turn(0.5, 'mine')"
    settings = own(says)
    for order in (["math", "tool_use", "mine"], ["mine", "math", "tool_use"]):
        known = {"math": {}, "tool_use": {}, "mine": settings}
        ((turn, each),) = mixed(Mix({name: known[name] for name in order}), CALL)
        assert turn.reward == 0.5 and each["mine"] == 0.5
        assert turn.reply is not None
        assert ("42" in turn.reply) == (order[1] == "tool_use")


def test_a_conversation_ends_when_no_environment_replies() -> None:
    ((turn, _),) = mixed(Mix({"math": {}, "tool_use": {}}), "42")
    assert turn.reward == 2.0 and turn.reply is None


FAULTS = [
    ("raise ValueError('no luck')", "ValueError: no luck"),
    ("while True: pass", "took more than"),
    ("return float('nan')", "nan"),
    ("return float('-inf')", "inf"),
    ("return 'good'", "'good'"),
    ("return True", "True"),
    ("return None", "None"),
    ("return row['no such']", "KeyError"),
]


@pytest.mark.parametrize(("body", "said"), FAULTS)
def test_a_fault_is_counted_and_worth_0(
    own: Any, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    if "while" in body:
        monkeypatch.setattr(mix, "OWN_SECONDS", 0.01)
    environments = Mix({"math": {}, "mine": own(body)})
    found = mixed(environments, "42", "41")
    assert [turn.reward for turn, _ in found] == [1.0, 0.0]
    assert [each["mine"] for _, each in found] == [0.0, 0.0]
    assert environments.faults["mine"].count == 2
    assert said in environments.faults["mine"].first
    assert environments.faults["math"].count == 0


@pytest.mark.parametrize(("body", "said"), FAULTS)
def test_an_environment_that_never_works_is_refused(
    own: Any, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    if "while" in body:
        monkeypatch.setattr(mix, "OWN_SECONDS", 0.002)
    environments = Mix({"mine": own(body)})
    mixed(environments, *["42"] * (MOST_FAULTS - 1))
    with pytest.raises(UserError) as caught:
        mixed(environments, "42")
    assert "environment mine" in str(caught.value)
    assert f"{MOST_FAULTS} steps" in str(caught.value) and said in str(caught.value)


def test_an_environment_that_has_worked_is_never_refused(own: Any) -> None:
    body = "assert messages[-1]['content'] == '42'\nreturn 1.0"
    environments = Mix({"mine": own(body)})
    found = mixed(environments, "42", *["41"] * (2 * MOST_FAULTS))
    assert sum(turn.reward for turn, _ in found) == 1.0
    assert environments.faults["mine"].count == 2 * MOST_FAULTS


def test_a_users_mistake_is_no_fault_but_ends_the_training() -> None:
    with pytest.raises(UserError, match="no board"):
        mixed(Mix({"sliding_puzzle": {}}), "<action>up</action>")


def test_what_cannot_be_loaded_is_refused_by_its_name(own: Any) -> None:
    settings = own(SHORT, "Short")
    for path, said in [
        ("environments.mine:Long", "has a class Long"),
        ("environments.none:Short", "no file"),
    ]:
        with pytest.raises(UserError, match="environment short") as caught:
            Mix({"short": {"import": path}})
        assert said in str(caught.value)
    with pytest.raises(UserError, match="refuses its settings"):
        Mix({"short": {**settings, "settings": {"least": 1}}})


def test_a_scripted_policy_plays_a_puzzle_to_its_end() -> None:
    environments = Mix({"sliding_puzzle": {"weight": 3.0}})
    rows = [board_row(3, 8, seed) for seed in range(4)]
    logs: list[Messages] = [[{"role": "user", "content": r["input"]}] for r in rows]
    totals = [0.0] * len(rows)
    active = [*range(len(rows))]
    for _ in range(20):
        for n in active:
            shown = {"input": logs[n][-1]["content"], "output": rows[n]["output"]}
            move = solution(*boards(shown))[0]
            said = f"I think <action>{move}</action>"
            logs[n].append({"role": "assistant", "content": said})
        found = environments.steps([logs[n] for n in active], [rows[n] for n in active])
        going = []
        for n, (turn, _) in zip(active, found, strict=True):
            totals[n] += turn.reward
            if turn.reply is not None:
                logs[n].append({"role": "user", "content": turn.reply})
                going.append(n)
        active = going
        if not active:
            break
    assert totals == [3.0] * len(rows)
    assert all(log[-1]["role"] == "assistant" for log in logs)
    assert all(f.count == 0 for f in environments.faults.values())


def test_rows_that_cannot_be_judged_are_found_before_any_answer():
    idle = {"input": "Write add.", "output": "assert 1 + 1 == 2"}
    with pytest.raises(DataError, match="asserts nothing of the program"):
        check_rows({"math": {}, "code": {}}, [idle])
    with pytest.raises(DataError, match="has no board"):
        check_rows({"sliding_puzzle": {}}, [SUM])
    own = {"code": {"import": "tests.unit.test_mix:Own"}}  # judges as it likes
    check_rows({"math": {}, "tool_use": {}} | own, [SUM, idle])
