"""A few faults of each kind; `make faults` tries them all, see docs/reliability.md."""

from __future__ import annotations

import pytest
from faults import STEPS, Harness, can_mount, needs_root

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harness(base, tmp_path_factory) -> Harness:
    from conftest import write_photos

    folder = tmp_path_factory.mktemp("faults")
    return Harness(folder / "runs", base, write_photos(folder / "photos"))


@pytest.fixture(scope="module")
def lines(harness) -> int:
    return harness.lines()


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("killed_in_a_write", 100_000),
        ("killed_at_any_time", 1_500),
        ("write_fails", 100_000),
        ("full_file_system", 320),
        ("becomes_read_only", 3),
        ("loses_permission", 3),
        ("damaged_file", 0),
        ("damaged_file", 1),
        ("stopped_by_a_signal", 2),
        ("loss_goes_wrong", STEPS - 1),
    ],
)
def test_a_hurt_run_goes_on_as_if_nothing_had_been(harness, kind, detail):
    if needs_root(kind) and not can_mount():
        pytest.skip("needs root's rights: to mount a file system, to become another user")
    harness.survives(kind, detail)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9])
def test_a_run_killed_while_it_writes_goes_on_as_if_nothing_had_been(harness, lines, part):
    harness.survives("killed_at_line", int(part * lines))
