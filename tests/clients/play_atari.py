"""Plays an exported Atari policy with ONNX Runtime, without PyTorch: `python play_atari.py runs/<run> 10`."""

import json
import sys
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import onnxruntime

folder, games = Path(sys.argv[1]), int(sys.argv[2])
policy = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
draws = {x.name: (1, x.shape[1]) for x in policy.get_inputs() if x.name == "uniform"}  # of a --stochastic export
about = json.loads((folder / "policy.json").read_text())
gym.register_envs(ale_py)
game = about["env_id"].removeprefix("ALE/").removesuffix("NoFrameskip-v4").removesuffix("-v5")
sticky = about["preprocessing"]["repeat_action_probability"]
settings = {"stack_num": policy.get_inputs()[0].shape[1], "reward_clipping": False, "repeat_action_probability": sticky}
env = gym.make_vec(f"ALE/{game}-v5", num_envs=1, **settings)
for seed in range(games):
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    score, steps, over = 0.0, 0, False
    while not over:
        numbers = {name: rng.random(shape, dtype=np.float32) for name, shape in draws.items()}
        _logits, _value, action = policy.run(None, {"obs": obs} | numbers)
        obs, reward, terminated, truncated, _ = env.step(action)
        score, steps, over = score + float(reward[0]), steps + 1, bool(terminated[0] or truncated[0])
    print(f"score {score:.0f} after {steps} steps")
