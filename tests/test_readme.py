"""What README shows works as it is shown."""

import dataclasses
import json
import re
import statistics
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


def tables():
    """Every row of README's tables that links exactly one record, as column -> cell, and the record."""
    header = None
    for line, after in zip(README.splitlines(), [*README.splitlines()[1:], ""]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if after.startswith("| ---"):
            header = cells
        links = re.findall(r"\]\((benchmarks/results/[^)]+)\)", line)
        if line.startswith("|") and len(links) == 1 and len(header) == len(cells):
            yield dict(zip(header, cells)), json.loads((ROOT / links[0]).read_text())


def learning(record):
    """What a row about one learning record must say, by column."""
    runs, number = record["runs"], lambda x: f"{x:.1f}".replace("-", "−")
    scores = [run["eval_return_mean"] for run in runs]
    held = (runs[0].get("threshold") or {}).get("held")
    return {
        "mean": number(statistics.mean(scores)),
        "worst – best seed": f"{number(min(scores))} – {number(max(scores))}",
        "last 20 games": number(runs[0]["mean_last_20_games"]),
        "evaluation, 20 games": number(scores[0]),
        "mean of 100 games stays at 18 or more": f"after {held['step']:,} steps" if held else "not reached",
        "ours": f"{number(runs[0]['curve']['mean_return_of_last_100'][-1])} (1 seed)",
    }


def throughput(record):
    median = record["median"]
    columns = {"CleanRL": "trainer_to_cleanrl", "Stable-Baselines3": "trainer_to_sb3"}
    ratios = {f"ours / {peer}": f"{median[key]:.2f} ×" for peer, key in columns.items() if key in median}
    bound = f"{median['trainer_to_serial_bound']:.2f}"
    return {"steps/s": f"{median['trainer']:,.0f}", "ours / serial bound": bound} | ratios


def test_tables_say_what_their_records_say():
    checked = 0
    for row, record in tables():
        expected = learning(record) if "mean_last_20_games" in str(record) else {}
        expected = throughput(record) if "trainer_to_serial_bound" in record.get("median", {}) else expected
        shared = expected.keys() & row.keys()
        assert {key: row[key] for key in shared} == {key: expected[key] for key in shared}, row
        checked += len(shared)
    assert checked == 4 * 2 + 6 * 3 + 7 + 8 * 4 + 4 * 2  # vectors, Pong, ten million steps, throughput


def test_ten_million_steps_have_the_evaluations_and_hours_of_their_records():
    evaluations = dict(re.findall(r"(\w+) ([\d.]+)", README.split("(evaluation over 20 games: ")[1].split(")")[0]))
    records = {row["game"]: (row, record["runs"][0]) for row, record in tables() if "game" in row}
    assert evaluations == {game: f"{run['eval_return_mean']:.1f}" for game, (_, run) in records.items()}
    for row, run in records.values():
        assert run["eval_episodes"] == 20 and run["global_step"] > 9_990_000
        if "hours" in row["wall time"]:
            assert row["wall time"].startswith(f"{run['wall_seconds'] / 3600:.1f} hours")


def test_the_speeds_beside_envpool_are_what_their_records_say():
    told = re.findall(r"([\d.]+) × (?:as fast )?in\s\[\w+\]\((\S+_envpool\.json)\) \((\d+) and (\d+)", README)
    assert len(told) == 2
    for ratio, record, ours, theirs in told:
        median = json.loads((ROOT / record).read_text())["median"]
        numbers = (f"{median['trainer_to_envpool']:.2f}", f"{median['trainer']:.0f}", f"{median['envpool']:.0f}")
        assert numbers == (ratio, ours, theirs)


def test_the_speeds_of_the_defaults_are_of_todays():
    """A changed default, even by mistake, asks for new measurements."""
    rows = [record for row, record in tables() if "the defaults" in row.get("what", "") and "settings" in record]
    assert len(rows) == 7
    for record in rows:
        trainer = load(ROOT / f"{record['settings']['exp_name']}.py")
        args = trainer.Args(env_id=record["env_id"], total_timesteps=record["settings"]["total_timesteps"])
        assert dataclasses.asdict(args) == record["settings"]


def test_the_other_seeds_are_what_their_records_say():
    links = re.findall(r"\[(\S+), (\S+)\]\((benchmarks/results/learning_\S+_seeds_\d+_to_\d+\.json)\)", README)
    assert len(links) == 4
    for mean, worst, record in links:
        scores = [run["eval_return_mean"] for run in json.loads((ROOT / record).read_text())["runs"]]
        assert [mean, worst] == [f"{x:.1f}".replace("-", "−") for x in (statistics.mean(scores), min(scores))]


def test_pong_with_earlier_defaults_is_what_its_records_say():
    text = (ROOT / "benchmarks/README.md").read_text()
    text = re.search("### Pong with the defaults of earlier commits\n(.*?)\n###", text, re.DOTALL)[1]
    found = re.findall(r"\[([\d.]+)\]\((results/learning_\S*Pong\S*\.json)\)(?: after ([\d,]+))?", text)
    assert len(found) == 4 + 6  # gamma 0.99; temperature 1
    for score, record, steps in found:
        run = json.loads((ROOT / "benchmarks" / record).read_text())["runs"][0]
        held = run["threshold"]["held"]
        assert [score, steps.strip(",")] == [f"{run['mean_last_20_games']:.1f}", f"{held['step']:,}" if held else ""]


def test_the_gpus_table_says_what_its_record_says():
    rows = json.loads((ROOT / "benchmarks/results/gpu_or_cpu.json").read_text())["rows"]
    rate = {(row["device"], row["num_envs"], row["hidden"]): row["steps_per_second"] for row in rows}
    for num_envs in (64, 512):
        pairs = [(rate["cuda", num_envs, hidden], rate["cpu", num_envs, hidden]) for hidden in (64, 256, 1024)]
        cells = " | ".join(f"{gpu:,.0f} and {core:,.0f} ({gpu / core:.1f} ×)" for gpu, core in pairs)
        assert f"| {num_envs} environments | {cells} |" in README


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
