"""Figures by class: the table, its curves and confusions, for three classes, eighty, and twelve hundred."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.figures.records import Evaluation
from orchestrator.report import page
from orchestrator.report.class_plots import (
    MAX_MATRIX,
    confusion_matrix,
    f1_over_score,
    matrix_classes,
    precision_recall,
)
from orchestrator.report.evaluation import MAX_CONFUSIONS, MAX_CURVES, ClassFigures, class_figures, read_details
from orchestrator.report.page import html_page
from orchestrator.runlog.folder import RunFolder, TrialEvents, read_run_folder
from tests.builders.evaluations import leave_details, made_curve, made_details
from tests.builders.run_folder import made_experiment, make_run
from trainers.contract.evaluation_details import ClassCurve, Confusion, EvaluationDetails

THREE = EvaluationDetails(
    iteration=400,
    classes=("cat", "dog", "unseen"),
    curves={
        "box": (
            ClassCurve("cat", 4, (1.0,) * 51 + (0.5,) * 25, (0.9,) * 51 + (0.6,) * 25),
            made_curve("dog", 2, 0.0),
            made_curve("unseen", 0, 0.0),
        )
    },
    confusion=Confusion(0.5, 0.5, ((0, 0, 2), (0, 1, 1), (0, 3, 1), (1, 0, 1), (1, 3, 1), (3, 1, 7))),
    worst_images=(),
    sample_ids=(),
    detections=(),
)
"""Of 4 cats 2 are found, 1 is taken for a dog, 1 is missed; of 2 dogs 1 is taken for a cat, 1 is missed."""

AP = {"box_ap/cat": 40.0, "box_ap/dog": 0.0, "box_ap/unseen": None}


def shown(folder: Path, details: EvaluationDetails, trial: TrialEvents, **fields: Any) -> ClassFigures:
    values = {**leave_details(folder, details), **fields}
    record = trial.trial.model_copy(update={"evaluations": [Evaluation(iteration=details.iteration, **values)]})
    found = class_figures(replace(trial, trial=record, folder=folder), "run-1")
    assert found
    return found


def one_trial(folder: Path, **more: Any) -> RunFolder:
    experiment = made_experiment(trials={"world_sizes": [1]})
    return read_run_folder(make_run(folder / "run", experiment, **more))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> TrialEvents:
    return one_trial(tmp_path_factory.mktemp("made")).trials[0]


def test_a_class_has_its_ap_its_errors_and_its_best_threshold(tmp_path: Path, trial: TrialEvents) -> None:
    found = shown(tmp_path, THREE, trial, class_ap=AP)
    assert found.headings == [
        "Box AP", "Objects", "Found", "Mistaken", "Missed", "False", "Best F1", "at score",
    ]  # fmt: skip
    texts = {name: [text for text, _ in columns] for name, columns in found.rows}
    # F1 at recall 0.5 is 2 x 1 x 0.5 / 1.5; at recall 0.75 it is 2 x 0.5 x 0.75 / 1.25 = 0.6.
    assert texts == {
        "cat": ["40.00", "4", "2", "1", "1", "1", "0.67", "0.90"],
        "dog": ["0.00", "2", "0", "1", "1", "8", "–", "–"],
        "unseen": ["–", "0", "0", "0", "0", "0", "–", "–"],
    }
    assert [name for name, _ in found.rows] == ["cat", "dog", "unseen"], "the highest AP first, unknown ones last"
    assert found.confusions == [("cat", "dog", ("1", 1), ("25.0 %", 0.25)), ("dog", "cat", ("1", 1), ("50.0 %", 0.5))]
    assert found.choices == [("all", "all classes, mean"), ("0", "cat"), ("1", "dog")]


def test_curves_are_those_of_each_class_and_their_mean() -> None:
    (axes,) = precision_recall(THREE, range(3)).axes
    lines = {line.get_gid(): line for line in axes.lines}
    assert set(lines) == {"box-choice-0", "box-choice-all"}, "no curve for a class that is never found"
    cat, mean = lines["box-choice-0"], lines["box-choice-all"]
    assert cat.get_xydata().tolist() == [[0, 1], [0.5, 1], [0.51, 0.5], [0.75, 0.5]], "only corners"
    assert mean.get_ydata()[:2].tolist() == [0.5, 0.5], "dogs are never found, unseen ones do not count"
    assert mean.get_xydata()[-1].tolist() == [1, 0]
    (axes,) = f1_over_score(THREE, [0]).axes
    f1 = {line.get_gid(): line.get_xydata() for line in axes.lines}
    at = {round(x, 2): y for x, y in f1["box-choice-all"]}
    assert at[0.6] == pytest.approx(0.3) and at[0.91] == 0
    assert max(f1["box-choice-0"][:, 1]) == pytest.approx(2 / 3)


def test_a_matrix_has_the_background_and_of_many_classes_those_that_are_mistaken() -> None:
    (axes,) = confusion_matrix(THREE).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog", "unseen", "nothing"]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "1", "1", "1", "2", "7"]
    many = replace(
        THREE,
        classes=tuple(f"class {n}" for n in range(80)),
        confusion=Confusion(0.5, 0.5, ((70, 71, 5), (3, 80, 900), (9, 9, 4))),
    )
    chosen = matrix_classes(many)
    assert len(chosen) == MAX_MATRIX and {70, 71} <= set(chosen) and chosen == sorted(chosen)


def test_twelve_hundred_classes_make_a_page_that_can_be_mailed(tmp_path: Path) -> None:
    html = html_page([one_trial(tmp_path, classes=[f"class {n}" for n in range(1203)])], tmp_path)
    assert html.count("<tr><td>class ") >= 1203 and len(html) < 4_000_000
    assert len(re.findall(r'id="run-1-recall-box-choice-', html)) <= MAX_CURVES + 1
    confusions = re.search(r'id="confusions-1".*?</table>', html, re.S)
    assert confusions and confusions.group().count("<tr>") <= MAX_CONFUSIONS + 1


def test_names_of_classes_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>", "a/b $x$ {{ 7 }}", "字"]
    html = html_page([one_trial(tmp_path, classes=evil)], tmp_path)
    assert html.count("<script>") == 1 and "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in html
    assert "<td>a/b $x$ {{ 7 }}</td>" in html and "<td>字</td>" in html


def test_without_the_file_there_is_ap_alone(tmp_path: Path, trial: TrialEvents) -> None:
    found = shown(tmp_path, THREE, trial, class_ap=AP, details_file="evaluation/0000999.json")
    assert found.headings == ["Box AP"] and len(found.rows) == 3 and not found.choices and found.matrix is None


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("confusion", {"iou": 0.5, "score": 0.5, "counts": [[0, 1, 2], [99, 0, 1]]}),
        ("curves", {"box": [{"name": "cat", "num_objects": 1, "precision": [1.0, "x"], "scores": [0.5, 0.4]}]}),
        ("curves", {"unknown": []}),
        ("classes", []),
        ("detections", [{"image_id": 1}]),
    ],
)
def test_a_damaged_file_of_details_costs_a_report_nothing_else(
    tmp_path: Path, trial: TrialEvents, part: str, value: Any
) -> None:
    run = read_run_folder(Path(shutil.copytree(trial.folder.parent, tmp_path / "run")))
    (file,) = run.trials[0].folder.glob("evaluation/*240.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    classes, missing = page._classes(run, "run-1")
    samples, _, no_pictures = page._samples(run)
    assert bool(classes) != missing.startswith("No figures by class: ")
    assert bool(samples.pictures) != bool(no_pictures)
    assert no_pictures if part == "detections" else missing


def test_an_older_run_says_that_it_has_no_figures_by_class(tmp_path: Path) -> None:
    html = html_page([one_trial(tmp_path, old=True)], tmp_path)
    assert "No evaluation has figures by class." in html
    assert "no validation loss is known (protocol.validation_loss computes it)" in html


def test_more_than_three_runs_are_compared_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_trial(tmp_path)
    html = html_page([run] * 2, tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert {"classes-1", "classes-2"} <= set(ids) and len(ids) == len(set(ids))
    monkeypatch.setattr(page, "MAX_DETAILED", 1)
    html = html_page([run] * 2, tmp_path)
    assert 'id="classes-1"' not in html and html.count("A page of more than 3 runs leaves out") == 2


def test_details_are_read_from_the_trial_s_folder_alone(tmp_path: Path) -> None:
    leave_details(tmp_path / "trial", replace(THREE, iteration=1))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "other.json").write_text(THREE.to_json())
    assert read_details(tmp_path / "trial", "evaluation/0000001.json").iteration == 1
    for name in ("../evaluation/other.json", str(tmp_path / "evaluation/other.json"), "", "/etc/passwd"):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            read_details(tmp_path / "trial", name)


def test_details_survive_a_round_trip(tmp_path: Path, trial: TrialEvents) -> None:
    assert trial.plan
    details = made_details(trial.plan.val, 7, 0.5, random.Random(0))  # noqa: S311 - nothing secret is drawn
    leave_details(tmp_path, details)
    assert read_details(tmp_path, "evaluation/0000007.json") == details
