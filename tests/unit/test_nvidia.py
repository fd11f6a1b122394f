"""What the scripts of the engine nvidia do before and beside Megatron-Bridge."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from scripts.lib import bridge_options, graph, tracking
from scripts.lib.errors import DataError, RecipeError, UserError
from scripts.lib.run import placement_flags
from scripts.lib.schema import PARALLEL, Peft, Placement, PretrainRecipe
from scripts.nvidia import common, convert, parity, pretrain, settings, sft

ROOT = Path(__file__).parents[2]
NEEDED = ["--recipe", "R", "--out", "O"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of several processes."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def parsed(*flags: str) -> dict[str, Any]:
    return common.placement(common.parser("").parse_args([*NEEDED, *flags]))


# ---- the command line ------------------------------------------------------------


def test_flags_left_out_are_the_placements_defaults():
    default = Placement()
    assert parsed() == {name: getattr(default, name) for name in PARALLEL}


@pytest.mark.parametrize("name", PARALLEL)
def test_each_key_has_a_flag_that_sets_it_alone(name: str):
    flag = "--" + name.replace("_", "-")
    if "bool" in str(Placement.model_fields[name].annotation):
        for text, value in (("true", True), ("false", False)):
            assert parsed(flag, text) == parsed() | {name: value}
    else:
        assert parsed(flag, "3") == parsed() | {name: 3}


@pytest.mark.parametrize(
    ("flag", "text"), [("--sequence-parallel", "yes"), ("--tensor-parallel", "two")]
)
def test_a_flag_of_another_kind_is_refused(
    flag: str, text: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as refused:
        parsed(flag, text)
    assert refused.value.code == 2
    assert flag in capsys.readouterr().err


def test_export_has_the_sizes_but_saves_nothing():
    flags = common.parser("", trains=False)
    assert common.placement(flags.parse_args(NEEDED)) == parsed()
    with pytest.raises(SystemExit):
        flags.parse_args([*NEEDED, "--save-steps", "3"])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tensor_parallel": 4, "sequence_parallel": False},
        {"sequence_parallel": True, "distributed_optimizer": False},
        {"pipeline_parallel": 2, "virtual_pipeline": 3, "micro_batch_size": 8},
        {"context_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 2},
    ],
)
def test_what_run_passes_on_is_the_placement(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    nodes = graph.build(Path("config/nvidia.yaml")).nodes.values()
    placed = Placement(gpus=8, save_steps=7, **changed)
    wanted = {name: getattr(placed, name) for name in PARALLEL}
    node = next(n for n in nodes if n.stage == "pretrain" and n.engine == "nvidia")
    node = dataclasses.replace(node, placement=placed.model_dump())
    args = common.parser("").parse_args([*NEEDED, *placement_flags(node)])
    assert common.placement(args) == wanted and args.save_steps == 7


# ---- saves -----------------------------------------------------------------------


def save(saves: Path, step: int, base: str = "b", marked: bool = True) -> Path:
    """A save of two files, as its trainer leaves it."""
    folder = saves / f"iter_{step:07d}"
    (folder / "ranks").mkdir(parents=True)
    (folder / "ranks/0.distcp").write_bytes(b"x" * step)
    (folder / "run_config.yaml").write_text("a: 1\n")
    if marked:
        common.mark_whole(folder, step, base)
    return folder


def newest(saves: Path, base: str = "b") -> int | None:
    marked = common.newest_whole(saves, base)
    return marked and marked["step"]


def steps(saves: Path) -> list[int]:
    return sorted(map(common.step_of, saves.glob("iter_*")))


def test_a_marker_tells_what_the_save_holds(tmp_path: Path):
    folder = save(tmp_path, 12)
    assert json.loads((folder / common.MARKER).read_text()) == {
        "step": 12,
        "base": "b",
        "files": {"ranks/0.distcp": 12, "run_config.yaml": 5},
    }
    assert common.contents(folder) == {"ranks/0.distcp": 12, "run_config.yaml": 5}


def test_a_marker_is_given_back_with_what_else_it_tells(tmp_path: Path):
    folder = save(tmp_path, 12)
    common.mark_whole(folder, 12, "b", sizes={"world": 2})
    found = common.newest_whole(tmp_path, "b")
    assert found is not None and found["sizes"] == {"world": 2}


def test_the_newest_whole_save_is_taken_by_number(tmp_path: Path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert newest(tmp_path) == 100
    assert steps(tmp_path) == [9, 20, 100]
    (tmp_path / "iter_0000100").rename(tmp_path / "iter_10000000")
    assert newest(tmp_path) == 20, "the marker is of step 100"


def cut(folder: Path) -> None:
    (folder / "ranks/0.distcp").write_bytes(b"x")


def lose(folder: Path) -> None:
    (folder / "run_config.yaml").unlink()


def add(folder: Path) -> None:
    (folder / "more").touch()


def unmark(folder: Path) -> None:
    (folder / common.MARKER).unlink()


def half_mark(folder: Path) -> None:
    marker = folder / common.MARKER
    marker.rename(folder / (common.MARKER + ".tmp"))


def torn_mark(folder: Path) -> None:
    marker = folder / common.MARKER
    marker.write_text(marker.read_text()[:-20])


def other_step(folder: Path) -> None:
    common.mark_whole(folder, 19, "b")


@pytest.mark.parametrize(
    "harm", [cut, lose, add, unmark, half_mark, torn_mark, other_step]
)
def test_a_save_that_is_not_whole_is_removed_for_the_one_before(
    tmp_path: Path, harm: Any, capsys: pytest.CaptureFixture[str]
):
    save(tmp_path, 10)
    harm(save(tmp_path, 20))
    assert newest(tmp_path) == 10
    assert steps(tmp_path) == [10]
    assert "skipping iter_0000020" in capsys.readouterr().out


def test_without_a_whole_save_nothing_is_left(tmp_path: Path):
    save(tmp_path, 10, marked=False)
    assert newest(tmp_path) is None
    assert steps(tmp_path) == []
    assert newest(tmp_path / "none") is None


def test_a_save_of_another_model_is_refused_and_kept(tmp_path: Path):
    save(tmp_path, 10, base="other")
    with pytest.raises(UserError, match="from another model") as refused:
        common.newest_whole(tmp_path, "b")
    assert "iter_0000010" in refused.value.where and "--work" in refused.value.hint
    assert steps(tmp_path) == [10]


def group(decay: float, experts: bool, step: int = 7) -> dict[str, Any]:
    return {"wd_mult": decay, "is_expert_parallel": experts, "step": step}


def part(name: str, *groups: dict[str, Any]) -> dict[str, Any]:
    settings = {"optimizer": {"param_groups": list(groups)}} if groups else {}
    return {**settings, "param_state": name, "param_state_sharding_type": "f"}


def settings_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What Megatron would find for each of the groups a model may have."""
    found = {
        (one["wd_mult"], one["is_expert_parallel"]): one
        for one in state["optimizer"]["param_groups"]
    }
    return [found[decay, experts] for decay in (0, 1) for experts in (False, True)]


