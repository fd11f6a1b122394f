"""What eval on vLLM asks of vLLM, and what it refuses before anything slow starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from scripts.lib.errors import DataError, RecipeError, UserError
from scripts.lib.schema import EvalRecipe, Placement
from scripts.nvidia import common, versions
from scripts.nvidia import eval as stage

ROOT = Path(__file__).parents[2]
TASK = ROOT / "config/tasks/arithmetic.yaml"
TINY = ROOT / "config/models/tiny/config.json"
ITEM = {"input": "1 + 1", "output": "2"}
ROW = {"input": "1 + 1", "expected": "2", "answer": "2", "right": True}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Variables that a stage sets end with its test."""
    with patch.dict(os.environ):
        yield


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Flags of a whole run: two models, one task."""
    words = ["--recipe", str(write(tmp_path / "recipe.yaml", {"num_samples": 1}))]
    words += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    for name in ("base", "tuned"):
        write(tmp_path / name / "config.json", {"model_type": "llama"})
        words += ["--model", f"{name}={tmp_path / name}"]
    data = write(tmp_path / "rows.jsonl", ITEM)
    return [*words, "--task", f"sums={TASK}", "--data", f"sums={data}"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """An interpreter that has just what the lock pins, to be changed."""
    found: dict[str, str | None] = dict(versions.pins(stage.LOCK))
    monkeypatch.setattr(stage, "has_module", lambda name: True)
    monkeypatch.setattr(
        versions, "installed", lambda names: {name: found[name] for name in names}
    )
    return found


def parsed(argv: list[str], *flags: str) -> Any:
    return stage.parser("").parse_args([*argv, *flags])


# ---- start -----------------------------------------------------------------------


def test_flags_left_out_are_the_placements_defaults(argv: list[str]):
    args, default = parsed(argv), Placement()
    assert args.tensor_parallel == default.tensor_parallel
    assert args.generation_memory == default.generation_memory


def test_the_runners_flags_are_taken(argv: list[str]):
    words = ["--tensor-parallel", "2", "--generation-memory", "0.3", "--gpus", "4"]
    args = parsed(argv, *words)
    assert (args.tensor_parallel, args.generation_memory, args.gpus) == (2, 0.3, 4)


def test_nothing_heavy_is_imported_at_the_start():
    heavy = "{'torch', 'transformers', 'lm_eval', 'vllm', 'datasets', 'scipy'}"
    code = f"import sys, scripts.nvidia.eval; print({heavy} & set(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert said.stdout.strip() == "set()", said.stdout + said.stderr


@pytest.mark.parametrize(
    ("module", "what"),
    [("vllm", "no vLLM"), ("lm_eval", "no lm-evaluation-harness")],
)
def test_without_vllm_the_way_out_is_named(
    argv: list[str], module: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "has_module", lambda name: name != module)
    with pytest.raises(UserError) as error:
        stage.main(argv)
    assert (error.value.where, error.value.what) == (sys.executable, what)
    for way in ("placement.eval", "python", "container", "eval: transformers"):
        assert way in error.value.hint


@pytest.mark.parametrize("name", stage.PINNED)
def test_another_version_than_the_locks_is_refused(
    argv: list[str], name: str, installed: dict[str, str | None]
):
    installed[name] = "9.9"
    with pytest.raises(UserError, match=rf"pins {name} .*; here it is 9\.9"):
        stage.main(argv)


def test_a_builds_mark_is_no_other_version(
    argv: list[str], installed: dict[str, str | None]
):
    installed["vllm"] = f"{installed['vllm']}+cu130"
    stage.check(parsed(argv))


def test_more_parts_than_gpus_are_refused(
    argv: list[str], installed: dict[str, str | None]
):
    with pytest.raises(UserError, match="tensor_parallel: 4, but gpus: 2"):
        stage.main([*argv, "--tensor-parallel", "4", "--gpus", "2"])


def test_a_model_with_code_of_its_own_is_refused_before_any_is_asked(
    argv: list[str],
    installed: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    (tmp_path / "tuned/modeling_own.py").touch()
    with pytest.raises(RecipeError, match=r"tuned: brings code .*: modeling_own\.py"):
        stage.main(argv)


def test_code_is_a_file_or_a_key_that_names_one(tmp_path: Path):
    common.refuse_code(write(tmp_path / "a/config.json", {}).parent)
    own = write(tmp_path / "b/config.json", {"auto_map": {"AutoConfig": "x.Y"}}).parent
    with pytest.raises(RecipeError, match=r"auto_map in config\.json"):
        common.refuse_code(own)
    with pytest.raises(RecipeError, match=r"no readable config\.json"):
        common.refuse_code(tmp_path)


# ---- a process a model -----------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The command lines of the models' processes, which answer at once."""
    lines: list[list[str]] = []

    def run(line: list[str], check: bool) -> Any:
        lines.append(line)
        write(tmp_path / "work/answers.json", {"sums": [ROW]})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return lines


