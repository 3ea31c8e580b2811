"""The second half of the suite (see test_all.py): data in, numbers out.

The autoencoder, latent shards, official weights, metrics, FID's network, the health panel.
"""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import consistency
import evaluate
import fsf_dmd
import inception
import model
import vae
from test_all import HERE, Evil, golden, rand, randomize, refusal, run, small_net, state      # and golden/ on the path
from golden_weights import golden_features, golden_input, golden_ints, golden_state  # noqa: I001


# ---- golden numbers of the metrics ---------------------------------------------------------------------------------------------

def golden_set(cfg, name):
    s, prefix = dict(cfg["sets"][name]), cfg["weights"]["prefix"]
    if "ints" in s:
        n, d, low, high = s["ints"]
        return golden_ints(f"input:{name}:i", (n, d), low, high, prefix).float()
    return golden_features(**s, prefix=prefix)


def test_frechet_distance_matches_exact_values():
    z, cfg = golden("metrics")
    for case, sets in cfg["fid"].items():
        value = evaluate.frechet_distance(*evaluate.moments(golden_set(cfg, sets["real"])), *evaluate.moments(golden_set(cfg, sets["fake"])))
        assert value == pytest.approx(float(z[f"fid.{case}.exact"]), rel=1e-6, abs=1e-5), case


def test_inception_score_matches_torch_fidelity_and_stylegan3():
    z, cfg = golden("metrics")
    for case, s in cfg["is"].items():
        probs = (golden_input(f"input:{s['name']}", (s["n"], s["classes"]), cfg["weights"]["prefix"]) * s["scale"]).double().softmax(1)
        np.testing.assert_allclose(evaluate.inception_score(probs, s["splits"]), z[f"is.{case}.torch_fidelity_shuffled"], atol=1e-5)
        np.testing.assert_allclose(evaluate.inception_score(probs, s["splits"], shuffle=False), z[f"is.{case}.torch_fidelity_in_order"], atol=1e-5)


def test_precision_recall_match_brute_force():
    z, cfg = golden("metrics")
    for case, s in cfg["pr"].items():
        real, fake = golden_set(cfg, s["real"]), golden_set(cfg, s["fake"])
        found = evaluate.precision_recall(real, fake, s["k"], chunk=137)
        np.testing.assert_allclose(found, z[f"pr.{case}.float64_le"], atol=1e-9, err_msg=case)


# ---- metrics, closed forms ----------------------------------------------------------------------------------------------------

def test_frechet_distance_closed_forms():
    a, b = torch.linspace(0.5, 2, 20, dtype=torch.float64), torch.linspace(2, 0.3, 20, dtype=torch.float64)
    expected = 20 * 0.09 + (a.sqrt() - b.sqrt()).square().sum().item()                      # diagonal Gaussians, means 0.3 apart
    assert evaluate.frechet_distance(torch.zeros(20), a.diag(), torch.full((20,), 0.3, dtype=torch.float64), b.diag()) == pytest.approx(expected, rel=1e-8)
    features = rand(300, 20) @ rand(20, 20, seed=1)
    mu, cov = evaluate.moments(features)
    assert evaluate.frechet_distance(mu, cov, mu, cov) <= 1e-9 * cov.trace()
    with pytest.raises(ValueError, match="shapes"):
        evaluate.frechet_distance(mu, cov, mu[:5], cov[:5, :5])
    with pytest.raises(ValueError, match="NaN"):
        evaluate.frechet_distance(mu, cov * float("nan"), mu, cov)


def test_precision_and_recall_are_not_swapped():
    real = rand(400, 8)
    collapsed = real[:1] + 1e-3 * rand(400, 8, seed=1)                                      # one mode: all good, nothing covered
    precision, recall = evaluate.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.01
    assert evaluate.precision_recall(collapsed, real) == (recall, precision)
    assert evaluate.inception_score(torch.eye(10).double().repeat(20, 1), 1)[0] == pytest.approx(10)
    assert evaluate.inception_score(torch.full((50, 10), 0.1), 5)[0] == pytest.approx(1)


# ---- the health panel ---------------------------------------------------------------------------------------------------------

