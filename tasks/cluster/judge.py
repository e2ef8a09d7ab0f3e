"""From evidence to a verdict: a pure function, so that the same measurements always say the same."""

from collections import defaultdict
from collections.abc import Sequence

from tasks.cluster.endurance_gates import endurance_findings
from tasks.cluster.evidence import GAVE_WAY, NOT_RUN, SHARED_IS_FULL, Evidence
from tasks.cluster.expected import expected_figures, why_no_share
from tasks.cluster.figure_gates import FABRIC, LATE, LIMITS_OF_REFERENCE, References, figure_findings
from tasks.cluster.inventory_gates import dicts_of, inventory_findings, minority
from tasks.cluster.pairs import localise, node_of, slow_routes
from tasks.cluster.port_errors import port_findings
from tasks.cluster.transport import transport_findings
from tasks.cluster.variants import expected_of_variants, variant_findings
from tasks.contracts.cluster_report import Finding, Layer, Status, Suspect
from tasks.contracts.cluster_settings import STAGES
from tasks.hardware.reference import chip_of, fabric_of

ORDER = (Status.FAIL, Status.ERROR, Status.WARN, Status.PASS, Status.SKIP)
"""Worst first. SKIP comes last: it is no verdict at all where nothing else is."""
FABRIC_OF_RATE = {400.0: "infiniband_ndr", 200.0: "infiniband_hdr"}


def references_of(evidence: Evidence) -> tuple[References, list[str]]:
    """The reference of chip and fabrics, and what of it is not known."""
    check, notes = evidence.check, []
    gpus = [g for r in evidence.records.get("inventory", ()) for g in dicts_of(r.facts.get("gpus"))]
    # A check of processors may run on a machine with GPUs.
    device = "CPU" if not check.pool.gpus else str(gpus[0].get("name")) if gpus else "unknown"
    chip = chip_of(device if check.chip == "auto" else check.chip)
    if chip is None:
        notes.append(f"chip {device!r} is not in tasks/hardware/reference.yaml: judged by fleet and history alone")
    node_fabric = check.node_fabric if check.node_fabric != "auto" else chip.node_fabric if chip else "unknown"
    cluster_fabric = check.cluster_fabric if check.cluster_fabric != "auto" else _cluster_fabric(evidence)
    known = References(chip, fabric_of(node_fabric), fabric_of(cluster_fabric))
    if check.pool.num_nodes > 1 and known.cluster_fabric is None:
        notes.append(f"fabric between nodes is {cluster_fabric!r}, of which there is no reference: set cluster_fabric")
    return known, notes


def _cluster_fabric(evidence: Evidence) -> str:
    if not evidence.check.pool.gpus:
        return "loopback" if len({r.host for rs in evidence.records.values() for r in rs}) <= 1 else "unknown"
    ports = [p for r in evidence.records.get("inventory", ()) for p in dicts_of(r.facts.get("infiniband"))]
    active = [port for port in ports if port.get("state") == "ACTIVE"]
    # Nodes have an Ethernet port or two beside their InfiniBand.
    if active and sum(port.get("link_layer") == "Ethernet" for port in active) > len(active) / 2:
        return "roce"
    rates = [port.get("rate_gbits_per_s") for port in active if port.get("link_layer") != "Ethernet"]
    return FABRIC_OF_RATE.get(max((rate for rate in rates if isinstance(rate, int | float)), default=0.0), "unknown")


def judge(evidence: Evidence) -> list[Finding]:
    """Every gate's finding, in the order of the stages."""
    references, _ = references_of(evidence)
    figures = figure_findings(evidence, references, expected_figures(evidence))
    pairs = _pair_findings(evidence, references)
    findings = [
        *_stage_findings(evidence),
        *_same_nodes(evidence),
        *inventory_findings(evidence),
        *_problem_findings(evidence),
        *_equal_steps(evidence),
        *transport_findings(evidence),
        *port_findings(evidence),
        *variant_findings(evidence),
        *endurance_findings(evidence),
        *pairs,
        *figures,
        *_share_left_out(evidence),
        *_limits_without_a_gate(evidence, figures, pairs),
    ]
    findings = _held_up(findings)
    return sorted(findings, key=lambda f: STAGES.index(f.stage))


