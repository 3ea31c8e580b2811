"""Data in, pictures out: every training script sees one contract, whatever the data are.

    x   float32 [N, C, H, W], every channel with mean 0 and standard deviation 1 over the data set (`normalize`)
    y   int64 [N] in 0 .. num_classes - 1

The statistics that undo it travel with the data and with every checkpoint, and are applied in one place
(`denormalize`).

    digits          scikit-learn's handwritten digits: 1,797 real 8 x 8 images in 10 classes, inside the package,
                    nothing is downloaded
    FILE.npz        arrays `images` (uint8 [N, H, W] or [N, H, W, 1 or 3], square) and `labels` (integers from 0)
    IDX/, CIFAR/    MNIST, Fashion-MNIST, KMNIST, EMNIST, CIFAR-10 and CIFAR-100 (plumbing/idx_cifar.py):
                    the training part is trained on, the test part is what the metrics are checked with
    IMAGES/         one sub-folder per class of small square images (at most 64 pixels), read into memory
    LATENTS/        LightningDiT's latent shards (*.safetensors, latents_stats.pt), memory-mapped, both flips:
                    2 rows per image
"""
import logging
import math
import os
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from tqdm import tqdm

from common import BadInput, processes_here, rank
from plumbing.checkpoints import read_weights
from plumbing.files import files_below, first_line, hidden, read_json, reading, write_atomic
from plumbing.idx_cifar import image_side, is_idx_or_cifar, read_idx_or_cifar

# Pillow's own messages about damaged files are off: our line names the file.  Off for the whole process, because
# threads read images.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_CLASSES = 100_000           # more is no label; ImageNet-21k has 21,841
MAX_SIDE = 512                  # pixels of an image that a network sees as it is
SMALL_SIDE = 64                 # of an image folder
# Share of the memory for uint8 images: for a moment training holds 13 to 14 bytes a pixel, as uint8, as float32 and
# (the statistics) as float64.
TRAINED_SHARE = 1 / 16


@dataclass
class Data:
    """A data set as the training scripts see it; `mean` and `std` [C] undo its normalisation."""

    x: "torch.Tensor | Latents"     # [N, C, H, W] float32, normalised; rows are taken by an int64 tensor of indices
    y: torch.Tensor                 # [N] int64
    num_classes: int
    mean: list = field(repr=False)  # [C] before normalisation: of pixels in [0, 1], or of latents
    std: list = field(repr=False)
    source: str = ""
    kind: str = "pixels"            # or "latents"
    vae: str = ""                   # hash of the VAE's weights that made the latents, where known
    test: tuple | None = None       # (x, y) of a test part, which nothing is trained on
    classes: list | None = None     # their names, of an image folder: those of the sub-folders

    @property
    def meta(self) -> dict:
        """What a checkpoint keeps, to give images back without the data."""
        return dict(
            source=self.source, num_classes=self.num_classes, shape=list(self.x.shape[1:]), mean=self.mean,
            std=self.std, kind=self.kind, vae=self.vae, classes=self.classes,
        )


def load_data(source: str) -> Data:
    """Data for --data SOURCE (see the file header).  Raises BadInput for anything missing, unreadable or wrong."""
    source = str(source)
    test_images = test_labels = classes = None
    if source == "digits":
        images, labels = read_digits()
    elif source.lower().endswith(".npz"):
        images, labels = read_npz(source)
    elif not Path(source).is_dir():
        raise BadInput(f"--data {source}: expected `digits`, an .npz file with `images` and `labels`, "
                       "a folder of latent shards, of IDX or CIFAR files, or of images")
    elif data_kind(source) == "latents":
        return load_latents(source)
    elif is_idx_or_cifar(source):
        images, labels, test_images, test_labels = read_idx_or_cifar(source)
    else:
        images, labels, classes = read_image_folder(source)
    empty = np.flatnonzero(np.bincount(labels) == 0)             # it would be sampled, and never trained
    if len(empty):
        raise BadInput(f"--data {source}: no image has label {', '.join(map(str, empty[:3]))}, expected all of 0 .. "
                       f"{labels.max()}; number the classes without gaps")
    if len(images) < 2 or images.min() == images.max():
        raise BadInput(f"--data {source}: needs at least two images that are not all alike, found {len(images)}")
    x, y = as_tensors(images, labels)
    std, mean = torch.std_mean(x.double(), dim=(0, 2, 3))
    mean, std = mean.tolist(), std.clamp(min=1e-6).tolist()      # a constant channel is not divided by zero
    test = None
    if test_images is not None:
        test_x, test_y = as_tensors(test_images, test_labels)
        test = normalize(test_x, mean, std), test_y
    return Data(normalize(x, mean, std), y, int(y.max()) + 1, mean, std, source, test=test, classes=classes)


