"""A search for good options: Optuna proposes them, `vmoe train` trains with them, validation decides."""

import csv
import json
import math
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from vmoe.checkpoints.run_folder import RunFolder
from vmoe.config_values import choices, to_plain
from vmoe.data.config import DataConfig
from vmoe.data.datasets import load_splits
from vmoe.errors import UserError
from vmoe.files import atomic_write
from vmoe.training.classifier import RAW_TOP1
from vmoe.training.config import TrainConfig
from vmoe.training.fit import config_with
from vmoe.training.label_metrics import GuidedMetrics, MultiLabelMetrics, SingleLabelMetrics
from vmoe.training.options import nearest_option, option_types
from vmoe.training.recipes import find_recipe
from vmoe.training.run.lock import locked
from vmoe.training.sweep import Sweep, Training, last_line

JOURNAL = "study.journal"
_SEARCH = "search"  # the key of the search in a study's attributes


@dataclass(frozen=True)
class SearchPlan:
    """The settings of a search.

    Attributes:
        trials: Number of runs in all, those of earlier calls included.
        jobs: Number of runs at once.
        metric: The goal: val/top1 or another validation metric of a run's best checkpoint.
        seed: Seed of the proposals.
        devices: Values of CUDA_VISIBLE_DEVICES (see `vmoe.training.sweep.Sweep`).
    """

    trials: int = 20
    jobs: int = 1
    metric: str = "val/top1"
    seed: int = 0
    devices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.trials < 1 or self.jobs < 1:
            raise UserError(f"trials={self.trials}, jobs={self.jobs}: must be whole numbers >= 1")
        if not self.metric.startswith("val/"):
            raise UserError(f"metric={self.metric}: must be of validation, such as val/top1 or val/loss")

    @property
    def direction(self) -> str:
        return "minimize" if self.metric.endswith("loss") else "maximize"


@dataclass(frozen=True)
class TunedRun:
    """The result of `vmoe.tune`.

    Attributes:
        options: The best run's values of the options in the search.
        value: The best run's metric in validation.
        path: The best run's folder.
        study: Optuna's study, with all trials.
    """

    options: dict[str, Any]
    value: float
    path: Path
    study: optuna.Study = field(repr=False)


