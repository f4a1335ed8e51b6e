"""Sites: the places of a model that can carry a delta, and how targets find them.

All sites of all methods are resolved on the untouched model before anything is attached, because attaching renames layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.architectures import ATTENTION_ROLES, FAMILIES, MLP_ROLES, TENSOR_ROLES, Family, role_of, split_path
from deltaloom.compact.face import affine_shape, is_affine
from deltaloom.errors import TargetError, did_you_mean
from deltaloom.stacks import Stack, as_matrices, as_stored, stacks_of

Kind = Literal["linear", "embedding", "norm", "attention", "branch", "input", "stack", "tensors"]
Targets = str | Sequence[str]


@dataclass(frozen=True)
class Site:
    """One place that can carry a delta; identified by `name`, which is unique within a model."""

    path: str                            # module path in the untouched model; for a branch the layer that writes its output
    kind: Kind
    role: str                            # q, k, v, o, qkv, gate, up, down, head, pooler, embed, norm, ...
    d_in: int
    d_out: int
    layer: int | None = None             # index of the block in its stack
    stack: str = ""                      # e.g. "model.layers"; encoder-decoders have two
    part: tuple[int, int] | None = None  # rows [start, stop) of a fused output
    entry: str | None = None             # branch: the layer whose input is the branch's input
    has_bias: bool = False
    tensor: str = "weight"               # stack: the parameter's name in its module
    slices: int = 1                      # stack: the parameter is seen as that many matrices of (d_out, d_in)
    transposed: bool = False             # stack: the module stores d_in before d_out

    @property
    def name(self) -> str:
        """Unique name: the path, with the part or branch marked; of a stack the parameter's."""
        if self.kind == "stack":
            return f"{self.path}.{self.tensor}"
        if self.part is not None:
            return f"{self.path}[{self.role}]"
        if self.kind in ("branch", "input"):
            return f"{self.path}<{self.role}>"
        return self.path


def all_sites(model: nn.Module) -> list[Site]:
    """Every site of an untouched model, in the order of its modules.

    Raises:
        TargetError: a parameter is not as `register_site` was told.
    """
    family = family_of(model)
    heads = head_paths(model)
    sites: list[Site] = []
    covered: set[str] = set()
    for path, module in model.named_modules():
        found = _module_sites(model, family, heads, path, module)
        sites.extend(found)
        sites.extend(_stacks(family, path, module))
        if any(site.kind in ("linear", "embedding", "norm") for site in found):
            covered.add(path)
    sites.extend(_branches(sites, family))
    for path, module in model.named_modules():
        if path not in covered and any(True for _ in module.parameters(recurse=False)):
            stack, layer, _ = split_path(path)
            sites.append(Site(path, "tensors", path.rsplit(".", 1)[-1], 0, 0, layer, stack))
    return sites


def find_sites(model: nn.Module, targets: Targets, kinds: Iterable[Kind], layers: Iterable[int] | None = None,
               keep: Callable[[Site], bool] | None = None) -> list[Site]:
    """Sites of the given kinds that the targets name.

    A target is a word (`attention`, `mlp`, `all-linear`: the linears inside the blocks; `all`: every site of these kinds),
    the end of a path (`q_proj`), a role (`q`: also the part of a fused layer), a glob on the path, or `re:` and a regular
    expression for the whole path. A stack goes by its layer's path and by its own name (`experts`, `experts.down_proj`), and
    by its role; `all-linear` never names one, `mlp` and `attention` do where its role is one of theirs. A leading `!` removes
    what it names. `layers` keeps only these blocks: each of them has to have a site, and each target one within them. `keep`
    says which sites can carry the delta at all, where the kind does not say it; the others do not exist for the targets.

    Raises:
        TargetError: targets that match nothing, all of them at once, with the names that exist; blocks without a site.
    """
    kinds = tuple(kinds)
    candidates = [site for site in all_sites(model) if site.kind in kinds and (keep is None or keep(site))]
    patterns = [targets] if isinstance(targets, str) else list(targets)
    wanted = set(layers) if layers is not None else None
    chosen: dict[str, Site] = {}
    missed, elsewhere = [], []
    for pattern in patterns:
        removes = pattern.startswith("!")
        hits = _matches(pattern.removeprefix("!"), candidates)
        if not hits:
            missed.append(pattern)
        elif wanted is not None and not removes and not any(site.layer in wanted for site in hits):
            elsewhere.append(pattern)
        for site in hits:
            if removes:
                chosen.pop(site.name, None)
            else:
                chosen[site.name] = site
    if missed:
        raise _nothing_matches(missed, candidates, kinds)
    found = [site for site in candidates if site.name in chosen and (wanted is None or site.layer in wanted)]
    blocks = sorted({site.layer for site in chosen.values() if site.layer is not None})
    absent = sorted((wanted or set()).difference(blocks))
    if absent or elsewhere or not found:
        problems = [f"block {layer} has none of the targets" for layer in absent]
        problems += [f"'{pattern}' names nothing in these blocks" for pattern in elsewhere]
        raise TargetError("no site is left" if not found else "no site is left of a part of what was asked for",
                          got={"targets": patterns, "layers": sorted(wanted or ())}, legal=blocks, problems=problems,
                          hint="Name layers that exist and hold the targets, or fewer exclusions.")
    return found


