"""Whether a Hugging Face folder is and answers what Megatron's model is and answers.

Nothing here decides what is published, only whether: a change here retrains nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import outputs
from scripts.nvidia import common

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.03
"""Largest difference of two logits, as a share of the largest logit, in bfloat16: it
has 8 bits, and the two sum in other orders; seen are up to 0.017."""
DIVERGENCE = 1e-3
"""Largest mean KL divergence of the next token, in nats; seen are up to 2e-4."""


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
        return (
            f"the next token's KL divergence is {found['mean_kl']:.3g} nats; "
            f"at most {DIVERGENCE}"
        )
    return ""


# --- tensors -------------------------------------------------------------------


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
    8- or 4-bit arithmetic, which the folder is not read with either.
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
    if len(model) > 1:  # virtual stages take whole groups: schedules.py, "remainder"
        rows += [rows[-1]] * (-len(rows) % config.microbatch_group_size_per_vp_stage)

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

    fewer_bits = config.fp8, config.fp4
    config.fp8 = config.fp4 = None
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
        config.fp8, config.fp4 = fewer_bits
    whole = torch.zeros(0, device="cuda")
    if state.is_pipeline_last_stage(ignore_virtual=True):
        answers = found[: len(prompts)]
        whole = unsliced(torch.cat([row.float() for row in answers]))
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
    except RuntimeError:
        if not fits:
            raise
        print("parity: on the CPU, as a kernel does not take this model", flush=True)
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
