"""Times of blocks, and the plan that is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import policyskip
from policyskip.backbones import sparse
from policyskip.backbones.execution import run_block, run_most
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.deployment.predictors import ExitPredictor, Predictor
from policyskip.deployment.profiling import _counts, _ways, break_even, device_name, profile, side_by_side
from policyskip.errors import UserError
from policyskip.evaluation import speed
from policyskip.policies.networks import ConstantPolicy
from policyskip.rewards import Budget
from tests.conftest import small_backbone, typed


def test_break_even_by_hand():
    # Gathering takes 2 ms and 10 ms for the whole batch: at 9 ms for all it is even where 2 + 10 s = 9.
    gathered = [(share, 2 + 10 * share) for share in (0.5, 0.75, 0.9)]
    assert break_even(9.0, gathered) == pytest.approx(0.7)
    assert break_even(1.0, gathered) == 0.0  # for all it is always faster
    assert break_even(20.0, gathered) == 1.0  # and never
    assert break_even(5.0, [(0.5, 4.0), (0.9, 4.0)]) == 1.0  # the share makes no difference
    assert break_even(3.0, [(0.5, 4.0), (0.9, 4.0)]) == 0.5
    assert break_even(1.005, [(0.1, 1.01), (0.5, 1.0), (0.9, 1.0)]) == 1.0  # noise


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_most_is_gathered(k, grad, images):
    """Block 1 has an identity for a shortcut, block 2 a projection."""
    backbone = small_backbone(shortcut="B")
    with torch.set_grad_enabled(grad):
        x = backbone.blocks[0](backbone.features(images))
        x = x if k == 1 else backbone.blocks[1](x)
        rows, dropping = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4, 6])
        gathered = run_block(backbone.blocks[k], x.clone(), rows)
        everything = run_most(backbone.blocks[k], x.clone(), dropping)
    torch.testing.assert_close(everything, gathered, rtol=1e-4, atol=1e-5)
    if grad:
        both = [torch.autograd.grad((y**2).sum(), x, retain_graph=True)[0] for y in (everything, gathered)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_the_plan_decides_which_way_a_block_is_run(images):
    backbone = small_backbone()
    K = backbone.num_blocks
    policy = ConstantPolicy(K)
    predictor = Predictor(policy, backbone, ["a", "b"], (3, 12, 12), 0.0)
    keep_BK = torch.ones(len(images), K, dtype=torch.bool)
    keep_BK[:2, 1] = False  # 5 of 7 keep block 1
    keep_BK[:5, 2] = False  # 2 of 7 keep block 2
    predictor.policy.decide = lambda images: keep_BK
    rows: list[list[int]] = [[] for _ in range(K)]
    for block, seen in zip(predictor.backbone.blocks, rows, strict=True):
        block.residual[0].register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
    without = predictor.predict(images)
    predictor.plan = {1: [1.0] * K, 8: [0.5] * K}
    planned = predictor.predict(images)
    assert rows == [[7, 7], [5, 7], [2, 2], *[[7, 7]] * (K - 3)]
    torch.testing.assert_close(planned.logits_BC, without.logits_BC, rtol=1e-4, atol=1e-5)
    assert torch.equal(planned.macs_B, without.macs_B)
    assert predictor.plan_for(2) == [1.0] * K and predictor.plan_for(300) == [0.5] * K


def test_nan_of_a_block_that_is_run_for_all_stays_with_those_that_keep_it(images):
    backbone = small_backbone()
    torch.nn.init.constant_(backbone.blocks[2].residual.conv1.weight, float("nan"))
    keep_BK = torch.ones(len(images), backbone.num_blocks, dtype=torch.bool)
    keep_BK[:2, 2] = False
    with torch.no_grad():
        finite_B = torch.isfinite(sparse(backbone, images, keep_BK, [0.5] * backbone.num_blocks)).all(1)
    assert finite_B.tolist() == [True] * 2 + [False] * (len(images) - 2)


def test_a_profile_has_what_others_read():
    backbone = small_backbone()
    content = json.loads(json.dumps(profile(backbone, (3, 12, 12), [1, 4], repeats=1)))
    assert content["hash"] == backbone.content_hash() and list(content["batches"]) == ["1", "4"]
    for times in content["batches"].values():
        assert times["whole_ms"] > 0 and times["always_ms"] > 0
        for key in ("kept_ms", "dropped_ms", "break_even"):
            assert len(times[key]) == backbone.num_blocks
        assert all(0 <= share <= 1 for share in times["break_even"])
    assert content["batches"]["1"]["break_even"] == [1.0] * backbone.num_blocks  # one image keeps a block or does not


def test_a_profile_of_exits_has_a_time_for_each():
    network = ResNetExits(small_backbone(), [1, 3], "pooled", (3, 12, 12))
    content = profile(network, (3, 12, 12), [2], repeats=1)
    assert len(content["batches"]["2"]["kept_ms"]) == network.num_exits == len(content["macs"]["blocks"])
    assert "break_even" not in content["batches"]["2"]


QUICK_FRONT = "front.budget=2e3"  # what +experiment=debug spends takes a second
SMALL = ("data.train=200", "data.validation=60", "data.test=60", "device=cpu")


def test_profile_is_typed_and_read(tmp_path, monkeypatch):
    """A network's table is written, a reward reads it, and a run's own table becomes its plan."""
    result = typed("profile", "repeats=1", "batch_sizes=[1,4]", *SMALL, "output=t.json", cwd=tmp_path, drawn=True)
    assert result.returncode == 0, result.stderr
    assert "gather if fewer" in result.stdout and (tmp_path / "t.png").stat().st_size > 10_000
    words = ("+experiment=debug", "reward=latency", "reward.table=t.json", "run.dir=run", "device=cpu", QUICK_FRONT)
    result = typed("train", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = typed("profile", "run=run", "device=cpu", "repeats=1", "batch_sizes=[4]", "images=8", cwd=tmp_path)
    assert result.returncode == 0 and "measured" in result.stdout, result.stderr
    times = json.loads((tmp_path / "run" / "profile.json").read_text())["batches"]["4"]
    assert times["run"]["time_ratio"] > 0 and 0 < times["run"]["macs_ratio"] <= 1.2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["latency_ms"] == times["run"]["predict_ms"] > 0 and summary["latency_batch"] == 4
    assert policyskip.load(tmp_path / "run").plan == {4: times["break_even"]}
    monkeypatch.setattr(
        "policyskip.deployment.profiling.milliseconds",
        lambda calls, *_: {name: {"predict": 8.0}.get(name, 16.0) for name in calls},
    )
    result = typed("profile", "run=run", "device=cpu", "repeats=1", "batch_sizes=[1,4]", "images=8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    times = json.loads((tmp_path / "run" / "profile.json").read_text())["batches"]["4"]["run"]
    assert (times["time_ratio"], times["predict_ms"]) == (0.5, 1.0)  # eight images take 8 ms instead of 16
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["latency_ms"] == 1.0 and summary["latency_batch"] == 4
    assert "At batch 4, predictions take 0.50 of the whole network's time (× 2.00)" in result.stdout
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    trial = ("execution=dense", "repeats=1", "batch_sizes=[4]", "images=8")
    result = typed("profile", "run=run", "device=cpu", *trial, cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "profile-run-dense-float32.json").is_file(), result.stderr
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    result = typed("profile", "run=run", "device=cpu", "batch_sizes=[4]", "images=3", cwd=tmp_path)
    assert result.returncode == 2 and "on 3 images; say images=4 or more, or batch_sizes=" in result.stderr
    result = typed("profile", "run=run", "device=cpu", "batch_sizes=[999]", cwd=tmp_path)
    assert result.returncode == 2 and "say batch_sizes= with 64 at most" in result.stderr
    (tmp_path / "run" / "profile.json").write_text("{}")
    with pytest.raises(UserError, match=r"profile\.json is damaged; `policyskip profile run=` makes it anew"):
        policyskip.load(tmp_path / "run")
    assert policyskip.load(tmp_path / "run", planned=False).plan == {}
    result = typed("profile", "run=run", "device=cpu", "repeats=1", "batch_sizes=[4]", "images=8", cwd=tmp_path)
    assert result.returncode == 0 and policyskip.load(tmp_path / "run").plan, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=none"], "the run folder none does not exist"),
        (["batch_sizes=[]"], "batch_sizes"),
        (["batch_sizes=[0]"], "batch_sizes"),
        (["repeats=0"], "repeats"),
        (["images=0"], "images"),
        (["backbone=resnet21"], "there is no backbone/resnet21"),
        (["output=/proc/t.json"], "cannot write /proc/t.json"),
    ],
)
def test_what_cannot_be_profiled_is_refused(tmp_path, words, message):
    result = typed("profile", *SMALL, *words, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Callable[..., None]:
    """A function that copies a finished run of an agent into a folder, as ``run``; each agent is trained once."""
    folder = tmp_path_factory.mktemp("finished")

    def copied(into: Path, *agent: str) -> None:
        name = agent[0].removeprefix("agent=")
        if not (folder / name).exists():
            front = [QUICK_FRONT] if name in ("blockdrop", "skipnet") else []
            result = typed("train", "+experiment=debug", *agent, *front, f"run.dir={name}", "device=cpu", cwd=folder)
            assert result.returncode == 0, result.stderr
        shutil.copytree(folder / name, into / "run")

    return copied


@pytest.mark.parametrize(
    "agent", [("agent=blockdrop",), ("agent=skipnet",), ("agent=branchynet",), ("agent=ppo", "env=early_exit")]
)
def test_reduced_precision_changes_little(tmp_path, agent, finished_run):
    """Half of the mantissa gone, logits differ in the second or third digit, and most answers not at all."""
    finished_run(tmp_path, *agent)
    images = torch.randint(0, 256, (32, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = policyskip.load(tmp_path / "run").predict(images)
    for precision, tolerance in (("float16", 0.05), ("bfloat16", 0.5)):
        predictor = policyskip.load(tmp_path / "run", precision=precision)
        if isinstance(predictor, Predictor):
            of = {part: next(getattr(predictor, part).parameters()).dtype for part in ("policy", "backbone")}
            assert of == {"policy": torch.float32, "backbone": getattr(torch, precision)}
        rough = predictor.predict(images)
        assert rough.logits_BC.dtype == torch.float32
        difference = (rough.logits_BC - exact.logits_BC).abs().max().item()
        assert 0 < difference < tolerance
        assert (rough.label_B == exact.label_B).float().mean() > 0.9
    with pytest.raises(
        UserError, match="precision must be one of float32, float32_exact, bfloat16, float16, got 'int8'"
    ):
        policyskip.load(tmp_path / "run", precision="int8")


def test_a_profile_s_numbers_by_hand(monkeypatch):
    """Eight milliseconds for a batch of four are two an image; gathered, two blocks of three cost half."""
    times = {"kept": 8.0, "dropped": 4.0, "most": 6.0, "2": 4.0, "3": 6.0, "stem": 4.0, "head": 8.0, "whole": 40.0}
    monkeypatch.setattr(
        "policyskip.deployment.profiling.milliseconds", lambda calls, *others: {name: times[name] for name in calls}
    )
    backbone = small_backbone()
    found = profile(backbone, (3, 12, 12), [4], repeats=1)["batches"]["4"]
    K = backbone.num_blocks
    assert found["kept_ms"] == [2.0] * K and found["dropped_ms"] == [1.0] * K
    assert found["always_ms"] == 3.0 and found["whole_ms"] == 10.0
    assert found["break_even"] == pytest.approx([0.75] * K)  # 2 of 4 take 4 ms, 3 of 4 take 6: 6 ms at 3 of 4


def test_every_way_to_run_a_block_runs_it_for_the_images_that_it_says():
    """What is timed under a name is what the name says: else every plan would be wrong."""
    backbone = small_backbone()
    block, ran = backbone.blocks[0], []
    block.residual.register_forward_hook(lambda module, inputs, x: ran.append(len(x)))
    found = {}
    with torch.no_grad():
        ways = _ways(block, backbone.features(torch.zeros(8, 3, 12, 12, dtype=torch.uint8)))
        for name, way in ways.items():
            ran.clear()
            way()
            found[name] = list(ran)
    counts = {str(count): [count] for count in _counts(8)}
    assert found == {"kept": [8], "dropped": [], "most": [8], **counts} and len(counts) > 1


def test_calls_take_turns_after_one_round_to_warm_up():
    calls: list[str] = []
    seconds = side_by_side({name: partial(calls.append, name) for name in "ab"}, 3, torch.device("cpu"))
    assert "".join(calls) == "abababab" and all(len(numbers) == 3 for numbers in seconds.values())


def test_what_a_run_s_blocks_should_take_by_hand():
    times = {"always_ms": 1.0, "kept_ms": [2.0, 4.0, 3.0], "dropped_ms": [0.0, 1.0, 0.0]}
    keep_BK = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    assert speed._expected_ratio(times, keep_BK) == pytest.approx((7 + 10) / 2 / 10)
    predictor, exits = (
        SimpleNamespace(network=SimpleNamespace(num_exits=3)),
        SimpleNamespace(exit_B=torch.tensor([0, 2])),
    )
    ran_BK = ExitPredictor.ran(predictor, exits)
    assert ran_BK.tolist() == [[True, False, False], [True, True, True]]
    assert speed._expected_ratio({**times, "dropped_ms": [0.0] * 3}, ran_BK) == pytest.approx((3 + 10) / 2 / 10)


@pytest.mark.parametrize("change", [{"hash": "another"}, {"device": "another"}, {"threads": 99}])
def test_a_plan_of_another_machine_or_network_is_not_gone_by(tmp_path, change, finished_run):
    finished_run(tmp_path, "agent=blockdrop")
    network = json.loads((tmp_path / "run" / "policy.json").read_text())["backbone"]["hash"]
    times = {"break_even": [0.5] * 15}
    content = {"hash": network, "device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    for extra, expected in (({}, {4: times["break_even"]}), (change, {})):
        (tmp_path / "run" / "profile.json").write_text(json.dumps({**content, "batches": {"4": times}, **extra}))
        assert policyskip.load(tmp_path / "run").plan == expected
    assert policyskip.load(tmp_path / "run", precision="bfloat16").plan_for(4) is None


def test_a_budget_moves_while_an_agent_learns_and_goes_on_where_it_was(tmp_path):
    """Two and two more updates are four; weights are chosen by where the figures stand."""
    words = ["train", "+experiment=debug", "reward=budget", "reward.target=0.3", "train.validate_every=2", "device=cpu"]
    words += ["train.log_every=1", QUICK_FRONT]
    for name, steps in (("whole", 4), ("parts", 2)):
        result = typed(*words, f"train.steps={steps}", f"run.dir={name}", "agent.schedule=constant", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    result = typed("train", "run.resume=parts", "train.steps=4", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    read = {}
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        read[name] = [line["train/multiplier"] for line in lines if "train/multiplier" in line]
        shares = [line["train/macs_fraction"] for line in lines if "train/macs_fraction" in line]
        moved = 0.2
        for share, multiplier in zip(shares, read[name], strict=True):
            moved += 0.05 * (share - 0.3)
            assert multiplier == pytest.approx(moved)
        for line in lines:
            if "val/reward" in line:
                figures = {"accuracy": line["val/accuracy"], "macs_fraction": line["val/macs_fraction"]}
                assert line["val/reward"] == pytest.approx(Budget(0.3).selection_score(figures))
    assert len(read["whole"]) == 4 and len(read["parts"]) == 4


def test_a_batch_s_times_by_hand(monkeypatch, images):
    """Three batches of two of seven images, four times each: 1 to 12 ms."""
    seen = []
    predictor = Predictor(ConstantPolicy(6), small_backbone(), list("abcde"), (3, 12, 12), 0.0)

    def measured(calls, repeats, device):
        seen.extend(calls)
        for call in calls.values():
            call()
        return {name: [(4 * int(name) + i) / 1000 for i in range(1, 5)] for name in calls}

    monkeypatch.setattr("policyskip.deployment.profiling.side_by_side", measured)
    times = speed._batch_times(predictor, images, 2, repeats=4)
    assert seen == ["0", "1", "2"] and times["count"] == 12
    assert times["median"] == pytest.approx(6.5) and times["percentile_99"] == pytest.approx(11.89)
    monkeypatch.setattr(speed, "MEASURED", 8)
    assert speed._batch_times(predictor, images, 2, repeats=4)["count"] == 8


def test_each_table_of_a_profile_has_one_unit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = {"macs_ratio": 0.5, "expected_ratio": 0.6, "time_ratio": 0.7}
    run["batch_ms"] = {"median": 1.25, "percentile_99": 3.5, "count": 12}
    times = {"whole_ms": 4.0, "always_ms": 1.0, "kept_ms": [2.0, 1.0], "break_even": [0.25, 0.75]}
    content = {"network": "net[/b]", "device": "cpu", "threads": 1, "batches": {"8": times, "16": times}}
    speed.show(content)
    plain = capsys.readouterr().out
    assert "net[/b] on cpu, 1 threads: milliseconds an image" in " ".join(plain.split()) and "percentile" not in plain
    content["batches"] = {"8": {**times, "run": run}}
    speed.show(content)
    printed = capsys.readouterr().out
    titles = ("milliseconds an image", "shares of a batch", "milliseconds a batch", "shares of the whole network")
    places = [printed.index(title) for title in titles]
    assert places == sorted(places)
    images, gathering, batches, saved = (
        printed[begin:end] for begin, end in zip(places, [*places[1:], None], strict=True)
    )
    assert "4.000" in images and "3.000" in images and "0.25 to 0.75" in gathering
    assert "99th percentile" in batches and "1.250" in batches and "3.500" in batches
    assert "0.600" in saved and "percentile" not in images + gathering + saved
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_a_picture_is_no_place_for_a_table(tmp_path):
    result = typed("profile", *SMALL, "output=t.png", cwd=tmp_path)
    assert result.returncode == 2 and "its picture goes beside it" in result.stderr and not list(tmp_path.iterdir())
