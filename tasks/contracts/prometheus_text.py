"""Prometheus' text format, as node_exporter's textfile collector reads it: ours are all gauges."""

from collections.abc import Mapping, Sequence

PREFIX = "proving_ground_"
Sample = tuple[str, Mapping[str, str], float]
"""``(metric, labels, value)``; the metric without :data:`PREFIX`."""


def render(samples: Sequence[Sample], meanings: Mapping[str, str]) -> str:
    """The samples below what each metric means.

    Args:
        meanings: of every metric that there may be; the order in which they are told.
    """
    lines = []
    for name, meaning in meanings.items():
        full = f"{PREFIX}{name}"
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} gauge"]
        for metric, labels, value in samples:
            if metric == name:
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                number = "NaN" if value != value else repr(float(value))
                lines.append(f"{full}{{{inside}}} {number}" if inside else f"{full} {number}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
