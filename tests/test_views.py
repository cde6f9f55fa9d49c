"""The recipes, and what a view refuses to be."""

import pytest

from ssl_xcit.data.views import (
    EvalView,
    View,
    dino_views,
    supervised_views,
    three_augment_views,
)
from ssl_xcit.runtime.errors import UserError


def test_dino_views_are_those_of_the_official_code():
    (first, second), small = dino_views()
    for view in (first, second):
        assert (view.size, view.scale, view.ratio) == (224, (0.4, 1.0), (3 / 4, 4 / 3))
    assert len(small) == 8
    assert {(view.size, view.scale) for view in small} == {(96, (0.05, 0.4))}
    for view in (first, second, *small):
        assert (view.interpolation, view.flip) == ("bicubic", 0.5)
        assert (view.jitter, view.grayscale, view.blur_sigma) == (0.8, 0.2, (0.1, 2.0))
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
    assert [view.blur for view in (first, second, *small)] == [1.0, 0.1] + [0.5] * 8
    assert [view.solarize for view in (first, second, *small)] == [0.0, 0.2] + [0.0] * 8


def test_dino_views_without_local_crops_keep_their_two_groups():
    large, small = dino_views(local_crops_number=0)
    assert (len(large), len(small)) == (2, 0)


def test_supervision_has_one_plain_crop():
    assert supervised_views(160) == [[View(160, (0.08, 1.0))]]


def test_three_augment_is_deit_iiis():
    ((view,),) = three_augment_views(192, simple_crop=True)
    assert (view.size, view.one_of, view.simple_crop, view.flip) == (192, True, True, 0.5)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.3, 0.3, 0.3, 0.0)
    assert (view.jitter, view.blur_sigma) == (1.0, (0.1, 2.0))
    assert three_augment_views(jitter=0.0)[0][0].jitter == 0.0


def test_a_reflection_of_four_pixels_needs_five():
    View(5, (0.4, 1.0), simple_crop=True)
    with pytest.raises(UserError, match="at least 5 pixel"):
        View(4, (0.4, 1.0), simple_crop=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("scale", (0.5, 0.4)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.1)),
        ("ratio", (0.0, 1.0)),
        ("flip", 1.5),
        ("solarize", -0.1),
        ("contrast", -1.0),
        ("hue", 0.6),
        ("blur_sigma", (2.0, 0.1)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    values = {"size": 224, "scale": (0.4, 1.0), name: value}
    with pytest.raises(UserError, match=rf"View\.{name}: expected .*, got "):
        View(**values)


def test_an_evaluation_crop_fits_into_the_resized_image():
    assert EvalView(256, 224).size == 224
    assert EvalView(96).size == 96
    with pytest.raises(UserError, match=r"EvalView\.crop: expected within 1\.\.resize = 224"):
        EvalView(224, 256)
