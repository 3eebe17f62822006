"""Draws the recorded runs: mean over the seeds with its 95% band (Student's t), the seeds themselves as thin lines.

A band reaches no further than 5% of their range beyond the seeds: with three it can be narrower than 95%.

    pip install matplotlib
    python benchmarks/plot.py                                 # all figures, into benchmarks/figures
    python benchmarks/plot.py classic_control ablations

Reads benchmarks/results/learning_<record>.json and ablations.json. A curve is the mean return of the last 100 training
episodes; it ends where the shortest of its seeds ends. What is not recorded is left out, with a line that says so.
"""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib import ticker
    from PIL import Image
except ModuleNotFoundError as error:
    print(f"error: `pip install matplotlib` first: {error}", file=sys.stderr)
    raise SystemExit(2) from None

plt.switch_backend("Agg")

HERE = Path(__file__).parent
RETURN = "mean_return_of_last_100"
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 97.5%, 1 to 9 degrees of freedom

# name of the figure: (record, title, a return to mark)
LEARNING = {
    "classic_control": [  # Gymnasium's `reward_threshold`
        ("CartPole-v1", "CartPole-v1", 475),
        ("Acrobot-v1", "Acrobot-v1", -100),
        ("MountainCar-v0", "MountainCar-v0", -110),
        ("LunarLander-v3", "LunarLander-v3", 200),
    ],
    "atari": [
        ("PongNoFrameskip-v4", "Pong, no sticky actions", 18),
        ("ALE/Pong-v5", "Pong, sticky actions 0.25", 18),
    ],
    "atari_10M": [  # the returns are CleanRL's
        ("PongNoFrameskip-v4_10M", "Pong", 20.4),
        ("BreakoutNoFrameskip-v4", "Breakout", 430),
        ("BeamRiderNoFrameskip-v4", "BeamRider", 2478),
        ("QbertNoFrameskip-v4", "Qbert", 17246),
        ("SpaceInvadersNoFrameskip-v4", "SpaceInvaders", 1189),
        ("SeaquestNoFrameskip-v4", "Seaquest", 1240),
        ("MsPacmanNoFrameskip-v4", "MsPacman", 2346),
    ],
}


def student_t(n: int) -> float:
    """Half width of a mean's 95% interval, in standard errors, for `n` samples."""
    degrees = n - 1
    return T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.4 / degrees + 3 / degrees**2


def draw(axis: plt.Axes, runs: list[dict], key: str, label: str | None = None, seeds: bool = True) -> None:
    """Mean of the runs' curves, from 3 runs on with its 95% band, against `key` (step or seconds), as far as all go."""
    curves = [run["curve"] for run in runs]
    x = np.linspace(max(c[key][0] for c in curves), min(c[key][-1] for c in curves), 200)
    y = np.stack([np.interp(x, c[key], c[RETURN]) for c in curves])  # (seeds, 200)
    axis.set_xlabel("environment steps" if key == "step" else "wall time, seconds")
    if key == "seconds" and x[-1] > 600:
        x = x / 60
        axis.set_xlabel("wall time, minutes")
    (line,) = axis.plot(x, y.mean(0), label=label, linewidth=1.6)
    if len(y) > 2:
        band = student_t(len(y)) * y.std(0, ddof=1) / math.sqrt(len(y))
        low, high = y.min() - 0.05 * np.ptp(y), y.max() + 0.05 * np.ptp(y)  # few seeds make a band of any height
        bounds = np.clip((y.mean(0) - band, y.mean(0) + band), low, high)
        axis.fill_between(x, *bounds, color=line.get_color(), alpha=0.18, linewidth=0)
    if seeds and len(y) > 1:
        axis.plot(x, y.T, color=line.get_color(), alpha=0.35, linewidth=0.6)


def dress(axis: plt.Axes, key: str) -> None:
    """Grid and few ticks, those of steps in thousands and millions."""
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
    if key == "step":
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a PNG of few colours, a third of matplotlib's size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} kB")


