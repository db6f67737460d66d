"""Tables of committed results: ``python docs/includes/results.py`` rewrites sweep.md and decode_write.md."""

import json
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"


def sweep():
    """What ``qpaged sweep --out benchmarks/results/sweep`` left, as a Markdown table and its figure."""
    results = json.loads((RESULTS / "sweep" / "results.json").read_text())
    model, text, environment = results["model"], results["text"], results["environment"]
    lines = [
        f"`qpaged sweep`, as it comes: the {model['name']} ({model['parameters']:,} weights) on "
        f"{results['settings']['tokens']:,} bytes of {text['source']}, jax {environment['jax']} on CPU, "
        f"{environment['date'][:10]}. KL is in nats a token, against a plain float32 cache.",
        "",
        "| format | bytes per token | ratio | bits per byte | KL mean | KL 99.9 % | top-1 | attn error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        lines.append(
            f"| `{run['format']}` | {run['bytes_per_token']:,.0f} | {run['ratio']:.2f} "
            f"| {run['bits_per_byte']:.4f} | {run['kl_mean']:.1e} | {run['kl_p999']:.1e} "
            f"| {run['same_top']:.2%} | {run['attention_error']:.1%} |"
        )
    lines += ["", "![Mean KL against bytes per token, with the Pareto front](assets/frontier.png)"]
    return "\n".join(lines) + "\n"


def decode_write():
    """What ``benchmarks/decode_write.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "decode_write.json").read_text())
    versions = results["versions"]
    lines = [
        f"One decode write of {results['shape']['rows']} rows, keys and values of a layer, donated: "
        f"microseconds, median of {results['rounds']} rounds, jax {versions['jax']} on CPU, "
        f"{results['date']}.",
        "",
        "| format | 512 pages | 32,768 pages | ratio | temporaries, bytes |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        small, large = run["microseconds"].values()
        lines.append(
            f"| `{run['format']}` | {small} | {large} | {run['ratio']:.2f} | {run['temp_size_in_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


TABLES = {"sweep.md": sweep, "decode_write.md": decode_write}

if __name__ == "__main__":
    for name, table in TABLES.items():
        (HERE / name).write_text(table())
