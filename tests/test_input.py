"""The part of the suite (see test_all.py) on bad input: each class of it with all its members, in process.

What is refused ends in one line and exit code 2 and leaves the folder as it was; what is a cache is made again.
"""
import copy
import json
import os
import shutil
import typing
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import fid
import inception
import metrics
import model
import vae
from plumbing import checkpoints, flags
from test_data import TINY_VAE
from test_helpers import refusal, small_net, train


def refuse_all(folder, cases, capsys, monkeypatch):
    """cases: [(command, words of its one line)]; none of them writes anything."""
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    for command, words in cases:
        said = refusal(command, capsys, monkeypatch)
        assert words in said, (command, said)
        assert len(said) < 1000 and "None: None" not in said, said
        assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before, f"{command} wrote something"


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def damaged_checkpoints(good):
    """(name, checkpoint): a model.pt with one thing in it that no run writes."""
    for part in ("config", "weights", "data", "args"):
        for value in ({}, [], 7, "text", torch.zeros(2), None):
            if not (part == "data" and value is None) and not (part == "args" and value == {}):
                yield f"{part} {value!r:.12}", good | {part: value}
    for key in ("in_channels", "input_size", "num_classes", "depth", "hidden_size", "num_heads", "patch_size",
                "n_tokens"):
        for value in (0, -1, 10 ** 12, 2.0, "4", None, True):
            yield f"{key} {value!r}", good | dict(config=good["config"] | {key: value})
    for key, value in (("conditioning", "other"), ("conditioning", 3), ("size", "huge"), ("size", []),
                       ("size", torch.zeros(2)),
                       ("depth", 10 ** 6), ("mlp_ratio", 0), ("mlp_ratio", "4"), ("unknown", 1),
                       ("architecture", "imf")):
        yield f"{key} {value!r}", good | dict(config=good["config"] | {key: value})
    for key, value in (("source", 3), ("shape", [1, 4]), ("shape", None), ("mean", []), ("mean", ["a"]), ("std", [0.0]),
                       ("std", [float("nan")]), ("std", None), ("kind", "sound"), ("vae", 5)):
        yield f"data {key} {value!r}", good | dict(data=good["data"] | {key: value})
    for key, value in (("omega", "six"), ("guide_to", None), ("omega", float("nan")), ("cfg_channels", -1),
                       ("omega", 0.5), ("omega", 1e39), ("guide_to", 7), ("cfg_channels", 1.5)):
        yield f"args {key} {value!r}", good | dict(args=good["args"] | {key: value})
    for value in ("guess", torch.zeros(2), 3):
        yield f"sampler {value!r}", good | dict(sampler=value)
    name = "blocks.0.mlp.w3.weight"
    for value in (torch.zeros(()), good["weights"][name][:1], torch.full_like(good["weights"][name], torch.nan),
                  good["weights"][name].to_sparse(), 3, None):
        yield f"weights {type(value)}", good | dict(weights=good["weights"] | {name: value})


