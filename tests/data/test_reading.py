"""Reading: pixels come back as stored, and what is no whole image never comes back at all."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from hcsdl.config import DataError
from hcsdl.data.reading import read_field, read_header

pytestmark = pytest.mark.xeon_only


def write(path: Path, image: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, image, **options)
    return path


def noise(shape: tuple[int, ...] = (48, 64), dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 5},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"compression": "lzw", "predictor": True},
        {"tile": (16, 16)},
        {"bigtiff": True},
    ],
    ids=str,
)
def test_pixels_come_back(tmp_path, dtype, options):
    """However a TIFF file is laid out, every channel has its own values."""
    images = [noise(dtype=dtype, seed=seed) for seed in range(3)]
    paths = [write(tmp_path / f"{seed}.tif", image, **options) for seed, image in enumerate(images)]
    field = read_field(paths)
    assert field.dtype == dtype and field.dtype.isnative and field.flags.c_contiguous
    np.testing.assert_array_equal(field, np.stack(images))
    assert read_header(paths[0]) == ((48, 64), np.dtype(dtype))


@pytest.mark.parametrize("read", [lambda path: read_field([path]), read_header], ids=["field", "header"])
class TestBadFiles:
    """Both ways of reading name the file and say what is wrong."""

    def test_missing(self, tmp_path, read):
        with pytest.raises(DataError, match="An image is missing: .*nowhere.tif"):
            read(tmp_path / "nowhere.tif")

    @pytest.mark.parametrize(
        "content",
        [b"", b"II", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(99), b"II*\0\xff\xff\xff\x7f"],
        ids=["empty", "two bytes", "page", "PNG", "offset"],
    )
    def test_not_a_tiff(self, tmp_path, read, content):
        (tmp_path / "bad.tif").write_bytes(content)
        with pytest.raises(DataError, match="An image must be a whole TIFF file: .*bad.tif"):
            read(tmp_path / "bad.tif")

    @pytest.mark.parametrize("options", [{}, {"rowsperstrip": 5}, {"compression": "zlib"}, {"tile": (16, 16)}], ids=str)
    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.98, 1.0])
    def test_truncated(self, tmp_path, read, options, kept):
        """Cut anywhere, also by a single byte."""
        path = write(tmp_path / "cut.tif", noise(), **options)
        content = path.read_bytes()
        end = content.index(content[-16:]) + 16
        path.write_bytes(content[: min(int(kept * end), end - 1)])
        with pytest.raises(DataError, match=r"An image must be a whole TIFF file: .*cut.tif"):
            read(path)

    @pytest.mark.parametrize(
        ("image", "found"),
        [
            (np.zeros((8, 9), "float32"), "8 x 9 float32"),
            (np.zeros((8, 9), "int16"), "8 x 9 int16"),
            (np.zeros((8, 9), "uint32"), "8 x 9 uint32"),
            (np.zeros((8, 9, 3), "uint8"), "8 x 9 x 3 uint8"),
            (np.zeros((8, 9), bool), "8 x 9 bool"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_wrong_dtype_or_shape(self, tmp_path, read, image, found):
        path = write(tmp_path / "odd.tif", image, photometric="rgb" if image.ndim == 3 else "minisblack")
        with pytest.raises(DataError, match=rf"one channel \(rows, columns\) of uint8 or uint16: .*odd.tif is {found}"):
            read(path)

    def test_folder(self, tmp_path, read):
        with pytest.raises(DataError, match="An image cannot be opened"):
            read(tmp_path)


def test_damaged_compression(tmp_path):
    """Compressed bytes that decode to nothing: the header is fine, the pixels are not."""
    path = write(tmp_path / "damaged.tif", noise(), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged.tif cannot be read"):
        read_field([path])


@pytest.mark.parametrize(("second", "found"), [(noise((48, 60)), "48 x 60 uint16"), (noise(dtype="uint8"), "48 x 64 uint8")])
def test_channels_that_differ(tmp_path, second, found):
    paths = [write(tmp_path / "w1.tif", noise()), write(tmp_path / "w2.tif", second)]
    with pytest.raises(DataError, match=rf"must be alike: .*w1.tif is 48 x 64 uint16, but .*w2.tif is {found}"):
        read_field(paths)


def test_no_channels():
    with pytest.raises(DataError, match="at least one channel"):
        read_field([])
