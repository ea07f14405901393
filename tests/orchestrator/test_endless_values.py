"""Numbers and structures without an end, and values that are none, are refused as any other wrong value is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.experiment.detectron_config import file_settings
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import SpecError

FILE = "name: x\ndata: {generated: {}}\n"
LAUGHS = "a: &a [x]\n" + "".join(f"{name}: &{name} [{f'*{last}, ' * 10}]\n" for last, name in pairwise("abcdefg"))
MERGES = f"{FILE}a: &a {{x: 1}}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{last}'] * 10)}], {name}: 1}}\n" for last, name in pairwise("abcdefghi")
)


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
        MERGES,
    ],
)
def test_an_endless_file_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "c.yaml") in refusal(tmp_path, text)
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"model\.yaml"):
        file_settings(str(tmp_path / "model.yaml"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('!!int ""', "not a valid int: ''"),
        ("!!bool maybe", "not a valid bool: 'maybe'"),
        ("!!timestamp x", "not a valid timestamp: 'x'"),
        ("!!timestamp {=: 2001-01-01}", "not a valid timestamp"),
        ("!!map [[a]]", "not a valid map"),
        ("{!!bool maybe: 1}", "not a valid bool: 'maybe'"),
        (r'"\UFFFFFFFF"', "not valid YAML"),
        (r'"\udce9"', r"it holds \udce9, which no text can hold"),
        (r'["x\0"]', r"it holds \u0000, which no text can hold"),
    ],
)
def test_what_yaml_takes_for_a_value_and_is_none_is_refused_with_its_place(
    tmp_path: Path, value: str, words: str
) -> None:
    in_file = refusal(tmp_path, f"{FILE}description: {value}\n")
    assert words in in_file and f"{tmp_path}/c.yaml" in in_file
    assert words in (given := refusal(tmp_path, FILE, f"description={value}")) and "--set description" in given


def test_a_merge_key_puts_the_values_of_another_section_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("A: &a {X: 1, Y: 2}\nB: {<<: *a, Y: 3}\n")
    values = {key: each.value for key, each in file_settings(str(tmp_path / "model.yaml")).items()}
    assert values == {"A.X": 1, "A.Y": 2, "B.X": 1, "B.Y": 3}


def test_model_configs_that_build_on_each_other_without_an_end_are_refused(tmp_path: Path) -> None:
    for number in range(40):  # 2^40 reads
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "40.yaml").write_text("SOLVER: {MAX_ITER: 3}\n")
    with pytest.raises(SpecError, match=r"/0.yaml: by _BASE_, more than 100 files are read for it"):
        file_settings(str(tmp_path / "0.yaml"))
    assert file_settings(str(tmp_path / "35.yaml"))["SOLVER.MAX_ITER"].value == 3


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
