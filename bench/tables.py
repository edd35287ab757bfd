"""Results as Markdown: a suite's table is the function of that name in `TABLES`; a suite without one gets the plain table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.results import Key, Result, Results

__all__ = ["NOT_MEASURED", "TABLES", "page", "plain", "worth_a_gpu"]

OURS = "glf_fast"
NOT_MEASURED = "not measured yet"
Groups = dict[Key, dict[str, Result]]
Column = tuple[str, Callable[[Result], str]]  # its title, and a provider's cell, or ""


def page(found: Results) -> Iterator[str]:
    """The machine, and every suite that was measured on it."""
    machine = found.machine
    versions = f"torch {machine['torch']}, Python {machine['python_version']}, commit {machine['commit']}"
    yield f"# {found.where}; {versions}; {found.date[:10]}"
    runs = max((len(result.medians) for result in found.results), default=0)
    if runs > 1:
        yield ""
        yield f"{runs} runs. Times are the first run's; ratios are the first run's, with the range of all runs where it shows."
    if tests := machine.get("tests"):
        red = tests not in ("ok", "not run")
        yield from (
            "",
            f"The tests before it: {tests}." + (" **Tests failed: these times are not valid.**" if red else ""),
        )
    if launches := machine.get("launch_table"):
        yield from ("", f"Launches of the flow kernels: {'; '.join(f'sm_{a}: {how}' for a, how in launches.items())}.")
    if found.wrong:
        yield from ("", "Not timed:", "", *(f"* {what}" for what in found.wrong))
    for suite in dict.fromkeys(result.suite for result in found.results):
        groups = {key: rows for key, rows in found.groups().items() if key[0] == suite}
        yield from ("", f"## {HEADINGS.get(suite, suite)}", "")
        yield from TABLES.get(suite, plain)(groups)


def plain(groups: Groups, *columns: Column) -> Iterator[str]:
    """A row a case and mode, a column a provider: its time, how many times ours that is; ours with its share of the yardstick.

    Then a column more of each kind for every provider that has it; kernels alone, from a graph, wherever they were measured.
    """
    names = _names(groups)
    rest = [
        (name, title, cell)
        for title, cell in (("kernels alone, cold L2", kernels), *columns)
        for name in names
        if any(name in rows and cell(rows[name]) for rows in groups.values())
    ]
    yield from header(["", *names, *(f"{name}: {title}" for name, title, _ in rest)])
    for (_, case, mode), rows in groups.items():
        more = (cell(rows[name]) if name in rows else "" for name, _, cell in rest)
        yield line([f"{case}, {mode}", *(_cell(rows, name) for name in names), *more])


def by_case(groups: Groups) -> Iterator[str]:
    """A table a case and mode, the fastest provider first; columns of a GPU alone where they were measured."""
    for (_, case, mode), rows in groups.items():
        info = next(iter(rows.values())).info
        threads = f", {info['threads']} threads" if "threads" in info else ""
        yield f"### {case}, {mode} (batch {info['batch']}{threads})"
        yield ""
        yield (
            f"Yardstick: the products at torch's matrix rate ({info['matrix_gflops']:.0f} GFLOP/s), or reading the weights: "
            f"{time(info['yardstick_s'])}.{best(rows)}"
        )
        yield ""
        ordered = sorted(rows, key=lambda name: rows[name].median)
        columns = {title: [cell(rows[name]) for name in ordered] for title, cell in COLUMNS.items()}
        columns["× glf_fast"] = [ratio(rows, name) for name in ordered]
        table = {title: cells for title, cells in columns.items() if any(cells) or title == "× glf_fast"}
        yield from header(["", *table])
        for cells in zip(ordered, *table.values(), strict=True):
            yield line(cells)
        yield ""


def memory(groups: Groups) -> Iterator[str]:
    """A row a depth, a column a way: peak extra memory of a training pass, and its time; then what of it is activations."""
    names = _names(groups)
    yield from header(["steps", "parameters", *names, *(f"{name}: activations" for name in names)])
    for rows in groups.values():
        info = next(iter(rows.values())).info
        cells = [mebibytes(rows[n].info, "activation_bytes") if n in rows else "" for n in names]
        peaks = (_peak(rows, name) for name in names)
        yield line([str(info["steps"]), mebibytes(info, "parameter_bytes"), *peaks, *cells])


def _peak(rows: dict[str, Result], name: str) -> str:
    if name not in rows:
        return ""
    peak = rows[name].info["peak_bytes"]
    times = f" ({peak / rows[OURS].info['peak_bytes']:.2f} ×)" if OURS in rows else ""
    return f"{mebibytes(rows[name].info, 'peak_bytes')}{times}, {time(rows[name].median)}"


def neighbours(groups: Groups) -> Iterator[str]:
    """A row a flow and number of processes, a column a provider: mean time of a pass, and how it compares with a fair share."""
    names = _names(groups)
    yield from header(["flow-processes", *names])
    for (_, case, mode), rows in groups.items():
        yield line([f"{case}, {mode}", *(_share(rows[n].info) if n in rows else "" for n in names)])


def _share(info: Mapping[str, Any]) -> str:
    return f"{time(info['mean'])}, {info['share']:.2f} × its share; longest {info['worst']:.1f} × the median"


def launches(groups: Groups) -> Iterator[str]:
    """A row a case and mode, a column a provider: how many kernels, copies and fills a pass is."""
    names = _names(groups)
    yield from header(["", *names])
    for (_, case, mode), rows in groups.items():
        yield line([f"{case}, {mode}", *(str(rows[n].info["launches"]) if n in rows else "" for n in names)])


def coupling(groups: Groups) -> Iterator[str]:
    """The plain table, and shares of a copy's bandwidth."""
    yield from plain(groups, ("of copy bandwidth", lambda row: f"{row.info['share_of_copy']:.0%}"))