def as_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] or uint8 -> float32 in [0, 1]; labels -> int64."""
    if images.dtype == np.uint8:
        images = (np.arange(256) / 255).astype(np.float32)[images]           # from here on 4 bytes a value
    return torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels.astype(np.int64))


def data_kind(source: str) -> str:
    """"pixels" or "latents" (the paper's are [32, 16, 16]).  Reads no data.

    A path that does not exist counts as latents; `load_data` refuses it.
    """
    if source == "digits" or source.lower().endswith(".npz"):
        return "pixels"
    folder = Path(source)
    return "pixels" if folder.is_dir() and not shard_files(folder) else "latents"


def preset_kind(source: str) -> str:
    """What decides the presets: "latents", "images" (pixels, 24 or more a side), or "pixels" (fewer, as the digits).

    Reads headers, and of an image folder the first image.  A missing .npz counts as "pixels", a missing folder as
    "latents": `load_data` refuses them.  BadInput for what is damaged.
    """
    if data_kind(source) == "latents":
        return "latents"
    if source == "digits":                                       # a folder of this name may lie here
        return "pixels"
    side = 0
    if source.lower().endswith(".npz"):
        if Path(source).is_file():
            shape, _ = npz_headers(source, f"--data {source}").get("images", ((), None))
            side = shape[1] if len(shape) > 2 else 0
    elif is_idx_or_cifar(source):
        side = image_side(source)
    else:
        files, _ = image_files(source)
        side = read_rgb(files[0][0]).width
    return "images" if side >= 24 else "pixels"


def data_name(source: str) -> str:
    """What the folders of runs and tables on a --data are named after: its file or folder, without the path."""
    path = Path(source)
    return path.resolve().name if source != "digits" and path.is_dir() else path.stem


def normalize(x: torch.Tensor, mean: list, std: list) -> torch.Tensor:
    """Per-channel (x - mean) / std.  x [N, C, H, W]; mean, std [C]."""
    return (x - per_channel(mean, x)) / per_channel(std, x)


def denormalize(x: torch.Tensor, mean: list, std: list) -> torch.Tensor:
    """The inverse of normalize: x std + mean.  x [N, C, H, W]; mean, std [C]."""
    return x * per_channel(std, x) + per_channel(mean, x)


def per_channel(values: list, x: torch.Tensor) -> torch.Tensor:
    """Values [C] as [C, 1, 1], with the type and on the device of x."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)


# ---- Pixels: the digits, .npz files and folders of images ------------------------------------------------------------

def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797, 1, 8, 8] in [0, 1], labels [1797]): the test part of the UCI ML hand-written digits."""
    from sklearn.datasets import load_digits  # slow to import: only where it is used

    digits = load_digits()
    return digits.images[:, None] / 16, digits.target            # grey levels 0 .. 16


def npz_headers(path: str | Path, shown: str) -> dict[str, tuple[tuple, np.dtype]]:
    """{name: (shape, dtype)} of the arrays of an .npz, of which it reads the headers alone.

    shown: the file as messages name it, with its flag.
    """
    if Path(path).is_fifo():                                         # opening one waits for ever
        raise BadInput(f"{shown}: is a pipe, expected an .npz")
    with reading(shown, "a readable .npz without pickled objects"), zipfile.ZipFile(path) as archive:
        headers = {}
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{member} is of another version of numpy's format than 1.0")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{member} holds Python objects")
            headers[member.removesuffix(".npy")] = shape, dtype
    return headers


def read_npz_arrays(path: str | Path, shown: str, headers: dict, names: list, share: float) -> dict[str, np.ndarray]:
    """These arrays of an .npz; BadInput, before reading, if they take more than this share of the machine's memory.

    So a small file that unpacks to a huge array does no harm.
    """
    wanted = sum(math.prod(headers[name][0]) * headers[name][1].itemsize for name in names)
    refuse_too_large(f"{shown}: {' and '.join(names)} unpack", wanted, share, "rows")
    with reading(shown, "a readable .npz without pickled objects"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def refuse_too_large(what: str, wanted: int, share: float, of: str) -> None:
    """BadInput if so many bytes are more than a process may have: this share of the memory over their number here."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = share * memory / processes_here()
    if wanted > most:
        raise BadInput(f"{what} to {wanted / 1e9:.4g} GB, expected at most {most / 1e9:.4g} GB a process on this "
                       f"machine of {memory / 1e9:.4g} GB; take fewer {of}")


