"What the reconstruction page does not carry: both decoders in every mode, sizes of the paper, other precisions, the encoders in front."
import pytest
import torch
import torch.nn.functional as F
from cmcgns.encoders import ImageEncoder, image_config
from cmcgns.reconstruction import (DECODERS, ConvReconstructor, Reconstruction, TransformerReconstructor, count_doublings, hidden_pixels,
                                   mask_regions, reconstruction_loss)
from hypothesis import given, settings
from hypothesis import strategies as st


def seeded(i):
    return torch.Generator().manual_seed(i)


def features(b=2, p=16, d=48, seed=0):
    return torch.randn(2, b, p, d, generator=seeded(seed)).unbind(0)


@settings(deadline=None, max_examples=60)
@given(b=st.integers(1, 5), p=st.integers(1, 60), d=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_the_share_is_hidden_and_the_rest_is_kept(b, p, d, share, seed):
    x = torch.randn(b, p, d, generator=seeded(seed))
    before = x.clone()
    masked, hidden = mask_regions(x, share, seeded(seed))
    assert torch.equal(x, before) and hidden.dtype == torch.bool and (hidden.sum(1) == round(share*p)).all()
    assert torch.equal(masked, torch.where(hidden[..., None], 0., x))
    masked, none = mask_regions(x, share, seeded(seed), by="channel")
    gone = (masked == 0).all(1) # (b, d)
    assert none is None and (gone.sum(1) == round(share*d)).all()
    assert torch.equal(masked, torch.where(gone[:, None], 0., x))


def test_masks_differ_between_images_and_follow_the_seed():
    x = torch.ones(64, 49, 1)
    a, b, c = (mask_regions(x, generator=seeded(i))[1] for i in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and len({tuple(r.tolist()) for r in a}) == 64
    torch.manual_seed(5)
    first = mask_regions(x)[1]
    torch.manual_seed(5)
    assert torch.equal(first, mask_regions(x)[1]) # the global source, which a checkpoint saves


def test_building_a_module_draws_nothing_for_its_checks():
    state = seeded(0).get_state()
    torch.set_rng_state(state)
    ConvReconstructor(48, (4, 4), 64)
    plain = torch.rand(1)
    torch.set_rng_state(state)
    Reconstruction(48, (4, 4), 64)
    assert torch.equal(plain, torch.rand(1))


@pytest.mark.parametrize("options", [dict(), dict(by="channel"), dict(relu_before_tanh=True), dict(share_layers=True), dict(share=0.), dict(share=1.)], ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_every_mode_of_both_decoders(kind, options):
    torch.manual_seed(0)
    m = Reconstruction(48, (4, 4), 64, kind=kind, **options)
    local, told = (x.requires_grad_() for x in features())
    images, hidden = m(local, told, seeded(0))
    assert images.shape == (2, 1, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert (hidden is None) == (options.get("by") == "channel")
    reconstruction_loss(images, torch.rand(2, 1, 64, 64, generator=seeded(1))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    if hidden is not None:
        assert (local.grad[hidden] == 0).all() and ((local.grad != 0).any(2) == ~hidden).all()
    m.zero_grad()
    m.eval()
    assert m(local, told)[1] is None and torch.equal(m(local, told)[0], m(local, told)[0])


@pytest.mark.parametrize("kind", DECODERS)
def test_same_seed_same_drawing(kind):
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(Reconstruction(48, (4, 4), 64, kind=kind)(*features())[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("kind", DECODERS)
def test_an_image_is_drawn_alone_as_in_a_batch(kind):
    torch.manual_seed(0)
    m = Reconstruction(48, (4, 4), 64, kind=kind).eval()
    a, b = features(5)
    torch.testing.assert_close(m(a, b)[0][3:4], m(a[3:4], b[3:4])[0])


def test_shared_layers_are_one_layer_six_times():
    torch.manual_seed(0)
    one = TransformerReconstructor(48, (4, 4), 64, share_layers=True).eval()
    six = TransformerReconstructor(48, (4, 4), 64).eval()
    assert (len(one.layers), len(six.layers), one.depth) == (1, 6, 6)
    state = one.state_dict()
    six.load_state_dict({k: state[".".join(["layers.0", *k.split(".")[2:]]) if k.startswith("layers") else k] for k in six.state_dict()})
    torch.testing.assert_close(one(*features()), six(*features()))
    with torch.no_grad():
        six.layers[3].linear1.weight.zero_()
    assert not torch.allclose(one(*features()), six(*features()), atol=1e-4)


@pytest.mark.parametrize("kind, grid", [("convolution", (7, 7)), ("transformer", (14, 14))])
def test_the_paper_size(kind, grid):
    torch.manual_seed(0)
    m = Reconstruction(768, grid, 224, kind=kind)
    a, b = features(1, grid[0]*grid[1], 768)
    images, hidden = m(F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    assert images.shape == (1, 1, 224, 224) and int(hidden.sum()) == round(grid[0]*grid[1]/2)
    reconstruction_loss(images, -torch.ones_like(images), hidden, grid, "masked").backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("name, size", [("resnet-tiny", 64), ("resnet-18", 128), ("vit-tiny", 128)])
def test_the_grid_of_an_encoder_reaches_its_image(name, size):
    torch.manual_seed(0)
    e = ImageEncoder(image_config(name, size), size)
    local = e(torch.rand(2, 1, size, size)*2 - 1).local
    m = Reconstruction(e.width, e.grid, size, kind="transformer" if e.is_vit else "convolution")
    assert m(local, torch.zeros_like(local))[0].shape == (2, 1, size, size)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 9), n=st.integers(0, 6))
def test_doublings(h, n):
    assert count_doublings((h, h), h << n) == n
    for wrong in ((h, h+1), (h+1, h)):
        with pytest.raises(ValueError, match="cannot double to"):
            count_doublings(wrong, h << n)


@pytest.mark.parametrize("grid, size", [((4, 4), 100), ((7, 7), 225), ((4, 4), 3), ((5, 5), 128)])
def test_a_size_that_does_not_fit_is_one_sentence(grid, size):
    with pytest.raises(ValueError, match=f"a grid of {grid[0]}×{grid[0]} regions cannot double to {size} pixels: choose") as e:
        ConvReconstructor(48, grid, size)
    assert "\n" not in str(e.value)


def test_hidden_pixels_are_those_of_the_regions():
    hidden = mask_regions(torch.ones(3, 12, 1), generator=seeded(0))[1]
    pixels = hidden_pixels(hidden, (3, 4), 24)
    for b in range(3):
        for i in range(24):
            for j in range(24):
                assert pixels[b, 0, i, j] == hidden[b, i//8*4 + j//6]


def test_the_masked_loss_sees_only_hidden_regions():
    torch.manual_seed(0)
    target, hidden = torch.rand(2, 1, 16, 16), mask_regions(torch.ones(2, 16, 1))[1]
    images = torch.rand(2, 1, 16, 16, requires_grad=True)
    reconstruction_loss(images, target, hidden, (4, 4), "masked").backward()
    pixels = hidden_pixels(hidden, (4, 4), 16).bool()
    assert (images.grad[~pixels] == 0).all() and (images.grad[pixels] != 0).all()
    assert reconstruction_loss(images, target, torch.zeros_like(hidden), (4, 4), "masked") == 0
    assert torch.equal(reconstruction_loss(images, target, None, (4, 4), "masked"), F.l1_loss(images, target))


def test_half_precision_draws_in_full_range():
    torch.manual_seed(0)
    for kind in DECODERS:
        m = Reconstruction(48, (4, 4), 64, kind=kind)
        with torch.autocast("cpu", torch.bfloat16):
            images, hidden = m(*features())
            loss = reconstruction_loss(images, torch.ones_like(images), hidden, (4, 4), "masked")
        assert images.dtype == loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize("kind", DECODERS)
def test_four_images_are_learned_from_what_is_left_and_what_is_told(kind):
    torch.manual_seed(0)
    target = F.interpolate(torch.rand(4, 1, 4, 4).round()*2 - 1, (32, 32))
    local, told = features(4)
    m = Reconstruction(48, (4, 4), 32, kind=kind)
    opt = torch.optim.Adam(m.parameters(), 2e-3)
    for _ in range(80):
        loss = reconstruction_loss(m(local, told)[0], target)
        opt.zero_grad()
        loss.backward()
        opt.step()
    drawn = m.eval()(local, told)[0]
    assert reconstruction_loss(drawn, target) < .15
    assert drawn.min() < -.98 and drawn.max() > .98
