"""Plain data and states between the workers of a group, as bytes in tensors (neither pickles nor another channel)."""

import io
import json
from typing import Any

import torch
from torch import Tensor

from train.comm.groups import Group


def gather(group: Group, value: Any, device: str) -> list[Any]:
    """Every rank's value, of what JSON can hold, in the order of ranks, on every rank."""
    mine = _bytes(json.dumps(value).encode())
    lengths = group.all_gather(torch.tensor([len(mine)], device=device)).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows = group.all_gather(padded.to(device)).cpu()
    return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]


def broadcast_state(group: Group, state: dict | None, source: int, device: str) -> dict:
    """The source's dictionary of tensors, numbers, strings, lists and dictionaries on every rank, on the CPU."""
    mine = _bytes(b"")
    if group.rank == source:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        mine = _bytes(buffer.getvalue())
    length = torch.tensor([len(mine)], device=device)
    group.broadcast(length, source)
    content = mine.to(device) if group.rank == source else torch.empty(length.item(), dtype=torch.uint8, device=device)
    group.broadcast(content, source)
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
