#!/usr/bin/env python3
"""Makes tests/fixtures/metadata again: small pictures with metadata by exiftool, and `expected.json`, what
exiftool reads of them by the guidelines of the Metadata Working Group (its module MWG).

    tests/metadata/make_fixtures.py          needs exiftool (Debian: libimage-exiftool-perl), and Pillow and
                                             pillow-jxl-plugin for the bases of AVIF and JPEG XL

`cargo test --lib metadata` compares what this program reads with `expected.json`.
"""

import html
import io
import json
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / "tests/fixtures/metadata"
BASES = ROOT / "tests/fuzz/corpus/picture"
JPEG, PNG, WEBP, TIFF = "small.jpeg", "9x7.png", "small.webp", "small.tiff"

CAPTION = "Fähre im Hafen von Marseille – l’été, à côté du « Vieux-Port »"
IPTC = [
    "-IPTC:ObjectName=Größe", f"-IPTC:Caption-Abstract={CAPTION}", "-IPTC:Keywords=Hafen", "-IPTC:Keywords=été",
    "-IPTC:By-line=Jürgen Müller", "-IPTC:By-line=Inès Peña", "-IPTC:CopyrightNotice=© 1999 Agence Îles",
    "-IPTC:DateCreated=1999:07:14", "-IPTC:TimeCreated=10:20:30+02:00",
]
XMP = [
    "-XMP-dc:Title=港の朝", f"-XMP-dc:Description={CAPTION} ⛴\nzweite Zeile", "-XMP-dc:Subject=船", "-XMP-dc:Subject=a; b & <c>",
    "-XMP-dc:Creator=Ann", "-XMP-dc:Creator=Бен", "-XMP-dc:Rights=© Ann", "-XMP-photoshop:DateCreated=2024:05:01 12:30:45.25+02:00",
]
EXIF = [
    "-EXIF:ImageDescription=Ein Kran über dem Dock", "-EXIF:Artist=Ann Müller; Ben", "-EXIF:Copyright=© 2020 Ann",
    "-EXIF:DateTimeOriginal=2020:02:29 23:59:58", "-EXIF:SubSecTimeOriginal=75", "-EXIF:OffsetTimeOriginal=-03:30",
    "-EXIF:XPTitle=Kran №5", "-EXIF:XPKeywords=Kran; Dock",
]
UTF8 = ["-IPTC:CodedCharacterSet=UTF8"]
# By name: the base, what exiftool is to write, and the character sets that it is to write and read.
CASES = {
    "none.jpg": (JPEG, [], []),
    "xmp.jpg": (JPEG, XMP, []),
    "xmp-languages.jpg": (JPEG, ["-XMP-dc:Title-de=Stadt", "-XMP-dc:Title=City", "-XMP-dc:Title-fr=Ville"], []),
    "xmp-month.jpg": (JPEG, ["-XMP-photoshop:DateCreated=1998:07"], []),
    "iptc-utf8.jpg": (JPEG, UTF8 + IPTC, []),
    "iptc-latin1.jpg": (JPEG, IPTC, ["-charset", "iptc=Latin"]),
    "iptc-mac-roman.jpg": (JPEG, IPTC, ["-charset", "iptc=MacRoman"]),
    "iptc-year.jpg": (JPEG, ["-IPTC:DateCreated=1931:00:00"], []),
    "exif-little-endian.jpg": (JPEG, ["-ExifByteOrder=II"] + EXIF, []),
    "exif-big-endian.jpg": (JPEG, ["-ExifByteOrder=MM"] + EXIF, []),
    "exif-latin1.jpg": (JPEG, EXIF[:4], ["-charset", "exif=Latin"]),
    "exif-mac-roman.jpg": (JPEG, EXIF[:4], ["-charset", "exif=MacRoman"]),
    "all.jpg": (JPEG, UTF8 + IPTC + XMP + EXIF, []),
    "synchronised.jpg": (JPEG, UTF8 + IPTC + XMP + ["-IPTCDigest=new"], []),
    "iptc-newer.jpg": (JPEG, UTF8 + IPTC + XMP + ["-IPTCDigest=00112233445566778899aabbccddeeff"], []),
    "iptc-cut.jpg": (JPEG, UTF8 + [
        "-IPTC:By-line=The photographers of the harbour", "-XMP-dc:Creator=The photographers of the harbour company",
        "-IPTCDigest=00112233445566778899aabbccddeeff"], []),
    "quoted-artists.jpg": (JPEG, ['-EXIF:Artist="Ann; Ben"; Cy'], []),
    "all.png": (PNG, UTF8 + IPTC + XMP + EXIF[:4], []),
    "compressed.png": (PNG, ["-z"] + UTF8 + IPTC + XMP, []),
    "iptc.png": (PNG, UTF8 + IPTC, []),
    "exif.png": (PNG, EXIF, []),
    "xmp.webp": (WEBP, XMP, []),
    "all.webp": (WEBP, XMP + EXIF, []),
    "xmp.tiff": (TIFF, XMP, []),
    "iptc-latin1.tiff": (TIFF, IPTC, ["-charset", "iptc=Latin"]),
    "all.tiff": (TIFF, UTF8 + IPTC + XMP + EXIF, []),
    "iptc-newer.tiff": (TIFF, UTF8 + IPTC + XMP + ["-IPTCDigest=00112233445566778899aabbccddeeff"], []),
    "all.avif": ("AVIF", XMP + EXIF, []),
    "all.jxl": ("JXL", XMP + EXIF, []),
}
READ = [
    "-MWG:Description", "-MWG:Keywords", "-MWG:Creator", "-MWG:Copyright", "-MWG:DateTimeOriginal", "-IPTC:ObjectName",
    "-XMP-dc:Title", "-EXIF:XPTitle", "-EXIF:XPKeywords", "-Photoshop:IPTCDigest", "-File:CurrentIPTCDigest",
]
# What exiftool is asked for where MWG leaves IPTC out, as it does in PNG.
READ_IPTC = {
    "Description": "Caption-Abstract", "Keywords": "Keywords", "Creator": "By-line", "Copyright": "CopyrightNotice",
    "DateTimeOriginal": "DateTimeCreated",
}


