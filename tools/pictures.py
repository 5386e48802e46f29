"""Draws pictures for tools/pictures.sh.

terminal:         reads a command line and a prompt from "tmux capture-pane -e -p", writes SVG.
display X Y W H:  reads a screen in the format of xwd(1), writes that part of it as PNG.
"""
import html
import re
import struct
import sys
import zlib

PALETTE = ["#1e1e1e", "#cd3131", "#0dbc79", "#e5e510", "#2472c8", "#bc3fbc", "#11a8cd", "#e5e5e5"]
FOREGROUND, BACKGROUND = "#d4d4d4", "#1e1e1e"
CELL, LINE = 8.4, 18


def terminal(text):
    lines = [line for line in text.split("\n") if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines[1:])  # of the box below the command
    lines[1:] = [line[margin:] for line in lines[1:]]
    rows, columns = len(lines), 0
    boxes, words = [], []
    style = {}
    for y, line in enumerate(lines):
        x = 0
        for part in re.split(r"(\x1b\[[0-9;]*m|\x0e|\x0f|\x1b\([0B])", line):
            if code := re.fullmatch(r"\x1b\[([0-9;]*)m", part):
                for n in (int(c or 0) for c in code[1].split(";")):
                    if n == 0:
                        style = {}
                    elif n in (1, 7):
                        style[n] = True
                    elif n == 27:
                        style.pop(7, None)
                    elif 30 <= n <= 37:
                        style["fg"] = PALETTE[n - 30]
                    elif 40 <= n <= 47:
                        style["bg"] = PALETTE[n - 40]
                    elif n == 39:
                        style.pop("fg", None)
                    elif n == 49:
                        style.pop("bg", None)
                continue
            if not part or part[0] in "\x0e\x0f\x1b":
                continue
            fg, bg = style.get("fg", FOREGROUND), style.get("bg", BACKGROUND)
            if style.get(7):
                fg, bg = bg, fg
            if bg != BACKGROUND:
                boxes.append(f'<rect x="{x * CELL:.1f}" y="{y * LINE}" width="{len(part) * CELL:.1f}" height="{LINE}" fill="{bg}"/>')
            if part.strip():
                weight = ' font-weight="bold"' if style.get(1) else ""
                words.append(f'<text x="{x * CELL:.1f}" y="{y * LINE + 13}" textLength="{len(part) * CELL:.1f}" fill="{fg}"{weight}>{html.escape(part)}</text>')
            x += len(part)
            columns = max(columns, x)
    w, h = columns * CELL + 20, rows * LINE + 20
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h}" viewBox="-10 -10 {w:.0f} {h}" '
          f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">')
    print(f'<rect x="-10" y="-10" width="{w:.0f}" height="{h}" rx="6" fill="{BACKGROUND}"/>')
    print("\n".join(boxes + words))
    print("</svg>")


def display(data, x, y, w, h):
    header = struct.unpack(">25I", data[:100])
    size, width, colours, stride = header[0], header[4], header[19], header[12]
    pixels = data[size + colours * 12:]
    assert header[11] == 32 and x + w <= width, "unknown kind of screen"
    rows = b""
    for r in range(y, y + h):
        row = pixels[r * stride + x * 4:r * stride + (x + w) * 4]
        order = (2, 1, 0) if header[7] == 0 else (1, 2, 3)
        rgb = bytearray(w * 3)
        for i, c in enumerate(order):
            rgb[i::3] = row[c::4]
        rows += b"\0" + bytes(rgb)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    sys.stdout.buffer.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) +
                            chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


if sys.argv[1] == "terminal":
    terminal(sys.stdin.read())
else:
    display(sys.stdin.buffer.read(), *map(int, sys.argv[2:6]))
