import io

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import notes
from datamodules.images import dicom as dicom_pictures
from datamodules.images.reading import read_colour, read_gray, read_header
from datamodules.images.values import ImageError

pydicom = pytest.importorskip("pydicom")


def write(path, pixels, meaning="MONOCHROME2", bits=8, **tags):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = meaning, 3 if pixels.ndim == 3 else 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def fault_of(path):
    with pytest.raises(ImageError) as error:
        read_gray(path)
    return error.value.kind, error.value.detail


def correlation(a, b):
    return np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1]


def table(values, first, bits):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(values) % 65536, first, bits]
    item.add_new("LUTData", "OW", np.asarray(values, dtype=np.uint16).tobytes())
    return item


@pytest.fixture
def ramp():
    """Return 12 bits in 16 around a smooth shape, ``(64, 64)``."""
    y, x = np.mgrid[:64, :64] / 10
    return np.rint(2000 + 900 * np.sin(x) * np.cos(y) + 900 * np.sin(0.3 * x)).astype(np.uint16)


def smooth(height, width):
    y, x = np.mgrid[:height, :width] / 90
    return np.rint(127 + 60 * np.sin(x) * np.cos(1.3 * y) + 60 * np.sin(0.31 * x + 0.2 * y)).astype(np.uint8)


def test_dicom_with_jpeg_inside(tmp_path, monkeypatch):
    path = write(tmp_path / "image.dcm", smooth(80, 90))
    import pydicom

    buffer = io.BytesIO()
    Image.fromarray(smooth(80, 90)).save(buffer, "JPEG", quality=95)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.save_as(path)
    assert np.abs(read_gray(path).astype(int) - smooth(80, 90)).mean() < 2
    dataset.NumberOfFrames = 2
    dataset.save_as(tmp_path / "frames.dcm")
    assert fault_of(tmp_path / "frames.dcm") == ("shape", "expected one frame, found 2")
    monkeypatch.setattr(type(pydicom.pixels.get_decoder(pydicom.uid.JPEGBaseline8Bit)), "is_available", False)
    with pytest.raises(UserError, match=r"JPEG Baseline.*medmim\[dicom\]"):
        read_gray(path)


def test_without_a_window_percentiles_decide(ramp, tmp_path):
    ramp[5, 5] = 65535
    read = read_gray(write(tmp_path / "image.dcm", ramp, bits=16))
    low, high = np.percentile(ramp, [0.5, 99.5])
    assert np.abs(read - np.clip((ramp - low) / (high - low), 0, 1) * 255).max() < 0.6
    inverted = read_gray(write(tmp_path / "inverted.dcm", ramp, "MONOCHROME1", 16))
    assert np.array_equal(inverted, 255 - read)


@pytest.mark.parametrize(("function", "tolerance"), [("LINEAR", 0.6), ("LINEAR_EXACT", 0.6), ("SIGMOID", None)])
def test_the_first_window_of_any_function(ramp, tmp_path, function, tolerance):
    """Its edges are black and white, whether or not any pixel reaches them."""
    window = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [3000, 1], "WindowWidth": [8000, 1]}
    read = read_gray(write(tmp_path / "image.dcm", ramp, bits=12, VOILUTFunction=function, **window))
    if tolerance is None:
        expected = 255 / (1 + np.exp(-4 * (ramp * 2.0 - 1000 - 3000) / 8000))
    else:
        exact = function == "LINEAR_EXACT"
        center, width = (3000, 8000) if exact else (2999.5, 7999)
        expected = np.clip(((ramp * 2.0 - 1000 - center) / width + 0.5), 0, 1) * 255
    assert np.abs(read - expected).max() < (tolerance or 0.6)


@pytest.mark.parametrize("window", [{"WindowCenter": 40, "WindowWidth": 80}, {"WindowCenter": 40, "WindowWidth": 0}])
def test_a_window_of_other_values_is_dropped_and_counted(ramp, tmp_path, window, capsys):
    plain = read_gray(write(tmp_path / "plain.dcm", ramp, bits=12))
    notes.print_notes()
    assert np.array_equal(read_gray(write(tmp_path / "image.dcm", ramp, bits=12, **window)), plain)
    notes.print_notes()
    assert "was not used" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_falling_table_of_interest(ramp, tmp_path, bits):
    falling = np.linspace(2**bits - 1, 0, 4096).astype(int)
    path = write(tmp_path / "image.dcm", ramp, bits=12, VOILUTSequence=[table(falling, 0, bits)])
    assert correlation(read_gray(path), ramp) < -0.999


