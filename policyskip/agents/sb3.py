"""PPO, A2C and DQN: the learners of Stable-Baselines3 (SB3) behind the names that every agent here has.

SB3 collects, stores and learns. What it learned is a :class:`~policyskip.agents.greedy.GreedyPolicy` of plain layers,
which shares its parameters, is judged, and is deployed without SB3. Nothing is ever loaded from SB3's own files, which
execute what they hold. The one module of the agents that imports SB3; it is imported when one of its agents is asked
for.

Shapes: B images side by side, K blocks, N exits.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.randomness import Randomness
from policyskip.backbones.costs import count_macs
from policyskip.envs.sb3 import LookUp, SB3VecEnv
from policyskip.errors import UserError
from policyskip.finite import NotFiniteError
from policyskip.policies.perceptrons import (
    ExitPolicy,
    GreedyPolicy,
    LookPolicy,
    convolutions,
    policy_for,
)

OURS = {"self", "policy", "env", "policy_kwargs", "seed", "device", "verbose", "tensorboard_log", "stats_window_size"}
OURS |= {"use_sde", "sde_sample_freq", "rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model"}
OURS |= {"replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"}
"""Arguments of SB3's learners that are settled here; every other is a key of ``agent``."""

NAMES = {
    "train/loss": "loss",
    "train/policy_gradient_loss": "policy_loss",
    "train/policy_loss": "policy_loss",
    "train/value_loss": "value_loss",
    "train/approx_kl": "approx_kl",
    "train/clip_fraction": "clip_fraction",
    "train/explained_variance": "explained_variance",
    "train/learning_rate": "lr",
    "rollout/exploration_rate": "exploration_rate",
}
"""What SB3 calls a figure, and what it is called here."""


class EpisodeStatistics(SB3VecEnv):
    """The adapter, which also adds up what came of the episodes that ended since it was last asked."""

    decision_macs = 0.0
    """What one decision of the policy costs."""

    def __init__(self, env: Any, remember: int) -> None:
        super().__init__(env, remember)
        self._ended: list[Tensor] = []

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        shown, rewards, over, infos = super().step_wait()
        if over.any():
            out, reward_B = self.env.outcome, torch.from_numpy(rewards[over])
            kept_B = out.keep_BK.sum(1).float()
            share_B = out.macs_fraction_B + self.decision_macs * self.env.decisions_of(out) / out.full_macs
            self._ended.append(torch.stack([reward_B, out.correct_B.float().cpu(), kept_B.cpu(), share_B.cpu()], 1))
        return shown, rewards, over, infos

    def means(self) -> dict[str, float]:
        """Means over these episodes; empty if none has ended."""
        if not self._ended:
            return {}
        mean_4 = torch.cat(self._ended).double().mean(0).tolist()
        self._ended = []
        return dict(zip(("reward", "accuracy", "kept", "macs_fraction"), mean_4, strict=True))


class Convolutions(BaseFeaturesExtractor):
    """The convolutions of :class:`~policyskip.agents.greedy.LookPolicy` as an extractor of SB3's, behind ``LookUp``."""

    def __init__(self, observation_space: gymnasium.spaces.Box, channels: Sequence[int]) -> None:
        super().__init__(observation_space, channels[-1])
        self.layers = convolutions(channels)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


