"""A short run exported, and what must stop an export."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import load

ROOT = Path(__file__).parent.parent
FILES = ("policy.onnx", "policy.torchscript.pt", "policy.json")


def export(*arguments):
    command = [sys.executable, str(ROOT / "export_policy.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cartpole"
    flags = ["--total-timesteps", "4096", "--eval-episodes", "1", "--run-dir", str(folder)]
    subprocess.run([sys.executable, str(ROOT / "ppo_clip_discrete.py"), *flags], check=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    done = export(run_dir, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_files_agree_and_are_described(exported):
    assert sorted(p.name for p in exported.iterdir()) == sorted(FILES)
    about = json.loads((exported / "policy.json").read_text())
    assert about["env_id"] == "CartPole-v1" and about["global_step"] == 4096 and about["action_meanings"] == ["0", "1"]
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


def test_a_wrong_weight_does_not_pass(run_dir, tmp_path, monkeypatch, capsys):
    exporter = load(ROOT / "export_policy.py")
    right = exporter.export_onnx

    def planted(policy, obs, metadata, path):
        with torch.no_grad():
            policy.agent.value_head.weight[0, 0] += 0.1
        right(policy, obs, metadata, path)
        with torch.no_grad():
            policy.agent.value_head.weight[0, 0] -= 0.1

    monkeypatch.setattr(exporter, "export_onnx", planted)
    with pytest.raises(SystemExit) as stop:
        exporter.export(exporter.Args(run=str(run_dir), output_dir=str(tmp_path)))
    assert stop.value.code == 1
    assert "policy.onnx: value differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
    for arguments in ([tmp_path / "missing"], [tmp_path / "empty"], [untrained], [damaged], [run_dir, "--formatt"]):
        done = export(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not any((folder / name).exists() for folder in (untrained, damaged) for name in FILES)


def test_the_checkpoint_before_serves_for_a_damaged_one(run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint.prev.pt")
    damage(folder / "checkpoint.pt")
    done = export(folder)
    assert done.returncode == 0 and "warning" in done.stderr
    assert all((folder / name).exists() for name in FILES)


def test_a_copied_and_changed_atari_trainer_exports(tmp_path):
    source = (ROOT / "ppo_clip_atari.py").read_text().replace("512", "96").replace("Conv2d(4, 32", "Conv2d(4, 16")
    source = source.replace("Conv2d(32, 64", "Conv2d(16, 64")
    (tmp_path / "my_ppo.py").write_text(source)
    flags = ["--env-id", "PongNoFrameskip-v4", "--num-envs", "2", "--num-steps", "16", "--total-timesteps", "64"]
    command = [sys.executable, "my_ppo.py", *flags, "--eval-episodes", "0", "--run-dir", "run"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=200)
    done = export(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert about["inputs"][0] == {"name": "obs", "shape": ["batch", 4, 84, 84], "dtype": "uint8"}
    assert about["action_meanings"][0] == "NOOP" and about["preprocessing"]["repeat_action_probability"] == 0.0
