"""Flavours of TIFF: compressions × colours × strips, tiles and planes."""

import io
import os
import struct
import subprocess
import tempfile

import numpy as np
import tifffile
from common import EXACT, NEAR, on_white, pillow, stored_turned, xmp
from PIL import Image


def tiff(array, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def tiffcp(data, *options):
    """A file as libtiff's tiffcp writes it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "a.tif"), os.path.join(folder, "b.tif")
        with open(source, "wb") as file:
            file.write(data)
        subprocess.run(["tiffcp", *options, source, target], check=True, capture_output=True)
        with open(target, "rb") as file:
            return file.read()


def add(cases):
    image = cases.picture
    rgb = np.asarray(image)
    grey = np.asarray(image.convert("L"))
    planes = np.moveaxis(rgb, -1, 0)
    as_grey = np.dstack([grey] * 3)

    def exact(name, data, pixels=image, must=True):
        cases.add(f"{name}.tif", data, EXACT, pixels, must=must)

    for compression in (None, "lzw", "zlib", "packbits"):
        name = compression or "none"
        exact(f"rgb-{name}", tiff(rgb, photometric="rgb", compression=compression))
        exact(f"rgb-{name}-strips", tiff(rgb, photometric="rgb", compression=compression, rowsperstrip=7))
        exact(f"rgb-{name}-tiles", tiff(rgb, photometric="rgb", compression=compression, tile=(32, 16)))
        exact(f"rgb-{name}-planes", tiff(planes, photometric="rgb", planarconfig="separate", compression=compression))
        exact(
            f"rgb-{name}-planes-tiles",
            tiff(planes, photometric="rgb", planarconfig="separate", compression=compression, tile=(32, 16)),
        )
        exact(f"rgb-{name}-big-endian", tiff(rgb, photometric="rgb", compression=compression, byteorder=">"))
        exact(f"grey-{name}", tiff(grey, photometric="minisblack", compression=compression), as_grey)
    for compression in ("lzw", "zlib"):
        exact(f"rgb-{compression}-predictor", tiff(rgb, photometric="rgb", compression=compression, predictor=True))
        exact(
            f"rgb-{compression}-predictor-planes-tiles",
            tiff(planes, photometric="rgb", planarconfig="separate", compression=compression, predictor=True, tile=(16, 16)),
        )
        for order in "<>":
            data = tiff(rgb.astype(np.uint16) * 257, photometric="rgb", compression=compression, predictor=True, byteorder=order)
            exact(f"rgb-16-{compression}-predictor-{'big' if order == '>' else 'little'}-endian", data)
    exact("big-tiff", tiff(rgb, photometric="rgb", bigtiff=True))
    exact("big-tiff-tiles", tiff(rgb, photometric="rgb", bigtiff=True, tile=(32, 32), compression="lzw", byteorder=">"))
    exact("white-is-zero", tiff(255 - grey, photometric="miniswhite"), as_grey)
    exact("rgb-16", tiff(rgb.astype(np.uint16) * 257, photometric="rgb"))
    exact("rgb-16-planes-tiles", tiff(planes.astype(np.uint16) * 257, photometric="rgb", planarconfig="separate", tile=(16, 32)))
    # Pillow clips grey of 16 bits to white.
    exact("grey-16", tiff(grey.astype(np.uint16) * 257, photometric="minisblack"), as_grey)
    add_few_bits(cases, exact)
    add_ink_and_opacity(cases, exact)
    add_jpeg_and_ycbcr(cases)
    for orientation in range(1, 9):
        exact(f"orientation-{orientation}", pillow("TIFF", stored_turned(image, orientation), tiffinfo={274: orientation}))
    exact("xmp-6", tiff(np.asarray(stored_turned(image, 6)), photometric="rgb", extratags=[(700, 1, len(xmp(6)), xmp(6), True)]))
    pages = io.BytesIO()
    with tifffile.TiffWriter(pages) as writer:
        writer.write(rgb, photometric="rgb")
        writer.write(rgb[::-1], photometric="rgb")
    exact("two-pages", pages.getvalue())
    add_refused(cases, rgb, grey)
    for name, data in {
        "lzw": pillow("TIFF", image, compression="tiff_lzw"), "none": tiff(rgb, photometric="rgb"),
        "zlib": tiff(rgb, photometric="rgb", compression="zlib"),
        "jpeg": pillow("TIFF", image, compression="jpeg"), "g4": pillow("TIFF", image.convert("1"), compression="group4"),
        "g3": pillow("TIFF", image.convert("1"), compression="group3"),
    }.items():
        for percent in (20, 50, 80):
            cases.damaged(f"tif-{name}-cut-{percent}.tif", data[: len(data) * percent // 100])
    strips = tiff(rgb, photometric="rgb", rowsperstrip=6)
    cases.damaged("tif-strips-cut-80.tif", strips[: len(strips) * 80 // 100])
    # Pixels before the directory, as tifffile writes them: the cut takes the last rows.
    whole = tiff(rgb, photometric="rgb")
    cases.damaged("tif-none-cut-95.tif", whole[: len(whole) * 95 // 100])


def add_few_bits(cases, exact):
    image = cases.picture
    bilevel = image.convert("1")
    shown = np.asarray(bilevel.convert("RGB"))
    for compression in ("raw", "group3", "group4", "tiff_ccitt", "tiff_lzw", "packbits", "tiff_adobe_deflate"):
        exact(f"1-bit-{compression}", pillow("TIFF", bilevel, compression=compression), shown)
    plain = pillow("TIFF", bilevel)
    for name, options in {
        "g3-1d": ["-c", "g3:1d"], "g3-2d": ["-c", "g3:2d"], "g3-fill": ["-c", "g3:1d:fill"], "g3-2d-fill": ["-c", "g3:2d:fill"],
        "g4-reversed": ["-c", "g4", "-f", "lsb2msb"], "g3-reversed": ["-c", "g3:2d", "-f", "lsb2msb"],
        "none-reversed": ["-c", "none", "-f", "lsb2msb"], "lzw-reversed": ["-c", "lzw", "-f", "lsb2msb"],
        "g4-tiles": ["-c", "g4", "-t", "-w", "32", "-l", "16"], "g4-strips": ["-c", "g4", "-r", "16"],
        "g3-strips": ["-c", "g3:2d", "-r", "7"], "packbits-tiles": ["-c", "packbits", "-t", "-w", "16", "-l", "16"],
    }.items():
        exact(f"1-bit-{name}", tiffcp(plain, *options), shown)
    exact("none-reversed-rgb", tiffcp(pillow("TIFF", image), "-c", "none", "-f", "lsb2msb"))
    for colours in (2, 4, 16, 256):
        indexed = image.quantize(colours)
        shown = np.asarray(indexed.convert("RGB"))
        bits = colours.bit_length() - 1
        palette = np.zeros((3, colours), np.uint16)
        table = np.array(indexed.getpalette()[: 3 * colours], np.uint16).reshape(-1, 3).T * 257
        palette[:, : table.shape[1]] = table
        values = np.asarray(indexed)
        for compression in (None, "lzw"):
            data = packed_tiff(values, bits, 3, palette, compression == "lzw")
            exact(f"palette-{bits}-{compression or 'none'}", data, shown)
    grey = np.asarray(image.convert("L"))
    for bits in (2, 4):
        values = grey.astype(np.uint16) * ((1 << bits) - 1) // 255
        shown = np.dstack([(values * 255 // ((1 << bits) - 1)).astype(np.uint8)] * 3)
        exact(f"grey-{bits}", packed_tiff(values, bits, 1), shown)


def packed_tiff(values, bits, photometric, palette=None, lzw=False):
    """A TIFF of one strip with samples of a few bits, written by hand."""
    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(format(int(v), f"0{bits}b") for v in row)
        text += "0" * (-len(text) % 8)
        rows += bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    if lzw:
        import imagecodecs

        rows = imagecodecs.lzw_encode(rows)
    tags = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [bits]), (259, 3, [5 if lzw else 1]), (262, 3, [photometric]),
        (273, 4, [8]), (277, 3, [1]), (278, 3, [height]), (279, 4, [len(rows)]),
    ]
    if palette is not None:
        tags.append((320, 3, palette.reshape(-1).tolist()))
    at = 8 + len(rows) + (len(rows) & 1)
    extra_at = at + 2 + 12 * len(tags) + 4
    directory, extra = struct.pack("<H", len(tags)), b""
    for tag, kind, numbers in tags:
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) <= 4:
            field = packed.ljust(4, b"\0")
        else:
            field = struct.pack("<I", extra_at + len(extra))
            extra += packed
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + field
    return b"II*\0" + struct.pack("<I", at) + rows + b"\0" * (len(rows) & 1) + directory + bytes(4) + extra


def add_ink_and_opacity(cases, exact):
    image = cases.picture
    ink = image.convert("CMYK")
    shown = np.asarray(ink.convert("RGB"))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        exact(f"cmyk-{compression}", pillow("TIFF", ink, compression=compression), shown)
    values = np.asarray(ink)
    cases.add("cmyk-16.tif", tiff(values.astype(np.uint16) * 257, photometric="separated"), EXACT, shown)
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    shown, rgba = on_white(faded), np.asarray(faded)
    for name, data in {
        "rgba": tiff(rgba, photometric="rgb", extrasamples=["unassalpha"]),
        "rgba-lzw-predictor": tiff(rgba, photometric="rgb", extrasamples=["unassalpha"], compression="lzw", predictor=True),
        "rgba-16": tiff(rgba.astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        "rgba-planes": tiff(np.moveaxis(rgba, -1, 0), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]),
        "rgba-pillow": pillow("TIFF", faded),
    }.items():
        cases.add(f"{name}.tif", data, NEAR, shown, must=True)
    alpha = rgba[:, :, 3:].astype(np.uint16)
    multiplied = np.dstack([(rgba[:, :, :3] * alpha + 127) // 255, alpha]).astype(np.uint8)
    cases.add("rgba-premultiplied.tif", tiff(multiplied, photometric="rgb", extrasamples=["assocalpha"]), NEAR, shown, must=True)
    unspecified = np.dstack([np.asarray(image), np.zeros(image.size[::-1], np.uint8)])
    exact("rgb-unspecified-sample", tiff(unspecified, photometric="rgb", extrasamples=["unspecified"]))
    grey = faded.convert("LA")
    cases.add("grey-alpha.tif", pillow("TIFF", grey), NEAR, on_white(grey), must=True)


def add_jpeg_and_ycbcr(cases):
    image = cases.picture
    rgb = np.asarray(image)
    for name, options in {
        "jpeg-rgb": {"photometric": "rgb"},
        "jpeg-ycbcr-444": {"photometric": "ycbcr", "subsampling": (1, 1)},
        "jpeg-ycbcr-420": {"photometric": "ycbcr", "subsampling": (2, 2)},
        "jpeg-ycbcr-422": {"photometric": "ycbcr", "subsampling": (2, 1)},
        "jpeg-rgb-tiles": {"photometric": "rgb", "tile": (32, 32)},
        "jpeg-ycbcr-420-tiles": {"photometric": "ycbcr", "subsampling": (2, 2), "tile": (32, 32)},
        "jpeg-ycbcr-420-strips": {"photometric": "ycbcr", "subsampling": (2, 2), "rowsperstrip": 32},
    }.items():
        cases.add(f"{name}.tif", tiff(rgb, compression="jpeg", **options), NEAR, must=True)
    cases.add("jpeg-grey.tif", tiff(np.asarray(image.convert("L")), photometric="minisblack", compression="jpeg"), NEAR, must=True)
    cases.add("jpeg-pillow.tif", pillow("TIFF", image, compression="jpeg"), NEAR, must=True)
    shared = tiffcp(pillow("TIFF", image), "-c", "jpeg:90", "-r", "16")
    cases.add("jpeg-shared-tables.tif", shared, NEAR, must=True)
    cases.add("jpeg-cmyk.tif", tiff(np.asarray(image.convert("CMYK")), photometric="separated", compression="jpeg"), NEAR)
    converted = np.asarray(image.convert("YCbCr"))
    cases.add("ycbcr-444.tif", tiff(converted, photometric="ycbcr"), NEAR, rgb, must=True)


def add_refused(cases, rgb, grey):
    """Read or rejected by name."""
    for name, data in {
        "float-rgb": tiff((rgb / 255).astype(np.float32), photometric="rgb"),
        "float-grey": tiff((grey / 255).astype(np.float32), photometric="minisblack"),
        "half": tiff((rgb / 255).astype(np.float16), photometric="rgb"),
        "32-bit": tiff(grey.astype(np.uint32) * 0x01010101, photometric="minisblack"),
        "signed": tiff(grey.astype(np.int16) * 128, photometric="minisblack"),
        "lab": pillow("TIFF", Image.fromarray(rgb).convert("LAB")),
        "zstd": tiff(rgb, photometric="rgb", compression="zstd"),
        "lzma": tiff(rgb, photometric="rgb", compression="lzma"),
        "webp": tiff(rgb, photometric="rgb", compression="webp"),
        "lerc": tiff(rgb, photometric="rgb", compression="lerc"),
        "jpeg-2000": tiff(rgb, photometric="rgb", compression="jpeg2000"),
        "jpeg-xl": tiff(rgb, photometric="rgb", compression="jpegxl"),
        "predictor-3": tiff((rgb / 255).astype(np.float32), photometric="rgb", compression="zlib", predictor=True),
    }.items():
        cases.foreign(f"{name}.tif", data)


