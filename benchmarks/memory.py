"""Resident memory of a long run: after 20 iterations, and at the end of 200.

    python benchmarks/memory.py

Writes benchmarks/results/memory.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from learning import RESULTS, ROOT, about, start
from throughput import load

ITERATIONS = 200
RUNS = {
    "ppo_clip_discrete.py": ("CartPole-v1", 2048, ""),
    "ppo_clip_atari.py": ("ALE/Breakout-v5", 256, "--num-envs 8 --num-steps 32 --num-minibatches 2"),
}
# runs the script as `python script …` does, and prints the process's resident memory after each iteration
WATCH = """
import importlib.util, re, sys
spec = importlib.util.spec_from_file_location("trainer", sys.argv[1])
trainer = sys.modules["trainer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainer)
report = trainer.Report.iteration
def iteration(*arguments):
    report(*arguments)
    print("resident", re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1], flush=True)
trainer.Report.iteration = iteration
sys.argv = sys.argv[1:]
trainer.train(trainer.parse_args())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)  # now, not after the runs
    record = about(load(ROOT / "ppo_clip_atari.py").versions())
    for script, (env_id, batch, flags) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--env-id {env_id} {flags} --total-timesteps {ITERATIONS * batch} --eval-episodes 0".split()
            command = [sys.executable, "-c", WATCH, str(ROOT / script), *flags, "--run-dir", f"{folder}/run"]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        resident = [int(kib) / 1024 for kib in re.findall(r"^resident (\d+)", out, re.MULTILINE)]
        after_20, at_end = resident[19], resident[-1]
        record[script] = {
            "flags": " ".join(flags),
            "iterations": len(resident),
            "resident_mib_after_20": round(after_20, 1),
            "resident_mib_at_end": round(at_end, 1),
            "growth": round(at_end / after_20 - 1, 4),
            "resident_mib_every_20": [round(mib, 1) for mib in resident[19::20]],
        }
        print(script, record[script], flush=True)
    options.record.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    start(main)
