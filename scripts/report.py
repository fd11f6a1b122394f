r"""Write the page about a graph of nodes: lineage, scores, curves, samples, settings,
times and versions.

Reads   --graph   JSON: {"nodes": [{"stage", "name", "parents": [ids], "recipe"}]},
                  with "sweep" and "varied" where a node is of a sweep
        --node    ID=FOLDER, once a node: its artifact. Of it are read metrics.jsonl,
                  scores/scores.json, scores/samples.jsonl, data/rollouts.json and
                  provenance.json, those that are there
        --recipe  YAML of one `report:` node
Writes  --out     report.html: one file that needs no network; the same inputs give
                  the same bytes
Raises  RecipeError for a node that the graph lacks; DataError with the file that is
        not of its form

    python -m scripts.report --graph graph.json --recipe R.yaml --out work/page \
        --node sft/instruct=artifacts/sft/instruct
"""

from __future__ import annotations

import base64
import collections
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from scripts.lib import cli, dapo
from scripts.lib.draw import draw
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.ranking import ranked
from scripts.lib.schema import ReportRecipe

TEMPLATES = Path(__file__).parent / "templates"
QUANTITIES = {
    "reward": ("Reward", "share of right answers"),
    "loss": ("Loss", "nats a token"),
}
PAIRS = ("dpo", "rm")
DASHES = ("dash", "dot", "dashdot", "longdash")
"""Lines of several environments, told apart without their colour too."""
TRAINED = ("pretrain", "sft", "dpo", "rm", "grpo")
LONGEST_SAMPLE = 4000
LONGEST_LABEL = 28


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
        return _number((self.provenance or {}).get("seconds"))


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
    """Scores of one task in one eval node, in the graph's order."""

    eval: str
    task: str
    confidence: float
    scores: list[Score]


def main(argv: list[str] | None = None) -> int:
    """Write report.html from the artifacts that the flags name."""
    flags = cli.parser(__doc__)
    flags.add_argument("--graph", type=Path, required=True, help="JSON of the nodes")
    flags.add_argument(
        "--node", action="append", default=[], help="ID=FOLDER of an artifact"
    )
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, ReportRecipe)
    nodes = read_graph(args.graph)
    for id, folders in cli.named_paths(args.node).items():
        if id not in nodes:
            raise RecipeError(f"--node {id}", f"no such node in {args.graph}")
        read_artifact(nodes[id], folders[-1])
    shown = [n for n in nodes.values() if n.folder or n.stage != "report"]
    drawing = args.work / "lineage.svg"
    draw_lineage(shown, drawing)
    page = render(recipe.title, shown, drawing.read_text(encoding="utf-8"))
    whole = args.out / "report.html"
    # A model may emit half a surrogate pair, which UTF-8 cannot hold.
    whole.write_bytes(page.encode("utf-8", errors="replace"))
    return 0


# --- what is read ------------------------------------------------------------


def read_graph(path: Path) -> dict[str, Node]:
    """The nodes of a graph by id, in its order."""
    nodes: dict[str, Node] = {}
    try:
        for number, entry in enumerate(_json(path)["nodes"]):
            stage, name = str(entry["stage"]), str(entry["name"])
            id = str(entry.get("id", f"{stage}/{name}"))
            anchor = "node-" + re.sub(r"[^a-z0-9_]+", "-", id.lower())
            if anchor in {node.anchor for node in nodes.values()}:
                anchor += f"-{number}"
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
        node.rollouts = dict(_flat(_object(path)))


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
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}", f"not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}", "not a JSON object")
            rows.append(row)
    return rows


