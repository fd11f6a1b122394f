"""What the NeMo-RL stages share: settings, the entry point, saves, resuming, results.

NeMo-RL's own entry point runs, in this process, on a YAML of ours that lays the node's
recipe over the configuration that NeMo-RL ships. Beside it, this process counts steps,
asks for a save when it is to stop, and writes what was logged: NeMo-RL has no hooks for
these, so its logger's and its timer's methods are wrapped. Its workers are as they are,
but for the number of their GPU (`renumbered`).

A save is NeMo-RL's: work/saves/step_N, renamed into place when it is whole.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.lib import cli, outputs, tracking
from scripts.lib.errors import DataError, UserError
from scripts.lib.progress import Progress
from scripts.lib.schema import RL_PLACEMENT, Placement
from scripts.nvidia import common, gpus, versions
from scripts.nvidia.settings import has_flash, has_module

LOCK = Path("envs/nemo-rl.lock")
MEGATRON_CACHE = "megatron"
MARGIN = 8
"""Tokens that a sequence may be longer than what was measured."""
NO_LIMIT = 1_000_000
"""Epochs and kept saves: the steps end a run, and the work folder is its own."""

SEEN = ("vllm", "ray", "megatron-core", "megatron-bridge", "transformers", "torch")
"""Packages whose versions provenance tells, as they are here."""

SHIPPED = {
    ("grpo", "megatron"): "grpo_math_1B_megatron.yaml",
    ("grpo", "dtensor"): "grpo_math_1B.yaml",
    ("dpo", "megatron"): "dpo.yaml",
    ("dpo", "dtensor"): "dpo.yaml",
    ("rm", "dtensor"): "rm.yaml",
}
"""The configuration of NeMo-RL that a node's settings are laid over."""

SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Ray's name for what a worker runs first (ray._private.ray_constants, 2.55)."""

REWARDS = "rewards.jsonl"
"""What the environments gave, by their actor, in --work."""
STEP = re.compile(r"step_(\d+)")


# --- the command line ----------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A stage's flags: those of the engine, and where NeMo-RL puts its processes."""
    flags = common.parser(doc)
    flags.add_argument("--parent", type=Path, required=True, help="model folder")
    for name in RL_PLACEMENT:
        field = Placement.model_fields[name]
        kind = {"backend": str, "generation_memory": float}.get(name, int)
        flags.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=field.default,
            required=name == "backend",
            help=field.description,
        )
    return flags


# --- start ---------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Set the environment up and check it, before anything slow is imported.

    Raises UserError without NeMo-RL, with another version of it, or without a GPU.
    """
    common.use_kernel_caches()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_CACHE"] = str((args.work / "datasets").absolute())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["PYTHONFAULTHANDLER"] = "1"
    # else Ray would join whatever cluster it finds on this machine
    os.environ.setdefault("RAY_ADDRESS", "local")
    os.environ["NRL_MEGATRON_CHECKPOINT_DIR"] = str(
        (args.work / MEGATRON_CACHE).absolute()
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if not has_module("nemo_rl"):
        raise UserError(
            sys.executable,
            "no NeMo-RL: it is in NVIDIA's container, not on the package index",
            "run in nvcr.io/nvidia/nemo-rl (README); or put its source on PYTHONPATH",
        )
    import nemo_rl

    wanted = versions.pins(LOCK)["nemo-rl"]
    if nemo_rl.__version__.partition("+")[0] != wanted:
        raise UserError(
            str(LOCK), f"pins NeMo-RL {wanted}; here it is {nemo_rl.__version__}"
        )
    if one_python():
        os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
    common.choose_gpu()
    import torch

    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    seen = {
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(),
        "gpus_seen": args.nodes * args.gpus,
        "seen": versions.installed(SEEN) | {"nemo-rl": nemo_rl.__version__},
    }
    (args.work / "environment.json").write_text(json.dumps(seen))


def one_python() -> bool:
    """Whether this Python has what NeMo-RL's workers need.

    In NVIDIA's container they have Pythons of their own, which NeMo-RL finds.
    """
    return has_module("vllm") and has_module("transformer_engine")


def examples() -> Path:
    """The folder of NeMo-RL's entry points, beside its package."""
    spec = importlib.util.find_spec("nemo_rl")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]).parent / "examples"
    if not folder.is_dir():
        raise UserError(str(folder), "NeMo-RL's examples are not beside its package")
    return folder


