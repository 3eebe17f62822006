"""What each choice of ppo_clip_discrete.py is worth: the defaults, and the defaults with one thing changed.

    python benchmarks/ablations.py                                        # all: 3 seeds each
    python benchmarks/ablations.py --only no-bootstrap --seeds 1 2 3 4 5
    python benchmarks/plot.py ablations

What no flag changes is changed in a copy of the script, as a user would do it. Adds to
benchmarks/results/ablations.json as it goes; a run that it holds is not repeated, unless it failed or the trainer has
changed since.
"""

import argparse
import json
import tempfile
from pathlib import Path

from learning import RESULTS, ROOT, hardware, sha256, side_by_side, start, tell, train

TRAINER = ROOT / "ppo_clip_discrete.py"
POINTS = 60  # of a curve, at most
STEPS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 150_000,
    "time_limit_env:Corridor4-v0": 60_000,
    "time_limit_env:Corridor64-v0": 60_000,
}
CONTROL, CORRIDOR = list(STEPS)[:2], list(STEPS)[2:]

SEPARATE_ENCODER = [
    ("self.encoder = nn.Sequential(", "build = lambda: nn.Sequential("),
    ("self.policy_head = ", "self.encoder, self.value_encoder = build(), build()\n        self.policy_head = "),
    ("self.value_head(features)", "self.value_head(self.value_encoder(x))"),
]
NO_BOOTSTRAP = [("torch.where(truncated, final_values, values[1:])", "values[1:] * ~truncated")]

# name: (group, environments, flags, changes of the source as (old, new))
VARIANTS = {
    "defaults": ("defaults", CONTROL + CORRIDOR, "", []),
    "no-norm-obs": ("normalisation", CONTROL, "--no-norm-obs", []),
    "no-norm-reward": ("normalisation", CONTROL, "--no-norm-reward", []),
    "no-norm": ("normalisation", CONTROL, "--no-norm-obs --no-norm-reward", []),
    "separate-encoder": ("network and value loss", CONTROL, "", SEPARATE_ENCODER),
    "clip-vloss": ("network and value loss", CONTROL, "--clip-vloss", []),
    "target-kl-0.02": ("trust region and entropy", CONTROL, "--target-kl 0.02", []),
    "target-kl-0.005": ("trust region and entropy", CONTROL, "--target-kl 0.005", []),
    "final-temperature-1": ("trust region and entropy", CONTROL, "--final-temperature 1", []),
    "target-entropy-0.3": ("trust region and entropy", CONTROL, "--target-entropy 0.3", []),
    "no-bootstrap": ("bootstrap at a time limit", CORRIDOR, "", NO_BOOTSTRAP),
}


def change(source: str, changes: list[tuple[str, str]]) -> str:
    """`source` with each `old`, which must be there exactly once, replaced by its `new`."""
    for old, new in changes:
        if source.count(old) != 1:
            raise SystemExit(f"error: {TRAINER.name} holds {source.count(old)} times, not once: {old}")
        source = source.replace(old, new)
    return source


def ablate(variant: str, flags: str) -> dict:
    """One run of a variant, from a changed copy where there is something to change."""
    group, _, _, changes = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINER
        if changes:
            trainer = Path(folder) / f"{variant.replace('-', '_')}.py"
            trainer.write_text(change(TRAINER.read_text(), changes))
        run = train(trainer, flags.split(), POINTS)
    about = {"variant": variant, "group": group, "env_id": flags.split()[1], "flags": flags, "changes": changes}
    return about | run | {"trainer_sha256": sha256(TRAINER), "hardware": hardware()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--env-ids", nargs="+", choices=STEPS, default=list(STEPS), metavar="ENV")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; wall times then include contention")
    parser.add_argument("--total-timesteps", type=int, help="instead of each environment's own, for a trial")
    parser.add_argument("--record", type=Path, default=RESULTS / "ablations.json")
    options = parser.parse_args()
    if options.total_timesteps and options.record == parser.get_default("record"):
        parser.error("--total-timesteps is for a trial, which needs a --record of its own")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    options.record.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first run
    for variant in options.only:  # before the first run
        change(TRAINER.read_text(), VARIANTS[variant][3])
    runs = json.loads(options.record.read_text()) if options.record.exists() else []
    made = {(run["variant"], run["flags"]): run for run in runs}
    jobs = []
    for variant in options.only:
        _, env_ids, own_flags, _ = VARIANTS[variant]
        for env_id in (e for e in env_ids if e in options.env_ids):
            steps = options.total_timesteps or STEPS[env_id]
            episodes = 0 if env_id in CORRIDOR else 100  # one episode of a new corridor is not the continuing task
            for seed in options.seeds:
                flags = f"--env-id {env_id} --total-timesteps {steps} --seed {seed} --eval-episodes {episodes}"
                job = (variant, f"{flags} {own_flags}".strip())
                old = made.get(job, {"exit_code": None})
                if old["exit_code"] != 0 or old["trainer_sha256"] != sha256(TRAINER):
                    jobs.append(job)
    print(f"{len(jobs)} runs to do, {len(runs)} in {options.record}", flush=True)
    if any(run["trainer_sha256"] != sha256(TRAINER) for job, run in made.items() if job not in jobs):
        print(f"warning: another {TRAINER.name} made some of those, which stay beside these")
    for run in side_by_side(ablate, jobs, options.jobs):
        tell(run)
        made[run["variant"], run["flags"]] = run | {"jobs": options.jobs}
        ordered = sorted(made.values(), key=lambda run: (list(VARIANTS).index(run["variant"]), run["flags"]))
        options.record.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")  # one line per run


if __name__ == "__main__":
    start(main)
