"""Checks an experiment's detectron2 keys, in `model.overrides` and in YAML files: each is honoured or reported."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.config_keys import CHOICES, CONDITIONS, REPLACED, class_of, value_hint, value_problem
from orchestrator.experiment.detectron_config import default_values, file_settings, given_setting, model_value
from orchestrator.findings import FindingList
from trainers.recipes import RECIPES

if TYPE_CHECKING:
    from orchestrator.experiment.detectron_config import Setting
    from orchestrator.experiment.spec import Experiment
    from orchestrator.findings import Finding


def check_settings(experiment: Experiment) -> list[Finding]:
    """Checks keys, values and effect of every setting that the experiment or a YAML file of its own gives.

    A key without effect here is an error in `model.overrides`, and a warning in a file, which may come from elsewhere,
    unless its value is detectron2's default or what is done anyway. Files of the model zoo are trusted but for what
    cannot be trained here, such as a panoptic model.

    Raises:
        SpecError: There is no such model config, or it cannot be read.
    """
    findings = FindingList()
    files = file_settings(experiment.model.config)
    overrides = [setting for key in experiment.model.overrides if (setting := given_setting(experiment, key))]
    for setting in (*overrides, *(each for each in files.values() if not each.in_zoo)):
        if _check_key(setting, findings) and _check_value(setting, findings):
            _check_effect(experiment, setting, findings)
    _check_conditions(experiment, overrides, findings)
    for key in CHOICES:
        if (chosen := given_setting(experiment, key)) and chosen.in_zoo:
            _check_value(chosen, findings)
    _check_learning_rate(experiment, findings)
    return findings.to_list()


def _place(setting: Setting) -> tuple[str, str]:
    """File and entry of a finding about a setting."""
    if setting.file is None:
        return "model.overrides", setting.key
    return str(setting.file), f"line {setting.line}: {setting.key}"


def _check_key(setting: Setting, findings: FindingList) -> bool:
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
    else:
        findings.error("config_key", *place, *_unknown(key))
    return False


def _unknown(key: str) -> tuple[str, str]:
    """What is wrong with a key that detectron2 does not have, and how to fix it."""
    known = set(default_values())
    groups = {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    parts = key.split(".")
    group = next((name for size in range(1, len(parts)) if (name := ".".join(parts[:size])) not in groups), None)
    parent, _, last = (group or key).rpartition(".")
    names = groups if group else known
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(last.upper(), siblings, n=1, cutoff=0.6)]
    if not near and not group:
        near = sorted(name for name in known if name.rpartition(".")[2] == last.upper())
    hint = f"Did you mean {near[0]}" if near else "Leave it out; what other projects add is not known here"
    return f"detectron2 has no such key{f': there is no {group}' if group else ''}", hint


def _check_value(setting: Setting, findings: FindingList) -> bool:
    problem = value_problem(setting.key, setting.value)
    if problem:
        findings.error("config_value", *_place(setting), problem, value_hint(setting.key, setting.value))
    return problem is None


def _check_effect(experiment: Experiment, setting: Setting, findings: FindingList) -> None:
    """Reports a setting that another one replaces, or that nothing here heeds."""
    key, value, is_override = setting.key, setting.value, setting.file is None
    kind, text = class_of(key)
    if kind == "honoured":
        ours = _field(experiment, REPLACED[key]) if key in REPLACED else None
        if is_override and ours is not None and ours != value:
            what = f"{value!r} has no effect: {REPLACED[key]} is {ours!r} and replaces it"
            findings.error("config_replaced", *_place(setting), what, f"Set {REPLACED[key]}, or leave one of them out")
        return
    if kind == "mapped" and value == _done_anyway(experiment).get(key):
        return
    if _plain(value) == _plain(default_values()[key]) and (kind == "refused" or not is_override):
        return
    report = findings.error if is_override else findings.warning
    if kind == "mapped":
        what = f"{value!r} has no effect here: {text} decides"
        report("config_mapped", *_place(setting), what, f"Leave it out and set {text}{_as_field(key, value)}")
    else:
        report("config_refused", *_place(setting), f"{value!r} has no effect here: {text}", "Leave it out")


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
    if value == default_values()[key]:
        return ""
    forms = {
        "MODEL.DEVICE": f"={value}",
        "SOLVER.AMP.ENABLED": "=amp",
        "TEST.EVAL_PERIOD": f"={value}",
        "SEED": f"=[{value}]",
        "OUTPUT_DIR": f"={value}",
    }
    return forms.get(key, "")


def _check_conditions(experiment: Experiment, overrides: list[Setting], findings: FindingList) -> None:
    """Reports overrides that detectron2 itself does not use because of another key's value."""
    unused: dict[tuple[str, Any], list[str]] = {}
    for start, (key, wanted) in CONDITIONS.items():
        if model_value(experiment, key) != wanted:
            keys = [each.key for each in overrides if each.key.startswith(start) and each.key != key]
            unused[key, wanted] = unused.get((key, wanted), []) + keys
    for (key, wanted), keys in unused.items():
        value = model_value(experiment, key)
        if keys and value_problem(key, value) is None:
            what = f"no effect: detectron2 uses this only where {key} is {wanted!r}, and it is {value!r}"
            hint = f"Leave out what has no effect, or set model.overrides.{key}={wanted}"
            findings.warning("config_unused", "model.overrides", ", ".join(keys), what, hint)


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
