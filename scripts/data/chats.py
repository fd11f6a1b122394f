"""The tokenizer of chats: one with a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.lib.errors import DataError

PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(folder: Path) -> Any:
    """What AutoTokenizer loads, without the torch it imports where its class is plain.

    Raises DataError where that fails, or where there is no chat template.
    """
    import transformers

    try:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        plain = (
            config.get("tokenizer_class") in PLAIN_CLASSES
            and "auto_map" not in config
            and not (folder / "config.json").exists()
        )
        loader: Any = (
            transformers.PreTrainedTokenizerFast
            if plain
            else transformers.AutoTokenizer
        )
        result = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise DataError(
            str(folder), f"cannot be loaded as a tokenizer: {error}"
        ) from error
    if result.chat_template is None:
        raise DataError(
            str(folder),
            "the tokenizer has no chat template",
            "give the tokenizer node a `chat_template` with `{% generation %}`",
        )
    return result
