"What the image page does not carry: many file kinds, damaged files, several processes, a killed build, real X-rays."
import io
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cmcgns.image import (ImageCache, ImageError, augment, build_cache, cache_key, centre_crop, check_input, crop_at, decode_squares,
                          denormalise, dicom_header, fit_square, image_shape, normalise, place, read_image, read_journal, uniforms)
from filelock import FileLock
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


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("F", "tif"), ("I", "tif"), ("L", "bmp"), ("L", "gif")])
def test_the_shape_in_the_header_is_that_of_the_image(tmp_path, mode, suffix):
    image = Image.fromarray(RAMP[:9]).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    assert image_shape(tmp_path / f"a.{suffix}") == read_image(tmp_path / f"a.{suffix}").shape == (9, 16)


def test_the_shape_of_a_turned_photograph_is_that_of_the_pixels_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 # "turn me"
    Image.fromarray(RAMP[:9]).save(tmp_path / "a.jpg", exif=exif)
    assert image_shape(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape == (9, 16)


def test_the_shape_of_what_is_no_image_is_an_error(tmp_path):
    for name, content, reason in [("empty.jpg", b"", "the file is empty"), ("word.png", b"<html></html>", "this is not an image file"), ("word.dcm", b"x" * 200, "it lacks the mark DICM")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"): image_shape(tmp_path / name)
    with pytest.raises(ImageError, match="there is no such file"): image_shape(tmp_path / "none.png")


def test_the_shape_is_read_without_decoding(tmp_path):
    path, = save_some(tmp_path / "in", 1)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:300])
    assert image_shape(tmp_path / "cut.png") == (40, 35)
    with pytest.raises(ImageError): read_image(tmp_path / "cut.png")


def test_shapes_of_real_dicom_files(shared_data):
    paths = sorted((shared_data / "dicom-samples").glob("*.dcm"))
    if not paths: pytest.skip(f"no DICOM files in {shared_data}/dicom-samples")
    for path in paths: assert image_shape(path) == read_image(path).shape


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


# DICOM

def make_dicom(path, values, syntax="1.2.840.10008.1.2.1", frames=None, **fields):
    "Write values as DICOM, or encoded frames that show them; a field that is None is left out."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import SecondaryCaptureImageStorage
    ds, bits = Dataset(), 8 * values.itemsize
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3.4"
    (ds.Rows, ds.Columns), stored = values.shape[:2], fields.get("BitsStored", bits)
    swapped = values.byteswap() if syntax == "1.2.840.10008.1.2.2" else values
    for name, value in (dict(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=bits, BitsStored=stored, HighBit=stored - 1,
                             PixelRepresentation=int(values.dtype.kind == "i"), PixelData=swapped.tobytes()) | fields).items():
        if value is not None: setattr(ds, name, value)
    if frames:
        ds.PixelData = encapsulate(frames)
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif "PixelData" in ds: ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    ds.save_as(path, enforce_file_format=True, implicit_vr=syntax == "1.2.840.10008.1.2", little_endian=syntax != "1.2.840.10008.1.2.2")
    return ds


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    content = file.getvalue()
    return content[content.index(b"\xff\x4f\xff\x51"):] if kind == "jpeg2000" else content # the codestream alone


def look_at(value, low, high, inverted=False):
    "The grey of one value, in whole steps of half a level."
    part = min(1, max(0, (value - low) / (high - low))) if high != low else 0
    return 255 * (1 - part if inverted else part)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), signed=st.booleans(), bits=st.sampled_from([8, 10, 12, 16]), inverted=st.booleans(), kind=st.sampled_from(["none", "window", "exact"]))
