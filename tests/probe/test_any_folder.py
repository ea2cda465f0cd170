"""Every architecture from a plain Hugging Face folder through `prebench probe`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from prebench.cli import main
from tests.model.tiny_models import ARCHITECTURES, LAYERS
from tests.probe.tiny_processors import PROCESSORS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in {"dark": 20, "light": 180}.items():
        (root / name).mkdir()
        for number in range(8):
            pixels = rng.integers(level, level + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "smolvlm"])
def test_a_saved_model_is_probed_at_every_layer(name: str, images: Path, tmp_path: Path) -> None:
    """SmolVLM's processor needs a package of its own for video; its model is Idefics3's."""
    folder = tmp_path / "model"
    ARCHITECTURES[name]().model.save_pretrained(folder)
    PROCESSORS[name]().save_pretrained(folder)
    command = ["probe", str(folder), "--data", str(images), "--output", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = pd.read_parquet(tmp_path / "out" / "probe.parquet")
    own, control = (rows[rows["metric"] == f"{kind}accuracy"] for kind in ("", "random_weights_"))
    assert sorted(own["layer"]) == [-1, *range(LAYERS + 1)] and sorted(control["layer"]) == [*range(1, LAYERS + 1)]