def family_of(model: nn.Module) -> Family | None:
    """The row of the architecture table for a transformers model; None for an unknown family."""
    config = getattr(model, "config", None)
    return FAMILIES.get(getattr(config, "model_type", ""))


def head_paths(model: nn.Module) -> list[str]:
    """Paths of the affine layers outside the backbone: classification heads, or the language-model head."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    paths = []
    output = output_layer(model)
    for path, module in model.named_modules():
        if not is_affine(module):
            continue
        inside = backbone is not None and path.startswith(prefix + ".")
        if module is output or (backbone is not None and not inside):
            paths.append(path)
    return paths


def output_layer(model: nn.Module) -> nn.Module | None:
    """The language-model head of a transformers model, or None."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def input_layer(model: nn.Module) -> nn.Module | None:
    """The token embeddings of a transformers model, or None."""
    try:
        return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except RuntimeError:  # transformers' way to say of some models, such as convolutional ones, that they have none
        return None


def stack_matrices(site: Site, parameter: Tensor) -> Tensor:
    """The parameter of a stack as (slices, d_out, d_in); a view where possible."""
    return as_matrices(_stack(site), parameter)


def stack_stored(site: Site, matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """Matrices (slices, d_out, d_in) of a stack in the shape in which its layer stores them."""
    return as_stored(_stack(site), matrices, shape)


def _stack(site: Site) -> Stack:
    return Stack(site.tensor, site.slices, site.d_out, site.d_in, site.transposed)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, Tensor) and weight.ndim == 1


def _module_sites(model: nn.Module, family: Family | None, heads: list[str], path: str, module: nn.Module) -> list[Site]:
    stack, layer, rest = split_path(path)
    if is_affine(module):
        d_out, d_in = affine_shape(module)
        role = "head" if path in heads else _role(family, path)
        site = Site(path, "linear", role, d_in, d_out, layer, stack, has_bias=module.bias is not None)
        return [site, *_parts(model, family, site)]
    if isinstance(module, nn.Embedding):
        tokens = input_layer(model)
        role = "embed" if tokens is not None and module.weight is tokens.weight else rest.rsplit(".", 1)[-1]
        found = []
        if role == "embed" or type(module).forward is nn.Embedding.forward:  # some position tables are no look-up of ids
            found.append(Site(path, "embedding", role, module.num_embeddings, module.embedding_dim, layer, stack))
        if module is tokens:
            found.append(Site(path, "input", "input", module.embedding_dim, module.embedding_dim))
        return found
    if _is_norm(module) and isinstance(module.weight, Tensor):
        width = module.weight.numel()
        return [Site(path, "norm", "norm", width, width, layer, stack, has_bias=getattr(module, "bias", None) is not None)]
    if layer is not None and _is_attention(family, rest, module):
        return [Site(path, "attention", rest.rsplit(".", 1)[-1], 0, 0, layer, stack)]
    return []


def _stacks(family: Family | None, path: str, module: nn.Module) -> list[Site]:
    stack, layer, _ = split_path(path)
    found = []
    for seen in stacks_of(module, path, layer is not None):
        role = seen.role or TENSOR_ROLES.get(seen.tensor, seen.tensor)
        if seen.role is None and seen.tensor == "weight":
            role = _role(family, path)
            if not role.strip("0123456789"):  # one of a sequence of layers: the name of the sequence
                role = next((name for name in reversed(path.split(".")) if not name.isdigit()), "weight")
        found.append(Site(path, "stack", role, seen.d_in, seen.d_out, layer, stack, tensor=seen.tensor, slices=seen.slices,
                          transposed=seen.transposed))
    return found


def _role(family: Family | None, path: str) -> str:
    """Role of a layer by its name: within a block by the tables, elsewhere the name of what holds it."""
    _, layer, rest = split_path(path)
    return role_of(family, rest) if layer is not None else path.rsplit(".", 2)[-2:][0]


