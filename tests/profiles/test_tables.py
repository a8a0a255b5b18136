"""Reading: other programs' tables and ours become the same profiles, or an error that says what to do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError, DataError
from hcsdl.profiles.tables import is_scored, read_profiles
from tests.profiles.screens import draw_wells

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def table() -> pd.DataFrame:
    return draw_wells(sites=2, batches=2, plates_per_batch=1, moas=2, compounds_per_moa=2, features=3)


def write(folder: Path, table: pd.DataFrame, name: str = "table.parquet") -> Path:
    path = folder / name
    table.to_parquet(path) if name.endswith(".parquet") else table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_csv_and_parquet_are_one_table(tmp_path, table, name):
    ours, csv = read_profiles(write(tmp_path, table)), read_profiles(write(tmp_path, table, name))
    pd.testing.assert_frame_equal(ours.wells.meta, csv.wells.meta, check_dtype=False)
    np.testing.assert_allclose(ours.wells.values, csv.wells.values, rtol=1e-12)
    assert ours.counts == csv.counts == {"rows_in": 40, "rows_selected": 40, "features_in": 3, "rows_used": 40, "wells": 20}


def test_a_well_is_the_mean_of_its_fields_in_any_order(tmp_path, table):
    table = table.drop(index=[3, 8])  # wells of one field among those of two
    wells = read_profiles(write(tmp_path, table)).wells
    expected = table.groupby(["Metadata_Plate", "Metadata_Well"])[list(wells.names)].mean()
    np.testing.assert_allclose(wells.values, expected.to_numpy(), rtol=1e-12)
    assert list(zip(wells.meta["Metadata_Plate"], wells.meta["Metadata_Well"], strict=True)) == list(expected.index)
    shuffled = read_profiles(write(tmp_path, table.sample(frac=1, random_state=1))).wells
    assert shuffled.meta.equals(wells.meta) and np.array_equal(shuffled.values, wells.values)


def test_treatments_labels_and_single_precision(tmp_path, table):
    narrow = table.astype(dict.fromkeys(table.filter(like="Embedding_"), "float32"))
    narrow.loc[narrow["Metadata_Compound"] == "compound 1a", "Metadata_MoA"] = "Unknown"
    read = read_profiles(write(tmp_path, narrow))
    assert read.wells.values.dtype == np.float32
    assert set(read.wells.meta["Metadata_Treatment"]) >= {"DMSO", "compound 0a 0.1", "compound 0a 1"}
    scored = read.wells.meta[is_scored(read.wells.meta, "DMSO")]
    assert set(scored["Metadata_Compound"]) == {"compound 0a", "compound 0b", "compound 1b"}
    assert "4 of 40 rows have no mechanism of action and are not scored." in read.notes


def test_cellprofiler_features_are_found_and_the_rest_counted(tmp_path, table):
    other = table.rename(columns={"Embedding_0000": "Cells_AreaShape_Area", "Embedding_0001": "Nuclei_Texture", "Embedding_0002": "Score"})
    other = other.assign(ImageNumber=1, Image_FileName_DAPI="a.tif", Prob_x=0.5, Count_Nuclei=7)
    read = read_profiles(write(tmp_path, other, "cp.csv"))
    assert read.wells.names == ("Cells_AreaShape_Area", "Nuclei_Texture")
    assert read.simple.names == ("Count_Nuclei",) and list(read.probabilities) == ["x"]
    assert "3 columns are neither metadata nor features and are not used (Score, ImageNumber, Image_FileName_DAPI)." in read.notes
    assert read_profiles(write(tmp_path, other), features=["Score", "Count_"]).wells.names == ("Score", "Count_Nuclei")
    plain = read_profiles(write(tmp_path, other.drop(columns=["Cells_AreaShape_Area", "Nuclei_Texture"])))
    assert plain.wells.names == ("Score",)


def test_columns_of_other_names(tmp_path, table):
    other = table.rename(columns={"Metadata_Plate": "Image_Metadata_Plate", "Metadata_Compound": "drug", "Metadata_Well": "metadata_well"})
    read = read_profiles(write(tmp_path, other, "other.csv"), columns=["Metadata_Compound:drug"])
    pd.testing.assert_frame_equal(read.wells.meta[sorted(read.wells.meta)], read_profiles(write(tmp_path, table)).wells.meta[sorted(read.wells.meta)],
                                  check_dtype=False)  # fmt: skip
    assert "Image_Metadata_Plate is taken as Metadata_Plate." in read.notes
    with pytest.raises(DataError, match=r"must have a column Metadata_Compound.*score.columns=\[Metadata_Compound:"):
        read_profiles(write(tmp_path, other, "other.csv"))


def test_query_and_empty_rows_are_counted(tmp_path, table):
    table.loc[[0, 1, 2], table.filter(like="Embedding_").columns] = np.nan
    read = read_profiles(write(tmp_path, table), query="Metadata_Batch == 'Week0'")
    assert read.counts == {"rows_in": 40, "rows_selected": 20, "features_in": 3, "rows_used": 17, "wells": 9}
    assert any(note.startswith("3 rows have no feature at all and are left out (Week0_0/B02") for note in read.notes)


@pytest.mark.parametrize("value", [np.inf, -1e300])
def test_infinite_and_immense_are_missing(tmp_path, table, value):
    table.loc[0, "Embedding_0001"] = value
    assert np.isnan(read_profiles(write(tmp_path, table)).wells.values).any(axis=0).tolist() == [False, True, False]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_may_be_parted_by_semicolons_and_tabs(tmp_path, table, separator):
    """As spreadsheets write them, with a byte order mark and commas within names; a decimal comma is an error, for it could be anything."""
    table["Metadata_Compound"] = table["Metadata_Compound"].replace({"compound 0a": "1,2-a, b"})
    plain = read_profiles(write(tmp_path, table))
    table.to_csv(tmp_path / "other.csv", sep=separator, index=False, encoding="utf-8-sig")
    read = read_profiles(tmp_path / "other.csv")
    pd.testing.assert_frame_equal(read.wells.meta, plain.wells.meta, check_dtype=False)
    assert np.allclose(read.wells.values, plain.wells.values) and "1,2-a, b" in set(read.wells.meta["Metadata_Compound"])
    table.to_csv(tmp_path / "comma.csv", sep=separator, decimal=",", index=False)
    with pytest.raises(DataError, match=r"Features must be numbers. Embedding_0000 in .* holds '-?\d+,\d+'"):
        read_profiles(tmp_path / "comma.csv")


def test_other_encodings_are_named(tmp_path, table):
    table.assign(Metadata_Compound="Amanitin é").to_csv(tmp_path / "latin.csv", index=False, encoding="latin-1")
    with pytest.raises(DataError, match=r"in UTF-8, or parquet. .*latin.csv is in another encoding"):
        read_profiles(tmp_path / "latin.csv")


@pytest.mark.filterwarnings("error")
def test_concentrations_may_all_be_missing(tmp_path, table):
    """A column of nothing makes a compound a treatment, without a warning of pandas'."""
    read = read_profiles(write(tmp_path, table.assign(Metadata_Concentration=np.nan), "empty.parquet"))
    assert set(read.wells.meta["Metadata_Treatment"]) == set(table["Metadata_Compound"])


