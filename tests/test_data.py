"""The part of the suite (see test_all.py) on data in and pictures out.

Data and batches, the autoencoder, latent shards, official weights, and the way from images to pictures and FID.
"""
import argparse
import errno
import functools
import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_weights import golden_input, golden_state
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import evaluate
import model
import reproduce
import vae
from plumbing import checkpoints, flags, kept_runs, run_folder
from test_helpers import Evil, golden, rand, randomize, refusal, run, small_net, state, train
from test_metrics import evaluate_here, golden_inception

# ---- data, randomness, pictures --------------------------------------------------------------------------------------

def test_digits_are_normalised_and_come_back():
    digits = data.load_data("digits")
    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.num_classes == 10
    assert torch.bincount(digits.y).min() == 174
    assert digits.x.mean().abs() < 1e-5
    assert abs(digits.x.std() - 1) < 1e-5

    raw = data.denormalize(digits.x.double(), digits.mean, digits.std) * 16
    assert (raw - raw.round()).abs().max() < 1e-5                # the 17 grey levels again
    assert raw.max().round() == 16
    again = data.normalize(raw / 16, digits.mean, digits.std)
    torch.testing.assert_close(again, digits.x.double(), rtol=0, atol=1e-6)
    pixels = data.to_uint8(digits.x, digits.mean, digits.std)[..., 0]
    assert np.abs(pixels - raw[:, 0].numpy() / 16 * 255).max() <= 0.501      # rounded to nearest


def test_a_channel_that_is_constant_is_not_divided_by_zero(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    images[..., 2] = 7
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(8) % 2)
    assert not data.load_data(str(tmp_path / "set.npz")).x[:, 2].any()


def test_batches_are_epochs_and_depend_on_nothing_but_seed_and_step():
    rows = torch.cat([common.batch_rows(50, 16, 3, step) for step in range(25)])         # 400 rows = 8 epochs
    for epoch in rows.split(50):
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(rows[:50], rows[50:100])
    assert torch.equal(common.batch_rows(50, 16, 3, 7), rows[7 * 16:8 * 16])
    assert not torch.equal(common.batch_rows(50, 16, 4, 7), rows[7 * 16:8 * 16])
    noise = common.noise_by_index("samples", 0, range(10), (2, 3))
    assert torch.equal(common.noise_by_index("samples", 0, [7, 2], (2, 3)), noise[[7, 2]])        # row i is index i's


def test_ema_warms_up_to_its_cap():
    args = SimpleNamespace(ema=0.9, ema_warmup=1)
    assert common.ema_decay(args, 0) == 0.1
    assert common.ema_decay(args, 10 ** 6) == 0.9
    args.ema_warmup = 0
    assert common.ema_decay(args, 0) == 0.9

    a, b = small_net("plain"), small_net("plain")
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1)
    ema = common.frozen_copy(a)
    common.update_ema(ema, b, 0.75)
    for (name, found), p in zip(ema.named_parameters(), a.parameters()):
        torch.testing.assert_close(found, p + 0.25, msg=name)


