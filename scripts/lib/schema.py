"""The configuration's schema: what a user may write, and what each key means.

Every section but `placement`, `logging` and `budget` is *identity*: a stage reruns when
its own settings change, `keep` apart. `placement` says where and how a stage runs,
`logging` where to it logs: neither reruns anything.
The README's config reference is generated from the descriptions below.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

NodeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Engine = Literal["transformers", "nvidia"]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no changes after validation."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # only what is used: a script knows one stage
    )


class Node(Strict):
    """What any node may say; this is not identity."""

    keep: bool = False


class Rows(Strict):
    """How to read one source of rows; shared by files and hub datasets."""

    column: str | None = Field(
        None,
        description="Column to read. Default: `text` for documents, `messages` for "
        "chats; prompts read `input` and `output`.",
    )
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Bad rows allowed before the stage fails; each is reported."
    )


class Data(Rows):
    """A dataset of your own: files, or a Hugging Face dataset at a pinned revision."""

    files: Names | None = Field(
        None,
        description="Path, glob, or list of them: .jsonl, .parquet or .txt, plain, "
        ".gz or .zst.",
    )
    hf: str | None = Field(
        None, description="Hugging Face dataset: `org/name`, or a local folder."
    )
    split: str = Field("train", description="Split of the Hugging Face dataset.")
    revision: Revision | None = Field(
        None, description="Commit of the Hugging Face dataset, 40 hex digits."
    )
    license: Text | None = Field(
        None, description="Its licence, for model cards; reruns a `release` only."
    )
    url: Text | None = Field(
        None, description="Where it comes from, for model cards, likewise."
    )
    description: Text | None = Field(
        None, description="What it is, for model cards, likewise."
    )


TOLD = ("license", "url", "description")
"""What is only told of a dataset: a model card shows it."""


class Generate(Node):
    """Data from the project's own deterministic generator: arithmetic."""

    kind: Literal[
        "documents", "chats", "prompts", "preferences", "puzzles", "heldout"
    ] = Field(
        description="What to make: text for pretraining, chats for SFT, prompts with "
        "checkable answers for GRPO, preferences (pairs of answers) for DPO and reward "
        "models, or the held-out set for eval."
    )
    count: Positive = Field(description="Rows to make.")
    max_operand: Positive = Field(99, description="Largest operand of a sum.")
    seed: int = Field(0, description="Seed of the rows' order and wording.")


class Source(Rows):
    """One dataset as a stage sees it; its files come by `--data NAME=PATH`."""

    weight: Rate = Field(1.0, description="Share of the blend, relative to the others.")
    hf: str | None = None
    split: str = "train"
    revision: str | None = None


class Sources(Strict):
    """A recipe that reads rows: the datasets by name, in the blend's order."""

    sources: dict[str, Source] = Field({}, exclude=True)


class TokenizerRecipe(Sources):
    """A byte-level BPE tokenizer trained on data, or a ready one."""

    vocab_size: Positive | None = Field(None, description="Entries, specials included.")
    hf: str | None = Field(None, description="Ready tokenizer on the hub: `org/name`.")
    revision: Revision | None = Field(None, description="Its commit, 40 hex digits.")


class Tokenizer(TokenizerRecipe, Node):
    data: Names | None = Field(None, description="Datasets to train on.")
    path: str | None = Field(None, description="Folder of a ready tokenizer.")
    chat_template: str | None = Field(
        None,
        description="Jinja file with `{% generation %}`; required when training one.",
    )


class TokenizeRecipe(Sources):
    """Documents to Megatron bin/idx shards and a weighted blend."""

    append_eod: bool = Field(True, description="End each document with the EOD token.")
    special_tokens: Literal["keep", "escape", "refuse"] = Field(
        "keep",
        description="What a special token's text in a document becomes: `keep`: that "
        "token, as in Megatron; `escape`: the tokens of ordinary text; `refuse`: an "
        "error that names file and row.",
    )


