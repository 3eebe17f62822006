"""Exports a trained run to ONNX, TorchScript and torch.export; a file is kept only if it agrees with PyTorch.

    python export_policy.py runs/<run>
    python export_policy.py runs/<run> --stochastic --formats onnx torch-export --output-dir deploy
    python export_policy.py runs/<run> --evaluate 10 --benchmark --quantize int8

The graph takes the raw observation (normalisation is inside) and returns `logits`, `value` and `action`: the greedy
one or, with --stochastic, one drawn with the caller's own uniform random numbers.
The source snapshot in the run folder builds the network, so a changed copy of a trainer exports without edits here.
"""

import contextlib
import hashlib
import inspect
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NoReturn

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

OPSET = 20
BATCHES = (1, 2, 3, 17, 256)  # batch sizes at which each file is checked
RTOL, ATOL = 1e-4, 1e-5
FILES = {"onnx": "policy.onnx", "torchscript": "policy.torchscript.pt", "torch-export": "policy.pt2"}
INT8 = "policy.int8.onnx"

Runtime = Callable[..., list[np.ndarray]]  # arrays in, [logits, value, action] out


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of a trainer"""
    formats: tuple[Literal["onnx", "torchscript", "torch-export"], ...] = ("onnx", "torchscript")
    """what to write: policy.onnx, policy.torchscript.pt, policy.pt2"""
    output_dir: str | None = None
    """where the files and policy.json go (default: the run folder)"""
    stochastic: bool = False
    """add an input `uniform` (batch, num_actions) in (0, 1) that draws the action from the policy"""
    evaluate: int = 0
    """whole games that each file plays, and PyTorch with the same seeds"""
    benchmark: bool = False
    """measure the latency of each file and of PyTorch"""
    quantize: Literal["int8"] | None = None
    """also write policy.int8.onnx, calibrated on the policy's own observations, and report how many actions agree"""


class Policy(nn.Module):
    """What is exported: obs (B, *shape), raw -> logits (B, A) float32, value (B,) float32, action (B,) int64.

    The action is the greedy one; with `uniform` (B, A) it is argmax(logits - log(-log u)), a draw from softmax(logits)
    (the Gumbel-max trick: Maddison et al. 2014, arXiv:1411.0030, section 2).
    """

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(
        self, obs: torch.Tensor, uniform: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, value = self.agent(obs.clone())  # it may normalise in place
        noise = 0.0 if uniform is None else -torch.log(-torch.log(uniform))
        return logits, value, (logits + noise).argmax(-1)


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line that says what to change."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def say(line: str) -> None:
    """Prints `line`; a terminal or pipe that is gone does not end the export."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason(error: BaseException) -> str:
    """The first line of what `error` was first raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_record(run_dir: Path) -> dict:
    """The run's args.json."""
    try:
        if not run_dir.is_dir():
            fail(f"{run_dir} is not a folder: give a trainer's run folder")
        record = json.loads((run_dir / "args.json").read_text())
        if not (run_dir / Path(record["script"]).name).is_file():
            fail(f"{run_dir} lacks the source {record['script']} that made it")
        return record
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{run_dir} holds no run: its args.json is missing or not a trainer's")


def load_checkpoint(run_dir: Path) -> tuple[dict, str]:
    """The newest good checkpoint and its sha256. Never runs code that a file may hold."""
    paths = [path for path in (run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt") if path.exists()]
    for path in paths:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                raise ValueError("its sha256 does not match")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), hashlib.sha256(data).hexdigest()
        except OSError as error:
            fail(f"{path} cannot be read: {error.strerror}")
        except Exception as error:
            print(f"warning: {path} is damaged: {' '.join(str(error).split())[:80]}", file=sys.stderr)
    fail(f"{run_dir} has no good checkpoint" if paths else f"{run_dir} has no checkpoint yet: train it first")


def load_trainer(path: Path, record: dict) -> ModuleType:
    """Runs the run's own source, for its `Agent`, `Args` and `make_envs`."""
    say(f"running the code in {path} to build the network")
    module = sys.modules["run_source"] = ModuleType("run_source")  # dataclasses look their module up
    module.__file__ = str(path)
    sys.path.append(str(Path(record["script"]).parent))  # where a module that registers the environment may lie
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))  # an import would write __pycache__ beside it
    except Exception as error:
        fail(f"{path} does not run here: {type(error).__name__}: {error}")
    return module


