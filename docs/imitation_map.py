"""Draw the picture of the README: what TRRD did with each token of two completions of one prompt.

rlad train
python docs/imitation_map.py runs/knights_and_knaves-trrd-seed0 docs/assets/imitation_map.svg
"""

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rlad.comparison.imitation_map import MappedCompletion, Token, latest_map
from rlad.runs.directory import SAMPLES, RunDirectory
from rlad.runs.rows import SampleRow, read_rows

COLUMNS = 88
CHARACTER, LINE = 9.0, 27.0
MOST_TOKENS = 120
# Fill, line, dash pattern: told apart without colours too.
LOOK = {
    "reinforced": ("#cfe4f5", "#0072b2", "", "better than its group: more likely now"),
    "held back": ("#ffd37a", "#8a5a00", "5 3", "better, but the teacher objects: no gradient"),
    "punished": ("#f6d3e4", "#a6437a", "2 2", "worse than its group: less likely now"),
    "protected": ("#a5e3cd", "#00684c", "", "worse, but the teacher likes it: no gradient"),
    "untouched": ("none", "none", "", ""),
}


def choose(run: RunDirectory) -> tuple[MappedCompletion, MappedCompletion]:
    """Choose the better and the worse completion of one prompt that show all four fates best."""
    best, chosen = -1.0, None
    for row in read_rows(run, SAMPLES, SampleRow):
        found = [] if isinstance(row, str) else latest_map([row])
        found = [each for each in found if 25 <= len(each.tokens) <= MOST_TOKENS]
        for better in (each for each in found if each.advantage > 0):
            for worse in (each for each in found if each.advantage < 0):
                score = min(better.gated_share, worse.gated_share)
                if score > best:
                    best, chosen = score, (better, worse)
    assert chosen is not None, "no prompt with a better and a worse completion of such lengths"
    return chosen


def placed(tokens: list[Token], y: float) -> Iterator[tuple[str, str, float, float]]:
    """Yield (text, fate, column, y) of each piece; a long line is broken before a token."""
    column = 0
    for token in tokens:
        for number, piece in enumerate(token.text.replace("<|endoftext|>", "").split("\n")):
            if number or column + len(piece) > COLUMNS:
                column = 0
                y += LINE
                piece = piece.lstrip() if not number else piece
            if piece:
                yield piece, token.fate.name, column, y
            column += len(piece)


def draw(better: MappedCompletion, worse: MappedCompletion) -> str:
    parts: list[str] = []
    y = 26.0

    def write(text: str, at: float, size: int = 15, weight: str = "normal", x: float = 16) -> None:
        parts.append(
            f'<text x="{x}" y="{at}" font-size="{size}" font-weight="{weight}" '
            f'font-family="system-ui, sans-serif" fill="#1a1d21">{escape(text)}</text>'
        )

    def box(text: str, fate: str, x: float, at: float) -> None:
        fill, line, dash, _ = LOOK[fate]
        width = CHARACTER * len(text)
        parts.append(f'<rect x="{x}" y="{at - 16}" width="{width}" height="21" fill="{fill}"/>')
        parts.append(
            f'<line x1="{x}" x2="{x + width}" y1="{at + 5}" y2="{at + 5}" stroke="{line}" '
            f'stroke-width="2.5" stroke-dasharray="{dash}"/>'
        )
        weight = "bold" if fate in ("held back", "protected") else "normal"
        parts.append(
            f'<text x="{x}" y="{at}" font-size="15" textLength="{width}" font-weight="{weight}" '
            f'lengthAdjust="spacingAndGlyphs" xml:space="preserve" '
            f'font-family="ui-monospace, monospace" fill="#1a1d21">{escape(text)}</text>'
        )

    prompt = better.row.prompt.strip()
    while prompt:
        line = prompt if len(prompt) <= 108 else prompt[: prompt.rfind(" ", 0, 108)]
        write(line, y)
        prompt = prompt[len(line) :].strip()
        y += 22
    for each, title in ((better, "a correct completion"), (worse, "a wrong one")):
        y += 16
        write(f"{title}, advantage {each.advantage:+.2f}", y, weight="bold")
        y += 30
        for text, fate, column, at in placed(each.tokens, y):
            box(text, fate, 16 + CHARACTER * column, at)
            y = at
        y += 24
    y += 12
    for number, (fate, (_, _, _, meaning)) in enumerate(list(LOOK.items())[:4]):
        x, at = 16 + 394 * (number % 2), y + 30 * (number // 2)
        box(fate, fate, x, at)
        write(meaning, at, 13, x=x + 96)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 830 {y + 48}" role="img">\n'
        "<title>Imitation map: what TRRD did with each token</title>\n"
        f'<rect width="100%" height="100%" fill="#ffffff" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(*choose(RunDirectory(Path(sys.argv[1])))), encoding="utf-8")
