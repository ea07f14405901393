"""A trial's lines in the form of AI-Rank, and what its summary holds."""

import json
import re

from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling import scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.report.airank import airank_log, airank_table, system_information, write_airank, write_airank_summary
from tests.builders.trials import TrialBuilder, plan, trained


def _log(made: TrialBuilder) -> list[str]:
    return airank_log(made.trial, made.events, trial_result(made.trial, made.events)).splitlines()


def _keys(lines: list[str]) -> list[str]:
    return [re.split(r"[:,]", line.split(" ", 2)[2])[0] for line in lines]


def test_the_lines_come_in_the_order_of_the_rules():
    assert _keys(_log(trained())) == [
        "load_data", "test_begin", "eval_accuracy", "eval_accuracy", "target_quality_time", "test_finish",
        "total_use_time", "avg_ips",
    ]  # fmt: skip


def test_every_line_has_its_unix_time_and_none_goes_back():
    lines = _log(trained())
    times = [float(line.split(" ")[1]) for line in lines]
    assert all(re.match(r"AI-Rank-log \d{10}\.\d{3} \S", line) for line in lines)
    assert times == sorted(times)


def test_the_figures_are_the_seed_clocks():
    lines = _log(trained())
    # The seed clock starts at 10: the target is met at 27, the run ends at 28; 24 images in 6.4 s.
    assert lines[4].endswith("target_quality_time:17.000sec")
    assert lines[6].endswith("total_use_time:18.000sec")
    assert lines[7].endswith("avg_ips:3.75images/sec")
    assert lines[3].endswith("eval_accuracy:box_ap 55.0000 mask_ap 46.0000, total_epoch_cnt:4")


def test_a_target_that_was_not_met_has_no_line():
    assert "target_quality_time" not in _keys(_log(trained(target_mask_ap=99.0)))


def test_a_trial_that_broke_off_has_no_finish():
    made = trained()
    made.events = [e for e in made.events if e.kind != "loop_finished"]
    assert _keys(_log(made))[-1] == "target_quality_time"


def test_a_trial_that_never_began_has_no_lines():
    made = TrialBuilder(plan())
    made.started()
    made.ended(5.0, "FAILED", "no such data")
    assert _log(made) == []


def test_the_checksum_is_of_the_training_annotations(tmp_path):
    (tmp_path / "train.json").write_bytes(b"{}")
    made = trained()
    trial = plan(train=made.trial.train.__class__("t", str(tmp_path / "train.json"), ""))
    text = airank_log(trial, made.events, trial_result(trial, made.events))
    assert "checksum:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a" in text
    assert "checksum:unknown" in _log(made)[0]


def test_what_is_not_known_of_a_machine_is_null():
    made = trained()
    system = system_information(made.trial, made.events, trial_result(made.trial, made.events))
    assert system["accelerator_name"] == "Test CPU" and system["accelerator_memory_capacity"] is None
    assert system["accelerators_per_node"] == 2 and system["number_of_nodes"] == 1
    assert system["host_memory_capacity"] is None


def test_both_files_are_in_the_trials_folder(tmp_path):
    made = trained()
    log, system = write_airank(made.trial, made.events, trial_result(made.trial, made.events), tmp_path / "t")
    assert log.read_text().startswith("AI-Rank-log") and json.loads(system.read_text())["framework"] == "detectron2"


def test_the_summary_table_has_the_rules_columns(tmp_path):
    trials = [trial_result(made.trial, made.events) for made in (trained(),)]
    result = ExperimentResult(
        experiment="x", status="FINISHED", started="now", trials=trials, scaling=scaling_rows(trials)
    )
    assert airank_table(result).splitlines()[2] == "| 2 | 17 | 3.75 | box ap: 55.00 mask ap: 46.00 | 1.00 |"
    assert write_airank_summary(result, tmp_path).name == "ai_rank.md"
