"""Tables of committed results: ``python docs/includes/results.py`` rewrites those named in TABLES."""

import itertools
import json
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

from qpaged.sweep import METRICS, verdict
from qpaged.sweep._numbers import percent, small, whole_percent
from qpaged.sweep.report import cell_text
from qpaged.sweep.results import is_broken, pareto_front

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
BESIDE_EXACT = "int8:token+rotate", "int4+rotate"  # formats shown beside those with exact pages
LOSSES = {
    "attention_kl": "KL of attention with the keys of the cache, nats",
    "key_rms": "Relative RMS error of the keys",
    "output_error": "Relative error of attention with the keys and values of the cache",
}


def metrics():
    """Return the metrics of ``results.json`` as a Markdown table."""
    lines = ["| field | better | meaning |", "|---|---|---|"]
    for metric in METRICS:
        lines.append(f"| `{metric.key}` | {metric.better} | {metric.meaning} |")
    return "\n".join(lines) + "\n"


def sweep():
    """Return ``qpaged sweep --out benchmarks/results/sweep`` as a Markdown table with its figure."""
    results = _swept("sweep")
    lines = [
        f"`qpaged sweep` of {len(results['runs'])} formats and pairs of them: {_conditions(results)}",
        "",
    ]
    lines += _runs(results["runs"])
    lines += ["", "![Mean KL against bytes per token, with the Pareto front](assets/frontier.png)"]
    return "\n".join(lines) + "\n"


def sweep_front():
    """Return the verdict and the Pareto front of the same sweep."""
    results = _swept("sweep")
    front = pareto_front(results["runs"])
    lines = [f"> {verdict(results)}", "", *_runs(front), ""]
    lines.append(
        f"The Pareto front of the {len(results['runs'])} in [the whole table]"
        f"(choosing.md#accuracy-against-memory): {_conditions(results)}"
    )
    return "\n".join(lines) + "\n"


def real_models():
    """Return what ``benchmarks/real_models.py`` measured of whole sequences, as Markdown tables."""
    return _real_tables(lambda run: run["skip_first"] == 0 and run["bits_packed"] <= 16)


def real_models_further_in():
    """Return what ``benchmarks/real_models.py`` measured behind the first tokens, as Markdown tables."""
    return _real_tables(lambda run: run["skip_first"] > 0)


def _real_tables(is_shown):
    """Return the runs that are shown, model by model."""
    results = json.loads((RESULTS / "real_models.json").read_text())
    runs = list(filter(is_shown, results["runs"]))
    newest = max(run["date"] for run in runs)
    versions = runs[-1]["versions"]
    sources = ", ".join(text["source"] for text in results["texts"].values())
    lines = []
    for name, model in results["models"].items():
        of_model = [run for run in runs if run["model"] == name]
        lines += [
            f"**{name}**, {model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}:",
            "",
            "| format | tokens a page | bits | KL | 99 % | same top-1 | bits at 1k, 8k, 32k |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *map(_real_row, sorted(of_model, key=lambda run: (-round(run["bits_packed"]), run["kl_mean"]))),
            "",
        ]
    first, context = runs[0]["skip_first"], runs[0]["context"]
    positions = f", from token {first:,} on" if first else ""
    lines.append(
        f"`benchmarks/real_models.py`: {runs[0]['sequences']} sequences of {context:,} tokens of {sources}"
        f"{positions}; KL in nats a token to a plain float32 cache of the same weights, with standard errors "
        f"over parts of the text, and the KL that one token in a hundred exceeds. Bits are of a value in "
        f"packed pages, and of the whole cache of one sequence of so many tokens, exact pages included. "
        f"jax {versions['jax']} on CPU, {newest}."
    )
    return "\n".join(lines) + "\n"


