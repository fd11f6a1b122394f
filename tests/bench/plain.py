"""What one would write with Hugging Face's libraries alone, to compare with.

    python -m tests.bench.plain tokenize TOKENIZER DOCUMENTS PREFIX
    python -m tests.bench.plain pack TOKENIZER CHATS OUT.parquet SEQUENCE_LENGTH

The first reads JSON lines and writes a Megatron shard by tokenizers; the second renders
and tokenizes by datasets and apply_chat_template, and packs first fit decreasing.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

BATCH = 1000


def tokenize(folder: str, documents: str, prefix: str) -> None:
    """PREFIX.bin and .idx, of each document its ids and the end of a document."""
    from tokenizers import Tokenizer

    from scripts.lib.indexed import IndexedWriter

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    config = json.loads(Path(folder, "tokenizer_config.json").read_text())
    end = [tokenizer.token_to_id(config["eos_token"])]
    writer = IndexedWriter(Path(prefix), tokenizer.get_vocab_size())
    with open(documents, encoding="utf-8") as lines:
        while batch := [json.loads(line)["text"] for line in islice(lines, BATCH)]:
            found = tokenizer.encode_batch_fast(batch)
            writer.add([each.ids + end if each.ids else [] for each in found])
    writer.finish()


def pack(folder: str, chats: str, out: str, length: str) -> None:
    """Rows packed first fit decreasing, the mask beside each label's predecessor."""
    import numpy as np
    import pyarrow
    from datasets import load_dataset
    from pyarrow import parquet
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        masks = [[*mask[1:], 0] for mask in found["assistant_masks"]]
        return {"input_ids": found["input_ids"], "loss_mask": masks}

    cache = str(Path(out).parent / "cache")
    data = load_dataset("json", data_files=chats, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, remove_columns=["messages"])
    ids, masks = list(data["input_ids"]), list(data["loss_mask"])
    lengths = np.array([len(each) for each in ids])
    free = np.full(len(ids), int(length))
    rows: list[dict[str, list[int]]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        if lengths[i] > int(length):
            continue
        row = int(np.argmax(free >= lengths[i]))
        if row == len(rows):
            rows.append({"input_ids": [], "loss_mask": [], "seq_start_id": []})
        free[row] -= lengths[i]
        rows[row]["seq_start_id"].append(len(rows[row]["input_ids"]))
        rows[row]["input_ids"] += ids[i]
        rows[row]["loss_mask"] += masks[i]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression="zstd")


if __name__ == "__main__":
    {"tokenize": tokenize, "pack": pack}[sys.argv[1]](*sys.argv[2:])
