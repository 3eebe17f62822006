"""Several processes under torchrun learn what one process learns, and survive each other's faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DISCRETE, ATARI = ROOT / "ppo_clip_discrete.py", ROOT / "ppo_clip_atari.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL = "--num-envs 8 --num-steps 16 --update-epochs 2 --no-cuda"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Runs a trainer in float64; the random numbers of the actions depend on the environment and the step alone
DRIVER = """
import importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("trainer", sys.argv[1])
trainer = sys.modules["trainer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainer)
torch.set_default_dtype(torch.float64)
rank, world = trainer.ranks()
calls = 0
def sample(logits, generator=None):
    global calls
    calls += 1
    draws = torch.rand(world * len(logits), logits.shape[1], generator=torch.Generator().manual_seed(calls))
    return (logits.softmax(-1) / -draws.log()[rank * len(logits):][:len(logits)]).argmax(-1)
trainer.sample = sample
trainer.train(trainer.Args(**json.loads(sys.argv[2])))
"""


def torchrun(ranks, *command, **options):
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **options)


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def logged(run_dir, tag):
    return [(e.step, e.value) for e in EventAccumulator(str(run_dir)).Reload().Scalars(tag)]


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# Equality


@pytest.mark.parametrize(
    "options", [{}, {"target_kl": 0.002, "target_entropy": 0.6, "learning_rate": 0.01}], ids=["plain", "adaptive"]
)
def test_two_ranks_learn_what_one_process_learns(tmp_path, options):
    """Same environments, same random numbers of the actions, one minibatch an epoch: the same parameters."""
    args = {"num_envs": 8, "num_steps": 32, "num_minibatches": 1, "update_epochs": 3, "total_timesteps": 3 * 256}
    args |= {"cuda": False, "eval_episodes": 0, "checkpoint_interval": 1} | options
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    for name, ranks in (("one", 1), ("two", 2)):
        done = torchrun(ranks, driver, DISCRETE, json.dumps(args | {"run_dir": str(tmp_path / name)}))
        assert done.returncode == 0, done.stderr
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    for key, value in one["agent"].items():
        torch.testing.assert_close(two["agent"][key], value, rtol=0, atol=1e-9, msg=key)
    assert two["ent_coef"] == pytest.approx(one["ent_coef"], rel=1e-9)
    assert len(one["recent"]) > 5 and sorted(one["recent"]) == sorted(two["recent"])
    for tag in ("losses/loss", "losses/grad_norm", "losses/explained_variance", "charts/episodic_return"):
        np.testing.assert_allclose(logged(tmp_path / "one", tag), logged(tmp_path / "two", tag), rtol=1e-5, err_msg=tag)
    for mine, theirs in zip(one["episodes"], two["episodes"], strict=True):
        assert torch.equal(mine["obs"], theirs["obs"]) and mine["return"] == theirs["return"]
    if options:  # the trust region and the entropy controller were at work
        assert min(value for _, value in logged(tmp_path / "one", "losses/step_fraction")) < 1
        assert one["ent_coef"] != 0.01


def test_ranks_share_no_environment_seed_and_no_random_numbers(tmp_path):
    flags = "--env-id ALE/Pong-v5 --num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 64 --eval-episodes 0"
    done = torchrun(2, ATARI, *flags.split(), "--no-cuda", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    state = checkpoint(tmp_path / "run")
    seeds = [episode["seed"] for episode in state["episodes"]]
    assert len(set(seeds)) == 4
    assert seeds == load(ATARI).env_seeds(1, 0, 4).tolist()  # those of one process
    one, other = state["random"]
    assert not torch.equal(one["torch"], other["torch"]) and not torch.equal(one["numpy"][1], other["numpy"][1])


# One of two ranks in this process, whose collectives give what the other would


def test_the_digest_is_of_parameters_and_statistics(trainer):
    agent = trainer.Agent(trainer.make_envs(trainer.Args(), 1))
    digests = {trainer.digest(agent)}
    for value in agent.state_dict().values():
        value.add_(1)
        digests.add(trainer.digest(agent))
    assert len(digests) == 1 + len(agent.state_dict())


def test_each_rank_resumes_its_own_environments_and_random_numbers(trainer, tmp_path, monkeypatch):
    seen = {}

    def first_collect(agent, episodes, *_):
        seen.update(states=episodes.state_dict(), random=torch.get_rng_state())
        trainer.fail("enough", code=7)

    trainer.train(small(trainer, tmp_path / "run"))
    state = checkpoint(tmp_path / "run")
    others = state["random"][0] | {"torch": torch.Generator().manual_seed(5).get_state()}
    trainer.save_checkpoint(tmp_path / "run", state | {"random": [*state["random"], others]})
    monkeypatch.setattr(trainer, "collect", first_collect)
    monkeypatch.setattr(sys, "argv", [trainer.__file__, "--resume", str(tmp_path / "run"), "--total-timesteps", "192"])
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setattr(trainer, "ranks", lambda place=(rank, world): place)
        monkeypatch.setattr(trainer, "from_rank_0", lambda function: function())
        with pytest.raises(SystemExit, match="7"):
            trainer.train(trainer.parse_args())
        mine = state["episodes"][2 * rank :][: 4 // world]
        if "obs" in mine[0]:
            assert all(torch.equal(s["obs"], m["obs"]) for s, m in zip(seen["states"], mine, strict=True))
        else:
            follow = [int(trainer.env_seeds(episode["seed"], 0, 1)[0]) for episode in mine]
            assert [s["seed"] for s in seen["states"]] == follow
        saved = [state["random"][0]["torch"], others["torch"]]
        assert [torch.equal(seen["random"], x) for x in saved] == [world == 2 and rank == n for n in (0, 1)]


def test_rank_0_saves_what_all_ranks_saw(trainer, tmp_path, monkeypatch):
    signals = []
    told = {"digest": None}

    def gather(value):
        if value is signals:
            return [value, []]
        if isinstance(value, list):  # the games that ended
            return [value, [(7.0, 3)]]
        digest, episodes, random = value
        return [value, (told["digest"] or digest, ["other"] * len(episodes), random | {"cuda": torch.ones(1)})]

    monkeypatch.setattr(trainer, "ranks", lambda: (0, 2))
    monkeypatch.setattr(trainer, "catch_signals", lambda: signals)
    monkeypatch.setattr(trainer, "gather", gather)
    trainer.train(small(trainer, tmp_path / "run", total_timesteps=32))
    state = checkpoint(tmp_path / "run")
    assert 7.0 in state["recent"]
    assert len(state["episodes"]) == 4 and state["episodes"][2:] == ["other"] * 2
    assert [random["cuda"] is None for random in state["random"]] == [True, False]
    del signals[:]
    told["digest"] = "another"
    with pytest.raises(SystemExit, match="1"):
        trainer.train(small(trainer, tmp_path / "differs", total_timesteps=32))
    assert not (tmp_path / "differs" / "checkpoint.pt").exists()


# Runs


def test_cartpole_is_learned_by_two_ranks(tmp_path):
    """Default flags; rank 0 alone writes, and counts the whole job's steps and episodes."""
    done = torchrun(2, DISCRETE, "--no-cuda", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert errors(done.stderr) == [] and done.stdout.count("CartPole-v1 on 2 x cpu") == 1
    assert done.stdout.count("evaluation: ") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval_return_mean"] >= 475 and result["global_step"] == 98_304
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    steps, speeds = zip(*logged(tmp_path / "run", "charts/SPS"))
    assert steps[-1] == 98_304
    times = [e.wall_time for e in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("losses/kl")]
    assert speeds[-1] == pytest.approx(2048 * (len(times) - 2) / (times[-1] - times[1]), rel=0.1)
    assert len(checkpoint(tmp_path / "run")["episodes"]) == 64


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (2, 4))]


