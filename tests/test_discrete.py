"""The trainer for discrete actions: its environments, its updates, its runs."""

import dataclasses
import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, variant_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = ROOT / "ppo_clip_discrete.py"
CPU = torch.device("cpu")
BOX2D = pytest.mark.skipif(not importlib.util.find_spec("Box2D"), reason="no Box2D, which lacks some wheels")


class Scripted(gym.Env):
    """Every episode lasts 3 steps of reward 1; step k of episode e observes e + k / 10."""

    observation_space = gym.spaces.Box(-1, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episode = -1

    def __init__(self, ending, reward=1.0, render_mode=None):
        self.ending, self.reward = ending, reward

    def observe(self):
        return np.array([self.episode + self.k / 10], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.k = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.k += 1
        over = self.k == 3
        return (
            self.observe(),
            self.reward,
            over and self.ending != "truncated",
            over and self.ending != "terminated",
            {},
        )


for ending in ("truncated", "terminated", "both"):
    gym.register(f"Scripted-{ending}-v0", Scripted, kwargs={"ending": ending})
gym.register("ScriptedInfinite-v0", Scripted, kwargs={"ending": "truncated", "reward": math.inf})


@pytest.fixture(scope="module")
def script(request):
    return variant_of(request.config, SCRIPT)


def tiny(script, **changes):
    defaults = {"num_envs": 8, "num_steps": 16, "total_timesteps": 1024, "eval_episodes": 0, "cuda": False}
    return script.Args(**(defaults | changes))


def start(script, args):
    torch.manual_seed(args.seed)
    envs = script.make_envs(args, args.num_envs)
    agent = script.Agent(envs)
    optimizer = script.ClippedAdam(agent, args)
    episodes = script.Episodes(envs, script.env_seeds(args.seed, 0, args.num_envs))
    return agent, optimizer, episodes, script.Rollout(args, envs, CPU)


def gae(script, rollout, args):
    names = ("rewards", "values", "final_values", "terminated", "truncated")
    return script.compute_gae(*(getattr(rollout, name) for name in names), args.gamma, args.gae_lambda)


def iterate(script, state, ent_coef, args):
    agent, optimizer, episodes, rollout = state
    script.collect(agent, episodes, rollout, args)
    metrics, ent_coef = script.update(agent, optimizer, rollout, *gae(script, rollout, args), ent_coef, args)
    agent.obs_stats.update(rollout.obs[:-1].flatten(0, 1).flatten(1))
    return metrics, ent_coef


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def assert_equal(one, other):
    """Bit for bit, through dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_equal(a, b)
    else:
        assert one == other


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


class Drifting(gym.Env):
    """A random walk of random length, seen as float64 where its space says float32; the actions are 1 and 2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(2, start=1)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, luck="np_random", render_mode=None):
        self.luck, self.render_mode = luck, render_mode

    def reset(self, *, seed=None, options=None):
        if self.luck == "its own" and seed is not None:
            self.own = np.random.default_rng(seed)
        self.random = self.own if self.luck == "its own" else self.np_random
        self.x, self.left = self.random.normal(size=2), int(self.random.integers(3, 30))
        return self.x, {}

    def step(self, action):
        assert action in (1, 2) and self.left > 0
        self.x = self.x + action + self.random.normal(size=2)
        self.left -= 1
        return self.x, 1.0, self.left == 0, False, {}

    def render(self):
        return np.full((16, 16, 3), 100, np.uint8)


gym.register("Drifting-v0", Drifting)
gym.register("DriftingAlone-v0", Drifting, kwargs={"luck": "its own"})


# What a rollout holds


@pytest.mark.parametrize("ending", ["truncated", "terminated", "both"])
def test_rollout_of_a_scripted_environment(script, ending):
    args = tiny(script, env_id=f"Scripted-{ending}-v0", num_envs=1, num_steps=8, norm_reward=False, gamma=0.9)
    args = dataclasses.replace(args, gae_lambda=0.5)
    agent, _, episodes, rollout = start(script, args)
    script.collect(agent, episodes, rollout, args)

    obs = torch.tensor(
        [0.0, 0.1, 0.2, 1.0, 1.1, 1.2, 2.0, 2.1, 2.2]
    )  # a reset within the step: no row without an action
    torch.testing.assert_close(rollout.obs.flatten(), obs)
    torch.testing.assert_close(episodes.obs.flatten(), np.array([2.2], np.float32))
    over = [False, False, True, False, False, True, False, False]
    assert rollout.terminated.flatten().tolist() == [o and ending != "truncated" for o in over]
    assert rollout.truncated.flatten().tolist() == [o and ending != "terminated" for o in over]
    assert episodes.ended == [(3.0, 3), (3.0, 3)]
    torch.testing.assert_close(rollout.rewards.flatten(), torch.ones(8))

    def value(x):
        return agent(torch.tensor([[x]]))[1].item()

    V = [value(float(x)) for x in obs]
    assert rollout.values.flatten().tolist() == pytest.approx(V, abs=1e-6)
    ends = [0.0, 0.0]  # a termination is worth nothing more
    if ending == "truncated":
        ends = [value(0.3), value(1.3)]  # of the observations that ended the episodes, not of 1.0 and 2.0
        assert rollout.final_values[[2, 5], 0].tolist() == pytest.approx(ends, abs=1e-6)
    d = [1 + 0.9 * after - before for before, after in zip(V, [*V[1:3], ends[0], *V[4:6], ends[1], *V[7:]])]
    expected = [
        d[0] + 0.45 * d[1] + 0.45**2 * d[2],
        d[1] + 0.45 * d[2],
        d[2],
        d[3] + 0.45 * d[4] + 0.45**2 * d[5],
        d[4] + 0.45 * d[5],
        d[5],
        d[6] + 0.45 * d[7],
        d[7],
    ]
    advantages, returns = gae(script, rollout, args)
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert returns.flatten().tolist() == pytest.approx([a + v for a, v in zip(expected, V)], abs=1e-5)


class Careless(gym.Env):
    """One array for all observations, a space that cannot be sampled, unbatchable infos, three copies at most."""

    observation_space = gym.spaces.Box(np.finfo(np.float64).min, np.finfo(np.float64).max, (2,), np.float64)
    action_space = gym.spaces.Discrete(2)
    made = 0

    def __init__(self, render_mode=None):
        self.number = Careless.made = Careless.made + 1
        if self.number > 3:
            raise OSError("no port is free")
        self.obs = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        self.obs[:] = 0
        return self.obs, {"winner": None}

    def step(self, action):
        self.obs += 1
        return self.obs, 1.0, False, self.obs[0] == 5, {"winner": 1, "path": np.zeros(self.number)}


gym.register("Careless-v0", Careless)


def test_careless_environments(script, capsys):
    args = tiny(script, env_id="Careless-v0", num_envs=2)
    envs = script.make_envs(args, 2)  # a first one, which is closed again, and these two
    envs.reset(seed=[1, 2])
    for _ in range(5):
        obs, _, _, cut, info = envs.step(np.array([0, 1]))
    assert cut.all() and not obs.any()
    assert np.stack(info["final_obs"]).tolist() == [[5, 5], [5, 5]]
    assert script.Rollout(args, envs, torch.device("cpu")).obs.shape == (args.num_steps + 1, 2, 2)
    with pytest.raises(SystemExit, match="1"):
        Careless.made = 1
        script.make_envs(args, 4)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "no port is free" in err


def test_environment_that_cannot_render(script):
    gym.register("ScriptedPlain-v0", lambda: Scripted("terminated"))
    script.make_envs(tiny(script, env_id="ScriptedPlain-v0"), 2).close()


def test_each_truncated_environment_gets_its_own_final_value(script):
    args = tiny(script, env_id="Scripted-truncated-v0", num_envs=2, num_steps=8, norm_reward=False)
    agent, _, episodes, rollout = start(script, args)
    episodes.envs.envs[1].unwrapped.episode = 10
    script.collect(agent, episodes, rollout, args)
    with torch.no_grad():
        expected = agent(torch.tensor([[0.3], [10.3], [1.3], [11.3]]))[1].view(2, 2)
    torch.testing.assert_close(rollout.final_values[[2, 5]], expected)


def test_episodes_go_on_over_rollouts(script):
    args = tiny(script, env_id="Scripted-truncated-v0", num_envs=2, num_steps=2)
    agent, _, episodes, rollout = start(script, args)
    for _ in range(3):
        script.collect(agent, episodes, rollout, args)
    assert episodes.take_ended() == [(3.0, 3)] * 4  # 6 steps in each of 2 environments
    assert episodes.take_ended() == []


def test_observation_statistics_are_those_of_all_rows(script):
    rows = 3 * torch.randn(300, 5) + torch.arange(5)
    stats = script.RunningStats((5,))
    for part in rows.split([1, 99, 200]):
        stats.update(part)
    torch.testing.assert_close(stats.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.var, rows.var(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1"])
def test_ratio_is_one_in_the_first_minibatch(script, tmp_path, monkeypatch, env_id):
    """Over a whole run's iterations: whatever moves between collection and update shows here."""
    first, loss = [], script.ppo_clip_loss
    update = script.update

    def spy_update(*inputs):
        first.append(None)
        return update(*inputs)

    @torch.no_grad()
    def note(logits, values, actions, old_log_probs, old_values):
        taken = (logits.log_softmax(-1) - old_log_probs).gather(1, actions[:, None])
        first[-1] = float(taken.exp().sub(1).abs().max()), float((values - old_values).abs().max())

    def spy_loss(logits, values, actions, old_log_probs, old_values, *rest):
        if first[-1] is None:
            note(logits, values, actions, old_log_probs, old_values)
        return loss(logits, values, actions, old_log_probs, old_values, *rest)

    monkeypatch.setattr(script, "update", spy_update)
    monkeypatch.setattr(script, "ppo_clip_loss", spy_loss)
    script.train(tiny(script, env_id=env_id, run_dir=str(tmp_path / "run"), total_timesteps=512))
    assert len(first) == 4
    assert np.max(first) < 1e-5


# Updates


def test_trust_region_holds(script):
    """50 updates with a step far too long: the whole batch's KL, computed anew, never oversteps the target."""
    target = 0.01
    sizes = {"num_envs": 16, "num_steps": 16, "update_epochs": 3}
    args = tiny(script, learning_rate=0.05, clip_coef=0.2, target_kl=target, **sizes)
    state = start(script, args)
    agent, _, _, rollout = state
    fractions = []
    for _ in range(50):
        metrics, _ = iterate_without_statistics(script, state, args)
        with torch.no_grad():
            old, new = rollout.log_probs, agent(rollout.obs.flatten(0, 1))[0].log_softmax(-1)
        kl = float((old.exp() * (old - new.view_as(old)))[:-1].sum(-1).mean())
        assert kl <= target * (1 + 1e-3)
        assert metrics["kl_after_update"] == pytest.approx(kl, abs=1e-5)
        assert metrics["kl_after_update"] <= target
        fractions.append(metrics["step_fraction"])
    assert min(fractions) < 1 and max(fractions) > 0  # the bound was at work, and did not stop all learning


def test_a_trust_region_that_is_never_left_changes_nothing(script):
    def weights(target_kl):
        args = tiny(script, target_kl=target_kl)
        state = start(script, args)
        for _ in range(3):
            iterate(script, state, 0.0, args)
        return state[1].weights

    assert torch.equal(weights(None), weights(1e6))


def iterate_without_statistics(script, state, args):
    agent, optimizer, episodes, rollout = state
    script.collect(agent, episodes, rollout, args)
    return script.update(agent, optimizer, rollout, *gae(script, rollout, args), args.ent_coef, args)


@pytest.mark.parametrize("learning_rate, target_kl", [(0.02, 0.01), (0.1, 1e-4)])
def test_a_step_out_of_the_trust_region_is_the_updates_last(script, monkeypatch, learning_rate, target_kl):
    """Each epoch's step goes from its own start; the largest halving within the region stays, and ends the update."""
    args = tiny(script, learning_rate=learning_rate, target_kl=target_kl, update_epochs=5)
    state, backtrack, calls = start(script, args), script.backtrack, []

    def kl(agent, rollout):
        old, new = rollout.log_probs[:-1].flatten(0, 1), agent(rollout.obs[:-1].flatten(0, 1))[0].log_softmax(-1)
        return float(script.categorical_kl(old, new).mean())

    @torch.no_grad()
    def spy(agent, weights, before, rollout, args):
        after = weights.clone()
        result = backtrack(agent, weights, before, rollout, args)
        kept, fraction = weights.clone(), result["step_fraction"]
        assert torch.equal(kept, before.lerp(after, fraction))
        if fraction < 1:  # twice that, or the tenth halving where nothing is kept, was too far
            weights.copy_(before.lerp(after, 2 * fraction or 0.5**10))
            assert kl(agent, rollout) > args.target_kl
            weights.copy_(kept)
        calls.append((before, kept, fraction))
        return result

    monkeypatch.setattr(script, "backtrack", spy)
    epochs, smallest = set(), 1.0
    for _ in range(20):
        calls.clear()
        first = state[1].weights.clone()
        iterate_without_statistics(script, state, args)
        befores, kept, fractions = zip(*calls)
        assert all(torch.equal(*pair) for pair in zip(befores, [first, *kept]))
        assert set(fractions[:-1]) <= {1.0} and (fractions[-1] < 1 or len(calls) == 5)
        epochs.add(len(calls))
        smallest = min(smallest, fractions[-1])
    assert len(epochs) > 1 if target_kl == 0.01 else smallest < 1 / 16


def test_a_step_that_ten_halvings_leave_outside_the_trust_region_is_not_made(script):
    args = tiny(script, learning_rate=1.0, target_kl=1e-12)
    state = start(script, args)
    before = state[1].weights.clone()
    metrics, _ = iterate_without_statistics(script, state, args)
    assert metrics["step_fraction"] == 0.0 and torch.equal(state[1].weights, before)
    assert metrics["kl_after_update"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("target", [0.5, 0.6, None])
def test_entropy_is_held_near_its_target(script, tmp_path, monkeypatch, target):
    """In a whole run, whose temperature stays 1. Without the bonus the entropy ends below 0.25 nats."""
    entropies, update = [], script.update

    def spy(*inputs):
        metrics, ent_coef = update(*inputs)
        entropies.append(metrics["entropy"])
        low, high = script.ENT_COEF_BOUNDS
        assert low <= ent_coef <= high if target else ent_coef == 0.0
        return metrics, ent_coef

    monkeypatch.setattr(script, "update", spy)
    sizes = {"num_envs": 32, "num_steps": 32, "total_timesteps": 80 * 1024}
    script.train(tiny(script, target_entropy=target, run_dir=str(tmp_path / "run"), **sizes))
    late = np.array(entropies[-30:])
    if target is None:
        assert late[-1] < 0.25
    else:
        assert np.mean(np.abs(late / target - 1) < 0.2) > 0.8, late
    assert checkpoint(tmp_path / "run")["agent"]["temperature"] == (1 if target else 0.25)


@pytest.mark.parametrize(
    "entropies, ahead",  # of the minibatches, two an epoch -> the entropy ten iterations ahead
    [
        ([0.70, 0.66, 0.65, 0.65, 0.66, 0.60], 0.46 / 3),
        ([0.2, 0.2, 0.2, 0.2, 0.22, 0.22], 1.22 / 3),
        ([0.6] * 5 + [0.1], 0),
    ],
)
def test_entropy_weight_by_hand(script, entropies, ahead):
    args = tiny(script, target_entropy=0.5, update_epochs=3, num_minibatches=2)
    agent, optimizer, _, rollout = start(script, args)
    left = iter(entropies)
    _, ent_coef = script.update(
        *(agent, optimizer, rollout, *torch.randn(2, args.num_steps, args.num_envs), 0.02, args),
        learn=lambda *_: {"loss": torch.zeros(()), "entropy": torch.tensor(next(left))},
    )
    assert ent_coef == pytest.approx(0.02 * math.exp(2 * (1 - ahead / 0.5)), rel=1e-5)


def test_explained_variance_by_hand(script):
    """1 - Var(V^targ - V_old) / Var(V^targ), of the values that were played with."""
    args = tiny(script)
    agent, optimizer, _, rollout = start(script, args)
    values = rollout.values.copy_(1 + 0.3 * torch.randn(rollout.values.shape))[:-1].clone()
    returns = 2 * values + 0.1 * torch.randn(values.shape)
    losses, _ = script.update(agent, optimizer, rollout, returns - values, returns, 0.0, args)
    expected = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
    assert 0.5 < expected < 0.9 and losses["explained_variance"] == pytest.approx(expected, abs=1e-4)


def test_a_tiny_target_entropy_overflows_nothing(script, monkeypatch):
    monkeypatch.setattr(script, "ENT_COEF_LEAD", 1e6)  # as if the entropy fell that fast
    args = tiny(script, target_entropy=1e-3, learning_rate=0.05)
    state, ent_coef = start(script, args), 0.01
    for _ in range(4):
        _, ent_coef = iterate(script, state, ent_coef, args)
        assert script.ENT_COEF_BOUNDS[0] <= ent_coef <= script.ENT_COEF_BOUNDS[1]


def test_observations_are_normalised_by_what_the_run_saw(script, tmp_path, monkeypatch):
    seen, update = [], script.update

    def spy(agent, optimizer, rollout, *rest):
        seen.append(rollout.obs[:-1].flatten(0, 1).clone())
        return update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(script, "update", spy)
    args = tiny(script, total_timesteps=256, run_dir=str(tmp_path / "run"))
    script.train(args)
    rows, state = torch.cat(seen), checkpoint(tmp_path / "run")["agent"]
    mean, var = rows.mean(0), rows.var(0, correction=0)
    torch.testing.assert_close(state["obs_stats.mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["obs_stats.var"], var, rtol=1e-4, atol=1e-5)
    agent, plain = start(script, args)[0], start(script, args)[0]
    agent.load_state_dict(state)
    plain.load_state_dict(state | {"obs_stats.mean": torch.zeros_like(mean), "obs_stats.var": torch.ones_like(var)})
    normalised = ((rows - mean) / var.sqrt()).clamp(-10, 10)
    for output, expected in zip(agent(rows), plain(normalised)):  # logits, values
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)

    script.train(dataclasses.replace(args, norm_obs=False, run_dir=str(tmp_path / "raw")))
    state = checkpoint(tmp_path / "raw")["agent"]
    assert not state["obs_stats.mean"].any() and (state["obs_stats.var"] == 1).all()


class Rare(gym.Env):
    """Episodes of 4 steps; one in fifty pays 1, and only at its end."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.k, self.pays = 0, self.np_random.random() < 0.02
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.k += 1
        return np.zeros(1, np.float32), float(self.k == 4 and self.pays), self.k == 4, False, {}


gym.register("Rare-v0", Rare)
gym.register("RarelyFined-v0", lambda: gym.wrappers.TransformReward(Rare(), lambda reward: -reward))


@pytest.mark.parametrize(
    "env_id, num_envs",
    [
        pytest.param("LunarLander-v3", 4, marks=BOX2D),
        ("Scripted-truncated-v0", 4),
        ("Rare-v0", 64),
        ("RarelyFined-v0", 64),
    ],
)
def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return(script, monkeypatch, env_id, num_envs):
    args = tiny(script, env_id=env_id, num_envs=num_envs, num_steps=100, gamma=0.9)
    agent, _, episodes, rollout = start(script, args)
    raw, over, step = [], [], script.step

    def spy(envs, actions):
        result = step(envs, actions)
        raw.append(result[1].copy())
        over.append(result[2] | result[3])
        return result

    monkeypatch.setattr(script, "step", spy)
    for _ in range(2):
        script.collect(agent, episodes, rollout, args)
    returns, sums = [], np.zeros(num_envs)
    for reward, ended in zip(raw, over):
        sums = 0.9 * sums + reward
        returns.append(sums)
        sums = sums * ~ended
    expected = np.array(raw[-100:]) / np.std(returns)  # over both rollouts
    assert np.any(over) and np.any(np.abs(expected) > 10) == env_id.startswith("Rare")
    np.testing.assert_allclose(rollout.rewards.numpy(), expected.clip(-10, 10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["advantages", "returns"])
def test_nothing_is_learned_from_what_is_not_finite(script, where):
    args = tiny(script)
    agent, optimizer, episodes, rollout = start(script, args)
    script.collect(agent, episodes, rollout, args)
    advantages, returns = gae(script, rollout, args)
    {"advantages": advantages, "returns": returns}[where].fill_(math.nan if where == "advantages" else math.inf)
    before = [p.detach().clone() for p in agent.parameters()]
    metrics, _ = script.update(agent, optimizer, rollout, advantages, returns, 0.0, args)
    assert metrics["finite"] == 0
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), before))


@pytest.mark.parametrize(
    "what, changed",
    [("loss", {"env_id": "ScriptedInfinite-v0"}), ("grad_norm", {"vf_coef": 1e25})],  # there the loss is finite
)
def test_what_is_not_finite_ends_the_run_with_one_line(script, tmp_path, capsys, what, changed):
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script, run_dir=str(tmp_path / "run"), **changed))
    assert stop.value.code == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(err) == 1 and f"not finite: {what}" in err[0]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_graph_refuses_a_changed_number(script):
    """It would go on with the first one; CUDA is not needed to see that."""
    graph = script.Graph.__new__(script.Graph)
    graph.calls, graph.inputs = 1, [0.1]
    with pytest.raises(RuntimeError, match="a CUDA graph does not see"):
        graph(0.2)


def test_a_network_may_hold_an_infinite_constant(script, tmp_path, monkeypatch):
    """As a mask of attention or of actions is."""

    class Masked(script.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            self.register_buffer("mask", torch.tensor(-math.inf))

    monkeypatch.setattr(script, "Agent", Masked)
    script.train(tiny(script, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# Runs


def test_same_seed_same_parameters(script, tmp_path):
    def parameters(name, **changes):
        script.train(tiny(script, run_dir=str(tmp_path / name), total_timesteps=384, **changes))
        return checkpoint(tmp_path / name)["agent"]

    one = parameters("one")
    assert_equal(one, parameters("again"))
    other = parameters("other", seed=2)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


def test_zero_learning_rate_learns_nothing(script, tmp_path):
    args = tiny(script, run_dir=str(tmp_path / "run"), learning_rate=0.0)
    script.train(args)
    agent = start(script, args)[0]
    trained = checkpoint(tmp_path / "run")["agent"]
    for name, parameter in agent.named_parameters():
        assert torch.equal(parameter.detach(), trained[name]), name


def test_learning_rate_falls_to_zero(script, tmp_path, monkeypatch):
    rates, descend = [], script.ClippedAdam.descend
    monkeypatch.setattr(script.ClippedAdam, "descend", lambda o, loss: rates.append(float(o.lr)) or descend(o, loss))
    for name, anneal_lr, shares in (("falls", True, (1, 0.75, 0.5, 0.25)), ("stays", False, (1, 1, 1, 1))):
        args = tiny(script, run_dir=str(tmp_path / name), total_timesteps=512, update_epochs=1, anneal_lr=anneal_lr)
        rates.clear()
        script.train(args)
        assert rates[:: args.num_minibatches] == pytest.approx([share * args.learning_rate for share in shares])
        charts = EventAccumulator(str(tmp_path / name)).Reload().Scalars("charts/learning_rate")
        assert [e.value for e in charts] == pytest.approx(rates[:: args.num_minibatches])


def test_evaluation_counts_one_whole_game_each_on_seeds_of_its_own(script):
    args = tiny(script, env_id="Drifting-v0")
    agent = start(script, args)[0]
    seeds = script.env_seeds(args.seed, 1, 4)
    assert not set(seeds) & set(script.env_seeds(args.seed, 0, 64))
    lengths = []
    for seed in seeds:
        env = gym.make("Drifting-v0").unwrapped
        env.np_random, _ = gym.utils.seeding.np_random(int(seed))
        env.reset()
        lengths.append(env.left)
    assert len(set(lengths)) > 1
    assert script.evaluate(agent, args, 4, CPU) == lengths  # a reward of 1 a step, none after the game's end


@pytest.mark.parametrize("ending", ["truncated", "terminated"])
def test_an_evaluation_ends_with_its_games(script, monkeypatch, ending):
    steps, step = [], script.step
    monkeypatch.setattr(script, "step", lambda *inputs: steps.append(1) or (step(*inputs) if len(steps) < 9 else 1 / 0))
    args = tiny(script, env_id=f"Scripted-{ending}-v0")
    assert script.evaluate(start(script, args)[0], args, 2, CPU) == [3.0, 3.0]


def test_temperature_of_the_policy(script, tmp_path):
    args = tiny(script, run_dir=str(tmp_path / "run"), final_temperature=0.25, total_timesteps=512)  # 4 iterations
    script.train(args)
    charts = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("charts/temperature")
    assert [e.value for e in charts] == pytest.approx([1 / (1 + 3 * (k / 4) ** 16) for k in (1, 2, 3, 4)])
    agent = start(script, args)[0]
    obs = torch.randn(5, 4)
    logits, values = agent(obs)
    assert agent.temperature == 1 and logits.std() > 0
    agent.temperature.fill_(0.25)
    torch.testing.assert_close(agent(obs), (4 * logits, values))
    agent.load_state_dict(checkpoint(tmp_path / "run")["agent"])
    assert agent.temperature == 0.25


class Lost(gym.Env):
    """Its third state is outside its space; draws with a generator of another kind; cannot be closed."""

    observation_space = gym.spaces.Discrete(3, start=-1)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, lost=True, old=False):
        self.lost, self.old = lost, old

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            generator = np.random.Generator(np.random.MT19937(seed))
            self.np_random = np.random.RandomState(seed) if self.old else generator
        self.state = -1
        return self.state, {}

    def step(self, action):
        self.state += 1
        return self.state, self.np_random.random(), not self.lost and self.state == 1, False, {}

    def close(self):
        raise OSError("the port is closed already")


gym.register("Lost-v0", Lost)
gym.register("Found-v0", lambda: Lost(lost=False))
gym.register("FoundLongAgo-v0", lambda: Lost(lost=False, old=True))


class Levels(gym.Env):
    """Every episode lasts 3 steps and looks the same, but each pays more than the one before."""

    observation_space = gym.spaces.Box(0, 3, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    level = 0

    def reset(self, *, seed=None, options=None):
        self.level, self.k = self.level + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.k += 1
        return np.full(1, self.k, np.float32), float(self.level), self.k == 3, False, {}


gym.register("Levels-v0", Levels)


@pytest.mark.parametrize("num_steps, odd_one, exact", [(2, None, True), (2, 3, False), (4, None, False)])
def test_a_state_that_outlasts_its_episode_is_noticed_on_resume(script, capsys, num_steps, odd_one, exact):
    """Of one environment within the first episode; of all in the second, which is replayed as if it were the first."""
    args = tiny(script, env_id="Levels-v0", num_steps=num_steps)
    agent, _, episodes, rollout = start(script, args)
    script.collect(agent, episodes, rollout, args)
    _, _, resumed, _ = start(script, args)
    for n, env in enumerate(resumed.envs.envs):
        env.unwrapped.level = 5 * (n == odd_one)
    resumed.load_state_dict(episodes.state_dict())
    assert ("episodes restart" in capsys.readouterr().err) != exact
    if exact:
        assert np.array_equal(resumed.obs, episodes.obs) and np.array_equal(resumed.lengths, episodes.lengths)
        assert resumed.lengths.any()
    else:  # all begin anew
        assert not any(x.any() for x in (resumed.obs, resumed.returns, resumed.lengths, resumed.discounted))


def test_other_ranks_after_a_resume_draw_anew(script, tmp_path, monkeypatch):
    """Where the random states cannot be taken over, the first start's numbers do not come again."""
    states, collect, run_dir = [], script.collect, tmp_path / "run"
    monkeypatch.setattr(script, "collect", lambda *inputs: states.append(torch.get_rng_state()) or collect(*inputs))
    script.train(tiny(script, total_timesteps=128, run_dir=str(run_dir)))
    state = checkpoint(run_dir)
    script.save_checkpoint(run_dir, state | {"random": state["random"] * 2})  # as two ranks save it
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir), "--total-timesteps", "256"])
    script.train(script.parse_args())
    assert len(states) == 2 and not torch.equal(*states)


def test_an_inexact_mean_of_ones_is_no_error(script, tmp_path, monkeypatch):
    """NCCL averages over ranks by multiplying with 1 / ranks first: of twelve ones that is less than 1."""

    def nccl_mean(x):
        return sum([x * float(np.float32(1 / 12))] * 12)

    assert nccl_mean(torch.ones(1)) < 1
    monkeypatch.setattr(script, "all_mean", nccl_mean)
    script.train(tiny(script, total_timesteps=128, run_dir=str(tmp_path / "run")))
    assert checkpoint(tmp_path / "run")["iteration"] == 1


class Counted(gym.Env):
    """Numbers of few bits, actions that have to be of their space, and no end of rewards from the second episode on."""

    episode = 0

    def __init__(self, dtype, first):
        self.observation_space = gym.spaces.Discrete(28, start=100, dtype=np.int8)
        self.action_space = gym.spaces.Discrete(3, start=first, dtype=dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.left = self.episode + 1, int(self.np_random.integers(1, 9))
        return np.int8(127), {}

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        self.left -= 1
        return np.int8(100), 1.0 if self.episode == 1 else math.inf, not self.left, False, {}


for dtype in (np.int64, np.int32, np.uint8):
    gym.register(f"Counted-{dtype.__name__}-v0", Counted, kwargs={"dtype": dtype, "first": 100 * (dtype == np.uint8)})


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_numbers_of_few_bits(script, dtype):
    args = tiny(script, env_id=f"Counted-{dtype}-v0", num_envs=6)
    scores = script.evaluate(start(script, args)[0], args, 6, CPU)
    assert len(set(scores)) > 1 and all(1 <= score < 9 for score in scores)  # infinite only after the counted episode


class Wide(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(9, dtype=np.uint64), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.uint64(3), {}

    def step(self, action):
        return np.uint64(4 + action), 1.0, False, False, {}


gym.register("Wide-v0", Wide)


def test_unsigned_numbers_of_many_bits_are_saved(script, capsys):
    args = tiny(script, env_id="Wide-v0")
    agent, _, episodes, rollout = start(script, args)
    script.collect(agent, episodes, rollout, args)
    obs = episodes.obs.copy()
    episodes.load_state_dict(episodes.state_dict())
    np.testing.assert_array_equal(episodes.obs, obs)
    assert obs.dtype == np.uint64 and obs.min() >= 4 and capsys.readouterr().err == ""


def test_an_observation_outside_its_space(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        script.train(tiny(script, env_id="Lost-v0", run_dir=str(tmp_path / "run")))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "observation 2 is outside Discrete(3" in err


@pytest.mark.parametrize(
    "env_id, num_steps, exact", [("Found-v0", 3, True), ("Found-v0", 1, False), ("FoundLongAgo-v0", 3, False)]
)
def test_another_generator_and_an_environment_that_cannot_be_closed(
    script, tmp_path, monkeypatch, capsys, env_id, num_steps, exact
):
    """The first episode begins before the environment has its own generator: it is not played again.

    Nor is one of NumPy's old RandomState, which has no state to set.
    """
    sizes = {"num_steps": num_steps, "total_timesteps": 8 * num_steps, "eval_episodes": 2}
    script.train(tiny(script, env_id=env_id, run_dir=str(tmp_path / "run"), **sizes))
    assert (tmp_path / "run" / "result.json").exists()
    state = checkpoint(tmp_path / "run")["episodes"][0]["environment"]
    assert ((json.loads(state["start"]) or {}).get("bit_generator") == "MT19937") == exact
    more = ["--resume", str(tmp_path / "run"), "--total-timesteps", str(16 * num_steps)]
    monkeypatch.setattr(sys, "argv", [script.__file__, *more])
    capsys.readouterr()
    script.train(script.parse_args())
    assert ("episodes restart" in capsys.readouterr().err) != exact
    assert checkpoint(tmp_path / "run")["global_step"] == 16 * num_steps


def test_an_action_costs_a_byte_and_is_replayed_as_it_was(script):
    """MountainCar subtracts 1 from it, which in bytes would make 0 to 255."""
    env, again = (script.Replayable(gym.make("MountainCar-v0").unwrapped) for _ in range(2))
    env.reset(seed=1)
    for action in np.array([0, 0, 2, 1, 0]):
        obs = env.step(action)[0]  # each for a reward of -1
    state = env.state_dict()
    assert state["actions"].dtype == torch.uint8
    again.reset(seed=2)
    assert again.load_state_dict(state, obs, -5.0)
    assert_equal(again.state_dict(), state)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_only_normalised_observations_are_clipped(script, tmp_path, norm_obs, side):
    script.train(tiny(script, norm_obs=norm_obs, run_dir=str(tmp_path / "run")))
    agent = script.Agent(script.make_envs(tiny(script), 1))
    agent.load_state_dict(checkpoint(tmp_path / "run")["agent"])
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter *= 1e-3  # so that the outputs are nearly linear in the input, however large
        mean, deviation = agent.obs_stats.mean, agent.obs_stats.var.sqrt()
        below, above, far = (agent((mean + side * x * deviation)[None]) for x in (9.9, 10.1, 1e4))
    for outputs in zip(below, above, far):  # logits, values
        assert not torch.equal(*outputs[:2]) and torch.equal(*outputs[1:]) == norm_obs


def test_an_observation_that_hardly_moves_is_normalised_too(script):
    agent = script.Agent(script.make_envs(tiny(script), 1))
    with torch.no_grad():
        expected = agent(torch.ones(1, 4))
        agent.obs_stats.var.fill_(1e-6)
        torch.testing.assert_close(agent(torch.full((1, 4), 1e-3)), expected)


def test_more_entropy_than_there_is_cannot_be_asked_for(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.train(tiny(script, target_entropy=0.7, run_dir=str(tmp_path / "run")))
    assert "--target-entropy must be below 0.693" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_film_of_one_canvas(script, tmp_path, monkeypatch):
    """An environment may draw all its pictures into one array."""
    canvas = np.zeros((16, 16, 3), np.uint8)

    def render(self):
        canvas[:] = np.minimum(canvas + 20.0, 250)
        return canvas

    monkeypatch.setattr(Drifting, "render", render)
    seen = []
    monkeypatch.setattr(
        "moviepy.ImageSequenceClip", lambda frames, fps: seen.extend(f.mean() for f in frames) or Film()
    )
    args = tiny(script, env_id="Drifting-v0")
    script.record_video(script.Agent(script.make_envs(args, 1)), args, tmp_path / "video.mp4", CPU)
    assert len(seen) > 2 and len(set(seen[:3])) == 3


class Film:
    def write_videofile(self, path, logger):
        pass


def test_a_film_of_actions_that_begin_at_one(script, tmp_path):
    args = tiny(script, env_id="Drifting-v0", total_timesteps=256, eval_episodes=2, capture_video=True)
    script.train(dataclasses.replace(args, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "video.mp4").stat().st_size > 500


@pytest.mark.parametrize("picture", [None, np.zeros((16, 16), np.uint8)], ids=["none", "grey"])
def test_a_film_that_cannot_be_made_ends_the_run_before_it_trains(script, tmp_path, monkeypatch, capsys, picture):
    monkeypatch.setattr(Drifting, "render", lambda self: picture)
    args = tiny(script, env_id="Drifting-v0", capture_video=True, run_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="2"):
        script.train(args)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "render() gives no picture" in err
    assert not (tmp_path / "run").exists()


def test_observations_of_a_discrete_space_count_from_its_start(script):
    def outputs(first):
        torch.manual_seed(0)
        space = gym.spaces.Discrete(3, start=first)
        agent = script.Agent(
            SimpleNamespace(single_observation_space=space, single_action_space=gym.spaces.Discrete(2))
        )
        return torch.cat([x.view(3, -1) for x in agent(torch.arange(first, first + 3))], 1)

    assert torch.equal(outputs(0), outputs(5)) and len(outputs(5).unique(dim=0)) == 3


def test_a_run_folder_is_taken_once(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    mine = tmp_path / "own" / Path(script.__file__).name
    mine.write_text("# not the trainer\n")
    script.open_run(tiny(script, run_dir=str(tmp_path / "run")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(b"of another program")
    for taken in ("run", "own", "other"):
        with pytest.raises(SystemExit, match="2"):
            script.open_run(tiny(script, run_dir=str(tmp_path / taken)))
        assert "is taken" in capsys.readouterr().err
    assert mine.read_text() == "# not the trainer\n"
    monkeypatch.setattr(script, "__file__", str(tmp_path / "here" / mine.name))
    (tmp_path / "here").mkdir()
    Path(script.__file__).write_bytes(script.SOURCE)
    with pytest.raises(SystemExit, match="2"):  # where this very script lies
        script.open_run(tiny(script, run_dir=str(tmp_path / "here")))
    assert "is taken" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        script.open_run(tiny(script, run_dir=str(tmp_path / ("x" * 300))))
    assert "File name too long" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        script.open_run(tiny(script, run_dir=str(tmp_path / "file")))
    assert "cannot be written: File exists" in capsys.readouterr().err


def test_runs_that_start_together_get_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {script.open_run(tiny(script)) for _ in range(20)}
    assert len(folders) == 20


def test_run_folder(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", [script.__file__, "--run-dir", str(tmp_path / "a" / "run"), "--eval-episodes", "2"]
    )
    sys.argv += ["--total-timesteps", "10240", "--no-cuda"]
    script.train(script.parse_args())
    run_dir = tmp_path / "a" / "run"
    record = json.loads((run_dir / "args.json").read_text())
    assert script.Args(**record["args"]) == script.Args(
        run_dir=str(run_dir), eval_episodes=2, total_timesteps=10240, cuda=False
    )
    assert record["command"] == sys.argv and record["versions"]["torch"] == torch.__version__
    assert (run_dir / Path(script.__file__).name).read_bytes() == Path(script.__file__).read_bytes()
    state = checkpoint(run_dir)
    assert state["iteration"] == 5 and state["global_step"] == 10240
    result = json.loads((run_dir / "result.json").read_text())
    keys = "eval_return_mean eval_return_std eval_episodes global_step wall_seconds sps seed env_id"
    assert set(result) == set(keys.split())
    assert result["eval_episodes"] == 2 and result["global_step"] == 10240 and result["sps"] > 0
    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"} <= tags
    assert {"losses/approx_kl", "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/clipfrac"} <= tags
    assert [e.step for e in events.Scalars("losses/approx_kl")] == [2048 * i for i in range(1, 6)]
    assert not list(run_dir.glob("*.tmp"))


def test_default_flags_learn_cartpole(tmp_path):
    done = run("--seed", 1, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_return_mean"] >= 475


SLOW = [pytest.param(env_id, marks=pytest.mark.slow) for env_id in ("Acrobot-v1", "MountainCar-v0")]


@pytest.mark.parametrize("env_id", ["CartPole-v1", pytest.param("LunarLander-v3", marks=BOX2D), *SLOW])
def test_killed_run_resumes_bit_for_bit(script, tmp_path, monkeypatch, capsys, env_id):
    args = tiny(script, env_id=env_id, total_timesteps=128 * 60, checkpoint_interval=1)
    args = dataclasses.replace(args, target_entropy=0.5, update_epochs=2)
    flags = "--num-envs 8 --num-steps 16 --eval-episodes 0 --no-cuda --checkpoint-interval 1"
    flags += " --target-entropy 0.5 --update-epochs 2"
    killed = tmp_path / "killed"
    command = [sys.executable, script.__file__, "--env-id", env_id, *flags.split(), "--run-dir", str(killed)]
    process = subprocess.Popen([*command, "--total-timesteps", str(args.total_timesteps)], stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (killed / "checkpoint.prev.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= script.load_checkpoint(killed)["iteration"] < args.num_iterations

    script.train(dataclasses.replace(args, run_dir=str(tmp_path / "straight")))
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(killed)])
    script.train(script.parse_args())
    assert "from step" in capsys.readouterr().out
    straight, resumed = checkpoint(tmp_path / "straight"), checkpoint(killed)
    for name in ("agent", "optimizer", "random", "episodes", "iteration", "global_step", "ent_coef", "recent"):
        assert_equal(straight[name], resumed[name])


@pytest.mark.parametrize("env_id, exact", [("Drifting-v0", True), ("DriftingAlone-v0", False)])
def test_environments_of_ones_own(script, tmp_path, monkeypatch, capsys, env_id, exact):
    """The seed reaches them all. A resumed run plays on what only `np_random` moves, and restarts the others."""
    args = tiny(script, env_id=env_id, total_timesteps=512)
    states = []
    for name in ("one", "again"):
        script.train(dataclasses.replace(args, run_dir=str(tmp_path / name)))
        states.append(checkpoint(tmp_path / name))
    assert_equal(states[0]["agent"], states[1]["agent"])
    with monkeypatch.context() as patch:
        patch.setattr(script, "catch_signals", lambda: [signal.SIGTERM])  # after the first iteration
        with pytest.raises(SystemExit):
            script.train(dataclasses.replace(args, run_dir=str(tmp_path / "stopped")))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(tmp_path / "stopped")])
    script.train(script.parse_args())
    err = capsys.readouterr().err
    assert ("episodes restart" in err) != exact
    if exact:
        assert_equal(checkpoint(tmp_path / "stopped")["agent"], states[0]["agent"])


def test_damaged_checkpoints(script, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    script.train(tiny(script, run_dir=str(run_dir), total_timesteps=384, checkpoint_interval=1))
    path, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"
    good, data = checkpoint(run_dir), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir)])
    script.train(script.parse_args())  # goes on from the one before and comes to the same end
    out, err = capsys.readouterr()
    assert "from step 256" in out
    assert err.startswith("warning:") and "checkpoint.pt is damaged" in err
    assert_equal(checkpoint(run_dir)["agent"], good["agent"])

    path.write_bytes(path.read_bytes()[:1000])
    previous.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        script.train(script.parse_args())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1 and "no good checkpoint" in errors[0]


# What a user can do wrong


class Pictures(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Discrete(2)


gym.register("Pictures-v0", Pictures)


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--env-id NoSuchThing-v0", "NoSuchThing-v0"),
        ("--env-id no_such_module:Thing-v0", "no_such_module"),
        ("--env-id Pendulum-v1", "Discrete"),
        ("--env-id Blackjack-v1", "observation space Tuple"),
        ("--env-id Pictures-v0", "convolutional"),
        ("--env-id ALE/Pong-v5", "ppo_clip_atari.py"),
        ("--num-minibatches 3", "--num-minibatches 3"),
        ("--num-envs 2 --num-steps 2 --num-minibatches 4", "minibatch"),
        ("--gamma nan", "--gamma"),
        ("--run-dir /proc/nope/x", "/proc/nope/x"),
        ("--no-such-flag 1", "--no-such-flag"),
        ("--num-envs many", "many"),
        ("--resume no/such/folder", "no/such/folder"),
    ],
)
def test_bad_input_ends_with_one_line(script, tmp_path, monkeypatch, capfd, flags, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        script.train(script.parse_args())
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert not list(tmp_path.iterdir())


def test_errors_of_a_run_folder(script, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    script.train(tiny(script, run_dir=str(run_dir), total_timesteps=128))
    files = {path: path.read_bytes() for path in run_dir.iterdir()}
    for flags in (
        f"--run-dir {run_dir}",
        f"--resume {run_dir} --gamma 0.9",
        f"--resume {run_dir} --total-timesteps 64",
    ):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.train(script.parse_args())
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert {path: path.read_bytes() for path in run_dir.iterdir()} == files


def test_error_of_the_whole_program_has_no_traceback(tmp_path):
    done = run("--gamma", 2, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --gamma") and done.stderr.count("\n") == 1


def test_training_does_not_wait_for_pytorchs_compiler(tmp_path):
    """Its import takes a second, and PyTorch's optimizer classes import it."""
    flags = ["--total-timesteps", "2048", "--eval-episodes", "1", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *flags]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "torch.optim" in imported and "torch._dynamo" not in imported


def test_a_small_network_takes_one_thread(script, tmp_path):
    """More only wait for each other, and for whatever else runs."""
    torch.set_num_threads(2)
    try:
        script.train(tiny(script, total_timesteps=128, run_dir=str(tmp_path / "run")))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)  # as conftest has it


def test_copied_script_runs_alone(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "mine.py")
    flags = "--env-id FrozenLake-v1 --total-timesteps 4096 --eval-episodes 1 --run-dir run"
    done = subprocess.run(
        [sys.executable, "mine.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "mine.py").read_bytes() == SCRIPT.read_bytes()
    assert checkpoint(tmp_path / "run")["iteration"] == 2
