"""What every trainer computes, against NumPy, against numbers worked out by hand, and against its twin."""

import ast
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAINERS, load
from hypothesis import given, settings
from hypothesis import strategies as st

TWINS = {
    *("ranks", "start_ranks", "together", "all_mean", "gather", "from_rank_0", "leave_ranks"),
    *("moments", "digest", "layer_init", "RunningStats", "env_seeds", "sample", "ask", "step"),
    *("compute_gae", "ppo_clip_loss", "say", "fail", "write_file"),
    *("categorical_kl", "ClippedAdam", "learn", "normalise", "update", "backtrack", "Graph"),
    *("save_checkpoint", "load_checkpoint", "seed_all", "get_random_states", "set_random_states"),
    *("lock_run_dir", "open_run", "versions", "start_wandb", "cli", "parse_args", "catch_signals", "Report"),
    *("check_finite", "finish"),
}
DIFFERENT = {
    *("Args", "Agent", "make_envs", "Rollout", "Episodes", "act", "collect", "to_tensor", "evaluate", "record_video"),
    *("check", "train"),
}


# Generalised advantage estimation


def gae_by_definition(rewards, values, final_values, terminated, truncated, gamma, gae_lambda):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l} to the episode's or the rollout's end, sum by sum."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                if terminated[k, n]:
                    bootstrap = 0.0
                elif truncated[k, n]:
                    bootstrap = final_values[k, n]
                else:
                    bootstrap = values[k + 1, n]
                delta = rewards[k, n] + gamma * bootstrap - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n]:
                    break
    return advantages


@settings(max_examples=100, deadline=None)
@given(data=st.data(), T=st.integers(1, 8), N=st.integers(1, 3))
def test_gae_is_its_definition(trainer, data, T, N):
    number = st.floats(-10, 10, width=32)

    def table(elements, rows):
        return np.array(data.draw(st.lists(elements, min_size=rows * N, max_size=rows * N))).reshape(rows, N)

    rewards, values, final_values = table(number, T), table(number, T + 1), table(number, T)
    terminated, truncated = table(st.booleans(), T), table(st.booleans(), T)
    gamma, gae_lambda = data.draw(st.floats(0.01, 1)), data.draw(st.floats(0, 1))
    inputs = (rewards, values, final_values, terminated, truncated)
    advantages, returns = trainer.compute_gae(*map(torch.from_numpy, inputs), gamma, gae_lambda)
    expected = gae_by_definition(*inputs, gamma, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns.numpy(), expected + values[:-1], rtol=1e-9, atol=1e-9)