class Tokenize(TokenizeRecipe, Node):
    tokenizer: str = Field(description="Tokenizer node.")
    data: Annotated[dict[str, Rate], Field(min_length=1)] | Names = Field(
        description="Datasets; with weights as a mapping `name: weight`."
    )


class PackRecipe(Sources):
    """Chats to packed rows (parquet: input_ids, loss_mask, seq_start_id)."""

    sequence_length: Positive = Field(description="Tokens a packed row holds.")
    seed: int = Field(0, description="Seed of the rows' order.")
    too_long: Literal["refuse", "drop", "truncate"] = Field(
        "refuse",
        description="What to do with chats of more tokens. `packing.json` counts those "
        "dropped and truncated.",
    )


class Pack(PackRecipe, Node):
    tokenizer: str = Field(description="Tokenizer node.")
    data: Names = Field(description="Datasets with `messages`.")


class PromptsRecipe(Sources):
    """RL prompts with answers, split into train and validation."""

    max_prompt_tokens: Positive = Field(description="Longest prompt, rendered as chat.")
    validation_fraction: Fraction = Field(0.05, description="Share held back.")
    seed: int = Field(0, description="Seed of the order and the split.")


class Prompts(PromptsRecipe, Node):
    tokenizer: str = Field(description="Tokenizer node, to measure prompts with.")
    data: Names = Field(description="Datasets with `input` and `output`.")


class PreferencesRecipe(Sources):
    """Pairs of answers, one preferred, split into train and validation."""

    max_tokens: Positive = Field(
        description="Longest conversation with its answer, rendered as chat."
    )
    validation_fraction: Fraction = Field(0.05, description="Share held back.")
    seed: int = Field(0, description="Seed of the order and the split.")
    drop_equal: bool = Field(
        False,
        description="Drop pairs whose sides are equal, and count them; otherwise they "
        "are refused.",
    )


class Preferences(PreferencesRecipe, Node):
    tokenizer: str = Field(description="Tokenizer node, to measure with.")
    data: Names = Field(description="Datasets with `prompt`, `chosen` and `rejected`.")


