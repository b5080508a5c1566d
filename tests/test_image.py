"What the image page does not carry: many file kinds, damaged files, several processes, a killed build, real X-rays."
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cmcgns.image import (ImageCache, ImageError, augment, build_cache, cache_key, centre_crop, check_input, crop_at,
                          denormalise, fit_square, normalise, place, read_image, uniforms)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save_some(folder, n, size=40):
    "Write n different grey images."
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    paths = [folder / f"{i:03}.png" for i in range(n)]
    for path in paths: Image.fromarray(draw.integers(0, 256, (size, size - 5), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("mode, suffix, most", [
    ("L", "png", 0), ("RGB", "png", 0), ("RGBA", "png", 0), ("LA", "png", 0), ("P", "png", 0), ("L", "tif", 0), ("L", "bmp", 0),
    ("L", "gif", 0), ("CMYK", "tif", 1), ("F", "tif", 0), ("I", "tif", 0), ("L", "jpg", 4), ("RGB", "jpg", 4), ("CMYK", "jpg", 5), ("YCbCr", "jpg", 4)])
def test_kinds_of_files(tmp_path, mode, suffix, most):
    Image.fromarray(RAMP).convert(mode).save(tmp_path / f"a.{suffix}", **(dict(quality=98) if suffix == "jpg" else {}))
    found = read_image(tmp_path / f"a.{suffix}")
    assert found.dtype == np.uint8 and found.shape == (16, 16) and found.flags.writeable
    assert np.abs(found.astype(int) - RAMP).max() <= most


def test_black_and_white_and_sixteen_bits(tmp_path):
    Image.fromarray(RAMP > 99).save(tmp_path / "1.png")
    assert (read_image(tmp_path / "1.png") == (RAMP > 99) * 255).all()
    Image.fromarray(RAMP.astype(np.uint16) * 16).save(tmp_path / "12bit.png")
    assert (read_image(tmp_path / "12bit.png") == RAMP).all()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="nan.tif: it cannot be decoded .its values are not all finite"): read_image(tmp_path / "nan.tif")


def test_transparency_is_black(tmp_path):
    half = Image.fromarray(np.full((4, 4, 4), 255, np.uint8))
    half.putalpha(Image.fromarray(np.repeat(np.array([[0, 0, 255, 255]], np.uint8), 4, 0)))
    half.save(tmp_path / "rgba.png")
    palette = Image.fromarray(np.repeat(np.array([[0, 0, 1, 1]], np.uint8), 4, 0), "P")
    palette.putpalette([255] * 6)
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("rgba.png", "p.png"): assert read_image(tmp_path / name)[0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("name, content, reason", [
    ("empty.png", b"", "the file is empty"), ("word.jpg", b"<html></html>", "this is not an image file"),
    ("head.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "")])
def test_what_is_wrong_with_a_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}: {reason}") as error: read_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ImageError, match="it cannot be decoded"): read_image(tmp_path)
    with pytest.raises(ImageError, match="there is no such file"): read_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["png", "jpeg", "tiff"]), st.data())
def test_a_damaged_file_is_read_or_named(tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("damaged") / f"a.{kind}"
    Image.fromarray(RAMP).save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(3): content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try: assert read_image(path).dtype == np.uint8
    except ImageError as error: assert str(error).startswith(f"{path}: ")


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)).resize((1400, 1800), Image.Resampling.BICUBIC)
    soft.save(tmp_path / "a.jpg", quality=95)
    small = read_image(tmp_path / "a.jpg", at_least=256)
    assert min(small.shape) >= 256 and max(small.shape) < 600
    assert np.abs(fit_square(small, 128).astype(int) - fit_square(read_image(tmp_path / "a.jpg"), 128)).max() <= 3


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 600))
def test_an_image_lies_inside_its_square(h, w, size):
    height, width, top, left = place(h, w, size)
    assert max(height, width) == size and 0 <= top and top + height <= size and 0 <= left and left + width <= size
    assert abs(height - size * h / max(h, w)) <= 1 and abs(size - height - 2 * top) <= 1


def test_the_cache_is_the_slow_way(tmp_path):
    paths = save_some(tmp_path / "in", 700, 20) # more than a portion
    cache = build_cache(paths, 16, tmp_path / "cache", progress=False)
    assert (cache.images == np.stack([fit_square(read_image(p), 16) for p in paths])).all()
    assert cache.paths == [str(p) for p in paths] and cache.rows(paths[::-1]) == list(range(700))[::-1]
    twice = build_cache([paths[1], paths[0], paths[1]], 16, tmp_path / "cache", progress=False)
    assert len(twice) == 2 and twice.rows([paths[1], paths[0], paths[1]]) == [0, 1, 0]
    with pytest.raises(ImageError, match="002.png: it is not in this cache"): twice.rows([paths[2]])
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_nothing_to_cache(tmp_path):
    with pytest.raises(ValueError, match="at least one path"): build_cache([], 8, tmp_path)
    with pytest.raises(ValueError, match="known are 'raise' and 'skip'"): build_cache([tmp_path], 8, tmp_path, on_error="ignore")
    with pytest.raises(ImageError, match="none of 2 images can be read, the first is .*a.png: there is no such file"):
        build_cache([tmp_path / "a.png", tmp_path / "b.png"], 8, tmp_path, on_error="skip", progress=False)
    with pytest.raises(ImageError, match="there is no image cache here"): ImageCache(tmp_path / "no")
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_comes_back_is_seen(tmp_path):
    paths = save_some(tmp_path / "in", 3)
    content = paths[1].read_bytes()
    paths[1].unlink()
    cache = build_cache(paths, 8, tmp_path / "c", on_error="skip", progress=False)
    assert cache.broken == [(str(paths[1]), "there is no such file")] and len(cache) == 2
    paths[1].write_bytes(content)
    assert len(build_cache(paths, 8, tmp_path / "c", progress=False)) == 3


