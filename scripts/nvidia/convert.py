"""Megatron to Hugging Face, gated: what does not agree is not published.

Three comparisons, on the model as its processes hold it, whatever the parallel sizes:

disk     what lies in the folder is bit for bit what Megatron's tensors convert to
round    the folder, loaded into Megatron and converted again, is the same bits
logits   Transformers, reading the folder, answers fixed prompts as Megatron does

    python -m scripts.nvidia.export --parent FOLDER ...    does the same for a folder
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import outputs
from scripts.lib.errors import AttestError, RecipeError
from scripts.nvidia import common

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.03
"""Largest difference of two logits, as a share of the largest logit, in bfloat16: it
has 8 bits, and the two sum in other orders; seen are up to 0.01."""
DIVERGENCE = 1e-3
"""Largest mean KL divergence of the next token, in nats; seen are up to 1e-4."""


def publish(
    model: list[Any],
    out: Path,
    *,
    definition: Path,
    tokenizer: Path,
    peft: Any = None,
    generation: bool = False,
) -> None:
    """Write a Hugging Face folder from Megatron's model chunks, checked.

    All processes call this, and do not train on: an adapter is no longer beside its
    base. It is written to adapter/ in PEFT's form, and merged into the model. Raises AttestError, in all processes, where one of
    the comparisons fails; parity.json holds what was seen.
    """
    import torch
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig, AutoTokenizer

    for chunk in model:
        chunk.eval()
    config = AutoConfig.from_pretrained(definition, trust_remote_code=False)
    bridge = AutoBridge.from_hf_config(config)
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    prompts = outputs.fixed_prompts(words)
    ours = logits(model, prompts)
    if peft is not None:
        bridge.save_hf_adapter(
            model,
            out / "adapter",
            peft,
            base_model_name_or_path="",
            show_progress=False,
        )
    if type(peft).__name__ == "DoRA":
        merge_dora(model, bridge, out / "adapter/adapter_model.safetensors")
    bridge.save_hf_pretrained(model, out, show_progress=False)
    if common.is_first():
        write_configs(out, definition, words, generation)
        outputs.copy_tokenizer(tokenizer, out)
    torch.distributed.barrier()

    found: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, prompts))}
    found["differs_on_disk"] = compare(tensors(bridge, model, True), out)
    bridge.load_hf_weights(model, str(out))
    found["differs_after_round_trip"] = compare(tensors(bridge, model, False), out)

    def judge() -> dict[str, Any]:
        found.update(agreement(ours, theirs_of(out, prompts)))
        found["tensors"] = len(converted_names(out))
        return found

    verdict = common.from_first(judge)
    for chunk in model:
        chunk.train()
    problem = refusal(verdict)
    if common.is_first():
        (out / "parity.json").write_text(json.dumps(verdict, indent=1) + "\n")
        print(
            f"parity: logits differ by {verdict['relative_logit_difference']:.2g} of the "
            f"largest, KL {verdict['mean_kl']:.2g} nats",
            flush=True,
        )
    if problem:
        raise AttestError(str(out), problem)


def check_start(model: list[Any], parent: Path) -> None:
    """See that Megatron has read all of a parent, and as it is.

    Bridge leaves weights that it finds no tensor for as they were made, at random.
    Raises RecipeError, in all processes, naming the tensors.
    """
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(parent, trust_remote_code=False)
    bridge = AutoBridge.from_hf_config(config)
    wrong = compare(tensors(bridge, model, False), parent, cast=True)
    if getattr(config, "tie_word_embeddings", False):
        wrong = [name for name in wrong if not name.startswith("lm_head.")]

    def judge() -> None:
        if wrong:
            raise RecipeError(
                str(parent),
                f"{', '.join(wrong[:5])}: not what Megatron has read",
                "see that its tensors have the names that were released; a folder that "
                "Transformers 5.8 wrote of a NemotronH has `embedding` for `embeddings`",
            )

    common.from_first(judge)


def refusal(found: dict[str, Any]) -> str:
    """Why a folder is not to be published, or nothing."""
    for key, what in (
        ("differs_on_disk", "is not what Megatron's tensors convert to"),
        ("differs_after_round_trip", "comes back from Megatron as other bits"),
    ):
        if found[key]:
            return f"{', '.join(found[key][:5])} {what}"
    if not found["relative_logit_difference"] <= TOLERANCE:
        return (
            f"Transformers' logits differ from Megatron's by "
            f"{found['relative_logit_difference']:.3g} of the largest; at most {TOLERANCE}"
        )
    if not found["mean_kl"] <= DIVERGENCE:
        return f"the next token's KL divergence is {found['mean_kl']:.3g} nats; at most {DIVERGENCE}"
    return ""


def write_configs(out: Path, definition: Path, words: Any, generation: bool) -> None:
    """config.json as the definition has it, with dtype and tokens; generation settings."""
    config = common.read_config(definition)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = getattr(words, name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    longest = config.get("max_position_embeddings", 2 * outputs.MAX_NEW_TOKENS)
    settings = outputs.generation_settings(words, longest)
    if not generation:
        settings = {name: settings[name] for name in settings if name.endswith("_id")}
    (out / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- tensors -------------------------------------------------------------------


def tensors(bridge: Any, model: list[Any], merge: bool) -> Iterator[tuple[str, Any]]:
    """Megatron's tensors in Hugging Face's form, an adapter's bases with it or without.

    All processes take them all.
    """
    for name, tensor in bridge.export_hf_weights(
        model, cpu=True, show_progress=False, merge_adapter_weights=merge
    ):
        yield name.replace(".base_layer.", "."), tensor


def merge_dora(model: list[Any], bridge: Any, adapter: Path) -> None:
    """Put DoRA's weights in place of its bases; add the magnitudes to the adapter's file.

    W' = m (W + s B A) / |W + s B A|, by rows: megatron/bridge/peft/dora_layers.py.
    Bridge's own export leaves m out (0.6.2). Each row of a Megatron tensor is a row of
    one of Hugging Face's, so a tensor that holds m in all columns tells m's place there.
    Then B is 0, so that exports of merged weights add nothing.
    """
    import torch
    from megatron.bridge.peft.dora_layers import DoRALinear

    layers = [
        m for chunk in model for m in chunk.modules() if isinstance(m, DoRALinear)
    ]
    merged = []
    with torch.no_grad():
        for layer in layers:
            weight, low = layer.to_wrap.weight, layer.adapter
            change = low.linear_out.weight.float() @ low.linear_in.weight.float()
            whole = weight.float() + layer.scaling * change
            rows = low.get_weight_magnitude().float()[:, None]
            merged.append((whole * rows / whole.norm(dim=1, keepdim=True)).to(weight))
            weight.copy_(rows.expand_as(weight))
        bases = base_names(bridge, model)
        columns = {
            name: tensor[:, 0].clone()
            for name, tensor in tensors(bridge, model, False)
            if name in bases
        }
        for layer, weight in zip(layers, merged, strict=True):
            layer.to_wrap.weight.copy_(weight)
            layer.adapter.linear_out.weight.zero_()
    if common.is_first():
        add_magnitudes(adapter, columns)


def base_names(bridge: Any, model: list[Any]) -> set[str]:
    """Hugging Face's names of the weights that have an adapter."""
    ending = ".lora_A.weight"
    return {
        found.param_name.removesuffix(ending) + ".weight"
        for found in bridge.export_adapter_weights(model, cpu=True, show_progress=False)
        if found.param_name.endswith(ending)
    }


