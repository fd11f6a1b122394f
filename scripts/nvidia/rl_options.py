"""List what NeMo-RL can be told, for the checks before a build.

The machine that plans a build has no NeMo-RL, so the names and types of its
settings are kept in git: `scripts.lib.rl_options` reads them. Run this where NeMo-RL
can be imported, with its examples beside it (its container, or a checkout), when its
version changes:

    python -m scripts.nvidia.rl_options envs/nemo-rl-options.json

Reads   nemo_rl's classes and the configs it ships; needs no GPU
Writes  JSON, sorted: versions; algorithms {algorithm: {dotted key: type}}. A key that
        only a config has takes the type of its value; a null alone says nothing: Any
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from scripts.nvidia.options import BAR, together, type_text

CONFIGS = {
    "grpo": ("grpo_math_1B.yaml", "grpo_math_1B_megatron.yaml"),
    "dpo": ("dpo.yaml",),
    "rm": ("rm.yaml",),
}
"""Each algorithm of `nemo_rl.algorithms` and the configs that it ships with."""

BOTH = {"Literal[True]", "Literal[False]"}
"""Of a switch that chooses between two classes: each knows one position."""

READ = {
    "policy.generation.vllm_cfg.enable_prefix_caching": "bool",
    "policy.sequence_packing.fuse_loss": "bool",
}
"""What grpo reads, though neither a class nor those configs know it."""

Texts = dict[str, set[str]]


def members(kind: Any) -> dict[str, Any]:
    """The keys of a TypedDict or of a pydantic model; none of anything else."""
    if typing.is_typeddict(kind):
        return typing.get_type_hints(kind)
    fields = getattr(kind, "model_fields", {})
    return {name: field.annotation for name, field in fields.items()}


def typed(annotation: Any, at: str, texts: Texts) -> None:
    """Add the keys that an annotation knows, with their types."""
    several = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for one in typing.get_args(annotation) if several else (annotation,):
        below = members(one)
        for name, inner in below.items():
            typed(inner, f"{at}.{name}" if at else name, texts)
        if not below:
            path = typing.get_origin(one) is os.PathLike
            text = "Path" if path else type_text(one, {})
            texts.setdefault(at, set()).update(BAR.split(text))


def shipped(value: Any, at: str, texts: Texts) -> None:
    """Add the keys of a config, with the types of their values."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            shipped(inner, f"{at}.{name}" if at else name, texts)
    elif isinstance(value, dict):
        texts.setdefault(at, set()).add("dict[str, Any]")
    else:
        text = "None" if value is None else type(value).__name__
        texts.setdefault(at, set()).add(text)


def joined(texts: set[str]) -> str:
    """Alternatives as one text; both positions of a switch are a bool."""
    if texts >= BOTH:
        texts = texts - BOTH | {"bool"}
    return together(texts)


def keys_of(algorithm: str, configs: list[Any]) -> dict[str, str]:
    """All that one algorithm can be told, by dotted key and type."""
    from nemo_rl.models.generation.megatron.config import MCoreGenerationSpecificArgs
    from nemo_rl.models.generation.vllm.config import VllmConfig

    known: Texts = {}
    module = importlib.import_module(f"nemo_rl.algorithms.{algorithm}")
    typed(module.MasterConfig, "", known)
    at = "policy.generation"
    if algorithm == "grpo":  # the class of `policy` names only what generators share
        typed(VllmConfig, at, known)
        typed(MCoreGenerationSpecificArgs, f"{at}.mcore_generation_config", known)
        known.update({key: {text} for key, text in READ.items()})
    else:
        known = {k: v for k, v in known.items() if not k.startswith(f"{at}.")}
    found: Texts = {}
    for config in configs:
        shipped(config, "", found)
    for key, texts in found.items():
        if key not in known:
            known[key] = {"Any"} if texts == {"None"} else texts
        elif "None" in texts:
            known[key].add("None")
    return {key: joined(texts) for key, texts in known.items()}


def options() -> dict[str, Any]:
    """All that NeMo-RL can be told, by algorithm."""
    import nemo_rl
    from nemo_rl.package_info import __shortversion__
    from nemo_rl.utils.config import load_config, register_omegaconf_resolvers
    from omegaconf import OmegaConf

    register_omegaconf_resolvers()
    examples = Path(nemo_rl.__file__).parents[1] / "examples" / "configs"
    algorithms = {
        algorithm: keys_of(
            algorithm,
            [
                OmegaConf.to_container(load_config(examples / name), resolve=True)
                for name in names
            ],
        )
        for algorithm, names in CONFIGS.items()
    }
    return {"versions": {"nemo-rl": __shortversion__}, "algorithms": algorithms}


def main(argv: list[str] | None = None) -> int:
    """Write the options to the file named."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m scripts.nvidia.rl_options FILE.json", file=sys.stderr)
        return 2
    text = json.dumps(options(), indent=0, sort_keys=True)
    Path(arguments[0]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