class SB3Agent(Agent):
    """One of SB3's learners. An update is one of its rollouts, and the learning that follows.

    Args:
        env: the environment it will learn in; its images are shown to nobody else.
        total_steps: updates of the whole run; schedules scale with it.
        seed: decides initial weights and everything that is drawn.
        schedule: "linear" (the learning rate falls to zero) or "constant".
        net_arch: widths of the hidden layers, of the policy and of what estimates values.
        channels: of the convolutions that look at images; where features are observed, there are none.
        hyperparameters: SB3's own, by its own names.

    Raises:
        UserError: a key that SB3's learner does not have, or an environment whose actions it cannot take.
    """

    learner: ClassVar[type[BaseAlgorithm]]
    collects: ClassVar[str]
    """SB3's name for the steps that an update collects; null is the longest episode, and 4 at least."""
    policy: GreedyPolicy

    def __init__(
        self,
        env: Any,
        total_steps: int,
        seed: int,
        schedule: Literal["linear", "constant"],
        net_arch: Sequence[int],
        channels: Sequence[int],
        **hyperparameters: Any,
    ) -> None:
        name = type(self).__name__
        allowed = sorted(set(inspect.signature(self.learner.__init__).parameters) - OURS)
        unknown = [key for key in hyperparameters if key not in allowed]
        if unknown:
            raise UserError(f"agent has no key {unknown[0]}; {name} takes {', '.join(allowed)}")
        if not isinstance(env.single_action_space, self.learner_spaces()):
            raise UserError(f"agent={name.lower()} cannot take actions from {env.single_action_space}")
        if hyperparameters.get(self.collects) is None:
            hyperparameters[self.collects] = max(4, env.steps_per_episode)
        if schedule not in ("linear", "constant"):
            raise UserError(f"agent.schedule must be linear or constant, got {schedule!r}")
        self.env, self.total_steps, self.step, self._linear = env, total_steps, 0, schedule == "linear"
        self.randomness = Randomness(env.device)
        with self.randomness.own():
            torch.manual_seed(seed)
            self.policy = policy_for(env, net_arch, channels).to(env.device)
            self.steps_collected = env.num_envs * int(hyperparameters[self.collects])
            self.adapter = EpisodeStatistics(env, remember=self.steps_collected + env.num_envs)
            self.model = self._build(seed, net_arch, channels, hyperparameters)
            self._share_layers()
        self.decision_macs = self.adapter.decision_macs = count_macs(self.policy, env.observation[:1])
        self._means: dict[str, float] = {}

    @classmethod
    def learner_spaces(cls) -> tuple[type[gymnasium.Space[Any]], ...]:
        """The action spaces that the learner can take."""
        return (gymnasium.spaces.Discrete, gymnasium.spaces.MultiBinary)

    def _build(self, seed: int, net_arch: Sequence[int], channels: Sequence[int], options: dict[str, Any]) -> Any:
        default = inspect.signature(self.learner.__init__).parameters["learning_rate"].default
        highest = float(options.pop("learning_rate", default))
        kwargs: dict[str, Any] = {"net_arch": list(net_arch), "activation_fn": nn.ReLU, **self._policy_kwargs()}
        if isinstance(self.policy, LookPolicy):
            kwargs["features_extractor_class"] = LookUp
            kwargs["features_extractor_kwargs"] = {"extractor": Convolutions, "channels": channels}
        with warnings.catch_warnings():  # of last mini-batches that are smaller, and of small networks on a GPU
            warnings.simplefilter("ignore", UserWarning)
            model: Any = self.learner(
                "MlpPolicy",
                self.adapter,
                learning_rate=lambda _: highest * (self.left if self._linear else 1.0),
                policy_kwargs=kwargs,
                seed=seed,
                device=self.env.device,
                **options,
            )
        self.adapter._reset_seeds()  # the order of the images is the environment's own, and is not started anew
        model.set_logger(Logger(None, []))  # what it records is read from it, and shown where everything is shown
        return model

    def _policy_kwargs(self) -> dict[str, Any]:
        return {}

    def _share_layers(self) -> None:
        """Make the layers of SB3's policy those of ours."""
        raise NotImplementedError

    @property
    def left(self) -> float:
        """Share of the run that is left."""
        return max(0.0, 1 - self.step / self.total_steps)

    def update(self, source: Any) -> dict[str, float]:
        """Collect one rollout and learn from it. Reward, accuracy and cost are those of the sampled actions, in the
        episodes that ended in it."""
        if source is not self.env:
            raise ValueError("the agent learns in the environment that it was made with")
        with self.randomness.own():
            self._learn()
        self.step += 1
        self._means |= self.adapter.means()
        recorded = self.model.logger.name_to_value
        figures = {ours: float(recorded[name]) for name, ours in NAMES.items() if name in recorded}
        if "train/entropy_loss" in recorded:
            figures["entropy"] = -float(recorded["train/entropy_loss"])
        if not all(math.isfinite(value) for key, value in figures.items() if "loss" in key):
            raise NotFiniteError(f"{self.name} stops at update {self.step}: a loss is not finite")
        explained = figures.get("explained_variance", 0.0)
        if not math.isfinite(explained):  # all returns were the same, and there was nothing to explain
            figures["explained_variance"] = 0.0
        return {**self._means, **figures}

    def _learn(self) -> None:
        self.model.learn(self.steps_collected, log_interval=None, reset_num_timesteps=False)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of SB3's policy."""
        optimizer: torch.optim.Optimizer = self.model.policy.optimizer
        return optimizer

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "randomness": self.randomness.state,
            "step": self.step,
            "timesteps": self.model.num_timesteps,
            "updates": self.model._n_updates,
            "means": self._means,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.policy.load_state_dict(state["policy"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        self.randomness.state = state["randomness"]
        with self.randomness.own():  # so that a state that the generators do not take is refused now
            pass
        self.step, self._means = state["step"], {str(key): float(value) for key, value in state["means"].items()}
        self.model.num_timesteps, self.model._n_updates = state["timesteps"], state["updates"]


class OnPolicy(SB3Agent):
    """Those that learn from what they have just collected; they also estimate values, with convolutions of their own.

    Args:
        initial_keep: probability with which a fresh policy runs a block, or goes on to the next exit.
        start: a fixed keep-set to depart from: a fresh policy drops the other blocks with that probability.
    """

    environments = ("block_selection", "layer_skip", "early_exit")
    collects = "n_steps"

    def __init__(
        self,
        env: Any,
        total_steps: int,
        seed: int = 0,
        schedule: Literal["linear", "constant"] = "linear",
        net_arch: Sequence[int] = (64, 64),
        channels: Sequence[int] = (16, 32, 64),
        initial_keep: float = 0.9,
        start: Sequence[bool] | None = None,
        **hyperparameters: Any,
    ) -> None:
        if not 0 < initial_keep < 1:
            raise UserError(f"agent.initial_keep must be between 0 and 1, got {initial_keep}")
        super().__init__(env, total_steps, seed, schedule, net_arch, channels, **hyperparameters)
        logit = math.log(initial_keep / (1 - initial_keep))
        bias_A: Tensor = self.model.policy.action_net.bias
        with torch.no_grad():
            if isinstance(self.policy, LookPolicy):
                wanted = [True] * len(bias_A) if start is None else start
                bias_A.copy_(logit * (2 * torch.tensor(wanted).float() - 1))
            else:
                bias_A[1] = -logit if isinstance(self.policy, ExitPolicy) else logit

    def _policy_kwargs(self) -> dict[str, Any]:
        # What the values need would weigh more in shared convolutions than what the policy needs.
        return {"share_features_extractor": False}

    def _share_layers(self) -> None:
        trained = self.model.policy
        if isinstance(self.policy, LookPolicy):
            self.policy.features = trained.pi_features_extractor.extractor.layers
        self.policy.layers = nn.Sequential(*trained.mlp_extractor.policy_net, trained.action_net)


class PPO(OnPolicy):
    """Proximal policy optimisation (Schulman et al. 2017), by SB3."""

    learner = stable_baselines3.PPO


class A2C(OnPolicy):
    """Advantage actor-critic (Mnih et al. 2016, synchronous), by SB3."""

    learner = stable_baselines3.A2C

    def update(self, source: Any) -> dict[str, float]:
        figures = super().update(source)
        entropy, value = self.model.ent_coef * figures["entropy"], self.model.vf_coef * figures["value_loss"]
        return figures | {"loss": figures["policy_loss"] - entropy + value}  # which SB3 does not record


class DQN(SB3Agent):
    """Deep Q-learning (Mnih et al. 2015), by SB3. Its actions must be few: it decides block by block or exit by exit.

    Its replay buffer is not part of the state. When a stopped run goes on, it is filled anew by the policy as it is,
    until it holds ``learning_starts`` steps again.
    """

    environments = ("layer_skip", "early_exit")
    learner = stable_baselines3.DQN
    collects = "train_freq"

    def __init__(
        self,
        env: Any,
        total_steps: int,
        seed: int = 0,
        schedule: Literal["linear", "constant"] = "linear",
        net_arch: Sequence[int] = (64, 64),
        **hyperparameters: Any,
    ) -> None:
        super().__init__(env, total_steps, seed, schedule, net_arch, (), **hyperparameters)
        exploration = self.model.exploration_schedule
        self.model.exploration_schedule = lambda _: exploration(self.left)  # of the run, not of one call to learn()
        self._gradient_steps = self.model.gradient_steps

    @classmethod
    def learner_spaces(cls) -> tuple[type[gymnasium.Space[Any]], ...]:
        return (gymnasium.spaces.Discrete,)

    def _share_layers(self) -> None:
        self.policy.layers = self.model.q_net.q_net

    def _learn(self) -> None:
        started = self.model.num_timesteps > self.model.learning_starts
        while started and self.model.replay_buffer.size() * self.env.num_envs < self.model.learning_starts:
            self.model.gradient_steps = 0
            super()._learn()
        self.model.gradient_steps = self._gradient_steps
        super()._learn()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"calls": self.model._n_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.model._n_calls = state["calls"]
        self.model.exploration_rate = self.model.exploration_schedule(self.left)
