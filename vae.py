"""The autoencoder that makes latents of images, and images of latents.

LDM's AutoencoderKL, as VA-VAE f16d32 and SD-VAE f8d4; official checkpoints load as they are.

    CKPT=vavae-imagenet256-f16d32-dinov2.pt
    python vae.py encode --images DIR --ckpt $CKPT --out latents/    # LightningDiT's shards, resumable
    python vae.py check latents/                                     # shapes, finite values, labels, statistics
    python vae.py decode latents/ --ckpt $CKPT --out pictures/       # what the autoencoder makes of them

Reading data, latents among them, is data.py's work.
"""
import argparse
import contextlib
import hashlib
import functools
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import (BadInput, autocast, barrier, main, noise_by_index, pick_device, rank, setup, tf32, usable_cores,
                    world)
from data import (count_classes, image_files, latents_to_uint8, open_shard, read_image, read_meta, read_stats,
                  say_unread, shards)
from data import denormalize, load_data, normalize  # noqa: F401  (public names of this file too)
from model import refuse_differences
from plumbing.checkpoints import read_weights, refuse_not_finite, weights_hash
from plumbing.files import first_line, listing_hash, lock, read_json, reading, write_atomic
from plumbing.flags import BATCH, SEED, Parser, folder_path, number

VAES = {
    "vavae": dict(                                       # VA-VAE f16d32
        ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256, z_channels=32,
    ),
    "sdvae": dict(                                       # SD-VAE f8d4
        ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(), resolution=256, z_channels=4,
    ),
}


# ---- The autoencoder: LDM's AutoencoderKL, key names as in its checkpoints -------------------------------------------

class VAE(nn.Module):
    """VAE("vavae") or VAE("sdvae"), or explicit dims as keywords, which override the preset's.

    encode(x [B, 3, H, W] in [-1, 1]) -> (mean, std) [B, C, H/f, W/f] of the latent.
    decode(z [B, C, h, w]) -> images [B, 3, f h, f w], about [-1, 1], not clamped.

    Source: CompVis/latent-diffusion's AutoencoderKL as in hustvl/LightningDiT `tokenizer/autoencoder.py`
    (golden/vae.npz).  Raises ValueError on an unknown preset or dim.
    """

    def __init__(self, preset: str = "vavae", **dims):
        super().__init__()
        unknown = dims.keys() - VAES["vavae"].keys()
        if preset not in VAES or unknown:
            raise ValueError(f"VAE({preset!r}, {', '.join(sorted(unknown))}): expected {' or '.join(VAES)}, and dims "
                             f"among {', '.join(VAES['vavae'])}")
        self.config = VAES[preset] | dims
        self.downscale = 2 ** (len(self.config["ch_mult"]) - 1)              # f
        C = self.config["z_channels"]
        self.encoder = Encoder(**self.config)
        self.decoder = Decoder(**self.config)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = nn.Conv2d(C, C, 1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))


def load_vae(path: str | Path) -> tuple[VAE, str]:
    """(VAE in eval mode, its name in VAES or "custom") from a checkpoint; the dims are read off the keys.

    Keys of training (foundation_model., loss., linear_proj.) are dropped by prefix.  BadInput if the file is no
    checkpoint, or if a tensor of the VAE is missing or has another shape.
    """
    prefixes = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state = {k: v for k, v in read_weights(path).items() if k.startswith(prefixes)}
    try:
        dims = read_dims(state)
        with torch.device("meta"):
            vae = VAE(**dims)
    except KeyError as error:
        raise BadInput(f"{path}: not a VAE checkpoint of LDM's layout ({error.args[0]} is missing)") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:            # a key, rank or width
        raise BadInput(f"{path}: not a VAE checkpoint of LDM's layout ({first_line(error)})") from None
    try:
        refuse_differences(vae, state, "VAE")
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    for name, value in state.items():
        if not value.is_floating_point():
            raise BadInput(f"{path}: {name} is {value.dtype}, expected floating point; fetch the checkpoint again")
    refuse_not_finite(path, state)
    vae.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    names = [name for name, preset in VAES.items() if preset == dims]
    return vae.requires_grad_(False).eval(), names[0] if names else "custom"


