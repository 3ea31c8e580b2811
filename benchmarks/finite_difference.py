"""How exact must the finite difference of du/dt be?  Its error, and what the error does to training.

    python benchmarks/finite_difference.py                 # digits: 5 ways x 3 methods x 5 seeds, an hour on one core

The bf16 presets take the difference [u(x + h a, t + h, s) - u(x - h a, t - h, s)] / 2h, a the tangent, in TF32 on a
GPU: float32 numbers, of which the tensor cores read 10 bits of mantissa.  Here TF32 is emulated, on a CPU: what enters
a matrix product, a convolution or attention is rounded to 10 bits; sums are in float32.  (On an H200 the same network
has nearly the same error: results/gpu.md.)

Error: |difference - torch.func.jvp| / |torch.func.jvp| over the step h, of a new network of the paper's size and of the
digits' trained iMF.  Training: an iMF; and CD with masking and FSF-DMD, both from the iMF that was trained in float32;
with the presets of the digits, du/dt taken in one of these ways, and all else in float32.  Shown are distances, and
their paired differences to training with the exact derivative.
Runs are kept, and go on when stopped; those of other code are refused.  Leaves README.md, runs.json and error.png in
--out.
"""
import contextlib
import math
import shlex
import sys
from pathlib import Path
from unittest import mock

import matplotlib.figure
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import consistency  # noqa: E402
import fsf_dmd  # noqa: E402
from common import BadInput, main  # noqa: E402
from cost import draw_zeros  # noqa: E402
from data import load_data  # noqa: E402
from model import LightningDiT, fixed_guidance, interpolate, total_derivative  # noqa: E402
from plumbing.checkpoints import load_network  # noqa: E402
from plumbing.files import json_text, read_json, sources, write_atomic  # noqa: E402
from plumbing.flags import Parser, folder_path, number, result_folder  # noqa: E402
from plumbing.kept_runs import refuse_torchrun  # noqa: E402
from plumbing.report import markdown_lines, spread  # noqa: E402

STEPS = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)                      # h
METHODS = {
    "iMF": (consistency, "--loss imf"),
    "CD with masking": (consistency, "--loss cd --init {start}"),
    "FSF-DMD, M = 2": (fsf_dmd, "--init {start}"),
}


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def to_tf32(x):
    """float32 rounded to 10 bits of mantissa, to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tf32():
    """Everything that a tensor core would read is rounded first."""
    linear, conv2d = F.linear, F.conv2d

    def rounded_linear(x, weight, bias=None):
        return linear(to_tf32(x), to_tf32(weight), bias)

    def rounded_conv2d(x, weight, *others):
        return conv2d(to_tf32(x), to_tf32(weight), *others)

    def rounded_attention(q, k, v):
        scores = to_tf32(q) @ to_tf32(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        return to_tf32(scores.softmax(-1)) @ to_tf32(v)

    with mock.patch.multiple(F, linear=rounded_linear, conv2d=rounded_conv2d,
                             scaled_dot_product_attention=rounded_attention):
        yield


def in_float32(u, x, t, s, tangent, h):
    return total_derivative(u, x, t, s, tangent, h)


def in_tf32(u, x, t, s, tangent, h):
    with tf32():
        return total_derivative(u, x, t, s, tangent, h)


@torch.no_grad()
def in_bf16(u, x, t, s, tangent, h):
    """As autocast would take it; total_derivative switches autocast off."""
    with torch.autocast("cpu", torch.bfloat16):
        return (u(x + h * tangent, t + h, s) - u(x - h * tangent, t - h, s)).float() / (2 * h)


def exactly(u, x, t, s, tangent, h):
    return total_derivative(u, x, t, s, tangent, exact=True)


WAYS = {
    "exact": (exactly, 0.0),
    "float32, h = 0.005": (in_float32, 0.005),
    "TF32, h = 0.005": (in_tf32, 0.005),
    "TF32, h = 0.02": (in_tf32, 0.02),
    "bf16, h = 0.005": (in_bf16, 0.005),
}
DEFAULT = "float32, h = 0.005"


# ---- the error -------------------------------------------------------------------------------------------------------

def errors(net, x, t, s, y, omega, tangent):
    """[{h, float32, TF32, bf16}]: relative errors of the difference."""
    guidance = fixed_guidance(omega, 0.0, 1.0, x)

    def u(x, t, s):
        return net(x, t, y, s, guidance)

    exact = exactly(u, x, t, s, tangent, None)
    rows = []
    for h in STEPS:
        row = dict(h=h)
        for name, way in (("float32", in_float32), ("TF32", in_tf32), ("bf16", in_bf16)):
            row[name] = ((way(u, x, t, s, tangent, h) - exact).norm() / exact.norm()).item()
        rows.append(row)
    return rows


def of_new_network():
    """B/1 with every parameter that starts at zero drawn, and random inputs: as benchmarks/gpu.py."""
    torch.manual_seed(0)
    net = LightningDiT("B/1", "in_context", input_size=16, in_channels=32)
    draw_zeros(net)
    x, tangent = torch.randn(2, 32, 16, 16), torch.randn(2, 32, 16, 16)
    t = torch.rand(2)
    return errors(net, x, t, t / 2, torch.arange(2), 2.0, tangent)


def of_digits(path):
    """The iMF at `path`, on 256 digits noised to t, along its own velocity."""
    net, data = load_network(path)[0], load_data("digits")
    torch.manual_seed(0)
    x0, y = data.x[:256], data.y[:256]
    t = torch.rand(256)
    x = interpolate(x0, torch.randn_like(x0), t)
    with torch.no_grad():
        v = net(x, t, y)
    return errors(net, x, t, t * torch.rand(256), y, 1.0, v)


# ---- training --------------------------------------------------------------------------------------------------------

def folder_of(args, method, way, seed):
    name = f"{method} {way} seed {seed}"
    return args.runs / name.replace(",", "").replace("=", "").replace(" ", "-")


def trained(args, method, way, seed, start=None):
    """The last evaluation of a method with du/dt taken in this way, trained now if it was not yet."""
    script, flags = METHODS[method]
    taken, h = WAYS[way]
    folder = folder_of(args, method, way, seed)

    def derivative(u, x, t, s, tangent, *options):
        return taken(u, x, t, s, tangent, h)

    words = [word.format(start=start) for word in flags.split()]
    if not (folder / "result.json").exists():
        with mock.patch.object(consistency, "total_derivative", derivative):
            script.train(script.parse_args([*words, "--seed", str(seed), "--out", str(folder)]))
    return read_json(folder / "result.json", "the result of a run")["last"]


def run(args):
    refuse_torchrun()
    refuse_other_code(args.runs)
    torch.set_num_threads(1)
    lasts, starts = {}, {}
    for seed in range(args.seeds):
        trained(args, "iMF", DEFAULT, seed)
        starts[seed] = folder_of(args, "iMF", DEFAULT, seed) / "model.pt"
        for method in METHODS:
            for way in WAYS:
                lasts[method, way, seed] = trained(args, method, way, seed, starts[seed])
    rows = []
    for method in METHODS:
        for way in WAYS:
            row = dict(method=method, way=way)
            for name in ("fd_1step", "fd_2step"):
                row[name] = [lasts[method, way, seed][name] for seed in range(args.seeds)]
            rows.append(row)
    error = {"new network, B/1": of_new_network(), "trained iMF, digits": of_digits(starts[0])}
    write(args, dict(torch=torch.__version__, seeds=args.seeds, training=rows, error=error))


def refuse_other_code(folder):
    """BadInput if runs are kept in the folder that other code has made."""
    path, ours = folder / "sources.json", sources("benchmarks/finite_difference.py")
    if folder.is_dir() and any(folder.iterdir()):
        if not path.exists() or read_json(path, "the sources of kept runs") != ours:
            raise BadInput(f"{folder}: its runs were made by other code; delete it, or pass another --runs")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json_text(ours))


def write(args, stored):
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "runs.json", json_text(stored, indent=1) + "\n")
    write_atomic(args.out / "error.png", lambda path: figure(stored).savefig(path, format="png", dpi=100))
    command = shlex.join(["python", "benchmarks/finite_difference.py", *sys.argv[1:]])
    write_atomic(args.out / "README.md", f"""# How exact must the finite difference be?

