"""What the Transformers trainers share: saves, resuming, signals, and results.

A save counts only with its marker, written last and holding the digest of each of
its files; a run resumes from the newest save that its marker proves whole.

Several processes train one model where torchrun starts them: each takes its part of
every batch, and only the first, the writer, prints and writes results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scripts.lib import cli, outputs, tracking
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.progress import Progress
from scripts.lib.schema import Rewarded, TrainingRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Row = TypeVar("Row")

NOT_DONE = cli.NOT_DONE
MARKER = "whole.json"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A trainer's flags: every stage's, and --save-steps."""
    flags = cli.parser(doc)
    flags.add_argument(
        "--save-steps", type=int, default=100, help="steps between two saves in --work"
    )
    tracking.add_flag(flags)
    return flags


# --- processes ---------------------------------------------------------------


def num_processes() -> int:
    """How many processes train this model, as torchrun tells each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    """Whether this process is the one that prints and writes."""
    return num_processes() == 1 or os.environ["RANK"] == "0"


def largest(value: int, device: torch.device) -> int:
    """The largest of all processes' values; none goes on before all have come here."""
    if num_processes() == 1:
        return value
    import torch

    values = torch.tensor(value, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return int(values)


# --- saves -------------------------------------------------------------------


def step_of(save: Path) -> int:
    """The step in a save's name."""
    return int(save.name.rpartition("-")[2])


def digests(folder: Path) -> dict[str, str]:
    """Digest of each file in a folder but the marker, by name."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(MARKER):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            result[str(path.relative_to(folder))] = digest
    return result


def mark_whole(save: Path) -> None:
    """Write a save's marker, after its files have reached the disk."""
    for path in save.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    temporary = save / (MARKER + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(digests(save), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(save / MARKER)


def is_whole(save: Path) -> bool:
    """Whether the marker is there and every file is as it says."""
    try:
        marked = json.loads((save / MARKER).read_text(encoding="utf-8"))
        return bool(marked == digests(save))
    except (OSError, ValueError):
        return False


def newest_whole(work: Path) -> Path | None:
    """The newest whole save in a work folder; newer, broken ones are removed."""
    saves = sorted(work.glob("checkpoint-*"), key=step_of, reverse=True)
    for save in saves:
        if is_whole(save):
            return save
        print(f"skipping {save.name}: not a whole save", flush=True)
        shutil.rmtree(save)
    return None


def agreed_save(work: Path, device: torch.device) -> Path | None:
    """The newest whole save as the writer finds it, the same in all processes."""
    found = newest_whole(work) if is_writer() else None
    step = largest(step_of(found) if found else -1, device)
    return work / f"checkpoint-{step}" if step >= 0 else None


# --- training ----------------------------------------------------------------


def prepare(recipe: TrainingRecipe) -> None:
    """Seed everything; take the number of threads from OMP_NUM_THREADS."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads that spin while they wait make a shared machine several times slower.
    # Read when torch is imported, which is why it stands before that.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Alone with several GPUs, Transformers would give each a batch of the recipe's.
    if num_processes() == 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.partition(",")[0]
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(recipe.seed)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling what is empty would cost TRL's wide logit buffers more than training.
    torch.utils.deterministic.fill_uninitialized_memory = False


def settings(recipe: TrainingRecipe, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments all trainers take from the recipe and the flags.

    Each step is logged, so that what is logged does not depend on where a run was
    cut and resumed; `write_metrics` averages them over `log_steps`. Raises RecipeError
    where the batch cannot be split evenly among the processes.
    """
    import torch

    if recipe.batch_size % num_processes():
        raise RecipeError(
            f"{args.recipe} batch_size",
            f"{recipe.batch_size} is no multiple of the {num_processes()} processes",
            "place the stage on a number of processes that divides its batch_size",
        )
    use_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(args.work),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size // num_processes(),
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "adam_beta2": 0.95,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
        "report_to": report_to(args) if is_writer() else [],
        "run_name": args.logging.get("run"),
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": use_cpu,
        # Left to itself, a torch built with MPI would want its launcher.
        "ddp_backend": "gloo" if use_cpu and num_processes() > 1 else None,
    }


def report_to(args: argparse.Namespace) -> list[str]:
    """Where the Trainer logs to, by its own callbacks."""
    names = tracking.start(args.logging, args.work)
    if "mlflow" in names:
        os.environ["MLFLOW_RUN_ID"] = tracking.mlflow_run(args.logging, args.work)
    return names


def train(
    trainer: Trainer, recipe: TrainingRecipe, args: argparse.Namespace, metric: str
) -> bool:
    """Train to the recipe's last step, from the newest whole save if there is one.

    Returns False where SIGTERM to any process, or a file `stop` in --work, stopped it
    sooner, after a save; the step is then in `stopped`. Raises LossNotFinite, and
    NotDone where training ends at another step. All processes end alike.
    """
    from transformers import PrinterCallback, TrainerCallback

    progress = Progress(args.work)
    stop_file, stopped_file = args.work / outputs.STOP, args.work / outputs.STOPPED
    device = trainer.args.device
    stop_asked = stopped = False

    def ask_to_stop(signum: int, frame: Any) -> None:
        nonlocal stop_asked
        stop_asked = True

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> Any:
            # The Trainer loads saves without the renaming of keys that some models
            # (NemotronH) need, and would go on from other weights with a warning.
            # An adapter's names are the same in saves.
            if save is not None and not (save / "adapter_config.json").exists():
                saved = type(trainer.model).from_pretrained(save, dtype="auto")
                trainer.model.load_state_dict(saved.state_dict(), strict=True)

        def on_step_end(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> Any:
            nonlocal stopped
            wish = stop_asked or (is_writer() and stop_file.exists())
            if largest(int(wish), device) and state.global_step < recipe.steps:
                stopped = True
                control.should_save = True
                control.should_training_stop = True
            return control

        def on_log(self, _: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" not in logs:
                return
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    raise outputs.LossNotFinite(state.global_step, logs[name])
            if not is_writer():
                return
            step, lr = state.global_step, logs["learning_rate"]
            progress.report(step, recipe.steps, **{metric: logs[metric]}, lr=lr)
            if step % recipe.log_steps == 0 or step == recipe.steps:
                print(f"step {step} {metric} {logs[metric]:.4f}", flush=True)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            largest(0, device)  # the marker vouches for every process's files
            if is_writer():
                mark_whole(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    if is_writer():
        stopped_file.unlink(missing_ok=True)
    save = agreed_save(args.work, device)
    if save is not None and is_writer():
        print(f"resuming from {save.name}", flush=True)
    signal.signal(signal.SIGTERM, ask_to_stop)
    trainer.train(resume_from_checkpoint=str(save) if save else None)
    step = trainer.state.global_step
    if step != recipe.steps and not stopped:
        raise outputs.NotDone(f"training ended at step {step} of {recipe.steps}")
    if stopped:
        # torchrun signals the others when the first has ended: all shall exit alike.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_writer():
            stopped_file.write_text(str(step))
            print(f"stopped at step {step} of {recipe.steps}, saved", flush=True)
    largest(0, device)
    trainer.accelerator.end_training()
    return not stopped


# --- results -----------------------------------------------------------------


def save_model(model: PreTrainedModel, tokenizer_folder: Path, out: Path) -> None:
    """Write a Hugging Face folder: weights, configs, and the tokenizer's files.

    Only the writer writes.
    """
    if not is_writer():
        return
    model.config.use_cache = True
    model.config._name_or_path = ""
    model.save_pretrained(out)
    outputs.copy_tokenizer(tokenizer_folder, out)


def load_parent(parent: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A parent's model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (parent / "config.json").is_file():
        raise RecipeError(str(parent), "holds no config.json", "give a model folder")
    model = AutoModelForCausalLM.from_pretrained(
        parent, dtype=torch.float32, trust_remote_code=False
    )
    return model, AutoTokenizer.from_pretrained(parent, trust_remote_code=False)


def check_template(tokenizer: PreTrainedTokenizerBase, parent: Path) -> None:
    """Raise RecipeError where a parent's tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise RecipeError(str(parent), "its tokenizer has no chat template")


def read_rows(path: Path, what: str, of: Callable[[Any], Row]) -> list[Row]:
    """What `of` makes of a JSONL file's rows. Raises DataError where one is no `what`."""
    rows = []
    # by its lines alone: texts may hold other characters that end lines
    for number, line in enumerate(StringIO(path.read_text(encoding="utf-8")), 1):
        try:
            rows.append(of(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}", f"not a {what}: {error!r}") from error
    return rows


def read_prompts(path: Path) -> list[dict[str, str]]:
    """The prompts of a JSONL file, and their answers."""

    def row(found: Any) -> dict[str, str]:
        return {"input": str(found["input"]), "output": str(found["output"])}

    rows = read_rows(path, "prompt", row)
    if not rows:
        raise DataError(str(path), "holds no prompts")
    return rows


def environments_of(
    recipe: Rewarded, reward_model: Path | None
) -> dict[str, dict[str, Any]]:
    """A recipe's environments' settings; the reward model is read from its folder."""
    settings = recipe.environments()
    if "reward_model" in settings and "import" not in settings["reward_model"]:
        if reward_model is None:
            raise RecipeError("--reward-model", "missing", "give an rm node's folder")
        settings["reward_model"]["folder"] = str(reward_model)
    return settings


def align(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model the special tokens of its tokenizer."""
    from transformers import GenerationConfig

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def repeated(num_rows: int, num_wanted: int, seed: int) -> list[int]:
    """Row numbers in a shuffled order, epoch after epoch, `num_wanted` of them.

    The order of a whole run is fixed here: a resumed run only skips.
    """
    import numpy as np

    order: list[int] = []
    epoch = 0
    while len(order) < num_wanted:
        order += np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        epoch += 1
    return order[:num_wanted]
