"""MLPerf's log of a trial (`:::MLLOG` lines), checked by MLPerf's own compliance checker.

MLPerf's clock starts when model and data pipeline are ready (run_start), never pauses, and ends at the first evaluation
that meets the target: what a run does after that is not in the log. AP is 0–1 there. The lines say that they are no
submission.
"""

from __future__ import annotations

import io
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from orchestrator.experiment.detectron_config import evaluate, printed_values
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import TrialResult
from orchestrator.figures.sections import began, loop_runs
from orchestrator.files import write_atomically
from trainers.contract.events import Evaluated, Event, LoopFinished, LoopStarted, TrialEnded, WorkerStarted
from trainers.contract.targets import is_met

LOG_NAME = "mllog.txt"
RULESET = "3.1.0"
"""The last MLPerf Training round but one that had Mask R-CNN, and the last whose rules the checker has for it."""

CLOSED_TARGETS = (37.7, 33.9)
"""Box and mask AP of the closed division (MLPerf Training rules, Mask R-CNN)."""

CLOSED_MODEL = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH": "50",
    "MODEL.RESNETS.NUM_GROUPS": "1",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
}
"""What a printed config has of the closed division's model."""

SUBMITTER = "none (not a submission)"

Division = Literal["closed", "open"]


def write_mllog(plan: Plan, events: Sequence[Event], result: TrialResult, folder: Path) -> Path | None:
    """Writes MLPerf's lines into a trial's folder; None where the trial never reached its training loop."""
    text = mllog_text(plan, events, result)
    if not text:
        return None
    write_atomically(folder / LOG_NAME, text)
    return folder / LOG_NAME


def mllog_text(plan: Plan, events: Sequence[Event], result: TrialResult, division: Division | None = None) -> str:
    """MLPerf's lines of a trial; "" where it never reached its training loop or its log lacks the start of training.

    The division whose rules it is to be checked by is closed where data, model and targets are, else open, unless it is
    given.
    """
    start, attempts = began(events), loop_runs(events)
    if start is None or not attempts:
        return ""
    lines = _Lines()
    run_start = attempts[0].started
    loop = next(e for e in events if isinstance(e, LoopStarted) and e.rank == 0)
    config = printed_values(loop.config_yaml.splitlines())
    _submission(lines, plan, events, start, division or division_of(plan, config))
    lines.point("cache_clear", start, value=False)
    lines.start("init_start", start)
    _hyperparameters(lines, plan, config, result, start)
    lines.stop("init_stop", run_start)
    lines.start("run_start", run_start)
    end = _blocks(lines, events, result, run_start)
    met = result.scored_iteration is not None
    lines.stop("run_stop", end, metadata={"status": "success" if met else "aborted"})
    return lines.text()


def division_of(plan: Plan, config: Mapping[str, str] = MappingProxyType({})) -> Division:
    """`closed` where data, model and targets are the closed division's; the rest of its rules is for the checker.

    Args:
        plan: The trial.
        config: Its printed config by dotted key; what it does not hold is taken for the closed division's.
    """
    targets = zip((plan.target_box_ap, plan.target_mask_ap), CLOSED_TARGETS, strict=True)
    on_coco = "coco_2017_val" in (plan.val.name or "")
    same_model = all(config.get(key, value) == value for key, value in CLOSED_MODEL.items())
    reached = all(is_met(target, closed) for target, closed in targets)
    return "closed" if on_coco and same_model and reached else "open"


def failed_rules(text: str, ruleset: str = RULESET) -> list[str]:
    """What MLPerf's compliance checker finds wrong with a log: a line per finding, with the key and the rule."""
    from mlperf_logging.compliance_checker import mlp_compliance

    checker = mlp_compliance.make_checker("training", ruleset, quiet=True, werror=False)
    with quiet_checkers(), tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        mlp_compliance.main(file.name, f"training_{ruleset}/common.yaml", checker)
    return [_rule(message) for message in (*checker.overwritable.values(), *checker.not_overwritable)]


