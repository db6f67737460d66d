"""Writes the table of laws from the conformance kit: ``python docs/includes/laws.py`` rewrites laws.md."""

from pathlib import Path

from qpaged.testing import LAWS, QuantizerConformance

TABLE = Path(__file__).with_name("laws.md")


def table():
    """Return a Markdown table of each law, the docstrings of its tests in the kit, and what relies on it."""
    lines = ["| law | what the kit tries | what relies on it |", "|---|---|---|"]
    for number, (name, reason) in LAWS.items():
        tests = [test for test in vars(QuantizerConformance) if test.startswith(f"test_law_{number}_")]
        checks = " ".join(getattr(QuantizerConformance, test).__doc__ for test in tests)
        lines.append(f"| {number}.&nbsp;{name} | {checks} | {reason[0].upper()}{reason[1:]}. |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
