"""A short run exported, and what must stop an export."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Payload, load, small
from gymnasium.envs.classic_control import AcrobotEnv

ROOT = Path(__file__).parent.parent
FILES = ("policy.onnx", "policy.torchscript.pt", "policy.json")


def program(*arguments, **options):
    """The exporter as a user starts it."""
    command = [sys.executable, str(ROOT / "export_policy.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def export(*arguments):
    """The same without a new Python, which takes longer to start than most policies to export."""
    exporter, errors, code = load(ROOT / "export_policy.py"), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["export_policy.py", *map(str, arguments)])
        try:
            exporter.export(exporter.parse_args())
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stderr=errors.getvalue())


@pytest.fixture(scope="module")
def exporter():
    return load(ROOT / "export_policy.py")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cartpole"
    flags = ["--total-timesteps", "4096", "--eval-episodes", "1", "--run-dir", str(folder)]
    subprocess.run([sys.executable, str(ROOT / "ppo_clip_discrete.py"), *flags], check=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "Läufe"
    done = program(run_dir, "--output-dir", folder, env=os.environ | {"PYTHONIOENCODING": "ascii"})  # a poor terminal
    assert done.returncode == 0 and "L\\xe4ufe" in done.stdout, done.stderr
    return folder


def test_files_agree_and_are_described(run_dir, exported):
    assert sorted(p.name for p in exported.iterdir()) == sorted(FILES)
    about = json.loads((exported / "policy.json").read_text())
    assert about["env_id"] == "CartPole-v1" and about["global_step"] == 4096 and about["action_meanings"] == ["0", "1"]
    assert about["first_action"] == 0 and about["score"]["eval_episodes"] == 1 and about["gamma"] == 0.995
    scale = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]["return_stats.var"].sqrt()
    assert float(re.search(r"divided by ([\d.]+), the run's reward scale", about["value_units"])[1]) == pytest.approx(
        float(scale), rel=1e-5
    )
    assert about["inputs"] == [{"name": "obs", "shape": ["batch", 4], "dtype": "float32"}]
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    session = onnxruntime.InferenceSession(exported / "policy.onnx")
    script = torch.jit.load(exported / "policy.torchscript.pt")
    for batch in (1, 5):
        obs = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
        logits, value, action = session.run(None, {"obs": obs})
        with torch.no_grad():
            its_logits, its_value, its_action = script(torch.from_numpy(obs))
        np.testing.assert_allclose(logits, its_logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value, its_value, rtol=1e-4, atol=1e-5)
        assert (action == its_action.numpy()).all() and value.shape == action.shape == (batch,)


def test_onnx_is_one_clean_file(run_dir, exported, tmp_path):
    data = (exported / "policy.onnx").read_bytes()
    for trace in (str(ROOT), "site-packages", "stack_trace", str(run_dir)):
        assert trace.encode() not in data
    model = onnx.load(exported / "policy.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert json.loads((exported / "policy.json").read_text())["opset"] == model.opset_import[0].version
    assert export(run_dir, "--output-dir", tmp_path).returncode == 0
    assert (tmp_path / "policy.onnx").read_bytes() == data


def test_no_file_tells_of_this_machine(run_dir, exported, everything):
    for path in (*exported.iterdir(), *everything.iterdir()):
        records = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                records = [file.read(name) for name in file.namelist()]
        for trace in (str(ROOT), "site-packages", str(run_dir)):
            assert not any(trace.encode() in record for record in records), path


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 17, 256])
@pytest.mark.parametrize("probe", [0, 1])
def test_whatever_differs_from_pytorch_is_found(place, batch, probe, capsys):
    exporter, what = load(ROOT / "export_policy.py"), ("logits", "value", "action")[place]
    probes = [np.random.default_rng(i).normal(size=(256, 4)).astype(np.float32) for i in range(2)]

    def right(obs):
        return [obs[:, :2].copy(), obs.sum(1), obs[:, :2].argmax(1)]

    def wrong(obs):
        outputs = right(obs)
        if len(obs) == batch and np.shares_memory(obs, probes[probe]):
            outputs[place] = 1 - outputs[place]
        return outputs

    exporter.check_parity(right, {"file": right}, probes, None)
    with pytest.raises(SystemExit, match="1"):
        exporter.check_parity(right, {"file": wrong}, probes, None)
    assert f"file: {what}" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1])
def test_large_outputs_are_as_exact_as_float32_allows(place, capsys):
    """As Breakout's logits after half a million steps: up to 21, and off by 3e-5 where they cancel to 0.01."""
    exporter = load(ROOT / "export_policy.py")
    rows = np.arange(256, dtype=np.float32)[:, None]

    def off_by(error, large):
        def run(obs):
            value = np.where(obs[:, 0] < large, 15.0, 0.01)
            outputs = [np.stack([value, -value], 1), value, np.zeros(len(obs))]
            outputs[place][-1:] += error
            return outputs

        return run

    exporter.check_parity(off_by(0, 200), {"file": off_by(3e-5, 200)}, [rows], None)
    for error, large in ((1e-3, 200), (3e-5, 50)):  # too far off; only a few rows are large
        with pytest.raises(SystemExit, match="1"):
            exporter.check_parity(off_by(0, large), {"file": off_by(error, large)}, [rows], None)
        assert f"file: {('logits', 'value')[place]} differ" in capsys.readouterr().err


def test_a_large_logit_elsewhere_excuses_no_action(capsys):
    """What counts as a tie is a matter of its own row."""
    exporter = load(ROOT / "export_policy.py")

    def right(obs):
        logits = np.stack([np.zeros(len(obs)), np.where(np.arange(len(obs)) == 0, 1e6, 0.01)], 1)
        return [logits, logits[:, 0], logits.argmax(1)]

    def wrong(obs):
        logits, value, action = right(obs)
        return [logits, value, np.where(np.arange(len(obs)) == 1, 0, action)]

    with pytest.raises(SystemExit, match="1"):
        exporter.check_parity(right, {"file": wrong}, [np.zeros((256, 1), np.float32)], None)
    assert "file: actions differ" in capsys.readouterr().err


@pytest.mark.parametrize("mask", [-1e8, float(np.finfo(np.float32).min), -np.inf])
def test_a_masked_action_excuses_nothing(mask, capsys):
    """The other logits are still exact, and a masked action is never the right one."""
    exporter = load(ROOT / "export_policy.py")

    def off_by(error, action):
        def run(obs):
            logits = np.tile(np.float32([2, -1, mask]), (len(obs), 1)) + np.float32([0, error, 0])
            return [logits, np.zeros(len(obs)), np.full(len(obs), action)]

        return run

    rows = np.zeros((256, 1), np.float32)
    exporter.check_parity(off_by(0, 0), {"file": off_by(1e-6, 0)}, [rows], None)
    for error, action, what in ((1e-3, 0, "logits"), (0, 1, "actions"), (0, 2, "actions")):
        with pytest.raises(SystemExit, match="1"):
            exporter.check_parity(off_by(0, 0), {"file": off_by(error, action)}, [rows], None)
        assert f"file: {what} differ" in capsys.readouterr().err


