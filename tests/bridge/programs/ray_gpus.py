"""Writes which GPUs workers of Ray's take, on a machine that need not have any.

Each of the workers asks as NeMo-RL's Megatron worker does: an actor with methods of
asyncio, to whom all GPUs of the run stay visible.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray

from scripts.nvidia import rl


@ray.remote(num_gpus=1)
class Worker:
    def __init__(self) -> None:
        self.number = int(ray.get_gpu_ids()[0])

    async def gpu(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")[self.number]


def main() -> None:
    count = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    ray.init(num_cpus=count, num_gpus=count, include_dashboard=False)
    names = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", **rl.renumbered()}
    workers = [
        Worker.options(runtime_env={"env_vars": names}).remote() for _ in range(count)
    ]
    found = ray.get([worker.gpu.remote() for worker in workers])
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
