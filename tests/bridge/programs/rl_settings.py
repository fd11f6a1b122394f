"""Have NeMo-RL read what the stages tell it, and publish saves of PyTorch's backends.

    python -m tests.bridge.programs.rl_settings ASKED.json FOUND.json

ASKED    `stages`: {name: {"stage", "argv", "fields"}}; `chat`: {"parent", "prompts"};
         `published`: {name: {"parent", "kind", "backend", "save", "harm"}}
FOUND    of a stage {field: value} of NeMo-RL's MasterConfig, and `data`: what its
         readers make of the rows; of a save what was published, or {"error": [...]}

No GPU and no Ray: a stage runs up to where NeMo-RL would start.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_preference_data, setup_response_data
from nemo_rl.distributed import ray_actor_environment_registry as actors
from nemo_rl.environments.utils import ENV_REGISTRY
from nemo_rl.utils.config import load_config, register_omegaconf_resolvers
from nemo_rl.utils.native_checkpoint import save_checkpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from scripts.environments import Turn
from scripts.lib import cli
from scripts.lib.errors import UserError
from scripts.nvidia import environments, grpo, publish, rl

CHAT = [{"role": "user", "content": "1 + 1"}]
SIDES = ("chosen", "rejected")
READ: list[tuple[str, Any]] = []


# --- settings ------------------------------------------------------------------


def read(
    algorithm: str, args: Any, settings: Any, steps: int, shown: str, before: Any
) -> tuple[None, bool]:
    """What `rl.run` does up to NeMo-RL's first line, and the first lines of that."""
    if before is grpo.register_environment:
        ENV_REGISTRY.pop(grpo.ENVIRONMENT, None)  # a process has one node
    before()
    path = rl.write_config(algorithm, args, settings)
    config = OmegaConf.to_container(load_config(str(path)), resolve=True)
    module = importlib.import_module(f"nemo_rl.algorithms.{algorithm}")
    READ.append((algorithm, module.MasterConfig(**config)))
    return None, False


def value(config: Any, key: str) -> Any:
    """A setting by its dotted name; of what is not there, "nothing"."""
    for name in key.split("."):
        if isinstance(config, dict):
            config = config.get(name, "nothing")
        else:
            config = getattr(config, name, "nothing")
    return config.model_dump() if hasattr(config, "model_dump") else config


def data_of(algorithm: str, config: Any) -> dict[str, Any]:
    """What NeMo-RL's readers make of the rows: how many, and how each is used."""
    tokenizer = get_tokenizer(config.policy["tokenizer"])
    told = {"template": tokenizer.apply_chat_template(CHAT, tokenize=False)}
    if algorithm == "grpo":
        rows, held = setup_response_data(tokenizer, config.data, None)
        held = {"default": held} if held is not None else {}
    else:
        rows, held = setup_preference_data(tokenizer, config.data)
    items = [rows[i] for i in range(len(rows))]
    told["held"] = {name: len(part) for name, part in held.items()}
    told["used"] = sum(float(item["loss_multiplier"]) for item in items)
    if algorithm == "grpo":
        told["rows"] = {
            item["extra_env_info"]["ground_truth"]: item["message_log"][0]["content"]
            for item in items
        }
        told["longest"] = max(item["length"] for item in items)
    else:
        told["rows"] = [
            [
                "".join(m["content"] for m in item[f"message_log_{side}"])
                for side in SIDES
            ]
            for item in items
        ]
        told["longest"] = max(
            item[f"length_{side}"] for item in items for side in SIDES
        )
    return told


def stage(case: dict[str, Any]) -> dict[str, Any]:
    """A node's settings, made as its script makes them and read as NeMo-RL does."""
    main = importlib.import_module(f"scripts.nvidia.{case['stage']}").main
    assert main(case["argv"]) == cli.NOT_DONE
    algorithm, config = READ.pop()
    found = {key: value(config, key) for key in case["fields"]}
    return found | {"data": data_of(algorithm, config)}


# --- environments --------------------------------------------------------------


class NoWorker:
    """In the place of a Ray actor, which is not asked."""

    @staticmethod
    def remote(*given: Any) -> None:
        return None