def train_step(groups: Groups) -> Iterator[str]:
    """The plain table, and images per second."""
    yield from plain(groups, ("images/s", lambda row: f"{row.info['images_per_s']:,.0f}"))


def glow(groups: Groups) -> Iterator[str]:
    """The plain table, images per second, and peaks where they were measured."""
    per_second = "images/s", lambda row: f"{row.info['images_per_s']:,.0f}" if "images_per_s" in row.info else ""
    yield from plain(groups, per_second, ("peak", lambda row: mebibytes(row.info, "peak_bytes")))


def fit(groups: Groups) -> Iterator[str]:
    """The plain table, and epochs per second."""
    yield from plain(groups, ("epochs/s", lambda row: f"{row.info['epochs_per_s']:,.1f}"))


def worth_a_gpu(machines: Sequence[Results]) -> Iterator[str]:
    """A row a width and batch of the suite "grid": times of a training pass on each processor and GPU with results."""
    on = {False: [m for m in machines if "gpu" not in m.machine], True: [m for m in machines if "gpu" in m.machine]}
    columns: list[tuple[str, Callable[[Key], str]]] = []
    for gpu, label in ((False, "CPU"), (True, "GPU")):
        for name in (OURS, "eager", "FrEIA"):
            for m in on[gpu]:
                columns.append((f"{label} ({m.where}): {name}", _lookup(m, name)))
            if not any(m.suite("grid") for m in on[gpu]) and name == OURS:
                columns.append((f"{label}: {name}", lambda key: NOT_MEASURED))
    cases = {r.case: r for m in machines for r in m.suite("grid")}
    columns = [(title, cell) for title, cell in columns if any(cell(("grid", case, "train")) for case in cases)]
    yield from header(["D", "H", "batch", *(title for title, _ in columns)])
    for case, result in sorted(cases.items(), key=lambda item: (item[1].info["dim"], item[1].info["batch"])):
        info = result.info
        key = ("grid", case, "train")
        yield line([str(info["dim"]), str(info["hidden"][0]), str(info["batch"]), *(cell(key) for _, cell in columns)])


def _lookup(found: Results, name: str) -> Callable[[Key], str]:
    groups = found.groups()
    return lambda key: time(groups[key][name].median) if name in groups.get(key, {}) else ""


# -- cells -----------------------------------------------------------------------------------------------------------------


