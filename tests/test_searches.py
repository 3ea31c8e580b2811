"""The settings of the presets are the best of the searches in results/, and the texts say what these found."""
import json
import math
import shlex
import statistics

import pytest

import consistency
import dmd2
import fsf_dmd
import reproduce
import search
import sid
import twinflow
from common import BadInput
from plumbing import report
from test_helpers import HERE
from told import KEPT, best_of_search, lines_of_searches, told_of_search, words_of_the_texts


def test_the_new_start_of_the_digits_and_its_first_search_are_in_the_text():
    """Both tables of RESULTS.md follow from their runs.json; presets of CD and FSF-DMD are the best of that search."""
    text = (HERE / "RESULTS.md").read_text()
    starts = json.loads((KEPT / "start-digits" / "runs.json").read_text())["rows"]
    means = {}
    for mask in (0.5, 0.75, 0.9):
        of_both = [row for row in starts if row["mask_prob"] == mask]
        assert [row["seed"] for row in of_both] == [100, 101] and all(row["steps"] == 400 for row in of_both)
        means[mask] = [statistics.mean(row[f"fd_{N}step"] for row in of_both) for N in (1, 2, 4, 25)]
        assert f"| {mask} | " + " | ".join(f"{mean:.1f}" for mean in means[mask]) + " |" in text
    chosen = consistency.PRESETS["pixels", "scratch"]
    assert (chosen["steps"], chosen["mask_prob"]) == (400, 0.9)

    rows = json.loads((KEPT / "search-digits-weak" / "runs.json").read_text())["rows"]
    lines = [report.markdown_line(cells) for cells in search.body(rows)]
    assert "\n".join(lines) in text and "\n".join(lines) in (KEPT / "search-digits-weak" / "README.md").read_text()
    assert all(len(row["distance"]) in (1, 2) for row in rows)
    distance = {(row["method"], row["setting"]): statistics.mean(row["distance"]) for row in rows}
    best = {}                                                         # of those that ran on both seeds
    for row in rows:
        if len(row["distance"]) == 2:
            value = distance[row["method"], row["setting"]]
            best[row["method"]] = min(value, best.get(row["method"], math.inf))
    assert len(rows) == 6 * len(best) == 36
    for method, script, names in (("DMD2", dmd2, ("lr", "fake_lr")), ("SiD", sid, ("lr", "fake_lr"))):
        setting = " ".join(f"--{name} {script.PRESETS['pixels', 'imf'][name]}" for name in names)
        assert distance[method, setting] == best[method]
    assert distance["DMD2 + L_CD", "--lam 1 --lr 0.003 --fake_lr 0.003"] == best["DMD2 + L_CD"]
    both = dmd2.PRESETS_OF_CD["pixels", "imf"]
    assert (both["lr"], both["fake_lr"], both["lam"]) == (0.003, 0.003, 1)
    assert distance["FSF-DMD, M = 1", "--lam 0.01 --shift 10"] == best["FSF-DMD, M = 1"]
    lam, shift = (fsf_dmd.PRESETS["pixels", "imf"][name] for name in ("lam", "shift"))
    assert distance["FSF-DMD, M = 2", f"--lam {lam} --shift {shift:.0f}"] == best["FSF-DMD, M = 2"]
    assert distance["CD with masking", f"--lr {consistency.PRESETS['pixels', 'imf']['lr']}"] == best["CD with masking"]
    words = (f"CD with masking takes the distance from {means[0.9][1]:.1f} to {best['CD with masking']:.1f}, "
             f"and the best FSF-DMD with M = 2 to {best['FSF-DMD, M = 2']:.1f}")
    assert words in " ".join(text.split())
    fsf = {k: [distance["FSF-DMD, M = 2", f"--lam {lam} --shift {k}"] for lam in (0.01, 0.05, 0.2)] for k in (1, 10)}
    assert fsf[1] == sorted(fsf[1]) and fsf[10] == sorted(fsf[10])    # every larger lambda costs distance,
    assert all(one > ten for one, ten in zip(fsf[1][1:], fsf[10][1:], strict=True))                 # more at k = 1


