"""LoRAs that a run sets: the pipeline's own with them, whoever wrote the file; without them, nothing changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import compare, export_here, write
from safetensors.torch import load_file, save_file
from tiny import call_of, open_pipeline

import slipcast
from slipcast.bundle.manifest import ProgramManifest, read_any_manifest
from slipcast.bundle.program import rows_of_image
from slipcast.errors import ArtifactError, RecipeError, RequestError
from slipcast.progress import silent
from slipcast.run.lora import read_lora
from slipcast_compiler.engines.programs import ProgramGraphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.passes import AdaptersTable
from slipcast_compiler.recipe.targets import TargetTable

PROMPT, SEED = "a large blue star on a black background", 7
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "stable_diffusion": ("unet", ATTENTION),
    "flux": ("transformer", [*ATTENTION, "proj_mlp", "add_k_proj"]),
    "stable_diffusion_xl": ("unet", [*ATTENTION, "ff.net.2"]),
    "stable_diffusion_3": ("transformer", ATTENTION),
    "wan": ("transformer", ATTENTION),
    "qwen_image": ("transformer", ATTENTION),
}


def bundle_with_slots(name: str, folder: Path, *tables: TargetTable, **options: Any) -> Path:
    cache = Cache(folder / "cache")
    entry = export_here(open_pipeline(name), name, [lambda prompt: call_of(name, prompt, 1)], cache)
    graphs = ProgramGraphs(entry).with_slots(AdaptersTable(**{"rank": 8} | options), {"fp32"}, cache, silent)
    return write(graphs, name, folder, cache, *tables)


def save_lora(name: str, file: Path, seed: int = 0, rank: int = 3, alpha: int = 6, **settings: Any) -> None:
    """As diffusers writes it, with both factors random, and peft's settings among its metadata."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    component, layers = TARGETS[name]
    torch.manual_seed(seed)
    pipe = copy.deepcopy(open_pipeline(name))
    module = getattr(pipe, component)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=False, **settings)
    module.add_adapter(config)
    given = {f"{component}_lora_layers": get_peft_model_state_dict(module)}
    metadata: Any = {f"{component}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(file.parent, weight_name=file.name, **given, **metadata)


def with_loras(name: str, **scales: float) -> Any:
    """diffusers' own pipeline, with LoRAs of save_lora by their files."""
    pipe = copy.deepcopy(open_pipeline(name))
    for at, file in enumerate(scales):
        pipe.load_lora_weights(Path(file).parent, weight_name=Path(file).name, adapter_name=f"a{at}")
    if scales:
        pipe.set_adapters([f"a{at}" for at in range(len(scales))], list(scales.values()))
    return pipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    bundle_with_slots("stable_diffusion", folder)
    save_lora("stable_diffusion", folder / "one.safetensors")
    save_lora("stable_diffusion", folder / "two.safetensors", seed=1, rank=5, use_rslora=True)
    return folder


@pytest.fixture
def loaded(place: Path) -> Iterator[Any]:
    with slipcast.load(place / "bundle") as pipe:
        yield pipe


def drawn(pipe: Any) -> Any:
    return pipe(PROMPT, seed=SEED, output_type="np").images


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "stable_diffusion"])
def test_it_draws_what_diffusers_draws(name: str, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_lora(name, file)
    with slipcast.load(bundle_with_slots(name, tmp_path)) as pipe:
        plain = compare(pipe, open_pipeline(name), name, PROMPT, SEED)
        pipe.load_adapter("style", file)
        pipe.set_adapters({"style": 0.7})
        found = compare(pipe, with_loras(name, **{str(file): 0.7}), name, PROMPT, SEED)
        unlike = compare(pipe, open_pipeline(name), name, PROMPT, SEED)
        assert plain["psnr"] > 90 and found["psnr"] > 90 > 60 > unlike["psnr"]
        layers = pipe.manifest.adapters.layers
        assert pipe.manifest.adapters.rank == 8 and any(layer.endswith("to_q") for layer in layers)


@pytest.mark.slow
def test_one_after_another_and_together(loaded: Any, place: Path) -> None:
    """None again is what it was to the bit. One has an alpha of its own, one is scaled as rsLoRA is."""
    files = {each: str(place / f"{each}.safetensors") for each in ("one", "two")}
    before = drawn(loaded)
    for name, file in files.items():
        loaded.load_adapter(name, file)
    assert np.array_equal(drawn(loaded), before)  # what is loaded is not set
    for scales in ({"one": 0.5}, {"two": -0.3}, {"one": 0.2, "two": 0.4}):
        loaded.set_adapters(scales)
        pipe = with_loras("stable_diffusion", **{files[name]: scale for name, scale in scales.items()})
        assert compare(loaded, pipe, "stable_diffusion", PROMPT, SEED)["psnr"] > 90, scales
    loaded.set_adapters({})
    assert np.array_equal(drawn(loaded), before)
    loaded.set_adapters({"one": 0.0})
    assert np.array_equal(drawn(loaded), before)


@pytest.mark.slow
def test_both_residencies_and_an_exchange_from_a_callback(place: Path) -> None:
    """A run keeps those that it began with."""
    found = []
    for residency in ("all", "sequential"):
        with slipcast.load(place / "bundle", residency=residency) as pipe:  # type: ignore[arg-type]
            pipe.load_adapter("one", place / "one.safetensors")
            plain = drawn(pipe)
            exchanged = pipe(
                PROMPT, seed=SEED, output_type="np",
                callback_on_step_end=lambda running, step, steps: running.set_adapters({"one": 1.0}),
            ).images  # fmt: skip
            assert np.array_equal(exchanged, plain)
            found.append(drawn(pipe))
            assert not np.array_equal(found[-1], plain)
    assert np.array_equal(*found)


@pytest.mark.slow
def test_all_forms_of_a_file(loaded: Any, place: Path, tmp_path: Path) -> None:
    """peft's names, kohya's with an alpha, diffusers' before peft; in half precision. Of none but peft's is known that
    the alpha is twice the rank."""
    given = load_file(place / "one.safetensors")
    loaded.load_adapter("one", place / "one.safetensors")
    loaded.set_adapters({"one": 0.5})
    wanted = drawn(loaded)
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')

    def kohya(key: str) -> str:
        module = key.removeprefix("unet.").rsplit(".lora", 1)[0]
        return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if 'lora_A' in key else 'up'}.weight"

    def old(key: str) -> str:
        module, _, rest = key.removeprefix("unet.").rpartition(".lora_")
        head, _, layer = module.removesuffix(".0").rpartition(".")
        return f"unet.{head}.processor.{layer}_lora.{'down' if rest.startswith('A') else 'up'}.weight"

    forms = {
        "plain": {key.removeprefix("unet."): value for key, value in given.items()},
        "peft": {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in given.items()},
        "kohya": {kohya(key): value for key, value in given.items()}
        | {kohya(key).partition(".")[0] + ".alpha": torch.tensor(6.0) for key in given},
        "old": {old(key): value for key, value in given.items()},
    }
    for name, tensors in forms.items():
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        loaded.load_adapter(name, tmp_path / f"{name}.safetensors")
        loaded.set_adapters({name: 0.5 if name in ("kohya", "peft") else 1.0})
        assert np.allclose(drawn(loaded), wanted, atol=1e-5), name
    half = {key: value.to(torch.bfloat16) for key, value in given.items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded.load_adapter("half", tmp_path / "half.safetensors")
    loaded.set_adapters({"half": 1.0})
    assert np.allclose(drawn(loaded), wanted, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (lambda t: {f"unet.mid.{k}": v for k, v in t.items()}, RequestError, "no layer of this bundle has a slot for"),
        (lambda t: {k.replace("unet.", "text_encoder."): v for k, v in t.items()}, RequestError, "a text encoder"),
        (lambda t: {k.replace("lora_A", "lora_magnitude_vector"): v for k, v in t.items()}, RequestError, "is a DoRA"),
        (lambda t: {k.replace("lora_A.weight", "lokr_w1"): v for k, v in t.items()}, RequestError, "is a LoKr"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, RequestError, "has no up"),
        (lambda t: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in t.items()}, RequestError, "another shape"),
        (lambda t: {k: v.repeat(4, 1) if "lora_A" in k else v.repeat(1, 4) for k, v in t.items()}, RequestError,
         "larger rank than the slots(.|\n)*at most 8(.|\n)*12"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, ArtifactError, "finite|NaN"),
        (lambda t: {k.replace("lora_", "other_"): v for k, v in t.items()}, RequestError, "no part of a LoRA"),
        (lambda t: {}, RequestError, "is empty"),
        (lambda t: t | {k.removeprefix("unet."): v.clone() for k, v in t.items()}, RequestError, "more than one"),
        (lambda t: t | {f"{next(iter(t)).rsplit('.lora', 1)[0]}.alpha": torch.ones(2)}, RequestError, "another shape"),
        (lambda t: {k: v > 0 for k, v in t.items()}, RequestError, "is no LoRA(.|\n)*BOOL"),
        (lambda t: {k: v.double() * 1e300 for k, v in t.items()}, ArtifactError, "float32 cannot hold"),
        (lambda t: {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in t.items()}, RequestError,
         "adapter_config.json beside it"),
    ],
)  # fmt: skip
def test_what_is_refused(place: Path, tmp_path: Path, change: Any, error: type[Exception], problem: str) -> None:
    """Before a tensor is read, where its shape tells."""
    manifest = read_any_manifest((place / "bundle" / "manifest.json").read_bytes())
    assert isinstance(manifest, ProgramManifest) and manifest.adapters
    slots = manifest.slots
    sizes = {name: (slots[f"down_{at}"][0], slots[f"up_{at}"][1]) for at, name in enumerate(manifest.adapters.layers)}
    tensors = {key: value.contiguous() for key, value in change(load_file(place / "one.safetensors")).items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=problem):
        read_lora(tmp_path / "bad.safetensors", sizes, manifest.adapters.rank, None)


