"""Loads the newest checkpoint of a run and saves STEP, with other numbers in it; others trace how.

python -m save_step RUN STEP
"""

import os
import sys
from pathlib import Path

from tracing import MARK

from training import checkpoint

KEEP = 2


def main() -> None:
    run, step = Path(sys.argv[1]), int(sys.argv[2])
    found = checkpoint.load(run)
    assert found is not None
    state = {key: value for key, value in found.state.items() if key not in ("format", "step")}
    tensors = {name: {key: value + 1 for key, value in part.items()} for name, part in found.tensors.items()}
    os.path.exists(MARK)
    checkpoint.save(run, step, state, tensors, KEEP)


if __name__ == "__main__":
    main()
