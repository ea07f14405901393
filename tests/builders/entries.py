"""Entries of the page of many that nobody measured."""

import random

from orchestrator.report.entries import Entry, Estimate

CHIPS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "NVIDIA L4", None)
TARGET = "box AP 37.7, mask AP 33.9, 117,266 images"


def made_entries(number: int) -> list[Entry]:
    """That many measured entries of any chip, size, precision and recipe; some lack a time, a cost or an interval."""
    drawn = random.Random(0)  # noqa: S311 - nothing secret is drawn
    return [_entry(n, drawn) for n in range(number)]


def _entry(number: int, drawn: random.Random) -> Entry:
    chips, seconds, rate = 2 ** drawn.randrange(10), drawn.lognormvariate(8, 1), drawn.uniform(10, 200)
    recipe, precision = drawn.choice(("fast", "reference")), drawn.choice(("amp", "fp32", "bf16"))
    time = Estimate(seconds, 0.9 * seconds, 1.1 * seconds) if drawn.random() < 0.8 else Estimate()
    return Entry(
        name=f"made {number}: {recipe}-{chips}xgpu", kind="measured", source=f"runs/{number}", chips=chips,
        chip=drawn.choice(CHIPS), precision=precision, recipe=recipe, target=TARGET, time_to_train=time,
        mlperf_time=time, rate_per_chip=Estimate(rate, 0.97 * rate, 1.03 * rate),
        efficiency=Estimate(drawn.uniform(0.4, 1)), note="median of 5", verified="bundle: files, figures, score",
        cost=Estimate(seconds * chips / 1800) if drawn.random() < 0.6 else Estimate(), verdict="verified",
    )  # fmt: skip
