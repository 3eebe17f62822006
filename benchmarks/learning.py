"""Trains one environment with the trainer's defaults on several seeds and records what they reached.

    python benchmarks/learning.py CartPole-v1 --total-timesteps 100000 --seeds 1 2 3 4 5 6 7 8 9 10 --eval-episodes 100

Writes benchmarks/results/learning_<env>.json, failed seeds included; `command_seconds` is the whole wall time.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id")
    parser.add_argument("--total-timesteps", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--eval-episodes", type=int, default=100)
    options = parser.parse_args()
    trainer = "ppo_clip_atari.py" if options.env_id.startswith("ALE/") else "ppo_clip_discrete.py"
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--env-id", options.env_id, "--total-timesteps", str(options.total_timesteps)]
            flags += ["--eval-episodes", str(options.eval_episodes), "--seed", str(seed)]
            started = time.time()
            command = [sys.executable, str(ROOT / trainer), *flags, "--run-dir", f"{folder}/run"]
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
            run = {"command": f"python {trainer} {' '.join(flags)}", "exit_code": code}
            run["command_seconds"] = round(time.time() - started, 2)
            if code == 0:
                run |= json.loads(Path(f"{folder}/run/result.json").read_text())
            runs.append(run)
            print(run, flush=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    packages = ("torch", "gymnasium", "ale-py", "numpy")
    scores = [run["eval_return_mean"] for run in runs if run["exit_code"] == 0]
    record = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "mean": statistics.mean(scores),
        "worst": min(scores),
        "median_command_seconds": statistics.median(run["command_seconds"] for run in runs),
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"learning_{options.env_id.replace('/', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"mean {record['mean']:.1f}, worst {record['worst']:.1f}, record {path}")


if __name__ == "__main__":
    main()
