"""The environment `math`: a checked answer is worth 1, any other 0."""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class Math:
    """Rewards the answer that a row's `output` has."""

    def step(self, messages: list[dict[str, str]], row: dict[str, Any]) -> float:
        """1.0 where the last message gives the row's answer, else 0.0."""
        return float(is_right(messages[-1]["content"], str(row["output"])))


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion's answer is `answer`.

    The answer is the last \\boxed{...}, or else the whole completion. Where a plain
    number is asked for, only that number counts: math-verify would also take the
    sum itself, repeated, for its own result.
    """
    boxed = BOXED.findall(completion)
    given, answer = (boxed[-1] if boxed else completion).strip(), answer.strip()
    if given == answer:
        return True
    if NUMBER.fullmatch(answer):
        return bool(NUMBER.fullmatch(given)) and float(given) == float(answer)
    from math_verify import parse, verify

    # its own limits on time work in a process' main thread alone
    wanted = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    got = parse(completion, parsing_timeout=None)
    return (
        bool(wanted) and bool(got) and bool(verify(wanted, got, timeout_seconds=None))
    )
