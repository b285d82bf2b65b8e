"""The program under test, and its measures by the names that ir-measures has for them."""

import os
import pathlib
import subprocess
import sys

from ir_measures import AP, RR, P, R, Success, nDCG

BSAP, DEMO = sys.argv[1], pathlib.Path(sys.argv[2])
MEASURES = {
    Success @ 1: "hit@1",
    Success @ 5: "hit@5",
    Success @ 10: "hit@10",
    R @ 10: "recall@10",
    P @ 10: "precision@10",
    nDCG @ 10: "nDCG@10",
    AP: "MAP",
    RR: "MRR",
}


def run_bsap(*arguments):
    """Runs bsap on the demo's catalogue; what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BSAP_")}
    env["BSAP_TABLE__URL"] = str(DEMO / "catalogue")
    env["BSAP_MODEL__CHECKPOINT"] = str(DEMO / "demo-clip")
    done = subprocess.run([BSAP, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def bsap(*arguments):
    """The standard output of `run_bsap`."""
    return run_bsap(*arguments).stdout
