"""PPO-Clip for the Arcade Learning Environment from pixels, in one file.

Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347) plays N environments for T steps with pi_old,
then climbs the clipped surrogate for K epochs of minibatches:

    L = L^CLIP - c1 L^VF + c2 S,    L^CLIP = E[min(r A, clip(r, 1 - eps, 1 + eps) A)],    r = pi(a|s) / pi_old(a|s)
    L^VF = 1/2 E[(V(s) - V^targ)^2],    S = entropy of pi(.|s),    A = GAE(gamma, lambda)

    python ppo_clip_atari.py --env-id ALE/Pong-v5
    python ppo_clip_atari.py --env-id BreakoutNoFrameskip-v4      # the paper's protocol: no sticky actions
    python ppo_clip_atari.py --resume runs/<run>                  # goes on where a run stopped
    torchrun --standalone --nproc-per-node 8 ppo_clip_atari.py    # the same job on eight GPUs

The canonical settings, CleanRL's:

    python ppo_clip_atari.py --env-id BreakoutNoFrameskip-v4 --num-envs 8 --num-steps 128 --num-minibatches 4 \\
        --learning-rate 2.5e-4 --clip-vloss --vf-coef 0.5 --no-norm-obs --gamma 0.99 --final-temperature 1

With the defaults PongNoFrameskip-v4 reaches 18 within 0.76M steps and ends at 19.1, 20.1 and 19.6 after 1.5M (seeds 1
to 3).
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

SOURCE = Path(__file__).read_bytes()  # before the slow imports, in which a user may edit it
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # a minibatch's pixels on huge pages
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # a tenth: threads that wait awake may share a core while one is idle

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

STACK = 4  # frames that the network sees
ENT_COEF_BOUNDS = (1e-4, 0.5)  # range of c2 under --target-entropy
ENT_COEF_RATE = 2.0  # step size of log c2 per iteration, times the relative shortfall 1 - entropy / target
ENT_COEF_LEAD = 10  # the entropy that counts is that of so many iterations ahead, or c2 and it would swing
RANK_TIMEOUT = timedelta(minutes=10)  # how long a rank under torchrun waits for the others

# The method is everything down to `record_video`, plus `train` at the end, Algorithm 1 of the paper.


@dataclass(frozen=True)
class Args:
    # The run
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the run folder's name
    seed: int = 1  # seed of everything random: network, actions, minibatches, environments
    torch_deterministic: bool = True  # choose cuDNN's deterministic kernels
    cuda: bool = True  # train on the GPU when there is one
    bf16: bool = True  # encode in bfloat16 on a CPU with AMX, or AMD's with AVX512-BF16 (1.4 times faster)
    track: bool = False  # also log to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "ppo_clip"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    capture_video: bool = False  # after training, film one game, which has to end, to video.mp4 in the run folder
    run_dir: str | None = None  # folder of the run (default: runs/<env>__<exp_name>__<seed>__<time>)
    resume: str | None = None  # run folder to go on with, from its newest good checkpoint and with its arguments
    checkpoint_interval: int = 50  # iterations between two checkpoints; there is always one at the end
    eval_episodes: int = 10  # whole games played after training, with sampled actions; 0 for none

    # The environment
    env_id: str = "ALE/Breakout-v5"  # ALE/<Game>-v5, or <Game>NoFrameskip-v4 for the same game without sticky actions
    repeat_action_probability: float | None = None  # chance to repeat the last action (default: 0.25 for v5, 0 for v4)
    episodic_life: bool = True  # no bootstrap across a lost life (the game and its score go on)
    num_envs: int = 64  # N, environments that are played side by side
    num_steps: int = 32  # T, steps per environment and iteration
    total_timesteps: int = 10_000_000  # environment steps of the whole run, over all environments; a step is 4 frames

    # Learning
    learning_rate: float = 3e-4  # Adam's step size
    anneal_lr: bool = True  # let the learning rate fall linearly to zero over the run
    final_temperature: float = 0.25  # softmax temperature at the run's end, near 1 until late: explore, then exploit
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per epoch: the minibatch size is num_envs * num_steps / num_minibatches
    update_epochs: int = 4  # K, passes over the rollout per iteration
    norm_adv: bool = True  # normalise the advantages in each minibatch
    norm_obs: bool = True  # normalise each pixel by its running mean and variance (inside the network), not by 255
    clip_coef: float = 0.1  # epsilon, the clipping range of the ratio
    clip_vloss: bool = False  # also clip the value update, as OpenAI's baselines do
    ent_coef: float = 0.01  # c2, weight of the entropy bonus
    vf_coef: float = 1.0  # c1, weight of the value loss
    max_grad_norm: float = 0.5  # clip the gradient to this global norm
    target_kl: float | None = None  # trust region: no update leaves mean KL(pi_old || pi) above this
    target_entropy: float | None = None  # adapt c2 to hold the mean entropy (nats) near this; the temperature stays 1

    @property
    def stickiness(self) -> float:
        by_id = 0.0 if self.env_id.endswith("NoFrameskip-v4") else 0.25
        return by_id if self.repeat_action_probability is None else self.repeat_action_probability

    @property
    def local_envs(self) -> int:
        """Environments that this rank plays."""
        return self.num_envs // ranks()[1]

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of gain `std` and zero biases (Engstrom et al. 2020, arXiv:2005.12729, section 3)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far, merged batch by batch (Chan et al. 1983, "parallel" formula)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Adds every rank's `rows` (n, *shape)."""
        mean, var = moments(rows.double())
        count = len(rows) * ranks()[1]
        share = count / (self.count + count)  # new rows / all rows
        delta = mean - self.mean
        self.var.copy_((1 - share) * self.var + share * var + share * (1 - share) * delta**2)
        self.mean += share * delta
        self.count += count


