"""What a captured pipeline is judged by, drawn for a compile on another machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from slipcast.errors import RecipeError
from slipcast.progress import Stages
from slipcast.timing.memory import available_mb
from slipcast_compiler.capture.find import find_each
from slipcast_compiler.capture.record import TORCHS
from slipcast_compiler.estimate_program import choose_precision, original_bytes
from slipcast_compiler.host import publish
from slipcast_compiler.judge.asked import Asked
from slipcast_compiler.judge.elsewhere import RECORD, OriginalsRecord, write_originals
from slipcast_compiler.model.digests import digest
from slipcast_compiler.plan import is_captured
from slipcast_compiler.plan_checks import check_sources
from slipcast_compiler.plan_program import open_call
from slipcast_compiler.recipe.family import expand, outside
from slipcast_compiler.recipe.recipe import Recipe


def draw_elsewhere(recipe: Recipe, folder: Path, output: Path, stages: Stages) -> OriginalsRecord:
    """Make the directory `output` of a recipe whose paths are relative to `folder`: on a GPU where torch has one, in
    fp32 where that fits, else in bf16. Draws by torch's own generator, which a GPU has another one of, are of the CPU.

    RecipeError for a recipe that no captured pipeline has, ResourceError where the pipeline does not fit.
    """
    publish.check_output(output, RECORD)
    if not is_captured(recipe, folder):
        raise RecipeError(
            "originals of another machine are for captured pipelines, and this one is described",
            expected="a [call], or model.pipeline",
            hint="have it captured: --set model.pipeline=StableDiffusionPipeline, in the compile too",
        )
    with stages.stage("capture"):
        checkpoint, pipe, _, calls = open_call(recipe, folder)
        variants = find_each(pipe, calls)
        check_sources(variants[0], checkpoint.name, recipe)
    family = expand(recipe.family, recipe.name, folder) if recipe.family else None
    strangers = outside(recipe.evaluate, family, folder) if family else ()
    asked = Asked(checkpoint.root, recipe.model.pipeline, calls, family, strangers, recipe.evaluate)
    of_the_cpu = any(TORCHS in source.detail for found in variants for source in found.program.sources)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and not of_the_cpu else None
    room = min([available_mb() * 1e6, *([torch.cuda.mem_get_info()[0]] if gpu else [])])
    modules = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    precision = choose_precision(original_bytes(modules, max(found.program.live_bytes for found in variants)), room)
    with publish.workspace(output, RECORD) as made:
        with stages.stage("originals") as advance:
            source = digest(checkpoint.root, recipe.model.pipeline)
            record = write_originals(asked, precision, source, gpu, made, advance)
        publish.publish(made, output, RECORD)
    return record