class TrainingRecipe(Strict):
    """Settings every trainer shares."""

    steps: Positive = Field(description="Optimizer steps; done means this step.")
    batch_size: Positive = Field(description="Sequences an optimizer step.")
    lr: Rate = Field(description="Peak learning rate.")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = (
        Field("cosine", description="Schedule after the warmup.")
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Warmup steps.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's.")
    max_grad_norm: Rate = Field(1.0, description="Gradient clipping.")
    log_steps: Positive = Field(10, description="Steps between two logged points.")
    seed: int = Field(17, description="Seed of weights, order and sampling.")


class Swept(Node):
    """A node that trains, and may be a grid of nodes."""

    sweep: dict[str, list[Any]] | None = Field(
        None,
        description="Makes a grid of nodes: lists of values by key, also "
        "`peft.rank` or `overrides.section.key`.",
    )


class MegatronRecipe(TrainingRecipe):
    """What only Megatron-Bridge can be told."""

    recipe: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")] | None = (
        Field(
            None,
            description="nvidia: a named recipe of Megatron-Bridge as the base of the "
            "settings.",
        )
    )
    precision: (
        Literal["bf16", "fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "nvfp4"]
        | None
    ) = Field(
        None,
        description="nvidia: arithmetic of the matrix products. Default: bf16.",
    )
    overrides: dict[str, Any] | None = Field(
        None,
        description="nvidia: settings of Megatron-Bridge's ConfigContainer, "
        "`section.key: value`.",
    )


class PretrainRecipe(MegatronRecipe):
    """Train a model from its definition on a blend of tokens."""

    sequence_length: Positive = Field(description="Tokens a sequence.")


class Pretrain(PretrainRecipe, Swept):
    model: str = Field(description="Folder in config/models with a config.json.")
    data: str = Field(description="Tokenize node.")


class Peft(Strict):
    """A low-rank adapter."""

    method: Literal["lora", "dora"] = Field(
        description="`dora` learns the weights' lengths apart."
    )
    rank: Positive = Field(16, description="Columns of its two matrices.")
    alpha: Positive = Field(32, description="Its output is scaled by alpha / rank.")
    dropout: Fraction = Field(0.0, description="Share of its inputs dropped.")
    target_modules: Names | None = Field(
        None,
        description="Linear layers as the engine names them: `q_proj`, or Megatron's "
        "`linear_qkv`. Default: those of attention and MLP, and Mamba's `in_proj` "
        "(not with DoRA on nvidia).",
    )


class Released(Strict):
    """A model that was not trained here."""

    hf: str = Field(description="Model on the hub: `org/name`, or a local folder.")
    revision: Revision | None = Field(
        None, description="Commit of the model on the hub, 40 hex digits."
    )
    license: Text | None = Field(
        None, description="Its licence, for model cards; reruns a `release` only."
    )


class Chosen(Strict):
    """The best of several nodes: a `best:` node, made of this."""

    best: Names = Field(description="As its `from`.")
    by: str = Field(description="As its `by`.")


def _parent(value: object) -> object:
    """Leave one of two forms to check, so that a mistake is said of that form."""
    if isinstance(value, dict):
        return Released.model_validate(value)
    if not isinstance(value, str):
        raise PydanticCustomError(
            "parent", "Should be a node, `{hf: ...}`, or `{best: ..., by: ...}`"
        )
    return value


Parent = Annotated[str | Released, BeforeValidator(_parent)]


class SftRecipe(MegatronRecipe):
    """Fine-tune on packed chats; the loss is on the assistant's tokens."""

    peft: Peft | None = Field(
        None,
        description="Train a low-rank adapter; published as adapter and merged model.",
    )
    parent: Released | None = Field(None, exclude=True)


class Sft(SftRecipe, Swept):
    from_: Parent = Field(
        alias="from",
        description="Parent: a pretrain, sft, dpo, grpo or best node, a released model, "
        "or `{best: ..., by: ...}`.",
    )
    data: str = Field(description="Pack node.")


class EnvironmentRecipe(Strict):
    """One source of rewards."""

    weight: float = Field(1.0, description="Its reward is multiplied by this.")
    import_: (
        Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*:[A-Za-z_]\w*$")] | None
    ) = Field(
        None,
        alias="import",
        description="Your own, under a name of yours: `package.module:Class` of this "
        "project.",
    )
    from_: str | None = Field(
        None, alias="from", description="`reward_model`: the rm node that rewards."
    )
    settings: dict[str, Any] | None = Field(
        None, description="What its class is given by name."
    )


def _environment(value: object) -> object:
    return {value: {}} if isinstance(value, str) else value


class RlRecipe(TrainingRecipe):
    """What only NeMo-RL can be told."""

    overrides: dict[str, Any] | None = Field(
        None, description="nvidia: settings of NeMo-RL's YAML, `section.key: value`."
    )
    parent: Released | None = Field(None, exclude=True)


class Rewarded(Strict):
    """What is rewarded by environments."""

    environment: Annotated[
        dict[NodeName, EnvironmentRecipe],
        BeforeValidator(_environment),
        Field(min_length=1),
    ] = Field(
        default_factory=lambda: {"math": EnvironmentRecipe.model_validate({})},
        description="Where rewards come from: one by name, or several, each with its "
        "settings: `math`, `code`, `tool_use`, `sliding_puzzle`, `reward_model`, or "
        "your own. Default: `math`.",
    )

    def environments(self) -> dict[str, dict[str, Any]]:
        """The environments' settings by name, as `scripts.environments.mix` takes them."""
        return {
            name: found.model_dump(by_alias=True, exclude_none=True)
            for name, found in self.environment.items()
        }


class GrpoRecipe(Rewarded, RlRecipe):
    """Group relative policy optimization: reward minus the mean of its group."""

    algorithm: Literal["grpo", "dapo"] = Field(
        "grpo",
        description="`dapo`: dynamic sampling, asymmetric clipping, overlong shaping, "
        "token-level loss.",
    )
    dynamic_sampling: bool | None = Field(
        None,
        description="dapo: draw prompts anew until their answers differ in worth. "
        "Default: true. TRL has none: engine transformers wants `false`.",
    )
    max_turns: Positive | None = Field(
        None,
        description="Turns of the model in a conversation, at most. Default: 1.",
    )
    max_conversation_tokens: Positive | None = Field(
        None,
        description="Longest conversation; needed with several turns.",
    )
    num_generations: Annotated[int, Field(ge=2)] = Field(
        8, description="Completions a prompt; divides batch_size."
    )
    max_completion_tokens: Positive = Field(description="Longest completion.")
    temperature: Rate = Field(1.0, description="Sampling temperature.")
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL term against the parent."
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = (
        Field("constant", description="Schedule after the warmup.")
    )

    @property
    def draws_anew(self) -> bool:
        """Whether dynamic sampling, a part of DAPO, draws until answers differ."""
        return self.algorithm == "dapo" and self.dynamic_sampling is not False


class PairsRecipe(RlRecipe):
    """Settings of what learns from pairs of answers; a batch counts pairs."""

    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = (
        Field("cosine", description="Schedule after the warmup.")
    )


class DpoRecipe(PairsRecipe):
    """Direct preference optimization: prefer the chosen answer to the rejected one."""

    beta: Rate = Field(
        0.05, description="How closely the model stays with its parent: more is closer."
    )
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the chosen answers' own loss."
    )


