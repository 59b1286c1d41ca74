"""The tables and picture of docs/variance.md: how BlockDrop's baselines change the gradient's variance, and learning.

    python benchmarks/variance.py [gradients|learning]      (default: both, one after the other)

Writes benchmarks/results/variance_gradients.csv, benchmarks/results/variance_learning.csv and docs/images/variance.png,
and prints the tables. Data, network and settings are those of `policyskip train agent=blockdrop`: digits, and the
package's ResNet-32.

Shapes: B images, S decisions for each image in one estimate, M decisions drawn in all, R = ⌊M/S⌋ estimates, K blocks,
D features, P parameters.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from policyskip.agents.baselines import Baseline, greedy_advantage, leave_one_out_advantage, value_advantage
from policyskip.agents.blockdrop import BlockDrop, reinforce_loss
from policyskip.build import Setup, set_up
from policyskip.config import Settings, plain, settings_of
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.evaluation.plots import figure_of, save
from policyskip.tasks.fronts import best_set, static_front

HERE = Path(__file__).parent
GRADIENTS, LEARNING = HERE / "results" / "variance_gradients.csv", HERE / "results" / "variance_learning.csv"
PICTURE = HERE.parent / "docs" / "images" / "variance.png"
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
SEEDS, UPDATES = (0, 1, 2), 200
TRAINED_FOR = 60  # updates of the second policy at which gradients are measured
SAMPLES, DRAWN = (2, 3, 8), 192


def set_up_digits() -> tuple[Setup, BlockSelectionVectorEnv, BlockDrop]:
    """Make the data, the environment and a new agent of `policyskip train agent=blockdrop`."""
    overrides = ["run.dir=none", "device=cpu", f"train.steps={TRAINED_FOR}", "agent.alpha_end=0.8"]
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        config = plain(compose("train", overrides))
    setup = set_up(config, torch.device("cpu"))
    settings = settings_of(config, Settings).front
    assert settings is not None
    front = static_front(setup, settings)
    env = setup.env(setup.data.train, "shuffled", 0)
    agent = setup.agent(env, front, best_set(setup, front))
    assert isinstance(agent, BlockDrop)
    return setup, env, agent


@torch.no_grad()
def draw(agent: BlockDrop, env: BlockSelectionVectorEnv, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``count`` decisions for the environment's present images.

    Returns: the decisions, bool (M, B, K); their rewards, float (M, B); and the greedy decision's reward, float (B,).
    """
    logits_BK = agent.policy(env.observation)
    agent.samples = count
    keep_MBK = agent._sample(logits_BK.sigmoid())
    with_greedy = torch.cat([keep_MBK, agent.policy.greedy(logits_BK).unsqueeze(0)])
    reward = torch.cat([env.rewards(env.score(keep)).view(len(keep), -1) for keep in with_greedy.split(16)])
    return keep_MBK, reward[:-1], reward[-1]


@torch.no_grad()
def fitted_values(agent: BlockDrop, env: BlockSelectionVectorEnv, batches: int = 8) -> Tensor:
    """Return the best values V, float (B,), that the value head can have for the environment's present images.

    V is linear in the policy's features, and fitted by least squares to the rewards of the ``batches`` that come next.
    """
    cursor = env.cursor
    features_BD = agent.policy.features_and_logits(env.observation)[0]
    features, rewards = [], []
    for _ in range(batches):
        env.advance()
        features.append(agent.policy.features_and_logits(env.observation)[0])
        rewards.append(draw(agent, env, 3)[1].mean(0))
    env.seek(cursor)
    x, y = torch.cat(features).double(), torch.cat(rewards).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    weight = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1]), x.T @ y)
    return (features_BD.double() @ weight[:-1] + weight[-1]).float()


def gradients(agent: BlockDrop, images: Tensor, keep_RSBK: Tensor, advantage_RSB: Tensor) -> Tensor:
    """Return the policy's gradient, float64 (R, P), by each of R estimates, without the entropy (it has no variance).

    Args:
        images: uint8 (B, 3, H, W).
        keep_RSBK: bool, the decisions of each estimate.
        advantage_RSB: float, their advantages.
    """
    logits_BK = agent.policy(images)
    parameters = list(agent.policy.parameters())
    rows = []
    for keep_SBK, advantage_SB in zip(keep_RSBK, advantage_RSB, strict=True):
        loss = reinforce_loss(logits_BK, keep_SBK, advantage_SB, agent.policy.free_K, agent.alpha, 0.0)
        parameter_gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in parameter_gradients]))
    return torch.stack(rows).double()