@pytest.mark.slow
def test_damaged_checkpoints(in_home, monkeypatch, capsys):
    good = torch.load("imf/model.pt", weights_only=True)
    for name, checkpoint in damaged_checkpoints(good):
        torch.save(checkpoint, "bad.pt")
        said = refusal("evaluate.py grid bad.pt", capsys, monkeypatch)
        assert "bad.pt: " in said and len(said) < 1000, (name, said)
    flipped = bytearray((in_home / "imf" / "model.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 4                                     # one bit, in the middle of the weights
    (in_home / "bad.pt").write_bytes(flipped)
    assert "bytes have changed" in refusal("evaluate.py grid bad.pt", capsys, monkeypatch)
    for content in (b"", b"\0" * 100, b"PK\3\4", (in_home / "imf" / "model.pt").read_bytes()[:-500]):
        (in_home / "bad.pt").write_bytes(content)
        (in_home / "bad.safetensors").write_bytes(content)
        refuse_all(in_home, [
            ("evaluate.py grid bad.pt", "bad.pt: not a model.pt"),
            ("evaluate.py grid bad.safetensors", "bad.safetensors: not a file of weights"),
            ("fsf_dmd.py --data toy.npz --init bad.pt", "bad.pt: not a model.pt"),
            ("vae.py decode imf --ckpt bad.pt --out d", "bad.pt: not a file of weights"),
            ("evaluate.py grid imf", "imf"),
        ], capsys, monkeypatch)
    for value in ("imf/model.pt", [1], 3, {}, {1: torch.zeros(2)}, {"a": 1}, torch.zeros(3)):
        torch.save(value, "bad.pt")
        refuse_all(in_home, [
            ("evaluate.py grid bad.pt", "bad.pt: not a model.pt"),
            ("vae.py decode imf --ckpt bad.pt --out d", "bad.pt: "),
        ], capsys, monkeypatch)
    expected = "--vae bad.pt: decodes latents, and toy.npz has pixels"
    assert expected in refusal("evaluate.py imf/model.pt --vae bad.pt", capsys, monkeypatch)
    for path in ("bad.pt", "bad.safetensors"):
        (in_home / path).unlink()
    said = refusal("evaluate.py grid fm/state.pt", capsys, monkeypatch)         # its weights are not official ones
    assert "fm/state.pt: is the state.pt of a run, expected the model.pt beside it" in said


def odd_states(good):
    """(what, state.pt): one that torch.load takes, and no run writes."""
    name = "blocks.0.mlp.w3.weight"
    for part in ("net", "ema"):
        for value in (torch.nan, 1e9):
            yield f"{part} {value}", good | {part: good[part] | {name: torch.full_like(good[part][name], value)}}
    opt = good["opt"]
    for i, own in ((0, "momentum"), (len(opt["state"]) - 1, "mean")):           # of a matrix, of a vector
        for value in (torch.zeros(2, 3), "text", None):
            state = opt["state"][i] | {own: value}
            yield f"{own} {value!r:.20}", good | dict(opt=opt | dict(state=opt["state"] | {i: state}))
        state = {k: v for k, v in opt["state"][i].items() if k != own}
        yield f"no {own}", good | dict(opt=opt | dict(state=opt["state"] | {i: state}))
    for step in (-1, 1.5, "1", None, torch.nan):
        yield f"step {step}", good | dict(step=step)
    for evaluations in ("text", None, {}, [1], [{}], [dict(fd_1step=1.0)], [dict(step=0, fd_1step="x")],
                        [dict(step=0, fd_1step=torch.nan)]):
        yield f"evaluations {evaluations}", good | dict(evaluations=evaluations)
    yield "no data", good | dict(data={})


@pytest.mark.slow
def test_odd_states(in_home, monkeypatch, capsys, few_samples):
    """Refused before a step, in a line that names the file; nothing of the run is written."""
    shutil.copytree("imf", "odd")
    good, command = torch.load("imf/state.pt", weights_only=True), "consistency.py --loss imf --data toy.npz --out odd"
    for what, state in odd_states(good):
        torch.save(state, "odd/state.pt")
        before = {path: path.read_bytes() for path in (in_home / "odd").iterdir()}
        said = refusal(f"{command} --steps 9", capsys, monkeypatch)
        assert "odd/state.pt" in said and "--resume no" in said, (what, said)
        assert {path: path.read_bytes() for path in (in_home / "odd").iterdir()} == before, what
    (in_home / "odd" / "state.pt").unlink()
    said = refusal(f"{command} --steps 9", capsys, monkeypatch)
    assert "has a model.pt but no state.pt" in said and "--init odd/model.pt" in said
    args = json.loads((in_home / "odd" / "args.json").read_text())
    (in_home / "odd" / "args.json").write_text(json.dumps(args | dict(code=None)))      # no hashes of the code
    torch.save(good, "odd/state.pt")
    train(f"{command} --steps {good['step']}")
    (in_home / "odd" / "state.pt").unlink()
    (in_home / "odd" / "state.pt").symlink_to("nowhere")
    assert "state.pt in it is no file" in refusal(command, capsys, monkeypatch)
    (in_home / "odd" / "state.pt").unlink()
    (in_home / "odd" / "state.pt").mkdir()
    for resume in ("auto", "no"):
        said = refusal(f"{command} --resume {resume}", capsys, monkeypatch)
        assert "state.pt in it is no file; move it away, or pass another --out" in said
    assert (in_home / "odd" / "model.pt").exists() and (in_home / "odd" / "metrics.jsonl").exists()
    shutil.rmtree("odd")
    capsys.readouterr()


def test_damaged_raw_weights(in_home, monkeypatch, capsys):
    (in_home / "raw").mkdir()
    (in_home / "raw" / "model.pt").write_bytes((in_home / "imf" / "model.pt").read_bytes())
    good = torch.load("imf/state.pt", weights_only=True)
    cases = [("evaluate.py grid raw/model.pt --weights raw", "raw/state.pt: not the state.pt of the run")]
    for value in ({}, [1], good | dict(net=3), good | dict(net={}), {k: v for k, v in good.items() if k != "net"}):
        torch.save(value, "raw/state.pt")
        refuse_all(in_home, cases, capsys, monkeypatch)
    (in_home / "raw" / "state.pt").write_bytes(b"")
    refuse_all(in_home, cases, capsys, monkeypatch)
    name = "blocks.0.mlp.w3.weight"
    torch.save(good | dict(net=good["net"] | {name: torch.full_like(good["net"][name], torch.nan)}), "raw/state.pt")
    refuse_all(in_home, [(cases[0][0], "raw/state.pt: its weights are not finite")], capsys, monkeypatch)


def damaged(state, key):
    """(what, state dict): one tensor of another rank, width or type, or none."""
    value = state[key]
    for name, other in dict(scalar=value.flatten()[0], flat=value.flatten(), deep=value[None], short=value[:0],
                            half=value[..., :value.shape[-1] // 2], long=torch.cat([value, value]),
                            none=None, number=3, complex=value.to(torch.complex64), whole=value.long()).items():
        same = torch.is_tensor(other) and other.shape == value.shape and other.dtype == value.dtype
        if not same:
            yield f"{key} {name}", state | {key: other}
    yield f"{key} is missing", {k: v for k, v in state.items() if k != key}


def refuse_official(cases):
    for what, state in cases:
        if what in ("y_embedder.embedding_table.weight long", "class_tokens long"):
            continue                                             # the weights of another number of these
        if what == "blocks.0.attn.qkv.weight whole":
            continue                                             # are taken as numbers
        with pytest.raises(ValueError):
            model.load_official(state, 8)
            print("taken:", what)


def test_official_weights_of_another_rank_or_width():
    plain = small_net("plain", torch.float32).state_dict()
    model.load_official(plain, 8)                                # undamaged it is taken
    for key in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "feat_rope.freqs_cos"):
        refuse_official(damaged(plain, key))
    refuse_official(damaged(plain, "blocks.0.attn.qkv.weight"))
    imf = model.IMFDiT(input_size=8, in_channels=4, patch_size=2, hidden_size=32, num_heads=2, depth=2, mlp_hidden=64,
                       num_classes=3).state_dict()
    names = {"tokens.0": "class_tokens", "tokens.1": "omega_tokens", "tokens.2": "t_min_tokens",
             "tokens.3": "t_max_tokens", "tokens.4": "time_tokens"}
    imf = {names.get(k, k).replace("blocks.", "shared_blocks."): v for k, v in imf.items()}
    model.load_official(imf, 8)
    for key in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "shared_blocks.0.q_norm.weight",
                "shared_blocks.0.w1.weight", "class_tokens"):
        refuse_official(damaged(imf, key))
    with pytest.raises(ValueError, match="multiple"):
        model.load_official(imf, 7)


def test_vae_checkpoints_of_another_rank_or_width(tmp_path):
    good = vae.VAE(**TINY_VAE).state_dict()
    torch.save(dict(state_dict=good), tmp_path / "good.pt")
    vae.load_vae(tmp_path / "good.pt")                           # undamaged it is taken
    cases = []
    for key in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv2.weight", "post_quant_conv.weight",
                "decoder.conv_in.bias"):
        cases += damaged(good, key)
    cases.append(("no levels", {k: v for k, v in good.items() if not k.startswith("encoder.down")}))
    cases.append(("a level without a number", good | {"encoder.down.x.block.0.conv2.weight": torch.zeros(1)}))
    cases.append(("too many levels", good | {"encoder.down.999999999.block.0.conv2.weight": torch.zeros(1)}))
    cases.append(("nothing", {}))
    for what, state in cases:
        torch.save(dict(state_dict=state), tmp_path / "bad.pt")
        with pytest.raises(common.BadInput, match="bad.pt: "):
            vae.load_vae(tmp_path / "bad.pt")
            print("taken:", what)