def test_small_images_in_folders_are_pixel_data(tmp_path, few_samples, monkeypatch, capsys):
    for c in range(3):
        folder = tmp_path / "mine" / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(9 * c + i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            Image.fromarray(pixels).save(tmp_path / "mine" / f"loose{i}.png")    # of no class
    monkeypatch.chdir(tmp_path)
    train("consistency.py --loss imf --data mine --steps 2 --out run")
    assert "mine: 8 images beside the class folders are not read (loose0.png is one)" in capsys.readouterr().out
    checkpoint = checkpoints.load_checkpoint("run/model.pt")
    assert checkpoint["config"]["num_classes"] == 3
    assert checkpoint["data"]["shape"] == [3, 8, 8]
    assert checkpoint["data"]["kind"] == "pixels"
    assert "fd_1step" in json.loads(Path("run/result.json").read_text())["last"]


def test_of_a_folder_of_images_only_those_are_read_and_the_rest_is_said(tmp_path, capsys, monkeypatch):
    """Hidden files are no images, other files are counted, what is transparent is white, parts are no classes."""
    for name in ("a", "b"):
        (tmp_path / "set" / name / ".ipynb_checkpoints").mkdir(parents=True)
        seen = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
        seen.putpixel((0, 0), (200, 0, 0, 0))                               # invisible
        seen.save(tmp_path / "set" / name / "0.png")
        seen.save(tmp_path / "set" / name / "._0.png")
        seen.save(tmp_path / "set" / name / ".ipynb_checkpoints" / "0-checkpoint.png")
        (tmp_path / "set" / name / "notes.txt").write_text("")
    images, labels, classes = data.read_image_folder(tmp_path / "set")
    assert classes == ["a", "b"]
    assert labels.tolist() == [0, 1]
    assert images[0, :, 0, 0].tolist() == [255, 255, 255] and images[0, :, 1, 1].tolist() == [200, 0, 0]
    said = capsys.readouterr().out
    assert "2 files without the ending of an image in the class folders are not read (notes.txt is one)" in said

    for part in ("train", "test"):
        shutil.copytree(tmp_path / "set", tmp_path / "parts" / part)
    with pytest.raises(common.BadInput, match=r"no classes but parts of a data set \(test, train\)"):
        data.image_files(tmp_path / "parts")
    (tmp_path / "parts" / "test").rename(tmp_path / "parts" / "testing")    # mnist_png's
    with pytest.raises(common.BadInput, match=r"no classes but parts of a data set \(testing, train\)"):
        data.image_files(tmp_path / "parts")
    assert data.image_files(tmp_path / "parts" / "train")[1] == ["a", "b"]

    args = argparse.Namespace(out=str(tmp_path / "set" / "runs" / "x"), data=str(tmp_path / "set"), resume="auto")
    with pytest.raises(common.BadInput, match="lies in --data"):
        run_folder.check_folder(args)
    args.out = str(tmp_path / "elsewhere")
    run_folder.check_folder(args)
    monkeypatch.chdir(tmp_path / "set")                             # of the metrics runs/cache/ would be made here
    with pytest.raises(common.BadInput, match="holds the folder you are in, whose runs/ would be read as data"):
        run_folder.check_folder(args)
    Path("shard.safetensors").touch()                               # of latents nothing below the folder is read
    run_folder.check_folder(args)


def drawn_image(path, shade):
    """8 x 8 pixels, black or white."""
    Image.new("RGB", (8, 8), (255 * shade,) * 3).save(path)


def test_classes_one_level_too_deep_are_said(tmp_path, capsys):
    for name in ("0", "1"):
        (tmp_path / "mine" / "mine" / name).mkdir(parents=True)
        drawn_image(tmp_path / "mine" / "mine" / name / "a.png", int(name))
    assert data.load_data(str(tmp_path / "mine")).num_classes == 1
    inner = tmp_path / "mine" / "mine"
    assert f"one class, mine; the folders in it are no classes (if they are: pass {inner})" in capsys.readouterr().out
    assert data.load_data(str(inner)).num_classes == 2 and capsys.readouterr().out == ""


def test_images_that_do_not_fit_into_the_memory_are_refused(tmp_path, monkeypatch):
    """By their number and the size of the first one; each process of several has its share."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        drawn_image(tmp_path / name / "a.png", int(name))
    bytes_of = 2 * 8 * 8 * 3                                        # of all images
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 16, "SC_PHYS_PAGES": bytes_of}.get)
    assert len(data.load_data(str(tmp_path)).x) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.BadInput, match="its 2 images unpack to 3.84e-07 GB, expected at most 1.92e-07 GB a"):
        data.load_data(str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")                     # one on each of two machines
    assert len(data.load_data(str(tmp_path)).x) == 2


def test_labels_and_meta_json_name_a_sane_number_of_classes():
    most = data.MAX_CLASSES
    data.refuse_labels(torch.tensor([0, most - 1]), "x.npz")
    with pytest.raises(common.BadInput, match="up to 100000, expected 0 .. classes - 1 of at most 100000 classes"):
        data.refuse_labels(torch.tensor([0, most]), "x.npz")
    assert data.count_classes(torch.tensor([0]), dict(classes=["a"] * most), "latents") == most
    for meta in (dict(classes=["a"] * (most + 1)), dict(classes=["a"], n=1.0), dict(classes=["a"], n="1")):
        with pytest.raises(common.BadInput, match="expected at most 100000 classes and a whole number"):
            data.count_classes(torch.tensor([0]), meta, "latents")


def test_labels_of_one_byte_are_counted():
    for dtype, most in ((torch.uint8, 255), (torch.int8, 127)):
        labels = torch.arange(most + 1).to(dtype)
        assert data.count_classes(labels, {}, "here") == most + 1
        assert data.count_classes(labels, dict(classes=["x"] * 1000, n=len(labels)), "here") == 1000


def test_a_class_that_cannot_be_read_is_not_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "deeper" / "0.png")
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
    for name in ("away.png", "labels.csv"):                         # beside the classes: are not read anyway
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / "a" / ".hidden").mkdir()
    assert [label for _, label in data.image_files(tmp_path)[0]] == [0, 0, 1, 1]
    (tmp_path / "c").symlink_to("nowhere")
    with pytest.raises(common.BadInput, match="c: is a link that leads nowhere"):
        data.image_files(tmp_path)
    (tmp_path / "c").unlink()

    def scan(path, real=os.scandir):
        if Path(path).name in closed:                               # root, as whom tests may run, may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scan)
        closed = (".hidden",)
        assert len(data.image_files(tmp_path)[0]) == 4
        closed = (".hidden", "deeper")
        with pytest.raises(common.BadInput, match="deeper: may not be read"):
            data.image_files(tmp_path)


def test_beside_a_folder_named_digits_the_digits_are_still_scikit_learns(tmp_path, few_samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for steps in (1, 2):
        train(f"consistency.py --loss imf --batch_size 8 --steps {steps} --out digits/run")
    assert state(tmp_path, "digits/run")["step"] == 2 and data.data_name("digits") == "digits"
    assert checkpoints.load_checkpoint("digits/run/model.pt")["config"]["num_classes"] == 10


def test_a_start_of_other_images_is_said(in_home, capsys):
    """It goes on with these images normalised by their own mean and deviation."""
    checkpoint = checkpoints.load_checkpoint("imf/model.pt")
    toy = data.load_data(Path("toy.npz"))
    checkpoints.say_other_data("imf/model.pt", checkpoint, toy)
    assert capsys.readouterr().out == ""
    found = dict(np.load("toy.npz"))
    np.savez("dark.npz", images=found["images"] // 2, labels=found["labels"])
    checkpoints.say_other_data("imf/model.pt", checkpoint, data.load_data("dark.npz"))
    assert "imf/model.pt: was trained on toy.npz, of other mean and deviation than dark.npz" in capsys.readouterr().out


def test_a_class_that_was_renamed_is_said(tmp_path, capsys):
    """Its images would be asked for by the number of another one."""
    for name, shade in (("cat", 0), ("dog", 1)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        drawn_image(tmp_path / "pets" / name / "a.png", shade)
    checkpoint = dict(data=data.load_data(str(tmp_path / "pets")).meta)
    assert checkpoint["data"]["classes"] == ["cat", "dog"]
    assert evaluate.data_of("model.pt", checkpoint, "pass --data").classes == ["cat", "dog"]
    (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "a_dog")
    with pytest.raises(common.BadInput, match="of other names of classes than the one that is there"):
        evaluate.data_of("model.pt", checkpoint, "pass --data")
    checkpoints.say_other_data("model.pt", checkpoint, data.load_data(str(tmp_path / "pets")))
    assert "of other names of classes than" in capsys.readouterr().out


def test_center_crop_is_adms():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (40, 1))      # 100 x 40
    # Halved once by BOX: 50 x 20; columns 15 .. 34 of it.
    cropped = np.array(data.center_crop(Image.fromarray(ramp), 20)).astype(float)
    assert cropped.shape == (20, 20)
    assert np.abs(cropped - (2 * np.arange(15, 35) + 0.5)).max() <= 1
    assert data.center_crop(Image.fromarray(ramp), 40).size == (40, 40)
    # Of noise: halved by the mean of 2 x 2 pixels, then 50 x 40 to 38 x 30, bicubic; columns 4 .. 33 of it.
    noise = np.random.default_rng(0).integers(0, 256, (80, 100), dtype=np.uint8)
    halved = (noise.reshape(40, 2, 50, 2).sum((1, 3)) + 2) // 4
    expected = Image.fromarray(halved.astype(np.uint8)).resize((38, 30), Image.Resampling.BICUBIC).crop((4, 0, 34, 30))
    cropped = np.array(data.center_crop(Image.fromarray(noise), 30)).astype(int)
    assert np.abs(cropped - np.array(expected)).max() <= 2       # pillow may round a half down
    assert data.center_crop(Image.fromarray(ramp[:, :30]), 64).size == (64, 64)


# ---- the autoencoder and official weights ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vae", "vae_ch64"])
def test_vae_matches_the_official_autoencoder(name):
    z, cfg = golden(name)
    dims = {k: v for k, v in cfg["model"].items() if k in vae.VAES["vavae"]}
    dims |= {k: tuple(v) for k, v in dims.items() if isinstance(v, list)}
    net = vae.VAE(**dims).eval()
    shapes = {k: tuple(s) for k, s in cfg["keys"]}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes

    weights = cfg["weights"]
    net.load_state_dict(golden_state(shapes, **weights))
    x, latent = (golden_input(f"input:{k}", cfg["inputs"][k]["shape"], weights["prefix"]) for k in "xz")
    with torch.no_grad():
        mean, std = net.encode(x.clamp(-1, 1))
        decoded = net.decode(latent)
    channels = cfg["model"]["z_channels"]
    for found, expected in ((mean, z["moments"][:, :channels]), (std, z["std"]), (decoded, z["decoded"])):
        assert (found - torch.tensor(expected)).abs().max() <= 1e-4 * expected.std()


def test_the_deviation_of_a_latent_is_bounded_as_in_the_official_code():
    """Its log variance is clamped to [-30, 20]."""
    net = vae.VAE("vavae", ch=32, ch_mult=[1, 1], z_channels=2)
    for bias, expected in ((100.0, 10.0), (-100.0, -15.0), (3.0, 1.5)):
        with torch.no_grad():
            net.quant_conv.weight.zero_()
            net.quant_conv.bias.copy_(torch.tensor([0.0, 0.0, bias, bias]))
            _, std = net.encode(torch.zeros(1, 3, 8, 8))
        torch.testing.assert_close(std.log(), torch.full_like(std, expected))


def test_vae_has_the_published_sizes():
    with torch.device("meta"):
        va, sd = vae.VAE("vavae"), vae.VAE("sdvae")
    assert sum(p.numel() for p in va.parameters()) == 69_836_067
    assert len(va.state_dict()) == 342
    assert va.downscale == 16
    assert sum(p.numel() for p in sd.parameters()) == 83_653_863
    assert sd.downscale == 8
    assert va.state_dict()["encoder.down.4.block.0.nin_shortcut.weight"].shape == (512, 256, 1, 1)
    assert "decoder.up.4.attn.2.proj_out.bias" in va.state_dict()


def golden_imf():
    """(expected outputs, their config, the golden weights of iMF)"""
    z, cfg = golden("imf")
    return z, cfg, golden_state({k: tuple(s) for k, s in cfg["keys"]}, **cfg["weights"])


def test_imf_matches_the_official_network_and_sampler():
    z, cfg, weights = golden_imf()
    net = model.load_official(weights, input_size=8).eval()
    inputs = cfg["inputs"]
    x, eps = (golden_input(f"input:{k}", inputs[k]["shape"]) for k in ("x", "eps"))
    t, s, y = torch.tensor(inputs["t"]), torch.tensor(inputs["r"]), torch.tensor(inputs["y"])
    guidance = torch.tensor([inputs[k] for k in ("omega", "t_min", "t_max")]).T          # [B, 3]
    fixed = model.fixed_guidance(6.0, 0.0, 0.9, eps)

    def guided(x, t, y, s):
        return net(x, t, y, s, fixed)

    with torch.no_grad():
        found = dict(
            u=net(x, t, y, s, guidance),
            u_null=net(x, t, torch.full_like(y, 10), s),
            sample1=model.sample(guided, eps, torch.arange(4), 1),
            sample2=model.sample(guided, eps, torch.arange(4), 2),
        )
    for name, value in found.items():
        assert (value - torch.tensor(z[name])).abs().max() <= 1e-4 * z[name].std(), name

    # As the files are: wrapped, and without the v-head.
    published = {f"net.{k}": v for k, v in weights.items() if not k.startswith("v_heads.")}
    torch.testing.assert_close(model.load_official(published, 8)(x, t, y, s, guidance), found["u"])
    again = model.build(net.config)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x, t, y, s, guidance), found["u"])

    without_omega = {k: v for k, v in weights.items() if "omega_embedder" not in k}
    with pytest.raises(ValueError, match="missing omega_embedder"):
        model.load_official(without_omega, 8)
    with pytest.raises(ValueError, match="unexpected extra.weight"):
        model.load_official(weights | {"extra.weight": x}, 8)


def test_official_lightningdit_of_full_size_loads_with_nothing_left_over():
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in model.LightningDiT("B/1").state_dict().items()}
    weights = {f"module.{k}": torch.zeros(1).expand(s) for k, s in shapes.items()}
    weights["module.feat_rope.freqs_cos"] = torch.zeros(256, 64)
    weights["module.feat_rope.freqs_sin"] = torch.zeros(256, 64)
    net = model.load_official({"ema": weights, "opt": {}, "config": {}})
    assert sum(p.numel() for p in net.parameters()) == 130_557_728
    assert net.config["qk_norm"]
    assert net.config["size"] == "B/1"

    without_qk_norm = model.LightningDiT("tiny", qk_norm=False).state_dict()
    assert not model.load_official({"ema": without_qk_norm}).config["qk_norm"]


def test_latents_are_decoded_as_the_autoencoder_gave_them():
    """Training sees them normalised; the decoder must not."""
    class Identity(torch.nn.Linear):
        def decode(self, z):
            return z[:, :3]

    z = rand(9, 4, 2, 2, dtype=torch.float32).clamp(-0.9, 0.9)
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 3.0]
    shown = data.to_images(data.normalize(z, mean, std), dict(kind="latents", mean=mean, std=std), Identity(1, 1))
    expected = (127.5 * z[:, :3] + 128).permute(0, 2, 3, 1).numpy()
    assert np.abs(shown - expected).max() <= 1 and (expected - shown).mean() == pytest.approx(0.5, abs=0.1)  # truncated


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_latents_of_few_channels_are_shown_in_grey(channels):
    x = torch.linspace(-2, 2, 5).view(1, 1, 1, 5) * torch.arange(1, channels + 1).view(1, -1, 1, 1)
    shown = data.to_images(x.repeat(1, 1, 5, 1), dict(kind="latents"))
    assert shown.shape == (1, 5, 5, 3 if channels > 2 else 1)
    assert shown[0, 0, :, 0].tolist() == [0, 64, 128, 191, 255]     # from two deviations below the mean to two above


# ---- latent shards ---------------------------------------------------------------------------------------------------

TINY_VAE = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256, z_channels=4)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder: images/ of 24 images in 2 classes (noise, and crops of scikit-learn's two photographs).

    vae.pt: a tiny VAE in the layout of the official checkpoints.  latents/: of these images by this VAE.
    """
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)

    def noise(*shape):
        return Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8))

    crops_folder, noise_folder = folder / "images" / "crops", folder / "images" / "noise"
    crops_folder.mkdir(parents=True)
    noise_folder.mkdir(parents=True)
    photographs = load_sample_images().images
    for i in range(12):
        photo = photographs[i % 2]
        Image.fromarray(photo[20 * i:20 * i + 90, 30 * i:30 * i + 120]).save(crops_folder / f"{i:02d}.png")
        noise(20 + i, 31, 3).save(noise_folder / f"{i:02d}.jpg")
    noise(25, 25).save(noise_folder / "00.jpg")                  # grey
    noise(25, 25, 4).save(crops_folder / "00.png")               # transparent

    torch.manual_seed(0)
    of_training = {"loss.logvar": torch.zeros(()), "foundation_model.head.weight": torch.ones(3, 3)}
    weights = vae.VAE(**TINY_VAE).state_dict() | of_training
    torch.save({"state_dict": weights, "epoch": 1}, folder / "vae.pt")
    run(folder, "vae.py encode --images images --ckpt vae.pt --out latents --size 16 --shard 7")
    return folder


