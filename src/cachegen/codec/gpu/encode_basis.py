"""A profile's forward transform on a device: channels to components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.basis import load_basis
from cachegen.codec.gpu.frozen import held, place_of, split_halves, upload_arena
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device, Memory
from cachegen.profile import Profile
from cachegen.types import Geometry


@dataclass(frozen=True)
class EncodeBasis:
    """Addresses of each group's statistics, for the fields of SOURCE.

    fields: by group. scales: what ``forward`` has to be multiplied by. components: of each group.
    """

    fields: tuple[dict[str, np.uint64], ...]
    scales: tuple[float, ...]
    components: tuple[int, ...]
    memory: Memory

    def describe(self, row: NDArray[Any], group: int) -> None:
        """Fill in the fields of a group's SOURCE."""
        for name, address in self.fields[group].items():
            row[name] = address
        row["forward_scale"], row["components"] = self.scales[group], self.components[group]


def encode_basis(device: Device, profile: Profile, geometry: Geometry, stream: Any) -> EncodeBasis:
    """Return a profile's forward transforms on a device; the first call for a profile uploads them.

    Raises: ProfileError if they do not fit.
    """
    key = f"forward {profile.digest.hex()} {geometry}"
    return held(device, key, lambda: _upload(device, profile, geometry, stream))


def _upload(device: Device, profile: Profile, geometry: Geometry, stream: Any) -> EncodeBasis:
    arena = plan.Arena(plan.UPLOAD)
    fields, scales, components = [], [], []
    for group in load_basis(profile, geometry).bases:
        assert group is not None
        forward = group.forward_matrix()
        high, low, scale = split_halves(np.ascontiguousarray(forward.T))
        fields.append(
            {
                "forward": arena.add(high),
                "forward_low": arena.add(low) if low.any() else np.uint64(0),
                "centre": arena.add(group.mean.astype("<f4")),
                "deviations": arena.add(group.deviation.astype("<f4")),
                "families": arena.add(group.families),
            }
        )
        scales.append(scale)
        components.append(forward.shape[1])
    memory = upload_arena(device, arena, stream)
    placed = tuple(
        {name: place_of(address, memory) for name, address in row.items()} for row in fields
    )
    return EncodeBasis(placed, tuple(scales), tuple(components), memory)
