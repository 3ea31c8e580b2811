"""FID, Inception Score, precision and recall in the features of FID's Inception network.

evaluate.py calls what is here, top to bottom: network, images, their features, a reference, the numbers.
"""
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import BadInput, barrier, rank, world
from data import SMALL_SIDE, images_below, npz_headers, read_npz_arrays, read_rgb, say_unread
from inception import load_inception
from metrics import frechet_distance, inception_score, is_covariance, moments, precision_recall, spread
from plumbing.files import check_bytes, listing_hash, lock, read_json, reading, write_atomic

WIDTHS = dict(features=2048, logits=1008)                        # of what the network gives


def feature_network(path: str, pipeline: str, device: torch.device) -> tuple[Callable, str]:
    """(network, what it is) of a weight file.

    network: callable, uint8 images [m, 3, H, W] -> dict(features [m, 2048], logits [m, 1008]).
    """
    inception, digest = load_inception(path, pipeline)
    inception = inception.to(device)

    def network(images):
        features, logits = inception(images.to(device))
        return dict(features=features, logits=logits)

    return network, f"Inception {digest} ({pipeline})"


def image_source(path: str | Path, n: int | None = None, as_trained: bool = False) -> tuple[int, Callable, str]:
    """(count, images(start, stop) -> uint8 [m, 3, H, W], hash) of a folder of images, or of an .npz with arr_0.

    n: take so many, evenly over all of them, as `spread`.  A folder's images are taken in the order of their names and
    have one size; arr_0 is uint8 [N, H, W, 3].  BadInput for anything else, and for fewer than n images; a file of a
    folder is checked when it is read.
    as_trained: of a folder what training sees (`read_image_folder`), not what the official FID codes see.
    """
    of_npz = str(path).lower().endswith(".npz")
    count, read, digest = npz_source(path) if of_npz else folder_source(path, as_trained)
    n = n or count
    if n > count:
        raise BadInput(f"--n {n}: {path} holds {count} images")

    def images(start, stop):
        return read([i * count // n for i in range(start, min(stop, n))])

    return n, images, digest


def npz_source(path: str | Path) -> tuple[int, Callable, str]:
    """(count, read(indices) -> uint8 [m, 3, H, W], hash) of an .npz with arr_0."""
    headers = npz_headers(path, str(path))
    if "arr_0" not in headers:
        found = ", ".join(headers) or "none"
        raise BadInput(f"{path}: expected an .npz with arr_0, uint8 [N, H, W, 3] (found {found})")
    shape, dtype = headers["arr_0"]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadInput(f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3] with N, H and W above 0")
    array = read_npz_arrays(path, str(path), headers, ["arr_0"], share=3 / 4)["arr_0"]
    array = np.ascontiguousarray(array)

    def read(indices):
        return torch.from_numpy(array[indices]).permute(0, 3, 1, 2)

    return len(array), read, hashlib.sha256(array).hexdigest()[:8]


def folder_source(path: str | Path, as_trained: bool) -> tuple[int, Callable, str]:
    """The same of a folder of images.  as_trained: see image_source."""
    files = images_below(path)
    if not files:
        raise BadInput(f"{path}: holds no images, expected a folder of them or an .npz with arr_0")
    of_classes = [file for file in files if file.parent != Path(path)]
    if as_trained and of_classes:
        say_unread(path)
        files = of_classes
    width, height = read_rgb(files[0]).size
    # Larger images are read as vae.py encode reads them.
    open_image = functools.partial(read_rgb, on_white=as_trained and width <= SMALL_SIDE)

    def read(indices):
        wanted, arrays = [files[i] for i in indices], []         # arrays: uint8 [H, W, 3]
        with ThreadPoolExecutor() as threads:                    # pillow decodes beside them
            images = list(threads.map(open_image, wanted))
        for file, image in zip(wanted, images):
            if image.size != (width, height):
                raise BadInput(f"{file}: is {image.width} x {image.height}, others {width} x {height}; "
                               "expected one size")
            arrays.append(np.array(image))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    return len(files), read, listing_hash(files, path)[:8]      # by which kept features are found


@torch.no_grad()
def collect(network: Callable, images: Callable, n: int, folder: Path, identity: dict, batch: int = 50) -> dict:
    """{name: [n, D]} of network(images(start, stop)) -> {name: [m, D]}, a file a batch in `folder`.

    Rank 0 has the result, the others {}.  Run again it goes on where it was stopped, and several processes share the
    batches.  The files of another identity (anything that json writes) are removed, and damaged ones are made again.
    """
    with contextlib.ExitStack() as held:
        if rank() == 0:
            held.enter_context(lock(folder / ".lock", "computing features"))
            claim(folder, identity)
        barrier()
        mine = range(rank() * batch, n, world() * batch)
        hidden = rank() > 0
        rows = sum(min(batch, n - start) for start in mine)
        with tqdm(total=rows, desc="features", unit=" images", disable=hidden, dynamic_ncols=True) as bar:
            for start in mine:
                path = folder / f"features_{start:06d}.pt"
                stop = min(start + batch, n)
                if read_part(path, stop - start) is None:
                    found = network(images(start, stop))
                    write_atomic(path, {name: value.cpu() for name, value in found.items()})
                bar.update(stop - start)
        barrier()
        if rank() > 0:
            return {}
        found = {}
        # Into tensors made once: of a million images there is no room for the parts and for their concatenation.
        for start in range(0, n, batch):
            part = read_part(folder / f"features_{start:06d}.pt", min(batch, n - start))
            if part is None:
                raise BadInput(f"{folder}: its files do not fit together; delete that folder and run the command again")
            for name, value in part.items():
                if start == 0:
                    found[name] = value.new_empty(n, value.shape[1])
                found[name][start:start + batch] = value
    return found


def claim(folder: Path, identity: dict) -> None:
    """Write identity.json; where another one was, or a damaged one, the features beside it are removed first.

    BadInput for features without one.
    """
    saved = folder / "identity.json"
    with contextlib.suppress(BadInput):                          # not there, or damaged
        if read_json(saved, "the identity of features") == identity:
            return
    found = [*folder.glob("features_*.pt"), *folder.glob(".features_*.tmp")]
    if found and not saved.exists():                             # ours are never without
        raise BadInput(f"{folder}: holds {found[0].name} and no identity.json, so it was not made here; "
                       "pass --out elsewhere")
    for old in found:
        old.unlink()
    write_atomic(saved, json.dumps(identity))


def read_part(path: Path, rows: int) -> dict | None:
    """The features of one batch of so many rows, or None where they are missing, damaged or others."""
    try:
        with reading(path, "a file of features"):
            check_bytes(path)
            part = torch.load(path, weights_only=True)
            for name, width in WIDTHS.items():
                if part[name].shape != (rows, width):
                    raise ValueError(f"{name} are {list(part[name].shape)}")
    except BadInput:
        return None
    return part


def read_reference(path: str | Path, flag: str = "--ref") -> dict:
    """dict(mu, sigma, features, space, hash) of reference statistics: of `evaluate.py ref`, ADM's or iMF's .npz.

    features and space (what made them) are None where the file has none, as ADM's and iMF's.  BadInput, which names
    the flag, if it holds no such statistics.
    """
    shown = f"{flag} {path}"
    headers = npz_headers(path, shown)
    names = [name for name in ("mu", "sigma", "ref_mu", "ref_sigma", "features") if name in headers]
    there = ", ".join(f"{name} {headers[name][1]} {list(headers[name][0])}" for name in names) or "neither"
    damaged = BadInput(f"{shown}: expected finite mu [2048] and sigma [2048, 2048], a covariance, and where it has "
                       f"them features [n, 2048] of 4 images or more (found {there}); make it again with "
                       "`python evaluate.py ref`, or fetch it again")
    for name in names:
        shape, dtype = headers[name]
        fits = shape == ((2048,) if name.endswith("mu") else (2048, 2048))
        if name == "features":
            fits = len(shape) == 2 and shape[0] >= 4 and shape[1] == 2048
        if not fits or dtype.kind not in "fiu":
            raise damaged
    found = read_npz_arrays(path, shown, headers, names, share=1 / 4)
    found = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in found.items()}
    space = None
    if "spaces" in headers and headers["spaces"][1].kind == "U" and headers["spaces"][1].itemsize <= 4000:
        space = str(read_npz_arrays(path, shown, headers, ["spaces"], share=1 / 4)["spaces"])
    mu = found.get("mu", found.get("ref_mu"))
    sigma = found.get("sigma", found.get("ref_sigma"))
    if mu is None or sigma is None or not all(np.isfinite(array).all() for array in found.values()):
        raise damaged
    if not is_covariance(torch.as_tensor(sigma)):
        raise damaged
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:8]
    return dict(mu=mu, sigma=sigma, features=found.get("features"), space=space, hash=digest)


