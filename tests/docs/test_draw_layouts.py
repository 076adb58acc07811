"""The picture of layouts is the one that today's layouts and plans give."""

from docs.draw_layouts import FILE, picture


def test_the_picture_is_current() -> None:
    assert FILE.read_text() == picture(), "run `python -m docs.draw_layouts`"
