"""The networks whose features the published metrics are computed in: FID's Inception and, for precision and recall, VGG16.

Weights are files that the user downloads; nothing is fetched here.  evaluate.py uses these networks; golden/inception.npz holds outputs
of the two public implementations to compare with.  This file needs torch alone, and vae.py for reading weights; paste it.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import refuse_differences
from vae import BadInput, read_weights, weights_hash



class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU.  Stride 1 keeps the size unless padding says otherwise."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 if stride == 1 else 0 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, each a chain of units (name, channels, kernel[, stride]); a chain may end in two parallel units.

    pool: "avg" (padding not counted, unlike torchvision's network) or "max" before the 1 x 1 unit `branch_pool`, or "down", stride 2.
    """

    def __init__(self, c_in, chains, pool, c_pool=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for chain in chains:
            names, c = [], c_in
            for stage in chain:
                stage = stage if isinstance(stage, list) else [stage]
                for name, c_out, *kernel in stage:
                    self.add_module(name, ConvBN(c, c_out, *kernel))
                names.append([name for name, *_ in stage])
                c = stage[-1][1]
            self.chains.append(names)
        if c_pool:
            self.branch_pool = ConvBN(c_in, c_pool, 1)

    def forward(self, x):
        out = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            out.append(h)
        if self.pool == "down":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], dim=1)
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.pool == "avg" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*out, self.branch_pool(pooled)], dim=1)


def mixed_a(c_in, c_pool):
    return Mixed(c_in, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]], "avg", c_pool)


def mixed_c(c):
    wide, tall = (1, 7), (7, 1)
    return Mixed(768, [[("branch1x1", 192, 1)], [("branch7x7_1", c, 1), ("branch7x7_2", c, wide), ("branch7x7_3", 192, tall)],
                       [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, tall), ("branch7x7dbl_3", c, wide), ("branch7x7dbl_4", c, tall), ("branch7x7dbl_5", 192, wide)]], "avg", 192)


def mixed_e(c_in, pool):
    wide, tall = (1, 3), (3, 1)
    return Mixed(c_in, [[("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, wide), ("branch3x3_2b", 384, tall)]],
                        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), [("branch3x3dbl_3a", 384, wide), ("branch3x3dbl_3b", 384, tall)]]], pool, 192)


