"""Tools are called as their schemas say, and what is wrong is told, never raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.environments import Messages, Turn, mix
from scripts.environments.tool_use import CALLS_A_TURN, BadCall, ToolUse, calculator
from scripts.lib.errors import UserError

ROW = {"input": "What is 6 * 7?", "output": "42"}
RIGHT = {"name": "calculator", "arguments": {"expression": "6 * 7"}}
OBJECT = {"type": "object"}


def call(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"<tool_call>\n{text}\n</tool_call>"


def conversation(*turns: str) -> Messages:
    messages = [{"role": "user", "content": ROW["input"]}]
    for turn in turns:
        messages.append({"role": "assistant", "content": turn})
        messages.append({"role": "user", "content": "a reply"})
    return messages[:-1]


def step(*turns: str, **settings: Any) -> Turn:
    return ToolUse(**settings).step(conversation(*turns), ROW)


def reply(*turns: str, **settings: Any) -> str:
    found = step(*turns, **settings).reply
    assert found is not None
    assert found.isprintable() or "\n" in found
    return found


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tools.py").write_text(body)
    monkeypatch.chdir(tmp_path)


def tools(function: str = "tool", parameters: Any = OBJECT, **more: Any) -> Any:
    given = {"import": f"own.tools:{function}", "parameters": parameters, **more}
    return {"mine": given}


def test_a_call_is_answered_and_then_the_answer_judged() -> None:
    called = step("I calculate. " + call(RIGHT))
    assert called == Turn(0.0, "<tool_response>\n42\n</tool_response>")
    assert step(call(RIGHT), "42") == Turn(1.0)
    assert step(call(RIGHT), "It is \\boxed{42}") == Turn(1.0)
    assert step(call(RIGHT), "43") == Turn(0.0)
    assert step("42") == Turn(1.0)


def test_several_calls_of_a_turn_are_answered_in_order() -> None:
    other = {"name": "calculator", "arguments": {"expression": "1 + 1"}}
    found = reply(call(RIGHT) + "\n" + call({"name": "none"}) + call(other))
    responses = [part.strip() for part in found.split("</tool_response>")][:-1]
    assert [r.removeprefix("<tool_response>\n") for r in responses] == [
        "42",
        "error: there is no tool 'none'; tools: calculator",
        "2",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (call("{"), "not JSON"),
        (call(""), "not JSON"),
        (call('{"name": "calculator", "arguments": {"expression": NaN}}'), "NaN"),
        (call("[" * 100_000), "not JSON"),
        (call("[]"), "no name"),
        (call({"arguments": {}}), "no name"),
        (call({"name": ["calculator"]}), "no name"),
        (call({"name": "search"}), "no tool 'search'; tools: calculator"),
        (call({"name": "\ud800" * 1000}), "no tool"),
        (call({"name": "calculator", "arguments": "6*7"}), "should be an object"),
        (call({"name": "calculator"}), "'expression' is a required property"),
        (
            call({"name": "calculator", "arguments": {"expression": 6}}),
            "arguments.expression: 6 is not of type 'string'",
        ),
        (
            call({"name": "calculator", "arguments": {"expression": "1", "x": 1}}),
            "'x' was unexpected",
        ),
        (call({"name": "calculator", "arguments": {"expression": "1/0"}}), "zero"),
        ("<tool_call>" + json.dumps(RIGHT), "no </tool_call>"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_in_a_line(text: str, said: str) -> None:
    settings = {"call_reward": 0.1, "bad_call_reward": -0.1}
    turn = step(text, **settings)
    assert turn.reward == -0.1
    assert turn.reply is not None
    opened, line, closed = turn.reply.split("\n")
    assert (opened, closed) == ("<tool_response>", "</tool_response>")
    assert line.startswith("error: ") and said in line
    assert len(line) < 320
    assert turn.reply.encode()


def test_calls_are_worth_their_turns_mean() -> None:
    settings = {"call_reward": 0.2, "bad_call_reward": -0.1}
    bad = call({"name": "none"})
    assert step(call(RIGHT), **settings).reward == pytest.approx(0.2)
    assert step(call(RIGHT) * 9, **settings).reward == pytest.approx(0.2)
    assert step(call(RIGHT) + bad, **settings).reward == pytest.approx(0.05)


def test_calls_past_the_most_of_a_turn_are_bad_and_not_answered() -> None:
    turn = step(call(RIGHT) * 1000, call_reward=1.0)
    assert turn.reward == CALLS_A_TURN / 1000
    assert turn.reply is not None
    assert turn.reply.count("<tool_response>") == CALLS_A_TURN + 1
    assert f"only {CALLS_A_TURN} calls" in turn.reply


def test_out_of_turns_ends_without_a_reward() -> None:
    settings = {"max_turns": 2, "call_reward": 0.5}
    assert step(call(RIGHT), **settings).reply is not None
    assert step(call(RIGHT), call(RIGHT), **settings) == Turn(0.0)
    assert step(call(RIGHT), "42", **settings) == Turn(1.0)


def test_an_answer_counts_once_where_another_environment_goes_on() -> None:
    assert step("42", "42") == Turn(0.0)


def test_a_tool_of_ones_own_gives_text_or_what_json_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path, monkeypatch, "def tool(city): return {'city': city, 'n': [1, None]}")
    schema = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}}
    schema["$defs"] = {"name": {"type": "string", "pattern": "^[A-Z]"}}
    settings = {"tools": tools(parameters=schema)}
    asked = {"name": "mine", "arguments": {"city": "Zürich"}}
    assert '{"city": "Zürich", "n": [1, null]}' in reply(call(asked), **settings)
    asked = {"name": "mine", "arguments": {"city": "zürich"}}
    assert "does not match" in reply(call(asked), **settings)
    assert "TypeError" in reply(call({"name": "mine"}), **settings)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def tool(): raise ValueError('no\\nluck')", "ValueError: no luck"),
        ("def tool(): raise SystemExit(3)", "SystemExit: 3"),
        ("def tool():\n    while True: pass", "took more than"),
        ("def tool(): return tool()", "RecursionError"),
        ("def tool():\n    a = []\n    a.append(a)\n    return a", "ValueError"),
        ("def tool(): return '\\ud800'", "?"),
        ("def tool(): return 'x' * 10**6", "x ..."),
    ],
)
def test_no_tool_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    own(tmp_path, monkeypatch, body)
    monkeypatch.setattr(mix, "OWN_SECONDS", 0.2)
    found = reply(call({"name": "mine"}), tools=tools())
    assert said in found
    assert len(found.encode()) < 5000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tools": {}}, "at least one"),
        ({"tools": ["calculator"]}, "by name"),
        ({"tools": {"mine": "calculator"}}, "tools.mine"),
        ({"tools": {"mine": {}}}, "tools.mine.import"),
        ({"tools": {"mine": {"import": "calculater"}}}, "tools.mine.import"),
        ({"tools": {"mine": {"import": "../x:y", "parameters": {}}}}, "tools.mine"),
        ({"tools": {"mine": {"import": "calculator", "form": 1}}}, "tools.mine.form"),
        (
            {"tools": {"mine": {"import": "calculator", "description": 1}}},
            "tools.mine.description",
        ),
        (
            {"tools": {"mine": {"import": "no.such:file", "parameters": {}}}},
            "tools.mine import no.such:file: no file no/such.py",
        ),
        ({"tools": tools("other")}, "tools.mine import own.tools:other"),
        ({"tools": tools("number")}, "not a function"),
        ({"tools": tools(parameters=None)}, "tools.mine.parameters: missing"),
        ({"tools": tools(parameters=True)}, "tools.mine.parameters"),
        ({"tools": tools(parameters={"type": "objet"})}, "tools.mine.parameters.type"),
        ({"tools": tools(parameters={"pattern": "("})}, "tools.mine.parameters"),
        ({"tools": tools(parameters={"$ref": "#/$defs/x"})}, "refers to #/$defs/x"),
        (
            {"tools": tools(parameters={"not": {"$ref": "http://example.invalid/"}})},
            "refers to http://example.invalid/",
        ),
        ({"max_turns": 0}, "max_turns"),
        ({"max_turns": True}, "max_turns"),
        ({"call_reward": "1"}, "call_reward"),
        ({"bad_call_reward": float("nan")}, "bad_call_reward"),
    ],
)
def test_settings_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, said: str
) -> None:
    own(tmp_path, monkeypatch, "number = 1\ndef tool(): return 1")
    with pytest.raises(UserError) as caught:
        ToolUse(**settings)
    assert said in str(caught.value)


def test_a_file_that_cannot_be_run_is_refused_by_the_tools_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path, monkeypatch, "import no_such_module")
    with pytest.raises(UserError, match=r"tools\.mine import .*ModuleNotFoundError"):
        ToolUse(tools())


def test_tools_are_described_as_the_model_should_be_told() -> None:
    told = ToolUse().described()
    line = told.split("<tools>\n")[1].split("\n</tools>")[0]
    function = json.loads(line)["function"]
    assert function["name"] == "calculator" and function["description"]
    assert function["parameters"]["required"] == ["expression"]
    assert "<tool_call>" in told


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("6 * 7", "42"),
        ("1 +\n 1", "2"),
        ("-(2 + 3) * +4", "-20"),
        ("2 ** 10 - 7 // 2 % 2", "1023"),
        ("2**-1", "0.5"),
        ("84 / 2", "42"),
        ("0.1 + 0.2", "0.3"),
        ("1e3", "1000"),
        ("1 / 3", "0.333333333333333"),
        ("2 ** 1000 // 2 ** 998", "4"),
        ("(-1) ** 100001", "-1"),
    ],
)
def test_the_calculator_calculates(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            " ",
            "x",
            "True",
            "1j",
            "abs(1)",
            "'a' * 9",
            "[1]",
            "1, 2",
            "1 if 1 else 2",
        ),
        *(
            "1 < 2",
            "1 << 9",
            "2 ^ 3",
            "~1",
            "1 @ 1",
            "__import__('os')",
            "(lambda: 1)()",
        ),
        *("1 +", "1 2", "007", "1(2)", "e", "e.E", "1\x00", "١", "2 = 2", "(1", "1)"),
        *("9**9**9", "9**9**9**9", "10**400", "2.0**9999", "1e999", "1e308 * 10"),
        *("1/0", "1//0", "1%0", "0**-1", "0.0**-1", "(-8)**0.5", "(-8)**(1/3)"),
        *("9" * 300, "(" * 250, "-" * 5000 + "1", "-" * 255, "2**1024 + 1.5"),
        "9**300 * 9**300 / 2",
    ],
)
def test_the_calculator_refuses_what_is_no_bounded_arithmetic(expression: str) -> None:
    with pytest.raises(BadCall):
        calculator(expression)
