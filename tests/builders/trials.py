"""Plans and events of trials that never ran, with round figures that can be added up by hand."""

import dataclasses
from typing import Any

from trainers.contract.events import (
    CheckpointSaved,
    EnergySampled,
    Evaluated,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerStarted,
)
from trainers.contract.plan import DatasetPlan, SolverPlan, TrialPlan
from trainers.recipes import Recipe

CONFIG_YAML = """\
INPUT:
  MAX_SIZE_TRAIN: 1333
  MIN_SIZE_TRAIN: (640, 800)
MODEL:
  RPN:
    POST_NMS_TOPK_TRAIN: 1000
SOLVER:
  GAMMA: 0.1
  WARMUP_FACTOR: 0.001
"""


def plan(**fields: Any) -> TrialPlan:
    """A trial of 2 workers, batch 4, 8 iterations of which 2 are warm-up, evaluated every 4."""
    solver = SolverPlan(
        global_batch_size=4, base_lr=0.02, max_iter=8, steps=(5, 7), warmup_iters=2, eval_period=4,
        evaluate_at_end=True, checkpoint_period=4,
    )  # fmt: skip
    solver = dataclasses.replace(solver, **{k: fields.pop(k) for k in list(fields) if hasattr(solver, k)})
    values: dict[str, Any] = {
        "experiment": "made", "name": "reference-2xcpu", "world_size": 2, "num_nodes": None,
        "recipe_name": "reference", "recipe": Recipe(), "seed": 7, "scaling": "strong", "protocol": "time_to_train",
        "config_file": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "overrides": {}, "weights": "",
        "train": DatasetPlan("made_train", "/data/train.json", "/data/train"),
        "val": DatasetPlan("made_val", "/data/val.json", "/data/val"), "num_classes": 3, "solver": solver,
        "throughput_warmup_iters": 2, "target_box_ap": 50.0, "target_mask_ap": 45.0, "stop_at_target": True,
        "device": "cpu", "cpus_per_worker": 1, "loader_workers": 0, "log_period": 2, "trial_dir": "/runs/made",
        "keep_checkpoints": 2,
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(TrialPlan)}
    values |= {"checkpoint_dir": "/runs/made/checkpoints", "weights_sha256": None}
    return TrialPlan(**{name: value for name, value in {**values, **fields}.items() if name in known})


