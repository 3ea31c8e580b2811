"""Samples of several networks from the same noise in one picture: one column a class, the first band real images.

    python benchmarks/picture.py "start=a/model.pt" "CD=b/model.pt" --steps 1 2 --out picture.png

Every network is sampled as it was trained for (a velocity network by Euler's method), at each number of --steps.
Beside its bands stand the forward passes of its training, without those of its start.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from common import BadInput, main  # noqa: E402
from data import preview  # noqa: E402
from evaluate import data_of, generate, real_images, restated, sampling  # noqa: E402
from plumbing.checkpoints import load_network  # noqa: E402
from plumbing.flags import Parser, number  # noqa: E402
from plumbing.passes import passes_until  # noqa: E402
from plumbing.run_folder import check_writable  # noqa: E402


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("networks", nargs="+", help="NAME=MODEL, each a model.pt, of one data set")
    p.add_argument("--steps", type=number(int, 1), nargs="+", default=[1, 2], help="numbers of sampling steps")
    p.add_argument("--out", type=Path, default=Path("picture.png"))
    return p.parse_args(argv)


def run(args):
    if args.out.suffix != ".png" or args.out.is_dir():
        raise BadInput(f"--out {args.out}: expected the name of a .png")
    check_writable(args.out.parent)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found, data = [], None
    for text in args.networks:
        name, _, path = text.rpartition("=")
        if not name or not path:
            raise BadInput(f"{text}: expected NAME=MODEL")
        net, checkpoint = load_network(path, data)
        if checkpoint["data"] is None:
            raise BadInput(f"{path}: holds official weights, which know no data set")
        data = data or data_of(path, checkpoint, "run it where the network was trained")
        found.append((name, net, checkpoint))
    classes = min(data.num_classes, 10)
    bands = [("real images", real_images(data, classes))]
    for name, net, checkpoint in found:
        flags = argparse.Namespace(omega=None, guide_to=None, cfg_channels=None, sampler=None, what=name)
        omega, guide_to, channels, sampler = sampling(flags, checkpoint)
        restate = restated(checkpoint, data)                                # to the first network's scale
        flags, cost = checkpoint["args"], ""
        if "script" in flags:                                               # not in the files of earlier versions
            passes = passes_until(f"{flags['script']}.py", flags, checkpoint["step"])
            cost = f", trained for {passes:,.0f} passes"
        for N in args.steps:
            x, _ = generate(net, classes, data.x.shape[1:], N, omega, guide_to, channels, classes=classes,
                            sampler=sampler)
            bands.append((f"{name}: {N} step{'s' if N > 1 else ''}{cost}", restate(x)))
    preview(args.out, bands, data.meta)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(run, parse_args)
