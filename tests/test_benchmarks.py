"""What cost.py and benchmarks/ measured is what the texts say, and they measure what they claim to."""
import copy
import json
import re
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import consistency
import cost
import data
import evaluate
import evidence
import explicit
import finite_difference
import fsf_dmd
import gpu
import model
import picture
import reproduce
import step
import strength
import surrogate
from common import BadInput
from plumbing import checkpoints, kept_runs
from plumbing.report import spread
from test_helpers import HERE, rand, read_metrics, run
from test_helpers import start as begin
from told import FASHION_2, FASHION_4, FASHION_STRONG, KEPT, Told, words_of_the_texts

# ---- What the texts say of cost --------------------------------------------------------------------------------------

def kept_cost():
    """(runs.json of the kept cost table, its rows by label)."""
    found = json.loads((KEPT / "cost-cpu" / "runs.json").read_text())
    return found, {row["label"]: row for row in found["rows"]}


def test_the_cost_table_follows_from_its_runs_and_stands_in_the_text():
    found, rows = kept_cost()
    page = (KEPT / "cost-cpu" / "README.md").read_text()
    assert page == cost.page(found, "python cost.py --batch_size 4 --out results")
    assert cost.markdown(found) in page and cost.markdown(found) in (HERE / "RESULTS.md").read_text()
    assert list(rows) == [label for label, *_ in cost.COST]
    assert (found["size"], found["batch"]) == ("B/1", 4)
    for row, (_, start, command) in zip(found["rows"], cost.COST):
        assert row["command"].replace(f"{str(start).upper()}.pt", "{start}") == command


def test_what_is_said_of_cost_is_in_the_numbers():
    """Hours of the ImageNet tables and ratios from the counted FLOPs; the passes of DMD2's header."""
    _, rows = kept_cost()
    results = (HERE / "RESULTS.md").read_text()
    flops = {label: 128 * row["gflop_per_image"] + row["gflop_optimizer"] for label, row in rows.items()}
    hours = {label: row["hours_modelled"] for label, row in rows.items()}
    for label, row in rows.items():
        assert hours[label] == pytest.approx(row["preset_steps"] * flops[label] * 1e9 / cost.RATE / 3600)
    CD, M1, M2 = "imf: Consistency distillation", "imf: FSF-DMD M=1", "imf: FSF-DMD M=2"
    DMD2, IDA, BOTH, ONE = "imf: DMD2 1:5", "imf: DMD2 + IDA", "imf: DMD2 + L_CD", "imf: DMD2 1:1"

    def ttur(R, gan):                                                 # linear in R
        one, five = hours[f"imf: DMD2 1:1{gan}"], hours[f"imf: DMD2 1:5{gan}"]
        return one + (R - 1) / 4 * (five - one)

    of_fm = [hours[label] for label in rows if label.startswith("fm: ")]
    assert len(of_fm) == 4
    from_scratch = ("iMF", "iMF + DMD2", "iMF + TwinFlow", "RCGM", "RCGM + TwinFlow", "FSF-DMD from scratch")
    table_7 = [ttur(R, gan) for gan in (", no GAN", "") for R in (1, 2, 3, 4, 5, 5, 5, 5)]
    sums = {
        "2": sum(hours[label] for label in (CD, DMD2, IDA, BOTH, M2, M1)),
        "3": 2 * hours[CD] + 2 * hours[M1] + 4 * hours[M2] + hours[DMD2],             # DMD2 with M = 1 as with M = 2
        "4": sum(of_fm) + hours["fm: Consistency distillation"],      # FSF-DMD begins with as many steps of it
        "5": sum(hours[label] for label in from_scratch),
        "7": sum(table_7) + 4 * (hours[BOTH] - hours[DMD2]),          # four rows have L_CD
        "8": 5 * hours[M2],
        "9": 9 * hours[M2],
    }
    for table, total in sums.items():
        command = rf"`python reproduce.py {table} --data latents \.\.\.`"
        assert re.search(rf"^\| {table}, .*\| not run here \| {command} \| {total:.0f} \|$", results, re.M), table

    text = " ".join(results[results.index("The hours are modelled"):].split())
    share = {B: rows[CD]["gflop_optimizer"] / (B * rows[CD]["gflop_per_image"] + rows[CD]["gflop_optimizer"])
             for B in (4, 128)}
    paper = cost.paper_seconds()
    seconds, memory = (rows[DMD2][name] / rows[M2][name] for name in ("sec_per_step", "memory_gb"))
    of_m2, of_one = rows[M2]["memory_gb"], rows[ONE]["memory_gb"]
    scratch, imf = "FSF-DMD from scratch", "iMF"
    unmasked = flops[CD] + 128 * rows[CD]["gflop_per_image"] / rows[CD]["passes"]           # a pass more
    for words in (
        f"(iMF {hours['iMF']:.0f} hours, FM {hours['FM']:.0f})",
        f"NorMuon is {share[4]:.0%} of CD's FLOPs here and {share[128]:.0%} at",
        f"({seconds:.1f} times FSF-DMD, M = 2)",
        f"DMD2 takes {flops[DMD2] / flops[M2]:.1f} times FSF-DMD, M = 2, and CD {flops[CD] / flops[M2]:.2f} times "
        f"(without masking, as the paper's, {unmasked / flops[M2]:.2f}); in the paper's seconds 3.8 and "
        f"{paper[CD] / paper[M2]:.2f}",
        f"DMD2 + L_CD is {flops[BOTH] / flops[M2]:.1f} here and {paper[BOTH] / paper[M2]:.1f} there",
        f"FSF-DMD takes {flops[scratch] / flops[imf]:.1f} times iMF, in the paper {paper['FSF-DMD'] / paper[imf]:.1f}",
        f"RCGM {flops['RCGM'] / flops[imf]:.1f} times, in the paper {paper['RCGM'] / paper[imf]:.1f}",
        f"DMD2 needs {memory:.1f} times",
        f"{of_m2:.2f} of {of_one:.2f} ({of_m2 / of_one:.2f})",
    ):
        assert words in text, words
    for label, percent, peak in ((imf, 18, 312e3), (M2, 12, 2250e3)):   # GFLOP/s in bf16 of an A100 and a B200
        assert f"{flops[label] / paper[label] / peak:.0%}" == f"{percent}%"
        assert f"{percent}% of a" in text

    # What the GAN adds, in the header of dmd2.py: a + b R passes at TTUR 1:R.  Without it 1:5 takes 26.5 on average.
    added = {R: rows[f"imf: DMD2 1:{R}"]["passes"] - rows[f"imf: DMD2 1:{R}, no GAN"]["passes"] for R in (1, 5)}
    b = (added[5] - added[1]) / 4
    assert (f"{added[1] - b:.1f}", f"{b:.1f}", f"{26.5 + added[5]:.1f}") == ("1.1", "3.3", "44.1")


# ---- A GPU, memory, the noise of sampling ----------------------------------------------------------------------------

