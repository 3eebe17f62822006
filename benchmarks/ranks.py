"""The same job as one process and as ranks under torchrun, both on all cores of this machine, and an all-reduce's time.

    python benchmarks/ranks.py --ranks 2
    python benchmarks/ranks.py --ranks 8 --env-id ALE/Breakout-v5 --flags "--num-envs 512"      # on eight GPUs

Every turn trains for 12 iterations as one process, for Atari with a thread for each core, and as ranks, each with its
share of threads; steps a second are of the last ten. Writes benchmarks/results/ranks_<env>.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from learning import RESULTS, about, start, trainer_of
from throughput import load, read_flags, words

ITERATIONS = 12


def all_reduce(count: int) -> None:
    """Prints the median milliseconds that summing `count` float32 over the ranks takes."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    gradient, times = torch.zeros(count, device="cuda" if on_gpu else "cpu"), []
    for _ in range(50):
        started = time.perf_counter()
        dist.all_reduce(gradient)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print("all_reduce_ms", 1e3 * statistics.median(times), flush=True)
    dist.destroy_process_group()


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def train(script: Path, flags: list[str], ranks: int) -> tuple[float, int]:
    """Steps a second of the whole job, and the network's parameters."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    with tempfile.TemporaryDirectory() as folder:
        command = torchrun(ranks) if ranks > 1 else [sys.executable]
        command += [str(script), *flags, "--eval-episodes", "0", "--run-dir", f"{folder}/run"]
        if code := subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | threads).returncode:
            raise SystemExit(code)  # after the trainer's own line
        result = json.loads(Path(f"{folder}/run/result.json").read_text())
        optimizer = torch.load(f"{folder}/run/checkpoint.pt", weights_only=True, map_location="cpu")["optimizer"]
    return result["sps"], optimizer["exp_avg"].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="PongNoFrameskip-v4")
    parser.add_argument("--flags", type=words, default=[], help="further flags of the trainer, in one string")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", type=Path, help="default: benchmarks/results/ranks_<env>.json")
    parser.add_argument("--all-reduce", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks < 2 or options.turns < 1:
        parser.error("--ranks must be at least 2 and --turns at least 1")
    if options.all_reduce:
        all_reduce(options.all_reduce)
        return
    script = trainer_of(options.env_id)
    flags = ["--env-id", options.env_id, *options.flags]
    trainer = load(script)
    args = read_flags(trainer, flags, ITERATIONS)
    if args.num_envs % options.ranks or args.batch_size // args.num_minibatches % options.ranks:
        parser.error(f"environments and minibatch, --flags may set them, must divide by {options.ranks} ranks")
    path = options.record or RESULTS / f"ranks_{options.env_id.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the last turn
    flags += ["--total-timesteps", str(args.total_timesteps)]
    turns = []
    for _ in range(options.turns):
        one_process, parameters = train(script, flags, 1)
        ranks, _ = train(script, flags, options.ranks)
        turns.append({"one_process": one_process, "ranks": ranks, "ratio": ranks / one_process})
        print({key: round(value, 2) for key, value in turns[-1].items()}, flush=True)
    child = [*torchrun(options.ranks), __file__, "--all-reduce", str(parameters)]
    printed = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    record = about(trainer.versions()) | {
        "env_id": options.env_id,
        "seed": args.seed,
        "ranks": options.ranks,
        "turns": turns,
        "median": {key: statistics.median(turn[key] for turn in turns) for key in turns[0]},
        "parameters": parameters,
        "all_reduce_ms": float(printed.split("all_reduce_ms")[1].split()[0]),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"median ratio {record['median']['ratio']:.2f}, all-reduce {record['all_reduce_ms']:.2f} ms")


if __name__ == "__main__":
    start(main)
