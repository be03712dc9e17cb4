"""Weights for others: torchvision's ResNet-50 loads them unchanged and computes the same."""

import pytest
import torch
import yaml

from launch.compose import compose
from scripts import export_weights
from train import checkpoint, emulator
from train.checkpoint_files import take_over


def finished_run(folder, *words: str):
    """The folder of a run with one checkpoint, of a model whose statistics are not the initial ones."""
    config = compose(["data=synthetic", *words])
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(3)
    model = emulator.make(config["model"], num_classes=10)
    for name, buffer in model.state_dict().items():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    checkpoint.save(take_over(folder / "checkpoints"), 7, {"model": model.state_dict(), "averages": None})
    return model


def test_torchvision_loads_them_unchanged(tmp_path, capsys):
    from torchvision.models import resnet50

    ours = finished_run(tmp_path / "run", "model=resnet50").eval()
    assert export_weights.main([str(tmp_path / "run"), "--out", str(tmp_path / "weights.pt")]) == 0
    assert capsys.readouterr().out.endswith("load into torchvision.models.resnet50(num_classes=10)\n")
    theirs = resnet50(num_classes=10).eval()
    theirs.load_state_dict(
        torch.load(tmp_path / "weights.pt", weights_only=True)
    )  # strict: no name too few or too many
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words, flags, named",
    [
        (["model=resnet_cifar20"], [], "torchvision has no such ResNet"),
        (["model=resnet50_small", "model.depth=18"], [], "model.stem=small: torchvision has no such ResNet"),
        (["model=resnet18"], ["--averages"], "no averaged weights: the run has ema_decay=null; leave --averages out"),
    ],
)
def test_what_torchvision_has_not_is_refused(words, flags, named, tmp_path, capsys):
    finished_run(tmp_path / "run", *words)
    assert export_weights.main([str(tmp_path / "run"), *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run/weights.pt").exists()


def test_without_a_sound_checkpoint_there_are_none(tmp_path, capsys):
    finished_run(tmp_path / "run", "model=resnet18")
    (saved,) = (tmp_path / "run/checkpoints/attempt_0001").glob("*.pt")
    saved.write_bytes(saved.read_bytes()[:-1])
    assert export_weights.main([str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "left aside for the one before" in said[0] and said[1].endswith("no checkpoint to take weights from")
