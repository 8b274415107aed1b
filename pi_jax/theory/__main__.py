"""`python -m pi_jax.theory`: plots Figures 2 and 5 of the paper and prints where its bounds hold."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from pi_jax import atomic, cli
from pi_jax.errors import InputError
from pi_jax.plotting import new_figure
from pi_jax.theory.bounds import SEED, bound_rows, bound_tables, fit
from pi_jax.theory.figures import plot_figure2, plot_figure5, plot_measured


@dataclasses.dataclass(frozen=True)
class Theory:
    """Plot Figures 2 and 5 of the Position Interpolation paper and print where its bounds hold.

    With --model and --text, also measure h and the attention scores of a model inside and beyond its window."""

    output: str
    """Folder for figure2.png, figure5.png, theory.json and, with a model, measured.png."""
    model: str = ""
    """Hugging Face folder, or the folder of a pi_jax run."""
    text: str = ""
    """Text file on which to measure the model."""
    tokens: int = 1024
    """Number of tokens of the text to use."""

    def __post_init__(self):
        if bool(self.model) != bool(self.text):
            raise InputError("--model and --text belong together: pass both or neither")
        if self.tokens < 2:
            raise InputError(f"--tokens is {self.tokens}: it must be at least 2")


def theory(args: Theory) -> dict[str, Any]:
    """Runs the command and returns the content of theory.json."""
    folder = pathlib.Path(args.output)
    new_figure(1, 1, 1)  # fail early if matplotlib is not installed
    if args.model:  # measure first, so that nothing is written if the model or the text does not exist
        from pi_jax.theory import measured

        scores = measured.measure(args.model, args.text, args.tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.output} cannot be created: {error.strerror}") from None
    rows = [*bound_rows(), *bound_rows((128,), reach=32768)]
    print(bound_tables(rows))
    report = {"command": "theory", "seed": SEED, "solver": "numpy.linalg.lstsq, float64", "bounds": rows}
    report["figure2"] = plot_figure2(folder / "figure2.png", fit())
    print(
        f"\nFigure 2 (seed {SEED}, float64 least squares by SVD): |a(s)| up to {report['figure2']['inside_max']:.2f} "
        f"inside, up to {report['figure2']['beyond_max']:.2g} beyond the window"
    )
    plot_figure5(folder / "figure5.png")
    if args.model:
        report |= {"model": args.model, "text": args.text, "measured": measured.summarize(scores)}
        plot_measured(folder / "measured.png", scores)
        print(f"\nMeasured on {args.model}\n" + measured.table(report["measured"]))
    atomic.write_json(str(folder / "theory.json"), report)
    print(f"\nwritten to {args.output}: figures and theory.json")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: theory(tyro.cli(Theory, prog="python -m pi_jax.theory", args=argv)))


if __name__ == "__main__":
    main()
