import contextlib
import csv
import io
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_image_tree
from launch_samples import trained_here
from photo_files import BROKEN, READABLE, jpeg, picture
from PIL import Image

from train.data import prepare
from train.data.archives import list_photos
from train.data.imagenet import ImageNetFolder
from train.data.prepare import WORK, Maker, Options, begin, finish, plan, verify
from train.data.shards import ImageNetShards, read_index
from train.data.turbojpeg import find_library

ROOT = Path(__file__).resolve().parent.parent
INDICES = np.arange(12)
CLASSES = ("n00000000", "n00000001", "n00000002")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """12 training and 12 validation photos, named as ImageNet names them."""
    root = make_image_tree(tmp_path_factory.mktemp("photos"), classes=3, per_class=4, size=40)
    number = 0
    for path in sorted((root / "val").rglob("*.JPEG")):
        number += 1
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    return root


def packed(source: Path, folder: Path, jobs: int | None = None, **options) -> dict | None:
    """Shards of a source by this process; with `jobs` only so many of them, and no index."""
    photos, options = list_photos(source, None), Options(**{"photos_per_shard": 5} | options)
    planned, maker = plan(photos, options), Maker(folder, options, find_library())
    for job in begin(folder, photos, options, planned)[:jobs]:
        maker.make(job)
    return None if jobs is not None else finish(folder, photos, options, planned)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def make_archives(tree: Path, folder: Path, devkit: bool = True) -> Path:
    """ImageNet's own archives of a tree."""
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in sorted((path.name for path in (tree / "train").iterdir()), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path in sorted((tree / "train" / name).iterdir(), reverse=True):
                    archive.add(path, path.name)
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = len(inner.getvalue())
            outer.addfile(member, io.BytesIO(inner.getvalue()))
    truth = {path.name: path.parent.name for path in (tree / "val").rglob("*.JPEG")}
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for name in sorted(truth, reverse=True):
            archive.add(tree / "val" / truth[name] / name, name)
    if devkit:
        from scipy.io import savemat

        names = sorted(set(truth.values()))
        ids = {name: 1 + number for number, name in enumerate(names[-1:] + names[:-1])}  # not in the order of names
        synsets = np.array([(i, name) for name, i in ids.items()], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
        meta = io.BytesIO()
        savemat(meta, {"synsets": synsets})
        lines = "".join(f"{ids[truth[name]]}\n" for name in sorted(truth)).encode()
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            for name, data in (("meta.mat", meta.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", lines)):
                member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def test_shards_are_the_folder(tree, tmp_path):
    """The same numbers, labels and bits in training and evaluation; any tar program opens them."""
    index = packed(tree, tmp_path / "shards")
    assert [shard["name"] for shard in index["parts"]["val"]["shards"]] == [f"val-0000{i}.tar" for i in range(3)]
    folder = ImageNetFolder(str(tree), image_size=24, workers=0)
    shards = ImageNetShards(str(tmp_path / "shards"), image_size=24, workers=0)
    for part in ("train", "eval"):
        one, two = (getattr(source, part).batch(INDICES, seed=1, epoch=2) for source in (folder, shards))
        assert one[0].equal(two[0]) and one[1].equal(two[1])
    described = shards.describe()
    assert (described["name"], described["num_train"], described["num_classes"]) == ("imagenet_shards", 12, 3)
    with tarfile.open(tmp_path / "shards" / "train-00000.tar") as archive:
        assert archive.getnames() == [f"{CLASSES[i // 4]}/{i // 4}_{i % 4}.JPEG" for i in range(5)]
        member = archive.extractfile(archive.getmembers()[4])
        assert member.read() == (tree / "train" / CLASSES[1] / "1_0.JPEG").read_bytes()
    processes = ImageNetShards(str(tmp_path / "shards"), image_size=24, workers=2)
    images, _ = processes.train.batch(INDICES, seed=1, epoch=2)
    processes.train.pool.close()
    assert images.equal(shards.train.batch(INDICES, seed=1, epoch=2)[0])


def test_archives_are_the_folder(tree, tmp_path):
    archives = make_archives(tree, tmp_path / "archives")
    packed(tree, tmp_path / "of folder")
    packed(archives, tmp_path / "of archives")
    assert contents(tmp_path / "of folder") == contents(tmp_path / "of archives")


def test_validation_labels_from_a_file(tree, tmp_path):
    archives = make_archives(tree, tmp_path / "archives", devkit=False)
    with pytest.raises(ValueError, match="ILSVRC2012_devkit_t12.tar.gz does not exist.*--val-labels"):
        list_photos(archives, None)
    lines = [f"{path.name} {path.parent.name}\n" for path in sorted((tree / "val").rglob("*.JPEG"))]
    (tmp_path / "labels.txt").write_text("".join(lines))
    listed = list_photos(archives, tmp_path / "labels.txt").parts["val"]
    assert [photo.name for photo in listed] == [f"{line.split()[1]}/{line.split()[0]}" for line in lines]
    (tmp_path / "labels.txt").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="no class is known for ILSVRC2012_val_00000001.JPEG"):
        list_photos(archives, tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("one two three\n")
    with pytest.raises(ValueError, match="labels.txt, line 1: expected a photo and its class"):
        list_photos(archives, tmp_path / "labels.txt")


def test_a_cut_off_archive_is_named(tree, tmp_path):
    archives = make_archives(tree, tmp_path / "archives")
    tar = archives / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(ValueError, match="ILSVRC2012_img_train.tar at byte .* is not a whole plain tar"):
        list_photos(archives, None)


def test_shrinking(tmp_path):
    root = tmp_path / "photos" / "n0"
    root.mkdir(parents=True)
    big, small = jpeg(picture(150, 90)), jpeg(picture(60, 40))
    huge, tall = jpeg(picture(400, 600)), jpeg(picture(33, 120))
    for name, data in {"big": big, "huge": huge, "small": small, "tall": tall}.items():
        (root / f"{name}.jpg").write_bytes(data)
    for number, data in enumerate(READABLE.values()):
        (root / f"of_kind_{number}.jpg").write_bytes(data)
    packed(tmp_path / "photos", tmp_path / "shards", shrink=45, photos_per_shard=100)
    with tarfile.open(tmp_path / "shards" / "train-00000.tar") as archive:
        files = {Path(member.name).stem: archive.extractfile(member).read() for member in archive}
    images = {name: Image.open(io.BytesIO(data)) for name, data in files.items()}
    assert {name: image.size for name, image in images.items() if "kind" not in name} == {
        "big": (75, 45), "huge": (45, 68), "small": (60, 40), "tall": (33, 120)
    }  # fmt: skip
    assert files["small"] == small  # untouched, byte for byte
    assert all(image.size == (58, 45) and image.mode == "RGB" for name, image in images.items() if "kind" in name)
    reference = np.asarray(picture(150, 90).resize((75, 45), Image.Resampling.BILINEAR), int)
    assert np.abs(np.asarray(images["big"], int) - reference).mean() < 4
    source = ImageNetShards(str(tmp_path / "shards"), image_size=24, workers=0)
    assert "photos shrunk to a shorter side of 45 px, JPEG quality 90" in source.notes
    source.train.batch(np.arange(len(files)), seed=0, epoch=0)


@pytest.mark.parametrize("library", [find_library(), None])
def test_how_many_are_worked_on_at_once_changes_nothing(tmp_path, monkeypatch, library):
    root = tmp_path / "photos" / "n0"
    root.mkdir(parents=True)
    for number, data in enumerate([*READABLE.values(), *BROKEN.values(), *READABLE.values()]):
        (root / f"{number:02d}.jpg").write_bytes(data)
    photos, options = list_photos(tmp_path / "photos", None), Options(shrink=45)
    made = []
    for nbytes in (1, 40_000, 1 << 30):
        monkeypatch.setattr(prepare, "AT_ONCE", nbytes)
        made.append(list(Maker(tmp_path, options, library).contents(photos.parts["train"])))
    kinds = [isinstance(each, bytes) for each in made[0]]
    assert kinds == [True] * len(READABLE) + [False] * len(BROKEN) + [True] * len(READABLE)
    assert [[each if isinstance(each, bytes) else str(each) for each in one] for one in made[1:]] == [
        [each if isinstance(each, bytes) else str(each) for each in made[0]]
    ] * 2
    assert {Image.open(io.BytesIO(each)).size for each in made[0] if isinstance(each, bytes)} == {(58, 45)}


def test_files_that_stay_as_they_are_do_not_pile_up(tree, tmp_path, monkeypatch):
    """Of a shard of any length only so many bytes are in memory at once."""
    photos, maker, read = list_photos(tree, None).parts["train"], Maker(tmp_path, Options(), find_library()), []
    monkeypatch.setattr(prepare, "AT_ONCE", 2 * max(len(photo.read()) for photo in photos))
    monkeypatch.setattr(prepare, "read", lambda photo: read.append(photo) or photo.read())
    contents = maker.contents(photos)
    next(contents)
    assert 2 <= len(read) <= 4
    assert len(list(contents)) == 11 and read == photos


def test_what_can_not_be_read_is_left_out_and_reported(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "photos")
    (root / "train" / CLASSES[0] / "0_1.JPEG").write_bytes(b"")
    cut = root / "val" / CLASSES[1] / "ILSVRC2012_val_00000005.JPEG"
    cut.write_bytes(cut.read_bytes()[:400])
    index = packed(root, tmp_path / "shards")
    assert (index["skipped"], index["parts"]["train"]["photos"], index["parts"]["val"]["photos"]) == (2, 11, 11)
    rows = list(csv.DictReader((tmp_path / "shards" / "skipped.csv").open()))
    assert [(row["part"], Path(row["photo"]).name) for row in rows] == [("train", "0_1.JPEG"), ("val", cut.name)]
    assert rows[0]["reason"] == "EOFError: no bytes" and rows[1]["reason"].startswith("OSError: ")
    source = ImageNetShards(str(tmp_path / "shards"), image_size=24, workers=0)
    assert len(source.train) == 11
    source.train.batch(np.arange(11), seed=0, epoch=0)


def test_an_interrupted_making_goes_on_and_ends_the_same(tree, tmp_path):
    packed(tree, tmp_path / "whole")
    folder = tmp_path / "interrupted"
    packed(tree, folder, jobs=2)
    (folder / "train-00002.tar.4711.part").write_bytes(b"half a shard")
    (folder / "train-00002.tar").write_bytes(b"renamed, but killed before its record")
    (folder / WORK / "val-00000.tar.json.4711.part").write_bytes(b"{")
    (folder / WORK / "val-00000.tar.json").write_bytes(b"")
    (folder / "train-00001.tar").write_bytes(b"lost by the disk after its record")
    photos, options = list_photos(tree, None), Options(photos_per_shard=5)
    left = begin(folder, photos, options, plan(photos, options))
    assert [job.name for job in left] == ["train-00001.tar", "train-00002.tar", *(f"val-0000{i}.tar" for i in range(3))]
    packed(tree, folder)
    assert contents(folder) == contents(tmp_path / "whole")
    packed(tree, folder)  # nothing left to do
    assert contents(folder) == contents(tmp_path / "whole")


def test_other_options_or_photos_are_refused(tree, tmp_path):
    packed(tree, tmp_path / "shards", jobs=1)
    with pytest.raises(ValueError, match="holds shards of other photos, options"):
        packed(tree, tmp_path / "shards", quality=50)
    with pytest.raises(ValueError, match="holds shards of other photos, options"):
        packed(tree / "val", tmp_path / "shards")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "backup.tar").touch()
    with pytest.raises(ValueError, match="holds tars that are not from here"):
        packed(tree, tmp_path / "mine")


def test_checksums(tree, tmp_path):
    index = packed(tree, tmp_path / "shards")
    assert verify(tmp_path / "shards", index) == []
    shard = tmp_path / "shards" / "val-00001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    (tmp_path / "shards" / "train-00000.tar").unlink()
    wrong = verify(tmp_path / "shards", index)
    assert len(wrong) == 2 and "train-00000.tar" in wrong[0] and "val-00001.tar: SHA-256" in wrong[1]


def test_broken_shards_are_named(tree, tmp_path):
    folder = tmp_path / "shards"
    packed(tree, folder)
    (folder / "train-00002.tar").write_bytes((folder / "train-00002.tar").read_bytes()[:700])
    source = ImageNetShards(str(folder), image_size=24, workers=0)
    with pytest.raises(ValueError, match=r"unreadable image .*train-00002.tar:n00000002/2_2.JPEG \(EOFError"):
        source.train.batch(np.array([10]), seed=0, epoch=0)
    (folder / "train.index").write_bytes(b"short")
    with pytest.raises(ValueError, match="train.index is not the index of 12 photos"):
        ImageNetShards(str(folder))
    (folder / "index.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="index.json is no index of shards .format 7, not 1.: run prepare"):
        ImageNetShards(str(folder))
    with pytest.raises(ValueError, match="no index.json there: make shards by scripts/prepare_imagenet.py"):
        ImageNetShards(str(tree))


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prepare_imagenet.py"), *map(str, words)]


def call(*words: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*words), cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command(tree, tmp_path):
    done = call(tree, tmp_path / "shards", "--photos-per-shard", 5, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "12 train, 12 val photos of 3 classes" in done.stdout and "0 photos were left out" in done.stdout
    packed(tree, tmp_path / "here")
    made = contents(tmp_path / "shards")
    assert made.pop(".lock") == b"" and made == contents(tmp_path / "here")


def test_the_command_line(tree, tmp_path, monkeypatch, capsys):
    """In this process: what is wrong is one line and status 2, what differs status 1."""
    main = runpy.run_path(str(ROOT / "scripts" / "prepare_imagenet.py"))["main"]

    def status(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare_imagenet.py", *map(str, words)])
        return main()

    packed(tree, tmp_path / "shards")
    assert status("--verify", tmp_path / "shards") == 0
    (tmp_path / "shards" / "train.index").write_bytes(b"")
    assert status("--verify", tmp_path / "shards") == 1
    capsys.readouterr()
    for words, named in (
        ((tree / "nowhere", tmp_path / "new"), "SRC="),
        ((tree, tmp_path / "new", "--shrink", "0"), "--shrink=0: must be from 1 to"),
        ((tmp_path / "new",), "SRC is missing"),
        (("--verify", tree), "no index.json there"),
    ):
        assert status(*words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and named in said


@pytest.mark.sample
def test_photos_from_archives_to_an_evaluation(tmp_path):
    """Photos of the user's own in ImageNet's archives: packed by the command, trained on for a step, evaluated."""
    if "RESNET_RECORD_SAMPLE" not in os.environ:
        pytest.skip("RESNET_RECORD_SAMPLE names no folder of photos")
    sample, tree, number = Path(os.environ["RESNET_RECORD_SAMPLE"]), tmp_path / "tree", 0
    names = sorted(path.name for path in sample.iterdir() if path.is_dir())
    for name in names:
        for path in sorted((sample / name).iterdir()):
            number += 1
            for part, file in (("train", path.name), ("val", f"ILSVRC2012_val_{number:08d}.JPEG")):
                (tree / part / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tree / part / name / file)
    archives = make_archives(tree, tmp_path / "archives")
    done = call(archives, tmp_path / "shards", "--shrink", 256, "--photos-per-shard", 100)
    assert done.returncode == 0 and f"{number:,} train, {number:,} val photos of {len(names)} classes" in done.stdout
    words = ["experiment=imagenet_atlas900", "recipe=none", "mesh=atlas800", "model=resnet18", "max_steps=1"]
    data = ["data=imagenet_shards", f"data.root={tmp_path / 'shards'}", "data.image_size=64", "global_batch_size=64"]
    result = trained_here([*words, *data, "workers=1", "epochs=9"], tmp_path / "run")
    assert (result["status"], result["steps"]) == ("done", 1) and 0 <= result["top1"] <= 1


@pytest.mark.slow
def test_ten_kills_give_the_identical_result(tmp_path):
    tree = make_image_tree(tmp_path / "photos", classes=20, per_class=60, size=300)
    words = command(tree, tmp_path / "killed", "--photos-per-shard", 24, "--processes", 2, "--shrink", 128)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills, moment = 0, random.Random(0)
    while kills < 10:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(StopIteration):
            next(line for line in process.stdout if "left" in line or "classes" in line)
        time.sleep(moment.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        kills += process.wait() == -signal.SIGKILL
    assert call(*words[2:]).returncode == 0
    assert call(tree, tmp_path / "whole", *words[4:]).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert verify(tmp_path / "killed", read_index(tmp_path / "killed" / "index.json")) == []
