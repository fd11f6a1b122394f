"""Where trainers log to besides the project: TensorBoard, Weights & Biases, MLflow.

The runner writes what the config's `logging:` says, with the run's name and id, to
logging.json in the work folder; a script reads it by its flag --logging and hands it to
its trainer's own integrations. A run that goes on keeps its TensorBoard folder, its id
at Weights & Biases, which is made of the work folder's key, and with engine
transformers its run at MLflow. Keys come from the environment alone: WANDB_API_KEY, MLFLOW_TRACKING_TOKEN.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from scripts.lib.errors import UserError

NAMES = ("tensorboard", "wandb", "mlflow")
FOLDER = "tensorboard"
MLFLOW_RUN = "mlflow_run.json"
LONGEST_ID = 64
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def has(package: str) -> bool:
    """Whether a package is here, asked without importing it."""
    return importlib.util.find_spec(package) is not None


def wanted(logging: dict[str, Any]) -> list[str]:
    """Where to log: what the config names, and TensorBoard where it is and not refused."""
    given = logging | {"tensorboard": logging.get("tensorboard", has("tensorboard"))}
    return [name for name in NAMES if given.get(name)]


def lacking(logging: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first key whose package this Python lacks, what is wrong, and what to do."""
    for name in wanted(logging):
        if not has(name):
            return name, f"{sys.executable} has no {name}", f"pip install {name}"
    return None


def add_flag(flags: argparse.ArgumentParser) -> None:
    """Give a trainer's script --logging."""
    flags.add_argument(
        "--logging",
        type=read,
        default={"tensorboard": False},
        metavar="FILE",
        help="JSON: where to log to besides --work; default: nowhere",
    )


def read(path: str) -> dict[str, Any]:
    """The value of --logging, from its file.

    Raises UserError where a package lacks, or W&B's key.
    """
    logging: dict[str, Any] = json.loads(Path(path).read_text())
    if lacks := lacking(logging):
        raise UserError(f"logging.{lacks[0]}", *lacks[1:])
    wandb = logging.get("wandb") or {"mode": "offline"}
    mode = wandb.get("mode") or os.environ.get("WANDB_MODE", "online")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.exists() or any(map(os.environ.get, WANDB_KEYS))
    if mode == "online" and not known:
        what = "no WANDB_API_KEY, and nobody is logged in here"
        raise UserError("logging.wandb", what, "wandb login; or mode: offline")
    return logging


def start(logging: dict[str, Any], work: Path) -> list[str]:
    """Set what the integrations read from the environment; returns where to log.

    For the one process that logs.
    """
    found = wanted(logging)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / FOLDER)
    if "wandb" in found:
        settings = logging["wandb"]
        given = {
            "PROJECT": settings["project"],
            "ENTITY": settings.get("entity"),
            "MODE": settings.get("mode"),
            "NAME": logging["run"],
            "RUN_ID": logging["id"][-LONGEST_ID:],
            "RESUME": "allow",
            "DIR": str(work.absolute()),
        }
        os.environ |= {f"WANDB_{key}": value for key, value in given.items() if value}
    if "mlflow" in found:
        settings = logging["mlflow"]
        os.environ["MLFLOW_TRACKING_URI"] = settings["tracking_uri"]
        os.environ["MLFLOW_EXPERIMENT_NAME"] = settings["experiment"]
        if settings["tracking_uri"].startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return found


def mlflow_run(logging: dict[str, Any], work: Path) -> str:
    """The id of the run at MLflow: the one of before, else a new one.

    Raises UserError where MLflow does not make one.
    """
    kept = work / MLFLOW_RUN
    settings = logging["mlflow"]
    if kept.exists() and (known := json.loads(kept.read_text()))[0] == settings:
        # parameters of a run cannot change, and those of its placement may have
        os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"
        return str(known[1])
    import mlflow

    try:
        mlflow.set_tracking_uri(settings["tracking_uri"])
        experiment = mlflow.set_experiment(settings["experiment"]).experiment_id
        run = mlflow.MlflowClient().create_run(experiment, run_name=logging["run"])
    except (ImportError, mlflow.exceptions.MlflowException) as error:
        raise UserError("logging.mlflow", str(error)) from error
    kept.write_text(json.dumps([settings, run.info.run_id]))
    return str(run.info.run_id)
