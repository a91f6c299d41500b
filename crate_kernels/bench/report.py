"""Tables and plots from the committed result files: all of them in docs, a summary in the README.

No number on these pages was typed by hand. Pure functions of the results render the text. Plots need matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..extras import needs
from ..terminal import count
from . import results
from .models import (
    COMPILED,
    OURS,
    OURS_BF16,
    OURS_WITH_MKL,
    PREPARED,
    PREPARED_BF16,
    REFERENCE,
    VIT,
    VIT_COMPILED,
)  # fmt: skip
from .overhead import table as overhead_table

README_MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"
DOCS_MARKERS = "<!-- results:begin -->", "<!-- results:end -->"
OWN = ("cuda", "triton", "cpu", "eager", OURS, OURS_WITH_MKL, PREPARED, OURS_BF16, PREPARED_BF16)
"""The implementations of this package; all others are baselines."""
NO_GPU = "No GPU has been measured yet."

Results = dict[str, dict[str, dict]]


def render(folder: Path, root: Path) -> list[Path]:
    """Write the docs page's results, its plots, and the README's table -> the paths written.

    Args:
        folder: of the result files.
        root: of the checkout, with ``README.md`` and ``docs/benchmarks.md``.
    """
    found = _complete(folder)
    written = []
    docs, readme = root / "docs" / "benchmarks.md", root / "README.md"
    for path, markers, text in ((docs, DOCS_MARKERS, docs_text), (readme, README_MARKERS, readme_text)):
        replaced = between(path.read_text(), markers, text(found))
        if replaced is None:
            raise ValueError(f"{path} has no lines {markers[0]} and {markers[1]}")
        path.write_text(replaced)
        written.append(path)
    for device, parts in found.items():
        written += plots(parts, root / "docs" / "benchmarks" / device)
    return written


def is_checkout(root: Path) -> bool:
    """Whether ``root`` has the pages that hold results."""
    pages = (root / "docs" / "benchmarks.md", DOCS_MARKERS), (root / "README.md", README_MARKERS)
    return all(path.is_file() and between(path.read_text(), markers, "") is not None for path, markers in pages)


def render_page(folder: Path) -> list[Path]:
    """Write the results and their plots as a page beside the result files -> the paths written.

    Args:
        folder: of the result files.
    """
    found, page = _complete(folder), folder / "benchmarks.md"
    page.write_text(f"# Benchmarks\n\n{docs_text(found)}\n")
    written = [page]
    for device, parts in found.items():
        written += plots(parts, folder / "benchmarks" / device)
    return written


def _complete(folder: Path) -> Results:
    """All result files. Raises ValueError if one of them is of a quick run."""
    found = results.read_all(folder)
    for device, parts in found.items():
        for part, content in parts.items():
            if content.get("quick"):
                raise ValueError(f"{folder / device / part}.json is of a quick run; its times have no meaning")
    return found


def between(page: str, markers: tuple[str, str], text: str) -> str | None:
    """``page`` with the text between the markers replaced; None if the markers are missing or in another order."""
    begin, end = page.find(markers[0]), page.find(markers[1])
    if begin < 0 or end < begin:
        return None
    return f"{page[: begin + len(markers[0])]}\n{text.strip()}\n{page[end:]}"


# -- README ----------------------------------------------------------------------------------------------------------


def readme_text(found: Results) -> str:
    """The summary: whole models against the reference equations, in eager mode and under ``torch.compile``."""
    lines = []
    for device, parts in found.items():
        records = timed(parts.get("models", {}).get("records", []))
        rows = []
        low = any(r["implementation"] == PREPARED_BF16 for r in records)
        models = {name: [r for r in records if r["model"] == name] for name in unique(r["model"] for r in records)}
        for model, mine in models.items():
            cells = [_headline(mine, "forward", OURS), _headline(mine, "forward", PREPARED)]
            cells.append(_headline(mine, "training step", OURS))
            if low:
                cells += [_headline(mine, "forward", PREPARED_BF16), _headline(mine, "training step", OURS_BF16)]
            cells.append(_saved([r for r in parts["models"]["records"] if r.get("model") == model]))
            rows.append([model, *cells])
        if not rows:
            continue
        environment = parts["models"]["environment"]
        of_first = next(iter(models.values()))
        batch = _headline_record(of_first, "training step", OURS) or _headline_record(of_first, "forward", OURS)
        about = f"{environment['device']}, torch {environment['versions']['torch']}"
        if device == "cpu":
            about += f", {count(environment['threads'], 'thread')}"
        lines.append(
            "1.5× means: 1.5 times as fast as the reference equations in eager mode. The number in brackets compares"
            " with the same equations under `torch.compile`."
            f" One run measured all of it, on {about}, {records[0]['dtype']}, batch {batch['batch'] if batch else '?'}."
            " Prepared models have called `prepare_for_inference(model)`, which folds each ISTA step into one matrix"
            " and, on a CPU, packs the weights."
            " The last column has the bytes that a layer saves for backward per token-channel: this package / the"
            " reference equations.\n"
        )
        heads = ["", "inference", "inference, prepared", "training step", "saved for backward"]
        if low:
            heads[-1:-1] = ["inference, prepared, bf16 autocast", "training step, bf16 autocast"]
        lines.append(table(heads, rows) + "\n")
        lines.extend(_by_algebra_alone(models.values()))
    if all(device == "cpu" for device in found):
        lines.append(NO_GPU)
    lines.append(
        "[Benchmarks](docs/benchmarks.md) explains how to reproduce every number, and lists where the package is *not*"
        " faster."
    )
    return "\n".join(lines)


def _by_algebra_alone(models: Iterable[list[dict]]) -> list[str]:
    """The speed-up of the backend ``eager`` with MKL's products, if it was measured."""
    spans = []
    for task, name in (("forward", "inference"), ("training step", "training")):
        found = [record for mine in models if (record := _headline_record(mine, task, OURS_WITH_MKL))]
        if found:
            ratios = [record["speedup"]["p50"] for record in found]
            spans.append(f"{name} {min(ratios):.2f}× to {max(ratios):.2f}×")
    return spans and [
        "torch multiplies matrices with MKL, and MKL does not use the AVX-512 instructions of this processor. The"
        f" package's kernels use them. With MKL's products (`{OURS_WITH_MKL}`) only the algebra of the package is left:"
        f" {', '.join(spans)}.\n"
    ]


