"""Sweeps in the plan: their nodes and names, what follows them, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import best
from scripts.lib import doctor, graph, identity, lineage, plan
from scripts.lib.errors import DataError, UserError
from scripts.lib.graph import Graph
from scripts.lib.ranking import ranked
from scripts.lib.store import differences
from scripts.lib.sweep import slug
from scripts.lib.workflow import check_targets

ROOT = Path(__file__).parents[2]
TRAINING = {"steps": 4, "batch_size": 8, "lr": 0.001}
TASKS = {"arithmetic": {"file": "config/tasks/arithmetic.yaml", "data": "heldout"}}
LRS = [1.0e-5, 2.0e-5]
BASE: dict[str, Any] = {
    "extends": "config.yaml",
    "sft": {"tuned": {"from": "base", "data": "chat", **TRAINING}},
    "eval": {"graded": {"from": ["base", "tuned"], "tasks": TASKS}},
}


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    identity.forget()
    yield
    identity.forget()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's code and definitions with a config of its own."""
    for name in ("envs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "config").mkdir()
    for path in (ROOT / "config").iterdir():
        (tmp_path / "config" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = over(result[key], value) if both else value
    return result


def built(*changes: dict[str, Any]) -> Graph:
    config = BASE
    for change in changes:
        config = over(config, change)
    Path("config/top.yaml").write_text(json.dumps(config, indent=1))
    return graph.build(Path("config/top.yaml"))


def refused(*changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        built(*changes)
    return str(error.value)


def sweep(**lists: Any) -> dict[str, Any]:
    return {"sft": {"tuned": {"sweep": lists}}}


def best_of(names: Any = "tuned", by: str = "graded") -> dict[str, Any]:
    return {"export": {"winner": {"from": {"best": names, "by": by}}}}


def of(whole: Graph, stage: str) -> list[str]:
    return [node.name for node in whole.nodes.values() if node.stage == stage]


# ---- the nodes -------------------------------------------------------------------


def test_a_sweep_makes_a_node_of_each_combination_named_after_its_values():
    whole = built(sweep(lr=LRS, batch_size=[8, 16]))
    assert whole.sweeps["sft/tuned"] == [
        "sft/tuned_lr_1em5_batch_size_8",
        "sft/tuned_lr_1em5_batch_size_16",
        "sft/tuned_lr_2em5_batch_size_8",
        "sft/tuned_lr_2em5_batch_size_16",
    ]
    node = whole.nodes["sft/tuned_lr_2em5_batch_size_16"]
    assert (node.recipe["lr"], node.recipe["batch_size"]) == (2.0e-5, 16)
    assert "sweep" not in node.recipe
    assert node.varied == {"lr": 2.0e-5, "batch_size": 16}
    assert node.parents == ("pretrain/base", "pack/chat"), "the base is built once"
    assert "sft/tuned" not in whole.nodes


def test_a_value_more_changes_no_other_node():
    few, more = built(sweep(lr=LRS)), built(sweep(lr=[5.0e-6, *LRS]))
    new = {id for id in more.nodes if id not in few.nodes}
    assert new == {"sft/tuned_lr_5em6", "eval/graded_tuned_lr_5em6"}
    assert all(
        more.nodes[id] == node for id, node in few.nodes.items() if id != "report/main"
    )


def test_two_rules_never_make_one_node():
    one = {"from": {"best": "base", "by": "metrics.a.b"}}
    other = {"from": {"best": "base", "by": "metrics.a_b"}}
    said = refused({"sft": {"instruct": one, "other": {**other, "data": "chat"}}})
    assert "makes best/base_by_metrics_a_b, and so does sft.instruct.from" in said


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1.0e-5, "1em5"), (2.5e-4, "2p5em4"), (0.04, "0p04"), (0.0, "0"), (-1, "m1"),
        (2.0, "2"), (100.0, "100"), (1.0e7, "1e7"), (0.1 + 0.2, "0p30000000000000004"),
        (True, "true"), ("cosine", "cosine"), ("A-b/c", "a_b_c"), (128, "128"),
    ],
)  # fmt: skip
def test_a_value_is_shown_in_a_name(value: object, name: str):
    assert slug(value) == name