# ---- pixels ----------------------------------------------------------------------------------------------------------

def npz_header(path, shape, labels=9):
    """An .npz whose images have this shape by their header, and no content."""
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("images.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
        with archive.open("labels.npy", "w") as file:
            np.save(file, np.zeros(labels, np.int64))


def test_bad_npz_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4)).astype(np.uint8)
    labels = np.arange(9) % 3
    cases = []
    for i, (own_images, own_labels, words) in enumerate([
        (images, np.full(9, 2 ** 62), "labels go up to"),
        (images, np.full(9, 2 ** 64 - 1, np.uint64), "labels go up to"),
        (images, np.full(9, 10 ** 6), "labels go up to 1000000"),
        (images, labels.astype(complex), "labels are complex128"),
        (images, labels.astype(bool), "labels are bool"),
        (images, labels.astype(float), "labels are float64"),
        (images, labels.astype(str), "labels are <U"),
        (images, labels.reshape(9, 1), "labels are int64 [9, 1]"),
        (images, np.array(3), "labels are int64 []"),
        (images.astype(complex), labels, "images are complex128"),
        (images.astype(bool), labels, "images are bool"),
        (images.astype(np.int8), labels, "images are int8"),
        (np.zeros((9, 0, 0), np.uint8), labels, "images are uint8 [9, 0, 0, 1]"),
        (np.zeros((0, 4, 4), np.uint8), labels[:0], "images are uint8 [0, 4, 4, 1]"),
        (np.zeros((9, 4, 4, 2), np.uint8), labels, "images are uint8 [9, 4, 4, 2]"),
        (np.zeros((9, 4, 6), np.uint8), labels, "images are uint8 [9, 4, 6, 1]"),
        (np.zeros(9, np.uint8), labels, "images are uint8 [9]"),
        (np.array(3, np.uint8), labels, "images are uint8 []"),
        (images[:1], labels[:1], "at least two images"),
        (np.zeros((9, 4, 4), np.uint8), labels, "not all alike"),
        (np.zeros((2, 600, 600), np.uint8), labels[:2], "expected at most 512"),
    ]):
        np.savez(f"{i}.npz", images=own_images, labels=own_labels)
        cases.append((f"consistency.py --loss imf --data {i}.npz", words))
    npz_header("bomb.npz", (10 ** 9, 64, 64), labels=1)
    npz_header("bomb9.npz", (9, 60_000, 60_000))
    npz_header("empty.npz", (9, 4, 4))
    np.savez_compressed("flipped.npz", images=images, labels=labels)
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[120] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    np.savez("stored.npz", images=images, labels=labels)
    content = bytearray((tmp_path / "stored.npz").read_bytes())
    content[content.index(images.tobytes()) + 70] ^= 255
    (tmp_path / "stored.npz").write_bytes(content)
    (tmp_path / "zero.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", images)
    (tmp_path / "array.npy").rename("array.npz")
    (tmp_path / "folder.npz").mkdir()
    cases += [
        ("consistency.py --loss imf --data bomb.npz", "labels are int64 [1]"),
        ("consistency.py --loss imf --data bomb9.npz", "expected at most 512"),
    ]
    for name in ("empty", "flipped", "stored", "zero", "array"):
        cases.append((f"consistency.py --loss imf --data {name}.npz", "not a readable .npz without pickled objects"))
    cases.append(("consistency.py --loss imf --data folder.npz", "folder.npz: no such file"))
    refuse_all(tmp_path, cases, capsys, monkeypatch)
    headers = dict(images=((10 ** 9, 64, 64), np.dtype(np.uint8)))
    with pytest.raises(common.BadInput, match="unpack to 4096 GB"):        # before it reads
        data.read_npz_arrays("nowhere.npz", "nowhere.npz", headers, ["images"], share=1 / 16)


