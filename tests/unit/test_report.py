"""The report page, from real files; what a browser makes of it is tested apart."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import report
from scripts.lib.errors import DataError, RecipeError

EVIL = (
    "<b>b</b></script></style></title><script>hack()</script><img src=x onerror=hack()>"
)


def provenance(id, **changes):
    return {
        "node": id,
        "inputs": {"artifacts/some/input": "md5:" + "0" * 32},
        "code": "c0de",
        "packages": {"torch": "2.9.0"},
        "git_commit": "ab12" * 10,
        "git_dirty": False,
        "host": "here",
        "machine": "Linux x86_64",
        "python": "3.11.9",
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:05:05+00:00",
        "seconds": 60.0,
        "gpu_hours": 0.0,
        "cpu_hours": 0.25,
        "resumed": False,
        **changes,
    }


class Build:
    """A small pipeline's artifacts in a folder, and the page made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: list[dict] = []
        self.flags: list[str] = []
        self.title = "How it went"

    def node(self, id, parents=(), here=True, recipe=None, **files) -> None:
        stage, _, name = id.partition("/")
        self.nodes.append(
            {
                "id": id,
                "stage": stage,
                "name": name,
                "parents": list(parents),
                "recipe": {"seed": 17} if recipe is None else recipe,
            }
        )
        folder = self.root / "artifacts" / f"n{len(self.nodes)}"
        folder.mkdir(parents=True)
        self.flags += ["--node", f"{id}={folder}"] if "=" not in id else []
        if here:
            text = json.dumps(provenance(id))
            (folder / "provenance.json").write_text(text)
        for path, content in files.items():
            target = folder / path.replace("__", "/").replace("_jsonl", ".jsonl")
            target = Path(str(target).replace("scores_json", "scores.json"))
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                text = "".join(json.dumps(row) + "\n" for row in content)
            else:
                text = content if isinstance(content, str) else json.dumps(content)
            target.write_text(text)

    def page(self, out="page") -> str:
        (self.root / "graph.json").write_text(json.dumps({"nodes": self.nodes}))
        recipe = self.root / "recipe.yaml"
        recipe.write_text(json.dumps({"title": self.title}))
        assert (
            report.main(
                [
                    *("--graph", str(self.root / "graph.json")),
                    *("--recipe", str(recipe)),
                    *("--out", str(self.root / out)),
                    *self.flags,
                ]
            )
            == 0
        )
        return (self.root / out / "report.html").read_text(encoding="utf-8")


def losses(num, key="loss"):
    return [{"step": 10 * i, key: 5 / i, "lr": 1e-3} for i in range(1, num + 1)]


def scored(task="sums", **models):
    return {
        "confidence": 0.95,
        "scores": [
            {
                "model": model.replace("__", "/"),
                "task": task,
                "score": right / 200,
                "interval": [max(0, right / 200 - 0.05), right / 200 + 0.05],
                "num_right": right,
                "num_items": 200,
                "items_digest": "0" * 64,
            }
            for model, right in models.items()
        ],
    }


def sample(model, given="1 + 1", answer="2", right=True):
    return {
        "model": model,
        "task": "sums",
        "input": given,
        "expected": "2",
        "answer": answer,
        "right": right,
    }


def small(root) -> Build:
    """A chain of four nodes with everything in it."""
    build = Build(root)
    build.node("pretrain/base", metrics_jsonl=losses(4), recipe={"steps": 400})
    build.node("sft/instruct", ["pretrain/base"], model__metrics_jsonl=losses(6))
    build.node("grpo/reasoner", ["sft/instruct"], metrics_jsonl=losses(3, "reward"))
    models = scored(pretrain__base=2, sft__instruct=130, grpo__reasoner=180)
    answers = [sample("pretrain/base", answer="7", right=False)]
    answers += [sample("sft/instruct"), sample("grpo/reasoner")]
    build.node(
        "eval/sums",
        ["pretrain/base", "sft/instruct", "grpo/reasoner"],
        scores__scores_json=models,
        scores__samples_jsonl=answers,
    )
    return build


@pytest.fixture
def build(tmp_path) -> Build:
    return small(tmp_path)


