"""What the tests share: golden files, small networks, Gaussian data in closed form, commands in a subprocess.

Fixtures are in conftest.py.
"""
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import model

HERE = Path(__file__).parent.parent                     # the project
sys.path.insert(0, str(HERE / "golden"))
from golden_weights import golden_state  # noqa: E402

torch.set_num_threads(1)                                # the two workers of pytest -n 2 have a core each
METHODS = ("consistency.py", "dmd2.py", "fsf_dmd.py", "sid.py", "twinflow.py")


# ---- networks and random numbers -------------------------------------------------------------------------------------

def golden(name):
    """(arrays, configuration) of golden/NAME.npz."""
    z = np.load(HERE / "golden" / f"{name}.npz", allow_pickle=False)
    return z, json.loads(str(z["config"]))


def randomize(net, gain=1.0, dtype=torch.float64):
    """A network away from its zero initialisation: every tensor a fixed function of its name."""
    current = net.state_dict()
    shapes = {k: tuple(v.shape) for k, v in current.items()}
    net.load_state_dict(golden_state(shapes, current, keep=("pos_embed", "feat_rope."), gain=gain))
    return net.to(dtype)


def small_net(conditioning, dtype=torch.float64, **dims):
    usual = dict(input_size=4, in_channels=2, num_classes=3, depth=3, hidden_size=32, num_heads=2, patch_size=2,
                 n_tokens=2, token_block=1)
    return randomize(model.LightningDiT("tiny", conditioning, **usual | dims), dtype=dtype)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- data N(0, sigma^2), for which everything has a closed form ------------------------------------------------------

def spread(t, sigma):
    """Variance of x_t."""
    return (1 - t) ** 2 * sigma ** 2 + t ** 2


def gaussian_v(x, t, sigma):
    """v(x, t) = E[eps - x0 | x_t]."""
    t = model.expand(t, x)
    return (t - (1 - t) * sigma ** 2) / spread(t, sigma) * x


def gaussian_u(x, t, s, sigma):
    """Exact average velocity: the flow keeps x / sqrt(spread) constant.  At s = t it is v."""
    t_, s_ = model.expand(t, x), model.expand(s, x)
    f = x * (spread(s_, sigma) / spread(t_, sigma)) ** 0.5
    same = (t_ == s_)
    length = torch.where(same, torch.ones_like(x), (t_ - s_).expand_as(x))
    return torch.where(same, gaussian_v(x, t, sigma), (x - f) / length)


# ---- commands and run folders ----------------------------------------------------------------------------------------

def small_images(path, n):
    """n images of 4 x 4 pixels in 3 classes: three greys with noise."""
    y = np.arange(n) % 3
    noise = np.random.default_rng(0).normal(0, 40, (n, 4, 4))
    images = np.clip(np.array([40, 120, 200])[y][:, None, None] + noise, 0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=y)


def environment(threads=1):
    """The environment of a subprocess: not that of a torchrun around the tests, so many threads, and no GPU.

    What the tests say of bits and last digits holds on CPUs; benchmarks/gpu.py looks at a GPU.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | dict(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES="")


def run(folder, command, code=0, processes=1, threads=1):
    """A command as a user types it, in `folder`.  -> its output, after checking the exit code"""
    script, *flags = shlex.split(command)
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = start(folder, [*python, str(HERE / script), *flags], threads)
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, f"{command}: exit {process.returncode}\n{out}\n{err}"
    return out + err


def start(folder, words, threads=1):
    """The process of a command, its output in pipes."""
    return subprocess.Popen(words, cwd=folder, env=environment(threads), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def train(command):
    """A training command in this process, through the script's own parse_args and train."""
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    module.train(module.parse_args(argv))


def refusal(command, capsys, monkeypatch):
    """The one line that a refused command prints, run in process through its own parse_args; exit code 2."""
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        common.main(getattr(module, "train" if script in METHODS else "run"), module.parse_args)
    progress_bar = "%|"
    said = [line for line in capsys.readouterr().err.splitlines() if line and progress_bar not in line]
    assert stop.value.code == 2, (command, said)
    assert len(said) == 1 and said[0].startswith(f"{script}: error: "), (command, said)       # no traceback
    return said[0]


def state(folder, out):
    return torch.load(folder / out / "state.pt", weights_only=True)


def read_metrics(folder, out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def tensors(tree, prefix=""):
    """(name, tensor) of every tensor in nested dictionaries and lists."""
    if torch.is_tensor(tree):
        yield prefix, tree
    children = []
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    for k, v in children:
        yield from tensors(v, f"{prefix}{k}.")


def assert_same(a, b, atol=0.0):
    a, b = dict(tensors(a)), dict(tensors(b))
    assert a.keys() == b.keys() and len(a) > 50
    for k in a:
        same = torch.equal(a[k], b[k]) if atol == 0 else (a[k] - b[k]).abs().max() <= atol
        assert same, f"{k}: {(a[k].float() - b[k].float()).abs().max()}"


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (os.system, ("touch executed",))
