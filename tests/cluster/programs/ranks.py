"""Under torchrun: add up the ranks; each writes where it is. One may then be killed.

python -m tests.cluster.programs.ranks FOLDER [RANK_THAT_DIES]
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed

folder, dies = Path(sys.argv[1]), sys.argv[2:]
rank = os.environ["RANK"]
torch.distributed.init_process_group("gloo")
total = torch.tensor(int(rank) + 1)
torch.distributed.all_reduce(total)
seen = {
    "host": socket.gethostname(),
    "total": int(total),
    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
}
(folder / f"{rank}.json").write_text(json.dumps(seen))
if dies:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # busy with something else
    if rank == dies[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
torch.distributed.destroy_process_group()
