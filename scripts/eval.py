"""Score models on held-out tasks with lm-evaluation-harness (CPU or one GPU).

All models answer the same items, greedily, through their chat template. A task file
is read as plain data: what would run code or fetch anything is refused.

Reads   --model   NAME=DIR, repeated: Hugging Face folder
        --task    NAME=FILE, repeated: task file (YAML), scored by exact_match
        --data    NAME=PATH, repeated: the task's rows (input, output), as a .jsonl
                  file or a folder with some
        --recipe  YAML of one `eval:` node
Writes  --out     scores.json: confidence, and a score (share right, 0 to 1) with its
                  Wilson interval for each model and task; samples.jsonl
Raises  RecipeError for flags that do not match and for a refused task file;
        DataError for rows without input or output
Resumes never: it starts anew. The same inputs give the same bytes.

    python -m scripts.eval --model base=B --model instruct=I \\
        --task arithmetic=config/tasks/arithmetic.yaml --data arithmetic=D \\
        --recipe R.yaml --out work/try
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from scripts.lib import cli
from scripts.lib.errors import AttestError, DataError, RecipeError
from scripts.lib.schema import EvalRecipe

Items = list[dict[str, str]]
Rows = list[dict[str, Any]]
Tasks = dict[str, tuple[dict[str, Any], Items]]
Open = Callable[[Path, EvalRecipe, argparse.Namespace], Any]
"""Opens a folder as the harness's model."""
Ask = Callable[
    [str, Path, Tasks, EvalRecipe, argparse.Namespace], Iterable[tuple[str, Rows]]
]
"""Has a model, by its name and folder, answer the tasks, one after another."""

TASK_KEYS = {
    "task",
    "task_alias",
    "output_type",
    "dataset_path",
    "test_split",
    "description",
    "doc_to_text",
    "doc_to_target",
    "target_delimiter",
    "generation_kwargs",
    "metric_list",
    "filter_list",
    "metadata",
}
METRIC_KEYS = {
    "metric",
    "aggregation",
    "higher_is_better",
    "ignore_case",
    "ignore_punctuation",
    "ignore_numbers",
    "regexes_to_ignore",
}
GENERATION_KEYS = {"do_sample", "until", "max_gen_toks", "temperature"}
FILTERS = {
    "regex",
    "remove_whitespace",
    "take_first",
    "lowercase",
    "uppercase",
    "map",
    "majority_vote",
    "take_first_k",
}


def refuse_unknown(where: str, keys: Any, known: set[str]) -> None:
    """Raise for the first key that is not known to be plain data."""
    for key in keys:
        if key not in known:
            raise RecipeError(
                f"{where} {key}", "not allowed", f"allowed: {', '.join(sorted(known))}"
            )


def load_task(path: Path) -> dict[str, Any]:
    """A task file as plain data; refuses tags, code, and remote data."""
    try:
        task = YAML(typ="safe", pure=True).load(path)
    except (OSError, YAMLError) as error:
        raise RecipeError(str(path), f"cannot be read: {error}") from error
    if not isinstance(task, dict):
        raise RecipeError(str(path), "not a task file")
    refuse_unknown(str(path), task, TASK_KEYS)
    wanted = {"output_type": "generate_until", "dataset_path": "json"}
    for key, value in wanted.items():
        if task.get(key) != value:
            raise RecipeError(f"{path} {key}", f"{task.get(key)!r}, not {value!r}")
    for key in ("doc_to_text", "doc_to_target"):
        if not isinstance(task.get(key), str):
            raise RecipeError(f"{path} {key}", "not text")
    metrics = task.get("metric_list") or []
    if [metric.get("metric") for metric in metrics] != ["exact_match"]:
        raise RecipeError(f"{path} metric_list", "must be exact_match, and only that")
    refuse_unknown(f"{path} metric_list", metrics[0], METRIC_KEYS)
    if metrics[0].setdefault("aggregation", "mean") != "mean":
        raise RecipeError(f"{path} metric_list aggregation", "must be mean")
    generation = task.setdefault("generation_kwargs", {"until": []})
    refuse_unknown(f"{path} generation_kwargs", generation, GENERATION_KEYS)
    if "" in (generation.get("until") or []):
        raise RecipeError(f"{path} generation_kwargs until", "an empty text stops all")
    if generation.get("do_sample") or generation.get("temperature"):
        raise RecipeError(f"{path} generation_kwargs", "answers must be greedy")
    filters = task.get("filter_list") or []
    if len(filters) > 1:
        raise RecipeError(f"{path} filter_list", "must be one filter")
    for step in (step for item in filters for step in item["filter"]):
        refuse_unknown(f"{path} filter_list function", [step["function"]], FILTERS)
    return task


def read_items(path: Path, limit: int | None) -> Items:
    """Rows of a task's data: a .jsonl file, or those of a folder, sorted by name."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    items = []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                items.append({"input": row["input"], "output": row["output"]})
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}:{number}", f"not an item: {error!r}"
                ) from error
    if not items:
        raise DataError(str(path), "holds no items", "give .jsonl rows")
    return items[:limit]


def single(flag: str, values: list[str]) -> dict[str, Path]:
    """NAME=PATH flags where each name stands once."""
    result = {}
    for name, paths in cli.named_paths(values).items():
        if len(paths) > 1:
            raise RecipeError(f"{flag} {name}", "given twice")
        result[name] = paths[0]
    return result


def task_object(name: str, task: dict[str, Any], items: Items, args: Any) -> Any:
    """The harness's task on exactly these items."""
    from lm_eval.api.task import ConfigurableTask

    file = args.work / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    split = task.get("test_split", "test")
    config = task | {
        "task": name,
        "test_split": split,
        "dataset_kwargs": {
            "data_files": {split: str(file)},
            "cache_dir": str(args.work / "datasets"),
        },
        "num_fewshot": 0,
    }
    return ConfigurableTask(config=config)