def read_npz(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [N, C, H, W], labels [N]) of an .npz with `images` and `labels`; BadInput if it is no such."""
    shown = f"--data {path}"
    if not Path(path).is_file():
        raise BadInput(f"{shown}: no such file")
    headers = npz_headers(path, shown)
    missing = sorted({"images", "labels"} - set(headers))
    if missing:
        found = ", ".join(headers) or "none"
        raise BadInput(f"{shown}: has no array {' and no '.join(missing)} (found {found})")
    (shape, dtype), (label_shape, label_dtype) = headers["images"], headers["labels"]
    if len(shape) == 3:
        shape = (*shape, 1)                                      # [N, H, W, 1]
    square = len(shape) == 4 and shape[1] == shape[2]
    if dtype != np.uint8 or not square or 0 in shape or shape[3] not in (1, 3):
        raise BadInput(f"{shown}: images are {dtype} {list(shape)}, "
                       "expected uint8 [N, H, H], [N, H, H, 1] or [N, H, H, 3]")
    if shape[1] > MAX_SIDE:
        raise BadInput(f"{shown}: images have {shape[1]} x {shape[1]} pixels, expected at most {MAX_SIDE}; "
                       "larger ones: python vae.py encode, of a folder of them")
    if label_shape != shape[:1] or label_dtype.kind not in "iu":
        raise BadInput(f"{shown}: labels are {label_dtype} {list(label_shape)}, expected {shape[0]} integers")

    arrays = read_npz_arrays(path, shown, headers, ["images", "labels"], TRAINED_SHARE)
    refuse_labels(arrays["labels"], shown)
    images = arrays["images"].reshape(shape)                     # [N, H, H, C]
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), arrays["labels"]


def refuse_labels(labels: "np.ndarray | torch.Tensor", shown: str | Path) -> None:
    """BadInput for labels that do not lie in 0 .. classes - 1 of a sane number of classes."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise BadInput(f"{shown}: labels start at {low}, expected 0 .. classes - 1")
    if high >= MAX_CLASSES:
        raise BadInput(f"{shown}: labels go up to {high}, expected 0 .. classes - 1 of at most "
                       f"{MAX_CLASSES} classes")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")     # by content: no other parser of Pillow is asked
# Names of parts of a data set (mnist_png, SVHN and STL-10 have the last ones), not of classes.
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "extra", "unlabeled"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".pnm", ".tif", ".tiff")


def images_below(folder: str | Path) -> list[Path]:
    """The image files below a folder, as `files_below`, but none that is hidden (.ipynb_checkpoints, ._0.png)."""
    return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path, folder)]


