"""The drawing of a graph of nodes."""

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scripts.lib import draw as module
from scripts.lib.draw import LOOKS, draw
from scripts.lib.errors import UserError

EDGES = [
    ("generate/chat", "pack/chat"),
    ("pretrain/base", "sft/instruct"),
    ("pack/chat", "sft/instruct"),
    ("sft/instruct", "grpo/reasoner"),
    ("pretrain/base", "eval/sums"),
    ("grpo/reasoner", "eval/sums"),
]


def nodes_of(edges, state="current", **extra):
    ids = dict.fromkeys(id for edge in edges for id in edge)
    return [{"id": id, "state": state, "note": "", **extra} for id in ids]


def big_graph(num_chains=12):
    """60 nodes: one source and one sink, and chains of five between, less two."""
    edges = []
    for at in range(num_chains):
        chain = [f"sft/c{at}_{link}" for link in range(5)][: 5 if at else 3]
        edges += zip(["pretrain/base", *chain], [*chain, "eval/all"], strict=True)
    return edges


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_graph_gives_same_bytes_in_any_process(tmp_path, suffix):
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_draw import *\n"
        "draw(nodes_of(EDGES), EDGES, Path(sys.argv[1]))"
    )
    pictures = []
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.{suffix}"
        subprocess.run(
            [sys.executable, "-c", code, str(target)],
            check=True,
            env={"PYTHONHASHSEED": seed, "HOME": str(tmp_path), "PATH": ""},
            cwd=Path(__file__).parents[2],
        )
        pictures.append(target.read_bytes())
    assert pictures[0] == pictures[1]


def test_no_box_covers_another_in_a_graph_of_60():
    edges = big_graph()
    nodes = nodes_of(edges)
    assert len(nodes) == 60
    layout = module._place(nodes, edges)
    for layer in layout.layers:
        for above, below in itertools.pairwise(layer):
            space = (layout.height(above) + layout.height(below)) / 2
            assert layout.y[below] - layout.y[above] >= space
    ends = [x + w for x, w in zip(layout.left, layout.widths, strict=True)]
    assert all(end < left for end, left in zip(ends, layout.left[1:], strict=False))


def test_edges_lead_rightward_only():
    nodes = nodes_of(EDGES)
    layout = module._place(nodes, EDGES)
    column = {nodes[c]["id"]: i for i, la in enumerate(layout.layers) for c in la
              if layout.is_node(c)}  # fmt: skip
    assert all(column[parent] < column[child] for parent, child in EDGES)


def test_lines_that_can_do_without_crossing_do_not_cross():
    edges = [(f"a/n{i}", f"b/n{4 - i}") for i in range(5)]
    edges += [(f"b/n{i}", f"c/n{(i * 2) % 5}") for i in range(5)]
    assert module._crossings(module._place(nodes_of(edges), edges)) == 0


def test_a_state_shows_without_colour(tmp_path):
    """Every two states differ in the border's line or width."""
    borders = {(str(look.border), look.width) for look in LOOKS.values()}
    assert len(borders) == len(LOOKS)
    nodes = [{"id": f"sft/{state}", "state": state, "note": ""} for state in LOOKS]
    draw(nodes, [], tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    marks = set()
    for group in root.iterfind(".//*[@class]"):
        if "ln-node" in group.get("class"):
            (mark,) = group.iterfind("*[@class='ln-mark']/*")
            corners = mark.get("d").count("L")
            marks.add((corners, "fill: none" in mark.get("style")))
    assert len(marks) == len(LOOKS)


def test_legend_names_the_states_that_are_there(tmp_path):
    draw(nodes_of(EDGES, "stale"), EDGES, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert ">stale</text>" in text and ">running</text>" not in text


def test_text_of_a_node_is_inert(tmp_path):
    evil = "</text></svg><script>alert(1)</script>&$x$\x00\x1b"
    node = {"id": f"sft/{evil}", "state": "current", "note": evil, "link": f"#{evil}"}
    draw([node], [], tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()  # well formed
    assert not list(root.iterfind(".//{*}script"))
    assert "<script" not in (tmp_path / "a.svg").read_text()


def test_a_linked_node_is_one_link_with_a_name(tmp_path):
    nodes = nodes_of(EDGES, link="#here")
    draw(nodes, EDGES, tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    names = [link.get("aria-label") for link in root.iterfind(".//{*}a")]
    assert sorted(names) == sorted(f"{node['id']}: current" for node in nodes)


def test_svg_brings_no_ids_that_could_clash_with_a_page(tmp_path):
    draw(nodes_of(EDGES), EDGES, tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert [e.get("id") for e in root.iter() if e.get("id")] == ["lineage"]


def test_an_empty_graph_can_be_drawn(tmp_path):
    draw([], [], tmp_path / "a.svg")
    draw([], [], tmp_path / "a.png")


def test_drawing_another_format_names_the_two_there_are(tmp_path):
    with pytest.raises(UserError, match=r"\.svg or \.png"):
        draw([], [], tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("edges", "message"),
    [([("a/x", "b/x"), ("b/x", "a/x")], "circle"), ([("a/x", "z/z")], "unknown")],
)
def test_edges_that_make_no_sense_are_refused(tmp_path, edges, message):
    nodes = [{"id": id, "state": "current", "note": ""} for id in ("a/x", "b/x")]
    with pytest.raises(ValueError, match=message):
        draw(nodes, edges, tmp_path / "a.svg")


def test_drawing_is_imported_without_matplotlib():
    code = "import scripts.lib.draw, sys; assert 'matplotlib' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
