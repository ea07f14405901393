"""How many images an epoch of an experiment has: what detectron2 trains on of its training set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from orchestrator.experiment.config_keys import usable_value
from orchestrator.experiment.spec import Experiment, SpecError
from trainers.contract.annotations import AnnotationFileError, read_annotations

COCO2017_TRAIN_IMAGES = 117_266
"""Images of COCO 2017's training set that have at least one object: what detectron2 trains on."""


def epoch_images(experiment: Experiment, annotations: str) -> int | None:
    """Images of an epoch, for an evaluation period in epochs; None where no such period is given.

    Args:
        experiment: The experiment.
        annotations: Path of the annotation file of the training set.

    Raises:
        SpecError: They cannot be counted.
    """
    if experiment.protocol.eval_period_epochs is None:
        return None
    sampler, size = usable_value(experiment, "DATALOADER.SAMPLER_TRAIN"), _num_usable_images(experiment, annotations)
    if sampler == "RepeatFactorTrainingSampler":
        what = "RepeatFactorTrainingSampler makes epochs of another length than the data"
        raise SpecError(f"protocol.eval_period_epochs: {what}; give eval_period_iterations")
    if sampler == "RandomSubsetTrainingSampler":
        return max(1, int(size * usable_value(experiment, "DATALOADER.RANDOM_SUBSET_RATIO")))
    return size


def _num_usable_images(experiment: Experiment, annotations: str) -> int:
    """Images that are trained on; those without an object are not, unless the config says so."""
    data, filter_empty = experiment.data, usable_value(experiment, "DATALOADER.FILTER_EMPTY_ANNOTATIONS")
    if data.generated is not None:
        return data.generated.num_train
    with_keypoints = usable_value(experiment, "MODEL.KEYPOINT_ON")
    if data.coco2017 and filter_empty and not with_keypoints:
        return COCO2017_TRAIN_IMAGES
    try:
        document = read_annotations(Path(annotations).read_bytes()).document
        if with_keypoints:
            return _num_with_keypoints(experiment, document["annotations"])
        if not filter_empty:
            return len(document["images"])
        return len({each["image_id"] for each in document["annotations"] if not each.get("iscrowd")})
    except (AnnotationFileError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{annotations}: cannot count its images for eval_period_epochs: {error}") from error


def _num_with_keypoints(experiment: Experiment, annotations: list[dict[str, Any]]) -> int:
    """Images with as many labelled keypoints as the model trains on, by detectron2's filter."""
    numbers: Counter[int] = Counter()
    for each in annotations:
        numbers[each["image_id"]] += sum(visibility > 0 for visibility in each.get("keypoints", [])[2::3])
    least = usable_value(experiment, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE")
    return sum(number >= least for number in numbers.values())
