"""The files in which MNIST's family and CIFAR are handed out: IDX (plain or .gz) and CIFAR's binary batches.

    IDX     MNIST, Fashion-MNIST, KMNIST, EMNIST: *train-images-idx3-ubyte[.gz], *train-labels-idx1-ubyte[.gz], and the
            same with t10k or test; big-endian header (magic number, sizes), then bytes.  Debian and Ubuntu:
            apt-get install dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist
    CIFAR   "binary version": data_batch_1.bin ... data_batch_5.bin and test_batch.bin (10 classes), or train.bin and
            test.bin (100 classes): records of label bytes and 3 x 32 x 32 pixels

CIFAR's python version is pickles, which run code when they are read: it is refused.
"""
import gzip
import math
import re
from pathlib import Path

import numpy as np

from plumbing.files import BadInput, reading

IDX_NAME = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
REPAIR = "fetch it again"

# name of the files -> (training files, test files, label bytes of a record; the last one is the fine label)
CIFAR = {
    "CIFAR-10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "CIFAR-100": (["train.bin"], ["test.bin"], 2),
}
CIFAR_PIXELS = 3 * 32 * 32


def is_idx_or_cifar(folder: str | Path) -> bool:
    """Whether a folder holds such files."""
    names = {path.name for path in Path(folder).glob("*")}
    return bool(idx_files(folder)) or any(names & {*train, *test} for train, test, _ in CIFAR.values())


def image_side(folder: str | Path) -> int:
    """Pixels of a side of its images: 32 of CIFAR, of IDX what the header of the first file says."""
    found = idx_files(folder)
    if not found:
        return 32
    path = next((path for (_, _, what), path in found.items() if what == "images"), None)
    return idx_header(path, 3)[1] if path else 0


def read_idx_or_cifar(folder: str | Path) -> tuple:
    """(images, labels, test images, test labels): uint8 [N, C, H, H], labels [N] from 0.

    The test part may be missing: None, None.  BadInput for anything that is not as described above.
    """
    read = read_idx if idx_files(folder) else read_cifar
    images, labels, test_images, test_labels = read(Path(folder))
    low = labels.min()                                           # EMNIST's letters start at 1
    if test_images is not None and (test_labels.min() < low or test_labels.max() > labels.max()):
        raise BadInput(f"--data {folder}: the test part has labels that the training part has not")
    if test_images is not None and (test_images.shape[1:] != images.shape[1:] or len(test_images) < 4):
        found, expected = (list(part.shape[1:]) for part in (test_images, images))
        raise BadInput(f"--data {folder}: the test part has {len(test_images)} images of {found}, "
                       f"expected at least 4 of {expected}, as the training part has")
    return images, labels - low, test_images, None if test_labels is None else test_labels - low


# ---- IDX -------------------------------------------------------------------------------------------------------------

def idx_files(folder: str | Path) -> dict:
    """{(set, "train" or "test", "images" or "labels"): path} of a folder; of a file there twice the unpacked one."""
    found = {}
    for path in sorted(Path(folder).glob("*-ubyte*"), reverse=True):
        match = IDX_NAME.fullmatch(path.name)
        if match and path.is_file() and not path.name.startswith("."):      # Kaggle has folders of these names beside
            part = "train" if match[2] == "train" else "test"
            found[match[1], part, match[3]] = path
    return found


def read_idx(folder: Path) -> tuple:
    found = idx_files(folder)
    sets = sorted({name for name, _, _ in found})
    if len(sets) > 1:
        raise BadInput(f"--data {folder}: holds {len(sets)} sets ({', '.join(sets)}), expected one: "
                       "give each a folder of its own")
    parts = []
    for part in ("train", "test"):
        files = [found.get((sets[0], part, what)) for what in ("images", "labels")]
        if part == "test" and files == [None, None]:
            parts += files
            continue
        if None in files:
            missing = "images" if files[0] is None else "labels"
            raise BadInput(f"--data {folder}: has no {missing} of the {part} part ({sets[0]}{part}-{missing}-idx...)")
        images, labels = read_idx_file(files[0], 3), read_idx_file(files[1], 1)
        if len(images) != len(labels):
            raise BadInput(f"{files[0]}: holds {len(images)} images, but {files[1].name} {len(labels)} labels; "
                           f"{REPAIR}")
        if "emnist" in sets[0]:                                  # EMNIST's are stored column by column
            images = images.transpose(0, 2, 1)
        parts += [np.ascontiguousarray(images[:, None]), labels.astype(np.int64)]
    return tuple(parts)