def read_rgb(path: str | Path, largest: int | None = None, on_white: bool = False) -> Image.Image:
    """An image file as RGB, at most `largest` pixels wide and high; BadInput if it cannot be read or is unreasonable.

    on_white: lay what is transparent on white; without, invisible colours show, as in the official FID and VAE code.
    Its size is looked at before it is unpacked: more pixels than Pillow warns of are taken for a bomb.
    """
    try:
        if Path(path).is_fifo():
            raise ValueError("it is a pipe")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 bits a channel")
            if largest and max(width, height) > largest:
                raise BadInput(f"{path}: has {width} x {height} pixels, "
                               f"expected square images of at most {largest}; larger ones: python vae.py encode")
            thin = 100 * min(width, height) < max(width, height) or not min(width, height)
            if thin or width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"its size is {width} x {height}")
            if on_white and image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except BadInput:
        raise
    except Exception as error:                                   # Pillow raises a dozen kinds
        raise BadInput(f"{path}: not a readable image ({first_line(error)}); repair or remove it") from None


def read_image_folder(folder: str) -> tuple[np.ndarray, np.ndarray, list]:
    """(uint8 images [N, 3, H, H], labels [N], class names) of small images in class folders; all of one square size."""
    files, classes = image_files(folder)
    say_unread(folder)
    images = []                                                  # of uint8 [H, H, 3]
    for path, _ in tqdm(files, desc="images", delay=2, disable=rank() > 0, dynamic_ncols=True):
        pixels = np.array(read_rgb(path, largest=SMALL_SIDE, on_white=True))
        height, width = pixels.shape[:2]
        if not images and width != height:
            raise BadInput(f"--data {folder}: {path} has {width} x {height} pixels, expected square images")
        if not images:
            refuse_too_large(f"--data {folder}: its {len(files)} images unpack", len(files) * pixels.size,
                             TRAINED_SHARE, "images")
        if images and pixels.shape != images[0].shape:
            side = len(images[0])
            raise BadInput(f"--data {folder}: {path} is {width} x {height}, the first image {side} x {side}, "
                           "expected one size")
        images.append(pixels)
    labels = np.array([label for _, label in files])
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), labels, classes


