"""Draws the figure of the README from the results of `make demo`: python demo/figure.py runs/demo docs/demo.png"""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

MODELS = (
    ("base", "base model", "#8c8c8c"),
    ("untuned", "interpolated, not tuned", "#e8a33d"),
    ("direct", "fine-tuned without interpolation", "#c0392b"),
    ("tuned", "interpolated, fine-tuned", "#1f6feb"),
)


def main() -> None:
    """The command line."""
    folder, figure = pathlib.Path(sys.argv[1]), sys.argv[2]
    options = json.loads((folder / "extend.json").read_text())
    last = {"direct": f"direct-{options['steps']}", "tuned": f"tuned-{options['steps']}"}

    def results(model: str, what: str) -> list[dict]:
        return json.loads((folder / "results" / f"{last.get(model, model)}-{what}.json").read_text())["results"]

    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label, color in MODELS:
        parts = results(name, "ledger")[-1]["by_position"]
        left.plot([p["from"] for p in parts], [p["perplexity"] for p in parts], "o-", color=color, label=label)
        points = results(name, "passkey")[0]["by_distance"]
        right.plot([p["k"] for p in points], [100 * p["success"] for p in points], "o-", color=color, markersize=3)
    inside = next(r for r in results("base", "ledger") if r["window"] != results("base", "ledger")[-1]["window"])
    left.axhline(inside["perplexity"], color="black", linestyle=":", label="base model inside its window")
    left.set(xlabel="position, from token", ylabel="perplexity, text that needs distance", yscale="log")
    right.set(xlabel="distance of the passkey (tokens)", ylabel="passkeys found (%)", ylim=(-3, 103))
    for axes in (left, right):
        axes.axvspan(0, inside["window"], color="#1f6feb", alpha=0.08, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper right")
    plt.savefig(figure, dpi=110)


if __name__ == "__main__":
    main()
