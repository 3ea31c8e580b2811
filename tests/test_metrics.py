"""The part of the suite (see test_all.py) on numbers out.

Metrics and their golden numbers, the health panel, the classifier, samplers, FID's networks, FID.
"""
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import golden_features, golden_input, golden_ints, golden_state
from PIL import Image

import common
import consistency
import data
import evaluate
import fid
import inception
import metrics
import model
from data import Data, denormalize, load_data, normalize
from metrics import EVAL_SEED, METRICS, Features, frechet_distance, inception_score, moments, precision_recall, spread
from plumbing import watch
from plumbing.checkpoints import load_network, weights_hash
from test_helpers import HERE, golden, rand, refusal, run, small_images, small_net, train

# ---- golden numbers of the metrics -----------------------------------------------------------------------------------

def golden_set(cfg, name):
    made = dict(cfg["sets"][name])
    prefix = cfg["weights"]["prefix"]
    if "ints" in made:
        n, d, low, high = made["ints"]
        return golden_ints(f"input:{name}:i", (n, d), low, high, prefix).float()
    return golden_features(**made, prefix=prefix)


def test_frechet_distance_matches_exact_values():
    z, cfg = golden("metrics")
    for case, sets in cfg["fid"].items():
        real, fake = golden_set(cfg, sets["real"]), golden_set(cfg, sets["fake"])
        found = frechet_distance(*moments(real), *moments(fake))
        assert found == pytest.approx(float(z[f"fid.{case}.exact"]), rel=1e-6, abs=1e-5), case


def test_inception_score_matches_torch_fidelity_and_stylegan3():
    z, cfg = golden("metrics")
    for case, s in cfg["is"].items():
        logits = golden_input(f"input:{s['name']}", (s["n"], s["classes"]), cfg["weights"]["prefix"]) * s["scale"]
        probs = logits.double().softmax(1)
        shuffled = inception_score(probs, s["splits"])
        in_order = inception_score(probs, s["splits"], shuffle=False)
        np.testing.assert_allclose(shuffled, z[f"is.{case}.torch_fidelity_shuffled"], atol=1e-5)
        np.testing.assert_allclose(in_order, z[f"is.{case}.torch_fidelity_in_order"], atol=1e-5)


def test_precision_recall_match_brute_force():
    z, cfg = golden("metrics")
    for case, s in cfg["pr"].items():
        real, fake = golden_set(cfg, s["real"]), golden_set(cfg, s["fake"])
        found = precision_recall(real, fake, s["k"], chunk=137)
        np.testing.assert_allclose(found, z[f"pr.{case}.float64_le"], atol=1e-9, err_msg=case)
    # Each point five times: the third neighbour is the point itself, at a distance of 0 up to rounding.
    points = rand(20, 64, seed=2).repeat(5, 1)
    assert precision_recall(points, points.flip(0), chunk=7) == (1, 1)


# ---- metrics, closed forms -------------------------------------------------------------------------------------------

def test_frechet_distance_closed_forms():
    a = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    b = torch.linspace(2, 0.3, 20, dtype=torch.float64)
    shifted = torch.full((20,), 0.3, dtype=torch.float64)
    expected = 20 * 0.09 + (a.sqrt() - b.sqrt()).square().sum().item()      # diagonal Gaussians, means 0.3 apart
    found = frechet_distance(torch.zeros(20), a.diag(), shifted, b.diag())
    assert found == pytest.approx(expected, rel=1e-8)

    features = rand(300, 20) @ rand(20, 20, seed=1)
    mu, cov = moments(features)
    assert frechet_distance(mu, cov, mu, cov) <= 1e-9 * cov.trace()
    # Of fewer images than dimensions 1 - 7 / 300 of the eigenvalues are rounding: their roots would count.
    few = rand(8, 300) * 100
    mu_few, cov_few = moments(few)
    rounding = 1e-9 * cov_few.trace().item()
    assert frechet_distance(mu_few, cov_few, mu_few + 1, cov_few) == pytest.approx(300, abs=rounding)
    # In parts: as of all rows at once.
    many = rand(250_001, 2)
    torch.testing.assert_close(moments(many)[1], torch.cov(many.T), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(mu, cov, mu[:5], cov[:5, :5])
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mu, cov * float("nan"), mu, cov)
    below = cov - 0.1 * cov.trace() * torch.eye(len(cov))
    for one, other in ((-cov, cov), (cov, -cov), (cov.triu(), cov), (cov, below)):
        with pytest.raises(ValueError, match="not symmetric, or has a negative eigenvalue"):
            frechet_distance(mu, one, mu, other)
    assert frechet_distance(mu, cov, mu, 0 * cov) == pytest.approx(cov.trace().item())


