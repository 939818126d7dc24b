"""Factors that lose the least over the family's inputs, kept where the engine gains by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compiler.passes.tiny import Bench, example, tiny_plan
from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.model.layers import attention_layers, linear_layers
from slipcast_compiler.passes import low_rank, micro
from slipcast_compiler.passes.apply import Rewritten
from slipcast_compiler.passes.low_rank import factorise
from slipcast_compiler.passes.micro import Gain, input_shapes, measure
from slipcast_compiler.recipe.passes import LowRank
from slipcast_compiler.recipe.targets import TargetTable

Array = np.ndarray[Any, Any]
ONNXRUNTIME = TargetTable(engine="onnxruntime")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    return Bench(tiny_plan(folder), folder)


def _case(outputs: int = 40, inputs: int = 48, rank: int = 48) -> tuple[Array, Array, Array]:
    """A weight; inputs [samples, inputs] of unlike size along unlike directions; their second moment."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, rank)) * np.geomspace(1, 1e-3, rank) @ rng.standard_normal((rank, inputs))
    return rng.standard_normal((outputs, inputs)).astype(np.float32), z, (z.T @ z / len(z)).astype(np.float32)


def _lost(weight: Array, found: Array, z: Array) -> float:
    """Of the output's energy."""
    wanted = z @ weight.T
    return float(np.square(z @ found.T - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 48), (96, 48), (24, 48)])
@pytest.mark.parametrize("energy", [0.9, 0.99, 0.999])
def test_factors_keep_the_energy_that_they_say(outputs: int, inputs: int, energy: float) -> None:
    weight, z, moment = _case(outputs, inputs)
    first, second, kept = factorise(weight, moment, energy, "layer")
    rank = len(first)
    assert first.shape == (rank, inputs)
    assert second.shape == (outputs, rank)
    assert rank % low_rank.MULTIPLE == 0
    assert kept >= energy
    assert _lost(weight, second @ first, z) == pytest.approx(1 - kept, rel=1e-2, abs=1e-6)
    # with one step less it would not have been enough
    left = np.linalg.svd(weight @ z.T, full_matrices=False)[0][:, : max(rank - low_rank.MULTIPLE, 0)]
    assert _lost(weight, left @ left.T @ weight, z) > 1 - energy


def test_the_factors_are_the_textbook_ones() -> None:
    """U_r S_r V_r^T H^(-1/2), of W H^(1/2) with the symmetric root."""
    weight, _, moment = _case()
    moment = moment + 1e-3 * np.eye(len(moment), dtype=np.float32)
    first, second, _ = factorise(weight, moment, 0.97, "layer")
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    r = len(first)
    np.testing.assert_allclose(second @ first, u[:, :r] * s[:r] @ vt[:r] @ inverse, atol=1e-4)


def test_they_lose_less_than_those_that_do_not_know_the_inputs() -> None:
    weight, z, moment = _case()
    first, second, _ = factorise(weight, moment, 0.9, "layer")
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    r = len(first)
    assert _lost(weight, second @ first, z) < 0.2 * _lost(weight, u[:, :r] * s[:r] @ vt[:r], z)


def test_inputs_of_few_directions_are_no_loss() -> None:
    weight, z, moment = _case(rank=8)
    first, second, _ = factorise(weight, moment, 0.999999, "layer")
    assert len(first) == 8
    assert _lost(weight, second @ first, z) < 1e-6


def test_a_layer_that_is_never_reached() -> None:
    weight, _, moment = _case()
    first, second, energy = factorise(weight, np.zeros_like(moment), 0.99, "layer")
    assert not (second @ first).any()
    assert energy == 1


@pytest.mark.parametrize("bad", ["weight", "moment"])
def test_row_33_what_is_not_a_number_names_the_layer(bad: str) -> None:
    weight, _, moment = _case()
    (weight if bad == "weight" else moment)[1, 2] = np.nan
    with pytest.raises(NumericalError, match=r"down_blocks\.0\.proj: .*decomposed"):
        factorise(weight, moment, 0.99, "down_blocks.0.proj")


def test_row_33_a_decomposition_that_does_not_converge_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", diverge)
    weight, _, moment = _case()
    with pytest.raises(NumericalError, match=r"(?s)down_blocks\.0\.proj: .*SVD did not converge.*low_rank\.protect"):
        factorise(weight, moment, 0.99, "down_blocks.0.proj")


def test_shapes_are_those_of_one_image(bench: Bench) -> None:
    shapes = input_shapes(bench.denoiser.module, bench.task.evaluate)
    here = "down_blocks.0.attentions.0"
    assert shapes[f"{here}.proj_in"] == (2, 32, 8, 8)  # guided: two rows
    assert shapes[f"{here}.transformer_blocks.0.attn1.to_q"] == (2, 64, 32)
    assert shapes[f"{here}.transformer_blocks.0.attn2.to_k"] == (2, 32, 128)
    assert set(shapes) == {layer.name for layer in linear_layers(bench.denoiser.module)}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(2, 256, 512), (2, 512, 16, 16)])