def test_images_come_to_the_encoder_through_a_pipe(photos):
    """A worker that sends tensors takes shared memory for them; where that is full, an encoding waits for ever."""
    paths = [path for path, _ in data.image_files(photos / "images")[0][:6]]
    read = functools.partial(vae.read_batch, size=16)
    batches = list(torch.utils.data.DataLoader(paths, 4, num_workers=1, collate_fn=read))
    assert all(isinstance(images, np.ndarray) for images, _ in batches)
    for image, path in zip(np.concatenate([images for images, _ in batches]), paths, strict=True):
        assert np.array_equal(image, data.read_image(path, 16))


def encode_here(command):
    """A command of vae.py in this process."""
    vae.run(vae.parse_args(command.split()[1:]))


@pytest.mark.slow
def test_encoding_resumes_and_splits_without_a_trace(photos, monkeypatch, capsys):
    encode = "vae.py encode --images images --ckpt vae.pt --size 16"
    whole, half = photos / "latents", photos / "half"
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert names == [f"latents_rank00_shard{i:03d}.safetensors" for i in range(4)]

    # Killed in the middle: some shards, half of one.
    half.mkdir()
    for name in ("encode.json", names[0], names[2]):
        (half / name).write_bytes((whole / name).read_bytes())
    (half / "latents_rank00_shard001.tmp").write_bytes(b"half a shard")
    before = (half / names[0]).stat().st_mtime_ns
    monkeypatch.chdir(photos)
    encode_here(f"{encode} --out half --shard 7 --workers 0")
    assert (half / names[0]).stat().st_mtime_ns == before        # not made twice
    for name in names:
        a, b = data.open_shard(half / name), data.open_shard(whole / name)
        assert a.metadata() == b.metadata()
        for key in ("latents", "latents_flip", "labels"):
            assert torch.equal(a.get_tensor(key), b.get_tensor(key))
    for name in ("meta.json", "latents_stats.pt"):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(half.glob("*.tmp"))

    # Two processes.
    rows = torch.arange(48)
    run(photos, f"{encode} --out two --shard 7", processes=2)
    a, b = data.load_data(str(whole)), data.load_data(str(photos / "two"))
    torch.testing.assert_close(a.x[rows], b.x[rows], rtol=0, atol=1e-5)
    assert torch.equal(a.y, b.y)
    assert a.num_classes == 2

    # The encoder in bfloat16; the same noise.
    encode_here(f"{encode} --out rounded --precision bf16 --batch_size 5 --device cpu --workers 0")
    c = data.load_data(str(photos / "rounded"))
    assert 1e-4 < (a.x[rows] - c.x[rows]).abs().max() < 0.2

    said = refusal(f"{encode} --out two --shard 7 --seed 1", capsys, monkeypatch)
    said = said.replace("processes 2 (there) 1 (here), ", "")
    assert "latents made otherwise: seed 0 (there) 1 (here)" in said


