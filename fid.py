"""FID, Inception Score, precision and recall in the features of FID's Inception network, and of VGG16.

evaluate.py calls what is here, top to bottom: networks, images, their features, a reference, the numbers.
"""
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import BadInput, rank, save_atomic, world
from data import IMAGE_SUFFIXES, UNREADABLE_IMAGE
from inception import load_inception, load_vgg16
from metrics import frechet_distance, inception_score, moments, precision_recall


def feature_networks(inception_path: str, vgg_path: str | None, pipeline: str,
                     device: torch.device) -> tuple[Callable, str]:
    """(network, what it is), of the weight files; network is a callable, uint8 images [m, 3, H, W] -> features.

    The features: dict(features [m, 2048], logits [m, 1008]) and, with VGG16, vgg [m, 4096].
    """
    inception, digest = load_inception(inception_path, pipeline)
    inception = inception.to(device)
    spaces = f"Inception {digest} ({pipeline})"
    vgg = None
    if vgg_path:
        vgg, digest = load_vgg16(vgg_path)
        vgg = vgg.to(device)
        spaces += f", VGG16 {digest}"

    def network(images):
        images = images.to(device)
        features, logits = inception(images)
        found = dict(features=features, logits=logits)
        if vgg is not None:
            found["vgg"] = vgg(images)
        return found

    return network, spaces


def image_source(path: str | Path) -> tuple[int, Callable, str]:
    """(count, images(start, stop) -> uint8 [m, 3, H, W], hash) of a folder of images, or of an .npz with arr_0.

    A folder's images are taken in the order of their names and have one size; arr_0 is uint8 [N, H, W, 3].  BadInput
    for anything else, of a folder when the image is read.
    """
    return npz_source(path) if str(path).endswith(".npz") else folder_source(path)


