"""The tables that `vmoe evaluate` prints."""

from typing import TYPE_CHECKING

from rich import markup
from rich.table import Table

from vmoe.text import printable

if TYPE_CHECKING:
    from vmoe.evaluation.metrics import Evaluation, MultiLabelEvaluation


def escape(text: str) -> str:
    """Escapes a text, so that it is printed without markup and control characters."""
    return markup.escape(printable(text))


def factor_text(value: float | None) -> str:
    """A capacity factor in the form of the option."""
    return "inf" if value is None else f"{value:g}"


def setting(result: "Evaluation", results: "list[Evaluation]") -> str:
    """The title of an evaluation: its capacity factor, and its K if that varies."""
    factor = factor_text(result.capacity_factor)
    return f"K{result.top_k}-{factor}" if len({other.top_k for other in results}) > 1 else factor


def result_tables(results: "list[Evaluation]", title: str, class_names: list[str]) -> list[Table]:
    """Tables of figures, experts and classes for evaluations on a set; none without evaluations."""
    if not results:
        return []
    experts = [layer_table(results)] if results[0].layers else []
    if not hasattr(results[0], "top1"):
        return [multi_label_table(results, title), *experts, multi_label_class_table(results[0], class_names)]
    members = [member_table(results)] if results[0].members else []
    routers = [router_table(results)] if results[0].router else []
    return [summary_table(results, title), *members, *experts, *routers, class_table(results[0], class_names)]


def summary_table(results: "list[Evaluation]", title: str) -> Table:
    """The figures of each evaluation, a row each."""
    key = "K: experts per token, C: capacity factor\n" if results[0].layers else ""
    key += f"Brier score: {', '.join(f'{result.brier:.4f}' for result in results)}"  # the table has no room for it
    table = Table(title=escape(title), title_justify="left", caption=key, caption_justify="left")
    five = ["top-5"] if len(results[0].class_accuracy) > 5 else []  # with five classes it is always 100 %
    for column in ("K", "C", "images", "top-1", *five, "NLL", "ECE", "dropped", "images/s"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            *_pass_cells(result),
            f"{result.top1:.2%}",
            *(f"{result.top5:.2%}" for _ in five),
            f"{result.nll:.4f}",
            f"{result.ece:.4f}",
            "-" if result.dropped is None else f"{result.dropped:.2%}",
            "-" if result.images_per_second is None else f"{result.images_per_second:,.0f}",
        )
    return table


def _pass_cells(result: "Evaluation | MultiLabelEvaluation") -> tuple[str, str, str]:
    """K, C and the number of images of an evaluation."""
    top_k = "-" if result.top_k is None else str(result.top_k)
    return top_k, factor_text(result.capacity_factor) if result.layers else "dense", f"{result.images:,}"


def member_table(results: "list[Evaluation]") -> Table:
    """The members' own accuracy in each evaluation of an ensemble, and their disagreement."""
    title, key = "members of the ensemble, by themselves", "differ: how often two name different classes; KL in nats"
    table = Table(title=title, title_justify="left", caption=key, caption_justify="left")
    for column in ("C", "members", "mean top-1", "mean NLL", "differ", "KL"):
        table.add_column(column, justify="right")
    for result in results:
        of = result.members
        figures = f"{of.top1:.2%}", f"{of.nll:.4f}", f"{of.disagreement:.2%}", f"{of.kl:.4f}"
        table.add_row(setting(result, results), str(of.members), *figures)
    return table


def router_table(results: "list[Evaluation]") -> Table:
    """How often the router of images finds an image's super-class, in each pass."""
    title = f"router, guided towards {len(results[0].router.super_classes)} super-classes"
    is_oracle = results[0].router.oracle_top1 is not None
    key = "if right: of the model, if the router always found the super-class" if is_oracle else None
    table = Table(title=title, title_justify="left", caption=key, caption_justify="left")
    for column in ("K", "super-class right", "loss", *(["top-1", "top-1 if right"] if is_oracle else [])):
        table.add_column(column, justify="right")
    for result in results:
        of = result.router
        oracle = [f"{result.top1:.2%}", f"{of.oracle_top1:.2%}"] if is_oracle else []
        table.add_row(str(result.top_k), f"{of.top1:.2%}", f"{of.loss:.4f}", *oracle)
    return table


def multi_label_table(results: "list[MultiLabelEvaluation]", title: str) -> Table:
    """The figures of each evaluation with several classes per image, a row each."""
    key = "K: experts per token, C: capacity factor" if results[0].layers else None
    table = Table(title=escape(title), title_justify="left", caption=key, caption_justify="left")
    for column in ("K", "C", "images", "mAP", "F1", "macro F1", "dropped", "images/s"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            *_pass_cells(result),
            *map(_percent, (result.average_precision, result.f1_micro, result.f1_macro, result.dropped)),
            "-" if result.images_per_second is None else f"{result.images_per_second:,.0f}",
        )
    return table


