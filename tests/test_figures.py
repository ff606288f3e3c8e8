"""SVG figures: the Pareto front, the scales, hostile names; every figure is well-formed XML that needs no network."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest

from qtool.report.figures import Point, kl_by_position, pareto, shade, size_against, ticks
from qtool.report.maps import expert_map, heat_map

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


def test_models_of_one_size_stand_apart_and_names_do_not_collide() -> None:
    names = ["source", "awq", "gptq", "nf4", "rtn-symmetric"]
    sizes = [3_900_000, 1_600_000, 1_600_000, 1_600_001, 1_601_000]
    points = [
        Point(n, s, 80 + i / 2, 76 + i / 2, 84 + i / 2) for i, (n, s) in enumerate(zip(names, sizes, strict=True))
    ]
    picture = size_against(points, "passed", True)
    places = sorted(float(x) for x in re.findall(r'<circle [^>]*cx="([\d.]+)"', picture))
    assert all(b - a > 9.9 for a, b in pairwise(places))
    labels = re.findall(r'<text class="s\d name" x="([\d.]+)" y="([\d.]+)">([^<]+)', picture)
    assert [name for *_, name in labels] == names
    boxes = [(float(x), float(y), 7 * len(name)) for x, y, name in labels]
    for (x1, y1, w1), (x2, y2, w2) in combinations(boxes, 2):
        assert x1 + w1 < x2 or x2 + w2 < x1 or abs(y1 - y2) >= 11


def test_a_model_keeps_its_colour_and_control_characters_are_no_xml_fault() -> None:
    with_source = size_against([SOURCE, GOOD, Point("x\x00\x1b", 1_500_000, 0.75, 0.7, 0.8)], "passed", True)
    alone = kl_by_position({"good": [0.1], "x\x00\x1b": [0.2]}, 8)
    ET.fromstring(with_source)
    assert "x\\u0000\\u001b" in alone
    for picture in (with_source, alone):
        assert re.search(r'class="s1( name)?"[^>]*>(<[^>]*>)*(<text[^>]*>)?good', picture)


def test_expert_map_has_a_cell_for_every_expert() -> None:
    """Layers without experts have no row; the worst expert is told."""
    values = {(layer, expert): 0.1 + 0.01 * expert for layer in (1, 3) for expert in range(5)} | {(3, 2): 0.9}
    picture = expert_map(values, "relative output error")
    root = ET.fromstring(picture)
    cells = [rect for rect in root.iter() if rect.tag.endswith("rect") and rect.get("height") == "10"]
    assert len(cells) == 10 + 24  # and the key's
    assert "largest in layer 3, expert 2" in picture
    assert "layer 1" in picture
    assert "layer 0" not in picture
    assert "#c0392b" not in picture


def test_a_map_of_tokens_marks_experts_that_saw_none() -> None:
    picture = expert_map({(0, 0): 1200, (0, 1): 0, (0, 2): 31}, "calibration tokens by expert", digits=0)
    marked = [rect for rect in ET.fromstring(picture).iter() if rect.get("stroke") == "#c0392b"]
    assert len(marked) == 1
    assert "from 0 to 1,200; largest in layer 0, expert 0" in picture


def test_every_picture_is_drawn_for_a_telephone_too_and_maps_share_their_colours() -> None:
    """What a browser shows at 390 pixels is looked at by scripts/check_report.py; here that no picture is wider."""
    from pathlib import Path

    from qtool.report.figures import NARROW
    from qtool.report.pictures import pictures
    from qtool.runs.record import load_run

    run = load_run(Path(__file__).parent / "data" / "stored_run" / "00265698")
    drawn = pictures(run)
    assert drawn
    for picture in drawn:
        wide, narrow = (int(re.search(r'width="(\d+)"', svg)[1]) for svg in (picture.svg, picture.narrow))  # type: ignore[index]  # each has one
        assert narrow <= NARROW < wide, picture.name
    keys = [re.findall(r'class="soft"[^>]*>(0\.\d{4})<', p.svg) for p in drawn if p.name.startswith("errors")]
    assert len(keys) > 1
    assert len({tuple(key) for key in keys}) == 1, "the ends of the scale are those of all artifacts"
