"""What measures mpjax and writes docs/evidence; run as `python -m benchmarks.ROOM.SCRIPT`."""

import sys
from pathlib import Path

# Some scripts here run the experiments, which import what they share by its own name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