@pytest.mark.slow
def test_encoding_goes_on_after_a_bad_image_is_skipped_repaired_or_removed(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "images", "images")
    bad = Path("images/crops/10.png")                            # in the second shard
    good = bad.read_bytes()
    encode = f"vae.py encode --images images --ckpt {photos / 'vae.pt'} --size 16 --shard 7 --workers 0"

    def encoded(out, more=""):
        vae.run(vae.parse_args(shlex.split(f"{encode} --out {out} {more}")[1:]))
        return data.load_data(out)

    def raw(found, rows):
        return data.denormalize(found.x[torch.tensor(rows)], found.mean, found.std)

    whole = data.load_data(str(photos / "latents"))
    of_bad = [10, 34]                                            # its row, and that of its mirror image
    others = [row for row in range(48) if row not in of_bad]
    for out, more, mend in (("skipped", "--skip_bad 1", lambda: None), ("repaired", "", lambda: bad.write_bytes(good)),
                             ("removed", "", bad.unlink)):
        bad.write_bytes(good[:200])
        said = refusal(f"{encode} --out {out}", capsys, monkeypatch)
        assert "10.png: not a readable image; repair or remove it, or pass --skip_bad 1" in said
        first = Path(out, "latents_rank00_shard000.safetensors")
        before = first.stat().st_mtime_ns
        mend()
        found = encoded(out, more)
        assert first.stat().st_mtime_ns == before                # kept
        rows = list(range(48)) if out == "repaired" else others
        assert found.y.tolist() == [int(row % 24 >= 12) for row in rows]
        if out != "removed":                                     # there the noise of the later images is another
            torch.testing.assert_close(raw(found, list(range(len(rows)))), raw(whole, rows), rtol=1e-5, atol=1e-5)

    # One that was left out is repaired afterwards, by a file of the same size.
    bad.write_bytes(bytes(len(good)))
    encoded("later", "--skip_bad 1")
    assert len(data.load_data("later").y) == 46
    bad.write_bytes(good)
    found = encoded("later", "--skip_bad 1")
    torch.testing.assert_close(raw(found, range(48)), raw(whole, range(48)), rtol=1e-5, atol=1e-5)
    bad.unlink()

    # Again: nothing is written, so runs that were kept on these latents stay.
    before = kept_runs.content_hash("removed")
    encoded("removed")
    kept_runs.look_again()
    assert kept_runs.content_hash("removed") == before
    # Once it is whole, a folder is of these images only.
    bad.write_bytes(good)
    assert "latents made otherwise: n 23 (there) 24 (here)" in refusal(f"{encode} --out removed", capsys, monkeypatch)
    assert "lies in --images images" in refusal(f"{encode} --out images/latents", capsys, monkeypatch)