def say_unread(folder: str | Path) -> None:
    """Say what is not read: images beside the class folders, other files in these, and what looks like classes."""
    loose = [path for path in Path(folder).iterdir() if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    inside = [path for path in files_below(folder) if path.parent != Path(folder) and not hidden(path, folder)]
    others = [path for path in inside if path.suffix.lower() not in IMAGE_SUFFIXES]
    for files, what in ((loose, "images beside"), (others, "files without the ending of an image in")):
        if files and rank() == 0:
            print(f"{folder}: {len(files)} {what} the class folders are not read ({min(files).name} is one)")
    classes = {path.relative_to(folder).parts[0] for path in inside}
    below = {path.relative_to(folder).parts[1] for path in inside if path.parent.parent != Path(folder)}
    if len(classes) == 1 and len(below) > 1 and rank() == 0:
        print(f"{folder}: one class, {min(classes)}; the folders in it are no classes (if they are: pass "
              f"{Path(folder) / min(classes)})")


def image_files(folder: str | Path) -> tuple[list, list]:
    """([(path, label)], class names) of a folder with one sub-folder per class.

    Classes and files are sorted by name, as in torchvision's ImageFolder.  BadInput if a class holds no image, or if
    the sub-folders are the parts of a data set (train, test).
    """
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder, expected one sub-folder per class")
    entries = [entry for entry in Path(folder).iterdir() if not entry.name.startswith(".")]
    for entry in entries:
        if not entry.exists() and not entry.suffix:                 # it may have been a class
            raise BadInput(f"{entry}: is a link that leads nowhere; repair it, or remove it")
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if classes and {name.lower() for name in classes} <= PARTS:
        raise BadInput(f"{folder}: its sub-folders are no classes but parts of a data set ({', '.join(classes)}); "
                       f"pass {Path(folder) / classes[0]}, or another of them")
    files, empty = [], []
    for label, name in enumerate(classes):
        images = images_below(Path(folder) / name)
        files += [(path, label) for path in images]
        if not images:
            empty.append(name)
    if not files:
        raise BadInput(f"{folder}: no images in class folders (looked for {' '.join(IMAGE_SUFFIXES)}); put them "
                       "into one sub-folder per class, or all into one")
    if empty:
        raise BadInput(f"{folder}: no image in {', '.join(empty[:3])}")
    return files, classes


def read_image(path: str | Path, size: int) -> torch.Tensor | None:
    """uint8 [3, size, size] of an image file, as the autoencoder takes it; None if it cannot be read.

    Grey and transparent images become RGB.
    """
    try:
        pixels = np.array(center_crop(read_rgb(path), size))
    except BadInput:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop of a PIL image to size x size.

    Halve with BOX while it is twice too large, BICUBIC to the shorter side, cut the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- Latent shards, in LightningDiT's format -------------------------------------------------------------------------

def load_latents(folder: str) -> Data:
    """Data of a folder of latent shards with its latents_stats.pt.

    BadInput for what `shards` and `read_stats` refuse, and for statistics that do not normalise these latents.
    """
    found = shards(folder)
    mean, std = read_stats(folder, channels=found[0].latents.shape[1])
    x = Latents(found, mean, std)
    labels = torch.cat([shard.labels for shard in found]).long()
    meta = read_meta(Path(folder) / "meta.json")
    num_classes = count_classes(labels, meta, f"--data {folder}")
    gaps = num_classes - len(labels.unique())                    # a subset of ImageNet may be meant: it is not refused
    if gaps and rank() == 0:
        print(f"--data {folder}: {gaps} of {num_classes} classes have no image; they are sampled, and never trained")

    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:256]
    sample = x[some]
    std_found, mean_found = torch.std_mean(sample, dim=(0, 2, 3))
    mean_off, std_low, std_high = mean_found.abs().max(), std_found.min(), std_found.max()
    if not sample.isfinite().all() or mean_off > 0.5 or std_low < 0.5 or std_high > 2:
        raise BadInput(f"--data {folder}: normalised with its latents_stats.pt, the channels have means up to "
                       f"{mean_off:.2f} and deviations {std_low:.2f} .. {std_high:.2f}, expected 0 and 1: "
                       "the statistics of other latents, or latents normalised already")
    y = labels.repeat(2)                                                     # both views
    return Data(x, y, num_classes, mean, std, folder, "latents", meta.get("vae_hash", ""))


def count_classes(labels: torch.Tensor, meta: dict, shown: str) -> int:
    """Classes of latents with these labels [N] and this meta.json ({}: none); BadInput if the two do not fit."""
    largest, n = int(labels.max()), meta.get("n", len(labels))
    classes = len(meta.get("classes", ())) or largest + 1
    if largest >= classes:
        raise BadInput(f"{shown}: labels go up to {largest}, but meta.json names {classes} classes; "
                       "expected shards and meta.json of one encoding")
    if not isinstance(n, int) or len(meta.get("classes", ())) > MAX_CLASSES:
        raise BadInput(f"{shown}: meta.json has {classes} classes and n {n!r}, expected at most {MAX_CLASSES} classes "
                       "and a whole number; run `python vae.py encode` again")
    if len(labels) != n:
        raise BadInput(f"{shown}: the shards hold {len(labels)} images, but meta.json says {n}; copy all shards, run "
                       f"`python vae.py encode` again, or, if a part is meant, set n to {len(labels)} there")
    return classes


def read_meta(path: Path) -> dict:
    """The meta.json of `python vae.py encode`: classes and vae_hash; {} if there is none, as in others' folders."""
    if not path.exists():
        return {}
    expected, repair = "the meta.json of `python vae.py encode`", "run that command again"
    meta = read_json(path, expected, repair=repair)
    with reading(path, expected, repair):
        if not isinstance(meta["classes"], list) or not meta["classes"] or not isinstance(meta["vae_hash"], str):
            raise ValueError("classes or vae_hash are of another kind")
    return meta


