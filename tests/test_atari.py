"""The Atari trainer against the real emulators and against a scripted game."""

import dataclasses
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import variant_of
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parent.parent / "ppo_clip_atari.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def atari(request):
    return variant_of(request.config, SCRIPT)


def tiny(atari, **changes):
    defaults = {
        "env_id": "ALE/Breakout-v5",
        "num_envs": 2,
        "num_steps": 16,
        "num_minibatches": 2,
        "total_timesteps": 64,
    }
    return atari.Args(**(defaults | changes))


class ScriptedGame:
    """Stands where ale-py's vector environment stands: one game a row, told in advance.

    Step k of `script` is (reward, terminated, truncated, game over), the same in every environment. A frame is filled
    with its own number, 1 for a new game's first.
    """

    def __init__(self, stack, script, num_envs=1):
        self.script, self.num_envs, self.k = script, num_envs, 0
        self.single_observation_space = gym.spaces.Box(0, 255, (stack, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(3)

    def new_game(self):
        self.frame, self.stack = 1, np.zeros(self.single_observation_space.shape, np.uint8)
        self.stack[-1] = 1

    def advance(self):
        self.frame += 1
        self.stack = np.concatenate([self.stack[1:], np.full((1, 84, 84), self.frame, np.uint8)])

    def result(self):
        info = {"episode_frame_number": np.full(self.num_envs, 4 * self.frame)}
        return np.stack([self.stack] * self.num_envs), info

    def reset(self, seed=None):
        self.new_game()
        return self.result()

    def send(self, actions):
        self.sent = True

    def recv(self):
        assert self.sent
        self.sent = False
        reward, terminated, truncated, over = self.script[self.k]
        self.k += 1
        self.advance()
        final = self.result()[0]
        if over:
            self.new_game()
        obs, info = self.result()
        # as ale-py does: rows of final_obs are rubbish where no game was reset
        info["final_obs"] = final if over else np.full_like(final, 99)
        repeat = np.ones(self.num_envs)
        return obs, (reward * repeat).astype(np.int32), terminated * repeat > 0, truncated * repeat > 0, info


class Recorder:
    """Keeps every observation that the emulators give."""

    def __init__(self, envs):
        self.envs, self.seen = envs, []

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self, seed=None):
        result = self.envs.reset(seed=seed)
        self.seen.append(result[0].copy())
        return result

    def recv(self):
        result = self.envs.recv()
        self.seen.append(result[0].copy())
        return result


def play(atari, script):
    args = tiny(atari, num_envs=1, num_steps=len(script), num_minibatches=1)
    envs = ScriptedGame(atari.STACK, script)
    agent = atari.Agent(envs)
    episodes, rollout = atari.Episodes([envs], np.array([0])), atari.Rollout(args, envs, CPU)
    atari.collect(agent, episodes, rollout, args)
    return agent, episodes, rollout


def third_stack(atari):
    """What a scripted game shows with its third frame."""
    return torch.arange(4 - atari.STACK, 4).clamp(min=0).to(torch.uint8)[None, :, None, None].expand(1, -1, 84, 84)


def test_life_loss_ends_the_bootstrap_and_not_the_game(atari):
    step, life, over = (1, False, False, False), (0, True, False, False), (7, True, False, True)
    _, episodes, rollout = play(atari, [step, life, step, over, step, over, step])
    assert episodes.take_ended() == [(9.0, 4), (8.0, 2)]  # 1 + 0 + 1 + 7 unclipped, over the lost life
    assert episodes.returns.tolist() == [1.0]
    assert rollout.rewards[:, 0].tolist() == [1, 0, 1, 1, 1, 1, 1]  # clipped for training
    assert rollout.terminated[:, 0].tolist() == [False, True, False, True, False, True, False]
    all_older = [atari.STACK - 1] * 4  # a lost life leaves the stack alone
    assert rollout.history[:, 0].tolist() == [*all_older, *[0, min(1, atari.STACK - 1)] * 2]


def test_truncation_bootstraps_the_final_observation(atari):
    step, cut = (1, False, False, False), (1, False, True, True)
    agent, episodes, rollout = play(atari, [step, cut, step])
    assert episodes.take_ended() == [(2.0, 2)]
    with torch.no_grad():
        v_final = agent(third_stack(atari))[1]
    torch.testing.assert_close(rollout.final_values[1], v_final)
    assert rollout.final_values[[0, 2]].abs().sum() == 0
    # the frame after the cut is the new game's: no transition joins the two games
    assert rollout.frames[atari.STACK + 1, 0, 0, 0] == 1
    advantages, _ = atari.compute_gae(
        rollout.rewards, rollout.values, rollout.final_values, rollout.terminated, rollout.truncated, 0.5, 0.5
    )
    torch.testing.assert_close(advantages[1], 1 + 0.5 * v_final - rollout.values[1])


def test_a_game_of_a_later_group_is_bootstrapped_from_its_own_final_observation(atari):
    step, cut = (1, False, False, False), (1, False, True, True)
    groups = [ScriptedGame(atari.STACK, [step] * 3), ScriptedGame(atari.STACK, [step, cut, step])]
    agent, args = atari.Agent(groups[0]), tiny(atari, num_steps=3, num_minibatches=1)
    episodes, rollout = atari.Episodes(groups, np.arange(2)), atari.Rollout(args, groups[0], CPU)
    atari.collect(agent, episodes, rollout, args)
    with torch.no_grad():
        torch.testing.assert_close(rollout.final_values[1, 1:], agent(third_stack(atari))[1])
    assert rollout.final_values.count_nonzero() == 1


def test_a_resumed_game_is_counted_from_its_own_first_frame(atari):
    episodes = atari.Episodes([ScriptedGame(atari.STACK, [])], np.array([0]))
    episodes.frame_number[:] = 1000  # far into a game
    episodes.load_state_dict(episodes.state_dict())
    assert not episodes.add(0, np.ones(1), np.array([8])).any()  # its second frame ends nothing


def test_rewards_are_clipped_and_scores_are_not(atari):
    _, episodes, rollout = play(atari, [(reward, False, False, False) for reward in (-7, -1, 0, 8)])
    assert rollout.rewards[:, 0].tolist() == [-1, -1, 0, 1] and episodes.returns.tolist() == [0.0]
    assert episodes.lengths.tolist() == [4]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_stacks_are_the_environments_own(atari, device):
    """Over game ends, lost lives and rollout borders, each rebuilt stack is what the emulator gave."""
    args = tiny(atari, num_envs=6, num_steps=200, num_minibatches=1, episodic_life=True)
    groups = [Recorder(atari.make_envs(args, 3)), Recorder(atari.make_envs(args, 3))]
    agent, episodes = atari.Agent(groups[0]).to(device), atari.Episodes(groups, atari.env_seeds(1, 0, 6))
    rollout = atari.Rollout(args, groups[0], torch.device(device))
    act = atari.act if device == "cpu" else atari.Graph(atari.act)
    games = 0
    for i in range(3):
        atari.collect(agent, episodes, rollout, args, act)
        rebuilt = rollout.observations(rollout.idx.flatten()).unflatten(0, (201, 6)).cpu()
        own = [torch.from_numpy(np.stack(group.seen[200 * i :][:201])) for group in groups]
        assert torch.equal(rebuilt, torch.cat(own, 1))
        games += int((rollout.history[1:] == 0).sum())
    assert games > 6


class Late:
    """Emulators that take their time at some of the steps."""

    def __init__(self, envs, every):
        self.envs, self.every, self.steps = envs, every, 0

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def recv(self):
        self.steps += 1
        time.sleep(0.01 if self.steps % self.every == 0 else 0)
        return self.envs.recv()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of this process's threads")
def test_no_thread_of_the_policy_idles_beside_the_emulators(atari):
    """Each step's policy has a new thread, as that of the step before ended before its emulators played."""
    args, threads = tiny(atari, num_envs=8, num_steps=4), []
    envs = ScriptedGame(atari.STACK, [(0, False, False, False)] * 4, 8)
    agent, rollout = atari.Agent(envs), atari.Rollout(args, envs, CPU)

    def act(*inputs):
        actions = atari.act(*inputs)
        threads.append(set(os.listdir("/proc/self/task")))
        return actions

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        atari.collect(agent, atari.Episodes([envs], np.arange(8)), rollout, args, act)
    finally:
        torch.set_num_threads(before)
    assert len(threads) == 5  # the second step also has the thread that waits for the emulators
    assert all(after - before for before, after in itertools.pairwise(threads[1:]))


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="another OpenMP, or one core")
def test_an_idle_thread_soon_sleeps(atari):
    """By the processor's time that passes while nothing is done: some milliseconds with OpenMP's own patience."""
    code = """
import runpy, statistics, sys, time
runpy.run_path(sys.argv[1])
import torch
torch.set_num_threads(2)
x, idle = torch.ones(2**20), []
for _ in range(30):
    x + x
    before = time.process_time()
    time.sleep(0.02)
    idle.append(time.process_time() - before)
print(statistics.median(idle))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    seconds = []
    for own in ({}, {"GOMP_SPINCOUNT": "300000"}):
        command = [sys.executable, "-c", code, atari.__file__]
        seconds.append(float(subprocess.run(command, capture_output=True, text=True, check=True, env=env | own).stdout))
    assert 3 * seconds[0] < seconds[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_minibatch(atari):
    """64 MiB, more than malloc keeps by itself, taken again and again after `keep_memory`."""
    code = f"""
