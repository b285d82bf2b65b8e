"""Reads a table that bsap wrote with tools that know nothing of bsap: Polars, DuckDB, PyArrow.

    read.py BSAP CATALOGUE

Compares what they see with what `bsap verify` and `bsap status` say.
"""

import json
import os
import pathlib
import subprocess
import sys
import unittest

import duckdb
import polars as pl
from deltalake import DeltaTable

BSAP, CATALOGUE = sys.argv[1], pathlib.Path(sys.argv[2])
VIEW = (pathlib.Path(__file__).parent / "current.sql").read_text()


def bsap(*arguments):
    env = dict(os.environ, BSAP_TABLE__URL=str(CATALOGUE), BSAP_KAFKA__BROKERS="127.0.0.1:1")
    env["BSAP_KAFKA__REQUEST_TIMEOUT_MS"] = "200"
    done = subprocess.run([BSAP, *arguments, "--json"], env=env, capture_output=True, text=True)
    # 9: no broker answers.
    assert done.returncode == (9 if arguments == ("status",) else 0), done.stderr
    return json.loads(done.stdout)


class Readers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.verified, cls.status = bsap("verify"), bsap("status")
        (cls.images,) = CATALOGUE.glob("generations/*/images")
        cls.files = DeltaTable(str(cls.images)).file_uris()

    def test_polars_reads_every_row(self):
        table = pl.read_delta(str(self.images))
        self.assertEqual(table.height, self.verified["rows"])
        newest = table.sort("sequence", "deleted", "embedded_at").group_by("image_id").last()
        live = newest.filter(~pl.col("deleted"))
        self.assertEqual(live.height, self.verified["images"])
        dimension = self.status["catalogue"]["live"]["dimension"]
        lengths = live.select(pl.col("embedding").list.eval(pl.element() ** 2).list.sum().sqrt())
        self.assertTrue(live["embedding"].list.len().eq(dimension).all())
        self.assertLess((lengths.to_series() - 1).abs().max(), 2e-3)

    def test_duckdb_reads_the_newest_version_of_every_image(self):
        with duckdb.connect() as db:
            db.execute("CREATE VIEW images AS SELECT * FROM read_parquet(" + repr(self.files) + ")")
            db.execute(VIEW)
            (count,) = db.execute("SELECT count(*) FROM current_images").fetchall()[0]
            self.assertEqual(count, self.verified["images"])
            key = self.status["catalogue"]["prompt_sets"][0]["key"]
            query = """
                SELECT count(*) FROM current_images
                WHERE statistics[?].n > 0
                  AND statistics[?].mean BETWEEN statistics[?].min AND statistics[?].max
                  AND attributes['title'] <> ''
            """
            (sound,) = db.execute(query, [key] * 4).fetchall()[0]
            self.assertEqual(sound, count)

    def test_pyarrow_reads_every_row(self):
        table = DeltaTable(str(self.images)).to_pyarrow_table()
        self.assertEqual(table.num_rows, self.verified["rows"])
        self.assertEqual(len(set(table["image_id"].to_pylist())), self.verified["images"])

    def test_positions_are_delta_transactions(self):
        versions = [
            json.loads(line)["txn"]
            for log in sorted(self.images.glob("_delta_log/*.json"))
            for line in log.read_text().splitlines()
            if line.startswith('{"txn"')
        ]
        self.assertTrue(versions)
        for partition in {one["appId"] for one in versions if one["appId"].startswith("bsap:images")}:
            offsets = [one["version"] for one in versions if one["appId"] == partition]
            self.assertEqual(offsets, sorted(offsets))

    def test_the_checksum_of_a_file_is_in_its_name(self):
        for uri in self.files:
            path = pathlib.Path(uri.removeprefix("file://"))
            found = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout
            self.assertTrue(path.stem.endswith(found.split()[0]), path)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
