"""The defaults go on learning what README says they learn."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("env_id, steps, target", [("CartPole-v1", 100_000, 495), ("Acrobot-v1", 300_000, -78)])
def test_defaults_reach_their_target(tmp_path, env_id, steps, target):
    """Mean of two seeds, 100 evaluation episodes each."""
    scores = []
    for seed in (1, 2):
        run_dir = tmp_path / str(seed)
        flags = f"--env-id {env_id} --total-timesteps {steps} --seed {seed} --eval-episodes 100 --run-dir {run_dir}"
        command = [sys.executable, str(ROOT / "ppo_clip_discrete.py"), *flags.split(), "--no-cuda"]
        subprocess.run(command, check=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
        scores.append(json.loads((run_dir / "result.json").read_text())["eval_return_mean"])
    assert np.mean(scores) >= target, scores
