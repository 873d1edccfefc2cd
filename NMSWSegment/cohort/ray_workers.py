"""Cases on the computers of a Ray cluster, or on local Ray workers: the same run_case, another way to start it.

All computers see the inputs and the output folder under the same paths. Needs the extra "ray".
"""

import os
from collections.abc import Iterator, Sequence

from NMSWSegment.cohort.case_run import CohortSettings, run_case
from NMSWSegment.cohort.cases import Case
from NMSWSegment.cohort.local_workers import Finished, Started, WorkerPlan
from NMSWSegment.cohort.outcome import failed_outcome
from NMSWSegment.protocol import UserError

LOCAL = "local"
_MOST_SUBMITTED = 2
"""Cases per worker that Ray knows of; the others wait here, so that Ctrl-C leaves little behind."""


def run_on_ray(
    cases: Sequence[Case], settings: CohortSettings, *, address: str, plan: WorkerPlan, needs_bytes: dict[str, int | None]
) -> Iterator[Started | Finished]:
    """Run all cases as Ray tasks and tell about each when it is handed over and when it ends.

    Args:
        address: of a cluster that 'ray start' made ("auto" finds it), or LOCAL for workers on this computer.
        plan: devices and threads of the workers; on a cluster only the threads and the kind of device count, Ray chooses the places.
        needs_bytes: memory by name of the case.

    Raises:
        UserError: Ray is missing, or there is no cluster at the address.
    """
    ray = _connected(address, plan=plan)
    is_gpu = plan.devices[0].startswith("cuda")
    task = ray.remote(num_cpus=plan.threads, num_gpus=1 if is_gpu else 0, max_retries=0)(run_case)
    waiting, running = list(cases), {}
    try:
        while waiting or running:
            slots = _MOST_SUBMITTED * max(1, int(ray.cluster_resources().get("CPU", 1) // plan.threads))
            while waiting and len(running) < slots:
                case = waiting.pop(0)
                memory = {"memory": needs_bytes[case.name]} if address != LOCAL and needs_bytes.get(case.name) else {}
                # Ray shows a task only the GPU that it gave to it, which is then the first one.
                reference = task.options(name=case.name, **memory).remote(case, settings, device="cuda" if is_gpu else plan.devices[0], threads=plan.threads)
                running[reference] = case
                yield Started(case)
            done, _ = ray.wait(list(running), num_returns=1)
            case = running.pop(done[0])
            try:
                outcome = ray.get(done[0])
            except ray.exceptions.RayError as error:
                outcome = failed_outcome(
                    case, f"Its Ray worker died ({str(error).splitlines()[0]}). Look at the Ray logs, or run this case alone with 'nmsw segment'."
                )
            yield Finished(case, outcome)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _connected(address: str, *, plan: WorkerPlan):
    """The module ray, connected to a cluster or to workers of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the hospital unless someone asks for it
    try:
        import ray
    except ImportError as error:
        raise UserError("Running on Ray needs the package ray, which is not installed. Install it with: pip install ray") from error
    try:
        if address == LOCAL:
            ray.init(num_cpus=len(plan.devices) * plan.threads, include_dashboard=False, configure_logging=False, log_to_driver=False)
        else:
            ray.init(address=address, configure_logging=False, log_to_driver=False)
    except Exception as error:  # Ray raises plain exceptions where its own processes do not start
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if address == LOCAL:
            raise UserError(f"Ray could not be started here ({reason}) Close other programs, or leave --ray out.") from error
        raise UserError(f"There is no Ray cluster at '{address}' ({reason}). Start one with 'ray start --head', or use --ray local.") from error
    return ray