def _number(value: object) -> float | None:
    """`value` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def score_tables(nodes: list[Node]) -> list[Table]:
    """Every task of every eval node that is here."""
    order = {node.id: at for at, node in enumerate(nodes)}
    tables = []
    for node in nodes:
        if node.scores is None:
            continue
        where = f"{node.folder}/scores/scores.json"
        by_task: dict[str, list[Score]] = {}
        try:
            for found in node.scores["scores"]:
                model, task = str(found["model"]), str(found["task"])
                low, high = found["interval"]
                score, low, high = map(float, (found["score"], low, high))
                if not all(map(math.isfinite, (score, low, high))):
                    raise ValueError(f"{model} {task}: not finite")
                counts = int(found["num_items"]), int(found["num_right"])
                row = Score(model, score, low, high, *counts)
                by_task.setdefault(task, []).append(row)
            confidence = float(node.scores["confidence"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(where, f"not of the scores' form: {error!r}") from error
        for task, scores in by_task.items():
            scores.sort(key=lambda score: order.get(score.node, len(order)))
            tables.append(Table(node.id, task, confidence, scores))
    return tables


def joined_tables(tables: list[Table], nodes: list[Node]) -> list[Table]:
    """The tables, those of an eval that is a sweep as one."""
    whole = {node.id: node.whole for node in nodes}
    found: dict[tuple[str, str], Table] = {}
    for table in tables:
        one = Table(whole[table.eval], table.task, table.confidence, [])
        found.setdefault((one.eval, one.task), one).scores.extend(table.scores)
    return [*found.values()]


def joined_samples(nodes: list[Node]) -> list[Node]:
    """The nodes, those of an eval that is a sweep as one with all their samples."""
    found: dict[str, Node] = {}
    for node in nodes:
        id = node.whole if node.stage == "eval" else node.id
        one = found.setdefault(id, replace(node, id=id, samples=[]))
        one.samples.extend(node.samples)
    return [*found.values()]


def rankings(nodes: list[Node], tables: list[Table]) -> list[dict[str, Any]]:
    """Of each sweep of models, those that a table scores, the best first."""
    sweeps: dict[str, list[Node]] = {}
    for node in nodes:
        if node.sweep and node.stage != "eval":
            sweeps.setdefault(node.whole, []).append(node)
    result = []
    for table in tables:
        scores = {score.node: score for score in table.scores}
        for sweep, its in sweeps.items():
            scored = {n.id: n for n in its if n.id in scores}
            order = ranked([(id, scores[id].score) for id in scored])
            rows = [{"node": scored[id], "score": scores[id]} for id, _ in order]
            keys = list(dict.fromkeys(key for n in its for key in n.varied))
            if len(rows) > 1:
                result.append(
                    {"sweep": sweep, "table": table, "keys": keys, "rows": rows}
                )
    return result


# --- what is shown -----------------------------------------------------------


def draw_lineage(nodes: list[Node], target: Path) -> None:
    """Draw the graph of `nodes`, each linked to its section."""
    drawn = [
        {
            "id": node.id,
            "state": "current" if node.is_here else "missing",
            "note": _duration(node.seconds) if node.is_here else "not here",
            "link": f"#{node.anchor}",
        }
        for node in nodes
    ]
    ids = {node.id for node in nodes}
    edges = [(p, node.id) for node in nodes for p in node.parents if p in ids]
    try:
        draw(drawn, edges, target)
    except ValueError as error:
        raise DataError("--graph", str(error)) from error


def render(title: str, nodes: list[Node], drawing: str) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": _duration,
        "percent": _percent,
        "significant": _significant,
        "count": _count,
        "setting": _setting,
    }
    tables = joined_tables(score_tables(nodes), nodes)
    curves = [c for node in nodes for c in [curve(node)] if c]
    charts = [score_chart(table) for table in tables]
    plots = [chart["plot"] for chart in [*charts, *curves]]
    scripts = [_script(name) for name in (["plotly"] if plots else [])]
    scripts.append(_script("report.js"))
    return environment.get_template("report.html.j2").render(
        title=title,
        nodes=nodes,
        by_id={node.id: node for node in nodes},
        drawing=drawing[drawing.index("<svg") :],
        readable=_readable_width(drawing),
        summary=summary(nodes, tables),
        charts=charts,
        rankings=rankings(nodes, tables),
        curves=curves,
        trained=[n for n in nodes if n.stage in TRAINED],
        samples=sample_tables(joined_samples(nodes)),
        settings={node.id: list(_flat(_whole(node))) for node in nodes},
        times=times(nodes),
        versions=versions(nodes),
        commits=commits(nodes),
        plots=_plain(plots),
        scripts=scripts,
        hashes=" ".join(map(_csp_hash, scripts)),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _readable_width(drawing: str) -> int:
    """The narrowest the drawing may be shown, in CSS pixels; narrower, it scrolls."""
    found = re.search(r'viewBox="0 0 ([\d.]+)', drawing)
    assert found, "draw writes a viewBox"
    return round(float(found[1]) * 96 / 72 * 0.8)


def summary(nodes: list[Node], tables: list[Table]) -> dict[str, Any] | None:
    """The best final model of the first task, and the scores on the way to it."""
    if not tables:
        return None
    table = tables[0]
    above = _ancestors(nodes)
    scored = {score.node: score for score in table.scores}
    inner = set().union(*(above.get(id, set()) for id in scored))
    final = max(
        (score for score in table.scores if score.node not in inner),
        key=lambda score: (score.score, len(above.get(score.node, ()))),
        default=table.scores[-1],
    )
    way = [s for s in table.scores if s.node in above.get(final.node, set())]
    return {"table": table, "final": final, "way": way}


def _ancestors(nodes: list[Node]) -> dict[str, set[str]]:
    parents = {node.id: [p for p in node.parents] for node in nodes}
    result: dict[str, set[str]] = {}
    for id in parents:
        todo, seen = list(parents[id]), set[str]()
        while todo:
            above = todo.pop()
            if above not in seen:
                seen.add(above)
                todo += parents.get(above, [])
        result[id] = seen
    return result


def score_chart(table: Table) -> dict[str, Any]:
    """A dot with its interval for each model, and the sentence that says it."""
    scores = table.scores
    said = "; ".join(
        f"{s.node} {_percent(s.score)} ({_percent(s.low)} to {_percent(s.high)})"
        for s in scores
    )
    data = {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * s.score for s in scores],
        "y": list(range(len(scores))),
        "text": [_plot_text(s.node) for s in scores],
        "error_x": {
            "type": "data",
            "array": [100 * (s.high - s.score) for s in scores],
            "arrayminus": [100 * (s.score - s.low) for s in scores],
            "thickness": 2,
            "width": 5,
        },
        "marker": {"size": 11},
        "hovertemplate": "%{text}: %{x:.1f}%<extra></extra>",
    }
    layout = {
        "height": 70 + 42 * len(scores),
        "xaxis": {"range": [-2, 102], "ticksuffix": "%", "title": {"text": ""}},
        "yaxis": {
            "tickvals": list(range(len(scores))),
            "ticktext": [_plot_text(s.node, LONGEST_LABEL) for s in scores],
            "range": [len(scores) - 0.5, -0.5],
            "automargin": True,
        },
    }
    label = f"Scores on {table.task}: {said}"
    return {"table": table, "plot": {"data": [data], "layout": layout}, "label": label}


def curve(node: Node) -> dict[str, Any] | None:
    """The reward, or else the loss, of a training node by step."""
    for key, (name, unit) in QUANTITIES.items():
        # A resumed run may log a step twice; the later one is what was trained on.
        found = {row.get("step"): _number(row.get(key)) for row in node.metrics}
        points = sorted(
            (step, value)
            for step, value in found.items()
            if _number(step) is not None and value is not None
        )
        if not points:
            continue
        if key == "loss" and node.stage in PAIRS:
            unit = "nats a pair"
        others = [*node.recipe.get("environment", ["math"])] != ["math"]
        shaped = node.recipe.get("algorithm") == "dapo"
        if key == "reward" and (others or shaped):
            unit = "mean of the completions"
        steps, values = zip(*points, strict=True)
        best = max(points, key=lambda p: p[1]) if key == "reward" else None
        best = best or min(points, key=lambda p: p[1])
        said = (
            f"{_significant(values[0])} at step {steps[0]}, "
            f"{_significant(values[-1])} at {steps[-1]}, "
            f"best {_significant(best[1])} at {best[0]}"
        )
        held = _number(node.metrics[-1].get("validation_accuracy"))
        if held is not None:
            said += f"; {_percent(held)} of the pairs held back told apart"
        rewards = shares(node) if key == "reward" else []
        data = {
            "type": "scatter",
            "mode": "lines" if len(points) > 1 else "markers",
            "x": steps,
            "y": values,
            "line": {"width": 2},
            "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
        }
        layout = {
            "height": 260,
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": unit}, "automargin": True},
        }
        traces = [data]
        if len(rewards) > 1:
            above = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
            layout |= {"height": 300, "showlegend": True, "legend": above}
            layout |= {"margin": {"l": 56, "r": 16, "t": 36, "b": 44}}
            traces = [{**data, "name": "sum, weighted"}]
            traces += [
                data
                | {"x": r["steps"], "y": r["values"], "name": r["name"]}
                | {"line": {"width": 2, "dash": dash}}
                for r, dash in zip(rewards, cycle(DASHES), strict=False)
            ]
        return {
            "node": node,
            "name": name,
            "unit": unit,
            "said": said,
            "label": f"{name} of {node.id}: {said}",
            "rewards": rewards,
            "plot": {"data": traces, "layout": layout},
        }
    return None


def shares(node: Node) -> list[dict[str, Any]]:
    """What each environment of a node gave, before its weight, and its share at last.

    A share is of the weighted rewards' sum, each taken without its sign.
    """
    found = []
    for name, settings in node.recipe.get("environment", {}).items():
        given = {
            row.get("step"): _number(row.get(f"reward_{name}")) for row in node.metrics
        }
        values = {step: value for step, value in given.items() if value is not None}
        if values:
            weight = _number((settings or {}).get("weight", 1.0)) or 0.0
            steps = sorted(values)
            found.append(
                {
                    "name": name,
                    "weight": weight,
                    "steps": steps,
                    "values": [values[step] for step in steps],
                    "part": weight * values[steps[-1]],
                }
            )
    total = sum(abs(reward["part"]) for reward in found)
    return [
        reward | {"share": _percent(abs(reward["part"]) / total) if total else "none"}
        for reward in found
    ]


def sample_tables(nodes: list[Node]) -> list[dict[str, Any]]:
    """Answers by eval node and task: a row a prompt, a column a model."""
    order = {node.id: at for at, node in enumerate(nodes)}
    result = []
    for node in nodes:
        tasks: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {}
        asked: collections.Counter[tuple[str, ...]] = collections.Counter()
        for number, row in enumerate(node.samples, 1):
            if missing := {"model", "task", "input", "answer"} - row.keys():
                where = f"{node.folder}/scores/samples.jsonl:{number}"
                raise DataError(where, f"lacks {', '.join(sorted(missing))}")
            model, task = str(row["model"]), str(row["task"])
            given, expected = map(_sample_text, (row["input"], row.get("expected", "")))
            asked[model, task, given, expected] += 1  # a prompt may be asked twice
            prompt = given, expected, asked[model, task, given, expected]
            answers = tasks.setdefault(task, {}).setdefault(prompt, {})
            right = row.get("right")
            answers[model] = {
                "text": _sample_text(row["answer"]),
                "right": None if right is None else bool(right),
            }
        for task, rows in tasks.items():
            models = {model for answers in rows.values() for model in answers}
            result.append(
                {
                    "eval": node,
                    "task": task,
                    "models": sorted(models, key=lambda m: (order.get(m, 1 << 30), m)),
                    "rows": [
                        {"input": given, "expected": expected, "answers": answers}
                        for (given, expected, _), answers in rows.items()
                    ],
                }
            )
    return result


def times(nodes: list[Node]) -> dict[str, Any]:
    """Seconds and GPU-hours a node, their sums, and each bar's length in percent."""
    rows = [node for node in nodes if node.seconds is not None]
    longest = max((node.seconds or 0.0 for node in rows), default=0.0) or 1.0
    gpu_hours = {
        node.id: _number((node.provenance or {}).get("gpu_hours")) for node in rows
    }
    return {
        "nodes": rows,
        "gpu_hours": gpu_hours,
        "bars": {n.id: round(100 * (n.seconds or 0.0) / longest, 2) for n in rows},
        "seconds": sum(node.seconds or 0.0 for node in rows),
        "total_gpu_hours": sum(hours or 0.0 for hours in gpu_hours.values()),
    }