class TrialBuilder:
    """Events of one trial, in order; times are seconds since its start."""

    def __init__(self, trial: TrialPlan, epoch: float = 1_700_000_000.0) -> None:
        self.trial, self.epoch, self.attempt = trial, epoch, 0
        self.events: list[Event] = []

    def emit(self, kind: type[Event], at: float, rank: int = 0, **fields: Any) -> None:
        event = kind(trial=self.trial.name, attempt=self.attempt, rank=rank, time=self.epoch + at, **fields)
        self.events.append(event)

    def started(self, at: float = 0.0) -> None:
        self.emit(TrialStarted, at, rank=-1, plan=dataclasses.asdict(self.trial))

    def workers(self, at: float, *, hosts: tuple[str, ...] = ("a", "a")) -> None:
        for rank, host in enumerate(hosts[: self.trial.world_size]):
            self.emit(
                WorkerStarted, at, rank, host=host, node_id=host, pid=rank, local_rank=rank, device_name="Test CPU",
                device_memory_gib=None, versions={"torch": "2.14.1"},
            )  # fmt: skip

    def loop(self, at: float, iteration: int = 0, setup_seconds: float = 1.0) -> None:
        for rank in range(self.trial.world_size):
            self.emit(
                LoopStarted, at, rank, iteration=iteration, num_train_images=8, num_val_images=4,
                setup_seconds=setup_seconds, config_yaml=CONFIG_YAML if rank == 0 else "", restored_from="",
            )  # fmt: skip

    def steps(self, at: float, first: int, *step_seconds: float, rank: int = 0, **fields: Any) -> None:
        """A window that ends at `at`; a tenth of each step is data, forward and optimizer 0.2, backward the rest."""
        parts = {"data": 0.1, "forward": 0.2, "backward": 0.5, "optimizer": 0.2}
        values: dict[str, Any] = {
            "num_images": len(step_seconds) * self.trial.batch_per_worker,
            "data_seconds": tuple(0.1 * s for s in step_seconds),
            "part_seconds": {name: share * sum(step_seconds) for name, share in parts.items()},
            "step_part_seconds": {
                name: tuple(share * s for s in step_seconds) for name, share in parts.items() if name != "data"
            },
            "losses": {"total_loss": 1.0} if rank == 0 else {},
            "learning_rate": 0.02,
            "peak_memory_gib": 1.0 + rank,
        }
        self.emit(
            StepsDone, at, rank, first_iteration=first, iteration=first + len(step_seconds),
            seconds=sum(step_seconds), step_seconds=step_seconds, **{**values, **fields},
        )  # fmt: skip

    def evaluated(
        self, at: float, iteration: int, box: float | None, mask: float | None, seconds: float = 2.0, **fields: Any
    ) -> None:
        """An evaluation that ends at `at`, its boxes scored a second before, its masks then."""
        self.emit(
            Evaluated, at, iteration=iteration, epoch=iteration / 2, figures={"box_ap": box, "mask_ap": mask},
            box_scored=self.epoch + at - 1, mask_scored=self.epoch + at, seconds=seconds,
            part_seconds={"inference": seconds - 1, "gather": 0.0, "score": 1.0}, **fields,
        )  # fmt: skip

    def checkpoint(self, at: float, iteration: int, stall: float, write: float | None = None) -> None:
        self.emit(
            CheckpointSaved, at, iteration=iteration, path="/c", size_bytes=1, stall_seconds=stall,
            write_seconds=stall if write is None else write,
        )  # fmt: skip

    def energy(self, at: float, *joules: float, rank: int = 0, host: str = "a", **fields: Any) -> None:
        """Joules of a node, read once a second from `at` on."""
        times = tuple(self.epoch + at + second for second in range(len(joules)))
        values = {"host_joules": None, "source": "counter", "host_reason": "for root alone"}
        last = at + max(len(joules) - 1, 0)
        self.emit(
            EnergySampled, last, rank, host=host, **{**values, "times": times, "joules": joules or None, **fields}
        )

    def finished(self, at: float, iteration: int, reason: str = "target") -> None:
        self.emit(LoopFinished, at, iteration=iteration, reason=reason, state_sha256="0" * 64)

    def restarted(self, at: float, iteration: int) -> None:
        self.attempt += 1
        self.emit(TrialRestarted, at, rank=-1, failure="worker_lost", message="rank 1 is gone", iteration=iteration)

    def ended(self, at: float, status: str = "FINISHED", reason: str = "") -> None:
        self.emit(TrialEnded, at, rank=-1, status=status, reason=reason)


def trained(**fields: Any) -> TrialBuilder:
    """Two workers, of which rank 1 is slower, train 8 iterations and meet the targets at the second evaluation.

    0 trial starts, 10 workers start, 14 loop starts, 4 steps to 18, evaluation to 20, checkpoint to 20.5, 4 steps to
    25, evaluation to 27, end at 28, trial ended at 30.
    """
    made = TrialBuilder(plan(**fields))
    made.started()
    made.workers(10.0)
    made.loop(14.0, setup_seconds=4.0)
    for rank, seconds in enumerate((0.9, 1.0)):
        made.steps(18.0, 0, *(seconds,) * 4, rank=rank)
    made.evaluated(20.0, 4, 51.0, 40.0)
    made.checkpoint(20.5, 4, 0.5)
    for rank, seconds in enumerate((0.9, 1.1)):
        made.steps(25.0, 4, *(seconds,) * 4, rank=rank)
    made.evaluated(27.0, 8, 55.0, 46.0)
    made.finished(28.0, 8)
    made.ended(30.0)
    return made
