"""Trains one environment with the trainer's defaults on several seeds and records what they reached, with the curves.

    python benchmarks/learning.py CartPole-v1 --total-timesteps 100000 --seeds 1 2 3 4 5 --eval-episodes 100
    python benchmarks/learning.py PongNoFrameskip-v4 --runs runs/<run> runs/<run>        # runs that were made already

Writes benchmarks/results/learning_<env>.json, failed seeds included; `command_seconds` is the whole wall time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
POINTS = 100  # of a curve


def read_run(run_dir: Path) -> dict:
    """What a run folder tells of itself; a run that is not finished has no evaluation."""
    about = json.loads((run_dir / "args.json").read_text())
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scores = events.Scalars("charts/episodic_return_100")
    began = events.FirstEventTimestamp()
    chosen = scores[:: -(-len(scores) // POINTS)]
    result = run_dir / "result.json"
    return {
        "command": " ".join(["python", *about["command"]]),
        "seed": about["args"]["seed"],
        "commit": about["commit"],
        "versions": about["versions"],
        "finished": result.exists(),
        **(json.loads(result.read_text()) if result.exists() else {}),
        "curve": {
            "step": [e.step for e in chosen],
            "seconds": [round(e.wall_time - began, 1) for e in chosen],
            "mean_return_of_last_100": [round(e.value, 2) for e in chosen],
        },
    }


def train(env_id: str, total_timesteps: int, eval_episodes: int, seed: int) -> dict:
    """One seed in a process of its own."""
    trainer = "ppo_clip_atari.py" if "ALE/" in env_id or "NoFrameskip" in env_id else "ppo_clip_discrete.py"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", env_id, "--total-timesteps", str(total_timesteps), "--seed", str(seed)]
        flags += ["--eval-episodes", str(eval_episodes)]
        command = [sys.executable, str(ROOT / trainer), *flags, "--run-dir", f"{folder}/run"]
        started = time.time()
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        seconds = time.time() - started
        run = {"exit_code": code, "command_seconds": round(seconds, 2), "seed": seed}
        if code == 0:
            run |= read_run(Path(folder) / "run")
        return run | {"command": f"python {trainer} {' '.join(flags)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id")
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--eval-episodes", type=int, default=100)
    parser.add_argument("--runs", type=Path, nargs="+", help="record these run folders and train nothing")
    options = parser.parse_args()
    runs = [read_run(run_dir) for run_dir in options.runs or []]
    for seed in [] if options.runs else options.seeds:
        runs.append(train(options.env_id, options.total_timesteps, options.eval_episodes, seed))
        print({k: v for k, v in runs[-1].items() if k not in ("curve", "versions", "command")}, flush=True)
    scores = [run["eval_return_mean"] for run in runs if run.get("eval_return_mean") is not None]
    times = [run["command_seconds"] for run in runs if "command_seconds" in run]
    record = {
        "env_id": options.env_id,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "mean": statistics.mean(scores) if scores else None,
        "worst": min(scores, default=None),
        "median_command_seconds": statistics.median(times) if times else None,
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"learning_{options.env_id.replace('/', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"mean {record['mean']}, worst {record['worst']}, record {path}")


if __name__ == "__main__":
    main()
