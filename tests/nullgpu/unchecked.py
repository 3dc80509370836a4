"""Run a script that saves what it trained on the null GPU, although the weights are garbage.

python tests/nullgpu/unchecked.py SCRIPT ...
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from util import checkpointer


def main() -> None:
    """Run the script with its arguments; every weight counts as finite."""
    checkpointer.all_finite = lambda weights: True
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
