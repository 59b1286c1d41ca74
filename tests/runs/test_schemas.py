"""The schemas of a run's JSON files: stored runs pass, and whatever is damaged is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from policyskip.errors import UserError
from policyskip.runs import schemas
from policyskip.runs.folder import Run

STORED = Path(__file__).parent.parent / "stored/runs"
SUMMARY = json.loads((STORED / "branchynet/summary.json").read_bytes())
FRONT = json.loads((STORED / "blockdrop/front.json").read_bytes())
DECISIONS = {"full_macs": 1.0, "kind": "exits", "images": "", "network": "", "classes": ["0"]}
PROFILE = {"hash": "a", "device": "b", "threads": 2, "batches": {"4": {"break_even": [0.1, 0.2], "always_ms": 1.0}}}


@pytest.mark.parametrize("path", sorted(STORED.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_stored_runs_pass(path):
    content = json.loads(path.read_bytes())
    assert schemas.check(path.name, content) is content


DAMAGE = [
    *[("summary.json", SUMMARY, key, value) for key in ("seed", "steps") for value in (math.nan, True, "0", 2.5, [])],
    *[("summary.json", SUMMARY, key, value) for key in ("agent", "data", "version", "test_images", "latency_device")
      for value in (5, ["x"], {}, "x" * 10**5)],
    *[("summary.json", SUMMARY, key, value) for key in ("test/accuracy", "val/accuracy", "test/static_accuracy")
      for value in (math.nan, math.inf, -0.5, 1.5, 10**400, "0.5", True, [0.5])],
    *[("summary.json", SUMMARY, key, value) for key in ("test/macs_mean", "test/full_macs", "seconds", "latency_ms")
      for value in (math.nan, -1.0, "many", 1e301)],
    *[("summary.json", SUMMARY, key, value) for key in ("test/exit_share", "test/exit_alone_macs", "test/exit_macs")
      for value in (0.5, "x", [], ["a", "b", "c"], [None] * 3, [math.nan] * 3, [0.5, 0.5], {"0": 1})],
    ("summary.json", SUMMARY, "test/exit_share", [0.5, 0.4, 0.4]),
    ("summary.json", SUMMARY, "test/full_macs", 0),
    *[("summary.json", SUMMARY, "warnings", value) for value in (5, "x", [5], ["x" * 10**4], ["x"] * 2000)],
    *[("front.json", FRONT, "sets", value) for value in (5, [], [5], ["012"], ["1" * 20_000])],
    *[("front.json", FRONT, key, value) for key in ("macs", "accuracy") for value in (None, ["a"], [math.nan], [-1.0])],
    *[("front.json", FRONT, key, value) for key in ("images", "finished", "backbone") for value in (None, [], 2.5)],
    *[("decisions", DECISIONS, "full_macs", value) for value in (0, -1, math.nan, math.inf, "1", None)],
    *[("decisions", DECISIONS, "classes", value) for value in ("abc", [5], ["x" * 301], None)],
    *[("decisions", DECISIONS, key, value) for key in ("kind", "images", "network") for value in (None, 5, ["blocks"])],
    *[("profile.json", PROFILE, key, value) for key in ("hash", "device", "threads", "batches") for value in (2.5, [])],
    *[("profile.json", PROFILE, "batches", {"4": {"break_even": value}}) for value in ("x", ["x"], [math.nan])],
    *[("profile.json", PROFILE, "batches", {size: {}}) for size in ("x", "0", "-1", "1" * 50)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "key", "value"), DAMAGE)
def test_what_is_damaged_is_named_in_one_short_line(name, good, key, value):
    schemas.check(name, good)
    with pytest.raises(ValueError, match=f"^(?s:.)*{key.partition('/')[2] or key}") as refused:
        schemas.check(name, good | {key: value})
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["5", "[]", "null", '"x"', "[" * 10**5, '{"seed": 1' + "0" * 5000 + "}", "\ud800"])
def test_a_file_that_holds_no_object_is_refused(content, tmp_path):
    (tmp_path / "summary.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"summary\.json is damaged or not ours"):
        Run(tmp_path).load_json("summary.json")


def test_letters_that_are_no_unicode_may_be_in_a_name():
    assert schemas.check("summary.json", SUMMARY | {"data": "\udcff"})["data"] == "\udcff"


def test_records_hold_numbers_and_have_a_step(tmp_path):
    lines = [{"step": 1, "a": 0.5, "b": math.nan, "c": "x", "d": [1, None], "e": [math.inf], "f": True, "g": None}]
    lines += [{"step": True}, {"step": -1}, {"step": 10**20}, {"step": "1"}, {"a": 1}, [1], 5]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 2', "\x00"]))
    assert Run(tmp_path).metrics() == [{"step": 1, "a": 0.5, "d": [1, None], "f": True, "g": None}]
