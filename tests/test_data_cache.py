import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_image_tree

from train.data.cache import PhotoCache, check_room
from train.data.imagenet import ImageNetFolder
from train.data.shared import Shared

ROOT = Path(__file__).resolve().parent.parent
PHOTO = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def test_what_one_keeps_all_have(tmp_path):
    one, two = (PhotoCache.of_node("same", 10, 150, tmp_path) for _ in range(2))
    assert one.get(3) is None
    one.put(3, PHOTO)
    one.put(4, PHOTO[:2])
    assert (two.get(3) == PHOTO).all() and (two.get(4) == PHOTO[:2]).all()
    two.put(3, np.zeros_like(PHOTO))  # it is there already
    two.put(9, PHOTO)
    two.put(0, PHOTO[:1])
    assert (one.get(3) == PHOTO).all() and (one.get(9) == PHOTO).all()
    assert one.get(0) is None  # 60 + 24 + 60 of 150 bytes are taken
    assert (pickle.loads(pickle.dumps(two)).get(9) == PHOTO).all()
    assert PhotoCache.of_node("other", 10, 150, tmp_path).get(3) is None


KEEPER = """
import sys
from pathlib import Path
import numpy as np
from train.data.cache import PhotoCache
cache = PhotoCache.of_node("kept", 10, 150, Path(sys.argv[1]))
cache.put(3, np.full((5, 4, 3), 7, np.uint8))
print("kept", flush=True)
sys.stdin.read()
"""


def test_another_process_s_photos_and_what_a_killed_one_leaves(tmp_path):
    """The memory goes with the last process that has it; one that comes later begins anew."""
    command = [sys.executable, "-c", KEEPER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout.readline() == "kept\n"
        cache = PhotoCache.of_node("kept", 10, 150, tmp_path)
        assert (cache.get(3) == 7).all()
        keeper.kill()
    assert (cache.get(3) == 7).all()
    later = PhotoCache.of_node("kept", 10, 150, tmp_path)
    assert later.get(3) is None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200


def test_closed_memory_is_not_mistaken_for_another_s():
    first = Shared.new(100)
    place = first.place
    first.close()
    second = Shared.new(100)  # its descriptor is the same
    assert second.descriptor == place[1]
    with pytest.raises(FileNotFoundError, match="has closed that memory"):
        Shared.of(place)
    second.close()


@pytest.mark.parametrize("gbytes", [-1, 1e9])
def test_no_room_is_said_before_anything_is_filled(gbytes):
    with pytest.raises(ValueError, match="data.cache_gbytes=.*: must be above 0 and below this machine's .* GB"):
        check_room(gbytes)


@pytest.mark.parametrize("decode", ["auto", "pillow"])
def test_photos_are_the_same_with_and_without_room(tmp_path, monkeypatch, decode):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tree = make_image_tree(tmp_path / "photos", classes=3, per_class=2, size=90)
    options = {"image_size": 24, "workers": 0, "decode": decode}
    large, small, none = (ImageNetFolder(str(tree), cache_gbytes=gbytes, **options) for gbytes in (1e-3, 1e-4, 0.0))
    assert "decoded photos are kept in memory, up to 0.001 GB for all workers of a node" in large.notes
    for epoch in (0, 1):  # filling, filled
        batches = [source.train.batch(np.arange(6), seed=2, epoch=epoch)[0] for source in (large, small, none)]
        assert batches[0].equal(batches[1])
        if decode == "pillow":
            assert batches[0].equal(batches[2])
        evaluated = [source.eval.batch(np.arange(6), seed=0, epoch=0)[0] for source in (large, small, none)]
        assert evaluated[0].equal(evaluated[1]) and evaluated[0].equal(evaluated[2])
    kept = [sum(s.train.cutter.cache.get(file) is not None for file in range(6)) for s in (large, small)]
    assert kept[0] == 6 and 0 < kept[1] < 6
