"""Which dtype to compute in: bf16 where the hardware multiplies it natively, else fp32, with the reason as text."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A dtype for the frozen model, and why."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The word of the run file: bf16 or fp32."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def auto_precision(device: str | torch.device = "cpu") -> Precision:
    """The precision that `precision: auto` stands for on a device."""
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "this GPU multiplies bf16 natively")
        return Precision(torch.float32, "this GPU has no native bf16")
    if kind == "cpu":
        # torch has no public question for these; the names are those of torch 2.9 to 2.13.
        if torch.cpu._is_amx_tile_supported():
            return Precision(torch.bfloat16, "this CPU has AMX tiles")
        if torch.cpu._is_avx512_bf16_supported():
            return Precision(torch.bfloat16, "this CPU has AVX-512 bf16")
        return Precision(torch.float32, "this CPU has neither AMX nor AVX-512 bf16; emulated bf16 would be slower")
    return Precision(torch.float32, f"bf16 is not measured on '{kind}'")