def test_a_folder_called_digits_is_not_the_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in "01":
        Path("digits", label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(Path("digits", label, f"{i}.png"))
    found = [len(data.load_data(flags.data_source(text)).x) for text in ("digits", "digits/", "./digits")]
    assert found == [1797, 6, 6]
    assert flags.data_source("digits//") != "digits" and flags.data_source("mine/") == "mine"


def test_latents_are_both_flips_normalised_once(photos):
    latents = data.load_data(str(photos / "latents"))
    assert len(latents.x) == 48
    assert latents.x.shape == (48, 4, 8, 8)
    assert latents.kind == "latents"
    assert latents.y.tolist() == ([0] * 12 + [1] * 12) * 2
    whole = latents.x[torch.arange(48)]
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-5)
    rows = torch.tensor([47, 3, 0, 24, 3])
    assert torch.equal(latents.x[rows], whole[rows])

    raw = torch.cat([shard.latents for shard in data.shards(photos / "latents")])
    undone = data.denormalize(whole, latents.mean, latents.std)
    torch.testing.assert_close(undone[:24], raw, rtol=1e-6, atol=1e-6)

    # Image 5 and its mirror image, each with its own noise.
    net, _ = vae.load_vae(photos / "vae.pt")
    files, classes = data.image_files(photos / "images")
    assert classes == ["crops", "noise"]
    assert [path.name for path, _ in files[:2]] == ["00.png", "01.png"]
    image = data.read_image(files[5][0], 16).float()[None] / 127.5 - 1       # [1, 3, 16, 16] in [-1, 1]
    for k, x in enumerate((image, image.flip(3))):
        mean, std = net.encode(x)
        expected = mean + std * common.noise_by_index("vae", 0, [10 + k], (4, 8, 8))
        torch.testing.assert_close(undone[24 * k + 5][None], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_unreadable_images_stop_an_encoding_or_are_left_out(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    folder = photos / "damaged" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "0.png")
    (folder / "1.png").write_bytes((photos / "images" / "crops" / "01.png").read_bytes()[:200])
    encode = "vae.py encode --images damaged --ckpt vae.pt --size 16"
    assert "1.png: not a readable image" in refusal(f"{encode} --out d0 --workers 0", capsys, monkeypatch)
    assert not list((photos / "d0").glob("*.safetensors"))
    printed = run(photos, f"{encode} --out d1 --skip_bad 1 --dtype bf16")
    assert "1 images in 1 classes" in printed
    assert "1 unreadable left out" in printed
    assert "1.png" in printed
    assert data.shards(photos / "d1")[0].latents.dtype == torch.bfloat16


TRAIN = "consistency.py --loss imf --size tiny --steps 2 --batch_size 8 --data"
ENCODE = "vae.py encode --images images --ckpt vae.pt"
BAD_LATENTS = [  # command, words of the one line
    (f"{TRAIN} normalised", "the statistics of other latents, or latents normalised already"),
    (f"{TRAIN} raw", "expected 0 and 1"),
    (f"{TRAIN} nan", "expected 0 and 1"),
    (f"{TRAIN} othervae", "expected mean and positive std of 4 channels, found mean [1, 32, 1, 1]"),
    (f"{TRAIN} unlabelled", "has no labels, expected a shard"),
    (f"{TRAIN} negative", "labels start at -1"),
    (f"{TRAIN} toomany", "labels go up to 7, but meta.json names 2 classes"),
    (f"{TRAIN} lost", "--data lost: the shards hold 7 images, but meta.json says 24; copy all shards"),
    ("vae.py check lost", "lost: the shards hold 7 images, but meta.json says 24"),
    (f"{TRAIN} uneven", "do not fit together"),
    (f"{TRAIN} cut", "not a whole safetensors file"),
    (f"{TRAIN} statless", "latents_stats.pt: no such file, expected the statistics of these latents; `python vae.py"),
    (f"{TRAIN} evilstats", "latents_stats.pt: not a file of weights"),
    (f"{TRAIN} flat", "no images in class folders"),
    (f"{TRAIN} large", "expected square images of at most 64; larger ones: python vae.py encode"),
    (f"{TRAIN} latents --vae other.pt", "is not the VAE"),
    ("vae.py check nan", "latents hold NaN or infinity in image"),
    ("vae.py check raw", "the statistics of other latents"),
    ("vae.py check images", "holds no latent shards"),
    ("vae.py decode latents --ckpt other.pt --out d", "other.pt: is not the VAE"),
    ("vae.py decode latents --ckpt half.pt --out d", "not a VAE checkpoint of LDM's layout"),
    ("vae.py decode latents --ckpt evil.pt --out d", "evil.pt: not a file of weights (holds objects, not only"),
    ("vae.py decode latents --ckpt vae.pt --out mine --n 2", "mine: is not empty, expected a new folder"),
    ("vae.py encode --images flat --ckpt vae.pt --out e", "no images in class folders"),
    ("vae.py encode --images nowhere --ckpt vae.pt --out e", "nowhere: no such folder"),
    (f"{ENCODE} --out e --size 17", "needs a multiple of 2"),
    (f"{ENCODE} --out images", "lies in --images images"),
    ("vae.py", "the following arguments are required: command"),
    (f"{ENCODE} --out e --size 0", "--size: 0 is out of range"),
]


def write_bad_latents(photos):
    """The folders and files of BAD_LATENTS beside the good ones."""
    good = photos / "latents"
    shard = "latents_rank00_shard000.safetensors"
    stats = torch.load(good / "latents_stats.pt", weights_only=True)
    both = ("latents", "latents_flip")
    good_tensors = load_file(good / shard)
    latents, labels = good_tensors["latents"], good_tensors["labels"]

    def folder(name, stats=stats, **changed):
        """A copy of the first shard, with these tensors changed or (None) left out, and these statistics."""
        (photos / name).mkdir()
        tensors = {k: v for k, v in (good_tensors | changed).items() if v is not None}
        save_file({k: v.contiguous() for k, v in tensors.items()}, photos / name / shard)
        torch.save(stats, photos / name / "latents_stats.pt")

    normalised = {k: (good_tensors[k] - stats["mean"]) / stats["std"] for k in both}
    folder("normalised", dict(mean=stats["mean"] + 9, std=stats["std"]), **normalised)
    folder("raw", **{k: 10 * good_tensors[k] for k in both})
    folder("nan", latents=latents.where(latents < latents.max(), torch.nan))
    folder("othervae", dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1)))
    folder("unlabelled", labels=None)
    folder("negative", labels=labels - 1)
    folder("toomany", labels=labels + 7)
    (photos / "toomany" / "meta.json").write_text((good / "meta.json").read_text())
    folder("lost")
    (photos / "lost" / "meta.json").write_text((good / "meta.json").read_text())
    folder("uneven", latents_flip=good_tensors["latents_flip"][1:])
    folder("cut")
    (photos / "cut" / shard).write_bytes((photos / "cut" / shard).read_bytes()[:3000])
    folder("statless")
    (photos / "statless" / "latents_stats.pt").unlink()
    folder("evilstats", dict(mean=Evil(), std=Evil()))

    (photos / "mine").mkdir()
    Image.new("RGB", (16, 16)).save(photos / "mine" / "000000.png")
    (photos / "flat").mkdir()
    (photos / "large" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(photos / "large" / "a" / "0.png")
    torch.save(dict(state_dict={"encoder.conv_in.weight": torch.ones(2, 3, 3, 3)}), photos / "half.pt")
    torch.save(dict(state_dict=Evil()), photos / "evil.pt")
    torch.manual_seed(1)
    torch.save(vae.VAE(**TINY_VAE).state_dict(), photos / "other.pt")


def test_bad_latents_are_one_line_and_exit_code_2(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    write_bad_latents(photos)
    before = sorted(photos.rglob("*"))
    for command, words in BAD_LATENTS:
        said = refusal(command, capsys, monkeypatch)
        assert words in said, (command, said)
    assert sorted(photos.rglob("*")) == before
    assert not (photos / "executed").exists()


# ---- from images to pictures and FID ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_from_images_to_pictures(photos, monkeypatch, capsys):
    """encode -> pretrain -> fsf_dmd -> sample -> decode -> PNG, from a folder of images and a VAE checkpoint."""
    monkeypatch.chdir(photos)
    encode_here("vae.py check latents")
    printed = capsys.readouterr().out
    assert "4 shards, 24 images, latents [4, 8, 8] float32, both flips, all finite" in printed
    assert "12 to 12 images per class" in printed

    train("consistency.py --loss imf --data latents --size tiny --precision fp32 --steps 6 --batch_size 16 --out imf "
          "--vae vae.pt")
    printed = run(
        photos, "fsf_dmd.py --data latents --init imf/model.pt --precision fp32 --steps 4 --batch_size 16 "
        "--out fsf --vae vae.pt --health_every 4",
    )
    assert "fsf_dmd.py, latents, imf:" in printed
    assert "--batch_size 16 (given)" in printed
    assert "--lam 0.05 --shift 10.0" in printed                  # Table 6, printed
    assert "no metric of latents" in printed
    assert (photos / "fsf" / "health_000004.png").exists()
    checkpoint = checkpoints.load_checkpoint(photos / "fsf" / "model.pt")
    meta = json.loads((photos / "latents" / "meta.json").read_text())
    assert checkpoint["data"]["kind"] == "latents"
    assert checkpoint["data"]["vae"] == meta["vae_hash"]

    evaluate_here("fsf/model.pt --vae vae.pt --steps 2 --out pictures")
    with Image.open(photos / "pictures" / "samples.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50

    encode_here("vae.py decode latents --ckpt vae.pt --out decoded --n 3")
    real, made = Image.fromarray, []

    def stopped(*args):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Image, "fromarray", stopped)
        encode_here("vae.py decode latents --ckpt vae.pt --out again --n 3")
    assert not list((photos / "again").iterdir())                # so the same command goes through
    with Image.open(photos / "decoded" / "000002.png") as picture:
        found = np.array(picture).astype(float)
    net, _ = vae.load_vae(photos / "vae.pt")
    raw = data.shards(photos / "latents")[0].latents[2:3]
    pixels = (127.5 * net.decode(raw) + 128).clamp(0, 255)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - pixels).max() < 1                      # truncated, as the official inference


def test_a_vae_is_read_from_every_file_format(photos, tmp_path):
    net, _ = vae.load_vae(photos / "vae.pt")
    # The format of before torch 1.6.
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    again, name = vae.load_vae(tmp_path / "old.pt")
    assert name == "custom"
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    save_file(net.state_dict(), tmp_path / "vae.safetensors")
    again, _ = vae.load_vae(tmp_path / "vae.safetensors")
    assert checkpoints.weights_hash(again) == checkpoints.weights_hash(net)


def test_official_weights_are_a_start(photos, monkeypatch):
    """A LightningDiT checkpoint as --init of the FM kind, an iMF one as --init of the flow-map kind.

    Each on latents of its shape.
    """
    monkeypatch.chdir(photos)
    flags = "--data latents --precision fp32 --batch_size 8 --steps 2 --health_every 0"

    plain = model.LightningDiT("tiny", "plain", input_size=8, in_channels=4, num_classes=2, patch_size=2)
    plain = randomize(plain, dtype=torch.float32)
    published = {f"module.{k}": v for k, v in plain.state_dict().items()}
    torch.save({"model": {}, "ema": published, "opt": {}, "config": {}}, "lightningdit.pt")
    train(f"fsf_dmd.py --init lightningdit.pt --warmup 1 --out from-official {flags}")
    teacher = model.LightningDiT(**plain.config)
    teacher.load_state_dict(state(photos, "from-official")["teacher"])
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    expected = -plain(x, 1 - t, y)                               # time and sign turned
    torch.testing.assert_close(teacher(x, t, y), expected, rtol=1e-4, atol=1e-5)

    _, _, weights = golden_imf()
    two_classes = {k: v[:3] if "embedding_table" in k else v for k, v in weights.items()}     # and the null class
    torch.save(two_classes, "imf.pth")
    monkeypatch.setattr(model.load_official, "__defaults__", (8,))           # 16-pixel images; the files are for 256
    train(f"fsf_dmd.py --init imf.pth --out from-imf {flags}")
    assert checkpoints.load_checkpoint("from-imf/model.pt")["config"]["architecture"] == "imf"

    # Their rows of a table are guided as the paper's: the file itself says of no guidance.
    of_table = "4 --data latents --vae vae.pt --inception vae.pt --ref vae.pt --init lightningdit.pt --list"
    rows = dict(enumerate(reproduce.TABLES["4"].rows[:2], 1))
    for job in reproduce.jobs_of(reproduce.parse_args(of_table.split()), rows, 0).values():
        words = evaluate.parse_args([*job.command[1:], "--vae", "vae.pt"])
        assert evaluate.sampling(words, checkpoints.load_checkpoint(words.what))[:2] == (6.0, 0.9)

    # And they are sampled as they are.
    for checkpoint in ("lightningdit.pt", "imf.pth"):
        out = f"grid-{checkpoint[:3]}"
        evaluate_here(f"grid {checkpoint} --data latents --vae vae.pt --out {out}")
        assert Path(out, "samples.png").exists()

    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, "lightningdit.safetensors")
    official = checkpoints.load_checkpoint("lightningdit.safetensors")["weights"]
    for k, v in checkpoints.load_checkpoint("lightningdit.pt")["weights"].items():
        assert torch.equal(v, official[k]), k
    for script, words in (("dmd2", "--lambda_g 0"), ("twinflow", "sees t - s only")):
        with pytest.raises(common.BadInput, match=words):
            train(f"{script}.py --init imf.pth --out from-imf-{script} {flags}")