def test_health_measures_what_it_says(tmp_path):
    data = vae.load_data("digits")

    class Folder:                                                                           # what health needs of a Run
        folder, step, model, args = tmp_path, 7, torch.nn.Linear(1, 1), consistency.parse_args(["--loss", "imf"])
        lines = []

        def write(self, line):
            self.lines.append(line)
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(dict(step=7) | line) + "\n" for line in self.lines))
    run_ = Folder()
    run_.data = data
    evaluate.health(run_, lambda z, y: 0.5 * z[:, 0] + 2, lambda x, t, y: x + 0.3 * t.view(-1, 1, 1, 1), lambda x, t, y: x,
                    lambda x, t, eps, y: x.pow(2).sum((1, 2, 3)), lambda x, t, eps, y: 3 * x.pow(2).sum((1, 2, 3)), M=2)
    found = run_.lines[0]
    assert found["x_hat_mean"] == pytest.approx(2, abs=0.02) and found["x_hat_std"] == pytest.approx(0.5, abs=0.02) and found["gan_dm_ratio"] == pytest.approx(3, rel=1e-5)
    assert [found[f"gap_{high}"] for high in (0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0.3 * m for m in (0.101, 0.301, 0.501, 0.701, 0.901)], rel=1e-3)
    with Image.open(tmp_path / "health_000007.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("L").getcolors()) > 50


# ---- data, randomness, pictures -----------------------------------------------------------------------------------------------

def test_digits_are_normalised_and_come_back():
    data = vae.load_data("digits")
    assert data.x.shape == (1797, 1, 8, 8) and data.num_classes == 10 and torch.bincount(data.y).min() == 174
    assert data.x.mean().abs() < 1e-5 and abs(data.x.std() - 1) < 1e-5
    raw = vae.denormalize(data.x.double(), data.mean, data.std) * 16
    assert (raw - raw.round()).abs().max() < 1e-5 and raw.max().round() == 16               # the 17 grey levels again
    torch.testing.assert_close(vae.normalize(raw / 16, data.mean, data.std), data.x.double(), rtol=0, atol=1e-6)
    assert np.abs(vae.to_uint8(data.x, data.mean, data.std)[..., 0] - raw[:, 0].numpy() / 16 * 255).max() <= 0.501   # rounded to nearest


def test_batches_are_epochs_and_depend_on_nothing_but_seed_and_step():
    rows = torch.cat([common.batch_rows(50, 16, 3, step) for step in range(25)])            # 400 rows = 8 epochs
    for epoch in rows.split(50):
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(rows[:50], rows[50:100])
    assert torch.equal(common.batch_rows(50, 16, 3, 7), rows[7 * 16:8 * 16]) and not torch.equal(common.batch_rows(50, 16, 4, 7), rows[7 * 16:8 * 16])
    noise = common.noise_by_index(0, range(10), (2, 3))
    assert torch.equal(common.noise_by_index(0, [7, 2], (2, 3)), noise[[7, 2]])             # row i belongs to index i


def test_ema_warms_up_to_its_cap():
    args = type("Args", (), dict(ema=0.9, ema_warmup=1))
    assert common.ema_decay(args, 0) == 0.1 and common.ema_decay(args, 10 ** 6) == 0.9
    args.ema_warmup = 0
    assert common.ema_decay(args, 0) == 0.9
    a, b = small_net("plain"), small_net("plain")
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1)
    c = common.frozen_copy(a)
    common.update_ema(c, b, 0.75)
    for (n, p), q in zip(c.named_parameters(), a.parameters()):
        torch.testing.assert_close(p, q + 0.25, msg=n)


def test_the_feature_classifier_generalises_and_is_deterministic(tmp_path):
    data = vae.load_data("digits")
    even = vae.Data(data.x[::2], data.y[::2], 10, data.mean, data.std, "even digits")
    first, cached = evaluate.Features(even, tmp_path / "a"), evaluate.Features(even, tmp_path / "a")
    again = evaluate.Features(even, tmp_path / "b")
    assert first.hash == cached.hash == again.hash
    probs = first(data.x[1::2])[1]
    assert (probs.argmax(1) == data.y[1::2]).double().mean() > 0.965                        # images it has not seen
    floor = first.floor()
    noisy = first.metrics(even.x + torch.randn(even.x.shape, generator=torch.Generator().manual_seed(0)), even.y)
    assert noisy["fd"] > 3 * floor["fd"] and floor["acc"] > 0.99 and 9 < floor["is"] <= 10
    with pytest.raises(common.BadInput, match="NaN"):
        first.metrics(even.x * float("nan"), even.y)


def test_samples_do_not_depend_on_the_batch_size():
    net = small_net("in_context", torch.float32)
    seven, y = evaluate.generate(net, 20, (2, 4, 4), 2, omega=2.0, guide_to=0.9, batch=7)
    whole, _ = evaluate.generate(net, 20, (2, 4, 4), 2, omega=2.0, guide_to=0.9, batch=64)
    torch.testing.assert_close(seven, whole, rtol=0, atol=1e-5)
    assert y.tolist() == [i % 3 for i in range(20)]
    other = evaluate.generate(net, 20, (2, 4, 4), 2, omega=1.0, guide_to=0.9)[0]
    assert (other - whole).abs().max() > 1e-4                                               # guidance reaches the sampler


# ---- latents: the autoencoder, shards, official weights -----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vae", "vae_ch64"])
def test_vae_matches_the_official_autoencoder(name):
    z, cfg = golden(name)
    m, weights = cfg["model"], cfg["weights"]
    net = vae.VAE(**{k: tuple(v) if isinstance(v, list) else v for k, v in m.items() if k in vae.VAES["vavae"]}).eval()
    shapes = {k: tuple(s) for k, s in cfg["keys"]}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes
    net.load_state_dict(golden_state(shapes, **weights))
    x, latent = (golden_input(f"input:{k}", cfg["inputs"][k]["shape"], weights["prefix"]) for k in "xz")
    with torch.no_grad():
        mean, std = net.encode(x.clamp(-1, 1))
        decoded = net.decode(latent)
    for found, expected in ((mean, z["moments"][:, :m["z_channels"]]), (std, z["std"]), (decoded, z["decoded"])):
        assert (found - torch.tensor(expected)).abs().max() <= 1e-4 * expected.std()


def test_vae_has_the_published_sizes():
    with torch.device("meta"):
        va, sd = vae.VAE("vavae"), vae.VAE("sdvae")
    assert sum(p.numel() for p in va.parameters()) == 69_836_067 and len(va.state_dict()) == 342 and va.downscale == 16
    assert sum(p.numel() for p in sd.parameters()) == 83_653_863 and sd.downscale == 8
    assert va.state_dict()["encoder.down.4.block.0.nin_shortcut.weight"].shape == (512, 256, 1, 1) and "decoder.up.4.attn.2.proj_out.bias" in va.state_dict()


