"""The environment `tool_use`: the model calls tools, then answers; a right one is worth 1.

A turn of the model has calls, one or several, in Hermes' and Qwen's form,

    <tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>

and is replied to with a `<tool_response>` for each, in their order: what the tool
returned, or a line that says what is wrong with the call. A turn without a call is the
answer. A row's `output` is what it should be, as for `math`.

Nothing but the row's `input` tells the model of its tools: `ToolUse.described()` is the
text to put there. A tool of one's own is a function in a file of the project:

    tools:
      population:
        import: "tools.cities:population"
        description: "How many people live in a city."
        parameters:
          {type: object, properties: {city: {type: string}}, required: [city]}

Rewards of calls are a turn's mean, so that many in one turn are worth no more than one;
turns with calls add up, as all of a conversation's rewards do.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from scripts.environments import Messages, Row, Turn, mix
from scripts.environments.math import is_right
from scripts.lib.errors import UserError

CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
OWN = re.compile(r"\w+(\.\w+)*:[A-Za-z_]\w*")
FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
CALLS_A_TURN = 16
LINE_CHARS = 300
"""A line that says what is wrong is cut there."""
RESULT_CHARS = 4096
"""A tool's result is cut there."""
EXPRESSION_CHARS = 256
NUMBER_BITS = 1024
"""Size of the calculator's whole numbers, about that of its largest fraction."""
ARITHMETIC = re.compile(r"[0-9eE.+\-*/%()\s]*")
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class BadCall(Exception):
    """A call that gives no result; the message says why."""


class Tool(NamedTuple):
    """What can be called."""

    call: Callable[..., Any]
    parameters: Mapping[str, Any]
    description: str

    def answer(self, arguments: dict[str, Any]) -> str:
        """The tool's result as text. Raises BadCall where arguments are not its own."""
        check = Draft202012Validator(self.parameters, registry=Registry())
        wrong = best_match(check.iter_errors(arguments))
        if wrong is not None:
            raise BadCall(f"arguments{wrong.json_path[1:]}: {wrong.message}")
        result = self.call(**arguments)
        if isinstance(result, str):
            return result
        return json.dumps(result, ensure_ascii=False, default=str)


class ToolUse:
    """Rewards right answers, which tools may help to find."""

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        max_turns: int = 4,
        call_reward: float = 0.0,
        bad_call_reward: float = 0.0,
    ) -> None:
        """`tools` by the names that the model calls them by; default: `calculator`.

        Raises UserError where a tool cannot be had, or a setting is not of its form.
        """
        if tools is None:
            tools = {"calculator": {"import": "calculator"}}
        if not isinstance(tools, Mapping) or not tools:
            raise UserError(
                "environment tool_use tools",
                "should be tools by name, at least one",
                "leave it out for the calculator alone",
            )
        if type(max_turns) is not int or max_turns < 1:
            raise UserError(
                "environment tool_use max_turns", f"{max_turns!r} should be 1 or more"
            )
        rewards = {"call_reward": call_reward, "bad_call_reward": bad_call_reward}
        for key, value in rewards.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(
                    f"environment tool_use {key}", f"{value!r} should be a number"
                )
        self.tools = {name: tool_of(name, given) for name, given in tools.items()}
        self.max_turns = max_turns
        self.call_reward, self.bad_call_reward = call_reward, bad_call_reward

    def step(self, messages: Messages, row: Row) -> Turn:
        """Answer a turn's calls, or judge its answer."""
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        if not all(CALL.search(turn) for turn in turns[:-1]):
            return Turn(0.0)  # it has answered: another environment went on
        calls = [(found[1], found[2]) for found in CALL.finditer(turns[-1])]
        if not calls:
            return Turn(float(is_right(turns[-1], str(row["output"]))))
        if len(turns) >= self.max_turns:
            return Turn(0.0)
        reward, replies = 0.0, []
        for number, (text, end) in enumerate(calls):
            try:
                if number >= CALLS_A_TURN:
                    raise BadCall(f"only {CALLS_A_TURN} calls a turn are answered")
                reply = cut(self.answer(text, closed=bool(end)), RESULT_CHARS)
                reward += self.call_reward
            except BadCall as error:
                reply = "error: " + one_line(str(error))
                reward += self.bad_call_reward
            if number <= CALLS_A_TURN:
                replies.append(f"<tool_response>\n{clean(reply)}\n</tool_response>")
        return Turn(reward / len(calls), "\n".join(replies))

    def answer(self, text: str, closed: bool = True) -> str:
        """What a call's tool returns. Raises BadCall."""
        if not closed:
            raise BadCall("the call has no </tool_call>")
        try:
            call = json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise BadCall(f"the call is not JSON: {error}; write {FORM}") from error
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadCall(f"the call has no name; write {FORM}")
        name, arguments = call["name"], call.get("arguments", {})
        if name not in self.tools:
            known = ", ".join(self.tools)
            raise BadCall(f"there is no tool {cut(repr(name), 60)}; tools: {known}")
        if not isinstance(arguments, dict):
            raise BadCall(f"{name}: arguments should be an object; write {FORM}")
        try:
            with mix.limited(mix.OWN_SECONDS):
                return self.tools[name].answer(arguments)
        except BadCall as error:
            raise BadCall(f"{name}: {error}") from error
        except (Exception, SystemExit) as error:
            raise BadCall(f"{name} failed: {type(error).__name__}: {error}") from error

    def described(self) -> str:
        """The tools and how to call them, as Qwen's chat template tells it."""
        lines = []
        for name, tool in self.tools.items():
            function = {
                "name": name,
                "description": tool.description,
                "parameters": tool.parameters,
            }
            told = {"type": "function", "function": function}
            lines.append(json.dumps(told, ensure_ascii=False))
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user "
            "query.\n\nYou are provided with function signatures within "
            "<tools></tools> XML tags:\n<tools>\n" + "\n".join(lines) + "\n</tools>\n\n"
            "For each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )


def tool_of(name: str, given: Mapping[str, Any]) -> Tool:
    """The tool of a setting. Raises UserError, with the tool's name."""
    where = f"environment tool_use tools.{name}"
    if not isinstance(given, Mapping):
        raise UserError(where, "should have import, parameters and description")
    keys = ("import", "parameters", "description")
    if unknown := [str(key) for key in given if key not in keys]:
        raise UserError(
            f"{where}.{unknown[0]}", "unknown key", f"Keys: {', '.join(keys)}"
        )
    path = given.get("import")
    built_in = BUILT_IN.get(path) if isinstance(path, str) else None
    if built_in is None and not (isinstance(path, str) and OWN.fullmatch(path)):
        raise UserError(
            f"{where}.import",
            f"{path!r} names no tool",
            f"write `package.module:function` of this project, or {', '.join(BUILT_IN)}",
        )
    call = built_in.call if built_in else mix.load(f"tool_use tools.{name}", path)
    if not callable(call):
        raise UserError(f"{where}.import", f"{path} is not a function")
    parameters = given.get("parameters", built_in.parameters if built_in else None)
    description = given.get("description", built_in.description if built_in else "")
    if not isinstance(description, str):
        raise UserError(f"{where}.description", f"{description!r} should be text")
    check_schema(f"{where}.parameters", parameters)
    return Tool(call, parameters, description)


def check_schema(where: str, schema: Any) -> None:
    """Raise UserError where a schema is none, or refers to what it does not have."""
    hint = "write the JSON schema of the arguments, an object"
    if not isinstance(schema, Mapping):
        what = "missing" if schema is None else "should be a JSON schema"
        raise UserError(where, what, hint)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise UserError(where + error.json_path[1:], error.message, hint) from error
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    for reference in references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            what = f"refers to {reference}, which it does not have"
            raise UserError(where, what, "define it under $defs") from error


def references(schema: Any) -> list[str]:
    """What a schema refers to."""
    if isinstance(schema, list):
        return [found for part in schema for found in references(part)]
    if not isinstance(schema, Mapping):
        return []
    own = schema.get("$ref")
    found = references([*schema.values()])
    return [own, *found] if isinstance(own, str) else found


def refuse(constant: str) -> Any:
    """JSON has no NaN nor Infinity, which Python's reads."""
    raise ValueError(f"{constant} is no number")


def one_line(text: str) -> str:
    """Text without line breaks, and not too long."""
    return cut(" ".join(text.split()), LINE_CHARS)


def cut(text: str, chars: int) -> str:
    """Text of so many characters at most, and a mark where there was more."""
    return text if len(text) <= chars else text[:chars] + " ..."


def clean(text: str) -> str:
    """Text without halves of characters, which JSON can name and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def calculator(expression: str) -> str:
    """The value of an expression of numbers. Raises BadCall where it has none."""
    expression = expression.strip()
    if len(expression) > EXPRESSION_CHARS:
        raise BadCall(f"the expression is longer than {EXPRESSION_CHARS} characters")
    if not ARITHMETIC.fullmatch(expression):
        raise BadCall("only numbers, + - * / // % ** and parentheses can be calculated")
    try:
        found = value(ast.parse(" ".join(expression.split()), mode="eval").body)
    except (ZeroDivisionError, OverflowError) as error:
        raise BadCall(f"{error}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadCall("the expression is not well formed") from error
    return str(found) if isinstance(found, int) else f"{found:.15g}"


def value(node: ast.expr) -> int | float:
    """The value of a part of an expression, of bounded size."""
    found: Any
    match node:
        case ast.Constant(value=int() | float() as found) if type(found) is not bool:
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            found = -value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            found = value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            found = power(value(left), value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            found = OPERATORS[type(op)](value(left), value(right))
        case _:
            raise BadCall(
                "only numbers, + - * / // % ** and parentheses are calculated"
            )
    if isinstance(found, int) and found.bit_length() > NUMBER_BITS:
        raise BadCall("a number is too large")
    if isinstance(found, float) and not math.isfinite(found):
        raise BadCall("a number is too large")
    return found


def power(base: int | float, exponent: int | float) -> Any:
    """A power that does not grow too large to be calculated."""
    whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
    if whole and exponent * (int(abs(base)).bit_length() - 1) > NUMBER_BITS:
        raise BadCall("a number is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise BadCall("a root of a negative number is no number")
    return result


BUILT_IN = {
    "calculator": Tool(
        calculator,
        {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "Numbers, + - * / // % ** and parentheses.",
                }
            },
            "required": ["expression"],
            "additionalProperties": False,
        },
        "Calculate an arithmetic expression.",
    )
}
"""Tools that the build has."""
