"""Take of several models the one that scores best: its files, and why it is.

Reads   --candidate  NODE=DIR, repeated: model folder
        --score      NODE=PATH, for each: an eval's scores, or metrics.jsonl
        --recipe     YAML of one `best:` node
Writes  --out        the files of the best; choice.json: by, best, ranking (node, score)
Raises  DataError where a candidate has no score, or one that is not finite
Resumes never: it copies one folder, as clones where the file system makes them.

    python -m scripts.best --candidate grpo/a=A --candidate grpo/b=B \\
        --score grpo/a=SCORES --score grpo/b=SCORES --recipe R.yaml --out work/try
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.ranking import ranked
from scripts.lib.schema import BestRecipe


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = cli.parser(__doc__)
    for name in ("--candidate", "--score"):
        flags.add_argument(name, action="append", required=True, metavar="NODE=PATH")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, BestRecipe)
    models, paths = cli.named_paths(args.candidate), cli.named_paths(args.score)
    if not set(recipe.candidates) == set(models) == set(paths):
        raise RecipeError("--candidate, --score", "not those that the recipe names")
    scores = [(id, score_of(id, paths[id][0], recipe)) for id in recipe.candidates]
    is_loss = recipe.by.startswith("metrics.") and "loss" in recipe.by
    try:
        found = ranked(scores, lowest=is_loss)
    except ValueError as error:
        raise DataError(recipe.by, str(error)) from error
    best = found[0][0]
    shutil.copytree(models[best][0], args.out, copy_function=clone, dirs_exist_ok=True)
    ranking = [{"node": id, "score": score} for id, score in found]
    choice = {"by": recipe.by, "best": best, "ranking": ranking}
    (args.out / "choice.json").write_text(json.dumps(choice, indent=1) + "\n")
    print(f"{best} {found[0][1]}")
    return 0


def score_of(id: str, path: Path, recipe: BestRecipe) -> float:
    """The score of a candidate. Raises DataError where the file has none."""
    kind, _, key = recipe.by.partition(".")
    try:
        if kind == "metrics":
            last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            return number(last, key)
        path, task = path / "scores.json", key.partition(".")[2]
        found = json.loads(path.read_text(encoding="utf-8"))["scores"]
        model = recipe.scored.get(id, id)
        rows = [row for row in found if (row["model"], row["task"]) == (model, task)]
        if not rows:
            raise DataError(str(path), f"has no score of {model} on {task}")
        return number(rows[0], "score")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(str(path), f"not of its form: {error!r}") from error


def number(row: dict[str, Any], key: str) -> float:
    """A row's number of this key. Raises ValueError where there is none."""
    if isinstance(row.get(key), bool) or not isinstance(row.get(key), int | float):
        raise ValueError(f"no number {key}; there are: {', '.join(row)}")
    return float(row[key])


def clone(source: str, target: str) -> str:
    """Copy a file within the kernel, which shares its blocks where it can."""
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
    except OSError:
        shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    cli.run(main)
