"""Every process of a run takes the first GPU: imported by Python itself at its start."""

import os

if "RANK" in os.environ:  # not in torchrun itself
    os.environ["LOCAL_RANK"] = "0"
