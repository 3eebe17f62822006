"""What README shows works as it is shown."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, load

README = (ROOT / "README.md").read_text()


def test_every_flag_exists():
    scripts = [load(ROOT / f"{name}.py") for name in ("ppo_clip_discrete", "ppo_clip_atari", "export_policy")]
    flags = {f"--{f.replace('_', '-')}" for script in scripts for f in script.Args.__dataclass_fields__}
    others = "script logdir standalone nproc-per-node max-restarts nnodes rdzv-id rdzv-backend rdzv-endpoint"
    others += " nodes ntasks-per-node gpus-per-node cpus-per-task"  # of pytest, TensorBoard, torchrun and SLURM
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - {f"--{flag}" for flag in others.split()}
    mentioned = {flag.replace("--no-", "--") for flag in mentioned}
    assert mentioned and mentioned <= flags | {"--help"}, mentioned - flags


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_the_onnxruntime_example_plays(tmp_path):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "onnxruntime" in block)
    flags = ["--total-timesteps", "20480", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run")]
    subprocess.run([sys.executable, str(ROOT / "ppo_clip_discrete.py"), *flags], check=True, timeout=120)
    subprocess.run([sys.executable, str(ROOT / "export_policy.py"), str(tmp_path / "run")], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "run", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 50  # a random policy's mean is about 22


@pytest.mark.parametrize("name", ["ppo_clip_discrete", "ppo_clip_atari", "export_policy"])
def test_help_ends_well(name):
    done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


def test_script_option_tests_the_copy(tmp_path):
    source = (ROOT / "ppo_clip_atari.py").read_text()
    for name, text, code in (("good", source, 0), ("broken", source.replace("gamma * next_values", "next_values"), 1)):
        (tmp_path / f"{name}.py").write_text(text)
        flags = f"-q --script={tmp_path / name}.py -k gae_by_hand tests/test_maths.py".split()
        command = [sys.executable, "-m", "pytest", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout
