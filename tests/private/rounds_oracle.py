"""What three parties bring to each round, and the mean written out."""

import torch

NAMES = ("ada", "bob", "cyd")


def common() -> dict[str, torch.Tensor]:
    return {"k": torch.zeros(2, 3), "v": torch.ones(4, dtype=torch.bfloat16)}


def values(party: str, round_: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * round_ + ord(party[0]))
    return {name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for name, tensor in common().items()}


def count(party: str, round_: int) -> int:
    return 10 * round_ + ord(party[0]) - 96


def oracle(parties: tuple[str, ...], round_: int) -> dict[str, torch.Tensor]:
    total = sum(count(party, round_) for party in parties)
    return {name: (sum(values(party, round_)[name].double() * count(party, round_) for party in parties) / total).to(tensor.dtype)
            for name, tensor in common().items()}
