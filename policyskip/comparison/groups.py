"""Runs are sorted into groups here: only what was judged on the same test images can be compared."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from policyskip.comparison.collect import Result


@dataclass(frozen=True)
class Group:
    """Runs that can be compared with each other; ``reason`` says what they have in common and other runs have not."""

    title: str
    reason: str
    results: list[Result]


def groups_of(results: list[Result]) -> list[Group]:
    """Sort runs into groups that were judged on the same test images, over the same frozen network weights.

    The runs on each set of test images are one group, with this exception: where frozen networks of one name have
    different weights, the weights that most runs use stay in the group, and each of the other weights is a group of its
    own, because there it is not the agents alone that differ. Runs that trained their network, and networks of other
    names, stay in the group, and are compared as whole systems.
    """
    by_images: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        by_images[(str(result.summary["data"]), _images(result))].append(result)
    image_sets = Counter(data for data, _ in by_images)
    groups = []
    for (data, images), members in sorted(by_images.items(), key=lambda item: -len(item[1])):
        on_images = f"test images {images}" if image_sets[data] > 1 else "the same test images"
        weights = {
            name: Counter(frozen_hash(r) for r in members if network_name(r) == name and frozen_hash(r))
            for name in sorted({network_name(r) for r in members})
        }
        usual = {name: count.most_common(1)[0][0] for name, count in weights.items() if count}
        main = [r for r in members if not frozen_hash(r) or frozen_hash(r) == usual[network_name(r)]]
        groups.append(Group(data, f"{data}, {on_images}", main))
        for name, count in weights.items():
            for hash_ in [h for h in count if h != usual[name]]:
                other = [r for r in members if network_name(r) == name and frozen_hash(r) == hash_]
                reason = f"{data}, over {name} with other weights ({hash_[:8]}, not {usual[name][:8]})"
                groups.append(Group(f"{data}, other {name}", reason, other))
    return groups


def _images(result: Result) -> str:
    """Return the fingerprint of a run's test images; where it is not known, the configuration that makes them."""
    known = result.summary.get("test_images") or (result.decisions.images if result.decisions else None)
    if known:
        return str(known)
    data = {key: value for key, value in result.setting.items() if key.startswith("data.") and "batch_size" not in key}
    return ", ".join(f"{key.removeprefix('data.')}={value}" for key, value in data.items() if key != "data._target_")


def frozen_hash(result: Result) -> str:
    """Return the content hash of a run's network; "" if the run trained the network, or the hash is not known."""
    known = result.summary.get("frozen_network")
    return str(known or (result.decisions.network if result.decisions else "") or "")


def network_name(result: Result) -> str:
    """Return the name of a run's network."""
    return str(result.summary["backbone"])