class Dpo(DpoRecipe, Swept):
    from_: Parent = Field(
        alias="from",
        description="Parent: a pretrain, sft, dpo, grpo or best node, a released model, "
        "or `{best: ..., by: ...}`.",
    )
    data: str = Field(description="Preferences node.")


class RmRecipe(PairsRecipe):
    """Train a reward model (Bradley-Terry): one number for an answer."""


class Rm(RmRecipe, Swept):
    from_: Parent = Field(
        alias="from",
        description="Parent: a pretrain, sft, dpo, grpo or best node, a released model, "
        "or `{best: ..., by: ...}`.",
    )
    data: str = Field(description="Preferences node.")


class Grpo(GrpoRecipe, Swept):
    from_: Parent = Field(
        alias="from",
        description="Parent: a pretrain, sft, dpo, grpo or best node, a released model, "
        "or `{best: ..., by: ...}`.",
    )
    data: str = Field(description="Prompts node.")


class BestRecipe(Strict):
    """Take of several nodes the one that scores best."""

    by: str = Field(description="`eval.node.task` or `metrics.key`.")
    candidates: Annotated[list[str], Field(min_length=1)] = Field(
        description="Nodes, in the order of the config."
    )
    scored: dict[str, str] = Field(
        {}, description="Of a node that was not scored itself, the export that was."
    )


class Best(Node):
    """Take of several nodes the one that scores best: its model, and `choice.json`.

    The highest score counts, of a `loss` the lowest; of equals the first one named. A
    node that no eval scores has the score of its export. `from: {best: a, by: b}` on a
    node that starts from a model makes a node `a_by_b` of `{from: a, by: b}` here.
    """

    from_: Names = Field(
        alias="from", description="A sweep, or nodes: of stages that train."
    )
    by: str = Field(
        description="An eval node, with `.task` where it has several; or "
        "`metrics.loss`: a key of their metrics, of which the last line counts."
    )


class Generation(Strict):
    """How the model answers where its user says nothing else; greedily by default."""

    temperature: Rate | None = Field(None, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample from the likeliest tokens of this share together."
    )
    top_k: Positive | None = Field(
        None, description="Sample from so many likeliest tokens."
    )
    repetition_penalty: Rate | None = Field(
        None, description="Above 1: what was said becomes less likely."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Longest answer. Default: 64, or half of the context."
    )


