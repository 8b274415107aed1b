"""Creates the sections of a report from results, with tables like those of the paper."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pi_jax.evaluate.report import figures
from pi_jax.evaluate.report.gather import METRICS, Result
from pi_jax.evaluate.report.page import Figure, Section, Table

_MOST_COLUMNS = 12
_NAMES = {"bos": "BOS", "max_tokens": "documents cut to"}
_PAPER_TASKS = {"boolq": "BoolQ", "piqa": "PIQA", "race_middle": "RACE-M", "race": "RACE-H", "winogrande": "WinoGrande"}
_TRUNCATED = (
    "A model whose window is shorter than the text is evaluated with a sliding window. This truncation is the baseline "
    "for an extended window."
)


def build(results: Sequence[Result]) -> list[Section]:
    """Creates all sections for which there are results."""
    makers: Sequence[tuple[str, Callable[[list[Result]], Iterable[Section]]]] = (
        ("perplexity", perplexity),
        (METRICS, training),
        ("passkey", passkey),
        ("ruler", ruler),
        ("harness", harness),
        ("summarization", summarization),
    )
    found = [(make, [r for r in results if r.kind == kind]) for kind, make in makers]
    return [section for make, chosen in found if chosen for section in make(chosen)]


def _labels(results: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(r.label for r in results))


def _protocol(results: Sequence[Result], *skip: str) -> list[str]:
    """Lists the settings that all results share, those that differ by label, and the origin of each model."""
    lines, labels = [], _labels(results)
    names = list(dict.fromkeys(name for r in results for name in r.data.get("protocol", {})))
    for name in (n for n in names if n not in skip):
        of = {
            label: _unique(r.data.get("protocol", {}).get(name) for r in results if r.label == label)
            for label in labels
        }
        if len(set(of.values())) == 1:
            lines.append(f"{_NAMES.get(name, name.replace('_', ' '))}: {next(iter(of.values()))}")
        else:
            lines.append(
                f"{_NAMES.get(name, name.replace('_', ' '))} differs: " + "; ".join(f"{k}: {v}" for k, v in of.items())
            )
    for label in labels:
        own = [r for r in results if r.label == label]
        about = f"{_unique(r.data.get('model') for r in own)}, {_unique(r.data.get('rope') for r in own)}"
        windows = _unique(r.data.get("model_window") for r in own)
        about += f", window {windows}" if windows != "unknown" else ""
        lines.append(f"{label}: {about}; on {_unique(r.data.get('device') for r in own)}")
    return lines


def _unique(values: Iterable[Any]) -> str:
    texts = list(dict.fromkeys(_text(v) for v in values))
    return ", ".join(texts)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


# ---- Tables 1 and 2: perplexity by window.


def perplexity(results: list[Result]) -> Iterable[Section]:
    """Creates one section per text, because only results for the same tokens are comparable."""
    texts: dict[tuple, list[tuple[Result, dict]]] = {}
    for result in results:
        for entry in result.data["results"]:
            names = tuple(pathlib.Path(d["name"]).name for d in entry["documents"])
            texts.setdefault((names, entry["tokens"]), []).append((result, entry))
    for (names, count), found in sorted(texts.items(), key=lambda item: -item[0][1]):
        what = names[0] if len(names) == 1 else f"{len(names)} documents"
        yield _perplexity_of(f"Perplexity: {what}, {count:,} tokens", found)


def _perplexity_of(title: str, found: list[tuple[Result, dict]]) -> Section:
    labels, windows = _labels(r for r, _ in found), sorted({entry["window"] for _, entry in found})
    cells = {(r.label, e["window"]): e for r, e in found}

    def grid(value: Callable[[dict], Any]) -> list[list]:
        return [[k, *(value(cells[k, w]) if (k, w) in cells else None for w in windows)] for k in labels]

    heads = ["model", *(f"window {w:,}" for w in windows)]
    parts: list[Table | Figure] = [
        Table(heads, grid(lambda e: e["perplexity"]), "Perplexity, weighted by token", "low")
    ]
    if all("window_mean_perplexity" in e for e in cells.values()):
        caption = "Perplexity averaged over windows, as in YaRN's evaluator"
        parts.append(Table(heads, grid(lambda e: e["window_mean_perplexity"]), caption, "low"))

    def name(key: tuple[str, int]) -> str:
        return key[0] if len(windows) == 1 else f"{key[0]}, window {key[1]:,}"

    ordered = sorted(cells, key=lambda k: (labels.index(k[0]), k[1]))
    edges = {tuple((b["from"], b["to"]) for b in e["by_position"]) for e in cells.values()}
    if len(edges) == 1:
        ranges = [f"{figures.tokens(a)}-{figures.tokens(b)}" for a, b in next(iter(edges))]
        rows = [[name(k), *(b["perplexity"] for b in cells[k]["by_position"])] for k in ordered]
        parts.append(Table(["model", *ranges], rows, "By position in the document (tokens)", "low"))
    curves = [(k[0], name(k).removeprefix(k[0]).lstrip(", "), *_curve(cells[k])) for k in ordered]
    marks = sorted(
        {("the base model's window", r.data["original_window"]) for r, _ in found if "original_window" in r.data}
    )
    longest = max(x[-1] for _, _, x, _ in curves)
    svg = figures.lines(
        curves,
        "position in the document (tokens)",
        "perplexity",
        log_y=True,
        marks=[m for m in marks if m[1] < longest],
    )
    parts.append(Figure(svg, "Perplexity of the tokens at each position. A sharp rise is where the window ends."))
    if max(sum(k == label for k, _ in cells) for label in labels) > 2:
        parts += [_against_windows(labels, windows, cells)]
    documents = [pathlib.Path(d["name"]).stem for d in found[0][1]["documents"]]
    if 1 < len(documents) <= _MOST_COLUMNS:
        rows = [[name(k), *(d["perplexity"] for d in cells[k]["documents"])] for k in ordered]
        parts.append(Table(["model", *documents], rows, "By document", "low"))
    strides: dict[str, list[str]] = {}
    for k in ordered:
        stride = "one window per document" if cells[k]["stride"] >= k[1] else f"stride {cells[k]['stride']:,}"
        strides.setdefault(stride, []).append(name(k))
    notes = ["each token is scored once; windows advance by their stride"]
    notes += [f"{stride}: {'; '.join(names)}" for stride, names in strides.items()]
    lead = _TRUNCATED if len(windows) > 1 else ""
    return Section(title, parts, [*notes, *_protocol([r for r, _ in found], "stride")], lead)


def _curve(entry: dict) -> tuple[list[int], list[float]]:
    """Returns the edges of the position ranges, and the perplexities between them."""
    parts = [p for p in entry.get("curve", entry["by_position"]) if p["perplexity"] is not None]
    return [parts[0]["from"], *(p["to"] for p in parts)], [p["perplexity"] for p in parts]


def _against_windows(labels: list[str], windows: list[int], cells: dict) -> Figure:
    data = []
    for label in labels:
        own = [w for w in windows if (label, w) in cells]
        data.append((label, "", own, [cells[label, w]["perplexity"] for w in own]))
    svg = figures.lines(data, "window (tokens)", "perplexity", log_y=True)
    return Figure(svg, "Perplexity against window size.")


# ---- Tables 3 and 4: perplexity and passkey against training steps.


def training(results: list[Result]) -> Iterable[Section]:
    """Creates the section with metrics over the steps of training runs, from their logs."""
    names = list(dict.fromkeys(name for r in results for line in r.data for name in line))
    groups = (
        ("perplexity/", "perplexity", "Table 3: perplexity on held-out text against training steps", "low"),
        ("passkey/", "k_max (tokens)", "Table 4: passkey retrieval against training steps", "high"),
    )
    parts: list[Table | Figure] = []
    for prefix, unit, title, best in groups:
        series = [
            (r.label, name.removeprefix(prefix), _series(r.data, name))
            for r in results
            for name in names
            if name.startswith(prefix)
        ]
        series = [(label, which, points) for label, which, points in series if points]
        if not series:
            continue
        steps = _some(sorted({step for *_, points in series for step in points}))
        rows = [[f"{label}, {which}", *(points.get(step) for step in steps)] for label, which, points in series]
        parts.append(Table(["model", *(f"step {s:,}" for s in steps)], rows, title, best))
        if any(len(points) > 1 for *_, points in series):
            data = [(label, which, list(points), list(points.values())) for label, which, points in series]
            parts.append(Figure(figures.lines(data, "training steps", unit, log_y=unit == "perplexity"), title))
    losses = [(r.label, "", list(p), list(p.values())) for r in results if (p := _series(r.data, "loss"))]
    if losses:
        svg = figures.lines(losses, "training steps", "loss (nats per token)")
        parts.append(Figure(svg, "Training loss. Each point is the mean over the steps since the previous point."))
    if parts:
        yield Section("Training", parts, [f"{r.label}: {r.path}" for r in results])


def _series(lines: list[dict], name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines if isinstance(line.get(name), (int, float))}


def _some(steps: list[int]) -> list[int]:
    """Selects as many steps as fit in a table, including the first and the last."""
    if len(steps) <= _MOST_COLUMNS:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (_MOST_COLUMNS - 1))] for i in range(_MOST_COLUMNS)]


# ---- Passkey, RULER, the standard benchmarks, summaries.


def passkey(results: list[Result]) -> Iterable[Section]:
    """Creates the section with effective windows and heat maps."""
    rows, parts = [], []
    for result in results:
        for entry in _entries(result):
            rows.append([result.label, entry.get("length"), entry.get("k_max"), entry.get("k_max_strict")])
    if any(row[2] is not None for row in rows):
        heads = ["model", "window", "k_max (at least 20 %)", "k_max (always)"]
        parts.append(Table(heads, rows, "Effective window in tokens", "high"))
        data = [
            (
                r.label,
                f"window {e['length']:,}",
                [d["k"] for d in e["by_distance"]],
                [100 * d["success"] for d in e["by_distance"]],
            )
            for r in results
            for e in _entries(r)
        ]
        svg = figures.lines(data, "k: tokens from the key to the end", "key found (% of trials)", marks=())
        parts.append(
            Figure(svg, "How often the key was found at each distance; k_max is where it first falls below 20 %.")
        )
    for result in results:
        grid = result.data.get("grid")
        if grid:
            depths = [f"{100 * d:.0f}" for d in grid["depths"]]
            svg = figures.heat_map(grid["success"], depths, [figures.tokens(n) for n in grid["lengths"]], result.label)
            parts.append(Figure(svg, f"{result.label}: how often the key was found, by depth and prompt length."))
    yield Section("Passkey retrieval", parts, _protocol(results))


def ruler(results: list[Result]) -> Iterable[Section]:
    """Creates the section with average scores by length, and scores by task."""
    lengths = sorted({int(e["length"]) for r in results for e in _entries(r)})
    cells = {(r.label, int(e["length"])): e for r in results for e in _entries(r)}
    heads, labels = ["model", *map(figures.tokens, lengths)], _labels(results)

    def grid(value: Callable[[dict], Any]) -> list[list]:
        return [[k, *(value(cells[k, n]) if (k, n) in cells else None for n in lengths)] for k in labels]

    rows = [[*row, _effective(results, row[0])] for row in grid(lambda e: e.get("average"))]
    parts: list[Table | Figure] = [Table([*heads, "effective length"], rows, "Average score (0 to 100)", "high")]
    tasks = list(dict.fromkeys(t for e in cells.values() for t in e.get("tasks", {})))
    each = [(k, n) for k in labels for n in lengths if (k, n) in cells]
    rows = [[task, *(cells[key].get("tasks", {}).get(task) for key in each)] for task in tasks]
    parts.append(Table(["task", *(f"{k}, {figures.tokens(n)}" for k, n in each)], rows, "By task", digits=1))
    yield Section("RULER", parts, _protocol(results))


def _effective(results: list[Result], label: str) -> str:
    found = [r.data["effective_length"] for r in results if r.label == label and "effective_length" in r.data]
    return f"{max(found):,}" if found and max(found) else "-"


def _entries(result: Result) -> list[dict]:
    return result.data.get("results") or []


def harness(results: list[Result]) -> Iterable[Section]:
    """Creates the section with scores of tasks. The paper's five tasks come first, with its names (Table 5)."""
    cells: dict[tuple[str, str], tuple[float, str]] = {}
    for result in results:
        for task, values in result.data["results"].items():
            metric = next((m for m in values if m != "questions" and not m.endswith("_stderr")), None)
            if metric:
                cells[result.label, task] = (float(values[metric]), metric)
    labels = _labels(results)
    tasks = sorted({t for _, t in cells}, key=lambda t: (list(_PAPER_TASKS).index(t) if t in _PAPER_TASKS else 9, t))
    parts = []
    for metric in dict.fromkeys(m for _, m in cells.values()):
        own = [t for t in tasks if any(cells.get((k, t), (0, ""))[1] == metric for k in labels)]
        share = metric.startswith(("acc", "exact_match", "f1"))
        rows = [
            [k, *(cells[k, t][0] * (100 if share else 1) if (k, t) in cells else None for t in own)] for k in labels
        ]
        unit = " in %" if share else ""
        best = "low" if "perplexity" in metric else "high"
        parts.append(Table(["model", *(_PAPER_TASKS.get(t, t) for t in own)], rows, f"{metric}{unit}", best, 1))
    yield Section("Standard benchmarks (Table 5)", parts, _protocol(results, "task_versions"))


def summarization(results: list[Result]) -> Iterable[Section]:
    """Creates the section with ROUGE scores (Table 6)."""
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    rows = [
        [r.label, r.data["results"]["documents"], *(float(100 * r.data["results"][name]["f"]) for name in names)]
        for r in results
    ]
    table = Table(["model", "documents", *names.values()], rows, "F-measure in %", "high", 1)
    yield Section("Summaries of long documents (Table 6)", [table], _protocol(results))