def npz_source(path: str | Path) -> tuple[int, Callable, str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except (OSError, KeyError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: expected an .npz with arr_0, uint8 [N, H, W, 3] ({reason})") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise BadInput(f"{path}: arr_0 is {array.dtype} {list(array.shape)}, expected uint8 [N, H, W, 3]")

    def images(start, stop):
        return torch.from_numpy(array[start:stop]).permute(0, 3, 1, 2)

    return len(array), images, hashlib.sha256(array.tobytes()).hexdigest()[:8]


def folder_source(path: str | Path) -> tuple[int, Callable, str]:
    paths = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
    files = [file for file in paths if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise BadInput(f"{path}: holds no images, expected a folder of them or an .npz with arr_0")

    def images(start, stop):
        arrays = []                                              # of uint8 [H, W, 3]
        for file in files[start:stop]:
            try:
                with Image.open(file) as image:
                    array = np.array(image.convert("RGB"))
            except UNREADABLE_IMAGE as error:
                raise BadInput(f"{file}: not a readable image ({error}); repair or remove it") from None
            arrays.append(array)
            if array.shape != arrays[0].shape:
                height, width, _ = array.shape
                first_height, first_width, _ = arrays[0].shape
                raise BadInput(f"{file}: is {width} x {height}, others {first_width} x {first_height}; "
                               "expected one size")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    listing = "".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
    return len(files), images, hashlib.sha256(listing.encode()).hexdigest()[:8]


@torch.no_grad()
def collect(network: Callable, images: Callable, n: int, folder: Path, identity: dict, batch: int = 50) -> dict:
    """{name: [n, D]} of network(images(start, stop)) -> {name: [m, D]}, a file a batch in `folder`.

    Run again it goes on where it was stopped, and several processes share the batches.  A folder of another identity
    (anything that json writes) is emptied.
    """
    saved = folder / "identity.json"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if saved.exists() and json.loads(saved.read_text()) != identity:
            shutil.rmtree(folder)
            folder.mkdir()
        saved.write_text(json.dumps(identity))
    if world() > 1:
        torch.distributed.barrier()
    mine = range(rank() * batch, n, world() * batch)
    hidden = rank() > 0
    with tqdm(total=len(mine) * batch, desc="features", unit=" images", disable=hidden, dynamic_ncols=True) as bar:
        for start in mine:
            path = folder / f"features_{start:06d}.pt"
            if not path.exists():
                found = network(images(start, min(start + batch, n)))
                save_atomic({name: value.cpu() for name, value in found.items()}, path)
            bar.update(batch)
    if world() > 1:
        torch.distributed.barrier()
    paths = [folder / f"features_{start:06d}.pt" for start in range(0, n, batch)]
    parts = [torch.load(path, weights_only=True) for path in paths]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_reference(path: str | Path) -> dict:
    """dict(mu, sigma, features, vgg, hash) of reference statistics: of `python evaluate.py ref`, ADM's or iMF's .npz.

    features and vgg are None where the file has none, as ADM's and iMF's.  BadInput if it holds no such statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("mu", "sigma", "ref_mu", "ref_sigma", "features", "vgg")
            found = {name: file[name] for name in names if name in file.files}
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--ref {path}: not a readable .npz ({reason})") from None
    mu = found.get("mu", found.get("ref_mu"))
    sigma = found.get("sigma", found.get("ref_sigma"))
    complete = mu is not None and sigma is not None and mu.shape == (2048,) and sigma.shape == (2048, 2048)
    if not complete or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        there = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items()) or "neither"
        raise BadInput(f"--ref {path}: expected finite mu [2048] and sigma [2048, 2048] (found {there})")
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:8]
    return dict(mu=mu, sigma=sigma, features=found.get("features"), vgg=found.get("vgg"), hash=digest)


def write_reference(path: Path, found: dict, source: str) -> None:
    """reference.npz of the features `collect` found of --data, for `read_reference`."""
    mu, sigma = (value.numpy() for value in moments(found["features"]))
    if source.endswith(".npz"):
        with np.load(source) as own:
            if {"mu", "sigma"} <= set(own.files):                # ADM's: of the whole data set, arr_0 a part of it
                mu, sigma = own["mu"], own["sigma"]
    arrays = dict(mu=mu, sigma=sigma, features=found["features"][:10_000].numpy())
    if "vgg" in found:
        arrays["vgg"] = found["vgg"][:50_000].half().numpy()     # half: as StyleGAN3 compares them
    np.savez(path, **arrays)


def inception_metrics(found: dict, ref: dict) -> dict:
    """The numbers, of found = {features [n, 2048], logits [n, 1008][, vgg [n, 4096]]} and ref = read_reference(...)."""
    if not all(value.isfinite().all() for value in found.values()):
        raise BadInput("the features hold NaN or infinity: the images or the network's weights are damaged")
    probs = found["logits"].double().softmax(1)
    metrics = dict(fid=frechet_distance(*moments(found["features"]), ref["mu"], ref["sigma"]))
    metrics["is_1split"], _ = inception_score(probs, splits=1)
    metrics["is"], metrics["is_std"] = inception_score(probs, splits=10)
    for space, name in (("features", "inception"), ("vgg", "vgg")):
        if ref[space] is not None and space in found:
            metrics[f"precision_{name}"], metrics[f"recall_{name}"] = precision_recall(ref[space], found[space])
            metrics[f"n_real_{name}"] = len(ref[space])
    return metrics


def describe(metrics: dict) -> str:
    """The numbers of `inception_metrics` in one line."""
    line = (f"{metrics['fid']:.4f}, IS {metrics['is']:.3f} +- {metrics['is_std']:.3f} "
            f"(10 shuffled splits; {metrics['is_1split']:.3f} in one)")
    for name in ("inception", "vgg"):
        if f"precision_{name}" in metrics:
            precision, recall, n_real = (metrics[f"{key}_{name}"] for key in ("precision", "recall", "n_real"))
            line += f", {name} precision {precision:.4f}, recall {recall:.4f} (k = 3, {n_real} real)"
    return line
