"""Make an export ready to upload: its files with a model card of the hub's form.

The card tells what the model was made of and how, as its lineage has it, and what it
scores. A build adds provenance.json, by which the folder is checked alone.

Reads   --model       Hugging Face folder of an export
        --provenance  its provenance.json, with the lineage in it
        --scores      EVAL=DIR, repeated: scores of it, and of other models
        --recipe      YAML of one `release:` node
Writes  --out         the export's files, linked where they are protected; README.md
Raises  RecipeError for a provenance without a lineage, and for weights that are pickled
Resumes never: it takes seconds.

    python -m scripts.release --model M --provenance P.json --scores eval/a=S \\
        --recipe R.yaml --out work/try
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scripts.lib import cli
from scripts.lib.errors import RecipeError
from scripts.lib.schema import ReleaseRecipe

TEMPLATE = Path(__file__).parent / "templates/release.md.j2"
CARD = "README.md"
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
USED_FOR = {
    "tokenizer": "the tokenizer",
    "tokenize": "pretraining",
    "pack": "fine-tuning",
    "preferences": "preferences",
    "prompts": "reinforcement learning",
}
SEEN = {"sft": "rows", "dpo": "pairs", "rm": "pairs", "grpo": "completions"}
Row = dict[str, Any]
"""A node's record in a lineage."""


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    flags = cli.parser(__doc__)
    flags.add_argument("--model", type=Path, required=True, help="an export's folder")
    flags.add_argument("--provenance", type=Path, required=True, help="its record")
    flags.add_argument("--scores", action="append", default=[], metavar="EVAL=DIR")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, ReleaseRecipe)
    made = json.loads(args.provenance.read_text(encoding="utf-8"))
    if "lineage" not in made:
        raise RecipeError(str(args.provenance), "carries no lineage", "export it again")
    rows = [*made["lineage"], own_row(made)]
    scores = [*read_scores(cli.named_paths(args.scores))]
    place_files(args.model, args.out)
    card = write_card(recipe, args.model, rows, scores)
    (args.out / CARD).write_text(card, encoding="utf-8")
    return 0


def own_row(made: dict[str, Any]) -> Row:
    """The export's own record, as its lineage has those of its ancestors."""
    return {
        **made,
        "outs": {},
        "counts": {},
        "seed": None,
        "tokens": None,
        "made": made,
    }


def read_scores(folders: dict[str, list[Path]]) -> Iterator[dict[str, Any]]:
    """All scores of all evals, each with its eval's node and confidence."""
    for id, paths in folders.items():
        found = json.loads((paths[0] / "scores.json").read_text(encoding="utf-8"))
        for score in found["scores"]:
            yield {**score, "eval": id, "confidence": found["confidence"]}


def place_files(model: Path, out: Path) -> None:
    """Have the model's files in `out`: the same ones where nobody can edit them."""
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        if path.suffix in PICKLED:
            raise RecipeError(str(path), "pickled, which runs code as it is loaded")
        target = out / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o222:
                raise PermissionError("an edit of one would change the other")
            os.link(path.resolve(), target)
        except OSError:  # or another file system
            shutil.copyfile(path, target)


# ---- the card --------------------------------------------------------------------


def write_card(
    recipe: ReleaseRecipe, model: Path, rows: list[Row], scores: list[dict[str, Any]]
) -> str:
    """The model card: what the hub reads, then what people do."""
    name = rows[-1]["node"]
    title = recipe.title or name.partition("/")[2]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    kind = [*config.get("architectures", []), config.get("dtype", "dtype not stated")]
    taken = chosen(rows)
    sources = list(datasets(taken, recipe.sources))
    stages = [training(row, taken) for row in taken if "steps" in row["recipe"]]
    about = {
        "recipe": recipe,
        "title": title,
        "architecture": ", ".join(kind),
        "context": config.get("max_position_embeddings"),
        "num_parameters": num_parameters(model),
        "has_chat": (model / "chat_template.jinja").exists(),
        "has_adapter": (model / "adapter").exists(),
        "generation": generation(model),
        "sources": sources,
        "unlicensed": [
            *["the base"] * bool(recipe.base and not recipe.base.license),
            *(s["name"] for s in sources if s["license"] is None),
        ],
        "stages": stages,
        "longest": max((s["length"] for s in stages if s["length"]), default=None),
        "scores": scores,
        "name": name,
        "rows": [lineage(row) for row in rows],
        "dirty": any((row["made"] or {}).get("git_dirty") for row in rows),
        "packages": sorted({p for row in rows for p in row["packages"].items()}),
        "definition": [
            f for r in taken for f in r["inputs"] if f.endswith("config.json")
        ],
        "seconds": sum((row["made"] or {}).get("seconds") or 0 for row in rows),
        "gpu_hours": sum((row["made"] or {}).get("gpu_hours") or 0 for row in rows),
    }
    environment = jinja2.Environment(  # noqa: S701 - Markdown, which escapes otherwise
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": cell, "share": share, "time": duration}
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(about)
    head = metadata(recipe, title, sources, about["has_chat"], scores, name)
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body.strip()}\n"))


def metadata(
    recipe: ReleaseRecipe,
    title: str,
    sources: list[dict[str, Any]],
    has_chat: bool,
    scores: list[dict[str, Any]],
    name: str,
) -> ModelCardData:
    """The card's front matter: what the hub filters and shows."""
    base = recipe.base
    own = [score for score in scores if score["model"] == name]
    other = recipe.license_link is not None
    return ModelCardData(
        model_name=title,
        license="other" if other else recipe.license,
        license_name=recipe.license if other else None,
        license_link=recipe.license_link,
        language=recipe.language,
        base_model=base.hf if base and base.revision else None,
        datasets=list(dict.fromkeys(s["hub"] for s in sources if s["hub"])) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*(recipe.tags or []), *["conversational"] * has_chat])],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=score["task"],
                dataset_name=f"{score['task']} ({score['eval']})",
                dataset_args={"num_items": score["num_items"]},
                metric_type="exact_match",
                metric_name="exact match",
                metric_value=score["score"],
                metric_args={
                    "confidence": score["confidence"],
                    "interval": score["interval"],
                },
            )
            for score in own
        ]
        or None,
    )


