"""Counts the collectives of a compiled program from its HLO text."""

import collections
import math
import re

_COLLECTIVE = re.compile(
    r" = (?P<type>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Counts the collectives that a compiled program executes on one device: kind -> {'count', 'bytes'}.

    Collectives in loops are counted once per iteration. Bytes are those of the unsharded array.
    """
    lines, name = collections.defaultdict(list), None
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%").split("(")[0]
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            lines[name].append(line)
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})

    def visit(computation: str, times: int) -> None:
        for line in lines[computation]:
            if match := _COLLECTIVE.search(line):
                shapes = [int(bits) // 8 * math.prod(map(int, filter(None, dims.split(","))))
                          for _, bits, dims in _SHAPE.findall(match["type"])]  # fmt: skip
                size = sum(shapes)
                if match["start"] and match["kind"] == "collective-permute":  # operand, result, two counters
                    size = shapes[0]
                elif match["start"] and match["kind"] != "all-reduce":  # operands and results: the larger is unsharded
                    half = len(shapes) // 2
                    size = max(sum(shapes[:half]), sum(shapes[half:]))
                elif match["kind"] == "reduce-scatter":
                    size *= _group(line)
                found[match["kind"]]["count"] += times
                found[match["kind"]]["bytes"] += times * size
                continue
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                visit(called, times * int(trips[1]) if trips else times)

    visit(entry, 1)
    return dict(found)


def _group(line: str) -> int:
    """Number of devices that take part in a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(match[1].split(",")) if match else 1