BUILD = "import sys; from pathlib import Path; from cmcgns.image import build_cache\n" \
        "c = build_cache(sorted(Path(sys.argv[1]).glob('*.png')), int(sys.argv[3]), sys.argv[2], progress=False); print(c.folder, c.images.sum())"


def test_two_processes_build_one_cache(tmp_path):
    paths = save_some(tmp_path / "in", 200)
    both = [subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path / "in"), str(tmp_path / "c"), "32"], stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert printed[0] == printed[1] != "" and [p.returncode for p in both] == [0, 0]
    assert build_cache(paths, 32, tmp_path / "c", progress=False).images.sum() == int(printed[0].split()[-1])


def test_a_killed_build_leaves_no_half_cache(tmp_path):
    paths = save_some(tmp_path / "in", 6)
    os.mkfifo(tmp_path / "in" / "waits.png") # reading it never ends
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path / "in"), str(tmp_path / "c"), "16"])
    until = time.monotonic() + 60
    while not list(tmp_path.glob("c/*.partial/images.u8")) and time.monotonic() < until: time.sleep(.01)
    process.kill(); process.wait()
    assert list(tmp_path.glob("c/*.partial")) and not list(tmp_path.glob("c/*/index.json"))

    key = cache_key([str(p) for p in paths], 16)
    (tmp_path / "c" / f"{key}.partial").mkdir() # as a build of these six would have left it
    (tmp_path / "c" / f"{key}.partial" / "images.u8").write_bytes(b"half of it")
    cache = build_cache(paths, 16, tmp_path / "c", progress=False)
    assert cache.folder.name == key and len(cache) == 6 and not (tmp_path / "c" / f"{key}.partial").exists()


def test_a_cache_travels_as_its_path(tmp_path):
    cache = build_cache(save_some(tmp_path / "in", 20), 64, tmp_path / "c", progress=False)
    cache.images
    assert len(pickle.dumps(cache)) < 500
    batch = cache.batch([3, 1])
    batch[:] = 0 # a batch is a copy
    assert cache.images[1].any() and cache.batch(torch.tensor([3, 1])).any()
    with pytest.raises(ValueError): cache.images[0] = 0


def test_bars_go_to_stderr_and_can_be_silenced(tmp_path, capfd):
    paths = save_some(tmp_path / "in", 3)
    build_cache(paths, 8, tmp_path / "c")
    out, err = capfd.readouterr()
    assert not out and "3/3" in err
    build_cache(paths, 9, tmp_path / "c", progress=False)
    assert capfd.readouterr() == ("", "")


@given(st.integers(-2**40, 2**40), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), max_size=5))
def test_uniforms_are_pure(seed, epoch, indices):
    together = uniforms(seed, epoch, indices, 3)
    assert together.shape == (len(indices), 3) and ((together >= 0) & (together < 1)).all()
    assert all((uniforms(seed, epoch, [i], 3) == row).all() for i, row in zip(indices, together))


def slow_crop(images, top, left, size): return torch.stack([im[t:t+size, l:l+size] for im, t, l in zip(images, top, left)])


@pytest.mark.parametrize("b, s, size", [(1, 8, 8), (5, 20, 13), (16, 64, 48)])
def test_crops_against_slices(b, s, size):
    draw = torch.Generator().manual_seed(b)
    images = torch.randint(0, 256, (b, s, s), generator=draw, dtype=torch.uint8)
    top, left = torch.randint(0, s - size + 1, (2, b), generator=draw)
    assert torch.equal(crop_at(images, top, left, size), slow_crop(images, top, left, size))
    whole = augment(images, s, 0, 0, range(b))
    assert torch.equal(whole, normalise(images)) and torch.equal(normalise(centre_crop(images, s)), whole)


@pytest.mark.parametrize("kind", [dict(), dict(jitter=.4), dict(zoom=.4), dict(jitter=.4, zoom=.4)], ids=str)
@pytest.mark.parametrize("s, size", [(33, 29), (160, 128), (150, 131)])
def test_the_same_image_in_any_company(kind, s, size):
    images = torch.randint(0, 256, (24, s, s), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    together = augment(images, size, 7, 2, range(24), **kind)
    check_input(together)
    assert torch.equal(augment(images[order], size, 7, 2, order, **kind), together[order])
    for part in order.split(5): assert torch.equal(augment(images[part], size, 7, 2, part.tolist(), **kind), together[part])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(augment(images, size, 7, 2, range(24), **kind), together)
    finally: torch.set_num_threads(threads)


def test_an_index_from_another_dtype_is_the_same():
    images = torch.zeros(2, 9, 9, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    want = augment(images, 5, 0, 0, [3, 4])
    for indices in (np.array([3, 4]), torch.tensor([3, 4]), range(3, 5)): assert torch.equal(augment(images, 5, 0, 0, indices), want)


def test_half_precision_comes_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(denormalise(normalise(levels).half()), levels)
    check_input(normalise(levels).bfloat16())
    check_input(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="empty"): check_input(torch.zeros(0, 1, 4, 4))


def test_real_xrays(shared_data, tmp_path):
    folder = shared_data / "covid-chestxray-dataset" / "images"
    if not folder.is_dir(): pytest.skip(f"{folder} is not there")
    paths = sorted(Path(folder).iterdir())
    cache = build_cache(paths, 96, tmp_path, progress=False)
    assert len(paths) == len(cache) == 648 and cache.broken == []
    assert cache.images.std((1, 2)).min() > 10 # none is blank
    check_input(augment(cache.batch(range(64)), 80, 0, 0, range(64), jitter=.2, zoom=.2))
