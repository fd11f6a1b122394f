"""Score models on held-out tasks with lm-evaluation-harness (vLLM; one GPU or more).

What is asked, how it is judged and what is written are scripts.eval's. vLLM is set to
answer as Transformers does there: greedily, with numbers of the folder's type, without
compiled kernels or kept prefixes, its tokens made text in the same way. Sums are still
taken in another order, so that where two tokens are as good as equal, answers differ.

Each model has a process of its own, which ends with it: that is what frees its GPUs.

Reads   --model   NAME=DIR, repeated: Hugging Face folder without code of its own
        --task    NAME=FILE, repeated: task file (YAML), scored by exact_match
        --data    NAME=PATH, repeated: the task's rows (input, output), as a .jsonl
                  file or a folder with some
        --recipe  YAML of one `eval:` node
Writes  --out     scores.json: confidence, and a score (share right, 0 to 1) with its
                  Wilson interval for each model and task; samples.jsonl
Raises  UserError without vLLM, with another version of it, or without GPUs enough;
        RecipeError for flags that do not match, a refused task file or model folder,
        and what vLLM would answer otherwise; DataError for rows without input or
        output, and for a prompt that is too long
Resumes never: it starts anew.

    python -m scripts.nvidia.eval --model base=B --model instruct=I \\
        --task arithmetic=config/tasks/arithmetic.yaml --data arithmetic=D \\
        --recipe R.yaml --out work/try --tensor-parallel 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from scripts import eval as shared
from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError, UserError
from scripts.lib.schema import EvalRecipe, Placement
from scripts.nvidia import common, versions
from scripts.nvidia.settings import has_module

LOCK = Path("envs/nemo-rl.lock")
NEEDED = {"vllm": "vLLM", "lm_eval": "lm-evaluation-harness"}
PINNED = ("vllm", "lm-eval")
SEEN = (*PINNED, "torch", "transformers", "tokenizers")
"""Packages whose versions provenance tells, as they are here."""

PROMPT_TOKENS = 8192
"""The longest prompt that room is kept for: a model's own limit may not fit the GPU."""

PASSED_ON = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
"""Of generation_config.json, what changes greedy answers; and how vLLM calls it."""

NOT_IN_VLLM = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "sequence_bias",
    "suppress_tokens",
)
"""What else would, and cannot be passed on."""

OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHER_ENGINE = (
    "or score with Transformers: `engine: {default: nvidia, eval: transformers}`"
)


# --- the command line ----------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The stage's flags, and how vLLM is placed."""
    flags = shared.parser(doc)
    for name, kind in (("tensor_parallel", int), ("generation_memory", float)):
        field = Placement.model_fields[name]
        flags.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=field.description,
        )
    flags.add_argument("--gpus", type=int, help="GPUs of this machine; default: all")
    flags.add_argument(
        "--only",
        metavar="NAME",
        help="write this model's answers to WORK/answers.json, and nothing else",
    )
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    args = cli.parse(parser(__doc__), argv)
    check(args)
    models, tasks, recipe = shared.load(args)
    for folder in models.values():
        common.refuse_code(folder)
    if args.only:
        use_environment()
        run_alone(partial(write_answers, args.only, models, tasks, recipe, args))
    words = sys.argv[1:] if argv is None else argv
    ask = partial(ask_in_a_process, words)
    return shared.write_scores(models, tasks, recipe, args, ask)


# --- start ---------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Raise where vLLM cannot be run here, or not as it is placed."""
    missing = [shown for name, shown in NEEDED.items() if not has_module(name)]
    if missing:
        raise UserError(
            sys.executable,
            f"no {' and no '.join(missing)}",
            "placement.eval: name a `python` that has the packages of "
            f"{LOCK}, or a container; {OTHER_ENGINE}",
        )
    pinned = versions.pins(LOCK)
    for name, found in versions.installed(PINNED).items():
        if (found or "").partition("+")[0] != pinned[name]:
            raise UserError(
                str(LOCK),
                f"pins {name} {pinned[name]}; here it is {found}",
                f"install that, or pin what is here; {OTHER_ENGINE}",
            )
    if args.gpus is not None and args.tensor_parallel > args.gpus:
        raise UserError(
            "placement.eval",
            f"tensor_parallel: {args.tensor_parallel}, but gpus: {args.gpus}",
            "raise gpus, or lower tensor_parallel",
        )