def tune(
    config: str | Path,
    search: Mapping[str, Any],
    output_dir: str | Path,
    *,
    trials: int = 20,
    options: Mapping[str, Any] | None = None,
    metric: str = "val/top1",
    jobs: int = 1,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> TunedRun:
    """Searches for the options of a recipe that are best in validation. Each trial is a run in its own process.

        found = vmoe.tune("digits", {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "runs/tune", trials=10)
        found.options, found.value

    The same call resumes a stopped search, also in the middle of a run. With a larger `trials` it adds trials.
    `vmoe compare output_dir/trial_*` compares the runs.

    Args:
        config: A recipe's name, or the path of a config file.
        search: For each option, by its dotted name, {"low": ..., "high": ...}, both included, with "log": True for
            an even search over magnitudes, or "step"; or a list to choose from. Whole ends mean whole numbers, except
            for an option that takes fractions, such as optim.weight_decay.
        output_dir: The folder of the runs, the study and its pictures.
        trials: Number of runs in all.
        options: Other options, the same in all runs, by their dotted names.
        metric: The validation metric to maximise; a loss is minimised.
        jobs: Number of runs at once.
        seed: Seed of the proposals. With one job the same seed gives the same search.
        log: Called with a line for each run that ends.

    Raises:
        UserError: An option or its range is not allowed, `output_dir` holds another search, or no run succeeded.
    """
    path = find_recipe(str(config))
    space, fixed = read_space(search), dict(options or {})
    configs = [config_with(path, fixed | values) for values in samples_of(space)]
    plan = SearchPlan(trials, jobs, metric, seed)
    require_metric(metric, configs)
    words = ["--config", path, *words_of(fixed)]
    study = run_search(space, words, Path(output_dir), plan, log)
    return TunedRun(
        options=dict(study.best_trial.params),
        value=study.best_value,
        path=folder_of(Path(output_dir), study.best_trial),
        study=study,
    )


def read_space(search: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of the options to search over; see `tune`.

    Raises:
        UserError: An option is unknown, or its range is not allowed.
    """
    if not isinstance(search, Mapping) or not search:
        raise UserError("search: must hold options by dotted name, each with a range or a list of values")
    types = option_types(TrainConfig)
    for name in search:
        if name not in types and not str(name).startswith(("model.kwargs.", "optim.kwargs.")):
            raise UserError(f"search: {name} is no option; {nearest_option(str(name), list(types))}")
    return {
        str(name): _distribution(str(name), values, takes_fractions=float in choices(types.get(name)))
        for name, values in search.items()
    }


def _distribution(name: str, values: Any, takes_fractions: bool) -> BaseDistribution:
    if isinstance(values, list | tuple):
        if len(values) < 2:
            raise UserError(f"search: {name}={list(values)}: must be two values or more to choose from, or a range")
        plain = [value if isinstance(value, str | int | float | None) else _text(value) for value in values]
        return CategoricalDistribution(plain)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}:
        raise UserError(f"search: {name}={values}: must be low and high, perhaps log or step, or a list of values")
    given = {key: _number(name, key, value) for key, value in values.items() if key != "log"}
    is_whole = not takes_fractions and all(isinstance(value, int) for value in given.values())
    try:
        kind = IntDistribution if is_whole else FloatDistribution
        if given["low"] >= given["high"]:
            raise ValueError("low must be below high")
        return kind(log=bool(values.get("log", False)), **given)
    except ValueError as error:
        raise UserError(f"search: {name}={dict(values)}: {' '.join(str(error).split())}") from error


def _number(name: str, key: str, value: Any) -> int | float:
    try:
        number = value if type(value) is int else float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError) as error:
        raise UserError(f"search: {name}: {key}={value!r}: must be a number") from error
    if not math.isfinite(number):
        raise UserError(f"search: {name}: {key}={value!r}: must be finite")
    return number


def require_metric(metric: str, configs: Sequence[TrainConfig]) -> None:
    """Refuses a metric that a run by one of these configs cannot have, before any of them trains.

    Raises:
        UserError: There is no such metric for images of one class or of several, there are no validation images, or the
            data cannot be read.
    """
    read: list[DataConfig] = []
    for config in configs:
        if config.data not in read:
            _require_metric(metric, config.data)
            read.append(config.data)


def _require_metric(metric: str, data: DataConfig) -> None:
    splits = load_splits(data)
    if splits.val is None:
        raise UserError(f"metric={metric}: the runs have no validation images; raise data.val_fraction")
    several = splits.train.is_multi_label
    names = MultiLabelMetrics.names if several else (*GuidedMetrics.names, RAW_TOP1.removeprefix("val/"))
    if metric.removeprefix("val/") not in names:
        kind = "several classes" if several else "one class"
        known = ", ".join(f"val/{name}" for name in (MultiLabelMetrics if several else SingleLabelMetrics).names)
        raise UserError(f"metric={metric}: runs on images of {kind} each have none; give one of {known}")


def samples_of(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """A short list of options that contains each end of a range, and each choice, at least once."""
    values = {name: _to_check(distribution) for name, distribution in space.items()}
    most = max(len(each) for each in values.values())
    return [{name: each[min(number, len(each) - 1)] for name, each in values.items()} for number in range(most)]


def _to_check(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as arguments of `vmoe train`."""
    return [word for name, value in options.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(to_plain(value), default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def folder_of(out: Path, trial: FrozenTrial | optuna.Trial) -> Path:
    """The folder of a trial's run."""
    return out / f"trial_{trial.number:03d}"


def run_search(
    space: dict[str, BaseDistribution],
    words: Sequence[str],
    out: Path,
    plan: SearchPlan,
    log: Callable[[str], object] = print,
) -> optuna.Study:
    """Runs or resumes a search, and writes trials.csv and pictures into its folder.

    Ctrl-C or SIGTERM stops the runs as it stops `vmoe train`. Then this raises KeyboardInterrupt.

    Args:
        space: The options to search over.
        words: Further arguments of `vmoe train`, for all runs.
        out: The folder.
        plan: The settings of the search.
        log: Called with a line for each run that ends.

    Raises:
        UserError: The folder cannot be written or holds another search, or no run succeeded.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with locked(out, log, "vmoe tune"):
        (out / "logs").mkdir(exist_ok=True)
        study = _open_study(out, space, words, plan)
        trials = _Trials(study, space, words, out, plan, log)
        sweep = Sweep(trials.todo(), plan.jobs, plan.devices, lambda line: None, ended=trials.note)
        try:
            sweep.run()
        except BaseException:
            with suppress(UserError):  # the first error is the one to report
                write_trials(study, out, plan.metric)
            raise
        write_trials(study, out, plan.metric)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not done:
            failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            line = last_line(out / "logs" / f"{folder_of(out, failed[0]).name}.log")
            raise UserError(f"{out}: no run reached {plan.metric}; the first one said: {line}")
        draw_search(study, out, plan.metric)
    return study


def _open_study(out: Path, space: dict[str, BaseDistribution], words: Sequence[str], plan: SearchPlan) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    ours = json.dumps(
        {
            "space": {name: repr(distribution) for name, distribution in space.items()},
            "options": list(words),
            "metric": plan.metric,
            "seed": plan.seed,
        },
        sort_keys=True,
    )
    study = optuna.create_study(storage=storage, study_name="vmoe", direction=plan.direction, load_if_exists=True)
    known = study.user_attrs.get(_SEARCH)
    if known is None:
        study.set_user_attr(_SEARCH, ours)
    elif known != ours:
        raise UserError(
            f"output_dir={out}: holds a search over other ranges, options, metric or seed; give another folder, or go "
            "on with it by the same ones"
        )
    return study


class _Trials:
    """The trials of a search, as runs."""

    def __init__(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        words: Sequence[str],
        out: Path,
        plan: SearchPlan,
        log: Callable[[str], object],
    ) -> None:
        self._study, self._space, self._words, self._out, self._plan = study, space, words, out, plan
        self._log = log
        self._numbers: dict[Path, int] = {}  # trial numbers by the run's folder

    def todo(self) -> Iterator[Training]:
        """The stopped runs, then new ones. Each is proposed only when a job is free."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if (run := self._training(trial)).is_done:  # only its result is not recorded yet
                self.note(run, 0)
            else:
                yield run
        while len(self._study.get_trials(deepcopy=False)) < self._plan.trials:
            yield self._training(self._propose())

    def _propose(self) -> optuna.Trial:
        # each trial has its own seed, so that a resumed search proposes the same as one that never stopped
        number = len(self._study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=(self._plan.seed * 100_003 + number) % 2**32, constant_liar=self._plan.jobs > 1
            )
        return self._study.ask(self._space)

    def _training(self, trial: FrozenTrial | optuna.Trial) -> Training:
        folder = folder_of(self._out, trial)
        self._numbers[folder] = trial.number
        return Training("trial", trial.number, folder, (*self._words, *words_of(trial.params)))

    def note(self, run: Training, code: int) -> None:
        """Reports a run's metric to Optuna, and prints it.

        Raises:
            UserError: The run has no such metric.
        """
        number, metric = self._numbers[run.folder], self._plan.metric
        metrics = (RunFolder(run.folder).read_summary() or {}).get("metrics", {})
        value = metrics.get(metric)
        if code or value is None or not math.isfinite(value):
            self._study.tell(number, state=TrialState.FAIL)
            if not code and value is None:  # no other run will have it either
                known = ", ".join(name for name in metrics if name.startswith("val/")) or "none of validation"
                raise UserError(
                    f"metric={metric}: {run.name} has none; it has {known}; give one of them and another folder"
                )
            self._log(f"{run.name}: FAILED: {last_line(run.log_file) if code else f'its {metric} is {value}'}")
            return
        self._study.tell(number, value)
        options = shlex.join(words_of(self._study.get_trials(deepcopy=False)[number].params))
        self._log(f"{run.name}: {metric} {value:.4f}  {options}  (best {self._study.best_value:.4f})")


def write_trials(study: optuna.Study, out: Path, metric: str) -> None:
    """Writes trials.csv: a row per trial, with its state, its value, its options and its run's folder."""
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for trial in trials for name in trial.params})
    with atomic_write(out / "trials.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", metric, *names, "folder"])
        for trial in trials:
            values = [_text(trial.params[name]) if name in trial.params else "" for name in names]
            value = "" if trial.value is None else repr(trial.value)
            writer.writerow([trial.number, trial.state.name.lower(), value, *values, folder_of(out, trial).name])


def draw_search(study: optuna.Study, out: Path, metric: str) -> list[Path]:
    """Draws Optuna's pictures of a search: history.png, options.png and, with several options, importances.png."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pictures: dict[str, Callable[[], Any]] = {
        "history.png": lambda: draw.plot_optimization_history(study, target_name=metric),
        "options.png": lambda: draw.plot_slice(study, target_name=metric),
    }
    if len(done) > 3 and len(done[0].params) > 1 and len({trial.value for trial in done}) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()  # it needs no further package
        pictures["importances.png"] = lambda: draw.plot_param_importances(study, evaluator=evaluator)
    written = []
    for name, make in pictures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = make()
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        for each in figure.axes:
            if each.get_xscale() == "log":  # within a magnitude long labels, such as 7 x 10^-4, would overlap
                each.tick_params(axis="x", which="both", labelrotation=90)
        with atomic_write(out / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        written.append(out / name)
    return written
