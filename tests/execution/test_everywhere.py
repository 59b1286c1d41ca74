"""Kernels are used by exits, gates, environments, predictors, fronts and judging, with the answers of gathering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from policyskip import load
from policyskip.agents.skipnet import SkipNet
from policyskip.backbones import sparse
from policyskip.backbones.costs import count_costs
from policyskip.backbones.exits import Leave
from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.deployment import profiling
from policyskip.deployment.predictors import ExitPredictor, GatedPredictor, Predictor
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import evaluate_gates
from policyskip.execution import ways
from policyskip.execution.exits import ExitExecution
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import How
from policyskip.exits.cache import cache_exits
from policyskip.exits.rules import CONFIDENCE, entropy
from policyskip.policies.networks import PolicyNetwork
from policyskip.policies.perceptrons import BlockPolicy, ExitPolicy
from policyskip.policies.thresholds import ThresholdPolicy
from policyskip.pretraining import Pretrainer
from policyskip.static_front.cache import known_front, remember
from policyskip.static_front.finding import find_front
from policyskip.static_front.scoring import SetScorer
from tests.conftest import small_backbone, small_images, typed, with_statistics, without_waits

SHAPE, CLASSES = (3, 12, 12), list("abcde")
IMAGES = small_images(9).images
KERNEL, GATHER, DENSE = (How(way) for way in ("kernel", "gather", "dense"))


def gated(gate: str = "rnn") -> GatedNetwork:
    """Gates that keep and skip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GatedNetwork(small_backbone(), gate, SHAPE)
        for parameter in network.gates.parameters():
            nn.init.normal_(parameter, 0, 0.5)
    return network.eval()


def with_exits(kind: str = "conv", size: int = 12) -> ResNetExits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResNetExits(small_backbone(), [0, 1, 3], kind, (3, size, size))
        return with_statistics(network).eval()  # type: ignore[return-value]


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", ["rnn", "ff1"])
@torch.no_grad()
def test_gates_decide_the_same(gate, plain_kernels):
    network = gated(gate)
    expected = network.greedy(IMAGES)
    uniform_BG = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    sampled = network.sampled(IMAGES, uniform_BG)
    assert 0 < expected.keep_BK[:, 1:].float().mean() < 1 and 0 < sampled.keep_BK[:, 1:].float().mean() < 1
    for how in (KERNEL, GATHER, DENSE):
        execution = GateExecution(network, SHAPE, *how)
        for run, right in ((execution.greedy(IMAGES), expected), (execution.sampled(IMAGES, uniform_BG), sampled)):
            assert torch.equal(run.keep_BK, right.keep_BK)
            assert_same(run.logits_BC, right.logits_BC)
            assert_same(run.gate_BG, right.gate_BG)
        assert_same(execution.whole(IMAGES), network.backbone(IMAGES))
        assert execution.greedy(IMAGES[:0]).keep_BK.shape == (0, 6)
    assert GateExecution(network, SHAPE, *KERNEL).way == "kernel"


@torch.no_grad()
def test_a_gate_that_says_one_half_skips_in_every_way(plain_kernels):
    network = gated()
    for parameter in network.gates.parameters():
        nn.init.zeros_(parameter)
    for how in (KERNEL, GATHER, DENSE):
        assert GateExecution(network, SHAPE, *how).greedy(IMAGES).keep_BK.sum(1).tolist() == [1] * 9