def real_models_by_position():
    """Return the KL of exact formats by position, beside that of two others, as Markdown tables."""
    results = json.loads((RESULTS / "real_models.json").read_text())
    lines = []
    for name in results["models"]:
        runs = [run for run in results["runs"] if run["model"] == name and run["skip_first"] == 0]
        shown = [run for run in runs if "+exact" in run["format"] or run["format"] in BESIDE_EXACT]
        context = shown[0]["context"]
        part = context // len(shown[0]["kl_by_position"])
        ends = [part * 2**i for i in range((context // part).bit_length())]
        lines += [
            f"**{name}**, mean KL of the tokens at these positions:",
            "",
            "| format | tokens a page | "
            + " | ".join(f"{a:,} to {b - 1:,}" for a, b in itertools.pairwise([0, *ends]))
            + " |",
            f"|---|--:|{'--:|' * len(ends)}",
        ]
        for run in sorted(shown, key=lambda run: (-round(run["bits_packed"]), run["kl_mean"])):
            parts = [run["kl_by_position"][a // part : b // part] for a, b in itertools.pairwise([0, *ends])]
            cells = " | ".join(small(statistics.mean(of_part)) for of_part in parts)
            lines.append(f"| `{run['format']}` | {run['page_size']} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def _real_row(run):
    whole = ", ".join(f"{bits:.2f}" for bits in run["bits"].values())
    page = run["page_size"] if run["engine"] == "qpaged" else ""
    name = f"`{run['format']}`" if run["engine"] == "qpaged" else f"{run['engine']}: {run['format']}"
    broken = ", broken" if is_broken(run) else ""
    kl = f"{small(run['kl_mean'], run['kl_mean_se'])} | {small(run['kl_p99'])}"
    top = percent(run["same_top"])
    return f"| {name}{broken} | {page} | {run['bits_packed']:.2f} | {kl} | {top} | {whole} |"


def tune():
    """Return each choice in ``benchmarks/results/tune_...`` as a Markdown table, beside the best others."""
    lines = []
    for name in ("tune_5", "tune_6"):
        results = _swept(name)
        search = results["tune"]
        _, *uniform_runs, choice = results["runs"]
        affordable = [run for run in uniform_runs if run["bits_per_element"] <= search["bits"]]
        closest = sorted(affordable, key=lambda run: run["kl_mean"])[:4]
        lines += [
            f"`qpaged tune --bits {search['bits']:g}` on the bundled model:",
            "",
            f"> {search['verdict']}",
            "",
            "| layer | keys | values |",
            "|--:|---|---|",
            *(f"| {i} | `{key}` | `{value}` |" for i, (key, value) in enumerate(search["layers"])),
            "",
            *_runs([choice, *closest]),
            "",
        ]
    results = _swept("tune_5")
    lines.append(
        f"The choice, and the best of the formats within as many bits that are the same in all layers: "
        f"{_conditions(results)}"
    )
    return "\n".join(lines) + "\n"


def _swept(name):
    return json.loads((RESULTS / name / "results.json").read_text())


def _conditions(results):
    """Say what a sweep was measured on."""
    model, text, environment = results["model"], results["text"], results["environment"]
    return (
        f"the {model['name']} ({model['parameters']:,} weights, head size {model['head_dim']}) on "
        f"{results['runs'][0]['tokens']:,} bytes of {text['source']}, jax {environment['jax']} on CPU, "
        f"{environment['date'][:10]}. KL is in nats a token, against a plain float32 cache; "
        f"\u00b1 are standard errors."
    )


def _runs(runs):
    """Return the lines of a Markdown table of runs, with the metrics that are meant for the documentation."""
    shown = [metric for metric in METRICS if metric.table is not None and metric.table.in_docs]
    headings = [metric.table.one_line_heading for metric in shown]
    lines = [f"| format | {' | '.join(headings)} |", f"|---|{'--:|' * len(shown)}"]
    for run in runs:
        cells = [cell_text(metric, run, with_error=True) for metric in shown]
        lines.append(f"| `{run['format']}` | {' | '.join(cells)} |")
    return lines


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


def exact_pages():
    """What ``benchmarks/exact_pages.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "exact_pages.json").read_text())
    shape = results["shape"]
    lines = [
        f"`benchmarks/exact_pages.py`: one layer, {shape['batch']} sequences of up to {shape['length']:,} "
        f"tokens, {shape['q_heads']} query heads over {shape['kv_heads']} KV heads, head size "
        f"{shape['head_dim']}, pages of {shape['page_size']}: milliseconds, median of {results['rounds']} "
        f"rounds, jax {results['versions']['jax']} on CPU, {results['date']}; in brackets, times as long as "
        f"without exact pages. Temporaries in MB at 512 pages, and at 32,768.",
        "",
        "| format | write | attention | write and attention | temporaries |",
        "|---|--:|--:|--:|--:|",
    ]
    for without, run in zip(results["runs"][::2], results["runs"][1::2], strict=True):
        for shown, base in ((without, None), (run, without["milliseconds"])):
            cells = [_beside(took, base and base[kind]) for kind, took in shown["milliseconds"].items()]
            megabytes = ", ".join(f"{size / 1e6:.1f}" for size in shown["temp_size_in_bytes"].values())
            lines.append(f"| `{shown['format']}` | {' | '.join(cells)} | {megabytes} |")
    return "\n".join(lines) + "\n"


def _beside(took, base):
    return f"{took:.2f}" if base is None else f"{took:.2f} ({took / base:.2f})"


def write_attend():
    """What ``benchmarks/write_attend.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "write_attend.json").read_text())
    shape, plain = results["shape"], results["runs"][0]["milliseconds"]
    lines = [
        f"`benchmarks/write_attend.py`: one layer, {shape['batch']} sequences of {shape['length']} tokens, "
        f"{shape['q_heads']} query heads over {shape['kv_heads']} KV heads, head size {shape['head_dim']}, "
        f"bfloat16: milliseconds, median of {results['rounds']} rounds, jax {results['versions']['jax']} on "
        f"CPU, {results['date']}; in brackets, times as long as plain bfloat16. Formats with one option at "
        "most; the file of results has all.",
        "",
        f"| format | bits | decode write | prefill of {shape['prompt']} | decode attention |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        if run["format"].count(":") + run["format"].count("+") > 1:
            continue
        cells = [f"{took:.2f} ({took / plain[name]:.2f})" for name, took in run["milliseconds"].items()]
        lines.append(f"| `{run['format']}` | {run['bits']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cpu_attention():
    """What ``benchmarks/cpu_attention.py`` left, as Markdown with its figure."""
    results = json.loads((RESULTS / "cpu_attention.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    has = ", ".join(results["processor"]["has"]) or "none of VNNI, bfloat16 and AMX instructions"
    names = list(results["shapes"])
    lines = [
        f"{results['date']}, {results['processor']['name']} ({has}), {results['threads']} threads, memory "
        f"read at {results['bytes_per_second'] / 1e9:.1f} GB/s: {versions}.",
        "",
        "![Milliseconds of a decode step, and what memory alone would take](assets/roofline_cpu.png)",
        "",
        f"Milliseconds, median of {results['sittings']} times {results['rounds']} rounds in which all take "
        f"turns; the error is the largest against float64 at `{names[0]}`, over the largest output.",
        "",
        f"| | {' | '.join(f'`{name}`' for name in names)} | error |",
        f"|---|{'--:|' * (len(names) + 1)}",
    ]
    found = {name: {run["name"]: run for run in runs} for name, runs in results["shapes"].items()}
    for name, run in found[names[0]].items():
        cells = [f"{found[at][name]['milliseconds']:.1f}" if name in found[at] else "" for at in names]
        lines.append(f"| {name} | {' | '.join(cells)} | {run['error']:.1e} |")
    return "\n".join(lines) + "\n"


def gpu_compile():
    """What ``benchmarks/gpu_compile.py`` left of ``xla``, as a Markdown table."""
    results = json.loads((RESULTS / "gpu_compile.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {results['device']}: {versions}.",
        "",
        "| | format | launches | bytes moved, of the live codes | temporaries, of the live codes |",
        "|---|---|--:|--:|--:|",
    ]
    shapes = list(dict.fromkeys(run["shape"] for run in results["runs"]))
    for run in sorted(results["runs"], key=lambda run: shapes.index(run["shape"])):
        if run["kernel"] == "qpaged by xla":
            moved, temporaries = run["bytes"] / run["live"], run["temp"] / run["live"]
            cells = (
                run["shape"],
                f"`{run['format']}`",
                str(run["launches"]),
                f"{moved:.1f}",
                f"{temporaries:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_attention():
    """What ``benchmarks/gpu_attention.py`` left, as Markdown tables."""
    path = RESULTS / "gpu_attention.json"
    return gpu_table(json.loads(path.read_text())) if path.exists() else "No GPU has been measured yet.\n"


def gpu_table(results):
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    names = list(results["shapes"])
    lines = [
        f"{results['date']}, {results['device']}, a copy reads and writes "
        f"{results['bytes_per_second'] / 1e12:.2f} TB/s: {versions}.",
        "",
        f"Milliseconds of a decode step, median of {results['rounds']} rounds in which all take turns, and "
        "in brackets the share of that copy's speed at which keys and values are read; the error is the "
        f"largest against float32 at `{names[0]}`, over the largest output.",
        "",
        f"| | {' | '.join(f'`{name}`' for name in names)} | error |",
        f"|---|{'--:|' * (len(names) + 1)}",
    ]
    found = {name: {run["name"]: run for run in runs} for name, runs in results["shapes"].items()}
    refused = {}
    for name in dict.fromkeys(name for runs in found.values() for name in runs):
        runs = [found[at].get(name, {}) for at in names]
        reasons = [run["refused"] for run in runs if "refused" in run]
        if reasons:
            refused[name] = reasons[0]
        if any("milliseconds" in run for run in runs):
            errors = [f"{run['error']:.1e}" for run in runs[:1] if "error" in run]
            lines.append(f"| {name} | {' | '.join(map(_milliseconds, runs))} | {''.join(errors)} |")
    lines += ["", "| aim | at least | found | |", "|---|--:|--:|---|"]
    for aim in results["targets"]:
        reached = "" if aim["found"] is None else f"{aim['found']:.2f}"
        met = "not measured" if aim["found"] is None else "met" if aim["met"] else "**missed**"
        lines.append(f"| {aim['what']} | {aim['at least']:.2f} | {reached} | {met} |")
    lines += ["", *(f"- {name}: {why}" for name, why in refused.items())]
    return "\n".join(lines).rstrip("\n") + "\n"


def _milliseconds(run):
    return f"{run['milliseconds']:.3f} ({run['of_bandwidth']:.0%})" if "milliseconds" in run else ""


def ragged():
    """What ``benchmarks/ragged.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "ragged.json").read_text())
    shape, formats = results["shape"], list(dict.fromkeys(run["format"] for run in results["runs"]))
    lines = [
        f"`benchmarks/ragged.py`: one layer, {shape['q_heads']} query heads over {shape['kv_heads']} KV "
        f"heads, head size {shape['head_dim']}, pages of {shape['page_size']}: milliseconds of attention, "
        f"median of {results['rounds']} rounds, jax {results['versions']['jax']} on CPU, {results['date']}; "
        "in brackets, times as long as a call for each prompt and one for all decodes.",
        "",
        f"| batch | {' | '.join(f'`{name}`' for name in formats)} |",
        f"|---|{'--:|' * len(formats)}",
    ]
    batches: dict[str, list[str]] = {}
    for run in results["runs"]:
        took = run["milliseconds"]["ragged"]
        batches.setdefault(run["batch"], []).append(f"{took:.0f} ({run['ratio']:.2f})")
    lines += [f"| {batch} | {' | '.join(cells)} |" for batch, cells in batches.items()]
    return "\n".join(lines) + "\n"


def save_load():
    """What ``benchmarks/save_load.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "save_load.json").read_text())
    lines = [
        f"`benchmarks/save_load.py`, {results['date']}: megabytes a second, beside files of the same sizes "
        "that are written and read as they are, from the system's memory; and the memory that a save takes "
        "beyond the cache.",
        "",
        "| format | bytes | save | write files | load | read files | memory to save |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        speeds = [
            f"{run['bytes'] / run['seconds'][name] / 1e6:,.0f}" for name in ("save", "write", "load", "read")
        ]
        total, memory = (f"{size / 1e6:,.0f} MB" for size in (run["bytes"], run["memory"]["save"]))
        lines.append(f"| `{run['format']}` | {' | '.join([total, *speeds, memory])} |")
    return "\n".join(lines) + "\n"


def packing():
    """What ``benchmarks/packing.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "packing.json").read_text())
    lines = [
        "`benchmarks/packing.py`: pages of 64 slots of 8 KV heads of 128, quantized whole, and a decode step "
        "of 8 sequences of 4,096 tokens with 32 query heads, on two cores; "
        f"jax {results['versions']['jax']}, {results['date']}:",
        "",
        "| format | million elements a second, quantized | milliseconds of the decode step |",
        "|---|--:|--:|",
    ]
    for run in results["runs"]:
        packed, read = run.get("elements_per_second"), run.get("milliseconds")
        rate = "" if packed is None else f"{packed / 1e6:,.1f}"
        step = "" if read is None else f"{read:.1f}"
        lines.append(f"| `{run['format']}` | {rate} | {step} |")
    return "\n".join(lines) + "\n"


def rotary_keys():
    """What ``benchmarks/rotary_keys.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "rotary_keys.json").read_text())
    runs = results["runs"]
    lines = [
        f"`benchmarks/rotary_keys.py`: keys alone, {len(runs[0]['kl']['after'])} sequences of "
        f"{results['context']:,} tokens, KL over positions from {results['from']:,} on, pages of "
        f"{results['page_size']}, the last {results['tail']} tokens and the first page exact, "
        f"{results['date']}:",
        "",
        "| model | keys | KL, quantized after the embedding | before it | ratio |",
        "|---|---|--:|--:|--:|",
    ]
    for run in runs:
        after, before = (small(statistics.fmean(run["kl"][name])) for name in ("after", "before"))
        ratio = f"{run['ratio']:.2f} ± {run['ratio'] * run['ratio_log_se']:.2f}"
        lines.append(f"| {run['model']} | `{run['format']}` | {after} | {before} | {ratio} |")
    return "\n".join(lines) + "\n"


def needles():
    """What ``benchmarks/needles.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "needles.json").read_text())
    runs = results["runs"]
    lengths = sorted({run["length"] for run in runs})
    texts, depths = len(runs[0]["found_by_text"]), len(runs[0]["by_depth"])
    lines = [
        f"`benchmarks/needles.py`, {results['date']}: found of {texts * depths} numbers at each length, "
        f"pages of {results['page_size']}, ± one standard error over {texts} texts:",
        "",
        f"| model | format | {' | '.join(f'{length:,} tokens' for length in lengths)} |",
        f"|---|---|{'--:|' * len(lengths)}",
    ]
    by_format = {}
    for run in runs:
        of_format = by_format.setdefault((run["model"], run["format"]), {})
        of_format[run["length"]] = whole_percent(run["found"], run["found_se"])
    for (model, name), cells in by_format.items():
        lines.append(f"| {model} | `{name}` | {' | '.join(cells.get(length, '') for length in lengths)} |")
    return "\n".join(lines) + "\n"


def tune_models():
    """What ``benchmarks/tune_models.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "tune_models.json").read_text())
    exact = results["exact"]
    lines = [
        f"`benchmarks/tune_models.py`, {results['date']}: {results['sequences']} sequences of "
        f"{results['context']:,} tokens, one to choose by and the others to verify, pages of "
        f"{results['page_size']}, `{exact}` everywhere; bits of sequences of {results['bits_at']:,} tokens:",
        "",
        "| model | bits, at most | best pair in all layers | bits | KL | by layer: bits | KL | better |",
        "|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for run in results["runs"]:
        uniform, by_layer = (
            f"{each['bits_per_element']:.2f} | {small(each['kl_mean'], each['kl_mean_se'])}"
            for each in run["runs"]
        )
        name = run["runs"][0]["format"].replace(exact, "")
        better = "yes" if run["better"] else "within the errors"
        lines.append(f"| {run['model']} | {run['bits']:g} | `{name}` | {uniform} | {by_layer} | {better} |")
    return "\n".join(lines) + "\n"


def latent_attention():
    """What ``benchmarks/latent_attention.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "latent_attention.json").read_text())
    lines = [
        "`benchmarks/latent_attention.py`: a random model of DeepSeek-V2's form, "
        f"{results['tokens']} tokens, transformers {results['versions']['transformers']}, {results['date']}; "
        "KL is mean nats a token, from the model's own attention, with its standard error:",
        "",
        "| format | bytes of a token and layer | KL | largest difference of a log-probability |",
        "|---|--:|--:|--:|",
    ]
    for run in results["runs"]:
        kl = f"{run['kl']:.1e} ± {run['kl_error']:.0e}"
        difference = f"{run['largest_difference']:.1e}"
        name = "`plain`, float32" if run["format"] == "plain" else f"`{run['format']}`"
        lines.append(f"| {name} | {run['bytes_per_token']:,.0f} | {kl} | {difference} |")
    return "\n".join(lines) + "\n"


def engine_levanter():
    """What ``benchmarks/engines/levanter_engine.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "engine_levanter.json").read_text())
    lines = [
        f"`benchmarks/engines/levanter_engine.py`: levanter {results['versions']['levanter']}, an adapter of "
        f"{results['adapter_lines']} lines, {results['model']} in float32, {results['generated']} tokens "
        f"after each of eight prompts, {results['date']}. The same tokens are those of levanter's own pages. "
        "KL is mean nats a token, from these, over the texts that they give. These are shorter than 128 "
        "tokens: pages with exact128 hold them as they were written.",
        "",
        "| pages | same tokens | KL | bytes | sequences of 512 tokens in 1 GiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        cells = [
            f"{run['same_tokens']:.1%}",
            f"{run['kl']:.1e} ± {run['kl_error']:.0e}",
            f"{run['bytes'] / 1e6:,.1f} MB",
            f"{run['sequences_in_a_gibibyte']:,}",
        ]
        lines.append(f"| {run['pages']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def engine_jax_llm_examples():
    """What ``benchmarks/engines/jax_llm_examples.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "engine_jax_llm_examples.json").read_text())
    lines = [
        f"`benchmarks/engines/jax_llm_examples.py`: an adapter of {results['adapter_lines']} lines, "
        f"{results['model']} in float32, {results['generated']} tokens after each of eight prompts, jax "
        f"{results['versions']['jax']} on CPU, {results['date']}. The model's norms round to bfloat16, which "
        "makes other tokens of the last bit of a sum: in the first rows they do not. KL is of the model's "
        "predictions along these answers, to those on plain pages.",
        "",
        "| cache that it decodes on | norms | same tokens | KL | bytes | sequences of 256 tokens in 1 GiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for run in results["runs"]:
        size = f"{run['bytes'] / 1e6:,.1f} MB"
        fits = f"{run['sequences_in_a_gibibyte']:,}"
        norms = "bfloat16" if run["norms_round"] else "float32"
        kl = "" if run["kl"] is None else f"{run['kl'][0]:.4f} ± {run['kl'][1]:.4f}"
        lines.append(f"| {run['pages']} | {norms} | {run['same_tokens']:.1%} | {kl} | {size} | {fits} |")
    return "\n".join(lines) + "\n"


def serving():
    """What ``benchmarks/serving.py`` left, as a Markdown table of all formats together."""
    results = json.loads((RESULTS / "serving.json").read_text())
    formats = list(dict.fromkeys(f"`{run['format']}`" for run in results["runs"]))
    total = Counter()
    for run in results["runs"]:
        total.update(run["done"])
    lines = [f"{', '.join(formats)}; {results['date']}:", "", "| what | how often |", "|---|--:|"]
    lines += [f"| {what} | {count:,} |" for what, count in sorted(total.items(), key=lambda item: -item[1])]
    return "\n".join(lines) + "\n"


def generation():
    """What ``benchmarks/cpu_attention.py`` left of compilations, as a Markdown table."""
    results = json.loads((RESULTS / "cpu_attention.json").read_text())
    lines = [
        "| format | seconds to compile a step | programs: prompts | the first step | 63 more steps |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in results["generation"]:
        programs = " | ".join(map(str, run["programs"].values()))
        lines.append(f"| `{run['name']}` | {run['step_compile_seconds']:.2f} | {programs} |")
    return "\n".join(lines) + "\n"


def _temporaries_at_two_sizes(results, pages):
    """What the columns of a table of temporaries are."""
    small, large = (f"{count:,}" for count in results["shape"]["pages"])
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "libtpu"))
    return f"Temporaries in MB at {small} {pages}, and at {large} in brackets. {versions}, {results['date']}."


def tpu_scan():
    """What ``benchmarks/tpu_scan.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "tpu_scan.json").read_text())
    chips = list(dict.fromkeys(run["chip"] for run in results["runs"]))
    lines = [
        _temporaries_at_two_sizes(results, "pages a layer"),
        "",
        f"| format | {' | '.join(f'{chip}: one pool | stacked' for chip in chips)} |",
        f"|---|{'--:|' * 2 * len(chips)}",
    ]
    for format in dict.fromkeys(run["format"] for run in results["runs"]):
        cells = []
        for run in results["runs"]:
            if run["format"] == format:
                cells.append(f"{run['flat'] / 1e6:.1f} ({run['flat_large'] / 1e6:.1f})")
                cells.append(f"{run['stacked'] / 1e6:.1f}")
        lines.append(f"| `{format}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scale():
    """What ``benchmarks/scale.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "scale.json").read_text())
    shape, planned = results["shape"], results["planned"]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "libtpu"))
    lines = [
        f"Of one chip: temporaries in MB, kernels and collectives of a layer. A group has {shape['pages']:,} "
        f"pages of each layer and {shape['sequences']} sequences; the cache of a chip takes "
        f"{planned / 1e6:.1f} MB, as planned. {versions}, {results['date']}.",
        "",
        "| pod | devices | step | temporaries | kernels | collectives |",
        "|---|--:|---|--:|--:|---|",
    ]
    for run in results["runs"]:
        found = ", ".join(f"{count} {kind}" for kind, count in run["collectives"].items()) or "none"
        cells = run["devices"], run["style"], f"{run['temp'] / 1e6:,.1f}", run["kernels"], found
        lines.append(f"| {run['pod']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def tpu_interleaved():
    """What ``benchmarks/tpu_interleaved.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / "tpu_interleaved.json").read_text())
    chips = list(dict.fromkeys(run["chip"] for run in results["runs"]))
    lines = [
        _temporaries_at_two_sizes(results, "pages"),
        "",
        f"| pool of | {' | '.join(f'{chip}: attention | write' for chip in chips)} |",
        f"|---|{'--:|' * 2 * len(chips)}",
    ]
    for stored in dict.fromkeys(run["stored"] for run in results["runs"]):
        cells = []
        for run in results["runs"]:
            if run["stored"] == stored:
                for kind in ("attention", "write"):
                    cells.append(f"{run[kind] / 1e6:.2f} ({run[f'{kind}_large'] / 1e6:.2f})")
        lines.append(f"| {stored} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tpu_ragged():
    """What ``benchmarks/tpu_compile.py --ragged`` left, as a Markdown table."""
    return tpu_compile("tpu_ragged.json")


def tpu_compile(name="tpu_compile.json"):
    """What ``benchmarks/tpu_compile.py`` left, as a Markdown table."""
    results = json.loads((RESULTS / name).read_text())
    chips = list(dict.fromkeys(run["chip"] for run in results["runs"]))
    small, large = (f"{pages:,}" for pages in results["shape"]["pages"])
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "libtpu"))
    lines = [
        f"Temporaries in MB at {small} pages, and at {large} in brackets; bytes that attention copies from "
        f"memory, over codes and scales of the live pages. {versions}, {results['date']}.",
        "",
        f"| kernel | copied | {' | '.join(f'{chip}: attention | write' for chip in chips)} |",
        f"|---|--:|{'--:|' * 2 * len(chips)}",
    ]
    found = {}
    for run in results["runs"]:
        found.setdefault((run["kernel"], run["format"]), {})[run["chip"]] = run
    for (kernel, format), runs in found.items():
        cells = [_temporaries(runs[chip].get(kind)) for chip in chips for kind in ("attention", "write")]
        run = next(iter(runs.values()))
        pages = "" if run["page_size"] == 16 else f", pages of {run['page_size']}"
        copied = "" if run["attention"]["copied"] is None else f"{run['attention']['copied']:.2f}"
        lines.append(f"| {kernel} `{format}`{pages} | {copied} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _temporaries(run):
    return "" if run is None else f"{run['temp'] / 1e6:.1f} ({run['temp_large'] / 1e6:.1f})"


PROMISES = {
    "no float of an array's full size": lambda row: row["full_size_floats"] == 0,
    "nothing materialized": lambda row: row["materialized"] == 0,
    "one compilation for all steps": lambda row: row["compilations"] == 1,
    "the cache back as the type that it was": lambda row: row["same_type"],
    "donated buffers reused": lambda row: row["buffers_reused"],
}


def adopt():
    """What ``benchmarks/adopt.py`` left for each group of models, as a Markdown table."""
    groups = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("adopt_*.json"))]
    rows = [row for group in groups for row in group["results"]]
    lines = [
        "| model | format | same | KL | bytes, of bfloat16 | ms, float cache | quantized | decoded |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | `{row['format']}` | {row['same_tokens']:.0%} | {max(row['kl_mean'], 0):.0e} "
            f"| {row['ratio_bfloat16']:.3f} "
            f"| {row['ms_float']:.1f} | {row['ms_quantized']:.1f} | {row['ms_materialized']:.1f} |"
        )
    lines.append("")
    for promise, holds in PROMISES.items():
        lines.append(f"- {promise}: in {sum(map(holds, rows))} of the {len(rows)} rows")
    lines.append("")
    for group in groups:
        versions = ", ".join(f"{name} {number}" for name, number in group["versions"].items())
        lines += [f"{group['date']}, {group['device']} ({group['machine']}, two cores): {versions}.", ""]
    return "\n".join(lines)


