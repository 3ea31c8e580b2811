"""Samples of a network and their metrics, and what they were measured with.

    MODEL=runs/fsf_dmd-digits-imf/model.pt
    python evaluate.py $MODEL                                        # 1, 2 and 4 steps, one line each, and a picture
    python evaluate.py $MODEL --inception W --ref REF --steps 2      # FID, IS, precision, recall; of latents: --vae VAE
    python evaluate.py --from_images DIR --inception W --ref REF     # the same of any other system's images
    python evaluate.py ref --data DIR --inception W --out DIR        # reference statistics of real images

Without --inception the metrics are in the features of a small classifier (metrics.py), trained once on the pixel data
set itself, on one CPU thread from a fixed seed, and cached under runs/cache; those of the digits and Fashion-MNIST come
with the project (results/classifiers).  (Trained on every second image of the digits it is right on 97% of the others.)
"""
import argparse
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import BadInput, main, noise_by_index, pick_device, rank, setup, tf32, world
from data import Data, denormalize, load_data, normalize, preview, to_images
from fid import (collect, describe, feature_network, image_source, inception_metrics, own_statistics, read_reference,
                 write_reference)
from inception import Inception  # noqa: F401  (a public name of this file too, as those of the next line)
from metrics import frechet_distance, inception_score, precision_recall  # noqa: F401
from metrics import EVAL_SEED, METRICS, Features, refuse_diverged
from model import LightningDiT, backward_simulation, euler_sample, fixed_guidance, guided_map, guided_velocity, sample
from plumbing.checkpoints import (load_checkpoint, load_network, other_images, refuse_not_finite, say_unlearned,
                                  weights_hash)
from plumbing.files import json_text, reading, check_bytes, write_atomic
from plumbing.flags import BATCH, SEED, STEPS, Parser, data_source, folder_path, number
from plumbing.run_folder import check_writable
from vae import VAE, load_vae

EULER_STEPS = 25                # of a velocity, where --steps does not say; the paper's teacher rows use many too
PER_CLASS = 2                   # samples of a class in a picture
# Flags of how a network is sampled; refused where none is.
SAMPLING = ("weights", "steps", "sampler", "shift", "omega", "guide_to", "cfg_channels", "seed", "vae")
SAMPLERS = ("flow_map", "renoised", "renoised_ddim", "renoised_fixed", "euler")


# ---- Samples of a network, their metrics and pictures ----------------------------------------------------------------

