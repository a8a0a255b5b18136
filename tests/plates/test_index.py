"""The index: what stands in the CSV files and on the disk, and sentences for what does not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from hcsdl.config import ConfigError, DataError, PlatesConfig
from hcsdl.plates.index import Index, load_index, read_index
from tests.plates.screens import REAL_CSV, write_csv, write_screen

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    write_screen(tmp_path / "screen")
    return tmp_path / "screen"


def read(root: Path, query: str | None = None, **options: bool) -> Index:
    return read_index(PlatesConfig(root=str(root), query=query), **options)


def edit(root: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> None:
    """Apply `change` to a CSV file of a screen, all of it text."""
    table = pd.read_csv(root / name, dtype=str, keep_default_na=False)
    changed = change(table)
    write_csv(root, name, table if changed is None else changed)


def put(column: str, row: int, value: str) -> Callable[[pd.DataFrame], None]:
    """Return a change that sets one cell."""
    return lambda table: table.__setitem__(column, [value if at == row else old for at, old in enumerate(table[column])])


@pytest.mark.skipif(not REAL_CSV.is_dir(), reason="BBBC021's CSV files are not beside this checkout")
class TestRealCsv:
    """BBBC021 version 1, counted."""

    @pytest.fixture
    def table(self) -> pd.DataFrame:
        index = read(REAL_CSV, files=False)
        assert index.channels == ("DAPI", "Tubulin", "Actin")
        return index.table

    def test_fields(self, table):
        counts = {name: table[f"Metadata_{name}"].nunique() for name in ("Plate", "Batch", "Compound", "Site")}
        assert len(table) == 13200 and counts == {"Plate": 55, "Batch": 10, "Compound": 113, "Site": 4}
        assert set(table.groupby(["Metadata_Plate", "Metadata_Well"]).size()) == {4}
        assert table.groupby(["Metadata_Plate", "Metadata_Well"]).ngroups == 3300
        assert set(table["Metadata_Batch"]) == {f"Week{week}" for week in range(1, 11)}

    def test_labels(self, table):
        labelled = table[table["Metadata_MoA"].notna()]
        treated = labelled[labelled["Metadata_MoA"] != "DMSO"]
        assert (len(labelled), len(treated)) == (3848, 2528)
        assert [treated[f"Metadata_{name}"].nunique() for name in ("Treatment", "Compound", "MoA")] == [103, 38, 12]
        assert (labelled["Metadata_Compound"] == "DMSO").sum() == 1320
        assert (treated["Metadata_Treatment"] == "taxol 0.3").sum() == 1332
        assert (table["Metadata_Compound"] == "UNKNOWN").sum() == 64
        assert table.loc[table["Metadata_MoA"].isna(), "Metadata_MoA"].map(lambda value: value is None).all()

    def test_replicates(self, table):
        treated = table[table["Metadata_MoA"].notna() & (table["Metadata_MoA"] != "DMSO")]
        wells = treated.drop_duplicates(["Metadata_Plate", "Metadata_Well"]).groupby("Metadata_Treatment").size()
        assert wells.value_counts().to_dict() == {3: 95, 2: 7, 333: 1}
        assert treated.groupby("Metadata_Treatment")["Metadata_Batch"].nunique().value_counts().to_dict() == {1: 102, 10: 1}
        assert set(table[table["Metadata_Compound"] == "DMSO"].groupby("Metadata_Plate").size()) == {24}


@pytest.mark.parametrize("layout", ["week", "flat"])
@pytest.mark.parametrize("compressed", [False, True])
def test_layouts_are_one_screen(tmp_path, layout, compressed):
    """Whichever way the folders lie and the lists are packed: same hash, and every path is a file."""
    write_screen(tmp_path / "reference")
    write_screen(tmp_path / "other", layout=layout, compressed_csv=compressed)
    reference, other = read(tmp_path / "reference"), read(tmp_path / "other")
    assert reference.hash == other.hash and len(other.table) == 24
    assert all(path.is_file() for row in range(24) for path in other.paths(row))
    folders = {path.relative_to(tmp_path / "other").parts[0] for row in range(24) for path in other.paths(row)}
    assert folders == ({"Week1"} if layout == "week" else {"Week1_20000", "Week1_20001"})


def test_case_of_names_is_ignored(tmp_path):
    write_screen(tmp_path / "reference")
    write_screen(tmp_path / "loud")
    (tmp_path / "loud" / "Week1").rename(tmp_path / "loud" / "WEEK1")
    for path in (tmp_path / "loud").rglob("*.tif"):
        path.rename(path.with_name(path.name.upper()))
    (tmp_path / "loud" / "screen_image.csv").rename(tmp_path / "loud" / "Screen_IMAGE.csv")
    index = read(tmp_path / "loud")
    assert index.paths(0)[0].is_file() and index.paths(0)[0].name.endswith(".TIF")
    assert index.hash == read(tmp_path / "reference").hash


def test_columns(screen):
    index = read(screen)
    first, treated = index.table.iloc[0], index.table[index.table["Metadata_Compound"] != "DMSO"].iloc[0]
    assert index.field_name(0) == "Week1_20000/B02/1"
    assert [first[f"Metadata_{name}"] for name in ("Batch", "Treatment", "MoA", "Replicate")] == ["Week1", "DMSO", "DMSO", 1]
    assert (treated["Metadata_Treatment"], treated["Metadata_MoA"]) == ("compound 0a 0.3", "moa 0")
    assert first["Path_Actin"] == "Week1/Week1_20000/B02_s1_w3Week1_20000.tif"
    assert isinstance(index.table.index, pd.RangeIndex) and index.table["Metadata_Site"].dtype == int


def test_hash_is_of_the_content(screen, tmp_path):
    """The order of the lines and the place of the folder do not count; a label does."""
    before = read(screen)
    moved = shutil.copytree(screen, tmp_path / "elsewhere")
    edit(moved, "screen_image.csv", lambda table: table.sample(frac=1, random_state=0))
    after = read(moved)
    assert after.hash == before.hash and after.table.equals(before.table)
    edit(moved, "screen_moa.csv", put("moa", 1, "another"))
    assert read(moved).hash != before.hash


def test_select_and_names(screen):
    index = read(screen)
    mask = index.table["Metadata_Plate"] == "Week1_20001"
    half = index.select(mask)
    assert len(half.table) == 12 and half.hash != index.hash and half.field_name(0) == "Week1_20001/B02/1"
    assert half.hash == read(screen, query="Metadata_Plate == 'Week1_20001'").hash
    assert index.select([3, 1]).field_name(0) == index.field_name(3)


def test_save_and_load(screen, tmp_path):
    index = read(screen)
    loaded = load_index(index.save(tmp_path / "cache"))
    assert loaded.hash == index.hash and loaded.channels == index.channels and loaded.root == index.root and loaded.notes == index.notes
    pd.testing.assert_frame_equal(loaded.table, index.table, check_dtype=False)
    index.table.assign(Metadata_MoA="x").to_parquet(tmp_path / "cache" / "index.parquet")
    with pytest.raises(DataError, match="must have the hash beside it"):
        load_index(tmp_path / "cache")
    with pytest.raises(DataError, match="cannot be read"):
        load_index(tmp_path / "nowhere")


def test_without_moa_the_file_is_never_opened(screen):
    (screen / "screen_moa.csv").write_bytes(b"\xff\xfe\x00 garbage \x80" * 9)
    index = read(screen, moa=False)
    assert all(value is None for value in index.table["Metadata_MoA"])
    with pytest.raises(DataError, match="screen_moa.csv"):
        read(screen)
    with pytest.raises(ConfigError, match="plates.query must not ask for Metadata_MoA"):
        read(screen, moa=False, query="Metadata_MoA == 'moa 0'")


def test_no_moa_file(screen):
    (screen / "screen_moa.csv").unlink()
    with pytest.raises(DataError, match=r"plates.root must hold \*_moa.csv .* training.target=Compound"):
        read(screen)


def test_missing_images(screen):
    """The sentence counts images and fields and names the first few; fields left out by the query are not missed."""
    for name in ("B02_s1_w1", "B02_s1_w2", "B03_s2_w3", "B04_s1_w1"):
        (screen / "Week1" / "Week1_20001" / f"{name}Week1_20001.tif").unlink()
    with pytest.raises(DataError, match=r"4 of 72 images, of 3 of 24 fields \(Week1_20001/B02/1 DAPI: Week1/Week1_20001/B02_s1_w1.*; …\)"):
        read(screen)
    assert len(read(screen, query="Metadata_Plate != 'Week1_20001'").table) == 12
    assert len(read(screen, files=False).table) == 24


@pytest.mark.parametrize(
    "column",
    [
        "Image_FileName_DAPI",
        "Image_PathName_Actin",
        "Image_Metadata_Plate_DAPI",
        "Image_Metadata_Well_DAPI",
        "Image_Metadata_Compound",
        "Image_Metadata_Concentration",
    ],
)
def test_missing_column(screen, column):
    """A column that is not there is named; without its file names DAPI is no channel, so its plate column is not one either."""
    edit(screen, "screen_image.csv", lambda table: table.drop(columns=column))
    named = "Image_Metadata_Plate" if column == "Image_FileName_DAPI" else column
    with pytest.raises(DataError, match=f"screen_image.csv must have a column .*{named}"):
        read(screen)


@pytest.mark.parametrize("column", ["compound", "concentration", "moa"])
def test_missing_moa_column(screen, column):
    edit(screen, "screen_moa.csv", lambda table: table.drop(columns=column))
    with pytest.raises(DataError, match=f"screen_moa.csv must have a column {column}"):
        read(screen)


def test_duplicate_field(screen):
    edit(screen, "screen_image.csv", lambda table: pd.concat([table, table.iloc[[5]]]))
    with pytest.raises(DataError, match=r"A field must stand once .* Line 26 has .* Week1_20000/B04/2"):
        read(screen)


def test_duplicate_image(screen):
    edit(screen, "screen_image.csv", put("Image_FileName_Actin", 4, "b02_s1_W1week1_20000.TIF"))
    with pytest.raises(DataError, match=r"An image must belong to one field .* again in line 6"):
        read(screen)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("Image_Metadata_Concentration", "high", r"Image_Metadata_Concentration in .* must be a number. Line 4 has 'high'"),
        ("Image_Metadata_Compound", " ", "must have a Image_Metadata_Compound. Line 4 has no value"),
        ("Replicate", "two", "Replicate in .* must be a number"),
        ("Image_FileName_DAPI", "image.tif", r"must have a column Image_Metadata_Site, or file names with `_s<number>_` .* Line 4 has"),
    ],
)
def test_bad_cell(screen, column, value, sentence):
    edit(screen, "screen_image.csv", put(column, 2, value))
    with pytest.raises(DataError, match=sentence):
        read(screen)


def test_no_moa_fits(screen):
    """Concentrations in another unit, say: nothing would be labelled, so it is an error."""
    edit(screen, "screen_moa.csv", lambda table: table.assign(concentration=[float(value) * 1000 for value in table["concentration"]]))
    with pytest.raises(DataError, match=r"Some treatment of .*screen_moa.csv must occur in the images. .* check names"):
        read(screen)


def test_unknown_moa(screen):
    """A treatment without a row, and one whose MoA is said to be unknown, have no label; a row without a field is noted."""
    edit(screen, "screen_moa.csv", lambda table: table.assign(moa=["DMSO", "unknown", "moa 1"]))
    index = read(screen)
    assert index.table.loc[index.table["Metadata_Compound"] == "compound 0a", "Metadata_MoA"].isna().all()
    assert "8 of 24 fields have no MoA: they are not used where the MoA is learnt." in index.notes
    edit(screen, "screen_moa.csv", put("compound", 1, "misspelt"))
    assert any("1 treatments that no field has: misspelt at 0.3" in note for note in read(screen).notes)
    edit(screen, "screen_moa.csv", put("moa", 1, ""))
    with pytest.raises(DataError, match="must have a moa. Line 3 has no value"):
        read(screen)


def test_two_moas_for_a_treatment(screen):
    edit(screen, "screen_moa.csv", lambda table: pd.concat([table, table.iloc[[1]].assign(moa="other", concentration="0.30")]))
    with pytest.raises(DataError, match=r"two for compound 0a at 0.3: 'moa 0' and 'other'"):
        read(screen)


def test_lists_that_cannot_be_read(screen):
    good = (screen / "screen_image.csv").read_bytes()
    (screen / "old_image.csv").write_bytes(good)
    with pytest.raises(DataError, match=r"has 2, old_image.csv, screen_image.csv"):
        read(screen)
    (screen / "old_image.csv").unlink()
    (screen / "screen_image.csv").unlink()
    with pytest.raises(DataError, match=r"must hold the list of images, \*_image.csv"):
        read(screen)
    (screen / "screen_image.csv.gz").write_bytes(b"\x1f\x8b\x08\x00 not really")
    with pytest.raises(DataError, match=r"screen_image.csv.gz cannot be read"):
        read(screen)
    (screen / "screen_image.csv.gz").unlink()
    (screen / "screen_image.csv").write_bytes(good.splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="must have at least one row"):
        read(screen)


def test_root(tmp_path):
    with pytest.raises(ConfigError, match="plates.root must be given"):
        read_index(PlatesConfig())
    with pytest.raises(DataError, match="plates.root must be a folder"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("query", "error", "sentence"),
    [
        (
            "Metadata_Compuond == 'DMSO'",
            ConfigError,
            "plates.query must be a pandas expression over .*Metadata_Compound.*Metadata_Compuond",
        ),
        ("Metadata_Site ==", ConfigError, "plates.query must be a pandas expression"),
        ("Metadata_Site + 1", ConfigError, "plates.query must be true or false"),
        ("Metadata_Compound == 'dmso'", DataError, "keeps none of 24"),
    ],
)
def test_bad_query(screen, query, error, sentence):
    with pytest.raises(error, match=sentence):
        read(screen, query=query)


def test_query(screen):
    index = read(screen, query="Metadata_Site == 1 and Metadata_MoA.str.startswith('moa')")
    assert len(index.table) == 8 and set(index.table["Metadata_MoA"]) == {"moa 0", "moa 1"} and index.table.index[-1] == 7
    assert "plates.query keeps 8 of 24 fields." in index.notes


def test_assumptions_are_noted(screen):
    edit(screen, "screen_image.csv", lambda table: table.drop(columns="Replicate").replace("compound 0a", "Unknown"))
    notes = " ".join(read_index(PlatesConfig(root=str(screen), control="vehicle")).notes)
    assert "no column Replicate: 1 is assumed for all 24 fields" in notes and "8 fields have a compound called UNKNOWN" in notes
    assert "No field has the control compound 'vehicle'" in notes
    edit(
        screen,
        "screen_image.csv",
        lambda table: table[(table["Image_Metadata_Plate_DAPI"] == "Week1_20000") | (table["Image_Metadata_Compound"] != "DMSO")],
    )
    assert "1 plates have no wells of the control compound 'DMSO'" in " ".join(read(screen).notes)


def test_smiles(screen):
    write_csv(screen, "screen_compound.csv", pd.DataFrame({"compound": ["compound 0a"], "smiles": ["CCO"]}))
    index = read(screen)
    assert (index.table["Metadata_SMILES"] == "CCO").sum() == 8 and index.table["Metadata_SMILES"].isna().sum() == 16


def test_other_channels_and_site_column(tmp_path):
    """Any channels, sites from a column, plate names that look like numbers."""
    write_screen(tmp_path, channels=("DNA",), images=False)

    def change(table: pd.DataFrame) -> pd.DataFrame:
        wells = [f"A{row // 2:02d}" for row in range(len(table))]
        return table.assign(
            Image_Metadata_Site=table["Image_FileName_DNA"].str[5], Image_Metadata_Plate_DNA="007", Image_Metadata_Well_DNA=wells
        )

    edit(tmp_path, "screen_image.csv", change)
    index = read(tmp_path, files=False)
    assert index.channels == ("DNA",) and set(index.table["Metadata_Plate"]) == {"007"}
    assert list(index.table["Metadata_Site"][:4]) == [1, 2, 1, 2]
