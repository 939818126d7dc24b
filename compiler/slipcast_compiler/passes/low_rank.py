"""Replace linear layers and 1x1 convolutions by the product of two smaller ones, where the target's engine gains by it.

Of all matrices of rank r, the one that changes the layer's output least over the family's inputs z is U_r U_r^T W, with
U_r the first r left singular vectors of W H^(1/2), H = E[z z^T] (the whitened SVD of SVD-LLM, arXiv 2403.07378; ASVD,
arXiv 2312.05821, whitens by a diagonal). It equals U_r S_r V_r^T H^(-1/2), without the inverse. What is kept of the
squared singular values is what is kept of E|W z|^2. A layer whose inputs an earlier pass has removed is left alone, as
which of the measured ones are left is not in the shapes; to_out and net.2 of pruned layers are such.

The couplings of attention (see couplings.py) are reported and not made use of: diffusers' attention gives Q, K and V
one width. On the reference model (circles, 99.9 % of the energy) Q/K needs 17 of 24, 10 of 16 and 8 of 8 dimensions in
the worst head, V/O all of them in self-attention, and 17 of 24, 12 of 16 and 8 of 8 in cross-attention: with ranks
rounded up to what vector registers hold, nothing is left to gain.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.passes.context import Context, Floats, Result, Task
from slipcast_compiler.recipe.passes import LowRank

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import LinearLayer
    from slipcast_compiler.model.rewrite import Denoiser
    from slipcast_compiler.passes.micro import Gain

WORTH = 0.9  # of the layer's multiplications: with more than this, no engine has been seen to gain
FASTER = 1.05  # less than this is within the noise of the measurement
MULTIPLE = 8  # ranks are rounded up to what vector registers hold


def needs_profile(options: LowRank) -> bool:
    """Whether anything is to be done."""
    return options.energy < 1


def reads(task: Task) -> dict[str, Any]:
    """What the measurement depends on."""
    return {"target": task.target.model_dump(mode="json"), **task.sizes}


def run(denoiser: Denoiser, context: Context, options: LowRank) -> Result:
    """See the module's docstring."""
    from slipcast_compiler.passes.couplings import couplings
    from slipcast_compiler.passes.micro import input_shapes

    report: dict[str, Any] = {"options": options.model_dump(mode="json"), "layers": {}}
    if options.energy == 1:
        return Result(report=report)
    layers = denoiser.layers.linear
    _check_protected(layers, options)
    shapes = input_shapes(denoiser.module, context.task.evaluate)
    tensors: dict[str, Floats] = {}
    timed: dict[tuple[Any, ...], Gain] = {}  # layers of the same sizes cost the same
    for done, layer in enumerate(layers):
        context.advance(done, len(layers))
        if layer.name in shapes and not any(fnmatchcase(layer.name, pattern) for pattern in options.protect):
            factors, found = _try(denoiser, context, options, layer, shapes[layer.name], timed)
            tensors |= factors
            report["layers"][layer.name] = found
    report["couplings"] = couplings(denoiser, context, options.energy)
    return Result(tensors, report)


def factorise(weight: Floats, moment: Floats, energy: float, layer: str) -> tuple[Floats, Floats, float]:
    """(A [r, in], B [out, r], the energy kept) with B A nearest to `weight` [out, in] over inputs of second moment H.

    r is the smallest rank that keeps `energy`, rounded up. NumericalError names a layer that cannot be decomposed.
    """
    try:
        if not (np.isfinite(weight).all() and np.isfinite(moment).all()):
            raise np.linalg.LinAlgError("NaN or infinity in its weights or in the second moment of its inputs")
        wide = weight.astype(np.float64)
        values, vectors = np.linalg.eigh(moment.astype(np.float64))
        root = vectors * np.sqrt(values.clip(0))  # root @ root.T is H, which is all that is asked of its root
        left, singular, _ = np.linalg.svd(wide @ root, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f"{layer}: its weights cannot be decomposed", expected="finite numbers", got=str(error),
            hint="profile with more prompts, or name the layer in low_rank.protect",
        ) from error  # fmt: skip
    total = np.cumsum(singular**2)
    if total[-1] == 0:  # nothing ever reaches this layer's output
        return np.zeros((1, weight.shape[1]), np.float32), np.zeros((len(weight), 1), np.float32), 1.0
    rank = int(np.searchsorted(total, energy * total[-1])) + 1
    rank = min(-(-rank // MULTIPLE) * MULTIPLE, len(singular))
    basis = left[:, :rank]
    return (basis.T @ wide).astype(np.float32), basis.astype(np.float32), float(total[rank - 1] / total[-1])


def _try(
    denoiser: Denoiser, context: Context, options: LowRank, layer: LinearLayer, shape: tuple[int, ...],
    timed: dict[tuple[Any, ...], Gain],
) -> tuple[dict[str, Floats], dict[str, Any]]:  # fmt: skip
    """The layer's factors where they are kept, else nothing; and what the report says."""
    from slipcast_compiler.passes.micro import measure

    moment = context.measured.second_moment(layer.name)
    if len(moment) != layer.inputs:
        # Which of the measured inputs are left is known to the pass that removed the others alone.
        return {}, {"kept": False, "why": "an earlier pass removed inputs of it"}
    weight = denoiser.weight(f"{layer.name}.weight").reshape(layer.outputs, layer.inputs)
    first, second, energy = factorise(weight, moment, options.energy, layer.name)
    found: dict[str, Any] = {"rank": len(first), "energy": energy}
    if first.size + second.size > WORTH * weight.size:
        return {}, {**found, "kept": False, "why": "as many multiplications as before"}
    key = (shape, layer.inputs, layer.outputs, len(first))
    if key not in timed:
        timed[key] = measure(context.task.target, shape, (weight,), (first, second))
    gain = timed[key]
    faster = gain.speedup >= FASTER and gain.speedup_low > 1
    smaller = gain.bytes_after < gain.bytes_before
    found |= {"kept": faster if options.keep == "faster" else smaller, **gain.record()}
    if not found["kept"]:
        return {}, {**found, "why": f"not {options.keep}"}
    tail = (1, 1) if layer.convolution else ()
    tensors = {
        f"{layer.name}.0.weight": first.reshape(*first.shape, *tail),
        f"{layer.name}.1.weight": second.reshape(*second.shape, *tail),
    }
    if denoiser.has(f"{layer.name}.bias"):
        tensors[f"{layer.name}.1.bias"] = denoiser.weight(f"{layer.name}.bias")
    return tensors, found


def _check_protected(layers: tuple[LinearLayer, ...], options: LowRank) -> None:
    names = [layer.name for layer in layers]
    if unknown := [pattern for pattern in options.protect if not any(fnmatchcase(name, pattern) for name in names)]:
        raise RecipeError("low_rank.protect: no layer matches", expected=", ".join(names), got=", ".join(unknown))
