"""Draws the figures of docs/kernels: python docs/figures/draw.py

Each is an SVG written by hand, of boxes, text and arrows, in a light and a dark dress: it takes that
of the page it stands on. A test draws them again and compares.
"""

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent

STYLE = """
svg { font-family: system-ui, "DejaVu Sans", "Segoe UI", Arial, sans-serif; font-size: 13px;
  --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #8c959f; --plain: #eff2f5;
  --a: #cfe4f7; --b: #fde3b8; --c: #cdeacb; --d: #f3d3e2; }
@media (prefers-color-scheme: dark) {
  svg { --page: #14181d; --ink: #e6edf3; --soft: #9aa4af; --line: #6e7781; --plain: #262c33;
    --a: #1d4466; --b: #5e4410; --c: #1f4f2b; --d: #5c2a45; }
}
.page { fill: var(--page); } .plain { fill: var(--plain); } .none { fill: none; }
.a { fill: var(--a); } .b { fill: var(--b); } .c { fill: var(--c); } .d { fill: var(--d); }
rect.box { stroke: var(--line); stroke-width: 1; }
rect.thick { stroke: var(--ink); stroke-width: 2; fill: none; }
rect.dashed { stroke: var(--line); stroke-dasharray: 4 3; fill: none; }
text { fill: var(--ink); } text.soft { fill: var(--soft); } text.title { font-weight: 600; }
text.mono { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: 12px; }
path { stroke: var(--line); stroke-width: 1.3; fill: none; }
marker path { fill: var(--line); stroke: none; }
""".strip()


class Figure:
    """A drawing of `width` x `height` pixels. Colours are classes of STYLE."""

    def __init__(self, name, title, width, height):
        self.name, self.title, self.width, self.height = name, title, width, height
        self.parts = []

    def box(self, x, y, width, height, color="plain", text=None, kind="box", **options):
        self.parts.append(
            f'<rect class="{kind} {color}" x="{x:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}"/>'
        )
        if text is not None:
            lines = text.split("\n")
            top = y + height / 2 - 8 * (len(lines) - 1)
            for i, line in enumerate(lines):
                self.text(x + width / 2, top + 16 * i + 4.5, line, anchor="middle", **options)

    def text(self, x, y, text, anchor="start", kind=""):
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def soft(self, x, y, text):
        self.text(x, y, text, kind="soft")

    def mono(self, x, y, text):
        self.text(x, y, text, kind="mono")

    def heading(self, x, y, text):
        self.text(x, y, text, kind="title")

    def arrow(self, *points):
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" marker-end="url(#head)"/>')

    def line(self, *points):
        self.parts.append('<path d="M' + " L".join(f"{x:g},{y:g}" for x, y in points) + '"/>')

    def grid(self, x, y, rows, columns, size, color):
        """Squares; `color` is a class or a function of row and column."""
        for i in range(rows):
            for j in range(columns):
                kind = color(i, j) if callable(color) else color
                self.box(x + j * size, y + i * size, size, size, kind)

    def svg(self):
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{STYLE}\n</style>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
            f'<rect class="page" width="{self.width}" height="{self.height}" rx="4"/>\n'
            f"{body}\n</svg>\n"
        )