def test_images_that_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("good.png")
    good = (tmp_path / "good.png").read_bytes()
    contents = dict(
        none=b"P6 0 0 255\n", narrow=b"P6 0 4 255\n", huge=b"P6 60000 60000 255\n" + b"\0" * 90, zero=b"",
        text=b"hello", program=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        strip=b"P6 1 60000 255\n" + b"\0" * 180_000, cut=good[:40], flipped=good[:45] + b"\xff\xff" + good[47:],
    )
    for name, pixels in (("deep", np.zeros((8, 8), np.uint16)), ("floats", np.zeros((8, 8), np.float32))):
        Image.fromarray(pixels).save("deep.tif")
        contents[name] = (tmp_path / "deep.tif").read_bytes()
    for name, content in contents.items():
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / f"0.{'ppm' if content[:2] == b'P6' else 'png'}").write_bytes(content)
    cases = [(f"consistency.py --loss imf --data {name}", "a/0.p") for name in contents]
    Image.new("RGB", (8, 6)).save(tmp_path / "oblong.png")
    (tmp_path / "oblong" / "a").mkdir(parents=True)
    (tmp_path / "oblong.png").rename("oblong/a/0.png")
    cases.append(("consistency.py --loss imf --data oblong", "has 8 x 6 pixels, expected square images"))
    (tmp_path / "pipe" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe" / "a" / "0.png")
    os.mkfifo(tmp_path / "pipe.pt")
    cases.append(("consistency.py --loss imf --data pipe", "a/0.png: not a readable image (it is a pipe)"))
    cases.append(("evaluate.py grid pipe.pt", "pipe.pt: is a pipe, expected a model.pt"))
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "a" / "0.png").write_bytes(good)
    (tmp_path / "empty").mkdir()
    cases.append(("consistency.py --loss imf --data one", "at least two images"))
    cases.append(("consistency.py --loss imf --data empty", "no images in class folders"))
    refuse_all(tmp_path, cases, capsys, monkeypatch)
    for name in contents:
        assert data.read_image(next((tmp_path / name / "a").iterdir()), 16) is None, name
        with pytest.raises(common.BadInput, match="not a readable image"):
            fid.image_source(tmp_path / name)[1](0, 1)
    Image.new("1", (10_000, 9_000)).save("large.png")               # so many pixels that Pillow warns, but opens it
    with pytest.raises(common.BadInput, match="large.png: not a readable image .its size is 10000 x 9000."):
        data.read_rgb("large.png")


# ---- latents ---------------------------------------------------------------------------------------------------------

