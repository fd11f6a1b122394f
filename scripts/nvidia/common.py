"""What the Megatron-Bridge trainers share: start, saves, resuming, signals, results.

A save counts only with its marker, written after everything else: Bridge's own
trackers are written before its last files. A run loads one save by its step, and goes
on under other parallel sizes too.

Every rank runs this. Rank 0 writes the marker and the model; the last rank, which has
the loss under pipeline parallelism, writes the metrics.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib import cli, outputs, serving, tracking
from scripts.lib.errors import RecipeError, UserError
from scripts.lib.progress import Progress
from scripts.lib.schema import PARALLEL, Placement
from scripts.nvidia import versions
from scripts.nvidia.settings import CAPABILITY, PARALLEL_FIELDS

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

STARTED = time.time()
LOCK = Path("envs/nvidia.lock")
MARKER = "whole.json"
KERNELS = Path("work/kernels")
BLOCK = 1 << 16
WAIT = 3600.0
"""Seconds that processes wait for each other: rank 0 writes and checks large models."""
FLUSH_SECONDS = 2.0
EXPERTS = ("expert_parallel", "expert_tensor_parallel")
REFUSALS = (
    AssertionError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    AttributeError,
)
"""What Bridge raises for settings that it does not take, before it trains."""


# --- the command line ----------------------------------------------------------


def parser(doc: str | None, trains: bool = True) -> argparse.ArgumentParser:
    """A stage's flags: every stage's, the parallel sizes, and --save-steps."""
    flags = cli.parser(doc)
    if trains:
        flags.add_argument(
            "--save-steps", type=int, default=100, help="steps between two saves"
        )
        tracking.add_flag(flags)
    for name in PARALLEL:
        field = Placement.model_fields[name]
        is_truth = field.annotation in (bool, bool | None)
        flags.add_argument(
            f"--{name.replace('_', '-')}",
            type=truth if is_truth else int,
            default=field.default,
            metavar="true|false" if is_truth else "N",
            help=field.description,
        )
    return flags


def truth(text: str) -> bool:
    """`true` or `false` of a command line."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: true or false")
    return text == "true"


def placement(args: argparse.Namespace) -> dict[str, Any]:
    """The parallel flags' values."""
    return {name: getattr(args, name) for name in PARALLEL}


# --- start ---------------------------------------------------------------------


def rank() -> int:
    """The number of this process among those that train together."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process writes the model and the markers."""
    return rank() == 0


def is_last() -> bool:
    """Whether this process has the loss."""
    return rank() == world_size() - 1


def world_size() -> int:
    """Processes that train together, as torchrun tells each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare(work: Path, precision: str | None = None) -> None:
    """Set the environment up and check it, before anything slow is imported.

    What it is goes to environment.json in `work`.

    Kernels that Triton compiles and tunes, and Inductor's, stay in work/kernels, for
    all stages and machines: they are keyed by source, version and GPU. Raises
    UserError without a GPU, with packages of other versions, or for a precision that
    the GPU lacks.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    use_kernel_caches()
    wrong = versions.installed_problems(LOCK)
    if wrong:
        raise UserError(
            str(LOCK),
            "\n".join(["this environment has other versions:", *wrong]),
            "make env-nvidia; or run in the container that envs/nvidia.def describes",
        )
    import torch

    if is_first():
        KERNELS.mkdir(parents=True, exist_ok=True)
    choose_gpu()
    need = CAPABILITY.get(precision or "", (0, 0))
    if torch.cuda.get_device_capability() < need:
        raise RecipeError(
            f"precision {precision}",
            f"{torch.cuda.get_device_name()} has no such arithmetic: it needs compute "
            f"capability {need[0]}.{need[1]}",
            "choose bf16, or fp8_current on Hopper",
        )
    join()
    if is_first():
        seen = {
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name(),
            "gpus_seen": world_size(),
        }
        (work / "environment.json").write_text(json.dumps(seen))


