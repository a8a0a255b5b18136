"""Draw README's picture: a piece of a field of every class, at full resolution, from plates in BBBC021's layout.

hcsdl simulate simulate.moas=12 simulate.sites=1 simulate.replicates=1 simulate.batches=1 simulate.plates_per_batch=1 plates.root=plates/classes
python notebooks/contact_sheet.py plates/classes notebooks/contact_sheet.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hcsdl.config import PlatesConfig
from hcsdl.data.reading import read_field
from hcsdl.plates.index import read_index

ROWS, COLUMNS, EDGE = 256, 320, 4  # of a tile, in px
COLOURS = np.array([[0.25, 0.45, 1.0], [0.2, 0.9, 0.3], [1.0, 0.35, 0.2]])  # red, green, blue shares of DAPI, tubulin, actin


def tile(image: np.ndarray) -> np.ndarray:
    """Return the middle of a field (3, H, W) uint16 as uint8 (ROWS, COLUMNS, 3), each channel stretched from its 1st to its 99.7th percentile."""
    low, high = (np.percentile(image, q, axis=(1, 2), keepdims=True) for q in (1, 99.7))
    top, left = (image.shape[1] - ROWS) // 2, (image.shape[2] - COLUMNS) // 2
    piece = ((image - low) / (high - low)).clip(0, 1)[:, top : top + ROWS, left : left + COLUMNS]
    return (np.einsum("chw,cr->hwr", piece, COLOURS).clip(0, 1) * 255).astype(np.uint8)


def main() -> None:
    """Write the sheet named by the second argument from the plates named by the first."""
    index = read_index(PlatesConfig(root=sys.argv[1]))
    classes = sorted(index.table["Metadata_MoA"].dropna().unique(), key=lambda name: (name != "DMSO", name))
    across = 5
    sheet = Image.new("RGB", (across * (COLUMNS + EDGE), -(-len(classes) // across) * (ROWS + EDGE)), "white")
    for number, name in enumerate(classes):
        row = int((index.table["Metadata_MoA"] == name).to_numpy().nonzero()[0][0])
        picture = Image.fromarray(tile(read_field(index.paths(row)).astype(np.float32)))
        ImageDraw.Draw(picture).text((6, 4), name, fill="white", stroke_width=2, stroke_fill="black", font_size=17)
        sheet.paste(picture, (number % across * (COLUMNS + EDGE), number // across * (ROWS + EDGE)))
    sheet.save(Path(sys.argv[2]), quality=88)


if __name__ == "__main__":
    main()