def test_bad_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(vae.VAE(**TINY_VAE).state_dict(), "vae.pt")
    z = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 2
    good = dict(latents=z, latents_flip=z.flip(3).contiguous(), labels=labels)
    stats = dict(mean=torch.zeros(1, 4, 1, 1), std=torch.ones(1, 4, 1, 1))
    train = "consistency.py --loss imf --size tiny --data"
    cases = []

    def folder(name, words, tensors=None, stats=stats, meta=None):
        (tmp_path / name).mkdir()
        save_file({k: v.contiguous() for k, v in (tensors or good).items()}, f"{name}/0.safetensors")
        torch.save(stats, f"{name}/latents_stats.pt")
        if meta is not None:
            (tmp_path / name / "meta.json").write_text(meta)
        cases.append((f"{train} {name}", words))

    def both(view):
        return good | dict(latents=view, latents_flip=view.clone())

    for i, wrong in enumerate([labels.bool(), labels.float(), labels.to(torch.uint64), labels[:3], labels[:, None],
                               labels.to(torch.uint16)]):
        folder(f"labels{i}", "do not fit together", good | dict(labels=wrong))
    folder("text", "n '8', expected", meta='{"classes": ["a", "b", "c"], "vae_hash": "", "n": "8"}')
    folder("high", "labels go up to", good | dict(labels=labels + 2 ** 60))
    folder("oblong", "expected [n, C, H, H]", both(z[..., :6]))
    folder("none", "expected [n, C, H, H]", dict(latents=z[:0], latents_flip=z[:0].clone(), labels=labels[:0]))
    folder("flat", "expected [n, C, H, H]", both(z[:, :, :0, :0]))
    folder("whole", "expected floating point", both(z.long()))
    folder("rank", "do not fit together", both(z[0]))
    for i, meta in enumerate(["", "{", "[]", "3", "{}", '{"classes": 3}', '{"classes": [], "vae_hash": ""}',
                              '{"classes": ["a", "b"], "vae_hash": 3}', "\0\1"]):
        folder(f"meta{i}", f"meta{i}/meta.json: not the meta.json", meta=meta)
    for i, wrong in enumerate([{}, dict(mean=stats["mean"]), dict(mean=stats["mean"], std=stats["std"] * 0),
                               dict(mean=stats["mean"] + torch.inf, std=stats["std"]),
                               dict(mean=stats["mean"], std=stats["std"] * torch.inf),
                               dict(mean=stats["mean"].long(), std=stats["std"].to(torch.complex64))]):
        folder(f"stats{i}", "expected mean and positive std", stats=wrong)
    folder("stats_list", "latents_stats.pt: ", stats=[1])
    folder("two", "--vae vae.pt: decodes latents of 4 channels, but --data two has 2", both(z[:, :2]),
           stats=dict(mean=torch.zeros(1, 2, 1, 1), std=torch.ones(1, 2, 1, 1)))
    cases[-1] = (f"{cases[-1][0]} --vae vae.pt", cases[-1][1])
    save_file(dict(other=z), "other.safetensors")
    save_file(dict(latents=z[0]), "rank.safetensors")
    (tmp_path / "zero.safetensors").write_bytes(b"")
    decode = "vae.py decode {}.safetensors --ckpt vae.pt --out d"
    cases += [
        (decode.format("other"), "other.safetensors: not a file with `latents`"),
        (decode.format("rank"), "latents are torch.float32 [4, 8, 8]"),
        (decode.format("zero"), "not a whole safetensors file"),
        (decode.format("nowhere"), "no such file"),
        ("vae.py check high", "labels go up to"),
    ]
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save("images/a/0.png")
    for i, content in enumerate(["", "{", "[]", "7", "\0"]):
        (tmp_path / f"encode{i}").mkdir()
        (tmp_path / f"encode{i}" / "encode.json").write_text(content)
        cases.append((f"vae.py encode --images images --ckpt vae.pt --size 16 --device cpu --out encode{i}",
                      f"encode{i}/encode.json: not the encode.json"))
    refuse_all(tmp_path, cases, capsys, monkeypatch)


def test_an_encoding_is_repaired(tmp_path, monkeypatch, capsys):
    """A damaged shard and what a killed process left are made anew; a second process is refused; so is a full disk."""
    monkeypatch.chdir(tmp_path)
    torch.save(vae.VAE(**TINY_VAE).state_dict(), "vae.pt")
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16), (90 * i, 9, 200)).save(f"images/a/{i}.png")
    command = "vae.py encode --images images --ckpt vae.pt --size 16 --shard 2 --workers 0 --device cpu --out out"

    def encode():
        common.main(vae.run, lambda: vae.parse_args(command.split()[1:]))

    encode()
    shard = tmp_path / "out" / "latents_rank00_shard001.safetensors"
    content = shard.read_bytes()
    latents = load_file(shard)["latents"].clone()                # not a view of the file
    odd = dict(count="9", sum=[1.0] * 4, square=[1.0] * 4)       # a shard whose sums are no numbers
    with safe_open(shard, "pt") as file:
        metadata = file.metadata() | dict(sums=json.dumps(odd))
    save_file(load_file(shard), tmp_path / "odd.safetensors", metadata)
    for damage in (b"", content[:100], b"\0" * 300, (tmp_path / "odd.safetensors").read_bytes()):
        shard.write_bytes(damage)
        (tmp_path / "out" / ".latents_rank00_shard000.safetensors.ab12.tmp").write_bytes(b"half")
        (tmp_path / "out" / "meta.json").write_text("{")
        encode()
        assert torch.equal(load_file(shard)["latents"], latents)
        assert not list((tmp_path / "out").glob("*.tmp"))
        assert data.load_data("out").num_classes == 1
    for name in ("meta.json", "encode.json"):                    # as while the first one runs
        (tmp_path / "out" / name).rename(tmp_path / name)
    (tmp_path / "out" / "encode.json").write_bytes((tmp_path / "encode.json").read_bytes())
    with vae.lock(tmp_path / "out" / ".lock", "encoding"):
        assert "is encoding there" in refusal(f"{command} --skip_bad 1", capsys, monkeypatch)
    assert (tmp_path / "out" / "encode.json").read_bytes() == (tmp_path / "encode.json").read_bytes()
    encode()

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device", path)

    shard.unlink()
    monkeypatch.setattr(vae, "save_file", full)
    before = sorted((tmp_path / "out").iterdir())
    assert "no space left on the disk" in refusal(command, capsys, monkeypatch)
    assert sorted((tmp_path / "out").iterdir()) == before
    capsys.readouterr()


