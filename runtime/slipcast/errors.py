"""Every error a user can meet, each with the exit code the command line ends with.

An error says what is wrong (naming the file or key), what was expected, what was found, and the next step.
"""

from __future__ import annotations


class SlipcastError(Exception):
    """Base of all errors that slipcast raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, expected: object = None, got: object = None, hint: str | None = None) -> None:
        self.message, self.expected, self.got, self.hint = message, expected, got, hint
        lines = [message]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if hint:
            lines.append(f"  next:     {hint}")
        super().__init__("\n".join(lines))


class CheckFailed(SlipcastError):  # noqa: N818 - named for what happened
    """A gate or a check said no."""

    exit_code = 1


class RecipeError(SlipcastError):
    """The recipe, or what it names, cannot be used."""

    exit_code = 2


class RequestError(SlipcastError, ValueError):
    """A call asks for what the bundle cannot do; raised before any engine runs."""

    exit_code = 2


class HostError(SlipcastError):
    """This machine lacks a library, a device or a driver."""

    exit_code = 3


class ArtifactError(SlipcastError):
    """A bundle or checkpoint is damaged, malformed or not to be trusted."""

    exit_code = 4


class ResourceError(SlipcastError):
    """Memory or disk ran out."""

    exit_code = 5


class NumericalError(SlipcastError):
    """NaN or infinity where numbers were due."""

    exit_code = 1


class Cancelled(SlipcastError):  # noqa: N818 - it is not an error to be cancelled
    """Raise this in `callback_on_step_end` to end a run; the pipeline stays usable."""

    exit_code = 130
