"""Opening a bundle: every fault of FAULTS.md that loading can meet, on a real tiny bundle."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import MODEL, REPORT, TABLE, WEIGHTS, add_model, list_files, save_external, write_bundle, write_manifest

import slipcast.bundle.reader as bundle_module
from slipcast.bundle.reader import check_digests, file_entries, open_bundle
from slipcast.bundle.validation import MAX_JSON_BYTES
from slipcast.errors import ArtifactError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("template") / "bundle")


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "bundle"))


def refusal(path: Path | str, *words: str, **options: Any) -> str:
    """The message of opening `path`, which has to hold `words`."""
    with pytest.raises(ArtifactError) as caught:
        open_bundle(path, **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    error = caught.value
    assert error.exit_code == 4
    assert error.expected is not None
    assert error.got is not None
    assert error.hint
    return message


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def nothing_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object) -> None:
        pytest.fail("a file was parsed before all of them were checked")

    monkeypatch.setattr(bundle_module, "check_external_data", parsed)
    monkeypatch.setattr(bundle_module, "read_header", parsed)


@pytest.fixture
def nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(*_: object) -> None:
        pytest.fail("a file was hashed before all sizes were compared")

    monkeypatch.setattr(hashlib, "file_digest", hashed)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_valid_bundle_opens(root: Path):
    bundle = open_bundle(root, files="all")
    assert bundle.manifest.name == "tiny"
    assert bundle.path(MODEL) == root.resolve() / MODEL
    assert bundle.path(MODEL).is_file()
    assert open_bundle(str(root)).root == bundle.root


def test_root_may_be_reached_through_a_link(root: Path, tmp_path: Path):
    (tmp_path / "latest").symlink_to(root, target_is_directory=True)
    assert open_bundle(tmp_path / "latest", files="all").root == root.resolve()


def test_row_06_hard_links_on_disk_are_plain_files(root: Path, tmp_path: Path):
    os.link(root / WEIGHTS, tmp_path / "other")
    open_bundle(root, files="all")


def test_path_is_only_for_listed_files(root: Path):
    (root / "extra.txt").write_text("x")
    bundle = open_bundle(root, allow_unlisted=True)
    for name in ("extra.txt", "manifest.json", "../bundle/" + MODEL, ""):
        with pytest.raises(ArtifactError, match="not in the bundle"):
            bundle.path(name)
        with pytest.raises(ArtifactError, match="not in the bundle"):
            check_digests(bundle, [name])


def test_only_asked_files_are_hashed(root: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    original = bundle_module._sha256
    monkeypatch.setattr(bundle_module, "_sha256", lambda at, name: hashed.append(name) or original(at, name))
    open_bundle(root)
    assert hashed == []
    open_bundle(root, files=[REPORT])
    assert hashed == [REPORT]


def test_progress_counts_bytes(root: Path):
    seen: list[tuple[int, int]] = []
    check_digests(open_bundle(root), "all", progress=lambda done, total: seen.append((done, total)))
    total = sum(entry["size"] for entry in list_files(root))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)
    assert len(seen) == 4


def test_row_22_writes_nothing_and_opens_no_socket(root: Path, monkeypatch: pytest.MonkeyPatch):
    def look() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [root, *root.rglob("*")]}

    def connect(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    before = look()
    for path in root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr(socket, "socket", connect)
    monkeypatch.delenv("HOME", raising=False)
    open_bundle(root, files="all")
    assert look() == before


# --- the place -------------------------------------------------------------------------------------------------------


def test_not_a_bundle(root: Path, tmp_path: Path):
    refusal(tmp_path / "nowhere", "nowhere", "bundle directory", "No such file")
    refusal("nul\0byte", "cannot be opened")
    refusal(root / REPORT, REPORT, "a directory that holds manifest.json", "a file")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "not a bundle", "without manifest.json")
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    refusal(tmp_path / "empty", "diffusers checkpoint", "slipcast compile")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refusal(tmp_path / "loop", "cannot be opened")


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "dangling"])
def test_row_05_manifest_has_to_be_a_plain_file(root: Path, tmp_path: Path, kind: str):
    manifest = root / "manifest.json"
    manifest.rename(tmp_path / "elsewhere.json")
    match kind:
        case "link":
            manifest.symlink_to(tmp_path / "elsewhere.json")
        case "dangling":
            manifest.symlink_to("nowhere")
        case "directory":
            manifest.mkdir()
        case "fifo":
            os.mkfifo(manifest)
    refusal(root, "manifest.json", "plain file")


# --- rows 1 to 4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (1, "too long")])
@pytest.mark.usefixtures("nothing_is_hashed", "nothing_is_parsed")
def test_row_01_truncated_file_is_found_before_hashing(root: Path, change: int, word: str):
    size = (root / WEIGHTS).stat().st_size
    os.truncate(root / WEIGHTS, size + change)
    refusal(root, WEIGHTS, word, f"{size} bytes", f"{size + change} bytes", files="all")
    refusal(root, WEIGHTS, word)  # also when nobody asked for that file


@pytest.mark.usefixtures("nothing_is_hashed")
def test_row_01_file_truncated_after_opening(root: Path):
    bundle = open_bundle(root)
    os.truncate(root / WEIGHTS, 5)
    with pytest.raises(ArtifactError, match="truncated"):
        check_digests(bundle)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, TABLE, REPORT])
@pytest.mark.usefixtures("nothing_is_parsed")
def test_row_02_flipped_bit(root: Path, name: str):
    before = hashlib.sha256((root / name).read_bytes()).hexdigest()
    flip(root / name)
    after = hashlib.sha256((root / name).read_bytes()).hexdigest()
    refusal(root, name, before, after, files="all")
    refusal(root, name, before, after, files=[name])


def test_row_02_flipped_bit_in_weights_that_only_the_model_names(root: Path):
    flip(root / WEIGHTS)
    open_bundle(root)
    refusal(root, WEIGHTS, "sha256", files=[MODEL])


def test_row_03_missing_file(root: Path):
    (root / REPORT).unlink()
    refusal(root, REPORT, "missing")


def test_row_03_missing_after_opening(root: Path):
    bundle = open_bundle(root)
    (root / REPORT).unlink()
    with pytest.raises(ArtifactError, match=r"report\.html.*\n.*\n.*No such file"):
        check_digests(bundle, [REPORT])


def test_row_03_directory_in_place_of_a_file(root: Path):
    (root / REPORT).unlink()
    (root / REPORT).mkdir()
    refusal(root, REPORT, "missing")


@pytest.mark.parametrize(
    "name", ["extra.json", "onnxruntime/extra.onnx", "new/deep/.DS_Store", "manifest.json.bak", "bad\udcff"]
)
def test_row_04_unlisted_file(root: Path, name: str):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    refusal(root, repr(name), "not listed", "--allow-unlisted")
    open_bundle(root, allow_unlisted=True, files="all")


# --- rows 5 and 6 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow_unlisted", [False, True])
def test_row_05_symlinked_file(root: Path, tmp_path: Path, allow_unlisted: bool):
    (root / WEIGHTS).rename(tmp_path / "outside")
    (root / WEIGHTS).symlink_to(tmp_path / "outside")
    refusal(root, WEIGHTS, "symbolic link", allow_unlisted=allow_unlisted)


@pytest.mark.parametrize("allow_unlisted", [False, True])
def test_row_05_symlinked_parent_directory(root: Path, tmp_path: Path, allow_unlisted: bool):
    (root / "onnxruntime").rename(tmp_path / "outside")
    (root / "onnxruntime").symlink_to(tmp_path / "outside", target_is_directory=True)
    refusal(root, "onnxruntime", "symbolic link", allow_unlisted=allow_unlisted)


@pytest.mark.parametrize("target", ["report.html", "nowhere", "."])
def test_row_05_any_link_inside(root: Path, target: str):
    (root / "onnxruntime" / "extra").symlink_to(target)
    refusal(root, "onnxruntime/extra", "symbolic link", allow_unlisted=True)


@pytest.mark.parametrize("name", [WEIGHTS, "onnxruntime"])
def test_row_05_replaced_by_a_link_after_opening(root: Path, tmp_path: Path, name: str):
    bundle = open_bundle(root)
    (root / name).rename(tmp_path / "outside")
    (root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="symbolic link"):
        check_digests(bundle)


@pytest.mark.parametrize("replace", [os.symlink, lambda _, path: os.mkfifo(path)], ids=["link", "fifo"])
def test_row_05_replaced_between_looking_and_opening(
    root: Path, tmp_path: Path, replace: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
):
    bundle = open_bundle(root)
    outside = (root / REPORT).rename(tmp_path / "outside")
    replace(outside, root / REPORT)
    monkeypatch.setattr(bundle_module, "_plain", lambda at, name: at / name)
    monkeypatch.setattr(bundle_module, "_check_size", lambda *_: None)
    with pytest.raises(ArtifactError, match=r"report\.html"):
        check_digests(bundle, [REPORT])


@pytest.mark.parametrize("name", ["extra.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_row_06_special_files_are_refused_unopened(root: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    (root / name).unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(root / name)  # opening one for reading would wait for a writer
        refusal(root, name, kind, allow_unlisted=True)
    else:
        monkeypatch.chdir((root / name).parent)  # the length of a socket's path is limited
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(Path(name).name)
            refusal(root, name, kind, allow_unlisted=True)


# --- rows 7 and 8 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../outside.bin", "/etc/passwd.bin", "onnxruntime\\denoiser.onnx", "a/../" + REPORT])
def test_row_07_manifest_that_lists_a_path_outside(root: Path, tmp_path: Path, path: str):
    (tmp_path / "outside.bin").write_bytes(b"")
    entry = {"path": path, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    write_manifest(root, files=[*list_files(root), entry])
    refusal_without_facts = pytest.raises(ArtifactError, match=r"files\[4\]\.path")
    with refusal_without_facts:
        open_bundle(root, files="all")


@pytest.mark.parametrize("name", ["REPORT.html", "onnxruntime/Denoiser.onnx", "Onnxruntime/x.json", "Manifest.json"])
def test_row_07_names_on_disk_that_collide(root: Path, name: str):
    if (root / name).exists():
        pytest.skip("this file system folds case itself")
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("x")
    refusal(root, "collide", name, allow_unlisted=True)


def test_row_07_unicode_forms_on_disk_that_collide(root: Path):
    (root / "\u00e9.txt").write_text("x")
    (root / "e\u0301.txt").write_text("x")
    if len(list(root.glob("*.txt"))) != 2:
        pytest.skip("this file system folds Unicode forms itself")
    refusal(root, "collide", allow_unlisted=True)


@pytest.mark.parametrize("location", ["/etc/passwd", "../report.html", "missing.data", "*/_ORT_MEM_ADDR_/*"])
def test_row_08_external_data_elsewhere(root: Path, location: str):
    model = onnx.load(root / MODEL, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    (root / MODEL).write_bytes(model.SerializeToString())
    write_manifest(root)
    open_bundle(root)  # not asked for, so not read
    refusal(root, MODEL, "external data", location.strip("."), files=[MODEL])
    refusal(root, MODEL, "external data", files="all")


def test_row_08_models_that_share_and_name_each_other(root: Path):
    """A model may read any listed file, also another model; that does not send the check round in circles."""
    for name, other in (("a", "b"), ("b", "a")):
        save_external(add_model(), root / f"{name}.onnx")
        model = onnx.load(root / f"{name}.onnx", load_external_data=False)
        entries = model.graph.initializer[0].external_data
        entries[0].value = f"{other}.onnx"
        del entries[1:]
        (root / f"{name}.onnx").write_bytes(model.SerializeToString())
    write_manifest(root)
    open_bundle(root, files=["a.onnx"])
    flip(root / "b.onnx")
    refusal(root, "b.onnx", "sha256", files=["a.onnx"])


# --- rows 10 to 13 ---------------------------------------------------------------------------------------------------


def test_row_10_newer_schema(root: Path):
    write_manifest(root, schema_version="2.0")
    with pytest.raises(ArtifactError, match="newer runtime"):
        open_bundle(root)


@pytest.mark.usefixtures("nothing_is_hashed", "nothing_is_parsed")
def test_row_11_huge_manifest_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    os.truncate(root / "manifest.json", 1 << 30)
    monkeypatch.setattr(bundle_module, "read_any_manifest", lambda _: pytest.fail("it was read"))
    refusal(root, "manifest.json", "too large", str(MAX_JSON_BYTES), str(1 << 30))


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b'{"a": 1, "a": 1}', b"\xff", b'{"a": NaN}'])
def test_row_11_malformed_manifest(root: Path, data: bytes):
    (root / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_bundle(root)


def test_row_12_unknown_key(root: Path):
    write_manifest(root, low_rank_layer=[])
    with pytest.raises(ArtifactError, match="did you mean 'low_rank_layers'"):
        open_bundle(root)


def test_row_13_damaged_table_with_a_right_digest(root: Path):
    (root / TABLE).write_bytes((root / TABLE).read_bytes() + b"x")
    write_manifest(root)
    with pytest.raises(ArtifactError, match="after the last tensor"):
        open_bundle(root)  # also when nobody asked for that file


# --- row 15 ----------------------------------------------------------------------------------------------------------

CODE = [
    "x.pkl",
    "x.pickle",
    "x.pt",
    "x.pth",
    "x.ckpt",
    "x.so",
    "x.so.1.2",
    "x.dll",
    "x.dylib",
    "x.py",
    "X.PY",
    "x.pyc",
    "x.pt. ",
]


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("allow_unlisted", [False, True])
def test_row_15_code_on_disk(root: Path, name: str, allow_unlisted: bool):
    (root / "onnxruntime" / name).write_bytes(b"")
    refusal(root, f"onnxruntime/{name}", "can run code", allow_unlisted=allow_unlisted)


@pytest.mark.parametrize("name", [name for name in CODE if name[-1] != " "])
@pytest.mark.parametrize("allow_unlisted", [False, True])
def test_row_15_code_in_the_manifest(root: Path, name: str, allow_unlisted: bool):
    (root / name).write_bytes(b"")
    write_manifest(root)
    refusal(root, name, "can run code", allow_unlisted=allow_unlisted)
    with pytest.raises(ArtifactError, match="can run code"):
        file_entries(root, [name])


@pytest.mark.parametrize("name", ["x.exe2", "x", "x.gguf", "x.JSON", ".json", "x.onnx.zip"])
def test_row_15_listed_files_are_of_known_kinds(root: Path, name: str):
    (root / name).write_bytes(b"")
    write_manifest(root)
    refusal(root, name, "no kind of file", ".safetensors", allow_unlisted=True)
    with pytest.raises(ArtifactError, match="no kind of file"):
        file_entries(root, [name])


# --- unreadable files, and describing files --------------------------------------------------------------------------


def test_reading_that_fails_names_the_file(root: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", broken)
    refusal(root, WEIGHTS, "Input/output error", files=[WEIGHTS])
    monkeypatch.setattr(os, "scandir", broken)
    refusal(root, "Input/output error")


def test_file_entries_is_what_opening_expects(root: Path):
    names = [REPORT, MODEL, WEIGHTS, TABLE]
    entries = file_entries(root, [*names, REPORT])
    assert [entry.model_dump() for entry in entries] == list_files(root)
    assert entries == open_bundle(root).manifest.files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../bundle/report.html", "bad path"),
        ("nowhere.json", "No such file"),
        ("onnxruntime", "no kind of file"),
        ("folder.json", "not a file"),
        ("link.json", "symbolic link"),
        ("linked/x.json", "symbolic link"),
        ("Manifest.json", "collide"),
        ("manifest.json", "collide"),
    ],
)
def test_file_entries_refuses_what_opening_would(root: Path, tmp_path: Path, name: str, words: str):
    (root / "folder.json").mkdir()
    (root / "link.json").symlink_to("manifest.json")
    (tmp_path / "x.json").write_text("{}")
    (root / "linked").symlink_to(tmp_path)
    (root / "Manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=words) as caught:
        file_entries(root, [name])
    assert "expected" in str(caught.value)
