"""Data in, images out: every training script sees one contract, whatever the data are.

    x   float32 [N, C, H, W], every channel with mean 0 and standard deviation 1 over the data set (`normalize`)
    y   int64 [N] in 0 .. num_classes - 1

The statistics that undo it travel with the data and with every checkpoint, and are applied in one place (`denormalize`).

    digits          scikit-learn's handwritten digits: 1,797 real 8 x 8 images in 10 classes, inside the package, nothing is downloaded
    FILE.npz        arrays `images` (uint8 [N, H, W] or [N, H, W, 1 or 3], square) and `labels` (integers from 0)
    IMAGES/         one sub-folder a class of small square images (at most 64 pixels), read into memory
    LATENTS/        LightningDiT's latent shards (*.safetensors, latents_stats.pt), memory-mapped, both flips: 2 rows an image

And the autoencoder that makes latents of images (LDM's, as VA-VAE f16d32 and SD-VAE f8d4; official checkpoints load as they are):

    python vae.py encode --images DIR --ckpt vavae-imagenet256-f16d32-dinov2.pt --out latents/       # LightningDiT's shards, resumable
    python vae.py check latents/
    python vae.py decode latents/ --ckpt vavae-imagenet256-f16d32-dinov2.pt --out pictures/
"""
import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import refuse_differences


class BadInput(Exception):
    """What the user can mend: one line with what is wrong, what was expected and what to do.  Scripts print it and exit with 2."""


@dataclass
class Data:
    x: torch.Tensor                 # [N, C, H, W] float32, normalised; of latents a `Latents`, which is indexed the same way
    y: torch.Tensor                 # [N] int64
    num_classes: int
    mean: list = field(repr=False)  # [C] before normalisation: of pixels in [0, 1], or of latents
    std: list = field(repr=False)
    source: str = ""
    kind: str = "pixels"            # or "latents"
    vae: str = ""                   # hash of the VAE's weights that made the latents, where known

    @property
    def meta(self):
        """What a checkpoint keeps, to give images back without the data."""
        return dict(source=self.source, num_classes=self.num_classes, shape=list(self.x.shape[1:]), mean=self.mean, std=self.std, kind=self.kind, vae=self.vae)


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
    folder = Path(source)
    return "pixels" if source == "digits" or source.endswith(".npz") or folder.is_dir() and not any(folder.glob("*.safetensors")) else "latents"


def load_data(source):
    """Data for --data SOURCE (see the file header).  Raises BadInput for anything missing, unreadable or out of range."""
    if source == "digits":
        from sklearn.datasets import load_digits                 # ships with scikit-learn (UCI ML hand-written digits, test part)
        digits = load_digits()
        images, labels = digits.images[:, None] / 16, digits.target                                   # grey levels 0 .. 16
    elif source.endswith(".npz"):
        images, labels = read_npz(source)
    elif Path(source).is_dir() and data_kind(source) == "latents":
        return load_latents(source)
    elif Path(source).is_dir():
        images, labels = read_image_folder(source)
    else:
        raise BadInput(f"--data {source}: expected `digits`, an .npz file with `images` and `labels`, a folder of latent shards, or an image folder")
    x, y = torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64)
    if x.shape[0] < 2 or x.std() == 0:
        raise BadInput(f"--data {source}: needs at least two images that are not all alike, found {len(x)}")
    std, mean = torch.std_mean(x.double(), dim=(0, 2, 3))
    mean, std = mean.tolist(), std.clamp(min=1e-6).tolist()
    return Data(normalize(x, mean, std), y, int(y.max()) + 1, mean, std, source)


class Latents:
    """`x` of a folder of shards: rows 0 .. N-1 are the images, N .. 2N-1 their mirror images; memory-mapped, normalised as rows are taken."""

    def __init__(self, found, mean, std):
        self.parts = [a for _, a, _, _ in found] + [b for _, _, b, _ in found]                        # [n_i, C, H, W] each
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        self.shape, self.mean, self.std = torch.Size((int(self.ends[-1]), *found[0][1].shape[1:])), mean, std

    def __len__(self):
        return len(self.parts) and self.shape[0]

    def __getitem__(self, rows):
        """rows: int64 [n] -> float32 [n, C, H, W]."""
        parts = torch.searchsorted(self.ends, rows, right=True)
        starts = self.ends[parts] - torch.tensor([len(self.parts[p]) for p in parts])
        x = torch.stack([self.parts[p][i] for p, i in zip(parts.tolist(), (rows - starts).tolist())]).float()
        return normalize(x, self.mean, self.std)