def open_parent(args: argparse.Namespace) -> dict[str, Any]:
    """The parent's config.json; `args.parent` becomes what Transformers can read here.

    Raises RecipeError for a folder with code of its own, which NeMo-RL would run.
    """
    common.refuse_code(args.parent)
    args.parent = common.readable(args.parent, args.work, lambda make: make())
    return common.read_config(args.parent)


# --- settings ------------------------------------------------------------------


def family(backend: str) -> str:
    """Whose settings a backend takes: Automodel's are DTensor's."""
    return "megatron" if backend == "megatron" else "dtensor"


def merge(base: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other` laid over `base`, section by section."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


def nested(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    result: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def policy(
    recipe: Any, args: argparse.Namespace, config: Mapping[str, Any], length: int
) -> dict[str, Any]:
    """The `policy` section: the model, its optimizer, how it is split.

    `length` is the longest sequence in tokens, `config` the parent's config.json.
    """
    tensor = args.tensor_parallel
    shared: dict[str, Any] = {
        "model_name": str(args.parent.absolute()),
        "tokenizer": {"name": str(args.parent.absolute())},
        "train_global_batch_size": recipe.batch_size,
        "train_micro_batch_size": args.micro_batch_size,
        "logprob_batch_size": args.micro_batch_size,
        "max_total_sequence_length": length,
        "precision": "bfloat16",
        "max_grad_norm": recipe.max_grad_norm,
        "make_sequence_length_divisible_by": tensor * 2 * args.context_parallel
        if args.context_parallel > 1
        else tensor,
        "dynamic_batching": {"enabled": False},
        # only FlashAttention keeps packed sequences apart
        "sequence_packing": {"enabled": has_flash() and args.backend == "megatron"},
    }
    if args.backend == "megatron":
        return shared | {
            "optimizer": None,
            "dtensor_cfg": {"enabled": False},
            "megatron_cfg": megatron(recipe, args, config),
        }
    return shared | {
        "dtensor_cfg": {
            "enabled": True,
            "_v2": args.backend == "automodel",
            "tensor_parallel_size": tensor,
            "context_parallel_size": args.context_parallel,
            "sequence_parallel": bool(args.sequence_parallel),
        },
        "megatron_cfg": {"enabled": False},
        **torch_optimizer(recipe),
    }


def megatron(
    recipe: Any, args: argparse.Namespace, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The `megatron_cfg` section."""
    wished = args.sequence_parallel
    style = recipe.lr_scheduler.removesuffix("_with_warmup")
    warmup = 0 if recipe.lr_scheduler == "constant" else recipe.warmup_steps
    found: dict[str, Any] = {
        "enabled": True,
        "env_vars": renumbered(),
        "tensor_model_parallel_size": args.tensor_parallel,
        "pipeline_model_parallel_size": args.pipeline_parallel,
        "context_parallel_size": args.context_parallel,
        "expert_model_parallel_size": args.expert_parallel,
        "expert_tensor_parallel_size": args.expert_tensor_parallel,
        "sequence_parallel": args.tensor_parallel > 1 if wished is None else wished,
        # Megatron has no fused kernel for squared ReLU, which NemotronH's MLPs have
        "bias_activation_fusion": "relu2" not in str(config.get("mlp_hidden_act"))
        and config.get("model_type") != "nemotron_h",
        "apply_rope_fusion": has_flash(),
        "optimizer": {
            "lr": recipe.lr,
            "min_lr": 0.0,
            "weight_decay": recipe.weight_decay,
            "adam_beta2": 0.95,
            "clip_grad": recipe.max_grad_norm,
            "use_distributed_optimizer": args.distributed_optimizer,
            "use_precision_aware_optimizer": args.distributed_optimizer,
        },
        "scheduler": {
            "lr_decay_style": style,
            "lr_decay_iters": recipe.steps,
            "lr_warmup_iters": warmup,
            "lr_warmup_init": 0.0,
        },
        # else vLLM gets what the next forward pass would have gathered first (0.7.0)
        "distributed_data_parallel_config": {"overlap_param_gather": False},
    }
    if not has_flash():
        found["attention_backend"] = "unfused"  # cuDNN's take no odd lengths
    return found


def renumbered() -> dict[str, str]:
    """What has Megatron's workers count GPUs as PyTorch does (`scripts.nvidia.gpus`).

    Raises UserError where $CUDA_VISIBLE_DEVICES has no numbers.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not all(map(str.isdecimal, names)):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES {given}",
            "NeMo-RL finds Megatron's GPUs by their numbers",
            "name them as `nvidia-smi -L` numbers them, or set backend: dtensor",
        )
    if list(map(int, names)) == list(range(len(names))):
        return {}
    return {SETUP_HOOK: f"{gpus.__name__}.{gpus.as_pytorch_counts.__name__}"}


def torch_optimizer(recipe: Any) -> dict[str, Any]:
    """The optimizer and its schedule as PyTorch's own, for DTensor."""
    schedulers: list[dict[str, Any]] = []
    warmup = 0 if recipe.lr_scheduler == "constant" else recipe.warmup_steps
    after = max(1, recipe.steps - warmup)

    def scheduler(name: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": f"torch.optim.lr_scheduler.{name}", "kwargs": kwargs}

    if warmup:
        start = 1.0 / (warmup + 1)
        schedulers.append(
            scheduler(
                "LinearLR", start_factor=start, end_factor=1.0, total_iters=warmup
            )
        )
    if recipe.lr_scheduler == "cosine":
        schedulers.append(scheduler("CosineAnnealingLR", T_max=after, eta_min=0.0))
    elif recipe.lr_scheduler == "linear":
        schedulers.append(
            scheduler("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=after)
        )
    else:
        schedulers.append(scheduler("ConstantLR", factor=1.0, total_iters=1))
    # NeMo-RL reads them of every list, of one schedule too
    milestones = {"milestones": [warmup] if warmup else []}
    return {
        "optimizer": {
            "name": "torch.optim.AdamW",
            "kwargs": {
                "lr": recipe.lr,
                "weight_decay": recipe.weight_decay,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "foreach": False,  # those kernels take no DTensors
                "fused": False,
            },
        },
        "scheduler": [*schedulers, milestones],
    }


def around(args: argparse.Namespace) -> dict[str, Any]:
    """Sections that say where a run is, and that it ends at its last step."""
    saves = (args.work / "saves").absolute()
    checkpointing: dict[str, Any] = {
        "enabled": True,
        "checkpoint_dir": str(saves),
        "metric_name": None,
        "higher_is_better": True,
        "keep_top_k": 1,  # besides the newest
        "save_period": args.save_steps,
        "checkpoint_must_save_by": None,
        "save_optimizer": True,
        "model_save_format": "torch_save" if args.backend == "automodel" else None,
        "is_async": False,
    }
    if args.backend != "automodel":
        del checkpointing["is_async"]
    return {
        "checkpointing": checkpointing,
        "logger": {
            "log_dir": str((args.work / "logs").absolute()),
            "swanlab_enabled": False,
            "monitor_gpus": False,
            **log_settings(args),
        },
        "cluster": {"gpus_per_node": args.gpus, "num_nodes": args.nodes},
    }


def log_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What NeMo-RL is told of logging.

    At MLflow each start is a run of its own: it logs settings that cannot change there.
    """
    logging, name = args.logging, args.logging.get("run")
    names = tracking.start(logging, args.work)
    found: dict[str, Any] = {f"{n}_enabled": n in names for n in tracking.NAMES}
    if wandb := logging.get("wandb"):
        found["wandb"] = {"project": wandb["project"], "name": name}
        if "entity" in wandb:
            found["wandb"]["entity"] = wandb["entity"]
    if mlflow := logging.get("mlflow"):
        found["mlflow"] = {
            "experiment_name": mlflow["experiment"],
            "run_name": name,
            "tracking_uri": mlflow["tracking_uri"],
        }
    return found


def write_config(
    algorithm: str, args: argparse.Namespace, settings: Mapping[str, Any]
) -> Path:
    """The YAML that the entry point reads: what NeMo-RL ships, and ours over it."""
    from ruamel.yaml import YAML

    shipped = examples() / "configs" / SHIPPED[algorithm, family(args.backend)]
    path = args.work / "nemo_rl.yaml"
    with open(path, "w", encoding="utf-8") as file:
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump({"defaults": str(shipped), **settings}, file)
    return path


# --- pairs of answers --------------------------------------------------------------


def pairs(args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """The `data` section of what learns from pairs; their files in NeMo-RL's form.

    Raises DataError where there are fewer pairs than a batch: NeMo-RL would end at
    once, as if all were well.
    """
    counts = {name: copy_pairs(args, name) for name in ("train", "validation")}
    if counts["train"] < batch_size:
        raise DataError(
            str(args.preferences / "train.jsonl"),
            f"{counts['train']} pairs, fewer than batch_size {batch_size}",
            "lower batch_size, or give more pairs",
        )
    found = json.loads((args.preferences / "preferences.json").read_text())

    def file(name: str) -> dict[str, Any]:
        path = (args.work / "rows" / f"{name}.jsonl").absolute()
        kind = {"dataset_name": "BinaryPreferenceDataset", "split": "train"}
        keys = {f"{key}_key": key for key in ("prompt", "chosen", "rejected")}
        return {**kind, **keys, "data_path": str(path)}

    return {
        "_override_": True,
        "max_input_seq_length": found["longest_tokens"] + MARGIN,
        "shuffle": True,
        "num_workers": 1,
        "train": file("train"),
        "validation": file("validation") if counts["validation"] else None,
    }


def copy_pairs(args: argparse.Namespace, name: str) -> int:
    """Write a file of pairs under the names that NeMo-RL reads; how many there are."""
    source = args.preferences / f"{name}.jsonl"
    target = args.work / "rows" / f"{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    num_pairs = 0
    with open(source, encoding="utf-8") as rows, open(target, "w") as file:
        for line in rows:
            num_pairs += 1
            row = json.loads(line)
            pair = {key: row[key] for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": row["messages"], **pair}) + "\n")
    return num_pairs


def train_on_pairs(
    algorithm: str,
    args: argparse.Namespace,
    recipe: Any,
    own: dict[str, Any],
    kind: str,
) -> int:
    """Run a stage that learns from pairs; `own` is its section, and more of `policy`."""
    prepare(args)
    config = open_parent(args)
    data = pairs(args, recipe.batch_size)
    length = data["max_input_seq_length"]
    length += -length % (2 * args.tensor_parallel * args.context_parallel)
    replicas = (
        args.nodes
        * args.gpus
        // (args.tensor_parallel * args.pipeline_parallel * args.context_parallel)
    )
    steps = {
        "max_num_epochs": NO_LIMIT,
        "max_num_steps": recipe.steps,
        "val_period": 0,
        "val_batches": 0,
        "val_global_batch_size": args.micro_batch_size * replicas,
        "val_micro_batch_size": args.micro_batch_size,
        "val_at_start": False,
        "val_at_end": data["validation"] is not None,
        "seed": recipe.seed,
    }
    settings = around(args) | {
        algorithm: steps,
        "policy": policy(recipe, args, config, length),
        "data": data,
    }
    settings["policy"]["sequence_packing"] = {"enabled": False}
    merge(settings, own)
    merge(settings, nested(recipe.overrides))
    watch, done = run(
        algorithm, args, settings, recipe.steps, "loss", render_by_template_alone
    )
    if not done:
        return cli.NOT_DONE
    publish(args, recipe.steps, kind)
    write_metrics(args, watch, recipe, OF_PAIRS)
    return 0


def render_by_template_alone() -> None:
    """Have NeMo-RL render pairs as prompts, SFT's chats and what is scored are.

    It would add the tokenizer's first and last token to those whose chat template
    writes none, and no key of its YAML says otherwise.
    """
    from nemo_rl.data import processors

    processors.get_formatted_message_log = functools.partial(
        processors.get_formatted_message_log, add_bos_token=False, add_eos_token=False
    )


OF_PAIRS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards_chosen_mean": "reward_chosen",
    "rewards_rejected_mean": "reward_rejected",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "validation/accuracy": "validation_accuracy",
    "validation/loss": "validation_loss",
    "seconds/total_step_time": "seconds",
}
"""What is kept of a run on pairs: NeMo-RL's names and ours."""


# --- saves ---------------------------------------------------------------------


def step_of(save: Path) -> int:
    """The step in a save's name."""
    found = STEP.fullmatch(save.name)
    return int(found[1]) if found else -1


def newest(work: Path) -> Path | None:
    """The newest whole save; what a kill left unfinished is put right or removed."""
    saves = work / "saves"
    for left in saves.glob("tmp_step_*"):  # NeMo-RL would write among its files
        shutil.rmtree(left)
    for old in saves.glob("old_step_*"):
        now = saves / old.name.removeprefix("old_")
        shutil.rmtree(old) if now.exists() else old.rename(now)
    whole = [s for s in saves.glob("step_*") if (s / "training_info.json").exists()]
    return max(whole, key=step_of, default=None)


def prepare_resume(args: argparse.Namespace, steps: int) -> int:
    """The step that a run goes on from.

    Raises UserError where the save is another backend's.
    """
    (args.work / outputs.STOPPED).unlink(missing_ok=True)
    for folder in (args.work / MEGATRON_CACHE).glob("*/iter_0000000"):
        if not (folder / "run_config.yaml").exists():  # written last
            shutil.rmtree(folder)
    marker = args.work / "backend"
    save = newest(args.work)
    if save is None:
        shutil.rmtree(args.work / "saves", ignore_errors=True)
        marker.write_text(args.backend)
        return 0
    written = marker.read_text() if marker.exists() else args.backend
    if written != args.backend:
        raise UserError(
            "placement.backend",
            f"{args.backend}, but the save to go on from, {save}, is {written}'s",
            f"set backend: {written}, or remove {args.work}",
        )
    if args.backend == "megatron":
        # a folder of this name tells NeMo-RL that the save has an optimizer;
        # Megatron-Core 0.19 no longer writes the file that it looks for
        (save / "policy/optimizer").mkdir(exist_ok=True)
    print(f"resuming from step {step_of(save)}", flush=True)
    return min(step_of(save), steps)


# --- the run -------------------------------------------------------------------


class Watch:
    """Counts steps, keeps what is logged, and has NeMo-RL save when it is to stop."""

    def __init__(self, args: argparse.Namespace, steps: int, shown: str) -> None:
        self.args, self.steps, self.shown = args, steps, shown
        self.history = common.History(args.work)
        self.progress = Progress(args.work)
        self.waiting: dict[str, float] = {}
        self.asked = self.stopped = False
        self.still: list[bool] = []
        self.rewards = args.work / REWARDS
        self.read_to = self.rewards.stat().st_size if self.rewards.exists() else 0

    def install(self) -> None:
        """Wrap the methods that all of NeMo-RL's loops call once a step."""
        from nemo_rl.utils.logger import Logger
        from nemo_rl.utils.timer import TimeoutChecker

        log, init, check = (
            Logger.log_metrics,
            TimeoutChecker.__init__,
            TimeoutChecker.check_save,
        )
        watch = self

        def log_metrics(
            logger: Any,
            metrics: Any,
            step: int,
            prefix: str = "",
            *more: Any,
            **named: Any,
        ) -> None:
            watch.see(metrics, step, prefix)
            log(logger, metrics, step, prefix, *more, **named)

        def begin(timer: Any, *given: Any, **named: Any) -> None:
            init(timer, *given, **named)
            # Ray has set its own by now, which would end this process unsaved
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, watch.ask)

        def check_save(timer: Any) -> bool:
            if watch.asked or (watch.args.work / outputs.STOP).exists():
                timer.last_saved = watch.stopped = True
                return True
            return bool(check(timer))

        Logger.log_metrics = log_metrics
        TimeoutChecker.__init__ = begin
        TimeoutChecker.check_save = check_save

    def ask(self, *_: object) -> None:
        self.asked = True

    def see(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Keep one call's numbers; the last call of a step writes them all."""
        names = PREFIXES.get(prefix)
        if names is None:
            return
        for name, value in metrics.items():
            with_number = getattr(value, "item", None)
            if with_number is not None and getattr(value, "size", 1) == 1:
                value = with_number()
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.waiting[names + name] = float(value)
        if prefix != "timing/train" or "loss" not in self.waiting:
            return
        entry = {"step": step, **self.waiting, **self.each_reward()}
        self.waiting = {}
        self.history.add(entry)
        self.report(step, entry)

    def each_reward(self) -> dict[str, float]:
        """The mean reward that each environment gave since the last step, by name."""
        if not self.rewards.exists():
            return {}
        with open(self.rewards, "rb") as file:
            file.seek(self.read_to)
            whole = file.read().rpartition(b"\n")[:2]  # the actor may be at one
        self.read_to += sum(map(len, whole))
        lines = [json.loads(line) for line in whole[0].split(b"\n") if line]
        sums: dict[str, float] = {}
        count = sum(line["count"] for line in lines)
        for line in lines:
            for name, reward in line["rewards"].items():
                sums[name] = sums.get(name, 0.0) + reward * line["count"]
            for name, (number, first) in line["faults"].items():
                print(f"environment {name}: {number} faults: {first}", flush=True)
        return {f"reward/{name}": total / count for name, total in sums.items()}

    def report(self, step: int, entry: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(entry.get(name, 0.0)):
                raise outputs.LossNotFinite(step, entry[name])
        text = " ".join(
            f"{name} {entry[name]:.4f}"
            for name in (self.shown, "gen_kl_error")
            if name in entry
        )
        print(f"step {step} of {self.steps} {text}", flush=True)
        known = {self.shown: entry[self.shown], "lr": entry.get("lr", 0.0)}
        self.progress.report(step, self.steps, **known)
        for old in self.args.work.glob(f"logs/*/train_data_step{step - 1}.jsonl"):
            old.unlink()  # each holds every completion of its step
        self.warn(step, entry)

    def warn(self, step: int, entry: dict[str, float]) -> None:
        """Say so where all completions of the first steps are worth the same."""
        mixed = entry.get("baseline_reward/pct_mixed")
        if mixed is None or len(self.still) >= STILL_STEPS:
            return
        self.still.append(mixed == 0.0)
        if len(self.still) == STILL_STEPS and all(self.still):
            text = (
                f"the reward was {entry['reward']:.3g} for every completion of "
                f"{STILL_STEPS} steps, so nothing is learnt. Likely: answers are not of "
                "the form that the environment reads; the chat template differs from "
                "the one of SFT; max_completion_tokens cuts the answer off; the prompts "
                "are too hard, or too easy"
            )
            print(f"warning: {text}", flush=True)
            (self.args.work / outputs.WARNING).write_text(text)


STILL_STEPS = 3
PREFIXES = {
    "train": "",
    "timing/train": "seconds/",
    "validation": "validation/",
    "validation-default": "validation/",
}
"""NeMo-RL's prefixes of what is kept, and ours."""


def run(
    algorithm: str,
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    steps: int,
    shown: str,
    before: Callable[[], None] = lambda: None,
) -> tuple[Watch, bool]:
    """Run NeMo-RL's entry point to the last step, from the newest save if there is one.

    `shown` is the metric of the progress line; `before` is called when NeMo-RL may be
    imported. Returns what was logged, and False where it stopped sooner, after a save.
    Raises NotDone where it ends at another step: an exit code of 0 says nothing.
    """
    reached = prepare_resume(args, steps)
    watch = Watch(args, steps, shown)
    watch.history.cut(reached)
    if reached < steps:
        script = examples() / f"run_{algorithm}.py"
        config = write_config(algorithm, args, settings)
        sys.path.insert(0, str(examples().parent))
        watch.install()
        if one_python():
            use_this_python()
        before()
        common.say_when("imports done")
        given, sys.argv = sys.argv, [str(script), "--config", str(config)]
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            sys.argv = given
            end_ray()
        save = newest(args.work)
        reached = step_of(save) if save else 0
    if reached < steps and watch.stopped:
        (args.work / outputs.STOPPED).write_text(str(reached))
        print(f"stopped at step {reached} of {steps}, saved", flush=True)
        return watch, False
    if reached != steps:
        raise outputs.NotDone(f"training ended at step {reached} of {steps}")
    return watch, True


def use_this_python() -> None:
    """Have the workers of PyTorch's backends, too, run with this interpreter.

    $NEMO_RL_PY_EXECUTABLES_SYSTEM leaves theirs out (0.7.0).
    """
    from nemo_rl.distributed import ray_actor_environment_registry as registry

    for name in registry.ACTOR_ENVIRONMENT_REGISTRY:
        registry.ACTOR_ENVIRONMENT_REGISTRY[name] = sys.executable


def end_ray() -> None:
    """Let go of the workers, so that their GPUs are free."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def leave(main: Callable[[], int]) -> None:
    """Run a stage's main and leave at once: NeMo-RL's objects would ask Ray to end
    their workers when it is gone, which is fatal.
    """
    try:
        cli.run(main)
    except SystemExit as end:
        common.finish(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        common.finish(1)


def weights_of(work: Path, steps: int) -> Path:
    """The trained weights of a run's last save."""
    return work / "saves" / f"step_{steps}" / "policy" / "weights"


# --- results -------------------------------------------------------------------


def publish(args: argparse.Namespace, steps: int, kind: str = "causal") -> None:
    """Convert the last save to a Hugging Face folder, gated, in a process of its own.

    The GPUs of this machine share the model as they did while it was trained, as far
    as they are enough. Raises UserError with what the gate says.
    """
    from scripts.nvidia import publish as script

    words = ["-P", "-m", script.__name__, "--kind", kind]
    words += ["--parent", str(args.parent), "--out", str(args.out)]
    words += ["--weights", str(weights_of(args.work, steps)), "--work", str(args.work)]
    words += ["--backend", args.backend]
    line = [sys.executable, *words]
    if args.backend == "megatron":
        sizes = {
            name: getattr(args, name)
            for name in ("tensor_parallel", "pipeline_parallel", "expert_parallel")
        }
        split = math.lcm(sizes["tensor_parallel"], sizes["expert_parallel"])
        world = split * sizes["pipeline_parallel"]
        if world > args.gpus:
            sizes = {name: 1 for name in sizes}
            world = 1
        for name, size in sizes.items():
            words += [f"--{name.replace('_', '-')}", str(size)]
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += [f"--nproc-per-node={world}", "--no-python", sys.executable, *words]
    started = time.monotonic()
    done = subprocess.run(line, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    print(f"published in {time.monotonic() - started:.0f} s", flush=True)


def write_metrics(
    args: argparse.Namespace, watch: Watch, recipe: Any, names: dict[str, str]
) -> None:
    """Write metrics.jsonl beside the model."""
    outputs.write_metrics(
        args.out / "metrics.jsonl", watch.history.read(), recipe.log_steps, names
    )
