"""Points: what makes two measurements the same, and which of them a grid holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from reference_model.points import Point, PointGuide, grid, group_tensors, sensitivity

GUIDE = PointGuide(2.0, 0.25, 800.0, "run1", (0.1, 5.0))


@pytest.mark.parametrize(
    "point",
    [
        Point(None, 800),
        Point(0.1, 400.5),
        Point(0.1, 800, GUIDE),
        Point(0.1, 800, replace(GUIDE, interval=None)),
        Point(0.1, 800, changed=(("unet.enc.*", 0.2),)),
    ],
)
def test_a_point_survives_json(point: Point):
    again = Point.from_dict(json.loads(json.dumps(asdict(point))))
    assert again == point
    assert hash(again) == hash(point)
    assert again.label == point.label


def test_guidance_of_strength_one_is_none():
    assert Point(0.1, 800, replace(GUIDE, guidance=1)) == Point(0.1, 800)


def test_where_a_run_lies_does_not_make_another_guide():
    assert Point(0.1, 800, replace(GUIDE, run_dir="/elsewhere")) == Point(0.1, 800, GUIDE)
    assert Point(0.1, 800, replace(GUIDE, run_id="run2")) != Point(0.1, 800, GUIDE)


def test_different_points_have_different_file_names():
    points = [
        Point(None, 800),
        Point(None, 400),
        Point(0.1, 800),
        Point(0.10000001, 800),
        Point(0.1, 800.5),
        *(
            Point(0.1, 800, g)
            for g in (
                GUIDE,
                replace(GUIDE, guidance=2.5),
                replace(GUIDE, sigma_rel=0.2),
                replace(GUIDE, t=400.0),
                replace(GUIDE, run_id="run2"),
                replace(GUIDE, interval=None),
            )
        ),
        Point(0.1, 800, changed=(("a.*", 0.2),)),
        Point(0.1, 800, changed=(("b.*", 0.2),)),
        Point(0.1, 800, changed=(("a.*", 0.3),)),
    ]
    assert len({p.label for p in points}) == len(points)
    assert all("/" not in p.label and "*" not in p.label for p in points)


def test_order_has_plain_points_first_and_raw_weights_before_averages():
    guided, changed = Point(0.1, 800, GUIDE), Point(0.1, 800, changed=(("a", 0.2),))
    points = [Point(None, 800), Point(0.05, 800), Point(0.1, 800), guided, changed]
    assert sorted(reversed(points), key=lambda p: p.order) == points
    assert Point(0.2, 400).order < Point(None, 800).order


def test_raw_weights_have_no_tensors_of_another_length():
    with pytest.raises(ValueError, match="raw weights have no EMA length"):
        Point(None, 800, changed=(("a", 0.1),))


def test_a_grid_is_a_product_without_repeats_and_without_self_guidance():
    guides = [PointGuide(w, s, 800.0, "run1") for s in (0.1, 0.25) for w in (1.0, 1.5, 2.0)]
    points = grid([0.1, 0.05, 0.1], [800], guides)
    assert len(set(points)) == len(points)
    # 0.05: alone, and by two guides of two strengths; 0.1 likewise but not by itself.
    assert [p.sigma_rel for p in points].count(0.05) == 5
    assert [p.sigma_rel for p in points].count(0.1) == 3
    elsewhere = grid([0.1], [800], [PointGuide(2.0, 0.1, 800.0, "run2", run_dir="/x")])
    assert len(elsewhere) == 1, "another run's average of the same length is another network"
    earlier = grid([0.1], [800], [PointGuide(2.0, 0.1, 400.0, "run1")])
    assert len(earlier) == 1


def test_sensitivity_changes_one_group_at_a_time():
    base = Point(0.1, 800)
    points = sensitivity(base, ["a.*", "b.*"], [0.2, 0.05, 0.1])
    assert points[0] == base
    assert [p.changed for p in points[1:]] == [
        (("a.*", 0.05),),
        (("a.*", 0.2),),
        (("b.*", 0.05),),
        (("b.*", 0.2),),
    ]


def test_tensors_are_grouped_by_block_or_by_layer():
    names = [
        "unet.embedding.noise.weight",
        "unet.enc.8x8_conv.weight",
        "unet.enc.8x8_block0.residual.conv0.weight",
        "unet.enc.8x8_block0.residual.conv1.weight",
        "unet.out.gain.weight",
        "logvar.linear.weight",
    ]
    assert group_tensors(names) == [
        "unet.embedding.noise.*",
        "unet.enc.8x8_conv.*",
        "unet.enc.8x8_block0.*",
        "unet.out.gain.*",
    ]
    assert group_tensors(names, "layer")[2:4] == [
        "unet.enc.8x8_block0.residual.conv0.*",
        "unet.enc.8x8_block0.residual.conv1.*",
    ]


def test_words_name_what_differs():
    words = Point(0.1, 400, GUIDE).describe(end=800)
    assert words == "σ_rel 0.1, after 400 images, w 2 by σ_rel 0.25 after 800 images, σ in (0.1, 5]"
    assert Point(0.1, 800).describe(800) == "σ_rel 0.1"
    assert Point(0.1, 800, changed=(("a.*", 0.2),)).describe(800) == "σ_rel 0.1, a.* at 0.2"