def test_what_starts_from_a_sweep_follows_each_of_its_nodes():
    later = {
        "grpo": {"reasoner": {"from": "tuned", "sweep": {"beta": [0.0, 0.1]}}},
        "export": {"nano": {"from": "sft/tuned"}},
        "eval": {"arithmetic": {"from": ["base", "reasoner", "nano"]}},
        "placement": {"sft": {"tuned": {"minutes": 7}}},
    }
    whole = built(sweep(lr=LRS), later)
    assert of(whole, "export") == ["nano_lr_1em5", "nano_lr_2em5"]
    assert of(whole, "release") == ["nano_lr_1em5", "nano_lr_2em5"]
    assert whole.nodes["export/nano_lr_2em5"].parents == ("sft/tuned_lr_2em5",)
    assert of(whole, "grpo") == [
        f"reasoner_lr_{lr}_beta_{b}" for b in ("0", "0p1") for lr in ("1em5", "2em5")
    ]
    last = whole.nodes["grpo/reasoner_lr_2em5_beta_0p1"]
    assert last.varied == {"lr": 2.0e-5, "beta": 0.1}
    assert last.parents[0] == "sft/tuned_lr_2em5"
    scored = whole.nodes["eval/arithmetic_reasoner_lr_1em5_beta_0"]
    assert scored.parents[0] == "grpo/reasoner_lr_1em5_beta_0"
    assert "eval/arithmetic_base" in whole.sweeps["eval/arithmetic"]
    assert len(whole.sweeps["eval/arithmetic"]) == 1 + 4 + 2
    shown = whole.nodes["report/main"].parents
    assert {*whole.sweeps["eval/arithmetic"], *whole.sweeps["grpo/reasoner"]} <= {
        *shown
    }
    placed = {whole.nodes[id].placement["minutes"] for id in whole.sweeps["sft/tuned"]}
    assert placed == {7}
    assert built(sweep(lr=LRS), later, {"report": {"main": {"from": "graded"}}}).nodes[
        "report/main"
    ].parents[-3:] == tuple(whole.sweeps["eval/graded"])
    again = Graph.from_json(whole.to_json())
    assert (again.sweeps, again.nodes) == (whole.sweeps, whole.nodes)


def test_a_key_below_another_can_be_varied():
    whole = built(
        sweep(**{"peft.rank": [4, 8]}), {"sft": {"tuned": {"peft": {"method": "lora"}}}}
    )
    ranks = [whole.nodes[id].recipe["peft"]["rank"] for id in whole.sweeps["sft/tuned"]]
    assert of(whole, "sft")[-2:] == ["tuned_rank_4", "tuned_rank_8"] and ranks == [4, 8]
    given = {"grpo": {"reasoner": {"sweep": {"environment.math.weight": [1.0, 2.0]}}}}
    whole = built(
        given, {"export": None, "eval": None, "report": None, "release": None}
    )
    (_, two) = whole.sweeps["grpo/reasoner"]
    assert whole.nodes[two].recipe["environment"]["math"]["weight"] == 2.0
    given["grpo"]["reasoner"]["environment"] = "code"
    whole = built(given, dict.fromkeys(("export", "eval", "report", "release")))
    assert [*whole.nodes[two].recipe["environment"]] == ["code", "math"]


def test_overrides_keep_the_dots_of_their_keys():
    nvidia = {"engine": "nvidia", "placement": {"sft": {"default": {"gpus": 1}}}}
    key = "overrides.optimizer.adam_beta1"
    only = {"grpo": None, "export": None, "eval": None, "report": None, "release": None}
    placed = {"pretrain": {"default": {"gpus": 1}}}
    whole = built(sweep(**{key: [0.8, 0.9]}), nvidia, only, {"placement": placed})
    (one, _) = whole.sweeps["sft/tuned"]
    assert one == "sft/tuned_adam_beta1_0p8"
    assert whole.nodes[one].recipe["overrides"] == {"optimizer.adam_beta1": 0.8}


