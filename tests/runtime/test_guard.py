"""The guard in the pipeline: prompts out of the family are told, refused, or drawn by another denoiser."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from bundles import list_files
from click.testing import CliRunner
from fakes import LENGTH, WIDTH, Fakes, write_fake
from safetensors.numpy import save_file

from slipcast.cli.main import cli
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.guard import NEIGHBOURS, embed, nearness
from slipcast.run.pipeline import Pipeline, load
from slipcast.run.tokenizer import PromptTokenizer

TABLE = "guard.safetensors"
FAMILY = [f"a {size} {color} circle" for size in ("small", "large") for color in ("red", "blue", "green")]
MEMBER, STRANGER = FAMILY[0], "two green foxes"
SPECIAL = np.array([654, 655])


def _embed(prompts: list[str]) -> Any:
    ids = PromptTokenizer(fakes.TOKENIZER, LENGTH, 655)(prompts)
    return embed(ids, fakes.encode({"input_ids": ids})["hidden"], SPECIAL)


LIMIT = 1.1 * float(nearness(_embed(FAMILY), _embed([MEMBER])[0]))


def _guarded(root: Path, policy: str = "warn", **changes: Any) -> Path:
    """The fake bundle with a guard; `changes` replace keys of its record."""
    write_fake(root)
    save_file({"embeddings": _embed(FAMILY)}, root / TABLE)
    record = {
        "policy": policy, "table": TABLE, "shape": [len(FAMILY), WIDTH], "input": "context", "threshold": 1e-3,
        "false_alarms": 0.2,
    } | changes  # fmt: skip
    document = json.loads((root / "manifest.json").read_text()) | {"guard": record}
    document["requires"] = [] if policy == "warn" else ["guard"]
    if policy == "fallback":
        for holder in (document, *document["targets"]):
            holder["components"]["denoiser_fallback"] = holder["components"]["denoiser"]
        for target in document["targets"]:
            target["components"]["denoiser_fallback"] = fakes.engine_files(target["engine"], "denoiser_fallback")
        fakes.write_engines(root, "denoiser_fallback")
        document["reference"] = document["sampling"] | {"steps": 4, "guidance_scale": 2.0}
    return _rewrite(root, document)


def _rewrite(root: Path, document: dict[str, Any]) -> Path:
    (root / "manifest.json").write_text(json.dumps(document | {"files": list_files(root)}))
    return root


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    found = fakes.install(monkeypatch)

    def other(arrays: Any) -> dict[str, Any]:
        return {"prediction": fakes.predict(arrays)["prediction"] * np.float32(0.5)}

    found.functions["denoiser_fallback"] = other
    return found


def _latents(pipe: Pipeline, prompts: Any, seed: Any, **request: Any) -> Any:
    return pipe(prompts, seed=seed, output_type="latent", **request).images


def test_an_embedding_is_the_mean_over_words() -> None:
    ids = np.array([[654, 7, 8, 655, 655], [654, 655, 655, 655, 655]])
    hidden = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    found = embed(ids, hidden, SPECIAL)
    for row, mean in zip(found, (hidden[0, 1:3].mean(0), hidden[1].mean(0)), strict=True):  # no words: all tokens
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5)


def test_the_distance_is_the_mean_to_the_nearest() -> None:
    family = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    assert nearness(family, np.array([1, 0], np.float32)) == pytest.approx((0 + 2 * 2**0.5) / NEIGHBOURS)


def test_strangers_are_told_apart_and_drawn_all_the_same(
    tmp_path: Path, engines: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _latents(load(write_fake(tmp_path / "plain")), [MEMBER, STRANGER], 3)
    pipe = load(_guarded(tmp_path / "b", threshold=float(nearness(_embed(FAMILY), _embed([MEMBER])[0]))))
    with caplog.at_level(logging.WARNING):
        out = pipe([MEMBER, STRANGER], seed=3, output_type="latent")
    np.testing.assert_array_equal(out.images, expected)
    member, stranger = out.guard
    assert (member.in_family, stranger.in_family, stranger.fallback) == (True, False, False)
    assert member.distance == member.threshold < stranger.distance
    assert f"{STRANGER!r} is not of the family" in caplog.text and repr(MEMBER) not in caplog.text
    assert len(pipe([MEMBER, STRANGER], num_images_per_prompt=2, output_type="latent").guard) == 4
    assert load(write_fake(tmp_path / "none"))(MEMBER, output_type="latent").guard == ()


def test_a_stranger_is_refused_before_the_denoiser_runs(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_guarded(tmp_path / "b", "refuse", threshold=LIMIT))
    with pytest.raises(RequestError, match="not of the family") as caught:
        pipe([MEMBER, STRANGER])
    assert f"a prompt within a distance of {LIMIT:.3g}" in str(caught.value) and engines.count("denoiser") == 0
    assert pipe(MEMBER, negative_prompt=STRANGER, output_type="latent").guard[0].in_family
    assert not pipe(STRANGER, guard="warn", output_type="latent").guard[0].in_family


def test_each_image_is_drawn_where_it_belongs_and_as_if_alone(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_guarded(tmp_path / "b", "fallback", threshold=LIMIT))
    out = pipe([STRANGER, MEMBER, STRANGER], seed=3, negative_prompt="blue", output_type="latent")
    assert [verdict.fallback for verdict in out.guard] == [True, False, True]
    assert engines.count("denoiser") == pipe.manifest.sampling.steps and engines.count("denoiser_fallback") == 4
    for i, prompt in enumerate((STRANGER, MEMBER, STRANGER)):
        alone = _latents(pipe, prompt, 3 + i, negative_prompt="blue")
        np.testing.assert_array_equal(alone[0], out.images[i])
    same = _latents(pipe, STRANGER, 3, negative_prompt="blue", guard="warn")
    assert np.abs(same - out.images[:1]).max() > 0.01  # another denoiser, and another sampling


def test_what_a_call_asks_for_holds_for_both_denoisers(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_guarded(tmp_path / "b", "fallback", threshold=LIMIT))
    given = np.random.default_rng(0).normal(size=(2, *fakes.LATENT)).astype(np.float32)
    seen: list[tuple[int, int]] = []
    out = pipe(
        [STRANGER, MEMBER], latents=given, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
        callback_on_step_end=lambda _, step, __, found: seen.append((step, len(found["latents"]))),
    )  # fmt: skip
    assert seen == [(0, 1), (1, 1), (2, 1)] * 2
    assert all(len(call.sample) == 1 for name, call in engines.calls if name.startswith("denoiser"))
    alone = _latents(pipe, STRANGER, 0, latents=given[:1], num_inference_steps=3, guidance_scale=1.0)
    np.testing.assert_array_equal(out.images[:1], alone)


def test_the_other_denoiser_is_opened_when_it_is_needed(tmp_path: Path, engines: Fakes) -> None:
    with load(_guarded(tmp_path / "b", "fallback", threshold=LIMIT)) as pipe:
        pipe(MEMBER)
        assert "denoiser_fallback" not in engines.open_now
        pipe(STRANGER)
        pipe(STRANGER)
        assert [name for name, _ in engines.opened].count("denoiser_fallback") == 1
    assert engines.open_now == []
    pipe = load(tmp_path / "b", residency="sequential")
    pipe(STRANGER)
    assert engines.open_now == []


@pytest.mark.parametrize(
    ("policy", "asked", "legal"),
    [("refuse", "fallback", "warn or refuse"), ("warn", "off", "warn or refuse"), (None, "refuse", "warn")],
)
def test_policies_that_a_bundle_cannot_follow(
    tmp_path: Path, engines: Fakes, policy: str | None, asked: Any, legal: str
) -> None:
    pipe = load(_guarded(tmp_path / "b", policy) if policy else write_fake(tmp_path / "b"))
    with pytest.raises(RequestError, match="guard is not usable") as caught:
        pipe(MEMBER, guard=asked)
    assert caught.value.expected == legal and engines.calls == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"embeddings": np.zeros((5, WIDTH), np.float32)}, "not the table"),
        ({"embeddings": np.zeros((6, WIDTH), np.float64)}, "not the table"),
        ({"other": np.zeros((6, WIDTH), np.float32)}, "not the table"),
        ({"embeddings": np.full((6, WIDTH), np.nan, np.float32)}, "NaN"),
    ],
)
def test_row_13_a_table_that_is_not_the_manifests(
    tmp_path: Path, engines: Fakes, table: dict[str, Any], says: str
) -> None:
    root = _guarded(tmp_path / "b")
    save_file(table, root / TABLE)
    with pytest.raises(ArtifactError, match=says):
        load(_rewrite(root, json.loads((root / "manifest.json").read_text())))


def test_row_02_a_damaged_table_is_found_before_it_is_read(tmp_path: Path, engines: Fakes) -> None:
    root = _guarded(tmp_path / "b")
    data = bytearray((root / TABLE).read_bytes())
    data[-1] ^= 1
    (root / TABLE).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{TABLE}: content differs"):
        load(root)


def test_row_14_embeddings_of_another_width(tmp_path: Path, engines: Fakes) -> None:
    with pytest.raises(ArtifactError, match=r"guard\.shape"):
        load(_guarded(tmp_path / "b", shape=[len(FAMILY), WIDTH + 1]))


@pytest.mark.parametrize(
    ("policy", "changes", "says"),
    [
        ("refuse", {"requires": []}, "named under requires"),
        ("warn", {"requires": ["guard"]}, "named under requires"),
        ("refuse", {"guard": None}, "named under requires"),
        ("fallback", {"guard": None, "requires": []}, "belongs to a guard"),
    ],
)
def test_manifests_that_contradict_themselves(tmp_path: Path, policy: str, changes: dict[str, Any], says: str) -> None:
    root = _guarded(tmp_path / "b", policy)
    with pytest.raises(ArtifactError, match=says):
        load(_rewrite(root, json.loads((root / "manifest.json").read_text()) | changes))


def test_an_input_that_no_encoder_gives(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no text encoder gives"):
        load(_guarded(tmp_path / "b", input="sample"))


def test_the_command_line(tmp_path: Path, engines: Fakes) -> None:
    root, picture = str(_guarded(tmp_path / "b", "refuse", threshold=LIMIT)), str(tmp_path / "a.png")
    assert (
        f"guard        refuse beyond a distance of {LIMIT:.3g}, 6 prompts"
        in CliRunner().invoke(cli, ["inspect", root]).output
    )
    run = ["run", root, "-o", picture, "--json", "--prompt"]
    [verdict] = json.loads(CliRunner().invoke(cli, [*run, MEMBER]).stdout)["guard"]
    assert verdict["in_family"] and set(verdict) == {"distance", "threshold", "in_family", "fallback"}
    assert isinstance(CliRunner().invoke(cli, [*run, STRANGER]).exception, RequestError)
    [verdict] = json.loads(CliRunner().invoke(cli, [*run, STRANGER, "--guard", "warn"]).stdout)["guard"]
    assert not verdict["in_family"]
