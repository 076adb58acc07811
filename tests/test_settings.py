"""A configuration is read strictly: what is wrong is refused before anything starts, by name, with the way out."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from settings import Refusal, Section, differences, load, to_toml


class Plain(Section):
    kind: Literal["plain"] = "plain"
    rate: float = 0.1


class Rich(Section):
    kind: Literal["rich"] = "rich"
    rate: float = 0.2
    steps: tuple[int, ...] = (1, 2)


class Heads(Section):
    num_heads: int = 4
    num_kv_heads: int = 2

    @model_validator(mode="after")
    def check(self) -> "Heads":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}; try 4")
        return self


class Root(Section):
    name: str = "run"
    seed: int = 0
    choice: Annotated[Plain | Rich, Field(discriminator="kind")] = Plain()
    heads: Heads = Heads()
    stages: tuple[Heads, ...] = ()
    sources: dict[str, Annotated[Plain | Rich, Field(discriminator="kind")]] = Field(default_factory=dict)
    limit: int | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_child_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    write(
        tmp_path / "parent.toml", "seed = 3\n[heads]\nnum_heads = 8\n[choice]\nkind = 'rich'\nrate = 0.5\nsteps = [7]\n"
    )
    child = write(
        tmp_path / "child.toml", "extends = 'parent.toml'\n[heads]\nnum_kv_heads = 4\n[choice]\nrate = 0.25\n"
    )
    config = load(child, [], Root)
    assert (config.seed, config.heads) == (3, Heads(num_heads=8, num_kv_heads=4))
    assert config.choice == Rich(rate=0.25, steps=(7,))


def test_another_kind_replaces_the_whole_table(tmp_path: Path) -> None:
    write(tmp_path / "parent.toml", "[choice]\nkind = 'rich'\nsteps = [7]\n")
    child = write(tmp_path / "child.toml", "extends = 'parent.toml'\n[choice]\nkind = 'plain'\n")
    assert load(child, [], Root).choice == Plain()


def test_a_table_as_override_replaces_the_whole_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "choice = { kind = 'rich', rate = 0.7, steps = [7] }\n")
    assert load(path, ["choice={kind = 'plain'}"], Root).choice == Plain()
    assert load(path, ["choice={kind = 'rich', steps = [5]}"], Root).choice == Rich(steps=(5,)), (
        "the file's rate is gone"
    )
    assert load(path, ["choice.rate=0.3"], Root).choice == Rich(rate=0.3, steps=(7,))
    with pytest.raises(Refusal, match="choice: needs a kind"):
        load(path, ["choice={rate = 0.3}"], Root)


class Optional(Section):
    limit: int | None = None
    heads: Heads | None = None
    parts: dict[str, Heads | None] = Field(default_factory=dict)
    stages: tuple["Optional", ...] = ()
    word: str = ""
    """Not left out where it is left out: it says nothing."""


def test_none_takes_back_what_may_be_left_out(tmp_path: Path) -> None:
    """On the command line and in a child, in tables and in arrays of them; no other key knows the word."""
    parent = write(tmp_path / "parent.toml", "limit = 3\n[[stages]]\nlimit = 4\nheads = { num_heads = 8 }\n")
    assert load(parent, ["stages.0.heads=none", "limit=none"], Optional) == Optional(stages=(Optional(limit=4),))
    child = write(tmp_path / "child.toml", "extends = 'parent.toml'\nlimit = 'none'\nheads = 'none'\n")
    assert load(child, [], Optional) == Optional(stages=(Optional(limit=4, heads=Heads(num_heads=8)),))
    assert load(child, ["limit=5", "word=none"], Optional).limit == 5
    assert load(child, ["word=none"], Optional).word == "none"
    with pytest.raises(Refusal, match=r'stages\.0\.heads\.num_heads="none": Input should be a valid integer'):
        load(parent, ["stages.0.heads.num_heads=none"], Optional)
    with pytest.raises(Refusal, match=r'stages="none"'):
        load(parent, ["stages=none"], Optional)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("key", ["choice.rate", "seed", "stages.0.num_heads", "no.such.key"])
def test_numbers_that_toml_does_not_have_are_refused(tmp_path: Path, key: str, number: int) -> None:
    """A float would take the largest of them for infinity, which no key allows."""
    path = write(tmp_path / "a.toml", "choice = { kind = 'plain' }\nstages = [{}]\n")
    with pytest.raises(Refusal, match=rf"a\.toml: {key}=.*: is beyond 64 bits; use a smaller number"):
        load(path, [f"{key}={number}"], Root)


def test_thousands_of_digits_are_refused_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"long\.toml: not valid TOML"):
        load(write(tmp_path / "long.toml", f"seed = {'9' * 5000}"), [], Root)
    with pytest.raises(Refusal, match=r'seed="999.*: Input should be a valid integer'):
        load(write(tmp_path / "a.toml", ""), [f"seed={'9' * 5000}"], Root)


def test_what_is_wrong_between_sections_names_the_file_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "num_heads = 3")
    with pytest.raises(Refusal, match=rf"^{re.escape(str(path))}: num_heads=3 must be divisible by num_kv_heads=2"):
        load(path, [], Heads)


def test_overrides_reach_into_tables_arrays_and_new_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[[stages]]\nnum_heads = 2\n")
    overrides = ["stages.0.num_heads=6", "sources.web.kind=rich", "sources.web.steps=[5]", "name=my run", "limit=9"]
    config = load(path, overrides, Root)
    assert config.stages == (Heads(num_heads=6),)
    assert config.sources == {"web": Rich(steps=(5,))}
    assert (config.name, config.limit) == ("my run", 9)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heads.num_haeds=4", "heads.num_haeds: unknown key (value 4); did you mean 'num_heads'?"),
        ("choice.stepz=4", "choice.stepz: unknown key (value 4)"),
        ("stages=[{num_head=4}]", "stages.0.num_head: unknown key (value 4); did you mean 'num_heads'?"),
        ("seed=1.5", "seed=1.5: Input should be a valid integer"),
        ("seed='1'", 'seed="1": Input should be a valid integer'),
        ("choice.rate=true", "choice.rate=true: Input should be a valid number"),
        ("choice.rate=nan", "choice.rate=NaN"),
        ("heads.num_heads=3", "heads: num_heads=3 must be divisible by num_kv_heads=2; try 4"),
        ("choice.kind=ritch", "choice.kind: unknown kind 'ritch'; did you mean 'rich'?"),
        ("sources.web.rate=1.0", "sources.web: needs a kind; known: plain, rich"),
        ("stages.4.num_heads=1", "'4' must be a number below 0"),
        ("stages.²=1", "'²' must be a number below 0"),
        ("seed", "write section.key=value"),
        ("seed.deeper=1", "seed is a value, not a table"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path / "a.toml", "stages = []\nseed = 1\nchoice = { kind = 'plain' }\n")
    with pytest.raises(Refusal) as refusal:
        load(path, [override], Root)
    assert expected in str(refusal.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "quickstart.toml", "seed = 1")
    with pytest.raises(Refusal, match="did you mean 'quickstart"):
        load(tmp_path / "quikstart.toml", [], Root)
    with pytest.raises(Refusal, match="not valid TOML"):
        load(write(tmp_path / "bad.toml", "seed = = 1"), [], Root)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(Refusal, match="not UTF-8 at byte 8"):
        load(tmp_path / "latin.toml", [], Root)
    write(tmp_path / "one.toml", "extends = 'two.toml'")
    with pytest.raises(Refusal, match="extends itself"):
        load(write(tmp_path / "two.toml", "extends = 'one.toml'"), [], Root)


def test_odd_paths_and_dates_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    with pytest.raises(Refusal, match=r"loop\.toml"):
        load(tmp_path / "loop.toml", [], Root)
    with pytest.raises(Refusal, match="aaa"):
        load("a" * 5000, [], Root)
    with pytest.raises(Refusal, match=r"seed=.*2020-01-01"):
        load(write(tmp_path / "date.toml", "seed = 2020-01-01"), [], Root)


@given(
    st.builds(
        Root,
        name=st.text(max_size=8),
        seed=st.integers(0, 2**40),
        choice=st.builds(Rich, rate=st.floats(-1e6, 1e6), steps=st.lists(st.integers(0, 9)).map(tuple))
        | st.just(Plain()),
        stages=st.lists(st.builds(Heads, num_heads=st.sampled_from([2, 4, 8]))).map(tuple),
        sources=st.dictionaries(st.text("abc.", min_size=1, max_size=3), st.builds(Plain), max_size=2),
        limit=st.none() | st.integers(0, 9),
    )
)
def test_the_resolved_file_loads_to_the_same_tree(tmp_path_factory: pytest.TempPathFactory, config: Root) -> None:
    path = write(tmp_path_factory.mktemp("toml") / "resolved.toml", to_toml(config))
    assert load(path, [], Root) == config
    assert differences(config, config) == []


def test_differences_name_the_keys() -> None:
    old, new = Root(stages=(Heads(),)), Root(stages=(Heads(num_heads=6),), limit=4)
    assert differences(old, new) == ["stages.0.num_heads: 4 -> 6", "limit: (left out) -> 4"]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Root().seed = 1  # type: ignore[misc]


class Sources(Section):
    sources: dict[str, Annotated[Plain | Rich, Field(discriminator="kind")]] = Field(default_factory=dict)
    stages: tuple[Heads, ...] = Field(min_length=1)


def test_an_entry_may_be_called_like_a_key_of_what_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "stages = [{}]\n[sources.steps]\nrate = 0.5\n")
    with pytest.raises(Refusal, match=r"sources\.steps: needs a kind; known: plain, rich"):
        load(path, [], Sources)
    with pytest.raises(Refusal, match=r"sources\.steps\.stepz: unknown key \(value 1\); did you mean 'steps'"):
        load(path, ["sources.steps={kind='rich', stepz=1}"], Sources)


def test_an_array_that_lacks_items_because_one_is_wrong_is_not_called_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "stages = [{ num_heads = 'x' }]\n")
    with pytest.raises(Refusal) as refusal:
        load(path, [], Sources)
    assert str(refusal.value).count("\n") == 0 and "stages.0.num_heads" in str(refusal.value)
    with pytest.raises(Refusal, match=r"stages=\[\]: .*at least 1 item"):
        load(path, ["stages=[]"], Sources)
