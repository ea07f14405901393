"""Checks an experiment's detectron2 keys, in `model.overrides` and in YAML files: each is honoured or reported.

Its targets are checked with them.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.config_keys import (
    ADDED_ELSEWHERE,
    CHOICES,
    CONDITIONS,
    REPLACED,
    class_of,
    numbers_of,
    value_hint,
    value_problem,
)
from orchestrator.experiment.detectron_config import default_values, file_settings, given_setting, model_value
from orchestrator.findings import FindingList
from orchestrator.preflight.scales import check_scales
from trainers.recipes import RECIPES

if TYPE_CHECKING:
    from orchestrator.experiment.detectron_config import Setting
    from orchestrator.experiment.spec import Experiment
    from orchestrator.findings import Finding


def check_settings(experiment: Experiment) -> list[Finding]:
    """Checks keys, values and effect of every setting that the experiment or a YAML file of its own gives, and targets.

    A key without effect here is an error in `model.overrides`, and a warning in a file, which may come from elsewhere,
    unless its value is detectron2's default or what is done anyway. Files of the model zoo are trusted but for what
    cannot be trained here, such as a panoptic model.

    Raises:
        SpecError: There is no such model config, or it cannot be read.
    """
    findings = FindingList()
    files = file_settings(experiment.model.config)
    overrides = [setting for key in experiment.model.overrides if (setting := given_setting(experiment, key))]
    unknown: set[str] = set()
    for setting in (*overrides, *(each for each in files.values() if not each.in_zoo)):
        if _check_key(setting, unknown, findings) and _check_value(setting, findings):
            _check_effect(experiment, setting, findings)
    _check_conditions(experiment, overrides, findings)
    _check_schedule(experiment, findings)
    for key in CHOICES:
        if (chosen := given_setting(experiment, key)) and chosen.in_zoo:
            _check_value(chosen, findings)
    _check_learning_rate(experiment, findings)
    check_scales(experiment, findings)
    return findings.to_list()


def _place(setting: Setting) -> tuple[str, str]:
    """File and entry of a finding about a setting."""
    if setting.file is None:
        return "model.overrides", setting.key
    return str(setting.file), f"line {setting.line}: {setting.key}"


def _check_key(setting: Setting, unknown: set[str], findings: FindingList) -> bool:
    """Whether detectron2 has a key; of a group that it does not have, one key is reported and the group remembered."""
    key, known = setting.key, default_values()
    if key in known:
        return True
    place = _place(setting)
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside and setting.file is not None and setting.value == {}:
        return False
    if inside:
        example = inside[0] if setting.file is None else f"{key.split('.')[-1]}: {{{inside[0][len(key) + 1 :]}: …}}"
        what = f"a group of keys, not a key; its value is {setting.value!r}"
        findings.error("config_key", *place, what, f"Give its keys one by one, such as {example}")
    elif '"' in key:
        what, hint = "a key with dots, which detectron2 does not read in files", "Nest it: SOLVER: {BASE_LR: 0.01}"
        findings.error("config_key", *place, what, hint)
    elif group := _unknown_group(key):
        if group in known:
            findings.error("config_key", *place, f"{group} is a key, not a group of keys", "Give it a value of its own")
        elif group not in unknown:
            findings.error("config_key", *place, f"detectron2 has no {group} and no keys in it", _meant(group))
        unknown.add(group)
    else:
        findings.error("config_key", *place, "detectron2 has no such key", _meant(key))
    return False


def _unknown_group(key: str) -> str | None:
    """The first part of a key's name that detectron2 has no group of keys for; None where only its end is unknown."""
    groups = [key[:dot] for dot, letter in enumerate(key) if letter == "."]
    return next((group for group in groups if not any(name.startswith(f"{group}.") for name in default_values())), None)


def _meant(key: str) -> str:
    """What to do about a key that detectron2 does not have."""
    if field := ADDED_ELSEWHERE.get(key.partition(".")[0]):
        return f"Leave it out and set {field}"
    parent, _, last = key.rpartition(".")
    parts = len(key.split("."))
    known = dict.fromkeys(".".join(name.split(".")[:parts]) for name in default_values())
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(last.upper(), siblings, n=1, cutoff=0.8)]
    near = near or [name for name in default_values() if name.rpartition(".")[2] == last.upper()]
    return f"Did you mean {' or '.join(near)}?" if near else "Leave it out; what other projects add is not known here"


def _check_value(setting: Setting, findings: FindingList) -> bool:
    problem = value_problem(setting.key, setting.value)
    if problem:
        findings.error("config_value", *_place(setting), problem, value_hint(setting.key, setting.value))
    return problem is None


def _check_effect(experiment: Experiment, setting: Setting, findings: FindingList) -> None:
    """Reports a setting that another one replaces, or that nothing here heeds."""
    key, value, is_override = setting.key, setting.value, setting.file is None
    kind, text = class_of(key)
    is_default = _plain(value) == _plain(default_values()[key])
    report = findings.error if is_override else findings.warning
    if kind == "honoured":
        for field in REPLACED.get(key, ()):
            ours = _field(experiment, field)
            if ours not in (None, value) and (is_override or not is_default):
                what = f"{value!r} has no effect: {field} is {ours!r} and replaces it"
                report("config_replaced", *_place(setting), what, f"Set {field}, or leave one of them out")
    elif is_default and (kind == "refused" or not is_override):
        return
    elif kind == "refused":
        report("config_refused", *_place(setting), f"{value!r} has no effect here: {text}", "Leave it out")
    elif value != _done_anyway(experiment).get(key):
        what = f"{value!r} has no effect here: {text} decides"
        report("config_mapped", *_place(setting), what, f"Leave it out and set {text}{_as_field(key, value)}")


