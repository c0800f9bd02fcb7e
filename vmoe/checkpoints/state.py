"""The parts that training adds to a checkpoint besides the weights, so that a resumed run equals an unbroken one.

The Classifier writes the model's facts and average, ExactResume writes `ResumeState`, and the run writes `RunProgress`.
All parts are plain types and tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe.checkpoints.entry import ENTRY, PLAIN_VERSION, ModelFacts, check_entry, entry_for, facts_of
from vmoe.checkpoints.loading import read_without_tensors
from vmoe.errors import UserError


@dataclass(frozen=True)
class ResumeState:
    """The state for an exact resumption."""

    draws: int  # version of the random draws per image
    epochs_done: int
    batches_done: int  # of the current epoch
    random_states: list[dict[str, Any]]  # of each rank's random generators, by rank
    running: dict[str, Any]  # the sums of the current epoch


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run."""

    epochs_done: int
    finished: bool
    best: dict[str, float]  # "epoch", and the metrics of validation, of the best checkpoint
    clock: dict[str, float]  # seconds
    images: str | None = None  # fingerprint of the training images; None in files of older versions


@dataclass(frozen=True)
class SavedRun:
    """A run's state in its checkpoint, without the weights."""

    facts: ModelFacts
    progress: RunProgress
    step: int  # updates done
    draws: int
    batches_done: int


def put_model(content: dict[str, Any], facts: ModelFacts | None, epochs_done: int) -> None:
    """Adds the facts that rebuild the model to a new checkpoint. Other parts of it stay.

    Args:
        content: The checkpoint.
        facts: The model's facts; None if they are unknown. Then the file can only resume training.
        epochs_done: Number of trained epochs, if the checkpoint has no run progress.
    """
    entry = {"version": PLAIN_VERSION} if facts is None else entry_for(facts, epochs_done)
    content[ENTRY] = entry | content.get(ENTRY, {})


def put_average(content: dict[str, Any], average: dict[str, Any] | None) -> None:
    """Adds the average of the weights (EMA), its "weights" and "updates", or None."""
    content.setdefault(ENTRY, {})["ema"] = average


def average_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """The average of the weights (EMA) that `put_average` added, or None."""
    return content.get(ENTRY, {}).get("ema")


def put_resume_state(content: dict[str, Any], state: ResumeState) -> None:
    """Adds the state for an exact resumption."""
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
    """The state for an exact resumption, or None if the checkpoint has none."""
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
    """Adds the progress of the run."""
    content.setdefault(ENTRY, {}).update(vars(progress))


def progress_of(content: dict[str, Any]) -> RunProgress:
    """The progress of the run in a checkpoint.

    Raises:
        KeyError: The checkpoint is not a run's.
    """
    ours = content[ENTRY]
    return RunProgress(ours["epochs_done"], ours["finished"], ours["best"], ours["clock"], ours.get("images"))


def read_saved_run(path: Path) -> SavedRun:
    """Reads a run's state from its checkpoint, a file or a folder.

    Raises:
        UserError: It is missing, damaged or foreign, or no run wrote it.
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
