"""Several processes as one team: gloo between CPUs, nccl between GPUs, started by torchrun (or by anything that sets its
variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT).

    torchrun --nproc-per-node 2 -m deltaloom tune run.yaml

One all-reduce of one flat tensor sums an optimizer step's gradients. DistributedDataParallel would wrap the model for that; but
deltas are small, so that there is nothing to gain by sending them while the backward pass still runs, and its means would be
wrong here: it divides by the number of processes, where the loss is divided by the number of tokens of all of them, it wants
equally many backward passes in each, and it holds on to parameters that controllers replace. A test compares the two.

Everything else that is sent is text: JSON, and tensors as safetensors. torch's own exchange of objects unpickles what it gets.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch import distributed as dist

from deltaloom.errors import DeltaloomError, ElsewhereError, RefusedError, SettingsError
from deltaloom.train.state import pack, unpack
from deltaloom.train.team import SINGLE, Passed, Team

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(minutes=30)  # for a process that is alive and does not answer; one that is gone is noticed at once
CLOSED = "Connection closed by peer"  # gloo's words for that, in an error of no class of its own


@contextmanager
def processes() -> Iterator[Team]:
    """The team that this process belongs to, by the variables of its environment; alone, no process group is made.

    Within another such block (or where a program made torch's default group itself) the team of that group. Threads are shared
    out between the processes of one machine.

    Raises:
        SettingsError: the variables are not numbers, or not all there. ElsewhereError: the others cannot be reached.
        RefusedError: this build of PyTorch has no distributed package.
    """
    size, local, beside = (_number(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if size < 2:
        yield SINGLE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not (dist.is_available() and dist.is_initialized()):
        raise SettingsError("WORLD_SIZE says that this is one of several processes, and other variables are missing",
                            got=f"WORLD_SIZE={size}", problems=[f"missing: {name}" for name in missing],
                            hint="Start the run with torchrun, or unset WORLD_SIZE.")
    if not dist.is_available():
        raise RefusedError("this build of PyTorch cannot connect processes", hint="Run in one process.")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_initialized():
        yield Group(device)
        return
    threads = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores(beside or size)
    try:
        with _reaching():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        yield Group(device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)


def _share_cores(processes: int) -> None:
    """Threads for each of so many processes; who asks for more than torchrun's one in OMP_NUM_THREADS gets what he asks for."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise SettingsError(f"the environment variable {name} is no number", got=text,
                            hint="torchrun sets it; without torchrun, unset it.")
    return int(text)


