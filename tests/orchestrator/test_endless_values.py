"""Numbers and structures without an end are refused by name, as quickly as any other wrong value."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.experiment.detectron_config import file_settings
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import SpecError

FILE = "name: x\ndata: {generated: {}}\n"
LAUGHS = "a: &a [x]\n" + "".join(f"{name}: &{name} [{f'*{last}, ' * 10}]\n" for last, name in pairwise("abcdefg"))


def refusal(folder: Path, text: str, *assignments: str) -> str:
    (folder / "c.yaml").write_text(text)
    with pytest.raises(SpecError) as raised:
        load_experiment(folder / "c.yaml", list(assignments))
    assert len(str(raised.value)) < 1000
    return str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("faults.timeouts.step", ".inf"),
        ("faults.timeouts.heartbeat", ".nan"),
        ("faults.timeouts.setup", "1e300"),
        ("resources.price_per_accelerator_hour", ".inf"),
        ("resources.price_per_accelerator_hour", "1e308"),
        ("protocol.target_box_ap", "-.inf"),
        ("protocol.iterations", "12345678901234567890"),
        ("protocol.eval_period_epochs", "1e300"),
        ("log_period_iterations", "12345678901234567890"),
        ("storage.keep_checkpoints", "12345678901234567890"),
        ("trials.world_sizes", "[1, 12345678901234567890]"),
        ("resources.cpus_per_worker", "2147483648"),
        ("data.generated.seed", "-12345678901234567890"),
        ("description", "0x" + "f" * 5000),
        ("protocol.iterations", "9" * 5000),
        ("description", "[" * 3000 + "]" * 3000),
        ("description", "[" * 60 + "]" * 60),
        ("description", "&a [*a]"),
        ("model.overrides.SOLVER.STEPS", "[" * 900 + "]" * 900),
    ],
)
def test_an_endless_value_of_a_field_is_refused_with_its_name(tmp_path: Path, field: str, value: str) -> None:
    assert field in refusal(tmp_path, FILE, f"{field}={value}")


@pytest.mark.parametrize(
    "text",
    [
        f"{FILE}description: {'[' * 3000}{']' * 3000}\n",
        "{" * 100_000,
        f"{FILE}description: &a [*a]\n",
        "name: x\ndata: &d {generated: *d}\n",
        LAUGHS,
    ],
)
def test_an_endless_file_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "c.yaml") in refusal(tmp_path, text)
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"model\.yaml"):
        file_settings(str(tmp_path / "model.yaml"))


def test_a_model_config_that_is_its_own_base_is_refused_with_the_circle(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("_BASE_: one.yaml\n")
    (tmp_path / "two.yaml").write_text("_BASE_: [three.yaml]\n")
    (tmp_path / "three.yaml").write_text(f"_BASE_: {tmp_path}/../{tmp_path.name}/two.yaml\n")
    for name in ("one.yaml", "two.yaml"):
        with pytest.raises(SpecError, match="goes round in a circle"):
            file_settings(str(tmp_path / name))


def test_the_largest_numbers_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FILE)
    taken = load_experiment(tmp_path / "c.yaml", ["trials.seeds=[2147483647]", "faults.timeouts.step=2147483647"])
    assert taken.trials.seeds == [2**31 - 1] and taken.faults.timeouts.step == 2**31 - 1