def test_a_table_reaches_as_far_as_it_goes(ramp, tmp_path):
    """Values beyond both ends take the first and the last entry, also after rescaling to numbers of any size."""
    rising = np.arange(0, 65536, 4)
    facts = {"RescaleSlope": 40, "RescaleIntercept": 0, "VOILUTSequence": [table(rising, 60000, 16)]}
    read = read_gray(write(tmp_path / "image.dcm", ramp, bits=12, **facts))
    assert (read[ramp * 40.0 <= 60000] == 0).all()
    assert (read[ramp * 40.0 >= 60000 + 16383] == 255).all()


def test_a_modality_table_of_signed_pixels(ramp, tmp_path):
    """In its pixels' own 16 bits, pydicom's difference with the first value would wrap around."""
    signed = (ramp.astype(np.int32) * 16 - 32768).astype(np.int16)
    rising = np.arange(65536)
    read = read_gray(write(tmp_path / "image.dcm", signed, bits=16, ModalityLUTSequence=[table(rising, -32768, 16)]))
    assert correlation(read, signed) > 0.999


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("value", [65535, -16000])
@pytest.mark.parametrize("meaning", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_takes_no_shades(ramp, tmp_path, dtype, value, meaning):
    pixels = ramp.astype(np.int32)
    pixels[:, :12] = value
    stored = pixels.astype(np.uint16).view(dtype) if dtype == np.int16 else pixels.astype(np.uint16)
    path = write(tmp_path / "image.dcm", stored, meaning, 16, PixelPaddingValue=0)
    dataset = pydicom.dcmread(path)
    for sign in ("US", "SS"):
        number = value % 65536 if sign == "US" else int(np.uint16(value % 65536).view(np.int16))
        dataset["PixelPaddingValue"] = pydicom.DataElement(0x00280120, sign, number)
        dataset.save_as(path)
        read = read_gray(path)
        assert len(np.unique(read)) >= 200
        assert (read[:, :12] == 0).all()


def test_a_range_of_padding(ramp, tmp_path):
    ramp[:, :6], ramp[:, 6:12] = 4000, 4095
    facts = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000}
    read = read_gray(write(tmp_path / "image.dcm", ramp, bits=12, **facts))
    assert (read[:, :12] == 0).all()
    assert (read[:, 12:] > 0).mean() > 0.9


def test_padding_that_is_most_of_the_middle_is_a_value(ramp, tmp_path, capsys):
    ramp[10:54, 10:54] = 3000
    plain = read_gray(write(tmp_path / "plain.dcm", ramp, bits=12))
    notes.print_notes()
    assert np.array_equal(read_gray(write(tmp_path / "image.dcm", ramp, bits=12, PixelPaddingValue=3000)), plain)
    notes.print_notes()
    assert "padding value" in capsys.readouterr().out
    ramp[...] = 3000
    assert fault_of(write(tmp_path / "image.dcm", ramp, bits=12))[0] == "constant"


@pytest.mark.parametrize("meaning", ["MONOCHROME1", "MONOCHROME2"])
def test_inverted_once(ramp, tmp_path, meaning):
    path = write(tmp_path / "image.dcm", ramp, meaning, 12, PresentationLUTShape="INVERSE")
    assert correlation(read_gray(path), -ramp.astype(float)) > 0.99


def test_a_palette_becomes_colour(tmp_path):
    indices = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    colours = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
    facts = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    for name, values in zip(("Red", "Green", "Blue"), colours, strict=True):
        facts[f"{name}PaletteColorLookupTableData"] = values.tobytes()
    read = read_colour(write(tmp_path / "image.dcm", indices, "PALETTE COLOR", **facts))
    assert np.array_equal(read, np.rint(colours.T[indices] / 257))


