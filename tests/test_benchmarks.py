"""The scripts in benchmarks/ run, and the records they write hold what they say."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, load
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

SCRIPTS = sorted({*(ROOT / "benchmarks").glob("*.py")} - {ROOT / "benchmarks" / "time_limit_env.py"})


def program(name, *flags, **options):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load(ROOT / "benchmarks" / "learning.py")


def test_throughput_records_the_parts_and_the_trainer(tmp_path):
    path = tmp_path / "record.json"
    short = ["--turns", 1, "--iterations", 4, "--seconds", 0]
    done = program("throughput.py", "discrete", *short, "--flags", "--num-envs 8 --no-cuda", "--record", path)
    assert done.returncode == 0, done.stderr
    (turn,) = json.loads(path.read_text())["turns"]
    parts = [turn[name] for name in ("environments", "policy", "update")]
    assert turn["serial_bound"] == pytest.approx(1 / sum(1 / part for part in parts))
    assert turn["trainer_to_serial_bound"] == pytest.approx(turn["trainer"] / turn["serial_bound"])
    assert turn["trainer"] > 0 and turn["trainer_peak_mib"] > 50


def test_learning_records_runs_and_their_curves(tmp_path):
    path = tmp_path / "record.json"
    short = ["--total-timesteps", 8192, "--eval-episodes", 2]
    done = program("learning.py", "CartPole-v1", "--seeds", 2, 1, *short, "--threshold", 12, "--record", path)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert [run["seed"] for run in record["runs"]] == [1, 2] and record["failed"] == 0
    assert record["mean"] == pytest.approx(sum(run["eval_return_mean"] for run in record["runs"]) / 2)
    for run in record["runs"]:
        assert run["curve"]["step"] == [2048, 4096, 6144, 8192] and run["threshold"]["held"]["step"] == 2048
        assert run["games_until_step"] == 8192 and run["mean_last_20_games"] > 12


def test_a_command_line_that_cannot_work_leaves_the_record_as_it_was(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("kept")
    done = program("learning.py", "CartPole-v1", "--total-timesteps", "100", "--record", path)
    assert done.returncode == 2 and path.read_text() == "kept"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --total-timesteps must be at least one rollout")


def test_a_record_needs_no_git(learning, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert learning.about({})["commit"] is None


@pytest.mark.parametrize(
    "scores, reached, held",
    [([1, 18, 17, 18, 19], 2, 4), ([20, 19, 18], 1, 1), ([1, 2, 18], 3, 3), ([18, 17], 1, None), ([1, 2], None, None)],
)
def test_a_threshold_is_reached_and_held_at_the_right_points(learning, tmp_path, scores, reached, held):
    """`iteration` looks at the other curve, which is logged one step later here."""
    (tmp_path / "args.json").write_text('{"args": {"seed": 1}, "command": ["x.py"], "commit": "", "versions": {}}')
    writer = EventFileWriter(str(tmp_path))
    for step, score in enumerate(scores, 1):
        for tag, shift in (("charts/episodic_return_100", 0), ("charts/episodic_return", 1)):
            value = Summary.Value(tag=tag, simple_value=score)
            writer.add_event(Event(wall_time=100.0 + step, step=step + shift, summary=Summary(value=[value])))
    writer.close()
    found = learning.read_run(tmp_path, threshold=18)["threshold"]
    steps = {name: found[name] and found[name]["step"] for name in ("reached", "held", "iteration")}
    assert steps == {"reached": reached, "held": held, "iteration": reached and reached + 1}


@pytest.mark.parametrize("code, told", [(3, 3), (-9, 1)])
def test_a_command_that_failed_ends_its_benchmark_without_a_traceback(learning, code, told):
    def main():
        raise subprocess.CalledProcessError(code, "trainer")

    with pytest.raises(SystemExit) as stop:
        learning.start(main)
    assert stop.value.code == told and stop.value.__suppress_context__


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_needs_no_optional_package(script, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('none here')")
    done = program(script.name, "--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    if script.name == "plot.py":
        assert done.returncode == 2 and done.stderr == "error: `pip install matplotlib` first: none here\n"
    else:
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_a_damaged_record_is_named_by_one_error(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "learning_CartPole-v1.json").write_text('{"runs": [')
    done = program("plot.py", "classic_control", "--results", tmp_path, "--to", tmp_path / "figures")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"classic_control: is a record in {tmp_path} damaged" in done.stderr