def test_one_base_has_branches_each_exported_and_scored_by_one_eval():
    pairs = {"tokenizer": "tiny", "data": "pairs", "max_tokens": 64}
    branches = {
        "generate": {"pairs": {"kind": "preferences", "count": 200}},
        "preferences": {"pairs": pairs},
        "dpo": {"polite": {"from": "tuned", "data": "pairs", **TRAINING}},
        "export": {"polite_out": {"from": "polite"}, "tuned_out": {"from": "tuned"}},
        "eval": {"graded": {"from": ["base", "tuned_out", "polite_out", "nano"]}},
    }
    whole = built(branches)
    above = {id: whole.ancestors(f"export/{id}") for id in of(whole, "export")}
    trained = {
        id: [n for n in nodes if n.split("/")[0] in ("pretrain", "sft", "dpo", "grpo")]
        for id, nodes in above.items()
    }
    assert trained == {
        "nano": ["pretrain/base", "sft/instruct", "grpo/reasoner"],
        "polite_out": ["pretrain/base", "sft/tuned", "dpo/polite"],
        "tuned_out": ["pretrain/base", "sft/tuned"],
    }
    assert whole.sweeps == {} and of(whole, "eval") == ["arithmetic", "graded"]


def test_the_plan_counts_a_sweeps_nodes_and_says_what_is_new_to_a_list():
    whole = built(sweep(lr=LRS))
    new = ["pretrain/base", *whole.sweeps["sft/tuned"], "eval/graded_base"]
    assert plan.folded(whole, new) == "pretrain/base, sft/tuned (2), eval/graded (1)"
    for now, said in (
        ("abc", "with c"),
        ("a", "without b"),
        ("ba", "in another order"),
    ):
        old, new = {"names": ["a", "b"]}, {"names": [*now]}
        assert differences(old, new) == [f"names {said}"]
    assert differences({"names": ["a"]}, {"names": ["a"]}) == []


def test_what_a_cluster_lacks_is_said_of_the_sweeps_placement():
    whole = built(sweep(lr=LRS), {"placement": {"sft": {"tuned": {"minutes": 7}}}})
    Path("cluster.yaml").write_text("{}")
    places = doctor.Places(Path("config/top.yaml"), Path("cluster.yaml"))
    found = places.where(whole.nodes["sft/tuned_lr_1em5"], "minutes")
    assert found.endswith(" placement.sft.tuned.minutes")


def test_a_lineage_says_whose_model_the_best_is():
    one: dict[str, Any] = {key: {} for key in ("recipe", "code", "packages", "counts")}
    one |= {"node": "best/x", "made": None, "outs": {"artifacts/best/x/model": "22"}}
    one["inputs"] = {"artifacts/sft/a/model": "11", "artifacts/sft/b/model": "22"}
    assert "  same as   artifacts/sft/b/model" in [*lineage.details(one)]


