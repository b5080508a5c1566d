"Plots: what a page should not carry. Slow maps, other processes, killed writes, the README's picture."
import io
import subprocess
import sys
from unittest.mock import patch

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cmcgns.reporting import plots
from cmcgns.reporting.plots import (
    as_grey,
    draw_method,
    plot_attention,
    plot_clusters,
    plot_fractions,
    plot_losses,
    plot_means,
    plot_moments,
    plot_reconstructions,
    plot_reconstructions_by,
    plot_regions,
    plot_sentence,
    plot_studies,
    plot_training,
    project,
    render,
    save_figure,
    save_pictures,
    title_of,
)


def overlapping(fig):
    "Pairs of drawn texts whose rectangles meet by more than a pixel."
    seen, draw = {}, Text.draw

    def note(self, renderer):
        seen[id(self)] = self
        draw(self, renderer)

    with patch.object(Text, "draw", note):
        FigureCanvasAgg(fig).draw()
    texts = [(t.get_text(), t.get_window_extent()) for t in seen.values() if t.get_text()]
    return [(a, b) for i, (a, one) in enumerate(texts) for b, two in texts[:i]
            if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1]


def results(metrics=("auroc",), encoders=("random", "pre-trained"), fractions=(.01, .1, 1.), seeds=3):
    return [dict(encoder=e, fraction=f, seed=s, n_train=int(1200 * f) + s, n_test=340, metric=m, value=.7 + .01 * s, low=.6, high=.8)
            for m in metrics for e in encoders for f in fractions for s in range(seeds)]


