"""Steps a second of a trainer and of Stable-Baselines3's PPO: same environment and settings, turn by turn.

    pip install stable-baselines3 opencv-python-headless
    python benchmarks/versus_sb3.py discrete        # CartPole-v1
    python benchmarks/versus_sb3.py atari           # ALE/Breakout-v5, canonical settings

Each turn runs both as processes of their own; `sps` counts the training loop without its first two iterations. Writes
benchmarks/results/versus_sb3_<trainer>.json.
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
SETTINGS = {
    "discrete": dict(env_id="CartPole-v1", num_envs=64, num_steps=32, minibatch=512, epochs=10, total=40_960),
    "atari": dict(env_id="ALE/Breakout-v5", num_envs=8, num_steps=128, minibatch=256, epochs=4, total=10_240),
}


def ours(trainer: str, s: dict) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / f"ppo_clip_{trainer}.py"),
            *("--env-id", s["env_id"], "--num-envs", str(s["num_envs"]), "--num-steps", str(s["num_steps"])),
            *("--num-minibatches", str(s["num_envs"] * s["num_steps"] // s["minibatch"])),
            *("--update-epochs", str(s["epochs"]), "--total-timesteps", str(s["total"])),
            *("--eval-episodes", "0", "--run-dir", f"{folder}/run"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(f"{folder}/run/result.json").read_text())["sps"]


def theirs(trainer: str, s: dict) -> float:
    """Runs in a process of its own (see main)."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    common = dict(n_steps=s["num_steps"], batch_size=s["minibatch"], n_epochs=s["epochs"], seed=1, device="cpu")
    if trainer == "atari":
        gymnasium.register_envs(ale_py)
        env_kwargs = {"frameskip": 1, "repeat_action_probability": 0.25}
        envs = VecFrameStack(make_atari_env(s["env_id"], s["num_envs"], seed=1, env_kwargs=env_kwargs), 4)
        model = PPO("CnnPolicy", envs, clip_range=0.1, ent_coef=0.01, learning_rate=2.5e-4, **common)
    else:
        import torch

        torch.set_num_threads(1)
        envs = VecNormalize(make_vec_env(s["env_id"], s["num_envs"], seed=1))
        model = PPO("MlpPolicy", envs, clip_range=0.2, gamma=0.995, learning_rate=2e-3, **common)

    class Clock(BaseCallback):
        starts: tuple[float, ...] = ()

        def _on_rollout_start(self) -> None:
            self.starts = (*self.starts, time.time())

        def _on_step(self) -> bool:
            return True

    clock = Clock()
    model.learn(s["total"], callback=clock)
    timed = len(clock.starts) - 1 - 2
    return timed * s["num_envs"] * s["num_steps"] / (clock.starts[-1] - clock.starts[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=SETTINGS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = SETTINGS[options.trainer]
    if options.theirs:
        print(theirs(options.trainer, settings))
        return
    rows = []
    for _ in range(options.turns):
        other = [sys.executable, __file__, options.trainer, "--theirs"]
        printed = subprocess.run(other, check=True, capture_output=True, text=True).stdout
        rows.append({"ours": ours(options.trainer, settings), "sb3": float(printed.split()[-1])})
        print({name: round(sps) for name, sps in rows[-1].items()}, flush=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    packages = ("torch", "gymnasium", "ale-py", "numpy", "stable-baselines3")
    record = {
        "command": "python benchmarks/versus_sb3.py " + " ".join(sys.argv[1:]),
        "settings": settings,
        "seed": 1,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "sps": rows,
        "median_ours": statistics.median(r["ours"] for r in rows),
        "median_sb3": statistics.median(r["sb3"] for r in rows),
        "median_ratio": statistics.median(r["ours"] / r["sb3"] for r in rows),
    }
    path = ROOT / "benchmarks" / "results" / f"versus_sb3_{options.trainer}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"median ratio {record['median_ratio']:.2f}, record {path}")


if __name__ == "__main__":
    main()
