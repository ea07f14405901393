"""YAML files of a model: read as detectron2 reads them, with the line of every value, and nothing in them is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from orchestrator.experiment.config_keys import CHOICES, value_problem
from orchestrator.experiment.detectron_config import (
    config_files,
    config_for_workers,
    default_values,
    file_settings,
    zoo_folder,
    zoo_path,
)
from orchestrator.experiment.spec import SpecError
from trainers.mask_rcnn import ModelFile

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
ZOO = sorted(path.relative_to(zoo_folder()).as_posix() for path in zoo_folder().rglob("*.yaml"))


def write(folder: Path, **files: str) -> Path:
    """Writes `name.yaml` for each; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def detectron2s(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


def plain(value: object) -> object:
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def assert_read_alike(path: Path, cfg: CfgNode) -> None:
    """The driver's values are those of detectron2's config, and the worker's."""
    settings = file_settings(str(path))
    for key, default in default_values().items():
        node = cfg
        for part in key.split("."):
            node = node.get(part, default) if isinstance(node, dict) else node
        if key in settings:
            assert plain(settings[key].value) == plain(node), key
    worker = get_cfg()
    worker.merge_from_other_cfg(CfgNode(ModelFile.load_yaml_with_base(str(path))))
    assert worker == cfg


@pytest.mark.parametrize("config", ZOO)
def test_every_file_of_the_model_zoo_is_read_as_detectron2_reads_it(config: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(zoo_folder() / config), allow_unsafe=True)
    assert_read_alike(zoo_folder() / config, cfg)
    problems = {key for key, each in file_settings(config).items() if value_problem(key, each.value)}
    assert problems <= set(CHOICES), "only for what is not trained here"
    refused = any(name in config for name in ("panoptic", "Panoptic", "semantic", "rpn_R", "fast_rcnn"))
    assert bool(problems) == (refused and "faster_rcnn" not in config)


@pytest.mark.parametrize(
    "files",
    [
        {
            "own": "_BASE_: a.yaml\nSOLVER: {GAMMA: 0.3}\n",
            "a": f"_BASE_: {{zoo}}/{MASK_RCNN}\nSOLVER: {{GAMMA: 0.2}}\n",
        },
        {"own": "_BASE_: [a.yaml, b.yaml]\n", "a": f"_BASE_: {{zoo}}/{MASK_RCNN}\n", "b": "SOLVER: {GAMMA: 0.2}\n"},
        {"own": "_BASE_: ~/a.yaml\n", "a": f"_BASE_: '{{zoo}}/{MASK_RCNN}'\n"},
        {"own": "_BASE_: ../home/a.yaml\n", "a": "SOLVER: {STEPS: '(10, 20)', BASE_LR: 1e-3}\n"},
        {"own": "_BASE_: []\nVERSION: 2\nMODEL: {}\n"},
        {"own": "_BASE_: '{zoo}/Base-RetinaNet.yaml'\nMODEL: {RETINANET: {NUM_CLASSES: 3}}\n"},
        {"own": "A: &a {GAMMA: 0.5}\n".replace("A: &a", "SOLVER: &a") + "MODEL: {RPN: {LOSS_WEIGHT: 2.0}}\n"},
    ],
    ids=[
        "a chain",
        "a list of bases",
        "a base at home",
        "a base next door",
        "no base",
        "a base with code",
        "an anchor",
    ],
)
def test_a_file_with_bases_is_read_as_detectron2_reads_it(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = write(home, **{name: text.replace("{zoo}", str(zoo_folder())) for name, text in files.items()})
    cfg = get_cfg()
    # detectron2 would also run code in the user's own files; the worker does so in the zoo's only.
    cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)))
    assert_read_alike(path, cfg)


