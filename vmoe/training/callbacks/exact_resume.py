"""What makes a resumed training the training that never stopped."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from vmoe.checkpoints.state import ResumeState, put_resume_state, resume_state_of
from vmoe.data import ImageDataModule
from vmoe.data.draws import DRAWS_VERSION
from vmoe.training.classifier import Classifier, epochs_done
from vmoe.training.parallel.collectives import gather, rank_of_all
from vmoe.training.randomness import random_states, restore_random_states, seed_process


class ExactResume(Callback):
    """A training resumed from a checkpoint goes on bit for bit as if it had not stopped; for any Trainer.

    Checkpoints get what Lightning leaves out: the state of every random generator of every rank, the number of batches
    of the epoch that are done, and a Classifier's sums of the epoch. Lightning alone repeats random numbers, and in the
    middle of an epoch it begins again with the first batch.

    The place in the data is restored for `vmoe.ImageDataModule`. Of other data only a checkpoint at the end of an epoch
    resumes exactly; in the middle of one a warning says that the epoch begins again. A checkpoint between two batches
    of one update does not resume exactly, since gradients are not saved.

    Args:
        seed: Of the run; with it each of several ranks begins with random numbers of its own. None leaves them as
            they are.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = [] if seed is None else [seed]
        self._batches_done = 0
        self._states_to_restore: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Also one process that goes on with a run of several, whose first numbers it would repeat.
        rank, ranks = rank_of_all()
        if self._states_to_restore is None and self._seed and (ranks > 1 or len(self._seed) > 1):
            seed_process([*self._seed, rank])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._states_to_restore is not None:
            restore_random_states(self._states_to_restore)
            self._states_to_restore = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches
        self._batches_done = 0 if is_last else batch_idx + 1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = ResumeState(
            draws=DRAWS_VERSION,
            epochs_done=epochs_done(trainer),
            batches_done=self._batches_done,
            random_states=gather(random_states()),
            running=pl_module.running_state() if isinstance(pl_module, Classifier) else {},
        )
        put_resume_state(checkpoint, state)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = resume_state_of(checkpoint)
        if state is None:
            rank_zero_warn("ExactResume: the checkpoint was written without it, so random numbers do not go on")
            return
        if isinstance(pl_module, Classifier):
            pl_module.load_running_state(state.running)
        is_ours, (rank, ranks) = isinstance(trainer.datamodule, ImageDataModule), rank_of_all()
        if is_ours:
            sampler = trainer.datamodule.train_sampler
            sampler.set_epoch(state.epochs_done)
            sampler.start_batch = state.batches_done
        elif state.batches_done:
            rank_zero_warn(
                "ExactResume: the data are not vmoe.ImageDataModule's: the epoch begins again with its first batches"
            )
        if len(state.random_states) == ranks:
            if is_ours or state.batches_done:
                self._states_to_restore = state.random_states[rank]
            else:  # now, since a shuffled loader draws its order before training begins
                restore_random_states(state.random_states[rank])
        else:  # on another number of ranks each goes on by random numbers of its own
            self._seed = [*self._seed, checkpoint["global_step"]]
