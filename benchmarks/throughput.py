"""Where a trainer's time goes, what bounds it, how it stands beside other implementations, and what memory it takes.

    python benchmarks/throughput.py discrete                                  # CartPole-v1, the trainer's defaults
    python benchmarks/throughput.py atari --env-id ALE/Breakout-v5 --turns 5
    python benchmarks/throughput.py atari --env-id BreakoutNoFrameskip-v4 --tag canonical \\
        --flags "--num-envs 8 --num-steps 128 --num-minibatches 4 --learning-rate 2.5e-4 --clip-vloss --vf-coef 0.5
        --no-norm-obs" --peer sb3 cleanrl --cleanrl ../cleanrl
    python benchmarks/throughput.py atari --versus=--no-bf16                  # the trainer with and without a flag
    python benchmarks/throughput.py atari --buffer 1000 100000 1000000        # only the memory; takes some time

Each turn measures, in environment steps a second: (a) the environments alone with random actions, (b) the policy alone,
actions drawn and read back, (c) the update alone, all its epochs, (d) the real trainer from its command line, and the
peers. One after the other, the parts allow the serial bound 1/(1/a + 1/b + 1/c); at once, the overlapped bound, the
slowest of them. (d) and the peers are processes of their own; their training loops count without the first two
iterations. Peers get the trainer's settings, device and number of threads, and keep their networks and wrappers. `sb3`
is Stable-Baselines3's PPO with its default DummyVecEnv, for vectors in VecNormalize, `cleanrl` is CleanRL's ppo.py or
ppo_atari.py: both step their environments one after the other in one process. `envpool` is CleanRL's
ppo_atari_envpool.py, whose environments run on threads of EnvPool.

    pip install stable-baselines3 opencv-python-headless                      # for sb3 and cleanrl
    pip install envpool                                                       # for envpool
    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl                   # for cleanrl and envpool

`--buffer` fills a rollout of that many transitions with real play and trains on it for one epoch, each in a process of
its own; a small one shows what a process takes without it.

Writes benchmarks/results/throughput_<trainer>_<env>[_<tag>].json, after each turn.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before PyTorch: as the Atari trainer does, for its parts and peers

import numpy as np
import torch
import tyro
from learning import RESULTS, ROOT, about, commit, start

BUFFER_ENVS, BUFFER_MINIBATCH = 64, 256  # of --buffer, whose capacity is num_envs * num_steps
# Runs a command, then prints its peak. Linux counts what the parent held at the fork as the child's: this one is small.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("\\npeak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(code)
"""
# Runs CleanRL's script, which was written for Gymnasium 0.29, unchanged on Gymnasium 1: ALE's ids are registered by
# hand, two wrappers have new names, and vector environments reset in the step after an episode's end unless told
# otherwise. The new form of `final_info` is taken out, with it the prints of episodes. Its wrappers skip the frames, so
# the emulator must not, whatever the id. For EnvPool it speaks Gym 0.23's interface, which EnvPool no longer does.
CLEANRL = """
import functools, runpy, sys
import gymnasium as gym, torch
checkout, script, threads, stickiness = sys.argv[1:5]
if script == "ppo_atari.py":
    import ale_py
    gym.register_envs(ale_py)
    gym.make = functools.partial(gym.make, frameskip=1, repeat_action_probability=float(stickiness))
    gym.wrappers.GrayScaleObservation = gym.wrappers.GrayscaleObservation
    gym.wrappers.FrameStack = gym.wrappers.FrameStackObservation
if script == "ppo_atari_envpool.py":
    import types, envpool

    class Wrapper:
        def __init__(self, env):
            self.env = env

        def __getattr__(self, name):
            return getattr(self.env, name)

        def reset(self):
            return self.env.reset()

        def step(self, action):
            return self.env.step(action)

    class Envs(Wrapper):
        def reset(self):
            return self.env.reset()[0]

        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated | truncated, info

    sys.modules["gym"] = types.SimpleNamespace(Wrapper=Wrapper, spaces=gym.spaces)
    make = envpool.make
    own = {"env_type": "gymnasium", "repeat_action_probability": float(stickiness)}
    envpool.make = lambda env_id, **kwargs: Envs(make(env_id, **kwargs | own))

class SameStep(gym.vector.SyncVectorEnv):
    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions):
        *transition, infos = super().step(actions)
        infos.pop("final_info", None)
        return *transition, infos

gym.vector.SyncVectorEnv = SameStep
torch.set_num_threads(int(threads))
sys.path.insert(0, checkout)
sys.argv = [script, *sys.argv[5:]]
runpy.run_path(f"{checkout}/cleanrl/{script}", run_name="__main__")
"""
CLEANRL_SCRIPTS = {
    "discrete": {"cleanrl": "ppo.py"},
    "atari": {"cleanrl": "ppo_atari.py", "envpool": "ppo_atari_envpool.py"},
}
GAE_INPUTS = ("rewards", "values", "final_values", "terminated", "truncated")


