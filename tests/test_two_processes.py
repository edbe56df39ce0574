"""Two real processes train the very run that one trains."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import assert_same, final, image_folder, metrics, tiny_config

from training import train
from training.engine import make_accelerator
from training.loop import Trainer

TWO_PROCESSES = """
import json, sys
from test_two_processes import digests
from training.config import load_config
from training.engine import make_accelerator
from training.loop import Trainer, train

config = load_config(sys.argv[1])
accelerator = make_accelerator(config)
trainer = Trainer(config, accelerator)
with open(f"{sys.argv[2]}-{accelerator.process_index}.json", "w") as file:
    json.dump({"world": accelerator.num_processes, "seen": digests(trainer)}, file)
accelerator.wait_for_everyone()
train(config, progress=False)
"""


def digests(trainer: Trainer) -> dict[str, str]:
    """What each image of the first three steps contributes, by its index in the run."""
    seen = {}
    for step in range(3):
        batch = trainer.batches.assemble(step)
        for place, index in enumerate(batch.indices):
            assert batch.ids is not None
            parts = (batch.images[place], batch.ids[place], batch.noise[place], batch.sigma[place])
            seen[str(index)] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    return seen


def test_two_processes_train_the_same_run(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    one, two = (tiny_config(tmp_path / name, images, max_train_steps=3) for name in ("one", "two"))
    expected = digests(Trainer(one, make_accelerator(one), say=lambda message: None))
    train(one, progress=False)
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "two/config.yaml"), str(tmp_path / "seen")],
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [report["world"] for report in reports] == [2, 2]
    assert [len(report["seen"]) for report in reports] == [6, 6]
    assert reports[0]["seen"] | reports[1]["seen"] == expected
    losses = [[record["loss"] for record in metrics(config)] for config in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(final(one), final(two), 1e-3)
    assert final(two).state["images_seen"] == 12
