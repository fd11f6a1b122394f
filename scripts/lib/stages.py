"""The stages: which script runs each, what it publishes, which packages it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from scripts.lib import schema

_HF = ("tokenizers", "transformers")
_TRAIN = (*_HF, "torch", "accelerate", "safetensors", "numpy")
_MEGATRON = (
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
    *_HF,
    "torch",
    "safetensors",
    "numpy",
)
_MEGATRON_TRAIN = (*_MEGATRON, "mamba-ssm", "causal-conv1d")
_NEMO_RL = ("nemo-rl", "vllm", "ray")
"""What else its stages use, NeMo-RL's version decides."""
_RL_FLAGS = (*schema.PARALLEL, *schema.RL_PLACEMENT)

Launcher = Literal["", "torchrun", "ray"]


@dataclass(frozen=True)
class Stage:
    """A kind of node.

    `content` is the folder of an artifact that descendants read. `packages` are
    those whose version can change a result: they are part of a node's identity,
    at the version that the engine's lock pins. `beside` are files that the script
    writes with the content, published apart from it. `launcher` starts the processes of
    those that can have several. `nvidia` is the script of that engine, started by
    `nvidia_launcher`; a stage without one is run by transformers whatever the config's
    engine. `nvidia_flags` are the placement that its script there is told. `by_file`:
    its script finds what is done of its files in --out and in folders of before, and
    can make a share of them, for other jobs. `goes_on`: after its time limit, its
    script is started again and goes on where it was.
    """

    name: str
    script: str
    content: str
    node: type[BaseModel]
    recipe: type[BaseModel]
    packages: tuple[str, ...] = ()
    trains: bool = False
    beside: tuple[str, ...] = ()
    launcher: Launcher = ""
    nvidia: str = ""
    nvidia_packages: tuple[str, ...] = ()
    nvidia_launcher: Launcher = "torchrun"
    nvidia_flags: tuple[str, ...] = schema.PARALLEL
    by_file: bool = False
    goes_on: bool = False

    def engine_of(self, wanted: schema.Engine) -> schema.Engine:
        """The engine that runs this stage where the config wants `wanted`."""
        return wanted if self.nvidia else "transformers"

    def script_of(self, engine: schema.Engine) -> str:
        return self.nvidia if engine == "nvidia" else self.script

    def file_of(self, engine: schema.Engine) -> str:
        """The file of that script, as a node's code names it."""
        return f"{self.script_of(engine).replace('.', '/')}.py"

    def packages_of(self, engine: schema.Engine) -> tuple[str, ...]:
        return self.nvidia_packages if engine == "nvidia" else self.packages

    def launcher_of(self, engine: schema.Engine) -> Launcher:
        return self.nvidia_launcher if engine == "nvidia" else self.launcher


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "generate",
            "scripts.data.generate",
            "data",
            schema.Generate,
            schema.Generate,
        ),
        Stage(
            "tokenizer",
            "scripts.data.tokenizer",
            "model",
            schema.Tokenizer,
            schema.TokenizerRecipe,
            _HF,
        ),
        Stage(
            "tokenize",
            "scripts.data.tokenize",
            "data",
            schema.Tokenize,
            schema.TokenizeRecipe,
            (*_HF, "fastokens", "numpy"),
            beside=("receipts.json",),
            by_file=True,
        ),
        Stage(
            "pack",
            "scripts.data.pack",
            "data",
            schema.Pack,
            schema.PackRecipe,
            (*_HF, "fastokens", "jinja2", "numpy", "pyarrow"),
        ),
        Stage(
            "prompts",
            "scripts.data.prompts",
            "data",
            schema.Prompts,
            schema.PromptsRecipe,
            (*_HF, "jinja2"),
        ),
        Stage(
            "preferences",
            "scripts.data.preferences",
            "data",
            schema.Preferences,
            schema.PreferencesRecipe,
            (*_HF, "jinja2"),
        ),
        Stage(
            "pretrain",
            "scripts.transformers.pretrain",
            "model",
            schema.Pretrain,
            schema.PretrainRecipe,
            _TRAIN,
            trains=True,
            launcher="torchrun",
            nvidia="scripts.nvidia.pretrain",
            nvidia_packages=_MEGATRON_TRAIN,
        ),
        Stage(
            "sft",
            "scripts.transformers.sft",
            "model",
            schema.Sft,
            schema.SftRecipe,
            (*_TRAIN, "trl", "peft", "datasets"),
            trains=True,
            launcher="torchrun",
            nvidia="scripts.nvidia.sft",
            nvidia_packages=_MEGATRON_TRAIN,
        ),
        Stage(
            "dpo",
            "scripts.transformers.dpo",
            "model",
            schema.Dpo,
            schema.DpoRecipe,
            (*_TRAIN, "trl", "datasets", "jinja2"),
            trains=True,
            nvidia="scripts.nvidia.dpo",
            nvidia_packages=_NEMO_RL,
            nvidia_launcher="ray",
            nvidia_flags=_RL_FLAGS,
        ),
        Stage(
            "rm",
            "scripts.transformers.rm",
            "model",
            schema.Rm,
            schema.RmRecipe,
            (*_TRAIN, "trl", "datasets", "jinja2"),
            trains=True,
            nvidia="scripts.nvidia.rm",
            nvidia_packages=_NEMO_RL,
            nvidia_launcher="ray",
            nvidia_flags=_RL_FLAGS,
        ),
        Stage(
            "grpo",
            "scripts.transformers.grpo",
            "model",
            schema.Grpo,
            schema.GrpoRecipe,
            (*_TRAIN, "trl", "datasets", "math-verify"),
            trains=True,
            nvidia="scripts.nvidia.grpo",
            nvidia_packages=_NEMO_RL,
            nvidia_launcher="ray",
            nvidia_flags=_RL_FLAGS,
        ),
        Stage(
            "best",
            "scripts.best",
            "model",
            schema.Best,
            schema.BestRecipe,
            beside=("choice.json",),
        ),
        Stage(
            "rollouts",
            "scripts.transformers.rollouts",
            "data",
            schema.Rollouts,
            schema.RolloutsRecipe,
            (*_TRAIN, "jinja2", "math-verify"),
            goes_on=True,
        ),
        Stage(
            "export",
            "scripts.transformers.export",
            "model",
            schema.Export,
            schema.ExportRecipe,
            (*_HF, "torch", "safetensors", "numpy"),
            nvidia="scripts.nvidia.export",
            nvidia_packages=_MEGATRON,
        ),
        Stage(
            "eval",
            "scripts.eval",
            "scores",
            schema.Eval,
            schema.EvalRecipe,
            (*_HF, "torch", "lm-eval", "datasets", "jinja2", "scipy"),
            nvidia="scripts.nvidia.eval",
            nvidia_packages=("vllm", "lm-eval"),
            nvidia_launcher="",
            nvidia_flags=("tensor_parallel", "generation_memory"),
        ),
        Stage(
            "report",
            "scripts.report",
            "page",
            schema.Report,
            schema.ReportRecipe,
            ("plotly", "jinja2", "matplotlib", "networkx"),
        ),
        Stage(
            "release",
            "scripts.release",
            "model",
            schema.Release,
            schema.ReleaseRecipe,
            ("huggingface-hub", "jinja2"),
        ),
    )
}

DATA = ("generate", "tokenizer", "tokenize", "pack", "prompts", "preferences")
"""Stages that prepare data; they run on CPUs and finish before training starts."""

MODELS = ("pretrain", "sft", "dpo", "grpo", "best", "export")
"""Stages whose artifact is a language model; their nodes' names are unique together."""

STARTED = ("rollouts", "sft", "dpo", "rm", "grpo", "export")
"""Stages that start from a model: their nodes say `from`."""

CANDIDATES = ("pretrain", "sft", "dpo", "grpo")
"""Stages whose nodes the best can be taken of."""

PARENTS = (*CANDIDATES, "best")
"""Stages that a post-training node may start from."""
