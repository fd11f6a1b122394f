"""What Megatron would refuse on the GPUs is refused before a build, with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.lib.parallel import problems
from scripts.lib.schema import ClusterPlacement

DENSE = {
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
}
HYBRID = {
    "layers_block_type": ["linear_attention", "full_attention", "mlp"] * 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
}
EXPERTS = DENSE | {
    "n_routed_experts": 12,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 2048,
}


def found(
    model: dict[str, Any] | None,
    stage: str = "pretrain",
    batch_size: int | None = 64,
    sequence_length: int | None = 4096,
    precision: str | None = None,
    **placed: Any,
) -> list[tuple[str, str, str]]:
    return problems(
        stage,
        ClusterPlacement.model_validate({"gpus": 8} | placed),
        model,
        batch_size,
        sequence_length,
        precision,
    )


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (None, {}),
        (DENSE, {}),
        (DENSE, {"nodes": 4, "tensor_parallel": 8, "pipeline_parallel": 2}),
        (DENSE, {"pipeline_parallel": 4, "virtual_pipeline": 3}),
        (DENSE, {"context_parallel": 4, "tensor_parallel": 2}),
        (DENSE, {"tensor_parallel": 4, "sequence_parallel": False}),
        (DENSE, {"micro_batch_size": 8, "processes": 8}),
        (DENSE, {"stage": "sft"}),
        (DENSE, {"stage": "export", "batch_size": None, "sequence_length": None}),
        (HYBRID, {"tensor_parallel": 8}),
        (HYBRID, {"pipeline_parallel": 4, "context_parallel": 2}),
        (HYBRID | {"layers_block_type": ["mlp"], "n_groups": 1}, {"tensor_parallel": 8}),
        (HYBRID | {"n_routed_experts": 8}, {"tensor_parallel": 2, "sequence_parallel": False}),
        (HYBRID, {"precision": "mxfp8", "gres": "gpu:gb200"}),
        (HYBRID, {"precision": "fp8_block", "gres": "gpu:nvidia_h100_80gb_hbm3"}),
        (HYBRID, {"precision": "nvfp4", "gres": "gpu:a_new_one"}),
        (EXPERTS, {"expert_parallel": 4, "expert_tensor_parallel": 2, "tensor_parallel": 2}),
        (EXPERTS, {"stage": "export", "tensor_parallel": 2, "sequence_parallel": False}),
    ],
)  # fmt: skip
def test_what_megatron_can_do_is_not_refused(model, given):
    assert found(model, **given) == []


@pytest.mark.parametrize(
    ("model", "given", "key", "said"),
    [
        (None, {"gpus": 0}, "gpus", "pretrain on engine nvidia needs a GPU; gpus: 1"),
        (None, {"processes": 4}, "processes", "4, but engine nvidia runs one a GPU; leave it out"),
        (None, {"tensor_parallel": 3}, "tensor_parallel", "tensor x pipeline x context parallel is 3, which does not divide 8 GPUs (1 machines x 8); a product of 1, 2, 4, 8"),
        (None, {"tensor_parallel": 2, "pipeline_parallel": 8}, "pipeline_parallel", "parallel is 16, which does not divide 8 GPUs"),
        (EXPERTS, {"expert_parallel": 3}, "expert_parallel", "expert x expert tensor x pipeline parallel is 3, which does not divide 8 GPUs"),
        (EXPERTS, {"expert_parallel": 2, "expert_tensor_parallel": 4, "pipeline_parallel": 2}, "expert_tensor_parallel", "parallel is 16"),
        (None, {"sequence_parallel": True}, "sequence_parallel", "shares what tensor_parallel leaves, and that is 1"),
        (DENSE, {"virtual_pipeline": 2}, "virtual_pipeline", "splits pipeline stages, and pipeline_parallel is 1"),
        (None, {"batch_size": 20}, "gpus", "batch_size 20 does not divide among 8 replicas of the model; a number of replicas of 1, 2, 4, 5, 10, 20; or batch_size 16 or 24"),
        (None, {"batch_size": 4, "nodes": 2}, "nodes", "batch_size 4 does not divide among 16 replicas of the model; a number of replicas of 1, 2, 4; or batch_size 16"),
        (None, {"micro_batch_size": 3, "batch_size": 32}, "micro_batch_size", "batch_size 32 does not divide among 8 replicas of the model in micro-batches of 3; micro_batch_size of 1, 2, 4; or batch_size 24 or 48"),
        (DENSE, {"pipeline_parallel": 4, "virtual_pipeline": 2, "batch_size": 12}, "virtual_pipeline", "batch_size 12 is 6 micro-batches a replica, which pipeline_parallel 4 does not divide"),
        (None, {"stage": "sft", "micro_batch_size": 2}, "micro_batch_size", "2, but a packed row holds many chats"),
        (None, {"stage": "sft", "context_parallel": 2}, "context_parallel", "2, but chats in a packed row are not padded to be split"),
        (None, {"context_parallel": 4, "sequence_length": 100}, "context_parallel", "sequence_length 100 does not divide into 2 x 4 parts; a sequence_length that is a multiple of 8"),
        (None, {"tensor_parallel": 8, "sequence_length": 100}, "tensor_parallel", "100 tokens of a sequence do not divide among 8 GPUs; a sequence_length that is a multiple of 8, or sequence_parallel: false"),
        (None, {"tensor_parallel": 8, "sequence_length": 100, "sequence_parallel": True}, "sequence_parallel", "100 tokens of a sequence"),
        (DENSE | {"num_attention_heads": 12}, {"tensor_parallel": 8}, "tensor_parallel", "num_attention_heads 12 does not divide among 8 GPUs; tensor_parallel of 1, 2, 3, 4, 6, 12"),
        (DENSE | {"num_key_value_heads": 3}, {"tensor_parallel": 4}, "tensor_parallel", "4 is neither a multiple nor a divisor of num_key_value_heads 3; tensor_parallel of 1, 3"),
        (DENSE | {"intermediate_size": 4098}, {"tensor_parallel": 4}, "tensor_parallel", "intermediate_size 4098 does not divide among 4 GPUs"),
        (EXPERTS | {"moe_shared_expert_intermediate_size": 1023}, {"tensor_parallel": 2}, "tensor_parallel", "moe_shared_expert_intermediate_size 1023 does not divide"),
        (HYBRID | {"mamba_num_heads": 12}, {"tensor_parallel": 8}, "tensor_parallel", "mamba_num_heads 12 does not divide among 8 GPUs"),
        (HYBRID | {"n_groups": 1}, {"tensor_parallel": 2}, "tensor_parallel", "n_groups 1 does not divide among 2 GPUs; tensor_parallel of 1"),
        (HYBRID | {"mamba_num_heads": 8, "n_groups": 4}, {"tensor_parallel": 4, "nodes": 2, "context_parallel": 4}, "context_parallel", "mamba_num_heads / tensor_parallel 2 does not divide among 4 GPUs"),
        (HYBRID | {"mamba_num_heads": 24, "n_groups": 3}, {"context_parallel": 2}, "context_parallel", "2 is neither a multiple nor a divisor of n_groups / tensor_parallel 3"),
        (EXPERTS, {"expert_parallel": 8}, "expert_parallel", "experts 12 does not divide among 8 GPUs"),
        (EXPERTS | {"moe_intermediate_size": 1022}, {"expert_tensor_parallel": 4}, "expert_tensor_parallel", "moe_intermediate_size 1022 does not divide"),
        (DENSE, {"expert_parallel": 2}, "expert_parallel", "the model has no experts; expert_parallel: 1"),
        (HYBRID | {"n_routed_experts": 8}, {"expert_tensor_parallel": 2}, "expert_tensor_parallel", "the model has no experts"),
        (EXPERTS, {"tensor_parallel": 2, "sequence_parallel": False}, "sequence_parallel", "a model with experts needs it where tensor_parallel is above 1"),
        (DENSE | {"num_hidden_layers": 30}, {"pipeline_parallel": 4}, "pipeline_parallel", "30 layers do not divide among 4 stages; pipeline_parallel of 1, 2, 3, 5, 6, 10, 15, 30"),
        (DENSE, {"pipeline_parallel": 4, "virtual_pipeline": 4}, "virtual_pipeline", "24 layers do not divide among 16 chunks; virtual_pipeline of 1, 2, 3, 6"),
        (HYBRID, {"pipeline_parallel": 8}, "pipeline_parallel", "12 layers do not divide among 8 stages"),
        ({"hybrid_override_pattern": "M*-|M*-/ME", "num_attention_heads": 8}, {"pipeline_parallel": 4}, "pipeline_parallel", "6 layers do not divide among 4 stages"),
        (HYBRID, {"pipeline_parallel": 2, "virtual_pipeline": 2}, "virtual_pipeline", "Megatron-Bridge has none for models of Mamba and attention layers"),
        (None, {"precision": "fp8_current", "gres": "gpu:a100"}, "precision", "fp8_current needs a GPU that knows FP8 (Ada, Hopper or newer), and gres is gpu:a100; precision: bf16"),
        (None, {"precision": "mxfp8", "gres": "gpu:h200"}, "precision", "mxfp8 needs a Blackwell GPU, and gres is gpu:h200; precision: fp8_current, or bf16"),
        (None, {"precision": "nvfp4", "gres": "gpu:nvidia_a100"}, "precision", "nvfp4 needs a Blackwell GPU, and gres is gpu:nvidia_a100; precision: bf16"),
        (HYBRID | {"mamba_num_heads": 4, "n_groups": 1}, {"precision": "fp8_delayed"}, "precision", "needs Mamba's projection to have a multiple of 16 columns; it has 772"),
    ],
)  # fmt: skip
def test_what_megatron_would_refuse_is_named(model, given, key, said):
    (where, what, hint), *_ = found(model, **given)
    assert where == key
    assert said in f"{what}; {hint}"


def test_dora_needs_whole_rows():
    ((key, what, hint),) = problems(
        "sft",
        ClusterPlacement.model_validate({"gpus": 2, "tensor_parallel": 2}),
        DENSE,
        64,
        4096,
        None,
        "dora",
    )
    assert key == "tensor_parallel" and "norms of DoRA" in what and "lora" in hint


def test_an_embedding_that_does_not_divide_is_named():
    ((key, what, _),) = found(DENSE | {"vocab_size": 50257}, tensor_parallel=2)
    assert key == "tensor_parallel" and "vocab_size 50257" in what
