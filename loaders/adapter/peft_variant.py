"""Every adapter that PEFT makes of a `LoraConfig` other than the default: DoRA, PiSSA, ranks by layer, saved modules …

What it consists of and what it starts from are PEFT's own answers: it is asked once, on `meta`, and initialises each
layer by itself when its turn comes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import DTYPE_CODES, TORCH_NAMES
from ..decision import Decision
from ..errors import UsageError, said_by
from ..flags.lora_config import NEW_TOKENS
from ..flags.request import Request
from ..model.components import LinearLayer
from ..steps.step import OutputTensor, Step, torch_dtype
from .adapted_model import AdaptedModel, RefusalError, StoredTensor, adapt, import_peft
from .base_tensors import CopyOfBase
from .interface import AdaptedLayer, BaseModel
from .peft_layer import FromWeight, InitByPeft, LoneLayer
from .peft_lora import PeftLora, without_dropout
from .targets import ADAPTED, Target, Targets, count_matches, is_match

if TYPE_CHECKING:
    from peft import LoraConfig

    from .draws import Draws

_CHANGING = ("pissa", "olora")
"""Initialisations that change the base, by how they begin."""
_COPIES = {"pissa": 16, "pissa_niter": 7, "olora": 9, "dora": 5}
"""What PEFT allocates to compute an initialisation, in weights of two bytes an element, as measured: at most 14.7, 6.2,
8.3 and 4.3, for square weights and such of 1 to 4."""
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True, eq=False)
class PeftVariant:
    """An adapter by PEFT's `LoraConfig`, as it is asked for, and as PEFT makes it of a base."""

    plain: PeftLora
    """Rank, alpha and dropout, without what else is asked for."""
    settings: Mapping[str, Any]
    """Fields of `LoraConfig`, where they are not the plain one's."""
    made: AdaptedModel | None = None
    """None until PEFT was asked."""
    base: BaseModel | None = None

    @classmethod
    def of(cls, request: Request) -> PeftVariant:
        """The adapter that is asked for."""
        return cls(plain=PeftLora.of(request), settings=request.lora_settings)

    @property
    def changes_base(self) -> bool:
        """Whether its initial values are taken out of the base's weights, as PiSSA's and OLoRA's are."""
        return self._init.startswith(_CHANGING)

    @property
    def reads_base(self) -> bool:
        """Whether it starts from the base's values."""
        return self._reads_weights or bool(self.made is not None and self.made.others)

    @property
    def _init(self) -> str:
        return str(self.settings.get("init_lora_weights", True)).lower()

    @property
    def chooses(self) -> str | None:
        """`target_modules`, where that is a regular expression."""
        return self.settings.get("target_modules")

    def fitted(self, targets: Targets) -> tuple[PeftVariant, tuple[Decision, ...]]:
        """Without dropout where a parameter is adapted."""
        of_parameters = bool(self.settings.get("target_parameters"))
        plain, decisions = without_dropout(self.plain) if of_parameters else self.plain.fitted(targets)
        return replace(self, plain=plain), decisions

    def adapted(self, targets: Targets, base: Callable[[], BaseModel]) -> tuple[PeftVariant, Targets]:
        """The adapter and its targets as PEFT makes them. Raises `UsageError` where it refuses, in its words."""
        import_peft()
        found = base()
        if self._init == "orthogonal" and found.packed_under not in (None, found.compute_dtype):
            raise UsageError(
                f"PEFT's `orthogonal` takes the dtype of the weight, which is {found.packed_under} where it is 4-bit: "
                "`only Tensors of floating point and complex dtype can require gradients`",
                hint=f"pass --bnb_4bit_quant_storage {found.compute_dtype}, or another --init_lora_weights",
            )
        asked = replace(self, settings={**self.settings, **_token_ids(self.settings, found)}, base=found)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                config = asked.peft_config(targets)
            made = adapt(found.model, config, found.experts)
        except RefusalError as refusal:
            raise UsageError(f"PEFT refuses this adapter: {refusal}") from refusal
        if made.lost:
            raise UsageError(f"PEFT would not find `{made.lost[0]}` of this adapter again")
        if self.changes_base:
            # it is asked about the base before k-bit preparation, and what is copied is trained after it
            others = {
                name: replace(tensor, dtype=DTYPE_CODES[found.training_dtype(TORCH_NAMES[tensor.dtype])])
                for name, tensor in made.others.items()
            }
            made = replace(made, others=others)
        targets = _as_made(targets, made, found, self.chooses)
        for module in made.modules.values():
            for name, shape in module.expected.items():
                found_shape = module.tensors[name].shape
                if found_shape != shape:
                    raise UsageError(
                        f"PEFT's `{self._init}` makes `{name.removeprefix(ADAPTED)}` {list(found_shape)}, its layer "
                        f"takes {list(shape)}: it can't be trained",
                        hint="choose a smaller --lora_rank, another --init_lora_weights or other layers",
                    )
        saved = _check_saved(made, asked.settings.get("modules_to_save") or ())
        said = [*saved, *(str(warning.message) for warning in caught), *made.warnings]
        said = [text for text in said if "pattern keys did not match" not in text]
        warned = dict.fromkeys((*said, *_unmatched_patterns(asked.settings, targets, made)))
        return replace(asked, made=made), replace(targets, warnings=tuple(warned))

    def tensors(self, layer: Target) -> Mapping[str, tuple[int, ...]]:
        """What PEFT stores of a layer, float32."""
        return {name: tensor.shape for name, tensor in self._stored(layer.name).items()}

    def _stored(self, name: str) -> dict[str, StoredTensor]:
        """By the names of the adapter's file; of 4-bit experts, PEFT was asked about the first."""
        assert self.made is not None and self.base is not None
        first = self.base.experts.first_of(name)
        tensors = self.made.modules[first].tensors
        return {key.replace(f"{ADAPTED}{first}.", f"{ADAPTED}{name}.", 1): tensor for key, tensor in tensors.items()}

    def stored(self, layers: Iterable[LinearLayer]) -> dict[str, StoredTensor]:
        """All that is stored of it: on these layers, on parameters, and of the base itself."""
        assert self.made is not None
        of_layers = (self._stored(layer.name) for layer in layers)
        of_parameters = (module.tensors for module in self.made.modules.values() if module.parameters)
        found = {name: tensor for tensors in (*of_layers, *of_parameters) for name, tensor in tensors.items()}
        return {**found, **self.made.others}

    def copied(self, name: str) -> tuple[str, tuple[int, ...] | None]:
        """The parameter of the base that a tensor of the adapter's file copies, and which rows of it; None for all."""
        of_base = name.removeprefix(ADAPTED).replace(".base_layer.", ".")
        if not of_base.endswith(_TOKEN_ROWS):
            return of_base, None
        of_base = f"{of_base.removesuffix(_TOKEN_ROWS)}.weight"
        return of_base, _rows_of(of_base, self.settings["trainable_token_indices"])

    def steps(self, layers: Iterable[AdaptedLayer]) -> tuple[Step, ...]:
        """One step a layer, which draws for itself, and one for each tensor of the base that is trained."""
        assert self.made is not None
        from .draws import Draws

        alone = tuple(self._lone_layers(layers))
        draws = Draws([layer.rehearse for layer in alone])
        written: set[str] = set()
        steps = [self._step(layer, draws, number, written) for number, layer in enumerate(alone)]
        copied: set[str] = set()
        return (*steps, *(self._copy(name, tensor, copied) for name, tensor in self.made.others.items()))

    def _lone_layers(self, layers: Iterable[AdaptedLayer]) -> Iterator[LoneLayer]:
        """In the order in which PEFT wraps them: layers, then the modules that hold parameters."""
        import torch

        assert self.made is not None and self.base is not None
        config, model = self.made.config, self.base.model
        for adapted in layers:
            layer = adapted.layer
            if not isinstance(layer, LinearLayer):
                continue
            if layer.fused:
                module = torch.nn.Linear(
                    layer.in_features, layer.out_features, bias=False, device="meta", dtype=torch_dtype(adapted.dtype)
                )
            else:
                module = model.get_submodule(layer.name)
            yield LoneLayer(name=layer.name, module=module, parameters=(), config=config)
        for module in self.made.modules.values():
            if module.parameters:
                yield LoneLayer(
                    name=module.name,
                    module=model.get_submodule(module.name),
                    parameters=module.parameters,
                    config=config,
                )

    def _step(self, layer: LoneLayer, draws: Draws, number: int, written: set[str]) -> Step:
        """`written` are the tensors of the base that steps before this one write."""
        stored = self._stored(layer.name)
        outputs = tuple(_output(name, tensor) for name, tensor in stored.items())
        weight = self._weight(layer, written) if self._reads_weights and not layer.parameters else None
        return Step(
            operation=InitByPeft(
                layer=layer, names=tuple(stored), nbytes=sum(output.nbytes for output in outputs), weight=weight,
                draws=draws, number=number,
            ),
            outputs=outputs,
            encodes=weight is not None and weight.base.step.encodes,
            beside=weight.base.step if weight is not None and weight.writes else None,
        )  # fmt: skip

    @property
    def _reads_weights(self) -> bool:
        return self.changes_base or bool(self.settings.get("use_dora"))

    def _weight(self, layer: LoneLayer, written: set[str]) -> FromWeight:
        assert self.base is not None
        base = self.base.tensors.get(f"{layer.name}.weight")
        what = self._init if self.changes_base else "DoRA"
        if base is None:
            raise UsageError(
                f"`{what}` starts from the weight of `{layer.name}`, which is no tensor of its own in the base",
                hint="leave --lora_experts out, or take a plain adapter",
            )
        fixed = "is tied to another layer's" if base.parameter in written else base.fixed
        if self.changes_base and fixed is not None:
            raise UsageError(
                f"`{what}` changes the weight of `{layer.name}`, which {fixed}",
                hint="choose other layers with --lora_target_modules, or decode a 4-bit base with --dequantize",
            )
        writes = self.base.is_written and base.alone is not None and base.parameter not in written
        written.add(base.parameter)
        load = self.base.load if base.is_quantised and not self.changes_base else None
        kinds = ["dora"] if self.settings.get("use_dora") else []
        if self.changes_base:
            kinds.append(self._init.rpartition("_")[0] or self._init)
        copies = max(_COPIES[kind] for kind in kinds)
        return FromWeight(base=base, load=load, changes=self.changes_base, writes=writes, copies=copies)

    def _copy(self, name: str, tensor: StoredTensor, copied: set[str]) -> Step:
        """A tensor of the base, or rows of it, that are trained and stored with the adapter.

        `copied` are the base's tensors that steps before this one copy.
        """
        assert self.base is not None
        of_base, rows = self.copied(name)
        base = self.base.tensors.get(of_base)
        if base is None or base.is_quantised:
            why = "is 4-bit" if base is not None else "is no tensor of the base"
            raise UsageError(f"`{of_base}` can't be trained beside the adapter: it {why}", hint="leave it out")
        count = base.group[0].shape[0]
        if rows is not None and max(rows) >= count:
            raise UsageError(f"`--trainable_token_indices`: {max(rows)} is none of the {count:,} rows of `{of_base}`")
        output = _output(name, tensor)
        if base.parameter in copied and self.settings.get("ensure_weight_tying"):
            output = replace(output, shared=True, parameters=0)
        copied.add(base.parameter)
        return Step(operation=CopyOfBase(base=base, output=output, rows=rows), outputs=(output,))

    def peft_config(self, targets: Targets) -> LoraConfig:
        """PEFT's `LoraConfig`. Raises `UsageError` where PEFT refuses the combination, in its words."""
        from peft import LoraConfig

        fields = self.plain.peft_fields(targets)
        ranks = {**fields["rank_pattern"], **self.settings.get("rank_pattern", {})}
        try:
            return LoraConfig(**{**fields, **self.settings, "rank_pattern": ranks})
        except (ValueError, TypeError) as error:
            raise UsageError(f"PEFT refuses this adapter: {said_by(error)}") from error

    def config(self, targets: Targets, *, base: str, revision: str | None) -> dict[str, Any]:
        """The same as adapter_config.json holds it, without PEFT's defaults.

        `init_lora_weights` is true where the base was changed: PEFT would change it a second time on loading.
        """
        plain = self.plain.config(targets, base=base, revision=revision)
        ranks = {**plain.get("rank_pattern", {}), **self.settings.get("rank_pattern", {})}
        config = {**plain, **self.settings, **({"rank_pattern": ranks} if ranks else {})}
        if self.changes_base:
            config["init_lora_weights"] = True
        if self.made is not None and self.made.modules_to_save:
            config["modules_to_save"] = list(self.made.modules_to_save)
        return dict(sorted(config.items()))

    def facts(self) -> dict[str, Any]:
        """Ranks, alpha, dropout and the other fields, as the report names them."""
        return {**self.plain.facts(), "settings": dict(self.settings), "changes_base": self.changes_base}


