"""Evaluates weights that are sent to it, in a process of its own: on this host by a pipe, elsewhere called by Ray."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import mask_rcnn
from trainers.canary import find_port
from trainers.contract import clock
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator, Scores
from trainers.speedups.apply import process_settings

_ALIGNMENT = 16  # bytes: a tensor of any type may begin there

Values = dict[str, float]
"""What `rank_state` reads of a model."""

Outcome = tuple[list[Scores], float]
"""Scores of each model, and the seconds that the evaluation took."""


class EvaluatorLostError(RuntimeError):
    """The process that evaluated has died, or took too long and was ended."""


class Evaluating(Protocol):
    """A process, or several that share the images, at another end of a connection."""

    def evaluate(self, iteration: int, values: list[Values], weights: NDArray[np.uint8]) -> Outcome:
        """Sends the weights of one or several models of a kind, and waits for their scores.

        Args:
            iteration: Iterations trained.
            values: Of each model, besides the weights.
            weights: The values of their state dicts in one block, one after the other, laid out as `views` has them.

        Raises:
            EvaluatorLostError: There will be no answer.
            Exception: Whatever ended the evaluation or the set-up there.
        """

    def end(self) -> None:
        """Ends it, in the middle of its work where there is any; `evaluate` in another thread raises then."""


class EvaluationServer:
    """Evaluates on a device; `world_size` processes of ascending `rank` share the images of an evaluation.

    Args:
        plan: The trial, as its workers have it.
        device: `cuda:1`, `cuda` or `cpu`.
        anchor: The workers' clock (`clock.anchor`).
        rank: Number of this process among those that evaluate.
        world_size: How many they are.
    """

    def __init__(self, plan: TrialPlan, device: str, anchor: str, rank: int = 0, world_size: int = 1) -> None:
        clock.adopt(anchor)
        self._device, self._rank, self._world_size = torch.device(device), rank, world_size
        threads = plan.evaluation_cpus or plan.cpus_per_worker
        self._plan = dataclasses.replace(
            plan,
            weights="",  # those that training starts from are not needed here
            device="cuda" if self._device.type == "cuda" else "cpu",
            cpus_per_worker=threads,
            loader_workers=min(plan.loader_workers, threads - 1) if plan.evaluation_cpus else plan.loader_workers,
        )
        if plan.device != self._plan.device:
            self._plan = dataclasses.replace(self._plan, recipe=dataclasses.replace(plan.recipe, precision="fp32"))
        self._settings = ExitStack()  # what the recipe sets in a process, to its end
        self._failure: Exception | None = None

    def address(self) -> str:
        """Where the other processes find this one: a host's address and a free port."""
        return f"{socket.gethostbyname(socket.gethostname())}:{find_port()}"

    def set_up(self, address: str = "") -> None:
        """Builds model and evaluator; what fails is raised by `evaluate`.

        Args:
            address: Of the first process; empty where there is only one.
        """
        try:
            self._set_up(address)
        except Exception as error:  # noqa: BLE001 - whatever it is, training ends with it
            self._failure = _portable(error)

    def _set_up(self, address: str) -> None:
        plan, device = self._plan, self._device
        if device.type == "cuda":
            torch.cuda.set_device(device if device.index is not None else 0)
        torch.set_num_threads(plan.cpus_per_worker)
        if self._world_size > 1:
            torch.distributed.init_process_group(
                "gloo", init_method=f"tcp://{address}", rank=self._rank, world_size=self._world_size
            )
        cfg = mask_rcnn.build_config(plan)
        self._settings.enter_context(process_settings(plan.recipe, device, cfg.CUDNN_BENCHMARK))
        mask_rcnn.register(cfg, plan.train)
        mask_rcnn.register(cfg, plan.val)
        self._model = mask_rcnn.build_detector(cfg, plan, trains=False)
        self._evaluator = Evaluator(cfg, plan)

    @torch.no_grad()
    def evaluate(self, iteration: int, values: list[Values], weights: bytes | NDArray[np.uint8]) -> Outcome | Exception:
        """As `Evaluating.evaluate`; what that would raise is returned, as an exception that can be pickled."""
        if self._failure:
            return self._failure
        started = time.perf_counter()
        try:
            block = torch.from_numpy(np.frombuffer(weights, dtype=np.uint8).copy())
            scores: list[Scores] = []
            for number, each in enumerate(values):
                load(self._model, block, number)
                restore_values(self._model, each)
                scores.append(self._evaluator.run(self._model, iteration))
            return scores, time.perf_counter() - started
        except Exception as error:  # noqa: BLE001 - whatever it is, training ends with it
            return _portable(error)