def stress():
    """What ``benchmarks/stress.py`` left: its cases and its targets, as Markdown tables with their figure."""
    results = json.loads((RESULTS / "stress.json").read_text())
    sizes, versions = results["sizes"], results["versions"]
    lines = [
        f"`benchmarks/stress.py`: {sizes['tokens']} tokens of {sizes['kv_heads']} KV heads with "
        f"{sizes['queries_per_head']} query heads each, head size {sizes['head_dim']}, float32, "
        f"jax {versions['jax']} on CPU, {results['date']}. Entropy is that of plain attention, in nats.",
        "",
        "| case | keys and values | entropy |",
        "|---|---|--:|",
    ]
    lines += [f"| `{name}` | {c['what']} | {c['entropy']:.2f} |" for name, c in results["cases"].items()]
    lines += ["", "| case | loss | of | target | best | |", "|---|---|---|--:|---|---|"]
    lines += [_target(target) for target in results["targets"]]
    lines += ["", "![Attention KL against bits in three of the cases](assets/stress.png)"]
    return "\n".join(lines) + "\n"


def _target(target):
    metric, limit, best = target["metric"], target["limit"], target["best"]
    found = "none"
    if best is not None:
        place = f"pages of {best['page_size']}, {best['key_bits']:.2f} bits"
        found = f"{_loss(metric, best['loss'])}: `{best['format']}`, {place}"
    cells = (
        f"`{target['case']}`",
        LOSSES[metric],
        f"`{target['format']}`" if target["format"] else f"any, at most {target['max_bits']:g} bits",
        "" if limit is None else _loss(metric, limit),
        found,
        {True: "met", False: "**missed**", None: ""}[target["met"]],
    )
    return f"| {' | '.join(cells)} |"