def flow():
    f = Figure("flow", "The way of one call through the layers of the code", 720, 330)
    doors = ["NumPy\npybind11", "TensorFlow\nC API", "XLA\nFFI"]
    for i, door in enumerate(doors):
        f.box(20 + 140 * i, 20, 120, 44, "a", door)
        f.arrow((80 + 140 * i, 64), (80 + 140 * i, 94))
    f.text(450, 38, "bindings: arguments in, status out;")
    f.soft(450, 55, "no arithmetic")
    f.box(20, 96, 400, 40, "b", "problem: shapes checked, output geometry, once")
    f.text(450, 113, "core: what a convolution is")
    f.soft(450, 130, "nothing below derives geometry again")
    f.arrow((220, 136), (220, 160))
    f.box(20, 162, 400, 40, "b", "select: the cheapest that serves, within the accuracy")
    f.text(450, 179, "core and cpu/select.cpp")
    f.soft(450, 196, "a cost model; remembered by problem")
    f.arrow((220, 202), (220, 226))
    names = ["direct", "winograd", "small\nchannel", "depthwise\ngrouped", "pooling"]
    for i, name in enumerate(names):
        f.box(20 + 80 * i, 228, 78, 44, "c", name)
    f.text(450, 245, "cpu: one header an algorithm, compiled")
    f.soft(450, 262, "once an instruction set")
    f.arrow((220, 272), (220, 290))
    f.box(20, 292, 400, 28, "d", "tasks on the thread pool, scratch from the workspace")
    f.text(450, 310, "core")
    return f


def indirect():
    f = Figure("indirect", "A register tile of the implicit GEMM", 720, 388)
    f.heading(20, 26, "source: a cell is C floats")
    f.grid(20, 40, 7, 8, 26, lambda i, j: "a" if i == 3 and 2 <= j <= 5 else "plain")
    f.soft(20, 248, "Tap (r, s) of 4 output pixels meets")
    f.soft(20, 265, "these 4 source pixels. The next tap")
    f.soft(20, 282, "meets 4 others: one offset moves all.")

    f.heading(272, 26, "A: pointers")
    for i in range(4):
        y = 58 + 40 * i
        f.box(272, y, 142, 28, "a", f"x_pixels[{i}] + offset")
        f.arrow((272, y + 14), (20 + 26 * (2 + i) + 26, 131))
    f.soft(272, 238, "one float is broadcast")

    f.heading(440, 26, "B: a packed filter panel")
    f.box(440, 40, 130, 34, "b", "vector 0")
    f.box(572, 40, 130, 34, "b", "vector 1")
    f.soft(440, 92, "[tap][c][vector], contiguous")

    f.heading(440, 140, "sums, in registers")
    for i in range(4):
        for j in range(2):
            f.box(440 + 132 * j, 152 + 36 * i, 130, 32, "c", f"pixel {i}, vector {j}")
    f.arrow((414, 152), (436, 166))
    f.arrow((660, 98), (660, 148))
    f.mono(20, 326, "for each tap:  its offset, its filter rows")
    f.mono(
        20,
        344,
        "  for c in run:  load a row of B; each pixel: broadcast A, multiply-add each vector",
    )
    f.soft(
        20, 372, "AVX-512: 6 pixels x 4 vectors of 16 channels. AVX2: 6 pixels x 2 vectors of 8."
    )
    return f


def regions():
    f = Figure("regions", "Output pixels by the taps that meet the source", 720, 300)
    f.heading(20, 26, "output, 3 x 3 filter, padding 1")
    edge = {0: "first", 6: "last"}

    def color(i, j):
        row, column = edge.get(i), edge.get(j)
        return "b" if row and column else "d" if row else "c" if column else "a"

    f.grid(20, 40, 7, 7, 32, color)
    f.soft(20, 284, "9 regions; each is walked by its own list of taps")
    left = 320
    rows = [
        ("a", "all 9 taps: three runs of 3 C floats", 0, 3, 0, 3),
        ("d", "first row (and last): 6 taps, two runs of 3 C", 1, 3, 0, 3),
        ("c", "first column (and last): 6 taps, three runs of 2 C", 0, 3, 1, 3),
        ("b", "corners: 4 taps, two runs of 2 C", 1, 3, 1, 3),
    ]
    for number, (name, text, r, r_end, s, s_end) in enumerate(rows):
        y = 40 + 60 * number
        f.grid(
            left,
            y,
            3,
            3,
            15,
            lambda i, j, n=name, a=r, b=r_end, c=s, d=s_end: (
                n if a <= i < b and c <= j < d else "none"
            ),
        )
        f.text(left + 62, y + 27, text)
    return f


