"""One rank of one trial, from its plan to its last event; runs the same under Ray Train and under torchrun."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm

from trainers import faults, hooks, loading, machine, mask_rcnn
from trainers.activity import Activity
from trainers.checkpoints import CheckpointStore, Saved, StorageError, state_sha256
from trainers.contract.channel import ENDED, Channel, Command, Placement
from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    FailureKind,
    Heartbeat,
    LoopFinished,
    LoopStarted,
    SystemSampled,
    WorkerFailed,
    WorkerStarted,
)
from trainers.contract.plan import Attempt, TrialPlan
from trainers.evaluation import Evaluator
from trainers.loop import NotFiniteError, StepWindow, TrainingLoop
from trainers.speedups import overlap
from trainers.speedups.loader_sizing import LoaderSizing

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
SYSTEM_SAMPLE_SECONDS = 10.0


class Rank:
    """Trains one rank of a trial inside an initialised process group (none is needed for one worker).

    Args:
        plan: The trial.
        attempt: Which start of it this is.
        placement: Which rank this is.
        channel: The way to the driver.
    """

    def __init__(self, plan: TrialPlan, attempt: Attempt, placement: Placement, channel: Channel) -> None:
        self.plan, self.attempt, self.placement, self.channel = plan, attempt, placement, channel
        self.injector = faults.from_environment(placement.rank, attempt.number)
        self.now: Activity = self.injector or Activity()
        self.command: Command = "run"

    def send(self, kind: type[Event], **fields: Any) -> None:
        """Sends an event of this rank, happening now unless `time` is given."""
        fields.setdefault("time", time.time())
        self.channel.push(kind(trial=self.plan.name, attempt=self.attempt.number, rank=self.placement.rank, **fields))

    def train(self, entered: float) -> None:
        """Trains from the newest checkpoint to the end.

        Args:
            entered: When the training function began (Unix seconds).

        Raises:
            Exception: Whatever ended training; it has been sent to the driver as a `WorkerFailed` before.
        """
        # TorchScript (RetinaNet's focal loss) changes its kernels after a process's first calls. On CPU it may not:
        # there, a resumed run promises the same bits.
        repeatable = torch.jit.optimized_execution(self.plan.device != "cpu")  # type: ignore[attr-defined]
        with self._log_file(), self._pulse(), repeatable:
            try:
                self._train(entered)
            except Exception as error:
                logger.exception("training failed")
                self.send(
                    WorkerFailed,
                    failure=classify(error),
                    iteration=self.now.iteration,
                    section=self.now.section,
                    message=_in_short(error),
                    image_files=(error.image_file,)
                    if isinstance(error, loading.BadInputError)
                    else self.now.image_files,
                    traceback=traceback.format_exc(),
                )
                raise
            finally:
                self.channel.flush()

    def _train(self, entered: float) -> None:
        plan, placement = self.plan, self.placement
        device = torch.device("cuda", torch.cuda.current_device()) if plan.device == "cuda" else torch.device("cpu")
        self.send(
            WorkerStarted,
            time=entered,
            host=placement.host,
            node_id=placement.node_id,
            pid=os.getpid(),
            local_rank=placement.local_rank,
            world_size=placement.world_size,
            device_name=machine.device_name(device),
            device_memory_gib=machine.device_memory_gib(device),
            versions=machine.package_versions(),
            **machine.host_description(),
        )
        torch.set_num_threads(plan.cpus_per_worker)
        if placement.world_size > 1:
            comm.create_local_process_group(placement.local_world_size)
        torch.manual_seed(plan.seed)
        cfg = mask_rcnn.build_config(plan)
        mask_rcnn.register(plan.train)
        mask_rcnn.register(plan.val)
        records = loading.training_records(cfg, plan)
        evaluator = Evaluator(cfg, plan)
        detector = mask_rcnn.build_detector(cfg, plan)
        optimizer, scheduler = mask_rcnn.build_solver(cfg, detector, plan.recipe)

        self.now.enter("checkpoint")
        store = CheckpointStore(
            plan.checkpoint_dir,
            plan.keep_checkpoints,
            self.attempt.number,
            on_saved=self._saved,
            on_failed=self._not_saved if plan.survive_storage else None,
            before_valid=self.channel.kept,
        )
        state, restored_from = self._newest(store) or (None, "")
        start = self.now.iteration = state["iteration"] if state else 0
        self.now.enter("setup")
        images = loading.training_images(cfg, plan, records)

        def load(skip: int, num_processes: int) -> Iterator[list[loading.Record]]:
            batches = iter(loading.training_loader(cfg, plan, images, placement.rank, skip, num_processes))
            return self.injector.poison(batches) if self.injector else batches

        evaluation = hooks.EvaluationHook(plan, evaluator, len(records), self.send, store.rate)
        loop = TrainingLoop(
            plan=plan,
            model=mask_rcnn.distribute(detector, device, plan.world_size, plan.recipe.gradient_views),
            optimizer=optimizer,
            scheduler=scheduler,
            batches=load(start, plan.loader_workers),
            hooks=[
                hooks.ProgressHook(plan, self.send),
                evaluation,
                hooks.CheckpointHook(plan, store, evaluation, self.channel.flush),
                LoaderSizing(plan, images, start, load),
            ],
            device=device,
            rank=placement.rank,
            start_iteration=start,
            now=self.now,
            asked=lambda: "target" if evaluation.target_reached() else self.command,
        )
        if state:
            hooks.restore(loop, state)
        # All that is here stays to the end; steps are not held up by looking for garbage among it.
        gc.freeze()
        gc.enable()
        config_yaml = cfg.dump()
        logger.info("Running with full config:\n%s", config_yaml)
        logger.info("Starting training from iteration %d", start)
        self.send(
            LoopStarted,
            iteration=start,
            num_train_images=len(records),
            num_val_images=evaluator.num_images,
            setup_seconds=time.time() - entered,
            config_yaml=config_yaml if placement.rank == 0 else "",
            restored_from=restored_from,
        )
        with overlap.beside(plan, detector, placement.rank) as evaluation.beside:
            if state and state["evaluation_owed"]:
                evaluation.run(loop, StepWindow(start))
            reason = loop.run()
        self.now.enter("checkpoint")
        store.wait()
        if placement.rank == 0:
            state_hash = state_sha256(hooks.training_state(loop))
            self.send(LoopFinished, iteration=loop.iteration, reason=reason, state_sha256=state_hash)

    def _newest(self, store: CheckpointStore) -> tuple[dict[str, Any], str] | None:
        """The newest checkpoint that verifies: rank 0 chooses, so that no rank goes on from another one."""
        if self.placement.rank == 0:
            store.take_over()
            chosen = store.load_newest()
            comm.all_gather(chosen[0]["iteration"] if chosen else None)
            return chosen
        iteration = comm.all_gather(None)[0]
        return store.load(iteration) if iteration is not None else None

    def _not_saved(self, iteration: int, message: str) -> None:
        self.send(CheckpointFailed, iteration=iteration, message=message)

    def _saved(self, checkpoint: Saved) -> None:
        self.send(
            CheckpointSaved,
            iteration=checkpoint.iteration,
            path=checkpoint.path,
            size_bytes=checkpoint.size_bytes,
            stall_seconds=checkpoint.stall_seconds,
            write_seconds=checkpoint.write_seconds,
        )

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Beside training: tells the driver every second what this rank does, and hears what the driver wants."""
        ended = threading.Event()
        who: dict[str, Any] = {
            "trial": self.plan.name,
            "attempt": self.attempt.number,
            "rank": self.placement.rank,
        }

        def beat(part: str) -> None:
            now = self.now
            heartbeat = Heartbeat(
                **who,
                time=time.time(),
                section=now.section,
                part=part,
                iteration=now.iteration,
                since=now.since,
                image_files=now.image_files,
            )
            try:
                self.command = self.channel.beat(heartbeat)
            except Exception as error:  # the driver may be gone for a while; training goes on
                logger.debug("no answer from the driver: %r", error)

        def run() -> None:
            next_sample = 0.0
            while not ended.is_set():
                beat(self.now.part)
                if self.placement.local_rank == 0 and time.monotonic() >= next_sample:
                    next_sample = time.monotonic() + SYSTEM_SAMPLE_SECONDS
                    self.send(SystemSampled, host=self.placement.host, values=machine.system_metrics())
                ended.wait(HEARTBEAT_SECONDS)
            beat(ENDED)

        thread = threading.Thread(target=run, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=10)

    @contextmanager
    def _log_file(self) -> Iterator[None]:
        """detectron2's log and ours in the trial's folder, in detectron2's format."""
        folder = Path(self.plan.trial_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.placement.rank
        handler = logging.FileHandler(folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}"), encoding="utf-8")
        handler.setFormatter(
            logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S")
        )
        loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "trainers")]
        for named in loggers:
            named.setLevel(logging.INFO)
            named.propagate = False
            named.addHandler(handler)
        try:
            yield
        finally:
            for named in loggers:
                named.removeHandler(handler)
            handler.close()


def _in_short(error: BaseException) -> str:
    """An exception without the traceback that a loader process puts into its text."""
    text = str(error)
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{type(error).__name__}: {text}"


def classify(error: BaseException) -> FailureKind:
    """What sort of failure an exception is: decides whether starting again can help."""
    kinds: list[tuple[type[BaseException] | tuple[type[BaseException], ...], FailureKind]] = [
        (loading.BadInputError, "bad_input"),
        ((NotFiniteError, FloatingPointError), "not_finite"),  # the second is detectron2's, of its proposals
        (mask_rcnn.ConfigurationError, "configuration"),
        ((torch.OutOfMemoryError, MemoryError), "out_of_memory"),
        ((torch.distributed.DistError, ConnectionError), "communication"),
        (StorageError, "storage"),
        (BrokenProcessPool, "worker_lost"),
    ]
    for kind, failure in kinds:
        if isinstance(error, kind):
            return failure
    text = str(error)
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:  # torch on CPU
        return "out_of_memory"
    if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection", "ProcessGroup")):
        return "communication"
    return "unknown"