def measure(agent: BlockDrop, env: BlockSelectionVectorEnv, policy: str) -> list[dict[str, Any]]:
    """Measure the variance of the gradient at a fixed policy on one batch of images: a row for each baseline and S.

    All baselines use the same decisions. ``variance`` is the sum over parameters, ``signal`` the squared norm of the
    expected gradient (estimated from all decisions, less the variance of that estimate). A row also has the mean of the
    decisions' rewards, their standard deviation within and between images, and ``value_r2``, the share of the variance
    between images that V explains.
    """
    agent.policy.train()
    keep_MBK, reward_MB, greedy_B = draw(agent, env, DRAWN)
    value_B, mean_B = fitted_values(agent, env), reward_MB.mean(0)
    rewards = {
        "reward_mean": f"{mean_B.mean():.4g}",
        "reward_sd_within": f"{reward_MB.var(0).mean().sqrt():.4g}",
        "reward_sd_between": f"{mean_B.std():.4g}",
        "value_r2": f"{1 - (value_B - mean_B).var() / mean_B.var():.4g}",
    }
    rows = []
    for S in SAMPLES:
        R = DRAWN // S
        keep_RSBK = keep_MBK[: R * S].unflatten(0, (R, S))
        reward_RSB = reward_MB[: R * S].unflatten(0, (R, S))
        advantage_RSB = {
            "greedy": torch.stack([greedy_advantage(reward_SB, greedy_B) for reward_SB in reward_RSB]),
            "leave_one_out": torch.stack([leave_one_out_advantage(reward_SB) for reward_SB in reward_RSB]),
            "value": torch.stack([value_advantage(reward_SB, value_B) for reward_SB in reward_RSB]),
            "none": reward_RSB,
        }
        for baseline in BASELINES:
            gradient_RP = gradients(agent, env.observation, keep_RSBK, advantage_RSB[baseline])
            variance = gradient_RP.var(0).sum().item()
            signal = gradient_RP.mean(0).square().sum().item() - variance / R
            scored = S + (baseline == "greedy")
            row = dict(policy=policy, samples=S, baseline=baseline, estimates=R, scored=scored)
            rows.append(row | {"variance": f"{variance:.6g}", "signal": f"{signal:.6g}"} | rewards)
    return rows


def measure_gradients() -> list[dict[str, Any]]:
    """Measure the gradient's variance at the policy before training, and at that after ``TRAINED_FOR`` updates."""
    torch.manual_seed(0)
    _, env, agent = set_up_digits()
    rows = measure(agent, env, "start")
    samples = 3
    for _ in range(TRAINED_FOR):
        agent.samples = samples
        agent.update(env)
    return rows + measure(agent, env, f"after {TRAINED_FOR} updates")


def measure_learning() -> list[dict[str, Any]]:
    """Train BlockDrop with each seed and baseline, and return a row for each validation."""
    rows = []
    for seed in SEEDS:
        for baseline in BASELINES:
            with tempfile.TemporaryDirectory() as folder:
                arguments = [f"agent.baseline={baseline}", f"seed={seed}", f"train.steps={UPDATES}"]
                arguments += [f"train.validate_every={UPDATES // 10}", "data.test=200", "tracking=none"]
                command = [sys.executable, "-m", "policyskip", "train", "agent=blockdrop", *arguments]
                subprocess.run([*command, f"run.dir={folder}/run"], check=True)
                for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines():
                    record = json.loads(line)
                    if "val/reward" in record:
                        row = dict(baseline=baseline, seed=seed, update=record["step"], seconds=record["seconds"])
                        figures = ("reward", "accuracy", "macs_fraction")
                        rows.append(row | {name: f"{record[f'val/{name}']:.6g}" for name in figures})
    return rows