class Parts:
    """A trainer's parts, set up as its `train` does. What this script knows of the inside of a trainer is here."""

    def __init__(self, trainer, args):
        self.trainer, self.args, atari = trainer, args, "atari" in trainer.__name__
        trainer.seed_all(args.seed)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        torch.set_float32_matmul_precision("high" if atari else "highest")
        torch.set_num_threads(threads(trainer, args))
        self.device = trainer.start_ranks(args)
        envs = trainer.make_groups(args, self.device) if atari else [trainer.make_envs(args, args.num_envs)]
        self.agent = trainer.Agent(envs[0]).to(self.device)
        if atari:
            trainer.keep_memory()
            self.agent.bf16 = args.bf16 and self.device.type == "cpu" and trainer.bf16_is_faster()
        self.rollout = trainer.Rollout(args, envs[0], self.device)
        self.optimizer = trainer.ClippedAdam(self.agent, args)
        seeds = trainer.env_seeds(args.seed, 0, args.num_envs)
        self.episodes = trainer.Episodes(envs if atari else envs[0], seeds)
        self.groups = self.episodes.groups if atari else [(envs[0], slice(None))]
        functions = (trainer.act, trainer.compute_gae, trainer.learn)
        graph = trainer.Graph if self.device.type == "cuda" else lambda function: function
        self.play_graph, self.estimate_graph, self.climb_graph = map(graph, functions)
        random = np.random.default_rng(args.seed)
        self.actions = random.integers(envs[0].single_action_space.n, size=(1024, args.num_envs))
        self.count = itertools.count()

    def collect(self) -> None:
        """One real rollout of pi_old, which is kept."""
        self.pi_old = {name: tensor.clone() for name, tensor in self.agent.state_dict().items()}
        self.trainer.collect(self.agent, self.episodes, self.rollout, self.args, self.play_graph)

    def environments(self, seconds: float) -> float:
        """Environment steps a second with random actions; groups of emulators are served in order of arrival."""

        def actions(group: int) -> np.ndarray:
            return self.actions[next(self.count) % len(self.actions), self.groups[group][1]]

        def play_on() -> None:
            group, _ = self.episodes.receive()
            self.episodes.send(group, actions(group))

        if not hasattr(self.episodes, "receive"):
            return self.rate(lambda: self.groups[0][0].step(actions(0)), self.args.num_envs, seconds)
        for group in range(len(self.groups)):
            self.episodes.send(group, actions(group))
        rate = self.rate(play_on, self.args.num_envs // len(self.groups), seconds)
        for _ in self.groups:
            self.episodes.receive()
        return rate

    def act(self) -> None:
        """The policy's answer to every environment, in the rollout's last row, which no update reads."""
        for _, part in self.groups:
            self.play_graph(self.agent, self.rollout, self.rollout.idx[-1, part]).cpu().numpy()

    def update(self) -> None:
        """The advantages and K epochs that follow a rollout."""
        args, rollout = self.args, self.rollout
        if args.target_kl is not None:  # far from pi_old, a second update on this rollout would end at its first epoch
            self.agent.load_state_dict(self.pi_old)
        inputs = (getattr(rollout, name) for name in GAE_INPUTS)
        advantages, returns = self.estimate_graph(*inputs, args.gamma, args.gae_lambda)
        ent_coef = args.ent_coef if args.target_entropy is None else max(args.ent_coef, 0.01)
        phase = (self.agent, self.optimizer, rollout, advantages, returns, ent_coef, args, self.climb_graph)
        self.trainer.update(*phase)

    def rate(self, work: Callable[[], None], steps: int, seconds: float) -> float:
        """Environment steps a second of `work`, `steps` a call, over `seconds` or three calls, after one to warm up."""
        work()
        self.synchronize()
        started, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - started < seconds:
            work()
            calls += 1
        self.synchronize()
        return calls * steps / (time.perf_counter() - started)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def threads(trainer, args) -> int:
    """PyTorch's threads: the trainers take one for small networks and beside a GPU."""
    beside_gpu = args.cuda and torch.cuda.is_available()
    return 1 if beside_gpu or "discrete" in trainer.__name__ else torch.get_num_threads()


def load(path: Path):
    """Imports the script at `path`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(command: list[str], **kwargs) -> tuple[list[tuple[float, str]], float]:
    """Runs `command`. Returns its lines, each with the time it came, and its peak resident memory in MiB."""
    command = [sys.executable, "-c", PEAK, *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs) as process:
        lines = [(time.perf_counter(), line) for line in process.stdout]
    if process.returncode:
        raise SystemExit(f"{''.join(line for _, line in lines)}\nfailed: {shlex.join(command[3:])}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return lines, int(lines[-1][1].split()[1]) * unit / 2**20


def sps(lines: list[tuple[float, str]], args) -> float:
    """Steps a second without the first two iterations, from the times of the lines that end each iteration."""
    ends = [seconds for seconds, line in lines if line.startswith("SPS:")]
    return (len(ends) - 2) * args.batch_size / (ends[-1] - ends[1])


def run_trainer(trainer, args, flags: list[str]) -> tuple[float, float]:
    """Steps a second and peak MiB of the real command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, trainer.__file__, *flags, "--total-timesteps", str(args.total_timesteps)]
        _, peak = launch([*command, "--eval-episodes", "0", "--run-dir", f"{folder}/run"])
        return json.loads(Path(f"{folder}/run/result.json").read_text())["sps"], peak


