"""The picture of the mesh is drawn from the grid's own arithmetic."""

from docs.draw_mesh import FILE, picture


def test_the_picture_is_that_of_the_grid() -> None:
    assert FILE.read_text() == picture(), "run `python -m docs.draw_mesh`"