def _is_attention(family: Family | None, rest: str, module: nn.Module) -> bool:
    if family is not None:
        return any(fnmatchcase(rest, pattern) for pattern in family.attention)
    return type(module).__name__.endswith("Attention") and any(is_affine(child) for child in module.children())


def _parts(model: nn.Module, family: Family | None, site: Site) -> list[Site]:
    """The parts of a fused layer: rows of q, k, v by their numbers of heads; gate and up in halves."""
    names = family.fused.get(site.role, ()) if family is not None else ()
    if not names:
        return []
    shares = [1] * len(names)
    if "q" in names and isinstance(model, PreTrainedModel):
        heads = int(model.config.num_attention_heads)
        keys = int(getattr(model.config, "num_key_value_heads", None) or heads)
        shares = [heads, keys, keys]
    unit = site.d_out // sum(shares)
    parts, start = [], 0
    for name, share in zip(names, shares, strict=True):
        stop = start + unit * share
        parts.append(Site(site.path, "linear", name, site.d_in, stop - start, site.layer, site.stack, (start, stop),
                          has_bias=site.has_bias))
        start = stop
    return parts


def _branches(sites: list[Site], family: Family | None) -> list[Site]:
    """One branch around each sub-layer: from the layer that reads its input to the layer that writes its output."""
    blocks: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        if site.kind == "linear" and site.part is None and site.layer is not None:
            blocks.setdefault((site.stack, site.layer), []).append(site)
    found = []
    for (stack, layer), linears in blocks.items():
        for name, (entry, leave) in _branch_ends(linears, family).items():
            found.append(Site(leave.path, "branch", name, entry.d_in, leave.d_out, layer, stack, entry=entry.path))
    return found


def _branch_ends(linears: list[Site], family: Family | None) -> dict[str, tuple[Site, Site]]:
    ends = {}
    if family is not None:
        for name, (entry, leave) in family.branches.items():
            first = [s for s in linears if fnmatchcase(split_path(s.path)[2], entry)]
            last = [s for s in linears if fnmatchcase(split_path(s.path)[2], leave)]
            if first and last:
                ends[name] = (first[0], last[0])
        return ends
    for name, first_roles, last_role in (("attention", ("q", "qkv"), "o"), ("mlp", ("gate", "up"), "down")):
        first = [s for s in linears if s.role in first_roles]
        last = [s for s in linears if s.role == last_role]
        if first and last:
            ends[name] = (first[0], last[0])
    return ends


def _matches(pattern: str, candidates: list[Site]) -> list[Site]:
    whole = [site for site in candidates if site.part is None]
    words = {
        "all": lambda s: True,
        "all-linear": lambda s: s.kind == "linear" and s.layer is not None,
        "attention": lambda s: s.role in ATTENTION_ROLES or s.kind == "attention" or s.role == "attention",
        "mlp": lambda s: s.role in MLP_ROLES or s.role == "mlp",
    }
    if pattern in words:
        return [site for site in whole if words[pattern](site)]
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"the target '{pattern}' is not a regular expression: {error}") from None
        return [site for site in candidates if expression.fullmatch(site.name) or
                (site.part is None and expression.fullmatch(site.path))]
    if any(mark in pattern for mark in "*?"):
        return [site for site in whole if fnmatchcase(site.path, pattern) or (
            site.kind == "stack" and fnmatchcase(site.name, pattern))]
    named = [site for site in candidates if any(name == pattern or name.endswith("." + pattern) for name in _names(site))]
    named = named or [site for site in whole if site.path == pattern or site.path.endswith("." + pattern)]
    return named or [site for site in candidates if site.role == pattern]


def _names(site: Site) -> tuple[str, ...]:
    return (site.name, site.path) if site.kind == "stack" else (site.name,)


def _nothing_matches(missed: list[str], candidates: list[Site], kinds: tuple[Kind, ...]) -> TargetError:
    names = sorted({split_path(site.path)[2].rsplit(".", 1)[-1] for site in candidates} | {site.role for site in candidates})
    names = sorted({*names, *(site.tensor for site in candidates if site.kind == "stack")})
    words = ["attention", "mlp", "all-linear", "all"]
    hint = did_you_mean(missed[0].removeprefix("!"), names + words)
    where = " or ".join(kinds)
    if not candidates:
        return TargetError(f"this model has no {where} that could carry the delta", got=", ".join(missed))
    return TargetError(f"no {where} matches the target", got=", ".join(missed), legal=names + words, hint=hint)