class Reader(HTMLParser):
    """What a browser would run, load or show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self.inside = tag

    def handle_endtag(self, tag) -> None:
        self.inside = ""
        self.text += " " if tag in {"td", "th"} else ""

    def handle_data(self, data) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def plots(self) -> list[dict]:
        (at,) = (
            at
            for at, (_, attrs) in enumerate(t for t in self.tags if t[0] == "script")
            if attrs.get("id") == "plots"
        )
        return json.loads(self.scripts[at])


def test_summary_gives_final_score_interval_and_the_way_to_it(build):
    assert (
        "90.0% of sums right at grpo/reasoner (95% interval 85.0%–95.0%), "
        "after 1.0% at pretrain/base and 65.0% at sft/instruct."
    ) in Reader(build.page()).words


def test_summary_takes_the_best_of_several_ends(tmp_path):
    build = Build(tmp_path)
    build.node("pretrain/base")
    build.node("sft/one", ["pretrain/base"])
    build.node("sft/two", ["pretrain/base"])
    found = scored(pretrain__base=199, sft__one=150, sft__two=120)
    build.node("eval/sums", ["sft/one", "sft/two"], scores__scores_json=found)
    words = Reader(build.page()).words
    assert "75.0% of sums right at sft/one" in words
    assert "after 99.5% at pretrain/base." in words


def test_every_scored_model_is_in_plot_and_table(build):
    page = Reader(build.page())
    assert page.plots[0]["data"][0]["x"] == [90.0, 65.0, 1.0]
    for row in (
        "1 grpo/reasoner 90.0% 85.0–95.0% 180/200",
        "2 sft/instruct 65.0% 60.0–70.0% 130/200",
        "3 pretrain/base 1.0% 0.0–6.0% 2/200",
    ):
        assert row in page.words


def test_curves_come_from_either_place_of_metrics(build):
    _, base, instruct, reasoner = Reader(build.page()).plots
    assert base["data"][0]["y"] == [5.0, 2.5, 5 / 3, 1.25]
    assert len(instruct["data"][0]["x"]) == 6
    assert reasoner["layout"]["yaxis"]["title"]["text"] == "share of right answers"


def test_nodes_of_a_stage_are_lines_of_one_chart_told_apart_twice(build):
    build.node("sft/other", ["pretrain/base"], metrics_jsonl=losses(3))
    page = Reader(build.page())
    (overlay,) = (plot for plot in page.plots if len(plot["data"]) > 1)
    assert [line["name"] for line in overlay["data"]] == ["sft/instruct", "sft/other"]
    assert overlay["layout"]["showlegend"]
    for way in ("color", "dash"):
        assert len({line["line"][way] for line in overlay["data"]}) == 2
    assert "sft/other 5 at 10 1.667 at 30 1.667 at 30" in page.words


def test_of_many_lines_the_best_have_names_and_come_first(tmp_path):
    build = Build(tmp_path)
    for at in range(40):
        rows = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": (at * 7 % 40) / 40}]
        build.node(f"grpo/r{at}", metrics_jsonl=rows)
    page = Reader(build.page())
    (plot,) = page.plots
    named = [line for line in plot["data"] if line.get("showlegend", True)]
    assert [line["y"][-1] for line in named] == [x / 40 for x in (39, 38, 37, 36, 35)]
    assert len(plot["data"]) == 40 and plot["data"][-5:] == named, "the best on top"
    assert "the best 5 of 40 at the end" in page.words
    assert page.words.index("grpo/r17 0.1 at 1") < page.words.index("grpo/r0 0.1 at 1")


def test_held_out_loss_and_accuracy_have_charts_of_their_own(tmp_path):
    build = Build(tmp_path)
    rows = [{"step": 1, "loss": 3, "validation_loss": 4, "token_accuracy": 0.5}]
    build.node("sft/one", metrics_jsonl=rows)
    words = Reader(build.page()).words
    for said in ("Loss, nats a token: 3", "Held-out loss, nats a token: 4"):
        assert said in words
    assert "Accuracy, share of tokens: 0.5" in words


@pytest.mark.parametrize(("rates", "axes"), [((10, 20), 2), ((10, 10), 1)])
def test_tokens_are_an_axis_where_nodes_see_other_numbers_a_step(rates, axes, tmp_path):
    build = Build(tmp_path)
    for name, rate in zip("ab", rates, strict=True):
        rows = [{"step": s, "loss": 9 / s, "tokens": s * rate} for s in (1, 2)]
        build.node(f"pretrain/{name}", metrics_jsonl=rows)
    plots = Reader(build.page()).plots
    titles = [plot["layout"]["xaxis"]["title"]["text"] for plot in plots]
    assert titles == ["step", "tokens"][:axes]
    assert plots[-1]["data"][1]["x"] == ([20, 40] if axes == 2 else [1, 2])


def compared(page) -> list[list[str]]:
    """The cells of the first table of nodes side by side."""
    table = re.search(r'(?s)<table class="compared">.*?</table>', page)[0]
    rows = re.findall(r"(?s)<tr>.*?</tr>", table)
    cells = [re.findall(r"(?s)<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    text = [[re.sub("<(?!/?mark)[^>]*>", "", cell) for cell in row] for row in cells]
    return [[" ".join(cell.split()) for cell in row] for row in text]


def test_nodes_side_by_side_show_what_differs_their_scores_and_costs(tmp_path):
    build = Build(tmp_path)
    build.node("pretrain/base")
    for name, lr in (("a", 1e-5), ("b", 1e-5), ("c", 0.002)):
        recipe = {"lr": lr, "seed": 17} | ({"peft": {"rank": 8}} if name == "c" else {})
        build.node(f"sft/{name}", ["pretrain/base"], recipe=recipe)
    build.node("export/released", ["sft/c"])
    found = scored(sft__a=100, export__released=180)
    build.node("eval/sums", ["sft/a", "export/released"], scores__scores_json=found)
    assert compared(build.page()) == [
        ["Node", "sums", "lr", "peft.rank", "Time"],
        ["sft/a", "50.0% 45.0–55.0%", "1.0e-5", "unset", "1 min 00 s"],
        ["sft/b", "–", "1.0e-5", "unset", "1 min 00 s"],
        ["sft/c", "90.0% 85.0–95.0%", mark("0.002"), mark("8"), "1 min 00 s"],
    ]


def mark(cell):
    return f"<mark>{cell}</mark>"


def test_parents_that_differ_are_told_side_by_side(tmp_path):
    build = Build(tmp_path)
    build.node("pretrain/base")
    build.node("pretrain/other", recipe={"seed": 17})
    build.node("sft/a", ["pretrain/base"])
    build.node("sft/b", ["pretrain/other"])
    page = build.page()
    assert compared(page)[0] == ["Node", "Time"], "the same settings, twice"
    assert "pretrain: the same settings and parents" in Reader(page).words
    assert "sft/b pretrain/other 1 min 00 s" in Reader(page).words


def test_one_node_a_stage_has_nothing_beside_it(build):
    page = build.page()
    assert "Side by side" not in page and 'class="compared"' not in page


def test_evals_that_ask_the_same_are_one_table(tmp_path):
    build = Build(tmp_path)
    for name, right in (("a", 100), ("b", 120), ("c", 105)):
        build.node(f"sft/{name}")
        build.node(
            f"eval/of_{name}",
            [f"sft/{name}"],
            scores__scores_json=scored(**{f"sft__{name}": right}),
            scores__samples_jsonl=[sample(f"sft/{name}", answer=name)],
        )
    page = build.page()
    words = Reader(page).words
    assert page.count('class="plot"') == page.count('<table class="samples">') == 1
    assert "by eval/of_a, eval/of_b, eval/of_c" in words
    assert "1 sft/b 60.0% 55.0–65.0% 120/200 2 sft/c ≈ 52.5%" in words
    assert "3 sft/a ≈ 50.0%" in words, "its interval ends where the best one's begins"
    assert page.count('<span class="prompt">') == 1


def test_evals_that_ask_otherwise_stay_apart(tmp_path):
    build = Build(tmp_path)
    build.node("eval/a", scores__scores_json=scored(sft__a=1), recipe={"limit": 1})
    build.node("eval/b", scores__scores_json=scored(sft__b=1), recipe={"limit": 2})
    assert len(Reader(build.page()).plots) == 2


def test_of_many_models_the_best_ones_samples_are_shown(tmp_path):
    build = Build(tmp_path)
    ids = [f"sft/n{at}" for at in range(20)]
    found = scored(**{id.replace("/", "__"): at for at, id in enumerate(ids)})
    rows = [sample(id, answer=id) for id in ids]
    build.node("eval/e", scores__scores_json=found, scores__samples_jsonl=rows)
    page = build.page()
    shown = re.findall(r'class="answer">sft/n(\d+)<', page)
    assert sorted(map(int, shown)) == [*range(8, 20)]
    assert "the best 12 of 20 models" in Reader(page).words


def test_costs_say_hours_steps_tokens_and_what_was_resumed(tmp_path):
    build = Build(tmp_path)
    rows = [{"step": 5, "loss": 2, "tokens": 6000}]
    build.node("pretrain/base", metrics_jsonl=rows)
    made = provenance("pretrain/base", gpu_hours=2.5, resumed=True)
    (tmp_path / "artifacts/n1/provenance.json").write_text(json.dumps(made))
    build.node("export/released", ["pretrain/base"])
    words = Reader(build.page()).words
    assert "pretrain/base resumed 1 min 00 s 0.25 2.5 5 6,000 100" in words
    assert "export/released 1 min 00 s 0.25 0 – – –" in words
    assert "All 2 min 00 s 0.5 2.5 5 6,000" in words


def test_a_stage_nobody_heard_of_is_shown(tmp_path):
    build = Build(tmp_path)
    for name in "ab":
        rows = [{"step": s, "reward": 0.5, "new": [1]} for s in (1, 2)]
        build.node(f"rollouts/{name}", metrics_jsonl=rows, recipe={"k": name})
    page = Reader(build.page())
    assert len(page.plots[0]["data"]) == 2 and "rollouts" in page.words


def test_each_reward_and_its_share_is_shown(tmp_path):
    build = Build(tmp_path)
    rows = [
        {"step": 1, "reward": 0.1, "reward_math": 0.2, "reward_brief": -0.2},
        {"step": 2, "reward": 0.8, "reward_math": 0.6, "reward_brief": 0.4},
    ]
    environment = {"math": {"weight": 1.0}, "brief": {"weight": 0.5, "import": "a:B"}}
    build.node("grpo/reasoner", recipe={"environment": environment}, metrics_jsonl=rows)
    page = Reader(build.page())
    (plot,) = page.plots
    assert [(t["name"], t["y"]) for t in plot["data"]] == [
        ("sum, weighted", [0.1, 0.8]),
        ("math", [0.2, 0.6]),
        ("brief", [-0.2, 0.4]),
    ]
    assert "math 1 0.2 0.6 75.0%" in page.words
    assert "brief 0.5 -0.2 0.4 25.0%" in page.words


@pytest.mark.parametrize("engine", ["trl", "nemo-rl"])
def test_what_dapo_means_is_shown_as_its_engine_calls_it(engine, tmp_path):
    build = Build(tmp_path)
    recipe = {"algorithm": "dapo", "max_completion_tokens": 10}
    made = provenance("grpo/one", packages={engine: "1"})
    build.node("grpo/one", recipe=recipe, **{"provenance.json": made})
    words = Reader(build.page()).words
    assert ("trl.epsilon_high0.28" in words) == (engine == "trl")
    assert ("overrides.loss_fn.ratio_clip_max0.28" in words) == (engine != "trl")


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_pairs_held_back_are_told_of(stage, tmp_path):
    build = Build(tmp_path)
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.4}]
    rows[1]["validation_accuracy"] = 0.75
    build.node(f"{stage}/one", metrics_jsonl=rows)
    words = Reader(build.page()).words
    assert "Loss, nats a pair: 0.7 at step 1, 0.4 at 2" in words
    assert "75.0% of the pairs held back told apart" in words


def test_what_rollouts_kept_and_what_failed_is_told(tmp_path):
    build = Build(tmp_path)
    counts = {"samples": 24240, "kept": 2855, "reward": 0.66745049}
    counts["faults"] = {"mine": {"count": 2, "first": EVIL}}
    build.node("rollouts/solved", **{"data__rollouts.json": counts})
    page = build.page()
    words = Reader(page).words
    assert "samples24,240" in words and "kept2,855" in words
    assert "reward0.6675" in words and "faults.mine.count2" in words
    assert "<img" not in page


def test_a_step_logged_twice_is_drawn_once(tmp_path):
    build = Build(tmp_path)
    rows = [{"step": s, "loss": v} for s, v in ((1, 9), (2, 8), (2, 7), (3, 6))]
    build.node("pretrain/base", metrics_jsonl=rows)
    (plot,) = Reader(build.page()).plots
    assert plot["data"][0]["y"] == [9, 7, 6]


def test_a_loss_that_is_not_finite_leaves_a_page_that_parses(tmp_path):
    build = Build(tmp_path)
    lines = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3}\n'
    build.node("pretrain/base", metrics_jsonl=lines)
    (plot,) = Reader(build.page()).plots
    assert plot["data"][0]["y"] == [3]


def test_answers_to_one_prompt_stand_in_one_row(build):
    page = build.page()
    (row,) = re.findall(
        r'<tr><th scope="row"><span class="prompt">.*?</tr>', page, re.S
    )
    assert [row.count(mark) for mark in ("✓ right", "✗ wrong")] == [2, 1]


def test_a_prompt_asked_twice_has_two_rows(tmp_path):
    build = Build(tmp_path)
    rows = [sample(m, answer=a) for m in ("sft/a", "sft/b") for a in ("one", "two")]
    build.node("eval/e", scores__samples_jsonl=rows)
    found = re.findall(r'class="answer">(\w+)<', build.page())
    assert found == ["one", "one", "two", "two"]


def test_same_inputs_give_same_bytes(build):
    assert build.page("one") == build.page("two")


def test_the_page_loads_nothing_and_has_no_inline_handlers(build):
    page = Reader(build.page())
    for tag, attrs in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)


def test_policy_lets_only_the_pages_own_scripts_run(build):
    page = Reader(build.page())
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    assert "default-src 'none'" in policy
    allowed = re.search(r"script-src ([^;]*);", policy)[1].split()
    ran = [s for s, (_, attrs) in zip(
        page.scripts, (t for t in page.tags if t[0] == "script"), strict=True
    ) if "type" not in attrs]  # fmt: skip
    digests = [hashlib.sha256(script.encode()).digest() for script in ran]
    assert allowed == [f"'sha256-{base64.b64encode(d).decode()}'" for d in digests]


def test_every_link_leads_somewhere_on_the_page(build):
    tags = Reader(build.page()).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        for name in ("href", "xlink:href"):
            if attrs.get(name, "").startswith("#"):
                assert attrs[name][1:] in ids


def evil(root) -> Build:
    """Markup wherever somebody else's words may come in."""
    build = Build(root)
    build.title = EVIL
    id = f"sft/{EVIL.replace('=', '')}"
    build.node(id, recipe={EVIL: EVIL, "deep": {"er": [EVIL]}}, metrics_jsonl=losses(3))
    made = provenance(id, host=EVIL, packages={EVIL: EVIL}, git_commit=EVIL)
    made |= {"inputs": {EVIL: EVIL}, "started": EVIL, "python": EVIL}
    (root / "artifacts" / "n1" / "provenance.json").write_text(json.dumps(made))
    found = scored(task=EVIL, **{id: 100})
    rows = [{**sample(id, EVIL, EVIL), "task": EVIL, "expected": EVIL}]
    build.node("eval/e", [id], scores__scores_json=found, scores__samples_jsonl=rows)
    return build


