"""Where values enter a captured program: texts, noise, pictures, and the table of a closed family."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from slipcast.bundle.names import Count, Name, Positive
from slipcast.bundle.validation import BundlePath, Strict

ArgumentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
Shape = tuple[int | str, ...]


class PromptSource(Strict):
    """What a tokenizer gives for a text: `prefix` + the user's text + `suffix`, or, without `argument`, these alone.
    Its `position_ids` count tokens from 0 on; what pads them is 0.

    `tokenizer`: a tokenizer.json of the `tokenizers` library, with padding and truncation set as the pipeline sets
    them. `mend`, `clean`, `strip` and `lower` are applied to the user's text, in this order; `mend`: as ftfy.fix_text
    does; `clean`: HTML's entities are characters, twice over, and blanks between words are one space. `unquoted`: a
    text with words between quotation marks is refused, which the pipeline takes apart. A text that gives another
    length than that of `shape` is refused; a name there is one of the program's lengths, and so is `length`, that
    of a text without what pads it.
    """

    kind: Literal["prompt"] = "prompt"
    value: Name
    tokenizer: BundlePath
    field: Literal["input_ids", "attention_mask", "token_type_ids", "position_ids"] = "input_ids"
    argument: ArgumentName | None
    prefix: str = ""
    suffix: str = ""
    lower: bool = False
    strip: bool = False
    clean: bool = False
    mend: bool = False
    unquoted: bool = False
    special_tokens: bool = True
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[Literal[1], Positive | Name]
    length: Name | None = None


class NoiseSource(Strict):
    """Standard normal noise of an image's seed, drawn in the order of the sources, as torch's CPU generator does.
    `generator`: that of the call, or torch's own, which the pipeline draws by besides: that begins with the same seed,
    as after torch.manual_seed."""

    kind: Literal["noise"] = "noise"
    value: Name
    dtype: Literal["float32"] = "float32"
    shape: tuple[Positive, ...]
    generator: Literal["call", "torch"] = "call"


class ImageSource(Strict):
    """An array that a run is given. Of the shape [1, 1 or 3, height, width] it is a picture, in [0, 1]: PIL images are
    converted and resized to it. Others, such as embeddings, are given as they are. `place`: in the list that the
    argument is; of an argument that is no list there is none."""

    kind: Literal["image"] = "image"
    value: Name
    argument: ArgumentName
    place: Count | None = None
    dtype: Literal["float32"] = "float32"
    shape: tuple[Positive, ...]

    @property
    def name(self) -> str:
        """What to call it: image, or, in a list, image[1]."""
        return self.argument if self.place is None else f"{self.argument}[{self.place}]"

    @property
    def size(self) -> tuple[int, int, int] | None:
        """[channels, height, width] of a picture; None of another array."""
        if len(self.shape) != 4 or self.shape[0] != 1 or self.shape[1] not in (1, 3):
            return None
        return self.shape[1], self.shape[2], self.shape[3]


class TableSource(Strict):
    """What a prompt of a closed family becomes: a tensor of its table, "<tensor>.<place>" by the prompt's place among
    them; or "<tensor>" alone, where no text that a run gives decides it."""

    kind: Literal["table"] = "table"
    value: Name
    argument: ArgumentName | None
    tensor: Name
    dtype: Literal["float32", "int64", "int32"]
    shape: Shape

    def name_at(self, place: int) -> str:
        """The tensor's, for a prompt."""
        return f"{self.tensor}.{place}" if self.argument else self.tensor


class ClosedTexts(Strict):
    """All prompts that a bundle of a closed family takes, and what they become: safetensors, see TableSource."""

    table: BundlePath
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]

    @field_validator("prompts")
    @classmethod
    def _distinct(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) != len(prompts):
            raise ValueError("a prompt is listed twice")
        return prompts


Source = Annotated[PromptSource | NoiseSource | ImageSource | TableSource, Field(discriminator="kind")]