class Inception(nn.Module):
    """forward(uint8 images [n, 3, H, W]) -> (2048 features [n, 2048], logits without the fc bias [n, 1008]), float32.

    pipeline "adm": TensorFlow's bilinear resize to 299 and (x - 128) / 128, as ADM's evaluator, torch-fidelity and NVIDIA's file;
    "pytorch_fid": torch's bilinear with half-pixel centres and 2 x / 255 - 1, as pytorch-fid and LightningDiT's quick FID.
    """

    def __init__(self, pipeline="adm"):
        super().__init__()
        self.pipeline = pipeline
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = ConvBN(3, 32, 3, 2), ConvBN(32, 32, 3, 1, 0), ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = ConvBN(64, 80, 1), ConvBN(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3, 2)], [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]], "down")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = mixed_c(128), mixed_c(160), mixed_c(160), mixed_c(192)
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                                    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)]], "down")
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")                     # max: a slip of 2015 that every FID keeps
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        if self.pipeline == "adm":
            x = (resize_tf1(images.float(), 299) - 128) / 128
        else:
            x = 2 * F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return features, features @ self.fc.weight.T


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of [n, C, H, W] to size x size: source index i * in / out, no half-pixel shift, clamped at the border."""
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = source.floor().long().clamp(max=n - 1)
        w = (source - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), w)
    return x


NVIDIA_UNITS = {                # NVIDIA's TorchScript names its units after TensorFlow's scopes: theirs -> torchvision's, by kind of block
    "A": "conv branch1x1 tower.conv branch5x5_1 tower.conv_1 branch5x5_2 tower_1.conv branch3x3dbl_1 tower_1.conv_1 branch3x3dbl_2 tower_1.conv_2 branch3x3dbl_3 tower_2.conv branch_pool",
    "B": "conv branch3x3 tower.conv branch3x3dbl_1 tower.conv_1 branch3x3dbl_2 tower.conv_2 branch3x3dbl_3",
    "C": "conv branch1x1 tower.conv branch7x7_1 tower.conv_1 branch7x7_2 tower.conv_2 branch7x7_3 tower_1.conv branch7x7dbl_1 tower_1.conv_1 branch7x7dbl_2 "
         "tower_1.conv_2 branch7x7dbl_3 tower_1.conv_3 branch7x7dbl_4 tower_1.conv_4 branch7x7dbl_5 tower_2.conv branch_pool",
    "D": "tower.conv branch3x3_1 tower.conv_1 branch3x3_2 tower_1.conv branch7x7x3_1 tower_1.conv_1 branch7x7x3_2 tower_1.conv_2 branch7x7x3_3 tower_1.conv_3 branch7x7x3_4",
    "E": "conv branch1x1 tower_conv branch3x3_1 tower_mixed_conv branch3x3_2a tower_mixed_conv_1 branch3x3_2b tower_1_conv branch3x3dbl_1 tower_1_conv_1 branch3x3dbl_2 "
         "tower_1_mixed_conv branch3x3dbl_3a tower_1_mixed_conv_1 branch3x3dbl_3b tower_2_conv branch_pool"}


def nvidia_names():
    """{NVIDIA's key: torchvision's key} of the 378 tensors."""
    units = {f"conv{i}": name for i, name in zip(("", "_1", "_2", "_3", "_4"), ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"))}
    for i, (block, kind) in enumerate(zip(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"), "AAABCCCCDEE")):
        words = NVIDIA_UNITS[kind].split()
        units |= {f"mixed{'_' * bool(i)}{i or ''}.{theirs}": f"Mixed_{block}.{ours}" for theirs, ours in zip(words[::2], words[1::2])}
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    return {f"layers.{a}.{p}": f"{b}.{q}" for a, b in units.items() for p, q in parts.items()} | {"output.weight": "fc.weight", "output.bias": "fc.bias"}


INCEPTION_FILES = "pt_inception-2015-12-05-6726825d.pth (pytorch-fid), weights-inception-2015-12-05-6726825d.pth (torch-fidelity) or NVIDIA's inception-2015-12-05.pt"


def load_inception(path, pipeline="adm"):
    """(Inception in eval mode, hash of its weights) from one of INCEPTION_FILES; nothing is downloaded, no pickled code runs."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected {INCEPTION_FILES}, which you download yourself")
    try:
        state = torch.jit.load(path, map_location="cpu").state_dict()                                # a TorchScript archive: its tensors only
    except RuntimeError:
        state = read_weights(path)
    if "layers.conv.weight" in state:
        names = nvidia_names()
        if set(state) != set(names):
            raise BadInput(f"{path}: NVIDIA's layout, but {len(set(names) ^ set(state))} of its 378 tensors are missing or unknown")
        state = {names[k]: v for k, v in state.items()}
        state |= {k.replace("running_mean", "weight"): torch.ones_like(v) for k, v in state.items() if k.endswith("running_mean")}      # no gamma
    net = Inception(pipeline)
    state |= {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}         # counters, not in every file
    return fill(net, state, path, "Inception network", INCEPTION_FILES)


def fill(net, state, path, what, expected):
    """(net with these weights, frozen and in eval mode, their hash); BadInput says which tensors of the file differ."""
    try:
        refuse_differences(net, state, what)
    except ValueError as error:
        raise BadInput(f"{path}: {error}; expected {expected}") from None
    net.load_state_dict(state)
    return net.requires_grad_(False).eval(), weights_hash(net)


class VGG16(nn.Module):
    """forward(uint8 images [n, 3, H, W]) -> 4096 features [n, 4096] behind the ReLU of classifier.3, at 224 x 224 (TensorFlow's resize).

    The space of StyleGAN3's precision and recall, from torchvision's file.  Not compared with NVIDIA's pickle, which runs code on loading.
    """

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            layers += [nn.MaxPool2d(2)] if c == "M" else [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            c_in = c_in if c == "M" else c
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Identity(), nn.Linear(4096, 4096), nn.ReLU())     # Identity: its dropout

    def forward(self, images):
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        return self.classifier(self.features((resize_tf1(images.float(), 224) - mean) / std).flatten(1))


def load_vgg16(path):
    """(VGG16 in eval mode, hash of its weights) from torchvision's vgg16 state dict; its last layer is left out."""
    state = {k: v for k, v in read_weights(path).items() if not k.startswith("classifier.6.")}
    return fill(VGG16(), state, path, "VGG16", "torchvision's vgg16 weights")