def own_statistics(source: str, pipeline: str) -> dict | None:
    """`read_reference` of an .npz of images that holds mu and sigma beside them, else None.

    ADM's: they are of the whole data set, arr_0 is a part of it.  BadInput if the images would go another way.
    """
    if not source.lower().endswith(".npz") or not {"mu", "sigma"} <= set(npz_headers(source, source)):
        return None
    if pipeline != "adm":
        raise BadInput(f"--data {source}: holds mu and sigma of its own, made with --pipeline adm; pass that")
    return read_reference(source, "--data")


def write_reference(path: Path, found: dict, own: dict | None, space: str) -> None:
    """reference.npz of the features that `collect` found, for `read_reference`.

    own: where mu and sigma come from (`own_statistics`), None: the features.  space: what made the features.
    """
    mu, sigma = (value.numpy() for value in moments(found["features"]))
    if own:
        mu, sigma = own["mu"], own["sigma"]
    arrays = dict(mu=mu, sigma=sigma, features=spread(found["features"], 10_000).numpy(), spaces=space)

    def save(temporary):
        with open(temporary, "wb") as file:                      # numpy would add a suffix to a name
            np.savez(file, **arrays)

    write_atomic(path, save)


def inception_metrics(found: dict, ref: dict, device: torch.device | str = "cpu") -> dict:
    """The numbers, of found = {features [n, 2048], logits [n, 1008]} and ref = read_reference(...).

    device: where the distances of precision and recall are computed, 7e12 of their terms at 50,000 images.
    """
    if not all(value.isfinite().all() for value in found.values()):
        raise BadInput("the features hold NaN or infinity: the images or the network's weights are damaged")
    probs = found["logits"].double().softmax(1)
    metrics = dict(fid=frechet_distance(*moments(found["features"]), ref["mu"], ref["sigma"]))
    metrics["is_1split"], _ = inception_score(probs, splits=1)
    metrics["is_splits"] = min(10, len(probs))
    metrics["is"], metrics["is_std"] = inception_score(probs, metrics["is_splits"])
    if ref["features"] is not None:
        real, fake = torch.as_tensor(ref["features"]).to(device), found["features"].to(device)
        metrics["precision_inception"], metrics["recall_inception"] = precision_recall(real, fake)
        metrics["n_real_inception"] = len(real)
    return metrics


def describe(metrics: dict) -> str:
    """The numbers of `inception_metrics` in one line."""
    line = (f"{metrics['fid']:.4f}, IS {metrics['is']:.3f} +- {metrics['is_std']:.3f} "
            f"({metrics['is_splits']} shuffled splits; {metrics['is_1split']:.3f} in one)")
    if "precision_inception" in metrics:
        precision, recall, n_real = (metrics[f"{key}_inception"] for key in ("precision", "recall", "n_real"))
        line += f", inception precision {precision:.4f}, recall {recall:.4f} (k = 3, {n_real} real)"
    return line