# ---- references, arr_0, features -------------------------------------------------------------------------------------

def test_bad_references_and_images_for_fid(tmp_path, monkeypatch, capsys):
    """Refused before any network is loaded: the file of --inception is not even there."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    mu, sigma = np.zeros(2048), np.eye(2048, dtype=np.float32)
    np.savez("images.npz", arr_0=images)
    np.savez("good.npz", mu=mu, sigma=sigma)
    command = "evaluate.py --inception nowhere.pth --few 1"
    cases = []
    for i, arrays in enumerate([
        dict(mu=mu), dict(sigma=sigma), {}, dict(mu=mu[:9], sigma=sigma), dict(mu=mu, sigma=sigma[:, :9]),
        dict(mu=mu.astype(complex), sigma=sigma), dict(mu=mu.astype(str), sigma=sigma),
        dict(mu=mu + np.inf, sigma=sigma), dict(mu=mu, sigma=sigma, features=np.zeros((9, 7))),
        dict(mu=mu, sigma=sigma, features=np.zeros((3, 2048))), dict(mu=mu, sigma=sigma, features=np.zeros(2048)),
        dict(mu=mu, sigma=sigma, features=np.full((9, 2048), np.nan)),
        dict(mu=mu, sigma=-sigma), dict(mu=mu, sigma=np.triu(np.ones((2048, 2048), "f4"))),     # no covariance
    ]):
        np.savez(f"ref{i}.npz", **arrays)
        cases.append((f"{command} --from_images images.npz --ref ref{i}.npz", "expected finite mu [2048] and sigma"))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(content[:len(content) // 2])
    content[9000] ^= 1                                           # in mu: the CRC differs
    (tmp_path / "crc.npz").write_bytes(content)
    (tmp_path / "zero.npz").write_bytes(b"")
    os.mkfifo("pipe.npz")                                        # opening it would wait for ever
    cases.append((f"{command} --from_images images.npz --ref pipe.npz", "--ref pipe.npz: is a pipe"))
    for name in ("cut", "crc", "zero", "images.png"):
        words = "not a readable .npz" if name != "images.png" else "no such file"
        cases.append((f"{command} --from_images images.npz --ref {name}.npz", words))
    for i, arr_0 in enumerate([
        images.astype(float), images[0], images[..., :2], images[:0], images[:, :0], images.astype(bool), np.array(3),
        np.array(["a"]), images.transpose(0, 3, 1, 2), images.astype(complex),
    ]):
        np.savez(f"arr{i}.npz", arr_0=arr_0)
        cases.append((f"{command} --from_images arr{i}.npz --ref good.npz", f"arr{i}.npz: arr_0 is "))
        cases.append((f"{command} ref --data arr{i}.npz", f"arr{i}.npz: arr_0 is "))
    np.savez("one.npz", arr_0=images[:1])
    npz_header("none.npz", (9, 8, 8, 3))
    cases += [
        (f"{command} ref --data one.npz", "1 images are too few"),
        (f"{command} ref --data none.npz", "expected an .npz with arr_0"),
        (f"{command} ref --data nowhere.npz", "no such file"),
        (f"{command} ref --data nowhere", "holds no images"),
    ]
    np.savez("many.npz", arr_0=np.zeros((2048, 2, 2, 3), np.uint8))
    cases.append(("evaluate.py ref --data many.npz --inception nowhere.pth",
                  "2048 images give no covariance of 2048 features"))
    refuse_all(tmp_path, cases, capsys, monkeypatch)


def test_damaged_features_are_computed_again(tmp_path):
    calls = []

    def images(start, stop):
        return torch.arange(start, stop)

    def network(rows):
        calls.append(rows.tolist())
        return dict(features=rows[:, None].expand(-1, 2048).float(), logits=rows[:, None].expand(-1, 1008).float())

    def collect(identity):
        calls.clear()
        found = fid.collect(network, images, 5, tmp_path / "features", identity, batch=2)
        assert found["features"][:, 0].tolist() == [0, 1, 2, 3, 4]
        return len(calls)

    assert collect(dict(n=5)) == 3
    assert collect(dict(n=5)) == 0
    part = tmp_path / "features" / "features_000002.pt"
    good = torch.load(part, weights_only=True)
    for wrong in (b"", b"PK", part.read_bytes()[:3000]):
        part.write_bytes(wrong)
        assert collect(dict(n=5)) == 1
    for wrong in ({}, [1], dict(features=good["features"]), good | dict(logits=good["logits"][:1]),
                  good | dict(features=good["features"][:, :9])):
        torch.save(wrong, part)
        assert collect(dict(n=5)) == 1
    mine = tmp_path / "features" / "mine.txt"
    mine.write_text("precious")
    for wrong in ("", "{", "[]", '{"n": 6}', "\0"):
        (tmp_path / "features" / "identity.json").write_text(wrong)
        assert collect(dict(n=5)) == 3
    assert mine.read_text() == "precious"
    (tmp_path / "features" / "identity.json").unlink()           # without it they may be another program's
    with pytest.raises(common.BadInput, match="holds features_.*.pt and no identity.json"):
        collect(dict(n=5))
    assert len([*(tmp_path / "features").glob("features_*.pt")]) == 3
    with fid.lock(tmp_path / "features" / ".lock", "computing features"), pytest.raises(common.BadInput, match="there"):
        collect(dict(n=5))


@pytest.mark.slow
def test_a_damaged_classifier_is_trained_again(tmp_path, monkeypatch):
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    toy = data.Data(x, torch.arange(16) % 2, 2, [0.5], [0.2], "toy")
    trained = []
    original = metrics.train_classifier
    monkeypatch.setattr(metrics, "train_classifier", lambda net, data: (trained.append(1), original(net, data)))
    first = metrics.Features(toy, tmp_path).hash
    path = next(tmp_path.glob("features-*.pt"))
    good = torch.load(path, weights_only=True)
    assert metrics.Features(toy, tmp_path).hash == first and len(trained) == 1
    other = copy.deepcopy(good)
    other["0.weight"][0] = torch.nan
    net, whole = metrics.classifier(toy), path.read_bytes()
    assert metrics.load_classifier(net, path)
    for wrong in ({}, [1], dict(list(good.items())[1:]), good | {"0.weight": torch.zeros(3)}, other):
        torch.save(wrong, path)
        assert not metrics.load_classifier(net, path)
    for wrong in (b"", b"PK\3\4", whole[:1000]):
        path.write_bytes(wrong)
        assert not metrics.load_classifier(net, path)
    torch.save(good, path)
    bytes_of = bytearray(path.read_bytes())
    bytes_of[bytes_of.index(good["2.weight"].numpy().tobytes()) + 7] ^= 1               # a bit of a weight
    path.write_bytes(bytes_of)
    assert metrics.Features(toy, tmp_path).hash == first
    assert len(trained) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# ---- flags -----------------------------------------------------------------------------------------------------------

TRAINING = ["fsf_dmd.py", "dmd2.py", "sid.py", "twinflow.py --base imf", "consistency.py --loss imf"]


@pytest.mark.parametrize("script", TRAINING)
def test_numbers_beyond_any_machine(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokens = [] if script == "sid.py" else [("--n_tokens", "100000000")]
    rollout = [("--M", "100000000")] if script in ("fsf_dmd.py", "dmd2.py", "sid.py") else []
    cases = []
    for flag, value in [("--seed", "99999999999999999999"), ("--batch_size", "99999999999999"), ("--steps", "1" * 400),
                        ("--micro_batch", "9" * 20), ("--lr", "inf"), ("--seed", "1" * 5000), *tokens, *rollout]:
        cases.append((f"{script} {flag} {value}", f"{flag}: {value[:40]} is out of range, expected a"))
    for flag in ["--lr", *(["--fake_lr"] if script in ("dmd2.py", "sid.py") else []),
                 *([] if script == "sid.py" else ["--huber_c"]), "--omega"]:
        cases.append((f"{script} {flag} 1e39", f"{flag}: 1e39 is out of range"))
    if script != "sid.py":                                      # rounding alone is left of the difference; c^2 is 0
        cases += [(f"{script} --fd_h 1e-9", "--fd_h: 1e-9 is out of range"),
                  (f"{script} --huber_c 1e-30", "--huber_c: 1e-30 is out of range")]
    for flag in ("--init", "--out", "--vae", "--data"):                 # a shell variable that is not set
        cases += [(f"{script} {flag} ''", f"{flag}: has an empty value"), (f"{script} {flag}=", "has an empty value")]
    cases.append((f"{script} --device meta --out o", "--device meta: not usable here"))
    cases.append((f"{script} --device 'cpu\nx' --out o", "--device cpu x: "))           # one line, whatever is in it
    refuse_all(tmp_path, cases, capsys, monkeypatch)


def test_numbers_of_the_other_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encode = "vae.py encode --images a --ckpt b --out c"
    refuse_all(tmp_path, [
        ("evaluate.py a.pt --seed 99999999999999999999", "--seed: 9"),
        ("evaluate.py a.pt --n 99999999999999999999", "--n: 9"),
        ("evaluate.py a.pt --steps 99999999999999999999", "--steps: 9"),
        ("evaluate.py a.pt --batch_size 99999999999999", "--batch_size: 9"),
        (f"{encode} --seed 99999999999999999999", "--seed: 9"),
        (f"{encode} --size 100000000", "--size: 1"),
        (f"{encode} --workers 100000000", "--workers: 1"),
        (f"{encode} --batch_size 99999999999999", "--batch_size: 9"),
    ], capsys, monkeypatch)
    (tmp_path / "file").write_text("")                                  # where a folder is asked for: before any work
    refuse_all(tmp_path, [
        ("evaluate.py a.pt --out file", "--out: file: exists and is no run folder but a file"),
        ("reproduce.py 2 --runs file", "--runs: file: exists"),
        ("reproduce.py 2 --out file/a", "--out: file/a: Not a directory"),
        ("search.py weak --runs file", "--runs: file: exists"),
        ("cost.py --out file", "--out: file: exists"),
        ("vae.py decode a --ckpt b --out file", "--out: file: exists"),
    ], capsys, monkeypatch)
    for name, value, said in (("WORLD_SIZE", "x", "WORLD_SIZE=x"), ("WORLD_SIZE", "0", "WORLD_SIZE=0"),
                              ("RANK", "-1", "RANK=-1"), ("RANK", "1", "RANK=1 of WORLD_SIZE=1")):
        monkeypatch.setenv(name, value)
        refuse_all(tmp_path, [("sid.py --out o", f"{said}: expected what torchrun sets")], capsys, monkeypatch)
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_all(tmp_path, [(command, "leave torchrun out")
                          for command in ("reproduce.py 2", "search.py weak", "cost.py")], capsys, monkeypatch)
    monkeypatch.delenv("WORLD_SIZE")
    assert flags.number(int, 0, flags.SEED)(str(2 ** 32 - 1)) == 2 ** 32 - 1


# ---- nothing in a file runs ------------------------------------------------------------------------------------------

class Writes(torch.nn.Module):
    """A scripted module that writes a file when torch.jit.load makes it again."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: typing.Tuple[torch.Tensor, bool]):        # noqa: UP006  (TorchScript's spelling)
        torch.save(state[0], "written.pt")
        self.weight = state[0]
        self.training = state[1]


