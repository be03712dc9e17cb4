"""Checkpoints: what is written is read back, whole or not at all, and never runs code."""

import errno
import hashlib
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from train import checkpoint, checkpoint_files
from train.checkpoint_files import Fenced, checkpoint_path, list_checkpoints, newest_sound
from train.models.resnet import resnet


def state(number: int = 0) -> dict:
    return {
        "weights": torch.arange(24.0).view(1, 6, 2, 2).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "progress": {"step": number, "top1": None, "reached": False, "names": ["a", "b"]},
    }


def summed(path: Path, content: bytes) -> None:
    """A file whose checksum is right, whatever is in it."""
    path.write_bytes(content)
    noted = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    checkpoint_files.checksum_path(path).write_text(noted)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path):
    path = checkpoint.save(tmp_path, 12, state(12))
    assert path == tmp_path / "step_00000012.pt" == checkpoint_path(tmp_path, 12)
    back, saved = checkpoint.load(path), state(12)
    assert back["progress"] == saved["progress"]
    for name in ("weights", "half"):
        assert torch.equal(back[name], saved[name]) and back[name].dtype == saved[name].dtype
        assert back[name].stride() == saved[name].stride()


def test_nothing_is_left_aside(tmp_path):
    for number in (1, 2):
        checkpoint.save(tmp_path, 7, state(number))
    assert names(tmp_path) == ["step_00000007.pt", "step_00000007.sha256"]
    assert checkpoint.load(checkpoint_path(tmp_path, 7))["progress"]["step"] == 2
    check = ["sha256sum", "--check", "step_00000007.sha256"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "step_00000007.pt: OK\n")


@pytest.mark.parametrize("after", range(2))
def test_a_death_before_the_last_rename_leaves_the_old_one(tmp_path, monkeypatch, after):
    """Before the checksum is written, and before it is renamed."""
    folder = checkpoint_files.take_over(tmp_path)
    path = checkpoint.save(folder, 6, state(1))
    real, calls = os.fsync, []

    def die(number: int) -> None:
        calls.append(number)
        if len(calls) > after:
            raise SystemExit(9)
        real(number)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(os, "fsync", die)
        checkpoint.save(folder, 7, state(2))
    left = ["step_00000007.pt.tmp", "step_00000007.sha256.tmp"][: after + 1]
    assert names(folder) == ["step_00000006.pt", "step_00000006.sha256", *left]
    assert list_checkpoints(tmp_path) == [path] and newest_sound(tmp_path, pytest.fail) == path
    assert names(checkpoint_files.take_over(tmp_path)) == ["step_00000006.pt", "step_00000006.sha256"]


def test_the_last_ones_are_kept_in_the_order_of_steps(tmp_path):
    folder = checkpoint_files.take_over(tmp_path)
    for step in (5, 100, 20, 3):
        checkpoint.save(folder, step, state(step))
    (folder / "step_final.pt").write_text("somebody else's")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:08d}.pt" for step in (3, 5, 20, 100)]
    checkpoint.keep_last(folder, 3)
    checkpoint.keep_last(folder, 2)
    kept = [f"step_{step:08d}.{kind}" for step in (20, 100) for kind in ("pt", "sha256")]
    assert names(folder) == [*kept, "step_final.pt"]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("how", ["bit", "cut", "no sum", "other sum", "empty sum"])
def test_a_corrupted_checkpoint_is_left_aside_for_the_one_before(tmp_path, how):
    folder = checkpoint_files.take_over(tmp_path)
    before, last = (checkpoint.save(folder, step, state(step)) for step in (4, 9))
    content, noted = bytearray(last.read_bytes()), checkpoint_files.checksum_path(last)
    if how == "bit":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif how == "cut":
        last.write_bytes(content[:-1])
    elif how == "no sum":
        noted.unlink()
    else:
        noted.write_text({"other sum": checkpoint_files.checksum_path(before).read_text(), "empty sum": ""}[how])
    said: list[str] = []
    assert newest_sound(tmp_path, said.append) == before
    assert len(said) == 1 and said[0].startswith(f"{last}: ") and said[0].endswith("left aside for the one before")
    with pytest.raises(ValueError, match=r"step_00000009\.pt: not a readable checkpoint .*resume from an earlier one"):
        checkpoint.load(last)
    assert checkpoint.load(before)["progress"]["step"] == 4


def test_a_writer_thought_dead_cannot_write_into_its_successors_run(tmp_path, monkeypatch):
    """It is stopped right before its last rename, wakes when another has taken over, and finds no folder."""
    old = checkpoint_files.take_over(tmp_path)
    checkpoint.save(old, 3, state(3))
    replace = Path.replace
    new: list[Path] = []

    def slow(self: Path, target: Path) -> Path:
        if not new and self.name == "step_00000008.pt.tmp":
            new.append(checkpoint_files.take_over(tmp_path))
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(Fenced, match="another writer has taken the run over"):
        patched.setattr(Path, "replace", slow)
        checkpoint.save(old, 8, state(8))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003.pt"]
    assert [path.name for path in checkpoint_files.attempts(tmp_path)] == ["attempt_0002"]
    with pytest.raises(Fenced):
        checkpoint_files.check_fence(old)
    checkpoint_files.check_fence(new[0])
    assert checkpoint.save(new[0], 8, state(8)).exists()


def test_a_full_disk_costs_a_checkpoint_and_is_an_error_at_the_end_only(tmp_path, monkeypatch):
    folder, said = checkpoint_files.take_over(tmp_path), []
    writer = checkpoint.Writer(folder, 2, said.append)
    writer.write(1, state(1))
    writer.close()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        writer.write(2, state(2))
        with pytest.raises(OSError, match="No space left on device"):
            writer.close()
    assert names(folder) == ["step_00000001.pt", "step_00000001.sha256"]
    reason = "No space left on device; training goes on with the one before"
    assert said == [f"no checkpoint of step 2: {folder}: {reason}"] and writer.failures == 1
    writer.write(3, state(3))
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001.pt", "step_00000003.pt"]


def test_a_copy_does_not_follow_its_original():
    original = {"a": [torch.zeros(2)], "b": {"c": torch.ones(1), "d": 3}}
    copy = checkpoint.copied(original)
    original["a"][0] += 1
    original["b"]["c"] += 1
    assert copy["a"][0].tolist() == [0, 0] and copy["b"]["c"].tolist() == [1] and copy["b"]["d"] == 3


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    good = checkpoint.save(tmp_path, 1, state()).read_bytes()
    for name, content in {"empty.pt": b"", "cut.pt": good[: len(good) // 2], "text.pt": b"no checkpoint"}.items():
        summed(tmp_path / name, content)
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
    summed(tmp_path / "trap.pt", (tmp_path / "trap.pt").read_bytes())
    with pytest.raises(ValueError, match=r"trap\.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path / "trap.pt")
    assert names(tmp_path) == ["trap.pt", "trap.sha256"]


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
