"""What a GPU must not change: `python -m pytest -m gpu` on a machine that has one."""

import dataclasses
import gc
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.gpu
FLAGS = {
    "ppo_clip_discrete": "--total-timesteps 8192 --checkpoint-interval 2",
    "ppo_clip_atari": "--env-id ALE/Pong-v5 --num-envs 8 --num-steps 32 --total-timesteps 1024 --checkpoint-interval 2",
}


def state(trainer, device, **changes):
    args = trainer.Args(**({"num_envs": 8, "num_steps": 16, "num_minibatches": 2} | changes))
    torch.manual_seed(1)
    envs = trainer.make_envs(args, args.num_envs)
    agent = trainer.Agent(envs).to(device)
    rollout = trainer.Rollout(args, envs, torch.device(device))
    seeds = trainer.env_seeds(1, 0, args.num_envs)
    episodes = trainer.Episodes([envs] if "atari" in trainer.__name__ else envs, seeds)
    return args, agent, trainer.ClippedAdam(agent, args), episodes, rollout


def gae(trainer, rollout, args, function=None):
    names = ("rewards", "values", "final_values", "terminated", "truncated")
    function = function or trainer.compute_gae
    return function(*(getattr(rollout, name) for name in names), args.gamma, args.gae_lambda)


@pytest.fixture
def full_precision():
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def test_the_same_rollout_gives_the_same_update(trainer, full_precision):
    """One full-batch epoch on the CPU's rollout: the metrics agree to the accuracy of the arithmetic."""
    args, agent, optimizer, episodes, rollout = state(trainer, "cpu")
    _, gpu_agent, gpu_optimizer, _, gpu_rollout = state(trainer, "cuda")
    trainer.collect(agent, episodes, rollout, args)
    gpu_agent.load_state_dict(agent.state_dict())  # with the reward's scale
    for name, value in vars(rollout).items():
        getattr(gpu_rollout, name).copy_(value)
    args = dataclasses.replace(args, num_minibatches=1, update_epochs=1)
    ours = trainer.update(agent, optimizer, rollout, *gae(trainer, rollout, args), 0.01, args)[0]
    theirs = trainer.update(gpu_agent, gpu_optimizer, gpu_rollout, *gae(trainer, gpu_rollout, args), 0.01, args)[0]
    for name in ("policy_loss", "value_loss", "entropy", "explained_variance", "grad_norm"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("changes", [{}, {"target_kl": 10.0}, {"clip_vloss": True}], ids=str)
def test_captured_minibatches_learn_what_eager_ones_learn(trainer, full_precision, changes):
    """Two dozen minibatches, the learning rate and c2 changing in between, as a graph and as they are."""
    ends = {}
    for name in ("eager", "graph"):
        args, agent, optimizer, episodes, rollout = state(trainer, "cuda", update_epochs=4, **changes)
        torch.manual_seed(2)
        trainer.collect(agent, episodes, rollout, args)
        advantages, returns = gae(trainer, rollout, args)
        learn = trainer.Graph(trainer.learn) if name == "graph" else trainer.learn
        metrics = []
        for i in range(3):
            torch.manual_seed(3 + i)  # the same minibatches
            optimizer.lr.fill_(1e-3 / (1 + i))
            metrics.append(trainer.update(agent, optimizer, rollout, advantages, returns, 0.1 * i, args, learn)[0])
        ends[name] = metrics, agent.state_dict()
    (eager, parameters), (graph, captured) = ends["eager"], ends["graph"]
    for one, other in zip(eager, graph):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)
    for name, value in parameters.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_captured_advantages_are_the_eager_ones(trainer):
    args, agent, _, episodes, rollout = state(trainer, "cuda")
    graph = trainer.Graph(trainer.compute_gae)
    for _ in range(6):
        trainer.collect(agent, episodes, rollout, args)
        for one, other in zip(gae(trainer, rollout, args), gae(trainer, rollout, args, graph)):
            torch.testing.assert_close(one, other)


def test_a_captured_gradient_that_is_not_finite_changes_nothing(trainer):
    args, agent, optimizer, episodes, rollout = state(trainer, "cuda", update_epochs=4)
    trainer.collect(agent, episodes, rollout, args)
    advantages, returns = gae(trainer, rollout, args)
    learn = trainer.Graph(trainer.learn)
    assert trainer.update(agent, optimizer, rollout, advantages, returns, 0.0, args, learn)[0]["finite"] == 1
    before = [p.detach().clone() for p in agent.parameters()]
    broken = torch.full_like(returns, float("inf"))
    assert trainer.update(agent, optimizer, rollout, advantages, broken, 0.0, args, learn)[0]["finite"] < 1
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), before))
    assert trainer.update(agent, optimizer, rollout, advantages, returns, 0.0, args, learn)[0]["finite"] == 1
    assert not all(torch.equal(p, q) for p, q in zip(agent.parameters(), before))