SETTINGS = [group(decay, experts) for decay in (0, 1) for experts in (False, True)]


def test_a_save_with_split_experts_is_given_to_one_optimizer():
    chained = {
        0: part("", group(1, False), group(0, False)),
        1: part("", group(1, True)),
    }
    state = common.regrouped(chained | part("tensors"), 1)
    assert state["param_state"] == "tensors" and 0 not in state
    assert settings_of(state) == SETTINGS


def test_a_save_of_one_optimizer_is_given_to_split_experts():
    one = part("", group(1, False), group(0, False))
    state = common.regrouped(one | {0: part("dense"), 1: part("experts")}, 2)
    assert list(state) == [0, 1]
    assert [state[n]["param_state"] for n in state] == ["dense", "experts"]
    assert settings_of(state[0]) == settings_of(state[1]) == SETTINGS


@pytest.mark.parametrize(
    ("saved", "optimizers"),
    [
        (part("tensors", group(1, False)), 1),
        ({0: part("a", group(1, False)), 1: part("b", group(1, True))}, 2),
        ({"state": {}, "param_groups": []}, 1),
    ],
)
def test_a_save_in_the_form_that_is_wanted_is_left_as_it_is(
    saved: dict[Any, Any], optimizers: int
):
    assert common.regrouped(saved, optimizers) is saved


