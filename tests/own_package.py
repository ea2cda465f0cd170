"""Install small packages for a test: a module beside a `dist-info` folder, as pip leaves them, on a path of its own."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_regularizer"
GROUP = "prebench.regularizers"


def install_example(folder: Path) -> Path:
    """Install examples/own_regularizer as its pyproject.toml says; return the folder to put on the path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["py-modules"]:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLE / f"{name}.py", folder)
    about = project["project"]
    return declare(folder, about["name"], about["entry-points"][GROUP], about["version"])


def declare(folder: Path, package: str, types: dict[str, str], version: str = "0.1.0") -> Path:
    """Write the metadata of a package that declares types; return the folder to put on the path."""
    metadata = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in types.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    return folder