def multi_label_class_table(result: "MultiLabelEvaluation", names: list[str], shown: int = 10) -> Table:
    """The figures per class with several classes per image, the lowest F1 first."""
    order = sorted((f1, index) for index, f1 in enumerate(result.class_f1) if f1 is not None)
    title = "by class" if len(order) <= shown else f"by class: the {shown} worst of {len(order)}"
    caption = (
        f"AUROC {_percent(result.auroc)} (mean of the classes); every class right: {_percent(result.exact_match)} of "
        "the images;\nthreshold: the probability from which an image has the class"
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("class", "F1", "precision", "recall", "AP", "threshold", "images"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for f1, index in order[:shown]:
        averages = result.class_average_precision
        figures = (f1, result.class_precision[index], result.class_recall[index], averages and averages[index])
        images = f"{result.class_images[index]:,}"
        table.add_row(escape(names[index]), *map(_percent, figures), f"{result.thresholds[index]:.3f}", images)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def layer_table(results: "list[Evaluation]") -> Table:
    """The load of each MoE layer in the first evaluation, and its dropped share in each."""
    table = Table(title="experts (load: 1 = the fair share, 0 = dead)", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("least load", justify="right")
    table.add_column("most load", justify="right")
    for result in results:
        table.add_column(f"dropped at {setting(result, results)}", justify="right")
    for name, use in results[0].layers.items():
        dropped = [f"{result.layers[name].dropped:.2%}" for result in results]
        table.add_row(name, f"{min(use.load):.2f}", f"{max(use.load):.2f}", *dropped)
    return table


def class_table(result: "Evaluation", names: list[str], shown: int = 10) -> Table:
    """The accuracy of each class, worst first, with its most frequent wrong prediction."""
    order = sorted((accuracy, index) for index, accuracy in enumerate(result.class_accuracy) if accuracy is not None)
    title = "by class" if len(order) <= shown else f"by class: the {shown} worst of {len(order)}"
    means = f"mean of the classes: {result.balanced_accuracy:.2%} (balanced accuracy), F1 {result.f1:.2%} (macro)"
    if result.auroc is not None:
        means += f",\nAUROC {result.auroc:.2%}, average precision {result.average_precision:.2%} (mAP)"
    table = Table(title=title, title_justify="left", caption=means, caption_justify="left")
    for column in ("class", "top-1", "precision", "F1", "images", "most often taken for"):
        table.add_column(column, justify="left" if column in ("class", "most often taken for") else "right")
    for accuracy, index in order[:shown]:
        precision = result.class_precision[index]
        figures = f"{accuracy:.2%}", "-" if precision is None else f"{precision:.2%}", f"{result.class_f1[index]:.2%}"
        if result.confusion is None:
            table.add_row(escape(names[index]), *figures, "-", "-")
            continue
        row = list(result.confusion[index])
        total, row[index] = sum(row), 0
        other = max(range(len(row)), key=row.__getitem__)
        taken_for = f"{names[other]} ({row[other]})" if row[other] else "-"
        table.add_row(escape(names[index]), *figures, str(total), escape(taken_for))
    return table


def probe_table(probes: dict, what: str) -> Table:
    """The probes' accuracies on a set, from evaluation.json."""
    table = Table(title=f"frozen features · {escape(what)}", title_justify="left")
    for column in ("probe", "top-1", "how"):
        table.add_column(column, justify="right" if column == "top-1" else "left")
    if "knn" in probes:
        knn = probes["knn"]
        table.add_row("k-NN", f"{knn['top1']:.2%}", f"k={knn['neighbours']}, T={knn['temperature']}")
    if "linear" in probes:
        table.add_row(
            "linear", f"{probes['linear']['top1']:.2%}", f"L2 {probes['linear']['l2']:g}, chosen on the val split"
        )
    if "few_shot" in probes:
        few = probes["few_shot"]
        spread = "" if few["top1_sd"] is None else f" ± {few['top1_sd']:.2%}"
        seeds = len(few["top1_each"])
        table.add_row("few-shot", f"{few['top1_mean']:.2%}{spread}", f"{few['shots']} images per class, n={seeds}")
    return table


def corruption_table(corruptions: dict) -> Table:
    """Top-1, or mAP, by corruption and severity, from evaluation.json."""
    field, title = ("top1", "top-1") if "top1" in corruptions else ("average_precision", "mAP")
    table = Table(title=f"{title} on corrupted images", title_justify="left")
    table.add_column("corruption")
    for severity in corruptions["severities"]:
        table.add_column(str(severity), justify="right")
    table.add_column("mean", justify="right")
    for name, of_name in corruptions[field].items():
        values = list(of_name.values())
        cells = [f"{value:.2%}" for value in [*values, sum(values) / len(values)]]
        table.add_row(name, *cells)
    table.add_row("mean", *[""] * len(corruptions["severities"]), f"{corruptions[f'mean_{field}']:.2%}")
    return table