@torch.no_grad()
def rollout(trainer: ModuleType, agent: nn.Module, args, count: int) -> torch.Tensor:
    """Observations (count, *shape) that the policy meets in 16 environments with sampled actions."""
    envs = trainer.make_envs(args, 16)
    obs, _ = envs.reset(seed=1)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(-(-count // 16)):
        seen.append(trainer.to_tensor(obs, torch.device("cpu")).clone())
        actions = torch.multinomial(agent(seen[-1].clone())[0].softmax(-1), 1, generator=generator).squeeze(-1)
        obs = envs.step(actions.numpy())[0]
    envs.close()
    return torch.cat(seen)[:count]


def trace(policy: Policy, inputs: tuple[torch.Tensor, ...], source: Path) -> torch.export.ExportedProgram:
    """The policy's graph with a symbolic batch; where forward has none, fails with the line of `source` at fault."""
    batch = torch.export.Dim("batch")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(policy, inputs, dynamic_shapes=({0: batch},) * len(inputs))
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == source]
        where = f" at {source.name}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
        fixed = "it fixes the batch size, as len(x) or a number does; x.shape[0] does not"
        why = fixed if "Constraints violated" in str(error) else reason(error)
        fail(f"the network's forward cannot be exported{where}: {why}", code=1)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            node.meta.pop("stack_trace", None)  # file paths of this machine
    return program


def export_onnx(program: torch.export.ExportedProgram, names: list[str], metadata: dict[str, str], path: Path) -> None:
    """One file with a symbolic batch, in opset `OPSET`, that tells nothing of this machine."""
    model = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=names,
        output_names=["logits", "value", "action"],
        verbose=False,
    ).model_proto
    graphs = [model.graph, *model.functions]
    parts = [part for graph in graphs for part in (*graph.node, *graph.value_info)]
    for part in (model, *graphs, *parts, *model.graph.input, *model.graph.output, *model.graph.initializer):
        part.ClearField("metadata_props")  # stack traces and file paths
        part.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            fail(f"ONNX: the batch of `{value.name}` is fixed: the network's forward depends on the batch size", 1)
    if max(entry.version for entry in model.opset_import if entry.domain == "") != OPSET:
        fail(f"ONNX: the exporter did not write opset {OPSET}", 1)
    save_onnx(model, metadata, path)


