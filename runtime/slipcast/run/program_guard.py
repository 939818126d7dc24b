"""The guard of a captured program: it looks at what a component gives of texts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from slipcast.bundle.program import ProgramCall
from slipcast.bundle.program_manifest import ProgramGuard
from slipcast.bundle.reader import ProgramBundle
from slipcast.bundle.records import GuardPolicy
from slipcast.bundle.sources import PromptSource
from slipcast.engines import Array
from slipcast.run.guard import Floats, Guard, Verdict
from slipcast.run.values import Values
from slipcast.run.variants import Ready

PROMPT = "prompt"
Tokens = npt.NDArray[np.int64]


class GuardedProgram:
    """Judges the prompts of runs, once what it looks at is known. ArtifactError where the table is not the
    manifest's."""

    def __init__(self, bundle: ProgramBundle, record: ProgramGuard, variants: Sequence[Ready]) -> None:
        self._record, self._guards = record, list[Guard]()
        for ready in variants:
            call = next(call for call in ready.variant.calls if call.component == record.component)
            special = special_tokens(ready, call.inputs[record.words] if record.words else None)
            self._guards.append(Guard(bundle.path(record.table), record, special))

    def after(
        self, call: ProgramCall, values: Values, variant: int, texts: Sequence[Mapping[str, str]], policy: GuardPolicy
    ) -> tuple[Verdict, ...]:
        """Of each image, after this call; nothing, where that is not what it looks at. RequestError for the first
        stranger, where they are refused."""
        if call.component != self._record.component:
            return ()
        found: dict[str, Verdict] = {}
        for image, text in enumerate(texts):
            if text[PROMPT] not in found:
                array = values.get(call.outputs[self._record.output], image)
                words = values.get(call.inputs[self._record.words], image) if self._record.words else None
                ids, hidden = by_token(array, words)
                guard = self._guards[variant]
                found[text[PROMPT]] = guard.judge([text[PROMPT]], ids[None], hidden[None], policy)[0]
        return tuple(found[text[PROMPT]] for text in texts)


def special_tokens(ready: Ready, value: str | None) -> Tokens:
    """Token ids that are no words: those of the empty prompt, by the source that gives this value; none, where no
    source does."""
    sources = [each for each in ready.variant.sources if isinstance(each, PromptSource) and each.value == value]
    return ready.texts.empty(sources[0]) if sources else np.array([], np.int64)


def by_token(array: Array, words: Array | None) -> tuple[Tokens, Floats]:
    """Token ids [length], and what stands for each token [length, width]: rows of guidance side by side. An array
    without tokens is one; where there are more of them, or none are known, all are words: the last ones, where an
    instruction before them was cut away."""
    tokens = array if array.ndim > 2 else array[:, None]
    rows = tokens.reshape(-1, *tokens.shape[-2:])
    hidden = np.concatenate(list(rows), axis=-1).astype(np.float32)
    if words is None or words.shape[-1] < len(hidden):
        return np.full(len(hidden), -1), hidden
    return words[0][-len(hidden) :].astype(np.int64), hidden
