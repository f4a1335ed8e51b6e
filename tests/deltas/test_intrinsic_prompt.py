"""A prompt of a few numbers: equal to the prompt that its decoder makes, and tied to one decoder and one backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deltaloom.checkpoint import native
from deltaloom.deltas._decoder import read_decoder
from deltaloom.deltas.intrinsic_prompt import IntrinsicPrompt
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import CheckpointError, SettingsError
from deltaloom.jobs.prompt_subspace import directions_of
from deltaloom.tuned import attach
from tests.contract.cases import logits, perturb
from tests.deltas.decoders import decoder_for
from tests.toys import toy


@pytest.mark.parametrize("layout", ["gpt2", "t5"])
def test_it_is_the_prompt_that_the_decoder_makes(layout: str) -> None:
    tuned = attach(toy(layout), [IntrinsicPrompt(decoder=decoder_for(layout))])
    perturb(tuned, size=1.0)
    decoder = read_decoder(Path(decoder_for(layout)))
    (z,) = tuned.delta_parameters().values()
    assert z.shape == (3, 4)
    other = attach(toy(layout), [Prompt(length=3)])
    (rows,) = other.delta_parameters().values()
    with torch.no_grad():
        rows.copy_(decoder.mean + z @ decoder.directions)
    torch.testing.assert_close(logits(tuned, layout), logits(other, layout), rtol=1e-5, atol=1e-5)


def test_the_file_holds_the_numbers_alone_and_the_decoder_stays_one(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(decoder_for("gpt2"), folder)
    method = IntrinsicPrompt(decoder="decoder").settled(tmp_path)
    assert (method.decoder, len(method.sha256)) == (str(folder), 64)
    tuned = attach(toy("gpt2"), [method])
    perturb(tuned)
    native.save(tuned, tmp_path / "d")
    assert [tuple(tensor.shape) for tensor in native.read(tmp_path / "d")[0].state.values()] == [(3, 4)]
    assert torch.equal(logits(native.load(toy("gpt2"), tmp_path / "d"), "gpt2"), logits(tuned, "gpt2"))
    shutil.rmtree(folder)
    shutil.copytree(decoder_for("gpt2", directions=5), folder)
    with pytest.raises(CheckpointError, match="not the decoder that the delta belongs to"):
        native.load(toy("gpt2"), tmp_path / "d")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="no decoder"):
        native.load(toy("gpt2"), tmp_path / "d")


def test_a_decoder_of_another_backbone_is_refused() -> None:
    with pytest.raises(CheckpointError, match="another backbone"):
        attach(toy("gpt2", seed=1), [IntrinsicPrompt(decoder=decoder_for("gpt2"))])


@pytest.mark.parametrize("fault", ["cut", "bit", "shape", "json", "version"])
def test_a_damaged_decoder_is_refused(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(decoder_for("gpt2"), folder)
    record, blob = json.loads((folder / "decoder.json").read_text()), (folder / "decoder.safetensors").read_bytes()
    if fault == "cut":
        (folder / "decoder.safetensors").write_bytes(blob[:-1])
    elif fault == "bit":
        (folder / "decoder.safetensors").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    else:
        changed = {"shape": json.dumps(record | {"directions": 9}), "json": "{", "version": json.dumps(record | {"version": 2})}
        (folder / "decoder.json").write_text(changed[fault])
    with pytest.raises(CheckpointError):
        attach(toy("gpt2"), [IntrinsicPrompt(decoder=str(folder))])


def test_directions_are_principal_components_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 3, generator=generator, dtype=torch.float64)).Q.T
    centre = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    numbers = torch.randn(9, 4, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64)
    prompts = centre + numbers @ axes
    mean, directions, shares = directions_of(prompts, 10)
    assert directions.shape == (3, 16) and shares.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(mean, prompts.mean(0))
    z = torch.linalg.lstsq(directions.T, (prompts - mean).reshape(-1, 16).T).solution
    torch.testing.assert_close((directions.T @ z).T.reshape(9, 4, 16) + mean, prompts, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z.square().mean(1), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)  # one deviation each
    assert directions_of(prompts, 2)[1].shape == (2, 16)


@pytest.mark.parametrize("settings", [{}, {"decoder": "x", "sha256": "short"}])
def test_illegal_settings_are_errors(settings: dict) -> None:
    with pytest.raises(SettingsError):
        IntrinsicPrompt(**settings)