def test_the_last_of_several_bases_wins_and_each_value_knows_its_place(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        own="_BASE_: [a.yaml, b.yaml]\n\nSOLVER:\n  MAX_ITER: 7\n",
        a="SOLVER: {GAMMA: 0.1, MOMENTUM: 0.5}\n",
        b="\nSOLVER: {GAMMA: 0.2}\n",
    )
    settings = file_settings(str(path))
    places = {key: (each.value, each.file and each.file.name, each.line) for key, each in settings.items()}
    assert places == {
        "SOLVER.MAX_ITER": (7, "own.yaml", 4),
        "SOLVER.GAMMA": (0.2, "b.yaml", 2),
        "SOLVER.MOMENTUM": (0.5, "a.yaml", 1),
    }
    assert [file.name for file in config_files(str(path))] == ["a.yaml", "b.yaml", "own.yaml"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"own": "_BASE_: own.yaml\n"}, r"goes round in a circle: .*own.yaml -> .*own.yaml$"),
        ({"own": "_BASE_: a.yaml\n", "a": "_BASE_: [own.yaml]\n"}, r"circle: .*own.yaml -> .*a.yaml -> .*own.yaml$"),
        ({"own": "SOLVER: {}\n_BASE_: gone.yaml\n"}, r"own.yaml:2: _BASE_ gone.yaml: no such file: /.*gone.yaml"),
        ({"own": f"_BASE_: {'n' * 300}.yaml\n"}, "own.yaml:1: _BASE_ n+.yaml: no such file: "),
        ({"own": "_BASE_: https://host/a.yaml\n"}, r"own.yaml:1: _BASE_ https://host/a.yaml: configs are not fetched"),
        ({"own": "_BASE_: ~nobody-of-this-name/a.yaml\n"}, "own.yaml:1: _BASE_: ~nobody.* is no user's home folder"),
        ({"own": "_BASE_:\n"}, r"own.yaml:1: _BASE_ is None; give a path or a list of paths"),
        ({"own": "_BASE_: [a.yaml, 3]\n"}, r"own.yaml:1: _BASE_ is \['a.yaml', 3\]; give"),
        ({"own": "_BASE_: {a: b}\n"}, r"own.yaml:1: _BASE_ is {'a': 'b'}; give"),
        ({"own": ""}, "own.yaml: must hold a mapping"),
        ({"own": "- MODEL\n"}, "own.yaml: must hold a mapping"),
        ({"own": "MODEL: {A: [1}\n"}, "own.yaml:1: not valid YAML"),
        ({"own": "SOLVER: {GAMMA: 1.0}\nSOLVER: {MAX_ITER: 3}\n"}, "own.yaml:2: .*key SOLVER is given twice"),
        ({"own": "SOLVER:\n  GAMMA: 0.5\n  GAMMA: 0.6\n"}, "own.yaml:3: .*key GAMMA is given twice"),
        ({"own": "MODEL: &m {A: *m}\n"}, "own.yaml:1: not valid YAML"),
        ({"own": "MODEL: 2024-13-45\n"}, "own.yaml:1: not valid YAML: not a valid timestamp: '2024-13-45'"),
        (
            {"own": "MODEL: !!python/object/apply:os.mkdir [pwned]\n"},
            "own.yaml:1: not valid YAML: code .* is run in the installed",
        ),
        (
            {"own": "_BASE_: a.yaml\n", "a": "MODEL: !!python/object/apply:os.mkdir [pwned]\n"},
            "a.yaml:1: not valid YAML",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, **files)
    with pytest.raises(SpecError, match=message):
        file_settings(str(path))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "did you mean COCO-I.*/mask_rcnn_R_50_FPN_1x.yaml\\?"),
        ("mask_rcnn_R_50_FPN_3x", "did you mean COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml\\?"),
        ("mask_rcnn_R50_FPN_3x", "did you mean COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml\\?"),
        ("coco-instancesegmentation/mask_rcnn_r_50_fpn_3x.yaml", "did you mean COCO-I.*/mask_rcnn_R_50_FPN_3x.yaml\\?"),
        (
            "mask_rcnn_r_101_fpn_1x.yml",
            "mean LVISv0.5-.*/mask_rcnn_R_101_FPN_1x.yaml or LVISv1-.*_R_101_FPN_1x.yaml\\?",
        ),
        ("", "no such file or model zoo config: $"),
        ("n" * 300 + ".yaml", "no such file or model zoo config"),
        ("config.py", "a .py config would run code"),
    ],
)
def test_a_config_that_is_nowhere_is_named_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        file_settings(name)


def test_a_config_that_detectron2_could_not_decode_is_refused_before_it_tries(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes("SOLVER: {BASE_LR: 0.1}\n".encode("utf-16"))
    with pytest.raises(SpecError, match=r"^\S+own\.yaml: not UTF-8, which detectron2 needs; save it as UTF-8"):
        file_settings(str(path))


def test_a_folder_of_the_users_called_model_zoo_reaches_workers_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model_zoo").mkdir()
    path = write(tmp_path / "model_zoo", own=f"_BASE_: {zoo_folder()}/{MASK_RCNN}\n")
    assert config_for_workers("model_zoo/own.yaml") == str(path)


def test_a_local_file_of_a_zoo_configs_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_for_workers(MASK_RCNN) == MASK_RCNN
    monkeypatch.chdir(tmp_path)
    Path("COCO-InstanceSegmentation").mkdir()
    Path(MASK_RCNN).write_text("SOLVER: {GAMMA: 0.5}\n")
    assert config_for_workers(MASK_RCNN) == str(tmp_path / MASK_RCNN)
    assert file_settings(MASK_RCNN)["SOLVER.GAMMA"].value == 0.5


def test_a_file_of_the_zoo_is_known_to_workers_by_its_name_however_it_is_given() -> None:
    assert config_for_workers(str(zoo_folder() / "Misc" / ".." / MASK_RCNN)) == MASK_RCNN
    assert zoo_path("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml").is_file()


def test_the_worker_runs_no_code_of_a_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, own="_BASE_: a.yaml\n", a="MODEL: !!python/object/apply:os.mkdir [pwned]\n")
    with pytest.raises(yaml.YAMLError):
        ModelFile.load_yaml_with_base(str(path), allow_unsafe=True)
    assert not Path("pwned").exists()