# ---- what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"lrr": [1.0]}, "sft.tuned.sweep.lrr: unknown key\n\nhint: did you mean `lr`?"),
        ({"sweep": [1]}, "sweep.sweep: unknown key"),
        ({"lr.peak": [1.0]}, "sweep.lr.peak: unknown key"),
        ({"peft.rnk": [8]}, "did you mean `peft.rank`? Keys: peft.method, peft.rank"),
        ({"lr": []}, "sweep.lr: [] is no list of values"),
        ({"lr": 0.1}, "sweep.lr: 0.1 is no list of values"),
        ({"lr": [[0.1]]}, "sweep.lr: [0.1] is no value"),
        ({"lr": [None]}, "sweep.lr: None is no value"),
        ({"lr": [0.1, 0.2, 0.1]}, "sweep.lr: 0.1 and 0.1 make one name: 0p1"),
        ({"lr": [1, 1.0]}, "sweep.lr: 1 and 1.0 make one name: 1"),
        ({"lr": [0.1, "2e-5"]}, "sweep.lr: input should be a valid number; found '2e-5'"),
        ({"lr": [0.1, -1.0]}, "sweep.lr: input should be greater than 0; found -1.0"),
        ({"steps": [4, 8], "warmup_steps": [4]}, "sweep.warmup_steps: 4 of 4 steps"),
        ({"seed": [*range(40)], "steps": [*range(9, 40)]}, "a grid of 1,240 nodes"),
        ({"from": ["bas"]}, "sweep.from: no such node: bas"),
        ({"data": ["a" * 200]}, "name would be tuned_data_aaa"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_refused_by_its_key(lists: dict[str, Any], said: str):
    found = refused(sweep(**lists))
    assert said in found and "config/top.yaml:" in found
    assert found.count("config/top.yaml") == 1, "said once, not of each node"


@pytest.mark.parametrize("given", [[], {}, "lr", None])
def test_a_sweep_of_nothing_is_refused(given: object):
    assert "varies nothing" in refused({"sft": {"tuned": {"sweep": given}}})


def test_only_what_trains_is_swept():
    said = refused({"export": {"nano": {"sweep": {"from": ["base"]}}}})
    assert "export.nano.sweep: unknown key" in said
    assert "no such node: bse" in refused(
        sweep(lr=LRS), {"eval": {"graded": {"from": ["tuned", "bse"]}}}
    )


def test_a_sweeps_node_takes_no_others_name():
    taken = {"sft": {"tuned_lr_1em5": {"from": "base", "data": "chat", **TRAINING}}}
    assert "tuned is a sweep that makes a node of this name" in refused(
        sweep(lr=LRS), taken
    )
    said = refused(sweep(lr=LRS), {"export": {"tuned": {"from": "base"}}})
    assert "two nodes with one name: sft/tuned and export/tuned" in said
    taken["sft"]["tuned_lr_1em5"]["sweep"] = {"seed": [1, 2]}
    assert "makes a node of this name" in refused(sweep(lr=LRS), taken)


def test_a_name_of_a_sweep_where_one_node_is_wanted_says_so():
    given = {"pretrain": {"base": {"data": "corpus", "sweep": {"lr": LRS}}}}
    assert of(built(given), "sft")[0] == "instruct_lr_1em5"
    rm = {
        "generate": {"pairs": {"kind": "preferences", "count": 200}},
        "preferences": {
            "pairs": {"tokenizer": "tiny", "data": "pairs", "max_tokens": 64}
        },
        "rm": {
            "helpful": {
                "from": "base",
                "data": "pairs",
                "sweep": {"lr": LRS},
                **TRAINING,
            }
        },
        "grpo": {"reasoner": {"environment": {"reward_model": {"from": "helpful"}}}},
        "pretrain": {"base": {"model": "qwen3_small"}},
    }
    assert "helpful is a sweep of 2 nodes, and one is wanted" in refused(rm)


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["sft/tund"], "sft/tuned"), (["tuned"], "sft/tuned"), (["exprt"], "export"),
        (["--until", "sft/instrct", "--", "export"], "sft/instruct"),
        (["-n", "artifacts/export/nano/"], "export/nano"), (["?"], ""),
    ],
)  # fmt: skip
def test_a_target_that_is_no_node_is_refused_with_the_nearest(
    words: list[str], nearest: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["bin/snakemake", "--cores", "2", *words])
    with pytest.raises(UserError, match="no such target") as error:
        check_targets(built(sweep(lr=LRS)))
    assert f"did you mean `{nearest}`" in str(error.value) or not nearest


@pytest.mark.parametrize(
    "words",
    [[], ["sft/tuned"], ["sft/tuned_lr_1em5"], ["export", "all"], ["-n", "best"],
     ["state/sft/tuned_lr_1em5.json"]],
)  # fmt: skip
def test_a_stage_a_node_a_sweep_and_a_manifest_are_targets(
    words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["bin/snakemake", *words])
    check_targets(built(sweep(lr=LRS)))


# ---- the best of them ------------------------------------------------------------


def test_the_best_of_a_sweep_is_a_node_that_reads_all_of_it_and_its_scores():
    whole = built(sweep(lr=LRS), best_of(by="eval.graded"))
    node = whole.nodes["best/tuned_by_graded"]
    assert node.recipe == {
        "by": "eval.graded.arithmetic",
        "candidates": ["sft/tuned_lr_1em5", "sft/tuned_lr_2em5"],
    }
    assert node.parents == (
        "sft/tuned_lr_1em5", "eval/graded_tuned_lr_1em5",
        "sft/tuned_lr_2em5", "eval/graded_tuned_lr_2em5",
    )  # fmt: skip
    assert {path for _, named in node.flags for path in [named.partition("=")[2]]} == {
        *node.artifacts
    }
    assert "artifacts/best/tuned_by_graded/choice.json" in node.outs
    assert whole.nodes["export/winner"].parents == (node.id,)


