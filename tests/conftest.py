"""Options, markers and fixtures of all tests."""

import importlib.util
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
TRAINERS = [ROOT / "ppo_clip_discrete.py", ROOT / "ppo_clip_atari.py"]
numbers = count()


def load(path: Path | str) -> ModuleType:
    """Imports the script at `path` anew, under a name of its own."""
    name = f"{Path(path).stem}_{next(numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(trainer: ModuleType, run_dir: Path, **changes):
    """Arguments of a run of five short iterations."""
    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 160}
    return trainer.Args(**({"cuda": False, "eval_episodes": 0, "run_dir": str(run_dir)} | sizes | changes))


class Payload:
    """Unpickled as it stands, it makes a folder at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pytest_addoption(parser):
    parser.addoption("--script", metavar="PATH", help="run the contract tests on this copied and changed trainer")


def pytest_configure(config):
    script = config.getoption("--script")
    if script and not Path(script).is_file():
        raise pytest.UsageError(f"--script {script} is no file")
    config.addinivalue_line("markers", "slow: takes minutes, runs only where -m asks for it")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under `pytest &`: trainers would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc):
    if "trainer" in metafunc.fixturenames:
        script = metafunc.config.getoption("--script")
        paths = [Path(script).resolve()] if script else TRAINERS
        metafunc.parametrize("trainer", paths, ids=lambda path: path.stem, indirect=True, scope="session")


def variant_of(config, own: Path) -> ModuleType:
    """The trainer `own`, or the variant of it that --script names."""
    script = config.getoption("--script")
    if script is None:
        return load(own)
    of_atari = "AtariVectorEnv" in Path(script).read_text()
    if of_atari != ("atari" in own.name):
        pytest.skip("--script names a variant of the other trainer")
    return load(Path(script).resolve())


def pytest_collection_modifyitems(config, items):
    if config.getoption("--script"):
        others = [item for item in items if not {"trainer", "atari", "script"} & set(item.fixturenames)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def trainer(request):
    """Each trainer in turn, or the one that --script names."""
    return load(request.param)


@pytest.fixture(autouse=True)
def signal_handlers():
    """`train` takes these signals for itself: a test gives them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch):
    """What a test that failed had started ends with it."""
    started, start = [], subprocess.Popen.__init__

    def remember(self, *arguments, **options):
        start(self, *arguments, **options)
        started.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", remember)
    yield
    for process in started:
        if process.returncode is None and process.poll() is None:
            process.terminate()  # torchrun then ends its ranks
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