Made by `{command}`, torch {stored["torch"]}, {stored["seeds"]} seeds, digits; TF32 is emulated on a CPU.
[runs.json](runs.json) holds the numbers of every seed.

{page(stored)}
""")
    print(f"{page(stored)}\n\nwrote README.md, runs.json and error.png into {args.out}")


def page(stored):
    """The tables as markdown."""
    body = []
    exact = {row["method"]: row for row in stored["training"] if row["way"] == "exact"}
    for row in stored["training"]:
        cells = [row["method"], row["way"]]
        for name in ("fd_1step", "fd_2step"):
            cells += [spread(row[name], 1), against(row[name], exact[row["method"]][name])]
        body.append(cells)
    training = markdown_lines(["method", "du/dt", "distance, 1 step", "against exact", "distance, 2 steps",
                               "against exact"], body)
    body = []
    for name, rows in stored["error"].items():
        for row in rows:
            body.append([name, f"{row['h']:g}"] + [f"{row[way]:.4f}" for way in ("float32", "TF32", "bf16")])
    error = markdown_lines(["relative error of the difference", "h", "float32", "TF32", "bf16"], body)
    return "\n".join([*training, "", *error, "", "![Error of the finite difference over its step](error.png)"])


def against(values, exact):
    """The paired difference, with the p of its t-test alone."""
    differences = [a - b for a, b in zip(values, exact)]
    if not any(differences):
        return "-"
    text = f"{sum(differences) / len(differences):+.2f}"
    if len(differences) > 1:
        deviation = torch.tensor(differences, dtype=torch.float64).std().item()
        text += f" ± {deviation:.2f} (p {ttest_1samp(differences, 0).pvalue:.2g})"
    return text


def figure(stored):
    drawing = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (name, rows) in zip(drawing.subplots(1, 2, sharey=True), stored["error"].items()):
        for way in ("float32", "TF32", "bf16"):
            axis.loglog([row["h"] for row in rows], [row[way] for row in rows], ".-", label=way)
        axis.axvline(0.005, color="gray", linewidth=0.7)                        # --fd_h
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step h of the difference (grey: the default)")
    axis.legend(fontsize=8)
    drawing.supylabel("relative error of du/dt", fontsize=9)
    return drawing


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--seeds", type=number(int, 1), default=5, help="seeds 0, 1, ...")
    p.add_argument("--runs", type=folder_path, default="runs/finite_difference", help="folder of the kept runs")
    p.add_argument("--out", type=result_folder, default="runs/finite_difference_results",
                   help="folder of the results")
    return p.parse_args(argv)


if __name__ == "__main__":
    main(run, parse_args)
