"""How Megatron may split a model and its batch over GPUs: what it would refuse.

Each check says what Megatron-Core 0.19 or Megatron-Bridge 0.6 would say on the GPUs.
In megatron/core: `parallel_state.initialize_model_parallel` (products of sizes, a
virtual pipeline of one stage), `transformer/transformer_config.py` (attention heads,
query groups, experts), `tensor_parallel/layers.py` (matrices), `ssm/mamba_mixer.py`
and `ssm/mamba_context_parallel.py` (Mamba's heads and groups, its width with FP8),
`transformer/moe/moe_layer.py` (sequence parallelism), `transformer/transformer_block.py`
and `models/hybrid/hybrid_layer_allocation.py` (layers; a hybrid's pattern is split
evenly too), `pipeline_parallel/schedules.py` (micro-batches of a virtual pipeline). In
megatron/bridge: `models/hybrid/hybrid_provider.py` (no virtual pipeline for hybrids).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from scripts.lib.schema import Placement

Problem = tuple[str, str, str]
"""The key of the placement or of the node, what is wrong, what to do."""

OF_LAYERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OF_LAYERS |= {"mamba": "linear_attention", "attention": "full_attention"}
"""Letters of `hybrid_override_pattern`, and older names, as `layers_block_type` has."""

BLACKWELL = {"b100", "b200", "b300", "gb200", "gb300"}
BEFORE_FP8 = {"p100", "v100", "t4", "a10", "a16", "a30", "a40", "a100"}
"""Chips as Slurm's `gres` names them; of others, the script asks the GPU itself."""

FP8_MULTIPLE = 16

RL_CPUS = 4
"""Cores that NeMo-RL's actors of one GPU ask of Ray: two for its workers, and others."""

SMALL = 4e9
"""Parameters below which a dense model is trained by DTensor, where nothing is said."""


def problems(
    stage: str,
    placed: Placement,
    model: dict[str, Any] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    precision: str | None = None,
    peft: str | None = None,
) -> list[Problem]:
    """What Megatron would refuse of a node, the cause before what follows from it.

    `model` is the content of config.json where it is known. Sizes in tokens and
    sequences; None where a stage has none.
    """
    found = list(_of_machines(stage, placed))
    if not found:
        found += _of_batch(stage, placed, batch_size)
        found += _of_sequence(stage, placed, sequence_length)
        found += _of_model(stage, placed, model) if model else []
        found += _of_precision(placed, model, precision)
        found += _of_adapter(placed, model, peft)
    return found


def backend_of(stage: str, placed: Placement, model: dict[str, Any] | None) -> str:
    """What NeMo-RL trains a node with where its placement does not say.

    Reward models are DTensor's alone. Otherwise Megatron, which splits a model in more
    ways and knows Mamba and experts; a small dense model on few GPUs needs none of it,
    and DTensor starts without converting it.
    """
    if stage == "rm":
        return "dtensor"
    split = placed.pipeline_parallel * placed.context_parallel * placed.expert_parallel
    plain = model is not None and not has_experts(model) and not is_hybrid(model)
    small = model is not None and size_of(model) < SMALL
    return "dtensor" if plain and small and split == 1 else "megatron"


def has_experts(model: dict[str, Any]) -> bool:
    """Whether a model has layers of experts."""
    return any(
        model.get(k) for k in ("num_experts", "n_routed_experts", "num_local_experts")
    )


def is_hybrid(model: dict[str, Any]) -> bool:
    """Whether layers other than attention and MLP are among a model's."""
    return bool(model.get("hybrid_override_pattern") or model.get("layers_block_type"))


def size_of(model: dict[str, Any]) -> float:
    """About how many parameters a dense transformer of this config.json has."""
    width, layers = model.get("hidden_size", 0), model.get("num_hidden_layers", 0)
    inner, words = model.get("intermediate_size", 4 * width), model.get("vocab_size", 0)
    return float(layers * (4 * width * width + 3 * width * inner) + words * width)


