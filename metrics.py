"""Metrics on features of images, and the feature space of a pixel data set: a small classifier of its own.

    fd          Frechet distance of its 64 penultimate features, Gaussian fit, all real images against n generated
                ones; 0 is best
    is          exp E KL(p(class | image) || p(class)) of its softmax: at most the number of classes (the form of
                Inception Score)
    precision   share of generated images inside some real 3-nearest-neighbour ball; recall: the reverse
                (Kynkaanniemi et al.).  Of more than 10,000 real images, 10,000 spread evenly over them
    acc         share of generated images that the classifier gives the class they were asked for

`Features.floor` compares real images with real ones: the test part with the training part, or, where there is none,
one random half with the other.  A yardstick, no bound: with few images (900 of the digits against 900) the distance
is too large, and samples of a good network score below it.
"""
import contextlib
import hashlib
import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import BadInput
from plumbing.checkpoints import read_weights, weights_hash
from plumbing.files import check_bytes, write_atomic

OF_RESULTS = Path(__file__).resolve().parent / "results" / "classifiers"     # those behind the tables in results/
METRICS = ("fd", "is", "precision", "recall", "acc")
EVAL_NEIGHBOURS = 10_000        # real images of precision and recall, at most
EVAL_SAMPLES = ((10_000, 5000), (1000, 2000), (0, 500))         # (real images from here on, samples of an evaluation)
EVAL_SEED = 0                   # noise of the samples; not the training seed, to compare runs on the same noise


# ---- Metrics on features ---------------------------------------------------------------------------------------------

def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D] (N - 1) of features [N, D], in float64.

    In parts: float64 copies of a million Inception features would take 40 GB.
    """
    parts = torch.as_tensor(features).split(100_000)
    n = sum(len(part) for part in parts)
    mean = sum(part.double().sum(0) for part in parts) / n
    cov = 0
    for part in parts:
        centred = part.double() - mean
        cov = cov + centred.T @ centred
    return mean, cov / (n - 1)


def frechet_distance(mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), >= 0, in float64.  mu [D], cov [D, D].

    FID when the features are Inception's (Heusel et al.).  No matrix square root: with cov1 = L L^T the trace is the
    sum of sqrt(eigenvalues of L^T cov2 L), a symmetric problem, where scipy's sqrtm takes 5 to 15 times longer and can
    turn complex on singular input.  Eigenvalues below rounding count as zero.

    Raises ValueError for shapes that do not fit, NaN or infinity, and covariances that are none (`is_covariance`).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"frechet_distance: shapes {list(mu1.shape)}, {list(cov1.shape)} "
                         f"against {list(mu2.shape)}, {list(cov2.shape)}")
    if not all(a.isfinite().all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError("frechet_distance: the statistics hold NaN or infinity")
    if not (is_covariance(cov1) and is_covariance(cov2)):
        raise ValueError("frechet_distance: a covariance is not symmetric, or has a negative eigenvalue")
    L, failed = torch.linalg.cholesky_ex(cov1)
    if failed:                                                   # singular: few images
        e, V = torch.linalg.eigh(cov1)
        L = V * e.clamp(min=0).sqrt()
    M = L.T @ cov2 @ L
    e = torch.linalg.eigvalsh((M + M.T) / 2)
    e = torch.where(e > e.max() * len(e) * 2.2e-16, e, 0.0)      # float64 rounding
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * e.sqrt().sum()
    return max(0.0, distance.item())


def is_covariance(cov: torch.Tensor) -> bool:
    """Whether cov [D, D] is symmetric, without negative eigenvalues: up to 1e-4 of its largest variance.

    float32 rounds a covariance of 2,048 features at 1e-6 of that.
    """
    cov = torch.as_tensor(cov).double()
    rounding = 1e-4 * cov.diagonal().abs().max()
    if (cov - cov.T).abs().max() > rounding:
        return False
    shifted = cov + rounding * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    return not cov.any() or not torch.linalg.cholesky_ex(shifted).info


def inception_score(probs: torch.Tensor, splits: int = 10, shuffle: bool = True) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)), as (mean, population std) over `splits`.  probs [N, classes], rows sum to 1.

    shuffle: permute the rows first, as torch-fidelity does (RandomState(2020)); labels sorted by class would wreck a
    split.  Raises ValueError if a row is negative or does not sum to 1, or if there are more splits than rows, or none.
    """
    probs = torch.as_tensor(probs).double()
    if not 1 <= splits <= len(probs):
        raise ValueError(f"inception_score: {splits} splits of {len(probs)} rows, expected 1 to {len(probs)}")
    if not ((probs.sum(1) - 1).abs() < 1e-3).all() or probs.min() < 0:                # False for nan
        raise ValueError("inception_score: rows of probs are negative or do not sum to 1; pass probabilities")
    if shuffle:
        probs = probs[np.random.RandomState(2020).permutation(len(probs))]
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits:(i + 1) * len(probs) // splits]
        marginal = p.mean(0, keepdim=True)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(1)   # [N / splits]; 0 log 0 = 0
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(unbiased=False).item()


def pairwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [len(a), len(b)] by a matrix product: in float64 its rounding hides 1e-7 of a row's norm."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def ball_radii(points: torch.Tensor, k: int = 3, chunk: int = 1000) -> torch.Tensor:
    """Distance of each point [N, D] to its k-th nearest other point -> [N]."""
    nearest = [pairwise(rows, points).topk(k + 1, largest=False).values[:, -1] for rows in points.split(chunk)]
    return torch.cat(nearest)                                    # the nearest of all is the point itself


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3, chunk: int = 1000,
                     real_radii: torch.Tensor | None = None) -> tuple[float, float]:
    """(precision, recall) in [0, 1] of feature sets real [N, D] and fake [M, D], in float64 (Kynkaanniemi et al.).

    A point's ball reaches to its k-th nearest other point of the same set; ties count as inside.  Precision: share of
    fake inside some real ball.  Recall: share of real inside some fake ball.  `chunk` rows of distances at a time.
    real_radii: ball_radii(real, k), where they are known.

    Raises ValueError if a set has k rows or fewer, or holds NaN or infinity, which lie in no ball.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision_recall: k = {k} needs more than {k} rows on both sides, "
                         f"found {len(real)} and {len(fake)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("precision_recall: the features hold NaN or infinity")

    def covered(points, centres, radius):
        radius = radius + 1e-7 * centres.norm(dim=1)                        # equal points stay ties: see pairwise
        inside = [(pairwise(rows, centres) <= radius).any(1) for rows in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    precision = covered(fake, real, ball_radii(real, k, chunk) if real_radii is None else real_radii)
    recall = covered(real, fake, ball_radii(fake, k, chunk))
    return precision, recall


# ---- The feature space of a pixel data set ---------------------------------------------------------------------------

class Diverged(BadInput):
    """Samples that hold NaN or infinity."""


def refuse_diverged(*tensors: torch.Tensor) -> None:
    """Diverged unless all these samples, or what was made of them, are finite."""
    if not all(values.isfinite().all() for values in tensors):
        raise Diverged("the samples hold NaN or infinity: the network has diverged; take an earlier checkpoint")


class Reference(NamedTuple):
    """Real images as the metrics need them."""

    mu: torch.Tensor                # [64] mean of the features of all images
    cov: torch.Tensor               # [64, 64] their covariance
    near: torch.Tensor              # [n, 64] features of at most EVAL_NEIGHBOURS of them, taken evenly
    radii: torch.Tensor             # [n] radii of the balls around these


def spread(rows: torch.Tensor, n: int) -> torch.Tensor:
    """n of the rows [N, ...], evenly over all of them (all, if N <= n): a folder of images comes sorted by class."""
    return rows if len(rows) <= n else rows[torch.arange(n) * len(rows) // n]


def reference_of(features: torch.Tensor) -> Reference:
    """The Reference of features [N, 64], float64."""
    near = spread(features, EVAL_NEIGHBOURS)
    return Reference(*moments(features), near, ball_radii(near))


def refuse_few(data) -> None:
    """BadInput for a data.Data of fewer than 8 images."""
    if len(data.x) < 8:
        raise BadInput(f"--data {data.source}: {len(data.x)} images are too few to evaluate against, "
                       "expected at least 8")


def samples_for(images: int, classes: int) -> int:
    """How many samples an evaluation takes beside so many real images: one of each class at least."""
    return max(classes, next(n for least, n in EVAL_SAMPLES if images >= least))


class Features:
    """The feature space of one data set, and the real images in it: a classifier trained once, then kept in `cache`.

    For the digits and Fashion-MNIST it is the one in results/, so that distances compare with those of the tables.
    data: a data.Data of pixels; BadInput for fewer than 8 images.
    features(x [n, C, H, W] normalised) -> (features [n, 64], probabilities [n, classes]), float64 on the CPU.
    features.n: how many samples an evaluation takes.
    """

    def __init__(self, data, cache: str | Path = "runs/cache"):
        refuse_few(data)
        digest = digest_of(data)
        name = f"features-{digest}.pt"
        path = Path(cache) / f"features-{digest}-{recipe()}.pt"
        with torch.random.fork_rng(devices=[]):                  # the first process alone is here: no other may notice
            self.net = classifier(data)
            if not load_classifier(self.net, OF_RESULTS / name) and not load_classifier(self.net, path):
                train_classifier(self.net, data)
                keep(path, self.net.state_dict())                # two processes that train it write the same
        self.net.requires_grad_(False).eval()
        self.hash = weights_hash(self.net)[:8]
        self.source = data.source
        self.shape = data.x.shape[1:]
        self.n = samples_for(len(data.x), data.num_classes)
        bar = f"features of {data.source}" if len(data.x) > 20_000 else None     # so many take seconds
        real = path.with_name(f"real-{digest}-{self.hash}.pt")
        self.real = load_or_compute(real, len(data.x), lambda: self(data.x, bar)[0])
        self.real_y = data.y
        self.test = data.test
        self.reference = reference_of(self.real)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, bar: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        parts = tqdm(x.float().cpu().split(500), desc=bar, mininterval=0.5, disable=bar is None)
        features = torch.cat([self.net[:-1](rows) for rows in parts])
        return features.double(), self.probabilities(features)

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, 64] -> [n, classes], float64."""
        return self.net[-1](features.float()).double().softmax(1)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """The metrics of the file header for generated x [n, C, H, W] asked to be of classes y [n].

        Diverged if x holds NaN or infinity, or numbers so large that its features do.
        """
        features, probs = self(x)
        refuse_diverged(x, features)
        return compare(self.reference, features, probs, y)

    @cached_property
    def of_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, probabilities) of the test images."""
        return self(self.test[0])

    def floor(self) -> dict[str, float]:
        """The same metrics of real images; `is` and `acc` without a test part are those of all images."""
        if self.test:
            return compare(self.reference, *self.of_test, self.test[1])
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        one, other = self.real[order[::2]], self.real[order[1::2]]
        return compare(reference_of(one), other, self.probabilities(self.real), self.real_y)

    def floor_name(self) -> str:
        return "real images, test part" if self.test else "real images, half against half"

    def definition(self, n: int | None = None, seed: int = EVAL_SEED, weights: str = "EMA weights") -> str:
        """One line that defines the numbers, for n samples; it is printed and kept beside them."""
        right, near = "", ""
        if self.net[-1].out_features == 1:
            right = ", which a single class has taught nothing"
        probs, y = (self.of_test[1], self.test[1]) if self.test else (self.probabilities(self.real), self.real_y)
        share = (probs.argmax(1) == y).double().mean().item()
        largest = y.bincount().max().item() / len(y)             # what the name of one class for all would reach
        if self.test:
            right = f", {100 * share:.1f}% right on {len(self.test[1])} test images"
        elif not right and share <= max(0.5, largest):
            right = f", {100 * share:.1f}% right on its own training images: too little to measure with"
        if len(self.reference.near) < len(self.real):
            near = f" (precision and recall: {len(self.reference.near)} of them, evenly)"
        return (f"fd, is, precision, recall (k=3) and acc in 64 features of a classifier of {self.source} "
                f"(weights {self.hash}{right}); n={n or self.n} generated, classes in turn, "
                f"noise by sample index (seed {seed}), against {len(self.real)} real{near}; {weights}")


def compare(real: Reference, fake: torch.Tensor, probs: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The metrics of the file header: of features fake [M, 64] against real ones, and of probs [n, classes], y [n]."""
    precision, recall = precision_recall(real.near, fake, real_radii=real.radii)
    return {
        "fd": frechet_distance(real.mu, real.cov, *moments(fake)),
        "is": inception_score(probs, splits=1)[0],
        "precision": precision,
        "recall": recall,
        "acc": (probs.argmax(1) == y).double().mean().item(),
    }