def test_gae_by_hand(trainer):
    """gamma = lambda = 1/2, so that gamma lambda = 1/4; step 0 terminates, step 2 is truncated at a state worth 100."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0]])
    final_values = torch.tensor([[777.0], [777.0], [100.0], [777.0]])  # 777 must not be read
    terminated = torch.tensor([[True], [False], [False], [False]])
    truncated = torch.tensor([[False], [False], [True], [False]])
    advantages, returns = trainer.compute_gae(rewards, values, final_values, terminated, truncated, 0.5, 0.5)
    # A_3 = 4 + 50/2 - 40 = -11                       the rollout's end bootstraps the last row of values
    # A_2 = 3 + 100/2 - 30 = 23                       truncation: the final observation's value, no A_3
    # A_1 = 2 + 30/2 - 20 + 23/4 = -3 + 5.75 = 2.75
    # A_0 = 1 - 10 = -9                               termination: no bootstrap, no A_1
    assert advantages.flatten().tolist() == [-9.0, 2.75, 23.0, -11.0]
    assert returns.flatten().tolist() == [1.0, 22.75, 53.0, 29.0]


# The loss


def batch_by_hand():
    """pi_old = (1/2, 1/2) everywhere; pi = (3/4, 1/4) in the first three transitions, unchanged in the last."""
    return {
        "logits": torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log() + 3,
        "values": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        "actions": torch.tensor([0, 1, 0, 1]),
        "old_log_probs": torch.full((4, 2), 0.5, dtype=torch.float64).log(),
        "old_values": torch.tensor([0.5, 2.0, 2.9, 5.0], dtype=torch.float64),
        "advantages": torch.tensor([1.0, -2.0, -1.0, 3.0], dtype=torch.float64),
        "returns": torch.tensor([2.0, 2.0, 0.0, 4.1], dtype=torch.float64),
    }


def loss_args(trainer, **changes):
    return trainer.Args(**({"clip_coef": 0.2, "vf_coef": 0.5, "clip_vloss": False} | changes))


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_by_hand(trainer, clip_vloss):
    loss, metrics = trainer.ppo_clip_loss(
        **batch_by_hand(), ent_coef=0.1, args=loss_args(trainer, clip_vloss=clip_vloss)
    )
    # r = 1.5, 0.5, 1.5, 1; A = 1, -2, -1, 3; eps = 0.2:
    # min(1.5, 1.2) = 1.2; min(-1, 0.8 * -2) = -1.6; min(-1.5, -1.2) = -1.5; 3; their mean 1.1 / 4
    assert float(metrics["policy_loss"]) == pytest.approx(-0.275)
    # (V - V^targ)^2 = 1, 0, 9, 0.01; half their mean 10.01 / 8
    # clipped: V = 0.7, 2, 3, 4.8, squares 1.69, 0, 9, 0.49; half the mean of the larger ones 11.18 / 8
    value_loss = 1.3975 if clip_vloss else 1.25125
    assert float(metrics["value_loss"]) == pytest.approx(value_loss)
    # S(3/4, 1/4) = 0.75 * 0.2876820724 + 0.25 * 1.3862943611 = 0.5623351446; S(1/2, 1/2) = ln 2 = 0.6931471806
    # mean (3 * 0.5623351446 + 0.6931471806) / 4
    assert float(metrics["entropy"]) == pytest.approx(0.5950381536)
    # -L^CLIP + c1 L^VF - c2 S with c1 = 0.5, c2 = 0.1
    assert float(loss) == pytest.approx(-0.275 + 0.5 * value_loss - 0.05950381536)
    assert float(metrics["loss"]) == float(loss)
    # KL = 1/2 ln(0.5 / 0.75) + 1/2 ln(0.5 / 0.25) = -0.2027325541 + 0.3465735903 = 0.1438410362 in three of four
    assert float(metrics["kl"]) == pytest.approx(0.10788077715)
    # r - 1 - ln r = 0.0945348919, 0.1931471806, 0.0945348919, 0
    assert float(metrics["approx_kl"]) == pytest.approx(0.0955542411)
    assert float(metrics["clipfrac"]) == 0.75


def test_normalised_advantages(trainer):
    # A = 1, -2, -1, 3: mean 0.25, sum of squares 15 - 4 / 16 = 14.75, standard deviation (14.75 / 3)^(1/2)
    # A = 0, 0, 0, 8: mean 2, 64 - 16 = 48, standard deviation 4; each minibatch, a row, by itself
    rows = torch.tensor([[1.0, -2.0, -1.0, 3.0], [0.0, 0.0, 0.0, 8.0]], dtype=torch.float64)
    expected = torch.stack([(rows[0] - 0.25) / math.sqrt(14.75 / 3), (rows[1] - 2) / 4])
    torch.testing.assert_close(trainer.normalise(rows), expected)
    assert torch.equal(trainer.normalise(torch.full((1, 4), 3.0)), torch.zeros(1, 4))  # no division by 0


@pytest.mark.parametrize("norm_adv", [False, True])
def test_minibatches_are_drawn_without_replacement(trainer, monkeypatch, norm_adv):
    """K epochs of M minibatches: each epoch holds every transition once, with its own advantage, in a new order."""
    args = trainer.Args(num_envs=4, num_steps=6, num_minibatches=3, update_epochs=2, norm_adv=norm_adv)
    rollout = SimpleNamespace(values=torch.zeros(7, 4), returns=torch.zeros(6, 4))
    advantages, seen = torch.arange(24.0).view(6, 4), []

    def learn(agent, optimizer, rollout, idx, mine, c2, args):
        expected = trainer.normalise(idx[None].float())[0] if norm_adv else idx.float()
        torch.testing.assert_close(mine, expected)
        assert float(c2) == 0.25
        seen.append(idx)
        return {"entropy": torch.tensor(1.0)}

    optimizer = SimpleNamespace(found_inf=torch.ones(()))
    trainer.update(None, optimizer, rollout, advantages, 2 * advantages, 0.25, args, learn)
    assert [len(idx) for idx in seen] == [8] * 6
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort()[0], torch.arange(24)) and torch.equal(second.sort()[0], torch.arange(24))
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(24))
    assert torch.equal(rollout.returns, 2 * advantages) and optimizer.found_inf == 0


def test_gradient_is_clipped_by_its_norm_over_all_parameters(trainer):
    """Two layers, channels last: the step is torch's own Adam's after torch's own clipping."""
    args = trainer.Args(learning_rate=0.1, max_grad_norm=0.5)
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Conv2d(4, 3, 2), torch.nn.Flatten(), torch.nn.Linear(3, 2)) for _ in "ab"
    )
    theirs.load_state_dict(ours.state_dict())
    ours.to(memory_format=torch.channels_last)
    optimizer = trainer.ClippedAdam(ours, args)
    other = torch.optim.Adam(theirs.parameters(), lr=0.1, eps=1e-5)
    for scale in (100.0, 0.001):  # clipped, and not
        x = torch.randn(5, 4, 2, 2)
        norm = optimizer.descend(scale * ours(x).square().sum())
        other.zero_grad()
        (scale * theirs(x).square().sum()).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        assert (float(norm) > 0.5) == (scale == 100.0)
        other.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q)
    optimizer.lr.fill_(0.0)
    before = [p.clone() for p in ours.parameters()]
    optimizer.descend(ours(x).square().sum())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), before))


