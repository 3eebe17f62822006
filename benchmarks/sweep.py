"""Compares settings of ppo_clip_discrete.py: every setting on every environment and seed, evaluated on 100 episodes.

    python benchmarks/sweep.py "--update-epochs 6" "--learning-rate 3e-3 --gae-lambda 0.9" --seeds 11 12

The empty setting "" stands for the defaults. Adds to benchmarks/results/sweep.json as it goes: a sweep that was stopped
goes on, since what the same source has run is not run again. Choose on some seeds, report on others (learning.py).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from learning import ROOT, commit, hardware, sha256

TRAINER = ROOT / "ppo_clip_discrete.py"
RECORD = ROOT / "benchmarks" / "results" / "sweep.json"
STEPS = {"CartPole-v1": 100_000, "Acrobot-v1": 300_000, "MountainCar-v0": 500_000, "LunarLander-v3": 1_000_000}


def run(setting: str, env_id: str, seed: int) -> dict:
    """One training run in a process of its own."""
    head = commit()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--env-id {env_id} --total-timesteps {STEPS[env_id]} --seed {seed} --eval-episodes 100 {setting}"
        command = [sys.executable, str(TRAINER), *flags.split(), "--run-dir", f"{folder}/run"]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code == 2:  # a flag that cannot work, as the trainer has just said: no result
            raise SystemExit(code)
        result = json.loads(Path(f"{folder}/run/result.json").read_text()) if code == 0 else {}
    return {
        "setting": setting,
        "env_id": env_id,
        "seed": seed,
        "exit_code": code,
        "eval_return_mean": result.get("eval_return_mean"),
        "sps": result.get("sps"),
        "trainer_sha256": sha256(TRAINER),
        "commit": head,
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--env-ids", nargs="+", choices=STEPS, default=["Acrobot-v1", "MountainCar-v0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    options = parser.parse_args()
    runs = json.loads(RECORD.read_text()) if RECORD.exists() else []
    for setting in options.settings:
        for env_id in options.env_ids:
            for seed in options.seeds:
                key = (setting, env_id, seed, sha256(TRAINER))
                made = {(r["setting"], r["env_id"], r["seed"], r["trainer_sha256"]): r for r in runs}
                if key in made:
                    if made[key]["exit_code"] == 0:
                        continue
                    runs.remove(made[key])
                runs.append(run(setting, env_id, seed))
                RECORD.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")  # one line per run
            scores = [
                r["eval_return_mean"]
                for r in runs
                if (r["setting"], r["env_id"], r["trainer_sha256"]) == (setting, env_id, sha256(TRAINER))
                and r["eval_return_mean"] is not None
            ]
            print(
                f"{setting or '(defaults)':50} {env_id:15} {statistics.mean(scores or [math.nan]):8.1f}  {scores}",
                flush=True,
            )


if __name__ == "__main__":
    main()
