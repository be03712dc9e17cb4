"""Folders that are no image folders: one line that names the place, the value and the remedy."""

import shutil

import pytest
from data_samples import make_image_tree

from train.data.folder import data_root, list_images, list_parts
from train.data.imagenet import ImageNetFolder


def refused(root, *named: str) -> None:
    with pytest.raises(ValueError) as error:
        ImageNetFolder(root)
    message = str(error.value)
    assert "\n" not in message and message.startswith("data.root")
    for word in named:
        assert word in message


def test_root_not_given():
    refused(None, "data.root=null", "name the folder")


def test_root_missing(tmp_path):
    refused(f"{tmp_path}/nowhere", "nowhere", "does not exist", "set data.root")


def test_root_is_a_file(tmp_path):
    (tmp_path / "photo.jpg").touch()
    refused(f"{tmp_path}/photo.jpg", "photo.jpg", "is a file")


def test_no_class_folders(tmp_path):
    (tmp_path / "photo.jpg").touch()
    refused(str(tmp_path), str(tmp_path), "no class folders", "train/<class>/*.jpg")


def test_no_images(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").touch()
    refused(str(tmp_path), "no images in its 1 folders")


def test_flat_validation_folder(tmp_path):
    make_image_tree(tmp_path, classes=2, per_class=1, size=8, parts=("train",))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    refused(str(tmp_path), "val is not an image folder", "val/<class>/*.jpg")


@pytest.mark.parametrize(("part", "missing"), [("train", "val/ is missing"), ("val", "train/ is missing")])
def test_one_part_only(tmp_path, part, missing):
    make_image_tree(tmp_path, classes=2, per_class=1, size=8, parts=(part,))
    refused(str(tmp_path), missing)


def test_an_empty_class(tmp_path):
    make_image_tree(tmp_path, classes=2, per_class=1, size=8)
    (tmp_path / "train" / "n00000002").mkdir()
    refused(str(tmp_path), "train/n00000002 has no images")


def test_parts_with_different_classes(tmp_path):
    make_image_tree(tmp_path, classes=3, per_class=1, size=8)
    shutil.rmtree(tmp_path / "val" / "n00000001")
    refused(str(tmp_path), "train has 3 classes and the evaluation part 2", "'n00000001'")


def test_order_and_labels(tmp_path):
    make_image_tree(tmp_path, classes=2, per_class=2, size=8, parts=("train", "test"))
    (tmp_path / "train" / "n00000000" / "notes.txt").touch()
    (tmp_path / "train" / "n00000000" / "._0_0.JPEG").touch()
    (tmp_path / "train" / ".cache").mkdir()
    train, evaluation = list_parts(data_root(str(tmp_path)))
    assert train.files == ("n00000000/0_0.JPEG", "n00000000/0_1.JPEG", "n00000001/1_0.JPEG", "n00000001/1_1.JPEG")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert evaluation.root == tmp_path / "test"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_image_tree(tmp_path / "photos", classes=1, per_class=1, size=8, parts=(".",))
    assert list_images(data_root("~/photos")).classes == ("n00000000",)