def test_what_is_said_of_the_weight_of_the_gan_is_in_the_numbers():
    weak, of_gan = (json.loads((KEPT / f"search-digits-weak{name}" / "runs.json").read_text())["rows"]
                    for name in ("", "-DMD2_s_lambda_G"))
    assert dmd2.PRESETS["pixels", "imf"]["lr"] == 0.0003 and dmd2.PRESETS["pixels", "imf"]["fake_lr"] == 0.003
    [papers] = [row["distance"] for row in weak if row["setting"] == "--lr 0.0003 --fake_lr 0.003"
                and row["method"] == "DMD2"]
    found = {row["setting"].removeprefix("--lambda_g "): row["distance"] for row in of_gan}
    mean = {g: f"{statistics.mean(found[g]):.1f}" for g in ("0.012", "0.042", "0.15")}
    for words in (f"lambda_G of 0.003 has {statistics.mean(papers):.1f} (above), 0.012 {mean['0.012']} and 0.042,",
                  f"64 x 64 images, {mean['0.042']}; 0.15 has {mean['0.15']} on seed 100,",
                  f"where 0.003 has {found['0.003'][0]:.1f}."):
        assert words in words_of_the_texts(), words
    assert found["0.003"][0] == pytest.approx(papers[0], abs=0.1)       # the same run, on another day


def test_settings_from_the_strong_start_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("strong").items()}
    assert reproduce.FLAGS_STRONG == {
        "cd": f" {best['CD with masking']}",
        "fsf": f" {best['CD with masking']}",                                      # the rate of its own L_CD
        "m1": " " + best["FSF-DMD, M = 1"].removesuffix(" --shift 10"),
        "dmd2": f" {best['DMD2']}",
        "cd1": f" {best['DMD2 + L_CD']}",
    }
    assert best["FSF-DMD, M = 2"] == "--lam 0.01 --shift 10" and best["SiD"] == "--lr 0.0003 --fake_lr 0.003"
    for script, names in ((fsf_dmd, dict(lam=0.01, shift=10)), (sid, dict(lr=3e-4, fake_lr=3e-3))):
        preset = script.PRESETS["pixels", "imf"]
        assert {name: preset[name] for name in names} == names
    told_of_search("strong")


def test_presets_from_a_velocity_network_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("fm").items()}
    cd, fsf, both, of_sid = (script.PRESETS["pixels", "fm"] for script in (consistency, fsf_dmd, dmd2, sid))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    assert best["SiD"] == f"--lr {of_sid['lr']} --fake_lr {of_sid['fake_lr']}"
    assert best["DMD2 + L_CD"] == "--lam 1 --lr 0.003 --fake_lr 0.003"
    with_cd = dmd2.PRESETS_OF_CD["pixels", "fm"]
    assert with_cd["lr"] == with_cd["fake_lr"] == 0.003 and with_cd["lam"] == 1
    told_of_search("fm")


def test_presets_from_scratch_are_the_best_of_their_search():
    """Every method at the learning rate of the loss on the data that it is added to."""
    best = {method: setting for method, (setting, _) in best_of_search("scratch").items()}
    rcgm = consistency.PRESETS_OF_LOSS["rcgm"]["pixels", "scratch"]
    fsf, both, twin = (script.PRESETS["pixels", "scratch"] for script in (fsf_dmd, dmd2, twinflow))
    on_rcgm = twinflow.PRESETS_OF_RCGM["pixels", "scratch"]
    assert best["iMF"] == f"--lr {fsf['lr']}" and fsf["lr"] == both["lr"] == twin["lr"]
    assert f" --mask_prob 0.5 --lr {fsf['lr']} " in reproduce.FLAGS["imf"][0]
    assert best["RCGM"] == " ".join(f"--{name} {rcgm[name]}" for name in ("target_ema", "delta", "lr"))
    assert {name: on_rcgm[name] for name in ("target_ema", "delta", "lr")}.items() <= rcgm.items()
    assert best["FSF-DMD"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    for method, preset in (("iMF + DMD2", both), ("iMF + TwinFlow", twin), ("RCGM + TwinFlow", on_rcgm)):
        assert best[method] == f"--lam {preset['lam']}"
    told_of_search("scratch")


def test_presets_of_images_from_a_velocity_network_are_the_best_of_their_search():
    """CD and FSF-DMD with one number of forward passes, DMD2 with half as many again, from the same start."""
    best = {method: setting for method, (setting, _) in best_of_search("fm", "fashion-mnist", seeds=1).items()}
    cd, fsf, both = (script.PRESETS["images", "fm"] for script in (consistency, fsf_dmd, dmd2))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    rows = json.loads((KEPT / "search-fashion-mnist-fm" / "runs.json").read_text())["rows"]
    for row in rows:
        expected = 3359 if row["method"] == "DMD2" else 2250
        assert row["runs"][0]["evaluations"][-1]["passes"] == pytest.approx(expected, rel=0.001)
    lines = []
    for name, presets in (("SiD", sid.PRESETS), ("DMD2_L_CD", dmd2.PRESETS_OF_CD)):
        [(setting, lowest)] = best_of_search(f"fm-{name}", "fashion-mnist", seeds=1).values()
        preset = presets["images", "fm"]
        assert setting.endswith(f"--lr {preset['lr']} --fake_lr {preset['fake_lr']}")
        lines.append(f"{lowest:.1f}")
    text, starts = words_of_the_texts(), []
    for name in ("fm-DMD2_L_CD", "fm"):
        [row, *_] = json.loads((KEPT / f"search-fashion-mnist-{name}" / "runs.json").read_text())["rows"]
        starts.append(f"{row['runs'][0]['evaluations'][0]['fd_2step']:.1f}")
    assert "({} at 2 steps; {} before)".format(*starts) in text
    assert f"The {lines[0]} of its search was one run, with the lowest distance of any method on that seed." in text
    assert f"DMD2 + L_CD was searched with masking and has {lines[1]} there, at the edge of its search." in text


def test_presets_of_images_from_an_imf_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("weak", "fashion-mnist", seeds=1).items()}
    cd, fsf, both = (script.PRESETS["images", "imf"] for script in (consistency, fsf_dmd, dmd2))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    of_sid = sid.PRESETS["images", "imf"]
    [(setting, lowest)] = best_of_search("weak-SiD", "fashion-mnist", seeds=1).values()
    assert setting == f"--lr {of_sid['lr']} --fake_lr {of_sid['fake_lr']}"
    assert lowest < min(value for _, value in best_of_search("weak", "fashion-mnist", seeds=1).values())
    [(setting, _)] = best_of_search("weak-FSF_DMD_M_1", "fashion-mnist", seeds=1).values()
    assert setting == best["FSF-DMD, M = 2"]