def test_markup_in_titles_names_settings_and_samples_is_inert(tmp_path):
    page = evil(tmp_path).page()
    assert "<script>hack" not in page and "<img" not in page
    reader = Reader(page)
    assert len(reader.scripts) == 3  # plots, plotly, report.js: none by EVIL
    assert not any("hack()" in script for script in reader.scripts[1:])
    assert "</script" not in json.dumps(reader.scripts[0])
    assert len(reader.plots) == 2


def test_half_a_surrogate_pair_in_an_answer_does_not_stop_the_page(tmp_path):
    build = Build(tmp_path)
    rows = [sample("sft/a", answer="\ud83d half")]
    build.node("sft/a", metrics_jsonl=losses(2))
    build.node("eval/e", ["sft/a"], scores__samples_jsonl=rows)
    assert "? half" in build.page()


def test_a_node_that_is_not_pulled_says_not_here(build):
    build.node("export/nano", ["grpo/reasoner"], here=False)
    page = build.page()
    assert "4 of 5 nodes here" in Reader(page).words
    assert "export/nano: missing, not here" in page


def test_a_node_nobody_names_is_shown_as_not_here(build):
    build.node("export/nano", ["grpo/reasoner"])
    del build.flags[-2:]
    assert "export/nano: missing, not here" in build.page()