def _held_up(findings: Sequence[Finding]) -> list[Finding]:
    """Blame a rank that comes late for what it holds up: the fabric moves no faster than the last who comes."""
    late = tuple(dict.fromkeys(c for f in findings if f.gate == "lateness_s" for c in f.culprits))
    if not late:
        return list(findings)
    told = f"{', '.join(late)} came late to it, which is part of this time"
    return [
        f.model_copy(update={"culprits": late, "detail": f"{f.detail}; {told}", "action": LATE})
        if f.stage == "collectives"
        and f.gate != "lateness_s"
        and (f.layer in ("floor", "fleet", "history") or (f.layer == "limit" and "busbw" in f.gate))
        and all(culprit.startswith(FABRIC) or any(place in culprit for place in late) for culprit in f.culprits)
        and f.culprits
        else f
        for f in findings
    ]


def status_of(findings: Sequence[Finding]) -> Status:
    """The check's: the worst of all; PASS and WARN alone are good enough. SKIP where it gave way before its end."""
    found = {finding.status for finding in findings}
    if not found & {Status.FAIL, Status.ERROR} and any(finding.gate == GAVE_WAY for finding in findings):
        # What was measured before may be sound, and what was asked for was not measured.
        return Status.SKIP
    return next((status for status in ORDER if status in found), Status.ERROR)


def suspects_of(findings: Sequence[Finding]) -> list[Suspect]:
    """Who is to blame, most gates first, of what does not pass."""
    gates: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.status in (Status.FAIL, Status.ERROR, Status.WARN):
            for culprit in finding.culprits:
                gates[culprit].append(finding)
    found = [
        Suspect(
            place=place,
            gates=tuple(f"{f.stage}/{f.gate}" + (f"@{f.size_bytes}" if f.size_bytes is not None else "") for f in own),
            action=next((f.action for f in own if f.action), ""),
        )
        for place, own in gates.items()
    ]
    worst = {s.place: min(ORDER.index(f.status) for f in gates[s.place]) for s in found}
    return sorted(found, key=lambda s: (worst[s.place], -len(s.gates), s.place))


def statement_of(status: Status, findings: Sequence[Finding], suspects: Sequence[Suspect]) -> str:
    """One sentence for a person."""
    counts = {s: sum(f.status is s for f in findings) for s in ORDER}
    told = ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
    if not suspects:
        return f"{status.value}: {told}."
    names = ", ".join(suspect.place for suspect in suspects[:3]) + (" and others" if len(suspects) > 3 else "")
    return f"{status.value}: {told}. Look at {names}."


def _stage_findings(evidence: Evidence) -> list[Finding]:
    findings = []
    for stage, outcome in evidence.outcomes.items():
        places = evidence.places_of_ranks(stage)
        unreadable = list(evidence.unreadable.get(stage, ()))
        if outcome.state in ("skipped", "yielded"):
            gate = GAVE_WAY if outcome.state == "yielded" else "finished"
            findings.append(Finding(stage=stage, gate=gate, status=Status.SKIP, layer="presence", detail=outcome.error))
            continue
        silent: list[int] = []
        if stage != "training":
            known = {record.rank for record in evidence.records.get(stage, ())} | {rank for rank, _ in unreadable}
            silent = [rank for rank in range(evidence.check.pool.world_size) if rank not in known]
        blamed = [places.get(rank, f"rank {rank}") for rank in outcome.culprit_ranks]
        if outcome.state == "failed" and len(blamed) > 1 and _waited(outcome.error):
            # Of those that said nothing when somebody was waited for in vain, the ones that were behind held up the others.
            behind = _left_behind(evidence, stage)
            blamed = [place for place in blamed if place in behind] or blamed
        blamed += [evidence.node_name(stage, node) for node in outcome.culprit_nodes]
        blamed += [places.get(rank, f"rank {rank}") for rank, _ in unreadable]
        if outcome.state == "done":
            blamed += [places[rank] for rank in silent]
        if outcome.state == "failed" and not blamed:
            blamed += _left_behind(evidence, stage)
        detail = [outcome.error] * bool(outcome.error) + [why for _, why in unreadable]
        detail += [f"rank {rank} left no record" for rank in silent]
        if outcome.state == "error":
            findings.append(
                Finding(stage=stage, gate="finished", status=Status.ERROR, layer="presence", detail=outcome.error,
                        action="see that the pool's scheduler answers and takes such jobs")
            )  # fmt: skip
            continue
        is_bad = outcome.state == "failed" or unreadable or silent
        findings.append(
            Finding(
                stage=stage, gate="finished", status=Status.FAIL if is_bad else Status.PASS, layer="presence",
                culprits=tuple(dict.fromkeys(blamed)), value=outcome.seconds, detail="; ".join(detail) or "all ranks to the end",
                action="read this process's log; see whether it repeats with the same node" if is_bad else "",
            )
        )  # fmt: skip
    return findings


