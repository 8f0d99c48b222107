"""Image folders and the decoder, against pixels that Pillow or NumPy computed on another way."""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from vaefeat.data import load_rows
from vaefeat.errors import InputError
from vaefeat.image_decoding import Reference, decode_image
from vaefeat.images import decode_images

EXIF_ORIENTATION = 0x0112


def _noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def _save(path: Path, pixels: NDArray[Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _decode_one(encoded: bytes, image_size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    (row,) = decode_images([("it", encoded)], count=1, image_size=image_size).array
    return np.asarray(row)


def test_flat_folder_of_colour_pngs_is_read_in_sorted_order(tmp_path: Path) -> None:
    images = {f"{name}.png": _noise(4, 6, seed=seed) for seed, name in enumerate("cab")}
    for name, pixels in images.items():
        _save(tmp_path / name, pixels)
    rows = load_rows(tmp_path)
    assert rows.array.dtype == np.uint8
    np.testing.assert_array_equal(rows.array, [images[f"{name}.png"].transpose(2, 0, 1) for name in "abc"])
    assert (rows.labels, rows.names, rows.source) == (None, None, str(tmp_path))


def test_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    pixels = _noise(4, 6, 1)
    _save(tmp_path / "a.png", pixels)
    Image.fromarray(pixels > 127).save(tmp_path / "b.png")  # one bit a pixel
    rows = load_rows(tmp_path)
    np.testing.assert_array_equal(rows.array[:, 0], [pixels, np.where(pixels > 127, 255, 0)])


def test_folder_of_grey_and_late_colour_images_is_widened_to_rgb(tmp_path: Path) -> None:
    # More than one block of the decoder, so that many rows are already there when the first colour image comes.
    grey = [_noise(3, 5, 1, seed) for seed in range(70)]
    colour = _noise(3, 5, 3)
    for index, pixels in enumerate(grey):
        _save(tmp_path / f"{index:03}.png", pixels)
    _save(tmp_path / "050-colour.png", colour)
    rows = load_rows(tmp_path)
    expected = [np.stack([pixels] * 3) for pixels in grey]
    expected.insert(50, colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(rows.array, expected)


def test_jpeg_and_webp_are_decoded_like_pillow_does(tmp_path: Path) -> None:
    _save(tmp_path / "a.JPG", _noise(8, 8), quality=90)
    _save(tmp_path / "b.jpeg", _noise(8, 8, seed=1), quality=90)
    _save(tmp_path / "c.webp", _noise(8, 8, seed=2))
    (tmp_path / "notes.txt").write_text("not an image")
    rows = load_rows(tmp_path)
    for row, name in enumerate(("a.JPG", "b.jpeg", "c.webp")):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(rows.array[row], np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_class_folders_give_labels_and_names(tmp_path: Path) -> None:
    for seed, name in enumerate(("dog/b.png", "cat/deep/a.png", "cat-like/a.png", "dog/a.png")):
        _save(tmp_path / name, _noise(2, 2, seed=seed))
    (tmp_path / "empty").mkdir()
    rows = load_rows(tmp_path)
    assert rows.names == ("cat", "cat-like", "dog")
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 2, 2]
    np.testing.assert_array_equal(rows.array[2], _noise(2, 2, seed=3).transpose(2, 0, 1))


def test_folder_with_an_image_outside_the_classes_has_no_labels(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/a.png", "stray.png"):
        _save(tmp_path / name, _noise(2, 2))
    rows = load_rows(tmp_path)
    assert (len(rows), rows.labels, rows.names) == (3, None, None)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", ".thumbnails/a.png", "sub/._b.png"):
        _save(tmp_path / name, _noise(2, 2))
    assert len(load_rows(tmp_path)) == 1


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    _save(tmp_path / "elsewhere" / "1.png", _noise(2, 2))
    _save(tmp_path / "rows" / "ant" / "1.png", _noise(2, 2))
    (tmp_path / "rows" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "ant" / "up").symlink_to(tmp_path / "rows")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "rows" / "bee")
    rows = load_rows(tmp_path / "rows")
    assert rows.names == ("ant", "bee")
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1]


def test_train_and_test_folders_share_the_classes_of_train(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "test/cow/1.png"):
        _save(tmp_path / name, _noise(2, 2))
    train, test = load_rows(tmp_path), load_rows(tmp_path, split="test")
    assert train.names == test.names == ("ant", "bee", "cow")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2]
    # Numbered on its own, the cow of the test split would be class 0, the ant.
    assert test.labels is not None
    assert test.labels.tolist() == [2]
    assert load_rows(tmp_path / "test").names == ("cow",)


def test_test_folder_with_an_unknown_class_is_refused(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "test/ant/1.png", "test/emu/1.png"):
        _save(tmp_path / name, _noise(2, 2))
    with pytest.raises(InputError, match=r"with the classes emu, wanted only those of .*train: ant;"):
        load_rows(tmp_path, split="test")


def test_test_folder_beside_an_unlabelled_train_folder_keeps_its_own_classes(tmp_path: Path) -> None:
    for name in ("train/1.png", "test/ant/1.png", "test/emu/1.png"):
        _save(tmp_path / name, _noise(2, 2))
    assert load_rows(tmp_path).labels is None
    assert load_rows(tmp_path, split="test").names == ("ant", "emu")


def test_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "train" / "1.png", _noise(2, 2))
    with pytest.raises(InputError, match=r"sub-folder train/ only, wanted test/ for split='test'"):
        load_rows(tmp_path, split="test")
    with pytest.raises(InputError, match="has no splits"):
        load_rows(tmp_path / "train", split="test")


def test_max_rows_takes_the_first_files_and_opens_no_other(tmp_path: Path) -> None:
    for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
        _save(tmp_path / name, _noise(2, 2))
    (tmp_path / "bee" / "2.png").write_bytes(b"damaged")
    rows = load_rows(tmp_path, max_rows=3)
    assert rows.labels is not None
    assert (rows.labels.tolist(), rows.names) == ([0, 0, 1], ("ant", "bee"))


def test_mixed_sizes_name_two_files_and_offer_image_size(tmp_path: Path) -> None:
    for name, size in (("a.png", (4, 6)), ("b.png", (4, 6)), ("c.png", (6, 4))):
        _save(tmp_path / name, _noise(*size))
    wanted = f"{tmp_path / 'a.png'} is 4 high and 6 wide, {tmp_path / 'c.png'} is 6 high and 4 wide; wanted one size"
    with pytest.raises(InputError, match=re.escape(wanted) + r".*image_size=\(height, width\)"):
        load_rows(tmp_path, on_error="skip")


def test_mixed_sizes_are_found_before_the_pixels_are_decoded(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", _noise(4, 4))
    content = _encoded(Image.fromarray(_noise(64, 64)))
    (tmp_path / "b.png").write_bytes(content[:200])  # the header is whole, the pixels are not
    with pytest.raises(InputError, match="different sizes"):
        load_rows(tmp_path)


@pytest.mark.parametrize(("image_size", "shape"), [((5, 8), (5, 8)), (6, (6, 6)), ([7, 3], (7, 3))])
def test_image_size_resizes_every_image_to_height_and_width(tmp_path: Path, image_size: Any, shape: Any) -> None:
    _save(tmp_path / "a.png", np.full((20, 30, 3), 77, np.uint8))
    _save(tmp_path / "b.png", np.full((3, 2), 200, np.uint8))
    rows = load_rows(tmp_path, image_size=image_size)
    assert rows.array.shape == (2, 3, *shape)
    assert (rows.array[0] == 77).all()
    assert (rows.array[1] == 200).all()


def test_image_size_shrinking_averages_what_lies_between() -> None:
    # A fine chequerboard: without antialiasing the result is black and white, with it grey.
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = _decode_one(_encoded(Image.fromarray(board)), image_size=(8, 8))
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_palette_and_cmyk_become_rgb() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(_decode_one(_encoded(palette))[:, 0].T, [[10, 20, 30], [200, 100, 50]])
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow are red
    red = _decode_one(_encoded(cmyk, "JPEG", quality=95))
    assert red.shape == (3, 8, 8)
    np.testing.assert_allclose(red.reshape(3, -1).mean(axis=1), [255, 0, 0], atol=3)


def test_alpha_is_laid_on_white() -> None:
    half_black = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    invisible_red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    np.testing.assert_array_equal(_decode_one(_encoded(half_black)).ravel(), [127] * 3)
    np.testing.assert_array_equal(_decode_one(_encoded(invisible_red)).ravel(), [255] * 3)


def test_grey_with_alpha_stays_one_channel() -> None:
    image = Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(_decode_one(_encoded(image)), [[[40, 255]]])


@pytest.mark.parametrize("settings", [{"lossless": True}, {"quality": 80}, {"quality": 30}])
def test_webp_of_grey_is_grey_where_rows_are(settings: dict[str, Any], tmp_path: Path) -> None:
    grey = _noise(16, 16, 1)
    encoded = _encoded(Image.fromarray(grey).convert("RGB"), "WEBP", **settings)
    row = decode_image(encoded, name="one", shape=(1, 16, 16))
    if "lossless" in settings:
        np.testing.assert_array_equal(row[0], grey)
    # In training as in the service; where nothing says that rows are grey, it is what it says it is.
    reference = Reference("first.png", (16, 16), 1)
    np.testing.assert_array_equal(decode_images([("one", encoded)], count=1, reference=reference).array[0], row)
    assert decode_images([("one", encoded)], count=1).array.shape == (1, 3, 16, 16)


def test_a_tint_in_one_pixel_is_colour() -> None:
    pixels = np.stack([_noise(16, 16, 1)] * 3, axis=-1)
    pixels[3, 4] = (100, 102, 100)
    with pytest.raises(InputError, match="one in colour, wanted grey"):
        decode_image(_encoded(Image.fromarray(pixels)), name="one", shape=(1, 16, 16))


def test_transparent_palette_entry_is_laid_on_white() -> None:
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    np.testing.assert_array_equal(_decode_one(_encoded(palette, transparency=0)).ravel(), [255] * 3)


def test_sixteen_bit_grey_keeps_the_high_byte() -> None:
    deep = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    np.testing.assert_array_equal(_decode_one(_encoded(Image.fromarray(deep))), [[[0, 0, 1, 0x12, 255]]])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    row = _decode_one(_encoded(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif, quality=100))
    np.testing.assert_allclose(row[0].astype(int), upright, atol=3)


@pytest.mark.parametrize("place", ["XML:com.adobe.xmp", "Raw profile type exif", "JPEG", "WEBP"])
def test_orientation_that_only_xmp_or_a_text_tells_is_applied_as_pillow_does(place: str) -> None:
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    lying = Image.fromarray(_noise(4, 6))
    if place in ("JPEG", "WEBP"):
        content = _encoded(lying, place, xmp=xmp.encode())
    else:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        profile = exif.tobytes()
        texts = PngInfo()
        texts.add_itxt(place, xmp if "xmp" in place else f"\nexif\n{len(profile):8}\n{profile.hex()}\n")
        content = _encoded(lying, "PNG", pnginfo=texts)
    row = _decode_one(content)
    with Image.open(BytesIO(content)) as image:
        turned = ImageOps.exif_transpose(image)
    assert row.shape == (3, 6, 4)
    np.testing.assert_array_equal(row, np.asarray(turned.convert("RGB")).transpose(2, 0, 1))


def test_exif_orientation_decides_whether_sizes_are_mixed() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    lying, standing = Image.new("RGB", (6, 4)), Image.new("RGB", (4, 6))
    turned = _encoded(standing, "JPEG", exif=exif)
    rows = decode_images([("a", _encoded(lying)), ("b", turned)], count=2)
    assert rows.array.shape == (2, 3, 4, 6)
    with pytest.raises(InputError, match="a is 6 high and 4 wide, b is 4 high and 6 wide"):
        decode_images([("a", _encoded(standing)), ("b", turned)], count=2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated_image_is_refused(tmp_path: Path, kind: str) -> None:
    frames = [Image.fromarray(_noise(4, 4, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / f"a.{kind.lower()}", kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"unreadable image .*animated"):
        load_rows(tmp_path)


def test_photo_with_a_second_picture_behind_it_gives_the_first(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(load_rows(tmp_path).array[0].reshape(3, -1).mean(axis=1), [254, 0, 0], atol=2)


def test_other_format_under_an_image_name_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", "BMP")
    with pytest.raises(InputError, match=r"unreadable image .*a\.png .*cannot identify"):
        load_rows(tmp_path)


@pytest.mark.parametrize("filters", ["error", "ignore"])
@pytest.mark.parametrize("limit", [60, 20])  # Pillow warns above its limit and raises above twice as much
def test_decompression_bomb_is_refused_whatever_the_warning_filters(
    tmp_path: Path, filters: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path / "big.png", _noise(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(filters, Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=r"unreadable image .*big\.png \(.*64 pixels"):
            load_rows(tmp_path)


def _folder_with_damage(folder: Path) -> None:
    for seed in range(5):
        _save(folder / "ant" / f"{seed}.png", _noise(8, 8, seed=seed))
        _save(folder / "bee" / f"{seed}.png", _noise(8, 8, seed=seed + 5))
    content = (folder / "ant" / "1.png").read_bytes()
    (folder / "ant" / "1.png").write_bytes(content[: len(content) // 2])
    (folder / "bee" / "0.png").write_bytes(b"")
    (folder / "bee" / "4.png").unlink()
    (folder / "bee" / "4.png").symlink_to(folder / "nowhere.png")


def test_unreadable_image_is_named_with_the_reason(tmp_path: Path) -> None:
    _folder_with_damage(tmp_path)
    with pytest.raises(
        InputError, match=rf"unreadable image {tmp_path}/ant/1\.png \(.*truncated.*remove it.*on_error='skip'"
    ):
        load_rows(tmp_path)


def test_unreadable_images_are_skipped_and_reported_on_request(tmp_path: Path) -> None:
    _folder_with_damage(tmp_path)
    rows = load_rows(tmp_path, on_error="skip")
    assert rows.skipped == tuple(str(tmp_path / name) for name in ("ant/1.png", "bee/0.png", "bee/4.png"))
    kept = [0, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(rows.array, [_noise(8, 8, seed=seed).transpose(2, 0, 1) for seed in kept])
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_folder_without_a_readable_image_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index:02}.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"got 40 images of which none can be read \(first: .*00\.png\)"):
        load_rows(tmp_path, on_error="skip")


def test_decode_images_takes_no_more_items_than_it_can_work_on() -> None:
    encoded = _encoded(Image.fromarray(_noise(2, 2)))
    taken = 0

    def items() -> Any:
        nonlocal taken
        for index in range(5000):
            taken += 1
            yield str(index), b"damaged" if index == 100 else encoded

    with pytest.raises(InputError, match="unreadable image 100 "):
        decode_images(items(), count=5000)
    # 4 blocks of 32 lead to the damaged one; at most two for each of at most 8 threads are under way.
    assert taken <= (4 + 2 * 8) * 32


def test_image_folder_refuses_columns(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", _noise(2, 2))
    with pytest.raises(InputError, match=r"got columns for .* they apply to Parquet only"):
        load_rows(tmp_path, columns=["a"])