def stress_losses(metric):
    """One loss of ``benchmarks/stress.py`` as a Markdown table; page sizes that read alike share a row."""
    results = json.loads((RESULTS / "stress.json").read_text())
    names = [name for name in results["cases"] if name != "near_zero_as_is"]
    head = ["format", "page size", "bits", *(f"`{name}`" for name in names)]
    lines = [
        f"{LOSSES[metric]}. Bold: nothing of as few bits, to a tenth, is better.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|--:|--:|{'--:|' * len(names)}",
    ]
    rows = {}
    for run in sorted(results["runs"], key=lambda run: (round(_bits(run, metric), 2), run["format"])):
        cells = [_marked(run, name, metric, results["runs"]) for name in names]
        rows.setdefault((run["format"], f"{_bits(run, metric):.2f}", *cells), []).append(run["page_size"])
    for (format, *cells), page_sizes in rows.items():
        lines.append(f"| {' | '.join([f'`{format}`', ', '.join(map(str, page_sizes)), *cells])} |")
    return "\n".join(lines) + "\n"


def _bits(run, metric):
    """Bits an element of what the metric is about: keys, or keys and values."""
    return (run["key_bits"] + run["value_bits"]) / 2 if metric == "output_error" else run["key_bits"]


def _marked(run, case, metric, runs):
    """The loss of a run, bold if none of as few bits has a smaller one."""
    bits, loss = round(_bits(run, metric), 1), run["losses"][case][metric]
    if loss is None:
        return "not finite"
    small = [other["losses"][case][metric] for other in runs if round(_bits(other, metric), 1) <= bits]
    best = min(other for other in small if other is not None)
    return f"**{_loss(metric, loss)}**" if loss == best else _loss(metric, loss)