def _same_nodes(evidence: Evidence) -> list[Finding]:
    """Whether all stages measured the same machines: a scheduler may give each job others."""
    hosts = {stage: {r.host for r in records} for stage, records in evidence.records.items() if records}
    if len(hosts) < 2:
        return []
    all_of_them = set().union(*hosts.values())
    partly = sorted(host for host in all_of_them if any(host not in seen for seen in hosts.values()))
    return [
        Finding(
            stage="inventory", gate="same_nodes", status=Status.WARN if partly else Status.PASS, layer="presence",
            detail=f"not in every stage: {', '.join(partly)}" if partly else f"{len(all_of_them)} hosts in every stage",
            action="name the nodes (a reservation, pool.slurm.constraint, node selectors), so that all stages measure the same"
            if partly else "",
        )
    ]  # fmt: skip


def _limits_without_a_gate(evidence: Evidence, figures: Sequence[Finding], pairs: Sequence[Finding]) -> list[Finding]:
    """Limits that were asked for and that no measurement met: a limit that cannot be missed is no limit.

    Args:
        figures: gates that take limits by their names; the inventory's gates take none.
    """
    thresholds = evidence.check.thresholds
    wanted = {*thresholds.overrides, *(LIMITS_OF_REFERENCE if thresholds.profile == "reference" else ())}
    met = {f.gate for f in figures} | {f"{f.gate}@{f.size_bytes}" for f in figures}
    met |= {"pair_gbytes_per_s"} if pairs else set()
    asked = [evidence.outcomes.get(stage) for stage in evidence.check.stages]
    is_whole = all(outcome is not None and outcome.state not in NOT_RUN for outcome in asked)
    # These have a finding of their own, which says why there is no such figure.
    unmeasured = {
        key for _, name, size, _ in expected_of_variants(evidence, done=False) for key in (name, f"{name}@{size}")
    }
    return [
        Finding(
            stage="inventory", gate=f"limit {name}", layer="limit",
            status=Status.FAIL if is_whole and name not in unmeasured else Status.SKIP,
            detail="no figure of this name and size was measured", action="name it as in the report; see collectives.size_factor",
        )
        for name in sorted(wanted - met)
    ]  # fmt: skip


def _waited(error: str) -> bool:
    return any(sign in error.lower() for sign in ("missingranks", "timed out", "waited "))


def _left_behind(evidence: Evidence, stage: str) -> list[str]:
    """Where nothing else tells: the processes that had begun fewer measurements than the others when all were ended."""
    records = evidence.records.get(stage, ())
    furthest = max((record.step for record in records), default=0)
    return [evidence.place(record) for record in records if record.doing != "done" and record.step < furthest]


def _problem_findings(evidence: Evidence) -> list[Finding]:
    """Wrong results and refused writes, one finding a gate, with everyone who saw it; and that there were none."""
    findings = []
    usual = {
        "devices": ["memory_pattern_correct", "step_repeats_bitwise"],
        "collectives": [f"{o}_correct" for o in evidence.check.collectives.operations]
        + ["pair_correct"] * (evidence.check.pool.world_size > 1),
        "storage": ["shared_writable", SHARED_IS_FULL, "shared_correct", "shared_is_one", "scratch_writable", "scratch_correct"],
        "endurance": ["endurance_correct"],
    }  # fmt: skip
    # Once for all rails: they are one figure by its name.
    usual["collectives"] += dict.fromkeys(
        name.replace("_busbw_gbytes_per_s", "_correct") for _, name, _, _ in expected_of_variants(evidence)
    )
    for stage, outcome in evidence.outcomes.items():
        if outcome.state in NOT_RUN:
            continue
        seen: dict[str, dict[str, str]] = defaultdict(dict)
        records = list(evidence.records.get(stage, ()))
        if stage == "collectives":
            records += [record for own in evidence.variants.values() for record in own]
        for record in records:
            for problem in record.problems:
                place = evidence.node_of(record) if stage == "storage" else evidence.place(record)
                if problem.gate == SHARED_IS_FULL:
                    place = "storage.shared"
                seen[problem.gate].setdefault(place, problem.error)
        for gate in sorted({*usual.get(stage, []), *seen}):
            bad = seen.get(gate, {})
            if not bad and (outcome.state == "failed" or (SHARED_IS_FULL in seen and gate.startswith("shared_"))):
                # What was not measured is not right either; `finished` says that it was not.
                continue
            findings.append(
                Finding(
                    stage=stage, gate=gate, status=Status.FAIL if bad else Status.PASS, layer="correctness",
                    culprits=tuple(bad),
                    detail="; ".join(f"{p}: {e}" for p, e in list(bad.items())[:4]) or "as it must be",
                    action=_problem_action(gate) if bad else "",
                )
            )  # fmt: skip
    return findings