@pytest.mark.parametrize("before, after", [(2, 1), *SLOW])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, before, after):
    run_dir = tmp_path / "run"
    flags = f"{SMALL} --eval-episodes 0 --total-timesteps 512 --run-dir {run_dir}"
    assert torchrun(before, DISCRETE, *flags.split()).returncode == 0
    saved = checkpoint(run_dir)
    done = torchrun(after, DISCRETE, "--resume", run_dir, "--total-timesteps", 1024)
    assert done.returncode == 0 and "from step 512" in done.stdout, done.stderr
    assert "episodes restart" not in done.stdout + done.stderr
    resumed = checkpoint(run_dir)
    assert resumed["global_step"] == 1024 and len(resumed["random"]) == after and len(resumed["episodes"]) == 8
    assert [step for step, _ in logged(run_dir, "losses/kl")] == [128 * i for i in range(1, 9)]
    assert saved["recent"] == resumed["recent"][: len(saved["recent"])]


def test_two_ranks_resume_bit_for_bit(tmp_path):
    for name, totals in (("straight", [768]), ("resumed", [384, 768])):
        for part, total in enumerate(totals):
            first = f"{SMALL} --eval-episodes 0 --no-anneal-lr --final-temperature 1 --run-dir"  # nothing by the total
            flags = f"{'--resume' if part else first} {tmp_path / name}"
            done = torchrun(2, DISCRETE, *flags.split(), "--total-timesteps", total)
            assert done.returncode == 0, done.stderr
    straight, resumed = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "resumed")
    assert all(torch.equal(straight["agent"][key], resumed["agent"][key]) for key in straight["agent"])


