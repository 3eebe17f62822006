"""A trained run to ONNX and TorchScript, each checked against PyTorch before it gets its name.

    python export_policy.py runs/<run>
    python export_policy.py runs/<run> --output-dir deploy

The graph takes the raw observation (normalisation is inside) and gives `logits`, `value` and the greedy `action`.
The network is built by the source snapshot in the run folder, so a copied and changed trainer exports with no edit.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn
import tyro

OPSET = 20
BATCHES = (1, 2, 3, 17)
RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """run folder of a trainer"""
    output_dir: str | None = None
    """where policy.onnx, policy.torchscript.pt and policy.json go (default: the run folder)"""


class Policy(nn.Module):
    """obs (B, *shape), raw -> logits (B, A) float32, value (B,) float32, action (B,) int64, the greedy one."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, value = self.agent(obs)
        return logits, value, logits.argmax(-1)


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line that says what to change."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def load_record(run_dir: Path) -> dict:
    """The run's args.json."""
    if not run_dir.is_dir():
        fail(f"{run_dir} is not a folder: give a trainer's run folder")
    try:
        record = json.loads((run_dir / "args.json").read_text())
        if not (run_dir / Path(record["script"]).name).is_file():
            fail(f"{run_dir} lacks the source {record['script']} that made it")
        return record
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{run_dir} holds no run: its args.json is missing or not a trainer's")


def load_checkpoint(run_dir: Path) -> tuple[dict, str]:
    """The newest good checkpoint and its sha256. Never runs code that a file may hold."""
    found = False
    for path in (run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"):
        if not path.exists():
            continue
        found, data = True, path.read_bytes()
        try:
            if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                raise ValueError("its sha256 does not hold")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), hashlib.sha256(data).hexdigest()
        except Exception as error:
            print(f"warning: {path} is damaged: {' '.join(str(error).split())[:80]}", file=sys.stderr)
    fail(f"{run_dir} has no good checkpoint" if found else f"{run_dir} has no checkpoint yet: train it first")


