"""The images of a run. Each rank loads its part of them. All files are checked first if that is little work."""

from collections.abc import Callable

import torch

from vmoe.data import ImageDataModule
from vmoe.data.addresses import is_address
from vmoe.data.checking import is_worth_checking, refusal
from vmoe.data.datamodule import EvalLoader
from vmoe.data.super_classes import match_super_classes
from vmoe.errors import UserError
from vmoe.evaluation.curves import MOST_SCORES
from vmoe.evaluation.guidance import check_guided
from vmoe.training.config import TrainConfig
from vmoe.training.label_loss import check_loss, class_weights
from vmoe.training.parallel.collectives import gather, together
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.strategies import check_parts


def images_of_run(config: TrainConfig, device: torch.device) -> ImageDataModule:
    """The datamodule of a run, with this rank's part of the images.

    Raises:
        UserError: The images are missing or malformed, the ranks cannot share batches, early stopping has no
            validation images, or the numbers of weights and classes differ.
    """
    process = Process.this()
    data = _TrainingData(config.data, config.seed, device, process.rank, process.world_size, config.trainer.cuda_graph)
    together(lambda: data.prepare_data() if process.local_rank == 0 else None)  # one rank per machine downloads

    def setup() -> None:
        data.setup("fit")
        check_parts(config, data.train_sampler.batch_size, process.world_size)
        waiting = {"optim.schedule=plateau: waits for a lower val/loss": config.optim.schedule == "plateau"}
        better = "val/mAP" if data.multi_label else "val/top1"
        patience = config.trainer.early_stopping
        waiting[f"trainer.early_stopping={patience}: waits for a better {better}"] = patience is not None
        for what, is_on in waiting.items():
            if is_on and not data.has_validation:
                raise UserError(f"{what}, and data.val_fraction=0 leaves no images for validation; change one of them")
        check_loss(config.loss, data.multi_label)
        for split in ("val", "test") if data.multi_label else ():
            scores = data.num_classes * (data.number_of_images(split) if split == "test" or data.has_validation else 0)
            if scores > MOST_SCORES:
                raise UserError(
                    f"data: {split} has {scores:,} pairs of an image and a class, and mAP is measured of "
                    f"{MOST_SCORES:,} at most; leave images out"
                )
        if config.loss.super_classes is not None and config.moe is not None:
            check_guided(config.moe)
            match_super_classes(config.loss.super_classes, data.class_names, config.moe.num_experts)
        if config.loss.class_weights is not None:
            class_weights(config.loss, data.images_of_classes("train"))

    together(setup)
    return data


def check_files(config: TrainConfig, data: ImageDataModule, log: Callable[[str], object]) -> None:
    """Opens all images if that is little work beside the run, and prints a line if it is not done.

    Raises:
        UserError: An image of validation or test cannot be read. A training image is replaced by the next one.
    """
    passes = config.trainer.epochs * config.data.repeat
    is_wanted = config.data.check
    if is_wanted is None:
        is_wanted = not is_address(config.data.root) and is_worth_checking(data.files, passes)
    if not data.files:
        return
    if not is_wanted:
        advice = "" if config.data.check is False else "; --data.check true opens them"
        log(f"data.check: the {data.files:,} image files are not opened before the run{advice}")
        return
    threads = config.data.workers or torch.get_num_threads()
    by_process = gather(data.damaged_files(threads))
    damaged = {split: [line for each in by_process for line in each[split]] for split in by_process[0]}
    if refused := [line for split in ("val", "test") for line in damaged.get(split, [])]:
        raise UserError(refusal(refused), everywhere=True)
    count = len(damaged["train"])
    beside = f", of which {count} of training cannot be read and are replaced: {damaged['train'][0]}" if count else ""
    log(f"data.check: all {data.files:,} image files were opened{beside}")


class _TrainingData(ImageDataModule):
    """Validates on a batch of training images if there are no others, to find out whether the weights overflowed."""

    def val_dataloader(self) -> EvalLoader:
        size = self.config.eval_batch_size or self.config.batch_size
        return super().val_dataloader() if self.has_validation else self.train_eval_dataloader(most=size)