def test_every_search_on_fashion_mnist_is_in_the_table():
    assert "\n".join(lines_of_searches()) in (HERE / "RESULTS.md").read_text()


def test_what_is_said_of_the_searches_on_fashion_mnist_is_in_the_numbers():
    text = words_of_the_texts()

    def found(name):
        """{setting: distance} of a search of one method."""
        rows = json.loads((KEPT / f"search-fashion-mnist-{name}" / "runs.json").read_text())["rows"]
        return {row["setting"]: f"{row['distance'][0]:.1f}" for row in rows}

    weak, of_sid = found("weak"), found("weak-SiD")
    best, tables = "--lr 0.0003 --fake_lr 0.001", "--lr 0.0001 --fake_lr 0.001"
    for words in (f"Again the smallest lambda is the best, 0.0003 ({weak['--lam 0.0003 --shift 10']}; the paper's "
                  f"0.05: {weak['--lam 0.05 --shift 10']}), with M = 1 too",
                  f"`{best}`, has {of_sid[best]} there, the lowest distance of any method (the table's 0.0001 and "
                  f"0.001: {of_sid[tables]})"):
        assert words in text, words

    cd, both, fsf = found("strong-CD_with_masking"), found("strong-DMD2"), found("strong-FSF_DMD_M_2")
    rates = dmd2.PRESETS["images", "imf"]                             # the table's
    assert min(both, key=both.get) == f"--lr {rates['lr']} --fake_lr {rates['fake_lr']}"
    assert fsf_dmd.PRESETS["images", "imf"]["lam"] == 0.0003 and fsf["--lam 0.0003 --shift 10"] == min(fsf.values())
    [row] = json.loads((KEPT / "search-fashion-mnist-strong-CD_with_masking" / "runs.json").read_text())["rows"][:1]
    one, last = found("strong-FSF_DMD_M_1"), found("strong-DMD2_L_CD")
    for words in (f"({row['runs'][0]['evaluations'][0]['fd_2step']:.1f} at 2 steps; the table's 39.7)",
                  f"its second best ({cd['--lr 0.004']}; at twice the rate {cd['--lr 0.008']})",
                  f"with M = 1 is 0.015 ({one['--lam 0.015 --shift 10']}; 0.0003 has {one['--lam 0.0003 --shift 10']})",
                  f"DMD2 + L_CD has {last['--lam 1 --lr 0.003 --fake_lr 0.003']}, at the edge of its search"):
        assert words in text, words
    assert consistency.PRESETS["images", "imf"]["lr"] == 0.004 and cd["--lr 0.004"] == sorted(cd.values())[1]


