"""Make a bundle of every pipeline that diffusers' own tests describe, and compare each with its pipeline.

    python recipes/bench/survey.py DIFFUSERS [NAMES] -o recipes/bench/captures/survey.json

DIFFUSERS is a checkout of diffusers: its tests build a tiny pipeline of nearly every class, with random weights, and
call it. Nobody here wrote those calls, and nothing in Slipcast knows them. Bundles are for ONNX Runtime in fp32; each
draws a prompt, a seed and a picture that it was not captured with. No hub is asked: what tests load from it is made
here, or the pipeline counts as not built. NAMES: parts of names of classes. Each runs in a process of its own.
diffusers' tests need requests-mock and parameterized.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import re
import sys
import tempfile
import traceback
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipcast.errors import SlipcastError
from slipcast.progress import Advance
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "capture"))

PROMPT, SEED = "a large blue star on a black background", 7


def classes_of(checkout: Path) -> list[tuple[str, str]]:
    """(module, class) of the tests that describe a pipeline, by what their files say: nothing is imported."""
    found = []
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        module = ".".join(file.relative_to(checkout).with_suffix("").parts)
        for body in re.split(r"^(?=class )", file.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            if "pipeline_class = " in body and "def get_dummy_inputs" in body:
                found.append((module, re.split(r"\W", body)[1]))
    return found


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """Within it, what tests load from a hub is made of the parts that our own tiny pipelines are made of."""
    import transformers
    from tiny import parts

    def tokenizer(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        kind = None if cls.__name__ == "AutoTokenizer" else cls
        if "clip" in str(name).lower():
            return parts.clip_tokenizer(77)
        try:
            return parts.word_tokenizer(77, kind)
        except Exception:  # a tokenizer that cannot be made of a vocabulary alone
            return parts.word_tokenizer(77)

    def t5_config(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return parts.t5_text().config

    def processor(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return cls(**kwargs)

    def of(module: str, config: str, **sizes: int) -> Any:
        small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
        return lambda cls, *_, **__: getattr(transformers, module)(getattr(transformers, config)(**small))

    replaced = {
        "AutoConfig": t5_config,
        "AutoTokenizer": tokenizer,
        "PreTrainedTokenizerBase": tokenizer,
        "ImageProcessingMixin": processor,
        "T5EncoderModel": lambda cls, *_, **__: parts.t5_text(),
        "UMT5EncoderModel": lambda cls, *_, **__: parts.umt5_text(),
        "BertModel": of("BertModel", "BertConfig", vocab_size=64),
        "SiglipVisionModel": of("SiglipVisionModel", "SiglipVisionConfig", image_size=30, patch_size=2),
    }
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            kind = getattr(transformers, name)
            stack.enter_context(unittest.mock.patch.object(kind, "from_pretrained", classmethod(function)))
        yield


def described(checkout: Path, module: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline that a test describes, and the arguments that it calls it with."""
    import torch

    from slipcast_compiler.capture.blocks import is_picture, parameters_of

    sys.path.insert(0, str(checkout))
    with without_hub():
        test = getattr(importlib.import_module(module), name)()
        torch.manual_seed(0)
        pipe = test.pipeline_class(**test.get_dummy_components())
        takes = inspect.signature(test.get_dummy_inputs).parameters
        call = dict(test.get_dummy_inputs(*["cpu"] * ("device" in takes)))
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().float()
    pipe.set_progress_bar_config(disable=True)
    if "output_type" in parameters_of(pipe):
        call["output_type"] = "pt"
    pictures = {key for key, each in parameters_of(pipe).items() if is_picture(each)}
    call = {key: tensor_of(value) for key, value in call.items() if value is not None}
    return pipe, {key: in_range(value) if key in pictures else value for key, value in call.items()}


def tensor_of(value: Any) -> Any:
    """A picture of PIL as a call of ours has it; anything else as it is."""
    import numpy as np
    import PIL.Image
    import torch

    if isinstance(value, list):
        return [tensor_of(each) for each in value]
    if not isinstance(value, PIL.Image.Image):
        return value
    levels = np.asarray(value).reshape(1, value.height, value.width, -1).transpose(0, 3, 1, 2)
    return torch.from_numpy(levels.astype(np.float32) / 255)


