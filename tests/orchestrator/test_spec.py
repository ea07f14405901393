"""The experiment file: what it accepts, what it refuses and with which words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.data.shapes import ShapesParameters
from orchestrator.experiment.data_source import GeneratedData
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.spec import CONFIGS, DEFAULT_CONFIG, SpecError, experiment_schema
from orchestrator.report.plan_table import plan_table
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_shipped_experiments() -> None:
    assert {path.name for path in SHIPPED} >= {
        "demo.yaml",
        "seed_1gpu_throughput.yaml",
        "seed_8gpu_time_to_train.yaml",
        "seed_1gpu_throughput_batch16.yaml",
        "scale_out.yaml",
        "own_data.yaml",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_experiment_is_valid_and_named_as_its_file(path: Path) -> None:
    assert load_experiment(path).name == path.stem


def test_the_schema_file_is_current() -> None:
    written = json.loads((CONFIGS / "experiment.schema.json").read_text(encoding="utf-8"))
    assert written == experiment_schema(), "run `make schema`"


def test_every_field_says_what_it_means() -> None:
    schema = experiment_schema()
    for model in [schema, *schema["$defs"].values()]:
        for name, field in model["properties"].items():
            assert field.get("description"), f"{model['title']}.{name} has no docstring"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trails.world_sizes=[1]", "trails: unknown key; did you mean 'trials'?"),
        ("trials.worldsizes=[1]", "trials.worldsizes: unknown key; did you mean 'world_sizes'?"),
        ("protocol.kind=thruput", "protocol.kind: Input should be 'throughput', 'time_to_train' or 'benchmark'"),
        ("name=../evil", "name: String should match pattern"),
        ("data.generated.seed=-1", "data.generated.seed: Input should be greater than or equal to 0"),
        ("trials.recipes=[quick]", "unknown recipe 'quick'; known: plain, reference, "),
        ("trials.seeds=[1,1]", "seeds holds a value twice"),
        ("data={coco2017: true, generated: {}}", "give exactly one of"),
        ("data.generated=null", "give exactly one of"),
        ("data.coco.name=mine", "data.coco.train_annotations: Field required"),
        ("name", "write it as KEY=VALUE"),
        ("name.first=x", "name has no fields to set"),
    ],
)
def test_a_wrong_assignment_is_refused_with_its_place(assignment: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_experiment(DEFAULT_CONFIG, [assignment])
    assert message in str(caught.value)


@pytest.mark.parametrize("bound", ["minimum", "maximum"])
def test_every_data_set_that_a_file_can_ask_for_can_be_drawn(bound: str) -> None:
    fields = GeneratedData.model_json_schema()["properties"]
    given = {name: field.get(bound, 2**31 - 1) for name, field in fields.items()}
    values = GeneratedData(**given).model_dump()
    ShapesParameters(width=values["size"], height=values.pop("size"), **values)


def test_data_that_cannot_be_drawn_where_runs_go_end_the_command_with_2(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    done = run_command("--preflight", "--set", "storage.path=taken/runs", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "data.generated cannot be drawn below storage.path: Not a directory" in done.stderr


def test_an_assignment_sets_a_field_and_one_detectron2_key() -> None:
    experiment = load_experiment(
        DEFAULT_CONFIG, ["trials.world_sizes=[4, 8]", "model.overrides.SOLVER.BASE_LR=0.5", "protocol.target_box_ap=1"]
    )
    assert experiment.trials.world_sizes == [4, 8]
    assert experiment.model.overrides["SOLVER.BASE_LR"] == 0.5
    assert experiment.protocol.target_box_ap == 1


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["data.coco2017=true"], {"coco2017": True}),
        (["data.coco={train_annotations: a, train_images: b, val_annotations: c, val_images: d}"], {"coco": "a"}),
        ([f"data.coco.{name}=x" for name in ("train_annotations", "train_images", "val_annotations", "val_images")],
         {"coco": "x"}),
        (["data.coco2017=true", "data.generated.num_train=8"], {"generated": 8}),
        (["data.coco2017=false"], {"generated": 256}),
    ],
)  # fmt: skip
def test_of_the_data_sources_the_one_set_last_replaces_the_others(
    assignments: list[str], expected: dict[str, object]
) -> None:
    data = load_experiment(DEFAULT_CONFIG, assignments).data
    found: dict[str, object] = {"coco2017": True} if data.coco2017 else {}
    found |= {"coco": str(data.coco.train_annotations)} if data.coco else {}
    found |= {"generated": data.generated.num_train} if data.generated else {}
    assert found == expected


def test_a_batch_set_for_each_worker_replaces_the_files_batch() -> None:
    experiment = load_experiment(DEFAULT_CONFIG, ["trials.batch_per_worker=3", "trials.scaling=weak"])
    assert experiment.trials.batch_per_worker == 3 and "SOLVER.IMS_PER_BATCH" not in experiment.model.overrides


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("storage", {"checkpoint_period": "auto", "checkpoint_period_iterations": 5}, "leave checkpoint_period_iter"),
        ("storage", {"checkpoint_period": "sometimes"}, "storage.checkpoint_period"),
        ("storage", {"checkpoint_period": 100}, "storage.checkpoint_period"),
        ("faults", {"mtbf_hours": 0}, "faults.mtbf_hours"),
        ("faults", {"mtbf_hours": float("inf")}, "faults.mtbf_hours"),
    ],
)
def test_periods_of_checkpoints_that_make_no_sense_are_refused(
    part: str, given: dict[str, object], message: str
) -> None:
    values = {**tiny_experiment(), part: given}
    with pytest.raises(SpecError, match=message):
        parse_experiment(values, "x")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"faults": {"standby": "always"}}, "faults.standby"),
        ({"faults": {"standby": True, "max_failures": 0}}, "standby: true has no effect"),
        ({"faults": {"standby": True, "restart_on": []}}, "standby: true has no effect"),
        ({"faults": {"standby": True}, "protocol": {"kind": "throughput", "iterations": 4}}, "set it to auto"),
        ({"faults": {"standby": True}, "resources": {"device": "cuda"}}, "is for CPUs so far"),
    ],
)
def test_workers_that_wait_for_a_failure_are_refused_where_they_help_nobody(
    parts: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_experiment({**tiny_experiment(), **parts}, "x")


def test_a_period_set_in_epochs_replaces_the_one_in_iterations_but_a_file_must_not_hold_both() -> None:
    protocol = load_experiment(DEFAULT_CONFIG, ["protocol.eval_period_epochs=1"]).protocol
    assert (protocol.eval_period_epochs, protocol.eval_period_iterations) == (1, None)
    both = {"eval_period_epochs": 1, "eval_period_iterations": 5}
    with pytest.raises(SpecError, match="give eval_period_iterations or eval_period_epochs, not both"):
        parse_experiment(tiny_experiment(protocol=both), "x")


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(SpecError, match="not valid YAML"):
        load_experiment(path)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(SpecError, match="must hold a mapping"):
        load_experiment(path)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_experiment(tiny_experiment(name="a b", nonsense=1), "x")
    assert "name:" in str(caught.value) and "nonsense: unknown key" in str(caught.value)


def test_a_misspelt_key_ends_the_command_with_2_and_the_right_spelling(tmp_path: Path) -> None:
    done = run_command("--set", "trials.world_size=[1]", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'world_sizes'?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("caf\udce9.yaml",), ("--output", "caf\udce9"), ("--resume", "caf\udce9")])
def test_a_name_that_is_not_utf_8_is_refused_before_training(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_command(*arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and f"{tmp_path}/caf" in done.stderr
    assert r"caf\udce9" in done.stderr and "is not UTF-8" in done.stderr


@pytest.mark.parametrize("argument", ["--help", "--dry-run"])
def test_a_quick_answer_imports_nothing_heavy(argument: str) -> None:
    script = (
        "import runpy, sys; sys.argv = ['run', sys.argv[1]]\n"
        "try: runpy.run_module('orchestrator.run', run_name='__main__')\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'detectron2', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("protocol.patience=true", "protocol.patience: a number is wanted, not true or false"),
        ("trials.world_sizes=[true]", "trials.world_sizes: a number is wanted, not true or false"),
        ("trials.seeds=[7, no]", "trials.seeds: a number is wanted, not true or false"),
        ("trials.concurrent=true", "trials.concurrent: a whole number from 1 on, or auto, is wanted"),
        ("reference_rows=[{name: A, world_size: true}]", "reference_rows.0.world_size: a number is wanted"),
        ("protocol.ema={decay:0.99}", "protocol.ema.decay:0.99: unknown key; YAML wants a space after a colon"),
    ],
)
def test_what_yaml_reads_otherwise_than_meant_is_refused_in_its_words(assignment: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        load_experiment(DEFAULT_CONFIG, [assignment])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_as_windows_writes_it_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes("name: x\r\ndescription: für später\r\ndata: {generated: {}}\r\n".encode(encoding))
    assert load_experiment(path).description == "für später"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: für".encode("latin-1"), "cannot be read: not UTF-8 text from byte 7 on; save it as UTF-8"),
        (b"\xff\xfen\0a", "cannot be read: not UTF-16 text: byte 4 of 5. Save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "cannot be read: a Git LFS pointer"),
        (b"\n", "must hold a mapping"),
    ],
)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(f"{path}: {words}")):
        load_experiment(path)


def test_the_plan_shows_what_a_trial_does_besides() -> None:
    assignments = ["trials.accumulate=2", "protocol.patience=5", "protocol.metric=mask_ap"]
    plain, plans = (
        expand(load_experiment(DEFAULT_CONFIG, values), Hardware(num_cpus=2), "/run", Path("/data"))
        for values in ([], assignments)
    )
    besides = "2 batches of each worker in a step, best by mask_ap, ends after 5 evaluations without improvement"
    assert plan_table(plans).caption == besides
    assert plan_table(plain).caption is None