def of_rl(
    stage: str, placed: Placement, model: dict[str, Any] | None
) -> Iterator[Problem]:
    """What NeMo-RL would refuse besides, of how it is placed."""
    if stage == "rm" and placed.backend == "megatron":
        yield "backend", "NeMo-RL has no reward models on Megatron", "backend: dtensor"
    if stage == "rm" and model is not None:
        yield from of_rm(model)
    if placed.backend == "dtensor" and model is not None and has_experts(model):
        what = "what dtensor saves of experts has other names than a model's folder"
        if stage == "rm":
            yield "from", what, "start from a model without experts"
        else:
            yield "backend", what, "backend: megatron"
    if placed.backend != "megatron":
        for key in ("pipeline_parallel", "expert_parallel", "expert_tensor_parallel"):
            if getattr(placed, key) > 1:
                yield key, f"{placed.backend} cannot split by it", "backend: megatron"
    if placed.virtual_pipeline is not None:
        yield "virtual_pipeline", "NeMo-RL has none", "leave it out"
    if placed.cpus < RL_CPUS:
        what = f"{placed.cpus}, but Ray starts NeMo-RL's workers on {RL_CPUS} at least"
        yield "cpus", what, f"cpus: {2 * RL_CPUS}"
    if stage == "grpo":
        yield from _of_generation(placed, model)


def of_rm(model: dict[str, Any]) -> Iterator[Problem]:
    """What a reward model cannot be made of, on either engine."""
    if is_hybrid(model):
        kind = model.get("model_type", "hybrid")
        what = (
            f"Transformers has no classifier of {kind} models, which an rm node needs"
        )
        yield "from", what, "start from a transformer: Llama, Qwen"