def golden_imf():
    z, cfg = golden("imf")
    return z, cfg, golden_state({k: tuple(s) for k, s in cfg["keys"]}, **cfg["weights"])


def test_imf_matches_the_official_network_and_sampler():
    z, cfg, state = golden_imf()
    net, inputs = model.load_official(state, input_size=8).eval(), cfg["inputs"]
    x, eps = (golden_input(f"input:{k}", inputs[k]["shape"]) for k in ("x", "eps"))
    t, s, y = torch.tensor(inputs["t"]), torch.tensor(inputs["r"]), torch.tensor(inputs["y"])
    guidance = torch.tensor([inputs[k] for k in ("omega", "t_min", "t_max")]).T
    fixed = model.fixed_guidance(6.0, 0.0, 0.9, eps)
    with torch.no_grad():
        found = dict(u=net(x, t, y, s, guidance), u_null=net(x, t, torch.full_like(y, 10), s))
        found |= {f"sample{n}": model.sample(lambda x, t, y, s: net(x, t, y, s, fixed), eps, torch.arange(4), n) for n in (1, 2)}
    for k, v in found.items():
        assert (v - torch.tensor(z[k])).abs().max() <= 1e-4 * z[k].std(), k
    published = {f"net.{k}": v for k, v in state.items() if not k.startswith("v_heads.")}   # as the files are: wrapped, without the v-head
    torch.testing.assert_close(model.load_official(published, 8)(x, t, y, s, guidance), found["u"])
    again = model.build(net.config)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x, t, y, s, guidance), found["u"])
    for broken, words in (({k: v for k, v in state.items() if "omega_embedder" not in k}, "missing omega_embedder"), (state | {"extra.weight": x}, "unexpected extra.weight")):
        with pytest.raises(ValueError, match=words):
            model.load_official(broken, 8)


def test_official_lightningdit_of_full_size_loads_with_nothing_left_over():
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in model.LightningDiT("B/1").state_dict().items()}
    state = {f"module.{k}": torch.zeros(1).expand(s) for k, s in shapes.items()} | {"module.feat_rope.freqs_cos": torch.zeros(256, 64), "module.feat_rope.freqs_sin": torch.zeros(256, 64)}
    net = model.load_official({"ema": state, "opt": {}, "config": {}})
    assert sum(p.numel() for p in net.parameters()) == 130_557_728 and net.config["qk_norm"] and net.config["size"] == "B/1"
    assert not model.load_official({"ema": {k: v for k, v in state.items() if "_norm.weight" not in k or "attn" not in k}}).config["qk_norm"]
    with pytest.raises(ValueError, match="1 differences: missing blocks.3.mlp.w3.bias"):
        model.load_official({"ema": {k: v for k, v in state.items() if k != "module.blocks.3.mlp.w3.bias"}})


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 images in 2 classes (noise, and crops of scikit-learn's two photographs) and a tiny VAE in the layout of the official checkpoints."""
    from sklearn.datasets import load_sample_images
    folder, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in ("crops", "noise"):
        (folder / "images" / label).mkdir(parents=True)
    for i in range(12):
        photo = load_sample_images().images[i % 2]
        Image.fromarray(photo[20 * i:20 * i + 90, 30 * i:30 * i + 120]).save(folder / "images" / "crops" / f"{i:02d}.png")
        Image.fromarray(g.integers(0, 255, (20 + i, 31, 3)).astype(np.uint8)).save(folder / "images" / "noise" / f"{i:02d}.jpg")
    Image.fromarray(g.integers(0, 255, (25, 25)).astype(np.uint8)).save(folder / "images" / "noise" / "00.jpg")               # grey
    Image.fromarray(g.integers(0, 255, (25, 25, 4)).astype(np.uint8)).save(folder / "images" / "crops" / "00.png")            # transparent
    torch.manual_seed(0)
    dims = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256, z_channels=4)
    state = vae.VAE(**dims).state_dict() | {"loss.logvar": torch.zeros(()), "foundation_model.head.weight": torch.ones(3, 3)}
    torch.save({"state_dict": state, "epoch": 1}, folder / "vae.pt")
    run(folder, "vae.py encode --images images --ckpt vae.pt --out latents --size 16 --shard 7")
    return folder


