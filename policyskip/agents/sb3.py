"""PPO, A2C and DQN: agents that the learners of Stable-Baselines3 (SB3) train.

SB3 collects, stores and learns. A :class:`~policyskip.policies.perceptrons.GreedyPolicy` of plain layers shares the
parameters of SB3's policy; that policy is judged, and is deployed without SB3. Files of SB3 are never loaded: they can
contain code. No other module of the agents imports SB3.

Shapes: B images side by side, K blocks, N exits.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import stable_baselines3
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, Space
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.randomness import Randomness
from policyskip.agents.sb3_arguments import checked_hyperparameters
from policyskip.backbones.costs import count_macs
from policyskip.envs.base import DecisionEnv
from policyskip.envs.sb3 import LookUp, SB3VecEnv
from policyskip.errors import UserError
from policyskip.finite import NotFiniteError
from policyskip.policies.perceptrons import ExitPolicy, GreedyPolicy, LookPolicy, convolutions, policy_for

FIGURE_NAMES = {
    **{f"train/{name}": name for name in ("loss", "policy_loss", "value_loss", "approx_kl", "clip_fraction")},
    "train/policy_gradient_loss": "policy_loss",
    "train/explained_variance": "explained_variance",
    "train/learning_rate": "lr",
    "rollout/exploration_rate": "exploration_rate",
}
"""SB3's names of figures, and ours."""


class EpisodeStatistics(SB3VecEnv):
    """The adapter to SB3, which also collects the outcomes of episodes that end."""

    decision_macs = 0.0
    """MACs that one decision of the policy costs."""

    def __init__(self, env: DecisionEnv, remember: int) -> None:
        super().__init__(env, remember)
        self._ended: list[Tensor] = []

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observation, rewards, done, infos = super().step_wait()
        if done.any():
            outcome = self.env.outcome
            kept_B = outcome.keep_BK.sum(1).float()
            policy_macs = self.decision_macs * self.env.decisions_of(outcome)
            fraction_B = outcome.macs_fraction_B + policy_macs / outcome.full_macs
            columns = (torch.from_numpy(rewards[done]), outcome.correct_B.float().cpu(), kept_B.cpu(), fraction_B.cpu())
            self._ended.append(torch.stack(columns, 1))
        return observation, rewards, done, infos

    def means(self) -> dict[str, float]:
        """Return means over the episodes that ended since the last call; empty if none has ended."""
        if not self._ended:
            return {}
        mean_4 = torch.cat(self._ended).double().mean(0).tolist()
        self._ended = []
        return dict(zip(("reward", "accuracy", "kept", "macs_fraction"), mean_4, strict=True))


class Convolutions(BaseFeaturesExtractor):
    """A features extractor for SB3 that holds the convolutions of a ``LookPolicy``; it stands behind ``LookUp``."""

    def __init__(self, observation_space: Box, channels: Sequence[int]) -> None:
        super().__init__(observation_space, channels[-1])
        self.layers = convolutions(channels)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


