"""Metrics of generated samples, and what they were measured with.

    python evaluate.py runs/fsf_dmd-digits-imf/model.pt                     # 1, 2 and 4 steps, one line each, and a picture
    python evaluate.py runs/.../model.pt --inception W --ref REF --vae VAE  # FID, IS, precision and recall in Inception features
    python evaluate.py --from_images DIR --inception W --ref REF            # the same of any other system's images
    python evaluate.py ref --data DIR --inception W --out DIR               # reference statistics of real images

Without --inception, the feature space of pixel data sets: a small convolutional classifier trained once on the data set itself, on one
CPU thread from a fixed seed (3 s for the digits; 97% right on the odd images when trained on the even ones), cached under runs/cache.

    fd          Frechet distance of its 64 penultimate features, Gaussian fit, all real images against n generated ones; 0 is best
    is          exp E KL(p(class | image) || p(class)) of its softmax: at most the number of classes (the form of Inception Score)
    precision   share of generated images inside some real 3-nearest-neighbour ball; recall: the reverse (Kynkaanniemi et al.)
    acc         share of generated images that the classifier gives the class they were asked for

`floor` compares one random half of the real images with the other: what a perfect generator would score at that size.
"""
import argparse
import contextlib
import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import BadInput, Parser, load_checkpoint, load_network, main, noise_by_index, number, pick_device, preview, rank, save_atomic, setup, world
from inception import load_inception, load_vgg16
from model import euler_sample, fixed_guidance, guided_map, guided_velocity, interpolate, sample, v_to_x0
from vae import IMAGE_SUFFIXES, load_data, load_vae, to_images, weights_hash

EULER_STEPS = 25                # of an instantaneous velocity, where --steps does not say; the paper's teacher rows use many small steps too
EVAL_SEED = 0                   # noise of the samples; independent of the training seed, so that runs are compared on the same noise


# ------------------------------------------------------------------------------------------------------------------------------
# Metrics on features
# ------------------------------------------------------------------------------------------------------------------------------