def run_cleanrl(trainer, args, checkout: Path, script: str) -> tuple[float, float]:
    """Steps a second and peak MiB of CleanRL's script: its own SPS, over the whole run, is not comparable."""
    bootstrap = [str(checkout.resolve()), script, str(threads(trainer, args)), str(getattr(args, "stickiness", 0))]
    if "envpool" in script:  # which knows one id a game
        args = dataclasses.replace(args, env_id=re.sub(r"^ALE/|NoFrameskip-v4$|-v5$", "", args.env_id) + "-v5")
    source, flags = (checkout / "cleanrl" / script).read_text(), []
    for name, value in dataclasses.asdict(args).items():
        flag = name.replace("_", "-")
        if f"\n    {name}: " not in source:  # no field of CleanRL's Args
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    with tempfile.TemporaryDirectory() as folder:  # CleanRL writes ./runs
        lines, peak = launch([sys.executable, "-u", "-c", CLEANRL, *bootstrap, *flags], cwd=folder)
    return sps(lines, args), peak


def train_sb3(trainer, args) -> None:
    """Stable-Baselines3's PPO, in a process of its own; a line ends each iteration."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                print("SPS:", flush=True)

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            print("SPS:", flush=True)

    torch.set_num_threads(threads(trainer, args))
    if "atari" in trainer.__name__:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        env_kwargs = {"frameskip": 1, "repeat_action_probability": args.stickiness}  # its wrapper skips frames
        envs = make_atari_env(args.env_id, args.num_envs, seed=args.seed, env_kwargs=env_kwargs)
        policy, envs = "CnnPolicy", VecFrameStack(envs, 4)
    else:
        policy, envs = "MlpPolicy", make_vec_env(args.env_id, args.num_envs, seed=args.seed)
        if args.norm_obs or args.norm_reward:
            envs = VecNormalize(envs, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    settings = dict(
        n_steps=args.num_steps,
        batch_size=args.batch_size // args.num_minibatches,
        n_epochs=args.update_epochs,
        seed=args.seed,
    )
    settings |= dict(gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip_coef, target_kl=args.target_kl)
    settings |= dict(ent_coef=args.ent_coef, vf_coef=args.vf_coef / 2, max_grad_norm=args.max_grad_norm)
    settings |= dict(normalize_advantage=args.norm_adv, clip_range_vf=args.clip_coef if args.clip_vloss else None)
    rate = (lambda left: left * args.learning_rate) if args.anneal_lr else args.learning_rate
    device = "cuda" if args.cuda and torch.cuda.is_available() else "cpu"
    model = PPO(policy, envs, learning_rate=rate, device=device, **settings)
    model.learn(args.total_timesteps, callback=Clock())


def measure_turn(parts: Parts, flags: list[str], options: argparse.Namespace) -> dict[str, float]:
    """(a), (b), (c), (d) and the peers, one after the other."""
    trainer, args = parts.trainer, parts.args
    turn = {
        "environments": parts.environments(options.seconds),
        "policy": parts.rate(parts.act, args.num_envs, options.seconds),
        "update": parts.rate(parts.update, args.batch_size, options.seconds),
    }
    turn["serial_bound"] = 1 / sum(1 / part for part in turn.values())
    turn["overlapped_bound"] = min(turn["environments"], turn["policy"], turn["update"])
    turn["trainer"], turn["trainer_peak_mib"] = run_trainer(trainer, args, flags)
    turn["trainer_to_serial_bound"] = turn["trainer"] / turn["serial_bound"]
    turn["trainer_to_overlapped_bound"] = turn["trainer"] / turn["overlapped_bound"]
    if options.versus:
        turn["versus"], turn["versus_peak_mib"] = run_trainer(trainer, args, [*flags, *options.versus])
        turn["trainer_to_versus"] = turn["trainer"] / turn["versus"]
    if "sb3" in options.peer:
        lines, peak = launch([sys.executable, __file__, *sys.argv[1:], "--child", "sb3"])
        turn["sb3"], turn["sb3_peak_mib"] = sps(lines, args), peak
    for peer, script in CLEANRL_SCRIPTS[options.trainer].items():
        if peer in options.peer:
            turn[peer], turn[f"{peer}_peak_mib"] = run_cleanrl(trainer, args, options.cleanrl, script)
    return turn | {f"trainer_to_{peer}": turn["trainer"] / turn[peer] for peer in options.peer}


def train_buffer(trainer, args, transitions: int) -> dict[str, float]:
    """Fills a buffer of at least so many transitions with real play and trains on it for one epoch."""
    num_steps = -(-transitions // BUFFER_MINIBATCH) * BUFFER_MINIBATCH // BUFFER_ENVS
    num_minibatches = num_steps * BUFFER_ENVS // BUFFER_MINIBATCH
    shape = {"num_envs": BUFFER_ENVS, "num_steps": num_steps, "num_minibatches": num_minibatches}
    parts = Parts(trainer, dataclasses.replace(args, update_epochs=1, **shape))
    times = [time.perf_counter()]
    for phase in (parts.collect, parts.update):
        phase()
        parts.synchronize()
        times.append(time.perf_counter())
    capacity = parts.args.batch_size
    tensors = [t for t in vars(parts.rollout).values() if isinstance(t, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return shape | {
        "transitions": capacity,
        "buffer_gb": size / 1e9,
        "bytes_per_transition": size / capacity,
        "fill_seconds": times[1] - times[0],
        "epoch_seconds": times[2] - times[1],
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if parts.device.type == "cuda" else None,
    }


def words(text: str) -> list[str]:
    """The flags in `text`, as a shell would split it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def read_flags(trainer, flags: list[str], iterations: int):
    """The trainer's checked arguments for so many iterations."""
    args = tyro.cli(trainer.Args, args=flags, prog=Path(trainer.__file__).name)
    args = dataclasses.replace(args, total_timesteps=iterations * args.batch_size)
    trainer.check(args)
    return args


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["discrete", "atari"])
    parser.add_argument("--env-id", help="default: the trainer's")
    parser.add_argument("--flags", type=words, default=[], help="further flags of the trainer, in one string")
    parser.add_argument("--versus", type=words, default=[], help="flags added in a second run of the trainer each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of (a), (b) and (c) in a turn")
    parser.add_argument("--iterations", type=int, default=22, help="of (d) and the peers; the first two do not count")
    parser.add_argument("--peer", nargs="+", action="extend", choices=["sb3", "cleanrl", "envpool"], default=[])
    parser.add_argument("--cleanrl", type=Path, metavar="PATH", help="checkout of CleanRL, for --peer cleanrl envpool")
    parser.add_argument("--buffer", type=int, nargs="+", metavar="N", help="measure only the memory of N transitions")
    parser.add_argument("--tag", help="end of the record's name")
    parser.add_argument("--record", type=Path, help="write the record here")
    parser.add_argument("--child", choices=["sb3", "buffer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    atari, peers = options.trainer == "atari", set(options.peer)
    if peers & {"cleanrl", "envpool"} and not (options.cleanrl and (options.cleanrl / "cleanrl").is_dir()):
        parser.error("--peer cleanrl and envpool need --cleanrl PATH, a checkout of https://github.com/vwxyzjn/cleanrl")
    if "envpool" in peers and not atari:
        parser.error("--peer envpool is for atari")
    needs = [("stable-baselines3", "stable_baselines3", {"sb3"}), ("envpool", "envpool", {"envpool"})]
    needs += [("opencv-python-headless", "cv2", {"sb3", "cleanrl"})] * atari
    for package, module, of in needs:
        if peers & of and not importlib.util.find_spec(module):
            parser.error(f"--peer {' '.join(peers & of)} needs `pip install {package}`")
    if options.record and options.record.is_dir():
        parser.error(f"--record {options.record} is a folder")
    if options.turns < 1 or options.iterations < 4 or min(options.buffer or [1]) < 1:
        parser.error("--turns and --buffer must be at least 1 and --iterations at least 4")

    trainer = load(ROOT / f"ppo_clip_{options.trainer}.py")
    flags = [*(["--env-id", options.env_id] if options.env_id else []), *options.flags]
    read_flags(trainer, [*flags, *options.versus], options.iterations)  # an error in them now, not after a turn
    args = read_flags(trainer, flags, options.iterations)
    if options.child == "sb3":
        train_sb3(trainer, args)
        return
    if options.child == "buffer":
        print(json.dumps(train_buffer(trainer, args, options.buffer[0])))
        return

    record = about(trainer.versions()) | {
        "env_id": args.env_id,
        "seed": args.seed,
        "threads": threads(trainer, args),
    }
    for peer, package in (("sb3", "stable-baselines3"), ("envpool", "envpool")):
        if peer in peers:
            record["versions"][package] = importlib.metadata.version(package)
    if options.cleanrl:
        record["versions"]["cleanrl"] = commit(options.cleanrl)
    print(f"ppo_clip_{options.trainer}.py, {args.env_id}, {record['hardware']}", flush=True)
    tag = options.tag or ("buffer" if options.buffer else None)
    name = "_".join(filter(None, ["throughput", options.trainer, args.env_id.replace("/", "-"), tag]))
    path = options.record or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first turn
    if options.buffer:
        record["buffers"] = []
        for transitions in options.buffer:
            child = ["--child", "buffer", "--buffer", str(transitions)]  # its own process, so that peaks do not mix
            lines, peak = launch([sys.executable, __file__, *sys.argv[1:], *child])
            found = next(line for _, line in lines if line.startswith('{"num_envs"'))
            record["buffers"].append(json.loads(found) | {"peak_resident_gb": peak * 2**20 / 1e9})
            text = "{transitions:,} transitions: buffer {buffer_gb:.3f} GB, {bytes_per_transition:.0f} bytes each; "
            text += "process peak {peak_resident_gb:.3f} GB; fill {fill_seconds:.1f} s, epoch {epoch_seconds:.1f} s"
            print(text.format(**record["buffers"][-1]), flush=True)
            path.write_text(json.dumps(record, indent=2) + "\n")
    else:
        record["settings"] = dataclasses.asdict(args)
        parts = Parts(trainer, args)
        for _ in range(4 if parts.device.type == "cuda" else 1):  # the fourth call records a CUDA graph
            parts.collect()
            parts.update()
        turns = record["turns"] = []
        for _ in range(options.turns):
            turns.append(measure_turn(parts, flags, options))
            others = [*(["versus"] if options.versus else []), *options.peer]
            rates = ("environments", "policy", "update", "trainer", *others)
            print(", ".join(f"{name} {number(turns[-1][name])}" for name in rates), flush=True)
            if parts.device.type == "cuda":
                record["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20  # of the parts in this process
            record["median"] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\n{'environment steps a second':32}{'median':>12}" + f"{'turn':>12}" * options.turns)
        for key, median in record["median"].items():
            values = [median, *(turn[key] for turn in turns)]
            print(f"{key.replace('_', ' '):32}" + "".join(f"{number(value):>12}" for value in values))
    print(f"record {path}")


if __name__ == "__main__":
    start(main)