def _headline_record(records: list[dict], task: str, implementation: str) -> dict | None:
    """The record at the batch with the most images per second. Batches above 1 and records with a compiled baseline
    come first."""
    mine = [r for r in records if r["task"] == task and r["implementation"] == implementation and r.get("speedup")]
    mine = [r for r in mine if r["batch"] > 1] or mine
    mine = [r for r in mine if r.get("speedup_over_compiled")] or mine
    return max(mine, key=lambda r: r["images_per_second"], default=None)


def _headline(records: list[dict], task: str, implementation: str) -> str:
    record = _headline_record(records, task, implementation)
    if record is None:
        return "–"
    text = f"{record['speedup']['p50']:.2f}×"
    if record.get("speedup_over_compiled"):
        text += f" ({record['speedup_over_compiled']['p50']:.2f}×)"
    return text


def _saved(records: list[dict]) -> str:
    saved = {r["implementation"]: r["bytes_per_token_channel"] for r in records if "bytes_per_token_channel" in r}
    return f"{saved[OURS]:.1f} / {saved[REFERENCE]:.1f}" if OURS in saved and REFERENCE in saved else "–"


# -- docs ------------------------------------------------------------------------------------------------------------


def docs_text(found: Results) -> str:
    """For every device: the source of the numbers, models, operators, and where the package is not faster."""
    lines = [] if any(device != "cpu" for device in found) else [f"**{NO_GPU}** All tables below are of CPUs.\n"]
    if not found:
        return NO_GPU
    for device, parts in found.items():
        lines.append(f"### {next(iter(parts.values()))['environment']['device']}\n")
        for part, content in parts.items():
            lines.append(_source(device, part, content))
        if "models" in parts:
            lines += _models_text(parts["models"]["records"], device)
        if "overhead" in parts:
            lines += ["#### Host time of a layer\n", "CPU time of one thread, for one call of a tiny layer.\n"]
            lines.append(overhead_table(parts["overhead"]["records"]) + "\n")
        if "operators" in parts:
            lines += _operators_text(parts["operators"]["records"], device)
        lines += _behind_text(parts)
    return "\n".join(lines)


