"""Convert what NeMo-RL has saved to a Hugging Face folder, checked (GPUs).

Reads   --weights  policy/weights of a save: Megatron's, or PyTorch's distributed one
        --parent   Hugging Face folder that the training started from: its config and
                   tokenizer are the new model's
Writes  --out      Hugging Face folder in bfloat16; parity.json: what was compared
Raises  AttestError where the folder, read back, is or answers other than the weights

Started by the stages that train with NeMo-RL; under torchrun the processes share
Megatron's model.

    python -m scripts.nvidia.publish --backend dtensor --kind causal \\
        --weights work/try/saves/step_9/policy/weights --parent P --out work/try/out \\
        --work work/try
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scripts.lib import cli, outputs
from scripts.lib.errors import AttestError
from scripts.nvidia import common, megatron, parity

KINDS = ("causal", "reward")
ENDING = "ForSequenceClassification"


def main(argv: list[str] | None = None) -> int:
    """Convert and check."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("weights", "parent", "out", "work"):
        flags.add_argument(f"--{name}", type=Path, required=True)
    flags.add_argument("--backend", required=True)
    flags.add_argument("--kind", choices=KINDS, default="causal")
    for name in ("tensor-parallel", "pipeline-parallel", "expert-parallel"):
        flags.add_argument(f"--{name}", type=int, default=1)
    args = flags.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.backend == "megatron":
        from_megatron(args)
        return common.finish(0)
    from_torch(args)
    return 0


def from_megatron(args: argparse.Namespace) -> None:
    """A save of Megatron's, loaded by Bridge under this process group's sizes."""
    common.use_kernel_caches()
    common.choose_gpu()
    common.join()
    from scripts.nvidia import convert

    parent = common.readable(args.parent, args.work)
    sizes = {
        "tensor_parallel": args.tensor_parallel,
        "pipeline_parallel": args.pipeline_parallel,
        "expert_parallel": args.expert_parallel,
        "context_parallel": 1,
        "expert_tensor_parallel": 1,
        "virtual_pipeline": None,
        "sequence_parallel": None,
    }
    model = megatron.build(parent, sizes)
    load(model, args.weights)
    convert.publish(model, args.out, definition=parent, tokenizer=args.parent)


def load(model: list[Any], weights: Path) -> None:
    """Load a distributed checkpoint's weights, all of them, into model chunks."""
    from megatron.bridge.training.checkpointing import (
        _load_model_weights_from_checkpoint as load_weights,
    )

    load_weights(str(weights / "iter_0000000"), model)


# --- PyTorch's saves -------------------------------------------------------------


def from_torch(args: argparse.Namespace) -> None:
    """A save of PyTorch's backends: master weights in float32 under HF's names."""
    import torch

    state = trained(args)
    config = common.read_config(args.parent)
    names = parity.converted_names(args.parent)
    head = {"score.weight"} if args.kind == "reward" else set()
    tied = bool(config.get("tie_word_embeddings"))
    dropped = {"lm_head.weight"} if tied or args.kind == "reward" else set()
    wanted = (set(names) - dropped) | head
    given = {
        name: t.to(torch.bfloat16) for name, t in state.items() if name not in dropped
    }
    if set(given) != wanted:
        odd = sorted(set(given) ^ wanted)
        raise AttestError(
            str(args.weights),
            f"{', '.join(odd[:5])}: not in both the trained weights and {args.parent}",
            "the model's class renames its tensors; train it on backend megatron",
        )
    write(args, given, config)
    judge(args, given, state)


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """The weights of a distributed save by name, in main memory."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = args.weights / "model" if args.backend == "automodel" else args.weights
    whole = args.work / "weights.pt"
    dcp_to_torch_save(folder, whole)
    state: dict[str, Any] = torch.load(
        whole, map_location="cpu", weights_only=True, mmap=True
    )
    whole.unlink()
    return dict(state.get("model", state))


def write(
    args: argparse.Namespace, state: dict[str, Any], config: dict[str, Any]
) -> None:
    """The folder: weights, config.json, the tokenizer's files."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(args.parent, trust_remote_code=False)
    save_torch_state_dict({n: t.contiguous() for n, t in state.items()}, args.out)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = getattr(words, name)
    if args.kind == "reward":
        (causal,) = config["architectures"]
        config["architectures"] = [causal.replace("ForCausalLM", ENDING)]
        config["num_labels"] = 1
        config["id2label"], config["label2id"] = {"0": "reward"}, {"reward": 0}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if args.kind == "causal":
        ids = {n: config[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (args.out / "generation_config.json").write_text(
            json.dumps(ids, indent=2) + "\n"
        )
    outputs.copy_tokenizer(args.parent, args.out)


def judge(
    args: argparse.Namespace, given: dict[str, Any], state: dict[str, Any]
) -> None:
    """Compare the folder, as it is read back, with the trained weights.

    Bit for bit what they are in bfloat16; and Transformers answers fixed prompts from
    the folder as it does from the weights in float32, within bfloat16's tolerance.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(args.out, trust_remote_code=False)
    prompts = outputs.fixed_prompts(words)
    found: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, prompts))}
    found["differs_on_disk"] = parity.compare(iter(given.items()), args.out)
    found["differs_after_round_trip"] = []
    kind = "AutoModelForCausalLM"
    if args.kind == "reward":
        kind = f"AutoModel{ENDING}"

    def answers(folder: Path, dtype: Any) -> list[Any]:
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=dtype, trust_remote_code=False
        )
        if dtype == torch.float32:
            missing = model.load_state_dict(state, strict=False).missing_keys
            if missing and not model.config.tie_word_embeddings:
                raise AttestError(str(folder), f"{missing[0]}: not trained")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.eval().to(device)
        with torch.no_grad():
            rows = [torch.tensor([prompt], device=device) for prompt in prompts]
            logits = [model(row, use_cache=False).logits.float().cpu() for row in rows]
        return [row.reshape(-1, row.shape[-1]) for row in logits]

    whole, ours = answers(args.out, torch.float32), answers(args.out, torch.bfloat16)
    found.update(parity.agreement(whole, ours))
    found["tensors"] = len(given)
    problem = parity.refusal(found)
    (args.out / "parity.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"parity: logits differ by {found['relative_logit_difference']:.2g} of the "
        f"largest, KL {found['mean_kl']:.2g} nats",
        flush=True,
    )
    if problem:
        raise AttestError(str(args.out), problem)


if __name__ == "__main__":
    cli.run(main)
