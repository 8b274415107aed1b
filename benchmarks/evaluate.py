"""Speed of evaluation against transformers on the same machine, weights and protocol, in one run.

python benchmarks/evaluate.py decode --model DIR --output FILE.json
python benchmarks/evaluate.py perplexity --model DIR --data FILES --output FILE.json
"""

import sys

import greedy_decoding
import sliding_perplexity
import tyro

WHAT = {
    "decode": (greedy_decoding.Decode, greedy_decoding.main),
    "perplexity": (sliding_perplexity.Perplexity, sliding_perplexity.main),
}


def main() -> None:
    """The first word says what to measure."""
    if len(sys.argv) < 2 or sys.argv[1] not in WHAT:
        sys.exit(f"usage: python benchmarks/evaluate.py {{{','.join(WHAT)}}} [--help]")
    options, run = WHAT[sys.argv[1]]
    run(tyro.cli(options, prog=f"python benchmarks/evaluate.py {sys.argv[1]}", args=sys.argv[2:]))


if __name__ == "__main__":
    main()
