"""Sweeps: one node of the config that stands for a grid of them.

`sweep: {lr: [1.0e-5, 2.0e-5]}` on a node that trains makes one node a value, or a
combination of values, named after them: `reasoner_lr_1em5`. So a value that is added
makes a node and changes none. What names the sweep as its parent is made once for each
of its nodes, and an eval that names one becomes an eval for each model it names.

`from: {best: reasoner, by: sums}` makes a node of stage `best`, `reasoner_by_sums`.

All of it happens on the config as it was read, before the schema sees it: from there on
these are nodes like others.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from decimal import Decimal
from typing import Any

import pydantic

from scripts.lib.load import ConfigError, Key, Lines, models_in, nearest, validated
from scripts.lib.schema import Chosen
from scripts.lib.stages import CANDIDATES, MODELS, PARENTS, STAGES, STARTED

SWEPT = tuple(name for name, stage in STAGES.items() if stage.trains)
"""Stages whose nodes can say `sweep`."""
FOLLOWING = (*SWEPT, "export", "release")
"""Those, and stages whose nodes are made for each node of a sweep they start from."""
OPEN = ("environment", "overrides")
"""Keys below which the schema knows no names."""
LARGEST = 1000
LONGEST_NAME = 100
Values = dict[str, Any]


def expand(merged: dict[str, Any], lines: Lines) -> None:
    """Replace each sweep by its nodes, in place.

    Raises ConfigError for what is no sweep. What is no mapping, or names nothing, is
    left to the schema and to the graph.
    """
    _Expansion(merged, lines).run()


class _Expansion:
    def __init__(self, merged: dict[str, Any], lines: Lines) -> None:
        self.merged, self.lines = merged, lines
        self.sections: dict[str, dict[str, Any]] = {
            stage: merged[stage]
            for stage in STAGES
            if isinstance(merged.get(stage), dict)
        }
        self.grids: dict[Key, dict[str, tuple[Values, Values]]] = {}
        """The nodes of each sweep: {name: (the node, what is varied of it)}."""
        self.rules: dict[str, tuple[list[str], str]] = {}
        """What the best are taken of, and by which scores, by the node's name."""
        self.open: list[Key] = []

    def run(self) -> None:
        for stage in STARTED:
            for name, node in self.nodes(stage):
                self.choose(stage, name, node)
        for stage in FOLLOWING:
            for name, _ in self.nodes(stage):
                self.grid(stage, name)
        of = {"best": CANDIDATES, "eval": MODELS, "report": ("eval",)}
        for stage, kinds in of.items():
            for name, node in self.nodes(stage):
                self.name_each(stage, name, node, kinds)
        for (stage, name), grid in self.grids.items():
            if grid:
                self.replace(stage, name, grid)

    def nodes(self, stage: str) -> list[tuple[str, Values]]:
        found = self.sections.get(stage, {}).items()
        return [(name, node) for name, node in found if isinstance(node, dict)]

    def error(self, key: Key, what: str, hint: str = "") -> ConfigError:
        return ConfigError(self.lines.where(*key), what, hint)

    def find(self, name: object, stages: tuple[str, ...]) -> Key | None:
        """The node that `name` means, as the graph will find it."""
        if not isinstance(name, str):
            return None
        for stage in reversed(stages):
            if name in self.sections.get(stage, {}):
                return stage, name
        of, _, alone = name.partition("/")
        is_there = of in stages and alone in self.sections.get(of, {})
        return (of, alone) if is_there else None

    def each(self, given: object, stages: tuple[str, ...]) -> Any:
        """The names in a list of nodes, a sweep's nodes instead of the sweep."""
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list) or not all(isinstance(n, str) for n in given):
            return given
        names = []
        for one in given:
            found = self.find(one, stages)
            grid = self.grids.get(found, {}) if found else {}
            names += (
                [f"{found[0]}/{name}" for name in grid] if found and grid else [one]
            )
        return names

    def replace(self, stage: str, name: str, grid: dict[str, Any]) -> None:
        """Put a sweep's nodes in its place."""
        section = self.sections[stage]
        if taken := [n for n in grid if n in section or (stage, n) in self.grids]:
            raise self.error(
                (stage, taken[0]),
                f"{name} is a sweep that makes a node of this name",
                "rename one of them",
            )
        before = [*section.items()]
        section.clear()
        for key, node in before:
            if key != name:
                section[key] = node
                continue
            for made, (its, varied) in grid.items():
                section[made] = its
                self.lines.made[stage, made] = stage, name
                self.lines.varied[stage, made] = varied

    # ---- a node that trains, or starts from such ----------------------------------

    def grid(self, stage: str, name: str) -> dict[str, tuple[Values, Values]]:
        """The nodes that a node stands for; none where it is itself."""
        id = (stage, name)
        if id in self.open:
            circle = [*self.open[self.open.index(id) :], id]
            said = " <- ".join("/".join(one) for one in circle)
            raise self.error((*id, "from"), f"a cycle: {said}")
        if id not in self.grids:
            self.open.append(id)
            self.grids[id] = self.made(stage, name)
            self.open.pop()
        return self.grids[id]

    def made(self, stage: str, name: str) -> dict[str, tuple[Values, Values]]:
        node = self.sections[stage][name]
        if not isinstance(node, dict):
            return {}
        found: dict[str, tuple[Values, Values]] = {}
        own = self.own(stage, name, node)
        kinds = PARENTS if stage in STARTED else ("export",)
        for suffix, varied in own:
            one = with_values(node, varied)
            if isinstance(given := node.get("environment"), str):
                one["environment"] = {given: {}, **as_mapping(one["environment"])}
            parent = self.find(one.get("from"), kinds)
            above = self.grid(*parent) if parent and parent[0] in FOLLOWING else {}
            if parent and above:
                for its_name, (_, its) in above.items():
                    after = its_name.removeprefix(parent[1])
                    twice = {
                        f"{name}.{k}" if k in its else k: v for k, v in varied.items()
                    }
                    started = {**one, "from": f"{parent[0]}/{its_name}"}
                    found[f"{name}{after}{suffix}"] = started, its | twice
            elif suffix:
                if f"{name}{suffix}" in found:
                    what = f"two combinations make one name: {name}{suffix}"
                    raise self.error((stage, name, "sweep"), what, "other values")
                found[f"{name}{suffix}"] = one, varied
            self.check_size(stage, name, len(found))
        if len(longest := max(found, key=len, default="")) > LONGEST_NAME:
            raise self.error(
                (stage, name),
                f"a node's name would be {longest}",
                "fewer keys, or shorter values",
            )
        return found

    def check_size(self, stage: str, name: str, size: int) -> None:
        if size > LARGEST:
            raise self.error(
                (stage, name, "sweep"),
                f"a grid of {size:,} nodes or more",
                f"at most {LARGEST:,}: fewer values, or several sweeps",
            )

    def own(self, stage: str, name: str, node: Values) -> list[tuple[str, Values]]:
        """A node's own combinations of values, with the end of each one's name."""
        at = (stage, name, "sweep")
        if stage not in SWEPT or "sweep" not in node:
            return [("", {})]
        lists = node["sweep"]
        if not isinstance(lists, dict) or not lists:
            raise self.error(
                at, f"{lists!r} varies nothing", "lists by key: {lr: [1.0e-5, 2.0e-5]}"
            )
        for key, values in lists.items():
            self.check_key(at, stage, key)
            self.check_values((*at, key), values)
        self.check_size(stage, name, math.prod(map(len, lists.values())))
        return [
            (
                "".join(
                    f"_{slug(key.rpartition('.')[2])}_{slug(value)}"
                    for key, value in zip(lists, values, strict=True)
                ),
                dict(zip(lists, values, strict=True)),
            )
            for values in itertools.product(*lists.values())
        ]

    def check_key(self, at: Key, stage: str, key: str) -> None:
        """Raise where the schema has no such key for a node of this stage."""
        model: type[pydantic.BaseModel] = STAGES[stage].node
        path, known = path_of(key), [""]
        for depth, part in enumerate(path):
            fields = {f.alias or n: f for n, f in model.model_fields.items()}
            fields.pop("sweep", None)
            known = [".".join([*path[:depth], one]) for one in fields]
            inner = models_in(fields[part].annotation) if part in fields else []
            if part in fields and (part in OPEN or depth + 1 == len(path)):
                return
            if not inner:
                break
            model = inner[0]
        hint = nearest(key, known).replace("there are", "Keys")
        raise self.error((*at, key), "unknown key", hint)

    def check_values(self, at: Key, values: object) -> None:
        """Raise where these are not several values, each a name's worth."""
        if not isinstance(values, list) or not values:
            raise self.error(at, f"{values!r} is no list of values", "[1.0e-5, 2.0e-5]")
        seen: dict[str, Any] = {}
        for value in values:
            if not isinstance(value, bool | int | float | str) or not slug(value):
                raise self.error(
                    at,
                    f"{value!r} is no value",
                    "each is a number, a text, true or false",
                )
            if (name := slug(value)) in seen:
                raise self.error(
                    at,
                    f"{seen[name]!r} and {value!r} make one name: {name}",
                    "keep one",
                )
            seen[name] = value

    # ---- what names several nodes --------------------------------------------------

    def choose(self, stage: str, name: str, node: Values) -> None:
        """Have a `best:` node in the place of `from: {best: ..., by: ...}`."""
        given = node.get("from")
        if not isinstance(given, dict) or not {"best", "by"} & {*given}:
            return
        at = (stage, name, "from")
        chosen = validated(Chosen, given, self.lines, *at)
        of = "_or_".join(one.rpartition("/")[2] for one in chosen.best)
        made = slug(f"{of}_by_{re.sub('^eval[./]', '', chosen.by)}")
        if len(made) > LONGEST_NAME:
            raise self.error(
                at,
                f"would make a node named {made}",
                "make one in `best:`, and name it",
            )
        section = self.merged.setdefault("best", {})
        if not isinstance(section, dict):
            return
        self.sections["best"] = section
        best = {"from": chosen.best, "by": chosen.by}
        if made in section and ("best", made) not in self.lines.made:
            raise self.error(
                ("best", made), f"{stage}.{name}.from makes this too", "rename this one"
            )
        by = re.sub("^eval[./]", "", chosen.by)
        rule = [one.rpartition("/")[2] for one in chosen.best], by
        if self.rules.setdefault(made, rule) != rule:
            other = ".".join(self.lines.made["best", made])
            what = f"makes best/{made}, and so does {other}, otherwise"
            raise self.error(at, what, "make one in `best:`, and name it")
        section[made] = best
        self.lines.made["best", made] = at
        node["from"] = f"best/{made}"

    def name_each(
        self, stage: str, name: str, node: Values, kinds: tuple[str, ...]
    ) -> None:
        """Name a sweep's nodes instead of the sweep; of an eval, make one for each."""
        if (given := node.get("from")) is None:
            return
        named = self.each(given, kinds)
        node["from"] = named
        if stage != "eval" or named in (given, [given]):
            return
        grid = {}
        for model in dict.fromkeys(named):
            found = self.find_made(model)
            after = found[0] if found else str(model).rpartition("/")[2]
            varied = found[1] if found else {}
            grid[f"{name}_{after}"] = {**node, "from": [model]}, varied
        self.grids[stage, name] = grid

    def find_made(self, id: str) -> tuple[str, Values] | None:
        """Of a sweep's node its name and what is varied of it."""
        stage, _, name = id.partition("/")
        for (of, _), grid in self.grids.items():
            if of == stage and name in grid:
                return name, grid[name][1]
        return None


def with_values(node: Values, varied: Values) -> Values:
    """A copy of a node with these settings."""
    one = copy.deepcopy({k: v for k, v in node.items() if k != "sweep"})
    for key, value in varied.items():
        *above, last = path_of(key)
        place = one
        for part in above:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    return one


def as_mapping(value: Any) -> Values:
    """Settings; none where it is a name alone."""
    return value if isinstance(value, dict) else {}


def path_of(key: str) -> list[str]:
    """A key of a sweep as the keys that lead to it.

    Those of `overrides` have dots themselves.
    """
    head, _, rest = key.partition(".")
    if head == "overrides":
        return [head, rest] if rest else [head]
    return key.split(".")


def slug(value: object) -> str:
    """A value as a part of a node's name: 1.0e-5 as 1em5, 0.04 as 0p04, -1 as m1."""
    text = str(value).lower()
    if isinstance(value, float):
        exact = Decimal(repr(value)).normalize() if math.isfinite(value) else 0
        small = value and not 1e-3 <= abs(value) < 1e6
        text = f"{exact:e}" if small else f"{exact:f}"
    if isinstance(value, int | float):
        text = text.replace("-", "m").replace("+", "").replace(".", "p")
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")