def every_plot(origin, n=4):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (n, 32, 40), dtype=np.uint8)
    long = "There is a large left pleural effusion with adjacent compressive atelectasis, and the mediastinum is shifted to the right."
    yield plot_losses([{"step": i, "stage": 1 + i // 6, "loss": 1 / (i + 1), "local_image": -i, "eval_loss": .5} for i in range(12)], origin)
    yield plot_losses([{"step": 3, "loss": 2.}], origin)
    log = [{"step": i, "stage": 1 + i // 6, "loss": 1 / (i + 1), "margin_loss": .1 * (i > 3), "learning_rate": 1e-4 * i, "image_to_report": i / 12, "eval_loss": .5} for i in range(12)]
    yield plot_training(log, origin, started=4)
    yield plot_training(log[:1], origin)
    line = dict(weights=["start", "stage 1", "stage 2"], value=[np.nan, .2, .3], low=[np.nan, .1, .2], high=[np.nan, .3, .4], chance=[np.nan, .1, .1])
    empty = line | {k: [np.nan] * 3 for k in ("value", "low", "high", "chance")}
    yield plot_moments({"share of true negatives that the hard one outdoes": {"cross-modal, new": line, "single-modal": line}, "nothing": {"cross-modal, new": empty}},
                       origin, "Audit of CM-CGNS (n = 20 batches of 64 studies)", {"nothing": (.4, "the start")}, "no clusters yet")
    yield plot_means([dict(quantity=q, name=n, value=.1, low=-.1, high=.2, n=29) for q in ("L1 of hidden pixels", "minus own") for n in ("own report", "the mean training film")], origin, "Rebuilt")
    yield plot_sentence(rng.normal(size=(50, 8)), rng.normal(size=8), rng.normal(size=8), 3, rng.random(50) < .2, rng.random(50) < .2, long, origin, ["pca", "pca"])
    yield plot_clusters(rng.normal(size=(50, 8)), (), origin, method="pca", what="Sentences as the image tells them")
    yield plot_clusters(rng.normal(size=(50, 8)), rng.integers(0, 20, 50), origin, [f"a meaning of some length, {i % 11}" for i in range(50)], "pca")
    yield plot_clusters(rng.normal(size=(50, 8)), np.zeros(50, int), origin, method="pca")
    yield plot_reconstructions(grey, rng.random((n, 20)) < .5, grey[::-1], origin, grid=(4, 5))
    yield plot_reconstructions(grey[:1], rng.random((1, 20)) < .5, grey[1:2], origin, grid=(4, 5))
    yield plot_attention(grey[0], rng.random((6, 16)), (4, 4), [long] * 6, origin, smooth=False)
    yield plot_reconstructions_by(grey, rng.random((n, 20)) < .5, {"with its report": grey[::-1], "told nothing": grey}, origin, grid=(4, 5))
    yield plot_reconstructions_by(grey[:1], np.zeros((1, 16), bool), dict.fromkeys(("own", "nothing", "another"), grey[:1]) | {"own": 255 - grey[:1]}, origin)
    yield plot_regions(grey[0], rng.random((16, 9)), (4, 4), [long] * 9, origin)
    yield plot_regions(grey[0], rng.random((196, 1)), (14, 14), ["no effusion"], origin)
    yield plot_fractions(results(("auroc", "accuracy"), ("random", "global only", "CM-CGNS")), origin)
    yield plot_fractions(results(encoders=("random",), fractions=(1.,), seeds=1), origin)
    yield plot_fractions(results(encoders=[f"trained for {n} epochs" for n in range(7)]), origin)
    yield plot_studies([grey[0], grey[1, :20]], [long, ""], origin, boxes=[[(3, 4, 10, 12)], ()])


@pytest.mark.parametrize("origin", ["synthetic", "covid_cxr (COVID-19 image data collection), patients of the test split"])
def test_every_title_names_the_origin_and_no_text_overlaps(origin):
    said = "synthetic data, no patients" if origin == "synthetic" else origin
    for fig in every_plot(origin):
        assert isinstance(fig, Figure)
        assert said in " ".join(fig.get_suptitle().split()), fig.get_suptitle()
        assert fig._suptitle.get_window_extent().x1 < fig.bbox.x1, "the title runs out of the figure"
        assert not overlapping(fig), fig.get_suptitle()


@pytest.mark.parametrize("n", range(1, 8))
def test_every_encoder_is_drawn_beside_its_fraction(n):
    names = [f"encoder {i}" for i in range(n)]
    ax = plot_fractions(results(encoders=names), "synthetic").axes[0]
    lines = {line.get_label(): line.get_xdata() for line in ax.lines if line.get_label() in names}
    points = np.concatenate([np.asarray(drawn.get_offsets()).reshape(-1, 2)[:, 0] for drawn in ax.collections if hasattr(drawn, "get_sizes") and len(drawn.get_sizes())])
    assert [*lines] == names and all(np.round(x).tolist() == [0, 1, 2] for x in lines.values()) and len({x[0] for x in lines.values()}) == n
    assert len(points) == 9 * n and ax.get_xlim()[0] < points.min() and points.max() < ax.get_xlim()[1]
    assert np.bincount(np.round(points).astype(int)).tolist() == [3 * n] * 3


def test_no_plot_touches_the_state_of_pyplot():
    import matplotlib
    import matplotlib.pyplot as plt
    before, size = plt.get_fignums(), matplotlib.rcParams["font.size"]
    list(every_plot("synthetic"))
    assert plt.get_fignums() == before and matplotlib.rcParams["font.size"] == size


def test_tensors_are_as_good_as_arrays():
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    assert as_grey(x).shape == (2, 16, 16)
    plot_reconstructions(x, torch.rand(2, 16) < .5, x, "synthetic")
    plot_attention(x[0], torch.rand(2, 16), (4, 4), ["a", "b"], "synthetic")
    plot_clusters(torch.rand(20, 4), torch.arange(20) % 3, "synthetic", method="pca")
    plot_sentence(torch.rand(20, 4), torch.rand(4), torch.rand(4), 0, torch.rand(20) < .5, torch.rand(20) < .5, "a", "synthetic", ["pca"])
    plot_reconstructions_by(x, torch.rand(2, 16) < .5, {"own": x, "nothing": -x}, "synthetic")
    plot_regions(x[0], torch.rand(16, 2), (4, 4), ["a", "b"], "synthetic")


@pytest.mark.parametrize("bad", [np.full((4, 4), 1.5), np.full((4, 4), np.nan), np.zeros((4, 4), np.int64), np.zeros((0, 4))])
def test_images_of_another_range_are_refused(bad):
    with pytest.raises(ValueError, match="expected uint8 images or floats in"):
        as_grey(bad)


def test_constant_attention_and_identical_reconstruction_are_drawn():
    grey = np.zeros((2, 16, 16), np.uint8)
    assert not overlapping(plot_attention(grey[0], np.full((1, 4), .5), (2, 2), ["no effusion"], "synthetic"))
    assert not overlapping(plot_reconstructions(grey, np.ones((2, 4), bool), grey, "synthetic"))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("method", [pytest.param("umap", marks=pytest.mark.slow), pytest.param("tsne", marks=pytest.mark.slow), "pca"])
def test_maps_are_deterministic_and_keep_blobs_apart(method):
    rng = np.random.default_rng(0)
    which = np.arange(90) % 3
    points = 4 * np.eye(3, 16)[which] + .3 * rng.normal(size=(90, 16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one, two = project(points, method, seed=1)[0], project(points, method, seed=1)[0]
    assert torch.get_num_threads() == 1, "numba would leave as many as there are cores"
    torch.set_num_threads(threads)
    assert np.array_equal(one, two) and one.shape == (90, 2)
    centres = np.stack([one[which == k].mean(0) for k in range(3)])
    assert (np.linalg.norm(one[:, None] - centres, axis=-1).argmin(1) == which).all()


@pytest.mark.slow
def test_points_of_length_zero_and_the_smallest_map():
    assert np.isfinite(project(np.zeros((10, 4)), "pca")[0]).all()
    for method in "umap", "tsne":
        assert project(np.random.default_rng(0).normal(size=(10, 4)), method)[0].shape == (10, 2)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save_figure(draw_method(), tmp_path / "method.png", dpi=40)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_figure(draw_method(), path, dpi=30)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["method.png"]


def test_noise_is_no_pattern_and_one_sentence_has_nothing_to_be_compared_with():
    assert np.allclose(plots.span_of(.5 + 1e-4 * np.arange(4)), (.49015, .51015)) and plots.span_of(np.array([.2, .7])) == (.2, .7)
    grey, alone = np.zeros((8, 8), np.uint8), np.full((4, 1), .6)
    figure = plots.plot_regions(grey, alone, (2, 2), ["the heart is large"], "synthetic")
    assert any("nothing to compare" in ax.get_title(loc="left") + ax.get_title() for ax in figure.axes)


def test_a_picture_says_in_words_what_it_shows():
    figure = plots.plot_attention(np.zeros((8, 8), np.uint8), np.full((1, 4), .5), (2, 2), ["the heart is large"], "synthetic")
    png, metadata = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and metadata["alt"].startswith("Attention (n = 1 sentence") and metadata["alt"].endswith("the image; the heart is large")


def test_pdf_and_svg_are_written_and_the_same_figure_gives_the_same_bytes(tmp_path):
    for end in "pdf", "svg":
        one, two = (save_figure(draw_method(), tmp_path / f"{name}.{end}").read_bytes() for name in "ab")
        assert len(one) > 1000 and one == two
    assert b"/Type3" not in (tmp_path / "a.pdf").read_bytes(), "letters are drawings that cannot be searched"


def test_pictures_are_a_png_and_a_pdf_in_a_folder_that_is_made(tmp_path):
    fig = plot_losses([{"step": i, "loss": 2. - i} for i in range(3)], "synthetic")
    files = save_pictures(fig, tmp_path / "new" / "folder", "losses")
    assert [p.name for p in files] == ["losses.png", "losses.pdf"] and sorted(p.name for p in files[0].parent.iterdir()) == ["losses.pdf", "losses.png"]
    assert files[0].read_bytes()[:4] == b"\x89PNG" and files[1].read_bytes()[:4] == b"%PDF"


def test_a_stand_in_for_a_real_data_set_is_called_synthetic_and_without_patients():
    assert title_of("Losses", "synthetic rsna") == "Losses · synthetic rsna, no patients"
    assert title_of("Losses", "rsna") == "Losses · rsna"


def test_what_a_region_weighs_most_is_what_is_drawn():
    weights = np.full((4, 8), .5)
    weights[[0, 1, 2, 3], [0, 7, 7, 2]] = [.9, .8, .7, .6]
    fig = plot_regions(np.zeros((8, 8), np.uint8), weights, (2, 2), [f"sentence {i}" for i in range(8)], "synthetic")
    assert [t.get_text() for t in fig.axes[1].texts] == ["1", "8", "8", "3"]
    said = [t.get_text() for t in fig.legends[0].get_texts()]
    assert said[0] == "1: sentence 0 (1 region)" and said[7] == "8: sentence 7 (2 regions)" and said[1] == "2: sentence 1 (0 regions)"
    ahead = fig.axes[2].images[1].get_array()
    assert np.allclose(ahead, [[.4, .3], [.2, .1]])
    grey = fig.axes[1].images[1].get_array()[0, 1]
    assert np.allclose(grey, [int(plots.GREY[i:i + 2], 16) / 255 for i in (1, 3, 5)]), "beyond the seventh sentence"


def test_negatives_of_a_sentence_are_counted_and_it_is_not_its_own():
    false, near = np.arange(30) < 10, np.arange(30) >= 8
    fig = plot_sentence(np.random.default_rng(0).normal(size=(30, 4)), np.ones(4), -np.ones(4), 9, false, near, "effusion", "synthetic", ["pca"])
    counts = dict(t.get_text().rstrip(")").split(" (n = ") for t in fig.legends[0].get_texts() if "(n" in t.get_text())
    assert counts == {"other sentences": "0", "in the hard negative's cluster": "21", "its false negatives": "9", "the same told by the image": "1"}


def test_differences_of_reconstructions_are_those_of_the_hidden_pixels():
    image, hidden = np.zeros((1, 4, 4), np.float32), np.array([[True, False, False, False]])
    one = np.where(np.pad(np.ones((1, 2, 2)), ((0, 0), (0, 2), (0, 2))) > 0, .5, -.25).astype(np.float32)
    fig = plot_reconstructions_by(image, hidden, {"own": one, "nothing": -one}, "synthetic")
    assert [ax.get_title() for ax in fig.axes[:7]] == ["", "", "", "hidden L1 0.500", "", "hidden L1 0.500", ""]
    assert np.allclose(fig.axes[6].images[0].get_array(), 2 * np.abs(one[0]))


@pytest.mark.skipif(f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text(), reason="another matplotlib than the pinned one draws a little differently")
def test_the_readme_picture_is_the_one_the_code_draws():
    path = ROOT / "nbs" / "method.png"
    assert path.stat().st_size < 150_000
    there = Image.open(path).convert("L")
    assert there.width >= 1800
    here = Image.open(io.BytesIO(render(draw_method(), 200))).convert("L")
    assert abs(here.width - there.width) < 8 and abs(here.height - there.height) < 8
    small = [np.asarray(im.resize((450, 290), Image.Resampling.BOX), float) for im in (here, there)]
    # Another version of a font or of matplotlib moves an edge by a pixel; a changed drawing changes whole areas.
    assert np.abs(small[0] - small[1]).mean() < 2, "draw nbs/method.png anew (nbs/reporting/40_plots.ipynb says how)"


def test_importing_the_plots_imports_nothing_heavy():
    code = ("import sys, cmcgns.reporting.plots; "
            "print([m for m in ('umap', 'numba', 'sklearn', 'torch', 'matplotlib.pyplot') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
