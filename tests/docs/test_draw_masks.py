"""The picture of masks is the one that the masks make now, and its captions are the masks' own code."""

import pytest

from attention.mask import Mask
from docs.draw_masks import DOCUMENTS, FILE, PANELS, Panel, picture


def test_the_picture_is_current() -> None:
    assert FILE.read_text() == picture(), "run `python -m docs.draw_masks`"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_a_caption_makes_its_mask(panel: Panel) -> None:
    names = {"Mask": Mask, "d": DOCUMENTS, "q": panel.mask.documents, "k": panel.mask.key_documents}
    assert eval(panel.code, names) == panel.mask
