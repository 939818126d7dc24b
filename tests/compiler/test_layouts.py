"""Checkpoints as people have them: a bundle's graphs draw diffusers' pictures, or the plan refuses with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import layouts
import numpy as np
import pytest
import torch
from layouts import TEXT, UNET, VAE, Change

from conftest import call_cli
from slipcast.errors import SlipcastError
from slipcast.sampling.denoiser import final_scale, initial_scale
from slipcast.sampling.guidance import Guided
from slipcast.sampling.samplers import sample
from slipcast_compiler.export.component import write_component
from slipcast_compiler.model import original
from slipcast_compiler.model.checkpoint import empty_module, find_weight
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEDULER = "scheduler/scheduler_config.json"
PROMPT, SEED = "a red circle on white", 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.make_tiny(tmp_path_factory.mktemp("tiny") / "model")


def planned(model: Path, recipe: str = "") -> Plan:
    text = (
        f'name = "x"\nmodel.path = "{model.name}"\nfamily.prompts = ["{PROMPT}", "a blue star"]\n'
        f'targets = [{{ engine = "onnxruntime" }}]\nsampling.steps = 4\n'
    )
    return make_plan(parse_recipe(text + recipe, "x.toml"), model.parent)


def all_in(dtype: torch.dtype, variant: str) -> Change:
    def change(folder: Path) -> None:
        for component in (UNET, VAE, TEXT):
            layouts.cast(folder, component, dtype)
            layouts.rename(folder, component, variant)

    return change


def several(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


EQUAL: dict[str, tuple[Change, str]] = {
    "plain": (lambda folder: None, ""),
    "-Infinity": (
        partial(layouts.edit, file=SCHEDULER, lambda_min_clipped=float("-inf"),
                _class_name="DPMSolverMultistepScheduler"), "",
    ),
    "fp16 throughout": (all_in(torch.float16, "fp16"), ""),
    "bf16 throughout": (all_in(torch.bfloat16, "bf16"), ""),
    "plain U-Net, fp16 autoencoder": (partial(layouts.rename, component=VAE, variant="fp16"), ""),
    "plain U-Net, fp16 text encoder": (partial(layouts.rename, component=TEXT, variant="fp16"), ""),
    "ema beside plain": (partial(layouts.add_other, component=UNET, variant="ema"), ""),
    "ema and non_ema alone": (
        several(partial(layouts.add_other, component=UNET, variant="non_ema"),
                partial(layouts.rename, component=UNET, variant="ema")), "",
    ),
    "model.variant": (partial(layouts.add_other, component=UNET, variant="ema"), 'model.variant = "ema"'),
    "shards": (partial(layouts.shard, component=UNET), ""),
    "fp16 shards": (partial(layouts.shard, component=UNET, variant="fp16"), ""),
    "shards of the text encoder": (partial(layouts.shard, component=TEXT), ""),
    "a whole file and other shards": (partial(layouts.shard, component=UNET, keep=True), ""),
    "a whole text encoder and other shards": (partial(layouts.shard, component=TEXT, keep=True), ""),
    "links into blobs": (layouts.as_links, ""),
    "names of 2022": (layouts.with_old_names, ""),
    "steps_offset 0": (partial(layouts.edit, file=SCHEDULER, steps_offset=0), ""),
    "no steps_offset": (partial(layouts.edit, file=SCHEDULER, drop=("steps_offset",)), 'sampling.sampler = "ddim"'),
    "lu, sigma_min, heun": (
        partial(layouts.edit, file=SCHEDULER, _class_name="DPMSolverMultistepScheduler", use_lu_lambdas=True,
                final_sigmas_type="sigma_min", solver_type="heun"), "",
    ),
    "before 0.9": (
        partial(layouts.edit, file="unet/config.json", _diffusers_version="0.6.0"),
        "sampling.width = 32\nsampling.height = 32",
    ),
}  # fmt: skip


EXPORTED = ("shards",)  # the others by the modules, which is quicker


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in EXPORTED else []) for case in EQUAL]
)
def test_layouts_whose_pictures_are_diffusers(case: str, tiny: Path, tmp_path: Path) -> None:
    change, recipe = EQUAL[case]
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    change(model)
    plan = planned(model, recipe)
    drawn = original.draw(plan.drawing(1).open(), plan.reference, plan.original.size, [PROMPT], [SEED])
    plainly = _plainly(model, plan)
    if plainly is not None:
        assert np.abs(drawn - plainly).max() < 1e-4  # the original is what its user has
    assert drawn.std() > 0.01
    run = _graphs(plan, tmp_path) if case in EXPORTED else _modules(plan)
    assert np.abs(_by_our_sampler(plan, run) - drawn).max() < 1e-4


def _plainly(model: Path, plan: Plan) -> Any:
    """The picture by the checkpoint as it lies there, where diffusers loads it so; no code of ours but its settings."""
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            model, variant=plan.recipe.model.variant, local_files_only=True, safety_checker=None
        )
    except (OSError, ValueError):
        return None  # it loads one variant throughout
    name, settings = original.scheduler_for(plan.reference) or ("", {})
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    width, height = plan.original.size
    return pipe(
        PROMPT, width=width, height=height, num_inference_steps=plan.reference.steps, output_type="np",
        guidance_scale=plan.reference.guidance_scale, generator=torch.Generator().manual_seed(SEED),
    ).images  # fmt: skip


Run = Callable[..., Any]


def _graphs(plan: Plan, folder: Path) -> dict[str, Run]:
    """The exported components."""
    import onnxruntime

    made = {}
    for name in plan.checkpoint.architecture.components:
        contract = write_component(plan.checkpoint, name, plan.original.sizes, folder)
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")

        def run(*given: Any, session: Any = session, specs: Any = contract.inputs) -> Any:
            return session.run(None, {spec.name: value for spec, value in zip(specs, given, strict=True)})[0]

        made[name] = run
    return made


def _modules(plan: Plan) -> dict[str, Run]:
    """What is exported, before it is: the empty modules with the tensors that an export would give them."""
    checkpoint, made = plan.checkpoint, {}
    for name, source in checkpoint.architecture.components.items():
        module, weights = empty_module(checkpoint, source.folder), checkpoint.weights(source.folder)
        for key, parameter in list(module.named_parameters()):
            weight = find_weight(key, weights)
            assert weight is not None
            owner, _, last = key.rpartition(".")
            read = torch.from_numpy(weight.read().reshape(tuple(parameter.shape)))
            setattr(module.get_submodule(owner), last, torch.nn.Parameter(read, requires_grad=False))

        def run(*given: Any, module: Any = module, call: Any = source.call) -> Any:
            with torch.no_grad():
                return call(module, *map(torch.from_numpy, given)).numpy()

        made[name] = run
    return made


def _by_our_sampler(plan: Plan, run: dict[str, Run]) -> Any:
    """The picture as a bundle draws it."""
    text = run["text_encoder"](_tokens(plan))

    def evaluate(x: Any, timestep: float, both: bool) -> Any:
        batch = np.concatenate([x, x]) if both else x
        out = run["denoiser"](batch, np.array([timestep], np.float32), text[-len(batch) :])
        return (out[1:], out[:1]) if both else (out, None)

    sampling = plan.sampling
    schedule = sampling.lay()
    noise = torch.randn((1, *plan.original.image.latent_shape), generator=torch.Generator().manual_seed(SEED)).numpy()
    x = noise * np.float32(initial_scale(sampling.noise, schedule, sampling.sampler))
    denoise = Guided(sampling.noise, schedule, evaluate, sampling.guidance())
    *_, x = sample(sampling.sampler, denoise, x, schedule.sigmas)
    latent = x * np.float32(final_scale(sampling.noise, schedule) / plan.original.image.scaling_factor)
    return np.clip(run["vae_decoder"](latent) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


def _tokens(plan: Plan) -> Any:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(plan.checkpoint.root / "tokenizer")
    length = plan.original.sizes["text_length"]
    return np.array(tokenizer(["", PROMPT], padding="max_length", truncation=True, max_length=length).input_ids)


def unet(**keys: Any) -> Change:
    return partial(layouts.edit, file="unet/config.json", **keys)


def vae(**keys: Any) -> Change:
    return partial(layouts.edit, file="vae/config.json", **keys)


REFUSED: dict[str, tuple[Change, str]] = {
    "conditioned on a class": (unet(num_class_embeds=10), "num_class_embeds: it is conditioned on a class"),
    "an added condition": (unet(addition_embed_type="text_time"), "addition_embed_type"),
    "an input for guidance": (unet(time_cond_proj_dim=32), "time_cond_proj_dim: it takes the guidance scale"),
    "9 input channels": (unet(in_channels=9), "in_channels: it takes more than latents"),
    "8 input channels": (unet(in_channels=8), "in_channels: it takes more than latents"),
    "a learned variance": (unet(out_channels=8), "out_channels: it predicts more than noise"),
    "widths by block": (unet(cross_attention_dim=[32, 32]), "cross_attention_dim"),
    "a projected text": (unet(encoder_hid_dim=64, encoder_hid_dim_type="text_proj"), "encoder_hid_dim"),
    "another text encoder's width": (unet(cross_attention_dim=48), "text_encoder.*another shape"),
    "unknown blocks": (unet(down_block_types=["NoSuchBlock", "DownBlock2D"]), "unet: it cannot be compiled"),
    "other weights than the config's": (unet(layers_per_block=2), "no tensor for parameter"),
    "an autoencoder without levels": (
        several(partial(layouts.edit, file="model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"]),
                vae(_class_name="AsymmetricAutoencoderKL"),
                partial(layouts.edit, file="vae/config.json", drop=("block_out_channels",))),
        "block_out_channels",
    ),
    "a size that is none": (unet(sample_size="big"), "sample_size"),
    "scaling_factor 0": (vae(scaling_factor=0), "scaling_factor"),
    "no model_max_length": (
        partial(layouts.edit, file="tokenizer/tokenizer_config.json", drop=("model_max_length",)), "model_max_length",
    ),
    "tokens beyond the embedding": (
        partial(layouts.edit, file="text_encoder/config.json", vocab_size=100), "no embedding for|vocab_size",
    ),
    "pickles alone": (partial(layouts.pickle_only, component=UNET), "pickled weights are never loaded"),
    "a shard is missing": (
        several(partial(layouts.shard, component=UNET),
                lambda folder: next((folder / UNET).glob("*-00002-of-*")).unlink()), "shards are missing",
    ),
    "another scheduler": (partial(layouts.edit, file=SCHEDULER, _class_name="EDMEulerScheduler"), "_class_name"),
    "thresholding": (
        partial(layouts.edit, file=SCHEDULER, thresholding=True), "scheduler_config.json: thresholding",
    ),
    "scheduler keys of a wrong type": (partial(layouts.edit, file=SCHEDULER, beta_start="much"), "beta_start"),
    "a config that is no JSON": (lambda folder: (folder / SCHEDULER).write_text("{"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_layouts_that_the_plan_refuses_with_the_reason(case: str, tiny: Path, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    change(model)
    with pytest.raises(SlipcastError, match=f"(?s){says}"):
        planned(model)


def test_a_variant_that_no_component_has(tiny: Path) -> None:
    with pytest.raises(SlipcastError, match=r"model\.variant"):
        planned(tiny, 'model.variant = "fp16"')


def test_the_plan_says_which_files_it_took(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    layouts.rename(model, VAE, "fp16")
    layouts.shard(model, UNET)
    (tmp_path / "p.txt").write_text(f"{PROMPT}\na blue star\n")
    done = call_cli("compile", "model", "--prompts", "p.txt", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in done.stdout
    assert "unet/diffusion_pytorch_model-00001-of-00002.safetensors and 1 more" in done.stdout
    assert not list(tmp_path.glob("*.toml"))


def test_the_digest_is_of_the_files_that_are_taken(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    layouts.add_other(model, UNET, "ema")
    plain, ema = planned(model).checkpoint.sha256, planned(model, 'model.variant = "ema"').checkpoint.sha256
    assert plain == planned(tiny).checkpoint.sha256
    assert ema != plain


def test_shards_of_a_variant_that_is_not_whole_are_passed_over(tiny: Path, tmp_path: Path) -> None:
    """A download by pattern has the index of every variant, and the shards of one."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    layouts.rename(model, VAE, "fp16")
    plain = layouts.STEM[VAE]
    (model / VAE / f"{plain}.safetensors.index.json").write_text(
        '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}'
    )
    assert planned(model).checkpoint.chosen_weights(VAE).variant == "fp16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_with_local_configs(
    dtype: torch.dtype, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the directory is of which it was made, and made once."""
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    for component in (UNET, VAE, TEXT):
        layouts.cast(source, component, dtype)
    file = tmp_path / "model.safetensors"
    layouts.write_single_file(source, file)
    layouts.without_weights(tiny, tmp_path / "configs")
    plan = planned(file, 'model.config = "configs"')
    assert np.abs(_picture(plan) - _picture(planned(source))).max() < 1e-5
    (made,) = (tmp_path / "artifacts/models").iterdir()
    before = made.stat().st_mtime_ns
    assert planned(file, 'model.config = "configs"').checkpoint.root == made
    assert made.stat().st_mtime_ns == before
    with pytest.raises(SlipcastError, match=r"model\.config"):
        planned(file)
    with pytest.raises(SlipcastError, match="no model_index"):
        planned(file, 'model.config = "nowhere"')


def _picture(plan: Plan) -> Any:
    return original.draw(plan.drawing(1).open(), plan.reference, plan.original.size, [PROMPT], [SEED])


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "ckpt"])
@pytest.mark.parametrize("command", [("init",), ("compile", "--dry-run", "--prompts")])
def test_a_single_file_is_refused_with_the_next_step(suffix: str, command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / f"model.{suffix}").write_bytes(b"\0" * 64)
    (tmp_path / "p.txt").write_text("a\nb\n")
    first, *options = command
    order = [f"model.{suffix}", *options, "p.txt"]
    done = call_cli(first, *order, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "expected: a diffusers directory" in done.stderr
