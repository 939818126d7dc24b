"""Energy of the processor packages by RAPL, where the host lets us read it; whoever else works is in it too."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Counts joules between `read` calls."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: dict[Path, tuple[int, int]] = {}
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 a part of it, which would be counted twice.
        for zone in sorted(root.glob("intel-rapl:[0-9]*")):
            if zone.name.count(":") == 1:
                try:
                    self._zones[zone] = (_number(zone / "energy_uj"), _number(zone / "max_energy_range_uj"))
                except (OSError, ValueError):
                    continue  # most hosts let only root read it

    def read(self) -> float | None:
        """Joules of all packages since the last call; None where nothing can be read."""
        if not self._zones:
            return None
        total = 0
        for zone, (last, size) in self._zones.items():
            now = _number(zone / "energy_uj")
            total += now - last if now >= last else now - last + size
            self._zones[zone] = (now, size)
        return total / 1e6


def _number(file: Path) -> int:
    return int(file.read_text("ascii"))