def test_values_of_a_dicom_file_one_by_one(tmp_path_factory, data, signed, bits, inverted, kind):
    path = tmp_path_factory.getbasetemp() / "one.dcm"
    low, high = (-2**(bits - 1), 2**(bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(low, high), min_size=6, max_size=6))
    slope, intercept = data.draw(st.sampled_from([(None, None), (1, 0), (2, -1000), (.5, 3.25), (-1, 100), (-.25, 0)]))
    fields = dict(BitsStored=bits, PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2", RescaleSlope=slope, RescaleIntercept=intercept)
    centre, width = data.draw(st.integers(-2000, 5000)), data.draw(st.integers(2, 5000))
    if kind != "none": fields |= dict(WindowCenter=centre, WindowWidth=width, VOILUTFunction="LINEAR" if kind == "window" else "LINEAR_EXACT")
    dtype = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    make_dicom(path, np.array(values, dtype).reshape(2, 3), **fields)

    scaled = [(slope or 1) * v + (intercept or 0) for v in values]
    if kind == "window": edges = centre - .5 - (width - 1) / 2, centre - .5 + (width - 1) / 2
    elif kind == "exact": edges = centre - width / 2, centre + width / 2
    elif bits == 8: edges = sorted((slope or 1) * v + (intercept or 0) for v in (low, high))
    else: edges = min(scaled), max(scaled)
    expected = [look_at(v, *edges, inverted) for v in scaled]
    assert np.abs(read_image(path).ravel() - expected).max() <= .5 + 1e-6


@pytest.mark.parametrize("depth, most", [(8, 255), (10, 1023), (16, 60_000)])
def test_a_table_of_values_of_interest(tmp_path, depth, most):
    from pydicom.dataset import Dataset
    table = np.round(np.linspace(0, 1, 4096)**2 * most).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, depth])
    item.add_new("LUTData", "OW", table.tobytes())
    values = np.array([[0, 1000, 2000], [3000, 4095, 5000]], np.uint16)
    make_dicom(tmp_path / "a.dcm", values, BitsStored=13, VOILUTSequence=[item], WindowCenter=9, WindowWidth=2) # the table counts, not the window
    assert read_image(tmp_path / "a.dcm").tolist() == np.round(table[values.clip(0, 4095)] * (255 / most)).astype(int).tolist()
    make_dicom(tmp_path / "b.dcm", values, BitsStored=13, VOILUTSequence=[item], RescaleSlope=1, RescaleIntercept=0)
    assert (read_image(tmp_path / "b.dcm") == read_image(tmp_path / "a.dcm")).all()


def test_a_sigmoid_window(tmp_path):
    values = np.array([[0, 1000, 2000, 3000, 4095]], np.uint16)
    make_dicom(tmp_path / "a.dcm", values, BitsStored=12, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    assert np.abs(read_image(tmp_path / "a.dcm")[0] - 255 / (1 + np.exp(-4 * (values[0] - 2000.) / 1000))).max() <= .51


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"],
                         ids=["implicit", "explicit", "big endian", "deflated", "RLE"])
def test_how_values_are_written(tmp_path, syntax):
    from pydicom import dcmread
    values = RAMP.astype(np.int16) * 16 - 2000
    ds = make_dicom(tmp_path / "a.dcm", values, "1.2.840.10008.1.2.1" if syntax.endswith(".5") else syntax, PixelPaddingValue=-2000, PatientID="p 7 ", ViewPosition="AP", PatientAge="062Y", PatientSex="F")
    if syntax.endswith(".5"):
        ds.compress(syntax)
        ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID == syntax
    expected = np.round((values - (16. - 2000)) / (254 * 16) * 255)
    expected[0, 0] = 0 # padding is black, and the range is that of the others
    assert (read_image(tmp_path / "a.dcm") == expected).all()
    assert dicom_header(tmp_path / "a.dcm") == dict(patient="p 7", view="AP", sex="F", age="062Y", modality="", rows=16, columns=16)