def use_environment() -> None:
    """What vLLM reads when it is imported."""
    common.use_kernel_caches()
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    # with the scheduler in this process, what is batched together is always the same
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["VLLM_DO_NOT_TRACK"] = "1"
    os.environ.setdefault("TQDM_MININTERVAL", "30")  # else bars fill the log


def see_gpus(args: argparse.Namespace) -> None:
    """Check the GPUs, and write to environment.json what the models are run with."""
    common.choose_gpu()
    import torch

    if args.tensor_parallel > torch.cuda.device_count():
        raise UserError(
            "placement.eval",
            f"tensor_parallel: {args.tensor_parallel}, but "
            f"{torch.cuda.device_count()} GPUs are seen here",
            "raise gpus, or lower tensor_parallel",
        )
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    seen = {
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(),
        "gpus_seen": args.tensor_parallel,
        "seen": versions.installed(SEEN),
    }
    (args.work / "environment.json").write_text(json.dumps(seen))


# --- a process a model ---------------------------------------------------------


def answers_file(args: argparse.Namespace) -> Path:
    """Where a model's process leaves its answers."""
    return Path(args.work / "answers.json")


def ask_in_a_process(
    words: list[str],
    name: str,
    folder: Path,
    tasks: shared.Tasks,
    recipe: EvalRecipe,
    args: argparse.Namespace,
) -> Iterable[tuple[str, shared.Rows]]:
    """A model's answers to each task, from this script run for that model alone.

    vLLM has no call after which all that it took of a GPU is sure to be free again.
    """
    file = answers_file(args)
    file.unlink(missing_ok=True)
    # a build's code is found without the folder that this runs in
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
    line = [*python, "-m", "scripts.nvidia.eval", *words, "--only", name]
    code = subprocess.run(line, check=False).returncode
    if code < 0:
        os.kill(os.getpid(), -code)  # this run ends as that one did
    if code:
        raise SystemExit(code)  # it has said why
    found: dict[str, shared.Rows] = json.loads(file.read_text(encoding="utf-8"))
    return found.items()


def run_alone(write: Any) -> None:
    """In a model's process: write its answers, and end.

    It ends with the process that waits for it, and without the interpreter's long way
    out, on which libraries print more than a log's end should hold.
    """
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    try:
        cli.run(write)
    except SystemExit as end:
        common.finish(end.code if isinstance(end.code, int) else 1)


def write_answers(
    name: str,
    models: dict[str, Path],
    tasks: shared.Tasks,
    recipe: EvalRecipe,
    args: argparse.Namespace,
) -> int:
    """Ask one model, write its answers."""
    if name not in models:
        raise RecipeError("--only", f"{name} is no --model", "name one of them")
    see_gpus(args)
    folder = common.readable(models[name], args.work / "models", lambda make: make())
    model = vllm(folder, recipe, args)
    found = dict(shared.ask_here(lambda *_: model, name, folder, tasks, recipe, args))
    answers_file(args).write_text(json.dumps(found), encoding="utf-8")
    model.model.llm_engine.engine_core.shutdown()  # waits for its processes' end
    return 0


# --- the model -----------------------------------------------------------------


