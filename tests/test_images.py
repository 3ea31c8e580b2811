"""The part of the suite (see test_all.py) on IDX and CIFAR files, and on images of 24 to 64 pixels."""
import gzip

import numpy as np
import pytest
import torch

import consistency
import data
import dmd2
import evaluate
import fsf_dmd
import metrics
import sid
import twinflow
from plumbing.files import BadInput
from test_helpers import train

ALL = [(consistency, "--loss imf"), (fsf_dmd, ""), (dmd2, ""), (sid, ""), (twinflow, "")]


def idx(path, array, magic=None):
    """Write an IDX file of unsigned bytes, packed where the name says so."""
    head = np.array([0x0800 + array.ndim if magic is None else magic, *array.shape], ">u4").tobytes()
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(pack(head + array.astype(np.uint8).tobytes()))


def drawn(n, side=28, channels=None, seed=0, classes=10):
    """Random images and labels in which every class occurs."""
    rng = np.random.default_rng(seed)
    shape = (n, side, side) if channels is None else (n, channels, side, side)
    return rng.integers(0, 256, shape, np.uint8), np.arange(n) % classes


def mnist(folder, n=40, prefix="", suffix=".gz", first=0, side=28):
    """A small set in MNIST's files -> {part: (images, labels)}."""
    folder.mkdir(exist_ok=True)
    parts = {}
    for seed, (part, count) in enumerate({"train": n, "t10k": n // 2}.items()):
        images, labels = drawn(count, side, seed=seed)
        parts[part] = images, labels + first
        idx(folder / f"{prefix}{part}-images-idx3-ubyte{suffix}", images)
        idx(folder / f"{prefix}{part}-labels-idx1-ubyte{suffix}", labels + first)
    return parts


def cifar(folder, classes=10, n=20):
    folder.mkdir(exist_ok=True)
    names = ["train.bin", "test.bin"]
    if classes == 10:
        names = [*[f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"]
    parts = {}
    for seed, name in enumerate(names):
        images, labels = drawn(n, 32, 3, seed, classes)
        record = [labels[:, None], images.reshape(n, -1)]
        if classes == 100:
            record.insert(0, labels[:, None] // 5)               # the coarse label
        np.concatenate(record, 1).astype(np.uint8).tofile(folder / name)
        parts[name] = images, labels
    return parts


def refused(folder):
    """The one line that load_data refuses a folder with."""
    with pytest.raises(BadInput) as caught:
        data.load_data(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(found, x):
    return data.to_uint8(x, found.mean, found.std)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_they_are(tmp_path, suffix):
    parts = mnist(tmp_path / "set", suffix=suffix)
    found = data.load_data(str(tmp_path / "set"))
    assert np.array_equal(pixels(found, found.x)[..., 0], parts["train"][0])
    assert np.array_equal(pixels(found, found.test[0])[..., 0], parts["t10k"][0])
    assert found.y.tolist() == parts["train"][1].tolist() and found.test[1].tolist() == parts["t10k"][1].tolist()
    assert found.num_classes == 10 and found.kind == "pixels" and abs(found.x.mean()) < 1e-5


def test_emnist_is_turned_and_its_letters_start_at_1(tmp_path):
    parts = mnist(tmp_path / "set", prefix="emnist-letters-", first=1)
    found = data.load_data(str(tmp_path / "set"))
    assert np.array_equal(pixels(found, found.x)[..., 0], parts["train"][0].transpose(0, 2, 1))
    assert np.array_equal(pixels(found, found.test[0])[..., 0], parts["t10k"][0].transpose(0, 2, 1))
    assert found.y.tolist() == (parts["train"][1] - 1).tolist() and found.num_classes == 10
    assert found.test[1].tolist() == (parts["t10k"][1] - 1).tolist()
    mnist(tmp_path / "set", prefix="emnist-digits-")
    assert "holds 2 sets" in refused(tmp_path / "set")


def test_what_lies_beside_the_files_of_a_set_is_not_taken_for_it(tmp_path):
    """Kaggle's MNIST has folders of the files' names beside them, a Mac's copy has hidden files."""
    parts = mnist(tmp_path / "set")
    (tmp_path / "set" / "train-images-idx3-ubyte").mkdir()
    (tmp_path / "set" / "._train-images-idx3-ubyte.gz").write_bytes(b"Mac OS X")
    found = data.load_data(str(tmp_path / "set"))
    assert np.array_equal(pixels(found, found.x)[..., 0], parts["train"][0])


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_batches_are_read_as_they_are(tmp_path, classes):
    parts = cifar(tmp_path / "set", classes, n=100)
    found = data.load_data(str(tmp_path / "set"))
    *train, test = parts.values()
    assert np.array_equal(pixels(found, found.x).transpose(0, 3, 1, 2), np.concatenate([images for images, _ in train]))
    assert np.array_equal(pixels(found, found.test[0]).transpose(0, 3, 1, 2), test[0])
    assert found.y.tolist() == np.concatenate([labels for _, labels in train]).tolist()
    assert found.num_classes == classes


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def no_header(path):
    path.write_bytes(gzip.compress(b"1234567"))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BAD_IDX = {
    "wrong magic number": (lambda d: idx(d / IMAGES, drawn(40)[0], magic=0x0D03), "magic number"),
    "labels as images": (lambda d: (d / IMAGES).write_bytes((d / LABELS).read_bytes()), "magic number is 2049"),
    "counts that disagree": (lambda d: idx(d / LABELS, np.zeros(39)), f"40 images, but {LABELS} 39 labels"),
    "truncated gzip": (lambda d: cut(d / IMAGES), "not an IDX file"),
    "not gzip": (lambda d: (d / IMAGES).write_bytes(b"12345678901234567890"), "not an IDX file"),
    "empty": (lambda d: (d / IMAGES).write_bytes(b""), "not an IDX file"),
    "a header that is cut": (lambda d: no_header(d / IMAGES), "its header is cut"),
    "fewer bytes than its header says": (lambda d: idx(d / IMAGES, np.zeros((0, 28, 28))), "sizes are"),
    "images that are not square": (lambda d: idx(d / IMAGES, np.zeros((40, 28, 20))), "square"),
    "no labels": (lambda d: (d / LABELS).unlink(), "has no labels of the train part"),
    "no training images": (lambda d: (d / IMAGES).unlink(), "has no images of the train part"),
    "test labels of a class that is not trained": (
        lambda d: idx(d / "t10k-labels-idx1-ubyte.gz", np.full(20, 11)), "labels that the training part has not"),
    "test images of another size": (
        lambda d: idx(d / "t10k-images-idx3-ubyte.gz", drawn(20, 10)[0]), "expected at least 4 of [1, 28, 28]"),
    "a class without images": (lambda d: no_image_of_2(d), "no image has label 2, expected all of 0 .. 4"),
    "too few test images": (lambda d: few_test_images(d), "the test part has 3 images"),
}


def few_test_images(folder):
    images, labels = drawn(3)
    idx(folder / "t10k-images-idx3-ubyte.gz", images)
    idx(folder / "t10k-labels-idx1-ubyte.gz", labels)


def no_image_of_2(folder):
    idx(folder / LABELS, np.repeat([0, 1, 3, 4], 10))
    idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(20))


@pytest.mark.parametrize("what", BAD_IDX)
def test_bad_idx_files_are_one_line(tmp_path, what):
    damage, words = BAD_IDX[what]
    mnist(tmp_path / "set")
    damage(tmp_path / "set")
    assert words in refused(tmp_path / "set")


@pytest.mark.slow
def test_an_idx_file_unpacks_no_more_than_its_header_says(tmp_path):
    """A bomb: a megabyte of gzip that would be a gigabyte, behind a header of 40 images."""
    mnist(tmp_path / "set")
    path = tmp_path / "set" / IMAGES
    head = np.array([0x0803, 40, 28, 28], ">u4").tobytes()
    path.write_bytes(gzip.compress(head + bytes(2 ** 20)) + gzip.compress(bytes(2 ** 20)) * 1023)
    assert "more bytes" in refused(tmp_path / "set")
    huge = np.array([0x0803, 2 ** 31, 512, 512], ">u4").tobytes()
    path.write_bytes(gzip.compress(huge + bytes(100)))
    assert "expected at most" in refused(tmp_path / "set")


@pytest.mark.parametrize("damage, words", [
    (lambda d: cut(d / "data_batch_3.bin"), "records of 3073 bytes"),
    (lambda d: (d / "test_batch.bin").write_bytes(b""), "records of 3073 bytes"),
    (lambda d: (d / "data_batch_2.bin").unlink(), "CIFAR-10 lacks data_batch_2.bin"),
    (lambda d: (d / "data_batch_1.bin").write_bytes(b"\xff" * 3073), "labels go up to 255"),
    (lambda d: (d / "train.bin").touch(), "holds 2 sets (CIFAR-10, CIFAR-100), expected one"),
])
def test_bad_cifar_batches_are_one_line(tmp_path, damage, words):
    cifar(tmp_path / "set")
    damage(tmp_path / "set")
    assert words in refused(tmp_path / "set")


def test_the_side_of_the_images_decides_the_preset(tmp_path):
    mnist(tmp_path / "mnist")
    mnist(tmp_path / "small", side=12)
    cifar(tmp_path / "cifar")
    np.savez(tmp_path / "large.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4))
    kinds = {name: data.preset_kind(str(tmp_path / name)) for name in ("mnist", "small", "cifar", "large.npz", "gone")}
    assert kinds == {"mnist": "images", "small": "pixels", "cifar": "images", "large.npz": "images", "gone": "latents"}
    for script, flags in ALL:
        args = script.parse_args(f"{flags} --data {tmp_path / 'mnist'}".split())
        assert args.size == "small" and args.sources["size"] == "preset"
    pretraining = {key: row for key, row in consistency.PRESETS.items() if key[0] == "images"}
    assert {row["omega_max"] for row in pretraining.values()} == {4.0}       # guidance is an input, and is learned


def test_long_runs_on_images_are_compiled_where_a_compiler_is(tmp_path, monkeypatch):
    mnist(tmp_path / "set")

    def compiled(flags):
        return fsf_dmd.parse_args(flags.split()).compile

    compiler, on_images = tmp_path / "c++", f"--data {tmp_path / 'set'} --steps"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    (tmp_path / "Python.h").touch()                             # of python3-dev, which may not be here
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert compiled(f"{on_images} 50") == 1
    assert compiled(f"{on_images} 49") == compiled(f"{on_images} 50 --compile 0") == 0
    assert compiled(f"{on_images} 50 --jvp exact") == compiled("--steps 50") == 0          # the last: digits
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled(f"{on_images} 50") == 0 and compiled(f"{on_images} 49 --compile 1") == 1


@pytest.mark.slow
def test_metrics_of_a_set_with_a_test_part(tmp_path, monkeypatch):
    """The classifier never sees the test part; the floor compares it with the training part; features are kept."""
    parts = mnist(tmp_path / "set", n=20, side=12)
    found = data.load_data(str(tmp_path / "set"))
    monkeypatch.setattr(metrics, "EVAL_NEIGHBOURS", 15)
    cache = tmp_path / "cache"
    features = metrics.Features(found, cache)
    assert len(features.reference.near) == 15 and len(features.real) == 20 and features.n == 500
    of_test, probs = features(found.test[0])
    floor = features.floor()
    expected = metrics.frechet_distance(*metrics.moments(features.real), *metrics.moments(of_test))
    assert floor["fd"] == pytest.approx(expected, rel=1e-9)
    assert (floor["precision"], floor["recall"]) == metrics.precision_recall(metrics.spread(features.real, 15), of_test)
    right = (probs.argmax(1).numpy() == parts["t10k"][1]).mean()
    assert floor["acc"] == pytest.approx(right)
    words = features.definition()
    assert f"{100 * right:.1f}% right on 10 test images" in words and "15 of them, evenly" in words

    kept = next(cache.glob("real-*.pt"))
    again = metrics.Features(found, cache)
    assert torch.equal(again.real, features.real)
    kept.write_bytes(b"damaged")
    assert torch.equal(metrics.Features(found, cache).real, features.real)   # made again


@pytest.mark.slow
def test_the_classifier_of_few_images_has_learned_them(tmp_path):
    """30 images of 24 pixels in 3 greys: 4 epochs of one batch would leave it at chance."""
    y = np.arange(30) % 3
    noise = np.random.default_rng(0).normal(0, 40, (30, 24, 24))
    images = np.clip(np.array([40, 120, 200])[y][:, None, None] + noise, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=y)
    features = metrics.Features(data.load_data(str(tmp_path / "few.npz")), tmp_path)
    assert features.floor()["acc"] > 0.9 and "too little to measure" not in features.definition()
    small = images[:, ::6, ::6]
    np.savez(tmp_path / "same.npz", images=np.concatenate([small, small]), labels=np.repeat([0, 1], 30))
    features = metrics.Features(data.load_data(str(tmp_path / "same.npz")), tmp_path)       # nothing tells them apart
    assert "right on its own training images: too little to measure with" in features.definition()


@pytest.mark.slow
def test_the_main_command_takes_mnist_files(tmp_path, few_samples, monkeypatch, capsys):
    """FSF-DMD from an iMF on 28 x 28 images, with the `small` network, from a folder of IDX files."""
    mnist(tmp_path / "set", n=20)
    monkeypatch.chdir(tmp_path)
    few = "--data set --steps 2 --batch_size 8 --health_every 0"
    train(f"consistency.py --loss imf {few.replace('--health_every 0', '')} --out start")
    train(f"fsf_dmd.py --init start/model.pt {few} --out ours")
    said = capsys.readouterr().out
    assert "real images, test part" in said and "% right on 10 test images" in said
    checkpoint = torch.load("ours/model.pt", weights_only=True)
    assert checkpoint["config"]["size"] == "small" and checkpoint["config"]["patch_size"] == 4
    assert checkpoint["args"]["omega"] == 1.5 and checkpoint["step"] == 2


def test_a_picture_keeps_the_column_of_a_class_without_images(tmp_path):
    """Else real images and samples of one class would not stand under each other.  Latents may lack a class."""
    mnist(tmp_path / "set")
    found = data.load_data(str(tmp_path / "set"))
    found.y[:] = torch.arange(40) % 2 * 2                                   # 0 and 2: of class 1 there is none
    real = evaluate.real_images(found, 3, per_class=2)
    assert torch.equal(real[[0, 2, 3, 5]], found.x[:4]) and not real[[1, 4]].any()
