"""FID's Inception: the network whose features the published metrics are computed in.

Weights are files that the user downloads; nothing is fetched here.  golden/inception.npz holds outputs of the two
public implementations to compare with.  The network needs torch alone; reading the files needs common.py, model.py and
plumbing/.
"""
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import BadInput
from model import refuse_differences
from plumbing.checkpoints import read_weights, refuse_not_finite, weights_hash
from plumbing.files import reading

INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid), weights-inception-2015-12-05-6726825d.pth (torch-fidelity) "
    "or NVIDIA's inception-2015-12-05.pt"
)


# ---- Inception -------------------------------------------------------------------------------------------------------

class Inception(nn.Module):
    """forward(uint8 images [n, 3, H, W]) -> (2048 features [n, 2048], logits without the fc bias [n, 1008]), float32.

    pipeline "adm": TensorFlow's bilinear resize to 299 and (x - 128) / 128, as ADM's evaluator, torch-fidelity and
    NVIDIA's file.
    pipeline "pytorch_fid": torch's bilinear with half-pixel centres and 2 x / 255 - 1, as pytorch-fid and
    LightningDiT's quick FID.

    Source: the network of 2015 as in torch-fidelity and pytorch-fid; names of torchvision's inception_v3.
    """

    def __init__(self, pipeline: str = "adm"):
        super().__init__()
        if pipeline not in ("adm", "pytorch_fid"):
            raise ValueError(f"pipeline {pipeline!r}: expected 'adm' or 'pytorch_fid'")
        self.pipeline = pipeline
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b = mixed_c(768, 128)
        self.Mixed_6c = mixed_c(768, 160)
        self.Mixed_6d = mixed_c(768, 160)
        self.Mixed_6e = mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b = mixed_e(1280, "avg")
        self.Mixed_7c = mixed_e(2048, "max")                     # max: a slip of 2015 that every FID keeps
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pipeline == "adm":
            x = (resize_tf1(images.float(), 299) - 128) / 128
        else:
            x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
            x = 2 * x - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                          # [n, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))                          # [n, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))                     # [n, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))           # [n, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                         # [n, 2048, 8, 8]
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU.  Stride 1 keeps the size unless padding says otherwise."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        if isinstance(kernel, int):
            kernel = (kernel, kernel)
        if padding is None:
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their outputs joined: chains of units, and a pooled branch.

    chains: lists of stages.  A stage is a unit (name, channels, kernel[, stride]), or a list of two parallel ones.
    pool: "avg" (padding not counted, unlike torchvision's network) or "max" before the 1 x 1 unit `branch_pool` with
    c_pool channels; or "down", max with stride 2 and no unit.
    """

    def __init__(self, c_in, chains, pool, c_pool=0):
        super().__init__()
        self.pool = pool
        self.chains = []                                         # of lists of stages, each a list of names
        for chain in chains:
            names = []
            c = c_in
            for stage in chain:
                units = stage if isinstance(stage, list) else [stage]
                for name, c_out, *kernel_and_stride in units:
                    self.add_module(name, ConvBN(c, c_out, *kernel_and_stride))
                names.append([name for name, *_ in units])
                c = c_out                                        # parallel units end a chain
            self.chains.append(names)
        if c_pool:
            self.branch_pool = ConvBN(c_in, c_pool, 1)

    def forward(self, x):
        branches = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            branches.append(h)
        if self.pool == "down":
            branches.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            branches.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            branches.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(branches, dim=1)


def mixed_a(c_in, c_pool):
    return Mixed(c_in, [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ], "avg", c_pool)


def mixed_b(c_in):
    return Mixed(c_in, [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ], "down")


def mixed_c(c_in, c):
    wide, tall = (1, 7), (7, 1)
    return Mixed(c_in, [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, wide), ("branch7x7_3", 192, tall)],
        [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, tall), ("branch7x7dbl_3", c, wide),
         ("branch7x7dbl_4", c, tall), ("branch7x7dbl_5", 192, wide)],
    ], "avg", 192)


def mixed_d(c_in):
    wide, tall = (1, 7), (7, 1)
    return Mixed(c_in, [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, wide), ("branch7x7x3_3", 192, tall),
         ("branch7x7x3_4", 192, 3, 2)],
    ], "down")


def mixed_e(c_in, pool):
    wide, tall = (1, 3), (3, 1)
    return Mixed(c_in, [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, wide), ("branch3x3_2b", 384, tall)]],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
         [("branch3x3dbl_3a", 384, wide), ("branch3x3dbl_3b", 384, tall)]],
    ], pool, 192)


def resize_tf1(x: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of [n, C, H, W] to [n, C, size, size].

    The source index is i * in / out: no half-pixel shift, clamped at the border.
    """
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = source.floor().long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = source - low                                    # [size]
        if dim == 2:
            weight = weight.view(-1, 1)                          # [size, 1]: along the height
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def load_inception(path: str | Path, pipeline: str = "adm") -> tuple[Inception, str]:
    """(Inception in eval mode, hash of its weights) from one of INCEPTION_FILES; BadInput for any other file.

    Nothing is downloaded, no code of the file runs.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected {INCEPTION_FILES}, which you download yourself")
    state = read_torchscript(path) if is_torchscript(path) else read_weights(path)
    if "layers.conv.weight" in state:
        state = from_nvidia(state, path)
    net = Inception(pipeline)
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):                 # counters, not in every file
            state[name] = value
    try:
        refuse_differences(net, state, "Inception network")
    except ValueError as error:
        raise BadInput(f"{path}: {error}; expected {INCEPTION_FILES}") from None
    refuse_not_finite(path, state)
    net.load_state_dict(state)
    return net.requires_grad_(False).eval(), weights_hash(net)


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is an archive of torch.jit.save; torch.save's have no constants."""
    with reading(path, "a whole file of weights", "fetch it again"):
        return zipfile.is_zipfile(path) and archive_folder(path) is not None


def archive_folder(path):
    """The folder of a zip archive that holds TorchScript's constants.pkl, or None."""
    name = "constants.pkl"
    with zipfile.ZipFile(path) as archive:
        return next((member.removesuffix(name) for member in archive.namelist()
                     if member.count("/") == 1 and member.endswith(f"/{name}")), None)


def read_torchscript(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a TorchScript archive, without running it: torch.jit.load would call its __setstate__."""
    with reading(path, "a whole archive of torch.jit.save", "fetch it again"), zipfile.ZipFile(path) as archive:
        root = Tensors(archive, archive_folder(path)).load()
        return dict(tensors_of(root, ""))


class Attributes:
    """Any object of the archive: what was saved of it, and nothing that runs."""

    def __setstate__(self, state):
        self.state = state


class Tensors(pickle.Unpickler):
    """data.pkl of a TorchScript archive: tensors, plain values, and `Attributes` for the objects of its own classes.

    Every other name in the pickle is refused.
    """

    # Of attributes with a type, such as List[int]: the value comes first.
    WRAPPERS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
              "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
              "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
              "BoolStorage": torch.bool}

    def __init__(self, archive, folder):
        super().__init__(archive.open(f"{folder}data.pkl"))
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Attributes
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if module == "torch.jit._pickle" and name in self.WRAPPERS:
            return first_of
        allowed = {("torch._utils", "_rebuild_tensor_v2"): view_of_storage, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) not in allowed:
            raise ValueError(f"it names {module}.{name}, which is not a tensor")
        return allowed[module, name]

    def persistent_load(self, pid):
        """("storage", type, number of the file, device, count) -> 1-D tensor."""
        _, dtype, number, _, count = pid
        if number not in self.storages:
            member = self.archive.getinfo(f"{self.folder}data/{number}")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != count * dtype.itemsize:
                raise ValueError(f"data/{number} has {member.file_size} bytes, expected {count} values of {dtype}")
            content = bytearray(self.archive.read(member))
            self.storages[number] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return self.storages[number]


def first_of(value, *rest):
    return value


def view_of_storage(storage, offset, size, stride, *rest):
    """The tensor in a storage; as_strided refuses what lies outside of it."""
    return storage.as_strided(size, stride, offset)


def tensors_of(value, name):
    """(name, tensor) of the tensors in nested `Attributes`, named as in a state dict."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, Attributes) and isinstance(getattr(value, "state", None), dict):
        for key, inner in value.state.items():
            yield from tensors_of(inner, f"{name}.{key}" if name else key)


def from_nvidia(state: dict, path: str | Path) -> dict:
    """NVIDIA's 378 tensors under torchvision's names, and the gammas of 1 that they leave out."""
    names = nvidia_names()
    missing = set(names) - set(state)
    if missing:
        raise BadInput(f"{path}: NVIDIA's layout, but {len(missing)} of its 378 tensors are missing; fetch it again")
    renamed = {names[k]: state[k] for k in names}                # an archive may hold more than its weights
    gammas = {k.replace("running_mean", "weight"): torch.ones_like(v)
              for k, v in renamed.items() if k.endswith("running_mean")}
    return renamed | gammas


# NVIDIA's TorchScript names its units after TensorFlow's scopes: theirs -> torchvision's, by kind of block
NVIDIA_UNITS = {
    "A": {
        "conv": "branch1x1",
        "tower.conv": "branch5x5_1",
        "tower.conv_1": "branch5x5_2",
        "tower_1.conv": "branch3x3dbl_1",
        "tower_1.conv_1": "branch3x3dbl_2",
        "tower_1.conv_2": "branch3x3dbl_3",
        "tower_2.conv": "branch_pool",
    },
    "B": {
        "conv": "branch3x3",
        "tower.conv": "branch3x3dbl_1",
        "tower.conv_1": "branch3x3dbl_2",
        "tower.conv_2": "branch3x3dbl_3",
    },
    "C": {
        "conv": "branch1x1",
        "tower.conv": "branch7x7_1",
        "tower.conv_1": "branch7x7_2",
        "tower.conv_2": "branch7x7_3",
        "tower_1.conv": "branch7x7dbl_1",
        "tower_1.conv_1": "branch7x7dbl_2",
        "tower_1.conv_2": "branch7x7dbl_3",
        "tower_1.conv_3": "branch7x7dbl_4",
        "tower_1.conv_4": "branch7x7dbl_5",
        "tower_2.conv": "branch_pool",
    },
    "D": {
        "tower.conv": "branch3x3_1",
        "tower.conv_1": "branch3x3_2",
        "tower_1.conv": "branch7x7x3_1",
        "tower_1.conv_1": "branch7x7x3_2",
        "tower_1.conv_2": "branch7x7x3_3",
        "tower_1.conv_3": "branch7x7x3_4",
    },
    "E": {
        "conv": "branch1x1",
        "tower_conv": "branch3x3_1",
        "tower_mixed_conv": "branch3x3_2a",
        "tower_mixed_conv_1": "branch3x3_2b",
        "tower_1_conv": "branch3x3dbl_1",
        "tower_1_conv_1": "branch3x3dbl_2",
        "tower_1_mixed_conv": "branch3x3dbl_3a",
        "tower_1_mixed_conv_1": "branch3x3dbl_3b",
        "tower_2_conv": "branch_pool",
    },
}
NVIDIA_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
NVIDIA_PARTS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
MIXED_BLOCKS = {                                                       # the mixed blocks in order, and their kinds
    "5b": "A", "5c": "A", "5d": "A",
    "6a": "B", "6b": "C", "6c": "C", "6d": "C", "6e": "C",
    "7a": "D", "7b": "E", "7c": "E",
}


def nvidia_names() -> dict[str, str]:
    """{NVIDIA's key: torchvision's key} of the 378 tensors."""
    units = dict(NVIDIA_STEM)
    for i, (block, kind) in enumerate(MIXED_BLOCKS.items()):
        mixed = "mixed" if i == 0 else f"mixed_{i}"
        for theirs, ours in NVIDIA_UNITS[kind].items():
            units[f"{mixed}.{theirs}"] = f"Mixed_{block}.{ours}"
    names = {}
    for theirs, ours in units.items():
        for part, our_part in NVIDIA_PARTS.items():
            names[f"layers.{theirs}.{part}"] = f"{ours}.{our_part}"
    names["output.weight"] = "fc.weight"
    names["output.bias"] = "fc.bias"
    return names