def test_luma_and_chroma_become_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(100, 150, (40, 48, 3)).astype(np.uint8)
    read = read_colour(write(tmp_path / "image.dcm", pixels, "YBR_FULL"))
    assert np.abs(read.astype(int) - np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB"))).max() <= 1


def test_dicom_by_its_content(ramp, tmp_path):
    path = write(tmp_path / "image.dcm", ramp, bits=12)
    expected = read_gray(path)
    for name in ("IM0001", "image.png", "scan.DICOM"):
        renamed = path.rename(tmp_path / name)
        assert np.array_equal(read_gray(renamed), expected)
        assert read_header(renamed) == (64, 64)
        path = renamed


def test_a_file_without_a_picture(ramp, tmp_path):
    dataset = pydicom.dcmread(write(tmp_path / "image.dcm", ramp, bits=12))
    del dataset.Rows, dataset.Columns, dataset.PixelData
    dataset.SOPClassUID = pydicom.uid.BasicTextSRStorage
    dataset.save_as(tmp_path / "image.dcm")
    assert fault_of(tmp_path / "image.dcm") == ("unreadable", "a DICOM file of Basic Text SR Storage without an image")


def test_compressed_pixels_larger_than_the_header_says(tmp_path):
    """Decoders allocate what the compressed picture promises, not what the header does."""
    for kind, syntax in (("JPEG", pydicom.uid.JPEGBaseline8Bit), ("JPEG2000", pydicom.uid.JPEG2000Lossless)):
        dataset = pydicom.dcmread(write(tmp_path / "image.dcm", smooth(80, 90)))
        buffer = io.BytesIO()
        Image.fromarray(smooth(800, 900)).save(buffer, kind)
        dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "image.dcm")
        kind, detail = fault_of(tmp_path / "image.dcm")
        assert kind == "shape"
        assert "800 x 900 x 1" in detail


def test_a_deflated_data_set_is_bounded(ramp, tmp_path, monkeypatch):
    path = write(tmp_path / "image.dcm", ramp, bits=12)
    expected = read_gray(path)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    assert np.array_equal(read_gray(path), expected)
    monkeypatch.setattr(dicom_pictures, "MAX_DATASET_BYTES", 1000)
    assert fault_of(path)[0] == "shape"
    with pytest.raises(ImageError, match="deflated"):
        read_header(path)


def test_a_syntax_that_no_decoder_reads_is_named(ramp, tmp_path):
    dataset = pydicom.dcmread(write(tmp_path / "image.dcm", smooth(80, 90)))
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 nothing that decodes " * 9])
    dataset["PixelData"].VR = "OB"
    for syntax, name in ((pydicom.uid.JPEGExtended12Bit, "JPEG Extended"), (pydicom.uid.MPEG2MPML, "MPEG2")):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "image.dcm")
        kind, detail = fault_of(tmp_path / "image.dcm")
        assert kind == "unreadable"
        assert name in detail


@pytest.mark.real_data
def test_real_radiographs(real_data):
    folder = real_data("dicom_radiographs")
    chest = read_gray(folder / "RG1_J2KI.dcm")
    stored = pydicom.dcmread(folder / "RG1_J2KI.dcm").pixel_array
    assert correlation(chest, stored) < -0.99  # MONOCHROME1: what is bright is stored low
    height, width = chest.shape
    lungs = np.median(chest[height // 3 : height // 2, [width // 4, 3 * width // 4]])
    assert lungs < np.median(chest[height // 2 : 2 * height // 3, width // 2 - 50 : width // 2 + 50])
    for name in ("vlut_04.dcm", "mlut_18.dcm"):
        assert correlation(read_gray(folder / name), pydicom.dcmread(folder / name).pixel_array) > 0.999


@pytest.mark.real_data
def test_real_slices(real_data):
    folder = real_data("dicom_faults")
    for path in sorted(folder.rglob("*.dcm")):
        assert read_gray(path).ndim == 2
    assert np.ptp(read_colour(folder / "rgb" / "IM-0001-0001-0001.dcm").astype(int), axis=-1).max() > 0
