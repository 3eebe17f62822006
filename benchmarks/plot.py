"""Learning curves of the recorded runs, against steps and against wall time: mean over seeds and its 95% band.

pip install matplotlib && python benchmarks/plot.py CartPole-v1 Acrobot-v1 --to benchmarks/classic_control.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_ids", nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(2, len(options.env_ids), figsize=(4 * len(options.env_ids), 6), squeeze=False)
    for column, env_id in enumerate(options.env_ids):
        record = json.loads((RESULTS / f"learning_{env_id.replace('/', '-')}.json").read_text())
        curves = [run["curve"] for run in record["runs"] if "curve" in run]
        for row, (key, unit) in enumerate((("step", "steps"), ("seconds", "seconds"))):
            end = min(curve[key][-1] for curve in curves)
            start = max(curve[key][0] for curve in curves)
            x = np.linspace(start, end, 200)
            y = np.stack([np.interp(x, curve[key], curve["mean_return_of_last_100"]) for curve in curves])
            axis = axes[row, column]
            axis.plot(x, y.mean(0))
            if len(curves) > 1:
                band = 1.96 * y.std(0, ddof=1) / np.sqrt(len(curves))
                axis.fill_between(x, y.mean(0) - band, y.mean(0) + band, alpha=0.25)
            axis.set_xlabel(unit)
            axis.set_title(f"{env_id}, {len(curves)} seed{'s' * (len(curves) > 1)}" if row == 0 else "")
            axis.grid(alpha=0.3)
        axes[0, column].set_ylabel("return, last 100 episodes" if column == 0 else "")
    figure.tight_layout()
    figure.savefig(options.to, dpi=100)


if __name__ == "__main__":
    main()