def _token_ids(settings: Mapping[str, Any], base: BaseModel) -> dict[str, Any]:
    """`trainable_token_indices` as numbers. Raises `UsageError` for `new` where no row was added."""
    if settings.get("trainable_token_indices") != NEW_TOKENS:
        return {}
    if not base.new_tokens:
        raise UsageError(
            "`--trainable_token_indices new`: the embedding has a row for every token, and none is added",
            hint="name the tokens' ids, or add tokens to the tokenizer first",
        )
    return {"trainable_token_indices": list(base.new_tokens)}


def _check_saved(made: AdaptedModel, names: Iterable[str]) -> tuple[str, ...]:
    """Warnings about modules to save: PEFT takes whatever ends so, and is silent if nothing does.

    Raises `UsageError` for one that is none, and for one of which single rows are trained as well.
    """
    parts = [name.removeprefix(ADAPTED).split(".")[:-1] for name in made.others]
    modules = {".".join(path[:length]) for path in parts for length in range(1, len(path) + 1)}
    said = []
    for name in names:
        saved = [module for module in modules if module.endswith(name)]
        if not saved:
            raise UsageError(f"`--lora_modules_to_save`: PEFT finds no module `{name}` to save")
        others = [module for module in saved if not is_match(module, (name,))]
        if others:
            said.append(
                f"`{name}` saves `{min(others)}` as well, {len(saved)} modules in all: PEFT takes all that end so"
            )
    twice = next((name for name in made.others if ".token_adapter.base_layer." in name), None)
    if twice is not None:
        raise UsageError(
            f"`{twice.removeprefix(ADAPTED).partition('.token_adapter.')[0]}` can't be saved while single rows of its "
            "weight are trained: PEFT's forward pass raises `TrainableTokensLayer wraps an unknown layer type`",
            hint="leave out --lora_modules_to_save or --trainable_token_indices",
        )
    return tuple(said)