@pytest.mark.slow
def test_fid_of_a_checkpoint_and_its_raw_weights(photos, monkeypatch, capsys):
    """From latents to FID in one command; the raw weights of a run are asked for by name."""
    monkeypatch.chdir(photos)
    _, net, _ = golden_inception()
    torch.save(net.state_dict(), "inception.pth")
    train("consistency.py --loss imf --data latents --size tiny --precision fp32 --steps 3 --batch_size 8 --lr 0.05 "
          "--out metric")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    np.savez("five.npz", arr_0=images)
    evaluate_here("ref --data five.npz --inception inception.pth --few 1 --out refs")

    def fid_of(weights):
        evaluate_here("metric/model.pt --vae vae.pt --inception inception.pth --ref refs/reference.npz "
                      f"--n 5 --few 1 --steps 2 --weights {weights} --out fid-{weights}")
        return json.loads(Path(f"fid-{weights}", "fid.json").read_text())

    # Sampling and decoding are in TF32, the features are not (the flags are there without a GPU too).
    in_tf32 = {}
    watched = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: in_tf32.setdefault(type(module).__name__, set()).add(torch.backends.cudnn.allow_tf32))
    with common.tf32(False):
        ema = fid_of("ema")
    watched.remove()
    assert in_tf32["LightningDiT"] == in_tf32["Decoder"] == {True} and in_tf32["Inception"] == {False}
    raw = fid_of("raw")
    assert ema["fid"] > 0
    assert ema["fid"] != raw["fid"]
    assert "raw weights" in raw["definition"]
    assert "2 steps (flow_map), omega 6.0 on [0, 0.9]" in ema["definition"]

    # A network whose samples are not finite has no FID and no picture.
    broken = torch.load("metric/model.pt", weights_only=True)
    broken["weights"]["final_layer.linear.weight"].fill_(3e38)
    torch.save(broken, "broken.pt")
    flags = "--vae vae.pt --out of-broken"
    for command in (f"grid broken.pt {flags}", f"broken.pt {flags} --inception inception.pth --ref "
                    "refs/reference.npz --n 5 --few 1 --steps 2"):
        assert "the network has diverged" in refusal(f"evaluate.py {command}", capsys, monkeypatch)
    assert not list(Path("of-broken").glob("[a-z]*.*"))

    evaluate_here("grid metric/model.pt --vae vae.pt --out pictures2")
    assert Path("pictures2/samples.png").exists()
    assert not Path("pictures2/evaluation.json").exists()
    said = refusal("evaluate.py metric/model.pt --vae vae.pt --n 5 --out pictures3", capsys, monkeypatch)
    assert "--n: nothing of latents is measured without --inception" in said and not Path("pictures3").exists()
