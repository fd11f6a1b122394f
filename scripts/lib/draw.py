"""A drawing of a graph of nodes, left to right, as SVG or PNG.

The same nodes and edges give the same bytes. A state is told by its colour, by the
border's line and by a mark, so that it can be read in black and white.
"""

from __future__ import annotations

import io
import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.lib.errors import UserError


@dataclass(frozen=True)
class Look:
    """How one state looks; `dark` is (fill, line) on a dark page."""

    fill: str
    line: str
    dark: tuple[str, str]
    border: Any = "solid"
    width: float = 1.2


LOOKS = {
    "current": Look("#e1effb", "#0b5fa5", ("#14324b", "#79bdf2")),
    "stale": Look("#fff0d4", "#a85a00", ("#45300f", "#f2b35c"), (0, (5, 2.5))),
    "running": Look("#d8f3e8", "#00705a", ("#0e3d31", "#4fd3a5"), width=2.4),
    "missing": Look("#f4f5f7", "#66707d", ("#262b32", "#9aa4b1"), (0, (1, 2))),
}
INK, SOFT_INK, EDGE = "#18212b", "#4a5562", "#8c97a4"

# Points. A line between distant layers passes the ones between on its own track.
MARGIN, GAP_X, GAP_Y, TRACK = 6.0, 28.0, 13.0, 12.0
PADDING, STAGE_SIZE, NAME_SIZE, NOTE_SIZE = 8.0, 9.0, 11.0, 9.0
LONGEST_TEXT = 26
SWEEPS = 24

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def draw(
    nodes: list[dict[str, str]], edges: list[tuple[str, str]], target: Path
) -> None:
    """Draw `nodes` and the `edges` between their ids into `target`, .svg or .png.

    A node is {"id": "stage/name", "state": a key of LOOKS, "note": short text}; with
    "link" it leads there in an SVG. Raises UserError where the suffix is another,
    ValueError where an edge or state is unknown or the edges form a circle.
    """
    if target.suffix not in {".svg", ".png"}:
        raise UserError(str(target), "not a drawing", "end it in .svg or .png")
    if unknown := {node["state"] for node in nodes} - LOOKS.keys():
        raise ValueError(f"states not known: {sorted(unknown)}")
    image = _paint(nodes, _place(nodes, edges), target.suffix[1:])
    if target.suffix == ".svg":
        image = _finish_svg(image, nodes)
    target.write_bytes(image)


@dataclass
class _Layout:
    """Where everything goes: layers of cells, a cell being a node or a track."""

    layers: list[list[int]]
    num_nodes: int
    down: dict[int, list[int]] = field(default_factory=dict)
    up: dict[int, list[int]] = field(default_factory=dict)
    y: dict[int, float] = field(default_factory=dict)
    left: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    box_height: float = 0.0

    def is_node(self, cell: int) -> bool:
        return cell < self.num_nodes

    def height(self, cell: int) -> float:
        return self.box_height if self.is_node(cell) else 0.0


def _place(nodes: list[dict[str, str]], edges: list[tuple[str, str]]) -> _Layout:
    layout = _layered(nodes, edges)
    _order(layout)
    has_note = any(node.get("note") for node in nodes)
    layout.box_height = 47.0 if has_note else 35.0
    _level(layout)
    x = MARGIN
    for layer in layout.layers:
        boxes = (nodes[cell] for cell in layer if layout.is_node(cell))
        width = max((_box_width(node) for node in boxes), default=40.0)
        layout.left.append(x)
        layout.widths.append(width)
        x += width + GAP_X
    return layout