def test_what_is_said_of_a_gpu_is_in_the_numbers():
    text = words_of_the_texts()
    cost, profile, difference, throughput, runs = (
        json.loads((KEPT / "gpu" / f"{block}.json").read_text())
        for block in ("cost", "profile", "difference", "throughput", "runs"))
    rows, before = ({row["label"].removeprefix("imf: "): row for row in cost[key]} for key in ("rows", "before"))
    table = json.loads((KEPT / "cost-cuda" / "runs.json").read_text())["rows"]
    assert [row["sec_per_step"] for row in table] == [row["sec_per_step"] for row in cost["rows"]]
    seconds = {label: row["sec_per_step"] for label, row in rows.items()}
    assert f"{400_000 * seconds['iMF'] / 3600:.1f}" == "18.5"
    one, two, dmd2 = (rows[name] for name in ("FSF-DMD M=1", "FSF-DMD M=2", "DMD2 1:5"))
    flops = {row["label"].removeprefix("imf: "): 128 * row["gflop_per_image"] + row["gflop_optimizer"] for row in table}
    parts = {kind: spent / profile["step_seconds"] for kind, spent in profile["seconds_of"].items()}
    busy = profile["step_seconds"] - profile["seconds_of"]["idle"]
    ways = {row["way"].split(", ")[-1].split(" ")[0]: row for row in difference["rows"][1:]}
    rates = {(row["stage"].split()[0], row["arithmetic"]): row["images_per_second"] for row in throughput["rows"]}
    minutes = {stage: 50_000 / rates[stage] / 60 for stage in rates}
    evaluated = minutes["2-step", "TF32"] + minutes["VAE", "TF32"] + minutes["Inception", "float32"]
    for words in (
        f"{seconds['FSF-DMD M=2']:.3f} s for FSF-DMD with M = 2 and {seconds['DMD2 1:5']:.3f} s for DMD2 1:5",
        f"{seconds['DMD2 1:5'] / seconds['FSF-DMD M=2']:.1f} times as long",
        f"by counted FLOPs {flops['DMD2 1:5'] / flops['FSF-DMD M=2']:.1f}",
        f"DMD2 1:5 takes {seconds['DMD2 1:5, no GAN']:.3f} s, and DMD2 1:1 {seconds['DMD2 1:1, no GAN']:.3f}",
        f"M = 1 takes {seconds['FSF-DMD M=1']:.3f} s (the paper 0.31), CD with masking "
        f"{seconds['Consistency distillation']:.3f} (the paper 0.23, without masking), SiD {seconds['SiD']:.3f}",
        f"{two['memory_gb']:.1f} GB for M = 2, {one['memory_gb']:.1f} for M = 1, {dmd2['memory_gb']:.1f} for DMD2 with "
        f"GAN ({rows['DMD2 1:5, no GAN']['memory_gb']:.1f} without), {rows['SiD']['memory_gb']:.1f} for SiD",
        f"{len(cost['missing'])} of the {len(cost['missing']) + len(rows)} rows were not run",
        f"{two['sec_per_step']:.2f} and {dmd2['sec_per_step']:.2f} s "
        f"[on an H200](RESULTS.md#on-a-gpu); in the paper, on a B200, a quarter",
        f"Without the GAN it takes {seconds['DMD2 1:5, no GAN']:.2f} s, 1:1 without it "
        f"{seconds['DMD2 1:1, no GAN']:.2f}, CD with masking "
        f"{seconds['Consistency distillation']:.2f}.",
        f"{rows['FSF-DMD M=2']['passes']:.0f} passes a step, not {rows['Consistency distillation']['passes']:.0f}; "
        f"{two['sec_per_step']:.3f} s, not {seconds['Consistency distillation']:.3f}; {two['memory_gb']:.1f} GB, not "
        f"{rows['Consistency distillation']['memory_gb']:.1f} (M = 1: {one['sec_per_step']:.3f} s, "
        f"{one['memory_gb']:.1f})",
        f"only with M = 1:** {one['memory_gb']:.1f} GB (M = 2: {two['memory_gb']:.1f}); DMD2 has "
        f"{dmd2['memory_gb']:.1f}, without a GAN {rows['DMD2 1:5, no GAN']['memory_gb']:.1f}",
        f"18.5 hours at {seconds['iMF']:.3f} s",
        f"CD with masking {40_000 * seconds['Consistency distillation'] / 3600:.1f}, DMD2 "
        f"{15_000 * dmd2['sec_per_step'] / 3600:.1f} (so do IDA and the row from CD's network), SiD "
        f"{15_000 * seconds['SiD'] / 3600:.1f}, FSF-DMD {4000 * two['sec_per_step'] / 3600:.1f};",
        f"by its passes {54_000 * dmd2['sec_per_step'] * 48.6 / 44.1 / 3600:.0f} hours",
        f"FM {rows['FM']['memory_gb']:.1f} GB, iMF and CD {rows['iMF']['memory_gb']:.1f}, FSF-DMD "
        f"{two['memory_gb']:.1f} (M = 1: {one['memory_gb']:.1f}), DMD2 {dmd2['memory_gb']:.1f} (without GAN "
        f"{rows['DMD2 1:5, no GAN']['memory_gb']:.1f}), TwinFlow {rows['iMF + TwinFlow']['memory_gb']:.1f}, SiD "
        f"{rows['SiD']['memory_gb']:.1f};",
        f"from scratch an iMF {seconds['iMF']:.3f}, with TwinFlow "
        f"{seconds['iMF + TwinFlow']:.3f}, flow matching {seconds['FM']:.3f}",
        f"the 4,000 steps of FSF-DMD take {4000 * two['sec_per_step'] / 60:.0f} minutes at an H200's "
        f"{two['sec_per_step']:.2f} s",
        f"a step of FSF-DMD (M = 2) took {two['memory_gb']:.1f} GB, of its start {rows['iMF']['memory_gb']:.1f}",
        f"There {two['sec_per_step']:.2f} and {dmd2['sec_per_step']:.2f} s; {two['memory_gb']:.1f} and "
        f"{dmd2['memory_gb']:.1f} GB (M = 1: {one['memory_gb']:.1f})",
        f"reaches {two['share_of_matrix_rate']:.0%} of the card's bf16 matrix rate ({cost['matrix_rate'] / 1e12:.0f} "
        f"TFLOP/s in that run), DMD2 {dmd2['share_of_matrix_rate']:.0%}",
        f"{parts['matrix products']:.0%} are matrix products, "
        f"{parts['elementwise'] + parts['reductions']:.0%} elementwise",
        f"{parts['attention']:.0%} attention, and for {parts['idle']:.0%} the card waits "
        "(the profiler is a part of that: by the step of the table it is at most "
        f"{1 - busy / two['sec_per_step']:.0%})",
        f"it would be at {two['share_of_matrix_rate'] * two['sec_per_step'] / busy:.0%}",
        f"FSF-DMD took {before['FSF-DMD M=2']['sec_per_step']:.3f} s and DMD2 {before['DMD2 1:5']['sec_per_step']:.3f}",
        f"by {ways['float32']['relative_error']:.4f} in float32, by {ways['TF32']['relative_error']:.3f} in TF32",
        f"and by {ways['bf16']['relative_error']:.2f} in bf16",
        f"TF32 costs {ways['TF32']['seconds'] / ways['float32']['seconds']:.0%} of float32's time",
        f"need {evaluated:.1f} minutes",
        f"({rates['VAE', 'TF32']:.0f} images a second, 8 at a time) is {minutes['VAE', 'TF32']:.1f}",
        f"All in float32 it is {throughput['minutes_of_fid_float32']:.1f} minutes",
    ):
        assert words in text, words
    assert all(row["waits_at"] == "-" for row in json.loads((KEPT / "gpu" / "waits.json").read_text())["rows"])
    for row in runs["rows"]:
        if row["setting"].startswith("fp32") and (row["script"], row["setting"]) != ("dmd2", "fp32 compiled"):
            assert row["first_step"] < 0.01 and row["all_steps"] < 0.11


def test_what_is_said_of_memory_and_of_sampling_noise_is_in_the_numbers():
    text = words_of_the_texts()
    rows = json.loads((KEPT / "memory-cpu" / "runs.json").read_text())["rows"]
    (two, two_compiled), (_, one_compiled), (dmd, dmd_compiled) = ((r["memory_gb_eager"], r["memory_gb_compiled"])
                                                                   for r in rows)
    assert f"M = 2 takes {two / dmd:.2f} ({two:.2f} of {dmd:.2f} GB)" in text
    assert f"{two_compiled / dmd_compiled:.2f} ({two_compiled:.2f} of {dmd_compiled:.2f} GB)" in text
    assert f"with M = 1 {one_compiled / dmd_compiled:.2f} ({one_compiled:.2f} GB)" in text
    assert f"the other way round M = 2 needs {rows[0]['memory_gb_before']:.2f} GB" in text
    for suffix, words in (("eager", "{:.2f} of {:.2f} GB ({:.2f})"), ("compiled", "{:.2f} of {:.2f} ({:.2f})")):
        two, dmd = rows[0][f"memory_gb_kept_{suffix}"], rows[2][f"memory_gb_kept_{suffix}"]
        assert words.format(two, dmd, two / dmd) in text
    runs = json.loads((KEPT / "noise-fashion-mnist" / "runs.json").read_text())["runs"]
    noise = {name: statistics.stdev(run[f"{name}_2step"] for run in runs) for name in ("fd", "is", "recall")}
    assert f"{noise['fd']:.1f} in distance, {noise['is']:.3f} in IS and {noise['recall']:.3f} in recall" in text