def header(titles: Sequence[str]) -> Iterator[str]:
    """The first two lines of a table."""
    yield line(titles)
    yield "|" + "---|" * len(titles)


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def time(seconds: float) -> str:
    """For people."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def mebibytes(info: Mapping[str, Any], what: str) -> str:
    """For people; "" where it was not measured."""
    return f"{info[what] / 2**20:.1f} MiB" if what in info else ""


def best(rows: dict[str, Result]) -> str:
    """How many times ours the fastest other's time is, as a sentence."""
    others = [name for name in rows if name != OURS]
    if OURS not in rows or not others:
        return ""
    fastest = min(others, key=lambda name: rows[name].median)
    return f" The fastest other, {fastest}, takes {ratio(rows, fastest)} times as long as {OURS}."


def ratio(rows: dict[str, Result], name: str) -> str:
    """How many times our time: in the first run, and where runs differ the range."""
    if OURS not in rows:
        return ""
    pairs = zip(rows[name].medians, rows[OURS].medians, strict=True)
    runs = [f"{a / b:.2f}" for a, b in pairs if a and b]
    if not runs:  # never in the same run
        return ""
    low, high = min(runs, key=float), max(runs, key=float)
    return runs[0] if low == high else f"{runs[0]} ({low} – {high})"


def _cell(rows: dict[str, Result], name: str) -> str:
    if name not in rows:
        return ""
    row = rows[name]
    if name != OURS:
        times = ratio(rows, name)
        return time(row.median) + (f" ({times} ×)" if times else "")
    yardstick = row.info.get("yardstick_s")
    return time(row.median) + (f", {yardstick / row.median:.0%} of the yardstick" if yardstick else "")


def kernels(row: Result, caches: str = "cold") -> str:
    """Time of the kernels alone; "" where it was not measured."""
    key = f"graph_{caches}"
    return time(row.info[key]["median"]) if key in row.info else ""


def _names(groups: Groups) -> list[str]:
    return list(dict.fromkeys(name for rows in groups.values() for name in rows))


HEADINGS = {
    "flow": "Flows",
    "depth": "Depth: D 64, two hidden layers of 256, batch 256",
    "grid": "Batch against width: 8 steps, two hidden layers (grid-D-H-batch)",
    "coupling": "Elementwise coupling of images (the yardstick is a copy of as many bytes)",
    "spline": "Rational-quadratic splines of single numbers, linear tails (the yardstick is a copy of as many bytes)",
    "linear": "log|det| and inverse of batches of dense matrices (linear-K-D)",
    "assemble": "PLU factors of a flow's layers as matrices, with inverses; train: forward and backward (plu-K-D)",
    "apply": "Linear layers applied to vectors and images",
    "train_step": "Whole GLF steps: autoencoder, flow and optimizer of the presets",
    "glow": "A training step of Glow: L 2, width 64, grey images of 28 × 28, batch 32 (glow-K)",
    "fit": "Whole runs of training: 10 epochs over 10,000 rows, a tenth of them held out",
    "projects": "Flows of public projects as they are, and after accelerate, in calls",
    "launches": "Launches of a pass: kernels, copies and fills",
    "neighbours": "Several processes at once: mean time of a pass, against a fair share of the cores",
    "memory": "Peak extra memory of a training pass: D 64, two hidden layers of 256, batch 4,096",
}
TABLES: dict[str, Callable[[Groups], Iterator[str]]] = {
    "flow": by_case,
    "coupling": coupling,
    "spline": coupling,
    "fit": fit,
    "glow": glow,
    "train_step": train_step,
    "memory": memory,
    "neighbours": neighbours,
    "launches": launches,
}
# Of a case's table; those of a GPU alone where they were measured.
COLUMNS: dict[str, Callable[[Result], str]] = {
    "median": lambda row: time(row.median),
    "quartiles": lambda row: f"{time(row.stats['q1'])} – {time(row.stats['q3'])}",
    "× glf_fast": lambda row: "",  # of all rows together
    "host": lambda row: time(row.info["host_s"]) if "host_s" in row.info else "",
    "graph, cold L2": kernels,
    "graph, warm": lambda row: kernels(row, "warm"),
    "kernels, of the rate": lambda row: f"{row.info['share_of_matrix_rate']:.0%}" if kernels(row) else "",
    "GFLOP/s": lambda row: f"{row.info['gflops']:.0f}",
    "of the yardstick": lambda row: f"{row.info['yardstick_s'] / row.median:.0%}",
    "peak": lambda row: mebibytes(row.info, "peak_bytes"),
}
