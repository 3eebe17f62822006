"""Plays an exported policy with ONNX Runtime alone: `python play.py policy.onnx CartPole-v1 10` (no PyTorch needed)."""

import sys

import gymnasium as gym
import numpy as np
import onnxruntime

path, env_id, games = sys.argv[1], sys.argv[2], int(sys.argv[3])
policy = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
dtype = np.int64 if policy.get_inputs()[0].type == "tensor(int64)" else np.float32  # the first: of a Discrete space
first_action = int(policy.get_modelmeta().custom_metadata_map["first_action"])
env, scores = gym.make(env_id), []
for seed in range(games):
    obs, _ = env.reset(seed=seed)
    score, over = 0.0, False
    while not over:
        _logits, _value, action = policy.run(None, {"obs": dtype(obs)[None]})
        obs, reward, terminated, truncated, _ = env.step(int(action[0]) + first_action)
        score, over = score + float(reward), terminated or truncated
    scores.append(score)
print(f"mean return {np.mean(scores):.1f}")