def test_the_searches_that_ended_at_an_edge_are_told():
    """A best setting whose rate, or FSF-DMD's lambda, is the smallest or the largest that was tried."""
    found = {}                                                      # (method, flag, end): {data and start}
    for path in sorted(KEPT.glob("search-*/runs.json")):
        rows, kind = json.loads(path.read_text())["rows"], path.parent.name.removeprefix("search-")
        data = "digits" if kind.startswith("digits") else "fashion"
        start = kind.removeprefix("digits-").removeprefix("fashion-mnist-").split("-")[0]
        for method in {row["method"] for row in rows}:
            tried = [(shlex.split(row["setting"]), row) for row in rows if row["method"] == method]
            best, _ = min(tried, key=lambda each: statistics.mean(each[1]["distance"]))
            for flag in {"--lr", "--lam"} & {*best}:
                values = sorted({float(setting[setting.index(flag) + 1]) for setting, _ in tried})
                value = float(best[best.index(flag) + 1])
                for end, of_end in (("smallest", values[0]), ("largest", values[-1])):
                    if len(values) > 1 and value == of_end:
                        found.setdefault((method, flag, end), set()).add(f"{data} {start}")
    strong = {"digits strong", "fashion strong"}
    assert len(found["FSF-DMD, M = 2", "--lam", "smallest"]) == 5
    assert found["CD with masking", "--lr", "largest"] == strong
    assert found["CD with masking", "--lr", "smallest"] == {"digits fm"}
    assert found["CD without masking", "--lr", "smallest"] == {"digits weak"}
    assert found["DMD2", "--lr", "largest"] == strong | {"digits fm"}
    assert found["SiD", "--lr", "largest"] == {"digits fm"}
    assert found["DMD2, 1:1, no GAN", "--lr", "smallest"] == {"digits weak", "fashion weak", "fashion strong"}
    assert len(found["DMD2 + L_CD", "--lr", "largest"]) == 6 and len(found["DMD2 + L_CD", "--lam", "largest"]) == 5
    assert found["FSF-DMD", "--lam", "smallest"] == {"fashion scratch"}
    told = words_of_the_texts()
    for words in ("(M = 2) at its smallest from five starts of six, and from scratch on Fashion-MNIST",
                  "CD's rate at its largest from both strong starts",
                  "of DMD2 1:1 at its smallest from three starts of four",
                  "at its largest rates from all six, at its largest lambda from five"):
        assert words in told, words


def test_cd_without_masking_has_the_best_rate_of_its_own_searches():
    """On digits it is that of CD with masking; from Fashion-MNIST's velocity network row 3 of Table 4 has its own."""
    text, shared = words_of_the_texts(), consistency.PRESETS
    for start, rate, words in (("weak", shared["pixels", "imf"]["lr"], "22.4, as at 0.001"),
                               ("strong", float(reproduce.FLAGS_STRONG["cd"].split()[1]), "9.9"),
                               ("fm", shared["pixels", "fm"]["lr"], "12.4")):
        folder = KEPT / f"search-digits-{start}-CD_without_masking"
        rows = {row["setting"]: row["distance"] for row in json.loads((folder / "runs.json").read_text())["rows"]}
        assert len(rows) == len(search.BEYOND[start]["CD without masking"][1])
        means = {setting: statistics.mean(found) for setting, found in rows.items() if len(found) == 2}
        lowest, ours = f"{min(means.values()):.1f}", f"{means[f'--lr {rate}']:.1f}"
        assert ours == lowest == words.split(",")[0]
        assert f"([{rate}](results/{folder.name}/README.md)) {words}" in text
    folder = KEPT / "search-fashion-mnist-weak-CD_without_masking"                      # there the shared one is level
    rows = json.loads((folder / "runs.json").read_text())["rows"]
    found = {row["setting"]: f"{row['distance'][0]:.1f}" for row in rows}
    ours = found[f"--lr {shared['images', 'imf']['lr']}"]
    assert f"it has {ours} on the search seed, the best one (0.002) {found['--lr 0.002']}" in text
    assert min(found.values()) == found["--lr 0.002"]
    rows = json.loads((KEPT / "search-fashion-mnist-fm-CD_without_masking" / "runs.json").read_text())["rows"]
    best = min(rows, key=lambda row: row["distance"][0])
    assert len(rows) == 5 and reproduce.FLAGS["cd_fm"][1].strip() == best["setting"]
    assert all("--mask_prob 0 " in row["command"] for row in rows)