class SB3Agent(Agent):
    """An agent that one of SB3's learners trains. An update is one rollout of SB3, and the learning that follows.

    Args:
        env: the environment that the agent will learn in, which nobody else may step.
        total_steps: updates of the whole run; schedules scale with it.
        seed: decides the initial weights and everything that is drawn.
        schedule: "linear" (the learning rate falls to zero) or "constant".
        net_arch: widths of the hidden layers, both of the policy and of the network that estimates values.
        channels: of the convolutions, where images are observed.
        hyperparameters: of SB3's learner, by SB3's names.

    Attributes:
        learner: SB3's class.
        action_spaces: kinds of action space that the learner can act in.
        steps_key: SB3's name for the number of steps that an update collects; if it is null, that number is the steps
            of the longest episode, and at least 4.
        policy_kwargs: further arguments of SB3's policy.

    Raises:
        UserError: a key that SB3's learner does not have, or an environment whose actions it cannot take.
    """

    learner: ClassVar[type[BaseAlgorithm]]
    action_spaces: ClassVar[tuple[type[Space[Any]], ...]] = (Discrete, MultiBinary)
    steps_key: ClassVar[str]
    policy_kwargs: ClassVar[dict[str, Any]] = {}
    policy: GreedyPolicy

    def __init__(
        self,
        env: DecisionEnv,
        total_steps: int,
        seed: int,
        schedule: Literal["linear", "constant"],
        net_arch: Sequence[int],
        channels: Sequence[int],
        **hyperparameters: Any,
    ) -> None:
        name = type(self).__name__
        hyperparameters = checked_hyperparameters(self.learner, name, hyperparameters, (self.steps_key,))
        if not isinstance(env.single_action_space, self.action_spaces):
            raise UserError(f"agent={name.lower()} cannot take actions from {env.single_action_space}")
        if hyperparameters.get(self.steps_key) is None:
            hyperparameters[self.steps_key] = max(4, env.steps_per_episode)
        if schedule not in ("linear", "constant"):
            raise UserError(f"agent.schedule must be linear or constant, got {schedule!r}")
        self.env, self.total_steps, self.step, self._linear = env, total_steps, 0, schedule == "linear"
        self.randomness = Randomness(env.device)
        with self.randomness.own():
            torch.manual_seed(seed)
            self.policy = policy_for(env, net_arch, channels).to(env.device)
            self.steps_collected = env.num_envs * int(hyperparameters[self.steps_key])
            self.adapter = EpisodeStatistics(env, remember=self.steps_collected + env.num_envs)
            self.model = self._build(seed, net_arch, channels, hyperparameters)
            self._share_layers()
        self.optimizer: torch.optim.Optimizer = self.model.policy.optimizer
        self.decision_macs = self.adapter.decision_macs = count_macs(self.policy, env.observation[:1])
        self._means: dict[str, float] = {}

    def _build(self, seed: int, net_arch: Sequence[int], channels: Sequence[int], options: dict[str, Any]) -> Any:
        """Make SB3's learner."""
        default = inspect.signature(self.learner.__init__).parameters["learning_rate"].default
        highest = float(options.pop("learning_rate", default))
        kwargs: dict[str, Any] = {"net_arch": list(net_arch), "activation_fn": nn.ReLU, **self.policy_kwargs}
        if isinstance(self.policy, LookPolicy):
            kwargs["features_extractor_class"] = LookUp
            kwargs["features_extractor_kwargs"] = {"extractor": Convolutions, "channels": channels}
        with warnings.catch_warnings():  # about smaller last mini-batches, and small networks on a GPU
            warnings.simplefilter("ignore", UserWarning)
            model: Any = self.learner(
                "MlpPolicy",
                self.adapter,
                learning_rate=lambda _: highest * (self.remaining if self._linear else 1.0),
                policy_kwargs=kwargs,
                seed=seed,
                device=self.env.device,
                **options,
            )
        self.adapter._reset_seeds()  # the order of the images is the environment's own, and must not start over
        model.set_logger(Logger(None, []))  # without outputs: update() reads the figures from it
        return model

    def _share_layers(self) -> None:
        """Let :attr:`policy` share the layers of SB3's policy."""
        raise NotImplementedError

    @property
    def remaining(self) -> float:
        """Return the fraction of the run that remains."""
        return max(0.0, 1 - self.step / self.total_steps)

    def update(self, source: DecisionEnv) -> dict[str, float]:
        """Collect one rollout and learn from it.

        Returns: losses; and reward, accuracy and cost of the sampled actions, over the episodes that ended.

        Raises:
            ValueError: ``source`` is not the environment that the agent was made with.
            NotFiniteError: a loss is not finite.
        """
        if source is not self.env:
            raise ValueError("the agent learns in the environment that it was made with")
        with self.randomness.own():
            self._learn()
        self.step += 1
        self._means |= self.adapter.means()
        recorded = self.model.logger.name_to_value
        figures = {ours: float(recorded[name]) for name, ours in FIGURE_NAMES.items() if name in recorded}
        if "train/entropy_loss" in recorded:
            figures["entropy"] = -float(recorded["train/entropy_loss"])
        if not all(math.isfinite(value) for key, value in figures.items() if "loss" in key):
            raise NotFiniteError(f"{self.name} stops at update {self.step}: a loss is not finite")
        if not math.isfinite(figures.get("explained_variance", 0.0)):  # all returns were the same
            figures["explained_variance"] = 0.0
        return {**self._means, **figures}

    def _learn(self) -> None:
        """Let SB3 collect one rollout and learn from it."""
        self.model.learn(self.steps_collected, log_interval=None, reset_num_timesteps=False)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.model.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "randomness": self.randomness.state,
            "step": self.step,
            "timesteps": self.model.num_timesteps,
            "updates": self.model._n_updates,
            "means": self._means,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.randomness.state = state["randomness"]
        with self.randomness.own():  # so that a state that the generators do not take is refused now
            pass
        self.step, self._means = state["step"], {str(key): float(value) for key, value in state["means"].items()}
        self.model.num_timesteps, self.model._n_updates = state["timesteps"], state["updates"]