class StridedConv2d(nn.Conv2d):
    """A convolution whose kernel is a multiple of its stride s, without padding: (B, C, H, W) -> (B, C', H', W').

    On a CPU it takes s columns of the picture as s * C channels, channels last the same memory, and moves by 1 along a
    row: the same products, but in bfloat16 oneDNN's gradients of them take a seventh to a half less time. An exported
    network (in `eval` mode) and one on a GPU have the plain convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):  # and nothing else
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training:
            return super().forward(x)
        s = self.stride[1]
        x, weight = (y[..., : y.shape[3] // s * s].permute(0, 2, 3, 1).unflatten(2, (-1, s)) for y in (x, self.weight))
        x, weight = (y.flatten(3).permute(0, 3, 1, 2) for y in (x, weight))  # (B, s*C, H, W // s)
        return nn.functional.conv2d(x, weight, self.bias, (self.stride[0], 1))


class Agent(nn.Module):
    """Shared encoder f_theta (Mnih et al. 2015, "Nature CNN") with a policy head W_pi and a value head W_v.

    `forward(obs)`: obs (B, 4, 84, 84) uint8, the last four frames, oldest first -> logits (B, A), value (B,).
    The value is in units of the clipped reward. `bf16` lets the encoder, never the heads, compute in bfloat16.
    """

    bf16 = False

    def __init__(self, envs: VectorEnv):
        super().__init__()
        self.obs_stats = RunningStats(envs.single_observation_space.shape[1:])  # of each pixel
        self.obs_stats.var.fill_((255 / 4) ** 2)  # until its first update, for good without --norm-obs: pixels / 255
        self.register_buffer("temperature", torch.ones(()))  # of the policy; `train` lowers it
        self.encoder = nn.Sequential(
            layer_init(StridedConv2d(STACK, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(StridedConv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.Flatten(),
            nn.ReLU(),  # flattened first, its gradient has one memory layout
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.policy_head = layer_init(nn.Linear(512, int(envs.single_action_space.n)), std=0.01)
        self.value_head = layer_init(nn.Linear(512, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # makes the update about 1.4 x faster on a CPU

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        pixels = obs.contiguous(memory_format=torch.channels_last).float()  # reorders bytes, not floats: 25 % less time
        # to a standard deviation of 1/4, near that of pixels / 255: with 1, a million steps of Enduro gained no point
        stats = self.obs_stats.mean, torch.rsqrt(16 * self.obs_stats.var.clamp(min=1.0))  # most pixels hardly change
        # same memory layout as the pixels: three times as fast as broadcasting over channels
        mean, scale = (x.expand_as(obs[:1]).contiguous(memory_format=torch.channels_last) for x in stats)
        pixels = pixels.sub_(mean).mul_(scale).clamp_(-1.25, 1.25)  # 5 standard deviations
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(pixels)
        features = features.float()
        return self.policy_head(features) / self.temperature, self.value_head(features).squeeze(-1)


def make_envs(args: Args, num_envs: int, colour: bool = False) -> AtariVectorEnv:
    """`num_envs` emulators of one game: 4 frames a step, max of the last two.

    A game starts with FIRE, where it has that, and no-ops, up to 29 frames in all; a lost life goes on without either.
    A finished game resets in the same step (SAME_STEP). `colour` gives the same games as (4, 210, 160, 3) RGB frames.
    """
    gym.register_envs(ale_py)
    env_id = args.env_id
    if env_id.endswith("NoFrameskip-v4"):
        env_id = f"ALE/{env_id.removesuffix('NoFrameskip-v4')}-v5"
    spec = gym.registry.get(env_id)
    if spec is None or spec.vector_entry_point != "ale_py.vector_env:AtariVectorEnv":
        names = "ALE/<Game>-v5 or <Game>NoFrameskip-v4, as ALE/Pong-v5"
        fail(f"--env-id {args.env_id} is no Atari game, it must be {names}; ppo_clip_discrete.py trains others")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    local_world = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # ranks that share them
    look = {"grayscale": False, "img_height": 210, "img_width": 160} if colour else {}
    return gym.make_vec(
        env_id,
        num_envs=num_envs,
        stack_num=STACK,
        autoreset_mode=AutoresetMode.SAME_STEP,
        num_threads=max(1, cores // local_world),
        repeat_action_probability=args.stickiness,
        life_loss_info=args.episodic_life,
        reward_clipping=False,  # scores are whole; collect clips
        **look,
    )


def make_groups(args: Args, device: torch.device) -> list[AtariVectorEnv]:
    """This rank's emulators; for a GPU, in groups: some play while it serves another. Each group may use all cores."""
    groups = math.gcd(args.local_envs, 4 if args.local_envs >= 32 else 2) if device.type == "cuda" else 1
    return [make_envs(args, args.local_envs // groups) for _ in range(groups)]


def env_seeds(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` 31-bit seeds (ALE's are int32), independent for every `seed` and `stream` (0 training, 1 evaluation…)."""
    return np.random.SeedSequence([seed, stream]).generate_state(count) >> 1


def to_tensor(obs: np.ndarray, device: torch.device) -> Tensor:
    """Frames (N, 4, 84, 84) uint8 as the network takes them."""
    return torch.from_numpy(obs).to(device)


class Rollout:
    """Buffer of one iteration on the training device: row t holds what pi_old saw and did at step t.

    Row T is the state to bootstrap from: its action is not played. Each frame is stored once: `observations`
    rebuilds the stacks.
    """

    def __init__(self, args: Args, envs: VectorEnv, device: torch.device):
        T, N, A = args.num_steps, args.local_envs, int(envs.single_action_space.n)
        picture = envs.single_observation_space.shape[1:]  # (84, 84)
        self.idx = torch.arange((T + 1) * N, device=device).view(T + 1, N)  # (T+1, N) flat index t * N + n
        # (T+STACK+1, N, 84, 84): STACK-1 rows from before the rollout, each step's newest frame, a black row
        self.frames = torch.zeros((T + STACK + 1, N, *picture), dtype=torch.uint8, device=device)
        self.history = torch.zeros((T + 1, N), dtype=torch.int64, device=device)  # earlier frames of the same game
        pinned = device.type == "cuda"  # so that copying the next two to the GPU is asynchronous
        self.newest = torch.zeros((N, *picture), dtype=torch.uint8, pin_memory=pinned)  # on the host
        self.host_history = torch.zeros((T + 1, N), dtype=torch.int64, pin_memory=pinned)
        self.noise = torch.zeros((T + 1, N, A), device=device)  # (T+1, N, A) noise for `act`, see `sample`
        self.actions = torch.zeros((T + 1, N), dtype=torch.int64, device=device)  # (T+1, N)
        self.log_probs = torch.zeros((T + 1, N, A), device=device)  # (T+1, N, A) of pi_old, all actions
        self.values = torch.zeros((T + 1, N), device=device)  # (T+1, N) V_old
        self.final_values = torch.zeros((T, N), device=device)  # (T, N) V_old(final observation) where truncated
        self.rewards = torch.zeros((T, N), device=device)  # (T, N) clipped to [-1, 1]
        self.returns = torch.zeros((T, N), device=device)  # (T, N) V^targ
        self.terminated = torch.zeros((T, N), dtype=torch.bool, device=device)  # (T, N) game over or a life lost
        self.truncated = torch.zeros((T, N), dtype=torch.bool, device=device)  # (T, N)

    def observations(self, idx: Tensor) -> Tensor:
        """Stacks (B, 4, 84, 84) of the transitions `idx` (B,), flat indices; black before a game's start."""
        num_envs = self.frames.shape[1]
        age = torch.arange(STACK - 1, -1, -1, device=idx.device)  # of the stack's frames, oldest first
        row = idx.unsqueeze(1) // num_envs + STACK - 1 - age
        row = torch.where(age <= self.history.flatten()[idx].unsqueeze(1), row, len(self.frames) - 1)
        frame = row * num_envs + idx.unsqueeze(1) % num_envs  # (B, 4)
        return self.frames.flatten(0, 1).index_select(0, frame.flatten()).unflatten(0, frame.shape)


class Episodes:
    """The N games in progress: where they stand and what they scored.

    They are played in one or more groups, served in order of arrival: some emulators step while the policy serves
    another group, and a reset, which takes as long as a dozen steps, delays only its own group.
    """

    def __init__(self, groups: list[AtariVectorEnv], seeds: np.ndarray):
        ends = np.cumsum([envs.num_envs for envs in groups])
        self.groups = [(envs, slice(end - envs.num_envs, end)) for envs, end in zip(groups, ends.tolist())]
        self.waiting = ThreadPoolExecutor(len(groups))  # a thread for each group
        self.arrived: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self.begin(seeds)
        self.returns = np.zeros(len(seeds))  # score so far
        self.lengths = np.zeros(len(seeds), dtype=np.int64)  # steps so far
        self.ended: list[list[tuple[float, int]]] = [[] for _ in groups]  # (return, length) of each group's ended games

    def begin(self, seeds: np.ndarray) -> None:
        """Starts new games."""
        self.seeds = seeds
        starts = [ask(envs.reset, seed=seeds[part]) for envs, part in self.groups]
        self.obs = [obs for obs, _ in starts]  # (n, 4, 84, 84) of each group
        self.frame_number = np.concatenate([info["episode_frame_number"] for _, info in starts])  # (N,)

    def send(self, group: int, actions: np.ndarray) -> None:
        """Lets one group play a step with `actions` (n,)."""
        envs, _ = self.groups[group]
        envs.send(actions)
        self.waiting.submit(envs.recv).add_done_callback(lambda step: self.arrived.put((group, step)))

    def receive(self) -> tuple[int, tuple]:
        """The next group that has played its step, and the step as the environment gives it."""
        group, step = self.arrived.get()
        return group, ask(step.result)

    def add(self, group: int, rewards: np.ndarray, frame_number: np.ndarray) -> np.ndarray:
        """Counts one step of a group's games, raw `rewards` (n,); returns whether each game is over (n,)."""
        part = self.groups[group][1]
        over = frame_number < self.frame_number[part]  # restarts with each game
        self.frame_number[part] = frame_number
        self.returns[part] += rewards
        self.lengths[part] += 1
        for n in part.start + np.flatnonzero(over):
            self.ended[group].append((float(self.returns[n]), int(self.lengths[n])))
            self.returns[n], self.lengths[n] = 0.0, 0
        return over

    def take_ended(self) -> list[tuple[float, int]]:
        """The games that ended since the last call, in the same order whichever group was faster."""
        ended, self.ended = self.ended, [[] for _ in self.groups]
        return [episode for group in ended for episode in group]

    def state_dict(self) -> list[dict]:
        """One dict an environment. Emulators have no state to save: a resumed run starts new games."""
        return [{"seed": int(seed)} for seed in self.seeds]

    def load_state_dict(self, states: list[dict]) -> None:
        self.begin(np.array([env_seeds(state["seed"], 0, 1)[0] for state in states]))  # not the first games again

    def close(self) -> None:
        self.waiting.shutdown()
        for envs, _ in self.groups:
            envs.close()


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Actions (B,) drawn from softmax(logits), logits (B, A), by the Gumbel-max trick: argmax p / Exp(1)."""
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def act(agent: Agent, rollout: Rollout, idx: Tensor) -> Tensor:
    """pi_old's actions (n,) in the rollout's states `idx` (n,); stores them, log-probabilities and values there."""
    logits, values = agent(rollout.observations(idx))
    actions = (logits.softmax(-1) / rollout.noise.flatten(0, 1)[idx]).argmax(-1)
    rollout.actions.view(-1)[idx] = actions
    rollout.log_probs.flatten(0, 1)[idx] = logits.log_softmax(-1)
    rollout.values.view(-1)[idx] = values
    return actions


@torch.no_grad()
def collect(agent: Agent, episodes: Episodes, rollout: Rollout, args: Args, act: Callable = act) -> None:
    """Phase 1: pi_old plays T steps in N environments and fills `rollout`. On a GPU, `act` is a `Graph` of it."""
    device = rollout.values.device
    T, N = rollout.rewards.shape
    rewards = np.zeros((T, N), dtype=np.float32)
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    history = rollout.host_history.numpy()
    history[0] = STACK - 1  # the rows before are the emulator's, black before a game's start
    final_obs = {}  # (t, n) of a truncated game -> its last observation
    rollout.noise.exponential_()  # drawn up front: no action depends on the order of arrival

    def answer(group: int, t: int) -> None:
        """pi_old acts on what the games of `group` show at step t."""
        part = episodes.groups[group][1]
        rollout.newest[part] = torch.from_numpy(episodes.obs[group][:, -1])
        rollout.frames[t + STACK - 1, part].copy_(rollout.newest[part], non_blocking=True)
        rollout.history[t, part].copy_(rollout.host_history[t, part], non_blocking=True)
        actions = act(agent, rollout, rollout.idx[t, part])
        if t < T:
            if device.type == "cpu":
                free_cores()
            episodes.send(group, actions.cpu().numpy())

    for group, (_, part) in enumerate(episodes.groups):
        rollout.frames[: STACK - 1, part] = to_tensor(episodes.obs[group][:, :-1], device).transpose(0, 1)
        answer(group, 0)
    steps = [0] * len(episodes.groups)  # played by each group
    while min(steps) < T:
        group, (obs, reward, lost, cut, info) = episodes.receive()
        part, t = episodes.groups[group][1], steps[group]
        rewards[t, part], terminated[t, part], truncated[t, part] = reward.clip(-1, 1), lost, cut
        over = episodes.add(group, reward, info["episode_frame_number"])
        history[t + 1, part] = np.where(over, 0, np.minimum(history[t, part] + 1, STACK - 1))
        for n in np.flatnonzero(cut):
            final_obs[t, part.start + int(n)] = info["final_obs"][n]
        episodes.obs[group] = obs
        steps[group] = t + 1
        answer(group, t + 1)
    if final_obs:
        final_obs = dict(sorted(final_obs.items()))  # not in the order of arrival
        rollout.final_values[tuple(zip(*final_obs))] = agent(to_tensor(np.stack([*final_obs.values()]), device))[1]
    rollout.rewards.copy_(torch.from_numpy(rewards))
    rollout.terminated.copy_(torch.from_numpy(terminated))
    rollout.truncated.copy_(torch.from_numpy(truncated))


def compute_gae(
    rewards: Tensor,  # (T, N)
    values: Tensor,  # (T+1, N) V_old
    final_values: Tensor,  # (T, N) V_old(final observation), read only where truncated
    terminated: Tensor,  # (T, N)
    truncated: Tensor,  # (T, N)
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16).

    Returns advantages and V^targ = A + V_old, both (T, N). A termination cuts the bootstrap; a truncation bootstraps
    the final observation's value; both cut the lambda-sum (Pardo et al. 2018, arXiv:1712.00378).
    """
    next_values = torch.where(truncated, final_values, values[1:]) * ~terminated
    deltas = rewards + gamma * next_values - values[:-1]
    decays = gamma * gae_lambda * (~(terminated | truncated)).to(deltas.dtype)
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values[:-1]


def ppo_clip_loss(
    logits: Tensor,  # (B, A) of pi
    values: Tensor,  # (B,)
    actions: Tensor,  # (B,)
    old_log_probs: Tensor,  # (B, A) of pi_old, all actions
    old_values: Tensor,  # (B,) V_old
    advantages: Tensor,  # (B,)
    returns: Tensor,  # (B,) V^targ
    ent_coef: Tensor | float,  # c2
    args: Args,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-L of PPO-Clip (Schulman et al. 2017, equations 7 and 9), to be minimised, and its metrics.

    Entropy and KL(pi_old || pi) are exact sums over the actions.
    """
    log_probs = logits.log_softmax(-1)
    log_ratio = (log_probs - old_log_probs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()

    value_error = (values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (clipped_values - returns).square())
    value_loss = 0.5 * value_error.mean()

    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = policy_loss + args.vf_coef * value_loss - ent_coef * entropy
    with torch.no_grad():
        metrics = {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "kl": categorical_kl(old_log_probs, log_probs).mean(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # CleanRL's: http://joschu.net/blog/kl-approx.html
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, metrics


def categorical_kl(old_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """KL(pi_old || pi), exact, from log-probabilities (..., A)."""
    return (old_log_probs.exp() * (old_log_probs - log_probs)).sum(-1)


class ClippedAdam(nn.Module):
    """Gradient clipping and Adam (Kingma & Ba 2015, arXiv:1412.6980) on all parameters as one flat tensor.

    Every parameter of `agent` becomes a view of `weights` (P,), its `.grad` one of `gradient` (P,), which is averaged
    over ranks. A non-finite gradient sets `found_inf`: fused Adam then skips this and all later steps of the update,
    without a host sync. Calls the functional Adam, because the class `torch.optim.Adam` imports PyTorch's compiler,
    a second of every start.
    """

    def __init__(self, agent: nn.Module, args: Args):
        super().__init__()
        params = list(agent.parameters())
        sizes = [p.numel() for p in params]
        self.weights = torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in params])  # in memory order
        self.gradient = torch.zeros_like(self.weights)
        for p, weight, grad in zip(params, self.weights.split(sizes), self.gradient.split(sizes)):
            p.data, p.grad = (flat.as_strided(p.shape, p.stride()) for flat in (weight, grad))
        device = self.weights.device
        self.register_buffer("exp_avg", torch.zeros_like(self.weights))
        self.register_buffer("exp_avg_sq", torch.zeros_like(self.weights))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32, device=device))  # also for float64 weights
        self.lr = torch.tensor(args.learning_rate, device=device)  # a tensor: CUDA graphs read its current value
        self.max_grad_norm = args.max_grad_norm
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def descend(self, loss: Tensor) -> Tensor:
        """One step down the gradient of `loss`; returns the gradient's norm before clipping."""
        self.gradient.zero_()
        loss.backward()
        norm = all_mean(self.gradient).norm()
        self.gradient *= (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.found_inf.copy_(torch.maximum(self.found_inf, (~norm.isfinite()).float()))
        tensors = [[x] for x in (self.weights, self.gradient, self.exp_avg, self.exp_avg_sq)]
        options = {"lr": self.lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0}
        options |= {"fused": True, "found_inf": self.found_inf, "amsgrad": False, "maximize": False}
        adam(*tensors, [], [self.steps], **options)
        return norm


def learn(
    agent: Agent, optimizer: ClippedAdam, rollout: Rollout, idx: Tensor, advantages: Tensor, c2: Tensor, args: Args
) -> dict[str, Tensor]:
    """One gradient step on the transitions `idx` (B,) with their `advantages` (B,). Returns the metrics."""
    logits, values = agent(rollout.observations(idx))
    batch = (x.flatten(0, 1)[idx] for x in (rollout.actions, rollout.log_probs, rollout.values, rollout.returns))
    actions, old_log_probs, old_values, returns = batch
    loss, metrics = ppo_clip_loss(logits, values, actions, old_log_probs, old_values, advantages, returns, c2, args)
    return metrics | {"grad_norm": optimizer.descend(loss)}


def normalise(advantages: Tensor) -> Tensor:
    """Each minibatch, a row of `advantages` (M, B), with mean 0 and standard deviation 1 over all ranks' rows."""
    mean, variance = moments(advantages.T)
    count = advantages.shape[1] * ranks()[1]
    std = (variance * count / (count - 1)).sqrt()
    return (advantages - mean[:, None]) / (std[:, None] + 1e-8)


def update(
    agent: Agent,
    optimizer: ClippedAdam,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    ent_coef: float,
    args: Args,
    learn: Callable = learn,  # on a GPU a `Graph` of it
) -> tuple[dict[str, float], float]:
    """Phase 2: K epochs of minibatches drawn uniformly without replacement. Returns mean metrics and the next c2.

    A non-finite gradient freezes the parameters for the rest of the update and sets the metric `finite` to 0.
    """
    advantages = advantages.flatten()
    rollout.returns.copy_(returns)
    optimizer.found_inf.zero_()
    c2 = torch.tensor(ent_coef, device=advantages.device)
    history = []
    trust_region = {}
    for _ in range(args.update_epochs):
        before = optimizer.weights.clone() if args.target_kl is not None else None
        order = torch.randperm(len(advantages), device=advantages.device).view(args.num_minibatches, -1)
        shuffled = normalise(advantages[order]) if args.norm_adv else advantages[order]
        for idx, minibatch_advantages in zip(order, shuffled):
            metrics = learn(agent, optimizer, rollout, idx, minibatch_advantages, c2, args)
            history.append(torch.stack([*metrics.values()]))
        if args.target_kl is not None:
            trust_region = backtrack(agent, optimizer.weights, before, rollout, args)
            if trust_region["step_fraction"] < 1.0:
                break
    by_epoch = all_mean(torch.stack(history).view(-1, args.num_minibatches, len(metrics)).mean(1))  # (epochs, metrics)
    explained = 1 - moments((returns - rollout.values[:-1]).flatten())[1] / moments(returns.flatten())[1]
    means = torch.cat([by_epoch.mean(0), explained[None], 1 - optimizer.found_inf[None]]).tolist()
    losses = dict(zip([*metrics, "explained_variance", "finite"], means)) | trust_region
    if args.target_entropy is not None:  # dual ascent on log c2, bounded: Haarnoja et al. 2018, arXiv:1812.05905, 5
        entropy = by_epoch[:, [*metrics].index("entropy")]
        ahead = max(losses["entropy"] + ENT_COEF_LEAD * float(entropy[-1] - entropy[0]), 0.0)
        ent_coef *= math.exp(ENT_COEF_RATE * (1 - ahead / args.target_entropy))
        ent_coef = min(max(ent_coef, ENT_COEF_BOUNDS[0]), ENT_COEF_BOUNDS[1])
    return losses, ent_coef


@torch.no_grad()
def backtrack(agent: Agent, weights: Tensor, before: Tensor, rollout: Rollout, args: Args) -> dict[str, float]:
    """Halves the epoch's step from `before` (P,) to `weights` (P,) until mean KL(pi_old || pi) <= target_kl.

    TRPO's line search (Schulman et al. 2015, arXiv:1502.05477, appendix C). Returns the KL over the whole batch and the
    fraction of the step that was kept, 0 if ten halvings were not enough.
    """
    after = weights.clone()
    old_log_probs = rollout.log_probs[:-1].flatten(0, 1)
    minibatches = rollout.idx[:-1].view(args.num_minibatches, -1)
    for fraction in [*(0.5**k for k in range(11)), 0.0]:
        weights.copy_(before.lerp(after, fraction))
        kls = []
        for idx in minibatches:
            log_probs = agent(rollout.observations(idx))[0].log_softmax(-1)
            kls.append(categorical_kl(old_log_probs[idx], log_probs).mean())
        kl = float(all_mean(torch.stack(kls).mean()))
        if kl <= args.target_kl:
            break
    return {"kl_after_update": kl, "step_fraction": fraction}


@torch.no_grad()
def evaluate(agent: Agent, args: Args, episodes: int, device: torch.device) -> list[float]:
    """Unclipped scores of `episodes` whole games in fresh emulators, one each, with sampled actions."""
    envs = make_envs(args, episodes)
    obs, info = envs.reset(seed=env_seeds(args.seed, 1, episodes))
    generator = torch.Generator(device).manual_seed(args.seed)
    returns, over = np.zeros(episodes), np.zeros(episodes, dtype=bool)
    while not over.all():
        frame_number = info["episode_frame_number"]
        logits, _ = agent(to_tensor(obs, device))
        obs, reward, _, _, info = step(envs, sample(logits, generator))
        returns += np.where(over, 0.0, reward)
        over |= info["episode_frame_number"] < frame_number
    envs.close()
    return returns.tolist()


@torch.no_grad()
def record_video(agent: Agent, args: Args, path: Path, device: torch.device) -> None:
    """Films one whole game with sampled actions: a second emulator of the same seed shows it in colour."""
    from moviepy import ImageSequenceClip  # slow to import

    envs, colour = make_envs(args, 1), make_envs(args, 1, colour=True)
    obs, info = envs.reset(seed=env_seeds(args.seed, 2, 1))
    picture, _ = colour.reset(seed=env_seeds(args.seed, 2, 1))
    generator = torch.Generator(device).manual_seed(args.seed)
    frames, over = [], False
    while not over:
        frames.append(picture[0, -1].copy())  # a view would keep all four of the stack
        frame_number = info["episode_frame_number"]
        logits, _ = agent(to_tensor(obs, device))
        actions = sample(logits, generator)
        obs, _, _, _, info = step(envs, actions)
        picture = step(colour, actions)[0]
        over = info["episode_frame_number"][0] < frame_number[0]
    scale = ["-vf", "scale=iw*3:ih*3:flags=neighbor"]  # not in memory, where a long game would take 24 GB
    ImageSequenceClip(frames, fps=15).write_videofile(str(path), logger=None, ffmpeg_params=scale)


# From here to `train` all is infrastructure: environments, torchrun ranks, CUDA graphs, files, command line, logging.


def step(envs: VectorEnv, actions: Tensor) -> tuple:
    """`envs.step` with actions (N,) from any device."""
    return ask(envs.step, actions.cpu().numpy())


def ask(function: Callable, *inputs: Any, **options: Any) -> Any:
    """What an environment's `function` returns; an exception in it ends the run with a one-line error."""
    try:
        return function(*inputs, **options)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        fail(f"the environment died: {type(error).__name__}: {error} ({where}); checkpoints are intact", code=1)


def say(line: str) -> None:
    """Prints `line`; a terminal or pipe that is gone does not end the run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line that says what to change."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if dist.is_initialized():  # the usual exit may abort, see `leave_ranks`
        os._exit(code)
    raise SystemExit(code)


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks that torchrun started: (0, 1) without it."""
    if not dist.is_torchelastic_launched():  # other launchers set RANK and WORLD_SIZE too
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def start_ranks(args: Args) -> torch.device:
    """This rank's device; joins the other ranks where torchrun started any (NCCL between GPUs, gloo between CPUs)."""
    on_gpu = args.cuda and torch.cuda.is_available()
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            fail(f"--nproc-per-node asks for more ranks than this machine's {gpus} GPUs: lower it or add --no-cuda")
        torch.cuda.set_device(local_rank)
    if dist.is_torchelastic_launched():
        store, rank, world = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # no addresses of a dead attempt
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"  # at a timeout just end; torchrun's 1 waits for the graphs
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=RANK_TIMEOUT)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: with AMX, or AMD's AVX512-BF16. Intel's is slower."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu["cpu_name"]))


def keep_memory() -> None:
    """Lets glibc's malloc keep what a minibatch frees for the next one: it returns such memory or not, by chance."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; an old glibc takes no more
            mallopt(-1, 2**30)  # M_TRIM_THRESHOLD; alone it would keep the other at 128 KiB


def free_cores() -> None:
    """Ends PyTorch's OpenMP threads until their next work: idle, they wait awake on cores that emulators want."""
    with contextlib.suppress(AttributeError):  # a PyTorch without OpenMP
        ctypes.CDLL(None).omp_pause_resource_all(1)  # 1: omp_pause_soft


def together(collective: Callable, *inputs: Any) -> None:
    """Calls a collective if there are other ranks; one that died or hangs ends this one with a one-line error."""
    if dist.is_initialized():
        try:
            collective(*inputs)
        except RuntimeError as error:
            fail(f"rank {ranks()[0]} waited in vain for the other ranks: {error}", code=1)


def all_mean(x: Tensor) -> Tensor:
    """Mean of `x` over all ranks, in place."""
    together(dist.all_reduce, x, dist.ReduceOp.AVG)
    return x


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of `rows` (n, *shape) over the rows of all ranks, each (*shape)."""
    mean = all_mean(rows.mean(0))
    return mean, all_mean((rows - mean).square().mean(0))


def gather(value: Any) -> list:
    """Every rank's `value`, in the order of ranks."""
    values = [value] * ranks()[1]
    together(dist.all_gather_object, values, value)
    return values


def from_rank_0(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, which alone calls it, on every rank."""
    result = [function() if ranks()[0] == 0 else None]
    together(dist.broadcast_object_list, result, 0)
    return result[0]


def leave_ranks() -> None:
    """Leaves the process group, all ranks together.

    gloo's threads keep running, and one that frees a Python tensor during interpreter shutdown aborts the process: by
    the time the barrier returns, every such tensor is freed.
    """
    if dist.is_initialized():
        together(dist.barrier)
        dist.destroy_process_group()


def digest(agent: nn.Module) -> str:
    """sha256 of all parameters and statistics, which must agree on all ranks."""
    return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in agent.state_dict().values())).hexdigest()


class Graph:
    """`function` as one CUDA graph, because launching its many small kernels takes longer than running them.

    Three warm-up calls run eagerly on a side stream, as capture requires (PyTorch's notes on CUDA graphs); the fourth
    records the kernels, and from then on they are replayed on the same memory, with fresh random numbers. Tensor
    arguments are copied in, all others must not change; each call overwrites the last result.
    """

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        for mine, given in zip(self.inputs, inputs):
            if isinstance(mine, Tensor):
                mine.copy_(given)
            elif mine is not given and mine != given:
                raise RuntimeError(f"a CUDA graph does not see that {mine} became {given}: pass it as a tensor")
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.result
        if self.calls == 4:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.function(*self.inputs)
        self.graph.replay()
        return self.result


def write_file(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Writes atomically and durably, even across a power cut; the previous file is kept as `keep`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        how = f"--resume {path.parent}" if (path.parent / "args.json").exists() else "start again"
        fail(f"cannot write {path}: {error.strerror}; fix that, then {how}", code=1)


def save_checkpoint(run_dir: Path, state: dict) -> None:
    """Writes `state` (plain types only) with its sha256 as the last 32 bytes; keeps the checkpoint before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_file(run_dir / "checkpoint.pt", data + hashlib.sha256(data).digest(), run_dir / "checkpoint.prev.pt")


def load_checkpoint(run_dir: Path) -> dict | None:
    """The newest good checkpoint, or None if none was written yet. Never runs code from the file."""
    with contextlib.suppress(OSError):  # a folder that cannot be written is told of later
        (run_dir / "checkpoint.pt.tmp").unlink(missing_ok=True)
    damaged = []
    for path in filter(Path.exists, (run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt")):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                raise ValueError("its sha256 does not hold")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("it holds no run's state")
        except OSError as error:
            fail(f"{path} cannot be read: {error.strerror}")
        except Exception as error:
            damaged.append(path.name)
            print(f"warning: {path} is damaged: {' '.join(str(error).split())[:80]}", file=sys.stderr)
            continue
        for name in damaged:  # or the next save would rotate it over this good one
            try:
                os.replace(run_dir / name, run_dir / f"{name}.damaged")
            except OSError as error:
                fail(f"{run_dir} cannot be written: {error.strerror}")
        return state
    if damaged:
        fail(f"{run_dir} has no good checkpoint: {' and '.join(damaged)} damaged; start a new run")
    print(f"warning: {run_dir} has no checkpoint yet: the run begins again", file=sys.stderr)
    return None


def seed_all(seed: int) -> None:
    """Seeds every global random number generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_random_states() -> dict:
    """State of every global random number generator, in plain types."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(state: dict) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def lock_run_dir(run_dir: Path) -> Path:
    """Locks the run folder until this process ends: two runs in one folder would mix their checkpoints."""
    try:
        lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        fail(f"{run_dir} cannot be written: {error.strerror}")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process trains in {run_dir}: stop it, or choose another --run-dir")
    except OSError:  # a file system without locks
        pass
    return run_dir


def open_run(args: Args) -> Path:
    """Creates the run folder with arguments, versions and this very source in it, or finds the one to resume."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.6f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or args.run_dir or Path("runs") / name)
    script = Path(__file__).resolve()
    snapshot, record_path = run_dir / script.name, run_dir / "args.json"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    record = {
        "script": str(script),
        "command": sys.argv,
        "commit": commit or None,
        "versions": versions(),
        "job": os.environ.get("TORCHELASTIC_RUN_ID"),  # torchrun's
        "args": dataclasses.asdict(args),
        "earlier_starts": [],
    }
    try:
        if args.resume:
            before = json.loads(record_path.read_text())
            starts = record["earlier_starts"] = before.get("earlier_starts") or []
            starts.append({key: before[key] for key in ("script", "command", "commit", "versions") if key in before})
            if not snapshot.exists() or snapshot.read_bytes() != SOURCE:
                print(f"warning: {snapshot.name} is not the source that began this run", file=sys.stderr)
                write_file(snapshot, SOURCE, keep=snapshot.with_suffix(f".{len(starts)}.py"))
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock_run_dir(run_dir)
            other = snapshot.exists() and snapshot.read_bytes() != SOURCE  # a user's own file: keep it
            here = snapshot.resolve() == script  # what is edited next would not be what ran
            if other or here or record_path.exists() or (run_dir / "checkpoint.pt").exists():
                fail(f"--run-dir {run_dir} is taken: go on with its run by --resume {run_dir} or choose another folder")
            write_file(snapshot, SOURCE)
        write_file(record_path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        fail(f"--run-dir {run_dir} cannot be written: {error.strerror}")
    return run_dir


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; PyTorch's names the CUDA it was built for."""
    modules = ("gymnasium", "ale_py", "numpy")
    packages = {m.replace("_", "-"): importlib.metadata.version(m) for m in modules if importlib.util.find_spec(m)}
    return {"python": platform.python_version(), "torch": str(torch.__version__)} | packages


def start_wandb(args: Args, run_dir: Path) -> None:
    """Mirrors TensorBoard to Weights & Biases."""
    settings = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
    try:
        import wandb

        wandb.init(**settings, config=dataclasses.asdict(args), sync_tensorboard=True)
    except Exception as error:
        fail(f"--track: {error}; then go on with --resume {run_dir}", code=1)


def cli(default: Args) -> Args:
    """tyro's command line, with an error as one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Args, description=__doc__, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue())  # without a terminal's colours
        lines = [line.strip("│| ") for line in plain.splitlines()[1:]]
        ruled = [not line.strip("─╰╯-+") for line in lines]
        begin = ruled.index(False)
        fail(f"{' '.join(lines[begin : ruled.index(True, begin)])} (see --help)")


def parse_args() -> Args:
    """The checked command line; with --resume, the run's own arguments."""
    args = cli(Args())
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a rank died
    nameless = os.environ.get("TORCHELASTIC_RUN_ID") == "none"  # torchrun's default job id
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            fail("--max-restarts works on one machine, as each counts restarts for itself: leave it out, then --resume")
        if not args.run_dir and not args.resume:
            fail("--max-restarts needs --run-dir or --resume: a restart looks for its run there")
        if nameless and args.run_dir:
            fail("--max-restarts needs --standalone or --rdzv-id: a restart recognises its run by the job's id")
    if restarted and args.run_dir:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no run yet, or not a run folder
            job = json.loads((Path(args.run_dir) / "args.json").read_text()).get("job")
            if job == os.environ["TORCHELASTIC_RUN_ID"]:  # resume this job's own run, never another's
                args = dataclasses.replace(args, resume=args.run_dir)
    if args.resume:
        try:
            saved = Args(**json.loads((Path(args.resume) / "args.json").read_text())["args"])
            kinds = {name: type(x) for name, x in vars(Args()).items() if isinstance(x, (int, str))}
            wrong = [name for name, kind in kinds.items() if type(getattr(saved, name)) is not kind]
            if wrong:
                raise TypeError(f"{' and '.join(wrong)} of a wrong type in args.json")
            check(dataclasses.replace(saved, capture_video=False))  # this command may leave it out
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--resume {args.resume} holds no run of this script: {error}")
        named = args.run_dir or args.resume  # naming the folder twice does no harm
        again = Path(named).resolve() == Path(args.resume).resolve()
        saved = dataclasses.replace(saved, resume=args.resume, run_dir=named if again else args.resume)
        args = cli(saved)
        for name, old in dataclasses.asdict(saved).items():
            new = getattr(args, name)
            free = name in ("cuda", "eval_episodes", "capture_video")  # no part of the training
            if old != new and not free and not (name == "total_timesteps" and new > old):
                fail(f"--{name.replace('_', '-')} {new} contradicts the run's {old}: leave it out or start anew")
    check(args)
    return args


def check(args: Args) -> None:
    """Ends with one line where an argument cannot work."""
    inf, world, batch_size, M = math.inf, ranks()[1], args.batch_size, args.num_minibatches
    shared = args.num_envs % world == 0 and batch_size // world % max(M, 1) == 0  # equally among the ranks
    texts = [value for value in vars(args).values() if isinstance(value, str)]
    broken = [text for text in texts if text.encode(errors="ignore").decode() != text]
    rules = [
        (0 <= args.seed < 2**32, "--seed must be at least 0 and below 2^32"),
        (args.resume != "" and args.run_dir != "", "--resume and --run-dir need the name of a folder"),
        (not broken, f"{broken} must be UTF-8 text"),
        (args.checkpoint_interval >= 1, "--checkpoint-interval must be at least 1"),
        (args.eval_episodes >= 0, "--eval-episodes must be 0 or more"),
        (args.num_envs >= 1, "--num-envs must be at least 1"),
        (args.num_steps >= 1, "--num-steps must be at least 1"),
        (batch_size <= 2**20, "--num-envs times --num-steps must be at most 2^20 transitions"),
        (M >= 1 and batch_size % M == 0, f"--num-minibatches {M} must divide num_envs * num_steps = {batch_size}"),
        (batch_size >= 2 * M, "a minibatch needs at least 2 transitions: raise --num-envs or lower --num-minibatches"),
        (shared, f"--num-envs and num_envs * num_steps / num_minibatches must divide by {world} ranks"),
        (args.total_timesteps >= batch_size, f"--total-timesteps must be at least one rollout, {batch_size} steps"),
        (args.update_epochs >= 1, "--update-epochs must be at least 1"),
        (0 <= args.stickiness <= 1, "--repeat-action-probability must be from 0 to 1"),
        (0 <= args.learning_rate <= 1, "--learning-rate must be from 0 to 1"),
        (1e-3 <= args.final_temperature <= 1, "--final-temperature must be from 0.001 to 1"),
        (0 < args.gamma <= 1, "--gamma must be above 0 and at most 1"),
        (0 <= args.gae_lambda <= 1, "--gae-lambda must be from 0 to 1"),
        (0 < args.clip_coef < 1, "--clip-coef must be above 0 and below 1"),
        (0 <= args.ent_coef < inf, "--ent-coef must be 0 or more and finite"),
        (0 <= args.vf_coef < inf, "--vf-coef must be 0 or more and finite"),
        (0 < args.max_grad_norm < inf, "--max-grad-norm must be above 0 and finite"),
        (args.target_kl is None or 0 < args.target_kl < inf, "--target-kl must be above 0 and finite"),
        (args.target_entropy is None or 0 < args.target_entropy < inf, "--target-entropy must be above 0 and finite"),
        (
            args.target_entropy is None or args.update_epochs >= 2,
            "--target-entropy needs --update-epochs 2 or more: it looks ahead by how the entropy moves between epochs",
        ),
        (not args.track or importlib.util.find_spec("wandb"), "--track needs `pip install wandb`"),
        (not args.capture_video or importlib.util.find_spec("moviepy"), "--capture-video needs `pip install moviepy`"),
    ]
    for holds, message in rules:
        if not holds:
            fail(message)


def check_finite(iteration: int, losses: dict[str, float], statistics: list[str], run_dir: Path) -> None:
    """Ends the run where losses, the gradient or the named `statistics` are not finite."""
    if losses["finite"] < 1 or not math.isfinite(losses["loss"]) or statistics:
        names = [tag for tag, value in losses.items() if not math.isfinite(value)] + statistics
        fail(
            f"iteration {iteration}: not finite: {', '.join(names) or 'the gradient'}. Lower --learning-rate, or look "
            "for rewards and observations that are not finite, or whose squares are not; "
            f"what checkpoints {run_dir} has are intact",
            code=1,
        )


def catch_signals() -> list[int]:
    """Returns a list that collects SIGTERM, SIGINT and SIGHUP; a second signal ends the process at once.

    Signals that are ignored at start, such as SIGHUP under nohup, stay ignored. A second one within half a second does
    not count: it is torchrun forwarding what the terminal already sent to every process.
    """
    caught: list[int] = []
    first = 0.0

    def catch(number: int, _: Any) -> None:
        nonlocal first
        if not caught:
            first = time.monotonic()
        elif time.monotonic() - first > 0.5:
            os._exit(128 + number)
        caught.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


class Report:
    """Progress of a run: TensorBoard (CleanRL's tags) and a progress bar, or plain lines without a terminal."""

    def __init__(self, args: Args, run_dir: Path, global_step: int, timed: list, recent: list):
        self.total = args.num_iterations * args.batch_size
        self.timed, self.earlier = timed, timed  # [steps, seconds] of all starts, and of those before this one
        self.recent: deque[float] = deque(recent, maxlen=100)  # scores of the last episodes
        self.skip = 2  # warm-up iterations that no speed counts
        threading.excepthook = lambda error: None  # the writer's thread: its errors resurface in `iteration`
        try:
            self.writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
        except OSError as error:
            how = f"fix that, then --resume {run_dir}"
            fail(f"cannot write the TensorBoard log in {run_dir}: {error.strerror}; {how}", code=1)
        self.bar = tqdm(total=self.total, initial=global_step, unit="step", file=sys.stdout, disable=None)
        self.tick = self.last_line = time.monotonic()

    def iteration(self, global_step: int, charts: dict, losses: dict, ended: list[tuple[float, int]]) -> None:
        """Writes one iteration's numbers; `ended` has return and length of each episode that ended in it."""
        now = time.monotonic()
        self.skip -= 1
        if self.skip < 0:
            self.timed = [self.timed[0] + global_step - self.step, self.timed[1] + now - self.tick]
            charts["SPS"] = (self.timed[0] - self.earlier[0]) / (self.timed[1] - self.earlier[1])
        self.tick, self.step = now, global_step
        if ended:
            charts["episodic_return"], charts["episodic_length"] = np.mean(ended, axis=0)
            self.recent.extend(score for score, _ in ended)
        if self.recent:
            charts["episodic_return_100"] = np.mean(self.recent)
        try:
            for group, values in (("charts", charts), ("losses", losses)):
                for tag, value in values.items():
                    self.writer.add_scalar(f"{group}/{tag}", value, global_step)
            self.writer.flush()
        except OSError as error:
            fail(f"cannot write the TensorBoard log in {self.writer.log_dir}: {error.strerror}", code=1)

        line = f"step {global_step}/{self.total}"
        if "SPS" in charts:
            line += f"  {charts['SPS']:.0f} steps/s  ETA {(self.total - global_step) / charts['SPS']:.0f} s"
        if self.recent:
            line += f"  return {charts['episodic_return_100']:.1f}"
            self.bar.set_postfix({"return": f"{charts['episodic_return_100']:.1f}"}, refresh=False)
        self.bar.update(global_step - self.bar.n)
        if self.bar.disable and (now - self.last_line > 10 or global_step == self.total):
            self.last_line = now
            say(line)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


def finish(agent: Agent, args: Args, run_dir: Path, device: torch.device, started: float, report: Report) -> None:
    """Evaluates, writes result.json and films a game."""
    scores = []
    if args.eval_episodes:
        say(f"evaluating over {args.eval_episodes} whole episodes")
        scores = evaluate(agent, args, args.eval_episodes, device)
    result = {
        "eval_return_mean": float(np.mean(scores)) if scores else None,
        "eval_return_std": float(np.std(scores)) if scores else None,
        "eval_episodes": len(scores),
        "global_step": args.num_iterations * args.batch_size,
        "wall_seconds": time.monotonic() - started,
        "sps": report.timed[0] / report.timed[1] if report.timed[0] else None,
        "seed": args.seed,
        "env_id": args.env_id,
    }
    path = run_dir / "result.json"
    if not scores:  # only filmed, say: what the same policy scored before stays
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            earlier = json.loads(path.read_text())
            if earlier["global_step"] == result["global_step"]:
                result |= {key: earlier[key] for key in result if key.startswith("eval_")}
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())
    if scores:
        say(f"evaluation: mean return {np.mean(scores):.1f} +/- {np.std(scores):.1f} over {len(scores)} episodes")
    if args.capture_video:
        from moviepy import VideoFileClip  # slow to import

        video, film = run_dir / "video.mp4", run_dir / "video.tmp.mp4"
        try:
            record_video(agent, args, film, device)
            VideoFileClip(str(film)).close()  # opens only a whole film; moviepy overlooks ffmpeg's exit status
            os.replace(film, video)
        except Exception as error:  # moviepy raises bare ones
            film.unlink(missing_ok=True)
            fail(f"cannot film {video}, is the disk full? All else is complete: {error}", code=1)
        say(f"video: {video}")


def train(args: Args) -> None:
    """Algorithm 1 of Schulman et al. 2017: play, estimate advantages, climb L for K epochs, and again."""
    started = time.monotonic()
    keep_memory()
    device = start_ranks(args)
    rank, world = ranks()
    state = from_rank_0(lambda: load_checkpoint(lock_run_dir(Path(args.resume)))) if args.resume else None
    seed_all(args.seed)  # same initial network on every rank
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    if device.type == "cuda":
        torch.set_num_threads(1)  # the host only copies frames: leave the cores to the emulators

    if rank == 0:
        say(f"starting {args.num_envs} emulators")  # a quarter of a second each
    envs = make_groups(args, device)
    agent = Agent(envs[0]).to(device)
    agent.bf16 = args.bf16 and device.type == "cpu" and bf16_is_faster()
    most = math.log(int(envs[0].single_action_space.n))
    if args.target_entropy is not None and args.target_entropy >= most:
        fail(f"--target-entropy must be below {most:.3f}, the entropy of the uniform policy")
    rollout = Rollout(args, envs[0], device)
    optimizer = ClippedAdam(agent, args)
    mine = slice(rank * args.local_envs, (rank + 1) * args.local_envs)  # this rank's environments
    episodes = Episodes(envs, env_seeds(args.seed, 0, args.num_envs)[mine])
    ent_coef = args.ent_coef if args.target_entropy is None else min(max(args.ent_coef, 0.01), ENT_COEF_BOUNDS[1])
    final_temperature = args.final_temperature if args.target_entropy is None else 1.0  # c2 alone sets the entropy
    resumed, timed, recent = 0, [0, 0.0], []  # iterations, time and scores of earlier starts

    if state is not None:
        try:
            if (state["global_step"], len(state["episodes"])) != (state["iteration"] * args.batch_size, args.num_envs):
                raise ValueError("its --num-envs or --num-steps are others")
            agent.load_state_dict(state["agent"])
            optimizer.load_state_dict(state["optimizer"])
            episodes.load_state_dict(state["episodes"][mine])
            resumed, timed, recent, ent_coef = (state[k] for k in ("iteration", "timed", "recent", "ent_coef"))
            started -= state["seconds"]  # as if this start went on without a break
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            fail(f"the checkpoint in {args.resume} is not of this script and environment: {error}")
    run_dir = from_rank_0(lambda: open_run(args))
    agent.load_state_dict(from_rank_0(lambda: {name: x.cpu() for name, x in agent.state_dict().items()}))
    seed_all(int(env_seeds(args.seed, 3 + resumed, world)[rank]))  # from here on each rank has its own random stream
    if state is not None and len(state["random"]) == world:
        set_random_states(state["random"][rank])
    global_step = resumed * args.batch_size
    if rank == 0:
        where = f"{world} x {device.type}" if world > 1 else str(device)
        say(f"{args.env_id} on {where}, {run_dir}" + f", from step {global_step}" * (resumed > 0))
        if args.track:
            start_wandb(args, run_dir)
        report = Report(args, run_dir, global_step, timed, recent)
    stop_signals = catch_signals()
    play, estimate, climb = map(Graph if device.type == "cuda" else lambda f: f, (act, compute_gae, learn))

    for iteration in range(resumed + 1, args.num_iterations + 1):
        lr = args.learning_rate * (1 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1)
        optimizer.lr.fill_(lr)
        # falls late, as it enlarges the policy's steps too (annealed softmax policy: Sutton & Barto 2018, section 13.1)
        temperature = 1 / (1 + (1 / final_temperature - 1) * (iteration / args.num_iterations) ** 16)
        agent.temperature.fill_(temperature)
        charts = {"learning_rate": lr, "temperature": temperature, "ent_coef": ent_coef}

        collect(agent, episodes, rollout, args, play)
        ended = [episode for part in gather(episodes.take_ended()) for episode in part]
        played = rollout.rewards, rollout.values, rollout.final_values, rollout.terminated, rollout.truncated
        advantages, returns = estimate(*played, args.gamma, args.gae_lambda)
        losses, ent_coef = update(agent, optimizer, rollout, advantages, returns, ent_coef, args, climb)
        check_finite(iteration, losses, [], run_dir)
        if args.norm_obs:  # only between iterations: pi_old and pi must see the same inputs
            some = rollout.frames[STACK - 1 : -2 : max(1, args.num_steps // 8)]  # at least 8 steps, or all
            agent.obs_stats.update(some.flatten(0, 1))

        global_step = iteration * args.batch_size
        if rank == 0:
            report.iteration(global_step, charts, losses, ended)
        stopping = any(gather(stop_signals))  # of any rank
        if iteration % args.checkpoint_interval == 0 or iteration == args.num_iterations or stopping:
            digests, states, random_states = zip(*gather((digest(agent), episodes.state_dict(), get_random_states())))
            if len(set(digests)) > 1:
                fail(f"iteration {iteration}: the ranks' parameters differ; go on with --resume {run_dir}", code=1)
            if rank == 0:
                state = {
                    "agent": agent.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "episodes": [episode for part in states for episode in part],  # of all environments
                    "random": list(random_states),  # of every rank
                    "iteration": iteration,
                    "global_step": global_step,
                    "seconds": time.monotonic() - started,
                    "timed": report.timed,
                    "recent": list(report.recent),
                    "ent_coef": ent_coef,
                    "args": dataclasses.asdict(args),
                    "source": hashlib.sha256(SOURCE).hexdigest(),
                    "versions": versions(),
                }
                save_checkpoint(run_dir, state)
        if stopping:
            break
    episodes.close()
    caught = [number for numbers in gather(stop_signals) for number in numbers]  # of any rank, since the start
    stop_signals.append(0)  # from here on nothing is left to lose: the next signal ends the run at once
    del play, estimate, climb  # NCCL's communicator ends only after every graph that holds one of its collectives
    leave_ranks()
    if rank == 0:
        report.close()
        if caught:
            say(f"stopped at step {global_step}: go on with --resume {run_dir}")
        else:
            finish(agent, args, run_dir, device, started, report)
    if caught:
        raise SystemExit(128 + caught[0])


if __name__ == "__main__":
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # it may be closed
    sys.stdout.reconfigure(errors="backslashreplace")  # for a name that the terminal cannot show, as stderr does
    try:
        train(parse_args())
    except KeyboardInterrupt:  # before `train` catches signals
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        scarce = r"(?i)out of memory|\ballocate\b|alloc_failed|new thread|temporarily unavailable"
        if not isinstance(error, MemoryError) and not re.search(scarce, str(error)):
            raise
        what = " ".join(str(error).split())[:100] or "MemoryError"
        how = "raise --num-minibatches, or lower --num-envs, --num-steps or --eval-episodes"
        fail(f"out of memory: {how} ({what})", code=1)
