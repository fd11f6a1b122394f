"""Which files of all sources one of several jobs reads: as many bytes as the others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from scripts.lib import rows
from scripts.lib.errors import RecipeError
from scripts.lib.schema import Source

Named = tuple[str, Source, list[Path]]
"""A source's name, its settings and its paths."""


def parsed(text: str) -> tuple[int, int]:
    """`2/8` as its numbers. Raises RecipeError where it is none."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise RecipeError(f"--share {text}", "not one of several, such as 2/8")


def share_of(
    named: list[Named], share: tuple[int, int], known: Collection[tuple[str, str]]
) -> list[Named]:
    """The sources, each with the files that fall to this job, in reading order.

    Largest first, each file goes to the job with the least so far: files are whole,
    and so is a dataset of the hub. `known` are files, by source and name, that were
    done before: dealt out last, for most are as they were and cost nothing.
    """
    units: list[tuple[bool, int, int, Named]] = []
    for name, source, paths in named:
        files = rows.files_of(name, source, paths)
        for unit in [paths] if source.hf else [[file] for file in files]:
            inside = files if source.hf else unit
            size = sum(path.stat().st_size for path in inside)
            is_known = len(inside) == 1 and (name, inside[0].name) in known
            units.append((is_known, -size, len(units), (name, source, unit)))
    number, of = share
    loads = [0] * of
    mine = []
    for _, size, place, unit in sorted(units, key=lambda one: one[:3]):
        job = loads.index(min(loads))
        loads[job] += 1 - size
        if job == number - 1:
            mine.append((place, unit))
    found: dict[str, Named] = {}
    for _, (name, source, paths) in sorted(mine, key=lambda one: one[0]):
        found.setdefault(name, (name, source, []))[2].extend(paths)
    return [*found.values()]