def save_onnx(model: onnx.ModelProto, metadata: dict[str, str], path: Path) -> None:
    """Writes `model` with this metadata and no other: the same bytes for the same model."""
    del model.metadata_props[:]
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def export_torchscript(policy: Policy, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Without the debug records, which hold file paths of the exporting machine."""
    whole = io.BytesIO()
    torch.jit.save(torch.jit.trace(policy, inputs, check_trace=False), whole)  # `check_parity` sees more
    with zipfile.ZipFile(whole) as records, zipfile.ZipFile(path, "w") as file:
        for name in records.namelist():
            if not name.endswith(".debug_pkl"):
                file.writestr(zipfile.ZipInfo(name), records.read(name))


def write(
    name: str,
    path: Path,
    policy: Policy,
    program: torch.export.ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    names: list[str],
    metadata: dict[str, str],
) -> Runtime:
    """Writes and loads one of `FILES`; a network that its writer or runtime cannot take ends in one line."""
    try:
        with quiet():
            if name == "onnx":
                export_onnx(program, names, metadata, path)
            elif name == "torchscript":
                export_torchscript(policy, inputs, path)
            else:
                buffer = io.BytesIO()  # PyTorch's own writer aborts the process where the disk is full
                torch.export.save(program, buffer)
                path.write_bytes(buffer.getvalue())
        return load_runtime(path)
    except OSError:
        raise
    except Exception as error:
        fail(f"the network cannot be written as {name} (leave that out of --formats): {reason(error)}", code=1)


def quantize_int8(path: Path, names: list[str], inputs: list[np.ndarray], metadata: dict[str, str], to: Path) -> dict:
    """Static quantisation (QDQ) of the layers' weights and activations, calibrated on a seventh of `inputs`.

    Weights get 7 bits: with 8, products saturate on x86 CPUs without VNNI (ONNX Runtime's documentation).

    Returns, prints and stores in the file how often its actions equal those of `path`.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    parts = zip(*(np.array_split(x[::7], len(x) // 112) for x in inputs))  # 16 or 17 rows each, of all environments
    rows = (dict(zip(names, part)) for part in parts)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(rows, None)

    with quiet():
        quant_pre_process(str(path), str(to), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(to),
            str(to),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=True,
        )
    agreement = float(np.mean(load_runtime(to)(*inputs)[2] == load_runtime(path)(*inputs)[2]))
    verdict = "at least 95 %" if agreement >= 0.95 else "under 95 %"
    cost = {"action_agreement": agreement, "observations": len(inputs[0]), "verdict": verdict}
    save_onnx(onnx.load(to), metadata | {"int8": json.dumps(cost)}, to)
    sizes = path.stat().st_size, to.stat().st_size
    say(f"{to.name}: {agreement:.2%} of {len(inputs[0])} actions agree, {sizes[0]:,} -> {sizes[1]:,} bytes")
    if agreement < 0.95:
        print(f"warning: {to.name}: under 95 % of its actions agree: do not deploy it as it is", file=sys.stderr)
    return cost


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what exporters print and warn about, none of which a user can change."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def eager(module: nn.Module) -> Runtime:
    """A PyTorch module as a runtime."""

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in module(*map(torch.from_numpy, arrays))]

    return run


def load_runtime(path: Path, threads: int = 1) -> Runtime:
    """An exported file as a runtime; PyTorch's take their threads from torch.set_num_threads."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 1 is fastest for one observation: no hand-over to a pool
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays)))
    with quiet():
        if path.suffix == ".pt2":
            return eager(torch.export.load(path).module())
        return eager(torch.jit.freeze(torch.jit.load(path)))


def probes(obs: np.ndarray, space) -> list[np.ndarray]:
    """Observations to compare runtimes on, 256 rows each: of real play, zeros, the space's extremes, random ones."""
    rng = np.random.default_rng(1)
    if hasattr(space, "n"):
        low, high = int(space.start), int(space.start) + int(space.n) - 1
    else:
        bounds = space.low.astype(float), space.high.astype(float)
        reach = np.maximum(100.0, 10.0 * obs.std(0))  # where the space is wide: around what play shows
        low, high = (
            np.where(bounds[1] - bounds[0] <= 1e4, bound, np.clip(obs.mean(0) + end, *bounds))
            for bound, end in zip(bounds, (-reach, reach))
        )
    shape = (256, *obs.shape[1:])
    zeros = np.broadcast_to(np.clip(0, low, high), shape)
    extremes = np.where(rng.random(shape) < 0.5, low, high)
    spread = low + rng.random(shape) * (high - low)
    return [np.ascontiguousarray(x, dtype=obs.dtype) for x in (obs[:256], zeros, extremes, spread)]


@np.errstate(over="ignore", invalid="ignore")  # of infinite and masked logits
def check_parity(reference: Runtime, files: dict[str, Runtime], probes: list[np.ndarray], uniform) -> None:
    """Each file against PyTorch on all probes at all `BATCHES`; ends with exit code 1 on a mismatch.

    A logit or value near 0 that large terms add up to is only as exact as these: the absolute tolerance grows with the
    median size of the rows' outputs, without logits so low that they mask an action. Actions must be equal, except
    where scores differ from the best by less than twice the tolerance of their own row: there any of them will do.
    Where PyTorch gives NaN, so must the file.
    """
    for rows in probes:
        whole = [rows] if uniform is None else [rows, uniform[: len(rows)]]
        logits, value, _ = reference(*whole)
        drawn = np.where(logits < logits.max(-1, keepdims=True) - 100, 0.0, logits)  # exp(-100) is 0 in float32
        atols = [ATOL * max(1.0, np.median(sizes)) for sizes in (np.abs(drawn).max(-1), np.abs(value))]
        for batch in BATCHES:
            inputs = [x[:batch] for x in whole]
            logits, value, _ = reference(*inputs)
            scores = logits if uniform is None else logits - np.log(-np.log(inputs[1]))
            best = scores.max(-1, keepdims=True)
            good = ~(scores < best - 2 * (ATOL + RTOL * np.abs(best)))  # which actions will do
            for name, file in files.items():
                its_logits, its_value, its_action = file(*inputs)
                both = (("logits", logits, its_logits), ("value", value, its_value))
                for (what, a, b), atol in zip(both, atols):
                    far = ~np.isclose(a, b, rtol=RTOL, atol=atol, equal_nan=True)
                    if far.any():
                        worst = np.abs(a[far] - b[far]).max()
                        fail(f"{name}: {what} differ from PyTorch's by up to {worst:.3g} at batch {batch}", 1)
                if not (good & (its_action[:, None] == np.arange(good.shape[1]))).any(-1).all():
                    fail(f"{name}: actions differ from PyTorch's at batch {batch}", 1)


def play(trainer: ModuleType, run_args, runtime: Runtime, games: int, num_actions: int, stochastic: bool) -> list:
    """Scores of the trainer's own evaluation, where each action is `runtime`'s."""
    rng = np.random.default_rng(1)

    class Player(nn.Module):  # as an evaluation may call its eval() and train()
        def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            uniform = [rng.random((len(obs), num_actions), dtype=np.float32)] if stochastic else []
            _, value, action = map(torch.from_numpy, runtime(obs.numpy(), *uniform))
            return F.one_hot(action, num_actions).float().log(), value  # leaves the evaluation nothing else to sample

    return trainer.evaluate(Player(), run_args, games, torch.device("cpu"))


def latencies(policy: Policy, paths: list[Path], inputs: list[np.ndarray]) -> list[dict]:
    """Milliseconds per call of each runtime at several batch sizes, with one thread and with one per core."""
    rows, before = [], torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        runtimes = {"PyTorch eager": (eager(policy), None)}
        runtimes |= {path.name: (load_runtime(path, threads), path.stat().st_size) for path in paths}
        for batch in (1, 8, 64, 256):
            for name, (runtime, size) in runtimes.items():
                arrays, times = [x[:batch] for x in inputs], []
                for _ in range(50):  # warm-up: TorchScript optimises in its first calls
                    runtime(*arrays)
                until = time.perf_counter() + 0.3
                while len(times) < 50 or time.perf_counter() < until:
                    began = time.perf_counter()
                    runtime(*arrays)
                    times.append(1e3 * (time.perf_counter() - began))
                median, p99 = np.percentile(times, (50, 99))
                row = {"runtime": name, "threads": threads, "batch": batch, "median_ms": round(median, 4)}
                row |= {"p99_ms": round(p99, 4), "obs_per_second": round(1e3 * batch / median), "file_bytes": size}
                rows.append(row)
    torch.set_num_threads(before)
    return rows


def print_table(rows: list[dict]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        say("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def single_env(envs):
    """One of the environments as the run's source makes it, without the trainer's own two wrappers around it."""
    env = envs.envs[0] if hasattr(envs, "envs") else envs
    if type(env).__name__ == "Replayable":
        env = env.env
    inner = getattr(getattr(env, "env", None), "action_space", None)
    shifted = isinstance(inner, gym.spaces.Discrete) and (inner.start != 0 or inner.dtype != np.int64)
    if shifted and type(env) is gym.wrappers.TransformAction:  # the trainer's, so that the network counts from 0
        env = env.env
    return env


def added_wrappers(env) -> list[gym.Wrapper]:
    """What the run's source puts around the environment that Gymnasium's `make` gives it, the outermost first."""
    harmless = gym.wrappers.PassiveEnvChecker, gym.wrappers.OrderEnforcing, gym.wrappers.TimeLimit

    def wrappers(env) -> Iterator[gym.Wrapper]:
        while isinstance(env, gym.Wrapper):
            if not isinstance(env, harmless):
                yield env
            env = env.env

    found, spec = [*wrappers(env)], getattr(env.unwrapped, "spec", None)
    if found and spec is not None:
        bare = gym.make(spec.id, disable_env_checker=True, **spec.kwargs)
        found = found[: len(found) - len([*wrappers(bare)])]
        bare.close()
    return found


def describe_actions(envs) -> dict:
    """The number that the environment itself gives action 0, and all actions' names, or numbers where it has none."""
    if hasattr(envs, "ale"):
        return {"first_action": 0, "action_meanings": [action.name for action in envs.ale.get_action_set()]}
    count, env = int(envs.single_action_space.n), single_env(envs)
    space = envs.single_action_space if env is envs else env.action_space
    first = int(getattr(space, "start", 0))
    numbers = [str(first + n) for n in range(count)]
    names = [str(name) for name in getattr(env.unwrapped, "get_action_meanings", list)()]
    changed = any(isinstance(wrapper, gym.ActionWrapper) for wrapper in added_wrappers(env))
    return {"first_action": first, "action_meanings": names if len(names) == count and not changed else numbers}


def load_score(run_dir: Path, global_step: int) -> dict:
    """The trainer's evaluation from result.json, or None values where that is not of the policy at `global_step`."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
        fits = result["global_step"] == global_step
    except (OSError, ValueError, LookupError, TypeError):
        fits = False
    keys = ("eval_return_mean", "eval_return_std", "eval_episodes")
    return {k: result.get(k) if fits else None for k in keys} | {"actions": "sampled"}


def describe(run_dir: Path, run_args, record: dict, state: dict, sha256: str, envs) -> dict:
    """What a deployer must know of the policy: in policy.json and inside the ONNX files."""
    if hasattr(envs, "ale"):
        stack, height, width = envs.single_observation_space.shape[:3]
        default = {name: x.default for name, x in inspect.signature(type(envs.unwrapped)).parameters.items()}
        made = default | (envs.spec.kwargs if envs.spec else {})
        colour, skip = ("grey" if made["grayscale"] else "RGB"), made["frameskip"]
        frame = f"{colour} maximum of the last two of {skip}" if made["maxpool"] else f"last of {skip}, in {colour}"
        frame += f", resized to {width}x{height} by area"
        begin = "FIRE where the game has it, then no-ops" if made["use_fire_reset"] else "no-ops"
        preprocessing = {
            "inside_the_graph": "scaling or running normalisation of each pixel",
            "before_the_graph": f"the last {stack} frames, oldest first, black before a game's start; each the {frame}",
            "game_start": f"{begin}, up to {max(made['noop_max'] - 1, 0)} frames in all; nothing after a lost life",
            "frame_skip": skip,
            "repeat_action_probability": run_args.stickiness,
        }
        units = "discounted sum of rewards, each clipped to [-1, 1]"
        units += ", up to the next lost life" * getattr(run_args, "episodic_life", False)
    else:
        wrappers = added_wrappers(single_env(envs))
        after = [type(w).__name__ for w in wrappers if isinstance(w, gym.ActionWrapper)]
        before = [type(w).__name__ for w in wrappers if not isinstance(w, (gym.ActionWrapper, gym.RewardWrapper))]
        preprocessing = {
            "inside_the_graph": "running normalisation or one-hot encoding",
            "before_the_graph": ", ".join(reversed(before)) or "none",  # wrappers that the source adds, innermost first
            "after_the_graph": ", ".join(after) or "none",  # likewise, outermost first: what actions go through
        }
        units = "discounted sum of rewards"
        variance = state["agent"].get("return_stats.var") if getattr(run_args, "norm_reward", False) else None
        if variance is not None:
            scale = (float(variance) + 1e-8) ** 0.5
            units += f", each divided by {scale:.6g}, the run's reward scale, and clipped to [-10, 10]"
    return {
        "env_id": run_args.env_id,
        "seed": run_args.seed,
        "global_step": state["global_step"],
        "score": load_score(run_dir, state["global_step"]),
        **describe_actions(envs),
        "preprocessing": preprocessing,
        "value_units": units,
        "gamma": run_args.gamma,
        "checkpoint_sha256": sha256,
        "trained_with": state.get("versions", record.get("versions")),
    }


def describe_graph(obs: torch.Tensor, num_actions: int, stochastic: bool) -> dict:
    """Inputs and outputs of every file, and what wrote them."""
    dtype = str(obs.dtype).removeprefix("torch.")
    inputs = [{"name": "obs", "shape": ["batch", *obs.shape[1:]], "dtype": dtype}]
    if stochastic:
        inputs.append({"name": "uniform", "shape": ["batch", num_actions], "dtype": "float32"})
    mode = "stochastic" if stochastic else "greedy"
    outputs = [
        {"name": "logits", "shape": ["batch", num_actions], "dtype": "float32"},
        {"name": "value", "shape": ["batch"], "dtype": "float32"},
        {"name": "action", "shape": ["batch"], "dtype": "int64", "mode": mode},
    ]
    packages = {module.__name__: module.__version__ for module in (onnx, onnxruntime, np)}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)} | packages
    return {"inputs": inputs, "outputs": outputs, "opset": OPSET, "versions": versions}


def put_in_place(targets: dict[Path, Path]) -> None:
    """Moves each file to its target; if one cannot be moved, the earlier files come back."""
    moved = []
    try:
        for path, target in targets.items():
            if target.exists():
                shutil.copy2(target, f"{path}.earlier")
            os.replace(path, target)
            moved.append((Path(f"{path}.earlier"), target))
    except BaseException:
        for earlier, target in moved:
            if earlier.exists():
                os.replace(earlier, target)
            else:
                target.unlink()
        raise


def export(args: Args) -> None:
    """Writes the files that were asked for and policy.json, all of them or none."""
    if args.evaluate < 0:
        fail("--evaluate must be 0 or more games")
    if not args.formats:
        fail("--formats needs at least one of onnx, torchscript, torch-export")
    if args.quantize and "onnx" not in args.formats:
        fail("--quantize int8 makes an ONNX file: add onnx to --formats")
    if args.output_dir is not None and args.output_dir.encode(errors="ignore").decode() != args.output_dir:
        fail("--output-dir must be UTF-8 text")
    if args.output_dir == "":
        fail("--output-dir needs the name of a folder")
    run_dir = Path(args.run)
    output_dir = Path(args.output_dir) if args.output_dir else run_dir
    record = load_record(run_dir)
    state, checkpoint_sha256 = load_checkpoint(run_dir)
    torch.manual_seed(1)
    source = (run_dir / Path(record["script"]).name).resolve()
    trainer = load_trainer(source, record)
    if state.get("source") not in (None, hashlib.sha256(source.read_bytes()).hexdigest()):
        how = "if its network is another, resume the run with the source that trained it, then export"
        print(f"warning: {source.name} changed after the checkpoint was written: {how}", file=sys.stderr)
    try:
        run_args = trainer.Args(**record["args"])
        envs = trainer.make_envs(run_args, 1)
        known, takes = {"args": run_args} | vars(run_args), inspect.signature(trainer.Agent).parameters
        agent = trainer.Agent(envs, **{name: known[name] for name in takes if name in known})
        agent.load_state_dict(state["agent"])
        policy, about = Policy(agent).eval(), describe(run_dir, run_args, record, state, checkpoint_sha256, envs)
        num_actions, space = int(envs.single_action_space.n), envs.single_observation_space
        envs.close()
        obs = rollout(trainer, agent, run_args, 10_000 if args.quantize else 512)
    except Exception as error:
        fail(f"{source} cannot rebuild its network and play: {type(error).__name__}: {error}")
    uniform = torch.rand(len(obs), num_actions).clamp(1e-6, 1 - 1e-6) if args.stochastic else None
    inputs = [obs] if uniform is None else [obs, uniform]
    two_rows = tuple(x[:2].clone() for x in inputs)
    arrays = [x.numpy() for x in inputs]
    names = ["obs", "uniform"][: len(inputs)]
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    logging.getLogger("torch").setLevel(logging.ERROR)
    program = trace(policy, two_rows, source)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export-") as folder:
            paths = {name: Path(folder) / FILES[name] for name in FILES if name in args.formats}
            files = {}
            for name, path in paths.items():
                files[path.name] = write(name, path, policy, program, two_rows, names, metadata)
            if "torchscript" in paths:
                say("note: PyTorch deprecates TorchScript; torch-export is its successor, ONNX the best supported")
            try:
                check_parity(eager(policy), files, probes(arrays[0], space), None if uniform is None else arrays[1])
            except Exception as error:
                fail(f"the network does not take every observation of its space: {reason(error)}", code=1)

            if args.quantize:
                paths["int8"] = Path(folder) / INT8
                about["int8"] = quantize_int8(paths["onnx"], names, arrays, metadata, paths["int8"])
                files[INT8] = load_runtime(paths["int8"])
            if args.evaluate:
                about["evaluation"] = {}
                for name, runtime in ({"PyTorch": eager(policy)} | files).items():
                    scores = play(trainer, run_args, runtime, args.evaluate, num_actions, args.stochastic)
                    about["evaluation"][name] = {"mean": float(np.mean(scores)), "scores": scores}
                    say(f"{name}: mean return {np.mean(scores):.1f} over {len(scores)} games")
            if args.benchmark:
                about["latency"] = latencies(policy, list(paths.values()), arrays)
                print_table(about["latency"])

            about |= describe_graph(obs, num_actions, args.stochastic)
            about["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()}
            json_path = Path(folder) / "policy.json"
            json_path.write_text(json.dumps(about, indent=2) + "\n")
            targets = {path: output_dir / path.name for path in (*paths.values(), json_path)}
            for target in targets.values():
                if target.is_dir():
                    fail(f"{target} is a folder: remove it or choose another --output-dir")
            put_in_place(targets)
    except OSError as error:
        fail(f"--output-dir {output_dir} cannot be written: {error.strerror or error}")
    for name in (*FILES.values(), INT8):
        if name not in about["sha256"] and (output_dir / name).exists():
            print(f"warning: {output_dir / name} is from an earlier export: policy.json omits it", file=sys.stderr)
    exact = ", ".join(path.name for path in paths.values() if path.name != INT8)
    say(f"{output_dir}: {exact} match PyTorch at batch sizes {BATCHES}")


def parse_args() -> Args:
    """tyro's command line, with an error as one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue())  # without a terminal's colours
        lines = [line.strip("│| ") for line in plain.splitlines()[1:]]
        ruled = [not line.strip("─╰╯-+") for line in lines]
        begin = ruled.index(False)
        fail(f"{' '.join(lines[begin : ruled.index(True, begin)])} (see --help)")


if __name__ == "__main__":
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # it may be closed
    sys.stdout.reconfigure(errors="backslashreplace")  # for a name that the terminal cannot show, as stderr does
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C: no temporary folder is left
    try:
        export(parse_args())
    except KeyboardInterrupt:
        fail("interrupted", code=130)
