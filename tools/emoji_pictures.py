#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""usage: emoji_pictures.py OUT [--side N]

Pictures to train on from the colour font that Debian ships: OUT/train and OUT/test, in each a folder a class, in it an RGB PNG a picture, N pixels a side
(default 32), on white. About a tenth of the signs is in OUT/test, a sign with all its skin tones. Classes are made of Unicode's groups; families and
couples, a few pixels each at this size, are left out. Needs Debian's fonts-noto-color-emoji, unicode-data, python3-fonttools and python3-pil."""
import argparse
import hashlib
import io
import pathlib
import re

from fontTools.ttLib import TTFont
from PIL import Image

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LIST = "/usr/share/unicode/emoji/emoji-test.txt"
CLASSES = {  # of Unicode's "group/subgroup", the first that matches
    None: r".*/(family|component|skin-tone|hair-style)",
    "face": r"Smileys & Emotion/(face-|cat-face|monkey-face).*",
    "hand": r"People & Body/(hand|body-parts).*",
    "person": r"People & Body/.*",
    "animal": r"Animals & Nature/animal-.*",
    "food": r"Food & Drink/.*",
    "vehicle": r"Travel & Places/transport-.*",
    "scenery": r"(Animals & Nature/plant-|Travel & Places/(place-|hotel|sky & weather)).*",
    "flag": r"Flags/.*",
    "object": r"(Objects/|Activities/|Travel & Places/time).*",
    "symbol": r"(Symbols|Smileys & Emotion)/.*",
}
PRESENTATION, TONES = 0xFE0F, range(0x1F3FB, 0x1F400)


def signs():
    """(class, code points) of every sign, as emoji-test.txt lists them."""
    group = subgroup = ""
    for line in open(LIST, encoding="utf-8"):
        if line.startswith("# group: "):
            group = line[9:].strip()
        elif line.startswith("# subgroup: "):
            subgroup = line[12:].strip()
        elif "; fully-qualified" in line:
            kind = next(k for k, what in CLASSES.items() if re.fullmatch(what, f"{group}/{subgroup}"))
            if kind:
                yield kind, [int(c, 16) for c in line.split(";")[0].split()]


class Font:
    def __init__(self, path):
        font = TTFont(path, lazy=True)
        self.cmap, self.bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
        tables = [t for lookup in font["GSUB"].table.LookupList.Lookup if lookup.LookupType == 4 for t in lookup.SubTable]
        self.ligatures = {(first, *one.Component): one.LigGlyph for t in tables for first, several in t.ligatures.items() for one in several}

    def picture(self, codes):
        """The bitmap of a sequence of code points as RGBA, or None where the font has none."""
        glyphs = tuple(self.cmap.get(c) for c in codes if c != PRESENTATION)
        bitmap = self.bitmaps.get(glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs))
        return bitmap and Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")


def squared(picture, side):
    """On white, its middle square, scaled."""
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, (0, 0), picture)
    short, left = min(picture.size), (picture.width - min(picture.size)) // 2
    return flat.crop((left, 0, left + short, short)).resize((side, side), Image.Resampling.BOX)


def held_out(codes):
    sign = "-".join(f"{c:x}" for c in codes if c not in TONES and c != PRESENTATION)
    return hashlib.sha256(sign.encode()).digest()[0] % 10 == 0


def main():
    args = argparse.ArgumentParser(usage=__doc__)
    args.add_argument("out", type=pathlib.Path)
    args.add_argument("--side", type=int, default=32)
    args = args.parse_args()
    font, count = Font(FONT), {}
    for kind, codes in signs():
        picture, part = font.picture(codes), "test" if held_out(codes) else "train"
        if picture is None:
            continue
        folder = args.out / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        squared(picture, args.side).save(folder / ("-".join(f"{c:x}" for c in codes) + ".png"))
        count[part, kind] = count.get((part, kind), 0) + 1
    for part in ("train", "test"):
        print(part, sum(n for (p, _), n in count.items() if p == part), *(f"{kind} {n}" for (p, kind), n in sorted(count.items()) if p == part))


if __name__ == "__main__":
    main()
