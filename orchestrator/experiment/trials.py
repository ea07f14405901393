"""The fields of an experiment file that say which trials there are, and how many run at a time."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from orchestrator.experiment.part import Part
from trainers.recipes import RECIPES


def _known_recipe(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return name


class Trials(Part):
    """Which trials are run: every world size with every recipe and seed."""

    world_sizes: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1)
    """Numbers of workers, one accelerator each."""
    scaling: Literal["weak", "strong", "both"] = "weak"
    """`weak` keeps the batch per worker (learning rate up, iterations down with the world size, as detectron2's
    `SOLVER.REFERENCE_WORLD_SIZE` does); `strong` keeps the global batch; `both` runs every world size both ways."""
    batch_per_worker: int | None = Field(None, ge=1)
    """Images of a worker in a step (with `accumulate`, in one of its batches), instead of `SOLVER.IMS_PER_BATCH`.
    Learning rate and schedule follow from the config's by the linear rule; those given as overrides are for the
    smallest of `world_sizes`."""
    accumulate: int = Field(1, ge=1, le=4096)
    """Batches of a worker in a step, whose gradients add up: large batches on few accelerators. The batch of a step is
    workers x batch x accumulate; a worker counts so often where the schedule is scaled (docs/settings.md)."""
    reference_world_size: int | None = Field(None, ge=1)
    """Workers of one batch in a step that batch, learning rate, iterations and periods are written for; weak scaling
    starts from it. null: the config's `SOLVER.REFERENCE_WORLD_SIZE` where that is not 0; else numbers that you give
    (overrides, a YAML of your own, periods) are for the smallest of `world_sizes` with its `accumulate`, which runs
    exactly them, and those left to the model zoo are for 8 workers. With a batch of yours, all of them are yours."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1)
    """One repeat per seed; a benchmark that gives none has [0, 1, 2, 3, 4]."""
    recipes: list[Annotated[str, AfterValidator(_known_recipe)]] = Field(["reference"], min_length=1)
    """Named speed recipes (trainers/recipes.py)."""
    switches: dict[str, Any] = Field({})
    """Switches that override those of every recipe, for example `channels_last: true`."""
    concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Most trials at a time, each on hosts that no other one uses; `auto`: as many as the hosts take. What finds no
    room waits for its turn, so on one host they follow each other (docs/cluster.md)."""
    allow_shared_nodes: bool = False
    """Let trials that run at a time share hosts, as far as their GPUs and CPUs go: for accuracy alone, as their speeds
    are not those of trials that have their hosts to themselves."""

    @property
    def num_trials(self) -> int:
        """How many trials there are."""
        num_scalings = 2 if self.scaling == "both" else 1
        return len(self.world_sizes) * num_scalings * len(self.recipes) * len(self.seeds)

    @field_validator("concurrent", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("a whole number from 1 on, or auto, is wanted")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Trials:
        for field in ("world_sizes", "seeds", "recipes"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} holds a value twice: {values}")
        if self.batch_per_worker and self.scaling != "weak":
            raise ValueError("batch_per_worker keeps the batch of a worker: scaling must be weak")
        if self.allow_shared_nodes and self.concurrent == 1:
            raise ValueError("allow_shared_nodes has no effect on one trial at a time: set concurrent to auto or more")
        return self