def answers(
    model: Any,
    name: str,
    task: dict[str, Any],
    items: Any,
    recipe: EvalRecipe,
    args: Any,
) -> Rows:
    """Each item as the model answered it, in the items' order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[task_object(name, task, items, args)],
        task_manager=TaskManager(include_defaults=False),
        batch_size=recipe.batch_size,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": recipe.max_new_tokens, "do_sample": False},
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [
        {
            "input": sample["doc"]["input"],
            "expected": str(sample["target"]),
            "answer": str(sample["filtered_resps"][0]),
            "right": bool(sample["exact_match"] == 1),
        }
        for sample in samples
    ]


def digest(rows: Rows) -> str:
    """Digest of the items that were asked, in order."""
    asked = json.dumps([[row["input"], row["expected"]] for row in rows])
    return hashlib.sha256(asked.encode()).hexdigest()


def interval(num_right: int, num_items: int, confidence: float) -> list[float]:
    """Wilson's interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(num_right, num_items).proportion_ci(confidence, method="wilson")
    return [float(found.low), float(found.high)]


def hugging_face(folder: Path, recipe: EvalRecipe, args: argparse.Namespace) -> Any:
    """A folder as the harness's model, run by Transformers."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    )
    if model.generation_config is not None:  # else it would count, not the recipe's
        model.generation_config.max_new_tokens = None
    return HFLM(
        pretrained=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        batch_size=recipe.batch_size,
    )


def use_sandbox() -> None:
    """Have the harness render a task's templates where they cannot reach Python."""
    import lm_eval.utils
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters.update(lm_eval.utils.env.filters)
    lm_eval.utils.env = sandbox


def ask_here(
    open_model: Open,
    name: str,
    folder: Path,
    tasks: Tasks,
    recipe: EvalRecipe,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Rows]]:
    """A model's answers to each task; it is open until the last is taken."""
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    use_sandbox()
    model = open_model(folder, recipe, args)
    for task_name, (task, items) in tasks.items():
        yield task_name, answers(model, task_name, task, items, recipe, args)


def evaluate(
    models: dict[str, Path],
    tasks: Tasks,
    recipe: EvalRecipe,
    args: argparse.Namespace,
    ask: Ask,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores and samples of all models on all tasks."""
    scores, samples = [], []
    for model_name, folder in models.items():
        for task_name, rows in ask(model_name, folder, tasks, recipe, args):
            asked = [item["input"] for item in tasks[task_name][1]]
            if [row["input"] for row in rows] != asked:
                raise AttestError(
                    f"{model_name} on {task_name}", "was not asked these items"
                )
            num_right = sum(row["right"] for row in rows)
            scores.append(
                {
                    "model": model_name,
                    "task": task_name,
                    "score": num_right / len(rows),
                    "interval": interval(num_right, len(rows), recipe.confidence),
                    "num_right": num_right,
                    "num_items": len(rows),
                    "items_digest": digest(rows),
                }
            )
            samples += [
                {"model": model_name, "task": task_name, **row}
                for row in rows[: recipe.num_samples]
            ]
            print(f"{model_name} {task_name} {num_right}/{len(rows)}", flush=True)
    return scores, samples


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The stage's flags, whatever runs the models."""
    flags = cli.parser(doc)
    for name, help_text in (
        ("--model", "NAME=DIR"),
        ("--task", "NAME=FILE"),
        ("--data", "NAME=PATH of the task of that name"),
    ):
        flags.add_argument(name, action="append", required=True, help=help_text)
    return flags


def load(args: argparse.Namespace) -> tuple[dict[str, Path], Tasks, EvalRecipe]:
    """What the flags name: models, tasks with their items, the recipe.

    The harness is told to fetch nothing, so this comes before its import.
    """
    recipe = cli.load_recipe(args.recipe, EvalRecipe)
    models, files = single("--model", args.model), single("--task", args.task)
    data = single("--data", args.data)
    if set(files) != set(data):
        raise RecipeError("--data", "names other tasks than --task does")
    tasks = {
        name: (load_task(file), read_items(data[name], recipe.limit))
        for name, file in files.items()
    }
    args.work = args.work.resolve()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(args.work / "datasets")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return models, tasks, recipe


def write_scores(
    models: dict[str, Path],
    tasks: Tasks,
    recipe: EvalRecipe,
    args: argparse.Namespace,
    ask: Ask,
) -> int:
    """Ask all models, write what came of it."""
    scores, samples = evaluate(models, tasks, recipe, args, ask)
    for task in tasks:
        if len({s["items_digest"] for s in scores if s["task"] == task}) != 1:
            raise AttestError(task, "models were asked different items")
    (args.out / "scores.json").write_text(
        json.dumps({"confidence": recipe.confidence, "scores": scores}, indent=1) + "\n"
    )
    with open(args.out / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    args = cli.parse(parser(__doc__), argv)
    models, tasks, recipe = load(args)
    return write_scores(models, tasks, recipe, args, partial(ask_here, hugging_face))


if __name__ == "__main__":
    cli.run(main)