def test_one_gradient_that_is_not_finite_stops_the_rest_of_the_update(trainer):
    model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
    optimizer = trainer.ClippedAdam(model, trainer.Args())
    optimizer.descend(math.nan * model(x).sum())
    before = optimizer.weights.clone()
    optimizer.descend(model(x).sum())
    assert optimizer.found_inf == 1 and torch.equal(optimizer.weights, before)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_gradient_against_central_differences(trainer, clip_vloss):
    rng = torch.Generator().manual_seed(0)
    B, A, h = 32, 4, 1e-6
    args = loss_args(trainer, clip_vloss=clip_vloss, clip_coef=0.3)
    draw = {"generator": rng, "dtype": torch.float64}
    old_logits = torch.randn(B, A, **draw)
    x = torch.cat([old_logits + 0.3 * torch.randn(B, A, **draw), torch.randn(B, 1, **draw)], 1)  # logits and value
    actions = torch.randint(A, (B,), generator=rng)
    rest = (actions, old_logits.log_softmax(-1), *torch.randn(3, B, **draw), 0.02, args)

    def loss(x):
        return trainer.ppo_clip_loss(x[:, :-1], x[:, -1], *rest)[0]

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    with torch.no_grad():
        for i, j in np.ndindex(B, A + 1):
            nudge = torch.zeros_like(x)
            nudge[i, j] = h
            difference = float(loss(x + nudge) - loss(x - nudge)) / (2 * h)
            assert float(gradient[i, j]) == pytest.approx(difference, rel=1e-5, abs=1e-8)
    assert (gradient[:, :-1].abs().sum(1) > 0).all()  # at least the entropy's share


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 30), A=st.integers(2, 18))
def test_entropy_and_kl_are_exact(trainer, seed, scale, A):
    rng = np.random.default_rng(seed)
    old, new = scale * rng.standard_normal((2, 5, A))
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (old, new))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    old_log_probs, log_probs = (torch.from_numpy(x).log_softmax(-1) for x in (old, new))
    kl = trainer.categorical_kl(old_log_probs, log_probs)
    assert kl.shape == (5,)
    np.testing.assert_allclose(kl.numpy(), (p * np.log(p / q)).sum(1), rtol=1e-7, atol=1e-10)
    zeros = torch.zeros(5, dtype=torch.float64)
    _, metrics = trainer.ppo_clip_loss(
        torch.from_numpy(new), zeros, zeros.long(), old_log_probs, zeros, zeros, zeros, 0.0, loss_args(trainer)
    )
    assert float(metrics["entropy"]) == pytest.approx(-(q * np.log(q)).sum(1).mean(), rel=1e-7, abs=1e-10)
    assert float(metrics["kl"]) == pytest.approx(float(kl.mean()))