import resource, sys, torch
from conftest import load
load({atari.__file__!r}).keep_memory()
for _ in range(int(sys.argv[1])):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    options = {"cwd": Path(__file__).parent, "env": os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}}
    faults = []
    for times in ("1", "11"):
        command = [sys.executable, "-c", code, times]
        faults.append(int(subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout))
    assert faults[1] - faults[0] < 5 * 2**14  # of 4 KiB each; 10 * 2^14 where it was given back, once more by chance


@pytest.mark.parametrize(
    "most, calls", [(2**30, [(-3, 2**30), (-1, 2**30)]), (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)]), (0, None)]
)
def test_an_old_malloc_keeps_what_it_can(atari, monkeypatch, most, calls):
    """Where the limit above which memory is given back at once cannot be raised, raising the other would fix it."""
    made = []
    libc = SimpleNamespace(mallopt=lambda name, value: made.append((name, value)) or name == -1 or value <= most)
    monkeypatch.setattr(atari.ctypes, "CDLL", lambda name: libc)
    atari.keep_memory()
    assert made == (calls or [(-3, 2**30), (-3, 2**25)])


def test_a_run_keeps_freed_memory(atari, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(atari, "keep_memory", lambda: kept.append(True))
    atari.train(tiny(atari, total_timesteps=32, cuda=False, eval_episodes=0, run_dir=str(tmp_path / "run")))
    assert kept == [True]


def test_groups_play_what_one_group_plays(atari):
    """Some emulators work while the policy answers others: whoever comes first, the same is drawn and played."""

    def transitions(sizes, late):
        args = tiny(atari, num_envs=4, num_steps=150, num_minibatches=1)
        groups = [Late(atari.make_envs(args, size), every) for size, every in zip(sizes, late)]
        torch.manual_seed(3)
        agent = atari.Agent(groups[0])
        with torch.no_grad():
            agent.policy_head.weight *= 100  # no uniform policy, where any logits would do
        episodes, rollout = atari.Episodes(groups, atari.env_seeds(1, 0, 4)), atari.Rollout(args, groups[0], CPU)
        arrivals, receive = [], episodes.receive
        episodes.receive = lambda: arrivals.append(receive()) or arrivals[-1]
        ended = []
        for _ in range(2):
            atari.collect(agent, episodes, rollout, args)
            ended += episodes.take_ended()
        episodes.close()
        return rollout, ended, [group for group, _ in arrivals]

    one, ended, _ = transitions([4], [1000])
    first, first_ended, order = transitions([2, 2], [3, 1000])
    second, second_ended, other_order = transitions([2, 2], [1000, 3])
    assert order != other_order
    for name in ("frames", "history", "noise", "actions", "values", "rewards", "terminated", "truncated"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        torch.testing.assert_close(getattr(one, name), getattr(first, name), msg=name)
    assert len(set(first_ended)) > 2 and first_ended == second_ended and sorted(ended) == sorted(first_ended)


def test_actions_follow_the_softmax_and_are_drawn_anew(atari):
    """In one state actions follow the softmax, and those of successive steps, also of rollouts, are independent."""
    args = tiny(atari, num_envs=100, num_steps=4)
    envs = ScriptedGame(atari.STACK, ([(0, False, False, False)] * 159 + [(0, True, False, True)]) * 2, 100)
    agent, rollout = atari.Agent(envs), atari.Rollout(args, envs, CPU)
    episodes = atari.Episodes([envs], np.arange(100))
    logits = torch.tensor([0.5, 0.0, -0.5])
    agent.forward = lambda obs: (logits.expand(len(obs), 3), torch.zeros(len(obs)))
    torch.manual_seed(1)
    drawn = []
    for _ in range(80):
        atari.collect(agent, episodes, rollout, args)
        drawn.append(rollout.actions[:-1].clone())  # the last is not played
    drawn = torch.cat(drawn)
    probs = logits.softmax(-1)
    torch.testing.assert_close(torch.bincount(drawn.flatten()) / drawn.numel(), probs, atol=0.01, rtol=0)
    for steps in (1, 4):  # within a rollout and from one to the next
        same = (drawn[steps:] == drawn[:-steps]).float().mean().item()
        assert same == pytest.approx(float(probs.square().sum()), abs=0.015)
    torch.testing.assert_close(rollout.log_probs[0], probs.log().expand(100, 3))


@pytest.mark.parametrize("bf16", [False, True])
def test_first_minibatch_ratio_is_one(atari, tmp_path, monkeypatch, bf16):
    """Over a whole run's iterations: whatever moves between collection and update, pixel statistics too, shows here."""
    ratios, update = [], atari.update

    def spy(agent, optimizer, rollout, advantages, *rest):
        idx = torch.randperm(advantages.numel())
        with torch.no_grad():
            log_probs = agent(rollout.observations(idx))[0].log_softmax(-1)
        ratios.append((log_probs - rollout.log_probs.flatten(0, 1)[idx]).exp())
        return update(agent, optimizer, rollout, advantages, *rest)

    monkeypatch.setattr(atari, "update", spy)
    args = tiny(atari, total_timesteps=128, bf16=bf16, cuda=False, eval_episodes=0, run_dir=str(tmp_path / "run"))
    atari.train(args)
    # bfloat16 keeps 8 bits: where a kernel adds in another order at another batch size, a feature moves by 2^-8
    ratio = torch.stack(ratios)
    assert len(ratios) == 128 // args.batch_size > 2
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=2e-2 if bf16 else 1e-4, rtol=0)


AMD, INTEL = ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": name} for name in ("AMD EPYC 9R14", "Intel Xeon"))


@pytest.mark.parametrize(
    "bf16, cpu, dtype",
    [
        (True, AMD, torch.bfloat16),
        (False, AMD, torch.float32),
        (True, INTEL | {"amx_bf16": True}, torch.bfloat16),
        (True, INTEL, torch.float32),  # has it, but at half of float32's speed
        (True, AMD | {"avx512_bf16": False}, torch.float32),
        (True, {"architecture": "aarch64", "neon": True}, torch.float32),
    ],
)
def test_pixels_are_encoded_in_bfloat16_where_that_is_faster(atari, tmp_path, monkeypatch, bf16, cpu, dtype):
    dtypes, update = set(), atari.update

    def spy(agent, *rest):
        agent.encoder.register_forward_hook(lambda module, inputs, features: dtypes.add(features.dtype))
        return update(agent, *rest)

    monkeypatch.setattr(atari, "update", spy)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    args = tiny(atari, total_timesteps=32, bf16=bf16, cuda=False, eval_episodes=0, run_dir=str(tmp_path / "run"))
    atari.train(args)
    assert dtypes == {dtype}


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="other CPUs differ")
def test_pytorch_still_names_what_bfloat16_depends_on():
    cpu = torch.cpu.get_capabilities()
    assert {"amx_bf16", "avx512_bf16", "cpu_name"} <= set(cpu)
    assert ("AMD" in cpu["cpu_name"]) == ("AuthenticAMD" in Path("/proc/cpuinfo").read_text())