def test_encoding_resumes_and_splits_without_a_trace(photos):
    names = sorted(p.name for p in (photos / "latents").glob("*.safetensors"))
    assert names == [f"latents_rank00_shard{i:03d}.safetensors" for i in range(4)]
    (photos / "half").mkdir()
    for name in ("encode.json", names[0], names[2]):                                        # killed in the middle: some shards, half of one
        (photos / "half" / name).write_bytes((photos / "latents" / name).read_bytes())
    (photos / "half" / "latents_rank00_shard001.tmp").write_bytes(b"half a shard")
    before = (photos / "half" / names[0]).stat().st_mtime_ns
    run(photos, "vae.py encode --images images --ckpt vae.pt --out half --size 16 --shard 7")
    assert (photos / "half" / names[0]).stat().st_mtime_ns == before                        # not made twice
    for name in names:
        a, b = (vae.open_shard(photos / folder / name) for folder in ("half", "latents"))
        assert a.metadata() == b.metadata() and all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in ("latents", "latents_flip", "labels"))
    for name in ("meta.json", "latents_stats.pt"):
        assert (photos / "half" / name).read_bytes() == (photos / "latents" / name).read_bytes(), name
    assert not list((photos / "half").glob("*.tmp"))
    run(photos, "vae.py encode --images images --ckpt vae.pt --out two --size 16 --shard 7", processes=2)
    (_, a), (_, b) = ((f, vae.load_data(str(photos / f))) for f in ("latents", "two"))
    torch.testing.assert_close(a.x[torch.arange(48)], b.x[torch.arange(48)], rtol=0, atol=1e-5)
    assert torch.equal(a.y, b.y) and a.num_classes == 2
    run(photos, "vae.py encode --images images --ckpt vae.pt --out rounded --size 16 --precision bf16 --batch_size 5 --device cpu --workers 0")
    c = vae.load_data(str(photos / "rounded"))
    difference = (a.x[torch.arange(48)] - c.x[torch.arange(48)]).abs()
    assert 1e-4 < difference.max() < 0.2                                                    # the encoder in bfloat16; the same noise
    assert "latents made otherwise: seed 0 (there) 1 (here)" in run(photos, "vae.py encode --images images --ckpt vae.pt --out two --size 16 --shard 7 --seed 1", code=2, processes=1).replace("processes 2 (there) 1 (here), ", "")


def test_latents_are_both_flips_normalised_once(photos):
    data = vae.load_data(str(photos / "latents"))
    assert len(data.x) == 48 and data.x.shape == (48, 4, 8, 8) and data.kind == "latents" and data.y.tolist() == ([0] * 12 + [1] * 12) * 2
    whole = data.x[torch.arange(48)]
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-5)
    rows = torch.tensor([47, 3, 0, 24, 3])
    assert torch.equal(data.x[rows], whole[rows])
    raw = torch.cat([shard[1] for shard in vae.shards(photos / "latents")])
    torch.testing.assert_close(vae.denormalize(whole[:24], data.mean, data.std), raw, rtol=1e-6, atol=1e-6)
    net, _ = vae.load_vae(photos / "vae.pt")
    files, classes = vae.image_files(photos / "images")
    assert classes == ["crops", "noise"] and [p.name for p, _ in files[:2]] == ["00.png", "01.png"]
    image = vae.read_image(files[5][0], 16).float()[None] / 127.5 - 1
    for k, x in enumerate((image, image.flip(3))):                                          # image 5 and its mirror image, each with its own noise
        mean, std = net.encode(x)
        torch.testing.assert_close(vae.denormalize(whole[24 * k + 5:24 * k + 6], data.mean, data.std), mean + std * common.noise_by_index(0, [10 + k], (4, 8, 8)), rtol=0, atol=1e-4)


def test_center_crop_is_adms():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (40, 1))                                 # 100 x 40
    cropped = np.array(vae.center_crop(Image.fromarray(ramp), 20)).astype(float)            # halved once by BOX: 50 x 20; columns 15 .. 34 of it
    assert cropped.shape == (20, 20) and np.abs(cropped - (2 * np.arange(15, 35) + 0.5)).max() <= 1
    assert vae.center_crop(Image.fromarray(ramp), 40).size == (40, 40) and vae.center_crop(Image.fromarray(ramp[:, :30]), 64).size == (64, 64)


