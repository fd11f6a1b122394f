"""Which GPU a worker of Ray's has, in PyTorch's numbers; Ray runs this as it starts one.

Ray tells the number on this machine, as $CUDA_VISIBLE_DEVICES has it, PyTorch counts
those that are visible, and NeMo-RL's Megatron workers (0.7.0) take one for the other:
right where 0, 1, ... are visible, else no GPU, or not the one that vLLM has.
"""

from __future__ import annotations

import os


def as_pytorch_counts() -> None:
    """Have `ray.get_gpu_ids` of this process tell places among the visible GPUs."""
    import ray

    told = ray.get_gpu_ids
    visible = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    ray.get_gpu_ids = lambda: [visible.index(str(number)) for number in told()]