def test_an_optimizer_that_cannot_be_shared_out_anew_is_refused_by_name():
    saved = {"world": 2, "expert_parallel": 2, "expert_tensor_parallel": 1}
    now = {"world": 1, "expert_parallel": 1, "expert_tensor_parallel": 1}
    common.check_experts(saved, now, distributed=True)
    common.check_experts(saved, {**saved, "world": 4}, distributed=False)
    with pytest.raises(UserError, match=r"expert_parallel: 2; .* expert_parallel: 1"):
        common.check_experts(saved, now, distributed=False)


def model(folder: Path, value: float = 0.0, **config: Any) -> Path:
    """A folder with config.json and one tensor."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8} | config))
    save_file({"w": torch.full((4, 2), value)}, folder / "model.safetensors")
    return folder


def test_a_base_is_the_models_shape_its_weights_and_the_adapter(tmp_path: Path):
    first = model(tmp_path / "m")
    base = common.base_of(first, first, None)
    assert base == common.base_of(first, first, None)
    os.utime(first / "model.safetensors", (1, 1))
    os.utime(first / "config.json", (1, 1))
    assert common.base_of(first, first, None) == base

    lora = Peft(method="lora", rank=4)
    others = [
        common.base_of(model(tmp_path / "c", hidden_size=9), first, None),
        common.base_of(first, model(tmp_path / "w", 1.0), None),
        common.base_of(first, first, lora),
        common.base_of(first, first, Peft(method="dora", rank=4)),
        common.base_of(first, first, Peft(method="lora", rank=8)),
    ]
    assert len({base, *others}) == 6
    assert common.base_of(first, first, Peft(method="lora", rank=4)) == others[2]


def test_a_base_changes_with_a_tensors_name(tmp_path: Path):
    first, other = model(tmp_path / "a"), model(tmp_path / "b")
    assert common.base_of(first, first, None) == common.base_of(other, other, None)
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"'))
    assert common.base_of(first, first, None) != common.base_of(other, other, None)


# ---- history ---------------------------------------------------------------------


def entry(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": torch.tensor(1 / step, dtype=torch.float32),
        "lr": step / 1000,
        "grad_norm": None if step == 3 else 2.0 * step,
    }


def record(work: Path, first: int, last: int, lot: int) -> None:
    """Take steps in a process of their own, flushed in lots."""
    history = common.History(work)
    for step in range(first, last + 1):
        history.waiting.append(entry(step))
        if step % lot == 0:
            history.flush()
    history.flush()
    assert history.waiting == []


def test_steps_are_read_back_as_numbers(tmp_path: Path):
    history = common.History(tmp_path)
    assert history.read() == []
    record(tmp_path, 1, 4, 3)
    read = history.read()
    assert [one["step"] for one in read] == [1, 2, 3, 4]
    assert [one["loss"] for one in read] == [1.0, 0.5, float(torch.tensor(1 / 3)), 0.25]
    assert read[1] == {"step": 2, "loss": 0.5, "lr": 0.002, "grad_norm": 4.0}


def test_a_loss_that_is_no_number_is_kept(tmp_path: Path):
    history = common.History(tmp_path)
    history.waiting.append(entry(1) | {"loss": torch.tensor(float("nan"))})
    history.flush()
    (read,) = history.read()
    assert read["loss"] != read["loss"]


def test_cut_forgets_what_came_after_a_save_and_a_torn_line(tmp_path: Path):
    record(tmp_path, 1, 6, 4)
    history = common.History(tmp_path)
    history.path.write_text(history.path.read_text()[:-9])
    assert [one["step"] for one in history.read()] == [1, 2, 3, 4, 5]
    history.cut(4)
    assert [one["step"] for one in history.read()] == [1, 2, 3, 4]
    history.cut(0)
    assert history.path.read_text() == ""


def metrics(folder: Path) -> str:
    args = argparse.Namespace(work=folder, out=folder)
    common.write_metrics(args, SimpleNamespace(log_steps=5), 100)
    return (folder / "metrics.jsonl").read_text()


def test_a_resumed_runs_metrics_are_those_of_one_that_was_not_stopped(tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    record(whole, 1, 12, 5)
    record(resumed, 1, 8, 3)
    path = resumed / "steps.jsonl"
    path.write_text(path.read_text()[:-5])  # killed while it wrote
    common.History(resumed).cut(6)
    record(resumed, 7, 12, 4)
    assert metrics(resumed) == metrics(whole)
    lines = [json.loads(line) for line in metrics(whole).splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["tokens"] for line in lines] == [500, 1000, 1200]
    assert lines[0]["lr"] == 0.005
    assert lines[0]["grad_norm"] == pytest.approx((2 + 4 + 8 + 10) / 4)
    assert lines[2]["loss"] == pytest.approx((1 / 11 + 1 / 12) / 2)


def test_only_the_first_process_writes_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record(tmp_path, 1, 2, 1)
    monkeypatch.setenv("RANK", "1")
    args = argparse.Namespace(work=tmp_path, out=tmp_path)
    common.write_metrics(args, SimpleNamespace(log_steps=5), 0)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- several processes -----------------------------------------------------------


def refuse() -> None:
    raise RecipeError("where", "what", "hint")


def one_of_two(number: int, folder: Path) -> None:
    """In a process of its own: make something, then fail, on the first only."""
    os.environ["RANK"] = str(number)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2
    )
    told: list[Any] = [common.from_first(lambda: f"made by {number}")]
    try:
        common.from_first(refuse)
    except UserError as error:
        told += [type(error).__name__, error.where, error.what, error.hint]
    (folder / f"{number}.json").write_text(json.dumps(told))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_processes_get_what_the_first_makes_and_its_error(tmp_path: Path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    for number in (0, 1):
        told = json.loads((tmp_path / f"{number}.json").read_text())
        assert told == ["made by 0", "RecipeError", "where", "what", "hint"]


# ---- models and data -------------------------------------------------------------


def test_a_model_that_can_be_read_is_read_where_it_lies(tmp_path: Path):
    """By this Transformers: older ones refuse the names, see tests/bridge."""
    from transformers import AutoConfig

    released = ROOT / "config/models/tiny"
    assert common.readable(released, tmp_path) == released
    AutoConfig.from_pretrained(released).save_pretrained(tmp_path / "newer")
    written = common.read_config(tmp_path / "newer")
    assert "linear_attention" in written["layers_block_type"]
    assert common.readable(tmp_path / "newer", tmp_path) == tmp_path / "newer"
    assert not (tmp_path / "parent").exists()


@pytest.mark.parametrize("text", [None, "{", "[1"])
def test_a_folder_without_a_model_is_named(tmp_path: Path, text: str | None):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError, match=r"holds no readable config\.json") as refused:
        common.read_config(tmp_path)
    assert refused.value.where == str(tmp_path)


def blend(folder: Path, *prefixes: str) -> Path:
    sources = [{"prefix": prefix, "weight": 1.0} for prefix in prefixes]
    (folder / "blend.json").write_text(json.dumps({"sources": sources}))
    for prefix in prefixes:
        for ending in (".bin", ".idx"):
            (folder / f"{prefix}{ending}").write_bytes(b"0")
    return folder


def test_a_blend_is_read_where_all_its_shards_are_there(tmp_path: Path):
    read = pretrain.read_blend(blend(tmp_path, "a", "b"))
    assert [source["prefix"] for source in read["sources"]] == ["a", "b"]


@pytest.mark.parametrize("name", ["b.bin", "b.idx"])
def test_a_missing_shard_is_named(tmp_path: Path, name: str):
    (blend(tmp_path, "a", "b") / name).unlink()
    with pytest.raises(DataError) as refused:
        pretrain.read_blend(tmp_path)
    assert refused.value.where == str(tmp_path / name)


def test_a_blend_without_shards_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no readable blend\.json") as refused:
        pretrain.read_blend(tmp_path)
    assert refused.value.where == str(tmp_path)
    with pytest.raises(DataError, match="lists no shard") as refused:
        pretrain.read_blend(blend(tmp_path))
    assert refused.value.where == str(tmp_path / "blend.json")


def packed(path: Path, *rows: list[int]) -> Path:
    table = {"input_ids": pa.array(rows, pa.list_(pa.int32()))}
    pq.write_table(pa.table(table), path)
    return path


def test_the_longest_packed_row_is_found(tmp_path: Path):
    parent = model(tmp_path / "m", max_position_embeddings=4)
    file = packed(tmp_path / "p.parquet", [1, 7], [1, 2, 3, 4], [5])
    assert sft.check_rows(file, parent, 1) == 4


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no row"),
        ([[]], "holds no row"),
        ([[1, 8]], "token 8, but the model's vocab_size is 8"),
        ([[1], [1, 2, 3, 4, 5]], "rows of 5 tokens, but the model's longest"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused(
    tmp_path: Path, rows: list[list[int]], said: str
):
    parent = model(tmp_path / "m", max_position_embeddings=4)
    file = packed(tmp_path / "p.parquet", *rows)
    with pytest.raises(DataError) as refused:
        sft.check_rows(file, parent, 1)
    assert refused.value.where == str(file) and said in refused.value.what


def test_fewer_rows_than_a_step_takes_are_refused(tmp_path: Path):
    parent = model(tmp_path / "m")
    file = packed(tmp_path / "p.parquet", [1, 7], [1])
    assert sft.check_rows(file, parent, 2) == 2
    with pytest.raises(DataError, match="2 rows, fewer than the 3 of a step"):
        sft.check_rows(file, parent, 3)


@pytest.mark.parametrize("kind", ["text", "missing", "column"])
def test_what_is_no_packed_file_is_named(tmp_path: Path, kind: str):
    file = tmp_path / "p.parquet"
    if kind == "text":
        file.write_text("input_ids\n1 2 3\n")
    if kind == "column":
        pq.write_table(pa.table({"text": ["a"]}), file)
    with pytest.raises(DataError, match="not a packed file") as refused:
        sft.check_rows(file, model(tmp_path / "m"), 1)
    assert refused.value.where == str(file)


@pytest.mark.parametrize(("length", "ways", "wanted"), [(1, 1, 16), (32, 2, 32)])
def test_rows_are_filled_up_to_what_divides(length: int, ways: int, wanted: int):
    args = argparse.Namespace(tensor_parallel=ways)
    assert sft.rounded(length, args) == wanted


# ---- a parent on the hub ---------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model, and no way to the hub."""
    from huggingface_hub import constants

    there = tmp_path / "hub/models--nvidia--nano"
    snapshot = there / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (there / "blobs").mkdir()
    (there / "refs").mkdir()
    (there / "refs/main").write_text(REVISION)
    (there / "blobs/c").write_text('{"vocab_size": 8}')
    (snapshot / "config.json").symlink_to("../../blobs/c")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_parent_is_a_folder_or_what_the_hub_gave(hub: Path):
    assert sft.parent_folder("work/some/model") == Path("work/some/model")
    found = sft.parent_folder(f"hf:nvidia/nano@{REVISION}")
    assert found == hub
    assert common.read_config(found) == {"vocab_size": 8}


