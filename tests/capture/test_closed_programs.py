"""The bundle of a captured program for a closed family: a table in place of what computes its texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny import call_of, open_pipeline

import slipcast
from slipcast.bundle.program import Program
from slipcast.errors import ArtifactError, RequestError
from slipcast.progress import SilentStages, silent
from slipcast.run.prompt_table import ClosedTable
from slipcast_compiler.capture.find import find_for
from slipcast_compiler.engines.programs import ProgramGraphs, tabulate_prompts, write_bundle
from slipcast_compiler.export.closed import PROMPT_TABLE
from slipcast_compiler.export.early import leave_loop
from slipcast_compiler.export.program import export_program
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.recipe.targets import TargetTable

PROMPTS = ("a red circle", "two small stars and a large blue square", "a star")
ABOUT = {"name": "closed", "base_model": "tiny", "source_sha256": "0" * 64, "family": None}


def bundles(name: str, folder: Path) -> dict[str, Path]:
    """The open bundle, and that for PROMPTS alone, of one export."""
    cache = Cache(folder / "cache")

    def export(out: Path) -> None:
        with quiet():
            pipe = open_pipeline(name)
            export_program(find_for(pipe, [lambda prompt: call_of(name, prompt, 1)]), pipe, out, silent)
        leave_loop(out)

    graphs = ProgramGraphs(cache.get("program", {"name": name}, export))
    made = {"open": graphs, "closed": tabulate_prompts(graphs, PROMPTS, cache, silent)}
    for kind, each in made.items():
        (folder / kind).mkdir()
        write_bundle(each, (TargetTable(engine="onnxruntime"),), ABOUT, folder / kind, cache, SilentStages())
    return {kind: folder / kind for kind in made}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("stable_diffusion_xl", {"conditioning", "denoiser_prompt"}),
        ("wan", {"conditioning"}),  # whose texts have lengths
    ],
)
def test_it_draws_what_the_open_bundle_draws(name: str, gone: set[str], tmp_path: Path) -> None:
    made = bundles(name, tmp_path)
    with slipcast.load(made["open"]) as whole, slipcast.load(made["closed"]) as closed:
        assert gone <= whole.manifest.components.keys() - closed.manifest.components.keys()
        wanted = whole(list(PROMPTS), seed=1, output_type="np").images
        np.testing.assert_array_equal(
            np.stack(closed(list(PROMPTS), seed=1, output_type="np").images), np.stack(wanted)
        )
        np.testing.assert_array_equal(closed(PROMPTS[1], seed=2, output_type="np").images[0], wanted[1])
        with pytest.raises(RequestError, match="closed family") as caught:
            closed("a red circl", seed=1)
        assert "'a red circle'" in str(caught.value)
        assert not list(made["closed"].glob("tokenizer*"))

        _refuses_another_table(made["closed"], closed.manifest.program)


def _refuses_another_table(made: Path, program: Program) -> None:
    with safe_open(made / PROMPT_TABLE, "numpy") as table:
        assert any(name.endswith(".2") for name in table.keys())  # noqa: SIM118
    assert program.closed
    more = program.model_copy(update={"closed": program.closed.model_copy(update={"prompts": (*PROMPTS, "one more")})})
    with pytest.raises(ArtifactError, match="not the table of the manifest"):
        ClosedTable(made / PROMPT_TABLE, more)
