"""Data in, images out: every training script sees one contract, whatever the data are.

    x   float32 [N, C, H, W], every channel with mean 0 and standard deviation 1 over the data set (`normalize`)
    y   int64 [N] in 0 .. num_classes - 1

The statistics that undo it travel with the data and with every checkpoint, and are applied in one place (`denormalize`).

    digits          scikit-learn's handwritten digits: 1,797 real 8 x 8 images in 10 classes, inside the package, nothing is downloaded
    FILE.npz        arrays `images` (uint8 [N, H, W] or [N, H, W, 1 or 3], square) and `labels` (integers from 0)
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch


class BadInput(Exception):
    """What the user can mend: one line with what is wrong, what was expected and what to do.  Scripts print it and exit with 2."""


@dataclass
class Data:
    x: torch.Tensor                 # [N, C, H, W] float32, normalised
    y: torch.Tensor                 # [N] int64
    num_classes: int
    mean: list = field(repr=False)  # [C] of the pixels in [0, 1], before normalisation
    std: list = field(repr=False)
    source: str = ""

    @property
    def meta(self):
        """What a checkpoint keeps, to give images back without the data."""
        return dict(source=self.source, num_classes=self.num_classes, shape=list(self.x.shape[1:]), mean=self.mean, std=self.std)


def normalize(x, mean, std):
    """Per-channel (x - mean) / std.  x [N, C, H, W]; mean, std [C]."""
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def denormalize(x, mean, std):
    """The inverse of normalize: x std + mean."""
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return x * std + mean


def data_kind(source):
    """The kind of data decides the presets: "pixels" here, "latents" for the paper's 32 x 16 x 16."""
    return "pixels" if source == "digits" or source.endswith(".npz") else "latents"


def load_data(source):
    """Data for --data SOURCE (see the file header).  Raises BadInput for anything missing, unreadable or out of range."""
    if source == "digits":
        from sklearn.datasets import load_digits                 # ships with scikit-learn (UCI ML hand-written digits, test part)
        digits = load_digits()
        images, labels = digits.images[:, None] / 16, digits.target                                   # grey levels 0 .. 16
    elif source.endswith(".npz"):
        images, labels = read_npz(source)
    else:
        raise BadInput(f"--data {source}: expected `digits` or an .npz file with `images` and `labels`")
    x, y = torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64)
    if x.shape[0] < 2 or x.std() == 0:
        raise BadInput(f"--data {source}: needs at least two images that are not all alike, found {len(x)}")
    std, mean = torch.std_mean(x.double(), dim=(0, 2, 3))
    mean, std = mean.tolist(), std.clamp(min=1e-6).tolist()
    return Data(normalize(x, mean, std), y, int(y.max()) + 1, mean, std, source)


def read_npz(path):
    """(images [N, C, H, W] in [0, 1], labels [N]) of an .npz with `images` and `labels`; BadInput if it is anything else."""
    if not Path(path).is_file():
        raise BadInput(f"--data {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise BadInput(f"--data {path}: has no array {' and no '.join(sorted(missing))} (found {', '.join(file.files) or 'none'})")
            images, labels = file["images"], file["labels"]
    except BadInput:
        raise
    except Exception as error:                                   # zipfile, zlib and numpy each raise their own on a damaged file
        raise BadInput(f"--data {path}: not a readable .npz without pickled objects ({str(error).splitlines()[0]})") from None
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise BadInput(f"--data {path}: images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, H], [N, H, H, 1] or [N, H, H, 3]")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(f"--data {path}: labels are {labels.dtype} {list(labels.shape)}, expected {len(images)} integers")
    if len(labels) and labels.min() < 0:
        raise BadInput(f"--data {path}: labels start at {labels.min()}, expected 0 .. classes - 1")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) / 255.0, labels


def to_uint8(x, mean, std):
    """Normalised pixels [N, C, H, W] -> uint8 [N, H, W, C]: denormalise, clamp to [0, 1], round to nearest."""
    x = denormalize(x.detach().float().cpu(), mean, std).clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
