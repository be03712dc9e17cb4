"""The loader's benchmark on a few small photos: its figures are there and make sense. Nothing is timed here."""

import pytest
from data_samples import make_image_tree

from scripts import bench_loader
from train.data.turbojpeg import find_library

KEYS = {
    "reference_images_per_s_core", "ours_images_per_s_core", "ratio", "shards_ratio", "decode_limit_images_per_s_core",
    "prepare_images_per_s", "prepare_x_decode_and_encode", "prepare_x_own_codecs",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(find_library() is None, reason="no TurboJPEG library of version 3 here")
def test_figures(tmp_path):
    root, lines = make_image_tree(tmp_path, classes=2, per_class=3, size=300, parts=(".",)), []
    result = bench_loader.measure(root, rounds=1, count=6, say=lines.append)
    assert result.keys() >= KEYS and all(result[key] > 0 for key in KEYS)
    assert result["photos"] == 6 and 0 < result["pixel_difference"]["mean"] < 1
    assert lines[0].startswith("images/s on one core") and len(lines) >= 10


def test_wrong_photos_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_loader.py", f"data.root={tmp_path / 'nowhere'}"])
    monkeypatch.setattr(bench_loader, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert bench_loader.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "does not exist" in said.err
