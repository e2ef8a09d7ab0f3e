"""The probes of one stage as a job of the pool: ``torchrun -m tasks.cluster spec.json``, one process per GPU.

The spec's arguments: ``stage``, ``check`` (settings), ``shared`` and ``scratch`` (folders); of collectives perhaps ``variant``
(:class:`tasks.cluster.variants.Variant`).
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Attempt, run_rank


def measure(attempt: Attempt) -> Mapping[str, Any] | None:
    """Measure what the stage asks for; every rank leaves its own record, rank 0 the result."""
    from tasks.cluster.collectives import measure_collectives, measure_variant
    from tasks.cluster.devices import measure_devices
    from tasks.cluster.endurance import measure_endurance
    from tasks.cluster.faults import Faults
    from tasks.cluster.inventory import take_inventory
    from tasks.cluster.meeting import Meeting
    from tasks.cluster.port_errors import AFTER, BEFORE, WATCHED
    from tasks.cluster.storage import measure_storage
    from tasks.cluster.training_inputs import make_inputs
    from tasks.cluster.transport import listen, own_log, read_transport
    from tasks.contracts.cluster_settings import ClusterCheck
    from tasks.hardware.infiniband import ADAPTERS, ports

    arguments = attempt.arguments
    variant = arguments.get("variant")
    stage, check = arguments["stage"], ClusterCheck(**arguments["check"])
    if stage == "training_inputs":
        return make_inputs(check)
    if stage == "collectives":
        # Here and not in the job's environment, over which the pool's own settings go.
        os.environ |= variant["environment"] if variant else {}
        listen(attempt.folder)
    meeting = Meeting.join(attempt, check.stall_limit_s, devices=stage in ("devices", "collectives", "endurance"))
    inject = None if check.inject is None else check.inject.model_dump()
    faults = Faults.of(inject, meeting.node, meeting.process)
    faults.at_start()
    if stage == "inventory":
        take_inventory(meeting, faults)
    elif stage == "devices":
        measure_devices(meeting, check.devices, faults)
    elif stage == "collectives":
        if variant:
            meeting.recorder.fact("rail", variant["rail"])
            meeting.recorder.fact("environment", {name: os.environ.get(name) for name in variant["environment"]})
            measure_variant(
                meeting, check.collectives, faults, variant["prefix"], variant["operations"], variant["sizes_bytes"]
            )
        else:
            # Of each node once, and in this job: another job's nodes may be others.
            look = meeting.recorder.fact if meeting.process == 0 else lambda name, value: None
            look(BEFORE, ports(ADAPTERS))
            began = time.monotonic()
            measure_collectives(meeting, check.collectives, faults)
            look(WATCHED, time.monotonic() - began)
            look(AFTER, ports(ADAPTERS))
        if meeting.is_gpu:
            meeting.recorder.fact("transport", read_transport(own_log(attempt.folder)).facts())
    elif stage == "endurance":
        measure_endurance(meeting, check.devices, check.soak_minutes * 60, faults)
    elif stage == "storage":
        measure_storage(meeting, check.storage_probe, Path(arguments["shared"]), Path(arguments["scratch"]), faults)
    else:
        raise ValueError(f"stage={stage!r} is none of the probes: inventory, devices, collectives, storage, endurance")
    meeting.begin("the end")
    meeting.leave()
    return {"stage": stage, "world_size": meeting.world_size} if meeting.rank == 0 else None


if __name__ == "__main__":
    run_rank(measure, sys.argv)