def _layered(nodes: list[dict[str, str]], edges: list[tuple[str, str]]) -> _Layout:
    """Layers by longest path; long edges of one node share its track in between."""
    import networkx

    number = {node["id"]: index for index, node in enumerate(nodes)}
    if len(number) != len(nodes):
        raise ValueError("two nodes have the same id")
    graph: Any = networkx.DiGraph()
    graph.add_nodes_from(range(len(nodes)))
    for parent, child in dict.fromkeys(edges):
        if parent not in number or child not in number:
            raise ValueError(f"an edge between unknown nodes: {parent} -> {child}")
        graph.add_edge(number[parent], number[child])
    if not networkx.is_directed_acyclic_graph(graph):
        raise ValueError("the edges form a circle")
    depth = {
        cell: index
        for index, cells in enumerate(networkx.topological_generations(graph))
        for cell in cells
    }
    for cell in range(len(nodes)):  # a source stands right before its first reader
        if not graph.in_degree(cell) and graph.out_degree(cell):
            depth[cell] = min(depth[child] for child in graph.successors(cell)) - 1
    layers: list[list[int]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for cell in range(len(nodes)):
        layers[depth[cell]].append(cell)
    layout = _Layout(layers, len(nodes))
    tracks: dict[tuple[int, int], int] = {}
    for start in range(len(nodes)):
        for end in sorted(graph.successors(start)):
            before = start
            for index in range(depth[start] + 1, depth[end]):
                if (start, index) not in tracks:
                    track = tracks[start, index] = len(nodes) + len(tracks)
                    layers[index].append(track)
                    _connect(layout, before, track)
                before = tracks[start, index]
            _connect(layout, before, end)
    return layout


def _connect(layout: _Layout, parent: int, child: int) -> None:
    layout.down.setdefault(parent, []).append(child)
    layout.up.setdefault(child, []).append(parent)


def _order(layout: _Layout) -> None:
    """Order each layer so that few lines cross: barycentre sweeps, best one kept."""
    best, fewest = [list(layer) for layer in layout.layers], _crossings(layout)
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        indices = range(len(layout.layers))
        for index in indices if forward else reversed(indices):
            beside = index - 1 if forward else index + 1
            if not 0 <= beside < len(layout.layers):
                continue
            place = {cell: at for at, cell in enumerate(layout.layers[beside])}
            links = layout.up if forward else layout.down
            here = {cell: at for at, cell in enumerate(layout.layers[index])}
            scale = max(len(place), 1) / max(len(here), 1)

            def centre(cell: int) -> float:
                at = [place[other] for other in links.get(cell, ())]  # noqa: B023
                return sum(at) / len(at) if at else here[cell] * scale  # noqa: B023

            layout.layers[index].sort(key=centre)
        _swap(layout)
        count = _crossings(layout)
        if count < fewest:
            best, fewest = [list(layer) for layer in layout.layers], count
    layout.layers = best


def _swap(layout: _Layout) -> None:
    """Swap neighbours in a layer where that alone removes crossings."""
    place = {c: at for layer in layout.layers for at, c in enumerate(layer)}
    for layer in layout.layers:
        for at in range(len(layer) - 1):
            upper, lower = layer[at], layer[at + 1]
            gain = 0
            for links in (layout.up, layout.down):
                for one in links.get(upper, ()):
                    for other in links.get(lower, ()):
                        gain += (place[one] > place[other]) - (
                            place[one] < place[other]
                        )
            if gain > 0:
                layer[at], layer[at + 1] = lower, upper
                place[upper], place[lower] = at + 1, at


def _crossings(layout: _Layout) -> int:
    place = {c: at for layer in layout.layers for at, c in enumerate(layer)}
    count = 0
    for layer in layout.layers:
        lines = [(place[c], place[d]) for c in layer for d in layout.down.get(c, ())]
        for at, (start, end) in enumerate(lines):
            count += sum((start - s) * (end - e) < 0 for s, e in lines[at + 1 :])
    return count


def _level(layout: _Layout) -> None:
    """Give each cell a height near its neighbours', keeping order and distance."""
    for layer in layout.layers:
        for cell, at in zip(layer, _distances(layout, layer), strict=True):
            layout.y[cell] = at
    for sweep in range(SWEEPS):
        layers = layout.layers if sweep % 2 == 0 else layout.layers[::-1]
        for layer in layers:
            wish, weight = [], []
            for cell in layer:
                beside = [*layout.up.get(cell, ()), *layout.down.get(cell, ())]
                around = [layout.y[other] for other in beside] or [layout.y[cell]]
                wish.append(sum(around) / len(around))
                weight.append(1.0 if layout.is_node(cell) else 2.0)
            apart = _distances(layout, layer)
            for cell, y in zip(layer, _spread(wish, weight, apart), strict=True):
                layout.y[cell] = y
    top = min((y - layout.height(c) / 2 for c, y in layout.y.items()), default=0.0)
    layout.y = {cell: y - top + MARGIN for cell, y in layout.y.items()}


def _distances(layout: _Layout, layer: list[int]) -> list[float]:
    """The smallest distance of each cell in a layer from its first one."""
    result = [0.0][: len(layer)]
    for above, below in itertools.pairwise(layer):
        both = layout.is_node(above) and layout.is_node(below)
        space = GAP_Y if both else TRACK
        result.append(
            result[-1] + (layout.height(above) + layout.height(below)) / 2 + space
        )
    return result


def _spread(wish: list[float], weight: list[float], apart: list[float]) -> list[float]:
    """The places nearest to `wish` (least squares) that are `apart` at least."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for at, (want, heavy) in enumerate(zip(wish, weight, strict=True)):
        pools.append((want - apart[at], heavy, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = pools[-2:]
            pools[-2:] = [((m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    means = [mean for mean, _, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, apart, strict=True)]


def _clean(text: str) -> str:
    """`text` on one short line, without what XML cannot hold."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _texts(node: dict[str, str]) -> tuple[str, str, str]:
    stage, slash, name = node["id"].partition("/")
    stage, name = (stage, name) if slash else ("", stage)
    return _clean(stage), _clean(name), _clean(node.get("note", ""))


def _box_width(node: dict[str, str]) -> float:
    stage, name, note = _texts(node)
    mark = 1.8 * STAGE_SIZE
    widest = max(
        0.6 * STAGE_SIZE * len(stage) + mark,
        0.68 * NAME_SIZE * len(name),
        0.6 * NOTE_SIZE * len(note),
    )
    return max(58.0, widest + 2 * PADDING)


def _paint(nodes: list[dict[str, str]], layout: _Layout, suffix: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Line

    states = [s for s in LOOKS if any(node["state"] == s for node in nodes)]
    legend = [MARGIN]
    for state in states:
        legend.append(legend[-1] + 34 + 0.6 * NOTE_SIZE * len(state))
    right = (layout.left[-1] + layout.widths[-1]) if layout.left else 120.0
    width = max(right, legend[-1]) + MARGIN
    below = (y + layout.height(c) / 2 for c, y in layout.y.items())
    floor = max(below, default=MARGIN)
    height = floor + MARGIN + 26

    settings: Any = {
        "svg.hashsalt": "lineage",
        "svg.fonttype": "none",
        "path.simplify": 0,
    }
    with matplotlib.rc_context({**settings, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.set_gid("lineage")
        figure.patch.set_visible(suffix == "png")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")

        def text(x: float, y: float, words: str, size: float, **look: Any) -> None:
            axes.text(x, y, words, size=size, va="baseline", parse_math=False, **look)

        def mark(state: str, x: float, y: float, gid: str) -> None:
            look, turn = LOOKS[state], math.pi / 2
            sides = {"stale": 3, "running": 4}.get(state, 24)
            angles = [turn + 2 * math.pi * side / sides for side in range(sides)]
            spots = [(x + 3.6 * math.cos(a), y - 3.6 * math.sin(a)) for a in angles]
            fill = "none" if state == "missing" else look.line
            axes.add_patch(Polygon(spots, fc=fill, ec=look.line, lw=1.1, gid=gid))

        for number, points in enumerate(_lines(layout)):
            codes = [Line.MOVETO, *[Line.CURVE4] * 3]
            if len(points) == 2:
                codes = [Line.MOVETO, Line.LINETO]
            line = PathPatch(Line(points, codes), fc="none", ec=EDGE, lw=1.1)
            line.set_gid(f"line-{number}")
            axes.add_patch(line)

        for index, layer in enumerate(layout.layers):
            for cell in filter(layout.is_node, layer):
                node, look = nodes[cell], LOOKS[nodes[cell]["state"]]
                x, wide = layout.left[index], layout.widths[index]
                y = layout.y[cell] - layout.box_height / 2
                if cell in layout.up:
                    middle = layout.y[cell]
                    tip = [(x, middle), (x - 6, middle - 3), (x - 6, middle + 3)]
                    axes.add_patch(Polygon(tip, fc=EDGE, ec="none", gid=f"tip-{cell}"))
                box = FancyBboxPatch((x, y), wide, layout.box_height)
                box.set_boxstyle("round", pad=0, rounding_size=6)
                box.set(fc=look.fill, ec=look.line, lw=look.width, ls=look.border)
                box.set_gid(f"box-{cell}")
                axes.add_patch(box)
                mark(node["state"], x + wide - 10, y + 11, f"mark-{cell}")
                stage, name, note = _texts(node)
                at = x + PADDING
                text(at, y + 14, stage, STAGE_SIZE, color=SOFT_INK, gid=f"stage-{cell}")
                heavy = {"color": INK, "weight": "bold", "gid": f"name-{cell}"}
                text(at, y + 28, name, NAME_SIZE, **heavy)
                if note:
                    text(
                        at, y + 40, note, NOTE_SIZE, color=SOFT_INK, gid=f"note-{cell}"
                    )

        for state, x in zip(states, legend, strict=False):
            mark(state, x + 4, height - MARGIN - 4, f"key-mark-{state}")
            soft = {"color": SOFT_INK, "gid": f"key-{state}"}
            text(x + 13, height - MARGIN - 1, state, NOTE_SIZE, **soft)

        image = io.BytesIO()
        undated = {"Date": None, "Creator": None} if suffix == "svg" else {}
        dots = 72 if suffix == "svg" else 160
        figure.savefig(
            image, format=suffix, dpi=dots, metadata=undated or {"Software": None}
        )
    return image.getvalue()


def _lines(layout: _Layout) -> Iterator[list[tuple[float, float]]]:
    """Points of each line: two for a straight one, four for a curve."""
    for index, layer in enumerate(layout.layers):
        start = layout.left[index] + layout.widths[index]
        for cell in layer:
            y = layout.y[cell]
            if not layout.is_node(cell):
                yield [(layout.left[index], y), (start, y)]
            for child in layout.down.get(cell, ()):
                end, to = layout.left[index + 1], layout.y[child]
                end -= 4 if layout.is_node(child) else 0
                middle = (start + end) / 2
                yield [(start, y), (middle, y), (middle, to), (end, to)]


def _finish_svg(image: bytes, nodes: list[dict[str, str]]) -> bytes:
    """Group what belongs to a node, link it, and let the drawing turn dark."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(image)  # noqa: S314 - it is matplotlib's
    for tag in ("metadata", "defs"):
        for part in root.findall(f"{{{SVG}}}{tag}"):
            root.remove(part)
    root.set("id", "lineage")
    root.set("role", "group")
    root.set("aria-label", "Graph of nodes")
    style = ElementTree.Element(f"{{{SVG}}}style")
    style.text = _stylesheet()
    root.insert(0, style)
    (axes,) = root.iterfind(f".//{{{SVG}}}g[@id='axes_1']")
    groups: dict[int, ElementTree.Element] = {}
    for part in list(axes):
        kind, _, index = part.get("id", "").rpartition("-")
        del part.attrib["id"]
        part.set("class", "ln-" + kind)
        if kind == "key-mark":
            part.set("class", f"ln-mark ln-{index}")
        elif kind in {"box", "mark", "stage", "name", "note"}:
            node = nodes[int(index)]
            if int(index) not in groups:
                groups[int(index)] = _group(node)
                axes.append(groups[int(index)])
            axes.remove(part)
            groups[int(index)].append(part)
    for named in root.iterfind(f".//{{{SVG}}}g[@id]"):
        del named.attrib["id"]  # they would clash with the ids of a page around it
    written: bytes = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return written + b"\n"


def _group(node: dict[str, str]) -> ElementTree.Element:
    link = "".join(filter(str.isprintable, node.get("link", "")))
    group = ElementTree.Element(f"{{{SVG}}}{'a' if link else 'g'}")
    group.set("class", f"ln-node ln-{node['state']}")
    title = ElementTree.SubElement(group, f"{{{SVG}}}title")
    words = f"{node['id']}: {node['state']}"
    words += f", {node['note']}" if node.get("note") else ""
    title.text = "".join(c if c.isprintable() else " " for c in words)
    if link:
        group.set(f"{{{XLINK}}}href", link)
        group.set("aria-label", title.text)
    return group


def _stylesheet() -> str:
    text = ",".join(f"#lineage .ln-{part} text" for part in ("stage", "name", "note"))
    dark = {
        f"{text},#lineage .ln-key text": "fill:#e9edf2",
        "#lineage .ln-line path": "stroke:#77838f",
        "#lineage .ln-tip path": "fill:#77838f",
    }
    for state, look in LOOKS.items():
        fill, line = look.dark
        dot = "none" if state == "missing" else line
        dark[f"#lineage .ln-{state} .ln-box path"] = f"fill:{fill};stroke:{line}"
        for mark in (f".ln-{state} .ln-mark path", f".ln-mark.ln-{state} path"):
            dark[f"#lineage {mark}"] = f"fill:{dot};stroke:{line}"
    light = {
        "#lineage text": "font-family:system-ui,'DejaVu Sans',sans-serif",
        "#lineage a:hover .ln-box path,#lineage a:focus .ln-box path": "stroke-width:3",
    }
    return (
        _rules(light)
        + f"@media screen and (prefers-color-scheme:dark){{{_rules(dark)}}}"
    )


def _rules(rules: dict[str, str]) -> str:
    """A style sheet's text; its rules win over the styles matplotlib writes inline."""
    return "".join(
        f"{which}{{{look.replace(';', '!important;')}!important}}"
        for which, look in rules.items()
    )