def load_trainer(path: Path) -> ModuleType:
    """Runs the run's own source, for its `Agent`, `Args` and `make_envs`."""
    print(f"running {path} to build the network")
    spec = importlib.util.spec_from_file_location("run_source", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def rollout(trainer: ModuleType, agent: nn.Module, envs, steps: int = 32) -> torch.Tensor:
    """Observations (steps * N, *shape) of the policy's own play with sampled actions."""
    obs, _ = envs.reset(seed=1)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        seen.append(trainer.to_tensor(obs, torch.device("cpu")).clone())
        actions = torch.multinomial(agent(seen[-1])[0].softmax(-1), 1, generator=generator).squeeze(-1)
        obs = envs.step(actions.numpy())[0]
    return torch.cat(seen)


def export_onnx(policy: Policy, obs: torch.Tensor, metadata: dict[str, str], path: Path) -> None:
    """One file, symbolic batch, `OPSET`; nothing of the exporting machine in it."""
    torch.onnx.export(
        policy,
        (obs[:2],),
        path,
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        input_names=["obs"],
        output_names=["logits", "value", "action"],
        dynamic_shapes={"obs": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    model = onnx.load(path)
    graphs = [model.graph, *model.functions]
    for item in [model, *graphs, *(node for graph in graphs for node in graph.node), *model.graph.value_info]:
        item.ClearField("metadata_props")  # stack traces and file paths
        item.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            fail(f"ONNX: the batch of `{value.name}` is fixed: the network's forward depends on the batch size", 1)
    if max(entry.version for entry in model.opset_import if entry.domain == "") != OPSET:
        fail(f"ONNX: the exporter did not write opset {OPSET}", 1)
    path.write_bytes(model.SerializeToString(deterministic=True))


def export_torchscript(policy: Policy, obs: torch.Tensor, path: Path) -> None:
    """By tracing; loads without any source."""
    print("note: PyTorch deprecates TorchScript; prefer the ONNX file for new deployments")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(policy, (obs[:2],)), path)


@torch.no_grad()
def check_parity(policy: Policy, obs: torch.Tensor, onnx_path: Path, script_path: Path) -> None:
    """Both files against PyTorch on `obs` and on zeros; ends with exit code 1 on a mismatch."""
    session = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    script = torch.jit.load(script_path)
    for batch in BATCHES:
        for rows in (*obs.split(batch)[: 64 // batch], torch.zeros_like(obs[:batch])):
            logits, value, action = (x.numpy() for x in policy(rows))
            best = np.sort(logits)[:, -2:]
            clear = best[:, -1] - best[:, 0] > 2 * (ATOL + RTOL * np.abs(best).max())  # else a tie may fall either way
            files = {
                "policy.onnx": session.run(None, {"obs": rows.numpy()}),
                "policy.torchscript.pt": [x.numpy() for x in script(rows)],
            }
            for name, (its_logits, its_value, its_action) in files.items():
                for what, a, b in (("logits", logits, its_logits), ("value", value, its_value)):
                    if not np.allclose(a, b, rtol=RTOL, atol=ATOL):
                        worst = np.abs(a - b).max()
                        fail(f"{name}: {what} differ from PyTorch's by up to {worst:.3g} at batch {batch}", 1)
                if not np.array_equal(action[clear], its_action[clear]):
                    fail(f"{name}: actions differ from PyTorch's at batch {batch}", 1)


def action_meanings(envs) -> list[str]:
    """Names of the actions where the environment has them, else their numbers."""
    if hasattr(envs, "ale"):
        return [action.name for action in envs.ale.get_action_set()]
    names = getattr(envs.envs[0].unwrapped, "get_action_meanings", None)
    return list(names()) if names else [str(n) for n in range(int(envs.single_action_space.n))]


def export(args: Args) -> None:
    """Writes policy.onnx, policy.torchscript.pt and policy.json, all of them or none."""
    run_dir = Path(args.run)
    output_dir = Path(args.output_dir) if args.output_dir else run_dir
    record = load_record(run_dir)
    state, checkpoint_sha256 = load_checkpoint(run_dir)
    torch.manual_seed(1)
    trainer = load_trainer(run_dir / Path(record["script"]).name)
    try:
        run_args = trainer.Args(**record["args"])
        envs = trainer.make_envs(run_args, max(BATCHES))
        agent = trainer.Agent(envs)
        agent.load_state_dict(state["agent"])
    except (TypeError, KeyError, RuntimeError) as error:
        fail(f"the checkpoint in {run_dir} does not fit its source: {error}")
    policy = Policy(agent.eval())
    obs = rollout(trainer, agent, envs)
    pixels = obs.dtype == torch.uint8
    result_path = run_dir / "result.json"
    result = json.loads(result_path.read_text()) if result_path.exists() else {}
    about = {
        "env_id": run_args.env_id,
        "seed": run_args.seed,
        "global_step": state["global_step"],
        "score": {k: result.get(k) for k in ("eval_return_mean", "eval_return_std", "eval_episodes")},
        "action_meanings": action_meanings(envs),
        "preprocessing": {
            "inside_the_graph": "scaling to [0, 1]" if pixels else "running normalisation or one-hot encoding",
            "before_the_graph": "84x84 grey frames, maximum of the last two of 4 skipped, 4 stacked, oldest first"
            if pixels
            else "none",
        }
        | ({"frame_skip": 4, "repeat_action_probability": run_args.stickiness} if pixels else {}),
        "value_units": "discounted sum of rewards clipped to [-1, 1]"
        if pixels
        else "discounted sum of rewards divided by the run's reward scale",
        "checkpoint_sha256": checkpoint_sha256,
        "trained_with": record["versions"],
    }
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export-") as folder:
            onnx_path, script_path = Path(folder) / "policy.onnx", Path(folder) / "policy.torchscript.pt"
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                export_onnx(policy, obs, metadata, onnx_path)
            export_torchscript(policy, obs, script_path)
            check_parity(policy, obs, onnx_path, script_path)
            packages = ("torch", "onnx", "onnxruntime", "numpy")
            shape, actions = list(obs.shape[1:]), int(envs.single_action_space.n)
            policy_json = about | {
                "inputs": [{"name": "obs", "shape": ["batch", *shape], "dtype": str(obs.dtype).removeprefix("torch.")}],
                "outputs": [
                    {"name": "logits", "shape": ["batch", actions], "dtype": "float32"},
                    {"name": "value", "shape": ["batch"], "dtype": "float32"},
                    {"name": "action", "shape": ["batch"], "dtype": "int64", "mode": "greedy"},
                ],
                "opset": OPSET,
                "versions": {"python": platform.python_version()}
                | {p: importlib.metadata.version(p) for p in packages},
                "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (onnx_path, script_path)},
            }
            json_path = Path(folder) / "policy.json"
            json_path.write_text(json.dumps(policy_json, indent=2) + "\n")
            for path in (onnx_path, script_path, json_path):
                os.replace(path, output_dir / path.name)
    except OSError as error:
        fail(f"--output-dir {output_dir} cannot be written: {error.strerror or error}")
    print(f"{output_dir}: policy.onnx, policy.torchscript.pt and policy.json equal PyTorch on batches {BATCHES}")


def parse_args() -> Args:
    """tyro's command line, with an error as one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in errors.getvalue().splitlines()[1:]]
        rule = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))
        fail(f"{' '.join(lines[:rule])} (see --help)")


if __name__ == "__main__":
    export(parse_args())