def add_magnitudes(path: Path, magnitudes: dict[str, Any]) -> None:
    """Add DoRA's magnitudes to an adapter, under the names that PEFT gives them."""
    from safetensors.torch import load_file, save_file

    adapter = load_file(path)
    for name, rows in magnitudes.items():
        module = name.removesuffix(".weight")
        adapter[f"base_model.model.{module}.lora_magnitude_vector"] = rows.contiguous()
    save_file(adapter, path, {"format": "pt"})


def converted_names(folder: Path) -> dict[str, Path]:
    """{tensor: file} of a folder's safetensors."""
    from safetensors import safe_open

    names = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


def compare(tensors: Iterator[Any], folder: Path, cast: bool = False) -> list[str]:
    """Names of the tensors that are not bit for bit what a folder holds.

    With `cast`, what it holds in our tensor's dtype. Every process has to take all of
    `tensors`; rank 0 compares.
    """
    import torch
    from safetensors import safe_open

    wrong = []
    there = converted_names(folder) if common.is_first() else {}
    seen = set()
    for name, tensor in tensors:
        if not common.is_first():
            continue
        seen.add(name)
        if name not in there:
            wrong.append(name)
            continue
        with safe_open(there[name], "pt") as file:
            stored = file.get_tensor(name)
        ours = tensor.cpu().contiguous()
        if cast:
            stored = stored.to(ours.dtype)
        same = stored.dtype == ours.dtype and stored.shape == ours.shape
        if not same or not torch.equal(
            stored.view(torch.uint8), ours.view(torch.uint8)
        ):
            wrong.append(name)
    return sorted([*wrong, *(set(there) - seen)])


# --- logits --------------------------------------------------------------------