@pytest.mark.parametrize(
    "name", [f"nvidia/other@{REVISION}", "nvidia/nano@" + 40 * "f"]
)
def test_a_parent_that_the_hub_did_not_give_is_named(hub: Path, name: str):
    with pytest.raises(RecipeError, match="the hub did not give it") as refused:
        sft.parent_folder(f"hf:{name}")
    assert refused.value.where == f"hf:{name}"


# ---- settings --------------------------------------------------------------------


@dataclasses.dataclass
class Provider:
    """Fields as a model's provider of Bridge has them."""

    num_layers: int = 2
    tensor_model_parallel_size: int = 1
    moe_permute_fusion: bool = False
    recompute_modules: list[str] = dataclasses.field(default_factory=lambda: ["attn"])
    attention_backend: str = "auto"


@dataclasses.dataclass
class Other(Provider):
    """One with a field more."""

    only_here: int = 1


def test_tuning_is_what_a_recipe_changed_but_for_the_shape():
    ours = Provider(num_layers=6, attention_backend="fused")
    named = Other(
        num_layers=52,
        tensor_model_parallel_size=4,
        moe_permute_fusion=True,
        recompute_modules=["moe"],
        only_here=2,
    )
    settings.take_tuning(ours, named)
    assert ours == Provider(
        num_layers=6,
        moe_permute_fusion=True,
        recompute_modules=["moe"],
        attention_backend="fused",
    )
    assert not hasattr(ours, "only_here")


