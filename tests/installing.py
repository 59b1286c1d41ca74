"""A folder that looks as if pip had installed a package of the user's into it."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, package: str, entry_points: dict[str, dict[str, str]], **modules: str) -> Path:
    """Write modules, and the metadata of the package that declares them, as pip would.

    Args:
        folder: where, to be put on ``sys.path``.
        package: the package's name.
        entry_points: for each entry-point group, names and values such as ``my_module:Mine``.
        modules: the source of each module.

    Returns: the folder.
    """
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        line
        for group, points in entry_points.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder
