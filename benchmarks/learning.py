"""Trains one environment with the trainer's defaults on several seeds and records what they reached, with the curves.

    python benchmarks/learning.py CartPole-v1 --total-timesteps 100000 --seeds 1 2 3 4 5 --threshold 475
    python benchmarks/learning.py ALE/Pong-v5 --runs runs/<run> runs/<run> --threshold 18    # runs made already

Writes benchmarks/results/learning_<env>.json after every seed, failed ones included. In a run's record:

    command_seconds       wall time of the whole command, evaluation included
    eval_return_mean      mean score of the `eval_episodes` whole games played after training
    mean_last_20_games    exact mean score of the last 20 training games that ended before `games_until_step`, from the
                          checkpoint: the end of training where the run is `finished`
    curve                 charts/episodic_return_100, thinned to at most 100 points; `seconds` are wall time since the
                          log began, a pause before --resume included
    threshold             first point of the whole curve at or above --threshold (`reached`), the first from which it
                          stays there to the end (`held`), and the first iteration whose ended games have that mean,
                          charts/episodic_return (`iteration`)
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POINTS = 100  # of a curve, at most


class Refused(Exception):
    """A trainer's own line on a command line that cannot work."""


def hardware() -> str:
    """CPU count, model and instruction set, and the GPUs that PyTorch sees."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    model = models[0] if models else platform.processor() or platform.machine()
    cpu = torch.cpu.get_capabilities()
    instructions = torch.backends.cpu.get_cpu_capability()
    instructions += "-BF16" * cpu.get("avx512_bf16", False) + ", AMX" * cpu.get("amx_bf16", False)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # under taskset, say
    cores = f"{mine} of {os.cpu_count()}" if mine < os.cpu_count() else os.cpu_count()
    return ", ".join([f"{cores} CPU cores ({model}, {instructions})", *gpus])


def commit(folder: Path = ROOT) -> str | None:
    """The commit that is checked out in `folder`; None without git."""
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def about(versions: dict) -> dict:
    """What a record says of this command: itself, the commit, the `versions` of a trainer's packages, the hardware."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "commit": commit(), "versions": versions, "hardware": hardware()}


