"""What a report reads: the graph's nodes, and of their artifacts what is there."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.lib.errors import DataError
from scripts.lib.settings import flat


@dataclass
class Node:
    """One node as the page shows it; what is not on this machine is None or empty."""

    id: str
    stage: str
    name: str
    parents: list[str]
    recipe: dict[str, Any]
    anchor: str
    folder: Path | None = None
    provenance: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    rollouts: dict[str, Any] = field(default_factory=dict)
    sweep: str = ""
    varied: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> str:
        """The sweep it is of, else itself."""
        return f"{self.stage}/{self.sweep}" if self.sweep else self.id

    @property
    def is_here(self) -> bool:
        return self.provenance is not None or bool(self.metrics or self.scores)

    @property
    def seconds(self) -> float | None:
        return number((self.provenance or {}).get("seconds"))


@dataclass(frozen=True)
class Score:
    """A model's share of right answers on one task, as one eval node measured it."""

    node: str
    score: float
    low: float
    high: float
    num_items: int
    num_right: int


@dataclass(frozen=True)
class Table:
    """Scores of one task, in the graph's order.

    Several eval nodes that ask the same in the same way, as a sweep's do, are one.
    """

    evals: list[str]
    task: str
    confidence: float
    scores: list[Score]
    by: list[str] = field(default_factory=list)
    """The eval nodes, those of a sweep by its name."""

    @property
    def ranking(self) -> list[tuple[int, Score, bool]]:
        """Place, score, and whether its interval reaches the best one's; best first."""
        scores = sorted(self.scores, key=lambda score: -score.score)
        ranks = [1 + sum(s.score > one.score for s in scores) for one in scores]
        return [
            (rank, one, rank > 1 and one.high >= scores[0].low)
            for rank, one in zip(ranks, scores, strict=True)
        ]


def read_graph(path: Path) -> dict[str, Node]:
    """The nodes of a graph by id, in its order."""
    nodes: dict[str, Node] = {}
    try:
        for place, entry in enumerate(_json(path)["nodes"]):
            stage, name = str(entry["stage"]), str(entry["name"])
            id = str(entry.get("id", f"{stage}/{name}"))
            anchor = "node-" + re.sub(r"[^a-z0-9_]+", "-", id.lower())
            if anchor in {node.anchor for node in nodes.values()}:
                anchor += f"-{place}"
            parents = [str(parent) for parent in entry["parents"]]
            made = Node(id, stage, name, parents, dict(entry["recipe"]), anchor)
            made.sweep = str(entry.get("sweep", ""))
            made.varied = dict(entry.get("varied", {}))
            nodes[id] = made
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(str(path), f"not a graph of nodes: {error!r}") from error
    for node in nodes.values():
        if unknown := [parent for parent in node.parents if parent not in nodes]:
            raise DataError(str(path), f"{node.id} has no parent {unknown[0]}")
    return nodes


def read_artifact(node: Node, folder: Path) -> None:
    """Fill `node` from what is there of its artifact."""
    node.folder = folder
    if (path := folder / "provenance.json").is_file():
        node.provenance = _object(path)
    for path in (folder / "metrics.jsonl", folder / "model" / "metrics.jsonl"):
        if path.is_file():
            node.metrics = _lines(path)
            break
    if (path := folder / "scores" / "scores.json").is_file():
        node.scores = _object(path)
    if (path := folder / "scores" / "samples.jsonl").is_file():
        node.samples = _lines(path)
    if (path := folder / "data" / "rollouts.json").is_file():
        node.rollouts = dict(flat(_object(path)))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise DataError(str(path), "not a JSON object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{place}", f"not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{place}", "not a JSON object")
            rows.append(row)
    return rows


def number(value: object) -> float | None:
    """`value` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def score_tables(nodes: list[Node]) -> list[Table]:
    """Every task that an eval node here has asked."""
    order = {node.id: at for at, node in enumerate(nodes)}
    tables: dict[tuple[str, ...], Table] = {}
    for node in nodes:
        if node.scores is None:
            continue
        try:
            confidence = float(node.scores["confidence"])
            for found in node.scores["scores"]:
                model, task = str(found["model"]), str(found["task"])
                low, high = found["interval"]
                score, low, high = map(float, (found["score"], low, high))
                if not all(map(math.isfinite, (score, low, high))):
                    raise ValueError(f"{model} {task}: not finite")
                counts = int(found["num_items"]), int(found["num_right"])
                asked = json.dumps([found["items_digest"], node.recipe])
                table = tables.setdefault(
                    (task, asked), Table([], task, confidence, [])
                )
                if node.id not in table.evals:
                    table.evals.append(node.id)
                if node.whole not in table.by:
                    table.by.append(node.whole)
                if model not in {score.node for score in table.scores}:
                    table.scores.append(Score(model, score, low, high, *counts))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"{node.folder}/scores/scores.json"
            raise DataError(where, f"not of the scores' form: {error!r}") from error
    for table in tables.values():
        table.scores.sort(key=lambda score: order.get(score.node, len(order)))
    return [*tables.values()]


# --- words and numbers -------------------------------------------------------


def duration(seconds: float | None) -> str:
    """A time as one would say it."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def percent(share: float) -> str:
    """A share of one."""
    return f"{100 * share:.1f}%"


def significant(value: float) -> str:
    """A measured number."""
    return f"{value:.4g}"


def count(value: object) -> str:
    """A number of things, or a share of them."""
    if isinstance(value, int):
        return f"{value:,}"
    return significant(value) if isinstance(value, float) else str(value)
