"""What a probe pass costs: against a bare forward pass of the same images, and in memory as images grow.

    python benchmarks/probes.py cost      SmolLM2-135M's architecture, 196 visual tokens, random weights, interleaved
    python benchmarks/probes.py solves    the linear probes and layer statistics of 10,000 images, per image
    python benchmarks/probes.py memory    peak memory of a small model over 1,000 and 50,000 images

CPU time is counted, not wall-clock time: it stays meaningful on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from prebench.data.scenes import generate_scene, render
from prebench.model.builder import build_processor, build_tokenizer
from prebench.probe.extract import cut, extract_features, prompt_inputs
from prebench.probe.features import ProbeFeatures
from prebench.probe.summary import probe_rows
from prebench.schema import VisionTowerConfig

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
}
SMALL = SMOLLM2_135M | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Attribute:
    """What is decoded."""

    name: str
    kind: str


def build(text: dict[str, int], side: int, patch: int, width: int, layers: int) -> tuple[Any, Any]:
    """Return a LLaVA with random weights and its processor; (side / patch)^2 visual tokens."""
    torch.manual_seed(0)
    tower = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    shape = VisionTowerConfig(pretrained=None, image_size=side, patch_size=patch, **tower)
    tokenizer = build_tokenizer()
    vision = SiglipVisionConfig(
        image_size=side, patch_size=patch, num_attention_heads=max(1, width // 64), vision_use_head=False, **tower
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    return model, build_processor(shape, tokenizer)


class Scenes(Sequence[Any]):
    """Pictures or masks of generated scenes, drawn when asked for."""

    def __init__(self, count: int, which: int, side: int) -> None:
        self._count, self._which, self._side = count, which, side

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        found = render(generate_scene(0, "probe", index))[self._which]
        return found.resize((self._side, self._side)) if isinstance(found, Image.Image) else found


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU time of a call, over all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cost(images: int, batch: int, repeats: int, masked: bool) -> dict[str, Any]:
    """Measure a probe pass and a bare forward pass of the same images in turn."""
    model, processor = build(SMOLLM2_135M, 224, 16, 384, 6)
    pictures = list(Scenes(images, 0, 224))
    masks = list(Scenes(images, 1, 224)) if masked else [None] * images

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, images, batch):
            inputs, end = prompt_inputs(model, processor, pictures[start : start + batch])
            model.base_model(**cut(inputs, end), use_cache=False)

    def probe() -> None:
        extract_features(model, processor, pictures, masks, batch_size=batch)

    bare(), probe()
    pairs = [(cpu_seconds(bare), cpu_seconds(probe)) for _ in range(repeats)]
    ratios = [second / first for first, second in pairs]
    return {
        "images": images,
        "masks": masked,
        "bare_s_per_image": min(first for first, _ in pairs) / images,
        "probe_s_per_image": min(second for _, second in pairs) / images,
        "ratio_median": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def solves(images: int, classes: int, dims: int, layers: int) -> dict[str, Any]:
    """Measure every row of a probe that is not the forward pass, on random features with a weak signal."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    pooled = rng.normal(size=(images, layers + 1, dims)).astype(np.float32)
    pooled[:, :, :classes] += 2 * np.eye(classes, dtype=np.float32)[labels][:, None]
    structure = rng.uniform(size=(images, layers + 1, 5)).astype(np.float32)
    pixels = rng.uniform(size=(images, 768)).astype(np.float32)
    features = ProbeFeatures(pooled, pooled[:, 0, :384], structure, structure[:, 0], pixels)
    subsets = np.repeat(["train", "val", "test"], [images // 2, images // 6, images - images // 2 - images // 6])
    seconds = cpu_seconds(lambda: probe_rows(features, {"a": labels}, subsets, [Attribute("a", "asked")]))
    return {"images": images, "classes": classes, "layers": layers, "dims": dims, "seconds_per_image": seconds / images}


def memory(images: int) -> dict[str, Any]:
    """Return the peak resident memory, less file pages, of extracting features of this many images."""
    model, processor = build(SMALL, 64, 16, 64, 1)
    extract_features(model, processor, Scenes(images, 0, 64), Scenes(images, 1, 64), batch_size=64)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {"images": images, "peak_mib": peak["VmHWM"] / 1024, "anonymous_at_end_mib": peak["RssAnon"] / 1024}


def main() -> None:
    """Run one of the measurements and print it as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "solves", "memory", "memory-of"])
    parser.add_argument("--images", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-masks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    if options.what == "cost":
        found = [cost(options.images or 16, options.batch, options.repeats, not options.no_masks)]
    elif options.what == "solves":
        found = [solves(options.images or 10_000, 10, 576, 30)]
    elif options.what == "memory-of":
        found = [memory(options.images)]
    else:
        for count in (1000, options.images or 50_000):  # a process each: the peak is that of the process
            command = [sys.executable, __file__, "memory-of", "--images", str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  (this very file)
            found.append(json.loads(done.stdout))
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
