"""Killed processes, damaged files, full disks and wild command lines: a run ends in one line and loses nothing."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import pty
import random
import re
import resource
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, Payload, load, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DISCRETE = ROOT / "ppo_clip_discrete.py"
ATARI = ROOT / "ppo_clip_atari.py"
EXPORT = ROOT / "export_policy.py"
SMALL = {
    DISCRETE: "--num-envs 8 --num-steps 16 --update-epochs 2 --eval-episodes 1 --no-cuda",
    ATARI: "--env-id ALE/Pong-v5 --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --eval-episodes 0"
    " --no-cuda",
}


def start(script, *flags, **options):
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path, process, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.0005)


def checkpoint(run_dir, name="checkpoint.pt"):
    return torch.load(run_dir / name, weights_only=True)


def logged_steps(run_dir):
    return [e.step for e in EventAccumulator(str(run_dir)).Reload().Scalars("losses/kl")]


def lines(text, word):
    return [line for line in text.splitlines() if line.startswith(word)]


@pytest.fixture(scope="module")
def discrete():
    return load(DISCRETE)


@pytest.fixture(scope="module")
def atari_trainer():
    return load(ATARI)


@pytest.fixture(scope="module")
def finished(discrete, tmp_path_factory):
    """A finished small run's folder; tests copy what they damage."""
    run_dir = tmp_path_factory.mktemp("runs") / "Läufe"
    flags = f"{SMALL[DISCRETE]} --total-timesteps 512 --checkpoint-interval 1 --run-dir {run_dir}"
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}  # as where the terminal knows no more
    out, err = start(DISCRETE, *flags.split(), env=environ).communicate()
    assert "L\\xe4ufe" in out and not err and (run_dir / "result.json").exists()
    return run_dir


# Killed processes


def kill_and_resume(script, run_dir, kills, iterations, seed):
    """Kills the run `kills` times with SIGKILL, every third time within a checkpoint's write, then lets it end."""
    chance, batch, interval = random.Random(seed), 128 if script == DISCRETE else 32, 5
    flags = f"{SMALL[script]} --total-timesteps {iterations * batch} --checkpoint-interval {interval}"
    process = start(script, *flags.split(), "--run-dir", run_dir)
    for kill in range(kills):
        wait_for(run_dir / "args.json", process)
        written = len(list(run_dir.glob("events*")))
        while kill and len(list(run_dir.glob("events*"))) == written and process.poll() is None:
            time.sleep(0.002)  # the new start opens a new event file when it is about to train
        if kill % 3 == 0:
            deadline = time.time() + 20
            while not (run_dir / "checkpoint.pt.tmp").exists() and process.poll() is None and time.time() < deadline:
                pass
        else:
            time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
        before = logged_steps(run_dir) if list(run_dir.glob("events*")) else []
        saved = checkpoint(run_dir)["iteration"] if (run_dir / "checkpoint.pt").exists() else 0
        if before:
            assert before[-1] // batch - saved <= interval
        process = start(script, "--resume", run_dir)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert not list(run_dir.glob("*.tmp"))
    assert json.loads((run_dir / "result.json").read_text())["global_step"] == iterations * batch
    assert logged_steps(run_dir) == [batch * i for i in range(1, iterations + 1)]  # no overlap, no gap


