"""A short distillation of the rewritten denoiser against the original, on the family's own trajectories.

The teacher is the unchanged denoiser; the student starts as earlier passes left it. States x_t come from the teacher's
sampling of the images that the profile is made of. Some of their prompts are set aside, and the error on their states
decides when to stop and which weights are kept. Held-out prompts are never read.

With `fake_quant` the student computes with weights and inputs rounded to 8 bits (Jacob et al., arXiv 1712.05877), so
that it comes to weights that INT8 harms less. What is returned is not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.model.original import Image
from slipcast_compiler.passes.context import Context, Points, Result, Task
from slipcast_compiler.recipe.passes import Recover

if TYPE_CHECKING:
    import torch

    from slipcast_compiler.model.rewrite import Denoiser
    from slipcast_compiler.profile.measure import Progress

VALIDATION = 0.25  # of the prompts
CHECKS = 20  # how often the error on them is taken
CHECKED = 64  # states that it is taken on, at most, evenly over steps and prompts
PATIENCE = 10  # checks without a smaller one, after which it stops
WARM_UP = 0.1  # of the steps, over which the learning rate rises; from then on it falls as a cosine
LARGEST_GRADIENT = 1.0


def needs_profile(options: Recover) -> bool:
    """It samples for itself."""
    return False


def reads(task: Task) -> dict[str, Any]:
    """What the trajectories depend on besides the checkpoint."""
    training, validation = split(task.images)
    return {**task.sampled, "training": training, "validation": validation}


def run(denoiser: Denoiser, context: Context, options: Recover) -> Result:
    """See the module's docstring. The report has the error of the guided prediction before and after.

    NumericalError where the teacher's prediction, naming the layer, or the loss is not finite.
    """
    report: dict[str, Any] = {"options": options.model_dump(mode="json")}
    if options.steps == 0:
        return Result(report=report)
    from slipcast_compiler.profile.measure import Progress

    progress = Progress(context.advance, options.steps)
    student, (training, validation) = context.task.trajectories(denoiser, split(context.task.images), progress)
    tensors, found = train(student, training, validation, options, progress)
    return Result(tensors, {**report, **found, "device": next(student.parameters()).device.type})


def split(images: Sequence[Image]) -> tuple[list[Image], list[Image]]:
    """(training, validation) images, no prompt in both; RecipeError where there is one."""
    keys = list(dict.fromkeys(image[0] or image[1] for image in images))  # without prompts, seeds are told apart
    if len(keys) < 2:
        raise RecipeError(
            "passes.recover has too few calibration prompts", expected="at least two different ones", got=len(keys),
            hint="add prompts to the family, or raise profile.prompts",
        )  # fmt: skip
    apart = set(keys[-max(1, round(VALIDATION * len(keys))) :])
    validation = [image for image in images if (image[0] or image[1]) in apart]
    return [image for image in images if image not in validation], validation


def check_split(images: Sequence[Image], calls: int) -> None:
    """RecipeError where no image is left to train on of one of so many calls, which draw them in turns."""
    training = split(images)[0]
    if missing := calls - len({images.index(image) % calls for image in training}):
        raise RecipeError(
            "passes.recover has too few calibration prompts: some of what call lists would not be trained on",
            expected="several prompts for each of the calls", got=f"none for {missing} of {calls}",
            hint="add prompts to the family, or raise profile.prompts",
        )  # fmt: skip


def train(
    student: Any, training: Points, validation: Points, options: Recover, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(changed parameters float32, what the report says); the student is changed in place.

    The loss is the squared error of the guided prediction, relative to the teacher's.
    """
    import torch

    from slipcast_compiler.passes.trainable import prepare, weights

    before = weights(student)
    parameters = prepare(student, options.method == "lora", options.fake_quant, options.seed)
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 0.5) / options.steps))
    generator = torch.Generator("cpu").manual_seed(options.seed)
    errors, best, every = [error(validation, options.batch)], before, -(-options.steps // CHECKS)
    for step in range(1, options.steps + 1):
        chosen = torch.randint(len(training), (options.batch,), generator=generator)
        optimizer.zero_grad()
        _check(sum(_backward(training, chosen)), step)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        progress.add(1)
        if step % every == 0 or step == options.steps:
            errors.append(_check(error(validation, options.batch), step))
            if errors[-1] == min(errors):
                best = weights(student)
            if errors.index(min(errors)) + PATIENCE < len(errors):
                break
    changed = {name: value.numpy() for name, value in best.items() if not torch.equal(value, before[name])}
    return changed, {"steps": step, "error_before": errors[0], "error_after": min(errors), "errors": errors}


def _backward(points: Points, chosen: torch.Tensor) -> Iterable[float]:
    """The parts of the loss |g - g'|^2 / |g'|^2 of the points `chosen`, where g' is the teacher's, each once its
    gradients are added to the student's: the graph of one part is in memory at a time."""
    parts = chosen.split(points.at_once)
    size = sum(float(points.wanted(part).square().sum()) for part in parts)
    for part in parts:
        loss = (points.found(part) - points.wanted(part)).square().sum() / size
        loss.backward()
        yield float(loss.detach())


def error(points: Points, batch: int) -> float:
    """The relative L2 error of what the scheduler is given over the points, or over CHECKED of them."""
    import torch

    places = torch.linspace(0, len(points) - 1, min(len(points), CHECKED)).round().long()
    with torch.no_grad():
        total = size = 0.0
        for chosen in places.split(min(batch, points.at_once)):
            wanted = points.wanted(chosen)
            total += float((points.found(chosen) - wanted).square().sum())
            size += float(wanted.square().sum())
    return math.sqrt(total / size)


def _check(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise NumericalError(
            f"recover: the loss is not finite at step {step}", expected="a finite loss", got=loss,
            hint="lower passes.recover.learning_rate",
        )  # fmt: skip
    return loss


def _rate(done: float) -> float:
    """The learning rate, relative to its peak, at this part of the steps."""
    return min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
