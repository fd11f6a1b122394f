"""Talk to a model in the terminal; it answers as it thinks.

Reads   MODEL_DIR  Hugging Face folder with a chat template; questions on stdin
Writes  nothing but answers on stdout
Raises  RecipeError for a folder that holds no chat model

Each line is a question; /new forgets what was said, /quit or end of input leaves.

    python -m scripts.chat artifacts/export/nano/model
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import RecipeError


def load(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise RecipeError(str(folder), "holds no config.json", "give a model folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise RecipeError(str(folder), "its tokenizer has no chat template")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    ).eval(), tokenizer


def answer(model: Any, tokenizer: Any, chat: list[dict[str, str]], room: int) -> str:
    """The model's answer, printed token by token."""
    from transformers import TextStreamer

    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=room, streamer=streamer
    )
    return str(tokenizer.decode(output[0][length:], skip_special_tokens=True))


def questions() -> Any:
    """Lines of stdin, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def main(argv: list[str] | None = None) -> int:
    """Talk until the input ends."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("model", type=Path, help="model folder")
    flags.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    flags.add_argument(
        "--remember", action="store_true", help="keep earlier turns in the chat"
    )
    args = flags.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    model, tokenizer = load(args.model)
    chat: list[dict[str, str]] = []
    try:
        for question in questions():
            if question == "/new" or not args.remember:
                chat = []
            if question == "/new":
                continue
            chat.append({"role": "user", "content": question})
            said = answer(model, tokenizer, chat, args.max_new_tokens)
            chat.append({"role": "assistant", "content": said})
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    cli.run(main)
