"""Several environments at once: each rewards, the weighted sum counts.

An environment may raise, hang or return no number: such a reward is 0 and counted. It
is refused where it never gives a reward.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.environments import Environment, Messages, Row, Turn
from scripts.lib.errors import UserError

BUILT_IN = {
    "math": "scripts.environments.math:Math",
    "code": "scripts.environments.code:Code",
    "tool_use": "scripts.environments.tool_use:ToolUse",
    "sliding_puzzle": "scripts.environments.sliding_puzzle:SlidingPuzzle",
    "reward_model": "scripts.environments.reward_model:RewardModel",
}
"""Environments that the build has, and their classes."""

OWN_SECONDS = 30.0
"""A step of an own environment may take so long."""
MOST_FAULTS = 100
"""Steps that may fail before any has worked."""


class EnvironmentTimeout(Exception):
    """An environment took too long."""


class Faults:
    """What an environment did wrong: how often, and the first one's words."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.good, self.first = name, 0, 0, ""

    def add(self, what: str) -> None:
        """Count one. Raises UserError where the environment has never worked."""
        self.count += 1
        self.first = self.first or what
        if not self.good and self.count >= MOST_FAULTS:
            raise UserError(
                f"environment {self.name}",
                f"gave no reward in {self.count} steps; the first: {self.first}",
                "mend it, or take it out of the node's `environment`",
            )


class Mix:
    """The environments of a node, by name, with their weights."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.weights = {n: float(s.get("weight", 1.0)) for n, s in settings.items()}
        self.faults = {name: Faults(name) for name in settings}
        self.own = {name for name, found in settings.items() if "import" in found}
        self.environments: dict[str, Environment] = {}
        for name, found in settings.items():
            given = {k: v for k, v in found.items() if k not in ("weight", "import")}
            given |= given.pop("settings", None) or {}
            kind = load(name, found.get("import"))
            try:
                self.environments[name] = kind(**given)
            except UserError:
                raise
            except Exception as error:
                what = f"refuses its settings: {type(error).__name__}: {error}"
                raise UserError(f"environment {name}", what) from error

    def steps(
        self, conversations: list[Messages], rows: list[Row]
    ) -> list[tuple[Turn, dict[str, float]]]:
        """For each conversation the environments' turn, and each one's own reward.

        Of several replies, the first environment's counts; the conversation ends when
        none replies.
        """
        each: dict[str, list[Turn]] = {}
        for name, environment in self.environments.items():
            each[name] = self.turns(name, environment, conversations, rows)
        found = []
        for number in range(len(conversations)):
            turns = {name: each[name][number] for name in each}
            reward = sum(self.weights[n] * turn.reward for n, turn in turns.items())
            replies = [t.reply for t in turns.values() if t.reply is not None]
            turn = Turn(reward, replies[0] if replies else None)
            found.append((turn, {name: turn.reward for name, turn in turns.items()}))
        return found

    def turns(
        self,
        name: str,
        environment: Environment,
        conversations: list[Messages],
        rows: list[Row],
    ) -> list[Turn]:
        """One environment's turns, faults as rewards of 0."""
        faults = self.faults[name]
        at_once = None if name in self.own else getattr(environment, "steps", None)
        if at_once is not None:
            given = at_once(conversations, rows)
            return [self.checked(turn, faults) for turn in given]
        turns = []
        for messages, row in zip(conversations, rows, strict=True):
            try:
                with limited(OWN_SECONDS if name in self.own else 0.0):
                    turn = environment.step(messages, row)
            except UserError:
                raise
            except Exception as error:
                faults.add(f"{type(error).__name__}: {error}")
                turns.append(Turn(0.0))
                continue
            turns.append(self.checked(turn, faults))
        return turns

    def checked(self, turn: Turn | float, faults: Faults) -> Turn:
        """A turn whose reward is a number."""
        if not isinstance(turn, Turn):
            turn = Turn(turn)
        reward, reply = turn
        if reply is not None and not isinstance(reply, str):
            faults.add(f"the reply was {reply!r}")
            return Turn(0.0)
        if isinstance(reward, bool) or not isinstance(reward, (int, float)):
            faults.add(f"the reward was {reward!r}")
            return Turn(0.0, turn.reply)
        if not math.isfinite(reward):
            faults.add(f"the reward was {reward}")
            return Turn(0.0, turn.reply)
        faults.good += 1
        return Turn(float(reward), turn.reply)


def load(name: str, path: str | None) -> Any:
    """The class of an environment: one of ours, or `package.module:Class` here."""
    if path is None:
        module, _, kind = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), kind)
    file, kind = own_file(path)
    spec = importlib.util.spec_from_file_location(f"own_{name}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"environment {name} import {path}", f"no file {file}")
    module_found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module_found  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module_found)
        return getattr(module_found, kind)
    except Exception as error:
        raise UserError(
            f"environment {name} import {path}",
            f"cannot be imported: {type(error).__name__}: {error}",
            f"see that {file} can be run and has a class {kind}",
        ) from error


def check_rows(settings: Mapping[str, Mapping[str, Any]], rows: Iterable[Row]) -> None:
    """Raise DataError for the first row that an environment of ours cannot judge."""
    ours = [name for name, found in settings.items() if "import" not in found]
    checks = [getattr(load(name, None), "check_row", None) for name in ours]
    for row in rows:
        for check in filter(None, checks):
            check(row)


def own_file(path: str) -> tuple[Path, str]:
    """The file and the class that `package.module:Class` means."""
    module, _, kind = path.partition(":")
    return Path(*module.split(".")).with_suffix(".py"), kind


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise EnvironmentTimeout in what takes longer; in a process' main thread alone."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise EnvironmentTimeout(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