def _problem_action(gate: str) -> str:
    if gate == SHARED_IS_FULL:
        return "free space on the shared filesystem, or raise this user's quota: see df and quota"
    if "writable" in gate:
        return "free space or remount it writable on this node: see df, mount and dmesg there"
    if gate == "shared_is_one":
        return "mount the shared filesystem at storage.shared on this node"
    return "take this GPU out of use and run the vendor's diagnosis: it computes or moves wrong data"


def _equal_steps(evidence: Evidence) -> list[Finding]:
    """The seeded step has the same bits on all like devices."""
    digests = {
        evidence.place(r): r.facts["step_sha256"]
        for r in evidence.records.get("devices", ())
        if "step_sha256" in r.facts
    }
    if len(digests) < 2:
        return []
    # Of two halves either may be wrong: then all are named.
    off = tuple(minority(digests))
    return [
        Finding(
            stage="devices", gate="step_equal_on_all", status=Status.FAIL if off else Status.PASS, layer="correctness",
            culprits=off,
            detail=f"{len(off) or 'none'} of {len(digests)} computed other bits",
            action=_problem_action("step") if off else "",
        )
    ]  # fmt: skip


def _pair_findings(evidence: Evidence, references: References) -> list[Finding]:
    speeds = {
        (placed.place, placed.figure.peer): placed.figure.value if placed.figure.value is not None else float("nan")
        for placed in evidence.placed()
        if placed.figure.name == "pair_gbytes_per_s" and placed.figure.peer is not None
    }
    outcome, pool = evidence.outcomes.get("collectives"), evidence.check.pool
    if outcome is None or outcome.state in NOT_RUN or pool.world_size == 1:
        return []
    thresholds = evidence.check.thresholds
    missing = _num_routes(evidence) - len(speeds)
    if missing and outcome.state == "done":
        return [
            Finding(
                stage="collectives", gate="pairs", status=Status.FAIL, layer="presence",
                detail=f"{missing} of {_num_routes(evidence)} routes between pairs were not measured",
                action="read the processes' logs for what kept them from measuring",
            )
        ]  # fmt: skip
    if not speeds:
        # What was not measured of a stage that ended early has a finding of its own.
        return []
    override = thresholds.overrides.get("pair_gbytes_per_s")
    inside, across = (
        override if override is not None
        else thresholds.floor_share * fabric.pair_gbytes_per_s if fabric is not None and fabric.pair_gbytes_per_s else None
        for fabric in (references.node_fabric, references.cluster_fabric)
    )  # fmt: skip
    slow = slow_routes(speeds, inside, across, thresholds)
    culprits = localise(slow, list(speeds))
    worst_route = min(speeds, key=lambda route: speeds[route] if speeds[route] == speeds[route] else -1.0)
    floor = inside if node_of(worst_route[0]) == node_of(worst_route[1]) else across
    layer: Layer = "limit" if override is not None else "floor" if floor is not None else "fleet"
    return [
        Finding(
            stage="collectives", gate="pairs", status=Status.FAIL if slow else Status.PASS, layer=layer,
            value=speeds[worst_route], limit=floor, culprits=tuple(c.place for c in culprits),
            detail="; ".join(f"{c.place}: {len(c.pairs)} slow routes" for c in culprits) or f"{len(speeds)} routes alike",
            action=culprits[0].action if culprits else "",
        )
    ]  # fmt: skip


def _num_routes(evidence: Evidence) -> int:
    """Both ways between all pairs, or between the first ranks of the nodes where there are too many."""
    pool = evidence.check.pool
    ends = pool.world_size if pool.world_size <= evidence.check.collectives.max_pair_ranks else pool.num_nodes
    return ends * (ends - 1)


def _share_left_out(evidence: Evidence) -> list[Finding]:
    outcome, why = evidence.outcomes.get("training"), why_no_share(evidence.check)
    if outcome is None or outcome.state in NOT_RUN or why is None:
        return []
    gate = "training_share_of_product_rate"
    return [Finding(stage="training", gate=gate, status=Status.SKIP, layer="presence", detail=why)]