@contextmanager
def quiet_checkers() -> Iterator[None]:
    """Keeps what MLPerf's checkers log, all of it through the root logger, off the terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _rule(message: str) -> str:
    key = re.search(r"CHECK for '(\w+)' failed", message)
    test = re.search(r"failed test: +(.*)", message)
    if key and test:
        return f"{key[1]}: {test[1].strip()}"
    return " ".join(message.split("\n")[0].split())


class _Lines:
    """Collects log lines through the package's own logger, at the times that things happened."""

    def __init__(self) -> None:
        from mlperf_logging.mllog.mllog import MLLogger

        self._stream = io.StringIO()
        logger = logging.Logger("mllog")  # noqa: LOG001 - outside the tree of loggers, so no other handler sees its lines
        logger.addHandler(logging.StreamHandler(self._stream))
        self._logger = MLLogger(logger=logger, root_dir=str(Path(__file__).resolve().parents[2]))

    def point(self, key: str, moment: float, value: Any = None, metadata: dict[str, Any] | None = None) -> None:
        self._logger.event(key, value, metadata=metadata, time_ms=round(1000 * moment), stack_offset=1)

    def start(self, key: str, moment: float, metadata: dict[str, Any] | None = None) -> None:
        self._logger.start(key, None, metadata=metadata, time_ms=round(1000 * moment), stack_offset=1)

    def stop(self, key: str, moment: float, metadata: dict[str, Any] | None = None) -> None:
        self._logger.end(key, None, metadata=metadata, time_ms=round(1000 * moment), stack_offset=1)

    def block(self, begin: float, end: float, first_epoch: float, epochs: float) -> None:
        metadata = {"first_epoch_num": first_epoch, "epoch_count": epochs}
        self.start("block_start", begin, metadata)
        self.stop("block_stop", end, metadata)

    def text(self) -> str:
        return self._stream.getvalue()


def _submission(lines: _Lines, plan: Plan, events: Sequence[Event], moment: float, division: Division) -> None:
    worker = next((e for e in events if isinstance(e, WorkerStarted)), None)
    platform = f"{plan.world_size} x {(worker and worker.device_name) or plan.device or 'unknown'}"
    values = {"benchmark": "maskrcnn", "division": division, "org": SUBMITTER, "platform": platform}
    for key, value in {**values, "status": "research"}.items():
        lines.point(f"submission_{key}", moment, value)


def _hyperparameters(lines: _Lines, plan: Plan, config: Mapping[str, str], result: TrialResult, moment: float) -> None:
    solver = plan.solver
    values: dict[str, Any] = {
        "seed": result.seed,
        "global_batch_size": result.global_batch_size,
        "gradient_accumulation_steps": result.accumulate or 1,
        "train_samples": result.num_train_images,
        "eval_samples": result.num_val_images,
        "opt_name": "sgd",
        "opt_base_learning_rate": solver.base_lr,
        "opt_learning_rate_warmup_steps": solver.warmup_iters,
        "opt_learning_rate_warmup_factor": _number(config, "SOLVER.WARMUP_FACTOR"),
        "opt_learning_rate_decay_factor": _number(config, "SOLVER.GAMMA"),
        "opt_learning_rate_decay_steps": list(solver.steps) if solver.steps is not None else None,
        "opt_weight_decay": _number(config, "SOLVER.WEIGHT_DECAY"),
        "num_image_candidates": _number(config, "MODEL.RPN.POST_NMS_TOPK_TRAIN"),
        "min_image_size": _number(config, "INPUT.MIN_SIZE_TRAIN"),
        "max_image_size": _number(config, "INPUT.MAX_SIZE_TRAIN"),
    }
    for key, value in values.items():
        if value is not None:
            lines.point(key, moment, value)


def _blocks(lines: _Lines, events: Sequence[Event], result: TrialResult, run_start: float) -> float:
    """Writes training blocks and evaluations up to the scored one; returns when the run stops (Unix seconds)."""
    evaluations = sorted((e for e in events if isinstance(e, Evaluated)), key=lambda e: e.time)
    since, epoch = run_start, 0.0
    for event in evaluations:
        at = {"epoch_num": event.epoch} if event.epoch is not None else None
        eval_start = event.time - (event.seconds or 0.0)
        if event.epoch is not None and event.epoch > epoch:  # one that a restart or the end repeats trains no block
            lines.block(since, eval_start, epoch, event.epoch - epoch)
            epoch = event.epoch
        lines.start("eval_start", eval_start, metadata=at)
        names = {"BBOX": "box_ap", "SEGM": "mask_ap"}
        values = {key: round(ap / 100, 8) for key, name in names.items() if (ap := event.figures.get(name)) is not None}
        lines.point("eval_accuracy", event.scored, values, metadata=at)
        # MLPerf's clock stops when the figures are known, not when they are printed.
        lines.stop("eval_stop", event.scored, metadata=at)
        if event.iteration == result.scored_iteration:
            return event.scored
        since = event.time
    ended = next((e.time for e in reversed(events) if isinstance(e, LoopFinished | TrialEnded)), since)
    if not evaluations and result.iterations and result.num_train_images and result.global_batch_size:
        lines.block(since, ended, 0.0, result.iterations * result.global_batch_size / result.num_train_images)
    return ended


def _number(config: Mapping[str, str], key: str) -> float | None:
    """A printed value as a number, the largest of several; None where it is missing or none."""
    value = evaluate(config.get(key))
    parts = value if isinstance(value, tuple | list) else [value]
    return max((part for part in parts if isinstance(part, int | float)), default=None)
