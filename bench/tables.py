"""Results as Markdown: a suite's table is the function of that name in `TABLES`; a suite without one gets the plain table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.results import Key, Result, Results

__all__ = ["NOT_MEASURED", "TABLES", "page", "plain", "worth_a_gpu"]

OURS = "glf_fast"
NOT_MEASURED = "not measured yet"
Groups = dict[Key, dict[str, Result]]


def page(found: Results) -> Iterator[str]:
    """The machine, and every suite that was measured on it."""
    machine = found.machine
    versions = f"torch {machine['torch']}, Python {machine['python_version']}, commit {machine['commit']}"
    yield f"# {machine.get('gpu') or machine['cpu']['brand_raw']}, {machine['cores']} cores; {versions}; {found.date[:10]}"
    runs = max((len(result.medians) for result in found.results), default=0)
    if runs > 1:
        yield ""
        yield f"{runs} runs. Times are the first run's; ratios are the first run's, with the range of all runs where it shows."
    if found.wrong:
        yield from ("", "Not timed:", "", *(f"* {what}" for what in found.wrong))
    for suite in dict.fromkeys(result.suite for result in found.results):
        groups = {key: rows for key, rows in found.groups().items() if key[0] == suite}
        yield from ("", f"## {HEADINGS.get(suite, suite)}", "")
        yield from TABLES.get(suite, plain)(groups)


def plain(groups: Groups) -> Iterator[str]:
    """A row a case and mode, a column a provider: its time, how many times ours that is; ours with its share of the floor."""
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    yield from header(["", *names])
    for (_, case, mode), rows in groups.items():
        yield line([f"{case}, {mode}", *(_cell(rows, name) for name in names)])


def by_case(groups: Groups) -> Iterator[str]:
    """A table a case and mode, the fastest provider first."""
    for (_, case, mode), rows in groups.items():
        any_row = next(iter(rows.values()))
        info = any_row.info
        yield f"### {case}, {mode} (batch {info['batch']}, {info['threads']} threads)"
        yield ""
        yield (
            f"The matrix products alone at the rate of torch's own ({info['matrix_gflops']:.0f} GFLOP/s), or reading the "
            f"weights: {time(info['floor_s'])}."
        )
        yield ""
        yield from header(["", "median", "quartiles", "× glf_fast", "GFLOP/s", "of torch's matrix rate"])
        for name, row in sorted(rows.items(), key=lambda item: item[1].median):
            yield line(
                [
                    name,
                    time(row.median),
                    f"{time(row.stats['q1'])} – {time(row.stats['q3'])}",
                    ratio(rows, name),
                    f"{row.info['gflops']:.0f}",
                    f"{row.info['share_of_matrix_rate']:.0%}",
                ]
            )
        yield ""


def on_gpu(groups: Groups) -> Iterator[str]:
    """A table a case and mode: calls with the host in them, and graphs replayed without it."""
    for (_, case, mode), rows in groups.items():
        info = next(iter(rows.values())).info
        yield f"### {case}, {mode} (batch {info['batch']}); floor {time(info['floor_s'])}"
        yield ""
        yield from header(
            ["", "a call", "× glf_fast", "host", "graph, cold L2", "graph, warm", "of the rate", "peak MiB"]
        )
        for name, row in sorted(rows.items(), key=lambda item: item[1].median):
            i = row.info
            graphs = [time(i[key]["median"]) if key in i else "" for key in ("graph_cold", "graph_warm")]
            yield line(
                [
                    name,
                    time(row.median),
                    ratio(rows, name),
                    time(i["host_s"]) if "host_s" in i else "",
                    *graphs,
                    f"{i['share_of_matrix_rate']:.0%}",
                    f"{i['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in i else "",
                ]
            )
        yield ""


def memory(groups: Groups) -> Iterator[str]:
    """A row a depth, a column a way: peak extra memory of a training pass, and its time."""
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    yield from header(["steps", *names])
    for rows in groups.values():
        ours = rows[OURS].info["peak_bytes"]
        cells = [
            f"{row.info['peak_bytes'] / 2**20:.0f} MiB ({row.info['peak_bytes'] / ours:.2f} ×), {time(row.median)}"
            for row in (rows[name] for name in names)
        ]
        yield line([str(rows[OURS].info["steps"]), *cells])


def launches(groups: Groups) -> Iterator[str]:
    """A row a case and mode, a column a provider: how many kernels, copies and fills a pass is."""
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    yield from header(["", *names])
    for (_, case, mode), rows in groups.items():
        yield line([f"{case}, {mode}", *(str(rows[n].info["launches"]) if n in rows else "" for n in names)])


def coupling(groups: Groups) -> Iterator[str]:
    """The plain table, and ours as a share of a copy's bandwidth."""
    yield from _with_column(groups, "of copy bandwidth", lambda row: f"{row.info['share_of_copy']:.0%}")


