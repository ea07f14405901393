"""One rank of one trial, from its plan to its last event; runs the same under Ray Train and under torchrun."""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from trainers import energy, faults, hooks, loading, machine, mask_rcnn
from trainers.batching import Batch
from trainers.checkpoint_hook import CheckpointHook
from trainers.checkpoints import CheckpointStore
from trainers.contract import clock
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    LoopFinished,
    LoopStarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.contract.memory import Memory, batch_hint, fitting_batch, lost_loader_text, oom_kills
from trainers.contract.plan import TrialPlan
from trainers.ema import WeightAverage, evaluated_models
from trainers.evaluation import Evaluator
from trainers.evaluation_hook import EVALUATION_PENDING_KEY, EVALUATIONS_KEY, EvaluationHook
from trainers.failures import classify, ending_together, in_short
from trainers.loader_sizing import LoaderSizing
from trainers.loop import Request, TrainingLoop
from trainers.overlap import Start, overlap, process_here
from trainers.precise_bn import precise_batch_norm
from trainers.pulse import Activity, Pulse
from trainers.speedups.apply import agree_on_precision, process_settings, resolve_precision
from trainers.speedups.graphs import capture_for
from trainers.training_order import Epoch, training_epoch

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)


class Rank:
    """Trains one rank of a trial inside an initialised process group (none is needed for one worker).

    Args:
        plan: The trial.
        attempt: Number of this start of it, from 0.
        placement: Which rank this is.
        channel: The connection to the driver.
        before_step: Called before every step.
        start_evaluating: Starts the process that evaluates concurrently, where the plan does so.
    """

    def __init__(
        self,
        plan: TrialPlan,
        attempt: int,
        placement: Placement,
        channel: Channel,
        before_step: Callable[[], None] = lambda: None,
        start_evaluating: Start = process_here,
    ) -> None:
        self.plan, self.attempt, self.placement, self.channel = plan, attempt, placement, channel
        self.before_step, self.start_evaluating = before_step, start_evaluating
        self.injector = faults.from_environment(placement.rank, attempt)
        self.activity: Activity = self.injector or Activity()
        self.pulse = Pulse(self.event, placement, channel, self.activity)
        self._oom_kills = oom_kills()
        self._before_steps: tuple[Memory, float] | None = None  # and the size of the trained weights in bytes

    def event(self, kind: type[E], **fields: Any) -> E:
        """An event of this rank, happening now unless `time` is given."""
        fields.setdefault("time", clock.now())
        return kind(trial=self.plan.name, attempt=self.attempt, rank=self.placement.rank, **fields)

    def send(self, kind: type[Event], **fields: Any) -> None:
        """Sends an event of this rank, without waiting."""
        self.channel.push(self.event(kind, **fields))

    def train(self, entered: float) -> None:
        """Trains from the newest checkpoint to the end; `entered`: when the training function began (Unix seconds).

        Raises:
            Exception: Whatever ended training; it has been sent to the driver as a `WorkerFailed` before.
        """
        # TorchScript (RetinaNet's focal loss) changes its kernels after a process's first calls. On CPU it may not,
        # because a resumed run promises the same bits there.
        repeatable = torch.jit.optimized_execution(self.plan.device != "cpu")  # type: ignore[attr-defined]
        with self.pulse, repeatable, ending_together():
            try:
                self._send_started(entered)
                laps = clock.Laps(entered)
                laps.lap("imports")
                with energy.measured(self.send, self.placement, self.plan.device), self._log_file():
                    cfg = mask_rcnn.build_config(self.plan)
                    with process_settings(self.plan.recipe, torch.device(self.plan.device), cfg.CUDNN_BENCHMARK):
                        self._train(cfg, entered, laps)
            except Exception as error:
                self._send_failure(error)
                raise
            finally:
                self.channel.flush()

    def _train(self, cfg: CfgNode, entered: float, laps: clock.Laps) -> None:
        plan, placement = self.plan, self.placement
        torch.set_num_threads(plan.cpus_per_worker)
        if placement.world_size > 1:
            comm.create_local_process_group(placement.local_world_size)
        agree_on_precision(plan.recipe.precision, self._device(), placement.host)
        torch.manual_seed(plan.seed)
        mask_rcnn.register(cfg, plan.train)
        mask_rcnn.register(cfg, plan.val)
        records = loading.training_records(cfg, plan)
        epoch = training_epoch(cfg, records, plan.seed)
        evaluator = Evaluator(cfg, plan)
        laps.lap("data")
        detector = mask_rcnn.build_detector(cfg, plan)
        laps.lap("model")

        self.activity.enter("checkpoint")
        store = CheckpointStore(
            plan.checkpoint_dir,
            plan.keep_checkpoints,
            self.attempt,
            on_saved=functools.partial(self.send, CheckpointSaved),
            on_failed=functools.partial(self.send, CheckpointFailed) if plan.survive_storage else None,
            on_skipped=functools.partial(self.send, CheckpointSkipped),
            before_valid=self.channel.wait_until_persisted,
        )
        state, restored_from = self._newest(store) or (None, "")
        start = self.activity.iteration = state["iteration"] if state else 0
        self.activity.enter("setup")
        laps.lap("checkpoint")
        images = loading.training_images(cfg, plan, records, detector)
        average = WeightAverage(detector, plan.ema_decay) if plan.ema_decay else None
        models = evaluated_models(detector, average, both=plan.ema_both)
        prepare = [
            each for model in models if (each := precise_batch_norm(cfg, plan, model, images, epoch, placement.rank))
        ]
        evaluation = EvaluationHook(
            plan, models, evaluator, epoch.num_images, self.send, store.rate, self.activity, prepare
        )
        loop = self._build_loop(cfg, detector, images, epoch, start, evaluation, store, average)
        if state:
            hooks.restore(loop, state)
            evaluation.restore(state)
        config_yaml = cfg.dump()
        logger.info("Running with full config:\n%s", config_yaml)
        logger.info("Starting training from iteration %d", start)
        laps.lap("loop")
        self.send(
            LoopStarted,
            iteration=start,
            num_train_images=epoch.num_images,
            num_val_images=evaluator.num_images,
            setup_seconds=clock.now() - entered,
            setup_part_seconds=laps.seconds,
            config_yaml=config_yaml if placement.rank == 0 else "",
            restored_from=restored_from,
            numerics={"precision": resolve_precision(plan.recipe.precision, self._device()), **machine.numerics()},
        )
        saved = state.get(EVALUATIONS_KEY, []) if state else []
        with overlap(plan, models, placement.rank, self.start_evaluating, saved) as evaluation.overlap:
            if state and state[EVALUATION_PENDING_KEY]:
                evaluation.make_up(loop)
            sizes = (weight.nbytes for weight in detector.parameters() if weight.requires_grad)
            self._before_steps = machine.memory(self._device()), float(sum(sizes))
            reason = loop.run()
        self.activity.enter("checkpoint")
        store.wait()
        if placement.rank == 0:
            state_hash = hooks.state_sha256(hooks.training_state(loop))
            self.send(LoopFinished, iteration=loop.iteration, reason=reason, state_sha256=state_hash)

    def _build_loop(
        self,
        cfg: CfgNode,
        detector: nn.Module,
        images: loading.TrainingImages,
        epoch: Epoch,
        start: int,
        evaluation: EvaluationHook,
        store: CheckpointStore,
        average: WeightAverage | None,
    ) -> TrainingLoop:
        plan, rank, device = self.plan, self.placement.rank, self._device()

        def load(skip: int, num_processes: int) -> Iterator[Batch]:
            batches = iter(loading.training_loader(cfg, plan, images, epoch, rank, skip, num_processes))
            return self.injector.poison(batches) if self.injector else batches

        def request() -> Request:
            return evaluation.wanted_end() or self.pulse.command

        optimizer, scheduler = mask_rcnn.build_solver(cfg, detector, plan.recipe)
        capture = capture_for(detector, plan.recipe, device, plan.world_size)
        return TrainingLoop(
            plan=plan,
            model=mask_rcnn.distribute(
                detector, device, plan.world_size, plan.recipe.gradient_views, graphs=capture is not None
            ),
            optimizer=optimizer,
            scheduler=scheduler,
            batches=load(start, plan.loader_workers),
            hooks=[
                hooks.ProgressHook(plan, self.send),
                evaluation,
                CheckpointHook(plan, start, self.placement.num_nodes, store, evaluation, self.channel.flush),
                LoaderSizing(plan, images, start, load),
            ],
            device=device,
            rank=rank,
            start_iteration=start,
            activity=self.activity,
            request=request,
            before_step=self.before_step,
            capture=capture,
            average=average,
        )

    def _newest(self, store: CheckpointStore) -> tuple[dict[str, Any], str] | None:
        """The newest checkpoint that verifies; rank 0 chooses, so that all ranks go on from the same one."""
        if self.placement.rank == 0:
            store.take_over()
            chosen = store.load_newest()
            comm.all_gather(chosen[0]["iteration"] if chosen else None)
            return chosen
        iteration = comm.all_gather(None)[0]
        return store.load(iteration) if iteration is not None else None

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.plan.device == "cuda" else torch.device("cpu")

    def _send_started(self, entered: float) -> None:
        placement, device = self.placement, self._device()
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
            oom_kills=self._oom_kills,
            **machine.host_description(),
        )

    def _send_failure(self, error: Exception) -> None:
        failure, message = classify(error), in_short(error)
        if killed := lost_loader_text(error, self._oom_kills):
            failure, message = "out_of_memory", f"{message}; {killed}"
        if failure == "out_of_memory" and self._before_steps and self.activity.section == "step":
            failed, fitting = machine.memory(self._device()), None
            if self.activity.part not in ("data", "forward"):
                fitting = fitting_batch(self.plan.batch_per_worker, *self._before_steps, failed, message)
            message += batch_hint(self.plan, fitting)
        files = self.activity.image_files if failure != "configuration" else ()
        self.send(
            WorkerFailed,
            failure=failure,
            iteration=self.activity.iteration,
            section=self.activity.section,
            message=message,
            image_files=(error.image_file,) if isinstance(error, loading.BadInputError) else files,
            traceback=traceback.format_exc(),
        )

    @contextmanager
    def _log_file(self) -> Iterator[None]:
        """Writes detectron2's log and ours to the trial's folder, in detectron2's format."""
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
        except Exception:
            logger.exception("training failed")
            raise
        finally:
            for named in loggers:
                named.removeHandler(handler)
            handler.close()