def test_compressed_by_what_pillow_can_decode(tmp_path):
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4), np.uint8)).resize((40, 50), Image.Resampling.BICUBIC)
    grey = np.asarray(soft)
    make_dicom(tmp_path / "a.dcm", grey, "1.2.840.10008.1.2.4.50", [encoded(soft, "jpeg", quality=95)])
    assert np.abs(read_image(tmp_path / "a.dcm").astype(int) - grey).max() <= 3
    assert (read_image(tmp_path / "a.dcm", at_least=8) == read_image(tmp_path / "a.dcm")).all()
    deep = grey.astype(np.uint16) * 16
    make_dicom(tmp_path / "b.dcm", deep, "1.2.840.10008.1.2.4.90", [encoded(Image.fromarray(deep), "jpeg2000", irreversible=False)], BitsStored=12)
    span = grey.astype(float) - grey.min()
    assert np.abs(read_image(tmp_path / "b.dcm") - span / span.max() * 255).max() <= .51
    colour = Image.merge("RGB", [soft, soft, soft])
    make_dicom(tmp_path / "c.dcm", grey, "1.2.840.10008.1.2.4.50", [encoded(colour, "jpeg", quality=95)], SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422", PlanarConfiguration=0)
    assert np.abs(read_image(tmp_path / "c.dcm").astype(int) - grey).max() <= 4


def test_colour_and_palettes(tmp_path):
    rgb = np.stack([RAMP, RAMP // 2, 255 - RAMP], -1)
    want = np.asarray(Image.fromarray(rgb).convert("L"))
    how = dict(SamplesPerPixel=3, PhotometricInterpretation="RGB")
    make_dicom(tmp_path / "a.dcm", rgb, PlanarConfiguration=0, **how)
    make_dicom(tmp_path / "b.dcm", rgb, PlanarConfiguration=1, PixelData=rgb.transpose(2, 0, 1).tobytes(), **how)
    make_dicom(tmp_path / "c.dcm", rgb.astype(np.uint16) * 257, PlanarConfiguration=0, **how)
    tables = {f"{c}PaletteColorLookupTable{part}": v for c, column in zip(("Red", "Green", "Blue"), rgb.reshape(256, 3).T)
              for part, v in dict(Descriptor=[256, 0, 16], Data=(column.astype(np.uint16) * 257).tobytes()).items()}
    make_dicom(tmp_path / "d.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR", **tables)
    for name in "abcd": assert np.abs(read_image(tmp_path / f"{name}.dcm").astype(int) - want).max() <= 1, name


def test_dicom_that_shows_nothing(tmp_path):
    for name, fields in dict(constant={}, padding=dict(PixelPaddingValue=7), span=dict(PixelPaddingValue=9, PixelPaddingRangeLimit=5)).items():
        make_dicom(tmp_path / f"{name}.dcm", np.full((3, 4), 7, np.uint16), BitsStored=12, **fields)
        assert not read_image(tmp_path / f"{name}.dcm").any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("syntax, says", [
    ("1.2.840.10008.1.2.4.70", r"compressed as JPEG Lossless, .* and no decoder for that is installed, pip install 'pylibjpeg\[all\]'$"),
    ("1.2.840.10008.1.2.4.80", r"compressed as JPEG-LS Lossless .* and no decoder for that is installed, pip install 'pylibjpeg\[all\]'$"),
    ("1.2.840.10008.1.2.4.51", r"it cannot be decoded \(.*\), another decoder may do it, pip install 'pylibjpeg\[all\]'$"),
    ("1.2.840.10008.1.2.4.90", r"it cannot be decoded \(.*\), another decoder may do it, pip install"),
    ("1.2.840.10008.1.2.4.100", "its pixels are stored as MPEG2 Main Profile / Main Level, which cannot be decoded$"),
    ("1.2.3.4", "its pixels are stored as 1.2.3.4, which cannot be decoded$")])
def test_compressions_that_cannot_be_decoded(tmp_path, syntax, says):
    from pydicom.pixels import get_decoder
    if "no decoder" in says and get_decoder(syntax).is_available: pytest.skip("a decoder for this is installed")
    make_dicom(tmp_path / "a.dcm", RAMP, syntax, [b"\xff\xd8nonsense"])
    with pytest.raises(ImageError, match=rf"a.dcm: .*{says}") as error: read_image(tmp_path / "a.dcm")
    assert "\n" not in str(error.value) and "\t" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields, cut, says", [
    (dict(PixelData=None), None, "its pixels are missing, it may have been cut short"),
    (dict(PixelData=None, Rows=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"), None, r"it holds no image \(Basic Text SR Storage\)"),
    ({}, slice(None, -1), r"it cannot be decoded \(The number of bytes of pixel data is less than expected"),
    ({}, slice(None, -300), "its pixels are missing, it may have been cut short|it cannot be decoded"),
    ({}, slice(None, 140), "its header is cut short|it cannot be decoded"),
    ({}, slice(None, 132), "its header is cut short"),
    ({}, slice(None, 100), "this is not a DICOM file, it lacks the mark DICM"),
    ({}, slice(0, 0), "the file is empty"),
    (dict(Columns=None), None, r"it cannot be decoded \(Missing required element: \(0028,0011\) 'Columns'\)"),
    (dict(Rows=32), None, r"it cannot be decoded \(The number of bytes of pixel data is less than expected"),
    (dict(NumberOfFrames=4), None, "it holds 4 frames where one was expected"),
    (dict(WindowCenter=5, WindowWidth=0), None, r"it cannot be decoded \(The \(0028,1051\) Window Width must be greater than"),
    (dict(PhotometricInterpretation="MONOCHROME3"), None, "it cannot be decoded")])
def test_damaged_dicom(tmp_path, fields, cut, says):
    fields = dict(fields)
    nothing = [k for k in fields if fields[k] is None]
    make_dicom(tmp_path / "a.dcm", RAMP, **{k: v for k, v in fields.items() if v is not None})
    if nothing:
        from pydicom import dcmread
        ds = dcmread(tmp_path / "a.dcm")
        for k in nothing: delattr(ds, k)
        ds.save_as(tmp_path / "a.dcm")
    if cut: (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[cut])
    with pytest.raises(ImageError, match=f"a.dcm: ({says})") as error: read_image(tmp_path / "a.dcm")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_dicom_file_is_read_or_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.dcm"
    make_dicom(path, RAMP.astype(np.uint16), BitsStored=12, WindowCenter=99, WindowWidth=99)
    content = bytearray(path.read_bytes())
    for _ in range(3): content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    for read in read_image, dicom_header:
        try: assert read(path) is not None
        except ImageError as error: assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_headers_that_are_none(tmp_path):
    for name, content, says in ("a.png", b"\x89PNG", "not a DICOM file"), ("b.dcm", b"", "the file is empty"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: .*{says}"): dicom_header(tmp_path / name)
    with pytest.raises(ImageError, match="c.dcm: there is no such file"): dicom_header(tmp_path / "c.dcm")


def test_a_decoder_that_was_installed_is_tried(tmp_path, monkeypatch):
    films = [str(tmp_path / "a.DCM")]
    here, there = cache_key(films, 8), cache_key(["a.png"], 8)
    monkeypatch.setattr("cmcgns.image.find_spec", lambda name: name == "openjpeg" or None)
    assert cache_key(films, 8) != here and cache_key(["a.png"], 8) == there


def test_dicom_is_imported_when_it_is_needed():
    run = subprocess.run([sys.executable, "-c", "import sys, cmcgns.image; sys.exit('pydicom' in sys.modules)"])
    assert run.returncode == 0


def test_real_dicom(shared_data, tmp_path):
    paths = sorted((shared_data / "dicom-samples").glob("*.dcm"))
    if len(paths) != 2: pytest.skip(f"the two samples are not in {shared_data}")
    usual, other = (read_image(p) for p in paths) # the same film, and as MONOCHROME1
    assert usual.shape == (1024, 1024) and (other == 255 - usual).all()
    assert usual[900, 500] > 200 > 120 > usual[300, 350] # what is below the diaphragm is bright, lungs are dark
    assert dicom_header(paths[0])["view"] == "PA" and dicom_header(paths[0])["rows"] == 1024
    cache = build_cache(paths, 64, tmp_path, progress=False)
    assert (cache.images[0] == fit_square(usual, 64)).all()


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


# several processes, killed processes

BUILD = """
import signal, sys, time
from functools import partial
from pathlib import Path
from cmcgns import image

folder, cache, size, gate, log = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell's background jobs ignore
decode = image.decode_square
def slowly(path, size):
    while int(Path(path).stem) >= 70 and gate and not Path(gate).exists(): time.sleep(.01)
    with open(log, "a") as file: file.write(Path(path).name + "\\n")
    return decode(path, size)
image.decode_square, image.write_cache = slowly, partial(image.write_cache, every=20)
found = image.build_cache(sorted(Path(folder).glob("*.png")), int(size), cache)
print(found.folder.name, found.images.astype(int).sum())
"""


def start_build(tmp_path, log, gate=""):
    "Build a cache in a process of its own; from the 71st image on it waits until there is a file `gate`."
    return subprocess.Popen([sys.executable, "-c", BUILD, *map(str, (tmp_path / "in", tmp_path / "c", 32, gate, tmp_path / log))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "this never happened"
        time.sleep(.01)


def finished(tmp_path, size=32):
    "How many images of the only unfinished cache are done."
    return max([read_journal(half, size)[0] for half in tmp_path.glob("c/*.partial")], default=0)


def assert_whole(cache, paths, size=32):
    assert (cache.images == np.stack([fit_square(read_image(p), size) for p in paths])).all() and cache.broken == []
    assert not list(cache.folder.parent.glob("*.partial"))


def decoded(tmp_path, log): return (tmp_path / log).read_text().split() if (tmp_path / log).exists() else []


def test_two_processes_build_one_cache(tmp_path):
    paths = save_some(tmp_path / "in", 120)
    both = [start_build(tmp_path, "log", tmp_path / "gate") for _ in range(2)]
    wait_for(lambda: finished(tmp_path) >= 60)
    (tmp_path / "gate").touch()
    printed = [process.communicate()[0] for process in both]
    assert printed[0] == printed[1] != "" and [p.returncode for p in both] == [0, 0]
    assert sorted(decoded(tmp_path, "log")) == [p.name for p in paths], "each image was to be decoded once"
    assert_whole(build_cache(paths, 32, tmp_path / "c", progress=False), paths)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_killed_build_goes_on_from_where_it_was(tmp_path, kill):
    paths = save_some(tmp_path / "in", 160)
    process = start_build(tmp_path, "first", tmp_path / "gate")
    wait_for(lambda: finished(tmp_path) >= 60)
    process.send_signal(kill)
    (tmp_path / "gate").touch() # interrupted, it may still finish the images that are under way
    process.communicate(timeout=20)
    done = finished(tmp_path)
    assert process.returncode != 0 and 60 <= done < 160 and not list(tmp_path.glob("c/*/index.json"))
    again = start_build(tmp_path, "second")
    assert again.communicate()[0] and again.returncode == 0
    assert sorted(decoded(tmp_path, "second")) == [p.name for p in paths[done:]]
    assert_whole(build_cache(paths, 32, tmp_path / "c", progress=False), paths)


def test_who_waits_takes_over_from_who_is_killed(tmp_path):
    paths = save_some(tmp_path / "in", 160)
    builder = start_build(tmp_path, "first", tmp_path / "never")
    wait_for(lambda: finished(tmp_path) >= 60)
    waiter = start_build(tmp_path, "second")
    assert "waiting for another process that makes" in waiter.stderr.readline()
    assert builder.poll() is None and not decoded(tmp_path, "second")
    builder.kill()
    builder.communicate()
    assert waiter.communicate()[0] and waiter.returncode == 0
    assert decoded(tmp_path, "second") and min(decoded(tmp_path, "second")) == "060.png"
    assert_whole(build_cache(paths, 32, tmp_path / "c", progress=False), paths)


def test_who_waits_finds_what_the_other_built(tmp_path):
    paths = save_some(tmp_path / "in", 120)
    builder = start_build(tmp_path, "first", tmp_path / "gate")
    wait_for(lambda: finished(tmp_path) >= 60)
    waiter = start_build(tmp_path, "second")
    assert "waiting for another process that makes" in waiter.stderr.readline()
    (tmp_path / "gate").touch()
    assert builder.communicate()[0] == waiter.communicate()[0] != ""
    assert len(decoded(tmp_path, "first")) == 120 and not decoded(tmp_path, "second")
    assert_whole(build_cache(paths, 32, tmp_path / "c", progress=False), paths)


def test_reading_one_cache_while_another_is_built(tmp_path):
    paths = save_some(tmp_path / "in", 120)
    cache = build_cache(paths[:30], 32, tmp_path / "c", progress=False)
    want = cache.images.copy()
    builder = start_build(tmp_path, "log", tmp_path / "gate")
    wait_for(lambda: finished(tmp_path) >= 60)
    for _ in range(20): assert (build_cache(paths[:30], 32, tmp_path / "c", progress=False).images == want).all()
    assert builder.poll() is None, "it was to be still at work"
    (tmp_path / "gate").touch()
    assert builder.communicate()[0] and builder.returncode == 0
    assert (cache.images == want).all()


def test_a_whole_cache_needs_no_lock(tmp_path):
    cache = build_cache(save_some(tmp_path / "in", 3), 8, tmp_path / "c", progress=False)
    with FileLock(cache.folder.with_suffix(".lock")):
        thread = threading.Thread(target=build_cache, args=(cache.paths, 8, tmp_path / "c"), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def unfinished(tmp_path, paths, size=16):
    half = tmp_path / "c" / f"{cache_key([str(p) for p in paths], size)}.partial"
    half.mkdir(parents=True)
    return half


@pytest.mark.parametrize("journal, rows", [(None, 5), ("", 5), ("\0" * 6, 5), ("[3", 5), ("{}", 5), ("[7, []]", 5), ("5", 5), ("[null, []]", 5), ("[3, null]", 5)])
def test_a_journal_that_cannot_be_is_not_believed(tmp_path, journal, rows):
    paths = save_some(tmp_path / "in", 9)
    half = unfinished(tmp_path, paths)
    (half / "images.u8").write_bytes(bytes(rows * 256))
    if journal is not None: (half / "journal.json").write_text(journal)
    assert_whole(build_cache(paths, 16, tmp_path / "c", progress=False), paths, 16)


def test_a_journal_is_believed_and_what_came_after_it_is_cut_off(tmp_path):
    paths = save_some(tmp_path / "in", 9)
    half = unfinished(tmp_path, paths)
    (half / "images.u8").write_bytes(b"\7" * (2 * 256 + 100)) # the second of three was broken, and a third row was begun
    (half / "journal.json").write_text(json.dumps([3, [[str(paths[1]), "it was broken"]]]))
    cache = build_cache(paths, 16, tmp_path / "c", on_error="skip", progress=False)
    assert len(cache) == 8 and (cache.images[:2] == 7).all() and cache.broken == [(str(paths[1]), "it was broken")]
    assert (cache.images[2:] == np.stack([fit_square(read_image(p), 16) for p in paths[3:]])).all()
    with pytest.raises(ImageError, match="001.png: it was broken"): build_cache(paths, 16, tmp_path / "c", progress=False)


def test_a_refused_build_keeps_its_work(tmp_path):
    paths = save_some(tmp_path / "in", 400, 12)
    paths[300].write_bytes(b"")
    with pytest.raises(ImageError, match="300.png: the file is empty"): build_cache(paths, 16, tmp_path / "c", progress=False)
    assert finished(tmp_path, 16) == 256
    cache = build_cache(paths, 16, tmp_path / "c", on_error="skip", progress=False)
    assert len(cache) == 399 and cache.rows([paths[399]]) == [398]
    assert (cache.images == np.stack([fit_square(read_image(p), 16) for p in paths if p != paths[300]])).all()


def test_not_enough_room(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), dict(free=3 * 2**30)))
    with pytest.raises(ImageError, match="partial: 4.2 GB are needed for 1 images, and 3.2 GB are free"): build_cache([tmp_path / "a.png"], 65_000, tmp_path / "c", progress=False)
    assert not list(tmp_path.glob("c/*.partial"))


def test_decoding_can_start_later(tmp_path):
    paths = [str(p) for p in save_some(tmp_path / "in", 30)]
    late = list(decode_squares(paths, 8, progress=False, portion=7, start=10))
    assert len(late) == 20 and (np.stack(late) == np.stack([fit_square(read_image(p), 8) for p in paths[10:]])).all()


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