@pytest.mark.slow
def test_what_cannot_be_set(loaded: Any, place: Path) -> None:
    loaded.load_adapter("one", place / "one.safetensors")
    loaded.load_adapter("two", place / "two.safetensors")
    loaded.load_adapter("three", place / "two.safetensors")
    with pytest.raises(RequestError, match="too much for the slots(.|\n)*a rank of 8 together(.|\n)*10"):
        loaded.set_adapters({"two": 1.0, "three": 1.0})
    for scale in (float("nan"), "1", True, 10**400):
        with pytest.raises(RequestError, match="the scale of 'one' is no number"):
            loaded.set_adapters({"one": scale})
    with pytest.raises(RequestError, match="too large for float32"):
        loaded.set_adapters({"one": 1e39})
    with pytest.raises(RequestError, match="adapters are set by name"):
        loaded.set_adapters(["one"])
    with pytest.raises(RequestError, match="there is an adapter 'one' already"):
        loaded.load_adapter("one", place / "two.safetensors")
    loaded.unload_adapter("one")
    loaded.load_adapter("one", place / "two.safetensors")
    with pytest.raises(RequestError, match="no layer of 'transformer' has a slot"):
        loaded.load_adapter("four", place / "two.safetensors", component="transformer")


@pytest.mark.slow
def test_an_engine_that_somebody_uses_stays_open(place: Path) -> None:
    with slipcast.load(place / "bundle") as pipe:
        pipe.load_adapter("one", place / "one.safetensors")
        with pipe.residency.use("denoiser") as engine:
            pipe.set_adapters({"one": 1.0})
            drawn(pipe)
            specs = pipe.manifest.components["denoiser"].inputs
            shapes = {each.name: [rows_of_image(each.shape) or size for size in each.shape[:1]] for each in specs}
            given = {each.name: np.zeros([*shapes[each.name], *each.shape[1:]], each.dtype) for each in specs}
            assert engine(given)
        pipe.set_adapters({})
        drawn(pipe)