def read_dims(state: dict) -> dict:
    """The dims of VAE(**dims) that has this state dict.

    Raises KeyError if one of the keys looked at is missing; ValueError and its like if it is of another rank or width.
    """
    numbers = [int(k.split(".")[2]) for k in state if k.startswith("encoder.down.")]
    levels = range(1 + max(numbers, default=-1))
    ch = len(state["encoder.conv_in.weight"])
    ch_mult = tuple(len(state[f"encoder.down.{i}.block.0.conv2.weight"]) // ch for i in levels)
    blocks = [k for k in state if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv2\.weight", k)]
    attention = tuple(256 >> i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state)
    z_channels = len(state["post_quant_conv.weight"])
    if not ch_mult or not z_channels or 0 in ch_mult or ch % 32:
        raise ValueError(f"widths {ch} x {list(ch_mult)} and {z_channels} channels of latents")
    return dict(ch=ch, ch_mult=ch_mult, num_res_blocks=len(blocks), attn_resolutions=attention, resolution=256,
                z_channels=z_channels)


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, 2 C, H/f, W/f]."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()                                          # index 0 is the highest resolution
        c_in = ch
        for i, c_out in enumerate(widths):
            attention = resolution >> i in attn_resolutions
            downsample = Downsample(c_out) if i < last else None
            self.down.append(Level(c_in, c_out, num_res_blocks, attention, downsample=downsample))
            c_in = c_out
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> images [B, 3, f h, f w]."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()                                            # index 0 is the highest resolution
        for i, c_out in enumerate(widths):
            c_in = widths[min(i + 1, last)]
            attention = resolution >> i in attn_resolutions
            upsample = Upsample(c_out) if i > 0 else None
            self.up.append(Level(c_in, c_out, num_res_blocks + 1, attention, upsample=upsample))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not, then a change of resolution or none."""

    def __init__(self, c_in, c_out, blocks, attention, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                h = resample(h)
        return h


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResnetBlock(c, c)
        self.attn_1 = AttnBlock(c)
        self.block_2 = ResnetBlock(c, c)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):                                                    # [B, C, H, W]
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))        # [B, HW, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                             # LDM pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


# ---- encode: images -> latent shards, in LightningDiT's format -------------------------------------------------------

@torch.no_grad()
def encode(args: argparse.Namespace) -> None:
    """Both flips of every image through the encoder, sampled, un-normalised, into shards of --shard images each.

    A shard that is there already is kept, so that the same command goes on where it was stopped.
    """
    vae, name = load_vae(args.ckpt)
    # --batch_size is each process's here, not shared by them
    device = setup(argparse.Namespace(device=args.device, precision=args.precision, batch_size=world(), seed=args.seed))
    files, classes = image_files(args.images)
    say_unread(args.images)
    if args.size % vae.downscale:
        raise BadInput(f"--size {args.size}: this autoencoder ({name}) needs a multiple of {vae.downscale}")
    out = Path(args.out)
    if out.resolve().is_relative_to(Path(args.images).resolve()):
        raise BadInput(f"--out {out}: lies in --images {args.images}, where it would be read as images; "
                       "pass --out elsewhere")
    identity = dict(
        images=str(Path(args.images).resolve()), n=len(files),
        files=listing_hash([path for path, _ in files], args.images, times=False)[:12],
        vae=name, vae_hash=weights_hash(vae), size=args.size, seed=args.seed, shard=args.shard, processes=world(),
        dtype=args.dtype, precision=args.precision, skip_bad=args.skip_bad,
    )
    with contextlib.ExitStack() as held:
        if rank() == 0:
            begun = check_claim(out, identity)
            held.enter_context(lock(out / ".lock", "encoding"))
            if begun != identity:
                write_atomic(out / "encode.json", json.dumps(identity, indent=1))
            for leftover in out.glob("*.tmp"):                   # of a process that was killed
                leftover.unlink()
        barrier()
        encode_shards(out, vae.to(device), name, files, args, device)
        barrier()
        if rank() == 0:
            wanted = {shard for process in range(world()) for shard, _ in shards_of(process, len(files), args.shard)}
            for path in out.glob("latents_rank*.safetensors"):   # of images that were taken away since it was stopped
                if path.name not in wanted:
                    path.unlink()
            finish_encoding(out, identity, classes)


def shards_of(process: int, count: int, size: int) -> list[tuple[str, range]]:
    """[(file name, the images in it)] of one process, of `count` images in shards of `size`."""
    low, high = process * count // world(), (process + 1) * count // world()
    return [(f"latents_rank{process:02d}_shard{shard:03d}.safetensors", range(start, min(start + size, high)))
            for shard, start in enumerate(range(low, high, size))]


def encode_shards(out: Path, vae: VAE, name: str, files: list, args: argparse.Namespace, device: torch.device) -> None:
    """The shards of this process that are not there yet, or damaged, or of other files."""
    mine, hidden = shards_of(rank(), len(files), args.shard), rank() > 0
    total = sum(len(rows) for _, rows in mine)
    with tqdm(total=total, desc=f"encode {name}", unit=" images", disable=hidden, dynamic_ncols=True) as bar:
        for shard, rows in mine:
            of_files = hash_of(files, rows, args.images)
            if is_whole(out / shard, of_files, args):
                bar.update(len(rows))
            else:
                encode_shard(out / shard, vae, files, rows, of_files, args, device, bar)


def hash_of(files: list, rows: range, folder: str) -> str:
    """Hash of the names, sizes and labels of files [(path, label)] at `rows`."""
    listing = listing_hash([files[i][0] for i in rows], folder, times=False)
    labels = [files[i][1] for i in rows]
    return hashlib.sha256(f"{listing} {labels}".encode()).hexdigest()[:12]


def is_whole(path: Path, of_files: str, args: argparse.Namespace) -> bool:
    """Whether a shard of these files is there, with the sums that `finish_encoding` needs.

    An image that it left out may have been repaired since.
    """
    try:
        _, _, bad = shard_sums(path)
        with open_shard(path) as shard:
            same = shard.metadata().get("files") == of_files
    except BadInput:
        return False
    return same and (not bad or args.skip_bad and all(read_image(file, args.size) is None for file in bad))


def shard_sums(path: Path) -> tuple[dict, int, list]:
    """(sums, number of images, unreadable files) of a shard's header."""
    with reading(path, "a whole shard of this command", "delete it and run the command again"):
        with open_shard(path) as shard:
            metadata = shard.metadata()
        sums = json.loads(metadata["sums"])
        for name in ("sum", "square"):
            sums[name] = torch.tensor(sums[name], dtype=torch.float64)       # [C]
        n, bad = int(metadata["total_size"]), json.loads(metadata["bad"])
        if type(sums["count"]) is not int or min(sums["count"], n) < 1 or not isinstance(bad, list):
            raise ValueError("its sums are no numbers of images")
        return sums, n, bad


def check_claim(out: Path, identity: dict) -> dict | None:
    """Of a folder of latents the identity that was begun: what is encoded, and how; None of a new one.

    BadInput if it is another one, or the folder holds anything else.
    """
    saved, before = out / "encode.json", None
    if saved.exists():
        before = read_json(saved, "the encode.json of this command", repair="choose another --out")
        free = set()
        # Stopped early, perhaps at a bad image, which may be repaired, removed or skipped: a shard knows its own files.
        if not (out / "meta.json").exists():
            free = {"n", "files", "skip_bad"}
        differ = [f"{k} {v} (there) {identity.get(k)} (here)" for k, v in before.items()
                  if identity.get(k) != v and k not in free]
        if differ:
            raise BadInput(f"--out {out}: holds latents made otherwise: {', '.join(differ)}; choose another folder")
    elif out.exists():
        ours = {out / ".lock", *out.glob(".encode.json.*.tmp")}  # of a process that was killed at once
        if set(out.iterdir()) - ours:
            raise BadInput(f"--out {out}: is not empty and holds no latents of this command, expected a new folder")
    return before


def encode_shard(path: Path, vae: VAE, files: list, rows: range, of_files: str, args: argparse.Namespace,
                 device: torch.device, bar: tqdm) -> None:
    """Encode images `rows` of `files` into one shard; the sums behind the statistics go into its metadata."""
    tensors, bad = encode_rows(vae, files, rows, args, device, bar)
    both = torch.cat([tensors["latents"], tensors["latents_flip"]]).double()           # [2 n, C, h, w]
    if not both.isfinite().all():
        raise BadInput(f"{path}: the encoder gave NaN or infinity; try --precision fp32, and look at {args.ckpt}")
    sums = dict(
        count=both[:, 0].numel(), sum=both.sum((0, 2, 3)).tolist(), square=both.square().sum((0, 2, 3)).tolist(),
    )
    metadata = dict(
        total_size=str(len(both) // 2), dtype=args.dtype, device=str(device), sums=json.dumps(sums),
        bad=json.dumps(bad), files=of_files,
    )
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def encode_rows(vae: VAE, files: list, rows: range, args: argparse.Namespace, device: torch.device,
                bar: tqdm) -> tuple[dict, list]:
    """(tensors of one shard, unreadable files).  The noise of a view depends on (seed, image, view) alone."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    paths, read = [files[i][0] for i in rows], functools.partial(read_batch, size=args.size)
    views = ([], [])                                             # latents of the images and of their mirror images
    labels, bad, position = [], [], rows[0]
    for x, readable in DataLoader(paths, args.batch_size, num_workers=args.workers, collate_fn=read):
        kept = [position + i for i, whole in enumerate(readable) if whole]
        bad += [str(files[position + i][0]) for i, whole in enumerate(readable) if not whole]
        if bad and not args.skip_bad:
            raise BadInput(f"{bad[0]}: not a readable image; repair or remove it, "
                           "or pass --skip_bad 1 to leave such files out")
        if kept:
            x = torch.from_numpy(x).to(device).float() / 127.5 - 1                     # [-1, 1]
            for k, view in enumerate((x, x.flip(3))):
                with tf32(), autocast(args, device):
                    mean, std = vae.encode(view)
                noise = noise_by_index("vae", args.seed, [2 * i + k for i in kept], mean.shape[1:]).to(device)
                z = mean.float() + std.float() * noise
                views[k].append(z.to(dtype))                     # stays there until the shard is full
            labels += [files[i][1] for i in kept]
        position += len(readable)
        bar.update(len(readable))
    if not labels:
        raise BadInput(f"none of the images {files[rows[0]][0]} ... {files[rows[-1]][0]} of one shard can be read; "
                       "repair or remove them and run the command again")
    latents, flipped = (torch.cat(view).cpu() for view in views)
    return dict(latents=latents, latents_flip=flipped, labels=torch.tensor(labels)), bad


def read_batch(paths: list, size: int) -> tuple[np.ndarray | None, list]:
    """Image files -> (the readable ones, uint8 [b, 3, size, size], or None; whether each is readable).

    numpy, which a worker sends through a pipe.  Tensors go through shared memory, of which a container has 64 MB; where
    they do not fit, the worker loses the batch, and this process waits for ever.
    """
    images = [read_image(path, size) for path in paths]
    kept = [image for image in images if image is not None]
    return torch.stack(kept).numpy() if kept else None, [image is not None for image in images]


def finish_encoding(out: Path, identity: dict, classes: list) -> None:
    """Statistics of all latents from the sums in the shards' headers; latents_stats.pt as LightningDiT's, meta.json."""
    count, n, bad = 0, 0, []
    total = square = 0.0                                         # then float64 [C]
    for path in sorted(out.glob("latents_rank*.safetensors")):
        sums, images, unreadable = shard_sums(path)
        count += sums["count"]
        total = total + sums["sum"]
        square = square + sums["square"]
        n += images
        bad += unreadable
    mean, std = mean_and_std(count, total, square)
    stats = dict(mean=mean.float().view(1, -1, 1, 1), std=std.float().view(1, -1, 1, 1))
    meta = {k: identity[k] for k in ("vae", "vae_hash", "size")} | dict(n=n, classes=classes, bad=bad)
    if not is_finished(out, stats, meta):                        # kept runs know the latents by these files' times
        write_atomic(out / "latents_stats.pt", stats)
        write_atomic(out / "meta.json", json.dumps(meta, indent=1))
    print(f"{out}: {n} images in {len(classes)} classes, both flips, {len(bad)} unreadable left out")
    for path in bad[:20]:
        print(f"  {path}")


def is_finished(out: Path, stats: dict, meta: dict) -> bool:
    """Whether the folder has these statistics and this meta.json already."""
    try:
        mean, std = read_stats(out, stats["mean"].numel())
        same = mean == stats["mean"].flatten().tolist() and std == stats["std"].flatten().tolist()
        return same and read_json(out / "meta.json", "a meta.json") == meta
    except BadInput:
        return False


def mean_and_std(count: int, total: torch.Tensor, square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (count - 1) standard deviation [C] from the sums [C] of count values and of their squares, float64."""
    mean = total / count
    return mean, ((square - count * mean ** 2) / (count - 1)).clamp(min=0).sqrt()


# ---- check and decode ------------------------------------------------------------------------------------------------

def check(args: argparse.Namespace) -> None:
    """Read a whole folder of latents and say what is in it; BadInput if it is not fit for training."""
    found = shards(args.folder)
    count, total, square = 0, 0.0, 0.0
    for shard in tqdm(found, desc="check", unit=" shards", dynamic_ncols=True):
        for name in ("latents", "latents_flip"):
            view = getattr(shard, name).double()                 # [n, C, h, w]
            if not view.isfinite().all():
                broken = (~view.isfinite()).flatten(1).any(1).nonzero()
                raise BadInput(f"{shard.path}: {name} hold NaN or infinity in image {int(broken[0])}; encode it again")
            count += view[:, 0].numel()
            total = total + view.sum((0, 2, 3))
            square = square + view.square().sum((0, 2, 3))
    mean, std = mean_and_std(count, total, square)
    labels = torch.cat([shard.labels for shard in found])
    meta = read_meta(Path(args.folder) / "meta.json")
    counts = torch.bincount(labels, minlength=count_classes(labels, meta, args.folder))
    shape, dtype = list(found[0].latents.shape[1:]), str(found[0].latents.dtype).removeprefix("torch.")
    print(f"{args.folder}: {len(found)} shards, {len(labels)} images, latents {shape} {dtype}, both flips, all finite")
    print(f"labels 0 .. {len(counts) - 1}: {counts.min()} to {counts.max()} images per class, "
          f"{(counts == 0).sum()} classes without any")
    print(f"channel means {mean.min():.3f} .. {mean.max():.3f}, "
          f"standard deviations {std.min():.3f} .. {std.max():.3f}")

    stats = read_stats(args.folder, len(mean))
    want_mean, want_std = (torch.tensor(values, dtype=torch.float64) for values in stats)
    off = max(((mean - want_mean) / want_std).abs().max().item(), (std / want_std).log().abs().max().item())
    if off > 0.1:                                                # LightningDiT's, of 10,000 images, are about 0.01 off
        raise BadInput(f"{args.folder}/latents_stats.pt: is off by {off:.2f} standard deviations, the statistics of "
                       "other latents; delete it and encode again, or fetch the right one")
    print(f"latents_stats.pt fits to {off:.4f} standard deviations")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """The first --n latents of a shard or folder back to PNG files: what the VAE makes of them."""
    vae, name = load_vae(args.ckpt)
    path = Path(args.latents)
    made_by = read_meta((path if path.is_dir() else path.parent) / "meta.json").get("vae_hash", "")
    if made_by and made_by != weights_hash(vae):
        raise BadInput(f"--ckpt {args.ckpt}: is not the VAE ({made_by}) that made these latents")
    if path.is_dir():
        first = [shard.latents[:args.n] for shard in shards(path)[:args.n]]            # a shard holds an image or more
        latents = torch.cat(first)[:args.n]
    else:
        latents = read_latents(path)[:args.n]
    channels = vae.config["z_channels"]
    if latents.shape[1] != channels:
        raise BadInput(f"{path}: latents of {latents.shape[1]} channels, but {args.ckpt} is the {name} with {channels}")
    if not latents.isfinite().all():
        raise BadInput(f"{path}: holds latents that are not finite; python vae.py check FOLDER finds them")
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty, expected a new folder")
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    vae = vae.to(device)
    try:
        for i, z in enumerate(tqdm(latents, desc=f"decode {name}", unit=" images", dynamic_ncols=True)):
            image = Image.fromarray(latents_to_uint8(vae, z[None].to(device))[0])
            write_atomic(out / f"{i:06d}.png", lambda temporary, image=image: image.save(temporary, format="PNG"))
    except BaseException:                                        # the same command finds a new folder again
        for path in out.glob("*.png"):
            path.unlink()
        raise
    print(f"{out}: {len(latents)} images")


def read_latents(path: Path) -> torch.Tensor:
    """`latents` [n, C, h, w] of a .safetensors file, whatever else is in it."""
    file = open_shard(path)
    with reading(path, "a file with `latents` [n, C, h, w], floating point", "choose a shard of latents"):
        if "latents" not in file.keys():
            raise ValueError(f"holds {', '.join(list(file.keys())[:3]) or 'nothing'}")
        latents = file.get_tensor("latents")
        if latents.ndim != 4 or 0 in latents.shape or not latents.is_floating_point():
            raise ValueError(f"latents are {latents.dtype} {list(latents.shape)}")
    return latents


# ---- Command line ----------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    e = commands.add_parser("encode", help="image folder -> latent shards; run it again to resume")
    e.add_argument("--images", required=True, help="folder with one sub-folder of images a class")
    e.add_argument("--ckpt", required=True, help="VAE checkpoint: the official VA-VAE f16d32 or SD-VAE f8d4")
    e.add_argument("--out", type=folder_path, required=True, help="new folder for the shards")
    e.add_argument("--size", type=number(int, 8, 4096), default=256, help="images are cropped to size x size (256)")
    e.add_argument("--batch_size", type=number(int, 1, BATCH), default=20, help="images per forward pass (20)")
    e.add_argument("--shard", type=number(int, 1), default=10_000, help="images per shard (10,000, LightningDiT)")
    e.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32",
                   help="of the stored latents; bf16 halves the 84 GB of ImageNet")
    e.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                   help="of the encoder; on a GPU fp32 is TF32")
    e.add_argument("--seed", type=number(int, 0, SEED), default=0, help="of the sampled latents")
    e.add_argument("--workers", type=number(int, 0, 1024), default=min(8, usable_cores()),
                   help="processes that read images")
    e.add_argument("--skip_bad", type=number(int, 0, 1), default=0,
                   help="1: leave unreadable images out and list them")
    e.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    c = commands.add_parser("check", help="read a folder of latents: shapes, finite values, labels, statistics, "
                                          "class balance")
    c.add_argument("folder")
    d = commands.add_parser("decode", help="latents of a folder or shard -> PNG files")
    d.add_argument("latents")
    d.add_argument("--ckpt", required=True, help="VAE checkpoint")
    d.add_argument("--out", type=folder_path, required=True, help="new folder for the images")
    d.add_argument("--n", type=number(int, 1), default=16, help="images (16)")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    commands = dict(encode=encode, check=check, decode=decode)
    if args.command == "encode" or rank() == 0:
        commands[args.command](args)


if __name__ == "__main__":
    main(run, parse_args)