def test_both_forms_of_a_layer_are_timed_and_sized(engine: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((512, 512), np.float32)
    target = TargetTable(engine=engine)
    gain = measure(target, shape, (whole,), (whole[:8], whole[:, :8]))
    assert gain.speedup >= gain.speedup_low > 0  # which is faster depends on what else the machine does
    assert min(gain.seconds_before, gain.seconds_after) > 0
    assert gain.bytes_before - gain.bytes_after == pytest.approx(4 * (512 * 512 - 2 * 8 * 512), rel=0.1)
    wider = measure(target, shape, (whole,), (whole, whole))
    assert wider.bytes_after > wider.bytes_before


def _gain(speedup: float, low: float | None = None) -> Any:
    return lambda *_: Gain(speedup, 1.0, speedup, low or speedup, 2000, 1000)


def _few_directions(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's inputs lie in eight directions."""

    def moment(name: str) -> Array:
        z = bench.measured.inputs[name].numpy()
        basis = np.random.default_rng(0).standard_normal((8, z.shape[1]))
        z = z[:, :8] @ basis
        return (z.T @ z).astype(np.float32)

    monkeypatch.setattr(bench.measured, "second_moment", moment)


def test_only_what_gains_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _few_directions(bench, monkeypatch)
    for unsure in (_gain(1.0), _gain(1.5, 0.9)):
        monkeypatch.setattr(micro, "measure", unsure)
        untouched, report = bench.run("low_rank", energy=0.99)
        assert untouched.file is None
        assert {layer["why"] for layer in report["layers"].values()} == {"not faster"}
    assert Rewritten(untouched, {"low_rank": report}).manifest_fields() == {"low_rank_layers": ()}
    smaller, _ = bench.run("low_rank", energy=0.99, keep="smaller")
    monkeypatch.setattr(micro, "measure", _gain(1.5))
    faster, report = bench.run("low_rank", energy=0.99)
    assert smaller.shapes() == faster.shapes() != {}
    listed = Rewritten(faster, {"low_rank": report}).manifest_fields()["low_rank_layers"]
    assert {layer.layer for layer in listed} == {name.rpartition(".0.weight")[0] for name in faster.shapes()} - {""}
    assert {(layer.rank, layer.speedup) for layer in listed} == {(8, 1.5)}
    assert all(layer.energy_retained > 0.99 for layer in listed)


def test_protected_layers_stay_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _few_directions(bench, monkeypatch)
    monkeypatch.setattr(micro, "measure", _gain(1.5))
    rewrite, _ = bench.run("low_rank", energy=0.99, protect=["*.attn1.*", "*.ff.*"])
    assert rewrite.shapes()
    assert not [name for name in rewrite.shapes() if ".attn1." in name or ".ff." in name]
    with pytest.raises(RecipeError, match=r"low_rank\.protect"):
        bench.run("low_rank", protect=["*.attn9"])


def test_the_rewritten_denoiser_is_near_the_original(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on inputs that no moment was taken of, and the nearer the more energy is kept."""
    monkeypatch.setattr(micro, "measure", _gain(1.5))
    monkeypatch.setattr(low_rank, "WORTH", 10.0)  # so that every layer is factorised
    errors = []
    with torch.no_grad():
        wanted = bench.load()(*example(1)).sample
        for energy in (0.9, 0.99, 0.9999):
            rewrite, report = bench.run("low_rank", energy=energy)
            assert all(layer["kept"] for layer in report["layers"].values())
            errors.append(float((bench.load(rewrite)(*example(1)).sample - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_after_pruning_heads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lost inputs is left as it is; what lost outputs alone is factorised as it then is."""
    monkeypatch.setattr(micro, "measure", _gain(1.5))
    monkeypatch.setattr(low_rank, "WORTH", 10.0)
    pruned, _ = bench.run("prune_heads", ratio=0.4, criterion="magnitude")
    both, report = bench.run("low_rank", pruned, energy=0.999)
    narrowed = [name[: -len(".weight")] for name in pruned.shapes() if name.endswith(".to_out.0.weight")]
    assert narrowed
    for name in narrowed:
        assert report["layers"][name] == {"kept": False, "why": "an earlier pass removed inputs of it"}
        assert both.shapes()[f"{name}.weight"] == pruned.shapes()[f"{name}.weight"]
    heads = [[layer.heads for layer in attention_layers(bench.load(rewrite))] for rewrite in (pruned, both)]
    assert heads[0] == heads[1]
    with torch.no_grad():
        before, after = (bench.load(rewrite)(*example(1)).sample for rewrite in (pruned, both))
    assert float((after - before).norm() / before.norm()) < 0.03


def test_the_cache_key_has_what_the_measurement_depends_on(bench: Bench) -> None:
    folder = bench.plan.folder
    found = [
        low_rank.reads(tiny_plan(folder, *change).task)
        for change in ((), ("targets.0.engine=openvino",), ("sampling.width=64",), ("sampling.guidance_scale=1.0",))
    ]
    assert all(found.count(each) == 1 for each in found)
    assert not low_rank.needs_profile(LowRank(energy=1.0))