class Filter(Strict):
    """Which of a prompt's answers are kept, by their rewards."""

    min_reward: float | None = Field(
        None,
        description="Least reward of a chat's answer, or of a pair's chosen one. "
        "Default: any.",
    )
    at_most: Positive | None = Field(
        None, description="chats: most answers of a prompt, the best. Default: all."
    )
    margin: Rate | None = Field(
        None,
        description="preferences: least reward of the best answer above the worst. "
        "Default: any.",
    )


class RolloutsRecipe(Rewarded):
    """Sample a model's answers, keep rewarded ones: chats for SFT, pairs for DPO."""

    parent: Released | None = Field(None, exclude=True)

    kind: Literal["chats", "preferences"] = Field(
        "chats",
        description="`chats`: answers that are good enough, for a pack node. "
        "`preferences`: the best of a prompt against its worst, for a preferences node.",
    )
    samples: Positive = Field(4, description="Answers sampled of a prompt.")
    max_completion_tokens: Positive = Field(
        description="Longest answer; one that is cut there is never kept."
    )
    temperature: Rate = Field(1.0, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens of this share together."
    )
    filter: Filter = Field(
        default_factory=lambda: Filter.model_validate({}),
        description="Which answers are kept. Chats need `min_reward` or `at_most`.",
    )
    batch_size: Positive = Field(128, description="Answers generated at once, about.")
    seed: int = Field(17, description="Seed of the answers.")

    def mistake(self) -> tuple[str, str, str] | None:
        """What is wrong across its keys: the key, what, and the way out."""
        if self.kind == "preferences":
            if self.samples < 2:
                return "samples", f"{self.samples}, but a pair is of two", "samples: 4"
            if self.filter.at_most is not None:
                return "filter.at_most", "a prompt gives one pair at most", "remove it"
        elif self.filter.margin is not None:
            return "filter.margin", "belongs to kind: preferences", "remove it"
        elif self.filter.min_reward is None and self.filter.at_most is None:
            what = "would keep every answer, wrong ones too"
            hint = "{min_reward: 1.0}, or {at_most: 1} for the best of each prompt"
            return "filter", what, hint
        return None


class Rollouts(RolloutsRecipe, Node):
    from_: Parent = Field(
        alias="from",
        description="Model: a pretrain, sft, dpo, grpo, best or export node, a released "
        "model, or `{best: ..., by: ...}`.",
    )
    data: str = Field(description="Prompts node; those held back are not asked.")


class ExportRecipe(Strict):
    """Publish a checkpoint as a Hugging Face folder, checked against its source."""

    generation: Generation | None = Field(
        None, description="What generation_config.json says besides the end tokens."
    )


class Export(ExportRecipe, Node):
    from_: str = Field(
        alias="from",
        description="Parent: a pretrain, sft, dpo, grpo or best node, or "
        "`{best: ..., by: ...}`.",
    )


class EvalRecipe(Strict):
    """Score models on held-out tasks: the same items for all of them."""

    limit: Positive | None = Field(None, description="Only the first items of a task.")
    max_new_tokens: Positive = Field(32, description="Longest answer.")
    batch_size: Positive = Field(128, description="Items generated at once.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95, description="Level of the scores' Wilson intervals."
    )
    num_samples: Annotated[int, Field(ge=0)] = Field(
        8, description="Answers kept for the report, a task and model."
    )


class Task(Strict):
    """One lm-evaluation-harness task and the held-out data it runs on."""

    file: str = Field(description="Task file of lm-evaluation-harness (YAML).")
    data: str = Field(description="Dataset with `input` and `output`.")


class Eval(EvalRecipe, Node):
    from_: Names = Field(alias="from", description="Nodes to score.")
    tasks: Annotated[dict[NodeName, Task], Field(min_length=1)] = Field(
        description="Tasks by name."
    )