def _source(device: str, part: str, content: dict) -> str:
    environment, peak_rates = content["environment"], content["peaks"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    driver = (
        f", driver {environment['driver']}"
        if environment.get("driver")
        else f", {count(environment['threads'], 'thread')}"
    )
    if environment.get("load_average"):
        driver += f", load average {environment['load_average']:.1f} at the start"
    source = f"`benchmarks/results/{device}/{part}.json`: commit {environment['commit']}; {versions}{driver}."
    if peak_rates is None:
        return source + "\n"
    products = ", ".join(f"{v / 1e12:.3g} TFLOP/s {k}" for k, v in peak_rates["product"].items())
    return source + f" Measured peaks of that run: copy {peak_rates['copy'] / 1e9:.4g} GB/s, product {products}.\n"


def _models_text(records: list[dict], device: str) -> list[str]:
    lines = ["#### Models\n", f"![speed-up of whole models](benchmarks/{device}/models.svg)\n"]
    rows = []
    for r in timed(records):
        memory = f"{r['peak_memory'] / 2**30:.2f} GiB" if r.get("peak_memory") else "–"
        mode = ", graph" if r.get("graph") else ""
        rows.append(
            [r["model"], r["task"] + mode, r["batch"], r["implementation"], milliseconds(r),
             f"{r['images_per_second']:.4g}", ratio(r.get("speedup")), ratio(r.get("speedup_over_compiled")), memory]
        )  # fmt: skip
    heads = ["model", "task", "batch", "implementation", "ms: p50 (p20–p80)", "images/s"]
    lines.append(table([*heads, "over reference", "over compiled", "peak memory"], rows) + "\n")
    saved = [
        [r["model"], r["implementation"], r["dtype"], f"{r['bytes_per_token_channel']:.1f}"]
        for r in records
        if "bytes_per_token_channel" in r
    ]
    if saved:
        lines.append("Bytes saved for backward by one more block:\n")
        lines.append(table(["model", "backend", "dtype", "bytes per token-channel"], saved) + "\n")
    lengths = [r for r in records if "tokens" in r and (r.get("peak_memory") or r.get("skipped"))]
    if lengths:
        rows = []
        for group in grouped(lengths, lambda r: (r["model"], r["tokens"])):
            by = {r["implementation"]: r.get("skipped") or f"{r['peak_memory'] / 2**30:.2f} GiB" for r in group}
            rows.append([group[0]["model"], group[0]["tokens"], by.get(REFERENCE, "–"), by.get(OURS, "–")])
        lines.append("Peak memory of forward and backward of all blocks, one sequence of N tokens:\n")
        lines.append(table(["model", "N", "reference", OURS], rows) + "\n")
    return lines


def _operators_text(records: list[dict], device: str) -> list[str]:
    lines = ["#### Operators\n"]
    lines += [f"![{name}](benchmarks/{device}/{name}.svg)\n" for name in ("roofline", "bound", "length")]
    good = timed(records)
    for operator in unique(r["operator"] for r in good):
        mine = [r for r in good if r["operator"] == operator]
        others = [c for c in unique(r["implementation"] for r in mine) if c != REFERENCE]
        rows = []
        for group in grouped(mine, lambda r: (r["family"], str(r["shape"]), r["direction"])):
            by = {r["implementation"]: r for r in group}
            best = min(
                (r for r in group if r["implementation"] in OWN), key=lambda r: r["seconds"]["p50"], default=None
            )
            rows.append(
                [group[0]["family"], shape(group[0]), group[0]["direction"], milliseconds(by.get(REFERENCE))]
                + [f"{milliseconds(by[c])}, {ratio(by[c].get('speedup'))}" if c in by else "–" for c in others]
                + [f"{best['percent_of_bound']:.0f} % ({best['limited_by']})" if best else "–"]
                + [f"{best['tflops']:.3g}, {best['gbytes_per_second']:.3g}" if best else "–"]
            )
        heads = ["family", "shape", "direction", "reference, ms", *(f"{c}: ms, over reference" for c in others)]
        lines.append(f"`{operator}`\n")
        lines.append(table([*heads, "best own: of bound", "best own: TFLOP/s, GB/s"], rows) + "\n")
    untimed = [r for r in records if not r.get("seconds")]
    reasons = sorted({(r["operator"], r["implementation"], r.get("refused") or r["skipped"]) for r in untimed})
    if reasons:
        lines.append("Not timed, and why:\n")
        lines.append(table(["operator", "implementation", "reason"], [list(r) for r in reasons]) + "\n")
    return lines


def _behind_text(parts: dict[str, dict]) -> list[str]:
    rows = []
    for content in parts.values():
        for own, other in behind(content["records"]):
            if "operator" in own:
                what, detail = own["operator"], f"{own['family']} {shape(own)} {own['direction']}"
            else:
                what, detail = own["model"], f"{own['task']}, batch {own['batch']}"
            times = own["seconds"]["p50"] / other["seconds"]["p50"]
            rows.append([what, detail, own["implementation"], other["implementation"], f"{times:.2f}×"])
    if not rows:
        return ["No baseline in these files is more than 3 % faster than the package's best backend.\n"]
    title = "#### Where the package is not faster\n"
    text = "In these cases the fastest baseline is more than 3 % faster than the package's fastest backend:\n"
    return [title, text, table(["what", "case", "own", "baseline", "time of own / baseline"], rows) + "\n"]


def behind(records: Iterable[dict]) -> list[tuple[dict, dict]]:
    """(best own, best baseline) of each case in which the baseline is more than 3 % faster. ViT is a baseline, too."""
    found = []
    for group in grouped(timed(records), lambda r: (*results.key(r)[:-1], r.get("graph") if "model" in r else None)):
        own = min((r for r in group if r["implementation"] in OWN), key=lambda r: r["seconds"]["p50"], default=None)
        other = min(
            (r for r in group if r["implementation"] not in OWN), key=lambda r: r["seconds"]["p50"], default=None
        )
        if own and other and own["seconds"]["p50"] > 1.03 * other["seconds"]["p50"]:
            found.append((own, other))
    return sorted(found, key=lambda pair: -pair[0]["seconds"]["p50"] / pair[1]["seconds"]["p50"])


# -- pieces ----------------------------------------------------------------------------------------------------------


def timed(records: Iterable[dict]) -> list[dict]:
    return [r for r in records if r.get("seconds")]


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def grouped(records: Iterable[dict], key) -> list[list[dict]]:
    found: dict = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return list(found.values())


def shape(record: dict) -> str:
    s = record["shape"]
    return f"B{s['batch']} N{s['tokens']} H{s['heads']} p{s['width']}" + (" causal" if s["causal"] else "")


def milliseconds(record: dict | None) -> str:
    if record is None:
        return "–"
    values = (record["seconds"][p] * 1e3 for p in ("p20", "p50", "p80"))
    low, middle, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values)
    return f"{middle} ({low}–{high})"