def test_from_images_to_pictures(photos):
    """encode -> pretrain -> fsf_dmd -> sample -> decode -> PNG, from a folder of images and a VAE checkpoint."""
    printed = run(photos, "vae.py check latents")
    assert "4 shards, 24 images, latents [4, 8, 8] float32, both flips, all finite" in printed and "12 to 12 images a class" in printed
    run(photos, "consistency.py --loss imf --data latents --size tiny --precision fp32 --steps 6 --batch_size 16 --out imf --vae vae.pt")
    printed = run(photos, "fsf_dmd.py --data latents --init imf/model.pt --precision fp32 --steps 4 --batch_size 16 --out fsf --vae vae.pt --health_every 4")
    assert "no metric of latents" in printed and (photos / "fsf" / "health_000004.png").exists()
    checkpoint = common.load_checkpoint(photos / "fsf" / "model.pt")
    assert checkpoint["data"]["kind"] == "latents" and checkpoint["data"]["vae"] == json.loads((photos / "latents" / "meta.json").read_text())["vae_hash"]
    run(photos, "evaluate.py fsf/model.pt --vae vae.pt --steps 2 --out pictures")
    with Image.open(photos / "pictures" / "samples.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50
    run(photos, "vae.py decode latents --ckpt vae.pt --out decoded --n 3")
    net, _ = vae.load_vae(photos / "vae.pt")
    with Image.open(photos / "decoded" / "000002.png") as picture:
        found = np.array(picture).astype(float)
    torch.save(net.state_dict(), photos / "old.pt", _use_new_zipfile_serialization=False)  # the format of before torch 1.6
    again, name = vae.load_vae(photos / "old.pt")
    assert name == "custom" and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    save_file(net.state_dict(), photos / "vae.safetensors")
    assert vae.weights_hash(vae.load_vae(photos / "vae.safetensors")[0]) == vae.weights_hash(net)
    assert "fsf_dmd, latents, imf:" in printed and "--batch_size 16 (given)" in printed and "--lam 0.05 --shift 10.0" in printed             # Table 6, printed
    raw = vae.shards(photos / "latents")[0][1][2:3]
    assert np.abs(found - (127.5 * net.decode(raw) + 128).clamp(0, 255)[0].permute(1, 2, 0).numpy()).max() < 1   # truncated, as the official inference


def test_official_weights_are_a_start(photos, monkeypatch, capsys):
    """A LightningDiT checkpoint as --init of the FM kind, an iMF one as --init of the flow-map kind, each on latents of its shape."""
    monkeypatch.chdir(photos)
    plain = randomize(model.LightningDiT("tiny", "plain", input_size=8, in_channels=4, num_classes=2, patch_size=2), dtype=torch.float32)
    torch.save({"model": {}, "ema": {f"module.{k}": v for k, v in plain.state_dict().items()}, "opt": {}, "config": {}}, "lightningdit.pt")
    flags = ["--data", "latents", "--precision", "fp32", "--batch_size", "8", "--steps", "2", "--health_every", "0"]
    fsf_dmd.train(fsf_dmd.parse_args(["--init", "lightningdit.pt", "--warmup", "1", "--out", "from-official", *flags]))
    teacher = state(photos, "from-official")["teacher"]
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    net = model.LightningDiT(**plain.config)
    net.load_state_dict(teacher)
    torch.testing.assert_close(net(x, t, y), -plain(x, 1 - t, y), rtol=1e-4, atol=1e-5)     # time and sign turned
    z, cfg, weights = golden_imf()
    torch.save({k: v[:3] if "embedding_table" in k else v for k, v in weights.items()}, "imf.pth")
    monkeypatch.setattr(model.load_official, "__defaults__", (8,))                          # 16-pixel images; the files are for 256
    fsf_dmd.train(fsf_dmd.parse_args(["--init", "imf.pth", "--out", "from-imf", *flags]))
    assert common.load_checkpoint("from-imf/model.pt")["config"]["architecture"] == "imf"
    for checkpoint in ("lightningdit.pt", "imf.pth"):                                       # and they are sampled as they are
        evaluate.run(evaluate.parse_args(f"grid {checkpoint} --data latents --vae vae.pt --out grid-{checkpoint[:3]}".split()))
        assert Path(f"grid-{checkpoint[:3]}/samples.png").exists()
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, "lightningdit.safetensors")
    official = common.load_checkpoint("lightningdit.safetensors")["weights"]
    assert all(torch.equal(v, official[k]) for k, v in common.load_checkpoint("lightningdit.pt")["weights"].items())
    for script, words in (("dmd2", "--lambda_g 0"), ("twinflow", "sees t - s only")):
        with pytest.raises(vae.BadInput, match=words):
            sys.modules[script].train(sys.modules[script].parse_args(["--init", "imf.pth", "--out", f"from-imf-{script}", *flags]))
    capsys.readouterr()


def test_small_images_in_folders_are_pixel_data(tmp_path, monkeypatch, capsys):
    for c in range(3):
        (tmp_path / "mine" / f"class{c}").mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.random.default_rng(9 * c + i).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / "mine" / f"class{c}" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))
    consistency.train(consistency.parse_args("--loss imf --data mine --steps 2 --out run".split()))
    checkpoint = common.load_checkpoint("run/model.pt")
    assert checkpoint["config"]["num_classes"] == 3 and checkpoint["data"]["shape"] == [3, 8, 8] and checkpoint["data"]["kind"] == "pixels"
    assert "fd_1step" in json.loads(Path("run/result.json").read_text())["last"]
    capsys.readouterr()


