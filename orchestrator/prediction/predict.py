"""From the trials of a calibration to its prediction: every size that was asked for, with intervals and assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.experiment.prediction_file import FILE_NAME, AskedSize, PredictedSize, Prediction, read_prediction
from orchestrator.experiment.spec import SpecError
from orchestrator.figures.records import ExperimentResult
from orchestrator.files import write_atomically
from orchestrator.prediction import model, simulation
from orchestrator.prediction.measured import MeasuredSize, checkpoint_stall, measured_size
from orchestrator.prediction.model import Step
from orchestrator.prediction.simulation import Links
from orchestrator.runlog.folder import TrialEvents, read_run_folder

LIKELY_BOUNDED = 0.5
"""Share of steps whose slowest worker is the slowest deviation seen, above which the bound is said."""

FEW_RANKS = 4
"""Below it, deviations of ranks are too mixed with one another to predict many from (docs/scaling.md)."""

NOTABLE_GROWTH = 0.05
"""By how much a worker's own part of a step may grow from the smallest to the largest size without a word."""

ASSUMPTIONS = (
    "hosts, loaders, storage, clocks and links at every size are like those of the calibration; what first appears "
    "between more hosts is not in it",
    "the slowest of N workers is the expected maximum of N independent draws from the measured deviations of ranks",
    "intervals (95 %) are of the steps that were measured, in blocks; neither what differs from run to run nor the "
    "error of the model itself (docs/scaling.md) is in them",
    "times and costs are of steps alone, without evaluations, checkpoints and start-up",
)
"""Behind every prediction."""


@dataclass(frozen=True, slots=True)
class _Calibration:
    """What all sizes are predicted from."""

    sizes: Sequence[MeasuredSize]
    samples: Sequence[tuple[Sequence[MeasuredSize], str]]
    """Of the bootstrap, each with a shape of communication."""
    epoch_images: int | None
    """Images of an epoch."""
    price: float | None
    """Of an accelerator for an hour."""
    checkpoint: float | None
    """Stall of one, seconds."""
    restart: float | None
    """From the start of a trial to its first batch, seconds."""
    backward: float
    """Mean backward pass, seconds."""
    links: Links | None
    """Links that are stated; None to extrapolate what was measured."""


def predict(asked: Prediction, trials: Sequence[TrialEvents], links: Links | None = None) -> Prediction:
    """The prediction that a calibration's trials give.

    Args:
        asked: What was asked for.
        trials: The calibration's, with their events.
        links: Links between workers, instead of the communication that was measured.

    Raises:
        SpecError: The trials give none: fewer than two sizes finished, or too few steps were measured.
    """
    found = [each for each in trials if (each.trial.recipe, each.trial.scaling) == (asked.recipe, asked.scaling)]
    ended = {each.trial.world_size: each for each in found if each.trial.status == "FINISHED"}
    if len(ended) < 2:
        sizes = ", ".join(map(str, sorted(ended))) or "none"
        raise SpecError(f"a prediction needs trials of two sizes that finished; of {asked.recipe} it has: {sizes}")
    used = [ended[size] for size in sorted(ended)]
    measured = [measured_size(each) for each in used]
    last = used[-1]
    if known := [each.world_size for each in asked.asked if each.world_size <= last.trial.world_size]:
        raise SpecError(f"{known[0]} workers: up to {last.trial.world_size} were measured, and only more are predicted")
    backward = last.trial.part_seconds.get("backward")
    if links and (backward is None or backward.p50 is None):
        raise SpecError(
            "stated links need the backward pass, behind which communication hides, and it was not measured"
        )
    from_ = _Calibration(
        sizes=measured,
        samples=model.resampled(measured),
        epoch_images=last.trial.num_train_images,
        price=last.plan.price_per_accelerator_hour if last.plan else None,
        checkpoint=checkpoint_stall(used),
        restart=last.trial.startup_seconds,
        backward=(backward.p50 or 0.0) if backward else 0.0,
        links=links,
    )
    several = [each for each in measured if each.world_size > 1 or asked.scaling == "strong"]
    modelled = [model.central(measured, each.world_size, each.batch).seconds for each in several]
    errors = [abs(seconds / each.step_seconds - 1) for seconds, each in zip(modelled, several, strict=True)]
    return asked.model_copy(
        update={
            "calibrated_sizes": [each.world_size for each in measured],
            "device": last.trial.device,
            "device_name": last.trial.device_name,
            "links": str(links) if links else None,
            "worst_relative_error": max(errors),
            "sizes": [_predicted(size, from_, asked.mtbf_worker_hours) for size in asked.asked],
            "assumptions": list(_assumptions(asked, from_)),
        }
    )