def open_idx(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def idx_header(path: Path, ndim: int) -> list[int]:
    """Sizes of an IDX file of unsigned bytes with so many dimensions, from its header alone."""
    expected = f"an IDX file of bytes with {ndim} dimension{'s' if ndim > 1 else ''}"
    with reading(path, expected, REPAIR), open_idx(path) as file:
        head = file.read(4 * (1 + ndim))
        if len(head) < 4 * (1 + ndim):
            raise ValueError("its header is cut")
        magic, *sizes = np.frombuffer(head, ">u4").tolist()
        if magic != 0x0800 + ndim:                               # 08: unsigned byte
            raise ValueError(f"its magic number is {magic}, not {0x0800 + ndim}")
        if 0 in sizes or (ndim == 3 and sizes[1] != sizes[2]) or max(sizes[1:], default=1) > 512:
            raise ValueError(f"its sizes are {sizes}, expected square images of at most 512 pixels")
    return sizes


def read_idx_file(path: Path, ndim: int) -> np.ndarray:
    """uint8 array of an IDX file: no more is unpacked than its header says."""
    sizes = idx_header(path, ndim)
    count = math.prod(sizes)
    if count > 2 ** 31:                                          # EMNIST has 0.6e9; each takes 12 bytes of memory
        raise BadInput(f"{path}: says that it holds {sizes}, expected at most {2 ** 31} bytes")
    with reading(path, f"an IDX file of {sizes}", REPAIR), open_idx(path) as file:
        file.seek(4 * (1 + ndim))
        pixels = file.read(count + 1)
        if len(pixels) != count:
            raise ValueError(f"it holds {'more' if len(pixels) > count else len(pixels)} bytes of {count}")
    return np.frombuffer(pixels, np.uint8).reshape(sizes)


# ---- CIFAR -----------------------------------------------------------------------------------------------------------

def read_cifar(folder: Path) -> tuple:
    there = []
    for name, (train, test, _) in CIFAR.items():
        if any((folder / file).exists() for file in train + test):
            there.append(name)
    if len(there) != 1:
        raise BadInput(f"--data {folder}: holds {len(there)} sets ({', '.join(there)}), expected one: give each a "
                       "folder of its own")
    train, test, label_bytes = CIFAR[there[0]]
    missing = [file for file in train if not (folder / file).exists()]
    if missing:
        raise BadInput(f"--data {folder}: {there[0]} lacks {', '.join(missing)}; {REPAIR}")
    images, labels = read_records([folder / file for file in train], label_bytes)
    if not (folder / test[0]).exists():
        return images, labels, None, None
    return images, labels, *read_records([folder / file for file in test], label_bytes)


def read_records(paths: list[Path], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, 3, 32, 32], labels [N]) of CIFAR's binary files."""
    rows = []
    for path in paths:
        size = label_bytes + CIFAR_PIXELS
        with reading(path, f"a CIFAR batch of records of {size} bytes", REPAIR):
            data = np.fromfile(path, np.uint8)
            if not len(data) or len(data) % size:
                raise ValueError(f"it holds {len(data)} bytes")
            rows.append(data.reshape(-1, size))
    rows = np.concatenate(rows)
    images = np.ascontiguousarray(rows[:, label_bytes:]).reshape(-1, 3, 32, 32)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    classes = 10 if label_bytes == 1 else 100
    if labels.max() >= classes:
        raise BadInput(f"{paths[0].parent}: labels go up to {labels.max()}, expected {classes} classes; {REPAIR}")
    return images, labels