def test_precision_and_recall_are_not_swapped():
    real = rand(400, 8)
    collapsed = real[:1] + 1e-3 * rand(400, 8, seed=1)           # one mode: all good, nothing covered
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall < 0.01
    assert precision_recall(collapsed, real) == (recall, precision)
    assert inception_score(torch.eye(10).double().repeat(20, 1), 1)[0] == pytest.approx(10)
    assert inception_score(torch.full((50, 10), 0.1), 5)[0] == pytest.approx(1)


# ---- the health panel ------------------------------------------------------------------------------------------------

class HealthRun:
    """What `watch.health` needs of a run_folder.Run."""

    def __init__(self, folder):
        self.folder = folder
        self.step = 7
        self.ema = torch.nn.Linear(1, 1)
        self.args = consistency.parse_args(["--loss", "imf"])
        self.data = load_data("digits")
        self.lines = []

    def write(self, line):
        self.lines.append(line)
        written = [json.dumps(dict(step=7) | line) + "\n" for line in self.lines]
        (self.folder / "metrics.jsonl").write_text("".join(written))


@pytest.mark.parametrize("rows", [0, 32])
def test_health_measures_what_it_says(tmp_path, rows):
    def square(x_hat, tau, eps, y):
        return x_hat.pow(2).sum((1, 2, 3))

    def three_squares(x_hat, tau, eps, y):
        assert len(x_hat) == len(tau) == len(eps) == len(y) <= (rows or 100)
        return 3 * x_hat.pow(2).sum((1, 2, 3))

    health_run = HealthRun(tmp_path)
    health_run.args.micro_batch = rows
    watch.health(
        health_run,
        generator=lambda z, y: 0.5 * z[:, 0] + 2,
        v_fake=lambda y: lambda x, t: x + 0.3 * t.view(-1, 1, 1, 1),
        v_teacher=lambda y: lambda x, t: x,
        dm=square,
        gan=three_squares,
    )
    found = health_run.lines[0]
    assert found["x_hat_mean"] == pytest.approx(2, abs=0.02)
    assert found["x_hat_std"] == pytest.approx(0.5, abs=0.02)
    assert found["gan_dm_ratio"] == pytest.approx(3, rel=1e-5)
    gaps = [found[f"gap_{high}"] for high in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert gaps == pytest.approx([0.3 * middle for middle in (0.101, 0.301, 0.501, 0.701, 0.901)], rel=1e-3)
    with Image.open(tmp_path / "health_000007.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("L").getcolors()) > 50


# ---- the classifier of a pixel data set ------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_feature_classifier_generalises_and_is_deterministic(tmp_path):
    digits = load_data("digits")
    even = Data(digits.x[::2], digits.y[::2], 10, digits.mean, digits.std, "even digits")
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    torch.set_num_threads(2)
    first, cached = Features(even, tmp_path / "a"), Features(even, tmp_path / "a")
    again = Features(even, tmp_path / "b")
    assert torch.get_num_threads() == 2                          # it is trained in one, and gives the others back
    torch.set_num_threads(1)
    assert first.hash == cached.hash == again.hash
    # The first of several processes alone makes one: afterwards all must still draw the same initial weights.
    assert torch.equal(torch.get_rng_state(), drawn)

    _, probs = first(digits.x[1::2])                             # images it has not seen
    assert (probs.argmax(1) == digits.y[1::2]).double().mean() > 0.965
    floor = first.floor()
    noise = torch.randn(even.x.shape, generator=torch.Generator().manual_seed(0))
    noisy = first.metrics(even.x + noise, even.y)
    assert noisy["fd"] > 3 * floor["fd"]
    assert floor["acc"] > 0.99
    assert 9 < floor["is"] <= 10
    with pytest.raises(common.BadInput, match="NaN"):
        first.metrics(even.x * float("nan"), even.y)


def test_distances_compare_with_those_in_results(tmp_path):
    """The classifiers of the tables come with the project; without them each machine would have features of its own."""
    digits = load_data("digits")
    features = Features(digits, tmp_path)
    assert features.hash == "e837f4d7" and not list(tmp_path.glob("features-*"))
    assert "weights e837f4d7" in (HERE / "README.md").read_text()
    _, probs = features(digits.x)
    assert (probs.argmax(1) == digits.y).double().mean() > 0.99 - 5e-4


@pytest.mark.slow
def test_the_classifier_of_fashion_mnist_is_found_by_its_images():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        pytest.skip(f"no {folder}")
    data = load_data(str(folder))
    net = metrics.classifier(data)
    assert metrics.load_classifier(net, metrics.OF_RESULTS / f"features-{metrics.digest_of(data)}.pt")
    assert weights_hash(net)[:8] == "eec131df"
    x, y = data.test
    with torch.no_grad():
        right = torch.cat([net(rows).argmax(1) for rows in x.split(500)]) == y
    assert right.double().mean() > 0.918 - 5e-4


def test_the_line_of_real_images_is_that_of_the_readme(tmp_path):
    """In the classifier that comes with the project, so that distances compare with those in results/."""
    floor = Features(load_data("digits"), tmp_path).floor()
    expected = [15.600, 9.990, 0.915, 0.918, 1]
    assert [floor[name] for name in METRICS] == pytest.approx(expected, abs=2e-3)


# ---- samples ---------------------------------------------------------------------------------------------------------

def test_samples_are_compared_with_other_data_pixel_by_pixel(in_home, capsys):
    """--data of another brightness: a network's pixels stay what they are, only what they are compared with changes."""
    toy, (n, steps) = load_data("toy.npz"), (60, 2)
    with np.load("toy.npz") as file:
        np.savez("dark.npz", images=file["images"] // 2, labels=file["labels"])
    dark = load_data("dark.npz")
    net, checkpoint = load_network("imf/model.pt")
    args = checkpoint["args"]
    x, y = evaluate.generate(net, n, toy.x.shape[1:], steps, args["omega"], args["guide_to"], sampler="flow_map")
    pixels = denormalize(x, toy.mean, toy.std)
    expected = Features(dark).metrics(normalize(pixels, dark.mean, dark.std), y)
    evaluate_here(f"imf/model.pt --data dark.npz --steps {steps} --n {n} --out dark")
    found = json.loads(Path("dark/evaluation.json").read_text())
    assert found["fd_2step"] == pytest.approx(expected["fd"], rel=1e-5)
    assert f"EMA weights {weights_hash(net)};" in found["definition"]                   # of which network it is
    picture = np.array(Image.open("dark/samples.png"))
    evaluate_here(f"imf/model.pt --steps {steps} --n {n} --out own")
    assert (np.array(Image.open("own/samples.png"))[-60:] == picture[-60:]).mean() > 0.99          # the last samples


def test_a_single_class_is_said_to_teach_the_classifier_nothing(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4)).astype(np.uint8)
    taught_nothing = ", which a single class has taught nothing); n="
    for labels, words in ((np.zeros(60, int), taught_nothing), (np.arange(60) % 2, "); n=")):
        np.savez(tmp_path / "set.npz", images=images, labels=labels)
        definition = Features(load_data(str(tmp_path / "set.npz")), tmp_path).definition()
        assert re.search(r"\(weights \w{8}" + re.escape(words), definition)


def test_numbers_too_large_for_the_features_are_one_line(in_home):
    features = Features(load_data("toy.npz"))
    x, y = torch.full((8, 1, 4, 4), 1e38), torch.arange(8) % 3
    with pytest.raises(common.BadInput, match="the network has diverged"):
        features.metrics(x, y)


def test_the_lines_for_python_in_methods_run(in_home):
    """Of another run and its data."""
    written = (HERE / "METHODS.md").read_text()
    code = re.search(r"From Python, in the repository's folder:\n```python\n(.*?)```", written, re.S)[1]
    names = {}
    exec(code.replace("runs/fsf_dmd-digits-imf/", "imf/").replace("digits", "toy.npz"), names)
    assert names["images"].dtype == np.uint8 and names["images"].std() > 0
    assert names["y"].tolist() == [i % 3 for i in range(16)]
    assert names["numbers"].keys() == {"fd", "is", "precision", "recall", "acc"}

    # The recipes go on from there; what they train is a run of two steps.
    code = re.search(r"## Recipes\n.*?```python\n(.*?)```", written, re.S)[1]
    flags = "--init imf/model.pt --data toy.npz --steps 2 --health_every 0 --out recipe".split()
    code = code.replace("runs/fsf_dmd-digits-imf/", "imf/").replace('"runs"', '"."')
    exec(code.replace('["--lr", "1e-3"]', str(flags)), names)
    assert names["results"]["imf"]["step"] == names["lines"][-1]["step"] > 1
    assert Path("recipe/model.pt").exists()
    code = re.search(r"Samples as a file.*?```python\n(.*?)```", written, re.S)[1]
    exec(code, names)
    count, read, _ = fid.image_source("samples.npz")
    assert count == 16 and (read(0, 16).permute(0, 2, 3, 1)[..., :1].numpy() == names["images"]).all()


@pytest.mark.parametrize("sampler", ["flow_map", "renoised", "renoised_ddim", "renoised_fixed"])
def test_the_lines_for_model_py_alone_sample_as_evaluate_does(in_home, sampler):
    written = (HERE / "METHODS.md").read_text()
    code = re.search(r"with `model.py` alone:\n```python\n(.*?)```", written, re.S)[1]
    saved = torch.load("imf/model.pt", weights_only=True)
    torch.save(saved | dict(sampler=sampler), f"sampled-{sampler}.pt")
    names = {}
    exec(code.replace("runs/fsf_dmd-digits-imf/model.pt", f"sampled-{sampler}.pt"), names)
    z = names["z"][:, 0] if sampler == "flow_map" else names["z"]
    expected = evaluate.run_sampler(names["net"], sampler, z, names["y"], 2, names["guidance"], None, 1.0)
    torch.testing.assert_close(names["x"], expected, rtol=0, atol=1e-6)
    shown = data.to_images(expected.detach(), saved["data"])
    assert np.array_equal((names["images"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), shown)


def test_a_picture_follows_the_seed_and_the_shift(in_home):
    pictures = []
    for flags in ("", "--seed 5", "--shift 3"):
        evaluate_here(f"grid fm/model.pt --steps 4 --out grid {flags}")
        pictures.append(Path("grid/samples.png").read_bytes())
    assert len(set(pictures)) == 3


def test_samples_do_not_depend_on_the_batch_size():
    net = small_net("in_context", torch.float32)
    seven, y = evaluate.generate(net, 20, (2, 4, 4), 2, omega=2.0, guide_to=0.9, batch=7)
    whole, _ = evaluate.generate(net, 20, (2, 4, 4), 2, omega=2.0, guide_to=0.9, batch=64)
    torch.testing.assert_close(seven, whole, rtol=0, atol=1e-5)
    assert y.tolist() == [i % 3 for i in range(20)]
    other, _ = evaluate.generate(net, 20, (2, 4, 4), 2, omega=1.0, guide_to=0.9)
    assert (other - whole).abs().max() > 1e-4                    # guidance reaches the sampler


def test_velocity_of_a_flow_map_is_sampled_by_euler_steps():
    """--sampler euler: x - dt u(x, t, t), asked as iMF trains it (omega inside its interval, 1 outside).

    With few steps it is another sampler than the flow map.
    """
    net = small_net("in_context", dtype=torch.float32)
    found, y = evaluate.generate(net, 6, (2, 4, 4), 4, omega=3.0, guide_to=0.6, sampler="euler")
    x = common.noise_by_index("samples", EVAL_SEED, range(6), (2, 4, 4))
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            omega = 3.0 if t <= 0.6 else 1.0
            guidance = torch.tensor([[omega, 0.0, 1.0]]).expand(6, 3)
            times = torch.full((6,), t)
            x = x - 0.25 * net(x, times, y, times, guidance)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    flow_map, _ = evaluate.generate(net, 6, (2, 4, 4), 4, omega=3.0, guide_to=0.6)
    assert (found - flow_map).abs().max() > 1e-3
    assert evaluate.sampler_steps(evaluate.default_sampler(net)) == [1, 2, 4]
    assert [evaluate.sampler_steps("renoised", M=M) for M in (1, 2, 3)] == [[1, 2, 4], [1, 2, 4], [1, 2, 3, 4]]
    assert evaluate.sampler_steps("euler", M=3) == [25]
    assert evaluate.sampler_steps("euler", [250]) == [250]


def test_samples_of_a_later_batch_are_other_samples(in_home):
    """evaluate.py makes the images of FID in batches: row i is that of index i."""
    args = evaluate.parse_args("imf/model.pt --data toy.npz --steps 2 --inception none --ref none".split())
    images, _ = evaluate.samples_as_images(args, torch.device("cpu"))
    whole = images(0, 6)
    assert torch.equal(torch.cat([images(0, 3), images(3, 6)]), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 6


def test_the_images_of_fid_follow_the_flags(in_home, few_samples):
    """--seed, --shift, --omega and --cfg_channels reach the sampler of `evaluate.py --inception` too."""
    small_images(Path("two.npz"), 60)
    with np.load("two.npz") as file:
        np.savez("two.npz", images=np.stack([file["images"]] * 3, axis=3), labels=file["labels"])       # 3 channels
    train("consistency.py --loss fm --data two.npz --steps 8 --out two-fm")
    found = []
    for flags in ("", "--seed 5", "--shift 3", "--omega 4", "--omega 4 --cfg_channels 1"):
        words = f"two-fm/model.pt --data two.npz --steps 3 --inception none --ref none {flags}".split()
        images, _ = evaluate.samples_as_images(evaluate.parse_args(words), torch.device("cpu"))
        found.append(images(0, 30).numpy().tobytes())
    assert len(set(found)) == 5


def test_a_reference_holds_features_of_all_classes(tmp_path):
    """A folder is sorted by class: the first 10,000 images are of a few."""
    rows = torch.arange(10_003.0)
    features = torch.stack([rows, rows.sin(), rows.cos(), (0.1 * rows).sin()], dim=1)
    fid.write_reference(tmp_path / "reference.npz", dict(features=features), None, "Inception x (adm)")
    with np.load(tmp_path / "reference.npz") as kept:
        assert len(kept["features"]) == 10_000 and kept["features"][-1, 0] > 10_000 - 2
        torch.testing.assert_close(torch.tensor(kept["sigma"]), torch.cov(features.double().T))


# ---- FID's network ---------------------------------------------------------------------------------------------------

def golden_inception():
    """(expected outputs, the network with its golden weights, uint8 images [n, 3, H, W])"""
    z, cfg = golden("inception")
    with pytest.raises(ValueError, match="expected 'adm' or 'pytorch_fid'"):
        inception.Inception("tf")
    net = inception.Inception()
    keys = {}
    for line in (HERE / "golden" / "inception_keys.txt").read_text().splitlines():
        if "\t" in line:
            name, shape, _ = line.split("\t")
            keys[name] = tuple(int(n) for n in re.findall(r"\d+", shape))
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == keys
    assert len(keys) == 566
    net.load_state_dict(golden_state(keys, net.state_dict(), **cfg["weights"]))

    prefix = cfg["weights"]["prefix"]
    n, _, h, w = cfg["inputs"]["images"]["shape"]
    tiles = golden_ints("input:tiles", (n, 3, h // 16, w // 16), 0, 256, prefix)
    tiles = tiles.repeat_interleave(16, 2).repeat_interleave(16, 3)
    noise = golden_ints("input:noise", (n, 3, h, w), -40, 41, prefix)
    images = (tiles + noise).clamp(0, 255).to(torch.uint8)
    return z, net.eval(), images


def test_inception_matches_torch_fidelity_and_pytorch_fid(tmp_path):
    z, net, images = golden_inception()
    as_published = {k: v for k, v in net.state_dict().items() if "tracked" not in k}     # 472 tensors
    torch.save(as_published, tmp_path / "weights.pth")
    for source, pipeline in (("torch_fidelity", "adm"), ("pytorch_fid", "pytorch_fid")):
        loaded, _ = inception.load_inception(tmp_path / "weights.pth", pipeline)
        with torch.no_grad():
            features, logits = loaded(images)
        expected = torch.tensor(z[f"{source}.2048"])
        assert (features - expected).abs().max() <= 2e-4 * expected.std()
        if source == "torch_fidelity":
            expected = torch.tensor(z["torch_fidelity.logits_unbiased"])
            assert (logits - expected).abs().max() <= 2e-4 * expected.std()


@pytest.mark.slow
def test_inception_weights_in_nvidias_layout(tmp_path):
    """378 tensors without gammas, in a TorchScript archive: the same network."""
    _, net, _ = golden_inception()
    with torch.no_grad():
        for k, v in net.state_dict().items():
            if k.endswith("bn.weight"):
                v.fill_(1)
    names = inception.nvidia_names()
    assert len(names) == 378
    assert len(set(names.values())) == 378
    tree = torch.nn.Module()
    for theirs, ours in names.items():
        *path, last = theirs.split(".")
        at = tree
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_buffer(last, net.state_dict()[ours])
    torch.jit.script(tree).save(tmp_path / "nvidia.pt")
    loaded, digest = inception.load_inception(tmp_path / "nvidia.pt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))

    torch.save(net.state_dict(), tmp_path / "torchvision.pth")
    assert inception.load_inception(tmp_path / "torchvision.pth")[1] == digest           # one network, one hash
    short = {k: v for k, v in net.state_dict().items() if not k.startswith("Mixed_7c")}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(common.BadInput, match="missing Mixed_7c"):
        inception.load_inception(tmp_path / "short.pth")


def test_resize_is_tensorflow_1s():
    image = rand(1, 2, 5, 7).float()
    found = inception.resize_tf1(image, 11)
    for i, j in ((0, 0), (3, 8), (10, 10), (7, 2)):
        y, x = i * 5 / 11, j * 7 / 11                            # no half-pixel shift
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 6)        # clamped at the border
        wy, wx = y - top, x - left
        upper = (1 - wx) * image[0, :, top, left] + wx * image[0, :, top, right]
        lower = (1 - wx) * image[0, :, bottom, left] + wx * image[0, :, bottom, right]
        expected = (1 - wy) * upper + wy * lower
        torch.testing.assert_close(found[0, :, i, j], expected, rtol=1e-5, atol=1e-5)


# ---- FID -------------------------------------------------------------------------------------------------------------

def evaluate_here(command):
    """`python evaluate.py COMMAND` in this process."""
    common.main(evaluate.run, lambda: evaluate.parse_args(command.split()))


def write_inception():
    """inception.pth in this folder."""
    _, net, _ = golden_inception()
    torch.save(net.state_dict(), "inception.pth")


FOLDER = "--from_images folder --inception inception.pth --ref ref/reference.npz"
BAD_FID = [  # arguments of evaluate.py, words of the one line
    (FOLDER, "6 images give no covariance"),
    (f"{FOLDER} --few 1", "003.png: not a readable image"),
    ("--from_images images.npz --inception inception.pth --ref badref.npz --few 1", "expected finite mu [2048]"),
    (f"{FOLDER.replace('folder', 'images.npz')} --few 1 --n 99", "--n 99: images.npz holds"),
    ("--from_images images.npz --inception inception.pth", "needs --ref"),
    ("--from_images images.npz", "need --inception"),
    ("ref --inception inception.pth", "needs --data"),
    ("ref", "need --inception"),
    ("", "expected one of CHECKPOINT"),
    ("a.pt --from_images images.npz", "expected one of CHECKPOINT"),
    ("a.pt --ref b.npz", "need --inception"),
    ("ref --data badref.npz --inception inception.pth", "expected an .npz with arr_0"),
    ("grid missing.pt", "missing.pt: no such file"),
    ("--from_images images.npz --inception nowhere.pth --ref ref/reference.npz --few 1", "which you download yourself"),
]


@pytest.mark.slow
def test_fid_of_images_resumes_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    """`evaluate.py ref` on a folder and `--from_images` on an .npz of the same images.

    Batch size, processes and an interruption change nothing.
    """
    monkeypatch.chdir(tmp_path)
    write_inception()
    array = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3)).astype(np.uint8)
    np.savez("images.npz", arr_0=array)
    Path("folder/class").mkdir(parents=True)
    for i, image in enumerate(array):
        Image.fromarray(image).save(f"folder/class/{i:03d}.png")

    # The reference: of one process or of two, in batches of 2 or of 3.
    nets = "--inception inception.pth --few 1"
    run(
        tmp_path, "evaluate.py ref --data folder --inception inception.pth --few 1 --batch_size 3 --out two",
        processes=2,
    )
    evaluate_here(f"ref --data folder {nets} --batch_size 2 --out ref")
    made = sorted(path.name for path in Path("two/features").glob("*.pt"))
    assert made == ["features_000000.pt", "features_000003.pt"]
    with np.load("ref/reference.npz") as ref, np.load("two/reference.npz") as two:
        sigma, features = ref["sigma"], ref["features"]
        assert np.abs(two["features"] - features).max() < 1e-5 * features.std()
    torch.testing.assert_close(torch.tensor(sigma), torch.cov(torch.tensor(features).double().T))

    # The same images against it.
    command = f"--from_images images.npz {nets} --ref ref/reference.npz --batch_size 5 --out out"
    evaluate_here(command)
    first = Path("out/features/features_000000.pt")
    found = torch.load(first, weights_only=True)["features"]
    torch.testing.assert_close(found, torch.tensor(features[:5]), rtol=0, atol=1e-5 * features.std().item())
    result = json.loads(Path("out/fid.json").read_text())
    printed = capsys.readouterr().out
    assert result["fid"] < 1e-6 * np.trace(sigma)
    assert result["precision_inception"] == result["recall_inception"] == 1
    assert result["label"] == "FID (n = 6)"
    for words in ("FID (n = 6)", "in one)", "(adm)", "reference ref/reference.npz", "torch 2"):
        assert words in printed

    damaged = {name: value.clone() for name, value in torch.load(first, weights_only=True).items()}
    damaged["features"][2, 7] = math.nan
    with pytest.raises(common.BadInput, match="NaN or infinity"):
        fid.inception_metrics(damaged, fid.read_reference("ref/reference.npz"))

    # ADM's layout: statistics of more than its images.
    np.savez("adm.npz", arr_0=array[:4], mu=np.arange(2048.0), sigma=np.eye(2048))
    command = "ref --data adm.npz --inception inception.pth --few 1 --batch_size 2 --out adm"
    evaluate_here(command)
    adm = fid.read_reference("adm/reference.npz")
    assert (adm["mu"] == np.arange(2048)).all()
    assert np.abs(adm["features"] - features[:4]).max() < 1e-5 * features.std()
    capsys.readouterr()
    evaluate_here(f"--from_images images.npz {nets} --ref adm.npz --batch_size 5 --out out")       # as it is
    assert "adm.npz: holds no features, so there is no precision and recall" in capsys.readouterr().out
    assert not any("precision" in name for name in json.loads(Path("out/fid.json").read_text()))

    # Again, as if killed in between.
    first, second = Path("adm/features/features_000000.pt"), Path("adm/features/features_000002.pt")
    written = first.stat().st_mtime_ns
    second.unlink()
    evaluate_here(command)
    assert first.stat().st_mtime_ns == written
    assert second.exists()
    assert (fid.read_reference("adm/reference.npz")["features"] == adm["features"]).all()

    unreadable = Path("folder/class/003.png")
    unreadable.write_bytes(unreadable.read_bytes()[:300])
    np.savez("badref.npz", mu=np.zeros(7), sigma=np.eye(7))
    for command, words in BAD_FID:
        said = refusal(f"evaluate.py {command}", capsys, monkeypatch)
        assert words in said, (command, said)


def test_images_of_two_sizes_are_refused_whatever_the_batch(tmp_path):
    for name, side in (("a", 16), ("b", 16), ("c", 8)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{name}.png")
    count, images, _ = fid.image_source(tmp_path)
    assert count == 3 and images(0, 2).shape == (2, 3, 16, 16)
    with pytest.raises(common.BadInput, match="c.png: is 8 x 8, others 16 x 16"):
        images(2, 3)


@pytest.mark.slow
def test_a_reference_of_another_pipeline_or_network_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inception()
    array = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3)).astype(np.uint8)
    np.savez("images.npz", arr_0=array)
    flags = "--inception inception.pth --few 1"
    evaluate_here(f"ref --data images.npz {flags} --out ref")
    other = "--ref ref/reference.npz --pipeline pytorch_fid --out out"
    said = refusal(f"evaluate.py --from_images images.npz {flags} {other}", capsys, monkeypatch)
    assert "is in the features of Inception" in said and "(adm), but the images would be in those of" in said
    np.savez("adm.npz", arr_0=array, mu=np.arange(2048.0), sigma=np.eye(2048))
    before_any_feature = "--inception nowhere.pth --few 1 --pipeline pytorch_fid --out adm"
    said = refusal(f"evaluate.py ref --data adm.npz {before_any_feature}", capsys, monkeypatch)
    assert "holds mu and sigma of its own, made with --pipeline adm" in said


@pytest.mark.parametrize("conditioning", model.CONDITIONINGS)
def test_what_is_said_of_guidance_is_what_is_sampled(conditioning):
    """omega changes the samples exactly where `is_guided` says so."""
    net = small_net(conditioning, torch.float32)
    for sampler in evaluate.SAMPLERS:
        if (conditioning, sampler) == ("plain", "flow_map"):
            continue
        one, six = (evaluate.generate(net, 4, (2, 4, 4), 2, omega, sampler=sampler)[0] for omega in (1.0, 6.0))
        assert torch.equal(one, six) != evaluate.is_guided(conditioning, sampler), sampler
    assert evaluate.guidance_words("plain", "euler", 6.0, 0.9, 3) == "omega 6.0 on [0, 0.9] in 3 channels"
    assert evaluate.guidance_words("decoupled", "flow_map", 6.0, 0.9, 3) == "no guidance but what the weights hold"


def test_images_behind_links_are_found_once_and_changed_ones_are_noticed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3)).astype(np.uint8)
    folder = tmp_path / "set"
    for name in ("set/plain", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    Image.fromarray(pixels[0]).save(folder / "plain" / "a.bmp")
    Image.fromarray(pixels[1]).save(tmp_path / "elsewhere" / "b.bmp")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "plain" / "up").symlink_to(folder)                 # leads back to itself
    os.rename(tmp_path / "elsewhere" / "b.bmp", os.fsencode(tmp_path / "elsewhere") + b"/caf\xe9.bmp")
    n, images, digest = fid.image_source(folder)
    assert n == 2 and {tuple(image.flatten().tolist()) for image in images(0, 2)} == {
        tuple(torch.from_numpy(p).permute(2, 0, 1).flatten().tolist()) for p in pixels[:2]}
    Image.fromarray(pixels[2]).save(folder / "plain" / "a.bmp")   # as large as before
    assert fid.image_source(folder)[2] != digest


def test_features_with_a_flipped_bit_are_made_again(tmp_path):
    path = tmp_path / "features_000000.pt"
    torch.save(dict(features=torch.ones(4, 2048), logits=torch.ones(4, 1008)), path)
    assert fid.read_part(path, 4) is not None
    content = bytearray(path.read_bytes())
    at = content.find(torch.ones(4).numpy().tobytes()) + 100
    content[at] ^= 64
    path.write_bytes(content)
    assert fid.read_part(path, 4) is None


def test_images_of_any_mode_are_read_as_rgb(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.uint8)
    half_transparent = np.stack([grey, grey // 2, grey, np.full_like(grey, 128)], 2)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(half_transparent).save(tmp_path / "b.png")
    Image.fromarray(grey).quantize(256).save(tmp_path / "c.png")
    n, images, _ = fid.image_source(tmp_path)
    a, b, c = images(0, 3)
    assert n == 3
    assert a.dtype == torch.uint8
    assert all((a[k] == torch.tensor(grey)).all() for k in range(3))
    assert (b[0] == torch.tensor(grey)).all()                    # its colours, not blended
    assert (b[1] == torch.tensor(grey // 2)).all()
    assert (c.float() - a.float()).abs().max() <= 1

    # A reference of a training set is made of what is trained on: on white, and of the class folders alone.
    (tmp_path / "set" / "class").mkdir(parents=True)
    (tmp_path / "b.png").rename(tmp_path / "set" / "class" / "b.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "set")
    n, images, _ = fid.image_source(tmp_path / "set", as_trained=True)
    trained, _, _ = data.read_image_folder(tmp_path / "set")
    assert n == 1 and np.array_equal(images(0, 1), trained)
    assert (images(0, 1)[0, 0].float() - (torch.tensor(grey).float() + 255) / 2).abs().max() <= 1
    shutil.rmtree(tmp_path / "set")

    Image.fromarray(grey[:5]).save(tmp_path / "d.png")
    with pytest.raises(common.BadInput, match="d.png: is 9 x 5, others 9 x 9"):
        fid.image_source(tmp_path)[1](0, 3)


def test_a_part_of_a_folder_sorted_by_class_has_every_class(tmp_path):
    """Precision, recall and `ref --n` take rows spread over the data: the first ones are a few classes only."""
    of_class = torch.arange(10).repeat_interleave(200)
    assert torch.equal(spread(of_class, 50).bincount(), torch.full((10,), 5)) and spread(of_class, 3000) is of_class
    for i in range(12):
        Image.fromarray(np.full((4, 4), 20 * i, np.uint8)).save(tmp_path / f"{i:02}.png")
    n, images, digest = fid.image_source(tmp_path, 5)
    assert n == 5 and digest == fid.image_source(tmp_path)[2]
    assert torch.cat([images(0, 2), images(2, 9)])[:, 0, 0, 0].tolist() == [20 * i for i in (0, 2, 4, 7, 9)]


@pytest.mark.slow
def test_precision_is_of_the_generated_images_and_inception_score_of_ten_splits():
    """One mode: all generated images lie among the real ones, which they do not cover."""
    torch.manual_seed(0)
    real = torch.randn(60, 2048)
    features = real[:1] + 1e-3 * torch.randn(60, 2048)
    logits = torch.randn(60, 1008)
    ref = dict(mu=np.zeros(2048), sigma=np.eye(2048), features=real.numpy())
    found = fid.inception_metrics(dict(features=features, logits=logits), ref)
    assert found["precision_inception"] == 1 and found["recall_inception"] < 0.05
    probs = logits.double().softmax(1)
    assert found["is_1split"] == inception_score(probs, 1)[0]
    assert (found["is"], found["is_std"]) == inception_score(probs, 10) and found["is_std"] > 0
