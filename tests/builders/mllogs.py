"""Writes MLPerf result files as submitters of several rounds wrote them, of runs that never ran."""

import json
from pathlib import Path
from typing import Any

START_MS = 1_600_000_000_000


class MadeMllog:
    """A log whose clock is moved by `wait`; `prefix` and `suffix` stand around each line of MLPerf's."""

    def __init__(self, prefix: str = "", suffix: str = "") -> None:
        self.prefix, self.suffix = prefix, suffix
        self.ms = START_MS
        self.lines: list[str] = []

    def wait(self, seconds: float) -> "MadeMllog":
        self.ms += round(1000 * seconds)
        return self

    def text_line(self, text: str) -> "MadeMllog":
        """A line of the container's own output."""
        self.lines.append(text)
        return self

    def line(self, key: str, value: Any = None, **metadata: Any) -> "MadeMllog":
        body = {
            "namespace": "", "time_ms": self.ms, "event_type": "POINT_IN_TIME", "key": key, "value": value,
            "metadata": {"file": "train.py", "lineno": 1, **metadata},
        }  # fmt: skip
        self.lines.append(f"{self.prefix}:::MLLOG {json.dumps(body)}{self.suffix}")
        return self

    def head(self, ranks: int = 8, benchmark: str = "maskrcnn", division: str = "closed", **values: Any) -> "MadeMllog":
        """Thirty seconds of initialization, from the submission's lines to `init_stop`."""
        for key, value in (
            ("benchmark", benchmark), ("org", "Made"), ("division", division), ("platform", "1xMADE"),
        ):  # fmt: skip
            self.line(f"submission_{key}", value)
        self.line("cache_clear", True).wait(2)
        for _ in range(ranks):
            self.line("init_start")
        known = {
            "seed": 7, "global_batch_size": 96, "opt_base_learning_rate": 0.12, "opt_learning_rate_warmup_steps": 625,
            "opt_learning_rate_decay_steps": [12000, 16000],
        }  # fmt: skip
        for key, value in {**known, **values}.items():
            if value is not None:
                self.line(key, value)
        return self.wait(30).line("init_stop")

    def start(self) -> "MadeMllog":
        return self.line("run_start")

    def stop(self, status: str = "success") -> "MadeMllog":
        return self.line("run_stop", status=status)

    def score(self, epoch: float, box: float, mask: float | None) -> "MadeMllog":
        value = {"BBOX": box} if mask is None else {"BBOX": box, "SEGM": mask}
        return self.line("eval_accuracy", value, epoch_num=epoch)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text(), encoding="utf-8")
        return path


def whole_run(
    aps: tuple[tuple[float, float], ...] = ((0.20, 0.18), (0.38, 0.345)), epoch_seconds: float = 200.0,
    status: str = "success", **head: Any,
) -> MadeMllog:  # fmt: skip
    """A run as of rounds 1.1 to 3.1: steps are tracked, scoring overlaps the next epoch, which begins after 5 s.

    An epoch's 1,221.5 steps take `epoch_seconds`; scores are known 12 s after the evaluation begins, and 2 s after the
    last of them the run stops. Its figures are printed twice, an even rate of 600 images/s in the middle.
    """
    made = MadeMllog(prefix="0: ").head(**{"d_batch_size": 12.0, "train_samples": 40000, "eval_samples": 1, **head})
    made.start()
    for epoch in range(1, len(aps) + 1):
        made.line("block_start", first_epoch_num=epoch, epoch_count=1).line("epoch_start", epoch_num=epoch)
        if epoch > 1:
            made.wait(7).score(epoch - 1, *aps[epoch - 2]).line("eval_stop", epoch_num=epoch - 1)
        at = 7.0 if epoch > 1 else 0.0
        for number in (1, 2, 3, 4):
            made.wait(epoch_seconds * number / 4 - at)
            at = epoch_seconds * number / 4
            step = round((epoch - 1 + number / 4) * 117266 / 96)
            rate = {1: 550.0, 2: 600.0, 3: 600.0, 4: 610.0}[number]
            made.line("tracked_stats", {"throughput": rate, "loss": 1.0}, step=step)
        made.line("epoch_stop", epoch_num=epoch).line("block_stop", first_epoch_num=epoch)
        made.line("eval_start", epoch_num=epoch).wait(5)
    made.line("block_start", first_epoch_num=len(aps) + 1, epoch_count=1).wait(7)
    made.score(len(aps), *aps[-1]).line("eval_stop", epoch_num=len(aps)).wait(2)
    return made.stop(status) if status else made


def old_run(**head: Any) -> MadeMllog:
    """A run as of round 0.7: a container's output, no steps tracked, training waits for evaluations of 20 s.

    Two epochs of 200 s each, the target is met after the second.
    """
    made = MadeMllog(suffix="\r")
    made.text_line("+ docker exec -it object_detection ./run_and_time.sh")
    made.head(**head).text_line("2020-06-25 16:25:37,015 maskrcnn_benchmark INFO: Using 8 GPUs").start()
    for epoch, (box, mask) in enumerate(((0.2, 0.18), (0.3775, 0.3425)), start=1):
        made.line("block_start", first_epoch_num=epoch, epoch_count=1).line("epoch_start", epoch_num=epoch).wait(200)
        made.line("epoch_stop", epoch_num=epoch).line("block_stop", first_epoch_num=epoch)
        made.line("eval_start", epoch_num=epoch).text_line(" 91% 571/625 [00:24<00:02, 24.81it/s]").wait(20)
        made.score(epoch, box, mask).line("eval_stop", epoch_num=epoch)
    return made.wait(1).stop()


def submission(folder: Path, *runs: MadeMllog, system: str = "made_a100", nodes: int = 1, each: int = 8) -> Path:
    """The runs of one system in a submission's layout, with its description; returns their folder."""
    results = folder / "Made" / "results" / system / "maskrcnn"
    for number, made in enumerate(runs):
        made.write(results / f"result_{number}.txt")
    description = {
        "number_of_nodes": str(nodes), "accelerators_per_node": str(each), "accelerator_model_name": "NVIDIA Made",
    }  # fmt: skip
    (folder / "Made" / "systems").mkdir(parents=True, exist_ok=True)
    (folder / "Made" / "systems" / f"{system}.json").write_text(json.dumps(description))
    return results
