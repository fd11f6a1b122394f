"""Megatron-Bridge's offline packing of chats, run by an interpreter that has its needs.

    python bridge_pack.py BRIDGE TOKENIZER CHATS OUT.parquet SEQUENCE_LENGTH

What packages import beside the data modules (models, kernels, recipes) is left out,
since it wants a GPU's libraries, and so as not to count against Bridge. The modules
themselves are unmodified.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

PACKAGES = (
    "",
    ".data",
    ".data.builders",
    ".data.collators",
    ".data.datasets",
    ".models",
    ".training",
    ".training.utils",
)


def main(bridge: str, tokenizer: str, chats: str, out: str, length: str) -> None:
    """Pack as `scripts/training/prepare_gpt_sft_packed_data.py` does."""
    for package in PACKAGES:
        name = f"megatron.bridge{package}"
        module = types.ModuleType(name)
        module.__path__ = [str(Path(bridge, "src", *name.split(".")))]
        sys.modules[name] = module
    from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split
    from megatron.bridge.data.packing.offline import prepare_gpt_sft_packed_data
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    config = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer
    )
    prepare_gpt_sft_packed_data(
        input_path=Path(chats),
        output_path=Path(out),
        output_metadata_path=Path(out).with_suffix(".json"),
        packed_sequence_size=int(length),
        tokenizer=build_tokenizer(config),
        max_seq_length=int(length),
        dataset_kwargs={"chat": True, "use_hf_tokenizer_chat_template": True},
        num_tokenizer_workers=1,
        dataset_builder=build_gpt_sft_split,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