def test_killed_three_times(tmp_path):
    kill_and_resume(DISCRETE, tmp_path / "run", kills=3, iterations=300, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("path, iterations", [(DISCRETE, 2000), (ATARI, 400)], ids=["discrete", "atari"])
def test_killed_25_times(tmp_path, path, iterations):
    kill_and_resume(path, tmp_path / "run", kills=25, iterations=iterations, seed=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_of_the_last_step(tmp_path, number):
    process = start(DISCRETE, *f"{SMALL[DISCRETE]} --total-timesteps 100000000 --run-dir {tmp_path / 'run'}".split())
    assert process.stdout.readline().startswith("CartPole-v1 on")
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == ""
    assert "go on with --resume" in out.splitlines()[-1]
    assert checkpoint(tmp_path / "run")["global_step"] == logged_steps(tmp_path / "run")[-1]


@pytest.mark.parametrize("path", [DISCRETE, ATARI], ids=["discrete", "atari"])
def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_before_its_evaluation(
    path, tmp_path, monkeypatch, capsys
):
    script = load(path)
    save = script.save_checkpoint

    def interrupted(run_dir, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save(run_dir, state)

    monkeypatch.setattr(script, "save_checkpoint", interrupted)
    flags = f"{SMALL[path]} --total-timesteps 128 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [str(path), *flags.split()])
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        script.train(script.parse_args())
    assert f"stopped at step 128: go on with --resume {tmp_path / 'run'}\n" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run")["global_step"] == 128 and not (tmp_path / "run" / "result.json").exists()


def test_an_interrupt_before_the_training(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = start(DISCRETE, "--env-id", "slow:Slow-v0", "--run-dir", tmp_path / "run", env=environ)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "" and not (tmp_path / "run").exists()


def test_a_second_signal_ends_at_once(tmp_path):
    flags = "--num-envs 64 --num-steps 16384 --update-epochs 50 --total-timesteps 100000000"  # minutes an iteration
    process = start(DISCRETE, *flags.split(), "--run-dir", tmp_path / "run")
    assert process.stdout.readline().startswith("CartPole-v1 on")
    time.sleep(1)
    process.terminate()
    time.sleep(1)
    assert process.poll() is None  # the first one waits for the iteration's end
    process.terminate()
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_a_resumed_run_tells_the_speed_of_this_start(discrete, tmp_path, capsys):
    """Its ETA too: the earlier start may have stood on a slower machine. The result's `sps` counts both."""
    args = discrete.Args(total_timesteps=2048 * 5, resume=str(tmp_path))
    report = discrete.Report(args, tmp_path, 2048, [2048, 1e6], [])
    report.bar.disable = True
    for number in range(2, 6):
        report.iteration(2048 * number, {}, {}, [])
    report.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert int(re.search(r"(\d+) steps/s  ETA 0 s", line)[1]) > 100
    assert report.timed[0] == 3 * 2048 and report.timed[1] > 1e6


def test_scores_and_lengths_are_told_apart(discrete, tmp_path):
    report = discrete.Report(discrete.Args(), tmp_path, 0, [0, 0.0], [])
    report.iteration(128, {}, {}, [(50.0, 3), (70.0, 5)])
    report.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    names = ("episodic_return", "episodic_length", "episodic_return_100")
    assert [events.Scalars(f"charts/{name}")[0].value for name in names] == [60.0, 4.0, 60.0]


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(trainer, tmp_path, monkeypatch):
    """The file with all its bytes, then the rename, then the folder that holds the name."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        if stat.S_ISDIR(status.st_mode):
            assert os.path.samestat(status, os.stat(tmp_path / "run"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(Path(new).name) or replace(old, new))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_bytes(b"earlier")
    trainer.write_file(tmp_path / "run" / "file", b"content", tmp_path / "run" / "kept")
    assert events == [7, "kept", "file", "folder"]


def test_a_signal_that_torchrun_forwards_does_not_count_twice(trainer, monkeypatch):
    def end(code):
        raise InterruptedError(code)

    now = [1000.0]
    monkeypatch.setattr(trainer.os, "_exit", end)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    caught = trainer.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.4
    os.kill(os.getpid(), signal.SIGTERM)
    assert caught == [signal.SIGINT, signal.SIGTERM]
    now[0] += 0.2  # 0.6 seconds after the first
    with pytest.raises(InterruptedError, match="130"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def test_a_resumed_run_takes_no_other_arguments(trainer, tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text(json.dumps({"args": dataclasses.asdict(trainer.Args())}))

    def resume(**changes):
        parsed = iter([{"resume": str(tmp_path)}, changes])
        monkeypatch.setattr(trainer, "cli", lambda default: dataclasses.replace(default, **next(parsed)))
        return trainer.parse_args()

    def other(value):
        if isinstance(value, bool):
            return not value
        return 0.5 if value is None else value + ("x" if isinstance(value, str) else 1)

    changes = {name: other(value) for name, value in vars(trainer.Args()).items() if name != "resume"}
    free = {name: changes.pop(name) for name in ("cuda", "eval_episodes", "capture_video", "total_timesteps")}
    for name, value in (free | {"run_dir": str(tmp_path)}).items():
        assert getattr(resume(**{name: value}), name) == value
    for name, value in (changes | {"total_timesteps": trainer.Args().total_timesteps - 1}).items():
        with pytest.raises(SystemExit, match="2"):
            resume(**{name: value})
        assert f"--{name.replace('_', '-')} {value} contradicts the run's" in capsys.readouterr().err


def test_a_resumed_run_may_name_its_folder_twice(trainer, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"args": dataclasses.asdict(trainer.Args())}))
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "run/", str(tmp_path / "run")):
        monkeypatch.setattr(sys, "argv", [trainer.__file__, "--resume", "run", "--run-dir", folder])
        assert trainer.parse_args().resume == "run"
    sys.argv[-1] = "other"
    with pytest.raises(SystemExit, match="2"):
        trainer.parse_args()
    assert "--run-dir other contradicts the run's run" in capsys.readouterr().err


def test_a_resumed_run_is_checked_too(trainer, tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text(json.dumps({"args": dataclasses.asdict(trainer.Args())}))
    monkeypatch.setattr(sys, "argv", ["trainer", "--resume", str(tmp_path), "--eval-episodes", "-1"])
    with pytest.raises(SystemExit, match="2"):
        trainer.parse_args()
    assert capsys.readouterr().err == "error: --eval-episodes must be 0 or more\n"


def test_checkpoints_come_at_their_interval_and_hold_the_time(trainer, tmp_path, monkeypatch):
    """Training time without each start's first two iterations, and the wall time, both over all starts."""
    saved, save = [], trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda folder, state: saved.append(state) or save(folder, state))
    args = small(trainer, tmp_path / "run", checkpoint_interval=2)
    began = time.time()
    trainer.train(args)
    assert [state["iteration"] for state in saved] == [2, 4, 5]
    assert [state["timed"][0] for state in saved] == [0, 2 * 32, 3 * 32]
    assert 0 < saved[2]["timed"][1] < saved[2]["seconds"] < time.time() - began
    monkeypatch.setattr(sys, "argv", [trainer.__file__, "--resume", args.run_dir, "--total-timesteps", "256"])
    trainer.train(trainer.parse_args())
    assert [state["iteration"] for state in saved[3:]] == [6, 8]
    assert [state["timed"][0] for state in saved[3:]] == [3 * 32, 4 * 32]
    first, last = saved[2], saved[-1]
    assert first["timed"][1] < last["timed"][1] < last["seconds"] < time.time() - began
    assert first["seconds"] < last["seconds"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["sps"] == pytest.approx(last["timed"][0] / last["timed"][1])


def test_the_result_is_of_the_evaluation(trainer, tmp_path, monkeypatch, capsys):
    def finish(**changes):
        args = trainer.Args(seed=7, total_timesteps=20_000, **changes)
        trainer.finish(None, args, tmp_path, torch.device("cpu"), time.monotonic() - 50, report)
        return json.loads((tmp_path / "result.json").read_text()), args

    report = SimpleNamespace(timed=[3000, 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda agent, args, episodes, device: [1.0, 2.0, 6.0][:episodes])
    result, args = finish(eval_episodes=3)
    assert "evaluation: mean return 3.0 +/- 2.2 over 3 episodes" in capsys.readouterr().out
    assert result["eval_return_mean"] == 3 and result["eval_return_std"] == pytest.approx(np.sqrt(14 / 3))
    assert result["eval_episodes"] == 3 and result["sps"] == 1500 and 50 <= result["wall_seconds"] < 60
    assert result["seed"] == 7 and result["env_id"] == args.env_id
    assert result["global_step"] == 20_000 // args.batch_size * args.batch_size
    scored = {key: result[key] for key in result if key.startswith("eval_")}
    assert scored.items() <= finish(eval_episodes=0)[0].items()  # of the same policy
    state = result | {"global_step": 4096}
    for before in (json.dumps(state), "{", "[]"):  # of another policy, or nothing to keep
        (tmp_path / "result.json").write_text(before)
        assert finish(eval_episodes=0)[0]["eval_return_mean"] is None
    report.timed = [0, 0.0]
    result, _ = finish(eval_episodes=0)
    assert result["eval_return_mean"] is result["eval_return_std"] is result["sps"] is None
    assert result["eval_episodes"] == 0


def test_the_last_hundred_scores_are_averaged(trainer, tmp_path):
    report = trainer.Report(trainer.Args(), tmp_path, 0, [0, 0.0], [1e6] * 3 + [1.0] * 60)
    report.iteration(128, {}, {}, [(2.0, 1)] * 40)
    report.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Scalars("charts/episodic_return_100")
    assert event.value == pytest.approx((60 * 1 + 40 * 2) / 100)
    assert len(report.recent) == 100


def test_every_start_and_every_source_of_a_run_is_kept(trainer, tmp_path, monkeypatch):
    run_dir = trainer.open_run(small(trainer, tmp_path / "run"))
    for number in (1, 2):
        monkeypatch.setattr(trainer, "SOURCE", b"# source %d" % number)
        monkeypatch.setattr(sys, "argv", ["start", str(number)])
        trainer.open_run(small(trainer, None, resume=str(run_dir)))
    record = json.loads((run_dir / "args.json").read_text())
    assert len(record["earlier_starts"]) == 2 and record["earlier_starts"][1]["command"] == ["start", "1"]
    stem = Path(trainer.__file__).stem
    assert (run_dir / f"{stem}.1.py").read_bytes() == Path(trainer.__file__).read_bytes()
    assert (run_dir / f"{stem}.2.py").read_bytes() == b"# source 1"
    assert (run_dir / f"{stem}.py").read_bytes() == b"# source 2"


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
@pytest.mark.parametrize("path", [DISCRETE, ATARI], ids=lambda path: path.stem)
def test_the_commit_is_the_scripts(path, tmp_path, monkeypatch):
    """Not that of the folder where it is started."""
    for name in ("script", "elsewhere"):
        git = ["git", "-C", str(tmp_path / name), "-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", "init", "-q", str(tmp_path / name)], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", name], check=True)
    (tmp_path / "script" / path.name).write_bytes(path.read_bytes())
    trainer = load(tmp_path / "script" / path.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_dir = trainer.open_run(small(trainer, tmp_path / "run"))
    git = ["git", "-C", str(tmp_path / "script"), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    assert json.loads((run_dir / "args.json").read_text())["commit"] == commit


def test_a_run_needs_no_git(trainer, tmp_path, monkeypatch):
    """A slim image has none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run_dir = trainer.open_run(small(trainer, tmp_path / "run"))
    assert json.loads((run_dir / "args.json").read_text())["commit"] is None


def test_atari_resumes_everything_but_the_emulators(atari_trainer, tmp_path, monkeypatch, capsys):
    flags = f"{SMALL[ATARI]} --update-epochs 2 --target-entropy 1 --final-temperature 0.25 --total-timesteps 96"
    flags += f" --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [str(ATARI), *flags.split()])
    with monkeypatch.context() as patch:  # no whole game ends so soon
        patch.setattr(atari_trainer.Episodes, "take_ended", lambda self: [(7.0, 3)])
        atari_trainer.train(atari_trainer.parse_args())
    saved = checkpoint(tmp_path / "run")
    seen = {}

    def first_collect(agent, episodes, rollout, args, act):
        seen.update(agent=agent.state_dict(), random=atari_trainer.get_random_states(), episodes=episodes)

    def first_update(agent, optimizer, rollout, advantages, returns, ent_coef, *rest):
        seen.update(optimizer=optimizer.state_dict(), ent_coef=ent_coef, lr=float(optimizer.lr))
        raise SystemExit(7)

    class Report(atari_trainer.Report):
        def __init__(self, args, run_dir, global_step, timed, recent):
            seen.update(recent=recent, timed=timed)
            super().__init__(args, run_dir, global_step, timed, recent)

    monkeypatch.setattr(atari_trainer, "Report", Report)
    monkeypatch.setattr(atari_trainer, "collect", first_collect)
    monkeypatch.setattr(atari_trainer, "update", first_update)
    monkeypatch.setattr(sys, "argv", [str(ATARI), "--resume", str(tmp_path / "run"), "--total-timesteps", "128"])
    with pytest.raises(SystemExit, match="7"):
        atari_trainer.train(atari_trainer.parse_args())
    assert all(torch.equal(seen["agent"][k], saved["agent"][k]) for k in saved["agent"])
    assert all(torch.equal(seen["optimizer"][k], saved["optimizer"][k]) for k in saved["optimizer"])
    assert seen["ent_coef"] == saved["ent_coef"] != 0.01
    assert saved["agent"]["temperature"] == 1  # c2 alone sets the entropy
    assert seen["lr"] == pytest.approx(3e-4 / 4)  # the last of four iterations
    (saved_random,) = saved["random"]
    assert torch.equal(seen["random"]["torch"], saved_random["torch"])
    assert seen["random"]["python"] == saved_random["python"]
    assert torch.equal(seen["random"]["numpy"][1], saved_random["numpy"][1])
    assert not seen["episodes"].returns.any() and not seen["episodes"].lengths.any()  # the cut games do not count
    assert (seen["recent"], seen["timed"]) == (saved["recent"], saved["timed"])
    assert saved["recent"] == [7.0] * 3 and saved["timed"][0] == 32  # of the third iteration
    assert set(seen["episodes"].seeds).isdisjoint(state["seed"] for state in saved["episodes"])  # other games


# Damaged files


def resume(discrete, run_dir, monkeypatch, capsys):
    """Loads the run's checkpoint: the state or None, standard error, exit code."""
    capsys.readouterr()
    try:
        return discrete.load_checkpoint(run_dir), capsys.readouterr().err, 0
    except SystemExit as stop:
        return None, capsys.readouterr().err, stop.code


def test_every_flipped_bit_is_found(discrete, finished, tmp_path, monkeypatch, capsys):
    good, previous = (finished / n for n in ("checkpoint.pt", "checkpoint.prev.pt"))
    data, chance = good.read_bytes(), random.Random(3)
    (tmp_path / "checkpoint.prev.pt").write_bytes(previous.read_bytes())
    for i in range(256):  # every region of the file in turn, its sha256 included
        place = len(data) * i // 256 + chance.randrange(len(data) // 256)
        flipped = bytearray(data)
        flipped[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
        (tmp_path / "checkpoint.pt").write_bytes(flipped)
        state, err, code = resume(discrete, tmp_path, monkeypatch, capsys)
        assert code == 0 and state["iteration"] == 3, f"byte {place}"
        assert err.startswith("warning: ") and err.count("\n") == 1


def with_hash(data):
    return data + hashlib.sha256(data).digest()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_foreign_files_and_payloads(discrete, finished, tmp_path, monkeypatch, capsys):
    data, marker = (finished / "checkpoint.pt").read_bytes(), tmp_path / "pwned"
    bad = [b"", data[:31], data[:-1], data[: len(data) // 2], data + b"x", b"\0" * len(data), b"not a checkpoint"]
    bad += [saved({"agent": {}}), with_hash(b""), with_hash(pickle.dumps(Payload(marker)))]
    bad += [with_hash(saved(value)) for value in (Payload(marker), [], 3, torch.zeros(2))]
    for content in bad:
        (tmp_path / "checkpoint.pt").write_bytes(content)
        state, err, code = resume(discrete, tmp_path, monkeypatch, capsys)
        assert code == 2 and state is None
        assert len(lines(err, "error: ")) == 1 and "no good checkpoint" in err and "Traceback" not in err
    assert not marker.exists()


@pytest.mark.parametrize("state", [{}, {"agent": {"x": torch.ones(1)}}, {"agent": 5}])
def test_a_whole_checkpoint_of_something_else(discrete, finished, tmp_path, monkeypatch, capsys, state):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(with_hash(saved(state)))
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        discrete.train(discrete.parse_args())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is not of this script and environment" in err
    for name in ("args.json", DISCRETE.name):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_another_source_gets_a_warning_and_goes_on_without_a_gap(finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / DISCRETE.name, "a") as snapshot:
        snapshot.write("# changed\n")
    process = start(DISCRETE, "--resume", tmp_path, "--total-timesteps", 768)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == f"warning: {DISCRETE.name} is not the source that began this run\n"
    assert logged_steps(tmp_path) == [128, 256, 384, 512, 640, 768]
    assert (tmp_path / DISCRETE.name).read_bytes() == DISCRETE.read_bytes()  # export builds the network from it
    assert (tmp_path / f"{DISCRETE.stem}.1.py").read_text().endswith("# changed\n")
    first, now = (json.loads((folder / "args.json").read_text()) for folder in (finished, tmp_path))
    (start_before,) = now["earlier_starts"]
    assert start_before == {key: first[key] for key in ("script", "command", "commit", "versions")}
    assert "--resume" in now["command"]


def test_a_damaged_checkpoint_never_replaces_the_good_one(finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    process = start(DISCRETE, "--resume", tmp_path, "--total-timesteps", 512)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(lines(err, "warning: ")) == 1
    assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == b"damaged"
    assert checkpoint(tmp_path)["iteration"] == 4
    assert checkpoint(tmp_path, "checkpoint.prev.pt")["iteration"] == 3


def test_a_checkpoint_that_cannot_be_read_stays(discrete, finished, tmp_path, capsys):
    (tmp_path / "checkpoint.prev.pt").write_bytes((finished / "checkpoint.prev.pt").read_bytes())
    (tmp_path / "checkpoint.pt").mkdir()  # as one of another user would, it raises an OSError
    with pytest.raises(SystemExit, match="2"):
        discrete.load_checkpoint(tmp_path)
    assert capsys.readouterr().err == f"error: {tmp_path / 'checkpoint.pt'} cannot be read: Is a directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


@pytest.mark.parametrize("wrong", [{"gamma": "x"}, {"gamma": None}, {"env_id": None}, {"num_envs": 8.0}, {"cuda": 0}])
def test_arguments_of_a_wrong_type_in_the_run_folder(discrete, finished, tmp_path, monkeypatch, capsys, wrong):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(record | {"args": record["args"] | wrong}))
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        discrete.parse_args()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "holds no run of this script" in err


@pytest.mark.parametrize("resumed", [False, True])
def test_one_process_a_run_folder(finished, tmp_path, resumed):
    for path in finished.iterdir() if resumed else ():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    how = ["--resume"] if resumed else [*SMALL[DISCRETE].split(), "--run-dir"]
    first = start(DISCRETE, *how, tmp_path, "--total-timesteps", 100_000_000)
    assert first.stdout.readline().startswith("CartPole-v1 on")
    second = start(DISCRETE, "--resume", tmp_path, "--total-timesteps", 200_000_000)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and out == ""
    assert err == f"error: another process trains in {tmp_path}: stop it, or choose another --run-dir\n"
    first.terminate()
    assert first.wait(timeout=60) == 128 + signal.SIGTERM


def test_a_folder_that_cannot_be_resumed_is_told_before_environments_start(trainer, tmp_path, monkeypatch, capsys):
    """Atari's emulators take a quarter of a minute."""
    monkeypatch.setattr(trainer, "make_envs", lambda *_, **__: pytest.fail("environments were made"))
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="2"):
        trainer.train(trainer.Args(resume=str(tmp_path)))
    assert lines(capsys.readouterr().err, "error: ") == [
        f"error: {tmp_path} has no good checkpoint: checkpoint.pt damaged; start a new run"
    ]


def test_a_run_folder_that_cannot_be_written(discrete, capsys):
    with pytest.raises(SystemExit, match="2"):
        discrete.lock_run_dir(discrete.Path("/proc"))
    err = capsys.readouterr().err
    assert err.startswith("error: /proc cannot be written: ") and err.count("\n") == 1


# Terminals that go away


def test_a_closed_pipe_ends_nothing(tmp_path):
    flags = f"{SMALL[DISCRETE]} --total-timesteps 2048 --run-dir {tmp_path / 'run'}"
    process = start(DISCRETE, *flags.split())
    assert process.stdout.readline().startswith("CartPole-v1 on cpu")
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    assert checkpoint(tmp_path / "run")["iteration"] == 16 and (tmp_path / "run" / "result.json").exists()


def test_no_output_at_all(tmp_path):
    flags = f"{SMALL[DISCRETE]} --total-timesteps 256 --run-dir {tmp_path / 'run'}"
    process = start(DISCRETE, *flags.split(), preexec_fn=lambda: os.close(1))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


@pytest.mark.parametrize("terminal", [False, True], ids=["a pipe", "a terminal"])
def test_a_signal_after_the_output_is_gone(tmp_path, terminal):
    master, slave = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(DISCRETE), *f"{SMALL[DISCRETE]} --total-timesteps 100000000".split()],
        cwd=tmp_path,
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(slave)
    assert os.read(master, 14) == b"CartPole-v1 on"
    time.sleep(0.5)
    os.close(master)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM and process.stderr.read() == ""
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoint(run_dir)["global_step"] == logged_steps(run_dir)[-1]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_during_the_evaluation(tmp_path, ignored):
    """Ends it at once, unless the run was started to ignore it, as a shell's `&` does with SIGINT."""
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    flags = f"{SMALL[DISCRETE]} --total-timesteps 2048 --eval-episodes 500 --run-dir {tmp_path / 'run'}"
    process = start(DISCRETE, *flags.split(), preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    while not process.stdout.readline().startswith("evaluating"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == (0 if ignored else 128 + signal.SIGINT)
    assert (tmp_path / "run" / "result.json").exists() == ignored


@pytest.mark.parametrize("ignored", [False, True], ids=["alone", "under nohup"])
def test_a_terminal_that_hangs_up(tmp_path, ignored):
    total = 20_480 if ignored else 100_000_000
    flags = f"{SMALL[DISCRETE]} --eval-episodes 0 --checkpoint-interval 1000000 --run-dir {tmp_path / 'run'}"
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = start(
        DISCRETE,
        *flags.split(),
        "--total-timesteps",
        total,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
    )
    while not list((tmp_path / "run").glob("events*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == (0 if ignored else 128 + signal.SIGHUP)
    step = checkpoint(tmp_path / "run")["global_step"]
    assert step == logged_steps(tmp_path / "run")[-1] and (step == total) == ignored


# Full disks


def test_full_disk_while_a_checkpoint_is_written(discrete, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        discrete.save_checkpoint(tmp_path, {"iteration": 9})
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "No space left" in err and str(tmp_path) in err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint(tmp_path)["iteration"] == 4


def test_full_disk_at_the_start_leaves_a_folder_that_can_be_used(discrete, tmp_path, monkeypatch, capsys):
    args = discrete.Args(run_dir=str(tmp_path / "run"))
    replace = os.replace

    def full(old, new):
        if new.name == "args.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit, match="1"):
            discrete.open_run(args)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left" in err and "start again" in err and "--resume" not in err
    assert discrete.open_run(args) == tmp_path / "run"
    assert (tmp_path / "run" / "args.json").exists()


def test_a_file_system_that_cannot_sync_a_folder(discrete, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    discrete.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [None, Exception("frames of different sizes")])
def test_a_film_that_cannot_be_written(discrete, finished, tmp_path, monkeypatch, capsys, error):
    film = tmp_path / "run" / "video.mp4"
    shutil.copytree(finished, tmp_path / "run")
    film.write_bytes(b"an earlier one")

    def full(path, **_):
        Path(path).write_bytes(b"its beginning")
        if error:
            raise error

    clip = SimpleNamespace(write_videofile=full)
    monkeypatch.setattr("moviepy.ImageSequenceClip", lambda *_, **__: clip)  # ends as if all were well
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), "--resume", str(tmp_path / "run"), "--capture-video"])
    with pytest.raises(SystemExit, match="1"):
        discrete.train(discrete.parse_args())
    out, err = capsys.readouterr()
    assert err.startswith(f"error: cannot film {film}, is the disk full?") and err.count("\n") == 1
    assert "evaluation: " in out and "video: " not in out
    assert film.read_bytes() == b"an earlier one" and not list(film.parent.glob("*.tmp*"))


@pytest.mark.parametrize("changed", [{"num_envs": 16}, {"num_envs": 4}, {"num_steps": 32}], ids=str)
def test_a_checkpoint_of_another_shape_is_refused(discrete, finished, tmp_path, monkeypatch, capsys, changed):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(record | {"args": record["args"] | changed}))
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), "--resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        discrete.train(discrete.parse_args())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "its --num-envs or --num-steps are others" in err


def test_a_log_that_cannot_be_begun_ends_in_one_line(discrete, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(discrete, "SummaryWriter", full)
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), *SMALL[DISCRETE].split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="1"):
        discrete.train(discrete.parse_args())
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write the TensorBoard log") and err.count("\n") == 1


OUT_OF_MEMORY = "error: out of memory: raise --num-minibatches, or lower --num-envs, --num-steps or --eval-episodes"
LIMITED = r"""
import re, resource, runpy, sys
import ale_py.vector_env, torch
limit = 2 * 10**9 + 1024 * int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_more_memory_than_there_is(tmp_path):
    """7 GB of pixels, where 2 GB are left to have."""
    flags = f"{SMALL[ATARI]} --num-steps 524288 --total-timesteps 1048576 --run-dir {tmp_path / 'run'}"
    command = [sys.executable, "-c", LIMITED, str(ATARI), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(OUT_OF_MEMORY) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", [DISCRETE, ATARI])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        RuntimeError("a defect"),
        RuntimeError('a defect: INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":3085'),
    ],
)
def test_every_kind_of_too_little_memory(script, error, tmp_path, monkeypatch, capsys):
    """Any other error is a defect, whose traceback is wanted."""

    def scarce(_):
        raise error

    monkeypatch.setattr(torch, "manual_seed", scarce)
    monkeypatch.setattr(sys, "argv", [str(script), *SMALL[script].split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(RuntimeError if str(error).startswith("a defect") else SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    if stop.type is SystemExit:
        assert stop.value.code == 1 and capsys.readouterr().err == f"{OUT_OF_MEMORY} ({str(error) or 'MemoryError'})\n"


@pytest.mark.parametrize("script", [DISCRETE, ATARI])
def test_the_snapshot_is_the_source_that_ran(script, tmp_path):
    """Started through a link, and edited while it starts."""
    early = re.sub(r"(?m)^(SOURCE = .*)$", r"\1\nPath(__file__).write_bytes(SOURCE + b'# edited')", script.read_text())
    (tmp_path / "edited.py").write_text(early)
    (tmp_path / "link.py").symlink_to(tmp_path / "edited.py")
    flags = f"{SMALL[script]} --total-timesteps 128 --eval-episodes 0 --run-dir {tmp_path / 'run'}"
    process = start(tmp_path / "link.py", *flags.split())
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert (tmp_path / "edited.py").read_text() == early + "# edited"
    recorded = json.loads((tmp_path / "run" / "args.json").read_text())["script"]
    assert (tmp_path / "run" / Path(recorded).name).read_text() == early
    assert checkpoint(tmp_path / "run")["source"] == hashlib.sha256(early.encode()).hexdigest()


def test_full_disk_while_tensorboard_writes(tmp_path):
    """A file may grow to 200 kB here: the log is the first that meets the limit."""
    flags = f"{SMALL[DISCRETE]} --total-timesteps 100000000 --checkpoint-interval 20 --run-dir {tmp_path / 'run'}"
    limit = (200_000, 200_000)
    process = start(DISCRETE, *flags.split(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.count("\n") == 1 and "TensorBoard" in err and "Traceback" not in err
    assert checkpoint(tmp_path / "run")["iteration"] % 20 == 0


# The command line


@pytest.mark.parametrize("path", [DISCRETE, ATARI, EXPORT], ids=lambda path: path.stem)
@pytest.mark.parametrize("flags", ["--seed x --formats x", "--nonsense 1"])
def test_an_error_on_a_terminal_is_a_plain_line(path, flags):
    """The command line's library draws coloured boxes there."""
    master, slave = pty.openpty()
    command = [sys.executable, str(path), *flags.split()]
    done = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(slave)
    os.close(master)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not set(done.stderr) & set("\x1b│─╭╰") and done.stderr.endswith("(see --help)\n")


@pytest.mark.parametrize("flag", ["--resume", "--run-dir"])
def test_an_empty_name_of_a_folder(discrete, tmp_path, monkeypatch, capsys, flag):
    """As a job script has where its variable is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_clip_discrete.py", flag, ""])
    with pytest.raises(SystemExit, match="2"):
        discrete.parse_args()
    assert "need the name of a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--run-dir", "--exp-name"])
def test_a_name_that_is_no_text(discrete, tmp_path, monkeypatch, capsys, flag):
    """TensorBoard cannot write to it: not UTF-8, as a file name on Linux may be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_clip_discrete.py", flag, os.fsdecode(b"r\xff")])
    with pytest.raises(SystemExit, match="2"):
        discrete.train(discrete.parse_args())
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_no_name_leaves_the_folder_of_runs(discrete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert discrete.open_run(discrete.Args(exp_name="../../a/b")).parent == discrete.Path("runs")


def test_weights_and_biases_without_a_login_or_broken(discrete, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("no API key\nsee wandb login")

    for module, reason in ((SimpleNamespace(init=init), "no API key"), (None, "import of wandb halted")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(SystemExit, match="1"):
            discrete.start_wandb(discrete.Args(track=True), discrete.Path("runs/x"))
        err = capsys.readouterr().err
        assert err.startswith(f"error: --track: {reason}") and err.count("\n") == 1 and "--resume runs/x" in err


def test_a_finished_run_is_evaluated_anew_and_filmed(discrete, finished, tmp_path, monkeypatch, capfd):
    for name in ("SDL_VIDEODRIVER", "XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY"):  # as on a server
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    discrete.save_checkpoint(run_dir, checkpoint(run_dir) | {"seconds": 1000.0})
    before = checkpoint(run_dir)["agent"]
    arguments = ["--resume", str(run_dir), "--eval-episodes", "3", "--capture-video"]
    monkeypatch.setattr(sys, "argv", ["ppo_clip_discrete.py", *arguments])
    discrete.train(discrete.parse_args())
    result = json.loads((run_dir / "result.json").read_text())
    assert result["eval_episodes"] == 3 and 1000 < result["wall_seconds"] < 1100
    assert (run_dir / "video.mp4").stat().st_size > 500
    assert "error" not in capfd.readouterr().err  # pygame's, of a display that is not there
    assert all(torch.equal(x, before[name]) for name, x in checkpoint(run_dir)["agent"].items())


def test_a_film_can_be_left_out_where_its_package_is_missing(discrete, finished, tmp_path, monkeypatch):
    record = json.loads((finished / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(record | {"args": record["args"] | {"capture_video": True}}))
    monkeypatch.setattr(discrete.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        discrete.parse_args()
    sys.argv.append("--no-capture-video")
    assert discrete.parse_args().capture_video is False


def test_a_resume_without_a_checkpoint_says_so(discrete, tmp_path, monkeypatch, capsys):
    assert resume(discrete, tmp_path, monkeypatch, capsys)[:2] == (
        None,
        f"warning: {tmp_path} has no checkpoint yet: the run begins again\n",
    )


# Environments


class Broken(gym.Env):
    """Dies, or observes what is no number, after 100 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def __init__(self, how):
        self.how = how

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps >= 100 and self.how == "dies":
            raise ValueError("the motor fell off")
        if self.steps >= 100 and self.how == "quits":
            sys.exit()
        observed = float(self.how) if self.steps >= 100 and self.how != "dies" else 0.5
        return np.full(2, observed, np.float32), 1.0, False, self.steps % 10 == 0, {}


for how in ("dies", "quits", "nan", "inf", "1e30"):
    gym.register(f"Broken-{how}-v0", Broken, kwargs={"how": how})


@pytest.mark.parametrize(
    "how, part",
    [
        ("dies", "the motor fell off"),
        ("quits", "SystemExit"),
        ("nan", "not finite"),
        ("inf", "obs_stats"),
        ("1e30", "obs_stats"),
    ],
)
def test_a_broken_environment(discrete, tmp_path, monkeypatch, capsys, how, part):
    flags = f"--env-id Broken-{how}-v0 {SMALL[DISCRETE]} --checkpoint-interval 1 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [str(DISCRETE), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        discrete.train(discrete.parse_args())
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert how != "dies" or re.search(r"ValueError: the motor fell off \(\S+test_survival.py:\d+\); checkp", err)
    state = checkpoint(tmp_path / "run")
    assert state["iteration"] == 6
    assert all(torch.isfinite(value).all() for value in state["agent"].values())


@given(st.lists(st.floats(width=32), min_size=2, max_size=18))
@settings(max_examples=200, deadline=None)
def test_actions_are_never_out_of_range(logits):
    action = int(SAMPLER.sample(torch.tensor([logits]))[0])
    assert 0 <= action < len(logits)


SAMPLER = load(DISCRETE)


# Wild command lines

VALUES = st.one_of(
    st.sampled_from(["0", "-1", "1", "3", "1e400", "nan", "inf", "-inf", "99999999999999999999", "None", "True", ""]),
    st.text(max_size=12).filter(lambda s: "\0" not in s),
    st.integers().map(str),
    st.floats().map(str),
)


def command_lines(script):
    """Lists of known and unknown flags with wild values."""
    names = [f.replace("_", "-") for f in script.Args.__dataclass_fields__ if f not in ("resume", "run_dir", "run")]
    flag = st.one_of(st.sampled_from([f"--{n}" for n in names]), st.text(max_size=8).map(lambda s: "--" + s))
    pair = st.tuples(flag, VALUES).map(list)
    return st.lists(st.one_of(pair, flag.map(lambda f: [f])), max_size=4).map(
        lambda parts: [word for part in parts for word in part]
    )


def endure(script, path, arguments, check, monkeypatch, capfd):
    """Arguments are accepted, or refused in one line with exit code 2."""
    arguments = [a.replace("\0", "") for a in arguments]
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        try:
            check(script.parse_args())
        except SystemExit as stop:
            err = capfd.readouterr().err
            if stop.code:
                assert stop.code == 2, arguments
                assert err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
    assert not os.listdir(), arguments


def makes_environments(script, arguments):
    if arguments.num_envs * 4 < 100:
        script.make_envs(arguments, 1)


def fuzz(path, count, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    script = load(path)
    check = (lambda _: None) if path == EXPORT else (lambda arguments: makes_environments(script, arguments))

    @given(command_lines(script))
    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    def run(arguments):
        endure(script, path, arguments, check, monkeypatch, capfd)

    run()


@pytest.mark.parametrize("path", [DISCRETE, ATARI, EXPORT], ids=lambda path: path.stem)
def test_wild_command_lines(path, tmp_path, monkeypatch, capfd):
    fuzz(path, 50, tmp_path, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("path", [DISCRETE, ATARI, EXPORT], ids=lambda path: path.stem)
def test_many_wild_command_lines(path, tmp_path, monkeypatch, capfd):
    fuzz(path, 500, tmp_path, monkeypatch, capfd)
