"""SVG figures: the Pareto front, the scales, hostile names; every figure is well-formed XML that needs no network."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from qtool.figures import Point, heat_map, kl_by_position, pareto, shade, size_against, ticks

HOSTILE = '</text><script>alert(1)</script>&"'
SOURCE, GOOD, BAD, TIED = (
    Point("source", 4_000_000, 0.9, 0.8, 1.0),
    Point("good", 1_000_000, 0.8, 0.7, 0.9),
    Point("bad", 2_000_000, 0.7, 0.6, 0.8),
    Point(HOSTILE, 1_000_000, 0.5, 0.4, 0.6),
)


def test_front_has_no_point_that_another_beats() -> None:
    assert pareto([SOURCE, BAD, TIED, GOOD], higher_is_better=True) == [GOOD, SOURCE]
    assert pareto([SOURCE, BAD, TIED, GOOD], higher_is_better=False) == [TIED]


@pytest.mark.parametrize(("high", "last"), [(1.0, 1.0), (0.041, 0.05), (97.0, 100.0), (0.0, 1.0), (3.9, 4.0)])
def test_ticks_reach_the_top(high: float, last: float) -> None:
    assert ticks(0, high)[-1] == pytest.approx(last)
    assert 3 <= len(ticks(0, high)) <= 7


def test_scale_runs_from_light_to_dark() -> None:
    greys = [sum(bytes.fromhex(shade(i / 20)[1:])) for i in range(21)]
    assert greys == sorted(greys, reverse=True)
    assert (shade(-1), shade(2)) == (shade(0), shade(1))


def test_figures_are_xml_and_names_stay_text() -> None:
    pictures = [
        size_against([SOURCE, BAD, TIED, GOOD], "passed", True),
        kl_by_position({HOSTILE: [0.1, 0.2], "flat": [0.0, 0.0]}, 128),
        heat_map({(0, "mlp.up_proj"): 0.5, (10, "q_proj"): 0.1, (2, HOSTILE): 0.3}, "relative output error"),
    ]
    for picture in pictures:
        root = ET.fromstring(picture)
        assert not [node for node in root.iter() if node.tag.endswith("script")]
        assert any(node.text and "script>alert" in node.text for node in root.iter())
        assert "href" not in picture
        assert "url(" not in picture


def test_heat_map_leaves_out_what_nobody_measured() -> None:
    root = ET.fromstring(heat_map({(0, "q_proj"): 0.25, (1, "k_proj"): 0.25}, "error"))
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert words.count("0.2500") == 4  # two cells and both ends of the legend
    assert words.index("layer 0") < words.index("layer 1")
