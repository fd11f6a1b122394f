"""A batch script that does what the runner does: one script, as a placement says.

python batch.py '{"launcher": ..., "placement": ..., "work": ..., "words": [...]}'
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts.lib import launch

asked = json.loads(sys.argv[1])
line = launch.command(
    asked["words"],
    launcher=asked["launcher"],
    placement=asked["placement"],
    work=Path(asked["work"]),
    environ=os.environ,
)
print(line, flush=True)
sys.exit(subprocess.run(line, stdin=subprocess.DEVNULL, check=False).returncode)