def _predicted(size: AskedSize, from_: _Calibration, mtbf_worker_hours: float | None) -> PredictedSize:
    """One size with its intervals, and what a whole training there would be."""
    batch = size.global_batch_size
    step = _linked(model.central(from_.sizes, size.world_size, batch), size, from_)
    drawn = [
        (_linked(model.step_at(sizes, size.world_size, batch, shape), size, from_).seconds, sizes[0])
        for sizes, shape in from_.samples
    ]
    fast, slow = model.interval([seconds for seconds, _ in drawn])
    efficiencies = [_efficiency(seconds, size, base) for seconds, base in drawn]
    schedule, steps, target, simulated = size.iterations * step.seconds, None, None, None
    if size.epochs_to_target is not None and from_.epoch_images:
        steps = size.epochs_to_target * from_.epoch_images / batch
        target = steps * step.seconds
    if from_.checkpoint is not None and from_.restart is not None:
        work, costs = target or schedule, (from_.checkpoint, from_.restart)
        simulated = simulation.simulated_run(work, size.world_size, *costs, mtbf_worker_hours)
    per_second = None if from_.price is None else from_.price * size.world_size / 3600
    return PredictedSize(
        **size.model_dump(),
        step_seconds=step.seconds,
        part_seconds=asdict(step),
        images_per_second=batch / step.seconds,
        images_per_second_low=batch / slow,
        images_per_second_high=batch / fast,
        efficiency=_efficiency(step.seconds, size, from_.sizes[0]),
        efficiency_low=model.interval(efficiencies)[0],
        efficiency_high=model.interval(efficiencies)[1],
        schedule_seconds=schedule,
        time_to_target_seconds=target,
        time_to_target_seconds_low=None if steps is None else steps * fast,
        time_to_target_seconds_high=None if steps is None else steps * slow,
        cost=None if per_second is None else per_second * schedule,
        cost_to_target=None if per_second is None or target is None else per_second * target,
        simulated=simulated,
    )


def _linked(step: Step, size: AskedSize, from_: _Calibration) -> Step:
    """A step whose communication is that of the stated links, where there are any."""
    if from_.links is None:
        return step
    return replace(step, communication=simulation.exposed_seconds(from_.links, size.world_size, from_.backward))


def _efficiency(seconds: float, size: AskedSize, base: MeasuredSize) -> float:
    """Throughput of a worker over that of one at the smallest size that was measured."""
    return (size.global_batch_size / size.world_size / seconds) / (base.images_per_worker / base.step_seconds)


def _assumptions(asked: Prediction, from_: _Calibration) -> Iterator[str]:
    """What the predictions rest on, as far as it applies to this one."""
    yield from ASSUMPTIONS
    largest = from_.sizes[-1]
    several = [each.world_size for each in from_.sizes if each.world_size > 1]
    if from_.links is not None:
        yield from simulation.LINK_ASSUMPTIONS
    elif len(several) == 1:
        yield (
            f"communication was measured at {several[0]} workers alone: the prediction is the middle of log2(N) and "
            "2 (N - 1) / N, and its interval holds both"
        )
    else:
        yield "communication grows as log2(N) and 2 (N - 1) / N, fitted to what computation did not hide"
    growth = float(largest.own.mean() / from_.sizes[0].own.mean()) - 1
    if asked.scaling == "weak" and growth > NOTABLE_GROWTH:
        yield (
            f"a worker's own part of a step took {growth:.0%} longer with {largest.world_size} workers than with "
            f"{from_.sizes[0].world_size}, as where they share a host's processors or memory: what it took with "
            f"{largest.world_size} is taken for all sizes"
        )
    size = max(each.world_size for each in asked.asked)
    if model.weight_of_slowest(largest.own.size, size) > LIKELY_BOUNDED:
        yield (
            f"{largest.own.size} deviations were measured: of {size} workers, the slowest is likely slower than any of "
            "them, and its wait is too low"
        )
    if largest.world_size < FEW_RANKS and size > FEW_RANKS:
        yield (
            f"{largest.world_size} ranks were measured: a deviation from the mean of so few is partly that of the "
            "others, so rare slow steps count for too little and intervals are too narrow; --calibrate takes more ranks"
        )
    if asked.scaling == "strong":
        yield "a worker computes a constant part and one that goes with its images, fitted to the sizes measured"
    if from_.checkpoint is not None:
        yield from simulation.ASSUMPTIONS


def complete(run_dir: Path, result: ExperimentResult) -> Prediction | None:
    """Predicts what a run's folder asks for, and keeps it there.

    Args:
        run_dir: The folder.
        result: Its results, with all trials.

    Returns:
        None where nothing was asked for; without sizes, but with the reason, where nothing can be predicted.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    try:
        asked = read_prediction(path)
    except SpecError:  # it was damaged: the run goes without
        return None
    try:
        prediction = predict(asked, read_run_folder(run_dir, result).trials)
    except ValueError as error:  # of which SpecError is one; events may be damaged
        prediction = asked.model_copy(update={"sizes": [], "assumptions": [f"nothing is predicted: {error}"]})
    keep(prediction, run_dir)
    return prediction


def keep(prediction: Prediction, run_dir: Path) -> None:
    """Writes a prediction, or what is asked for, into a run's folder."""
    write_atomically(run_dir / FILE_NAME, prediction.model_dump_json(indent=2) + "\n")
