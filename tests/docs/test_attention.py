"""What docs/attention.md says: its table is what backends say of themselves, and its backend holds the contract."""

import re

import pytest
import torch
from hypothesis import assume, given, settings

from attention.attention import AttentionSettings
from attention.contract import Backend, Capability, Needs
from attention.core import BACKENDS, why_not
from docs.list_backends import BEGIN, END, FILE, renewed
from tests.attention.cases import Case, assert_like_reference, cases

PAGE = FILE.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page shows the records of a machine without a GPU")
def test_the_table_is_current() -> None:
    assert BEGIN in PAGE and END in PAGE
    assert renewed(PAGE) == PAGE, "run `python -m docs.list_backends`"
    assert all(f"`{name}`" in PAGE for name in BACKENDS)


@pytest.fixture(scope="module")
def written() -> Backend:
    (source,) = re.findall(r"```python\n(class Written:.*?)```", PAGE, flags=re.DOTALL)
    names = {"torch": torch, "Capability": Capability}
    exec(source, names)
    return names["Written"]()


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_backend_on_the_page_holds_the_contract(written: Backend, case: Case) -> None:
    q, k, v, *_ = case.tensors()
    assume(not why_not(written, Needs.of(q, k, v, case.mask, case.options, training=True)))
    assert_like_reference(written, case)


def test_the_settings_on_the_page_are_the_layers() -> None:
    (table,) = re.findall(r"\| `\[model\.attention\]` .*?\n\n", PAGE, flags=re.DOTALL)
    shown = set(re.findall(r"`(\w+)", "".join(line.split("|")[1] for line in table.splitlines()[2:] if line)))
    assert shown == set(AttentionSettings.model_fields) - {"norm_epsilon"}
