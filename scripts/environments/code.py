"""The environment `code`: a program that passes its row's assertions is worth 1.

The program is the last ```python block of the model's message, or the whole message. A
row's `output` has the assertions, and what Python they need before them:

    assert add(1, 2) == 3
    assert abs(mean([1, 2]) - 1.5) < 1e-9

Two cells of the sandbox judge (`scripts.environments.sandbox`). The program's cell has
the program and is asked only for what assertions need of it: `add(1, 2)`. The values go
to the judge's cell, where nothing of the program runs, and which compares. So a program
cannot learn what is expected, nor have a say in the comparison, whatever it patches,
prints, raises or overrides; it earns a reward by giving the right values alone.

What is the program's: names that are neither builtin, imported by the row, nor made by
statements of the row that name nothing of the program. All in one call is told to it,
`f(x, 3)` with both arguments, and so is what a statement has that it takes part in.

Known weaknesses, all of them in what a row asserts:

- `assert is_even(2)` and `assert f(1) == g(1)` ask the program alone, which may say so.
- Objects of classes and functions come back as opaque: they equal nothing. Assert their
  attributes or `str`. Instances of a builtin type's subclass come back as the builtin.
- A program named like a builtin is found only in `assert sum(10, 15) == 6`, where no
  other name is the program's, and if the builtin is not in KEPT.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from scripts.environments import Messages, Row
from scripts.environments.sandbox import MODULES, Job, Limits, Sandbox
from scripts.lib.errors import DataError

OPENED = re.compile(r"```(python|python3|py)", re.IGNORECASE)
KEPT = {
    *("abs", "all", "any", "bool", "bytes", "dict", "float", "frozenset", "int"),
    *("isinstance", "len", "list", "range", "round", "set", "sorted", "str", "tuple"),
}
"""Builtins that assertions make values and comparisons of: never the program's."""
BUILTINS = frozenset(dir(builtins))
INNER = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
COMPUTED = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Code:
    """Rewards programs by the assertions they pass."""

    def __init__(
        self,
        seconds: float = 5.0,
        memory_mb: int = 256,
        workers: int | None = None,
        partial: bool = False,
    ) -> None:
        """`partial` rewards the share of assertions passed, else all or nothing."""
        self.sandbox = Sandbox(Limits(seconds, memory_mb), workers)
        self.partial = partial

    @staticmethod
    def check_row(row: Row) -> None:
        """Raise DataError where a row's assertions cannot be judged."""
        row_plan(row)

    def step(self, messages: Messages, row: Row) -> float:
        """The reward of one program."""
        return self.steps([messages], [row])[0]

    def steps(self, conversations: list[Messages], rows: list[Row]) -> list[float]:
        """The rewards of many, `workers` at a time.

        Raises DataError where a row's assertions cannot be judged, before any runs.
        """
        plans = [row_plan(row) for row in rows]
        programs = [
            Job(program(messages[-1]["content"]), plan.steps)
            for messages, plan in zip(conversations, plans, strict=True)
        ]
        with self.sandbox as sandbox:
            answers = sandbox.run_all(programs)
            verdicts = sandbox.run_all(
                [
                    Job("", plan.judge, given(answer.values))
                    for plan, answer in zip(plans, answers, strict=True)
                ]
            )
        rewards = []
        for plan, verdict in zip(plans, verdicts, strict=True):
            passed = [verdict.values[at] == "true" for at in plan.verdicts]
            share = sum(passed) / len(passed)
            rewards.append(share if self.partial else float(all(passed)))
        return rewards


def program(content: str) -> str:
    """The last ```python block of a message, or else the whole message."""
    last = content
    block: list[str] | None = None
    for line in content.split("\n"):
        if block is None:
            block = [] if OPENED.fullmatch(line.strip()) else None
        elif line.strip() == "```":
            last, block = "\n".join(block), None
        else:
            block.append(line)
    return last


def given(values: list[str | None]) -> dict[str, str]:
    """A program's values by the names that the judge knows them by."""
    return {named(at): value for at, value in enumerate(values) if value is not None}


def named(step: int) -> str:
    """The name of a step's value, in the judge's cell."""
    return f"_value_{step}"


class Plan(NamedTuple):
    """How a row is judged."""

    steps: list[str]
    """What the program's cell does, in order."""
    judge: list[str]
    """What the judge's cell does, with the values of the steps."""
    verdicts: list[int]
    """Which of those are assertions; each is worth true or false."""


class BadTests(Exception):
    """Assertions that cannot be judged; the message says why."""


def row_plan(row: Row) -> Plan:
    """How a row is judged. Raises DataError where it cannot be."""
    try:
        return plan(str(row["output"]))
    except BadTests as error:
        raise DataError(
            f"row {str(row.get('input', ''))[:60]!r}",
            f"`output` cannot be judged: {error}",
            "write Python assertions, one a line: assert add(1, 2) == 3",
        ) from error


