"""Write what is generated into a Markdown file: graph, versions, config reference.

    python -m scripts.lib.docs README.md

It replaces what stands between the lines `<!-- graph -->` and `<!-- end of graph -->`,
and so with `versions` and `reference`.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scripts.lib import cli, graph, identity
from scripts.lib.errors import UserError
from scripts.lib.graph import DATA_OF
from scripts.lib.plan import DEFAULT
from scripts.lib.schema import (
    Budget,
    ClusterPlacement,
    Container,
    Data,
    EnvironmentRecipe,
    Filter,
    Generation,
    Logging,
    Machine,
    Mlflow,
    Peft,
    Placement,
    Released,
    Task,
    Wandb,
)
from scripts.lib.stages import STAGES
from scripts.nvidia.versions import table as of_lock

KEEP = (
    "Any node may say `keep: true`: `make clean` then frees no version of it, nor of "
    "what that was made from. Changing this reruns nothing."
)


def kind_of(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return ""
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, map(kind_of, args)))
    if origin is dict:
        return f"mapping of {kind_of(args[1])}"
    if origin is list:
        return f"{kind_of(args[0])} or list of them"
    if hasattr(annotation, "__metadata__"):
        return kind_of(annotation.__origin__)
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    if annotation is Any:
        return "anything"
    kinds = (EnvironmentRecipe, Generation, Filter, Mlflow, Peft, Released, Wandb)
    if annotation in kinds:
        return "mapping"
    return str(getattr(annotation, "__name__", annotation)).lower()


def default_of(field: FieldInfo) -> str:
    """A key's default as YAML, `required`, or nothing."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return ""  # its description says
    if field.default is None or field.default == {}:
        return ""
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(model: type[BaseModel], only: set[str] | None = None) -> list[str]:
    """A model's keys, or some, as a Markdown table, required ones first."""
    fields = [(f.alias or n, f) for n, f in model.model_fields.items()]
    fields = [(n, f) for n, f in fields if f.description and n in (only or {n})]
    fields.sort(key=lambda item: not item[1].is_required())
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        kind = kind_of(field.annotation).replace("|", "\\|")
        rows.append(
            f"| `{name}` | {kind} | {default_of(field)} | {field.description} |"
        )
    return rows


def summary(model: type[BaseModel]) -> str:
    """A model's docstring, or the one of the recipe it extends."""
    for one in model.__mro__:
        if one.__dict__.get("__doc__"):
            return inspect.cleandoc(str(one.__doc__))
    return ""


def reference() -> str:
    """The whole reference as Markdown."""
    parts: list[str] = [KEEP, ""]
    sections: list[tuple[str, type[BaseModel]]] = [("data", Data)]
    sections += [(name, stage.node) for name, stage in STAGES.items()]
    for name, model in sections:
        parts += [f"#### `{name}:`", "", summary(model), "", *table(model), ""]
        if name == "eval":
            parts += ["Each of `tasks`:", "", *table(Task), ""]
        if name == "sft":
            parts += [f"`peft:` {summary(Peft)}", "", *table(Peft), ""]
        if name == "export":
            parts += [
                f"`generation:` {summary(Generation)}",
                "",
                *table(Generation),
                "",
            ]
        if name == "grpo":
            parts += ["Each of `environment`:", "", *table(EnvironmentRecipe), ""]
        if name == "rollouts":
            parts += [f"`filter:` {summary(Filter)}", "", *table(Filter), ""]
        if name in DATA_OF:
            parts += [f"`from:` as a mapping: {summary(Released)}", ""]
            parts += [*table(Released), ""]
    parts += ["#### `logging:`", "", summary(Logging), "", *table(Logging), ""]
    for key, own in (("wandb", Wandb), ("mlflow", Mlflow)):
        parts += [f"`{key}:` {summary(own)}", "", *table(own), ""]
    parts += ["#### `placement:`", "", summary(Placement), ""]
    parts += ["By stage, then node; `default` at either level is the base.", ""]
    parts += [*table(Placement), "", "#### `budget:`", "", summary(Budget), ""]
    parts += [*table(Budget), "", "#### `slurm/cluster.yaml`", ""]
    parts += ["Where a cluster differs: `--profile slurm` reads it.", ""]
    for key, model in (("container", Container), ("machine", Machine)):
        parts += [f"`{key}:` {summary(model)}", "", *table(model), ""]
    parts += ["`placement:` over the config's, level by level, with further keys:", ""]
    further = set(ClusterPlacement.model_fields) - set(Placement.model_fields)
    return "\n".join([*parts, *table(ClusterPlacement, further)])


def mermaid() -> str:
    """The default config's graph as a Mermaid drawing."""
    nodes = graph.build(DEFAULT).nodes.values()
    lines = [f'  {n.dvc}["{n.stage}<br><b>{n.name}</b>"]' for n in nodes]
    lines += [
        f"  {parent.replace('/', '-')} --> {n.dvc}"
        for n in nodes
        for parent in n.parents
        if n.stage != "report" or parent.startswith("eval/")
    ]
    return "\n".join(["```mermaid", "graph LR", *lines, "```"])


def versions() -> str:
    """What the engine nvidia was tried with, as its lock says."""
    return of_lock(*identity.locks_of("nvidia"))


def main(argv: list[str] | None = None) -> int:
    """Write or check the file."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("file", type=Path)
    flags.add_argument("--check", action="store_true", help="only say if it is current")
    args = flags.parse_args(argv)
    text = args.file.read_text()
    new = text
    written = (("graph", mermaid), ("versions", versions), ("reference", reference))
    for name, write in written:
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = new.partition(start)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise UserError(str(args.file), f"lacks the lines {start} and {end}")
        new = f"{before}{start}\n{write()}\n{end}{after}"
    if args.check and new != text:
        raise UserError(
            str(args.file), "what is generated in it is out of date", "run `make docs`"
        )
    if not args.check:
        args.file.write_text(new)
    return 0


if __name__ == "__main__":
    cli.run(main)