def ratio(values: dict | None) -> str:
    return f"{values['p50']:.2f}×" if values else "–"


def table(heads: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- plots -----------------------------------------------------------------------------------------------------------


def plots(parts: dict[str, dict], folder: Path) -> list[Path]:
    """One SVG per picture; equal results give equal bytes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(needs("a picture", "matplotlib")) from error

    draw = {}
    if "models" in parts:
        draw["models"] = lambda figure: _plot_models(figure, timed(parts["models"]["records"]))
    if "operators" in parts:
        records, peak_rates = timed(parts["operators"]["records"]), parts["operators"]["peaks"]
        draw["roofline"] = lambda figure: _plot_roofline(figure, records, peak_rates)
        draw["bound"] = lambda figure: _plot_bound(figure, records)
        draw["length"] = lambda figure: _plot_length(figure, records)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "crate_kernels", "font.size": 8}):
        for name, picture in draw.items():
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            picture(figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            written.append(folder / f"{name}.svg")
    return written


def _plot_models(figure, records: list[dict]) -> None:
    """Speed over the reference model, every implementation, at the batch of the README's table."""
    present = {r["implementation"] for r in records}
    shown = [
        c
        for c in (
            COMPILED,
            OURS_WITH_MKL,
            OURS,
            PREPARED,
            PREPARED_BF16,
            OURS_BF16,
            "triton",
            "cuda",
            VIT,
            VIT_COMPILED,
        )
        if c in present
    ]
    for axes, task in zip(figure.subplots(1, 2, sharey=True), ("forward", "training step"), strict=True):
        models = unique(r["model"] for r in records)
        for place, implementation in enumerate(shown):
            chosen = [_headline_record([r for r in records if r["model"] == m], task, implementation) for m in models]
            middle = [r["speedup"]["p50"] if r else 0 for r in chosen]
            spread = [[abs(r["speedup"]["p50"] - r["speedup"][p]) if r else 0 for r in chosen] for p in ("p20", "p80")]
            x = [i + (place - len(shown) / 2 + 0.5) * 0.8 / len(shown) for i in range(len(models))]
            axes.bar(
                x, middle, 0.8 / len(shown), yerr=spread, label=implementation, color=f"C{place}", error_kw={"lw": 0.8}
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set(title=task, xticks=range(len(models)), xticklabels=models)
    figure.axes[0].set_ylabel("speed over the reference model (p50, p20–p80)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _plot_roofline(figure, records: list[dict], peak_rates: dict) -> None:
    """Achieved rate over arithmetic intensity, below the two peaks measured in the same run."""
    axes = figure.subplots()
    own = [r for r in records if r["implementation"] in OWN or r["implementation"] == REFERENCE]
    intensity = [r["cost"]["flops"] / r["cost"]["bytes"] for r in own]
    product = max(peak_rates["product"].values())
    ridge = product / peak_rates["copy"]
    corners = [min([*intensity, ridge]) / 2, ridge, max([*intensity, ridge]) * 2]
    line = [min(x * peak_rates["copy"], product) / 1e12 for x in corners]
    axes.plot(corners, line, color="black", lw=1, label="measured peaks")
    for place, implementation in enumerate(unique(r["implementation"] for r in own)):
        mine = [r for r in own if r["implementation"] == implementation]
        x = [r["cost"]["flops"] / r["cost"]["bytes"] for r in mine]
        axes.plot(x, [r["tflops"] for r in mine], "o", ms=4, alpha=0.7, color=f"C{place}", label=implementation)
    axes.set(xscale="log", yscale="log", xlabel="least operations per least byte", ylabel="TFLOP/s of the least work")
    axes.legend()


def _plot_bound(figure, records: list[dict]) -> None:
    """Percent of the bound that the best own backend reaches in each case, for ``forward`` and for ``both``."""
    axes = figure.subplots()
    shapes = [r for r in records if r["family"] != "long" and r["implementation"] in OWN]

    def name(record: dict) -> str:
        return f"{record['operator']} {record['family']}" + (" causal" if record["shape"]["causal"] else "")

    names = unique(name(r) for r in shapes)
    for place, direction in enumerate(("forward", "both")):
        best = dict.fromkeys(names, 0.0)
        for r in shapes:
            if r["direction"] == direction:
                best[name(r)] = max(best[name(r)], r["percent_of_bound"])
        y = [i + (place - 0.5) * 0.4 for i in range(len(names))]
        axes.barh(y, list(best.values()), 0.4, label=direction, color=f"C{place}")
    axes.axvline(100, color="black", lw=0.8)
    axes.set(xlabel="% of bound, best own backend", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.legend()
    figure.set_figheight(1.2 + 0.22 * len(names))


def _plot_length(figure, records: list[dict]) -> None:
    """Time and peak memory of forward and backward of attention against the number of tokens."""
    mine = [r for r in records if r["family"] == "long" and r["direction"] == "both" and not r["shape"]["causal"]]
    panels = figure.subplots(1, 2)
    for place, implementation in enumerate(unique(r["implementation"] for r in mine)):
        line = sorted((r for r in mine if r["implementation"] == implementation), key=lambda r: r["shape"]["tokens"])
        x = [r["shape"]["tokens"] for r in line]
        panels[0].plot(
            x, [r["seconds"]["p50"] * 1e3 for r in line], "o-", ms=3, color=f"C{place}", label=implementation
        )
        if all(r.get("peak_memory") for r in line):
            panels[1].plot(
                x, [r["peak_memory"] / 2**30 for r in line], "o-", ms=3, color=f"C{place}", label=implementation
            )
    for axes, label in zip(panels, ("ms, forward + backward", "peak GiB, forward + backward"), strict=True):
        axes.set(xscale="log", xlabel="tokens N", ylabel=label)
        if axes.lines:
            axes.set_yscale("log")
        else:
            axes.text(0.5, 0.5, "not measured on this device", ha="center", transform=axes.transAxes)
    if panels[0].lines:
        panels[0].legend()