class Holds(torch.nn.Module):
    """Tensors that share, transpose and offset their storage, beside values with a type."""

    sizes: typing.List[int]                                      # noqa: UP006

    def __init__(self, inner):
        super().__init__()
        both = torch.arange(12.0)
        self.register_buffer("tail", both[6:])
        self.register_buffer("turned", both[:6].view(2, 3).T)
        self.register_buffer("small", torch.ones(2, dtype=torch.float16))
        self.sizes = [1, 2]
        self.inner = inner

    def forward(self, x):
        return x


def test_a_torchscript_archive_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Holds(torch.nn.Linear(2, 2))).save("good.pt")
    found, expected = inception.read_torchscript("good.pt"), torch.jit.load("good.pt").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in found)

    for module in (Writes(), Holds(Writes())):
        torch.jit.script(module).save("evil.pt")
        assert not (tmp_path / "written.pt").exists()
        with pytest.raises(common.BadInput, match="not this Inception network"):
            inception.load_inception("evil.pt")
        with pytest.raises(common.BadInput, match="evil.pt"):
            checkpoints.load_checkpoint("evil.pt")
        with pytest.raises(common.BadInput, match="evil.pt"):
            vae.load_vae("evil.pt")
        assert not (tmp_path / "written.pt").exists()
    torch.jit.load("evil.pt")
    assert (tmp_path / "written.pt").exists()                    # it would have

    # A pickle that names anything else, storages that are not what they say, damage.
    members = {}
    with zipfile.ZipFile("good.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickles = "good/data.pkl"
    wrong = [
        {pickles: b"cos\nsystem\n(S'touch written'\ntR."}, {pickles: b"cbuiltins\neval\n(S'1'\ntR."}, {pickles: b""},
        {pickles: members[pickles][:50]}, {"good/data/0": b"12"}, {"good/data/0": None}, {pickles: None},
        {pickles: b"ctorch._utils\n_rebuild_tensor_v2\n(N(tR."},
    ]
    for change in wrong:
        with zipfile.ZipFile("bad.pt", "w") as archive:
            for name, content in (members | change).items():
                if content is not None:
                    archive.writestr(name, content)
        with pytest.raises(common.BadInput, match="bad.pt: not a whole archive"):
            inception.load_inception("bad.pt")
    (tmp_path / "bad.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:900])
    with pytest.raises(common.BadInput, match="bad.pt"):
        inception.load_inception("bad.pt")
    assert not (tmp_path / "written").exists()
