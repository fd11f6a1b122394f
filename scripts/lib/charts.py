"""The charts of a report, as plotly's JSON: scores, and curves of one node or several.

Lines are told apart by their colour and, without it, by their dashes. The colours can
be read on white and on a dark page alike.
"""

from __future__ import annotations

import html
from itertools import cycle
from typing import Any

from scripts.lib.results import Node, Table, number, percent, significant

QUANTITIES = {
    "reward": ("Reward", "share of right answers"),
    "validation_reward": ("Held-out reward", "share of right answers"),
    "loss": ("Loss", "nats a token"),
    "validation_loss": ("Held-out loss", "nats a token"),
    "token_accuracy": ("Accuracy", "share of tokens"),
    "accuracy": ("Accuracy", "share of pairs told apart"),
}
MIXED = "mean of the completions"
PAIRS = ("dpo", "rm")
COLOURS = ("#1f77d0", "#d1495b", "#2a9461", "#b36a00", "#9058d8", "#7a7f87")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
THIN = "#8a929c"
MANY = 8
"""More lines than these, and all but the best are thin and without a name."""
BEST = 5
LONGEST_LABEL = 28
Points = list[tuple[float, float]]
Chart = dict[str, Any]


def plot_text(text: str, longest: int = 1 << 12) -> str:
    """`text` for plotly, which reads some HTML in its labels."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return html.escape(short, quote=False)


def score_chart(table: Table) -> Chart:
    """A dot with its interval for each model, and the sentence that says it."""
    scores = [score for _, score, _ in table.ranking]
    said = "; ".join(
        f"{s.node} {percent(s.score)} ({percent(s.low)} to {percent(s.high)})"
        for s in scores
    )
    data = {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * s.score for s in scores],
        "y": list(range(len(scores))),
        "text": [plot_text(s.node) for s in scores],
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
        "height": 70 + (42 if len(scores) <= MANY else 24) * len(scores),
        "xaxis": {"range": [-2, 102], "ticksuffix": "%", "title": {"text": ""}},
        "yaxis": {
            "tickvals": list(range(len(scores))),
            "ticktext": [plot_text(s.node, LONGEST_LABEL) for s in scores],
            "range": [len(scores) - 0.5, -0.5],
            "automargin": True,
        },
    }
    label = f"Scores on {table.task}: {said}"
    return {
        "table": table,
        "plots": [{"data": [data], "layout": layout}],
        "label": label,
    }


def curves(nodes: list[Node]) -> list[Chart]:
    """A chart of each quantity of a stage, with all its nodes that have it.

    A loss is left out where a reward is what is learned from.
    """
    result = []
    for stage in dict.fromkeys(node.stage for node in nodes):
        peers = [node for node in nodes if node.stage == stage and node.metrics]
        given = {f"reward_{name}" for node in peers for name in environments(node)}
        alone = len([n for n in peers if points(n, "reward")]) == 1
        shared = {} if alone else {key: QUANTITIES["reward"] for key in sorted(given)}
        rewarded = any(points(node, "reward") for node in peers)
        for key, (name, _) in {**QUANTITIES, **shared}.items():
            lines = [(node, points(node, key)) for node in peers]
            lines = [(node, line) for node, line in lines if line]
            if not lines or (key == "loss" and rewarded):
                continue
            if key in shared:
                name = f"Reward of {key.removeprefix('reward_')}"
            chart = one_curve if len(lines) == 1 else overlaid
            result.append(
                {"stage": stage, "key": key, "name": name, **chart(key, name, lines)}
            )
    return result


def environments(node: Node) -> list[str]:
    """Those that reward a node, where they are several."""
    found = [*(node.recipe.get("environment") or {})]
    return found if len(found) > 1 else []


def points(node: Node, key: str) -> Points:
    """What the metrics say of a quantity by step.

    A resumed run may log a step twice; the later one is what was trained on.
    """
    found = {row.get("step"): number(row.get(key)) for row in node.metrics}
    return sorted(
        (step, value)
        for step, value in found.items()
        if number(step) is not None and step is not None and value is not None
    )


def best_of(key: str, line: Points) -> tuple[float, float]:
    """The point with the lowest loss, or the highest of anything else."""
    return (min if "loss" in key else max)(line, key=lambda point: point[1])


def unit_of(key: str, node: Node) -> str:
    """What a quantity of this node is counted in."""
    if "loss" in key and node.stage in PAIRS:
        return "nats a pair"
    others = [*(node.recipe.get("environment") or ["math"])] != ["math"]
    if "reward" in key and (others or node.recipe.get("algorithm") == "dapo"):
        return MIXED
    return QUANTITIES.get(key, QUANTITIES["reward"])[1]


def trace(x: Any, y: Any, name: str = "", **line: Any) -> Chart:
    """One line of a chart."""
    return {
        "type": "scatter",
        "mode": "lines" if len(x) > 1 else "markers",
        "x": x,
        "y": y,
        "name": plot_text(name, LONGEST_LABEL),
        "line": {"color": COLOURS[0], "width": 2, **line},
        "hovertemplate": f"{plot_text(name)} %{{x}}: %{{y:.4g}}<extra></extra>",
    }


def layout(unit: str, x: str = "step", names: int = 0) -> Chart:
    """Axes, and a legend above them where there are names."""
    found: Chart = {
        "height": 260,
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": unit}, "automargin": True},
    }
    if names:
        above = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
        found |= {"height": 290 + 11 * names, "showlegend": True, "legend": above}
        found |= {"margin": {"l": 56, "r": 16, "t": 16, "b": 44}}
    return found


def one_curve(key: str, name: str, lines: list[tuple[Node, Points]]) -> Chart:
    """The chart of a quantity that one node of the stage has."""
    ((node, line),) = lines
    unit = unit_of(key, node)
    steps, values = zip(*line, strict=True)
    best = best_of(key, line)
    said = (
        f"{significant(values[0])} at step {steps[0]}, "
        f"{significant(values[-1])} at {steps[-1]}, "
        f"best {significant(best[1])} at {best[0]}"
    )
    held = number(node.metrics[-1].get("validation_accuracy"))
    if held is not None and key == "loss":
        said += f"; {percent(held)} of the pairs held back told apart"
    rewards = shares(node) if key == "reward" else []
    traces = [trace(steps, values, "step")]
    if len(rewards) > 1:
        traces = [trace(steps, values, "sum, weighted")]
        traces += [
            trace(r["steps"], r["values"], r["name"], color=colour, dash=dash)
            for r, colour, dash in zip(
                rewards, cycle(COLOURS[1:]), cycle(DASHES[1:]), strict=False
            )
        ]
    names = len(traces) if len(traces) > 1 else 0
    return {
        "nodes": [node],
        "unit": unit,
        "said": said,
        "label": f"{name} of {node.id}: {said}",
        "rewards": rewards,
        "plots": [{"data": traces, "layout": layout(unit, names=names)}],
    }


def overlaid(key: str, name: str, lines: list[tuple[Node, Points]]) -> Chart:
    """The chart of a quantity that several nodes of a stage have, and its table.

    Of many, the best at their ends have colours and names, and come first in the
    table.
    """
    units = {unit_of(key, node) for node, _ in lines}
    unit = units.pop() if len(units) == 1 else MIXED
    at_end = sorted(lines, key=lambda one: one[1][-1][1], reverse="loss" not in key)
    many = len(lines) > MANY
    named = at_end[:BEST] if many else lines
    styles = {
        node.id: {"color": colour, "dash": dash}
        for (node, _), colour, dash in zip(
            named, cycle(COLOURS), cycle(DASHES), strict=False
        )
    }
    thin = [node for node in lines if node[0].id not in styles]
    axes = {"step": {node.id: {s: s for s, _ in line} for node, line in lines}}
    tokens = {node.id: dict(points(node, "tokens")) for node, _ in lines}
    if same_rate(lines, tokens) is False:
        axes["tokens"] = tokens
    plots = []
    for axis, places in axes.items():
        traces = []
        for node, line in [*thin, *named]:
            x = [places[node.id][step] for step, _ in line]
            style = styles.get(node.id, {"color": THIN, "width": 1})
            traces.append(trace(x, [value for _, value in line], node.id, **style))
            if node.id not in styles:
                traces[-1] |= {"showlegend": False, "opacity": 0.5}
        plots.append({"data": traces, "layout": layout(unit, axis, len(named))})
    rows = [
        {
            "node": node,
            "first": line[0],
            "last": line[-1],
            "best": best_of(key, line),
            "held": number(node.metrics[-1].get("validation_accuracy"))
            if key == "loss"
            else None,
        }
        for node, line in (at_end if many else lines)
    ]
    said = "; ".join(
        f"{node.id} {significant(line[-1][1])} at step {line[-1][0]}"
        for node, line in named
    )
    return {
        "nodes": [node for node, _ in lines],
        "unit": unit,
        "named": len(named) if many else 0,
        "label": f"{name} of {len(lines)} {lines[0][0].stage} nodes: {said}",
        "rows": rows,
        "rewards": [r for node, _ in lines for r in shares(node)]
        if key == "reward"
        else [],
        "plots": plots,
    }


def same_rate(
    lines: list[tuple[Node, Points]], tokens: dict[str, dict[float, float]]
) -> bool | None:
    """Whether all nodes see as many tokens a step; None where that is not known."""
    rates = set()
    for node, line in lines:
        if any(step not in tokens[node.id] for step, _ in line):
            return None
        step = line[-1][0]
        rates.add(tokens[node.id][step] / step if step else 0.0)
    return len(rates) == 1


def shares(node: Node) -> list[dict[str, Any]]:
    """What each environment of a node gave, before its weight, and its share at last.

    A share is of the weighted rewards' sum, each taken without its sign.
    """
    found = []
    for name in environments(node):
        settings = node.recipe["environment"][name] or {}
        if line := points(node, f"reward_{name}"):
            weight = number(settings.get("weight", 1.0)) or 0.0
            steps, values = zip(*line, strict=True)
            found.append(
                {
                    "node": node,
                    "name": name,
                    "weight": weight,
                    "steps": steps,
                    "values": values,
                    "part": weight * values[-1],
                }
            )
    total = sum(abs(reward["part"]) for reward in found)
    return [
        reward | {"share": percent(abs(reward["part"]) / total) if total else "none"}
        for reward in found
    ]
