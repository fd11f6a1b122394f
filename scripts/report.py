r"""Write the page about a graph of nodes: lineage, scores, curves, what differs, samples,
settings, costs and versions.

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
import json
import math
import re
from pathlib import Path
from typing import Any

from scripts.lib import cli, dapo
from scripts.lib.charts import Chart, curves, score_chart
from scripts.lib.draw import draw
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.ranking import ranked
from scripts.lib.results import (
    Node,
    Score,
    Table,
    count,
    duration,
    number,
    percent,
    read_artifact,
    read_graph,
    score_tables,
    significant,
)
from scripts.lib.schema import ReportRecipe
from scripts.lib.settings import differing, flat, shown

TEMPLATES = Path(__file__).parent / "templates"
TRAINED = ("pretrain", "sft", "dpo", "rm", "grpo")
LONGEST_SAMPLE = 4000
MAIN = ("reward", "loss")
"""Quantities that say how far training came."""
MOST_MODELS = 12
"""Columns of samples, at most."""


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


# --- what is shown -----------------------------------------------------------


def draw_lineage(nodes: list[Node], target: Path) -> None:
    """Draw the graph of `nodes`, each linked to its section."""
    drawn = [
        {
            "id": node.id,
            "state": "current" if node.is_here else "missing",
            "note": duration(node.seconds) if node.is_here else "not here",
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
        "duration": duration,
        "percent": percent,
        "significant": significant,
        "count": count,
        "setting": _setting,
    }
    tables = score_tables(nodes)
    charts = [score_chart(table) for table in tables]
    drawn = curves(nodes)
    plots = []
    for chart in [*charts, *drawn]:
        chart["ids"] = range(len(plots), len(plots) + len(chart["plots"]))
        plots += chart["plots"]
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
        curves=drawn,
        trained=[n for n in nodes if n.stage in TRAINED],
        comparisons=comparisons(nodes, tables, drawn),
        samples=sample_tables(nodes, tables),
        settings={node.id: list(flat(_whole(node))) for node in nodes},
        costs=costs(nodes),
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


def comparisons(
    nodes: list[Node], tables: list[Table], curves: list[Chart]
) -> list[dict[str, Any]]:
    """Of each stage with several nodes that train: what differs, and what came of it."""
    result = []
    for stage in dict.fromkeys(node.stage for node in nodes):
        peers = [node for node in nodes if node.stage == stage]
        trains = stage in TRAINED or any(node.metrics for node in peers)
        if len(peers) < 2 or not trains:
            continue
        shared = set.intersection(*(set(node.parents) for node in peers))
        made_from = {n.id: [p for p in n.parents if p not in shared] for n in peers}
        settings = []
        for key, values in differing(*(node.recipe for node in peers)):
            texts = [_setting(value) for value in values]
            ((usual, times),) = collections.Counter(texts).most_common(1)
            marks = 2 * times >= len(texts)
            cells = [{"text": t, "other": marks and t != usual} for t in texts]
            settings.append({"key": key, "cells": cells})
        scored = [(t, [_score_of(n, t, nodes) for n in peers]) for t in tables]
        main = [c for c in curves if c["stage"] == stage and c["key"] in MAIN]
        last = {
            row["node"].id: row["last"][1] for c in main for row in c.get("rows", [])
        }
        result.append(
            {
                "stage": stage,
                "nodes": peers,
                "from": made_from if any(made_from.values()) else {},
                "settings": settings,
                "scores": [(table, found) for table, found in scored if any(found)],
                "last": last,
                "quantity": main[0]["name"] if main else "",
            }
        )
    return result


def _score_of(node: Node, table: Table, nodes: list[Node]) -> Score | None:
    """The score of a node, or else of an export of it."""
    exports = [n.id for n in nodes if n.stage == "export" and node.id in n.parents]
    scores = {score.node: score for score in table.scores}
    return next((scores[id] for id in (node.id, *exports) if id in scores), None)


def sample_tables(nodes: list[Node], tables: list[Table]) -> list[dict[str, Any]]:
    """Answers by task: a row a prompt, a column a model, those of a table together.

    Of many models, the best ones.
    """
    order = {node.id: at for at, node in enumerate(nodes)}
    of = {(id, table.task): table for table in tables for id in table.evals}
    groups: dict[Any, dict[str, Any]] = {}
    for node in nodes:
        asked: collections.Counter[tuple[str, ...]] = collections.Counter()
        for place, row in enumerate(node.samples, 1):
            if missing := {"model", "task", "input", "answer"} - row.keys():
                where = f"{node.folder}/scores/samples.jsonl:{place}"
                raise DataError(where, f"lacks {', '.join(sorted(missing))}")
            model, task = str(row["model"]), str(row["task"])
            given, expected = map(_sample_text, (row["input"], row.get("expected", "")))
            asked[model, task, given, expected] += 1  # a prompt may be asked twice
            prompt = given, expected, asked[model, task, given, expected]
            table = of.get((node.id, task), Table([node.id], task, 0.0, [], [node.id]))
            group = groups.setdefault(
                (table.evals[0], task), {"table": table, "prompts": {}}
            )
            right = row.get("right")
            group["prompts"].setdefault(prompt, {}).setdefault(
                model,
                {
                    "text": _sample_text(row["answer"]),
                    "right": None if right is None else bool(right),
                },
            )
    result = []
    for group in groups.values():
        models = {model for answers in group["prompts"].values() for model in answers}
        best = [s.node for _, s, _ in group["table"].ranking if s.node in models]
        best += sorted(models - {*best})
        result.append(
            {
                "table": group["table"],
                "models": sorted(
                    best[:MOST_MODELS], key=lambda m: (order.get(m, 1 << 30), m)
                ),
                "num_models": len(models),
                "rows": [
                    {"input": given, "expected": expected, "answers": answers}
                    for (given, expected, _), answers in group["prompts"].items()
                ],
            }
        )
    return result


def costs(nodes: list[Node]) -> dict[str, Any]:
    """What each node took and made, the sums, and each bar's length in percent."""
    rows = []
    for node in nodes:
        if node.seconds is None:
            continue
        made, last = node.provenance or {}, (node.metrics or [{}])[-1]
        tokens = number(last.get("tokens"))
        rows.append(
            {
                "node": node,
                "resumed": bool(made.get("resumed")) and node.stage in TRAINED,
                "seconds": node.seconds,
                "cpu_hours": number(made.get("cpu_hours")),
                "gpu_hours": number(made.get("gpu_hours")),
                "steps": number(last.get("step")),
                "tokens": tokens,
                "rate": tokens / node.seconds if tokens and node.seconds else None,
            }
        )
    sums = {
        key: sum(row[key] or 0.0 for row in rows)
        for key in ("seconds", "cpu_hours", "gpu_hours", "steps", "tokens", "rate")
    }
    longest = max((row["seconds"] for row in rows), default=0.0) or 1.0
    bars = [round(100 * row["seconds"] / longest, 2) for row in rows]
    of = {row["node"].id: row for row in rows}
    return {"rows": rows, "of": of, "bars": bars, "sums": sums}


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


def _setting(value: object) -> str:
    if value == {}:
        return "nothing set"
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return shown(value)


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


def _sample_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_SAMPLE:
        rest = len(text) - LONGEST_SAMPLE
        text = f"{text[:LONGEST_SAMPLE]}… ({rest} more characters)"
    return text


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
