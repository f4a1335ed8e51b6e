"""The tuned model: a frozen model with the deltas of one or several methods, in one or several named lanes.

    tuned = attach(model, [LoRA(rank=8), Prefix(length=16)])
    loss = tuned(**batch).loss + tuned.penalty()
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.deltas._layout import Places, TextReader
from deltaloom.deltas.base import AttachContext, Controller, Delta, InputDelta, Method, PrefixDelta, StepPlan, WarmUp
from deltaloom.errors import CheckpointError, RefusedError, SettingsError, did_you_mean
from deltaloom.sites import Site, output_layer
from deltaloom.tuned.adapted import Adapted, Tap, replace_module, wrappers
from deltaloom.tuned.attached import Attached, check_together, fit_to, refuse_reentrant, replaced_tensors, state_of
from deltaloom.tuned.merging import Merged, MergeFacts, merge, unmerge
from deltaloom.tuned.places import Watchers, is_a_decoder, show
from deltaloom.tuned.prefixes import has_prefixes, install_prefix, taps_of_prefixes, uninstall_prefix
from deltaloom.tuned.prompts import insert_prompt, strip_prompt
from deltaloom.tuned.routing import Routing, lanes_of
from deltaloom.tuned.saved import SavedDelta, SavedMethod, attach_saved, misfits

LANE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tuned(nn.Module):
    """A frozen model and its deltas; called like the model. Only delta parameters train."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_untouched(model)
        self.model = model
        self.routing = Routing()
        self.lanes: dict[str, list[Attached]] = {}
        self.shared = nn.ModuleDict()
        self.prompts = nn.ModuleDict()
        self.prefixes = nn.ModuleDict()  # registered here, so that devices and modes reach them; the attention modules ask them
        self.watchers = Watchers(self.routing.layout, self.readers)
        self.merged: str | None = None
        self.kept: Merged | None = None
        self.training = model.training
        self._own_modules = tuple(model.modules())  # a step looks at them; walking through those of all lanes costs too much
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        model.requires_grad_(False)

    # ---- attaching ------------------------------------------------------------------------------------------------

    def add(self, name: str, methods: Sequence[Method], *, heads: Sequence[Method] = (), tokenizer: Any = None,
            seed: int = 0) -> None:
        """Attach a further named delta and use it. All sites are resolved and all deltas made before the model is touched.

        A head whose layer one of the methods replaces already needs no second delta and gets none.

        Raises:
            TargetError: a target matches nothing. SettingsError: the name is not legal or there is no method.
            RefusedError: the name is taken, or the methods contradict one another.
        """
        self._check_new(name)
        if not methods and not heads:
            raise SettingsError("no method is given", hint="Name at least one, such as LoRA(rank=8).")
        with self.bare() as model:
            context = AttachContext(model, tokenizer, torch.Generator().manual_seed(seed), self._fixed(),
                                    layout=self.routing.layout)
            made = [Attached(method, method.attach(method.sites(model), context), False) for method in methods]
            replaced = {path for path, _ in replaced_tensors(made)}
            for method in heads:
                sites = [site for site in method.sites(model) if site.path not in replaced]
                if sites:
                    made.append(Attached(method, method.attach(sites, context), True))
        self._take_in(name, made)

    def add_saved(self, name: str, saved: SavedDelta) -> None:
        """Attach a saved delta under a name and use it.

        Raises:
            CheckpointError: sites or tensors that do not fit this model; nothing has been changed.
        """
        self._check_new(name)
        with self.bare() as model:
            context = AttachContext(model, fixed=self._fixed(), loading=True, layout=self.routing.layout)
            made = [Attached(part.method, attach_saved(part, context), part.is_head) for part in saved.methods]
        fit_to(made, saved.state)
        problems = misfits(state_of(made), saved.state)
        if problems:
            raise CheckpointError("the saved delta does not fit this model", problems=problems[:20])
        self._take_in(name, made)
        self.load_delta_state(saved.state, name)

    def _check_new(self, name: str) -> None:
        if not LANE_NAME.fullmatch(name):
            raise SettingsError("a delta's name has letters, digits, _ and - only", got=name)
        if name in self.lanes:
            raise RefusedError("a delta of that name is attached already", got=name, hint="Choose another or remove it first.")
        if self.merged is not None:
            raise RefusedError("a delta is merged into the weights", got=self.merged, hint="Call `tuned.unmerge()` first.")

    def _fixed(self) -> frozenset[str]:
        fixed = frozenset(key for key, required in self._required_grad.items() if not required)
        return fixed if len(fixed) < len(self._required_grad) else frozenset()

    def _take_in(self, name: str, made: list[Attached]) -> None:
        check_together(made)
        device = self.device
        for attached in made:
            for _, module in attached.named_deltas():
                module.to(device).train(self.training)
        self.lanes[name] = made
        self.watchers.watch(self.model)
        try:
            for index, attached in enumerate(made):
                self._install(name, index, attached)
        except BaseException:
            self.remove(name)
            raise
        self.routing.lanes = name

    def _install(self, lane: str, index: int, attached: Attached) -> None:
        for key, module in attached.attachment.shared.items():
            self.shared[f"{lane}/{index}/{key}".replace(".", "/")] = module
        for site, delta in attached.attachment.deltas.items():
            if isinstance(delta, PrefixDelta):
                self.prefixes[f"{lane}/{index}/{site.name}".replace(".", "/")] = delta
                tap = None
                if delta.gates:  # it reads what the attention module reads
                    tap = Tap()
                    self._wrapper(site.path).entries.append(tap)
                install_prefix(self.model, lane, site, delta, self.routing, tap)
            elif isinstance(delta, InputDelta):
                self.prompts[lane] = delta
            else:
                wrapper = self._wrapper(site.path)
                wrapper.add(lane, site, delta)
                if site.entry is not None:
                    tap = Tap()
                    self._wrapper(site.entry).entries.append(tap)
                    wrapper.exits[f"{lane}/{site.name}"] = tap

    def _wrapper(self, path: str) -> Adapted:
        module = self.model.get_submodule(path)
        if not isinstance(module, Adapted):
            module = Adapted(module, path, self.routing).train(module.training)
            replace_module(self.model, path, module)
        return module

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """The model without any wrapper or prefix within a `with` block; everything is put back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self.routing.set(None))
            for wrapper in wrappers(self.model):
                replace_module(self.model, wrapper.path, wrapper.base)
                stack.callback(replace_module, self.model, wrapper.path, wrapper)
            yield self.model

    def remove(self, name: str) -> None:
        """Forget a named delta; layers that carry no other are given back as they were."""
        if self.merged == name:
            raise RefusedError("this delta is merged into the weights", got=name, hint="Call `tuned.unmerge()` first.")
        for site, delta in self.pairs(name):
            if isinstance(delta, PrefixDelta):
                uninstall_prefix(self.model, name, site)
        for wrapper in wrappers(self.model):
            wrapper.remove(name)
        used = {id(tap) for wrapper in wrappers(self.model) for tap in wrapper.exits.values()} | taps_of_prefixes(self.model)
        for wrapper in wrappers(self.model):
            wrapper.entries = [tap for tap in wrapper.entries if id(tap) in used]
            if not wrapper.lanes and not wrapper.entries:
                replace_module(self.model, wrapper.path, wrapper.base)
        for key in [key for key in self.shared if key.startswith(f"{name}/")]:
            del self.shared[key]
        for key in [key for key in self.prefixes if key.startswith(f"{name}/")]:
            del self.prefixes[key]
        if name in self.prompts:
            del self.prompts[name]
        del self.lanes[name]
        if not self.lanes:
            self.watchers.stop()
        lanes = self.routing.lanes
        if name in (lanes if isinstance(lanes, tuple) else (lanes,)):
            self.routing.lanes = next(iter(self.lanes), None)

    def discard(self, part: Attached, name: str | None = None) -> None:
        """Take one method out of a lane; those after it move up. Only for deltas inside layers.

        Raises:
            RefusedError: the delta is merged, or the method has a prefix or a prompt.
        """
        lane = self._known(name or self.name)
        rows = any(isinstance(delta, PrefixDelta | InputDelta) for delta in part.attachment.deltas.values())
        if self.merged is not None or rows:
            raise RefusedError("this method cannot be taken out on its own", got=part.method.name)
        gone = set(map(id, part.attachment.deltas.values()))
        for wrapper in wrappers(self.model):
            wrapper.discard(lane, gone)
            if not wrapper.lanes and not wrapper.entries:
                replace_module(self.model, wrapper.path, wrapper.base)
        for key in [key for key, module in self.shared.items() if any(module is own for own in part.attachment.shared.values())]:
            del self.shared[key]
        self.lanes[lane] = [other for other in self.lanes[lane] if other is not part]

    def detach(self) -> nn.Module:
        """Take everything off; gives back the model bit for bit as it was, trainable as it was."""
        if self.merged is not None:
            raise RefusedError("a delta is merged into the weights", got=self.merged,
                               hint="Call `tuned.unmerge()` first, or use the merged model: `with tuned.bare() as model`.")
        for name in list(self.lanes):
            self.remove(name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.required_grad(name))
        return self.model

    def required_grad(self, name: str) -> bool:
        """Whether a parameter of the model was trainable before it was frozen; new ones were not."""
        return self._required_grad.get(name, False)

    # ---- looking --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next(self.model.parameters()).device

    @property
    def name(self) -> str:
        """The lane in use, if it is one for the whole batch; else the first one."""
        lanes = self.routing.lanes
        if isinstance(lanes, str):
            return lanes
        return next(iter(self.lanes))

    def attached(self, name: str | None = None) -> list[Attached]:
        """The methods of a lane (the one in use by default), in order."""
        return self.lanes[self._known(name or self.name)]

    def pairs(self, name: str | None = None) -> list[tuple[Site, Delta]]:
        """Every (site, delta) of a lane, in order."""
        return [pair for attached in self.attached(name) for pair in attached.attachment.deltas.items()]

    def delta_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The trainable parameters of a lane by their names in the checkpoint; a parameter that several share once."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for index, attached in enumerate(self.attached(name)):
            for place, module in attached.named_deltas():
                for key, parameter in module.named_parameters():
                    if parameter.requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        found[f"{index}:{place}:{key}"] = parameter
        return found

    def counts(self, name: str | None = None) -> tuple[int, int]:
        """(parameters of the deltas, parameters of the heads that the task added)."""
        heads = {index for index, attached in enumerate(self.attached(name)) if attached.is_head}
        sizes = [0, 0]
        for key, parameter in self.delta_parameters(name).items():
            sizes[int(key.partition(":")[0]) in heads] += parameter.numel()
        return sizes[0], sizes[1]

    def never_ran(self, name: str | None = None) -> list[str]:
        """Sites of a lane whose layer has not been called since it was attached: their deltas have no effect."""
        lane = name or self.name
        ran = {wrapper.path for wrapper in wrappers(self.model) if lane in wrapper.ran}
        pairs = [pair for pair in self.pairs(lane) if not isinstance(pair[1], PrefixDelta | InputDelta)]
        # some deltas have no parameters of their own: they read what is shared, and say what they are in the layer's place
        own: list[tuple[Site, list[Tensor]]] = [(site, [*delta.parameters()] or [*delta.override().values()])
                                                for site, delta in pairs]
        live = {id(tensor) for site, tensors in own if site.path in ran for tensor in tensors}  # also through a tied layer
        return [site.name for site, tensors in own
                if site.path not in ran and not (tensors and all(id(tensor) in live for tensor in tensors))]

    # ---- running --------------------------------------------------------------------------------------------------

    def use(self, lanes: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Switch the delta: a name, None for the bare model, or a name (or None) for each row of the batch.

        Takes effect at once; as a context manager (`with tuned.use("b"): ...`) it switches back at the end.
        """
        for lane in [lanes] if lanes is None or isinstance(lanes, str) else lanes:
            if lane is not None:
                self._known(lane)
            if self.merged is not None and lane != self.merged:
                raise RefusedError("a delta is merged into the weights, so that no other can be used, nor the bare model",
                                   got=self.merged, hint="Call `tuned.unmerge()` first.")
        before = self.routing.lanes
        self.routing.lanes = lanes_of(lanes)
        stack = ExitStack()
        stack.callback(setattr, self.routing, "lanes", before)
        return stack  # type: ignore[return-value]

    def in_use(self) -> list[str]:
        """The lanes that act on the next call, each once."""
        lanes = self.routing.lanes
        return [lane for lane in dict.fromkeys(lanes if isinstance(lanes, tuple) else (lanes,)) if lane is not None]

    def checkpoint_activations(self) -> None:
        """Keep only each block's input for backward and run the block again there: less memory, a third more time.

        A block runs again with the lanes of its forward call, even if `use` has switched them since.
        """
        options = {"use_reentrant": False, "context_fn": self.routing.kept}
        self.model.activation_checkpointing_enable(options)  # type: ignore[operator]
        self.model.disable_input_require_grads()  # type: ignore[operator]  # only reentrance needs them; they cost time

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The model's own output. With a prompt, its rows are put in front and taken off the logits again.

        Raises:
            RefusedError: a training step with reentrant activation checkpointing, which loses gradients.
        """
        if self.training and torch.is_grad_enabled():
            refuse_reentrant(self._own_modules)
        labels = inputs.get("labels")
        with ExitStack() as stack:
            if isinstance(labels, Tensor) and labels.ndim == 2 and is_a_decoder(self.model):
                stack.enter_context(self.routing.layout.reading(labels))
            if not self._prompting():
                return self.model(*args, **inputs)
            prepared, length = self.prepared(inputs)
            return strip_prompt(self.model(*args, **prepared), length, self.model)

    def prepared(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The model's inputs with the prompt's rows in front, and how many rows these are (0 without a prompt)."""
        if not self._prompting():
            return inputs, 0
        readers = [reader for reader in self.readers() if reader.path is None]
        if readers:
            mask = inputs.get("attention_mask")
            show(readers, self.model, inputs, Places(None if mask is None else mask != 0), self.routing.layout.text)
        lanes = self.in_use()
        prompts = {lane: delta.rows() for lane, delta in self.prompts.items() if lane in lanes and isinstance(delta, InputDelta)}
        return insert_prompt(self.model, inputs, prompts, self.routing)

    def readers(self) -> list[TextReader]:
        """What decides something by the input text of each row, of the lanes in use."""
        lanes = set(self.in_use())
        return [module for key, module in self.shared.items() if isinstance(module, TextReader) and key.split("/")[0] in lanes]

    def _prompting(self) -> bool:
        return any(lane in self.prompts for lane in self.in_use())

    def hidden(self, **inputs: Any) -> tuple[Tensor, nn.Module]:
        """(last hidden states (batch, time, d_model) without the prompt's rows, language-model head) of a causal model."""
        head = output_layer(self.model)
        if head is None:
            raise RefusedError(f"{type(self.model).__name__} has no language-model head")
        prepared, length = self.prepared(inputs)
        output = self.model.get_decoder()(**prepared)  # type: ignore[operator]
        return output.last_hidden_state[:, length:], head

    def penalty(self) -> Tensor:
        """The sum of the penalties of the lanes in use, a scalar; exactly 0 when no delta has one."""
        pairs = [pair for lane in self.in_use() for pair in self.pairs(lane)]
        found = [delta.penalty() for _, delta in pairs if type(delta).penalty is not Delta.penalty]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)

    def warm_ups(self, name: str | None = None) -> list[WarmUp]:
        """What a lane's methods want to see before the first step of a new run."""
        made = [attached.method.warm_up(attached.attachment) for attached in self.attached(name)]
        return [warm_up for warm_up in made if warm_up is not None]

    def controllers(self, plan: StepPlan, name: str | None = None) -> list[Controller]:
        """New controllers for a lane's methods, for a run of that many steps."""
        made = [attached.method.controller(attached.attachment, plan) for attached in self.attached(name)]
        return [controller for controller in made if controller is not None]

    # ---- state ----------------------------------------------------------------------------------------------------

    def delta_state(self, name: str | None = None) -> dict[str, Tensor]:
        """A lane's tensors by `method index:site:name`; detached, not copied."""
        return state_of(self.attached(name))

    def saved(self, name: str | None = None) -> SavedDelta:
        """A lane as it is saved: its methods with the names of their sites, and its tensors, detached and not copied."""
        parts = [SavedMethod(attached.method, tuple(site.name for site in attached.attachment.deltas), attached.is_head)
                 for attached in self.attached(name)]
        return SavedDelta(tuple(parts), self.delta_state(name))

    def load_delta_state(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """Take back what `delta_state` gave, also from a time when adaptive ranks were others.

        No value is changed unless every name and shape fits.

        Raises:
            CheckpointError: missing, unexpected or differently shaped tensors, all of them listed.
        """
        before = {key: tensor.clone() for key, tensor in self.delta_state(name).items()}
        fit_to(self.attached(name), state)
        problems = misfits(self.delta_state(name), state)
        if problems:
            fit_to(self.attached(name), before)
            state = before
        own = self.delta_state(name)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        if problems:
            raise CheckpointError("the saved delta does not fit the attached one", problems=problems[:20])

    # ---- merging --------------------------------------------------------------------------------------------------

    def merge(self, name: str | None = None, *, requantise: bool = False) -> MergeFacts:
        """Fold a lane into the weights; see `deltaloom.tuned.merging.merge`.

        Raises:
            RefusedError: a delta cannot be folded, with the reason; nothing has been changed.
        """
        return merge(self, name, requantise=requantise)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        unmerge(self)

    def _known(self, name: str) -> str:
        if name not in self.lanes:
            raise SettingsError("no delta of that name is attached", got=name, legal=self.lanes,
                                hint=did_you_mean(name, self.lanes))
        return name


def attach(model: nn.Module, methods: Sequence[Method], name: str = "default", *, heads: Sequence[Method] = (),
           tokenizer: Any = None, seed: int = 0) -> Tuned:
    """A tuned model: `model` frozen, with the deltas of `methods` composed in order under one name.

    `heads` are methods that the task adds for new heads (counted apart); `tokenizer` is needed by methods whose initial
    values come from text; `seed` decides all random initial values.

    Raises:
        TargetError, SettingsError, RefusedError: nothing has been changed.
    """
    with _undone_on_error(model):
        tuned = Tuned(model)
        tuned.add(name, methods, heads=heads, tokenizer=tokenizer, seed=seed)
    return tuned


def restore(model: nn.Module, saved: SavedDelta, name: str = "default") -> Tuned:
    """A tuned model with a saved delta. If `model` is one already, the delta becomes a further one of it, and is used.

    Raises:
        CheckpointError: the delta does not fit the model; nothing has been changed.
    """
    if isinstance(model, Tuned):
        model.add_saved(name, saved)
        return model
    with _undone_on_error(model):
        tuned = Tuned(model)
        tuned.add_saved(name, saved)
    return tuned


def check_untouched(model: nn.Module) -> None:
    """Refuse a model that carries deltas already: a second set of wrappers around them would not be seen."""
    if wrappers(model) or has_prefixes(model):
        raise RefusedError("this model carries deltas already", hint="Use `tuned.add(name, methods)` for a further delta, or "
                           "`tuned.detach()` first.")


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        raise
