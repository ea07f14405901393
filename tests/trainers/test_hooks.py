"""What ranks do together between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.hooks import share_buffers

if TYPE_CHECKING:
    import pytest


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    made(torch.rand(2, 3, 4, 4))
    made.register_buffer("turned", torch.rand(4, 6).t())
    return made


def test_every_rank_gets_all_buffers_in_a_message_for_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = model(0), model(1)
    messages: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(dist, "broadcast", lambda tensor, src: messages.append(tensor.clone()))
        share_buffers(first, 2)
    assert [message.dtype for message in messages] == [torch.float32, torch.int64]
    assert any(not torch.equal(*pair) for pair in zip(first.buffers(), other.buffers(), strict=True))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(messages.pop(0)))
    share_buffers(other, 2)
    for (name, expected), (_, found) in zip(first.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(expected, found), name
    assert all(torch.equal(*pair) for pair in zip(first.buffers(), model(0).buffers(), strict=True))