def logits(model: list[Any], prompts: list[list[int]]) -> list[torch.Tensor]:
    """Megatron's logits on each prompt, [tokens, vocabulary] in float32, on rank 0.

    The prompts are filled up on the right, which a causal model does not see. Without
    8-bit arithmetic, which the folder is not read with either.
    """
    import torch
    from megatron.core import parallel_state as state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

    config = get_model_config(model[0])
    ranks = state.get_context_parallel_world_size()
    several = 2 * ranks * state.get_tensor_model_parallel_world_size()
    length = -(-max(map(len, prompts)) // several) * several
    rows = [torch.tensor([p + [0] * (length - len(p))], device="cuda") for p in prompts]

    def step(batches: Iterator[Any], chunk: Any) -> tuple[Any, None]:
        tokens = next(batches)
        batch = {
            "tokens": tokens,
            "position_ids": torch.arange(length, device="cuda")[None],
            "cu_seqlens": None,
        }
        if ranks > 1:
            batch = get_batch_on_this_cp_rank(
                batch, False, state.get_context_parallel_group()
            )
        return (
            chunk(
                batch["tokens"], batch["position_ids"], None, runtime_gather_output=True
            ),
            None,
        )

    eight_bits, config.fp8 = config.fp8, None
    try:
        with torch.no_grad():
            each = [iter(rows) for _ in model]
            found = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=each if len(model) > 1 else each[0],
                model=model if len(model) > 1 else model[0],
                num_microbatches=len(rows),
                seq_length=length,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        config.fp8 = eight_bits
    whole = torch.zeros(0, device="cuda")
    if state.is_pipeline_last_stage(ignore_virtual=True):
        whole = unsliced(torch.cat([row.float() for row in found]))
    return to_first(whole, prompts)


def unsliced(part: torch.Tensor) -> torch.Tensor:
    """Whole sequences from each context-parallel rank's slices.

    Rank r of n holds slices r and 2n-1-r of 2n: megatron/core/utils.py,
    get_batch_on_this_cp_rank.
    """
    import torch
    from megatron.core import parallel_state as state

    ranks = state.get_context_parallel_world_size()
    if ranks == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(
        parts, part.contiguous(), group=state.get_context_parallel_group()
    )
    slices: list[Any] = [None] * (2 * ranks)
    for rank, both in enumerate(parts):
        slices[rank], slices[2 * ranks - 1 - rank] = both.chunk(2, dim=1)
    return torch.cat(slices, dim=1)


def to_first(whole: torch.Tensor, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of a last pipeline stage, on rank 0, cut to each prompt."""
    import torch

    mine = common.rank() if whole.numel() else -1
    source = torch.tensor(mine, device="cuda")
    torch.distributed.all_reduce(source, torch.distributed.ReduceOp.MAX)
    shape = torch.tensor(
        whole.shape if mine == int(source) else (0, 0, 0), device="cuda"
    )
    torch.distributed.broadcast(shape, int(source))
    if mine != int(source):
        whole = torch.empty(*shape.tolist(), device="cuda")
    torch.distributed.broadcast(whole.contiguous(), int(source))
    if not common.is_first():
        return []
    return [row[: len(p)].cpu() for row, p in zip(whole, prompts, strict=True)]


def theirs_of(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Transformers' logits on each prompt, [tokens, vocabulary] in float32.

    On the GPU where the model fits beside what is there, else on the CPU; there too
    where a kernel does not take the model's shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    size = sum(os.path.getsize(path) for path in folder.glob("*.safetensors"))
    torch.cuda.empty_cache()
    fits = torch.cuda.mem_get_info()[0] > 1.2 * size + (1 << 30)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    ).eval()

    def on(device: str) -> list[torch.Tensor]:
        model.to(device)
        with torch.no_grad():
            rows = [torch.tensor([prompt], device=device) for prompt in prompts]
            return [model(row, use_cache=False).logits[0].float().cpu() for row in rows]

    try:
        found = on("cuda" if fits else "cpu")
    except RuntimeError as error:
        if not fits:
            raise
        print(f"parity: on the CPU, since on the GPU: {error}", flush=True)
        found = on("cpu")
    model.to("cpu")
    torch.cuda.empty_cache()
    return found


def agreement(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, Any]:
    """How far two lists of logits are apart; entries that only fill up do not count."""
    import torch

    entries = theirs[0].shape[1]
    ours = [row[:, :entries] for row in ours]
    largest = max(float(row.abs().max()) for row in theirs)
    difference = outputs.largest_difference(ours, theirs)
    a, b = torch.cat(ours).log_softmax(-1), torch.cat(theirs).log_softmax(-1)
    return {
        "largest_logit_difference": difference,
        "relative_logit_difference": difference / largest if largest else float("inf"),
        "mean_kl": float((b.exp() * (b - a)).sum(-1).mean()),
        "same_first_choice": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "tolerance": TOLERANCE,
    }