class ReportRecipe(Strict):
    """One HTML page: scores, curves and nodes side by side, samples, costs, lineage."""

    title: str = Field("Training report", description="Heading of the page.")


class Report(ReportRecipe, Node):
    from_: Names | None = Field(
        None, alias="from", description="Eval nodes to show. Default: all."
    )


class ReleaseRecipe(Strict):
    """An export with its model card, scores and lineage: a folder to upload."""

    title: Text | None = Field(
        None, description="Heading of the card. Default: the export's name."
    )
    description: Text | None = Field(
        None, description="What the model is and is for; Markdown."
    )
    license: Text | None = Field(
        None,
        description="The model's licence, as the hub calls it: `apache-2.0`; any other "
        "name with `license_link`.",
    )
    license_link: Text | None = Field(
        None, description="Where a licence is that the hub has no name for."
    )
    language: (
        Annotated[
            list[
                Annotated[
                    str, StringConstraints(pattern=r"^([a-z]{2,3}|multilingual)$")
                ]
            ],
            BeforeValidator(_listed),
        ]
        | None
    ) = Field(None, description="Languages by their codes (ISO 639): `en`.")
    tags: Names | None = Field(None, description="The hub's tags.")
    limits: Text | None = Field(
        None,
        description="What it cannot do and is not for; Markdown, before what the build "
        "knows.",
    )
    sources: dict[str, dict[str, str]] = Field({}, exclude=True)
    base: Released | None = Field(None, exclude=True)


class Release(ReleaseRecipe, Node):
    from_: str = Field(alias="from", description="Export node.")


class Placement(Strict):
    """Where and how a node runs. Changing this reruns nothing.

    That holds for the sizes by which Megatron splits a model and its batch over GPUs
    too: they change where a sum is computed, not what is trained, and a save made with
    some is loaded with others. The draw of a new model's weights does differ with them,
    as it does with a seed; and so does a balancing loss of experts that is taken by
    micro-batch (`aux_loss`) with `micro_batch_size`.
    """

    cpus: Positive = Field(1, description="CPU cores a machine.")
    memory_gb: Rate = Field(2.0, description="Main memory a machine, GB.")
    nodes: Positive = Field(1, description="Machines.")
    jobs: Positive = Field(
        1,
        description="tokenize: jobs that share its files, large ones by chunks, each of "
        "these cpus and minutes, before the node's own job puts their tokens together.",
    )
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs a machine.")
    processes: Positive | None = Field(
        None,
        description="Trainer processes a machine; pretrain and sft. Default: one a "
        "GPU, else one. nvidia: one a GPU.",
    )
    minutes: Positive = Field(30, description="Time limit of a job.")
    slices: Positive = Field(
        10,
        description="Times `minutes` that training or rollouts may take, about: before "
        "its limit it saves, and goes on in a further job.",
    )
    stop_seconds: Positive = Field(
        120, description="Seconds before the limit at which it is asked to save."
    )
    save_steps: Positive = Field(100, description="Steps between two saves in work/.")
    controller: bool = Field(
        False,
        description="On a cluster: run where Snakemake runs, without a job; for light "
        "nodes.",
    )
    tensor_parallel: Positive = Field(
        1, description="nvidia: GPUs that share each layer's matrices."
    )
    pipeline_parallel: Positive = Field(
        1, description="nvidia: stages, one after another, that share the layers."
    )
    context_parallel: Positive = Field(
        1, description="nvidia: GPUs that share each sequence; pretrain."
    )
    expert_parallel: Positive = Field(
        1, description="nvidia: GPUs that share the experts."
    )
    expert_tensor_parallel: Positive = Field(
        1, description="nvidia: GPUs that share each expert's matrices."
    )
    micro_batch_size: Positive = Field(
        1, description="nvidia: sequences a GPU computes at once."
    )
    virtual_pipeline: Positive | None = Field(
        None, description="nvidia: model chunks a pipeline stage."
    )
    sequence_parallel: bool | None = Field(
        None,
        description="nvidia: share what tensor_parallel does not along the sequence. "
        "Default: where tensor_parallel is above 1.",
    )
    distributed_optimizer: bool = Field(
        True, description="nvidia: share the optimizer's state among the replicas."
    )
    backend: Literal["megatron", "dtensor", "automodel"] | None = Field(
        None,
        description="nvidia: what NeMo-RL trains with, Megatron or PyTorch's DTensor. "
        "Default: by the model and how it is split; `make plan` shows it.",
    )
    generation_gpus: Annotated[int, Field(ge=0)] = Field(
        0,
        description="nvidia, grpo: GPUs of a machine that only generate. Default: all "
        "do both in turn.",
    )
    generation_tensor_parallel: Positive = Field(
        1, description="nvidia, grpo: GPUs that share vLLM's copy of the model."
    )
    generation_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.6, description="nvidia, grpo: share of a GPU's memory that vLLM may take."
    )
    python: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="nvidia: interpreter that has the engine's packages, where there "
        "is no container. Default: .venv-nvidia/bin/python where it is there.",
    )


