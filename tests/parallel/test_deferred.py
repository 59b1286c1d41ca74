"""Updates on a GPU ask it for nothing, and what was deferred gives the same figures and stops the same runs.

There is no GPU here. What asks one is found with torch's made-up tensors, which have a device and no numbers; and the CPU
is treated as a device that is not asked at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from policyskip.backbones.execution import dense
from policyskip.envs.base import ImageVectorEnv
from policyskip.errors import UserError
from policyskip.finite import find_nonfinite
from policyskip.parallel import deferred, processes
from policyskip.parallel.deferred import Deferred, fetched, figure, numbers_of
from policyskip.rewards import Budget, Linear
from policyskip.runs.folder import Run, create
from policyskip.training import _updated
from tests.learners import LEARNERS, blockdrop, learn

GPU = torch.device("cuda:0")
ASKING_NOTHING = (
    "blockdrop",
    "blockdrop with a value baseline",
    "blockdrop on a budget",
    "branchynet by SGD",
    "msdnet",
    "cdl",
)


@pytest.fixture
def like_a_gpu(monkeypatch) -> Iterator[None]:
    """The CPU is not asked at once."""
    monkeypatch.setattr(deferred, "answers_at_once", lambda device: False)
    yield


def test_numbers_come_over_as_they_are():
    numbers = [torch.tensor(0.1), torch.tensor(7), torch.tensor(0.1, dtype=torch.float64), torch.tensor(True)]
    assert numbers_of([*numbers, torch.tensor(0.3)]) == [
        0.1 + 1.4901161193847656e-09,
        7,
        0.1,
        1,
        torch.tensor(0.3).item(),
    ]
    assert numbers_of([]) == []
    window = [{"a": torch.tensor(0.5), "b": 2}, {"b": torch.tensor(3.0)}]
    assert fetched(window) == [{"a": 0.5, "b": 2}, {"b": 3.0}]


def test_a_figure_stays_a_tensor_in_the_training_loop_alone(like_a_gpu):
    loss = torch.tensor(0.5, requires_grad=True)
    assert figure(loss) == 0.5 and isinstance(figure(loss), float)
    with Deferred().during(1):
        kept = figure(loss)
    assert isinstance(kept, Tensor) and not kept.requires_grad


def test_the_first_problem_is_told_with_its_update(like_a_gpu):
    checks = Deferred()
    for update in (3, 4, 5):
        with checks.during(update):
            large = torch.full((2,), 3e38)  # whose sum overflows
            loss = torch.tensor(math.nan if update > 3 else 1.0)
            checks.note({"the logits": large, "the loss": loss, "nothing": torch.zeros(0)})
    assert checks.first_problem() == "the loss in update 4"
    assert checks.first_problem() is None


def records(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


@pytest.mark.parametrize("name", ["blockdrop on a budget", "skipnet", "branchynet", "pretrain"])
def test_figures_are_the_same_bit_for_bit(name, tmp_path, monkeypatch):
    """Stopped in the middle of a window, too."""
    at_once, later = (create(str(tmp_path / kind), "policyskip train", "") for kind in ("at-once", "later"))
    assert learn(name, at_once)
    monkeypatch.setattr(deferred, "answers_at_once", lambda device: False)
    assert not learn(name, later, stop_at=5)
    assert learn(name, later, resume=True)
    assert records(later) == records(at_once)


@pytest.mark.parametrize("what", ["weight", "reward"])
def test_what_goes_wrong_is_noticed_before_anything_is_saved(what, tmp_path, like_a_gpu):
    """In update 4, after the checkpoint of update 3; figures are read after update 4, as log_every is 2."""

    def spoil(learner: Any, source: Any, number: int) -> None:
        if number == 4 and what == "weight":
            learner.policy.keep_head.bias.data.fill_(torch.nan)
        elif number == 4:
            source.reward = lambda outcome: outcome.macs_B / 0

    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError) as refused:
        learn("blockdrop", run, spoil=spoil)
    wrong = "blockdrop: its logits held" if what == "weight" else "the reward <lambda> returned"
    expected = (
        rf"{wrong} numbers that are not finite in update 4, as was found after update 4; .*checkpoint\.pt, of update 3"
    )
    assert re.fullmatch(expected, str(refused.value))
    assert run.load_checkpoint()["step"] == 3 and find_nonfinite(run.load_checkpoint()) is None


def test_a_loss_that_is_kept_keeps_no_gradient():
    class Own:
        def update(self, source: Any) -> dict[str, Any]:
            return {"loss": 2 * torch.ones((), requires_grad=True), "lr": 0.1}

    figures = _updated(Own(), None)  # type: ignore[arg-type]
    assert not figures["loss"].requires_grad and fetched([figures]) == [{"loss": 2.0, "lr": 0.1}]  # type: ignore[union-attr]


def test_a_reward_of_the_users_own_gets_numbers(tmp_path, like_a_gpu, monkeypatch):
    seen: list[Any] = []

    class Own(Linear):
        """A reward that looks at the loss of every update."""

        def adapt(self, figures: dict[str, Any]) -> dict[str, float]:
            seen.append(figures["loss"])
            return {"seen": float(len(seen))}

        def selection_score(self, figures: dict[str, float]) -> float:
            return figures["accuracy"]

        def state_dict(self) -> dict[str, float]:
            return {}

        def load_state_dict(self, state: dict[str, float]) -> None:
            pass

    monkeypatch.setitem(LEARNERS, "own", lambda steps: blockdrop(steps, Own()))
    assert learn("own", create(str(tmp_path / "run"), "policyskip train", ""), steps=2)
    assert [type(value) for value in seen] == [float, float]


def test_a_price_on_the_device_is_the_same_price():
    here, there = Budget(0.5), Budget(0.5)
    for share in (0.7, 0.4, 0.9, 0.1):
        numbers = here.adapt({"macs_fraction": share})
        tensors = there.adapt({"macs_fraction": torch.tensor(share, dtype=torch.float64)})
        assert numbers == fetched([tensors])[0]
    assert there.state_dict() == here.state_dict() and type(there.state_dict()["excess"]) is float


def test_means_over_processes_stay_on_the_device(monkeypatch):
    """The other of two processes has 1 for every figure."""
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda total: total.add_(1))
    means = processes.average({"loss": torch.tensor(0.5), "lr": 2})
    assert all(isinstance(mean, Tensor) for mean in means.values()) and fetched([means]) == [{"loss": 0.75, "lr": 1.5}]
    assert processes.average({"loss": 0.5, "lr": 2}) == {"loss": 0.75, "lr": 1.5}


class Asks(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: numbers that are asked for, and copies that are not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, args[0] if args else None
        here = given.device if isinstance(given, Tensor) else None
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal") and here == GPU:
            self.found.append(name)
        if name == "_local_scalar_dense" and here == torch.device("cpu"):
            return 1.0  # of a number on the CPU, such as Adam's step
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.found.append("index by bool")
        to = kwargs.get("device") if name == "_to_copy" else None
        if to is not None and here is not None and to.type != here.type and not kwargs.get("non_blocking"):
            self.found.append(f"copy from {here} to {to}")
        if name == "copy_" and args[1].device.type != here.type and not (len(args) > 2 and args[2]):
            self.found.append(f"copy from {args[1].device} to {here}")
        return func(*args, **kwargs)


def on_made_up_gpu(*owners: Any) -> None:
    """Put all tensors of objects, of their modules and of their optimizers on a GPU that is not there."""
    made: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty_like(tensor, device=GPU)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    modules = [
        module
        for owner in owners
        for value in vars(owner).values()
        if isinstance(value, nn.Module)
        for module in value.modules()
    ]
    for module in modules:
        for tensors in (module._parameters, module._buffers, vars(module)):
            tensors.update({key: moved(value) for key, value in tensors.items() if isinstance(value, Tensor)})
    for owner in owners:
        for key, value in vars(owner).items():
            if isinstance(value, Tensor):
                setattr(owner, key, moved(value))
            elif isinstance(value, torch.device):
                setattr(owner, key, GPU)
            elif isinstance(value, torch.optim.Optimizer):
                for group in value.param_groups:
                    group["params"] = [moved(parameter) for parameter in group["params"]]


@pytest.mark.parametrize("name", ASKING_NOTHING)
def test_an_update_on_a_gpu_asks_it_for_nothing(name, monkeypatch):
    learner, source, _ = LEARNERS[name](8)
    feed = getattr(source, "feed", source)
    checks, asks = Deferred(), Asks()

    def backward(loss: Tensor) -> None:  # torch's own needs a GPU
        for group in learner.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(ImageVectorEnv, "score", score_densely)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_made_up_gpu(learner, source, feed.images)
        feed.seek(0)
        with asks:
            for number in (1, 2):
                with checks.during(number):
                    figures = learner.update(source)
                    if isinstance(getattr(source, "reward", None), Budget):
                        figures |= source.reward.adapt(figures)
        assert asks.found == []
        assert {key for key, value in figures.items() if not isinstance(value, Tensor)} == {"lr"}
        with asks, pytest.raises(Exception, match="item|scalar"):
            fetched([figures])
    assert asks.found[-1] in ("_local_scalar_dense", "copy from cuda:0 to cpu")  # so the test would see one


def score_densely(env: Any, keep: Tensor) -> Any:
    """What ``score`` does, every block for every image."""
    with torch.no_grad():
        keep_SBK = keep if keep.dim() == 3 else keep.unsqueeze(0)
        images, label_B = env.feed.batch.images, env.feed.batch.label_B
        logits_BC = torch.cat([dense(env.backbone, images, keep_BK) for keep_BK in keep_SBK])
        return env._outcome(logits_BC, label_B.repeat(len(keep_SBK)), keep_SBK.flatten(0, 1))