def load_or_compute(path: Path, n: int, compute: Callable) -> torch.Tensor:
    """Features [n, 64] from a file, or computed, and kept there if they are many.  A damaged file counts as none."""
    with contextlib.suppress(Exception):                            # missing or damaged
        check_bytes(path)
        found = read_weights(path).get("features")
        if found is not None and found.shape == (n, 64) and found.dtype == torch.float64 and found.isfinite().all():
            return found
    features = compute()
    if n >= EVAL_NEIGHBOURS:
        keep(path, dict(features=features))
    return features


def keep(path: Path, content: dict) -> None:
    """Write a file of the cache, if it can be written: without it the same is computed again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def is_large(data) -> bool:
    """Whether images have 24 or more pixels a side: the classifier halves them twice, and sees them less often."""
    return data.x.shape[2] >= 24


def classifier(data) -> nn.Sequential:
    """[n, C, H, H] -> logits [n, classes]; without its last layer, the 64 features."""
    channels, size = data.x.shape[1:3]
    last = 2 if is_large(data) else 1
    side = (size + 1) // 2
    side = (side + last - 1) // last
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU(),           # half the size
        nn.Conv2d(64, 64, 3, last, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side ** 2, 64), nn.ReLU(),
        nn.Linear(64, data.num_classes),
    )


def load_classifier(net: nn.Sequential, path: Path) -> bool:
    """Whether `path` holds finite weights of this network, which are then in it: a damaged cache is made again."""
    with contextlib.suppress(Exception):                         # missing or damaged
        check_bytes(path)
        state, own = read_weights(path), net.state_dict()
        fits = state.keys() == own.keys() and all(state[k].shape == own[k].shape for k in own)
        if fits and all(value.isfinite().all() for value in state.values()):
            net.load_state_dict(state)
            return True
    return False


def digest_of(data) -> str:
    """Hash of the images and labels, by which their classifier is found."""
    return hashlib.sha256(data.x.numpy().tobytes() + data.y.numpy().tobytes()).hexdigest()[:12]


def recipe() -> str:
    """Hash of the code that makes a classifier: a cache of older code is not taken."""
    text = inspect.getsource(classifier) + inspect.getsource(train_classifier)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def train_classifier(net: nn.Sequential, data) -> None:
    """On one thread and from a fixed seed, so that a machine gives the same weights each time.

    The caller's number of threads is given back.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    epochs, batch = (4, 128) if is_large(data) else (20, 64)
    rounds = max(200, epochs * (len(data.x) // batch))           # 200: few images would leave it at chance
    batch = min(batch, len(data.x))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, rounds)
    for _ in tqdm(range(rounds), desc=f"classifier of {data.source}", mininterval=0.5, disable=not is_large(data)):
        rows = torch.randint(len(data.x), (batch,))
        loss = F.cross_entropy(net(data.x[rows]), data.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