def gradient_table(rows: list[dict[str, str]]) -> str:
    """Write the variances in Markdown, also as ratios to the greedy baseline's: for one estimate, and at equal cost,
    where an estimate may score as many decisions as one with the greedy baseline."""
    lines = [
        "| policy | decisions an image | baseline | variance of the gradient | of greedy's "
        "| of greedy's, at equal cost | variance / squared norm of the expected gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (greedy,) = [
            other
            for other in rows
            if (other["policy"], other["samples"], other["baseline"]) == (row["policy"], row["samples"], "greedy")
        ]
        # All baselines have the same expected gradient; it is taken from the row that knows it best.
        same_policy = [other for other in rows if other["policy"] == row["policy"]]
        signal = float(min(same_policy, key=lambda other: float(other["variance"]) / int(other["estimates"]))["signal"])
        variance, share = float(row["variance"]), float(row["variance"]) / float(greedy["variance"])
        equal = share * int(row["scored"]) / int(greedy["scored"])
        cells = [row["policy"], row["samples"], row["baseline"], f"{variance:.3g}", f"{share:.2f}", f"{equal:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{variance / signal:.2f}" if signal > 0 else "–"]) + " |")
    return "\n".join(lines)


def learning_table(rows: list[dict[str, str]]) -> str:
    """Write validation rewards in Markdown, after three tenths, half and all of the updates: mean ± sd over seeds."""
    steps = [UPDATES * 3 // 10, UPDATES // 2, UPDATES]
    lines = [
        "| baseline | " + " | ".join(f"reward after {step}" for step in steps) + " |",
        "|---|" + "---|" * len(steps),
    ]
    for baseline in BASELINES:
        cells = []
        for step in steps:
            rewards = [float(r["reward"]) for r in rows if r["baseline"] == baseline and int(r["update"]) == step]
            spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
            cells.append(f"{statistics.mean(rewards):.3f} ± {spread:.3f}" if rewards else "not measured")
        lines.append(f"| {baseline} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(gradient_rows: list[dict[str, str]], learning_rows: list[dict[str, str]]) -> None:
    """Draw the variance at each policy against the decisions for an image, and validation rewards against updates."""
    policies = list(dict.fromkeys(row["policy"] for row in gradient_rows))
    panels = len(policies) + bool(learning_rows)
    if not panels:
        return
    figure = figure_of(4 * panels, 3.8)
    axes_A = figure.subplots(1, panels, squeeze=False)[0]
    colors = dict(zip(BASELINES, ("#1b6ca8", "#c8701a", "#4a8c3f", "#777777"), strict=True))
    for axes, policy in zip(axes_A, policies, strict=False):
        for baseline, color in colors.items():
            own_rows = [r for r in gradient_rows if (r["policy"], r["baseline"]) == (policy, baseline)]
            points = [(int(r["samples"]), float(r["variance"])) for r in own_rows]
            axes.loglog(*zip(*points, strict=True), "o-", color=color, label=baseline)
        axes.set(title=f"gradient: {policy}", xlabel="decisions sampled for each image", ylabel="variance")
        axes.set_xticks(SAMPLES, [str(samples) for samples in SAMPLES])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.25)
    if learning_rows:
        axes = axes_A[-1]
        for baseline, color in colors.items():
            own_rows = [r for r in learning_rows if r["baseline"] == baseline]
            updates = sorted({int(r["update"]) for r in own_rows})
            rewards = [[float(r["reward"]) for r in own_rows if int(r["update"]) == update] for update in updates]
            axes.plot(updates, [statistics.mean(r) for r in rewards], color=color, label=baseline)
            axes.fill_between(updates, [min(r) for r in rewards], [max(r) for r in rewards], color=color, alpha=0.15)
        axes.set(title="learning", xlabel="update", ylabel="validation reward")
        axes.grid(alpha=0.25)
    axes_A[0].legend(fontsize=8)
    caption = "Variance of the policy's gradient on one batch of digits at a fixed policy, by baseline."
    if learning_rows:
        caption += " Right: validation reward while BlockDrop learns, mean and range over seeds."
    save(figure, caption, PICTURE)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    measurements = sys.argv[1:] or ["gradients", "learning"]
    started = time.monotonic()
    if "gradients" in measurements:
        write(GRADIENTS, measure_gradients())
    if "learning" in measurements:
        write(LEARNING, measure_learning())
    gradient_rows, learning_rows = (
        list(csv.DictReader(path.open())) if path.exists() else [] for path in (GRADIENTS, LEARNING)
    )
    picture(gradient_rows, learning_rows)
    if gradient_rows:
        print(gradient_table(gradient_rows), end="\n\n")
    if learning_rows:
        print(learning_table(learning_rows), end="\n\n")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
