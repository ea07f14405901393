"""Exchanges the classes of a model's modules for faster subclasses, and puts the original ones back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

Choice = type[nn.Module] | Callable[[str, Any], type[nn.Module] | None]
"""A module's new class, or a function of its name and itself that returns one; None leaves the module as it is."""

Table = Mapping[type[nn.Module], Choice]
"""What modules of exactly these classes become."""


@dataclass(frozen=True, slots=True)
class Surgery:
    """The modules of a model whose class was exchanged."""

    exchanged: list[tuple[nn.Module, type[nn.Module]]]
    """Each of them with its original class."""

    def restore(self) -> None:
        """Gives every module its original class back."""
        for module, original in self.exchanged:
            module.__class__ = original


def exchange(model: nn.Module, tables: Mapping[str, Table]) -> Surgery:
    """Exchanges the classes of a model's modules, in place.

    A module keeps its identity, and with it its parameters, buffers, settings, hooks, and every list in which a model
    of detectron2 holds it a second time (`FPN.lateral_convs`); names in checkpoints stay. torch's own
    `register_parametrization` and `fully_shard` exchange classes in the same way. Modules of a subclass that the table
    does not name are left alone: they may override what a replacement relies on.

    Args:
        model: The model.
        tables: For each switch its table.

    Raises:
        ValueError: Two switches exchange the same class.
        TypeError: A replacement is not a subclass of what it replaces.
    """
    owners: dict[type[nn.Module], str] = {}
    for switch, table in tables.items():
        for original in table:
            if owners.setdefault(original, switch) != switch:
                raise ValueError(f"both {owners[original]} and {switch} exchange {original.__name__}")
    exchanged = []
    for switch, table in tables.items():
        counts: Counter[str] = Counter()
        for name, module in model.named_modules():
            original, choice = type(module), table.get(type(module))
            replacement = choice if choice is None or isinstance(choice, type) else choice(name, module)
            if replacement is None:
                continue
            if not issubclass(replacement, original):
                raise TypeError(f"{replacement.__name__} is not a subclass of {original.__name__}")
            module.__class__ = replacement
            exchanged.append((module, original))
            counts[replacement.__name__] += 1
        if counts:
            parts = ", ".join(f"{count} {name}" for name, count in counts.items())
            logger.info("%s: the model now has %s.", switch, parts)
        else:
            logger.warning("%s: has no effect, this model has no part that it exchanges.", switch)
    return Surgery(exchanged)