def load_latents(folder):
    """Data of a folder of latent shards with its latents_stats.pt; refuses statistics that do not normalise these latents."""
    found = shards(folder)
    mean, std = read_stats(folder, found[0][1].shape[1])
    y = torch.cat([y for *_, y in found]).repeat(2).long()                                            # both views
    x = Latents(found, mean, std)
    meta = json.loads((Path(folder) / "meta.json").read_text()) if (Path(folder) / "meta.json").exists() else {}
    if meta and int(y.max()) >= len(meta["classes"]):
        raise BadInput(f"--data {folder}: labels go up to {int(y.max())}, but meta.json names {len(meta['classes'])} classes; expected shards and meta.json of one encoding")
    sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:256]]
    std_found, mean_found = torch.std_mean(sample, dim=(0, 2, 3))
    if not sample.isfinite().all() or mean_found.abs().max() > 0.5 or std_found.min() < 0.5 or std_found.max() > 2:
        raise BadInput(f"--data {folder}: normalised with its latents_stats.pt, the channels have means up to {mean_found.abs().max():.2f} and deviations "
                       f"{std_found.min():.2f} .. {std_found.max():.2f}, expected 0 and 1: the statistics of other latents, or latents normalised already")
    return Data(x, y, len(meta["classes"]) if meta else int(y.max()) + 1, mean, std, folder, "latents", meta.get("vae_hash", ""))


def read_image_folder(folder):
    """(images [N, 3, H, H] in [0, 1], labels [N]) of small images in class folders, for pixel space; all of one square size."""
    files, _ = image_files(folder)
    with Image.open(files[0][0]) as first:
        size = first.size
    if size[0] != size[1] or size[0] > 64:
        raise BadInput(f"--data {folder}: {files[0][0].name} has {size[0]} x {size[1]} pixels, expected square images of at most 64; larger ones: python vae.py encode")
    images = []
    for path, _ in files:
        try:
            with Image.open(path) as image:
                if image.size != size:
                    raise BadInput(f"--data {folder}: {path} is {image.width} x {image.height}, the first image {size[0]} x {size[1]}, expected one size")
                images.append(np.array(image.convert("RGB")))
        except OSError:
            raise BadInput(f"{path}: not a readable image; mend or remove it") from None
    return np.stack(images).transpose(0, 3, 1, 2) / 255.0, np.array([label for _, label in files])


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


def to_images(x, meta, vae=None):
    """Normalised x [n, C, H, W] -> uint8 [n, H, W, 1 or 3].  Latents are decoded by `vae`; without one, their first 3 channels as colours."""
    if meta.get("kind") != "latents":
        return to_uint8(x, meta["mean"], meta["std"])
    if vae is None:
        return to_uint8(x[:, :3], [0.5] * 3, [0.25] * 3)                                              # +- 2 deviations
    with torch.no_grad():
        z = denormalize(x.float().to(next(vae.parameters()).device), meta["mean"], meta["std"])
        return np.concatenate([latents_to_uint8(vae, part) for part in z.split(8)])


# ------------------------------------------------------------------------------------------------------------------------------
# The autoencoder: LDM's AutoencoderKL, key names as in its checkpoints
# ------------------------------------------------------------------------------------------------------------------------------

