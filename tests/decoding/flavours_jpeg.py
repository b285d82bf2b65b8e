"""Flavours of JPEG: scans × samplings × restarts × arithmetic coding, colours, orientation, damage."""

import itertools
import struct

import imagecodecs
import numpy as np
from common import NEAR, cjpeg, exif, pillow, ppm, reference, stored_turned, text_file, tool, xmp
from PIL import Image

SCANS = {"each": "0;\n1;\n2;\n", "y-then-both": "0;\n1 2;\n", "two-then-one": "0 1;\n2;\n", "reversed": "2;\n1;\n0;\n"}
SAMPLINGS = ["1x1", "2x1", "1x2", "2x2", "4x1", "1x4", "4x2"]


def segment(marker, payload):
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def insert(jpeg, *segments):
    """Segments after the start of the image."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def without(jpeg, marker):
    """Without the segments of a marker."""
    out, at = jpeg[:2], 2
    while jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:
        size = struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
        if jpeg[at + 1] != marker:
            out += jpeg[at : at + 2 + size]
        at += 2 + size
    return out + jpeg[at:]


def with_component_ids(jpeg, ids):
    out, at = bytearray(jpeg), 2
    while True:
        marker, size = out[at + 1], struct.unpack(">H", bytes(out[at + 2 : at + 4]))[0]
        if marker == 0xC0:
            for k in range(3):
                out[at + 10 + 3 * k] = ids[k]
        if marker == 0xDA:
            for k in range(3):
                out[at + 5 + 2 * k] = ids[k]
            return bytes(out)
        at += 2 + size


def add(cases):
    add_scans_and_samplings(cases)
    add_colours(cases)
    add_orientations(cases)
    add_oddities(cases)
    add_damage(cases)


def add_scans_and_samplings(cases):
    scans = {name: text_file(text) for name, text in SCANS.items()}
    for picture, image in (("drawn", cases.picture), ("texture", cases.texture)):
        for sampling in SAMPLINGS:
            for name, options in (("", []), ("-progressive", ["-progressive"])):
                data = cjpeg(image, "-sample", sampling, *options)
                cases.add(f"{picture}-{sampling}{name}.jpg", data, NEAR, must=True)
    for name, sampling in itertools.product(scans, SAMPLINGS):
        for extra, options in (("", []), ("-restart", ["-restart", "2"]), ("-arithmetic", ["-arithmetic"])):
            data = cjpeg(cases.picture, "-sample", sampling, "-scans", scans[name], *options)
            cases.add(f"scans-{name}-{sampling}{extra}.jpg", data, NEAR, must=not extra.startswith("-a"))
    factors = [*SAMPLINGS, "2x4"]
    for luma, chroma in itertools.product(factors, factors):
        if chroma == "1x1":
            continue
        try:
            data = cjpeg(cases.picture, "-sample", f"{luma},{chroma},{chroma}")
        except RuntimeError:
            continue  # More than ten blocks in a unit.
        cases.add(f"luma-{luma}-chroma-{chroma}.jpg", data, NEAR)
    for sampling in ("2x2,1x1,1x2", "2x1,1x1,2x1", "2x2,2x1,1x1", "1x1,1x1,2x2", "2x2,1x2,2x1", "3x1,1x1,1x1", "1x1,2x2,2x2"):
        cases.add(f"sampling-{sampling}.jpg", cjpeg(cases.picture, "-sample", sampling), NEAR)
    for (width, height), sampling in itertools.product(((1, 1), (7, 5), (17, 33)), ("1x1", "2x1", "2x2")):
        image = cases.picture.resize((width, height))
        for name, options in (("", []), ("-scans", ["-scans", scans["each"]]), ("-progressive", ["-progressive"])):
            data = cjpeg(image, "-sample", sampling, *options)
            cases.add(f"size-{width}x{height}-{sampling}{name}.jpg", data, NEAR, must=True)
    for restart in ("1", "3", "5B"):
        for name in ([], ["-progressive"]):
            data = cjpeg(cases.picture, "-restart", restart, *name)
            cases.add(f"restart-{restart}{''.join(name)}.jpg", data, NEAR, must=True)
    for name in ([], ["-progressive"]):
        cases.add(f"arithmetic{''.join(name)}.jpg", cjpeg(cases.picture, "-arithmetic", *name), NEAR)


def add_colours(cases):
    image = cases.picture
    rgb = np.asarray(image)
    grey = image.convert("L")
    cases.add("grey.jpg", pillow("JPEG", grey, quality=92), NEAR, must=True)
    cases.add("grey-progressive.jpg", pillow("JPEG", grey, quality=92, progressive=True), NEAR, must=True)
    cases.add("grey-2x2.jpg", tool("cjpeg", "-grayscale", "-sample", "2x2", stdin=ppm(image)), NEAR, must=True)
    ink = image.convert("CMYK")
    cmyk = pillow("JPEG", ink, quality=92)
    scans = text_file("0;\n1;\n2;\n3;\n")
    cases.add("cmyk.jpg", cmyk, NEAR, must=True)
    cases.add("cmyk-progressive.jpg", pillow("JPEG", ink, quality=92, progressive=True), NEAR, must=True)
    cases.add("cmyk-scans.jpg", tool("jpegtran", "-scans", scans, stdin=cmyk), NEAR, must=True)
    cases.add("cmyk-arithmetic.jpg", tool("jpegtran", "-arithmetic", stdin=cmyk), NEAR)
    plain = pillow("JPEG", Image.fromarray(255 - np.asarray(ink), "CMYK"), quality=92)
    cases.add("cmyk-without-adobe.jpg", without(plain, 0xEE), NEAR, must=True)
    for subsampling in ("444", "422", "420"):
        ycck = imagecodecs.jpeg_encode(
            255 - np.asarray(ink), level=92, colorspace="CMYK", outcolorspace="YCCK", subsampling=subsampling
        )
        for name, options in (("", None), ("-scans", ["-scans", scans]), ("-progressive", ["-progressive"])):
            data = tool("jpegtran", *options, stdin=ycck) if options else ycck
            cases.add(f"ycck-{subsampling}{name}.jpg", data, NEAR, must=True)
    cases.add("rgb-adobe-0.jpg", cjpeg(image, "-rgb"), NEAR, must=True)
    cases.add("rgb-ids-without-marker.jpg", without(cjpeg(image, "-rgb"), 0xEE), NEAR)
    plain = pillow("JPEG", image, quality=92, subsampling=0)
    bare = without(plain, 0xE0)
    cases.add("without-jfif.jpg", bare, NEAR, must=True)
    for ids in ((0, 1, 2), (34, 35, 36)):
        cases.add(f"ids-{ids[0]}.jpg", with_component_ids(plain, ids), NEAR)
        cases.add(f"ids-{ids[0]}-without-jfif.jpg", with_component_ids(bare, ids), NEAR)
    profile = imagecodecs.cms_profile("adobergb") if imagecodecs.CMS.available else bytes(200)
    icc = b"ICC_PROFILE\0\x01\x01" + profile
    cases.add("icc-adobe-rgb.jpg", insert(plain, segment(0xE2, icc)), NEAR, must=True)
    for name, numbers in (("missing-parts", b"\x01\x05"), ("number-0", b"\0\0")):
        data = insert(plain, segment(0xE2, b"ICC_PROFILE\0" + numbers + bytes(16)))
        cases.add(f"icc-{name}.jpg", data, NEAR)
    for name, array, options in (
        ("444", rgb, {}), ("420", rgb, {"subsampling": "420"}), ("grey", np.asarray(grey), {}),
    ):
        data = imagecodecs.jpeg_encode(array.astype(np.uint16) << 4, level=92, bitspersample=12, **options)
        decoded = (imagecodecs.jpeg_decode(data) >> 4).astype(np.uint8)
        decoded = np.dstack([decoded] * 3) if decoded.ndim == 2 else decoded
        cases.add(f"12-bit-{name}.jpg", data, NEAR, decoded)
    cases.add("lossless.jpg", imagecodecs.jpeg_encode(rgb, lossless=True), NEAR, rgb)
    cases.foreign("jpeg-ls.jpg", imagecodecs.jpegls_encode(rgb))


def add_orientations(cases):
    for orientation in range(1, 9):
        plain = pillow("JPEG", stored_turned(cases.picture, orientation), quality=92, subsampling=0)
        for name, big_endian in (("little", False), ("big", True)):
            data = insert(plain, segment(0xE1, b"Exif\0\0" + exif(orientation, big_endian)))
            cases.add(f"exif-{orientation}-{name}-endian.jpg", data, NEAR, must=True)
    turned = pillow("JPEG", stored_turned(cases.picture, 6), quality=92, subsampling=0)
    prefix = b"http://ns.adobe.com/xap/1.0/\0"
    for name, element in (("attribute", False), ("element", True)):
        data = insert(turned, segment(0xE1, prefix + xmp(6, element)))
        cases.add(f"xmp-6-{name}.jpg", data, NEAR, must=True)
    both = insert(turned, segment(0xE1, b"Exif\0\0" + exif(6)), segment(0xE1, prefix + xmp(3)))
    cases.add("exif-6-and-xmp-3.jpg", both, NEAR, must=True)
    plain = pillow("JPEG", cases.picture, quality=92, subsampling=0)
    cases.add("exif-9.jpg", insert(plain, segment(0xE1, b"Exif\0\0" + exif(9))), NEAR, reference(plain), must=True)
    upright = exif(1)
    broken = {
        "short": b"", "garbage": b"II*\0\xff\xff\xff\x7f" + bytes(16), "no-header": b"what is this" * 9,
        "cut": upright[:12], "too-many-entries": upright[:8] + b"\xff\xff" + upright[10:],
        "value-outside": upright[:10] + b"\x12\x01\x03\0\xff\xff\0\0\xff\xff\xff\x7f" + bytes(4),
        "unknown-type": upright[:10] + b"\x12\x01\x63\0\x01\0\0\0\x06\0\0\0" + bytes(4),
    }
    for name, block in broken.items():
        payload = b"Exif\0\0" + block
        cases.add(f"exif-{name}.jpg", insert(plain, segment(0xE1, payload)), NEAR, reference(plain), must=True)


def add_oddities(cases):
    plain = pillow("JPEG", cases.picture, quality=92, subsampling=0)
    pixels = reference(plain)
    cases.add("trailing-bytes.jpg", plain + bytes(range(256)) * 4, NEAR, must=True)
    cases.add("fill-bytes.jpg", plain[:2] + b"\xff\xff\xff" + plain[2:], NEAR, must=True)
    cases.add("two-pictures.jpg", plain + pillow("JPEG", cases.picture.resize((16, 12))), NEAR, must=True)
    cases.add("empty-segment.jpg", insert(plain, segment(0xE5, b"")), NEAR, must=True)
    cases.add("without-end.jpg", plain[:-2], NEAR, pixels)
    cases.add("two-starts.jpg", plain[:2] + plain, NEAR, pixels)
    cases.add("leading-newline.jpg", b"\n" + plain, NEAR, pixels)
    standard = cjpeg(cases.picture, "-sample", "2x1", "-baseline")
    cases.add("standard-tables-left-out.jpg", without(standard, 0xC4), NEAR, reference(standard))
    dnl = bytearray(plain)
    frame = dnl.index(b"\xff\xc0")
    dnl[frame + 5 : frame + 7] = b"\0\0"
    height = segment(0xDC, struct.pack(">H", cases.height))
    cases.add("height-after-scan.jpg", bytes(dnl[:-2]) + height + b"\xff\xd9", NEAR, pixels)


def add_damage(cases):
    image, each = cases.picture, text_file(SCANS["each"])
    ink = pillow("JPEG", image.convert("CMYK"), quality=92)
    for name, data in {
        "420": cjpeg(image), "restart": cjpeg(image, "-restart", "1"), "444": cjpeg(image, "-sample", "1x1"),
        "progressive": cjpeg(image, "-progressive"), "scans": cjpeg(image, "-scans", each),
        "arithmetic": cjpeg(image, "-arithmetic"), "arithmetic-progressive": cjpeg(image, "-arithmetic", "-progressive"),
        "cmyk": ink, "grey": pillow("JPEG", image.convert("L"), quality=92),
    }.items():
        cases.cut_and_overwrite(name, "jpg", data, notices=False)
    # The scans after the first are missing, and nothing else is.
    progressive = cjpeg(image, "-progressive")
    second = progressive.index(b"\xff\xda", progressive.index(b"\xff\xda") + 2)
    tables = progressive.rindex(b"\xff\xc4", 0, second) if b"\xff\xc4" in progressive[:second] else second
    cases.damaged("progressive-first-scan-only.jpg", progressive[:min(tables, second)])
    restarted = cjpeg(image, "-restart", "1")
    at = [i for i in range(len(restarted) - 1) if restarted[i] == 0xFF and 0xD0 <= restarted[i + 1] <= 0xD7]
    cases.damaged("restart-marker-missing.jpg", restarted[: at[1]] + restarted[at[1] + 2 :])
    # Bytes that belong to nothing, as some cameras leave them, do not always show.
    extra = restarted[: at[1]] + b"\x12\x34\x56\x78" + restarted[at[1] :]
    cases.overwritten("bytes-before-restart.jpg", extra)
    plain = cjpeg(image)
    for name, junk in (("zeros", bytes(9)), ("stuffed", b"\xff\0\x07"), ("restart", b"\x01\xff\xd0")):
        first_end = 4 + struct.unpack(">H", plain[4:6])[0]
        between = plain[:first_end] + junk + plain[first_end:]
        cases.add(f"{name}-between-segments.jpg", between, NEAR, reference(plain), must=True)
