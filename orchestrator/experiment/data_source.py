"""The part of an experiment file that says which data are trained and evaluated on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from orchestrator.experiment.part import Name, Part


class GeneratedData(Part):
    """Drawn shapes, generated on first use, which a small model learns in minutes."""

    num_train: int = Field(256, ge=1)
    """Training images."""
    num_val: int = Field(64, ge=1)
    """Validation images."""
    size: int = Field(128, ge=32, le=4096)
    """Height and width of an image, in pixels."""
    num_classes: int = Field(3, ge=1, le=80)
    """Kinds of shapes."""
    crowd_fraction: float = Field(0.0, ge=0, le=1)
    """Share of images that also hold a crowd region (RLE)."""
    seed: int = Field(0, ge=0)
    """The same seed draws the same images, byte for byte."""


class CocoPair(Part):
    """A training and a validation set in COCO's JSON format."""

    name: Name = "custom"
    """Name in logs and tracking."""
    train_annotations: Path
    """Annotation JSON of the training set."""
    train_images: Path
    """Folder that its `file_name`s are relative to."""
    val_annotations: Path
    """Annotation JSON of the validation set."""
    val_images: Path
    """Folder that its `file_name`s are relative to."""


class Data(Part):
    """What is trained and evaluated on: exactly one of the three."""

    coco2017: bool = False
    """COCO 2017 as `$DETECTRON2_DATASETS/coco/{annotations,train2017,val2017}` (detectron2's own layout)."""
    coco: CocoPair | None = None
    """Any COCO JSON pair; `python -m orchestrator.data init FOLDER` writes an experiment for one."""
    generated: GeneratedData | None = None
    """Drawn shapes, generated on first use."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum([self.coco2017, self.coco is not None, self.generated is not None]) != 1:
            raise ValueError("give exactly one of coco2017: true, coco: {…} and generated: {…}")
        return self