VAES = {
    "vavae": dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256, z_channels=32),   # VA-VAE f16d32
    "sdvae": dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(), resolution=256, z_channels=4),          # SD-VAE f8d4
}


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):                                                                             # [B, C, H, W]
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))                 # [B, HW, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                                      # LDM pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not, then a change of resolution or none."""

    def __init__(self, c_in, c_out, blocks, attention, **resample):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        for name, module in resample.items():                                                         # downsample or upsample
            setattr(self, name, module)

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h = getattr(self, name)(h)
        return h


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(([ch] + widths)[i], c, num_res_blocks, resolution >> i in attn_resolutions, **(dict(downsample=Downsample(c)) if i < last else {}))
            for i, c in enumerate(widths))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(                                                                      # index 0 is the highest resolution
            Level(widths[min(i + 1, last)], c, num_res_blocks + 1, resolution >> i in attn_resolutions, **(dict(upsample=Upsample(c)) if i else {}))
            for i, c in enumerate(widths))
        self.norm_out, self.conv_out = group_norm(ch * ch_mult[0]), nn.Conv2d(ch * ch_mult[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """VAE("vavae") or VAE("sdvae"), or explicit dims as keywords, which override the preset's.

    encode(x [B, 3, H, W] in [-1, 1]) -> (mean, std) [B, C, H/f, W/f] of the latent; decode(z) -> images, about [-1, 1], not clamped.
    Source: CompVis/latent-diffusion's AutoencoderKL as in hustvl/LightningDiT `tokenizer/autoencoder.py` (golden/vae.npz).
    """

    def __init__(self, preset="vavae", **dims):
        super().__init__()
        self.config = VAES[preset] | dims
        C = self.config["z_channels"]
        self.downscale = 2 ** (len(self.config["ch_mult"]) - 1)
        self.encoder, self.decoder = Encoder(**self.config), Decoder(**self.config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * C, 2 * C, 1), nn.Conv2d(C, C, 1)

    def encode(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def read_weights(path):
    """The state dict in a .pt, .ckpt or .safetensors file, on the CPU.  Never unpickles code (weights_only).  BadInput if it is none."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if str(path).endswith(".safetensors"):
            return safetensors().load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                                     # written before torch 1.6: cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except Exception as error:                                   # pickle with code, truncated zip, text file, ...
        raise BadInput(f"{path}: not a file of weights ({str(error).splitlines()[0][:120]})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise BadInput(f"{path}: holds no state dict of tensors")
    return state


def load_vae(path):
    """(VAE in eval mode, its name in VAES or "custom") from a checkpoint; the dims are read off the keys.

    Keys of training (foundation_model., loss., linear_proj.) are dropped by prefix; every key of the VAE must be there, with its shape.
    """
    state = {k: v for k, v in read_weights(path).items() if k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("encoder.down.")), default=-1)
    try:
        ch = len(state["encoder.conv_in.weight"])
        dims = dict(ch=ch, ch_mult=tuple(len(state[f"encoder.down.{i}.block.0.conv2.weight"]) // ch for i in range(levels)),
                    num_res_blocks=len([k for k in state if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv2\.weight", k)]),
                    attn_resolutions=tuple(256 >> i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state),
                    resolution=256, z_channels=len(state["post_quant_conv.weight"]))
    except KeyError as error:
        raise BadInput(f"{path}: not a VAE checkpoint of LDM's layout ({error.args[0]} is missing)") from None
    with torch.device("meta"):
        vae = VAE(**dims)
    try:
        refuse_differences(vae, state, "VAE")
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    vae.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return vae.requires_grad_(False).eval(), next((name for name, preset in VAES.items() if preset == dims), "custom")


# ------------------------------------------------------------------------------------------------------------------------------
# Images -> latent shards, in LightningDiT's format
# ------------------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


def safetensors():
    """safetensors.torch, or BadInput that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise BadInput("latent shards and .safetensors files need the safetensors library: pip install safetensors") from None
    return safetensors.torch


def image_files(folder):
    """([(path, label)], class names) of a folder with one sub-folder a class: classes and files sorted by name, as torchvision's ImageFolder."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder, expected one sub-folder a class")
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((Path(folder) / name).rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    empty = [name for label, name in enumerate(classes) if label not in {y for _, y in files}]
    if not files or empty:
        raise BadInput(f"{folder}: " + (f"no image in {', '.join(empty[:3])}" if classes and files else f"no images in class folders (looked for {' '.join(IMAGE_SUFFIXES)})"))
    return files, classes


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size: halve with BOX while twice too large, BICUBIC to the shorter side, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size):
    """uint8 [3, size, size] of an image file; None if it cannot be read.  Grey and transparent images become RGB."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(center_crop(image.convert("RGB"), size))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):      # what Pillow raises on damaged files
        return None


def shard_name(rank, shard):
    return f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"


def save_shard(path, tensors, metadata):
    """safetensors file under a temporary name, flushed, then renamed: never half a shard."""
    temporary = path.with_suffix(".tmp")
    safetensors().save_file(tensors, temporary, metadata={k: str(v) for k, v in metadata.items()})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@torch.no_grad()
def encode(args):
    """Both flips of every image through the encoder, sampled, un-normalised, into shards of --shard images a process."""
    from common import rank, setup, world
    vae, name = load_vae(args.ckpt)
    device, out = setup(args), Path(args.out)
    files, classes = image_files(args.images)
    if args.size % vae.downscale:
        raise BadInput(f"--size {args.size}: the {name} needs a multiple of {vae.downscale}")
    identity = dict(images=str(Path(args.images).resolve()), n=len(files), vae=name, vae_hash=weights_hash(vae), size=args.size, seed=args.seed, shard=args.shard,
                    processes=world(), dtype=args.dtype, precision=args.precision, skip_bad=args.skip_bad)
    if rank() == 0:
        saved = out / "encode.json"
        if saved.exists():
            differ = [f"{k} {v} (there) {identity[k]} (here)" for k, v in json.loads(saved.read_text()).items() if identity.get(k) != v]
            if differ:
                raise BadInput(f"--out {out}: holds latents made otherwise: {', '.join(differ)}; choose another folder")
        elif out.exists() and any(out.iterdir()):
            raise BadInput(f"--out {out}: is not empty and holds no latents of this command, expected a new folder")
        out.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(identity, indent=1))
    if world() > 1:
        torch.distributed.barrier()
    vae = vae.to(device)
    low, high = rank() * len(files) // world(), (rank() + 1) * len(files) // world()
    with tqdm(total=high - low, desc=f"encode {name}", unit=" images", disable=rank() > 0, dynamic_ncols=True) as bar:
        for shard, start in enumerate(range(low, high, args.shard)):
            path, rows = out / shard_name(rank(), shard), range(start, min(start + args.shard, high))
            if path.exists():
                bar.update(len(rows))
            else:
                tensors, bad = encode_rows(vae, files, rows, args, device, bar)
                both = torch.cat([tensors["latents"], tensors["latents_flip"]]).double()
                if not both.isfinite().all():
                    raise BadInput(f"{path}: the encoder gave NaN or infinity; try --precision fp32, and look at {args.ckpt}")
                sums = dict(count=both[:, 0].numel(), sum=both.sum((0, 2, 3)).tolist(), square=both.square().sum((0, 2, 3)).tolist())
                save_shard(path, tensors, dict(total_size=len(both) // 2, dtype=args.dtype, device=device, sums=json.dumps(sums), bad=json.dumps(bad)))
    if world() > 1:
        torch.distributed.barrier()
    if rank() == 0:
        finish_encoding(out, identity, classes)


def encode_rows(vae, files, rows, args, device, bar):
    """(tensors of one shard, unreadable files) of images `rows`.  The noise of a view depends on (seed, image, view) alone."""
    from common import autocast, noise_by_index
    images = torch.utils.data.DataLoader(Images([files[i][0] for i in rows], args.size), args.batch_size, num_workers=args.workers, collate_fn=list)
    views, labels, bad, position = ([], []), [], [], rows[0]
    for batch in images:                                         # a list of uint8 [3, size, size], None where unreadable
        kept = [position + i for i, image in enumerate(batch) if image is not None]
        bad += [str(files[position + i][0]) for i, image in enumerate(batch) if image is None]
        if bad and not args.skip_bad:
            raise BadInput(f"{bad[0]}: not a readable image; mend or remove it, or pass --skip_bad 1 to leave such files out")
        if kept:
            x = torch.stack([image for image in batch if image is not None]).to(device).float() / 127.5 - 1           # [-1, 1]
            for k, view in enumerate((x, x.flip(3))):
                with autocast(args, device):
                    mean, std = vae.encode(view)
                noise = noise_by_index(args.seed, [2 * i + k for i in kept], mean.shape[1:]).to(device)
                views[k].append((mean.float() + std.float() * noise).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32).cpu())
            labels += [files[i][1] for i in kept]
        position += len(batch)
        bar.update(len(batch))
    if not labels:
        raise BadInput(f"no readable image among {files[rows[0]][0]} ... {files[rows[-1]][0]}")
    return dict(latents=torch.cat(views[0]), latents_flip=torch.cat(views[1]), labels=torch.tensor(labels)), bad


class Images(torch.utils.data.Dataset):
    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.paths[i], self.size)


def finish_encoding(out, identity, classes):
    """Statistics of all latents from the sums in the shards' headers; latents_stats.pt as LightningDiT's, and meta.json."""
    count, total, square, n, bad = 0, 0.0, 0.0, 0, []
    for path in sorted(out.glob("latents_rank*.safetensors")):
        with open_shard(path) as shard:
            metadata = shard.metadata()
        sums = json.loads(metadata["sums"])
        count, n, bad = count + sums["count"], n + int(metadata["total_size"]), bad + json.loads(metadata["bad"])
        total, square = total + torch.tensor(sums["sum"], dtype=torch.float64), square + torch.tensor(sums["square"], dtype=torch.float64)
    mean = total / count
    std = ((square - count * mean ** 2) / (count - 1)).clamp(min=0).sqrt()
    torch.save(dict(mean=mean.float().view(1, -1, 1, 1), std=std.float().view(1, -1, 1, 1)), out / "latents_stats.pt")
    (out / "meta.json").write_text(json.dumps(dict(vae=identity["vae"], vae_hash=identity["vae_hash"], size=identity["size"], n=n, classes=classes, bad=bad), indent=1))
    print(f"{out}: {n} images in {len(classes)} classes, both flips, {len(bad)} unreadable left out" + "".join(f"\n  {path}" for path in bad[:20]))


def weights_hash(vae):
    return hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in vae.state_dict().values())).hexdigest()[:12]


