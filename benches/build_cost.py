#!/usr/bin/env python3
"""What the first build costs: crates, CPU seconds and the size of the binary, compared with the
figures in benches/build-cost.toml.

    just build-cost              builds in a folder of its own, with sources downloaded before
    just build-cost --check      only counts crates, without a build; fails if there are more

CPU seconds are user and system time of a cold `cargo build --release --locked`; they depend on the
machine, and on what else its cores do. Crates are those of `cargo tree` for x86-64 Linux.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDED = ROOT / "benches/build-cost.toml"
TARGET = "x86_64-unknown-linux-gnu"
LISTED_CRATES = 30


def count_crates():
    """Number of crates that a release build compiles: of each version one, with what builds need."""
    command = ["cargo", "tree", "--locked", "--edges", "normal,build", "--target", TARGET, "--prefix", "none", "--format", "{p}"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return len({tuple(line.split()[:2]) for line in lines if line})


def build(folder):
    """Builds into `folder`; CPU seconds, wall seconds, and bytes of the binary."""
    subprocess.run(["cargo", "fetch", "--locked", "--target", TARGET], cwd=ROOT, check=True)
    env = dict(os.environ, CARGO_TARGET_DIR=folder)
    before, started = cpu_seconds(), time.monotonic()
    subprocess.run(["cargo", "build", "--release", "--locked", "--timings"], cwd=ROOT, env=env, check=True)
    cpu, wall = cpu_seconds() - before, time.monotonic() - started
    size = (pathlib.Path(folder) / "release/bsap").stat().st_size
    return cpu, wall, size


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_by_crate(report):
    """Seconds that each crate took, build script included, from cargo's report, the most expensive first."""
    units = re.search(r"const UNIT_DATA = (\[.*?\]);", report.read_text(), re.DOTALL)
    if not units:
        sys.exit(f"{report.name} of this version of cargo has no UNIT_DATA: seconds by crate cannot be read")
    seconds = {}
    for unit in json.loads(units.group(1)):
        seconds[unit["name"]] = seconds.get(unit["name"], 0) + unit["duration"]
    return sorted(seconds.items(), key=lambda item: -item[1])


def main():
    parser = argparse.ArgumentParser(prog="just build-cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only count crates")
    arguments = parser.parse_args()
    recorded = tomllib.loads(RECORDED.read_text())
    crates = count_crates()
    print(f"crates       {crates:6}  recorded {recorded['crates']}")
    if crates > recorded["crates"]:
        sys.exit(
            f"a release build compiles {crates - recorded['crates']} crates more than {RECORDED.relative_to(ROOT)} says: "
            "do without them, or write the new number there and say in the commit what they are for"
        )
    if arguments.check:
        return
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall, size = build(folder)
        print(f"CPU seconds  {cpu:6.0f}  recorded {recorded['cpu_seconds']}: ratio {cpu / recorded['cpu_seconds']:.2f}")
        print(f"wall seconds {wall:6.0f}  recorded {recorded['wall_seconds']}, on {os.cpu_count()} cores")
        print(f"binary, MB   {size / 1e6:6.1f}  recorded {recorded['binary_mb']}")
        by_crate = seconds_by_crate(pathlib.Path(folder) / "cargo-timings/cargo-timing.html")
    print(f"\nthe {LISTED_CRATES} most expensive crates, in seconds from start to end on a core that others may share:")
    for name, seconds in by_crate[:LISTED_CRATES]:
        print(f"{seconds:7.1f}  {name}")


if __name__ == "__main__":
    main()