def versions(nodes: list[Node]) -> list[dict[str, Any]]:
    """Each package's versions, and which nodes used which where they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for node in nodes:
        made = node.provenance or {}
        packages = dict(made.get("packages") or {})
        if made.get("python"):
            packages["Python"] = made["python"]
        for package, version in packages.items():
            used = found.setdefault(str(package), {})
            used.setdefault(str(version), []).append(node.id)
    return [
        {"package": package, "versions": used}
        for package, used in sorted(found.items(), key=lambda item: item[0].lower())
    ]


def commits(nodes: list[Node]) -> dict[tuple[str, bool], list[str]]:
    """The nodes each commit made; True where files had changes beside it."""
    result: dict[tuple[str, bool], list[str]] = {}
    for node in nodes:
        if commit := (node.provenance or {}).get("git_commit"):
            dirty = bool((node.provenance or {}).get("git_dirty"))
            result.setdefault((str(commit), dirty), []).append(node.id)
    return result


# --- words and numbers -------------------------------------------------------


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _count(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return _significant(value) if isinstance(value, float) else str(value)


def _setting(value: object) -> str:
    if isinstance(value, str):
        return value
    return "nothing set" if value == {} else json.dumps(value, ensure_ascii=False)


def _whole(node: Node) -> dict[str, Any]:
    """A recipe with what its algorithm stands for, where its overrides say no other."""
    recipe = node.recipe
    if recipe.get("algorithm") != "dapo":
        return recipe
    if "trl" in ((node.provenance or {}).get("packages") or {}):
        return recipe | {"trl": dapo.trl()}
    dynamic = recipe.get("dynamic_sampling", True)
    meant = dapo.settings(recipe["max_completion_tokens"], dynamic)
    return recipe | {"overrides": meant | recipe.get("overrides", {})}


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings as (dotted key, value)."""
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sample_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_SAMPLE:
        rest = len(text) - LONGEST_SAMPLE
        text = f"{text[:LONGEST_SAMPLE]}… ({rest} more characters)"
    return text


def _plot_text(text: str, longest: int = LONGEST_SAMPLE) -> str:
    """`text` for plotly, which reads some HTML in its labels."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return html.escape(short, quote=False)


def _plain(value: Any) -> Any:
    """`value` as browsers' JSON: tuples as lists, no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _script(name: str) -> str:
    if name == "plotly":
        import plotly.offline

        text: str = plotly.offline.get_plotlyjs()
    else:
        text = (TEMPLATES / name).read_text(encoding="utf-8")
    assert "</script" not in text and "<!--" not in text, f"{name} would end early"
    return text


def _csp_hash(script: str) -> str:
    """The name by which the page's policy lets this one script run."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


if __name__ == "__main__":
    cli.run(main)