def test_the_page_does_not_list_itself(build):
    build.node("report/main", ["eval/sums"])
    del build.flags[-2:]
    assert "report/main" not in build.page()


def test_a_graph_without_evals_or_metrics_says_what_is_missing(tmp_path):
    build = Build(tmp_path)
    build.node("pretrain/base", here=False)
    page = build.page()
    words = Reader(page).words
    for line in (
        "No scores here: no eval node is built, or none is pulled.",
        "No metrics here of pretrain/base.",
        "No samples here.",
        "No costs here: they come with each artifact's provenance.",
        "No versions here: they come with each artifact's provenance.",
    ):
        assert line in words
    assert len(page) < 100_000, "plotly is not needed without plots"


def test_an_empty_graph_gives_a_page(tmp_path):
    assert "0 of 0 nodes here" in Reader(Build(tmp_path).page()).words


def test_times_add_up(build):
    assert "All 4 min 00 s" in Reader(build.page()).words


def test_a_version_that_differs_names_its_nodes(build):
    made = provenance("sft/instruct", packages={"torch": "2.8.0"})
    folder = build.root / "artifacts" / "n2"
    (folder / "provenance.json").write_text(json.dumps(made))
    words = Reader(build.page()).words
    assert "2.8.0 sft/instruct" in words


