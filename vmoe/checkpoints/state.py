"""What training adds to a checkpoint besides the weights, so that a resumed run is the run that never stopped.

Each part is written by what needs it: the model's facts and average by the Classifier, `ResumeState` by ExactResume,
and `RunProgress` by the run. All parts are plain types and tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe.checkpoints.entry import ENTRY, PLAIN_VERSION, ModelFacts, check_entry, entry_for, facts_of
from vmoe.checkpoints.loading import read_without_tensors
from vmoe.errors import UserError


@dataclass(frozen=True)
class ResumeState:
    """What an exact resumption needs."""

    draws: int  # version of the random draws per image
    epochs_done: int
    batches_done: int  # of the epoch under way
    random_states: list[dict[str, Any]]  # of each rank's random generators, by rank
    running: dict[str, Any]  # the sums of the epoch under way


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come."""

    epochs_done: int
    finished: bool
    best: dict[str, float]  # "epoch", and the metrics of validation, of the best checkpoint
    clock: dict[str, float]  # seconds
    images: str | None = None  # fingerprint of the training images; None where an older version wrote the file


@dataclass(frozen=True)
class SavedRun:
    """What a run's checkpoint tells of the run, without its weights."""

    facts: ModelFacts
    progress: RunProgress
    step: int  # updates done
    draws: int
    batches_done: int


def put_model(content: dict[str, Any], facts: ModelFacts | None, epochs_done: int) -> None:
    """Puts what rebuilds the model into a checkpoint that is about to be written; other parts that are there stay.

    Args:
        content: The checkpoint.
        facts: Of the model; None where they are not known. Then only training goes on from the file.
        epochs_done: Epochs that the model was trained for, unless the run's progress says so.
    """
    entry = {"version": PLAIN_VERSION} if facts is None else entry_for(facts, epochs_done)
    content[ENTRY] = entry | content.get(ENTRY, {})


def put_average(content: dict[str, Any], average: dict[str, Any] | None) -> None:
    """Puts in the average of the weights (EMA): its "weights" and "updates"; None where the run keeps none."""
    content.setdefault(ENTRY, {})["ema"] = average


def average_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """The average of the weights (EMA), as `put_average` took it; None without one."""
    return content.get(ENTRY, {}).get("ema")


def put_resume_state(content: dict[str, Any], state: ResumeState) -> None:
    """Puts in what an exact resumption needs."""
    first, *others = state.random_states
    content.setdefault(ENTRY, {}).update(
        draws=state.draws,
        epochs_done=state.epochs_done,
        batches_done=state.batches_done,
        random=first,
        random_of_others=others,
        running=state.running,
    )


def resume_state_of(content: dict[str, Any]) -> ResumeState | None:
    """What an exact resumption needs; None where the checkpoint was written without it."""
    ours = content.get(ENTRY, {})
    if "random" not in ours:
        return None
    return ResumeState(
        draws=ours.get("draws", 1),
        epochs_done=ours["epochs_done"],
        batches_done=ours["batches_done"],
        random_states=[ours["random"], *ours.get("random_of_others", [])],
        running=ours["running"],
    )


def put_progress(content: dict[str, Any], progress: RunProgress) -> None:
    """Puts in how far the run has come."""
    content.setdefault(ENTRY, {}).update(vars(progress))


def progress_of(content: dict[str, Any]) -> RunProgress:
    """How far the run of a checkpoint has come.

    Raises:
        KeyError: The checkpoint is not a run's.
    """
    ours = content[ENTRY]
    return RunProgress(ours["epochs_done"], ours["finished"], ours["best"], ours["clock"], ours.get("images"))


def read_saved_run(path: Path) -> SavedRun:
    """What the checkpoint of a run, a file or a folder, tells of the run.

    Raises:
        UserError: It is missing, damaged or foreign, or was not written by a run.
    """
    content = read_without_tensors(path)
    check_entry(content, path)
    resume = resume_state_of(content)
    try:
        progress = progress_of(content)
    except KeyError:
        resume = None
    if resume is None:
        raise UserError(f"{path}: holds a model alone, no run to go on with; begin a run by --init_from {path}")
    return SavedRun(facts_of(content), progress, content["global_step"], resume.draws, resume.batches_done)