# ---- benchmarks/surrogate.py -----------------------------------------------------------------------------------------

def test_flow_maps_under_one_name_are_shown_as_mean_and_deviation():
    at = lambda value: {k: dict.fromkeys(surrogate.COSINES, value) for k in ("k1", "k10")}
    rows = [dict(start=start, omega=3.0, over_tau=at(value))
            for start, value in (("a", 0.25), ("b", -0.5), ("a", 0.75))]
    bodies = surrogate.table(rows)[2:]
    assert bodies == ["| a | 3 | " + " | ".join(["0.50 ± 0.35"] * 8) + " |",
                      "| b | 3 | " + " | ".join(["-0.50"] * 8) + " |"]


def test_what_is_said_of_the_surrogate_is_in_the_numbers():
    rows = json.loads((KEPT / "surrogate-digits" / "runs.json").read_text())["rows"]
    table, text = "\n".join(surrogate.table(rows)), (HERE / "RESULTS.md").read_text()
    assert table in text and table in (KEPT / "surrogate-digits" / "README.md").read_text()
    weak, strong = ([row for row in rows if row["start"] == start] for start in ("weak", "strong"))
    assert len(weak) == len(strong) == 5 and {row["step"] for row in weak} == {400}
    assert {row["step"] for row in strong} == {800}

    def at(of, k, name):
        return np.array([row["over_tau"][k][name] for row in of])

    last = np.array([[loss for _, loss in row["held_out_loss"][-2:]] for row in rows]).mean(0)
    assert f"by {last[0] - last[1]:.4f} of {last[1]:.2f} in the mean over the last 200" in " ".join(text.split())
    agree, cosine = ([at(rows, k, name) for k in ("k1", "k10")] for name in ("two_explicit", "cosine"))
    assert f"({np.min(agree):.2f} to {np.max(agree):.2f} over all ten)" in text
    assert f"({np.min(cosine):.2f} to {np.max(cosine):.2f}, in the mean below zero" in text
    for of in (weak, strong):
        cleanest, *others = surrogate.bins_of(of, "cosine").mean(0)
        assert cleanest > 0 > max(others)
    nearer = surrogate.bins_of(rows, "surrogate_to_mean") - abs(surrogate.bins_of(rows, "explicit_to_mean"))
    assert nearer[:, :-1].min() > 0
    pulls = [f"{at(of, k, 'surrogate_to_mean').mean():.2f}" for k in ("k1", "k10") for of in (weak, strong)]
    assert pulls[0] == pulls[1] and f"({pulls[0]} to {pulls[2]} and {pulls[3]})" in text
    for k, words, p in (("k1", "0.149 ± 0.043", 0.0015), ("k10", "0.095 ± 0.017", 0.00024)):
        falls = at(weak, k, "cosine") - at(strong, k, "cosine")
        assert f"{falls.mean():.3f} ± {falls.std(ddof=1):.3f}" == words and words in text and falls.min() > 0
        assert scipy.stats.ttest_1samp(falls, 0).pvalue < p

    rows = json.loads((KEPT / "surrogate-fashion-mnist" / "runs.json").read_text())["rows"]
    table = "\n".join(surrogate.table(rows))
    assert table in text and table in (KEPT / "surrogate-fashion-mnist" / "README.md").read_text()
    plain, guided = rows
    assert (plain["omega"], guided["omega"]) == (1, 3)
    of = dict(pull=plain["over_tau"]["k1"]["surrogate_to_mean"], cosine=plain["over_tau"]["k1"]["cosine"],
              guided=guided["over_tau"]["k10"]["cosine"], guided_pull=guided["over_tau"]["k10"]["surrogate_to_mean"])
    assert {key: f"{value:.2f}" for key, value in of.items()} == dict(
        pull="0.38", cosine="-0.26", guided="0.57", guided_pull="-0.06")
    *others, noisiest = guided["bins"]
    assert (f"{noisiest['cosine']:.2f}", f"{noisiest['length_ratio']:.2f}") == ("0.73", "1.01")
    assert (f"{min(each['cosine'] for each in others):.2f}", f"{max(each['cosine'] for each in others):.2f}") == (
        "-0.17", "0.05")

    [again] = json.loads((KEPT / "surrogate-fashion-mnist-omega3" / "runs.json").read_text())["rows"]
    over, noisiest = again["over_tau"]["k10"], again["bins"][-1]["cosine"]
    assert (again["omega"], again["step"]) == (3, 1500)
    words = f"has {over['cosine']:.2f} and {over['surrogate_to_mean']:.2f} at k = 10, and {noisiest:.2f} in the"
    assert f"{words} noisiest fifth" in " ".join(text.split())

    stored = json.loads((KEPT / "surrogate-fashion-mnist-interval" / "runs.json").read_text())
    [ending], whole = stored["rows"], guided
    assert (stored["guide_to"], ending["omega"], ending["step"]) == (0.9, 3, 1500)
    over, all_of = ending["over_tau"]["k10"], whole["over_tau"]["k10"]
    assert (f"at k = 10 is {over['cosine']:.2f} instead of {all_of['cosine']:.2f}, in the noisiest fifth "
            f"{ending['bins'][-1]['cosine']:.2f} instead of {whole['bins'][-1]['cosine']:.2f}, and the pull to the "
            f"class mean is back ({over['surrogate_to_mean']:.2f} instead of {all_of['surrogate_to_mean']:.2f};"
            ) in " ".join(text.split())

    rows = json.loads((KEPT / "surrogate-fashion-mnist-strong" / "runs.json").read_text())["rows"]
    table = "\n".join(surrogate.table(rows))
    assert table in text and table in (KEPT / "surrogate-fashion-mnist-strong" / "README.md").read_text()
    _, ours, guided = rows
    assert (ours["omega"], ours["step"], guided["omega"]) == (1.5, 3680, 3)
    for k, cosine, pull in (("k1", "-0.09", "0.28"), ("k10", "-0.03", "0.17")):
        assert f"{ours['over_tau'][k]['cosine']:.2f}" == cosine
        assert f"{ours['over_tau'][k]['surrogate_to_mean']:.2f}" == pull
    assert (f"{guided['over_tau']['k10']['cosine']:.2f}", f"{guided['bins'][-1]['cosine']:.2f}") == ("0.52", "0.64")


# ---- benchmarks/strength.py ------------------------------------------------------------------------------------------

def test_what_is_said_of_the_strength_of_the_start_is_in_the_numbers():
    text = words_of_the_texts()
    rows = json.loads((KEPT / "strength-digits" / "runs.json").read_text())["rows"]
    found = {(row["start_steps"], row["lam"]): row for row in rows}
    assert sorted({steps for steps, _ in found}) == [100, 200, 400, 800]
    assert sorted({lam for _, lam in found}) == [0.01, 0.05, 0.2]
    above = {key: [statistics.mean(row["difference"][name]) > 0 for name in ("fd_1step", "fd_2step")]
             for key, row in found.items()}
    assert above.pop((800, 0.01)) == [True, False] and all(all(each) for each in above.values())
    for N in (1, 2):
        for steps in (100, 200, 400, 800):
            over_lam = [statistics.mean(found[steps, lam]["difference"][f"fd_{N}step"]) for lam in (0.01, 0.05, 0.2)]
            assert over_lam == sorted(over_lam)
    for steps, lam, name, digits in ((100, 0.2, "fd_2step", 1), (800, 0.2, "fd_2step", 1), (800, 0.01, "fd_2step", 1),
                                     (800, 0.2, "precision_2step", 3), (800, 0.2, "recall_2step", 3),
                                     (100, 0.2, "precision_2step", 3)):
        assert spread(found[steps, lam]["difference"][name], digits, "+") in text
    starts = [f"{statistics.mean(found[steps, 0.01]['start_distance']):.1f}" for steps in (100, 800)]
    assert f"From the start of distance {starts[0]} to that of {starts[1]}" in text
    assert "\n".join(strength.table(rows)) in (KEPT / "strength-digits" / "README.md").read_text()