def train_step(groups: Groups) -> Iterator[str]:
    """The plain table, and our images per second."""
    yield from _with_column(groups, "images/s", lambda row: f"{row.info['images_per_s']:,.0f}")


def worth_a_gpu(machines: Sequence[Results]) -> Iterator[str]:
    """A row a width and batch of the suite "grid": times of a training pass on each processor and GPU with results."""
    on = {False: [m for m in machines if "gpu" not in m.machine], True: [m for m in machines if "gpu" in m.machine]}
    columns: list[tuple[str, Callable[[Key], str]]] = []
    for gpu, label in ((False, "CPU"), (True, "GPU")):
        for name in (OURS, "eager", "FrEIA"):
            for m in on[gpu]:
                where = m.machine.get("gpu") or f"{m.machine['cpu']['brand_raw']}, {m.machine['cores']} cores"
                columns.append((f"{label} ({where}): {name}", _lookup(m, name)))
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
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def ratio(rows: dict[str, Result], name: str) -> str:
    """How many times our time: in the first run, and where runs differ the range."""
    if OURS not in rows:
        return ""
    runs = [f"{a / b:.2f}" for a, b in zip(rows[name].medians, rows[OURS].medians, strict=False)]
    low, high = min(runs, key=float), max(runs, key=float)
    return runs[0] if low == high else f"{runs[0]} ({low} – {high})"


def _cell(rows: dict[str, Result], name: str) -> str:
    if name not in rows:
        return ""
    row = rows[name]
    if name != OURS:
        return f"{time(row.median)} ({ratio(rows, name)} ×)" if OURS in rows else time(row.median)
    floor = row.info.get("floor_s")
    return time(row.median) + (f", {floor / row.median:.0%} of the floor's speed" if floor else "")


def _with_column(groups: Groups, title: str, cell: Callable[[Result], str]) -> Iterator[str]:
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    yield from header(["", *names, *(f"{name}: {title}" for name in names)])
    for (_, case, mode), rows in groups.items():
        times = [
            time(rows[n].median) + (f" ({ratio(rows, n)} ×)" if n != OURS else "") if n in rows else "" for n in names
        ]
        yield line([f"{case}, {mode}", *times, *(cell(rows[n]) if n in rows else "" for n in names)])


HEADINGS = {
    "flow": "Flows",
    "gpu_flow": "Flows",
    "depth": "Depth: D 64, two hidden layers of 256, batch 256",
    "grid": "Batch against width: 8 steps, two hidden layers (grid-D-H-batch)",
    "coupling": "Elementwise coupling of images (the floor is a copy of as many bytes)",
    "linear": "log|det| and inverse of batches of dense matrices (linear-K-D)",
    "apply": "Linear layers applied to vectors and images",
    "train_step": "Whole GLF steps: autoencoder, flow and optimizer of the presets",
    "launches": "Launches of a pass: kernels, copies and fills",
    "memory": "Peak extra memory of a training pass: D 64, two hidden layers of 256, batch 4,096",
}
TABLES: dict[str, Callable[[Groups], Iterator[str]]] = {
    "flow": by_case,
    "gpu_flow": on_gpu,
    "coupling": coupling,
    "train_step": train_step,
    "memory": memory,
    "launches": launches,
}
