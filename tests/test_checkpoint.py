"""Checkpoints: what is written is read back, whole or not at all, and never runs code."""

import os
import pickle

import pytest
import torch
from torch import nn

from train import checkpoint
from train.checkpoint_files import checkpoint_path, list_checkpoints
from train.models.resnet import resnet


def state(number: int = 0) -> dict:
    return {
        "weights": torch.arange(24.0).view(1, 6, 2, 2).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "progress": {"step": number, "top1": None, "reached": False, "names": ["a", "b"]},
    }


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", 12, state(12))
    assert path == tmp_path / "checkpoints" / "step_00000012.pt" == checkpoint_path(tmp_path / "checkpoints", 12)
    back, saved = checkpoint.load(path), state(12)
    assert back["progress"] == saved["progress"]
    for name in ("weights", "half"):
        assert torch.equal(back[name], saved[name]) and back[name].dtype == saved[name].dtype
        assert back[name].stride() == saved[name].stride()


def test_nothing_is_left_aside(tmp_path):
    for number in (1, 2):
        checkpoint.save(tmp_path, 7, state(number))
    assert names(tmp_path) == ["step_00000007.pt"]
    assert checkpoint.load(checkpoint_path(tmp_path, 7))["progress"]["step"] == 2


def test_a_death_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 7, state(1))

    def die(_: int) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(os, "fsync", die)
        checkpoint.save(tmp_path, 7, state(2))
    assert names(tmp_path) == ["step_00000007.pt", "step_00000007.tmp"]
    assert list_checkpoints(tmp_path) == [path]
    assert checkpoint.load(path)["progress"]["step"] == 1
    checkpoint.save(tmp_path, 7, state(3))
    assert names(tmp_path) == ["step_00000007.pt"]
    assert checkpoint.load(path)["progress"]["step"] == 3


def test_the_last_ones_are_kept_in_the_order_of_steps(tmp_path):
    for step in (5, 100, 20, 3):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "step_final.pt").write_text("somebody else's")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}.pt" for step in (3, 5, 20, 100)]
    checkpoint.keep_last(tmp_path, 3)
    checkpoint.keep_last(tmp_path, 2)
    assert names(tmp_path) == ["step_00000020.pt", "step_00000100.pt", "step_final.pt"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    good = checkpoint.save(tmp_path, 1, state()).read_bytes()
    for name, content in {"empty.pt": b"", "cut.pt": good[: len(good) // 2], "text.pt": b"no checkpoint"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: not a readable checkpoint .*resume from an earlier one"):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing\.pt: there is no such checkpoint"):
        checkpoint.load(tmp_path / "missing.pt")


class Trap:
    """What a harmful file would hold: unpickling it calls a function."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_file_with_code_is_refused_and_not_run(tmp_path, write):
    write({"model": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path / "trap.pt")
    assert names(tmp_path) == ["trap.pt"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return resnet(18, "small", 10)


def test_the_digest_of_the_weights_is_that_of_their_values():
    model = small_model()
    digest = checkpoint.weights_sha256(model)
    assert len(digest) == 64 and checkpoint.weights_sha256(small_model()) == digest
    assert checkpoint.weights_sha256(model.to(memory_format=torch.channels_last)) == digest


def test_the_digest_changes_with_any_bit():
    model = small_model()
    digest = checkpoint.weights_sha256(model)
    for name in ("conv1.weight", "layer4.1.bn2.bias", "fc.weight", "bn1.running_mean", "bn1.running_var"):
        bits = model.state_dict()[name].view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert checkpoint.weights_sha256(model) != digest, name
        bits[-1] ^= 1
    assert checkpoint.weights_sha256(model) == digest
