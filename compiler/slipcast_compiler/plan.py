"""What a compile will do and need, before it does it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from slipcast.bundle.manifest import ImageGeometry, Sampling
from slipcast.engines import ENGINES
from slipcast.errors import HostError, RecipeError
from slipcast.run.guard import NEIGHBOURS
from slipcast.sampling.samplers import find_sampler
from slipcast_compiler.capture.lora import with_adapters
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.judges import check_judges
from slipcast_compiler.judge.originals import Evaluation
from slipcast_compiler.model.agreement import check_agreement
from slipcast_compiler.model.architectures import is_known
from slipcast_compiler.model.check import check_components, check_configs, check_tokenizers
from slipcast_compiler.model.checkpoint import Checkpoint, Tokenizer, locate, open_checkpoint, read_tokenizer
from slipcast_compiler.model.original import Drawing, Original, Prompts
from slipcast_compiler.model.scheduler import read_process, refuse, usual_schedule, with_options
from slipcast_compiler.passes import DescribedTask
from slipcast_compiler.passes.recover import split
from slipcast_compiler.profile.profile import calibration_drawing
from slipcast_compiler.recipe.family import Family, expand
from slipcast_compiler.recipe.recipe import GuardTable, Recipe
from slipcast_compiler.recipe.sampling import ReferenceTable
from slipcast_compiler.recipe.seeds import CALIBRATION
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.schedule.checks import check_caching, check_early_exit, check_timesteps

DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_GUIDANCE = "dpmpp_2m", 20, 5.0
MOST_GUARDED = 4096
RESOLVED = "resolved.json"
FEW_STEPS = 4  # of a checkpoint that was distilled to few, without guidance


@dataclass(frozen=True)
class Plan:
    """A recipe with everything that it leaves open resolved against its checkpoint. `sampling` is the bundle's.

    Stages are not given a plan: its properties below are what each of them needs.
    """

    recipe: Recipe
    folder: Path
    original: Original
    family: Family | None  # None for an unconditional model
    sampling: Sampling
    reference: Sampling  # of the original that the bundle is judged against: guidance at every step, no schedule found
    out_of_family: tuple[str, ...] = ()  # judged too, one image each, but not by the gate

    @property
    def checkpoint(self) -> Checkpoint:
        """The original's."""
        return self.original.checkpoint

    @property
    def measuring(self) -> Sampling:
        """The sampling of what is measured on the denoiser: guidance in every evaluation, as it needs both branches."""
        chosen = self.reference if self.recipe.profile.sampling == "reference" else self.sampling
        return chosen.model_copy(update={"guidance_interval": None, "guidance_reuse": 0})

    @property
    def task(self) -> DescribedTask:
        """What passes rewrite the denoiser for."""
        drawing = calibration_drawing(self.original, self.measuring, self.family, self.recipe.profile)
        guided = self.family is not None and self.sampling.guidance_scale > 1
        return DescribedTask(drawing, self.recipe.targets[0], guided, self.recipe.profile.batch)

    @property
    def evaluation(self) -> Evaluation:
        """What the bundle is judged on."""
        recipe, family = self.recipe, self.family
        return Evaluation(
            self.original,
            self.reference,
            self.held_out,
            self.out_of_family,
            family.calibration + family.held_out if family else (),
            recipe.evaluate,
            recipe.gate,
            self.folder,
        )

    @property
    def held_out(self) -> Prompts:
        """The held-out prompts that the gate is measured on, one image each."""
        count = self.recipe.evaluate.images
        return self.family.held_out[:count] if self.family else (None,) * count

    @property
    def closed_prompts(self) -> tuple[str, ...]:
        """All prompts that the bundle takes, the empty negative one first; none of an open family, which takes any."""
        if not (self.family and self.family.closed):
            return ()
        return tuple(dict.fromkeys(("", *self.family.calibration, *self.family.held_out)))

    @property
    def guarded_prompts(self) -> tuple[str, ...]:
        """The calibration prompts that a guard compares others with."""
        return guarded_prompts(self.family)

    @property
    def not_shipped(self) -> tuple[str, ...]:
        """The components that a table takes the place of: the text encoders, for a closed family."""
        return tuple(text.component for text in self.checkpoint.architecture.text) if self.closed_prompts else ()

    def drawing(self, count: int) -> Drawing:
        """Images of the first `count` calibration prompts, as the bundle samples."""
        prompts: Prompts = self.family.calibration[:count] if self.family else (None,) * count
        return Drawing(self.original, self.sampling, prompts, CALIBRATION.take(len(prompts)))