def test_each_model_has_a_process_and_all_are_in_the_scores(
    argv: list[str],
    installed: dict[str, str | None],
    children: list[list[str]],
    tmp_path: Path,
):
    assert stage.main(argv) == 0
    assert [line[-2:] for line in children] == [["--only", "base"], ["--only", "tuned"]]
    for line in children:
        start = line.index("scripts.nvidia.eval")
        assert line[0] == sys.executable and line[start + 1 : -2] == argv
    scores = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert [(s["model"], s["num_right"]) for s in scores] == [("base", 1), ("tuned", 1)]
    samples = (tmp_path / "out/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in samples] == ["base", "tuned"]


def test_a_models_process_runs_the_code_that_this_one_does(
    argv: list[str],
    installed: dict[str, str | None],
    children: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(safe_path=True))
    assert stage.main(argv) == 0
    assert all("-P" in line for line in children)


@pytest.mark.parametrize("code", [1, 2, -signal.SIGKILL])
def test_a_model_that_fails_ends_the_run_as_it_ended(
    argv: list[str],
    installed: dict[str, str | None],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
):
    sent: list[int] = []
    done = SimpleNamespace(returncode=code)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    with pytest.raises(SystemExit) as end:
        stage.main(argv)
    assert end.value.code == code
    assert sent == ([-code] if code < 0 else [])


def test_the_answers_of_a_run_before_are_not_taken(
    argv: list[str],
    installed: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    write(tmp_path / "work/answers.json", {"sums": [ROW]})
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FileNotFoundError):
        stage.main(argv)


# ---- what vLLM is told -----------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder: the tiny model's config.json and some tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "model"
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    made.save_pretrained(path)
    write(path / "config.json", json.loads(TINY.read_text()) | {"dtype": "float32"})
    return path


def test_what_vllm_is_given(folder: Path, argv: list[str]):
    recipe = EvalRecipe(batch_size=7, max_new_tokens=100)
    flags = ["--tensor-parallel", "2", "--generation-memory", "0.3"]
    assert stage.arguments(folder, recipe, parsed(argv, *flags)) == {
        "pretrained": str(folder),
        "dtype": "float32",
        "max_model_len": json.loads(TINY.read_text())["max_position_embeddings"],
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.3,
        "max_num_seqs": 7,
        "batch_size": "auto",
        "tokenizer_mode": "hf",
        "trust_remote_code": False,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }


def test_a_long_models_whole_length_is_not_asked_of_the_gpu(
    folder: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "longest_of", lambda folder: 1_000_000)
    recipe = EvalRecipe(max_new_tokens=2000)
    given = stage.arguments(folder, recipe, parsed(argv))
    assert given["max_model_len"] == stage.PROMPT_TOKENS + 2000


def test_an_answer_as_long_as_the_model_is_refused(folder: Path, argv: list[str]):
    whole = stage.longest_of(folder)
    with pytest.raises(RecipeError, match=f"takes {whole} tokens, with the prompt"):
        stage.arguments(folder, EvalRecipe(max_new_tokens=whole), parsed(argv))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": None}, "auto"),
    ],
)
def test_the_numbers_are_of_the_type_that_the_folder_names(
    config: dict[str, Any], dtype: str, tmp_path: Path
):
    assert stage.dtype_of(write(tmp_path / "config.json", config).parent) == dtype


