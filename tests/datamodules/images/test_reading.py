import io
import sys
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from common.errors import UserError
from datamodules.images import reading
from datamodules.images.reading import read_figure, read_gray, read_header
from datamodules.images.values import ImageError


def smooth(height=1537, width=1283):
    y, x = np.mgrid[:height, :width] / 90
    return np.rint(127 + 60 * np.sin(x) * np.cos(1.3 * y) + 60 * np.sin(0.31 * x + 0.2 * y)).astype(np.uint8)


@pytest.fixture
def gray():
    return np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)


def save(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def fault_of(path, **options):
    with pytest.raises(ImageError) as error:
        read_gray(path, **options)
    return error.value.kind, error.value.detail


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_gray_comes_back_from_every_mode(gray, tmp_path, mode, suffix):
    read = read_gray(save(tmp_path / f"image.{suffix}", gray, mode))
    assert read.dtype == np.uint8
    assert np.array_equal(read, gray)
    assert read_header(tmp_path / f"image.{suffix}") == gray.shape


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_and_what_it_hides_is_kept(gray, tmp_path, mode):
    image = Image.fromarray(gray).convert(mode)
    image.putalpha(Image.fromarray(255 - gray))
    assert np.array_equal(read_gray(save(tmp_path / "image.png", image)), gray)


def test_a_palette_with_transparent_entries(gray, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_gray(save(tmp_path / "image.png", gray, "P", transparency=bytes(range(256))))
    assert np.array_equal(read, gray)


def test_colour_becomes_luma(tmp_path):
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[:, :20, 0] = colours[:, 20:40, 1] = colours[:, 40:, 2] = 255
    assert read_gray(save(tmp_path / "image.png", colours))[0, ::20].tolist() == [76, 150, 29]


def stretched(values, low=0.5, high=99.5):
    ends = np.percentile(values, [low, high])
    return np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.float32)])
def test_more_than_8_bits_are_stretched_between_percentiles(tmp_path, suffix, dtype):
    """Twelve bits in sixteen: the high byte alone would leave 16 shades."""
    values = np.linspace(1000, 4095, 40 * 48).reshape(40, 48).astype(dtype)
    read = read_gray(save(tmp_path / f"image.{suffix}", values))
    assert read.min() == 0
    assert read.max() == 255
    assert np.abs(read - stretched(values.astype(float))).max() < 0.6


def test_one_hot_pixel_does_not_blacken_16_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 900, (64, 64)).astype(np.uint16)
    values[3, 4] = 65535
    assert len(np.unique(read_gray(save(tmp_path / "hot.png", values)))) > 200
    values[...], values[3, 4] = 7, 9  # so few other values that the percentiles are one
    assert sorted(np.unique(read_gray(save(tmp_path / "flat.png", values)))) == [0, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colour_is_divided_by_257_by_every_reader(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 65536, (40, 48, 3), dtype=np.uint16)
    path = tmp_path / f"image.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(path))
    expected = np.rint(values / 257).astype(np.uint8)
    for read in (reading.read_colour, read_figure):
        assert np.array_equal(read(path), expected)
    assert np.array_equal(read_gray(path), np.asarray(Image.fromarray(expected).convert("L")))
    assert reading.read_field_of_view(path).shape == (48, 48, 3)
    assert reading.read_reduced(path, 40)[0].shape == (40, 48)


def test_16_bits_beside_transparency(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (40, 48, 4), dtype=np.uint16)
    for channels in (2, 4):
        part = np.ascontiguousarray(values[..., :channels])
        sitk.WriteImage(sitk.GetImageFromArray(part, isVector=True), str(tmp_path / f"{channels}.png"))
    assert fault_of(tmp_path / "2.png")[0] == "dtype"
    assert np.array_equal(reading.read_colour(tmp_path / "4.png"), np.rint(values[..., :3] / 257))


def test_white_is_zero_in_16_bits_too(tmp_path):
    """Pillow inverts such a TIFF of 8 bits, and leaves one of 16 as it is."""
    values = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "image.tif", tiffinfo={262: 0})
    assert np.array_equal(read_gray(tmp_path / "image.tif"), 255 - read_gray(save(tmp_path / "plain.tif", values)))


