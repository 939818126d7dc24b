"""Where feature caching can cut a denoiser, and where it cannot, told before there is a graph."""

from __future__ import annotations

import pytest
import torch
from tiny import call_of, open_pipeline

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.schedule.skips import check_skips


def captured(name: str) -> Program:
    with quiet():
        generator = torch.Generator("cpu").manual_seed(0)
        return capture(open_pipeline(name), {**call_of(name, "a star", 1), "generator": generator})


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion", "ddpm"])
def test_u_nets_have_skips(name: str) -> None:
    program = captured(name)
    check_skips(program, 0.9)
    with pytest.raises(RecipeError, match=r"unet has no place.+(.|\n)*at most 1%"):
        check_skips(program, 0.01)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "sana"])
def test_transformers_have_none(name: str) -> None:
    """Around a layer there is a residual, but what is left then is nearly all."""
    with pytest.raises(RecipeError, match=r"transformer has no place(.|\n)*it is for U-Nets"):
        check_skips(captured(name), 0.2)
