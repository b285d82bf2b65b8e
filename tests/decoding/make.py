#!/usr/bin/env python3
"""Draws one picture in every flavour that files come in, and writes the files with the pixels that Pillow sees in
them. `cargo test --test decoding` compares the decoders with them.

    tests/decoding/make.py                     tests/fixtures/decoding/cases.jsonl.gz, of 64×48 pixels
    tests/decoding/make.py --size 400x300 FILE the long form: larger, for BSAP_DECODING_CASES=FILE

Needs Pillow with AVIF, pillow-heif, numpy, tifffile and imagecodecs (tests/decoding/requirements.txt), and from Debian cjpeg and
jpegtran (libjpeg-turbo-progs) and tiffcp (libtiff-tools).
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import flavours_avif
import flavours_jpeg
import flavours_phone
import flavours_tiff
import flavours_web
from common import Cases

FIXTURE = pathlib.Path(__file__).resolve().parent.parent / "fixtures/decoding/cases.jsonl.gz"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=FIXTURE, type=pathlib.Path)
    parser.add_argument("--size", default="64x48", help="width and height of the picture, at least 64x48")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    cases = Cases((width, height))
    for flavours in (flavours_jpeg, flavours_web, flavours_tiff, flavours_phone, flavours_avif):
        flavours.add(cases)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    cases.write(arguments.file)
    print(f"{len(cases.all)} files, {arguments.file.stat().st_size / 1e6:.2f} MB in {arguments.file}")


if __name__ == "__main__":
    main()
