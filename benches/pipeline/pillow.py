#!/usr/bin/env python3
"""How long Pillow takes to decode each file to RGB, upright, the best of 21 times: for comparison with
`just bench --bench pipeline -- decode FILES`. Needs Pillow, and pillow-heif for HEIC.

    benches/pipeline/pillow.py FILES
"""

import io
import sys
import time

from PIL import Image, ImageOps

ROUNDS = 21

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass

for name in sys.argv[1:]:
    with open(name, "rb") as file:
        data = file.read()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").load()
        best = min(best, time.perf_counter() - started)
    print(f"{1e3 * best:9.2f} ms {name}")
