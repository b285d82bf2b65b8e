"""Makes tests/fixtures/open-clip-cleaning.json: texts, and what open_clip's two ways of cleaning make of
them, by ftfy and Python's html module. `cargo test` compares with the file.

    python tests/parity/cleaning.py                   needs ftfy
    python tests/parity/cleaning.py --random 20000 cases.json
                                                      random texts; then BSAP_CLEANING_CASES=cases.json cargo test
"""

import argparse
import html
import json
import pathlib
import random
import string
import unicodedata

import ftfy

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures/open-clip-cleaning.json"
TEXTS = [
    "a red mug", "", "  A RED\tmug\n", "A&amp;B &lt;tag&gt;", "&amp;amp;lt;", "P&EACUTE;REZ &NTILDE; &nTILDE; BUNDESSTRA&SZLIG;E",
    "&eacute; &eacute &eacutex &notit; &not-it &AMP &amp= &ampx;", "&#65; &#x41; &#X41 &#65a; &#59; &#x; &# &;", "&#0; &#13; &#128; &#x80;x &#129; &#1; &#xd800; &#x110000; &#99999999999;",
    "&#xfdd0; &#x1fffe; &#xFFFF;", "a < b &amp; c", "first &amp;\na < b &eacute;\nlast &EACUTE;", "&CounterClockwiseContourIntegral; &NotEqualTilde; &fjlig;", "&thetasym; &Jscr;ohn",
    "&aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; &", "tom&jerry &copy2024 &reg;", "“quoted” ‘single’ ‚low‛ ʼn", "ﬁne ﬂow ﬃ ﬅ ﬆ Ǆ ǉ ŉ Ĳ", "ＦＵＬＬ　ｗｉｄｔｈ ﾊﾟﾝ ｶﾞ ￥ ￠", "ﾡﾢ",
    "\x1b[36;44mblue\x1b[0m \x1b[x \x1b[1 no", "bell\x07 nul\x00 del\x7f vt\x0b ff\x0c", "cr\rlf\r\nls\u2028ps\u2029nel", "\ufeffbom \ufffc \u206a \ufff9",
    "e\u0301 \u1e69 s\u0323\u0307 \u212b", "a\u3000red\u00a0mug\u2003x", "red\u200b mug\u200d\u00ad", "İstanbul ΣΑΣ ẞ ǰ", "don’t – dash… it's", "snake_case-and/slash {x} [y]", "₂² ½ ™ № ℃",
    "赤いマグカップ 한국어 ไทย كوب", "👩🏽‍🍳 🇩🇪 ❤️", "<start_of_text> <|endoftext|> </s>", "!!! ??? ...", "price: 5 €, 10 £", "naïve café, São Paulo, Ærø", "x\x1cy\x1dz\x1e\x1f", "e&#769; &#x2028; &nbsp;x&nbsp;",
    "&lt;b&gt;bold&lt;/b&gt;", "a<b e&#769;", "&amp;#38;#38;", "&quot;red&quot; &apos;mug&apos;", "AT&T R&D Q&A", "&Aacute &aacute;&AACUTE;", "ſt ﬀ ﬀ", "\n\n\t ", "“\u201f\u201e", "ÀÉÎ Ü ß", "100&percnt; &dollar;5 &num;1",
    "&frac12 &FRAC12; &sup2; &SUP2;", "tab\tnew\nline\ftext",
]


def canonicalize(text):
    """As open_clip removes punctuation, in words of our own."""
    kept = "".join(c for c in text.replace("_", " ") if c not in string.punctuation)
    return " ".join(kept.lower().split())


def case(text):
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    return {"text": text, "lower": " ".join(cleaned.split()).lower(), "canonicalize": canonicalize(cleaned)}


def is_repaired(text):
    """Whether ftfy takes a part of the text for wrongly decoded, which is not done here."""
    repaired = []

    def without_repair(text, config=None):
        repaired.append(text)
        return text

    original, ftfy.fix_encoding = ftfy.fix_encoding, without_repair
    try:
        plain = ftfy.fix_text(text)
    finally:
        ftfy.fix_encoding = original
    return plain != ftfy.fix_text(text)


def character(rng, low, high):
    """A character that this version of Python knows: later ones have other forms in lower case."""
    while True:
        c = chr(rng.randrange(low, high))
        if unicodedata.category(c) != "Cn":
            return c


def random_text(rng):
    names = list(html.entities.html5)
    pieces = [
        lambda: "&" + rng.choice(names), lambda: "&" + rng.choice(names).upper(), lambda: "&" + rng.choice(names).rstrip(";") + rng.choice("ab =1"),
        lambda: f"&#{rng.randrange(0x300)};", lambda: f"&#x{rng.randrange(0x11ffff):x}" + rng.choice(["", ";"]), lambda: "&amp;" * rng.randrange(3) + "#38;",
        lambda: chr(rng.randrange(0x80)), lambda: character(rng, 0xa0, 0x3100), lambda: character(rng, 0xf900, 0x10000), lambda: character(rng, 0x1f000, 0x1fa00),
        lambda: rng.choice(["<", "\n", "\r\n", "\x1b[3m", " ", "_", "\u0301", "ﬁ", "“"]), lambda: "".join(rng.choice(string.ascii_letters) for _ in range(4)),
    ]
    return "".join(rng.choice(pieces)() for _ in range(rng.randrange(1, 12)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--random", type=int, nargs="?", metavar="COUNT")
    parser.add_argument("file", nargs="?", type=pathlib.Path, default=OUT)
    args = parser.parse_args()
    rng = random.Random(7)
    texts = [random_text(rng) for _ in range(args.random)] if args.random else TEXTS
    cases = [case(text) for text in texts if not is_repaired(text)]
    print(f"{len(cases)} of {len(texts)} texts, the others are repaired by ftfy")
    args.file.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