def test_what_is_said_of_the_strength_of_the_start_on_fashion_mnist_is_in_the_numbers():
    text = words_of_the_texts()
    rows = json.loads((KEPT / "strength-fashion-mnist" / "runs.json").read_text())["rows"]
    assert "\n".join(strength.table(rows)) in (KEPT / "strength-fashion-mnist" / "README.md").read_text()
    found = {(row["start_steps"], row["lam"]): row for row in rows}
    for (steps, name), words, p in (
        ((1500, "fd_1step"), "+2.1 ± 0.5 at 1 step (p 0.020)", 0.0204),
        ((1500, "fd_2step"), "+3.3 ± 0.2 at 2", 0.0013),
        ((1500, "recall_2step"), "recall -0.025 ± 0.001", 0.001), ((300, "fd_1step"), "(-5.9 ± 3.8, p 0.12)", 0.116),
        ((300, "fd_2step"), "level at 2 (-1.2 ± 3.3)", 0.6),
        ((700, "fd_1step"), "lambda 0.03 at 1 step (+0.4 ± 2.1)", 1),
        ((700, "fd_2step"), "at 2 (+3.0 ± 0.2, p 0.002)", 0.0016),
    ):
        differences = found[steps, 0.03]["difference"][name]
        assert spread(differences, 3 if name == "recall_2step" else 1, "+") in words and words in text
        assert scipy.stats.ttest_1samp(differences, 0).pvalue < p
    assert max(found[300, 0.03]["difference"]["fd_1step"]) < 0
    assert f"{max(found[1500, 0.1]['difference']['fd_2step']):+.1f} at 2 steps" in text
    starts = [f"{statistics.mean(found[steps, 0.03]['start_distance']):.1f}" for steps in (1500, 300)]
    assert f"(distance {starts[0]};" in text and f"300 steps ({starts[1]})" in text
    for name, masked, ours in (("table2-digits-weak", 9, (7, 8)), ("table2-digits-strong", 9, (7, 8)),
                               (FASHION_2, 9, (7, 8)), (FASHION_STRONG, 9, (7,)),
                               ("table4-digits", 8, (6,)), (FASHION_4, 8, (6,))):
        told = Told(name)
        for row in ours:
            for N in (1, 2, 4):                                         # "nowhere ahead in every seed"
                assert told.gain(masked, row, f"fd_{N}step", all_five=False).max() > 0


def test_what_is_said_of_the_weakest_start_at_equal_steps_and_at_equal_passes():
    text, kept = words_of_the_texts(), {}
    for name in ("weak", "passes"):
        stored = json.loads((KEPT / f"strength-fashion-mnist-{name}" / "runs.json").read_text())
        [kept[name]] = stored["rows"]
        assert (stored["seeds"], stored["steps"], stored.get("cd_steps")) == (6, 174, 452 if name == "passes" else None)
    for name, metric, words, p in (
        ("weak", "fd_1step", "-5.904 ± 2.393 (p 0.0018", 0.00185), ("weak", "fd_2step", "(-0.817 ± 2.616)", 1),
        ("weak", "recall_2step", "(-0.009 ± 0.005)", 0.01),
        ("passes", "fd_1step", "+14.843 ± 8.475 at 1 step (p 0.0078", 0.0079),
        ("passes", "fd_2step", "+5.125 ± 4.567 at 2 (p 0.04)", 0.041),
        ("passes", "recall_2step", "recall -0.041 ± 0.016", 0.01),
    ):
        d = np.array(kept[name]["difference"][metric])
        assert f"{d.mean():+.3f} ± {d.std(ddof=1):.3f}" in words and words in text, words
        assert scipy.stats.ttest_1samp(d, 0).pvalue < p
    ahead = kept["weak"]["difference"]["fd_1step"]
    assert max(ahead) < 0 < min(kept["passes"]["difference"]["fd_1step"])
    assert f"{np.mean(ahead[3:]):.3f}, p {scipy.stats.ttest_1samp(ahead[3:], 0).pvalue:.2g}" == "-5.189, p 0.053"
    assert "so three new seeds test it" in text and "-5.189 (p 0.053)" in text
    assert [f"{np.mean(kept[name]['cd']):.1f}" for name in ("passes", "weak")] == ["154.8", "160.8"]


def test_what_is_said_of_more_guidance_is_in_the_numbers():
    text = words_of_the_texts()
    stored = json.loads((KEPT / "strength-fashion-mnist-omega3" / "runs.json").read_text())
    assert (stored["omega"], stored["steps"], stored["cd_steps"], stored["seeds"]) == (3, 174, None, 3)
    [row] = stored["rows"]
    assert "\n".join(strength.table([row])) in (KEPT / "strength-fashion-mnist-omega3" / "README.md").read_text()
    for name, words, p in (
        ("fd_2step", "in all three (+9.1 ± 9.4, p 0.24)", 0.24), ("fd_1step", "in one (+4.4 ± 9.8)", 1),
        ("precision_2step", "(-0.061 ± 0.014, p 0.018 alone)", 0.0185), ("recall_2step", "(-0.026 ± 0.014)", 0.09),
    ):
        found = row["difference"][name]
        assert spread(found, 1 if name.startswith("fd") else 3, "+") in words and words in text, words
        assert scipy.stats.ttest_1samp(found, 0).pvalue < p
    assert min(row["difference"]["fd_2step"]) > 0 > min(row["difference"]["fd_1step"])
    assert sum(d < 0 for d in row["difference"]["fd_1step"]) == 1
    strong = json.loads((KEPT / "strength-fashion-mnist-strong-omega3" / "runs.json").read_text())
    [row] = strong["rows"]
    assert (strong["omega"], strong["steps"], strong["cd_steps"], strong["seeds"]) == (3, 174, None, 3)
    assert "\n".join(strength.table([row])) in (KEPT / "strength-fashion-mnist-strong-omega3" / "README.md").read_text()
    for name, words, p in (
        ("fd_2step", "+29.3 ± 2.3 at 2 steps (p 0.0021)", 0.00215),
        ("fd_1step", "+61.4 ± 6.1 at 1 (p 0.0033)", 0.00335),
        ("precision_2step", "precision -0.063 ± 0.015", 0.02), ("recall_2step", "recall -0.048 ± 0.007", 0.02),
    ):
        found = row["difference"][name]
        assert spread(found, 1 if name.startswith("fd") else 3, "+") in words and words in text, words
        assert scipy.stats.ttest_1samp(found, 0).pvalue < p and (np.sign(found) == np.sign(found[0])).all()
    assert [f"{np.mean(row[name]):.1f}" for name in ("start_distance", "cd")] == ["73.6", "73.9"]
    assert "(distance 73.6 at omega 3;" in text and "gains nothing in distance (73.9)" in text
    [weak] = json.loads((KEPT / "strength-fashion-mnist-weak" / "runs.json").read_text())["rows"]
    assert f"({spread(weak['difference']['precision_2step'], 3, '+')}, six seeds)" in text


