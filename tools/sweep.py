"""``make sweep``: the crosscoders of notebook 08, in process or on a Ray cluster."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache

from dfc_lib import paths, profiles
from dfc_lib.profiles import Profile
from dfc_lib.steering import sweep
from dfc_lib.study import Study


def on_ray(runs: Sequence[sweep.Run], study: Study) -> Iterator[tuple[sweep.Run, sweep.Result]]:
    """On the Ray cluster at ``RAY_ADDRESS``, or a local one; the tasks of a lost node run again.

    Every node needs this compendium, its environment and its build folder at the same paths (a
    shared file system): a task that runs again finds there how far its training had come.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("the Ray runner needs: pip install -e '.[cluster]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A task that fits on no node would wait for ever.
    most = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    gpus = int(study.profile.device == "cuda")
    task = ray.remote(max_retries=5, num_cpus=min(sweep.THREADS, most), num_gpus=gpus)(in_worker)
    where = (study.profile, study.setting, str(paths.build_root()))
    waiting = {task.remote(run, *where): run for run in runs}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)


def in_worker(run: sweep.Run, profile: Profile, setting: str, build_root: str) -> sweep.Result:
    """``run_one`` in a process of Ray's, which reads what runs share when its first task comes."""
    os.environ["DFC_BUILD"] = build_root
    return sweep.run_one(run, open_study(profile, setting))


@cache
def open_study(profile: Profile, setting: str) -> Study:
    """One per process, profile and setting."""
    return Study(profile) if setting == Study.setting else Study(profile).at(setting)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__)
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--ray", action="store_true", help="on the cluster at RAY_ADDRESS, or here")
    options, start = parser.parse_args(arguments), time.perf_counter()
    try:
        profile, made = profiles.load(options.profile), 0
        print("about five minutes at toy on two cores; finished runs are skipped", flush=True)
        for setting, runs in {"threshold": sweep.grid(), "final": sweep.grid_in_final()}.items():
            study = open_study(profile, setting)
            sweep.baselines(study)
            rows, _ = sweep.sweep(runs, study, on_ray if options.ray else sweep.in_process)
            made += len(rows)
            print(f"setting {setting}: {sweep.folder(study)}")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{made} runs, {(time.perf_counter() - start) / 60:.1f} minutes this time")
    return 0


if __name__ == "__main__":
    # By its own name, so that a worker of Ray's finds `in_worker` there.
    from tools import sweep as module

    sys.exit(module.main())