def moments(features):
    """Mean [D] and covariance [D, D] (N - 1) of features [N, D], in float64."""
    features = torch.as_tensor(features).double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), a float >= 0.  mu [D], cov [D, D]; computed in float64.

    No matrix square root: with cov1 = L L^T the trace is the sum of sqrt(eigenvalues of L^T cov2 L), a symmetric problem, where
    scipy's sqrtm takes 5 to 15 times longer and can turn complex on singular input.  Eigenvalues below rounding count as zero.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"frechet_distance: shapes {list(mu1.shape)}, {list(cov1.shape)} against {list(mu2.shape)}, {list(cov2.shape)}")
    if not all(a.isfinite().all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError("frechet_distance: the statistics hold NaN or infinity")
    L, failed = torch.linalg.cholesky_ex(cov1)
    if failed:                                                                                        # singular: few images
        e, V = torch.linalg.eigh(cov1)
        L = V * e.clamp(min=0).sqrt()
    M = L.T @ cov2 @ L
    e = torch.linalg.eigvalsh((M + M.T) / 2)
    e = torch.where(e > e.max() * len(e) * 2.2e-16, e, 0.0)                                           # float64 rounding
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * e.sqrt().sum()
    return max(0.0, distance.item())


def inception_score(probs, splits=10, shuffle=True):
    """exp of the mean KL(p(y|x) || p(y)), as (mean, population std) over `splits`.  probs [N, classes], rows sum to 1.

    shuffle: permute the rows first, as torch-fidelity does (RandomState(2020)); labels sorted by class would wreck a split.
    """
    probs = torch.as_tensor(probs).double()
    if shuffle:
        probs = probs[np.random.RandomState(2020).permutation(len(probs))]
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits:(i + 1) * len(probs) // splits]
        marginal = p.mean(0, keepdim=True)
        scores.append((torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(1).mean().exp())             # 0 log 0 = 0
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(unbiased=False).item()


def precision_recall(real, fake, k=3, chunk=1000):
    """(precision, recall) in [0, 1] of feature sets real [N, D] and fake [M, D], in float64, ties counted as inside.

    A point's ball reaches to its k-th nearest other point of the same set.  Precision: share of fake inside some real ball.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision_recall: k = {k} needs more than {k} rows on both sides, found {len(real)} and {len(fake)}")

    def cdist(a, b):
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(points):                                                                                # the point itself is the first
        return torch.cat([cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(chunk)])

    def covered(points, centres, radius):
        return torch.cat([(cdist(rows, centres) <= radius).any(1) for rows in points.split(chunk)]).double().mean().item()

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


# ------------------------------------------------------------------------------------------------------------------------------
# The feature space of a pixel data set
# ------------------------------------------------------------------------------------------------------------------------------

class Features:
    """The classifier of one data set: features(x) -> ([n, 64], probabilities [n, classes]), its hash, and the real images' statistics."""

    def __init__(self, data, cache="runs/cache"):
        if len(data.x) < 8:
            raise BadInput(f"--data {data.source}: {len(data.x)} images are too few to evaluate against, expected at least 8")
        digest = hashlib.sha256(data.x.numpy().tobytes() + data.y.numpy().tobytes()).hexdigest()[:12]
        self.net, path = self.build(data), Path(cache) / f"features-{digest}.pt"
        if path.exists():
            self.net.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.train(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_atomic(self.net.state_dict(), path)
        self.net.requires_grad_(False).eval()
        self.hash = weights_hash(self.net)[:8]
        self.real, self.real_y, self.source, self.shape = self(data.x)[0], data.y, data.source, data.x.shape[1:]

    @staticmethod
    def build(data):
        channels, size = data.x.shape[1:3]
        return nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU(),
                             nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
                             nn.Linear(64 * ((size + 1) // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, data.num_classes))

    def train(self, data, epochs=20, batch=64):
        """On one thread and from a fixed seed, so that a machine gives the same weights each time."""
        threads, rng_state = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        for layer in self.net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        rounds = epochs * max(1, len(data.x) // batch)
        optimizer = torch.optim.AdamW(self.net.parameters(), 4e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, rounds)
        for _ in range(rounds):
            rows = torch.randint(len(data.x), (batch,))
            loss = F.cross_entropy(self.net(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.set_num_threads(threads)
        torch.set_rng_state(rng_state)

    @torch.no_grad()
    def __call__(self, x):
        features = torch.cat([self.net[:-1](rows) for rows in x.float().cpu().split(500)])
        return features.double(), self.net[-1](features).double().softmax(1)

    def metrics(self, x, y):
        """The metrics of the file header for generated x [n, C, H, W] asked to be of classes y [n]."""
        if not x.isfinite().all():
            raise BadInput("the samples hold NaN or infinity: the network has diverged; take an earlier checkpoint")
        features, probs = self(x)
        precision, recall = precision_recall(self.real, features)
        return {"fd": frechet_distance(*moments(self.real), *moments(features)), "is": inception_score(probs, splits=1)[0],
                "precision": precision, "recall": recall, "acc": (probs.argmax(1) == y).double().mean().item()}

    def floor(self):
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        a, b = self.real[order[::2]], self.real[order[1::2]]
        precision, recall = precision_recall(a, b)
        probs = self.net[-1](self.real.float()).double().softmax(1)
        return {"fd": frechet_distance(*moments(a), *moments(b)), "is": inception_score(probs, splits=1)[0],
                "precision": precision, "recall": recall, "acc": (probs.argmax(1) == self.real_y).double().mean().item()}

    def definition(self, n, seed=EVAL_SEED):
        return (f"fd, is, precision, recall (k=3) and acc in 64 features of a classifier of {self.source} (weights {self.hash}); "
                f"n={n} generated, classes in turn, noise by sample index (seed {seed}), against {len(self.real)} real; EMA weights")


# ------------------------------------------------------------------------------------------------------------------------------
# Samples of a network
# ------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(net, n, shape, steps, omega=1.0, guide_to=1.0, channels=None, seed=EVAL_SEED, batch=500, classes=None, start=0, velocity=False):
    """n samples [n, C, H, W] and their classes [n] = 0, 1, 2, ... in turn (of the first `classes` if given).

    steps: of the flow map, or Euler steps of the instantaneous velocity (a plain network; any other with velocity=True).

    omega, guide_to: CFG scale and interval, an input of the network or (plain, on `channels`) real CFG.  start: index of the first
    sample; the noise and the class of sample i depend on (seed, i) alone.
    """
    device, was_training = next(net.parameters()).device, net.training
    net.eval()
    y, samples = torch.arange(start, start + n) % (classes or net.num_classes), []
    for rows in torch.arange(start, start + n).split(batch):
        eps, labels = noise_by_index(seed, rows, shape).to(device), y[rows - start].to(device)
        guidance = fixed_guidance(omega, 0.0, guide_to, eps)
        if velocity or net.conditioning == "plain":
            x = euler_sample(lambda x, t, y: guided_velocity(net, x, t, y, guidance, channels), eps, labels, steps)
        else:
            x = sample(lambda x, t, y, s: guided_map(net, x, t, s, y, guidance), eps, labels, steps)
        samples.append(x.cpu())
    net.train(was_training)
    return torch.cat(samples), y


def sampler_steps(net, steps=None, velocity=False, flow_map=(1, 2, 4)):
    """The numbers of steps to sample with: those given, else 25 of a velocity and 1, 2 and 4 of a flow map."""
    return list(steps or ([EULER_STEPS] if velocity or net.conditioning == "plain" else flow_map))


def metric_space(data, args):
    """The Features of pixel data in the first process; None in the others, and for latents, which have no metric while training."""
    decoder(args.vae, data.vae, torch.device("cpu"))                                                  # a wrong --vae is refused now, not at the first picture
    return Features(data) if rank() == 0 and data.kind == "pixels" else None


@lru_cache(maxsize=1)
def decoder(args_vae, expected, device):
    """The VAE of --vae on the device, or None without the flag.  Refuses another VAE than the one that made the latents."""
    if not args_vae:
        return None
    vae, name = load_vae(args_vae)
    if expected and weights_hash(vae) != expected:
        raise BadInput(f"--vae {args_vae}: is not the VAE ({expected}) that made these latents")
    return vae.to(device)


def evaluate(net, features, args, steps=None, n=2000, seed=EVAL_SEED, velocity=False):
    """{"fd_1step": ..., "fd_2step": ..., ...}: every metric at every number of sampling steps (default: `sampler_steps`).

    args: anything with omega, guide_to and cfg_channels, the guidance to sample with.  velocity: as in `generate`.  features None (latents): {}.
    """
    if features is None:
        return {}
    guidance = args.omega, args.guide_to, args.cfg_channels or None
    return {f"{metric}_{N}step": value for N in sampler_steps(net, steps, velocity)
            for metric, value in features.metrics(*generate(net, n, features.shape, N, *guidance, seed, velocity=velocity)).items()}


def show(path, nets, data, args, steps=None, velocity=False):
    """A picture: real images, then the samples of each (caption, network) from the same noise, three of each of the first ten classes."""
    shown = min(data.num_classes, 10)
    rows_of = [(data.y == c).nonzero()[:, 0] for c in range(shown)]
    some = next(rows for rows in rows_of if len(rows))
    real = torch.cat([data.x[rows[k % len(rows)].view(1)] if len(rows) else 0 * data.x[some[:1]] for k in range(3) for rows in rows_of])
    rows = [("real", real)]
    for caption, net in nets:
        for N in sampler_steps(net, steps, velocity, flow_map=(1, 2)):
            x, _ = generate(net, 3 * shown, data.x.shape[1:], N, args.omega, args.guide_to, args.cfg_channels or None, classes=shown, velocity=velocity)
            rows.append((f"{caption}, {N} step{'s' * (N > 1)}", x))
    preview(path, rows, data.meta, decoder(args.vae, data.vae, next(nets[0][1].parameters()).device))


HEALTH_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def health(run, generator, v_fake, v_teacher, dm=None, gan=None, M=1, n=100):
    """The health panel of a distribution matching run: numbers into metrics.jsonl, a picture beside the samples.

    generator: callable (z [n, M, C, H, W], y [n]) -> x_hat; v_fake, v_teacher: callables (x_t, t [n], y) -> velocity; the same noise each time.
    dm, gan: callables (x_hat, t, eps, y) -> the generator's two weighted losses [n], for the ratio of their gradients at the image.

    x_hat_mean, x_hat_std    of all elements of x_hat; those of the data are 0 and 1
    gap_0.2 ... gap_1.0      mean |v_fake - v_teacher| at x_hat noised to t in (0, 0.2], ..., (0.8, 1]
    gan_dm_ratio             median over samples of |d gan / d x_hat| / |d dm / d x_hat|
    """
    device, shape = next(run.model.parameters()).device, run.data.x.shape[1:]
    noise, y = noise_by_index(EVAL_SEED, range(n), (M + 1, *shape)).to(device), torch.arange(n, device=device) % run.data.num_classes
    z, eps = noise[:, :M], noise[:, M]
    numbers, columns = {}, []
    with torch.no_grad():
        x_hat = generator(z, y)
        numbers["x_hat_mean"], numbers["x_hat_std"] = x_hat.mean().item(), x_hat.std().item()
        for low, high in zip(HEALTH_BINS, HEALTH_BINS[1:]):
            t = high - (high - low) * torch.arange(n, device=device) / n                              # the whole bin
            x_t = interpolate(x_hat, eps, t)
            numbers[f"gap_{high}"] = (v_fake(x_t, t, y) - v_teacher(x_t, t, y)).abs().mean().item()
        for t in HEALTH_BINS[2:]:
            x_t, t = interpolate(x_hat, eps, t)[:10], torch.full((min(n, 10),), t, device=device)
            columns += [(f"t = {t[0]:.1f}: {name}", v_to_x0(x_t, v(x_t, t, y[:10]), t)) for name, v in (("teacher's x0", v_teacher), ("fake's x0", v_fake))]
    if gan:
        x_hat.requires_grad_()
        t = torch.linspace(0.02, 0.98, n, device=device)                                              # DMD2's range
        dm_norm, gan_norm = (torch.autograd.grad(loss(x_hat, t, eps, y).sum(), x_hat)[0].flatten(1).norm(dim=1) for loss in (dm, gan))
        numbers["gan_dm_ratio"] = (gan_norm / dm_norm).median().item()
        x_hat = x_hat.detach()
    run.write(numbers)

    import matplotlib.figure                                                                          # half a second: only where it is used
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "x_hat_std" in line]
    vae = decoder(run.args.vae, run.data.vae, device)
    figure = matplotlib.figure.Figure(figsize=(11, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    for axis, (caption, x) in zip(left.subplots(len(columns) + 1, 1), [("x_hat", x_hat[:10]), *columns]):
        axis.imshow(np.hstack(list(to_images(x, run.data.meta, vae))), cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    curves = right.subplots(2 + bool(gan), 1, sharex=True, squeeze=False)[:, 0]
    for k in [k for k in numbers if k.startswith("gap_")]:
        curves[0].plot([line["step"] for line in lines], [line[k] for line in lines], ".-", label=f"t to {k[4:]}")
    for k, wanted in (("x_hat_mean", 0), ("x_hat_std", 1)):
        curves[1].plot([line["step"] for line in lines], [line[k] for line in lines], ".-", label=k)
        curves[1].axhline(wanted, color="gray", linewidth=0.7)
    if gan:
        curves[2].semilogy([line["step"] for line in lines], [line["gan_dm_ratio"] for line in lines], ".-", label="GAN / DM gradient at x_hat")
    for axis, title in zip(curves, ("mean |v_fake - v_teacher|", "x_hat (grey: the data)", "gradient ratio")):
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    curves[-1].set_xlabel("step")
    figure.savefig(run.folder / f"health_{run.step:06d}.png", dpi=90)


def watch(run, features, start=None, panel=None):
    """The end of a training step: evaluation, samples of the EMA (beside `start`'s), panel(run) = `health`, state.pt, each when due."""
    args = run.args
    if run.main and run.due(args.eval_every):
        run.evaluated(evaluate(run.model, features, args))
    if run.main and run.due(args.preview_every):
        nets = [("start", start)] if start else []
        show(run.folder / f"samples_{run.step:06d}.png", [*nets, (f"step {run.step}", run.model)], run.data, args)
    if run.main and panel and args.health_every and run.due(args.health_every):
        panel(run)
    if run.due(args.save_every):
        run.save()


def finish(run, features):
    """The end of a run: result.json, and the table of its first and last evaluation."""
    if not run.main:
        return
    if features is None:
        run.result("no metric of latents while training")
        print(f"{run.folder}: model.pt, metrics.jsonl, samples_{run.step:06d}.png; no metric of latents is computed while training")
        return
    first, last = run.evaluations[0], run.evaluations[-1]
    result = run.result(features.definition(2000))
    strip = [{k: v for k, v in e.items() if k != "step"} for e in (first, last)]
    print(table([("at step 0", strip[0]), (f"after {last['step']} steps", strip[1])], features.floor()))
    print(f"{result['definition']}\n{run.folder}: model.pt, result.json, metrics.jsonl, samples_{run.step:06d}.png")


def table(rows, floor=None):
    """Plain-text table of evaluations: rows [(name, metrics of `evaluate`)], one line for each number of steps."""
    names = ("fd", "is", "precision", "recall", "acc")
    lines = [f"{'':<30} {'steps':>5} " + " ".join(f"{n:>9}" for n in names)]
    for name, metrics in rows:
        for N in sorted({int(k.split("_")[1][:-4]) for k in metrics if k.startswith("fd_")}):
            lines.append(f"{name:<30} {N:>5} " + " ".join(f"{metrics[f'{n}_{N}step']:>9.3f}" for n in names))
    if floor:
        lines.append(f"{'real images, half against half':<30} {'':>5} " + " ".join(f"{floor[n]:>9.3f}" for n in names))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------------------
# FID, Inception Score, precision and recall in Inception's features
# ------------------------------------------------------------------------------------------------------------------------------

def image_source(path):
    """(count, images(start, stop) -> uint8 [m, 3, H, W], hash) of a folder of equal-sized images, in name order, or of an .npz with arr_0 [N, H, W, 3]."""
    if str(path).endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                array = file["arr_0"]
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise BadInput(f"{path}: expected an .npz with arr_0, uint8 [N, H, W, 3] ({str(error).splitlines()[0]})") from None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise BadInput(f"{path}: arr_0 is {array.dtype} {list(array.shape)}, expected uint8 [N, H, W, 3]")
        return len(array), lambda start, stop: torch.from_numpy(array[start:stop]).permute(0, 3, 1, 2), hashlib.sha256(array.tobytes()).hexdigest()[:8]
    files = sorted(f for f in Path(path).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if Path(path).is_dir() else []
    if not files:
        raise BadInput(f"{path}: holds no images, expected a folder of them or an .npz with arr_0")

    def images(start, stop):
        arrays = []
        for file in files[start:stop]:
            try:
                with Image.open(file) as image:
                    arrays.append(np.array(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError) as error:
                raise BadInput(f"{file}: not a readable image ({error}); mend or remove it") from None
            if arrays[-1].shape != arrays[0].shape:
                raise BadInput(f"{file}: is {arrays[-1].shape[1]} x {arrays[-1].shape[0]}, others {arrays[0].shape[1]} x {arrays[0].shape[0]}; expected one size")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    listing = "".join(f"{f.relative_to(path)} {f.stat().st_size}" for f in files)
    return len(files), images, hashlib.sha256(listing.encode()).hexdigest()[:8]


@torch.no_grad()
def collect(network, images, n, folder, identity, batch=50):
    """{name: [n, D]} of network(images(start, stop)) -> {name: [m, D]}, a file a batch in `folder`: run again, or by several processes, it goes on."""
    saved = folder / "identity.json"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if saved.exists() and json.loads(saved.read_text()) != identity:
            shutil.rmtree(folder)                                                                     # features of something else
            folder.mkdir()
        saved.write_text(json.dumps(identity))
    if world() > 1:
        torch.distributed.barrier()
    with tqdm(total=len(range(rank() * batch, n, world() * batch)) * batch, desc="features", unit=" images", disable=rank() > 0, dynamic_ncols=True) as bar:
        for start in range(rank() * batch, n, world() * batch):
            path = folder / f"features_{start:06d}.pt"
            if not path.exists():
                save_atomic({k: v.cpu() for k, v in network(images(start, min(start + batch, n))).items()}, path)
            bar.update(batch)
    if world() > 1:
        torch.distributed.barrier()
    parts = [torch.load(folder / f"features_{start:06d}.pt", weights_only=True) for start in range(0, n, batch)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def read_reference(path):
    """dict(mu, sigma, features, vgg, hash) of reference statistics: ADM's and iMF's .npz (no features), or of `python evaluate.py ref`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("mu", "sigma", "ref_mu", "ref_sigma", "features", "vgg") if name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"--ref {path}: not a readable .npz ({str(error).splitlines()[0]})") from None
    mu, sigma = found.get("mu", found.get("ref_mu")), found.get("sigma", found.get("ref_sigma"))
    if mu is None or sigma is None or mu.shape != (2048,) or sigma.shape != (2048, 2048) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput(f"--ref {path}: expected finite mu [2048] and sigma [2048, 2048] (found {', '.join(f'{k} {list(v.shape)}' for k, v in found.items()) or 'neither'})")
    return dict(mu=mu, sigma=sigma, features=found.get("features"), vgg=found.get("vgg"), hash=hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:8])


def inception_metrics(found, ref):
    """The numbers, from found = {features [n, 2048], logits [n, 1008][, vgg [n, 4096]]} and a reference (read_reference)."""
    if not all(v.isfinite().all() for v in found.values()):
        raise BadInput("the features hold NaN or infinity: the images or the network's weights are damaged")
    probs = found["logits"].double().softmax(1)
    metrics = {"fid": frechet_distance(*moments(found["features"]), ref["mu"], ref["sigma"]), "is_1split": inception_score(probs, splits=1)[0]}
    metrics["is"], metrics["is_std"] = inception_score(probs, splits=10)
    for space, name in (("features", "inception"), ("vgg", "vgg")):
        if ref[space] is not None and space in found:
            metrics[f"precision_{name}"], metrics[f"recall_{name}"] = precision_recall(ref[space], found[space])
            metrics[f"n_real_{name}"] = len(ref[space])
    return metrics


def measure(args):
    """ref, --from_images, and checkpoints with --inception: features of images, then statistics, or metrics with their definition."""
    device = setup(argparse.Namespace(device=args.device, precision="fp32", batch_size=world(), seed=0))
    inception, digest = load_inception(args.inception, args.pipeline)
    vgg, vgg_digest = load_vgg16(args.vgg) if args.vgg else (None, None)
    ref = args.what != "ref" and read_reference(args.ref)
    inception, vgg = inception.to(device), vgg and vgg.to(device)

    def network(images):
        features, logits = inception(images.to(device))
        return dict(features=features, logits=logits) | (dict(vgg=vgg(images.to(device))) if vgg else {})

    if args.from_images or args.what == "ref":
        path = args.from_images or args.data
        count, images, source = image_source(path)
        n, sampler, out = min(count, args.n or count), f"images {path} ({source})", Path(args.out or "evaluation")
    else:
        net, checkpoint, data = load_for_sampling(args)
        net, n, out = net.to(device), args.n or 50_000, Path(args.out or Path(args.what).parent)
        guidance, vae, steps = sampling(args, checkpoint), decoder(args.vae, data.vae, device), sampler_steps(net, args.steps, args.velocity)[0]
        if data.kind == "latents" and vae is None:
            raise BadInput("images of latents need the autoencoder: pass --vae")
        sampler = (f"{args.what} ({args.weights} weights {weights_hash(net)}), {steps} {'Euler ' * (args.velocity or net.conditioning == 'plain')}steps, omega {guidance[0]} on [0, {guidance[1]}], classes in turn, noise by index, "
                   f"seed {args.seed}, uint8 {'truncated' if vae else 'rounded'}")

        def images(start, stop):
            x, _ = generate(net, stop - start, data.x.shape[1:], steps, *guidance, args.seed, start=start, velocity=args.velocity)
            return torch.from_numpy(to_images(x, data.meta, vae)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    if n <= 2048 and not args.few:
        raise BadInput(f"{n} images give no covariance of 2048 features, expected more than 2048; --few 1 computes it all the same")
    spaces = f"Inception {digest} ({args.pipeline})" + (f", VGG16 {vgg_digest}" if vgg else "")
    found = collect(network, images, n, out / "features", dict(sampler=sampler, spaces=spaces, n=n, batch=args.batch_size), args.batch_size)
    if rank() > 0:
        return
    if args.what == "ref":
        mu, sigma = moments(found["features"])
        with np.load(path) if str(path).endswith(".npz") else contextlib.nullcontext() as own:
            if own and {"mu", "sigma"} <= set(own.files):                                             # ADM's: of the whole data set, arr_0 a part of it
                mu, sigma = (torch.from_numpy(own[name]) for name in ("mu", "sigma"))
        extra = dict(vgg=found["vgg"][:50_000].half().numpy()) if vgg else {}                         # half: as StyleGAN3 compares them
        np.savez(out / "reference.npz", mu=mu.numpy(), sigma=sigma.numpy(), features=found["features"][:10_000].numpy(), **extra)
        print(f"wrote {out / 'reference.npz'}: mu, sigma of {n} images, features of {min(n, 10_000)}; {spaces}")
        return
    metrics = inception_metrics(found, ref)
    label = "FID" if n == 50_000 else f"FID{n // 1000}K" if n % 1000 == 0 else f"FID (n = {n})"
    pr = "".join(f", {name} precision {metrics[f'precision_{name}']:.4f}, recall {metrics[f'recall_{name}']:.4f} (k = 3, {metrics[f'n_real_{name}']} real)"
                 for name in ("inception", "vgg") if f"precision_{name}" in metrics)
    line = (f"{label} {metrics['fid']:.4f}, IS {metrics['is']:.3f} +- {metrics['is_std']:.3f} (10 shuffled splits; {metrics['is_1split']:.3f} in one){pr}; n = {n}; {spaces}; "
            f"reference {args.ref} ({ref['hash']}); {sampler}; torch {torch.__version__}, numpy {np.__version__}")
    print(line)
    (out / "fid.json").write_text(json.dumps(metrics | dict(n=n, label=label, definition=line), indent=1))


def load_for_sampling(args):
    """(network, checkpoint, data) of `what`: the EMA weights of model.pt, or with --weights raw those in training, from state.pt beside it."""
    checkpoint = load_checkpoint(args.what)
    source = args.data or (checkpoint["data"] or {}).get("source")
    if not source:
        raise BadInput(f"{args.what}: an official checkpoint holds no statistics of its latents, expected --data with the folder of latents")
    data = load_data(source)
    net, _ = load_network(args.what, data)
    if args.weights == "raw":
        path = Path(args.what).with_name("state.pt")
        if not path.exists():
            raise BadInput(f"--weights raw: {path} is not there, expected the run folder's state.pt beside the model.pt")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["net"])
    return net, checkpoint, data


def sampling(args, checkpoint):
    """(omega, guide_to, channels) of the flags, else of the run that made the checkpoint."""
    chosen = [checkpoint["args"].get(name, default) if getattr(args, name) is None else getattr(args, name) for name, default in (("omega", 1.0), ("guide_to", 1.0), ("cfg_channels", 0))]
    return chosen[0], chosen[1], chosen[2] or None


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help="CHECKPOINT (a model.pt, or official weights); or `grid CHECKPOINT`, the picture alone; or `ref`, statistics of --data")
    p.add_argument("--data", help="real images to compare with (default: what the network was trained on); `ref`: a folder of images or an .npz (arr_0)")
    p.add_argument("--from_images", help="instead of a checkpoint: a folder of images or an .npz (arr_0) of any other system")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="of a run folder: the EMA (model.pt), or the weights in training (state.pt beside it)")
    p.add_argument("--steps", type=number(int, 1), nargs="+", help="sampling steps (default: 1 2 4 of a flow map, 25 of a velocity; with --inception the first)")
    p.add_argument("--velocity", action="store_true", help="sample the instantaneous velocity of a flow map, u(x, t, t), with Euler steps: the paper's teacher rows")
    p.add_argument("--n", type=number(int, 4), help="images (default: 2000; with --inception 50,000, or all of a folder)")
    p.add_argument("--omega", type=number(float, 1), help="CFG scale (default: the run's)")
    p.add_argument("--guide_to", type=number(float, 0, 1), help="guidance acts for t in [0, guide_to] (default: the run's)")
    p.add_argument("--cfg_channels", type=number(int, 0), help="CFG of a plain network on this many first channels, 0: all (default: the run's)")
    p.add_argument("--seed", type=number(int, 0), default=EVAL_SEED, help="of the noise, by sample index (default: 0)")
    p.add_argument("--vae", help="VAE checkpoint that decodes latents")
    p.add_argument("--inception", help="weight file of FID's Inception network: FID, IS, precision and recall in its features")
    p.add_argument("--vgg", help="with --inception: torchvision's vgg16 weights; precision and recall in its features too, as StyleGAN3")
    p.add_argument("--ref", help="with --inception: reference statistics, .npz (ADM's, or of `ref`)")
    p.add_argument("--pipeline", choices=["adm", "pytorch_fid"], default="adm", help="resizing and scaling before Inception (default: adm, as torch-fidelity and NVIDIA)")
    p.add_argument("--few", type=int, choices=[0, 1], default=0, help="1: compute FID of 2,048 images and fewer")
    p.add_argument("--batch_size", type=number(int, 1), default=50, help="images per forward pass of Inception (changes nothing but speed)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", help="folder of the results (default: beside the checkpoint; `evaluation`)")
    args = p.parse_args(argv)
    args.grid, args.what = args.what[:1] == ["grid"], args.what[args.what[:1] == ["grid"]:]
    if len(args.what) + bool(args.from_images) != 1:
        raise BadInput("expected one of CHECKPOINT, `grid CHECKPOINT`, `ref --data IMAGES`, or --from_images IMAGES")
    args.what = args.what[0] if args.what else None
    if (args.what == "ref" or args.from_images) and not args.inception:
        raise BadInput("ref and --from_images: need --inception, the weights of FID's network")
    if args.what == "ref" and not args.data:
        raise BadInput("ref: needs --data, a folder of images or an .npz (arr_0)")
    if args.inception and args.what != "ref" and not args.ref:
        raise BadInput("--inception: needs --ref, the statistics to compare with (python evaluate.py ref makes them of images)")
    if (args.vgg or args.ref or args.few) and not args.inception:
        raise BadInput("--vgg, --ref, --few: need --inception, the weights of FID's network")
    return args


def run(args):
    if args.inception:
        return measure(args)
    if rank() > 0:                                                                                    # this evaluation is short: one process makes it
        return
    net, checkpoint, data = load_for_sampling(args)
    args.omega, args.guide_to, args.cfg_channels = sampling(args, checkpoint)
    n, device = args.n or 2000, pick_device(args.device)
    net, features = net.to(device), None if args.grid else metric_space(data, args)
    metrics = evaluate(net, features, args, args.steps, n, args.seed, args.velocity)
    out, name = Path(args.out or Path(args.what).parent), Path(args.what).parent.name[:30]
    out.mkdir(parents=True, exist_ok=True)
    if features:
        print(table([(name, metrics)], features.floor()))
        definition = features.definition(n, args.seed).replace("EMA", args.weights.upper()) + f"; omega {args.omega} on t in [0, {args.guide_to}]{', Euler steps of u(x, t, t)' * args.velocity}, torch {torch.__version__}"
        print(definition)
        (out / "evaluation.json").write_text(json.dumps(metrics | dict(definition=definition), indent=1))
    show(out / "samples.png", [(name, net)], data, args, args.steps or sampler_steps(net, velocity=args.velocity), args.velocity)
    print(f"wrote {out / 'samples.png'}" + (f" and {out / 'evaluation.json'}" if features else "" if args.grid else "; FID of latents: pass --inception, --ref and --vae"))


if __name__ == "__main__":
    main(run, parse_args)