def test_the_two_methods_of_the_figure_over_starts_differ_in_the_dm_term_alone():
    """What FSF-DMD and consistency distillation share there has the same flags; the table subtracts in that order."""
    parsed = []
    for module, command in ((consistency, strength.CD_MASKED), (fsf_dmd, f"{strength.FSF} --M 2 --shift 10 --lam 0.2")):
        words = shlex.split(command.format(start="imf", cd="", fsf=""))[1:]
        parsed.append(vars(module.parse_args(words)))
    shared = set(parsed[0]) & set(parsed[1]) - {"out", "script", "sources", "code", "health_every", "sampler"}
    assert {"lr", "mask_prob", "batch_size", "omega", "huber_c", "ema", "steps"} <= shared
    assert {k: parsed[0][k] for k in shared} == {k: parsed[1][k] for k in shared}

    difference = dict(fd_1step=[-2.0, -4.0], fd_2step=[1.0, 3.0], precision_2step=[0.1, 0.2], recall_2step=[0.0, 0.1])
    row = dict(start_steps=100, start_distance=[50.0, 52.0], lam=0.2, difference=difference, cd=[20.0, 22.0])
    line = strength.table([row])[2]
    assert "| 100 | 51.0 ± 1.4 | 21.0 ± 1.4 | 0.2 | -3.0 ± 1.4 | +2.0 ± 1.4 | +0.150 ± 0.071 |" in line
    axis = strength.figure([row]).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [-3.0]


def test_the_figure_over_starts_subtracts_cd_from_fsf_dmd(tmp_path):
    jobs = {}
    for name, distances in (("CD", (50.0, 30.0)), (0.1, (50.0, 26.0))):
        evaluations = [dict.fromkeys(strength.SHOWN, distance) | dict(step=i) for i, distance in enumerate(distances)]
        (tmp_path / str(name)).mkdir()
        result = dict(evaluations=evaluations)
        (tmp_path / str(name) / "result.json").write_text(json.dumps(result))
        jobs[100, name, 0] = kept_runs.Job(tmp_path / str(name), ("fsf_dmd.py",), (), None)
    args = strength.parse_args("--starts 100 --lam 0.1 --seeds 1".split())
    [row] = strength.differences(args, jobs)
    assert row["difference"]["fd_2step"] == [-4.0] and row["cd"] == [30.0] and row["start_distance"] == [50.0]


def test_the_figure_over_starts_gives_each_method_its_steps_and_both_one_omega():
    """--steps is the length of both methods, --cd_steps of consistency distillation; the start has its own.

    --omega guides both; the start has learned all, and is trained once.
    """

    def commands_of(flags):
        args = strength.parse_args(shlex.split(f"--starts 30 --lam 0.1 --seeds 1 {flags}"))
        planned = strength.planned(args)
        commands = {name: " ".join(planned[30, name, 0].command) for name in ("start", "CD", 0.1)}
        assert all("--lam 0.1" not in commands[name] for name in ("start", "CD"))
        return commands.values()

    def lengths(flags):
        return [re.findall(r"--steps (\d+)", command) for command in commands_of(flags)]

    def guided(flags):
        return [re.findall(r"--omega ([\d.]+)", command) for command in commands_of(flags)]

    assert guided("") == [[], [], []] and guided("--omega 3") == [[], ["3"], ["3"]]
    assert lengths("") == [["30"], [], []]
    assert lengths("--steps 5") == [["30"], ["5"], ["5"]]
    assert lengths("--steps 5 --cd_steps 13") == [["30"], ["13"], ["5"]]


def test_starts_measured_later_join_the_figure_over_starts_if_measured_alike(tmp_path):
    path = tmp_path / "runs.json"

    def call(start_steps, distance, steps=174, omega=None):
        rows = [dict(start_steps=start_steps, lam=0.1, start_distance=[distance])]
        command = f"--starts {start_steps} --steps {steps}"
        stored = dict(data="digits", seeds=1, steps=steps, omega=omega, torch="2", commands=[command], rows=rows)
        stored = strength.with_earlier(path, stored)
        path.write_text(json.dumps(stored))
        return [row["start_distance"][0] for row in stored["rows"]], stored["commands"]

    assert call(300, 9.0) == ([9.0], ["--starts 300 --steps 174"])
    assert call(100, 7.0) == ([7.0, 9.0], ["--starts 300 --steps 174", "--starts 100 --steps 174"])
    assert call(300, 8.0) == ([7.0, 8.0], ["--starts 300 --steps 174", "--starts 100 --steps 174"])
    assert call(300, 6.0, steps=100) == ([6.0], ["--starts 300 --steps 100"])       # other steps: nothing is kept
    assert call(100, 5.0, steps=100, omega=3.0)[0] == [5.0]                         # another omega: neither


# ---- benchmarks/step.py and benchmarks/gpu.py ------------------------------------------------------------------------

def test_what_needs_a_gpu_is_listed_with_its_command_until_it_was_run():
    text = (KEPT / "gpu.md").read_text()
    assert text == gpu.page(KEPT / "gpu")
    for block in gpu.BLOCKS:
        run = (KEPT / "gpu" / f"{block}.json").exists()
        assert run or f"Not run here: `python benchmarks/gpu.py --block {block}`" in text


def test_the_evidence_shows_the_last_values_of_a_table():
    """Of every row the mean over its seeds after the last step; a column that a row lacks stays empty."""
    table = json.loads((KEPT / "table2-fashion-mnist-strong-row1-2-3-4-7-9-10-11" / "runs.json").read_text())
    rows = {row["row"]: row for row in evidence.rows_of_table(table)}
    assert len(rows) == 8 and all(row["seeds"] == 3 for row in rows.values())
    assert rows["FSF-DMD M=2"]["fd_2step"] == "23.4 ± 2.2" and rows["FSF-DMD M=2"]["passes"] == 2262
    assert rows["Teacher velocity network"]["fd_2step"] == "-"                      # it has 25 steps
    # A run that diverged, and a row without any.
    runs = [dict(evaluations=[dict(fd_2step=value, passes=9)]) for value in (1.0, None)]
    odd = evidence.rows_of_table(dict(rows=[dict(label="a", seeds=dict(enumerate(runs))), dict(label="b", seeds={})]))
    assert [(row["seeds"], row["fd_2step"], row["fd_1step"]) for row in odd] == [(2, "nan ± nan", "-"), (0, "-", "-")]
    # Its flags are reproduce.py's, and the rows those of the methods.
    args = reproduce.parse_args(["2", *shlex.split(evidence.EVIDENCE)])
    assert {reproduce.TABLES["2"].rows[r - 1].label for r in args.row} == rows.keys() - {"control: the iMF trained on"}


def test_what_is_said_of_a_step_is_in_the_numbers():
    text = words_of_the_texts()
    found = json.loads((KEPT / "step-cpu" / "runs.json").read_text())
    assert (KEPT / "step-cpu" / "README.md").read_text() == step.page(found)
    b, M1, M2 = found["backbone"], found["methods"]["FSF-DMD, M = 1"], found["methods"]["FSF-DMD, M = 2"]
    shares = {part: spent / M2["seconds"] for part, spent in M2["parts"].items()}
    small = sum(shares[part] for part in ("EMA", "losses and the rest", "random numbers and data"))
    assert small < 0.01 and b["largest_difference"] < 1e-5
    for words in (
        f"takes {b['ours'] / b['straightforward']:.2f} times as long",
        f"and {b['ours, compiled'] / b['straightforward']:.2f} times when it is compiled",
        f"products and attention alone take {b['products and attention alone'] / b['straightforward']:.2f}",
        f"takes {M1['times_passes_and_optimizer']:.2f} (M = 1) and {M2['times_passes_and_optimizer']:.2f} (M = 2)",
        f"at {M1['share_of_products']:.0%} and {M2['share_of_products']:.0%} of the rate",
        f"NorMuon is {shares['optimizer']:.0%} of a step with M = 2, the finite difference "
        f"{shares['finite difference']:.0%}",
    ):
        assert words in text, words


# ---- benchmarks/finite_difference.py ---------------------------------------------------------------------------------

