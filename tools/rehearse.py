"""The whole path of a pair of one's own, at budgets so small that it takes minutes.

    make rehearse PROFILE=mine.json      python -m tools.rehearse mine.json

The profile's models and texts are taken as they are; its sizes are cut down to those of ``smoke``.
All notebooks run on that, one after the other, so that one which fails does not hide the next. The
report says which ran, what to change in the profile before the full run, and what that run will
need; it is printed and kept in ``build/<name>_rehearsal/rehearsal.md``, where it is brought up to
date after each notebook. What is found before the first one is printed at once. Numbers and figures
of a rehearsal mean nothing.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfc_lib import paths, profiles, store
from dfc_lib.profiles import Profile
from tools import budget, fill, runner
from tools.freshness import CompendiumError, Project

COUNTS = ("dict_size", "k", "steps", "batch_size", "many_seeds", "batch_generation")
COUNTS += ("max_new_tokens",)
NOT_IN_A_FILE = ("name", "published", "file")
EMBEDDED = "quickstart"  # shows the shipped crosscoder, which is the embedded pair's
NEEDS_CHECKPOINTS = "09_rl_vs_sft"  # of an RL and an SFT run, which few pairs come with


def settings(profile: Profile) -> dict[str, Any]:
    """What a profile file says of the rehearsal: the profile's own fields, its sizes cut down.

    A device that is not here is replaced by the CPU; then all is computed in float32, which a CPU
    is made for.
    """
    from dfc_lib.data.pair import device_is_here

    own, small = dataclasses.asdict(profile), dataclasses.asdict(profiles.get("smoke"))
    found = {name: value for name, value in own.items() if name not in NOT_IN_A_FILE}
    for name in own:
        if name.startswith("n_") or name in COUNTS:
            found[name] = min(own[name], small[name])
    found["seeds"] = own["seeds"][: len(small["seeds"])]
    found |= {"like": "smoke", "others": dict(profile.others)}
    return (
        found if device_is_here(profile.device) else found | {"device": "cpu", "dtype": "float32"}
    )


def write_profile(profile: Profile) -> Profile:
    """Write the rehearsal's profile into the build folder, and read it as any other.

    Raises:
        ValueError: the profile is one that is tiny or embedded already (the message says what to
            run instead).
    """
    if profile.pair and paths.ROOT / profile.pair == paths.PAIR:
        raise ValueError(
            f"profile {profile.name} is the embedded pair, whose rehearsal is `make smoke`; name "
            "the profile file of your own pair: make rehearse PROFILE=mine.json"
        )
    path = paths.build("rehearsals") / f"{profile.name}_rehearsal.json"
    store.write_atomically(path, json.dumps(settings(profile), indent=1) + "\n")
    return profiles.get(str(path))


# --------------------------------------------------------------------------------------------------
# What can be said before anything runs


def check_models(profile: Profile) -> list[str]:
    """What is wrong with the models as far as their ``config.json`` says."""
    from dfc_lib.data.pair import is_hub_name

    configs, problems = {}, []
    for name, model in profile.family.items():
        source = profile.location(model)
        if not (Path(source).exists() or is_hub_name(str(source))):
            problems.append(f"{name}: {source}: no such folder (a hub model is named owner/name)")
            continue
        try:
            configs[name] = budget.config_of(source)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    widths = {name: config["hidden_size"] for name, config in configs.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} {width}" for name, width in widths.items())
        problems.append(
            f"the models differ in width ({shown}): take a tuned model and the base that it was "
            "tuned from"
        )
    depth = min((config["num_hidden_layers"] for config in configs.values()), default=None)
    if depth is not None and not 0 <= profile.layer < depth:
        problems.append(
            f"layer is {profile.layer}, but layers are counted from 0 to {depth - 1}: begin with "
            f"{depth // 3}, then take the one that notebook 01 prints (its section 5)"
        )
    return problems


def check_texts(profile: Profile) -> list[str]:
    """Where the prompts and neutral texts are fewer than the profile asks for, or of one kind."""
    from dfc_lib.data import corpora

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        try:
            records = {split: corpora.records(profile, split) for split in corpora.SHARES}
            neutral = {
                split: corpora.neutral(profile, split) for split in ("crosscoder", "ranking")
            }
        except (OSError, RuntimeError, ValueError) as error:
            return [str(error)]
    calls = {
        split: [r for r in found if r.kind == "call" and not r.held_out]
        for split, found in records.items()
    }
    have = {
        "n_crosscoder_texts": (len(records["crosscoder"]), "prompts of the crosscoder split"),
        "n_ranking": (len(records["ranking"]), "prompts of the ranking split"),
        "n_selection": (len(records["selection"]), "prompts of the selection split"),
        "n_evaluation": (len(records["evaluation"]), "prompts of the evaluation split"),
        "n_steering": (len(calls["evaluation"]), "evaluation prompts whose gold is a call"),
        "n_neutral_texts": (len(neutral["ranking"]), "neutral texts of the ranking split"),
    }
    # Rows that cannot be used are told of when they are first read; fewer texts are counted below.
    problems = [str(w.message) for w in warned if "left out" in str(w.message)]
    problems += [
        f'{name} asks for {getattr(profile, name)}, but there are {n} {what}: add more, or set "'
        f'{name}": {n}'
        for name, (n, what) in have.items()
        if n < getattr(profile, name)
    ]
    wanted = min(profile.n_crosscoder_texts, len(records["crosscoder"]))
    if (n := len(neutral["crosscoder"])) < wanted:
        problems.append(f"there are {n} neutral texts of the crosscoder split, fewer than prompts")
    for split in ("ranking", "evaluation"):
        if not calls[split] or len(calls[split]) == len(records[split]):
            lacking = "a call" if not calls[split] else "no call"
            problems.append(
                f"no prompt of the {split} split has a gold with {lacking}: notebook 03 compares "
                "the two kinds; add some (a gold with a <response> alone is no call)"
            )
    return problems


# --------------------------------------------------------------------------------------------------
# The run and the report


def run(
    project: Project, jobs: int, after_each: Callable[[dict[str, str]], None]
) -> dict[str, str]:
    """Run the notebooks one by one; gives each one's outcome: empty if it ran, else why not."""
    outcomes = {EMBEDDED: "left out: it shows the embedded pair"}
    if len(project.profile.checkpoints("rl")) < 2:
        outcomes[NEEDS_CHECKPOINTS] = "left out: the pair comes without checkpoints of its training"
    for name, notebook in project.notebooks.items():
        lacking = [need for need in notebook.declared("needs") if outcomes.get(need)]
        if lacking:
            outcomes[name] = f"left out: needs {', '.join(lacking)}"
        if name in outcomes:
            continue
        try:
            runner.run(project, [name], jobs=jobs)
            outcomes[name] = ""
        except CompendiumError as error:
            print(error, file=sys.stderr)
            outcomes[name] = f"FAILED: {_reason(str(error))}"
        after_each(outcomes)
    return outcomes