def test_a_default_that_is_made_anew_is_no_tuning():
    ours = Provider(recompute_modules=["mlp"])
    settings.take_tuning(ours, Provider())
    assert ours.recompute_modules == ["mlp"]


# ---- the gate --------------------------------------------------------------------


def rows(count: int = 3, entries: int = 16) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(4 + n, entries, generator=made) for n in range(count)]


def judged(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, Any]:
    alike: dict[str, Any] = {"differs_on_disk": [], "differs_after_round_trip": []}
    return alike | parity.agreement(ours, theirs)


def test_the_same_logits_agree_whatever_fills_up_the_vocabulary():
    theirs = rows()
    filled = [torch.cat([row, torch.full((len(row), 5), 99.0)], 1) for row in theirs]
    for ours in (theirs, filled):
        found = judged(ours, theirs)
        assert found["largest_logit_difference"] == 0.0
        assert found["relative_logit_difference"] == 0.0
        assert found["mean_kl"] == pytest.approx(0.0, abs=1e-9)
        assert found["same_first_choice"] == 1.0
        assert parity.refusal(found) == ""


def test_one_logit_that_is_off_closes_the_gate():
    theirs, ours = rows(), rows()
    largest = max(float(row.abs().max()) for row in theirs)
    ours[1][2, 3] += 0.1 * largest
    found = judged(ours, theirs)
    assert found["relative_logit_difference"] == pytest.approx(0.1, rel=1e-4)
    assert "Transformers' logits differ" in parity.refusal(found)
    assert "0.1 of the largest" in parity.refusal(found)


