"""Do the intervals cover, and how often is a difference seen where there is none? Simulated studies, known truth.

    python benchmarks/calibration.py [--studies 2000] [--processes 2]

Each study has images with several questions each. A model answers question i of image c right if
mu + u_c + w_i + delta * [variant b] + e_model + noise > 0 (all normal), so that questions of one image, the two
variants on one question, and all questions of one model are correlated. The true difference follows by integration:

- several seeds ("the training procedure, on this test set"): u and w fixed, e and noise integrated out;
- one seed ("these two models, over images like these"): e fixed, u, w and noise integrated out.

What is tested is what `prebench compare` runs: `compare_pairs`, Holm's correction, and `statistics.correlation`.
Equivalence is tested at its worst: with the margin just as large as the true difference, stating it is an error.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
from scipy import stats

from prebench.analysis import statistics
from prebench.analysis.compare import compare_pairs
from prebench.analysis.join import PairedSamples
from prebench.schema import TaskConfig

TASK = TaskConfig(task="gqa", label="simulated", data_source="generated", primary_metric="exact_match", num_images=1)
IMAGES = 100
IMAGE_SD, QUESTION_SD, NOISE_SD, MODEL_SD = 0.8, 0.8, 0.5, 0.1
MEAN = 0.6
TASKS = 5
MARGIN = 0.05
"""Of equivalence, in studies without a difference: how often is it found?"""


def study(seed: int, n_seeds: int, effect: float) -> tuple[PairedSamples, float]:
    """Return one simulated study of one task and the true difference of its estimand."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(IMAGES), rng.integers(1, 12, IMAGES))  # images with few and with many questions
    ease = MEAN + rng.normal(0, IMAGE_SD, IMAGES)[image] + rng.normal(0, QUESTION_SD, image.size)
    shift = np.array([0.0, effect])
    model = rng.normal(0, MODEL_SD, (n_seeds, 2))
    latent = ease[None, None] + (shift + model)[..., None] + rng.normal(0, NOISE_SD, (n_seeds, 2, image.size))
    scores = (latent > 0).astype(float)
    frame = pd.DataFrame(
        {
            "seed": np.repeat(np.arange(n_seeds), image.size),
            "doc_id": np.tile(np.arange(image.size), n_seeds),
            "image_id": np.tile(image.astype(str), n_seeds),
            "score_a": scores[:, 0].ravel(),
            "score_b": scores[:, 1].ravel(),
        }
    )
    if n_seeds > 1:
        right = stats.norm.cdf((ease[None] + shift[:, None]) / np.hypot(NOISE_SD, MODEL_SD)).mean(axis=1)
    else:
        right = stats.norm.cdf((MEAN + shift + model[0]) / np.sqrt(IMAGE_SD**2 + QUESTION_SD**2 + NOISE_SD**2))
    return PairedSamples(frame, tuple(range(n_seeds)), 0), float(right[1] - right[0])


def one(arguments: tuple[int, int, float]) -> tuple[bool, bool, bool]:
    """Return, for one simulated study, whether the interval covers the truth, p is below .05, equivalence is stated.

    Where there is a true difference the margin is just as large, else `MARGIN`.
    """
    pairs, truth = study(*arguments)
    found = compare_pairs(TASK, pairs, margin=abs(truth) if arguments[2] else MARGIN)
    covered = found.low is not None and found.high is not None and found.low <= truth <= found.high
    below = [p is not None and p < 0.05 for p in (found.p, found.p_equivalence)]
    return covered, below[0], below[1]


def family(arguments: tuple[int, int]) -> bool:
    """Return whether any of five tasks without a difference is called different after Holm's correction."""
    seed, n_seeds = arguments
    rows = [compare_pairs(TASK, study(seed * TASKS + task, n_seeds, 0.0)[0]) for task in range(TASKS)]
    return any(p is not None and p < 0.05 for p in statistics.holm([row.p for row in rows]))


def correlated(arguments: tuple[int, int, int, float]) -> tuple[bool, bool, float]:
    """Return whether the interval covers a planted correlation, whether p is below .05, and r.

    Each seed has a baseline; x and y are differences from it, so that they share its luck.
    """
    seed, n_seeds, variants, rho = arguments
    rng = np.random.default_rng(seed)
    kept = rng.normal(size=(n_seeds, variants + 1))
    score = rho * kept + np.sqrt(1 - rho**2) * rng.normal(size=kept.shape)
    x, y = ((side[:, 1:] - side[:, :1]).ravel() for side in (kept, score))
    found = statistics.correlation(x, y, np.repeat(np.arange(n_seeds), variants).tolist(), n_resamples=999)
    assert found.interval is not None and found.p is not None and found.pearson is not None
    return found.interval.low <= rho <= found.interval.high, found.p < 0.05, found.pearson


def main() -> None:
    """Simulate and print the tables of docs/statistics.md, section 7."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per row")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    numbers = range(options.studies)
    with ProcessPoolExecutor(options.processes) as pool:
        header = ("seeds", "true effect on the latent scale", "interval covers", "p < .05", "called equivalent")
        print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        for n_seeds in (1, 3, 5, 8):
            for effect in (0.0, 0.15):
                found = np.array(list(pool.map(one, [(n, n_seeds, effect) for n in numbers], chunksize=50)))
                cells = " | ".join(f"{share:.1%}" for share in found.mean(axis=0))
                print(f"| {n_seeds} | {effect} | {cells} |", flush=True)
        print(f"\n| seeds | any of {TASKS} tasks called different, A/A, after Holm |\n| --- | --- |")
        for n_seeds in (3, 5, 8):
            wrong = np.mean(list(pool.map(family, [(n, n_seeds) for n in numbers], chunksize=25)))
            print(f"| {n_seeds} | {wrong:.1%} |", flush=True)
        header = ("seeds", "variants", "planted r", "interval covers", "p < .05", "median r")
        print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        for n_seeds, variants in ((8, 1), (3, 4), (5, 4), (8, 6)):
            for rho in (0.0, 0.6):
                runs = [(n, n_seeds, variants, rho) for n in numbers]
                rows = np.array(list(pool.map(correlated, runs, chunksize=50)))
                cells = f"{rows[:, 0].mean():.1%} | {rows[:, 1].mean():.1%} | {np.median(rows[:, 2]):.2f}"
                print(f"| {n_seeds} | {variants} | {rho} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