@torch.no_grad()
def generate(net: LightningDiT, n: int, shape: tuple[int, ...], steps: int, omega: float = 1.0, guide_to: float = 1.0,
             channels: int | None = None, seed: int = EVAL_SEED, batch: int = 500, classes: int | None = None,
             start: int = 0, sampler: str | None = None, shift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """n samples [n, C, H, W] and their classes [n], 0, 1, 2, ... in turn (of the first `classes` if given), on the CPU.

    shape: (C, H, W).  sampler: one of SAMPLERS (default: euler of a plain network, else flow_map); steps: its steps.
    omega, guide_to: CFG scale and end of its interval: an input of the network, or (plain) CFG of two passes on the
    first `channels`.  Noise and class of sample i, from `start` on, depend on (seed, i) alone.  batch: samples at a
    time.  shift: of euler's times.  ValueError for another sampler, steps < 1, more classes than the network has.
    """
    sampler = sampler or default_sampler(net)
    if sampler not in SAMPLERS or steps < 1 or (classes or 1) > net.num_classes:
        raise ValueError(f"sampler {sampler!r}, steps {steps}, classes {classes}: expected one of "
                         f"{', '.join(SAMPLERS)}; 1 or more; at most {net.num_classes}")
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    indices = torch.arange(start, start + n)
    y = indices % (classes or net.num_classes)
    samples = []
    for rows, labels in zip(indices.split(batch), y.split(batch)):
        eps = noise_by_index("samples", seed, rows, shape)
        if sampler.startswith("renoised"):                       # jump 0: the noise of the other samplers
            more = [noise_by_index("samples", seed, rows, shape, jump) for jump in range(1, steps)]
            eps = torch.stack([eps, *more], dim=1)
        eps = eps.to(device)
        guidance = fixed_guidance(omega, 0.0, guide_to, eps)
        x = run_sampler(net, sampler, eps, labels.to(device), steps, guidance, channels, shift)
        samples.append(x.cpu())
    net.train(was_training)
    return torch.cat(samples), y


def default_sampler(net: LightningDiT) -> str:
    """The sampler of a network that comes without a run: official weights, or one that was just built."""
    return "euler" if net.conditioning == "plain" else "flow_map"


def run_sampler(net, sampler, eps, y, steps, guidance, channels, shift):
    """Noise [b, C, H, W] (renoised: [b, steps, C, H, W]) -> samples [b, C, H, W]."""
    if sampler == "euler":
        return euler_sample(lambda x, t, y: guided_velocity(net, x, t, y, guidance, channels), eps, y, steps, shift)
    if sampler == "flow_map":
        if net.conditioning == "plain":
            raise ValueError("a plain LightningDiT is no flow map: sample it with euler or renoised")
        return sample(lambda x, t, y, s: guided_map(net, x, t, s, y, guidance), eps, y, steps)
    noise = sampler.removeprefix("renoised").removeprefix("_") or "fresh"
    return backward_simulation(lambda x, t, s: guided_map(net, x, t, s, y, guidance), eps, steps - 1, steps, noise)


def sampler_steps(sampler: str, steps: list | None = None, few: tuple = (1, 2, 4), M: int | None = None) -> list[int]:
    """The numbers of steps to sample with: those given, else 25 of euler, and of the other samplers `few` and M."""
    if steps:
        return list(steps)
    return [EULER_STEPS] if sampler == "euler" else sorted({*few, M} - {None})


def evaluate(net: LightningDiT, features: Features | None, args: argparse.Namespace, steps: list | None = None,
             n: int | None = None, seed: int = EVAL_SEED, *, restate: Callable = lambda x: x,
             shift: float = 1.0) -> dict[str, float]:
    """{"fd_1step": ..., "fd_2step": ..., ...}: every metric at every number of sampling steps (see `sampler_steps`).

    args: anything with omega, guide_to, cfg_channels and sampler, as argparse.Namespace(**checkpoint["args"]): how to
    sample; M if it has one.  shift: of euler's times.  n: samples, else features.n.  restate: see `restated`.
    features None (latents): {}.
    """
    if features is None:
        return {}
    found, n = {}, n or features.n
    for N in sampler_steps(args.sampler, steps, M=getattr(args, "M", None)):
        x, y = generate(net, n, features.shape, N, args.omega, args.guide_to, args.cfg_channels, seed,
                        sampler=args.sampler, shift=shift)
        for name, value in features.metrics(restate(x), y).items():
            found[f"{name}_{N}step"] = value
    return found


def restated(checkpoint: dict, data: Data) -> Callable:
    """The function that turns samples x, normalised as the checkpoint's own data, into the normalisation of `data`.

    Nothing is done where both are the same, and to those of official weights, whose data are not known.
    """
    own = checkpoint["data"]
    if own is None or (list(own["mean"]), list(own["std"])) == (list(data.mean), list(data.std)):
        return lambda x: x
    return lambda x: normalize(denormalize(x, own["mean"], own["std"]), data.mean, data.std)


def show(path: Path, nets: list, data: Data, args: argparse.Namespace, steps: list | None = None,
         seed: int = EVAL_SEED, restate: Callable = lambda x: x, shift: float = 1.0) -> None:
    """A picture: real images, then samples of each (caption, network, sampler) in `nets`, from the same noise.

    A row holds the first ten classes, a band PER_CLASS rows.  args, restate, shift: as in `evaluate`, and args.vae.
    Diverged if samples hold NaN or infinity.
    """
    shown = min(data.num_classes, 10)
    bands = [("real", real_images(data, shown, PER_CLASS))]
    for caption, net, sampler in nets:
        for N in sampler_steps(sampler, steps, few=(1, 2), M=getattr(args, "M", None)):
            x, _ = generate(net, PER_CLASS * shown, data.x.shape[1:], N, args.omega, args.guide_to,
                            args.cfg_channels, seed, classes=shown, sampler=sampler, shift=shift)
            refuse_diverged(x)
            bands.append((f"{caption}: {N}-step samples", restate(x)))
    device = next(nets[0][1].parameters()).device
    preview(path, bands, data.meta, decoder_for(data, args, device))


def real_images(data: Data, classes: int, per_class: int = 1) -> torch.Tensor:
    """Real images [per_class * classes, C, H, W], one of each class in turn; an even patch where a class has none."""
    rows_of, found = [(data.y == c).nonzero()[:, 0] for c in range(classes)], []
    for k in range(per_class):
        for rows in rows_of:
            none = torch.zeros(1, *data.x.shape[1:])
            found.append(data.x[rows[k % len(rows)].view(1)] if len(rows) else none)
    return torch.cat(found)


def steps_in(metrics: dict) -> list[int]:
    """The numbers of sampling steps of an evaluation, from its fd_1step, fd_2step, ..."""
    return sorted(int(name.removeprefix("fd_").removesuffix("step")) for name in metrics if name.startswith("fd_"))


def table(rows: list, features: Features) -> str:
    """Plain-text table of evaluations: rows [(name, metrics of `evaluate`)], one line for each number of steps.

    The last line is the floor: the same of real images.
    """
    def line(name, steps, values):
        return f"{name:<30} {steps:>5} " + " ".join(f"{value:>9}" for value in values)

    def numbers(values):
        return [f"{value:.3f}" for value in values]

    lines = [line("", "steps", METRICS)]
    for name, metrics in rows:
        for N in steps_in(metrics):
            lines.append(line(name, N, numbers(metrics[f"{metric}_{N}step"] for metric in METRICS)))
    floor = features.floor()
    lines.append(line(features.floor_name(), "", numbers(floor[metric] for metric in METRICS)))
    return "\n".join(lines)


def metric_space(data: Data, args: argparse.Namespace) -> Features | None:
    """The Features of pixel data in the first process; None in the others, and for latents, which have no metric."""
    decoder_for(data, args, torch.device("cpu"))                 # refuses a wrong --vae now, not at the first picture
    return Features(data) if rank() == 0 and data.kind == "pixels" else None


def decoder_for(data: Data, args: argparse.Namespace, device: torch.device) -> VAE | None:
    """`decoder` of --vae; BadInput if these data are pixels, or latents of other channels than it decodes."""
    if args.vae and data.kind != "latents":
        raise BadInput(f"--vae {args.vae}: decodes latents, and {data.source} has pixels; leave that out")
    vae, channels = decoder(args.vae, data.vae, device), data.x.shape[1]
    if vae is not None and vae.config["z_channels"] != channels:
        raise BadInput(f"--vae {args.vae}: decodes latents of {vae.config['z_channels']} channels, but --data "
                       f"{data.source} has {channels}; expected the VAE that made them")
    return vae


@lru_cache(maxsize=1)
def decoder(path: str | None, expected: str, device: torch.device) -> VAE | None:
    """The VAE of --vae on the device, or None without the flag.  BadInput if it is not the one that made the latents.

    expected: hash of that one's weights, or "" where it is not known.
    """
    if not path:
        return None
    vae, _ = load_vae(path)
    if expected and weights_hash(vae) != expected:
        raise BadInput(f"--vae {path}: is not the VAE ({expected}) that made these latents")
    return vae.to(device)


# ---- FID, Inception Score, precision and recall in Inception's features ----------------------------------------------

def measure(args: argparse.Namespace) -> None:
    """ref, --from_images, and checkpoints with --inception: features of images, then what is asked of them."""
    device = setup(argparse.Namespace(device=args.device, precision="fp32", batch_size=world(), seed=0))
    of_ref = args.what == "ref"
    ref = None if of_ref else read_reference(args.ref)
    if args.from_images or of_ref:
        path = args.from_images or args.data
        n, images, digest = image_source(path, args.n, as_trained=of_ref)
        sampler = f"images {path} ({digest})" + (", as trained on" if of_ref else "")
        out = Path(args.out or "evaluation")
    else:
        images, sampler = samples_as_images(args, device)
        n = args.n or 50_000
        out = output_folder(args)
    if n < 4:
        raise BadInput(f"{n} images are too few, expected 4 or more")
    if n <= 2048 and not args.few:
        raise BadInput(f"{n} images give no covariance of 2048 features, expected more than 2048; "
                       "--few 1 computes it all the same")
    own = own_statistics(args.data, args.pipeline) if of_ref else None
    network, space = feature_network(args.inception, args.pipeline, device)
    if ref and ref["space"] not in (None, space):
        raise BadInput(f"--ref {args.ref}: is in the features of {ref['space']}, but the images would be in those of "
                       f"{space}; make it again with these flags, or pass the flags that it was made with")
    if ref and ref["features"] is None and rank() == 0:
        print(f"--ref {args.ref}: holds no features, so there is no precision and recall; "
              "`python evaluate.py ref` makes a reference that has them")
    identity = dict(sampler=sampler, spaces=space, n=n, batch=args.batch_size)
    found = collect(network, images, n, out / "features", identity, args.batch_size)
    if rank() > 0:
        return
    if of_ref:
        write_reference(out / "reference.npz", found, own, space)
        of = f"those in {args.data}" if own else f"of {n} images"
        print(f"wrote {out / 'reference.npz'}: mu, sigma {of}, features of {min(n, 10_000)}; {space}")
        return
    metrics = inception_metrics(found, ref, device)
    label = f"FID (n = {n})"
    if n % 1000 == 0:
        label = "FID" if n == 50_000 else f"FID{n // 1000}K"
    line = (f"{label} {describe(metrics)}; n = {n}; {space}; reference {args.ref} ({ref['hash']}); {sampler}; "
            f"torch {torch.__version__}, numpy {np.__version__}")
    print(line)
    write_atomic(out / "fid.json", json_text(metrics | dict(n=n, label=label, definition=line), indent=1))


def output_folder(args: argparse.Namespace) -> Path:
    """--out, else the run folder of the checkpoint; BadInput if it cannot be written."""
    folder = Path(args.out or Path(args.what).absolute().parent)    # a link's own folder, not that of its target
    check_writable(folder)
    return folder


def samples_as_images(args: argparse.Namespace, device: torch.device) -> tuple[Callable, str]:
    """(images(start, stop) -> uint8 [m, 3, H, W] of a checkpoint, what they are).

    BadInput for latents without --vae.
    """
    net, checkpoint, data = load_for_sampling(args)
    net = net.to(device)
    omega, guide_to, channels, sampler = sampling(args, checkpoint)
    refuse_shift(args, sampler)
    vae = decoder_for(data, args, device)
    steps = sampler_steps(sampler, args.steps)[0]
    if data.kind == "latents" and vae is None:
        raise BadInput("images of latents need the autoencoder: pass --vae")
    rounding = "rounded" if vae is None else f"truncated, of VAE {weights_hash(vae)}"
    restate, own = restated(checkpoint, data), checkpoint["data"]
    statistics = (list(own["mean"]), list(own["std"])) if own else (list(data.mean), list(data.std))
    scale = hashlib.sha256(repr(statistics).encode()).hexdigest()[:6]
    what = (f"{args.what} ({args.weights} weights {weights_hash(net)}), {steps} steps "
            f"({sampler_name(sampler, args.shift)}), "
            f"{guidance_words(net.conditioning, sampler, omega, guide_to, channels)}, classes in turn, noise by index, "
            f"seed {args.seed}, statistics {scale}, uint8 {rounding}{', in TF32' if device.type == 'cuda' else ''}")

    def images(start, stop):
        with tf32():                                             # as DiT's and SiT's sampling; the features are not
            x, _ = generate(net, stop - start, data.x.shape[1:], steps, omega, guide_to, channels, args.seed,
                            start=start, sampler=sampler, shift=args.shift)
            refuse_diverged(x)
            pixels = torch.from_numpy(to_images(restate(x), data.meta, vae)).permute(0, 3, 1, 2)
        return pixels.expand(-1, 3, -1, -1)                      # grey images three times

    return images, what


def refuse_shift(args: argparse.Namespace, sampler: str) -> None:
    if args.shift != 1 and sampler != "euler":
        raise BadInput("--shift: belongs to --sampler euler; leave that out")


def sampler_name(sampler: str, shift: float) -> str:
    return sampler if shift == 1 else f"{sampler}, shift {shift}"


def is_guided(conditioning: str, sampler: str) -> bool:
    """Whether a network's samples take omega: a distilled one without that input has the guidance in its weights."""
    return conditioning == "in_context" or (conditioning == "plain" and sampler == "euler")


def guidance_words(conditioning: str, sampler: str, omega: float, guide_to: float, channels: int | None) -> str:
    if not is_guided(conditioning, sampler):
        return "no guidance but what the weights hold"
    return f"omega {omega} on [0, {guide_to}]" + (f" in {channels} channels" if channels else "")


# ---- Command line ----------------------------------------------------------------------------------------------------

def data_of(path: str, checkpoint: dict, otherwise: str) -> Data:
    """The data that a model.pt was trained on.  BadInput, with what to do `otherwise`, if they are not there."""
    source = checkpoint["data"]["source"]
    if source != "digits" and not Path(source).exists():
        raise BadInput(f"{path}: was trained on {source}, which is not there (seen from here); {otherwise}")
    data = load_data(source)
    other = other_images(checkpoint, data)
    if other:
        raise BadInput(f"{path}: was trained on a {source} of other {other} than the one that is there "
                       f"(seen from here); {otherwise}")
    return data


def load_for_sampling(args: argparse.Namespace) -> tuple[LightningDiT, dict, Data]:
    """(network, checkpoint, data) of the checkpoint args.what; BadInput where data or weights are missing.

    Its EMA weights, or with --weights raw those in training, from the state.pt beside it.
    """
    checkpoint = load_checkpoint(args.what)
    if not args.data and not checkpoint["data"]:
        raise BadInput(f"{args.what}: an official checkpoint holds no statistics of its latents, "
                       "expected --data with the folder of latents")
    data = load_data(args.data) if args.data else data_of(args.what, checkpoint, "pass --data")
    net, _ = load_network(args.what, data)
    if args.weights == "raw":
        path = Path(args.what).absolute().with_name("state.pt")
        if not path.exists():
            raise BadInput(f"--weights raw: {path} is not there, "
                           "expected the run folder's state.pt beside the model.pt")
        with reading(path, f"the state.pt of the run that made {args.what}", "--weights ema takes the model.pt"):
            check_bytes(path)
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["net"])
        refuse_not_finite(path, net.state_dict())
    return net, checkpoint, data


