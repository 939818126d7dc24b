"""[passes]: a table for each pass that is on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slipcast.bundle.validation import Strict
from slipcast_compiler.recipe.values import Texts

NeuronCriterion = Literal["second_order", "taylor", "activation_energy_percentile", "magnitude", "random"]
HeadCriterion = Literal["leave_one_out", NeuronCriterion]


class PruneHeads(Strict):
    """`ratio` of all heads goes; `floor` stay in every layer; layers that match `protect` keep all.

    `correct` fits what remains of the output projection to the layer's output by least squares. `seed` is for the
    criterion random, the control.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    # by what heads are ranked
    criterion: HeadCriterion = "leave_one_out"
    correct: bool = True
    floor: Annotated[int, Field(ge=1)] = 1
    protect: Texts = ()
    seed: Annotated[int, Field(ge=0)] = 0


class PruneFFN(Strict):
    """`ratio` of all neurons goes; the other options are those of prune_heads. Counts stay multiples of `multiple`,
    which is what engines' kernels work in."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    # by what neurons are ranked
    criterion: NeuronCriterion = "second_order"
    # as for heads
    correct: bool = True
    # neurons that stay in every layer
    floor: Annotated[int, Field(ge=1)] = 16
    multiple: Annotated[int, Field(ge=1)] = 16
    # patterns of layers that keep all
    protect: Texts = ()
    # for the criterion random
    seed: Annotated[int, Field(ge=0)] = 0


class LowRank(Strict):
    """`energy` is what each layer keeps of its output's; layers that match `protect` stay whole.

    A layer is factorised where the first target's engine then runs it faster, or, with keep = "smaller", where its file
    is smaller.
    """

    energy: Annotated[float, Field(gt=0, le=1)] = 0.999
    # what decides whether a layer is factorised
    keep: Literal["faster", "smaller"] = "faster"
    protect: Texts = ()


class Recover(Strict):
    """`steps` of AdamW on `batch` states each. "full" trains all weights, "lora" a low-rank change of each linear
    layer, which takes less memory, wants about ten times the learning rate, and is merged in the end."""

    steps: Annotated[int, Field(ge=0, le=10_000_000)] = 300
    # what is trained
    method: Literal["full", "lora"] = "full"
    # of AdamW; it rises over the first tenth, then falls as a cosine
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    batch: Annotated[int, Field(ge=1, le=4096)] = 8
    # train with weights and inputs rounded to 8 bits
    fake_quant: bool = False
    # of what training draws
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Quantize(Strict):
    """[passes.quantize]: how the denoiser of targets in int8 is quantised.

    `weights_only`: weights alone are int8, for hosts with little memory or disk; activations are not.
    `smooth_quant_alpha`: how much of the outliers moves from activations into weights, 0 for nothing.
    `samples`: evaluations of the denoiser that ranges are taken from. `max_error`: the most that the guided prediction
    may be off on them, as a relative L2 norm against fp32; the layers that do most damage are kept in higher precision
    until it holds. `measurements`: how many choices of layers are tried for that, each on up to four samples; the fewer
    there are for the layers to be told apart, the more are kept. `protect`: patterns of layers that are kept in any
    case, such as "up_blocks.2.*". `symmetric`: ranges of activations are symmetric about zero, as TensorRT wants them;
    its targets switch it on.
    """

    weights_only: bool = False
    smooth_quant_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    samples: Annotated[int, Field(ge=1, le=9999)] = 32
    max_error: Annotated[float, Field(gt=0)] = 0.03
    measurements: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    protect: Texts = ()
    symmetric: bool = False


class QuantizeInt4(Strict):
    """[passes.quantize_int4]: how the linear layers of targets in int4 are quantised, in every component that has many.

    `group_size`: how many inputs of a layer share a scale; fewer where they do not divide its inputs. `rank`: of the
    branch in full precision that holds what 4 bits would lose most of; 0 for none. `samples`: evaluations of each
    component that inputs are weighed by. `max_error`: the most that a component's outputs may be off on them, as a
    relative L2 norm against fp32, a denoiser's with guidance; the layers that do most damage are kept in higher
    precision until it holds. `measurements`: how many choices of layers are tried for that. `protect`: patterns of
    layers that are kept in any case, such as "transformer.*.ff.*".
    """

    group_size: Literal[16, 32, 64, 128] = 64
    rank: Annotated[int, Field(ge=0, le=1024)] = 16
    samples: Annotated[int, Field(ge=1, le=9999)] = 8
    max_error: Annotated[float, Field(gt=0)] = 0.1
    measurements: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    protect: Texts = ()


class AdaptersTable(Strict):
    """[adapters]: slots for LoRAs, which a run sets and exchanges.

    `rank`: the most that adapters which are set together may have. `layers`: patterns of the linear layers of denoisers
    that have a slot, such as "*.attn.to_*".
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    layers: Annotated[Texts, Field(min_length=1)] = ("*",)


class PassesTable(Strict):
    """[passes]: a table for each pass that is on; they run in this order."""

    prune_heads: PruneHeads | None = None
    prune_ffn: PruneFFN | None = None
    low_rank: LowRank | None = None
    recover: Recover | None = None
    quantize: Quantize | None = None  # after the export, on the graph
    quantize_int4: QuantizeInt4 | None = None  # likewise

    def chosen(self) -> list[tuple[str, Any]]:
        """(name, options) of the passes over weights that are on, in their order."""
        names = [name for name in type(self).model_fields if not name.startswith("quantize")]
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
