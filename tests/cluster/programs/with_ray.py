"""Beside Ray: a task on each machine, again when FOLDER/go is there, then end.

python -m tests.cluster.programs.with_ray FOLDER CODE
"""

import json
import socket
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

folder, code = Path(sys.argv[1]), int(sys.argv[2])
ray.init(logging_level="ERROR")


@ray.remote(num_gpus=1)
def host() -> str:
    return socket.gethostname()


def hosts() -> list[str]:
    affinities = [
        NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()
    ]
    tasks = [host.options(scheduling_strategy=to).remote() for to in affinities]
    return sorted(ray.get(tasks))


seen = {"hosts": hosts(), "resources": ray.cluster_resources()}
(folder / "new.json").write_text(json.dumps(seen))
(folder / "new.json").rename(folder / "ray.json")
while not (folder / "go").exists():
    time.sleep(0.1)
(folder / "again.json").write_text(json.dumps(hosts()))
sys.exit(code)