def sampling(args: argparse.Namespace, checkpoint: dict) -> tuple[float, float, int | None, str]:
    """(omega, guide_to, channels, sampler) of the flags, else of the run that made the checkpoint.

    BadInput for a sampler that this network does not have.
    """
    def chosen(name, default, kind, low, high):
        flag = getattr(args, name)
        value = checkpoint["args"].get(name, default) if flag is None else flag
        if not isinstance(value, (int, kind)) or not low <= value <= high:
            if flag is not None:
                raise BadInput(f"--{name} {flag}: expected {low} to {high} for {args.what}")
            raise BadInput(f"{args.what}: its args have {name} {str(value)[:40]}, expected {low} to {high}; "
                           f"pass --{name}")
        return value

    conditioning = checkpoint["config"]["conditioning"]
    plain = conditioning == "plain"
    sampler = args.sampler or checkpoint.get("sampler") or ("euler" if plain else "flow_map")
    if sampler not in SAMPLERS:
        raise BadInput(f"{args.what}: names the sampler {sampler!r}, expected {', '.join(SAMPLERS)}; pass --sampler")
    if plain and sampler == "flow_map":
        raise BadInput(f"--sampler flow_map: {args.what} is a velocity network, which has no target time; "
                       "expected euler or renoised")
    given = [f"--{flag}" for flag in ("omega", "guide_to", "cfg_channels") if getattr(args, flag) is not None]
    if given and not is_guided(conditioning, sampler):
        raise BadInput(f"{', '.join(given)}: {args.what}, sampled so, takes no guidance but what its weights hold; "
                       "leave that out")
    if not plain and args.cfg_channels:
        raise BadInput(f"--cfg_channels: belongs to a velocity network, which {args.what} is not; leave that out")
    omega, guide_to = chosen("omega", 1.0, float, 1, STEPS), chosen("guide_to", 1.0, float, 0, 1)
    say_unlearned(args.what, checkpoint["args"], conditioning, omega)
    channels = chosen("cfg_channels", 0, int, 0, checkpoint["config"]["in_channels"])
    return omega, guide_to, channels, sampler


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=__doc__)
    p.add_argument("what", nargs="*",
                   help="CHECKPOINT (a model.pt, or official weights); or `grid CHECKPOINT`, the picture alone; "
                        "or `ref`, statistics of --data")
    p.add_argument("--data", type=data_source,
                   help="real images to compare with (default: what the network was trained on); "
                        "`ref`: a folder of images or an .npz (arr_0)")
    p.add_argument("--from_images",
                   help="instead of a checkpoint: a folder of images or an .npz (arr_0) of any other system")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema",
                   help="of a run folder: the EMA (model.pt), or the weights in training (state.pt beside it)")
    p.add_argument("--steps", type=number(int, 1, 100_000), nargs="+",
                   help="sampling steps (default: 1 2 4, of euler 25; with --inception one, the first); CHECKPOINT "
                        "stands before them")
    p.add_argument("--sampler", choices=SAMPLERS,
                   help="default: what the network was trained for.  flow_map: deterministic t -> s steps; renoised: "
                        "jumps to 0 with noise between them (DMD2, SiD); euler: of the velocity u(x, t, t), the "
                        "paper's teacher rows")
    p.add_argument("--shift", type=number(float, 0, open_low=True), default=1.0,
                   help="euler: k of its times k r / (1 + (k-1) r); LightningDiT's timestep shift 0.3 is 3.333")
    p.add_argument("--n", type=number(int, 4, 10 ** 8),
                   help="images (default: 2000; 500 beside fewer than 1,000 real ones, 5000 beside 10,000 and more; "
                        "with --inception 50,000, or all of a folder)")
    p.add_argument("--omega", type=number(float, 1), help="CFG scale (default: the run's)")
    p.add_argument("--guide_to", type=number(float, 0, 1),
                   help="guidance acts for t in [0, guide_to]; some flow maps take it as an input, and have "
                   "learned 0.5 to 1 only (default: the run's)")
    p.add_argument("--cfg_channels", type=number(int, 0),
                   help="CFG of a plain network on this many first channels, 0: all (default: the run's)")
    p.add_argument("--seed", type=number(int, 0, SEED), default=EVAL_SEED,
                   help="of the noise, by sample index (default: 0)")
    p.add_argument("--vae", help="VAE checkpoint that decodes latents")
    p.add_argument("--inception",
                   help="weight file of FID's Inception network: FID, IS, precision and recall in its features")
    p.add_argument("--ref", help="with --inception: reference statistics, .npz (ADM's, or of `ref`)")
    p.add_argument("--pipeline", choices=["adm", "pytorch_fid"], default="adm",
                   help="resizing and scaling before Inception (default: adm, as torch-fidelity and NVIDIA)")
    p.add_argument("--few", type=number(int, 0, 1), default=0, help="1: compute FID of 2,048 images and fewer")
    p.add_argument("--batch_size", type=number(int, 1, BATCH), default=50,
                   help="images per forward pass of Inception (changes nothing but speed)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", type=folder_path, help="folder of the results (default: the checkpoint's; `evaluation`)")
    args = p.parse_args(argv)

    args.grid = args.what[:1] == ["grid"]
    what = args.what[1:] if args.grid else args.what
    if len(what) + bool(args.from_images) != 1:
        raise BadInput("expected one of CHECKPOINT, `grid CHECKPOINT`, `ref --data IMAGES`, or --from_images IMAGES")
    args.what = what[0] if what else None
    if args.grid and args.what in (None, "ref"):
        raise BadInput("grid: is a picture of a network's samples, expected `grid CHECKPOINT` alone")
    if (args.what == "ref" or args.from_images) and not args.inception:
        raise BadInput("ref and --from_images: need --inception, the weights of FID's network")
    if args.what == "ref" and not args.data:
        raise BadInput("ref: needs --data, a folder of images or an .npz (arr_0)")
    if args.inception and args.what != "ref" and not args.ref:
        raise BadInput("--inception: needs --ref, the statistics to compare with "
                       "(python evaluate.py ref makes them of images)")
    idle = {}                                                    # why: flags that do nothing
    if args.what == "ref":
        idle["ref is of real images; leave that out"] = (*SAMPLING, "ref")
    elif args.from_images:
        idle["--from_images samples no network; leave that out"] = (*SAMPLING, "data")
    elif args.grid:
        idle["grid makes the picture alone; leave that out"] = ("inception", "n")
    if not args.inception:
        idle["need --inception, the weights of FID's network"] = ("ref", "pipeline", "few", "batch_size")
    for why, flags in idle.items():
        given = [f"--{flag}" for flag in flags if getattr(args, flag) != p.get_default(flag)]
        if given:
            raise BadInput(f"{', '.join(given)}: {why}")
    if args.inception and len(args.steps or ()) > 1:
        raise BadInput(f"--steps {' '.join(map(str, args.steps))}: with --inception one number of steps at a time")
    return args


