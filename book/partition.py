"""Draw the partition of a dedicated feature crosscoder: ``python book/partition.py`` writes
``partition.svg`` beside this file, which ``concepts.md`` shows.

What reads and writes what is taken from the library, so the picture cannot say anything else.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dfc_lib.crosscoder.partition import Partition  # noqa: E402
from dfc_lib.results.figures import PALETTE  # noqa: E402

FILE = Path(__file__).with_name("partition.svg")
WIDTH, HEIGHT = 640, 290
LEFT, GAP = 110, 8  # where the blocks begin, and what is between them
MODEL_Y = {"A": 40, "B": 210}  # one model above the dictionary, the other below
DICT_Y, DICT_HEIGHT = 115, 60


def text(x: float, y: float, words: str, **style: str) -> str:
    given = {"text_anchor": "middle", "font_size": "14", "fill": "#222"} | style
    return f'<text x="{x:g}" y="{y:g}" {attributes(given)}>{words}</text>'


def box(x: float, y: float, width: float, height: float, **style: str) -> str:
    at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {at} rx="4" {attributes(style)}/>'


def arrow(x: float, y: float, to: float, color: str) -> str:
    """A line with a head at both ends: the block reads the model and writes to it."""
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{x:g}" y2="{to:g}" stroke="{color}" stroke-width="3"/>'
    down = 1 if to > y else -1
    heads = [(y, down), (to, -down)]
    return line + "".join(
        f'<path d="M {x - 6:g} {end + 9 * way:g} L {x:g} {end:g} L {x + 6:g} {end + 9 * way:g}" '
        f'fill="none" stroke="{color}" stroke-width="3"/>'
        for end, way in heads
    )


def attributes(style: dict[str, str]) -> str:
    return " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())


def draw(partition: Partition) -> str:
    """The picture as SVG: models as bars, blocks between them, an arrow where weights are free."""
    names = {"A": "A, after training", "B": "B, the base"}
    parts = [box(0, 0, WIDTH, HEIGHT, fill="white")]
    across = WIDTH - LEFT - 20
    for model, y in MODEL_Y.items():
        parts.append(box(LEFT, y, across, 40, fill=PALETTE[model]))
        parts.append(text(LEFT + across / 2, y + 26, f"state of {names[model]}", fill="white"))
    parts.append(text(LEFT / 2, DICT_Y + DICT_HEIGHT / 2 + 5, "features"))
    # Not to scale: an exclusive block is a tenth of a dictionary, too narrow for its name.
    width = (across - GAP * (len(partition.blocks) - 1)) / len(partition.blocks)
    for i, block in enumerate(partition.blocks):
        x, color = LEFT + i * (width + GAP), PALETTE[block.name]
        parts.append(
            box(x, DICT_Y, width, DICT_HEIGHT, fill="white", stroke=color, stroke_width="3")
        )
        label = block.name.replace("_", "-")
        parts.append(text(x + width / 2, DICT_Y + 26, label, font_weight="bold", fill=color))
        of = [partition.model_names[m] for m in block.models]
        whose = f"of {of[0]} only" if len(of) == 1 else f"of {' and '.join(of)}"
        parts.append(text(x + width / 2, DICT_Y + 46, whose, font_size="12"))
        for m in block.models:
            y = MODEL_Y[partition.model_names[m]]
            ends = (y + 42, DICT_Y - 3) if y < DICT_Y else (DICT_Y + DICT_HEIGHT + 3, y - 2)
            parts.append(arrow(x + width / 2, *ends, color))
    words = "arrow: the block reads the model and writes to it; where there is none, weights are 0"
    parts.append(text(LEFT + across / 2, HEIGHT - 18, words, font_size="12", fill="#555"))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    body = "\n".join(parts)
    about = f'xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    return f"<svg {about}>\n{body}\n</svg>\n"


if __name__ == "__main__":
    FILE.write_text(draw(Partition.dedicated(1_024, 0.1)), encoding="utf-8")