@pytest.mark.slow
def test_manifests_that_contradict_themselves(place: Path) -> None:
    manifest = json.loads((place / "bundle" / "manifest.json").read_text())
    slots = manifest["adapters"]
    for change, problem in (
        ({"layers": [slots["layers"][0], *slots["layers"]]}, "is there twice"),
        ({"rank": 2**36}, "less than or equal to 1024"),
        ({"rank": 9}, "has no slot of rank 9"),
        ({"layers": [*slots["layers"], "unet.other"]}, "has no slot of rank 8"),
        ({"components": dict.fromkeys(slots["components"], "denoiser_adapted")}, "is there twice"),
        ({"components": {"denoiser": "decoder"}}, "adapters.components|no call of the program needs it"),
    ):
        with pytest.raises(ArtifactError, match=problem):
            read_any_manifest(json.dumps(manifest | {"adapters": slots | change}).encode())


@pytest.mark.slow
def test_two_denoisers_with_the_same_names(tmp_path: Path) -> None:
    """Wan 2.2: a name without its component's would do for either."""
    bundle = bundle_with_slots("wan_2_2", tmp_path)
    rng, tensors = torch.Generator().manual_seed(0), {}
    with slipcast.load(bundle) as pipe:
        layer = next(name for name in pipe.manifest.adapters.layers if name.startswith("transformer_2.blocks.0.attn1"))
        inputs = pipe.manifest.slots[f"down_{pipe.manifest.adapters.layers.index(layer)}"][0]
        short = layer.partition(".")[2]
        for kind, shape in (("A", (2, inputs)), ("B", (inputs, 2))):
            tensors[f"diffusion_model.{short}.lora_{kind}.weight"] = torch.randn(shape, generator=rng)
        save_file(tensors, tmp_path / "low.safetensors")
        chosen = {}
        for component in ("transformer", "transformer_2"):
            pipe.load_adapter(component, tmp_path / "low.safetensors", component=component)
            pipe.set_adapters({component: 1.0})
            chosen[component] = drawn(pipe)
        pipe.load_adapter("low", tmp_path / "low.safetensors")  # as diffusers loads it
        pipe.set_adapters({"low": 1.0})
        assert np.array_equal(drawn(pipe), chosen["transformer"])
        assert not np.array_equal(*chosen.values())
        save_file(
            {key.removeprefix("diffusion_model."): each for key, each in tensors.items()}, tmp_path / "x.safetensors"
        )
        with pytest.raises(RequestError, match="may be of several components"):
            pipe.load_adapter("x", tmp_path / "x.safetensors")


