"""Build the art of pocket (``make pocket-assets``): ``python -m experiments.pocket.assets FLUENT.tgz NOTO.ttf``.

FLUENT.tgz is the npm package ``@lobehub/fluent-emoji-3d`` (Fluent emoji, MIT), NOTO.ttf the font of Debian's
``fonts-noto-color-emoji`` (SIL OFL 1.1). Each drawing is reduced to 96x96 RGBA.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdtune.paths import pocket_art
from sdtune.pocket.world.objects import THINGS

PACK_SIDE = 96
_NOTO_SIZE = 109  # the only bitmap size of the font


def _write(image: Image.Image, path: Path) -> None:
    box = image.getchannel("A").getbbox()
    assert box is not None, path
    # Crop to the drawing and center it in a square, so that a box side has the same meaning for all objects and styles.
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square.resize((PACK_SIDE, PACK_SIDE), Image.Resampling.LANCZOS).save(path, quality=92, method=6, exact=False)


def main() -> None:
    fluent, noto = Path(sys.argv[1]), Path(sys.argv[2])
    target = pocket_art()
    codes = sorted({thing.art for thing in THINGS})
    for style in ("fluent", "noto"):
        (target / style).mkdir(parents=True, exist_ok=True)
    codes_by_member = {f"package/assets/{code}.webp": code for code in codes}
    with tarfile.open(fluent) as archive:
        for member in archive:
            if member.isfile() and member.name in codes_by_member:
                handle = archive.extractfile(member)
                assert handle is not None
                code = codes_by_member.pop(member.name)
                _write(Image.open(io.BytesIO(handle.read())).convert("RGBA"), target / "fluent" / f"{code}.webp")
    if codes_by_member:
        raise ValueError(f"{fluent} has no drawing for {sorted(codes_by_member.values())}")
    font = ImageFont.truetype(str(noto), _NOTO_SIZE)
    for code in codes:
        text = "".join(chr(int(point, 16)) for point in code.split("-"))
        image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((10, 10), text, font=font, embedded_color=True)
        _write(image, target / "noto" / f"{code}.webp")
    print(f"wrote {len(codes)} drawings in two styles to {target}")


if __name__ == "__main__":
    main()