def test_captured_actions_differ_between_steps_and_follow_the_softmax(trainer):
    """The random numbers of a captured step go on: the same states get other actions, in the policy's proportions."""
    _, agent, _, _, rollout = state(trainer, "cuda", num_envs=64, num_steps=4)
    with torch.no_grad():
        agent.policy_head.bias.copy_(torch.linspace(-0.5, 0.5, len(agent.policy_head.bias)))
    act, idx = trainer.Graph(trainer.act), rollout.idx[0]
    drawn = []
    for _ in range(500):
        if hasattr(rollout, "noise"):  # all of a rollout's before it begins
            rollout.noise.exponential_()
        drawn.append(act(agent, rollout, idx).clone())
    assert len({tuple(actions.tolist()) for actions in drawn}) == 500
    probs = rollout.log_probs[0].exp()
    counts = torch.stack([torch.stack(drawn[3:]).eq(a).float().mean(0) for a in range(probs.shape[1])], 1)
    torch.testing.assert_close(counts.mean(0), probs.mean(0), atol=0.01, rtol=0)


def test_acting_waits_for_nothing(trainer):
    """The one host sync of a step is reading its actions."""
    _, agent, _, _, rollout = state(trainer, "cuda")
    act = trainer.Graph(trainer.act)
    for _ in range(4):
        act(agent, rollout, rollout.idx[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        act(agent, rollout, rollout.idx[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampled_actions_follow_the_softmax(trainer):
    logits = torch.tensor([[0.0, 1.0, -1.0]], device="cuda").expand(100_000, 3)
    drawn = trainer.sample(logits)
    assert not torch.equal(drawn, trainer.sample(logits))
    frequencies = torch.bincount(drawn, minlength=3).float() / len(drawn)
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.01, rtol=0)


def test_same_seed_same_parameters(trainer, tmp_path):
    """Whichever group of emulators was faster."""
    script, ends = ROOT / f"{trainer.Args.exp_name}.py", []
    for name in ("one", "other"):
        flags = [*FLAGS[trainer.Args.exp_name].split(), "--eval-episodes", "0", "--run-dir", str(tmp_path / name)]
        subprocess.run([sys.executable, str(script), *flags], check=True, timeout=300)
        ends.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["agent"])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_trains_stops_resumes_on_the_gpu_and_goes_on_without(trainer, tmp_path):
    script, run_dir = ROOT / f"{trainer.Args.exp_name}.py", tmp_path / "run"
    flags = [*FLAGS[trainer.Args.exp_name].split(), "--eval-episodes", "1", "--run-dir", str(run_dir)]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " on cuda" in done.stdout, done.stderr
    steps = json.loads((run_dir / "result.json").read_text())["global_step"]
    for device, total in (("--cuda", 2 * steps), ("--no-cuda", 3 * steps)):
        more = [sys.executable, str(script), "--resume", str(run_dir), device, "--total-timesteps", str(total)]
        done = subprocess.run(more, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((run_dir / "result.json").read_text())["global_step"] == total
    export = [sys.executable, str(ROOT / "export_policy.py"), str(run_dir)]
    assert subprocess.run(export, timeout=300).returncode == 0


def test_no_graph_is_left_when_the_ranks_part(trainer, tmp_path, monkeypatch):
    """NCCL would wait for a graph that holds an all-reduce; with one rank it holds none, so nothing else shows it."""
    alive = []
    gc.collect()  # those of other tests
    monkeypatch.setattr(trainer, "leave_ranks", lambda: alive.extend(gc.get_objects()))
    sizes = {"num_envs": 8, "num_steps": 32, "total_timesteps": 1024, "eval_episodes": 0}
    trainer.train(dataclasses.replace(trainer.Args(), **sizes, run_dir=str(tmp_path / "run")))
    assert alive and not any(type(x) is trainer.Graph for x in alive)


def test_random_numbers_of_the_gpu_go_on_where_they_stood(trainer):
    torch.cuda.init()
    states = trainer.get_random_states()
    numbers = torch.rand(3, device="cuda")
    trainer.set_random_states(states)
    assert torch.equal(torch.rand(3, device="cuda"), numbers)


def test_one_rank_of_nccl_learns_cartpole(tmp_path):
    """NCCL starts, and its calls can be captured. More ranks need more GPUs than this test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "ppo_clip_discrete.py"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " on cuda" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_return_mean"] >= 475