def test_tf32_is_emulated_as_a_tensor_core_reads_float32():
    one = torch.tensor([1 + 2 ** -10, 1 + 2 ** -11, 1 + 2 ** -12, -1 - 2 ** -11, 3.0])
    assert finite_difference.to_tf32(one).tolist() == [1 + 2 ** -10, 1 + 2 ** -10, 1.0, -1 - 2 ** -10, 3.0]
    x, w = rand(4, 8).float(), rand(6, 8, seed=1).float()
    image, kernel = rand(1, 2, 4, 4).float(), rand(3, 2, 2, 2).float()
    q, k, v = (rand(1, 2, 5, 8, seed=seed).float() for seed in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    with finite_difference.tf32():
        product = torch.nn.Linear(8, 6)
        product.load_state_dict(dict(weight=w, bias=torch.zeros(6)))
        torch.testing.assert_close(product(x), finite_difference.to_tf32(x) @ finite_difference.to_tf32(w).T)
        convolved = F.conv2d(image, kernel)
        attended = F.scaled_dot_product_attention(q, k, v)
    rounded = F.conv2d(finite_difference.to_tf32(image), finite_difference.to_tf32(kernel))
    assert torch.equal(convolved, rounded) and not torch.equal(rounded, F.conv2d(image, kernel))
    assert 0 < (attended - exact).abs().max() < 4 * 2 ** -11 * v.abs().max()


def test_what_is_said_of_the_finite_difference_is_in_the_numbers():
    text = words_of_the_texts()
    found = json.loads((KEPT / "finite-difference" / "runs.json").read_text())
    assert finite_difference.page(found) in (KEPT / "finite-difference" / "README.md").read_text()
    new, trained = ({row["h"]: row for row in rows} for rows in found["error"].values())
    on_h200 = json.loads((KEPT / "gpu" / "difference.json").read_text())["rows"]
    on_h200 = {row["way"].split(", ")[1].split(" ")[0]: row["relative_error"] for row in on_h200}
    assert new[0.005]["TF32"] == pytest.approx(on_h200["TF32"], rel=0.1)
    rows = {(row["method"], row["way"]): row for row in found["training"]}

    def differences(method, way, N):
        return np.array(rows[method, way][f"fd_{N}step"]) - np.array(rows[method, "exact"][f"fd_{N}step"])

    largest = {way: max(abs(differences(method, way, N)).max() for method in finite_difference.METHODS for N in (1, 2))
               for way in finite_difference.WAYS}
    DISTILLED = ("CD with masking", "FSF-DMD, M = 2")
    of_distilled = {}
    for way in finite_difference.WAYS:
        of_distilled[way] = {N: np.concatenate([differences(method, way, N) for method in DISTILLED]) for N in (1, 2)}
    assert f"to {largest['float32, h = 0.005']:.2f}. In TF32" in text
    one, two = of_distilled["TF32, h = 0.005"].values()
    assert f"by {one.min():.2f} to {one.max():.2f}, in all three seeds, and within {abs(two).max():.2f} at 2" in text
    one, imf = of_distilled["bf16, h = 0.005"][1], differences("iMF", "bf16, h = 0.005", 1)
    assert f"by {one.min():.1f} to {one.max():.1f} at 1 step, an iMF by {imf.min():.1f} to {imf.max():.1f}" in text
    one, two = of_distilled["TF32, h = 0.02"].values()
    assert f"within {max(abs(one).max(), abs(two).max()):.2f} of the exact derivative" in text
    errors = [f"{new[h]['TF32']:.3f} and {trained[h]['TF32']:.3f}" for h in (0.02, 0.005)]
    assert f"errs by {errors[0]} (new network, trained one) instead of {errors[1]}" in text
    assert f"the network of the line above errs by {new[0.005]['TF32']:.3f}" in text
    assert trained[0.02]["TF32"] < min(trained[h]["TF32"] for h in trained if h != 0.02)


def test_the_explicit_fake_network_may_be_imfs_own():
    """It has no table of positions to leave out; all that it has learns, and the flow map stays as it was."""
    net = model.IMFDiT(input_size=4, in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=2, mlp_hidden=64,
                       num_classes=3).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    fake, losses = surrogate.train_fake(surrogate.Generator(net, 1.0, 1.0, (2, 4, 4), torch.device("cpu")), 1, seed=0)
    assert len(losses) == 2 and losses[1][1] != losses[0][1]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in fake.state_dict().items())


# ---- As commands -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_surrogate_and_the_rehearsal_for_a_gpu_run(in_home, capsys):
    """Both leave their files; the second measures on the CPU, at tiny size, and what is measured is not done again."""
    run(in_home, "benchmarks/surrogate.py toy=imf/model.pt --omega 1 2 --guide_to 0.9 --steps 3 --n 20 --device cpu "
                 "--out surrogate")
    rows = json.loads((in_home / "surrogate" / "runs.json").read_text())["rows"]
    assert [row["omega"] for row in rows] == [1, 2] and all(len(row["bins"]) == 5 for row in rows)
    assert all(-1 <= row["over_tau"][k]["cosine"] <= 1 for row in rows for k in ("k1", "k10"))
    assert all(-1 <= at["two_explicit"] < 0.99999 for row in rows for at in row["bins"])   # they saw other samples
    assert (in_home / "surrogate" / "surrogate.png").exists()
    command = "benchmarks/gpu.py --rehearse 1 --block difference cost --out gpu"
    run(in_home, f"{command} --block difference cost profile")
    ways = json.loads((in_home / "gpu" / "gpu" / "difference.json").read_text())["rows"]
    assert ways[0]["relative_error"] == 0 < ways[1]["relative_error"] < 0.01 < ways[-1]["relative_error"]
    found = json.loads((in_home / "gpu" / "gpu" / "profile.json").read_text())
    parts = [found[f"seconds_of_{part}"] for _, _, part in gpu.PARTS]
    assert len(parts) == 3 and min(parts) > 0 and sum(parts) < found["step_seconds"]
    assert found["profiled_step_seconds"] > 0 and len(found["largest"]) == 30

    # Again, in this process; cost.py takes SIGTERM for itself.
    on_term = signal.getsignal(signal.SIGTERM)

    def again(more):
        try:
            gpu.run(gpu.parse_args(shlex.split(f"{command} {more}")[1:]))
        finally:
            signal.signal(signal.SIGTERM, on_term)
        return capsys.readouterr().out

    assert "measured before" in again("") and "## difference" in (in_home / "gpu" / "gpu.md").read_text()
    # Of the cost one row is measured: the block is not done, and the row is kept under a name that no block has.
    kept = (in_home / "gpu" / "gpu" / "rows" / "cost.json").read_text()
    label = "imf: Consistency distillation"
    assert [name.split(": ", 1)[1] for name in json.loads(kept)] == [label]
    # A row of an earlier day stays where it is not measured again, with its date, in the table of cost.py too.
    cost_of, table = in_home / "gpu" / "gpu" / "cost.json", in_home / "gpu" / "cost-cpu-tiny" / "runs.json"
    for path, date in ((cost_of, "2026-01-02"), (table, None)):
        stored = json.loads(path.read_text())
        stored["rows"].append(dict(stored["rows"][0], label="FM", sec_per_step=7.0, date=date))
        path.write_text(json.dumps(stored | dict(before="kept", outdated={"FM": "why", label: "measured again"})))
    assert "measured before" not in again("--again 1")
    measured = json.loads((in_home / "gpu" / "gpu" / "rows" / "cost.json").read_text())
    assert measured.keys() == json.loads(kept).keys() and measured != json.loads(kept)
    again("--block cost")                                           # measured before: a row keeps the date of its day
    stored = json.loads(cost_of.read_text())
    assert [row["label"] for row in stored["rows"]] == [label, "FM"]
    assert [row["date"] for row in stored["rows"]][1] == "2026-01-02" < stored["rows"][0]["date"]
    assert stored["before"] == "kept" and "FM" not in stored["missing"] and len(stored["missing"]) == 19
    assert [row["sec_per_step"] for row in json.loads(table.read_text())["rows"]][1:] == [7.0]
    assert "| FM | " in table.with_name("README.md").read_text()
    assert stored["outdated"] == {"FM": "why"}
    for page in (table.with_name("README.md"), in_home / "gpu" / "gpu.md"):
        assert "Of code that has changed since: FM (why)." in page.read_text()
    # A row is of other code than today's where that was kept, or where nothing was.
    assert gpu.changed_rows(stored) == ["FM"] and gpu.unfinished("cost", cost_of)
    stored["code"] = {label: "other", "FM": gpu.code_of("consistency.py")}
    assert gpu.changed_rows(stored) == [label]