def test_what_does_not_divide_is_refused(tmp_path, monkeypatch, capsys):
    done = torchrun(2, DISCRETE, "--num-envs", 7, "--run-dir", tmp_path / "run")
    assert done.returncode != 0 and errors(done.stderr) and not (tmp_path / "run").exists()
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]

    script = load(DISCRETE)
    whole = script.Args(num_envs=2, num_steps=4, num_minibatches=4)
    script.check(whole)
    monkeypatch.setattr(script, "ranks", lambda: (0, 4))
    for args in (whole, script.Args(num_envs=4, num_steps=2, num_minibatches=4)):
        with pytest.raises(SystemExit, match="2"):
            script.check(args)
        assert "must divide by 4 ranks" in capsys.readouterr().err


# Faults


def start(tmp_path, script, *flags, restarts=0):
    """A job of two ranks, and the process ids of its ranks once it has trained to its second checkpoint."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", str(restarts), script, *flags]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "checkpoint.prev.pt").exists():
        assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()  # no `ps` on a slim image
    pids = sorted(int(pid) for pid in children.split())
    assert len(pids) == 2
    return process, pids


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_restarts_the_job_from_its_checkpoint(tmp_path, victim):
    flags = f"{SMALL} --eval-episodes 1 --checkpoint-interval 5 --total-timesteps 25600 --run-dir {tmp_path / 'run'}"
    process, pids = start(tmp_path, DISCRETE, *flags.split(), restarts=1)
    os.kill(pids[victim], signal.SIGKILL)
    assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert re.search(r"from step [1-9]\d+", text)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == 25_600
    assert [step for step, _ in logged(tmp_path / "run", "losses/kl")] == [128 * i for i in range(1, 201)]


def test_a_restart_never_goes_on_with_another_jobs_run(tmp_path):
    flags = f"{SMALL} --total-timesteps 256 --run-dir {tmp_path / 'run'}"
    subprocess.run([sys.executable, DISCRETE, *flags.split()], check=True, timeout=60)
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    flags = f"{SMALL} --total-timesteps 512 --run-dir {tmp_path / 'run'}"
    done = torchrun(2, "--max-restarts", 1, DISCRETE, *flags.split())
    assert done.returncode != 0 and "is taken" in done.stdout + done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_restarts_need_a_name_for_the_job(tmp_path):
    flags = f"{SMALL} --total-timesteps 256 --run-dir {tmp_path / 'run'}"
    unnamed = [word for word in TORCHRUN if word != "--standalone"]
    command = [*unnamed, "--master-port", "0", "--max-restarts", "1", DISCRETE, *flags.split()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode != 0 and "--max-restarts needs --standalone or --rdzv-id" in done.stderr
    assert not (tmp_path / "run").exists()


def test_restarts_are_refused_over_several_machines(trainer, tmp_path, monkeypatch, capsys):
    """Each machine's TORCHELASTIC_RESTART_COUNT counts its own ranks' deaths only."""
    monkeypatch.setattr(sys, "argv", [trainer.__file__, "--run-dir", str(tmp_path / "run")])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    trainer.parse_args()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit, match="2"):
        trainer.parse_args()
    err = capsys.readouterr().err
    assert err.startswith("error: --max-restarts works on one machine") and err.count("\n") == 1


def test_restarts_without_a_folder_are_refused(trainer, tmp_path, monkeypatch, capsys):
    """A restart would begin anew, in another folder."""
    monkeypatch.setattr(sys, "argv", [trainer.__file__])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit, match="2"):
        trainer.parse_args()
    err = capsys.readouterr().err
    assert err.startswith("error: --max-restarts needs --run-dir or --resume") and err.count("\n") == 1


def test_another_launchers_variables_make_no_ranks(tmp_path):
    flags = f"{SMALL} --total-timesteps 256 --run-dir {tmp_path / 'run'}"
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    command = [sys.executable, DISCRETE, *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "CartPole-v1 on cpu" in done.stdout
    assert len(checkpoint(tmp_path / "run")["random"]) == 1


def test_another_launchers_local_rank_chooses_no_gpu(trainer, monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, value in (("is_available", True), ("device_count", 1), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert trainer.start_ranks(trainer.Args()) == torch.device("cuda", 0) and chosen == [0]


def test_a_rank_that_hangs_ends_the_job_in_a_line(tmp_path):
    source = DISCRETE.read_text()
    assert "RANK_TIMEOUT = timedelta(minutes=10)" in source
    script = tmp_path / "impatient.py"
    script.write_text(source.replace("RANK_TIMEOUT = timedelta(minutes=10)", "RANK_TIMEOUT = timedelta(seconds=5)"))
    flags = f"{SMALL} --checkpoint-interval 2 --total-timesteps 100000000 --run-dir {tmp_path / 'run'}"
    process, pids = start(tmp_path, script, *flags.split())
    os.kill(pids[1], signal.SIGSTOP)
    try:
        deadline = time.time() + 60
        with pytest.raises(ProcessLookupError):  # the other rank ends of itself, and torchrun reaps it
            while time.time() < deadline:
                os.kill(pids[0], 0)
                time.sleep(0.1)
    finally:
        os.kill(pids[1], signal.SIGKILL)  # as torchrun does, but only 30 seconds later
    assert process.wait(timeout=60) != 0
    (line,) = errors((tmp_path / "log").read_text())
    assert "waited in vain for the other ranks" in line
    assert checkpoint(tmp_path / "run")["global_step"] > 0


def test_a_signal_to_torchrun_ends_all_ranks_with_a_checkpoint(tmp_path):
    flags = f"{SMALL} --checkpoint-interval 1000000 --total-timesteps 100000000 --run-dir {tmp_path / 'run'}"
    command = [*TORCHRUN, "--nproc-per-node", "2", str(DISCRETE), *flags.split()]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    while not list((tmp_path / "run").glob("events*")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    process.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    assert "go on with --resume" in text and errors(text) == []
    assert checkpoint(tmp_path / "run")["global_step"] == logged(tmp_path / "run", "losses/kl")[-1][0]


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    flags = f"{SMALL} --checkpoint-interval 2 --total-timesteps 100000000 --run-dir {tmp_path / 'run'}"
    process, pids = start(tmp_path, DISCRETE, *flags.split())
    os.kill(pids[1], signal.SIGTERM)
    process.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    assert "go on with --resume" in text and errors(text) == []
    one, other = checkpoint(tmp_path / "run")["random"]
    assert not torch.equal(one["torch"], other["torch"])


def test_ranks_that_differ_are_found(tmp_path):
    """A rank whose parameters were changed by something else ends the job at the next checkpoint."""
    driver = tmp_path / "driver.py"
    patch = "update = trainer.update\ndef broken(agent, *rest):\n    result = update(agent, *rest)\n"
    patch += "    agent.value_head.bias.data += 1e-6 * rank\n    return result\ntrainer.update = broken\n"
    driver.write_text(DRIVER.replace("trainer.train(", patch + "trainer.train("))
    args = {"num_envs": 8, "num_steps": 16, "total_timesteps": 256, "cuda": False, "run_dir": str(tmp_path / "run")}
    done = torchrun(2, driver, DISCRETE, json.dumps(args))
    assert done.returncode != 0 and all("parameters differ" in line for line in errors(done.stderr))
    assert errors(done.stderr) and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_is_not_finite_on_one_rank_stops_all(tmp_path):
    """No rank takes the step, both end in a line, and the checkpoint before stays."""
    driver = tmp_path / "driver.py"
    patch = """
update, moved = trainer.update, []
def poisoned(agent, optimizer, rollout, advantages, returns, *rest):
    before = trainer.digest(agent)
    if len(moved) == 2 and rank == 1:
        returns = returns + float("inf")
    result = update(agent, optimizer, rollout, advantages, returns, *rest)
    moved.append(trainer.digest(agent) != before)
    with open(f"rank{rank}", "w") as file:
        json.dump(moved, file)
    return result
trainer.update = poisoned
"""
    driver.write_text(DRIVER.replace("trainer.train(", patch + "trainer.train("))
    args = {"num_envs": 8, "num_steps": 16, "total_timesteps": 640, "cuda": False, "checkpoint_interval": 2}
    done = torchrun(2, driver, DISCRETE, json.dumps(args | {"run_dir": str(tmp_path / "run")}), cwd=tmp_path)
    assert done.returncode != 0
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == [True, True, False]
    assert errors(done.stderr) and all("iteration 3: not finite" in line for line in errors(done.stderr))
    assert "SIGABRT" not in done.stderr  # as gloo's threads may end a rank that just exits
    assert checkpoint(tmp_path / "run")["iteration"] == 2
