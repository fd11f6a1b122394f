"""What an export needs beside its weights, so that others load and serve it.

The trainers' folders hold no more than the next stage reads; these are its last files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib.errors import RecipeError
from scripts.lib.schema import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLING = {"temperature", "top_p", "top_k"}
ANSWER = "forty-two"
LETTERS = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
"""Layers of a NemotronH: as newer Transformers name them, and as released ones do."""


def complete(folder: Path, wanted: Generation | None) -> None:
    """Finish a model folder: end tokens, sampling, context length, names of layers.

    Raises RecipeError where Transformers refuses the settings of generation.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    settings = wanted.model_dump(exclude_none=True) if wanted else {}
    if settings.keys() & SAMPLING:
        settings["do_sample"] = True
    ends = end_tokens(tokenizer)
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    config = GenerationConfig.from_pretrained(folder)
    config.update(**settings)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise RecipeError("generation", str(error)) from error
    config.save_pretrained(folder)

    model = read(folder / "config.json")
    words = read(folder / "tokenizer_config.json")
    if longest := model.get("max_position_embeddings"):
        words["model_max_length"] = min(longest, words.get("model_max_length", longest))
    write(folder / "tokenizer_config.json", words)
    write(folder / "config.json", as_released(model))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and the one that its chats end an answer with."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        chat = [
            {"role": "user", "content": "6 x 7"},
            {"role": "assistant", "content": ANSWER},
        ]
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False)
        after = text.rpartition(ANSWER)[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        special = tokenizer.added_tokens_decoder
        if ids and ids[0] in special and special[ids[0]].special:
            ends.insert(0, ids[0])
    return list(dict.fromkeys(ends))


def as_released(model: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the form that older Transformers, and vLLM, read too.

    Transformers 5.8, by which vLLM 0.20 reads a NemotronH's, refuses the layers' newer
    names.
    """
    layers = model.get("layers_block_type")
    if not layers or not set(layers) <= set(LETTERS):
        return model
    kept = {
        key: value for key, value in model.items() if "layers_block_type" not in key
    }
    kept["hybrid_override_pattern"] = "".join(LETTERS[layer] for layer in layers)
    kept["num_hidden_layers"] = len(layers)
    if model.get("num_nextn_predict_layers"):
        more = model["mtp_layers_block_type"]
        kept["mtp_hybrid_override_pattern"] = "".join(LETTERS[layer] for layer in more)
    return kept


def read(path: Path) -> dict[str, Any]:
    """A JSON file's mapping."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON, in the form of Transformers."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
