"""Writes logs as detectron2 writes them, of runs that never ran, with times that can be added up by hand."""

import datetime
from pathlib import Path

START = datetime.datetime(2021, 5, 4, 10, 0, 0, tzinfo=datetime.UTC)


class MadeLog:
    """A log whose clock moves by the seconds of each step.

    Args:
        start: Its first line's time.
        styled: Whether it looks like detectron2's console (colours, logger within the brackets) instead of its file.
        gpu: Whether progress lines have a learning rate and memory, which a log of a CPU lacks.
    """

    def __init__(self, start: datetime.datetime = START, styled: bool = False, gpu: bool = True) -> None:
        self.clock, self.styled, self.gpu = start, styled, gpu
        self.lines: list[str] = []
        self.iteration, self.period, self.step = 0, 0, 0.5

    def wait(self, seconds: float) -> None:
        self.clock += datetime.timedelta(seconds=seconds)

    def log(self, logger: str, text: str) -> None:
        stamp = self.clock.strftime("%m/%d %H:%M:%S")
        if self.styled:
            self.lines.append(f"\x1b[32m[{stamp} {logger}]: \x1b[0m{text}")
        else:
            self.lines.append(f"[{stamp}] {logger} INFO: {text}")

    def head(
        self, world: int = 2, batch: int = 4, period: int = 40, masks: bool = True, max_iter: int = 80
    ) -> "MadeLog":
        """Two seconds of start-up: environment and config."""
        self.period = period
        self.log("detectron2", f"Rank of current process: 0. World size: {world}")
        self.wait(2)
        self.log("detectron2", "Environment info:\n-----  ----\nPyTorch  1.9.0\ndetectron2  0.5 @/x\nGPU 0,1  Made GPU")
        self.log("detectron2", "Command line arguments: Namespace(num_gpus=2, num_machines=1)")
        self.log(
            "detectron2",
            "Running with full config:\nDATASETS:\n  TEST: ('coco_2017_val',)\nINPUT:\n  MAX_SIZE_TRAIN: 1333\n"
            f"  MIN_SIZE_TRAIN: (640, 800)\nMODEL:\n  MASK_ON: {masks}\n"
            "  RPN:\n    POST_NMS_TOPK_TRAIN: 1000\nSOLVER:\n"
            f"  BASE_LR: 0.01\n  GAMMA: 0.1\n  IMS_PER_BATCH: {batch}\n  MAX_ITER: {max_iter}\n  STEPS: (60, 70)\n"
            f"  WARMUP_FACTOR: 0.001\n  WARMUP_ITERS: 10\nTEST:\n  EVAL_PERIOD: {period}",
        )
        self.log("d2.utils.env", "Using a generated random seed 11")
        self.log("d2.data.build", "Removed 2 images with no usable annotations. 40 images left.")
        return self

    def start(self, iteration: int = 0) -> "MadeLog":
        """Training starts eight seconds after the head."""
        self.wait(8)
        self.iteration = iteration
        self.log("d2.engine.train_loop", f"Starting training from iteration {iteration}")
        return self

    def progress(self, step: float | None = None) -> "MadeLog":
        """Twenty iterations and their line."""
        self.wait(20 * self.step)
        return self.line(step)

    def line(self, step: float | None = None) -> "MadeLog":
        """The progress line of the next twenty iterations, which take no time."""
        self.iteration += 20
        self.log(
            "d2.utils.events",
            f"eta: 0:01:00  iter: {self.iteration - 1}  total_loss: 1.5  loss_cls: 0.5  time: {step or self.step:.4f}  "
            "data_time: 0.0500" + ("  lr: 0.01  max_mem: 2048M" if self.gpu else ""),
        )
        return self

    def infer(self) -> "MadeLog":
        """The first eight seconds of an evaluation, until its figures are printed."""
        self.log("d2.data.datasets.coco", "Loaded 10 images in COCO format from /x/val.json")
        self.wait(1)
        self.log("d2.evaluation.evaluator", "Start inference on 5 images")
        self.wait(5)
        self.log(
            "d2.evaluation.evaluator", "Total inference time: 0:00:05.000000 (1.0 s / img per device, on 2 devices)"
        )
        self.wait(2)
        return self

    def paste(self, task: str, values: str, names: str = "AP,AP50,AP75,APs,APm,APl") -> "MadeLog":
        """The figures of a task as detectron2 prints them for copying."""
        for line in (f"Task: {task}", names, values):
            self.log("d2.evaluation.testing", f"copypaste: {line}")
        return self

    def evaluate(self, box: float, mask: float | None, last: bool = False) -> "MadeLog":
        """Twenty iterations, an evaluation (boxes known after 8 s, masks after 11, over after 12), and their line."""
        if not last:
            self.wait(20 * self.step)
        self.infer()
        self._scores("bbox", box)
        self.wait(3)
        if mask is not None:
            self._scores("segm", mask)
        self.wait(1)
        for task, ap in (("bbox", box), ("segm", mask)):
            if ap is not None:
                self.paste(task, f"{ap:.4f},60.0000,40.0000,nan,30.0000,50.0000")
        return self if last else self.line()

    def _scores(self, task: str, ap: float) -> None:
        self.log(
            "d2.evaluation.coco_evaluation",
            f"Evaluation results for {task}: \n|   AP   |  AP50  |  AP75  |  APs  |  APm   |  APl   |\n"
            "|:------:|:------:|:------:|:-----:|:------:|:------:|\n"
            f"| {ap:.3f} | 60.000 | 40.000 | nan | 30.000 | 50.000 |",
        )

    def close(self, total: str = "0:01:04", hooks: str = "0:00:24") -> "MadeLog":
        iterations = self.iteration - 2
        self.log(
            "d2.engine.hooks", f"Overall training speed: {iterations} iterations in 0:00:39 ({self.step:.4f} s / it)"
        )
        self.log("d2.engine.hooks", f"Total training time: {total} ({hooks} on hooks)")
        return self

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def write(self, path: Path) -> Path:
        path.write_text(self.text(), encoding="utf-8")
        return path


def whole_run(styled: bool = False, gpu: bool = True) -> MadeLog:
    """80 iterations of 0.5 s on 2 workers, batch 4; target missed at 40, met at 80, evaluated once more at the end.

    0 first line, 10 training starts, 30 + 12 first evaluation (boxes at 38, masks at 41), 62 + 12 second (70, 73),
    74 closes, 86 last line.
    """
    made = MadeLog(styled=styled, gpu=gpu).head().start()
    made.progress().evaluate(30.0, 28.0).progress().evaluate(38.1234, 34.5678).close()
    return made.evaluate(38.1234, 34.5678, last=True)