def arguments(
    folder: Path, recipe: EvalRecipe, args: argparse.Namespace
) -> dict[str, Any]:
    """What the harness' VLLM is given for a folder.

    Raises RecipeError where the model cannot read so many tokens as it is to answer.
    """
    longest = longest_of(folder)
    if recipe.max_new_tokens >= longest:
        raise RecipeError(
            "max_new_tokens",
            f"{recipe.max_new_tokens}, but {folder} takes {longest} tokens, with the "
            "prompt",
            "lower it",
        )
    return {
        "pretrained": str(folder.absolute()),
        "dtype": dtype_of(folder),
        "max_model_len": min(longest, PROMPT_TOKENS + recipe.max_new_tokens),
        "tensor_parallel_size": args.tensor_parallel,
        "gpu_memory_utilization": args.generation_memory,
        "max_num_seqs": recipe.batch_size,
        "batch_size": "auto",  # a free place is filled at once
        "tokenizer_mode": "hf",
        "trust_remote_code": False,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }


def longest_of(folder: Path) -> int:
    """Tokens that a model takes, answer included, as the harness finds it elsewhere."""
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return int(resolve_max_length(config, tokenizer))


def dtype_of(folder: Path) -> str:
    """The type of the numbers that Transformers would compute with.

    Named, float32 is not made bfloat16. Where config.json names none, vLLM looks at
    the weights.
    """
    config = common.read_config(folder)
    text = config.get("text_config") or {}
    places = [
        (part, key) for part in (config, text) for key in ("dtype", "torch_dtype")
    ]
    return next((str(part[key]) for part, key in places if part.get(key)), "auto")


def generation_of(folder: Path) -> dict[str, Any]:
    """What a folder's generation_config.json does to greedy answers, in vLLM's words.

    Raises RecipeError for what vLLM cannot do.
    """
    path = folder / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key in NOT_IN_VLLM:
        if found.get(key) not in (None, False, 0, 1, []):
            raise RecipeError(
                f"{path} {key}",
                f"{found[key]}, which vLLM does not know",
                f"remove it; {OTHER_ENGINE}",
            )
    passed = {ours: found.get(theirs) for theirs, ours in PASSED_ON.items()}
    return {key: value for key, value in passed.items() if value is not None}


def vllm(folder: Path, recipe: EvalRecipe, args: argparse.Namespace) -> Any:
    """A folder as the harness's model, run by vLLM.

    Raises UserError where vLLM refuses the folder or finds too little memory.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.vllm_causallms import VLLM

    given, of_folder = arguments(folder, recipe, args), generation_of(folder)
    longest = longest_of(folder)

    class AsTransformers(VLLM):  # type: ignore[misc]
        """Asks and reads as the harness does with Transformers."""

        # VLLM's tells templates of `enable_thinking`, which counts as a choice
        apply_chat_template = HFLM.apply_chat_template
        tok_decode = HFLM.tok_decode

        @staticmethod
        def modify_gen_kwargs(*given: Any, **named: Any) -> Any:
            kwargs, until, count = VLLM.modify_gen_kwargs(*given, **named)
            # vLLM takes no empty stop, which nothing would ever be cut at
            return kwargs | of_folder, [stop for stop in until if stop], count

        def generate_until(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> Any:
            room = self.max_length - recipe.max_new_tokens
            most = max(map(len, self.tok_encode([each.args[0] for each in requests])))
            if most > room and self.max_length < longest:
                raise DataError(
                    "--data",
                    f"a prompt of {most} tokens; vLLM is given {room} of them here",
                    OTHER_ENGINE.removeprefix("or "),
                )
            return super().generate_until(requests, disable_tqdm)

        def _model_generate(self, *given: Any, **named: Any) -> Any:
            outputs = super()._model_generate(*given, **named)
            for output in outputs:
                first = output.outputs[0]
                first.text = self.tok_decode(list(first.token_ids))
            return outputs

    try:
        return AsTransformers(**given)
    except ValueError as error:
        raise UserError(
            str(folder),
            f"vLLM refuses it: {error}",
            "placement.eval: more generation_memory or tensor_parallel where memory "
            f"is short; {OTHER_ENGINE}",
        ) from error


if __name__ == "__main__":
    cli.run(main)