def test_a_file_is_nan_where_pytorch_is(capsys):
    """As a network that divides by its observation's norm, for zeros."""
    exporter, rows = load(ROOT / "export_policy.py"), np.zeros((256, 1), np.float32)

    def always(logit):
        return lambda obs: [np.full((len(obs), 2), logit), np.zeros(len(obs)), np.zeros(len(obs))]

    exporter.check_parity(always(np.nan), {"file": always(np.nan)}, [rows], None)
    for pytorchs, files in ((0.0, np.nan), (np.nan, 0.0)):
        with pytest.raises(SystemExit, match="1"):
            exporter.check_parity(always(pytorchs), {"file": always(files)}, [rows], None)
        assert "file: logits differ" in capsys.readouterr().err


@pytest.mark.parametrize("low, high", [(0, 255), (1000, 2000), (-1e6, 1e6), (-np.inf, np.inf)])
def test_probes_reach_over_the_space_or_far_from_what_was_seen(low, high):
    exporter, space = load(ROOT / "export_policy.py"), gym.spaces.Box(low, high, (3,), np.float32)
    seen = np.float32([1100, 1200, 1300]) if low == 1000 else np.float32([1, 2, 3])
    _, _, extremes, spread = exporter.probes(np.tile(seen, (256, 1)), space)
    near, far = (low, high) if high - low <= 1e4 else (seen - 100, seen + 100)
    np.testing.assert_array_equal(extremes.min(0), np.broadcast_to(near, 3))
    np.testing.assert_array_equal(extremes.max(0), np.broadcast_to(far, 3))
    assert (spread.std(0) > 50).all() and all(space.contains(row) for row in (*extremes, *spread))


@pytest.mark.parametrize("action, right", [(0, True), (1, True), (2, False), (-1, False), (3, False)])
def test_a_tie_excuses_only_the_tied_actions(action, right):
    exporter = load(ROOT / "export_policy.py")

    def choose(which):
        return lambda obs: [np.tile([5.0, 5.0, -5.0], (len(obs), 1)), np.zeros(len(obs)), np.full(len(obs), which)]

    with contextlib.nullcontext() if right else pytest.raises(SystemExit, match="1"):
        exporter.check_parity(choose(0), {"file": choose(action)}, [np.zeros((256, 1), np.float32)], None)


