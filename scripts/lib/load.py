"""Read a config: YAML with overlays, validated, every error with file and line."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, Union

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from scripts.lib.errors import UserError
from scripts.lib.schema import Cluster, Config

Key = tuple[str, ...]
Model = TypeVar("Model", bound=pydantic.BaseModel)
SHOWN_ERRORS = 10
NODE_DEPTH = 2
"""Keys down to a node: its stage and its name."""


SLOW = ("&", "!", "<<", "%", "\t", "\x85", "\u2028", "\u2029", "\ufeff")
"""What the quick reader leaves to the other: anchors, tags, merges, directives, and
characters that YAML 1.1 and 1.2 see differently.
"""


class ConfigError(UserError):
    """What is wrong with a config, at its file, line and key."""


class Lines:
    """Where each key of a config stands: {key: (file, line)}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at: dict[Key, tuple[Path, int]] = {}
        self.made: dict[Key, Key] = {}
        """Of a node that is not in the config itself: the key that made it."""
        self.varied: dict[Key, dict[str, Any]] = {}
        """Of a node of a sweep: its values of what is varied."""

    def where(self, *key: str) -> str:
        """`file:line key` of the key, or of the nearest one above it."""
        if made_by := self.made.get(key[:2]):
            swept = (*made_by, "sweep", ".".join(key[2:]))
            of_best = (*made_by, "best") if key[2:] == made_by[2:] else swept
            key = of_best if of_best in self.at else (*made_by, *key[2:])
        for length in range(len(key), 0, -1):
            if key[:length] in self.at:
                path, line = self.at[key[:length]]
                return f"{path}:{line} {'.'.join(key)}"
        return f"{self.path} {'.'.join(key)}".rstrip()


