"""Pictures are checked by their pixels: colours where the roles say, the image still visible, nothing where dropped."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from hiprune_kernels import visualize
from hiprune_kernels.visualize import (
    OTHER_COLORS,
    ROLE_COLORS,
    View,
    draw_overview,
    draw_scores,
    draw_selection,
    draw_views,
    to_rgb,
)

GRAY = (120, 120, 120)
YELLOW, RED, CYAN = ROLE_COLORS[1:]


def gray(width, height):
    return Image.new("RGB", (width, height), GRAY)


def centre(picture, grid, index, size=None):
    """Colour in the middle of a token, of a picture whose image part has `size`."""
    width, height = size or picture.size
    y, x = divmod(index, grid[1])
    return picture.getpixel((int((x + 0.5) * width / grid[1]), int((y + 0.5) * height / grid[0])))


def blended(base, color, share):
    return tuple(round(b + share * (c - b)) for b, c in zip(base, color))


def assert_close(color, expected, tolerance=2):
    assert max(abs(a - b) for a, b in zip(color, expected)) <= tolerance, (color, expected)


def test_every_token_has_its_role_s_colour():
    roles = torch.arange(24) % 4
    picture = draw_selection(gray(240, 160), roles, (4, 6), legend=False)
    assert picture.size == (240, 160)
    dimmed = centre(picture, (4, 6), 0)
    assert max(dimmed) < 0.45 * GRAY[0]
    expected = [dimmed, *(blended(GRAY, color, share) for color, share in zip(ROLE_COLORS[1:], visualize._TINTS[1:]))]
    for index, role in enumerate(roles.tolist()):
        assert_close(centre(picture, (4, 6), index), expected[role])
    # The tints are different enough to be told apart, and every kept token is brighter than a dropped one.
    kept = [np.array(color) for color in expected[1:]]
    assert min(abs(a - b).max() for i, a in enumerate(kept) for b in kept[:i]) > 25
    assert min(color.max() for color in kept) > 2 * max(dimmed)


def test_outlines_are_drawn_inside_the_token():
    roles = torch.zeros(9, dtype=torch.uint8)
    roles[4] = 2
    picture = np.array(draw_selection(gray(120, 90), roles, (3, 3), legend=False))
    is_red = (picture == RED).all(axis=2)
    inside = np.zeros_like(is_red)
    inside[30:60, 40:80] = True
    assert is_red[30, 40:80].all() and is_red[59, 40:80].all() and is_red[30:60, 40].all() and is_red[30:60, 79].all()
    assert not is_red[~inside].any() and not is_red[36:54, 46:74].any()


def test_sizes_that_the_grid_does_not_divide():
    roles = torch.zeros(15, dtype=torch.uint8)
    roles[[0, 7, 14]] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    picture = draw_selection(gray(301, 167), roles, (3, 5), legend=False)
    assert picture.size == (301, 167)
    for index in range(15):
        expected = blended(GRAY, ROLE_COLORS[roles[index]], visualize._TINTS[roles[index]])
        if roles[index]:
            assert_close(centre(picture, (3, 5), index), expected)
        else:
            assert max(centre(picture, (3, 5), index)) < 60
    corner = picture.getpixel((300, 166))
    assert corner == CYAN  # the last token reaches the last pixel


def test_the_image_stays_visible_under_kept_tokens_and_fades_under_dropped_ones():
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    image = Image.fromarray(np.concatenate([ramp, ramp], axis=1))  # the same content in both tokens
    before = image.tobytes()
    picture = np.array(draw_selection(image, [3, 0], (1, 2), legend=False)).astype(int)
    kept, dropped = picture[32, 8:56].mean(axis=1), picture[32, 72:120].mean(axis=1)
    assert (np.diff(kept) >= 0).all() and np.ptp(kept) > 130
    assert np.ptp(dropped) < 0.5 * np.ptp(kept) and np.ptp(dropped) > 40  # dimmed, not black
    assert image.tobytes() == before


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_are_not():
    roles = torch.ones(36, dtype=torch.uint8)
    assert draw_selection(gray(48, 48), roles, (6, 6), legend=False).size == (192, 192)  # 8 px tokens -> 32
    assert draw_selection(gray(336, 168), roles[:2], (1, 2), legend=False).size == (336, 168)


@pytest.mark.parametrize("size", [(336, 336), (40, 90), (1200, 300)])
def test_legend_is_a_strip_below_with_all_swatches(size):
    roles = torch.tensor([0, 1, 2, 3])
    plain = draw_selection(gray(*size), roles, (2, 2), legend=False)
    picture = draw_selection(gray(*size), roles, (2, 2))
    assert picture.width == plain.width and plain.height < picture.height <= plain.height + 250
    assert picture.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    strip = np.array(picture.crop((0, plain.height, *picture.size)))
    for color in ROLE_COLORS:
        assert (strip == color).all(axis=2).sum() >= 40


def test_legend_counts_tokens():
    texts = [text for _, text in visualize._selection_legend(torch.tensor([0, 0, 1, 2, 2, 3]))]
    assert texts == ["1 anchor", "2 buffers", "1 register", "2 dropped"]


def test_scores_become_the_colormap_s_colours():
    scores = torch.linspace(0.0, 2.0, 201)[:200]  # 1st and 99th percentile lie inside
    picture = draw_scores(gray(20 * 32, 10 * 32), scores, (10, 20), legend=False)
    low, high = np.quantile(scores.double().numpy(), [0.01, 0.99])
    for index in (0, 3, 57, 121, 198, 199):
        share = np.clip((float(scores[index]) - low) / (high - low), 0, 1)
        heat = [255 * channel for channel in matplotlib.colormaps["inferno"](share)[:3]]
        assert_close(centre(picture, (10, 20), index), blended(GRAY, heat, 0.68), tolerance=3)


def test_one_huge_score_does_not_hide_the_others():
    scores = torch.cat([torch.linspace(1, 2, 199), torch.tensor([1e6])])
    picture = draw_scores(gray(20 * 32, 10 * 32), scores, (10, 20), legend=False)
    assert sum(centre(picture, (10, 20), 198)) > sum(centre(picture, (10, 20), 10)) + 150


def test_equal_scores_and_another_colormap():
    picture = np.array(draw_scores(gray(64, 64), torch.full((4,), 0.3), (2, 2), colormap="gray", legend=False))
    assert (picture == picture[0, 0]).all()
    assert_close(picture[0, 0], blended(GRAY, (128, 128, 128), 0.68))


def test_score_legend_shows_the_scale():
    picture = draw_scores(gray(400, 400), torch.arange(16.0), (4, 4))
    strip = np.array(picture.crop((0, 400, *picture.size))).astype(int)
    swatch = strip[strip.shape[0] // 2, 8:76].sum(axis=1)  # from inferno's black to its pale yellow
    assert picture.height > 400 and swatch[0] < 60 and swatch[-1] > 550 and (np.diff(swatch) >= -1).all()
    assert strip[:, 85:].max() > 200  # the text


def test_overview_puts_four_panels_side_by_side():
    image = gray(256, 256)
    objects, deeps, roles = torch.arange(64.0), torch.arange(64.0).flip(0), torch.zeros(64, dtype=torch.uint8)
    roles[9], roles[54] = 1, 3
    titles = ("one", "two", "three", "four")
    picture = draw_overview(image, objects, deeps, roles, (8, 8), titles=titles)
    pixels = np.array(picture)
    top = int(np.argmax((pixels[:, 20] == GRAY).all(axis=1)))  # where the first panel begins
    margin = int(np.argmax((pixels[top + 5] == GRAY).all(axis=1)))
    lefts = [margin + i * (256 + margin) for i in range(4)]
    assert picture.width == 4 * 256 + 5 * margin
    panels = [picture.crop((left, top, left + 256, top + 256)) for left in lefts]
    assert panels[0].tobytes() == image.tobytes()
    for panel, scores in zip(panels[1:3], (objects, deeps)):
        assert panel.tobytes() == draw_scores(image, scores, (8, 8), legend=False).tobytes()
    assert panels[3].tobytes() == draw_selection(image, roles, (8, 8), legend=False).tobytes()
    for left in lefts:  # every panel has a title above it
        assert pixels[:top, left : left + 60].max() > 200


def test_other_methods_roles_have_their_own_names_and_colours():
    roles = torch.tensor([0, 1, 1, 2])
    picture = draw_selection(gray(200, 200), roles, (2, 2), role_names=("kept", "merger"), legend=False)
    for index, color in ((1, OTHER_COLORS[0]), (2, OTHER_COLORS[0]), (3, OTHER_COLORS[1])):
        assert_close(centre(picture, (2, 2), index), blended(GRAY, color, visualize._OTHER_TINT))
    texts = [text for _, text in visualize._selection_legend(roles, ("kept", "merger"))]
    assert texts == ["2 kept", "1 merger", "1 dropped"]
    counted = [("register", 1), ("register", 2), ("kept", 1), ("like the text", 2)]
    assert [visualize.counted(*each) for each in counted] == ["1 register", "2 registers", "1 kept", "2 like the text"]


def tiles():
    """The view of the whole behind two tiles, one above the other, of 4 x 4 tokens each; every one has its colour."""
    colors = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
    views = zip(colors, ((0, 0), (1, 0), None))
    return [View(Image.new("RGB", (64, 64), color), (4, 4), place) for color, place in views], colors


def find(picture, color):
    """The rectangle that a colour fills: left, top, right, bottom."""
    y, x = np.nonzero((np.array(picture) == color).all(axis=2))
    assert len(x) == (x.max() + 1 - x.min()) * (y.max() + 1 - y.min())
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_tiles_stand_in_their_places_beside_the_view_of_the_whole():
    views, colors = tiles()
    roles = torch.zeros(48, dtype=torch.uint8)
    roles[[5, 20, 40]] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    picture = draw_views(views, roles, titles=("image", "kept tokens"))
    upper, lower, whole = (find(picture, color) for color in colors)
    assert upper[0] == lower[0] > whole[2] and lower[1] > upper[3]
    assert (whole[1] + whole[3]) // 2 == (upper[1] + lower[3]) // 2
    pixels, second = np.array(picture), (picture.width - whole[0]) // 2  # where the next panel begins
    for role, box, index in ((1, upper, 5), (2, lower, 4), (3, whole, 8)):
        y, x = divmod(index, 4)
        column = box[0] + second + 16 * x
        assert tuple(pixels[box[1] + 16 * y, column + 8]) == ROLE_COLORS[role]
        assert tuple(pixels[box[1] + 16 * y + 15, column + 8]) == ROLE_COLORS[role]


def test_padding_is_no_dropped_token():
    views, _ = tiles()
    candidates = torch.ones(48, dtype=torch.bool)
    candidates[:4] = False
    roles = (torch.arange(48) == 30).to(torch.uint8)
    scores = torch.arange(48.0)
    scores[0] = 1e9  # of padding, which spans no colours
    options = {"titles": ("image", "scores", "kept"), "role_names": ("kept",), "candidates": candidates}
    picture = draw_views(views, roles, [scores], **options)
    padding = (np.array(picture) == visualize._PADDING).all(axis=2).sum()
    assert padding >= 2 * 4 * 16 * 16  # of the scores and of the kept tokens
    texts = [text for _, text in visualize._selection_legend(roles, ("kept",), ~candidates)]
    assert texts == ["1 kept", "43 dropped", "4 padding"]
    other = draw_views(views, roles, [scores.clamp(max=47)], **options)
    assert picture.tobytes() == other.tobytes()


@pytest.mark.parametrize(("size", "scores", "columns"), [((300, 300), 2, 4), ((1200, 400), 2, 2), ((1200, 400), 1, 3)])
def test_a_wide_figure_has_two_rows(size, scores, columns):
    view, values = View(gray(*size), (2, 2)), [torch.arange(4.0)] * scores
    picture = draw_views([view], [1, 2, 3, 0], values, titles=["title"] * (2 + scores))
    assert columns * size[0] < picture.width < (columns + 0.5) * size[0]
    assert (picture.height > 2 * size[1]) == (columns < 2 + scores)


@pytest.mark.parametrize("size", [(20, 200), (90, 300), (336, 336)])
def test_titles_and_legends_are_never_cut(size):
    """Behind the last letter there is background, however narrow the image."""
    view, title = View(gray(*size), (10, 1)), "layer 23: the CLS token's attention"
    picture = draw_views([view], [0] * 9 + [1], [torch.arange(10.0)], titles=[title] * 3, role_names=("kept",))
    pixels = np.array(picture)
    panel = (picture.width - 4 * 6) // 3
    for right in (picture.width - 6, picture.width - 12 - panel):
        assert (pixels[:, right : right + 4] == visualize._BACKGROUND).all()


def test_a_legend_s_letters_become_smaller_where_they_must():
    swatch = Image.new("RGB", (8, 8), CYAN)
    picture = visualize._with_legend(gray(176, 40), [(swatch, "1024 tokens that were merged")])
    strip = np.array(picture)[40:]
    assert picture.width == 176 and (strip[:, -1] == visualize._BACKGROUND).all() and strip.max() > 200


IMAGE, GRID, ROLES, SCORES = gray(64, 64), (2, 2), [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: draw_selection(np.zeros((8, 8, 3)), ROLES, GRID),
            TypeError,
            "image: expected a PIL image, got ndarray",
        ),
        (lambda: draw_selection(IMAGE, ROLES, (1, 2, 2)), ValueError, "frame by frame"),
        (lambda: draw_selection(IMAGE, ROLES, (0, 4)), ValueError, "grid: expected"),
        (lambda: draw_selection(IMAGE, [*ROLES, 0], GRID), ValueError, r"roles: expected shape \(4,\).*got \(5,\)"),
        (lambda: draw_selection(IMAGE, [0, 1, 2, 4], GRID), ValueError, r"roles: .*got \[0, 1, 2, 4\]"),
        (lambda: draw_selection(IMAGE, SCORES, GRID), ValueError, "roles: expected integers"),
        (lambda: draw_scores(IMAGE, torch.rand(1, 4), GRID), ValueError, r"scores: expected shape.*got \(1, 4\)"),
        (lambda: draw_scores(IMAGE, [0.1, float("nan"), 0, 0], GRID), ValueError, "scores: expected finite.* 1 that"),
        (lambda: draw_scores(IMAGE, SCORES, GRID, colormap="no"), ValueError, "colormap: .*'no'"),
        (lambda: draw_overview(IMAGE, SCORES, [1.0], ROLES, GRID), ValueError, "deep_scores: expected shape"),
        (lambda: draw_overview(IMAGE, [float("inf")] * 4, SCORES, ROLES, GRID), ValueError, "object_scores: .*finite"),
        (lambda: draw_overview(IMAGE, SCORES, SCORES, ROLES, GRID, titles=("a",)), ValueError, "titles: expected four"),
        (lambda: draw_selection(IMAGE, ROLES, GRID, role_names=("kept",)), ValueError, r"roles: .*from 0 to 1"),
        (lambda: draw_selection(IMAGE, ROLES, GRID, role_names="kept"), ValueError, "role_names: expected the names"),
        (lambda: draw_views([View(IMAGE, GRID)], ROLES, titles=("a",)), ValueError, "titles: expected 2 lines"),
        (
            lambda: draw_views([View(IMAGE, GRID)], ROLES, [SCORES, [1.0]], titles=("a",) * 4),
            ValueError,
            r"scores\[1\]: expected shape",
        ),
        (
            lambda: draw_views([View(IMAGE, GRID)] * 2, ROLES, titles=("a", "b")),
            ValueError,
            r"roles: expected shape \(8,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


RAMP = np.arange(0, 65536, 257)  # 16 bits: 0 to 65535, of which 8 bits are 0 to 255
TYPES = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "=i4"}


def wide_picture(mode, values):
    return Image.frombytes(mode, (16, len(values) // 16), values.astype(TYPES[mode]).tobytes())


@pytest.mark.parametrize("mode", TYPES)
def test_sixteen_bits_become_eight(mode):
    for offset in (-128, 0, 128):  # what rounds to the same 8 bits
        pixels = np.array(to_rgb(wide_picture(mode, np.clip(RAMP + offset, 0, 65535))))
        assert (pixels.reshape(256, 3) == np.arange(256)[:, None]).all()


@pytest.mark.parametrize("values", [RAMP - 1, RAMP + 1])
def test_more_than_sixteen_bits_are_refused(values):
    with pytest.raises(ValueError, match=rf"image: expected 0 to 65535 in mode I, got {values[0]} to {values[-1]}"):
        to_rgb(wide_picture("I", values))


@pytest.mark.parametrize(("mode", "message"), [("F", "expected integer pixels"), ("La", "a mode that converts to RGB")])
def test_modes_without_a_meaning_are_refused(mode, message):
    for function in (to_rgb, lambda image: draw_selection(image, [0], (1, 1))):
        with pytest.raises(ValueError, match=f"image: expected .*got .*{mode}") as raised:
            function(Image.new(mode, (4, 4)))
        assert message in str(raised.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_pictures_keep_their_colours(mode):
    color = {"1": (255, 255, 255), "L": (90, 90, 90)}.get(mode, (255, 0, 51))
    image = Image.new("RGB", (4, 4), color).convert(mode)
    assert image.mode == mode
    assert_close(to_rgb(image).getpixel((1, 1)), color, 6)  # HSV rounds


def two_halves(mode):
    """Left half opaque and (90, 90, 90), right half transparent over (30, 30, 30)."""
    if mode in ("RGBA", "LA", "PA", "RGBa"):
        image = Image.new("RGBA", (16, 16), (90, 90, 90, 255))
        image.paste((30, 30, 30, 0), (8, 0, 16, 16))
        if mode == "PA":  # no conversion to it keeps the alpha
            opacity, image = image.getchannel("A"), image.convert("L").convert("P")
            image.putalpha(opacity)
        return image.convert(mode)
    if mode == "I;16":
        image = wide_picture(mode, np.tile([90 * 257] * 8 + [30 * 257] * 8, 16))
        image.info["transparency"] = 30 * 257
        return image
    image = Image.new("L", (16, 16), 90)
    image.paste(30, (8, 0, 16, 16))
    image = image.convert(mode.split()[0])
    transparent = image.getpixel((15, 0))
    image.info["transparency"] = (
        bytes(0 if i == transparent else 255 for i in range(256)) if " " in mode else transparent
    )
    return image


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA", "P", "P bytes", "L", "RGB", "I;16"])
def test_what_is_transparent_is_white(mode):
    image = two_halves(mode)
    assert image.mode == mode.split()[0]
    pixels = np.array(to_rgb(image))
    assert (pixels[:, :8] == 90).all()
    assert (pixels[:, 8:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 100, 255, 51))).getpixel((0, 0)) == (204, 224, 255)


@pytest.mark.parametrize("missing", ["PIL.Image", "matplotlib"])
def test_a_missing_package_names_the_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'hiprune-kernels\[images\]'"):
        draw_scores(IMAGE, SCORES, GRID)


def test_importing_loads_neither_pil_nor_matplotlib():
    code = "import sys, hiprune_kernels.visualize; print([m for m in ('PIL', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