def encoder_input(agent, obs):
    """What `agent` makes of the pixels."""
    inputs = []
    hook = agent.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0].numpy()))
    with torch.no_grad():
        agent(torch.from_numpy(obs.astype(np.uint8)))
    hook.remove()
    return inputs[0]


def test_pixels_are_normalised_by_what_the_run_saw(atari, tmp_path, monkeypatch):
    """Mean and variance of every pixel over the frames of all iterations, against NumPy."""
    seen, update = [], atari.update

    def spy(agent, optimizer, rollout, *rest):
        steps = range(0, rollout.rewards.shape[0], max(1, rollout.rewards.shape[0] // 8))
        seen.extend(rollout.frames[atari.STACK - 1 + t].numpy().copy() for t in steps)
        return update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(atari, "update", spy)
    args = tiny(atari, num_steps=32, total_timesteps=192, cuda=False, eval_episodes=0, run_dir=str(tmp_path / "run"))
    atari.train(args)
    frames = np.concatenate(seen).astype(np.float64)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    mean, var = state["obs_stats.mean"].numpy(), state["obs_stats.var"].numpy()
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(var, frames.var(0), rtol=1e-3, atol=1e-2)
    assert frames.var(0).max() > 1

    agent = atari.Agent(atari.make_envs(args, 1))
    agent.load_state_dict(state)
    obs = np.stack([frames[: atari.STACK], frames[-atari.STACK :]])
    expected = np.clip((obs - mean) / np.sqrt(np.maximum(var, 1)), -5, 5) / 4
    np.testing.assert_allclose(encoder_input(agent, obs), expected, rtol=1e-3, atol=1e-5)


def test_normalised_pixels_are_clipped_on_both_sides(atari):
    agent = atari.Agent(ScriptedGame(atari.STACK, []))
    agent.obs_stats.mean.fill_(100.0)
    agent.obs_stats.var.fill_(4.0)
    obs = np.array([0, 89, 91, 109, 111, 255])
    seen = encoder_input(agent, np.broadcast_to(obs.reshape(-1, 1, 1, 1), (6, atari.STACK, 84, 84)))
    for pixels, expected in zip(seen, [-5 / 4, -5 / 4, -4.5 / 4, 4.5 / 4, 5 / 4, 5 / 4]):
        np.testing.assert_allclose(pixels, expected, rtol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("channels, size, kernel, stride", [(4, 84, 8, 4), (32, 20, 4, 2), (3, 19, 4, 2)])
def test_strided_convolutions(atari, bf16, channels, size, kernel, stride):
    """Like PyTorch's, values and gradients, moving by 1 along a row; exported they are PyTorch's."""
    torch.manual_seed(1)
    conv, plain = atari.StridedConv2d(channels, 8, kernel, stride), torch.nn.Conv2d(channels, 8, kernel, stride)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(5, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()
    expected = plain(x)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *plain.parameters()], gradient)

    calls, conv2d = [], torch.nn.functional.conv2d
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        patch.setattr(torch.nn.functional, "conv2d", lambda *inputs: calls.append(inputs) or conv2d(*inputs))
        output, exported = conv(x), conv.eval()(x)
    (columns, weight, _, strides), (whole, kernels, *_) = calls
    assert strides == (stride, 1) and whole is x and kernels is conv.weight
    assert output.dtype == exported.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert columns.shape == (5, channels * stride, size, size // stride) and weight.shape[1] == channels * stride
    if size % stride == 0:  # nothing was copied
        assert columns.data_ptr() == x.data_ptr() and columns.is_contiguous(memory_format=torch.channels_last)
    tolerance = 2e-2 if bf16 else 1e-4
    for actual in (output, exported):
        torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
    actuals = torch.autograd.grad(output, [x, *conv.parameters()], gradient.to(output.dtype))
    for actual, wanted in zip(actuals, gradients):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_the_heads_never_compute_in_bfloat16(atari):
    agent, dtypes = atari.Agent(ScriptedGame(atari.STACK, [])), []
    agent.bf16 = True
    for layer in (agent.encoder, agent.policy_head, agent.value_head):
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    agent(torch.zeros(2, atari.STACK, 84, 84, dtype=torch.uint8))
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_without_norm_obs_pixels_are_divided_by_255(atari, tmp_path):
    atari.train(tiny(atari, norm_obs=False, cuda=False, eval_episodes=0, run_dir=str(tmp_path / "run")))
    agent = atari.Agent(atari.make_envs(tiny(atari), 1))
    agent.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"])
    obs = np.random.default_rng(0).integers(0, 256, (2, atari.STACK, 84, 84))
    np.testing.assert_allclose(encoder_input(agent, obs), obs / 255, rtol=1e-5)


@pytest.mark.parametrize("num_envs, sizes", [(64, [16] * 4), (34, [17] * 2), (8, [4] * 2), (7, [7])])
def test_groups_share_out_the_environments(atari, monkeypatch, num_envs, sizes):
    monkeypatch.setattr(atari, "make_envs", lambda args, size: size)
    assert atari.make_groups(tiny(atari, num_envs=num_envs), torch.device("cuda")) == sizes
    assert atari.make_groups(tiny(atari, num_envs=num_envs), CPU) == [num_envs]
    monkeypatch.setattr(atari, "ranks", lambda: (0, num_envs))
    assert atari.make_groups(tiny(atari, num_envs=num_envs), torch.device("cuda")) == [1]


def test_ranks_share_the_cores(atari, monkeypatch):
    monkeypatch.setattr(atari.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(atari.gym, "make_vec", lambda *_, **settings: settings["num_threads"])
    assert atari.make_envs(tiny(atari), 4) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert atari.make_envs(tiny(atari), 4) == 16  # another launcher's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    assert atari.make_envs(tiny(atari), 4) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert atari.make_envs(tiny(atari), 4) == 1


def test_evaluation_counts_one_whole_game_each_unclipped(atari, monkeypatch):
    step, life, over = (1, False, False, False), (0, True, False, False), (7, True, False, True)
    asked = []

    def join(results):
        """Of two vectors of one environment each, as one of two would give it."""
        *arrays, infos = zip(*results)
        number = np.concatenate([info["episode_frame_number"] for info in infos])
        return *map(np.concatenate, arrays), {"episode_frame_number": number}

    def scripted(args, num_envs):
        scripts = [step, life, step, over], [step, over, step, over]
        games = [ScriptedGame(atari.STACK, script) for script in scripts]
        return SimpleNamespace(
            reset=lambda seed: asked.extend(seed) or join([game.reset() for game in games]),
            step=lambda actions: join([game.send(actions) or game.recv() for game in games]),
            close=lambda: None,
        )

    agent = atari.Agent(ScriptedGame(atari.STACK, []))
    monkeypatch.setattr(atari, "make_envs", scripted)
    # over the lost life to the end, with the 7; and nothing of the games after the first
    assert atari.evaluate(agent, tiny(atari), 2, CPU) == [9.0, 8.0]
    assert not set(asked) & set(atari.env_seeds(1, 0, 64))


def test_learning_rate_falls_to_zero(atari, tmp_path, monkeypatch):
    rates, descend = [], atari.ClippedAdam.descend
    monkeypatch.setattr(atari.ClippedAdam, "descend", lambda o, loss: rates.append(float(o.lr)) or descend(o, loss))
    args = tiny(atari, total_timesteps=96, update_epochs=1, eval_episodes=0, cuda=False, run_dir=str(tmp_path / "run"))
    atari.train(args)
    assert rates == pytest.approx([args.learning_rate * share for share in (1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3)])


def test_ids_name_the_protocol(atari):
    assert tiny(atari).stickiness == 0.25
    assert tiny(atari, env_id="PongNoFrameskip-v4").stickiness == 0.0
    assert tiny(atari, repeat_action_probability=0.1).stickiness == 0.1
    envs = atari.make_envs(tiny(atari, env_id="PongNoFrameskip-v4"), 2)
    assert envs.single_observation_space.shape == (atari.STACK, 84, 84)
    assert envs.autoreset_mode == gym.vector.AutoresetMode.SAME_STEP


@pytest.mark.parametrize("env_id, lives, sticky", [("PongNoFrameskip-v4", False, 0.0), ("ALE/Pong-v5", True, 0.25)])
def test_emulators_are_told_the_protocol(atari, monkeypatch, env_id, lives, sticky):
    monkeypatch.setattr(atari.gym, "make_vec", lambda *_, **settings: settings)
    told = atari.make_envs(tiny(atari, env_id=env_id, episodic_life=lives), 2)
    assert told["life_loss_info"] is lives and told["reward_clipping"] is False
    assert told["repeat_action_probability"] == sticky


def test_what_is_not_finite_ends_the_run_with_one_line(atari, tmp_path, monkeypatch, capsys):
    collect = atari.collect

    def poisoned(agent, episodes, rollout, *rest):
        collect(agent, episodes, rollout, *rest)
        rollout.rewards[3] = float("nan")

    monkeypatch.setattr(atari, "collect", poisoned)
    with pytest.raises(SystemExit, match="1"):
        atari.train(tiny(atari, cuda=False, run_dir=str(tmp_path / "run")))
    err = capsys.readouterr().err
    assert err.startswith("error: iteration 1: not finite: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_same_seed_same_parameters(atari, tmp_path):
    def parameters(name, seed):
        args = tiny(atari, num_envs=2, num_steps=16, total_timesteps=96, eval_episodes=0, seed=seed)
        atari.train(dataclasses.replace(args, run_dir=str(tmp_path / name), cuda=False))
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["agent"]

    a, b, c = parameters("a", 1), parameters("b", 1), parameters("c", 2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Brekout-v5", "BrekoutNoFrameskip-v4", "PongNoFrameskip-v0"])
def test_what_is_no_game_of_these_is_refused(atari, tmp_path, capsys, env_id):
    with pytest.raises(SystemExit, match="2"):
        atari.train(tiny(atari, env_id=env_id, run_dir=str(tmp_path / "run")))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and env_id in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_of_sticky_actions_is_one(atari, capsys, probability):
    with pytest.raises(SystemExit, match="2"):
        atari.check(tiny(atari, repeat_action_probability=probability))
    assert "--repeat-action-probability must be from 0 to 1" in capsys.readouterr().err


def test_a_stopped_run_goes_on_evaluates_and_films(atari, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    args = tiny(atari, eval_episodes=1, capture_video=True, final_temperature=0.25, run_dir=str(run_dir))
    with monkeypatch.context() as patch:
        patch.setattr(atari, "catch_signals", lambda: [signal.SIGTERM])  # after the first iteration
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            atari.train(args)
    assert not (run_dir / "result.json").exists() and not (run_dir / "video.mp4").exists()

    games, reset = [], atari.AtariVectorEnv.reset

    def spy(envs, seed):
        games.append(list(seed))
        return reset(envs, seed=seed)

    monkeypatch.setattr(atari.AtariVectorEnv, "reset", spy)
    monkeypatch.setattr(sys, "argv", [atari.__file__, "--resume", str(run_dir)])
    atari.train(atari.parse_args())
    assert not set(games[0]) & set(games[1])  # those of a new run, those of the resumed one
    assert games[-1] == games[-2] not in games[:-2]  # the film is of one game, seen twice
    result = json.loads((run_dir / "result.json").read_text())
    assert 0 <= result["eval_return_mean"] < 20 and result["global_step"] == 64
    temperatures = EventAccumulator(str(run_dir)).Reload().Scalars("charts/temperature")
    assert [e.value for e in temperatures] == pytest.approx([1 / (1 + 3 * 0.5**16), 0.25])
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    agent, plain = (atari.Agent(atari.make_envs(args, 1)) for _ in range(2))
    agent.load_state_dict(state)
    plain.load_state_dict(state | {"temperature": torch.ones(())})
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    logits, values = plain(obs)
    assert logits.std() > 0
    torch.testing.assert_close(agent(obs), (4 * logits, values))
    assert (run_dir / "video.mp4").stat().st_size > 10_000
    with VideoFileClip(str(run_dir / "video.mp4")) as film:
        assert film.size == [480, 630]
        first, last = (film.get_frame(t).astype(int) for t in (0, film.duration - 0.1))
        assert np.abs(last - first).max() > 50  # it moves
    assert (run_dir / Path(atari.__file__).name).read_bytes() == Path(atari.__file__).read_bytes()


def atari_ids():
    gym.register_envs(ale_py)
    return sorted(i for i in gym.registry if i.startswith("ALE/") and i.endswith("-v5"))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", atari_ids())
def test_every_game_runs_two_iterations(atari, tmp_path, env_id):
    args = tiny(atari, env_id=env_id, eval_episodes=0, run_dir=str(tmp_path / "run"))
    atari.train(args)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == 64
