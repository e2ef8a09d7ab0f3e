"""From slow pairs to a suspect: a GPU, a node, a GPU's way to other nodes, or, where no end is to blame, the link."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.contracts.cluster_settings import ThresholdSettings

Route = tuple[str, str]


@dataclass(frozen=True)
class Culprit:
    """Who explains slow pairs.

    Attributes:
        place: ``node1/gpu3``, ``node1``, ``the link between node0 and node1``.
        pairs: what it explains.
    """

    place: str
    action: str
    pairs: tuple[Route, ...]


def slow_routes(
    speeds: Mapping[Route, float], floor_inside: float | None, floor_across: float | None, thresholds: ThresholdSettings
) -> list[Route]:
    """Routes that miss the floor of their kind (inside a node, between nodes), or its median by twice the effect.

    Twice: routes are measured side by side and share what they cross.
    """
    slow = []
    for is_inside, floor in ((True, floor_inside), (False, floor_across)):
        kind = {
            route: speed for route, speed in speeds.items() if (node_of(route[0]) == node_of(route[1])) is is_inside
        }
        if not kind:
            continue
        typical = statistics.median(kind.values())
        limit = (1 - min(0.9, 2 * thresholds.fleet_effect)) * typical
        limit = max(limit, floor or 0.0)
        slow += [route for route, speed in kind.items() if not speed >= limit]
    return slow


def localise(slow: Sequence[Route], measured: Sequence[Route]) -> list[Culprit]:
    """The fewest culprits that explain all slow routes: ends all of whose routes are slow while others' are not.

    An end is a suspect only where most of what does not touch it is fine: that is the known-good partner.
    """
    left = set(slow)
    culprits: list[Culprit] = []
    nodes = sorted({node_of(place) for route in measured for place in route})
    places = sorted({place for route in measured for place in route})
    while left:
        candidates: list[tuple[int, Culprit]] = []
        for place in places:
            own = [route for route in measured if place in route]
            across = [route for route in own if node_of(route[0]) != node_of(route[1])]
            inside = [route for route in own if route not in across]
            mates = [p for p in places if node_of(p) == node_of(place)]
            if len(mates) > 1 and inside and _all(inside, left) and _others_fine(place, measured, slow):
                candidates.append((len(_in(own, left)), _culprit(place, "replace or reseat this GPU", own, left)))
            elif len(mates) > 1 and across and _all(across, left) and not _in(inside, left):
                others = [r for m in mates if m != place for r in measured if m in r and r not in own]
                if any(node_of(r[0]) != node_of(r[1]) and r not in slow for r in others):
                    action = "check the network adapter, cable and switch port (rail) of this GPU"
                    candidates.append((len(_in(across, left)), _culprit(place, action, across, left)))
        if len(nodes) > 2:
            for node in nodes:
                across = [
                    r for r in measured if node in (node_of(r[0]), node_of(r[1])) and node_of(r[0]) != node_of(r[1])
                ]
                elsewhere = [r for r in measured if node_of(r[0]) != node_of(r[1]) and r not in across]
                if across and _all(across, left) and any(r not in slow for r in elsewhere):
                    action = "drain this node; check its network adapters, cables and driver"
                    candidates.append((len(across), _culprit(node, action, across, left)))
        if not candidates:
            break
        _, best = max(candidates, key=lambda item: item[0])
        culprits.append(best)
        left -= set(best.pairs)
    # No end explains these: the way between them does.
    by_link: dict[tuple[str, str], list[Route]] = defaultdict(list)
    for route in sorted(left):
        first, second = node_of(route[0]), node_of(route[1])
        ends = (first, second) if first != second else route
        by_link[(min(ends), max(ends))].append(route)
    for (a, b), routes in by_link.items():
        action = "measure each end with another partner; check cables and switch ports between them"
        culprits.append(Culprit(f"the link between {a} and {b}", action, tuple(routes)))
    return culprits


def node_of(place: str) -> str:
    """The node of a place."""
    return place.partition("/")[0]


def _all(routes: Sequence[Route], slow: set[Route]) -> bool:
    return all(route in slow for route in routes)


def _in(routes: Sequence[Route], slow: set[Route]) -> list[Route]:
    return [route for route in routes if route in slow]


def _others_fine(place: str, measured: Sequence[Route], slow: Sequence[Route]) -> bool:
    others = [route for route in measured if place not in route]
    return bool(others) and sum(route in slow for route in others) < len(others) / 2


def _culprit(place: str, action: str, own: Sequence[Route], slow: set[Route]) -> Culprit:
    return Culprit(place, action, tuple(_in(own, slow)))