def draw_learning(name: str, results: Path, to: Path) -> None:
    """One column per environment, four abreast; return against steps above, against wall time below.

    Seeds in records of their own, `learning_<env>_seed_<seed>.json`, mostly ran beside other work: they are
    drawn above only.
    """

    def load(path: Path) -> tuple[list[dict], str]:
        """The runs that have a curve, and their hardware."""
        record = json.loads(path.read_text())
        return [run for run in record["runs"] if len(run.get("curve", {}).get("step", [])) > 1], record["hardware"]

    columns = []
    for source, title, target in LEARNING[name]:
        path = results / f"learning_{source.replace('/', '-')}.json"
        timed, hardware = load(path) if path.exists() else ([], "")
        if timed:
            others = [run for other in sorted(results.glob(f"{path.stem}_seed_*.json")) for run in load(other)[0]]
            columns.append((title, target, {"step": timed + others, "seconds": timed}, hardware))
        else:
            print(f"{name}: no curves of {source} in {path}, left out")
    if not columns:
        return
    abreast, blocks = min(len(columns), 4), math.ceil(len(columns) / 4)
    figure, axes = plt.subplots(2 * blocks, abreast, figsize=(3.4 * abreast, 5.4 * blocks), squeeze=False)
    cells = axes.reshape(blocks, 2, abreast).swapaxes(1, 2).reshape(-1, 2)  # (columns, 2)
    for axis in cells[len(columns) :].flat:
        axis.remove()
    for column, (title, target, runs, hardware) in zip(cells, columns):
        for axis, key in zip(column, ("step", "seconds")):
            draw(axis, runs[key], key)
            axis.axhline(target, color="grey", linestyle=":", linewidth=1)
            dress(axis, key)
        count = len(runs["step"])
        column[0].set_title(f"{title}\n{count} seed{'s' * (count > 1)}", fontsize=10)
        column[1].set_title(hardware.replace("; ", "\n"), fontsize=7, color="grey")
    for axis in axes[:, 0]:
        axis.set_ylabel("return, last 100 episodes")
    save(figure, to / f"{name}.png")


def draw_ablations(results: Path, to: Path) -> None:
    """One column per group of variants, one row per environment of it; the defaults are in each."""
    path = results / "ablations.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in runs if len(run.get("curve", {}).get("step", [])) > 1]
    groups: dict[str, dict[str, list[str]]] = {}  # group: environment: variants
    for run in runs:
        if run["group"] != "defaults":
            variants = groups.setdefault(run["group"], {}).setdefault(run["env_id"], ["defaults"])
            variants.extend({run["variant"]} - set(variants))
    if not groups:
        print(f"ablations: no curves in {path}, left out")
        return
    rows = max(map(len, groups.values()))
    figure, axes = plt.subplots(rows, len(groups), figsize=(3.4 * len(groups), 2.9 * rows), squeeze=False)
    for column, (group, environments) in zip(axes.T, groups.items()):
        for axis, (env_id, variants) in zip(column, environments.items()):
            for variant in variants:
                chosen = [run for run in runs if (run["variant"], run["env_id"]) == (variant, env_id)]
                if chosen:
                    draw(axis, chosen, "step", f"{variant} ({len(chosen)})", seeds=False)
            dress(axis, "step")
            axis.set_title(env_id.split(":")[-1], fontsize=10)
            axis.legend(fontsize=7, loc="lower right")
        column[0].set_title(f"{group}\n{column[0].get_title()}", fontsize=10)
        for axis in column[len(environments) :]:
            axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("return, last 100 episodes")
    save(figure, to / "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*LEARNING, "ablations"]
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--to", type=Path, default=HERE / "figures")
    options = parser.parse_args()
    if unknown := set(options.figures) - set(names):
        parser.error(f"no figure {', '.join(unknown)}: choose from {', '.join(names)}")
    for name in options.figures or names:
        try:
            if name == "ablations":
                draw_ablations(options.results, options.to)
            else:
                draw_learning(name, options.results, options.to)
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            parser.error(f"{name}: is a record in {options.results} damaged, or {options.to} not writable? {error!r}")


if __name__ == "__main__":
    main()