def run(args: argparse.Namespace) -> None:
    if args.inception:
        measure(args)
    elif rank() == 0:                                            # this evaluation is short: one process makes it
        measure_without_inception(args)


def measure_without_inception(args: argparse.Namespace) -> None:
    """A checkpoint's metrics in the feature space of its pixel data set (none of latents), and a picture."""
    out = output_folder(args)
    net, checkpoint, data = load_for_sampling(args)
    args.omega, args.guide_to, args.cfg_channels, args.sampler = sampling(args, checkpoint)
    refuse_shift(args, args.sampler)
    M = checkpoint["args"].get("M")                              # steps of its rollout, which it is made for
    args.steps = sampler_steps(args.sampler, args.steps, M=M if isinstance(M, int) and 0 < M < STEPS else None)
    if data.kind == "latents" and args.n:
        raise BadInput("--n: nothing of latents is measured without --inception; leave that out")
    net = net.to(pick_device(args.device))
    features = None if args.grid else metric_space(data, args)
    restate = restated(checkpoint, data)
    with tf32(checkpoint["args"].get("precision") == "bf16"):    # as the run measured itself
        metrics = evaluate(net, features, args, args.steps, args.n, args.seed, restate=restate, shift=args.shift)
    name = Path(args.what).absolute().parent.name[:30]
    out.mkdir(parents=True, exist_ok=True)
    if features is not None:
        print(table([(name, metrics)], features))
        guidance = guidance_words(net.conditioning, args.sampler, args.omega, args.guide_to, args.cfg_channels)
        which = f"{args.weights.upper()} weights {weights_hash(net)}"
        definition = (f"{features.definition(args.n, args.seed, which)}; "
                      f"sampler {sampler_name(args.sampler, args.shift)}, {guidance}, torch {torch.__version__}")
        print(definition)
        write_atomic(out / "evaluation.json", json_text(metrics | dict(definition=definition), indent=1))
    show(out / "samples.png", [(name, net, args.sampler)], data, args, args.steps, args.seed, restate,
         args.shift)
    wrote = f"wrote {out / 'samples.png'}"
    if features is not None:
        wrote += f" and {out / 'evaluation.json'}"
    elif not args.grid:
        wrote += "; FID of latents: pass --inception, --ref and --vae"
    print(wrote)


if __name__ == "__main__":
    main(run, parse_args)