def test_a_small_difference_everywhere_closes_the_gate():
    theirs = rows()
    largest = max(float(row.abs().max()) for row in theirs)
    made = torch.Generator().manual_seed(1)
    ours = []
    for row in theirs:
        sign = torch.randint(0, 2, row.shape, generator=made) * 2 - 1
        ours.append(row + sign * 0.025 * largest)
    found = judged(ours, theirs)
    assert found["relative_logit_difference"] < parity.TOLERANCE
    assert "KL divergence" in parity.refusal(found)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_closes_the_gate(whose: str, value: float):
    both = {"ours": rows(), "theirs": rows()}
    both[whose][0][1, 1] = value
    assert parity.refusal(judged(**both))


def test_logits_that_are_all_zero_close_the_gate():
    nothing = [torch.zeros(4, 16)]
    assert "Transformers' logits differ" in parity.refusal(judged(nothing, nothing))


@pytest.mark.parametrize("key", ["differs_on_disk", "differs_after_round_trip"])
def test_a_tensor_that_differs_closes_the_gate_by_name(key: str):
    found = judged(rows(), rows()) | {key: ["a.weight"]}
    assert parity.refusal(found).startswith("a.weight ")


# ---- tensors on disk -------------------------------------------------------------


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Three tensors, which lie in two files of `tmp_path` too."""
    made = torch.Generator().manual_seed(0)
    all_of_them = {
        "a": torch.randn(3, 4, generator=made).bfloat16(),
        "b": torch.randn(5, generator=made),
        "c": torch.tensor([0.0, -0.0, float("nan")]),
    }
    save_file({"a": all_of_them["a"]}, tmp_path / "model-1.safetensors")
    rest = {name: all_of_them[name] for name in "bc"}
    save_file(rest, tmp_path / "model-2.safetensors")
    return all_of_them


def compared(tensors: dict[str, torch.Tensor], folder: Path, **how: Any) -> list[str]:
    return parity.compare(iter(tensors.items()), folder, **how)


def test_the_same_bits_are_the_same_also_nan(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
):
    assert compared(tensors, tmp_path) == []
    found = parity.converted_names(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
        "c": "model-2.safetensors",
    }


def test_one_bit_is_seen(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    tensors["a"].view(torch.int16)[2, 3] ^= 1
    assert compared(tensors, tmp_path) == ["a"]


def test_the_sign_of_a_zero_is_seen(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    tensors["c"][0] = -0.0
    assert compared(tensors, tmp_path) == ["c"]


def test_a_missing_and_a_surplus_tensor_are_seen(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
):
    tensors["d"] = tensors.pop("b")
    assert compared(tensors, tmp_path) == ["b", "d"]


def test_another_shape_is_seen(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    tensors["a"] = tensors["a"].reshape(4, 3)
    assert compared(tensors, tmp_path) == ["a"]


def test_another_dtype_is_seen_but_where_a_cast_is_meant(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
):
    tensors["b"] = tensors["b"].bfloat16()
    assert compared(tensors, tmp_path) == ["b"]
    assert compared(tensors, tmp_path, cast=True) == []
    tensors["b"][0] += 1
    assert compared(tensors, tmp_path, cast=True) == ["b"]


def test_a_process_that_is_not_the_first_takes_all_and_says_nothing(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RANK", "1")
    left = iter([("x", tensors["a"]), *tensors.items()])
    assert parity.compare(left, tmp_path) == []
    assert next(left, None) is None


def test_magnitudes_are_added_beside_what_an_adapter_has(tmp_path: Path):
    from safetensors.torch import load_file

    path, name = tmp_path / "adapter.safetensors", "base_model.model.m.q.lora_A.weight"
    save_file({name: torch.ones(2, 3)}, path)
    convert.add_magnitudes(path, {"m.q.weight": torch.arange(4.0)[::2]})
    found = load_file(path)
    assert found.keys() == {name, "base_model.model.m.q.lora_magnitude_vector"}
    added = found["base_model.model.m.q.lora_magnitude_vector"]
    assert added.tolist() == [0.0, 2.0]
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    head = json.loads(path.read_bytes()[8 : 8 + length])
    assert head["__metadata__"] == {"format": "pt"}


def test_a_value_that_would_call_something_is_refused():
    assert settings.is_target({"_target_": "os.system"})
    assert settings.is_target([{"a": {"_args_": 1}}])
    assert not settings.is_target({"pad_to_max_length": True, "sizes": [1, 2]})


def test_validation_losses_stand_beside_the_step_they_were_taken_at(tmp_path: Path):
    args = argparse.Namespace(work=tmp_path, out=tmp_path)
    history = common.History(tmp_path)
    for step in range(1, 21):
        history.add({"step": step, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0})
        if step % 10 == 0:
            history.add({"step": step, "validation_loss": 3.0 + step})
    common.write_metrics(args, PretrainRecipe.model_validate(RECIPE_20), 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["validation_loss"] for line in found] == [13.0, 23.0]
    assert [line["tokens"] for line in found] == [40, 80]


RECIPE_20 = {"steps": 20, "batch_size": 2, "lr": 0.1, "sequence_length": 2}


def test_bridge_logs_where_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking.os, "environ", {**os.environ})
    monkeypatch.setattr(tracking, "has", lambda package: True)
    given = {
        "wandb": {"project": "nano"},
        "mlflow": {"tracking_uri": "https://host", "experiment": "nano"},
        **{"run": "sft/instruct", "id": "sft-instruct-0123456789ab"},
    }
    args = argparse.Namespace(work=tmp_path, logging=given)
    found = common.log_settings(args)
    options = json.loads(bridge_options.OPTIONS.read_text())["sections"]["logger"]
    assert set(found) <= set(options)
    assert found["wandb_exp_name"] == found["mlflow_run_name"] == "sft/instruct"
    assert os.environ["WANDB_RUN_ID"] == given["id"]
    args.logging = {"tensorboard": False}
    assert common.log_settings(args) == {"tensorboard_dir": None}