def open_shard(path):
    """A shard, lazily read: safetensors' handle with keys(), get_tensor(name) (memory-mapped) and metadata().  BadInput if it is damaged."""
    safetensors()
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({str(error).splitlines()[0]}); make it anew") from None


def shards(folder):
    """[(path, latents [n, C, H, W], latents_flip, labels [n])] of a folder in LightningDiT's format, memory-mapped; BadInput names the first fault."""
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        shard = open_shard(path)
        missing = {"latents", "latents_flip", "labels"} - set(shard.keys())
        if missing:
            raise BadInput(f"{path}: has no {' and no '.join(sorted(missing))}, expected a shard of LightningDiT's format")
        a, b, y = (shard.get_tensor(name) for name in ("latents", "latents_flip", "labels"))
        if a.ndim != 4 or a.shape != b.shape or y.shape != a.shape[:1] or y.is_floating_point() or found and a.shape[1:] != found[0][1].shape[1:]:
            raise BadInput(f"{path}: latents {list(a.shape)}, latents_flip {list(b.shape)}, labels {y.dtype} {list(y.shape)} do not fit together" +
                           (f" or with {found[0][0].name}" if found else ""))
        if len(y) and y.min() < 0:
            raise BadInput(f"{path}: labels start at {y.min()}, expected 0 .. classes - 1")
        found.append((path, a, b, y))
    if not found:
        raise BadInput(f"{folder}: holds no latent shards (*.safetensors), expected those of LightningDiT or of `python vae.py encode`")
    return found


