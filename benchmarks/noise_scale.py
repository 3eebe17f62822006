"""The policy gradient's noise scale at a checkpoint of the Atari trainer, for several lambdas of GAE.

    python benchmarks/noise_scale.py runs/<run>

The noise scale B = tr(Sigma) / |G|^2 (McCandlish et al. 2018, arXiv:1812.06162, section 2.2) is the number of
transitions whose mean gradient is half signal, half noise. G is the gradient of E[log pi(a|s) A] at pi_old, A
normalised over a batch, one rollout of `num_envs` environments; |G|^2 is the mean product of two different batches'
gradients, which noise does not raise. `cosine` compares G with that of the reference lambda, from different batches
too. `balancing_c2` is the weight with which the entropy bonus would cancel G along the entropy's own gradient: with a
larger c2 the policy gets softer. Standard errors are the jackknife's over batches.

Writes benchmarks/results/noise_scale_<env>.json.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from learning import RESULTS, ROOT, Refused, about, start
from throughput import GAE_INPUTS, load


def gradients(trainer, state: dict, lambdas: list[float], batches: int, num_steps: int, seed: int) -> torch.Tensor:
    """Gradients (batches, lambdas + 1, P) of the checkpoint's policy: for each lambda, then of its entropy."""
    args = dataclasses.replace(trainer.Args(**state["args"]), num_steps=num_steps)
    trainer.seed_all(seed)
    envs = trainer.make_envs(args, args.num_envs)
    agent = trainer.Agent(envs)
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError:
        raise Refused("error: the checkpoint is of another network than ppo_clip_atari.py's") from None
    policy = [p for name, p in agent.named_parameters() if not name.startswith("value_head")]
    episodes = trainer.Episodes([envs], trainer.env_seeds(seed, 0, args.num_envs))
    rollout = trainer.Rollout(args, envs, torch.device("cpu"))
    for _ in range(3):  # away from the games' beginning, where all environments are alike
        trainer.collect(agent, episodes, rollout, args)
    rows = []
    for batch in range(batches):
        trainer.collect(agent, episodes, rollout, args)
        played = [getattr(rollout, name) for name in GAE_INPUTS]
        advantages = [trainer.compute_gae(*played, args.gamma, gae_lambda)[0].flatten() for gae_lambda in lambdas]
        advantages = trainer.normalise(torch.stack(advantages))  # (lambdas, T N)
        row = [[torch.zeros_like(p) for p in policy] for _ in range(len(lambdas) + 1)]
        for idx in torch.arange(args.batch_size).split(512):
            log_probs = agent(rollout.observations(idx))[0].log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum()
            log_probs = log_probs.gather(-1, rollout.actions.view(-1)[idx, None]).squeeze(-1)
            objectives = [*(advantages[:, idx] * log_probs).sum(1), entropy]
            for mean, objective in zip(row, objectives):
                for part, grad in zip(mean, torch.autograd.grad(objective, policy, retain_graph=True)):
                    part += grad / args.batch_size
        rows.append(torch.stack([torch.cat([part.flatten() for part in mean]) for mean in row]))
        print(f"batch {batch + 1}/{batches}", flush=True)
    envs.close()
    return torch.stack(rows)


def estimates(products: torch.Tensor, reference: int) -> torch.Tensor:
    """(L, 3) of L lambdas: signal / noise of one batch, cosine, balancing c2.

    `products` (L + 1, L + 1, n, n) are those of the n gradients of every lambda, and last of the entropy.
    """
    n = products.shape[-1]
    same = products.diagonal(dim1=2, dim2=3)
    signal = (products.sum((2, 3)) - same.sum(2)) / (n * (n - 1))  # (L + 1, L + 1) G_l . G_m
    own = signal.diagonal()
    noise = same.mean(2).diagonal() - own
    norm = own.sqrt()  # nan where noise makes the estimate of |G|^2 negative
    cosine, balance = signal[:, reference] / (norm * norm[reference]), -signal[:, -1] / own[-1]
    return torch.stack([own / noise, cosine, balance], 1)[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.6, 0.3, 0.0])
    parser.add_argument("--reference", type=float, default=0.8, help="the lambda that cosines compare with")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256, help="of each environment in a batch")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--record", type=Path, help="default: benchmarks/results/noise_scale_<env>.json")
    options = parser.parse_args()
    if options.reference not in options.lambdas:
        parser.error("--reference must be one of --lambdas")
    if options.batches < 3 or options.num_steps < 1:
        parser.error("--batches must be at least 3, for the jackknife, and --num-steps at least 1")

    trainer = load(ROOT / "ppo_clip_atari.py")
    there = any(options.run.glob("checkpoint*.pt"))
    state = trainer.load_checkpoint(trainer.lock_run_dir(options.run)) if there else None  # not while it is trained
    if state is None or not state["args"].keys() <= vars(trainer.Args()).keys():
        parser.error(f"{options.run} holds no checkpoint of ppo_clip_atari.py")
    rows = gradients(trainer, state, options.lambdas, options.batches, options.num_steps, options.seed)
    flat = rows.transpose(0, 1).flatten(0, 1).double()
    n, size = options.batches, state["args"]["num_envs"] * options.num_steps
    products = (flat @ flat.T).view(-1, n, len(options.lambdas) + 1, n).transpose(1, 2)  # (L + 1, L + 1, n, n)
    reference = options.lambdas.index(options.reference)
    subsets = [[j for j in range(n) if j != i] for i in range(n)]  # leave one out
    parts = torch.stack([estimates(products[:, :, keep][..., keep], reference) for keep in subsets])
    errors = ((parts - parts.mean(0)).square().sum(0) * (n - 1) / n).sqrt()

    record = about(trainer.versions()) | {
        "run": {key: value for key, value in state["args"].items() if key not in ("run_dir", "resume")},
        "step": state["global_step"],
        "batches": n,
        "batch_size": size,
        "seed": options.seed,
        "lambdas": {},
    }
    names = ("signal_to_noise", "cosine", "balancing_c2")
    print("lambda  noise scale  signal / noise of a batch, cosine, balancing c2")
    for value, row, row_se in zip(options.lambdas, estimates(products, reference).tolist(), errors.tolist()):
        numbers = dict(zip(names, row)) | {f"{name}_se": x for name, x in zip(names, row_se)}
        numbers["noise_scale"] = size / row[0] if row[0] > 0 else math.inf
        record["lambdas"][str(value)] = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        print(f"{value:6.2f}  {numbers['noise_scale']:11.0f}", *(f"  {x:.4f} ± {se:.4f}" for x, se in zip(row, row_se)))
    path = options.record or RESULTS / f"noise_scale_{state['args']['env_id'].replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    start(main)
