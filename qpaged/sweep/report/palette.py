"""The colors of figures, of the report, and of the documentation's charts."""

ACCENT = "#1f4e8c"
"""The Pareto front, and whatever else a chart is about."""

MUTED = "#7a7a7a"
"""Formats that are not on the front, and lines that explain."""

HEAT_MAP = "Blues"
"""Matplotlib's color map for errors by layer."""

CURVES = 6
"""Number of colors for curves, ``c0`` to ``c5``."""

LIGHT = {
    "paper": "#fff", "ink": "#1c2128", "soft": "#59636e", "line": "#d5dae0", "wash": "#f4f6f8",
    "accent": ACCENT, "heat": "#6ba3e2", "warn": "#9a5b00", "warn-wash": "#fff6e5",
    "c0": ACCENT, "c1": "#b5480f", "c2": "#00735c", "c3": "#8a3a84", "c4": "#7a6400", "c5": "#a3263a",
}  # fmt: skip
"""The report's colors on a light screen and in print, by the name of their CSS variable."""

DARK = {
    "paper": "#12161b", "ink": "#e3e8ee", "soft": "#9aa5b1", "line": "#343c46", "wash": "#1b2129",
    "accent": "#82b4f2", "heat": "#2c5f9f", "warn": "#f0b860", "warn-wash": "#2b2210",
    "c0": "#82b4f2", "c1": "#f29a5f", "c2": "#4fc7a8", "c3": "#d894d2", "c4": "#d3bb55", "c5": "#f08a98",
}  # fmt: skip
"""The report's colors on a dark screen: the same names, lighter where paper is dark."""


def css_variables(colors: dict[str, str]) -> str:
    """Return colors as declarations of CSS variables."""
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
