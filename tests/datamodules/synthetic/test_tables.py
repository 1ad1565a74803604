import csv
import gzip

from datamodules.synthetic.tables import write_table


def test_rows_and_mappings_give_the_same_bytes(tmp_path):
    header = ("name", "value, quoted", "missing")
    write_table(tmp_path / "new/rows.csv", header, [("a", 1.5, None), ("b, c", "", None)])
    mappings = [{"name": "a", "value, quoted": 1.5}, {"name": "b, c", "value, quoted": "", "other": 3}]
    write_table(tmp_path / "mappings.csv", header, mappings)
    write_table(tmp_path / "rows.csv.gz", header, mappings)
    content = (tmp_path / "new/rows.csv").read_bytes()
    assert (
        content == (tmp_path / "mappings.csv").read_bytes() == gzip.decompress((tmp_path / "rows.csv.gz").read_bytes())
    )
    rows = list(csv.reader(content.decode().splitlines()))
    assert rows == [list(header), ["a", "1.5", ""], ["b, c", "", ""]]