def test_printers_colours_that_may_be_inverted(gray, tmp_path):
    """With Adobe's mark a JPEG's CMYK is inverted, without one nobody knows."""
    path = save(tmp_path / "image.jpg", gray, "CMYK", quality=95)
    assert np.abs(read_gray(path).astype(int) - gray).mean() < 3
    path.write_bytes(path.read_bytes().replace(b"Adobe", b"Xdobe"))
    assert fault_of(path)[0] == "dtype"
    assert read_gray(save(tmp_path / "image.tif", gray, "CMYK")).shape == gray.shape


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_several_pictures_in_a_file(gray, tmp_path, suffix):
    frames = [Image.fromarray(gray), Image.fromarray(255 - gray)]
    path = tmp_path / f"image.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    kind, detail = fault_of(path)
    assert kind == "shape"
    assert "2 frames or pages" in detail
    with pytest.raises(ImageError, match="frames"):
        read_figure(path)


def test_a_smaller_copy_behind_the_first_page_is_no_picture(gray, tmp_path):
    image = Image.fromarray(gray)
    image.save(tmp_path / "image.tif", save_all=True, append_images=[image.resize((24, 20))])
    assert np.array_equal(read_gray(tmp_path / "image.tif"), gray)


def test_not_a_number(tmp_path):
    values = np.random.default_rng(0).random((40, 40), dtype=np.float32)
    values[3, 4] = np.nan
    assert fault_of(save(tmp_path / "image.tif", values))[0] == "nan"


def test_missing_empty_and_foreign_files(tmp_path):
    assert fault_of(tmp_path / "image.png")[0] == "missing"
    (tmp_path / "empty.jpg").touch()
    assert fault_of(tmp_path / "empty.jpg") == ("unreadable", "the file is empty")
    (tmp_path / "text.png").write_text("no image " * 99)
    save(tmp_path / "script.eps", smooth(40, 40))
    for name in ("text.png", "script.eps"):
        kind, detail = fault_of(tmp_path / name)
        assert kind == "unreadable"
        assert "known format" in detail


@pytest.mark.parametrize("shorter_side", [None, 64])
@pytest.mark.parametrize(("suffix", "lost"), [("jpg", 2), ("jpg", 5000), ("png", 20), ("png", 5000)])
def test_a_truncated_file_is_never_padded(tmp_path, suffix, lost, shorter_side):
    path = save(tmp_path / f"image.{suffix}", smooth(400, 500))
    path.write_bytes(path.read_bytes()[:-lost])
    kind, detail = fault_of(path, shorter_side=shorter_side)
    assert kind == "unreadable"
    assert "truncated" in detail.lower() or "ends early" in detail


def test_one_flipped_byte_of_a_png_is_found(gray, tmp_path):
    path = save(tmp_path / "image.png", gray)
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x01  # in the last bytes of the pixels' check sum, which decoding does not reach
    path.write_bytes(bytes(content))
    assert fault_of(path)[0] == "checksum"


def test_small_and_constant_images(gray, tmp_path):
    assert fault_of(save(tmp_path / "pixel.png", gray[:1, :1]))[0] == "shape"
    assert fault_of(save(tmp_path / "strip.png", gray[:31]))[0] == "shape"
    assert read_gray(save(tmp_path / "least.png", gray[:32])).shape == (32, 48)
    assert fault_of(save(tmp_path / "constant.png", np.full_like(gray, 7))) == ("constant", "every pixel is 7")
    assert fault_of(save(tmp_path / "deep.png", np.full(gray.shape, 999, np.uint16)))[0] == "constant"


def test_a_bomb_is_refused_before_it_is_decoded(gray, tmp_path, monkeypatch):
    path = save(tmp_path / "image.png", gray)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", None)
        patch.setattr(reading, "_to_gray", None)
        kind, detail = fault_of(path, max_pixels=gray.size - 1)
    assert kind == "shape"
    assert "40 x 48" in detail
    assert read_gray(path, max_pixels=gray.size).shape == gray.shape
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", gray.size // 2 - 1)
    assert fault_of(path)[0] == "shape"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shorter_side", [159, 161, 320, 641])
def test_a_drafted_jpeg_equals_a_full_decode(tmp_path, mode, shorter_side):
    """Sizes that 2, 4 and 8 do not divide: a draft that is shifted by part of a pixel shows at the far edge."""
    path = save(tmp_path / "image.jpg", smooth(), mode, quality=95)
    read = read_gray(path, shorter_side)
    assert min(read.shape) == shorter_side
    whole = Image.fromarray(read_gray(path)).resize(read.shape[::-1], Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(whole, np.float32) - read)
    assert difference.mean() < 1
    assert difference[-8:, -8:].mean() < 2


def test_a_draft_is_never_smaller_than_what_is_asked_for(tmp_path, monkeypatch):
    path = save(tmp_path / "image.jpg", smooth(1023, 1100))
    drafted = []
    to_gray = reading._to_gray
    monkeypatch.setattr(reading, "_to_gray", lambda image: drafted.append(min(image.size)) or to_gray(image))
    for shorter_side in (128, 127, 255, 1023, 2000):
        read_gray(path, shorter_side)
    assert drafted == [256, 128, 256, 1023, 1023]


