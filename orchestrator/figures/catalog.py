"""Every figure of the program, one row each: where it is in the record, its names, unit, notation and definition.

The closing table, the report, comparisons, MLflow's metric names and their descriptions, and the reference in
docs/measurement.md (`python -m orchestrator.figures.catalog` prints it) all come from these rows.
"""

from __future__ import annotations

import textwrap
from functools import partial

from orchestrator.figures.figure import Figure, number_text, percent_text, rate_text, seconds_text, setting_text

_two_decimals, _three_decimals = (partial(number_text, decimals=decimals) for decimals in (2, 3))
_seconds = partial(Figure, unit="s", text=seconds_text, better="lower")
_step_seconds = partial(Figure, unit="s", text=_three_decimals, better="lower")
_ap = partial(Figure, unit="AP", text=_two_decimals, better="higher")
_rate = partial(Figure, unit="images/s", text=rate_text, better="higher")
_share = partial(Figure, text=percent_text, better="lower")
_joules = partial(Figure, unit="J", better="lower")
_grams = partial(Figure, unit="g", text=_two_decimals, better="lower")
_useful_share = partial(Figure, text=percent_text, better="higher")
_cost = partial(Figure, unit="currency of the price", text=_two_decimals, better="lower")

SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Throughput": (
        _rate("images_per_second", "Images/s", "Images that all workers trained on over the wall time of those steps "
            "on the slowest worker, without warm-up, evaluations and checkpoints.", short="Images\n/s",
            mlflow="throughput/images_per_second"),
        _rate("wall_images_per_second", "Images/s with hooks", "Images of the final state over the seconds from the "
            "first batch request to the end of training, with evaluations, checkpoints and restarts.",
            mlflow="throughput/wall_images_per_second"),
        _rate("windows.images_per_second", "Images/s, by window", "Images of all workers over the wall time of the "
            "slowest, by window of steps.", mlflow="throughput/window_images_per_second"),
        Figure("throughput_warmup_iters", "Warm-up", "Iterations left out of the throughput."),
    ),
    "Time to train": (
        _seconds("time_to_box_target_seconds", "Time to train, box (s)", "Seed clock at the box figures of the "
            "evaluation that first met the box target.", short="Box\ntarget", mlflow="time/to_box_target_seconds"),
        _seconds("time_to_train_seconds", "Time to train (s)", "Seed clock at the figures of the evaluation that first "
            "met all targets; this clock never pauses.", short="Target\n(s)", mlflow="time/to_train_seconds"),
        _seconds("mlperf_seconds", "MLPerf's time to train (s)", "MLPerf's clock, which starts at the first batch "
            "request, at the same moment.", mlflow="time/mlperf_seconds"),
        _seconds("schedule_seconds", "Whole schedule (s)", "Seed clock at the end of training, targets met or not.",
            mlflow="time/schedule_seconds"),
        Figure("scored_iteration", "Iteration of the targets", "Iterations trained at the evaluation that first met "
            "all targets.", better="lower"),
        _ap("scored_box_ap", "Box AP at the targets", "Box AP of the evaluation that first met all targets, 0–100."),
        _ap("scored_mask_ap", "Mask AP at the targets", "Mask AP of the evaluation that first met all targets, 0–100."),
        _ap("scored_keypoint_ap", "Keypoint AP at the targets", "Keypoint AP of the evaluation that first met all "
            "targets, 0–100."),
    ),
    "Accuracy": (
        _ap("box_ap", "Box AP", "Box AP of the last evaluation, 0–100.", short="Box\nAP", mlflow="coco/final_box_ap"),
        _ap("mask_ap", "Mask AP", "Mask AP of the last evaluation, 0–100.", short="Mask\nAP",
            mlflow="coco/final_mask_ap"),
        _ap("keypoint_ap", "Keypoint AP", "Keypoint AP of the last evaluation, 0–100; only models of keypoints have "
            "one.", short="Key-\npt AP", mlflow="coco/final_keypoint_ap"),
        _ap("best_box_ap", "Best box AP", "Highest box AP of all evaluations, 0–100.", mlflow="coco/best_box_ap"),
        _ap("best_mask_ap", "Best mask AP", "Highest mask AP of all evaluations, 0–100.", mlflow="coco/best_mask_ap"),
        _ap("best_keypoint_ap", "Best keypoint AP", "Highest keypoint AP of all evaluations, 0–100.",
            mlflow="coco/best_keypoint_ap"),
        Figure("best_metric", "Best by the metric", "Best value of `protocol.metric` of all evaluations: the "
            "highest, of a loss the lowest.", text=_two_decimals),
        Figure("best_metric_iteration", "Iteration of the best", "Iterations trained at that evaluation."),
        _ap("evaluations.box_ap", "Box AP", "Box AP of an evaluation, 0–100: mean over IoU 0.50 to 0.95.",
            mlflow="coco/box_ap"),
        _ap("evaluations.mask_ap", "Mask AP", "Mask AP of an evaluation, 0–100: mean over IoU 0.50 to 0.95.",
            mlflow="coco/mask_ap"),
        _ap("evaluations.keypoint_ap", "Keypoint AP", "Keypoint AP of an evaluation, 0–100: mean over OKS 0.50 to "
            "0.95.", mlflow="coco/keypoint_ap"),
        _ap("evaluations.figures.*", "COCO figures", "COCO's figures of an evaluation for boxes, masks and keypoints "
            "(`box_ap50`, `mask_arl`, `keypoint_apm`, …), 0–100.", mlflow="coco/*"),
        _ap("evaluations.class_ap.*", "AP by class", "AP of a class in an evaluation, by figure and class "
            "(`box_ap/person`), 0–100; null for a class without an object; in MLflow up to 100 classes.",
            mlflow="validation_class/*"),
        Figure("evaluations.iteration", "Iteration", "Iterations trained at an evaluation."),
        Figure("evaluations.epoch", "Epoch", "Passes over the training data at an evaluation.", text=_two_decimals),
        _seconds("evaluations.seconds", "Evaluation (s)", "How long an evaluation took; training was stalled as long, "
            "or for the part `stall` where it ran concurrently.", mlflow="time/evaluation_seconds"),
        _seconds("evaluations.part_seconds.*", "Evaluation by part (s)", "Seconds of an evaluation by part: inference, "
            "gather, score, details; where there is any, loss, precise_bn, stall.", mlflow="time/evaluation_*_seconds"),
        _seconds("evaluations.elapsed_seconds", "Boxes scored at (s)", "Seed clock when the box figures of an "
            "evaluation were known."),
        _seconds("evaluations.mask_elapsed_seconds", "Masks scored at (s)", "Seed clock when the mask figures of an "
            "evaluation were known."),
        _seconds("evaluations.keypoint_elapsed_seconds", "Keypoints scored at (s)", "Seed clock when the keypoint "
            "figures of an evaluation were known."),
    ),
    "Wall clock": (
        _seconds("startup_seconds", "Start-up (s)", "From the driver's start of the trial to the first batch request "
            "of the first attempt.", mlflow="time/startup_seconds"),
        _seconds("evaluation_seconds", "Evaluations (s)", "How long training was stalled for evaluations in all."),
        _seconds("checkpoint_seconds", "Checkpoints (s)", "How long training was stalled for checkpoints in all; "
            "writing that overlaps training is not in it.", mlflow="time/checkpoint_seconds"),
        _seconds("lost_work_seconds", "Lost work (s)", "The first run of steps trained again after a restart.",
            mlflow="time/lost_work_seconds"),
        _seconds("sections.wall", "wall", "From the driver's start of the trial to its end: the sum.", better=None),
        _seconds("sections.startup", "startup", "From the driver's start of the trial to the first batch request."),
        _seconds("sections.data", "data", "Steps: waiting for the loader."),
        _seconds("sections.forward", "forward", "Steps: forward pass."),
        _seconds("sections.backward", "backward", "Steps: backward pass; `communication`, where measured, is apart."),
        _seconds("sections.graph", "graph", "Steps: forward and backward pass where a CUDA graph replayed both."),
        _seconds("sections.communication", "communication", "Steps: waiting for gradients after the local ones."),
        _seconds("sections.optimizer", "optimizer", "Steps: optimizer and learning rate schedule."),
        _seconds("sections.step_other", "step other", "Steps: the rest of them."),
        _seconds("sections.evaluation", "evaluation", "Training stalled for evaluations."),
        _seconds("sections.checkpoint", "checkpoint", "Training stalled for checkpoints."),
        _seconds("sections.lost_work", "lost work", "The first run of steps trained again after a restart."),
        _seconds("sections.downtime", "downtime", "From the last progress before a failure to the next batch request."),
        _seconds("sections.shutdown", "shutdown", "From the last progress to the end of the trial."),
        _seconds("sections.other", "other", "The rest: agreement at the ends of windows, progress lines, other hooks."),
    ),
    "Downtime": (
        _seconds("downtime_seconds", "Downtime (s)", "From the last progress before each failure to the next batch "
            "request, added up.", mlflow="time/downtime_seconds"),
        Figure("num_restarts", "Restarts", "Starts of the workers after the first.", better="lower", mlflow="restarts"),
        Figure("restarts.lost_iterations", "Iterations lost", "Iterations that had to be trained again after a "
            "restart.", better="lower"),
        _seconds("restarts.downtime_seconds", "Downtime (s)", "From the last progress before a failure to the next "
            "batch request."),
        _seconds("restarts.recovery_seconds", "Recovery (s)", "From a failure to the end of the first step trained "
            "after it; null for a resumed run, where nothing failed."),
    ),
    "Goodput": (
        _useful_share("goodput", "Goodput", "Steps of the final state over the wall time from the driver's first start "
            "of the trial to its end, 0–1; every pause counts.", mlflow="goodput/goodput"),
        _useful_share("ettr", "ETTR", "Effective training time ratio: steps of the final state and evaluations over "
            "the wall time without `paused_seconds`, 0–1.", mlflow="goodput/ettr"),
        _seconds("paused_seconds", "Paused (s)", "From each end of the trial to the moment when a person resumed it; "
            "part of the downtime.", mlflow="time/paused_seconds"),
        _seconds("mtbf_seconds", "MTBF (s)", "Mean time between failures behind the advice: stated, measured, or the "
            "default.", better="higher"),
        _seconds("checkpoint_interval_seconds", "Checkpoint every (s)", "Median wall time from a checkpoint, or the "
            "first batch of an attempt, to the next checkpoint.", better=None),
        _seconds("advised_checkpoint_seconds", "Advised every (s)", "Interval that loses the least: sqrt(2 x mean "
            "stall of a checkpoint x MTBF) (Young/Daly).", better=None, mlflow="goodput/advised_checkpoint_seconds"),
    ),
    "Step times": (
        _step_seconds("step_seconds.p50", "Step, median (s)", "Median wall time of a step after the warm-up, all ranks "
            "together.", mlflow="time/step_seconds_p50"),
        _step_seconds("step_seconds.p95", "Step, 95th percentile (s)", "95th percentile of the wall time of a step "
            "after the warm-up, all ranks together.", mlflow="time/step_seconds_p95"),
        _step_seconds("step_seconds.p99", "Step, 99th percentile (s)", "99th percentile of the wall time of a step "
            "after the warm-up, all ranks together."),
        _step_seconds("data_seconds.*", "Wait for data (s)", "Quantiles of a step's wait for the loader."),
        _step_seconds("part_seconds.*", "Step by part (s)", "Quantiles of the other parts of a step: forward, "
            "backward, graph (both, replayed), communication, optimizer."),
        _step_seconds("windows.step_seconds.p50", "Step, median (s)", "Median wall time of a step, all ranks together, "
            "by window of steps.", mlflow="time/window_step_seconds_p50"),
        _step_seconds("windows.step_seconds.p95", "Step, 95th percentile (s)", "95th percentile of the wall time of a "
            "step, all ranks together, by window of steps.", mlflow="time/window_step_seconds_p95"),
        _step_seconds("windows.data_seconds", "Wait for data (s)", "Mean wait of a step for the loader, by window of "
            "steps.", mlflow="time/data_seconds"),
        _share("windows.data_wait_share", "Waiting for data, by window", "Waiting for the loader over the wall time of "
            "the steps, by window of steps, 0–1."),
        _share("data_wait_share", "Waiting for data", "Waiting for the loader over the wall time of the steps after "
            "the warm-up, 0–1."),
        Figure("peak_memory_gib", "Memory (GiB)", "Most memory any worker used: allocated on its GPU, or resident in "
            "its process on CPU.", unit="GiB", text=_two_decimals, better="lower", mlflow="memory/peak_gib"),
        Figure("windows.peak_memory_gib", "Memory so far (GiB)", "Most memory any worker had used by the end of a "
            "window of steps.", unit="GiB", text=_two_decimals, better="lower", mlflow="memory/window_peak_gib"),
    ),
    "Shapes": (
        Figure("num_shapes", "Shapes", "Distinct padded shapes (images, height, width) of all workers' batches.",
            better="lower", mlflow="shapes/distinct"),
        _seconds("new_shape_seconds", "New shapes (s)", "What steps with a shape new to their worker took above its "
            "median step, and captures of CUDA graphs; of the slowest worker.", mlflow="time/new_shape_seconds"),
        Figure("num_graphs", "CUDA graphs", "Most CUDA graphs that a worker held; null without them."),
        _seconds("capture_seconds", "Captures (s)", "Capturing CUDA graphs, on the slowest worker; in the steps."),
        _share("wasted_pixel_share", "Wasted pixels", "Pixels that fixed sizes add to detectron2's own padding, over "
            "all pixels, 0–1.", mlflow="shapes/wasted_pixel_share"),
        _share("eager_step_share", "Eager steps", "Steps of all workers without the fixed shapes or the CUDA graph "
            "that the recipe asks for, 0–1; null where it asks for neither.", mlflow="shapes/eager_step_share"),
    ),
    "Rank skew": (
        Figure("rank_skew", "Slowest rank", "Step time of the slowest worker over the median worker's, both without "
            "waiting for others' gradients: 1 is even; null for one worker or where that wait was not measured.",
            text=_three_decimals, better="lower"),
    ),
    "Drift": (
        Figure("drift_ratio", "Drift", "Throughput of the last quarter of the run over that of the first; 1 is steady.",
            text=_two_decimals, better="higher"),
    ),
    "Losses": (
        Figure("windows.losses.*", "Loss", "detectron2's losses and their sum, `total_loss`: mean over the workers, by "
            "window of steps.", text=_three_decimals, better="lower", mlflow="loss/*"),
        Figure("evaluations.validation_losses.*", "Validation loss", "detectron2's losses on the validation images at "
            "an evaluation and their sum, `total_loss`.", text=_three_decimals, better="lower",
            mlflow="validation_loss/*"),
    ),
    "Learning rate": (
        Figure("windows.learning_rate", "Learning rate", "Learning rate of the last step of a window of steps.",
            text=setting_text, mlflow="learning_rate"),
        Figure("base_lr", "Base LR", "Learning rate after its warm-up, scaled to the world size.", text=setting_text),
        Figure("max_iter", "Schedule", "Iterations of the schedule."),
        Figure("iterations", "Iterations", "Iterations trained."),
    ),
    "Efficiency": (
        Figure("scaling.speed_up", "Speed-up", "Throughput over that of the smallest world size of the same recipe and "
            "kind of scaling.", short="Speed\nup", text=_two_decimals, better="higher", mlflow="scaling/speed_up"),
        Figure("scaling.efficiency", "Efficiency", "Speed-up over the ratio of the world sizes; 1 is ideal.",
            short="Effi-\nciency", text=percent_text, better="higher", mlflow="scaling/efficiency"),
    ),
    "Projection": (
        _rate("fits.projected_images_per_second", "Projected images/s", "PROJECTION, not a measurement: throughput at "
            "twice the largest world size."),
        Figure("fits.projected_efficiency", "Projected efficiency", "PROJECTION, not a measurement: efficiency there, "
            "against the smallest world size.", text=percent_text, better="higher"),
    ),
    "Prediction": (
        _rate("predicted.images_per_second", "Predicted images/s", "PREDICTION from a calibration before the trial "
            "began; `low` and `high` are the ends of its 95 % interval.",
            mlflow="prediction/images_per_second"),
        Figure("predicted.error", "Prediction off by", "Predicted throughput over the measured one, less 1; null on "
            "another device than the predicted one.", text=percent_text, mlflow="prediction/error"),
        _rate("predictions.images_per_second", "Predicted images/s", "PREDICTION, not a measurement: throughput at a "
            "size that was asked for.", short="Images\n/s"),
        Figure("predictions.efficiency", "Predicted efficiency", "PREDICTION, not a measurement: efficiency there, "
            "against the smallest size that was measured.", short="Effi-\nciency", text=percent_text, better="higher"),
        _seconds("predictions.time_to_target_seconds", "Predicted time to target (s)", "PREDICTION, not a measurement: "
            "steps of the epochs that MLPerf's points need at this batch, without evaluations.", short="Target\n(s)"),
        _cost("predictions.cost_to_target", "Predicted cost to target", "PREDICTION, not a measurement: price of the "
            "accelerators for that time.", short="Cost to\ntarget"),
    ),
    "Benchmark": (
        Figure("benchmark.score_minutes", "Score (min)", "Mean of MLPerf's clock over the runs of a benchmark without "
            "the fastest and the slowest, in minutes; a run that missed its targets is the slowest.", unit="min",
            text=_two_decimals, better="lower", mlflow="benchmark/score_minutes"),
        Figure("benchmark.epochs", "Epochs to the targets", "Passes over the training data at the evaluation that "
            "first met all targets: mean over the runs that count.", text=_two_decimals, better="lower",
            mlflow="benchmark/epochs"),
        _rate("benchmark.images_per_second", "Images/s", "Mean of the throughput over the runs that count.",
            mlflow="benchmark/images_per_second"),
        Figure("benchmark.joules_per_image", "Energy (J/image)", "Mean of the energy of an image over the runs that "
            "count.", unit="J/image", text=_three_decimals, better="lower", mlflow="benchmark/joules_per_image"),
        Figure("benchmark.watt_hours_to_target", "Energy to target (Wh)", "Mean of the energy to the targets over the "
            "runs that count.", unit="Wh", text=_two_decimals, better="lower",
            mlflow="benchmark/watt_hours_to_target"),
        _cost("benchmark.cost_to_target", "Cost to target", "Mean of the price of the accelerators for the time to "
            "train over the runs that count.", mlflow="benchmark/cost_to_target"),
    ),
    "Cost": (
        _cost("cost", "Cost", "Price of the accelerators from the driver's start of the trial to its end; null without "
            "a price.", short="Cost", mlflow="cost/total"),
        _cost("cost_to_target", "Cost to target", "Price of the accelerators for the time to train.",
            short="to\ntarget", mlflow="cost/to_target"),
    ),
    "Energy": (
        _joules("energy.joules", "Energy (J)", "Energy of the devices that the trial computes on, from the start of "
            "its workers to their end, all hosts together.", mlflow="energy/joules"),
        Figure("energy.joules_per_image", "Energy (J/image)", "Energy during the steps after the warm-up over the "
            "images that all workers trained on in them.", unit="J/image", text=_three_decimals, better="lower",
            mlflow="energy/joules_per_image"),
        Figure("energy.watt_hours_to_target", "Energy to target (Wh)", "Energy until the targets were met.", unit="Wh",
            text=_two_decimals, better="lower", mlflow="energy/watt_hours_to_target"),
        _joules("energy.training_joules", "Training (J)", "Energy during the steps; that of concurrent evaluations on "
            "the same devices is in it.", mlflow="energy/training_joules"),
        _joules("energy.evaluation_joules", "Evaluations (J)", "Energy during the evaluations for which training "
            "waited.", mlflow="energy/evaluation_joules"),
        _joules("energy.idle_joules", "Idle (J)", "The rest of the energy: start-up, checkpoints, the ends of windows.",
            mlflow="energy/idle_joules"),
        _joules("energy.host_joules", "Hosts (J)", "Energy of the hosts' processors and memory, whoever used them.",
            mlflow="energy/host_joules"),
        _cost("energy.cost", "Energy cost", "Price of the energy; null without a price.", mlflow="cost/energy"),
        _cost("energy.cost_to_target", "Energy cost to target", "Price of the energy until the targets were met.",
            mlflow="cost/energy_to_target"),
        _grams("energy.carbon_grams", "Carbon (g)", "CO2 equivalent of the energy, by the grid intensity that was "
            "stated; null without one.", mlflow="carbon/grams"),
        _grams("energy.carbon_grams_to_target", "Carbon to target (g)", "CO2 equivalent of the energy until the "
            "targets were met.", mlflow="carbon/grams_to_target"),
    ),
    "Settings": (
        Figure("world_size", "Workers", "Workers, one per accelerator.", short="Work\ners"),
        Figure("num_nodes", "Hosts", "Hosts the workers ran on."),
        Figure("seed", "Seed", "Seed of the weights, the training order and the augmentations.", text=setting_text),
        Figure("global_batch_size", "Batch", "Images per iteration over all workers.", unit="images"),
        Figure("accumulate", "Batches of a step", "Batches of a worker in an iteration, whose gradients add up."),
        Figure("num_train_images", "Training images", "Images of an epoch.", unit="images"),
        Figure("num_val_images", "Validation images", "Images of an evaluation.", unit="images"),
        _ap("target_box_ap", "Box target", "Box AP that counts as trained, 0–100.", better=None),
        _ap("target_mask_ap", "Mask target", "Mask AP that counts as trained, 0–100.", better=None),
        Figure("target", "Target", "Value of `protocol.metric` that counts as trained.", text=setting_text),
    ),
}  # fmt: skip
"""The rows by the heading of docs/measurement.md under which they are explained."""

FIGURES = {row.key: row for rows in SECTIONS.values() for row in rows}
"""The rows by their key."""

BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
"""Lines of docs/measurement.md around the text of `reference()`."""


def reference() -> str:
    """The rows as Markdown: what docs/measurement.md holds between its two markers."""
    lines = []
    for section, rows in SECTIONS.items():
        lines += [f"**{section}**", ""]
        for row in rows:
            facts = [row.unit, row.better and f"{row.better} is better", row.mlflow and f"MLflow `{row.mlflow}`"]
            known = "; ".join(fact for fact in facts if fact)
            entry = f"- `{row.key}`{known and f' ({known})'}: {row.definition}"
            lines += textwrap.wrap(entry, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(BEGIN, "\n", reference(), END, sep="", end="")