def test_presets_of_images_from_scratch_are_the_best_of_their_search():
    """The additions to iMF and RCGM have the rate of these."""
    rows = json.loads((KEPT / "search-fashion-mnist-scratch" / "runs.json").read_text())["rows"]
    found = {(row["method"], row["setting"]): row["distance"][0] for row in rows}
    best = {method: min((distance, setting) for (of, setting), distance in found.items() if of == method)[1]
            for method in ("iMF", "RCGM", "FSF-DMD")}
    preset = fsf_dmd.PRESETS["images", "scratch"]
    assert best["FSF-DMD"] == f"--lr {preset['lr']} --lam {preset['lam']} --shift {preset['shift']:.0f}"
    assert reproduce.FLAGS["imf"][1].endswith(best["iMF"]) and best["iMF"] == best["RCGM"] == f"--lr {preset['lr']}"
    others = [dmd2.PRESETS, twinflow.PRESETS, twinflow.PRESETS_OF_RCGM, consistency.PRESETS_OF_LOSS["rcgm"]]
    assert all(presets["images", "scratch"]["lr"] == preset["lr"] for presets in others)
    text = words_of_the_texts()
    for name, presets in (("iMF_DMD2", dmd2.PRESETS), ("iMF_TwinFlow", twinflow.PRESETS),
                          ("RCGM_TwinFlow", twinflow.PRESETS_OF_RCGM)):                 # searched later, at that rate
        folder = KEPT / f"search-fashion-mnist-scratch-{name}"
        rows = json.loads((folder / "runs.json").read_text())["rows"]
        lines = [report.markdown_line(cells) for cells in search.body(rows, 1)]
        assert "\n".join(lines) in (folder / "README.md").read_text() and len(rows) == 4
        least = min(rows, key=lambda row: row["distance"][0])
        assert least["setting"] == f"--lam {presets['images', 'scratch']['lam']}"
    smallest, papers = (f"{found['FSF-DMD', f'--lr 0.016 --lam {setting}']:.1f}"
                        for setting in ("0.001 --shift 10", "0.01 --shift 1"))
    assert f"the smallest ({smallest}; the paper's 0.01 and k = 1: {papers})" in text


def test_a_method_past_an_edge_is_searched_from_its_start_alone():
    words = "--method CD, beyond: is not searched from weak, expected 'CD with masking', 'FSF"
    with pytest.raises(BadInput, match=words):
        search.run(search.parse_args(["weak", "--method", "CD, beyond"]))


def test_what_was_found_past_the_edge_of_dmd2s_search_is_in_the_numbers():
    folder = KEPT / "search-digits-strong-DMD2_beyond"
    rows = json.loads((folder / "runs.json").read_text())["rows"]
    lines = [report.markdown_line(cells) for cells in search.body(rows)]
    assert "\n".join(lines) in (folder / "README.md").read_text()
    assert [row["setting"] for row in rows] == search.BEYOND["strong"]["DMD2, beyond"][1]
    edge, fake, fast, both = (statistics.mean(row["distance"]) for row in rows)
    assert len(rows[0]["distance"]) == len(rows[1]["distance"]) == 2 and edge < fake < min(fast, both)
    first = json.loads((KEPT / "search-digits-strong" / "runs.json").read_text())["rows"]
    [kept] = [row["distance"] for row in first if (row["method"], row["setting"]) == ("DMD2", rows[0]["setting"])]
    assert rows[0]["distance"] == pytest.approx(kept, abs=0.1)          # the same setting, with later code
    assert (f"0.001 and 0.01 has {fake:.1f}, and on seed 100 0.003 and 0.01 {both:.1f}, 0.003 and 0.003 {fast:.1f}."
            in words_of_the_texts())


def test_what_was_found_past_other_edges_on_digits_is_in_the_numbers():
    def means(name):
        rows = json.loads((KEPT / f"search-digits-{name}" / "runs.json").read_text())["rows"]
        return [f"{statistics.mean(row['distance']):.1f}" for row in rows]

    edge, fast, *_ = means("fm-DMD2_beyond")
    best, below = means("fm-CD_beyond")
    tables, twice, _ = means("strong-CD_beyond")
    papers, fake, _ = means("strong-SiD_beyond")
    for words in (f"it has [{fast} instead of {edge}](results/search-digits-fm-DMD2_beyond",
                  f"{twice} at twice the rate, {tables} at the best of the search",
                  f"(results/search-digits-fm-CD_beyond/README.md) {below}, at it {best})",
                  f"(results/search-digits-strong-SiD_beyond/README.md): {fake}, at 0.003 {papers})"):
        assert words in words_of_the_texts(), words