class Shard(NamedTuple):
    """One file of latents, memory-mapped."""

    path: Path
    latents: torch.Tensor           # [n, C, H, W]
    latents_flip: torch.Tensor      # [n, C, H, W] of the mirrored images
    labels: torch.Tensor            # [n], integers


REMAKE = "make it again with `python vae.py encode`, or fetch it again"
LATENT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a folder by name; hidden files (._x.safetensors, of a Mac) are none."""
    return sorted(path for path in Path(folder).glob("*.safetensors") if not path.name.startswith("."))


def shards(folder: str | Path) -> list[Shard]:
    """The shards of a folder in LightningDiT's format, in the order of their names; BadInput names the first fault."""
    found = []
    for path in shard_files(folder):
        file = open_shard(path)
        missing = sorted({"latents", "latents_flip", "labels"} - set(file.keys()))
        if missing:
            raise BadInput(f"{path}: has no {' and no '.join(missing)}, expected a shard of LightningDiT's format")
        with reading(path, "a shard of LightningDiT's format", REMAKE):
            latents, flipped, labels = (file.get_tensor(name) for name in ("latents", "latents_flip", "labels"))
        fits = latents.ndim == 4 and flipped.shape == latents.shape and labels.shape == latents.shape[:1]
        if fits and (0 in latents.shape or latents.shape[2] != latents.shape[3]):
            raise BadInput(f"{path}: latents are {list(latents.shape)}, expected [n, C, H, H] with n, C and H above 0; "
                           f"{REMAKE}")
        if not all(view.dtype in LATENT_TYPES for view in (latents, flipped)):
            raise BadInput(f"{path}: latents are {latents.dtype} and {flipped.dtype}, expected floating point; "
                           f"{REMAKE}")
        if found:
            fits = fits and latents.shape[1:] == found[0].latents.shape[1:]
        if not fits or labels.dtype not in LABEL_TYPES:
            others = f" or with {found[0].path.name}" if found else ""
            raise BadInput(f"{path}: latents {list(latents.shape)}, latents_flip {list(flipped.shape)}, "
                           f"labels {labels.dtype} {list(labels.shape)} do not fit together{others}")
        refuse_labels(labels, path)
        found.append(Shard(path, latents, flipped, labels))
    if not found:
        raise BadInput(f"{folder}: holds no latent shards (*.safetensors), expected those of LightningDiT "
                       "or of `python vae.py encode`")
    return found


def open_shard(path: str | Path) -> safe_open:
    """A shard, lazily read: keys(), get_tensor(name) (memory-mapped) and metadata().  BadInput if it is damaged."""
    with reading(path, "a whole safetensors file", REMAKE):
        return safe_open(path, framework="pt")


def read_stats(folder: str | Path, channels: int) -> tuple[list, list]:
    """(mean, std), lists of C floats, of a folder's latents_stats.pt; BadInput if it is none for so many channels."""
    path = Path(folder) / "latents_stats.pt"
    if not path.exists():
        raise BadInput(f"{path}: no such file, expected the statistics of these latents; "
                       "`python vae.py encode` leaves them beside the shards")
    state = read_weights(path)
    mean, std = state.get("mean"), state.get("std")
    complete = mean is not None and std is not None and mean.dtype in LATENT_TYPES and std.dtype in LATENT_TYPES
    if complete:
        complete = mean.numel() == std.numel() == channels and mean.isfinite().all() and std.isfinite().all()
    if not complete or not (std > 0).all():
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in list(state.items())[:3])
        raise BadInput(f"{path}: expected mean and positive std of {channels} channels, found {found}")
    return mean.flatten().double().tolist(), std.flatten().double().tolist()