def test_a_network_that_normalises_in_place(tmp_path):
    """Neither the comparison nor a deployer's own array is spoilt."""
    old = "(obs.flatten(1) - self.obs_stats.mean) * torch.rsqrt(self.obs_stats.var.clamp(min=1e-8))"
    new = "obs.flatten(1).sub_(self.obs_stats.mean).mul_(torch.rsqrt(self.obs_stats.var.clamp(min=1e-8)))"
    source = (ROOT / "ppo_clip_discrete.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "variant.py").write_text(source.replace(old, new))
    flags = "--num-envs 8 --total-timesteps 512 --eval-episodes 0 --no-cuda --run-dir"
    subprocess.run([sys.executable, tmp_path / "variant.py", *flags.split(), tmp_path / "run"], check=True, timeout=120)
    done = program(tmp_path / "run", "--formats", "onnx", "torchscript")
    assert done.returncode == 0, done.stderr
    obs = torch.ones(1, 4)
    torch.jit.load(tmp_path / "run" / "policy.torchscript.pt")(obs)
    assert torch.equal(obs, torch.ones(1, 4))


def test_a_wrong_draw_among_equal_logits_is_found(capsys):
    exporter = load(ROOT / "export_policy.py")

    def right(obs, uniform):
        return [np.zeros((len(obs), 2)), np.zeros(len(obs)), uniform.argmax(1)]

    def wrong(obs, uniform):
        logits, value, action = right(obs, uniform)
        return [logits, value, np.where(np.arange(len(obs)) == 1, 1 - action, action)]

    uniform = np.tile(np.array([[0.2, 0.8]], np.float32), (256, 1))
    exporter.check_parity(right, {"file": right}, [np.zeros((256, 1), np.float32)], uniform)
    with pytest.raises(SystemExit, match="1"):
        exporter.check_parity(right, {"file": wrong}, [np.zeros((256, 1), np.float32)], uniform)
    assert "file: actions differ" in capsys.readouterr().err


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_file_that_draws_gets_new_random_numbers_at_every_step(stochastic):
    seen = []

    def runtime(obs, *uniform):
        seen.append(uniform)
        return [np.zeros((len(obs), 2), np.float32), np.zeros(len(obs), np.float32), np.zeros(len(obs), np.int64)]

    trainer = SimpleNamespace(evaluate=lambda agent, *_: [agent(torch.zeros(3, 4)) for _ in range(5)])
    load(ROOT / "export_policy.py").play(trainer, None, runtime, 3, 2, stochastic)
    if stochastic:
        numbers = np.stack([uniform for (uniform,) in seen])
        assert numbers.shape == (5, 3, 2) and numbers.dtype == np.float32 and len(np.unique(numbers)) == 30
        assert 0 <= numbers.min() < 0.3 and 0.7 < numbers.max() < 1
    else:
        assert seen == [()] * 5


def test_a_wrong_weight_does_not_pass(run_dir, tmp_path, monkeypatch, capsys):
    exporter = load(ROOT / "export_policy.py")
    right = exporter.export_onnx

    def planted(program, names, metadata, path):
        right(program, names, metadata, path)
        model = onnx.load(path)
        weights = next(w for w in model.graph.initializer if "value_head.weight" in w.name)
        values = onnx.numpy_helper.to_array(weights).copy()
        values.flat[0] += 0.1
        weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
        onnx.save(model, path)

    monkeypatch.setattr(exporter, "export_onnx", planted)
    with pytest.raises(SystemExit) as stop:
        exporter.export(exporter.Args(run=str(run_dir), output_dir=str(tmp_path)))
    assert stop.value.code == 1
    assert "policy.onnx: value differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def everything(run_dir, tmp_path_factory):
    """All formats with all that can be measured of them, drawing their actions."""
    folder = tmp_path_factory.mktemp("everything")
    flags = "--formats onnx torchscript torch-export --stochastic --evaluate 4 --benchmark --quantize int8"
    done = export(run_dir, "--output-dir", folder, *flags.split())
    assert done.returncode == 0, done.stderr
    return folder


class Fixed(torch.nn.Module):
    """A network whose logits are its observation."""

    def forward(self, obs):
        return obs * 1.0, obs.sum(-1)


def test_drawn_actions_follow_the_softmax(tmp_path):
    """Chi-square, 3 degrees of freedom: 16.27 is exceeded once in 1,000 by chance. Two actions would not do: their
    noise's difference is symmetric, so that a wrong sign would pass."""
    exporter = load(ROOT / "export_policy.py")
    rows = torch.zeros(2, 4), torch.full((2, 4), 0.5)
    program = exporter.trace(exporter.Policy(Fixed()).eval(), rows, Path(__file__))
    exporter.export_onnx(program, ["obs", "uniform"], {}, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    uniform = np.random.default_rng(5).random((100_000, 4), dtype=np.float32)
    for logits in ([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.5], [3.0, 0.0, 1.0, -1.0]):
        obs = np.tile(np.array(logits, np.float32), (100_000, 1))
        action = session.run(["action"], {"obs": obs, "uniform": uniform})[0]
        expected = 100_000 * np.exp(logits) / np.exp(logits).sum()
        assert (np.square(np.bincount(action, minlength=4) - expected) / expected).sum() < 16.27


def test_files_play_as_pytorch_plays(everything):
    about = json.loads((everything / "policy.json").read_text())
    played = about["evaluation"]
    assert set(played) == {"PyTorch", "policy.onnx", "policy.torchscript.pt", "policy.pt2", "policy.int8.onnx"}
    for name in ("policy.onnx", "policy.torchscript.pt", "policy.pt2"):
        assert played[name] == played["PyTorch"]  # game by game
    assert len(set(played["PyTorch"]["scores"])) > 1
    assert about["inputs"][1] == {"name": "uniform", "shape": ["batch", 2], "dtype": "float32"}
    assert about["outputs"][2]["mode"] == "stochastic"


def test_latency_and_int8_are_reported(everything):
    about = json.loads((everything / "policy.json").read_text())
    rows = [row for row in about["latency"] if row["threads"] == 1 and row["batch"] == 1]
    assert {row["runtime"] for row in rows} == {"PyTorch eager", *about["sha256"]}
    assert all(0 < row["median_ms"] <= row["p99_ms"] for row in about["latency"])
    int8 = about["int8"]
    assert int8["observations"] == 10_000 and 0.95 < int8["action_agreement"] <= 1
    assert int8["verdict"] == ("at least 95 %" if int8["action_agreement"] >= 0.95 else "under 95 %")
    model = onnx.load(everything / "policy.int8.onnx")
    assert json.loads({p.key: p.value for p in model.metadata_props}["int8"]) == int8
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    whole = [onnx.numpy_helper.to_array(x) for x in model.graph.initializer if x.data_type == onnx.TensorProto.INT8]
    weights = [x for x in whole if x.ndim == 2]
    assert len(weights) == 4 and all(np.abs(x.astype(int)).max() <= 64 for x in weights)  # 7 bits: no saturation


@pytest.mark.parametrize("changed", [0, 33])
def test_int8_that_changes_actions_warns(exported, tmp_path, monkeypatch, capsys, changed):
    """At more than 5 % of them, 32 of 640."""
    exporter, int8 = load(ROOT / "export_policy.py"), tmp_path / "policy.int8.onnx"
    obs = np.random.default_rng(1).normal(size=(640, 4)).astype(np.float32)
    actions = {int8: np.arange(640) < changed, exported / "policy.onnx": np.zeros(640, bool)}
    monkeypatch.setattr(exporter, "load_runtime", lambda path: lambda obs: [None, None, actions[path]])
    cost = exporter.quantize_int8(exported / "policy.onnx", ["obs"], [obs], {}, int8)
    assert cost["action_agreement"] == 1 - changed / 640
    assert ("warning: policy.int8.onnx" in capsys.readouterr().err) == (changed > 32)
    assert cost["verdict"] == ("under 95 %" if changed > 32 else "at least 95 %")


@pytest.mark.parametrize("place", [0, 1])
def test_a_relative_error_above_the_tolerance_is_found(exporter, place):
    """1e-4 of the output and 1e-5 of the rows' size."""

    def off_by(error):
        def run(obs):
            outputs = [np.tile([15.0, -15.0], (len(obs), 1)), np.full(len(obs), 15.0), np.zeros(len(obs))]
            outputs[place] = outputs[place] * (1 + error)
            return outputs

        return run

    rows = np.zeros((256, 1), np.float32)
    exporter.check_parity(off_by(0), {"file": off_by(5e-5)}, [rows], None)
    with pytest.raises(SystemExit, match="1"):
        exporter.check_parity(off_by(0), {"file": off_by(3e-4)}, [rows], None)


@pytest.mark.parametrize("gap, right", [(1e-4, True), (5e-4, False)])
def test_only_scores_within_the_tolerance_are_a_tie(exporter, gap, right):
    def choose(which):
        return lambda obs: [np.tile([1.0, 1.0 - gap], (len(obs), 1)), np.zeros(len(obs)), np.full(len(obs), which)]

    with contextlib.nullcontext() if right else pytest.raises(SystemExit, match="1"):
        exporter.check_parity(choose(0), {"file": choose(1)}, [np.zeros((256, 1), np.float32)], None)


def test_probes_begin_with_play_and_zeros(exporter):
    obs = np.random.default_rng(1).normal(size=(512, 3)).astype(np.float32)
    play, zeros, extremes, spread = exporter.probes(obs, gym.spaces.Box(-9, 9, (3,)))
    assert np.array_equal(play, obs[:256]) and not zeros.any()
    assert zeros.shape == extremes.shape == spread.shape == (256, 3)
    assert len(np.unique(spread)) > 700 and set(np.unique(extremes)) == {-9, 9}
    assert all(exporter.BATCHES[-1] == len(rows) for rows in (play, zeros, extremes, spread))


def test_observations_of_play_are_kept_as_they_were(exporter):
    """Environments give the same array again and again, and a network may normalise in place."""
    given, played = [], []

    class Envs:
        obs = np.zeros((16, 2), np.float32)

        def observe(self):
            self.obs[:] = np.random.default_rng(len(given)).normal(size=(16, 2))
            given.append(self.obs.copy())
            return self.obs

        def reset(self, seed):
            return self.observe(), {}

        def step(self, actions):
            played.extend(actions.tolist())
            return self.observe(), None, None, None, {}

        def close(self):
            pass

    def agent(obs):
        obs.zero_()
        return torch.tensor([[0.0, 1.0, -np.inf]]).expand(len(obs), 3), obs[:, 0]

    trainer = SimpleNamespace(make_envs=lambda args, n: Envs(), to_tensor=lambda obs, _: torch.as_tensor(obs))
    rows = exporter.rollout(trainer, agent, None, 1000)
    assert np.array_equal(rows.numpy(), np.concatenate(given)[:1000])
    assert np.bincount(played, minlength=3)[2] == 0
    assert np.mean(played) == pytest.approx(np.e / (1 + np.e), abs=0.05)  # sampled


def test_an_evaluation_plays_the_files_action_and_not_its_logits(exporter):
    actions = np.array([2, 0, 1])

    def runtime(obs):
        return [np.float32([[9, 0, 0], [0, 9, 0], [0, 0, 9]]), np.float32([4, 5, 6]), actions]

    trainer = SimpleNamespace(evaluate=lambda agent, *_: [agent(torch.zeros(3, 4))])
    ((logits, value),) = exporter.play(trainer, None, runtime, 3, 3, False)
    torch.testing.assert_close(logits.softmax(-1), torch.eye(3)[torch.from_numpy(actions)])
    assert value.tolist() == [4, 5, 6]


def test_a_score_of_a_later_policy_is_not_this_ones(exporter, tmp_path):
    """As where the newest checkpoint is damaged and the one before is exported."""
    result = {"eval_return_mean": 5.0, "eval_return_std": 1.0, "eval_episodes": 3, "global_step": 100}
    (tmp_path / "result.json").write_text(json.dumps(result))
    none = {"eval_return_mean": None, "eval_return_std": None, "eval_episodes": None, "actions": "sampled"}
    assert [exporter.load_score(tmp_path, step) == none for step in (50, 100, 150)] == [True, False, True]
    del result["global_step"]
    assert exporter.load_score(tmp_path, 100) == result | {"actions": "sampled"}


def test_units_and_mode_are_told_as_they_are(exporter, tmp_path):
    state = {"global_step": 1, "agent": {"return_stats.var": torch.tensor(4.0)}}
    args = SimpleNamespace(env_id="x", seed=7, gamma=0.9, stickiness=0.5, episodic_life=False, norm_reward=False)
    atari = load(ROOT / "ppo_clip_atari.py")
    about = exporter.describe(tmp_path, args, {}, state, "", atari.make_envs(atari.Args(), 1))
    assert about["value_units"] == "discounted sum of rewards, each clipped to [-1, 1]"
    assert about["seed"] == 7 and about["gamma"] == 0.9
    discrete = SimpleNamespace(single_action_space=SimpleNamespace(n=2), unwrapped=None)
    assert exporter.describe(tmp_path, args, {}, state, "", discrete)["value_units"] == "discounted sum of rewards"
    args.norm_reward = True
    assert "each divided by 2, " in exporter.describe(tmp_path, args, {}, state, "", discrete)["value_units"]
    for stochastic, mode, names in ((False, "greedy", ["obs"]), (True, "stochastic", ["obs", "uniform"])):
        graph = exporter.describe_graph(torch.zeros(2, 4), 2, stochastic)
        assert graph["outputs"][2]["mode"] == mode and [x["name"] for x in graph["inputs"]] == names


def test_what_trained_the_policy_is_told_and_not_what_exports_it(exporter, tmp_path):
    discrete = SimpleNamespace(single_action_space=SimpleNamespace(n=2), unwrapped=None)
    args = SimpleNamespace(env_id="x", seed=7, gamma=0.9)
    versions = {"python": "3.10", "torch": "2.6"}
    about = exporter.describe(tmp_path, args, {"versions": versions}, {"global_step": 1}, "abc", discrete)
    assert about["trained_with"] == versions and about["checkpoint_sha256"] == "abc"


def test_an_atari_games_own_actions_are_named(exporter):
    atari = load(ROOT / "ppo_clip_atari.py")
    envs = atari.make_envs(atari.Args(env_id="ALE/Pong-v5"), 1)
    names = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    assert exporter.describe_actions(envs) == {"first_action": 0, "action_meanings": names}


def test_all_that_is_said_of_int8_is_of_that_file(exporter, tmp_path, monkeypatch):
    """Here its file always pushes to the left."""
    discrete = load(ROOT / "ppo_clip_discrete.py")
    args = small(discrete, tmp_path / "run")
    torch.manual_seed(1)
    agent = discrete.Agent(discrete.make_envs(args, 1))
    agent.policy_head.weight.data.mul_(100)
    run_dir = discrete.open_run(args)
    discrete.save_checkpoint(run_dir, {"agent": agent.state_dict(), "global_step": 160})
    load_runtime, rows = exporter.load_runtime, []

    def left(path, threads=1):
        runtime = load_runtime(path, threads)
        if path.name != exporter.INT8:
            return runtime

        def run(*arrays):
            rows.append(len(arrays[0]))
            logits, value, action = runtime(*arrays)
            return [logits, value, np.zeros_like(action)]

        return run

    monkeypatch.setattr(exporter, "load_runtime", left)
    whole = exporter.Args(run=str(run_dir), formats=("onnx",), quantize="int8", evaluate=3)
    exporter.export(whole)
    about = json.loads((run_dir / "policy.json").read_text())
    session = onnxruntime.InferenceSession(run_dir / "policy.onnx")
    assert rows[0] == about["int8"]["observations"] == 10_000
    assert about["int8"]["action_agreement"] < 0.9
    assert 3 in rows[1:] and max(about["evaluation"]["policy.int8.onnx"]["scores"]) < 12  # it played the games
    metadata = [
        {p.key: p.value for p in onnx.load(run_dir / name).metadata_props} for name in ("policy.onnx", exporter.INT8)
    ]
    assert metadata[1] == metadata[0] | {"int8": json.dumps(about["int8"])}
    # and the file is the checkpoint's network
    obs = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    with torch.no_grad():
        logits, value = agent(torch.from_numpy(obs))
    its_logits, its_value, action = session.run(None, {"obs": obs})
    np.testing.assert_allclose(its_logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(its_value, value, rtol=1e-4, atol=1e-4)
    assert np.array_equal(action, logits.argmax(-1))


def test_onnx_runtime_gets_its_threads(exporter, monkeypatch):
    given = []

    def session(path, options, providers):
        given.append(options.intra_op_num_threads)
        return SimpleNamespace(get_inputs=list)

    monkeypatch.setattr(exporter.onnxruntime, "InferenceSession", session)
    exporter.load_runtime(Path("x.onnx"), 3)
    exporter.load_runtime(Path("x.onnx"))
    assert given == [3, 1]


def test_metadata_is_in_the_model(run_dir, exported):
    model = onnx.load(exported / "policy.onnx")
    about = {p.key: p.value for p in model.metadata_props}
    assert about["env_id"] == "CartPole-v1" and about["global_step"] == "4096"
    assert about["checkpoint_sha256"] == hashlib.sha256((run_dir / "checkpoint.pt").read_bytes()).hexdigest()
    assert {"action_meanings", "preprocessing", "score", "trained_with", "value_units"} <= set(about)


def test_files_load_without_the_source(exported, everything, tmp_path):
    for path in (exported / "policy.torchscript.pt", everything / "policy.pt2"):
        load_it = (
            f"torch.jit.load({str(path)!r})" if path.suffix == ".pt" else f"torch.export.load({str(path)!r}).module()"
        )
        inputs = "torch.zeros(5, 4)" + (", torch.rand(5, 2)" if path.suffix == ".pt2" else "")
        code = f"import torch; print(tuple({load_it}({inputs})[0].shape))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "(5, 2)", done.stderr


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_cannot_be_exported_says_so(run_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    untrained, damaged = tmp_path / "untrained", tmp_path / "damaged"
    shutil.copytree(run_dir, untrained, ignore=shutil.ignore_patterns("checkpoint*"))
    shutil.copytree(run_dir, damaged)
    damage(damaged / "checkpoint.pt")
    int8 = [run_dir, "--quantize", "int8", "--formats", "torchscript"]
    other = [
        [untrained],
        [damaged],
        ["x" * 300],
        [run_dir, "--output-dir", ""],
        [run_dir, "--formatt"],
        [run_dir, "--evaluate", "-1"],
        int8,
    ]
    for arguments in ([tmp_path / "missing"], [tmp_path / "empty"], *other):
        done = export(*arguments)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    done = program(damaged)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not any((folder / name).exists() for folder in (untrained, damaged) for name in FILES)


def test_the_checkpoint_before_serves_for_a_damaged_one(run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint.prev.pt")
    damage(folder / "checkpoint.pt")
    done = export(folder)
    assert done.returncode == 0 and "warning" in done.stderr
    assert all((folder / name).exists() for name in FILES)


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "run" / "checkpoint.prev.pt")
    (tmp_path / "run" / "checkpoint.pt").mkdir()
    done = export(tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'run' / 'checkpoint.pt'} cannot be read: Is a directory\n"


def test_a_folder_in_the_place_of_a_file_leaves_the_others(run_dir, tmp_path):
    (tmp_path / "policy.onnx").write_text("an earlier one")
    (tmp_path / "policy.json").mkdir()
    done = export(run_dir, "--formats", "onnx", "--output-dir", tmp_path)
    assert done.returncode == 2 and f"error: {tmp_path / 'policy.json'} is a folder" in done.stderr
    assert (tmp_path / "policy.onnx").read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.onnx"]


def test_code_in_a_checkpoint_does_not_run(run_dir, tmp_path):
    folder, ran, buffer = tmp_path / "run", tmp_path / "ran", io.BytesIO()
    shutil.copytree(run_dir, folder)
    torch.save({"agent": Payload(ran), "global_step": 4096}, buffer)
    (folder / "checkpoint.pt").write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    done = export(folder)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert not ran.exists()


def test_the_score_is_the_exported_policys(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    result = tmp_path / "run" / "result.json"
    for text in (json.dumps(json.loads(result.read_text()) | {"global_step": 2048}), "{", "[]"):
        result.write_text(text)
        assert export(tmp_path / "run", "--formats", "torch-export").returncode == 0
        about = json.loads((tmp_path / "run" / "policy.json").read_text())
        assert about["score"]["eval_return_mean"] is None and about["global_step"] == 4096


def test_files_of_an_earlier_export_are_named(run_dir, tmp_path):
    assert export(run_dir, "--output-dir", tmp_path).stderr == ""
    done = export(run_dir, "--output-dir", tmp_path, "--formats", "torch-export")
    assert done.returncode == 0 and (tmp_path / "policy.onnx").exists()
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["warning", "warning"]
    assert all(str(tmp_path / name) in done.stderr for name in ("policy.onnx", "policy.torchscript.pt"))


def test_a_source_that_does_not_run_says_so(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    with open(tmp_path / "run" / "ppo_clip_discrete.py", "a") as source:
        source.write("def broken(:\n")
    done = export(tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "SyntaxError" in done.stderr


def test_a_forward_that_branches_is_named(run_dir, tmp_path):
    """It has no graph: the line that is why is named, and no file is left."""
    shutil.copytree(run_dir, tmp_path / "run")
    source = tmp_path / "run" / "ppo_clip_discrete.py"
    end = "        return self.policy_head(features)"
    branch = "        if features.sum() > 0:\n            features = -features\n"
    assert source.read_text().count(end) == 1
    source.write_text(source.read_text().replace(end, branch + end))
    done = export(tmp_path / "run")
    assert done.returncode == 1 and "`if features.sum() > 0:`" in done.stderr.splitlines()[-1]
    assert not any((tmp_path / "run" / name).exists() for name in FILES)


@pytest.mark.parametrize(
    "change, line",
    [
        ("features = features + torch.zeros(len(x), 1)", "it fixes the batch size, as len(x)"),
        ("return self.policy_head(features), features.new_zeros(2)", "the batch of `value` is fixed"),
        ("features = features + F.embedding(obs.long() + 64, x.new_ones(128, 1))[:, 0]", "does not take every"),
    ],
)
def test_what_forward_does_not_take_ends_in_one_line(run_dir, tmp_path, change, line):
    """A fixed batch, of the features or of an output; a table too small for what the space, not play, may hold."""
    shutil.copytree(run_dir, tmp_path / "run")
    source = tmp_path / "run" / "ppo_clip_discrete.py"
    end = "        return self.policy_head(features)"
    source.write_text(source.read_text().replace(end, f"        {change}\n{end}"))
    done = export(tmp_path / "run")
    assert done.returncode == 1 and line in done.stderr.splitlines()[-1] and done.stderr.count("error: ") == 1
    assert not any((tmp_path / "run" / name).exists() for name in FILES)


def test_a_source_that_changed_after_the_checkpoint_is_named(run_dir, tmp_path):
    """A resume with another source has the run's last snapshot replaced, even where it trains nothing."""
    shutil.copytree(run_dir, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    earlier = record | {"versions": record["versions"] | {"torch": "another"}}
    (tmp_path / "run" / "args.json").write_text(json.dumps(earlier))  # of the start that only evaluates
    assert export(tmp_path / "run", "--formats", "torch-export").stderr == ""
    assert json.loads((tmp_path / "run" / "policy.json").read_text())["trained_with"] == record["versions"]
    with open(tmp_path / "run" / "ppo_clip_discrete.py", "a") as source:
        source.write("# changed\n")
    done = export(tmp_path / "run", "--formats", "torch-export")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ppo_clip_discrete.py changed after the checkpoint was written: ")


def test_an_operator_without_a_translation_is_named(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    source = tmp_path / "run" / "ppo_clip_discrete.py"
    end = "        return self.policy_head(features)"
    operator = "        features = features * torch.linalg.svdvals(features)[0]\n"
    source.write_text(source.read_text().replace(end, operator + end))
    done = export(tmp_path / "run")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("error: the network cannot be written as onnx")
    assert "svd" in line
    assert not any((tmp_path / "run" / name).exists() for name in FILES)


def test_a_network_with_dropout_plays_and_leaves_no_cache(run_dir, tmp_path):
    """Its trainer's evaluation calls eval() and train(); the run folder gets nothing but what was asked for."""
    shutil.copytree(run_dir, tmp_path / "run")
    source = tmp_path / "run" / "ppo_clip_discrete.py"
    text = source.read_text().replace("features = self.encoder(x)", "features = self.encoder(self.dropout(x))")
    text = text.replace(
        "        self.policy_head = ", "        self.dropout = nn.Dropout(0.5)\n        self.policy_head = "
    )
    text = text.replace(
        "    envs = make_envs(args, episodes)\n", "    envs = make_envs(args, episodes)\n    agent.eval()\n"
    )
    assert text.count("dropout") == 2 and text.count("agent.eval()") == 1
    source.write_text(text)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    done = export(tmp_path / "run", "--formats", "onnx", "--evaluate", "2", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_attention_exports(run_dir, tmp_path):
    """PyTorch's own check of a trace refuses it, for a difference far below the parity's tolerance."""
    shutil.copytree(run_dir, tmp_path / "run")
    source = tmp_path / "run" / "ppo_clip_discrete.py"
    new = "features = self.attend(*[self.encoder(x).unsqueeze(1)] * 3)[0].squeeze(1)"
    text = source.read_text().replace("features = self.encoder(x)", new)
    attend = "        self.attend = nn.MultiheadAttention(64, 2, batch_first=True)\n"
    source.write_text(text.replace("        self.policy_head = ", f"{attend}        self.policy_head = "))
    exporter = load(ROOT / "export_policy.py")
    state, _ = exporter.load_checkpoint(tmp_path / "run")
    agent = load(source)
    envs = agent.make_envs(agent.Args(), 1)
    data = io.BytesIO()
    torch.save(state | {"agent": agent.Agent(envs).state_dict()}, data)
    whole = data.getvalue() + hashlib.sha256(data.getvalue()).digest()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole)
    done = export(tmp_path / "run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "torch-export",  # whose own writer would abort the process
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("torchscript", marks=pytest.mark.slow),
    ],
)
def test_full_disk_while_a_file_is_written(run_dir, tmp_path, name):
    """A file may grow to 4 kB here; the files of an earlier export stay as they were."""
    (tmp_path / "policy.json").write_text("earlier")
    flags = ["--formats", name, "--output-dir", tmp_path]
    done = program(run_dir, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert done.returncode == 2 and done.stderr == f"error: --output-dir {tmp_path} cannot be written: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    assert (tmp_path / "policy.json").read_text() == "earlier"


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()])
def test_an_export_that_ends_between_two_files_leaves_the_earlier_ones(run_dir, tmp_path, monkeypatch, error):
    (tmp_path / "policy.onnx").write_text("earlier")
    replace = os.replace

    def broken(path, target):
        if Path(target).name == "policy.json":
            raise error
        replace(path, target)

    monkeypatch.setattr(os, "replace", broken)
    if isinstance(error, OSError):
        done = export(run_dir, "--formats", "onnx", "torchscript", "--output-dir", tmp_path)
        assert done.returncode == 2 and "cannot be written: Device or resource busy" in done.stderr
    else:
        with pytest.raises(KeyboardInterrupt):
            export(run_dir, "--formats", "onnx", "torchscript", "--output-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]
    assert (tmp_path / "policy.onnx").read_text() == "earlier"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_export_leaves_nothing(run_dir, tmp_path, number):
    command = [
        sys.executable,
        str(ROOT / "export_policy.py"),
        str(run_dir),
        "--output-dir",
        str(tmp_path),
        "--benchmark",
    ]
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # even if the tests run under nohup
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    while not list(tmp_path.glob(".export-*/policy.onnx")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130 and process.stderr.read() == "error: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_a_source_of_another_name_exports(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "ppo_clip_discrete.py").rename(tmp_path / "run" / "trainer")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(record | {"script": "trainer"}))
    assert export(tmp_path / "run", "--formats", "torch-export").returncode == 0


def test_observations_are_probed_within_their_space():
    exporter = load(ROOT / "export_policy.py")
    states = exporter.probes(np.array([501, 503]), gym.spaces.Discrete(5, start=500))
    assert min(x.min() for x in states) == 500 and max(x.max() for x in states) <= 504
    pixels = exporter.probes(np.zeros((2, 3), np.uint8), gym.spaces.Box(0, 255, (3,), np.uint8))
    assert {x.max() for x in pixels[2:]} <= {254, 255}
    vectors = exporter.probes(np.zeros((2, 1), np.float32), gym.spaces.Box(-np.inf, np.inf, (1,)))
    assert [x.min() for x in vectors[2:3]] == [-100] and [x.max() for x in vectors[2:3]] == [100]
    numbers = exporter.probes(np.zeros((2, 3), np.int8), gym.spaces.Box(-128, 127, (3,), np.int8))
    assert numbers[2].min() == -128 and numbers[2].max() == 127
    far = exporter.probes(np.full((256, 1), 550, np.float32), gym.spaces.Box(500, 600, (1,)))
    assert all(x.min() >= 500 and x.max() <= 600 for x in far)


def test_actions_count_from_the_environments_first():
    exporter = load(ROOT / "export_policy.py")
    space = gym.spaces.Discrete(2, start=1)
    envs = SimpleNamespace(
        single_action_space=gym.spaces.Discrete(2),
        envs=[SimpleNamespace(action_space=space, unwrapped=None)],
    )
    assert exporter.describe_actions(envs) == {"first_action": 1, "action_meanings": ["1", "2"]}
    one = SimpleNamespace(single_action_space=space, unwrapped=None)  # a vector environment that is not made of others
    assert exporter.describe_actions(one) == {"first_action": 1, "action_meanings": ["1", "2"]}


class Continuous(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1), gym.spaces.Box(-1, 1)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def get_action_meanings(self):
        return ["only", "three", "names"]


class Choices(gym.ActionWrapper):
    """Only some actions, counted from `first`."""

    def __init__(self, env, count, first):
        super().__init__(env)
        self.action_space = gym.spaces.Discrete(count, start=first)


gym.register("Two-v0", lambda: Choices(Continuous(), 2, 0))
gym.register("Three-v0", lambda: Choices(Continuous(), 3, 7))
gym.register("Fewer-v0", lambda: Choices(Choices(Continuous(), 4, 1), 2, 0))


@pytest.mark.parametrize(
    "env_id, first, names",
    [
        ("Two-v0", 0, ["0", "1"]),
        ("Three-v0", 7, ["only", "three", "names"]),
        ("Fewer-v0", 0, ["0", "1"]),
        ("CartPole-v1", 0, ["0", "1"]),
    ],
)
def test_actions_are_those_of_the_environment_that_its_id_makes(tmp_path, env_id, first, names):
    """Its own wrappers are a part of it, those that the trainer adds are not."""
    exporter, discrete = load(ROOT / "export_policy.py"), load(ROOT / "ppo_clip_discrete.py")
    args = discrete.Args(env_id=env_id)
    envs = discrete.make_envs(args, 1)
    about = exporter.describe(tmp_path, args, {}, {"global_step": 1, "agent": {}}, "", envs)
    assert (about["first_action"], about["action_meanings"]) == (first, names)
    assert about["preprocessing"]["before_the_graph"] == about["preprocessing"]["after_the_graph"] == "none"


class Shifted(Choices):
    def action(self, action):
        return action


class Delayed(gym.Wrapper):
    pass


def few_torques(env):
    return gym.wrappers.TransformAction(env, lambda action: np.float32([action - 1]), gym.spaces.Discrete(3))


def backwards(env):
    return gym.wrappers.TransformAction(env, lambda action: 2 - action, gym.spaces.Discrete(3))


@pytest.mark.parametrize(
    "env, wrap, first, names, before, after",
    [
        ("MountainCar-v0", backwards, 0, ["0", "1", "2"], "none", "TransformAction"),
        ("Pendulum-v1", few_torques, 0, ["0", "1", "2"], "none", "TransformAction"),
        ("Three-v0", lambda env: Shifted(env, 3, 5), 5, ["5", "6", "7"], "none", "Shifted"),
        ("CartPole-v1", lambda env: gym.wrappers.TransformReward(env, lambda r: 2 * r), 0, ["0", "1"], "none", "none"),
        (
            "CartPole-v1",
            lambda env: gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, 2)),
            0,
            ["0", "1"],
            "FrameStackObservation, FlattenObservation",
            "none",
        ),
        (
            AcrobotEnv,
            lambda env: gym.wrappers.ClipReward(Delayed(gym.wrappers.TimeLimit(env, 9)), -1, 1),
            0,
            ["0", "1", "2"],
            "Delayed",
            "none",
        ),
    ],
)
def test_wrappers_that_a_source_adds_are_named(tmp_path, monkeypatch, env, wrap, first, names, before, after):
    exporter, discrete = load(ROOT / "export_policy.py"), load(ROOT / "ppo_clip_discrete.py")
    make = gym.make
    args = discrete.Args(env_id=env if isinstance(env, str) else "Own-v0")
    with monkeypatch.context() as patch:  # as a source that wraps what `gym.make` gives, or does without it
        patch.setattr(discrete.gym, "make", lambda i, **options: wrap(make(i, **options) if i == env else env()))
        envs = discrete.make_envs(args, 1)
    about = exporter.describe(tmp_path, args, {}, {"global_step": 1, "agent": {}}, "", envs)
    assert (about["first_action"], about["action_meanings"]) == (first, names)
    wrappers = about["preprocessing"]
    assert (wrappers["before_the_graph"], wrappers["after_the_graph"]) == (before, after)


def test_atari_frames_are_described_as_the_source_makes_them(tmp_path):
    exporter, atari = load(ROOT / "export_policy.py"), load(ROOT / "ppo_clip_atari.py")
    changed = {"img_height": 64, "img_width": 48, "stack_num": 2, "frameskip": 3, "noop_max": 0}
    changed |= {"use_fire_reset": False, "grayscale": False}
    told = []
    for options in ({}, changed, {"maxpool": False}):
        envs = gym.make_vec("ALE/Pong-v5", num_envs=1, **options)
        state = {"global_step": 1, "agent": {}}
        told.append(exporter.describe(tmp_path, atari.Args(), {}, state, "", envs)["preprocessing"])
        envs.close()
    assert "the last 4 frames" in told[0]["before_the_graph"] and "84x84" in told[0]["before_the_graph"]
    assert "the grey maximum of the last two of 4" in told[0]["before_the_graph"] and told[0]["frame_skip"] == 4
    assert told[0]["game_start"].startswith("FIRE where the game has it, then no-ops, up to 29 frames")
    assert "the last 2 frames" in told[1]["before_the_graph"] and "48x64" in told[1]["before_the_graph"]
    assert "the RGB maximum of the last two of 3" in told[1]["before_the_graph"] and told[1]["frame_skip"] == 3
    assert told[1]["game_start"].startswith("no-ops, up to 0 frames")
    assert "the last of 4, in grey" in told[2]["before_the_graph"]


def test_a_network_whose_size_is_a_flag_exports(tmp_path):
    source = (ROOT / "ppo_clip_discrete.py").read_text()
    changes = [
        ("hidden: int = 64)", "hidden: int, args: Args)"),
        ("agent = Agent(envs)", "agent = Agent(envs, args.hidden, args)"),
        ("    # Learning\n", "    # Learning\n    hidden: int = 64  # hidden units\n"),
    ]
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "my_ppo.py").write_text(source)
    flags = "--hidden 32 --num-envs 8 --total-timesteps 512 --eval-episodes 0 --no-cuda --run-dir"
    command = [sys.executable, tmp_path / "my_ppo.py", *flags.split(), tmp_path / "run"]
    subprocess.run(command, check=True, timeout=120)
    done = export(tmp_path / "run", "--formats", "onnx")
    assert done.returncode == 0, done.stderr
    weights = onnx.load(tmp_path / "run" / "policy.onnx").graph.initializer
    assert sorted(w.dims[0] for w in weights if w.name.endswith("head.weight")) == [1, 2]
    assert {w.dims[1] for w in weights if w.name.endswith("head.weight")} == {32}


IMPALA = """

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.convs[1](self.convs[0](x.relu()).relu())


def impala():
    blocks, inputs = [], 4
    for channels in (4, 8):
        blocks += [nn.Conv2d(inputs, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1), Residual(channels)]
        inputs = channels
    return nn.Sequential(*blocks, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 21 * 21, 96), nn.ReLU())


class Agent(nn.Module):"""
VARIANTS = {
    "narrow": [
        ("7, 512)", "7, 96)"),
        ("Linear(512", "Linear(96"),
        ("Conv2d(STACK, 32", "Conv2d(STACK, 16"),
        ("Conv2d(32, 64", "Conv2d(16, 64"),
    ],
    "layer_norm": [
        ("            nn.Flatten(),\n", "            nn.Flatten(),\n            nn.LayerNorm(64 * 7 * 7),\n")
    ],
    "impala": [
        ("7, 512)", "7, 96)"),
        ("Linear(512", "Linear(96"),
        ("\n\nclass Agent(nn.Module):", IMPALA),
        ("        self.policy_head =", "        self.encoder = impala()\n        self.policy_head ="),
    ],
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("narrow", "layer_norm")]  # impala changes more


@pytest.mark.parametrize("variant", ["impala", *SLOW])
def test_a_copied_and_changed_atari_trainer_exports(tmp_path, variant):
    source = (ROOT / "ppo_clip_atari.py").read_text()
    assert all(old in source for changes in VARIANTS.values() for old, _ in changes)  # of the slow ones too
    for old, new in VARIANTS[variant]:
        source = source.replace(old, new)
    (tmp_path / "my_ppo.py").write_text(source)
    flags = ["--env-id", "ALE/Pong-v5", "--num-envs", "2", "--num-steps", "16", "--total-timesteps", "32"]
    command = [sys.executable, "my_ppo.py", *flags, "--eval-episodes", "0", "--run-dir", "run"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=200)
    done = export(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert about["inputs"][0] == {"name": "obs", "shape": ["batch", 4, 84, 84], "dtype": "uint8"}
    assert about["action_meanings"][0] == "NOOP" and about["preprocessing"]["repeat_action_probability"] == 0.25
    assert about["preprocessing"]["before_the_graph"].startswith("the last 4 frames, oldest first")
    assert about["value_units"].endswith("each clipped to [-1, 1], up to the next lost life")


OWN = """
import gymnasium as gym
import numpy as np

class Own(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (4500,)), gym.spaces.Discrete(2)

    def observe(self):  # only one number ever changes
        return np.full(4500, 3, np.float32) * (np.arange(4500) > 0) + self.np_random.normal() * (np.arange(4500) == 0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 1.0, self.np_random.random() < 0.1, False, {}

gym.register("Own-v0", Own)
"""


def test_a_wrapped_environment_whose_module_lies_beside_the_script_exports(tmp_path):
    """ONNX Script takes a constant of 1e-8 for 0: features that never change must not become infinite there."""
    folder = tmp_path / "variant"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    source = (ROOT / "ppo_clip_discrete.py").read_text()
    place = "        space = env.action_space\n        if isinstance"
    assert place in source
    wrapper = f"        env = gym.wrappers.FrameStackObservation(env, 2)\n{place}"
    (folder / "my_ppo.py").write_text(source.replace(place, wrapper))
    flags = "--env-id own:Own-v0 --num-envs 4 --num-steps 16 --total-timesteps 128 --eval-episodes 0 --run-dir run"
    command = [sys.executable, "variant/my_ppo.py", *flags.split()]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=200)
    done = program(tmp_path / "run", "--formats", "onnx", cwd=ROOT)  # another folder than the run's
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert about["inputs"][0]["shape"] == ["batch", 2, 4500]
    assert about["preprocessing"]["before_the_graph"] == "FrameStackObservation"


# Clients in other languages and without PyTorch

CLIENTS = Path(__file__).parent / "clients"
OBS = np.random.default_rng(3).normal(size=(50, 4)).astype(np.float32)


def assert_client_agrees(output, exported):
    session = onnxruntime.InferenceSession(exported / "policy.onnx")
    logits, value, action = session.run(None, {"obs": OBS})
    rows = np.array([line.split() for line in output.splitlines()], dtype=np.float64)
    np.testing.assert_array_equal(rows[:, 0], action)
    np.testing.assert_allclose(rows[:, 1], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows[:, 2:], logits, rtol=1e-4, atol=1e-5)


ONE_OR_TWO = """
import gymnasium as gym
import numpy as np


class OneOrTwo(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(2, start=1)

    def reset(self, *, seed=None, options=None):
        self.k = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.k += 1
        return np.zeros(2, np.float32), float(action), self.k == 4, False, {}


gym.register("OneOrTwo-v0", OneOrTwo)
gym.register("States-v0", lambda: gym.wrappers.TransformObservation(OneOrTwo(), lambda x: 3, gym.spaces.Discrete(5)))
"""


@pytest.mark.parametrize("env_id", ["OneOrTwo-v0", "States-v0"])
def test_the_python_client_counts_actions_from_the_environments_first(exporter, tmp_path, monkeypatch, env_id):
    (tmp_path / "one_or_two.py").write_text(ONE_OR_TWO)
    monkeypatch.syspath_prepend(tmp_path)
    discrete = load(ROOT / "ppo_clip_discrete.py")
    args = small(discrete, tmp_path / "run", env_id=f"one_or_two:{env_id}")
    agent = discrete.Agent(discrete.make_envs(args, 1))
    agent.policy_head.bias.data.copy_(torch.tensor([-9.0, 9.0]))  # its second action, the environment's 2
    run_dir = discrete.open_run(args)
    discrete.save_checkpoint(run_dir, {"agent": agent.state_dict(), "global_step": 160})
    exporter.export(exporter.Args(run=str(run_dir), formats=("onnx",)))
    client = ROOT / "tests" / "clients" / "play.py"
    command = [sys.executable, str(client), str(run_dir / "policy.onnx"), args.env_id, "2"]
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.stdout == "mean return 8.0\n", done.stderr


def numbers():
    return "\n".join(" ".join(f"{x:.9g}" for x in row) for row in OBS)


@pytest.mark.slow
def test_python_client_without_torch(tmp_path):
    run_dir, python = tmp_path / "run", tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, str(ROOT / "ppo_clip_discrete.py"), "--run-dir", str(run_dir)], check=True)
    assert export(run_dir).returncode == 0
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "onnxruntime", "gymnasium"], check=True)
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode != 0
    command = [str(python), str(CLIENTS / "play.py"), str(run_dir / "policy.onnx"), "CartPole-v1", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert float(done.stdout.removeprefix("mean return ")) >= 475, done.stderr


def test_python_client_of_atari_games(tmp_path):
    """Plays the very game that the trainer's environments give."""
    atari, run_dir = load(ROOT / "ppo_clip_atari.py"), tmp_path / "run"
    args = atari.Args(env_id="QbertNoFrameskip-v4", repeat_action_probability=0.9, num_envs=2, num_steps=16)
    atari.train(dataclasses.replace(args, total_timesteps=32, eval_episodes=0, run_dir=str(run_dir)))
    assert export(run_dir, "--formats", "onnx", "--stochastic").returncode == 0
    command = [sys.executable, str(CLIENTS / "play_atari.py"), str(run_dir), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    session, envs = onnxruntime.InferenceSession(run_dir / "policy.onnx"), atari.make_envs(args, 1)
    rng, (obs, info) = np.random.default_rng(0), envs.reset(seed=0)
    score, steps, frame_number = 0.0, 0, -1
    while info["episode_frame_number"][0] > frame_number:  # restarts with each game
        frame_number = info["episode_frame_number"][0]
        inputs = {"obs": obs, "uniform": rng.random((1, 6), dtype=np.float32)}
        obs, reward, _, _, info = envs.step(session.run(["action"], inputs)[0])
        score, steps = score + float(reward[0]), steps + 1
    assert done.stdout == f"score {score:.0f} after {steps} steps\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_cpp_client(exported, tmp_path):
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", str(CLIENTS), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release", prefix], check=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True)
    command = [str(tmp_path / "policy_client"), str(exported / "policy.torchscript.pt"), "4"]
    done = subprocess.run(command, input=numbers(), capture_output=True, text=True, check=True)
    assert_client_agrees(done.stdout, exported)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="no npm")
def test_javascript_client(exported, tmp_path):
    for name in ("package.json", "policy_client.js"):
        shutil.copy(CLIENTS / name, tmp_path)
    skip_cuda = os.environ | {"ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, env=skip_cuda)
    command = ["node", "policy_client.js", str(exported / "policy.onnx"), "4"]
    done = subprocess.run(command, input=numbers(), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert_client_agrees(done.stdout, exported)
