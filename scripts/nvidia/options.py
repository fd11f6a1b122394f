"""List what Megatron-Bridge can be told, for the checks before a build.

The machine that plans a build has no Megatron-Bridge, so the names and types of
its settings are kept in git: `scripts.lib.bridge_options` reads them. Run this with
the training environment's Python when envs/nvidia.lock changes Bridge's version:

    python -m scripts.nvidia.options envs/nvidia-options.json

Reads   megatron.bridge as installed; needs no GPU
Writes  JSON, sorted: versions; sections {section: {field: type}} of ConfigContainer;
        enums {type: members}; recipes [names]; architectures [names of Hugging Face
        models that AutoBridge converts]
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import importlib.metadata
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("megatron-bridge", "megatron-core")
NOT_OF_TEXT = re.compile(
    r"vl(_|\d|$)|omni|audio|asr|flux|wan_|45v|step37|exaone4_?5|mi(ni)?stral3|vision|diffusion",
    re.IGNORECASE,
)
"""Recipes and providers for images, sound or video, which this build does not train."""

CALLABLE = (collections.abc.Callable, typing.Callable)

BAR = re.compile(r" \| (?![^\[]*\])")
"""Between alternatives, not between those inside of brackets."""

PREFIX = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")


def type_text(annotation: Any, enums: dict[str, list[str]]) -> str:
    """An annotation as short text, without modules: `float | None`."""
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, str):
        return PREFIX.sub("", " ".join(annotation.split()))
    if isinstance(annotation, typing.ForwardRef):
        return type_text(annotation.__forward_arg__, enums)
    if annotation in (Any, object):
        return "Any"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return together({type_text(a, enums) for a in arguments})
    if origin is typing.Literal:
        return f"Literal[{', '.join(repr(a) for a in arguments)}]"
    if annotation in CALLABLE or origin in CALLABLE:
        return "Callable"
    if origin in (list, dict, tuple, set):
        inner = ["..." if a is ... else type_text(a, enums) for a in arguments]
        return f"{origin.__name__}[{', '.join(inner)}]"
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum) and annotation.__module__ != "signal":
            enums[annotation.__name__] = sorted(annotation.__members__)
        return annotation.__name__
    return PREFIX.sub("", str(origin or annotation))


def together(texts: set[str]) -> str:
    """Alternatives as one text, each once, `None` last."""
    single = {one for text in texts for one in BAR.split(text)}
    if "Any" in single:
        return "Any"
    return " | ".join(sorted(single, key=lambda text: (text == "None", text)))


def hints(kind: type) -> dict[str, Any]:
    """Each field's annotation, evaluated where its own module lets it be."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        scope = vars(sys.modules[base.__module__])
        for name, annotation in inspect.get_annotations(base).items():
            if isinstance(annotation, str):
                with contextlib.suppress(NameError, TypeError, AttributeError):
                    # what cannot be evaluated is kept as text
                    annotation = eval(annotation, dict(scope))  # noqa: S307
            found[name] = annotation
    return found


def fields(kinds: list[type], enums: dict[str, list[str]]) -> dict[str, str]:
    """The settable fields of dataclasses together; where types differ, all of them."""
    texts: dict[str, set[str]] = {}
    for kind in kinds:
        annotations = hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and not field.name.startswith("_"):
                text = type_text(annotations.get(field.name, field.type), enums)
                texts.setdefault(field.name, set()).add(text)
    return {name: together(found) for name, found in texts.items()}


def below(kind: type) -> Iterator[type]:
    """A class and all that derive from it."""
    yield kind
    derived: type
    for derived in kind.__subclasses__():
        yield from below(derived)


def section_kinds() -> dict[str, list[type]]:
    """The dataclasses that a section of ConfigContainer may hold when training text."""
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig

    providers = dict.fromkeys([*below(GPTModelProvider), *below(HybridModelProvider)])
    several: dict[str, list[type]] = {
        "model": [
            kind
            for kind in providers
            if not NOT_OF_TEXT.search(f"{kind.__module__}.{kind.__name__}")
        ],
        "dataset": [GPTDatasetConfig, GPTSFTDatasetConfig],
        "peft": [LoRA, DoRA],
    }
    kinds = {}
    for name, annotation in typing.get_type_hints(ConfigContainer).items():
        held = [annotation, *typing.get_args(annotation)]
        single: list[type] = [k for k in held if isinstance(k, type)]
        single = [kind for kind in single if dataclasses.is_dataclass(kind)]
        chosen = several.get(name, single)
        if chosen and not name.endswith("_provider"):
            kinds[name] = chosen
    return kinds


def recipes() -> list[str]:
    """The recipe functions for text models that can be called without arguments."""
    import megatron.bridge.recipes as library

    names = []
    for name, member in inspect.getmembers(library, inspect.isfunction):
        signature = inspect.signature(member)
        returned = type_text(signature.return_annotation, {})
        needed = [
            p
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        family = member.__module__.removeprefix(library.__name__)
        text = not NOT_OF_TEXT.search(f"{family} {name}")
        if returned == "ConfigContainer" and not needed and text:
            names.append(name)
    return sorted(names)


def options() -> dict[str, Any]:
    """All that Bridge can be told, by name and type."""
    import megatron.bridge.recipes  # noqa: F401  # providers of every family
    from megatron.bridge import AutoBridge

    enums: dict[str, list[str]] = {}
    sections = {name: fields(kinds, enums) for name, kinds in section_kinds().items()}
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "sections": sections,
        "enums": enums,
        "recipes": recipes(),
        "architectures": sorted(AutoBridge.list_supported_models()),
    }


def main(argv: list[str] | None = None) -> int:
    """Write the options to the file named."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m scripts.nvidia.options FILE.json", file=sys.stderr)
        return 2
    text = json.dumps(options(), indent=0, sort_keys=True)
    Path(arguments[0]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