def _unmatched_patterns(settings: Mapping[str, Any], targets: Targets, made: AdaptedModel) -> Iterator[str]:
    """A warning for ranks and alphas of nothing; PEFT's own looks at layers alone, though parameters have them."""
    names = [layer.name for layer in targets.layers]
    names += [name for module in made.modules.values() for name in module.parameters]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                yield f"`{pattern}` of `{field}` matches nothing that is adapted"


def _rows_of(parameter: str, indices: Mapping[str, list[int]] | list[int]) -> tuple[int, ...]:
    """Those of an embedding's weight."""
    if isinstance(indices, Mapping):
        module = parameter.removesuffix(".weight")
        indices = next(rows for name, rows in indices.items() if is_match(module, (name,)))
    return tuple(indices)


def _as_made(targets: Targets, made: AdaptedModel, base: BaseModel, chooses: str | None) -> Targets:
    """What PEFT has adapted of what was chosen. Raises `UsageError` where that is something else as well."""
    others = {layer.name for layer in base.experts.layers() if base.experts.first_of(layer.name) in made.layers}
    layers = tuple(
        layer for layer in (*targets.layers, *base.layers) if layer.name in made.layers or layer.name in others
    )
    layers = tuple({layer.name: layer for layer in layers}.values())
    strange = made.layers - {layer.name for layer in layers}
    if strange:
        raise UsageError(
            f"PEFT would adapt `{min(strange)}`, which is no linear layer", hint="name linear layers, or parameters"
        )
    names = [name for module in made.modules.values() for name in module.parameters]
    parameters = {
        pattern: sum(is_match(name, (pattern,)) for name in names) for pattern in sorted(made.target_parameters)
    }
    missed = next((pattern for pattern, count in parameters.items() if not count), None)
    if missed is not None:
        if any(is_match(fused.parameter, (missed,)) for fused in base.experts.packed):
            raise UsageError(
                f"`--lora_target_parameters`: `{missed}` is 4-bit, and PEFT adapts floating-point parameters",
                hint="train 4-bit experts with --lora_experts RANK, or keep them with --quantize_experts false",
            )
        raise UsageError(f"`--lora_target_parameters`: this model has no parameter `{missed}`")
    kept = made.target_modules
    patterns = targets.patterns if chooses or kept == set(targets.patterns) else tuple(sorted(kept))
    matches = {chooses: len(layers)} if chooses else count_matches(layers, patterns)
    return replace(
        targets,
        layers=layers,
        patterns=patterns,
        matches={pattern: count for pattern, count in matches.items() if count},
        parameters=parameters,
    )


def _output(name: str, tensor: StoredTensor) -> OutputTensor:
    return OutputTensor(
        name=name, shape=tensor.shape, dtype=tensor.dtype, component="adapter", counted_as=TORCH_NAMES[tensor.dtype],
        parameters=tensor.parameters, shared=tensor.is_base,
    )  # fmt: skip
