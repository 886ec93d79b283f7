"""Pictures: that what they show is there and can be read, whatever a model or a prompt is like."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree
from unittest import mock

import numpy
import pytest
from matplotlib import rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from dapa_merge.measure.figures import Mean
from dapa_merge.report import drawing
from dapa_merge.report.charts import Bar, Step, model_bars, search_path
from dapa_merge.report.drawing import CARD_WIDTH, DOTS_PER_INCH, MAX_LABEL, Panel, layer_maps, readable, render
from dapa_merge.trace.charts import GroupBar, bars_by_layer, edit_curve, group_bars, heatmap


def heat(num_layers=10, labels=("How", "do", "I", "steal", "a", "car", "?"), marked=None):
    effect = numpy.random.default_rng(0).normal(size=(num_layers, len(labels)))
    return heatmap(effect, labels, "Restoring the MLP of 2 layers, prompt 1", marked=marked)


def mean(num_layers):
    values = numpy.random.default_rng(1).normal(size=num_layers)
    return Mean(values, values - 0.3, values + 0.3, numpy.full(num_layers, 9))


def bars(num_layers=10, modules=("gate", "up", "down", "attention")):
    return bars_by_layer(
        [("Change of refusing (nats)", {module: mean(num_layers) for module in modules})], num_layers=num_layers
    )


def path(num_units=10, num_steps=6, scores=True, final=None):
    steps = [
        Step(range(max(1, num_units - step)), 1 - step / (num_steps + 1), step % 2 == 0, 0.9 if scores else None)
        for step in range(num_steps)
    ]
    return search_path([f"{unit}.gate" for unit in range(num_units)], steps, final or [0, num_units - 1], 0.95, "DSR")


def curve(names=("DSR", "over-refusal", "skill")):
    shares = [0, 0.02, 0.1, 0.3]
    return edit_curve(shares, {name: [Bar(0.1 * n, (0.05 * n, 0.2 * n)) for n in range(4)] for name in names}, 0.1)


def models(names=("DSR", "over-refusal", "skill")):
    values = [Bar(0.0, (0.0, 0.06)), Bar(0.98, (0.9, 1.0)), Bar(1.0, (0.94, 1.0))]
    return model_bars(["before", "after", "source"], dict.fromkeys(names, values), "Before and after the repair")


def groups(number=18):
    shown = [GroupBar(f"layer {n}", 0.05, n / number, (0.1, 0.2, 0.9)) for n in range(number)]
    panels = [
        ("Alone in the target: sufficient?", shown),
        ("Left out of all units: necessary?", shown),
    ]
    return group_bars(panels, {"target": 0.05, "all units": 0.97}, "DSR")


def maps(number=7, num_layers=24, modules=("gate", "up", "down", "q", "k", "v", "o")):
    random = numpy.random.default_rng(2)
    scores = [random.normal(size=(len(modules), num_layers)) for _ in range(number)]
    scores[-1][2:] = math.nan
    return layer_maps([Panel(f"Influence on the hidden state {n}", one) for n, one in enumerate(scores)], modules)


FIGURES = {
    "maps": maps,
    "maps of many layers": lambda: maps(6, 80),
    "maps of one layer": lambda: maps(2, 1, ("attention", "up", "mlp")),
    "heatmap": heat,
    "heatmap of one layer and token": lambda: heat(1, ("bomb",), [True]),
    "heatmap of many layers": lambda: heat(96, [f"token{n}" for n in range(81)], [True] * 81),
    "heatmap of odd tokens": lambda: heat(4, ("$x_1$", "\n", " ", "炸弹", "💣", "</s>", "\u202eabc", "a" * 99, "Ġcar")),
    "bars": bars,
    "bars of one layer": lambda: bars(1, ("up", "down")),
    "bars of many layers": lambda: bars(80),
    "bars of many modules": lambda: bars(24, ("gate", "up", "down", "q", "k", "v", "o")),
    "path": path,
    "path of one test": lambda: path(1, 1),
    "path of many": lambda: path(160, 90),
    "path that keeps many": lambda: path(160, 30, final=range(60, 75)),
    "path of an evaluator": lambda: path(scores=False),
    "curve": curve,
    "curve of many skills": lambda: curve(["DSR", "over-refusal", *(f"lm-eval:arc_easy{n}:acc" for n in range(6))]),
    "models": models,
    "models of many skills": lambda: models(["DSR", "over-refusal", *(f"lm-eval:hellaswag{n}:acc" for n in range(7))]),
    "models of two long names": lambda: models(["gsm8k exact_match strict", "arc_challenge acc_norm", "DSR", "x"]),
    "path of 240 units": lambda: path(240, 40, final=range(3, 240, 8)),
    "groups": groups,
    "groups of many layers": lambda: groups(60),
}


def boxes_of_text(figure):
    """What every text that is drawn covers, in dots; a picture has more texts, such as those of ticks outside it."""
    FigureCanvasAgg(figure)
    drawn = []
    draw = Text.draw

    def draw_and_note(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer), text.get_rotation()))
        draw(text, renderer)

    # The layout is made before anything is drawn, as for a file.
    with mock.patch.object(Text, "draw", draw_and_note):
        figure.draw_without_rendering()
    return drawn


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_is_cut_off(name):
    figure = FIGURES[name]()
    found = boxes_of_text(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for number, (text, box, rotation) in enumerate(found):
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
        for other, other_box, other_rotation in found[:number]:
            if rotation == other_rotation and rotation % 90:
                # Slanted texts lie side by side, though the upright boxes around them overlap.
                continue
            # Boxes have a little air of their own around the letters.
            apart = (
                box.x0 >= other_box.x1 - 1 or other_box.x0 >= box.x1 - 1
                or box.y0 >= other_box.y1 - 3 or other_box.y0 >= box.y1 - 3
            )  # fmt: skip
            assert apart, (text, other)


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_a_png_as_wide_as_a_card_and_an_svg_always_the_same(name, monkeypatch):
    # One of each kind is drawn as it is, and twice; the others are drawn by the same code.
    is_first = " " not in name
    if not is_first:
        monkeypatch.setattr(drawing, "DOTS_PER_INCH", 40)
    figure = FIGURES[name]()
    svg, png = (render(figure, kind) for kind in ("svg", "png"))
    pixels = imread(io.BytesIO(png))
    assert pixels.shape[1] == CARD_WIDTH * (DOTS_PER_INCH if is_first else 40)
    # On a light ground, and not empty.
    assert pixels[0, 0, :3].min() == 1
    assert pixels[..., :3].std() > 0.02
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    if is_first:
        assert render(FIGURES[name](), "svg") == svg


def test_pictures_do_not_depend_on_the_users_own_settings():
    plain = render(models(), "svg")
    with rc_context({"text.usetex": True, "savefig.bbox": "tight", "font.size": 30, "axes.facecolor": "black"}):
        assert render(models(), "svg") == plain
        # Which are as before afterwards.
        assert rcParams["font.size"] == 30


def texts(figure):
    return [text for text, _, _ in boxes_of_text(figure)]


def test_a_heatmap_has_a_line_for_each_token_and_the_subjects_stand_out():
    figure = heat(marked=[False, False, False, True, True, True, False])
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["How", "do", "I", "steal", "a", "car", "?"]
    assert [label.get_fontweight() for label in labels] == ["normal"] * 3 + ["bold"] * 3 + ["normal"]
    assert axes.images[0].get_array().shape == (7, 10)
    # No effect is white, whatever the largest is.
    assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax
    assert heatmap(numpy.zeros((2, 2)), "ab", "nothing").axes[0].images[0].norm.vmax == 1


def test_each_map_is_scaled_to_its_own_largest_score_and_what_is_not_measured_is_left_out():
    figure = layer_maps([Panel("one", numpy.array([[2.0, -8.0]])), Panel("two", numpy.array([[math.nan, 3.0]]))], ["v"])
    first, second = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert first.tolist() == [[0.25, -1.0]]
    assert numpy.ma.filled(second, 9).tolist() == [[9, 1.0]]


def test_bars_have_the_height_of_the_means_and_no_interval_where_there_is_none():
    values = mean(3)
    nothing = numpy.full(3, math.nan)
    figure = bars_by_layer([("a", {"gate": values}), ("b", {"gate": Mean(values.mean, *[nothing] * 3)})], num_layers=3)
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == pytest.approx(values.mean)
    (_, _, (lines,)) = first.containers[0] if len(first.containers[0]) == 3 else first.containers[1]
    spans = [abs(segment[1][1] - segment[0][1]) for segment in lines.get_segments()]
    assert spans == pytest.approx([0.6] * 3)
    (_, _, (lines,)) = next(one for one in second.containers if len(one) == 3 and hasattr(one, "has_yerr"))
    assert all(segment[0][1] == segment[1][1] for segment in lines.get_segments())


def test_the_path_shows_each_test_the_threshold_and_what_was_kept():
    figure = path()
    share, score, matrix = figure.axes
    assert [len(points.get_offsets()) for points in share.collections] == [3, 3]
    assert any(
        line.get_ydata()[0] == 0.95 and line.get_linestyle() == "--" for line in score.lines if len(line.get_ydata())
    )
    bold = [label.get_text() for label in matrix.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["0.gate", "9.gate"]
    assert matrix.images[0].get_array().shape == (10, 6)
    assert {"holds", "fails", "required", "kept in the end: 2 of 10 units"} <= set(texts(figure))


def test_bars_of_models_say_their_values_and_reach_over_their_intervals():
    figure = models()
    assert [text for text in texts(figure) if text[:2] in ("0.", "1.") and len(text) == 5].count("0.980") == 3
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([0.0] * 3 + [0.98] * 3 + [1.0] * 3)


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("car", "car"),
        ("$x$", "$x$"),
        (" ", "' '"),
        ("", "''"),
        ("\n", "\\n"),
        ("💣", "\\U0001f4a3"),
        ("炸", "\\u70b8"),
        ("a" * 99, "a" * (MAX_LABEL - 1) + "…"),
    ],
)
def test_a_label_is_shown_as_it_is_or_as_an_escape(label, shown):
    assert readable(label) == shown