def test_a_child_of_the_best_can_be_scored_by_the_eval_that_chose_it():
    scored = {"eval": {"graded": {"from": ["tuned", "winner"]}}}
    whole = built(sweep(lr=LRS), best_of(), scored)
    assert "eval/graded_winner" in whole.sweeps["eval/graded"]
    assert "eval/graded_winner" not in whole.nodes["best/tuned_by_graded"].parents


def test_the_score_of_an_export_counts_for_what_it_exports():
    exported = {
        "export": {"candidates": {"from": "tuned"}},
        "eval": {"graded": {"from": "candidates"}},
    }
    whole = built(sweep(lr=LRS), best_of(by="graded.arithmetic"), exported)
    assert whole.nodes["best/tuned_by_graded_arithmetic"].recipe["scored"] == {
        f"sft/tuned_lr_{lr}": f"export/candidates_lr_{lr}" for lr in ("1em5", "2em5")
    }


def test_the_best_can_be_of_named_nodes_by_a_key_of_their_metrics():
    chosen = {"best": {"kept": {"from": ["tuned", "instruct"], "by": "metrics.loss"}}}
    whole = built(chosen, {"export": {"nano": {"from": "kept"}}})
    node = whole.nodes["best/kept"]
    assert node.recipe["candidates"] == ["sft/tuned", "sft/instruct"]
    assert "artifacts/sft/tuned/metrics.jsonl" in node.artifacts
    assert whole.nodes["export/nano"].parents == ("best/kept",)


def test_a_node_starts_from_the_best_and_two_of_them_share_it():
    further = {
        "sft": {
            "more": {
                "from": {"best": "sft/tuned", "by": "graded"},
                "data": "chat",
                **TRAINING,
            }
        }
    }
    whole = built(sweep(lr=LRS), best_of(), further)
    assert of(whole, "best") == ["tuned_by_graded"]
    assert whole.nodes["sft/more"].parents[0] == "best/tuned_by_graded"
    assert {*whole.sweeps["sft/tuned"]} < {*whole.ancestors("sft/more")}


@pytest.mark.parametrize(
    ("names", "by", "said"),
    [
        ("tund", "graded", "export.winner.from.best: no such node: tund"),
        ("tuned", "grade", "export.winner.from.by: no such eval node: grade"),
        ("tuned", "graded.sums", "no such task of graded: sums"),
        (
            "tuned",
            "arithmetic",
            "eval.arithmetic.arithmetic has no score of sft/tuned_",
        ),
        ([], "graded", "export.winner.from.best: value should have at least 1 item"),
        ("tuned", 3, "export.winner.from.by: input should be a valid string"),
    ],
)
def test_what_has_no_best_is_refused_by_its_key(names: Any, by: Any, said: str):
    assert said in refused(sweep(lr=LRS), best_of(names, by))


def test_a_typing_error_in_the_best_is_named():
    wrong = {"export": {"winner": {"from": {"best": "tuned", "bye": "graded"}}}}
    assert "did you mean `by`? Keys: best, by" in refused(sweep(lr=LRS), wrong)


def test_an_eval_of_several_tasks_wants_one_named():
    two = {"eval": {"graded": {"tasks": {"sums": TASKS["arithmetic"]}}}}
    assert "graded has several tasks" in refused(sweep(lr=LRS), best_of(), two)
    whole = built(sweep(lr=LRS), best_of(by="eval/graded.sums"), two)
    assert whole.nodes["best/tuned_by_graded_sums"].recipe["by"] == "eval.graded.sums"


def test_a_cycle_through_the_best_is_refused_by_name():
    both = {
        "sft": {
            "first": {"from": "base", "data": "chat", **TRAINING},
            "second": {
                "from": {"best": ["first", "second"], "by": "metrics.loss"},
                "data": "chat",
                **TRAINING,
            },
        }
    }
    assert "a cycle: " in refused(both)
    assert "best/first_or_second_by_metrics_loss <- sft/second" in refused(both)
    own = {"eval": {"graded": {"from": ["instruct", "winner"]}}}
    said = refused(own, best_of("instruct", "graded"))
    assert "a cycle: " in said and "best/instruct_by_graded <- eval/graded" in said