def wgrad():
    f = Figure("wgrad", "The filter gradient: a fixed partition of the pixels", 720, 350)
    f.heading(20, 26, "all output pixels of the batch, cut by the shapes alone")
    for i, color in enumerate("abcd"):
        f.box(20 + 170 * i, 40, 168, 34, color, f"part {i}")
        for block in range(4):
            f.box(20 + 170 * i + 42 * block, 80, 42, 24, color, "block")
        f.arrow((104 + 170 * i, 106), (104 + 170 * i, 166))
        f.box(20 + 170 * i, 168, 168, 34, color, f"sum {i} of all taps")
        f.line((104 + 170 * i, 202), (104 + 170 * i, 226))
    f.soft(112, 130, "pack dy (mask, bias),")
    f.soft(112, 147, "then tiles of taps")
    f.arrow((104, 226), (104, 244))
    f.line((104, 226), (614, 226))
    f.box(20, 246, 678, 34, "plain", "sum 0 + sum 1 + sum 2 + sum 3, in this order")
    f.soft(
        20,
        308,
        "Any thread may take any task (a part, a group of tiles, a panel of channels). Which",
    )
    f.soft(20, 326, "one does changes no bit: the cut and the order of additions are fixed.")
    return f


def winograd():
    f = Figure("winograd", "Winograd, one block of tiles at a time", 720, 390)
    f.heading(20, 26, "F(4 x 4, 3 x 3)")
    f.grid(20, 40, 6, 6, 20, lambda i, j: "a" if 1 <= i <= 4 and 1 <= j <= 4 else "plain")
    f.soft(20, 180, "6 x 6 of the source")
    f.soft(20, 197, "make 4 x 4 outputs")

    f.box(190, 40, 150, 120, "a", "transform inputs\nof a block of tiles\n(B^T d B)")
    f.arrow((144, 100), (186, 100))
    f.soft(192, 180, "36 matrices: tiles x C")
    f.soft(192, 197, "stay in the L2 cache")

    f.arrow((340, 100), (376, 100))
    f.box(380, 40, 130, 120, "c", "36 products,\none a point:\nthe tile of the\nimplicit GEMM")
    f.box(380, 216, 130, 60, "b", "filters: G g G^T,\nonce a call")
    f.arrow((445, 216), (445, 164))
    f.soft(380, 296, "[panel][point][C][K]")

    f.arrow((510, 100), (546, 100))
    f.box(550, 40, 150, 120, "d", "transform back\n(A^T m A), add bias,\nReLU, 2 x 2 maximum")
    f.soft(550, 180, "4 x 4 of the output")

    f.box(182, 30, 526, 178, "none", kind="dashed")
    f.soft(190, 232, "one task: a block,")
    f.soft(190, 249, "panel after panel of K")
    f.text(
        20,
        336,
        "Multiplications a channel: 36 for 16 outputs, where the direct sum has 144 (F(4 x 4));",
    )
    f.text(20, 354, "16 for 4 outputs, where it has 36 (F(2 x 2)).")
    f.soft(
        20,
        376,
        "The transforms are the price: one of an input tile serves all K, one of an output tile all C.",
    )
    return f