PARALLEL = (
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "micro_batch_size",
    "virtual_pipeline",
    "sequence_parallel",
    "distributed_optimizer",
)
"""Placement that a script of the engine nvidia is told."""

RL_PLACEMENT = (
    "backend",
    "generation_gpus",
    "generation_tensor_parallel",
    "generation_memory",
    "nodes",
    "gpus",
    "cpus",
)
"""Placement that a script of NeMo-RL is told besides."""

SlurmName = Annotated[str, StringConstraints(pattern=r"^[\w.,@+-]+$")]


class ClusterPlacement(Placement):
    """Placement on a cluster: also what only its file may say."""

    account: SlurmName | None = Field(
        None, description="Account to charge: `sacctmgr show associations user=$USER`."
    )
    partition: SlurmName | None = Field(
        None, description="Partition: `sinfo`. Default: the cluster's own default."
    )
    qos: SlurmName | None = Field(None, description="Quality of service.")
    constraint: (
        Annotated[str, StringConstraints(pattern=r"^[\w&|*()\[\].-]+$")] | None
    ) = Field(None, description="Features a machine must have: `sinfo -o %f`.")
    gres: Annotated[str, StringConstraints(pattern=r"^\w+(:[\w.]+)?$")] = Field(
        "gpu", description="What Slurm calls the GPUs: `gpu`, or `gpu:h200`."
    )
    image: str | None = Field(
        None, description="Container image, where it is not `container.image`."
    )
    runtime: Literal["none", "apptainer", "pyxis"] | None = Field(
        None,
        description="Container runtime, where it is not `container.runtime`: one "
        "engine's stages may run in an image, the others' outside.",
    )


class Container(Strict):
    """What a stage's script runs in."""

    runtime: Literal["none", "apptainer", "pyxis"] = Field(
        "none", description="`pyxis` is Slurm's plugin for Enroot."
    )
    image: str | None = Field(
        None, description="A .sif or .sqsh file, or docker://name:tag for Apptainer."
    )
    mounts: Annotated[
        list[Annotated[str, StringConstraints(pattern=r"^/[^:,]*:/[^:,]*(:r[ow])?$")]],
        BeforeValidator(_listed),
    ] = Field([], description="`/host/path:/path/inside`, with `:ro` to protect it.")
    environment: dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], str
    ] = Field({}, description="Environment variables set inside.")


class Machine(Strict):
    """The shape of a machine: what a placement may ask for."""

    cpus: Positive = Field(description="CPU cores.")
    memory_gb: Rate = Field(description="Main memory, GB.")
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs.")


class Cluster(Strict):
    """A Slurm cluster: `slurm/cluster.yaml`."""

    container: Container = Field(default_factory=lambda: Container.model_validate({}))
    machine: Machine | None = Field(
        None, description="Shape of a machine; `make doctor` compares it with `sinfo`."
    )
    placement: dict[str, dict[str, dict[str, Any]]] = Field(
        {},
        description="Over the config's, key by key: at the same level this one counts.",
    )