def test_a_block_that_fails_does_not_end_the_others_and_no_block_is_begun_late(in_home, capsys):
    (in_home / "broken" / "cost-cpu-tiny").mkdir(parents=True)
    (in_home / "broken" / "cost-cpu-tiny" / "runs.json").write_text("{")
    args = gpu.parse_args("--rehearse 1 --block cost difference --out broken".split())
    with pytest.raises(BadInput, match="failed: cost; what they raised is above"):
        gpu.run(args)
    said = capsys.readouterr()
    assert "runs.json: not what cost.py measured" in said.err and "difference: " in said.out
    assert (in_home / "broken" / "gpu" / "difference.json").exists()
    args = gpu.parse_args("--rehearse 1 --block difference --again 1 --minutes 1e-9 --out broken".split())
    gpu.run(args)
    said = capsys.readouterr().out
    assert "difference: not begun, it would not end within 1e-09 minutes; the same command goes on" in said


def test_the_evidence_counts_the_seeds_that_are_done(tmp_path):
    words = ["2", "--row", "1", "7", "--seeds", "3", "--runs", str(tmp_path)]
    made = reproduce.parse_args(words)
    rows = {r: reproduce.TABLES["2"].rows[r - 1] for r in made.row}
    assert evidence.finished_seeds(made) == 0
    for seed, expected in ((0, 1), (2, 1), (1, 3)):                     # the seeds before it count
        for job in reproduce.jobs_of(made, rows, seed).values():
            job.folder.mkdir(parents=True, exist_ok=True)
            torch.save({}, job.folder / "model.pt")
            (job.folder / "result.json").write_text("{}")
            kept_runs.beside(job, ".json").write_text(json.dumps(dict(kept_runs.identity(job), done=True)))
        assert evidence.finished_seeds(made) == expected


@pytest.mark.slow
def test_beside_a_fake_network_everything_else_is_fsf_dmds(in_home, monkeypatch):
    """benchmarks/explicit.py: the same L_CD in both; the fake network begins as the teacher, then learns."""
    command = "benchmarks/explicit.py --data toy.npz --start_steps 3 --lam 0.5 --ttur 2 --seeds 1 --runs explicit "
    command += "--lam_explicit 0.25 --fake_lr 0.002"
    run(in_home, f"{command} --steps 1 --out explicit/out")
    found = json.loads((in_home / "explicit" / "out" / "runs.json").read_text())
    assert [(row["fake"], row["lam"]) for row in found["rows"]] == [
        (explicit.OWN, 0.0), (explicit.OWN, 0.5), (explicit.EXPLICIT, 0.25)]
    assert [row["runs"][0]["passes"] for row in found["rows"]] == [5, 13, 23]
    names = "own-lam0", "own-lam0.5", "ttur2-fake_lr0.002-lam0.25"
    first = []                                                          # the losses of step 1
    for name in names:
        [folder] = (in_home / "explicit" / "out" / "runs").glob(f"{name}-seed0-*")
        first += [line for line in read_metrics(in_home, folder) if "cd" in line]
    assert first[0]["cd"] == first[1]["cd"] == first[2]["cd"] and first[1]["gap"] > 0 == first[2]["gap"]

    # The fake network is saved with the run: what goes on ends as what was never stopped.  Nothing asks the metrics.
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1, 2, 4), 60, 0))
    for out in ("out", "straight"):
        explicit.run(explicit.parse_args(shlex.split(f"{command} --steps 3 --out explicit/{out}")[1:]))
    for name in names:
        [one], [other] = ((in_home / "explicit" / out / "runs").glob(f"{name}-seed0-*") for out in ("out", "straight"))
        states = [torch.load(folder / "state.pt", weights_only=True) for folder in (one, other)]
        for part in ("net", "ema", *(["fake"] if "fake" in states[0] else [])):
            assert all(torch.equal(value, states[1][part][key]) for key, value in states[0][part].items())
    assert "fake" in states[0] and states[0]["opt_fake"]["param_groups"][0]["lr"] == 0.002


@pytest.mark.slow
def test_the_benchmark_of_a_step_compares_like_with_like(in_home):
    """benchmarks/step.py: its straightforward network is ours, and every part that it names was met."""
    run(in_home, "benchmarks/step.py --size tiny --batch_size 4 --repeats 1 --compile 0 --device cpu --out parts")
    found = json.loads((in_home / "parts" / "runs.json").read_text())
    assert found["backbone"]["largest_difference"] < 1e-5 * found["backbone"]["largest_output"]
    assert [m["passes"] for m in found["methods"].values()] == [5, 10, 13]
    for name, m in found["methods"].items():
        lines = (in_home / "parts" / "README.md").read_text()
        assert {"backward", "optimizer", "EMA", "finite difference", "logging"} <= m["parts"].keys() and name in lines


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_the_evidence_is_stopped_and_leaves_no_process(in_home):
    """By SIGTERM: the table's process ends with it, and nothing counts as measured."""
    words = shlex.split("benchmarks/gpu.py --rehearse 1 --block evidence --out evidence-stopped")
    process = begin(in_home, [sys.executable, str(HERE / words[0]), *words[1:]])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    child = int(children.read_text())
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode and not Path(f"/proc/{child}").exists()
    assert not (in_home / "evidence-stopped" / "gpu" / "evidence.json").exists()


