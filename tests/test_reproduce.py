"""Tables (see test_all.py): rows as commands, statistics, kept runs, and real runs of reproduce.py and cost.py."""
import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
import dmd2
import evaluate
import reproduce
import search
from common import BadInput
from data import data_kind, load_data
from metrics import Features
from model import DiscriminatorHead, LightningDiT, fixed_guidance
from plumbing import files, kept_runs, passes, report
from plumbing.checkpoints import load_checkpoint, load_network
from test_helpers import HERE, assert_same, environment, refusal, small_images, state, train

PAPER = json.loads((HERE / "golden" / "paper_tables.json").read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with random latents and tiny starts: imf.pt, fm.pt."""
    folder = tmp_path_factory.mktemp("inputs")
    cost.random_inputs(folder, "tiny")
    return folder


def arguments(*argv):
    return reproduce.parse_args([*argv, "--list"])


# ---- Rows, commands, statistics --------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", ["digits", "images", "latents"])
def test_every_row_is_a_command_that_its_script_accepts(inputs, data, monkeypatch, capsys):
    """No row passes a flag that its script refuses, on any kind of data; no two rows of a table are one run."""
    source = {"digits": "digits", "latents": str(inputs / "latents"), "images": str(inputs / "images.npz")}[data]
    if data == "images":
        np.savez(source, images=np.zeros((2, 28, 28), np.uint8), labels=np.arange(2))
    for table, (_, reference, rows) in reproduce.TABLES.items():
        assert 1 <= reference <= len(rows)
        args = arguments(table, "--data", source)
        jobs = reproduce.jobs_of(args, dict(enumerate(rows, 1)), 3)
        assert len({job.folder for job in jobs.values()}) == len(rows)
        for each in jobs.values():
            script, *argv = each.command
            for i, word in enumerate(argv):
                if word.endswith("model.pt"):                         # the start, which nobody has trained here
                    argv[i] = str(inputs / ("fm.pt" if "lossfm" in word else "imf.pt"))
            parsed = importlib.import_module(script[:-3]).parse_args(argv)
            assert script == "evaluate.py" or parsed.seed == 3


def test_list_prints_what_would_run(capsys, monkeypatch, tmp_path):
    """Starts first, then each row's command for each seed.

    The strong start is twice as long, and its control as much longer as a distillation.
    """
    reproduce.run(arguments("2", "--start", "strong", "--seeds", "2"))
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 2 * 2 + 12 * 2
    for command in commands:
        assert re.match(r"python \w+\.py .* --out runs/reproduce/digits/\S+-seed[01]$", command)
    folder = "runs/reproduce/digits/consistency-lossimf-steps800-seed0"
    assert commands[0] == f"python consistency.py --loss imf --steps 800 --seed 0 --out {folder}"
    assert "--steps 1000 --seed 1" in commands[-3]                    # before the row that starts from row 3
    assert "--teacher runs/reproduce/digits/consistency-lossimf-steps800-seed1/model.pt" in commands[-1]
    assert "# row 7: FSF-DMD M=2 (the paper: 3.85, at 4000)" in lines
    monkeypatch.chdir(tmp_path)                                       # to be pasted there
    reproduce.run(arguments("2", "--row", "3", "--seeds", "1"))
    assert f"\npython {HERE}/consistency.py --loss cd " in capsys.readouterr().out


@pytest.mark.parametrize("table", ["2", "4", "5"])
def test_another_size_is_that_of_what_is_trained_from_scratch(inputs, table, monkeypatch):
    """--size goes to the starts and to rows without one, --precision to all training; the runs have other folders."""
    monkeypatch.chdir(inputs)
    np.savez("images.npz", images=np.zeros((2, 28, 28), np.uint8), labels=np.arange(2))
    rows = dict(enumerate(reproduce.TABLES[table].rows, 1))
    flags = ["--data", "images.npz", "--size", "medium", "--precision", "bf16"]
    presets = reproduce.jobs_of(arguments(table, *flags[:2]), rows, 0)
    larger = reproduce.jobs_of(arguments(table, *flags), rows, 0)
    for r, job in larger.items():
        assert job.folder != presets[r].folder
        for each in kept_runs.chain(job):                             # the row, and what it starts from
            script, *argv = each.command
            if script == "evaluate.py":
                assert not {"--size", "--precision"} & set(argv)
            elif "--init" in argv and "scratch" not in argv:          # the network of a file that is not there
                assert "--size" not in argv and argv[argv.index("--precision") + 1] == "bf16"
            else:
                args = importlib.import_module(script.removesuffix(".py")).parse_args(argv)
                assert (args.size, args.precision) == ("medium", "bf16")


def test_rows_are_the_papers_and_its_lost_numbers_stay_lost():
    counts = {name: len(table.rows) for name, table in reproduce.TABLES.items()}
    assert counts == {"2": 8 + 4, "3": 9, "4": 6 + 3, "5": 6 + 2, "7": 16, "8": 5, "9": 9, "10": 10}
    fids = {name: [row.paper.get("fid") for row in table.rows] for name, table in reproduce.TABLES.items()}
    assert fids["2"][:8] == [9.1, 8.54, 6.06, 4.18, 4.2, 4.67, 3.85, 3.96]
    assert fids["5"] == [None] * 8
    assert fids["7"][:8] == [row[1] for row in PAPER["table7"]["rows"]]
    assert fids["7"][8:] == [row[2] for row in PAPER["table7"]["rows"]]
    assert fids["9"] == [3.97, 3.87, 3.98, 3.99, 4.03, 3.85, 3.85, 3.94, 3.98]
    assert report.paper_text(reproduce.TABLES["5"].rows[0].paper) == "- / -, 0.78 s/step (A100)"
    labels = {name: [row.label for row in table.rows] for name, table in reproduce.TABLES.items()}
    assert labels["3"] == [row[0] for row in PAPER["table3"]["rows"]]
    assert labels["10"] == [row[0] for row in PAPER["table10"]["rows"]]


@pytest.mark.parametrize("data", ["digits", "images.npz", "latents"])
def test_the_controls_of_table_5_have_the_passes_of_twinflow(inputs, data, monkeypatch):
    """iMF and RCGM, trained on for what TwinFlow on them takes in forward passes: to 1%."""
    monkeypatch.chdir(inputs)
    np.savez("images.npz", images=np.zeros((2, 28, 28), np.uint8), labels=np.arange(2))
    jobs = reproduce.jobs_of(arguments("5", "--data", data), dict(enumerate(reproduce.TABLES["5"].rows, 1)), 0)
    total = {}
    for row, job in jobs.items():
        script, *argv = job.command
        args = importlib.import_module(script.removesuffix(".py")).parse_args(argv)
        total[row] = passes.passes_until(script, vars(args), args.steps)
    for alone, twinflow, control in ((1, 3, 7), (4, 5, 8)):
        assert total[control] == pytest.approx(total[twinflow], rel=0.01)
        assert total[control] > 2 * total[alone]


def fake_row(values):
    """A row of `summary` with the fd at 2 steps of each seed; IS falls as it rises."""
    seeds = {s: dict(evaluations=[dict(step=9, fd_2step=v, is_2step=10 - v)]) for s, v in values.items()}
    return dict(seeds=seeds, N=2)


def test_differences_are_paired_over_seeds_and_corrected_for_many_rows():
    base = {0: 10.0, 1: 20.0, 2: 40.0}
    rows = {
        1: fake_row(base),
        2: fake_row({0: 11.0, 1: 22.0, 2: 43.0}),
        3: fake_row({0: 10.0, 1: 20.0, 2: 40.0}),
        4: fake_row({0: 9.9, 1: 19.9, 2: 39.7}),
    }
    found = report.compare(rows, 1, "fd")
    assert found[2][0] == pytest.approx(2)
    assert found[3] == [0.0, 1.0]
    # Row 2: differences 1, 2, 3 have mean 2 and deviation 1; Student's t with 2 degrees of freedom in closed form.
    t = 2 * math.sqrt(3)
    p2 = 1 - t / math.sqrt(t * t + 2)
    p4 = scipy.stats.ttest_1samp([-0.1, -0.1, -0.3], 0).pvalue
    small, large = sorted([p2, p4])
    assert sorted([found[2][1], found[4][1]]) == pytest.approx(sorted([3 * small, max(3 * small, 2 * large)]))
    assert 1 not in found
    assert report.compare(rows, 1, "is")[2][0] == pytest.approx(-2)
    # A row whose p is hardly larger is not called clearer than the one before it.
    near = {1: fake_row(base), 2: fake_row({0: 11.0, 1: 22.0, 2: 43.0}), 3: fake_row({0: 11.0, 1: 22.0, 2: 43.1})}
    assert report.compare(near, 1, "fd")[2][1] == report.compare(near, 1, "fd")[3][1] == pytest.approx(2 * p2)
    # The band of the curves: differences 1, 2, 3 have the standard error 1 / sqrt(3).
    values = np.array([[row["fd_2step"] for row in run["evaluations"]] for run in rows[2]["seeds"].values()])
    assert report.paired_error(rows[2], rows[1], "fd_2step", [9], values) == pytest.approx(1 / math.sqrt(3))
    one_seed = {1: fake_row({0: 1.0}), 2: fake_row({0: 2.0})}
    assert report.compare(one_seed, 1, "fd") == {}                    # shows nothing
    # Rows 4 and 5 are one sampler under two names: they count once.
    twins = report.compare(rows | {5: fake_row({0: 9.9, 1: 19.9, 2: 39.7})}, 1, "fd")
    assert twins[4] == twins[5] and twins[4] == pytest.approx(found[4]) and twins[2] == pytest.approx(found[2])
    assert report.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert report.spread([1.0], 1) == "1.0"
    assert report.spread([], 1) == "-"


@pytest.mark.slow
def test_latents_are_trained_in_pieces_and_the_best_fid_is_found(inputs, tmp_path):
    latents, start = inputs / "latents", inputs / "imf.pt"
    args = argparse.Namespace(data=str(latents), vae="V",
                              size=None, precision=None, inception="W", ref="R", n=2000, fid_every=1500, table="2",
                              jobs=1, start="weak", init=str(start), runs=tmp_path)
    rows = {r: reproduce.TABLES["2"].rows[r - 1] for r in (1, 2, 7)}
    jobs = reproduce.jobs_of(args, rows, 0)
    runner, folder = kept_runs.Runner(args), jobs[7].folder
    lines = [shlex.join(line) for line in runner.commands(jobs[7])]
    train = f"fsf_dmd.py --init {start} --M 2 --data {latents} --seed 0 --out {folder} --vae V --steps "
    assert [line.removeprefix(train) for line in lines[::2]] == ["1500", "3000", "4000"]      # Table 6: 4,000 steps
    assert lines[1] == (f"evaluate.py {folder}/fid_001500_2step/model.pt --data {latents} --steps 2 --vae V "
                        f"--inception W --ref R --n 2000 --few 1 --out {folder}/fid_001500_2step")
    [teacher], [pretrained] = runner.commands(jobs[2]), runner.commands(jobs[1])
    assert "euler" in teacher and teacher[teacher.index("--steps") + 1] == "25"
    assert pretrained[:2] == ["evaluate.py", str(start)] and "2" in pretrained

    for at, fid in ((1500, 5.0), (3000, 4.0), (4000, 4.5)):
        out = folder / f"fid_{at:06d}_2step"
        out.mkdir(parents=True)
        measured = {"fid": fid, "is": 200.0, "precision_inception": 0.6, "recall_inception": 0.5, "n": 2000}
        (out / "fid.json").write_text(json.dumps(measured))
    # Interrupted and restarted: no FID is measured twice.
    assert runner.commands(jobs[7]) == [[*jobs[7].command, "--vae", "V", "--steps", "4000"]]
    run = report.collect(jobs[7], data_kind(args.data))
    assert [e["fd_2step"] for e in run["evaluations"]] == [5.0, 4.0, 4.5]
    last = dict(step=4000, fd_2step=4.5, is_2step=200.0, precision_2step=0.6, recall_2step=0.5)
    assert run["evaluations"][2] == last
    row = report.summary({7: rows[7]}, {7: {0: run}})[7]
    assert row["best"] == [4.0] and row["step"] == [3000] and row["last"]["fd_2step"] == [4.5]


def test_a_number_of_steps_that_some_seeds_lack_is_left_out():
    """Table 5 measures the FID of 1 step too, Table 2 that of 2 alone, and both have the iMF."""
    both, one = ([dict(step=1, **values)] for values in (dict(fd_1step=5.0, fd_2step=4.0), dict(fd_2step=6.0)))
    runs = {seed: dict(evaluations=each, sec_per_step=None, memory_gb=None) for seed, each in enumerate((both, one))}
    found = report.summarise(1, reproduce.TABLES["2"].rows[0], runs)
    assert found["last"] == dict(fd_2step=[4.0, 6.0]) and found["n"] == 2


def test_the_number_of_sampling_steps_of_a_row_is_the_one_that_was_measured():
    """250 Euler steps on latents (Table 4), 1 and 2 steps otherwise; the label says Euler's."""
    row = reproduce.TABLES["4"].rows[0]
    for keys, N in ((["fd_250step"], 250), (["fd_25step"], 25), (["fd_1step", "fd_2step"], 2), (["fd_1step"], 1)):
        steps = [dict(step=0) | dict.fromkeys(keys, 3.0)]
        run = dict(evaluations=steps, sec_per_step=None, memory_gb=None, passes=None)
        found = report.summarise(1, row, {0: run})
        assert found["N"] == N and found["best"] == [3.0]
    assert report.summarise(1, row, {})["N"] == 2


def test_passes_before_a_row_from_a_distilled_network_and_seconds_after_its_warmup(tmp_path):
    flags = dict(script="x", start="imf", mask_prob=0.5, omega_max=1.0, M=2, rollout="flow_map", rollout_grad="all",
                 warmup=10, lam=0.1, loss="cd")
    for name in ("cd", "fsf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(flags))
        evaluations = [dict(step=20, fd_2step=1.0)]
        (tmp_path / name / "result.json").write_text(json.dumps(dict(evaluations=evaluations)))
    net = LightningDiT("tiny", "in_context", in_channels=1, input_size=8, num_classes=10)
    torch.save(dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=40), tmp_path / "cd/model.pt")
    lines = [dict(step=step, sec_per_step=1.0 if step <= 10 else 3.0) for step in (5, 10, 15, 20)]
    (tmp_path / "fsf" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = kept_runs.Job(tmp_path / "cd", ("consistency.py", "--loss", "cd"), (), None)
    alone = kept_runs.Job(tmp_path / "fsf", ("fsf_dmd.py",), (), None)
    after = kept_runs.Job(tmp_path / "fsf", ("fsf_dmd.py", "--teacher", "start.pt"), (), first)
    own, both = (report.collect(job, "pixels") for job in (alone, after))
    assert own["sec_per_step"] == 3.0 and own["evaluations"][0]["passes"] == 10 * 5 + 10 * 13
    assert both["evaluations"][0]["passes"] == own["evaluations"][0]["passes"] + 40 * 5


def test_a_run_that_diverged_stands_in_the_table(tmp_path):
    """result.json has null where a metric was not finite: the table shows it, and it is not the best evaluation."""
    runs = {}
    for seed, values in ((0, [None, 30.0]), (1, [20.0, 25.0]), (2, [None, None])):
        folder = tmp_path / str(seed)
        folder.mkdir()
        evaluations = [dict(step=s, fd_2step=v, is_2step=None) for s, v in zip((100, 200), values, strict=True)]
        (folder / "result.json").write_text(json.dumps(dict(evaluations=evaluations)))
        runs[seed] = report.collect(kept_runs.Job(folder, ["dmd2.py"], [], None), "pixels")
    table = reproduce.TABLES["7"]
    rows = report.summary({13: table.rows[12], 14: table.rows[13]}, {13: runs, 14: runs})
    np.testing.assert_equal(rows[13]["best"], [30.0, 20.0, np.nan])
    assert rows[13]["step"][:2] == [200, 100] and "| nan ± nan |" in report.markdown("pixels", table, rows)
    head = dict(table="7")
    stored = json.loads(report.runs_json(head, rows, {13: "a", 14: "b"}))["rows"][0]
    assert [e["fd_2step"] for e in stored["seeds"]["0"]["evaluations"]] == [None, 30.0]


def test_bad_flags_end_in_one_line(capsys, monkeypatch, inputs):
    odd = np.random.default_rng(0).integers(0, 256, (400, 27, 27), np.uint8)
    np.savez(inputs / "odd.npz", images=odd, labels=np.arange(400) % 2)
    for command, words in (
        ("reproduce.py 6", "invalid choice"),
        ("reproduce.py cost", "invalid choice"),
        ("reproduce.py 2 --row 13", "expected 1 to 12"),
        ("reproduce.py 5 --start strong", "--start strong: the strong start is an iMF, and table 5 has none"),
        ("reproduce.py 4 --start strong", "--start strong: the strong start is an iMF, and table 4 has none"),
        ("reproduce.py 2 --seeds 0", "--seeds"),
        ("reproduce.py 2 --seed 3", "unrecognized arguments: --seed 3"),         # it is no --seeds 3
        (f"reproduce.py 2 --data {inputs}/latents", "needs --vae, --inception and --ref"),
        (f"reproduce.py 2 --data {inputs}/latents --vae nowhere --inception {inputs}/imf.pt --ref {inputs}/imf.pt",
         "nowhere: no such file, expected a file of weights"),        # before any training
        ("reproduce.py 2 --vae x", "does nothing"),
        ("reproduce.py 2 --vae x --n 5", "--n, --vae: does nothing for table 2 on digits"),
        ("reproduce.py 2 --size huge", "invalid choice"),
        (f"reproduce.py 2 --init {inputs}/imf.pt --size tiny", "the network is that of --init"),
        (f"reproduce.py 2 --size medium --data {inputs}/odd.npz", "has 27 x 27 pixels, expected a multiple of 2"),
        (f"reproduce.py 5 --init {inputs}/imf.pt", "start from scratch"),
        (f"reproduce.py 10 --init {inputs}/imf.pt", "start from fm and imf"),
        (f"reproduce.py 4 --init {inputs}/imf.pt", "start from fm"),
        ("reproduce.py 2 --init nowhere.pt", "no such file"),
        (f"reproduce.py 2 --init {HERE}/README.md", "not a model.pt"),
        ("cost.py --size huge", "invalid choice"),
        ("cost.py --seeds 3 --jobs 2", "--seeds 3 --jobs 2"),
        ("cost.py --row 22", "expected 1 to 21"),
    ):
        assert words in refusal(command, capsys, monkeypatch), command


def test_a_second_start_of_cost_waits_its_turn_and_fewer_seeds_replace_no_table(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with files.lock(tmp_path / "runs" / "cost.lock", "measuring costs"):
        said = refusal("cost.py --size tiny --row 1 --runs runs", capsys, monkeypatch)
    assert "is measuring costs there; wait for it, or choose another --runs" in said
    (tmp_path / "table5-digits").mkdir()
    kept = (HERE / "results" / "table5-digits" / "runs.json").read_text()
    (tmp_path / "table5-digits" / "runs.json").write_text(kept)
    said = refusal("reproduce.py 5 --seeds 1 --out .", capsys, monkeypatch)
    assert "--seeds 1: table5-digits holds the table of 5; pass as many, or another --out" in said
    said = refusal("reproduce.py 5 --data mine/digits --out .", capsys, monkeypatch)    # a folder of that name
    assert "table5-digits: holds the results of --data digits; pass another --out" in said
    # Data and --init are known by their path or by what they hold.
    inputs = dict(data=["/a/toy.npz", "01"], init=["/a/net/model.pt", "23"])
    (tmp_path / "table5-digits" / "runs.json").write_text(json.dumps(dict(data="toy.npz", inputs=inputs, rows=[])))
    for same in (dict(data=["/b/toy.npz", "01"]), dict(init=["/a/net/model.pt", "45"], data=["/a/toy.npz", "67"])):
        report.refuse_other_results(tmp_path / "table5-digits", "../toy.npz", same)
    for name in inputs:
        other = inputs | {name: ["/b/model.pt", "89"]}
        with pytest.raises(BadInput, match=f"holds the results of another --{name} of that name, {inputs[name][0]};"):
            report.refuse_other_results(tmp_path / "table5-digits", "toy.npz", other)


def test_failed_runs_replace_no_fuller_table_and_no_fuller_search(monkeypatch, tmp_path):
    """The runs fail at once: folders of their names are there that no command of ours made."""
    monkeypatch.chdir(tmp_path)
    rows = ["--row", "1", "6", "--seeds", "5"]
    shutil.copytree(HERE / "results" / "table5-digits", "table5-digits-row1-6")
    jobs = [reproduce.jobs_of(arguments("5", *rows), dict(enumerate(reproduce.TABLES["5"].rows, 1)), seed)
            for seed in range(5)]
    for of_seed in jobs:
        for job in of_seed.values():
            job.folder.mkdir(parents=True, exist_ok=True)
    before = Path("table5-digits-row1-6/runs.json").read_bytes()
    with pytest.raises(BadInput, match="10 runs failed, so the fuller table in table5-digits-row1-6 stays: "):
        reproduce.run(reproduce.parse_args(["5", *rows, "--out", "."]))
    assert Path("table5-digits-row1-6/runs.json").read_bytes() == before

    def a_run(setting, seed, distance, runs="runs/reproduce", definition=""):
        """The kept run of a setting of the search, or its folder alone."""
        args = argparse.Namespace(data="digits", init=None,
                                  size=None, precision=None, runs=Path(runs), start="weak", table=None)
        job = search.one_run(args, None, f"{search.FROM_SCRATCH['iMF'][0]} {setting}", seed)
        shutil.rmtree(job.folder, ignore_errors=True)
        kept_runs.beside(job, ".json").unlink(missing_ok=True)
        job.folder.mkdir(parents=True)
        if distance:
            torch.save({}, job.folder / "model.pt")
            result = dict(evaluations=[dict(step=400, fd_2step=distance)], definition=definition)
            (job.folder / "result.json").write_text(json.dumps(result))
            kept_runs.beside(job, ".json").write_text(json.dumps(dict(kept_runs.identity(job), done=True)))

    # Of the search's settings the two nearest ones are run on the second seed.
    for setting, distance in zip(search.FROM_SCRATCH["iMF"][1], (30.0, 10.0, 40.0, 20.0), strict=True):
        a_run(setting, 100, distance)
        a_run(setting, 101, None)
    only = search.parse_args("scratch --method iMF --out .".split())
    with pytest.raises(BadInput, match="2 runs failed: ") as caught:
        search.run(only)
    assert sorted(re.findall(r"lr([\d.]+)-seed(\d+)", str(caught.value))) == [("0.006", "101"), ("0.024", "101")]
    page = Path("search-digits-scratch-iMF/README.md").read_text()
    assert "| iMF | `--lr 0.006` | 10.0 | 10.0 |" in page and "**" not in page.split("| method |")[1]
    for setting in search.FROM_SCRATCH["iMF"][1]:
        a_run(setting, 100, None)
    with pytest.raises(BadInput, match="4 runs failed, so the fuller search in search-digits-scratch-iMF stays: "):
        search.run(only)
    elsewhere = search.parse_args("scratch --method iMF --out . --runs elsewhere".split())
    with pytest.raises(BadInput, match="4 runs failed, so the fuller search in search-digits-scratch-iMF stays: "):
        for setting in search.FROM_SCRATCH["iMF"][1]:
            a_run(setting, 100, None, "elsewhere")
        search.run(elsewhere)
    assert Path("search-digits-scratch-iMF/README.md").read_text() == page

    # Other finalists without a failure: an earlier one has a seed less than before.
    for setting, distance in zip(search.FROM_SCRATCH["iMF"][1], (10.0, 30.0, 40.0, 20.0), strict=True):
        a_run(setting, 100, distance)
        a_run(setting, 101, distance + 2)
    earlier = json.loads(Path("search-digits-scratch-iMF/runs.json").read_text())
    for row in earlier["rows"]:
        row["distance"] = [10.0, 12.0]
    Path("search-digits-scratch-iMF/runs.json").write_text(json.dumps(earlier))
    search.run(only)
    assert "| iMF | `--lr 0.006` | 30.0 | 30.0 |" in Path("search-digits-scratch-iMF/README.md").read_text()

    # Distances in the features of two classifiers are not compared.
    for setting, weights in zip(search.FROM_SCRATCH["iMF"][1], ("aaaaaaaa", "bbbbbbbb")):
        a_run(setting, 100, 10.0, definition=f"fd in 64 features of a classifier of digits (weights {weights}); ...")
    with pytest.raises(BadInput, match="measured in several ways .classifier aaaaaaaa, classifier bbbbbbbb."):
        search.run(only)


# Stand-ins for a script that trains and for evaluate.py: what a runner does around them is what is tested.
TRAINS = """import pathlib, sys, zipfile
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if "--dry_run" in sys.argv:
    sys.exit(print("--steps 4"))
out.mkdir(parents=True, exist_ok=True)
(out / "argv.txt").write_text(" ".join(sys.argv))
zipfile.ZipFile(out / "model.pt", "w").close()
(out / "metrics.jsonl").write_text('{"step": 4}\\n')
(out / "result.json").write_text("{}")
"""
MEASURES = """import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "features").mkdir(parents=True, exist_ok=True)
(out / "fid.json").write_text('{"kept": %d}' % len([*(out / "features").iterdir()]))
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder of stand-ins, in place of the project's."""
    for module in (kept_runs, files):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, text in (("trains.py", TRAINS), ("evaluate.py", MEASURES)):
        (tmp_path / name).write_text(text)
    kept_runs.look_again()
    yield argparse.Namespace(jobs=1, runs=tmp_path / "runs", data="latents")
    kept_runs.look_again()


def test_runs_share_the_cores_and_a_number_of_threads_that_the_user_set_stays(stand_ins, monkeypatch, tmp_path):
    (tmp_path / "shows.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 4}, raising=False)       # of a cluster
    cores = 5
    assert kept_runs.default_jobs() == cores and "(5 cores, 2 runs" in kept_runs.machine(2)
    for jobs, given, expected in ((1, None, cores), (2, None, max(1, cores // 2)), (1, "3", 3)):
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        stand_ins.jobs, log = jobs, tmp_path / f"log{jobs}{given}"
        with open(tmp_path / "held", "w") as held:
            kept_runs.Runner(stand_ins).call(["shows.py"], log, held.fileno())
        assert log.read_text().split() == [str(expected)]


def test_a_fid_that_was_stopped_goes_on_and_one_that_is_gone_is_made_again(stand_ins):
    job = kept_runs.Job(Path("runs/a"), ("trains.py", "--out", "runs/a"), ("--n", "5"), None, (2,), 2)
    features = job.folder / "fid_000002_2step" / "features"
    features.mkdir(parents=True)
    (features / "part_0").touch()
    kept_runs.beside(job, ".json").write_text(json.dumps(kept_runs.identity(job) | dict(done=False)))
    assert kept_runs.run_all(stand_ins, [job]) == {} and kept_runs.is_done(job)
    assert json.loads((features.parent / "fid.json").read_text()) == dict(kept=1)     # training removed no features
    assert not features.exists() and (job.folder / "fid_000004_2step" / "fid.json").exists()

    # The last FID counts, not one that was measured on the way.
    shutil.rmtree(job.folder / "fid_000004_2step")
    assert not kept_runs.is_done(job)
    assert kept_runs.run_all(stand_ins, [job]) == {} and (job.folder / "fid_000004_2step" / "fid.json").exists()

    # A script is given paths that hold in any folder.
    assert f"--out {job.folder.resolve()}" in (job.folder / "argv.txt").read_text()


@pytest.mark.slow
def test_of_latents_the_measured_networks_are_kept_and_no_training_is_removed(stand_ins, inputs, tmp_path, capsys):
    """Hours of a GPU: other FIDs come from the kept networks, the control goes on from the start, changes are said."""
    saves = f"""
import torch
steps = int(sys.argv[sys.argv.index("--steps") + 1])
torch.save(torch.load({str(inputs / "imf.pt")!r}, weights_only=True) | dict(step=steps), out / "new.pt")
(out / "new.pt").rename(out / "model.pt")
(out / "metrics.jsonl").write_text('{{"step": %d}}\\n' % steps)
"""
    dry_run = 'sys.exit(print("--steps", sys.argv[sys.argv.index("--steps") + 1] if "--steps" in sys.argv else 4))'
    trains = TRAINS.replace('sys.exit(print("--steps 4"))', dry_run)
    trains = trains.replace('zipfile.ZipFile(out / "model.pt", "w").close()', "pass") + saves
    (tmp_path / "trains.py").write_text(trains)
    job = kept_runs.Job(Path("runs/a"), ("trains.py", "--out", "runs/a"), ("--n", "5"), None, (2,), 2)

    def step_at(folder, step):
        return load_checkpoint(folder / f"fid_00000{step}_2step" / "model.pt")["step"]

    for measure in ("5", "6"):                                        # the second time nothing trains beyond its end
        job = job._replace(measure=("--n", measure))
        assert kept_runs.run_all(stand_ins, [job]) == {} and kept_runs.is_done(job)
        assert [step_at(job.folder, step) for step in (2, 4)] == [2, 4]
    assert "--steps 4" in (job.folder / "argv.txt").read_text()
    assert "how it is measured changed since, its network is measured again" in capsys.readouterr().out

    (job.folder / "mark").touch()
    control = job._replace(folder=Path("runs/b"), command=("trains.py", "--steps", "6", "--out", "runs/b"), every=0,
                           base=job)
    assert kept_runs.with_starts([control]) == [job, control]                            # also where it is asked alone
    assert kept_runs.run_all(stand_ins, [control]) == {}
    assert "b: goes on from the end of a" in capsys.readouterr().out and (control.folder / "mark").exists()
    assert step_at(control.folder, 6) == 6 and not (control.folder / "fid_000004_2step").exists()

    with open("trains.py", "a") as file:
        file.write("# changed")
    kept_runs.look_again()
    failed = kept_runs.run_all(stand_ins, [job])
    assert "trains.py changed since it was trained; nothing was removed" in failed[job]
    assert step_at(job.folder, 2) == 2 and (job.folder / "mark").exists()
    (job.folder / "model.pt").write_bytes(b"cut")
    assert "nothing was removed" in kept_runs.run_all(stand_ins, [job])[job] and step_at(job.folder, 2) == 2

    (job.folder / "fid_000002_2step" / "fid.json").write_text('{"label": "FID", "fid": 3.0, "n": 50000}')
    (job.folder / "fid_000004_2step" / "fid.json").write_text('{"label": "FID10K", "fid": 4.0, "n": 10000}')
    with pytest.raises(BadInput, match="holds FIDs of several kinds .FID, FID10K."):
        report.collect(job, "latents")


def test_the_control_of_latents_goes_on_from_the_start(inputs):
    args = arguments("2", "--data", str(inputs / "latents"), "--vae", "V", "--inception", "W", "--ref", "R")
    rows = {r: reproduce.TABLES["2"].rows[r - 1] for r in (1, 11)}
    jobs = reproduce.jobs_of(args, rows, 0)
    assert jobs[11].base == jobs[1] and jobs[11].command[:5] == (*jobs[1].command[:3], "--steps", "404000")
    assert kept_runs.with_starts([jobs[11]]) == [jobs[1], jobs[11]]
    assert reproduce.jobs_of(arguments("2"), rows, 0)[11].base is None                    # on digits: half a minute


def test_a_copy_of_latents_is_the_same_data(inputs, tmp_path):
    """With new times, as rsync leaves it; other statistics are other data, and times count for images."""
    shutil.copytree(inputs / "latents", tmp_path / "latents")
    for path in (tmp_path / "latents").iterdir():
        os.utime(path, (1, 1))
    assert kept_runs.content_hash(tmp_path / "latents") == kept_runs.content_hash(inputs / "latents")
    kept_runs.look_again()
    statistics = tmp_path / "latents" / "latents_stats.pt"
    content = bytearray(statistics.read_bytes())
    content[-1] ^= 1
    statistics.write_bytes(content)
    assert kept_runs.content_hash(tmp_path / "latents") != kept_runs.content_hash(inputs / "latents")


def test_a_script_that_changes_while_another_runs_is_said(stand_ins, tmp_path, capsys):
    (tmp_path / "edits.py").write_text(TRAINS + "open('trains.py', 'a').write('# changed')\n")
    jobs = [kept_runs.Job(Path("runs", name), (f"{name}.py", "--out", f"runs/{name}"), (), None)
            for name in ("trains", "edits")]
    failed = kept_runs.run_all(stand_ins, jobs)
    assert list(failed) == jobs[:1] and "trains: its script has changed while others ran" in capsys.readouterr().out

    # It runs again, in an emptied folder: the lock in it stays, as on NFS it would keep the folder.
    (jobs[0].folder / "notes.txt").touch()
    (jobs[0].folder / ".lock").touch()
    lock = (jobs[0].folder / ".lock").stat().st_ino
    assert kept_runs.run_all(stand_ins, jobs[:1]) == {} and kept_runs.is_done(jobs[0])
    assert not (jobs[0].folder / "notes.txt").exists() and (jobs[0].folder / ".lock").stat().st_ino == lock


def test_a_changed_script_runs_again_and_what_started_from_it_too(stand_ins, tmp_path, capsys):
    """Not one that changes while it runs: that run is not done, and nothing starts from it."""
    edits = "import helper\nif pathlib.Path('edits').exists():\n    open('helper.py', 'a').write('# changed')\n"
    (tmp_path / "helper.py").touch()
    (tmp_path / "trains.py").write_text(TRAINS + edits)
    (tmp_path / "evaluate.py").write_text(MEASURES.replace("fid.json", "evaluation.json"))
    start = kept_runs.Job(Path("runs/start"), ("trains.py", "--out", "runs/start"), (), None)
    row = kept_runs.Job(Path("runs/row"), ("evaluate.py", "runs/start/model.pt", "--out", "runs/row"), (), start)

    def run():
        kept_runs.look_again()
        return kept_runs.run_all(stand_ins, [start, row]), capsys.readouterr().out

    assert run()[0] == {} and kept_runs.is_done(row)
    with open("trains.py", "a") as file:
        file.write("# changed")
    Path("edits").touch()
    failed, said = run()
    assert "start: trains.py changed since, the kept run is removed and runs again" in said
    assert "start: helper.py changed while it ran" in failed[start] and row in failed and not kept_runs.is_done(row)
    Path("edits").unlink()
    failed, said = run()
    assert failed == {} and "start: helper.py changed since" in said and "changed while" not in said
    assert "row: helper.py, trains.py changed since" in said and kept_runs.is_done(row)


def test_words_that_are_no_paths_are_no_inputs_of_a_run(tmp_path, monkeypatch):
    """Folders that happen to be called scratch or 50000 change no kept run; a reference that changes does."""
    monkeypatch.chdir(tmp_path)
    job = reproduce.jobs_of(arguments("5"), {6: reproduce.TABLES["5"].rows[5]}, 0)[6]
    job = job._replace(measure=("--ref", "reference.npz", "--n", "50000"))
    Path("reference.npz").write_bytes(b"one")
    before = kept_runs.identity(job)
    for name in ("scratch", "imf", "50000"):
        Path(name).mkdir()
        (Path(name) / "file").touch()
    kept_runs.look_again()
    assert kept_runs.identity(job) == before and "inputs" not in before
    Path("reference.npz").write_bytes(b"two")
    kept_runs.look_again()
    assert kept_runs.identity(job)["measure"] != before["measure"]

    # Of a folder that is read an edit of equal size is seen by its time.
    job = job._replace(command=(*job.command, "--data", "images"), measure=())
    Path("images").mkdir()
    Path("images/1.png").write_bytes(b"one")
    kept_runs.look_again()
    before = kept_runs.identity(job)["inputs"]
    os.utime("images/1.png", (1, 1))
    kept_runs.look_again()
    assert kept_runs.identity(job)["inputs"] != before
    assert kept_runs.inputs_of("images") == kept_runs.inputs_of(f"{tmp_path}/images") != kept_runs.inputs_of("digits")


def test_a_network_that_is_given_is_measured_once(inputs, capsys):
    """--init: the rows that only evaluate it are the same for every seed; those that train are not."""
    reproduce.run(arguments("4", "--init", str(inputs / "fm.pt"), "--seeds", "3", "--row", "1", "3"))
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert [line.split()[1] for line in commands] == ["evaluate.py"] + 3 * ["consistency.py"]


def test_runs_that_were_measured_in_two_ways_make_no_table():
    """Another classifier, or FIDs of other numbers of samples; a FID of few samples is not called as the paper's."""
    def of(*measured):
        runs = [dict(evaluations=[dict(step=1, fd_2step=5.0)], sec_per_step=None, memory_gb=None, measured=way)
                for way in measured]
        return report.summary({1: reproduce.TABLES["2"].rows[0]}, {1: dict(enumerate(runs))})

    for ways in (("classifier 1234", "classifier 5678"), ("FID", "FID5K")):
        with pytest.raises(BadInput, match="were measured in several ways"):
            of(*ways)
    assert report.distance_name("pixels", of("classifier 1234", None)) == "distance"
    assert [report.distance_name("latents", of(way, way)) for way in ("FID", "FID1K")] == ["FID", "FID1K"]
    assert report.classifier_of(dict(definition=Features(load_data("digits")).definition())) == "classifier e837f4d7"


def test_a_row_of_a_script_whose_passes_are_not_known_is_refused_before_its_runs(inputs, tmp_path, monkeypatch):
    own = reproduce.Row("mine", {}, "imf", "my_dmd.py --init {start}")
    table = reproduce.TABLES["2"]
    monkeypatch.setitem(reproduce.TABLES, "2", table._replace(rows=[*table.rows, own]))
    words = f"2 --row {len(table.rows) + 1} --seeds 1 --data {inputs / 'toy.npz'} --runs {tmp_path / 'runs'}"
    with pytest.raises(BadInput, match="my_dmd.py: plumbing/passes.py does not know its forward passes"):
        reproduce.run(reproduce.parse_args(words.split()))
    assert not list(tmp_path.iterdir())


def test_the_samples_of_a_row_are_made_with_its_own_flags(inputs, tmp_path, monkeypatch):
    """As evaluate.py is called for the row: sampler, shift, and the channels of the guidance."""
    net = LightningDiT("tiny", "plain", in_channels=1, input_size=8, num_classes=10)
    stored = dict(config=net.config, weights=net.state_dict(), data=None, args=dict(omega=2.0, cfg_channels=1), step=4)
    torch.save(stored, tmp_path / "fm.pt")
    command = f"evaluate.py {tmp_path}/fm.pt --sampler euler --steps 3 --shift 3.3333 --cfg_channels 0"
    seen = []

    def generate(*positional, **flags):
        seen.append((positional, flags))
        return evaluate.generate(*positional, **flags)

    monkeypatch.setattr(report, "generate", generate)
    job = kept_runs.Job(tmp_path / "x", tuple(command.split()), (), None)
    row = dict(n=1, N=3, label="Teacher", seeds={0: dict(evaluations=[dict(step=0, passes=0)])})
    args = argparse.Namespace(data="digits", vae=None)
    report.samples(args, {1: row}, {1: {0: job}}, tmp_path / "samples.png")
    [(positional, flags)] = seen
    assert positional[3:7] == (3, 2.0, 1.0, 0) and flags["sampler"] == "euler" and flags["shift"] == 3.3333


# ---- Real runs -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_interrupted_and_restarted_a_table_is_the_same(tmp_path, few_samples, monkeypatch):
    """In a copy of the project, the teacher row of Table 4 on a small image set: a start and its evaluation.

    The start has 60 steps there: nothing here asks how well it was trained.
    """
    (tmp_path / "golden").mkdir()
    shutil.copy(HERE / "golden" / "paper_tables.json", tmp_path / "golden")
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(HERE / "plumbing", tmp_path / "plumbing", ignore=shutil.ignore_patterns("__pycache__"))
    text, preset = (tmp_path / "consistency.py").read_text(), 'size="tiny", steps=400, lr=1.2e-2'
    assert text.count(preset) == 1
    (tmp_path / "consistency.py").write_text(text.replace(preset, preset.replace("400", "60")))
    small_images(tmp_path / "toy.npz", 60)
    flags = "4 --data toy.npz --row 1 --seeds 1 --jobs 2"            # two: so that a run leaves a core to other tests
    command = [sys.executable, str(tmp_path / "reproduce.py"), *flags.split()]

    def start(cwd=tmp_path, words=command):
        return subprocess.Popen(words, cwd=cwd, env=environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    # Interrupted in the start ...
    runs = tmp_path / "runs" / "reproduce"
    metrics = runs / "toy" / "consistency-lossfm-seed0" / "metrics.jsonl"
    first = start()
    while not (metrics.exists() and metrics.read_text()) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed
    stopped = torch.load(metrics.parent / "state.pt", weights_only=True)["step"]
    assert 0 < stopped < 60

    # ... it goes on there, from another folder too, and leaves its folder.
    (tmp_path / "elsewhere").mkdir()
    words = [word.replace("toy.npz", "../toy.npz") for word in command] + ["--runs", "../runs/reproduce"]
    second = start(tmp_path / "elsewhere", words)
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and "0 kept from before; 2 at a time" in printed, printed
    log = metrics.parent.with_name(metrics.parent.name + ".log").read_text()
    assert f"resuming at step {stopped}" in log
    out = runs / "tables" / "table4-toy-row1"
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert {path.name for path in out.iterdir()} == {"README.md", "runs.json", "curves.png", "samples.png"}
    page, stored = (out / "README.md").read_text(), (out / "runs.json").read_text()
    assert "`python reproduce.py 4 --data ../toy.npz " in page
    [row] = json.loads(stored)["rows"]
    [run] = row["seeds"].values()
    assert list(row["seeds"]) == ["0"] and row["N"] == 25 and len(run["evaluations"]) == 1
    fd = run["evaluations"][0]["fd_25step"]
    own = json.loads((runs / "toy" / "evaluate-fm-seed0" / "evaluation.json").read_text())
    assert fd > 0 and fd == pytest.approx(own["fd_25step"], abs=1e-4)                 # the number is the script's own
    assert f"| {report.spread([fd], 1)} |" in page

    # Again, from the first folder: nothing runs, and the table is the same but for its command and its paths.
    printed, _ = start().communicate(timeout=60)
    assert "2 runs, 2 kept" in printed
    again = (out / "README.md").read_text()
    assert f"`python reproduce.py {flags}`" in again and again.count("toy.npz") == page.count("toy.npz")
    assert again.split("Mean ±")[1] == page.split("Mean ±")[1]
    assert json.loads((out / "runs.json").read_text()) == json.loads(stored.replace("../", ""))

    # And the start is the one that was never interrupted.
    monkeypatch.chdir(tmp_path)
    train("consistency.py --loss fm --data toy.npz --steps 60 --seed 0 --out straight")
    whole, resumed = state(tmp_path, "straight"), state(tmp_path, metrics.parent)
    assert_same([whole[part] for part in ("net", "ema", "opt")], [resumed[part] for part in ("net", "ema", "opt")])


@pytest.mark.slow
def test_another_measure_keeps_the_network(inputs, tmp_path):
    """--n, --ref and the like make its FID again, not the training."""
    args = argparse.Namespace(data=str(inputs / "latents"), vae="V",
                              size=None, precision=None, inception="W", ref="R", n=2000, fid_every=0,
                              table="2", jobs=1, start="weak", init=str(tmp_path / "bad.pt"), runs=tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"no network")                  # so that nothing trains here
    job = reproduce.jobs_of(args, {7: reproduce.TABLES["2"].rows[6]}, 0)[7]
    before = dict(kept_runs.identity(job), measure=["--n", "50000"], done=True)
    network, measured = job.folder / "model.pt", job.folder / "fid_004000_2step"
    measured.mkdir(parents=True)
    (measured / "fid.json").write_text("{}")
    torch.save(torch.load(inputs / "imf.pt", weights_only=True) | dict(step=4000), network)
    kept = network.read_bytes()
    kept_runs.beside(job, ".json").write_text(json.dumps(before))
    with open(tmp_path / "lock", "w") as lock, pytest.raises(BadInput, match="fsf_dmd.py"):
        kept_runs.Runner(args).do(job, lock)
    assert network.read_bytes() == kept and not list(measured.iterdir())

    # It is done with a FID of every number of sampling steps, and FIDs on the way need another training.
    (measured / "fid.json").write_text("{}")
    assert kept_runs.has_result(job) and not kept_runs.has_result(job._replace(counts=(2, 1)))
    assert job.counts == (2,) and kept_runs.has_result(job._replace(counts=(2,)))
    kept_runs.beside(job, ".json").write_text(json.dumps(dict(kept_runs.identity(job), done=True)))
    assert kept_runs.is_done(job) and kept_runs.changes(job._replace(every=2000)) == ["--fid_every"]
    with_every = dict(kept_runs.identity(job._replace(every=1000)), done=True)        # more FIDs than are asked for
    kept_runs.beside(job, ".json").write_text(json.dumps(with_every))
    assert all(kept_runs.is_done(job._replace(every=every)) for every in (0, 1000, 2000))
    assert kept_runs.changes(job._replace(every=1500)) == ["--fid_every"]
    shutil.rmtree(measured)
    assert not kept_runs.is_done(job)

    # A FID on the way whose network is not kept would need another training: nothing is removed.
    kept_runs.beside(job, ".json").write_text(json.dumps(before))
    (job.folder / "fid_002000_2step").mkdir()
    with open(tmp_path / "lock", "w") as lock, pytest.raises(BadInput, match="the measure changed since it was"):
        kept_runs.Runner(args).do(job, lock)
    assert network.read_bytes() == kept


@pytest.mark.slow
def test_forward_passes_that_the_scripts_claim_are_what_the_code_does(inputs, tmp_path):
    """The costs in the file headers, in passes of one network (backward = 2), against counted FLOPs.

    With half of the rows masked, as in the paper.  Counted is a little less: the first layer needs no gradient of its
    input.
    """
    claimed = {
        "imf: Consistency distillation": 5,
        "imf: FSF-DMD M=1": 10,
        "imf: FSF-DMD M=2": 13,
        "fm: Consistency distillation": 6,
        "fm: FSF-DMD": 15,
        "FM": 3,
        "iMF": 5.5,
        "iMF + TwinFlow": 13.5,
        "RCGM": 7,
        "FSF-DMD from scratch": 10.5,
    }
    common = ["--data", str(inputs / "latents"), "--batch_size", "2", "--precision", "fp32",
              "--out", str(tmp_path / "count"), "--resume", "no"]
    seen = set()
    for label, start, command in cost.COST:
        if label not in claimed:
            continue
        script, *flags = shlex.split(command.format(start=inputs / f"{start}.pt"))
        size = [] if start else ["--size", "tiny"]
        network = "fm.pt" if start == "fm" or label == "FM" else "imf.pt"
        found = cost.count(script, [*flags, *common, *size], 1, inputs / network)
        assert 0.98 * claimed[label] < found["step"] / found["forward"] <= claimed[label], label
        args = importlib.import_module(script.removesuffix(".py")).parse_args([*flags, *common, *size])
        assert passes.passes_a_step(script, vars(args)) == claimed[label], label
        assert found["optimizer"] > 0
        seen.add(label)
    assert seen == set(claimed)


def passes_of_the_discriminator(net):
    """FLOPs of the head and the part of the trunk that it reads, over those of the network."""
    side, channels = net.config["input_size"], net.config["in_channels"]
    head, x, t, y = DiscriminatorHead(net), torch.randn(1, channels, side, side), torch.rand(1), torch.zeros(1).long()
    guidance = fixed_guidance(1.0, 0.0, 1.0, x) if net.conditioning == "in_context" else None
    counted = []
    for run in (lambda: head(net, x, t, y), lambda: net(x, t, y, None, guidance)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run()
        counted.append(counter.get_total_flops())
    return counted[0] / counted[1]


@pytest.mark.slow
@pytest.mark.parametrize("size, side, channels", [("tiny", 8, 1), ("small", 28, 1), ("medium", 28, 1), ("B/1", 16, 32)])
@pytest.mark.parametrize("conditioning", ["in_context", "plain"])
def test_a_pass_of_the_discriminator_costs_what_passes_says(size, side, channels, conditioning):
    net = LightningDiT(size, conditioning, in_channels=channels, input_size=side, num_classes=10)
    told = passes.DISCRIMINATOR[size][conditioning == "plain"]
    assert passes_of_the_discriminator(net) == pytest.approx(told, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["imf", "fm"])
def test_what_the_discriminator_adds_to_a_step_of_dmd2(start, inputs, tmp_path, monkeypatch):
    """Two passes of it in the generator's turn, six in each of the fake network's, against counted FLOPs."""
    net, _ = load_network(inputs / f"{start}.pt")
    here = passes_of_the_discriminator(net)                           # it depends on the number of tokens too
    monkeypatch.setitem(passes.DISCRIMINATOR, "tiny", (here, here))
    words = ["--init", str(inputs / f"{start}.pt"), "--data", str(inputs / "latents"), "--batch_size", "2",
             "--precision", "fp32", "--ttur", "2", "--resume", "no", "--out", str(tmp_path / "count")]
    found, claimed = [], []
    for more in ([], ["--no_gan"]):
        counted = cost.count("dmd2.py", words + more, 1, inputs / f"{start}.pt")
        found.append(counted["step"] / counted["forward"])
        claimed.append(passes.passes_a_step("dmd2.py", vars(dmd2.parse_args(words + more))))
    assert found[0] - found[1] == pytest.approx(claimed[0] - claimed[1], rel=0.02)


@pytest.mark.slow
def test_cost_measures_a_step_of_a_method(tmp_path):
    """The first row of cost.py, of a small network: seconds and memory of a process of its own, and counted passes."""
    command = "cost.py --size tiny --row 1 2 --minutes 1e-9 --batch_size 2 --runs 'kept here' --out ."
    words = [sys.executable, str(HERE / "cost.py"), *shlex.split(command)[1:]]
    (tmp_path / "kept here").mkdir()
    other = {"imf: FSF-DMD M=1": dict(identity=dict(size="B/1"), row=dict(label="of another setting"))}     # left out
    (tmp_path / "kept here" / "cost.json").write_text(json.dumps(other))     # its time is over before the second row
    printed = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True).stdout
    found = json.loads((tmp_path / "cost-cpu-tiny" / "runs.json").read_text())
    [row] = found["rows"]
    assert row["label"] == "imf: Consistency distillation" and row["paper_sec_per_step"] == 0.23
    assert 4.9 < row["passes"] <= 5
    assert 0 < row["sec_per_step"] < 60 and 0.1 < row["memory_gb"] < 20 and found["batch"] == 2
    left = {path.name for path in (tmp_path / "kept here").iterdir()}
    assert left == {"cost.json", "cost.lock"}                         # its random inputs are gone
    gflop = 40_000 * (128 * row["gflop_per_image"] + row["gflop_optimizer"])
    assert row["hours_modelled"] == pytest.approx(gflop * 1e9 / found["flop_per_second_modelled"] / 3600)
    assert "| imf: Consistency distillation | 5.0 |" in printed
    late = [*words, "--row", "1", "2", "--minutes", "0.0001"]                         # for the first alone: it is kept
    said = subprocess.run(late, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert "no method is begun any more" in said.stdout + said.stderr
    assert json.loads((tmp_path / "cost-cpu-tiny" / "runs.json").read_text())["rows"] == [row]
    again = f"python {command} --row 1 2 --minutes 0.0001"
    assert (tmp_path / "cost-cpu-tiny" / "README.md").read_text() == cost.page(found, again)


@pytest.mark.slow
def test_a_process_that_counts_and_is_killed_is_said():
    ours, its = multiprocessing.Pipe()
    cost.answer(its, sorted, ([3, 1, 2],))
    assert cost.received(ours) == [1, 2, 3]
    cost.answer(its, os.remove, ("nowhere",))
    with pytest.raises(FileNotFoundError):                            # as if it had been raised here
        cost.received(ours)
    with pytest.raises(BadInput, match="the process that counts FLOPs was killed .* goes on with this method"):
        cost.received(cost.aside(os._exit, 9))
