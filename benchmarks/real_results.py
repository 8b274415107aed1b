"""Tables and figure of the real run (docs/results.md) from its result files.

    python benchmarks/real_results.py --results benchmarks/results/2026-11-23-smollm2-16k --figure docs/results.png

The folder holds what the commands in docs/results.md wrote: NAME-16384.json and NAME-4096.json for each model, and the
metrics.jsonl of the two runs. Prints Markdown.
"""

import dataclasses
import json
import pathlib

import tyro

MODELS = {
    "base": "original model, unscaled",
    "truncated": "original model, sliding window of its own 8,192",
    "untuned": "interpolated by 2, not tuned",
    "tuned": "interpolated by 2, tuned",
    "control": "unscaled, tuned the same way",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """Markdown tables and a figure of the real run."""

    results: str
    """Folder of result files."""
    figure: str
    """PNG to write."""


def _result(folder: pathlib.Path, name: str, length: int) -> dict | None:
    path = folder / f"{name}-{length}.json"
    return json.loads(path.read_text())["results"][0] if path.exists() else None


def _range(bucket: dict) -> str:
    def short(n):
        return f"{n // 1024}k" if n and n % 1024 == 0 else str(n)

    return f"{short(bucket['from'])}-{short(bucket['to'])}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def long_table(folder: pathlib.Path) -> str:
    """One 16,384-token document, by position."""
    results = {name: r for name in MODELS if (r := _result(folder, name, 16384))}
    buckets = next(iter(results.values()))["by_position"]
    lines = [_row(["model", "all 16k", *map(_range, buckets)]), _row(["---"] + ["---:"] * (len(buckets) + 1))]
    for name, result in results.items():
        cells = [result["perplexity"], *(b["perplexity"] for b in result["by_position"])]
        lines.append(_row([MODELS[name], *(f"{c:.1f}" for c in cells)]))
    return "\n".join(lines)


def short_table(folder: pathlib.Path) -> str:
    """Three documents at 4,096 tokens."""
    results = {name: r for name in MODELS if (r := _result(folder, name, 4096))}
    names = [pathlib.Path(d["name"]).stem for d in next(iter(results.values()))["documents"]]
    lines = [_row(["model", "all three", *names]), _row(["---"] + ["---:"] * (len(names) + 1))]
    for name, result in results.items():
        cells = [result["perplexity"], *(d["perplexity"] for d in result["documents"])]
        lines.append(_row([MODELS[name], *(f"{c:.1f}" for c in cells)]))
    return "\n".join(lines)


def _losses(folder: pathlib.Path, name: str) -> dict[int, float]:
    lines = (folder / f"{name}-metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def loss_table(folder: pathlib.Path) -> str:
    """Training losses, each the mean over the steps since the previous row."""
    runs = {name: _losses(folder, name) for name in ("tuned", "control")}
    lines = [_row(["step", *(MODELS[n] for n in runs)]), _row(["---:"] * 3)]
    lines += [_row([str(s), *(f"{run[s]:.3f}" for run in runs.values())]) for s in sorted(runs["tuned"])]
    return "\n".join(lines)


def draw(folder: pathlib.Path, path: str) -> None:
    """Perplexity against position in the document, and the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    styles = {"base": "k-", "truncated": "k:", "untuned": "C1--", "tuned": "C0-", "control": "C3-."}
    for name, label in MODELS.items():
        if result := _result(folder, name, 16384):
            middles = [(b["from"] + b["to"]) / 2 for b in result["by_position"]]
            left.plot(middles, [b["perplexity"] for b in result["by_position"]], styles[name], marker="o", label=label)
    left.axvline(8192, color="0.7", linewidth=1)
    left.text(8192, 0.98, " window of the original model", color="0.4", va="top", transform=left.get_xaxis_transform())
    left.set(yscale="log", xlabel="position in the document (tokens)", ylabel="perplexity (lower is better)")
    left.set_title("Held-out novel, one pass of 16,384 tokens")
    left.set_xticks(range(0, 16385, 4096))
    left.set_yticks([30, 50, 100, 200, 500, 1000], labels=["30", "50", "100", "200", "500", "1000"], minor=False)
    left.yaxis.set_minor_locator(plt.NullLocator())
    left.legend(fontsize=8)
    for name in ("tuned", "control"):
        losses = _losses(folder, name)
        right.plot(list(losses), list(losses.values()), styles[name], label=MODELS[name])
    right.set(xlabel="step (2,048 tokens each)", ylabel="training loss (nats a token)")
    right.set_title("Fine-tuning")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Report) -> None:
    """Prints the tables and writes the figure."""
    folder = pathlib.Path(args.results)
    print(long_table(folder), short_table(folder), loss_table(folder), sep="\n\n")
    draw(folder, args.figure)


if __name__ == "__main__":
    main(tyro.cli(Report))
