"""Make a folder of colour pictures to train on: the emoji of Debian's Noto font.

    apt install fonts-noto-color-emoji
    python examples/emoji.py runs/emoji-pictures
    anystep train folder --data.path runs/emoji-pictures --out runs/emoji

The font carries every emoji as a PNG with transparency, 136x128 pixels; they are copied out as
they are, flat in one folder, without labels.
"""

import sys
from pathlib import Path

from fontTools.ttLib import TTFont
from tqdm import tqdm

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def main(out: Path, font: Path = FONT) -> None:
    """Write one PNG for each glyph of the font's bitmap table."""
    if not font.is_file():
        sys.exit(f"{font} is missing: apt install fonts-noto-color-emoji, or name a font")
    out.mkdir(parents=True, exist_ok=True)
    (strike,) = TTFont(font)["CBDT"].strikeData
    for name, glyph in tqdm(strike.items(), unit="image"):
        glyph.ensureDecompiled()
        (out / f"{name}.png").write_bytes(glyph.imageData)
    print(f"{len(strike)} pictures in {out}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:3]))