def chat(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """A conversation of three turns, as NeMo-RL's rollouts have it with the actor."""
    environments.Worker = NoWorker
    kind = environments.Environments.__ray_metadata__.modified_class
    actor = kind(
        {
            "prompts": case["prompts"],
            "tokenizer": case["parent"],
            "environments": {},
            "gpus": "",
            "workers": 2,
            "log": str(work / "rewards.jsonl"),
        }
    )
    asked: list[Any] = []
    turns = iter([Turn(0.25, "go on"), Turn(0.5, ""), Turn(1.0)])

    def ask(conversations: Any, rows: Any) -> list[Turn]:
        asked.append([conversations, rows])
        return [next(turns)]

    actor.ask = ask
    log = [{"role": "user", "content": "as NeMo-RL renders it"}]
    meta = {"ground_truth": "train row 2"}
    told = []
    for number in range(3):
        log.append({"role": "assistant", "content": f"<think>x</think>answer {number}"})
        found = actor.step([log], [meta])
        log.append(found.observations[0])
        (meta,) = found.metadata
        told.append([found.rewards.tolist(), found.terminateds.tolist(), log[-1]])
    actor_class = ENV_REGISTRY[grpo.ENVIRONMENT]["actor_class_fqn"]
    return {
        "told": told,
        "asked": asked,
        "rows": {name: row["input"] for name, row in actor.rows.items()},
        "actor": actor_class,
        "same_python": actors.ACTOR_ENVIRONMENT_REGISTRY[actor_class] == sys.executable,
    }


# --- publishing ----------------------------------------------------------------


def trained(case: dict[str, Any]) -> torch.nn.Module:
    """A parent's model with master weights that training has moved."""
    import transformers

    torch.manual_seed(0)
    rewards = case["kind"] == "reward" and case["save"] != "as causal"
    kind = "SequenceClassification" if rewards else "CausalLM"
    more = {"num_labels": 1} if rewards else {}
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        case["parent"], dtype=torch.float32, **more
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    return model


def save(model: torch.nn.Module, case: dict[str, Any], weights: Path) -> None:
    """Write a model as a backend of NeMo-RL does."""
    if case["save"] == "dtensor":
        save_checkpoint(model, str(weights))
        return
    state = model.state_dict()
    name = next(iter(state))
    if case["save"] == "without a tensor":
        del state[name]
    if case["save"] == "renamed":
        state[f"module.{name}"] = state.pop(name)
    if case["save"] == "automodel":
        weights, held = weights / "model", state
    else:
        held = {"model": state}
    torch.distributed.checkpoint.save(held, checkpoint_id=str(weights))


def one_bit(out: Path) -> None:
    """Change one weight of a published file."""
    path = out / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    tensors[name].view(torch.int16).view(-1)[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def lose(out: Path) -> None:
    """Lose a tensor of a published file."""
    path = out / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


HARM = {"one bit": one_bit, "a tensor lost": lose}


def published(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """Save a trained model, publish it; the folder is WORK/out/model."""
    weights, out = work / "weights", work / "out/model"
    model = trained(case)
    save(model, case, weights)
    whole, written = publish.write, HARM.get(case["harm"])

    def write(args: argparse.Namespace, *given: Any) -> None:
        whole(args, *given)
        if written:
            written(args.out)

    publish.write = write
    try:
        flags = {name: case[name] for name in ("kind", "backend", "parent")}
        flags |= {"weights": weights, "out": out, "work": work}
        publish.main([f"--{name}={given}" for name, given in flags.items()])
    except UserError as error:
        return {"error": [type(error).__name__, error.where, error.what, error.hint]}
    finally:
        publish.write = whole
    wanted = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    save_file({n: t.clone() for n, t in wanted.items()}, work / "wanted.safetensors")
    return {"left": sorted(path.name for path in work.iterdir())}


def main() -> None:
    """Answer what is asked."""
    question, answer = map(Path, sys.argv[1:])
    work = question.parent
    os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
    asked = json.loads(question.read_text())
    register_omegaconf_resolvers()
    rl.prepare = lambda args: None
    rl.run = read
    found: dict[str, Any] = {"stages": {}, "published": {}}
    for name, case in asked["stages"].items():
        found["stages"][name] = stage(case)
    found["chat"] = chat(asked["chat"], work)
    for name, case in asked["published"].items():
        place = work / "published" / name.replace(" ", "_")
        place.mkdir(parents=True)
        found["published"][name] = published(case, place)
    answer.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