def of_peft(
    target_modules: list[str], model: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What PEFT cannot adapt: what is wrong, what to do."""
    for name in target_modules:
        if name.startswith("linear_"):
            yield f"{name} is Megatron's name", "Transformers' are q_proj, up_proj, ..."
        if name in ("out_proj", "conv1d") and is_hybrid(model):
            what = f"{name} of Mamba is fused into a kernel, which passes an adapter by"
            yield what, "leave it out"


def _of_generation(
    placed: Placement, model: dict[str, Any] | None
) -> Iterator[Problem]:
    apart, width = placed.generation_gpus, placed.generation_tensor_parallel
    if apart and placed.nodes > 1:
        what = f"{apart} of each machine, but NeMo-RL sets GPUs of one machine apart"
        yield "generation_gpus", what, "leave it out, or nodes: 1"
        return
    if apart and apart >= placed.gpus:
        yield "generation_gpus", f"{apart} of {placed.gpus} leave none to train", ""
        return
    generating = apart or placed.gpus
    if generating % width:
        yield (
            "generation_tensor_parallel",
            f"{width} does not divide the {generating} GPUs that generate on a machine",
            f"one of {divisors(generating)}",
        )
    yield from _of_vllm("generation_tensor_parallel", width, model or {})


def of_eval(placed: Placement, models: list[dict[str, Any]]) -> Iterator[Problem]:
    """What vLLM would refuse of how it is placed."""
    if not placed.gpus:
        yield "gpus", "eval on engine nvidia needs a GPU", "gpus: 1"
        return
    width = placed.tensor_parallel
    if width > placed.gpus:
        yield "tensor_parallel", f"{width}, but {placed.gpus} GPUs", f"{placed.gpus}"
        return
    for model in models:
        yield from _of_vllm("tensor_parallel", width, model)


def _of_vllm(key: str, width: int, model: dict[str, Any]) -> Iterator[Problem]:
    """Each GPU of vLLM holds whole attention heads."""
    heads = model.get("num_attention_heads")
    if isinstance(heads, int) and heads % width:
        what = f"num_attention_heads {heads} does not divide among {width}"
        yield key, what, f"one of {divisors(heads)}"


def is_sequence_parallel(placed: Placement) -> bool:
    """Whether it is, by its own key or by default."""
    if placed.sequence_parallel is None:
        return placed.tensor_parallel > 1
    return placed.sequence_parallel


def divisors(number: int, most: int = 12) -> str:
    """The numbers that divide it, the first few, as text."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found[:most])) + (", ..." if len(found) > most else "")


def _largest(placed: Placement, keys: tuple[str, ...]) -> str:
    return max(keys, key=lambda key: getattr(placed, key))


def _of_machines(stage: str, placed: Placement) -> Iterator[Problem]:
    if not placed.gpus:
        yield "gpus", f"{stage} on engine nvidia needs a GPU", "gpus: 1"
        return
    if placed.processes not in (None, placed.gpus):
        yield (
            "processes",
            f"{placed.processes}, but engine nvidia runs one a GPU",
            "leave it out",
        )
    tensor, pipeline = placed.tensor_parallel, placed.pipeline_parallel
    world = placed.nodes * placed.gpus
    gpus = f"{world} GPUs ({placed.nodes} machines x {placed.gpus})"
    keys = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    size = tensor * pipeline * placed.context_parallel
    if world % size:
        yield (
            _largest(placed, keys),
            f"tensor x pipeline x context parallel is {size}, which does not divide "
            f"{gpus}",
            f"a product of {divisors(world)}",
        )
    keys = ("expert_parallel", "expert_tensor_parallel", "pipeline_parallel")
    size = placed.expert_parallel * placed.expert_tensor_parallel * pipeline
    if world % size:
        yield (
            _largest(placed, keys),
            f"expert x expert tensor x pipeline parallel is {size}, which does not "
            f"divide {gpus}",
            f"a product of {divisors(world)}",
        )
    if placed.sequence_parallel and tensor == 1:
        yield (
            "sequence_parallel",
            "shares what tensor_parallel leaves, and that is 1",
            "leave it out, or raise tensor_parallel",
        )
    if placed.virtual_pipeline is not None and pipeline == 1:
        yield (
            "virtual_pipeline",
            "splits pipeline stages, and pipeline_parallel is 1",
            "leave it out, or raise pipeline_parallel",
        )


def _of_batch(
    stage: str, placed: Placement, batch_size: int | None
) -> Iterator[Problem]:
    if batch_size is None:
        return
    micro, pipeline = placed.micro_batch_size, placed.pipeline_parallel
    if stage == "sft" and micro > 1:
        yield (
            "micro_batch_size",
            f"{micro}, but a packed row holds many chats and is computed by itself",
            "micro_batch_size: 1; a longer sequence_length of its pack does the same",
        )
        return
    size = placed.tensor_parallel * pipeline * placed.context_parallel
    replicas = placed.nodes * placed.gpus // size
    once = micro * replicas
    if batch_size % replicas:
        key = "nodes" if placed.nodes > 1 else "gpus"
        what = f"{replicas} replicas of the model"
        fitting = f"a number of replicas of {divisors(batch_size)}"
    else:
        key = "micro_batch_size"
        what = f"{replicas} replicas of the model in micro-batches of {micro}"
        fitting = f"micro_batch_size of {divisors(batch_size // replicas)}"
    if batch_size % once:
        below = batch_size // once * once
        sizes = f"{below} or {below + once}" if below else f"{once}"
        yield (
            key,
            f"batch_size {batch_size} does not divide among {what}",
            f"{fitting}; or batch_size {sizes}",
        )
        return
    if placed.virtual_pipeline is not None:
        number = batch_size // once
        if number < pipeline or 0 < number % pipeline < pipeline:
            yield (
                "virtual_pipeline",
                f"batch_size {batch_size} is {number} micro-batches a replica, which "
                f"pipeline_parallel {pipeline} does not divide",
                "raise batch_size, lower micro_batch_size, or leave it out",
            )


def _of_sequence(
    stage: str, placed: Placement, sequence_length: int | None
) -> Iterator[Problem]:
    context, tensor = placed.context_parallel, placed.tensor_parallel
    if stage == "sft" and context > 1:
        yield (
            "context_parallel",
            f"{context}, but chats in a packed row are not padded to be split",
            "context_parallel: 1; raise tensor_parallel instead",
        )
    elif sequence_length is None:
        return
    elif context > 1 and sequence_length % (2 * context):
        yield (
            "context_parallel",
            f"sequence_length {sequence_length} does not divide into 2 x {context} "
            "parts",
            f"a sequence_length that is a multiple of {2 * context}",
        )
    elif is_sequence_parallel(placed) and sequence_length // context % tensor:
        key = "sequence_parallel" if placed.sequence_parallel else "tensor_parallel"
        yield (
            key,
            f"{sequence_length // context} tokens of a sequence do not divide among "
            f"{tensor} GPUs",
            f"a sequence_length that is a multiple of {tensor * context}, or "
            "sequence_parallel: false",
        )


class _Layers(NamedTuple):
    """A model's layers: how many, and of a hybrid of which kinds."""

    total: int | None
    kinds: frozenset[str] | None

    def may_have(self, kind: str) -> bool:
        return self.kinds is None or kind in self.kinds


def _layers(model: dict[str, Any]) -> _Layers:
    kinds = model.get("layers_block_type")
    pattern = model.get("hybrid_override_pattern")
    if kinds is None and isinstance(pattern, str):
        kinds = list(pattern.partition("/")[0].replace("|", ""))
    if isinstance(kinds, list):
        names = [str(kind) for kind in kinds]
        return _Layers(len(names), frozenset(OF_LAYERS.get(n, n) for n in names))
    return _Layers(model.get("num_hidden_layers"), None)


def num_experts(model: dict[str, Any]) -> int | None:
    """Experts of a layer that has them; None for a model without such layers."""
    if not _layers(model).may_have("moe"):
        return None
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if model.get(key):
            return int(model[key])
    return None


def _of_model(
    stage: str, placed: Placement, model: dict[str, Any]
) -> Iterator[Problem]:
    yield from _of_matrices(placed, model)
    yield from _of_mamba(placed, model)
    yield from _of_experts(stage, placed, model)
    yield from _of_layers(placed, model)


def _not_divided(key: str, size: int, name: str, value: int) -> Problem:
    return (
        key,
        f"{name} {value} does not divide among {size} GPUs",
        f"{key} of {divisors(value)}",
    )


def _of_matrices(placed: Placement, model: dict[str, Any]) -> Iterator[Problem]:
    tensor, layers = placed.tensor_parallel, _layers(model)
    heads = model.get("num_attention_heads")
    groups = model.get("num_key_value_heads") or heads
    if heads and heads % tensor:
        yield _not_divided("tensor_parallel", tensor, "num_attention_heads", heads)
    elif groups and groups % tensor and tensor % groups:
        yield (
            "tensor_parallel",
            f"{tensor} is neither a multiple nor a divisor of num_key_value_heads "
            f"{groups}",
            f"tensor_parallel of {divisors(groups)}",
        )
    names = ["vocab_size"] + ["intermediate_size"] * layers.may_have("mlp")
    names += ["moe_shared_expert_intermediate_size"] if num_experts(model) else []
    for name in names:
        if model.get(name) and model[name] % tensor:
            yield _not_divided("tensor_parallel", tensor, name, model[name])


def _of_mamba(placed: Placement, model: dict[str, Any]) -> Iterator[Problem]:
    if not _layers(model).may_have("linear_attention"):
        return
    tensor, context = placed.tensor_parallel, placed.context_parallel
    heads, groups = model.get("mamba_num_heads"), model.get("n_groups")
    if not heads or not groups:
        return
    for name, value in (("mamba_num_heads", heads), ("n_groups", groups)):
        if value % tensor:
            yield _not_divided("tensor_parallel", tensor, name, value)
            return
    heads, groups = heads // tensor, groups // tensor
    if heads % context:
        yield _not_divided(
            "context_parallel", context, "mamba_num_heads / tensor_parallel", heads
        )
    elif groups % context and context % groups:
        yield (
            "context_parallel",
            f"{context} is neither a multiple nor a divisor of n_groups / "
            f"tensor_parallel {groups}",
            f"context_parallel of {divisors(groups)}",
        )


def _of_experts(
    stage: str, placed: Placement, model: dict[str, Any]
) -> Iterator[Problem]:
    experts = num_experts(model)
    if experts is None:
        for key in ("expert_parallel", "expert_tensor_parallel"):
            if getattr(placed, key) > 1:
                yield key, "the model has no experts", f"{key}: 1"
        return
    if experts % placed.expert_parallel:
        yield _not_divided(
            "expert_parallel", placed.expert_parallel, "experts", experts
        )
    size, width = placed.expert_tensor_parallel, model.get("moe_intermediate_size")
    if width and width % size:
        yield _not_divided(
            "expert_tensor_parallel", size, "moe_intermediate_size", width
        )
    trains = stage in ("pretrain", "sft")
    if trains and placed.tensor_parallel > 1 and not is_sequence_parallel(placed):
        yield (
            "sequence_parallel",
            "a model with experts needs it where tensor_parallel is above 1",
            "leave it out",
        )


def _of_layers(placed: Placement, model: dict[str, Any]) -> Iterator[Problem]:
    layers, pipeline = _layers(model), placed.pipeline_parallel
    if placed.virtual_pipeline is not None and layers.kinds is not None:
        yield (
            "virtual_pipeline",
            "Megatron-Bridge has none for models of Mamba and attention layers",
            "leave it out",
        )
        return
    chunks = pipeline * (placed.virtual_pipeline or 1)
    if layers.total and layers.total % chunks:
        key = "pipeline_parallel"
        if layers.total % pipeline == 0:
            key = "virtual_pipeline"
        what = f"{pipeline} stages" if chunks == pipeline else f"{chunks} chunks"
        fitting = layers.total // (pipeline if key == "virtual_pipeline" else 1)
        yield (
            key,
            f"{layers.total} layers do not divide among {what}",
            f"{key} of {divisors(fitting)}",
        )


def _of_adapter(
    placed: Placement, model: dict[str, Any] | None, peft: str | None
) -> Iterator[Problem]:
    """DoRA's norms are those of whole rows (megatron/bridge/peft/dora_layers.py)."""
    if peft == "dora" and model and num_experts(model):
        yield (
            "peft",
            "Megatron-Bridge has no DoRA for a model with experts",
            "peft.method: lora",
        )
    if peft == "dora" and placed.tensor_parallel > 1:
        yield (
            "tensor_parallel",
            f"{placed.tensor_parallel}, but Megatron-Bridge takes the norms of DoRA "
            "from one GPU's part of a weight",
            "tensor_parallel: 1, or peft.method: lora",
        )


def _of_precision(
    placed: Placement, model: dict[str, Any] | None, precision: str | None
) -> Iterator[Problem]:
    if precision in (None, "bf16"):
        return
    gres = str(getattr(placed, "gres", ""))
    chips = set(re.split(r"[:_.]", gres.lower()))
    known = chips & (BEFORE_FP8 | BLACKWELL | {"l4", "l40", "l40s", "h100", "h200"})
    if known and precision in ("mxfp8", "nvfp4") and not known & BLACKWELL:
        yield (
            "precision",
            f"{precision} needs a Blackwell GPU, and gres is {gres}",
            "precision: bf16"
            if known & BEFORE_FP8
            else "precision: fp8_current, or bf16",
        )
    elif known & BEFORE_FP8:
        yield (
            "precision",
            f"{precision} needs a GPU that knows FP8 (Ada, Hopper or newer), and "
            f"gres is {gres}",
            "precision: bf16",
        )
    if model and precision != "nvfp4" and _layers(model).may_have("linear_attention"):
        keys = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        heads, width, groups, state = (model.get(key) for key in keys)
        if heads and width and groups and state:
            columns = 2 * heads * width + 2 * groups * state + heads
            if columns % FP8_MULTIPLE:
                yield (
                    "precision",
                    f"{precision} needs Mamba's projection to have a multiple of "
                    f"{FP8_MULTIPLE} columns; it has {columns}: 2 x mamba_num_heads x "
                    "mamba_head_dim + 2 x n_groups x ssm_state_size + mamba_num_heads",
                    "precision: bf16",
                )
