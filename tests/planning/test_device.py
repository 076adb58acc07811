"""The numbers of a device: those of its file, given ones, measured ones."""

import shutil
from pathlib import Path

import pytest
import tomli_w
import torch

from planning.device import EFFICIENCY, device_of, measured_product, published, this_device, with_efficiency, with_rate
from planning.device_file import FOLDER, DeviceSettings
from settings import Refusal, load, to_toml

CPU = torch.device("cpu")
FILES = sorted(FOLDER.glob("*.toml"))


def written(path: Path, **changed: object) -> Path:
    """A file of an H100 in which some keys are others, and those that are None are left out."""
    table = load(FOLDER / "h100.toml", [], DeviceSettings).model_dump(mode="json", exclude_none=True) | changed
    path.write_text(tomli_w.dumps({key: value for key, value in table.items() if value is not None}))
    return path


def test_a_device_that_is_not_here_is_known_by_name() -> None:
    assert [path.stem for path in FILES] == ["a100", "h100", "h200"]
    h100, h200 = published("h100"), published("h200")
    assert h100.rate == 989e12 * EFFICIENCY and h100.memory == 79 * 2**30 and h200.memory == 139 * 2**30
    assert h100.links.inside.bandwidth == pytest.approx(360e9) and h100.links.across.bandwidth == pytest.approx(44e9)
    assert h200.shares == h100.shares and h200.links == h100.links, "it extends the other's file"
    assert (h200.best.product, h200.best.bandwidth) == (790e12, 4.3e12) and "measured" in h200.best.source
    for name in ("h20", "H200"):
        with pytest.raises(Refusal, match=rf"--device {name}: .*h200'\?; or give a TOML file"):
            published(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_a_device_written_and_read_again_is_the_same_device(path: Path, tmp_path: Path) -> None:
    settings = load(path, [], DeviceSettings)
    (tmp_path / path.name).write_text(to_toml(settings))
    assert load(tmp_path / path.name, [], DeviceSettings) == settings
    assert published(str(tmp_path / path.name)) == published(path.stem) == device_of(settings, path.stem)
    assert settings.ceilings is not None and settings.shares is not None
    assert settings.shares.product * settings.peak < settings.ceilings.product < settings.peak
    assert settings.shares.memory * settings.bandwidth <= settings.ceilings.bandwidth < settings.bandwidth


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "h100.toml", tmp_path)
    (tmp_path / "slow.toml").write_text('extends = "h100.toml"\npeak = 800e12\n[links.across]\nbandwidth = 12.5e9\n')
    slow = published(str(tmp_path / "slow.toml"))
    assert slow.name == "slow" and slow.peak == 800e12 and slow.links.across.bandwidth == pytest.approx(11e9)
    bare = published(str(written(tmp_path / "bare.toml", shares=None, ceilings=None, dtype="fp16")))
    assert bare.shares is None and bare.rate == 0.4 * 989e12 and bare.dtype == torch.float16
    assert (bare.best.product, bare.best.bandwidth) == (989e12, 3.35e12) and "nothing measured" in bare.best.source


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"bandwith": 1e12}, r"bandwith: unknown key .*did you mean 'bandwidth'"),
        ({"peak": -1.0}, "peak=-1"),
        ({"peak": float("inf")}, "peak"),
        ({"peak": "989e12"}, "peak="),
        ({"dtype": "fp8"}, "dtype="),
        ({"memory_gib": None}, "memory_gib: is missing"),
        ({"ceilings": {"product": 990e12, "bandwidth": 1e12, "source": "x"}}, "ceilings.product=9.9e.14 is above peak"),
        ({"ceilings": {"product": 9e12, "bandwidth": 1e13, "source": "x"}}, "ceilings.bandwidth=1e.13 is above bandw"),
        ({"ceilings": {"product": 9e12, "bandwidth": 1e12}}, "ceilings.source: is missing"),
        ({"shares": {"product": 1.5, "attention": {}}}, "shares.product=1.5"),
        ({"shares": {"product": 0.5, "attention": {"flash9": 0.1}}}, "must have a share for each of flash1, flash2"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_by_name(changed: dict[str, object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=expected):
        published(str(written(tmp_path / "own.toml", **changed)))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such configuration file"):
        published(str(tmp_path / "none.toml"))


def test_a_rate_that_is_given_is_taken_as_it_is() -> None:
    device = with_rate(published("h100"), 120e12)
    assert device.rate == 120e12 and device.memory == published("h100").memory and "given" in device.source
    assert device.best.product == 120e12, "what was measured of the device says nothing of that"
    assert with_efficiency(published("h100"), 0.5).best.product == 794.5e12
    assert this_device(CPU, torch.float32, 5e9).rate == 5e9
    with pytest.raises(Refusal, match="--rate -1"):
        with_rate(device, -1)


def test_the_device_that_is_here_is_measured() -> None:
    speed = measured_product(CPU, torch.float32, 64, seconds=0.0)
    assert 1e6 < speed < 1e15
    device = this_device(CPU, torch.float32)
    assert 1e8 < device.peak < 1e15 and device.rate == device.peak * EFFICIENCY
    assert "1,024 x 1,024 in float32" in device.source and device.kind == "cpu"
    assert device.memory is not None and device.memory > 2**28
