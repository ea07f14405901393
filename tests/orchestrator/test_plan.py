"""Trials and their schedules: detectron2's own scaling rule, the seed's protocols to the letter."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.detectron_config import default_values, model_value, zoo_path
from orchestrator.experiment.plan import Hardware, expand, generated_root
from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.references import with_references
from orchestrator.experiment.run_dir import new_run_dir
from orchestrator.experiment.schedule import scaled_solver
from orchestrator.experiment.spec import CONFIGS, Experiment, SpecError
from tests.builders.commands import run_command
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from trainers.contract.plan import ADDED_CONFIG_KEYS, TrialPlan

NOBODY = "~nobody-of-this-name/x.yaml"


def load(**changes: object) -> Experiment:
    return parse_experiment(tiny_experiment(**changes), "test")


def plans(experiment: Experiment, hardware: Hardware = Hardware()) -> list[TrialPlan]:  # noqa: B008 - frozen
    return expand(experiment, hardware, "/runs/x", Path("/data"))


def test_the_defaults_read_from_detectron2s_source_are_those_of_its_config() -> None:
    from detectron2.config import CfgNode, get_cfg

    def flat(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [(prefix + key, value)]

    assert default_values() == dict(flat(get_cfg())) | ADDED_CONFIG_KEYS


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16, 32])
def test_weak_scaling_is_what_detectron2_computes(world_size: int) -> None:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer

    config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.TEST.EVAL_PERIOD = 7500
    theirs = DefaultTrainer.auto_scale_workers(cfg, world_size)
    experiment = load(
        model={"config": config},
        trials={"reference_world_size": 8},
        protocol={"eval_period_iterations": 7500},
        storage={},
    )
    ours = scaled_solver(experiment, world_size, "weak", None)
    assert ours.global_batch_size == theirs.SOLVER.IMS_PER_BATCH
    assert ours.base_lr == theirs.SOLVER.BASE_LR
    assert ours.max_iter == theirs.SOLVER.MAX_ITER
    assert ours.steps == tuple(theirs.SOLVER.STEPS)
    assert ours.warmup_iters == theirs.SOLVER.WARMUP_ITERS
    assert ours.eval_period == theirs.TEST.EVAL_PERIOD
    assert ours.checkpoint_period == theirs.SOLVER.CHECKPOINT_PERIOD


def test_strong_scaling_keeps_the_global_batch_and_the_schedule() -> None:
    experiment = load(trials={"world_sizes": [1, 2, 4], "scaling": "strong"})
    solvers = [plan.solver for plan in plans(experiment)]
    assert len(solvers) == 3 and len(set(solvers)) == 1


def test_a_batch_that_does_not_divide_names_the_world_size_and_the_hint() -> None:
    with pytest.raises(SpecError, match="a batch of 4 does not divide among 3 workers"):
        plans(load(trials={"world_sizes": [3], "scaling": "strong"}))


def test_trials_are_every_recipe_scaling_world_size_and_seed_under_names_of_their_own() -> None:
    experiment = load(
        trials={
            "world_sizes": [1, 2],
            "scaling": "both",
            "seeds": [0, 1],
            "recipes": ["reference", "fast"],
            "reference_world_size": 1,
        }
    )
    names = [plan.name for plan in plans(experiment)]
    assert len(names) == len(set(names)) == 16
    assert {"reference-1xcpu-weak-seed0", "fast-2xcpu-strong-seed1"} < set(names)


def test_the_first_seed_protocol_is_to_the_letter() -> None:
    (plan,) = plans(load_experiment(CONFIGS / "seed_1gpu_throughput.yaml"), Hardware(num_gpus=1, num_cpus=16))
    solver = plan.solver
    assert (plan.world_size, plan.device, plan.recipe_name) == (1, "cuda", "reference")
    assert (solver.global_batch_size, solver.base_lr, solver.max_iter) == (2, 0.00125, 5000)
    assert (solver.steps, solver.warmup_iters, plan.protocol) == ((60000, 80000), 1000, "throughput")
    assert plan.weights == "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "the config's own"


def test_the_second_seed_protocol_is_to_the_letter() -> None:
    (plan,) = plans(load_experiment(CONFIGS / "seed_8gpu_time_to_train.yaml"), Hardware(num_gpus=8, num_cpus=80))
    solver = plan.solver
    assert (plan.world_size, plan.batch_per_worker, plan.recipe_name) == (8, 2, "reference")
    assert (solver.global_batch_size, solver.base_lr, solver.max_iter) == (16, 0.02, 90000)
    assert (solver.steps, solver.warmup_iters, solver.eval_period) == ((60000, 80000), 1000, 7500)
    assert (plan.target_box_ap, plan.target_mask_ap, plan.stop_at_target) == (37.7, 33.9, False)


@pytest.mark.shared
def test_the_resolved_config_of_the_second_protocol_is_the_seeds_own(shared_data: Path) -> None:
    import ast

    import yaml

    from trainers.mask_rcnn import build_config

    text = (shared_data / "seed_logs" / "GPUx8_time2train_ips.log").read_text(encoding="utf-8")
    dumped = text.split("Running with full config:\n")[1].split("\n[04/01")[0]
    (plan,) = plans(load_experiment(CONFIGS / "seed_8gpu_time_to_train.yaml"), Hardware(num_gpus=8, num_cpus=80))
    ours = build_config(plan)
    exceptions = {
        "OUTPUT_DIR",  # where the run is kept
        "SEED",  # -1 draws a random one; ours is named, so that the run can be repeated
        "SOLVER.WEIGHT_DECAY_BIAS",  # None in today's detectron2: the value of WEIGHT_DECAY, which is the seed's
    }
    compared = 0

    def compare(theirs: dict[str, object], node: dict[str, object], prefix: str) -> None:
        nonlocal compared
        for key, value in theirs.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                compare(value, node[key], f"{name}.")  # type: ignore[arg-type]
            elif name not in exceptions:
                if isinstance(value, str) and value.startswith("("):
                    value = ast.literal_eval(value)
                mine = node[key]
                if isinstance(value, list | tuple):
                    value, mine = json.loads(json.dumps(value)), json.loads(json.dumps(mine))
                assert mine == (value if value is not None else ""), name
                compared += 1

    compare(yaml.safe_load(dumped), ours, "")
    assert compared > 150


@pytest.mark.parametrize(
    "config", ["COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"]
)
def test_solver_figures_are_read_from_the_model_zoo_as_detectron2_reads_them(config: str) -> None:
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(config)
    experiment = load(model={"config": config})
    for key in (
        "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS",
        "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE", "DATALOADER.NUM_WORKERS", "MODEL.META_ARCHITECTURE",
    ):  # fmt: skip
        section, name = key.split(".")
        assert model_value(experiment, key) == cfg[section][name], key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "COCO-InstanceSegmentation/mask_rcnn_R50_FPN_1x.yaml",
            "did you mean COCO-InstanceSegmentation/mask_rcnn_R_50",
        ),
        ("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py", "would run code"),
        ("../../../etc/passwd.yaml", "no such file or model zoo config"),
    ],
)
def test_a_model_config_that_is_not_one_is_refused(config: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        zoo_path(config)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"winogrd": True}, "unknown winogrd; known: .*winograd"),
        ({"overlapped_evaluation": "maybe"}, "switches.overlapped_evaluation: .*given: 'maybe'"),
        ({"evaluation_batch": True}, "switches.evaluation_batch: a number is wanted, not true or false"),
        ({"mapper": "faster"}, "switches.mapper: .* 'detectron2', 'exact' or 'fast' .*given: 'faster'"),
    ],
)
def test_a_switch_that_is_not_one_or_cannot_have_the_value_is_refused(
    switches: dict[str, object], message: str
) -> None:
    values = tiny_experiment()
    values["trials"] = {**values.get("trials", {}), "switches": switches}
    with pytest.raises(SpecError, match=message):
        plans(parse_experiment(values, "test"))


def test_an_evaluation_period_in_epochs_becomes_iterations() -> None:
    experiment = load(protocol={"kind": "time_to_train", "eval_period_epochs": 2})
    (plan,) = plans(experiment)
    assert plan.solver.eval_period == 8  # 2 epochs x 16 images / batch 4


def test_an_epoch_is_as_long_as_the_sampler_makes_it() -> None:
    def epochs(**overrides: object) -> Experiment:
        model = {"weights": "", "overrides": {**TINY_OVERRIDES, **overrides}}
        return load(model=model, protocol={"kind": "time_to_train", "eval_period_epochs": 2})

    subset = {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO": 0.5}
    (plan,) = plans(epochs(**subset))
    assert plan.solver.eval_period == 4  # 2 epochs x 8 images / batch 4
    with pytest.raises(SpecError, match="RepeatFactorTrainingSampler makes epochs of another length"):
        plans(epochs(**{"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}))


def test_a_throughput_trial_runs_the_same_iterations_at_every_world_size() -> None:
    experiment = load(
        trials={"world_sizes": [1, 2, 4], "scaling": "weak", "reference_world_size": 2},
        protocol={"kind": "throughput", "iterations": 50},
    )
    assert [plan.solver.max_iter for plan in plans(experiment)] == [50, 50, 50]


def test_a_plan_survives_json() -> None:
    (plan,) = plans(load())
    assert TrialPlan.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_dry_run_prints_the_plan_of_every_trial_and_makes_nothing(tmp_path: Path) -> None:
    done = run_command("--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [plan["world_size"] for plan in json.loads(done.stdout)] == [1, 2]
    assert list(tmp_path.iterdir()) == []
    shown = run_command("--dry-run", cwd=tmp_path).stdout
    for words in ("fast-1xcpu", "fast-2xcpu", "sqlite:///mlflow.db", str(tmp_path / "runs" / "demo")):
        assert words in shown
    shown = run_command("--dry-run", cwd=tmp_path, MLFLOW_TRACKING_URI="http://ada:secret@host").stdout
    assert "tracked in http://host as" in shown


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("storage", {"path": NOBODY}),
        ("storage", {"checkpoints": NOBODY}),
        ("data", {"coco": {f"{a}_{b}": NOBODY for a in ("train", "val") for b in ("annotations", "images")}}),
        ("model", {"config": NOBODY}),
        ("model", {"weights": NOBODY}),
        ("prediction", NOBODY),
        ("reference_files", [NOBODY]),
    ],
)
def test_a_path_below_the_home_of_nobody_is_refused_with_its_field(place: str, value: object) -> None:
    experiment = load(**{place: value})
    with pytest.raises(SpecError, match=rf"^{place}.*: {NOBODY}: ~nobody-of-this-name is no user's home folder here"):
        expand(with_references(experiment), Hardware(), str(new_run_dir(experiment, None)), generated_root(experiment))


def test_checkpoints_go_below_the_folder_that_is_meant() -> None:
    here = (("~/c", Path.home() / "c"), ("c", Path.cwd() / "c"), ("file:///mnt/a%20b#1", "/mnt/a b#1"))
    for given, meant in (*here, ("s3://c", "s3://c")):
        (plan,) = plans(load(storage={"checkpoints": given}))
        assert plan.checkpoint_dir == f"{meant}/tiny/x/{plan.name}/checkpoints"


@pytest.mark.parametrize(
    ("batch", "world_size", "expected"),
    [(16, 1, (16, 0.02, 90000, 60000)), (2, 8, (16, 0.02, 90000, 60000)), (4, 1, (4, 0.005, 360000, 240000))],
)
def test_a_batch_for_each_worker_takes_the_learning_rate_and_schedule_with_it(
    batch: int, world_size: int, expected: tuple[int, float, int, int]
) -> None:
    model = {"config": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"}
    trials = {"world_sizes": [world_size], "batch_per_worker": batch}
    (plan,) = plans(load(model=model, trials=trials, protocol={"kind": "time_to_train"}, storage={}))
    solver = plan.solver
    found = (solver.global_batch_size, solver.base_lr, solver.max_iter, solver.steps[0])
    assert found == pytest.approx(expected)


def test_with_a_batch_for_each_worker_numbers_that_are_given_are_for_the_smallest_world_size() -> None:
    model = {"overrides": {"SOLVER.BASE_LR": 0.1, "SOLVER.MAX_ITER": 800, "SOLVER.STEPS": [600]}}
    trials = {"world_sizes": [2, 4], "batch_per_worker": 3}
    small, large = (plan.solver for plan in plans(load(model=model, trials=trials, storage={})))
    assert (small.global_batch_size, small.base_lr, small.max_iter, small.steps) == (6, 0.1, 800, (600,))
    assert (large.global_batch_size, large.base_lr, large.max_iter, large.steps) == (12, 0.2, 400, (300,))


@pytest.mark.parametrize(
    ("trials", "overrides", "words"),
    [
        ({"batch_per_worker": 2, "scaling": "strong"}, {}, "scaling must be weak"),
        ({"batch_per_worker": 2}, {"SOLVER.IMS_PER_BATCH": 4}, "IMS_PER_BATCH, not both"),
        ({"batch_per_worker": 0}, {}, "greater than or equal to 1"),
    ],
)
def test_a_batch_for_each_worker_that_contradicts_another_field_is_refused(
    trials: dict[str, object], overrides: dict[str, object], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        load(trials=trials, model={"overrides": overrides})
