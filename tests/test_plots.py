"Plots: what a page should not carry. Slow maps, other processes, killed writes, the README's picture."
import io
import subprocess
import sys
from unittest.mock import patch

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
    plot_reconstructions,
    plot_studies,
    project,
    render,
    save_figure,
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
    yield plot_clusters(rng.normal(size=(50, 8)), rng.integers(0, 20, 50), origin, [f"a meaning of some length, {i % 11}" for i in range(50)], "pca")
    yield plot_clusters(rng.normal(size=(50, 8)), np.zeros(50, int), origin, method="pca")
    yield plot_reconstructions(grey, rng.random((n, 20)) < .5, grey[::-1], origin, grid=(4, 5))
    yield plot_attention(grey[0], rng.random((6, 16)), (4, 4), [long] * 6, origin, smooth=False)
    yield plot_fractions(results(("auroc", "accuracy"), ("random", "global only", "CM-CGNS")), origin)
    yield plot_fractions(results(encoders=("random",), fractions=(1.,), seeds=1), origin)
    yield plot_studies([grey[0], grey[1, :20]], [long, ""], origin, boxes=[[(3, 4, 10, 12)], ()])


@pytest.mark.parametrize("origin", ["synthetic", "covid_cxr (COVID-19 image data collection), patients of the test split"])
def test_every_title_names_the_origin_and_no_text_overlaps(origin):
    said = "synthetic data, no patients" if origin == "synthetic" else origin
    for fig in every_plot(origin):
        assert isinstance(fig, Figure)
        assert said in " ".join(fig.get_suptitle().split()), fig.get_suptitle()
        assert fig._suptitle.get_window_extent().x1 < fig.bbox.x1, "the title runs out of the figure"
        assert not overlapping(fig), fig.get_suptitle()


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
    one, two = project(points, method, seed=1)[0], project(points, method, seed=1)[0]
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
    monkeypatch.setattr(plots.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_figure(draw_method(), path, dpi=30)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["method.png"]


def test_pdf_and_svg_are_written(tmp_path):
    for end in "pdf", "svg":
        assert save_figure(draw_method(), tmp_path / f"method.{end}").stat().st_size > 1000


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