def in_range(value: Any) -> Any:
    """Pictures that tests draw from a normal distribution, as numbers in [0, 1]; others as they are."""
    import torch

    if isinstance(value, list):
        return [in_range(each) for each in value]
    given = isinstance(value, torch.Tensor) and value.ndim >= 3
    return value.sigmoid() if given and (value.min() < 0 or value.max() > 1) else value


def arrays_of(value: Any) -> Any:
    return [arrays_of(each) for each in value] if isinstance(value, list) else value.numpy()


def examine(given: tuple[str, str, str], _: Advance) -> dict[str, Any]:
    """Runs in a process of its own: what became of one."""
    import numpy as np
    import torch
    from bundling import bundle_of, distance

    import slipcast
    from slipcast_compiler.capture.call import with_other_pictures
    from slipcast_compiler.capture.processing import call_pipeline
    from slipcast_compiler.capture.program import leaves
    from slipcast_compiler.host.quiet import quiet

    with quiet():
        try:
            pipe, call = described(Path(given[0]), *given[1:])
        except BaseException as error:  # tests skip by one, and what they need may be missing in any way
            return {"not_built": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        text = isinstance(call.get("prompt"), str | list)
        one = dict(call) | {"prompt": "a small red circle on white"} if text else dict(call)
        other = with_other_pictures(call) | ({"prompt": PROMPT} if text else {})

        def seeded(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
            return arguments | ({"generator": torch.Generator("cpu").manual_seed(seed)} if "generator" in call else {})

        def asked(prompt: str) -> dict[str, Any]:
            return seeded(one | ({"prompt": prompt} if text else {}), 1)

        found: dict[str, Any] = {"pipeline": type(pipe).__name__}
        try:
            torch.manual_seed(SEED)
            with torch.no_grad():
                result = call_pipeline(pipe, seeded(other, SEED))
        except Exception as error:  # of the call that its test makes: with other pictures, or without a library
            return found | {"not_built": f"the pipeline itself fails: {type(error).__name__}: {error}"[:300]}
        wanted = next(each for _, each in leaves(dict(result.items()) if hasattr(result, "items") else result))
        try:
            with tempfile.TemporaryDirectory() as scratch:
                bundle = bundle_of(pipe, "surveyed", [asked], Path(scratch))
                with slipcast.load(bundle) as loaded:
                    program = loaded.manifest.program
                    found["loop"] = bool(program.loop)
                    taken = {name.partition("[")[0] for variant in program.every for name in variant.images}
                    asked_for = {name: arrays_of(other[name]) for name in taken} | ({"prompt": PROMPT} if text else {})
                    drawn = loaded(**asked_for, seed=SEED, output_type="np").images[0]
        except SlipcastError as error:
            return found | {"refused": " ".join(f"{error.message}: {error.got or ''}".split())[:600]}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            return found | {"failed": f"{type(error).__name__} at {place}: {error}"[:600]}
        return found | distance(np.asarray(drawn), wanted.float().numpy())


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a pipeline."""
    for outcome in ("not_built", "refused", "failed"):
        if outcome in found:
            return name, outcome.replace("_", " "), found[outcome]
    return name, "bundle", f"{found['psnr']:.0f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for module, kind in classes_of(given.diffusers):
        name = f"{module.rpartition('.')[2].removeprefix('test_')}.{kind}"
        if given.names and not any(each.lower() in name.lower() for each in given.names):
            continue
        try:
            found[name] = run_isolated(examine, (str(given.diffusers.resolve()), module, kind)).result
        except SlipcastError as error:
            found[name] = {"failed": " ".join(f"{error.message} {error.got or ''}".split())}
        print(f"| {' | '.join(row(name, found[name]))} |", flush=True)
        if given.output:
            machine = this_machine().model_dump()
            document = {"command": f"python recipes/bench/survey.py DIFFUSERS -o {given.output}", "machine": machine}
            given.output.write_text(json.dumps(document | {"pipelines": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
