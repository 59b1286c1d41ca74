"""Benchmarks can be imported; the rows of ``make results-cifar10`` can be composed, and the table that it prints says
what the comparison says."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from policyskip.config import Settings, plain, settings_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmarks is importable; threads stay as they are, which ``side_by_side`` changes."""
    import torch

    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_each_finds_what_it_imports(benchmarks, name):
    assert import_module(name).__doc__


def test_rows_compose_and_those_with_a_budget_have_a_base(benchmarks):
    import cifar10

    rows = {row.name: row for row in cifar10.rows_of(32, "x.safetensors")}
    deep = [row.name for row in cifar10.rows_of(110, "x.safetensors")]
    assert deep == [name for name in rows if not name.startswith("msdnet")]
    assert all(row.base in rows and row.budget for row in rows.values() if not row.arguments)
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        for name in ("blockdrop_4", "cdl", "skipnet_frozen_0.1", "dqn_layer_skip", "msdnet"):
            config = plain(compose("train", [*rows[name].arguments, "data=imagefolder", "data.root=x", "run.dir=x"]))
            assert settings_of(config, Settings).train.steps % 100 == 0
            assert config["backbone"]["checkpoint"] == ("random" if name == "msdnet" else "x.safetensors")


def test_the_table_says_what_the_comparison_says(benchmarks, tmp_path):
    from verdicts import margin_ends, verdict_table

    (tmp_path / "runs.csv").write_text("group,row,run\nimages,cdl,a-0\nimages,cdl,a-1\nimages,oracle,o-0\n")
    columns = "group,row,accuracy,accuracy_t95,macs_share,macs_share_t95,sees_the_label,margin,margin_t95"
    columns += ",margin_images_low,margin_images_high,verdict,verdict_because,rival,oracle_share"
    lines = [
        "images,cdl,0.84,0.01,0.5,0.02,False,0.01,0.004,0.002,0.03,not shown,one seed,33 blocks,0.125",
        "images,oracle,0.99,,0.25,,True,,,,,,,,",
    ]
    (tmp_path / "comparison.csv").write_text("\n".join([columns, *lines]) + "\n")
    table = verdict_table(tmp_path, ["agent"], [(["cdl"], ["a-0", "a-1"]), (["oracle"], ["o-0"]), (["ppo"], ["p-0"])])
    assert table.splitlines()[2:] == [
        "| cdl | 84.00 ± 1.00 | 0.50 ± 0.02 | 33 blocks | +1.00 (+0.20 to +3.00) | not shown: one seed | 12 % |",
        "| oracle | 99.00 (sees the label) | 0.25 | – | – | – | – |",
    ]
    wide = {"margin": "0.01", "margin_t95": "0.05", "margin_images_low": "0.0", "margin_images_high": "0.03"}
    assert margin_ends(wide) == pytest.approx((-0.04, 0.06))