def _loss(metric, loss):
    if not loss:
        return "0"
    if metric == "attention_kl":
        return f"{loss:.1e}"
    return f"{loss:.2%}" if loss < 0.1 else f"{loss:.0%}"


TABLES = {
    "metrics.md": metrics,
    "adopt.md": adopt,
    "sweep.md": sweep,
    "sweep_front.md": sweep_front,
    "real_models.md": real_models,
    "real_models_further_in.md": real_models_further_in,
    "real_models_by_position.md": real_models_by_position,
    "tune.md": tune,
    "decode_write.md": decode_write,
    "write_attend.md": write_attend,
    "exact_pages.md": exact_pages,
    "cpu_attention.md": cpu_attention,
    "gpu_compile.md": gpu_compile,
    "gpu_attention.md": gpu_attention,
    "generation.md": generation,
    "tpu_compile.md": tpu_compile,
    "tpu_ragged.md": tpu_ragged,
    "tpu_scan.md": tpu_scan,
    "tpu_interleaved.md": tpu_interleaved,
    "scale.md": scale,
    "ragged.md": ragged,
    "needles.md": needles,
    "tune_models.md": tune_models,
    "save_load.md": save_load,
    "latent_attention.md": latent_attention,
    "packing.md": packing,
    "rotary_keys.md": rotary_keys,
    "engine_levanter.md": engine_levanter,
    "engine_jax_llm_examples.md": engine_jax_llm_examples,
    "serving.md": serving,
    "stress.md": stress,
    "stress_attention_kl.md": partial(stress_losses, "attention_kl"),
    "stress_key_rms.md": partial(stress_losses, "key_rms"),
    "stress_output_error.md": partial(stress_losses, "output_error"),
}

if __name__ == "__main__":
    for name, table in TABLES.items():
        (HERE / name).write_text(table())
