"""Megatron to Hugging Face, gated: what does not agree is not published.

Three comparisons, on the model as its processes hold it, whatever the parallel sizes:

disk     what lies in the folder is bit for bit what Megatron's tensors convert to
round    the folder, loaded into Megatron and converted again, is the same bits
logits   Transformers, reading the folder, answers fixed prompts as Megatron does

    python -m scripts.nvidia.export --parent FOLDER ...    does the same for a folder
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.lib import outputs
from scripts.lib.errors import AttestError, RecipeError
from scripts.nvidia import common, parity, settings


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
    from transformers import AutoTokenizer

    for chunk in model:
        chunk.eval()
    bridge = settings.bridge_of(definition)
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    prompts = outputs.fixed_prompts(words)
    ours = parity.logits(model, prompts)
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
    found["differs_on_disk"] = parity.compare(tensors(bridge, model, True), out)
    bridge.load_hf_weights(model, str(out))
    found["differs_after_round_trip"] = parity.compare(
        tensors(bridge, model, False), out
    )

    def judge() -> dict[str, Any]:
        found.update(parity.agreement(ours, parity.theirs_of(out, prompts)))
        found["tensors"] = len(parity.converted_names(out))
        return found

    verdict = common.from_first(judge)
    for chunk in model:
        chunk.train()
    problem = parity.refusal(verdict)
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
    bridge = settings.bridge_of(parent)
    wrong = parity.compare(tensors(bridge, model, False), parent, cast=True)
    if getattr(bridge.hf_pretrained, "tie_word_embeddings", False):
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


def write_configs(out: Path, definition: Path, words: Any, generation: bool) -> None:
    """config.json as the definition has it, with dtype and tokens; generation settings."""
    config = common.read_config(definition)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = getattr(words, name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    longest = config.get("max_position_embeddings", 2 * outputs.MAX_NEW_TOKENS)
    greedy = outputs.generation_settings(words, longest)
    if not generation:
        greedy = {name: greedy[name] for name in greedy if name.endswith("_id")}
    (out / "generation_config.json").write_text(json.dumps(greedy, indent=2) + "\n")


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
