"""Running a script under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(script: str, processes: int, arguments: list[str], timeout: int = 120) -> subprocess.CompletedProcess:
    """Run a script of the repository under torchrun, in an environment without preparation."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
    return subprocess.run([*launcher, str(ROOT / script), *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
