"""Each way of execution gives the same answers, is chosen where it can be, and says why."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policyskip.backbones import dense, sparse
from policyskip.errors import UserError
from policyskip.execution import choosing, ways
from policyskip.execution.kernel_network import KernelNetwork, refuse_gradients
from policyskip.execution.ways import PRECISIONS, WAYS, Execution, How
from tests.conftest import small_backbone, small_images
from tests.execution.plain_kernels import PlainKernels

SHAPE = (3, 12, 12)


def keeps(images: int, blocks: int, samples: int | None = None) -> torch.Tensor:
    shape = (images, blocks) if samples is None else (samples, images, blocks)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
@torch.no_grad()
def test_every_way_gives_the_logits_of_dense(shortcut, plain_kernels):
    backbone, images = small_backbone(shortcut=shortcut), small_images(5).images
    keep_BK, keep_SBK = keeps(5, 6), keeps(5, 6, 3)
    expected, whole = dense(backbone, images, keep_BK), backbone(images)
    for way in ("kernel", "gather", "dense"):
        execution = Execution(backbone, SHAPE, way)
        assert execution.way == way and isinstance(execution.kernels, PlainKernels) == (way == "kernel")
        torch.testing.assert_close(execution.logits(images, keep_BK), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(execution.whole(images), whole, rtol=1e-4, atol=1e-5)
        many = execution.logits_many(images, keep_SBK)
        assert many.shape == (3, 5, 5)
        for logits_BC, keep in zip(many, keep_SBK, strict=True):
            torch.testing.assert_close(logits_BC, dense(backbone, images, keep), rtol=1e-4, atol=1e-5)
        x = execution.advance(execution.features(images), keep_BK[:, :2], 0)
        x = execution.advance(x, keep_BK[:, 2:], 2)
        torch.testing.assert_close(execution.head(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["auto", "kernel", "dense"])
@torch.no_grad()
def test_no_images_give_no_logits(way, plain_kernels):
    execution, images = Execution(small_backbone(), SHAPE, way), small_images(0).images
    assert execution.logits(images, keeps(0, 6)).shape == (0, 5)
    assert execution.logits_many(images, keeps(0, 6, 2)).shape == (2, 0, 5)
    assert execution.whole(images).shape == (0, 5)


@torch.no_grad()
def test_on_a_cpu_auto_gathers_to_the_bit():
    backbone, images, keep_BK = small_backbone(), small_images(5).images, keeps(5, 6)
    execution = Execution(backbone, SHAPE)
    assert (execution.way, execution.why, execution.kernels) == ("gather", "this is a CPU", None)
    assert torch.equal(execution.logits(images, keep_BK), sparse(execution.network, images, keep_BK))
    as_it_is = Execution(backbone, SHAPE, as_it_is=True)
    assert as_it_is.network is backbone
    assert torch.equal(as_it_is.whole(images), backbone(images))
    assert torch.equal(as_it_is.logits(images, keep_BK), sparse(backbone, images, keep_BK))


@torch.no_grad()
def test_a_network_that_learns_gets_kernels_of_a_copy(plain_kernels):
    backbone, images = small_backbone(), small_images(3).images
    execution = Execution(backbone, SHAPE, as_it_is=True)
    assert execution.way == "kernel" and execution.network is not backbone
    torch.testing.assert_close(execution.whole(images), backbone(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "precision"), [("fast", "float32"), ("auto", "int8"), (None, "float32")])
def test_other_names_are_refused_in_a_line(way, precision):
    with pytest.raises(UserError, match=r"^(execution|precision) must be one of .*, got "):
        Execution(small_backbone(), SHAPE, way, precision)


def test_the_typed_names_are_those_of_the_settings():
    from typing import get_args

    from policyskip import config

    assert get_args(config.Way) == WAYS and get_args(config.Precision) == tuple(PRECISIONS)
    assert How() == ("auto", "float32")


@pytest.mark.parametrize(
    ("platform", "device", "capability", "why"),
    [
        ("win32", "cuda", (9, 0), "kernels need Linux"),
        ("linux", "mps", (9, 0), "the device is mps"),
        ("linux", "cuda", (7, 5), "the GPU's compute capability is 7.5, and kernels need 8.0"),
        ("linux", "cuda", (8, 0), "Triton cannot be imported (no triton)"),
    ],
)
def test_why_there_can_be_no_kernels(monkeypatch, platform, device, capability, why):
    def no_triton(name: str) -> None:
        raise ImportError("no triton")

    monkeypatch.setattr(choosing, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choosing, "import_module", no_triton)
    assert choosing.no_kernels_on(torch.device(device), may_interpret=False) == why


def test_the_interpreter_is_used_if_kernels_are_asked_for(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choosing.no_kernels_on(torch.device("cpu"), may_interpret=True) == ""
    assert choosing.no_kernels_on(torch.device("cpu"), may_interpret=False) == "this is a CPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for yes in ("1", "true"):  # on a GPU, too
        monkeypatch.setenv("TRITON_INTERPRET", yes)
        assert choosing.no_kernels_on(torch.device("cuda"), may_interpret=True) == ""
        assert choosing.no_kernels_on(torch.device("cuda"), False).startswith("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choosing.no_kernels_on(torch.device("cuda"), may_interpret=False) == ""
    assert choosing.no_kernels_on(torch.device("cpu"), may_interpret=True) == "this is a CPU"


def test_kernels_that_cannot_be_are_refused_where_they_are_asked_for(plain_kernels, monkeypatch):
    with pytest.raises(UserError, match="execution=kernel cannot be: nothing fits it; it has ten blocks; say"):
        Execution(small_backbone(depth=62), SHAPE, "kernel")
    assert Execution(small_backbone(depth=62), SHAPE).way == "gather"
    monkeypatch.setattr(ways, "no_kernels_on", lambda device, may_interpret: "this is a CPU")
    with pytest.raises(UserError, match="execution=kernel cannot be: this is a CPU; say execution=auto"):
        Execution(small_backbone(), SHAPE, "kernel")


def test_kernels_that_do_not_compile_are_no_error(plain_kernels, monkeypatch):
    monkeypatch.setattr(plain_kernels, "__init__", broken)
    execution = Execution(small_backbone(), SHAPE)
    assert execution.way == "gather"
    assert "the kernels do not run here (out of resource: shared memory)" in execution.why


def test_what_is_said_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(choosing, "_said", set())
    for line in ("a", "b", "a"):
        choosing.say_once(line)
    assert capsys.readouterr().err == "a\nb\n"


def test_on_a_gpu_without_kernels_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(choosing, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda:0")
    there: Any = SimpleNamespace(name="resnet14", mean=SimpleNamespace(device=gpu))
    assert Execution(there, SHAPE, "gather", as_it_is=True).way == "gather" and capsys.readouterr().err == ""
    for _ in range(2):
        assert Execution(there, SHAPE, as_it_is=True).way == "gather"
    why = choosing.no_kernels_on(gpu, may_interpret=False)
    assert why and capsys.readouterr().err == f"no kernels for resnet14, so images are gathered: {why}\n"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@torch.no_grad()
def test_a_low_precision_is_that_of_a_copy(precision, plain_kernels):
    backbone, images, keep_BK = small_backbone(), small_images(4).images, keeps(4, 6)
    expected = dense(backbone, images, keep_BK)
    for way in ("kernel", "gather", "dense"):
        execution = Execution(backbone, SHAPE, way, precision, as_it_is=True)
        logits_BC = execution.logits(images, keep_BK)
        assert logits_BC.dtype == getattr(torch, precision) and backbone.mean.dtype == torch.float32
        torch.testing.assert_close(logits_BC.float(), expected, rtol=0.1, atol=0.2)


def test_exact_float32_switches_tf32_off_and_on_again():
    before = torch.backends.cudnn.allow_tf32
    with choosing.full_float32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(("precision", "exact"), [("float32_exact", True), ("float32", False), ("bfloat16", False)])
def test_exact_float32_is_that_of_kernels_and_of_torch(precision, exact, plain_kernels, monkeypatch):
    execution = Execution(small_backbone(), SHAPE, "kernel", precision)
    assert execution.kernels is not None and execution.kernels.exact == exact
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(execution, "_on_gpu", True)  # on a CPU there is nothing to do
    with execution.exactly():
        assert torch.backends.cudnn.allow_tf32 != exact


@pytest.mark.usefixtures("plain_kernels")
def test_a_network_that_moves_gets_other_kernels():
    """Here it moves to the made-up device of torch that holds no numbers."""
    execution = Execution(small_backbone(), SHAPE, "gather")
    assert execution.to("cpu").device == torch.device("cpu")
    assert execution.to("meta").device == torch.device("meta") and execution.network.mean.is_meta


@pytest.mark.usefixtures("plain_kernels")
def test_gradients_are_refused():
    execution, images = Execution(small_backbone(), SHAPE, "kernel"), small_images(2).images
    execution.logits(images, keeps(2, 6))  # gradients are enabled, and nothing needs one
    execution.network.requires_grad_(True)
    with pytest.raises(ValueError, match="kernels give no gradients"):
        execution.logits(images, keeps(2, 6))
    with torch.no_grad():
        execution.logits(images, keeps(2, 6))
    with pytest.raises(ValueError, match="kernels give no gradients"):
        refuse_gradients(torch.nn.Identity(), torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize("place", ["head.linear.weight", "blocks.0.residual.bn1.weight"])
@torch.no_grad()
def test_numbers_that_are_too_large_for_float16_are_refused(place):
    """Either a weight is, or what is computed with it."""
    backbone = small_backbone()
    backbone.get_parameter(place).mul_(1e5 if "blocks" in place else 1e7)
    for way in ("gather", "dense"):
        Execution(backbone, SHAPE, way, "bfloat16")
        with pytest.raises(UserError, match="precision=float16 cannot hold the numbers of resnet14: say bfloat16"):
            Execution(backbone, SHAPE, way, "float16")


@torch.no_grad()
def test_a_wrong_keep_is_refused(plain_kernels):
    execution, images = Execution(small_backbone(), SHAPE, "kernel"), small_images(2).images
    with pytest.raises(ValueError, match="keep must be bool of shape"):
        execution.logits(images, keeps(2, 5))
    with pytest.raises(ValueError, match="keep must be bool of shape"):
        execution.logits(images, keeps(2, 6).float())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda execution: pickle.loads(pickle.dumps(execution))])
@torch.no_grad()
def test_a_copy_makes_its_own_kernels(plain_kernels, again):
    execution, images, keep_BK = Execution(small_backbone(), SHAPE, "kernel"), small_images(2).images, keeps(2, 6)
    execution.by_kernels("a call whose graph cannot be pickled", lambda images: (images,), images)
    copied = again(execution)
    assert copied.kernels is not None and copied.kernels is not execution.kernels
    assert copied.kernels.folded is copied.network
    assert torch.equal(copied.logits(images, keep_BK), execution.logits(images, keep_BK))


def broken(self: KernelNetwork, *arguments: object) -> None:
    raise RuntimeError("out of resource:\nshared memory")


def spoiling(self: KernelNetwork, x: torch.Tensor, keep_BM: torch.Tensor, first: int) -> None:
    x.fill_(torch.nan)
    broken(self)


@torch.no_grad()
def test_a_kernel_that_fails_later_is_given_up(plain_kernels, monkeypatch, capsys):
    """For other numbers of images other kernels are compiled, which may need more than a GPU has."""
    monkeypatch.setattr(choosing, "_said", set())
    backbone, images, keep_BK = small_backbone(), small_images(4).images, keeps(4, 6)
    execution, insists = Execution(backbone, SHAPE), Execution(backbone, SHAPE, "kernel")
    steps, ran = Execution(backbone, SHAPE), Execution(backbone, SHAPE)
    ran.advance(ran.features(images), keep_BK, 0)
    assert execution.way == "kernel"
    monkeypatch.setattr(plain_kernels, "advance", spoiling)
    why = "the kernels do not run here (out of resource: shared memory)"
    for _ in range(2):
        assert torch.equal(execution.logits(images, keep_BK), sparse(execution.network, images, keep_BK))
        assert (execution.way, execution.why, execution._graphs) == ("gather", why, {})
    assert capsys.readouterr().err == f"no kernels for resnet14, so images are gathered: {why}\n"
    with pytest.raises(UserError, match="execution=kernel cannot be: the kernels do not run here"):
        insists.logits(images, keep_BK)
    with pytest.raises(UserError, match="between two blocks; start again with execution=gather"):
        ran.advance(ran.features(images), keep_BK, 0)
    expected = sparse(execution.network, images, keep_BK)
    assert torch.equal(steps.head(steps.advance(steps.features(images), keep_BK, 0)), expected)
    assert steps.way == ran.way == "gather"


@pytest.mark.parametrize("name", ["features", "head"])
@torch.no_grad()
def test_kernels_before_and_behind_the_blocks_may_fail_too(name, plain_kernels, monkeypatch, capsys):
    backbone, images, keep_BK = small_backbone(), small_images(4).images, keeps(4, 6)
    execution, insists = Execution(backbone, SHAPE), Execution(backbone, SHAPE, "kernel")
    monkeypatch.setattr(plain_kernels, name, broken)
    logits = execution.head(execution.advance(execution.features(images), keep_BK, 0))
    torch.testing.assert_close(logits, dense(backbone, images, keep_BK), rtol=1e-4, atol=1e-5)
    assert execution.way == "gather"
    with pytest.raises(UserError, match="execution=kernel cannot be"):
        insists.head(insists.features(images))


@torch.no_grad()
def test_a_move_to_where_there_are_no_kernels_changes_nothing(plain_kernels, monkeypatch):
    execution, images, keep_BK = Execution(small_backbone(), SHAPE, "kernel"), small_images(2).images, keeps(2, 6)
    before, why_not = execution.logits(images, keep_BK), iter(["there are none", ""])
    monkeypatch.setattr(ways, "no_kernels_on", lambda device, may_interpret: next(why_not))
    with pytest.raises(UserError, match="execution=kernel cannot be: there are none"):
        execution.to("cpu:0")  # the same place by another name
    assert execution.way == "kernel" and torch.equal(execution.logits(images, keep_BK), before)


@pytest.mark.parametrize(("row", "factor"), [(0, 1), (4, 1), (4, torch.nan)])
@torch.no_grad()
def test_kernels_with_other_answers_are_given_up(row, factor, plain_kernels, monkeypatch, capsys):
    def wrong(self, images, keep_SBK):
        logits_SBC = torch.stack([dense(self.folded, images, keep_BK) for keep_BK in keep_SBK])
        logits_SBC[-1, row] = factor * logits_SBC[-1, row].roll(1)
        return logits_SBC

    backbone, images, keep_SBK = small_backbone(), small_images(5).images, keeps(5, 6, 2)
    execution, insists = Execution(backbone, SHAPE), Execution(backbone, SHAPE, "kernel")
    assert execution.way == "kernel"
    monkeypatch.setattr(PlainKernels, "logits", wrong)
    monkeypatch.setattr(choosing, "_said", set())
    with pytest.raises(UserError, match=r"execution=kernel cannot be: .*of 10 answers 1 are not those of gathering"):
        insists.logits_many(images, keep_SBK)
    expected = torch.stack([dense(backbone, images, keep_BK) for keep_BK in keep_SBK])
    torch.testing.assert_close(execution.logits_many(images, keep_SBK), expected, rtol=1e-4, atol=1e-5)
    assert execution.way == "gather" and capsys.readouterr().err.count("\n") == 1


@torch.no_grad()
def test_answers_are_compared_again_when_batches_grow(plain_kernels, monkeypatch):
    compared: list[int] = []
    gather = ways.sparse_many
    monkeypatch.setattr(ways, "sparse_many", lambda *args: compared.append(len(args[1])) or gather(*args))
    execution = Execution(small_backbone(), SHAPE)
    for images in (2, 3, 2, 4, 7, 5):
        execution.logits(small_images(images).images, keeps(images, 6))
    assert compared == [2, 4] and execution.way == "kernel"
