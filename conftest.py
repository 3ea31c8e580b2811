"""Fixtures that several test files share; their functions are in tests/test_helpers.py."""
import contextlib
import os

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # also of this process: see test_helpers.environment

import evaluate
import model
from plumbing import checkpoints
from test_helpers import randomize, small_images, train  # puts golden/ on the path, for every test file

FEW_SAMPLES = ((1,), 60, 0)                     # steps, n, seed of `evaluate`


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A working folder: a small image set of 3 classes, an iMF and a velocity network trained on it for 8 steps."""
    folder = tmp_path_factory.mktemp("home")
    small_images(folder / "toy.npz", 90)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.evaluate, "__defaults__", FEW_SAMPLES)
        for loss in ("imf", "fm"):              # the first trains the classifier of the metrics, too
            train(f"consistency.py --loss {loss} --data toy.npz --steps 8 --out {loss}")
    return folder


@pytest.fixture
def in_home(home):
    """`home`, as the working folder of this process."""
    with contextlib.chdir(home):
        yield home


@pytest.fixture
def few_samples(monkeypatch):
    """Evaluations while training take 60 one-step samples: these tests do not ask the metrics."""
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", FEW_SAMPLES)


@pytest.fixture
def random_starts(in_home, few_samples):
    """Random weights: a.pt an iMF, b.pt another one, the teacher, v.pt a velocity network."""
    for name, source, gain in (("a", "imf", 1.0), ("b", "imf", 0.8), ("v", "fm", 1.0)):
        found = checkpoints.load_checkpoint(f"{source}/model.pt")
        net = randomize(model.build(found["config"]), gain, torch.float32)
        torch.save(found | dict(weights=net.state_dict()), f"{name}.pt")
