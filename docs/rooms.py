"""Draws the rooms of the code from their imports: `python docs/rooms.py` writes assets/rooms.svg.

A room stands above all rooms that it imports. An arrow is left out where a longer way leads there too.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEIGHT, GAP, MARGIN, WIDTH, ROOM, COLUMN = 34, 34, 12, 774, 112, 145  # pixels
# Where a room stands from left to right, so that few arrows cross. Its height comes from the imports.
COLUMNS = {
    "cli": 3.0, "serve": 2.75, "bench": 1.0, "export": 2.7, "training": 1.0, "explain": 2.9, "evaluation": 1.0,
    "checkpoints": 1.4, "compress": 4.4, "models": 2.3, "routing": 3.4, "figures": 0.0, "data": 1.0, "moe": 2.8,
}  # fmt: skip


def style() -> str:
    """The colours of vmoe/palette.css, in a form that every viewer of pictures knows."""
    text = (ROOT / "vmoe" / "palette.css").read_text(encoding="utf-8")
    colours = {name: both for name, *both in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", text)}

    def rules(scheme: int) -> str:
        ink, raised, muted = (colours[name][scheme] for name in ("ink", "raised", "muted"))
        return (
            f"text {{ fill: {ink}; }} rect {{ fill: {raised}; stroke: {muted}; }} "
            f"path {{ stroke: {muted}; }} marker path {{ fill: {muted}; stroke: none; }}"
        )

    return f"""
  text {{ font: 14px ui-monospace, Menlo, Consolas, monospace; text-anchor: middle; }}
  path {{ fill: none; }}
  {rules(0)}
  @media (prefers-color-scheme: dark) {{ {rules(1)} }}
"""


def imports_of_rooms() -> dict[str, set[str]]:
    """The rooms that each room of vmoe/ imports."""
    rooms = {path.parent.name: set() for path in (ROOT / "vmoe").glob("*/__init__.py")}
    for room in rooms:
        for file in (ROOT / "vmoe" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                parts = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
                if parts[0:1] == ["vmoe"]:
                    rooms[room].update(parts[1:2] or [alias.name for alias in node.names])
        rooms[room] &= rooms.keys() - {room}
    return rooms


def picture() -> str:
    """The drawing as SVG, in the colours of the reader's light or dark scheme."""
    imports = imports_of_rooms()
    below = {room: _below(room, imports) for room in imports}
    levels = {room: _level(room, imports) for room in imports}
    top = max(levels.values())
    height = (top + 1) * HEIGHT + top * GAP + 2 * MARGIN
    places = {
        room: (round(MARGIN + ROOM / 2 + COLUMN * COLUMNS[room]), MARGIN + (top - level) * (HEIGHT + GAP))
        for room, level in levels.items()
    }
    arrows, boxes = [], []
    for room in sorted(imports):
        x, y = places[room]
        boxes.append(f'<rect x="{x - ROOM // 2}" y="{y}" width="{ROOM}" height="{HEIGHT}" rx="5"/>')
        boxes.append(f'<text x="{x}" y="{y + 22}">{room}</text>')
        direct = {each for each in imports[room] if not any(each in below[other] for other in imports[room])}
        for each in sorted(direct):
            to_x, to_y = places[each]
            arrows.append(f'<path d="M{x} {y + HEIGHT}L{to_x} {to_y - 2}" marker-end="url(#head)"/>')
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The rooms of vmoe/: an arrow leads from a room to one that it imports</title>",
            f"<style>{style()}</style>",
            f'<defs>{head}<path d="M0 0L8 4L0 8z"/></marker></defs>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


def _below(room: str, imports: dict[str, set[str]]) -> set[str]:
    """All rooms that a room reaches."""
    return imports[room].union(*(_below(each, imports) for each in imports[room]))


def _level(room: str, imports: dict[str, set[str]]) -> int:
    return 1 + max((_level(each, imports) for each in imports[room]), default=-1)


if __name__ == "__main__":
    (ROOT / "assets" / "rooms.svg").write_text(picture(), encoding="utf-8")