def use_kernel_caches() -> None:
    """Keep what Triton, Inductor, CUDA and vLLM compile in work/kernels."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    kernels = KERNELS.absolute()
    for name, folder in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("CUDA_CACHE_PATH", "cuda"),
        ("VLLM_CACHE_ROOT", "vllm"),
    ):
        os.environ.setdefault(name, str(kernels / folder))
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


def choose_gpu() -> None:
    """Take this process' GPU. Raises UserError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"engine nvidia on {socket.gethostname()}",
            "no GPU is seen: CUDA says there is none",
            "place the stage on a GPU (placement, gpus: 1); nvidia-smi shows them",
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local}", f"{torch.cuda.device_count()} GPUs are seen here"
        )
    torch.cuda.set_device(local)


def join() -> None:
    """Meet the processes that torchrun has started, or be the only one."""
    import torch

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=WAIT))


def from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, in all processes; its error is raised in all."""
    import torch

    made: list[Any] = [None, None]
    if is_first():
        try:
            made[0] = make()
        except UserError as error:
            made[1] = type(error), error.where, error.what, error.hint
    torch.distributed.broadcast_object_list(made)
    if made[1]:
        kind, *words = made[1]
        raise kind(*words)
    return made[0]


# --- models --------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            str(folder), f"holds no readable config.json: {error}", "name a model"
        ) from error
    return dict(config)


def refuse_code(folder: Path) -> None:
    """Raise RecipeError for a model folder with code of its own."""
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in read_config(folder):
        raise RecipeError(
            str(folder),
            f"brings code of its own: {', '.join(code) or 'auto_map in config.json'}",
            "take a model that Transformers knows",
        )


Once = Callable[[Callable[[], Any]], Any]


def readable(folder: Path, work: Path, once: Once | None = None) -> Path:
    """A model folder whose config.json the installed Transformers can read.

    Newer releases name NemotronH's layers otherwise. `once` has one process do a thing
    for all, by default the first of the process group. Raises RecipeError where there
    is no config.json to read.
    """
    from transformers import AutoConfig

    config = read_config(folder)
    released = serving.as_released(config)
    if released is config:
        return folder
    with suppress(Exception):  # each release raises another
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return folder
    copy = work / "parent"

    def write() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for path in folder.iterdir():
            if path.name != "config.json":
                (copy / path.name).symlink_to(path.absolute())
        serving.write(copy / "config.json", released)

    (once or from_first)(write)
    return copy


def check_tokens(tokenizer: Path, model: Path) -> None:
    """Raise where the tokenizer has entries that the model has no embedding for."""
    from transformers import AutoTokenizer

    entries = len(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False))
    size = read_config(model).get("vocab_size", entries)
    if entries > size:
        raise RecipeError(
            str(model / "config.json"),
            f"vocab_size {size}, but the tokenizer has {entries}",
            "raise vocab_size in config.json, or take a smaller tokenizer",
        )


# --- saves ---------------------------------------------------------------------


def contents(save: Path) -> dict[str, int]:
    """Bytes of each file in a save but the marker, by name.

    Sizes, not digests: with the optimizer a save is many times the model.
    """
    return {
        str(path.relative_to(save)): path.stat().st_size
        for path in sorted(save.rglob("*"))
        if path.is_file() and not path.name.startswith((MARKER, ".nfs"))
    }


def mark_whole(save: Path, step: int, base: str, **more: Any) -> None:
    """Write a save's marker: what it holds, and the model it goes on from."""
    marker = {"step": step, "base": base, **more, "files": contents(save)}
    temporary = save / (MARKER + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(save / MARKER)


def step_of(save: Path) -> int:
    """The step in a save's name."""
    return int(save.name.rpartition("_")[2])


def newest_whole(saves: Path, base: str) -> dict[str, Any] | None:
    """The marker of the newest whole save; what a kill left unfinished is removed.

    Raises UserError for the save of another model, which this one is not to go on from.
    """
    for save in sorted(saves.glob("iter_*"), key=step_of, reverse=True):
        try:
            marked = json.loads((save / MARKER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            marked = {}
        if marked.get("files") == contents(save) and marked.get("step") == step_of(
            save
        ):
            if marked.get("base") != base:
                raise UserError(
                    str(save),
                    "was trained from another model, or with another adapter: "
                    f"{marked.get('base')}, this run has {base}",
                    "give another --work",
                )
            return dict(marked)
        print(f"skipping {save.name}: not a whole save", flush=True)
        shutil.rmtree(save)
    return None


def base_of(definition: Path, parent: Path | None, peft: Any) -> str:
    """What a save can only be resumed with: the model's shape, its start, the adapter.

    The weights are told by their files' sizes and a few blocks, which takes no time.
    """
    import hashlib

    digest = hashlib.sha256(
        json.dumps(read_config(definition), sort_keys=True).encode()
    )
    for path in sorted((parent or definition).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for at in (0, size // 3, size // 2, max(0, size - BLOCK)):
                file.seek(at)
                digest.update(file.read(BLOCK))
    digest.update(repr(peft).encode())
    return digest.hexdigest()[:16]


def regrouped(saved: dict[Any, Any], optimizers: int) -> dict[Any, Any]:
    """A distributed optimizer's loaded state, in the form that so many optimizers take.

    Megatron gives experts that are split over GPUs an optimizer of their own, by
    number, and others none; a save keeps the form that it was written in, and the
    tensors, named alike in both, come in the form of who loads
    (megatron/core/optimizer/optimizer.py: ChainedOptimizer.sharded_state_dict).
    """
    parts = {key: part for key, part in saved.items() if isinstance(key, int)}
    common = {key: part for key, part in saved.items() if not isinstance(key, int)}
    wanted = [parts.get(n, {}) for n in range(optimizers)]
    wanted = [common] if optimizers == 1 else wanted
    written = [part for part in (common, *parts.values()) if "optimizer" in part]
    if not written or all("optimizer" in part for part in wanted):
        return saved
    groups = [
        {**group, "is_expert_parallel": are_experts}
        for part in written
        for group in part["optimizer"]["param_groups"]
        for are_experts in (False, True)
    ]
    settings = {**written[0]["optimizer"], "param_groups": groups}
    wanted = [{**written[0], **part, "optimizer": settings} for part in wanted]
    return wanted[0] if optimizers == 1 else dict(enumerate(wanted))


def check_experts(
    saved: dict[str, int], now: dict[str, int], distributed: bool
) -> None:
    """Raise where Megatron cannot share the optimizer's state out anew."""
    changed = [name for name in EXPERTS if saved[name] != now[name]]
    if changed and not distributed:
        was, has = (", ".join(f"{n}: {s[n]}" for n in changed) for s in (saved, now))
        raise UserError(
            "placement",
            f"the save to go on from was written with {was}; this run has {has}",
            f"resume with {was}: other sizes need `distributed_optimizer: true` from "
            "the start",
        )


def load_regrouped() -> None:
    """Let Megatron load the optimizer of a save whose experts were split otherwise."""
    from megatron.core.optimizer import ChainedOptimizer

    load = ChainedOptimizer.load_state_dict

    def regroup_and_load(self: Any, saved: dict[Any, Any]) -> None:
        load(self, regrouped(saved, len(self.chained_optimizers)))

    ChainedOptimizer.load_state_dict = regroup_and_load


class History:
    """Loss, lr and gradient norm of each step, in work/steps.jsonl, written in lots.

    Only a save needs its steps on the disk: `sync` then. A sync at each lot held the
    training up by a tenth on a slow disk.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / "steps.jsonl"
        self.waiting: list[dict[str, Any]] = []

    def cut(self, step: int) -> None:
        """Forget what came after the save that the run goes on from."""
        kept = [entry for entry in self.read() if entry["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        temporary.replace(self.path)

    def read(self) -> list[dict[str, Any]]:
        """All steps; a last line that a kill cut is left out."""
        entries = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries

    def flush(self) -> list[dict[str, Any]]:
        """Write and return what waits; the GPU's losses are fetched here, in one go."""
        import torch

        losses = [entry["loss"] for entry in self.waiting]
        if losses:
            values = torch.stack(losses).float().tolist()
            for entry, loss in zip(self.waiting, values, strict=True):
                entry["loss"] = loss
        written, self.waiting = self.waiting, []
        self.add(*written)
        return written

    def add(self, *entries: dict[str, Any]) -> None:
        """Write entries."""
        with open(self.path, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())


# --- training ------------------------------------------------------------------


def train(
    config: ConfigContainer,
    recipe: Any,
    args: argparse.Namespace,
    base: str,
    at_end: Callable[[list[Any]], None],
    at_start: Callable[[list[Any]], None] | None = None,
) -> bool:
    """Train to the recipe's last step, from the newest whole save if there is one.

    `at_start` gets the model's chunks before the first step, `at_end` the trained
    model's while its processes still hold it. Returns False where SIGTERM, or a file
    `stop` in --work, stopped it sooner, after a save; the step is then in `stopped`.
    Raises LossNotFinite, and NotDone where training ends at another step. An exit code of 0 says nothing: Bridge exits so when stopped.
    """
    saves, history = args.work / "saves", History(args.work)
    for key, value in log_settings(args).items():
        setattr(config.logger, key, value)

    def find() -> dict[str, Any]:
        (args.work / outputs.STOPPED).unlink(missing_ok=True)
        found = newest_whole(saves, base)
        if found is None:
            shutil.rmtree(saves, ignore_errors=True)
            found = {"step": 0}
        else:
            print(f"resuming from step {found['step']}", flush=True)
        history.cut(found["step"])
        return found

    found, sizes = from_first(find), sizes_of(config)
    if found["step"]:
        config.checkpoint.ckpt_step = found["step"]
        # random states are saved by rank: under other sizes there are others
        config.checkpoint.load_rng = found["sizes"] == sizes
        distributed = config.optimizer.use_distributed_optimizer
        check_experts(found["sizes"], sizes, distributed)
        load_regrouped()
    else:
        config.checkpoint.load = None
    if found["step"] == recipe.steps:  # it was stopped before it was published
        config.checkpoint.save = None
        config.dataset.dataloader_type = "batch"  # others refuse to draw nothing

    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    say_when("imports done")
    watch = watcher(recipe, args, history, (base, sizes), at_end, at_start)
    stopped = False
    try:
        pretrain(config, forward_step, callbacks=[watch])
    except SystemExit:
        stopped = not watch.ended
    except UserError:
        raise
    except Exception as error:
        if "Unexpected result" in str(error):  # what its checks of losses say
            raise outputs.LossNotFinite(watch.step + 1, math.nan) from error
        full = "out of memory" in str(error)
        if watch.trained or full or not isinstance(error, REFUSALS):
            raise
        raise RecipeError(
            str(args.recipe),
            f"Megatron-Bridge refuses these settings: {error}",
            "change the recipe, its overrides or the placement",
        ) from error
    if stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all processes shall exit alike
        if is_first():
            (args.work / outputs.STOPPED).write_text(str(watch.step))
            print(f"stopped at step {watch.step} of {recipe.steps}, saved", flush=True)
        return False
    if watch.step != recipe.steps or not watch.ended:
        raise outputs.NotDone(f"training ended at step {watch.step} of {recipe.steps}")
    return True


def log_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What Bridge is told of logging, which its last process does.

    At MLflow each start is a run of its own: it logs settings that cannot change there.
    """
    logging, name = args.logging, args.logging.get("run")
    found: dict[str, Any] = {}
    if not tracking.start(logging, args.work):
        found["tensorboard_dir"] = None
    if wandb := logging.get("wandb"):
        found |= {"wandb_project": wandb["project"], "wandb_exp_name": name}
        found |= {"wandb_entity": wandb.get("entity"), "wandb_save_dir": str(args.work)}
    if mlflow := logging.get("mlflow"):
        found |= {"mlflow_experiment": mlflow["experiment"], "mlflow_run_name": name}
        found |= {"mlflow_tracking_uri": mlflow["tracking_uri"]}
    return found


def sizes_of(config: ConfigContainer) -> dict[str, int]:
    """By how many a run's state is shared out: what a save's random states are for."""
    sizes = {name: getattr(config.model, f) or 1 for name, f in PARALLEL_FIELDS.items()}
    return {"world": world_size(), **sizes}


def say_when(what: str) -> None:
    """Print how long after the process' start something happened."""
    if is_first():
        print(f"{what} {time.time() - STARTED:.1f} s after start", flush=True)


def watcher(
    recipe: Any,
    args: argparse.Namespace,
    history: History,
    of_save: tuple[str, dict[str, int]],
    at_end: Callable[[list[Any]], None],
    at_start: Callable[[list[Any]], None] | None,
) -> Any:
    """What Bridge calls at each step, at each save, and at the end."""
    import torch
    from megatron.bridge.training.callbacks import Callback

    class Watch(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.progress = Progress(args.work)
            self.stop = args.work / outputs.STOP
            self.step, self.lr = 0, 0.0
            self.trained = self.ended = False
            self.flushed = time.monotonic()

        def on_train_start(self, context: Any) -> None:
            self.step = context.state.train_state.step
            self.began = self.step
            if at_start is not None and self.step == 0:
                at_start(context.model)
            say_when("ready to train")

        def on_train_step_start(self, context: Any) -> None:
            self.lr = context.optimizer.param_groups[0]["lr"]

        def on_train_step_end(self, context: Any) -> None:
            # the loop counts the step after this
            self.step = context.state.train_state.step + 1
            self.trained = True
            if self.step <= self.began + 2:
                say_when(f"step {self.step} done")
            if is_first() and self.stop.exists():
                os.kill(os.getpid(), signal.SIGTERM)  # all processes agree on it
            if not is_last() or "lm loss" not in context.loss_dict:
                return
            history.waiting.append(
                {
                    "step": self.step,
                    "loss": context.loss_dict["lm loss"].detach().reshape(()),
                    "lr": self.lr,
                    "grad_norm": context.grad_norm,
                }
            )
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.report()  # waits for the GPU, so not at each step

        def report(self) -> None:
            entries = history.flush()
            self.flushed = time.monotonic()
            for entry in entries:
                if not math.isfinite(entry["loss"]):
                    raise outputs.LossNotFinite(entry["step"], entry["loss"])
            if not entries:
                return
            last = entries[-1]
            self.progress.report(
                last["step"], recipe.steps, loss=last["loss"], lr=last["lr"]
            )

        def on_checkpoint_save(self, context: Any) -> None:
            if is_last():
                self.report()
                history.sync()
            step = context.state.train_state.step
            torch.distributed.barrier()  # the marker vouches for the steps, too
            if is_first():
                save = args.work / "saves" / f"iter_{step:07d}"
                mark_whole(save, step, of_save[0], sizes=of_save[1])

        def on_eval_end(self, context: Any) -> None:
            found = (context.total_loss_dict or {}).get("lm loss")
            if is_last() and found is not None:
                self.report()
                history.add({"step": self.step, "validation_loss": float(found)})

        def on_train_end(self, context: Any) -> None:
            self.step = context.state.train_state.step
            if is_last():
                self.report()
            if self.step == recipe.steps:
                at_end(context.model)
                self.ended = True

    return Watch()


def write_metrics(args: argparse.Namespace, recipe: Any, tokens_a_step: int) -> None:
    """Write metrics.jsonl beside the model, by the rank that writes the model."""
    if not is_first():
        return
    entries = History(args.work).read()
    validated = {e["step"]: e for e in entries if "validation_loss" in e}
    history = [e | validated.get(e["step"], {}) for e in entries if "loss" in e]
    names = ("loss", "lr", "grad_norm", "validation_loss")
    outputs.write_metrics(
        args.out / "metrics.jsonl",
        history,
        recipe.log_steps,
        {name: name for name in names},
        tokens_a_step,
    )


def finish(code: int) -> int:
    """Leave without the interpreter's long way out; all files are written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