def put(column: str, value: object, row: int = 7) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return a change that sets one cell."""
    return lambda table: table.assign(**{column: [value if at == row else old for at, old in enumerate(table[column])]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.drop(columns="Metadata_Well"), "must have a column Metadata_Well"),
        (lambda t: t.drop(columns="Metadata_Site"), "only one of its well. 20 are not, Week0_0/B02 the first; a table per field needs Metadata_Site"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "only one of its field. 1 are not, Week0_0/B03/2"),
        (put("Metadata_Compound", "another"), "A well must have one Metadata_Treatment"),
        (put("Metadata_MoA", "another", 13), "A well must have one Metadata_MoA"),
        (lambda t: t.assign(Metadata_MoA=[f"{m}{w}" for m, w in zip(t.Metadata_MoA, t.Metadata_Plate, strict=True)]), "A treatment must have one"),
        (put("Metadata_Plate", None), "must have a Metadata_Plate. 1 have none"),
        (put("Metadata_Batch", None), "must have a Metadata_Batch, or none"),
        (put("Metadata_Concentration", "high"), "Metadata_Concentration in .* must be a number, 0 or more, without a unit. A row has 'high'"),
        (put("Metadata_Concentration", "3 uM"), "A row has '3 uM'"),
        (put("Metadata_Concentration", -1.5), "A row has '-1.5'"),
        (put("Metadata_Concentration", "inf"), "A row has 'inf'"),
        (put("Embedding_0001", "1,5"), "Features must be numbers. Embedding_0001 in .* holds '1,5'"),
        (lambda t: t.drop(columns=list(t.filter(like="Embedding_"))), "must have feature columns"),
        (lambda t: t.assign(**dict.fromkeys(t.filter(like="Embedding_"), np.nan)), "must have a row with features"),
        (lambda t: t.iloc[:0], "must have rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_told(tmp_path, table, change, sentence):
    with pytest.raises(DataError, match=sentence):
        read_profiles(write(tmp_path, change(table.astype({"Metadata_Concentration": object})), "bad.csv"))


def test_without_a_control_or_with_nothing_else_is_noted(tmp_path, table):
    notes = [read_profiles(write(tmp_path, table), control=name).notes for name in ("DMSO", "mock")]
    assert not any("score.control" in note for note in notes[0]) and any("No row has the control" in note for note in notes[1])
    only = read_profiles(write(tmp_path, table[table["Metadata_Compound"] == "DMSO"])).notes
    assert any("there is no treatment to score" in note for note in only)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (bytes(range(256)) * 9, "cannot be read: its first line has no text"),
        (b"Metadata_Plate,Metadata_Well,Metadata_Compound,a,a\nP,B02,DMSO,1,2\n", "cannot be read: two columns are named a"),
    ],
)
def test_what_is_no_table_is_told(tmp_path, content, sentence):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_profiles(tmp_path / "bad.csv")


def test_parquet_without_a_column_is_told(tmp_path, table):
    with pytest.raises(DataError, match="must have a column Metadata_Plate. It has no columns"):
        read_profiles(write(tmp_path, table[[]]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"columns": ["Metadata_Plate:nowhere"]}, "has no 'nowhere'; it has Metadata_Plate"),
        ({"columns": ["Metadata_Colour:x"]}, "must be pairs such as Metadata_Plate:Its_Name"),
        ({"features": ["Nuclei_"]}, r"has no column Nuclei_\*"),
        ({"query": "Metadata_Plat == 1"}, "score.query must be a pandas expression"),
        ({"query": "Metadata_Site + 1"}, "must be true or false"),
    ],
)
def test_settings_that_fit_nothing(tmp_path, table, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_profiles(write(tmp_path, table), **settings)


def test_two_columns_of_one_meaning(tmp_path, table):
    doubled = table.rename(columns={"Metadata_Well": "metadata_well"}).assign(Image_Metadata_Well="A01")
    with pytest.raises(ConfigError, match=r"must be Metadata_Well. .* choose with score.columns=\[Metadata_Well:metadata_well\]"):
        read_profiles(write(tmp_path, doubled))


def test_files_that_are_none(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for name, sentence in (("broken.parquet", "cannot be read"), ("nowhere.csv", "is no file")):
        with pytest.raises(DataError, match=sentence):
            read_profiles(tmp_path / name)