class Section(dict[str, Any]):
    """A mapping of a file, and the line where each of its keys stands, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


class _Unusual(Exception):
    """Something that the quick reader does not know."""


class _Quick:
    """Reads plain YAML by the C parser, ten times as fast as the one for all of it."""

    def __init__(self) -> None:
        self.yaml = YAML(typ="safe")
        made = self.yaml.constructor
        self.scalars: dict[str, Callable[[ScalarNode], Any]] = {
            "null": lambda node: None,
            "bool": made.construct_yaml_bool,
            "int": made.construct_yaml_int,
            "float": made.construct_yaml_float,
            "str": made.construct_scalar,
        }

    def read(self, text: str) -> Section | None:
        """The document; None where it is not plain, or wrong."""
        if any(part in text for part in SLOW):
            return None
        try:
            found = self.made(self.yaml.compose(text))
        except (YAMLError, ValueError, _Unusual):
            return None
        return found if isinstance(found, Section) else None

    def made(self, node: Node) -> Any:
        """What a node stands for."""
        if isinstance(node, MappingNode):
            section = Section()
            for key_node, value in node.value:
                key = self.made(key_node)
                if not isinstance(key, str) or key in section:
                    raise _Unusual
                section[key] = self.made(value)
                section.lines[key] = key_node.start_mark.line
            return section
        if isinstance(node, SequenceNode):
            return [self.made(one) for one in node.value]
        kind = str(getattr(node, "tag", "")).rpartition(":")[2]
        if not isinstance(node, ScalarNode) or kind not in self.scalars:
            raise _Unusual
        return self.scalars[kind](node)


def _read(path: Path) -> Section:
    try:
        text = path.read_text(encoding="utf-8")
        if (quick := _Quick().read(text)) is not None:
            return quick
        loaded = YAML(typ="rt").load(text)
    except FileNotFoundError as error:
        raise ConfigError(
            str(path), "no such file", "name a config with --configfile"
        ) from error
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"not UTF-8 at byte {error.start}") from error
    except DuplicateKeyError as error:
        mark, problem = error.problem_mark, str(error.problem).splitlines()[0]
        raise ConfigError(
            f"{path}:{mark.line + 1}",
            f"two nodes or keys with one name: {problem}",
            "rename one of them",
        ) from error
    except MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark
        line = f":{found.line + 1}" if found else ""
        raise ConfigError(
            f"{path}{line}",
            f"not YAML: {error.problem or error.context}",
            "check the indentation, quotes and brackets up to that line",
        ) from error
    except YAMLError as error:
        raise ConfigError(str(path), f"not YAML: {error}") from error
    if loaded is None:
        loaded = CommentedMap()
    if not isinstance(loaded, CommentedMap):
        raise ConfigError(str(path), "not a mapping", "see config/config.yaml")
    return _section(loaded)


def _section(loaded: CommentedMap) -> Section:
    found = Section()
    for key, value in loaded.items():
        inner = isinstance(value, CommentedMap)
        found[str(key)] = _section(value) if inner else _plain(value)
        position = (loaded.lc.data or {}).get(key) or (loaded.lc.line,)
        found.lines[str(key)] = position[0]
    return found


def _plain(value: Any) -> Any:
    """Ruamel's scalars and containers as Python's own."""
    if isinstance(value, CommentedMap):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, CommentedSeq):
        return [_plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _overlay(
    base: dict[str, Any], top: Section, path: Path, lines: Lines, at: Key = ()
) -> None:
    """Lay `top` over `base`, in place: mappings merge, null deletes, the rest wins.

    Where nothing is below, an empty section or node stays, with its defaults.
    """
    for key, value in top.items():
        here = (*at, key)
        lines.at[here] = path, top.lines[key] + 1
        if value is None and key in base:
            del base[key]
        elif value is None and len(here) <= NODE_DEPTH:
            base[key] = {}
        elif isinstance(value, Section):
            below = base.get(key)
            base[key] = below if isinstance(below, dict) else {}
            _overlay(base[key], value, path, lines, here)
        else:
            base[key] = value


def read_config(path: Path) -> tuple[dict[str, Any], Lines, list[Path]]:
    """The config and what it extends as one mapping, its lines, the files read.

    Raises ConfigError for what cannot be read or extends itself.
    """
    chain: list[tuple[Path, Section]] = []
    current = path
    while True:
        document = _read(current)
        chain.append((current, document))
        extends = document.pop("extends", None)
        if extends is None:
            break
        current = Path(os.path.relpath(Path(current.parent, str(extends))))
        if current.parts[0] == "..":
            raise ConfigError(str(path), f"extends {extends}: outside of the project")
        if current.resolve() in [p.resolve() for p, _ in chain]:
            raise ConfigError(str(path), f"extends itself through {current}")
    merged: dict[str, Any] = {}
    lines = Lines(path)
    for file, document in reversed(chain):
        _overlay(merged, document, file, lines)
    return merged, lines, [p for p, _ in chain]


def models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The pydantic models an annotation may hold, through dicts and unions."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (dict, list, Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in models_in(a)]
    if hasattr(annotation, "__metadata__"):
        return models_in(typing.get_args(annotation)[0])
    return []


def _allowed_keys(
    loc: tuple[str | int, ...], model: type[pydantic.BaseModel]
) -> list[str]:
    """The keys the schema has where `loc` points into."""
    for part in loc:
        field = next(
            (f for n, f in model.model_fields.items() if (f.alias or n) == part), None
        )
        inner = models_in(field.annotation) if field else []
        if inner:
            model = inner[0]
    return [f.alias or n for n, f in model.model_fields.items()]


def nearest(word: str, words: list[str]) -> str:
    """A hint at the nearest of `words`, or at all of them."""
    close = difflib.get_close_matches(word, words, 1, 0.5)
    guess = f"did you mean `{close[0]}`? " if close else ""
    return f"{guess}there are: {', '.join(words) or 'none'}"


def explain(error: Any, lines: Lines, model: type[pydantic.BaseModel]) -> str:
    """One of pydantic's errors as where, what, and the way out."""
    loc = tuple(str(p) for p in error["loc"])
    kind, found = error["type"], error.get("input")
    shown = f"{found!r}"[:80]
    if kind == "extra_forbidden":
        keys = _allowed_keys(error["loc"][:-1], model)
        hint = nearest(loc[-1], keys).replace("there are", "Keys")
        return f"{lines.where(*loc)}: unknown key\n\nhint: {hint}"
    if kind == "missing":
        return (
            f"{lines.where(*loc)}: missing\n\n"
            f"hint: add `{loc[-1]}:`; the README's config reference describes it"
        )
    if kind == "string_pattern_mismatch" and loc[-1] == "[key]":
        return (
            f"{lines.where(*loc[:-1])}: {shown} cannot name a node\n\n"
            "hint: lower case letters, digits and _, a letter first"
        )
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{lines.where(*loc)}: {message}; found {shown}"


def load_config(path: Path) -> tuple[Config, Lines, list[Path]]:
    """The validated config, where its keys stand, and the files it was read from.

    Raises ConfigError naming every mistake the schema can see.
    """
    from scripts.lib.sweep import expand

    merged, lines, files = read_config(path)
    expand(merged, lines)
    return validated(Config, merged, lines), lines, files


def load_cluster(path: Path) -> tuple[Cluster, Lines]:
    """The validated description of a cluster, and where its keys stand."""
    merged, lines, _ = read_config(path)
    return validated(Cluster, merged, lines), lines


def validated(model: type[Model], found: Any, lines: Lines, *at: str) -> Model:
    """What is found in a config at a key, as its model. Raises ConfigError."""
    try:
        return model.model_validate(found)
    except pydantic.ValidationError as invalid:
        errors = invalid.errors()
        for error in errors:
            error["loc"] = (*at, *error["loc"])
        said = [*dict.fromkeys(explain(e, lines, model) for e in errors)]
        shown = said[:SHOWN_ERRORS]
        if len(said) > SHOWN_ERRORS:
            shown.append(f"and {len(said) - SHOWN_ERRORS} more")
        raise ConfigError(*_split("\n".join(shown))) from invalid


def _split(text: str) -> tuple[str, str]:
    where, _, what = text.partition(": ")
    return where, what