def test_only_ever_reduced(tmp_path):
    path = save(tmp_path / "image.png", smooth(100, 150))
    assert read_gray(path, 40).shape == (40, 60)
    assert read_gray(path, 100).shape == read_gray(path, 512).shape == (100, 150)
    with pytest.raises(ValueError, match="at least 1"):
        read_gray(path, 0)


def dicom(path, pixels, meaning="MONOCHROME2", bits=8, **tags):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PixelRepresentation = meaning, 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom(gray, tmp_path):
    path = dicom(tmp_path / "image.dcm", gray)
    assert np.array_equal(read_gray(path), gray)
    assert read_header(path) == gray.shape
    assert np.array_equal(read_gray(dicom(tmp_path / "inverted.dcm", gray, "MONOCHROME1")), 255 - gray)
    assert read_gray(path, 32).shape == (32, 38)
    assert fault_of(path, max_pixels=100)[0] == "shape"
    path.write_bytes(path.read_bytes()[:-9])
    assert fault_of(path)[0] == "unreadable"
    path.write_bytes(b"no DICOM" * 99)
    assert fault_of(path)[0] == "unreadable"


def test_without_pydicom_the_extra_is_named(gray, tmp_path, monkeypatch):
    path = dicom(tmp_path / "image.dcm", gray)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read in (read_gray, read_header):
        with pytest.raises(UserError, match=r"medmim\[dicom\]"):
            read(path)


def test_an_exif_orientation_is_ignored(gray, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "JPEG", exif=exif)
    (tmp_path / "image.jpg").write_bytes(buffer.getvalue())
    assert read_gray(tmp_path / "image.jpg").shape == gray.shape


@pytest.mark.real_data
def test_the_covid_collection(real_data):
    paths = sorted((real_data("covid_cxr") / "images").iterdir())
    assert len(paths) == 218
    for path in paths:
        full = read_header(path)
        read = read_gray(path, 512)
        assert read.dtype == np.uint8
        assert min(read.shape) == min(512, *full)
        assert abs(read.shape[0] / read.shape[1] - full[0] / full[1]) < 0.01


def test_colour_has_transparency_on_white_and_is_turned(tmp_path):
    """Of a figure nothing is dark because it is see-through."""
    layered = np.zeros((40, 50, 4), np.uint8)
    layered[:20] = (200, 10, 20, 255)
    Image.fromarray(layered).save(tmp_path / "layered.png")
    seen = read_figure(tmp_path / "layered.png")
    assert seen.shape == (40, 50, 3)
    assert seen[0, 0].tolist() == [200, 10, 20]
    assert seen[30, 30].tolist() == [255, 255, 255]
    palette = Image.fromarray(layered[..., :3]).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 30))
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 30)))
    assert read_figure(tmp_path / "palette.png")[30, 30].tolist() == [255, 255, 255]
    turned = Image.fromarray(layered[..., :3])
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_figure(tmp_path / "turned.jpg").shape == (50, 40, 3)
    Image.fromarray(layered[..., 0]).save(tmp_path / "gray.png")
    assert (read_figure(tmp_path / "gray.png")[0, 0] == 200).all()
    deep = Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    assert read_figure(tmp_path / "deep.png").max() == 255
    Image.fromarray(layered[..., :3]).convert("CMYK").save(tmp_path / "print.jpg")
    assert read_figure(tmp_path / "print.jpg", shorter_side=32).shape == (32, 40, 3)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "plain.png")
    with pytest.raises(ImageError, match="every pixel"):
        read_figure(tmp_path / "plain.png")


def test_a_strip_is_not_padded_to_a_square(tmp_path):
    """32 x 20,480 pixels padded to a square once took 2.5 GB."""
    pixels = np.random.default_rng(0).integers(30, 256, (320, 8200, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match="padded") as error:
        reading.read_field_of_view(save(tmp_path / "long.png", pixels))
    assert error.value.kind == "shape"
    assert fault_of(save(tmp_path / "strip.png", pixels[:32, :1100])) == (
        "shape",
        "a strip of 32 x 1100 pixels is not an image",
    )


def test_a_header_alone_is_bounded_too(gray, tmp_path, monkeypatch):
    """Masks are drawn on the grid that a header promises."""
    monkeypatch.setattr(reading, "MAX_PIXELS", gray.size - 1)
    for path in (save(tmp_path / "image.png", gray), dicom(tmp_path / "image.dcm", gray)):
        with pytest.raises(ImageError, match="more than the limit"):
            read_header(path)
