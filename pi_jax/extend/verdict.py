"""What the results of `extend` show, claim by claim, beside the numbers of the paper; and the page that shows it."""

import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING, Any

from pi_jax import atomic, log
from pi_jax.evaluate import result
from pi_jax.evaluate.report import figures
from pi_jax.evaluate.report.gather import gather
from pi_jax.evaluate.report.page import Claims, Figure, Section, Table, to_html, to_markdown
from pi_jax.evaluate.report.sections import build
from pi_jax.extend.stages import Variant

if TYPE_CHECKING:
    from pi_jax.extend.extension import Extension


_ABOUT = (
    "paper: Chen et al. 2023, Tables 1, 3 and 4: LLaMA 7B from 2,048 to 8,192 tokens, perplexity on PG-19",
    "perplexity of the base model inside its window: sliding windows of that size over the same text (truncation)",
    "k_max: the largest distance such that at it and all shorter ones a passkey is found in at least 20% of the trials",
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, and whether it holds here."""

    claim: str
    here: str
    """What was measured."""
    paper: str
    """The paper's numbers for LLaMA 7B from 2,048 to 8,192 tokens on PG-19 (its Tables 1, 3 and 4)."""
    holds: bool

    @property
    def sentence(self) -> str:
        """The claim, the measurement and the paper's in one line."""
        return f"{'yes' if self.holds else 'NO '}  {self.claim}: {self.here} (paper: {self.paper})"


class Findings:
    """The results of an extension."""

    def __init__(self, extension: "Extension"):
        self.extension = extension

    def perplexity(self, variant: Variant, text: str, window: int) -> dict[str, Any]:
        """Perplexity of a model on a text in windows of a size, with its ranges of positions."""
        found = json.loads(self.extension.result(variant.name, text).read_text())["results"]
        return next(r for r in found if r["window"] == window)

    def passkey(self, variant: Variant) -> dict[str, Any]:
        """Passkey retrieval of a model in the new window."""
        return json.loads(self.extension.result(variant.name, "passkey").read_text())["results"][0]

    def claims(self) -> list[Claim]:
        """All claims that the results can answer."""
        extension, window = self.extension, self.extension.window
        base, untuned = extension.before()[:2]
        tuned = extension.tuned("tuned", "interpolated")
        found = []
        if texts := list(extension.heldout):

            def of(variant: Variant, size: int) -> list[float]:
                return [self.perplexity(variant, text, size)["perplexity"] for text in texts]

            def shown(values: list[float]) -> str:
                parts = [f"{t} {_number(x)} ({_times(x / i)})" for t, x, i in zip(texts, values, inside, strict=True)]
                return "perplexity on " + ", ".join(parts)

            def each(check, *values: list[float]) -> bool:
                return all(check(*numbers) for numbers in zip(*values, strict=True))

            def at_the_end(variant: Variant) -> list[float]:
                return [self.perplexity(variant, text, window)["by_position"][-1]["perplexity"] for text in texts]

            inside, plain, far = of(base, extension.base), of(untuned, window), at_the_end(untuned)
            first = self.perplexity(base, texts[0], window)["by_position"][-1]["from"]
            found = [
                Claim(
                    "The base model fails beyond its window",
                    f"{shown(at_the_end(base))} from token {first:,} on; inside its window "
                    + ", ".join(map(_number, inside)),
                    "above 1,000 (over 140 x); inside it 7.20",
                    each(lambda b, i: b > 2 * i, at_the_end(base), inside),
                ),
                Claim(
                    "Interpolation alone is worse than the base model inside its window, but stays finite to the end",
                    f"{shown(plain)}; from token {first:,} on " + ", ".join(map(_number, far)),
                    "16.10 (2.24 x)",
                    each(lambda p, i, f: math.isfinite(p) and i < p and f < 1.25 * p, plain, inside, far),
                ),
            ]
            found += [
                Claim(
                    f"{extension.options.steps} steps of fine-tuning recover it, and the longer window is used: {text}",
                    f"perplexity {_number(x)} ({_times(x / i)})",
                    "7.12 (0.99 x) after 200 steps, 6.95 (0.97 x) after 1,000",
                    x <= i,
                )
                for text, x, i in zip(texts, of(tuned[-1], window), inside, strict=True)
            ]
        last = self.passkey(tuned[-1])
        found.append(
            Claim(
                "The interpolated model finds a passkey anywhere in the new window",
                f"k_max {last['k_max']:,} of {window:,}, {last['success']:.0%} of all passkeys found",
                "8,192 of 8,192 after 200 steps",
                last["k_max"] == window,
            )
        )
        if "direct" in extension.runs:
            direct = self.passkey(extension.tuned("direct", "direct")[-1])
            found.append(
                Claim(
                    "Fine-tuned for as long without interpolation, the model finds it at short distances only",
                    f"k_max {direct['k_max']:,}, {direct['success']:.0%} of all passkeys found",
                    "k_max 1,792 after 200 steps, 2,560 after 10,000",
                    direct["k_max"] < last["k_max"] and direct["success"] < last["success"],
                )
            )
        return found

    def steps(self) -> Table:
        """Perplexity and k_max against steps of fine-tuning, as in the paper's Tables 3 and 4."""
        extension, window = self.extension, self.extension.window
        before = extension.before()
        start = {"tuned": before[1], "direct": before[0]}
        heads = ["fine-tuning", "steps", *(f"perplexity, {text}" for text in extension.heldout), "k_max", "found"]
        rows = []
        for run, label in extension.runs.items():
            for variant in [start[run], *extension.tuned(run, label)]:
                numbers = [float(self.perplexity(variant, text, window)["perplexity"]) for text in extension.heldout]
                key = self.passkey(variant)
                rows.append([label, variant.step or 0, *numbers, key["k_max"], f"{key['success']:.0%}"])
        return Table(heads, rows, f"Windows of {window:,} tokens against steps of fine-tuning")

    def overview(self) -> Table:
        """All models in the new window, and the base model truncated to its own."""
        extension, window = self.extension, self.extension.window
        before = extension.before()
        last = [extension.tuned(run, label)[-1] for run, label in extension.runs.items()]
        heads = ["model", "window", *(f"perplexity, {text}" for text in extension.heldout), "k_max", "found"]
        texts = list(extension.heldout)
        rows = [
            [
                "base model, truncated",
                extension.base,
                *(float(self.perplexity(before[0], t, extension.base)["perplexity"]) for t in texts),
                None,
                None,
            ]
        ]
        for variant in [*before, *last]:
            numbers = [float(self.perplexity(variant, t, window)["perplexity"]) for t in texts]
            key = self.passkey(variant)
            rows.append([variant.label, window, *numbers, key["k_max"], f"{key['success']:.0%}"])
        caption = "Perplexity (lower is better), k_max (the effective window in tokens) and passkeys found (higher)"
        return Table(heads, rows, caption)

    def charts(self) -> list[Figure]:
        """Perplexity by position, and how often the passkey is found."""
        extension = self.extension
        models = [*extension.before(), *(extension.tuned(run, label)[-1] for run, label in extension.runs.items())]
        found = []
        for text in extension.heldout:
            data = []
            for variant in models:
                entry = self.perplexity(variant, text, extension.window)
                parts = [p for p in entry["by_position"] if p["perplexity"] is not None]
                middles = [(p["from"] + p["to"]) / 2 for p in parts]
                data.append((variant.label, "", middles, [p["perplexity"] for p in parts]))
            marks = [("the base model's window", extension.base)]
            svg = figures.lines(data, "position (tokens)", "perplexity", log_y=True, marks=marks)
            found.append(Figure(svg, f"Perplexity by position in the text: {text}."))
        data = []
        for variant in models:
            points = self.passkey(variant)["by_distance"]
            data.append((variant.label, "", [p["k"] for p in points], [100 * p["success"] for p in points]))
        svg = figures.lines(data, "distance of the passkey (tokens)", "found (% of trials)")
        found.append(Figure(svg, "Passkey retrieval: how often a number is found, by its distance from the question."))
        return found


def write(extension: "Extension") -> list[Claim]:
    """Prints the verdict, and writes `report.html`, `report.md` and `verdict.json` into the output folder."""
    findings = Findings(extension)
    claims, overview, steps = findings.claims(), findings.overview(), findings.steps()
    for table in (overview, steps):
        log.info(
            f"{table.caption}\n{result.table([list(table.heads), *([t for t, _ in r] for r in table.shown())], 1)}\n"
        )
    held = sum(claim.holds for claim in claims)
    log.info(
        f"Verdict: {held} of {len(claims)} claims of the paper hold here\n" + "\n".join(c.sentence for c in claims)
    )
    checked = Claims([(c.claim, f"here: {c.here}; paper: {c.paper}", c.holds) for c in claims])
    lead = (
        f"{held} of {len(claims)} claims hold: {extension.options.model}, from {extension.base:,} to "
        f"{extension.window:,} tokens by Position Interpolation, {extension.options.steps} steps of fine-tuning."
    )
    first = Section("Verdict", [checked, *findings.charts(), overview, steps], _ABOUT, lead)
    inputs = [
        f"{v.label}={extension.output}/results/{v.name}-{what}.json"
        for v in [*extension.before(), *(extension.tuned(run, label)[-1] for run, label in extension.runs.items())]
        for what in (*extension.heldout, "passkey")
    ]
    sections = [first, *build(gather(inputs))]
    title = f"{pathlib.Path(extension.options.model).name}: {extension.base:,} to {extension.window:,} tokens"
    for name, text in (("report.html", to_html(title, sections)), ("report.md", to_markdown(title, sections))):
        with atomic.new_file(extension.output / name) as file:
            file.write_text(text)
    atomic.write_json(str(extension.output / "verdict.json"), [dataclasses.asdict(c) for c in claims])
    return claims


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:,.0f} x"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