class OnPolicy(SB3Agent):
    """An agent that learns from each rollout once, and also estimates values, with convolutions of their own.

    Args:
        env, total_steps, seed, schedule, net_arch, channels, hyperparameters: see :class:`SB3Agent`.
        initial_keep: probability with which a fresh policy runs a block, or goes on to the next exit.
        start: a fixed keep-set to begin from: a fresh policy keeps the blocks of the set with probability
            ``initial_keep`` and drops the others with that probability. None: it keeps every block with it.

    Raises:
        UserError: ``initial_keep`` is not between 0 and 1, or an argument does not fit.
    """

    environments = ("block_selection", "layer_skip", "early_exit")
    steps_key = "n_steps"
    policy_kwargs: ClassVar[dict[str, Any]] = {"share_features_extractor": False}  # or the values' loss dominates

    def __init__(
        self,
        env: DecisionEnv,
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
            raise UserError(f"agent.initial_keep must be above 0 and below 1, got {initial_keep}")
        super().__init__(env, total_steps, seed, schedule, net_arch, channels, **hyperparameters)
        logit = math.log(initial_keep / (1 - initial_keep))
        bias_A: Tensor = self.model.policy.action_net.bias
        with torch.no_grad():
            if isinstance(self.policy, LookPolicy):
                keep = [True] * len(bias_A) if start is None else start
                bias_A.copy_(logit * (2 * torch.tensor(keep).float() - 1))
            else:
                bias_A[1] = -logit if isinstance(self.policy, ExitPolicy) else logit

    def _share_layers(self) -> None:
        sb3_policy = self.model.policy
        if isinstance(self.policy, LookPolicy):
            self.policy.features = sb3_policy.pi_features_extractor.extractor.layers
        self.policy.layers = nn.Sequential(*sb3_policy.mlp_extractor.policy_net, sb3_policy.action_net)


class PPO(OnPolicy):
    """An agent that learns by SB3's proximal policy optimisation (Schulman et al. 2017)."""

    learner = stable_baselines3.PPO


class A2C(OnPolicy):
    """An agent that learns by SB3's advantage actor-critic (Mnih et al. 2016, synchronous)."""

    learner = stable_baselines3.A2C

    def update(self, source: DecisionEnv) -> dict[str, float]:
        figures = super().update(source)
        entropy, value = self.model.ent_coef * figures["entropy"], self.model.vf_coef * figures["value_loss"]
        return figures | {"loss": figures["policy_loss"] - entropy + value}  # SB3 does not record the sum


class DQN(SB3Agent):
    """An agent that learns by SB3's deep Q-learning (Mnih et al. 2015). It needs few actions, so it decides block by
    block or exit by exit.

    The replay buffer is not part of the state. When a stopped run goes on, the policy as it is fills the buffer again
    until it holds ``learning_starts`` steps.
    """

    environments = ("layer_skip", "early_exit")
    learner = stable_baselines3.DQN
    action_spaces = (Discrete,)
    steps_key = "train_freq"

    def __init__(
        self,
        env: DecisionEnv,
        total_steps: int,
        seed: int = 0,
        schedule: Literal["linear", "constant"] = "linear",
        net_arch: Sequence[int] = (64, 64),
        **hyperparameters: Any,
    ) -> None:
        super().__init__(env, total_steps, seed, schedule, net_arch, (), **hyperparameters)
        exploration = self.model.exploration_schedule
        self.model.exploration_schedule = lambda _: exploration(self.remaining)  # of the run, not of one learn()
        self._gradient_steps = self.model.gradient_steps

    def _share_layers(self) -> None:
        self.policy.layers = self.model.q_net.q_net

    def _learn(self) -> None:
        has_learned = self.model.num_timesteps > self.model.learning_starts
        while has_learned and self.model.replay_buffer.size() * self.env.num_envs < self.model.learning_starts:
            self.model.gradient_steps = 0
            super()._learn()
        self.model.gradient_steps = self._gradient_steps
        super()._learn()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"calls": self.model._n_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.model._n_calls = state["calls"]
        self.model.exploration_rate = self.model.exploration_schedule(self.remaining)