def _reason(message: str) -> str:
    """The line of a notebook's traceback that says what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("All until there is in")]
    return told[-1] if told else "no message"


def report(
    profile: Profile, rehearsed: Profile, problems: list[str], outcomes: dict[str, str]
) -> str:
    """The page: what ran, what to change, what the full run needs."""
    if rehearsed.device != profile.device:
        missing = (
            f"device {profile.device!r} is not here, so the CPU was used: the full run needs it"
        )
        problems = [*problems, missing]
    try:
        needed = f"{budget.page(profile)}\n\n{budget.gpu_page(profile)}"
    except ValueError as error:
        needed = f"cannot be said: {error}"
    return fill(
        Path(__file__).with_suffix(".md.j2"),
        profile=profile,
        file=Path(profile.handle).name,
        problems=problems,
        outcomes=outcomes,
        failed=[name for name, outcome in outcomes.items() if outcome.startswith("FAILED")],
        needed=needed,
    )


def rehearse(name: str, jobs: int) -> tuple[Path, bool]:
    """Rehearse a profile; gives the report's path and whether nothing failed.

    Raises:
        ValueError: there is no such profile, or it is the embedded pair's.
    """
    profile = profiles.get(name)
    rehearsed = write_profile(profile)
    path = paths.build(rehearsed.name, "rehearsal.md")

    def write(outcomes: dict[str, str]) -> None:
        store.write_atomically(path, report(profile, rehearsed, problems, outcomes))

    problems, outcomes = check_models(profile), {}
    if not problems:
        problems = check_texts(profile)
        for problem in problems:
            print(f"before the full run: {problem}")
        outcomes = run(Project(paths.ROOT, rehearsed), jobs, write)
    write(outcomes)
    failed = not outcomes or any(outcome.startswith("FAILED") for outcome in outcomes.values())
    return path, not failed


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description=__doc__)
    parser.add_argument("profile", help="a profile file (mine.json) or a profile's name")
    parser.add_argument("--jobs", type=int, default=0, help="notebooks at a time")
    options = parser.parse_args(arguments)
    try:
        path, fine = rehearse(options.profile, options.jobs)
    except (CompendiumError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path.read_text(encoding="utf-8"))
    print(f"report: {path}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