@pytest.mark.parametrize(
    ("path", "text", "where"),
    [
        ("scores/scores.json", '{"confidence": 0.9, "scores": [{}]}', r"scores\.json"),
        ("scores/scores.json", "[]", r"scores\.json"),
        ("scores/samples.jsonl", '{"model": "a"}\n', r"samples\.jsonl:1"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"st', r"metrics\.jsonl:2"),
        ("provenance.json", "{", r"provenance\.json"),
    ],
)
def test_a_broken_file_is_named(build, path, text, where):
    (build.root / "artifacts" / "n4" / path).write_text(text)
    with pytest.raises(DataError, match=where):
        build.page()


def test_an_artifact_of_no_node_is_refused(build):
    build.flags += ["--node", f"sft/other={build.root}"]
    with pytest.raises(RecipeError, match="sft/other"):
        build.page()


def test_an_unknown_key_in_the_recipe_is_refused(tmp_path):
    (tmp_path / "graph.json").write_text('{"nodes": []}')
    (tmp_path / "recipe.yaml").write_text("titel: x\n")
    paths = [str(tmp_path / name) for name in ("graph.json", "recipe.yaml", "page")]
    with pytest.raises(RecipeError, match="titel"):
        report.main(["--graph", paths[0], "--recipe", paths[1], "--out", paths[2]])


def test_a_sweep_is_ranked_with_what_it_varies(tmp_path):
    build = Build(tmp_path)
    for at, right in enumerate((50, 150, 150)):
        name = f"tuned_lr_{at}"
        varied = {"sweep": "tuned", "varied": {"lr": [1e-5, 0.002, 0.5][at]}}
        build.node(f"sft/{name}")
        build.nodes[-1] |= varied
        build.node(
            f"eval/graded_{name}",
            [f"sft/{name}"],
            scores__scores_json=scored(**{f"sft__{name}": right}),
            scores__samples_jsonl=[sample(f"sft/{name}")],
        )
        build.nodes[-1] |= varied | {"sweep": "graded"}
    page = build.page()
    ranking = re.search(r'(?s)<table class="ranking">.*?</table>', page)[0]
    assert "sft/tuned by sums of eval/graded, the best first" in ranking
    rows = re.findall(r"(?s)<tr><td.*?</tr>", ranking)
    cells = [re.sub("<[^>]*>", "|", row).replace("||", "|") for row in rows]
    assert [cell[:3] for cell in cells] == ["|1|", "|2|", "|3|"]
    assert "tuned_lr_1|" in cells[0] and "|0.002|" in cells[0] and "75.0%" in cells[0]
    assert "tuned_lr_2|" in cells[1] and "tuned_lr_0|" in cells[2]
    assert page.count('<div class="plot"') == 1, "one chart of all that an eval scored"
    assert page.count('<table class="samples">') == 1