@dataclass(frozen=True)
class Resolved:
    """What a recipe and its checkpoint say together, once they were found to fit: the dimensions that are known, the
    tokenizers by folder, and both samplings in full."""

    image: ImageGeometry
    sizes: Mapping[str, int]
    tokenizers: Mapping[str, Tokenizer]
    sampling: Sampling
    reference: Sampling


def _check_described(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """RecipeError for what is for captured pipelines alone."""
    table = recipe.evaluate
    asked = {"[adapters]": recipe.adapters, "evaluate.original": table.original, "evaluate.originals": table.originals}
    for name in [name for name, value in asked.items() if value]:
        raise RecipeError(
            f"{name} is for captured pipelines, and {checkpoint.name} is one that is described",
            expected=f"a recipe without {name}",
            hint="have it captured: name its pipeline, such as --set model.pipeline=StableDiffusionPipeline",
        )


def make_plan(recipe: Recipe, folder: Path, cache: Cache | None = None) -> Plan:
    """Resolve a recipe (whose paths are relative to `folder`); with a `cache`, what is asked of the checkpoint once.

    RecipeError where it and its checkpoint contradict, HostError where an engine it names is not installed.
    """
    check_targets(recipe.targets)
    checkpoint = open_checkpoint(recipe.model, folder)
    _check_described(recipe, checkpoint)
    if recipe.lora:
        checkpoint = Checkpoint(*with_adapters(recipe, folder, checkpoint.root, checkpoint.name))
    if bool(checkpoint.architecture.text) != bool(recipe.family):
        raise RecipeError(
            f"{checkpoint.name} takes {'a prompt' if checkpoint.architecture.text else 'no prompts'}",
            expected="a [family]" if checkpoint.architecture.text else "a recipe without [family]",
        )
    for source in checkpoint.architecture.components.values():
        checkpoint.weights(source.folder)  # reads headers only: what is missing or damaged is found now
    found = _resolved_before(recipe, checkpoint, cache) if cache else _resolve(recipe, checkpoint)
    family = expand(recipe.family, recipe.name, folder) if recipe.family else None
    image = found.image
    strangers = check_judges(recipe.evaluate, family, [(image.width, image.height)], folder)
    _check_sampling(recipe, checkpoint, found.sampling)
    original = Original(checkpoint, image, found.sizes, found.tokenizers)
    plan = Plan(recipe, folder, original, family, found.sampling, found.reference, strangers)
    check_guard(recipe.guard, plan.guarded_prompts)
    if recipe.passes.recover:
        split(plan.task.images)
    if recipe.caching:
        check_caching(recipe.caching, found.sampling)
    return plan


def _resolved_before(recipe: Recipe, checkpoint: Checkpoint, cache: Cache) -> Resolved:
    """As _resolve, from the cache: torch and diffusers, which it asks, take seconds to import."""
    given = recipe.model_dump(mode="json", include={"sampling", "reference", "decode"})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    record = TypeAdapter(Resolved)

    def build(out: Path) -> None:
        (out / RESOLVED).write_bytes(record.dump_json(_resolve(recipe, checkpoint)))

    entry = cache.get("resolved", {"source": checkpoint.sha256, "recipe": given, "versions": versions}, build)
    return record.validate_json((entry / RESOLVED).read_bytes())


def _resolve(recipe: Recipe, checkpoint: Checkpoint) -> Resolved:
    """RecipeError where they contradict, or where a component is not what its architecture says."""
    check_configs(checkpoint)
    image = _geometry(recipe, checkpoint)
    sampling = _sampling(recipe.sampling, checkpoint)
    _check_sampling(recipe, checkpoint, sampling)
    reference = _sampling(recipe.asked_of_original(), checkpoint)
    original = _original(checkpoint, image)
    check_tokenizers(original)
    check_components(original)
    for each in (reference, sampling):
        check_agreement(each, checkpoint.scheduler)
    return Resolved(image, original.sizes, original.tokenizers, sampling, reference)


def is_captured(recipe: Recipe, folder: Path) -> bool:
    """Whether a recipe is for a pipeline that is captured: of its own, with a [call], or one that nothing describes."""
    if recipe.model.pipeline or recipe.call:
        return True
    root, _ = locate(recipe.model, folder)
    return root.is_dir() and not is_known(str(Checkpoint(root, "").index.get("_class_name")))


def check_targets(tables: tuple[TargetTable, ...]) -> None:
    """HostError where an engine cannot be built here, or where none of them can run."""
    kinds = {target.engine: ENGINES[target.engine] for target in tables}
    for engine, kind in kinds.items():
        if not kind.can_build():
            raise HostError(f"target {engine} cannot be built here", hint=kind.why_not())
    if not any(kind.available() for kind in kinds.values()):
        raise HostError(
            "none of the recipe's targets can run here, so that no picture could be judged", got=", ".join(kinds),
            expected="at least one that can", hint='add one: [[targets]] engine = "onnxruntime"',
        )  # fmt: skip


def _original(checkpoint: Checkpoint, image: ImageGeometry) -> Original:
    """The checkpoint at this size, with the dimensions that are known."""
    tokenizers = {text.tokenizer: read_tokenizer(checkpoint, text.tokenizer) for text in checkpoint.architecture.text}
    _, height, width = image.latent_shape
    sizes = {**checkpoint.sizes, "latent_height": height, "latent_width": width}
    for tokenizer in tokenizers.values():  # which may stop before its encoder would
        sizes["text_length"] = min(sizes["text_length"], tokenizer.length)
    return Original(checkpoint, image, sizes, tokenizers)


def replan(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of a recipe that differs in sampling, caching, passes and precisions alone; RecipeError where they
    contradict."""
    sampling = _sampling(recipe.sampling, plan.checkpoint)
    _check_sampling(recipe, plan.checkpoint, sampling)
    reference = _sampling(recipe.asked_of_original(), plan.checkpoint)
    changed = dataclasses.replace(plan, recipe=recipe, sampling=sampling, reference=reference)
    if recipe.caching:
        check_caching(recipe.caching, sampling)
    return changed


def guarded_prompts(family: Family | None) -> tuple[str, ...]:
    """The calibration prompts that a guard compares others with: no more, as all of them are compared in pairs."""
    return family.calibration[:MOST_GUARDED] if family else ()


def check_guard(guard: GuardTable | None, prompts: Sequence[str]) -> None:
    """RecipeError where there are too few calibration prompts to tell so rare a distance from."""
    if not guard:
        return
    needed = max(NEIGHBOURS + 1, math.ceil(1 / guard.false_alarms - 1e-9) - 1)
    if len(prompts) < needed:
        raise RecipeError(
            f"guard.false_alarms = {guard.false_alarms:g}: the family is too small for a threshold",
            expected=f"{needed} calibration prompts", got=len(prompts),
            hint="add prompts, or allow more false alarms",
        )  # fmt: skip


def _geometry(recipe: Recipe, checkpoint: Checkpoint) -> ImageGeometry:
    denoiser = checkpoint.config(checkpoint.architecture.components["denoiser"].folder)
    native_width, native_height = checkpoint.native_size
    width, height = recipe.sampling.width or native_width, recipe.sampling.height or native_height
    # The denoiser halves the latent once per level, and joins what it doubles again with what it had.
    multiple = checkpoint.factor * 2 ** (len(denoiser["block_out_channels"]) - 1)
    for name, value in (("width", width), ("height", height)):
        if value % multiple:
            raise RecipeError(
                f"sampling.{name} does not fit the model", expected=f"a multiple of {multiple}", got=value
            )
    decoder = checkpoint.config("vae") if "vae_decoder" in checkpoint.architecture.components else {}
    # diffusers' pipelines for these models do not look at shift_factor
    return ImageGeometry(
        width=width, height=height, channels=denoiser["in_channels"], factor=checkpoint.factor,
        scaling_factor=decoder.get("scaling_factor") or 1.0, shift_factor=0.0,
        tile=recipe.decode.tile, overlap=recipe.decode.overlap,
    )  # fmt: skip


def _sampling(asked: ReferenceTable, checkpoint: Checkpoint) -> Sampling:
    """The schedule in full, tried out once, so that a run can only fail on what it asks for itself."""
    explicit = asked.timesteps or (asked.sigmas and asked.sigmas[:-1])
    few_step, prompted = checkpoint.few_step_sampler, bool(checkpoint.architecture.text)
    base, config = asked.sampler or few_step or DEFAULT_SAMPLER, checkpoint.scheduler
    process, sampler = read_process(config, base, prompted), with_options(config, base)
    scale = asked.guidance_scale
    if scale is None:
        scale = DEFAULT_GUIDANCE if prompted and not few_step else 1.0
    if asked.eta and find_sampler(sampler).eta is None:
        raise RecipeError(f"eta belongs to the sampler ddim, not to {sampler}", expected="no eta", got=asked.eta)
    schedule = None if explicit else asked.schedule or usual_schedule(config, base)
    sampling = Sampling(
        sampler=sampler, schedule=schedule, timesteps=asked.timesteps,
        sigmas=asked.sigmas, guidance_scale=scale, guidance_rescale=asked.guidance_rescale or 0.0,
        steps=len(explicit) if explicit else asked.steps or (FEW_STEPS if few_step else DEFAULT_STEPS),
        guidance_interval=getattr(asked, "guidance_interval", None), eta=asked.eta or 0.0,
        guidance_reuse=getattr(asked, "guidance_reuse", 0), noise=process,
    )  # fmt: skip
    _check_scheduler(sampling)
    return sampling


def _check_scheduler(sampling: Sampling) -> None:
    """RecipeError where the scheduler's config and the rest of the sampling make pictures that diffusers does not."""
    last = sampling.lay().timesteps[-1]
    if "variance_type=fixed_large" in sampling.sampler and last != 0:
        raise refuse(
            "variance_type", "fixed_small, or timesteps that end at 0", "fixed_large", "ddpm",
            f"diffusers adds noise after the last step, at timestep {last:g}",
        )  # fmt: skip
    if sampling.noise.keeps_noise and sampling.eta:
        raise refuse("clip_sample", "false, or no eta", True, "ddim", "clipped pictures and eta are not drawn together")


def _check_sampling(recipe: Recipe, checkpoint: Checkpoint, sampling: Sampling) -> None:
    """RecipeError for what this sampling has no use for."""
    why = " (it is distilled to few steps)" if checkpoint.few_step_sampler else ""
    if sampling.requires and sampling.guidance_scale <= 1:
        raise RecipeError(
            f"sampling.{sampling.requires[0]}: there is no guidance to leave out{why}",
            expected="a guidance_scale above 1, or neither guidance_interval nor guidance_reuse",
            got=f"guidance_scale {sampling.guidance_scale:g}",
        )  # fmt: skip
    if sampling.guidance_rescale and sampling.guidance_scale <= 1:
        raise RecipeError(
            f"sampling.guidance_rescale: there is no guidance to rescale{why}", expected="a guidance_scale above 1",
            got=f"guidance_scale {sampling.guidance_scale:g}",
        )  # fmt: skip
    few_step = checkpoint.few_step_sampler
    if recipe.early_exit:
        check_early_exit(sampling, few_step)
    if recipe.timesteps:
        check_timesteps(recipe.timesteps, sampling, few_step)