def small_channel():
    f = Figure("small_channel", "First layers: strips and sums along K", 720, 330)
    f.heading(20, 26, "fprop: a strip of input rows, copied with its padding")
    f.grid(
        20,
        40,
        5,
        14,
        22,
        lambda i, j: (
            "none" if j in (0, 13) or i == 0 else "a" if i == 2 and 3 <= j <= 6 else "plain"
        ),
    )
    f.soft(20, 170, "Output pixels of a row are evenly spaced: one address")
    f.soft(20, 187, "and a step serve all of a tile. C = 1: a cell is one float.")
    f.box(390, 40, 150, 26, "b", "filter row, K lanes")
    for i in range(4):
        f.box(390, 80 + 24 * i, 150, 24, "c", f"pixel {i}: K sums")
    f.arrow((330, 96), (386, 96))
    f.soft(550, 96, "broadcast x[i * step]")
    f.soft(550, 113, "+ offset(tap)")

    f.heading(20, 226, "dgrad: lanes along K, the sum's own axis")
    f.box(20, 240, 200, 28, "d", "dy of a pixel, K lanes")
    f.box(20, 276, 200, 28, "b", "filter of channel c, K lanes")
    f.soft(234, 264, "multiply; add up")
    f.soft(234, 300, "over taps and K")
    f.arrow((230, 276), (410, 276))
    f.box(414, 256, 120, 40, "c", "a sum of K lanes")
    f.arrow((534, 276), (574, 276))
    f.box(578, 256, 120, 40, "a", "one float of dx")
    f.soft(414, 318, "lanes are added up once, at the end")
    return f


def lanes():
    f = Figure("lanes", "Depthwise: taps in registers, the source slides by", 720, 330)
    f.heading(20, 26, "one filter row of 3 taps, tile of 4 output pixels, 16 channels a vector")
    f.soft(20, 64, "source")
    for j in range(6):
        f.box(90 + 100 * j, 44, 92, 32, "a", f"x{j}")
    f.soft(20, 184, "sums")
    for j in range(4):
        f.box(190 + 100 * j, 164, 92, 32, "c", f"y{j}")
        for tap in range(3):
            f.line((136 + 100 * (j + tap), 76), (216 + 20 * tap + 100 * j, 164))
    f.soft(20, 236, "taps")
    for tap in range(3):
        f.box(90 + 100 * tap, 216, 92, 32, "b", f"w{tap}")
    f.soft(400, 237, "all in registers: 4 sums, 3 taps")
    f.soft(
        20,
        278,
        "Each source vector is loaded once and meets up to 3 sums. Lane l is channel l; with",
    )
    f.soft(
        20,
        295,
        "several channels a group, a permutation brings each lane the channel of its group.",
    )
    f.soft(20, 312, "wgrad is the same walk: the taps are the sums, dy stands where y does.")
    return f


def pooling():
    f = Figure("pooling", "Pooling backward: every input pixel asks the windows above it", 720, 330)
    f.heading(20, 26, "3 x 3 windows, stride 2: input")
    f.grid(20, 40, 5, 5, 40, lambda i, j: "d" if i in (2, 3) and j in (2, 3) else "plain")
    for i in range(2):
        for j in range(2):
            f.box(22 + 80 * j, 42 + 80 * i, 116, 116, "", kind="thick")
    f.soft(20, 262, "Two by two pixels lie under four")
    f.soft(20, 279, "windows, each loaded once.")

    f.heading(290, 26, "what each of the four pixels adds, in this order")
    rows = [
        "window NW at tap 8, NE at 6, SW at 2, SE at 0",
        "NE at tap 7, SE at 1",
        "SW at tap 5, SE at 3",
        "SE at tap 4",
    ]
    for i, row in enumerate(rows):
        f.box(290, 42 + 36 * i, 28, 28, "d", str(i))
        f.text(330, 61 + 36 * i, row)
    f.mono(290, 212, "max: dy where the argmax is this tap, else 0")
    f.mono(290, 232, "avg: dy / (taps inside the image)")
    f.soft(290, 262, "Nobody scatters, so there are no atomics,")
    f.soft(290, 279, "and the order of additions is fixed.")
    f.soft(
        20,
        314,
        "Vectors run along the channels: each number above is a vector of 16 (AVX-512) or 8.",
    )
    return f


FIGURES = (flow, indirect, regions, wgrad, winograd, small_channel, lanes, pooling)


def main():
    for make in FIGURES:
        figure = make()
        (HERE / f"{figure.name}.svg").write_text(figure.svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
