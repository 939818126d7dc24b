"""manifest.py and validation.py: what is accepted, and that everything else is refused with one readable error."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
from bundles import MODEL, TABLE, WEIGHTS, document
from hypothesis import given
from hypothesis import strategies as st

from slipcast.bundle.manifest import read_manifest
from slipcast.bundle.validation import MAX_JSON_BYTES, bundle_path, colliding, parse_json
from slipcast.errors import ArtifactError

FILES = [{"path": path, "size": 7, "sha256": "a" * 64} for path in (MODEL, WEIGHTS, TABLE)]
VALID = document(FILES)


def changed(value: Any, *where: str | int, base: dict[str, Any] = VALID) -> bytes:
    """The valid manifest with one value replaced."""
    result = copy.deepcopy(base)
    target: Any = result
    for part in where[:-1]:
        target = target[part]
    target[where[-1]] = value
    return json.dumps(result).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(data)
    assert caught.value.exit_code == 4
    assert len(str(caught.value)) < 4000, "an error is for a person to read"
    return str(caught.value)


def test_valid_manifest_survives_a_round_trip():
    manifest = read_manifest(json.dumps(VALID).encode())
    assert manifest.components["denoiser"].inputs[0].shape == (1, 4, 8, 8)
    assert manifest.sampling.noise.num_train_timesteps == 1000
    assert read_manifest(manifest.to_json()) == manifest


# --- row 10 ----------------------------------------------------------------------------------------------------------


def test_row_10_newer_major_needs_a_newer_runtime():
    # also when all the rest is unknown to this version
    message = refusal(b'{"schema_version": "2.0", "everything": "else"}')
    assert "newer runtime" in message
    assert "schema 1.0" in message
    assert "schema 2.0" in message
    assert "pip install" in message
    assert "older runtime" in refusal(changed("0.9", "schema_version"))


@pytest.mark.parametrize(
    "where",
    [
        ("novelty",),
        ("image", "novelty"),
        ("sampling", "noise", "novelty"),
        ("targets", 0, "novelty"),
        ("files", 1, "novelty"),
    ],
)
def test_row_10_newer_minor_loads_with_a_warning(where: tuple[str | int, ...]):
    data = changed({"deep": [1]}, *where, base={**VALID, "schema_version": "1.7"})
    with pytest.warns(UserWarning, match=r"1\.7"):
        manifest = read_manifest(data)
    assert manifest.name == "tiny"


@pytest.mark.parametrize(
    ("key", "value"), [("guidance_interval", [0.3, 5.0]), ("guidance_reuse", 2)], ids=lambda value: str(value)
)
def test_left_out_guidance_has_to_be_required(key: str, value: Any) -> None:
    asked = json.loads(changed(value, "sampling", key))
    assert f"{key} has to be named under requires" in refusal(json.dumps(asked).encode())
    sampling = read_manifest(changed([key], "requires", base=asked)).sampling
    assert sampling.requires == (key,)
    assert getattr(sampling.guidance(7.0), key.removeprefix("guidance_")) == getattr(sampling, key)
    assert (sampling.guidance(7.0).scale, sampling.guidance().scale) == (7.0, 1.0)


@pytest.mark.parametrize("interval", [[5.0, 0.3], [-1.0, 2.0], [1.0, 1.0]])
def test_an_interval_that_is_none(interval: list[float]) -> None:
    assert "rising" in refusal(changed(interval, "sampling", "guidance_interval"))


def test_row_10_a_feature_that_pictures_depend_on_is_not_ignored():
    assert "newer runtime" in refusal(changed(["colour_of_tomorrow"], "requires"))
    assert "requires" in refusal(changed([[]], "requires"))
    assert "requires" in refusal(changed("colour_of_tomorrow", "requires"))


def test_row_10_same_version_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_manifest(json.dumps(VALID).encode())


@pytest.mark.filterwarnings("ignore:manifest.json has schema")
def test_row_10_newer_minor_is_still_checked():
    newer = {**VALID, "schema_version": "1.7", "novelty": 1}
    assert "image.width" in refusal(changed("8", "image", "width", base=newer))
    assert "bad path" not in refusal(changed("../x", "files", 2, "path", base=newer))
    assert "files[2].path" in refusal(changed("../x", "files", 2, "path", base=newer))


@pytest.mark.parametrize(
    "version", [None, 1, 1.0, "1", "1.0.0", "1.x", "", "-1.0", "1.999999", "١.٠", True, ["1", "0"]]
)
def test_row_10_malformed_version(version: object):
    assert "MAJOR.MINOR" in refusal(changed(version, "schema_version"))


# --- row 11 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate key"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uD800": 1}', "surrogate"),
        ('\ufeff{"a": 1}'.encode(), "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"", "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'"' + b" " * MAX_JSON_BYTES + b'"', "too large"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
    ],
)
def test_row_11_json_that_is_not_json(data: bytes, words: str):
    message = refusal(data)
    assert "manifest.json" in message
    assert words in message


def test_row_11_what_is_allowed_is_read():
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": [[[1.5, null]]]}', "x") == {
        "a": "\U0001f600",
        "b": [[[1.5, None]]],
    }
    assert parse_json(b"[" * 64 + b"]" * 64, "x")
    with pytest.raises(ArtifactError, match="nested"):
        parse_json(b"[" * 65 + b"]" * 65, "x")
    with pytest.raises(ArtifactError, match="too large"):
        parse_json(b"[1, 2]", "x", limit=5)


# --- row 12 and strictness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        (("head_retention_ration",), "head_retention_ratio"),
        (("image", "widht"), "width"),
        (("targets", 0, "precison"), "precision"),
        (("sampling", "noise", "beta_strat"), "beta_start"),
        (("components", "denoiser", "output"), "outputs"),
        (("components", "denoiser", "inputs", 0, "dytpe"), "dtype"),
    ],
)
def test_row_12_unknown_key_gets_a_did_you_mean(where: tuple[str | int, ...], meant: str):
    message = refusal(changed(1, *where))
    assert f"unknown key {where[-1]!r}, did you mean {meant!r}?" in message


def test_row_12_unknown_key_without_a_neighbour():
    message = refusal(changed(1, "zzzzzz"))
    assert "unknown key 'zzzzzz'" in message
    assert "did you mean" not in message


def test_row_12_a_huge_key_is_shown_in_part():
    assert "unknown key 'zzz" in refusal(changed(1, "z" * 1_000_000))


def test_errors_show_no_records_and_no_escapes():
    message = refusal(changed([{"secret": 1}], "family", base={**VALID, "\x1b[31mred": 1}))
    assert "family:" in message
    assert "secret" not in message
    assert "\x1b" not in message


def test_width_and_height_fit_the_factor():
    for key in ("width", "height"):
        image = {**VALID["image"], "factor": 8, key: 20}
        assert "multiples of 8" in refusal(changed(image, "image"))


def test_all_problems_are_reported_at_once():
    data = changed("8", "image", "width", base={**VALID, "name": "", "zzz": 1})
    message = refusal(data)
    assert "name:" in message
    assert "zzz:" in message
    assert "image.width:" in message


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ("8", ("image", "width")),
        (True, ("image", "width")),
        (8.5, ("image", "width")),
        (0, ("image", "width")),
        (-1, ("files", 0, "size")),
        ("A" * 64, ("files", 0, "sha256")),
        ("a" * 64 + "\n", ("files", 0, "sha256")),
        ("x" * 1_000_000, ("files", 0, "sha256")),
        ("float64", ("components", "denoiser", "inputs", 0, "dtype")),
        (None, ("targets",)),
        ([], ("targets",)),
        (0, ("head_retention_ratio",)),
        (1.5, ("head_retention_ratio",)),
        ({"prediction": "eps"}, ("sampling", "noise")),
        ({"beta_schedule": "steep"}, ("sampling", "noise")),
        ({"num_train_timesteps": 10**9}, ("sampling", "noise")),
        ({"num_train_timesteps": 0}, ("sampling", "noise")),
        ({"beta_start": "0.1"}, ("sampling", "noise")),
        ({"trained_betas": [0.1, None]}, ("sampling", "noise")),
        ({"predictions": 1}, ("sampling", "noise")),
        ({"timestep_spacing": "trailling"}, ("sampling", "noise")),
        ({"trained_betas": 0.1}, ("sampling", "noise")),
        ([], ("sampling", "noise")),
        (8, ("image", "overlap")),
        (3, ("image", "factor")),
    ],
)
def test_wrong_values_are_refused_where_they_are(value: object, where: tuple[str | int, ...]):
    message = refusal(changed(value, *where))
    assert str(where[0]) in message
    if where[-1] != "factor":  # that rule is about width and height
        assert str(where[-1]) in message


def test_missing_key_is_named():
    data = json.dumps({key: value for key, value in VALID.items() if key != "sampling"}).encode()
    assert "sampling: missing" in refusal(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": FILES[1:]}, f"{MODEL!r} is used but not listed"),
        ({"files": [FILES[0], FILES[2]]}, f"{WEIGHTS!r} is used but not listed"),
        ({"components": {"vae_decoder": VALID["components"]["denoiser"]}}, "components: no denoiser"),
        ({"components": {**VALID["components"], "vae_decoder": VALID["components"]["denoiser"]}}, "engines for"),
        ({"targets": VALID["targets"] * 2}, "two targets"),
        ({"quality": {"images": 4, "noise_floor": {}}}, "differ from those of the default target"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], words: str):
    message = refusal(json.dumps({**VALID, **change}).encode())
    assert "(top level): " in message or words.startswith("components: ")
    assert words in message


# --- row 7 -----------------------------------------------------------------------------------------------------------

BAD_PATHS = [
    "", ".", "..", "../x.bin", "a/../x.bin", "a/..", "./x.bin", "a//x.bin", "a/", "/x.bin", "//host/share/x.bin",
    "\\\\host\\share\\x.bin", "a\\x.bin", "C:/x.bin", "c:x.bin", "x\0.bin", "x\n.bin", "x\x7f.bin", "a/x.bin:stream",
    "x?.bin", "con", "a/NUL.bin", "com1.json", "x.bin.", "x.bin ", ".. /x.bin", "e\u0301.bin", "x\u200b.bin",
    "\u202ex.bin", "\ud800.bin", "*/_ORT_MEM_ADDR_/*", "x/" * 300 + "x", "\u00e9" * 128,
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=ascii)
def test_row_07_paths_that_leave_the_bundle(path: str):
    with pytest.raises(ValueError, match="path"):
        bundle_path(path)
    if path != "\ud800.bin":  # cannot be written as UTF-8; refused before it is a path
        assert "files[2].path" in refusal(changed(path, "files", 2, "path"))


@pytest.mark.parametrize("path", ["/x.bin", "//host/share/x.bin", "C:/x.bin", "c:x.bin"])
def test_row_07_absolute_paths_are_called_so(path: str):
    with pytest.raises(ValueError, match="absolute"):
        bundle_path(path)


@pytest.mark.parametrize("path", ["x.bin", "a/b.c/d", "é.json", "..a/b..c", "console.json", "a b.txt", "-x", "x" * 200])
def test_row_07_good_paths(path: str):
    assert bundle_path(path) == path


@pytest.mark.parametrize(
    "pair",
    [
        ("a.bin", "a.bin"),
        ("a.bin", "A.bin"),
        ("stra\u00dfe", "STRASSE"),
        ("\u00e9", "e\u0301"),
        ("\ufb01le", "file"),
        ("\u0345x", "\u03b9x"),
        ("a", "a/x"),
        ("a/x", "a"),
        ("A/x", "a"),
        ("A/x", "a/y"),
        ("a/b/x", "a/B/y"),
    ],
)
def test_row_07_names_that_collide(pair: tuple[str, str]):
    assert colliding(["z", *pair]) is not None
    assert colliding(pair[:1]) is None


def test_row_07_names_that_do_not_collide():
    assert colliding(["a/x", "a/y", "a/b/x", "x", "b"]) is None


def test_row_07_collision_in_a_manifest():
    twice = [*FILES, {**FILES[2], "path": TABLE.upper()}]
    assert "collide" in refusal(json.dumps({**VALID, "files": twice}).encode())
    own = [*FILES, {**FILES[2], "path": "Manifest.json"}]
    assert "collide" in refusal(json.dumps({**VALID, "files": own}).encode())


# --- fuzzing ---------------------------------------------------------------------------------------------------------

GOOD_BYTES = json.dumps(VALID).encode()


@pytest.mark.filterwarnings("ignore:manifest.json has schema")
@given(st.lists(st.tuples(st.integers(0, len(GOOD_BYTES) - 1), st.integers(0, 255)), max_size=8))
def test_row_11_flipped_bytes_never_raise_anything_else(flips: list[tuple[int, int]]):
    data = bytearray(GOOD_BYTES)
    for position, value in flips:
        data[position] = value
    try:
        manifest = read_manifest(bytes(data))
    except ArtifactError as error:
        str(error).encode()  # whatever was in the file, its error can be printed
    else:
        assert read_manifest(manifest.to_json()) == manifest


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*VALID, "path", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore:manifest.json has schema")
@given(st.sampled_from(sorted(VALID)), _JSON)
def test_any_value_for_any_key_never_raises_anything_else(key: str, value: object):
    try:
        read_manifest(json.dumps({**VALID, key: value}).encode())
    except ArtifactError as error:
        str(error).encode()