class Latents:
    """`x` of a folder of shards: rows 0 .. N-1 are the images, N .. 2N-1 their mirror images.

    Memory-mapped, and normalised as rows are taken: a tensor [2N, C, H, W] as far as training uses it.
    """

    def __init__(self, found: list[Shard], mean: list, std: list):
        self.parts = [shard.latents for shard in found] + [shard.latents_flip for shard in found]   # [n_i, C, H, W]
        lengths = torch.tensor([len(part) for part in self.parts])
        self.ends = lengths.cumsum(0)
        self.starts = self.ends - lengths
        self.shape = torch.Size((int(self.ends[-1]), *self.parts[0].shape[1:]))
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: int64 [n] -> float32 [n, C, H, W]."""
        numbers = torch.searchsorted(self.ends, rows, right=True)            # the part that holds each row
        places = zip(numbers.tolist(), (rows - self.starts[numbers]).tolist())
        x = torch.stack([self.parts[number][i] for number, i in places]).float()
        return normalize(x, self.mean, self.std)


# ---- Pictures --------------------------------------------------------------------------------------------------------

def to_images(x: torch.Tensor, meta: dict, vae: torch.nn.Module | None = None) -> np.ndarray:
    """Normalised x [n, C, H, W] -> uint8 [n, H, W, 1 or 3].  meta: Data.meta.

    Latents are decoded by `vae`; without one, their first 3 channels are shown as colours (of 2, the first as grey).
    """
    if meta.get("kind") != "latents":
        return to_uint8(x, meta["mean"], meta["std"])
    if vae is None:
        shown = x[:, :3] if x.shape[1] > 2 else x[:, :1]
        return to_uint8(shown, mean=[0.5] * shown.shape[1], std=[0.25] * shown.shape[1])   # +- 2: black to white
    device = next(vae.parameters()).device
    with torch.no_grad():
        z = denormalize(x.float().to(device), meta["mean"], meta["std"])
        return np.concatenate([latents_to_uint8(vae, part) for part in z.split(8)])


def to_uint8(x: torch.Tensor, mean: list, std: list) -> np.ndarray:
    """Normalised pixels [N, C, H, W] -> uint8 [N, H, W, C]: denormalise, clamp to [0, 1], round to nearest."""
    x = denormalize(x.detach().float().cpu(), mean, std).clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def latents_to_uint8(vae: torch.nn.Module, z: torch.Tensor) -> np.ndarray:
    """Un-normalised latents [n, C, h, w] -> uint8 [n, H, W, 3], as LightningDiT's inference.

    Decode, 127.5 x + 128, clamp, truncate.
    """
    pixels = (127.5 * vae.decode(z.float()) + 128).clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def preview(path: str | Path, rows: list, meta: dict, vae: torch.nn.Module | None = None) -> None:
    """Write a PNG of labelled bands of images.

    rows: [(caption, x [n, C, H, W] normalised)], drawn ten to a line.  meta: Data.meta.  vae: decodes latents.
    """
    bands = [(text, to_images(x, meta, vae)) for text, x in rows]            # uint8 [n, H, W, 1 or 3]
    height = bands[0][1].shape[1]
    side = height * max(1, round(48 / height))                   # small images are enlarged, in whole pixels
    cell, per_line, caption = side + 4, 10, 20
    lines = [math.ceil(len(images) / per_line) for _, images in bands]
    picture = Image.new("RGB", (per_line * cell + 4, sum(caption + n * cell for n in lines) + 4), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for (text, images), n in zip(bands, lines):
        draw.text((4, top + 4), text, fill="black")
        for i, image in enumerate(images):
            if image.shape[-1] == 1:
                image = image[..., 0]                            # Pillow's grey images have two dimensions
            tile = Image.fromarray(image).resize((side, side), Image.NEAREST)
            line, column = divmod(i, per_line)
            picture.paste(tile, (4 + column * cell, top + caption + line * cell))
        top += caption + n * cell
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))