def test_a_cycle_of_sweeps_is_refused_by_name():
    after = {"grpo": {"reasoner": {"sweep": {"beta": [0.0]}}}}
    said = refused({"sft": {"instruct": {"from": "reasoner"}}}, after)
    assert "a cycle: sft/instruct <- grpo/reasoner <- sft/instruct" in said


def test_the_best_of_different_models_is_refused():
    wide = {
        "pretrain": {
            "wide": {
                "model": "qwen3_small",
                "data": "corpus",
                "sequence_length": 64,
                **TRAINING,
            }
        }
    }
    said = refused(wide, best_of(["base", "wide"], "metrics.loss"))
    assert "more than one model definition: config/models/tiny/config.json of" in said


# ---- the script ------------------------------------------------------------------


@pytest.fixture
def models(folder: Path) -> Path:
    """Two models of a file each, their scores and metrics."""
    for name, score, loss in (("a", 0.25, 2.0), ("b", 0.75, 3.0)):
        path = folder / name
        (path / "model/adapter").mkdir(parents=True)
        (path / "model/weights").write_text(name)
        (path / "model/adapter/weights").write_text(name)
        row = {"model": f"sft/{name}", "task": "sums", "score": score}
        write_scores(path, [row])
        (path / "metrics.jsonl").write_text(
            '{"loss": 9}\n' + json.dumps({"loss": loss})
        )
    return folder


def write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    (path / "scores.json").write_text(json.dumps({"scores": rows}))


def choose(by: str, **recipe: Any) -> str:
    """The best, by the script; its files are those of one model, whole."""
    text = json.dumps({"by": by, "candidates": ["sft/a", "sft/b"], **recipe})
    Path("recipe.yaml").write_text(text)
    words = ["--recipe", "recipe.yaml", "--out", "out/model"]
    for name in ("a", "b"):
        score = f"{name}/metrics.jsonl" if by.startswith("metrics") else name
        words += [
            "--candidate",
            f"sft/{name}={name}/model",
            "--score",
            f"sft/{name}={score}",
        ]
    assert best.main(words) == 0
    choice = json.loads(Path("out/model/choice.json").read_text())
    name = choice["best"].removeprefix("sft/")
    for file in ("weights", "adapter/weights"):
        assert Path("out/model", file).read_text() == name
    assert choice["ranking"][0]["node"] == choice["best"] and choice["by"] == by
    return str(name)


def test_the_best_has_the_highest_score_or_the_lowest_loss(models: Path):
    assert choose("eval.graded.sums") == "b"
    assert choose("metrics.loss") == "a"


def test_of_equals_the_first_counts(models: Path):
    write_scores(models / "a", [{"model": "sft/a", "task": "sums", "score": 0.75}])
    assert choose("eval.graded.sums") == "a"
    assert ranked([("x", 1.0), ("y", 1.0)], lowest=True)[0][0] == "x"


def test_a_score_is_taken_of_the_export_that_was_scored(models: Path):
    rows = [
        {"model": "export/a", "task": "sums", "score": 1.0},
        {"model": "sft/a", "task": "sums", "score": 0.0},
    ]
    write_scores(models / "a", rows)
    assert choose("eval.graded.sums", scored={"sft/a": "export/a"}) == "a"


@pytest.mark.parametrize("row", [{}, {"score": None}, {"score": True}, {"score": "1"}])
def test_a_candidate_without_a_score_is_an_error(models: Path, row: dict[str, Any]):
    write_scores(models / "b", [{"model": "sft/b", "task": "sums", **row}])
    with pytest.raises(DataError, match="no number score"):
        choose("eval.graded.sums")


def test_a_score_that_is_no_number_of_another_task_or_model_is_an_error(models: Path):
    with pytest.raises(DataError, match="has no score of sft/a on products"):
        choose("eval.graded.products")
    nan = [{"model": "sft/b", "task": "sums", "score": float("nan")}]
    write_scores(models / "b", nan)
    with pytest.raises(DataError, match="sft/b scores nan"):
        choose("eval.graded.sums")
    (models / "b/metrics.jsonl").write_text('{"lr": 1}\n')
    with pytest.raises(DataError, match="no number loss; there are: lr"):
        choose("metrics.loss")