def read_stats(folder, channels):
    """(mean, std), lists of C floats, of a folder's latents_stats.pt; BadInput if it is none for so many channels."""
    path = Path(folder) / "latents_stats.pt"
    state = read_weights(path)
    if not {"mean", "std"} <= set(state) or any(state[k].numel() != channels for k in ("mean", "std")) or not (state["std"] > 0).all():
        raise BadInput(f"{path}: expected mean and positive std of {channels} channels, found " + ", ".join(f"{k} {list(v.shape)}" for k, v in list(state.items())[:3]))
    return tuple(state[k].flatten().double().tolist() for k in ("mean", "std"))


def check(args):
    """Read a whole folder of latents and say what is in it; BadInput if it is not fit for training."""
    found, n, total, square = shards(args.folder), 0, 0.0, 0.0
    for path, a, b, y in tqdm(found, desc="check", unit=" shards", dynamic_ncols=True):
        for name, view in (("latents", a), ("latents_flip", b)):
            view = view.double()
            if not view.isfinite().all():
                raise BadInput(f"{path}: {name} hold NaN or infinity in image {int((~view.isfinite()).flatten(1).any(1).nonzero()[0])}; encode it anew")
            total, square, n = total + view.sum((0, 2, 3)), square + view.square().sum((0, 2, 3)), n + view[:, 0].numel()
    mean = total / n
    std = ((square - n * mean ** 2) / (n - 1)).clamp(min=0).sqrt()
    y = torch.cat([y for *_, y in found])
    counts = torch.bincount(y)
    print(f"{args.folder}: {len(found)} shards, {len(y)} images, latents {list(found[0][1].shape[1:])} {str(found[0][1].dtype).removeprefix('torch.')}, both flips, all finite")
    print(f"labels 0 .. {len(counts) - 1}: {counts.min()} to {counts.max()} images a class, {(counts == 0).sum()} classes without any")
    print(f"channel means {mean.min():.3f} .. {mean.max():.3f}, standard deviations {std.min():.3f} .. {std.max():.3f}")
    want_mean, want_std = (torch.tensor(v, dtype=torch.float64) for v in read_stats(args.folder, len(mean)))
    off = max(((mean - want_mean) / want_std).abs().max().item(), (std / want_std).log().abs().max().item())
    if off > 0.1:                                                # LightningDiT's statistics come from 10,000 images: about 0.01 off
        raise BadInput(f"{args.folder}/latents_stats.pt: is off by {off:.2f} standard deviations, the statistics of other latents; delete it and encode again, or fetch the right one")
    print(f"latents_stats.pt fits to {off:.4f} standard deviations")