def datasets(
    rows: list[Row], told: dict[str, dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Each dataset that the model was made of, with what the config tells of it."""
    uses: dict[str, list[str]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        stage = row["node"].partition("/")[0]
        for name, entry in row["recipe"].get("sources", {}).items():
            uses.setdefault(name, []).append(USED_FOR.get(stage, stage))
            entries.setdefault(name, entry)
    by_node = {row["node"]: row["recipe"] for row in rows}
    for name, entry in entries.items():
        note = told.get(name, {})
        hub = entry["hf"] if entry.get("revision") else None
        made = by_node.get(f"generate/{name}")
        sampled = by_node.get(f"rollouts/{name}")
        if made is not None:
            where = f"generated by the build: {made['count']:,} {made['kind']}"
        elif sampled is not None:
            where = f"{sampled['kind']} of a model's own answers, sampled by the build"
        elif hub:
            where = (
                f"[{hub}](https://huggingface.co/datasets/{hub}) at {entry['revision']}"
            )
        else:
            where = note.get("url", "the builder's own files")
        yield {
            "name": name,
            "uses": dict.fromkeys(uses[name]),
            "hub": hub,
            "where": where,
            "generated": made is not None or sampled is not None,
            "license": "generated" if made or sampled else note.get("license"),
            "description": note.get("description", ""),
        }


def chosen(rows: list[Row]) -> list[Row]:
    """The records of what the model came of: not of what `best` did not take."""
    by_node = {row["node"]: row for row in rows}
    found: set[str] = set()
    todo = [rows[-1]["node"]]
    while todo:
        node = todo.pop()
        if node in found or node not in by_node:
            continue
        found.add(node)
        row = by_node[node]
        for path, md5 in row["inputs"].items():
            if not node.startswith("best/") or md5 in row["outs"].values():
                todo.append("/".join(path.split("/")[1:3]))
    return [row for row in rows if row["node"] in found]


def training(row: Row, rows: list[Row]) -> dict[str, Any]:
    """A trained stage: its method, steps, what it saw, its learning rate."""
    stage, recipe = row["node"].partition("/")[0], row["recipe"]
    data = {r["node"]: r["recipe"] for r in rows}
    above = [data.get("/".join(path.split("/")[1:3]), {}) for path in row["inputs"]]
    length = longest(stage, recipe, above)
    seen = f"{recipe['steps'] * recipe['batch_size']:,} {SEEN.get(stage, 'sequences')}"
    if row["tokens"]:
        seen = f"{row['tokens']:,} tokens"
    elif length:
        seen += f" of up to {length:,} tokens"
    schedule = recipe.get("lr_scheduler", "")
    return {
        "node": row["node"],
        "method": method(stage, recipe),
        "steps": recipe["steps"],
        "batch_size": recipe["batch_size"],
        "seen": seen,
        "length": length,
        "lr": f"{recipe['lr']:g} {schedule}".strip(),
    }


def longest(stage: str, recipe: Row, above: list[Row]) -> int | None:
    """Tokens of the longest text that a stage may have trained on."""
    if stage == "grpo":
        prompt = max(data.get("max_prompt_tokens", 0) for data in above)
        whole = prompt + recipe["max_completion_tokens"]
        return int(recipe.get("max_conversation_tokens") or whole)
    keys = ("sequence_length", "max_tokens")
    found = [data.get(key) for data in (recipe, *above) for key in keys]
    return max(filter(None, found), default=None)


def method(stage: str, recipe: dict[str, Any]) -> str:
    """How a stage trains, in a few words."""
    if stage == "grpo":
        names = ", ".join(recipe.get("environment", {"math": {}}))
        return f"{recipe.get('algorithm', 'grpo').upper()}, rewards: {names}"
    if stage == "dpo":
        return f"DPO, beta {recipe.get('beta', 0):g}"
    if stage == "sft":
        peft = recipe.get("peft")
        kinds = {"lora": "LoRA", "dora": "DoRA"}
        how = f"{kinds[peft['method']]}, rank {peft['rank']}" if peft else "all weights"
        return f"SFT, {how}"
    return {"rm": "reward model", "pretrain": "pretraining, from scratch"}.get(
        stage, stage
    )


def lineage(row: Row) -> dict[str, Any]:
    """A node's line in the lineage; the export's own digest is in its record."""
    made = row["made"] or {}
    content = [md5 for md5 in row["outs"].values() if md5.endswith(".dir")]
    return {
        "node": row["node"],
        "content": content[0][:8] if content else "this folder",
        "commit": str(made.get("git_commit") or "none")[:8]
        + "+" * bool(made.get("git_dirty")),
        "seed": row["seed"],
        "seconds": made.get("seconds"),
        "gpu_hours": made.get("gpu_hours"),
    }


def num_parameters(model: Path) -> int:
    """Numbers in the weights, as the files' headers count them."""
    total = 0
    for path in model.glob("*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total


def generation(model: Path) -> dict[str, Any]:
    """How generation_config.json says to answer."""
    path = model / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    told = {k: v for k, v in found.items() if not k.endswith("_token_id")}
    return {k: v for k, v in told.items() if k != "transformers_version"}


def cell(value: object) -> str:
    """A value as it may stand in a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """A time as one would say it."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    cli.run(main)