class EvaluatingProcess:
    """An `EvaluationServer` on this host, which ends when this process ends, even where that is killed."""

    def __init__(self, plan: TrialPlan, device: str) -> None:
        self._timeout = plan.timeouts.get("evaluation", threading.TIMEOUT_MAX)
        self._overdue = False
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, plan, device, clock.anchor()))
        self._process.start()
        theirs.close()

    def evaluate(self, iteration: int, values: list[Values], weights: NDArray[np.uint8]) -> Outcome:
        """See `Evaluating`."""
        timer = threading.Timer(self._timeout, self._end_overdue)
        timer.daemon = True
        timer.start()
        reply: Outcome | Exception | None = None
        with contextlib.suppress(EOFError, OSError):
            self._line.send((iteration, values))
            self._line.send_bytes(weights.data)
            wait([self._line, self._process.sentinel])
            reply = self._line.recv() if self._line.poll() else None
        timer.cancel()
        if reply is None:
            self._process.join()
            raise EvaluatorLostError(self._end_text())
        return answer(reply)

    def _end_overdue(self) -> None:
        self._overdue = True
        self._process.kill()

    def _end_text(self) -> str:
        code = self._process.exitcode or 0
        if self._overdue:
            return f"it took longer than {self._timeout:g} s (faults.timeouts.evaluation)"
        if code == -signal.SIGKILL:
            return "its process was killed (SIGKILL), as the system does when memory runs out"
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def end(self) -> None:
        """See `Evaluating`."""
        self._process.kill()
        self._process.join()


def _serve(line: Connection, plan: TrialPlan, device: str, anchor: str) -> None:
    """Answers what comes over a pipe; ends with whoever holds its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in a terminal reaches all; training decides
    requests: queue.SimpleQueue[tuple[Any, bytes]] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                requests.put((line.recv(), line.recv_bytes()))
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    server = EvaluationServer(plan, device, anchor)
    server.set_up()
    while True:
        (iteration, values), weights = requests.get()
        line.send(server.evaluate(iteration, values, weights))


def answer(reply: Outcome | Exception) -> Outcome:
    """What a server's `evaluate` returned; raises it where it is an exception."""
    if isinstance(reply, Exception):
        raise reply
    return reply


def rank_state(model: nn.Module) -> Values:
    """Values of a rank's model, not wrapped for several workers, that are not in its state dict, by module.

    Dense detectors divide their losses by a running mean of the positive anchors that this rank has seen (detectron2,
    `DenseDetector._ema_update`).
    """
    return {
        name: module.loss_normalizer
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }


def restore_values(model: nn.Module, values: Values) -> None:
    """Restores what `rank_state` read."""
    for name, normalizer in values.items():
        model.get_submodule(name).loss_normalizer = normalizer  # type: ignore[assignment]


def load(model: nn.Module, block: Tensor, number: int) -> None:
    """Gives a model the weights of the model of a number, from 0, in a block of `num_bytes` for each."""
    tensors = list(model.state_dict().values())
    size = num_bytes(tensors)
    with torch.no_grad():
        for tensor, sent in zip(tensors, views(block[number * size :], tensors), strict=True):
            tensor.copy_(sent)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of the block that `views` divides."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def views(block: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of a block of bytes, (num_bytes,) of uint8, with the shapes and types of tensors, in their order."""
    found, start = [], 0
    for tensor in tensors:
        found.append(block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _portable(error: Exception) -> Exception:
    """An exception with its traceback as a note, or one with the same text where it cannot be pickled."""
    note = "In the process that evaluates:\n" + "".join(traceback.format_exception(error))
    error.add_note(note)
    try:
        pickle.dumps(copy.copy(error))  # which is made as it would be from a pickle
    except Exception:  # noqa: BLE001 - whatever its class does
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(note)
    return error