def exiftool(folder, arguments):
    """Runs exiftool with UTF-8 arguments from a file, where line breaks are written as entities."""
    is_value = lambda argument: argument.startswith("-") and "=" in argument
    escaped = [html.escape(one, quote=False).replace("\n", "&#xa;") if is_value(one) else one for one in arguments]
    listed = folder / "arguments"
    listed.write_text("\n".join(["-E", *escaped]) + "\n")
    command = ["exiftool", "-config", str(folder / "config"), "-@", str(listed)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_tags(folder, arguments, path):
    printed = json.loads(exiftool(folder, [*arguments, "-j", "-q", "-q", "-struct", str(path)]))[0]
    # -E escapes what is printed too.
    unescape = lambda value: html.unescape(value) if isinstance(value, str) else value
    return {key: [unescape(one) for one in value] if isinstance(value, list) else unescape(value) for key, value in printed.items()}


def base(name):
    if name not in ["AVIF", "JXL"]:
        return (BASES / name).read_bytes()
    from PIL import Image
    if name == "JXL":
        import pillow_jxl  # noqa: F401: registers the format
    stored = io.BytesIO()
    Image.new("RGB", (16, 8), (200, 30, 60)).save(stored, name)
    return stored.getvalue()


def iso(date):
    """`2024:05:01 12:30:45+02:00` in the form of ISO 8601."""
    day, _, time = date.partition(" ")
    day = re.sub(r"(-00)+$", "", day.replace(":", "-"))
    return f"{day}T{time}" if time else day


def as_list(value):
    return [] if value is None else [str(one) for one in value] if isinstance(value, list) else [str(value)]


def expected(read):
    digest = read.get("IPTCDigest")
    iptc_is_newer = digest is not None and digest != read.get("CurrentIPTCDigest")
    titles = [read.get("ObjectName"), read.get("Title")]
    title = next(filter(None, titles if iptc_is_newer else titles[::-1]), None) or read.get("XPTitle")
    keywords = as_list(read.get("Keywords")) or [one.strip() for one in read.get("XPKeywords", "").split(";") if one.strip()]
    date = read.get("DateTimeOriginal")
    return {
        "title": title, "caption": read.get("Description"), "keywords": keywords, "creators": as_list(read.get("Creator")),
        "date": date and iso(str(date)), "rights": read.get("Copyright"),
    }


def main():
    FIXTURES.mkdir(exist_ok=True)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # PNG, and TIFF in some places, are not standard locations for the guidelines, but common.
        (folder / "config").write_text("$Image::ExifTool::MWG::strict = 0; 1;\n")
        for name, (base_name, write, charsets) in CASES.items():
            path = FIXTURES / name
            path.write_bytes(base(base_name))
            if write:
                exiftool(folder, [*charsets, "-q", "-q", "-m", "-overwrite_original", "-sep", "\x01", *write, str(path)])
            read = read_tags(folder, [*charsets, "-use", "MWG", *READ], path)
            if "CurrentIPTCDigest" not in read:
                of_iptc = [f"-IPTC:{tag}" for tag in READ_IPTC.values()] + ["-Composite:DateTimeCreated"]
                plain = read_tags(folder, [*charsets, *of_iptc], path)
                read = {key: plain[tag] for key, tag in READ_IPTC.items() if tag in plain} | read
            values[name] = expected(read)
    (FIXTURES / "expected.json").write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
