"""What a GPU must not change: `python -m pytest -m gpu` on a machine that has one."""

import dataclasses
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


def state(trainer, device):
    args = trainer.Args(num_envs=8, num_steps=16, num_minibatches=2)
    torch.manual_seed(1)
    envs = trainer.make_envs(args, args.num_envs)
    agent = trainer.Agent(envs).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    episodes = trainer.Episodes(envs, trainer.env_seeds(1, 0, args.num_envs))
    return args, agent, optimizer, episodes, trainer.Rollout(args, envs, torch.device(device))


def gae(trainer, rollout, args):
    names = ("rewards", "values", "final_values", "terminated", "truncated")
    return trainer.compute_gae(*(getattr(rollout, name) for name in names), args.gamma, args.gae_lambda)


def test_the_same_rollout_gives_the_same_update(trainer):
    """One full-batch epoch on the CPU's rollout: the parameters agree to the accuracy of the arithmetic."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    args, agent, optimizer, episodes, rollout = state(trainer, "cpu")
    _, gpu_agent, gpu_optimizer, _, gpu_rollout = state(trainer, "cuda")
    gpu_agent.load_state_dict(agent.state_dict())
    trainer.collect(agent, episodes, rollout, args)
    gpu_agent.load_state_dict(agent.state_dict())  # with the reward's scale
    for name, value in vars(rollout).items():
        getattr(gpu_rollout, name).copy_(value)
    args = dataclasses.replace(args, num_minibatches=1, update_epochs=1)
    ours = trainer.update(agent, optimizer, rollout, *gae(trainer, rollout, args), 0.01, args)[0]
    theirs = trainer.update(gpu_agent, gpu_optimizer, gpu_rollout, *gae(trainer, gpu_rollout, args), 0.01, args)[0]
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    for name in ("policy_loss", "value_loss", "entropy", "explained_variance", "grad_norm"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name


def test_sampled_actions_follow_the_softmax(trainer):
    logits = torch.tensor([[0.0, 1.0, -1.0]], device="cuda").expand(100_000, 3)
    drawn = trainer.sample(logits)
    assert not torch.equal(drawn, trainer.sample(logits))
    frequencies = torch.bincount(drawn, minlength=3).float() / len(drawn)
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.01, rtol=0)


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