def trainer_of(env_id: str) -> Path:
    """The script that trains `env_id`."""
    atari = env_id.startswith("ALE/") or "NoFrameskip" in env_id
    return ROOT / ("ppo_clip_atari.py" if atari else "ppo_clip_discrete.py")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def read_run(run_dir: Path, points: int = POINTS, threshold: float | None = None) -> dict:
    """A run folder's record of itself; a run that is not finished has no evaluation."""
    about = json.loads((run_dir / "args.json").read_text())
    result = run_dir / "result.json"
    run = {
        "command": " ".join(["python", Path(about["command"][0]).name, *about["command"][1:]]),
        "seed": about["args"]["seed"],
        "commit": about["commit"],
        "versions": about["versions"],
        "finished": result.exists(),
        **(json.loads(result.read_text()) if result.exists() else {}),
    }
    if (run_dir / "checkpoint.pt").exists():
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        games = state["recent"]  # scores of the last 100 games in the order in which they ended
        run["mean_last_20_games"] = statistics.mean(games[-20:]) if len(games) >= 20 else None
        run["games_until_step"] = state["global_step"]

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tag = "charts/episodic_return_100"
    scores = events.Scalars(tag) if tag in events.scalars.Keys() else []  # none where no episode ended yet
    began = events.FirstEventTimestamp() if scores else 0.0
    if threshold is not None:
        above = [e.value >= threshold for e in scores]
        held = len(above) - [*reversed(above), False].index(False)  # the first point after the last one below
        ended = events.Scalars("charts/episodic_return") if scores else []
        points_of = {
            "reached": next((e for e in scores if e.value >= threshold), None),
            "held": scores[held] if held < len(scores) else None,
            "iteration": next((e for e in ended if e.value >= threshold), None),
        }
        run["threshold"] = {"return": threshold} | {
            name: e and {"step": e.step, "seconds": round(e.wall_time - began, 2)} for name, e in points_of.items()
        }
    stride = max(1, -(-len(scores) // points))
    chosen = scores[::-stride][::-1]  # from the end, which stays
    run["curve"] = {
        "step": [e.step for e in chosen],
        "seconds": [round(e.wall_time - began, 1) for e in chosen],
        "mean_return_of_last_100": [round(e.value, 2) for e in chosen],
    }
    return run


def train(trainer: Path, flags: list[str], points: int = POINTS, threshold: float | None = None) -> dict:
    """One run in a process of its own, in a temporary folder; `flags` begin with --env-id. Raises Refused."""
    head = commit()
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(trainer), *flags, "--run-dir", str(run_dir)]
        started = time.time()
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        run = {"exit_code": done.returncode, "command_seconds": round(time.time() - started, 2)}
        if done.returncode == 2:
            raise Refused(done.stderr.strip())
        if done.returncode == 0:
            run |= read_run(run_dir, points, threshold)
        else:
            run["error"] = (done.stderr.strip().splitlines() or [""])[-1]
    own = "PYTHONPATH=benchmarks " if "time_limit_env:" in flags[1] else ""
    return run | {
        "command": f"{own}python {trainer.name} {' '.join(flags)}",
        "seed": int(flags[flags.index("--seed") + 1]),
        "commit": head,
        "trainer_sha256": sha256(trainer),
    }


def side_by_side(function: Callable, jobs: Iterable[tuple], workers: int) -> Iterator:
    """Yields `function(*job)` of each job as it ends, `workers` at a time; after Ctrl-C no further job starts."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from (done.result() for done in as_completed([pool.submit(function, *job) for job in jobs]))
    finally:
        pool.shutdown(cancel_futures=True)


def median_to_threshold(runs: list[dict]) -> dict[str, float | None]:
    """Median seconds over the runs, where a run that did not get there counts as infinity; None for infinity."""
    medians = {}
    for name in ("reached", "held", "iteration"):
        points = [run.get("threshold", {}).get(name) for run in runs]
        median = statistics.median(point["seconds"] if point else math.inf for point in points)
        medians[name] = median if math.isfinite(median) else None
    return medians


def tell(run: dict) -> None:
    """A run's record as one line, without its long parts."""
    print({k: v for k, v in run.items() if k not in ("curve", "versions", "command", "changes")}, flush=True)


def start(main: Callable[[], None]) -> None:
    """Runs a script's `main`, which Ctrl-C, a trainer's refusal and a command that failed end without a traceback."""
    try:
        main()
    except Refused as refused:
        print(refused, file=sys.stderr)
        raise SystemExit(2) from None
    except subprocess.CalledProcessError as failed:  # it has said why
        raise SystemExit(failed.returncode if failed.returncode > 0 else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id")
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--eval-episodes", type=int, default=100)
    parser.add_argument("--threshold", type=float, help="record when the curve reaches and holds this")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once; wall times then include contention")
    parser.add_argument("--runs", type=Path, nargs="+", help="record these run folders and train nothing")
    parser.add_argument("--hardware", default=hardware(), help="of --runs, where it was another machine")
    parser.add_argument("--record", type=Path, help="default: benchmarks/results/learning_<env>.json")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    for run_dir in options.runs or []:
        try:
            holds = json.loads((run_dir / "args.json").read_text())["args"]["env_id"] == options.env_id
        except (OSError, ValueError, LookupError, TypeError):
            holds = False
        if not holds:
            parser.error(f"{run_dir} holds no run of {options.env_id}")
    name = options.env_id.replace("/", "-").replace(":", "-")
    path = options.record or RESULTS / f"learning_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first run
    flags = ["--env-id", options.env_id, "--total-timesteps", str(options.total_timesteps)]
    flags += ["--eval-episodes", str(options.eval_episodes), "--seed"]
    if options.runs:
        made = (read_run(run_dir, threshold=options.threshold) for run_dir in options.runs)
    else:
        jobs = [(trainer_of(options.env_id), [*flags, str(seed)], POINTS, options.threshold) for seed in options.seeds]
        made = side_by_side(train, jobs, options.jobs)
    runs = []
    for run in made:
        tell(run)
        runs = sorted([*runs, run], key=lambda run: run["seed"])
        scores = [run["eval_return_mean"] for run in runs if run.get("eval_return_mean") is not None]
        times = [run["command_seconds"] for run in runs if run.get("exit_code") == 0]
        record = {
            "env_id": options.env_id,
            "hardware": options.hardware,
            "jobs": None if options.runs else options.jobs,
            "mean": statistics.mean(scores) if scores else None,
            "worst": min(scores, default=None),
            "failed": sum(run.get("exit_code", 0) != 0 for run in runs),  # in neither mean nor seconds
            "median_command_seconds": statistics.median(times) if times else None,
            "median_seconds_to_threshold": median_to_threshold(runs) if options.threshold is not None else None,
            "runs": runs,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"mean {record['mean']}, worst {record['worst']}, failed {record['failed']}, record {path}")
    if record["failed"] == len(runs):
        raise SystemExit(1)


if __name__ == "__main__":
    start(main)