@torch.no_grad()
def decode(args):
    """Latents of a shard or folder back to PNG files: what the VAE makes of them."""
    vae, name = load_vae(args.ckpt)
    path = Path(args.latents)
    latents = torch.cat([a[:args.n] for _, a, _, _ in shards(path)][:args.n])[:args.n] if path.is_dir() else open_shard(path).get_tensor("latents")[:args.n]
    if latents.shape[1] != vae.config["z_channels"]:
        raise BadInput(f"{path}: latents of {latents.shape[1]} channels, but {args.ckpt} is the {name} with {vae.config['z_channels']}")
    from common import pick_device
    out, device = Path(args.out), pick_device("auto")
    out.mkdir(parents=True, exist_ok=True)
    vae = vae.to(device)
    for i, z in enumerate(tqdm(latents, desc=f"decode {name}", unit=" images", dynamic_ncols=True)):
        Image.fromarray(latents_to_uint8(vae, z[None].to(device))[0]).save(out / f"{i:06d}.png")
    print(f"{out}: {len(latents)} images")


def latents_to_uint8(vae, z):
    """Un-normalised latents [n, C, h, w] -> uint8 [n, H, W, 3]: decode, 127.5 x + 128, clamp, truncate, as LightningDiT's inference."""
    return (127.5 * vae.decode(z.float()) + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def parse_args(argv=None):
    from common import Parser, number
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    e = commands.add_parser("encode", help="image folder -> latent shards; run it again to resume")
    e.add_argument("--images", required=True, help="folder with one sub-folder of images a class")
    e.add_argument("--ckpt", required=True, help="VAE checkpoint: the official VA-VAE f16d32 or SD-VAE f8d4")
    e.add_argument("--out", required=True, help="new folder for the shards")
    e.add_argument("--size", type=number(int, 8), default=256, help="images are cropped to size x size (256)")
    e.add_argument("--batch_size", type=number(int, 1), default=20, help="images per forward pass (20)")
    e.add_argument("--shard", type=number(int, 1), default=10_000, help="images per shard (10,000, LightningDiT)")
    e.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the stored latents; bf16 halves the 84 GB of ImageNet")
    e.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder")
    e.add_argument("--seed", type=number(int, 0), default=0, help="of the sampled latents")
    e.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), help="processes that read images")
    e.add_argument("--skip_bad", type=int, choices=[0, 1], default=0, help="1: leave unreadable images out and list them")
    e.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    c = commands.add_parser("check", help="read a folder of latents: shapes, finite values, labels, statistics, class balance")
    c.add_argument("folder")
    d = commands.add_parser("decode", help="latents of a folder or shard -> PNG files")
    d.add_argument("latents")
    d.add_argument("--ckpt", required=True, help="VAE checkpoint")
    d.add_argument("--out", required=True, help="folder for the images")
    d.add_argument("--n", type=number(int, 1), default=16, help="images (16)")
    return p.parse_args(argv)


def run(args):
    dict(encode=encode, check=check, decode=decode)[args.command](args)


if __name__ == "__main__":
    import common
    import vae                                                    # this file under its own name, whose BadInput common knows
    common.main(vae.run, vae.parse_args)
