"""Exact resumption: a resumed training equals one that never stopped."""

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
    """Resumes a training from a checkpoint bit for bit, as if it had not stopped; for any Trainer.

    It adds to checkpoints what Lightning leaves out: the state of every random generator of every rank, the number of
    finished batches of the epoch, and a Classifier's sums of the epoch. Lightning alone repeats random numbers, and it
    restarts an unfinished epoch from its first batch.

    The position in the data is restored for `vmoe.ImageDataModule`. With other data only a checkpoint at the end of an
    epoch resumes exactly; else a warning reports that the epoch starts again. Gradients are not saved, so a
    checkpoint between two batches of one update does not resume exactly.

    Args:
        seed: The run's seed, from which each of several ranks gets random numbers of its own. None leaves the
            generators alone.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = [] if seed is None else [seed]
        self._batches_done = 0
        self._states_to_restore: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a single process that resumes a run of several needs it too: else it would repeat that run's first numbers
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
            else:  # at once: a shuffled loader draws its order before the first batch
                restore_random_states(state.random_states[rank])
        else:  # with another number of ranks each rank continues with new random numbers
            self._seed = [*self._seed, checkpoint["global_step"]]
