"""Which chunks of all sources one of several jobs makes: as many bytes as the others."""

from __future__ import annotations

from scripts.lib.errors import RecipeError


def parsed(text: str) -> tuple[int, int]:
    """`2/8` as its numbers. Raises RecipeError where it is none."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise RecipeError(f"--share {text}", "not one of several, such as 2/8")


def share_of(sizes: list[int], known: list[bool], share: tuple[int, int]) -> list[int]:
    """The indexes of the chunks that fall to this job, in order.

    Largest first, each goes to the job with the least so far. Those `known` were done
    before: dealt out last, for most are as they were and cost nothing.
    """
    number, of = share
    loads = [0] * of
    mine = []
    for i in sorted(range(len(sizes)), key=lambda i: (known[i], -sizes[i], i)):
        job = loads.index(min(loads))
        loads[job] += 1 + sizes[i]
        if job == number - 1:
            mine.append(i)
    return sorted(mine)