@functools.lru_cache(maxsize=4096)
def plan(tests: str) -> Plan:
    """How assertions are judged. Raises BadTests."""
    try:
        body = ast.parse(tests).body
        imported, own = set(imports(body)), bound(body)
        while True:
            split = Split(frozenset(BUILTINS | imported | own))
            made = split.plan(body)
            # what the program is told of, it may change: then it is the program's too
            if not own & split.told:
                break
            own -= split.told
        if split.idle:
            raise BadTests(f"`{split.idle[0]}` asserts nothing of the program")
        return made
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests(f"no Python: {error}") from error


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a row imports. Raises BadTests where the sandbox has no such."""
    for node in body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            module = alias.name if isinstance(node, ast.Import) else node.module or ""
            if module.partition(".")[0] not in MODULES or alias.name == "*":
                raise BadTests(f"`{ast.unparse(node)}` is not possible in the sandbox")
            yield alias.asname or alias.name.partition(".")[0]


def bound(body: list[ast.stmt]) -> set[str]:
    """The names that a row's statements make, imports apart."""
    made = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif not isinstance(node, ast.Assert):
            made |= {name.id for name in stored(node)} - local(node)
    return made


def stored(node: ast.AST) -> Iterator[ast.Name]:
    """Where names are bound."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner


def local(node: ast.AST) -> set[str]:
    """The names bound by functions and comprehensions in here."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            found.add(inner.arg)
        elif isinstance(inner, INNER):
            found |= {name.id for name in stored(inner)}
    return found


def names(node: ast.AST) -> set[str]:
    """The names that mean something outside of here."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(inner.name)
    return found - local(node)


class Split(ast.NodeTransformer):
    """Takes out of assertions what the program is asked for."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known
        """Names that are not the program's."""
        self.steps: list[str] = []
        self.told: set[str] = set()
        """Names in what the program's cell does."""
        self.idle: list[str] = []
        """Assertions for which the program is asked nothing."""

    def plan(self, body: list[ast.stmt]) -> Plan:
        """Share a row's statements out. Raises BadTests."""
        judge: list[str] = []
        verdicts = []
        for node in body:
            text = ast.unparse(node)
            if isinstance(node, ast.Assert):
                verdicts.append(len(judge))
                judge.append(f"not not ({ast.unparse(self.opened(node.test))})")
            elif any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
                raise BadTests(f"line {node.lineno}: an assertion inside a statement")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.steps.append(text)
                judge.append(text)
            elif self.foreign(node):
                self.tell(node)
            else:
                judge.append(text)
        if not verdicts:
            raise BadTests("no assertion")
        return Plan(self.steps, judge, verdicts)

    def opened(self, test: ast.expr) -> ast.expr:
        """An assertion over the program's values."""
        before, known = len(self.steps), self.known
        # a copy, since it may be opened again with other names
        opened = self.visit(ast.parse(ast.unparse(test), mode="eval").body)
        if len(self.steps) == before:  # perhaps its functions are named like builtins
            self.known = known - (BUILTINS - KEPT)
            opened = self.visit(opened)
            self.known = known
        if len(self.steps) == before:
            self.idle.append(ast.unparse(test))
        return opened

    def visit(self, node: ast.AST) -> Any:
        """Put a name in the place of what the program is asked for."""
        if not self.foreign(node):
            return node
        if not isinstance(node, ast.expr) or not self.asked(node):
            return self.generic_visit(node)
        inside = local(node) | self.known
        for inner in ast.walk(node):
            if isinstance(inner, ast.Compare) and names(inner) - inside:
                # what it is compared with would be told
                raise BadTests(f"`{ast.unparse(inner)}` is no assertion of its own")
        self.tell(node)
        return ast.Name(named(len(self.steps) - 1), ast.Load())

    def tell(self, node: ast.AST) -> None:
        """Have the program's cell do this."""
        self.told |= names(node)
        self.steps.append(ast.unparse(node))

    def foreign(self, node: ast.AST) -> bool:
        """Whether something of the program is named in here."""
        return bool(names(node) - self.known)

    def asked(self, node: ast.expr) -> bool:
        """Whether all of this is the program's to answer.

        It is where it starts with the program's name, or converts nothing but such:
        `len(f(1))`. It is not where a builtin has a literal too, which may be what is
        expected: of `isclose(f(1), 1.5)`, only `f(1)`.
        """
        if not self.foreign(node):
            return False
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self.asked(node.value)
        if not isinstance(node, ast.Call):
            return isinstance(node, (ast.Name, ast.NamedExpr, *COMPUTED))
        if self.asked(node.func):
            return True
        if isinstance(node.func, ast.Name):
            if node.func.id in ("map", "filter"):
                return True
            if len(node.args) == 1 and not node.keywords:
                return self.asked(node.args[0])
        return any(
            key.arg == "key" and self.foreign(key.value) for key in node.keywords
        )