@pytest.mark.parametrize("kind", ["conv", "linear", "distiller_cifar"])
@torch.no_grad()
def test_images_leave_at_the_same_exits(kind, plain_kernels):
    network, images = with_exits(kind, 24), small_images(9, size=24).images
    sorted_BE = entropy(network(images)[:, :-1].softmax(-1)).sort(0).values
    policy = ThresholdPolicy("entropy", sorted_BE[3:5].mean(0).tolist())  # four of all nine leave at each exit
    sizes: list[int] = []

    def leave(n: int, logits_BC: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return policy.leave(n, logits_BC, rows)

    answers = {}
    for how in (GATHER, KERNEL, DENSE):
        execution = ExitExecution(network, (3, 24, 24), *how)
        sizes.clear()
        answers[how.way] = execution.run_until(images, leave)
        assert sizes[0] == 9 and (sizes == [9, 9, 9]) == (how.way != "gather")
        assert_same(execution.every_exit(images), network(images))
        assert execution.run_until(images[:0], leave)[0].shape == (0, 5)
    assert len(answers["gather"][1].unique()) > 2
    for way in ("kernel", "dense"):
        assert torch.equal(answers[way][1], answers["gather"][1])
        assert_same(answers[way][0], answers["gather"][0])


@torch.no_grad()
def test_what_is_nan_after_an_image_left_stays_out(plain_kernels):
    """Image 0 leaves at exit 0; the weights behind it are NaN."""
    network = with_exits("pooled")
    execution = ExitExecution(network, SHAPE, "kernel")
    for block in execution.network.backbone.blocks[1:]:
        for weight in block.residual.parameters():
            weight.fill_(torch.nan)
    logits_BC, exit_B = execution.run_until(IMAGES, lambda n, logits_BC, rows: rows == 0)
    assert exit_B.tolist() == [0] + [3] * 8
    assert logits_BC[0].isfinite().all() and logits_BC[1:].isnan().all()


def test_only_decisions_known_to_be_the_same_each_time_are_recorded(plain_kernels, monkeypatch):
    """A rule or a policy of the user's own may do anything, such as count the images it has seen."""
    recorded: list[bool] = []

    class Own(ThresholdPolicy):
        pass

    def run_until(self, images: Tensor, leave: object, may_record: bool) -> tuple[Tensor, Tensor]:
        recorded.append(may_record)
        return torch.zeros(len(images), 5), torch.zeros(len(images), dtype=torch.int64)

    monkeypatch.setattr(ExitExecution, "run_until", run_until)
    renamed = ThresholdPolicy("confidence", [0.5] * 3)
    renamed.rule = replace(CONFIDENCE, name="my_rules.MINE", measure=lambda probability: probability[..., 0])
    usual = [ThresholdPolicy(rule, [0.5] * 3) for rule in ("confidence", "entropy", "delta")]
    for policy in (*usual, ExitPolicy(4, 5, [8]), Own("confidence", [0.5] * 3), renamed):
        ExitPredictor(policy, with_exits(), CLASSES, SHAPE, 2.0, KERNEL).predict(IMAGES)
    assert recorded == [True] * 4 + [False] * 2


def test_a_plan_is_for_gathering_in_float32(plain_kernels):
    def plan(*how: str) -> list[float] | None:
        predictor = Predictor(PolicyNetwork(6), small_backbone(), CLASSES, SHAPE, 7.0, How(*how))
        predictor.plan = {2: [0.5], 16: [0.7]}
        return predictor.plan_for(8)

    assert plan("gather") == [0.5]
    assert [plan(*how) for how in (("kernel",), ("dense",), ("gather", "bfloat16"))] == [None] * 3


@torch.no_grad()
def test_an_answer_of_the_wrong_shape_is_refused(plain_kernels):
    with pytest.raises(ValueError, match="leave must give bool of shape"):
        ExitExecution(with_exits(), SHAPE, "kernel").run_until(IMAGES, lambda n, logits_BC, rows: logits_BC)


class WithSegmentsOfItsOwn(ResNetExits):
    def segment(self, n, state):
        return {"x": super().segment(n, state)["x"] * 2}


def test_segments_of_ones_own_are_gathered(plain_kernels):
    network = WithSegmentsOfItsOwn(small_backbone(), [0, 1], "conv", SHAPE).eval()
    execution = ExitExecution(network, SHAPE)
    assert execution.way == "gather" and execution.why == "there are no kernels for WithSegmentsOfItsOwn"


def test_networks_without_kernels_say_so(plain_kernels):
    network = MSDNet(5)
    assert ExitExecution(network, (3, 32, 32)).way == "gather"
    with pytest.raises(UserError, match="execution=kernel cannot be: there are no kernels for MSDNet"):
        ExitExecution(network, (3, 32, 32), "kernel")


def block_policies() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"image": PolicyNetwork(6), "blocks": BlockPolicy(6, 16, [8])}


@pytest.mark.parametrize("name", ["image", "blocks", "gates", "thresholds", "exits"])
def test_predictions_are_the_same(name, plain_kernels):
    def predictor(how: How):
        if name in ("image", "blocks"):
            return Predictor(block_policies()[name].eval(), small_backbone(), CLASSES, SHAPE, 7.0, how)
        if name == "gates":
            return GatedPredictor(gated(), CLASSES, SHAPE, how)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = ExitPolicy(4, 5, [8]) if name == "exits" else ThresholdPolicy("confidence", [0.5, 0.5, 0.5])
        return ExitPredictor(policy, with_exits(), CLASSES, SHAPE, 2.0, how)

    usual = predictor(GATHER).predict(IMAGES, batch_size=4)
    plain_kernels.calls.clear()
    for how in (KERNEL, DENSE):
        answer = predictor(how).predict(IMAGES, batch_size=4)
        assert_same(answer.logits_BC, usual.logits_BC)
        assert torch.equal(answer.macs_B, usual.macs_B) and torch.equal(answer.label_B, usual.label_B)
        assert bool(plain_kernels.calls) == (how == KERNEL) or how == DENSE
    assert [size for kind, size in plain_kernels.calls if kind == "features"] == [4, 4, 1]


