"""The table of embeddings: its columns, its wells, what stands in its metadata, and the folder where it is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError, DataError
from hcsdl.profiles.tables import read_profiles
from hcsdl.training.embeddings import WorkFolder, field_table, read_about, well_table, write_table

pytestmark = pytest.mark.xeon_only
CLASSES = ["Actin disruptors", "DMSO"]


def fields() -> pd.DataFrame:
    """Return an index of three wells with 2, 1 and 3 fields."""
    wells = ["B02", "B02", "C03", "D04", "D04", "D04"]
    return pd.DataFrame(
        {
            "Metadata_Plate": "Week1_1",
            "Metadata_Well": wells,
            "Metadata_Site": [1, 2, 1, 1, 2, 4],
            "Metadata_Batch": "Week1",
            "Metadata_Compound": ["a", "a", "DMSO", "b", "b", "b"],
            "Metadata_Concentration": [1.0, 1, 0, 3, 3, 3],
            "Metadata_MoA": ["Actin disruptors", "Actin disruptors", "DMSO", None, None, None],
            "Metadata_Treatment": ["a 1", "a 1", "DMSO", "b 3", "b 3", "b 3"],
            "Metadata_Split": ["val", "train", "val", None, None, None],
            "Path_DAPI": "x.tif",
            "QC_Focus_DAPI": 1.0,
            "Intensity_Mean_DAPI": [1.0, 2, 3, 4, 5, 6],
            "Count_Nuclei": [10.0, 20, 30, 40, 50, 60],
        },
        index=range(7, 13),
    )


def outputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    """A table that a disk or a copy has changed is no table: its numbers would be scored as if they were the network's."""
    values, logits = outputs()
    write_table(field_table(fields(), values, logits, CLASSES), {}, tmp_path / "table.parquet")
    read_profiles(tmp_path / "table.parquet")
    content = bytearray((tmp_path / "table.parquet").read_bytes())
    at = content.index(values[:, 1].tobytes()[:4])
    content[at] ^= 0x10
    (tmp_path / "table.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"table.parquet cannot be read"):
        read_profiles(tmp_path / "table.parquet")


def test_fields() -> None:
    embedding, logits = outputs()
    table = field_table(fields(), embedding, logits, CLASSES)
    assert list(table) == [
        *[c for c in fields() if c.startswith("Metadata_")],
        *[
            "Embedding_0000",
            "Embedding_0001",
            "Embedding_0002",
            "Prob_Actin disruptors",
            "Prob_DMSO",
            "Intensity_Mean_DAPI",
            "Count_Nuclei",
        ],
    ]
    assert np.array_equal(table.filter(like="Embedding_").to_numpy(), embedding) and table["Embedding_0000"].dtype == np.float32
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(table.filter(like="Prob_"), expected, rtol=1e-6)
    assert table["Metadata_Site"].tolist() == [1, 2, 1, 1, 2, 4] and table["Count_Nuclei"].tolist() == [10, 20, 30, 40, 50, 60]
    assert not any(c.startswith("Prob_") for c in field_table(fields(), embedding, logits, []))


def test_wells_are_the_means_of_their_fields() -> None:
    embedding, logits = outputs()
    table = well_table(fields(), embedding, logits, CLASSES)
    assert table["Metadata_Well"].tolist() == ["B02", "C03", "D04"] and "Metadata_Site" not in table
    assert table["Metadata_Site_Count"].tolist() == [2, 1, 3]
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    np.testing.assert_allclose(table.filter(like="Embedding_"), [embedding[p].mean(axis=0) for p in parts], rtol=1e-6)
    joint = np.exp([logits[p].mean(axis=0) for p in parts])
    np.testing.assert_allclose(table.filter(like="Prob_"), joint / joint.sum(axis=1, keepdims=True), rtol=1e-6)
    assert table["Count_Nuclei"].tolist() == [15, 30, 50] and table["Intensity_Mean_DAPI"].tolist() == [1.5, 3, 5]
    assert table["Metadata_Split"].fillna("").tolist() == ["train", "val", ""], "a well with a field that was trained on was trained on"


def test_score_reads_wells_of_either_table_alike(tmp_path: Path) -> None:
    embedding, logits = outputs()
    for name, make in (("fields", field_table), ("wells", well_table)):
        write_table(make(fields(), embedding, logits, CLASSES), {}, tmp_path / f"{name}.parquet")
    one, other = (read_profiles(tmp_path / f"{name}.parquet") for name in ("fields", "wells"))
    np.testing.assert_allclose(one.wells.values, other.wells.values, rtol=1e-6)
    np.testing.assert_allclose(one.simple.values, other.simple.values, rtol=1e-6)
    assert one.simple.names == ("Intensity_Mean_DAPI", "Count_Nuclei") and list(one.probabilities) == CLASSES
    assert not [note for note in one.notes if "neither" in note]


def test_what_a_table_tells_about_itself(tmp_path: Path) -> None:
    table, path = field_table(fields(), *outputs(), CLASSES), tmp_path / "a.parquet"
    write_table(table, {"weights": "trained", "trained": [{"target": "Metadata_MoA", "compounds": ["α"]}]}, path)
    assert read_about(path) == {"schema_version": 1, "weights": "trained", "trained": [{"target": "Metadata_MoA", "compounds": ["α"]}]}
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)
    first = path.read_bytes()
    write_table(table, {"weights": "trained", "trained": [{"target": "Metadata_MoA", "compounds": ["α"]}]}, path)
    assert path.read_bytes() == first
    table.to_parquet(tmp_path / "other.parquet")
    table.to_csv(tmp_path / "a.csv")
    assert [read_about(tmp_path / name) for name in ("other.parquet", "a.csv", "none.parquet")] == [None] * 3
    write_table(table, {"schema_version": 2}, path)
    with pytest.raises(DataError, match="must have schema version 1"):
        read_about(path)


def test_parts_come_back_and_a_folder_taken_over_is_not_written_to(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "a.work")
    folder.acquire()
    assert folder.last_saved() == 0 and not (folder.path / "tensorboard").exists()
    for number in range(3):
        folder.save(rows=np.array([number]), embedding=np.full((1, 2), number, np.float32))
    assert folder.last_saved() == 3
    assert [part["rows"].tolist() for part in folder.load()] == [[0], [1], [2]] and folder.load()[1]["embedding"].dtype == np.float32
    with pytest.raises(ConfigError, match="one run at a time may write a folder of an embedding"):
        WorkFolder(folder.path).acquire()
    late = WorkFolder(folder.path)
    late.join()
    folder.renew()
    with pytest.raises(ConfigError, match="only the newest attempt may save"):
        late.save(rows=np.array([9]))
    folder.release()
    folder.remove()
    assert not folder.path.exists()
