"""From what network size and number of environments ppo_clip_discrete.py is faster on a GPU than on one CPU core.

    python benchmarks/gpu_or_cpu.py

Environment steps a second of whole iterations (play, advantages, K epochs) of CartPole-v1, for each width of the two
hidden layers and each number of environments, all else the trainer's defaults, so that the minibatch grows with the
environments. Writes benchmarks/results/gpu_or_cpu.json.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import torch
from learning import RESULTS, ROOT, about, start
from throughput import Parts, load


def measure(trainer, args, seconds: float) -> float:
    """Environment steps a second."""
    parts = Parts(trainer, args)

    def iteration() -> None:
        parts.collect()
        parts.update()

    for _ in range(4 if parts.device.type == "cuda" else 0):  # the fourth call records a CUDA graph
        iteration()
    return parts.rate(iteration, args.batch_size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--num-envs", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, three iterations at least")
    parser.add_argument("--record", type=Path, default=RESULTS / "gpu_or_cpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    trainer = load(ROOT / "ppo_clip_discrete.py")
    agent, rows = trainer.Agent, []
    for device in ("cuda", "cpu"):
        for hidden in options.hidden:
            trainer.Agent = functools.partial(agent, hidden=hidden)
            for num_envs in options.num_envs:
                args = dataclasses.replace(trainer.Args(), num_envs=num_envs, cuda=device == "cuda")
                steps_per_second = measure(trainer, args, options.seconds)
                rows.append(dict(device=device, hidden=hidden, num_envs=num_envs, steps_per_second=steps_per_second))
                print(rows[-1], flush=True)
    record = about(trainer.versions()) | {"seed": args.seed, "rows": rows}
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(record, indent=2) + "\n")
    print(f"record {options.record}")


if __name__ == "__main__":
    start(main)