class Budget(Strict):
    """What building the whole config may cost. Changing this reruns nothing.

    A build is refused before it starts where what is spent and what is to run exceed
    it. Spent is what the provenance of the config's current nodes records, and what
    unfinished runs have used that go on; to run is the plan's estimate, at most.
    What is restored costs nothing; a time that is not known counts as 0, and is named.
    """

    gpu_hours: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPU-hours, all GPUs of a job together."
    )
    cpu_hours: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Core-hours, all cores that a job asks for together."
    )


class Wandb(Strict):
    """Weights & Biases; its key comes from WANDB_API_KEY, or `wandb login`."""

    project: Annotated[str, Field(min_length=1)] = Field(description="Project there.")
    entity: str | None = Field(None, description="User or team. Default: your own.")
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="`offline` writes to the work folder, for `wandb sync`. Default: "
        "what WANDB_MODE says, else online.",
    )


class Mlflow(Strict):
    """MLflow; its credentials come from the environment: MLFLOW_TRACKING_TOKEN."""

    tracking_uri: Annotated[str, StringConstraints(pattern=r"^[^@\s]+$")] = Field(
        description="Server, or `sqlite:///mlflow.db`; no user or password in it."
    )
    experiment: Annotated[str, Field(min_length=1)] = Field(
        description="Experiment there; it is made where there is none."
    )


class Logging(Strict):
    """Where trainers log to besides `metrics.jsonl`. Changing this reruns nothing.

    A run is named after its node; one that goes on after a stop keeps its run there.
    """

    tensorboard: bool | None = Field(
        None,
        description="To `tensorboard/` in the node's work folder. Default: where "
        "TensorBoard is installed.",
    )
    wandb: Wandb | None = Field(None, description="To Weights & Biases.")
    mlflow: Mlflow | None = Field(None, description="To MLflow.")


def _one_engine() -> dict[str, Engine]:
    return {"default": "transformers"}


def _engines(value: object) -> object:
    return {"default": value} if isinstance(value, str) else value


class Config(Strict):
    """The whole pipeline in one file."""

    extends: str | None = Field(
        None,
        description="Another config, relative to this one, that this one overlays.",
    )
    engine: Annotated[dict[str, Engine], BeforeValidator(_engines)] = Field(
        default_factory=_one_engine,
        description="Who trains and scores: `transformers` (CPU, or GPUs by DDP) or "
        "`nvidia` (Megatron-Bridge, NeMo-RL, vLLM); or by stage, with a `default`.",
    )
    data: dict[NodeName, Data] = Field({}, description="Your datasets by name.")
    generate: dict[NodeName, Generate] = {}
    tokenizer: dict[NodeName, Tokenizer] = {}
    tokenize: dict[NodeName, Tokenize] = {}
    pack: dict[NodeName, Pack] = {}
    prompts: dict[NodeName, Prompts] = {}
    preferences: dict[NodeName, Preferences] = {}
    pretrain: dict[NodeName, Pretrain] = {}
    sft: dict[NodeName, Sft] = {}
    dpo: dict[NodeName, Dpo] = {}
    rm: dict[NodeName, Rm] = {}
    grpo: dict[NodeName, Grpo] = {}
    best: dict[NodeName, Best] = {}
    rollouts: dict[NodeName, Rollouts] = {}
    export: dict[NodeName, Export] = {}
    eval: dict[NodeName, Eval] = {}
    report: dict[NodeName, Report] = {}
    release: dict[NodeName, Release] = {}
    logging: Logging = Field(default_factory=lambda: Logging.model_validate({}))
    placement: dict[str, dict[str, dict[str, Any]]] = Field(
        {},
        description="By stage, then by node; `default` at either level is the base.",
    )
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))
