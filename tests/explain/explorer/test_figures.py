"""The explorer's figures say in full what they show."""

from itertools import chain

from matplotlib.text import Text
from support.synthetic_report import make_report

from vmoe.explain.explorer.figures import draw_figures
from vmoe.explain.explorer.galleries import draw_galleries


def test_names_of_layers_and_classes_are_not_cut():
    report, images = make_report(layers=2)
    names = ("layers.0.blocks.1.mlp", "layers.2.blocks.17.mlp")
    for layer, name in zip(report["layers"], names, strict=True):
        layer["name"] = name
        layer["patch_label_log_ratio"] = None
    report["runs"] = report["runs"][:1]
    report["classes"] = [f"pembroke welsh corgi {index}" for index in range(len(report["classes"]))]
    shown = {}
    for name, page in chain(draw_figures(report), draw_galleries(report, images)):
        if name in ("maps", "flows", "coactivation"):
            texts = page.figure.findobj(Text)
            shown[name] = [text.get_text() for text in texts]
            renderer = page.canvas.get_renderer()
            assert all(text.get_window_extent(renderer).x1 <= page.width for text in texts)
    assert not [text for text in chain(*shown.values()) if "…" in text]
    assert " → ".join(names) in shown["flows"] and set(names) <= set(shown["coactivation"])
    assert {"layers.0.", "blocks.1.mlp", "layers.2.", "blocks.17.mlp"} <= set(shown["maps"])
    assert any("taken for pembroke welsh corgi" in text for text in shown["maps"])