@pytest.mark.slow
def test_slots_that_are_zero_change_nothing(tmp_path: Path) -> None:
    """In bf16, where what has to be exact is so with slots, too."""
    bundle = bundle_with_slots("flux", tmp_path, TargetTable(engine="openvino", precision="bf16"))
    rng = np.random.default_rng(0)
    with slipcast.load(bundle) as pipe:
        for plain, name in pipe.manifest.adapters.components.items():
            contract = pipe.manifest.components[plain]
            given = {s.name: rng.standard_normal([d if isinstance(d, int) else 3 for d in s.shape]).astype(s.dtype)
                     for s in contract.inputs}  # fmt: skip
            slots = {key: np.zeros(shape, np.float32) for key, shape in pipe.manifest.slots.items()}
            with pipe.residency.use(plain) as one, pipe.residency.use(name) as other:
                wanted = one(given)
                found = other(given | {spec.name: slots[spec.name] for spec in other.inputs if spec.name in slots})
            for key, value in wanted.items():
                assert np.linalg.norm(found[key] - value) <= 0.01 * np.linalg.norm(value) + 1e-6, (plain, key)


@pytest.mark.slow
def test_layers_that_are_chosen(tmp_path: Path) -> None:
    bundle = bundle_with_slots("flux", tmp_path, layers=("*.attn.to_q",), rank=2)
    with slipcast.load(bundle) as pipe:
        assert all(layer.endswith("attn.to_q") for layer in pipe.manifest.adapters.layers)
        assert not pipe.manifest.adapters.components.keys() & {"decoder", "conditioning"}
    with pytest.raises(RecipeError, match="fits no layer of the exported denoisers"):
        bundle_with_slots("flux", tmp_path / "none", layers=("*.nothing",))


@pytest.mark.slow
def test_a_bundle_without_slots(tmp_path: Path, place: Path) -> None:
    cache = Cache(place / "cache")
    calls = [lambda prompt: call_of("stable_diffusion", prompt, 1)]
    entry = export_here(open_pipeline("stable_diffusion"), "stable_diffusion", calls, cache)
    with slipcast.load(write(ProgramGraphs(entry), "stable_diffusion", tmp_path, cache)) as pipe:
        with pytest.raises(RequestError, match=r"no slots for adapters(.|\n)*compiled with \[adapters\]"):
            pipe.load_adapter("one", place / "one.safetensors")  # type: ignore[union-attr]
        pipe.set_adapters({})  # type: ignore[union-attr]


@pytest.mark.slow
def test_weights_are_in_the_bundle_once(tmp_path: Path) -> None:
    tables = TargetTable(engine="onnxruntime"), TargetTable(engine="openvino", precision="bf16")
    bundle = bundle_with_slots("flux", tmp_path, *tables)
    with slipcast.load(bundle) as pipe:
        for target in pipe.manifest.targets:
            for plain in ("denoiser", "denoiser_prompt", "denoiser_prompt_step"):
                other = target.components[pipe.manifest.adapters.components[plain]]
                assert target.components[plain].weights == other.weights, (target.id, plain)