def test_benchmarks_refuse_what_they_would_mix_or_write_over(in_home, tmp_path):
    (tmp_path / "README.md").write_text("precious")
    for script, words in ((surrogate, ["a=a.pt"]), (strength, []), (step, []), (finite_difference, []), (explicit, [])):
        with pytest.raises(BadInput, match="has a README.md and no runs.json"):
            script.parse_args([*words, "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="--lam: 0 is out of range"):
        strength.parse_args(["--lam", "0", "0.1"])
    other = torch.load("imf/model.pt", weights_only=True)
    torch.save(other | dict(data=dict(other["data"], source="digits")), tmp_path / "other.pt")
    with pytest.raises(BadInput, match="was trained on digits, the others on toy.npz"):
        surrogate.run(surrogate.parse_args(["a=imf/model.pt", f"b={tmp_path}/other.pt", "--device", "cpu"]))


def test_a_picture_is_written_over_no_other_file(in_home):
    before = Path("imf/model.pt").read_bytes()
    for out in ("imf/model.pt", "imf"):
        with pytest.raises(BadInput, match="expected the name of a .png"):
            picture.run(picture.parse_args(["a=imf/model.pt", "--out", out]))
    assert Path("imf/model.pt").read_bytes() == before


@pytest.mark.slow
def test_the_picture_of_several_networks_shows_what_they_generate(in_home):
    """benchmarks/picture.py: under its caption stands the sample that `generate` makes, not another one's."""
    run(in_home, "benchmarks/picture.py start=imf/model.pt v=fm/model.pt --steps 2 --out three.png")
    picture = np.asarray(Image.open(in_home / "three.png").convert("L"))
    made_for = checkpoints.load_checkpoint("imf/model.pt")["data"]
    side, shape = 48, made_for["shape"]
    assert picture.shape[0] == 3 * (20 + side + 4) + 4                  # real images and two networks
    for band, path in enumerate(("imf/model.pt", "fm/model.pt"), 1):
        net, checkpoint = checkpoints.load_network(path)
        flags = checkpoint["args"]
        x, _ = evaluate.generate(net, 3, shape, 2, flags["omega"], flags["guide_to"], classes=3)
        expected = data.to_images(x, made_for)[..., 0]
        top = band * (20 + side + 4) + 20
        for column in range(3):
            tile = picture[top:top + side, 4 + column * (side + 4):][:, :side]
            assert (tile[::side // shape[1], ::side // shape[2]] == expected[column]).all()


def test_how_many_rows_of_imf_are_not_guided_at_the_presets_of_latents():
    """RESULTS, "Passes that could still be left out": a third of the rows, 6% of 5.5 passes."""
    preset = consistency.PRESETS["latents", "scratch"]
    r = torch.rand(200_000, 6, generator=torch.Generator().manual_seed(0))
    t, s = consistency.draw_times(r[:, :2])
    guidance = consistency.whole_interval(consistency.draw_guidance(r[:, 2:5], omega_max=preset["omega_max"]), t, s)
    outside = model.gate_guidance(guidance, t)[:, 0] == 1
    share = (outside | (r[:, 5] < 0.1)).double().mean().item()          # --label_drop
    assert 0.32 < share < 0.34 and round(share / 5.5, 2) == 0.06
    beyond = (model.shift_time(r[:, 0], 10.0) > preset["guide_to"]).double().mean().item()
    assert beyond == pytest.approx(0.53, abs=0.01)


# ---- benchmarks/explicit.py ------------------------------------------------------------------------------------------

def told_of_explicit(folder):
    """(rows of results/FOLDER: {(v_fake, lambda): runs}, the texts); table and page follow from the runs."""
    stored = json.loads((KEPT / folder / "runs.json").read_text())
    rows = {(row["fake"], row["lam"]): row["runs"] for row in stored["rows"]}
    table = "\n".join(explicit.table(rows))
    assert table in (KEPT / folder / "README.md").read_text() and table in (HERE / "RESULTS.md").read_text()
    return rows, words_of_the_texts()


def test_what_is_said_of_a_fake_network_in_the_place_of_the_surrogate_is_in_the_numbers():
    rows, text = told_of_explicit("explicit-digits")
    alone, own = (explicit.OWN, 0.0), (explicit.OWN, 1.0)
    beside, heavy = (explicit.EXPLICIT, 1.0), (explicit.EXPLICIT, 4.0)

    def all_of(arm, name):
        """The differences of all seeds, and the p of their t-test."""
        found = explicit.differences(rows, arm, name)
        return found, scipy.stats.ttest_1samp(found, 0).pvalue

    for arm, name, words in (
        (own, "fd_2step", "+37.492 ± 5.626 in distance"), (own, "recall_2step", "-0.379 ± 0.032 in recall, in"),
        (beside, "fd_2step", "-0.916 ± 0.966 at lambda 1 and"), (heavy, "fd_2step", "-1.505 ± 1.251 at lambda 4,"),
        (heavy, "fd_1step", "(+6.003 ± 6.364 at lambda 4)"),
        ((explicit.EXPLICIT, 0.1), "fd_2step", "(-0.072 ± 0.226 at 2 steps)"),
        ((explicit.OWN, 0.1), "fd_2step", "the surrogate costs +2.397 ± 0.566"),
    ):
        found, _ = all_of(arm, name)
        assert spread(found, 3, "+") in words and words in text, words
    assert max(all_of(own, "recall_2step")[0]) < 0 < min(all_of(own, "fd_2step")[0])
    assert max(all_of(beside, "fd_2step")[0]) < 0 and max(all_of(heavy, "fd_2step")[0]) < 0
    assert f"five seeds (p {all_of(beside, 'fd_2step')[1]:.2g}, {all_of(heavy, 'fd_2step')[1]:.2g})" in text
    recall, p = all_of(heavy, "recall_2step")
    assert min(recall) > 0 and f"by {spread(recall, 3)} (p {p:.2g} alone)" in text
    lost = [-value for value in all_of(heavy, "precision_2step")[0]]
    assert min(lost) > 0 and f"(at lambda 4 by {spread(recall, 3)} and {spread(lost, 3)})" in text
    for name, sign in (("recall_2step", -1), ("precision_2step", 1)):               # the surrogate: the reverse
        assert min(sign * value for value in all_of((explicit.OWN, 0.1), name)[0]) > 0
    ps = sorted(all_of((explicit.EXPLICIT, lam), name)[1] for lam in (0.1, 1.0, 4.0) for name in explicit.SHOWN)
    assert len(ps) == 15 and ps[0] * 15 > 0.05                                      # Holm's first step rejects none

    def mean(arm, name):
        return statistics.mean(each[name] for each in rows[arm])

    for words in (f"is smaller ({mean(beside, 'gap'):.3f}; the surrogate's {mean(own, 'gap'):.3f} at lambda 1)",
                  f"(lambda times gap {4 * mean(heavy, 'gap'):.2f}; the surrogate at lambda 1 {mean(own, 'gap'):.2f})",
                  f"L_CD is as high ({mean(heavy, 'cd'):.3f} and {mean(own, 'cd'):.3f})",
                  f"is {mean(own, 'x_hat_std'):.2f} with the surrogate at lambda 1, {mean(heavy, 'x_hat_std'):.2f} "
                  f"with the fake network at lambda 4, and {mean(alone, 'x_hat_std'):.2f} without the term",
                  f"(CD {Told('table2-digits-weak').mean(3, 'recall_2step', 3)}; {mean(beside, 'recall_2step'):.3f} at "
                  f"lambda 1, {mean(heavy, 'recall_2step'):.3f} at lambda 4)"):
        assert words in text, words

    lagging = {(row["fake"], row["lam"]): row["runs"] for row in json.loads(
        (KEPT / "explicit-digits-ttur1" / "runs.json").read_text())["rows"]}
    for name, words in (("fd_2step", "+129.760 ± 69.138 at 2 steps"), ("fd_1step", "+273.309 ± 134.337 at 1.")):
        found = explicit.differences(lagging, beside, name)
        assert spread(found, 3, "+") in words and words in text
        assert all(a > b > 0 for a, b in zip(found, explicit.differences(rows, own, name), strict=True))
    assert lagging[own] == rows[own] and lagging[beside][0]["passes"] == 18
    # Lambda 0 is CD with masking of Table 2, run once more.
    masked = [run["evaluations"][-1] for run in next(
        row for row in Told("table2-digits-weak").stored["rows"] if row["number"] == 9)["seeds"].values()]
    for ours, kept in zip(rows[explicit.OWN, 0.0], masked):
        assert ours["fd_2step"] == pytest.approx(kept["fd_2step"], rel=0.05)


def test_what_is_said_of_a_fake_network_on_fashion_mnist_is_in_the_numbers():
    rows, text = told_of_explicit("explicit-fashion-mnist")
    own, beside = (explicit.OWN, 0.1), (explicit.EXPLICIT, 0.1)
    for name in ("fd_1step", "fd_2step", "fd_4step"):
        assert min(explicit.differences(rows, own, name)) > 0
    recall = explicit.differences(rows, own, "recall_2step")
    assert max(recall) < 0 and f"lowers recall (by {-statistics.mean(recall):.3f} in the mean)" in text
    distance, recall = (explicit.differences(rows, beside, name) for name in ("fd_2step", "recall_2step"))
    assert f"({spread(distance, 1, '+')} in distance at 2 steps, {spread(recall, 3, '+')} in recall)" in text
    assert min(distance) < 0 < max(distance)

    kept = json.loads((KEPT / "explicit-fashion-mnist-lambda1" / "runs.json").read_text())["rows"]
    alone, own, beside = (row["runs"][0] for row in kept)
    assert f"+{own['fd_2step'] - alone['fd_2step']:.3f} at 2 steps with the surrogate, whose recall falls to " \
           f"{own['recall_2step']:.3f}, +{beside['fd_2step'] - alone['fd_2step']:.3f} with the fake network, whose " \
           f"recall is {beside['recall_2step']:.3f} ({alone['recall_2step']:.3f} without the term)" in text