def test_greedy_answers_follow_the_folders_generation_config(tmp_path: Path):
    assert stage.generation_of(tmp_path) == {}
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": []}
    sampling = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": 1}
    path = write(tmp_path / "generation_config.json", neutral | sampling)
    assert stage.generation_of(tmp_path) == {}
    write(path, {"repetition_penalty": 1.05, "min_new_tokens": 3})
    passed = {"repetition_penalty": 1.05, "min_tokens": 3}
    assert stage.generation_of(tmp_path) == passed


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_beams", 4), ("no_repeat_ngram_size", 3), ("suppress_tokens", [5])],
)
def test_what_vllm_would_leave_out_is_refused(key: str, value: Any, tmp_path: Path):
    write(tmp_path / "generation_config.json", {key: value})
    with pytest.raises(RecipeError, match=rf"{key}: .* which vLLM does not know"):
        stage.generation_of(tmp_path)


# ---- how it asks and reads -------------------------------------------------------


class FakeVLLM:
    """The methods of the harness' VLLM that ours goes through."""

    max_length = 20

    def __init__(self, **given: Any) -> None:
        if given["gpu_memory_utilization"] > 0.9:
            raise ValueError("no memory for the cache")

    @staticmethod
    def modify_gen_kwargs(kwargs: dict[str, Any], eos: str) -> Any:
        return {"temperature": 0.0}, [*kwargs["until"], eos], 8

    def tok_encode(self, texts: list[str]) -> list[list[str]]:
        return [list(text) for text in texts]

    def apply_chat_template(self, chat: Any) -> str:
        raise AssertionError("tells templates of enable_thinking")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return [found.outputs[0].text for found in self._model_generate()]

    def _model_generate(self) -> list[Any]:
        text = "2</s>"  # vLLM's own text
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=(2, 1))])]


class FakeHFLM:
    def apply_chat_template(self, chat: Any) -> str:
        return "as Transformers"

    def tok_decode(self, tokens: list[int]) -> str:
        return "".join(str(token) for token in tokens if token > 1)


Opened = Callable[..., Any]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, folder: Path, argv: list[str]) -> Opened:
    """A model as eval opens it, on a harness without vLLM."""
    for name, fake in (("VLLM", FakeVLLM), ("HFLM", FakeHFLM)):
        module: Any = ModuleType(name)
        setattr(module, name, fake)
        file = {"VLLM": "vllm_causallms", "HFLM": "huggingface"}[name]
        monkeypatch.setitem(sys.modules, f"lm_eval.models.{file}", module)

    def open_model(*flags: str) -> Any:
        return stage.vllm(folder, EvalRecipe(max_new_tokens=8), parsed(argv, *flags))

    return open_model


def requests(*prompts: str) -> list[Any]:
    return [SimpleNamespace(args=(prompt, {})) for prompt in prompts]


def test_chats_are_rendered_and_answers_read_as_with_transformers(opened: Opened):
    model = opened()
    assert model.apply_chat_template([]) == "as Transformers"
    assert model.generate_until(requests("1 + 1")) == ["2"]


def test_an_empty_stop_is_dropped_and_the_folders_penalty_kept(
    opened: Opened, folder: Path
):
    write(folder / "generation_config.json", {"repetition_penalty": 1.1})
    kwargs, until, count = opened().modify_gen_kwargs({"until": ["", "\n"]}, eos="</s>")
    assert kwargs == {"temperature": 0.0, "repetition_penalty": 1.1}
    assert (until, count) == (["\n", "</s>"], 8)


def test_a_prompt_that_would_be_cut_here_alone_is_refused(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(DataError, match="a prompt of 13 tokens; vLLM is given 12"):
        opened().generate_until(requests("short", "1" * 13))
    monkeypatch.setattr(stage, "longest_of", lambda folder: 20)
    assert opened().generate_until(requests("1" * 13)) == ["2"]  # cut by both


def test_what_vllm_refuses_says_which_placement_helps(opened: Opened, folder: Path):
    with pytest.raises(UserError) as error:
        opened("--generation-memory", "0.95")
    assert error.value.where == str(folder)
    assert error.value.what == "vLLM refuses it: no memory for the cache"
    assert "generation_memory" in error.value.hint


def test_a_models_process_ends_at_once_with_its_code(monkeypatch: pytest.MonkeyPatch):
    import ctypes

    asked: list[tuple[int, ...]] = []
    libc = SimpleNamespace(prctl=lambda *given: asked.append(given))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(common, "finish", lambda code: asked.append((code,)))

    def refuse() -> int:
        raise RecipeError("here", "wrong")

    stage.run_alone(lambda: 0)
    stage.run_alone(refuse)
    assert [given for given in asked if len(given) == 1] == [(0,), (1,)]
    assert asked[0][:2] == (1, signal.SIGKILL)