def test_sample_follows_the_policy(trainer):
    probs = torch.tensor([0.1, 0.2, 0.7])
    generator = torch.Generator().manual_seed(1)
    actions = trainer.sample(probs.log().expand(20_000, 3), generator)
    assert actions.shape == (20_000,)
    frequencies = actions.bincount(minlength=3) / 20_000
    torch.testing.assert_close(frequencies, probs, atol=0.015, rtol=0)  # more than four standard deviations


def test_sampling_by_a_generator_leaves_the_global_one(trainer):
    logits, state = torch.zeros(100, 4), torch.get_rng_state()
    one, again = (trainer.sample(logits, torch.Generator().manual_seed(5)) for _ in "ab")
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), state)


# The network, and what the seed decides


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_layers_have_a_nonlinearity_between_them_and_both_heads_train_them(path):
    """Of the network as it is here, which a variant may change."""
    if not path.exists():
        pytest.skip("needs both trainers")
    trainer = load(path)
    envs = trainer.make_envs(trainer.Args(), 1)
    agent, space = trainer.Agent(envs), envs.single_observation_space
    layers = [layer for layer in agent.encoder if not isinstance(layer, torch.nn.Flatten)]
    assert len(layers) % 2 == 0 and all(isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) for layer in layers[::2])
    assert {type(layer) for layer in layers[1::2]} in ({torch.nn.ReLU}, {torch.nn.Tanh})
    obs = trainer.to_tensor(np.ones((1, *space.shape), space.dtype), torch.device("cpu"))
    for output in agent(obs):  # logits, values
        (grad,) = torch.autograd.grad(output.flatten()[0], agent.encoder[0].weight, retain_graph=True)
        assert grad.any()


def test_the_seed_decides_the_network_the_environments_and_the_random_numbers(trainer, tmp_path, monkeypatch):
    """Each by itself; and no evaluation shares an environment's seed with any training."""
    seen, episodes = [], trainer.Episodes

    def begin(envs, seeds):
        seen.append({"environments": torch.from_numpy(seeds.astype(np.int64))})
        return episodes(envs, seeds)

    def collect(agent, *_):
        seen[-1] |= {"network": next(agent.parameters()).clone(), "random numbers": torch.get_rng_state()}
        trainer.fail("enough", code=7)

    monkeypatch.setattr(trainer, "Episodes", begin)
    monkeypatch.setattr(trainer, "collect", collect)
    for seed in (1, 2):
        with pytest.raises(SystemExit, match="7"):
            trainer.train(trainer.Args(seed=seed, num_envs=4, cuda=False, run_dir=str(tmp_path / str(seed))))
    one, two = seen
    assert [name for name in one if torch.equal(one[name], two[name])] == []
    seeds = np.concatenate([trainer.env_seeds(seed, stream, 64) for seed in (1, 2, 3) for stream in (0, 1, 2)])
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("target, given, first", [(None, 0.2, 0.2), (0.5, 0.0, 0.01), (0.5, 0.2, 0.2), (0.5, 5.0, 0.5)])
def test_the_first_entropy_weight(trainer, tmp_path, monkeypatch, target, given, first):
    """`ent_coef` as it is, under a target within bounds."""
    seen = []
    monkeypatch.setattr(trainer, "update", lambda *inputs: seen.append(inputs[5]) or trainer.fail("enough", code=7))
    sizes = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "total_timesteps": 8}
    args = trainer.Args(target_entropy=target, ent_coef=given, cuda=False, run_dir=str(tmp_path / "run"), **sizes)
    with pytest.raises(SystemExit, match="7"):
        trainer.train(args)
    assert seen == [first]