class Group(Team):
    """The team of torch's default process group."""

    def __init__(self, device: torch.device) -> None:
        self.number, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    @property
    def device(self) -> torch.device:
        """This process's accelerator, or the CPU."""
        return self._device

    def together(self, work: Callable[[], T]) -> T:
        """See `Team.together`."""
        return self._join(work, lambda done: ())[0]

    def once(self, work: Callable[[], T]) -> T:
        """See `Team.once`."""
        found = self._join(lambda: work() if self.first else None, lambda done: ())[0]
        told = self._told(found)
        return found if self.first else told  # type: ignore[return-value]

    def add(self, work: Callable[[], Passed], parameters: Sequence[nn.Parameter]) -> Passed:
        """Small figures first, so that a failed process is known before gradients are waited for; then one flat tensor."""
        def figures(done: Passed) -> list[float]:
            return [done.tokens, done.padded_tokens, done.noise[1] if done.noise else 0,
                    *(float(parameter.grad is not None) for parameter in parameters)]

        own, (tokens, padded, parts, *having) = self._join(work, figures, 3 + len(parameters))
        total, count, noise = self._add_gradients(parameters, having, own)
        return Passed(own.losses, count, own.rows, int(tokens), int(padded), (noise, int(parts)) if own.noise else None, total)

    def _add_gradients(self, parameters: Sequence[nn.Parameter], having: Sequence[float], own: Passed) -> tuple[Tensor, ...]:
        """Sum the gradients in place; gives back the sums of (losses, counts, noise).

        A process without rows adds zeros; a parameter that got no gradient anywhere keeps none.
        """
        some = [parameter for parameter, number in zip(parameters, having, strict=True) if number]
        dtype = torch.float32
        for parameter in some:
            dtype = torch.promote_types(dtype, parameter.dtype)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in some if parameter.grad is not None]
        loss = own.loss() if own.losses else 0.0
        extra = [loss, own.count, own.noise[0] if own.noise else 0.0]
        numbers = torch.stack([torch.as_tensor(value, device=self.device).to(dtype) for value in extra])
        flat = torch.cat([*(gradient.reshape(-1).to(dtype) for gradient in gradients), numbers])
        with _reaching():
            dist.all_reduce(flat)
        pieces = flat.split([*(gradient.numel() for gradient in gradients), len(extra)])
        if gradients:
            torch._foreach_copy_(gradients, [piece.view_as(own) for piece, own in zip(pieces[:-1], gradients, strict=True)])
        return tuple(pieces[-1].unbind())

    def agree(self, stop: str | None, seconds: float) -> tuple[str | None, float]:
        """See `Team.agree`."""
        asked = 0 if stop is None else int(signal.Signals[stop])
        both = torch.tensor([float(asked), seconds if self.first else 0.0], dtype=torch.float64)
        with _reaching():
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        number, agreed = both.tolist()
        return (signal.Signals(int(number)).name if number else None), agreed

    def texts(self, own: str) -> list[str]:
        """See `Team.texts`."""
        data = torch.frombuffer(bytearray(own.encode("utf-8", "surrogatepass")), dtype=torch.uint8) if own else _NOTHING
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with _reaching():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            most = max(int(size) for size in sizes)
            found = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
            if most:
                dist.all_gather(found, torch.nn.functional.pad(data, (0, most - len(data))))
        return [bytes(part[:int(size)].numpy()).decode("utf-8", "surrogatepass") for part, size in zip(found, sizes, strict=True)]

    def share(self, dealt: Callable[[int, int], Sequence[Sequence[int]]]) -> tuple[Sequence[Sequence[int]], int]:
        """See `Team.share`; where the base is spread, processes with fewer micro-batches repeat one that does not count."""
        own = list(dealt(self.number, self.size))
        if not self.lockstep:
            return own, 0
        all_of_them = [dealt(number, self.size) for number in range(self.size)]
        idle = max(map(len, all_of_them)) - len(own)
        spare = list(all_of_them[0][-1])[-1:]  # the first process has rows if any has
        return own + [spare] * idle, idle

    def spread(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """Dealt out one by one; what is sent is JSON, whose numbers are exact."""
        own = list(items[self.number::self.size])
        idle = -(-len(items) // self.size) - len(own) if self.lockstep else 0
        found = self.together(lambda: [work(item) for item in own + list(items[:1]) * idle][:len(own)])
        parts = [json.loads(text) for text in self.texts(json.dumps(found))]
        parts[self.number] = found
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def _told(self, value: Any) -> Any:
        """The first process's value in all of them: numbers, texts, lists, mappings and tensors."""
        tensors: dict[str, Tensor] = {}
        text = json.dumps(pack(value, "", tensors)).encode() if self.first else b""
        body = save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}) if tensors else b""
        sizes = torch.tensor([len(text), len(body)])
        with _reaching():
            dist.broadcast(sizes, 0)
            length, rest = sizes.tolist()
            data = (torch.frombuffer(bytearray(text + body), dtype=torch.uint8) if self.first
                    else torch.empty(length + rest, dtype=torch.uint8))
            dist.broadcast(data, 0)
        if self.first:
            return value
        received = data.numpy().tobytes()
        return unpack(json.loads(received[:length]), load(received[length:]) if rest else {})

    def _join(self, work: Callable[[], T], figures: Callable[[T], Sequence[float]], width: int = 0) -> tuple[T, list[float]]:
        """Do the work, and sum `width` figures of it; what one process raises is raised in all of them."""
        failure: Exception | None = None
        found: list[T] = []
        own = [1.0, *[0.0] * width]
        try:
            found.append(work())
            own = [0.0, *figures(found[0])]
        except Exception as error:
            if self.lockstep:  # the others wait inside the model: only the end of this process can reach them
                raise (_gone(error) if CLOSED in str(error) else error) from None
            failure = error
        sums = torch.tensor(own, dtype=torch.float64)
        with _reaching():
            dist.all_reduce(sums)
        failed, *rest = sums.tolist()
        if failed:
            raise self._failure(failure)
        return found[0], rest

    def _failure(self, own: Exception | None) -> Exception:
        """What to raise where a process failed: its own error there, the first failed one's elsewhere."""
        code = own.exit_code if isinstance(own, DeltaloomError) else 1
        kind = "" if isinstance(own, DeltaloomError) else f"{type(own).__name__}: "
        told = [json.loads(text) for text in self.texts(json.dumps(None if own is None else [code, f"{kind}{own}"]))]
        if own is not None:
            if isinstance(own, DeltaloomError):
                own.known_to_all = True
            return own
        number, (code, text) = next((number, part) for number, part in enumerate(told) if part is not None)
        error = ElsewhereError(f"process {number} of {self.size} failed: {text}")
        error.exit_code, error.known_to_all = code, True
        return error


_NOTHING = torch.empty(0, dtype=torch.uint8)


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn the errors of exchanges into one that says what a person can do."""
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        raise _gone(error) from None


def _gone(error: Exception) -> ElsewhereError:
    return ElsewhereError("another process of this run is gone, or did not answer", got=str(error).strip().split("\n")[0][:200],
                          hint="Its own message, or torchrun's, says why. What was saved is whole: run again with --resume.")
