"""Compares settings of ppo_clip_discrete.py: every setting on every environment and seed, evaluated on 100 episodes.

    python benchmarks/sweep.py "--update-epochs 6" "--learning-rate 3e-3 --gae-lambda 0.9" --seeds 11 12

The empty setting "" stands for the defaults. Adds to benchmarks/results/sweep.json as it goes: a sweep that was stopped
goes on, since what the same source has run is not run again. Choose on some seeds, report on others (learning.py).
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from learning import RESULTS, ROOT, hardware, sha256, start, train

TRAINER = ROOT / "ppo_clip_discrete.py"
STEPS = {"CartPole-v1": 100_000, "Acrobot-v1": 300_000, "MountainCar-v0": 500_000, "LunarLander-v3": 1_000_000}


def run(setting: str, env_id: str, seed: int) -> dict:
    """What one training run came to, without its curve."""
    flags = f"--env-id {env_id} --total-timesteps {STEPS[env_id]} --seed {seed} --eval-episodes 100 {setting}"
    made = train(TRAINER, flags.split())
    made.pop("curve", None)
    return {"setting": setting, "env_id": env_id} | made | {"hardware": hardware()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--env-ids", nargs="+", choices=STEPS, default=["Acrobot-v1", "MountainCar-v0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--record", type=Path, default=RESULTS / "sweep.json")
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first run
    runs = json.loads(options.record.read_text()) if options.record.exists() else []
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
                options.record.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")  # one line per run
            scores = [
                r["eval_return_mean"]
                for r in runs
                if (r["setting"], r["env_id"], r["trainer_sha256"]) == (setting, env_id, sha256(TRAINER))
                and r.get("eval_return_mean") is not None
            ]
            print(
                f"{setting or '(defaults)':50} {env_id:15} {statistics.mean(scores or [math.nan]):8.1f}  {scores}",
                flush=True,
            )


if __name__ == "__main__":
    start(main)