class OfAnEarlierVersion(PolicyNetwork):
    """Runs a network by itself, as policies did before there were executions."""

    def run(self, backbone, images, break_even_K=None):  # type: ignore[override]
        keep_BK = self.decide(images)
        return sparse(backbone, images, keep_BK, break_even_K), keep_BK


def test_a_policy_that_runs_a_backbone_is_given_one(plain_kernels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = OfAnEarlierVersion(6).eval()
    usual = Predictor(block_policies()["image"].eval(), small_backbone(), CLASSES, SHAPE, 7.0, GATHER)
    for how in (How(), GATHER):
        predictor = Predictor(policy, small_backbone(), CLASSES, SHAPE, 7.0, how)
        assert torch.equal(predictor.predict(IMAGES).logits_BC, usual.predict(IMAGES).logits_BC)
    for how in (KERNEL, DENSE):
        with pytest.raises(UserError, match=f"takes a backbone and no execution, so execution={how.way} has no effect"):
            Predictor(policy, small_backbone(), CLASSES, SHAPE, 7.0, how)


@pytest.mark.parametrize("kind", [BlockSelectionVectorEnv, LayerSkipVectorEnv])
def test_environments_give_the_same_rewards(kind, plain_kernels):
    generator = torch.Generator().manual_seed(0)
    envs = [kind(4, backbone=small_backbone(), images=small_images(8), execution=way) for way in ("kernel", "gather")]
    assert [env.execution.way for env in envs] == ["kernel", "gather"]
    assert kind(4, backbone=small_backbone(), images=small_images(8)).execution.way == "kernel"  # without asking
    for _ in range(2 * envs[0].steps_per_episode):
        action = torch.rand((4, *envs[0].single_action_space.shape), generator=generator) < 0.5
        (a, reward_a, *_), (b, reward_b, *_) = (env.step(action) for env in envs)
        assert_same(a.float(), b.float())
        assert_same(reward_a, reward_b)
    keep_SBK = torch.rand(3, 4, 6, generator=generator) < 0.5
    assert_same(*(env.score(keep_SBK).logits_BC for env in envs))


def test_an_environment_splits_batches_for_kernels_too(plain_kernels, monkeypatch, capsys):
    env = BlockSelectionVectorEnv(8, backbone=small_backbone(), images=small_images(8), execution="kernel")
    keep_BK = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    whole, logits, sizes = env.score(keep_BK), plain_kernels.logits, []

    def scarce(self, images: Tensor, keep_SBK: Tensor) -> Tensor:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return logits(self, images, keep_SBK)

    monkeypatch.setattr(plain_kernels, "logits", scarce)
    assert_same(env.score(keep_BK).logits_BC, whole.logits_BC)
    assert sizes == [8, 4, 2, 2, 2, 2] and "batches are split" in capsys.readouterr().err


def test_the_exit_environment_computes_its_cache_by_kernels(plain_kernels):
    network = with_exits()
    env = EarlyExitVectorEnv(4, network=network, images=small_images(8), cached=True, execution="kernel")
    usual = EarlyExitVectorEnv(4, network=network, images=small_images(8), cached=True, execution="gather")
    assert_same(env.observation, usual.observation)
    assert plain_kernels.calls
    for options in ({"execution": "kernel"}, {"precision": "bfloat16"}, {"execution": "dense"}):
        with pytest.raises(UserError, match="are for the outputs that cached=true computes, got execution="):
            EarlyExitVectorEnv(4, network=network, images=small_images(8), **options)
    with pytest.raises(UserError, match="execution must be one of"):
        EarlyExitVectorEnv(4, network=network, images=small_images(8), execution="fast")


def test_sets_are_scored_the_same_and_cost_the_budget_the_same(plain_kernels, monkeypatch):
    monkeypatch.setattr("policyskip.static_front.scoring.PIXELS_AT_ONCE", 3 * 10 * 144)  # three sets at once
    generator = torch.Generator().manual_seed(0)
    sets = sorted({tuple(row.tolist()) for row in torch.rand(8, 6, generator=generator) < 0.5})
    scorers = [SetScorer(small_backbone(), small_images(), 20, 10, how=how) for how in (GATHER, KERNEL, DENSE)]
    for scorer in scorers:
        scorer.score(sets, 10)
        scorer.score(sets)
    for scorer in scorers[1:]:
        assert scorer.spent == scorers[0].spent
        for keep in sets:
            assert torch.equal(scorer.known[keep].right_n, scorers[0].known[keep].right_n)
            assert_same(scorer.known[keep].probability_n.float(), scorers[0].known[keep].probability_n.float())
    rows = [size for kind, size in plain_kernels.calls if kind == "advance"]
    assert rows == 2 * [30, 30, 10 * (len(sets) - 6)]


def test_a_front_of_another_precision_is_another_front(tmp_path, monkeypatch):
    backbone, images = small_backbone(8), small_images()
    front = find_front(backbone, images, count_costs(backbone, SHAPE), 1e9, 20, how=How("auto", "bfloat16"))
    remember(front, tmp_path, precision="bfloat16")
    assert known_front(backbone, images, tmp_path, precision="bfloat16") == front
    assert known_front(backbone, images, tmp_path) is None
    assert known_front(backbone, images, tmp_path, precision="float16") is None
    assert known_front(backbone, images, tmp_path, hints=[front.sets[0]], precision="bfloat16") == front
    remember(front, tmp_path)
    assert known_front(backbone, images, tmp_path) == front
    assert known_front(backbone, images, tmp_path, precision="float32_exact") is None
    monkeypatch.setattr("policyskip.static_front.cache.WEIGHTS", tmp_path)
    front.save(tmp_path / "x.front.json")  # as those that ship, which were searched in float32
    found = [known_front(backbone, images, tmp_path / "empty", precision=precision) for precision in ways.PRECISIONS]
    assert found == [front, front, None, None]


def test_judging_gates_exits_and_pretraining(plain_kernels):
    images = small_images(12)
    agent = SkipNet(small_backbone(), SHAPE, 10)
    by_kernels, gathered = (evaluate_gates(agent, images, 5, how) for how in (KERNEL, GATHER))
    assert torch.equal(by_kernels.ran_NK, gathered.ran_NK)
    assert torch.equal(by_kernels.full_correct_N, gathered.full_correct_N)
    assert_same(by_kernels.reward_N, gathered.reward_N)
    caches = [cache_exits(with_exits(), images, how) for how in (KERNEL, GATHER, How("auto", "bfloat16"))]
    assert_same(caches[0].logits_MNC, caches[1].logits_MNC)
    assert caches[2].logits_MNC.dtype == torch.float32
    learner = Pretrainer(small_backbone(), 10)
    assert learner.accuracies(images, way="kernel") == learner.accuracies(images, way="gather")
    for parameter in learner.backbone.parameters():
        nn.init.zeros_(parameter)  # it learns: kernels are made of the weights that it has now
    share = (images.label_N == 0).double().mean().item()
    assert learner.accuracies(images, way="kernel")["accuracy"] == share


def test_a_profile_says_which_way_and_why_and_times_all(plain_kernels, monkeypatch):
    recorded, run_until = set[str](), ExitExecution.run_until

    def noted(self, images: Tensor, leave: Leave, may_record: bool = False) -> tuple[Tensor, Tensor]:
        recorded.update([self.way] if may_record else [])
        return run_until(self, images, leave, may_record)

    monkeypatch.setattr(ExitExecution, "run_until", noted)
    for network in (small_backbone(8), with_exits("pooled")):
        content = profiling.profile(network, SHAPE, [2], 1)
        assert content["execution"] == {"way": "kernel", "why": "PlainKernels", "precision": "float32"}
        table = content["batches"]["2"]["ways"]
        assert set(table) == {"kernel", "gather", "dense"}
        assert all(set(times) == {"whole_ms", "half_ms"} and min(times.values()) > 0 for times in table.values())
    assert recorded == {
        "kernel",
        "gather",
        "dense",
    }  # half of the exits, too, is timed in a CUDA graph where there is one
    content = profiling.profile(small_backbone(8), SHAPE, [2], 1, How("gather", "bfloat16"))
    assert content["execution"] == {"way": "gather", "why": "as asked", "precision": "bfloat16"}
    assert "ways" not in content["batches"]["2"]


SMALL = ["+experiment=debug", "device=cpu", "data.train=64", "data.validation=32", "data.test=32"]
NET = ["backbone=cifar_resnet", "backbone.depth=8", "backbone.width=4", "backbone.checkpoint=random"]


def test_whole_commands_by_kernels(tmp_path, plain_kernels):
    def policyskip(*words: str) -> str:
        done = typed(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    policyskip("train", *SMALL, *NET, "execution=kernel", "run.dir=runs/x")
    summary = (tmp_path / "runs/x/summary.json").read_text()
    assert '"execution": "kernel"' in summary and '"precision": "float32"' in summary
    assert load(tmp_path / "runs/x").execution.way == "kernel"
    assert load(tmp_path / "runs/x", execution="dense", precision="bfloat16").execution.why == "as asked"
    judged = policyskip("evaluate", "run=runs/x", "device=cpu", "execution=gather")
    assert "test/accuracy" in judged
    said = policyskip("profile", "run=runs/x", "device=cpu", "repeats=1", "batch_sizes=[2]", "images=4")
    assert "Executed by kernel in float32: PlainKernels." in said and "ways of execution" in said
    policyskip("train", "run.resume=runs/x", "train.steps=8", "execution=gather")  # it goes on in another way


@pytest.mark.parametrize("agent", ["random", "skipnet", "branchynet", "ppo"])
def test_every_part_of_a_command_takes_the_way_and_the_precision(agent, tmp_path, monkeypatch):
    made, init = set[tuple[str, str]](), ways.NetworkExecution.__init__

    def noted(self, network, image_shape, way="auto", precision="float32", as_it_is=False) -> None:
        made.add((way, precision))
        init(self, network, image_shape, way, precision, as_it_is)

    def policyskip(*words: str, way: str = "gather") -> None:
        made.clear()
        done = typed(*words, "device=cpu", f"execution={way}", cwd=here)
        assert done.returncode == 0, done.stderr
        assert made == {(way, "bfloat16")}

    monkeypatch.setattr(ways.NetworkExecution, "__init__", noted)
    (here := tmp_path / "here").mkdir()
    words = [f"agent={agent}", *(["env=early_exit"] if agent == "ppo" else []), "front.budget=2e3", "front.images=20"]
    policyskip("train", *SMALL, *words, "precision=bfloat16", "run.dir=x")
    fronts = list((tmp_path / "cache").rglob("*.json"))
    assert fronts and all("-bfloat16" in path.name for path in fronts)
    policyskip("evaluate", "run=x", way="gather" if agent == "skipnet" else "dense")
    if agent == "branchynet":
        policyskip("calibrate", "run=x", "target.accuracy_drop=0.5")


def test_an_environment_of_ones_own_that_takes_no_way_is_refused(tmp_path):
    code = "from policyskip.envs.block_selection import BlockSelectionVectorEnv as Base\n"
    code += "class Mine(Base):\n    def __init__(self, num_envs, backbone, images, reward, order, seed):\n"
    code += (
        "        super().__init__(num_envs, backbone=backbone, images=images, reward=reward, order=order, seed=seed)\n"
    )
    (tmp_path / "my_own_envs.py").write_text(code)
    done = typed("train", *SMALL, *NET, "env._target_=my_own_envs.Mine", "precision=bfloat16", cwd=tmp_path)
    (line,) = without_waits(done.stderr)
    assert done.returncode == 2 and "env has no key precision; my_own_envs.Mine takes" in line
    done = typed("train", *SMALL, *NET, "+env.precision=bfloat16", cwd=tmp_path)  # its summary would say float32
    (line,) = without_waits(done.stderr)
    assert done.returncode == 2 and line.endswith("rest of a run: say precision=bfloat16 for all of it")


@pytest.mark.parametrize("command", ["train", "front", "pretrain", "profile"])
def test_another_way_is_refused_in_a_line(command, tmp_path: Path):
    done = typed(command, "execution=fast", "device=cpu", cwd=tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "execution" in line and "'kernel'" in line and line.endswith("got 'fast'")


@pytest.mark.parametrize(
    "words", [["train"], ["train", "agent=skipnet"], ["train", "agent=msdnet"], ["pretrain"], ["front"]]
)
def test_kernels_that_cannot_be_end_a_command_before_it_begins(words, tmp_path, monkeypatch):
    monkeypatch.setattr(ways, "no_kernels_on", lambda device, may_interpret: "this is a CPU")
    small = ["device=cpu", "data.train=64", "data.validation=32", "data.test=32"]
    done = typed(*words, *small, "execution=kernel", cwd=tmp_path)
    (line,) = without_waits(done.stderr)
    assert done.returncode == 2 and line.endswith("execution=kernel cannot be: this is a CPU; say execution=auto")
    assert not (tmp_path / "runs").exists()