def test_weights_begin_orthogonal_with_their_layers_gains(trainer):
    """All singular values equal the gain: sqrt(2) in the encoder, 0.01 and 1 in the policy's and the value's head."""
    agent = trainer.Agent(trainer.make_envs(trainer.Args(), 1))
    gains = {agent.policy_head: 0.01, agent.value_head: 1.0}
    layers = [layer for layer in agent.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    assert set(gains) < set(layers)
    for layer in layers:
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(values, torch.full_like(values, gains.get(layer, math.sqrt(2))))
        assert not layer.bias.any()


# CUDA graphs, as far as they show without a GPU


def test_what_a_graph_captures_stays_on_its_device(trainer, monkeypatch):
    """On a device without data a value that is read back is an error, and so is arithmetic with other devices."""

    def adam(*tensors, **options):
        on = {x.device.type for group in tensors for x in group}
        assert on | {options["lr"].device.type, options["found_inf"].device.type} == {"meta"}

    monkeypatch.setattr(trainer, "adam", adam)  # the fused one knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # nor does this, off on a GPU
    args = trainer.Args(num_envs=4, num_steps=4)
    envs = trainer.make_envs(args, args.num_envs)
    agent = trainer.Agent(envs).to("meta")
    rollout, optimizer = trainer.Rollout(args, envs, torch.device("meta")), trainer.ClippedAdam(agent, args)
    envs.close()
    trainer.act(agent, rollout, rollout.idx[0])
    played = (getattr(rollout, name) for name in ["rewards", "values", "final_values", "terminated", "truncated"])
    advantages, _ = trainer.compute_gae(*played, args.gamma, args.gae_lambda)
    idx, c2 = torch.arange(8, device="meta"), torch.zeros((), device="meta")
    metrics = trainer.learn(agent, optimizer, rollout, idx, advantages.flatten()[:8], c2, args)
    assert {x.device.type for x in metrics.values()} == {"meta"}


# What the functions are given


def test_advantages_are_of_what_was_played(trainer, tmp_path, monkeypatch):
    """Both trainers give `compute_gae` every part of the rollout, gamma and lambda in their places."""
    update, terminated = trainer.update, []

    def spy(agent, optimizer, rollout, advantages, returns, *rest):
        names = ("rewards", "values", "final_values", "terminated", "truncated")
        expected = trainer.compute_gae(*(getattr(rollout, name) for name in names), 0.9, 0.7)
        torch.testing.assert_close((advantages, returns), expected)
        terminated.append(int(rollout.terminated.sum()))
        return update(agent, optimizer, rollout, advantages, returns, *rest)

    monkeypatch.setattr(trainer, "update", spy)
    sizes = {"num_envs": 2, "num_steps": 128, "num_minibatches": 2, "total_timesteps": 512, "update_epochs": 1}
    run = {"eval_episodes": 0, "cuda": False, "run_dir": str(tmp_path / "run")}
    trainer.train(trainer.Args(gamma=0.9, gae_lambda=0.7, **sizes, **run))
    assert len(terminated) == 2 and sum(terminated)


def test_evaluation_samples_its_actions(trainer, monkeypatch):
    generators, sample = [], trainer.sample

    def spy(logits, generator=None):
        generators.append(generator)
        return sample(logits, generator)

    def stop(envs, actions):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "sample", spy)
    monkeypatch.setattr(trainer, "step", stop)
    args = trainer.Args(seed=5)
    agent = trainer.Agent(trainer.make_envs(args, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(agent, args, 1, torch.device("cpu"))
    assert [generator.initial_seed() for generator in generators] == [5]


# What the command line refuses


@pytest.mark.parametrize(
    "field, bad",
    [
        *[("seed", -1), ("checkpoint_interval", 0), ("eval_episodes", -1), ("num_envs", 0), ("num_steps", 0)],
        *[("num_steps", 2**20), ("num_minibatches", 0), ("num_minibatches", 3), ("num_minibatches", 2048)],
        *[("total_timesteps", 10), ("update_epochs", 0), ("run_dir", ""), ("resume", "")],
        *[("learning_rate", -1.0), ("learning_rate", 1.1), ("gamma", 0.0), ("gamma", 1.1), ("gamma", np.nan)],
        *[("gae_lambda", -0.1), ("gae_lambda", 1.1), ("clip_coef", 0.0), ("clip_coef", 1.5), ("clip_coef", np.nan)],
        *[("ent_coef", -0.1), ("ent_coef", np.inf), ("vf_coef", -0.1), ("vf_coef", np.nan), ("max_grad_norm", 0.0)],
        *[("final_temperature", 0.0), ("final_temperature", 1.1), ("target_kl", 0.0), ("target_kl", np.inf)],
        *[("target_entropy", 0.0), ("target_entropy", np.nan)],
    ],
)
def test_a_number_that_cannot_work_is_refused(trainer, capsys, field, bad):
    trainer.check(trainer.Args())
    with pytest.raises(SystemExit, match="2"):
        trainer.check(trainer.Args(**{field: bad}))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and f"--{field.replace('_', '-')}" in err


def test_an_error_among_ranks_exits_at_once(trainer, monkeypatch):
    """The usual exit would now and then end in an abort by gloo's threads."""

    def exit_at_once(code):
        raise InterruptedError(code)

    monkeypatch.setattr(trainer.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(trainer.os, "_exit", exit_at_once)
    with pytest.raises(InterruptedError, match="7"):
        trainer.fail("enough", code=7)


def test_a_target_entropy_needs_two_epochs(trainer, capsys):
    """With one it cannot be seen how the entropy moves, and c2 would swing between its bounds."""
    trainer.check(trainer.Args(target_entropy=0.5, update_epochs=2))
    with pytest.raises(SystemExit, match="2"):
        trainer.check(trainer.Args(target_entropy=0.5, update_epochs=1))
    assert "--target-entropy needs --update-epochs 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize("field, package", [("track", "wandb"), ("capture_video", "moviepy")])
def test_a_missing_package_is_told_before_the_training(trainer, monkeypatch, capsys, field, package):
    found = {"wandb": True, "moviepy": True}
    monkeypatch.setattr(trainer.importlib.util, "find_spec", found.get)
    trainer.check(trainer.Args(**{field: True}))
    del found[package]
    with pytest.raises(SystemExit, match="2"):
        trainer.check(trainer.Args(**{field: True}))
    flag = field.replace("_", "-")
    assert capsys.readouterr().err == f"error: --{flag} needs `pip install {package}`\n"


# The twins


def definitions(path):
    """Text of every function and class at the top of the file, decorators included."""
    source = path.read_text()
    lines = source.splitlines()
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    starts = {n.name: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in nodes}
    return {n.name: "\n".join(lines[starts[n.name] - 1 : n.end_lineno]) for n in nodes}


def shared_names():
    if not all(path.exists() for path in TRAINERS):
        return sorted(TWINS)
    one, other = map(definitions, TRAINERS)
    return sorted(TWINS | (one.keys() & other.keys()) - DIFFERENT)


@pytest.mark.parametrize("name", shared_names())
def test_twins_are_the_same_text(name):
    if not all(path.exists() for path in TRAINERS):
        pytest.skip("needs both trainers")
    one, other = map(definitions, TRAINERS)
    assert one[name] == other[name]


def test_both_trainers_start_alike():
    if not all(path.exists() for path in TRAINERS):
        pytest.skip("needs both trainers")
    one, other = (path.read_text().partition("\nif __name__")[2] for path in TRAINERS)
    assert one == other != ""


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_different_things_differ(name):
    """Whatever has become the same text in both belongs in TWINS."""
    if not all(path.exists() for path in TRAINERS):
        pytest.skip("needs both trainers")
    one, other = map(definitions, TRAINERS)
    assert name in one and name in other and one[name] != other[name]
