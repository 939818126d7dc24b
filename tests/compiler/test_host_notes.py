"""What the machine that compiled computed otherwise than its targets say is in the report."""

from __future__ import annotations

import os

import pytest

from slipcast.bundle.manifest import Target
from slipcast.engines import ENGINES
from slipcast_compiler.host import machine
from slipcast_compiler.judge.host_notes import NO_BF16, host_notes


@pytest.mark.skipif(not ENGINES["openvino"].available(), reason="openvino is not installed")
@pytest.mark.parametrize("native", [True, False])
def test_a_processor_without_bf16_is_named(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipcast.engines.openvino.bf16_is_native", lambda: native)
    kinds = (("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"), ("onnxruntime", "int8"))
    targets = [Target(engine=e, device="cpu", precision=p, components={}) for e, p in kinds]  # type: ignore[arg-type]
    expected = {} if native else {"openvino-cpu-bf16": NO_BF16, "openvino-cpu-int8": NO_BF16}
    assert host_notes(targets) == expected


@pytest.mark.parametrize(("load", "policy"), [(None, None), (0.0, None), (1000.0, "PASSIVE")])
def test_threads_do_not_spin_on_a_busy_machine(
    load: float | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(machine, "load_average", lambda: load)
    machine.wait_without_spinning()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what a user chose stays
    machine.wait_without_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
