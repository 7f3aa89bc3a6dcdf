from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from rarefy.evaluation.efficiency.probe import Probe, energy_counter, held_bytes
from rarefy.evaluation.efficiency.roof import Roof, measure_roof

CPU = torch.device("cpu")


@pytest.mark.skipif(not held_bytes(CPU), reason="the system does not say what a process holds")
def test_memory_rises_and_falls_with_what_is_held() -> None:
    def watched() -> None:
        """Until the probe has looked again, however long it waits for a processor."""
        taken, deadline = len(probe._samples), time.monotonic() + 60
        while len(probe._samples) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.002)

    with Probe(CPU, interval=0.002) as probe:
        watched()
        # Of its own, since an allocator may hand out what it never gave back.
        with mmap.mmap(-1, 50_000_000) as block:
            torch.frombuffer(block, dtype=torch.uint8).fill_(1)
            watched()
        watched()
    memory = probe.memory()
    held = [size for _, size in memory.timeline]
    assert 45e6 < max(held) - held[0] < 80e6 and max(held) - held[-1] > 45e6
    assert held[0] < memory.mean_bytes < memory.peak_bytes == max(held) < memory.capacity_bytes
    assert memory.utilization == memory.mean_bytes / memory.capacity_bytes
    moments = [moment for moment, _ in memory.timeline]
    assert moments == sorted(moments) and len(moments) <= 201 and moments[-1] >= 0.002 * 9


def packages(root: Path, *counts: tuple[int, int]) -> None:
    for index, (count, size) in enumerate(counts):
        folder = root / f"intel-rapl:{index}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{count}\n")
        (folder / "max_energy_range_uj").write_text(f"{size}\n")
        part = root / f"intel-rapl:{index}:0"  # the cores of a package, which it counts too
        part.mkdir(exist_ok=True)
        (part / "energy_uj").write_text("999999999\n")
        (part / "max_energy_range_uj").write_text("999999999\n")


def test_energy_of_all_packages_counts_on_when_a_counter_starts_again(tmp_path: Path) -> None:
    packages(tmp_path, (1_000_000, 5_000_000), (2_000_000, 5_000_000))
    joules = energy_counter(CPU, tmp_path)
    assert joules is not None and joules() == pytest.approx(3)
    packages(tmp_path, (4_000_000, 5_000_000), (3_000_000, 5_000_000))
    assert joules() == pytest.approx(7)
    packages(tmp_path, (500_000, 5_000_000), (3_000_000, 5_000_000))
    assert joules() == pytest.approx(8.5)


def test_a_machine_without_counters_is_asked_for_watts(tmp_path: Path) -> None:
    assert energy_counter(CPU, tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("a secret")
    assert energy_counter(CPU, tmp_path) is None
    with Probe(CPU, watts=10) as probe:
        probe._counter = None
        time.sleep(0.01)
    energy = probe.energy()
    assert energy is not None and energy.source == "modelled"
    assert energy.joules == pytest.approx(10 * probe.seconds) and probe.seconds >= 0.01


def test_the_roof_is_the_slower_of_reading_and_multiplying() -> None:
    roof = Roof(bytes_per_second=10, flops_per_second=100, dtype="float32")
    assert roof.seconds(50, 100) == 5 and roof.seconds(5, 1000) == 10
    found = measure_roof(CPU, torch.float32)
    assert found.bytes_per_second > 1e8 and found.flops_per_second > 1e8 and found.dtype == "float32"