def _plain(value: Any) -> Any:
    """A value with lists for tuples, as a dumped config has them."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _field(experiment: Experiment, path: str) -> Any:
    """A field of an experiment by its dotted name; None where a part of it is not given."""
    node: Any = experiment
    for name in path.split("."):
        node = getattr(node, name, None)
    return node


def _done_anyway(experiment: Experiment) -> dict[str, Any]:
    """What the experiment's own fields come to, as values of detectron2's keys; None where they have no such form."""
    trials, protocol = experiment.trials, experiment.protocol
    precisions = {str(trials.switches.get("precision", RECIPES[name].precision)) for name in trials.recipes}
    return {
        "MODEL.DEVICE": experiment.resources.device,
        "SOLVER.AMP.ENABLED": {"amp": True, "fp32": False}.get(precisions.pop()) if len(precisions) == 1 else None,
        "TEST.EVAL_PERIOD": None if protocol.eval_period_epochs else protocol.eval_period_iterations or 0,
        "SEED": trials.seeds[0] if len(trials.seeds) == 1 else None,
        "OUTPUT_DIR": experiment.storage.path,
        "TEST.EXPECTED_RESULTS": [],
    }


def _as_field(key: str, value: Any) -> str:
    """How a mapped key's value is written in our field, such as `=[7]`; "" where it has no such form."""
    forms = {
        "MODEL.DEVICE": f"={str(value).partition(':')[0]}",
        "SOLVER.AMP.ENABLED": "=amp" if value else "=fp32",
        "TEST.EVAL_PERIOD": f"={value or 'null'}",
        "SEED": f"=[{value}]" if value != -1 else "",
        "OUTPUT_DIR": f"={value}",
    }
    return forms.get(key, "")


def _check_conditions(experiment: Experiment, overrides: list[Setting], findings: FindingList) -> None:
    """Reports overrides that detectron2 itself does not use because of another key's value."""
    unused: dict[str, list[str]] = {}
    for key in (setting.key for setting in overrides):
        for start, (other, wanted) in CONDITIONS.items():
            if key.startswith(start) and key != other and model_value(experiment, other) not in wanted:
                unused[start] = [*unused.get(start, []), key]
                break
    for start, keys in unused.items():
        other, wanted = CONDITIONS[start]
        value = model_value(experiment, other)
        if value_problem(other, value) is None:
            needed = " or ".join(map(repr, wanted))
            what = f"no effect: detectron2 uses this only where {other} is {needed}, and it is {value!r}"
            hint = f"Leave out what has no effect, or set model.overrides.{other}={wanted[0]}"
            findings.warning("config_unused", "model.overrides", ", ".join(keys), what, hint)


def _check_schedule(experiment: Experiment, findings: FindingList) -> None:
    """Reports what the experiment asks for at iterations that it does not reach."""
    protocol, trials = experiment.protocol, experiment.trials
    reference = given_setting(experiment, "SOLVER.REFERENCE_WORLD_SIZE")
    if trials.scaling == "strong" and (trials.reference_world_size or (reference and reference.value)):
        what = "a reference world size has no effect: strong scaling scales nothing"
        hint = "Leave it out (SOLVER.REFERENCE_WORLD_SIZE too), or set trials.scaling=weak"
        findings.warning("config_unused", "trials.reference_world_size", "", what, hint)
    own = {
        name: setting
        for name in ("MAX_ITER", "STEPS", "WARMUP_ITERS")
        if (setting := given_setting(experiment, f"SOLVER.{name}")) and not setting.in_zoo
    }
    length = protocol.iterations or (own["MAX_ITER"].value if "MAX_ITER" in own else None)
    if length is None or any(value_problem(each.key, each.value) for each in own.values()):
        return
    wanted: dict[tuple[str, str], float] = {
        ("protocol.eval_period_iterations", ""): protocol.eval_period_iterations or 0
    }
    if protocol.kind == "throughput":
        if protocol.warmup_iterations >= length:
            what = f"no throughput is measured: it is that of the iterations after these, and the run has {length:,}"
            findings.warning("not_measured", "protocol.warmup_iterations", "", what, "Take fewer, or more iterations")
    else:
        wanted |= {_place(own[name]): max(numbers_of(own[name].value), default=0) for name in own if name != "MAX_ITER"}
    for place, iteration in wanted.items():
        if iteration > length:
            what = f"iteration {iteration:,} is not reached: the run has {length:,}"
            findings.warning("config_unused", *place, what, "Take a smaller number, or more iterations")


def _check_learning_rate(experiment: Experiment, findings: FindingList) -> None:
    """Reports a batch of the experiment's own with the learning rate that the model zoo has for another batch."""
    batch, rate = (given_setting(experiment, f"SOLVER.{name}") for name in ("IMS_PER_BATCH", "BASE_LR"))
    if batch is None or batch.in_zoo or rate is None or not rate.in_zoo or experiment.protocol.kind == "throughput":
        return
    zoos_batch = file_settings(str(rate.file)).get(batch.key)
    zoos_size = zoos_batch.value if zoos_batch else default_values()[batch.key]
    if value_problem(batch.key, batch.value) is None and batch.value != zoos_size:
        what = f"{batch.value} images, with the learning rate {rate.value} that {rate.file} has for {zoos_size}"
        hint = f"Set model.overrides.SOLVER.BASE_LR, by the linear rule to {rate.value * batch.value / zoos_size:g}"
        findings.warning("config_learning_rate", *_place(batch), what, hint)