def test_bad_latents_are_one_line_and_exit_code_2(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)

    def folder(name, change=lambda tensors: tensors, stats=None, shards=1):
        (photos / name).mkdir()
        for i in range(shards):
            tensors = load_file(photos / "latents" / f"latents_rank00_shard{i:03d}.safetensors")
            save_file({k: v.contiguous() for k, v in change(tensors).items()}, photos / name / f"latents_rank00_shard{i:03d}.safetensors")
        torch.save(stats or torch.load(photos / "latents" / "latents_stats.pt", weights_only=True), photos / name / "latents_stats.pt")
    stats = torch.load(photos / "latents" / "latents_stats.pt", weights_only=True)
    folder("normalised", lambda t: t | {k: (t[k] - stats["mean"]) / stats["std"] for k in ("latents", "latents_flip")}, dict(mean=stats["mean"] + 9, std=stats["std"]))
    folder("raw", lambda t: t | {k: 10 * t[k] for k in ("latents", "latents_flip")})
    folder("nan", lambda t: t | dict(latents=t["latents"].where(t["latents"] < t["latents"].max(), torch.nan)))
    folder("othervae", stats=dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1)))
    folder("unlabelled", lambda t: {k: v for k, v in t.items() if k != "labels"})
    folder("negative", lambda t: t | dict(labels=t["labels"] - 1))
    folder("toomany", lambda t: t | dict(labels=t["labels"] + 7))
    (photos / "toomany" / "meta.json").write_text((photos / "latents" / "meta.json").read_text())
    folder("uneven", lambda t: t | dict(latents_flip=t["latents_flip"][1:]))
    folder("cut")
    path = photos / "cut" / "latents_rank00_shard000.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    folder("statless")
    (photos / "statless" / "latents_stats.pt").unlink()
    folder("evilstats")
    torch.save(dict(mean=Evil(), std=Evil()), photos / "evilstats" / "latents_stats.pt")
    (photos / "damaged" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(photos / "damaged" / "a" / "0.png")
    (photos / "damaged" / "a" / "1.png").write_bytes((photos / "images" / "crops" / "01.png").read_bytes()[:200])
    (photos / "flat").mkdir()
    (photos / "large" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(photos / "large" / "a" / "0.png")
    torch.save(dict(state_dict={"encoder.conv_in.weight": torch.ones(2, 3, 3, 3)}), photos / "half.pt")
    torch.save(dict(state_dict=Evil()), photos / "evil.pt")
    torch.manual_seed(1)
    other = vae.VAE(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256, z_channels=4)
    torch.save(other.state_dict(), photos / "other.pt")
    before = sorted(p for p in photos.rglob("*"))
    train = "consistency.py --loss imf --size tiny --steps 2 --batch_size 8 --data"
    for command, words in [
            (f"{train} normalised", "the statistics of other latents, or latents normalised already"), (f"{train} raw", "expected 0 and 1"), (f"{train} nan", "expected 0 and 1"),
            (f"{train} othervae", "expected mean and positive std of 4 channels, found mean [1, 32, 1, 1]"), (f"{train} unlabelled", "has no labels, expected a shard"),
            (f"{train} negative", "labels start at -1"), (f"{train} toomany", "labels go up to 7, but meta.json names 2 classes"), (f"{train} uneven", "do not fit together"), (f"{train} cut", "not a whole safetensors file"),
            (f"{train} statless", "latents_stats.pt: no such file"), (f"{train} evilstats", "latents_stats.pt: not a file of weights"),
            (f"{train} flat", "no images in class folders"), (f"{train} large", "expected square images of at most 64; larger ones: python vae.py encode"),
            (f"{train} latents --vae other.pt", "is not the VAE"),
            ("vae.py check nan", "latents hold NaN or infinity in image"), ("vae.py check raw", "the statistics of other latents"), ("vae.py check images", "holds no latent shards"),
            ("vae.py decode latents --ckpt half.pt --out d", "not a VAE checkpoint of LDM's layout"), ("vae.py decode latents --ckpt evil.pt --out d", "evil.pt: not a file of weights"),
            ("vae.py encode --images flat --ckpt vae.pt --out e", "no images in class folders"), ("vae.py encode --images nowhere --ckpt vae.pt --out e", "nowhere: no such folder"),
            ("vae.py encode --images images --ckpt vae.pt --out e --size 17", "needs a multiple of 2"), ("vae.py encode --images images --ckpt vae.pt --out images", "is not empty"),
            ("vae.py", "the following arguments are required: command"), ("vae.py encode --images images --ckpt vae.pt --out e --size 0", "--size: 0 is out of range")]:
        said = refusal(command, capsys, monkeypatch)
        assert words in said, (command, said)
    made = sorted(p for p in photos.rglob("*"))
    assert made == before
    assert not (photos / "executed").exists()
    assert "1.png: not a readable image" in run(photos, "vae.py encode --images damaged --ckpt vae.pt --out d0 --size 16 --workers 0", code=2) and not list((photos / "d0").glob("*.safetensors"))
    printed = run(photos, "vae.py encode --images damaged --ckpt vae.pt --out d1 --size 16 --skip_bad 1 --dtype bf16")
    assert "1 images in 1 classes" in printed and "1 unreadable left out" in printed and "1.png" in printed
    assert vae.shards(photos / "d1")[0][1].dtype == torch.bfloat16
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)                             # as if it were not installed
    with pytest.raises(vae.BadInput, match="pip install safetensors"):
        vae.load_data("latents")


# ---- FID's network ------------------------------------------------------------------------------------------------------------

def golden_inception():
    z, cfg = golden("inception")
    net = inception.Inception()
    lines = [line.split("\t") for line in (HERE / "golden" / "inception_keys.txt").read_text().splitlines() if "\t" in line]
    keys = {name: tuple(int(n) for n in re.findall(r"\d+", shape)) for name, shape, _ in lines}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == keys and len(keys) == 566
    net.load_state_dict(golden_state(keys, net.state_dict(), **cfg["weights"]))
    prefix, (n, _, h, w) = cfg["weights"]["prefix"], cfg["inputs"]["images"]["shape"]
    tiles = golden_ints("input:tiles", (n, 3, h // 16, w // 16), 0, 256, prefix).repeat_interleave(16, 2).repeat_interleave(16, 3)
    images = (tiles + golden_ints("input:noise", (n, 3, h, w), -40, 41, prefix)).clamp(0, 255).to(torch.uint8)
    return z, net.eval(), images


def test_inception_matches_torch_fidelity_and_pytorch_fid(tmp_path):
    z, net, images = golden_inception()
    torch.save({k: v for k, v in net.state_dict().items() if "tracked" not in k}, tmp_path / "weights.pth")      # 472 tensors, as the public files
    for source, pipeline in (("torch_fidelity", "adm"), ("pytorch_fid", "pytorch_fid")):
        loaded, _ = inception.load_inception(tmp_path / "weights.pth", pipeline)
        with torch.no_grad():
            features, logits = loaded(images)
        expected = torch.tensor(z[f"{source}.2048"])
        assert (features - expected).abs().max() <= 2e-4 * expected.std()
        if source == "torch_fidelity":
            expected = torch.tensor(z["torch_fidelity.logits_unbiased"])
            assert (logits - expected).abs().max() <= 2e-4 * expected.std()


def test_inception_weights_in_nvidias_layout(tmp_path):
    """378 tensors without gammas, in a TorchScript archive: the same network."""
    _, net, images = golden_inception()
    with torch.no_grad():
        for k, v in net.state_dict().items():
            if k.endswith("bn.weight"):
                v.fill_(1)
    names, tree = inception.nvidia_names(), torch.nn.Module()
    assert len(names) == 378 and len(set(names.values())) == 378
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
    assert inception.load_inception(tmp_path / "torchvision.pth")[1] == digest               # one network, one hash
    torch.save({k: v for k, v in net.state_dict().items() if not k.startswith("Mixed_7c")}, tmp_path / "short.pth")
    with pytest.raises(vae.BadInput, match="missing Mixed_7c"):
        inception.load_inception(tmp_path / "short.pth")


def test_resize_is_tensorflow_1s():
    x = rand(1, 2, 5, 7).float()
    found = inception.resize_tf1(x, 11)
    for i, j in ((0, 0), (3, 8), (10, 10), (7, 2)):
        y, x_ = i * 5 / 11, j * 7 / 11                                                      # no half-pixel shift
        a, b, wy, wx = int(y), int(x_), y - int(y), x_ - int(x_)
        c, d = min(a + 1, 4), min(b + 1, 6)                                                 # clamped at the border
        expected = (1 - wy) * ((1 - wx) * x[0, :, a, b] + wx * x[0, :, a, d]) + wy * ((1 - wx) * x[0, :, c, b] + wx * x[0, :, c, d])
        torch.testing.assert_close(found[0, :, i, j], expected, rtol=1e-5, atol=1e-5)


def test_fid_of_images_resumes_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    """`evaluate.py ref` on a folder and `--from_images` on an .npz of the same images; batch size, processes and an interruption change nothing."""
    monkeypatch.chdir(tmp_path)
    _, net, _ = golden_inception()
    torch.save(net.state_dict(), "inception.pth")
    torch.manual_seed(0)
    vgg = inception.VGG16().state_dict() | {"classifier.6.weight": torch.ones(10, 4096), "classifier.6.bias": torch.ones(10)}
    assert len(vgg) == 32
    torch.save(vgg, "vgg16.pth")
    array = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3)).astype(np.uint8)
    np.savez("images.npz", arr_0=array)
    Path("folder/class").mkdir(parents=True)
    for i, image in enumerate(array):
        Image.fromarray(image).save(f"folder/class/{i:03d}.png")
    nets = "--inception inception.pth --vgg vgg16.pth --few 1"
    run(tmp_path, "evaluate.py ref --data folder --inception inception.pth --few 1 --batch_size 3 --out two", processes=2)
    common.main(evaluate.run, lambda: evaluate.parse_args(f"ref --data folder {nets} --batch_size 2 --out ref".split()))
    assert sorted(p.name for p in Path("two/features").glob("*.pt")) == ["features_000000.pt", "features_000003.pt"]
    with np.load("ref/reference.npz") as ref, np.load("two/reference.npz") as two:
        sigma, features = ref["sigma"], ref["features"]
        assert ref["vgg"].shape == (6, 4096) and ref["vgg"].std() > 0
        assert np.abs(two["features"] - features).max() < 1e-5 * features.std()
    torch.testing.assert_close(torch.tensor(sigma), torch.cov(torch.tensor(features).double().T))
    command = f"--from_images images.npz {nets} --ref ref/reference.npz --batch_size 5 --out out"
    common.main(evaluate.run, lambda: evaluate.parse_args(command.split()))
    first, second = Path("out/features/features_000000.pt"), Path("out/features/features_000005.pt")
    found = torch.load(first, weights_only=True)["features"]
    torch.testing.assert_close(found, torch.tensor(features[:5]), rtol=0, atol=1e-5 * features.std().item())
    result, printed = json.loads(Path("out/fid.json").read_text()), capsys.readouterr().out
    assert result["fid"] < 1e-6 * np.trace(sigma) and result["precision_inception"] == result["recall_inception"] == 1 and result["precision_vgg"] > 0.8
    assert result["label"] == "FID (n = 6)" and all(w in printed for w in ("FID (n = 6)", "in one)", "(adm), VGG16", "reference ref/reference.npz", "torch 2"))
    made = first.stat().st_mtime_ns
    second.unlink()                                                                         # as if killed in between
    common.main(evaluate.run, lambda: evaluate.parse_args(command.split()))
    assert first.stat().st_mtime_ns == made and second.exists() and json.loads(Path("out/fid.json").read_text())["fid"] == result["fid"]
    damaged = {k: v.clone() for k, v in torch.load(first, weights_only=True).items()}
    damaged["features"][2, 7] = math.nan
    with pytest.raises(vae.BadInput, match="NaN or infinity"):
        evaluate.inception_metrics(damaged, evaluate.read_reference("ref/reference.npz"))
    np.savez("adm.npz", arr_0=array[:4], mu=np.arange(2048.0), sigma=np.eye(2048))           # ADM's layout: statistics of more than its images
    common.main(evaluate.run, lambda: evaluate.parse_args("ref --data adm.npz --inception inception.pth --few 1 --out adm".split()))
    adm = evaluate.read_reference("adm/reference.npz")
    assert (adm["mu"] == np.arange(2048)).all() and np.abs(adm["features"] - features[:4]).max() < 1e-5 * features.std()
    Path("folder/class/003.png").write_bytes(Path("folder/class/003.png").read_bytes()[:300])
    np.savez("badref.npz", mu=np.zeros(7), sigma=np.eye(7))
    torch.save({k: v for k, v in vgg.items() if "classifier.3" not in k}, "short.pth")
    for command, words in (("--from_images folder --inception inception.pth --ref ref/reference.npz", "6 images give no covariance"),
                           ("--from_images folder --inception inception.pth --ref ref/reference.npz --few 1", "003.png: not a readable image"),
                           ("--from_images images.npz --inception inception.pth --ref badref.npz --few 1", "expected finite mu [2048]"),
                           ("--from_images images.npz --inception inception.pth", "needs --ref"), ("--from_images images.npz", "need --inception"), ("ref --inception inception.pth", "needs --data"),
                           ("ref", "need --inception"), ("", "expected one of CHECKPOINT"), ("a.pt --from_images images.npz", "expected one of CHECKPOINT"), ("a.pt --ref b.npz", "need --inception"),
                           ("ref --data badref.npz --inception inception.pth", "expected an .npz with arr_0"), ("grid missing.pt", "missing.pt: no such file"),
                           ("ref --data images.npz --inception inception.pth --vgg short.pth", "missing classifier.3.weight"),
                           ("--from_images images.npz --inception nowhere.pth --ref ref/reference.npz", "which you download yourself")):
        said = refusal(f"evaluate.py {command}", capsys, monkeypatch)
        assert words in said, (command, said)


def test_images_of_any_mode_are_read_as_rgb(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.stack([grey, grey // 2, grey, np.full_like(grey, 128)], 2)).save(tmp_path / "b.png")     # half transparent: its colours, not blended
    Image.fromarray(grey).quantize(256).save(tmp_path / "c.png")
    n, images, _ = evaluate.image_source(tmp_path)
    a, b, c = images(0, 3)
    assert n == 3 and a.dtype == torch.uint8 and all((a[k] == torch.tensor(grey)).all() for k in range(3))
    assert (b[0] == torch.tensor(grey)).all() and (b[1] == torch.tensor(grey // 2)).all() and (c.float() - a.float()).abs().max() <= 1
    Image.fromarray(grey[:5]).save(tmp_path / "d.png")
    with pytest.raises(vae.BadInput, match="d.png: is 9 x 5, others 9 x 9"):
        evaluate.image_source(tmp_path)[1](0, 4)


def test_fid_of_a_checkpoint_and_its_raw_weights(photos, monkeypatch, capsys):
    """From latents to FID in one command; the raw weights of a run are asked for by name."""
    monkeypatch.chdir(photos)
    _, net, _ = golden_inception()
    torch.save(net.state_dict(), "inception.pth")
    consistency.train(consistency.parse_args("--loss imf --data latents --size tiny --precision fp32 --steps 3 --batch_size 8 --lr 0.05 --out metric".split()))
    np.savez("five.npz", arr_0=np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8))
    common.main(evaluate.run, lambda: evaluate.parse_args("ref --data five.npz --inception inception.pth --few 1 --out refs".split()))
    labels = []
    for weights in ("ema", "raw"):
        command = f"metric/model.pt --vae vae.pt --inception inception.pth --ref refs/reference.npz --n 5 --few 1 --steps 2 --weights {weights} --out {weights}"
        common.main(evaluate.run, lambda: evaluate.parse_args(command.split()))
        labels.append(json.loads(Path(weights, "fid.json").read_text()))
    assert labels[0]["fid"] > 0 and labels[0]["fid"] != labels[1]["fid"] and "raw weights" in labels[1]["definition"] and "2 steps, omega 6.0 on [0, 0.9]" in labels[0]["definition"]
    common.main(evaluate.run, lambda: evaluate.parse_args("grid metric/model.pt --vae vae.pt --out pictures2".split()))
    assert Path("pictures2/samples.png").exists() and not Path("pictures2/evaluation.json").exists()
    capsys.readouterr()


def test_velocity_of_a_flow_map_is_sampled_by_euler_steps():
    """--velocity: x - dt u(x, t, t), asked as iMF trains it (omega inside its interval, 1 outside); with few steps it is another sampler than the flow map."""
    net = small_net("in_context", dtype=torch.float32)
    found, y = evaluate.generate(net, 6, (2, 4, 4), 4, omega=3.0, guide_to=0.6, velocity=True)
    x = common.noise_by_index(evaluate.EVAL_SEED, range(6), (2, 4, 4))
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            guidance = torch.tensor([[3.0 if t <= 0.6 else 1.0, 0.0, 1.0]]).expand(6, 3)
            x = x - 0.25 * net(x, torch.full((6,), t), y, torch.full((6,), t), guidance)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert (found - evaluate.generate(net, 6, (2, 4, 4), 4, omega=3.0, guide_to=0.6)[0]).abs().max() > 1e-3
    assert evaluate.sampler_steps(net) == [1, 2, 4] and evaluate.sampler_steps(net, velocity=True) == [25] and evaluate.sampler_steps(net, [250], True) == [250]
